"""What checkpoints cost: the share of time that goes into saving once a minute, with the 10.6M-parameter recipe.

    python -m benchmarks.save_share

6 layers, width 384, context 256, 64 rows: the shape of nanoGPT's larger character recipe, on tiny Shakespeare for some
minutes with a save every minute. Decisions:
- The log's own events are read: `saved` with `seconds`, and the `seconds` since the start that every step line has.
- A measurement is one save: its seconds over the time from the save before it (or the first step) to its end.
- As a check that does not trust the event, the gap in the log at the save, less the median gap, is kept too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from typing import Any

from benchmarks.harness import (
    THREEFOLD,
    BenchmarkError,
    Findings,
    Measure,
    Measurement,
    Result,
    Row,
    main,
    say,
    timed,
    work_folder,
)
from benchmarks.texts import text_file

SIZE, CONTEXT, ROWS, EVERY = "10.6M", 256, 64, 60.0
QUICK = ("200k", 64, 4, 1.0)
MUST, AIM = 0.02, 0.005


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measure."""
    parser.add_argument("--family", default="qwen3", help="architecture (default qwen3)")
    parser.add_argument("--size", help=f"parameters (default {SIZE})")


def run(options: argparse.Namespace) -> Findings:
    """One run that is long enough for `--repeats` saves."""
    size, context, batch, every = QUICK if options.quick else (SIZE, CONTEXT, ROWS, EVERY)
    size = options.size or size
    budget = every * (options.repeats + 1) + (10 if options.quick else 0)
    with work_folder() as folder:
        data, out = text_file("shakespeare", folder, quick=options.quick), folder / "run"
        flags = [
            "--tokenizer",
            "char",
            "--family",
            options.family,
            "--size",
            size,
            "--context",
            str(context),
            "--batch-tokens",
            str(context * batch),
            "--budget",
            f"{budget}s",
            "--train.save_seconds",
            str(every),
        ]
        wall, _ = timed([*THREEFOLD, "pretrain", "--data", data, "--out", out, *flags])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        config = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
        size_on_disk = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
        checkpoints = max(1, len(list((out / "checkpoints").iterdir())))
    measurements = saves(lines)
    if not measurements:
        raise BenchmarkError("the log has no `saved` events with `seconds`: there is nothing to measure")
    for m in measurements:
        say(f"  step {m['step']}: {m['seconds']:.3f} s of {m['interval']:.1f} s")
    parameters = next((line["parameters"] for line in lines if line.get("event") == "start"), None)
    return Findings(
        name="save_share",
        measurements=measurements,
        settings={
            "flags": flags,
            "wall": wall,
            "parameters": parameters,
            "shape": config,
            "bytes_of_a_checkpoint": size_on_disk // checkpoints,
            "seconds_per_step": statistics.median(gaps(lines).values()),
        },
    )


def saves(lines: list[dict[str, Any]]) -> list[Measurement]:
    """Every save that was due by the clock: its seconds, the interval it closes, and the gap it left in the log.

    The save at the end of training is left out: it is part of the result and not of the upkeep.
    """
    steps = {int(line["step"]): float(line["seconds"]) for line in lines if "event" not in line and "seconds" in line}
    between = gaps(lines)
    if not between:
        return []
    usual = statistics.median(between.values())
    found: list[Measurement] = []
    end_of_last = min(steps.values())
    for line in lines:
        step = int(line.get("step", -1))
        if line.get("event") != "saved" or step not in steps or step >= max(steps):
            continue
        seconds = float(line["seconds"])
        end = steps[step] + seconds
        if end > end_of_last:
            found.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "interval": end - end_of_last,
                    "share": seconds / (end - end_of_last),
                    "gap": between[step] - usual if step in between else None,
                }
            )
            end_of_last = end
    return found


def gaps(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds from the line of a step to the line of the next, by the earlier step."""
    steps = sorted((int(line["step"]), float(line["seconds"])) for line in lines if "event" not in line and "seconds" in line)
    return {a: at_b - at_a for (a, at_a), (b, at_b) in itertools.pairwise(steps) if b == a + 1}


def rows(result: Result) -> list[Row]:
    """One line."""
    share, seconds = result.spread("share"), result.spread("seconds")
    percent = f"{100 * share.median:.2f} % ({100 * share.low:.2f} to {100 * share.high:.2f})"
    parameters = result.settings["parameters"]
    size = f"{parameters / 1e6:.1f}M parameters" if parameters else "10.6M recipe"
    return [
        Row(
            measure=f"share of time in saves, one a minute, {size}",
            threefold=f"{percent}; a save of {result.settings['bytes_of_a_checkpoint'] / 1e6:.0f} MB: {seconds.words('s', 3)}",
            value=share.median,
            must=MUST,
            aim=AIM,
            limits=("2 %", "0.5 %"),
        )
    ]


MEASURE = Measure(
    name="save_share",
    summary="share of time in checkpoints, one a minute",
    repeats=5,
    run=run,
    rows=rows,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(MEASURE))
