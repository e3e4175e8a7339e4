"""From a configuration to modules: the only reader of TransformerConfig. First values, and counts that need no model.

Decisions:
- A new parameter is a pure function of (configuration, seed, its name): adding a layer or building on another device
  changes no other.
- With `initializer_range` set, matrices are normal with that deviation and the ends of branches smaller by sqrt(2 L)
  (GPT-2's scheme). Without, deviations follow the fan-in, 0.5 / sqrt(fan_in), and the ends of branches begin at zero,
  so that a new model is the identity.
- An identity whose head is its embedding would predict its own input, with a logit of about sqrt(D). Its last norm
  therefore begins at 0.5 or -0.5, as chance has it for each channel: what goes in and what comes out are then strangers,
  and the first loss is that of guessing. On characters of Shakespeare (ln V = 4.17), 150 steps with Muon and AdamW: a
  width of 128 goes from 4.26 to 1.81 nats, where a norm of ones went from 10.55 to 1.82; 384 from 4.30 to 1.84 (19.08 to
  1.85). An embedding of 1 / D instead ended at 1.84 and 1.93, a small norm of one sign at 1.84 and 1.88.
- A size is one dial. A published name has its published shape; a number of parameters gives a shape whose depth
  follows its width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from threefold.config.words import count_in
from threefold.errors import UsageError, did_you_mean
from threefold.model.attention import Attention
from threefold.model.block import Block
from threefold.model.config import TransformerConfig
from threefold.model.families import family_of
from threefold.model.feedforward import FeedForward
from threefold.model.heads import CausalLM
from threefold.model.linear import Linear
from threefold.model.norms import NORMS
from threefold.model.positions import Rotary
from threefold.model.transformer import Embedding, Stack, Transformer
from threefold.seeds import generator

_LAST_NORM = "transformer.decoder.norm.weight"
_BRANCH_ENDS = ("attention.out.weight", "feedforward.down.weight")


def build_model(config: TransformerConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A new model with first values that depend on the configuration and the seed alone; parameters have `dtype`."""
    model = assemble(config, dtype)
    initialise(model, config, seed)
    return model


