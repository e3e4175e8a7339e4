"""Numbers that cannot be trusted do not reach the weights, and what is accumulated is what was asked for."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.faults import kit
from tests.faults.conftest import REFERENCE, Untroubled
from threefold.data.loader import IGNORED, Batch, Loader
from threefold.errors import NumericError
from threefold.model.tensors import read_safetensors
from threefold.objectives.causal import Causal
from threefold.objectives.term import Objective, Term
from threefold.training import checkpoint, guards
from threefold.training.gradients import accumulate
from threefold.training.log import RunLog

ROOT = Path(__file__).resolve().parents[2]


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def sample_of(step: int, row: int = 0) -> int:
    """The id of a sample that the reference run sees at a step."""
    return int(Loader(kit.tiny_shards(), kit.CONTEXT, kit.ROWS, 0).batch(step).samples[row])


# -- N01, N02: not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e20, 1e36])
def test_N01_a_learning_rate_out_of_all_bounds(tmp_path: Path, lr: float) -> None:
    trainer = kit.tiny_trainer(tmp_path, steps=20, lr=lr, adamw_lr=lr, save_every=1, warmup=1)
    with pytest.raises(NumericError) as error:
        trainer.fit()
    assert "learning rate" in error.value.hint and "step" in str(error.value)
    found = checkpoint.latest(tmp_path)
    assert found is None or (finite(found.model()) and finite(found.optimizer()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N01_weights_that_are_not_finite_are_not_saved(tmp_path: Path, untroubled: Untroubled, value: float) -> None:
    trainer = kit.tiny_trainer(tmp_path, **untroubled.settings)

    def tell(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            trainer.model.get_parameter("transformer.decoder.norm.weight").data[3] = value

    trainer.tell = tell
    with pytest.raises(
        NumericError, match=r"step 10: 1 of \d+ weights are not finite .* `transformer.decoder.norm.weight`"
    ):
        trainer.fit()
    assert checkpoint.steps(tmp_path) == [5] and finite(kit.saved_state(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_N01_a_poisoned_sample_stops_the_run(tmp_path: Path, untroubled: Untroubled, value: float) -> None:
    sample = sample_of(7, 2)
    trainer = kit.tiny_trainer(tmp_path, objective=kit.Poisoned({sample}, value), **untroubled.settings)
    with pytest.raises(NumericError) as error:
        trainer.fit()
    text = str(error.value)
    assert "step 7: loss is" in text and "no update was made" in text and "train.nonfinite=skip" in error.value.hint
    assert str(trainer.loader.describe(sample)) in text, "the samples are named"
    dump = read_safetensors(tmp_path / "dumps" / "step-000007.safetensors")
    batch = trainer.loader.batch(7)
    assert torch.equal(dump["input_ids"], batch.input_ids) and dump["samples"].tolist() == batch.samples.tolist()
    assert finite(kit.state_of(trainer)) and checkpoint.steps(tmp_path) == [5]
    kit.tiny_trainer(tmp_path, **untroubled.settings).resume()
    assert kit.train(tmp_path, **untroubled.settings).progress.step == 20


def test_N01_a_full_disk_does_not_hide_it(tmp_path: Path, untroubled: Untroubled) -> None:
    trainer = kit.tiny_trainer(tmp_path, objective=kit.Poisoned({sample_of(7)}, float("nan")), **untroubled.settings)
    with kit.FaultyFiles(1, errno.ENOSPC, "write", "dumps", lasting=True):
        with pytest.raises(NumericError, match="the batch could not be written: .* no space left"):
            trainer.fit()


@pytest.mark.parametrize(
    "name",
    [
        "transformer.embed.weight",
        "transformer.decoder.blocks.1.attention.qkv.weight",
        "transformer.decoder.norm.weight",
    ],
)
def test_N02_one_number_of_one_gradient(tmp_path: Path, untroubled: Untroubled, name: str) -> None:
    """The loss is finite; the gradient norm is not."""
    model = kit.tiny_model()
    kit.poison_gradient(model.get_parameter(name), 7)
    trainer = kit.tiny_trainer(tmp_path, model=model, **untroubled.settings)
    with pytest.raises(NumericError, match=r"step 7: loss is [\d.]+, gradient norm nan"):
        trainer.fit()
    assert finite(kit.state_of(trainer)) and checkpoint.steps(tmp_path) == [5]


def test_N01_skip_goes_on_and_is_recorded(tmp_path: Path, untroubled: Untroubled) -> None:
    settings = {**untroubled.settings, "nonfinite": "skip"}
    objective = kit.Poisoned({sample_of(7), sample_of(8)}, float("nan"))
    trainer = kit.train(tmp_path / "run", objective=objective, **settings)
    skips = [line for line in RunLog(trainer.log.path).lines() if line.get("decision") == "skip"]
    assert [line["step"] for line in skips] == [7, 8] and "nan" in skips[0]["why"] and len(skips[0]["samples"]) == 4
    assert kit.step_lines(tmp_path / "run") == [step for step in range(1, 21) if step not in (8, 9)]
    assert finite(kit.state_of(trainer)) and trainer.progress.tokens == 18 * trainer.loader.tokens_per_step
    kit.halt(tmp_path / "halted", 11, objective=objective, **settings)
    again = kit.train(tmp_path / "halted", objective=objective, **settings)
    assert kit.same_state(kit.state_of(again), kit.state_of(trainer))
    assert kit.history(tmp_path / "halted") == kit.history(tmp_path / "run")


def test_N01_skip_has_an_end(tmp_path: Path) -> None:
    samples = {sample_of(step) for step in range(5, 10)}
    trainer = kit.tiny_trainer(tmp_path, objective=kit.Poisoned(samples, float("nan")), nonfinite="skip")
    with pytest.raises(NumericError, match="step 8: "):
        trainer.fit()
    assert guards.MOST_SKIPS == 3 and trainer.progress.step == 8


# -- N03, N04: spikes --------------------------------------------------------------------------------------------------

SPIKES: dict[str, Any] = {"steps": 24, "save_every": 4, "eval_every": 6}


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that knows its run after eight steps."""
    monkeypatch.setattr(guards, "WINDOW", 8)


