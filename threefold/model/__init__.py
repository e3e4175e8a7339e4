"""The model: batches -> hidden states -> logits. One Transformer, built from one library of parts; a family is data.

Names of tensors end in their shape, one letter an axis:

    B batch   T target length   S source length (keys)   D width   H heads   K key/value heads   E head width
    F hidden width of the feed-forward   V vocabulary   N tokens of a flattened batch   L layers   G queries per key
    head

`q_BHTE` is thus a tensor of queries: batch, heads, positions, head width.

The order in which the files build on each other stands in ARCHITECTURE.md. Parts take plain arguments; `build` reads a configuration for them.
"""
