"""Weights in and out: a directory as Hugging Face writes it -> a model -> the same directory again.

Decisions:
- safetensors alone (`tensors.py`); pickles are refused unread.
- The body must be complete and without unknown names. A head that is new or unused is announced in `model.notes`.
- A classifier over pooled states is a body whose head lies beside it, as sentence-transformers has it (`pooling.py`).
- Files named by an index must lie in the directory itself (or in the blobs of the hub's cache that it is a snapshot
  of).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold import files
from threefold.errors import ModelError, UsageError, did_you_mean
from threefold.model.base import Model
from threefold.model.build import assemble
from threefold.model.classifiers import Body, PooledClassifier
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES, MODEL_TYPES
from threefold.model.families.config_json import IDS, config_from_hf, config_to_hf
from threefold.model.families.family import OTHER_HEADS, Family
from threefold.model.first_values import initialise
from threefold.model.heads import DenseHead
from threefold.model.names import View, fill, normalised, views
from threefold.model.pooling import Pooling, is_classifier, read_classifier_pooling, write_pooling
from threefold.model.quantize import refuse_quantized
from threefold.model.tensors import CONVERT, read_safetensors, write_planned
from threefold.strict_json import read_json

StrPath = str | os.PathLike[str]

NEW_HEAD = "the head is new and not trained"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- directories -------------------------------------------------------------------------------------------------------


def load_config(folder: StrPath, notes: list[str] | None = None) -> tuple[Family, TransformerConfig]:
    """The family and configuration that a directory's config.json speaks of; raises `ModelError` for what is not
    understood."""
    family, theirs = _described(folder)
    return family, config_from_hf(family, theirs, notes)


def _described(folder: StrPath) -> tuple[Family, dict[str, Any]]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"`{folder}` is no model directory: it has no config.json")
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise ModelError(f"`{path}` holds no object")
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise ModelError(f"`{path}` describes a model of type {str(name)[:60]!r}, which is not a known family",
                         hint=did_you_mean(str(name)[:60], MODEL_TYPES))
    return MODEL_TYPES[name], theirs


def load_model(folder: StrPath, dtype: torch.dtype | None = None, *, task: str | None = None, classes: int | None = None,
               for_labels: Sequence[str] | None = None, pooling: str | None = None, seed: int = 0) -> Model:
    """The model in a Hugging Face directory, in evaluation mode, with parameters in `dtype` (None: as they are stored).

    task      what its head is for; None: what its config.json says that it was saved for, or the family's own
    classes   of a head that classifies; None: as many as config.json names
    for_labels    the classes that are to be learnt: a head that was made for others is left, and a new one begins
    pooling   of a classifier: `mean`, `cls` or `last` of the states instead of what its family reads; None: as it was saved

    What had to be announced (a head that is new or unused, code that was not run) stands in `model.notes`.
    Raises `ModelError` for a directory that is incomplete, not understood or in a format that is not accepted;
    `DamagedData` for broken files; `UsageError` for a task that the family has no head for.
    """
    folder = Path(folder)
    notes: list[str] = []
    family, described = _described(folder)
    if task in (None, "classify") and (pooling or is_classifier(folder)):
        return _load_pooled(folder, family, described, dtype, pooling, classes, for_labels, seed)
    config = config_from_hf(family, described, notes)
    task = task or _saved_task(family, described)
    if task not in family.heads:
        raise UsageError(f"a `{family.name}` model has no head for `{task}`", hint=did_you_mean(task, family.heads))
    labels = _labels(described)
    count = classes or len(for_labels or labels) or 2
    theirs = normalised(family, task, {_respelled(family, name): tensor for name, tensor in read_weights(folder).items()})
    legacy = re.compile("|".join(family.legacy) or r"(?!)")
    unused = tuple(r.theirs[0].partition("{}")[0] for r in family.renames
                   if family.heads[task].encoder_alone and r.ours.startswith("transformer.decoder."))
    theirs = {name: tensor for name, tensor in theirs.items()
              if not legacy.fullmatch(_bare(family, task, name)) and not _bare(family, task, name).startswith(unused)}
    if max(config.num_encoder_layers, config.num_decoder_layers) > len(theirs):  # before a skeleton of that size is made
        raise _mismatch(folder, f"config.json describes {config.num_hidden_layers:,} layers, and there are {len(theirs):,} tensors")
    _settle_copies(family, task, theirs)
    config = _settle_head(family, config, task, theirs, notes)
    skeleton = assemble(config, device="meta", task=task, classes=count)
    expected = {view.name: view for view in views(family, skeleton)}
    if for_labels is not None and (task != _saved_task(family, described) or labels != tuple(for_labels)):
        judged = {name for name in theirs if name in expected and expected[name].ours.startswith("head.")}
        theirs = {name: tensor for name, tensor in theirs.items() if name not in judged}
        if judged:
            notes.append(f"the head of `{folder}` was made for {_saved_task(family, described)} with the classes "
                         f"{', '.join(labels[:12]) or '(unnamed)'}: it is left, and a new one is learnt")
    new = _check(folder, family, theirs, expected, dict(skeleton.named_parameters()), notes)
    theirs = {name: theirs[name] for name in expected if name in theirs}
    model = assemble(config, dtype or _stored_dtype(folder, theirs), task=task, classes=count)
    fill(family, model, theirs)
    initialise(model, config, seed, only=new)
    model.notes = notes
    if len(labels) == count:
        model.labels = labels
    return model.eval()


def _load_pooled(folder: Path, family: Family, described: Mapping[str, Any], dtype: torch.dtype | None, how: str | None,
                 classes: int | None, for_labels: Sequence[str] | None, seed: int) -> PooledClassifier:
    """A classifier over pooled states: the body in a folder, and the head beside it or a new one."""
    body = load_model(folder, dtype, task="encoder" if family.base.is_encoder_decoder else "body")
    assert isinstance(body, Body)
    stored = read_classifier_pooling(folder)
    was, labels = (stored.how, _labels(described)) if stored is not None else (None, ())
    wanted = tuple(for_labels or (labels if classes in (None, len(labels)) else ()))
    model = PooledClassifier(body.transformer, body.config, how=how or str(was), classes=classes or len(wanted) or 2).to(body.dtype)
    model.notes = [note for note in body.notes if not note.endswith(NEW_HEAD)]
    if was is not None and (for_labels is None or wanted == labels) and (how or was) == was:
        _fill_projection(model.head, read_safetensors(folder / PROJECTION), folder)
    else:
        if was is not None:
            model.notes.append(f"the head of `{folder}` judges the states by `{was}`, with the classes {', '.join(labels[:12])}: it is left, and a "
                               "new one is learnt")
        initialise(model, body.config, seed, only={"head.out.weight", "head.out.bias"})
    model.labels = wanted or model.labels
    return model.eval()


@torch.no_grad()
def _fill_projection(head: DenseHead, stored: Mapping[str, Tensor], folder: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    expected = {"linear.weight": tuple(head.out.weight.shape), "linear.bias": (len(head.out.weight),)}
    if shapes != expected:
        raise ModelError(f"`{folder / PROJECTION}` holds {shapes}, expected {expected}", hint="does it belong to this config.json?")
    assert head.out.bias is not None
    head.out.weight.copy_(stored["linear.weight"])
    head.out.bias.copy_(stored["linear.bias"])


def saved_task(folder: StrPath) -> str:
    """What the head of the model in a directory is for, by its config.json."""
    return "classify" if is_classifier(Path(folder)) else _saved_task(*_described(folder))


def _saved_task(family: Family, described: Mapping[str, Any]) -> str:
    """The task of the class that a config.json names."""
    named = described.get("architectures")
    for task, head in family.heads.items():
        if isinstance(named, list) and named[:1] == [head.architecture]:
            return task
    return next(iter(family.heads))


def _labels(described: Mapping[str, Any]) -> tuple[str, ...]:
    named = described.get("id2label")
    if isinstance(named, dict):
        if not all(key.isdecimal() for key in named):
            raise ModelError(f"config.json has `id2label` {str(named)[:80]}, expected a name for each number")
        return tuple(str(named[key]) for key in sorted(named, key=int))
    count = described.get("num_labels")
    return tuple(f"LABEL_{n}" for n in range(count)) if isinstance(count, int) and 0 < count < 10**6 else ()


def _respelled(family: Family, name: str) -> str:
    """A name as it is written today."""
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def _bare(family: Family, task: str, name: str) -> str:
    return name.removeprefix(family.prefix_of(task))


FILES = ("config.json", "generation_config.json", "model.safetensors")  # what `save_model` writes
PROJECTION = Path("2_Dense", "model.safetensors")  # the head of a classifier over pooled states


def save_model(model: Model, folder: StrPath, dtype: str | torch.dtype | None = "float32") -> None:
    """Write config.json, generation_config.json and model.safetensors as transformers reads them, weights in `dtype`
    (None: as they are).

    Each file appears whole or not at all; for a folder that appears as a whole, fill a temporary one
    (`files.published`).
    """
    refuse_quantized(model, "saved")
    kind = model.dtype if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in _FLOATS:
        raise UsageError(
            f"cannot save weights as {dtype!r}", hint=f"known: {', '.join(f'`{_word(d)}`' for d in _FLOATS)}"
        )
    written = model.body() if isinstance(model, PooledClassifier) else model
    family, described = _in_words(written, _word(kind))
    if model.labels:
        described["id2label"] = {str(n): name for n, name in enumerate(model.labels)}
        described["label2id"] = {name: n for n, name in enumerate(model.labels)}
    folder = files.make_dirs(folder)
    if isinstance(model, PooledClassifier):
        described["classifier_pooling"] = model.how
        _save_projection(model, folder, kind)
    theirs = {view.name: view for view in views(family, written)}
    plan = {name: (kind, view.shape) for name, view in theirs.items()}
    write_planned(folder / "model.safetensors", plan, lambda name: theirs[name].read().to(kind), {"format": "pt"}, files.write_atomic)
    ids = {name: described[name] for name in IDS if described.get(name) is not None}
    files.write_atomic(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
    files.write_atomic(folder / "config.json", json.dumps(described, indent=2) + "\n")


def _save_projection(model: PooledClassifier, folder: Path, dtype: torch.dtype) -> None:
    head, width = model.head.out, model.config.hidden_size
    assert head.bias is not None
    found = {"linear.weight": head.weight.detach(), "linear.bias": head.bias.detach()}
    write_pooling(folder, Pooling(model.how, normalise=False, longest=model.config.max_position_embeddings), width=width, classes=len(head.weight))
    plan = {name: (dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    write_planned(folder / PROJECTION, plan, lambda name: found[name].to(dtype), {"format": "pt"}, files.write_atomic)


def _in_words(model: Model, dtype: str) -> tuple[Family, dict[str, Any]]:
    """The family in whose words the model is written, and its config.json: its own, or another that serves."""
    own = FAMILIES[model.config.model_type]
    problems = []
    for family in (own, *(FAMILIES[name] for name in own.also)):
        try:
            return family, config_to_hf(family, model.config, dtype, family.heads[model.task].architecture)
        except ModelError as problem:
            problems.append(problem)
    raise problems[0]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by their names in the file, from one file or from the shards of an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if not index.exists():
        others = sorted(
            p.name
            for p in folder.iterdir()
            if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz")
        )
        if others:
            raise ModelError(
                f"`{folder}` has weights only in formats that may carry code ({_list(others)}); none of them was read",
                hint=CONVERT,
            )
        raise ModelError(f"`{folder}` has no model.safetensors")
    listed = read_json(index, 64 * 2**20)
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ModelError(f"`{index}` has no `weight_map` from names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = read_safetensors(_inside(folder, name))
        for weight in shard:
            if places.get(weight) != name:
                raise ModelError(
                    f"`{name}` holds `{weight[:100]}`, which `{index.name}` places in {places.get(weight)!r}"
                )
        tensors.update(shard)
    if absent := sorted(set(places) - set(tensors)):
        raise ModelError(f"`{index}` speaks of weights that are not in their files: {_list(absent)}")
    return tensors


def _inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder; raises `ModelError` for names that lead out of it."""
    path = folder / name
    root = folder.resolve()
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise ModelError(
            f"the index of `{folder}` names the file {name[:200]!r}, which is not a plain name in this folder"
        )
    target = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.parent not in (root, blobs):
        raise ModelError(f"`{path}` is a link that leads out of its folder, to `{target}`")
    if not target.is_file():
        raise ModelError(f"`{folder}` lacks the file `{name}` that its index names")
    return path


