"""Characters per token on Korean film reviews: our bpe and unigram beside SentencePiece's at the same vocabulary size.

    python benchmarks/korean_tokens.py [--data FILE] [--column review] [--sizes 8000 16000] [--json]

Both learn from the same reviews and are measured on the last 20,000, which neither has seen. SentencePiece stands
thrice: with its defaults (text is normalised to NFKC, white space is folded, what is rare is lost as `<unk>`);
lossless, as ours are (`identity`, white space kept, byte fallback); and lossless without the space that it puts in
front of each text, which GPT-2's rule for words does not have. Our figures count every character of the text.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import sentencepiece

from threefold.text.sources import read_documents
from threefold.text.tokenizer import Tokenizer

DATA = Path(os.environ.get("THREEFOLD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HELD_OUT = 20_000
LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def theirs(kind: str, size: int, train: list[str], test: list[str], **options: Any) -> dict[str, object]:
    """SentencePiece's figures."""
    model = io.BytesIO()
    begun = time.perf_counter()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(train),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    seconds = time.perf_counter() - begun
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = learnt.encode(test)
    return figures(sum(map(len, ids)), test, seconds, sum(i == learnt.unk_id() for row in ids for i in row))


def ours(kind: str, size: int, train: list[str], test: list[str]) -> dict[str, object]:
    """Threefold's figures; a document's frame is not counted."""
    begun = time.perf_counter()
    tokenizer = Tokenizer.train(kind, train, size)
    seconds = time.perf_counter() - begun
    frame = (tokenizer.bos_id is not None) + 1
    found = tokenizer.encode_documents(test)
    assert all(tokenizer.decode(ids) == text for ids, text in zip(found[:2000], test, strict=False)), (
        "the round trip is lossless"
    )
    return figures(sum(len(ids) - frame for ids in found), test, seconds, 0)


def figures(tokens: int, test: list[str], seconds: float, unknown: int) -> dict[str, object]:
    """One cell of the table."""
    return {
        "characters_per_token": round(sum(map(len, test)) / tokens, 4),
        "unknown": unknown,
        "train_seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DATA / "nsmc" / "reviews_300k.tsv.gz"))
    parser.add_argument("--column", default="review")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8000, 16000])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    texts = [document.text for document in read_documents(asked.data, {"text": asked.column})]
    train, test = texts[:-HELD_OUT], texts[-HELD_OUT:]
    rows = []
    for size in asked.sizes:
        for kind in ("bpe", "unigram"):
            row = {
                "kind": kind,
                "vocab_size": size,
                "threefold": ours(kind, size, train, test),
                "sentencepiece": theirs(kind, size, train, test),
                "sentencepiece_lossless": theirs(kind, size, train, test, **LOSSLESS),
                "sentencepiece_no_space": theirs(kind, size, train, test, **LOSSLESS, add_dummy_prefix=False),
            }
            rows.append(row)
            cells = "  ".join(
                f"{name} {row[name]['characters_per_token']:.3f} ({row[name]['train_seconds']} s)"
                for name in ("threefold", "sentencepiece", "sentencepiece_lossless", "sentencepiece_no_space")
            )
            print(f"{kind:8} {size:6}  {cells}", file=sys.stderr)
    if asked.json:
        print(json.dumps({"characters": sum(map(len, test)), "rows": rows}))


if __name__ == "__main__":
    main()
