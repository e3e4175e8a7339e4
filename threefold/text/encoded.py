"""What a call of a tokenizer returns, and how rows become tensors."""

from __future__ import annotations

from typing import Any, Literal

from threefold.errors import UsageError

Tensors = Literal["pt", "np"]


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
