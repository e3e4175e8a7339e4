"""What is shown of rows is what is trained on; a base in few bits costs what is said, and leaves an adapter as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_finetune import CELLS, ROWS, foundations, recipe, written
from tests.test_pretrain import stopped_after
from threefold import auto, console
from threefold.cli import main
from threefold.errors import ConfigError, UsageError
from threefold.evaluation.loss import evaluate_model
from threefold.exchange import export
from threefold.finetune import finetune
from threefold.inspection.batches import render
from threefold.model.tensors import read_safetensors
from threefold.scoring import task_of
from threefold.stage import Request
from threefold.task_rows import batch_in_words
from threefold.training.search import around

__all__ = ["foundations"]  # a fixture
KINDS = sorted({(task, family) for task, family in CELLS if family in ("bert", "qwen3", "t5")})
each = pytest.mark.parametrize("task, family", KINDS, ids=[f"{task}-{family}" for task, family in KINDS])


@each
def test_a_batch_of_rows_says_what_is_read_and_what_is_learnt(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    asked = recipe(task, foundations(family), written(tmp_path / "rows.jsonl", ROWS[task]))
    found = batch_in_words(asked, shown=3)
    assert found["objective"] == task and 1 <= len(found["rows"]) <= 3 and all(found["weights"].values())
    assert batch_in_words(asked, shown=3) == found != batch_in_words(asked, step=1, shown=3)
    said = render(found)
    for row in found["rows"]:
        assert row["read"] in said
        if task == "classify":
            assert row["answer"] in ("red", "green", "blue") and not row["learnt"] and f"answer   {row['answer']}" in said
        elif task in ("reward", "dpo"):
            assert row["answer"] in ("chosen", "rejected") and f"answer   {row['answer']}" in said
        elif task == "embed":
            assert row["answer"] in ("query", "positive", "negative")
        else:
            assert row["learnt"] and "learnt" in said
        if task == "tag":
            assert {name for _, _, name in row["learnt"]} <= {"O", "B-NUMBER", "B-THING"} and len(row["learnt"]) == 5
    assert [row["answer"] for row in found["rows"]] == ["chosen", "rejected", "chosen"] if task in ("reward", "dpo") else True


def test_the_words_of_a_run_are_those_of_its_recipe(foundations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from threefold.cli import main

    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    asked = recipe("classify", foundations("bert"), data)
    finetune(asked, Request(out=tmp_path / "run"))
    capsys.readouterr()
    def shown(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "batch", *words, "--rows", "2", "--json"])
        assert not stop.value.code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found
    of_run = shown(str(tmp_path / "run"))
    assert of_run["rows"] == json.loads(json.dumps(batch_in_words(asked, shown=2)["rows"]))
    of_model = shown(str(foundations("bert")), "--data", str(data), "--task", "classify")
    assert len(of_model["rows"]) == 2 and of_model["objective"] == "classify"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("task, family", [("instruct", "qwen3"), ("classify", "bert"), ("seq2seq", "t5"), ("dpo", "qwen3")])
def test_an_adapter_over_a_base_in_few_bits(task: str, family: str, bits: int, foundations: Any, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(console, "note", lambda text: notes.append(text))
    asked = recipe(task, foundations(family), written(tmp_path / "rows.jsonl", ROWS[task]), **{"lora.rank": 2, "lora.base_bits": bits})
    result = finetune(asked, Request(out=tmp_path / "run"))
    assert result["loss"] > 0
    said = next(note for note in notes if note.startswith(f"the base in {bits} bits"))
    assert "MB instead of" in said and ("perplexity" in said) == (task != "classify")
    model, _ = auto.load(tmp_path / "run")
    assert auto.load(foundations(family))[0].num_parameters() < model.num_parameters()


def test_few_bits_without_an_adapter_are_refused(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["instruct"])
    for wrong in ({"lora.base_bits": 8}, {"lora.base_bits": 5, "lora.rank": 2}):
        with pytest.raises(ConfigError, match=r"lora\.base_bits"):
            recipe("instruct", foundations("qwen3"), data, **wrong)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "t5"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
def test_new_tokens_are_learnt_and_saved_with_the_adapter(family: str, rank: int, foundations: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    task = "seq2seq" if family == "t5" else "instruct"
    base, new = foundations(family), ("<|user|>", "<|answer|>")
    rows = [{name: f"<|user|> {text}" if name in ("source", "instruction") else text for name, text in row.items()} for row in ROWS[task]]
    finetune(recipe(task, base, written(tmp_path / "rows.jsonl", rows), **{"lora.rank": rank, "finetune.add_tokens": new}),
             Request(out=tmp_path / "run"))
    model, words = auto.load(tmp_path / "run")
    before, old = auto.load(base)
    assert len(words) == len(old) + 2 == model.config.vocab_size and words.convert_tokens_to_ids(list(new)) == [len(old), len(old) + 1]
    assert words("<|user|>", add_special_tokens=False)["input_ids"] == [len(old)]
    vectors, mean = model.transformer.embed.weight, before.transformer.embed.weight.mean(0)
    assert not torch.equal(vectors[len(old)], mean) and not torch.equal(vectors[:len(old)], before.transformer.embed.weight)
    ids = torch.tensor([[5, 9, len(old), len(old) + 1]])
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    saved = tmp_path / "run" / "model"
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    if rank:
        peft = pytest.importorskip("peft")
        theirs = kind.from_pretrained(base)
        theirs.resize_token_embeddings(len(words), mean_resizing=False)
        theirs = peft.PeftModel.from_pretrained(theirs, str(saved)).eval()
    else:
        theirs = kind.from_pretrained(saved).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


def test_a_token_that_is_there_already_is_refused(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["instruct"])
    there = auto.AutoTokenizer.from_pretrained(foundations("qwen3")).eos_token
    for wrong in ((there,), ("<|a|>", "<|a|>"), (" ",)):
        with pytest.raises(UsageError, match="cannot be added"):
            batch_in_words(recipe("instruct", foundations("qwen3"), data, **{"finetune.add_tokens": wrong}))


def test_a_search_takes_the_rate_that_is_best_and_is_not_done_twice(foundations: Any, tmp_path: Path) -> None:
    asked = recipe("classify", foundations("bert"), written(tmp_path / "rows.jsonl", ROWS["classify"]),
                   **{"finetune.rates": 3, "train.steps": 3, "train.learning_rate": 1e-3})
    result = finetune(asked, Request(out=tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("decision") == "rate"]
    assert len(found) == 1 and len(found[0]["tried"]) == 3 and found[0]["rate"] in around(1e-3, 3)
    assert found[0]["tried"][f"{found[0]['rate']:.3g}"] == min(found[0]["tried"].values())
    assert not list((tmp_path / "run").glob(".tmp-*"))
    plain = finetune(asked.override({"finetune.rates": 1, "train.learning_rate": found[0]["rate"]}), Request(out=tmp_path / "plain"))
    ours, theirs = (read_safetensors(tmp_path / name / "model" / "model.safetensors") for name in ("run", "plain"))
    assert result["loss"] == plain["loss"] and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("task, family", [("classify", "bert"), ("seq2seq", "t5"), ("instruct", "qwen3"), ("dpo", "gpt2"), ("tag", "electra")])
def test_muon_steps_matrices_and_resumes_like_adamw(task: str, family: str, foundations: Any, tmp_path: Path) -> None:
    data, origin = written(tmp_path / "rows.jsonl", ROWS[task]), foundations(family)
    asked = recipe(task, origin, data, **{"finetune.optimizer": "muon", "train.save_every": 2, "finetune.freeze": 1})
    whole, halves, gently = (tmp_path / name for name in ("whole", "halves", "gently"))
    finetune(asked, Request(out=whole))
    with stopped_after(3):
        finetune(asked, Request(out=halves))
    finetune(asked, Request(out=halves))
    finetune(asked.override({"finetune.optimizer": "adamw"}), Request(out=gently))
    files = [run / "model" / "model.safetensors" for run in (whole, halves, gently)]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, (muon, _, adamw) = read_safetensors(origin / "model.safetensors"), map(read_safetensors, files)
    moved = [name for name in before if name in muon and not torch.equal(before[name], muon[name])]
    assert moved and any(not torch.equal(muon[name], adamw[name]) for name in moved)
    assert len(moved) < len(before)  # what is frozen stays


def test_what_muon_does_not_go_with_is_refused(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    for key, value in (("lora.rank", 4), ("finetune.layer_decay", 0.9)):
        with pytest.raises(ConfigError, match=f"`finetune.optimizer` is muon beside `{key}`"):
            recipe("classify", foundations("bert"), data, **{"finetune.optimizer": "muon", key: value})
    with pytest.raises(ConfigError, match="goes with `finetune.optimizer` muon"):
        recipe("classify", foundations("bert"), data, **{"train.adamw_learning_rate": 1e-3})


def test_rates_stand_around_the_usual_one() -> None:
    assert around(1.0, 1) == [1.0] and around(1.0, 3) == pytest.approx([1 / 3, 1, 3]) and around(1.0, 2) == pytest.approx([1, 3])


def test_evaluate_takes_the_task_of_a_run_and_text_for_text(foundations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An assistant, whole or beside its base, is judged on rows as it was taught, and on running text by its loss."""
    data, text = written(tmp_path / "rows.jsonl", ROWS["instruct"]), tmp_path / "text.txt"
    text.write_text("there are twelve green bottles. " * 20, encoding="utf-8")
    base = evaluate_model(foundations("qwen3"), [str(text)])["loss"]

    def said(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["evaluate", *arguments, "--json"])
        assert done.value.code == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    for rank in (0, 2):
        run = tmp_path / f"rank-{rank}"
        finetune(recipe("instruct", foundations("qwen3"), data, **{"lora.rank": rank, "train.learning_rate": 0.01}), Request(out=run))
        for model in (run, run / "model"):
            assert task_of(str(model), [str(data)]) == "instruct" and task_of(str(model), [str(text)]) == "text"
        rows, running = said(str(run), "--data", str(data)), said(str(run), "--data", str(text))
        assert rows["task"] == "instruct" and rows["rows"] == len(ROWS["instruct"])
        assert running["bytes"] == len(text.read_bytes()) and abs(running["loss"] - base) > 1e-3  # what was learnt counts
        merged = export(str(run), tmp_path / f"merged-{rank}")["model"]
        assert running["loss"] == pytest.approx(evaluate_model(merged, [str(text)])["loss"], rel=1e-5)
        lines_of_text = written(tmp_path / "texts.jsonl", [{"text": "there are twelve green bottles"}])
        assert said(str(run), "--data", str(lines_of_text), "--task", "text")["tokens"] > 0
    described = json.loads((run / "model" / "adapter_config.json").read_text())
    (run / "model" / "adapter_config.json").write_text(json.dumps({**described, "task_type": None}))  # PEFT may leave it out
    assert task_of(str(run), [str(text)]) == "text"
    assert task_of(str(foundations("qwen3")), [str(data)]) == "text"
    assert task_of(str(foundations("bert")), [str(text)]) == "text", "by the objective that it was pretrained with"
