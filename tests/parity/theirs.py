"""Random tiny models of transformers, one row a shape: the other side of every parity test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
FLOAT32 = 2e-6  # of the largest value: sums in another order
EXACT64 = 1e-10
CAST64 = 1e-6  # in float64, where transformers casts norms, rotation tables or scores to float32
GRADIENT32 = 2e-5


@dataclass(frozen=True)
class Row:
    """A family and a shape. `config` is transformers' class, `prefix` of its model classes, `changes` its arguments."""

    family: str
    kind: str
    fields: dict[str, Any]
    float64: float = EXACT64
    positions: bool = True  # takes `position_ids`
    types: bool = False
    tasks: tuple[str, ...] = ("causal", "body")


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NEO = {"hidden_size": 48, "num_layers": 4, "num_heads": 3, "max_position_embeddings": 64, "window_size": 5,
        "attention_types": [[["global", "local"], 2]]}
_LLAMA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
          "max_position_embeddings": 4096}
_PHI3 = {**_LLAMA, "pad_token_id": 0}
_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80, "max_position_embeddings": 64,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
_MARIAN = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
           "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 60,
           "decoder_start_token_id": 60, "eos_token_id": 0, "forced_eos_token_id": None, "activation_function": "relu",
           "scale_embedding": True}
_T5 = {"d_model": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3, "d_kv": 10, "d_ff": 80, "dropout_rate": 0.0,
       "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
DECODES = ("causal", "body", "classify", "tag")
ENCODES = ("masked", "body", "classify", "tag")


def _row(family: str, kind: str, base: dict[str, Any], settings: dict[str, Any], **changes: Any) -> Row:
    return Row(family, kind, {**base, **changes}, **settings)


_gpt2 = {"tasks": DECODES}
_gpt3 = {"tasks": DECODES, "float64": CAST64}
_llama = {"tasks": DECODES, "float64": CAST64}
_bert = {"tasks": (*ENCODES, "pretraining"), "types": True}
_roberta = {"tasks": ENCODES, "types": True}
_electra = {"tasks": (*ENCODES, "replaced"), "types": True}
_pairs = {"tasks": ("seq2seq", "body"), "positions": False}
_t5 = {"tasks": ("seq2seq", "body", "encoder", "classify", "tag"), "positions": False, "float64": CAST64}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 4.0, 9.0]}

ROWS: dict[str, Row] = {
    "gpt2": _row("gpt2", "GPT2", _GPT2, _gpt2),
    "gpt2-odd-heads": _row("gpt2", "GPT2", _GPT2, _gpt2, n_head=5, n_embd=35, n_inner=52),
    "gpt2-untied": _row("gpt2", "GPT2", _GPT2, _gpt2, tie_word_embeddings=False),
    "gpt2-relu": _row("gpt2", "GPT2", _GPT2, _gpt2, activation_function="relu", n_head=1),
    "gpt1": _row("gpt1", "OpenAIGPT", _GPT2, {"tasks": ("causal", "body", "classify")}),
    "gpt1-odd-heads": _row("gpt1", "OpenAIGPT", _GPT2, {"tasks": ("causal",)}, n_head=5, n_embd=35, afn="relu"),
    "gpt3": _row("gpt3", "GPTNeo", _NEO, _gpt3),
    "gpt3-dense": _row("gpt3", "GPTNeo", _NEO, _gpt3, attention_types=[[["global"], 4]], intermediate_size=70),
    "gpt3-odd": _row("gpt3", "GPTNeo", _NEO, _gpt3, attention_types=[[["local", "global", "global"], 1]], num_layers=3, num_heads=4,
                     window_size=300),
    "llama": _row("llama", "Llama", _LLAMA, _llama),
    "llama-tied": _row("llama", "Llama", _LLAMA, _llama, tie_word_embeddings=True, num_key_value_heads=6),
    "llama-biases": _row("llama", "Llama", _LLAMA, _llama, attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "llama-free-head-dim": _row("llama", "Llama", _LLAMA, _llama, head_dim=10, num_attention_heads=3, num_key_value_heads=3),
    "llama-linear": _row("llama", "Llama", _LLAMA, _llama, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
    "llama-llama3": _row("llama", "Llama", _LLAMA, _llama, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 500.0}),
    "llama-yarn": _row("llama", "Llama", _LLAMA, _llama, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}),
    "qwen3": _row("qwen3", "Qwen3", _LLAMA, _llama, head_dim=16),
    "qwen3-tied-odd": _row("qwen3", "Qwen3", _LLAMA, _llama, tie_word_embeddings=True, num_attention_heads=5, num_key_value_heads=5,
                           head_dim=14),
    "qwen3-bias-theta": _row("qwen3", "Qwen3", _LLAMA, _llama, head_dim=16, attention_bias=True, rope_parameters={**ROPE, "rope_theta": 1e6}),
    "phi3": _row("phi3", "Phi3", _PHI3, _llama),
    "phi3-window": _row("phi3", "Phi3", _PHI3, _llama, sliding_window=6, num_key_value_heads=6),
    "phi3-short": _row("phi3", "Phi3", _PHI3, _llama, rope_parameters=_LONG, original_max_position_embeddings=32),
    "phi3-long": _row("phi3", "Phi3", _PHI3, _llama, rope_parameters=_LONG, original_max_position_embeddings=8),
    "palm": _row("palm", "Cohere", _LLAMA, {"float64": CAST64}, num_key_value_heads=1, logit_scale=48**-0.5, pad_token_id=0),
    "palm-grouped": _row("palm", "Cohere", _LLAMA, {"float64": CAST64}, attention_bias=True, pad_token_id=0),
    "palm-untied": _row("palm", "Cohere", _LLAMA, {"float64": CAST64}, tie_word_embeddings=False, head_dim=10, pad_token_id=0),
    "biogpt": _row("biogpt", "BioGpt", _BERT, {"tasks": DECODES}, pad_token_id=1),
    "biogpt-odd": _row("biogpt", "BioGpt", _BERT, {"tasks": DECODES}, pad_token_id=1, scale_embedding=False, num_attention_heads=4,
                       hidden_act="relu"),
    "bert": _row("bert", "Bert", _BERT, _bert),
    "bert-odd": _row("bert", "Bert", _BERT, _bert, hidden_size=35, num_attention_heads=5, hidden_act="relu", type_vocab_size=1),
    "bert-gelu-new": _row("bert", "Bert", _BERT, _bert, hidden_act="gelu_new", num_attention_heads=1, layer_norm_eps=1e-5),
    "roberta": _row("roberta", "Roberta", _BERT, _roberta, pad_token_id=1, type_vocab_size=1),
    "roberta-odd": _row("roberta", "Roberta", _BERT, _roberta, pad_token_id=1, num_attention_heads=4, layer_norm_eps=1e-5),
    "electra": _row("electra", "Electra", _BERT, _electra, embedding_size=20),
    "electra-base": _row("electra", "Electra", _BERT, _electra, embedding_size=48, num_attention_heads=4),
    "transformer": _row("transformer", "Marian", _MARIAN, _pairs),
    "transformer-odd": _row("transformer", "Marian", _MARIAN, _pairs, encoder_attention_heads=4, decoder_attention_heads=4,
                            scale_embedding=False, activation_function="silu"),
    "t5": _row("t5", "T5", _T5, _t5),
    "t5-v1_1": _row("t5", "T5", _T5, _t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-gated-silu": _row("t5", "T5", _T5, _t5, feed_forward_proj="gated-silu", num_heads=4, relative_attention_num_buckets=32,
                          relative_attention_max_distance=128),
}
_CLASSES = {
    "causal": ("ForCausalLM", "LMHeadModel"), "body": ("Model",), "encoder": ("EncoderModel",), "classify": ("ForSequenceClassification",),
    "tag": ("ForTokenClassification",), "masked": ("ForMaskedLM",), "pretraining": ("ForPreTraining",), "replaced": ("ForPreTraining",),
    "seq2seq": ("MTModel", "ForConditionalGeneration"),
}
CELLS = [(name, task) for name, row in ROWS.items() for task in row.tasks]


