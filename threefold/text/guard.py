"""Limits on tokenizer files that somebody else wrote, and the one place where the library is asked to read one.

Decisions:
- Size first, then JSON, then counts and types, then the library: a file made to exhaust memory is refused before it
  can.
- Padding and truncation that a file carries are taken out: this package cuts nothing in silence, and pads batches
  itself. So is dropout of merges, which would give other ids each time.
- Text rules (regular expressions, replacements) that published tokenizers use are known by heart. Unknown ones are
  tried in a process of its own (probe_child.py) for a few seconds, on texts on which careless patterns run away.
  That is no proof: what holds in every case is the bound on backtracking within one match of the `tokenizers`
  library's engine (Oniguruma, ten million steps), which then panics, and a panic becomes a `TokenizerError` here.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from threefold.errors import TokenizerError
from threefold.text.moses import JOINING, SPLITTING

Spec = dict[str, Any]

MAX_BYTES = 128 * 2**20  # of one tokenizer file
MAX_VOCAB = 2**21  # pieces, and the highest id
MAX_MERGES = 2**22
MAX_PIECE = 1_024  # characters of one piece
MAX_ADDED = 2**17
MAX_PARTS = 64  # normalizers, pre-tokenizers, ... of one file
MAX_DEPTH = 16
MAX_REPLACEMENT = 64  # bytes that take the place of one character
MAX_PATTERN = 2_000  # characters of a regular expression
PROBE_SECONDS = 10.0

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Rules under which no word holds a letter and the line end behind it.
CUTTABLE = frozenset({GPT2_PATTERN, QWEN2_PATTERN, CL100K_PATTERN, O200K_PATTERN})
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
KNOWN_PATTERNS = frozenset(
    {
        GPT2_PATTERN,
        QWEN2_PATTERN,
        CL100K_PATTERN,
        O200K_PATTERN,
        *(
            pattern.replace(_CONTRACTIONS, "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
            for pattern in (QWEN2_PATTERN, CL100K_PATTERN, O200K_PATTERN)
        ),
        r"\p{N}{1,3}",
        r"\p{N}",
        "[0-9][0-9][0-9]",
        r"\s+",
        r"\s?\p{L}+",
        r" {2,}",
        r"\A +| +\z",
        "\n",
        " ",
        r"[\r\n]",
        r"\s?\p{P}+",
        r"\w+|[^\w\s]+",
        "(?s).",
        r"[^\n]+|[\n]+",
        "\\s{2,}|[\\n\\r\\t]",
        "\\n",
        "▁",
        "(?=▁)",
        *(pattern for pattern, _ in (*SPLITTING, *JOINING)),
    }
)
_KNOWN_REPLACED = {(" ", "▁"), ("▁", " "), ("``", '"'), ("''", '"'), (" ", ""), ("\n", "▁"), (" ", " ▁"), *SPLITTING, *JOINING}


def read_bytes(path: Path) -> bytes:
    """The bytes of a tokenizer file, at most `MAX_BYTES`; raises `TokenizerError` that names it."""
    try:
        if not path.is_file():
            raise TokenizerError(
                f"there is no tokenizer file `{path}`", hint="check the path; a model directory holds tokenizer.json"
            )
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError(
                f"`{path}` has {path.stat().st_size:,} bytes; a tokenizer file has at most {MAX_BYTES:,}",
                hint="is this a tokenizer, and the file that was published?",
            )
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read `{path}`: {(error.strerror or str(error)).lower()}") from error


def parse_json(data: bytes, name: str | os.PathLike[str]) -> Any:
    """JSON of a tokenizer file; raises `TokenizerError`. Depth is bounded by the parser, size by `read_bytes`."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise TokenizerError(
            f"`{name}` is not valid JSON: {words}", hint="the file is cut off or damaged: fetch it again"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(word: str) -> Any:
    raise ValueError(f"`{word}` is not a number in JSON")


def checked(found: Any, name: str | os.PathLike[str], *, probe: bool = True) -> Spec:
    """A tokenizer.json that keeps the limits, without padding, truncation and dropout. Raises `TokenizerError`."""
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise TokenizerError(
            f"`{name}` is no tokenizer.json: it has no `model`", hint="expected a file of the `tokenizers` library"
        )
    spec: Spec = {"version": "1.0", **found, "truncation": None, "padding": None}
    spec["model"] = model = dict(spec["model"])
    if "type" not in model:
        model = spec["model"] = {"type": _guessed_type(model), **model}
    if model.get("dropout") is not None:
        model["dropout"] = None
    _check_model(model, name)
    added = spec.setdefault("added_tokens", [])
    if (
        not isinstance(added, list)
        or len(added) > MAX_ADDED
        or not all(
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and 0 < len(token["content"]) <= MAX_PIECE
            and _is_id(token.get("id"))
            for token in added
        )
    ):
        raise TokenizerError(
            f"`{name}`: `added_tokens` should be a list of at most {MAX_ADDED:,} tokens with `id` and `content`",
            hint=f"ids are from 0 to {MAX_VOCAB:,}, contents of 1 to {MAX_PIECE} characters",
        )
    rules = list(_rules(spec, name))
    if probe and any(not _known(rule) for rule in rules):
        _probe(spec, rules, name)
    return spec


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_VOCAB


