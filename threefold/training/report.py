"""`report.html`: what a run did, from its log and its files alone. One page, inline SVG, no JavaScript, no request.

Decisions:
- The page is a pure function of RUN/log.jsonl, RUN/recipe.toml and RUN/model, so `threefold report RUN` makes it again
  at any time.
- Curves are thinned to about 400 points by taking the median of each stretch: outliers are named in the events, not in
  the line.
- All text of the run is escaped: a sample is data, also when a model writes `<script>`.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threefold import files
from threefold.training.log import Line, RunLog, is_last_evaluation

Point = tuple[float, float]
POINTS = 400
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 52, 28, 12

STYLE = """
:root{--ink:#1b1f24;--soft:#5b6470;--line:#d8dde3;--page:#fff;--card:#f6f8fa;--a:#1f6feb;--b:#d9730d;--c:#2da44e}
@media(prefers-color-scheme:dark){
:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;--page:#0d1117;--card:#161b22;--a:#58a6ff;--b:#f0883e;--c:#3fb950}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:780px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 10px}
p.lead{color:var(--soft);margin:0 0 20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:21px}
.tile span,.k{color:var(--soft);font-size:13px}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{border-bottom:1px solid var(--line);padding:5px 8px;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:13px;margin:8px 0}
i.a,i.b,i.c{display:inline-block;width:12px;height:3px;vertical-align:middle;margin:0 4px 0 10px}
i.a{background:var(--a)}i.b{background:var(--b)}i.c{background:var(--c)}
"""


def write_report(run: Path, *, title: str = "", extra: Sequence[str] = ()) -> Path:
    """Make RUN/report.html again and return its path. `extra`: further sections of ready HTML (used by the tour)."""
    lines = RunLog(run / "log.jsonl").lines()
    recipe = (run / "recipe.toml").read_text("utf-8", "replace") if (run / "recipe.toml").exists() else ""
    body = [
        _head(run, lines, title),
        _curves(lines),
        *extra,
        _evaluations(lines),
        _samples(lines),
        _events(lines),
        _data(run),
        f"<h2>Recipe</h2><pre>{_e(recipe)}</pre>" if recipe else "",
    ]
    path = run / "report.html"
    files.write_atomic(path, page(title or f"Run {run.name}", "".join(body)))
    return path


def page(title: str, body: str) -> str:
    """A whole page in the house's style. A strict policy forbids scripts and requests, whatever a sample holds."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'\">"
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Big numbers with a caption each."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_e(value)}</b><span>{_e(name)}</span></div>' for name, value in items)
        + "</div>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are set to the right."""
    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        text = "–" if value is None or text == "nan" else text
        return f'<td class="n">{text}</td>' if number else f"<td>{_e(text)}</td>"
    numeric = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    head = "".join(f"<th{' class=n' if n else ''}>{_e(h)}</th>" for h, n in zip(header, numeric, strict=True))
    return f"<table><tr>{head}</tr>" + "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows) + "</table>"


def chart(series: Sequence[tuple[str, str, Sequence[Point]]], *, unit: str) -> str:
    """Lines over the step. `series` holds (name, colour class, points)."""
    series = [(name, colour, [p for p in line if math.isfinite(p[1])]) for name, colour, line in series]
    points = [p for _, _, line in series for p in line]
    if len(points) < 2:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    y0, y1 = y0 - 0.04 * (y1 - y0 or 1), y1 + 0.04 * (y1 - y0 or 1)

    def place(p: Point) -> str:
        x = LEFT + (p[0] - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - 12)
        y = TOP + (y1 - p[1]) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"
    parts = []
    for value in _ticks(y0, y1):
        y = TOP + (y1 - value) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - 12}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in _ticks(x0, x1):
        x = LEFT + (value - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - 12)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:g}</text>')
    for _, colour, line in series:
        parts.append(
            f'<polyline fill="none" stroke="var(--{colour})" stroke-width="1.8" points="{" ".join(map(place, line))}"/>'
        )
        if len(line) <= 40:
            parts.extend(
                f'<circle r="3" fill="var(--{colour})" cx="{c[0]}" cy="{c[1]}"/>'
                for c in (place(p).split(",") for p in line)
            )
    legend = "".join(f'<i class="{colour}"></i>{_e(name)}' for name, colour, line in series if line)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<p class="k">{_e(unit)} over the step {legend}</p>{drawing}'


