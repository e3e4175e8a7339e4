"""Stop strings: a small state machine over pieces of text.

Decisions:
- What is given out never holds a stop string or a part of one: the end of the text is held back for as long as it
  could be the beginning of a stop string, and goes out as soon as it cannot, or when the text ends.
- The stop string that begins first wins; it is not part of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from threefold.errors import UsageError


class StopStrings:
    """Feed pieces of text; get back what may be shown. `stopped` is true once a stop string was seen."""

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if any(not isinstance(stop, str) or not stop for stop in self.stops):
            raise UsageError(
                f"a stop string is empty or not a string: {list(self.stops)!r}", hint="leave it out instead"
            )
        self.stopped = False
        self._held = ""
        self._longest = max(map(len, self.stops), default=0)

    def feed(self, piece: str) -> str:
        """The text that is certain now: what was held back and `piece`, up to where a stop string may begin."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        held = next((n for n in range(min(self._longest - 1, len(text)), 0, -1)
                     if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self._held = text[len(text) - held:]
        return text[:len(text) - held]

    def finish(self) -> str:
        """The text is at its end: what was held back is no stop string after all."""
        rest, self._held = self._held, ""
        return rest
