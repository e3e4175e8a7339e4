"""Wall time to a loss: `threefold pretrain` within a budget against nanoGPT's published CPU recipe, on the same text.

    python -m benchmarks.time_to_loss --data-set shakespeare|nsmc|python

Both sides start as new processes and end with a saved model; the clock runs around the process. threefold gets no flag
but data, tokenizer and budget, and budgets that are shares of what the control took at first. Every model is then read
by another process, off the clock, that takes its exact loss over the whole held-out tenth (score.py).

Decisions:
- The control is given the threads and the implementation of AdamW that are fastest here, found before (60 steps each).
- The target is 1.898 nats per character on tiny Shakespeare, where the control's figure is known; elsewhere it is the
  median of what the control reaches in this run.
- "Reaches" means that the median loss of the repetitions does; how many of them did stands in the details.
"""

from __future__ import annotations

import argparse
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
    workplace,
)
from benchmarks.table import grid
from benchmarks.texts import DATA_SETS, text_file

BUDGETS = "1/10,1/8,1/6,1/4,1/3,1"
KNOWN_TARGETS = {"shakespeare": 1.898}
RATIOS = {"shakespeare": ("1/4", "1/10")}  # must and aim
OTHER_RATIOS = ("1/3", "1/8")
TUNING_STEPS, QUICK_STEPS, LEAST_BUDGET = 60, 20, 6.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measure."""
    parser.add_argument("--data-set", choices=DATA_SETS, default="shakespeare")
    parser.add_argument(
        "--budgets", default=BUDGETS, metavar="A/B,...", help=f"shares of the control's wall time (default {BUDGETS})"
    )
    parser.add_argument(
        "--vary-seed", action="store_true", help="hand `--seed REPETITION` to threefold, the one flag more"
    )


def run(options: argparse.Namespace) -> Findings:
    """The control and every budget in turns, after a first control that sets the budgets."""
    quick, data_set = options.quick, options.data_set
    budgets = ["1"] if quick else [str(Fraction(share)) for share in options.budgets.split(",")]
    steps = QUICK_STEPS if quick else None
    with workplace() as folder:
        data = text_file(data_set, folder, quick=quick)
        tuned, tried = ({"threads": 0, "adamw": "for-loop"}, []) if quick else tune(data)
        say(
            f"control: {tuned['adamw']} AdamW, {tuned['threads'] or 'own choice of'} threads"
            + "".join(f"\n  tried {t['adamw']}, {t['threads']} threads: {t['ms_per_step']} ms a step" for t in tried)
        )
        first = run_control(data, folder / "first", tuned, seed=1336, steps=steps)
        settings = {
            "data_set": data_set,
            "budgets": budgets,
            "first_control_seconds": first["seconds"],
            "control": first.pop("settings"),
            "control_tried": tried,
            "vary_seed": options.vary_seed,
            "command": "threefold pretrain --data FILE --tokenizer char --budget SECONDS --out RUN",
        }
        measurements: list[Measurement] = []
        for repetition, side in rounds(options.repeats, ["control", *budgets]):
            out = folder / "out"
            if side == "control":
                found = run_control(data, out, tuned, seed=1337 + repetition, steps=steps)
                found.pop("settings")
            else:
                seconds = max(LEAST_BUDGET if quick else 0.0, float(Fraction(side)) * first["seconds"])
                found = run_threefold(data, out, round(seconds, 2), seed=repetition if options.vary_seed else None)
            shutil.rmtree(out)
            measurements.append(
                {
                    "side": "control" if side == "control" else "threefold",
                    "share": side,
                    "repetition": repetition,
                    **found,
                }
            )
            say(
                f"  {repetition + 1}/{options.repeats} {side if side == 'control' else 'threefold, ' + side}: "
                f"{found['seconds']:.2f} s, {found['loss']:.4f} nats per character"
            )
    return Findings(name=f"time_to_loss-{data_set}", settings=settings, measurements=measurements)


def tune(data: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The control's fastest settings on this machine, and all that were tried."""
    tried = []
    for threads in sorted({1, machine.usable_cores()}):
        for adamw in ("for-loop", "foreach", "fused"):
            _, found = json_of(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.control",
                    "--data",
                    data,
                    "--json",
                    "--no-evaluations",
                    "--steps",
                    str(TUNING_STEPS),
                    "--threads",
                    str(threads),
                    "--adamw",
                    adamw,
                ]
            )
            tried.append(
                {"threads": threads, "adamw": adamw, "ms_per_step": round(1000 * found["seconds_per_step"], 3)}
            )
    best = min(tried, key=lambda one: float(one["ms_per_step"]))
    return {"threads": best["threads"], "adamw": best["adamw"]}, tried


