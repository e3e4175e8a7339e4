"""Every objective that learns from rows, with each of its options: the loss is what its definition says, in plain float64;
micro-batches, chunks and rows that are packed change nothing; and what it measures are numbers."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws.rows import small
from threefold.config import Recipe
from threefold.data.examples import Examples, Item, Text
from threefold.data.loader import IGNORED, Batch
from threefold.errors import ConfigError, DataError, NumericError
from threefold.model.build import build_model
from threefold.model.families import FAMILIES
from threefold.objectives import embed
from threefold.objectives.classify import Classify
from threefold.objectives.instruct import plain_template
from threefold.objectives.preference import Dpo
from threefold.objectives.rows import Fit, RowObjective, filler
from threefold.objectives.tasks import TASKS, head_of
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row
from threefold.text.tokenizer import Tokenizer
from threefold.training.gradients import accumulate

CONTEXT = 96
SUMS = 1e-12  # float64 sums in another order, relative to the largest
COLOURS = ("red", "green", "blue")
TEXT = [f"there are {n} {colour} bottles standing on the wall of a house" for n in range(12) for colour in COLOURS]
Rows = list[dict[str, Any]]


def said(n: int) -> str:
    return " ".join(["red", "on", "the", "wall"][: n % 4 + 1])


LABELLED = [{"text": f"{n} {said(n)}", "label": COLOURS[n % 5 % 3]} for n in range(8)]
ROWS: dict[str, tuple[str, str, dict[str, Any], Rows]] = {
    "classify": ("classify", "bert", {}, LABELLED),
    "classify-decoder": ("classify", "qwen3", {}, LABELLED),
    "classify-pairs": ("classify", "bert", {}, [{**row, "text_pair": said(n + 2)} for n, row in enumerate(LABELLED)]),
    "classify-weights": ("classify", "bert", {"finetune.class_weights": True}, LABELLED),
    "classify-several": ("classify", "bert", {}, [{**row, "label": list(COLOURS[:n % 4])} for n, row in enumerate(LABELLED)]),
    "classify-value": ("classify", "bert", {}, [{**row, "label": n / 3} for n, row in enumerate(LABELLED)]),
    "classify-counts": ("classify", "bert", {"finetune.kind": "value"}, [{**row, "label": n} for n, row in enumerate(LABELLED)]),
    "classify-outside": ("classify", "bert", {"finetune.outside": "blue"}, LABELLED),
    "tag": ("tag", "bert", {}, [{"tokens": said(n).split(), "tags": ["O", "B-A", "I-A", "O"][:n % 4 + 1]} for n in range(8)]),
    "instruct": ("instruct", "qwen3", {}, [{"instruction": said(n), "output": said(n + 1)} for n in range(6)]),
    "instruct-turns": ("instruct", "qwen3", {}, [{"messages": [
        {"role": role, "content": said(n + at)} for at, role in enumerate(("system", "user", "assistant", "user", "assistant"))]} for n in range(4)]),
    "seq2seq": ("seq2seq", "t5", {"objective.smoothing": 0.1}, [{"source": said(n), "target": said(n + 1)} for n in range(6)]),
    "seq2seq-decoder": ("seq2seq", "qwen3", {}, [{"source": said(n), "target": said(n + 1)} for n in range(6)]),
    "embed": ("embed", "bert", {}, [{"query": f"{n} {said(n)}", "positive": f"{said(n)} {n}"} for n in range(6)]),
    "embed-negatives": ("embed", "bert", {}, [{"query": f"{n}", "positive": f"{said(n)} {n}", "negative": f"{n} {said(n)}"} for n in range(6)]),
    "embed-scores": ("embed", "bert", {}, [{"text_a": f"{n}", "text_b": said(n), "score": n % 3} for n in range(6)]),
    "embed-dims": ("embed", "bert", {"finetune.dims": ("16", "32")}, [{"query": f"{n}", "positive": said(n)} for n in range(4)]),
    "embed-encoder": ("embed", "t5", {}, [{"query": f"{n}", "positive": f"{n} {said(n)}"} for n in range(4)]),
    "reward": ("reward", "qwen3", {}, [{"prompt": f"{n}", "chosen": f"{said(n)} {n}", "rejected": f"{n}"} for n in range(4)]),
    "dpo": ("dpo", "qwen3", {"finetune.beta": 0.7}, [{"prompt": f"{n}", "chosen": f"{said(n)} {n}", "rejected": f"{n}"} for n in range(4)]),
    "dpo-ipo": ("dpo", "qwen3", {"finetune.ipo": True}, [{"prompt": f"{n}", "chosen": f"{n} {n}", "rejected": f"{n}"} for n in range(4)]),
    "dpo-flipped": ("dpo", "qwen3", {"finetune.flipped": 0.2}, [{"prompt": f"{n}", "chosen": f"{n}", "rejected": "wall"} for n in range(4)]),
}
each = pytest.mark.parametrize("name", ROWS)


@functools.cache
def words_of(family: str) -> PretrainedTokenizer:
    """A small tokenizer of the family's kind, with a plain chat template where it can have one."""
    kind = FAMILIES[family].tokenizer
    core = Tokenizer.train(kind, TEXT, 300)
    with tempfile.TemporaryDirectory() as folder:
        core.save(Path(folder))
        words = PretrainedTokenizer.load(Path(folder))
    words.chat_template = plain_template(words)
    return words


