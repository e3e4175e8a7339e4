"""What models learn: one cell is a row (an objective), a seed and a budget on the shared books.

    make bench-quality ROW=masked SEED=0            runs one cell and adds it to benchmarks/quality.json
    python -m benchmarks.quality table              the table of what is stored

Decisions:
- A cell is one `threefold pretrain` with no flag but data, objective, seed and budget, kept for the cells of tasks that start
  from it (`benchmarks/foundations.py`); what is measured is read from RUN/model by
  another code path than training: the loss over the whole held-out part, and a task that the objective should have taught.
- Each row has a control that knows words alone: a unigram, for masks also a bigram that looks both ways.
- BLiMP (arXiv 1912.00582) compares two sentences by their log-probability; an encoder gives the pseudo-log-likelihood (arXiv
  1910.14659): each token hidden once; an encoder-decoder restores each token once.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import machine, quality_tasks
from benchmarks.foundations import KEPT, foundation
from benchmarks.harness import ROOT, mean_words, say
from benchmarks.table import grid
from benchmarks.texts import shared, start_of
from threefold.config import load_recipe
from threefold.data.loader import IGNORED, Batch, Loader
from threefold.data.shards import Shards
from threefold.evaluation.loss import evaluate_shards
from threefold.model.language import CausalLM, MaskedLM, Seq2SeqLM
from threefold.model.weights import load_model
from threefold.objectives import kind_of
from threefold.objectives.heldout import evaluate_objective
from threefold.objectives.replaced import Duel, Replaced
from threefold.objectives.vocabulary import Vocabulary
from threefold.text.tokenizer import Tokenizer

STORED = ROOT / "benchmarks" / "quality.json"
ROWS: dict[str, dict[str, str]] = {
    "causal": {"--objective": "causal"},
    "masked": {"--objective": "masked"},
    "pairs": {"--objective": "masked", "--objective.next_sentence": "true"},
    "replaced": {"--objective": "replaced"},
    "span": {"--objective": "span"},
}
HELD_OUT_ROWS = 2000  # of an objective's held-out examples, the first ones of their order
JUDGED = 0.15  # of the tokens are hidden from an encoder that is judged, whatever share it learnt from
COPIES = 256  # of texts with a token hidden, in one pass
PLL_PAIRS = 200  # of each paradigm, where every token costs a pass
CONTROL_WEIGHT = 5.0  # counts that the unigram stands for in the bigrams

Counts = npt.NDArray[np.float64]


def run_cell(row: str, seed: int, budget: str, data: Path | None = None, kept: Path = KEPT) -> dict[str, Any]:
    """Train and measure one cell. `budget` "quick": a few updates and a part of what is judged, to see that it works."""
    quick = budget == "quick"
    about = {"row": row, "seed": seed, "budget": budget, "machine": machine.facts() | machine.versions()}
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        if row in quality_tasks.CELLS:
            return {**about, **quality_tasks.run(row, seed, Path(folder), quick=quick, kept=kept)}
        text = data or shared("books/books.jsonl.gz")
        flags = quality_tasks.shortened({**ROWS[row], "--budget": budget}, quick=quick)
        made = foundation([start_of(text, Path(folder)) if quick else text], flags, seed, kept)
        return {**about, "seconds": made.seconds, "trained_at": made.commit, **measured(made.run, quick=quick)}


def measured(run: Path, data: Path | None = None, *, quick: bool = False, pairs: int | None = None) -> dict[str, Any]:
    """What a run has learnt, of its own data or of that which it was given; by so many `pairs` of each paradigm of BLiMP, or by all
    of them where they cost one pass."""
    pairs = 1 if quick else pairs
    model, shards = load_model(run / "model"), Shards.open(data or run / "data")
    tokenizer, recipe = Tokenizer.load(shards.tokenizer_dir), load_recipe(run / "recipe.toml")
    context = model.config.max_position_embeddings
    found: dict[str, Any] = {"parameters": model.num_parameters(), "context": context}
    if isinstance(model, CausalLM):
        whole = evaluate_shards(model, shards, context, tokenizer.token_bytes())
        return {**found, "loss": whole["loss"], "bits_per_byte": whole["bits_per_byte"],
                "unigram": float(np.mean(_unigram_losses(shards)[_ids(shards, "validation")])),
                "blimp": blimp(lambda texts: _causal_scores(model, tokenizer, texts), pairs)}
    asked = recipe.override({"objective.hidden_share": JUDGED}) if recipe.train.objective in ("masked", "replaced") else recipe
    objective = kind_of(recipe.train.objective).make(asked, tokenizer, model.task)
    loader = Loader(shards, objective.span(context), 32, 0, "validation", example=objective.example)
    if isinstance(objective, Replaced):
        generator = load_model(run / "generator")
        assert isinstance(generator, MaskedLM)
        duel = Duel(generator, model).eval()  # type: ignore[arg-type]
        return {**found, **_discriminated(duel, objective, loader)}
    held = evaluate_objective(model, objective, loader, rows=HELD_OUT_ROWS)
    learnt = Loader(shards, objective.span(context), 32, 0, "train", example=objective.example)
    found |= {"loss": held["loss"], "terms": held.get("terms"), **_controls(shards, loader, learnt)}
    if isinstance(model, MaskedLM):
        if model.pairs is not None:
            found["pairs_right"] = _pairs_right(model, loader)
        else:
            found["blimp"] = blimp(lambda texts: _masked_scores(model, tokenizer, texts), pairs or PLL_PAIRS)
    if isinstance(model, Seq2SeqLM):
        found["blimp"] = blimp(lambda texts: _restored_scores(model, tokenizer, texts), pairs or PLL_PAIRS)
    return found


# -- controls ----------------------------------------------------------------------------------------------------------


def _ids(shards: Shards, split: str) -> npt.NDArray[np.int64]:
    return np.concatenate([stream.take(np.arange(len(stream))) for s in range(len(shards.sources)) if len(stream := shards.stream(split, s))])


def _unigram_losses(shards: Shards) -> Counts:
    """Nats of each id by its share of the train part, one added to each count."""
    counts = np.bincount(_ids(shards, "train"), minlength=shards.vocab_size) + 1.0
    losses: Counts = -np.log(counts / counts.sum())
    return losses


def _controls(shards: Shards, loader: Loader, learnt: Loader) -> dict[str, float]:
    """Mean nats of the labels by a unigram, and of hidden tokens by a bigram that looks both ways."""
    losses, total, both, count = _label_losses(shards, learnt), 0.0, 0.0, 0
    share = np.exp(-_unigram_losses(shards))
    train = _ids(shards, "train")
    left = _Followers(train[:-1], train[1:], share)
    right = _Followers(train[1:], train[:-1], share)
    for batch in _rows(loader):
        labels, ids = batch.labels.numpy(), batch.input_ids.numpy()
        at = labels != IGNORED
        total += float(losses[labels[at]].sum())
        count += int(at.sum())
        if batch.labels.shape != batch.input_ids.shape:
            continue
        text = np.where(at, labels, ids)  # the neighbours as they are in the text: the control is given more than the model
        for row, place in zip(*np.nonzero(at), strict=True):
            if 0 < place < text.shape[1] - 1:
                mixed = left.of(int(text[row, place - 1])) * right.of(int(text[row, place + 1])) / share
                both -= float(np.log(mixed[labels[row, place]] / mixed.sum()))
            else:
                both += float(losses[labels[row, place]])
    found = {"unigram": total / count}
    return found | ({"bigram_both_ways": both / count} if both else {})


def _label_losses(shards: Shards, learnt: Loader) -> Counts:
    """Nats of each id as a label: its share of the labels of some rows that are learnt from (where sentinels and ends stand, which
    no text has), with the text's own shares standing for as many labels as there are ids."""
    asked = np.zeros(shards.vocab_size)
    for batch in _rows(learnt):
        labels = batch.labels.numpy()
        asked += np.bincount(labels[labels != IGNORED], minlength=shards.vocab_size)
    mixed = asked + shards.vocab_size * np.exp(-_unigram_losses(shards))
    losses: Counts = -np.log(mixed / mixed.sum())
    return losses


