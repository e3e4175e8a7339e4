"""New ids -> text, piece by piece, and text -> the ids of a prompt.

Decisions:
- A token is bytes; bytes become text through an incremental UTF-8 decoder, so that no piece ends inside a character
  and a step costs the same however long the text is. Bytes that are no UTF-8 give U+FFFD, as in every decoder.
- Special tokens have no bytes and so no text.
- Some tokenizers write the beginning of a text with a space that is not in it. Where the text begins with the
  completion, that space is taken away as the tokenizer's own decoder does; behind a prompt a space is a space.
- A prompt begins as a document does in training, with the beginning-of-text token if there is one; the end is open.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from threefold.errors import UsageError
from threefold.generation.stopping import StopStrings


class Codec(Protocol):
    """What generation needs of a tokenizer; `text.tokenizer.Tokenizer` is one, and so is what AutoTokenizer gives."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def token_bytes(self) -> list[bytes | None]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


def begin(tokenizer: Codec, text: str) -> tuple[int, ...]:
    """The ids of a prompt. An empty one is the beginning-of-text token alone; raises `UsageError` where there is
    none."""
    ids = tokenizer.encode_prompt(text)
    if ids:
        return tuple(ids)
    if tokenizer.bos_id is None:
        raise UsageError("the prompt is empty, and the tokenizer has no beginning-of-text token to begin with",
                         hint="give the text that is to be continued")
    return (tokenizer.bos_id,)


class TextPieces:
    """The text of one completion as its ids come: `feed` ids, show what it gives, and `finish`."""

    def __init__(
        self, tokenizer: Codec, table: Sequence[bytes | None], prompt: Sequence[int], stop: str | Sequence[str] = ()
    ) -> None:
        """`table` holds the bytes of each id (`tokenizer.token_bytes()`)."""
        self._tokenizer, self._table = tokenizer, table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stop)
        self._at_start = not any(table[i] for i in prompt if i < len(table))

    @property
    def stopped(self) -> bool:
        """Whether a stop string was seen: the text is at its end."""
        return self._stops.stopped

    def feed(self, token: int) -> str:
        """The text that is certain with one more id; often empty in the middle of a character."""
        data = (
            self._table[token] if token < len(self._table) else None
        )  # a vocabulary padded for speed has ids without a token
        if not data:
            return ""
        if self._at_start:
            self._at_start = False
            if data[:1] == b" " and not self._tokenizer.decode([token], skip_special_tokens=True).startswith(" "):
                data = data[1:]
        return self._stops.feed(self._decoder.decode(data))

    def finish(self) -> str:
        """What was still held back at the end."""
        return self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish()
