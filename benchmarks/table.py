"""The stored results as Markdown: what the README shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Measure, Result

COLUMNS = ("measure", "peer, same run", "threefold", "compared", "must", "aim", "")


def head(facts: dict[str, Any], controls: dict[str, Any], versions: dict[str, Any]) -> str:
    """The machine, its controls and the versions, in three lines."""
    float32, bfloat16, memory = _controls(controls)
    sizes = " / ".join(controls["matmul_float32_gflops"])
    lines = (
        f"{_place(facts)}, load {facts['load']}",
        f"matrix products of {sizes}: float32 {float32}, bfloat16 {bfloat16} GFLOP/s; memory reads {memory} GB/s",
        f"{_packages(versions)}, commit {versions['commit']}",
    )
    return "\n".join(lines)


def stored(folder: Path) -> list[Result]:
    """All results in a folder, by name."""
    return [Result.load(path) for path in sorted(folder.glob("*.json"))]


def markdown(results: Iterable[Result], measures: Sequence[Measure]) -> str:
    """One table over all results, in the order of the measures."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for measure, result in _paired(results, measures):
        for row in measure.rows(result):
            measure_words = row.measure + " (quick)" * result.quick
            verdict = "means nothing" if result.quick else row.verdict
            lines.append(_line([measure_words, row.peer, row.threefold, row.compared, *row.limits, verdict]))
    return "\n".join(lines)


def details(results: Iterable[Result], measures: Sequence[Measure]) -> str:
    """The tables that single measures add, with a heading each."""
    found = ((result.name, measure.details(result)) for measure, result in _paired(results, measures))
    return "\n\n".join(f"**{name}**\n\n{text}" for name, text in found if text)


def grid(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([_line(columns), _line(["---"] * len(columns)), *(_line(line) for line in lines)])


def document(results: Sequence[Result], measures: Sequence[Measure]) -> str:
    """The whole: the table, the details, and the machines with their controls at the time of each result."""
    if not results:
        return "No results are stored; `python -m benchmarks` makes them."
    lines = [
        (
            result.name,
            result.made[:10],
            str(result.machine["load"]),
            *_controls(result.controls),
            str(result.versions["commit"]),
        )
        for _, result in _paired(results, measures)
    ]
    columns = ("result", "day", "load before", "float32, GFLOP/s", "bfloat16, GFLOP/s", "memory, GB/s", "commit")
    places = list(dict.fromkeys(f"{_place(r.machine)}; {_packages(r.versions)}" for _, r in _paired(results, measures)))
    parts = [
        markdown(results, measures),
        details(results, measures),
        "**controls of each result**",
        grid(columns, lines),
        *places,
    ]
    return "\n\n".join(part for part in parts if part)


def _place(facts: dict[str, Any]) -> str:
    memory = f"{facts['memory_gib']} GiB" if facts.get("memory_gib") else "memory unknown"
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {memory}, {facts['system']}"


def _packages(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "commit")


def _controls(controls: dict[str, Any]) -> tuple[str, str, str]:
    """Matrix products in float32 and bfloat16, by size, and memory reads."""
    products = [" / ".join(f"{speed:,.0f}" for speed in controls[f"matmul_{dtype}_gflops"].values()) for dtype in ("float32", "bfloat16")]
    return products[0], products[1], str(controls["memory_read_gbs"])


def _paired(results: Iterable[Result], measures: Sequence[Measure]) -> list[tuple[Measure, Result]]:
    found = list(results)
    return [(measure, result) for measure in measures for result in found if result.measure == measure.name]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
