"""Evaluation: how good a model is, by one definition of loss, and what it must be better than.

loss (loss, bits per byte, perplexity), yardsticks (counting and compressing the same text).
"""
