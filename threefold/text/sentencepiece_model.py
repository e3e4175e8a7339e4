"""SentencePiece's .model files -> tokenizer.json.

Decisions:
- The file is read as what it is, a protocol buffer, by a reader of its few fields: no compiled library takes part
  in opening a foreign file.
- What SentencePiece does to white space is written out as rules on the text. Pieces are then matched over the whole
  text, which equals SentencePiece also where pieces span spaces.
- Byte pieces and unused ones get a score below every path of characters, so that the text `<0x41>` is six
  characters and not a byte.
- Where two ways to cut a text have the same score, the library may choose the other: the same pieces in another
  order.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from threefold.errors import TokenizerError
from threefold.text.guard import MAX_VOCAB, Spec, read_bytes
from threefold.text.tokenizer_json import SPACE, Roles, added, bpe_model, spec_of, template

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


def read_sentencepiece(path: Path) -> tuple[Spec, Roles]:
    """(tokenizer.json, part -> token) of a SentencePiece model. Raises `TokenizerError`."""
    data = read_bytes(path)
    try:
        model = _Message(data)
        pieces = [(part.string(1), part.float(2), part.integer(3, _NORMAL)) for part in model.messages(1)]
        trainer = next(model.messages(2), _Message(b""))
        normal = next(model.messages(3), _Message(b""))
        kind = trainer.integer(3, 1)
        rules = _space_rules(normal)
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"`{path}` is not a SentencePiece model: {error}", hint="the file is cut off or of another kind"
        ) from error
    if not 0 < len(pieces) <= MAX_VOCAB or kind not in (1, 2) or len({piece for piece, _, _ in pieces}) < len(pieces):
        raise TokenizerError(
            f"`{path}` is a SentencePiece model with {len(pieces):,} pieces of type {kind}; "
            "unigram (1) and bpe (2) are read",
            hint="is the file complete?",
        )
    if trainer.integer(24, 0):
        raise TokenizerError(
            f"`{path}` treats white space as a suffix, which no tokenizer.json can say",
            hint="train a tokenizer on its text instead",
        )
    unknown = next((i for i, (_, _, sort) in enumerate(pieces) if sort == _UNKNOWN), None)
    with_bytes = any(sort == _BYTE for _, _, sort in pieces)
    special = [
        added(piece, i, special=sort != _USER)
        for i, (piece, _, sort) in enumerate(pieces)
        if sort in (_UNKNOWN, _CONTROL, _USER)
    ]
    roles = {
        part: pieces[number][0]
        for part, number in (
            ("unk", trainer.integer(40, 0)),
            ("bos", trainer.integer(41, 1)),
            ("eos", trainer.integer(42, 2)),
            ("pad", trainer.integer(43, -1)),
        )
        if 0 <= number < len(pieces) and pieces[number][2] in (_CONTROL, _UNKNOWN)
    }
    if kind == 1:
        lowest = min((score for _, score, sort in pieces if sort == _NORMAL), default=0.0)
        scores = [[piece, lowest - 200 if sort in (_BYTE, _UNUSED) else score] for piece, score, sort in pieces]
        body: Spec = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": with_bytes}
    else:
        vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        body = bpe_model(
            vocab,
            list(_merges(pieces, vocab)),
            unk_token=pieces[unknown][0] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=with_bytes,
        )
    begin = (
        (roles["bos"], next(i for i, piece in enumerate(pieces) if piece[0] == roles["bos"]))
        if "bos" in roles and kind == 2
        else None
    )
    end = (
        (roles["eos"], next(i for i, piece in enumerate(pieces) if piece[0] == roles["eos"]))
        if "eos" in roles and kind == 1
        else None
    )
    steps: list[Spec] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normal.integer(3, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return spec_of(
        body,
        special,
        normalizer={"type": "Sequence", "normalizers": rules} if rules else None,
        post_processor=template(begin, end) if begin or end else None,
        decoder={"type": "Sequence", "decoders": steps},
    ), roles


def _space_rules(normal: _Message) -> list[Spec]:
    """SentencePiece's normaliser as rules: character map, extra white space, the space in front, spaces as `▁`."""
    rules: list[Spec] = []
    if charsmap := normal.bytes(2):
        rules.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
        # The library applies the map to one grapheme at a time and leaves some letters apart that SentencePiece joins.
        rules.append({"type": "NFC"})
    if normal.integer(4, 1):
        rules += [
            {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    if normal.integer(3, 1):
        rules.append({"type": "Prepend", "prepend": SPACE})
    if normal.integer(5, 1):
        rules.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return rules


def _merges(pieces: list[tuple[str, float, int]], vocab: Mapping[str, int]) -> Iterator[list[str]]:
    """The merges of a SentencePiece BPE: a pair may join if the whole is a piece, the highest score first."""
    ranked = sorted(
        (i for i, (piece, _, sort) in enumerate(pieces) if sort == _NORMAL and len(piece) > 1),
        key=lambda i: (-pieces[i][1], i),
    )
    for i in ranked:
        piece = pieces[i][0]
        splits = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        yield from ([a, b] for a, b in sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))


class _Message:
    """The fields of a protocol buffer message, read by number; the last of several values counts."""

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        place = 0
        while place < len(data):
            tag, place = _varint(data, place)
            if tag & 7 == 0:
                value: int | bytes
                value, place = _varint(data, place)
            else:
                size = {1: 8, 5: 4}.get(tag & 7)
                if tag & 7 == 2:
                    size, place = _varint(data, place)
                if size is None or place + size > len(data):
                    raise ValueError(f"byte {place:,} begins no field of a protocol buffer")
                value, place = data[place : place + size], place + size
            self._fields.setdefault(tag >> 3, []).append(value)

    def messages(self, number: int) -> Iterator[_Message]:
        """The messages in a field."""
        for value in self._fields.get(number, []):
            if not isinstance(value, bytes):
                raise ValueError(f"field {number} is no message")
            yield _Message(value)

    def bytes(self, number: int) -> bytes:
        """The bytes in a field, or none."""
        value = self._fields.get(number, [b""])[-1]
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} holds no bytes")
        return value

    def string(self, number: int) -> str:
        """The text in a field."""
        return self.bytes(number).decode("utf-8")

    def integer(self, number: int, otherwise: int) -> int:
        """The signed 32-bit number in a field."""
        value = self._fields.get(number, [otherwise])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} holds no number")
        return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1) if value >= 0 else value

    def float(self, number: int) -> float:
        """The 32-bit float in a field, or 0."""
        value = self._fields.get(number, [b"\0\0\0\0"])[-1]
        return float(struct.unpack("<f", value)[0]) if isinstance(value, bytes) else 0.0


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError(f"byte {place:,} begins no number")
