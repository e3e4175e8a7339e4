"""Tiny random models, of transformers' making and loaded by us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from threefold.generation.reading import LanguageModel
from threefold.model.weights import load_model
from threefold.text.tokenizer import Tokenizer

FAMILIES = ("gpt2", "llama", "qwen3")


@dataclass
class Pair:
    """The same weights in transformers' model and in ours."""

    theirs: Any
    ours: LanguageModel


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A family's tiny model: vocabulary 120, context 64, ends with id 7."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=120, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=7
        )
    else:
        kind = transformers.LlamaConfig if request.param == "llama" else transformers.Qwen3Config
        config = kind(
            vocab_size=120,
            max_position_embeddings=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            bos_token_id=1,
            eos_token_id=7,
            pad_token_id=None,
        )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that greedy text does not repeat one token
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return Pair(theirs, load_model(folder))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """A tokenizer of bytes, whose one special token begins and ends a text."""
    return Tokenizer.train("byte", ["a"])


@pytest.fixture(scope="session", params=["t5", "marian"])
def reading_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny encoder-decoder: vocabulary 120, starts and pads with id 3, ends with id 7."""
    torch.manual_seed(1)
    ids = {"vocab_size": 120, "pad_token_id": 3, "decoder_start_token_id": 3, "eos_token_id": 7}
    if request.param == "t5":
        kind = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0, **ids))
    else:
        kind = transformers.MarianMTModel(transformers.MarianConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None,
            activation_function="silu", **ids))
    theirs = kind.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                small = name.split(".")[-2].startswith(("q", "out_proj", "fc2"))
                parameter.copy_(torch.randn_like(parameter) * (0.3 if small else 0.6 if request.param == "t5" else 1.0))
        if request.param == "marian":  # a token is not its own likeliest successor, as it would be with a head that is the table
            theirs.model.decoder.layers[-1].final_layer_norm.weight.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return Pair(theirs, load_model(folder))
