"""Where the keys of a TOML file stand.

The standard library's reader gives values without places, and an error that names no line is half an error. The text is
known to be valid TOML here, so that a scanner of tokens suffices.
"""

from __future__ import annotations

import re
import tomllib

Keys = tuple[str, ...]

_TOKEN = re.compile(r"""
    \"{3} (?: \\. | [^\\] )*? \"{3,5}      # text over several lines
  | '{3} .*? '{3,5}
  | " (?: \\. | [^"\\\n] )* "              # text
  | ' [^'\n]* '
  | \# [^\n]*                              # comment
  | \n | [\[\]{},=]                        # structure
  | [^\s\[\]{},=\#"']+                     # bare key, number, date
""", re.VERBOSE | re.DOTALL)


def key_lines(text: str) -> dict[Keys, int]:
    """The line (from 1) on which each key of a valid TOML text first stands, those of inline tables too."""
    found: dict[Keys, int] = {}
    table: Keys = ()
    prefix: Keys = ()
    current: Keys = ()  # the key whose value is being read
    nesting: list[tuple[str, Keys]] = []  # open brackets of that value, with the key they belong to
    words, line, in_key, in_header = "", 1, True, False
    for token in _TOKEN.findall(text + "\n"):
        if token == "\n" and not nesting:
            if in_header:
                table = _split(words)
                found.setdefault(table, line)
            in_key, in_header, words, prefix = True, False, "", table
        elif in_key and token == "[" and not nesting:
            in_header = True
        elif in_key and token == "=":
            current = (*prefix, *_split(words))
            found.setdefault(current, line)
            in_key, words = False, ""
        elif token in ("[", "{"):
            nesting.append((token, current))
            in_key, prefix = token == "{", current
        elif token in ("]", "}") and nesting:
            nesting.pop()
            in_key = False
        elif token == "," and nesting:
            in_key, prefix = nesting[-1][0] == "{", nesting[-1][1]
        elif in_key and token not in ("]", "\n") and not token.startswith("#"):
            words += token
        line += token.count("\n")
    return found


def _split(words: str) -> Keys:
    """`a."b c".d` -> its parts, by the reader's own rules for quoting."""
    parts: list[str] = []
    inner = tomllib.loads(f"{words} = 0") if words else 0
    while isinstance(inner, dict):
        key, inner = next(iter(inner.items()))
        parts.append(key)
    return tuple(parts)
