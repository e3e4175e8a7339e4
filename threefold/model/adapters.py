"""LoRA (arXiv 2106.09685): small matrices beside large ones, in PEFT's words and files.

    y = x W^T + alpha / rank * (x A^T) B^T        A (rank, in) begins at random, B (out, rank) at zero

Decisions:
- What PEFT calls a module is one published weight; several of them may lie in one of ours (queries, keys and values). An
  adapter therefore stands beside parts of a product, each by its published name, so that files go both ways.
- Several adapters share one base; one of them is in use, or none. A head that is new is trained whole and saved beside; of several
  that were loaded each brings its own, with its classes, and takes it away again.
- Merging adds the product to the weight, computed in float64 and rounded once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threefold import files
from threefold.errors import ModelError, UsageError, did_you_mean
from threefold.model.base import Model
from threefold.model.families import FAMILIES
from threefold.model.families.family import Family
from threefold.model.linear import Linear
from threefold.model.lowrank import LowRank, Shape, Side
from threefold.model.names import View, views
from threefold.model.quantize import refuse_quantized
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.model.weights import load_config
from threefold.seeds import generator
from threefold.strict_json import read_json, read_object

CONFIG, WEIGHTS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
STRETCHES = 64  # of each file of a base, by which it is known again
DETAILS = "task.json"  # what a model of its own keeps in config.json for its users
OWN = ("problem_type", "threefold")  # of that, what each of several adapters has of its own
FILES = (CONFIG, WEIGHTS, LABELS, DETAILS)
PREFIX = "base_model.model."
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classify": "SEQ_CLS", "tag": "TOKEN_CLS", "body": "FEATURE_EXTRACTION",
              "encoder": "FEATURE_EXTRACTION"}
# What PEFT's file may hold beside what is read here: it says how an adapter began, or for which layers, which its tensors show. All else
# is refused unless it says "off".
SILENT = frozenset(
    ["peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias", "inference_mode", "target_modules",
     "modules_to_save", "fan_in_fan_out", "init_lora_weights", "auto_mapping", "revision", "peft_version", "layers_to_transform", "layers_pattern",
     "exclude_modules", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"])
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # after which the base is what it was


# -- beside which products ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A published module (`model.layers.0.self_attn.q_proj`) and where its weight lies in ours: which of the `parts` of a
    product."""

    module: str
    linear: Linear
    parts: tuple[int, ...]
    part: int
    view: View

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the published module."""
        return self.parts[self.part], self.linear.width_in


def places(family: Family, model: Model) -> list[Place]:
    """Every linear layer of the body by its published name; those of a head are trained whole."""
    modules = dict(model.named_modules())
    of: dict[str, list[View]] = {}
    for view in views(family, model):
        if view.ours.startswith("transformer.") and view.ours.endswith(".weight") and isinstance(modules[view.ours.rpartition(".")[0]], Linear):
            of.setdefault(view.ours, []).append(view)
    found = []
    for ours, group in of.items():
        linear = modules[ours.rpartition(".")[0]]
        assert isinstance(linear, Linear)
        parts = linear.parts if len(group) > 1 else (int(linear.weight.shape[0]),)
        found += [Place(view.name.removesuffix(".weight"), linear, parts, number, view) for number, view in enumerate(group)]
    return found


def chosen(all_places: Sequence[Place], targets: Sequence[str]) -> list[Place]:
    """Those that some names mean, as PEFT matches them: a whole name or its end. Raises UsageError for a name that means none."""
    if tuple(targets) == ("all",):
        return list(all_places)
    found = []
    for target in targets:
        hit = [place for place in all_places if place.module == target or place.module.endswith(f".{target}")]
        if not hit:
            ends = sorted({place.module.rpartition(".")[2] for place in all_places})
            raise UsageError(f"no linear layer is called `{target}`", hint=did_you_mean(target, [*ends, "all"]))
        found += hit
    return found


def family_of_model(model: Model) -> Family:
    """The family in whose words the model's weights are named."""
    return FAMILIES[model.config.model_type]


# -- attach, switch, merge ---------------------------------------------------------------------------------------------


def attach(model: Model, shape: Shape, targets: Sequence[str] = ("all",), *, name: str = "default", seed: int = 0,
           whole: Sequence[str] = ()) -> None:
    """Put a new adapter beside the products that `targets` name, and use it; the model itself is no longer trained, but a
    head outside of its body, and the weights that `whole` names."""
    _place(model, {place.module: shape for place in chosen(places(family_of_model(model), model), targets)}, name, seed)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(".side." in path or path in whole or not path.startswith(("transformer.", "lm_head.")))


