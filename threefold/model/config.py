"""What a model is: plain literal fields that say which parts stand where and how large they are.

Decisions:
- The values of options are the words of transformers' own configurations (`gelu_new`, `silu`, `rotary`, `llama3`).
- A field is here because two families (or two published sizes) differ in it; a test keeps it so.
- Only build.py and the families read this class. Modules take plain arguments, so that no part knows more than it uses.
- Frozen and hashable: a configuration is a value. An impossible one cannot be made, and all its problems are told at
  once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from threefold.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("absolute", "rotary")
ROPE_SCALINGS: dict[str, dict[str, bool]] = {  # type -> its parameters, and whether they must be given
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": True,
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
    "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings", "n_inner": "intermediate_size",
    "activation_function": "hidden_act", "layer_norm_epsilon": "norm_eps", "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps", "attn_pdrop": "attention_dropout",
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The whole description of a Transformer. Sizes are counts, `*_pdrop` and `*_dropout` probabilities.

    Raises `ConfigError` with every problem found when the fields do not fit together.
    """

    model_type: str                      # the family: names its table of weights, decides nothing else
    vocab_size: int
    hidden_size: int                     # D
    num_hidden_layers: int               # L
    num_attention_heads: int             # H
    num_key_value_heads: int             # K; H / K queries share a key head (arXiv 2305.13245)
    head_dim: int                        # E; H * E need not be D
    intermediate_size: int               # F
    max_position_embeddings: int         # the longest context that the model is meant for
    hidden_act: str                      # of ACTIVATIONS
    gated_mlp: bool                      # act(gate) * up instead of act(up) (arXiv 2002.05202)
    norm_type: str                       # of NORMS
    norm_eps: float
    position_embedding_type: str  # of POSITIONS: learned vectors added to the embedding, or rotated queries and keys
    rope_theta: float | None  # base wavelength of the rotation (arXiv 2104.09864)
    rope_scaling: (
        tuple[tuple[str, Any], ...] | None
    )  # (("rope_type", "llama3"), ("factor", 8.0), ...); None is the plain rotation
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool                        # an RMS norm on every query and key (arXiv 2302.05442)
    tie_word_embeddings: bool            # the head is the embedding
    embd_pdrop: float
    resid_pdrop: float
    attention_dropout: float
    initializer_range: float | None      # standard deviation of new matrices; None: by fan-in (see build.py)
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError(f"this `{self.model_type}` configuration does not hold: " + "; ".join(problems))

    def __getattr__(self, name: str) -> Any:
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        raise AttributeError(f"a model configuration has no `{name}`")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder stands before the decoder (transformers' word)."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary of literals."""
        return dataclasses.asdict(self)


def _problems(c: TransformerConfig) -> list[str]:
    found = []
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ):
        value = getattr(c, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            found.append(f"`{name}` is {value!r}, expected a positive whole number")
    if found:
        return found
    if c.num_attention_heads % c.num_key_value_heads:
        found.append(
            f"`num_attention_heads` {c.num_attention_heads} is no multiple of `num_key_value_heads` {c.num_key_value_heads}"
        )
    for name, known in (("hidden_act", ACTIVATIONS), ("norm_type", NORMS), ("position_embedding_type", POSITIONS)):
        if getattr(c, name) not in known:
            found.append(f"`{name}` is {getattr(c, name)!r}, known: {', '.join(f'`{word}`' for word in known)}")
    if not (isinstance(c.norm_eps, int | float) and 0 <= c.norm_eps < 1):
        found.append(f"`norm_eps` is {c.norm_eps!r}, expected a small number >= 0")
    for name in ("embd_pdrop", "resid_pdrop", "attention_dropout"):
        value = getattr(c, name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            found.append(f"`{name}` is {value!r}, expected a probability in [0, 1)")
    for name in ("gated_mlp", "attention_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
        if not isinstance(getattr(c, name), bool):
            found.append(f"`{name}` is {getattr(c, name)!r}, expected true or false")
    if c.position_embedding_type == "rotary":
        if c.head_dim % 2:
            found.append(f"`head_dim` is {c.head_dim}, and a rotation needs an even one")
        if not isinstance(c.rope_theta, int | float) or c.rope_theta <= 1:
            found.append(f"`rope_theta` is {c.rope_theta!r}, expected a number > 1")
        found += _rope_problems(dict(c.rope_scaling or ()))
    ends = c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
    for name, ids in (("bos_token_id", (c.bos_token_id,)), ("eos_token_id", ends)):
        if any(not (i is None or (isinstance(i, int) and not isinstance(i, bool))) for i in ids):
            found.append(f"`{name}` is {getattr(c, name)!r}, expected an id, several or none")
    return found


def _rope_problems(scaling: dict[str, Any]) -> list[str]:
    if not scaling:
        return []
    kind = scaling.get("rope_type")
    if kind not in ROPE_SCALINGS:
        return [f"`rope_type` is {kind!r}, known: `default`, {', '.join(f'`{word}`' for word in ROPE_SCALINGS)}"]
    keys = ROPE_SCALINGS[kind]
    found = [
        f"`rope_scaling` of type `{kind}` has an unknown key `{key}`"
        for key in scaling
        if key not in keys and key != "rope_type"
    ]
    found += [
        f"`rope_scaling` of type `{kind}` lacks `{key}`"
        for key, needed in keys.items()
        if needed and key not in scaling
    ]
    found += [f"`rope_scaling` has `{key}` {value!r}, expected a positive number" for key, value in scaling.items()
              if key in keys and key != "truncate" and not (isinstance(value, int | float) and value > 0)]
    return found