def _head(run: Path, lines: Sequence[Line], title: str) -> str:
    steps = [line for line in lines if "loss" in line]
    last = [line for line in lines if is_last_evaluation(line)]
    start = next((line for line in lines if line.get("event") == "start"), {})
    items = []
    if last:
        items += [(name.replace("_", " "), f"{value:.4g}") for name, value in list(_figures(last[-1]).items())[:3]]
        held = (("bits per byte, held out", "val_bits_per_byte"), ("loss, nats", "val_loss"))
        items += [(name, f"{_number(last[-1], key):.3f}") for name, key in held if last[-1].get(key) is not None]
    if steps:
        items += [
            ("steps", f"{steps[-1]['step']:,}"),
            ("tokens seen", f"{steps[-1]['tokens']:,}"),
            ("time", _duration(float(steps[-1]["seconds"]))),
        ]
    items += [
        (key, f"{start[key]:,}") for key in ("parameters", "threads") if key in start
    ]
    lead = " · ".join(str(start[key]) for key in ("family", "objective", "device", "dtype", "torch") if key in start)
    return f'<h1>{_e(title or f"Run {run.name}")}</h1><p class="lead">{_e(lead)}</p>{tiles(items)}'


def _curves(lines: Sequence[Line]) -> str:
    train = [(float(line["step"]), _number(line, "loss")) for line in lines if "loss" in line]
    held = [(float(line["step"]), _number(line, "val_loss")) for line in lines if line.get("event") == "evaluation"]
    rate = [(float(line["step"]), float(line["tokens_per_second"])) for line in lines if "tokens_per_second" in line]
    loss = chart([("training", "a", thin(train)), ("held out", "b", held)], unit="loss in nats")
    return (
        f"<h2>Learning</h2>{loss}" + chart([("tokens per second", "c", thin(rate))], unit="tokens per second")
        if loss
        else ""
    )


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about 400 points: the middle step and the median value of each stretch."""
    size = max(1, len(points) // POINTS)
    return [
        (points[min(i + size // 2, len(points) - 1)][0], statistics.median(v for _, v in points[i : i + size]))
        for i in range(0, len(points), size)
    ]


def _evaluations(lines: Sequence[Line]) -> str:
    figures = list(dict.fromkeys(name for line in lines for name in _figures(line)))
    rows = [
        (
            line["step"],
            "whole" if line.get("whole") else "subset",
            _number(line, "val_loss"),
            _number(line, "val_bits_per_byte"),
            int(line["val_tokens"]),
            *(_figures(line).get(name) for name in figures),
        )
        for line in lines
        if line.get("event") == "evaluation"
    ]
    head = ("step", "part", "loss", "bits per byte", "tokens", *(name.replace("_", " ") for name in figures))
    return ("<h2>Evaluation on what was held out</h2>" + table(head, rows) + _confusion(lines)) if rows else ""


def _figures(line: Line) -> dict[str, float]:
    """The plain figures of an evaluation."""
    return {name: value for name, value in line.get("metrics", {}).items() if isinstance(value, float)}


def _confusion(lines: Sequence[Line]) -> str:
    """What the last evaluation took for what: a row for each class, a column for each answer."""
    last = next((line["metrics"] for line in reversed(lines) if "confusion" in line.get("metrics", {})), None)
    if last is None:
        return ""
    names = last.get("labels", [str(n) for n in range(len(last["confusion"]))])
    rows = [(name, *counts) for name, counts in zip(names, last["confusion"], strict=True)]
    return '<h2>What was taken for what</h2><p class="k">rows: the truth; columns: the answer</p>' + table(("", *names), rows)


def _samples(lines: Sequence[Line]) -> str:
    shown = [line for line in lines if line.get("samples")]
    picked = shown[:1] + shown[len(shown) // 2:len(shown) // 2 + 1] + shown[-1:] if len(shown) > 3 else shown
    return (
        "<h2>Samples while it learned</h2>"
        + "".join(f'<p class="k">after step {line["step"]:,}</p><pre>{_e(line["samples"][0])}</pre>' for line in picked)
        if picked
        else ""
    )


def _events(lines: Sequence[Line]) -> str:
    rows = [
        (
            line["step"],
            line["decision"],
            ", ".join(f"{k} = {_word(v)}" for k, v in line.items() if k not in ("event", "step", "decision")),
        )
        for line in lines
        if line.get("event") == "decision"
    ]
    return (
        '<h2>Decisions</h2><p class="k">what was not a function of data, seed and step; replayed on resume</p>'
        + table(("step", "decision", "values"), rows)
        if rows
        else ""
    )


def _data(run: Path) -> str:
    manifest = run / "data" / "manifest.json"
    if not manifest.exists():
        return ""
    try:
        report = json.loads(manifest.read_bytes()).get("report", {})
    except ValueError:  # `data verify` says what is wrong with it
        return ""
    rows = [
        (
            key.replace("_", " "),
            value if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False),
        )
        for key, value in report.items()
    ]
    return "<h2>Data: what was kept, and why not</h2>" + table(("", ""), rows) if rows else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five of them."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    size = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= 6)
    first = math.ceil(low / size)
    return [round(n * size, 10) for n in range(first, math.floor(high / size) + 1)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _word(value: Any) -> str:
    """A value of the log as its file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(line: Line, key: str) -> float:
    """A number of the log, where "nan" and "inf" are words and what was not measured is nothing."""
    value = line.get(key)
    return math.nan if value is None else float(value)


def _e(text: str) -> str:
    return html.escape(str(text).encode("utf-8", "replace").decode())
