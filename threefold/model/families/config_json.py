"""A family's config.json <-> our configuration.

Decision: what is written is read again at once. A configuration that does not come back the same is one that the family has
no words for, and that is said instead of written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from threefold.errors import ConfigError, ModelError, did_you_mean
from threefold.model.config import TransformerConfig
from threefold.model.families.family import INERT, ONLY, Family

IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def config_from_hf(family: Family, theirs: Mapping[str, Any], notes: list[str] | None = None) -> TransformerConfig:
    """Our configuration for a config.json; raises `ModelError` for keys and values that are not understood, all at
    once."""
    theirs = dict(theirs)
    if theirs.pop("auto_map", None) is not None and notes is not None:
        notes.append("config.json asks for code of its own (`auto_map`): it is not run")
    problems: list[str] = []
    changes = _read_keys(family, theirs, problems)
    for words in family.words:
        try:
            changes |= words.read(theirs)
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as problem:
            named = ", ".join(f"`{key}`" for key in words.keys)
            problems.append(str(problem) if isinstance(problem, ValueError) and str(problem) else f"{named} cannot be read ({problem!r})")
    if problems:
        raise ModelError(f"config.json of this `{family.name}` model is not understood: {'; '.join(problems)}",
                         hint="an option that is overlooked would give a model that is subtly wrong")
    if changes.get("hidden_act") == "swish":  # its older name
        changes["hidden_act"] = "silu"
    changes |= {name: _plain(theirs[name]) for name in IDS if name in theirs}
    changes = _completed(family, theirs, changes)
    try:
        return dataclasses.replace(family.base, **changes)
    except (ConfigError, TypeError) as problem:
        raise ModelError(f"config.json: {problem}") from problem


def _read_keys(family: Family, theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    only = {"is_encoder_decoder": (family.base.is_encoder_decoder, None), **ONLY, **family.only}
    worded = {key for words in family.words for key in words.keys}
    changes: dict[str, Any] = {}
    for key, value in theirs.items():
        if key in family.keys:
            ours = family.keys[key]
            for name in (ours,) if isinstance(ours, str) else ours:
                if changes.get(name, value) != value:
                    problems.append(f"`{key}` is {value!r}, and another key of the same meaning {changes[name]!r}")
                changes[name] = _plain(value)
        elif key in worded or key in family.inert or key in INERT:
            continue
        elif key == "layer_types":
            if value is not None and not (isinstance(value, list) and all(kind == "full_attention" for kind in value)):
                problems.append(f"`layer_types` is {str(value)[:80]}, understood is `full_attention` for each layer")
        elif key in only:
            if value not in only[key]:
                problems.append(f"`{key}` is {value!r}, understood is {', '.join(repr(v) for v in only[key])}")
        else:
            near = did_you_mean(key, [*family.keys, *only, *worded])
            problems.append(f"`{key}` is not a known key" + (f" ({near})" if near.startswith("did") else ""))
    return changes


def _completed(family: Family, theirs: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """What is absent or null has the value that transformers gives it."""
    base, own = family.base, family.same_head_dim
    heads = changes.get("num_attention_heads") or base.num_attention_heads
    width = changes.get("hidden_size") or base.hidden_size
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise ModelError(f"config.json has {heads!r} heads and a width of {width!r}, expected positive whole numbers")
    if own and width % heads:
        raise ModelError(f"config.json: a width of {width} cannot be divided among {heads} heads")
    if changes.get("num_key_value_heads") is None:
        same = "num_key_value_heads" in theirs or own or "num_key_value_heads" not in _fields(family)
        changes["num_key_value_heads"] = heads if same else min(heads, base.num_key_value_heads)
    if changes.get("head_dim") is None:
        changes["head_dim"] = width // heads if own or "head_dim" in theirs else base.head_dim
    if changes.get("intermediate_size") is None and not base.gated_mlp and base.intermediate_size == 4 * base.hidden_size:
        changes["intermediate_size"] = 4 * width
    if changes.get("embedding_size") is None and "embedding_size" not in _fields(family):
        changes["embedding_size"] = width
    empty = ("rope_scaling", "attention_scale", *IDS)
    return {key: value for key, value in changes.items() if value is not None or key in empty}


def _fields(family: Family) -> set[str]:
    return {name for ours in family.keys.values() for name in ((ours,) if isinstance(ours, str) else ours)}


def config_to_hf(family: Family, config: TransformerConfig, dtype: str, architecture: str = "") -> dict[str, Any]:
    """The config.json that transformers takes for this configuration; raises `ModelError` where the family has no
    words for it."""
    theirs: dict[str, Any] = {"architectures": [architecture or next(iter(family.heads.values())).architecture],
                              "model_type": family.model_type}
    for key, ours in family.keys.items():
        value = getattr(config, ours if isinstance(ours, str) else ours[0])
        theirs[key] = list(value) if isinstance(value, tuple) else value
    for words in family.words:
        theirs |= words.write(config)
    for name in IDS:
        if getattr(config, name) is not None or getattr(family.base, name) is not None or name in ("bos_token_id", "eos_token_id"):
            value = getattr(config, name)
            theirs[name] = list(value) if isinstance(value, tuple) else value
    if config.is_encoder_decoder:
        theirs["is_encoder_decoder"] = True
    begins = family.base.initializer_range if config.initializer_range is None else config.initializer_range
    if begins is not None:  # how transformers begins a head that is put on the model
        theirs["initializer_range"] = begins
    theirs["dtype"] = theirs["torch_dtype"] = dtype  # its name before transformers 4.56
    again = dataclasses.replace(config_from_hf(family, theirs), initializer_range=config.initializer_range,
                                model_type=config.model_type)
    lost = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
    if lost:
        raise ModelError(f"a `{family.name}` model cannot have " + ", ".join(f"`{name}` {getattr(config, name)!r}" for name in lost))
    return theirs


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
