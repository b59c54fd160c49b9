"""The path of one request, from who asks to what is answered. Read top to bottom."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cachetools import TTLCache

from .admission import Admission, Ticket, Turn
from .cleaning import cleaned
from .clock import Clock
from .coalescer import Coalescer, Flight
from .ledger import Entry, Ledger
from .policy import caching, guarding, members, queueing, retrying, tracing
from .policy.breaking import LOOK_AGAIN, Breaker, Call, Pass
from .policy.caching import Directives, Stored
from .policy.errors import GIVE_UP_AFTER, Refusal, UpstreamError
from .policy.identity import ANONYMOUS, Caller
from .policy.limiting import MAX_429
from .policy.messages import CacheStatus, Exchange, Headers, Request, Response, Step, since
from .policy.queueing import BULK, USUAL
from .policy.routing import Route
from .settings import Settings
from .spends import Spend, Spends
from .store import Store

PLACES, PLACES_OF_ONE, PLACE_KEPT_FOR = 10_000, 1000, 60.0
"""Kept places: of so many requests, so many of one, for so many seconds."""


POLLED_WITHIN = 30.0
"""Seconds within which a read that comes again, the same to the byte, is a poll."""
LARGEST_SEEN = 8 * 1024
"""Bytes of a stored answer that may be kept with the request it answers."""


class Sender(Protocol):
    """The upstream, as the path knows it: one verb."""

    async def send(self, request: Request, upstream: str, sent: Callable[[], None]) -> Response:
        """Send once; `sent` is called when bytes go out. Raises UpstreamError."""


NO_CALL = Call("", "")


@dataclass(slots=True)
class Fetched:
    """What a flight brought, for everybody in it."""

    outcome: Response | Refusal
    cache: CacheStatus = CacheStatus.MISS
    was_stale: bool = False
    """There was an answer, past its time."""
    stored: bool = False
    ttl: float | None = None
    age: float | None = None
    attempts: int = 0
    refusals: int = 0
    queued: float = 0.0
    upstream: float = 0.0
    steps: tuple[Step, ...] = ()


def _has_rest(fetched: Fetched) -> bool:
    return isinstance(fetched.outcome, Response) and fetched.outcome.rest is not None


def _drop_rest(fetched: Fetched) -> None:
    if isinstance(fetched.outcome, Response) and fetched.outcome.rest is not None:
        fetched.outcome.rest.close()


class _Seen:
    """What the store held when it was last asked: as long as nothing in it changes, the same."""

    __slots__ = ("asked", "generation", "stored")

    def __init__(self) -> None:
        self.generation: int | None = None
        self.stored: Stored | None = None
        self.asked: float | None = None
        """When the same request last asked for more than what is stored."""


@dataclass(frozen=True, slots=True)
class Understood:
    """A request and all that follows from it and the settings alone."""

    settings: Settings
    """Those in force when it came: for the whole journey."""
    request: Request
    caller: Caller
    route: Route
    asked: Directives
    question: str | None
    """The key of what is asked, epochs apart; None: neither stored nor shared."""
    epochs: tuple[str, ...]
    """Those in whose light an answer to it is valid."""
    lifetime: tuple[float, float] | None
    """Seconds for which an answer is fresh, and for how much longer it may serve; None: never stored."""
    beat: bytes
    """The interim answer that keeps this client waiting; empty: none."""
    patience: float
    """Seconds for which it can be held."""
    idempotency_key: str = ""
    """By which a write says itself whether it is another one."""
    forbidden: Refusal | None = None
    """Why this member of the team may not ask for it."""
    urgency: int = USUAL
    """How urgent it is by itself."""
    call: Call = NO_CALL
    """What a breaker knows it by."""
    label: str = ""
    """`Caller.label`, made once."""
    seen: _Seen = field(default_factory=_Seen, compare=False)


@dataclass(frozen=True, slots=True)
class _Stale:
    """A stored answer that is not fresh: served instead of a long wait or a failure."""

    stored: Stored
    since: float
    """Seconds since it was fresh."""
    current: bool
    """Of the epoch in force; else a write has been done since."""


@dataclass(slots=True)
class _Journey:
    """One upstream call and what is known before it begins. Owned by its flight."""

    known: Understood
    request: Request
    """As it is sent."""
    turn: Turn
    began: float
    exchange: Exchange
    """Of whoever leads it: is told of its tries also when that one has left."""
    waited: tuple[float, float]
    """What that one waited for before, in line and at upstream: for a call that it shared in vain."""
    queued: bool = False
    """It has waited in line."""
    kept_off: float = 0.0
    """Seconds that it has waited for an upstream that is away."""
    entry: Entry | None = None
    """Of a write: where it is remembered."""
    spend: Spend | None = None
    """Of a call that counts for its member's day."""
    epoch: str | None = None
    """The key of its question in the epochs in which it was sent."""
    stale_allowed: bool = False
    fallback: _Stale | None = None
    """What there was to fall back on when it began."""
    acted: bool = False
    """It was, or may have been, done at upstream."""
    in_doubt: bool = False
    """An earlier try may have been done, whatever the last one was answered."""

    @property
    def may_keep(self) -> bool:
        """Once it is sent it is finished: a write always, a read if its answer can be stored."""
        route = self.known.route
        return not route.is_read or self.known.lifetime is not None


