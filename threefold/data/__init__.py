"""tokens -> batches

    manifest.py   what a shard folder says of itself
    stream.py     memory-mapped ids and where documents start
    corpus.py     cleaned documents -> ids, train and validation
    shards.py     preparing, opening and verifying a shard folder
    order.py      a keyed permutation, index by index
    mixture.py    which source the next sample comes from
    loader.py     batch(step), a pure function
    windows.py    validation: every id once, never across documents
"""
