"""Generation: logits -> text.

In the order in which the files build on each other: sampling (the next token), stopping (stop strings), rules (what may
come next), pieces (ids to text as they come), reading (what a prompt is to a model), engine (requests decoded together),
beams (the best of several ways), arguments (`model.generate` with transformers' names).
"""