_NOBODY = Refusal(500, "outcome_unknown", "given up: nobody waits for it any more")


class Progress(Protocol):
    """How far the call is that somebody waits for."""

    busy: bool
    """It is past waiting: its answer may come at any moment."""

    def when_over(self, callback: Callable[[], None]) -> None:
        """Called once it has ended, or at once if it has."""


Watch = Callable[[Progress], None]


class Pipeline:
    """Wires policy, store, coalescer, admission and upstream into one path. Owns none of their state."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        store: Store,
        admission: Admission,
        ledger: Ledger,
        breakers: Mapping[str, Breaker],
        upstream: Sender,
        chance: Callable[[], float],
        spends: Spends,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.store = store
        self.admission = admission
        self.ledger = ledger
        self.breakers = breakers
        self.upstream = upstream
        self.chance = chance
        self.spends = spends
        self.tried: Callable[[Exchange, Step], None] = lambda exchange, step: None
        """Told of each try that was sent, as it ends, and whose it was."""
        self.flights: Coalescer[Fetched] = Coalescer(_has_rest, _drop_rest)
        self.pausing: Counter[str] = Counter()
        """Of each upstream, how many calls wait beside the line after a failure, their own or others'."""
        self._places_until = 0.0
        # Places given up unserved, kept a while for whoever comes back with the same request.
        self._places: TTLCache[str, deque[Turn]] = TTLCache(PLACES, PLACE_KEPT_FOR, timer=clock.now)

    def understand(self, request: Request, fields: Headers, *, http_1_1: bool, address: str = "") -> Understood:
        """Who asks what, and how long it can be held; `fields`: its headers before any was stripped.

        A pure function of the request, the client's address and the settings in force, so that whoever sees the same
        again may keep it. Raises Refusal.
        """
        settings = self.settings
        asked_for = request.target
        request, caller = members.admit(request, settings.team, settings.team_keys, address)
        route = settings.routes.match(request.method, request.target)
        key = "" if route.is_read else guarding.idempotency_key(request)
        if any(name.lower() == guarding.FIELD for name, _ in request.headers):  # it is for us
            passed_on = tuple(item for item in request.headers if item[0].lower() != guarding.FIELD)
            request = replace(request, headers=passed_on)
        asked = caching.directives(request.headers)
        question = None
        if route.collapse and not asked.no_store and caching.may_share(route, request):
            origin = _origin(settings, route)
            question = caching.question(route, request, caller, settings.cache, origin, settings.team_digest)
        beat = queueing.interim(request.headers, http_1_1, settings.queue)
        patience = queueing.patience(fields, request.target, route.upstream, settings.queue, beating=bool(beat))
        epochs = caching.epochs_of_read(route, caller, settings.cache)
        stored = question is not None and route.family is not None
        lifetime = caching.lifetimes(route.family, settings.cache) if stored and route.family is not None else None
        forbidden = members.forbidden(caller, route, asked_for, settings.team, settings.routes)
        return Understood(
            settings,
            request,
            caller,
            route,
            asked,
            question,
            epochs,
            lifetime,
            beat,
            patience,
            key,
            forbidden,
            queueing.urgency(route, request),
            Call(route.name, caller.who, careful=not route.may_be_replayed),
            caller.label,
        )

    def vouched(self, request: Request) -> bool:
        """Is it known by the head of a request that it may have a body of any size? Raises Refusal."""
        team = self.settings.team
        return not team or members.vouched(request, team)

    def caller(self, request: Request, address: str) -> Caller:
        """Who asks for a page about its own work. Raises Refusal."""
        _, caller = members.admit(request, self.settings.team, self.settings.team_keys, address)
        if caller.credential == ANONYMOUS:
            msg = "this page tells of your own requests: ask with the key that they are made with"
            raise Refusal(401, "key_needed", msg)
        return caller

    async def stored(self, known: Understood, exchange: Exchange) -> Response | None:
        """A fresh answer from the store, at once; None if there is none. Raises Refusal."""
        route, asked = known.route, known.asked
        exchange.route, exchange.caller, exchange.effect = route.template, known.label, route.effect
        exchange.listed, exchange.origin, exchange.address = route.listed, route.upstream, known.caller.address
        if known.forbidden is not None:
            raise known.forbidden.with_traceback(None)
        if route.refused:
            raise Refusal(403, "not_for_clients", f"{route.name} is for workers inside instances, not for this proxy")
        if known.lifetime is not None:
            seen, generation = known.seen, self.store.generation
            if generation is None or seen.generation != generation:
                frozen = await self.store.get(await self._key(known))
                stored = caching.thaw(frozen) if frozen is not None else None
                # Kept so only where it is small: what the store has pushed out must not live on here.
                small = frozen is None or len(frozen) <= LARGEST_SEEN
                seen.generation, seen.stored = (generation, stored) if small else (None, None)
            else:
                stored = seen.stored
            if stored is not None:
                ttl = known.lifetime[0]
                age = self.clock.now() - stored.born
                if age < sum(known.lifetime) and caching.fresh(age, ttl, asked):
                    exchange.cache, exchange.age, exchange.ttl = CacheStatus.HIT, age, ttl - age
                    return _revived(stored, known.request.headers)
        if asked.only_if_cached:
            raise _not_cached(route)
        return None

    def fetch(
        self, known: Understood, exchange: Exchange, watch: Watch = lambda flight: None
    ) -> Coroutine[Any, Any, Response]:
        """An answer from upstream, waited for in its turn. `watch` is shown the flight. Raises Refusal."""
        if exchange.trace is not None:
            known = replace(known, request=tracing.passed_on(known.request, exchange.trace))
        if not known.route.is_read:
            return self._write(known, exchange, watch)
        turn = self._turn(known)
        if known.question is None or known.asked.no_cache:
            return self._alone(known, turn, exchange, watch)
        return self._together(known, turn, exchange, watch)

    # --- Alone or together --------------------------------------------------------------------------------------------

    async def _alone(self, known: Understood, turn: Turn, exchange: Exchange, watch: Watch) -> Response:
        """A read that asks for an answer of its own."""
        journey = self._journey(known, known.request, turn, exchange)
        if known.question is None:
            # Of no use to anybody else: it goes when its caller goes.
            flight: Flight[Fetched] = Flight()
            flight.members = 1
            watch(flight)
            fetched = await self._fetch(journey, flight)
            if fetched.cache is CacheStatus.MISS:
                fetched.cache = CacheStatus.BYPASS
            return self._told(fetched, None, exchange)
        landed, _ = await self.flights.join(None, lambda flight: self._fetch(journey, flight), watch)
        assert landed is not None  # nobody else can have taken it
        return self._told(landed, known.request.headers, exchange)

    async def _write(self, known: Understood, exchange: Exchange, watch: Watch) -> Response:
        """A call that changes something: sent, unless it is the same that was sent already and nobody has heard of."""
        request, route = known.request, known.route
        origin = _origin(known.settings, route)
        began = self.clock.now()
        entry = self.ledger.open(guarding.describe(request, route, known.caller, origin, known.idempotency_key))
        try:
            fetched, adopted = None, True
            if entry.ended is None:
                fetched, adopted = await self.flights.join(
                    entry.name,
                    lambda flight: self._spending(
                        self._journey(known, request, self._turn(known), exchange, entry), flight
                    ),
                    watch,
                )
        except BaseException:
            self.ledger.gone(entry)
            raise
        if fetched is None:
            fetched = Fetched(entry.outcome or retrying.unknown(route, entry.what, self._dates(entry)))
        asked = request.headers if adopted else None
        if fetched.cache is CacheStatus.MISS and not adopted:
            fetched.cache = CacheStatus.BYPASS
        try:
            response = self._told(fetched, asked, exchange, joined=began if adopted else None)
        except Refusal:
            self.ledger.told(entry)
            raise
        return replace(response, receipt=_Receipt(self.ledger, entry))

    async def _spending(self, journey: _Journey, flight: Flight[Fetched]) -> Fetched:
        """Fetch, if its member has a spend left for it today; one that was not done is given back."""
        known, member = journey.known, journey.known.settings.team.members.get(journey.known.caller.member)
        size = members.spends_in(known.request, known.route)
        if member is None or member.spends_per_day is None or not size:
            return await self._fetch(journey, flight)
        try:
            journey.spend = self.spends.reserve(known.caller.member, size, member.spends_per_day)
        except Refusal as refusal:
            return Fetched(refusal)
        done = True
        try:
            fetched = await self._fetch(journey, flight)
            outcome = fetched.outcome
            refused = isinstance(outcome, Response) and 400 <= outcome.status < 500 and not outcome.redirected
            done = journey.acted and not refused
            return fetched
        except BaseException:
            done = journey.acted or flight.keep
            raise
        finally:
            if not done:
                journey.spend.undone()

    def _dates(self, entry: Entry) -> retrying.Dates:
        until = entry.until_on if entry.ended is not None else self.ledger.again_from(entry.write)
        return retrying.Dates(entry.sent_on if entry.sent is not None else None, until, bool(entry.write.key))

    def cut_short(self, known: Understood, progress: Progress | None) -> Refusal:
        """What is told to one who can be held no longer, since the proxy ends."""
        route = known.route
        write = guarding.describe(
            known.request, route, known.caller, _origin(known.settings, route), known.idempotency_key
        )
        dates = retrying.Dates(None, self.ledger.again_from(write), bool(write.key))
        return retrying.cut_short(route, progress is not None and progress.busy, dates)

    async def _together(self, known: Understood, turn: Turn, exchange: Exchange, watch: Watch) -> Response:
        """Join the flight that asks the same, or lead one."""
        while True:
            journey = self._journey(known, _share_coding(known.request), turn, exchange)
            journey.stale_allowed = known.asked.max_age is None
            fetched, collapsed = await self._joined(journey, watch)
            if fetched is None:  # too large to be shared
                return await self._alone(known, turn, exchange, watch)
            late = isinstance(fetched.outcome, Refusal) and fetched.outcome.code == "wait_too_long"
            if not (collapsed and late and self.admission.in_time(turn, known.route, known.caller.credential)):
                return self._told(fetched, known.request.headers, exchange, joined=journey.began if collapsed else None)
            # The leader had come earlier, so its time was over first; ours is not. One of us leads now.
            _note_share(fetched, exchange, journey.began)

    async def _joined(self, journey: _Journey, watch: Watch) -> tuple[Fetched | None, bool]:
        """What the flight brings that asks the same, and whether another leads it.

        What has not been sent yet will be read later than every write that has ended; what has been is for those of the
        epochs in which it was.
        """
        epoch = await self._key(journey.known)
        key = f"{journey.known.question}{'' if journey.stale_allowed else '!fresh'}"
        turn = journey.turn
        lent_to: Turn | None = None

        def lead(flight: Flight[Fetched]) -> Coroutine[Any, Any, Fetched]:
            flight.about = journey
            return self._fetch(journey, flight)

        def fits(flight: Flight[Fetched]) -> bool:
            return not flight.busy or (isinstance(flight.about, _Journey) and flight.about.epoch == epoch)

        def joined(flight: Flight[Fetched]) -> None:
            nonlocal lent_to
            if isinstance(flight.about, _Journey) and flight.about is not journey:
                # Whoever would have had its turn earlier by itself has it so.
                lent_to = flight.about.turn
                self.admission.lend(lent_to, turn)
            watch(flight)

        try:
            return await self.flights.join(key, lead, joined, fits)
        finally:
            if lent_to is not None:
                self.admission.take_back(lent_to, turn)

    def _journey(
        self, known: Understood, request: Request, turn: Turn, exchange: Exchange, entry: Entry | None = None
    ) -> _Journey:
        waited = (exchange.queued, exchange.upstream)
        return _Journey(known, request, turn, self.clock.now(), exchange, waited, entry=entry)

    # --- The place of one who comes back ------------------------------------------------------------------------------

    def _turn(self, known: Understood) -> Turn:
        """A new place in line, or the old one of the same request that left it unserved a moment ago."""
        if self._places_until and self.clock.now() < self._places_until:
            left = self._places.get(_same(known))
            if left:
                turn = left.popleft()
                if turn.deadline > self.clock.now():
                    return turn
        caller, urgency, now = known.caller, known.urgency, self.clock.now()
        last, known.seen.asked = known.seen.asked, now
        if urgency == USUAL and last is not None and now - last < POLLED_WITHIN:
            urgency = BULK
        return self.admission.arrive(who=known.call.caller, weight=caller.weight, urgency=urgency)

    def _keep_place(self, known: Understood, turn: Turn) -> None:
        """Its caller's patience ended, not its wait: it goes on from there if it asks again in time."""
        same = _same(known)
        places = self._places.get(same) or deque(maxlen=PLACES_OF_ONE)
        places.append(turn)
        self._places[same] = places
        self._places_until = self.clock.now() + PLACE_KEPT_FOR

    def _told(
        self, fetched: Fetched, asked: Headers | None, exchange: Exchange, joined: float | None = None
    ) -> Response:
        """One member's view of what its flight brought.

        `asked`: its headers, if the answer is not for it alone. `joined`: when it came to the call of another, whose
        the tries are; who led it has been told of them.
        """
        exchange.cache, exchange.was_stale = fetched.cache, fetched.was_stale
        exchange.stored, exchange.ttl, exchange.age = fetched.stored, fetched.ttl, fetched.age
        if joined is not None:
            _note_share(fetched, exchange, joined)
            if fetched.cache is CacheStatus.MISS:
                exchange.cache = CacheStatus.COLLAPSED
        if isinstance(fetched.outcome, Refusal):
            raise fetched.outcome.with_traceback(None)  # one instance, raised to every member
        response = fetched.outcome
        if joined is not None:
            response = replace(response, headers=caching.impersonal(response.headers))
        if asked is not None and response.rest is None and not caching.accepts_coding(asked, response.headers):
            response = caching.plain(response)
        return response

    # --- One upstream call --------------------------------------------------------------------------------------------

    async def _fetch(self, journey: _Journey, flight: Flight[Fetched]) -> Fetched:
        """Wait, send, and again as far as it is harmless; then store, and begin the epochs that a write ends."""
        fetched = Fetched(_NOBODY)
        known, entry = journey.known, journey.entry
        if journey.stale_allowed:
            journey.fallback = await self._stale(known)
            fetched.was_stale = journey.fallback is not None
        concluded = False
        try:
            while True:
                outcome, too_often = await self._attempt(journey, flight, fetched)
                again, pause = await self._judged(journey, fetched, outcome, too_often=too_often)
                if not again or not flight.members:
                    break
                # From here it waits again: who leaves now gives it up, and who is out of patience may be told so.
                flight.keep = False
                flight.busy = journey.acted and not known.route.is_read
                if pause:
                    self.pausing[known.route.upstream] += 1
                    try:
                        await self.clock.sleep(pause)
                    finally:
                        self.pausing[known.route.upstream] -= 1
            if journey.acted and not known.route.is_read:
                await self._end_epochs(journey, fetched.outcome)
            if entry is not None:
                self._conclude(entry, journey.acted, fetched.outcome)
            concluded = True
        except Exception:
            if entry is not None and entry.ended is None and flight.keep:
                # A fault of ours, after it was sent: nobody will know what came of it.
                why = "vast-proxy met a fault of its own"
                self.ledger.ended(entry, retrying.unknown(known.route, why, self._dates(entry)))
            raise
        finally:
            _note_tries(fetched, journey)
            if not concluded:
                if not journey.acted and isinstance(fetched.outcome, Refusal):
                    self._keep_place(known, journey.turn)
                if (journey.acted or flight.keep) and not known.route.is_read:
                    # Cut off between two tries of a write, or by a fault of ours: one of them may have been done.
                    await self._end_epochs(journey, _NOBODY)
                if entry is not None and not flight.keep:
                    self.ledger.undone(entry)
        return await self._settle(journey, fetched) if known.lifetime is not None else fetched

    async def _judged(
        self, journey: _Journey, fetched: Fetched, outcome: Response | UpstreamError | Refusal, *, too_often: bool
    ) -> tuple[bool, float]:
        """Note what an attempt brought. Is there to be another, and after how many seconds?"""
        known, entry, rules = journey.known, journey.entry, journey.known.settings.retry
        if too_often:
            fetched.refusals += 1
            if entry is not None:
                self.ledger.undone(entry)
            fetched.outcome = _too_often(known.route)
            return fetched.refusals < MAX_429, 0.0
        if isinstance(outcome, Refusal):
            fetched.outcome = outcome
            if outcome.code == "upstream_unreachable":
                return self._kept_off(journey, outcome.retry_after or 0.0)
            if journey.fallback is not None and outcome.code == "wait_too_long":
                # It was not to wait longer than for a stale answer: if a write has voided that, it is.
                journey.fallback = await self._stale(known)
                return not self._instead_of_waiting(journey) and self.clock.now() < journey.turn.deadline, 0.0
            return False, 0.0
        failures = fetched.attempts - fetched.refusals
        dates = self._dates(entry) if entry is not None else retrying.NO_DATES
        fetched.outcome = retrying.verdict(known.route, outcome, failures, dates)
        again = retrying.failed(outcome) and retrying.may_send_again(known.route, outcome)
        again = again and failures < rules.max_attempts
        pause = retrying.backoff(rules, failures, self.chance()) if again else 0.0
        again = again and self._worth_waiting(journey, pause)
        again = again and self.breakers[known.route.upstream].may_retry(self.clock.now())
        if not isinstance(outcome, UpstreamError) or outcome.sent:
            # Done, or it may have been: of an earlier try nobody learns any more.
            journey.in_doubt |= again
            journey.acted = True
        return again, pause

    def _kept_off(self, journey: _Journey, wait: float) -> tuple[bool, float]:
        """Not asked, since others have asked in vain. Is it worth a wait until it is asked again?

        Who has been in line goes on waiting as long as it would have there, beside it, so that nothing stands behind
        it: what is for other endpoints goes on. Who comes now waits for a short absence only.
        """
        pause = min(wait, LOOK_AGAIN) if journey.queued else wait
        journey.kept_off += pause
        patient = journey.queued or journey.kept_off <= journey.known.settings.retry.backoff_max
        return patient and journey.fallback is None and self._worth_waiting(journey, pause), pause

    def _conclude(self, entry: Entry, acted: bool, outcome: Response | Refusal) -> None:
        """Remember what came of a write, if doing it again would not be the same."""
        if isinstance(outcome, Refusal):
            over = outcome.code == "outcome_unknown"
        else:
            # Who was not let in has done nothing, unless that was said where the answer to what was done led.
            let_in = outcome.status not in (401, 403) or outcome.redirected
            over = acted and not retrying.failed(outcome) and let_in
        if over:
            self.ledger.ended(entry, outcome)
        else:
            self.ledger.undone(entry)

    def _worth_waiting(self, journey: _Journey, pause: float) -> bool:
        """Is another try to be waited for, rather than the failure told or the stale answer served?"""
        until = self.clock.now() + pause
        if journey.fallback is not None and until > journey.began + journey.known.settings.cache.stale_after:
            return False
        return until < journey.turn.deadline

    async def _attempt(
        self, journey: _Journey, flight: Flight[Fetched], fetched: Fetched
    ) -> tuple[Response | UpstreamError | Refusal, bool]:
        """Wait for the turn and send once. True with a 429 that another turn solves."""
        began = self.clock.now()
        try:
            granted = await self._granted(journey)
        finally:
            fetched.queued += self.clock.now() - began
        if isinstance(granted, Refusal):
            if granted.code != "upstream_unreachable":  # of those there may be one a second
                fetched.steps += (Step(began, None, self.clock.now()),)
            return granted, False
        return await self._send(journey, flight, fetched, *granted, began)

    def _instead_of_waiting(self, journey: _Journey) -> bool:
        """Is there an answer that is served rather than waiting for long?

        One of an earlier epoch is for when upstream will not answer, not for our own line.
        """
        route, fallback = journey.known.route, journey.fallback
        return fallback is not None and (
            fallback.current or self.admission.is_refused(route, journey.known.caller.credential)
        )

    async def _granted(self, journey: _Journey) -> tuple[Ticket, Pass] | Refusal:
        """Its turn, and leave to ask an upstream that may be away."""
        clock, known = self.clock, journey.known
        deadline = journey.turn.deadline
        if self._instead_of_waiting(journey):
            deadline = min(deadline, journey.began + known.settings.cache.stale_after)
        breaker, began = self.breakers[known.route.upstream], clock.now()
        away = breaker.check(known.call, began)
        if away is not None:
            return self.admission.over or away
        try:
            ticket = await self.admission.turn(journey.turn, known.route, known.caller.credential, deadline=deadline)
        except Refusal as refusal:
            return refusal
        journey.queued |= ticket.waited
        leave = breaker.enter(known.call, clock.now())
        if isinstance(leave, Refusal):
            ticket.close()
            return leave
        return ticket, leave

    async def _send(
        self, journey: _Journey, flight: Flight[Fetched], fetched: Fetched, ticket: Ticket, leave: Pass, began: float
    ) -> tuple[Response | UpstreamError, bool]:
        """Send once, in the turn that came, and tell everybody concerned what came of it."""
        clock, known = self.clock, journey.known

        def sent() -> None:
            ticket.sent()
            if journey.entry is not None:
                self.ledger.sent(journey.entry)
            if journey.spend is not None:
                journey.spend.sent()
            journey.epoch = key
            flight.keep = journey.may_keep
            flight.busy = True

        granted = clock.now()
        held = too_often = False
        key = None
        outcome: Response | UpstreamError | None = None
        status = 0
        try:
            if known.question is not None:
                # As the epochs are now: what is read from here on is later than every write that has ended.
                key = await self._key(known)
            response = await self.upstream.send(journey.request, known.route.upstream, sent)
            status = response.status
            if response.status == 429 or response.status in retrying.PASSING:
                response = _cut_short(response)
            response = cleaned(response, known.route, known.settings.team_keys)
            if response.rest is not None:
                held = True
                response.rest.on_close(ticket.close)
            outcome = response
            too_often = ticket.answered(response)
        except UpstreamError as error:
            outcome = error
            return error, False
        finally:
            ended = clock.now()
            fetched.upstream += ended - granted
            if not held:
                ticket.close()
            breaker = self.breakers[known.route.upstream]
            if outcome is None:
                breaker.given_back(leave, ended)
            else:
                breaker.answered(leave, outcome, retrying.failed(outcome), ended)
            sends = outcome is not None or ticket.sends is not None  # else it was given up before it was sent
            fetched.attempts += sends
            step = Step(began, granted, ended, status, fetched.attempts if sends else 0, too_often)
            fetched.steps += (step,)
            if sends:
                self.tried(journey.exchange, step)
        if key is not None and caching.may_store(known.route, response):
            await self._keep(journey, key, response, granted)
            fetched.stored = True
        return response, too_often

    async def _settle(self, journey: _Journey, fetched: Fetched) -> Fetched:
        """Prefer a stale answer to none; say how old what is served is."""
        outcome = fetched.outcome
        unanswered = isinstance(outcome, Refusal) or retrying.failed(outcome) or outcome.status == 429
        # Looked up anew: what was kept while this one waited, or was voided meanwhile by a write.
        stale = await self._stale(journey.known) if unanswered and journey.stale_allowed else None
        if stale is not None:
            _drop_rest(fetched)
            fetched.outcome = Response(200, stale.stored.headers(), stale.stored.body)
            fetched.cache, fetched.ttl = CacheStatus.STALE, -stale.since
            fetched.age = self.clock.now() - stale.stored.born
        elif fetched.stored and journey.known.lifetime is not None:
            fetched.ttl = journey.known.lifetime[0]
        return fetched

    # --- What is remembered -------------------------------------------------------------------------------------------

    async def _key(self, known: Understood) -> str:
        """The question in the light of the epochs in force: what was read in an earlier one is not found under it."""
        values = [await self.store.get(name) for name in known.epochs]
        return f"{known.question}@{caching.names(values)}"

    async def _keep(self, journey: _Journey, key: str, response: Response, born: float) -> None:
        family, lifetime = journey.known.route.family, journey.known.lifetime
        assert family is not None
        assert lifetime is not None
        ttl, stale_for = lifetime
        await self.store.set(key, caching.freeze(response, born), ttl + stale_for)
        if family.market and stale_for > 0:
            await self.store.set(f"latest:{journey.known.question}", key.encode(), ttl + stale_for)

    async def _stale(self, known: Understood) -> _Stale | None:
        """An answer past its time, or for the market from an earlier epoch."""
        family = known.route.family
        if family is None or known.lifetime is None or known.lifetime[1] <= 0:
            return None
        ttl, stale_for = known.lifetime
        frozen = await self.store.get(await self._key(known))
        current = frozen is not None
        if frozen is None and family.market:
            latest = await self.store.get(f"latest:{known.question}")
            frozen = await self.store.get(latest.decode()) if latest is not None else None
        if frozen is None:
            return None
        stored = caching.thaw(frozen)
        age = self.clock.now() - stored.born
        return _Stale(stored, max(0.0, age - ttl), current) if age < ttl + stale_for else None

    async def _end_epochs(self, journey: _Journey, outcome: Response | Refusal) -> None:
        """After a write that was, or may have been, done: nothing read before its end is found any more."""
        known = journey.known
        settings, families = known.settings, known.settings.routes.families
        ended = _NOBODY if journey.in_doubt else outcome
        for name in caching.epochs_of_write(known.route, known.caller, ended, families):
            life = caching.epoch_life(name, families, settings.cache)
            while True:
                before = await self.store.get(name)
                # By the clock, so that an epoch never comes again, not even after its name was forgotten.
                after = max(int(before or b"0") + 1, int(await self.store.now() * 1e6))
                if await self.store.swap(name, before, str(after).encode(), life):
                    break


