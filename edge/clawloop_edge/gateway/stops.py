"""Stop strings, matched in text that arrives in pieces. Pure."""

from collections.abc import Sequence

from clawloop_edge.engine.thinking import overlap


class StopMatcher:
    """Lets text through up to the first stop string; what may become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        self.met: str | None = None
        """the stop string that was met"""
        self.rest = ""
        """text after the stop string, in the same piece: it was sampled, and is not delivered"""

    def feed(self, text: str) -> str:
        """What is sure to come before any stop string."""
        if not self._stops:
            return text
        self._held += text
        # The one that is complete first wins, so that the result does not depend on how the text was cut into pieces.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, at, self.met = min(ends)
            self.stopped, self.rest = True, self._held[end:]
            out, self._held = self._held[:at], ""
            return out
        keep = max(overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """What was held back when the reply ends without a stop string."""
        out, self._held = self._held, ""
        return out
