"""Marian's translation tokenizers -> one tokenizer.json for the texts that are read, one for those that are said.

A directory holds two SentencePiece models, source.spm and target.spm, and vocab.json, which gives the pieces of both
their ids. `>>fr<<` in front of a text names the language to translate into; it is one id, and so is a wrong one.

Decisions:
- Both files hold every id. A piece that only the other side knows bears a mark there, which no text can hold, because
  the rules on text replace it; the decoder takes it off. So one file decodes what either has encoded.
- In the code of a language a mark stands for the first `>`. The rules put it there where the code begins a text:
  elsewhere the same letters are text.
- Marian writes a space behind each special token and none at the ends; the decoder does so too.
- A character that one side does not know has an id all the same where the other side knows it: in transformers, if it
  stands alone between known ones. So it does here, by a mark that the rules put in front of it. A longer run of unknown
  characters is `<unk>`, also where transformers finds the whole run among the pieces of the other side.
- A piece of a SentencePiece model that vocab.json does not know cannot be had: other pieces stand for its text. It is
  announced, because transformers chooses it and then says `<unk>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from threefold.errors import TokenizerError
from threefold.text.guard import MAX_PATTERN, MAX_VOCAB, Spec, parse_json, read_bytes
from threefold.text.sentencepiece_model import BYTE, NORMAL, USER, Model, charsmap_rules, read_model
from threefold.text.tokenizer_json import SPACE, Roles, added, spec_of, template

Side = Literal["source", "target"]
TARGET = "target_tokenizer.json"  # the name under which the second one is saved

# Noncharacters: of pieces that no text reaches, of those that a rule leads to, of codes and of a wrong one; behind a special
# token; what a mark in a text becomes; beside a character that may be alone.
KEPT, _ALONE, _FIRST, _WRONG, _BEHIND, _NEVER, _LEFT, _RIGHT = (chr(0xFDD3 + i) for i in range(8))
_CODE = f"{_FIRST}(?m:.*?)<<|{_WRONG}"
_CHUNK = MAX_PATTERN - 100  # characters of one pattern


def read_marian(path: Path, side: Side, config: Mapping[str, Any]) -> tuple[Spec, Roles, list[str]]:
    """(tokenizer.json, part -> token, notes) for one side of the directory that `path`, a file in it, stands in.

    Raises `TokenizerError`.
    """
    folder = path.parent
    if config.get("separate_vocabs"):
        raise TokenizerError(
            f"`{folder}` has a vocabulary of its own for each side; one for both is read",
            hint="models with one vocab.json, as most are, can be used",
        )
    vocab = _vocabulary(folder / "vocab.json")
    model = read_model(folder / f"{side}.spm")
    if not model.unigram:
        raise TokenizerError(
            f"`{folder / f'{side}.spm'}` is a SentencePiece model of type 2 (bpe); Marian's of type 1 (unigram) are read",
            hint="the published directory of a Marian model holds two unigram models",
        )
    known = {piece: score for piece, score, sort in model.pieces if sort in (NORMAL, BYTE)}
    low = model.lowest - 200
    known |= {piece: low for piece, _, sort in model.pieces if sort == BYTE}
    users = [piece for piece, _, sort in model.pieces if sort == USER and piece in vocab]
    special: list[str] = [token for token in ("</s>", "<unk>", "<pad>") if token in vocab]
    plain = {*known, *users, *special}
    pieces = sorted(vocab, key=vocab.__getitem__)
    alone = [] if model.with_bytes else [piece for piece in pieces if len(piece) == 1 and piece not in plain]
    codes = [piece for piece in pieces if piece.startswith(">>") and piece.endswith("<<")]
    marked = {piece: KEPT + piece for piece in pieces if piece not in plain}
    marked |= {piece: _ALONE + piece for piece in alone} | {code: _FIRST + code[1:] for code in codes}
    scores: list[list[Any]] = [[marked.get(piece, piece), known.get(piece, 0.0)] for piece in pieces]
    lacking = [piece for piece in known if piece not in vocab]
    notes = [
        f"{len(lacking):,} pieces of {side}.spm, such as {lacking[0]!r}, have no id in vocab.json: their text is cut into "
        "other pieces, where transformers gives `<unk>`"
    ] if lacking else []
    spec = spec_of(
        {"type": "Unigram", "unk_id": vocab["<unk>"], "vocab": scores, "byte_fallback": model.with_bytes},
        [*(added(token, vocab[token]) for token in special), *(added(piece, vocab[piece], special=False) for piece in users)],
        normalizer={"type": "Sequence", "normalizers": [*_rules(model, codes), *_marking(model, alone)]},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": rf"\A(?:{_CODE})"},
            "behavior": "Isolated",
            "invert": False,
        },
        post_processor=_frame(vocab),
        decoder={"type": "Sequence", "decoders": list(_decoders(special))},
    )
    return spec, {part: token for part, token in (("eos", "</s>"), ("unk", "<unk>"), ("pad", "<pad>")) if token in vocab}, notes


def unmarked(piece: str) -> str:
    """A piece as vocab.json writes it."""
    return piece.lstrip(KEPT + _ALONE).replace(_FIRST, ">")


def spellings(piece: str) -> tuple[str, ...]:
    """The ways in which a tokenizer.json may write a piece of vocab.json."""
    return piece, KEPT + piece, _ALONE + piece, _FIRST + piece[1:]


def _vocabulary(path: Path) -> dict[str, int]:
    vocab = parse_json(read_bytes(path), path)
    if (
        not isinstance(vocab, dict)
        or not {"</s>", "<unk>"} <= vocab.keys()
        or len(vocab) > MAX_VOCAB
        or sorted(map(str, vocab.values())) != sorted(map(str, range(len(vocab))))
    ):
        raise TokenizerError(
            f"`{path}` should give each piece an id, from 0 on without a gap, `</s>` and `<unk>` among them",
            hint="expected vocab.json of a Marian model",
        )
    return {str(piece): int(number) for piece, number in vocab.items()}


def _rules(model: Model, codes: list[str]) -> Iterator[Spec]:
    """The rules on text: the language's code, SentencePiece's map of characters, and its ways with white space."""
    yield _replace(f"[{KEPT}-{_RIGHT}]", _NEVER)
    for some in _chunks([re.escape(code[1:]) for code in codes]):
        yield _replace(rf"\A>(?={some})", _FIRST)
    yield _replace(r"\A>>(?m:.*?)<<", _WRONG)
    yield from charsmap_rules(model)
    if model.trims:
        yield _replace(rf"\A(?>(?:{_CODE})?)\K +| +\z", "")
        yield _replace(" {2,}", " ")
    if model.space_in_front:
        yield _replace(rf"\A(?>(?:{_CODE})?)\K(?m:(?=.))", SPACE)
    if model.escapes:
        yield _replace(" ", SPACE)


def _marking(model: Model, alone: list[str]) -> Iterator[Spec]:
    """A mark in front of each of these characters that has known ones, or an end, on both sides."""
    if alone:
        known = list(_classes(piece for piece, _, sort in model.pieces if sort == NORMAL and len(piece) == 1))
        for some in _classes(alone):
            yield _replace(f"(?=[{some}])", _LEFT)
        for some in known:
            yield _replace(rf"{_LEFT}(?m:.)\K(?=[{some}]|\z)", _RIGHT)
        for some in known:
            yield _replace(rf"(?<![^{some}]){_LEFT}(?=(?m:.){_RIGHT})", _ALONE)
        yield _replace(f"[{_LEFT}{_RIGHT}]", "")


def _classes(signs: Iterable[str]) -> Iterator[str]:
    """The insides of character classes that hold these characters, in as many as keep the limit on a pattern."""
    spans: list[list[int]] = []
    for code in sorted(map(ord, signs)):
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    inside = ""
    for first, last in spans:
        written = "-".join([rf"\x{{{code:x}}}" if code < 128 else chr(code) for code in dict.fromkeys((first, last))])
        if len(inside) + len(written) > _CHUNK:
            yield inside
            inside = ""
        inside += written
    if inside:
        yield inside


def _chunks(words: list[str]) -> Iterator[str]:
    """Alternatives of a pattern, in as many patterns as keep the limit on one."""
    some: list[str] = []
    for word in words:
        if some and sum(map(len, some)) + len(some) + len(word) > _CHUNK:
            yield "|".join(some)
            some = []
        some.append(word)
    if some:
        yield "|".join(some)


def _frame(vocab: Mapping[str, int]) -> Spec:
    """`text </s>`, and two texts as one."""
    frame = template(None, ("</s>", vocab["</s>"]))
    first, second, end = ({"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}, frame["single"][-1])
    return {**frame, "pair": [first, second, end]}


def _decoders(special: list[str]) -> Iterator[Spec]:
    for token in special:
        yield {"type": "Replace", "pattern": {"String": token}, "content": token + _BEHIND}
    yield _replace(f"[{KEPT}{_ALONE}]", "")
    yield _replace(_FIRST, ">")
    yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    yield _replace(f"{_BEHIND} ?", " ")
    yield _replace(r"\A\s+|\s+\z", "")


def _replace(pattern: str, content: str) -> Spec:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
