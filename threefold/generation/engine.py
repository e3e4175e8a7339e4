"""Prompts -> text: prefill once, then one token a step for all requests that are under way.

Decisions:
- A request is data: ids in, limits, settings, and the row number that its random draws are named by. A request gives
  the same tokens alone, in any company and at any place of a batch (up to rounding of the logits).
- A prompt is the beginning of a decoder's own text, or what an encoder reads (reading.py); the loop is one.
- Beginnings of different lengths stand right-aligned with padding before them, so that all rows go on at the same place
  of the cache. Requests that are finished leave the batch as soon as they are half of it.
- Only the last position's hidden state goes through the head. The forward pass behind the last token is never run.
- Nothing is cut: a prompt that does not fit with the tokens asked for is an error that states both numbers.
- A piece of text never ends inside a character or with a part of a stop string; what `stream` yields is,
  joined, what `generate` returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from threefold.errors import UsageError, did_you_mean
from threefold.generation.pieces import AnyTokenizer, TextPieces, begin
from threefold.generation.reading import LanguageModel, reader
from threefold.generation.rules import NONE, Rules, rules_of
from threefold.generation.sampling import SamplingSettings, sample, uniforms
from threefold.model.cache import Cache

BATCH_SIZE = 16           # requests decoded together, unless said
NEW_TOKENS = 128          # unless said, as far as the context reaches
SPARE_ROOM = 512          # positions of the cache made in advance beyond the prompt

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt under way. `eos` are the ids that end it; `settings.seed` and `row` name its random draws; `start` begins
    what an encoder-decoder writes, where that is not the model's own id."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    eos: frozenset[int] = frozenset()
    row: int = 0
    rules: Rules = NONE
    start: int | None = None


@dataclass(frozen=True)
class Completion:
    """What came of a request: the text without the prompt, the new ids (with the one that ended it), why it ended."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