@dataclasses.dataclass
class Case:
    model: Any
    objective: RowObjective
    examples: Examples
    batch: Batch


def a_model(family: str, words: PretrainedTokenizer, task: str, classes: int, seed: int) -> Any:
    ids = {"pad_token_id": words.pad_token_id if family == "t5" else None, "eos_token_id": words.eos_id,
           "decoder_start_token_id": words.pad_token_id if family == "t5" else None}
    model = build_model(small(family, vocab_size=len(words), **ids), 0, dtype=torch.float64, task=task, classes=classes)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2 + (p.ndim == 1))
    return model.eval()


def case(name: str, rows: Rows | None = None, **more: Any) -> Case:
    task, family, options, usual = ROWS[name]
    words, head = words_of(family), head_of(task, FAMILIES[family])
    recipe = Recipe().override({"finetune.task": task, "model.from": "x", **options, **more})
    objective = TASKS[task].make(recipe, words, Fit(CONTEXT), head)
    table = [Row(fields, f"rows:{n}") for n, fields in enumerate(rows or usual)]
    objective.learn(table)
    items = objective.items(table)
    labels = getattr(objective, "labels", ())
    model = a_model(family, words, head, max(1, len(labels)), 1)
    if isinstance(objective, Dpo):
        objective.reference = a_model(family, words, head, 1, 2)
    if getattr(objective, "pooling", "") == "auto":
        objective.pooling = "mean"  # type: ignore[attr-defined]
    examples = Examples(items, len(items), 0, pad=filler(words), vocab_size=len(words))
    return Case(model, objective, examples, examples.collate(range(len(items)), [0] * len(items)))


def loss_of(found: Case, batch: Batch) -> tuple[float, float]:
    """Sum and weight of the one term."""
    (term,) = found.objective.terms(found.model, batch)
    (weight,) = found.objective.weights(batch).values()
    assert term.weight == weight
    return float(term.sum.detach()), float(weight)


# -- the loss is what its definition says ------------------------------------------------------------------------------


def alone(found: Case, ids: np.ndarray, types: np.ndarray | None = None, **more: Any) -> Any:
    """The model's answer to one text by itself."""
    given = {"token_type_ids": torch.from_numpy(types)[None]} if types is not None else {}
    with torch.no_grad():
        return found.model(torch.from_numpy(ids)[None], **given, **more)


def vector(found: Case, ids: np.ndarray) -> Tensor:
    with torch.no_grad():
        states: Tensor = found.model.hidden(torch.from_numpy(ids)[None])[0]
    return states.mean(0)


def log_probability(model: Any, ids: np.ndarray, labels: np.ndarray) -> float:
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    return sum(float(logits[at, label]) for at, label in enumerate(labels) if label != IGNORED)


