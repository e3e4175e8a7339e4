"""Every task through the whole of `finetune`, from every family that has a head for it: rows in, a directory out that
transformers opens and that says the same there."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import threefold
from tests.test_pretrain import LINES, lines, stopped_after
from threefold.auto import AutoTokenizer
from threefold.config import Recipe
from threefold.errors import CheckpointError, ConfigError, DataError, ModelError, ThreefoldError, UsageError
from threefold.finetune import depth_of, dry_run, finetune
from threefold.hub import missing
from threefold.model.families import FAMILIES
from threefold.model.grow import resized
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.model.weights import load_model
from threefold.objectives.tasks import TASKS, head_of
from threefold.pretrain import pretrain
from threefold.scoring import score
from threefold.stage import Request
from threefold.task_rows import check, task_rows

FOUNDATIONS = {"bert": "masked", "roberta": "masked", "electra": "replaced", "t5": "span", "transformer": "seq2seq"}  # the others: causal
COLOURS = ("red", "green", "blue")
COLOURS_SORTED = tuple(sorted(COLOURS))
ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"{n} {COLOURS[n % 3]} bottles on the wall", "label": COLOURS[n % 3]} for n in range(40)],
    "tag": [{"tokens": ["there", "are", str(n), "green", "bottles"], "tags": ["O", "O", "B-NUMBER", "O", "B-THING"]} for n in range(40)],
    "instruct": [{"instruction": f"how many after {n}?", "output": f"there are {n + 1}."} for n in range(40)],
    "seq2seq": [{"source": f"{n} green bottles", "target": f"there are {n}"} for n in range(40)],
    "embed": [{"query": f"{n} bottles", "positive": f"there are {n} green bottles", "negative": f"{n + 1} on the wall"} for n in range(40)],
    "reward": [{"prompt": f"count {n}", "chosen": f"there are {n} bottles", "rejected": f"wall wall {n}"} for n in range(40)],
    "dpo": [{"prompt": f"count {n}", "chosen": f"there are {n} bottles", "rejected": f"wall wall {n}"} for n in range(40)],
}
CELLS = [(task, family) for task, row in TASKS.items() for family in FAMILIES if any(head in FAMILIES[family].heads for head in row.heads)]
CELLS.remove(("embed", "transformer"))  # its body writes too, and sentence-transformers opens no encoder of it
each = pytest.mark.parametrize("task, family", CELLS, ids=[f"{task}-{family}" for task, family in CELLS])


@pytest.fixture(scope="session")
def foundations(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of each family that has seen a page of text."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            (folder / "text.txt").write_text("".join(LINES), encoding="utf-8")
            pretrain(Recipe().override({
                "data.paths": (str(folder / "text.txt"),), "train.objective": FOUNDATIONS.get(family, "causal"), "model.family": family,
                "model.size": "nano",
                "model.context": 64, "train.batch_tokens": 128, "train.steps": 2, "train.dtype": "float32", "tokenizer.vocab_size": 500,
            }), Request(out=folder / "run"))
            made[family] = folder / "run" / "model"
        return made[family]
    return of


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(task: str, origin: Path, data: Path, **more: Any) -> Recipe:
    return Recipe().override({"finetune.task": task, "model.from": str(origin), "data.paths": (str(data),), "train.dtype": "float32",
                              "finetune.rows": 8, "train.steps": 4, "train.eval_every": 2, **more})


@each
def test_a_run_ends_in_a_model_that_says_the_same_in_transformers(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, head = tmp_path / "run", head_of(task, FAMILIES[family])
    architecture = FAMILIES[family].heads[head].architecture
    result = finetune(recipe(task, foundations(family), written(tmp_path / "rows.jsonl", ROWS[task])), Request(out=run))
    assert result["step"] == 4 and (run / "report.html").is_file() and np.isfinite(result["loss"])
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == [architecture]
    theirs = getattr(transformers, architecture).from_pretrained(run / "model").eval()
    ours, tokenizer = load_model(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert not ours.notes
    encoded = tokenizer(["there are 12 green bottles", "12"], padding=True, return_tensors="pt")
    if head == "seq2seq":
        encoded["decoder_input_ids"] = encoded["input_ids"]
    with torch.no_grad():
        a, b = theirs(**encoded), ours(**encoded)
    first, second = (x.last_hidden_state if task == "embed" else x.logits for x in (a, b))
    seen = encoded["attention_mask"].bool() if first.ndim == 3 else slice(None)
    assert float((first[seen] - second[seen]).abs().max()) < 1e-5 * max(1.0, float(first.abs().max()))
    if task in ("classify", "tag"):
        assert theirs.config.id2label == dict(enumerate(ours.labels)) and len(ours.labels) == 3


@each
def test_a_run_that_was_interrupted_ends_the_same(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    data, origin = written(tmp_path / "rows.jsonl", ROWS[task]), foundations(family)
    asked = recipe(task, origin, data, **{"train.save_every": 2, "train.steps": 6})
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finetune(asked, Request(out=whole))
    with stopped_after(5):
        finetune(asked, Request(out=halves))
    finetune(asked, Request(out=halves))
    assert (whole / "model/model.safetensors").read_bytes() == (halves / "model/model.safetensors").read_bytes()
    assert [line["loss"] for line in lines(whole) if "loss" in line] == [line["loss"] for line in lines(halves) if "loss" in line]


@each
def test_micro_batches_change_nothing(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    data, origin = written(tmp_path / "rows.jsonl", ROWS[task]), foundations(family)
    found = []
    for rows in (8, 2):
        run = tmp_path / str(rows)
        finetune(recipe(task, origin, data, **{"train.dtype": "float64", "train.micro_batch": rows, "train.steps": 3}), Request(out=run))
        found.append([line["loss"] for line in lines(run) if "loss" in line])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


@each
def test_with_lora_the_base_stays_and_an_adapter_is_left(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    origin, run = foundations(family), tmp_path / "run"
    before = (origin / "model.safetensors").read_bytes()
    finetune(recipe(task, origin, written(tmp_path / "rows.jsonl", ROWS[task]), **{"lora.rank": 4, "lora.dropout": 0.1}), Request(out=run))
    assert (origin / "model.safetensors").read_bytes() == before
    described = json.loads((run / "model" / "adapter_config.json").read_text())
    assert described["r"] == 4 and described["base_model_name_or_path"] == str(origin) and not (run / "model" / "config.json").exists()
    trained = {line["step"]: line["loss"] for line in lines(run) if "loss" in line}
    assert len(trained) == 4 and all(np.isfinite(loss) for loss in trained.values())


def test_a_checkpoint_of_an_adapter_holds_the_adapter_and_knows_its_base(foundations: Any, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(foundations("qwen3"), base)
    asked = recipe("instruct", base, written(tmp_path / "rows.jsonl", ROWS["instruct"]), **{"lora.rank": 2, "train.save_every": 2})
    finetune(asked, Request(out=run))
    saved = read_safetensors(run / "checkpoints" / "step-000004" / "model.safetensors")
    assert saved and all(".side." in name for name in saved)
    weights = read_safetensors(base / "model.safetensors")
    write_safetensors(base / "model.safetensors", {name: tensor * 1.01 for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match="another base"):
        finetune(asked.override({"train.steps": 6}), Request(out=run))


def test_the_weights_of_the_best_evaluation_are_left(foundations: Any, tmp_path: Path) -> None:
    """A rate that ruins the model: what is left is what it was at its best."""
    run = tmp_path / "run"
    finetune(recipe("embed", foundations("bert"), written(tmp_path / "rows.jsonl", ROWS["embed"]), **{
        "train.learning_rate": 0.5, "train.schedule": "linear", "train.steps": 8, "train.eval_every": 2, "train.keep": 9}), Request(out=run))
    seen = {line["step"]: line for line in lines(run) if line.get("event") == "evaluation" and not line["last"]}
    best = [line for line in lines(run) if line.get("event") == "best"]
    assert [line.get("weights_of") for line in lines(run) if line.get("event") == "evaluation" and line["last"]] == [
        best[0]["step"] if best else None]
    assert not best or f"the weights of step {best[0]['step']}" in (run / "model" / "README.md").read_text()
    criteria = {step: 1e-4 * line["val_loss"] - next(iter(line["metrics"].values())) for step, line in seen.items()}
    assert min(criteria, key=lambda step: criteria[step]) == (best[0]["step"] if best else 8)
    kept = load_model(run / "model")
    saved = read_safetensors(run / "checkpoints" / f"step-{best[0]['step'] if best else 8:06d}" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in kept.named_parameters() if name in saved)


# -- what goes wrong ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "wrong columns": ("classify", [{"words": "a", "label": "b"}] * 4, {}, "no `text`"),
    "one class": ("classify", [{"text": "a", "label": "b"}] * 4, {}, "nothing to tell apart"),
    "no label": ("classify", [{"text": "a", "label": None}, {"text": "b", "label": "c"}], {}, "expected the name of a class"),
    "empty text": ("classify", [{"text": " ", "label": "a"}, {"text": "b", "label": "c"}] * 4, {}, "should be a text"),
    "too long": ("classify", [{"text": "green bottles " * 60, "label": "a"}, {"text": "b", "label": "c"}] * 4, {}, "and the model takes 64"),
    "no answer": ("instruct", [{"messages": [{"role": "user", "content": "hi"}]}] * 4, {}, "no answer"),
    "empty answer": ("instruct", [{"instruction": "hi", "output": " "}] * 4, {}, "an answer is not empty"),
    "neither": ("instruct", [{"text": "hi"}] * 4, {}, "neither `messages` nor"),
    "equal sides": ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4, {}, "are the same"),
    "tags": ("tag", [{"tokens": ["a", "b"], "tags": ["O"]}] * 4, {}, "one tag a word"),
    "score": ("embed", [{"text_a": "a", "text_b": "b", "score": "high"}] * 4, {}, "should be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_do_not_fit_are_an_error_with_their_line(name: str, foundations: Any, tmp_path: Path) -> None:
    task, rows, more, words = BAD[name]
    family = "qwen3" if task in ("instruct", "dpo") else "bert"
    data = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=words) as caught:
        finetune(recipe(task, foundations(family), data, **more), Request(out=tmp_path / "run"))
    if name not in ("one class",):
        assert f"{data}:" in str(caught.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_an_unknown_label_in_held_out_rows_is_an_error(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    val = written(tmp_path / "val.jsonl", [{"text": "a", "label": "yellow"}])
    with pytest.raises(DataError, match="`yellow`|'yellow'"):
        finetune(recipe("classify", foundations("bert"), data, **{"finetune.val": str(val)}), Request(out=tmp_path / "run"))


def test_what_is_cut_is_counted(foundations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS["classify"], {"text": "green bottles " * 60, "label": "red"}]
    data = written(tmp_path / "rows.jsonl", rows)
    finetune(recipe("classify", foundations("bert"), data, **{"finetune.truncate": True}), Request(out=tmp_path / "run"))
    assert "1 texts were longer than 64 tokens" in capsys.readouterr().err


def test_a_family_without_the_head_is_refused(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["instruct"])
    with pytest.raises(ConfigError, match="needs a head for `causal`"):
        finetune(recipe("instruct", foundations("bert"), data), Request(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="needs a head for `encoder` or `body`"):
        finetune(recipe("embed", foundations("transformer"), written(tmp_path / "pairs.jsonl", ROWS["embed"])), Request(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="needs a model to start from"):
        Recipe().override({"finetune.task": "classify"})
    with pytest.raises(ConfigError, match="goes with rows"):
        Recipe().override({"lora.rank": 4})


POOLED = [("bert", "mean"), ("electra", "mean"), ("roberta", "cls"), ("t5", "mean"), ("qwen3", "last"), ("gpt2", "mean")]


@pytest.mark.parametrize("family, how", POOLED, ids=[f"{family}-{how}" for family, how in POOLED])
def test_a_classifier_over_pooled_states_opens_in_sentence_transformers(family: str, how: str, foundations: Any, tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    data, run, again = written(tmp_path / "rows.jsonl", ROWS["classify"]), tmp_path / "run", tmp_path / "again"
    asked = recipe("classify", foundations(family), data, **{"finetune.pooling": how, "train.save_every": 2})
    finetune(asked, Request(out=run))
    texts = ["there are 12 green bottles", "12 red"]
    ours = threefold.pipeline("text-classification", model=run)
    given = ours.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = ours.model(**given).logits.numpy()
    assert ours.model.how == how and not ours.model.notes and logits.shape == (2, 3)
    theirs = sentences.SentenceTransformer(str(run / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # padding is no state
        np.testing.assert_allclose(ours.model(**ours.tokenizer([texts[1]], return_tensors="pt")).logits.numpy()[0], logits[1], atol=1e-5)
    ours.model.save_pretrained(tmp_path / "saved")
    ours.tokenizer.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "model.safetensors", "modules.json", "2_Dense/model.safetensors", "2_Dense/config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (run / "model" / name).read_bytes(), name
    body = threefold.AutoModel.from_pretrained(run)
    assert body.pooling is None and torch.equal(body.transformer.embed.weight, ours.model.transformer.embed.weight)
    assert "library_name: sentence-transformers" in (run / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match="does it belong|expected"):
        threefold.AutoModelForSequenceClassification.from_pretrained(run, num_labels=5)
    assert score(str(run), [str(data)])["loss"] == pytest.approx(score(str(tmp_path / "saved"), [str(data)], task="classify")["loss"])

    with stopped_after(3):
        finetune(asked, Request(out=again))
    finetune(asked, Request(out=again))
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        assert (again / "model" / name).read_bytes() == (run / "model" / name).read_bytes()


@pytest.mark.parametrize("family", ["t5", "transformer", "qwen3"])
def test_rows_may_be_longer_than_what_was_pretrained_with(family: str, foundations: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rows = [{"source": f"{n} green bottles " * 30, "target": f"there are {n}"} for n in range(40)]
    asked, run = recipe("seq2seq", foundations(family), written(tmp_path / "rows.jsonl", rows)), tmp_path / "run"
    with pytest.raises(ThreefoldError, match="64"):
        finetune(asked, Request(out=run))
    with pytest.raises(ConfigError, match="was made for 64"):
        finetune(asked.override({"model.context": 512, "lora.rank": 2}), Request(out=run))
    result = finetune(asked.override({"model.context": 512}), Request(out=run))
    assert result["step"] == 4 and load_model(run / "model").config.max_position_embeddings == 512
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    encoded = tokenizer(["12 green bottles " * 30], return_tensors="pt")
    assert encoded["input_ids"].shape[1] > 64 and tokenizer.model_max_length == 512
    more = {"decoder_input_ids": encoded["input_ids"]} if family != "qwen3" else {}
    theirs = getattr(transformers, FAMILIES[family].heads[head_of("seq2seq", FAMILIES[family])].architecture).from_pretrained(run / "model").eval()
    with torch.no_grad():
        a, b = theirs(**encoded, **more).logits, load_model(run / "model")(**encoded, **more).logits
    assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(a.abs().max()))


def test_a_head_over_pooled_states_goes_on_or_is_left(foundations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = written(tmp_path / "rows.jsonl", ROWS["classify"]), tmp_path / "run"
    finetune(recipe("classify", foundations("bert"), data, **{"finetune.pooling": "mean"}), Request(out=run))
    stored = load_model(run / "model")
    same = load_model(run / "model", for_labels=COLOURS_SORTED)
    assert torch.equal(same.head.out.weight, stored.head.out.weight) and same.labels == stored.labels == COLOURS_SORTED  # type: ignore[union-attr]
    for changes in ({"for_labels": ("a", "b", "c")}, {"pooling": "cls", "for_labels": COLOURS_SORTED}):
        other = load_model(run / "model", task="classify", **changes)  # type: ignore[arg-type]
        assert not torch.equal(other.head.out.weight, stored.head.out.weight) and "it is left" in other.notes[-1]  # type: ignore[union-attr]
        assert other.labels == changes["for_labels"]
    for task in ("classify", "reward"):
        rows = written(tmp_path / f"{task}.jsonl", ROWS[task])
        with pytest.raises(ConfigError, match="judges pooled states"):
            finetune(recipe(task, run / "model", rows, **{"lora.rank": 2}), Request(out=tmp_path / "lora"))
    grown = resized(stored, vocab_size=stored.config.vocab_size + 3, context=32)
    assert grown.how == "mean" and torch.equal(grown.head.out.weight, stored.head.out.weight)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no other library"):
        recipe("classify", run / "model", data, **{"lora.rank": 2, "finetune.pooling": "mean"})
    with pytest.raises(ConfigError, match="needs a head for `classify`"):
        finetune(recipe("classify", foundations("transformer"), data, **{"finetune.pooling": "mean"}), Request(out=tmp_path / "marian"))
    (run / "model" / "2_Dense" / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="does it belong|expected"):
        load_model(run / "model")
    described = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**described, "classifier_pooling": "max"}))
    with pytest.raises(ModelError, match="`classifier_pooling` 'max'"):
        load_model(run / "model")
    (run / "model" / "config.json").write_text(json.dumps(described))
    shutil.rmtree(run / "model" / "2_Dense")  # as other programs fetch it: never a head at random
    assert missing(run / "model") == ["2_Dense/config.json", "2_Dense/model.safetensors"]
    with pytest.raises(ThreefoldError, match="2_Dense"):
        load_model(run / "model")


def test_every_task_has_a_cell() -> None:
    assert {task for task, _ in CELLS} == set(TASKS) == set(ROWS)


# -- how good it is on other rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, family", [("classify", "bert"), ("tag", "bert"), ("seq2seq", "t5"), ("embed", "bert"), ("reward", "qwen3"),
                                          ("instruct", "qwen3")])
def test_evaluate_says_of_rows_what_training_said(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    data, run = written(tmp_path / "rows.jsonl", ROWS[task]), tmp_path / "run"
    held = written(tmp_path / "held.jsonl", ROWS[task][:12])
    result = finetune(recipe(task, foundations(family), data, **{"finetune.val": str(held), "objective.smoothing": 0.1}), Request(out=run))
    found = score(str(run), [str(held)], task="instruct" if task == "instruct" else "")
    assert found["rows"] == 12 and found["task"] == task
    if task != "embed":  # whose loss depends on how many rows stand in a batch
        assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    for name, value in result.get("metrics", {}).items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("rank, kept", [(0, "config.json"), (2, "task.json")])
def test_refusals_are_measured_with_what_was_chosen(rank: int, kept: str, foundations: Any, tmp_path: Path) -> None:
    rows = [*ROWS["classify"], *({"text": f"wall {n} wall", "label": "none"} for n in range(20))]
    data, run = written(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    finetune(recipe("classify", foundations("bert"), data, **{
        "finetune.outside": "none", "data.val_fraction": 0.3, "lora.rank": rank}), Request(out=run))
    described = json.loads((run / "model" / kept).read_text())
    assert set(described["threefold"]) == {"temperature", "threshold", "outside"} and "none" not in described.get("label2id", {})
    found = score(str(run), [str(data)])
    assert 0 <= found["outside_recall"] <= 1 and 0 <= found["accuracy_with_refusals"] <= found["accuracy"]
    if not rank:
        pytest.importorskip("transformers").AutoModelForSequenceClassification.from_pretrained(run / "model")


def test_a_preference_run_is_judged_by_what_it_began_with(foundations: Any, tmp_path: Path) -> None:
    data, run, base = written(tmp_path / "rows.jsonl", ROWS["dpo"]), tmp_path / "run", tmp_path / "base"
    held = written(tmp_path / "held.jsonl", ROWS["dpo"][:12])
    shutil.copytree(foundations("qwen3"), base)
    result = finetune(recipe("dpo", base, data, **{"finetune.val": str(held), "train.learning_rate": 0.01}), Request(out=run))
    found = score(str(run), [str(held)], task="dpo")
    assert result["metrics"]["margin"] > 0 and found["margin"] == pytest.approx(result["metrics"]["margin"], rel=1e-4)
    assert score(str(run / "model"), [str(held)], task="dpo") == found
    with pytest.raises(UsageError, match="which model it began with"):
        score(str(shutil.copytree(run / "model", tmp_path / "alone")), [str(held)], task="dpo")


# -- from a model that had another task --------------------------------------------------------------------------------


def test_a_head_for_other_classes_is_left_and_one_for_the_same_goes_on(foundations: Any, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    finetune(recipe("classify", foundations("bert"), data), Request(out=tmp_path / "first"))
    first = load_model(tmp_path / "first" / "model")
    for labels, new in ((COLOURS, False), (("blue", "green", "wall"), True), (("a", "b"), True)):
        model = load_model(tmp_path / "first" / "model", task="classify", for_labels=tuple(sorted(labels)))
        assert torch.equal(model.transformer.embed.weight, first.transformer.embed.weight)
        assert any("a new one is learnt" in note for note in model.notes) == new
        if not new:
            assert torch.equal(model.head.out.weight, first.head.out.weight)  # type: ignore[union-attr]
    two = written(tmp_path / "two.jsonl", [{"text": row["text"], "label": "ab"[n % 2]} for n, row in enumerate(ROWS["classify"])])
    finetune(recipe("classify", tmp_path / "first", two), Request(out=tmp_path / "second"))
    assert "made for classify with the classes blue, green, red" in capsys.readouterr().err
    finetune(recipe("tag", tmp_path / "first", written(tmp_path / "tags.jsonl", ROWS["tag"])), Request(out=tmp_path / "third"))
    assert "it is left, and a new one is learnt" in capsys.readouterr().err
    finetune(recipe("reward", tmp_path / "second", written(tmp_path / "pairs.jsonl", ROWS["reward"])), Request(out=tmp_path / "fourth"))


def test_an_adapter_is_no_start_and_knows_its_base(foundations: Any, tmp_path: Path) -> None:
    base, run, data = tmp_path / "base", tmp_path / "run", written(tmp_path / "rows.jsonl", ROWS["classify"])
    shutil.copytree(foundations("bert"), base)
    finetune(recipe("classify", base, data, **{"lora.rank": 2}), Request(out=run))
    with pytest.raises(ConfigError, match="holds an adapter") as caught:
        finetune(recipe("classify", run, data), Request(out=tmp_path / "next"))
    assert "threefold export" in caught.value.hint
    threefold.load(run)
    weights = read_safetensors(base / "model.safetensors")
    write_safetensors(base / "model.safetensors", {name: tensor * 1.01 for name, tensor in weights.items()})
    with pytest.raises(ModelError, match="made beside other weights"):
        threefold.load(run)


# -- what is looked at before ------------------------------------------------------------------------------------------


def test_C06_a_dry_run_reads_all_rows_and_writes_nothing(foundations: Any, tmp_path: Path) -> None:
    data, run = written(tmp_path / "rows.jsonl", ROWS["classify"]), tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(recipe("classify", foundations("bert"), data), Request(out=run))
    assert (found["learnt"], found["held_out"], found["rows"], found["head"]) == (36, 4, 8, "classify")
    assert dry_run(recipe("classify", foundations("bert"), data)) == found and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match="no `text`"):
        dry_run(recipe("classify", foundations("bert"), written(tmp_path / "bad.jsonl", [{"words": "a", "label": "b"}])))


def test_D10_held_out_rows_that_are_learnt_too_are_counted(foundations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    held = written(tmp_path / "held.jsonl", [*ROWS["classify"][:3], {"text": "another wall", "label": "red"}])
    dry_run(recipe("classify", foundations("bert"), data, **{"finetune.val": str(held)}))
    assert "3 of 4 held-out rows stand among those that are learnt too" in capsys.readouterr().err


@pytest.mark.parametrize("task, fields", [("seq2seq", ("source", "target")), ("dpo", ("prompt", "chosen")), ("classify", ("text", "label")),
                                          ("embed", ("query", "positive"))])
def test_D10_rows_about_the_same_stand_on_one_side(task: str, fields: tuple[str, str], foundations: Any, tmp_path: Path) -> None:
    """Each text twice, with another answer; the two are never divided."""
    first, second = fields
    rows = [{**row, second: f"{row[second]}{again}"} for row in ROWS[task][:20] for again in ("", " wall") if task != "classify" or not again]
    rows = rows * 2 if task == "classify" else rows
    checked = check(recipe(task, foundations("qwen3"), written(tmp_path / "rows.jsonl", rows), **{"data.val_fraction": 0.3}))
    found = task_rows(recipe(task, foundations("qwen3"), tmp_path / "rows.jsonl", **{"data.val_fraction": 0.3}), checked.origin, checked.head, 64)
    sides = [{json.dumps(rows[int(item.source.rpartition(":")[2]) - 1][first]) for item in side} for side in (found.train, found.held)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_D10_a_question_stands_on_one_side_whatever_is_answered(foundations: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n} bottles?"}, {"role": "assistant", "content": f"{answer} walls"}]}
            for n in range(20) for answer in range(2)]
    asked = recipe("instruct", foundations("qwen3"), written(tmp_path / "rows.jsonl", rows), **{"data.val_fraction": 0.3})
    checked = check(asked)
    found = task_rows(asked, checked.origin, checked.head, 64)
    sides = [{rows[int(item.source.rpartition(":")[2]) - 1]["messages"][0]["content"] for item in side} for side in (found.train, found.held)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_what_is_cut_and_learnt_stands_in_the_log(foundations: Any, tmp_path: Path) -> None:
    rows = [*ROWS["classify"], {"text": "green bottles " * 60, "label": "red"}]
    finetune(recipe("classify", foundations("bert"), written(tmp_path / "rows.jsonl", rows), **{"finetune.truncate": True}),
             Request(out=tmp_path / "run"))
    plan = next(line for line in lines(tmp_path / "run") if line.get("decision") == "plan")
    assert plan["cut"] == 1 and plan["learnt"] + plan["held_out"] == 41
    assert "cut" in (tmp_path / "run" / "report.html").read_text()


def test_activations_are_dropped_where_it_is_asked_for(foundations: Any, tmp_path: Path) -> None:
    """Another loss on the way, none where texts are judged, and the same run from its beginning or from its middle."""
    data, seen = written(tmp_path / "rows.jsonl", ROWS["classify"]), {}
    for name, share in (("none", 0.0), ("some", 0.3)):
        asked = recipe("classify", foundations("bert"), data, **{"finetune.dropout": share, "train.steps": 4})
        finetune(asked, Request(out=tmp_path / name))
        seen[name] = [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
    assert seen["none"][0] != seen["some"][0] and len(seen["some"]) == 4
    with stopped_after(2):
        finetune(asked, Request(out=tmp_path / "parts"))
    finetune(asked, Request(out=tmp_path / "parts"))
    assert [line["loss"] for line in lines(tmp_path / "parts") if "loss" in line] == seen["some"]
    one = load_model(tmp_path / "some" / "model", task="classify").train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(ids).logits, one.eval()(ids).logits), "the directory says what its base said: nothing is dropped"


def test_what_is_frozen_stays_and_the_rest_moves(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    finetune(recipe("classify", foundations("bert"), data, **{"finetune.freeze": 1}), Request(out=tmp_path / "run"))
    folders = (foundations("bert"), tmp_path / "run" / "model")
    before, after = (dict(load_model(folder, task="classify", seed=0).named_parameters()) for folder in folders)
    still = {name for name in after if torch.equal(before[name], after[name])}
    frozen = {name for name in after if name.startswith(("transformer.embed", "transformer.encoder.entrance", "transformer.encoder.position",
                                                         "transformer.encoder.segment", "transformer.encoder.blocks.0."))}
    assert frozen and frozen <= still and not any(".blocks.1." in name for name in still)
    depths = depth_of(load_model(foundations("bert")))
    assert {name: depth for name, depth in depths.items() if "entrance_norm" in name} and all(
        depth == 0 for name, depth in depths.items() if "entrance_norm" in name or ".embed" in name)
    assert all(depth == 2 for name, depth in depth_of(load_model(foundations("qwen3"))).items() if name == "transformer.decoder.norm.weight")


def test_a_batch_of_one_cannot_be_compared(foundations: Any, tmp_path: Path) -> None:
    few = written(tmp_path / "rows.jsonl", ROWS["embed"][:6])
    assert dry_run(recipe("embed", foundations("bert"), few, **{"finetune.rows": 0}))["rows"] == 2
    with pytest.raises(ConfigError, match="compares the rows of a step"):
        dry_run(recipe("embed", foundations("bert"), few, **{"finetune.rows": 1}))


def test_queries_are_run_where_there_is_a_database(foundations: Any, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "walls.sqlite") as database:
        database.execute("CREATE TABLE walls (bottles INTEGER)")
    rows = [{"source": f"{n} bottles", "target": f"SELECT bottles FROM walls WHERE bottles > {n}"} for n in range(30)]
    data, run = written(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    result = finetune(recipe("seq2seq", foundations("t5"), data, **{"finetune.database": str(tmp_path / "walls.sqlite")}), Request(out=run))
    assert next(iter(result["metrics"])) == "execution" and 0 <= result["metrics"]["execution"] <= 1
    found = score(str(run), [str(data)], database=str(tmp_path / "walls.sqlite"))
    assert found["judged"] == 30 and 0 <= found["execution"] <= 1
    with pytest.raises(UsageError, match="queries are run for `seq2seq`"):
        score(str(run), [str(data)], task="embed", database="x")
