"""What rows are learnt with: each option counts or is refused, and a run is judged by what it was taught with."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import threefold
from tests.test_finetune import ROWS, foundations, recipe, written
from tests.test_pretrain import lines, stopped_after
from threefold.auto import AutoTokenizer
from threefold.data.examples import Examples, Item, Text
from threefold.errors import ConfigError, DataError
from threefold.evaluation.loss import evaluating
from threefold.exchange import export
from threefold.finetune import depth_of, finetune
from threefold.generation.engine import ending_ids
from threefold.model.build import build_model, scaled
from threefold.model.pooling import read_pooling
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model
from threefold.objectives import embed
from threefold.objectives.embed import Embed
from threefold.objectives.instruct import Instruct, plain_template
from threefold.objectives.preference import Dpo, Reward
from threefold.objectives.rows import Fit, Judged, filler
from threefold.objectives.translate import Translate
from threefold.scoring import score
from threefold.stage import Request
from threefold.text.rows import Row

assert foundations  # a fixture
BFLOAT16 = torch.bfloat16


def plan_of(run: Path) -> dict[str, Any]:
    return next(line for line in lines(run) if line.get("decision") == "plan")


# -- values and classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_value_of_minus_one_is_learnt_like_any_other(task: str, foundations: Any, tmp_path: Path) -> None:
    values = [(-1.0, -0.5, 0.5, 1.0)[n % 4] for n in range(40)]
    rows = [{"text": f"{n} bottles", "label": value} if task == "classify" else {"text_a": f"{n} bottles", "text_b": f"{n % 3} wall", "score": value}
            for n, value in enumerate(values)]
    finetune(recipe(task, foundations("bert"), written(tmp_path / "rows.jsonl", rows)), Request(out=tmp_path / "run"))
    plan = plan_of(tmp_path / "run")
    assert plan["learnt"] + plan["held_out"] == 40 and plan["held_out"] < 10


def test_a_label_for_none_of_the_classes_must_be_there(foundations: Any, tmp_path: Path) -> None:
    rows = [{"text": f"{n} bottles", "label": ("a", "b", "oos")[n % 3]} for n in range(60)]
    asked = recipe("classify", foundations("bert"), written(tmp_path / "rows.jsonl", rows), **{"finetune.outside": "oss"})
    with pytest.raises(DataError, match="no row has the label `oss`") as caught:
        finetune(asked, Request(out=tmp_path / "run"))
    assert "`oos`" in str(caught.value.hint)
    finetune(asked.override({"finetune.outside": "oos"}), Request(out=tmp_path / "run"))
    assert load_model(tmp_path / "run" / "model").labels == ("a", "b")


# -- options that count, and those that do not -------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [("train.batch_tokens", 4096), ("train.optimizer", "adamw"), ("train.objective", "masked"),
                                        ("model.family", "bert"), ("model.size", "nano"), ("model.grow_vocab", 8), ("tokenizer.vocab_size", 600),
                                        ("tokenizer.kind_or_path", "byte"), ("data.near_duplicates", False)])
def test_what_says_nothing_about_rows_is_refused(key: str, value: Any, foundations: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` says nothing where rows are learnt"):
        recipe("classify", foundations("bert"), tmp_path / "rows.jsonl", **{key: value})


def test_until_converged_goes_on_for_as_long_as_it_gains(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    asked = recipe("classify", foundations("bert"), data, **{"train.steps": None, "train.eval_every": 0, "train.until": "converged",
                                                             "train.learning_rate": 1e-9, "train.patience": 2})
    finetune(asked, Request(out=tmp_path / "run"))
    said = {line.get("decision") or line.get("event"): line["step"] for line in lines(tmp_path / "run") if "step" in line}
    assert said["converged"] == said["best"] + 2  # as patient as was asked for


def test_lengths_of_vectors_may_be_written_with_commas(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["embed"])
    asked = recipe("embed", foundations("bert"), data, **{"finetune.dims": ("16,32",)})
    finetune(asked, Request(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match='`finetune.dims` holds .*x'):
        asked.override({"finetune.dims": ("16,x",)})


@pytest.mark.parametrize("family", ["bert", "t5", "transformer", "qwen3"])
def test_the_last_norm_goes_with_the_last_layer(family: str) -> None:
    model = build_model(scaled(family, width=32, depth=3, vocab_size=50, context=32))
    depths = depth_of(model)
    config = model.config
    of = {side: [depth for name, depth in depths.items() if name.startswith(f"transformer.{side}.")] for side in ("encoder", "decoder")}
    for side, top in (("encoder", config.num_encoder_layers), ("decoder", config.num_encoder_layers + config.num_decoder_layers)):
        if of[side]:
            norms = {depth for name, depth in depths.items() if name.startswith(f"transformer.{side}.norm")}
            assert max(of[side]) == top and norms <= {top}


def test_an_embedder_goes_on_as_it_was_read(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["embed"])
    finetune(recipe("embed", foundations("bert"), data, **{"finetune.pooling": "cls"}), Request(out=tmp_path / "first"))
    finetune(recipe("embed", tmp_path / "first", data), Request(out=tmp_path / "second"))
    found = read_pooling(tmp_path / "second" / "model")
    assert found is not None and found.how == "cls"


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_a_run_with_an_adapter_that_ended_is_not_done_again(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["classify"])
    asked = recipe("classify", foundations("bert"), data, **{"lora.rank": 2})
    first = finetune(asked, Request(out=tmp_path / "run"))
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert finetune(asked, Request(out=tmp_path / "run"))["loss"] == first["loss"]
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def dropping(origin: Path, folder: Path) -> Path:
    """The model with dropout."""
    shutil.copytree(origin, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}))
    return folder


def test_dpo_beside_an_adapter_drops_nothing_in_its_reference_and_resumes(foundations: Any, tmp_path: Path) -> None:
    origin, data = dropping(foundations("gpt2"), tmp_path / "base"), written(tmp_path / "rows.jsonl", ROWS["dpo"])
    asked = recipe("dpo", origin, data, **{"lora.rank": 2, "train.save_every": 2, "train.learning_rate": 0.01})
    finetune(asked, Request(out=tmp_path / "whole"))
    torch.rand(7)  # what torch's own generator gives counts for nothing
    with stopped_after(3):
        finetune(asked, Request(out=tmp_path / "halves"))
    finetune(asked, Request(out=tmp_path / "halves"))
    a, b = ((tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("whole", "halves"))
    assert a == b


# -- judged as taught --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"finetune.beta": 0.5}, {"finetune.ipo": True}, {"finetune.flipped": 0.2}, {"lora.rank": 2, "finetune.beta": 0.5},
                                  {"finetune.add_tokens": ("<|u|>",)}])
def test_dpo_is_judged_with_the_options_of_its_run(more: dict[str, Any], foundations: Any, tmp_path: Path) -> None:
    data, val = (written(tmp_path / f"{part}.jsonl", rows) for part, rows in (("rows", ROWS["dpo"][:30]), ("val", ROWS["dpo"][30:])))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: <|u|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
                        "{% if add_generation_prompt %}assistant: <|u|>{% endif %}", encoding="utf-8")
    if "finetune.add_tokens" in more:
        more = {**more, "finetune.template": str(template)}
    result = finetune(recipe("dpo", foundations("qwen3"), data, **{"finetune.val": str(val), "train.learning_rate": 0.01, **more}),
                      Request(out=tmp_path / "run"))
    found = score(str(tmp_path / "run"), [str(val)], task="dpo")
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert found["margin"] == pytest.approx(result["metrics"]["margin"], rel=1e-4)


def test_what_dpo_begins_with_gains_nothing_in_any_precision(foundations: Any) -> None:
    model = load_model(foundations("qwen3"), torch.float32, task="causal")
    model.compute_dtype = BFLOAT16
    tokenizer = AutoTokenizer.from_pretrained(foundations("qwen3"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    learns = Dpo(tokenizer, Fit(64), beta=0.1)
    learns.reference = copy.deepcopy(model)
    items = learns.items([Row({name: str(value) for name, value in row.items()}, f"row {n}") for n, row in enumerate(ROWS["dpo"][:4])])
    batch = Examples(items, 4, 0, pad=filler(tokenizer), vocab_size=model.config.vocab_size).batch(0)
    with evaluating(model):
        assert learns._gains(model, batch).abs().max() == 0


# -- texts that are written --------------------------------------------------------------------------------------------


def judged_texts(learns: Translate, model: Any, items: list[Item]) -> list[Judged]:
    batch = Examples(items, len(items), 0, pad=filler(learns.tokenizer), vocab_size=model.config.vocab_size).batch(0)
    with evaluating(model):
        return learns.judge(model, batch, items)


def rows_of(*pairs: tuple[str, str]) -> list[Row]:
    return [Row({"source": a, "target": b}, f"row {n}") for n, (a, b) in enumerate(pairs)]


def test_a_long_prompt_takes_no_room_from_others(foundations: Any) -> None:
    model, tokenizer = load_model(foundations("qwen3")), AutoTokenizer.from_pretrained(foundations("qwen3"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    learns = Translate(tokenizer, Fit(64, truncate=True), task="causal", smoothing=0.0)
    items = learns.items(rows_of(("green bottles " * 29, "there are green bottles"), ("one bottle", "there is one bottle"), ("two", "there are two")))
    together = [one.said for one in judged_texts(learns, model, items)]
    assert together == [judged_texts(learns, model, [item])[0].said for item in items] and together[1] and together[2]


@pytest.mark.parametrize("family", ["transformer", "t5"])
def test_a_target_as_long_as_the_context_can_be_judged(family: str, foundations: Any) -> None:
    model, tokenizer = load_model(foundations(family)), AutoTokenizer.from_pretrained(foundations(family))
    learns = Translate(tokenizer, Fit(64, truncate=True), task="seq2seq", smoothing=0.0)
    items = learns.items(rows_of(("bottles", "green bottles on the wall " * 20)))
    assert isinstance(judged_texts(learns, model, items)[0].said, str)


def test_truth_is_the_text_of_the_row(foundations: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(foundations("t5"))
    learns = Translate(tokenizer, Fit(8, truncate=True), task="seq2seq", smoothing=0.0)
    whole = "there are so many green bottles that they do not fit on any wall"
    item = learns.items(rows_of(("bottles", whole)))[0]
    cut = tokenizer.decode(item.texts[0].labels.tolist(), skip_special_tokens=True)  # type: ignore[union-attr]
    assert cut != whole and learns.measure([Judged(item, said=cut)])["exact"] == 0.0 and learns.measure([Judged(item, said=whole)])["exact"] == 1.0


# -- how a model writes afterwards -------------------------------------------------------------------------------------

TURNS = ("{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("task", ["instruct", "seq2seq", "dpo"])
def test_what_ends_an_answer_ends_it_afterwards(task: str, rank: int, foundations: Any, tmp_path: Path) -> None:
    """The template ends turns with another token than eos, and the base has settings of its own."""
    base, template = tmp_path / "base", tmp_path / "turns.jinja"
    shutil.copytree(foundations("qwen3"), base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], 5], "suppress_tokens": [7]}))
    template.write_text(TURNS, encoding="utf-8")
    more = {} if task == "dpo" and rank else {"finetune.add_tokens": ("<|end|>",), "finetune.template": str(template)}
    asked = recipe(task, base, written(tmp_path / "rows.jsonl", ROWS[task]), **{"lora.rank": rank, **more})
    finetune(asked, Request(out=tmp_path / "run"))
    model, words = threefold.load(tmp_path / "run")
    ends = {settings["eos_token_id"], 5} | ({words.convert_tokens_to_ids("<|end|>")} if more else set())
    assert set(model.generation_config["eos_token_id"]) == ends and model.generation_config["suppress_tokens"] == [7]
    assert ending_ids(model, words) == ends
    if more:
        assert words.turn_ends() == {words.convert_tokens_to_ids("<|end|>")}
        assert words.decode(sorted(words.turn_ends())) == "<|end|>"


def test_a_tokenizer_without_a_token_that_fills_up_gets_one_where_texts_are_judged(foundations: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(foundations("gpt2"), base)
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({key: value for key, value in found.items() if not key.startswith("pad_token")}))
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    for task in ("classify", "reward"):
        finetune(recipe(task, base, written(tmp_path / "rows.jsonl", ROWS[task])), Request(out=tmp_path / task))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / task / "model").eval()
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / task / "model")
        texts = ["there are 12 green bottles", "12"]
        with torch.no_grad():
            together = theirs(**words(texts, padding=True, return_tensors="pt")).logits
            alone = [load_model(tmp_path / task / "model")(**words(text, return_tensors="pt")).logits[0] for text in texts]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_vectors_are_not_cut_to_more_than_they_have(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["embed"])
    with pytest.raises(ConfigError, match="`finetune.dims` holds 4,096, and vectors of this model have"):
        finetune(recipe("embed", foundations("bert"), data, **{"finetune.dims": ("4096", "16")}), Request(out=tmp_path / "run"))


def test_a_template_that_is_not_there_is_refused_before_anything_is_read(foundations: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", ROWS["instruct"])
    asked = recipe("instruct", foundations("qwen3"), data, **{"finetune.template": str(tmp_path / "none.jinja")})
    with pytest.raises(ConfigError, match="there is no file .*none.jinja"):
        finetune(asked, Request(out=tmp_path / "run"))
    bad = tmp_path / "bad.jinja"
    bad.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        finetune(asked.override({"finetune.template": str(bad)}), Request(out=tmp_path / "run"))


# -- figures -----------------------------------------------------------------------------------------------------------


def embedder() -> Embed:
    return Embed(None, Fit(64), pooling="mean")  # type: ignore[arg-type]


def judged_pairs(pairs: list[tuple[int, int]], vectors: list[tuple[Any, Any]]) -> list[Judged]:
    return [Judged(Item((Text(np.asarray([a])), Text(np.asarray([100 + b]))), source=""), np.asarray(v, dtype=np.float32))
            for (a, b), v in zip(pairs, vectors, strict=True)]


def test_an_answer_that_is_as_right_as_the_own_one_does_not_stand_before_it() -> None:
    x, y = (1.0, 0.0), (0.0, 1.0)
    near = (1.0, 1e-6)  # the same text, at another place of a batch
    same_answer = judged_pairs([(1, 1), (2, 1), (3, 2)], [(x, x), (near, near), (y, y)])
    same_query = judged_pairs([(1, 1), (1, 2), (3, 3)], [(x, near), (x, x), (y, y)])
    for judged in (same_answer, same_query):
        assert embedder().measure(judged) == {"ndcg_at_10": 1.0, "accuracy_at_1": 1.0}


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    judged = judged_pairs([(n, n) for n in range(30)], [((1.0, 0.0), (1.0, 0.0))] * 30)
    assert embedder().measure(judged) == {"ndcg_at_10": 0.0, "accuracy_at_1": 0.0}


def test_more_queries_than_are_compared_at_once_are_ranked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 2, 4)).astype(np.float32)
    vectors[:, 1] += 1.5 * vectors[:, 0]
    judged = judged_pairs([(n, n) for n in range(50)], [tuple(v) for v in vectors])  # type: ignore[misc]
    whole = embedder().measure(judged)
    monkeypatch.setattr(embed, "QUERIES", 7)
    assert embedder().measure(judged) == whole and 0 < whole["accuracy_at_1"] < 1


def test_like_length_is_that_of_the_answers(foundations: Any) -> None:
    words = AutoTokenizer.from_pretrained(foundations("qwen3"))
    words.chat_template = plain_template(words)
    learns = Reward(words, Fit(400))
    long = "there are green bottles on the wall " * 4
    rows = [Row({"prompt": long, "chosen": "12 bottles", "rejected": "13 bottles"}, "1"),
            Row({"prompt": long, "chosen": "12 bottles", "rejected": "12 bottles on the wall there are 12 bottles"}, "2")]
    items = learns.items(rows)
    found = learns.measure([Judged(item, np.asarray([value, 0.0])) for item, value in zip(items, (1.0, -1.0), strict=True)])
    assert found["accuracy"] == 0.5 and found["accuracy_of_like_length"] == 1.0


# -- what messages hold ------------------------------------------------------------------------------------------------


def test_what_a_message_and_a_row_hold_reaches_the_template(foundations: Any) -> None:
    words = AutoTokenizer.from_pretrained(foundations("qwen3"))
    words.chat_template = ("{% if tools %}{{ tools[0]['name'] }}|{% endif %}{% for m in messages %}"
                           "{{ m['role'] }}: {{ m.thought or '' }}{{ m['content'] }}"
                           "{% for call in m.tool_calls or [] %}<{{ call['name'] }}>{% endfor %}{{ eos_token }}{% endfor %}"
                           "{% if add_generation_prompt %}assistant: {% endif %}")
    talk = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]},
            {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four", "thought": "easy "}]
    (item,) = Instruct(words, Fit(200)).items([Row({"messages": talk, "tools": [{"name": "sum"}]}, "1")])
    text = words.decode(item.texts[0].ids.tolist())
    assert text.startswith("sum|user: 2+2") and "<sum>" in text and "assistant: easy four" in text
    labels = item.texts[0].labels
    assert labels is not None and "<sum>" in words.decode(labels[labels != -100].tolist())


# -- tied weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family, task", [("gpt2", "instruct"), ("qwen3", "dpo"), ("t5", "seq2seq")])
def test_tied_weights_stay_tied(family: str, task: str, rank: int, foundations: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, run = foundations(family), tmp_path / "run"
    assert load_model(base).config.tie_word_embeddings
    finetune(recipe(task, base, written(tmp_path / "rows.jsonl", ROWS[task]), **{"lora.rank": rank, "train.learning_rate": 0.01}), Request(out=run))
    export(str(run), tmp_path / "whole")  # merged, where there is an adapter
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    theirs, before = kind.from_pretrained(tmp_path / "whole"), load_model(base)
    assert theirs.config.tie_word_embeddings and theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert "lm_head.weight" not in read_safetensors(tmp_path / "whole" / "model.safetensors")
    ours = load_model(tmp_path / "whole")
    moved = not torch.equal(ours.transformer.embed.weight, before.transformer.embed.weight)
    assert moved == (rank == 0), "the table is learnt where all is, and an adapter leaves it"