def _share_coding(request: Request) -> Request:
    """Ask for a coding that can be undone here, since the answer may be given to a client that takes none."""
    if not any(name.lower() == "accept-encoding" for name, _ in request.headers):
        return request
    coding = "gzip" if caching.accepts_gzip(request.headers) else "identity"
    headers = tuple((name, coding if name.lower() == "accept-encoding" else value) for name, value in request.headers)
    return replace(request, headers=headers)


def _revived(stored: Stored, headers: Headers) -> Response:
    """A stored answer for this client: as it was sent, or without its coding if the client takes none."""
    if stored.coded and not caching.accepts_gzip(headers):
        return caching.plain(Response(200, stored.headers(), stored.body))
    return Response(200, (), stored.body, head=stored.head)


def _note_tries(fetched: Fetched, journey: _Journey) -> None:
    """Once, when the call has ended: its tries are those of whoever led it, also if that one has left."""
    exchange, (queued, upstream) = journey.exchange, journey.waited
    exchange.attempts += fetched.attempts
    exchange.refusals += fetched.refusals
    exchange.steps += fetched.steps
    exchange.queued, exchange.upstream = queued + fetched.queued, upstream + fetched.upstream


def _note_share(fetched: Fetched, exchange: Exchange, joined: float) -> None:
    """Of a call that another led, what one waited for who came to it later."""
    queued, upstream = since(fetched.steps, joined)
    exchange.queued += queued
    exchange.upstream += upstream


