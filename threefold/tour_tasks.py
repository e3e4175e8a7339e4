"""What the three models of the tour are then taught, from what Python says of its own functions, classes and methods: the decoder
to answer questions, the encoder to classify and to find, the encoder-decoder to summarise.

    entries -> rows of a task -> fine-tuning -> a figure before and after, on modules that were held out

Decisions:
- Source is parsed and never imported. Whole modules are held out of what is taught, by a hash of their name; the models have read some
  of them before, as running text.
- Each figure stands beside what needs no model: the most frequent answer, chance, or the first sentence of what is summarised.
- A model of a minute writes no summary worth reading. It chooses one: the sentence of the text that it finds likeliest as its summary.
"""

from __future__ import annotations

import ast
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold import console, files
from threefold.config import Recipe

MOST, HELD = 3000, 200  # rows to learn from, and to judge
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}


@dataclass(frozen=True)
class Entry:
    """One thing that documents itself: `name` within its module, its `kind` (function, class, method), the first line of what it
    says, and the rest."""

    module: str
    name: str
    kind: str
    summary: str
    rest: str


@dataclass(frozen=True)
class Lesson:
    """A task: which model is taught, the name of the figure that tells how well, the learning rate of Muon, and its rows."""

    run: str
    task: str
    figure: str
    title: str
    rate: float
    rows: Callable[[Entry], list[dict[str, str]]]


def _questions(entry: Entry) -> list[dict[str, str]]:
    return [{"instruction": f"Is {entry.module}.{entry.name} a function, a class or a method?", "output": f"a {entry.kind}"},
            {"instruction": f"What does {entry.module}.{entry.name} do?", "output": entry.summary}]


LESSONS: dict[str, Lesson] = {
    "assistant": Lesson("decoder", "instruct", "exactly_right", "The decoder answers questions about Python", 0.01, _questions),
    "classifier": Lesson("encoder", "classify", "accuracy", "The encoder tells what a docstring describes", 0.005,
                         lambda e: [{"text": f"{e.summary} {e.rest}", "label": e.kind}]),
    "finder": Lesson("encoder", "embed", "accuracy_at_1", "The encoder finds what a name does", 0.005,
                     lambda e: [{"query": re.sub(r"[._]+", " ", e.name), "positive": e.summary}]),
    "summariser": Lesson("seq2seq", "seq2seq", "rouge_l", "The encoder-decoder chooses the sentence that sums a docstring up", 0.01,
                         lambda e: [{"source": e.rest, "target": e.summary}] if len(e.rest) > 80 else []),
}


# -- rows --------------------------------------------------------------------------------------------------------------


def entries(texts: Iterator[tuple[str, str]]) -> Iterator[Entry]:
    """What documents itself in (name of a file, its source)."""
    for name, source in texts:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield from _inside(module, "", tree)


def _inside(module: str, before: str, node: ast.AST) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        kind = KINDS.get(type(child))
        if kind is None or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        kind = "method" if before and kind == "function" else kind
        said = (ast.get_docstring(child) or "").strip().split("\n\n", 1)
        summary = " ".join(said[0].split())
        if 12 <= len(summary) <= 160:
            yield Entry(module, before + child.name, kind, summary, " ".join(" ".join(said[1:]).split())[:400])
        if isinstance(child, ast.ClassDef):
            yield from _inside(module, f"{child.name}.", child)


