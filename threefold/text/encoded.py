"""Small parts of the tokenizer under transformers' names: the result of a call, rows as tensors, names of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import tokenizers

from threefold.errors import UsageError

Tensors = Literal["pt", "np"]
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


def added_token(described: Any, content: str) -> tokenizers.AddedToken:
    """The special token that tokenizer_config.json describes."""
    flags = (
        {name: bool(described[name]) for name in ("lstrip", "rstrip", "normalized", "single_word") if name in described}
        if isinstance(described, Mapping)
        else {}
    )
    return tokenizers.AddedToken(content, special=True, **{"normalized": False, **flags})


def cleaned_up(text: str) -> str:
    """Text without the spaces that WordPiece decoders leave before punctuation."""
    for before, after in _CLEAN_UP:
        text = text.replace(before, after)
    return text
