"""A line for each bucket, one dispatcher for each upstream; slots in flight; learns from every answer.

A turn is chosen only at the moment at which every bucket it needs has a token: then all are taken, or none. Nothing is
reserved ahead and nothing polls: a dispatcher runs when something changed (somebody came or left, a call went out or
was answered) or when its one timer says that the next bucket is due.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush, nlargest
from types import TracebackType
from typing import Any, Self

from aiolimiter import AsyncLimiter

from .clock import Clock
from .policy.errors import Refusal
from .policy.identity import Caller, shown
from .policy.limiting import (
    DEFAULT_INTERVAL,
    EPSILON,
    LONGEST_HEADER_BLOCK,
    Bucket,
    Ceiling,
    Hint,
    LimitRules,
    Rate,
    Send,
    read_rate_headers,
    read_refusal,
)
from .policy.messages import Response
from .policy.queueing import STOPS_MONEY, USUAL, Flow, Line, Order, Place, QueueRules
from .policy.retrying import PASSING
from .policy.routing import Effect, Route

UNLISTED = "(not listed)"
"""After the name of an endpoint that stands in no table."""
EVERYBODY = "*"
"""The credential of a bucket that all keys share."""
SLOW_START_ENDS = 64
"""Calls in flight at which a credential's window no longer matters."""
MOST_BUCKETS, MOST_KNOWN = 20_000, 10_000
KEPT_FOR = 7 * 24 * 3600.0
"""Seconds for which a credential that does not come back is remembered over restarts."""
SWEEP_EVERY = 60.0
MOST_LENT = 64
"""Other callers, and urgencies, at whose places a shared call may go."""
CALLERS_SHOWN = 5
"""Of those who wait in a line, by how many of their requests do."""


_NOTHING_LENT: Mapping[tuple[str, int], tuple[Turn, ...]] = {}


class Turn:
    """One request's wait for its turn, and its place for every further attempt."""

    __slots__ = (
        "deadline",
        "lent",
        "number",
        "owed",
        "paid",
        "refunded",
        "returning",
        "served",
        "urgency",
        "wait",
        "weight",
        "who",
    )

    def __init__(
        self, number: int, deadline: float, *, who: str = "", weight: float = 1.0, urgency: int = USUAL
    ) -> None:
        self.number = number
        self.deadline = deadline
        self.who = who
        self.weight = weight
        self.urgency = urgency
        self.returning = False
        """It has waited before, and comes back to its old place."""
        self.served = False
        """It had a turn."""
        self.lent = _NOTHING_LENT
        """Other turns at whose places it may go as well, by whose and how urgent they are."""
        self.wait: _Wait | None = None
        """While it waits."""
        self.paid: tuple[str, float] | None = None
        """Whose turn it had last, and with which weight; None: nobody's, for nobody waited."""
        self.owed: tuple[str, float] | None = None
        """Whose turn came to nothing: to be given back."""
        self.refunded = False


class _Wait:
    """One attempt's wait: at one place, or at several of which the first that comes counts."""

    __slots__ = ("by", "charged", "deadline", "future", "granted", "origin", "places", "queue", "refusal", "since")

    def __init__(self, origin: Origin, queue: _Queue, deadline: float, since: float) -> None:
        self.origin = origin
        self.queue = queue
        self.deadline = deadline
        self.since = since
        self.places: list[_Place] = []
        """Empty once it is over."""
        self.future: asyncio.Future[None] | None = None
        self.granted = False
        self.by: _Place | None = None
        """The place at which its turn came."""
        self.charged: Limiter | None = None
        self.refusal: Refusal | None = None

    @property
    def gone(self) -> bool:
        """Its caller has left in this very tick, and has not yet come to say so."""
        return self.future is not None and self.future.done()


class _Place(Place):
    """A place that leads back to whom it is for."""

    __slots__ = ("turn", "wait")

    def __init__(self, turn: Turn, wait: _Wait) -> None:
        lent = bool(wait.places)
        super().__init__(turn.number, who=turn.who, weight=turn.weight, urgency=turn.urgency, lent=lent)
        self.turn = turn
        """Whose place it is."""
        self.wait = wait


def _first(lent: Mapping[tuple[str, int], tuple[Turn, ...]]) -> Iterable[Turn]:
    return (turns[0] for turns in lent.values())


class Account:
    """What all routes of a credential share: a bucket, and a window of calls in flight that opens by and by."""

    __slots__ = ("bucket", "in_flight", "waiting", "window")

    def __init__(self, margin: float) -> None:
        self.bucket = Bucket(Rate(0.0), margin, pooled=True)
        self.in_flight = 0
        self.waiting = 0
        # One call, doubled with each answer that is not a 429: a limit not yet known is met by one call, not by thirty.
        self.window = 1.0

    @property
    def known(self) -> bool:
        """It has been seen to bear many calls at once."""
        return self.window >= SLOW_START_ENDS

    def open(self) -> bool:
        """May one more call be in flight?"""
        return self.in_flight < self.window or self.known

    def idle(self, now: float) -> bool:
        return not self.in_flight and not self.waiting and self.bucket.idle(now)


class _Queue(Line[_Place]):
    """The line of one credential at one route, with the buckets that a call of it takes from."""

    __slots__ = ("account", "buckets", "key", "out", "route", "rules", "shared", "waits")

    def __init__(self, key: tuple[str, str, str], route: Bucket, shared: Bucket, account: Account) -> None:
        super().__init__()
        self.key = key
        self.route = route
        self.shared = shared
        self.account = account
        self.buckets = (route, shared, account.bucket)
        self.rules: tuple[Route, LimitRules] | None = None
        """What its rate was made from."""
        self.out = 0
        """Turns granted and not yet closed."""
        self.waits = 0
        """Requests that wait here: fewer than there are places, where some wait at several."""

    def may_go(self, now: float) -> bool:
        """Does every bucket have a token, and the account's window room?"""
        return self.account.open() and all(bucket.due(now) <= now + EPSILON for bucket in self.buckets)


