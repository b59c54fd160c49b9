"""Who goes next, who is late, who is turned away, and how long a client can be made to wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
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
SECONDS_FIRST = 600.0
"""By how many seconds what stops money running is moved forward among its own caller's."""


class Place:
    """A request's place among all others: whose it is, how urgent, and when it came."""

    __slots__ = ("left", "lent", "number", "urgency", "weight", "who")

    def __init__(
        self, number: int, *, who: str = "", weight: float = 1.0, urgency: int = USUAL, lent: bool = False
    ) -> None:
        self.number = number
        self.who = who
        self.weight = weight
        self.urgency = urgency
        self.lent = lent
        """It is one more place of a request that has a place of its own."""
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
    def later(self) -> float:
        """Seconds by which it is put back among its own caller's."""
        return SECONDS_LATER * self.step - (SECONDS_FIRST if self.step <= STOPS_MONEY else 0.0)

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

    __slots__ = ("_callers", "_counts", "flows")

    def __init__(self) -> None:
        self.flows: dict[tuple[str, int], Flow[P]] = {}
        self._callers = Callers()
        # Of each urgency, how many requests wait; places that are lent are none.
        self._counts = [0] * 8

    def __len__(self) -> int:
        """Requests that wait here; places that are lent are none."""
        return sum(self._counts)

    def __bool__(self) -> bool:
        """Has anybody a place here?"""
        return bool(self.flows)

    def __iter__(self) -> Iterator[P]:
        return (place for flow in self.flows.values() for place in flow)

    def waiting_of(self, who: str, urgency: int = 7) -> int:
        """Places of a caller, lent ones among them, that are as urgent as that or more."""
        return sum(len(self.flows.get((who, step), ())) for step in range(urgency + 1))

    def ahead_of(self, who: str, weight: float, urgency: int = USUAL, *, back: bool = False, more: int = 0) -> int:
        """An estimate of how many turns come before that of a request which joins now, rather too few than too many.

        `back`: it comes back to a place at the head of its own; `more`: so many others of its like come first.
        """
        flow = self.flows.get((who, urgency))
        own = more + (len(flow) if flow is not None and not back else 0)
        if urgency <= STOPS_MONEY:
            return own  # whom it overtakes is not ahead
        if not back:
            # Its caller's other flows take turns with this one, by the age of their heads.
            step = flow.urgent if flow is not None else urgency
            others = [self.flows.get((who, other)) for other in range(8) if other != urgency]
            own += sum(min(len(other), own + 1) for other in others if other is not None and other.urgent <= step)
        rest = sum(self._counts[: urgency + 1]) - self.waiting_of(who, urgency)
        return own + self._callers.ahead_of(who, weight, own, rest)

    def join(self, place: P, now: float) -> Flow[P]:
        """Take a place; one that comes back takes its old one, by its number."""
        usual = self.flows.get((place.who, USUAL)) if place.urgency == BULK else None
        if usual is not None and usual.urgent == BULK:
            place.urgency = USUAL  # these are bulk too, and so it overtakes none that came before
        flow = self.flows.get((place.who, place.urgency))
        if flow is None:
            flow = self.flows[place.who, place.urgency] = Flow(self, place.who, place.urgency)
        flow.push(place, now)
        self._callers.join(place.who, place.weight)
        if not place.lent:
            self._counts[place.urgency] += 1
        return flow

    def leave(self, place: P, now: float) -> Flow[P]:
        """Give the place up, or go."""
        flow = self.flows[place.who, place.urgency]
        flow.drop(place, now)
        if not flow:
            del self.flows[place.who, place.urgency]
        self._callers.leave(place.who)
        if not place.lent:
            self._counts[place.urgency] -= 1
        return flow


