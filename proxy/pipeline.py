"""The path of one request, from who asks to what is answered. Read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .admission import Admission, Turn
from .clock import Clock
from .coalescer import Coalescer, Flight
from .policy import caching, queueing, retrying
from .policy.caching import Directives, Stored
from .policy.errors import GIVE_UP_AFTER, Refusal, UpstreamError
from .policy.identity import Caller, identify
from .policy.limiting import MAX_429, Hint
from .policy.messages import CacheStatus, Exchange, Headers, Request, Response
from .policy.routing import Route
from .settings import Settings
from .store import Store


class Sender(Protocol):
    """The upstream, as the path knows it: one verb."""

    async def send(self, request: Request, upstream: str, sent: Callable[[], None]) -> Response:
        """Send once; `sent` is called when bytes go out. Raises UpstreamError."""


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


def _has_rest(fetched: Fetched) -> bool:
    return isinstance(fetched.outcome, Response) and fetched.outcome.rest is not None


def _drop_rest(fetched: Fetched) -> None:
    if isinstance(fetched.outcome, Response) and fetched.outcome.rest is not None:
        fetched.outcome.rest.close()


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
    beat: bytes
    """The interim answer that keeps this client waiting; empty: none."""
    patience: float
    """Seconds for which it can be held."""


@dataclass(slots=True)
class _Journey:
    """One upstream call and what is known before it begins. Owned by its flight."""

    known: Understood
    request: Request
    """As it is sent."""
    turn: Turn
    exchange: Exchange
    began: float
    fallback: tuple[Stored, float] | None = None
    """A stale answer, and for how many seconds it has been so: served instead of a long wait or a failure."""

    @property
    def may_keep(self) -> bool:
        """Once it is sent it is finished: a write always, a read if its answer can be stored."""
        route = self.known.route
        return not route.is_read or (self.known.question is not None and route.family is not None)


class Pipeline:
    """Wires policy, store, coalescer, admission and upstream into one path. Owns none of their state."""

    def __init__(
        self, settings: Settings, clock: Clock, store: Store, admission: Admission, upstream: Sender, chance: Callable[[], float]
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.store = store
        self.admission = admission
        self.upstream = upstream
        self.chance = chance
        self.flights: Coalescer[Fetched] = Coalescer(_has_rest, _drop_rest)

    def understand(self, request: Request, fields: Headers, *, http_1_1: bool) -> Understood:
        """Who asks what, and how long it can be held; `fields`: its headers before any was stripped.

        A pure function of the request and the settings in force, so that whoever sees the same bytes again may keep it.
        """
        settings = self.settings
        caller = identify(request)
        route = settings.routes.match(request.method, request.target)
        asked = caching.directives(request.headers)
        question = None
        if route.collapse and not asked.no_store and caching.may_share(route, request):
            question = caching.question(route, request, caller, settings.cache)
        beat = queueing.interim(request.headers, http_1_1, settings.queue)
        patience = queueing.patience(fields, request.target, route.upstream, settings.queue, beating=bool(beat))
        epochs = caching.epochs_of_read(route, caller, settings.cache)
        return Understood(settings, request, caller, route, asked, question, epochs, beat, patience)

    async def stored(self, known: Understood, exchange: Exchange) -> Response | None:
        """A fresh answer from the store, at once; None if there is none. Raises Refusal."""
        route, asked = known.route, known.asked
        exchange.route, exchange.caller, exchange.effect = route.template, known.caller.label, route.effect.value
        if route.refused:
            raise Refusal(403, "not_for_clients", f"{route.name} is for workers inside instances, not for this proxy")
        if known.question is not None and route.family is not None:
            frozen = await self.store.get(await self._key(known))
            if frozen is not None:
                ttl, _ = caching.lifetimes(route.family, known.settings.cache)
                stored = caching.thaw(frozen)
                age = self.clock.now() - stored.born
                if caching.fresh(age, ttl, asked):
                    exchange.cache, exchange.age, exchange.ttl = CacheStatus.HIT, age, ttl - age
                    return _revived(stored, known.request.headers)
        if asked.only_if_cached:
            raise _not_cached(route)
        return None

    async def fetch(self, known: Understood, exchange: Exchange) -> Response:
        """An answer from upstream, waited for in its turn. Raises Refusal."""
        turn = self.admission.arrive()
        if known.question is None or known.asked.no_cache:
            return await self._alone(known, turn, exchange)
        return await self._together(known, turn, exchange)

    # --- Alone or together --------------------------------------------------------------------------------------------

    async def _alone(self, known: Understood, turn: Turn, exchange: Exchange) -> Response:
        """A call that is shared with nobody: a write, or a read that asks for an answer of its own."""
        journey = _Journey(known, known.request, turn, exchange, self.clock.now())
        if known.route.is_read and known.question is None:
            # Of no use to anybody else: it goes when its caller goes.
            fetched = await self._fetch(journey, Flight())
        else:
            landed, _ = await self.flights.join(None, lambda flight: self._fetch(journey, flight))
            assert landed is not None  # nobody else can have taken it
            fetched = landed
        if known.question is None:
            fetched.cache = CacheStatus.BYPASS
            return self._told(fetched, None, exchange, collapsed=False)
        return self._told(fetched, known.request.headers, exchange, collapsed=False)

    async def _together(self, known: Understood, turn: Turn, exchange: Exchange) -> Response:
        """Join the flight that asks the same, or lead one."""
        key = await self._key(known)
        stale_allowed = known.asked.max_age is None
        if not stale_allowed:
            key = f"{key}!fresh"

        async def call(flight: Flight[Fetched]) -> Fetched:
            journey = _Journey(known, _share_coding(known.request), turn, exchange, self.clock.now())
            if stale_allowed:
                journey.fallback = await self._stale(known)
            return await self._fetch(journey, flight)

        fetched, collapsed = await self.flights.join(key, call)
        if fetched is None:  # too large to be shared
            return await self._alone(known, turn, exchange)
        late = isinstance(fetched.outcome, Refusal) and fetched.outcome.code == "wait_too_long"
        if collapsed and late and self.clock.now() < turn.deadline - 1.0:
            # The leader had come earlier, so its time was over first; ours is not.
            return await self._alone(known, turn, exchange)
        return self._told(fetched, known.request.headers, exchange, collapsed=collapsed)

    def _told(self, fetched: Fetched, asked: Headers | None, exchange: Exchange, *, collapsed: bool) -> Response:
        """One member's view of what its flight brought. `asked`: its headers, if the answer is not for it alone."""
        exchange.cache, exchange.was_stale = fetched.cache, fetched.was_stale
        exchange.stored, exchange.ttl, exchange.age = fetched.stored, fetched.ttl, fetched.age
        exchange.attempts, exchange.refusals = fetched.attempts, fetched.refusals
        exchange.queued, exchange.upstream = fetched.queued, fetched.upstream
        if collapsed:
            exchange.attempts = exchange.refusals = 0
            if fetched.cache is CacheStatus.MISS:
                exchange.cache = CacheStatus.COLLAPSED
        if isinstance(fetched.outcome, Refusal):
            raise fetched.outcome
        response = fetched.outcome
        if collapsed:
            response = replace(response, headers=caching.impersonal(response.headers))
        if asked is not None and response.rest is None and not caching.accepts_coding(asked, response.headers):
            response = caching.plain(response)
        return response

    # --- One upstream call --------------------------------------------------------------------------------------------

    async def _fetch(self, journey: _Journey, flight: Flight[Fetched]) -> Fetched:
        """Wait, send, and again as far as it is harmless; then store, and begin the epochs that a write ends."""
        fetched = Fetched(Refusal(500, "internal_error", "no outcome"), was_stale=journey.fallback is not None)
        may_have_acted = False
        concluded = False
        try:
            while True:
                outcome, hint = await self._attempt(journey, flight, fetched)
                may_have_acted |= not isinstance(outcome, Refusal) and hint is None
                if isinstance(outcome, Refusal):
                    fetched.outcome = outcome
                    break
                if hint is not None and hint.kind == "rate":
                    fetched.refusals += 1
                    if fetched.refusals < MAX_429:
                        continue
                    msg = f"Vast.ai refused {journey.known.route.name} {MAX_429} times as too frequent; try again later"
                    fetched.outcome = Refusal(429, "wait_too_long", msg, GIVE_UP_AFTER)
                    break
                failures = fetched.attempts - fetched.refusals
                if retrying.failed(outcome) and retrying.may_send_again(journey.known.route, outcome):
                    pause = retrying.backoff(journey.known.settings.retry, failures, self.chance())
                    if failures < journey.known.settings.retry.max_attempts and self._worth_waiting(journey, pause):
                        flight.keep = False
                        await self.clock.sleep(pause)
                        continue
                fetched.outcome = retrying.verdict(journey.known.route, outcome, failures)
                break
            if not journey.known.route.is_read and may_have_acted:
                await self._end_epochs(journey, fetched.outcome)
            concluded = True
        finally:
            if not concluded and not journey.known.route.is_read and may_have_acted:
                # Cancelled between two tries of a write: one of them may have been done.
                await self._end_epochs(journey, Refusal(500, "outcome_unknown", ""))
        return await self._settle(journey, fetched)

    def _worth_waiting(self, journey: _Journey, pause: float) -> bool:
        """Is another try to be waited for, rather than the failure told or the stale answer served?"""
        until = self.clock.now() + pause
        if journey.fallback is not None and until > journey.began + journey.known.settings.cache.stale_after:
            return False
        return until < journey.turn.deadline

    async def _attempt(
        self, journey: _Journey, flight: Flight[Fetched], fetched: Fetched
    ) -> tuple[Response | UpstreamError | Refusal, Hint | None]:
        """Wait for the turn and send once. With what a 429 said, if it was one."""
        clock, exchange, known = self.clock, journey.exchange, journey.known
        deadline = journey.turn.deadline
        if journey.fallback is not None:
            deadline = min(deadline, journey.began + journey.known.settings.cache.stale_after)
        began = clock.now()
        try:
            ticket = await self.admission.turn(
                journey.turn, known.route, known.caller.credential, deadline=deadline
            )
        except Refusal as refusal:
            return refusal, None
        finally:
            fetched.queued += clock.now() - began

        def sent() -> None:
            ticket.sent()
            flight.keep = journey.may_keep
            exchange.waiting = False

        granted = clock.now()
        held = False
        key = None
        try:
            if known.question is not None:
                # As the epochs are now: what is read from here on is later than every write that has ended.
                key = await self._key(known)
            response = await self.upstream.send(journey.request, known.route.upstream, sent)
            answered = ticket.answered(response)
            if response.rest is not None:
                held = True
                response.rest.on_close(ticket.close)
        except UpstreamError as error:
            fetched.attempts += 1
            return error, None
        finally:
            fetched.upstream += clock.now() - granted
            exchange.waiting = True
            if not held:
                ticket.close()
        fetched.attempts += 1
        if answered.again:
            flight.keep = False
        elif key is not None and caching.may_store(known.route, response):
            await self._keep(journey, key, response, granted)
            fetched.stored = True
        return response, answered.hint

    async def _settle(self, journey: _Journey, fetched: Fetched) -> Fetched:
        """Prefer a stale answer to none; say how old what is served is."""
        outcome = fetched.outcome
        unanswered = isinstance(outcome, Refusal) or retrying.failed(outcome) or outcome.status == 429
        if unanswered and journey.fallback is not None:
            stored, since = journey.fallback
            _drop_rest(fetched)
            fetched.outcome = Response(200, stored.headers(), stored.body)
            fetched.cache, fetched.ttl = CacheStatus.STALE, -since
            fetched.age = self.clock.now() - stored.born
        elif fetched.stored and journey.known.route.family is not None:
            fetched.ttl, _ = caching.lifetimes(journey.known.route.family, journey.known.settings.cache)
        return fetched

    # --- What is remembered -------------------------------------------------------------------------------------------

    async def _key(self, known: Understood) -> str:
        """The question in the light of the epochs in force: what was read in an earlier one is not found under it."""
        values = [await self.store.get(name) for name in known.epochs]
        return f"{known.question}@{caching.names(values)}"

    async def _keep(self, journey: _Journey, key: str, response: Response, born: float) -> None:
        family = journey.known.route.family
        assert family is not None
        ttl, stale_for = caching.lifetimes(family, journey.known.settings.cache)
        await self.store.set(key, caching.freeze(response, born), ttl + stale_for)
        if family.market and stale_for > 0:
            await self.store.set(f"latest:{journey.known.question}", key.encode(), ttl + stale_for)

    async def _stale(self, known: Understood) -> tuple[Stored, float] | None:
        """An answer past its time, or for the market from an earlier epoch, and for how long it has been stale."""
        family = known.route.family
        if family is None:
            return None
        ttl, stale_for = caching.lifetimes(family, known.settings.cache)
        if stale_for <= 0:
            return None
        frozen = await self.store.get(await self._key(known))
        if frozen is None and family.market:
            latest = await self.store.get(f"latest:{known.question}")
            frozen = await self.store.get(latest.decode()) if latest is not None else None
        if frozen is None:
            return None
        stored = caching.thaw(frozen)
        age = self.clock.now() - stored.born
        return (stored, max(0.0, age - ttl)) if age < ttl + stale_for else None

    async def _end_epochs(self, journey: _Journey, outcome: Response | Refusal) -> None:
        """After a write that was, or may have been, done: nothing read before its end is found any more."""
        await self._begin(caching.epochs_of_write(journey.known.route, journey.known.caller, outcome))

    async def _begin(self, epochs: Sequence[str]) -> None:
        for name in epochs:
            while True:
                before = await self.store.get(name)
                after = str(int(before or b"0") + 1).encode()
                if await self.store.swap(name, before, after, caching.EPOCH_FOR):
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


def _not_cached(route: Route) -> Refusal:
    return Refusal(504, "not_cached", f"only-if-cached was asked for, and no fresh answer of {route.name} is stored")
