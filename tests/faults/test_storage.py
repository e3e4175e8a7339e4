"""P1: once the first save has succeeded, the run directory holds a complete checkpoint at every instant.

The run is that of `untroubled`: 20 steps, a checkpoint every 5. `saved` is the same run ended after step 11.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.faults import kit
from tests.faults.conftest import Untroubled, ends_well
from threefold import files
from threefold.errors import DiskError
from threefold.training import checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MEMBERS = (*checkpoint.FILES, "manifest.json")


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
    pruning = [
        n
        for n, (kind, path) in enumerate(untroubled.operations, 1)
        if "/.trash-" in path or (kind == "rename" and path.endswith("/step-000005"))
    ]
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
    warnings: list[str] = []
    trainer = kit.tiny_trainer(run, warnings=warnings, **untroubled.settings)
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
def test_F04_F06_every_operation_of_a_save_refused(
    tmp_path: Path, halted: Path, untroubled: Untroubled, error: int
) -> None:
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_F04_dev_full() -> None:
    for write in (lambda: files.write_file("/dev/full", b"x" * 100), lambda: files.append_line("/dev/full", "x" * 99)):
        with pytest.raises(
            DiskError, match=r"`/dev/full`: no space left on device \([\d,]+ bytes free, 100 needed\)"
        ) as e:
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


def test_F05_too_little_space_is_seen_before_the_first_byte(
    saved: Path, untroubled: Untroubled, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# -- F14, F16 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "where"), [("unlink", ".trash"), ("rmdir", ".trash"), ("rename", "checkpoints/step-000005")]
)
def test_F14_an_old_checkpoint_that_cannot_be_removed(
    tmp_path: Path, untroubled: Untroubled, kind: str, where: str
) -> None:
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
