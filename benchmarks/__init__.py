"""Side-by-side measurements: threefold and a peer in turns, in one run, on one machine. See README.md in this folder.

    python -m benchmarks                 everything, then the table
    python -m benchmarks help_time       one measure
    python -m benchmarks table           the table of the stored results, as Markdown

Importing this package does nothing, so that a peer's process pays for no more than the peer.
"""