def by_hand(name: str, found: Case) -> tuple[float, float]:
    """Sum and weight, item by item, from the words of the definition."""
    items, options = found.examples.items, ROWS[name][2]
    task = ROWS[name][0]
    total, weight = 0.0, 0.0
    if task == "classify":
        objective = found.objective
        assert isinstance(objective, Classify)
        names = [str(row["label"]) for row in ROWS[name][3]]
        for item in items:
            logits = alone(found, item.texts[0].ids, item.texts[0].types).logits[0]
            if objective.kind == "regression":
                value = float(torch.tensor(item.target, dtype=torch.float32))  # as it stands in a batch
                total, weight = total + float((logits[0] - value) ** 2), weight + 1
            elif objective.kind == "multi_label_classification":
                truth = torch.tensor(item.target, dtype=torch.float64)
                total += float(-(truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits)).mean())
                weight += 1
            elif item.target != -1:
                assert isinstance(item.target, int)
                share = len(names) / (len(set(names)) * names.count(objective.labels[item.target])) if options.get("finetune.class_weights") else 1
                total, weight = total - share * float(logits.log_softmax(-1)[item.target]), weight + share
        return total, weight
    if task in ("tag", "instruct") or name == "seq2seq-decoder":
        for item in items:
            labels = item.texts[0].labels
            assert labels is not None
            total, weight = total - log_probability(found.model, item.texts[0].ids, labels), weight + int((labels != IGNORED).sum())
        return total, weight
    if task == "seq2seq":
        for item in items:
            target = item.texts[0].labels
            assert target is not None
            written = torch.tensor([[found.model.config.decoder_start_token_id, *target[:-1]]])
            logs = alone(found, item.texts[0].ids, decoder_input_ids=written).logits[0].log_softmax(-1)
            for at, label in enumerate(target):
                total -= 0.9 * float(logs[at, label]) + 0.1 * float(logs[at].mean())
            weight += len(target)
        return total, weight
    if task == "embed":
        cuts = [int(dim) for dim in options.get("finetune.dims", ())] or [32]
        for cut in cuts:
            vectors = [[F.normalize(vector(found, text.ids)[:cut], dim=0) for text in item.texts] for item in items]
            if name == "embed-scores":
                cosine = [float(a @ b) / embed.TEMPERATURE for a, b in vectors]
                scores = [float(row["score"]) for row in ROWS[name][3]]
                gaps = [cosine[j] - cosine[i] for i in range(len(items)) for j in range(len(items)) if scores[i] > scores[j]]
                total += float(np.log1p(np.exp(gaps).sum()))
                continue
            answers = [(n, texts[1]) for n, texts in enumerate(vectors)] + [(-1, text) for texts in vectors for text in texts[2:]]
            for n, texts in enumerate(vectors):
                logits = torch.stack([texts[0] @ answer / embed.TEMPERATURE for _, answer in answers])
                total -= float(logits.log_softmax(0)[n])
        return total / len(cuts), 1.0 if name == "embed-scores" else float(len(items))
    for item in items:
        if task == "reward":
            chosen, rejected = (float(alone(found, text.ids).logits[0, 0]) for text in item.texts)
            total -= float(F.logsigmoid(torch.tensor(chosen - rejected, dtype=torch.float64)))
            continue
        objective = found.objective
        assert isinstance(objective, Dpo)
        gains = [log_probability(found.model, text.ids, text.labels) - log_probability(objective.reference, text.ids, text.labels)
                 for text in item.texts if text.labels is not None]
        beta, flipped = options.get("finetune.beta", 0.1), options.get("finetune.flipped", 0.0)
        apart = torch.tensor(gains[0] - gains[1], dtype=torch.float64)
        if options.get("finetune.ipo"):
            total += float((apart - 1 / (2 * beta)) ** 2)
        else:
            total -= float((1 - flipped) * F.logsigmoid(beta * apart) + flipped * F.logsigmoid(-beta * apart))
    return total, float(len(items))


@each
def test_the_loss_is_what_its_definition_says(name: str) -> None:
    found = case(name)
    assert loss_of(found, found.batch) == pytest.approx(by_hand(name, found), rel=1e-10)


# -- what changes nothing ----------------------------------------------------------------------------------------------


def gradients(found: Case, parts: list[Batch]) -> dict[str, Tensor]:
    found.model.zero_grad()
    accumulate(found.model, found.objective, parts, lambda part: {})
    return {name: p.grad.clone() for name, p in found.model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in b.values())
    assert largest > 0 and a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= SUMS * largest, name


@each
def test_N06_micro_batches_and_chunks_give_the_gradient_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = case(name)
    whole = gradients(found, [found.batch])
    if found.objective.unit == "batch":
        monkeypatch.setattr(embed, "CHUNK", 3)
        assert len(found.batch) > 3
        assert_same(gradients(found, [found.batch]), whole)
        return
    parts = list(found.batch.split(2))
    if name == "classify-outside":
        parts.sort(key=lambda part: -found.objective.weights(part)["rows"])
    assert len(parts) > 1
    assert_same(gradients(found, parts), whole)


