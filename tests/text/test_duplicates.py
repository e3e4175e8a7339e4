"""Near duplicates: what is similar is found, what is not stays, and nothing depends on the process."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from threefold.text import duplicates
from threefold.text.duplicates import Duplicates, NearDuplicates, shingles, similarity, word_hashes

VOCABULARY = [f"word{i}" for i in range(2000)]


def words(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(count)]


def jaccard(a: list[str], b: list[str]) -> float:
    left, right = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b))
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("length", [60, 200, 2000])
def test_similar_texts_are_found_and_others_stay(length: int) -> None:
    rng = random.Random(length)
    found = missed = wrong = clear = 0
    for _ in range(60):
        original = words(rng, length)
        changed = list(original)
        for place in rng.sample(range(length), rng.randrange(0, max(2, length // 15))):
            changed[place] = "changed"
        known = NearDuplicates()
        assert not known.seen(" ".join(original))
        truth = jaccard(original, changed)
        verdict = known.seen(" ".join(changed))
        if truth >= 0.88:
            found, missed = found + verdict, missed + (not verdict)
        elif truth < 0.7:
            wrong, clear = wrong + verdict, clear + (not verdict)
    assert found >= 8 and missed <= 1
    assert clear >= 8 and wrong <= 1


def test_the_estimate_agrees_with_the_definition() -> None:
    rng = random.Random(5)
    for length, tolerance in (
        (100, 1e-9),
        (1500, 0.13),
    ):  # exact while a sketch holds all runs of words, else 3.5 standard errors
        a = words(rng, length)
        b = a[: length * 9 // 10] + words(rng, length // 10)
        assert abs(similarity(shingles(" ".join(a))[:128], shingles(" ".join(b))[:128]) - jaccard(a, b)) <= tolerance


def test_case_punctuation_and_spacing_are_not_looked_at() -> None:
    text = words(random.Random(1), 80)
    known = NearDuplicates()
    assert not known.seen(" ".join(text))
    assert known.seen(",\n ".join(word.upper() for word in text) + "!")


def test_texts_of_fewer_than_fifty_words_are_never_near_duplicates() -> None:
    text = words(random.Random(2), 49)
    known = Duplicates()
    assert known.check("first") is None
    assert known.check(" ".join(text)) is None
    assert known.check(" ".join(text[:-1]) + " other") is None
    longer = [*text, "fifty"]
    assert known.check(" ".join(longer)) is None
    assert known.check(" ".join(longer) + " more") == "near duplicate"


def test_a_corpus_of_one_document_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(text: str) -> None:
        raise AssertionError("the only document was hashed")

    monkeypatch.setattr(duplicates, "shingles", never)
    assert Duplicates().check("word " * 100_000) is None


def test_equal_words_have_equal_hashes_wherever_they_stand() -> None:
    hashes = word_hashes("영화 abc, 영화\nABC abc. x " + "y" * 5000 + " abc")
    assert hashes[0] == hashes[2] and len({hashes[i] for i in (1, 3, 4, 7)}) == 1
    assert len(set(hashes.tolist())) == 4


def test_many_documents_keep_their_places_when_the_table_grows() -> None:
    rng = random.Random(7)
    texts = [" ".join(words(rng, 55)) for _ in range(400)]
    known = NearDuplicates()
    assert not any(known.seen(text) for text in texts)
    assert all(known.seen(text) for text in texts)


def test_the_outcome_is_the_same_in_every_process() -> None:
    code = (
        "from threefold.text.duplicates import shingles; import hashlib;"
        "print(hashlib.sha256(shingles(' '.join(f'w{i % 70}' for i in range(300))).tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
