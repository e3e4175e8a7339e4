"""From a configuration to modules: the only reader of TransformerConfig. Counts that need no model.

Decisions:
- A size is one dial. A published name has its published shape; a number of parameters gives a shape whose depth
  follows its width.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from threefold.config.words import count_in
from threefold.errors import UsageError, did_you_mean
from threefold.model.attention import Attention, CrossAttention
from threefold.model.base import Model
from threefold.model.block import SITES, AnyBlock, Block, ParallelBlock, PostBlock
from threefold.model.classifiers import Body, Discriminator, PooledClassifier, SequenceClassifier, TokenClassifier
from threefold.model.config import TransformerConfig
from threefold.model.families import family_of
from threefold.model.families.family import Head
from threefold.model.feedforward import FeedForward
from threefold.model.first_values import initialise
from threefold.model.heads import DenseHead, LanguageHead, Pooler, Transform
from threefold.model.language import CausalLM, MaskedLM, Seq2SeqLM
from threefold.model.linear import Linear
from threefold.model.norms import LayerNorm, RMSNorm
from threefold.model.positions import Learned, RelativeBias, Rotary, Sinusoidal
from threefold.model.stack import Stack, Types
from threefold.model.transformer import Embedding, Transformer


def build_model(config: TransformerConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, task: str | None = None,
                classes: int = 2) -> Model:
    """A new model with first values that depend on the configuration and the seed alone; parameters have `dtype`.

    task      what the head is for, of the tasks of the family (`causal`, `masked`, `classify`, ...); None: its first
    classes   of a head that classifies
    """
    model = assemble(config, dtype, task=task, classes=classes)
    initialise(model, config, seed)
    return model


def assemble(config: TransformerConfig, dtype: torch.dtype = torch.float32, device: str = "cpu", *, task: str | None = None,
             classes: int = 2, pooling: str | None = None) -> Model:
    """The modules of a configuration, with parameters that hold no values yet (`device="meta"`: and take no memory). `pooling`: of a
    classifier over pooled states, how."""
    family = family_of(config.model_type)
    task = task or next(iter(family.heads))
    if task not in family.heads:
        raise UsageError(f"a `{family.name}` model has no head for `{task}`", hint=did_you_mean(task, family.heads))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if pooling is not None:
                body = _transformer(config, with_decoder=not config.is_encoder_decoder)
                return PooledClassifier(body, config, how=pooling, classes=classes)
            return _under_head(config, task, family.heads[task], classes)
    finally:
        torch.set_default_dtype(previous)


def _under_head(c: TransformerConfig, task: str, head: Head, classes: int) -> Model:
    body = _transformer(c, with_decoder=not head.encoder_alone)
    pooler = Pooler(c.hidden_size) if head.pooler else None
    if task in ("body", "encoder"):
        return Body(body, c, pooler=pooler, task=task)
    if task in ("classify", "tag", "replaced"):
        activation = c.hidden_act if head.activation == "hidden_act" else head.activation
        dense = DenseHead(c.hidden_size, 1 if task == "replaced" else classes, activation=activation, bias=head.bias)
        if task == "classify":
            return SequenceClassifier(body, dense, c, reads=head.reads, pooler=pooler)
        return (TokenClassifier if task == "tag" else Discriminator)(body, dense, c)
    transform = None
    if c.head_transform:
        transform = Transform(c.hidden_size, c.embedding_size, _norm(c, c.embedding_size), activation=c.hidden_act)
    width = c.embedding_size if c.head_transform else c.hidden_size
    lm_head = LanguageHead(width, c.vocab_size, own=not c.tie_word_embeddings, bias=c.head_bias, scale=c.logit_scale, transform=transform)
    if task == "causal":
        return CausalLM(body, lm_head, c)
    if task == "seq2seq":
        pad = c.pad_token_id or 0
        return Seq2SeqLM(body, lm_head, c, start=pad if c.decoder_start_token_id is None else c.decoder_start_token_id, pad=pad)
    pairs = Linear(c.hidden_size, 2, bias=True) if task == "pretraining" else None
    return MaskedLM(body, lm_head, c, pooler=pooler, pairs=pairs)


def _transformer(c: TransformerConfig, *, with_decoder: bool) -> Transformer:
    encoder = decoder = None
    if c.num_encoder_layers:
        encoder = _stack(c, c.num_encoder_layers, causal=False, cross=False, site=0)
    if c.num_decoder_layers and with_decoder:
        site = 1 + SITES * c.num_encoder_layers if encoder is not None else 0
        decoder = _stack(c, c.num_decoder_layers, causal=True, cross=encoder is not None, site=site)
    return Transformer(Embedding(c.vocab_size, c.embedding_size), encoder, decoder, context=c.max_position_embeddings)


def _stack(c: TransformerConfig, depth: int, *, causal: bool, cross: bool, site: int) -> Stack:
    blocks = [_block(c, layer, cross=cross, site=site + 1 + SITES * layer) for layer in range(depth)]
    kind, enters = c.position_embedding_type, c.embedding_size
    positions: Learned | Sinusoidal | None = None
    if kind == "absolute":
        positions = Learned(c.max_position_embeddings, enters, c.position_offset)
    elif kind == "sinusoidal":
        positions = Sinusoidal(enters)
    rotary = relative = None
    if kind == "rotary":
        assert c.rope_theta is not None
        rotary = Rotary(c.head_dim, c.rope_theta, dict(c.rope_scaling or ()), c.max_position_embeddings)
    elif kind == "relative":
        relative = RelativeBias(c.relative_buckets, c.relative_max_distance, c.num_attention_heads, both_ways=not causal)
    return Stack(
        blocks,
        causal=causal,
        norm=None if c.norm_order == "post" else _norm(c, c.hidden_size),
        positions=positions,
        rotary=rotary,
        relative=relative,
        types=Types(c.type_vocab_size, enters) if c.type_vocab_size else None,
        entrance_norm=_norm(c, enters) if c.embedding_norm else None,
        project=Linear(enters, c.hidden_size, bias=True) if enters != c.hidden_size else None,
        scale=math.sqrt(c.hidden_size) if c.scale_embedding else 1.0,
        dropout=c.embd_pdrop,
        site=site,
    )


def _block(c: TransformerConfig, layer: int, *, cross: bool, site: int) -> AnyBlock:
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    sizes = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    attention = Attention(
        *sizes,
        layer=layer,
        bias=c.attention_bias,
        out_bias=c.attention_out_bias,
        scale=scale,
        window=c.attention_windows[layer % len(c.attention_windows)] if c.attention_windows else 0,
        qk_norm_eps=c.norm_eps if c.qk_norm else None,
        dropout=c.attention_dropout,
    )
    feedforward = FeedForward(c.hidden_size, c.intermediate_size, activation=c.hidden_act, gated=c.gated_mlp, bias=c.mlp_bias)
    norm1 = _norm(c, c.hidden_size)
    if c.norm_order == "parallel":
        return ParallelBlock(norm1, attention, feedforward, dropout=c.resid_pdrop, site=site)
    read = None
    if cross:
        read = CrossAttention(*sizes, layer=layer, bias=c.attention_bias, out_bias=c.attention_out_bias, scale=scale,
                              dropout=c.attention_dropout)
    kind = PostBlock if c.norm_order == "post" else Block
    return kind(norm1, attention, _norm(c, c.hidden_size), feedforward, dropout=c.resid_pdrop, site=site, cross=read,
                cross_norm=_norm(c, c.hidden_size) if cross else None)


def _norm(c: TransformerConfig, width: int) -> nn.Module:
    return RMSNorm(width, c.norm_eps) if c.norm_type == "rms_norm" else LayerNorm(width, c.norm_eps, bias=c.norm_bias)


# -- what an optimizer must know ------------------------------------------------------------------------------------------


def matrix_parts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names of the matrices inside the blocks, before them and before the head, and the row counts of the independent matrices that
    each is made of.

    `attention.qkv.weight` holds three maps and `feedforward.gate_up.weight` two: an optimizer that treats a matrix as
    a whole (Muon's orthogonalisation) should treat each part by itself: `weight.split(parts)`.
    """
    return {f"{name}.weight": module.parts for name, module in model.named_modules()
            if isinstance(module, Linear) and (".blocks." in name or name.endswith((".project", "lm_head.transform.dense")))}


