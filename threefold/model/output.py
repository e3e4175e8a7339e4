"""What a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# In transformers' order, which is that of the tuple.
NAMES = (
    "loss", "logits", "prediction_logits", "seq_relationship_logits", "last_hidden_state", "pooler_output", "past_key_values",
    "hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions",
    "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions",
)


class Output:
    """Values by attribute, by key, or by place among those that are there; an attribute that is not there is None.

    `aside` are values that an attribute gives and no place: what transformers' output of the same kind does not hold.
    """

    def __init__(self, aside: dict[str, Any] | None = None, **values: Any) -> None:
        assert set(values) <= set(NAMES)
        self._values = {name: values[name] for name in NAMES if values.get(name) is not None}
        self._aside = aside or {}

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"an output has no `{name}`")
        return self._values.get(name, self._aside.get(name))

    def keys(self) -> list[str]:
        """The names of the values that are there, in order."""
        return list(self._values)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there, in order."""
        return tuple(self._values.values())

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of what is there, in order."""
        return list(self._values.items())

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or `default` where it is not there."""
        return self._values.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str) and key not in NAMES:
            raise KeyError(key)
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self._values)
