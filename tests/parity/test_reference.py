"""Against the definitions, written out plainly in float64 from the published names: no cast, no fused weight, no table
of ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from threefold.model.build import build_model, scaled
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

EXACT = 1e-12  # of the largest logit: float64 sums in another order


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + E / 2) of a vector at position t turn by t theta^(-2 i / E)."""
    out, half = x.clone(), x.shape[-1] // 2
    for t in range(x.shape[-2]):
        for i in range(half):
            angle = t * theta ** (-2 * i / x.shape[-1])
            a, b = x[..., t, i], x[..., t, i + half]
            out[..., t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[..., t, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of heads (H, T, E) over key heads (K, T, E)."""
    group = len(q) // len(k)
    out = []
    for head in range(len(q)):
        scores = q[head] @ k[head // group].T / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        out.append(scores.softmax(-1) @ v[head // group])
    return torch.cat(out, -1)


def heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width).transpose(0, 1)


def gpt2(w: dict[str, Tensor], c: TransformerConfig, ids: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)]
    for n in range(c.num_hidden_layers):
        p = f"transformer.h.{n}."
        q, k, v = (
            layer_norm(x, w, p + "ln_1", c.norm_eps) @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        ).chunk(3, -1)
        x = (
            x
            + mix(*(heads(y, c.head_dim) for y in (q, k, v))) @ w[p + "attn.c_proj.weight"]
            + w[p + "attn.c_proj.bias"]
        )
        h = layer_norm(x, w, p + "ln_2", c.norm_eps) @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    return layer_norm(x, w, "transformer.ln_f", c.norm_eps) @ w["transformer.wte.weight"].T


def llama(w: dict[str, Tensor], c: TransformerConfig, ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    theta: Any = c.rope_theta
    for n in range(c.num_hidden_layers):
        p = f"model.layers.{n}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], c.norm_eps)
        q, k, v = (heads(h @ w[p + f"self_attn.{y}_proj.weight"].T, c.head_dim) for y in "qkv")
        if p + "self_attn.q_norm.weight" in w:
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"], c.norm_eps)
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"], c.norm_eps)
        x = x + mix(turn(q, theta), turn(k, theta), v) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], c.norm_eps)
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], c.norm_eps) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


REFERENCES = {"gpt2": gpt2, "llama": llama, "qwen3": llama}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learning", [True, False])
def test_float64_is_exact(family: str, learning: bool, tmp_path: Path) -> None:
    model = build_model(scaled(family, width=64, depth=2, vocab_size=31, context=32), dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) * 0.2 + (p.ndim == 1)
            )
    save_model(model, tmp_path, None)
    again, ids = load_model(tmp_path), torch.randint(31, (13,), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(learning):
        ours = again(ids[None]).logits[0]
    expected = REFERENCES[family](read_safetensors(tmp_path / "model.safetensors"), model.config, ids)
    assert ours.dtype == torch.float64
    assert (ours - expected).abs().max() <= EXACT * expected.abs().max()
