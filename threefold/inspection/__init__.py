"""Looking inside: what a batch trains on.

    batches    the examples of a batch in words: what is read, what is learnt, who attends to whom
"""
