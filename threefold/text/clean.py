"""Documents -> clean documents, with an account of what was left out and why.

Decisions:
- `normalise` changes only what is broken or invisible: Unicode to NFC, line ends to LF, control characters out (line
  feed and tab stay), lone surrogates to U+FFFD. It never strips and leaves clean text as it is, character for
  character.
- Equal documents are kept once, nearly equal running text too (duplicates.py); rows of other schemas never come here.
- What a document lost or why it was dropped is counted, so that nothing disappears in silence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from threefold.text.duplicates import Duplicates
from threefold.text.sources import Document

_LINE_ENDS = re.compile("\r\n|\r|\x85|\u2028|\u2029")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def normalise(text: str) -> str:
    """The text in NFC with LF line ends, without control characters and lone surrogates. Idempotent; never strips."""
    return _normalised(text)[0]


def _normalised(text: str) -> tuple[str, list[str]]:
    changes = []
    if _CONTROL.search(text) or not text.isascii():
        if "\r" in text or "\x85" in text or "\u2028" in text or "\u2029" in text:
            text = _LINE_ENDS.sub("\n", text)
            changes.append("line ends")
        text, count = _CONTROL.subn("", text)
        if count:
            changes.append("control characters")
    if not text.isascii():
        text, count = _SURROGATE.subn("\ufffd", text)
        if count:
            changes.append("lone surrogates")
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            changes.append("not in NFC")
    return text, changes


@dataclass
class CleaningReport:
    """What was read, kept, changed and dropped. Hand the same report to several calls of `clean` to find duplicates
    among all."""

    read: int = 0
    kept: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=Duplicates, repr=False, compare=False)

    def drop(self, reason: str, where: str) -> None:
        """Count a document that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < 3:
            places.append(where)

    def to_dict(self) -> dict[str, Any]:
        """The account for JSON."""
        return {
            "read": self.read,
            "kept": self.kept,
            "characters_read": self.characters_read,
            "characters_kept": self.characters_kept,
            "changed": dict(self.changed),
            "dropped": dict(self.dropped),
            "examples": {name: list(found) for name, found in self.examples.items()},
        }


def clean(
    documents: Iterable[Document],
    report: CleaningReport | None = None,
    *,
    near_duplicates: bool = True,
) -> Iterator[Document]:
    """The documents that are kept, normalised, in their order; `report` is filled as they pass.

    near_duplicates    also drop running text of 50 words or more that nearly equals an earlier document
    """
    report = report if report is not None else CleaningReport()
    for document in documents:
        report.read += 1
        report.characters_read += len(document.text)
        text, changes = _normalised(document.text)
        for change in changes:
            report.changed[change] = report.changed.get(change, 0) + 1
        if not text.strip():
            report.drop("empty", document.source)
        elif (reason := report.duplicates.check(text, near=near_duplicates)):
            report.drop(reason, document.source)
        else:
            report.kept += 1
            report.characters_kept += len(text)
            yield document if text is document.text else Document(text, document.source, document.name)
