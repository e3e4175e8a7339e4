"""Too little memory, too few files, no threads: an error that says what to do, or the same run by other means."""

from __future__ import annotations

import _posixshmem
import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.faults import kit
from tests.faults.conftest import Untroubled, ends_well
from threefold import files
from threefold.errors import MemoryLimitError
from threefold.training import checkpoint
from threefold.training.decisions import Decisions
from threefold.training.keeper import Keeper, Progress
from threefold.training.log import RunLog
from threefold.training.optim import Optimizer

TOLERANCE = 1e-3  # of the losses of 20 steps: sums in float32 in another order, five rounds of bfloat16 in Muon


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def halvings(run: Path) -> list[tuple[int, int]]:
    return [
        (line["step"], line["rows"])
        for line in RunLog(run / "log.jsonl").lines()
        if line.get("decision") == "micro_batch"
    ]


# -- R01: memory runs out in a step ------------------------------------------------------------------------------------


def test_R01_the_micro_batch_is_halved_and_the_run_goes_on(tmp_path: Path, untroubled: Untroubled) -> None:
    """The decision is on disk, holds after a resume, and is what a run with small micro-batches would have done."""
    warnings: list[str] = []
    model = kit.tiny_model()
    kit.no_memory_above(model, 1)
    settings = {**untroubled.settings, "evaluate": lambda trainer: 1.0}
    trainer = kit.tiny_trainer(tmp_path / "run", model=model, warnings=warnings, **settings)
    trainer.fit()
    assert halvings(tmp_path / "run") == [(0, 2), (0, 1)]
    assert len(warnings) == 2 and "going on with 1 rows" in warnings[1]
    replay = RunLog(trainer.log.path).lines()
    for name, more in (("small", {"micro_batch": 1}), ("replayed", {"replay": replay})):
        assert kit.same_state(kit.state_of(kit.train(tmp_path / name, **settings, **more)), kit.state_of(trainer)), name
    assert halvings(tmp_path / "replayed") == [(0, 1)], "the last word at once"
    losses = [
        [line["loss"] for line in history if "loss" in line]
        for history in (kit.history(tmp_path / "run"), untroubled.history)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


def test_R01_halved_in_the_middle_killed_resumed_replayed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 16, "save_every": 5}

    def failing(run: Path, at: int = 8) -> Any:
        model = kit.tiny_model()
        trainer = kit.tiny_trainer(run, model=model, **settings)
        loss_rows = model.loss_rows

        def forward(ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
            if trainer.progress.step == at and len(ids) > 2:
                raise MemoryError
            return loss_rows(ids, *rest, **more)

        model.loss_rows = forward  # type: ignore[method-assign,assignment]
        return trainer

    whole = failing(tmp_path / "whole")
    whole.fit()
    assert halvings(tmp_path / "whole") == [(8, 2)] and whole.micro_batch == 2
    again = kit.train(tmp_path / "replayed", replay=RunLog(whole.log.path).lines(), **settings)
    assert kit.same_state(kit.state_of(again), kit.state_of(whole)), "a larger machine follows the log"
    run = tmp_path / "halted"
    halted = failing(run)
    halted.tell = lambda line: (_ for _ in ()).throw(kit.Halted) if line["step"] == 9 else None
    with pytest.raises(kit.Halted):
        halted.fit()
    resumed = kit.train(run, **settings)  # from step 5, with memory enough: the decision holds from step 8
    assert kit.same_state(kit.state_of(resumed), kit.state_of(whole)) and kit.history(run) == kit.history(
        tmp_path / "whole"
    )


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of address space are Linux's")


def test_R01_the_error_names_the_sizes_and_the_knobs(tmp_path: Path) -> None:
    model = kit.tiny_model()
    kit.no_memory_above(model, 0)
    trainer = kit.tiny_trainer(tmp_path, model=model, micro_batch=1)
    with pytest.raises(MemoryLimitError) as error:
        trainer.fit()
    assert f"1 rows x 16 tokens x {trainer.loader.shards.vocab_size:,} ids of the vocabulary" in str(error.value)
    assert "tried to allocate 68719476736 bytes" in str(error.value)
    for knob in ("train.micro_batch", "model.context", "--size", "tokenizer.vocab_size", "train.dtype"):
        assert knob in error.value.hint
    assert all(p.grad is None for p in trainer.model.parameters()), "what was accumulated is forgotten"


def test_R01_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    model = kit.tiny_model()
    model.register_forward_pre_hook(lambda *_: None)
    trainer = kit.tiny_trainer(tmp_path, model=model)
    model.loss_rows = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.fit()
    assert halvings(tmp_path) == []


def test_R01_memory_runs_out_in_an_evaluation(tmp_path: Path) -> None:
    model = kit.tiny_model()
    kit.no_memory_above(model, 2)
    trainer = kit.tiny_trainer(tmp_path, model=model, micro_batch=2, eval_every=3)
    with pytest.raises(MemoryLimitError, match="step 3: not enough memory to evaluate") as error:
        trainer.fit()
    assert "--size" in error.value.hint


def train_with_little_more(folder: Path) -> None:
    """24 MB more than what is there already, and a batch that needs several times as much at once."""
    torch.set_num_threads(1)
    trainer = kit.tiny_trainer(folder, steps=1, rows=4096, shards=kit.tiny_shards(tokens=70_000), evaluate=lambda trainer: 1.0)
    limit = address_space() + 24 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    trainer.fit()


@linux
def test_R01_a_real_limit(tmp_path: Path) -> None:
    """In a process of its own: one that is forked has what its parent freed, and needs no more."""
    code = f"from pathlib import Path; from tests.faults.test_resources import train_with_little_more as t; t(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True)
    rows = [rows for _, rows in halvings(tmp_path)]
    assert len(rows) > 1 and rows == [4096 >> n for n in range(1, len(rows) + 1)] and kit.step_lines(tmp_path) == [1]


# -- R02: memory runs out in a save ------------------------------------------------------------------------------------


class Wide(nn.Module):
    """One weight of 24 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6 * 2**20, 1))


@linux
def test_R02_a_save_needs_no_second_copy(tmp_path: Path) -> None:
    def work() -> None:
        model = Wide()
        optimizer = Optimizer(model, {}, lr=0.1, adamw_lr=0.1, weight_decay=0.0)
        log = RunLog(tmp_path / "log.jsonl")
        keeper = Keeper(tmp_path, model, optimizer, Decisions(log), log, keep=2, identity={}, warn=lambda text: None)
        limit = address_space() + 16 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        spare, ballast = torch.empty(8 * 2**20, dtype=torch.uint8), []
        with pytest.raises((MemoryError, RuntimeError)):  # also what earlier tests left to the allocator
            while True:
                ballast.append(torch.empty(2**20, dtype=torch.uint8))
        del spare
        with pytest.raises((MemoryError, RuntimeError)):
            model.weight.detach().clone()
        keeper.save(Progress(step=1), {"micro_batch": 1})

    assert kit.in_child(work) == 0
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.model()["weight"].numel() == 6 * 2**20


def test_R02_a_save_that_runs_out_of_memory_loses_nothing(halted: Path, tmp_path: Path, untroubled: Untroubled) -> None:
    """As F04: at each operation of the save an error, the checkpoint before it whole, and the next start goes on."""
    failed = 0
    for n in itertools.count(1):
        run = Path(shutil.copytree(halted, tmp_path / str(n), symlinks=True))
        seen = itertools.count(1)

        def exhausted(kind: str, path: str, *details: object, at: int = n, seen: Any = seen) -> None:
            if "checkpoints" in str(path) and next(seen) == at:
                raise MemoryError

        try:
            with files.observed(exhausted):
                kit.train(run, **untroubled.settings)
            break
        except MemoryLimitError as error:
            failed += 1
            assert error.hint and checkpoint.latest(run) is not None
        ends_well(run, untroubled)
    assert failed > 20


# -- R03: files and threads --------------------------------------------------------------------------------------------


def test_R03_too_many_open_files(tmp_path: Path, untroubled: Untroubled) -> None:
    """Four descriptors are enough for a whole run; without one there is an error that names `ulimit`."""

    def limited(run: Path, spare: int) -> int:
        def work() -> None:
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, lowest + spare))
            kit.train(run, **untroubled.settings, workers=2)

        return kit.Child(work, output=tmp_path / "output").wait()

    assert limited(tmp_path / "enough", 4) == 0
    assert kit.same_state(kit.saved_state(tmp_path / "enough"), untroubled.state)
    assert limited(tmp_path / "none", 0) == 1
    words = (tmp_path / "output").read_text()
    assert "too many open files" in words and "ulimit -n" in words


def test_R03_no_threads_no_fork_no_shared_memory(
    tmp_path: Path, untroubled: Untroubled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    opened = os.open
    monkeypatch.setattr(_posixshmem, "shm_open", refuse)  # what a queue or a tensor between processes needs
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: refuse() if str(path).startswith("/dev/shm") else opened(path, *rest, **more))
    trainer = kit.tiny_trainer(tmp_path, workers=3, **untroubled.settings)
    trainer.fit()
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(tmp_path) == untroubled.history
