"""The log: strict JSON, whole lines, and on resume no more is forgotten than is done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.training.log import RunLog, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values))
def test_every_line_is_strict_json_in_utf8(line: dict[str, object]) -> None:
    text = encode(line)
    assert "\n" not in text
    json.loads(text.encode().decode(), parse_constant=lambda word: pytest.fail(word))


def test_numbers_that_json_has_no_word_for() -> None:
    assert json.loads(encode({"a": float("nan"), "b": [float("inf")], "c": {"d": -float("inf")}, "e": (1, 2)})) == {
        "a": "nan",
        "b": ["inf"],
        "c": {"d": "-inf"},
        "e": [1, 2],
    }
    assert json.loads(encode({"x": "\ud800 가"})) == {"x": "\ud800 가"} and "가" in encode({"x": "가"})
    assert json.loads(encode({"x": 0.1 + 0.2, "n": 2**63}))["x"] == 0.1 + 0.2


def lines_of(*words: str) -> list[dict[str, object]]:
    """`s5` a step, `e5` an evaluation, `w5` a whole one, `d5` a decision, `f5` finished, at step 5."""
    kinds: dict[str, dict[str, object]] = {
        "s": {"loss": 1.0},
        "e": {"event": "evaluation", "whole": False},
        "w": {"event": "evaluation", "whole": True},
        "d": {"event": "decision", "decision": "x"},
        "f": {"event": "finished"},
    }
    return [{"step": int(word[1:]), **kinds[word[0]]} for word in words]


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("s1 s2 s3", 3, "s1 s2 s3"),
        ("s1 s2 s3", 2, "s1 s2"),
        ("s1 d1 s2 d2 s3 d9 s4", 2, "s1 d1 s2 d2 d9"),
        ("s1 d9 s2 s3", 1, "s1 d9"),
        ("s1 e1 s2 e2", 1, "s1 e1"),
        ("s1 s2 w2 f2", 2, "s1 s2"),
        ("s1 s2 w2 f2 s3", 3, "s1 s2 w2 f2 s3"),
        ("d0 s1", 0, "d0"),
        ("d0 s3 d5 s1 s2", 2, "d0 d5"),
        ("", 5, ""),
    ],
)
def test_what_is_done_again_is_forgotten(tmp_path: Path, before: str, step: int, after: str) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for line in lines_of(*before.split()):
        log.append(line)
    prefix = log.path.read_bytes() if before else b""
    log.resume_at(step)
    assert log.lines() == lines_of(*after.split())
    log.resume_at(step)
    kept = sum(a == b for a, b in zip(before.split(), after.split(), strict=False))
    if before == "" or kept == len(after.split()):
        assert prefix.startswith(log.path.read_bytes() if log.path.exists() else b"")


@given(
    st.integers(0, 300),
    st.sampled_from([b"", b"\x00\x00\x00", b'{"step": 4', b'{"step":4,"loss":1}', b"\xff\xfe\n", b"[1]\n"]),
)
@settings(max_examples=60)
def test_F18_any_torn_end(tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes) -> None:
    log = RunLog(tmp_path_factory.mktemp("log") / "log.jsonl")
    for line in lines_of("s1", "d1", "s2", "e2", "s3"):
        log.append(line)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:cut] + tail)
    good = whole[:cut].count(b"\n")
    assert log.lines() == lines_of("s1", "d1", "s2", "e2", "s3")[:good] or tail.startswith(b"{")
    again = RunLog(log.path)
    again.append({"event": "decision", "step": 9, "decision": "y"}, sync=True)
    assert RunLog(log.path).lines()[-1]["decision"] == "y", "never glued to a torn line"
    again.resume_at(3)
    assert again.lines()[-1]["decision"] == "y"


def test_a_line_that_cannot_be_read_hides_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for line in lines_of("d0", "s1", "s2", "d3", "s3"):
        log.append(line)
    data = log.path.read_bytes().splitlines(keepends=True)
    data[1] = b'{"step": 1, "lo\x07s": 1}\n'
    log.path.write_bytes(b"".join(data))
    assert log.lines() == lines_of("d0", "s2", "d3", "s3")
    log.resume_at(2)
    assert log.path.read_bytes() == b"".join(data[:4])


def test_reading_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n{"torn')
    RunLog(tmp_path / "log.jsonl").lines()
    RunLog(tmp_path / "none.jsonl").sync()
    assert RunLog(tmp_path / "none.jsonl").lines() == []
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"torn") and not (tmp_path / "none.jsonl").exists()
