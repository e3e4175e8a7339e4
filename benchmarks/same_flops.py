"""The same operations for the three families, side by side: what does each of them know afterwards?

    python -m benchmarks.same_flops [--tera 60] [--seeds 0 1 2]        stored in benchmarks/same_flops.json

Decisions:
- A decoder (qwen3, next token), an encoder (bert, hidden tokens) and an encoder-decoder (t5, spans) of the same width, as many
  layers (an encoder-decoder has half of them on either side), the same vocabulary size, rows and text: the shared books.
- Operations are counted, not estimated: torch counts those of the matrix products of one whole update, forward and backward. Each
  family makes as many updates as the same total buys.
- What is compared must mean the same for all: BLiMP (arXiv 1912.00582) by the log-probability of a sentence, or of each of its
  tokens where the rest is seen (arXiv 1910.14659); and what a linear classifier reads from the mean of the last states, the model
  as it is: banking77, 77 intents. The loss of each stands beside that of a unigram on the same labels, and is no comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, quality, quality_tasks
from benchmarks.harness import THREEFOLD, mean_words, say, timed
from benchmarks.table import grid
from benchmarks.texts import shared
from threefold.config import load_recipe
from threefold.data.loader import Loader
from threefold.data.shards import Shards
from threefold.model.base import Model
from threefold.model.build import build_model
from threefold.model.language import Seq2SeqLM
from threefold.model.pooling import pooled
from threefold.model.weights import load_config, load_model
from threefold.objectives import kind_of
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer
from threefold.training.gradients import accumulate

STORED = quality.ROOT / "benchmarks" / "same_flops.json"
FAMILIES = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "span"}
WIDTH, LAYERS, CONTEXT, BATCH = 192, 4, 64, 4096


def updates_of(run: Path, operations: float) -> tuple[int, float]:
    """How many updates of a run's model, of its tokenizer and batch, so many operations buy; and those of one."""
    recipe, shards = load_recipe(run / "recipe.toml"), Shards.open(run / "data")
    tokenizer = Tokenizer.load(shards.tokenizer_dir)
    config = load_config(run / "model")[1]
    task = "masked" if recipe.train.objective == "masked" else "seq2seq" if config.is_encoder_decoder else "causal"
    objective = kind_of(recipe.train.objective).make(recipe, tokenizer, task)
    model = build_model(config, 0, task=task)
    batch = Loader(shards, objective.span(CONTEXT), BATCH // CONTEXT, 0, example=objective.example).batch(0)
    with FlopCounterMode(display=False) as counted:
        accumulate(model, objective, [batch], lambda part: {})
    return max(1, round(operations / counted.get_total_flops())), float(counted.get_total_flops())


def trained(kind: str, operations: float, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model of that kind which has had so many operations."""
    halves = LAYERS // 2 if kind == "encoder-decoder" else LAYERS
    shape = ["--objective", FAMILIES[kind], "--size", f"{WIDTH}x{halves}", "--context", str(CONTEXT), "--batch-tokens", str(BATCH)]
    first = folder / "first"
    timed([*THREEFOLD, "pretrain", "--data", shared("books/books.jsonl.gz"), "--steps", "1", "--out", first, *shape])
    steps, each = updates_of(first, operations)
    run = folder / "run"
    seconds, _ = timed([*THREEFOLD, "pretrain", "--data", first / "data", "--steps", str(steps), "--seed", str(seed), "--out", run, *shape])
    return run, {"updates": steps, "tera_each": each / 1e12, "seconds": round(seconds, 1)}


def read_by_a_line(model: Model, tokenizer: PretrainedTokenizer) -> float:
    """The accuracy of a linear classifier over the mean of the last states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learnt, judged = quality_tasks.banking77(0)
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    reader.fit(vectors(model, tokenizer, [row["text"] for row in learnt]), [row["label"] for row in learnt])
    return float(reader.score(vectors(model, tokenizer, [row["text"] for row in judged]), [row["label"] for row in judged]))


@torch.inference_mode()
def vectors(model: Model, tokenizer: PretrainedTokenizer, texts: list[str]) -> npt.NDArray[np.float32]:
    """(N, D) of the texts, in the order given."""
    encoded = [tokenizer.encode(text, truncation=True, max_length=CONTEXT) for text in texts]  # framed as the family frames a text
    order = sorted(range(len(texts)), key=lambda n: len(encoded[n]))
    found = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for first in range(0, len(order), 128):
        part = order[first:first + 128]
        width = max(len(encoded[n]) for n in part)
        ids, mask = torch.zeros(len(part), width, dtype=torch.int64), torch.zeros(len(part), width, dtype=torch.int64)
        for row, n in enumerate(part):
            ids[row, :len(encoded[n])], mask[row, :len(encoded[n])] = torch.tensor(encoded[n]), 1
        if isinstance(model, Seq2SeqLM):
            trace = model.transformer(ids, attention_mask=mask, decoder_input_ids=torch.full((len(part), 1), model.start))
            assert trace.encoder is not None
            states = trace.encoder.last
        else:
            states = model.hidden(ids, attention_mask=mask)
        found[part] = pooled(states, mask, "mean").float().numpy()
    return found


def measured(run: Path, data: Path) -> dict[str, Any]:
    """What a model knows."""
    found = quality.measured(run, data, pairs=quality.PLL_PAIRS)
    model, tokenizer = load_model(run / "model").eval(), PretrainedTokenizer.load(run / "model")
    untrained = build_model(model.config, 0, task=model.task)
    return {**found, "read": read_by_a_line(model, tokenizer), "read_untrained": read_by_a_line(untrained.eval(), tokenizer)}


def table(path: Path = STORED) -> str:
    """What is stored, the mean of the seeds with the smallest and the largest."""
    cells = json.loads(path.read_text())
    cells = [cell for cell in cells if cell["tera"] == cells[-1]["tera"]]  # those of the last run
    def words(kind: str, *names: str) -> str:
        values = []
        for cell in cells:
            if cell["kind"] == kind:
                value = cell
                for name in names:
                    value = value[name]
                values.append(float(value))
        return mean_words(values)
    lines = [[kind, words(kind, "loss"), words(kind, "unigram"), words(kind, "blimp", "mean"), words(kind, "read"), words(kind, "read_untrained")]
             for kind in FAMILIES if any(cell["kind"] == kind for cell in cells)]
    return grid(["family", "loss", "unigram on its labels", "BLiMP", "banking77, read by a line", "the same untrained"], lines)


def main() -> None:
    """Train and measure each family, and show the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_flops", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tera", type=float, default=60.0, help="operations of each model, in 10^12")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="show what is stored, and run nothing")
    options = parser.parse_args()
    for seed in [] if options.table else options.seeds:
        for kind in FAMILIES:
            with tempfile.TemporaryDirectory(prefix="same-flops-") as folder:
                run, bought = trained(kind, options.tera * 1e12, seed, Path(folder))
                cell = {"kind": kind, "seed": seed, "tera": options.tera, **bought, **measured(run, Path(folder) / "first" / "data"),
                        "machine": machine.facts() | machine.versions()}
            cells = json.loads(STORED.read_text()) if STORED.exists() else []
            cells = [old for old in cells if (old["kind"], old["seed"], old["tera"]) != (kind, seed, options.tera)] + [cell]
            STORED.write_text(json.dumps(cells, indent=1) + "\n")
            say(f"{kind}, seed {seed}: " + json.dumps({k: v for k, v in cell.items() if k not in ("machine", "blimp")}))
    print(table())


if __name__ == "__main__":
    main()
