"""S05, S06, S07 for every family: a directory is read whole or not at all, never from outside, and nothing in it is run.
A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.rows import CELLS, random_model
from threefold.auto import AUTO_MODELS, AutoTokenizer
from threefold.errors import ModelError
from threefold.model.base import Model
from threefold.model.families import FAMILIES
from threefold.model.families.config_json import config_from_hf
from threefold.model.families.family import INERT, ONLY
from threefold.model.names import views
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.model.weights import load_model, save_model
from threefold.text.tokenizer import Tokenizer

families = pytest.mark.parametrize("family", FAMILIES)
NOT_THERE = "adapter.0.lora_A.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str | None], Path]:
    """Saved models, each made once; not to be touched."""
    return {}


@pytest.fixture
def folder(request: pytest.FixtureRequest, store: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A directory of `family`, for `task` where the test has one."""
    given = request.node.callspec.params
    key = given["family"], given.get("task")
    if key not in store:
        store[key] = tmp_path_factory.mktemp("saved")
        save_model(random_model(key[0], torch.float32, key[1]), store[key])
    return Path(shutil.copytree(store[key], tmp_path / "model"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in read_safetensors(folder / "model.safetensors").items()}


def written(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(folder, classes=3)
    return str(caught.value)


# -- S05: weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_S05_every_weight_must_be_there_and_of_its_shape(family: str, task: str, folder: Path) -> None:
    """A part of the body that is missing is refused by name, a part of the head is new and is said to be; a wrong shape is
    refused wherever it is."""
    row, weights = FAMILIES[family], weights_of(folder)
    whole = load_model(folder, classes=3)
    ours = {view.name: view.ours for view in views(row, whole)}
    assert set(ours) == set(weights)
    for name in (name for name in weights if not re.search(r"\.1\.", name)):  # the second layer is as the first
        fewer = {key: tensor for key, tensor in weights.items() if key != name}
        written(folder, fewer)
        if ours[name].startswith("transformer."):
            assert f"missing: `{name}`" in refused(folder)
        else:
            notes = load_model(folder, classes=3).notes
            assert len(notes) == 1 and f"`{name}`" in notes[0] and "the head is new and not trained" in notes[0]
        written(folder, {**weights, name: torch.cat([weights[name], weights[name][:1]])})
        said = refused(folder)
        assert f"wrong shapes: `{name}` {[len(weights[name]) + 1, *weights[name].shape[1:]]} instead of {list(weights[name].shape)}" in said


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_S05_a_weight_that_means_nothing_is_refused_and_one_of_another_head_announced(family: str, task: str, folder: Path) -> None:
    row, weights = FAMILIES[family], weights_of(folder)
    before = row.prefix_of(task)
    body = next(name for name in weights if name.startswith(before) and re.search(r"\.0\.", name))
    for name in (f"{body}_2", body.replace(".0.", ".2."), f"{before}{NOT_THERE}", NOT_THERE):
        written(folder, {**weights, name: torch.zeros(2)})
        assert f"unknown names: `{before}{name.removeprefix(before)}`" in refused(folder), name
    for name in ("v_head.summary.weight", "qa_outputs.bias"):
        written(folder, {**weights, name: torch.zeros(2)})
        model = load_model(folder, classes=3)
        assert len(model.notes) == 1 and f"`{name}`" in model.notes[0] and "does not use" in model.notes[0]


LEGACY: dict[str, tuple[str, ...]] = {
    "transformer": ("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
    "bert": ("embeddings.position_ids", "embeddings.token_type_ids"),
    "roberta": ("embeddings.position_ids",),
    "electra": ("embeddings.position_ids",),
    "gpt1": ("h.0.attn.bias", "h.1.attn.masked_bias", "position_ids"),
    "gpt2": ("h.0.attn.bias", "h.1.attn.masked_bias"),
    "gpt3": ("h.0.attn.attention.bias", "h.1.attn.attention.masked_bias"),
    "llama": ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    "qwen3": ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    "phi3": ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    "palm": ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    "t5": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
}


@families
def test_S05_names_of_old_files_load(family: str, folder: Path) -> None:
    """What old files carry besides is passed over without a word, second copies too; older spellings are the same names."""
    row, weights, whole = FAMILIES[family], weights_of(folder), load_model(folder)
    assert bool(row.legacy) == (family in LEGACY), "name some of what its old files carry"
    more = {row.prefix + name: torch.zeros(1, 1, 4, 4) for name in LEGACY.get(family, ())}
    more |= {row.prefix + second: weights[row.prefix + first] for second, first in row.copies.items()}
    more |= {second: weights[first] for second, first in row.heads[whole.task].copies.items() if first in weights}
    assert not set(more) & set(weights)
    again = load_model(written(folder, {**weights, **more}))
    assert not again.notes and same(again, whole)
    if row.spellings:
        old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in weights.items()}
        assert old.keys() != weights.keys()
        again = load_model(written(folder, old))
        assert not again.notes and same(again, whole)


# -- S05: config.json --------------------------------------------------------------------------------------------------


@families
def test_S05_a_key_that_is_not_known_is_refused_with_the_nearest(family: str, folder: Path) -> None:
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for key in FAMILIES[family].keys:
        path.write_text(json.dumps({**{k: v for k, v in good.items() if k != key}, f"{key}x": good.get(key)}))
        said = refused(folder)
        assert f"`{key}x` is not a known key (did you mean `{key}`" in said
    path.write_text(json.dumps({**good, "residual_multiplier": 2.0, "use_mixture": True}))
    assert all(f"`{key}` is not a known key" in refused(folder) for key in ("residual_multiplier", "use_mixture"))


@families
def test_S05_a_value_that_means_something_else_is_refused(family: str, folder: Path) -> None:
    row, path = FAMILIES[family], folder / "config.json"
    good = json.loads(path.read_text())
    for key, known in {**ONLY, **row.only}.items():
        for value in (True, False, 0.5, 7, "other"):
            if any(value == k for k in known) or key in row.keys or key in {k for words in row.words for k in words.keys}:
                continue
            path.write_text(json.dumps({**good, key: value}))
            assert f"`{key}` is {value!r}, understood is" in refused(folder)
        for value in known:
            path.write_text(json.dumps({**good, key: value}))
            assert load_model(folder).task
    path.write_text(json.dumps({**good, "is_encoder_decoder": not row.base.is_encoder_decoder}))
    if family != "t5":  # where a head reads the encoder alone
        assert "`is_encoder_decoder`" in refused(folder)


@families
def test_S05_keys_that_say_nothing_of_the_mathematics_are_passed_over(family: str, folder: Path) -> None:
    path, whole = folder / "config.json", load_model(folder)
    good = json.loads(path.read_text())
    inert = (INERT | FAMILIES[family].inert) - set(good) - {"auto_map", "id2label", "num_labels", "architectures", "hidden_act"}
    told = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "torch_dtype", "model_type",
            "classifier_pooling"}
    path.write_text(json.dumps({**good, **dict.fromkeys(inert - told, "anything")}))
    again = load_model(folder)
    assert not again.notes and same(again, whole) and again.config == whole.config


@families
def test_S05_all_that_transformers_writes_is_understood(family: str) -> None:
    """Each key of a configuration of its making, and not only those that differ from a default."""
    transformers = pytest.importorskip("transformers")
    from tests.parity.theirs import ROWS

    row = next(row for row in ROWS.values() if row.family == family)
    theirs = getattr(transformers, f"{row.kind}Config")(**{"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, **row.fields})
    whole, part = (json.loads(theirs.to_json_string(use_diff=diff)) for diff in (False, True))
    assert set(part) < set(whole) and config_from_hf(FAMILIES[family], whole) == config_from_hf(FAMILIES[family], part)


# -- S06 ---------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("name", ["../outside.safetensors", "link.safetensors"])
def test_S06_no_weight_comes_from_outside(family: str, name: str, folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    said = refused(folder)
    assert "not a plain name in this folder" in said or "leads out of its folder" in said


@pytest.mark.parametrize("family", ["gpt2"])
def test_S06_saving_over_a_link_does_not_write_where_it_leads(family: str, folder: Path, tmp_path: Path) -> None:
    """Neither a model's files nor a tokenizer's."""
    model, tokenizer = load_model(folder), Tokenizer.train("char", ["abc"])
    outside = tmp_path / "outside"
    outside.write_text("precious")
    target = tmp_path / "target"
    target.mkdir()
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        (target / name).symlink_to(outside)
    save_model(model, target)
    tokenizer.save(target)
    assert outside.read_text() == "precious" and not any((target / name).is_symlink() for name in names)
    assert same(load_model(target), model)


# -- S07 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_S07_nothing_in_a_directory_is_imported(family: str, task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to trust it, and from inside the directory."""
    canary, row = tmp_path / "canary", FAMILIES[family]
    whole = load_model(folder, classes=3)
    Tokenizer.train("char", ["abc"]).save(folder)
    evil = f"import os; os.mkdir({str(canary)!r})"
    for name in (f"modeling_{row.model_type}", f"configuration_{row.model_type}", f"tokenization_{row.model_type}", "__init__", "conftest",
                 "sitecustomize", "custom_generate"):
        (folder / f"{name}.py").write_text(evil)
    for file, auto in (("config.json", {"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M"}),
                       ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.T", None]})):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, "auto_map": auto}))
    monkeypatch.chdir(folder)
    before = set(sys.modules)
    model = load_model(".", classes=3)
    next(auto for auto in AUTO_MODELS if task in auto.tasks).from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not canary.exists() and not [name for name in set(sys.modules) - before if "evil" in name or row.model_type == name]
    assert same(model, whole) and len(model.notes) == 1 and "`auto_map`" in model.notes[0] and "not run" in model.notes[0]