@pytest.mark.parametrize("name", [name for name in ROWS if name in ("instruct", "instruct-turns", "seq2seq-decoder")])
def test_rows_that_are_packed_do_not_see_each_other(name: str) -> None:
    found = case(name)
    assert found.objective.packs
    items = found.examples.items
    packed = Examples(items, len(items), 0, pad=found.examples.pad, vocab_size=found.examples.vocab_size, room=2 * CONTEXT)
    names = list(range(len(items)))
    batch = packed._packed(items, names, packed._rows(items, names, packed.room))
    assert len(batch) < len(packed.items) and batch.documents is not None
    assert loss_of(found, batch) == pytest.approx(loss_of(found, found.batch), rel=1e-12)
    assert_same(gradients(found, [batch]), gradients(found, [found.batch]))


@each
def test_what_is_judged_are_figures(name: str) -> None:
    found = case(name)
    with torch.no_grad():
        judged = found.objective.judge(found.model, found.batch, found.examples.items)
    figures = found.objective.measure(judged)
    if found.objective.name == "instruct":
        assert judged == [] and figures == {}
        return
    assert len(judged) == len(found.examples.items)
    for key, value in figures.items():
        assert not isinstance(value, float) or np.isfinite(value), key


# -- answers that are no wrong ones ------------------------------------------------------------------------------------


def test_an_answer_is_not_kept_from_its_own_text_nor_from_that_of_the_same_query() -> None:
    rows: Rows = [{"query": "red", "positive": "wall"}, {"query": "green", "positive": "wall"}, {"query": "red", "positive": "house"},
                  {"query": "blue", "positive": "bottles"}]
    alike = embed._alike(case("embed", rows).batch.input_ids, 2)
    assert alike.tolist() == [[False, True, True, False], [True, False, False, False], [True, False, False, False], [False] * 4]
    rows = [{"query": "red", "positive": "wall", "negative": "house"}, {"query": "green", "positive": "house", "negative": "on"}]
    assert embed._alike(case("embed-negatives", rows).batch.input_ids, 3).tolist() == [[False] * 4, [False, False, True, False]]


# -- rows that teach nothing -------------------------------------------------------------------------------------------

PLAIN = [{"text": "a wall", "label": "red"}, {"text": "a house", "label": "blue"}]
BAD: dict[str, tuple[str, Rows, dict[str, Any], str]] = {
    "one score": ("embed-scores", [{"text_a": "a", "text_b": "b", "score": 1}] * 3, {}, "every row has the score 1"),
    "not finite": ("embed-scores", [{"text_a": "a", "text_b": "b", "score": s} for s in (1, "nan")], {}, "`score` should be a number"),
    "a value that is none": ("classify-counts", [*({"text": "a", "label": n} for n in range(3)), {"text": "b", "label": "many"}], {},
                             "rows:3: `label` should be a number"),
    "lists and names": ("classify", [{"text": "a", "label": ["red"]}, {"text": "b", "label": "red"}], {}, "other rows have a list"),
    "empty lists": ("classify", [{"text": "a", "label": []}] * 2, {}, "every list is empty"),
    "weights of lists": ("classify", [{"text": "a", "label": ["red"]}] * 2, {"finetune.class_weights": True}, "goes with one class a row"),
    "outside of values": ("classify", [{"text": "a", "label": n / 3} for n in range(4)], {"finetune.outside": "x"}, "goes with one class a row"),
    "some pairs": ("classify", [{**PLAIN[0], "text_pair": "b"}, PLAIN[1]], {}, "rows:1: the row has no `text_pair`"),
    "some negatives": ("embed", [{"query": "a", "positive": "b", "negative": "on"}, {"query": "wall", "positive": "red"}], {}, "no `negative`"),
    "kinds mixed": (
        "embed", [{"query": "a", "positive": "b"}, *({"text_a": "a", "text_b": "b", "score": n} for n in range(2))], {}, "all of one kind"),
    "one tag": ("tag", [{"tokens": ["a"], "tags": ["O"]}], {}, "nothing to tell apart"),
    "no question": ("instruct", [{"instruction": None, "input": "a", "output": "b"}], {}, "`instruction` should be a text"),
    "two answers": ("instruct", [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "assistant")]}], {},
                    "two messages of `assistant` follow each other"),
    "two questions": ("instruct", [{"messages": [{"role": r, "content": "a"} for r in ("user", "user", "assistant")]}], {}, "two messages of `user`"),
    "a late system": ("instruct", [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "system")]}], {}, "stands behind others"),
    "unknown role": ("instruct", [{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}], {}, "robot"),
    "too long": ("instruct", [{"instruction": "wall " * 200, "output": "b"}], {}, "and the model takes 96"),
    "alike once cut": ("dpo", [{"prompt": "a", "chosen": "wall " * 90 + "red", "rejected": "wall " * 90 + "blue"}], {"finetune.truncate": True},
                       "are the same tokens"),
    "an answer of spaces": ("dpo", [{"prompt": "a", "chosen": " ", "rejected": "b"}], {}, "`chosen` should be a text"),
}


