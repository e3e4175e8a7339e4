"""F13, F17, F19, F21: other processes, signals, clocks and names. `saved` is the reference ended after step 11."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kit
from tests.faults.conftest import Untroubled, ends_well
from threefold import files
from threefold.errors import DiskError, Interrupted, LockedError
from threefold.training import checkpoint

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
    trainer.tell = lambda line: (
        os.kill(os.getpid(), signal.SIGTERM) if line.get("step") == 5 and "loss" in line else None
    )
    with pytest.raises(Interrupted) as error:
        trainer.fit()
    assert error.value.exit_code == 143 and checkpoint.steps(tmp_path) == [5]
    ends_well(tmp_path, untroubled)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_F17_a_second_interrupt_ends_at_once_a_second_sigterm_does_not(tmp_path: Path, number: int, code: int) -> None:
    def endless(trainer: Any) -> float:
        """An evaluation that lasts until somebody has both signals behind him."""
        (tmp_path / "evaluating").touch()
        while not (tmp_path / "both").exists():
            time.sleep(0.005)
        return 1.0

    child = kit.Child(lambda: kit.train(tmp_path, steps=20, eval_every=8, evaluate=endless))
    while not (tmp_path / "evaluating").exists():
        time.sleep(0.002)
    for _ in range(2):
        child.kill(number)
        time.sleep(0.2)
    if number == signal.SIGTERM:
        (tmp_path / "both").touch()
    assert child.wait() == code
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == (5 if number == signal.SIGINT else 8)


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
    with (
        kit.FaultyFiles(1, errno.ENOSPC, "write", "step-0", lasting=True),
        pytest.raises(Interrupted, match="not saved"),
    ):
        trainer.fit()


# -- F19, F21


def test_F19_clocks_that_jump(tmp_path: Path, untroubled: Untroubled, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: next(moments))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    jumps = random.Random(0)
    trainer = kit.tiny_trainer(tmp_path, clock=lambda: jumps.uniform(-1e9, 1e9), **untroubled.settings)
    trainer.fit()
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(tmp_path) == untroubled.history


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
    for write in (
        lambda: files.make_dirs(tmp_path / ("가" * 86)),
        lambda: files.write_atomic(tmp_path / ("b" * 256), "x"),
    ):
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
