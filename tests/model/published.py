"""Published model directories in small: the config.json as it lies on the hub, with other sizes, and the names that the weights
have there, with their shapes, written down by hand. Nothing here is made by threefold or by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

D, H, F, V, N, L = 24, 3, 40, 31, 16, 2  # width, heads, hidden, vocabulary, positions, layers
Shapes = dict[str, Any]  # name -> a shape, or a tensor that is no weight


@dataclass(frozen=True)
class Published:
    """`copies` are names under which another weight stands a second time, `spare` those that the model has no use for, `said`
    other words that loading announces."""

    config: Mapping[str, Any]
    shapes: Shapes
    copies: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def weights(self) -> dict[str, Tensor]:
        """Random values, norms about one."""
        g, found = torch.Generator().manual_seed(0), {}
        for name, shape in self.shapes.items():
            if isinstance(shape, Tensor):
                found[name] = shape.clone()
            else:
                found[name] = torch.randn(shape, generator=g) * 0.15 + (len(shape) == 1 and name.endswith(NORMS))
        return found | {second: found[first].clone() for second, first in self.copies.items()}

    def write(self, folder: Path, *, prefix: tuple[str, str] = ("", ""), without: tuple[str, ...] = (), **config: Any) -> dict[str, Tensor]:
        """The directory; `prefix` turns one beginning of the body's names into another, `without` leaves names out."""
        old, new = prefix
        weights = {name: tensor for name, tensor in self.weights().items() if not name.startswith(without or "\0")}
        if old != new:
            weights = {new + name.removeprefix(old) if name.startswith(old) and not name.startswith(HEADS) else name: t
                       for name, t in weights.items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config, **config}))
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return weights


