"""Configurations, families, sizes and counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from threefold.errors import ConfigError, ModelError, UsageError
from threefold.model.base import Model
from threefold.model.build import (
    assemble,
    build_model,
    count_parameters,
    flops_per_token,
    matrix_parts,
    scaled,
    sized,
)
from threefold.model.config import ALIASES, TransformerConfig
from threefold.model.families import FAMILIES, family_of
from threefold.model.families.config_json import config_from_hf, config_to_hf
from threefold.model.linear import Linear
from threefold.model.names import fill, views

families = pytest.mark.parametrize("family", FAMILIES)
cells = pytest.mark.parametrize(("family", "task"), [(name, task) for name, family in FAMILIES.items() for task in family.heads])
EVERY_SIZE = [(family, size) for family, row in FAMILIES.items() for size in row.sizes]


def test_every_field_takes_two_values_among_the_families() -> None:
    configs = [config for family in FAMILIES.values() for config in (family.base, *family.sizes.values())]
    for field in dataclasses.fields(TransformerConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, (
            f"`{field.name}` is the same in every family"
        )
    assert 20 <= len(dataclasses.fields(TransformerConfig)) <= 45


def test_three_kinds_of_family_and_a_task_for_each() -> None:
    kinds = {name: (family.base.num_encoder_layers > 0, family.base.num_decoder_layers > 0) for name, family in FAMILIES.items()}
    assert set(kinds.values()) == {(True, False), (False, True), (True, True)}
    for name, family in FAMILIES.items():
        main = next(iter(family.heads))
        assert (main == "seq2seq") == all(kinds[name]) and (main == "causal") == (kinds[name] == (False, True))
        assert family.name == name == family.base.model_type and all(c.model_type == name for c in family.sizes.values())
        assert {c.is_encoder_decoder for c in family.sizes.values()} == {all(kinds[name])}
        architectures = [head.architecture for head in family.heads.values()]
        assert len(set(architectures)) == len(architectures)  # a saved file says which task it is for


def learned_positions(model: Model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("positions.weight"))


@pytest.mark.parametrize(("family", "size"), EVERY_SIZE)
def test_parameters_are_counted_without_building(family: str, size: str) -> None:
    found = FAMILIES[family].sizes[size]
    few = {name: min(most, getattr(found, name)) for name, most in (("num_encoder_layers", 2), ("num_decoder_layers", 3))}
    for config in (found, dataclasses.replace(found, tie_word_embeddings=False)):
        model = assemble(dataclasses.replace(config, **few), device="meta")
        assert count_parameters(model.config) == model.num_parameters()
        body = model.num_parameters(exclude_embeddings=True) - learned_positions(model)
        assert count_parameters(model.config, embeddings=False) == body


def test_published_sizes_have_their_published_counts() -> None:
    for family, name, millions in (
        ("gpt2", "gpt2", 124.4),
        ("gpt2", "gpt2-medium", 354.8),
        ("gpt2", "gpt2-large", 774.0),
        ("gpt2", "gpt2-xl", 1557.6),
        ("llama", "tinyllama-1.1b", 1100.0),
        ("llama", "llama-3.2-1b", 1235.8),
        ("llama", "llama-3.1-8b", 8030.3),
        ("qwen3", "qwen3-0.6b", 596.0),
        ("qwen3", "qwen3-8b", 8190.7),
        ("llama", "stories15m", 15.2),
        ("phi3", "phi3-mini-4k", 3821.1),
        ("gpt1", "openai-gpt", 116.5),
        ("biogpt", "biogpt", 346.8),
        ("bert", "bert-base-uncased", 109.5),
        ("bert", "bert-large-uncased", 335.2),
        ("roberta", "roberta-base", 124.7),
        ("roberta", "roberta-large", 355.4),
        ("t5", "t5-small", 60.5),
        ("t5", "t5-base", 222.9),
        ("t5", "flan-t5-small", 77.0),
        ("t5", "flan-t5-base", 247.6),
        ("t5", "t5-11b", 11307.3),
        ("t5", "flan-t5-xxl", 11135.3),
        ("electra", "small", 13.55),
        ("gpt3", "125m", 125.2),
        ("palm", "8b", 8630.0),
        ("palm", "62b", 62500.0),
        ("palm", "540b", 540350.0),
        ("palm", "command-r", 34980.8),
    ):
        assert count_parameters(FAMILIES[family].sizes[name]) / 1e6 == pytest.approx(millions, rel=1e-3), name
    for family, name, millions in (("transformer", "base", 65), ("transformer", "big", 213), ("gpt3", "175b", 175_000), ("gpt3", "13b", 13_000)):
        assert count_parameters(FAMILIES[family].sizes[name]) / 1e6 == pytest.approx(millions, rel=0.03), name  # rounded in their papers


@families
def test_nano_is_the_smallest_size(family: str) -> None:
    row = FAMILIES[family]
    body = {name: count_parameters(config, embeddings=False) for name, config in row.sizes.items()}
    assert min(body, key=lambda name: (body[name], name)) == "nano" and row.base == row.sizes.get(family, row.base)


@families
def test_flops(family: str) -> None:
    """Two for each weight that is multiplied and 4 H E for each key that is seen; three times that with a backward pass."""
    config = scaled(family, width=128, vocab_size=1000, context=256)
    model = build_model(config)
    matrices = sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, Linear) and ".blocks." in name)
    seen = {"decoder": (256 + 1) / 2, "encoder": 256.0, "both": 256 + (256 + 1) / 2 + 256}  # both: its own, the own past, the other's
    kind = "both" if config.is_encoder_decoder else "decoder" if config.num_decoder_layers else "encoder"
    forward = 2 * (matrices + 1000 * 128) + 4 * 128 * config.num_hidden_layers * seen[kind]
    assert flops_per_token(config, 256, training=False) == round(forward)
    assert flops_per_token(config, 256) == round(3 * forward)


@families
@pytest.mark.parametrize("count", [100_000, 800_000, 25_000_000, 300_000_000, 7_000_000_000])
def test_a_size_is_one_dial(family: str, count: int) -> None:
    config = scaled(family, parameters=count, vocab_size=500, context=128)
    assert abs(count_parameters(config) / count - 1) < (0.6 if count < 1_000_000 else 0.25)
    assert config.hidden_size % (32 if config.hidden_size < 128 else 64) == 0
    assert (
        config.head_dim == (32 if config.hidden_size < (512 if config.num_encoder_layers else 128) else 64)
        and config.head_dim * config.num_attention_heads == config.hidden_size
    )
    assert 2 <= config.num_hidden_layers <= 49 and config.max_position_embeddings == 128 and config.embd_pdrop == 0
    assert config.vocab_size == 500 and config.bos_token_id is None


def test_a_size_may_be_width_and_layers() -> None:
    assert sized("bert", "96x2", vocab_size=77, context=64) == scaled("bert", width=96, depth=2, vocab_size=77, context=64)
    for wrong in ("0x2", "96x0", "100x2", "x4", "96x", "16x2"):
        with pytest.raises(UsageError):
            sized("bert", wrong)


def test_sizes_by_name() -> None:
    assert sized("gpt2", "medium") == sized("gpt2", "gpt2-medium") == FAMILIES["gpt2"].sizes["gpt2-medium"]
    nano = sized("llama", "nano", vocab_size=77, context=64)
    assert (nano.vocab_size, nano.max_position_embeddings) == (77, 64)
    assert sized("qwen3", "2M", vocab_size=100) == sized("qwen3", 2_000_000, vocab_size=100)
    assert sized("qwen3", "1_000_000") == sized("qwen3", "1e6") == sized("qwen3", 1_000_000)  # as in a recipe
    for wrong in ("-3", "0", "", "25X"):
        with pytest.raises(UsageError):
            sized("qwen3", wrong)
    with pytest.raises(UsageError) as caught:
        sized("gpt2", "gpt2-meduim")
    assert "gpt2-medium" in caught.value.hint
    with pytest.raises(UsageError, match="not a known family"):
        sized("gpt22", "nano")
    for wrong in ({}, {"parameters": 1, "width": 64}, {"width": 100}, {"parameters": 0}):
        with pytest.raises(UsageError):
            scaled("gpt2", vocab_size=10, **wrong)
    assert (
        scaled("gpt2", width=192, vocab_size=10).num_hidden_layers == 3
        and scaled("gpt2", width=64, depth=7, vocab_size=10).num_hidden_layers == 7
    )


@families
def test_matrix_parts_are_the_matrices_of_the_blocks_and_before_the_head(family: str) -> None:
    model = build_model(scaled(family, width=32, depth=2, vocab_size=11))
    named = {name: p for name, p in model.named_parameters() if p.ndim == 2 and (".blocks." in name or name == "lm_head.transform.dense.weight")}
    parts = matrix_parts(model)
    assert set(parts) == set(named) and all(sum(rows) == named[name].shape[0] for name, rows in parts.items())
    three = [rows for name, rows in parts.items() if name.endswith(".attention.qkv.weight")]
    assert three and all(len(rows) == 3 for rows in three)
    assert all(len(rows) == 2 for name, rows in parts.items() if name.endswith(("cross.kv.weight", "gate_up.weight")))


def test_the_projection_of_a_factorised_embedding_is_a_matrix_too() -> None:
    narrow = dataclasses.replace(FAMILIES["electra"].sizes["nano"], embedding_size=24)
    assert "transformer.encoder.project.weight" in matrix_parts(build_model(narrow, task="masked"))


def test_first_values() -> None:
    config = scaled("qwen3", width=128, depth=2, vocab_size=400)
    for name, p in build_model(config).named_parameters():
        if name == "transformer.decoder.norm.weight":
            assert (p.abs() == 0.5).all() and abs(int(p.sign().sum())) < 40  # of 128 fair coins
        elif p.ndim == 1:
            assert (p == 1).all()
        elif name.endswith(("out.weight", "down.weight")):
            assert not p.any()
        else:
            expected = 128 ** -0.5 if "embed" in name else 0.5 * 128 ** -0.5
            assert p.std().item() == pytest.approx(expected, rel=0.05)
    gpt2 = dict(build_model(scaled("gpt2", width=128, depth=2, vocab_size=400)).named_parameters())
    assert gpt2["transformer.decoder.blocks.1.feedforward.down.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert gpt2["transformer.embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    untied = build_model(dataclasses.replace(config, tie_word_embeddings=False))
    assert untied.transformer.embed.weight.std().item() == pytest.approx(128 ** -0.5, rel=0.05)
    assert untied.lm_head is not None
    assert untied.lm_head.weight.std().item() == pytest.approx(0.5 * 128 ** -0.5, rel=0.05)
    assert (untied.transformer.decoder.norm.weight == 1).all()  # type: ignore[operator]


@cells
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_names_is_its_own_inverse(family: str, task: str, tied: bool) -> None:
    row = FAMILIES[family]
    config = dataclasses.replace(scaled(family, width=32, depth=3, vocab_size=11), tie_word_embeddings=tied)
    model = build_model(config, task=task, classes=3)
    found = list(views(row, model))
    names, ours = [view.name for view in found], dict(model.named_parameters())
    assert len(names) == len(set(names)) and {view.ours for view in found} == set(ours)  # each of theirs once, all of ours
    assert sum(view.tensor.numel() for view in found) == model.num_parameters()  # and every number in one of them
    g = torch.Generator().manual_seed(0)
    theirs = {view.name: torch.randn(view.shape, generator=g) for view in found}
    fill(row, model, theirs)
    assert all(torch.equal(view.read(), theirs[view.name]) for view in views(row, model))
    before = {name: p.clone() for name, p in ours.items()}
    fill(row, model, {name: tensor * 0 for name, tensor in theirs.items()})
    assert not any(p.any() for p in model.parameters())
    fill(row, model, theirs)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@families
def test_every_published_configuration_survives_the_tables(family: str) -> None:
    row = FAMILIES[family]
    for config in (row.base, *row.sizes.values()):
        assert config_from_hf(row, config_to_hf(row, config, "float32")) == dataclasses.replace(
            config, initializer_range=row.base.initializer_range)
    assert not set(row.keys) & {key for words in row.words for key in words.keys}  # a key is read in one place


@families
def test_every_field_is_written_or_the_familys_own(family: str) -> None:
    """A field that config.json cannot tell has to have the base's value, else it is refused."""
    row = FAMILIES[family]
    told = {name for ours in row.keys.values() for name in ((ours,) if isinstance(ours, str) else ours)}
    written = config_to_hf(row, row.base, "float32")
    changes: dict[str, object] = {
        "qk_norm": not row.base.qk_norm, "norm_eps": 0.125, "scale_embedding": not row.base.scale_embedding, "logit_scale": 0.3,
        "attention_scale": 0.2, "head_bias": not row.base.head_bias, "embedding_norm": not row.base.embedding_norm,
        "vocab_size": 77, "max_position_embeddings": 99, "mlp_bias": not row.base.mlp_bias,
        "norm_type": "rms_norm" if row.base.norm_type == "layer_norm" else "layer_norm", "attention_windows": (3, 5, 0),
        "position_embedding_type": "sinusoidal" if row.base.position_embedding_type != "sinusoidal" else "absolute"}
    for name, value in changes.items():
        config = dataclasses.replace(row.base, **{name: value})
        try:
            theirs = config_to_hf(row, config, "float32")
        except ModelError as problem:
            assert name not in told and f"`{name}`" in str(problem)
        else:
            assert config_from_hf(row, theirs) == config and theirs != written


