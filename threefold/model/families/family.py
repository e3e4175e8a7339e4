"""What a family is: a base configuration, published sizes, and two tables of names. No behaviour of its own.

Decisions:
- A table of weights is read in both directions, so that what was read can be written back bit for bit. A rename may
  turn a matrix (published GPT-2 stores its transpose), join several into one of ours, or bring the two halves of a
  rotation into our order; each can be undone exactly.
- Every key of a foreign config.json is mapped, known to say nothing about the mathematics, or required to have a value
  that means what we do. Anything else is refused by name: a key that is overlooked is a model that is subtly wrong.
- Keys that are absent have transformers' own defaults, for that is what their absence meant where the file was written.
- Where one key of theirs is not one field of ours, a pair of small functions stands for both directions (`Words`).
- What a head is called belongs to the family and the task: one row of `heads` each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from threefold.model.config import TransformerConfig

# Keys that transformers or the tools around it write and that do not change what a model computes.
INERT = frozenset(
    ["_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
     "initializer_range", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "bos_token_id", "eos_token_id",
     "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "model_type", "return_dict",
     "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss",
     "gradient_checkpointing", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
     "finetuning_task", "classifier_pooling", "prefix", "tokenizer_class", "name_or_path", "_commit_hash", "attn_implementation",
     "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "max_length",
     "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
     "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
     "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
     "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
     "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
     "unsloth_version", "unsloth_fixed", "pretraining_tp", "_num_labels", "classifier_dropout",
     "gradient_checkpointing_kwargs", "threefold",
     "n_special", "predict_special_tokens", "output_past", "is_llama_config", "max_sequence_length", "transformers.js_config",
     "language", "name", "author", "created_date", "license"]
)
# Keys that are understood in every family, for these values alone.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None,),
    "rope_interleaved": (False, None),
    "tie_last_hidden_states": (None,),
    "layerdrop": (0.0, 0),
    "activation_dropout": (0.0, 0),
}
# Names of heads that files have beside the body and that no row of a table knows: announced, not used.
OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.", "value_head.", "summary.",
               "sequence_summary.", "lm_head.", "cls.", "pooler.", "generator_predictions.", "generator_lm_head.",
               "discriminator_predictions.", "classification_head.", "qa_head.")

Transform = Literal["same", "transpose", "row"]


@dataclass(frozen=True)
class Rename:
    """`theirs` (names in a published file, without prefix) <-> `ours` (in the model). `{}` is the number of the layer.

    `transpose` turns a matrix, `row` is a vector that is published as a matrix of one row. Several of theirs lie under
    each other in one of ours, cut where its own parts meet. `pairs`: the first so many of them hold rotations whose two
    axes stand side by side there, and half a head apart here.
    """

    theirs: tuple[str, ...]
    ours: str
    transform: Transform = "same"
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class Head:
    """One task of a family. `architecture` is transformers' class for it; `prefix` stands before the body's names where
    it is another than the family's.

    pooler         the first state goes through a dense layer and tanh
    reads          where a classifier reads its judgement (classifiers.py)
    activation     of a dense layer before a classifier's projection: a name, `hidden_act`, or None: there is no such layer
    encoder_alone  an encoder-decoder is used without its decoder
    """

    architecture: str
    renames: tuple[Rename, ...] = ()
    prefix: str | None = None
    pooler: bool = False
    reads: Literal["pooled", "first", "last", "end"] = "last"
    activation: str | None = None
    bias: bool = True
    encoder_alone: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)  # a second name under which a weight of the head may stand


@dataclass(frozen=True, kw_only=True)
class Words:
    """Keys of theirs that are read together: `read(their config)` gives our fields (raising ValueError for what is not
    understood), `write(our config)` their keys."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families."""

    name: str
    model_type: str                                  # what transformers calls it
    tokenizer: str                                   # the default kind for a new model
    prefix: str                                      # before the names of the body in published files; some lack it
    base: TransformerConfig                          # transformers' defaults
    new: Mapping[str, Any] = field(default_factory=dict)  # fields of a new model of our own, where they are others
    sizes: Mapping[str, TransformerConfig]           # name -> published or own size; `nano` is the smallest
    keys: Mapping[str, str | tuple[str, ...]]        # their key -> our field, or fields that share it
    heads: Mapping[str, Head]                        # task -> what its head is called; the first is the family's own
    renames: tuple[Rename, ...]                      # of the body
    words: tuple[Words, ...] = ()
    legacy: tuple[str, ...] = ()                     # regular expressions of weight names that mean nothing
    spellings: tuple[tuple[str, str], ...] = ()      # (regular expression, replacement) from older names to newer
    inert: frozenset[str] = frozenset()              # further keys that mean nothing
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)  # a second name under which a weight may stand too
    same_head_dim: bool = False                      # the width must be divisible into the heads
    also: tuple[str, ...] = ()                       # families whose words serve where this one has none

    def prefix_of(self, task: str) -> str:
        """What stands before the body's names in a file that is saved for a task."""
        prefix = self.heads[task].prefix
        return "" if task in ("body", "encoder") else self.prefix if prefix is None else prefix


def without(renames: Sequence[Rename], *parts: str) -> tuple[Rename, ...]:
    """Those of a relative whose names with us hold none of the `parts`."""
    return tuple(rename for rename in renames if not any(part in rename.ours for part in parts))


def plain(model_type: str, **fields: Any) -> TransformerConfig:
    """A base configuration: what is not named is not there (no bias, no dropout, no segments, no special ids)."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    absent: dict[str, Any] = {
        "embedding_size": width, "num_encoder_layers": 0, "num_decoder_layers": 0, "num_key_value_heads": heads,
        "head_dim": width // heads, "gated_mlp": False, "norm_bias": fields["norm_type"] == "layer_norm", "norm_order": "pre",
        "embedding_norm": False, "scale_embedding": False, "position_offset": 0, "relative_buckets": 0,
        "relative_max_distance": 0, "rope_theta": None, "rope_scaling": None, "attention_scale": None, "attention_bias": False,
        "attention_out_bias": fields.get("attention_bias", False), "attention_windows": (), "mlp_bias": False, "qk_norm": False,
        "type_vocab_size": 0, "head_transform": False, "head_bias": False, "logit_scale": 1.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "attention_dropout": 0.0, "initializer_range": None, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "decoder_start_token_id": None}
    return TransformerConfig(model_type=model_type, **{**absent, **fields})


def size(base: TransformerConfig, **changes: Any) -> TransformerConfig:
    """A size: the base with some fields changed; head width, key heads and the embedding follow unless they are given."""
    heads = changes.get("num_attention_heads", base.num_attention_heads)
    width = changes.get("hidden_size", base.hidden_size)
    changes.setdefault("num_key_value_heads", heads)
    changes.setdefault("head_dim", width // heads)
    changes.setdefault("embedding_size", width)
    return dataclasses.replace(base, **changes)