def _same(known: Understood) -> str:
    """Equal for a request and its repetition by the same caller."""
    if known.question is not None:
        return f"{known.call.caller} {known.question}"
    request = known.request
    if not request.body:  # nothing to be hashed for
        return f"{known.caller.author} {request.method} {known.route.upstream} {request.target}"
    return guarding.fingerprint(request, known.caller, _origin(known.settings, known.route))


def _origin(settings: Settings, route: Route) -> str:
    return settings.upstreams.serverless if route.upstream == "serverless" else settings.upstreams.api


class _Receipt:
    """Tells the ledger whether a client has heard."""

    __slots__ = ("_entry", "_ledger", "_written")

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self._ledger = ledger
        self._entry = entry
        self._written = False

    def written(self) -> None:
        self._written = True
        self._ledger.told(self._entry)

    def lost(self) -> None:
        if self._written:
            self._ledger.unheard(self._entry)
        else:
            self._ledger.gone(self._entry)


def _cut_short(response: Response) -> Response:
    """A failure with an endless body: what it says is in its status, and no connection is held for the rest."""
    if response.rest is None:
        return response
    response.rest.close()
    if response.status != 429:
        raise UpstreamError(f"answered {response.status}, with more than can be held", sent=True)
    headers = tuple(item for item in response.headers if item[0].lower() not in ("content-length", "content-encoding"))
    return Response(response.status, headers, b"", response.reason, redirected=response.redirected)


def _too_often(route: Route) -> Refusal:
    msg = f"Vast.ai refused {route.name} as too frequent, {MAX_429} times at the most; try again later"
    return Refusal(429, "wait_too_long", msg, GIVE_UP_AFTER)


def _not_cached(route: Route) -> Refusal:
    return Refusal(504, "not_cached", f"only-if-cached was asked for, and no fresh answer of {route.name} is stored")