def _settle_copies(family: Family, task: str, theirs: dict[str, Tensor]) -> None:
    """A weight that stands under two names must be the same under both; one is kept."""
    before, head = family.prefix_of(task), family.heads[task]
    for second, first in (*((f"{before}{a}", f"{before}{b}") for a, b in family.copies.items()), *head.copies.items()):
        copy = theirs.pop(second, None)
        if copy is not None and not _same_bits(theirs.setdefault(first, copy), copy):
            raise ModelError(f"the weights hold `{first}` and `{second}`, which should be the same and differ")


def _settle_head(
    family: Family, config: TransformerConfig, task: str, theirs: dict[str, Tensor], notes: list[str]
) -> TransformerConfig:
    """Decide whether the head is the embedding; returns the configuration."""
    table = next(f"{family.prefix_of(task)}{r.theirs[0]}" for r in family.renames if r.ours == "transformer.embed.weight")
    names = [r.theirs[0] for r in family.heads[task].renames if r.ours == "lm_head.weight"]
    if not names or not config.tie_word_embeddings:
        return config
    embedding, head = theirs.get(table), theirs.get(names[0])
    if head is not None and embedding is None:
        theirs[table] = theirs.pop(names[0])
    elif head is not None and embedding is not None:
        if head.shape == embedding.shape and _same_bits(head, embedding):
            del theirs[names[0]]
        else:
            notes.append(
                f"config.json ties the head to the embedding, but the weights hold a different `{names[0]}`: it is kept apart"
            )
            return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _check(
    folder: Path, family: Family, theirs: Mapping[str, Tensor], expected: Mapping[str, View], ours: Mapping[str, Tensor],
    notes: list[str],
) -> set[str]:
    """The body must be complete, of the right shapes, and without names that mean nothing to us; returns the names of our
    parameters that are new, which only a head may be."""
    heads = tuple({rename.theirs[0].partition("{}")[0] for head in family.heads.values() for rename in head.renames})
    known = (*heads, *OTHER_HEADS)
    spare = [name for name in theirs if name not in expected and _ends(name, family).startswith(known)]
    unknown = sorted(set(theirs) - set(expected) - set(spare))
    absent = {name for name in expected if name not in theirs}
    fresh = {name for name in absent if not expected[name].ours.startswith("transformer.")}
    missing = sorted(absent - fresh)
    wrong = [
        f"`{name}` {list(theirs[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(set(theirs) & set(expected))
        if tuple(theirs[name].shape) != expected[name].shape
    ]
    problems = []
    if unknown:
        problems.append(f"unknown names: {_list(unknown)}")
    if missing:
        problems.append(f"missing: {_list(missing)}")
    if wrong:
        problems.append(f"wrong shapes: {_list(wrong)}")
    if problems:
        raise _mismatch(folder, "; ".join(problems))
    if spare:
        notes.append(f"the weights hold a task head that this model does not use: {_list(sorted(spare))}")
    if fresh:
        notes.append(f"the weights have no {_list(sorted(fresh))}: {NEW_HEAD}")
    new = {expected[name].ours for name in fresh}
    assert new <= set(ours)
    return new


def _ends(name: str, family: Family) -> str:
    prefixes = (family.prefix, *(head.prefix or "" for head in family.heads.values()))
    return next((name.removeprefix(prefix) for prefix in prefixes if prefix and name.startswith(prefix)), name)


def _mismatch(folder: Path, problem: str) -> ModelError:
    return ModelError(f"the weights in `{folder}` are not those that its config.json describes; {problem}",
                      hint="do config.json and the weights come from the same model?")


def _stored_dtype(folder: Path, theirs: Mapping[str, Tensor]) -> torch.dtype:
    dtype = None
    for name, tensor in theirs.items():
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"`{name}` in `{folder}` is stored as {_word(tensor.dtype)}, expected one of {', '.join(map(_word, _FLOATS))}",
                hint="quantized weights are not read",
            )
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype or torch.float32


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(names: list[str]) -> str:
    shown = ", ".join(name if name.startswith("`") else f"`{name[:120]}`" for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