@pytest.fixture
def clean(tmp_path: Path, short_window: None) -> float:
    trainer = kit.train(tmp_path / "clean", **SPIKES)
    assert not [line for line in RunLog(trainer.log.path).lines() if line.get("event") == "decision"]
    return kit.held_out(trainer)


def spiked(run: Path, action: str, at: int = 13, **settings: Any) -> Any:
    objective = kit.Poisoned({sample_of(at, 1)}, 1e4)
    return kit.train(run, objective=objective, spike=action, **{**SPIKES, **settings})


def decisions_of(run: Path) -> list[tuple[str, int]]:
    return [
        (line["decision"], line["step"])
        for line in RunLog(run / "log.jsonl").lines()
        if line.get("event") == "decision"
    ]


def test_N03_a_spike_is_logged(tmp_path: Path, short_window: None) -> None:
    spiked(tmp_path, "log")
    assert decisions_of(tmp_path) == [("spike", 13)] and kit.step_lines(tmp_path) == list(range(1, 25))
    line = next(line for line in RunLog(tmp_path / "log.jsonl").lines() if line.get("decision") == "spike")
    assert line["loss_seen"] > 1e3 and line["action"] == "log"


def test_N03_a_spike_is_skipped(tmp_path: Path, clean: float) -> None:
    """One update of 24 is missing: the loss that is reached is that of the clean run to a tenth."""
    trainer = spiked(tmp_path / "run", "skip")
    assert decisions_of(tmp_path / "run") == [("spike", 13)]
    assert kit.step_lines(tmp_path / "run") == [step for step in range(1, 25) if step != 14]
    assert kit.held_out(trainer) == pytest.approx(clean, rel=0.1)
    kit.halt(tmp_path / "halted", 16, objective=kit.Poisoned({sample_of(13, 1)}, 1e4), spike="skip", **SPIKES)
    again = spiked(tmp_path / "halted", "skip")
    assert kit.same_state(kit.state_of(again), kit.state_of(trainer))


