"""Wall time to a loss: `threefold pretrain` within a budget against nanoGPT's published CPU recipe, on the same text.

    python -m benchmarks.time_to_loss --data-set shakespeare|nsmc|python

Both sides start as new processes and end with a saved model; the clock runs around the process. threefold gets no flag
but data, tokenizer and budget, and budgets that are shares of the median of the controls so far. Every model is then read
by another process, off the clock, that takes its exact loss over the whole held-out tenth (score.py).

Decisions:
- The control is given the threads and the implementation of AdamW that are fastest here, found before (60 steps each).
- The target is 1.898 nats per character on tiny Shakespeare, where the control's figure is known; elsewhere it is the
  median of what the control reaches in this run.
- A loss at equal time counts only where the time was equal, within what a budget may overshoot.
- "Reaches" means that the median loss of the repetitions does; how many of them did stands in the details.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.harness import (
    THREEFOLD,
    Findings,
    Measure,
    Measurement,
    Result,
    Row,
    Spread,
    as_fraction,
    json_of,
    main,
    rounds,
    say,
    timed,
    work_folder,
)
from benchmarks.table import grid
from benchmarks.texts import DATA_SETS, text_file

BUDGETS = "1/10,1/8,1/6,1/4,1/3,1"
KNOWN_TARGETS = {"shakespeare": 1.898}
RATIOS = {"shakespeare": ("1/4", "1/10")}  # must and aim
OTHER_RATIOS = ("1/3", "1/8")
TUNING_STEPS, QUICK_STEPS, LEAST_BUDGET = 60, 20, 8.0
OVERSHOOT_SECONDS, OVERSHOOT_SHARE = 2.0, 0.03  # what `--budget` promises


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measure."""
    parser.add_argument("--data-set", choices=DATA_SETS, default="shakespeare")
    parser.add_argument("--budgets", default=BUDGETS, metavar="A/B,...", help=f"shares of the control's wall time (default {BUDGETS})")
    parser.add_argument("--vary-seed", action="store_true", help="hand `--seed REPETITION` to threefold, the one flag more")


