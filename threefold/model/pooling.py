"""From the states of a text to one vector, as sentence-transformers describes it beside a model.

    modules.json    Transformer -> Pooling -> (Normalize)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold import files
from threefold.errors import ModelError
from threefold.strict_json import read_json

FILES = ("modules.json", "1_Pooling", "2_Normalize", "sentence_bert_config.json", "config_sentence_transformers.json")
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


def write_pooling(folder: Path, pooling: Pooling, *, width: int) -> None:
    """Describe it beside a model that was saved in the folder."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if pooling.normalise else [])]
    named = [{"idx": n, "name": str(n), "path": path, "type": MODULE + kind} for n, (path, kind) in enumerate(modules)]
    modes: dict[str, Any] = {"word_embedding_dimension": width, **dict.fromkeys((*MODES.values(), *OTHERS), False), MODES[pooling.how]: True}
    contents = {"modules.json": named, "1_Pooling/config.json": modes,
                "sentence_bert_config.json": {"max_seq_length": pooling.longest, "do_lower_case": False},
                "config_sentence_transformers.json": {"similarity_fn_name": "cosine"}}
    files.make_dirs(folder / "1_Pooling")
    if pooling.normalise:
        files.make_dirs(folder / "2_Normalize")
    for name, content in contents.items():
        files.write_file(folder / name, json.dumps(content, indent=2) + "\n")


def read_pooling(folder: Path) -> Pooling | None:
    """What stands beside a model, or None. Raises ModelError for a kind that is not understood."""
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json")
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules] if isinstance(modules, list) else []
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(f"`{folder / 'modules.json'}` has the modules {kinds}, understood are Transformer, Pooling and Normalize")
    modes = read_json(folder / str(modules[1].get("path", "1_Pooling")) / "config.json")
    chosen = [how for how, key in MODES.items() if isinstance(modes, dict) and modes.get(key)]
    if not isinstance(modes, dict) or len(chosen) != 1 or any(modes.get(key) for key in OTHERS):
        raise ModelError(f"`{folder / '1_Pooling'}` pools in a way that is not understood: {chosen or 'none known'}",
                         hint=f"known are {', '.join(MODES)}")
    beside = read_json(folder / "sentence_bert_config.json") if (folder / "sentence_bert_config.json").is_file() else {}
    longest = beside.get("max_seq_length") if isinstance(beside, dict) else None
    return Pooling(chosen[0], len(kinds) == 3, longest if isinstance(longest, int) else None)
