"""S08: tokenizer files made to do harm are refused with an error, in bounded time and memory."""

from __future__ import annotations

import base64
import copy
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.text.helpers import small
from threefold.errors import TokenizerError
from threefold.text import guard
from threefold.text.guard import checked
from threefold.text.tokenizer import Tokenizer

BPE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def saved(folder: Path, spec: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def with_(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(BPE), **parts}


def model(**parts: Any) -> dict[str, Any]:
    return with_(model={**BPE["model"], **parts})


def unigram(vocab: list[Any]) -> dict[str, Any]:
    return with_(model={"type": "Unigram", "unk_id": 0, "vocab": vocab})


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


CHARSMAP = base64.b64encode(struct.pack("<I", 4) + b"\0\0\0\0" + b"x" * 5000 + b"\0").decode()

REFUSED = {
    "no JSON": "{",
    "deep JSON": "[" * 200_000,
    "a list": "[]",
    "no model": "{}",
    "a key twice": '{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}',
    "NaN": '{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", NaN]]}}',
    "an unknown model": model(type="Neural"),
    "a vocabulary of another type": model(vocab=["a"]),
    "an id beyond all bounds": model(vocab={"a": 4_000_000_000}),
    "a negative id": model(vocab={"a": -1}),
    "an id that is a truth value": model(vocab={"a": True}, merges=[]),
    "one id for two pieces": model(vocab={"a": 0, "b": 0}, merges=[]),
    "a merge of what is not there": model(merges=[["a", "z"]]),
    "merges in a circle": model(vocab={"": 0, "a": 1}, merges=[["", "a"], ["a", ""]]),
    "an endless piece": model(vocab={"a" * 5000: 0}, merges=[]),
    "an empty piece": unigram([["", 0.0]]),
    "a score that is none": unigram([["a", "high"]]),
    "an infinite score": unigram([["a", 1e300]]),
    "an unknown piece that is not there": {
        **unigram([["a", 0.0]]),
        "model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]},
    },
    "added tokens of another type": with_(added_tokens=[{"id": "0", "content": "x"}]),
    "an added token far away": with_(added_tokens=[{"id": 2**30, "content": "x"}]),
    "rules without end": with_(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}),
    "rules inside rules": with_(normalizer=nested(30)),
    "an endless pattern": with_(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "a" * 5000}, "behavior": "Isolated", "invert": False}
    ),
    "a character map that explodes": with_(normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
    "a character map that is none": with_(normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}),
    "a rule that is not known": with_(normalizer={"type": "Magic"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_S08_a_file_that_keeps_no_limit_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, REFUSED[name])
    begun = time.perf_counter()
    with pytest.raises(TokenizerError) as caught:
        _ = Tokenizer.load(path).backend
    assert str(tmp_path) in str(caught.value)
    assert time.perf_counter() - begun < 1.5


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"normalizer": replace({"Regex": "(x|x)*$"}, "")},
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaaaaaaa")] * 12}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(unclosed"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=["backtracking", "ambiguous", "growth", "prefix", "invalid"],
)
def test_S08_unknown_text_rules_are_tried_in_another_process(
    tmp_path: Path, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PROBE_SECONDS", 1.5)
    begun = time.perf_counter()
    with pytest.raises(TokenizerError, match="is refused|cannot read"):
        Tokenizer.load(saved(tmp_path, with_(**part)))
    assert time.perf_counter() - begun < 10


def test_S08_an_unknown_rule_that_does_no_harm_is_accepted(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|[^\p{L}]+"}, "behavior": "Isolated", "invert": False}
    assert Tokenizer.load(saved(tmp_path, with_(pre_tokenizer=split))).encode("ab") == [2]


def test_S08_a_panic_of_the_library_is_an_error_of_ours() -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(checked(with_(pre_tokenizer=split), "x", probe=False))
    with pytest.raises(TokenizerError, match="retry-limit"):
        tokenizer.encode("a" * 40 + "!")


def test_S08_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BYTES", 100)
    with pytest.raises(TokenizerError, match="at most 100"):
        Tokenizer.load(saved(tmp_path, BPE))
    monkeypatch.undo()
    monkeypatch.setattr(guard, "MAX_VOCAB", 2)
    with pytest.raises(TokenizerError, match="3 pieces"):
        Tokenizer.load(saved(tmp_path, BPE))


def test_padding_truncation_and_dropout_are_taken_out(tmp_path: Path) -> None:
    spec = model(dropout=0.9) | {
        "padding": {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
        "truncation": {"max_length": 1, "strategy": "LongestFirst", "direction": "Right", "stride": 0},
    }
    tokenizer = Tokenizer.load(saved(tmp_path, spec))
    assert tokenizer.encode("ababab") == [2, 2, 2]
    assert tokenizer.backend.encode("ababab").ids == [2, 2, 2]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "byte", "char"])
def test_our_own_files_need_no_trial(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a known rule was tried")

    monkeypatch.setattr(guard, "_probe", never)
    spec = small(kind).spec
    assert checked(spec, "x") == spec
