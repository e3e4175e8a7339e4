"""Disks that refuse, forget or lie: errors at the n-th operation, power cuts at every one, damage to what is stored."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from threefold import files


class FaultyFiles:
    """`with FaultyFiles(fail_at=3, error=errno.EIO):` the third operation raises OSError. `seen` lists all of them.

    kind: count operations of this kind alone (write, fsync, rename, ...); where: and only on paths that contain this.
    lasting: every later operation that counts fails too, as on a disk that stays full.
    """

    def __init__(
        self,
        fail_at: int = 0,
        error: int = errno.ENOSPC,
        kind: str | None = None,
        where: str = "",
        *,
        lasting: bool = False,
    ) -> None:
        self.fail_at, self.error, self.kind, self.where, self.lasting = fail_at, error, kind, where, lasting
        self.seen: list[tuple[str, str]] = []
        self.count = 0
        self._stack = contextlib.ExitStack()

    @property
    def failed(self) -> bool:
        """Whether an operation was made to fail."""
        return 0 < self.fail_at <= self.count

    def __call__(self, kind: str, path: str, *details: Any) -> None:
        self.seen.append((kind, path))
        if (self.kind is None or kind == self.kind) and self.where in path:
            self.count += 1
            if self.count == self.fail_at or (self.lasting and self.failed):
                raise OSError(self.error, os.strerror(self.error), path)

    def __enter__(self) -> FaultyFiles:
        self._stack.enter_context(files.observed(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _Node:
    """A file or a folder, as it is in memory and as it is on the platter."""

    def __init__(self, *, is_dir: bool) -> None:
        self.is_dir = is_dir
        self.data = self.safe_data = b""
        self.entries: dict[str, _Node] = {}
        self.safe_entries: dict[str, _Node] = {}
        self.pending: list[dict[str, _Node | None]] = []  # changes of names since the folder was synced, each atomic

    def change(self, names: dict[str, _Node | None]) -> None:
        _apply(self.entries, names)
        self.pending.append(names)


def _apply(entries: dict[str, _Node], names: dict[str, _Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class PowerLoss:
    """Records what is done to a folder; `disks` then builds what a power cut after each operation could leave behind.

    Data that was not synced is lost, cut at a random byte or zero; names whose folder was not synced are old or new.
    The variants: `lost` (nothing that was not synced is there), `names` (all names, no unsynced data), `zeros` (all
    names and lengths, unsynced data zero), `torn` (each name old or new, each file cut somewhere, by chance).
    """

    VARIANTS = ("lost", "names", "zeros", "torn")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[tuple[str, str, tuple[Any, ...]]] = []
        self._first = Path(f"{root}.before")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PowerLoss:
        shutil.copytree(self.root, self._first, symlinks=True)
        self._stack.enter_context(files.observed(self._record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _record(self, kind: str, path: str, *details: Any) -> None:
        if Path(path).is_relative_to(self.root):
            self.operations.append((kind, path, tuple(bytes(d) if isinstance(d, memoryview) else d for d in details)))

    def disks(
        self, into: Path, *, prefixes: Sequence[int] | None = None, variants: Sequence[str] = VARIANTS, seed: int = 0
    ) -> Iterator[tuple[int, str, Path]]:
        """(operations done, variant, folder) for every prefix; each folder is gone when the next one comes."""
        for count in range(len(self.operations) + 1) if prefixes is None else prefixes:
            for variant in variants:
                shutil.rmtree(into, ignore_errors=True)
                self._write(self._after(count), into, variant, random.Random(f"{seed}/{count}/{variant}"))
                yield count, variant, into

    def _after(self, count: int) -> _Node:
        root = self._load(self._first)
        for kind, path, details in self.operations[:count]:
            self._do(root, kind, path, details)
        return root

    def _load(self, path: Path) -> _Node:
        node = _Node(is_dir=path.is_dir())
        if node.is_dir:
            node.entries = {entry.name: self._load(entry) for entry in path.iterdir()}
            node.safe_entries = dict(node.entries)
        else:
            node.data = node.safe_data = path.read_bytes()
        return node

    def _find(self, root: _Node, path: str) -> _Node:
        node = root
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def _do(self, root: _Node, kind: str, path: str, details: tuple[Any, ...]) -> None:
        name = Path(path).name
        if kind == "fsync_dir":
            folder = self._find(root, path)
            folder.pending, folder.safe_entries = [], dict(folder.entries)
            return
        parent = self._find(root, str(Path(path).parent))
        if kind == "open":
            if name not in parent.entries:
                parent.change({name: _Node(is_dir=False)})
            elif details[0] == "new":
                parent.entries[name].data = b""
        elif kind == "write":
            parent.entries[name].data += details[1]
        elif kind == "fsync":
            parent.entries[name].safe_data = parent.entries[name].data
        elif kind == "truncate":
            parent.entries[name].data = parent.entries[name].data[: details[0]]
        elif kind == "mkdir":
            parent.change({name: _Node(is_dir=True)})
        elif kind == "rename":
            target = Path(details[0])
            other = self._find(root, str(target.parent))
            node = parent.entries[name]
            if other is parent:
                parent.change({name: None, target.name: node})
            else:
                parent.change({name: None})
                other.change({target.name: node})
        elif kind in ("unlink", "rmdir"):
            parent.change({name: None})
        else:
            raise AssertionError(f"an operation that the model does not know: {kind}")

    def _write(self, node: _Node, path: Path, variant: str, rng: random.Random) -> None:
        if not node.is_dir:
            path.write_bytes(_data_left(node, variant, rng))
            return
        path.mkdir()
        entries = dict(node.safe_entries)
        for names in node.pending:
            if variant in ("names", "zeros") or (variant == "torn" and rng.random() < 0.5):
                _apply(entries, names)
        for name, entry in entries.items():
            self._write(entry, path / name, variant, rng)


def _data_left(node: _Node, variant: str, rng: random.Random) -> bytes:
    if node.data == node.safe_data or variant in ("lost", "names"):
        return node.safe_data
    if not node.data.startswith(node.safe_data):  # truncated or written anew
        return rng.choice([node.data, node.safe_data, b""])
    if variant == "zeros":
        return node.safe_data + bytes(len(node.data) - len(node.safe_data))
    end = rng.randint(len(node.safe_data), len(node.data))
    return node.data[:end] + bytes(rng.choice([0, len(node.data) - end]))


def corrupt(path: Path, how: str, at: int = 0, other: Path | None = None) -> None:
    """Damage a file: `bit` (flip bit `at`), `truncate` (to `at` bytes), `zero` (a page from `at` on), `swap` (with
    `other`), `folder`, `symlink`, `fifo` (in its place)."""
    if how == "bit":
        data = bytearray(path.read_bytes())
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
    elif how == "truncate":
        os.truncate(path, at)
    elif how == "zero":
        data = bytearray(path.read_bytes())
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        path.write_bytes(data)
    elif how == "swap":
        assert other is not None
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    else:
        copy = path.with_name(f"{path.name}.moved")
        path.rename(copy)
        if how == "folder":
            path.mkdir()
        elif how == "symlink":
            moved = copy.rename(path.parent.parent / f"{path.name}.elsewhere")
            path.symlink_to(moved)
            return
        elif how == "fifo":
            os.mkfifo(path)
        else:
            raise AssertionError(how)
        copy.unlink()