NORMS = ("norm.weight", "gamma", "LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
HEADS = ("lm_head.", "cls.", "score.", "classifier.")


def dense(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, *, bias: bool = True, width: int = D, words: tuple[str, str] = ("weight", "bias")) -> Shapes:
    return {f"{name}.{words[0]}": (width,), **({f"{name}.{words[1]}": (width,)} if bias else {})}


def layers(make: Any, count: int = L) -> Shapes:
    return {name: shape for n in range(count) for name, shape in make(n).items()}


# -- decoders ----------------------------------------------------------------------------------------------------------

TRIANGLE = torch.ones(N, N).tril()[None, None]
_SUMMARY = {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True}
_GPT2 = {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 30, "embd_pdrop": 0.1,
         "eos_token_id": 30, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": N, "n_embd": D,
         "n_head": H, "n_layer": L, "n_positions": N, "resid_pdrop": 0.1, **_SUMMARY, "vocab_size": V,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}


def _gpt2(before: str, tables: tuple[str, str], more: Any) -> Shapes:
    def block(n: int) -> Shapes:
        p = f"{before}h.{n}."
        return {**norm(p + "ln_1"), **norm(p + "ln_2"), f"{p}attn.c_attn.weight": (D, 3 * D), f"{p}attn.c_attn.bias": (3 * D,),
                f"{p}attn.c_proj.weight": (D, D), f"{p}attn.c_proj.bias": (D,), f"{p}mlp.c_fc.weight": (D, 4 * D),
                f"{p}mlp.c_fc.bias": (4 * D,), f"{p}mlp.c_proj.weight": (4 * D, D), f"{p}mlp.c_proj.bias": (D,), **more(p)}
    return {f"{before}{tables[0]}.weight": (V, D), f"{before}{tables[1]}.weight": (N, D), **layers(block)}


def _neo(n: int) -> Shapes:
    p = f"transformer.h.{n}."
    return {**norm(p + "ln_1"), **norm(p + "ln_2"), f"{p}attn.attention.bias": TRIANGLE.bool(),
            f"{p}attn.attention.masked_bias": torch.tensor(-1e9), **dense(p + "attn.attention.k_proj", D, D, bias=False),
            **dense(p + "attn.attention.v_proj", D, D, bias=False), **dense(p + "attn.attention.q_proj", D, D, bias=False),
            **dense(p + "attn.attention.out_proj", D, D), **dense(p + "mlp.c_fc", 4 * D, D), **dense(p + "mlp.c_proj", D, 4 * D)}


def _llama(shared: int, head: int = D // H, *, more: Any = lambda p: {}, second: bool = True) -> Shapes:
    def block(n: int) -> Shapes:
        p = f"model.layers.{n}."
        return {**norm(p + "input_layernorm", bias=False), **dense(p + "self_attn.q_proj", H * head, D, bias=False),
                **dense(p + "self_attn.k_proj", shared * head, D, bias=False), **dense(p + "self_attn.v_proj", shared * head, D, bias=False),
                **dense(p + "self_attn.o_proj", D, H * head, bias=False), **dense(p + "mlp.gate_proj", F, D, bias=False),
                **dense(p + "mlp.up_proj", F, D, bias=False), **dense(p + "mlp.down_proj", D, F, bias=False),
                **(norm(p + "post_attention_layernorm", bias=False) if second else {}), **more(p)}
    return {"model.embed_tokens.weight": (V, D), **layers(block), **norm("model.norm", bias=False)}


def _phi3(n: int) -> Shapes:
    p = f"model.layers.{n}."
    return {**norm(p + "input_layernorm", bias=False), **norm(p + "post_attention_layernorm", bias=False),
            **dense(p + "self_attn.qkv_proj", 3 * D, D, bias=False), **dense(p + "self_attn.o_proj", D, D, bias=False),
            **dense(p + "mlp.gate_up_proj", 2 * F, D, bias=False), **dense(p + "mlp.down_proj", D, F, bias=False)}


_ROTARY = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": D,
           "initializer_range": 0.02, "intermediate_size": F, "max_position_embeddings": 64, "num_attention_heads": H,
           "num_hidden_layers": L, "num_key_value_heads": H, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
           "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "vocab_size": V}
_INVERSE = {"self_attn.rotary_emb.inv_freq": torch.ones(D // H // 2)}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
TIED_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
_COHERE = {key: value for key, value in _ROTARY.items() if key not in ("rms_norm_eps", "tie_word_embeddings", "rope_scaling")}


# -- encoders ----------------------------------------------------------------------------------------------------------

_BERT = {"attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "hidden_size": D, "initializer_range": 0.02, "intermediate_size": F, "layer_norm_eps": 1e-12, "max_position_embeddings": N,
         "model_type": "bert", "num_attention_heads": H, "num_hidden_layers": L, "pad_token_id": 0, "position_embedding_type": "absolute",
         "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": V}
OLD = ("gamma", "beta")


def _bert(before: str, *, words: tuple[str, str] = ("weight", "bias"), entrance: int = D, rows: int = N, types: int = 2) -> Shapes:
    def block(n: int) -> Shapes:
        p = f"{before}encoder.layer.{n}."
        return {**{name: shape for x in ("query", "key", "value") for name, shape in dense(f"{p}attention.self.{x}", D, D).items()},
                **dense(p + "attention.output.dense", D, D), **norm(p + "attention.output.LayerNorm", words=words),
                **dense(p + "intermediate.dense", F, D), **dense(p + "output.dense", D, F), **norm(p + "output.LayerNorm", words=words)}
    e = before + "embeddings."
    return {f"{e}position_ids": torch.arange(rows)[None], f"{e}word_embeddings.weight": (V, entrance),
            f"{e}position_embeddings.weight": (rows, entrance), f"{e}token_type_embeddings.weight": (types, entrance),
            **norm(e + "LayerNorm", words=words, width=entrance), **layers(block)}


_CLS = {"cls.predictions.bias": (V,), **dense("cls.predictions.transform.dense", D, D),
        **norm("cls.predictions.transform.LayerNorm", words=OLD), **dense("cls.seq_relationship", 2, D)}
_ELECTRA = {**_BERT, "model_type": "electra", "embedding_size": 10, "summary_activation": "gelu", "summary_last_dropout": 0.1,
            "summary_type": "first", "summary_use_proj": True}


# -- both --------------------------------------------------------------------------------------------------------------

_T5 = {"architectures": ["T5ForConditionalGeneration"], "d_ff": F, "d_kv": 10, "d_model": D, "decoder_start_token_id": 0,
       "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
       "model_type": "t5", "n_positions": 512, "num_heads": H, "num_layers": L, "output_past": True, "pad_token_id": 0,
       "relative_attention_num_buckets": 8, "use_cache": True, "vocab_size": V,
       "task_specific_params": {"summarization": {"early_stopping": True, "max_length": 200, "num_beams": 4, "prefix": "summarize: "}}}
UNUSED_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def _t5(*, gated: bool) -> Shapes:
    found: Shapes = {"shared.weight": (V, D)}
    for stack in ("encoder", "decoder"):
        for n in range(L):
            kinds = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
            for m, kind in enumerate(kinds):
                p = f"{stack}.block.{n}.layer.{m}."
                found |= {f"{p}{kind}.{x}.weight": (30, D) for x in "qkv"}
                found |= {f"{p}{kind}.o.weight": (D, 30), f"{p}layer_norm.weight": (D,)}
            p = f"{stack}.block.{n}.layer.{len(kinds)}."
            found |= {f"{p}DenseReluDense.{x}.weight": (F, D) for x in (("wi_0", "wi_1") if gated else ("wi",))}
            found |= {f"{p}DenseReluDense.wo.weight": (D, F), f"{p}layer_norm.weight": (D,)}
        found |= {f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, H), f"{stack}.final_layer_norm.weight": (D,)}
    return found


_OPUS = {"activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False, "add_final_layer_norm": False,
         "architectures": ["MarianMTModel"], "attention_dropout": 0.0, "bad_words_ids": [[30]], "bos_token_id": 0, "classif_dropout": 0.0,
         "classifier_dropout": 0.0, "d_model": D, "decoder_attention_heads": H, "decoder_ffn_dim": F, "decoder_layerdrop": 0.0,
         "decoder_layers": L, "decoder_start_token_id": 30, "decoder_vocab_size": V, "dropout": 0.1, "encoder_attention_heads": H,
         "encoder_ffn_dim": F, "encoder_layerdrop": 0.0, "encoder_layers": L, "eos_token_id": 0, "forced_eos_token_id": 0,
         "gradient_checkpointing": False, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "init_std": 0.02,
         "is_encoder_decoder": True, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "max_length": 512,
         "max_position_embeddings": N, "model_type": "marian", "normalize_before": False, "normalize_embedding": False, "num_beams": 6,
         "num_hidden_layers": L, "pad_token_id": 30, "scale_embedding": True, "share_encoder_decoder_embeddings": True,
         "static_position_embeddings": True, "transformers_version": "4.22.0.dev0", "use_cache": True, "vocab_size": V}


def waves() -> Tensor:
    """The positions that Marian's files hold: all sines, then all cosines."""
    angles = torch.arange(N, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def _attend(p: str) -> Shapes:
    return {name: shape for x in ("k", "v", "q", "out") for name, shape in dense(f"{p}.{x}_proj", D, D).items()}


def _marian(stack: str) -> Shapes:
    def block(n: int) -> Shapes:
        p = f"model.{stack}.layers.{n}."
        cross = {**_attend(p + "encoder_attn"), **norm(p + "encoder_attn_layer_norm")} if stack == "decoder" else {}
        return {**_attend(p + "self_attn"), **norm(p + "self_attn_layer_norm"), **cross, **dense(p + "fc1", F, D), **dense(p + "fc2", D, F),
                **norm(p + "final_layer_norm")}
    return {f"model.{stack}.embed_positions.weight": waves(), **layers(block)}


def _biogpt(n: int) -> Shapes:
    p = f"biogpt.layers.{n}."
    return {**_attend(p + "self_attn"), **norm(p + "self_attn_layer_norm"), **dense(p + "fc1", F, D), **dense(p + "fc2", D, F),
            **norm(p + "final_layer_norm")}


PUBLISHED: dict[str, Published] = {
    "gpt2": Published(_GPT2, {**_gpt2("", ("wte", "wpe"), lambda p: {f"{p}attn.bias": TRIANGLE}), **norm("ln_f")}),
    "distilgpt2": Published(
        {**_GPT2, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        {**_gpt2("transformer.", ("wte", "wpe"), lambda p: {f"{p}attn.bias": TRIANGLE, f"{p}attn.masked_bias": torch.tensor(-1e4)}),
         **norm("transformer.ln_f")}, {"lm_head.weight": "transformer.wte.weight"}),
    "openai-gpt": Published(
        {**{key: value for key, value in _GPT2.items() if key not in ("activation_function", "bos_token_id", "eos_token_id")},
         "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt", "n_special": 0, "predict_special_tokens": True},
        _gpt2("", ("tokens_embed", "positions_embed"), lambda p: {f"{p}attn.bias": TRIANGLE})),
    "gpt-neo-125m": Published(
        {"activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"], "attention_dropout": 0,
         "attention_layers": ["global", "local"], "attention_types": [[["global", "local"], 1]], "bos_token_id": 30, "embed_dropout": 0,
         "eos_token_id": 30, "gradient_checkpointing": False, "hidden_size": D, "initializer_range": 0.02, "intermediate_size": None,
         "layer_norm_epsilon": 1e-05, "max_position_embeddings": N, "model_type": "gpt_neo", "num_heads": H, "num_layers": L,
         "resid_dropout": 0, **_SUMMARY, "transformers_version": "4.9.0.dev0", "use_cache": True, "vocab_size": V, "window_size": 4},
        {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (N, D), **layers(_neo), **norm("transformer.ln_f")},
        {"lm_head.weight": "transformer.wte.weight"}),
    "tinyllama": Published({**_ROTARY, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1,
                            "pretraining_tp": 1, "transformers_version": "4.35.0"},
                           {**_llama(1, more=lambda p: {p + key: value for key, value in _INVERSE.items()}), "lm_head.weight": (V, D)}),
    "llama-3.2": Published({**_ROTARY, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1,
                            "head_dim": D // H, "mlp_bias": False, "tie_word_embeddings": True, "eos_token_id": [2, 3],
                            "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}, _llama(1)),
    "qwen3-0.6b": Published(
        {**_ROTARY, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "max_window_layers": 28, "model_type": "qwen3",
         "num_key_value_heads": 1, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
        _llama(1, 16, more=lambda p: {f"{p}self_attn.q_norm.weight": (16,), f"{p}self_attn.k_norm.weight": (16,)}), TIED_HEAD),
    "phi-3-mini-128k": Published(
        {**_ROTARY, "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
         "model_type": "phi3", "original_max_position_embeddings": 8, "pad_token_id": 0, "resid_pdrop": 0.0, "sliding_window": 262144,
         "rope_scaling": {"long_factor": [1.0, 2.0, 3.0, 5.0], "short_factor": [1.0, 1.0, 1.1, 1.2], "type": "longrope"}},
        {"model.embed_tokens.weight": (V, D), **layers(_phi3), **norm("model.norm", bias=False), "lm_head.weight": (V, D)},
        said=("`auto_map`",)),
    "command-r": Published({**_COHERE, "architectures": ["CohereForCausalLM"], "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
                            "model_max_length": 131072, "model_type": "cohere", "pad_token_id": 0, "pretraining_tp": 1},
                           _llama(H, second=False)),
    "biogpt": Published(
        {**{key: value for key, value in _BERT.items() if key not in ("gradient_checkpointing", "position_embedding_type", "type_vocab_size")},
         "activation_dropout": 0.0, "architectures": ["BioGptForCausalLM"], "bos_token_id": 0, "eos_token_id": 2, "layerdrop": 0.0,
         "model_type": "biogpt", "pad_token_id": 1, "scale_embedding": True},
        {"biogpt.embed_tokens.weight": (V, D), "biogpt.embed_positions.weight": (N + 2, D), **layers(_biogpt), **norm("biogpt.layer_norm")},
        {"output_projection.weight": "biogpt.embed_tokens.weight"}),
    "bert-base-uncased": Published(
        {**_BERT, "architectures": ["BertForMaskedLM"]}, {**_bert("bert.", words=OLD), **dense("bert.pooler.dense", D, D), **_CLS},
        {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
        spare=("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias")),
    "all-minilm": Published({**_BERT, "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"]},
                            {**_bert(""), **dense("pooler.dense", D, D)}),
    "roberta-base": Published(
        {**{key: value for key, value in _BERT.items() if key != "position_embedding_type"}, "architectures": ["RobertaForMaskedLM"],
         "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05, "max_position_embeddings": N + 2, "model_type": "roberta",
         "pad_token_id": 1, "type_vocab_size": 1},
        {**_bert("roberta.", rows=N + 2, types=1), **dense("roberta.pooler.dense", D, D), "lm_head.bias": (V,),
         **dense("lm_head.dense", D, D), **norm("lm_head.layer_norm")},
        {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
        spare=("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")),
    "electra-discriminator": Published(
        {**_ELECTRA, "architectures": ["ElectraForPreTraining"]},
        {**_bert("electra.", entrance=10), **dense("electra.embeddings_project", D, 10), **dense("discriminator_predictions.dense", D, D),
         **dense("discriminator_predictions.dense_prediction", 1, D)}),
    "electra-generator": Published(
        {**_ELECTRA, "architectures": ["ElectraForMaskedLM"]},
        {**_bert("electra.", entrance=10), **dense("electra.embeddings_project", D, 10), **dense("generator_predictions.dense", 10, D),
         **norm("generator_predictions.LayerNorm", width=10), "generator_lm_head.bias": (V,)},
        {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}),
    "t5-small": Published(_T5, {**_t5(gated=False), UNUSED_BIAS: (8, H)},
                          dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight")),
    "flan-t5": Published({**_T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": L, "relative_attention_max_distance": 12,
                          "tie_word_embeddings": False, "dense_act_fn": "gelu_new", "is_gated_act": True},
                         {**_t5(gated=True), "lm_head.weight": (V, D)}, {"encoder.embed_tokens.weight": "shared.weight"}),
    "opus-mt": Published(
        _OPUS, {"final_logits_bias": (1, V), "model.shared.weight": (V, D), **_marian("encoder"), **_marian("decoder")},
        dict.fromkeys(("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "model.shared.weight")),
}