class _Followers:
    """p(b | a) from counts of neighbours, the unigram mixed in."""

    def __init__(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], share: Counts) -> None:
        order = np.argsort(a, kind="stable")
        self.b, self.first, self.share = b[order], np.searchsorted(a[order], np.arange(len(share) + 1)), share

    def of(self, a: int) -> Counts:
        """(V,) after one id."""
        seen = self.b[self.first[a]:self.first[a + 1]]
        counts = np.bincount(seen, minlength=len(self.share)) + CONTROL_WEIGHT * self.share
        found: Counts = counts / (len(seen) + CONTROL_WEIGHT)
        return found


def _rows(loader: Loader) -> Iterator[Batch]:
    for first in range(0, min(HELD_OUT_ROWS, loader.samples), loader.batch_size):
        yield loader.batch(first // loader.batch_size, slice(0, min(loader.batch_size, loader.samples - first)))


# -- tasks -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _pairs_right(model: MaskedLM, loader: Loader) -> float:
    """Share of pairs that are told apart, on unseen borders; half of them follow."""
    right = count = 0
    for batch in _rows(loader):
        states = model.hidden(batch.input_ids, types=batch.types, attention_mask=batch.attention_mask)
        said = model.pairs(model.pooler(states)).argmax(-1)  # type: ignore[misc]
        assert batch.pairs is not None
        right, count = right + int((said == batch.pairs).sum()), count + len(batch)
    return right / count


@torch.inference_mode()
def _discriminated(duel: Duel, objective: Replaced, loader: Loader) -> dict[str, float]:
    """The area under the curve of the discriminator over all tokens of held-out rows (Mann and Whitney 1947)."""
    scores, truth = [], []
    for batch in _rows(loader):
        _, _, states = duel.generator.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents,
                                                attention_mask=batch.attention_mask)
        logits, judged, labels = objective.judged(duel, batch, states, attention_mask=batch.attention_mask)
        scores.append(logits[judged].float().numpy())
        truth.append(labels[judged].numpy() == 1)
    value, hit = np.concatenate(scores), np.concatenate(truth)
    ranks = np.empty(len(value))
    ranks[np.argsort(value, kind="stable")] = np.arange(1, len(value) + 1)
    area = (ranks[hit].sum() - hit.sum() * (hit.sum() + 1) / 2) / (hit.sum() * (~hit).sum())
    return {"auc": float(area), "replaced": float(hit.mean()), "loss": evaluate_objective(duel, objective, loader, rows=HELD_OUT_ROWS)["loss"]}


