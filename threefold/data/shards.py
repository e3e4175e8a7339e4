"""Shards: a corpus as token streams on disk, made once, opened by every context, family and objective.

Decisions:
- A shard folder is published as a whole: it is filled under a temporary name, its manifest last, and renamed. A
  preparation that was killed leaves nothing that could be taken for data, and the next one gives the same bytes.
- Opening checks the manifest and the sizes; opening with `verify` also every hash, and reports all damage at once.
- Files of up to `HASHED_BELOW` bytes are known by their content: touching one changes nothing, editing one does. Larger
  ones are known by size and modification time, because hashing them at every start would take minutes.
- Other sources, another tokenizer, other settings are an error and never a silent second preparation. A source of which
  nothing is there any more is a note: the shards are verified, and a run goes on without its raw text.
- A folder is known as ours by what a manifest and shards are called and say, also when both are damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from threefold import files
from threefold.data import manifest as manifests
from threefold.data.corpus import Corpus, Encoder, Progress, encode_corpus
from threefold.data.manifest import SPLITS, FileEntry, Manifest, Part, SourceEntry
from threefold.data.stream import TokenStream, map_file
from threefold.errors import ConfigError, DamagedData, DataError, ThreefoldError, TokenizerError
from threefold.strict_json import read_json

if TYPE_CHECKING:
    from threefold.text.sources import Source

SHARD_TOKENS = 2**28
HASHED_BELOW = 256 * 2**20
_IDS = re.compile(r"\d+-(train|validation)-\d{5}\.ids", re.ASCII)
_DOCS = re.compile(r"\d+-(train|validation)\.docs", re.ASCII)


@dataclass(frozen=True)
class Shards:
    """An opened shard folder. Streams are memory-mapped; nothing is read until it is asked for."""

    directory: Path
    manifest: Manifest
    streams: Mapping[tuple[str, int], TokenStream]

    @staticmethod
    def open(directory: str | Path, *, verify: bool = False) -> Shards:
        """Open a folder that `prepare` made; with `verify`, read it all and compare every hash.

        Raises `DamagedData` that names every file that is not as it was written, `DataError` for a newer format.
        """
        directory = Path(directory)
        manifest = manifests.read(directory)
        problems = _damage(directory, manifest, hashes=verify)
        if problems:
            raise DamagedData(f"`{directory}` is damaged: " + "; ".join(problems),
                              hint="restore the files, or prepare the data again")
        streams = {}
        for index, source in enumerate(manifest.sources):
            for split in SPLITS:
                part = source.part(split)
                parts = [map_file(directory / name, manifest.dtype)
                         for name in manifests.shard_names(index, split, part, manifest.shard_tokens)]
                name = directory / manifests.docs_name(index, split)
                starts = map_file(name, "<u8") if part.documents else np.empty(0, dtype=np.uint64)
                streams[split, index] = TokenStream(parts, starts, manifest.shard_tokens)
        return Shards(directory, manifest, streams)

    def verify(self) -> list[str]:
        """Read every file and compare its hash; returns what is damaged, one line a file, or nothing."""
        return _damage(self.directory, self.manifest, hashes=True)

    # What is in it

    @property
    def sources(self) -> list[SourceEntry]:
        """The sources, in the order in which they were given."""
        return self.manifest.sources

    @property
    def fingerprint(self) -> str:
        """A hash over the content of all documents; the order of training depends on it and on the seed."""
        return self.manifest.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the ids."""
        return self.manifest.tokenizer

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of that tokenizer."""
        return self.directory / "tokenizer"

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer has; every id is below it."""
        return self.manifest.vocab_size

    @property
    def filler_id(self) -> int:
        """The id that fills places where there is no text; nothing is ever predicted there."""
        return self.manifest.eos_id if self.manifest.eos_id is not None else 0

    def stream(self, split: str, source: int = 0) -> TokenStream:
        """The token stream of one source, `split` being `train` or `validation`."""
        return self.streams[split, source]

    def tokens(self, split: str) -> list[npt.NDArray[np.generic]]:
        """The mapped arrays of a split, in order of source and file."""
        return [part for index in range(len(self.sources)) for part in self.stream(split, index).parts]

    def documents(self, split: str) -> Iterator[npt.NDArray[np.int64]]:
        """The ids of each document of a split, with their special tokens."""
        for index in range(len(self.sources)):
            yield from self.stream(split, index)

    def count(self, split: str) -> Part:
        """Documents, tokens, characters and bytes of a split, over all sources."""
        parts = [source.part(split) for source in self.sources]
        return Part(sum(part.documents for part in parts), sum(part.tokens for part in parts),
                    sum(part.characters for part in parts), sum(part.bytes for part in parts))

    # Whether it fits

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise `TokenizerError` unless the ids were made by the tokenizer with this fingerprint."""
        if fingerprint != self.manifest.tokenizer:
            raise TokenizerError(f"`{self.directory}` was prepared with another tokenizer: its fingerprint is "
                                 f"{self.manifest.tokenizer[:16]}, this one's is {fingerprint[:16]}",
                                 hint=f"use the tokenizer in `{self.tokenizer_dir}`, or prepare the data again")

    def changes(self, sources: Sequence[Source], gone: Sequence[Source] | None = None) -> list[str]:
        """How the files of `sources` differ from those that were prepared, one line a difference. Of a source that is
        gone as a whole nothing is said here: `gone` (found here unless given) is what `self.gone` says of them."""
        gone, before = self.gone(sources) if gone is None else gone, {source.name: source for source in self.sources}
        return _changes(self.sources, [dataclasses.replace(before[source.path], share=source.share) if source in gone
                                       else _entry(source) for source in sources])

    def gone(self, sources: Sequence[Source]) -> list[Source]:
        """Those of `sources` that were prepared and of which no file is there any more."""
        prepared = {source.name for source in self.sources}
        return [source for source in sources if source.path in prepared and not _is_there(source)]


def prepare(sources: Sequence[Source], tokenizer: Encoder, out: str | Path, *, val_fraction: float = 0.1,
            columns: Mapping[str, str] | None = None, near_duplicates: bool = True, skip_problems: bool = False,
            progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS,
            accepted: Sequence[dict[str, Any]] = ()) -> Shards:
    """Read, clean, deduplicate, split and encode `sources`, and publish them as the shard folder `out`.

    `val_fraction` of the characters is kept for validation (0 keeps none). `columns` maps our column names to those of
    the files. With `skip_problems` what does not fit is left out and counted in the report, without it is an error.
    `progress(documents, characters)` is called now and then. An existing shard folder is replaced at the end.
    Raises `DataError` where nothing is left to train on, `UsageError` where `out` holds what no preparation wrote, and
    whatever reading raises.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"the validation fraction is {val_fraction}", hint="it must be 0 or more and below 1")
    if not sources:
        raise DataError("no data was named", hint="name a file or a folder with --data")
    out = Path(out)
    files.check_ours(out, _foreign)
    settings = _settings(val_fraction, columns or {}, near_duplicates, skip_problems, shard_tokens)
    with files.published(out, foreign=_foreign) as folder:
        entries = [_entry(source) for source in sources]
        report: dict[str, Any] = {}
        documents = _cleaned(sources, settings, report)
        shares = any(source.share is not None for source in sources)
        corpus = encode_corpus(documents, tokenizer, folder / "spool", fraction=val_fraction,
                               group_of=(lambda source: source) if shares else (lambda source: 0), progress=progress)
        if not corpus.tokens or all(corpus.side):
            raise DataError(f"nothing to train on in {', '.join(f'`{entry.name}`' for entry in entries)}: "
                            f"{len(corpus.tokens)} documents, {sum(corpus.characters)} characters after cleaning",
                            hint="the report of `threefold data prepare` says what was left out, and why")
        report["overlap"] = _overlap(corpus)
        written: dict[str, FileEntry] = {}
        for index, entry in enumerate(entries):
            parts = {split: _write_part(folder, corpus, index, split, shard_tokens, written) for split in SPLITS}
            entries[index] = SourceEntry(entry.name, entry.share, entry.files, **parts)
        files.remove_tree(folder / "spool")
        tokenizer.save(files.make_dirs(folder / "tokenizer"))
        for path in sorted((folder / "tokenizer").iterdir()):
            written[f"tokenizer/{path.name}"] = FileEntry(path.stat().st_size, files.sha256(path))
        manifests.write(folder, Manifest(
            version=manifests.VERSION, dtype=corpus.dtype, shard_tokens=shard_tokens, vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, tokenizer=tokenizer.fingerprint, preparation=settings,
            preparation_hash=_hash(settings), sources=entries, report=report,
            fingerprint=_fingerprint(corpus, len(sources)), accepted=list(accepted), files=written))
    return Shards.open(out)


