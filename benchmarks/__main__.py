"""`python -m benchmarks`: all measures or some, and the table of what is stored."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import help_time, packing, save_share, startup, time_to_loss, tuning_speed
from benchmarks.harness import RESULTS, Measure, add_common_arguments, guarded, perform, say
from benchmarks.table import document, stored
from benchmarks.texts import DATA_SETS

MEASURES: tuple[Measure, ...] = (
    time_to_loss.MEASURE,
    save_share.MEASURE,
    startup.MEASURE,
    help_time.MEASURE,
    packing.MEASURE,
    tuning_speed.MEASURE,
)
SHORT_FIRST = ("help_time", "startup", "packing", "save_share", "tuning_speed", "time_to_loss")


def main(arguments: Sequence[str] | None = None) -> int:
    """The worst exit code of what was run: 2 where data was absent, 1 where something failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["table"]:
        parser = argparse.ArgumentParser(prog="python -m benchmarks table", description="the stored results as Markdown")
        parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
        print(document(stored(parser.parse_args(words[1:]).results), MEASURES))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog="`table` prints the stored results")
    parser.add_argument("measure", nargs="*", metavar="MEASURE", help=f"of {', '.join(SHORT_FIRST)}; all where none is named")
    add_common_arguments(parser)
    parser.add_argument("--data-set", choices=DATA_SETS, help="of time_to_loss; all three where it is not given")
    parser.add_argument("--budgets", default=time_to_loss.BUDGETS, metavar="A/B,...", help="of time_to_loss")
    options = parser.parse_args(words)
    if unknown := [name for name in options.measure if name not in SHORT_FIRST]:
        parser.error(f"unknown measure `{unknown[0]}`, expected one of {', '.join(SHORT_FIRST)}")
    measures = {measure.name: measure for measure in MEASURES}
    worst = 0
    for name in SHORT_FIRST:
        if options.measure and name not in options.measure:
            continue
        for chosen in _parts(name, options):
            worst = max(worst, _one(measures[name], options, chosen))
    if not options.quick and not options.measure:
        print(document(stored(options.results or RESULTS), MEASURES))
    return worst


def _parts(name: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """The flags of a measure's own, once for each result that it stores."""
    if name == "time_to_loss":
        return [{"data_set": chosen, "budgets": options.budgets} for chosen in ([options.data_set] if options.data_set else DATA_SETS)]
    return [{"case": case} for case in tuning_speed.CASES] if name == "tuning_speed" else [{}]


def _one(measure: Measure, options: argparse.Namespace, chosen: dict[str, str]) -> int:
    """One measure with its own defaults, the common flags and its own handed on."""
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    measure.arguments(parser)
    values = parser.parse_args([])
    for name in ("repeats", "quick", "results"):
        setattr(values, name, getattr(options, name))
    for name, value in chosen.items():
        setattr(values, name, value)
    code = guarded(lambda: perform(measure, values))
    if code:
        say(f"`{measure.name}` was not measured\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
