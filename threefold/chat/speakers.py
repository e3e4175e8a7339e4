"""Who answers: a model on this machine, or one that is served elsewhere.

Decisions:
- An answer is an iterator of pieces, to go through once; what is known of it at its end (why, how many tokens) are its attributes.
- A model on this machine is shown as many of the last turns as leave room for an answer: `max_new_tokens` where that is given, else
  `ANSWER_TOKENS`, or a quarter of a context too small for both. If even the question alone has no room, that is an error with both numbers.
- The draws of an answer are named by the seed and the number of the question, so that a conversation can be repeated, and a question that
  was taken back and asked again gets another answer.
"""

from __future__ import annotations

import bisect
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from threefold.chat.conversation import Message
from threefold.errors import UsageError
from threefold.generation.engine import Decoding, Request, ending_ids, own_rules, streamed
from threefold.generation.pieces import TextPieces
from threefold.generation.reading import reader
from threefold.generation.sampling import SamplingSettings
from threefold.remote import RemoteModel, RemoteStream
from threefold.text.pretrained import PretrainedTokenizer

ANSWER_TOKENS = 512  # the longest answer unless said, as far as the context has room


@dataclass
class Told:
    """What is known of an answer: why it ended (None: it is not at its end), its tokens, and the turns that the model was not shown."""

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    left_out: int = 0


class Answer(Protocol):
    """The pieces of one answer."""

    told: Told

    def __iter__(self) -> Generator[str]: ...


class Speaker(Protocol):
    """Answers messages. `number` is that of the question since the program began."""

    def answer(self, messages: Sequence[Message], number: int) -> Answer:
        """The answer, piece by piece; nothing is computed or sent before the first piece is asked for."""


class LocalSpeaker:
    """A model on this machine, with its own chat template. Raises `UsageError` for one without a template, and for one that writes
    nothing."""

    def __init__(self, model: Any, tokenizer: PretrainedTokenizer, *, max_new_tokens: int | None = None, stop: Sequence[str] = (),
                 **sampling: Any) -> None:
        self._side = reader(model)
        if tokenizer.chat_template is None:
            raise UsageError("this model has no chat template: it was not trained on conversations",
                             hint="`threefold finetune --task instruct` teaches it and saves one; `threefold generate` goes on with any text")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UsageError(f"`max_new_tokens` is {max_new_tokens}", hint="an answer has 1 or more")
        self._model, self._tokenizer, self._most, self._stop = model, tokenizer, max_new_tokens, tuple(stop)
        self._settings = SamplingSettings(**sampling)
        self._eos = ending_ids(model, tokenizer) | tokenizer.turn_ends()

    def answer(self, messages: Sequence[Message], number: int) -> Answer:
        """As of `Speaker`."""
        ids, left_out = self._shown(messages)
        room = self._side.room(len(ids))
        new = self._most or (ANSWER_TOKENS if room is None else min(ANSWER_TOKENS, room))
        request = Request(ids, new, self._settings, self._eos, number, own_rules(self._model, len(self._side.opening(ids, None))))
        return _LocalAnswer(self._model, self._tokenizer, request, self._stop, left_out)

    def _shown(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], int]:
        """The ids of as many of the last turns as fit, and how many were left out."""
        first = 1 if messages[0]["role"] == "system" else 0
        begins = [n for n, message in enumerate(messages) if message["role"] == "user"]  # of turns; the last is the question
        made: dict[int, tuple[int, ...]] = {}

        def ids(left_out: int) -> tuple[int, ...]:
            if left_out not in made:
                shown = [*messages[:first], *messages[begins[left_out]:]]
                made[left_out] = tuple(self._tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False))
            return made[left_out]

        left_out = 0
        if not self._fits(ids(0)):
            left_out = bisect.bisect_left(range(len(begins) - 1), True, lo=1 if len(begins) > 1 else 0, key=lambda n: self._fits(ids(n)))
        found = ids(left_out)
        self._side.check(len(found), self._needed())
        return found, left_out

    def _needed(self) -> int:
        return self._most or min(ANSWER_TOKENS, max(1, self._side.context // 4))

    def _fits(self, ids: tuple[int, ...]) -> bool:
        try:
            self._side.check(len(ids), self._needed())
        except UsageError:
            return False
        return True


class _LocalAnswer:
    def __init__(self, model: Any, tokenizer: PretrainedTokenizer, request: Request, stop: Sequence[str], left_out: int) -> None:
        self.told = Told(prompt_tokens=len(request.prompt), left_out=left_out)
        self._decoding = Decoding(model, [request])
        self._pieces = TextPieces(tokenizer, self._decoding.openings[0], stop)

    def __iter__(self) -> Generator[str]:
        try:
            yield from streamed(self._decoding, self._pieces)
            self.told.finish_reason = "stop" if self._pieces.stopped else self._decoding.finished[0] or "length"
        finally:  # also where the answer is cut off
            self.told.new_tokens = len(self._decoding.tokens[0])


class ServedSpeaker:
    """A model behind a protocol. What a conversation may hold is the server's to say."""

    def __init__(self, model: RemoteModel, **arguments: Any) -> None:
        self._model, self._arguments = model, {"max_new_tokens": ANSWER_TOKENS, **arguments}

    def answer(self, messages: Sequence[Message], number: int) -> Answer:
        """As of `Speaker`."""
        return _ServedAnswer(self._model.stream(messages, **self._arguments))


class _ServedAnswer:
    def __init__(self, stream: RemoteStream) -> None:
        self.told, self._stream = Told(), stream

    def __iter__(self) -> Generator[str]:
        try:
            yield from self._stream
        finally:
            self._stream.close()
        if (done := self._stream.completion) is not None:
            self.told.finish_reason, self.told.prompt_tokens, self.told.new_tokens = done.finish_reason, done.prompt_tokens, done.new_tokens
