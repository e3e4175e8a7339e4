"""Ids -> text, one id at a time, never in the middle of a character.

Decisions:
- What is pushed and flushed, put together, is what `decode` makes of all the ids: the screen shows what the file
  will hold.
- A byte-level vocabulary gives bytes, and an incremental UTF-8 decoder gives text.
- For other kinds the decoder looks one token back at most (a space in front, a word that goes on), so a new token
  is decoded together with the one before it, and what that one gave is taken off.
- A run of byte pieces is text only as a whole (one wrong byte makes all of them U+FFFD), so it waits for its end.
- A decoder that replaces patterns looks back further (Moses counts quotes). All ids are decoded again there, at the end of
  each word where pieces say it; what was shown stays, because such a decoder never looks ahead.
"""

from __future__ import annotations

import codecs
import re

from threefold.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class StreamDecoder:
    """Text from ids as they come: `push` each id, `flush` at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._in_bytes = tokenizer.is_byte_level
        self._table = tokenizer.token_bytes() if skip_special_tokens else tokenizer.token_bytes(special=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        steps = (tokenizer.spec.get("decoder") or {}).get("decoders", [])
        self._looks_far = any("Regex" in (step.get("pattern") or {}) for step in steps)
        self._word_end = str(tokenizer.spec["model"].get("end_of_word_suffix") or "") if self._looks_far else ""
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with one more id; empty inside a character."""
        if token in self._skip or token >= len(self._table):
            return ""
        if self._in_bytes:
            return self._decoder.decode(self._table[token] or b"")
        self._waiting.append(token)
        return "" if self._is_byte(token) or not self._ends_word(token) else self._take()

    def flush(self) -> str:
        """What was still held back. The next id begins a new text."""
        text = self._decoder.decode(b"", final=True) if self._in_bytes else self._take() if self._waiting else ""
        self._decoder.reset()
        self._before = []
        return text

    def _take(self) -> str:
        known = self._decode(self._before)
        text = self._decode(self._before + self._waiting)
        self._before = [*self._before, *self._waiting] if self._looks_far else self._waiting[-1:]
        self._waiting = []
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _ends_word(self, token: int) -> bool:
        return (self._tokenizer.piece(token) or "").endswith(self._word_end)

    def _is_byte(self, token: int) -> bool:
        data = self._table[token]
        return data is not None and len(data) == 1 and bool(_BYTE_PIECE.fullmatch(self._tokenizer.piece(token) or ""))
