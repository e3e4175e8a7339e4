"""How long `threefold --help` takes, beside a Python that does nothing.

python -m benchmarks.help_time
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.harness import THREEFOLD, Findings, Measure, Result, Row, main, rounds, say, timed

MUST, AIM = 0.3, 0.15
INSTALLED = Path(sys.executable).parent / "threefold"
HELP = ((str(INSTALLED),) if INSTALLED.is_file() else THREEFOLD) + ("--help",)
SIDES = {"python -c pass": (sys.executable, "-c", "pass"), "threefold --help": HELP}


def run(options: argparse.Namespace) -> Findings:
    """Both in turns, after a first run of each that fills the caches."""
    measurements = []
    for side in SIDES:
        timed(SIDES[side])
    for repetition, side in rounds(options.repeats, list(SIDES)):
        measurements.append({"side": side, "repetition": repetition, "seconds": timed(SIDES[side])[0]})
    say("  measured: " + ", ".join(f"{side} x {options.repeats}" for side in SIDES))
    return Findings(
        name="help_time",
        settings={"commands": {side: [Path(words[0]).name, *words[1:]] for side, words in SIDES.items()}},
        measurements=measurements,
    )


def rows(result: Result) -> list[Row]:
    """One line."""
    ours, python = result.spread("seconds", side="threefold --help"), result.spread("seconds", side="python -c pass")
    return [
        Row(
            measure="`threefold --help`",
            peer=f"`python -c pass`: {python.words('s', 3)}",
            threefold=ours.words("s", 3),
            compared=f"{ours.median - python.median:+.3f} s",
            value=ours.median,
            must=MUST,
            aim=AIM,
            limits=(f"{MUST} s", f"{AIM} s"),
        )
    ]


MEASURE = Measure(name="help_time", summary="wall time of `threefold --help`", repeats=20, run=run, rows=rows)

if __name__ == "__main__":
    sys.exit(main(MEASURE))
