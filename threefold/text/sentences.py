"""A text as its sentences, English and Korean alike.

Decision: a sentence ends at a stop with white space behind it, quotes and brackets between them passed over. It goes on where the stop is
that of an abbreviation or of an initial, or where what follows begins with a small letter. A rule of ten lines is wrong now and then; a
model for it would be another thing to train, to load and to trust.
"""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset({
    "e.g.", "i.e.", "etc.", "cf.", "vs.", "al.", "fig.", "figs.", "eq.", "eqs.", "sec.", "vol.", "pp.", "dr.", "mr.", "mrs.", "ms.",
    "prof.", "st.", "jr.", "sr.", "approx.", "resp."})
_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s+")


def sentences(text: str) -> list[str]:
    """The sentences in their order, without white space around them; together they are the text."""
    found, start = [], 0
    for end in _END.finditer(text):
        word = text[max(start, end.start() - 40):end.start() + 1].rsplit(None, 1)[-1].lower().lstrip("([\"'“‘")
        goes_on = word in ABBREVIATIONS or re.fullmatch(r"[a-z]\.", word) or text[end.end():end.end() + 1].islower()
        if not goes_on:
            found.append(text[start:end.end()].strip())
            start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]
