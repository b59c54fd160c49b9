"""One upstream call for equal questions asked at once.

A flight belongs to itself, not to who began it: it runs as a task of its own, whoever leaves takes nobody down, and
when the last one leaves it is cancelled, unless what was sent must be finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
Call: TypeAlias = Callable[["Flight[T]"], Coroutine[object, object, T]]


class Flight(Generic[T]):
    """One call under way and those who wait for it."""

    __slots__ = ("about", "busy", "keep", "members", "taken", "task")

    def __init__(self) -> None:
        self.members = 0
        self.keep = False
        """Set by the call itself: finish it, also when nobody waits any more."""
        self.busy = False
        """Set by the call itself: it is past waiting, its answer may come at any moment."""
        self.taken = False
        self.about: object = None
        """What whoever begins it notes for those who join."""
        self.task: asyncio.Task[T] | None = None
        """None: whoever waits for it makes the call itself."""

    def when_over(self, callback: Callable[[], None]) -> None:
        """Called once the call has ended, or at once if it has."""
        if self.task is None or self.task.done():
            callback()
        else:
            self.task.add_done_callback(lambda task: callback())


class Coalescer(Generic[T]):
    """Owns all flights: those with a key can be joined until they land."""

    def __init__(self, single: Callable[[T], bool], discard: Callable[[T], None]) -> None:
        """`single`: only one member can have this result; `discard` frees one that nobody has taken."""
        self._single = single
        self._discard = discard
        self._flights: dict[str, Flight[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    def __repr__(self) -> str:
        return f"<Coalescer {len(self._tasks)} flights, {sum(f.members for f in self._flights.values())} members>"

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(
        self,
        key: str | None,
        call: Call[T],
        watch: Callable[[Flight[T]], None] | None = None,
        fits: Callable[[Flight[T]], bool] = lambda flight: True,
    ) -> tuple[T | None, bool]:
        """The result, and whether it is another's. None for a follower whose result only one could have: go alone.

        Without a key the call is nobody else's, but outlives its caller all the same. One that does not fit any more is
        not joined, and another one takes its place. `watch` is shown the flight before it is waited for. Raises what
        `call` raises.
        """
        flight = self._flights.get(key) if key is not None else None
        task = flight.task if flight is not None else None
        # What has landed is not joined, though some are yet to wake.
        collapsed = flight is not None and task is not None and not task.done() and fits(flight)
        if flight is None or task is None or not collapsed:
            flight = Flight()
            flight.task = task = asyncio.ensure_future(call(flight))
            self._tasks.add(task)
            # The first of its callbacks: before anybody is woken, and also where it is cancelled before its first step.
            task.add_done_callback(partial(self._lands, key, flight))
            if key is not None:
                self._flights[key] = flight
        flight.members += 1
        if watch is not None:
            watch(flight)
        try:
            result = await asyncio.shield(task)
            if not self._single(result):
                return result, collapsed
            if flight.taken:
                return None, collapsed
            flight.taken = True
            return result, collapsed
        finally:
            flight.members -= 1
            if not flight.members:
                self._deserted(key, flight, task)

    async def finish(self) -> None:
        """Wait until every flight has landed."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _lands(self, key: str | None, flight: Flight[T], task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if key is not None and self._flights.get(key) is flight:
            del self._flights[key]

    def _deserted(self, key: str | None, flight: Flight[T], task: asyncio.Task[T]) -> None:
        if not task.done():
            if flight.keep:
                task.add_done_callback(lambda done: self._landed(flight, done))
                return
            # Nobody may join what is about to be cancelled.
            if key is not None and self._flights.get(key) is flight:
                del self._flights[key]
            task.cancel()
        else:
            self._landed(flight, task)

    def _landed(self, flight: Flight[T], task: asyncio.Task[T]) -> None:
        """With nobody there to hear it, or only after the last one had left."""
        if task.cancelled() or flight.members:
            return
        if task.exception() is None and self._single(task.result()) and not flight.taken:
            flight.taken = True
            self._discard(task.result())
