"""Weights in and out: a directory as Hugging Face writes it -> a model -> the same directory again.

Decisions:
- safetensors alone (`tensors.py`); pickles are refused unread.
- The body must be complete and without unknown names. A head that is new or unused is announced in `model.notes`.
- Files named by an index must lie in the directory itself (or in the blobs of the hub's cache that it is a snapshot
  of).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from threefold import files
from threefold.errors import ModelError, UsageError, did_you_mean
from threefold.model.build import assemble, count_parameters, initialise
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES
from threefold.model.families.family import OTHER_HEADS, Family, config_from_hf, config_to_hf, each_rename, row_counts
from threefold.model.heads import CausalLM
from threefold.model.tensors import CONVERT, read_safetensors, write_planned
from threefold.strict_json import read_json

StrPath = str | os.PathLike[str]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- names -------------------------------------------------------------------------------------------------------------


def to_hf(family: Family, config: TransformerConfig, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The published (name, tensor) for our tensors by name, as views: turned and cut as the family's table says."""
    rows = row_counts(config)
    for rename in each_rename(family, config):
        whole = ours[rename.ours]
        if rename.transform == "transpose":
            parts: Sequence[Tensor] = (whole.mT,)
        else:
            parts = whole.split_with_sizes([rows[word] for word in rename.rows]) if rename.rows else (whole,)
        for name, part in zip(rename.theirs, parts, strict=True):
            yield published_name(family, name), part