@pytest.mark.parametrize("name", BAD)
def test_D07_rows_that_teach_nothing_are_refused(name: str) -> None:
    row, rows, options, words = BAD[name]
    task, family, _, _ = ROWS[row]
    recipe = Recipe().override({"finetune.task": task, "model.from": "x", **ROWS[row][2], **options})
    objective = TASKS[task].make(recipe, words_of(family), Fit(CONTEXT, recipe.finetune.truncate), head_of(task, FAMILIES[family]))
    table = [Row(fields, f"rows:{n}") for n, fields in enumerate(rows)]
    with pytest.raises(DataError, match=words):
        objective.learn(table)
        objective.items(table)


@pytest.mark.parametrize("row", ["instruct", "seq2seq-decoder", "dpo", "reward"])
def test_a_prompt_that_is_too_long_is_cut_so_that_the_answer_has_room(row: str) -> None:
    task, family, _, _ = ROWS[row]
    words, fit = words_of(family), Fit(CONTEXT, True)
    objective = TASKS[task].make(Recipe().override({"finetune.task": task, "model.from": "x"}), words, fit, head_of(task, FAMILIES[family]))
    long = "wall " * 200
    fields = {"instruct": {"instruction": long, "output": "red house"}, "seq2seq": {"source": long, "target": "red house"},
              "dpo": {"prompt": long, "chosen": "red house", "rejected": "blue"}}
    fields["reward"] = fields["dpo"]
    (item,) = objective.items([Row(fields[task], "rows:0")])
    for text, answer in zip(item.texts, ("red house", "blue"), strict=False):
        assert text.labels is not None and CONTEXT - 8 <= len(text.ids) <= CONTEXT
        assert answer in words.decode(text.labels[text.labels != IGNORED].tolist()), "all of the answer is there"
        assert "wall wall" in words.decode(text.ids.tolist())
    assert fit.cut == len(item.texts)
    if len(item.texts) == 2:
        starts = [text.ids[:int(np.flatnonzero(text.labels != IGNORED)[0])].tolist() for text in item.texts if text.labels is not None]
        assert starts[0] == starts[1], "both answers stand behind the same prompt"
    fit.context = 4
    with pytest.raises(DataError, match="even with its messages cut, and the model takes 4"):
        objective.items([Row(fields[task], "rows:0")])


def test_a_reward_that_is_cut_still_ends_where_it_is_judged() -> None:
    recipe = Recipe().override({"finetune.task": "reward", "model.from": "x"})
    objective = TASKS["reward"].make(recipe, words_of("t5"), Fit(CONTEXT, True), "classify")
    (item,) = objective.items([Row({"prompt": "a", "chosen": "wall " * 90, "rejected": "red"}, "rows:0")])
    assert len(item.texts[0].ids) == CONTEXT and item.texts[0].ids[-1] == words_of("t5").eos_id


def test_options_that_cannot_hold_are_refused() -> None:
    for options, words in (({"finetune.task": "embed", "finetune.dims": ("abc",)}, 'holds .{1,2}abc'),
                           ({"finetune.task": "embed", "finetune.dims": ("0",)}, "lengths of vectors"),
                           ({"finetune.task": "classify", "lora.rank": 2, "finetune.freeze": 1}, "all layers of the model stay"),
                           ({"finetune.task": "dpo", "lora.rank": 2, "finetune.add_tokens": ("<a>",)}, "would learn the new tokens too")):
        with pytest.raises(ConfigError, match=words):
            Recipe().override({"model.from": "x", **options})  # type: ignore[dict-item]


