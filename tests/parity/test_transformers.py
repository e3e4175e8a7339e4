"""The same numbers as transformers, on random tiny models of many shapes, through their own files in both
directions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from threefold.model.build import assemble, build_model, scaled
from threefold.model.cache import Cache
from threefold.model.families import FAMILIES
from threefold.model.heads import CausalLM
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model, to_hf

transformers = pytest.importorskip("transformers")

FLOAT32 = 2e-6    # of the largest logit: sums in another order
GPT2_FLOAT64 = 1e-10
CAST = 1e-6       # of the largest logit in float64: transformers' RMS norm and rotation tables are cast to float32
GRADIENT32 = 2e-5


def their_model(kind: str, **changes: Any) -> Any:
    """A random transformers model whose norms and biases are random too, so that nothing hides behind ones and
    zeros."""
    torch.manual_seed(changes.pop("seed", 0))
    common: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **{
                **common,
                "n_embd": 48,
                "n_layer": 2,
                "n_head": 3,
                "n_positions": 64,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                **changes,
            }
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        common |= {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "max_position_embeddings": 4096,
        }
        config_class, model_class = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                                     "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}[kind]
        if kind == "qwen3":
            common["head_dim"] = 16
        model = model_class(config_class(**{**common, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.12
            parameter.copy_(
                torch.randn_like(parameter) * scale + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0)
            )
    return model.eval()


@pytest.fixture()
def both(tmp_path: Path) -> Callable[..., tuple[Any, CausalLM]]:
    def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, CausalLM]:
        theirs = their_model(kind, **changes)
        theirs.save_pretrained(tmp_path / "theirs")
        return theirs.to(dtype), load_model(tmp_path / "theirs", dtype)
    return make


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    assert worst <= tolerance, f"{worst:.2e} > {tolerance:.0e} of the largest value"


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-odd-heads": ("gpt2", {"n_head": 5, "n_embd": 35, "n_inner": 52}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu", "n_head": 1}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-free-head-dim": ("llama", {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-odd": (
        "qwen3",
        {"tie_word_embeddings": True, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14},
    ),
    "qwen3-bias-theta": (
        "qwen3",
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}
IDS = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_all_that_goes_with_them(both: Any, shape: str) -> None:
    kind, changes = SHAPES[shape]
    theirs, ours = both(kind, **changes)
    labels = IDS.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        a = theirs(IDS, labels=labels, output_hidden_states=True, output_attentions=True)
        b = ours(IDS, labels=labels, output_hidden_states=True, output_attentions=True)
        c = ours(IDS)
    close(b.logits, a.logits, FLOAT32)
    close(c.logits, a.logits, FLOAT32)  # without attentions another way through the scores is taken
    close(b.loss, a.loss, FLOAT32)
    assert len(a.hidden_states) == len(b.hidden_states) and len(a.attentions) == len(b.attentions)
    for x, y in zip(b.hidden_states, a.hidden_states, strict=True):
        close(x, y, 1e-5)
    for x, y in zip(b.attentions, a.attentions, strict=True):
        close(x, y, 1e-5)
    assert b.last_hidden_state is b.hidden_states[-1]
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_float64(both: Any, shape: str) -> None:
    kind, changes = SHAPES[shape]
    theirs, ours = both(kind, torch.float64, **changes)
    with torch.no_grad():
        close(ours(IDS).logits, theirs(IDS).logits, GPT2_FLOAT64 if kind == "gpt2" else CAST)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_gradients(both: Any, kind: str) -> None:
    theirs, ours = both(kind)
    theirs(IDS, labels=IDS).loss.backward()
    ours.train()(IDS, labels=IDS).loss.backward()
    gradients = dict(to_hf(FAMILIES[kind], ours.config, {name: p.grad for name, p in ours.named_parameters()}))
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad, GRADIENT32)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(both: Any, kind: str, side: str) -> None:
    """With the positions that transformers' own `generate` derives from the mask."""
    theirs, ours = both(kind)
    mask = torch.ones_like(IDS)
    for row, n in enumerate((0, 4, 9)):
        mask[row, :n] = 0
    mask = mask.flip(1) if side == "right" else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        a, b = theirs(IDS, attention_mask=mask, position_ids=positions).logits, ours(IDS, attention_mask=mask).logits
    close(b[mask == 1], a[mask == 1], FLOAT32)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_far_positions(both: Any, kind: str) -> None:
    """Tables are computed in the same precision, so far positions agree as near ones do."""
    theirs, ours = both(kind)
    positions = torch.arange(3500, 3517)[None].expand(3, -1)
    with torch.no_grad():
        close(ours(IDS, position_ids=positions).logits, theirs(IDS, position_ids=positions).logits, FLOAT32)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_cache_that_grows_token_by_token(both: Any, kind: str) -> None:
    theirs, ours = both(kind)
    with torch.no_grad():
        past, cache = None, Cache(capacity=4)
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            a = theirs(IDS[:, start:end], past_key_values=past, use_cache=True)
            b = ours(IDS[:, start:end], past_key_values=cache, use_cache=True)
            past = a.past_key_values
            assert b.past_key_values is cache and len(cache) == past.get_seq_length() == end
            close(b.logits, a.logits, FLOAT32)


