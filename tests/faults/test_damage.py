"""F10 to F12, F18, F20: what is on disk is not what was written. It is noticed, named, and passed over if it may be."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kit
from tests.faults.conftest import Untroubled, ends_well
from threefold import files
from threefold.errors import CheckpointError
from threefold.training import checkpoint
from threefold.training.log import RunLog

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MEMBERS = (*checkpoint.FILES, "manifest.json")


# -- F10 to F12: the newest checkpoint is damaged ----------------------------------------------------------------------


def falls_back(run: Path, reason: str) -> None:
    """The newest is passed over with this reason, and is an error where it was asked for."""
    said: list[str] = []
    found = checkpoint.latest(run, skipped=said.append)
    assert found is not None and found.step == 5 and len(said) == 1 and reason in said[0] and "step-000010" in said[0]
    with pytest.raises(CheckpointError) as error:
        checkpoint.at(run, 10)
    assert str(error.value) == said[0] and error.value.exit_code == 3
    trainer = kit.tiny_trainer(run)
    with pytest.raises(CheckpointError):
        trainer.resume(10)


def damaged(run: Path, name: str, places: Iterator[int] | list[int], how: str) -> int:
    path, count = checkpoint.folder(run, 10) / name, 0
    whole = path.read_bytes()
    for place in places:
        kit.corrupt(path, how, place)
        with pytest.raises(CheckpointError) as error:
            checkpoint.verify(path.parent)
        assert name in str(error.value)
        path.write_bytes(whole)
        count += 1
    checkpoint.verify(path.parent)
    return count


@pytest.mark.parametrize("name", MEMBERS)
def test_F10_truncated_at_some_lengths(saved: Path, name: str) -> None:
    size = (checkpoint.folder(saved, 10) / name).stat().st_size
    lengths = [0, 1, 7, 8, 9, size - 1, *random.Random(0).sample(range(size), 25)]
    assert damaged(saved, name, lengths, "truncate") == len(lengths)
    kit.corrupt(checkpoint.folder(saved, 10) / name, "truncate", size // 2)
    falls_back(saved, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_F10_truncated_at_every_length(saved: Path, name: str) -> None:
    size = (checkpoint.folder(saved, 10) / name).stat().st_size
    assert damaged(saved, name, list(range(0, size, 1 if size < 20_000 else 17)), "truncate") > 500


def test_F10_a_run_goes_on_from_the_one_before(saved: Path, untroubled: Untroubled) -> None:
    """Also the damaged one is written anew when its step comes, and does not count for the two that are kept."""
    kit.corrupt(checkpoint.folder(saved, 10) / "optimizer.safetensors", "bit", 5000)
    warnings: list[str] = []
    trainer = kit.tiny_trainer(saved, warnings=warnings, **untroubled.settings)
    assert trainer.resume() == 5 and "optimizer.safetensors` is damaged" in warnings[0]
    ends_well(saved, untroubled)
    assert [checkpoint.verify(checkpoint.folder(saved, step)).step for step in checkpoint.steps(saved)] == [20, 15]


def test_F10_damaged_checkpoints_do_not_count(saved: Path, untroubled: Untroubled) -> None:
    kit.corrupt(checkpoint.folder(saved, 10) / "model.safetensors", "bit", 5000)
    trainer = kit.tiny_trainer(saved, **untroubled.settings)
    trainer.resume()
    for step in (6, 7):
        trainer.progress.step = step
        trainer._save()
    assert checkpoint.steps(saved) == [10, 7, 6]  # 10 is evidence
    assert checkpoint.latest(saved) is not None and checkpoint.at(saved, 6)


@pytest.mark.parametrize("name", MEMBERS)
def test_F11_some_bits_flipped(saved: Path, name: str) -> None:
    size = (checkpoint.folder(saved, 10) / name).stat().st_size
    assert damaged(saved, name, random.Random(0).sample(range(8 * size), 40), "bit") == 40
    kit.corrupt(checkpoint.folder(saved, 10) / name, "bit", 8 * (size // 2))
    falls_back(saved, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_F11_a_bit_flipped_in_every_byte(saved: Path, name: str) -> None:
    size = (checkpoint.folder(saved, 10) / name).stat().st_size
    stride = 1 if size < 20_000 else 17
    assert damaged(saved, name, [8 * at + at % 8 for at in range(0, size, stride)], "bit") > 500


@pytest.mark.parametrize("how", ["zero", "folder", "symlink", "fifo"])
@pytest.mark.parametrize("name", MEMBERS)
def test_F11_other_damage(saved: Path, name: str, how: str) -> None:
    kit.corrupt(checkpoint.folder(saved, 10) / name, how)
    falls_back(saved, "manifest.json" if name == "manifest.json" else name)


def test_F11_two_files_swapped(saved: Path) -> None:
    new, old = checkpoint.folder(saved, 10), checkpoint.folder(saved, 5)
    kit.corrupt(new / "optimizer.safetensors", "swap", other=old / "optimizer.safetensors")
    said: list[str] = []
    assert checkpoint.latest(saved, skipped=said.append) is None and len(said) == 2
    assert all("optimizer.safetensors` is damaged" in words for words in said)


def edited(path: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
    """Change a manifest; `signed`: as somebody would who knows about its own hash."""
    manifest = json.loads(path.read_text())
    change(manifest)
    if signed:
        manifest["sha256"] = checkpoint._own_hash(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format="1"), "is not a checkpoint manifest"),
        (lambda m: m.update(format=True), "is not a checkpoint manifest"),
        (lambda m: m.update(format=0), "does not describe"),
        (lambda m: m.pop("format"), "is not a checkpoint manifest"),
        (lambda m: m.update(step=5), "does not describe `step-000010`"),
        (lambda m: m.update(step="10"), "does not describe"),
        (lambda m: m.update(step=10.0), "does not describe"),
        (lambda m: m.pop("files"), "does not describe"),
        (lambda m: m.update(files=[1]), "does not describe"),
        (lambda m: m["files"].pop("state.json"), "does not describe"),
        (lambda m: m["files"]["state.json"].update(size=-1), "does not describe"),
        (lambda m: m["files"]["state.json"].update(sha256=None), "does not describe"),
        (lambda m: m["files"].update({"../state.json": m["files"]["state.json"]}), "does not describe"),
    ],
)
def test_F12_edited_manifest(saved: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    edited(checkpoint.folder(saved, 10) / "manifest.json", change)
    falls_back(saved, reason)


def test_F12_what_the_manifest_says_is_hashed_too(saved: Path) -> None:
    edited(checkpoint.folder(saved, 10) / "manifest.json", lambda m: m.update(torch="9.9"), signed=False)
    falls_back(saved, "is not what was written")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "not a checkpoint manifest"),
        (b"\xff\xfe", "not valid"),
        (b"[" * 10_000, "nested"),
        (b'{"format": NaN}', "not a number"),
        (b'{"format": 1, "format": 1}', "stands twice"),
    ],
)
def test_F12_broken_manifest(saved: Path, content: bytes, reason: str) -> None:
    (checkpoint.folder(saved, 10) / "manifest.json").write_bytes(content)
    falls_back(saved, reason)


@pytest.mark.parametrize("name", MEMBERS)
def test_F12_missing_file(saved: Path, name: str) -> None:
    (checkpoint.folder(saved, 10) / name).unlink()
    falls_back(
        saved, "no manifest.json: the save was not finished" if name == "manifest.json" else "the manifest lists"
    )


def test_F12_extra_file(saved: Path) -> None:
    (checkpoint.folder(saved, 10) / "extra.safetensors").write_bytes(b"")
    falls_back(saved, "extra.safetensors")


def test_F12_a_newer_format_is_not_guessed_at_nor_passed_over(saved: Path) -> None:
    edited(checkpoint.folder(saved, 10) / "manifest.json", lambda m: m.update(format=2))
    before = sorted(saved.rglob("*"))
    for read in (lambda: checkpoint.latest(saved), lambda: checkpoint.at(saved, 10), kit.tiny_trainer(saved).resume):
        with pytest.raises(CheckpointError, match="format 2, this threefold reads up to 1") as error:
            read()
        assert "upgrade" in error.value.hint
    assert sorted(saved.rglob("*")) == before


def test_F12_things_that_only_look_like_checkpoints(saved: Path) -> None:
    folder = saved / "checkpoints"
    (folder / "step-000040").write_text("a file")
    (folder / "step-000030").symlink_to(checkpoint.folder(saved, 10))
    (folder / "step-٠٠٠٠٢٠").mkdir()
    (folder / ".tmp-step-000050-1").mkdir()
    said: list[str] = []
    found = checkpoint.latest(saved, skipped=said.append)
    assert found is not None and found.step == 10 and len(said) == 2
    assert all("is not a checkpoint folder" in words for words in said)
    with pytest.raises(CheckpointError, match="no checkpoint at step 7") as error:
        checkpoint.at(saved, 7)
    assert "10, 5" in error.value.hint


def test_F12_a_bad_sector(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = files.sha256

    def unreadable(path: files.StrPath) -> str:
        if "step-000010" in str(path):
            raise files.disk_error(OSError(errno.EIO, os.strerror(errno.EIO)), path, "read")
        return honest(path)

    monkeypatch.setattr(files, "sha256", unreadable)
    falls_back(saved, "input/output error")


# -- F18, F20


def test_F18_log_torn_in_its_last_lines(tmp_path: Path, halted: Path, untroubled: Untroubled) -> None:
    data = (halted / "log.jsonl").read_bytes()
    tail = len(data.splitlines(keepends=True)[-1])
    for cut in (*range(len(data) - tail, len(data), 25), len(data) // 2, 3, 0):
        run = Path(shutil.copytree(halted, tmp_path / str(cut)))
        (run / "log.jsonl").write_bytes(data[:cut])
        trainer = kit.train(run, **untroubled.settings)
        assert kit.same_state(kit.state_of(trainer), untroubled.state)
        steps = kit.step_lines(run)
        assert steps == sorted(set(steps)) and steps[-10:] == list(range(11, 21)), "each step once"
        assert (run / "log.jsonl").read_bytes().startswith(data[: min(cut, len(data) - tail)].rpartition(b"\n")[0])


def test_F18_nothing_is_appended_to_a_torn_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"step": 1, "loss": 2.0})
    for torn in (b'{"step": 2, "lo', b'{"step": 2, "loss": 1.0}', b"\x00" * 9, b"\xff\xfe"):
        with open(log.path, "ab") as file:
            file.write(torn)
        assert [line["step"] for line in log.lines()] == [1]
        fresh = RunLog(log.path)
        fresh.append({"event": "decision", "step": 0, "decision": "plan", "x": 1}, sync=True)
        assert RunLog(log.path).lines()[-1]["decision"] == "plan"
        files.truncate_file(log.path, len(b'{"step": 1, "loss": 2.0}\n'))


def test_F20_a_checkpoint_of_an_older_release() -> None:
    found = checkpoint.verify(FIXTURES / "checkpoints" / "v0.1" / "checkpoints" / "step-000003")
    assert found.manifest["format"] == 1 and found.state()["progress"]["step"] == 3
    expected = json.loads((FIXTURES / "checkpoints" / "v0.1" / "expected.json").read_text())
    sums = {name: float(tensor.double().sum()) for name, tensor in {**found.model(), **found.optimizer()}.items()}
    assert sums == pytest.approx(expected, abs=1e-9)


def test_F20_a_run_of_an_older_release_goes_on(tmp_path: Path) -> None:
    from tests.fixtures.make_checkpoint import SETTINGS, small_model

    run = Path(shutil.copytree(FIXTURES / "checkpoints" / "v0.1", tmp_path / "run"))
    trainer = kit.tiny_trainer(run, model=small_model(), **{**SETTINGS, "steps": 6})
    assert trainer.resume() == 3
    trainer.fit()
    assert kit.step_lines(run) == [1, 2, 3, 4, 5, 6]
