"""P1: once the first save has succeeded, the run directory holds a complete checkpoint at every instant.

The run is that of `untroubled`: 20 steps, a checkpoint every 5. `saved` is the same run ended after step 11.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kit
from tests.faults.conftest import Untroubled
from threefold import files
from threefold.errors import CheckpointError, DiskError, Interrupted, LockedError
from threefold.training import checkpoint
from threefold.training.log import RunLog

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MEMBERS = (*checkpoint.FILES, "manifest.json")


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory, untroubled: Untroubled) -> Path:
    run = tmp_path_factory.mktemp("halted") / "run"
    kit.halt(run, 11, **untroubled.settings)
    assert checkpoint.steps(run) == [10, 5] and kit.step_lines(run)[-1] == 11
    return run


@pytest.fixture
def saved(tmp_path: Path, halted: Path) -> Path:
    """The reference run, ended after step 11, with checkpoints 5 and 10."""
    return Path(shutil.copytree(halted, tmp_path / "saved", symlinks=True))


def ends_well(run: Path, untroubled: Untroubled) -> None:
    """The same command again gives what would have come without trouble, and leaves nothing lying about."""
    trainer = kit.train(run, **untroubled.settings)
    assert kit.same_state(kit.state_of(trainer), untroubled.state)
    assert kit.same_state(kit.saved_state(run), untroubled.state)
    assert kit.history(run) == untroubled.history
    assert [path.name for path in run.rglob(".t*-*")] == []


# -- F01, F15: killed at a disk operation ------------------------------------------------------------------------------


def crash_at(n: int, run: Path, untroubled: Untroubled) -> None:
    assert kit.in_child(lambda: kit.train(run, **untroubled.settings), crash_at=n) == 137
    found, least = checkpoint.latest(run), untroubled.published(n)
    assert (found is None and least == 0) or (found is not None and found.step in (least, least + 5))
    if least >= 10:
        assert sum(checkpoint.verify(checkpoint.folder(run, step)) is not None for step in checkpoint.steps(run)) >= 2
    ends_well(run, untroubled)


def test_F01_killed_at_some_disk_operations(tmp_path: Path, untroubled: Untroubled) -> None:
    for n in random.Random(1).sample(range(1, len(untroubled.operations) + 1), 6):
        crash_at(n, tmp_path / str(n), untroubled)


@pytest.mark.slow
def test_F01_killed_at_every_disk_operation_of_a_run(tmp_path: Path, untroubled: Untroubled) -> None:
    for n in range(1, len(untroubled.operations) + 1):
        crash_at(n, tmp_path / str(n), untroubled)
        shutil.rmtree(tmp_path / str(n))


def test_F15_killed_while_old_checkpoints_are_removed(tmp_path: Path, untroubled: Untroubled) -> None:
    pruning = [n for n, (kind, path) in enumerate(untroubled.operations, 1)
               if "/.trash-" in path or (kind == "rename" and path.endswith("/step-000005"))]
    assert len(pruning) >= 7
    for n in pruning[:7]:
        crash_at(n, tmp_path / str(n), untroubled)


# -- F03: the power goes -----------------------------------------------------------------------------------------------


def cut_power(run: Path, tmp_path: Path, untroubled: Untroubled) -> kit.PowerLoss:
    with kit.PowerLoss(run) as power:
        kit.train(run, **untroubled.settings)
    return power


def published_by(power: kit.PowerLoss, count: int, before: int) -> int:
    done = Untroubled.__new__(Untroubled)
    done.operations = [(kind, path) for kind, path, _ in power.operations]
    return done.published(count + 1) or before


def test_F03_power_loss_during_a_save(saved: Path, tmp_path: Path, untroubled: Untroubled) -> None:
    trainer = kit.tiny_trainer(saved, **untroubled.settings)
    trainer.resume()
    trainer.progress.step = 11
    with kit.PowerLoss(saved) as power:
        assert trainer._save()
    kinds = {kind for kind, _, _ in power.operations}
    assert kinds >= {"open", "write", "fsync", "fsync_dir", "rename", "mkdir", "unlink", "rmdir"}
    for count, _, disk in power.disks(tmp_path / "disk", variants=["names", "torn"]):
        found = checkpoint.latest(disk)
        assert found is not None and found.step in (10, 11) and found.step >= published_by(power, count, 10)


def test_F03_a_run_goes_on_after_power_loss(saved: Path, tmp_path: Path, untroubled: Untroubled) -> None:
    power = cut_power(saved, tmp_path, untroubled)
    prefixes = random.Random(3).sample(range(len(power.operations)), 4)
    for _, _, disk in power.disks(tmp_path / "disk", prefixes=prefixes, variants=["torn"]):
        ends_well(disk, untroubled)


@pytest.mark.slow
def test_F03_power_loss_at_every_operation_of_a_run(tmp_path: Path, untroubled: Untroubled) -> None:
    run = files.make_dirs(tmp_path / "run")
    power = cut_power(run, tmp_path, untroubled)
    built = 0
    for count, variant, disk in power.disks(tmp_path / "disk"):
        found, least = checkpoint.latest(disk), published_by(power, count, 0)
        assert (found.step if found else 0) >= least
        if variant in ("torn", "lost"):
            ends_well(disk, untroubled)
        built += 1
    assert built == 4 * (len(power.operations) + 1)


# -- F04 to F09: the disk refuses --------------------------------------------------------------------------------------


def refused(run: Path, untroubled: Untroubled, disk: kit.FaultyFiles) -> DiskError | None:
    """The error of one save of step 11 in `run` on that disk, after the checks that hold for all of them."""
    trainer = kit.tiny_trainer(run, warnings=(warnings := []), **untroubled.settings)
    trainer.resume()
    trainer.progress.step = 11
    error = None
    try:
        with disk:
            trainer.keeper.save(trainer.progress, {"micro_batch": kit.ROWS})
    except DiskError as caught:
        error = caught
    found = checkpoint.latest(run)
    assert found is not None and found.step == (10 if error else 11), "a failed save is not published"
    assert not error or (str(run) in str(error) and error.hint and not checkpoint.folder(run, 11).exists())
    assert disk.failed == (error is not None or bool(warnings)), "nothing fails without a word"
    return error


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_F04_F06_every_operation_of_a_save_refused(tmp_path: Path, halted: Path, untroubled: Untroubled,
                                                   error: int) -> None:
    n, reported = 0, []
    while True:
        n += 1
        run = Path(shutil.copytree(halted, tmp_path / str(n), symlinks=True))
        disk = kit.FaultyFiles(n, error)
        caught = refused(run, untroubled, disk)
        if not disk.failed:
            break
        if caught:
            reported.append(str(caught))
            assert list(run.rglob(".tmp-*")) == [], "the temporary folder is removed"
    assert n > 30 and len(reported) > 20
    if error in (errno.ENOSPC, errno.EDQUOT):
        assert all("bytes free" in text for text in reported)
        assert any("needed)" in text and "model.safetensors" in text for text in reported)


def test_F04_a_disk_that_stays_full(saved: Path, untroubled: Untroubled) -> None:
    """Not even the temporary folder can be removed; the next start does it."""
    disk = kit.FaultyFiles(12, errno.ENOSPC, lasting=True)
    assert refused(saved, untroubled, disk) is not None
    assert list(saved.rglob(".tmp-*"))
    ends_well(saved, untroubled)


def test_F04_dev_full() -> None:
    for write in (lambda: files.write_file("/dev/full", b"x" * 100), lambda: files.append_line("/dev/full", "x" * 99)):
        with pytest.raises(DiskError, match=r"`/dev/full`: no space left on device \([\d,]+ bytes free, 100 needed\)") as e:
            write()
        assert "free some space" in e.value.hint


def test_F04_training_outlives_a_full_disk(tmp_path: Path, untroubled: Untroubled) -> None:
    """Nothing can be written in steps 7 to 13: a checkpoint is left out, and no line of the log."""
    warnings: list[str] = []
    trainer = kit.tiny_trainer(tmp_path, warnings=warnings, on_save_error="continue", **untroubled.settings)

    def full(kind: str, path: str, *details: object) -> None:
        if 7 <= trainer.progress.step <= 13 and kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with files.observed(full):
        trainer.fit()
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(tmp_path) == untroubled.history
    assert any("goes on without this checkpoint" in w for w in warnings)
    assert sum("held in memory" in w for w in warnings) == 1
    with files.observed(lambda kind, path, *rest: full(kind, path) if kind == "write" else None):
        trainer.progress.step = 10
        with pytest.raises(DiskError):  # a decision is on disk before it takes effect, or it is not taken
            trainer.decisions.make("spike", 10, lambda: {"action": "log"})
    assert trainer.decisions.known("spike") == []


def test_F05_too_little_space_is_seen_before_the_first_byte(saved: Path, untroubled: Untroubled,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1234)
    disk = kit.FaultyFiles()
    trainer = kit.tiny_trainer(saved, **untroubled.settings)
    trainer.resume()
    trainer.progress.step = 11
    with disk, pytest.raises(DiskError, match=r"[\d,]{6,} bytes needed .*, 1,234 bytes free") as error:
        trainer._save()
    assert "free some space" in error.value.hint
    assert not [path for kind, path in disk.seen if "step-000011" in path]
    assert checkpoint.steps(saved) == [10, 5]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_F06_a_run_that_cannot_write_does_not_succeed(tmp_path: Path, untroubled: Untroubled, error: int) -> None:
    for n in (1, 40, 120):
        run = tmp_path / f"{n}"

        def broken(n: int = n, run: Path = run) -> None:
            with kit.FaultyFiles(n, error, lasting=True):
                kit.train(run, **untroubled.settings)

        assert kit.in_child(broken) == 1
        ends_well(run, untroubled)


def test_F06_read_only_folder(tmp_path: Path, untroubled: Untroubled) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)

        def work() -> None:
            if os.geteuid() == 0:  # root may write anywhere
                os.seteuid(65534)
            kit.train(Path(folder) / "run", **untroubled.settings)

        child = kit.Child(work, output=tmp_path / "output")
        assert child.wait() == 1 and os.listdir(folder) == []
        os.chmod(folder, 0o755)
    words = (tmp_path / "output").read_text()
    assert "permission denied" in words and "hint: check the permissions" in words


def test_F07_file_size_limit(saved: Path, tmp_path: Path, untroubled: Untroubled) -> None:
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # or the process would be killed instead of told

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        kit.train(saved, **untroubled.settings)

    child = kit.Child(limited, output=tmp_path / "output")
    assert child.wait() == 1
    assert "file too large" in (tmp_path / "output").read_text() and "ulimit -f" in (tmp_path / "output").read_text()
    found = checkpoint.latest(saved)
    assert found is not None and found.step == 10
    ends_well(saved, untroubled)


@pytest.mark.parametrize("kind", ["fsync", "fsync_dir"])
def test_F08_a_failed_fsync_is_a_failed_save(tmp_path: Path, halted: Path, untroubled: Untroubled, kind: str) -> None:
    failed = 0
    for n in range(1, 9):
        run = Path(shutil.copytree(halted, tmp_path / str(n)))
        disk = kit.FaultyFiles(n, errno.EIO, kind)
        if refused(run, untroubled, disk) is not None:
            failed += 1
            synced = [path for k, path in disk.seen if k == kind]
            assert len(synced) == len(set(synced)) or kind == "fsync_dir", "a failed fsync is not tried again"
    assert failed == (5 if kind == "fsync" else 3)


def test_F09_rename_across_file_systems(saved: Path, untroubled: Untroubled) -> None:
    error = refused(saved, untroubled, kit.FaultyFiles(1, errno.EXDEV, "rename"))
    assert error is not None and "cross-device link" in str(error) and "two file systems" in error.hint
    target = saved / "recipe.toml"
    with kit.FaultyFiles() as disk:
        files.write_atomic(target, "steps = 1\n")
    assert {Path(path).parent for _, path in disk.seen if path != str(saved)} == {saved}, "temporary files stand beside"


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


@pytest.mark.parametrize(("change", "reason"), [
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
])
def test_F12_edited_manifest(saved: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    edited(checkpoint.folder(saved, 10) / "manifest.json", change)
    falls_back(saved, reason)


def test_F12_what_the_manifest_says_is_hashed_too(saved: Path) -> None:
    edited(checkpoint.folder(saved, 10) / "manifest.json", lambda m: m.update(torch="9.9"), signed=False)
    falls_back(saved, "is not what was written")


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[1]", "not a checkpoint manifest"), (b"\xff\xfe", "not valid"),
    (b"[" * 10_000, "nested"), (b'{"format": NaN}', "not a number"), (b'{"format": 1, "format": 1}', "stands twice"),
])
def test_F12_broken_manifest(saved: Path, content: bytes, reason: str) -> None:
    (checkpoint.folder(saved, 10) / "manifest.json").write_bytes(content)
    falls_back(saved, reason)


@pytest.mark.parametrize("name", MEMBERS)
def test_F12_missing_file(saved: Path, name: str) -> None:
    (checkpoint.folder(saved, 10) / name).unlink()
    falls_back(saved, "no manifest.json: the save was not finished" if name == "manifest.json" else "the manifest lists")


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


# -- F13: two processes ------------------------------------------------------------------------------------------------


def test_F13_a_second_process_is_told_who_holds_the_run(tmp_path: Path, untroubled: Untroubled) -> None:
    def hold() -> None:
        with files.lock(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(30)

    child = kit.Child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    with pytest.raises(LockedError, match=f"lock held by pid {child.pid} on host {socket.gethostname()}") as error:
        kit.train(tmp_path, **untroubled.settings)
    assert error.value.exit_code == 1 and error.value.hint
    child.kill()  # the kernel frees the lock of a process that was killed
    child.wait()
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text().split() == [str(os.getpid()), socket.gethostname()]
    assert (tmp_path / ".lock").read_text() == ""


def test_F13_a_lock_of_another_host(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("123 elsewhere\n")
    with pytest.raises(LockedError, match="pid 123 on host elsewhere, another machine") as error, files.lock(tmp_path):
        pytest.fail("not reached")
    assert "--steal-lock" in error.value.hint
    with files.lock(tmp_path, steal=True):
        assert socket.gethostname() in (tmp_path / ".lock").read_text()
    with files.lock(tmp_path):
        pass


def test_F13_an_error_leaves_no_words_behind(tmp_path: Path) -> None:
    """Another host may take the run over once it has ended, however it ended."""
    with pytest.raises(Interrupted), files.lock(tmp_path):
        raise Interrupted(signal.SIGTERM, "stopped")
    assert (tmp_path / ".lock").read_text() == ""
    (tmp_path / ".lock").write_text("words of no meaning here")
    with files.lock(tmp_path):
        pass


# -- F14, F16 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "where"), [("unlink", ".trash"), ("rmdir", ".trash"), ("rename", "checkpoints/step-000005")])
def test_F14_an_old_checkpoint_that_cannot_be_removed(tmp_path: Path, untroubled: Untroubled, kind: str,
                                                      where: str) -> None:
    warnings: list[str] = []
    trainer = kit.tiny_trainer(tmp_path, warnings=warnings, **untroubled.settings)
    with kit.FaultyFiles(1, errno.EACCES, kind, where, lasting=True):
        trainer.fit()
    assert warnings and all("could not remove the old checkpoint" in words for words in warnings)
    valid = [step for step in checkpoint.steps(tmp_path) if checkpoint.at(tmp_path, step)]
    assert len(valid) >= 2 and kit.same_state(kit.state_of(trainer), untroubled.state)
    if kind != "rename":
        assert len(list(tmp_path.rglob(".trash-*"))) == 2, "one folder for each, though of one process"
        assert len(files.clean_leftovers(tmp_path / "checkpoints")) == 2


def test_F14_leftovers_that_cannot_be_removed_do_not_stop_a_start(saved: Path, untroubled: Untroubled) -> None:
    (saved / "checkpoints" / ".tmp-step-000015-999999999").mkdir()
    with kit.FaultyFiles(1, errno.EACCES, "rmdir", ".tmp-step-000015-9"):
        assert files.clean_leftovers(saved / "checkpoints") == []
    ends_well(saved, untroubled)


def test_F16_damage_and_a_full_disk_together(tmp_path: Path, halted: Path, untroubled: Untroubled) -> None:
    """The newest is truncated, and while the run recovers the disk is full, at one operation after another."""
    total = 150
    for n in range(5, total, 29):
        run = Path(shutil.copytree(halted, tmp_path / str(n)))
        kit.corrupt(checkpoint.folder(run, 10) / "model.safetensors", "truncate", 1000)

        def recover(n: int = n, run: Path = run) -> None:
            with kit.FaultyFiles(n, errno.ENOSPC):
                kit.train(run, **untroubled.settings)

        assert kit.in_child(recover) in (0, 1)
        found = checkpoint.latest(run)
        assert found is not None and found.step >= 5
        ends_well(run, untroubled)


# -- F17: signals ------------------------------------------------------------------------------------------------------


def wait_for(run: Path, step: int) -> None:
    """Until the log has a line of that step."""
    deadline = time.monotonic() + 20
    while not any(s >= step for s in kit.step_lines(run)):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_F17_signals_save_at_a_step_boundary(tmp_path: Path, number: int, code: int) -> None:
    settings: dict[str, Any] = {"steps": 60, "eval_every": 7, "save_every": 1000}
    run = tmp_path / "run"
    child = kit.Child(lambda: kit.train(run, **settings), output=tmp_path / "output")
    wait_for(run, 10)
    child.kill(number)
    assert child.wait() == code
    found, last = checkpoint.latest(run), kit.step_lines(run)[-1]
    assert found is not None and found.step == last and 10 <= last < 60
    assert f"{signal.Signals(number).name} at step {last}: saved" in (tmp_path / "output").read_text()
    trainer, whole = kit.train(run, **settings), kit.train(tmp_path / "whole", **settings)
    assert kit.same_state(kit.state_of(trainer), kit.state_of(whole))
    assert kit.history(run) == kit.history(tmp_path / "whole")


def test_F17_an_evaluation_that_is_due_is_not_lost_to_a_signal(tmp_path: Path, untroubled: Untroubled) -> None:
    trainer = kit.tiny_trainer(tmp_path, **untroubled.settings)
    trainer.tell = lambda line: os.kill(os.getpid(), signal.SIGTERM) if line.get("step") == 5 and "loss" in line else None
    with pytest.raises(Interrupted) as error:
        trainer.fit()
    assert error.value.exit_code == 143 and checkpoint.steps(tmp_path) == [5]
    ends_well(tmp_path, untroubled)


def test_F17_a_second_interrupt_ends_at_once_a_second_sigterm_does_not(tmp_path: Path) -> None:
    for numbers, code in (((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM, signal.SIGTERM), 143)):
        run = tmp_path / str(code)

        def slow(trainer: Any, run: Path = run) -> float:
            (run / "evaluating").touch()
            time.sleep(0.4)
            return 1.0

        child = kit.Child(lambda run=run, slow=slow: kit.train(run, steps=20, eval_every=8, evaluate=slow))  # type: ignore[misc]
        while not (run / "evaluating").exists():
            time.sleep(0.002)
        for number in numbers:
            child.kill(number)
            time.sleep(0.05)
        assert child.wait() == code
        assert checkpoint.steps(run) == ([5] if code == 130 else [8, 5])


def test_F17_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        trainer = kit.tiny_trainer(tmp_path, steps=8)
        trainer.tell = lambda line: os.kill(os.getpid(), signal.SIGHUP)
        trainer.fit()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    assert kit.in_child(work) == 0 and kit.step_lines(tmp_path) == list(range(1, 9))


def test_F17_a_signal_while_the_disk_is_full_does_not_claim_a_checkpoint(tmp_path: Path) -> None:
    trainer = kit.tiny_trainer(tmp_path, on_save_error="continue")
    trainer.tell = lambda line: os.kill(os.getpid(), signal.SIGTERM) if line["step"] == 3 else None
    with kit.FaultyFiles(1, errno.ENOSPC, "write", "step-0", lasting=True), pytest.raises(Interrupted, match="not saved"):
        trainer.fit()


# -- F18 to F21 --------------------------------------------------------------------------------------------------------


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
        assert (run / "log.jsonl").read_bytes().startswith(data[:min(cut, len(data) - tail)].rpartition(b"\n")[0])


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


def test_F19_clocks_that_jump(tmp_path: Path, untroubled: Untroubled, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: next(moments))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    jumps = random.Random(0)
    trainer = kit.tiny_trainer(tmp_path, clock=lambda: jumps.uniform(-1e9, 1e9), **untroubled.settings)
    trainer.fit()
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(tmp_path) == untroubled.history


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


@pytest.mark.parametrize("name", ["with space", "모델 🦆 naïve", "-rf *", "a" * 255, "가" * 85, "quo'te\"new\nline"])
def test_F21_names_of_all_sorts(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    kit.halt(run, 4, steps=6, save_every=3)
    trainer = kit.train(run, steps=6, save_every=3)
    assert checkpoint.steps(run) == [6, 3] and kit.same_state(kit.state_of(trainer), kit.saved_state(run))
    path = run / name
    assert files.write_atomic(path, "content") == 7 and path.read_text() == "content"
    (run / ".tmp-x-999999999").touch()
    with files.published(run / f"{name[:80]}-folder") as folder:
        files.write_file(folder / "x", "y")
    assert files.clean_leftovers(run) == [".tmp-x-999999999"]


def test_F21_a_name_that_is_too_long_is_refused_with_a_hint(tmp_path: Path) -> None:
    for write in (lambda: files.make_dirs(tmp_path / ("가" * 86)), lambda: files.write_atomic(tmp_path / ("b" * 256), "x")):
        with pytest.raises(DiskError, match="file name too long") as error:
            write()
        assert "255 bytes" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_F21_relative_and_symlinked(tmp_path: Path, untroubled: Untroubled, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    kit.halt(Path("link"), 7, **untroubled.settings)
    ends_well(tmp_path / "real", untroubled)
    assert (tmp_path / "link").is_symlink()
    kit.train(Path("relative/deep"), steps=3)
    assert checkpoint.steps(tmp_path / "relative" / "deep") == [3]
