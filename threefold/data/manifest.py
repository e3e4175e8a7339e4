"""The manifest of a shard folder: what it holds, from what it was made, and the hash of every file.

    DIR/manifest.json              written last; a folder without it is not a shard folder
    DIR/0-train-00000.ids          ids of source 0, little endian, 16 bits where the vocabulary allows, else 32
    DIR/0-train.docs               where each document starts in them, 64 bits
    DIR/0-validation-00000.ids     ...
    DIR/tokenizer/                 the tokenizer that made the ids

Decisions:
- The names of the files follow from the counts, so a manifest cannot point outside of its folder.
- It carries its own hash: a flipped bit in a count is damage, as it is in a token.
- Nothing in it depends on when or where it was made, so the same preparation gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold import files
from threefold.errors import DamagedData, DataError
from threefold.strict_json import read_json

NAME = "manifest.json"
VERSION = 1
SPLITS = ("train", "validation")
SIZE_LIMIT = 2**28


@dataclass(frozen=True)
class Part:
    """How much one split of one source holds; `bytes` is the length of its text in UTF-8."""

    documents: int
    tokens: int
    characters: int
    bytes: int


@dataclass(frozen=True)
class SourceEntry:
    """One source: what it was called, its share of a mixture, its files as (path, size, hash or time), its parts."""

    name: str
    share: float | None
    files: list[tuple[str, int, str]]
    train: Part
    validation: Part

    def part(self, split: str) -> Part:
        """The part of a split, `train` or `validation`."""
        return self.train if split == "train" else self.validation


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `fingerprint` is a hash over the hashes of all documents, in order."""

    version: int
    dtype: str
    shard_tokens: int
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    tokenizer: str
    preparation: dict[str, Any]
    preparation_hash: str
    sources: list[SourceEntry]
    report: dict[str, Any]
    fingerprint: str
    accepted: list[dict[str, Any]]
    files: dict[str, FileEntry]


def shard_names(source: int, split: str, part: Part, shard_tokens: int) -> list[str]:
    """The names of the `.ids` files of one part, in order; none for an empty one."""
    return [f"{source}-{split}-{number:05d}.ids" for number in range(-(-part.tokens // shard_tokens))]


def docs_name(source: int, split: str) -> str:
    """The name of the document index of one part."""
    return f"{source}-{split}.docs"


def expected_sizes(manifest: Manifest) -> dict[str, int]:
    """The size in bytes of every shard file, as the counts have it."""
    width = 2 if manifest.dtype == "<u2" else 4
    sizes = {}
    for index, source in enumerate(manifest.sources):
        for split in SPLITS:
            part, left = source.part(split), source.part(split).tokens
            for name in shard_names(index, split, part, manifest.shard_tokens):
                sizes[name] = min(left, manifest.shard_tokens) * width
                left -= manifest.shard_tokens
            if part.documents:
                sizes[docs_name(index, split)] = part.documents * 8
    return sizes


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a folder that is being filled."""
    content = dataclasses.asdict(manifest)
    content["self"] = _digest(content)
    files.write_file(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises `DamagedData` where it is missing, torn or does not agree with itself, and `DataError` for a version of the
    format that this program does not know.
    """
    path = folder / NAME
    if not path.is_file():
        missing = f"has no `{NAME}`: it is not a shard folder, or was not finished"
        what = missing if folder.is_dir() else "is not a folder"
        raise DamagedData(f"`{folder}` {what}", hint="make one with `threefold data prepare`")
    content = read_json(path, SIZE_LIMIT, error=DamagedData)
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise DataError(f"`{path}` has format version {version}; this threefold reads up to {VERSION}",
                        hint="upgrade threefold: pip install --upgrade threefold")
    try:
        said = content.pop("self")
        found = _digest(content)
        if said != found:
            raise DamagedData(f"`{path}` is damaged: its hash should be {said} and is {found}",
                              hint="prepare the data again")
        sources = [SourceEntry(**{**source, "files": [tuple(file) for file in source["files"]],
                                  "train": Part(**source["train"]), "validation": Part(**source["validation"])})
                   for source in content["sources"]]
        entries = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(**{**content, "sources": sources, "files": entries})
        if manifest.version != VERSION or manifest.dtype not in ("<u2", "<u4") or manifest.shard_tokens < 1:
            raise ValueError(f"version {manifest.version}, dtype {manifest.dtype!r}, {manifest.shard_tokens} tokens")
        _check_names(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise DamagedData(f"`{path}` is not a manifest of shards: {problem}",
                          hint="prepare the data again") from problem
    return manifest


def _check_names(manifest: Manifest) -> None:
    """The files that are listed are those that the counts call for, and the tokenizer's."""
    sizes = expected_sizes(manifest)
    for name, entry in manifest.files.items():
        folder, _, plain = name.rpartition("/")
        if folder == "tokenizer" and plain not in ("", ".", "..") and "\\" not in plain:
            continue
        if sizes.pop(name, None) != entry.size:
            raise ValueError(f"the counts do not call for the file `{name}` of {entry.size} bytes")
    if sizes:
        raise ValueError(f"the counts call for the file `{min(sizes)}`, which is not listed")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
