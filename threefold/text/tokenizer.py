"""The tokenizer: text -> ids -> text, over the `tokenizers` library, whatever it was trained or loaded from.

Decisions:
- A tokenizer is its tokenizer.json. It is held as data; the library's object is made when it is needed.
- User text never becomes a special token. `encode` and `encode_document` use a second object in which special
  tokens cannot be matched: `<|endoftext|>` in a corpus is thirteen characters. `encode(text, special=True)` parses
  them.
- A prompt is opened by what tokenizer.json itself puts before a text, here, in generation and in transformers; only an
  empty one, which has nothing to be continued, begins with bos like a document.
- A document is framed with one bos and one eos, where the tokenizer declares them (BERT's [CLS] and [SEP] are its
  two); a tokenizer without an eos cannot frame a document, and says so.
- Characters and bytes are looked up in a table; other kinds go to the library in batches, which it shares out among
  threads. A long document is cut for that where no token can reach across: between a letter and the line end behind
  it.
- The library's panics are errors of this package; ids are numpy arrays where there are many.
- The saved directory names the class `PreTrainedTokenizerFast`, which makes transformers take tokenizer.json as it
  is. `byte` and `char` are in the same format; llama.cpp reads `bpe`, but neither `byte`, `char` nor our
  `wordpiece` and `unigram`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tokenizers

from threefold import files
from threefold.errors import TokenizerError
from threefold.text import conventions, guard, import_tokenizer
from threefold.text.guard import Spec
from threefold.text.plain import LONG, batches, can_be_cut, check_text, cut, plain_spec
from threefold.text.tokenizer_json import (
    BYTE_SIGNS,
    PARTS,
    SPACE,
    Roles,
    declared_roles,
    named_roles,
    read_config,
    size_of,
)
from threefold.text.train_tokenizer import KINDS, train

__all__ = ["KINDS", "Tokenizer"]

Ids = npt.NDArray[np.int32]

_MISSING = -1  # in the table of characters


class Tokenizer:
    """Text to ids and back. Made by `train` or `load`; unchangeable."""

    def __init__(
        self,
        spec: Spec,
        roles: Mapping[str, str] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        name: str = "tokenizer.json",
    ) -> None:
        """`spec` is a checked tokenizer.json, `roles` says which token plays which of `PARTS`."""
        self.spec = spec
        self.config = dict(config or {})
        self.notes = list(notes)
        self._name = name
        known = self._vocab
        self.roles: Roles = {part: token for part, token in (roles or {}).items() if part in PARTS and token in known}

    # ---------------------------------------------------------------------------------------- made from

    @classmethod
    def train(
        cls,
        kind: str,
        texts: Iterable[str],
        vocab_size: int = 8192,
        *,
        special: Sequence[str] = (),
        roles: Mapping[str, str] | None = None,
        pattern: str = "gpt2",
        lowercase: bool = False,
    ) -> Tokenizer:
        """Learn a tokenizer of one of `KINDS` from texts, with at most `vocab_size` ids; the same in every process.

        special     further special tokens, at the end of the vocabulary
        roles       parts that tokens play beyond the kind's own, such as {"mask": "<mask>"}; their tokens are added
        pattern     bpe: how text is cut into words, `gpt2` (default) or `qwen2`
        lowercase   wordpiece: forget case

        What the user should know is in `notes`. Raises `UsageError` and `TokenizerError`.
        """
        wanted = dict(roles or {})
        trained = train(
            kind,
            texts,
            vocab_size,
            special=list(dict.fromkeys([*special, *wanted.values()])),
            pattern=pattern,
            lowercase=lowercase,
        )
        return cls(trained.spec, {**trained.roles, **wanted}, notes=trained.notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a directory, a tokenizer.json, a SentencePiece .model, or an older file of GPT-1, GPT-2,
        BERT or tiktoken. Raises `TokenizerError` for what is damaged, too large or of no known kind.
        """
        path = Path(path)
        if not path.exists():
            raise TokenizerError(f"there is no tokenizer `{path}`", hint="give a model directory or a tokenizer file")
        folder, notes = path if path.is_dir() else path.parent, list[str]()
        in_directory = path.is_dir() or path.name == "tokenizer.json"
        config = conventions.written_out(folder, read_config(folder)) if in_directory else {}
        main = path / "tokenizer.json" if path.is_dir() else path
        if main.is_file() and main.suffix == ".json" and not any(main.name in pair for pair in import_tokenizer.PAIRS):
            spec = guard.checked(guard.parse_json(guard.read_bytes(main), main), main)
            roles = named_roles([token["content"] for token in spec["added_tokens"] if token.get("special")])
        else:
            found = import_tokenizer.find(path) if path.is_dir() else [path]
            main = found[0]
            spec, roles, notes = import_tokenizer.read_foreign(found, config)
            spec = guard.checked(spec, main, probe=False)
        # What a tokenizer_config.json declares is all there is; names are looked at where nobody declared anything.
        roles = declared_roles(config) or roles
        return cls(spec, roles, config=config, notes=notes, name=str(main))

    def grow(self, texts: Iterable[str], count: int) -> Tokenizer:
        """A tokenizer with up to `count` further pieces, learnt from `texts`; every id that was keeps its piece.

        bpe goes on merging what its pieces leave of the new text; char takes the most frequent new characters. Raises
        `TokenizerError` for other kinds.
        """
        from threefold.text.grow_tokenizer import grow

        grown = grow(self.spec, self.kind, texts, count)
        return Tokenizer(grown.spec, self.roles, config=self.config, notes=grown.notes, name=self._name)

    FILES = ("tokenizer.json", "tokenizer_config.json")

    def save(self, folder: str | os.PathLike[str], *, context: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, each as a whole; `context` becomes `model_max_length`."""
        folder = files.make_dirs(folder)
        config = {
            name: value
            for name, value in self.config.items()
            if name not in ("auto_map", "tokenizer_file", "name_or_path")
        }
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{part}_token": self.roles[part] for part in PARTS if part in self.roles},
        }
        config.setdefault("clean_up_tokenization_spaces", False)
        if context is not None:
            config["model_max_length"] = context
        files.write_atomic(folder / "tokenizer.json", self.json)
        files.write_atomic(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    # ---------------------------------------------------------------------------------------- what it is

    @cached_property
    def json(self) -> str:
        """tokenizer.json, the same text for the same tokenizer."""
        return json.dumps(self.spec, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides about ids: tokenizer.json, and the tokens that frame a document."""
        framing = {part: self.roles.get(part) for part in ("bos", "eos", "cls", "sep")}
        return hashlib.sha256(json.dumps([self.spec, framing], sort_keys=True).encode()).hexdigest()

    @cached_property
    def kind(self) -> str:
        """One of `KINDS`, or `word` for a list of whole words."""
        model = self.spec["model"]
        if model["type"] != "BPE":
            return {"WordPiece": "wordpiece", "Unigram": "unigram"}.get(model["type"], "word")
        if model["merges"] or self.spec.get("normalizer"):
            return "bpe"
        if self.is_byte_level:
            return "byte" if self.spec["pre_tokenizer"].get("use_regex") is False else "bpe"
        return "char" if self.spec.get("pre_tokenizer") is None and not model.get("byte_fallback") else "bpe"

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, special tokens included."""
        return size_of(self.spec)

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, which parses special tokens; for reading, not for changing."""
        return guard.build(self.spec, self._name)

    def token_id(self, part: str) -> int | None:
        """The id of the token that plays a part (`bos`, `eos`, `unk`, `sep`, `pad`, `cls`, `mask`), or None."""
        return self._vocab.get(self.roles.get(part, ""))

    bos_token = property(
        lambda self: self.roles.get("bos", self.roles.get("cls")), doc="What begins a document, or None."
    )
    eos_token = property(
        lambda self: self.roles.get("eos", self.roles.get("sep")), doc="What ends a document, or None."
    )
    pad_token = property(lambda self: self.roles.get("pad"), doc="What fills up a batch, or None.")
    unk_token = property(lambda self: self.roles.get("unk"), doc="What stands for the unknown, or None.")
    mask_token = property(lambda self: self.roles.get("mask"), doc="What hides a token, or None.")

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, or None."""
        return self._vocab.get(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, or None."""
        return self._vocab.get(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """The id that fills up a batch, or None."""
        return self.token_id("pad")

    @property
    def unk_id(self) -> int | None:
        """The id of what is unknown, or None."""
        return self.token_id("unk")

    @property
    def mask_id(self) -> int | None:
        """The id that hides a token, or None."""
        return self.token_id("mask")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(token["id"] for token in self.spec["added_tokens"] if token.get("special"))

    @cached_property
    def _vocab(self) -> dict[str, int]:
        vocab = self.spec["model"]["vocab"]
        pieces = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        return pieces | {token["content"]: token["id"] for token in self.spec["added_tokens"]}

    @cached_property
    def _pieces(self) -> list[str | None]:
        pieces: list[str | None] = [None] * self.vocab_size
        for piece, number in self._vocab.items():
            pieces[number] = piece
        return pieces

    def piece(self, number: int) -> str | None:
        """How the vocabulary writes an id, or None."""
        return self._pieces[number] if 0 <= number < len(self._pieces) else None

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether pieces are written in bytes and decoded as such."""
        return (self.spec.get("decoder") or {}).get("type") == "ByteLevel"

    # ---------------------------------------------------------------------------------------- text -> ids

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text, without bos and eos; with `special`, spellings of special tokens become those tokens."""
        check_text(text)
        if special:
            with guard.reported(self._name, "encode with"):
                ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            return ids
        return cast(list[int], self._encode_all([text])[0].tolist())

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text as the vocabulary writes them."""
        return [self._pieces[i] or "" for i in self.encode(text)]

    def encode_document(self, text: str) -> Ids:
        """The ids of a document, framed: (n,) int32. Raises `TokenizerError` if the tokenizer has no eos."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """The framed ids of each document, the same as one by one."""
        return list(self.iter_documents(texts))

    def iter_documents(self, texts: Iterable[str]) -> Iterator[Ids]:
        """The framed ids of documents that come one after another; some megabytes of text are held at a time."""
        eos = self.eos_id
        if eos is None:
            raise TokenizerError(
                f"`{self._name}` has no end-of-text token, so a document cannot be framed",
                hint="name one as `eos_token` in tokenizer_config.json, or train a tokenizer",
            )
        first = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
        last = np.array([eos], np.int32)
        for batch in batches(texts):
            for ids in self._encode_all(batch):
                yield np.concatenate([first, ids, last])

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The special tokens that tokenizer.json, and so transformers, puts before a text."""
        with guard.reported(self._name, "encode with"):
            framed = self.backend.encode("a", add_special_tokens=True)
        marked = zip(framed.ids, framed.special_tokens_mask, strict=True)
        return tuple(number for number, _ in takewhile(lambda pair: pair[1], marked))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued: `opening`, the text, and an open end; an empty one begins with
        bos, if there is one. Spellings of special tokens stay text."""
        ids = [*self.opening, *self.encode(text)]
        return ids or ([] if self.bos_id is None else [self.bos_id])

    def _encode_all(self, texts: Sequence[str]) -> list[Ids]:
        for text in texts:
            check_text(text)
        if self.kind == "byte":
            return [self._byte_table[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        if self.kind == "char":
            return [self._look_up(text) for text in texts]
        counts: list[int] = []

        def parts() -> Iterator[str]:
            for text in texts:
                counts.append(0)
                for part in cut(text) if len(text) > LONG and self._can_be_cut else (text,):
                    counts[-1] += 1
                    yield part

        with guard.reported(self._name, "encode with"):
            # The library's own result takes ten times the memory of its text, so no batch of it outlives its ids.
            found = iter(
                [
                    np.array(encoding.ids, np.int32)
                    for batch in batches(parts())
                    for encoding in self._plain.encode_batch_fast(batch, add_special_tokens=False)
                ]
            )
        return [
            arrays[0] if len(arrays := list(islice(found, count))) == 1 else np.concatenate(arrays) for count in counts
        ]

    def _look_up(self, text: str) -> Ids:
        ids: Ids = self._char_table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if self.unk_id is None:
            return cast(Ids, ids[ids != _MISSING])
        unknown = ids == _MISSING
        if unknown.any():
            ids[unknown] = self.unk_id
        return ids

    @cached_property
    def _byte_table(self) -> Ids:
        return np.array([self._vocab[sign] for sign in BYTE_SIGNS], np.int32)

    @cached_property
    def _char_table(self) -> Ids:
        table = np.full(0x110000, _MISSING, np.int32)
        for piece, number in self.spec["model"]["vocab"].items():
            if len(piece) == 1:
                table[ord(piece)] = number
        return table

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The library's tokenizer without special tokens."""
        plain = guard.build(plain_spec(self.spec), self._name)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _can_be_cut(self) -> bool:
        return can_be_cut(self.spec)

    # ---------------------------------------------------------------------------------------- ids -> text

    def decode(self, ids: Sequence[int] | Ids, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids beyond the vocabulary have none. Raises `TokenizerError` for what is no id."""
        numbers = np.asarray(ids)
        if numbers.size and (
            numbers.dtype.kind not in "iu" or numbers.ndim != 1 or int(numbers.min()) < 0 or int(numbers.max()) >= 2**32
        ):
            raise TokenizerError(
                f"ids are whole numbers from 0 in one row; got {numbers.dtype} in shape {numbers.shape}"
                + (f" from {numbers.min()} to {numbers.max()}" if numbers.dtype.kind in "iu" else ""),
                hint="labels of -100 are not ids: leave them out before decoding",
            )
        if self.kind in ("byte", "char"):
            table = self._table if skip_special_tokens else self._full_table
            return b"".join([table[i] or b"" for i in numbers.tolist() if i < len(table)]).decode(
                "utf-8", errors="replace"
            )
        with guard.reported(self._name, "decode with"):
            text: str = self.backend.decode(numbers.tolist(), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, *, special: bool = False) -> list[bytes | None]:
        """For each id the bytes of its text; None for special tokens (unless `special`) and ids without a token.

        For wordpiece a piece that begins a word has the space in front, as in decoded text.
        """
        return list(self._full_table if special else self._table)

    @cached_property
    def _table(self) -> list[bytes | None]:
        return [
            None if i in self.special_ids or piece is None else self._bytes_of(piece)
            for i, piece in enumerate(self._pieces)
        ]

    @cached_property
    def _full_table(self) -> list[bytes | None]:
        return [self._bytes_of(piece) if piece is not None else None for piece in self._pieces]

    @cached_property
    def _spaced(self) -> bool:
        """Whether `▁` stands for a space."""
        return SPACE in json.dumps([self.spec.get("decoder"), self.spec.get("pre_tokenizer")], ensure_ascii=False)

    @cached_property
    def _falls_back(self) -> bool:
        return bool(self.spec["model"].get("byte_fallback"))

    def _bytes_of(self, piece: str) -> bytes:
        if self.is_byte_level:
            data = [_SIGN_BYTES.get(sign) for sign in piece]
            return bytes(cast(list[int], data)) if None not in data else piece.encode()
        if self._falls_back and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._spaced:
            return piece.replace(SPACE, " ").encode()
        model = self.spec["model"]
        if model["type"] == "WordPiece":
            prefix = model["continuing_subword_prefix"]
            return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else b" " + piece.encode()
        suffix = model.get("end_of_word_suffix")
        return (piece.removesuffix(suffix) + " ").encode() if suffix and piece.endswith(suffix) else piece.encode()


_SIGN_BYTES = {sign: byte for byte, sign in enumerate(BYTE_SIGNS)}
