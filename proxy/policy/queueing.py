"""Who goes next, who is late, who is turned away, and how long a client can be made to wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
            "python-httpx/": "100",
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
STOPS_MONEY, BULK = 1, 5
"""The urgencies of what stops money running, and of what nobody waits for."""
MANY = 8
"""Requests of a caller that wait for the same, from which on they are bulk."""
TURNS_LATER = 2.0
"""By how many turns of every other caller each step of urgency puts a request back: late, but never starved."""
SECONDS_LATER = 10.0
"""By how many seconds it puts one back among its own caller's: there too it is late, but never starved."""


class Place:
    """A request's place among all others: whose it is, how urgent, and when it came."""

    __slots__ = ("left", "number", "urgency", "weight", "who")

    def __init__(self, number: int, *, who: str = "", weight: float = 1.0, urgency: int = USUAL) -> None:
        self.number = number
        self.who = who
        self.weight = weight
        self.urgency = urgency
        self.left = False
        """It no longer waits; its flow drops it when it meets it."""

    def __lt__(self, other: Place) -> bool:
        return self.number < other.number


P = TypeVar("P", bound=Place)


class Flow(Generic[P]):
    """The requests of one caller and one urgency in one line, first come, first served: what stands in an `Order`."""

    __slots__ = ("_heap", "_left", "entry", "line", "order", "since", "step", "urgency", "who")

    def __init__(self, line: Line[P], who: str, urgency: int) -> None:
        self.line = line
        self.who = who
        self.urgency = urgency
        self.since = 0.0
        """When its head became that (monotonic seconds)."""
        self._heap: list[P] = []
        self._left = 0
        self.order: Order[P] | None = None
        """Where it stands."""
        self.entry = 0
        self.step = urgency
        """Its urgency when it took its stand."""

    def __repr__(self) -> str:
        return f"<Flow {self.who or '-'} u={self.urgency}: {len(self)} waiting>"

    def __len__(self) -> int:
        return len(self._heap) - self._left

    def __iter__(self) -> Iterator[P]:
        return (place for place in self._heap if not place.left)

    @property
    def head(self) -> P | None:
        """Who is next of these, or None."""
        return self._heap[0] if self._heap else None

    @property
    def urgent(self) -> int:
        """How urgent it is: many usual requests of one caller are bulk, all of them, so that their order stays."""
        return BULK if self.urgency == USUAL and len(self) >= MANY else self.urgency

    def push(self, place: P, now: float) -> None:
        heappush(self._heap, place)
        if self._heap[0] is place:
            self.since = now

    def drop(self, place: P, now: float) -> None:
        """It does not wait any more."""
        place.left = True
        self._left += 1
        head = self._heap[0]
        while self._heap and self._heap[0].left:
            heappop(self._heap)
            self._left -= 1
        if self._left > 16 and self._left * 2 > len(self._heap):
            self._heap = list(self)
            self._left = 0
            heapify(self._heap)
        if self._heap and self._heap[0] is not head:
            self.since = now


class Line(Generic[P]):
    """Those who wait for calls of one kind: to one endpoint, with one key. Owns who they are, not who goes next.

    Joining and leaving cost O(log n), amortised.
    """

    __slots__ = ("_counts", "_waiting", "_weight", "flows")

    def __init__(self) -> None:
        self.flows: dict[tuple[str, int], Flow[P]] = {}
        self._counts = [0] * 8
        # Of each caller who waits: with how many requests, and its weight.
        self._waiting: dict[str, tuple[int, float]] = {}
        self._weight = 0.0

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[P]:
        return (place for flow in self.flows.values() for place in flow)

    def waiting_of(self, who: str) -> int:
        """Requests of a caller that wait."""
        return self._waiting.get(who, (0, 0.0))[0]

    def ahead_of(self, who: str, weight: float, urgency: int = USUAL, *, own: int | None = None, more: int = 0) -> int:
        """An estimate of how many turns come before that of a request which joins now.

        `own`: so many of its caller's, if not all that are as urgent; `more`: so many others of its like come first.
        """
        mine = [len(self.flows.get((who, step), ())) for step in range(8)]
        own = (sum(mine[: urgency + 1]) if own is None else own) + more
        others = sum(self._counts[: urgency + 1]) - sum(mine[: urgency + 1])
        callers = len(self._waiting) - (who in self._waiting)
        weights = max(0.0, self._weight - self._waiting.get(who, (0, 0.0))[1])
        # Of every other caller one that came before, and as many as its weight gives it while these have their turns.
        return own + min(others, callers + int(min(own * weights / weight, others)))

    def join(self, place: P, now: float) -> Flow[P]:
        """Take a place; one that comes back takes its old one, by its number."""
        flow = self.flows.get((place.who, place.urgency))
        if flow is None:
            flow = self.flows[place.who, place.urgency] = Flow(self, place.who, place.urgency)
        flow.push(place, now)
        self._counts[place.urgency] += 1
        own, known = self._waiting.get(place.who, (0, 0.0))
        self._weight += place.weight - known
        self._waiting[place.who] = own + 1, place.weight
        return flow

    def leave(self, place: P, now: float) -> Flow[P]:
        """Give the place up, or go."""
        flow = self.flows[place.who, place.urgency]
        flow.drop(place, now)
        if not flow:
            del self.flows[place.who, place.urgency]
        self._counts[place.urgency] -= 1
        own, known = self._waiting[place.who]
        if own > 1:
            self._waiting[place.who] = own - 1, known
        else:
            del self._waiting[place.who]
            self._weight = self._weight - known if self._waiting else 0.0
        return flow


