"""Signals ask for a stop at the next step boundary; a second interrupt from the keyboard stops at once.

Decisions:
- The handler only sets a flag. Saving from within a handler would run in the middle of anything; the promise that a
  checkpoint is complete at every instant is what makes the hard exit of the second SIGINT safe.
- Only a second SIGINT is a person who insists. Schedulers repeat SIGTERM, and the first one is being heeded.
- A signal that was ignored when the program began (`nohup`, a job in the background) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """`with Signals() as signals:` `signals.received` is the number of the signal that came first, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """The name of the signal that came."""
        return signal.Signals(self.received).name

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = self.received or number