def test_N03_a_rise_that_lasts_is_learnt_from(tmp_path: Path, short_window: None) -> None:
    """Three updates in a row are left out at most: a loss that stays high is no spike, and training does not freeze."""
    samples = {sample_of(step, row) for step in range(13, 40) for row in range(kit.ROWS)}
    run = {"objective": kit.Poisoned(samples, 50.0), "spike": "skip", **SPIKES, "steps": 40}
    trainer = kit.train(tmp_path / "run", **run)
    actions = [line["action"] for line in RunLog(trainer.log.path).lines() if line.get("decision") == "spike"]
    assert actions[:4] == ["skip", "skip", "skip", "log"]
    made = [step for step in kit.step_lines(tmp_path / "run") if step > 13]
    assert len(made) > 12, f"of 27 updates {len(made)} were made"
    kit.halt(tmp_path / "halted", 15, **run)
    assert kit.same_state(kit.state_of(kit.train(tmp_path / "halted", **run)), kit.state_of(trainer))


def test_N03_the_full_window(tmp_path: Path) -> None:
    """OLMo's constants: nothing stands out before 128 steps, six deviations above the mean after."""
    guard = guards.SpikeGuard()
    for step in range(128):
        assert not guard.is_spike(1e9, 1e9)
        guard.add(2 + step % 2, 1.0)
    assert (
        not guard.is_spike(2.5 + 6 * 0.5, 1.0)
        and guard.is_spike(2.5 + 6 * 0.5 + 1e-6, 1.0)
        and guard.is_spike(2.5, 1.1)
    )
    other = guards.SpikeGuard()
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and other.is_spike(5.6, 1.0)


def test_N04_rollback(tmp_path: Path, clean: float) -> None:
    """Back to the checkpoint before, over the batches since, and on to the last step."""
    trainer = spiked(tmp_path / "run", "rollback")
    line = next(line for line in RunLog(tmp_path / "run" / "log.jsonl").lines() if line.get("event") == "decision")
    assert (line["decision"], line["step"], line["to"], line["skipped"]) == ("rollback", 13, 12, 2)
    assert kit.step_lines(tmp_path / "run") == list(range(1, 25))
    assert [trainer.decisions.batch_of(step) for step in (11, 12, 13, 23)] == [11, 14, 15, 25]
    assert kit.held_out(trainer) == pytest.approx(clean, rel=0.1)


def test_N04_rollback_is_replayed_from_the_log(tmp_path: Path, short_window: None) -> None:
    """Also by a run that would save at other steps, and that would not see the spike by itself."""
    trainer = spiked(tmp_path / "run", "rollback")
    replay = RunLog(trainer.log.path).lines()
    again = spiked(tmp_path / "again", "rollback", replay=replay, save_every=7)
    assert kit.same_state(kit.state_of(again), kit.state_of(trainer))
    assert kit.history(tmp_path / "again") == kit.history(tmp_path / "run")
    blind = kit.train(tmp_path / "blind", replay=replay, spike="rollback", **{**SPIKES, "save_every": 1000})
    assert kit.same_state(kit.state_of(blind), kit.state_of(trainer)), "the poison left no trace in the weights"


def test_N04_killed_around_the_rollback(tmp_path: Path, short_window: None) -> None:
    """At the decision, while what came after is removed, and later: the same weights."""
    with kit.FaultyFiles() as disk:
        trainer = spiked(tmp_path / "run", "rollback", at=15, save_every=3)
    assert decisions_of(tmp_path / "run") == [("rollback", 15)]
    gone = next(
        n for n, (kind, path) in enumerate(disk.seen, 1) if kind == "rename" and path.endswith("ts/step-000015")
    )
    for n in (gone - 3, gone - 1, gone, gone + 2, gone + 12):
        run = tmp_path / str(n)
        work = functools.partial(spiked, run, "rollback", at=15, save_every=3)
        assert kit.in_child(work, crash_at=n) == 137
        again = work()
        assert kit.same_state(kit.state_of(again), kit.state_of(trainer)), n
        assert kit.history(run) == kit.history(tmp_path / "run")
    run = tmp_path / "halted"
    kit.halt(run, 20, objective=kit.Poisoned({sample_of(15, 1)}, 1e4), spike="rollback", **{**SPIKES, "save_every": 3})
    assert kit.same_state(kit.state_of(spiked(run, "rollback", at=15, save_every=3)), kit.state_of(trainer))


