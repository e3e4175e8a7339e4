"""What a family is: a base configuration, published sizes, and two tables of names. No behaviour of its own.

Decisions:
- A table of weights is read in both directions, so that what was read can be written back bit for bit. A rename may
  turn a matrix (published GPT-2 stores its transpose) or join several into one of ours; both can be undone exactly.
- Every key of a foreign config.json is mapped, known to say nothing about the mathematics, or required to have a value
  that means what we do. Anything else is refused by name: a key that is overlooked is a model that is subtly wrong.
- Keys that are absent have transformers' own defaults, for that is what their absence meant where the file was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from threefold.errors import ConfigError, ModelError, did_you_mean
from threefold.model.config import ROPE_SCALINGS, TransformerConfig

# Keys that transformers or the tools around it write and that do not change what a model computes.
INERT = frozenset(
    ["_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
     "initializer_range", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id",
     "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "model_type", "return_dict",
     "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss",
     "gradient_checkpointing", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
     "finetuning_task", "prefix", "tokenizer_class", "name_or_path", "_commit_hash", "attn_implementation",
     "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "max_length",
     "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
     "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
     "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
     "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
     "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
     "unsloth_version", "unsloth_fixed", "pretraining_tp"]
)
# Keys that are understood in every family, for these values alone.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None,),
    "tie_last_hidden_states": (None,),
}
# Head weights that a file may have beside the body: announced, not used.
OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.", "value_head.", "summary.")

Transform = Literal["same", "transpose", "join"]


@dataclass(frozen=True)
class Rename:
    """`theirs` (names in a published file, without prefix) <-> `ours` (in `CausalLM`). `{}` is the number of the layer.

    `transpose` turns a matrix; `join` lays several tensors under each other, in order, cut again by `rows` (names of
    row counts).
    """

    theirs: tuple[str, ...]
    ours: str
    transform: Transform = "same"
    rows: tuple[Literal["queries", "keys", "hidden"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families; `keys` maps their config.json to our fields, `form` are the fields that the
    family fixes."""

    name: str
    architecture: str                                # transformers' class for the language model
    tokenizer: str                                   # the default kind for a new model
    prefix: str                                      # before the names of the body in published files; some lack it
    base: TransformerConfig                          # transformers' defaults
    sizes: Mapping[str, TransformerConfig]           # name -> published or own size; `nano` is the smallest
    keys: Mapping[str, str]                          # their key -> our field, one to one
    form: tuple[str, ...]                            # our fields that no key of theirs can change
    renames: tuple[Rename, ...]
    legacy: tuple[str, ...] = ()                     # regular expressions of weight names that mean nothing
    inert: frozenset[str] = frozenset()              # further keys that mean nothing
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    same_head_dim: bool = False                      # the width must be divisible into the heads


