"""Who goes next, who is late, who is turned away, and how long a client can be made to wait."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, Literal, TypeVar

from .messages import Headers, Request, header
from .routing import Effect, Route
from .units import Count, Seconds

Interim = Literal["100", "102", "none"]


@dataclass(frozen=True, slots=True)
class QueueRules:
    """Bounds on waiting: `queue` in the settings."""

    max_waiting: Count = 10_000
    """Requests of one caller that may wait in one line: for one endpoint, with one key. Beyond it they are refused."""
    max_wait: Seconds = 1800.0
    """The longest wait of a client that is kept awake by interim answers."""
    max_wait_plain: Seconds = 100.0
    """The longest wait of one that is not, and would hang up by itself: the stock client does after 120s of silence. If
    it asks the same again within a minute, it goes on from its place."""
    heartbeat: Seconds = 15.0
    """Between two interim answers to a client that waits. 0 sends none."""
    heartbeats: Mapping[str, Interim] = field(
        default_factory=lambda: {
            "vastai-cli/": "100",
            "vastai-sdk/": "100",
            "python-requests/": "100",
            "python-urllib3/": "100",
            "Python-urllib/": "100",
            "aiohttp/": "100",
            "Python/": "100",  # aiohttp's own: "Python/3.12 aiohttp/3.14"
            "curl/": "100",
            "node": "102",
            "undici": "102",
        }
    )
    """Which interim status keeps a client awake, by how its User-Agent begins: 100, 102, or none. The first that fits
    counts, no other client is sent any. A file of your own adds to these; `none` takes one out."""


USUAL = 3
"""The urgency of a request that says nothing (RFC 9218 4.1): 0 is the most urgent, 7 the least."""
TURNS_LATER = 2.0
"""By how many turns of every other caller each step of urgency puts a request back: late, but never starved."""


class Place:
    """A request's place among all others: whose it is, how urgent, and when it came. Kept over every attempt."""

    __slots__ = ("deadline", "left", "number", "start", "urgency", "weight", "who")

    def __init__(
        self, number: int, deadline: float, *, who: str = "", weight: float = 1.0, urgency: int = USUAL
    ) -> None:
        self.number = number
        self.deadline = deadline
        self.who = who
        self.weight = weight
        self.urgency = urgency
        self.start: float | None = None
        """Its start tag, once it was served: who comes back takes the same place again."""
        self.left = False
        """It no longer waits; the line drops it when it meets it."""

    def __lt__(self, other: Place) -> bool:
        return self.number < other.number


P = TypeVar("P", bound=Place)


