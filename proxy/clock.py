"""The time: the only file that may read a clock or sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Clock:
    """Monotonic seconds for everything that is spaced or aged; the wall clock only for what has a date.

    Made inside a running event loop, whose time it is: a test that moves the loop's time moves this.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._loop = asyncio.get_running_loop()
        self.wall = wall
        """Epoch seconds. May jump; nothing that waits depends on it."""
        self.now = self._loop.time
        """Monotonic seconds."""

    def call_at(self, when: float, callback: Callable[..., object], *arguments: object) -> asyncio.TimerHandle:
        """Run `callback` at `when` (monotonic seconds), or soon if that is past."""
        return self._loop.call_at(when, callback, *arguments)

    async def sleep(self, seconds: float) -> None:
        """Sleep; a cancellation ends it at once."""
        await asyncio.sleep(seconds)