def open_there(folder: Path) -> Any:
    """transformers' model, opened without a warning and without a name that is new, missing or unused."""
    lines: list[str] = []
    logger = transformers.utils.logging.get_logger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not lines
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_new_model_opens_there_without_a_warning(kind: str, tmp_path: Path) -> None:
    """A vocabulary smaller than the family's own special ids, no dropout, no ids at all: as a run leaves it."""
    model = build_model(scaled(kind, width=64, depth=2, vocab_size=61, context=32), seed=3)
    save_model(model, tmp_path)
    theirs = open_there(tmp_path)
    with torch.no_grad():
        close(model(IDS).logits, theirs(IDS).logits, FLOAT32)
    assert theirs.config.max_position_embeddings == 32 and theirs.generation_config.eos_token_id is None


@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_save_opens_there_without_a_warning(both: Any, shape: str, tmp_path: Path) -> None:
    kind, changes = SHAPES[shape]
    theirs, ours = both(kind, **changes)
    save_model(ours, tmp_path / "ours")
    again = open_there(tmp_path / "ours")
    assert type(again) is type(theirs)
    stored, written = (
        read_safetensors(tmp_path / "theirs" / "model.safetensors"),
        read_safetensors(tmp_path / "ours" / "model.safetensors"),
    )
    assert set(stored) == set(written)
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    with torch.no_grad():
        close(again(IDS).logits, theirs(IDS).logits, FLOAT32)
    for key, value in theirs.config.to_dict().items():
        if key not in ("dtype", "_name_or_path", "transformers_version", "architectures", "pad_token_id", "n_inner"):
            assert again.config.to_dict()[key] == value, key


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_their_other_dtypes(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    their_model(kind).to(dtype).save_pretrained(tmp_path / "a")
    ours = load_model(tmp_path / "a")
    assert ours.dtype == dtype
    save_model(ours, tmp_path / "b", None)
    stored, written = (
        read_safetensors(tmp_path / "a" / "model.safetensors"),
        read_safetensors(tmp_path / "b" / "model.safetensors"),
    )
    assert all(torch.equal(stored[name].view(torch.uint8), written[name].view(torch.uint8)) for name in stored)


def test_their_shards(tmp_path: Path) -> None:
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        close(load_model(tmp_path)(IDS).logits, theirs(IDS).logits, FLOAT32)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["gpt2", "llama", "qwen3"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([4, 6, 10]),
    st.integers(1, 23),
    st.integers(0, 99),
)
def test_any_shape(
    tmp_path_factory: Any, kind: str, groups: int, shared: int, head: int, length: int, seed: int
) -> None:
    heads = groups * shared
    changes = {"n_head": heads, "n_embd": heads * head} if kind == "gpt2" else {
        "num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": head, "hidden_size": heads * 6}
    theirs = their_model(kind, seed=seed, **changes)
    folder = tmp_path_factory.mktemp("any")
    theirs.save_pretrained(folder)
    ids = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        close(load_model(folder)(ids).logits, theirs(ids).logits, FLOAT32)


def test_a_published_model_says_what_it_should(shared_data: Callable[[str], Path]) -> None:
    """The whole of stories260K, trained by somebody else: its greedy text is known."""
    folder = shared_data("stories260K/hf")
    model = load_model(folder)
    assert not model.notes
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = (folder.parent / "expected_greedy.txt").read_text()
    cache, token, out = Cache(256), torch.tensor([[1]]), []
    with torch.inference_mode():
        while len(out) < 256:
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1)[:, None]
            if int(token) in (1, 2):
                break
            out.append(int(token))
    assert tokenizer.decode(out).strip() == expected.strip()


def test_memory_of_a_published_size_is_not_taken_on_meta() -> None:
    assert assemble(FAMILIES["qwen3"].sizes["qwen3-8b"], device="meta").num_parameters() > 8_000_000_000
