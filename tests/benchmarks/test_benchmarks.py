"""The benchmarks measure what they say: who takes turns, which characters are predicted, what the table shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import control, foundations, harness, help_time, packing, save_share, score, startup, texts, time_to_loss, tuning_speed
from benchmarks.__main__ import MEASURES, main
from benchmarks.table import document, markdown, stored


def result(measure: str, measurements: list[dict[str, Any]], **settings: Any) -> harness.Result:
    facts = {"cpu": "a processor", "cores": 2, "threads": 2, "memory_gib": 8.0, "system": "Linux", "load": 0.1}
    speeds = {"1024": 300.0, "2048": 340.0}
    controls = {"matmul_float32_gflops": speeds, "matmul_bfloat16_gflops": speeds, "memory_read_gbs": 28.0}
    return harness.Result(
        name=measure,
        measure=measure,
        made="2026-01-01T00:00:00+00:00",
        quick=False,
        machine=facts,
        controls=controls,
        versions={"python": "3.11", "commit": None},
        settings=settings,
        measurements=measurements,
    )


def races(losses: dict[str, list[float]], seconds: dict[str, float], data_set: str = "shakespeare") -> harness.Result:
    measurements = [
        {
            "side": "control" if share == "control" else "threefold",
            "share": share,
            "repetition": i,
            "loss": loss,
            "seconds": seconds[share],
            "parameters": 1000,
            "context": 64,
            "unknown": 0,
            **({} if share == "control" else {"budget": seconds[share]}),
        }
        for share, found in losses.items()
        for i, loss in enumerate(found)
    ]
    return result(
        "time_to_loss",
        measurements,
        data_set=data_set,
        budgets=[s for s in losses if s != "control"],
        control={"layers": 4},
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_stored_result_is_shown() -> None:
    measures = {measure.name: measure for measure in MEASURES}
    for found in stored(harness.RESULTS):
        assert not found.quick, f"{found.name}: a quick result says nothing and is not kept"
        assert measures[found.measure].rows(found), found.name
        assert found.controls["memory_read_gbs"] > 0
        assert {"torch", "python", "threefold"} <= set(found.versions)
        assert found.name in document([found], MEASURES)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = result("help_time", [{"side": "threefold --help", "repetition": 0, "seconds": 0.12}], commands={})
    assert harness.Result.load(made.save(tmp_path)) == made
    assert stored(tmp_path) == [made]


def test_the_table_of_nothing_says_how_to_fill_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--results", str(tmp_path)]) == 0
    assert "python -m benchmarks" in capsys.readouterr().out


def test_the_smallest_budget_that_reaches_the_target_is_shown() -> None:
    found = races(
        {"control": [1.91, 1.89, 1.90], "1/10": [1.95, 1.89, 1.94], "1/4": [1.8, 1.7, 1.89], "1": [1.5, 1.6, 1.5]},
        {"control": 90.0, "1/10": 9.0, "1/4": 22.5, "1": 90.0},
    )
    assert time_to_loss.first_to_reach(found) == "1/4"
    wall, equal = time_to_loss.rows(found)
    assert wall.compared == "1/4.0" and wall.verdict == "holds"
    assert wall.threefold.startswith("22.5 s") and "1.700 to 1.890" in wall.threefold
    assert equal.verdict == "aim reached" and equal.compared == "-0.400"
    assert "| 1/10 | 9.0 s (9.0 to 9.0) |" in time_to_loss.details(found) and "1 of 3" in time_to_loss.details(found)


def test_elsewhere_the_target_is_what_the_control_reaches() -> None:
    found = races(
        {"control": [2.3, 2.4, 2.5], "1/3": [2.45, 2.41, 2.42], "1": [2.41, 2.6, 2.5]},
        {"control": 90.0, "1/3": 30.0, "1": 90.0},
        data_set="nsmc",
    )
    wall, equal = time_to_loss.rows(found)
    assert "2.400" in wall.measure and wall.limits == ("1/3", "1/8")
    assert wall.verdict == "falls short" and wall.threefold.startswith("not reached; at best 2.42")
    assert equal.verdict == "falls short"


def test_a_loss_after_more_time_than_the_control_took_is_no_comparison() -> None:
    found = races({"control": [1.9], "1": [1.4]}, {"control": 90.0, "1": 95.0})
    equal = time_to_loss.rows(found)[1]
    assert equal.verdict == "falls short" and equal.compared == "-0.500, in 1.06 of the time"


def test_each_measure_has_rows() -> None:
    turns = [
        {"side": side, "repetition": i, "seconds": second}
        for i in range(5)
        for side, second in (
            ("transformers", 8.0 + i),
            ("threefold", 2.0),
            ("python -c pass", 0.01),
            ("threefold --help", 0.2),
        )
    ]
    assert [row.compared for row in startup.rows(result("startup", turns))] == ["1/5.0"]
    assert [row.verdict for row in help_time.rows(result("help_time", turns, commands={}))] == ["holds"]
    saves = [{"step": i, "seconds": 0.3, "interval": 60.0, "share": 0.005, "gap": 0.3} for i in range(5)]
    shares = result("save_share", saves, parameters=10_600_000, bytes_of_a_checkpoint=10**8)
    assert save_share.rows(shares)[0].verdict == "aim reached"
    speeds = [
        {"shape": [64, 2, 32, 2], "side": side, "tokens_per_second": speed, "repetition": 0} for side, speed in (("without", 1000.0), ("with", 900.0))
    ]
    borders = result("packing", speeds)
    assert packing.rows(borders)[0].compared == "-10.0 %" and packing.rows(borders)[0].verdict == "stated"
    tuned = [{"side": side, "microseconds": value} for side, value in (("threefold", 30.0), ("peer", 50.0))]
    case = result("tuning_speed", tuned, case="gpt2-dpo", peer="TRL", setting=["--micro", "8"], tried={"--micro 8": 50.0})
    assert [(row.compared, row.verdict) for row in tuning_speed.rows_of(case)] == [("1/1.7", "falls short")]
    assert "| `threefold --help` |" in markdown([result("help_time", turns, commands={})], MEASURES)


# -- taking turns, and one real measure --------------------------------------------------------------------------------


def test_sides_take_turns_and_every_other_round_goes_backwards() -> None:
    assert [side for _, side in harness.rounds(3, "ab")] == list("abbaab")


def test_help_time_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help_time", "--quick", "--results", str(tmp_path)]) == 0
    (found,) = stored(tmp_path)
    assert found.quick and {m["side"] for m in found.measurements} == {"python -c pass", "threefold --help"}
    assert all(m["seconds"] > 0 for m in found.measurements)
    assert "`threefold --help`" in capsys.readouterr().out


def test_a_process_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(harness.BenchmarkError, match="unknown_module"):
        harness.timed([*harness.THREEFOLD[:1], "-m", "unknown_module"])


def test_without_the_shared_data_a_measure_says_so_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THREEFOLD_DATA", str(tmp_path))
    assert main(["save_share", "--quick"]) == 2
    assert "THREEFOLD_DATA" in capsys.readouterr().err


# -- what is measured --------------------------------------------------------------------------------------------------


def test_every_character_but_the_first_is_predicted_once() -> None:
    seen: list[tuple[int, ...]] = []

    def logits(x: torch.Tensor) -> torch.Tensor:
        seen.extend(tuple(row.tolist()) for row in x)
        return torch.zeros(*x.shape, 40)

    ids = torch.arange(30)
    assert score.whole_loss(logits, ids, 8) == pytest.approx(math.log(40))
    assert [i for row in seen for i in row] == list(range(29)), "the inputs of all windows, one after another"
    assert [len(row) for row in seen] == [8, 8, 8, 5]


def test_the_windows_of_the_exact_loss_do_not_overlap() -> None:
    """A model that looks two characters back is lost at the first place of each window, and nowhere else."""
    ids = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 0])  # each differs from the one two places before

    def logits(x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*x.shape, 2)
        found[:, 1:] = 50.0 * torch.nn.functional.one_hot(1 - x[:, :-1], 2)
        return found

    assert score.whole_loss(logits, ids, 4) == pytest.approx(2 / 8 * math.log(2), abs=1e-6)


def test_the_control_is_the_published_shape_and_schedule() -> None:
    s = control.Settings()
    assert sum(p.numel() for p in control.Control(65, s).parameters()) == 804_096
    assert control.rate(0, s) == pytest.approx(1e-3 / 101)
    assert control.rate(100, s) == pytest.approx(1e-3)
    assert control.rate(1050, s) == pytest.approx(5.5e-4)
    assert control.rate(2000, s) == pytest.approx(1e-4)


def test_a_control_is_scored_as_it_was_trained(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question\n" * 20
    s = control.Settings(layers=1, heads=2, width=16, context=8, batch=2, steps=4, warmup=2, evaluate_every=2, evaluation_batches=1)
    model, chars, seen = control.train(text, s)
    control.save(tmp_path, model, chars, s)
    found = score.score_control(tmp_path, texts.halves(text)[1])
    assert [step for step, *_ in seen["evaluations"]] == [0, 2, 4]
    index = {char: number for number, char in enumerate(chars)}
    ids = torch.tensor([index[char] for char in texts.halves(text)[1]])
    assert found["loss"] == pytest.approx(score.whole_loss(model.eval(), ids, 8))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_saves_are_read_from_the_log() -> None:
    """Steps of a second; saves of half a second after steps 3 and 6; the save at the end does not count."""
    times = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.5, 5: 5.5, 6: 6.5, 7: 8.0, 8: 9.0}
    lines: list[dict[str, Any]] = []
    for step, seconds in times.items():
        lines.append({"step": step, "loss": 2.0, "seconds": seconds})
        if step in (3, 6, 8):
            lines.append({"event": "saved", "step": step, "seconds": 0.5})
    found = save_share.saves(lines)
    assert [m["step"] for m in found] == [3, 6]
    assert [m["interval"] for m in found] == pytest.approx([2.5, 3.5])
    assert [m["gap"] for m in found] == pytest.approx([0.5, 0.5])
    assert found[1]["share"] == pytest.approx(0.5 / 3.5)


def test_a_step_in_the_log_is_told_from_an_event(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert not startup.has_step(log)
    log.write_text(json.dumps({"event": "start", "step": 0}) + "\n" + json.dumps({"step": 1, "loss": 4.1}))
    assert not startup.has_step(log), "the line is not whole yet"
    with open(log, "a") as file:
        file.write("\n")
    assert startup.has_step(log)


def test_texts_are_clean_and_the_held_out_part_is_the_last_tenth(tmp_path: Path) -> None:
    text = texts.clean("\ufeffe\u0301\r\nx\x00\ty\rz")
    assert text == "\u00e9\nx\ty\nz"
    assert texts.halves("0123456789") == ("012345678", "9")
    python = texts.text_file("python", tmp_path, quick=True)
    assert len(texts.read(python)) == texts.QUICK_CHARACTERS


def test_reviews_are_the_documents_of_the_file(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared_data("nsmc/ratings_train.txt")
    rows = tmp_path / "rows.txt"
    with open(path, encoding="utf-8") as file:
        rows.write_text("".join(next(file) for _ in range(4)), encoding="utf-8")
    assert [document[:3] for document in texts.reviews(rows)] == ["아 더", "흠..", "너무재"]


def test_a_foundation_is_trained_once_for_each_text_flag_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def trained(command: Any) -> tuple[float, str]:
        calls.append([str(word) for word in command])
        run = Path(calls[-1][calls[-1].index("--out") + 1])
        (run / "checkpoints").mkdir(parents=True)
        (run / "model").mkdir()
        return 12.34, ""
    monkeypatch.setattr(foundations, "timed", trained)
    text, flags = tmp_path / "books.jsonl", {"--objective": "masked", "--budget": "20min"}
    first = foundations.foundation([text], flags, 0, tmp_path / "kept")
    assert first.seconds == 12.3 and (first.run / "model").is_dir() and not (first.run / "checkpoints").exists()
    assert foundations.foundation([text], dict(reversed(flags.items())), 0, tmp_path / "kept") == first and len(calls) == 1
    for other, seed in ((flags, 1), ({**flags, "--budget": "8min"}, 0)):
        assert foundations.foundation([text], other, seed, tmp_path / "kept").run != first.run
    assert len(calls) == 3
