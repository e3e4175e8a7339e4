"""What a user names as data -> the files that it stands for.

Decisions:
- Files come in the order of their paths, so that the same folder gives the same documents on every machine.
- From a folder or a glob, hidden files and formats that hold no text are passed over; a file that is named is taken
  as it is.
- `python` is the standard library of the running interpreter without tests, idlelib and site-packages: the corpus
  that every machine has.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from threefold.errors import DataError, UsageError, did_you_mean
from threefold.text.lines import COMPRESSED, unreadable
from threefold.text.rows import FORMATS

TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".mdx",
        ".rst",
        ".adoc",
        ".org",
        ".tex",
        ".log",
        ".srt",
        ".vtt",
        ".html",
        ".htm",
        ".xml",
        ".css",
        ".po",
        ".py",
        ".pyi",
        ".pyx",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".cu",
        ".cs",
        ".java",
        ".kt",
        ".scala",
        ".go",
        ".rs",
        ".swift",
        ".m",
        ".mm",
        ".js",
        ".mjs",
        ".jsx",
        ".ts",
        ".tsx",
        ".php",
        ".rb",
        ".pl",
        ".lua",
        ".r",
        ".jl",
        ".hs",
        ".ml",
        ".ex",
        ".exs",
        ".erl",
        ".clj",
        ".lisp",
        ".el",
        ".scm",
        ".sql",
        ".sh",
        ".bash",
        ".zsh",
        ".fish",
        ".ps1",
        ".bat",
        ".cmake",
        ".mk",
        ".dockerfile",
        ".proto",
        ".toml",
        ".yaml",
        ".yml",
        ".ini",
        ".cfg",
        ".conf",
        ".properties",
        ".gradle",
        ".tf",
        ".vue",
        ".svelte",
        ".dart",
        ".zig",
        ".nim",
        ".v",
        ".sv",
        ".vhd",
        ".asm",
        ".s",
        ".f90",
        ".f",
    ]
)
_PYTHON_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "pydoc_data",
}


@dataclass(frozen=True)
class Source:
    """A path as the user put it, with its share of a mixture or None."""

    path: str
    share: float | None = None


def parse_source(spec: str) -> Source:
    """`PATH` or `PATH:SHARE`; a colon and a number at the end are a share. Raises `UsageError` for a share that is
    none."""
    path, colon, share = str(spec).rpartition(":")
    if (
        colon
        and path
        and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", share, re.IGNORECASE)
        and not Path(spec).exists()
    ):
        if not 0 < float(share) < float("inf"):
            raise UsageError(
                f"`{spec}`: the share is {share}, expected a number above 0",
                hint="shares are relative: `a.txt:2 b.txt:1`",
            )
        return Source(path, float(share))
    if not str(spec).strip():
        raise UsageError("the name of a source is empty", hint="give a file, a folder, a glob, `python` or `hub:NAME`")
    return Source(str(spec))


def parse_columns(spec: str) -> dict[str, str]:
    """`ours=theirs,ours=a+b` -> `{ours: theirs, ...}`. Raises `UsageError`."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs) or ours in columns:
            raise UsageError(
                f"`{part}` does not name a column", hint="write `--columns ours=theirs,...`, each of ours once"
            )
        columns[ours] = theirs
    return columns


def expand(spec: str | os.PathLike[str]) -> list[Path]:
    """The files that a file, folder, glob or `python` stands for, in order. Raises `DataError` if there is none.

    `hub:NAME` stands for no files and gives an empty list.
    """
    text = os.fspath(spec)
    if text.startswith("hub:"):
        return []
    path = Path(text).expanduser()
    if text == "python" and not path.exists():
        return python_files()
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists():
            return [path]
    except OSError as error:
        raise unreadable(path, error) from error
    if glob.has_magic(text):
        found = [file for name in sorted(glob.glob(str(path), recursive=True)) if (file := Path(name)).is_file()]
        if not found:
            raise DataError(
                f"no file matches `{text}`", hint="put a glob between quotes, and use `**` to reach into folders"
            )
        return found
    siblings = sorted(entry.name for entry in path.parent.iterdir())[:10_000] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings) if siblings else f"there is no folder `{path.parent}` either"
    raise DataError(
        f"there is no file or folder `{text}`",
        hint=hint
        if hint.startswith("did") or not siblings
        else "give a file, a folder, a glob, `python` or `hub:NAME`",
    )


def _folder(path: Path) -> list[Path]:
    found, others, seen = [], set(), set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back to where we have been
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            if not name.startswith("."):
                file = Path(folder, name)
                (found.append(file) if _holds_text(file) else others.add(file.suffix or file.name))
    if not found:
        there = f"it holds {', '.join(f'`{name}`' for name in sorted(others)[:8])}" if others else "it is empty"
        raise DataError(
            f"the folder `{path}` holds no file of text: {there}",
            hint="text is looked for in .txt, .md, .jsonl, .csv, .tsv, .parquet and source files; "
            "name other files one by one",
        )
    return sorted(found)


def _holds_text(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] != ".json" and suffixes[-1] in TEXT_SUFFIXES | FORMATS.keys()


def python_files() -> list[Path]:
    """The source files of the running Python's standard library, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _PYTHON_LEFT_OUT)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if len(found) < 100:
        raise DataError(
            f"the running Python has no source of its standard library in `{root}`",
            hint="give other text with --data, or run under a Python that was installed with its library",
        )
    return sorted(found)
