"""D11 under every objective and family, from text to labels: what is read begins once and ends once, the end of a text is
learnt, and what fills a row is not, also where one token does all of it."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.objectives.conftest import CONTEXT, PAIRS, WAYS
from tests.text.helpers import ENGLISH, KOREAN
from threefold.config import Recipe
from threefold.data.loader import IGNORED, Batch, Loader
from threefold.data.shards import Shards, prepare
from threefold.model.families import FAMILIES
from threefold.objectives import OBJECTIVES, Masked, Objective, Vocabulary
from threefold.text.sources import parse_source
from threefold.text.tokenizer import Tokenizer

pairs = pytest.mark.parametrize("pair", PAIRS)
TEXTS = [" ".join(line.split()[:n + 1]) for text in (ENGLISH, KOREAN) for line in text.split("\n") for n in range(1, 9)]


@functools.cache
def tokenizer_of(kind: str, objective: str) -> Tokenizer:
    """As a run trains it for a family's kind and an objective."""
    learns = OBJECTIVES[objective]
    return Tokenizer.train(kind, TEXTS, 700, special=learns.special, roles={} if kind == "wordpiece" else learns.roles)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def made(pair: str, folder: Path) -> tuple[Tokenizer, Objective, Shards]:
    """Shards of short texts under the tokenizer of a family's kind, and the objective over its vocabulary."""
    way = pair.removesuffix(f"-{PAIRS[pair].family}")
    objective, kind = str(WAYS[way].options["train.objective"]), FAMILIES[PAIRS[pair].family].tokenizer
    tokenizer = tokenizer_of(kind, objective)
    out = folder / f"{kind}-{objective}"
    if not out.is_dir():
        prepare([parse_source(str(folder / "texts.jsonl"))], tokenizer, out, val_fraction=0.1, near_duplicates=False)
    recipe = Recipe().override(WAYS[way].options)
    task = OBJECTIVES[objective].task(recipe, FAMILIES[PAIRS[pair].family])
    return tokenizer, WAYS[way].make(Vocabulary.of(tokenizer), task), Shards.open(out)


def epoch(objective: Objective, shards: Shards, times: int = 1) -> list[Batch]:
    """Each sample of an epoch (or of several) once, in a batch of its own."""
    loader = Loader(shards, objective.span(CONTEXT), 1, 0, example=objective.example)
    return [loader.batch(step) for step in range(times * loader.epoch_steps)]


def read(batch: Batch) -> list[int]:
    """What is read of the one row, without what fills it."""
    length = None if batch.attention_mask is None else int(batch.attention_mask.sum())
    return [int(number) for number in batch.input_ids[0, :length]]


FRAMED = [name for name in PAIRS if name.split("-")[0] in ("masked", "words", "replaced")]
WRITTEN = [name for name in PAIRS if "seq2seq" in FAMILIES[PAIRS[name].family].heads]
CAUSAL = [name for name in PAIRS if name.startswith("causal")]


@pytest.mark.parametrize("pair", FRAMED)
def test_D11_each_text_of_a_row_begins_once_and_ends_once(pair: str, folder: Path) -> None:
    """Whether the row begins and ends where a text does or in its middle."""
    tokenizer, objective, shards = made(pair, folder)
    cls, sep = tokenizer.token_id("cls"), tokenizer.token_id("sep")
    assert (cls, sep) == (tokenizer.bos_id, tokenizer.eos_id) and cls != sep, "what frames a document is what frames a row"
    whole = unended = 0
    for batch in epoch(objective, shards, 4):
        ids = np.asarray(read(batch))
        numbers = np.zeros(len(ids)) if batch.documents is None else batch.documents[0, :len(ids)].numpy()
        for number in np.unique(numbers):
            text = ids[numbers == number].tolist()
            assert text[0] == cls and text.count(cls) == 1, tokenizer.decode(ids, False)
            assert text.count(sep) == (text[-1] == sep), tokenizer.decode(ids, False)
            unended += text[-1] != sep
        assert not {cls, sep} & set(batch.labels[0].tolist())
        whole += len(ids) < CONTEXT
    assert whole > 3, "of some rows a text begins or ends with the row"
    assert unended <= 4, "the last token of all has nothing behind it, and is in no row of its epoch"


def test_D11_a_pair_begins_once_and_each_half_ends_once(folder: Path) -> None:
    _, objective, shards = made("pairs-bert", folder)
    assert isinstance(objective, Masked)
    for batch in epoch(objective, shards):
        ids = read(batch)
        places = [place for place, number in enumerate(ids) if number == objective.sep]
        assert ids[0] == objective.cls and ids.count(objective.cls) == 1 and len(places) == 2 and places[-1] == len(ids) - 1
        assert batch.types is not None and batch.types[0, :len(ids)].tolist() == [0] * (places[0] + 1) + [1] * (len(ids) - places[0] - 1)


@pytest.mark.parametrize("pair", WRITTEN)
def test_D11_both_sides_end_once_and_the_end_is_learnt(pair: str, folder: Path) -> None:
    tokenizer, objective, shards = made(pair, folder)
    end, pad = tokenizer.eos_id, tokenizer.pad_id
    ends = 0
    for batch in epoch(objective, shards):
        for side in (read(batch), [int(label) for label in batch.labels[0] if label != IGNORED]):
            assert side[-1] == end and (len(side) == 1 or side[-2] != end), tokenizer.decode(side, False)
            assert pad not in side
            ends += side.count(end)
    assert ends > 2 * len(epoch(objective, shards)), "a text that ends in a row has its end there too"


@pytest.mark.parametrize("pair", CAUSAL)
def test_D11_every_end_is_learnt_and_no_filling(pair: str, folder: Path) -> None:
    """Also where one token begins, ends and fills: in an epoch every token but the first of each text is asked for, once."""
    tokenizer, objective, shards = made(pair, folder)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id
    asked: Counter[int] = Counter()
    for batch in epoch(objective, shards):
        asked += Counter(batch.labels[batch.labels != IGNORED].tolist())
    stream = shards.stream("train", 0)
    ids = stream.take(np.arange(len(stream)))
    assert asked == Counter(np.delete(ids, stream.starts).tolist())
    assert asked[tokenizer.eos_id or 0] == shards.count("train").documents