def ensure(sources: Sequence[Source], tokenizer: Encoder, out: str | Path, *, val_fraction: float = 0.1,
           columns: Mapping[str, str] | None = None, near_duplicates: bool = True, skip_problems: bool = False,
           progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS, accept_new_data: bool = False,
           note: Callable[[str], None] | None = None) -> Shards:
    """The shards in `out`: those that are there if they fit, verified, else prepared now.

    `note` is told each source of which nothing is there any more; the verified shards stand for it.
    Raises `DataError` where the sources or the settings are not those that `out` was made from; with `accept_new_data`
    the data is prepared again and the change is recorded in the manifest. Another tokenizer is always refused.
    """
    out = Path(out)
    accepted: list[dict[str, Any]] = []
    if is_prepared(out):
        found = Shards.open(out, verify=True)
        found.check_tokenizer(tokenizer.fingerprint)
        settings = _settings(val_fraction, columns or {}, near_duplicates, skip_problems, shard_tokens)
        gone = found.gone(sources)
        changes = [*_differences(found.manifest.preparation, settings), *found.changes(sources, gone)]
        if not changes:
            for source in gone:
                if note is not None:
                    note(f"`{source.path}` is not there any more; `{out}` was prepared from it and is whole, "
                         "so it is used")
            return found
        if not accept_new_data:
            raise DataError(f"the data is not what `{out}` was prepared from: " + "; ".join(changes),
                            hint="restore it, or go on with the new data with --accept-new-data")
        accepted = [*found.manifest.accepted, {"was": found.fingerprint, "changes": changes}]
    return prepare(sources, tokenizer, out, val_fraction=val_fraction, columns=columns, near_duplicates=near_duplicates,
                   skip_problems=skip_problems, progress=progress, shard_tokens=shard_tokens, accepted=accepted)