class _Gate(Order[_Place]):
    """Where flows stand that wait for one bucket: only the best is let on to the dispatcher.

    So it costs the same whether ten or ten thousand wait for it.
    """

    __slots__ = ("account", "bucket", "door", "lines")

    def __init__(self, bucket: Bucket, account: Account | None) -> None:
        super().__init__()
        self.bucket = bucket
        self.account = account
        """Whose window counts here too, if this is the account's own bucket."""
        self.lines: set[_Queue] = set()
        """Those that hold somebody and take from this bucket."""
        self.door: float | None = None
        """When the dispatcher will look here next."""

    def due(self, now: float) -> float:
        """When the next call of any line may pass; infinite: when one that passed is sent, or has come back."""
        if self.account is not None and not self.account.open():
            return math.inf
        return self.bucket.due(now)


class Limiter(AsyncLimiter):
    """The ceiling over an upstream: aiolimiter as a meter, read and charged by our own dispatcher.

    Its own waiters are not first come, first served, and it cannot say how long a wait will be; its arithmetic can.
    """

    __slots__ = ()

    def __init__(self, ceiling: Ceiling) -> None:
        super().__init__(ceiling.burst, ceiling.burst * ceiling.per / ceiling.rate)

    def delay(self) -> float:
        """Seconds until a call may go; 0: now."""
        self._leak()
        wait = (1 - self.max_rate + self._level) / self._rate_per_sec
        return wait if wait > EPSILON else 0.0

    @property
    def rate(self) -> float:
        """Calls a second in the long run."""
        return self._rate_per_sec

    def tokens(self) -> float:
        """Calls that may go at once, fractions included."""
        self._leak()
        return self.max_rate - self._level

    def take(self) -> None:
        """Charge one call; in the same tick as `delay() == 0`."""
        self._level += 1

    def give_back(self) -> None:
        """A call that was charged was not sent."""
        self._level = max(0.0, self._level - 1)

    def change(self, ceiling: Ceiling) -> None:
        """Other settings. What was charged stays, so that no fresh burst is handed out, and can be given back."""
        self._leak()
        self.max_rate, self.time_period = ceiling.burst, ceiling.burst * ceiling.per / ceiling.rate
        self._rate_per_sec = self.max_rate / self.time_period
        self._level = min(self._level, self.max_rate)


class Origin(Order[_Place]):
    """One upstream's dispatcher. Owns its ceiling, its slots, and who stands at them: whose buckets have a token."""

    __slots__ = ("in_flight", "limiter", "name", "slots", "timed", "timer", "waiting")

    def __init__(self, name: str, slots: int) -> None:
        super().__init__()
        self.name = name
        self.slots = slots
        self.limiter: Limiter | None = None
        self.in_flight = 0
        self.waiting = 0
        self.timed: list[tuple[float, int, _Gate]] = []
        """Gates by the time at which they are due."""
        self.timer: asyncio.TimerHandle | None = None

    def set_ceiling(self, ceiling: Ceiling | None) -> None:
        if ceiling is not None and self.limiter is not None:
            self.limiter.change(ceiling)
        else:
            self.limiter = Limiter(ceiling) if ceiling is not None else None

    def delay(self) -> float:
        """Seconds until the ceiling and the slots let a call go; infinite: when one in flight has come back."""
        if self.in_flight >= self.slots:
            return math.inf
        return self.limiter.delay() if self.limiter is not None else 0.0

    def __repr__(self) -> str:
        return f"<Origin {self.name}: {self.waiting} waiting, {self.in_flight}/{self.slots} in flight>"


class Ticket:
    """A turn that came. A context: whatever happens inside, its slot and its tokens are given back or charged."""

    __slots__ = ("_admission", "_charged", "_done", "_origin", "_queue", "_turn", "route", "sends", "waited")

    def __init__(
        self,
        admission: Admission,
        origin: Origin,
        queue: _Queue,
        route: Route,
        charged: Limiter | None,
        turn: Turn,
        *,
        waited: bool = False,
    ) -> None:
        self._admission = admission
        self._origin = origin
        self._queue = queue
        self._done = False
        self._charged = charged
        self._turn = turn
        self.waited = waited
        """It stood in line for it."""
        self.route = route
        self.sends: tuple[Send, Send, Send] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sent(self) -> None:
        """The request's bytes go out now: the buckets' clocks start here. Further calls change nothing."""
        if self.sends is None and not self._done:
            now = self._admission.clock.now()
            route, shared, account = self._queue.buckets
            self.sends = (route.stamp(now), shared.stamp(now), account.stamp(now))
            self._admission.changed(self._origin, self._queue)

    def answered(self, response: Response) -> bool:
        """Tell what came back, and learn from it; a refusal shuts its bucket for everybody in line.

        True: it was a 429 that waiting solves, so come back with the same turn.
        """
        again = self._admission.learn(self._origin, self._queue, self, response)
        turn = self._turn
        if again and turn.paid is not None and not turn.refunded:
            # The first time it is not its caller's loss; who provokes them again and again pays for the tokens.
            turn.owed, turn.refunded = turn.paid, True
        turn.paid = None
        return again

    def close(self) -> None:
        """Give back the slot, and the tokens if nothing was sent. Further calls change nothing."""
        if self._done:
            return
        self._done = True
        self._origin.in_flight -= 1
        self._queue.account.in_flight -= 1
        self._queue.out -= 1
        if self.sends is None:
            for bucket in self._queue.buckets:
                bucket.give_back()
            if self._charged is not None:
                self._charged.give_back()
        elif self.sends[0].accepted is None:
            # No answer came, but none came at once either, as refusals do: its spacing is not in doubt.
            for send in self.sends:
                send.settle(True)
        self._admission.changed(self._origin, self._queue)