def test_both_dialects_of_rope() -> None:
    row, base = FAMILIES["llama"], {"hidden_size": 64, "num_attention_heads": 4}
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    old = config_from_hf(row, {**base, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}})
    new = config_from_hf(row, {**base, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    both = config_from_hf(row, {**base, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling},
                                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new == both and old.rope_theta == 5e5
    assert config_from_hf(row, {**base, "rope_scaling": None}).rope_theta == 10000.0
    for wrong in (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "base": 3}},
        {"rope_scaling": "linear"},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
    ):
        with pytest.raises(ModelError):
            config_from_hf(row, {**base, **wrong})


def test_what_absent_keys_mean() -> None:
    gpt2 = config_from_hf(FAMILIES["gpt2"], {"n_embd": 96, "n_head": 3})
    assert (gpt2.head_dim, gpt2.num_key_value_heads, gpt2.intermediate_size, gpt2.bos_token_id) == (32, 3, 384, 50256)
    llama = config_from_hf(
        FAMILIES["llama"], {"hidden_size": 96, "num_attention_heads": 3, "head_dim": None, "eos_token_id": [5, 6]}
    )
    assert (llama.head_dim, llama.num_key_value_heads, llama.eos_token_id) == (32, 3, (5, 6))
    qwen3 = config_from_hf(
        FAMILIES["qwen3"],
        {
            "hidden_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["full_attention"],
            "sliding_window": 4096,
            "use_sliding_window": False,
        },
    )
    assert (qwen3.head_dim, qwen3.bos_token_id) == (128, None)


def test_S05_keys_that_are_not_understood_are_refused_all_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        config_from_hf(
            FAMILIES["llama"], {"hidden_siz": 64, "residual_multiplier": 2, "sliding_window": 128, "hidden_act": "silu"}
        )
    assert all(
        word in str(caught.value) for word in ("hidden_siz", "hidden_size", "residual_multiplier", "sliding_window")
    )
    for family, key, value in (
        ("gpt2", "scale_attn_weights", False),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "mlp_bias", True),
        ("qwen3", "layer_types", ["sliding_attention"]),
        ("llama", "hidden_act", "mish"),
        ("llama", "num_hidden_layers", "4"),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_attention_heads", 7),
        ("gpt2", "n_embd", -5),
        ("llama", "rms_norm_eps", "x"),
        ("llama", "tie_word_embeddings", 3),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "hidden_size", [1]),
        ("llama", "bos_token_id", "a"),
        ("llama", "num_key_value_heads", 5),
    ):
        with pytest.raises(ModelError):
            config_from_hf(FAMILIES[family], {key: value})


