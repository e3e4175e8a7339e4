"""Checkpoints: complete or not there, verified before they are believed.

A checkpoint is a folder `checkpoints/step-000500/` with `model.safetensors`, `optimizer.safetensors`, `state.json` and
`manifest.json` (sizes and SHA-256 of the others, and of what it says itself). Decisions:

- Space is checked before the first byte. The folder is filled under a temporary name, every file synced, the manifest
  written last, then the folder is renamed and its parent synced (`files.published`). Old checkpoints go only
  afterwards.
- There is no `latest` link, a second source of truth: the newest folder that verifies is the latest, and those that
  do not are named with the reason.
- Never fewer than two verified checkpoints are kept; a failing delete is a warning, not an error.
- A checkpoint of a newer format is refused with the word "upgrade", never guessed at, and not passed over either: an
  older program would go on from an older step and write over what the newer one did.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from threefold import files
from threefold.errors import CheckpointError, DiskError
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.strict_json import read_json

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"^step-(\d{6,})$", re.ASCII)


class NewerCheckpoint(CheckpointError):
    """A checkpoint that a newer threefold wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """One folder on disk whose manifest was verified. Tensors are read when asked for."""

    path: Path
    step: int
    manifest: Mapping[str, Any] = field(repr=False)

    def model(self) -> dict[str, Tensor]:
        """Named parameters of the model."""
        return read_safetensors(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Named tensors of the optimizer."""
        return read_safetensors(self.path / "optimizer.safetensors")

    def state(self) -> dict[str, Any]:
        """What else the trainer needs, as plain JSON."""
        state = read_json(self.path / "state.json", error=CheckpointError)
        if not isinstance(state, dict):
            raise CheckpointError(f"`{self.path / 'state.json'}` holds no object")
        return state


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> Checkpoint:
    """Write and publish one checkpoint. `identity` (recipe hash, data fingerprint, torch, threads) goes into the
    manifest.

    Raises DiskError, with the temporary folder removed and every earlier checkpoint as it was.
    """
    needed = _size_of(model) + _size_of(optimizer)
    final = folder(run, step)
    files.make_dirs(final.parent)
    free = files.free_bytes(final.parent)
    if free < 1.1 * needed:
        raise DiskError(f"cannot save `{final}`: {needed:,} bytes needed (and a tenth to spare), {free:,} bytes free",
                        hint="free some space, keep fewer checkpoints (train.keep) or choose another place with --out")
    with files.published(final) as temporary:
        sizes = {
            "model.safetensors": write_safetensors(temporary / "model.safetensors", model),
            "optimizer.safetensors": write_safetensors(temporary / "optimizer.safetensors", optimizer),
            "state.json": files.write_file(temporary / "state.json", json.dumps(dict(state), allow_nan=False)),
        }
        listed = {name: {"size": size, "sha256": files.sha256(temporary / name)} for name, size in sizes.items()}
        manifest = {**identity, "format": FORMAT, "step": step, "files": listed}
        manifest["sha256"] = _own_hash(manifest)
        files.write_file(temporary / "manifest.json", json.dumps(manifest, indent=1, allow_nan=False))
    return Checkpoint(final, step, manifest)


def verify(path: Path) -> Checkpoint:
    """Check one checkpoint folder against its manifest, every byte; raises CheckpointError with the reason."""
    match = _NAME.match(path.name)
    if not match or path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"`{path}` is not a checkpoint folder")
    try:
        manifest = _manifest(path)
        listed = manifest["files"]
        present = set(os.listdir(path)) - {"manifest.json"}
        if present != set(listed):
            raise CheckpointError(f"`{path}`: files are {sorted(present)}, the manifest lists {sorted(listed)}")
        for name, entry in listed.items():
            file = path / name
            if not files.is_regular(file):
                raise CheckpointError(f"`{file}` is not a plain file")
            if (size := file.stat().st_size) != entry["size"]:
                raise CheckpointError(f"`{file}` has {size:,} bytes, the manifest says {entry['size']:,}")
            if (found := files.sha256(file)) != entry["sha256"]:
                raise CheckpointError(
                    f"`{file}` is damaged: SHA-256 is {found[:16]}..., the manifest says {entry['sha256'][:16]}..."
                )
    except (OSError, DiskError) as error:  # a bad sector, no permission
        raise CheckpointError(f"`{path}` cannot be read: {error}") from error
    return Checkpoint(path, int(match[1]), manifest)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not files.is_regular(file):
        raise CheckpointError(f"`{path}` has no manifest.json: the save was not finished")
    manifest = read_json(file, error=CheckpointError)
    if not isinstance(manifest, dict) or not _is_count(manifest.get("format")):
        raise CheckpointError(f"`{file}` is not a checkpoint manifest")
    if manifest.get("sha256") != _own_hash(manifest):  # in every format: a damaged number is not a newer one
        raise CheckpointError(f"`{file}` is damaged: it is not what was written")
    if manifest["format"] > FORMAT:
        raise NewerCheckpoint(
            f"`{path}` has checkpoint format {manifest['format']}, this threefold reads up to {FORMAT}",
            hint="upgrade threefold to open it",
        )
    listed, step = manifest.get("files"), manifest.get("step")
    entries_hold = (
        isinstance(listed, dict)
        and set(listed) == set(FILES)
        and all(isinstance(e, dict) and _is_count(e.get("size")) and isinstance(e.get("sha256"), str)
                for e in listed.values())
    )
    if manifest["format"] < 1 or not entries_hold or not _is_count(step) or f"step-{step:06d}" != path.name:
        raise CheckpointError(f"`{file}` does not describe `{path.name}`")
    return manifest


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of all that a manifest says but this."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def steps(run: Path) -> list[int]:
    """Steps that have a folder, newest first; nothing is verified yet."""
    parent = run / "checkpoints"
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise files.disk_error(error, parent, "list") from error
    return sorted({int(match[1]) for name in names if (match := _NAME.match(name))}, reverse=True)


def latest(
    run: Path, *, up_to: int | None = None, skipped: Callable[[str], None] = lambda reason: None
) -> Checkpoint | None:
    """The newest checkpoint that verifies (at or before `up_to`), or None; each one passed over is told to
    `skipped`."""
    for step in steps(run):
        if up_to is not None and step > up_to:
            continue
        try:
            return verify(folder(run, step))
        except NewerCheckpoint:
            raise
        except CheckpointError as error:
            skipped(str(error))
    return None


def at(run: Path, step: int) -> Checkpoint:
    """The checkpoint of exactly this step; damage is an error here, not a reason to take another."""
    path = folder(run, step)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at step {step} in `{run}`", hint=f"there are: {steps(run) or 'none'}")
    return verify(path)


def prune(
    run: Path,
    keep: int,
    *,
    spare: Container[int] = (),
    trusted: set[int] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Remove all but the newest `keep` (at least 2) checkpoints that verify, and the steps in `spare`; returns the
    steps removed.

    trusted: steps that this process wrote or verified, which are not read again; those that verify now are added. What
    does not verify and is newer than those that are kept is left alone: it is evidence, and `checkpoints verify`
    names it.
    """
    trusted = set() if trusted is None else trusted
    removed: list[int] = []
    valid = 0
    for step in steps(run):
        if valid < max(2, keep):
            if step in trusted or _verifies(folder(run, step)):
                trusted.add(step)
                valid += 1
            continue
        if step in spare:
            continue
        try:
            remove(folder(run, step))
            removed.append(step)
        except DiskError as error:
            warn(f"could not remove the old checkpoint of step {step}: {error}")
    return removed


def remove(path: Path) -> None:
    """Take a checkpoint away: first its name, in one step, then its files."""
    files.remove_tree(files.move_to_trash(path))


def _verifies(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
