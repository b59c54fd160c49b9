"""Whoever brings a wrong token waits for the answer, each time longer, and one at a time."""

from __future__ import annotations

from cachetools import TTLCache

from .clock import Clock
from .policy.exposure import neighbourhood

FIRST, LONGEST = 0.25, 8.0
"""Seconds of the first pause and of the longest; each is twice as long as the last."""
REMEMBERED, REMEMBERED_FOR = 10_000, 600.0
"""Of how many addresses the failures are counted, and for how many seconds after the last."""


class Slowing:
    """Owns the failures by address: how many, and until when the last one is held back.

    Who brings a right token is not slowed, wherever it comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: TTLCache[str, tuple[int, float]] = TTLCache(REMEMBERED, REMEMBERED_FOR, timer=clock.now)

    def __repr__(self) -> str:
        return f"<Slowing {len(self._failures)} addresses>"

    def failed(self, address: str) -> tuple[float, bool]:
        """One more failure from there: the seconds of its pause, and whether that is another one's that is not over.

        A pause goes on when its client has left: to hang up and come again is no way around it.
        """
        here, now = neighbourhood(address), self._clock.now()
        before, until = self._failures.get(here, (0, now))
        if until > now:
            self._failures[here] = before + 1, until
            return until - now, True
        pause = min(LONGEST, FIRST * 2.0 ** min(before, 10))
        self._failures[here] = before + 1, now + pause
        return pause, False