def assemble(config: TransformerConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CausalLM:
    """The modules of a configuration, with parameters that hold no values yet (`device="meta"`: and take no memory)."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _assemble(config)
    finally:
        torch.set_default_dtype(previous)


def _assemble(c: TransformerConfig) -> CausalLM:
    blocks = []
    for layer in range(c.num_hidden_layers):
        attention = Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            layer=layer,
            bias=c.attention_bias,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            dropout=c.attention_dropout,
        )
        feedforward = FeedForward(
            c.hidden_size, c.intermediate_size, activation=c.hidden_act, gated=c.gated_mlp, bias=c.mlp_bias
        )
        norm1, norm2 = (NORMS[c.norm_type](c.hidden_size, c.norm_eps) for _ in range(2))
        blocks.append(Block(norm1, attention, norm2, feedforward, dropout=c.resid_pdrop))
    learned = rotary = None
    if c.position_embedding_type == "absolute":
        learned = Embedding(c.max_position_embeddings, c.hidden_size)
    else:
        assert c.rope_theta is not None
        rotary = Rotary(c.head_dim, c.rope_theta, dict(c.rope_scaling or ()), c.max_position_embeddings)
    decoder = Stack(
        blocks, NORMS[c.norm_type](c.hidden_size, c.norm_eps), positions=learned, rotary=rotary, dropout=c.embd_pdrop
    )
    transformer = Transformer(Embedding(c.vocab_size, c.hidden_size), decoder, context=c.max_position_embeddings)
    return CausalLM(transformer, None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size), c)


@torch.no_grad()
def initialise(model: nn.Module, config: TransformerConfig, seed: int, only: set[str] | None = None) -> None:
    """Give every parameter (or those named in `only`) its first value."""
    for name, parameter in model.named_parameters():
        if only is None or name in only:
            std = _first_std(name, parameter, config)
            if name.endswith("bias"):
                parameter.zero_()
            elif name == _LAST_NORM and config.tie_word_embeddings and config.initializer_range is None:
                signs = torch.randint(0, 2, parameter.shape, generator=generator(seed, "init", name))
                parameter.copy_(signs - 0.5)
            elif std is None:
                parameter.fill_(1.0)
            elif std == 0:
                parameter.zero_()
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
                    0.0, std, generator=generator(seed, "init", name)
                )
                parameter.copy_(values)


def _first_std(name: str, parameter: nn.Parameter, c: TransformerConfig) -> float | None:
    """The standard deviation of a new parameter; None for the weights of norms, which begin at one."""
    if parameter.ndim < 2:
        return None
    end = name.endswith(_BRANCH_ENDS)
    if c.initializer_range is not None:
        return c.initializer_range / math.sqrt(2 * c.num_hidden_layers) if end else c.initializer_range
    if end:
        return 0.0
    if name.endswith("embed.weight"):
        return 1 / math.sqrt(c.hidden_size)
    return 0.5 / math.sqrt(parameter.shape[1])


def matrix_parts(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The names of the matrices inside the blocks and the row counts of the independent matrices that each is made of.

    `attention.qkv.weight` holds three maps and `feedforward.gate_up.weight` two: an optimizer that treats a matrix as
    a whole (Muon's orthogonalisation) should treat each part by itself: `weight.split(parts)`.
    """
    rows = {"qkv": (config.num_attention_heads * config.head_dim, *(config.num_key_value_heads * config.head_dim,) * 2),
            "out": (config.hidden_size,), "gate_up": (config.intermediate_size,) * 2, "up": (config.intermediate_size,),
            "down": (config.hidden_size,)}
    names = [
        "attention.qkv",
        "attention.out",
        *(["feedforward.gate_up"] if config.gated_mlp else ["feedforward.up"]),
        "feedforward.down",
    ]
    return {f"transformer.decoder.blocks.{layer}.{name}.weight": rows[name.split(".")[1]]
            for layer in range(config.num_hidden_layers) for name in names}


# -- counts ------------------------------------------------------------------------------------------------------------


def count_parameters(config: TransformerConfig, *, embeddings: bool = True) -> int:
    """The number of parameters of a model of this configuration, shared ones once; without token and position tables
    if asked."""
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm = c.hidden_size * (2 if c.norm_type == "layer_norm" else 1)
    ups = 2 if c.gated_mlp else 1
    block = (
        c.hidden_size * (2 * queries + 2 * keys + (ups + 1) * c.intermediate_size)
        + 2 * norm
        + 2 * c.head_dim * c.qk_norm
    )
    block += c.attention_bias * (queries + 2 * keys + c.hidden_size) + c.mlp_bias * (
        ups * c.intermediate_size + c.hidden_size
    )
    total = c.num_hidden_layers * block + norm
    if not c.tie_word_embeddings:
        total += c.vocab_size * c.hidden_size
    if embeddings:
        total += (
            c.vocab_size * c.hidden_size
            + (c.position_embedding_type == "absolute") * c.max_position_embeddings * c.hidden_size
        )
    return total


def flops_per_token(config: TransformerConfig, context: int, *, training: bool = True) -> int:
    """Floating-point operations for one token in a text of `context` tokens: matrix products, the head and attention
    over half of the context on average.

    Two for each weight that is multiplied and 4 H E for each key that is seen; a backward pass costs twice a forward
    pass (arXiv 2001.08361).
    """
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = c.hidden_size * (2 * queries + 2 * keys + (3 if c.gated_mlp else 2) * c.intermediate_size)
    seen = (context + 1) / 2
    forward = c.num_hidden_layers * (2 * matrices + 4 * queries * seen) + 2 * c.hidden_size * c.vocab_size
    return round(forward * (3 if training else 1))


# -- sizes -------------------------------------------------------------------------------------------------------------


def sized(
    family: str, size: str | int, *, vocab_size: int | None = None, context: int | None = None
) -> TransformerConfig:
    """The configuration of a size: a published name (`gpt2-medium`, or `medium`), `nano`, or a number of parameters
    (`25M`).

    Vocabulary and context replace those of the size where they are given. Raises `UsageError` for a size that is not
    known.
    """
    row = family_of(family)
    count = size if isinstance(size, int) else count_in(size)
    if count is not None:
        return scaled(family, parameters=count, vocab_size=vocab_size or row.base.vocab_size, context=context or 1024)
    name = str(size).lower()
    found = row.sizes.get(name) or row.sizes.get(f"{family}-{name}")
    if found is None:
        raise UsageError(f"`{size}` is not a size of `{family}`", hint=did_you_mean(name, [*row.sizes, "25M"]))
    return dataclasses.replace(
        found,
        vocab_size=vocab_size or found.vocab_size,
        max_position_embeddings=context or found.max_position_embeddings,
    )


def scaled(
    family: str,
    *,
    vocab_size: int,
    parameters: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    context: int = 1024,
) -> TransformerConfig:
    """A shape for training from scratch: nearest to a number of `parameters` (all of them), or of a given `width`, and
    `depth` if given.

    Widths are multiples of 64 (of 32 below 128) with heads of 64 (32 below 128); a layer for each 64 of width, at
    least 3 and at most 48. The embedding is the head, no dropout; special ids are left to the tokenizer.
    """
    family_of(family)
    if (parameters is None) == (width is None):
        raise UsageError("a shape is scaled to `parameters` or to `width`, one of them")
    if width is not None:
        return _shape(family, width, depth or _depth(width), vocab_size, context)
    assert parameters is not None
    if parameters < 1:
        raise UsageError(f"{parameters} parameters are not enough for a model")
    widths = [32, 64, 96, *range(128, 16385, 64)]
    shapes = [_shape(family, w, d, vocab_size, context) for w in widths
              for d in ([depth] if depth else sorted({max(2, _depth(w) + change) for change in (-1, 0, 1)}))]
    return min(
        shapes,
        key=lambda c: (
            abs(math.log(count_parameters(c) / parameters)),
            abs(c.num_hidden_layers - _depth(c.hidden_size)),
        ),
    )


def _depth(width: int) -> int:
    return min(48, max(3, round(width / 64)))


def _shape(family: str, width: int, depth: int, vocab_size: int, context: int) -> TransformerConfig:
    step = 32 if width < 128 else 64
    if width % step:
        raise UsageError(f"a width of {width} is not a multiple of {step}")
    base = family_of(family).base
    hidden = max(step, round(8 / 3 * width / step) * step) if base.gated_mlp else 4 * width
    return dataclasses.replace(
        base,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // step,
        num_key_value_heads=width // step,
        head_dim=step,
        intermediate_size=hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
