"""Whoever brings a wrong token waits for the answer, each time longer."""

from __future__ import annotations

from cachetools import TTLCache

from .clock import Clock
from .policy.exposure import neighbourhood

FIRST, LONGEST = 0.25, 8.0
"""Seconds of the first pause and of the longest; each is twice as long as the last."""
REMEMBERED, REMEMBERED_FOR = 10_000, 600.0
"""Of how many addresses the failures are counted, and for how many seconds after the last."""


class Slowing:
    """Owns the count of failures by address. Who brings a right token is not slowed, wherever it comes from."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: TTLCache[str, int] = TTLCache(REMEMBERED, REMEMBERED_FOR, timer=clock.now)

    def __repr__(self) -> str:
        return f"<Slowing {len(self._failures)} addresses>"

    async def failed(self, address: str) -> None:
        """One more failure from there: wait."""
        here = neighbourhood(address)
        before = self._failures.get(here, 0)
        self._failures[here] = before + 1
        await self._clock.sleep(min(LONGEST, FIRST * 2.0 ** min(before, 10)))
