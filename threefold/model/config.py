"""What a model is: plain literal fields that say which parts stand where and how large they are.

Decisions:
- The values of options are the words of transformers' own configurations (`gelu_new`, `silu`, `rotary`, `llama3`).
- A field is here because two families (or two published sizes) differ in it; a test keeps it so.
- Parts take plain arguments, so that none knows more than it uses: build.py and the families read this class for them.
- Frozen and hashable: a configuration is a value. An impossible one cannot be made, and all its problems are told at
  once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from threefold.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
NORMS = ("layer_norm", "rms_norm")
NORM_ORDERS = ("pre", "post", "parallel")
POSITIONS = ("absolute", "sinusoidal", "rotary", "relative")
ROPE_SCALINGS: dict[str, dict[str, bool]] = {  # type -> its parameters, and whether they must be given
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": True,
    },
    "longrope": {
        "short_factor": True,
        "long_factor": True,
        "original_max_position_embeddings": True,
        "factor": False,
        "attention_factor": False,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}

# Other words under which the ecosystem asks for the same thing (`model.config.n_embd`).
ALIASES = {
    "n_embd": "hidden_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "num_heads": "num_attention_heads", "d_kv": "head_dim", "d_ff": "intermediate_size",
    "encoder_layers": "num_encoder_layers", "decoder_layers": "num_decoder_layers",
    "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings", "n_inner": "intermediate_size",
    "activation_function": "hidden_act", "layer_norm_epsilon": "norm_eps", "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps", "attn_pdrop": "attention_dropout",
}
COUNTS = ("vocab_size", "hidden_size", "embedding_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "max_position_embeddings")
COUNTS_OR_ZERO = ("num_encoder_layers", "num_decoder_layers", "type_vocab_size", "position_offset", "relative_buckets",
                  "relative_max_distance")
FLAGS = ("gated_mlp", "norm_bias", "embedding_norm", "scale_embedding", "attention_bias", "attention_out_bias", "mlp_bias",
         "qk_norm", "tie_word_embeddings", "head_bias", "head_transform")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The whole description of a Transformer. Sizes are counts, `*_pdrop` and `*_dropout` probabilities.

    Raises `ConfigError` with every problem found when the fields do not fit together.
    """

    model_type: str                      # the family: names its table of weights, decides nothing else
    vocab_size: int
    hidden_size: int                     # D
    embedding_size: int                  # width of the token table; a projection leads from it to D where they differ
    num_encoder_layers: int              # 0: there is no encoder
    num_decoder_layers: int              # 0: there is no decoder
    num_attention_heads: int             # H
    num_key_value_heads: int             # K; H / K queries share a key head (arXiv 2305.13245)
    head_dim: int                        # E; H * E need not be D
    intermediate_size: int               # F
    max_position_embeddings: int         # the longest context that the model is meant for
    hidden_act: str                      # of ACTIVATIONS
    gated_mlp: bool                      # act(gate) * up instead of act(up) (arXiv 2002.05202)
    norm_type: str                       # of NORMS
    norm_bias: bool                      # a layer norm adds a vector too
    norm_eps: float
    norm_order: str                      # of NORM_ORDERS: before a branch, behind its sum, or one before two branches side by side
    embedding_norm: bool                 # a norm on what enters the first block
    scale_embedding: bool                # token vectors times sqrt(D)
    position_embedding_type: str         # of POSITIONS: vectors added (learned or waves), rotated queries and keys, or a bias
    position_offset: int                 # rows of a learned table before position 0
    relative_buckets: int                # distances told apart by a relative bias (arXiv 1910.10683)
    relative_max_distance: int           # beyond, distances share the last bucket
    rope_theta: float | None             # base wavelength of the rotation (arXiv 2104.09864)
    rope_scaling: tuple[tuple[str, Any], ...] | None  # (("rope_type", "llama3"), ("factor", 8.0), ...); None: plain
    attention_scale: float | None        # of the scores; None: 1 / sqrt(E)
    attention_bias: bool                 # on queries, keys and values
    attention_out_bias: bool
    attention_windows: tuple[int, ...]   # tokens that a layer looks back, itself included, layer by layer and again; 0: all
    mlp_bias: bool
    qk_norm: bool                        # an RMS norm on every query and key (arXiv 2302.05442)
    type_vocab_size: int                 # kinds of segments that have a vector of their own
    tie_word_embeddings: bool            # the head is the embedding
    head_transform: bool                 # a dense layer, the activation and a norm before the head (arXiv 1810.04805)
    head_bias: bool
    logit_scale: float                   # on the logits
    embd_pdrop: float
    resid_pdrop: float
    attention_dropout: float
    initializer_range: float | None      # standard deviation of new matrices; None: by fan-in (see first_values.py)
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    decoder_start_token_id: int | None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError(f"this `{self.model_type}` configuration does not hold: " + "; ".join(problems))

    def __getattr__(self, name: str) -> Any:
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        hint = ": the names of the classes are `model.labels`" if name in ("id2label", "label2id", "num_labels") else ""
        raise AttributeError(f"a model configuration has no `{name}`{hint}")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder stands before the decoder (transformers' word)."""
        return self.num_encoder_layers > 0 and self.num_decoder_layers > 0

    @property
    def num_hidden_layers(self) -> int:
        """The depth of the decoder, or of an encoder that stands alone."""
        return self.num_decoder_layers or self.num_encoder_layers

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary of literals."""
        return dataclasses.asdict(self)


def _problems(c: TransformerConfig) -> Iterator[str]:
    sound = True
    for names, least in ((COUNTS, 1), (COUNTS_OR_ZERO, 0)):
        for name in names:
            value = getattr(c, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                sound = False
                yield f"`{name}` is {value!r}, expected a positive whole number{'' if least else ' or 0'}"
    if not sound:
        return
    if not c.num_encoder_layers + c.num_decoder_layers:
        yield "it has no layers, neither of an encoder nor of a decoder"
    if c.num_attention_heads % c.num_key_value_heads:
        yield f"`num_attention_heads` {c.num_attention_heads} is no multiple of `num_key_value_heads` {c.num_key_value_heads}"
    for name, known in (("hidden_act", ACTIVATIONS), ("norm_type", NORMS), ("norm_order", NORM_ORDERS), ("position_embedding_type", POSITIONS)):
        if getattr(c, name) not in known:
            yield f"`{name}` is {getattr(c, name)!r}, known: {', '.join(f'`{word}`' for word in known)}"
    if not (isinstance(c.norm_eps, int | float) and 0 <= c.norm_eps < 1):
        yield f"`norm_eps` is {c.norm_eps!r}, expected a small number >= 0"
    for name in ("embd_pdrop", "resid_pdrop", "attention_dropout"):
        value = getattr(c, name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            yield f"`{name}` is {value!r}, expected a probability in [0, 1)"
    for name in FLAGS:
        if not isinstance(getattr(c, name), bool):
            yield f"`{name}` is {getattr(c, name)!r}, expected true or false"
    for name in ("attention_scale", "logit_scale"):
        value = getattr(c, name)
        if not (isinstance(value, int | float) and value > 0) and not (value is None and name == "attention_scale"):
            yield f"`{name}` is {value!r}, expected a positive number"
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in c.attention_windows):
        yield f"`attention_windows` is {c.attention_windows!r}, expected whole numbers >= 0"
    if c.head_transform is False and c.embedding_size != c.hidden_size and c.tie_word_embeddings:
        yield f"a head that is the embedding of width {c.embedding_size} needs a transform from the width {c.hidden_size}"
    if c.position_embedding_type == "relative" and (c.relative_buckets < 4 or c.relative_max_distance <= c.relative_buckets // 2):
        yield f"{c.relative_buckets} buckets up to a distance of {c.relative_max_distance} cannot be told apart"
    if c.position_embedding_type == "rotary":
        if c.head_dim % 2:
            yield f"`head_dim` is {c.head_dim}, and a rotation needs an even one"
        if not isinstance(c.rope_theta, int | float) or c.rope_theta <= 1:
            yield f"`rope_theta` is {c.rope_theta!r}, expected a number > 1"
        yield from _rope_problems(dict(c.rope_scaling or ()), c.head_dim)
    ends = c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
    for name, ids in (("bos_token_id", (c.bos_token_id,)), ("eos_token_id", ends), ("pad_token_id", (c.pad_token_id,)),
                      ("decoder_start_token_id", (c.decoder_start_token_id,))):
        if any(not (i is None or (isinstance(i, int) and not isinstance(i, bool))) for i in ids):
            yield f"`{name}` is {getattr(c, name)!r}, expected an id, several or none"


def _rope_problems(scaling: dict[str, Any], head_dim: int) -> Iterator[str]:
    if not scaling:
        return
    kind = scaling.get("rope_type")
    if kind not in ROPE_SCALINGS:
        yield f"`rope_type` is {kind!r}, known: `default`, {', '.join(f'`{word}`' for word in ROPE_SCALINGS)}"
        return
    keys = ROPE_SCALINGS[kind]
    for key in scaling:
        if key not in keys and key != "rope_type":
            yield f"`rope_scaling` of type `{kind}` has an unknown key `{key}`"
    for key, needed in keys.items():
        if needed and key not in scaling:
            yield f"`rope_scaling` of type `{kind}` lacks `{key}`"
    for key, value in scaling.items():
        if key in ("short_factor", "long_factor"):
            whole = isinstance(value, tuple) and all(isinstance(v, int | float) and v > 0 for v in value)
            if not whole or len(value) != head_dim // 2:
                yield f"`rope_scaling` has `{key}` {str(value)[:80]}, expected {head_dim // 2} positive numbers"
        elif key in keys and key != "truncate" and not (isinstance(value, int | float) and value > 0):
            yield f"`rope_scaling` has `{key}` {value!r}, expected a positive number"
