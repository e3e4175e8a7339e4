"""The tour: the whole life of a model on this machine, offline, from text that every machine has.

    read and clean -> tokenizer -> shards -> pretrain -> evaluate against yardsticks -> complete -> report

Decisions:
- It runs the same functions as the commands; what it shows can be repeated with the commands that it names.
- The budget is for the whole. Yardsticks and completions get a fixed small part, pretraining the rest.
- A figure alone says little: the model is set beside a unigram, a bigram, gzip and xz on the same held-out text.
"""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

from threefold import console, files
from threefold.config import Recipe
from threefold.errors import UsageError

PROMPTS = ("def __init__(self, ", "The following example shows how to ", "import ")
HELD_OUT = 0.02  # about 300 kB: enough for a figure, and it does not eat the budget
LEAST_BUDGET = 15.0  # seconds
CLOSING_SHARE, CLOSING_LEAST = 0.04, 4.0  # of the budget and in seconds, for yardsticks, completions and the report


def tour(out: Path, budget: float, *, started: float | None = None, fresh: bool = False) -> dict[str, Any]:
    """Run the tour in `out` within `budget` seconds; returns what it measured. The same call again resumes."""
    from threefold.pretrain import Request, pretrain

    if budget < LEAST_BUDGET:
        raise UsageError(f"a tour of {budget:g} s: reading the text alone takes longer", hint=f"give it at least {LEAST_BUDGET:g} s; 3min is usual")
    started = time.monotonic() if started is None else started
    console.say("threefold tour: from the running Python's own documentation and source to a model of it")
    recipe = Recipe().override(
        {"data.paths": ("python",), "data.val_fraction": HELD_OUT, "train.budget": budget - max(CLOSING_LEAST, CLOSING_SHARE * budget)}
    )
    run = out / "decoder"
    result = pretrain(recipe, Request(out=run, fresh=fresh, started=started))
    _say_data(run)
    table = yardstick_table(run, result)
    console.say("\nbits per byte on the held-out text (lower is better):")
    for name, value in sorted(table.items(), key=lambda item: -item[1]):
        console.say(f"  {name:28} {value:6.3f}  {'#' * round(8 * value)}")
    completions = complete(run)
    for prompt, text in completions:
        console.say(f"\n> {prompt}{text}")
    path = _report(out, run, table, completions)
    console.say(f"\n{path} shows it all; {round(time.monotonic() - started)} s in all. Try next:\n"
                f"  threefold generate {run} \"import os\"\n"
                f"  threefold evaluate {run}\n"
                f"  threefold pretrain --data YOUR_TEXT --budget 20min --out runs/mine\n"
                f"  threefold pretrain --from {run} --data YOUR_DOMAIN_TEXT --budget 10min --out runs/domain")
    return {**result, "yardsticks": table, "report": str(path), "seconds": round(time.monotonic() - started, 1)}


def yardstick_table(run: Path, result: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of the model and of the yardsticks, on the held-out part of the run's own data."""
    from threefold.data.shards import Shards
    from threefold.evaluation.yardsticks import yardsticks
    from threefold.text.tokenizer import Tokenizer

    shards = Shards.open(run / "data")
    tokenizer = Tokenizer.load(shards.tokenizer_dir)
    table = yardsticks(shards, tokenizer)
    return {**table, "this model": float(result["bits_per_byte"])}


def complete(run: Path) -> list[tuple[str, str]]:
    """A continuation of each prompt, always with the same seed."""
    from threefold.auto import load
    from threefold.generation.engine import generate

    model, tokenizer = load(run)
    room = int(model.config.max_position_embeddings) // 2
    texts = generate(model, tokenizer, list(PROMPTS), max_new_tokens=min(80, room), temperature=0.7, top_p=0.95, seed=0)
    return list(zip(PROMPTS, texts, strict=True))


def _say_data(run: Path) -> None:
    from threefold.data.shards import Shards

    shards = Shards.open(run / "data")
    train, held = shards.count("train"), shards.count("validation")
    console.say(
        f"\ndata: {train.documents:,} documents to learn from ({train.bytes / 1e6:.1f} MB, {train.tokens:,} tokens), "
        f"{held.documents:,} held out ({held.bytes / 1e6:.1f} MB)"
    )


def _report(out: Path, run: Path, table: dict[str, float], completions: list[tuple[str, str]]) -> Path:
    """DIR/report.html, the report of the whole: that of the run, with yardsticks and completions."""
    from threefold.training import report

    worst = max(table.values())
    bars = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{value:.3f}</td><td style="width:55%"><div style="height:12px;border-radius:3px;'
        f'background:var(--{"a" if name == "this model" else "line"});width:{100 * value / worst:.1f}%"></div></td></tr>'
        for name, value in sorted(table.items(), key=lambda item: -item[1])
    )
    shown = "".join(f'<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>' for prompt, text in completions)
    extra = [
        f'<h2>Beside honest yardsticks</h2><p class="k">bits per byte on the same held-out text; lower is better</p><table>{bars}</table>',
        f"<h2>Completions</h2>{shown}",
    ]
    report.write_report(run, title="A model of Python's own text", extra=extra)
    files.write_atomic(out / "report.html", (run / "report.html").read_bytes())
    return out / "report.html"