class Shares:
    """Who has had how much, in virtual time: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

    A request of a caller starts when its last one has finished, or now if that is past; it finishes one turn, divided
    by the caller's weight, later. The lowest start goes first. Now is the start of who went last, and moves on by what
    a turn is among all who wait and one more: so who comes now is before those who were served just now, but callers
    who come anew all the time are not before those who were served once (as in WF2Q+, Bennett and Zhang 1997).
    """

    __slots__ = ("_count", "_most", "_starts", "_waiting", "_weight", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._starts: dict[str, float] = {}
        self._most = 64
        # Of each caller who waits: with how many requests, and its weight.
        self._waiting: dict[str, tuple[int, float]] = {}
        self._count = 0
        self._weight = 0.0

    def __len__(self) -> int:
        """Callers who wait."""
        return len(self._waiting)

    def ahead_of(self, who: str, weight: float, own: int) -> int:
        """An estimate of how many requests of others have their turns before `own` of this caller's, and one more."""
        mine, known = self._waiting.get(who, (0, 0.0))
        others, weights = self._count - mine, max(0.0, self._weight - known)
        # Of every other caller one that came before, and as many as its weight gives it while those have their turns.
        return min(others, len(self._waiting) - (mine > 0) + int(min(own * weights / weight, others)))

    def start(self, who: str) -> float:
        """The start tag of its next request."""
        return self._starts.get(who, self.now)

    def join(self, who: str, weight: float, again: bool = False) -> None:
        """One more request of it waits. `again`: its last turn came to nothing, and shall not have counted."""
        own, known = self._waiting.get(who, (0, 0.0))
        self._waiting[who] = own + 1, weight
        self._count += 1
        self._weight += weight - known
        start = self.start(who)
        if again:
            start -= 1.0 / weight
        self._starts[who] = start if own or again else max(start, self.now)

    def leave(self, who: str) -> None:
        """One of its requests waits no more."""
        own, known = self._waiting[who]
        self._count -= 1
        if own > 1:
            self._waiting[who] = own - 1, known
            return
        del self._waiting[who]
        self._weight = self._weight - known if self._waiting else 0.0
        if len(self._starts) > self._most:  # who has had no more than others is like one who never came
            self._starts = {
                name: start for name, start in self._starts.items() if name in self._waiting or start > self.now
            }
            self._most = max(64, 2 * len(self._starts))

    def served(self, who: str, weight: float) -> None:
        """A request of it, which still waits, has its turn."""
        start = self.start(who)
        self.now = max(self.now + 1.0 / (self._weight + 1.0), start)
        self._starts[who] = start + 1.0 / weight


class _Standing(Generic[P]):
    """The flows of one caller in one order."""

    __slots__ = ("entries", "flows", "steps", "version")

    def __init__(self) -> None:
        # (when its head came there, and what its urgency adds; number of the head; tie-break; flow; its entry)
        self.entries: list[tuple[float, int, int, Flow[P], int]] = []
        self.flows = 0
        self.steps = [0] * 8
        self.version = 0


class Order(Generic[P]):
    """Flows that wait for the same thing, of whichever lines: callers share it by weight, and `best` goes first.

    Between callers the start tag counts, put back by `TURNS_LATER` for each step of the urgency of the most urgent that
    a caller has here. Which of a caller's own goes is another matter: the one that has been the head of its flow for
    longest, put back by `SECONDS_LATER` for each step. Everything costs O(log n), amortised.
    """

    __slots__ = ("_callers", "_count", "_ranks", "_shares", "_ties")

    def __init__(self) -> None:
        self._shares = Shares()
        self._callers: dict[str, _Standing[P]] = {}
        # (start tag and what urgency adds; number of the head; tie-break; caller; its version)
        self._ranks: list[tuple[float, int, int, _Standing[P], int]] = []
        self._ties = 0
        self._count = 0

    def __len__(self) -> int:
        """Flows that stand here."""
        return self._count

    @property
    def callers(self) -> int:
        """Who has anybody that needs what these wait for."""
        return len(self._shares)

    def ahead_of(self, who: str, weight: float, size: Callable[[Flow[P]], int]) -> int:
        """An estimate of how many turns come before that of a request whose flow stands here now.

        `size`: how many requests of a flow that stands here will go one after the other.
        """
        standing = self._callers.get(who)
        entries = standing.entries if standing is not None else ()
        own = sum(size(flow) for _, _, _, flow, entry in entries if entry == flow.entry)
        return own + self._shares.ahead_of(who, weight, own)

    def join(self, place: Place, again: bool = False) -> None:
        """One more request needs what these wait for, wherever it stands; `again`: it had a turn for nothing."""
        self._shares.join(place.who, place.weight, again)
        if again and place.who in self._callers:
            self._rank(place.who)

    def leave(self, place: Place) -> None:
        """One fewer does."""
        self._shares.leave(place.who)

    def served(self, place: Place) -> None:
        """This one has its turn; it is yet to leave."""
        self._shares.served(place.who, place.weight)
        if place.who in self._callers:
            self._rank(place.who)

    def forget(self) -> None:
        """Nobody is here: nobody is behind anybody."""
        self._shares = Shares()

    def stand(self, flow: Flow[P]) -> None:
        """A flow takes its stand here, and nowhere else."""
        head = flow.head
        assert head is not None
        assert flow.order is None
        flow.order, flow.step = self, flow.urgent
        flow.entry += 1
        standing = self._callers.get(flow.who)
        if standing is None:
            standing = self._callers[flow.who] = _Standing()
        self._ties += 1
        key = flow.since + SECONDS_LATER * flow.step
        heappush(standing.entries, (key, head.number, self._ties, flow, flow.entry))
        standing.flows += 1
        standing.steps[flow.step] += 1
        self._count += 1
        self._rank(flow.who)

    def go(self, flow: Flow[P]) -> None:
        """It stands here no more."""
        flow.order = None
        flow.entry += 1
        standing = self._callers[flow.who]
        standing.flows -= 1
        standing.steps[flow.step] -= 1
        self._count -= 1
        if standing.flows:
            self._rank(flow.who)
        else:
            standing.version += 1
            del self._callers[flow.who]

    def best(self) -> Flow[P] | None:
        """Which goes first; it stays."""
        ranks = self._ranks
        while ranks:
            _, _, _, standing, version = ranks[0]
            if version == standing.version:
                return standing.entries[0][3]
            heappop(ranks)
        return None

    def _rank(self, who: str) -> None:
        """Put a caller where it belongs by now."""
        standing = self._callers[who]
        entries = standing.entries
        while entries[0][4] != entries[0][3].entry:
            heappop(entries)
        if len(entries) > 16 + 4 * standing.flows:
            entries[:] = [item for item in entries if item[4] == item[3].entry]
            heapify(entries)
        step = next(step for step, count in enumerate(standing.steps) if count)
        standing.version += 1
        self._ties += 1
        rank = self._shares.start(who) + TURNS_LATER * step
        heappush(self._ranks, (rank, entries[0][1], self._ties, standing, standing.version))
        if len(self._ranks) > 64 + 4 * len(self._callers):
            self._ranks = [item for item in self._ranks if item[4] == item[3].version]
            heapify(self._ranks)


_STOPPED = re.compile(rb'"state"\s*:\s*"stopped"')
_URGENCY = re.compile(r"(?:^|,)\s*u\s*=\s*([0-7])\s*(?:$|[,;])")


def urgency(route: Route, request: Request) -> int:
    """How urgent a request is: what its Priority says (RFC 9218 4.1, `u=0` to `u=7`), else by what it does."""
    told = _URGENCY.search(header(request.headers, "priority") or "")
    if told is not None:
        return int(told[1])
    stops = route.effect is Effect.WRITE and (route.method == "DELETE" or _STOPPED.search(request.body))
    return STOPS_MONEY if stops else USUAL


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