def _place(model: Model, shapes: Mapping[str, Shape], name: str, seed: int) -> None:
    by_linear: dict[Linear, list[Place]] = {}
    for place in places(family_of_model(model), model):
        if place.module in shapes:
            by_linear.setdefault(place.linear, []).append(place)
    for number, (linear, group) in enumerate(by_linear.items()):
        if linear.side is None:
            linear.side = Side(number)
        side = linear.side
        assert isinstance(side, Side)
        adapter = LowRank(group[0].parts, [place.part for place in group], linear.width_in, shapes[group[0].module], model.transformer.embed.weight)
        for place in group:
            down = adapter.down[str(place.part)]
            bound = 1 / math.sqrt(linear.width_in)  # as PEFT: Kaiming's uniform with a = sqrt(5)
            values = torch.rand(down.shape, generator=generator(seed, "lora", place.module)) * 2 * bound - bound
            with torch.no_grad():
                down.copy_(values)
        side.named[name] = adapter
    model.transformer.sides = list(sides(model))
    use(model, name)


def sides(model: nn.Module) -> Iterator[Side]:
    """All places where adapters stand."""
    return (module for module in model.modules() if isinstance(module, Side))


@torch.no_grad()
def use(model: nn.Module, name: str | None) -> None:
    """Let one adapter count, with what it brought whole, or none. Raises UsageError for a name that is not there."""
    found = list(sides(model))
    if name is not None and not any(name in side.named for side in found):
        raise UsageError(f"the model has no adapter `{name}`", hint=did_you_mean(name, sorted({n for side in found for n in side.named})))
    for side in found:
        side.use = name
    if (brought := _brought(model)) is not None:
        assert isinstance(model, Model)
        if brought.base:
            places = {view.name: view for view in views(family_of_model(model), model)}
            for published, own in brought.base.items():
                _put(model, places[published], brought.each.get(name, {}).get(published, own))
        model.labels = brought.labels.get(name, brought.labels[None])
        model.kept = {**{key: value for key, value in model.kept.items() if key not in OWN}, **brought.kept.get(name, {})}


def _put(model: Model, view: View, value: Tensor) -> None:
    """Fill a weight, and make it anew where a head gets another number of classes."""
    if tuple(value.shape) == view.shape:
        view.write(value)
        return
    module, _, leaf = view.ours.rpartition(".")
    like, head = view.tensor, model.get_submodule(module)
    setattr(head, leaf, nn.Parameter(value.to(like.device, like.dtype).clone(), requires_grad=False))
    assert isinstance(head, Linear)
    head.parts = (len(value),)


@dataclass
class Brought:
    """What loaded adapters hold whole, by published names: the base's own values, those of each adapter, and the classes of each."""

    base: dict[str, Tensor]
    each: dict[str | None, dict[str, Tensor]]
    labels: dict[str | None, tuple[str, ...]]
    kept: dict[str | None, dict[str, Any]] = field(default_factory=dict)  # what each says to users
    made_of: str | None = None  # `print_of` their base


def _brought(model: nn.Module) -> Brought | None:
    found: Brought | None = model.__dict__.get("brought")
    return found


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """The base alone, for a while."""
    before = next((side.use for side in sides(model)), None)
    use(model, None)
    try:
        yield
    finally:
        use(model, before)


