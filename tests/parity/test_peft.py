"""Adapters go both ways between us and PEFT, for every family: the same logits, the same files; laws of LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import threefold
from threefold.auto import AutoTokenizer
from threefold.errors import ModelError, UsageError
from threefold.model import adapters
from threefold.model.build import build_model, sized
from threefold.model.families import FAMILIES
from threefold.model.lowrank import Shape
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.model.weights import load_model, save_model
from threefold.text.tokenizer import Tokenizer

ROWS = [(name, task) for name, family in FAMILIES.items() for task in family.heads if task in adapters.TASK_TYPES and task not in ("body", "encoder")]
each = pytest.mark.parametrize("name, task", ROWS, ids=[f"{name}-{task}" for name, task in ROWS])
IDS = torch.arange(5, 29).view(2, 12)


def made(name: str, task: str, dtype: torch.dtype = torch.float32, classes: int = 3) -> Any:
    config = sized(name, "nano", vocab_size=96, context=64)
    changes: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 28, "pad_token_id": 1}
    if config.is_encoder_decoder:
        changes["decoder_start_token_id"] = 1
    model = build_model(dataclasses.replace(config, **changes), 0, dtype=dtype, task=task, classes=classes)
    model.labels = tuple("abcdefgh"[:classes]) if task in ("classify", "tag") else ()
    return model.eval()


def ids_of(model: Any) -> dict[str, Any]:
    rows = IDS.clone()
    rows[:, -1] = 28  # T5 judges where a text ends
    return {"input_ids": rows, **({"decoder_input_ids": rows} if model.task == "seq2seq" else {})}


def stirred(model: Any, seed: int = 1) -> Any:
    """With matrices B that are no longer zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".up." in path and ".side." in path:
                parameter.normal_(0, 0.05)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**ids_of(model)).logits  # type: ignore[no-any-return]


@each
def test_a_new_adapter_changes_nothing_and_merged_is_unmerged(name: str, task: str) -> None:
    model = made(name, task, torch.float64)
    before = logits(model)
    adapters.attach(model, Shape(3, 6.0))
    assert torch.equal(logits(model), before)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".side." in path or not path.startswith(("transformer.", "lm_head.")) for path in trained)
    after = logits(stirred(model))
    assert not torch.allclose(after, before)
    with adapters.without(model):
        assert torch.equal(logits(model), before)
    adapters.merge(model)
    assert not list(adapters.sides(model))
    torch.testing.assert_close(logits(model), after, rtol=1e-10, atol=1e-10)


@each
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
def test_an_adapter_opens_in_peft_and_comes_back(name: str, task: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, adapter, back = (tmp_path / part for part in ("base", "adapter", "back"))
    model = made(name, task)
    save_model(model, base)
    adapters.attach(model, Shape(3, 6.0))
    expected = logits(stirred(model))
    adapters.save(model, adapter, str(base))
    architecture = FAMILIES[name].heads[task].architecture
    theirs = peft.PeftModel.from_pretrained(getattr(transformers, architecture).from_pretrained(base), adapter).eval()
    with torch.no_grad():
        found = theirs(**ids_of(model)).logits
    assert float((found - expected).abs().max()) <= 2e-6 * max(1.0, float(expected.abs().max()))
    theirs.save_pretrained(back)
    ours = load_model(base, task=task)
    adapters.load(ours, back)
    assert torch.equal(logits(ours), expected)


def test_several_adapters_over_one_base(tmp_path: Path) -> None:
    model = made("llama", "causal")
    before = logits(model)
    adapters.attach(model, Shape(2, 4.0), ("q_proj", "v_proj"), name="one")
    first = logits(stirred(model, 1))
    adapters.attach(model, Shape(4, 4.0), ("down_proj",), name="two")
    assert torch.equal(logits(model), before)
    adapters.use(model, "one")
    assert torch.equal(logits(model), first)
    adapters.use(model, None)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="no adapter `three`"):
        adapters.use(model, "three")


