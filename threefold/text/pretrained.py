"""A tokenizer with transformers' names and results: `AutoTokenizer.from_pretrained(...)` gives one of these.

Decisions:
- tokenizer.json is the truth about ids and about what frames a text; tokenizer_config.json adds names of special
  tokens and the side of padding. Its `add_bos_token` says nothing where there is a tokenizer.json, as in transformers
  5.
- Nothing is cut unless `truncation=True` says so; `max_length` without it is refused instead of guessed at.
- A tokenizer that encodes translations otherwise than what is translated has a second one for them, `target`, with the
  same ids; it is saved beside the first. All others encode both alike.
- What is saved is opened by its tokenizer.json alone, whatever class the directory named before.
- A chat template is used only if the directory has one; there is no default that a model was never trained on.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import tokenizers

from threefold import files
from threefold.errors import UsageError
from threefold.text import chat, conventions, guard
from threefold.text.encoded import (
    UNBOUNDED,
    Encoded,
    Options,
    Tensors,
    cleaned_up,
    content_of,
    encode_cut,
    known,
    limit_of,
    padded,
    special_tokens,
    tensor,
    width_of,
    without_nulls,
)
from threefold.text.import_marian import KEPT, TARGET, read_marian, spellings, unmarked
from threefold.text.plain import plain_spec
from threefold.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

StrPath = str | os.PathLike[str]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PretrainedTokenizer:
    """Text <-> ids, with transformers' argument names.

    `core` is the tokenizer itself; `bos_id`, `eos_id`, `token_bytes()` and `encode_prompt` serve generation and
    evaluation.
    """

    def __init__(
        self, core: Tokenizer, config: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        self.core, self.config, self.chat_template, self.templates = core, dict(config or {}), chat_template, dict[str, str]()
        self.target: PretrainedTokenizer | None = None
        self._backend = tokenizers.Tokenizer.from_str(core.backend.to_str())
        self._lock = threading.Lock()
        self._copies: dict[str, tokenizers.Tokenizer] = {}
        self._backend.no_truncation()
        self._backend.no_padding()
        self._names = {name: content_of(self.config[name]) for name in NAMED if self.config.get(name) is not None}
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        more = list(extra.values() if isinstance(extra, Mapping) else extra)
        self._extra = [content_of(token) for token in more]
        described = dict(zip(self._extra, more, strict=True)) | {token: self.config.get(name) for name, token in self._names.items()}
        self._backend.add_special_tokens(special_tokens(self._backend, described))
        self._marked = KEPT in json.dumps(core.spec.get("decoder"), ensure_ascii=False)  # Marian's, not as in vocab.json
        self.padding_side: str = self.config.get("padding_side", "right")
        self.truncation_side: str = self.config.get("truncation_side", "right")
        self.model_max_length: int = int(self.config.get("model_max_length") or UNBOUNDED)
        self.model_input_names: list[str] = list(self.config.get("model_input_names") or conventions.inputs(self.config.get("tokenizer_class")))
        self._is_bpe = type(self._backend.model).__name__ == "BPE"  # whose text such cleaning would damage
        self._cleans_up = bool(self.config.get("clean_up_tokenization_spaces", False))

    @classmethod
    def load(cls, folder: StrPath) -> PretrainedTokenizer:
        """The tokenizer of a model directory, with its names and its chat template. Raises `TokenizerError`."""
        folder = Path(folder)
        core = Tokenizer.load(folder)
        config = {key: value for key, value in core.config.items() if key != "auto_map"}
        if not (folder / "tokenizer.json").is_file():  # older files name their special tokens by convention
            config = {f"{part}_token": token for part, token in core.roles.items()} | config
        template = config.pop("chat_template", None)
        if (folder / "chat_template.jinja").is_file():
            template = guard.read_bytes(folder / "chat_template.jinja").decode("utf-8", errors="replace")
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)} if isinstance(template, list) else {"default": template}
        tokenizer = cls(core, config, named["default"] if isinstance(named.get("default"), str) else None)
        tokenizer.templates = {str(name): text for name, text in named.items() if isinstance(text, str)}
        if (folder / TARGET).is_file():
            tokenizer.target = cls(Tokenizer.load(folder / TARGET), config)
        elif config.get("tokenizer_class") == conventions.MARIAN and (folder / "target.spm").is_file():
            spec, roles, notes = read_marian(folder / "target.spm", "target", config)
            spec = guard.checked(conventions.with_tokens(spec, config, folder), folder, probe=False)
            tokenizer.target = cls(Tokenizer(spec, roles, config=core.config, notes=notes), config)
        return tokenizer

    def save_pretrained(self, folder: StrPath) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat template; returns the paths."""
        folder = files.make_dirs(folder)
        config = {**self.config, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": self.model_input_names}
        contents = {
            "tokenizer.json": self._backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        }
        if self.target is not None:
            contents[TARGET] = self.target._backend.to_str(pretty=True)
        if self.chat_template is not None:
            contents["chat_template.jinja"] = self.chat_template
        for name, content in contents.items():
            files.write_atomic(folder / name, content)
        return tuple(str(folder / name) for name in contents)

    # -- special tokens ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        names = self.__dict__.get("_names", {})
        if name in NAMED:
            return names.get(name)
        if name.endswith("_id") and name[:-3] in NAMED:
            token = names.get(name[:-3])
            return None if token is None else self._backend.token_to_id(token)
        raise AttributeError(f"a tokenizer has no `{name}`")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NAMED:
            object.__setattr__(self, name, value)
        elif value is None:
            self._names.pop(name, None)
            self.config.pop(name, None)
        elif self._backend.token_to_id(value) is None:
            raise UsageError(f"`{name}` cannot be {value!r}: the vocabulary has no such token")
        else:  # `tokenizer.pad_token = tokenizer.eos_token`
            self._names[name] = self.config[name] = value

    @property
    def notes(self) -> list[str]:
        """What a user should be told about the tokenizer."""
        return [*self.core.notes, *(self.target.notes if self.target is not None else ())]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that there are."""
        return dict(self._names)

    @property
    def all_special_tokens(self) -> list[str]:
        """The spellings of all special tokens, named and other, once each."""
        return list(dict.fromkeys([*self._names.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._id(token) for token in self.all_special_tokens]

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, or None."""
        return self.core.bos_id if self.bos_token_id is None else int(self.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, or None."""
        return self.core.eos_id if self.eos_token_id is None else int(self.eos_token_id)

    # -- vocabulary ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of ids without added ones, as transformers counts; `len(tokenizer)` counts all."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return {self._written(token): i for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each id, None for special tokens."""
        return self.core.token_bytes()

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = ...) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """The pieces that ids stand for."""
        if isinstance(ids, int):
            return self._token(ids)
        special = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._token(i) for i in map(int, ids) if i not in special]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The ids of pieces; the unknown token's id for those that are none."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False) -> list[str]:
        """The pieces of a text."""
        tokens = self._backend.encode(text, pair, add_special_tokens=add_special_tokens).tokens
        return [self._written(token) for token in tokens]

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of one text; see `__call__` for the options."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued: opened as tokenizer.json opens every text, and open at the end; an
        empty one begins with bos, if there is one.

        Spellings of special tokens stay text.
        """
        ids = [*self.core.opening, *self.core.encode(text)]
        return ids or ([] if self.bos_id is None else [self.bos_id])

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of a whole document, framed as in training."""
        return self.core.encode_document(text)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_document` of many, on all threads."""
        return self.core.encode_documents(texts)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        text_target: str | Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Encoded:
        """Ids and masks of a text or of several, or of texts and what they are to become: `text_target` alone is encoded as
        such, and beside `text` its ids are `labels`.

        add_special_tokens  True: frame each text as the model was trained on it
        padding             False; True or "longest": to the longest of the batch; "max_length": to `max_length` or the
                            model's own; `pad_to_multiple_of`, `padding_side`
        truncation          False; True, "longest_first", "only_first", "only_second": cut to `max_length` or the model's
                            own; `stride`: ids that windows share with `return_overflowing_tokens`
        return_tensors      None for lists, "pt" for torch, "np" for NumPy
        return_...          `attention_mask`, `token_type_ids`, `special_tokens_mask`, `offsets_mapping`, `length`,
                            `overflowing_tokens`: what was cut off as further rows

        Raises `UsageError` for arguments that do not go together, and for tensors from rows of different lengths.
        """
        if text is None and text_target is None:
            raise UsageError("there is no text to encode", hint="give `text`, `text_target` or both")
        if text_target is None:
            return self._rows(text, text_pair, **known(options))
        sides: Options = {"padding_side": self.padding_side, "truncation_side": self.truncation_side}
        targets = (self.target or self)._rows(text_target, None, **known(sides | options))
        if text is None:
            return targets
        return Encoded({**self._rows(text, text_pair, **known(options)), "labels": targets["input_ids"]})

    def _rows(
        self,
        text: str | Sequence[str] | None,
        text_pair: str | Sequence[str] | None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        return_tensors: Tensors | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_overflowing_tokens: bool = False,
    ) -> Encoded:
        alone = isinstance(text, str)
        firsts = [text] if isinstance(text, str) else list(text or [])
        seconds = [text_pair] if isinstance(text_pair, str) else list(text_pair) if text_pair is not None else None
        if not all(isinstance(t, str) for t in [*firsts, *(seconds or [])]) or (seconds is not None and len(seconds) != len(firsts)):
            raise UsageError("a tokenizer takes a string or a list of strings, and as many second texts as first ones",
                             hint="text that is split into words already is not supported")
        pairs: Any = firsts if seconds is None else list(zip(firsts, seconds, strict=True))
        limit = limit_of(max_length, truncation, padding, self.model_max_length)
        if truncation:
            with self._lock:
                cut = (truncation, limit, stride, truncation_side or self.truncation_side)
                whole = encode_cut(self._copy("cutter"), pairs, add_special_tokens, *cut)
        else:
            whole = self._backend.encode_batch(pairs, add_special_tokens=add_special_tokens)
        encodings = [part for e in whole for part in ([e, *e.overflowing] if return_overflowing_tokens else [e])]
        width = width_of([len(e.ids) for e in encodings], padding, limit, pad_to_multiple_of, self.pad_token_id)
        wanted: dict[str, tuple[bool, Callable[[Any], Any], Any]] = {
            "input_ids": (True, lambda e: e.ids, self.pad_token_id),
            "token_type_ids": (self._wants("token_type_ids", return_token_type_ids), lambda e: e.type_ids, 0),
            "attention_mask": (self._wants("attention_mask", return_attention_mask), lambda e: e.attention_mask, 0),
            "special_tokens_mask": (return_special_tokens_mask, lambda e: e.special_tokens_mask, 1),
            "offset_mapping": (return_offsets_mapping, lambda e: e.offsets, (0, 0)),
        }
        side = padding_side or self.padding_side
        rows: dict[str, list[Any]] = {
            name: [padded(list(read(e)), width, fill, side) for e in encodings] for name, (wants, read, fill) in wanted.items() if wants
        }
        if return_length:
            rows["length"] = [len(row) for row in rows["input_ids"]]
        if return_overflowing_tokens:
            rows["overflow_to_sample_mapping"] = [i for i, e in enumerate(whole) for _ in (e, *e.overflowing)]
        if return_tensors is not None:
            return Encoded({name: tensor(values, return_tensors) for name, values in rows.items()})
        alone = alone and not return_overflowing_tokens
        return Encoded({name: values[0] if alone else values for name, values in rows.items()})

    def _wants(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of ids: a string for one row (or one id), a list for several."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and isinstance(ids[0], list | tuple):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        text: str = self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)
        wished = self._cleans_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        return cleaned_up(text) if wished and not self._is_bpe else text

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of rows of ids."""
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]

    # -- chat ----------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        *,
        continue_final_message: bool = False,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Tensors | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Messages as the model was trained on them: text, or with `tokenize` ids (an `Encoded` with `return_dict`).
        `variables` are for the template.

        Raises `UsageError` where the model has no chat template, or the template refuses the messages.
        """
        if any(variables.pop(name, None) for name in ("return_assistant_tokens_mask", "tokenizer_kwargs")):
            raise UsageError("`return_assistant_tokens_mask` and `tokenizer_kwargs` are not supported", hint="`inspect batch` shows what is trained")
        limit = limit_of(max_length, truncation, padding, self.model_max_length)
        template = self.templates.get(chat_template or ("tool_use" if tools else ""), chat_template or self.chat_template)
        if template is None:
            raise UsageError("this model has no chat template: it was not trained on conversations", hint="give it plain text, or a `chat_template`")
        if not conversation:
            raise UsageError("the conversation is empty", hint="give at least one message")
        several = isinstance(conversation[0], list | tuple)
        conversations = [[without_nulls(m) for m in c] for c in (conversation if several else [conversation])]
        options = {
            "special_tokens": self.special_tokens_map,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            **variables,
        }
        if not tokenize:
            texts = [chat.render(template, messages, **options) for messages in conversations]
            return texts if several else texts[0]
        specials = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        rows = [chat.encode(template, messages, self._encode_plain, specials, **options) for messages in conversations]
        if truncation:
            rows = [row[:limit] if self.truncation_side == "right" else row[max(0, len(row) - limit):] for row in rows]
        width = width_of([len(row) for row in rows], padding, limit, None, self.pad_token_id)
        side = self.padding_side
        out: dict[str, Any] = {"input_ids": [padded(row, width, self.pad_token_id, side) for row in rows],
                               "attention_mask": [padded([1] * len(row), width, 0, side) for row in rows]}
        if return_tensors is not None:
            out = {name: tensor(values, return_tensors) for name, values in out.items()}
        elif not several:
            out = {name: values[0] for name, values in out.items()}
        return Encoded(out) if return_dict else out["input_ids"]

    def turn_ends(self) -> frozenset[int]:
        """Ids of the special token that the chat template puts behind an answer, where it puts one there."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return chat.turn_ends(lambda talk: self.apply_chat_template(talk, return_dict=False), special) if self.chat_template else frozenset()

    def _encode_plain(self, text: str, *, specials: bool) -> list[int]:
        if specials:
            return self._backend.encode(text, add_special_tokens=False).ids
        with self._lock:
            return self._copy("literal").encode(text, add_special_tokens=False).ids

    def _copy(self, name: str) -> tokenizers.Tokenizer:
        """A tokenizer with settings of its own, so that no other thread ever encodes with them; in the `literal` one no text
        reaches a special token, not even through the vocabulary."""
        if name not in self._copies:
            spec, literal = json.loads(self._backend.to_str()), name == "literal"
            self._copies[name] = guard.build(plain_spec(spec) if literal else spec, "tokenizer.json")
            self._copies[name].encode_special_tokens = literal
        return self._copies[name]

    def _token(self, index: int) -> str:
        token = self._backend.id_to_token(index)
        if token is None:
            raise UsageError(f"{index} is not an id of this tokenizer, which has {len(self)}")
        return self._written(token)

    def _written(self, token: str) -> str:
        return unmarked(token) if self._marked else token

    def _id(self, token: str) -> int:
        ways = spellings(token) if self._marked else (token,)
        found = next((i for way in ways if (i := self._backend.token_to_id(way)) is not None), self.unk_token_id)
        if found is None:
            raise UsageError(f"the vocabulary has no token {token!r}, and no unknown token to stand for it")
        return int(found)
