"""Who goes next, who is late, who is turned away, and how long a client can be made to wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, Literal, TypeVar

from .messages import Headers
from .units import Count, Seconds

Interim = Literal["100", "102", "none"]


@dataclass(frozen=True, slots=True)
class QueueRules:
    """Bounds on waiting: `queue` in the settings."""

    max_waiting: Count = 10_000
    """Requests that may wait in one line: for one endpoint, with one key."""
    max_wait: Seconds = 1800.0
    """The longest a request may wait for its turn."""
    max_wait_plain: Seconds = 100.0
    """How long a client that takes no heartbeat is held before it is told to come back: less than it would wait."""
    heartbeat: Seconds = 15.0
    """Between two interim answers to a client that waits; 0 turns them off."""
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
    """The interim status that each client is known to take, by the beginning of its User-Agent."""


class Place:
    """A request's place among all others: by arrival, kept over every attempt. Orders the lines."""

    __slots__ = ("deadline", "left", "number")

    def __init__(self, number: int, deadline: float) -> None:
        self.number = number
        self.deadline = deadline
        self.left = False
        """It no longer waits; the line drops it when it meets it."""

    def __lt__(self, other: Place) -> bool:
        return self.number < other.number


P = TypeVar("P", bound=Place)


class Line(Generic[P]):
    """Those who wait for one bucket, oldest arrival first. Joining and leaving cost O(log n), amortised."""

    __slots__ = ("_heap", "_left")

    def __init__(self) -> None:
        self._heap: list[P] = []
        self._left = 0

    def __len__(self) -> int:
        return len(self._heap) - self._left

    def join(self, place: P) -> None:
        """Take the place that the arrival gives, which may be before others when somebody comes back."""
        heappush(self._heap, place)

    def leave(self, place: P) -> None:
        """Give the place up. It is dropped when it comes to the head, or with the others once they are the most."""
        place.left = True
        self._left += 1
        if self._left > 16 and self._left * 2 > len(self._heap):
            self._heap = [waiting for waiting in self._heap if not waiting.left]
            self._left = 0
            heapify(self._heap)

    def head(self) -> P | None:
        """Who is next, or None."""
        while self._heap and self._heap[0].left:
            heappop(self._heap)
            self._left -= 1
        return self._heap[0] if self._heap else None

    def pop(self) -> P:
        """Take the head out; there must be one."""
        head = self.head()
        assert head is not None
        return heappop(self._heap)


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
