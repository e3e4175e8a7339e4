"""Files of weights and model directories: what is read, what is written, what is announced and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from threefold import files
from threefold.errors import DiskError, ModelError, UsageError
from threefold.model.base import Model
from threefold.model.build import build_model, scaled
from threefold.model.families import FAMILIES
from threefold.model.names import views
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.model.weights import load_config, load_model, save_model

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    return values.to(dtype)


def tensors() -> dict[str, torch.Tensor]:
    made = {f"x.{str(dtype)[6:]}": some(dtype, 3, 5) for dtype in DTYPES}
    return {
        **made,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "odd": some(torch.uint8, 7),
        "wörd": some(torch.float32, 2).flip(0),
        "turned": some(torch.float32, 4, 6).mT,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    )


def test_our_files_open_there_and_theirs_here(tmp_path: Path) -> None:
    made = tensors()
    size = write_safetensors(tmp_path / "ours", made, {"format": "pt"})
    assert size == (tmp_path / "ours").stat().st_size
    with safetensors.safe_open(tmp_path / "ours", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt"}
    for read in (read_safetensors(tmp_path / "ours"), safetensors.torch.load_file(tmp_path / "ours")):
        assert set(read) == set(made) and all(same(read[name], made[name]) for name in made)
    safetensors.torch.save_file({name: t.contiguous() for name, t in made.items()}, tmp_path / "theirs")
    read = read_safetensors(tmp_path / "theirs")
    assert set(read) == set(made) and all(same(read[name], made[name]) for name in made)
    write_safetensors(tmp_path / "none", {})
    assert read_safetensors(tmp_path / "none") == {} and safetensors.torch.load_file(tmp_path / "none") == {}
    with pytest.raises(UsageError, match="complex64"):
        write_safetensors(tmp_path / "bad", {"x": torch.zeros(1, dtype=torch.complex64)})


def test_writing_streams_one_tensor_at_a_time(tmp_path: Path) -> None:
    """R02: the largest piece handed to the disk is one tensor, and no copy of the model is made before."""
    pieces: list[int] = []
    with files.observed(lambda kind, path, *details: pieces.append(details[0]) if kind == "write" else None):
        write_safetensors(tmp_path / "x", {f"t{i}": torch.zeros(1000) for i in range(5)})
    assert pieces[-5:] == [4000] * 5


def model_of(family: str = "llama", task: str | None = None, **changes: Any) -> Any:
    config = scaled(family, width=32, depth=2, vocab_size=19, context=32)
    if family == "roberta":
        config = dataclasses.replace(config, pad_token_id=1)  # its positions begin behind the id that pads
    model = build_model(dataclasses.replace(config, **changes), task=task)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    save_model(model_of(), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = {name: t.clone() for name, t in read_safetensors(path).items()}
    change(weights)
    write_safetensors(path, weights)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_S05_names_that_do_not_belong_are_refused(folder: Path) -> None:
    def change(w: dict[str, torch.Tensor]) -> None:
        w["model.layers.0.self_attn.q_proj.lora"] = torch.zeros(1)
        del w["model.norm.weight"]
        w["model.embed_tokens.weight"] = torch.zeros(20, 32)
    edit(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert (
        "q_proj.lora" in text
        and "missing: `model.norm.weight`" in text
        and "`model.embed_tokens.weight` [20, 32] instead of [19, 32]" in text
    )


def test_S05_legacy_names_load(tmp_path: Path) -> None:
    for family, legacy in (
        ("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
    ):
        model, folder = model_of(family), tmp_path / family
        save_model(model, folder)
        edit(folder, lambda w, legacy=legacy: w.update({name: torch.zeros(1, 1, 4, 4) for name in legacy}))
        again = load_model(folder)
        assert not again.notes and all(
            torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
        )


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def published(model: Model) -> dict[str, torch.Tensor]:
    """Weights by their published names, without what stands before the body."""
    row = FAMILIES[model.config.model_type]
    before = row.heads[model.task].prefix
    return {view.name.removeprefix(row.prefix if before is None else before): view.read().clone() for view in views(row, model)}


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.prefix])
def test_a_body_without_its_prefix_loads(family: str, tmp_path: Path) -> None:
    model, prefix = model_of(family), FAMILIES[family].prefix
    save_model(model, tmp_path)
    weights = {name.removeprefix(prefix): t.clone() for name, t in read_safetensors(tmp_path / "model.safetensors").items()}
    write_safetensors(tmp_path / "model.safetensors", weights)
    again = load_model(tmp_path)
    assert not any(name.startswith(prefix) for name in weights) and not again.notes and equal(bits(model), bits(again))


@pytest.mark.parametrize(("family", "task"), [(name, task) for name, row in FAMILIES.items() for task in row.heads])
def test_a_body_serves_every_task(family: str, task: str, tmp_path: Path) -> None:
    """A model that was saved for one task, loaded for each other: the body is the same, what is new or unused is said."""
    saved = model_of(family, task)
    save_model(saved, tmp_path)
    for other, head in FAMILIES[family].heads.items():
        if head.encoder_alone and not FAMILIES[family].heads[task].encoder_alone:
            continue  # half a body is another body
        if FAMILIES[family].heads[task].encoder_alone and not head.encoder_alone:
            with pytest.raises(ModelError, match="missing: `(transformer.)?decoder"):
                load_model(tmp_path, task=other)
            continue
        loaded = load_model(tmp_path, task=other)
        mine, theirs = published(saved), published(loaded)
        assert loaded.task == other and all(same(theirs[name], mine[name]) for name in set(theirs) & set(mine))
        assert len(set(theirs) & set(mine)) >= len([p for name, p in loaded.named_parameters() if name.startswith("transformer.")])
        new, spare = set(theirs) - set(mine), set(mine) - set(theirs)
        assert any("new and not trained" in note for note in loaded.notes) == bool(new)
        assert any("does not use" in note for note in loaded.notes) == bool(spare)
        assert len(loaded.notes) == bool(new) + bool(spare)
        assert equal(published(load_model(tmp_path, task=other)), theirs)  # new heads are the same each time


def test_a_task_that_a_family_has_no_head_for(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no head for `masked`"):
        load_model(folder, task="masked")
    with pytest.raises(UsageError, match="no head for `clasify`") as caught:
        load_model(folder, task="clasify")
    assert "classify" in caught.value.hint


def test_classes_and_their_names(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, task="classify", classes=3)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 3) and model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    model.labels = ("bad", "good", "so-so")
    save_model(model, tmp_path / "named")
    again = load_model(tmp_path / "named")
    assert again.task == "classify" and again.labels == model.labels and not again.notes and equal(bits(model), bits(again))
    assert load_model(folder, task="tag").labels == ("LABEL_0", "LABEL_1") and load_model(folder).labels == ()
    edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"})
    assert load_model(folder, task="tag").labels == ("a", "b", "c")
    assert load_model(folder, task="tag", classes=2).labels == ("LABEL_0", "LABEL_1")  # three names are none for two classes
    edit_config(folder, id2label=None, num_labels=4)
    assert load_model(folder, task="tag").labels == tuple(f"LABEL_{n}" for n in range(4))


@pytest.mark.parametrize(("family", "task"), [(name, task) for name, row in FAMILIES.items() for task in row.heads if task in ("classify", "tag")])
def test_a_number_of_classes_comes_back(family: str, task: str, tmp_path: Path) -> None:
    """Here and in transformers, whose words the classes have until somebody names them."""
    transformers = pytest.importorskip("transformers")
    save_model(model_of(family), tmp_path / "body")
    for count in (1, 2, 5):
        if FAMILIES[family].heads[task].encoder_alone:
            model = build_model(model_of(family).config, task=task, classes=count).eval()
        else:
            model = load_model(tmp_path / "body", task=task, classes=count)
        names = tuple(f"LABEL_{n}" for n in range(count))
        assert model.labels == names
        save_model(model, tmp_path / str(count))
        again = load_model(tmp_path / str(count))
        assert again.task == task and again.labels == names and not again.notes and equal(bits(model), bits(again))
        theirs = getattr(transformers, FAMILIES[family].heads[task].architecture).from_pretrained(tmp_path / str(count))
        assert theirs.config.num_labels == count and theirs.config.id2label == dict(enumerate(names))
        assert theirs.config.label2id == {name: n for n, name in enumerate(names)}


def test_a_head_that_is_new_or_unused_is_announced(folder: Path) -> None:
    edit(folder, lambda w: w.update({"score.weight": torch.zeros(2, 32)}))
    assert "score.weight" in load_model(folder).notes[0]
    edit_config(folder, tie_word_embeddings=False)
    model = load_model(folder)
    assert any("the head is new" in note for note in model.notes)
    assert model.lm_head.weight is not None and model.lm_head.weight.isfinite().all()
    assert torch.equal(load_model(folder).lm_head.weight, model.lm_head.weight)


TIED = [(name, task) for name, row in FAMILIES.items() for task, head in row.heads.items()
        if any(rename.ours == "lm_head.weight" for rename in head.renames)]


@pytest.mark.parametrize(("family", "task"), TIED)
def test_tied_weights_stored_once_or_twice(family: str, task: str, tmp_path: Path) -> None:
    save_model(model_of(family, task), tmp_path)
    row = FAMILIES[family]
    table = row.prefix + next(r.theirs[0] for r in row.renames if r.ours == "transformer.embed.weight")
    head = next(r.theirs[0] for r in row.heads[task].renames if r.ours == "lm_head.weight")
    weights = read_safetensors(tmp_path / "model.safetensors")
    embedding = weights[table].clone()
    assert head not in weights
    edit(tmp_path, lambda w: w.update({head: embedding}))
    twice = load_model(tmp_path)
    assert not twice.notes and twice.lm_head.weight is None
    edit(tmp_path, lambda w: w.pop(table))
    alone = load_model(tmp_path)
    assert torch.equal(alone.transformer.embed.weight, embedding) and not alone.notes
    edit(tmp_path, lambda w: w.update({table: embedding + 1}))
    apart = load_model(tmp_path)
    assert "kept apart" in apart.notes[0] and not apart.config.tie_word_embeddings
    assert torch.equal(apart.lm_head.weight, embedding)


def test_shards_with_an_index(folder: Path) -> None:
    weights = read_safetensors(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for shard, held in shards.items():
        write_safetensors(folder / shard, {name: weights[name] for name in held})
    whole = load_model(folder)
    (folder / "model.safetensors").unlink()
    places = {name: shard for shard, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), load_model(folder).parameters(), strict=True))
    for wrong in (
        {**places, "ghost": "a.safetensors"},
        dict.fromkeys(names, "b.safetensors"),
        {**places, "more": "absent.safetensors"},
        {},
        5,
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ModelError):
            load_model(folder)


def test_dtypes_of_loading_and_saving(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "half", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        load_model(tmp_path / "half").dtype == torch.bfloat16
        and load_model(tmp_path / "half", torch.float32).dtype == torch.float32
    )
    edit(tmp_path / "half", lambda w: w.update({"model.norm.weight": w["model.norm.weight"].float()}))
    assert load_model(tmp_path / "half").dtype == torch.float32  # a mixture is loaded in what holds all of it
    edit(tmp_path / "half", lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.int8)}))
    with pytest.raises(ModelError, match="int8"):
        load_model(tmp_path / "half")
    with pytest.raises(UsageError, match="bfloat17"):
        save_model(model_of(), tmp_path / "x", "bfloat17")


def test_a_loaded_model_does_not_hang_on_its_file(folder: Path) -> None:
    model = load_model(folder)
    before = [p.clone() for p in model.parameters()]
    (folder / "model.safetensors").write_bytes(b"gone")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not model.training


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt3"}')
    with pytest.raises(ModelError, match="not a known family") as caught:
        load_config(tmp_path)
    assert "gpt2" in caught.value.hint
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_a_full_disk_while_saving(folder: Path, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(kind: str, path: str, *details: Any) -> None:
        if kind == "write" and path.endswith(f"model.safetensors-{__import__('os').getpid()}"):
            raise OSError(28, "No space left on device")
    with files.observed(full), pytest.raises(DiskError):
        save_model(model_of(), folder)
    assert (folder / "model.safetensors").read_bytes() == before and len(list(folder.iterdir())) == 3


def test_generation_config_has_the_special_ids(tmp_path: Path) -> None:
    save_model(model_of(bos_token_id=1, eos_token_id=(2, 3)), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert load_model(tmp_path).config.eos_token_id == (2, 3)
