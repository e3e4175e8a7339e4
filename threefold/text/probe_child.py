"""The program in which the text rules of a foreign tokenizer are tried before they are trusted.

A regular expression can be made to run for ages, and a replacement to fill the memory. Here both cost only this
process.

Decisions:
- Run as a script, never imported: it knows the tokenizers library and the standard library alone.
- In: one JSON object, a tokenizer.json with an empty vocabulary and the characters that its rules name. Out: one
  word, `ok` or what went wrong. The parent gives it seconds; it gives itself a limit of memory.
- The texts are those on which careless patterns run away: long runs of one character or of two in turn, with an end
  that does not match.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator

import tokenizers

MEMORY = 4 * 2**30
RUN = 3_000  # characters of each text
GROWTH = 16  # a text may become so many times longer


def texts(signs: str) -> Iterator[str]:
    """Runs of single characters and of pairs, each with several ends."""
    chars = "aA0 -_.é한\n" + signs
    for char in dict.fromkeys(chars):
        for end in ("", "!", "\n", "a", "0"):
            yield char * RUN + end
    for pair in ("a ", "a0", " \n", "a'", "a!", "ab", "aA"):
        yield pair * (RUN // 2) + "!"
        yield pair * (RUN // 2) + "\n"


def main() -> str:
    """What there is to say about the tokenizer on standard input."""
    asked = json.load(sys.stdin)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(asked["spec"]))
    for text in texts(asked["signs"][:60]):
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
        if len(normal) > GROWTH * len(text) + 100:
            return f"its normalizer makes {len(normal):,} characters of {len(text):,}"
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer is not None else []
        if sum(len(piece) for piece, _ in pieces) > GROWTH * len(normal) + 100:
            return f"its pre-tokenizer makes more than {GROWTH} characters of each one"
        if tokenizer.decoder is not None and len(tokenizer.decoder.decode([text])) > GROWTH * len(text) + 100:
            return "its decoder makes a text that is much longer"
    return "ok"


if __name__ == "__main__":
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(main())
