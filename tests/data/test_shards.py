"""Preparing, opening, verifying: the same bytes each time, and no damage or change that goes unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.helpers import Codes
from threefold import files
from threefold.data import manifest as manifests
from threefold.data import shards as room
from threefold.data.corpus import content_hash, validation_of
from threefold.data.loader import Loader
from threefold.data.shards import Shards, ensure, prepare, summary
from threefold.errors import ConfigError, DamagedData, DataError, DiskError, TokenizerError, UsageError
from threefold.text.sources import Source

TEXTS = [f"document number {i}, " + "word " * (i % 7) for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl file of forty documents."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def make(out: Path, *paths: Path, shares: tuple[float, ...] = (), **settings: Any) -> Shards:
    """Prepare some files with a small tokenizer."""
    sources = [Source(str(path), shares[i] if shares else None) for i, path in enumerate(paths)]
    settings = {"near_duplicates": False, **settings}
    return prepare(sources, settings.pop("tokenizer", Codes()), out, **settings)


def texts_of(shards: Shards, split: str) -> list[str]:
    """The texts of a split, from its ids."""
    return ["".join(map(chr, ids[1:-1])) for ids in shards.documents(split)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is in it


def test_documents_come_back_in_order_and_counted(tmp_path: Path, corpus: Path) -> None:
    shards = make(tmp_path / "data", corpus)
    side = validation_of([content_hash(text.encode()) for text in TEXTS], [len(text) for text in TEXTS], 0.1)
    for split, wanted in (("train", False), ("validation", True)):
        texts = [text for text, s in zip(TEXTS, side, strict=True) if s == wanted]
        assert texts_of(shards, split) == texts
        count = shards.count(split)
        assert vars(count) == {"documents": len(texts), "tokens": sum(len(t) + 2 for t in texts),
                               "characters": sum(map(len, texts)), "bytes": sum(len(t.encode()) for t in texts)}
    assert sorted(path.name for path in shards.directory.iterdir()) == [
        "0-train-00000.ids", "0-train.docs", "0-validation-00000.ids", "0-validation.docs", "manifest.json",
        "tokenizer"]
    starts = np.fromfile(shards.directory / "0-train.docs", dtype="<u8")
    assert starts[:2].tolist() == [0, len(texts_of(shards, "train")[0]) + 2]


def test_a_single_document_is_cut_by_character(tmp_path: Path) -> None:
    text = "First line.\n\nSecond line, with ünïcode.\n" * 9
    (tmp_path / "one.txt").write_text(text)
    shards = make(tmp_path / "data", tmp_path / "one.txt", val_fraction=0.3)
    place = int((1 - 0.3) * len(text))
    assert (texts_of(shards, "train"), texts_of(shards, "validation")) == ([text[:place]], [text[place:]])
    assert shards.count("validation").bytes == len(text[place:].encode())


def test_files_of_a_few_tokens_hold_the_same_stream(tmp_path: Path, corpus: Path) -> None:
    whole, cut = make(tmp_path / "whole", corpus), make(tmp_path / "cut", corpus, shard_tokens=100)
    assert texts_of(whole, "train") == texts_of(cut, "train")
    assert len(cut.tokens("train")) == len(cut.stream("train")) // 100 + 1
    assert whole.fingerprint == cut.fingerprint
    a, b = Loader(whole, 16, 4, 0).batch(3), Loader(cut, 16, 4, 0).batch(3)
    assert a.input_ids.equal(b.input_ids) and a.labels.equal(b.labels)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_16_bits_where_they_can(tmp_path: Path, corpus: Path, vocab_size: int, dtype: str) -> None:
    shards = make(tmp_path / "data", corpus, tokenizer=Codes(vocab_size))
    assert {str(array.dtype) for array in shards.tokens("train")} == {dtype}
    assert sorted(texts_of(shards, "train") + texts_of(shards, "validation")) == sorted(TEXTS)


def test_sources_keep_their_own_streams_and_shares(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "one.txt").write_text("alone " * 50)
    shards = make(tmp_path / "data", corpus, tmp_path / "one.txt", shares=(0.75, 0.25))
    assert [(s.name, s.share, s.train.documents, s.validation.documents > 0) for s in shards.sources] == [
        (str(corpus), 0.75, 35, True), (str(tmp_path / "one.txt"), 0.25, 1, True)]
    batch = Loader(shards, 8, 10_000, 0).batch(0)
    assert np.bincount(batch.sources).tolist() == [7500, 2500]


def test_the_summary_is_plain_data(tmp_path: Path, corpus: Path) -> None:
    said = summary(make(tmp_path / "data", corpus))
    assert json.loads(json.dumps(said)) == said
    assert said["train"]["documents"] + said["validation"]["documents"] == 40 and said["sources"][0]["files"] == 1


def test_nothing_is_written_but_through_the_seam(tmp_path: Path, corpus: Path) -> None:
    written: set[str] = set()
    with files.observed(lambda kind, path, *rest: written.add(Path(path).name) if kind == "open" else None):
        shards = make(tmp_path / "data", corpus)
    assert {path.name for path in shards.directory.rglob("*") if path.is_file()} <= written


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_validation_fraction_out_of_range(tmp_path: Path, corpus: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="validation fraction"):
        make(tmp_path / "data", corpus, val_fraction=fraction)


def test_a_folder_that_is_something_else_is_not_replaced(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for out, what in ((tmp_path / "home", r"holds `letter\.txt`, which would be lost"), (corpus, "is not a folder")):
        with pytest.raises(UsageError, match=what):
            make(out, corpus)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear" and corpus.exists()
    make(tmp_path / "data", corpus)
    assert make(tmp_path / "data", corpus).count("train").documents == 35            # a shard folder is
    (tmp_path / "data" / "letter.txt").write_text("dear")                             # and not with the files of others
    with pytest.raises(UsageError, match=r"holds `letter\.txt`, which"):
        make(tmp_path / "data", corpus)


def test_a_manifest_of_somebody_else_makes_no_shard_folder(tmp_path: Path, corpus: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for said in ('{"name": "an extension", "version": 3}', "[]", "{torn", "\x00"):
        (site / "manifest.json").write_text(said)
        assert not room.is_prepared(site)
        for action in (lambda: make(site, corpus), lambda: ensure([Source(str(corpus), None)], Codes(), site)):
            with pytest.raises(UsageError, match=r"holds `manifest\.json`, which would be lost"):
                action()
        assert (site / "manifest.json").read_text() == said
    assert not room.is_prepared(tmp_path / "nowhere") and not room.is_prepared(corpus)


def test_a_damaged_shard_folder_is_still_one(tmp_path: Path, corpus: Path) -> None:
    out = make(tmp_path / "data", corpus).directory
    assert room.is_prepared(out) and room.is_prepared(str(out))
    whole = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(whole[:50])
    assert room.is_prepared(out)
    (out / "manifest.json").write_text(whole)
    for path in out.glob("*.ids"):
        path.unlink()
    assert room.is_prepared(out)
    assert make(out, corpus).verify() == []


@pytest.mark.parametrize("name", ["with space", "자료", "x" * 255])
def test_F21_names_of_folders(tmp_path: Path, corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(Path(name), corpus).verify() == []
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert Shards.open(tmp_path / "link").count("train").documents == 35


def test_F21_a_name_that_is_too_long_is_refused_with_a_hint(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DiskError) as caught:
        make(tmp_path / ("x" * 256), corpus)
    assert "255 bytes" in caught.value.hint


# Damage


def damaged(folder: Path, name: str, how: str) -> None:
    """Damage one file of a shard folder."""
    path = folder / name
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 4
    elif how == "truncated":
        del data[-2:]
    elif how == "longer":
        data += b"\0\0"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("/etc/hostname")
    elif how != "missing":
        path.write_bytes(data)


NAMES = ["0-train-00000.ids", "0-train.docs", "0-validation-00000.ids", "0-validation.docs", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("how", ["bit", "truncated", "longer", "missing", "folder", "link"])
def test_D01_a_damaged_file_is_named(tmp_path: Path, corpus: Path, how: str) -> None:
    make(tmp_path / "data", corpus)
    for name in NAMES:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "data", copy)
        opened = Shards.open(copy)
        damaged(copy, name, how)
        problems = opened.verify()
        assert len(problems) == 1 and f"`{name}`" in problems[0]
        if how in ("bit", "truncated", "longer"):
            entry = opened.manifest.files[name]
            assert entry.sha256 in problems[0] and files.sha256(copy / name) in problems[0]
        with pytest.raises(DamagedData, match=re.escape(name)):
            Shards.open(copy, verify=True)
        if how != "bit":
            with pytest.raises(DamagedData, match=re.escape(name)):
                Shards.open(copy)
        shutil.rmtree(copy)


def test_D01_swapped_files_and_all_damage_at_once(tmp_path: Path, corpus: Path) -> None:
    shards = make(tmp_path / "data", corpus, shard_tokens=100)
    a, b = shards.directory / "0-train-00001.ids", shards.directory / "0-train-00003.ids"
    content_a, content_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(content_b)
    b.write_bytes(content_a)
    damaged(shards.directory, "0-validation.docs", "bit")
    with pytest.raises(DamagedData) as caught:
        Shards.open(shards.directory, verify=True)
    assert all(name in str(caught.value) for name in (a.name, b.name, "0-validation.docs"))
    assert caught.value.exit_code == 3
    assert [re.findall("`(.*?)`", line)[0] for line in shards.verify()] == [a.name, b.name, "0-validation.docs"]


def test_D01_any_flipped_bit_of_the_manifest_is_seen(tmp_path: Path, corpus: Path) -> None:
    folder = make(tmp_path / "data", corpus).directory
    data = (folder / "manifest.json").read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(data), 150):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        (folder / "manifest.json").write_bytes(changed)
        with pytest.raises(DataError):
            Shards.open(folder)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_D01_a_torn_or_missing_manifest(tmp_path: Path, corpus: Path, length: int) -> None:
    folder = make(tmp_path / "data", corpus).directory
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:length])
    with pytest.raises(DamagedData, match=r"manifest\.json"):
        Shards.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedData, match=r"has no `manifest\.json`"):
        Shards.open(folder)
    with pytest.raises(DamagedData, match="is not a folder"):
        Shards.open(tmp_path / "nowhere")


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a hash that fits, as a newer version or a forger would."""
    said = json.loads((folder / "manifest.json").read_text())
    said.pop("self")
    change(said)
    said["self"] = manifests._digest(said)
    (folder / "manifest.json").write_text(json.dumps(said))