def is_prepared(path: str | Path) -> bool:
    """Whether a folder is one that `prepare` made, whole or damaged, and not merely one with some `manifest.json`."""
    path = Path(path)
    if not (path / manifests.NAME).is_file():
        return False
    with contextlib.suppress(OSError, ThreefoldError):
        if any(_IDS.fullmatch(entry.name) for entry in path.iterdir()):
            return True
        said = read_json(path / manifests.NAME, manifests.SIZE_LIMIT)
        return isinstance(said, dict) and {"shard_tokens", "preparation_hash", "fingerprint"} <= said.keys()
    return False


def summary(shards: Shards) -> dict[str, Any]:
    """What a shard folder holds, as plain data for a table or for JSON."""
    manifest = shards.manifest
    return {
        "directory": str(shards.directory), "fingerprint": manifest.fingerprint, "tokenizer": manifest.tokenizer,
        "vocab_size": manifest.vocab_size, "bytes_on_disk": sum(entry.size for entry in manifest.files.values()),
        "files": len(manifest.files), "preparation": manifest.preparation, "report": manifest.report,
        "accepted": manifest.accepted,
        **{split: vars(shards.count(split)) for split in SPLITS},
        "sources": [{"name": source.name, "share": source.share, "files": len(source.files),
                     **{split: vars(source.part(split)) for split in SPLITS}} for source in manifest.sources],
    }