def _guessed_type(model: Mapping[str, Any]) -> str:
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _check_model(model: Spec, name: str | os.PathLike[str]) -> None:
    vocab, merges, kind = model.get("vocab"), model.get("merges", []), model["type"]
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise TokenizerError(
            f"`{name}`: the model `{kind}` is not known", hint="known: BPE, WordPiece, WordLevel, Unigram"
        )
    if not isinstance(vocab, list if kind == "Unigram" else dict) or not isinstance(merges, list):
        raise TokenizerError(f"`{name}`: the vocabulary of a {kind} model is not of the right type")
    if len(vocab) > MAX_VOCAB or len(merges) > MAX_MERGES:
        raise TokenizerError(
            f"`{name}` has {len(vocab):,} pieces and {len(merges):,} merges; "
            f"at most {MAX_VOCAB:,} and {MAX_MERGES:,} are read",
            hint="is this the file that was published?",
        )
    if kind == "Unigram":
        good = all(
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], int | float)
            for entry in vocab
        )
        pieces = [entry[0] for entry in vocab] if good else []
        good = good and all(abs(float(entry[1])) < 1e30 for entry in vocab)
    else:
        pieces = list(vocab)
        ids = list(dict(vocab).values())
        good = all(map(_is_id, ids)) and len(set(ids)) == len(ids)
    if not good:
        raise TokenizerError(
            f"`{name}`: the vocabulary should give each piece "
            + ("a score" if kind == "Unigram" else f"an id of its own from 0 to {MAX_VOCAB:,}"),
            hint="the file is damaged: fetch it again",
        )
    if kind in ("BPE", "Unigram") and "" in pieces:
        raise TokenizerError(
            f"`{name}`: the vocabulary holds an empty piece", hint="the file is damaged: fetch it again"
        )
    if pieces and max(map(len, pieces)) > MAX_PIECE:
        raise TokenizerError(
            f"`{name}`: a piece of {max(map(len, pieces)):,} characters; at most {MAX_PIECE:,} are read"
        )


def _rules(spec: Spec, name: str | os.PathLike[str]) -> Iterator[tuple[str, str, str | None]]:
    """(kind, pattern, replacement or None) of every pattern in the text rules."""
    count = 0

    def walk(part: Any, depth: int) -> Iterator[tuple[str, str, str | None]]:
        nonlocal count
        if depth > MAX_DEPTH:
            raise TokenizerError(f"`{name}`: text rules inside one another more than {MAX_DEPTH} deep")
        if isinstance(part, list):
            for inner in part:
                yield from walk(inner, depth + 1)
        elif isinstance(part, dict):
            if "type" in part:
                count += 1
                if count > MAX_PARTS:
                    raise TokenizerError(f"`{name}`: more than {MAX_PARTS} text rules")
            pattern, content = part.get("pattern"), part.get("content")
            if isinstance(pattern, dict) and len(pattern) == 1:
                ((kind, words),) = pattern.items()
                if not isinstance(words, str) or len(words) > MAX_PATTERN:
                    raise TokenizerError(
                        f"`{name}`: a pattern of more than {MAX_PATTERN:,} characters, or of a wrong type"
                    )
                yield str(kind), words, content if isinstance(content, str) else None
            if isinstance(part.get("precompiled_charsmap"), str):
                _check_charsmap(part["precompiled_charsmap"], name)
            if isinstance(part.get("prepend"), str) and part["prepend"] != "▁":
                yield "Prepend", "", part["prepend"]
            for key, inner in part.items():
                if key not in ("pattern", "precompiled_charsmap"):
                    yield from walk(inner, depth + 1)

    for key in ("normalizer", "pre_tokenizer", "decoder"):
        yield from walk(spec.get(key), 0)


def _check_charsmap(encoded: str, name: str | os.PathLike[str]) -> None:
    """SentencePiece's character map: the size of a trie, the trie, then the replacements, each ended by a zero byte."""
    try:
        data = base64.b64decode(encoded, validate=True)
        texts = data[4 + struct.unpack_from("<I", data)[0] :].split(b"\0")
    except (ValueError, struct.error) as error:
        raise TokenizerError(f"`{name}`: its character map is damaged", hint="fetch the file again") from error
    if max(map(len, texts)) > MAX_REPLACEMENT:
        raise TokenizerError(
            f"`{name}`: its character map replaces one character by {max(map(len, texts)):,} bytes",
            hint=f"at most {MAX_REPLACEMENT} are read",
        )


def _known(rule: tuple[str, str, str | None]) -> bool:
    kind, pattern, content = rule
    if kind == "Prepend":
        return False
    if content is not None and len(content) > 1 and (pattern, content) not in _KNOWN_REPLACED:
        return False
    return kind == "String" or pattern in KNOWN_PATTERNS


def _probe(spec: Spec, rules: list[tuple[str, str, str | None]], name: str | os.PathLike[str]) -> None:
    small: Spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        **{key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    signs = "".join(dict.fromkeys(char for _, pattern, _ in rules for char in pattern if char not in "\\[]{}()|?*+^$"))
    child = Path(__file__).with_name("probe_child.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(child)],
            input=json.dumps({"spec": small, "signs": signs}),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
        answer = done.stdout.strip()
    except subprocess.TimeoutExpired:
        answer = f"its text rules take more than {PROBE_SECONDS:g} s for texts of 3,000 characters"
    except OSError as error:
        answer = f"its text rules could not be tried: {error}"
    if answer != "ok":
        raise TokenizerError(
            f"`{name}` is refused: "
            + (answer or "its text rules fail (a pattern is not valid, or backtracks without end)"),
            hint="the regular expressions in `pre_tokenizer` and `normalizer` are the place to look",
        )


@contextmanager
def reported(name: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turn whatever the `tokenizers` library raises, its panics included, into a `TokenizerError`."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"cannot {doing} `{name}`: {(str(error).splitlines() or ['no reason given'])[0][:300]}",
            hint="the tokenizer's files are damaged or of a kind that the `tokenizers` library does not know",
        ) from error


def build(spec: Spec, name: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer of a checked tokenizer.json."""
    with reported(name, "read"):
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