@torch.no_grad()
def merge(model: Model) -> Model:
    """Add the adapter in use to the weights and take all adapters away; returns the model. Raises UsageError where they are
    quantised."""
    refuse_quantized(model, "merged with its adapter")
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(side := module.side, Side):
            if (adapter := side.get(side.use)) is not None:
                every = module.weight.split_with_sizes(list(adapter.parts))
                for number in adapter.chosen:
                    rows = every[number]
                    rows.copy_(rows.double() + adapter.product(number))
            module.side = None
    model.transformer.sides = []
    model.__dict__.pop("brought", None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


# -- files -------------------------------------------------------------------------------------------------------------


def save(model: Model, folder: Path, base: str, whole: Sequence[str] = ()) -> None:
    """Write the adapter in use as PEFT does, with heads that were trained whole, and what `whole` names; `base` is where the base
    is found."""
    family = family_of_model(model)
    name = next((side.use for side in sides(model) if side.use), None)
    if name is None:
        raise UsageError("the model has no adapter in use", hint="save the model itself")
    tensors: dict[str, Tensor] = {}
    modules, shape = [], None
    for place in places(family, model):
        side = place.linear.side
        adapter = side.get(name) if isinstance(side, Side) else None
        if adapter is None or place.part not in adapter.chosen:
            continue
        down, up = adapter.down[str(place.part)], adapter.up[str(place.part)]
        shape = Shape(down.shape[0], adapter.scale * down.shape[0], adapter.dropout)
        modules.append(place.module)
        tensors[f"{PREFIX}{place.module}.lora_A.weight"] = down.detach().clone()
        tensors[f"{PREFIX}{place.module}.lora_B.weight"] = _published(place, up.detach()).clone()
    assert shape is not None
    heads = [view for view in views(family, model) if not view.ours.startswith(("transformer.", "lm_head."))]
    tensors |= {PREFIX + view.name: view.read().clone() for view in (*heads, *(v for v in views(family, model) if v.ours in whole))}
    words: dict[str, Any] = {
        "peft_type": "LORA", "task_type": TASK_TYPES.get(model.task), "base_model_name_or_path": base, "r": shape.rank, "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout, "bias": "none", "inference_mode": True, "target_modules": sorted({_ending(m) for m in modules}),
        "modules_to_save": sorted({view.name.removeprefix(family.prefix).split(".")[0] for view in heads}) or None,
        "fan_in_fan_out": any(r.transform == "transpose" for r in family.renames)}
    files.make_dirs(folder)
    write_safetensors(folder / WEIGHTS, tensors)
    files.write_file(folder / CONFIG, json.dumps(words, indent=2) + "\n")
    if model.labels:  # the names of classes have no place in PEFT's file
        files.write_file(folder / LABELS, json.dumps(list(model.labels), ensure_ascii=False) + "\n")


def _published(place: Place, up: Tensor) -> Tensor:
    """B with its rows in the published order: some families have the two axes of a rotation side by side."""
    weight = place.view.tensor
    return up if weight.ndim == 2 else up.view(-1, 2, weight.shape[1], up.shape[1]).transpose(1, 2).reshape(up.shape)


def _ours(place: Place, published: Tensor) -> Tensor:
    weight = place.view.tensor
    shape = published.shape
    return published if weight.ndim == 2 else published.reshape(-1, weight.shape[1], 2, shape[1]).transpose(1, 2).reshape(shape)


def _ending(module: str) -> str:
    """What follows the number of the layer: enough to name the module and no other."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter alone."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def described(folder: Path) -> tuple[str, str | None, tuple[str, ...]]:
    """Of an adapter's directory: where its base is found, what its head is for, and the names of its classes."""
    found = read_json(folder / CONFIG)
    named = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(named, str) or not named:
        raise ModelError(f"`{folder / CONFIG}` does not name its base", hint="set `base_model_name_or_path`")
    task = next((task for task, word in TASK_TYPES.items() if word == found.get("task_type")), None)
    labels = read_json(folder / LABELS) if (folder / LABELS).is_file() else []
    return named, task, tuple(map(str, labels))


def details(folder: Path) -> dict[str, Any]:
    """What an adapter's directory keeps for its users; empty where it keeps nothing."""
    return read_object(folder / DETAILS)


def print_of(base: Path) -> str:
    """A hash of the sizes and of some stretches of a model's weight files: enough to tell it from one that has learnt on."""
    found = hashlib.sha256()
    for path in sorted(base.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{size} ".encode())
        with path.open("rb") as file:
            for part in range(STRETCHES):
                file.seek(size * part // STRETCHES)
                found.update(file.read(4096))
    return found.hexdigest()


def vocabulary_of(model: Model, folder: Path) -> int | None:
    """How many rows the embedding has that an adapter's directory brings for the model; None where it brings none."""
    name = next(PREFIX + view.name for view in views(family_of_model(model), model) if view.ours == "transformer.embed.weight")
    found = read_safetensors(folder / WEIGHTS).get(name)
    return None if found is None else len(found)


@torch.no_grad()
def load(model: Model, folder: Path, *, name: str = "default") -> None:
    """Put the adapter of a directory beside the model's products, and use it. Raises ModelError where it does not fit."""
    words = read_json(folder / CONFIG)
    if not isinstance(words, dict) or words.get("peft_type") != "LORA":
        raise ModelError(f"`{folder / CONFIG}` describes no LoRA adapter: {str(words)[:80]}", hint="only `peft_type` LORA is understood")
    odd = [key for key, value in words.items() if key not in SILENT and value not in (None, False, {}, [])]
    odd += ["init_lora_weights"] if words.get("init_lora_weights") not in BEGINNINGS else []
    if odd:
        raise ModelError(f"`{folder / CONFIG}` has `{odd[0]}` {str(words[odd[0]])[:60]}, which is not understood",
                         hint="only plain LoRA is, beside a base that stays as it was")
    if words.get("bias", "none") != "none":
        raise ModelError(f"`{folder / CONFIG}` has `bias` {words['bias']!r}, which is not understood", hint="only `none` is")
    brought = _brought(model) or Brought({}, {}, {None: model.labels}, {None: {key: value for key, value in model.kept.items() if key in OWN}})
    made_of = details(folder).get("base")
    if made_of is not None and brought.made_of not in (None, made_of):
        raise ModelError(f"the adapter in `{folder}` was made beside other weights than the one that is there",
                         hint="adapters that stand side by side are of one base")
    tensors = read_safetensors(folder / WEIGHTS)
    known = {place.module: place for place in places(family_of_model(model), model)}
    shape = Shape(int(words.get("r", 0)), float(words.get("lora_alpha", 0)), float(words.get("lora_dropout", 0)))
    modules = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    if foreign := sorted(modules - set(known)):
        raise ModelError(f"the adapter in `{folder}` stands beside `{foreign[0]}`, which this base does not have", hint="is it for another base?")
    for module in modules:
        a, b = tensors[f"{PREFIX}{module}.lora_A.weight"], tensors.get(f"{PREFIX}{module}.lora_B.weight")
        rows, columns = known[module].size
        if b is None or a.shape != (shape.rank, columns) or b.shape != (rows, shape.rank):
            shapes = f"{tuple(a.shape)} and {None if b is None else tuple(b.shape)}"
            raise ModelError(f"the adapter in `{folder}` has {shapes} beside `{module}`, which is {(rows, columns)}", hint="is it for another base?")
    whole = _whole(model, folder, tensors)
    _place(model, dict.fromkeys(modules, shape), name, 0)
    for module in modules:
        place = known[module]
        assert isinstance(place.linear.side, Side)
        adapter = place.linear.side.get(name)
        assert adapter is not None
        adapter.down[str(place.part)].copy_(tensors[f"{PREFIX}{module}.lora_A.weight"])
        adapter.up[str(place.part)].copy_(_ours(place, tensors[f"{PREFIX}{module}.lora_B.weight"]))
    for view, tensor in whole:
        brought.base.setdefault(view.name, view.read().clone())
        brought.each.setdefault(name, {})[view.name] = tensor
    brought.labels[name], brought.made_of = described(folder)[2] or brought.labels[None], brought.made_of or made_of
    brought.kept[name] = {key: value for key, value in details(folder).items() if key in OWN}
    model.__dict__["brought"] = brought
    use(model, name)


def _whole(model: Model, folder: Path, tensors: Mapping[str, Tensor]) -> list[tuple[View, Tensor]]:
    """What an adapter's file holds whole, and where it goes; a head may have another number of classes."""
    places = {PREFIX + view.name: view for view in views(family_of_model(model), model)}
    embedding = next(key for key, view in places.items() if view.ours == "transformer.embed.weight")
    found = []
    for key, tensor in tensors.items():
        if key.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        if key not in places and embedding in tensors and torch.equal(tensor, tensors[embedding]):
            continue  # a head that is tied to the embedding, stored twice
        view = places.get(key)
        fits = view is not None and (tuple(tensor.shape) == view.shape or (view.ours.startswith("head.out.") and tensor.shape[1:] == view.shape[1:]))
        if view is None or not fits:
            raise ModelError(f"the adapter in `{folder}` holds `{key}` {tuple(tensor.shape)}, which this base does not have",
                             hint="is it for another base, or for another task?")
        found.append((view, tensor))
    return found


def classes_of(base: Path, folder: Path, task: str | None) -> int | None:
    """How many classes the head has that an adapter's directory brings for its base; None where it brings none."""
    head = load_config(base)[0].heads.get(task or "")
    names = [PREFIX + theirs for rename in (head.renames if head else ()) if rename.ours == "head.out.weight" for theirs in rename.theirs]
    found = read_safetensors(folder / WEIGHTS)
    return next((len(found[name]) for name in names if name in found), None)

