"""The words for a rotation in a config.json, in both dialects: `rope_parameters` is transformers 5's, `rope_theta` and
`rope_scaling` are read by everything older."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from threefold.model.config import ROPE_SCALINGS, TransformerConfig
from threefold.model.families.family import Words

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def read(theirs: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Theta and scaling from either dialect. Where both stand, the newer one is read, and they must not contradict
    each other; `theta` is what its absence means."""
    parameters, scaling = theirs.get("rope_parameters"), theirs.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"`{name}` is {value!r}, expected an object")
    found: dict[str, Any] = {}
    for source in (scaling, parameters):
        words = {
            ("rope_type" if key == "type" else key): tuple(value) if isinstance(value, list) else value
            for key, value in (source or {}).items() if value is not None
        }
        for key, value in words.items():
            if key in found and found[key] != value:
                raise ValueError(
                    f"`rope_scaling` and `rope_parameters` give different values for `{key}`: {found[key]!r} and {value!r}"
                )
        found.update(words)
    inner, outer = found.pop("rope_theta", None), theirs.get("rope_theta")
    if None not in (inner, outer) and inner != outer:
        raise ValueError(f"`rope_theta` is {outer!r} and in the rope parameters {inner!r}")
    theta = inner if inner is not None else outer if outer is not None else theta
    if found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("a rotation of a part of each head (`partial_rotary_factor`) is not understood")
    kind = found.pop("rope_type", "default")
    if kind == "default":
        found.pop("original_max_position_embeddings", None)  # of no use to a plain rotation
        if found:
            raise ValueError(f"rope parameters {found} do not belong to type `default`")
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"`rope_type` is {kind!r}, understood are `default`, {', '.join(f'`{k}`' for k in ROPE_SCALINGS)}"
        )
    return {"rope_theta": theta, "rope_scaling": (("rope_type", kind), *sorted(found.items()))}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Both dialects."""
    scaling = {key: list(value) if isinstance(value, tuple) else value for key, value in config.rope_scaling or ()}
    theirs: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **scaling},
    }
    return {**theirs, "rope_scaling": scaling} if scaling else theirs


ROPE = Words(keys=KEYS, read=read, write=write)
