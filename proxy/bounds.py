"""How much clients may take up: connections, memory for the bodies of requests, and time to take an answer."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import sys
import termios
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .clock import Clock

C = TypeVar("C")

KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 30, 10, 3
"""Seconds of silence before the first probe and between two, and how many may stay without an answer."""
UNACKNOWLEDGED = 60.0
"""Seconds for which what was sent may stay unacknowledged, before the kernel gives the connection up."""
LOOK_EVERY = 1.0
"""Seconds between two looks at what a client has not taken, at most; a quarter of its patience if that is less."""


class Connections(Generic[C]):
    """Who is connected, and who of them may have to make room for another: the idle, then those that are coming in.

    A request is coming in until it is there as a whole, and until it is known that it is let in. Of both those go first
    that have been so for longest.
    """

    def __init__(self, close: Callable[[C], None]) -> None:
        """`close` is given the one that has to make room."""
        self._close = close
        self._open: set[C] = set()
        self._idle: OrderedDict[C, None] = OrderedDict()
        self._coming: OrderedDict[C, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} open, {len(self._idle)} idle, {len(self._coming)} coming in>"

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[C]:
        return iter(self._open)

    def admit(self, one: C, most: int) -> bool:
        """Count one that is new, and idle as yet. False if there are `most` and none of them has to make room."""
        while len(self._open) >= most:
            if not (self._idle or self._coming):
                return False
            self._close_first(self._idle or self._coming)
        self._open.add(one)
        self._idle[one] = None
        return True

    def make_room(self, asks: C, has_any: Callable[[C], bool]) -> C | None:
        """Close the first of those that are coming in and have any of what `asks` needs, which may not be itself."""
        first = next(filter(has_any, self._coming), asks)
        if first == asks:
            return None
        self._coming.move_to_end(first, last=False)
        return self._close_first(self._coming)

    def _close_first(self, ones: OrderedDict[C, None]) -> C:
        first = ones.popitem(last=False)[0]
        self._open.discard(first)  # now, for it takes a moment to be gone
        self._close(first)
        return first

    def coming(self, one: C) -> None:
        """It has a request, of which it is not known what there is to it."""
        if one in self._open and one not in self._coming:
            self._idle.pop(one, None)
            self._coming[one] = None

    def busy(self, one: C) -> None:
        """Its request is there, and is let in."""
        self._coming.pop(one, None)
        self._idle.pop(one, None)

    def is_busy(self, one: C) -> bool:
        """Is there somebody to be answered?"""
        return one in self._open and one not in self._idle and one not in self._coming

    def idle(self, one: C) -> None:
        """Its requests are answered."""
        if one in self._open:
            self._coming.pop(one, None)
            self._idle[one] = None

    def gone(self, one: C) -> None:
        """It is closed."""
        self._open.discard(one)
        self._coming.pop(one, None)
        self._idle.pop(one, None)


class Bodies:
    """Bytes of request bodies in memory, by whom they are held for."""

    def __init__(self) -> None:
        self._held: dict[object, int] = {}
        self.size = 0

    def __repr__(self) -> str:
        return f"<Bodies {self.size} bytes for {len(self._held)}>"

    def take(self, holder: object, size: int) -> None:
        """Hold so much more."""
        self._held[holder] = self._held.get(holder, 0) + size
        self.size += size

    def has(self, holder: object) -> bool:
        """Is there anything held for it?"""
        return holder in self._held

    def give_back(self, holder: object) -> None:
        """All that is held for it."""
        self.size -= self._held.pop(holder, 0)


class Unsent:
    """Watches over what one client has not taken yet. Owns a timer as long as there is any.

    Progress is what the other side acknowledged, where the kernel tells (Linux), not only what the kernel took: it
    takes from a slow reader's buffer in large and so in rare gulps.
    """

    __slots__ = ("_clock", "_drained", "_left", "_moved", "_patience", "_stalled", "_timer", "_transport")

    def __init__(
        self,
        clock: Clock,
        transport: asyncio.Transport,
        patience: float,
        stalled: Callable[[], None],
        drained: Callable[[], None],
    ) -> None:
        """One of the two is called in the end: after `patience` seconds without progress, or when nothing is left."""
        self._clock = clock
        self._transport = transport
        self._patience = patience
        self._stalled = stalled
        self._drained = drained
        self._left = _unsent(transport)
        self._moved = clock.now()
        self._arm()

    def look(self) -> None:
        """Note progress. Also to be called before and after something is written: that is not a lack of it."""
        left = _unsent(self._transport)
        if left < self._left:
            self._moved = self._clock.now()
        self._left = left

    def stop(self) -> None:
        """The connection is gone."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = self._clock.call_at(self._clock.now() + min(LOOK_EVERY, self._patience / 4), self._tick)

    def _tick(self) -> None:
        self.look()
        if not self._transport.get_write_buffer_size():
            self._drained()
        elif self._clock.now() >= self._moved + self._patience:
            self._stalled()
        else:
            self._arm()


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not acknowledged."""
    size = transport.get_write_buffer_size()
    with contextlib.suppress(OSError, ValueError):  # no such thing here; closed
        told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        size += int.from_bytes(told, sys.byteorder)
    return size


def notice_silence(transport: asyncio.BaseTransport, send_timeout: float) -> None:
    """Let the kernel find out that a client is gone without a word, also where only heartbeats are sent.

    It gives up a reader that waits (a window of zero) in the same time as one that is gone: not before we would.
    """
    options = [
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPALIVE", KEEPALIVE_IDLE),  # what macOS calls it
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ]
    if send_timeout > 0:
        options.append(("TCP_USER_TIMEOUT", int(max(UNACKNOWLEDGED, send_timeout) * 1000)))
    client = transport.get_extra_info("socket")
    for name, value in options:  # whether to probe at all is aiohttp's to say, and it does
        number = getattr(socket, name, None)
        if number is not None:
            with contextlib.suppress(OSError, TypeError):  # uvloop's sockets do not let this be set
                client.setsockopt(socket.IPPROTO_TCP, number, value)
