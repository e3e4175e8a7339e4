"""More pieces for a tokenizer that a model was trained with: every old id stays as it was.

Decisions:
- bpe goes on where its training stopped: new text is cut and merged by the old rules, and the most frequent pair of
  neighbours is joined, again and again (Sennrich 2016, arXiv:1508.07909). New merges stand after the old ones, so what
  the old ones do comes first, in training as in use.
- Special tokens keep their ids by standing in the model's vocabulary themselves, and no merge gives one.
- A vocabulary that is not written in bytes first gets the frequent characters that it does not know.
- Other kinds have no such rule: a piece more in a unigram or wordpiece vocabulary changes how old text is cut.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from threefold.errors import TokenizerError, UsageError
from threefold.text.clean import normalise
from threefold.text.guard import Spec, reported
from threefold.text.tokenizer_json import SPACE, size_of
from threefold.text.train_tokenizer import Trained, char_counts, sample

SAMPLE = 8_000_000  # bytes of text to learn from
_SPACED = re.compile(f"{SPACE}*[^{SPACE}\\n]+|{SPACE}+|\\n+")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BASE = 2**16  # the character that stands for the piece with id 0
_GAP = "\x00"


def with_special(spec: Spec, tokens: Sequence[str]) -> Spec:
    """A tokenizer.json with further special tokens, which are cut out of a text before anything else. Raises UsageError for one
    that is there already, named twice, or empty."""
    there = {token["content"] for token in spec["added_tokens"]} | set(spec["model"]["vocab"] if isinstance(spec["model"]["vocab"], dict) else ())
    added = list(spec["added_tokens"])
    for number, token in enumerate(tokens):
        if not token.strip() or token in there:
            raise UsageError(f"the token {token!r} cannot be added: " + ("the tokenizer has it already" if token in there else "it is blank"),
                             hint="name tokens that are new, each once")
        there.add(token)
        added.append({"id": size_of(spec) + number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True})
    return {**spec, "added_tokens": added}


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
        pairs = _learnt(cut, vocab, count - len(new), spec)
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
    """The words of the sample as the old rules cut them, and their counts. Raises `TokenizerError` for none."""
    rules = {**spec, "added_tokens": [], "post_processor": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    counted: Counter[str] = Counter()
    with reported("the text", "cut into words"):
        cutter = tokenizers.Tokenizer.from_str(json.dumps(rules))
        for block in sample(texts, SAMPLE):
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


def _learnt(
    cut: list[tuple[list[int], int]], vocab: Mapping[str, int], count: int, spec: Spec
) -> list[tuple[str, str]]:
    """Merges that give `count` pieces at most, as their two parts, in order.

    The library's own trainer learns them: each old piece is one character for it.
    """
    pieces = {number: piece for piece, number in vocab.items()}
    barred = {token["id"] for token in spec["added_tokens"]} | {vocab.get(spec["model"].get("unk_token") or "", -1)}
    if spec["model"].get("byte_fallback"):
        barred |= {number for piece, number in vocab.items() if _BYTE.fullmatch(piece)}
    known, seen = dict(vocab), {number for ids, _ in cut for number in ids} - barred
    if not seen or count < 1:
        return []

    def portions() -> Iterator[str]:
        for ids, times in cut:
            word = "".join([_GAP if number in barred else chr(_BASE + number) for number in ids]) + _GAP
            for start in range(0, times, 1000):
                yield word * min(1000, times - start)

    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(_GAP, "removed")
    # Some pieces will turn out to be known under another cut, so a few more are learnt.
    trainer = trainers.BpeTrainer(vocab_size=len(seen) + count + count // 20 + 16, min_frequency=2, show_progress=False)
    with reported("the text", "learn new pieces from"):
        learner.train_from_iterator(portions(), trainer)
    found: list[tuple[str, str]] = []
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        left, right = ("".join([pieces[ord(sign) - _BASE] for sign in part]) for part in pair)
        if left in known and right in known and left + right not in known and len(found) < count:
            known[left + right] = -1
            found.append((left, right))
    return found
