"""New ids -> text, piece by piece, and text -> the ids of a prompt.

Decisions:
- Pieces come from text/streaming.py and so never end inside a character. The decoder is shown the end of the prompt
  first, whose text is thrown away: behind a prompt a space is a space, and at the beginning of a text it is what the
  tokenizer makes of it. What it still holds back of the prompt (a run of bytes, a word that goes on) is taken off the first piece.
- A prompt is opened as the tokenizer opens it, and its end is open. An empty one is the beginning-of-text token alone.
  What an encoder reads is a whole text, framed as the tokenizer frames every text.
"""

from __future__ import annotations

from collections.abc import Sequence

from threefold.errors import UsageError
from threefold.generation.stopping import StopStrings
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.streaming import StreamDecoder
from threefold.text.tokenizer import Tokenizer

AnyTokenizer = Tokenizer | PretrainedTokenizer

LOOK_BACK = 16  # ids of the prompt; more than the bytes of a character or the pieces that a decoder joins


def begin(tokenizer: AnyTokenizer, text: str, *, whole: bool = False) -> tuple[int, ...]:
    """The ids of a prompt, or of a `whole` text that is to be read. An empty prompt is the beginning-of-text token; raises
    `UsageError` where there is none."""
    if whole:
        framed = tokenizer.encode(text) if isinstance(tokenizer, PretrainedTokenizer) else tokenizer.encode_document(text).tolist()
        return tuple(framed)
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise UsageError(
            "the prompt is empty, and the tokenizer has no beginning-of-text token to begin with",
            hint="give the text that is to be continued",
        )
    return tuple(ids)


class TextPieces:
    """The text of one completion as its ids come: `feed` ids, show what it gives, and `finish`."""

    def __init__(self, tokenizer: AnyTokenizer, prompt: Sequence[int], stop: str | Sequence[str] = ()) -> None:
        core = tokenizer.core if isinstance(tokenizer, PretrainedTokenizer) else tokenizer
        shown = _end_of(core, prompt)
        self._decoder, twin = StreamDecoder(core), StreamDecoder(core)
        for token in shown:
            self._decoder.push(token)
            twin.push(token)
        self._prompts = twin.flush()  # what the decoder has not given yet
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was seen: the text is at its end."""
        return self._stops.stopped

    def feed(self, token: int) -> str:
        """The text that is certain with one more id; often empty in the middle of a character."""
        return self._stops.feed(self._own(self._decoder.push(token)))

    def finish(self) -> str:
        """What was still held back at the end."""
        return self._stops.feed(self._own(self._decoder.flush())) + self._stops.finish()

    def _own(self, text: str) -> str:
        """Text of the decoder without the end of the prompt."""
        if text and self._prompts:
            text, self._prompts = text.removeprefix(self._prompts), ""
        return text


def _end_of(core: Tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The last ids of a prompt, from where no run of byte pieces is cut: in a part of one no character may be whole."""
    start = max(0, len(prompt) - LOOK_BACK)
    while start > 0 and (core.piece(prompt[start]) or "").startswith("<0x"):
        start -= 1
    return prompt[start:]