@pytest.mark.slow
def test_N04_killed_at_every_operation(tmp_path: Path, short_window: None) -> None:
    with kit.FaultyFiles() as disk:
        trainer = spiked(tmp_path / "run", "rollback", at=15, save_every=3)
    for n in range(1, len(disk.seen) + 1):
        run = tmp_path / str(n)
        work = functools.partial(spiked, run, "rollback", at=15, save_every=3)
        assert kit.in_child(work, crash_at=n) == 137
        assert kit.same_state(kit.state_of(work()), kit.state_of(trainer)), n
        assert kit.history(run) == kit.history(tmp_path / "run")


def test_N04_spikes_again_and_again(tmp_path: Path, short_window: None) -> None:
    """Two more on the way: a step rolls back once, later it is skipped; every batch is used at most once."""
    samples = {sample_of(step, 1) for step in (13, 15, 18)}
    settings: dict[str, Any] = {"objective": kit.Poisoned(samples, 1e4), "spike": "rollback", **SPIKES}
    trainer = kit.train(tmp_path / "run", **settings)
    assert [kind for kind, _ in decisions_of(tmp_path / "run")].count("rollback") >= 2
    assert trainer.progress.step == 24
    batches = [trainer.decisions.batch_of(step) for step in range(24)]
    assert batches == sorted(set(batches)) and not {13, 18} & set(batches)
    with kit.FaultyFiles() as disk:
        kit.train(tmp_path / "again", **settings)
    for n in range(100, len(disk.seen), len(disk.seen) // 4):
        run = tmp_path / str(n)
        assert kit.in_child(lambda run=run: kit.train(run, **settings), crash_at=n) == 137  # type: ignore[misc]
        assert kit.same_state(kit.state_of(kit.train(run, **settings)), kit.state_of(trainer)), n


def test_N04_nothing_to_go_back_to(tmp_path: Path, short_window: None) -> None:
    """Before the first checkpoint a spike is skipped."""
    spiked(tmp_path, "rollback", at=9, save_every=1000)
    assert decisions_of(tmp_path) == [("spike", 9)]


# -- N05: nothing to learn from ----------------------------------------------------------------------------------------


class Answers(Causal):
    """Only labels after a place in the row count, as where a prompt comes before a completion."""

    def __init__(self, prompts: dict[int, int]) -> None:
        self.prompts = prompts

    def _masked(self, batch: Batch) -> Batch:
        labels = batch.labels.clone()
        for row, sample in enumerate(batch.samples):
            labels[row, : self.prompts.get(int(sample), 0)] = IGNORED
        return dataclasses.replace(batch, labels=labels)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return super().weights(self._masked(batch))

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        return super().terms(model, self._masked(batch), **context)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_N05_every_label_of_a_step_masked(tmp_path: Path, untroubled: Untroubled, micro_batch: int) -> None:
    prompts = {sample_of(7, row): kit.CONTEXT for row in range(kit.ROWS)}
    trainer = kit.tiny_trainer(tmp_path, objective=Answers(prompts), micro_batch=micro_batch, **untroubled.settings)
    with pytest.raises(NumericError, match="step 7: nothing to learn from in the term tokens") as error:
        trainer.fit()
    assert all(str(trainer.loader.describe(sample)) in str(error.value) for sample in prompts)
    assert "longer context" in error.value.hint and kit.step_lines(tmp_path)[-1] == 7


def test_N05_some_rows_masked_is_fine(tmp_path: Path, untroubled: Untroubled) -> None:
    prompts = {sample_of(7, row): kit.CONTEXT for row in range(kit.ROWS - 1)}
    one = kit.tiny_trainer(tmp_path / "1", objective=Answers(prompts), micro_batch=1, **untroubled.settings)
    one.fit()
    assert kit.step_lines(tmp_path / "1") == list(range(1, 21))


# -- N06: micro-batches ------------------------------------------------------------------------------------------------


class TwoTerms:
    """Two terms that count different things: labels, very unevenly spread over rows, and every third sample."""

    name = "two"
    unit = "row"

    def _labels(self, batch: Batch) -> Tensor:
        keep = torch.tensor([1 + int(s) % 15 for s in batch.samples])
        return batch.labels.masked_fill(torch.arange(batch.labels.shape[1]) >= keep[:, None], IGNORED)

    def _chosen(self, batch: Batch) -> Tensor:
        return torch.tensor([int(s) % 3 == 0 for s in batch.samples])

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"tokens": float((self._labels(batch) != IGNORED).sum()), "rows": float(self._chosen(batch).sum())}

    def terms(self, model: Any, batch: Batch, **context: Any) -> list[Term]:
        weights = self.weights(batch)
        total, _ = model.loss_sum(batch.input_ids, self._labels(batch), batch.positions, batch.documents, **context)
        pooled = model.hidden(batch.input_ids, batch.positions, batch.documents).mean((1, 2))
        return [
            Term("tokens", total, weights["tokens"]),
            Term("rows", ((pooled - 1) ** 2 * self._chosen(batch)).sum(), weights["rows"], coefficient=0.7),
        ]


