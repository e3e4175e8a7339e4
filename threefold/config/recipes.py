"""The recipes that come with threefold: one TOML file each, listed, read and copied by name."""

from __future__ import annotations

from pathlib import Path

from threefold import files
from threefold.errors import UsageError, did_you_mean

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def listed() -> list[tuple[str, str]]:
    """(name, what it is for): the first comment line of each."""
    return [
        (name, (FOLDER / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for name in names()
    ]


def copy(name: str, out: Path) -> Path:
    """Write a recipe to `out`; an existing file is not overwritten."""
    if name not in names():
        raise UsageError(f"no recipe `{name}`", hint=did_you_mean(name, names()))
    if out.exists():
        raise UsageError(f"`{out}` exists", hint="choose another place with --out")
    files.make_dirs(out.parent)
    files.write_atomic(out, (FOLDER / f"{name}.toml").read_bytes())
    return out
