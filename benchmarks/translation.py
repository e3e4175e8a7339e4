"""Korean and English, both ways: threefold beside transformers' own Marian, trained as long on the same pairs.

    python -m benchmarks.translation search                        the peer's settings, a few minutes each
    python -m benchmarks.translation ko_en --minutes 28 [--seed 0]  one cell: the peer, ours in the same time, ours in a third of it
    python -m benchmarks.translation table

Decisions:
- Pairs are those of `quality_tasks`: 90 % of Tatoeba's and the training part of KorSTS; judged are the other Tatoeba pairs (short) and, as
  a second figure, the test part of KorSTS (longer sentences).
- Each side has one vocabulary for both languages, trained on what it reads. The peer is transformers' Marian in the shape and at the
  rate that the search found best for it, in bfloat16.
- Ours is two commands, `pretrain --objective span` on text of both languages and `finetune --task seq2seq`; the time is divided between them
  and holds all that both do, tokenizer and evaluation included. Both are judged by their better figure of greedy and four beams.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine, quality_tasks
from benchmarks.harness import ROOT, THREEFOLD, mean_words, say, timed
from benchmarks.table import grid
from benchmarks.texts import write_lines
from threefold.evaluation.metrics import of_texts

STORED = ROOT / "benchmarks" / "translation.json"
SHAPES = ("128x2", "256x3", "512x6")
RATES = ("5e-4", "1e-3", "2e-3")
SEARCH_SECONDS = 150.0
PRETRAINING = 0.6  # of our time
TAUGHT = ("--finetune.optimizer", "muon", "--model.context", "128", "--finetune.rows", "64")
LONGEST = 96  # tokens of a translation, on either side


def files_of(direction: str, folder: Path) -> tuple[Path, Path, int]:
    """Pairs to learn from and to judge, as lines, and how many of the judged ones are Tatoeba's, which stand first."""
    learnt, short, long = quality_tasks.translations(direction)
    return write_lines(learnt, folder / "learn.jsonl"), write_lines([*short, *long], folder / "judge.jsonl"), len(short)


def figures_of(said: list[str], judged: Path, short: int) -> dict[str, float]:
    """chrF and BLEU of Tatoeba's sentences, and with `_long` those of KorSTS."""
    truth = [json.loads(line)["target"] for line in judged.read_text(encoding="utf-8").splitlines()]
    first, second = of_texts(said[:short], truth[:short]), of_texts(said[short:], truth[short:])
    return {**{name: first[name] for name in ("chrf", "bleu")}, **{f"{name}_long": second[name] for name in ("chrf", "bleu")}}


def text_of(learnt: Path, folder: Path) -> Path:
    """Both sides of the pairs as text."""
    rows = [json.loads(line) for line in learnt.read_text(encoding="utf-8").splitlines()]
    return write_lines(({"text": row[side]} for side in ("source", "target") for row in rows), folder / "text.jsonl")


def shape_of(size: str, text: Path, folder: Path) -> Path:
    """A Marian directory of that shape, with a tokenizer of the text."""
    run = folder / f"shape-{size}"
    if not run.exists():
        timed([*THREEFOLD, "pretrain", "--family", "transformer", "--objective", "seq2seq", "--size", size, "--context", "128", "--data", text,
               "--steps", "1", "--out", run])
    return run / "model"


def peer(model: Path, learnt: Path, judged: Path, short: int, folder: Path, seconds: float, rate: str, seed: int, *, bf16: bool) -> dict[str, Any]:
    """The peer's figures."""
    out = folder / "peer"
    timed([sys.executable, "-m", "benchmarks.peer_marian", "--model", model, "--data", learnt, "--test", judged, "--seconds", str(seconds),
           "--rate", rate, "--seed", str(seed), "--out", out, *(["--bf16"] if bf16 else [])])
    found = json.loads((out / "said.json").read_text(encoding="utf-8"))
    return {**better(found, judged, short), "seconds": found["seconds"], "parameters": found["parameters"], "steps": found["steps"]}


def better(said: dict[str, list[str]], judged: Path, short: int) -> dict[str, Any]:
    """The figures of what was written greedily or by four beams, whichever has the higher chrF."""
    figures = {how: figures_of(said[how], judged, short) for how in ("greedy", "beams")}
    best = max(figures, key=lambda how: figures[how]["chrf"])
    return {**figures[best], "how": best}


