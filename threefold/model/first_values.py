"""First values of parameters.

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
  1.85). An embedding of 1 / D instead ended at 1.84 and 1.93, a small norm of one sign at 1.84 and 1.88. A wide model is
  nearly an identity too where token vectors are scaled by sqrt(D), and where each sum is normed behind it; there the last
  norm is that of the last block, and thus another one in a deeper model. Behind a transform (BERT's head) input and output are strangers
  already, and half of its norm's weight keeps the first loss near that of guessing.
- An encoder is told at its beginning who its neighbours are. What stands beside a hidden token is all that there is to know of
  it at first, and it takes an encoder millions of tokens to find that out: which position is which, and that queries should
  turn to the one before. So where positions are a learned table, its first channels are waves, and the heads of the first
  layer look for the same waves some places away; where they are a bias on the scores, it favours the same places. On books, 600
  updates of 1,024 tokens, a BERT of 128 x 3 goes to 5.10 nats a hidden token instead of 6.19, and a T5 of the same width on
  spans, 600 updates of 2,048, to 4.12 instead of 4.42. A decoder, which is asked for every token and can begin with
  what it stands on, gains nothing (GPT-2: 5.18, 5.19). docs/log.md holds the runs.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from threefold.model.attention import Attention
from threefold.model.base import Model
from threefold.model.config import TransformerConfig
from threefold.model.linear import Linear
from threefold.model.positions import Learned, RelativeBias
from threefold.model.stack import Stack
from threefold.model.transformer import Embedding
from threefold.seeds import generator

NEIGHBOURS = (-1, 1, -2, 2, -3, 3, -4, 4)  # places that the heads of a first layer look at, in turn
FASTEST, SLOWEST = 2.5, 0.05  # waves of positions, radians a place
WAVES = 3.0  # their deviation, in those of token vectors
SHARPNESS = 2.5  # of queries and keys, each
HEIGHT = 4.0  # of a relative bias at the place it favours




@torch.no_grad()
def initialise(model: Model, config: TransformerConfig, seed: int, only: set[str] | None = None) -> None:
    """Give every parameter (or those named in `only`) its first value."""
    stack = model.transformer.last
    last = stack.blocks[-1].norm2 if stack.norm is None else stack.norm
    nearly = config.initializer_range is None or config.scale_embedding or stack.norm is None  # an identity
    stranger = nearly and config.tie_word_embeddings and not config.head_transform
    transform = getattr(getattr(model, "lm_head", None), "transform", None)
    before_head = transform.norm if nearly and config.tie_word_embeddings and transform is not None else None
    for path, module in model.named_modules():
        for last_name, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{last_name}" if path else last_name
            if only is not None and name not in only:
                continue
            std = _first_std(module, parameter, config)
            if last_name == "bias":
                parameter.zero_()
            elif module is last and stranger:
                signs = torch.randint(0, 2, parameter.shape, generator=generator(seed, "init", name))
                parameter.copy_(signs - 0.5)
            elif std is None:
                parameter.fill_(0.5 if module is before_head else 1.0)
            elif std == 0:
                parameter.zero_()
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
                    0.0, std, generator=generator(seed, "init", name)
                )
                parameter.copy_(values)
    if config.initializer_range is None and only is None and model.transformer.encoder is not None:
        _look_beside(model.transformer.encoder)


def _look_beside(encoder: Stack) -> None:
    """Let the heads of the first layer look at one neighbour each."""
    attention, positions, relative = encoder.blocks[0].attention, encoder.positions, encoder.relative
    assert isinstance(attention, Attention)
    if isinstance(relative, RelativeBias):
        relative.weight.zero_()
        relative.weight[relative.bucket(torch.tensor(_beside(attention.heads))), torch.arange(attention.heads)] = HEIGHT
    if isinstance(positions, Learned):
        _look_by_waves(encoder, attention, positions)


def _look_by_waves(encoder: Stack, attention: Attention, positions: Learned) -> None:
    """q_i k_j = sum over waves of cos(w (i + beside - j)), which is largest at j = i + beside: the first channels of the table are
    cosines and sines, keys read them as they are and queries turned by as many places."""
    size, width = attention.head_dim, positions.weight.shape[1]
    count = min(size, width, attention.qkv.width_in) // 2  # of waves
    waves = torch.exp(torch.linspace(math.log(FASTEST), math.log(SLOWEST), count, dtype=torch.float64))
    angles = torch.arange(positions.count, dtype=torch.float64)[:, None] * waves
    table = torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(2 / width) * WAVES
    positions.weight.zero_()
    positions.weight[positions.offset:, :2 * count] = table.to(positions.weight.dtype)
    if encoder.project is not None:  # the waves pass as they are
        encoder.project.weight[:2 * count] = torch.eye(2 * count, width, dtype=positions.weight.dtype)
    plain = torch.eye(size, 2 * count, dtype=torch.float64)
    query, key, _ = attention.qkv.weight.split_with_sizes(list(attention.qkv.parts))
    key.zero_()
    key.view(-1, size, key.shape[1])[:, :, :2 * count] = SHARPNESS * plain.to(key.dtype)
    query.zero_()
    for head, beside in zip(query.view(-1, size, query.shape[1]), _beside(attention.heads), strict=True):
        cos, sin = torch.diag((waves * beside).cos()), torch.diag((waves * beside).sin())
        head[:2 * count, :2 * count] = SHARPNESS * torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]).to(head.dtype)


def _beside(heads: int) -> list[int]:
    return [NEIGHBOURS[head % len(NEIGHBOURS)] for head in range(heads)]


def _first_std(module: nn.Module, parameter: nn.Parameter, c: TransformerConfig) -> float | None:
    """The standard deviation of a new parameter; None for the weights of norms, which begin at one."""
    if parameter.ndim < 2:
        return None
    ends = isinstance(module, Linear) and module.ends
    if c.initializer_range is not None:
        return c.initializer_range / math.sqrt(2 * c.num_hidden_layers) if ends else c.initializer_range
    if ends:
        return 0.0
    if isinstance(module, Embedding):
        return 1 / math.sqrt(c.embedding_size)
    return 0.5 / math.sqrt(parameter.shape[1])
