"""Against the definitions, written out plainly in float64 from the published names: no cast, no fused weight, no table
of ours. Where transformers casts to float32 on the way, this is what says that we are exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from threefold.model.build import build_model, scaled
from threefold.model.config import TransformerConfig
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

EXACT = 1e-12  # of the largest logit: float64 sums in another order
Weights = Mapping[str, Tensor]


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w.get(name + ".bias", 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turn(x: Tensor, c: TransformerConfig, *, pairs: bool = False) -> Tensor:
    """Axes i and i + E / 2 (or 2 i and 2 i + 1) of a vector at position t turn by t theta^(-2 i / E); with `longrope` by a
    share of that for each i, and all is longer by one factor (arXiv 2402.13753)."""
    assert c.rope_theta is not None
    out, half, long, size = x.clone(), x.shape[-1] // 2, dict(c.rope_scaling or ()), 1.0
    shares = [1.0] * half
    if long:
        old = long["original_max_position_embeddings"]
        shares = long["long_factor" if x.shape[-2] > old else "short_factor"]
        size = math.sqrt(1 + math.log(c.max_position_embeddings / old) / math.log(old))
    for t in range(x.shape[-2]):
        for i in range(half):
            first, second = (2 * i, 2 * i + 1) if pairs else (i, i + half)
            angle = t * c.rope_theta ** (-2 * i / x.shape[-1]) / shares[i]
            a, b = x[..., t, first], x[..., t, second]
            out[..., t, first] = (a * math.cos(angle) - b * math.sin(angle)) * size
            out[..., t, second] = (b * math.cos(angle) + a * math.sin(angle)) * size
    return out


def mix(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int = 0, bias: Tensor | None = None,
        causal: bool = True) -> Tensor:
    """Attention of heads (H, T, E) over key heads (K, S, E), in a band of `window` keys where there is one."""
    group, out = len(q) // len(k), []
    for head in range(len(q)):
        scores = q[head] @ k[head // group].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias[head]
        for t in range(scores.shape[0]):
            for s in range(scores.shape[1]):
                if causal and (s > t or (window and s <= t - window)):
                    scores[t, s] = -math.inf
        out.append(scores.softmax(-1) @ v[head // group])
    return torch.cat(out, -1)


def heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width).transpose(0, 1)


def gpt2(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)]
    for n in range(c.num_hidden_layers):
        p = f"transformer.h.{n}."
        q, k, v = (layer_norm(x, w, p + "ln_1", c.norm_eps) @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]).chunk(3, -1)
        read = mix(*(heads(y, c.head_dim) for y in (q, k, v)))
        x = x + read @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        h = gelu_new(layer_norm(x, w, p + "ln_2", c.norm_eps) @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"])
        x = x + h @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    return layer_norm(x, w, "transformer.ln_f", c.norm_eps) @ w["transformer.wte.weight"].T


def gpt3(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    """Scores are not scaled; layers in turn see all of the past and a band of it."""
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)]
    for n in range(c.num_hidden_layers):
        p = f"transformer.h.{n}."
        h = layer_norm(x, w, p + "ln_1", c.norm_eps)
        q, k, v = (heads(h @ w[p + f"attn.attention.{y}_proj.weight"].T, c.head_dim) for y in "qkv")
        read = mix(q, k, v, scale=1.0, window=(0, 5)[n % 2])
        x = x + read @ w[p + "attn.attention.out_proj.weight"].T + w[p + "attn.attention.out_proj.bias"]
        h = gelu_new(layer_norm(x, w, p + "ln_2", c.norm_eps) @ w[p + "mlp.c_fc.weight"].T + w[p + "mlp.c_fc.bias"])
        x = x + h @ w[p + "mlp.c_proj.weight"].T + w[p + "mlp.c_proj.bias"]
    return layer_norm(x, w, "transformer.ln_f", c.norm_eps) @ w["transformer.wte.weight"].T


def llama(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    """Also qwen3, with norms on queries and keys, and phi3, whose projections lie under each other in one."""
    x, window = w["model.embed_tokens.weight"][ids], c.attention_windows[0] if c.attention_windows else 0
    for n in range(c.num_hidden_layers):
        p = f"model.layers.{n}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], c.norm_eps)
        if p + "self_attn.qkv_proj.weight" in w:
            rows = [c.num_attention_heads * c.head_dim, *[c.num_key_value_heads * c.head_dim] * 2]
            q, k, v = (heads(y, c.head_dim) for y in (h @ w[p + "self_attn.qkv_proj.weight"].T).split(rows, -1))
        else:
            q, k, v = (heads(h @ w[p + f"self_attn.{y}_proj.weight"].T, c.head_dim) for y in "qkv")
        if p + "self_attn.q_norm.weight" in w:
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"], c.norm_eps)
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"], c.norm_eps)
        x = x + mix(turn(q, c), turn(k, c), v, window=window) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], c.norm_eps)
        if p + "mlp.gate_up_proj.weight" in w:
            gate, up = (h @ w[p + "mlp.gate_up_proj.weight"].T).chunk(2, -1)
        else:
            gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], c.norm_eps) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def palm(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    """Both branches from one norm without a bias, one key head, neighbouring axes turn together."""
    x = w["model.embed_tokens.weight"][ids]
    for n in range(c.num_hidden_layers):
        p = f"model.layers.{n}."
        h = layer_norm(x, w, p + "input_layernorm", c.norm_eps)
        q, k, v = (heads(h @ w[p + f"self_attn.{y}_proj.weight"].T, c.head_dim) for y in "qkv")
        read = mix(turn(q, c, pairs=True), turn(k, c, pairs=True), v) @ w[p + "self_attn.o_proj.weight"].T
        wide = silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
        x = x + read + wide @ w[p + "mlp.down_proj.weight"].T
    return layer_norm(x, w, "model.norm", c.norm_eps) @ w["model.embed_tokens.weight"].T * c.logit_scale


def distances(w: Weights, c: TransformerConfig, stack: str, length: int) -> Tensor:
    """A bias (H, T, T) for how far a key stands from its query: near distances by themselves, the others by their logarithm;
    an encoder tells ahead from behind by half of the rows each."""
    table = w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    count = c.relative_buckets // 2 if stack == "encoder" else c.relative_buckets
    near, bias = count // 2, torch.empty(c.num_attention_heads, length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(length):
            distance = abs(s - t) if stack == "encoder" else max(t - s, 0)
            row = distance
            if distance >= near:
                row = min(count - 1, near + int(math.log(distance / near) / math.log(c.relative_max_distance / near) * (count - near)))
            bias[:, t, s] = table[row + (count if stack == "encoder" and s > t else 0)]
    return bias


def t5(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    """Reads the ids backwards and writes them forwards."""
    memory = torch.empty(0)
    for stack in ("encoder", "decoder"):
        x = w["shared.weight"][ids.flip(0) if stack == "encoder" else ids]
        bias = distances(w, c, stack, len(ids))
        for n in range(2):
            layers = [f"{stack}.block.{n}.layer.{m}." for m in range(2 if stack == "encoder" else 3)]
            for p in layers[:-1]:
                kind = "EncDecAttention" if p[-2] == "1" else "SelfAttention"
                h = rms_norm(x, w[p + "layer_norm.weight"], c.norm_eps)
                sources = memory if kind == "EncDecAttention" else h
                q, k, v = (heads(y @ w[f"{p}{kind}.{name}.weight"].T, c.head_dim) for name, y in (("q", h), ("k", sources), ("v", sources)))
                own = kind == "SelfAttention"
                read = mix(q, k, v, scale=1.0, bias=bias if own else None, causal=own and stack == "decoder")
                x = x + read @ w[f"{p}{kind}.o.weight"].T
            p = layers[-1]
            h = rms_norm(x, w[p + "layer_norm.weight"], c.norm_eps)
            if c.gated_mlp:
                wide = gelu_new(h @ w[p + "DenseReluDense.wi_0.weight"].T) * (h @ w[p + "DenseReluDense.wi_1.weight"].T)
            else:
                wide = (h @ w[p + "DenseReluDense.wi.weight"].T).clamp(min=0)
            x = x + wide @ w[p + "DenseReluDense.wo.weight"].T
        memory = x = rms_norm(x, w[f"{stack}.final_layer_norm.weight"], c.norm_eps)
    if "lm_head.weight" in w:
        return x @ w["lm_head.weight"].T
    return x * c.hidden_size**-0.5 @ w["shared.weight"].T


LONG = (("rope_type", "longrope"), ("long_factor", tuple(1 + n / 3 for n in range(16))), ("original_max_position_embeddings", 13),
        ("short_factor", tuple(1 + n / 50 for n in range(16))))
BUCKETS = {"relative_buckets": 8, "relative_max_distance": 11, "pad_token_id": 0, "decoder_start_token_id": 0}
LATER = {**BUCKETS, "gated_mlp": True, "hidden_act": "gelu_new", "tie_word_embeddings": False, "logit_scale": 1.0}
ROWS: dict[str, tuple[str, dict[str, Any], Callable[[Weights, TransformerConfig, Tensor], Tensor]]] = {
    "gpt2": ("gpt2", {}, gpt2),
    "gpt3": ("gpt3", {"attention_windows": (0, 5)}, gpt3),
    "llama": ("llama", {}, llama),
    "llama-grouped": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}, llama),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "head_dim": 12}, llama),
    "phi3": ("phi3", {"num_key_value_heads": 1}, llama),
    "phi3-window": ("phi3", {"attention_windows": (5,)}, llama),
    "phi3-longrope": ("phi3", {"rope_scaling": LONG}, llama),
    "palm": ("palm", {"num_key_value_heads": 1}, palm),
    "t5": ("t5", BUCKETS, t5),
    "t5-v1_1": ("t5", LATER, t5),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("length", [13, 14])  # the longest short text of `longrope`, and the shortest long one
def test_float64_is_exact(name: str, learning: bool, length: int, tmp_path: Path) -> None:
    family, changes, reference = ROWS[name]
    model = build_model(dataclasses.replace(scaled(family, width=64, depth=2, vocab_size=31, context=32), **changes), dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) * 0.2 + (p.ndim == 1))
    save_model(model, tmp_path, None)
    again, ids = load_model(tmp_path), torch.randint(31, (length,), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids.flip(0)[None], "decoder_input_ids": ids[None]} if family == "t5" else {"input_ids": ids[None]}
    with torch.set_grad_enabled(learning):
        ours = again(**batch).logits[0]
    expected = reference(read_safetensors(tmp_path / "model.safetensors"), model.config, ids)
    assert ours.dtype == torch.float64
    assert (ours - expected).abs().max() <= EXACT * expected.abs().max()