def test_what_a_family_has_no_words_for() -> None:
    config = scaled("gpt2", width=64, vocab_size=9)
    for changes in ({"qk_norm": True}, {"norm_type": "rms_norm"}, {"rope_theta": 5.0}, {"head_dim": 16}):
        with pytest.raises(ModelError):
            config_to_hf(FAMILIES["gpt2"], dataclasses.replace(config, **changes), "float32")


def test_an_impossible_configuration_tells_all_its_problems() -> None:
    good = scaled("llama", width=64, vocab_size=9)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(good, num_key_value_heads=7, head_dim=3, hidden_act="mish", embd_pdrop=1.5, norm_eps=-1)
    assert all(
        word in str(caught.value) for word in ("num_key_value_heads", "head_dim", "mish", "embd_pdrop", "norm_eps")
    )
    with pytest.raises(ConfigError, match="vocab_size"):
        dataclasses.replace(good, vocab_size=0)


def test_a_configuration_answers_to_other_words() -> None:
    config = FAMILIES["gpt2"].base
    assert all(getattr(config, word) == getattr(config, ours) for word, ours in ALIASES.items())
    assert config.n_embd == 768 and not config.is_encoder_decoder and config.to_dict()["hidden_size"] == 768
    with pytest.raises(AttributeError, match="no_such"):
        _ = config.no_such
    assert hash(config) == hash(dataclasses.replace(config)) and family_of("gpt2").base is config
