"""Recipes: the list of options, strict reading, overriding and comparing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold import config
from threefold.config import Leaf, ModelOptions, Recipe, TrainOptions
from threefold.config import toml as room
from threefold.config.recipe import leaves
from threefold.errors import ConfigError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "configs"


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.parse_recipe(text)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("leaf", config.leaves().values(), ids=lambda leaf: leaf.key)
def test_every_option_says_what_it_is_and_has_a_default_that_holds(leaf: Leaf) -> None:
    assert 10 < len(leaf.help) < 140
    assert leaf.help[0].islower() and not leaf.help.endswith(".")
    assert leaf.default is not None or leaf.optional
    assert leaf.read(leaf.default) == leaf.default
    assert leaf.expected()


def test_recipes_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.steps = 3  # type: ignore[misc]
    for kind in (Recipe, *config.sections().values()):
        with pytest.raises(TypeError):
            kind(None)


def test_the_public_options_of_the_interface_are_there_and_safe() -> None:
    for name in ("steps", "learning_rate", "batch_tokens", "seed", "save_every", "eval_every"):
        assert f"train.{name}" in config.leaves()
    assert {"train.steps", "train.log_every", "train.eval_every", "train.save_every",
            "train.budget"} <= config.safe_keys()
    assert not {"train.learning_rate", "train.seed", "train.batch_tokens", "model.size", "data.paths",
                "tokenizer.vocab_size"} & config.safe_keys()


# ------------------------------------------------------------------------------------------ there and back

def values_of(leaf: Leaf) -> st.SearchStrategy[Any]:
    text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
    low = leaf.low if leaf.low is not None else (leaf.above + 1e-9 if leaf.above is not None else None)
    high = leaf.high if leaf.high is not None else (0.999 if leaf.below == 1 else 1e9)
    found: st.SearchStrategy[Any]
    if leaf.choices:
        found = st.sampled_from(leaf.choices)
    elif leaf.kind == "int":
        found = st.integers(int(low or 0), int(high))
    elif leaf.kind == "float":
        found = st.floats(low, high, allow_nan=False)
    elif leaf.kind == "words":
        found = st.lists(text, max_size=3).map(tuple)
    elif leaf.kind == "map":
        found = st.dictionaries(text, text, max_size=3)
    else:
        found = st.booleans() if leaf.kind == "bool" else text
    if leaf.auto:
        found |= st.just(0)
    return found | st.none() if leaf.optional else found


CONTRADICTING = {"objective.smoothing", "objective.hidden_share", "objective.whole_words", "objective.next_sentence",
                 "model.from", "model.grow_vocab", "train.batch_tokens", "train.adamw_learning_rate", "train.schedule", "train.patience"}


@given(st.fixed_dictionaries({}, optional={key: values_of(leaf) for key, leaf in config.leaves().items()
                                           if key not in CONTRADICTING and leaf.section not in ("finetune", "lora")}))
def test_what_is_written_is_read_back_equal(values: dict[str, Any]) -> None:
    recipe = Recipe().override({key: value for key, value in values.items() if not isinstance(value, str)})
    recipe = config.parse_recipe(config.dump(recipe))
    texts = {key: value for key, value in values.items() if isinstance(value, str) and value not in ("auto", "none")}
    recipe = recipe.override(texts)
    text = config.dump(recipe)
    assert config.parse_recipe(text) == recipe
    assert config.dump(config.parse_recipe(text)) == text
    assert {change.key for change in config.difference(Recipe(), recipe)} <= set(values)


@pytest.mark.parametrize("name", ["a b/rezept für alle.toml", "레시피.toml"])
def test_F21_recipes_with_unusual_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 3\r\nlrr = 1\r\n")
    with pytest.raises(ConfigError, match=r":3: unknown key `train\.lrr`") as caught:
        config.load_recipe(path)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize(("text", "line", "key", "meant"), [
    ("[train]\nsteps = 3\nlearning_rat = 1\n", 3, "train.learning_rat", "train.learning_rate"),
    ("[tran]\n\nlr = 1\n", 3, "tran.lr", "train.learning_rate"),
    ("[train]\nlrr = 1\n", 2, "train.lrr", "train.learning_rate"),
    ("train = { steps = 1, lrr = 1 }\n", 1, "train.lrr", "train.learning_rate"),
    ("steps = 1\n", 1, "steps", "train.steps"),
    ("[model]\nlearning_rate = 1\n", 2, "model.learning_rate", "train.learning_rate"),
    ("# train\n\n[train.steps]\nmany = 1\n", 3, "train.steps", ""),
    ('x = """\n[train]\nlrr = 1\n"""\n[model]\n"block_size" = 1\n', 1, "x", ""),
    ("[train]\nspike = [\n  1, # ]\n  { lrr = 1 }]\nbatch-size = 1\n", 5, "train.batch-size", "train.batch_tokens"),
    ("[[train]]\nsteps = 1\n", 1, "train", "[train]"),
    ("train.optim.muon.gammas = 1\n", 1, "train.optim.muon.gammas", ""),
])
def test_C01_unknown_keys_are_named_with_line_and_what_was_meant(text: str, line: int, key: str, meant: str) -> None:
    error = refused(text)
    assert f"recipe.toml:{line}: " in str(error)
    assert f"`{key}`" in str(error)
    assert f"did you mean `{meant}`?" in f"{error}{error.hint}" if meant else "did you mean" not in error.hint


def test_C01_an_unknown_option_says_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="unknown option `--train.learning_rat`") as caught:
        Recipe().override({"train.learning_rat": "1"})
    assert caught.value.hint == "did you mean `--train.learning_rate`?"


@pytest.mark.parametrize(("asked", "meant"), [("finetune.batch_size", "finetune.rows"), ("finetune.lr", "train.learning_rate"),
                                              ("objective.mlm_probability", "objective.hidden_share"), ("lora.r", "lora.rank"),
                                              ("finetune.label_smoothing", "finetune.flipped")])
def test_C01_an_option_under_its_name_elsewhere(asked: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option `--{asked}`") as caught:
        Recipe().override({"finetune.task": "dpo", "model.from": "x", asked: "1"})
    assert caught.value.hint == f"did you mean `--{meant}`?" and meant in leaves()


def test_C02_every_problem_is_told_at_once() -> None:
    error = refused('''
        [train]
        steps = "ten"
        seed = -1
        keep = 1
        spike = "ignore"
        budget = "3 parsecs"
        compile = 1
        batch_tokens = 10
        tokens = true
        clip = nan
        [model]
        context = 20
        grow_vocab = 5
        [data]
        paths = "x"
        columns = ["text"]
        val_fraction = 1
        colums = {}
    ''')
    found = str(error).splitlines()
    assert found[0] == "14 problems in `recipe.toml`:"
    assert len(found) == 15
    assert "  recipe.toml:3: `train.steps`: expected a whole number of at least 1, got `\"ten\"`" in found
    assert "  recipe.toml:4: `train.seed`: expected a whole number of at least 0, got `-1`" in found
    assert "  recipe.toml:6: `train.spike`: expected one of `log`, `skip`, `rollback`, got `\"ignore\"`" in found
    assert "  recipe.toml:9: `train.batch_tokens` 10 is less than a row of 20 tokens" in found
    assert "  recipe.toml:19: unknown key `data.colums` (did you mean `data.columns`?)" in found


@pytest.mark.parametrize("values", [
    {"train.optimizer": "adamw", "train.adamw_learning_rate": 1e-3},
    {"train.batch_tokens": 10, "model.context": 20},
    {"model.grow_vocab": 100},
    {"model.from": "gpt2", "model.size": "25M"},
    {"model.from": "gpt2", "tokenizer.kind_or_path": "char"},
    {"finetune.task": "classify", "model.from": "x", "lora.alpha": 8.0},
    {"finetune.task": "classify", "model.from": "x", "lora.targets": ("q_proj",)},
    {"finetune.task": "classify", "model.from": "x", "finetune.val": "y", "data.val_fraction": 0.2},
    {"finetune.task": "instruct", "model.from": "x", "finetune.freeze": 1, "finetune.add_tokens": ("<a>",)},
    {"train.patience": 3, "train.budget": 60.0},
])
def test_C02_values_that_contradict_each_other(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe().override(values)
    assert any(f"`{key}`" in str(caught.value) for key in values)


def test_C02_recipes_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="2 problems in the recipe"):
        Recipe(train=TrainOptions(steps=0), model=ModelOptions(context="many"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["x =", "[train", 'a = "', "[a]\n[a]", "a = [[[", "\x00", "a = 0x", "a = 3\n[a]\n"])
def test_what_is_no_toml_is_refused_with_its_line(text: str) -> None:
    assert "recipe.toml:" in str(refused(text))
    assert "not TOML" in str(refused(text))


def test_S09_recipes_are_bounded(tmp_path: Path) -> None:
    for text in ("a = " + "[" * 50_000, "a." * 5_000 + "a = 1", "[" + "a." * 5_000 + "a]", "a = " + "9" * 9_000,
                 "".join(f"k{i} = 1\n" for i in range(15_000)), "[train]\nsteps = " + "9" * 400):
        assert len(str(refused(text))) < 10_000
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (room.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than a recipe may be"):
        config.load_recipe(large)
    large.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        config.load_recipe(large)


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_recipes_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        config.load_recipe(tmp_path / name)


def test_surrogates_are_refused_since_no_file_can_hold_them() -> None:
    with pytest.raises(ConfigError, match=r"data\.paths"):
        Recipe().override({"data.paths": ["\udc80"]})


# ------------------------------------------------------------------------------------------ words

@pytest.mark.parametrize(("key", "words", "value"), [
    ("train.steps", "1_000", 1000), ("train.steps", "1.5k", 1500), ("train.steps", "none", None),
    ("train.tokens", "25M", 25_000_000), ("train.budget", "3min", 180.0), ("train.budget", "90", 90.0),
    ("train.learning_rate", "3e-4", 3e-4), ("train.learning_rate", "auto", 0.0), ("train.micro_batch", "auto", 0),
    ("train.compile", "yes", True), ("train.compile", "false", False), ("model.from", "", ""),
    ("data.paths", "a, b", ("a, b",)), ("data.paths", '["a", "b"]', ("a", "b")),
    ("data.columns", "text=question+answer, label=y", {"text": "question+answer", "label": "y"}),
])
def test_overrides_are_read_from_words(key: str, words: str, value: Any) -> None:
    assert Recipe().override({key: words}).flat()[key] == value


@pytest.mark.parametrize(("key", "words"), [
    ("train.steps", "1.5"), ("train.steps", ""), ("train.compile", "maybe"), ("train.clip", "inf"),
    ("train.seed", "none"),
    ("data.columns", "text"), ("data.columns", "{"), ("data.paths", "none"), ("train.until", "bored")])
def test_words_that_do_not_hold(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`: expected"):
        Recipe().override({key: words})


@pytest.mark.parametrize(("words", "seconds"), [
    ("90", 90.0), ("90s", 90.0), ("3min", 180.0), ("3 min", 180.0), ("1.5h", 5400.0), ("1h30min", 5400.0),
    ("2d", 172800.0), ("500ms", 0.5)])
def test_durations(words: str, seconds: float) -> None:
    assert config.parse_duration(words) == seconds


@pytest.mark.parametrize("words", ["", "min", "3 parsecs", "-3s", "1e3s", "3min later", "٣s", "1" * 50, "nan"])
def test_what_is_no_duration(words: str) -> None:
    with pytest.raises(ConfigError, match="is no duration"):
        config.parse_duration(words)


@pytest.mark.parametrize(("words", "count"), [
    ("0", 0), ("25M", 25_000_000), ("25_000_000", 25_000_000), ("1.5k", 1500), ("1e6", 10**6), ("0.5b", 5 * 10**8),
    ("-5", -5), ("7B", 7 * 10**9), ("1.5b", 1_500_000_000), ("300k", 300_000), ("1_000", 1000), (" 25 M ", 25_000_000),
    ("1_0.5k", 10_500), ("9" * 19, int("9" * 19))])
def test_counts(words: str, count: int) -> None:
    assert config.parse_count(words) == config.count_in(words) == count


@pytest.mark.parametrize("words", ["", "M", "1.5", "1.0001k", "1e999", "9" * 50, "0x10", "٣", "1 2", "nan", "1__0", "1_", "_1",
                                   "1_k", "9" * 20, "medium", "1.5.5", "--1"])
def test_what_is_no_count(words: str) -> None:
    assert config.count_in(words) is None
    with pytest.raises(ConfigError, match="is no whole number"):
        config.parse_count(words)


# ------------------------------------------------------------------------------------------ change and age

def test_C03_the_difference_names_each_leaf_and_whether_it_is_safe() -> None:
    old = Recipe().override({"train.steps": 10})
    new = old.override({"train.steps": 20, "train.learning_rate": 0.1, "model.from": "gpt2"})
    changes = config.difference(old, new)
    assert [(change.key, change.safe) for change in changes] == [
        ("model.from", False), ("train.steps", True), ("train.learning_rate", False)]
    assert str(changes[1]) == "`train.steps`: `10` -> `20`"
    assert config.difference(old, old) == []


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("v*.toml")), ids=lambda path: path.stem)
def test_C04_recipes_of_older_releases_load(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    told: list[str] = []
    recipe = config.load_recipe(path, warn=told.append)
    if path.stem == "v0.1":
        assert recipe.train.budget == 180.0
        assert recipe.train.tokens == 25_000_000
        assert recipe.data.columns == {"text": "question+answer"}
        assert told == [f"{path}:45: `train.sample_every` is no longer used: samples are written with each evaluation, see "
                        "`train.eval_every`"]
    else:
        assert told == []
    assert config.parse_recipe(config.dump(recipe)) == recipe


def test_C04_the_newest_fixture_names_every_option() -> None:
    """Whoever renames or drops an option must add a migration for it, or the fixture above no longer loads."""
    newest = max(FIXTURES.glob("v*.toml"), key=lambda path: tuple(map(int, path.stem[1:].split("."))))
    named = set(room.key_lines(newest.read_text()))
    assert {key for key in config.leaves() if tuple(key.split(".")) not in named} == set()


def test_C04_each_change_of_a_migration_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FORMAT_VERSION", 3)
    monkeypatch.setattr(room, "MIGRATIONS", {
        1: (("train.rate", "train.lr", "shorter"), ("train.magic", None, "it had no effect")),
        2: (("train.lr", "train.learning_rate", "words are not abbreviated"),)})
    told: list[str] = []
    recipe = config.parse_recipe("format_version = 1\n[train]\nrate = 0.5\nmagic = 1\n", "old.toml", warn=told.append)
    assert recipe.train.learning_rate == 0.5
    assert told == ["old.toml:3: `train.rate` is now `train.lr`: shorter",
                    "old.toml:4: `train.magic` is no longer used: it had no effect",
                    "old.toml:3: `train.lr` is now `train.learning_rate`: words are not abbreviated"]
    with pytest.warns(UserWarning, match=r"now `train\.learning_rate`"):
        config.parse_recipe("format_version = 2\n[train]\nlr = 0.5\n")
    with pytest.raises(ConfigError, match=r"unknown key `train\.lr`"):
        config.parse_recipe("format_version = 3\n[train]\nlr = 0.5\n")


@pytest.mark.parametrize("version", ["3", "0", '"1"', "true", "1.0"])
def test_C04_files_of_a_newer_release_are_refused(version: str) -> None:
    assert "`format_version`" in str(refused(f"format_version = {version}\n"))
