"""S04 and S08 for every kind of tokenizer and of tokenizer file: people's text never becomes a special token, and a file made
to do harm is refused, in bounded time and before memory is taken. A new kind adds a row."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.text.helpers import EVERY_KIND, small, texts
from threefold.errors import TokenizerError
from threefold.model.families import FAMILIES
from threefold.objectives import OBJECTIVES
from threefold.text import guard
from threefold.text.import_tokenizer import PAIRS, SENTENCEPIECE
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer

SECONDS = 1.5  # in which a file is refused
kinds = pytest.mark.parametrize("kind", EVERY_KIND)


# -- S04 ---------------------------------------------------------------------------------------------------------------

TURNS = ("{{ bos_token }}{% for m in messages %}{{ eos_token }}{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}")


@kinds
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_S04_a_message_never_holds_a_special_token(kind: str, objective: str, tmp_path: Path) -> None:
    """Of any tokenizer that a run may train: with the tokens that its objective adds. D11: what the template writes is there
    once, and nothing frames it again."""
    learns = OBJECTIVES[objective]
    tokenizer = small(kind) if not learns.roles and not learns.special else Tokenizer.train(
        kind, texts(), 800, special=learns.special, roles={} if kind == "wordpiece" else learns.roles)
    tokenizer.save(tmp_path)
    chat = PretrainedTokenizer.load(tmp_path)
    specials = [tokenizer.piece(number) or "" for number in sorted(tokenizer.special_ids)]
    begin, end = chat.bos_token_id, chat.eos_token_id
    written = [number for number in (begin, end, end, end) if number is not None]  # a turn each, and the last end
    for text in ("hi", specials[0], f"a{specials[-1]}b", "".join(specials[:7]), f"{specials[0][:-1]}", f"{specials[0][1:]} {specials[-1]}"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}]
        ids = chat.apply_chat_template(messages, chat_template=TURNS, return_dict=False)
        found = [number for number in ids if number in tokenizer.special_ids and (number != tokenizer.unk_id or number in written)]
        assert found == written, text


# -- S08: tokenizer.json -----------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "BPE": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "WordPiece": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##b": 2}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100},
    "WordLevel": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"},
    "Unigram": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "unk_id": 0, "byte_fallback": False},
}
models = pytest.mark.parametrize("name", MODELS)


def saved(folder: Path, model: dict[str, Any], **more: Any) -> Path:
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None, "model": model, **more}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder / "tokenizer.json"


def refused(path: Path, words: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(TokenizerError, match=words) as caught:
        _ = Tokenizer.load(path).backend
    assert str(path.name) in str(caught.value) and len(str(caught.value)) < 600
    assert time.perf_counter() - begun < SECONDS


def with_pieces(model: dict[str, Any], *pieces: tuple[str, Any]) -> dict[str, Any]:
    """The model with further pieces, each with an id or a score."""
    changed = copy.deepcopy(model)
    if isinstance(changed["vocab"], list):
        changed["vocab"] += [list(piece) for piece in pieces]
    else:
        changed["vocab"] |= dict(pieces)
    return changed


@models
def test_S08_pieces_and_their_numbers_have_bounds(name: str, tmp_path: Path) -> None:
    model, scored = MODELS[name], name == "Unigram"
    assert Tokenizer.load(saved(tmp_path, model)).encode("a")
    wrong: list[Any] = ["x", None, [], 1e300] if scored else [4_000_000_000, -1, 1, True, 2.5, "3", None, []]
    for value in wrong:
        refused(saved(tmp_path, with_pieces(model, ("c", value))), "vocabulary should give each piece")
    refused(saved(tmp_path, with_pieces(model, ("c" * 5_000, -3.0 if scored else 3))), "5,000 characters")
    for vocab in (None, "abc", 7, {} if scored else []):
        refused(saved(tmp_path, {**model, "vocab": vocab}), "not of the right type")
    refused(saved(tmp_path, model, added_tokens=[{"id": 2**31, "content": "<x>"}]), "added_tokens")
    refused(saved(tmp_path, model, added_tokens=[{"id": 9, "content": "x" * 5_000}]), "added_tokens")


@models
def test_S08_too_many_pieces_are_not_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a file read that is too large: both limits are those that a real attack meets, made small."""
    path = saved(tmp_path, MODELS[name])
    monkeypatch.setattr(guard, "MAX_VOCAB", 2)
    refused(path, "3 pieces")
    monkeypatch.undo()
    monkeypatch.setattr(guard, "MAX_BYTES", 50)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    refused(path, "at most 50")


@models
@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_S08_a_pattern_that_runs_away_is_found_under_every_model(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PROBE_SECONDS", 1.0)
    rule = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            "normalizer": {"type": "Replace", "pattern": {"Regex": "(x|x)*$"}, "content": ""}}[part]
    begun = time.perf_counter()
    with pytest.raises(TokenizerError, match="is refused"):
        Tokenizer.load(saved(tmp_path, MODELS[name], **{part: rule}))
    assert time.perf_counter() - begun < 10


# -- S08: older files --------------------------------------------------------------------------------------------------

OLDER = [*PAIRS, *((name,) for name in SENTENCEPIECE), ("vocab.txt",), ("x.tiktoken",)]


@pytest.mark.parametrize("names", OLDER, ids="+".join)
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{", b"[" * 100_000, b"\xff\xfe\n" * 50, b"a a a\n" * 50, b'{"a": 4000000000, "b": -1}'],
                         ids=["empty", "zeros", "open", "deep", "no text", "thrice", "far ids"])
def test_S08_older_files_are_refused_by_name(names: tuple[str, ...], content: bytes, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(content)
    begun = time.perf_counter()
    with pytest.raises(TokenizerError) as caught:
        _ = Tokenizer.load(tmp_path).backend
    assert any(name in str(caught.value) for name in names) and len(str(caught.value)) < 600
    assert time.perf_counter() - begun < SECONDS


@pytest.mark.parametrize("names", OLDER, ids="+".join)
def test_S08_older_files_have_a_limit_of_size(names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 200)
    monkeypatch.setattr(guard, "MAX_BYTES", 100)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    with pytest.raises(TokenizerError, match="at most 100"):
        Tokenizer.load(tmp_path)


def test_every_family_has_a_kind_that_is_tried_here() -> None:
    assert {row.tokenizer for row in FAMILIES.values()} <= set(EVERY_KIND)