@torch.no_grad()
def from_hf(
    family: Family, config: TransformerConfig, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> None:
    """Fill our tensors with published ones: the same views as `to_hf` gives, written instead of read, so that neither
    can differ."""
    for name, view in to_hf(family, config, ours):
        if name in theirs:
            view.copy_(theirs[name])


def published_name(family: Family, name: str) -> str:
    """A weight's full name: bodies saved without their head lack the prefix."""
    bare = name.startswith((family.prefix, "lm_head.", *OTHER_HEADS))
    return name if bare else family.prefix + name


# -- directories -------------------------------------------------------------------------------------------------------


def load_config(folder: StrPath, notes: list[str] | None = None) -> tuple[Family, TransformerConfig]:
    """The family and configuration that a directory's config.json speaks of; raises `ModelError` for what is not
    understood."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"`{folder}` is no model directory: it has no config.json")
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise ModelError(f"`{path}` holds no object")
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"`{path}` describes a model of type {str(name)[:60]!r}, which is not a known family",
                         hint=did_you_mean(str(name)[:60], FAMILIES))
    return FAMILIES[name], config_from_hf(FAMILIES[name], theirs, notes)


def load_model(folder: StrPath, dtype: torch.dtype | None = None, *, seed: int = 0) -> CausalLM:
    """The model in a Hugging Face directory, in evaluation mode, with parameters in `dtype` (None: as they are stored).

    What had to be announced (a head that is new or unused, code that was not run) stands in `model.notes`.
    Raises `ModelError` for a directory that is incomplete, not understood or in a format that is not accepted;
    `DamagedData` for broken files.
    """
    folder = Path(folder)
    notes: list[str] = []
    family, config = load_config(folder, notes)
    theirs = {published_name(family, name): tensor for name, tensor in read_weights(folder).items()}
    legacy = re.compile("|".join(family.legacy) or r"(?!)")
    theirs = {name: tensor for name, tensor in theirs.items() if not legacy.fullmatch(name.removeprefix(family.prefix))}
    config, new = _settle_head(family, config, theirs, notes)
    held = sum(tensor.numel() for tensor in theirs.values())
    if config.num_hidden_layers > len(theirs) or count_parameters(config) > 16 * (
        held + 1
    ):  # before a skeleton of that size is made
        raise ModelError(
            f"config.json in `{folder}` describes {count_parameters(config):,} parameters in {config.num_hidden_layers:,} layers; "
            f"the weights are {held:,} in {len(theirs):,} tensors",
            hint="do config.json and the weights come from the same model?",
        )
    skeleton = dict(to_hf(family, config, dict(assemble(config, device="meta").named_parameters())))
    _check(folder, theirs, skeleton, new, notes)
    theirs = {name: theirs[name] for name in skeleton if name in theirs}
    model = assemble(config, dtype or _stored_dtype(folder, theirs))
    from_hf(family, config, theirs, dict(model.named_parameters()))
    initialise(model, config, seed, only=new)
    model.notes = notes
    return model.eval()


FILES = ("config.json", "generation_config.json", "model.safetensors")  # what `save_model` writes


def save_model(model: CausalLM, folder: StrPath, dtype: str | torch.dtype | None = "float32") -> None:
    """Write config.json, generation_config.json and model.safetensors as transformers reads them, weights in `dtype`
    (None: as they are).

    Each file appears whole or not at all; for a folder that appears as a whole, fill a temporary one
    (`files.published`).
    """
    folder = files.make_dirs(folder)
    config = model.config
    family = FAMILIES[config.model_type]
    kind = model.dtype if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in _FLOATS:
        raise UsageError(
            f"cannot save weights as {dtype!r}", hint=f"known: {', '.join(f'`{_word(d)}`' for d in _FLOATS)}"
        )
    theirs = dict(to_hf(family, config, dict(model.named_parameters())))
    described = config_to_hf(family, config, _word(kind))
    plan = {name: (kind, tuple(tensor.shape)) for name, tensor in theirs.items()}
    write_planned(folder / "model.safetensors", plan, lambda name: theirs[name].to(kind), {"format": "pt"}, files.write_atomic)
    ids = {name: described[name] for name in ("bos_token_id", "eos_token_id") if described[name] is not None}
    files.write_atomic(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
    files.write_atomic(folder / "config.json", json.dumps(described, indent=2) + "\n")


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


def _settle_head(
    family: Family, config: TransformerConfig, theirs: dict[str, Tensor], notes: list[str]
) -> tuple[TransformerConfig, set[str]]:
    """Decide whether the head is the embedding; returns the configuration and the names of our parameters that are
    new."""
    tables = [published_name(family, r.theirs[0]) for r in family.renames if r.ours == "transformer.embed.weight"]
    embedding, head = theirs.get(tables[0]), theirs.get("lm_head.weight")
    if not config.tie_word_embeddings:
        if head is None:
            notes.append("the weights have no `lm_head.weight`: the head is new and not trained")
        return config, set() if head is not None else {"lm_head.weight"}
    if head is not None and embedding is None:
        theirs[tables[0]] = theirs.pop("lm_head.weight")
    elif head is not None and embedding is not None:
        if head.shape == embedding.shape and _same_bits(head, embedding):
            del theirs["lm_head.weight"]
        else:
            notes.append(
                "config.json ties the head to the embedding, but the weights hold a different `lm_head.weight`: it is kept apart"
            )
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, set()


def _check(
    folder: Path, theirs: Mapping[str, Tensor], skeleton: Mapping[str, Tensor], new: set[str], notes: list[str]
) -> None:
    """The body must be complete, of the right shapes, and without names that mean nothing to us."""
    spare = [name for name in theirs if name.startswith(OTHER_HEADS)]
    unknown = sorted(set(theirs) - set(skeleton) - set(spare))
    missing = sorted(set(skeleton) - set(theirs) - new)
    wrong = [
        f"`{name}` {list(theirs[name].shape)} instead of {list(skeleton[name].shape)}"
        for name in sorted(set(theirs) & set(skeleton))
        if theirs[name].shape != skeleton[name].shape
    ]
    problems = []
    if unknown:
        problems.append(f"unknown names: {_list(unknown)}")
    if missing:
        problems.append(f"missing: {_list(missing)}")
    if wrong:
        problems.append(f"wrong shapes: {_list(wrong)}")
    if problems:
        raise ModelError(
            f"the weights in `{folder}` are not those that its config.json describes; " + "; ".join(problems),
            hint="do config.json and the weights come from the same model?",
        )
    if spare:
        notes.append(f"the weights hold a task head that a language model does not use: {_list(sorted(spare))}")


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