@pytest.mark.parametrize("name, task", [("bert", "classify"), ("qwen3", "classify"), ("electra", "tag")])
def test_adapters_that_bring_a_head_take_it_away_again(name: str, task: str, tmp_path: Path) -> None:
    said = {}
    for number, labels in enumerate([("a", "b", "c"), ("x", "y", "z")]):
        model = made(name, task)
        adapters.attach(model, Shape(2, 4.0))
        with torch.no_grad():
            for path, parameter in stirred(model, number).named_parameters():
                if not path.startswith("transformer."):
                    parameter.add_(number + 1.0)
        model.labels = labels
        adapters.save(model, tmp_path / str(number), "base")
        said[str(number)] = logits(model), labels
    model = made(name, task)
    said[None] = logits(model), model.labels  # type: ignore[index]
    for number in ("0", "1"):
        adapters.load(model, tmp_path / number, name=number)
    for number in ("1", "0", None, "1", "0"):
        adapters.use(model, number)
        assert torch.equal(logits(model), said[number][0]) and model.labels == said[number][1]  # type: ignore[index]
    with adapters.without(model):
        assert torch.equal(logits(model), said[None][0])  # type: ignore[index]
    assert torch.equal(logits(model), said["0"][0])
    merged = adapters.merge(model)
    torch.testing.assert_close(logits(merged), said["0"][0], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_base_is_refused_beside_one(tmp_path: Path) -> None:
    for number in range(2):
        model = made("llama", "causal")
        adapters.attach(model, Shape(2, 4.0))
        adapters.save(model, tmp_path / str(number), "base")
        (tmp_path / str(number) / adapters.DETAILS).write_text(f'{{"base": "{number}"}}')
    model = made("llama", "causal")
    adapters.load(model, tmp_path / "0")
    with pytest.raises(ModelError, match="beside other weights"):
        adapters.load(model, tmp_path / "1", name="other")
    adapters.load(model, tmp_path / "0", name="again")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = made("llama", "causal")
    with pytest.raises(UsageError, match="no linear layer is called `q_projj`"):
        adapters.attach(model, Shape(2, 4.0), ("q_projj",))
    adapters.attach(model, Shape(2, 4.0))
    adapters.save(model, tmp_path, "base")
    with pytest.raises(ModelError, match="does not have"):
        adapters.load(made("gpt2", "causal"), tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    for key in ('"use_dora": true', '"peft_type": "LOHA"', '"bias": "all"', '"init_lora_weights": "pissa_niter_4"', '"init_lora_weights": "olora"',
                '"alora_invocation_tokens": [5]', '"layer_replication": [[0, 2]]', '"a_newer_way": {"x": 1}'):
        (tmp_path / "adapter_config.json").write_text(config.rstrip()[:-2] + f",\n {key}\n}}")
        with pytest.raises(ModelError):
            adapters.load(made("llama", "causal"), tmp_path)


def test_heads_of_different_sizes_stand_over_one_base(tmp_path: Path) -> None:
    said = {}
    for number, labels in enumerate([("a", "b"), ("v", "w", "x", "y", "z")]):
        model = made("bert", "classify", classes=len(labels))
        adapters.attach(model, Shape(2, 4.0))
        stirred(model, number)
        model.labels = labels
        adapters.save(model, tmp_path / str(number), "base")
        (tmp_path / str(number) / adapters.DETAILS).write_text(f'{{"threefold": {{"temperature": {number + 1}}}}}')
        said[str(number)] = logits(model), labels
    model = made("bert", "classify")
    for number in ("0", "1"):
        adapters.load(model, tmp_path / number, name=number)
    for number in ("1", "0", "1"):
        adapters.use(model, number)
        assert torch.equal(logits(model), said[number][0]) and model.labels == said[number][1]
        assert model.kept["threefold"]["temperature"] == int(number) + 1
    adapters.use(model, None)
    assert logits(model).shape == (2, 3) and not model.kept


def test_a_refusal_leaves_what_was_in_use(tmp_path: Path) -> None:
    model = made("bert", "classify")
    adapters.attach(model, Shape(2, 4.0))
    adapters.save(stirred(model), tmp_path, "base")
    before = logits(model)
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(tmp_path / adapters.WEIGHTS).items()}
    key = next(key for key in tensors if key.endswith("classifier.weight"))
    write_safetensors(tmp_path / adapters.WEIGHTS, {**tensors, key: torch.zeros(3, 5)})
    with pytest.raises(ModelError, match="which this base does not have") as caught:
        adapters.load(model, tmp_path, name="other")
    assert "another base" in str(caught.value.hint) and torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="no adapter `other`"):
        adapters.use(model, "other")


@pytest.mark.filterwarnings("ignore")
def test_what_peft_leaves_behind_opens_by_itself(tmp_path: Path) -> None:
    """No tokenizer beside it, a head whose classes only its shape tells, and a tied embedding that is stored twice."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    words = Tokenizer.train("byte", ["a"])
    model = made("qwen3", "classify", classes=5)
    model.labels = ()
    save_model(model, tmp_path / "base")
    words.save(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    plain = made("qwen3", "causal")
    save_model(plain, tmp_path / "base")  # as a base is published: without that head
    ours, tokenizer = threefold.load(tmp_path / "adapter")
    assert tokenizer.encode("ab") == AutoTokenizer.from_pretrained(tmp_path / "base").encode("ab")
    assert logits(ours).shape == (2, 5)
    causal = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    causal.resize_token_embeddings(100)
    theirs = peft.get_peft_model(causal, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    theirs.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    ours, _ = threefold.load(tmp_path / "resized")
    with torch.no_grad():
        expected = theirs(**ids_of(plain)).logits
    assert logits(ours).shape[-1] == 100 and float((logits(ours) - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
