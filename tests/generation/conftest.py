"""Tiny random models, of transformers' making and loaded by us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from threefold.model.language import CausalLM
from threefold.model.weights import load_model
from threefold.text.tokenizer import Tokenizer

FAMILIES = ("gpt2", "llama", "qwen3")


@dataclass
class Pair:
    """The same weights in transformers' model and in ours."""

    theirs: Any
    ours: CausalLM


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