class Decoding:
    """Requests that are decoded together. Each `step` gives every request under way its next token.

    A step runs the model in the mode that it is in; `run_step` sees to it that dropout is off.
    """

    def __init__(self, model: LanguageModel, requests: Sequence[Request]) -> None:
        """Checks the lengths of the requests against the model's context; computes nothing yet."""
        self.model, self.requests, self._reader = model, list(requests), reader(model)
        for request in requests:
            self._reader.check(len(request.prompt), request.max_new_tokens)
        self.openings = [self._reader.opening(r.prompt, r.start) for r in requests]
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.finished: list[FinishReason | None] = [None if r.max_new_tokens else "length" for r in requests]
        self._rows = list(range(len(requests)))  # the requests that the rows of the tensors belong to
        self._cache: Cache | None = None
        self._last_B: Tensor = torch.empty(0, dtype=torch.int64)
        self._steps = 0
        device = model.device
        lengths = list(map(len, self.openings))
        self._padded = len(set(lengths)) > 1
        self._width, self._lengths_B = max(lengths), torch.tensor(lengths, device=device)
        most = max(r.max_new_tokens for r in requests)
        self._mask_BS = (
            torch.ones(len(requests), self._width + most, dtype=torch.bool, device=device) if self._padded else None
        )
        draws = None if all(r.settings.greedy for r in requests) else [
            np.zeros(most) if r.settings.greedy else uniforms(r.settings.seed, r.row, most) for r in requests]
        self._draws_BN = (
            None
            if draws is None
            else torch.from_numpy(np.stack(draws)).to(device, torch.float32 if device.type == "mps" else torch.float64)
        )
        self._settings = [r.settings for r in requests]
        self._ruled = any(r.rules != NONE for r in requests)
        self._seen_BV: Tensor | None = None
        if any(r.settings.repetition_penalty != 1 for r in requests):
            self._seen_BV = torch.zeros(len(requests), model.config.vocab_size, dtype=torch.bool, device=device)
            for row, opening in enumerate(self.openings):
                self._seen_BV[row, list(opening)] = True

    @property
    def running(self) -> bool:
        """Whether any request is under way."""
        return not all(self.finished)

    def finish(self, number: int, reason: FinishReason = "stop") -> None:
        """Take a request out (a stop string was seen, or nobody waits for it any more)."""
        self.finished[number] = self.finished[number] or reason

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """The next token of every request under way, by its number; empty when none is."""
        if not self.running:
            return {}
        self._leave()
        logits_BV = self._prefill() if self._cache is None or self._turns() else self._forward(self._last_B[:, None])
        if self._ruled:
            logits_BV = torch.stack([self._apply_rules(row, number) for row, number in zip(logits_BV, self._rows, strict=True)])
        self._last_B = sample(logits_BV, self._settings,
                              None if self._draws_BN is None else self._draws_BN[:, self._steps], self._seen_BV)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._last_B[:, None], True)
        self._steps += 1
        new = {}
        for number, token in zip(self._rows, self._last_B.tolist(), strict=True):
            if self.finished[number] is None:
                self.tokens[number].append(token)
                new[number] = token
                if token in self.requests[number].eos:
                    self.finished[number] = "stop"
                elif len(self.tokens[number]) == self.requests[number].max_new_tokens:
                    self.finished[number] = "length"
        return new

    def _turns(self) -> bool:
        """Whether a text has just outgrown the waves that its kept keys were rotated by."""
        return self._reader.turn is not None and any(
            self.finished[number] is None and len(self.openings[number]) + len(self.tokens[number]) == self._reader.turn + 1
            for number in self._rows)

    def _prefill(self) -> Tensor:
        """Run the prompts, right-aligned, and what is written behind them; returns the last logits (B, V) of each."""
        self._reader.read([self.requests[number].prompt for number in self._rows])
        before = [(0,) * (self._width - len(self.openings[number])) + self.openings[number] for number in self._rows]
        behind = [(*self.tokens[number], *(0,) * (self._steps - len(self.tokens[number]))) for number in self._rows]
        ids_BT = torch.tensor([a + b for a, b in zip(before, behind, strict=True)], device=self.model.device)
        if self._mask_BS is not None:
            self._mask_BS[:, : self._width] = (
                torch.arange(self._width, device=ids_BT.device) >= self._width - self._lengths_B[:, None]
            )
        self._cache = Cache(
            self._width + min(SPARE_ROOM, max(self.requests[number].max_new_tokens for number in self._rows))
        )
        return self._forward(ids_BT)

    def _forward(self, ids_BT: Tensor) -> Tensor:
        assert self._cache is not None
        positions_BT, mask_BS = None, None
        if self._mask_BS is not None:
            # Positions count from a row's own beginning; those of finished rows stay within the context.
            end = len(self._cache) + ids_BT.shape[1]
            places_T = torch.arange(len(self._cache), end, device=ids_BT.device)
            positions_BT = (places_T - (self._width - self._lengths_B[:, None])).clamp(0, self._reader.context - 1)
            mask_BS = self._mask_BS[:, :end]
        return self._reader.logits(ids_BT, positions_BT, mask_BS, self._cache)

    def _apply_rules(self, logits_V: Tensor, number: int) -> Tensor:
        request, new = self.requests[number], self.tokens[number]
        if self.finished[number] is not None:  # nobody looks at it
            return logits_V
        return request.rules.apply(logits_V, [*self.openings[number], *new], len(new), request.max_new_tokens, request.eos)

    def _leave(self) -> None:
        """Let finished requests leave when they are half of the rows; copying the cache costs more than an idle row."""
        stay = [row for row, number in enumerate(self._rows) if self.finished[number] is None]
        if 2 * len(stay) > len(self._rows):
            return
        index_B = torch.tensor(stay, device=self.model.device)
        self._rows = [self._rows[row] for row in stay]
        self._settings = [self._settings[row] for row in stay]
        self._lengths_B = self._lengths_B[index_B]
        if self._cache is not None:
            self._reader.keep(index_B)
            self._cache, self._last_B = self._cache.fork(stay), self._last_B[index_B]
        for name in ("_mask_BS", "_draws_BN", "_seen_BV"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[index_B])


def generate(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    prompts: str | Sequence[str],
    settings: SamplingSettings | None = None,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    **sampling: Any,
) -> list[str]:
    """The texts that follow the prompts, in order, without the prompts. See `complete` for the arguments."""
    done = complete(
        model, tokenizer, prompts, settings, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size, **sampling
    )
    return [completion.text for completion in done]