class Callers:
    """Who is somewhere, with how many, and with which weight."""

    __slots__ = ("_known", "weight")

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, float]] = {}
        self.weight = 0.0
        """Of all together."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, who: str) -> bool:
        return who in self._known

    def join(self, who: str, weight: float) -> None:
        """With one more; the weight is that of the last one."""
        count, known = self._known.get(who, (0, 0.0))
        self._known[who] = count + 1, weight
        self.weight += weight - known

    def leave(self, who: str) -> None:
        """With one fewer."""
        count, known = self._known[who]
        if count > 1:
            self._known[who] = count - 1, known
        else:
            del self._known[who]
            self.weight = max(0.0, self.weight - known) if self._known else 0.0

    def ahead_of(self, who: str, weight: float, own: int, rest: int) -> int:
        """An estimate of how many of `rest`, the others', go before `own` of this caller's and one more have gone."""
        weights = max(0.0, self.weight - self._known.get(who, (0, 0.0))[1])
        # Of every other caller one that came before, and as many as its weight gives it while those have their turns.
        return max(0, min(rest, len(self) - (who in self) + int(min(own * weights / weight, rest))))


class Shares:
    """Who has had how much, in virtual time: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

    A request of a caller starts when its last one has finished, or now if that is past; it finishes one turn, divided
    by the caller's weight, later. The lowest start goes first. Now is the start of who went last, and moves on by what
    a turn is among all who stand there and one more: so who comes now is before those who were served just now, but
    callers who come anew all the time are not before those who were served once (as in WF2Q+, Bennett and Zhang 1997).
    """

    __slots__ = ("_behind", "_most", "_starts", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._starts: dict[str, float] = {}
        # Of each caller who is waiting and away: how far it was behind when it went.
        self._behind: dict[str, float] = {}
        self._most = 64

    def start(self, who: str) -> float:
        """The start tag of its next request."""
        return self._starts.get(who, self.now)

    def come(self, who: str) -> None:
        """It takes its stand. While it was away, for something else kept it, it has saved up nothing."""
        self._starts[who] = max(self.start(who), self.now - self._behind.pop(who, 0.0))

    def go(self, who: str) -> None:
        """It stands here no more, and may come back at once."""
        self._behind[who] = max(0.0, self.now - self.start(who))

    def end(self, who: str, standing: Container[str]) -> None:
        """None of its requests waits for this any more. `standing`: who stands here."""
        self._behind.pop(who, None)
        if len(self._starts) > self._most:  # who has had no more than others is like one who never came
            self._starts = {
                name: at
                for name, at in self._starts.items()
                if at > self.now or name in self._behind or name in standing
            }
            self._most = max(64, 2 * len(self._starts))

    def served(self, who: str, weight: float, among: float) -> None:
        """A request of it has its turn. `among`: the weight of all who stand there."""
        start = self.start(who)
        self.now = max(self.now + 1.0 / (among + 1.0), start)
        self._starts[who] = start + 1.0 / weight

    def give_back(self, who: str, weight: float) -> None:
        """Its last turn came to nothing, and shall not have counted."""
        start = self.start(who)
        self._starts[who] = start = max(start - 1.0 / weight, min(start, self.now - 1.0 / weight))
        self._behind[who] = max(self._behind.get(who, 0.0), self.now - start)


class _Standing(Generic[P]):
    """The flows of one caller in one order."""

    __slots__ = ("entries", "flows", "steps", "version", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        # (when its head came there, and what its urgency adds; number of the head; tie-break; flow; its entry)
        self.entries: list[tuple[float, int, int, Flow[P], int]] = []
        self.flows = 0
        self.steps = [0] * 8
        self.version = 0


class Order(Generic[P]):
    """Flows that wait for the same thing, of whichever lines: callers share it by weight, and `best` goes first.

    Between callers the start tag counts, put back by `TURNS_LATER` for each step of the urgency of the most urgent that
    a caller has here. Which of a caller's own goes is another matter: the one that has been the head of its flow for
    longest, put back by `SECONDS_LATER` for each step, what stops money running `SECONDS_FIRST` forward. Everything but
    an estimate costs O(log n), amortised.

    To need and to stand are two things: a request needs every limit that its call meets, and stands at one of them.
    """

    __slots__ = ("_callers", "_count", "_needing", "_ranks", "_shares", "_ties", "_weight")

    def __init__(self) -> None:
        self._shares = Shares()
        # Of each caller how many requests need what these wait for, wherever they stand.
        self._needing: dict[str, int] = {}
        self._callers: dict[str, _Standing[P]] = {}
        # (start tag and what urgency adds; number of the head; tie-break; caller; its version)
        self._ranks: list[tuple[float, int, int, _Standing[P], int]] = []
        self._ties = 0
        self._count = 0
        self._weight = 0.0

    def __len__(self) -> int:
        """Flows that stand here."""
        return self._count

    def __bool__(self) -> bool:
        """Does anybody need what these wait for?"""
        return bool(self._needing)

    def ahead_of(
        self, who: str, weight: float, most: int, size: Callable[[Flow[P]], int], *, back: bool = False
    ) -> int:
        """An estimate of how many turns come before that of a request, rather too few than too many.

        It stands behind `most` of its own in a line. `size`: how many requests of a flow that stands here go one after
        the other; `back`: it comes back to a place at the head of its own.
        """
        standing = self._callers.get(who)
        entries = standing.entries if standing is not None and not back else ()
        # The flows of a caller take turns, by the age of their heads.
        own = sum(min(size(flow), most + 1) for _, _, _, flow, entry in entries if entry == flow.entry)
        own = max(own, most)
        mine, known = (standing.flows, standing.weight) if standing is not None else (0, 0.0)
        weights = max(0.0, self._weight - known)
        others = len(self._callers) - (standing is not None)
        return own + min(self._count - mine, others + int(min(own * weights / weight, self._count)))

    def need(self, place: Place) -> None:
        """One more request needs what these wait for, wherever it stands."""
        self._needing[place.who] = self._needing.get(place.who, 0) + 1

    def need_no_more(self, place: Place) -> None:
        """One fewer does."""
        left = self._needing[place.who] - 1
        if left:
            self._needing[place.who] = left
        else:
            del self._needing[place.who]
            if place.who not in self._callers:
                self._shares.end(place.who, self._callers)

    def served(self, place: Place) -> None:
        """This one has its turn; it is yet to go."""
        standing = self._callers.get(place.who)
        among = self._weight if standing is not None else self._weight + place.weight
        self._shares.served(place.who, place.weight, among)
        if standing is not None:
            self._rank(place.who)

    def give_back(self, who: str, weight: float) -> None:
        """The last turn of a caller came to nothing, and shall not have counted."""
        self._shares.give_back(who, weight)
        if who in self._callers:
            self._rank(who)

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
            standing = self._callers[flow.who] = _Standing(head.weight)
            self._shares.come(flow.who)
            self._weight += head.weight
        self._ties += 1
        heappush(standing.entries, (flow.since + flow.later, head.number, self._ties, flow, flow.entry))
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
            if flow.who in self._needing:
                self._shares.go(flow.who)
            else:
                self._shares.end(flow.who, self._callers)
            self._weight = max(0.0, self._weight - standing.weight) if self._callers else 0.0

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
