"""Checkpoints: complete or not there, verified before they are believed.

A checkpoint is a folder `checkpoints/step-000500/` with `model.safetensors`, `optimizer.safetensors`, `state.json` and
`manifest.json` (sizes and SHA-256 of the others). Decisions:

- Space is checked before the first byte. The folder is filled under a temporary name, every file synced, the manifest
  written last, then the folder is renamed and its parent synced (`files.published`). Old checkpoints go only
  afterwards.
- There is no `latest` link, a second source of truth: the newest folder that verifies is the latest, and those that
  do not are named with the reason.
- Never fewer than two verified checkpoints are kept; a failing delete is a warning, not an error.
- A checkpoint of a newer format is refused with the word "upgrade", never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from threefold import files
from threefold.errors import CheckpointError, DiskError, ThreefoldError
from threefold.model.weights import read_safetensors, write_safetensors

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"^step-(\d{6,})$")


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
        state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        assert isinstance(state, dict)
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
        write_safetensors(temporary / "model.safetensors", model)
        write_safetensors(temporary / "optimizer.safetensors", optimizer)
        files.write_file(temporary / "state.json", json.dumps(dict(state), allow_nan=False))
        listed = {
            name: {"size": (temporary / name).stat().st_size, "sha256": files.sha256(temporary / name)}
            for name in FILES
        }
        manifest = {"format": FORMAT, "step": step, "files": listed, **identity}
        files.write_file(temporary / "manifest.json", json.dumps(manifest, indent=1))
    return Checkpoint(final, step, manifest)


def verify(path: Path) -> Checkpoint:
    """Check one checkpoint folder against its manifest, every byte; raises CheckpointError with the reason."""
    match = _NAME.match(path.name)
    if not match or path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"`{path}` is not a checkpoint folder")
    manifest = _manifest(path)
    listed = manifest["files"]
    present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    if present != set(listed):
        raise CheckpointError(f"`{path}`: files are {sorted(present)}, the manifest lists {sorted(listed)}")
    for name, entry in listed.items():
        file = path / name
        if not files.is_regular(file):
            raise CheckpointError(f"`{file}` is not a plain file")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"`{file}` has {file.stat().st_size:,} bytes, the manifest says {entry['size']:,}")
        if (found := files.sha256(file)) != entry["sha256"]:
            raise CheckpointError(
                f"`{file}` is damaged: SHA-256 is {found[:16]}..., the manifest says {entry['sha256'][:16]}..."
            )
    return Checkpoint(path, int(match[1]), manifest)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not files.is_regular(file):
        raise CheckpointError(f"`{path}` has no manifest.json: the save was not finished")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"`{file}` cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"`{file}` is not a checkpoint manifest")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"`{path}` has checkpoint format {manifest['format']}, this threefold reads up to {FORMAT}",
            hint="upgrade threefold to open it",
        )
    listed = manifest.get("files")
    entries_hold = (
        isinstance(listed, dict)
        and set(listed) == set(FILES)
        and all(
            isinstance(e, dict) and isinstance(e.get("size"), int) and isinstance(e.get("sha256"), str)
            for e in listed.values()
        )
    )
    if not entries_hold or f"step-{manifest.get('step', -1):06d}" != path.name:
        raise CheckpointError(f"`{file}` does not describe `{path.name}`")
    return manifest


def steps(run: Path) -> list[int]:
    """Steps that have a folder, newest first; nothing is verified yet."""
    parent = run / "checkpoints"
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _NAME.match(name))), reverse=True)


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
    run: Path, keep: int, *, spare: int | None = None, warn: Callable[[str], None] = lambda text: None
) -> list[int]:
    """Remove all but the newest `keep` (at least 2) checkpoints that verify, and the step `spare`; returns the steps
    removed.

    Folders that do not verify are left alone: they are evidence, and `checkpoints verify` names them.
    """
    removed: list[int] = []
    valid = 0
    for step in steps(run):
        if valid < max(2, keep):
            try:
                _quick(folder(run, step))
                valid += 1
            except ThreefoldError:
                pass
            continue
        if step == spare:
            continue
        try:
            remove(folder(run, step))
            removed.append(step)
        except (DiskError, OSError) as error:
            warn(f"could not remove the old checkpoint of step {step}: {error}")
    return removed


def remove(path: Path) -> None:
    """Take a checkpoint away: first its name, in one step, then its files."""
    files.remove_tree(files.move_to_trash(path))


def _quick(path: Path) -> None:
    """Manifest and sizes, without reading every byte: enough to count a checkpoint that this process wrote or
    verified."""
    for name, entry in _manifest(path)["files"].items():
        if not files.is_regular(path / name) or (path / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"`{path / name}` does not have the size in its manifest")


def _size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