def blimp(scores: Any, pairs: int | None = None) -> dict[str, Any]:
    """The share of pairs whose good sentence has the higher score, of each paradigm and in the mean."""
    found = {}
    with tarfile.open(shared("blimp/blimp.tar.gz")) as archive:
        for member in archive:
            if not member.name.endswith(".jsonl") or "data/" not in member.name:
                continue
            file = archive.extractfile(member)
            assert file is not None
            rows = [json.loads(line) for line in file.read().decode().splitlines()][:pairs]
            good, bad = (scores([row[f"sentence_{side}"] for row in rows]) for side in ("good", "bad"))
            found[Path(member.name).stem] = float(np.mean([a > b for a, b in zip(good, bad, strict=True)]))
    return {"mean": float(np.mean(list(found.values()))), "paradigms": len(found), "each": found}


@torch.inference_mode()
def _causal_scores(model: CausalLM, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """Nats of each text as a document of its own, its end included, negated."""
    encoded = tokenizer.encode_documents(texts)
    order, found = sorted(range(len(texts)), key=lambda n: len(encoded[n])), [0.0] * len(texts)
    for first in range(0, len(texts), 64):
        documents = [encoded[n] for n in order[first:first + 64]]
        width = max(map(len, documents))
        ids = torch.zeros(len(documents), width, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, document in enumerate(documents):
            ids[row, :len(document)] = torch.from_numpy(document.astype(np.int64))
            labels[row, :len(document) - 1] = ids[row, 1:len(document)]
        for n, loss in zip(order[first:first + 64], model.loss_rows(ids, labels)[1].tolist(), strict=True):
            found[n] = -loss
    return found


@torch.inference_mode()
def _masked_scores(model: MaskedLM, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """The pseudo-log-likelihood of each text: the sum over its tokens, each hidden once."""
    cls, sep, mask = (tokenizer.token_id(part) for part in ("cls", "sep", "mask"))
    assert cls is not None and sep is not None and mask is not None
    encoded = [[cls, *tokenizer.encode(text), sep] for text in texts]

    def losses(part: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
        ids, seen = _filled(encoded, part, sep)
        labels = torch.full_like(ids, IGNORED)
        for row, (_, place) in enumerate(part):
            labels[row, place], ids[row, place] = ids[row, place].clone(), mask
        found: npt.NDArray[np.float32] = model.loss_rows(ids, labels, attention_mask=seen)[1].float().numpy()
        return found

    return _each_once(encoded, losses, between=1)


@torch.inference_mode()
def _restored_scores(model: Seq2SeqLM, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """The same by an encoder-decoder that learnt from spans: each token taken out once, and written behind its sentinel."""
    first, end = int(Vocabulary.of(tokenizer).sentinels[0]), tokenizer.eos_id
    assert end is not None
    encoded = [[*tokenizer.encode(text), end] for text in texts]

    def losses(part: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
        ids, seen = _filled(encoded, part, end)
        labels = torch.full((len(part), 2), first)
        for row, (_, place) in enumerate(part):
            labels[row, 1], ids[row, place] = ids[row, place].clone(), first
        found: npt.NDArray[np.float32] = model.loss_rows(ids, labels, attention_mask=seen)[1].float().numpy()
        return found

    return _each_once(encoded, losses, between=0)


def _each_once(encoded: list[list[int]], losses: Any, *, between: int) -> list[float]:
    """The negated sum of the losses of a text's tokens, without `between` in front and one behind. Copies of many texts go
    through the model together, those of like length side by side."""
    copies = [(number, place) for number in sorted(range(len(encoded)), key=lambda n: len(encoded[n]))
              for place in range(between, len(encoded[number]) - 1)]
    found = np.zeros(len(encoded))
    for first in range(0, len(copies), COPIES):
        part = copies[first:first + COPIES]
        np.subtract.at(found, [number for number, _ in part], losses(part))
    return [float(value) for value in found]


def _filled(encoded: list[list[int]], part: list[tuple[int, int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids of the texts of a part, and 1 where there is text."""
    width = max(len(encoded[number]) for number, _ in part)
    ids, seen = torch.full((len(part), width), filler), torch.zeros(len(part), width, dtype=torch.int64)
    for row, (number, _) in enumerate(part):
        ids[row, :len(encoded[number])], seen[row, :len(encoded[number])] = torch.tensor(encoded[number]), 1
    return ids, seen


# -- storing and showing -----------------------------------------------------------------------------------------------


def store(cell: dict[str, Any], path: Path = STORED) -> None:
    """Add a cell; one of the same row, seed and budget is replaced."""
    cells = json.loads(path.read_text()) if path.exists() else []
    same = ("row", "seed", "budget")
    cells = [old for old in cells if any(old[name] != cell[name] for name in same)]
    path.write_text(json.dumps(sorted([*cells, cell], key=lambda c: [str(c[name]) for name in same]), indent=1) + "\n")


def table(path: Path = STORED) -> str:
    """What is stored, the mean of the seeds with the smallest and the largest."""
    cells = json.loads(path.read_text()) if path.exists() else []
    lines = []
    for row in quality_tasks.CELLS:
        if of := [cell for cell in cells if cell["row"] == row and cell["budget"] != "quick"]:
            lines.append([row, "see the row", str(len(of)), "", quality_tasks.summary(row, of)])
    for row in ROWS:
        for budget in sorted({cell["budget"] for cell in cells if cell["row"] == row}):
            of = [cell for cell in cells if cell["row"] == row and cell["budget"] == budget]
            say_of = {
                "loss": [c["loss"] for c in of if "loss" in c], "unigram": [c["unigram"] for c in of if "unigram" in c],
                "bigram both ways": [c["bigram_both_ways"] for c in of if "bigram_both_ways" in c],
                "pairs told apart": [c["pairs_right"] for c in of if "pairs_right" in c],
                "AUC": [c["auc"] for c in of if "auc" in c], "BLiMP": [c["blimp"]["mean"] for c in of if "blimp" in c]}
            shown = "; ".join(f"{name} {mean_words(values)}" for name, values in say_of.items() if values)
            lines.append([row, budget, str(len(of)), f"{of[0]['parameters']:,}", shown])
    return grid(["row", "budget", "seeds", "parameters", "measured"], lines)


def main() -> None:
    """Run one cell, or show the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[*ROWS, *quality_tasks.CELLS, "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="20min", help="of pretraining; a row of a task has its own, `quick` is a look at it")
    parser.add_argument("--data", type=Path, help="another text than the shared books; the cell is shown and not stored")
    options = parser.parse_args()
    if options.row == "table":
        print(table())
        return
    cell = run_cell(options.row, options.seed, options.budget, options.data)
    if options.data is None and options.budget != "quick":
        store(cell)
    say(json.dumps({name: value for name, value in cell.items() if name != "machine"}, indent=1))


if __name__ == "__main__":
    main()
