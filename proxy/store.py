"""What is remembered, behind four verbs, so that another memory can take the place of this one."""

from __future__ import annotations

from typing import Protocol

from cachetools import TLRUCache

from .clock import Clock

_OVERHEAD = 200
"""Bytes that an entry costs beside its key and value: objects, links, dictionary slots."""


_NOTHING = (b"", 0.0)


class Store(Protocol):
    """A memory. What is `set` may be forgotten to make room; what is `swap`ped may not, until its time is over."""

    generation: int | None
    """Another with every change; None for a memory that others change too, whose changes are not known here."""

    async def now(self) -> float:
        """The store's own time, in seconds, by which lifetimes count."""

    async def get(self, key: str) -> bytes | None:
        """What is kept under the key, by either verb."""

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep a value for at most `ttl` seconds."""

    async def swap(self, key: str, old: bytes | None, new: bytes, ttl: float) -> bool:
        """Put `new` in the place of `old` (None: of nothing). False, and nothing done, if something else is there."""


class _Bytes(TLRUCache[str, tuple[bytes, float]]):
    """Bounded in bytes; counts what was pushed out before its time."""

    def __init__(self, maxsize: int, clock: Clock) -> None:
        super().__init__(
            maxsize=maxsize,
            ttu=lambda key, value, now: value[1],
            timer=clock.now,
            getsizeof=lambda value: len(value[0]) + _OVERHEAD,
        )
        self.evictions = 0

    def __missing__(self, key: str) -> tuple[bytes, float]:
        # An exception for each of the many questions after an epoch that never ended would cost more than the answer.
        return _NOTHING

    def popitem(self) -> tuple[str, tuple[bytes, float]]:
        self.evictions += 1
        return super().popitem()


class MemoryStore:
    """One process's own memory. Owns the stored bytes, bounded, and the swapped values, few and small."""

    def __init__(self, clock: Clock, max_bytes: int) -> None:
        self._clock = clock
        self._cache = _Bytes(max_bytes, clock)
        self._kept: dict[str, tuple[bytes, float]] = {}
        self._swept = clock.now()
        self.generation: int | None = 0

    def __repr__(self) -> str:
        return f"<MemoryStore {self.entries} entries, {self.size}/{self.max_bytes} bytes>"

    @property
    def entries(self) -> int:
        """Stored values."""
        return len(self._cache)

    @property
    def size(self) -> int:
        """Their bytes."""
        return int(self._cache.currsize)

    @property
    def max_bytes(self) -> int:
        """What `size` never exceeds."""
        return int(self._cache.maxsize)

    @property
    def evictions(self) -> int:
        """Values pushed out before their time."""
        return self._cache.evictions

    async def now(self) -> float:
        return self._clock.now()

    async def get(self, key: str) -> bytes | None:
        kept = self._kept.get(key)
        if kept is not None:
            return kept[0] if kept[1] > self._clock.now() else None
        stored = self._cache[key]
        return stored[0] if stored is not _NOTHING else None

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        if ttl <= 0:
            return
        self._changed()
        try:
            self._cache[key] = (value, self._clock.now() + ttl)
        except ValueError:
            self._cache.pop(key, None)  # larger than all there is: what was there is out of date

    async def swap(self, key: str, old: bytes | None, new: bytes, ttl: float) -> bool:
        now = self._clock.now()
        kept = self._kept.get(key)
        if (kept[0] if kept is not None and kept[1] > now else None) != old:
            return False
        self._changed()
        self._kept[key] = (new, now + ttl)
        if now - self._swept > 600:
            self._swept = now
            self._kept = {name: value for name, value in self._kept.items() if value[1] > now}
        return True

    def _changed(self) -> None:
        self.generation = (self.generation or 0) + 1

    def resize(self, max_bytes: int) -> None:
        """Another bound: what fits is taken over, the least recently used goes first."""
        if max_bytes == self.max_bytes:
            return
        self._changed()
        before, self._cache = self._cache, _Bytes(max_bytes, self._clock)
        self._cache.evictions = before.evictions
        before.expire()
        while before.currsize:
            key, value = before.popitem()
            if len(value[0]) + _OVERHEAD <= max_bytes:
                self._cache[key] = value
            else:
                self._cache.evictions += 1
