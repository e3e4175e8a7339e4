"""The tree of exceptions. Every failure that a user can cause or mend is one of these.

Decisions:
- An error has a message (what happened, with which values, what was expected) and a hint (how to mend it).
- The class fixes the exit code of the command line, so that scripts can tell usage from damage.
- A class exists where a caller may want to catch it apart from its siblings, not for each message.

    ThreefoldError                exit 1
    ├── UsageError                exit 2   the command or the call was put wrongly
    │   └── ConfigError                    a recipe, a flag or a setting does not hold
    ├── MissingExtra                       an optional dependency is not installed
    ├── DataError                          text or rows that cannot be used
    │   └── DamagedData           exit 3   bytes that are not the bytes that were written
    ├── TokenizerError                     a tokenizer that cannot be trained, read or used
    ├── ModelError                         a model directory that cannot be understood
    ├── CheckpointError           exit 3   no checkpoint, or one that cannot be trusted
    ├── DiskError                          the disk refused: full, read-only, too many files
    ├── LockedError                        another process holds the run directory
    ├── HubError                           a download failed
    ├── RemoteError                        a served model gave no answer
    │   ├── TooManyRequests                it still asks to wait
    │   └── ContentRefused                 it, or a filter before it, declined
    ├── NumericError                       NaN, infinity, nothing to learn from
    ├── MemoryLimitError                   not enough memory for what was asked
    └── Interrupted               exit 128 + signal, after a saved checkpoint
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThreefoldError(Exception):
    """Base of all errors that threefold raises on purpose.

    `str(error)` is the message alone; `error.hint` says how to mend it, or is empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ThreefoldError):
    """The command line or a call names something that does not exist or does not go together."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or a setting is unknown, of the wrong type, out of range or contradictory."""


class MissingExtra(ThreefoldError):
    """An optional dependency is needed and not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package `{package}`, which is not installed",
                         hint=f'pip install "threefold[{extra}]"')


class DataError(ThreefoldError):
    """Text or rows that cannot be read or used; the message names file and line."""


class DamagedData(DataError):
    """Stored bytes are not the bytes that were written: a hash, a size or a header disagrees."""

    exit_code = 3


class TokenizerError(ThreefoldError):
    """A tokenizer cannot be trained, read, or does not fit the data or the model."""


class ModelError(ThreefoldError):
    """A model directory is incomplete, has unknown names, or is in a format that is not accepted."""


class CheckpointError(ThreefoldError):
    """No usable checkpoint, or one that was asked for by name and cannot be trusted."""

    exit_code = 3


class DiskError(ThreefoldError):
    """The disk refused an operation; carries the path and what was needed."""


class LockedError(ThreefoldError):
    """Another process holds the directory."""


class HubError(ThreefoldError):
    """A model or data set could not be found or fetched by name."""


class RemoteError(ThreefoldError):
    """A served model gave no answer: not reached, too slow, broken off, refused, or not understood."""


class TooManyRequests(RemoteError):
    """The server still answers 429 after all waits, or `wait` (seconds) is None: it asks for too long a one, or none helps."""

    wait: float | None = None


class ContentRefused(RemoteError):
    """The model or a filter before it declined to answer."""


class NumericError(ThreefoldError):
    """Loss or gradients are not finite, or a batch holds nothing to learn from."""


class MemoryLimitError(ThreefoldError):
    """A step or a load does not fit into memory."""


class Interrupted(ThreefoldError):
    """A signal asked the program to stop; what was done so far is saved."""

    def __init__(self, signum: int, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.signum = signum
        self.exit_code = 128 + signum


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest known one, else the list of what is known."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(f'`{c}`' for c in choices)}"
