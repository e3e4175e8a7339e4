"""Reading JSON that somebody else wrote: bounded in size, depth and number of keys, with nothing ambiguous in it.

Decisions:
- The size is looked at before the file is read, the depth and the number of keys before it is parsed: a file made to
  exhaust memory or the stack costs no more than one pass over its bytes.
- `NaN`, `Infinity` and a key that stands twice in one object are refused: two readers would understand them
  differently.
- A UTF-8 byte order mark is refused by name rather than by a parser's riddle.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from threefold.errors import ModelError, ThreefoldError

DEPTH_LIMIT = 64
KEY_LIMIT = 200_000
# A string that is not closed matches too, up to the end, and nothing is given back: no byte is looked at twice.
_SIGNS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}:]', re.DOTALL)


def read_json(path: str | os.PathLike[str], limit: int = 4 * 2**20, *, error: type[ThreefoldError] = ModelError) -> Any:
    """The value in a JSON file of at most `limit` bytes; raises `error` (a `ModelError` unless said) that names the
    file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as problem:
        raise error(f"cannot read `{path}`: {(problem.strerror or str(problem)).lower()}") from problem
    if len(data) > limit:
        raise error(f"`{path}` is larger than {limit:,} bytes, too large for what it should hold",
                    hint="is this the file that the model was published with?")
    return parse_json(data, str(path), error=error)


def read_object(path: str | os.PathLike[str], *, error: type[ThreefoldError] = ModelError) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file. Raises `error` for a file that holds something else."""
    if not os.path.isfile(path):
        return {}
    found = read_json(path, error=error)
    if not isinstance(found, dict):
        raise error(f"`{path}` holds no object")
    return found


def parse_json(data: bytes, name: str, *, error: type[ThreefoldError] = ModelError) -> Any:
    """The value of JSON text in UTF-8; `name` is what error messages call it."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"`{name}` begins with a byte order mark, which JSON does not allow", hint="save it as plain UTF-8")
    depth = keys = 0
    for sign in _SIGNS.finditer(data):
        char = sign[0]
        if char in b"[{":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise error(f"`{name}` is nested more than {DEPTH_LIMIT} levels deep")
        elif char in b"]}":
            depth -= 1
        elif char == b":":
            keys += 1
            if keys > KEY_LIMIT:
                raise error(f"`{name}` has more than {KEY_LIMIT:,} keys")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise error(f"`{name}` is not valid JSON: {problem}") from problem


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key `{key[:100]}` stands twice")
        result[key] = value
    return result


def _no_constant(word: str) -> Any:
    raise ValueError(f"`{word}` is not a number in JSON")
