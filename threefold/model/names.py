"""Names of weights: ours <-> those of published files, through a family's table.

Decision: there is one walk over a table, which gives for each published name a view of our tensor. Reading writes into the
views and writing reads from them, so that neither can differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from threefold.model.base import Model
from threefold.model.families.family import OTHER_HEADS, Family, Rename


@dataclass(frozen=True)
class View:
    """A published weight as a view of one of ours (`ours`): of any strides, and to be read in another `shape`."""

    name: str
    ours: str
    tensor: Tensor
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The weight as it is published."""
        return self.tensor.reshape(self.shape)

    def write(self, published: Tensor) -> None:
        """Fill ours with a published one."""
        self.tensor.copy_(published.reshape(self.tensor.shape))


def views(family: Family, model: Model) -> Iterator[View]:
    """Each weight of the model under its published name; the head's come last."""
    parameters = {name: p for name, p in model.named_parameters() if ".side." not in name}  # adapters have files of their own
    modules = dict(model.named_modules())
    head, head_dim = family.heads[model.task], model.config.head_dim
    seen: set[str] = set()
    for renames, before in ((family.renames, family.prefix_of(model.task)), (head.renames, "")):
        for rename in renames:
            for theirs, ours in _filled(rename, parameters):
                seen.add(ours)
                parts = _parts(rename, parameters[ours].detach(), modules[ours.rpartition(".")[0]])
                for number, (name, part) in enumerate(zip(theirs, parts, strict=True)):
                    shape = tuple(part.shape)
                    if number < rename.pairs:
                        part = part.view(-1, 2, head_dim // 2, *part.shape[1:]).transpose(1, 2)
                    yield View(before + name, ours, part, shape)
    if missing := sorted(set(parameters) - seen):
        raise AssertionError(f"the table of `{family.name}` has no name for {missing}")


def _filled(rename: Rename, parameters: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The names with layers filled in, as far as the model has such weights."""
    layer = 0
    while (ours := rename.ours.replace("{}", str(layer))) in parameters:
        yield tuple(name.replace("{}", str(layer)) for name in rename.theirs), ours
        layer += 1
        if "{}" not in rename.ours:
            return


def _parts(rename: Rename, whole: Tensor, module: nn.Module) -> list[Tensor]:
    if rename.transform == "transpose":
        return [whole.mT if whole.ndim == 2 else whole]
    if rename.transform == "row":
        return [whole[None]]
    return [whole] if len(rename.theirs) == 1 else list(whole.split_with_sizes(list(module.parts)))  # type: ignore[arg-type]


def normalised(family: Family, task: str, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names that `task` has: bodies saved without a head, or under another one, have another
    prefix."""
    wanted = family.prefix_of(task)
    bodies = sorted({family.prefix, *(h.prefix for h in family.heads.values() if h.prefix is not None)}, key=len, reverse=True)
    own = {name.partition("{}")[0] for h in family.heads.values() for rename in h.renames for name in rename.theirs
           if not any(name.startswith(before) for before in bodies if before)}
    body = tuple({name.partition("{}")[0] for rename in family.renames for name in rename.theirs})  # a pooler may be of it
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        before = next((b for b in bodies if b and name.startswith(b)), "")
        if before or name.startswith(body) or not name.startswith((*own, *OTHER_HEADS)):
            name = wanted + name.removeprefix(before)
        found[name] = tensor
    return found


@torch.no_grad()
def fill(family: Family, model: Model, theirs: Mapping[str, Tensor]) -> None:
    """Give the model the published weights that are there."""
    for view in views(family, model):
        if view.name in theirs:
            view.write(theirs[view.name])
