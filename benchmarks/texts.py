"""The texts that are trained on: one UTF-8 file each, the same for both sides.

Decisions:
- Texts are NFC, with line feeds and without control characters, so that threefold's cleaning leaves them as they are
  and both sides see the same characters.
- The last tenth by character, from int(0.9 n), is held out.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHARACTERS = 1_100_000
QUICK_CHARACTERS, PAGE = 60_000, 1000
DATA_SETS = ("shakespeare", "nsmc", "python")
NOT_LIBRARY = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class Absent(Exception):
    """Something that a measure needs is not on this machine."""


def shared(name: str) -> Path:
    """The path of a file of the shared data; raises Absent where it is not."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("THREEFOLD_DATA") or beside)
    if not (folder / name).is_file():
        raise Absent(f"the shared data `{name}` is not in `{folder}`; set THREEFOLD_DATA to the folder that holds it")
    return folder / name


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def start_of(path: Path, folder: Path) -> Path:
    """A file with the first QUICK_CHARACTERS of another's texts, plain or compressed, in pieces of a page each."""
    texts: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        while sum(map(len, texts)) < QUICK_CHARACTERS and (line := file.readline()):
            texts.append(json.loads(line)["text"])
    text = "\n".join(texts)[:QUICK_CHARACTERS]
    pages = ({"text": text[first:first + PAGE]} for first in range(0, len(text), PAGE))
    return write_lines(pages, folder / f"start-{path.stem.partition('.')[0]}.jsonl")


def text_file(data_set: str, folder: Path, *, quick: bool = False) -> Path:
    """The file of a data set: the shared one where it serves as it is, else one written to `folder`."""
    if data_set == "shakespeare" and not quick:
        return shared("shakespeare/input.txt")
    limit = QUICK_CHARACTERS if quick else CHARACTERS
    if data_set == "shakespeare":
        text = read(shared("shakespeare/input.txt"))
    elif data_set == "nsmc":
        text = "\n".join(reviews(shared("nsmc/ratings_train.txt")))
    else:
        text = "\n".join(library(2 * limit))
    path = folder / f"{data_set}.txt"
    path.write_bytes(clean(text)[:limit].encode())
    return path


def read(path: Path) -> str:
    """A whole file, its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def halves(text: str) -> tuple[str, str]:
    """The part that is trained on, and the last tenth."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def clean(text: str) -> str:
    """NFC, line feeds, no control characters but tab and line feed, no byte order mark."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def reviews(path: Path) -> Iterator[str]:
    """The documents of a file of ratings (id, document, label), in order, empty ones left out."""
    for line in read(path).split("\n")[1:]:
        fields = line.split("\t")
        if len(fields) == 3 and fields[1]:
            yield fields[1]


def library(enough: int) -> Iterator[str]:
    """The running Python's own documentation, then its library's source by sorted path, until `enough` characters."""
    from pydoc_data.topics import topics

    count = 0
    for name in sorted(topics):
        count += len(topics[name])
        yield topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if count > enough:
            return
        if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            count += len(text)
            yield text
