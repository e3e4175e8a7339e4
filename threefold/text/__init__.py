"""Text: documents and rows out of files, clean and without duplicates; text to ids and back.

In the order in which to read:

    lines                files -> bytes -> lines -> text in UTF-8, compressed or not
    rows                 jsonl, json, csv, tsv, parquet -> rows
    paths                a path, folder, glob or `python` -> files
    sources              files, the hub -> documents
    duplicates           documents that are equal or nearly equal
    clean                normalise, filter, deduplicate, report
    moses                how BioGPT's texts are cut into words, as rules
    guard                limits on tokenizer files that somebody else wrote
    probe_child          a foreign pre-tokenizer tried in a process of its own
    tokenizer_json       the parts of tokenizer.json and tokenizer_config.json
    conventions          what transformers' tokenizer classes take for granted
    sentencepiece_model  SentencePiece's files -> tokenizer.json
    import_marian        translation models' files -> tokenizer.json, one for each side
    import_tokenizer     vocab + merges, vocab.txt and tiktoken files -> tokenizer.json
    train_tokenizer      texts -> tokenizer.json, the same in every process
    grow_tokenizer       more pieces for a tokenizer, every old id as it was
    plain                text as text only, in portions
    tokenizer            the tokenizer itself: text -> ids -> text
    streaming            ids -> text, one at a time
    template_child       the program in which chat templates are rendered
    chat                 messages -> text and ids
    encoded              what the tokenizer under transformers' names returns
    pretrained           the tokenizer under transformers' names
"""