def run(options: argparse.Namespace) -> Findings:
    """The control and every budget in turns; a budget is a share of what the controls took so far (their median)."""
    quick, data_set = options.quick, options.data_set
    budgets = ["1"] if quick else [str(Fraction(share)) for share in options.budgets.split(",")]
    steps = QUICK_STEPS if quick else None
    measurements: list[Measurement] = []
    used: dict[str, Any] = {}
    with work_folder() as folder:
        data, out = text_file(data_set, folder, quick=quick), folder / "out"
        tuned, tried = tune(data, TUNING_STEPS // 20 if quick else TUNING_STEPS)
        say(f"control: {tuned['adamw']} AdamW, {tuned['threads']} threads")
        for one in tried:
            say(f"  tried {one['adamw']}, {one['threads']} threads: {one['ms_per_step']} ms a step")
        for repetition, side in rounds(options.repeats, ["control", *budgets]):
            if side == "control":
                found, used = run_control(data, out, tuned, seed=1337 + repetition, steps=steps)
            else:
                control = Spread.of(m["seconds"] for m in measurements if m["side"] == "control").median
                budget = round(max(LEAST_BUDGET if quick else 0.0, float(Fraction(side)) * control), 2)
                found = run_threefold(data, out, budget, seed=repetition if options.vary_seed else None)
            shutil.rmtree(out)
            name = "control" if side == "control" else "threefold"
            measurements.append({"side": name, "share": side, "repetition": repetition, **found})
            say(f"  {repetition + 1}/{options.repeats} {side}: {found['seconds']:.2f} s, {found['loss']:.4f} nats per character")
    settings = {
        "data_set": data_set,
        "budgets": budgets,
        "control": {name: value for name, value in used.items() if name != "seed"},
        "control_tried": tried,
        "vary_seed": options.vary_seed,
        "command": "threefold pretrain --data FILE --tokenizer char --budget SECONDS --out RUN",
    }
    return Findings(name=f"time_to_loss-{data_set}", settings=settings, measurements=measurements)


def tune(data: Path, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The control's fastest settings on this machine, and all that were tried."""
    tried = []
    for threads in sorted({1, machine.usable_cores()}):
        for adamw in ("for-loop", "foreach", "fused"):
            asked = {"threads": threads, "adamw": adamw}
            _, found = json_of([*control_command(data, asked, steps=steps), "--no-evaluations"])
            tried.append(asked | {"ms_per_step": round(1000 * found["seconds_per_step"], 3)})
    best = min(tried, key=lambda one: float(one["ms_per_step"]))
    return {"threads": best["threads"], "adamw": best["adamw"]}, tried


def control_command(data: Path, tuned: dict[str, Any], *, steps: int | None) -> list[str | Path]:
    """The control as a process; `steps` None is what is published."""
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.control", "--json", "--data", data]
    command += ["--threads", str(tuned["threads"]), "--adamw", tuned["adamw"]]
    return command if steps is None else [*command, "--steps", str(steps)]


def run_control(data: Path, out: Path, tuned: dict[str, Any], *, seed: int, steps: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """One control: what was measured, and its settings as it printed them."""
    seconds, found = json_of([*control_command(data, tuned, steps=steps), "--seed", str(seed), "--out", out])
    return {"seconds": seconds, **score("control", out, data), "sampled": found["evaluations"]}, found["settings"]


def run_threefold(data: Path, out: Path, budget: float, *, seed: int | None) -> dict[str, Any]:
    """One `threefold pretrain`: wall seconds, exact loss as transformers has it, and the run's own last figure."""
    command: list[str | Path] = [*THREEFOLD, "pretrain", "--data", data, "--tokenizer", "char", "--budget", f"{budget}s", "--out", out]
    seconds, _ = timed(command if seed is None else [*command, "--seed", str(seed)])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [line["val_loss"] for line in lines if line.get("event") == "evaluation"]
    found = {"budget": budget, "seconds": seconds, **score("threefold", out / "model", data)}
    return found | {"own_loss": own[-1] if own else None}


def score(kind: str, model: Path, data: Path) -> dict[str, Any]:
    """The exact loss, from another process."""
    return json_of([sys.executable, "-m", "benchmarks.score", kind, model, "--data", data])[1]


# -- showing -----------------------------------------------------------------------------------------------------------


def target(result: Result) -> float:
    """The loss to be reached, in nats per character."""
    known = KNOWN_TARGETS.get(result.settings["data_set"])
    return result.spread("loss", side="control").median if known is None or result.quick else known


def first_to_reach(result: Result) -> str | None:
    """The share with the smallest wall time among those whose median loss reaches the target."""
    aimed = target(result)
    reached = [share for share in result.settings["budgets"] if result.spread("loss", share=share).median <= aimed]
    return min(reached, key=lambda share: result.spread("seconds", share=share).median, default=None)


def rows(result: Result) -> list[Row]:
    """Time to the target, and the loss at equal time."""
    return [time_row(result), *([equal_row(result)] if "1" in result.settings["budgets"] else [])]


def time_row(result: Result) -> Row:
    """The smallest wall time that reaches the target, over the control's."""
    data_set, share = result.settings["data_set"], first_to_reach(result)
    control, control_loss = result.spread("seconds", side="control"), result.spread("loss", side="control")
    must, aim = RATIOS.get(data_set, OTHER_RATIOS)
    if share is None:
        losses = (result.spread("loss", share=share) for share in result.settings["budgets"])
        ours = f"not reached; at best {min(losses, key=lambda loss: loss.median).words(digits=3)}"
        ratio = None
    else:
        wall, loss = result.spread("seconds", share=share), result.spread("loss", share=share)
        ours, ratio = f"{wall.words('s', 1)}, at {loss.words(digits=3)}", wall.median / control.median
    return Row(
        measure=f"wall time to {target(result):.3f} nats/char, {data_set}",
        peer=f"{control.words('s', 1)}, at {control_loss.words(digits=3)}",
        threefold=ours,
        compared="-" if ratio is None else as_fraction(ratio),
        value=ratio,
        must=float(Fraction(must)),
        aim=float(Fraction(aim)),
        limits=(must, aim),
    )


def equal_row(result: Result) -> Row:
    """The loss after the control's time. A run that took longer than a budget may overshoot is no comparison."""
    data_set = result.settings["data_set"]
    control, control_loss = result.spread("seconds", side="control"), result.spread("loss", side="control")
    wall, loss = result.spread("seconds", share="1"), result.spread("loss", share="1")
    equal = wall.median <= control.median + max(OVERSHOOT_SECONDS, OVERSHOOT_SHARE * control.median)
    known = data_set in KNOWN_TARGETS
    difference = f"{loss.median - control_loss.median:+.3f}"
    return Row(
        measure=f"nats/char after the control's time, {data_set}",
        peer=f"{control_loss.words(digits=3)}, after {control.words('s', 1)}",
        threefold=f"{loss.words(digits=3)}, after {wall.words('s', 1)}",
        compared=difference if equal else f"{difference}, in {wall.median / control.median:.2f} of the time",
        value=loss.median if equal else None,
        must=1.65 if known else control_loss.median,
        aim=1.50 if known else None,
        limits=("<= 1.65", "<= 1.50") if known else ("lower", "-"),
    )


def details(result: Result) -> str:
    """What every budget bought."""
    aimed, control = target(result), result.spread("seconds", side="control")
    lines = []
    for share in ["control", *sorted(result.settings["budgets"], key=Fraction)]:
        wall, losses = result.spread("seconds", share=share), result.values("loss", share=share)
        budgets = result.values("budget", share=share)
        shape = next(m for m in result.measurements if m["share"] == share)
        line = (
            share,
            Spread.of(budgets).words("s", 1) if budgets else "-",
            wall.words("s", 1),
            as_fraction(wall.median / control.median),
            Spread.of(losses).words(digits=4),
            f"{sum(loss <= aimed for loss in losses)} of {len(losses)}",
            f"{shape['parameters']:,}",
            str(shape["context"]),
        )
        lines.append(line)
    reached = f"<= {aimed:.3f}"
    columns = ("share", "budget", "wall", "ratio", "nats/char", reached, "parameters", "context")
    notes = [f"The control: {', '.join(f'{name} {value}' for name, value in result.settings['control'].items())}."]
    if unknown := max(result.values("unknown")):
        notes.append(f"Up to {unknown:.0f} held-out characters are unknown to the tokenizer and count as `<|unk|>`.")
    if apart := [abs(m["own_loss"] - m["loss"]) for m in result.measurements if m.get("own_loss") is not None]:
        notes.append(f"The runs' own last figures lie within {max(apart):.1g} of these.")
    return f"{grid(columns, lines)}\n\n{' '.join(notes)}"


MEASURE = Measure(
    name="time_to_loss",
    summary="wall time to a loss, against nanoGPT's published CPU recipe",
    repeats=5,
    run=run,
    rows=rows,
    details=details,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(MEASURE))