def their_class(kind: str, task: str) -> Any:
    """transformers' class for a task."""
    return next(getattr(transformers, kind + end) for end in _CLASSES[task] if hasattr(transformers, kind + end))


def their_model(row: Row, task: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers whose norms and biases are random too, so that nothing hides behind ones and zeros."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    if task in ("classify", "tag"):
        common |= {"num_labels": 3, "pad_token_id": 0}
    config = getattr(transformers, f"{row.kind}Config")(**{**common, **row.fields, **changes})
    model = their_class(row.kind, task)(config)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n == "final_logits_bias")]:
            if id(value) in frozen:
                continue  # waves that are stored as a table
            scale = 0.3 if value.ndim == 1 else 0.12
            if name.endswith((".q.weight", "attn.attention.q_proj.weight")):
                scale /= 3  # scores are not scaled in these families, so queries are small
            shift = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
            value.copy_(torch.randn_like(value) * scale + shift)
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Within a tolerance, as a share of the largest value."""
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    assert worst <= tolerance, f"{worst:.2e} > {tolerance:.0e} of the largest value"


IDS = torch.randint(3, VOCABULARY - 1, (3, 17), generator=torch.Generator().manual_seed(1))
WRITTEN = torch.randint(3, VOCABULARY - 1, (3, 11), generator=torch.Generator().manual_seed(2))


def inputs(row: Row, task: str, *, labels: bool = True) -> dict[str, Any]:
    """Arguments that both sides take."""
    ids = IDS.clone()
    given: dict[str, Any] = {"input_ids": ids}
    if row.types:
        given["token_type_ids"] = (torch.arange(17).expand(3, 17) > 8).long() * (row.fields.get("type_vocab_size", 2) > 1)
    if row.kind == "T5" and task == "classify":
        ids[:, -1] = 2  # the end of the text, where it is judged
    if task in ("seq2seq", "body") and row.family in ("t5", "transformer"):
        given["decoder_input_ids"] = WRITTEN
    if labels:
        given |= targets(row, task)
    return given


def targets(row: Row, task: str) -> dict[str, Any]:
    """Labels of a task."""
    if task in ("causal", "masked", "pretraining"):
        labels = IDS.clone()
        labels[0, :5] = -100
        pairs = {"next_sentence_label": torch.tensor([0, 1, 1])} if task == "pretraining" else {}
        return {"labels": labels, **pairs}
    if task == "seq2seq":
        labels = WRITTEN.roll(-1, 1)
        labels[1, 7:] = -100
        return {"labels": labels}
    if task == "classify":
        return {"labels": torch.tensor([0, 2, 1])}
    if task == "tag":
        return {"labels": IDS % 3}
    return {"labels": IDS % 2} if task == "replaced" else {}