# -- counts ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _thin(config: TransformerConfig) -> Model:
    """The model with one layer in each stack, without memory for its values: what counts are made from."""
    return assemble(dataclasses.replace(config, num_encoder_layers=min(1, config.num_encoder_layers),
                                        num_decoder_layers=min(1, config.num_decoder_layers)), device="meta")


def _stacks(config: TransformerConfig) -> Sequence[tuple[Stack, int]]:
    body = _thin(config).transformer
    both = ((body.encoder, config.num_encoder_layers), (body.decoder, config.num_decoder_layers))
    return [(stack, depth) for stack, depth in both if stack is not None]


def count_parameters(config: TransformerConfig, *, embeddings: bool = True) -> int:
    """The number of parameters of the family's language model in this configuration, shared ones once; without token and
    position tables if asked."""
    total = sum(p.numel() for p in _thin(config).parameters())
    for stack, depth in _stacks(config):
        total += (depth - 1) * sum(p.numel() for p in stack.blocks[0].parameters())
        if not embeddings and isinstance(stack.positions, Learned):
            total -= stack.positions.weight.numel()
    return total if embeddings else total - config.vocab_size * config.embedding_size


def flops_per_token(config: TransformerConfig, context: int, *, training: bool = True) -> int:
    """Floating-point operations for one token in a text of `context` tokens: matrix products, the head and attention,
    in a causal stack over half of the context on average. An encoder-decoder is given a token on either side.

    Two for each weight that is multiplied and 4 H E for each key that is seen; a backward pass costs twice a forward
    pass (arXiv 2001.08361).
    """
    forward = 2.0 * config.embedding_size * config.vocab_size
    for stack, depth in _stacks(config):
        matrices = sum(m.weight.numel() for m in stack.blocks[0].modules() if isinstance(m, Linear))
        seen = (context + 1) / 2 if stack.causal else context
        if getattr(stack.blocks[0], "cross", None) is not None:
            seen += context
        forward += depth * (2 * matrices + 4 * config.num_attention_heads * config.head_dim * seen)
    return round(forward * (3 if training else 1))


