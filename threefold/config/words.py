"""Numbers as people write them: `25M`, `3min`."""

from __future__ import annotations

import re
from typing import Any

from threefold.errors import ConfigError

_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "mins": 60.0,
            "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0, "d": 86400.0, "day": 86400.0,
            "days": 86400.0}
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"\s*(-?)(?=[\d_]{1,19}(?![\d_]))(\d+(?:_\d+)*)(?:\.(\d{1,12}))?(?:e\+?(\d{1,2}))?\s*([kmgbt]?)\s*", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds from `90`, `90s`, `3min`, `1h30min`. Raises `ConfigError`."""
    compact = "".join(text.split()).lower()
    if re.fullmatch(r"\d{1,12}(\.\d{0,9})?", compact, re.ASCII):
        return float(compact)
    parts = re.findall(r"(\d{1,12}(?:\.\d{1,9})?)([a-z]+)", compact, re.ASCII)
    whole = "".join(number + unit for number, unit in parts) == compact
    if not parts or not whole or any(unit not in _SECONDS for _, unit in parts):
        raise ConfigError(f"{quote(text)} is no duration", hint="write `90s`, `3min`, `2h` or `1h30min`")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def count_in(text: str) -> int | None:
    """The whole number that a text says, as `parse_count` reads it, or None where it is a word of another kind."""
    match = _COUNT.fullmatch(text.lower())
    if match:
        sign, whole, fraction, exponent, unit = match.groups(default="")
        digits = int(whole + fraction + "0" * int(exponent or 0)) * _POWERS[unit]
        value, rest = divmod(digits, int("1" + "0" * len(fraction)))
        if rest == 0:
            return -value if sign else value
    return None


def parse_count(text: str) -> int:
    """A whole number from `25000000`, `25_000_000`, `25M`, `1.5b`, `300k`, `1e6`. Raises `ConfigError`."""
    count = count_in(text)
    if count is None:
        raise ConfigError(f"{quote(text)} is no whole number", hint="write `25000000`, `25_000_000` or `25M`")
    return count


def quote(value: Any) -> str:
    """A received value as it stands in a message: in back-ticks, near to how TOML writes it, cut when long."""
    if value is None or isinstance(value, bool):
        text = "none" if value is None else "true" if value else "false"
    elif isinstance(value, str):
        text = f'"{value[:80]}"'
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(quote(item).strip("`") for item in value[:8]) + "]"
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"{value:#x}"  # Python writes no decimal number of thousands of digits
    else:
        text = repr(value)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
