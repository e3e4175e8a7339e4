"""P2 and P3 for whole runs: killed, resumed, replayed, bought by a budget or converged, it is the same run."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import kit
from tests.faults.conftest import Untroubled
from threefold import files
from threefold.data.loader import Batch
from threefold.errors import CheckpointError
from threefold.training import checkpoint
from threefold.training.decisions import Decisions
from threefold.training.log import Line, RunLog
from threefold.training.trainer import Trainer

# -- F02: killed at random moments -------------------------------------------------------------------------------------


def kill_often(run: Path, kills: int, work: Callable[[], object], *, seed: int = 0, may_end: bool = False) -> int:
    """Start `work`, SIGKILL it some steps later, `kills` times in a row, and let it end at the last start; returns how
    often it was killed, which is less where it `may_end` before."""
    rng, log = random.Random(seed), run / "log.jsonl"
    for kill in range(kills):
        kept, reached = before_checkpoint(run)
        child = kit.Child(work)
        target, deadline = reached + rng.randint(1, 14), time.monotonic() + 30
        while max(kit.step_lines(run), default=0) < target:
            assert time.monotonic() < deadline
            time.sleep(0.001)
            if may_end and os.waitpid(child.pid, os.WNOHANG)[0]:
                return kill
        time.sleep(rng.random() * 0.008)
        child.kill()
        code = child.wait()
        if code == 0 and may_end:
            return kill
        assert code == -9, "it ended before it was killed: give it more steps"
        assert log.read_bytes().startswith(kept), "the log before the checkpoint is as it was, byte for byte"
        with files.lock(run):  # no child lives on and holds it
            pass
    kept, _ = before_checkpoint(run)
    assert kit.in_child(work) == 0
    assert log.read_bytes().startswith(kept)
    return kills


def before_checkpoint(run: Path) -> tuple[bytes, int]:
    """The log up to the first line that a resumed run writes again, and the step of the newest checkpoint."""
    found = checkpoint.latest(run)
    step = found.step if found else 0
    data = (run / "log.jsonl").read_bytes() if (run / "log.jsonl").exists() else b""
    kept = b""
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += line
    return kept, step


def each_step_once(run: Path) -> None:
    steps = kit.step_lines(run)
    assert steps == list(range(1, len(steps) + 1))


def equal_runs(run: Path, other: Path) -> None:
    assert kit.same_state(kit.saved_state(run), kit.saved_state(other))
    assert kit.history(run) == kit.history(other)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_F02_killed_in_a_row(tmp_path: Path, kills: int) -> None:
    settings: dict[str, Any] = {"steps": 20 * kills, "eval_every": 9, "save_every": 5, "workers": 1}
    kill_often(tmp_path / "killed", kills, lambda: kit.train(tmp_path / "killed", **settings))
    kit.train(tmp_path / "whole", **settings)
    equal_runs(tmp_path / "killed", tmp_path / "whole")
    each_step_once(tmp_path / "killed")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_F02_a_budgeted_run_killed_in_a_row(tmp_path: Path, kills: int) -> None:
    """How many steps were bought hung on the clock and on the kills; given these decisions the run is the same."""
    settings: dict[str, Any] = {"steps": None, "budget": 0.5 + 0.25 * kills, "save_every": 5}
    done = kill_often(tmp_path / "killed", kills, lambda: kit.train(tmp_path / "killed", **settings), may_end=True)
    assert done > kills // 3
    replay = RunLog(tmp_path / "killed" / "log.jsonl").lines()
    bought = [line for line in replay if line.get("decision") == "steps"]
    assert len(bought) >= 2 and kit.step_lines(tmp_path / "killed")[-1] == bought[-1]["steps"]
    kit.train(tmp_path / "whole", **settings, replay=replay)
    equal_runs(tmp_path / "killed", tmp_path / "whole")
    each_step_once(tmp_path / "killed")


# -- D02, D03: resumed at every step, with other workers and micro-batches ---------------------------------------------


def test_D02_resumed_at_every_step(tmp_path: Path) -> None:
    """Over the end of an epoch, with another worker count after the resume."""
    settings: dict[str, Any] = {
        "steps": 12,
        "eval_every": 3,
        "save_every": 1,
        "keep": 99,
        "shards": kit.tiny_shards(tokens=300),
    }
    whole = kit.train(tmp_path / "whole", **settings)
    assert whole.loader.epoch_steps < 6
    for step in range(1, 12):
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(step)))
        trainer = kit.tiny_trainer(run, workers=step % 3, **settings)
        assert trainer.resume(step) == step and checkpoint.steps(run)[0] == step
        trainer.fit()
        assert kit.same_state(kit.state_of(trainer), kit.state_of(whole))
        assert kit.history(run) == kit.history(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_D03_worker_counts_give_the_same_run(tmp_path: Path, untroubled: Untroubled, workers: int) -> None:
    trainer = kit.train(tmp_path, workers=workers, **untroubled.settings)
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(tmp_path) == untroubled.history


def one_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer._gradients(3, trainer.loader.batch(3))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_D03_other_micro_batches_give_equal_gradients(tmp_path: Path, dropout: float) -> None:
    def gradient(size: int) -> dict[str, torch.Tensor]:
        return one_gradient(
            kit.tiny_trainer(tmp_path, micro_batch=size, model=kit.tiny_model(torch.float64, dropout=dropout))
        )

    whole = gradient(4)
    for size in (1, 2, 3):
        parts = gradient(size)
        assert max(float((parts[n] - whole[n]).abs().max()) for n in whole) < 1e-12 * max(
            float(g.abs().max()) for g in whole.values()
        )


def test_D02_dropout_is_resumed(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {"steps": 8, "save_every": 3, "model": kit.tiny_model(dropout=0.2)}

    torch.manual_seed(1)
    whole = kit.train(tmp_path / "whole", **settings())
    assert kit.train(tmp_path / "none", **{**settings(), "model": kit.tiny_model()}) is not None
    assert kit.history(tmp_path / "none") != kit.history(tmp_path / "whole")
    torch.manual_seed(2)
    kit.halt(tmp_path / "halted", 5, **settings())
    trainer = kit.train(tmp_path / "halted", **settings())
    assert kit.same_state(kit.state_of(trainer), kit.state_of(whole))


# -- taking up a checkpoint --------------------------------------------------------------------------------------------


def test_a_step_that_is_asked_for_is_gone_back_to_for_good(tmp_path: Path, untroubled: Untroubled) -> None:
    run = Path(shutil.copytree(untroubled.run, tmp_path / "run"))
    warnings: list[str] = []
    trainer = kit.tiny_trainer(run, warnings=warnings, **untroubled.settings)
    assert trainer.resume(15) == 15 and checkpoint.steps(run) == [15]
    assert "step 15" in warnings[0] and "(20) are removed" in warnings[0]
    trainer.fit()
    assert kit.same_state(kit.state_of(trainer), untroubled.state) and kit.history(run) == untroubled.history
    with pytest.raises(CheckpointError, match="no checkpoint at step 3"):
        kit.tiny_trainer(run, **untroubled.settings).resume(3)


@pytest.mark.parametrize("other", ["model", "data"])
def test_P1_a_step_that_cannot_be_taken_up_costs_no_later_one(tmp_path: Path, untroubled: Untroubled, other: str) -> None:
    run = Path(shutil.copytree(untroubled.run, tmp_path / "run"))
    model = kit.tiny_model(depth=3) if other == "model" else kit.tiny_model()
    warnings: list[str] = []
    trainer = kit.tiny_trainer(run, warnings=warnings, **{**untroubled.settings, "model": model})
    if other == "data":
        trainer.keeper.identity = {"data_fingerprint": "another"}
    with pytest.raises(CheckpointError, match="tensors differ" if other == "model" else "trained on other data"):
        trainer.resume(15)
    assert not warnings and checkpoint.steps(run) == checkpoint.steps(untroubled.run) == [20, 15] and kit.history(run) == untroubled.history


def test_P1_checkpoints_out_of_reach_are_not_begun_over(tmp_path: Path, untroubled: Untroubled) -> None:
    """A disk that cannot be read for a moment must not cost the run: nothing is cut, and when it is back all goes on."""
    run, warnings = Path(shutil.copytree(untroubled.run, tmp_path / "run")), list[str]()
    weights = sorted(run.glob("checkpoints/*/model.safetensors"))
    for path in weights:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* \(steps 20, 15\)") as caught:
        kit.tiny_trainer(run, warnings=warnings, **untroubled.settings).resume()
    assert "--fresh" in caught.value.hint and len(warnings) == 2 and kit.history(run) == untroubled.history
    for path in weights:
        path.with_suffix(".away").rename(path)
    assert kit.tiny_trainer(run, **untroubled.settings).resume() == 20


def test_another_torch_is_told_and_not_refused(tmp_path: Path, untroubled: Untroubled) -> None:
    run = Path(shutil.copytree(untroubled.run, tmp_path / "run"))
    warnings: list[str] = []
    trainer = kit.tiny_trainer(run, warnings=warnings, **untroubled.settings)
    trainer.keeper.identity = {"torch": "99.0", "data_fingerprint": "tiny"}
    assert trainer.resume() == 20
    assert warnings == [w for w in warnings if f"`torch` was {torch.__version__}" in w and "is 99.0 now" in w] != []


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path: Path, untroubled: Untroubled) -> None:
    run = Path(shutil.copytree(untroubled.run, tmp_path / "run"))
    for model, words in (
        (kit.tiny_model(depth=3), "tensors differ"),
        (kit.tiny_model(torch.float64), "is float32"),
        (kit.tiny_model(width=64), r"\(40, 32\) there and float32 \(40, 64\) here"),
    ):
        trainer = kit.tiny_trainer(run, model=model, **untroubled.settings)
        before = kit.state_of(trainer)
        with pytest.raises(CheckpointError, match=words) as error:
            trainer.resume()
        assert "--fresh" in error.value.hint and kit.same_state(before, kit.state_of(trainer))


def test_a_checkpoint_of_another_optimizer_is_refused_whole(tmp_path: Path, untroubled: Untroubled) -> None:
    run = Path(shutil.copytree(untroubled.run, tmp_path / "run"))
    trainer = kit.tiny_trainer(run, pure_adamw=True, **untroubled.settings)
    before = kit.state_of(trainer)
    with pytest.raises(CheckpointError, match="optimizer.safetensors` does not fit"):
        trainer.resume()
    assert kit.same_state(before, kit.state_of(trainer))


# -- until converged ---------------------------------------------------------------------------------------------------


def valley(trainer: Trainer) -> float:
    """A validation loss that is best at step 12."""
    return 1 + abs(trainer.progress.step - 12) / 10


CONVERGED: dict[str, Any] = {
    "steps": None,
    "converged": True,
    "patience": 3,
    "eval_every": 3,
    "evaluate": valley,
    "schedule": "constant",
    "save_every": 4,
}


@pytest.fixture(scope="module")
def converged(tmp_path_factory: pytest.TempPathFactory) -> Untroubled:
    return Untroubled(tmp_path_factory.mktemp("converged") / "run", CONVERGED)


def test_until_converged(converged: Untroubled) -> None:
    """Patience, back to the best checkpoint, and the learning rate falls to nothing from there."""
    lines = RunLog(converged.run / "log.jsonl").lines()
    decision = next(line for line in lines if line.get("decision") == "converged")
    assert {k: decision[k] for k in ("step", "to", "end", "waited")} == {"step": 21, "to": 12, "end": 22, "waited": 3}
    rates = {line["step"]: line["lr"] for line in lines if "loss" in line}
    assert sorted(rates) == list(range(1, 23)) and rates[12] == rates[13] == pytest.approx(0.02)
    falls = [rates[step] - rates[step + 1] for step in range(13, 22)]
    assert falls == pytest.approx([0.002] * 9) and rates[22] == pytest.approx(0.002)
    assert [line["step"] for line in lines if line.get("whole")] == [22]


def test_until_converged_falls_from_where_the_rate_stood(tmp_path: Path) -> None:
    kit.train(tmp_path, **{**CONVERGED, "steps": 40, "schedule": "linear"})
    rates = {line["step"]: line["lr"] for line in RunLog(tmp_path / "log.jsonl").lines() if "loss" in line}
    assert max(rates) == 22 and rates[13] == pytest.approx(0.02 * 28 / 40)
    assert rates[22] == pytest.approx(rates[13] / 10)


@pytest.mark.parametrize("more", [{"steps": 40, "converged": False}, {"steps": 30}, {"patience": 6}])
def test_a_run_that_has_converged_goes_on_where_more_is_asked_for(tmp_path: Path, converged: Untroubled, more: dict[str, Any]) -> None:
    run = Path(shutil.copytree(converged.run, tmp_path / "run"))
    again = kit.tiny_trainer(run, **CONVERGED)
    assert again.resume() == 22 and again.length.is_over(22), "the same again is over"
    trainer = kit.tiny_trainer(run, **{**CONVERGED, **more})
    assert trainer.resume() == 22 and not trainer.length.is_over(22)
    trainer.fit()
    ends = trainer.decisions.taken("converged")
    if "patience" in more:  # six evaluations later it has still found nothing better, and goes back once more
        assert [at for at, _ in ends] == [21, 39] and trainer.progress.step == ends[1][1]["end"] == 22
    else:
        assert len(ends) == 1 and trainer.progress.step == more["steps"]
    assert trainer.length.is_over(trainer.progress.step)


def crash_until_done(run: Path, settings: dict[str, Any], points: Sequence[int]) -> None:
    for n in points:
        assert kit.in_child(lambda: kit.train(run, **settings), crash_at=n) in (137, 0)
    trainer = kit.train(run, **settings)
    assert trainer.length.is_over(trainer.progress.step)


def test_until_converged_killed_at_some_operations(tmp_path: Path, converged: Untroubled) -> None:
    leaving = next(
        n
        for n, (kind, path) in enumerate(converged.operations, 1)
        if kind == "rename" and path.endswith("checkpoints/step-000020")
    )
    for n in (leaving - 1, leaving, leaving + 1, leaving + 3, leaving + 14):
        crash_until_done(tmp_path / str(n), CONVERGED, [n])
        equal_runs(tmp_path / str(n), converged.run)


@pytest.mark.slow
def test_until_converged_killed_at_every_operation(tmp_path: Path, converged: Untroubled) -> None:
    for n in range(1, len(converged.operations) + 1):
        crash_until_done(tmp_path / str(n), CONVERGED, [n])
        equal_runs(tmp_path / str(n), converged.run)


@pytest.mark.slow
def test_F03_until_converged_with_a_power_cut(tmp_path: Path, converged: Untroubled) -> None:
    """What is decided is on disk before it has an effect: a run that lost more than that would end otherwise.

    At every operation around the decision, and at every ninth of the rest.
    """
    run = files.make_dirs(tmp_path / "run")
    with kit.PowerLoss(run) as power:
        kit.train(run, **CONVERGED)
    deciding = next(
        n
        for n, (kind, _, details) in enumerate(power.operations)
        if kind == "write" and b'"decision": "converged"' in details[1]
    )
    prefixes = sorted({*range(0, len(power.operations), 9), *range(deciding - 30, deciding + 60)})
    for _, _, disk in power.disks(tmp_path / "disk", prefixes=prefixes, variants=["lost", "torn"]):
        kit.train(disk, **CONVERGED)
        equal_runs(disk, converged.run)


def test_until_converged_with_its_best_checkpoint_damaged(tmp_path: Path, converged: Untroubled) -> None:
    """The nearest one before is taken instead."""
    damaged: list[Path] = []

    def evaluate(trainer: Trainer) -> float:
        if trainer.progress.step == 21 and not damaged:
            damaged.append(checkpoint.folder(tmp_path, 12) / "model.safetensors")
            kit.corrupt(damaged[0], "bit", 4000)
        return valley(trainer)

    kit.train(tmp_path, **{**CONVERGED, "evaluate": evaluate, "keep": 9})
    lines = RunLog(tmp_path / "log.jsonl").lines()
    assert next(line["to"] for line in lines if line.get("decision") == "converged") == 9
    each_step_once(tmp_path)


# -- budgets -----------------------------------------------------------------------------------------------------------


def budgeted(run: Path, *, budget: float | None = 1.0, per_step: float = 0.01, **settings: Any) -> Trainer:
    """A trainer in whose world every step takes `per_step` seconds and nothing else takes any."""
    clock = kit.FakeClock()
    trainer = kit.tiny_trainer(run, steps=settings.pop("steps", None), budget=budget, clock=clock, **settings)
    measured = trainer.length.measured

    def one_step(step: int, seconds: float) -> None:
        clock.now += per_step
        measured(step, per_step)

    trainer.length.measured = one_step  # type: ignore[method-assign]
    trainer.length.evaluated = lambda seconds, tokens: None  # type: ignore[method-assign]
    return trainer


def decisions(run: Path, kind: str) -> dict[int, Line]:
    return {line["step"]: line for line in RunLog(run / "log.jsonl").lines() if line.get("decision") == kind}


def test_a_budget_buys_steps_and_is_revised_at_evaluations(tmp_path: Path) -> None:
    trainer = budgeted(tmp_path)
    trainer.fit()
    bought = decisions(tmp_path, "steps")
    first = bought.pop(4)
    assert first["budget"] == 1.0 and first["steps"] == 4 + int((0.99 - 0.04) * 0.97 / 0.01)
    evaluated = {line["step"] for line in RunLog(tmp_path / "log.jsonl").lines() if line.get("whole") is False}
    assert set(bought) == evaluated and all(step % first["eval_every"] == 0 for step in evaluated)
    steps = kit.step_lines(tmp_path)[-1]
    assert steps in (98, 99) and trainer.length.elapsed() <= 1.0


def test_a_budget_is_paid_over_all_sessions(tmp_path: Path) -> None:
    """The time of steps that are done again is paid for, also when the process dies before it has done any."""
    for stop in (30, 41, 52):
        trainer = budgeted(tmp_path, save_every=20)
        trainer.resume()
        trainer.tell = lambda line, stop=stop: stop_at(line, stop)  # type: ignore[misc]
        with pytest.raises(kit.Halted):
            trainer.fit()
        for _ in range(2):  # two that die at once
            used = budgeted(tmp_path, save_every=20)
            used.resume()
    assert used.progress.step == 40 and used.length.carried == pytest.approx(0.30 + 0.21 + 0.12, abs=0.011)
    used.fit()
    assert used.length.elapsed() == pytest.approx(0.99, abs=0.02)
    each_step_once(tmp_path)


def stop_at(line: Line, step: int) -> None:
    if line["step"] == step and "loss" in line:
        raise kit.Halted


def test_decisions_hold_for_a_budgeted_run_from_the_first_step(tmp_path: Path) -> None:
    """Killed before the first checkpoint and after the first decision: nothing that it says is used before its step."""
    whole = budgeted(tmp_path / "whole", budget=0.3, save_every=50)
    whole.fit()
    run = tmp_path / "run"
    trainer = budgeted(run, budget=0.3, save_every=50)
    trainer.tell = lambda line: stop_at(line, 9)
    with pytest.raises(kit.Halted):
        trainer.fit()
    assert decisions(run, "steps")
    trainer = budgeted(run, budget=0.3, save_every=50, replay=RunLog(tmp_path / "whole" / "log.jsonl").lines())
    assert trainer.resume() == 0
    trainer.fit()
    equal_runs(run, tmp_path / "whole")


def test_a_budget_that_is_given_later_or_changed(tmp_path: Path) -> None:
    budgeted(tmp_path, budget=None, steps=10).fit()
    for budget, least, most in ((0.3, 26, 30), (1.0, 90, 100), (1.2, 110, 120)):
        trainer = budgeted(tmp_path, budget=budget)
        trainer.resume()
        trainer.fit()
        assert least <= trainer.progress.step <= most, budget
    each_step_once(tmp_path)


def test_a_budget_that_is_spent_ends_the_run(tmp_path: Path) -> None:
    trainer = budgeted(tmp_path, budget=0.02)
    trainer.fit()
    assert trainer.progress.step == 4  # three that are measured, and one more


def test_a_budget_is_paid_where_few_steps_are_logged(tmp_path: Path) -> None:
    budgeted(tmp_path, steps=40, log_every=1000).fit()
    again = budgeted(tmp_path, log_every=1000)
    assert again.resume() == 40 and again.length.carried == pytest.approx(0.40, abs=0.02)


# -- replay ------------------------------------------------------------------------------------------------------------


def test_replay_takes_the_same_path(tmp_path: Path) -> None:
    """Steps bought on a slow machine, a micro-batch halved for its memory, and convergence: the log tells it all."""
    settings: dict[str, Any] = {"converged": True, "evaluate": valley, "patience": 2, "eval_every": 3}
    model = kit.tiny_model()
    kit.no_memory_above(model, 2)
    first = budgeted(tmp_path / "first", budget=5.0, model=model, save_every=4, **settings)
    first.fit()
    kinds = {line["decision"] for line in RunLog(first.log.path).lines() if line.get("event") == "decision"}
    assert kinds == {"steps", "micro_batch", "converged"}
    lines = RunLog(first.log.path).lines()
    second = budgeted(tmp_path / "second", budget=5.0, per_step=1e-4, replay=lines, save_every=1000, **settings)
    assert second.decisions.replaying
    second.fit()  # it saves where the log will go back to, whatever its own settings say
    equal_runs(tmp_path / "second", tmp_path / "first")


def test_replay_of_a_log_that_ends_early(tmp_path: Path) -> None:
    """Up to its end it is followed; from there on the run decides for itself."""
    first = budgeted(tmp_path / "first", budget=0.4)
    first.tell = lambda line: stop_at(line, 15)
    with pytest.raises(kit.Halted):
        first.fit()
    lines = RunLog(first.log.path).lines()
    second = budgeted(tmp_path / "second", budget=0.4, per_step=0.02, replay=lines)
    second.fit()
    bought = decisions(tmp_path / "second", "steps")
    assert bought[4] == decisions(tmp_path / "first", "steps")[4] and len(bought) > 2
    assert second.progress.step < bought[4]["steps"], "revised by its own clock"


# -- the batches of a path ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), max_size=6))
def test_rollbacks_use_every_batch_at_most_once(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int]]
) -> None:
    """Whatever goes back whereto: the surviving path has each batch once, in order, and misses what was skipped."""
    log = RunLog(tmp_path_factory.mktemp("log") / "log.jsonl")
    taken = Decisions(log)
    path: list[int] = []  # batches behind the surviving weights
    highest = -1
    for forward, back in turns:
        for step in range(len(path), len(path) + forward):
            path.append(taken.batch_of(step))
        at = len(path) - 1  # the update of this step was not made
        if any(step == at for step, _ in taken.known("rollback")):
            continue
        to = max(0, at - back)
        highest = max(highest, path[-1])
        taken.make("rollback", at, lambda to=to: {"to": to})  # type: ignore[misc]
        path = path[:to]
        assert taken.batch_of(to) == highest + 1, "behind the one that caused it"
        assert [taken.batch_of(step) for step in range(to)] == path, "what came before stays"
    path += [taken.batch_of(step) for step in range(len(path), len(path) + 20)]
    assert path == sorted(set(path)) and Decisions(log).batch_of(40) == taken.batch_of(40)


def test_what_was_decided_about_a_batch_does_not_hold_on_the_next_path(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    taken = Decisions(log)
    assert taken.make("spike", 7, lambda: {"action": "skip"}) == {"action": "skip"}
    taken.make("rollback", 9, lambda: {"to": 5})
    for again in (taken, Decisions(log), Decisions(RunLog(tmp_path / "other.jsonl"), log.lines())):
        if again.replaying:
            assert again.make("spike", 7, lambda: None) == {"action": "skip"}
            again.make("rollback", 9, lambda: None)
        assert again.make("spike", 7, lambda: None) is None
    taken.make("spike", 7, lambda: {"action": "log"})
    assert log.lines()[-1]["path"] == 1 and Decisions(log).make("spike", 7, lambda: None) == {"action": "log"}


def test_losses_of_each_source(tmp_path: Path) -> None:
    shards = kit.tiny_shards(2)
    trainer = kit.tiny_trainer(tmp_path, shards=shards, names=["one", "two"], steps=3, micro_batch=3)
    batch = trainer.loader.batch(0)
    with torch.no_grad():
        expected = {
            name: trainer.model.loss_sum(b.input_ids, b.labels, b.positions, b.documents)  # type: ignore[operator]
            for name, rows in (("one", batch.sources == 0), ("two", batch.sources == 1))
            for b in [rows_of(batch, rows)]
        }
    trainer.fit()
    line = RunLog(tmp_path / "log.jsonl").lines()[0]
    assert line["sources"] == pytest.approx(
        {name: float(total) / count for name, (total, count) in expected.items()}, rel=1e-5
    )


def rows_of(batch: Batch, rows: Any) -> Batch:
    index = torch.from_numpy(rows.nonzero()[0])
    documents, positions = (None if t is None else t[index] for t in (batch.documents, batch.positions))
    ids, labels = batch.input_ids[index], batch.labels[index]
    return Batch(ids, labels, documents, positions, batch.samples[rows], batch.sources[rows])