class Admission:
    """Owns every bucket, line and slot. `repr` is the dashboard's line."""

    def __init__(self, clock: Clock, limits: LimitRules, queue: QueueRules, slots: int = 100) -> None:
        self.clock = clock
        self.limits = limits
        self.rules = queue
        self.origins = {"api": Origin("api", slots), "serverless": Origin("serverless", slots)}
        self._arrivals = itertools.count()
        self._ties = itertools.count()
        self._queues: dict[tuple[str, str, str], _Queue] = {}
        self._buckets: dict[tuple[str, str, str], Bucket] = {}
        self._accounts: dict[tuple[str, str], Account] = {}
        # Of every bucket that somebody waits for, by its id.
        self._gates: dict[int, _Gate] = {}
        self._restored: dict[str, Mapping[str, Any]] = {}
        self._swept = clock.now()
        self.over: Refusal | None = None
        """What everybody is told once the proxy is ending."""
        self.reconfigure(limits, queue, slots)

    @property
    def waiting(self) -> int:
        return sum(origin.waiting for origin in self.origins.values())

    @property
    def in_flight(self) -> int:
        return sum(origin.in_flight for origin in self.origins.values())

    def __repr__(self) -> str:
        return f"<Admission {self.waiting} waiting, {self.in_flight} in flight, {len(self._queues)} lines>"

    # --- Coming and going ---------------------------------------------------------------------------------------------

    def arrive(self, waits: float | None = None, *, who: str = "", weight: float = 1.0, urgency: int = USUAL) -> Turn:
        """A place by arrival, with the deadline until which it may wait (seconds; by default `queue.max_wait`).

        `who` shares with whom: the caller, as far as fairness is concerned, and its weight.
        """
        until = self.clock.now() + (self.rules.max_wait if waits is None else waits)
        return Turn(next(self._arrivals), until, who=who, weight=weight, urgency=urgency)

    async def turn(self, turn: Turn, route: Route, credential: str, *, deadline: float | None = None) -> Ticket:
        """Wait for the turn, in the place of its arrival. Call it again with the same `turn` for a further attempt.

        Raises Refusal: `queue_full`, or `wait_too_long` when the turn would not come, or has not come, before the
        deadline (monotonic seconds; by default the turn's own).
        """
        if self.over is not None:
            raise self.over.with_traceback(None)
        now = self.clock.now()
        origin = self.origins[route.upstream]
        until = turn.deadline if deadline is None else min(deadline, turn.deadline)
        queue = self._queue(route, credential)
        if not origin.waiting and queue.may_go(now) and origin.delay() <= 0:
            # Nobody waits and nothing is in the way: the same grant without a line.
            turn.returning = turn.served = True
            turn.paid = turn.owed = None
            return Ticket(self, origin, queue, route, self._charge(origin, queue), turn)
        expected = min(self._expected(origin, queue, now, one) for one in (turn, *_first(turn.lent)))
        if expected > until:
            raise too_long(queue, expected - now, until - now)
        # What stops money running has room of its own.
        own = queue.waiting_of(turn.who, STOPS_MONEY if turn.urgency <= STOPS_MONEY else 7)
        if own >= self.rules.max_waiting and not turn.returning:
            raise Refusal(429, "queue_full", f"{own} requests wait for {route.name} already; try again later", 30)
        wait = turn.wait = _Wait(origin, queue, until, now)
        try:
            self._join(turn, wait)
            if wait.refusal is not None:
                raise wait.refusal
            if not wait.granted:
                await self._wait(turn, wait, route)
        finally:
            turn.returning = True
            turn.wait = None
        turn.served = True
        turn.paid = (wait.by.who, wait.by.weight) if wait.by is not None else None
        return Ticket(self, origin, queue, route, wait.charged, turn, waited=wait.future is not None)

    def lend(self, turn: Turn, other: Turn) -> None:
        """`other` waits for the same call as `turn`: it goes at the better of their places, and counts for its owner.

        To be taken back when `other` waits no more.
        """
        lent = turn.lent.get((other.who, other.urgency))
        better = other.who != turn.who or (other.urgency, other.number) < (turn.urgency, turn.number)
        if lent is not None:
            turn.lent = {**turn.lent, (other.who, other.urgency): (*lent, other)}
        elif len(turn.lent) < MOST_LENT and better:
            turn.lent = {**turn.lent, (other.who, other.urgency): (other,)}
            if turn.wait is not None and turn.wait.places and not turn.wait.gone:
                self._stand(turn.wait, other)
                self._dispatch(turn.wait.origin)

    def take_back(self, turn: Turn, other: Turn) -> None:
        """It waits no more for the call of `turn`. Further calls change nothing."""
        key = (other.who, other.urgency)
        lent = turn.lent.get(key, ())
        if other not in lent:
            return
        left = tuple(one for one in lent if one is not other)
        turn.lent = {**turn.lent, key: left} if left else {at: some for at, some in turn.lent.items() if at != key}
        wait = turn.wait
        if lent[0] is not other or wait is None:
            return
        for place in [place for place in wait.places if place.turn is other]:
            wait.places.remove(place)
            self._unstand(wait, place)
            if left:
                self._stand(wait, left[0])
            self._serve(wait.origin, wait.queue, self.clock.now())
            self._dispatch(wait.origin)

    def _join(self, turn: Turn, wait: _Wait) -> None:
        wait.origin.waiting += 1
        wait.queue.waits += 1
        wait.queue.account.waiting += 1
        owed, turn.owed = turn.owed, None
        for one in (turn, *_first(turn.lent)):
            back = owed if owed is not None and owed[0] == one.who else None
            self._stand(wait, one, back)
            owed = owed if back is None else None
        self._dispatch(wait.origin)

    def _stand(self, wait: _Wait, turn: Turn, owed: tuple[str, float] | None = None) -> None:
        """Take a place in line. `owed`: whose last turn came to nothing, and shall not have counted."""
        origin, queue = wait.origin, wait.queue
        place = _Place(turn, wait)
        wait.places.append(place)
        flow = queue.join(place, self.clock.now())
        for bucket in queue.buckets:
            gate = self._gates.get(id(bucket))
            if gate is None:
                account = queue.account if bucket is queue.account.bucket else None
                gate = self._gates[id(bucket)] = _Gate(bucket, account)
            gate.lines.add(queue)
            gate.need(place)
            if owed is not None:
                gate.give_back(*owed)
        origin.need(place)
        if owed is not None:
            origin.give_back(*owed)
        self._placed(origin, flow, anew=flow.head is place)

    def _unstand(self, wait: _Wait, place: _Place) -> None:
        """Out of the line."""
        origin, queue = wait.origin, wait.queue
        head = queue.flows[place.who, place.urgency].head
        flow = queue.leave(place, self.clock.now())
        origin.need_no_more(place)
        for bucket in queue.buckets:
            self._gates[id(bucket)].need_no_more(place)
        self._placed(origin, flow, anew=head is place)
        if not queue:
            for bucket in queue.buckets:
                gate = self._gates[id(bucket)]
                gate.lines.discard(queue)
                if not gate.lines:
                    del self._gates[id(bucket)]

    def _placed(self, origin: Origin, flow: Flow[_Place], *, anew: bool) -> None:
        """Somebody joined or left it: if that changed what it stands for, it takes another stand."""
        if not flow:
            if flow.order is not None:
                flow.order.go(flow)
        elif anew or flow.order is None or flow.step != flow.urgent:
            self._ready(origin, flow)

    def _over(self, wait: _Wait) -> None:
        """It waits no more, at none of its places."""
        places, wait.places = wait.places, []
        for place in places:
            self._unstand(wait, place)
        wait.queue.waits -= 1
        wait.queue.account.waiting -= 1
        wait.origin.waiting -= 1
        if not wait.origin.waiting:
            wait.origin.forget()

    async def _wait(self, turn: Turn, wait: _Wait, route: Route) -> None:
        wait.future = asyncio.get_running_loop().create_future()
        timer = None
        if wait.deadline < math.inf:
            timer = self.clock.call_at(wait.deadline, self._late, wait)
        try:
            await wait.future
        except asyncio.CancelledError:
            # The turn may have come, or been refused, in the very tick in which the caller left.
            if wait.granted:
                Ticket(self, wait.origin, wait.queue, route, wait.charged, turn).close()
            elif wait.places:
                self._leave(wait)
                self._dispatch(wait.origin)
            elif not wait.future.cancelled():
                wait.future.exception()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def plan(self, route: Route, caller: Caller, calls: int) -> dict[str, Any]:
        """In how many seconds the first and the last of so many calls would go, if they came now: an estimate."""
        now = self.clock.now()
        origin, queue = self.origins[route.upstream], self._queue(route, caller.credential)
        turn = Turn(0, math.inf, who=caller.who, weight=caller.weight)
        first, last = (self._expected(origin, queue, now, turn, more) - now for more in (0, calls - 1))
        slowest = max(queue.buckets, key=lambda bucket: bucket.spacing if bucket.enforced else 0.0)
        return {
            "first_in": round(max(0.0, first), 3),
            "last_in": round(max(0.0, last), 3),
            "interval": round(slowest.interval, 4),
            "capacity": slowest.capacity,
            "source": slowest.source,
        }

    def in_time(self, turn: Turn, route: Route, credential: str) -> bool:
        """Could it have its turn before its deadline, as far as can be seen?"""
        now = self.clock.now()
        queue = self._queue(route, credential)
        return self._expected(self.origins[route.upstream], queue, now, turn) < turn.deadline - 1.0

    def expected(self, route: Route, credential: str) -> float:
        """Seconds that a request arriving now would wait for its turn: an estimate."""
        now = self.clock.now()
        turn = Turn(0, math.inf)
        return max(0.0, self._expected(self.origins[route.upstream], self._queue(route, credential), now, turn) - now)

    # --- The dispatcher -----------------------------------------------------------------------------------------------

    def changed(self, origin: Origin, queue: _Queue) -> None:
        """A bucket or a slot of that line changed: whoever is next at its gates is looked at again."""
        if origin.waiting:
            self._serve(origin, queue, self.clock.now())
            self._dispatch(origin)

    def _serve(self, origin: Origin, queue: _Queue, now: float) -> None:
        """Let on whoever is next at each gate of this line, or see to it that the gate is looked at in time."""
        for bucket in queue.buckets:
            gate = self._gates.get(id(bucket))
            if gate is not None:
                self._open(origin, gate, now)

    def _open(self, origin: Origin, gate: _Gate, now: float) -> None:
        flow = gate.best()
        head = flow.head if flow is not None else None
        if flow is None or head is None:
            return
        due = gate.due(now)
        if due <= now + EPSILON or head.wait.deadline < due < math.inf:  # to its turn, or to be turned away
            self._ready(origin, flow)
        elif due < math.inf and (gate.door is None or due < gate.door):
            gate.door = due
            heappush(origin.timed, (due, next(self._ties), gate))

    def _ready(self, origin: Origin, flow: Flow[_Place]) -> None:
        """To the dispatcher, who will see whether its buckets have a token."""
        if flow.order is not None:
            flow.order.go(flow)
        origin.stand(flow)

    def _dispatch(self, origin: Origin) -> None:
        """Grant every turn that can be granted now, the best first; set the timer for the next."""
        now = self.clock.now()
        while origin.timed and origin.timed[0][0] <= now + EPSILON:
            due, _, gate = heappop(origin.timed)
            if gate.door == due:
                gate.door = None
                self._open(origin, gate, now)
        wake = math.inf
        while (flow := origin.best()) is not None:
            head = flow.head
            assert head is not None
            queue = head.wait.queue
            if head.wait.gone:
                self._leave(head.wait)
                continue
            if self._park(origin, queue, flow, head.wait, now):
                continue
            wait = origin.delay()
            if wait > 0:
                wake = now + wait
                break
            self._grant(origin, queue, head)
            self._serve(origin, queue, now)
        # Void entries are dropped where they are met, or all at once when they are the most.
        if len(origin.timed) > 64 + 4 * len(self._gates):
            origin.timed = [entry for entry in origin.timed if entry[0] == entry[2].door]
            heapify(origin.timed)
        if not origin.waiting:
            origin.timed.clear()  # gates that nobody stands at any more
        if origin.timed:
            wake = min(wake, origin.timed[0][0])
        if origin.timer is not None:
            origin.timer.cancel()
            origin.timer = None
        if wake < math.inf:
            origin.timer = self.clock.call_at(wake, self._dispatch, origin)

    def _park(self, origin: Origin, queue: _Queue, flow: Flow[_Place], wait: _Wait, now: float) -> bool:
        """If its turn has not come: to the gate that keeps it the longest. True: so it was."""
        latest, at = -math.inf, None
        for bucket in queue.buckets:
            gate = self._gates[id(bucket)]
            due = gate.due(now)
            if due > latest:
                latest, at = due, gate
        if at is None or latest <= now + EPSILON:
            return False
        if wait.deadline < latest < math.inf:
            self._turn_away(wait, too_long(queue, latest - now, wait.deadline - now))
        else:
            origin.go(flow)
            at.stand(flow)
            # It took nothing, so whoever stands behind it at any of its gates comes forward.
            self._serve(origin, queue, now)
        return True

    def _grant(self, origin: Origin, queue: _Queue, place: _Place) -> None:
        wait = place.wait
        wait.granted, wait.by = True, place
        origin.served(place)
        for bucket in queue.buckets:
            self._gates[id(bucket)].served(place)
        self._over(wait)
        wait.charged = self._charge(origin, queue)
        if wait.future is not None:
            wait.future.set_result(None)

    def _charge(self, origin: Origin, queue: _Queue) -> Limiter | None:
        """Take a token of everything that a call of this line touches, and a slot. The ceiling it was taken from."""
        origin.in_flight += 1
        queue.account.in_flight += 1
        queue.out += 1
        for bucket in queue.buckets:
            bucket.grant()
        if origin.limiter is not None:
            origin.limiter.take()
        return origin.limiter

    def _leave(self, wait: _Wait) -> None:
        """It goes without a turn: whoever stood behind it comes forward."""
        self._over(wait)
        self._serve(wait.origin, wait.queue, self.clock.now())

    def _turn_away(self, wait: _Wait, refusal: Refusal) -> None:
        self._leave(wait)
        wait.refusal = refusal
        if wait.future is not None and not wait.future.done():
            wait.future.set_exception(refusal)

    def _late(self, wait: _Wait) -> None:
        """The deadline came before the turn."""
        if not wait.places or wait.gone:
            return
        now = self.clock.now()
        first = wait.places[0]
        turn = Turn(first.number, math.inf, who=first.who, weight=first.weight, urgency=first.urgency)
        turn.returning = wait.queue.flows[first.who, first.urgency].head is first
        expected = self._expected(wait.origin, wait.queue, now, turn) - now
        self._turn_away(wait, too_long(wait.queue, expected, 0.0))
        self._dispatch(wait.origin)

    def _expected(self, origin: Origin, queue: _Queue, now: float, turn: Turn, more: int = 0) -> float:
        """When a turn taken now would come, by who is before it: an estimate, rather too early than too late.

        `more`: so many of its like come before it. One who had a turn comes back to before everybody.
        """
        if turn.served:
            return max(bucket.eta(now, 0) for bucket in queue.buckets)
        who, weight, urgent, back = turn.who, turn.weight, turn.urgency <= STOPS_MONEY, turn.returning
        ahead = queue.ahead_of(who, weight, turn.urgency, back=back, more=more)
        when = max(bucket.eta(now, ahead) for bucket in queue.buckets)
        flow = queue.flows.get((who, turn.urgency))
        own = more + (len(flow) if flow is not None and not back else 0)
        account, gate = queue.account.bucket, self._gates.get(id(queue.account.bucket))
        if gate is not None and account.spacing > 0 and not urgent:
            rivals = gate.ahead_of(who, weight, own, lambda flow: _run(flow, account.spacing, account), back=back)
            when = max(when, account.eta(now, rivals))
        if origin.limiter is not None:
            pace = 1.0 / origin.limiter.rate
            rivals = 0 if urgent else origin.ahead_of(who, weight, own, lambda flow: _run(flow, pace), back=back)
            when = max(when, now + origin.limiter.delay() + pace * max(ahead, rivals))
        return when

    # --- Learning -----------------------------------------------------------------------------------------------------

    def learn(self, origin: Origin, queue: _Queue, ticket: Ticket, response: Response) -> bool:
        """Take in one answer: whose limit it met, what that says of it, and who must wait for it."""
        ticket.sent()  # an answer is proof, should the transport not have told
        assert ticket.sends is not None
        now, wall = self.clock.now(), self.clock.wall()
        sends = ticket.sends
        hint = None
        if response.status == 429:
            hint = read_refusal(response.headers, response.body, wall)
        if response.status in PASSING:
            # It may never have come as far as the limits: it proves nothing of them.
            return False
        if hint is None or hint.kind != "rate" or ticket.route.pass_429:
            counted_for_all = queue.shared.enforced
            for bucket, send in zip(queue.buckets, sends, strict=True):
                bucket.accepted(send, now)
            if counted_for_all and not queue.shared.enforced:
                self._look_again(origin, (queue.shared,))  # forgotten: nobody waits for it any more
            if queue.account.window < SLOW_START_ENDS:
                queue.account.window *= 2
            self._observe(queue, ticket.route, sends, response, wall)
            self.changed(origin, queue)
            return False
        self._blame(queue, sends, hint, now)
        # For everybody in line: who now would wait too long is told so at once.
        self._look_again(origin, [bucket for bucket in queue.buckets if bucket.enforced])
        self.changed(origin, queue)
        return True

    def _blame(self, queue: _Queue, sends: tuple[Send, Send, Send], hint: Hint, now: float) -> None:
        """Whose 429 was it: the route's, the route's for all keys together, or the account's?"""
        route, shared, account = sends
        for send in sends:
            send.settle(True)  # but for the one that is to blame
        others_called = shared.gap < route.gap and shared.gap < queue.shared.interval
        if queue.shared.enforced:
            queue.shared.refused(shared, hint, now)
        elif queue.route.explains(route):
            queue.route.refused(route, hint, now)
        elif others_called and self.limits.scope == "auto":
            queue.shared.enforce(now)
            queue.shared.refused(shared, hint, now)
        elif hint.threshold is not None:
            # It speaks of this endpoint, so somebody else calls it with the same key.
            queue.route.refused(route, hint, now)
        else:
            # The route had been left alone for long enough, so it is what all routes share.
            queue.account.window = 1.0
            queue.account.bucket.refused(account, hint, now)

    def _look_again(self, origin: Origin, buckets: Iterable[Bucket]) -> None:
        """What these buckets allow became another thing: every line that takes from one is looked at anew."""
        now = self.clock.now()
        for bucket in buckets:
            gate = self._gates.get(id(bucket))
            if gate is None:
                continue
            due = bucket.due(now)
            late = [
                flow
                for line in gate.lines
                for flow in line.flows.values()
                if flow.head is not None and flow.head.wait.deadline < due < math.inf
            ]
            for flow in late:  # the others see it when they come forward
                self._ready(origin, flow)
            self._open(origin, gate, now)

    def _observe(
        self, queue: _Queue, route: Route, sends: tuple[Send, Send, Send], response: Response, wall: float
    ) -> None:
        seen = read_rate_headers(response.headers, wall)
        if seen is None:
            return
        ours = queue.route.observe(
            sends[0], seen, queue.account.bucket.sends, may_raise=route.effect is not Effect.SPEND
        )
        if not ours and seen.remaining < 1:
            # The headers do not say whose they are. The account's, if they fit what is known of it; else this route's.
            account = queue.account.bucket
            if account.source == "learned" and round(seen.limit) == account.capacity:
                account.observe(sends[2], seen, account.sends, may_raise=False)
            else:
                wait = min(seen.reset_in if seen.reset_in is not None else DEFAULT_INTERVAL, LONGEST_HEADER_BLOCK)
                queue.route.shut(sends[0].at + wait)

    # --- Buckets ------------------------------------------------------------------------------------------------------

    def reconfigure(self, limits: LimitRules, queue: QueueRules, slots: int, routes: Iterable[Route] = ()) -> None:
        """Other settings, also for those who wait: what was learned and what is owed stay."""
        rescoped = limits.scope != self.limits.scope
        self.limits, self.rules = limits, queue
        self.origins["api"].set_ceiling(limits.global_)
        self.origins["serverless"].set_ceiling(limits.serverless)
        for bucket in (*self._buckets.values(), *(account.bucket for account in self._accounts.values())):
            bucket.keep_margin(limits.margin)
        now_listed = {(route.upstream, route.name): route for route in routes}
        for line in self._queues.values():
            if line.rules is not None:
                route = now_listed.get(line.key[1:], line.rules[0])
                line.rules = (route, limits)
                line.route.base = line.shared.base = self._rate(route)
        if rescoped:
            # Who waits goes on in the line it is in, at the pace of that; who comes from now on is counted by the new
            # scope, for which a bucket that all keys shared is no more than a shadow.
            for line in self._queues.values():
                if line.key[0] == EVERYBODY and (line or line.out):
                    self._buckets.pop(line.key, None)
            self._queues = {}
        for origin in self.origins.values():
            origin.slots = slots
        self._look_at_all()

    def forget(self, upstream: str) -> None:
        """That upstream is another server now: what the old one taught says nothing of it."""
        for key, bucket in self._buckets.items():
            if key[1] == upstream:
                bucket.unlearn()
        for (_, name), account in self._accounts.items():
            if name == upstream:
                account.bucket.unlearn()
                account.window = 1.0
        self._restored = {key: kept for key, kept in self._restored.items() if key.split(" ")[1:2] != [upstream]}
        self._look_at_all()

    def _look_at_all(self) -> None:
        for line in self._waiting_lines():
            for flow in line.flows.values():
                self._ready(self.origins[line.key[1]], flow)
        for origin in self.origins.values():
            self._dispatch(origin)

    def _waiting_lines(self) -> set[_Queue]:
        return {line for gate in self._gates.values() for line in gate.lines}

    def turn_all_away(self, refusal: Refusal) -> None:
        """The end: who waits is told so, and so is who comes."""
        self.over = refusal
        for line in self._waiting_lines():
            for wait in {place.wait for place in line}:
                self._turn_away(wait, refusal)

    def is_refused(self, route: Route, credential: str) -> bool:
        """Is the vendor refusing these calls at present? Else a wait is our own line's doing."""
        now = self.clock.now()
        queue = self._queue(route, credential)
        return any(bucket.enforced and bucket.refused_in_row and bucket.due(now) > now for bucket in queue.buckets)

    def _line_key(self, route: Route, credential: str) -> tuple[str, str, str]:
        # What is not listed may look like what is: the careful numbers of a guess are not for a known endpoint.
        name = route.name if route.listed else f"{route.name} {UNLISTED}"
        return EVERYBODY if self.limits.scope == "ip" else credential, route.upstream, name

    def _queue(self, route: Route, credential: str) -> _Queue:
        key = self._line_key(route, credential)
        who = key[0]
        queue = self._queues.get(key)
        if queue is None:
            self._sweep()
            account = self._accounts.get((who, route.upstream))
            if account is None:
                account = self._accounts[who, route.upstream] = Account(self.limits.margin)
                self._restore_account(f"{who} {route.upstream} account", account)
            base = self._rate(route)
            mine = self._bucket(key, base, enforced=True)
            if who == EVERYBODY:
                shared = Bucket(base, self.limits.margin, enforced=False)
            else:
                shared = self._bucket((EVERYBODY, *key[1:]), base, enforced=False)
            queue = self._queues[key] = _Queue(key, mine, shared, account)
        elif queue.rules != (route, self.limits):
            queue.route.base = queue.shared.base = self._rate(route)  # settings were reloaded
        queue.rules = (route, self.limits)
        return queue

    def _rate(self, route: Route) -> Rate:
        interval = DEFAULT_INTERVAL if route.interval is None else route.interval
        if route.overridden:
            return Rate(interval, route.capacity, route.penalty, "configured")
        source = "default" if route.interval is None else "documented"
        return Rate(interval * self.limits.scale, route.capacity, route.penalty, source)

    def _bucket(self, key: tuple[str, str, str], base: Rate, *, enforced: bool) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(base, self.limits.margin, enforced=enforced)
            kept = self._restored.pop(" ".join(key), None)
            if kept is not None:
                bucket.load(kept, self.clock.now(), self.clock.wall())
        held = bucket.enforced
        bucket.always(enforced, forget=self.limits.scope == "key")
        if held and not bucket.enforced:
            origin = self.origins[key[1]]
            self._look_again(origin, (bucket,))  # nobody waits for it any more
            self._dispatch(origin)
        return bucket

    def _restore_account(self, key: str, account: Account) -> None:
        kept = self._restored.pop(key, None)
        if kept is not None:
            account.bucket.load(kept, self.clock.now(), self.clock.wall())
            account.window = SLOW_START_ENDS if kept.get("known") is True else 1.0

    def _sweep(self) -> None:
        """Forget lines, buckets and accounts that know nothing, now and then: callers who left cost nothing."""
        now = self.clock.now()
        if now - self._swept < (SWEEP_EVERY if len(self._buckets) < MOST_BUCKETS else 1.0):
            return
        self._swept = now
        for bucket in self._buckets.values():
            bucket.expire(now)
        if len(self._buckets) > MOST_BUCKETS:
            self._drop_oldest(now)
        self._queues = {
            key: queue for key, queue in self._queues.items() if queue or queue.out or not queue.route.idle(now)
        }
        used = {id(bucket) for queue in self._queues.values() for bucket in queue.buckets}
        self._buckets = {k: b for k, b in self._buckets.items() if id(b) in used or not b.idle(now)}
        self._accounts = {
            key: account
            for key, account in self._accounts.items()
            # One whose window is open is kept while there is room, so that it need not start slowly again.
            if id(account.bucket) in used
            or not account.idle(now)
            or (account.known and len(self._accounts) < MOST_KNOWN)
        }

    def _drop_oldest(self, now: float) -> None:
        """Too many keys to remember each: what was learned from those who were here longest ago goes."""
        for bucket in sorted(self._buckets.values(), key=lambda bucket: bucket.last_sent)[: len(self._buckets) // 2]:
            if not bucket.pending and bucket.tat <= now and id(bucket) not in self._gates:
                bucket.unlearn()

    # --- Kept over a restart, and shown -------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """What was learned and what is owed, as JSON: keys are digests and templates."""
        now, wall = self.clock.now(), self.clock.wall()
        # Who has not come back since is carried on, but not for ever.
        kept: dict[str, Any] = {key: {"seen": 0, **state} for key, state in self._restored.items()}
        for key, bucket in self._buckets.items():
            state = bucket.dump(now, wall)
            if state and (bucket.enforced or "interval" in state):
                kept[" ".join(key)] = state | {"seen": _seen(bucket, now, wall)}
        for (who, upstream), account in self._accounts.items():
            state = account.bucket.dump(now, wall)
            if account.known:
                state["known"] = True
            if state:
                kept[f"{who} {upstream} account"] = state | {"seen": _seen(account.bucket, now, wall)}
        return {key: state for key, state in kept.items() if wall - state["seen"] < KEPT_FOR}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `dump` gave; each bucket does when it is first used."""
        self._restored = {
            key: state
            for key, state in kept.items()
            if isinstance(state, dict) and isinstance(state.get("seen", 0), int | float)
        }

    def limits_known(self, most: int | None = None, of: str | None = None) -> Iterable[dict[str, Any]]:
        """Every bucket in use, for people: what it allows, where that is from, when it is next due.

        `most`: of those of routes, and of those of accounts, only so many, the last used. `of`: only those that calls
        with this credential meet.
        """
        now = self.clock.now()
        used = [item for item in self._buckets.items() if _in_use(item[1])]
        accounts = list(self._accounts.items())
        if of is not None:
            used = [item for item in used if item[0][0] in (of, EVERYBODY)]
            accounts = [item for item in accounts if item[0][0] in (of, EVERYBODY)]
        if most is not None:
            used = nlargest(most, used, key=lambda item: item[1].last_sent)
            accounts = nlargest(most, accounts, key=lambda item: item[1].bucket.last_sent)
        for (who, upstream, template), bucket in sorted(used):
            yield _shown(who, upstream, template, bucket, now) | {
                "waiting": queue.waits if (queue := self._queues.get((who, upstream, template))) is not None else 0
            }
        for (who, upstream), account in sorted(accounts):
            yield _shown(who, upstream, "account", account.bucket, now) | {
                "waiting": account.waiting,
                "in_flight": account.in_flight,
                "window": None if account.known else int(account.window),
            }

    def lines_waiting(self, most: int | None = None) -> Iterable[dict[str, Any]]:
        """Every line that somebody stands in, the longest first, for people. `most`: only so many of them."""
        now = self.clock.now()
        lines = self._waiting_lines()
        for line in nlargest(len(lines) if most is None else most, lines, key=lambda line: line.waits):
            who, upstream, name = line.key
            origin = self.origins[upstream]
            due = self._due(origin, line, now)
            yield {
                "credential": shown(who),
                "upstream": upstream,
                "route": name,
                "waiting": line.waits,
                "oldest_for": round(max((now - place.wait.since for place in line), default=0.0), 3),
                "held_by": self._held_by(origin, line, now),
                "due_in": None if due == math.inf else round(max(0.0, due - now), 3),
                "newcomer_in": round(max(0.0, self._expected(origin, line, now, Turn(0, math.inf)) - now), 3),
                "callers": [
                    {"caller": shown(flow.who), "waiting": len(flow), "urgency": flow.urgent}
                    for flow in nlargest(CALLERS_SHOWN, line.flows.values(), key=len)
                ],
            }

    def lines_of(self, caller: Caller) -> Iterable[dict[str, Any]]:
        """The lines in which this caller has somebody, for it alone: how many it has there, and all together."""
        now = self.clock.now()
        turn = Turn(0, math.inf, who=caller.who, weight=caller.weight)
        lines = [line for line in self._waiting_lines() if line.waiting_of(caller.who)]
        for line in sorted(lines, key=lambda line: line.key):
            who, upstream, name = line.key
            if who not in (caller.credential, EVERYBODY):
                continue
            origin = self.origins[upstream]
            due = self._due(origin, line, now)
            yield {
                "upstream": upstream,
                "route": name,
                "waiting": line.waiting_of(caller.who),
                "of": line.waits,
                "next_in": None if due == math.inf else round(max(0.0, due - now), 3),
                "one_more_in": round(max(0.0, self._expected(origin, line, now, turn) - now), 3),
            }

    def _held_by(self, origin: Origin, line: _Queue, now: float) -> str:
        """What keeps this line the longest, for people."""
        if origin.in_flight >= origin.slots:
            return "upstreams.max_connections"
        if not line.account.open():
            return "first answers of this key"
        dues = {
            "limit": line.route.due(now),
            "limit for all keys": line.shared.due(now),
            "limit of the account": line.account.bucket.due(now),
            "limits.global": now + (origin.limiter.delay() if origin.limiter is not None else 0.0),
        }
        what, due = max(dues.items(), key=lambda item: item[1])
        if due == math.inf:
            return "a call under way"
        return what if due > now + EPSILON else "others' turns"

    def _due(self, origin: Origin, line: _Queue, now: float) -> float:
        """When the next of this line may go, as far as limits are concerned."""
        return max(now + origin.delay(), *(bucket.due(now) for bucket in line.buckets))

    def ceilings(self) -> dict[str, dict[str, Any]]:
        """What is under way to each upstream, and the ceiling over all calls to it."""
        return {
            name: {
                "waiting": origin.waiting,
                "in_flight": origin.in_flight,
                "slots": origin.slots,
                "rate": None if origin.limiter is None else round(origin.limiter.rate, 4),
                "burst": None if origin.limiter is None else origin.limiter.max_rate,
                "tokens": None if origin.limiter is None else round(origin.limiter.tokens(), 2),
            }
            for name, origin in self.origins.items()
        }


def _run(flow: Flow[_Place], pace: float, but: Bucket | None = None) -> int:
    """How many of a flow that stands at a bucket of that pace go one after the other there: all, if that is slowest."""
    head = flow.head
    assert head is not None
    slower = any(one is not but and one.enforced and one.spacing > pace for one in head.wait.queue.buckets)
    return 1 if slower else len(flow)


def _in_use(bucket: Bucket) -> bool:
    return bucket.enforced and (bucket.sends > 0 or bucket.source == "learned")


def _seen(bucket: Bucket, now: float, wall: float) -> int:
    """The date of a bucket's last call, or today's for one that was only taken over."""
    return round(wall - (now - bucket.last_sent) if bucket.last_sent > -math.inf else wall)


def _shown(who: str, upstream: str, template: str, bucket: Bucket, now: float) -> dict[str, Any]:
    due = bucket.due(now)
    return {
        "credential": shown(who),
        "upstream": upstream,
        "route": template,
        "interval": round(bucket.interval, 4),
        "capacity": bucket.capacity,
        "margin": round(bucket.margin, 4),
        "source": bucket.source,
        "tokens": round(bucket.tokens(now), 2),
        "due_in": None if due == math.inf else round(max(0.0, due - now), 3),
        "sends": bucket.sends,
        "correction": bucket.correction,
    }


def too_long(queue: _Queue, wait: float, bound: float) -> Refusal:
    """Refused at once, or at the deadline: the turn will not come in time."""
    later = max(1.0, wait - max(0.0, bound))
    msg = f"The turn of {queue.key[2]} is about {max(0.0, wait):.0f} s away, later than it may wait (queue.max_wait); "
    return Refusal(429, "wait_too_long", f"{msg}try again in {math.ceil(later)} s", later)