def ours(learnt: Path, judged: Path, short: int, folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Our figures, after so many seconds of both commands."""
    from threefold import pipeline

    first, second = folder / f"first-{seconds:.0f}", folder / f"second-{seconds:.0f}"
    spent, _ = timed([*THREEFOLD, "pretrain", "--objective", "span", "--data", text_of(learnt, folder), quality_tasks.reviews(folder), "--budget",
                      f"{PRETRAINING * seconds:.0f}s", "--seed", str(seed), "--out", first])
    rest, _ = timed([*THREEFOLD, "finetune", "--from", first, "--task", "seq2seq", "--data", learnt, "--budget", f"{seconds - spent:.0f}s",
                     "--truncate", "--seed", str(seed), "--out", second, *TAUGHT])
    writer = pipeline("text2text-generation", str(second), batch_size=64, max_new_tokens=LONGEST)
    sources = [json.loads(line)["source"] for line in judged.read_text(encoding="utf-8").splitlines()]
    said = {how: [one["generated_text"] for one in writer(sources, num_beams=beams)] for how, beams in (("greedy", 1), ("beams", 4))}
    return {**better(said, judged, short), "seconds": round(spent + rest, 1), "parameters": writer.model.num_parameters()}


def search(direction: str) -> dict[str, float]:
    """chrF of the peer in each setting, after a short time."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="translation-") as name:
        folder = Path(name)
        learnt, judged, short = files_of(direction, folder)
        text = text_of(learnt, folder)
        for size in SHAPES:
            for rate in RATES:
                one = peer(shape_of(size, text, folder), learnt, judged, short, folder, SEARCH_SECONDS, rate, 0, bf16=True)
                found[f"{size} {rate}"] = round(one["chrf"], 2)
                say(f"  {size}, rate {rate}: chrF {one['chrf']:.2f} ({one['how']}), {one['steps']} steps")
    return found


def cell(direction: str, minutes: float, seed: int, size: str, rate: str) -> Iterator[dict[str, Any]]:
    """The peer and ours, in the same time and in a third of it, each when it is done."""
    with tempfile.TemporaryDirectory(prefix="translation-") as name:
        folder = Path(name)
        learnt, judged, short = files_of(direction, folder)
        model = shape_of(size, text_of(learnt, folder), folder)
        sides = {"threefold, a third": lambda: ours(learnt, judged, short, folder, 20 * minutes, seed),
                 "threefold": lambda: ours(learnt, judged, short, folder, 60 * minutes, seed),
                 "Marian": lambda: peer(model, learnt, judged, short, folder, 60 * minutes, rate, seed, bf16=True)}
        for side, run in sides.items():
            figures = run()
            say(f"  {direction}, seed {seed}, {side}: chrF {figures['chrf']:.2f}, BLEU {figures['bleu']:.2f}, of long sentences chrF "
                f"{figures['chrf_long']:.2f}, {figures['seconds']:.0f} s")
            yield {"direction": direction, "side": side, "seed": seed, "minutes": minutes, "setting": f"{size} {rate}", **figures,
                   "machine": machine.facts() | machine.versions()}


def table(path: Path = STORED) -> str:
    """What is stored, the mean of the seeds with the smallest and the largest."""
    cells, lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else [], []
    for key in dict.fromkeys((cell["direction"], cell["side"]) for cell in cells):
        of = [cell for cell in cells if (cell["direction"], cell["side"]) == key]
        def words(name: str, of: list[dict[str, Any]] = of) -> str:
            return mean_words((cell[name] for cell in of), digits=2)
        lines.append([*key, str(len(of)), words("seconds"), words("chrf"), words("bleu"), words("chrf_long"), words("bleu_long")])
    return grid(["direction", "", "seeds", "seconds", "chrF", "BLEU", "chrF, KorSTS", "BLEU, KorSTS"], lines)


def main() -> None:
    """Search, one cell, or the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.translation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "ko_en", "en_ko", "table"])
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="256x3", help="of the peer, as the search found it")
    parser.add_argument("--rate", default="1e-3")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
    elif options.what == "search":
        print(json.dumps(search("ko_en"), indent=1))
    else:
        for found in cell(options.what, options.minutes, options.seed, options.size, options.rate):
            stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else []
            same = ("direction", "side", "seed", "minutes")
            stored = [old for old in stored if any(old[name] != found[name] for name in same)]
            STORED.write_text(json.dumps([*stored, found], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(table())


if __name__ == "__main__":
    main()