def write_rows(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The rows of each lesson: a file to learn from and one to judge by."""
    from threefold.text.sources import read_documents

    files.make_dirs(folder)
    found = list(entries((document.name, document.text) for document in read_documents("python") if document.name.endswith(".py")))
    paths = {}
    for name, lesson in LESSONS.items():
        sides: dict[bool, list[dict[str, str]]] = {False: [], True: []}
        said: set[str] = set()
        for entry in sorted(found, key=lambda e: zlib.crc32(f"{e.module}.{e.name}".encode())):
            for row in lesson.rows(entry):
                if (asked := next(iter(row.values()))) not in said:  # once, whatever is answered: it stands on one side
                    said.add(asked)
                    sides[zlib.crc32(entry.module.encode()) % 8 == 0].append(row)
        paths[name] = folder / f"{name}.jsonl", folder / f"{name}.held.jsonl"
        for path, rows in zip(paths[name], (sides[False][:MOST], sides[True][:HELD]), strict=True):
            files.write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return paths


# -- before, taught, after ---------------------------------------------------------------------------------------------


def teach(out: Path, seconds: float, *, fresh: bool) -> dict[str, dict[str, Any]]:
    """Every lesson within `seconds` in all; of each `title`, `figure`, `before`, `after`, `without` a model, and `said`
    [(what was asked, answer)]."""
    paths = write_rows(out / "rows")
    results: dict[str, dict[str, Any]] = {}
    for name, lesson in LESSONS.items():
        learnt, held = paths[name]
        rows = [json.loads(line) for line in held.read_text(encoding="utf-8").splitlines()]
        before = _figure(lesson, out / lesson.run, rows, held, untaught=True)
        _finetuned(lesson, out, name, learnt, held, seconds / len(LESSONS), fresh=fresh)
        after = _figure(lesson, out / name, rows, held)
        results[name] = {"title": lesson.title, "figure": lesson.figure, "before": before, "after": after, "without": _without(lesson, rows),
                         "said": _said(lesson, out / name, rows)}
        words = {key: f"{results[name][key]:.3f}" for key in ("before", "after", "without")}
        console.say(f"\n{lesson.title}: {lesson.figure.replace('_', ' ')} {words['before']} before, {words['after']} after "
                    f"({words['without']} without a model)")
        for asked, answer in results[name]["said"]:
            console.say(f"> {asked}   {answer}")
    return results


def _finetuned(lesson: Lesson, out: Path, name: str, learnt: Path, held: Path, seconds: float, *, fresh: bool) -> None:
    from threefold.finetune import finetune
    from threefold.stage import Request

    recipe = Recipe().override({
        "finetune.task": lesson.task, "model.from": str(out / lesson.run), "data.paths": (str(learnt),), "finetune.val": str(held),
        "finetune.truncate": True, "finetune.optimizer": "muon", "train.budget": round(seconds, 1), "train.learning_rate": lesson.rate})
    finetune(recipe, Request(out=out / name, fresh=fresh and (out / name / "log.jsonl").exists()))


def _figure(lesson: Lesson, run: Path, rows: list[dict[str, str]], held: Path, *, untaught: bool = False) -> float:
    """How well a model does; an untaught one without a head for classes is asked which of their names fits."""
    from threefold.evaluation import metrics
    from threefold.scoring import score

    if lesson.task == "classify" and untaught:
        return _named(run, rows)
    if lesson.task == "instruct":
        asked = [row for row in rows if row["instruction"].startswith("Is ")][:HELD // 2]
        return sum(a == row["output"] for a, row in zip(answers(run, [row["instruction"] for row in asked]), asked, strict=True)) / len(asked)
    if lesson.task == "seq2seq":
        return float(metrics.of_texts(_summaries(run, rows), [row["target"] for row in rows])[lesson.figure])
    return float(score(str(run), [str(held)], task=lesson.task)[lesson.figure])


def _summaries(run: Path, rows: list[dict[str, str]]) -> list[str]:
    """The sentence of each text that a model finds likeliest as its summary."""
    from threefold.tasks import pipeline

    found = pipeline("summarization", model=str(run), truncation=True)([row["source"] for row in rows], sentences=1)
    return [str(one["summary_text"]) for one in found]


def _named(run: Path, rows: list[dict[str, str]]) -> float:
    from threefold.tasks import pipeline

    judge = pipeline("zero-shot-classification", model=str(run))
    found = judge([row["text"] for row in rows], candidate_labels=sorted({row["label"] for row in rows}), hypothesis_template="This is a {}.",
                  truncation=True)
    right: int = sum(one["labels"][0] == row["label"] for one, row in zip(found, rows, strict=True))
    return right / len(rows)


def _without(lesson: Lesson, rows: list[dict[str, str]]) -> float:
    from threefold.evaluation import metrics
    from threefold.text.sentences import sentences

    if lesson.task == "embed":
        return 1 / len(rows)
    if lesson.task == "seq2seq":
        firsts = [sentences(row["source"])[0] for row in rows]
        return float(metrics.of_texts(firsts, [row["target"] for row in rows])[lesson.figure])
    said = [row["label"] for row in rows] if lesson.task == "classify" else [r["output"] for r in rows if r["instruction"].startswith("Is ")]
    return max(Counter(said).values()) / len(said)


def _said(lesson: Lesson, run: Path, rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """A few held-out rows, and what the model says of them."""
    from threefold.tasks import pipeline

    if lesson.task == "instruct":
        asked = [row["instruction"] for row in rows[:3]]
        return list(zip(asked, answers(run, asked), strict=True))
    if lesson.task == "classify":
        judge = pipeline("text-classification", model=str(run))
        return [(row["text"][:100], str(judge(row["text"], truncation=True)[0]["label"])) for row in rows[:3]]
    if lesson.task == "embed":
        from threefold.auto import load

        vectors = load(run)[0].encode([row[side] for side in ("query", "positive") for row in rows])
        near = (vectors[:len(rows)] @ vectors[len(rows):].T).argmax(1)
        return [(row["query"], rows[int(n)]["positive"]) for row, n in list(zip(rows, near, strict=True))[:3]]
    return list(zip((row["source"][:100] for row in rows), _summaries(run, rows[:3]), strict=False))


def answers(run: Path, questions: list[str]) -> list[str]:
    """What a model answers to each question, in the turn of a chat."""
    from threefold.auto import load
    from threefold.objectives.instruct import plain_template
    from threefold.tasks import pipeline

    model, tokenizer = load(run)
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    speaker = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False, max_new_tokens=24, do_sample=False)
    said = speaker([[{"role": "user", "content": question}] for question in questions])
    return [one[0]["generated_text"].strip() for one in said]