def left_out(shards: Shards) -> list[str]:
    """What did not become part of a shard folder, a line a reason, with how much and the first few places."""
    report = shards.manifest.report
    cleaning, passed = report.get("cleaning", {}), report.get("passed_over", {})
    found = [(count, reason, cleaning.get("examples", {}).get(reason, ())) for reason, count in cleaning.get("dropped", {}).items()]
    found += [(one["count"], reason, one["examples"]) for reason, one in passed.items()]
    return [f"{count:,} left out of the data: {reason} ({', '.join(places)})" for count, reason, places in found]


# Reading and writing


def _foreign(folder: Path) -> list[str]:
    """What in a folder no preparation wrote: everything, where it is no shard folder."""
    ours = is_prepared(folder)
    return sorted(path.name for path in folder.iterdir() if not (ours and (
        path.name in (manifests.NAME, "tokenizer") or _IDS.fullmatch(path.name) or _DOCS.fullmatch(path.name))))


def _cleaned(sources: Sequence[Source], settings: Mapping[str, Any],
             report: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(source, text) of every document that is kept; `report` is filled when the last one was read."""
    from threefold.text.clean import CleaningReport, clean
    from threefold.text.sources import Skips, read_documents

    cleaning, skips = CleaningReport(), Skips()
    for index, source in enumerate(sources):
        found = read_documents(source.path, settings["columns"], skips if settings["skip_problems"] else None,
                               on_empty=skips)
        for document in clean(found, cleaning, near_duplicates=settings["near_duplicates"]):
            yield index, document.text
    report["cleaning"], report["passed_over"] = cleaning.to_dict(), skips.to_dict()


def _overlap(corpus: Corpus) -> int:
    """How many documents stand in train and in validation: none, unless cleaning or the split is wrong."""
    train = {name for name, side in zip(corpus.hashes, corpus.side, strict=True) if not side}
    return len(train & {name for name, side in zip(corpus.hashes, corpus.side, strict=True) if side})


def _write_part(folder: Path, corpus: Corpus, source: int, split: str, shard_tokens: int,
                written: dict[str, FileEntry]) -> Part:
    """Write the `.ids` and `.docs` files of one source and split, and note them in `written`."""
    chosen = corpus.chosen(source, split == "validation")
    lengths, characters, size = (np.asarray(column, dtype=np.int64)[chosen]
                                 for column in (corpus.tokens, corpus.characters, corpus.sizes))
    part = Part(int(chosen.sum()), int(lengths.sum()), int(characters.sum()), int(size.sum()))
    chunks = _Chunks(corpus.ids(source, split == "validation"))
    for name in manifests.shard_names(source, split, part, shard_tokens):
        written[name] = _write_hashed(folder / name, chunks.next(shard_tokens))
    if part.documents:
        starts = (np.cumsum(lengths) - lengths).astype("<u8")
        name = manifests.docs_name(source, split)
        written[name] = _write_hashed(folder / name, [starts])
    return part


class _Chunks:
    """Arrays of any length, handed out in runs of a given number of elements."""

    def __init__(self, arrays: Iterator[npt.NDArray[np.generic]]) -> None:
        self._arrays = arrays
        self._rest: npt.NDArray[np.generic] | None = None

    def next(self, wanted: int) -> Iterator[npt.NDArray[np.generic]]:
        """The next `wanted` elements, or as many as there are."""
        while wanted:
            array = self._rest if self._rest is not None else next(self._arrays, None)
            if array is None:
                return
            self._rest = array[wanted:] if len(array) > wanted else None
            array = array[:wanted]
            wanted -= len(array)
            yield array


def _write_hashed(path: Path, arrays: Iterable[npt.NDArray[np.generic]]) -> FileEntry:
    digest = hashlib.sha256()

    def fill(writer: files.Writer) -> None:
        for array in arrays:
            data = np.ascontiguousarray(array).data.cast("B")
            digest.update(data)
            writer.write(data)

    return FileEntry(files.write_file(path, fill), digest.hexdigest())


def _damage(directory: Path, manifest: Manifest, *, hashes: bool) -> list[str]:
    """Which files are missing, of another size or, if asked, of another content; one line each."""
    problems = []
    for name, entry in manifest.files.items():
        path = directory / name
        if not files.is_regular(path):
            problems.append(f"`{name}` is missing" if not path.exists() else f"`{name}` is not a plain file")
        elif (size := path.stat().st_size) != entry.size and not hashes:
            problems.append(f"`{name}` should have {entry.size} bytes and has {size}")
        elif hashes and (found := files.sha256(path)) != entry.sha256:
            of_size = f" ({entry.size} bytes)", f" ({size} bytes)"
            problems.append(f"`{name}` should have the hash {entry.sha256}{of_size[0] * (size != entry.size)} and has "
                            f"{found}{of_size[1] * (size != entry.size)}")
    return problems


# Fingerprints


def _fingerprint(corpus: Corpus, sources: int) -> str:
    """A hash over the hashes of the documents, by source and split, in order."""
    digest = hashlib.sha256()
    for index in range(sources):
        for split in SPLITS:
            chosen = np.flatnonzero(corpus.chosen(index, split == "validation"))
            digest.update(f"{index} {split} {len(chosen)}\n".encode())
            for number in chosen:
                digest.update(corpus.hashes[number])
    return digest.hexdigest()


def _entry(source: Source) -> SourceEntry:
    """A source with the identity of each of its files, still without content."""
    from threefold.text.sources import expand

    nothing = Part(0, 0, 0, 0)
    return SourceEntry(source.path, source.share, [_identity(path) for path in expand(source.path)], nothing, nothing)


def _is_there(source: Source) -> bool:
    """Whether anything is left of a source; a name on the hub is no file, and is not asked for."""
    from threefold.text.sources import expand

    try:
        return source.path.startswith("hub:") or bool(expand(source.path))
    except DataError as error:
        return error.__cause__ is not None  # there, and the operating system does not give it


def _identity(path: Path) -> tuple[str, int, str]:
    """(path, size, what it is known by): the hash of its content, or for a large file the time of its last change."""
    from threefold.text.lines import unreadable

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return str(path), 0, "not a plain file"         # a pipe would wait for its other end
        hashed = status.st_size < HASHED_BELOW
        return str(path), status.st_size, files.sha256(path) if hashed else f"changed {status.st_mtime_ns}"
    except OSError as error:
        raise unreadable(path, error) from error


def _changes(before: Sequence[SourceEntry], after: Sequence[SourceEntry]) -> list[str]:
    was, now = ([f"`{source.name}`" + (f" at {source.share:g}" if source.share is not None else "") for source in side]
                for side in (before, after))
    if was != now:
        return [f"the sources were {', '.join(was)} and are {', '.join(now)}"]
    changes = []
    for old, new in zip(before, after, strict=True):
        files_before, files_after = ({path: (size, known) for path, size, known in side.files} for side in (old, new))
        for path in sorted(files_before.keys() | files_after.keys()):
            if path not in files_after:
                changes.append(f"`{path}` is gone")
            elif path not in files_before:
                changes.append(f"`{path}` is new")
            elif files_before[path] != files_after[path]:
                (size_before, known_before), (size_after, known_after) = files_before[path], files_after[path]
                what = (f"from {size_before} to {size_after} bytes" if size_before != size_after
                        else f"from {known_before[:24]} to {known_after[:24]}")
                changes.append(f"`{path}` has changed {what}")
    return changes


def _settings(val_fraction: float, columns: Mapping[str, str], near_duplicates: bool, skip_problems: bool,
              shard_tokens: int) -> dict[str, Any]:
    return {"val_fraction": val_fraction, "columns": dict(sorted(columns.items())), "near_duplicates": near_duplicates,
            "skip_problems": skip_problems, "shard_tokens": shard_tokens}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [f"`{name}` was {before.get(name)!r} and is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