def test_D11_the_end_of_an_answer_is_learnt_and_what_fills_up_is_not() -> None:
    found = case("instruct-turns")
    end, begin = words_of("qwen3").eos_id, words_of("qwen3").core.opening
    for item in found.examples.items:
        ids, labels = item.texts[0].ids, item.texts[0].labels
        assert labels is not None
        learnt = labels[labels != IGNORED]
        assert (learnt == end).sum() == 2, "each of the two answers ends"
        assert sum(int((ids == first).sum()) for first in begin) in (0, 1) or end in begin
        at = np.flatnonzero(labels != IGNORED)
        assert np.array_equal(ids[at + 1], learnt), "a label is the token that follows"
    mask = found.batch.attention_mask
    assert mask is not None and bool((found.batch.labels[mask == 0] == IGNORED).all())


def test_N05_nothing_to_judge_is_an_error() -> None:
    from threefold.objectives.heldout_rows import HeldOutRows

    rows: Rows = [{"text": "a wall", "label": "blue"}, {"text": "a house", "label": "blue"}]
    found = case("classify-outside")
    table = [Row(fields, f"rows:{n}") for n, fields in enumerate(rows)]
    outside = Examples(found.objective.items(table), 2, 0, pad=0, vocab_size=found.examples.vocab_size)
    with pytest.raises(NumericError, match="nothing to judge"):
        HeldOutRows(found.model, found.objective, outside)(None)


@pytest.mark.parametrize("row", ["classify", "seq2seq", "dpo", "embed"])
def test_held_out_rows_take_less_at_once_where_memory_runs_out(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from threefold.objectives.heldout_rows import HeldOutRows

    found = case(row)
    examples = Examples(found.examples.items, 4, 0, pad=found.examples.pad, vocab_size=found.examples.vocab_size)
    held, terms = HeldOutRows(found.model, found.objective, examples), found.objective.terms
    whole = held(None)

    def full(model: Any, batch: Batch, **context: Any) -> Any:
        if len(set(batch.samples.tolist())) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return terms(model, batch, **context)
    monkeypatch.setattr(found.objective, "terms", full)
    if row == "embed":  # its loss is that of a whole batch
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            held(None)
        return
    again = held(None)
    assert examples.size == 2 and again["loss"] == pytest.approx(whole["loss"], rel=1e-5) and again["tokens"] == whole["tokens"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Which rows of 40 were written, of which the first are the longest."""
    from threefold.objectives.heldout_rows import HeldOutRows

    rows = [{"source": "wall " * (1 + n % 9), "target": f"{n}"} for n in range(40)]
    found = case("seq2seq", rows)
    examples = Examples(found.examples.items, 8, 0, pad=found.examples.pad, vocab_size=found.examples.vocab_size)
    seen: list[int] = []

    def judge(model: Any, batch: Batch, items: Any) -> list[Any]:
        seen.extend(int(item.source.split(":")[1]) for item in items)
        return []
    monkeypatch.setattr(found.objective, "judge", judge)

    def of(written: int | None) -> list[int]:
        seen.clear()
        HeldOutRows(found.model, found.objective, examples, written=written)(None)
        return list(seen)
    return of


def test_texts_are_written_for_rows_that_were_drawn_and_not_for_the_shortest(drawn: Callable[[int | None], list[int]]) -> None:
    assert sorted(drawn(None)) == list(range(40))
    few = drawn(16)
    assert len(few) == 16 and few == drawn(16)
    assert len({n % 9 for n in few}) > 5, "texts of many lengths"


# -- rows that are packed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "room", "expected"), [
    ([100] + [20] * 10, 1024, (3, 100)),          # short ones beside each other, as wide as the longest
    ([100, 60, 60, 60, 60, 60, 60], 1024, (3, 180)),  # two would leave a third of each row
    ([30, 30, 30], 1024, (3, 30)),
    ([30, 30, 30], 16, (3, 30)),                  # longer than there is room: as long as it is
])
def test_rows_are_as_narrow_as_is_good(lengths: list[int], room: int, expected: tuple[int, int]) -> None:
    items = [Item((Text(np.arange(length), labels=np.arange(length)),), source=str(n)) for n, length in enumerate(lengths)]
    batch = Examples(items, len(items), 0, pad=0, vocab_size=200, room=room).batch(0)
    assert batch.input_ids.shape == expected
    assert int((batch.labels != -100).sum()) == sum(lengths)
