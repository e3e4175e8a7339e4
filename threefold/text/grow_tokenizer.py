"""More pieces for a tokenizer that a model was trained with: every old id stays as it was.

Decisions:
- bpe goes on where its training stopped: new text is cut and merged by the old rules, and the most frequent pair of
  neighbours is joined, again and again (Sennrich 2016, arXiv:1508.07909). New merges stand after the old ones, so
  what the old ones do comes first, in training as in use.
- A byte-level piece never ends inside a character unless it lies within one.
- Ties go to the pair whose left, then right piece has the lower id: the same text gives the same pieces in every
  process.
- Special tokens keep their ids by standing in the model's vocabulary themselves.
- Other kinds have no such rule: a piece more in a unigram or wordpiece vocabulary changes how old text is cut.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import tokenizers

from threefold.errors import TokenizerError, UsageError
from threefold.text.clean import normalise
from threefold.text.guard import Spec, reported
from threefold.text.tokenizer_json import BYTE_SIGNS, SPACE, size_of
from threefold.text.train_tokenizer import SAMPLE, Trained, char_counts, sample

Pair = tuple[int, int]
_BYTES = {sign: byte for byte, sign in enumerate(BYTE_SIGNS)}
_SPACED = re.compile(f"{SPACE}*[^{SPACE}\n]+|{SPACE}+|\n+")
_LONGEST = 64  # characters of a new piece


def grow(spec: Spec, kind: str, texts: Iterable[str], count: int) -> Trained:
    """A tokenizer.json with up to `count` more pieces, and notes. Raises `UsageError`, `TokenizerError`."""
    if count < 1:
        raise UsageError(f"cannot grow a vocabulary by {count}", hint="give the number of new pieces, 1 or more")
    model = dict(spec["model"])
    if kind not in ("bpe", "char") or model.get("continuing_subword_prefix"):
        raise TokenizerError(
            f"a {kind} vocabulary cannot grow without changing how old text is cut",
            hint="bpe and char can; or train a new tokenizer",
        )
    vocab = {**model["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    first = size_of(spec)
    if kind == "char":
        new = _new_characters(char_counts(map(normalise, texts)), vocab, count)
    else:
        words = _words(spec, texts)
        # A vocabulary that is not written in bytes has to learn the frequent characters before it can join them.
        new = [] if _in_bytes(spec) else _new_characters(_counts_in(words), vocab, count // 2, least=2)
        vocab |= {piece: first + i for i, piece in enumerate(new)}
        cut = _merged(words, {**spec, "model": {**model, "vocab": vocab}})
        pairs = list(_Merging(cut, vocab, first + len(new), spec).go(count - len(new)))
        merges += [[left, right] for left, right in pairs]
        new += [left + right for left, right in pairs]
    vocab |= {piece: first + i for i, piece in enumerate(new)}
    notes = [f"the text yields {len(new):,} new pieces, fewer than the {count:,} allowed"] if len(new) < count else []
    return Trained({**spec, "model": {**model, "vocab": vocab, "merges": merges}}, {}, notes)


def _in_bytes(spec: Spec) -> bool:
    return (spec.get("decoder") or {}).get("type") == "ByteLevel"


def _new_characters(counts: npt.NDArray[np.int64], vocab: Mapping[str, int], most: int, *, least: int = 1) -> list[str]:
    """The most frequent characters that are no pieces yet and stand in the text `least` times."""
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts >= least)]
    return [char for code in order.tolist() if (char := chr(code)) not in vocab][:most]


def _counts_in(words: Mapping[str, int]) -> npt.NDArray[np.int64]:
    counts = np.zeros(0x110000, np.int64)
    for word, count in words.items():
        np.add.at(counts, np.frombuffer(word.encode("utf-32-le"), np.uint32), count)
    return counts


def _words(spec: Spec, texts: Iterable[str]) -> dict[str, int]:
    """The words of the sample as the old rules cut them, with their counts, in order. Raises `TokenizerError` for none."""
    rules = {**spec, "added_tokens": [], "post_processor": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    counted: Counter[str] = Counter()
    with reported("the text", "cut into words"):
        cutter = tokenizers.Tokenizer.from_str(json.dumps(rules))
        for block in sample(texts, SAMPLE["bpe"]):
            normal = cutter.normalizer.normalize_str(block) if cutter.normalizer is not None else block
            if cutter.pre_tokenizer is not None:
                counted.update([word for word, _ in cutter.pre_tokenizer.pre_tokenize_str(normal)])
            else:  # pieces are matched over the whole text; new ones keep to words
                counted.update(_SPACED.findall(normal))
    if not counted:
        raise TokenizerError(
            "there is no text to learn new pieces from", hint="check the data: every document was empty"
        )
    return dict(sorted(counted.items()))


def _merged(words: Mapping[str, int], spec: Spec) -> list[tuple[list[int], int]]:
    """(ids under the old merges, count) of each word that is more than one id."""
    rules = {**spec, "added_tokens": [], "post_processor": None, "normalizer": None, "pre_tokenizer": None}
    with reported("the text", "merge words of"):
        merger = tokenizers.Tokenizer.from_str(json.dumps(rules))
        found = merger.encode_batch_fast(list(words), add_special_tokens=False)
    return [(list(ids.ids), count) for ids, count in zip(found, words.values(), strict=True) if len(ids.ids) > 1]


class _Merging:
    """The loop of byte-pair encoding over counted words, with the counts of pairs kept up to date."""

    def __init__(self, words: list[tuple[list[int], int]], vocab: dict[str, int], first: int, spec: Spec) -> None:
        self.words = [ids for ids, _ in words]
        self.counts = [count for _, count in words]
        self.pieces = {number: piece for piece, number in vocab.items()}
        self.known, self.next = set(vocab), first
        special = {token["id"] for token in spec["added_tokens"]} | {
            vocab.get(spec["model"].get("unk_token") or "", -1)
        }
        self.closed = special | {
            number for piece, number in vocab.items() if spec["model"].get("byte_fallback") and piece.startswith("<0x")
        }
        self.may_be: Callable[[str], bool] = _whole if _in_bytes(spec) else lambda piece: True
        self.pairs: Counter[Pair] = Counter()
        self.places: defaultdict[Pair, set[int]] = defaultdict(set)
        for place in range(len(self.words)):
            self._count(place, 1)
        self.heap = [(-count, *pair) for pair, count in self.pairs.items()]
        heapq.heapify(self.heap)

    def go(self, count: int) -> Iterator[tuple[str, str]]:
        """Up to `count` merges, as their two pieces."""
        while count and self.heap:
            seen, a, b = heapq.heappop(self.heap)
            if self.pairs[a, b] != -seen or -seen < 2 or not self._joins(a, b):
                continue
            yield self.pieces[a], self.pieces[b]
            self.pieces[self.next] = self.pieces[a] + self.pieces[b]
            self.known.add(self.pieces[self.next])
            self._join((a, b), self.next)
            self.next += 1
            count -= 1

    def _joins(self, a: int, b: int) -> bool:
        piece = self.pieces[a] + self.pieces[b]
        return not {a, b} & self.closed and piece not in self.known and len(piece) <= _LONGEST and self.may_be(piece)

    def _join(self, pair: Pair, number: int) -> None:
        touched: set[Pair] = set()
        for place in sorted(self.places[pair]):
            touched |= self._count(place, -1)
            self.words[place] = _joined(self.words[place], pair, number)
            touched |= self._count(place, 1)
        for other in touched:
            if self.pairs[other] > 1:
                heapq.heappush(self.heap, (-self.pairs[other], *other))

    def _count(self, place: int, sign: int) -> set[Pair]:
        ids, count = self.words[place], sign * self.counts[place]
        found = list(itertools.pairwise(ids))
        for pair in found:
            self.pairs[pair] += count
            (self.places[pair].add if sign > 0 else self.places[pair].discard)(place)
        return set(found)


def _joined(ids: list[int], pair: Pair, number: int) -> list[int]:
    result, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            result.append(number)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


def _whole(piece: str) -> bool:
    """Whether a byte-level piece is text, or the first bytes of one character."""
    data = bytes(_BYTES[sign] for sign in piece)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.end == len(data) and error.reason == "unexpected end of data"
    return True