class Shares:
    """Who has had how much, in virtual time: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

    A request of a caller starts when its last one has finished, or now if that is past; it finishes one turn, divided
    by the caller's weight, later. The lowest start goes first, and now is the start of who went last. So who has not
    been served lately is before everybody who has, and nobody saves up turns.
    """

    __slots__ = ("_finished", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._finished: dict[str, float] = {}

    def start(self, who: str) -> float:
        """The start tag of a request that comes now."""
        return max(self.now, self._finished.get(who, 0.0))

    def finished(self, who: str) -> float:
        """When, in virtual time, its last one did."""
        return self._finished.get(who, 0.0)

    def served(self, who: str, weight: float, start: float) -> None:
        """A request with that start tag has its turn."""
        self.now = max(self.now, start)
        self._finished[who] = max(start, self._finished.get(who, 0.0)) + 1.0 / weight
        if len(self._finished) > 64 and len(self._finished) % 64 == 1:
            self._finished = {name: at for name, at in self._finished.items() if at > self.now}


def later(urgency: int) -> float:
    """Turns by which a request of that urgency is put back."""
    return TURNS_LATER * urgency


class _Flow(Generic[P]):
    """The requests of one caller and one urgency, oldest first."""

    __slots__ = ("heap", "left", "start", "urgency", "version", "who")

    def __init__(self, who: str, urgency: int, start: float) -> None:
        self.who = who
        self.urgency = urgency
        self.start = start
        self.heap: list[P] = []
        self.left = 0
        self.version = 0


class Line(Generic[P]):
    """Those who wait for one bucket: callers share it by weight, and each is served first come, first served.

    Joining, leaving and going cost O(log n), amortised.
    """

    __slots__ = ("_count", "_flows", "_order", "_shares", "_ties", "_waiting", "_weight")

    def __init__(self) -> None:
        self._flows: dict[tuple[str, int], _Flow[P]] = {}
        # (start tag and what urgency adds, number of the flow's head, tie-break, flow, its version)
        self._order: list[tuple[float, int, int, _Flow[P], int]] = []
        self._shares = Shares()
        self._ties = 0
        self._count = 0
        # Of each caller who waits: how many of its requests do, and its weight.
        self._waiting: dict[str, tuple[int, float]] = {}
        self._weight = 0.0

    def __len__(self) -> int:
        return self._count

    def waiting_of(self, who: str) -> int:
        """Requests of a caller that wait."""
        return self._waiting.get(who, (0, 0.0))[0]

    def ahead_of(self, who: str, weight: float) -> int:
        """An estimate of how many turns come before that of a request which joins now."""
        own, known = self._waiting.get(who, (0, 0.0))
        return own + min(self._count - own, math.ceil((own + 1) * (self._weight - known) / weight))

    def join(self, place: P) -> None:
        """Take a place; one that comes back takes its old one."""
        if place.start is not None:
            place.start = min(place.start, self._shares.now)  # of a time that may be over
        flow = self._flows.get((place.who, place.urgency))
        if flow is None:
            flow = _Flow(place.who, place.urgency, self._shares.start(place.who))
            self._flows[place.who, place.urgency] = flow
        heappush(flow.heap, place)
        self._count += 1
        own, known = self._waiting.get(place.who, (0, 0.0))
        self._weight += place.weight - known
        self._waiting[place.who] = own + 1, place.weight
        if flow.heap[0] is place:
            self._list(flow)

    def leave(self, place: P) -> None:
        """Give the place up. It is dropped when it comes to the head, or with the others once they are the most."""
        place.left = True
        if self._gone(place):
            return
        flow = self._flows[place.who, place.urgency]
        flow.left += 1
        if flow.left > 16 and flow.left * 2 > len(flow.heap):
            flow.heap = [waiting for waiting in flow.heap if not waiting.left]
            flow.left = 0
            heapify(flow.heap)
            self._list(flow)

    def head(self) -> P | None:
        """Who is next, or None."""
        while self._order:
            key, number, _, flow, version = self._order[0]
            if version != flow.version:
                heappop(self._order)
                continue
            while flow.heap and flow.heap[0].left:
                heappop(flow.heap)
                flow.left -= 1
            if flow.heap and flow.heap[0].number == number and self._key(flow) <= key:
                return flow.heap[0]
            self._list(flow)  # its head has left, or its caller was served meanwhile
        return None

    def pop(self) -> P:
        """Take the head out; there must be one."""
        head = self.head()
        assert head is not None
        flow = self._flows[head.who, head.urgency]
        heappop(flow.heap)
        start = head.start = self._start(flow, head)
        if not self._gone(head):
            self._shares.served(head.who, head.weight, start)
            flow.start = max(flow.start, self._shares.finished(head.who))
            self._list(flow)
        return head

    def _gone(self, place: P) -> bool:
        """One fewer waits. True if nobody does any more, and nobody is behind anybody."""
        self._count -= 1
        own, known = self._waiting[place.who]
        if own > 1:
            self._waiting[place.who] = own - 1, known
        else:
            del self._waiting[place.who]
            self._weight = self._weight - known if self._waiting else 0.0
        if self._count:
            return False
        self._flows.clear()
        self._order.clear()
        self._shares = Shares()
        return True

    def _start(self, flow: _Flow[P], head: P) -> float:
        return head.start if head.start is not None else max(flow.start, self._shares.finished(flow.who))

    def _key(self, flow: _Flow[P]) -> float:
        return self._start(flow, flow.heap[0]) + later(flow.urgency)

    def _list(self, flow: _Flow[P]) -> None:
        """Put a flow where its head belongs, or away if it has none."""
        flow.version += 1
        while flow.heap and flow.heap[0].left:
            heappop(flow.heap)
            flow.left -= 1
        if flow.heap:
            self._ties += 1
            heappush(self._order, (self._key(flow), flow.heap[0].number, self._ties, flow, flow.version))
            if len(self._order) > 64 + 4 * len(self._flows):
                self._order = [entry for entry in self._order if entry[4] == entry[3].version]
                heapify(self._order)
        else:
            del self._flows[flow.who, flow.urgency]


STOPS_MONEY, BULK = 1, 5
"""The urgencies of what stops money running, and of what nobody waits for."""
MANY = 8
"""Requests of a caller that wait for the same, from which on one more is bulk."""
_STOPPED = re.compile(rb'"state"\s*:\s*"stopped"')
_URGENCY = re.compile(r"(?:^|,)\s*u\s*=\s*([0-7])\s*(?:$|[,;])")


def urgency(route: Route, request: Request, waiting: int, polled: bool) -> int:
    """How urgent a request is: what its Priority says (RFC 9218 4.1, `u=0` to `u=7`), else by what it does.

    What stops money running goes before what somebody waits for, and that before bulk: requests of a caller of whom
    many wait already (`waiting`), and a read that is asked for again and again (`polled`).
    """
    told = _URGENCY.search(header(request.headers, "priority") or "")
    if told is not None:
        return int(told[1])
    if route.effect is Effect.WRITE and (route.method == "DELETE" or _STOPPED.search(request.body)):
        return STOPS_MONEY
    return BULK if polled or waiting >= MANY else USUAL


_ON_THE_WIRE: Mapping[Interim, bytes] = {
    "100": b"HTTP/1.1 100 Continue\r\n\r\n",
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "none": b"",
}
_FORWARDED = ("via", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto")


def interim(headers: Headers, http_1_1: bool, rules: QueueRules) -> bytes:
    """The interim answer that keeps this client waiting without harm (RFC 9110 15.2), or nothing.

    Nothing for clients not known to take one, for HTTP/1.0, and for a request that came through another proxy: some
    take an unasked-for 100 for the answer.
    """
    if not http_1_1 or rules.heartbeat <= 0:
        return b""
    agent = ""
    for name, value in headers:
        lowered = name.lower()
        if lowered in _FORWARDED or lowered.startswith("x-forwarded-"):
            return b""
        if lowered == "user-agent":
            agent = value
    for prefix, status in rules.heartbeats.items():
        if agent.startswith(prefix):
            return _ON_THE_WIRE[status]
    return b""


def patience(headers: Headers, target: str, upstream: str, rules: QueueRules, *, beating: bool) -> float:
    """Seconds for which this client can be held, from arrival to the first byte of its answer.

    The stock CLI's 120 s between bytes are reset by heartbeats. A total timeout is not: the serverless SDK's 30 s (10 s
    for /route/), and the 300 s of the SDK's aiohttp clients. `headers`: as they came in, Connection among them.
    """
    if upstream == "serverless":
        return 8.0 if target.startswith("/route") else 25.0
    if not beating:
        return rules.max_wait_plain
    fields = {name.lower(): value for name, value in headers}
    agent = fields.get("user-agent", "")
    if agent.startswith("vastai-sdk/") and "api_key=" in target:
        return 25.0  # the serverless SDK asking the API about its endpoints
    if "aiohttp" in agent or (agent.startswith("vastai-sdk/") and "connection" not in fields):
        return min(280.0, rules.max_wait)  # requests sends Connection: keep-alive, aiohttp does not
    return rules.max_wait