@pytest.mark.parametrize("objective", [Causal(), TwoTerms()], ids=["causal", "two terms"])
def test_N06_any_micro_batch_gives_the_gradient_of_the_whole(tmp_path: Path, objective: Objective) -> None:
    def gradients(size: int) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        trainer = kit.tiny_trainer(
            tmp_path, rows=8, micro_batch=size, objective=objective, model=kit.tiny_model(torch.float64)
        )
        measured = trainer._gradients(2, trainer.loader.batch(2))
        return (
            measured.loss,
            measured.terms,
            {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None},
        )

    loss, terms, whole = gradients(8)
    largest = max(float(g.abs().max()) for g in whole.values())
    for size in (1, 2, 3, 4):
        other, parts_of_loss, parts = gradients(size)
        assert other == pytest.approx(loss, rel=1e-13) and parts_of_loss == pytest.approx(terms, rel=1e-13)
        assert max(float((parts[n] - whole[n]).abs().max()) for n in whole) < 1e-12 * largest


def test_N06_the_loss_is_what_the_definition_says(tmp_path: Path) -> None:
    """Sum of coefficient x sum / weight, written down without any of the trainer's code."""
    trainer = kit.tiny_trainer(
        tmp_path, rows=8, micro_batch=3, objective=TwoTerms(), model=kit.tiny_model(torch.float64)
    )
    batch, objective = trainer.loader.batch(2), TwoTerms()
    tokens, rows = objective.terms(trainer.model, batch)
    expected = tokens.sum / tokens.weight + 0.7 * rows.sum / rows.weight
    gradients = torch.autograd.grad(expected, list(trainer.model.parameters()))
    measured = trainer._gradients(2, batch)
    assert measured.loss == pytest.approx(float(expected.detach()), rel=1e-13)
    for ours, theirs in zip(trainer.model.parameters(), gradients, strict=True):
        assert ours.grad is not None and torch.allclose(ours.grad, theirs, rtol=1e-11, atol=1e-13)


def test_N06_an_objective_whose_terms_and_weights_disagree_is_a_bug(tmp_path: Path) -> None:
    class Forgets(Causal):
        def weights(self, batch: Batch) -> Mapping[str, float]:
            return {**super().weights(batch), "other": 1.0}

    trainer = kit.tiny_trainer(tmp_path)
    with pytest.raises(AssertionError, match="disagree"):
        accumulate(trainer.model, Forgets(), [trainer.loader.batch(0)], lambda part: {})


def test_N06_units_that_are_not_rows_are_not_split(tmp_path: Path) -> None:
    class Whole(Causal):
        unit = "batch"
        seen: list[int] = []  # noqa: RUF012

        def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
            self.seen.append(len(batch))
            return super().terms(model, batch, **context)

    kit.train(tmp_path, steps=2, objective=Whole(), micro_batch=1)
    assert Whole.seen == [4, 4]


# -- N12 ---------------------------------------------------------------------------------------------------------------


def test_N12_two_processes_give_the_same_bits(tmp_path: Path, untroubled: Untroubled) -> None:
    code = (
        f"import torch; torch.set_num_threads(1)\nfrom pathlib import Path\nfrom tests.faults import kit\n"
        f"kit.train(Path({str(tmp_path)!r}), **{REFERENCE!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert kit.same_state(kit.saved_state(tmp_path), untroubled.state) and kit.history(tmp_path) == untroubled.history