def size(base: TransformerConfig, **changes: Any) -> TransformerConfig:
    """A size: the base with some fields changed; `head_dim` and key heads follow the heads unless they are given."""
    heads = changes.get("num_attention_heads", base.num_attention_heads)
    changes.setdefault("num_key_value_heads", heads)
    changes.setdefault("head_dim", changes.get("hidden_size", base.hidden_size) // heads)
    return dataclasses.replace(base, **changes)


# -- config.json -------------------------------------------------------------------------------------------------------


def config_from_hf(family: Family, theirs: Mapping[str, Any], notes: list[str] | None = None) -> TransformerConfig:
    """Our configuration for a config.json; raises `ModelError` for keys and values that are not understood, all at
    once."""
    theirs = dict(theirs.items())
    if theirs.pop("auto_map", None) is not None and notes is not None:
        notes.append("config.json asks for code of its own (`auto_map`): it is not run")
    only = {**ONLY, **family.only}
    problems: list[str] = []
    changes: dict[str, Any] = {}
    rope_keys = (
        {"rope_theta", "rope_scaling", "rope_parameters"} if family.base.position_embedding_type == "rotary" else set()
    )
    for key, value in theirs.items():
        if key in family.keys:
            changes[family.keys[key]] = tuple(value) if isinstance(value, list) else value
        elif key in family.inert or key in INERT or key in rope_keys:
            continue
        elif key == "layer_types":
            if value is not None and set(value) != {"full_attention"}:
                problems.append(f"`layer_types` has {sorted(set(value))}, understood is `full_attention`")
        elif key in only:
            if value not in only[key]:
                problems.append(f"`{key}` is {value!r}, understood is {', '.join(repr(v) for v in only[key])}")
        else:
            known = [*family.keys, *only, *rope_keys]
            problems.append(
                f"`{key}` is not a known key ({did_you_mean(key, known)})"
                if did_you_mean(key, known).startswith("did")
                else f"`{key}` is not a known key"
            )
    if rope_keys:
        try:
            changes["rope_theta"], changes["rope_scaling"] = _rope_from_hf(theirs, family.base)
        except (TypeError, ValueError) as problem:
            problems.append(str(problem))
    if problems:
        raise ModelError(f"config.json of this `{family.name}` model is not understood: {'; '.join(problems)}",
                         hint="an option that is overlooked would give a model that is subtly wrong")
    # What is absent or null has the value that transformers gives it.
    heads = changes.get("num_attention_heads") or family.base.num_attention_heads
    width = changes.get("hidden_size") or family.base.hidden_size
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise ModelError(f"config.json has {heads!r} heads and a width of {width!r}, expected positive whole numbers")
    if changes.get("num_key_value_heads") is None:
        changes["num_key_value_heads"] = (
            heads
            if "num_key_value_heads" in theirs or family.same_head_dim
            else min(heads, family.base.num_key_value_heads)
        )
    if changes.get("head_dim") is None:
        changes["head_dim"] = width // heads if family.same_head_dim or "head_dim" in theirs else family.base.head_dim
    if changes.get("intermediate_size") is None and not family.base.gated_mlp:
        changes["intermediate_size"] = 4 * width
    for name in ("bos_token_id", "eos_token_id"):
        if name not in theirs:
            changes[name] = getattr(family.base, name)
    changes = {
        key: value
        for key, value in changes.items()
        if value is not None or key in ("bos_token_id", "eos_token_id", "rope_scaling")
    }
    try:
        config = dataclasses.replace(family.base, **changes)
    except (ConfigError, TypeError) as problem:
        raise ModelError(f"config.json: {problem}") from problem
    if family.same_head_dim and width % heads:
        raise ModelError(f"config.json: a width of {width} cannot be divided among {heads} heads")
    return config


def config_to_hf(family: Family, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers takes for this configuration; raises `ModelError` where the family has no
    words for it."""
    fixed = [name for name in family.form if getattr(config, name) != getattr(family.base, name)]
    if config.position_embedding_type != "rotary":
        fixed += [name for name in ("rope_theta", "rope_scaling") if getattr(config, name) is not None]
    if (
        family.same_head_dim
        and family.base.position_embedding_type == "absolute"
        and config.head_dim * config.num_attention_heads != config.hidden_size
    ):
        fixed.append("head_dim")
    if fixed:
        raise ModelError(
            f"a `{family.name}` model cannot have " + ", ".join(f"`{name}` {getattr(config, name)!r}" for name in fixed)
        )
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name}
    for key, ours in family.keys.items():
        value = getattr(config, ours)
        theirs[key] = list(value) if isinstance(value, tuple) else value
    if config.position_embedding_type == "rotary":
        # Both dialects: `rope_parameters` is transformers 5's, `rope_theta` is read by everything older.
        theirs["rope_theta"] = config.rope_theta
        theirs["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            **dict(config.rope_scaling or ()),
        }
        if config.rope_scaling:
            theirs["rope_scaling"] = dict(config.rope_scaling)
    if config.initializer_range is not None:
        theirs["initializer_range"] = config.initializer_range
    theirs["dtype"] = dtype
    return theirs


def _rope_from_hf(theirs: Mapping[str, Any], base: TransformerConfig) -> tuple[Any, tuple[tuple[str, Any], ...] | None]:
    """Theta and scaling from either dialect. Where both stand, the newer one is read, and they must not contradict
    each other."""
    parameters, scaling = theirs.get("rope_parameters"), theirs.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"`{name}` is {value!r}, expected an object")
    found: dict[str, Any] = {}
    for source in (scaling, parameters):
        words = {
            ("rope_type" if key == "type" else key): value for key, value in (source or {}).items() if value is not None
        }
        for key, value in words.items():
            if key in found and found[key] != value:
                raise ValueError(
                    f"`rope_scaling` and `rope_parameters` give different values for `{key}`: {found[key]!r} and {value!r}"
                )
        found.update(words)
    theta = found.pop("rope_theta", None)
    outer = theirs.get("rope_theta")
    if None not in (theta, outer) and theta != outer:
        raise ValueError(f"`rope_theta` is {outer!r} and in the rope parameters {theta!r}")
    theta = theta if theta is not None else outer if outer is not None else 10000.0
    if found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("a rotation of a part of each head (`partial_rotary_factor`) is not understood")
    kind = found.pop("rope_type", "default")
    if kind == "default":
        if found:
            raise ValueError(f"rope parameters {found} do not belong to type `default`")
        return theta, None
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"`rope_type` is {kind!r}, understood are `default`, {', '.join(f'`{k}`' for k in ROPE_SCALINGS)}"
        )
    return theta, (("rope_type", kind), *sorted(found.items()))


# -- names of weights --------------------------------------------------------------------------------------------------


def each_rename(family: Family, config: TransformerConfig) -> Iterator[Rename]:
    """The renames that this configuration needs, with layers filled in. The head is the last, where it is not tied."""
    absent = _absent(config)
    for rename in family.renames:
        if any(word in rename.ours for word in absent):
            continue
        layers = range(config.num_hidden_layers) if "{}" in rename.ours else range(1)
        for layer in layers:
            yield dataclasses.replace(rename, theirs=tuple(name.replace("{}", str(layer)) for name in rename.theirs),
                                      ours=rename.ours.replace("{}", str(layer)))


def row_counts(config: TransformerConfig) -> dict[str, int]:
    """What the `rows` of a rename stand for."""
    return {
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "hidden": config.intermediate_size,
    }


def _absent(config: TransformerConfig) -> list[str]:
    absent = []
    if config.tie_word_embeddings:
        absent.append("lm_head.weight")
    if not config.attention_bias:
        absent += ["qkv.bias", "out.bias"]
    if not config.mlp_bias:
        absent += ["gate_up.bias", ".up.bias", "down.bias"]
    return absent
