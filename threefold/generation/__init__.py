"""Generation: logits -> text.

In the order in which the files build on each other: stopping (stop strings), sampling (the next token), pieces (ids to
text as they come), engine (requests decoded together), arguments (`model.generate` with transformers' names).
"""
