"""Small parts of the tokenizer under transformers' names: the result of a call, cutting and filling up, rows as tensors.

Decisions:
- Nothing is cut or filled up unasked, and what is asked for without a length that is known is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import tokenizers

from threefold.errors import UsageError, did_you_mean

Tensors = Literal["pt", "np"]
UNBOUNDED = 10**30  # transformers' word for "no longest input is known"


class Options(TypedDict, total=False):
    """How texts are encoded: transformers' words."""

    add_special_tokens: bool
    padding: bool | str
    truncation: bool | str | None
    max_length: int | None
    stride: int
    pad_to_multiple_of: int | None
    padding_side: str | None
    truncation_side: str | None
    return_tensors: Tensors | None
    return_attention_mask: bool | None
    return_token_type_ids: bool | None
    return_special_tokens_mask: bool
    return_offsets_mapping: bool
    return_length: bool
    return_overflowing_tokens: bool


def known(options: Options) -> Options:
    """The options, all of which are known. Raises `UsageError`."""
    for name in options:
        if name not in Options.__annotations__:
            raise UsageError(f"`{name}` is not a known argument of a tokenizer", hint=did_you_mean(name, [*Options.__annotations__]))
    return options


THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of what was thought before an answer
FLAGS = ("lstrip", "rstrip", "normalized", "single_word")  # of an added token
# What English WordPiece decoders leave before punctuation, and what it was (transformers' `clean_up_tokenization`).
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Encoded(dict[str, Any]):
    """`input_ids`, `attention_mask`, ...: by key, by attribute, and as keyword arguments of a model."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this encoding has no `{name}`; it has {', '.join(self)}")

    def to(self, device: Any) -> Encoded:
        """The same with its tensors on another device."""
        return Encoded({name: value.to(device) if hasattr(value, "to") else value for name, value in self.items()})


def encode_cut(
    cutter: tokenizers.Tokenizer, pairs: Any, specials: bool, strategy: bool | str, limit: int, stride: int, side: str
) -> list[tokenizers.Encoding]:
    """Texts, or pairs of them, encoded and cut to `limit` ids at a side; what is cut off hangs on each encoding in windows
    that overlap by `stride`. `cutter` is a tokenizer that nobody else encodes with. Raises `UsageError`."""
    if limit >= UNBOUNDED:
        raise UsageError(
            "`truncation` is asked for, but neither `max_length` nor the model's own longest input is known",
            hint="give `max_length`",
        )
    name = "longest_first" if strategy is True else strategy
    if name not in ("longest_first", "only_first", "only_second"):
        raise UsageError(
            f"`truncation` is {strategy!r}", hint="True, False, `longest_first`, `only_first` or `only_second`"
        )
    try:
        cutter.enable_truncation(limit, stride=stride, strategy=name, direction=side)
        return cutter.encode_batch(pairs, add_special_tokens=specials)
    except BaseException as error:
        if type(error).__name__ == "PanicException" or isinstance(error, ValueError):
            raise UsageError(f"cannot cut to {limit} ids: {error}") from error
        raise


def limit_of(max_length: int | None, truncation: bool | str | None, padding: bool | str, own: int) -> int:
    """What `max_length` means, `own` where it is not given. Raises `UsageError` where it is given and nothing is cut or filled to it."""
    if max_length is not None and not truncation and padding != "max_length":
        raise UsageError(f'`max_length` {max_length} is given, but neither `truncation=True` nor `padding="max_length"`',
                         hint="say which is meant: nothing is cut unasked")
    return own if max_length is None else max_length


def width_of(lengths: Sequence[int], padding: bool | str, limit: int, multiple: int | None, pad: int | None) -> int:
    """The length that rows are padded to with the id `pad`; 0 for none. `limit` is what "max_length" means. Raises
    `UsageError`."""
    if padding in (False, "do_not_pad"):
        return 0
    if padding not in (True, "longest", "max_length"):
        raise UsageError(f"`padding` is {padding!r}", hint="True, False, `longest` or `max_length`")
    if pad is None:
        raise UsageError(
            "this tokenizer has no padding token", hint="name one: `tokenizer.pad_token = tokenizer.eos_token`"
        )
    width = max(lengths, default=0)
    if padding == "max_length":
        if limit >= UNBOUNDED:
            raise UsageError('`padding="max_length"` needs `max_length`: the model\'s own longest input is not known')
        width = limit
    return -(-width // multiple) * multiple if multiple else width


def padded(row: list[Any], width: int, fill: Any, side: str) -> list[Any]:
    """A row filled up to `width` on one side; a row that is long enough stays as it is."""
    more = [fill] * (width - len(row))
    return more + row if side == "left" else row + more


def tensor(rows: list[Any], kind: Tensors) -> Any:
    """Rows of one length as an int64 tensor or array; raises `UsageError` for rows of different lengths."""
    if len({len(row) for row in rows if isinstance(row, list)}) > 1:
        raise UsageError(
            f"rows of {min(map(len, rows))} to {max(map(len, rows))} ids do not make one tensor",
            hint="ask for `padding=True`",
        )
    if kind == "np":
        import numpy as np

        return np.array(rows, dtype=np.int64)
    if kind != "pt":
        raise UsageError(f"`return_tensors` is {kind!r}", hint="`pt`, `np` or None")
    import torch

    return torch.tensor(rows, dtype=torch.int64)


def content_of(token: Any) -> str:
    """The spelling of a token in tokenizer_config.json, which is a string or an object."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def special_tokens(backend: tokenizers.Tokenizer, described: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """The special tokens by their spelling, as tokenizer_config.json describes them; one that is a mere spelling there is as in
    tokenizer.json, which may know that it takes the space before it (RoBERTa's `<mask>`)."""
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    found = []
    for content, words in described.items():
        flags = {"normalized": False}
        if isinstance(words, Mapping):
            flags |= {name: bool(words[name]) for name in FLAGS if name in words}
        elif content in there:
            flags = {name: getattr(there[content], name) for name in FLAGS}
        found.append(tokenizers.AddedToken(content, special=True, **flags))
    return found


def without_last(text: str, count: int, tokenizer: Callable[..., Encoded]) -> str:
    """A text without its last tokens, and without one character at least: the pieces of one character end at the same place."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    return text[:min(ends[-count - 1], len(text) - 1)] if count < len(ends) else ""


def cleaned_up(text: str) -> str:
    """Text without the spaces that WordPiece decoders leave before punctuation."""
    for before, after in _CLEAN_UP:
        text = text.replace(before, after)
    return text


def without_nulls(message: Any) -> Any:
    """A message of a conversation without what is not given, and what was thought under the names that templates read, as
    transformers shows it to them."""
    if not isinstance(message, Mapping):
        return message
    kept = {key: value for key, value in message.items() if value is not None}
    thought = next((kept[name] for name in THOUGHTS if name in kept), None)
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}