def complete(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    prompts: str | Sequence[str],
    settings: SamplingSettings | None = None,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    **sampling: Any,
) -> list[Completion]:
    """What follows each prompt, with ids and the reason for its end.

    settings        how tokens are chosen; instead, its fields may be given by name (`temperature=0.8, seed=3`)
    max_new_tokens  at most so many; without it 128, or as many as the context leaves
    stop            texts that end a completion and are not part of it
    batch_size      prompts decoded together; changes speed and memory, not the result

    An empty prompt is the beginning-of-text token alone. Of an encoder-decoder it is what the model makes of each prompt.
    Raises `UsageError` for a prompt that does not fit with the new tokens, or is empty where the tokenizer has no such
    token; `NumericError` for logits that are not finite.
    """
    requests = _requests(
        model,
        tokenizer,
        [prompts] if isinstance(prompts, str) else prompts,
        _chosen(settings, sampling),
        max_new_tokens,
    )
    for request in requests:  # before the first is run
        reader(model).check(len(request.prompt), request.max_new_tokens)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))  # neighbours need little padding
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = [requests[i] for i in chosen]
        decoding = Decoding(model, batch)
        pieces = [TextPieces(tokenizer, opening, stop) for opening in decoding.openings]
        texts = ["" for _ in batch]
        while new := run_step(decoding):
            for number, token in new.items():
                if token not in batch[number].eos:
                    texts[number] += pieces[number].feed(token)
                if pieces[number].stopped:
                    decoding.finish(number)
        for number, request in enumerate(batch):
            done[chosen[number]] = Completion(
                texts[number] + pieces[number].finish(),
                tuple(decoding.tokens[number]),
                "stop" if pieces[number].stopped else decoding.finished[number] or "length",
                len(request.prompt),
            )
    return [done[i] for i in range(len(requests))]


def stream(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    prompt: str,
    settings: SamplingSettings | None = None,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    **sampling: Any,
) -> Iterator[str]:
    """The text that follows a prompt, piece by piece as it comes: whole characters, never a part of a stop string."""
    request = _requests(model, tokenizer, [prompt], _chosen(settings, sampling), max_new_tokens)[0]
    decoding = Decoding(model, [request])  # checks before the first piece is asked for
    pieces = TextPieces(tokenizer, decoding.openings[0], stop)
    return streamed(decoding, pieces)


def streamed(decoding: Decoding, pieces: TextPieces) -> Iterator[str]:
    """The text of the one request of a decoding, piece by piece."""
    while new := run_step(decoding):
        if new[0] not in decoding.requests[0].eos and (text := pieces.feed(new[0])):
            yield text
        if pieces.stopped:
            return
    if text := pieces.finish():
        yield text


def run_step(decoding: Decoding) -> dict[int, int]:
    """A step in evaluation mode, whatever mode the model is in between two steps: a stream may be taken up in
    training."""
    with without_dropout(decoding.model):
        return decoding.step()


@contextlib.contextmanager
def without_dropout(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode for a `with` block, and then the mode that it was."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _requests(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    prompts: Iterable[str],
    settings: SamplingSettings,
    max_new_tokens: int | None,
) -> list[Request]:
    eos, side = ending_ids(model, tokenizer), reader(model)
    requests = []
    for row, text in enumerate(prompts):
        ids = begin(tokenizer, text, whole=side.whole)
        room = side.room(len(ids))
        new = max_new_tokens
        if new is None:
            new = NEW_TOKENS if room is None else min(NEW_TOKENS, max(1, room))
        requests.append(Request(ids, new, settings, eos, row, own_rules(model, len(side.opening(ids, None)))))
    return requests


def own_rules(model: LanguageModel, before: int) -> Rules:
    """What its generation config forbids and forces, of a text that begins with `before` ids."""
    return rules_of(model.generation_config, before)


def ending_ids(model: LanguageModel, tokenizer: AnyTokenizer | None = None) -> frozenset[int]:
    """The ids that end a text: those of generation_config.json (else of config.json), and the tokenizer's."""
    defaults = model.generation_config
    named = defaults.get("eos_token_id") if defaults.get("eos_token_id") is not None else model.config.eos_token_id
    ids = set() if named is None else {named} if isinstance(named, int) else set(named)
    if tokenizer is not None and tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    return frozenset(ids)


def _chosen(settings: SamplingSettings | None, sampling: dict[str, Any]) -> SamplingSettings:
    if settings is not None:
        if sampling:
            raise UsageError(
                f"settings are given as an object and by name ({', '.join(f'`{name}`' for name in sampling)})",
                hint="give one of them",
            )
        return settings
    known = [f.name for f in fields(SamplingSettings)]
    for name in sampling:
        if name not in known:
            raise UsageError(
                f"`{name}` is not a known argument",
                hint=did_you_mean(name, [*known, "max_new_tokens", "stop", "batch_size"]),
            )
    return SamplingSettings(**sampling)