# -- sizes -------------------------------------------------------------------------------------------------------------


def sized(
    family: str, size: str | int, *, vocab_size: int | None = None, context: int | None = None
) -> TransformerConfig:
    """The configuration of a size: a published name (`gpt2-medium`, or `medium`), `nano`, a number of parameters (`25M`), or
    width and layers of each stack (`192x4`).

    Vocabulary and context replace those of the size where they are given. Raises `UsageError` for a size that is not
    known.
    """
    row = family_of(family)
    count = size if isinstance(size, int) else count_in(size)
    if count is not None:
        return scaled(family, parameters=count, vocab_size=vocab_size or row.base.vocab_size, context=context or 1024)
    name = str(size).lower()
    if shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return scaled(family, width=int(shape[1]), depth=int(shape[2]), vocab_size=vocab_size or row.base.vocab_size, context=context or 1024)
    found = row.sizes.get(name) or row.sizes.get(f"{family}-{name}")
    if found is None:
        raise UsageError(f"`{size}` is not a size of `{family}`", hint=did_you_mean(name, [*row.sizes, "25M", "192x4"]))
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

    Widths are multiples of 64 (of 32 below 128) with heads of 64, of 32 below 128 and in families with an encoder below
    512, which profit from more of them; a layer for each 64 of width, at least 3 and at most 48, in each stack. No dropout;
    special ids are left to the tokenizer.
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
    above = bisect.bisect_left(widths, parameters, key=lambda w: count_parameters(_shape(family, w, depth or _depth(w), vocab_size, context)))
    shapes = [_shape(family, w, d, vocab_size, context) for w in widths[max(0, above - 3):above + 3]
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
    base = family_of(family).base
    step = 32 if width < (512 if base.num_encoder_layers else 128) else 64
    if width < step or width % step:
        raise UsageError(f"a width of {width} is not a multiple of {step}")
    hidden = max(step, round(8 / 3 * width / step) * step) if base.gated_mlp else 4 * width
    heads = width // step
    return dataclasses.replace(
        dataclasses.replace(base, **family_of(family).new),
        vocab_size=vocab_size,
        hidden_size=width,
        embedding_size=width,
        num_encoder_layers=depth if base.num_encoder_layers else 0,
        num_decoder_layers=depth if base.num_decoder_layers else 0,
        num_attention_heads=heads,
        num_key_value_heads=heads if base.num_key_value_heads > 1 or base.num_attention_heads == 1 else 1,
        head_dim=step,
        intermediate_size=hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        logit_scale=1.0 if base.logit_scale == 1 else width**-0.5,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        decoder_start_token_id=None,
    )