def run_control(data: Path, out: Path, tuned: dict[str, Any], *, seed: int, steps: int | None) -> dict[str, Any]:
    """One control: wall seconds, exact loss, and its settings as it printed them."""
    seconds, found = json_of(
        [
            sys.executable,
            "-m",
            "benchmarks.control",
            "--data",
            data,
            "--out",
            out,
            "--json",
            "--seed",
            str(seed),
            "--threads",
            str(tuned["threads"]),
            "--adamw",
            tuned["adamw"],
            *(["--steps", str(steps)] if steps else []),
        ]
    )
    return {
        "seconds": seconds,
        **score("control", out, data),
        "sampled": found["evaluations"],
        "settings": found["settings"],
    }


def run_threefold(data: Path, out: Path, budget: float, *, seed: int | None) -> dict[str, Any]:
    """One `threefold pretrain`: wall seconds, exact loss as transformers has it."""
    extra = [] if seed is None else ["--seed", str(seed)]
    seconds, _ = timed(
        [*THREEFOLD, "pretrain", "--data", data, "--tokenizer", "char", "--budget", f"{budget}s", "--out", out, *extra]
    )
    return {"budget": budget, "seconds": seconds, **score("threefold", out / "model", data)}


def score(kind: str, model: Path, data: Path) -> dict[str, Any]:
    """The exact loss, from another process."""
    return json_of([sys.executable, "-m", "benchmarks.score", kind, model, "--data", data])[1]


# -- showing -----------------------------------------------------------------------------------------------------------


def target(result: Result) -> float:
    """The loss to be reached, in nats per character."""
    known = KNOWN_TARGETS.get(result.settings["data_set"])
    return result.spread("loss", side="control").median if known is None or result.quick else known


def first_to_reach(result: Result) -> str | None:
    """The smallest share whose median loss reaches the target."""
    reached = [
        share for share in result.settings["budgets"] if result.spread("loss", share=share).median <= target(result)
    ]
    return min(reached, key=Fraction, default=None)


def rows(result: Result) -> list[Row]:
    """Time to the target, and the loss at equal time."""
    data_set, aimed = result.settings["data_set"], target(result)
    control = result.spread("seconds", side="control")
    control_loss = result.spread("loss", side="control")
    must, aim = RATIOS.get(data_set, OTHER_RATIOS)
    share = first_to_reach(result)
    found = []
    if share is None:
        nearest = min(
            (result.spread("loss", share=s) for s in result.settings["budgets"]), key=lambda spread: spread.median
        )
        ours, ratio = f"not reached; at best {nearest.words(digits=3)}", None
    else:
        wall = result.spread("seconds", share=share)
        ours, ratio = (
            f"{wall.words('s', 1)}, at {result.spread('loss', share=share).words(digits=3)}",
            wall.median / control.median,
        )
    found.append(
        Row(
            measure=f"wall time to {aimed:.3f} nats/char, {data_set}",
            peer=f"{control.words('s', 1)}, at {control_loss.words(digits=3)}",
            threefold=ours,
            compared="-" if ratio is None else as_fraction(ratio),
            value=ratio,
            must=float(Fraction(must)),
            aim=float(Fraction(aim)),
            limits=(must, aim),
        )
    )
    if "1" in result.settings["budgets"]:
        loss, wall = result.spread("loss", share="1"), result.spread("seconds", share="1")
        known = data_set in KNOWN_TARGETS
        found.append(
            Row(
                measure=f"nats/char after the control's time, {data_set}",
                peer=control_loss.words(digits=3),
                threefold=f"{loss.words(digits=3)}, after {wall.words('s', 1)}",
                compared=f"{loss.median - control_loss.median:+.3f}",
                value=loss.median,
                must=1.65 if known else control_loss.median,
                aim=1.50 if known else None,
                limits=("<= 1.65", "<= 1.50") if known else ("lower", "-"),
            )
        )
    return found


def details(result: Result) -> str:
    """What every budget bought."""
    aimed, control = target(result), result.spread("seconds", side="control")
    lines = []
    for share in ["control", *sorted(result.settings["budgets"], key=Fraction)]:
        wall = result.spread("seconds", share=share)
        losses = result.values("loss", share=share)
        budgets = result.values("budget", share=share)
        shape = next(m for m in result.measurements if m["share"] == share)
        lines.append(
            (
                share,
                f"{Spread.of(budgets).median:.1f} s" if budgets else "-",
                wall.words("s", 1),
                as_fraction(wall.median / control.median),
                Spread.of(losses).words(digits=4),
                f"{sum(loss <= aimed for loss in losses)} of {len(losses)}",
                f"{shape['parameters']:,}",
                str(shape["context"]),
            )
        )
    columns = (
        "share of the control's time",
        "budget",
        "wall",
        "ratio",
        "nats/char",
        f"<= {aimed:.3f}",
        "parameters",
        "context",
    )
    unknown = max(result.values("unknown"))
    note = (
        ""
        if not unknown
        else f"\n\nUp to {unknown:.0f} held-out characters are unknown to threefold's tokenizer and count as `<|unk|>`."
    )
    c = result.settings["control"]
    control_words = ", ".join(f"{key} {value}" for key, value in c.items())
    return f"{grid(columns, lines)}\n\nThe control: {control_words}.{note}"


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
