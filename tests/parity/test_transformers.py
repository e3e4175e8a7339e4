"""Against transformers, what is not a table of cells: caches, far positions, dtypes, shards, any shape, published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.parity.test_families import open_there
from tests.parity.theirs import FLOAT32, IDS, ROWS, WRITTEN, close, their_class, their_model
from threefold.model.build import assemble, build_model, scaled
from threefold.model.cache import Cache
from threefold.model.classifiers import Body
from threefold.model.families import FAMILIES
from threefold.model.language import CausalLM
from threefold.model.output import Output
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

DECODERS = [name for name, row in ROWS.items() if row.tasks[0] == "causal" and "-" not in name]
PAIRS = [name for name, row in ROWS.items() if row.tasks[0] == "seq2seq"]


def both(name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    theirs = their_model(ROWS[name], ROWS[name].tasks[0], **changes)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, torch.float32)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "phi3-short", "palm"])
def test_far_positions(name: str, tmp_path: Path) -> None:
    """Tables are computed in the same precision, so far positions agree as near ones do."""
    theirs, ours = both(name, tmp_path)
    positions = torch.arange(3500, 3517)[None].expand(3, -1)
    with torch.no_grad():
        close(ours(IDS, position_ids=positions).logits, theirs(IDS, position_ids=positions).logits, FLOAT32)


@pytest.mark.parametrize("name", [*DECODERS, "gpt3-odd", "phi3-window"])
def test_a_cache_that_grows_token_by_token(name: str, tmp_path: Path) -> None:
    theirs, ours = both(name, tmp_path)
    takes = ROWS[name].kind != "OpenAIGPT"  # transformers has no cache for it: compared with its full pass
    with torch.no_grad():
        past, cache = None, Cache(capacity=4)
        full = theirs(IDS).logits
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            expected = full[:, start:end]
            if takes:
                a = theirs(IDS[:, start:end], past_key_values=past, use_cache=True)
                past, expected = a.past_key_values, a.logits
            b = ours(IDS[:, start:end], past_key_values=cache, use_cache=True)
            assert b.past_key_values is cache and len(cache) == end
            close(b.logits, expected, FLOAT32)


@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_that_writes_token_by_token_behind_an_encoder(name: str, tmp_path: Path) -> None:
    theirs, ours = both(name, tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    with torch.no_grad():
        full = theirs(input_ids=IDS, attention_mask=mask, decoder_input_ids=WRITTEN).logits
        cache, encoded = Cache(), None
        for start, end in ((0, 1), (1, 2), (2, 6), (6, 11)):
            out = ours(IDS if encoded is None else None, attention_mask=mask, decoder_input_ids=WRITTEN[:, start:end],
                       encoder_outputs=encoded, past_key_values=cache)
            encoded = encoded or ours.transformer._through(ours.transformer.encoder, IDS, mask, None, None, None,
                                                           with_states=False, with_attentions=False)
            close(out.logits, full[:, start:end], FLOAT32)
        body = Body(ours.transformer, ours.config)
        whole = body(IDS, attention_mask=mask, decoder_input_ids=WRITTEN)
        for again in (Output(last_hidden_state=encoded.last), encoded):  # what a body said before, in either form
            assert torch.equal(body(attention_mask=mask, decoder_input_ids=WRITTEN, encoder_outputs=again)[0], whole[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_opens_there_without_a_warning(family: str, tmp_path: Path) -> None:
    """A vocabulary smaller than the family's own special ids, no dropout, no ids at all: as a run leaves it."""
    config = scaled(family, width=64, depth=2, vocab_size=61, context=32)
    more: dict[str, Any] = {}
    if config.is_encoder_decoder:  # a start and a filler are what its tokenizer gives
        config, more = dataclasses.replace(config, pad_token_id=0, decoder_start_token_id=0), {"decoder_input_ids": WRITTEN}
    if family == "roberta":  # its positions begin behind the id that pads
        config = dataclasses.replace(config, pad_token_id=1)
    model = build_model(config, seed=3)
    save_model(model, tmp_path)
    row = next(row for row in ROWS.values() if row.family == family)
    theirs = open_there(tmp_path, their_class(row.kind, model.task))
    with torch.no_grad():
        close(model(IDS, **more).logits, theirs(IDS, **more).logits, FLOAT32)
    longest = theirs.config.n_positions if family == "t5" else theirs.config.max_position_embeddings
    assert longest == 32 + config.position_offset * (family == "roberta")


@pytest.mark.parametrize("name", [name for name in ROWS if "-" not in name])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_their_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    their_model(ROWS[name], ROWS[name].tasks[0]).to(dtype).save_pretrained(tmp_path / "a")
    ours = load_model(tmp_path / "a")
    assert ours.dtype == dtype
    save_model(ours, tmp_path / "b", None)
    stored, written = (read_safetensors(tmp_path / side / "model.safetensors") for side in "ab")
    assert all(torch.equal(stored[name].view(torch.uint8), written[name].view(torch.uint8)) for name in written)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_their_shards(name: str, tmp_path: Path) -> None:
    theirs = their_model(ROWS[name], ROWS[name].tasks[0])
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    more = {"decoder_input_ids": WRITTEN} if name == "t5" else {}
    with torch.no_grad():
        close(load_model(tmp_path)(IDS, **more).logits, theirs(IDS, **more).logits, FLOAT32)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["gpt2", "llama", "qwen3", "gpt1", "biogpt", "bert", "palm"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([4, 6, 10]),
    st.integers(1, 23),
    st.integers(0, 99),
)
def test_any_shape(
    tmp_path_factory: Any, name: str, groups: int, shared: int, head: int, length: int, seed: int
) -> None:
    heads = groups * shared
    names = {"gpt2": ("n_head", "n_embd"), "gpt1": ("n_head", "n_embd")}.get(name, ("num_attention_heads", "hidden_size"))
    changes: dict[str, Any] = {names[0]: heads, names[1]: heads * head}
    if name in ("llama", "qwen3", "palm"):
        changes |= {"num_key_value_heads": shared, "head_dim": head, "hidden_size": heads * 6}
    folder = tmp_path_factory.mktemp("any")
    theirs, ours = both(name, folder, seed=seed, **changes)
    ids = torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits, FLOAT32)


def test_a_published_model_says_what_it_should(shared_data: Callable[[str], Path]) -> None:
    """The whole of stories260K, trained by somebody else: its greedy text is known."""
    folder = shared_data("stories260K/hf")
    model = load_model(folder, task="causal")
    assert isinstance(model, CausalLM)
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
