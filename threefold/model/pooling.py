"""From the states of a text to one vector, as sentence-transformers describes it beside a model.

    modules.json    Transformer -> Pooling -> (Normalize)
                    Transformer -> Pooling -> Dense             a vector is the logits of a classifier

Decision: a Dense is read as the head of a classifier where config.json says so (`classifier_pooling`, a word of transformers), and as
nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold import files
from threefold.errors import ModelError
from threefold.strict_json import read_json, read_object

FILES = ("modules.json", "1_Pooling", "2_Normalize", "2_Dense", "sentence_bert_config.json", "config_sentence_transformers.json")
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
OTHERS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
MODULE = "sentence_transformers.models."


@dataclass(frozen=True)
class Pooling:
    """`how`: mean, cls or last. `normalise`: vectors have length 1. `longest`: tokens that a text is cut to; None: the
    model's context."""

    how: str
    normalise: bool = True
    longest: int | None = None

    def __call__(self, states_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, D) of the states of each text."""
        found = pooled(states_BTD, attention_mask, self.how)
        return torch.nn.functional.normalize(found, dim=-1) if self.normalise else found


def pooled(states_BTD: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector (B, D) of the states of each text: their `mean`, the first (`cls`) or the last that is no padding
    (`last`)."""
    if how == "cls":
        return states_BTD[:, 0]
    mask_BT = torch.ones(states_BTD.shape[:2], dtype=torch.int64, device=states_BTD.device) if attention_mask is None else attention_mask
    if how == "last":
        places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        return states_BTD[torch.arange(len(mask_BT), device=mask_BT.device), (places * mask_BT).argmax(1)]
    weights = mask_BT.to(states_BTD.dtype)[..., None]
    return (states_BTD * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def write_pooling(folder: Path, pooling: Pooling, *, width: int, classes: int = 0) -> None:
    """Describe it beside a model that was saved in the folder; with `classes`, a projection behind it whose weights lie in 2_Dense."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if pooling.normalise else []),
               *([("2_Dense", "Dense")] if classes else [])]
    named = [{"idx": n, "name": str(n), "path": path, "type": MODULE + kind} for n, (path, kind) in enumerate(modules)]
    modes: dict[str, Any] = {"word_embedding_dimension": width, **dict.fromkeys((*MODES.values(), *OTHERS), False), MODES[pooling.how]: True}
    contents = {"modules.json": named, "1_Pooling/config.json": modes,
                "sentence_bert_config.json": {"max_seq_length": pooling.longest, "do_lower_case": False},
                "config_sentence_transformers.json": {"similarity_fn_name": "cosine"}}
    if classes:
        contents["2_Dense/config.json"] = {"in_features": width, "out_features": classes, "bias": True,
                                           "activation_function": "torch.nn.modules.linear.Identity"}
        files.make_dirs(folder / "2_Dense")
    files.make_dirs(folder / "1_Pooling")
    if pooling.normalise:
        files.make_dirs(folder / "2_Normalize")
    for name, content in contents.items():
        files.write_file(folder / name, json.dumps(content, indent=2) + "\n")


def read_pooling(folder: Path) -> Pooling | None:
    """How the model in a folder makes vectors; None where nothing says so, and for a classifier. Raises ModelError for a kind that is not
    understood."""
    return None if is_classifier(folder) else _read(folder, ("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a classifier over pooled states. Raises ModelError where it pools in a way that is not known."""
    how = read_object(folder / "config.json").get("classifier_pooling")
    if how is not None and how not in MODES:
        raise ModelError(f"`{folder / 'config.json'}` has `classifier_pooling` {str(how)[:60]!r}", hint=f"understood are {', '.join(MODES)}")
    return how is not None


def read_classifier_pooling(folder: Path) -> Pooling | None:
    """How the states of a classifier are pooled; None where the folder holds none. Raises ModelError for a kind that is not understood."""
    if not is_classifier(folder):
        return None
    found = _read(folder, ("Transformer", "Pooling", "Dense"))
    if found is None:
        raise ModelError(f"`{folder}` is a classifier over pooled states, and has no modules.json")
    return found


def _modes(config: Mapping[str, Any]) -> list[str]:
    """The ways that a file names, in our words as far as we have them: a truth value for each, or since version 6 a word or several."""
    if (named := config.get("pooling_mode")) is None:
        return [*(how for how, key in MODES.items() if config.get(key)), *(key for key in OTHERS if config.get(key))]
    return ["last" if name == "lasttoken" else str(name) for name in ([named] if isinstance(named, str) else named)]


def _read(folder: Path, *understood: tuple[str, ...]) -> Pooling | None:
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json")
    kinds = tuple(str(m.get("type", "")).rpartition(".")[2] for m in modules) if isinstance(modules, list) else ()
    if kinds not in understood:
        raise ModelError(f"`{folder / 'modules.json'}` has the modules {list(kinds)}, understood are {', '.join(understood[-1])}")
    modes = read_json(folder / str(modules[1].get("path", "1_Pooling")) / "config.json")
    chosen = _modes(modes) if isinstance(modes, dict) else []
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise ModelError(f"`{folder / '1_Pooling'}` pools in a way that is not understood: {', '.join(chosen) or 'none'}",
                         hint=f"known are {', '.join(MODES)}")
    beside = read_json(folder / "sentence_bert_config.json") if (folder / "sentence_bert_config.json").is_file() else {}
    longest = beside.get("max_seq_length") if isinstance(beside, dict) else None
    return Pooling(chosen[0], "Normalize" in kinds, longest if isinstance(longest, int) else None)