def test_a_manifest_of_a_newer_version_asks_for_an_upgrade(tmp_path: Path, corpus: Path) -> None:
    folder = make(tmp_path / "data", corpus).directory
    rewritten(folder, lambda said: said.update(version=2, something="new"))
    with pytest.raises(DataError, match="format version 2") as caught:
        Shards.open(folder)
    assert "upgrade" in caught.value.hint and caught.value.exit_code == 1


@pytest.mark.parametrize("change", [
    lambda said: said["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}),
    lambda said: said["files"].update({"tokenizer/../../x": {"size": 1, "sha256": ""}}),
    lambda said: said["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
    lambda said: said["files"].pop("0-train.docs"),
    lambda said: said["sources"][0]["train"].update(tokens=10**12),
    lambda said: said["sources"][0].pop("train"),
    lambda said: said.update(unknown=1),
    lambda said: said.update(dtype="O"),
    lambda said: said.update(shard_tokens=0),
    lambda said: said.update(sources=7),
])
def test_a_forged_manifest_is_refused(tmp_path: Path, corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    folder = make(tmp_path / "data", corpus).directory
    rewritten(folder, change)
    with pytest.raises(DamagedData):
        Shards.open(folder)


# Changes


def test_D04_edited_data_is_an_error_and_accepting_it_is_recorded(tmp_path: Path, corpus: Path) -> None:
    sources, out = [Source(str(corpus), None)], tmp_path / "data"
    first = ensure(sources, Codes(), out, near_duplicates=False)
    before = content(out)
    os.utime(corpus, (1, 1))                # touched, and the content is the same
    assert ensure(sources, Codes(), out, near_duplicates=False).fingerprint == first.fingerprint
    assert content(out) == before
    with corpus.open("a") as file:
        file.write('{"text": "a row more"}\n')
    size = corpus.stat().st_size
    changes = [f"`{corpus}` has changed from {size - 23} to {size} bytes"]
    assert first.changes(sources) == changes
    with pytest.raises(DataError, match="has changed") as caught:
        ensure(sources, Codes(), out, near_duplicates=False)
    assert "--accept-new-data" in caught.value.hint and content(out) == before
    second = ensure(sources, Codes(), out, near_duplicates=False, accept_new_data=True)
    assert second.fingerprint != first.fingerprint
    assert second.manifest.accepted == [{"was": first.fingerprint, "changes": changes}]


def test_D04_one_letter_a_new_file_a_lost_file_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the text of {name}")
    shards = make(tmp_path / "data", folder)
    sources = [Source(str(folder), None)]
    assert shards.changes(sources) == []
    (folder / "a.txt").write_text("the text of A")
    (folder / "b.txt").unlink()
    (folder / "d.txt").write_text("another")
    a, b, d = shards.changes(sources)
    assert "a.txt` has changed from" in a and "b.txt` is gone" in b and "d.txt` is new" in d
    assert "the sources were" in shards.changes([Source(str(folder), 0.5)])[0]
    with pytest.raises(DataError, match=r"`val_fraction` was 0\.1 and is 0\.2"):
        ensure(sources, Codes(), tmp_path / "data", near_duplicates=False, val_fraction=0.2)


@pytest.mark.parametrize("what", ["file", "folder", "emptied folder", "glob"])
def test_D04_the_text_may_be_gone_once_it_is_in_verified_shards(tmp_path: Path, corpus: Path, what: str) -> None:
    folder, out = tmp_path / "texts", tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"the text of {name}")
    path = {"file": folder / "a.txt", "glob": folder / "*.txt"}.get(what, folder)
    sources = [Source(str(corpus), None), Source(str(path), None)]
    first = ensure(sources, Codes(), out, near_duplicates=False)
    before = content(out)
    shutil.rmtree(folder)
    if what == "emptied folder":
        folder.mkdir()
    told: list[str] = []
    for accept in (False, True):
        again = ensure(sources, Codes(), out, near_duplicates=False, note=told.append, accept_new_data=accept)
        assert again.fingerprint == first.fingerprint and content(out) == before
    assert told == [f"`{path}` is not there any more; `{out}` was prepared from it and is whole, so it is used"] * 2
    assert first.gone(sources) == sources[1:] and first.changes(sources) == []
    with corpus.open("a") as file:                          # what has changed is refused, also where something is gone
        file.write('{"text": "a row more"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl` has changed"):
        ensure(sources, Codes(), out, near_duplicates=False)
    with pytest.raises(DataError, match="there is no|holds no|no file matches"):
        ensure(sources, Codes(), out, near_duplicates=False, accept_new_data=True)
    with pytest.raises(DataError, match="the sources were"):
        ensure([sources[1]], Codes(), out, near_duplicates=False)
    assert content(out) == before


def test_D04_damaged_shards_do_not_stand_for_a_text_that_is_gone(tmp_path: Path, corpus: Path) -> None:
    sources, out = [Source(str(corpus), None)], tmp_path / "data"
    ensure(sources, Codes(), out, near_duplicates=False)
    corpus.unlink()
    path = next(out.glob("*.ids"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedData):
        ensure(sources, Codes(), out, near_duplicates=False)


def test_D04_a_text_that_cannot_be_read_is_not_gone(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from threefold.text import sources as text

    sources, out = [Source(str(corpus), None)], tmp_path / "data"
    ensure(sources, Codes(), out, near_duplicates=False)

    def denied(path: str) -> list[Path]:
        raise DataError(f"cannot read `{path}`: permission denied") from PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(text, "expand", denied)
    with pytest.raises(DataError, match="permission denied"):
        ensure(sources, Codes(), out, near_duplicates=False)


def test_D04_large_files_are_known_by_size_and_time(tmp_path: Path, corpus: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "HASHED_BELOW", 10)
    shards = make(tmp_path / "data", corpus)
    assert shards.changes([Source(str(corpus), None)]) == []
    os.utime(corpus, (1, 1))
    assert "has changed from changed" in shards.changes([Source(str(corpus), None)])[0]


def test_D05_another_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    shards = make(tmp_path / "data", corpus)
    shards.check_tokenizer(Codes().fingerprint)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        shards.check_tokenizer(Codes(70_000).fingerprint)
    for accept in (False, True):
        with pytest.raises(TokenizerError, match="codes-65536"):
            ensure([Source(str(corpus), None)], Codes(70_000), shards.directory, near_duplicates=False,
                   accept_new_data=accept)


# Small data and duplicates


def test_D08_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError):
        make(tmp_path / "data", tmp_path / "short.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        make(tmp_path / "data", tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no data was named"):
        make(tmp_path / "data")
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob(".tmp-*"))


def test_D08_no_validation_when_none_is_asked_for(tmp_path: Path, corpus: Path) -> None:
    shards = make(tmp_path / "data", corpus, val_fraction=0)
    assert shards.count("validation").documents == 0 and shards.count("train").documents == 40
    assert not list(shards.directory.glob("0-validation*"))


def test_D10_no_document_on_both_sides_and_duplicates_counted(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        for text in TEXTS[::2]:
            file.write(json.dumps({"text": text}) + "\n")
    shutil.copy(corpus, tmp_path / "again.jsonl")
    shards = make(tmp_path / "data", corpus, tmp_path / "again.jsonl", val_fraction=0.4)
    train, validation = texts_of(shards, "train"), texts_of(shards, "validation")
    assert not set(train) & set(validation) and sorted(train + validation) == sorted(TEXTS)
    assert shards.manifest.report["overlap"] == 0
    assert shards.manifest.report["cleaning"]["dropped"] == {"exact duplicate": 20 + 60}


def test_D10_nearly_equal_documents_are_dropped_too(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(80)]
    texts = [" ".join(words), " ".join([*words[:79], "other"]), "something else entirely " * 20]
    path = tmp_path / "near.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = make(tmp_path / "data", path, near_duplicates=True)
    assert shards.manifest.report["cleaning"]["dropped"] == {"near duplicate": 1}
    assert shards.count("train").documents + shards.count("validation").documents == 2


def by_the_rule(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(train, validation) as the interface words it: one text is cut at int((1 - fraction) n) characters; of several,
    validation takes them in order of the SHA-256 of their text until `fraction` of the characters is reached: at least
    one, never all."""
    if fraction == 0:
        return texts, []
    if len(texts) == 1:
        place = int((1 - fraction) * len(texts[0]))
        return [texts[0][:place]], [texts[0][place:]]
    taken: list[str] = []
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:-1]:
        if sum(map(len, taken)) < fraction * sum(map(len, texts)):
            taken.append(text)
    return [text for text in texts if text not in taken], [text for text in texts if text in taken]


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.0])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_split_is_the_one_of_the_interface(tmp_path: Path, count: int, fraction: float) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count]))
    shards = make(tmp_path / "data", path, val_fraction=fraction)
    assert (texts_of(shards, "train"), texts_of(shards, "validation")) == by_the_rule(TEXTS[:count], fraction)


def test_shakespeare_is_split_as_everybody_splits_it(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    shards = make(tmp_path / "data", shared_data("shakespeare/input.txt"))
    assert (shards.count("train").characters, shards.count("validation").characters) == (1_003_854, 111_540)


def test_D06_what_does_not_fit_is_an_error_or_counted(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write('{"txt": "misspelt"}\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:41"):
        make(tmp_path / "data", corpus)
    shards = make(tmp_path / "data", corpus, skip_problems=True)
    assert sum(found["count"] for found in shards.manifest.report["passed_over"].values()) == 2
    assert shards.count("train").documents + shards.count("validation").documents == 40


def test_D06_what_is_empty_is_no_error_and_counted(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write('{"text": ""}\n{"text": " \\n"}\n')
    report = make(tmp_path / "data", corpus).manifest.report["passed_over"]
    assert {reason: found["count"] for reason, found in report.items()} == {"empty text": 2}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        make(tmp_path / "data", tmp_path / "nowhere.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="broken"):
        make(tmp_path / "data", tmp_path / "folder")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a plain file"):
        make(tmp_path / "data", tmp_path / "pipe")


# Killed and refused


def forked(action: Callable[[], object]) -> int:
    """Run in a fork; the exit code: 0 for a normal end, 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def operations(action: Callable[[], object]) -> int:
    """How many low-level operations an action makes."""
    seen: list[str] = []
    with files.observed(lambda kind, *rest: seen.append(kind)):
        action()
    return len(seen)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A corpus of a few documents, in files of a few tokens: every kind of operation, and few of them."""
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:6]))
    yield path


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_D09_killed_at_any_operation_the_next_run_gives_the_same(tmp_path: Path, small: Path, stride: int) -> None:
    reference = content(make(tmp_path / "reference", small, shard_tokens=60).directory)
    count = operations(lambda: make(tmp_path / "counted", small, shard_tokens=60))
    out = tmp_path / "there" / "data"
    for n in range(1, count + 1, stride):
        def killed(n: int = n) -> None:
            files._crash_at, files._count = n, 0
            make(out, small, shard_tokens=60)

        assert forked(killed) == 137
        if out.exists():
            assert content(out) == reference                # killed after the rename: it is all there
        else:
            with pytest.raises(DamagedData):
                Shards.open(out)
        assert content(make(out, small, shard_tokens=60).directory) == reference
        assert sorted(path.name for path in out.parent.iterdir()) == ["data"]
        shutil.rmtree(out.parent)
    assert count > 20


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_D09_killed_while_replacing_an_older_folder(tmp_path: Path, small: Path, corpus: Path, stride: int) -> None:
    reference = content(make(tmp_path / "reference", small).directory)
    old = content(make(tmp_path / "old", corpus).directory)
    shutil.copytree(tmp_path / "old", tmp_path / "data")
    count = operations(lambda: make(tmp_path / "data", small))
    for n in range(2, count + 1, stride):
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(tmp_path / "old", tmp_path / "data")

        def killed(n: int = n) -> None:
            files._crash_at, files._count = n, 0
            make(tmp_path / "data", small)

        assert forked(killed) == 137
        files.clean_leftovers(tmp_path)
        assert content(tmp_path / "data") in (old, reference), "between the two renames the old one gets its name back"
        assert content(make(tmp_path / "data", small).directory) == reference
    assert not [*tmp_path.glob(".t*-data-*"), *tmp_path.glob(".replaced*")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_F04_a_refused_operation_is_reported_and_leaves_nothing(tmp_path: Path, small: Path, code: int) -> None:
    count = operations(lambda: make(tmp_path / "counted", small))
    for n in range(1, count - 1):                       # after the rename only the sync of the parent is left
        seen = 0

        def refuse(kind: str, path: str, *rest: object, n: int = n) -> None:
            nonlocal seen
            seen += 1
            if seen == n:
                raise OSError(code, os.strerror(code))

        with files.observed(refuse), pytest.raises(DiskError):
            make(tmp_path / "data", small)
        if (tmp_path / "data").exists():
            Shards.open(tmp_path / "data", verify=True)
        assert not list(tmp_path.glob(".tmp-data-*"))
        shutil.rmtree(tmp_path / "data", ignore_errors=True)


def test_R03_an_open_folder_needs_no_file_descriptors(tmp_path: Path, corpus: Path) -> None:
    shards = make(tmp_path / "data", corpus, shard_tokens=100)

    def read_all() -> None:
        opened = Shards.open(shards.directory)
        loader = Loader(opened, 16, 4, 0)
        loader.batch(0)  # NumPy loads a part of itself with the first one
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
        for fd in range(highest + 1):
            try:
                os.fstat(fd)
            except OSError:
                os.dup2(0, fd)
        with pytest.raises(OSError):
            os.open("/dev/null", os.O_RDONLY)
        assert len([batch for _, batch in loader.follow(range(loader.epoch_steps), workers=2)]) == loader.epoch_steps

    assert forked(read_all) == 0
