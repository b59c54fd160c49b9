"""Reads and writes of several callers in any order, against a model made of a few dictionaries.

The upstream is scripted: it says when a call arrives, is acted on and is answered, and how. It counts versions, which
a write raises when it is acted on; every answer says whose it is, to what, and of which version. The model says what
is fresh, what is shared, what is void: the path must agree with it after every step.

`MODEL_RUNS=5000 pytest tests/test_model.py` tries that many other orders.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, quote

import looptime
import pytest
from conftest import NOON
from hypothesis import HealthCheck, Phase, currently_in_test_context, event
from hypothesis import settings as rules_of_the_run
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.admission import Admission
from proxy.clock import Clock
from proxy.ledger import Journal, Ledger
from proxy.pipeline import Pipeline, Understood
from proxy.policy.breaking import Breaker, BreakerRules
from proxy.policy.caching import Directives
from proxy.policy.errors import Refusal, UpstreamError
from proxy.policy.identity import identify
from proxy.policy.messages import CacheStatus, Exchange, Request, Response, header
from proxy.settings import Settings, load
from proxy.spends import Spends
from proxy.store import MemoryStore

# --- What can be asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """A question; all its spellings ask the same."""

    family: str
    """Empty: never stored."""
    spellings: tuple[tuple[str, str, bytes], ...]
    ttl: float = 0.0
    stale_for: float = 0.0
    market: bool = False


@dataclass(frozen=True)
class Write:
    """A change, and what it makes void."""

    method: str
    target: str
    families: tuple[str, ...]
    spend: bool = False


def search(limit: int) -> Read:
    told = json.dumps({"limit": limit, "verified": True})
    turned = json.dumps({"verified": True, "limit": limit})
    offers = "/api/v0/bundles/"
    spellings = (("POST", offers, told.encode()), ("POST", offers, turned.encode()), ("GET", f"{offers}?q={told}", b""))
    return Read("offers", tuple((method, quote(target, "/?=&"), body) for method, target, body in spellings),
                60.0, 900.0, market=True)  # fmt: skip


def get(family: str, path: str, ttl: float = 0.0, stale_for: float = 0.0) -> Read:
    return Read(family, (("GET", path, b""), ("GET", path.rstrip("/"), b"")), ttl, stale_for)


READS = {
    "offers 1": search(1),
    "offers 2": search(2),
    "instances": get("instances", "/api/v1/instances/", 1.0),
    "instance": get("instances", "/api/v0/instances/7/", 1.0),
    "ssh": get("ssh_keys", "/api/v0/ssh/", 30.0),
    "user": get("account", "/api/v0/users/current", 15.0),
    "templates": get("templates", "/api/v0/template/", 30.0, 900.0),
    "unlisted": get("", "/api/v0/nobody/knows/"),
}
WRITES = {
    "label": Write("PUT", "/api/v0/instances/7/", ("instances", "account")),
    "destroy": Write("DELETE", "/api/v0/instances/7/", ("instances", "offers", "account", "volumes")),
    "rent": Write("PUT", "/api/v0/asks/5/", ("instances", "offers", "account", "volumes"), spend=True),
    "add key": Write("POST", "/api/v0/ssh/", ("ssh_keys", "account"), spend=True),
    "add template": Write("POST", "/api/v0/template/", ("templates",), spend=True),
    "unlisted": Write("PUT", "/api/v0/nobody/knows/", ("all",), spend=True),
}
CONTROLS = {
    "": Directives(),
    "no-cache": Directives(no_cache=True),
    "no-store": Directives(no_store=True),
    "max-age=0": Directives(max_age=0.0),
    "max-age=10": Directives(max_age=10.0),
    "max-stale=100": Directives(max_stale=100.0),
    "only-if-cached": Directives(only_if_cached=True),
}
DONE = ("ok", "cookie", "large")
FAILED = ("503", "drop", "lost", "unsent")
UNTOUCHED = ("404", "gone", "unsent")
"""Answers to a call that was not acted on."""

Where = tuple[str, str]
"""What has versions and epochs: a family of one caller's, or of the market."""


def seen_by(read: Read, who: str, *, shared: bool) -> tuple[Where, ...]:
    if not read.family:
        return ((who, "any"),)
    if read.market:
        return (("*", read.family),) if shared else (("*", read.family), (who, "all"))
    return ((who, read.family), (who, "all"))


def changed_by(write: Write, who: str) -> tuple[Where, ...]:
    return ((who, "any"), *(("*" if family == "offers" else who, family) for family in write.families))


# --- The upstream -----------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """One client and what it asked."""

    number: int
    who: str
    name: str
    write: Write | None
    began: float
    control: Directives = field(default_factory=Directives)
    settings: Settings | None = None
    exchange: Exchange = field(default_factory=Exchange)
    floor: dict[Where, int] = field(default_factory=dict)
    """Versions that this caller's writes had made, or anybody's of the market, when it asked."""
    flight: Flight | None = None
    hit: Call | None = None
    """The stored answer that the model expects."""
    joined: bool = False
    alone: bool = False
    """It went on alone: the answer was too large to be shared."""
    task: asyncio.Task[Response | Refusal] | None = None
    ended: float = 0.0
    left: bool = False

    @property
    def waits(self) -> bool:
        return self.task is not None and not self.task.done()


@dataclass(eq=False)
class Flight:
    """What the model knows of one upstream call and its tries."""

    key: tuple[Any, ...] | None
    leader: Asked
    members: list[Asked]
    own: bool = False
    """Not of the coalescer: it goes with its caller."""
    call: Call | None = None
    tries: list[str] = field(default_factory=list)
    made: dict[Where, int] = field(default_factory=dict)
    sends: int = 0
    large: Call | None = None


class Rest:
    """What follows a large answer."""

    def __init__(self) -> None:
        self.open = True
        self.callbacks: list[Callable[[], None]] = []

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"never asked for"

    def on_close(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def close(self) -> None:
        self.open = False
        while self.callbacks:
            self.callbacks.pop()()


@dataclass(eq=False)
class Call:
    """One call at the upstream."""

    number: int
    flight: Flight
    who: str
    name: str
    began: float
    epochs: tuple[int, ...]
    connected: asyncio.Future[None]
    answered: asyncio.Future[Response]
    versions: list[tuple[Where, int]] | None = None
    """Those in force when it was acted on."""
    cancelled: bool = False
    rest: Rest | None = None


def note(what: str) -> None:
    """For `--hypothesis-show-statistics`: how often it comes so far."""
    if currently_in_test_context():
        event(what)


asking: ContextVar[Asked] = ContextVar("who leads the call")


def key_of(request: Request) -> str:
    """Whose call it is, as an upstream reads it."""
    bearer = (header(request.headers, "authorization") or "").removeprefix("Bearer ")
    return bearer or dict(parse_qsl(request.target.partition("?")[2])).get("api_key", "")


def name_of(request: Request) -> str:
    """Which of READS and WRITES it is."""
    path, _, query = request.target.partition("?")
    if path == "/api/v0/bundles/":
        told = request.body or dict(parse_qsl(query))["q"]
        return f"offers {json.loads(told)['limit']}"
    for name, write in WRITES.items():
        if (request.method, path) == (write.method, write.target):
            return name
    return next(name for name, read in READS.items() if path.rstrip("/") == read.spellings[0][1].rstrip("/"))


# --- The machine ------------------------------------------------------------------------------------------------------

WHO = st.sampled_from("aab")
CONTROL = st.sampled_from([*[""] * 10, *CONTROLS])
ANY = st.integers(0, 5)
OK = st.sampled_from([*["ok"] * 6, "cookie", "large"])
BAD = st.one_of(
    st.sampled_from([["404"], ["404"], ["500"], ["503"], ["drop"], ["lost"], ["unsent"]]),
    st.sampled_from([["lost", "404"], ["503", "404"], ["unsent", "404"], ["drop", "lost", "500"], ["unsent", "503"]]),
    st.sampled_from([["503"] * 6, ["lost"] * 6, ["unsent"] * 6]),
    st.sampled_from([["503"] * 6, ["drop"] * 6]),
    st.sampled_from([["lost", "leave"], ["503", "leave"]]),
)
MAYBE = st.sampled_from([None, None, None, "", "", "no-cache", "max-age=0", "max-stale=100"])
SECONDS = st.sampled_from([0.2, 0.9, 1.0, 4.0, 12.0, 40.0, 70.0, 930.0])
STEPS: dict[str, tuple[int, st.SearchStrategy[tuple[Any, ...]]]] = {
    "read": (8, st.tuples(ANY, WHO, CONTROL, ANY, st.booleans())),
    "write": (3, st.tuples(ANY, WHO, st.booleans())),
    "act": (2, st.tuples(ANY)),
    "answer": (8, st.tuples(ANY, OK, MAYBE)),
    "fail": (4, st.tuples(ANY, BAD)),
    "wait": (2, st.tuples(SECONDS)),
    "wait_for_the_end": (2, st.tuples(ANY, st.booleans(), st.booleans())),
    "leave": (2, st.tuples(ANY, MAYBE)),
    "connect_or_not": (1, st.just(())),
    "reload": (1, st.tuples(st.sampled_from([5.0, 300.0]))),
}
"""How often, and what. One rule for all: Hypothesis leaves out rules at random, and most of these need the others."""
NAMES = [name for name, (weight, _) in STEPS.items() for _ in range(weight)]
TOGETHER = [
    (["offers 1", "offers 2"], ["rent", "unlisted"]),
    (["offers 1"], ["rent", "destroy"]),
    (["instances", "instance"], ["label", "destroy"]),
    (["user", "ssh"], ["label", "add key"]),
    (["templates"], ["add template", "unlisted"]),
    (["unlisted", "templates"], ["unlisted", "add key"]),
    (sorted(READS), sorted(WRITES)),
]
"""What one run is about: the fewer, the more often they meet."""
SHIPPED = load(None, {}, {"listen": "127.0.0.1:0"})


class Paths(RuleBasedStateMachine):
    """One pipeline, its upstream, its clients, and the model of all three."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = looptime.new_event_loop(start=0.0, noop_cycles=1)
        self.complaints: list[Any] = []
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(context))
        self.accepts = True
        self.live: list[Call] = []
        self.calls: dict[int, Call] = {}
        self.numbers = count(1)
        self.versions: Counter[Where] = Counter()
        self.asked: list[Asked] = []
        self.understood: dict[Request, Understood] = {}
        # The model: flights, epochs, what each was raised to by a write that has ended, and what is stored.
        self.flights: list[Flight] = []
        self.joinable: dict[tuple[Any, ...], Flight] = {}
        self.epochs: Counter[Where] = Counter()
        self.floor: Counter[Where] = Counter()
        self.kept: dict[tuple[Any, ...], tuple[Call, float]] = {}
        self.latest: dict[tuple[str, str], tuple[tuple[Any, ...], float]] = {}

    @initialize(shared=st.booleans(), about=st.sampled_from(TOGETHER))
    def begin(self, shared: bool, about: tuple[list[str], list[str]]) -> None:
        self.shared = shared
        self.reads, self.writes = about
        limits = replace(SHIPPED.limits, scale=1e-6, global_=None)
        queue = replace(SHIPPED.queue, max_wait=1e9)
        settings = replace(SHIPPED, limits=limits, queue=queue, cache=replace(SHIPPED.cache, share_searches=shared))

        async def build() -> Pipeline:
            loop = asyncio.get_running_loop()
            clock = Clock(wall=lambda: NOON + loop.time())
            self.admission = Admission(clock, limits, queue)
            keys = [identify(Request("GET", "/", (("Authorization", f"Bearer {who}"),))).credential for who in "ab"]
            self.admission.restore({f"{key} api account": {"known": True} for key in keys})
            store, ledger = MemoryStore(clock, 2**26), Ledger(clock, settings.writes, Journal(None))
            breakers = {"api": Breaker(BreakerRules(failures=10**9, probe_initial=0.0, probe_max=0.0))}
            spends = Spends(clock, None)
            return Pipeline(settings, clock, store, self.admission, ledger, breakers, self, lambda: 0.5, spends)

        self.pipeline = self.loop.run_until_complete(build())

    def teardown(self) -> None:
        try:
            if hasattr(self, "pipeline"):
                self.end()
        finally:
            self.loop.close()

    def end(self) -> None:
        """Answer whatever is left: then nobody waits, and nothing remains."""
        self.accepts = True
        for number in range(100):
            for call in list(self.live):
                self.done(call, "large" if number == 0 and call.flight.leader.write is None else "ok")
            if not self.flights:
                break
            self.wait(20.0)
        self.everybody_answered_was_answered_right()
        self.nothing_is_left_but_what_is_under_way()
        assert self.asked == []
        assert repr(self.pipeline.flights) == "<Coalescer 0 flights, 0 members>"
        assert (self.admission.waiting, self.admission.in_flight) == (0, 0)
        self.wait(1.0)
        assert asyncio.all_tasks(self.loop) == set()

    # As the upstream

    async def send(self, request: Request, upstream: str, sent: Callable[[], None]) -> Response:
        asked = asking.get()
        assert asked.flight is not None
        if asked.flight.large is not None and asked is not asked.flight.leader:
            self.goes_alone(asked, asked.flight)
        flight = asked.flight
        assert flight.leader is asked, "two calls for one question"
        assert flight.call is None, "two calls of one flight at once"
        who, name = key_of(request), name_of(request)
        assert (who, name) == (asked.who, asked.name)
        where = () if asked.write is not None else seen_by(READS[name], who, shared=self.shared)
        loop = self.loop
        call = Call(next(self.numbers), flight, who, name, loop.time(), self.in_force(where),
                    loop.create_future(), loop.create_future())  # fmt: skip
        flight.call = self.calls[call.number] = call
        self.live.append(call)
        try:
            if not self.accepts:
                await call.connected
            else:
                call.connected.set_result(None)
            sent()
            flight.sends += 1
            return await call.answered
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        finally:
            self.live.remove(call)
            flight.call = None

    def acts(self, call: Call) -> None:
        """It does what it was asked for, or reads what there is."""
        if call.versions is not None:
            return
        asked = call.flight.leader
        if asked.write is not None:
            where = changed_by(asked.write, call.who)
            for one in where:
                self.versions[one] += 1
                call.flight.made[one] = self.versions[one]
        else:
            where = seen_by(READS[call.name], call.who, shared=self.shared)
        call.versions = [(one, self.versions[one]) for one in where]

    def done(self, call: Call, how: str, then: Callable[[], object] | None = None) -> None:
        """Answer a call, and see what comes of it; `then` happens in the very moment of the answer."""
        flight = call.flight
        if how != "unsent" and not call.connected.done():
            call.connected.set_result(None)
            self.drain()
        if how in (*DONE, "lost"):
            self.acts(call)
        flight.tries.append(how)
        body = json.dumps({"call": call.number, **({"error": "no_such_ask"} if how == "gone" else {})}).encode()
        headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
        if how == "cookie":
            headers += (("Set-Cookie", f"session={call.who}"),)
        response = Response(self.status(flight), headers, body)
        if how == "unsent":
            call.connected.set_exception(UpstreamError("nobody there", sent=False))
        elif how in ("drop", "lost"):
            call.answered.set_exception(UpstreamError("lost", sent=True))
        else:
            if how == "large":
                response.rest = call.rest = Rest()
                flight.large = call
            call.answered.set_result(response)
        asked = flight.leader
        if how == "ok" and asked.write is None and READS[call.name].family and not asked.control.no_store:
            until = self.loop.time() + sum(self.lifetimes(asked))
            place = (self.sharer(asked), call.name)
            self.kept[*place, call.epochs] = (call, until)
            self.latest[place] = ((*place, call.epochs), until)
        if how in ("ok", "cookie") and then is not None:
            self.landed(flight)
            then()
            return
        self.drain()
        if how in FAILED and flight.members and all(member.waits for member in flight.members):
            note("tried again")
            return
        self.landed(flight)

    # As the model

    def sharer(self, asked: Asked) -> str:
        return "*" if self.shared and asked.write is None and READS[asked.name].market else asked.who

    def in_force(self, where: tuple[Where, ...]) -> tuple[int, ...]:
        return tuple(self.epochs[one] for one in where)

    def lifetimes(self, asked: Asked) -> tuple[float, float]:
        read = READS[asked.name]
        assert asked.settings is not None
        return (asked.settings.cache.search_ttl if read.market else read.ttl), read.stale_for

    def stored(self, asked: Asked, now: float, *, any_epoch: bool) -> Call | None:
        """What is stored for its question and not too old to serve."""
        read = READS[asked.name]
        if not read.family or asked.control.no_store:
            return None
        place = (self.sharer(asked), asked.name)
        key = (*place, self.in_force(seen_by(read, asked.who, shared=self.shared)))
        if any_epoch and read.market and not (key in self.kept and self.kept[key][1] > now):
            latest, until = self.latest.get(place, ((), 0.0))
            key = latest if until > now else ()
        call, until = self.kept.get(key, (None, 0.0))
        return call if call is not None and until > now and now - call.began < sum(self.lifetimes(asked)) else None

    def fresh(self, asked: Asked) -> Call | None:
        call, control = self.stored(asked, asked.began, any_epoch=False), asked.control
        if call is None or control.no_cache:
            return None
        age, ttl = asked.began - call.began, self.lifetimes(asked)[0]
        good = age < ttl + (control.max_stale or 0.0) and (control.max_age is None or age <= control.max_age)
        return call if good else None

    def goes_alone(self, asked: Asked, flight: Flight) -> None:
        """The answer was too large to be shared, and another has it."""
        note("went alone")
        flight.members.remove(asked)
        asked.alone, asked.joined = True, False
        asked.flight = Flight(None, asked, [asked])
        self.flights.append(asked.flight)

    def landed(self, flight: Flight) -> None:
        """It is over: what a write did counts from here."""
        if flight not in self.flights:
            return
        self.flights.remove(flight)
        if flight.key is not None and self.joinable.get(flight.key) is flight:
            del self.joinable[flight.key]
        if flight.large is not None:
            for asked in [asked for asked in flight.members if asked.waits]:
                self.goes_alone(asked, flight)
        write = flight.leader.write
        if write is not None and any(how not in ("404", "unsent") for how in flight.tries):
            note(f"{'spend' if write.spend else 'write'} voids, after {'->'.join(flight.tries[-2:])}")
            for one in changed_by(write, flight.leader.who):
                self.epochs[one] += 1
            for one, version in flight.made.items():
                self.floor[one] = max(self.floor[one], version)

    def drain(self) -> None:
        """Let everything happen that needs no time (but for pacing, a millionth of what it is)."""
        self.wait(0.001)

    # --- Steps --------------------------------------------------------------------------------------------------------

    @rule(step=st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), STEPS[name][1])))
    def step(self, step: tuple[str, tuple[Any, ...]]) -> None:
        name, arguments = step
        getattr(self, name)(*arguments)

    async def client(self, asked: Asked, request: Request) -> Response | Refusal:
        asking.set(asked)
        try:
            known = self.understood.get(request)
            if known is None or known.settings is not self.pipeline.settings:
                known = self.pipeline.understand(request, request.headers, http_1_1=True)
                self.understood[request] = known  # as the server does
            response = await self.pipeline.stored(known, asked.exchange)
            if response is None:
                response = await self.pipeline.fetch(known, asked.exchange)
            if response.rest is not None:
                assert isinstance(response.rest, Rest)
                assert response.rest.open, "given to two"
                response.rest.close()
            return response
        except Refusal as refusal:
            return refusal
        finally:
            asked.ended = self.loop.time()

    def ask(self, who: str, name: str, request: Request, control: str = "", write: Write | None = None) -> Asked:
        asked = Asked(next(self.numbers), who, name, write, self.loop.time(), CONTROLS[control], self.pipeline.settings)
        if control:
            request = replace(request, headers=(*request.headers, ("Cache-Control", control)))
        if write is None:
            where = seen_by(READS[name], who, shared=self.shared)
            asked.floor = {one: self.floor[one] for one in where}
            asked.hit = self.fresh(asked)
            self.board(asked, self.in_force(where))
        else:
            asked.flight = Flight(None, asked, [asked])
            self.flights.append(asked.flight)
        asked.task = self.loop.create_task(self.client(asked, request))
        self.asked.append(asked)
        self.drain()
        return asked

    def board(self, asked: Asked, epochs: tuple[int, ...]) -> None:
        """The flight that a read joins or leads, if it is not answered at once."""
        control = asked.control
        if asked.hit is not None or control.only_if_cached:
            return
        alone = control.no_cache or control.no_store
        key = None if alone else (self.sharer(asked), asked.name, control.max_age is None)
        flight = self.joinable.get(key) if key is not None else None
        call = flight.call if flight is not None else None
        if call is not None and call.connected.done() and call.epochs != epochs:
            flight = None  # what is on its way may be from before a write; what is not is read after it
        asked.joined = flight is not None
        if flight is None:
            flight = Flight(key, asked, [], own=control.no_store)
            self.flights.append(flight)
            if key is not None:
                self.joinable[key] = flight
        flight.members.append(asked)
        asked.flight = flight

    def request(self, who: str, method: str, target: str, body: bytes, *, in_query: bool) -> Request:
        headers = [("Content-Type", "application/json")] if body else []
        if in_query:
            target = f"{target}{'&' if '?' in target else '?'}api_key={who}"
        else:
            headers.append(("Authorization", f"Bearer {who}"))
        return Request(method, target, tuple(headers), body)

    def read(self, which: int, who: str, control: str, spelling: int, in_query: bool) -> None:
        name = self.reads[which % len(self.reads)]
        spellings = READS[name].spellings
        request = self.request(who, *spellings[spelling % len(spellings)], in_query=in_query)
        self.ask(who, name, request, control)

    def write(self, which: int, who: str, in_query: bool) -> None:
        name = self.writes[which % len(self.writes)]
        write = WRITES[name]
        body = json.dumps({"label": next(self.numbers)}).encode()
        self.ask(who, name, self.request(who, write.method, write.target, body, in_query=in_query), write=write)

    def act(self, which: int) -> None:
        """A call does what it is for, and is not answered yet."""
        if not self.live:
            return
        call = self.live[which % len(self.live)]
        if call.connected.done():
            self.acts(call)

    def answer(self, which: int, how: str, then: str | None) -> None:
        """A call is answered, and in the same moment somebody may ask the same."""
        if not self.live:
            return
        call = self.live[which % len(self.live)]
        if call.flight.leader.write is not None:
            self.done(call, "ok")
        elif then is None:
            self.done(call, how)
        else:
            self.done(call, how, lambda: self.read(self.reads.index(call.name), call.who, then, which, which % 2 == 0))

    def fail(self, which: int, hows: list[str]) -> None:
        """A call is not answered as it should be, nor are its next tries."""
        if not self.live and hows[-1] in (*UNTOUCHED, "leave"):
            self.write(which, "a", which % 2 == 0)
        elif not self.live:
            self.read(which, "a", "", which, which % 2 == 0)
        if not self.live:
            return
        flight = self.live[which % len(self.live)].flight
        for how in hows:
            if how == "leave":
                for asked in list(flight.members) if flight in self.flights else ():
                    self.goes(asked, which, None)
                break
            if flight.call is None:
                self.wait(10.0)
            if flight not in self.flights or flight.call is None:
                break
            self.done(flight.call, self.possible(how, flight.call))

    def possible(self, how: str, call: Call) -> str:
        if how == "unsent" and call.connected.done():
            return "drop"
        if how == "404" and call.flight.leader.write is not None:
            # Of an offer this says that it is no longer on the market, whatever the cache shows.
            return "500" if call.versions is not None else "gone" if call.name == "rent" else "404"
        return how

    def connect_or_not(self) -> None:
        self.accepts = not self.accepts
        for call in self.live if self.accepts else ():
            if not call.connected.done():
                call.connected.set_result(None)
        self.drain()

    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        for flight in list(self.flights):
            if flight.members and not any(member.waits for member in flight.members):
                # Answered, or it was to wait for its turn no longer than for a stale answer.
                self.landed(flight)

    def wait_for_the_end(self, which: int, stale: bool, passed: bool) -> None:
        """Until a stored answer is about to be no longer fresh, or too old for anything; or until it just is."""
        if not self.kept:
            return
        call = [call for call, _ in self.kept.values()][-1 - which % len(self.kept)]
        asked = replace(call.flight.leader, settings=self.pipeline.settings)
        ttl, stale_for = self.lifetimes(asked)
        until = call.began + ttl + (stale_for if stale else 0.0) + (0.01 if passed else -0.01)
        if until > self.loop.time():
            self.wait(until - self.loop.time())
            self.read(self.reads.index(call.name), call.who, "", which, passed)

    def leave(self, which: int, then: str | None) -> None:
        """A client goes, and in the same moment somebody may ask the same."""
        waiting = [asked for asked in self.asked if asked.waits]
        if waiting:
            self.goes(waiting[which % len(waiting)], which, then)

    def goes(self, asked: Asked, which: int, then: str | None) -> None:
        flight, call = asked.flight, asked.flight.call if asked.flight is not None else None
        assert asked.task is not None
        assert flight is not None
        asked.left = True
        asked.task.cancel()
        flight.members.remove(asked)
        storable = asked.write is not None or (READS[asked.name].family != "" and not flight.own)
        kept = call is not None and call.connected.done() and storable
        if not kept and not flight.members:
            self.landed(flight)
        if then is not None and asked.write is None:
            self.read(self.reads.index(asked.name), asked.who, then, which, which % 2 == 0)
        self.drain()
        assert asked.task.cancelled()
        if flight.members:
            note("left others behind")
        elif kept:
            note(f"left a {'write' if asked.write else 'read'} that is finished all the same")
        else:
            note(f"left {'while it waited' if call is None else 'a call that is cancelled'}")
        assert call is None or call.cancelled == (not kept and not flight.members)

    def reload(self, ttl: float) -> None:
        before = self.pipeline.settings
        self.pipeline.settings = replace(before, cache=replace(before.cache, search_ttl=ttl))

    # --- What must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def everybody_answered_was_answered_right(self) -> None:
        for asked in [asked for asked in self.asked if not asked.waits and not asked.left]:
            self.check(asked)
        self.asked = [asked for asked in self.asked if asked.waits]

    @invariant()
    def nothing_is_left_but_what_is_under_way(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        assert self.complaints == []
        assert len(self.pipeline.flights) == sum(not flight.own for flight in self.flights)
        assert self.admission.in_flight == len(self.live)
        assert self.admission.waiting <= sum(flight.call is None for flight in self.flights)
        assert all(call.rest is None or not call.rest.open for call in self.calls.values())
        # One whose first try was sent before a write, and which tries again, is by itself.
        shared = [(call.flight.key, call.epochs) for call in self.live if call.flight.key and not call.flight.tries]
        assert len(shared) == len(set(shared)), "two calls for one question"
        for flight in self.flights:
            assert flight.call is not None or flight.members
            write = flight.leader.write
            assert write is None or not write.spend or flight.sends <= 1, "spent twice"

    def check(self, asked: Asked) -> None:
        assert asked.task is not None
        outcome, exchange = asked.task.result(), asked.exchange
        if isinstance(outcome, Refusal):
            self.check_refusal(asked, outcome)
            return
        call = self.calls[json.loads(outcome.body)["call"]]
        assert call.name == asked.name
        assert call.who == asked.who or self.sharer(asked) == "*"
        if asked.write is not None:
            assert call.flight is asked.flight
            assert outcome.status == self.status(call.flight)
            note("write answered")
            return
        age = asked.ended - call.began
        ttl = self.lifetimes(asked)[0]
        if asked.flight is None:
            note(f"hit{' of what another caller asked' if call.who != asked.who else ''}")
            assert call is asked.hit
            assert exchange.cache is CacheStatus.HIT
            assert exchange.age == age
            assert age < ttl + (asked.control.max_stale or 0.0)
            assert exchange.ttl == ttl - age
        elif exchange.cache is CacheStatus.STALE:
            self.check_stale(asked, call, age)
        else:
            assert asked.hit is None
            assert call.flight is asked.flight
            assert outcome.status == self.status(call.flight)
            note(f"read answered {outcome.status}{' with others' if asked.joined else ''}")
            if call.flight.tries[-1] in FAILED:
                self.check_nothing_stale(asked)
            if call.versions is not None and any(version < self.floor[one] for one, version in call.versions):
                note("read begun before a write that has ended since")
            plain = CacheStatus.BYPASS if asked.control.no_store else CacheStatus.MISS
            assert exchange.cache is (CacheStatus.COLLAPSED if asked.joined else plain)
        cookie = header(outcome.headers, "set-cookie")
        assert (cookie is not None) == (call.flight.tries[-1] == "cookie" and not asked.joined)
        if call.versions is not None and not (exchange.cache is CacheStatus.STALE and READS[asked.name].market):
            behind = {one: version for one, version in call.versions if version < asked.floor.get(one, 0)}
            assert not behind, "an answer from before a write that had ended"

    def check_stale(self, asked: Asked, call: Call, age: float) -> None:
        """Where upstream failed, or our own line was long; within its time; of an earlier epoch for the market only.

        And of an earlier epoch only where upstream failed, and nothing newer is stored.
        """
        flight = asked.flight
        assert flight is not None
        assert not flight.tries or flight.tries[-1] in FAILED
        assert not asked.alone
        assert asked.control in (Directives(), Directives(max_stale=100.0))
        assert age < sum(self.lifetimes(flight.leader))
        assert call is self.stored(flight.leader, asked.ended, any_epoch=True)
        key = (self.sharer(asked), asked.name, self.in_force(seen_by(READS[asked.name], asked.who, shared=self.shared)))
        of_before = self.kept.get(key, (None, 0.0))[0] is not call
        assert flight.tries or not of_before, "of an earlier epoch, and only our own line was long"
        note(f"stale{' of an earlier epoch' if of_before else ''}{'' if flight.tries else ' as its turn was far'}")

    def check_nothing_stale(self, asked: Asked) -> None:
        """It was told of a failure, so there was nothing better."""
        assert asked.flight is not None
        if asked.control.max_age is None and not asked.control.no_cache and not asked.alone:
            assert self.stored(asked.flight.leader, asked.ended, any_epoch=True) is None, "there was a stale answer"

    def check_refusal(self, asked: Asked, refusal: Refusal) -> None:
        if asked.flight is None:
            assert (refusal.code, asked.hit, asked.control.only_if_cached) == ("not_cached", None, True)
            return
        last = asked.flight.tries[-1]
        if asked.write is not None and asked.write.spend and last != "unsent":
            assert (last in ("503", "drop", "lost"), refusal.code) == (True, "outcome_unknown")
        else:
            assert (last in ("drop", "lost", "unsent"), refusal.code) == (True, "upstream_unreachable")
        if asked.write is None:
            self.check_nothing_stale(asked)
        note(f"told {refusal.code}")

    def status(self, flight: Flight) -> int:
        return {"404": 404, "gone": 404, "500": 500, "503": 503}.get(flight.tries[-1], 200)


# --- What seldom happens by chance ------------------------------------------------------------------------------------

ASK, WRITE, ANSWER = ("read", (0, "a", "", 0, False)), ("write", (0, "a", False)), ("answer", (0, "ok", None))
DIES = ("fail", (0, ["503"] * 6))
Steps = tuple[str, str, list[tuple[str, tuple[Any, ...]]]]
SELDOM: dict[str, Steps] = {
    "a write is done, and then it is not found": ("user", "label", [WRITE, ("fail", (0, ["lost", "404"])), ASK]),
    "a write is done, and then given up": ("user", "label", [WRITE, ("fail", (0, ["lost", "leave"])), ASK]),
    "an offer that is shown is gone": ("offers 1", "rent", [WRITE, ("fail", (0, ["404"])), ASK]),
    "another thing is not found": ("ssh", "add key", [WRITE, ("fail", (0, ["404"])), ASK]),
    "a write that voids all": ("offers 1", "unlisted", [WRITE, ANSWER, ASK]),
    "a write that voids what is seen": ("ssh", "add key", [ASK, WRITE, ANSWER, ASK]),
    "a write while nobody's is read": ("unlisted", "add key", [ASK, WRITE, ("answer", (1, "ok", None)), ASK]),
    "a read that began before a write": (
        "ssh",
        "add key",
        [("wait", (40.0,)), ASK, ("act", (0,)), WRITE, ("answer", (1, "ok", None)), ANSWER, ASK],
    ),
    "stale after a write": ("templates", "add template", [WRITE, ANSWER, DIES]),
    "stale on the market after a write": ("offers 1", "rent", [WRITE, ANSWER, DIES]),
    "stale after its time": ("templates", "label", [("wait", (40.0,)), DIES]),
    "none stale for one that wants it fresh": (
        "templates",
        "label",
        [("read", (0, "a", "no-cache", 0, False)), DIES, ("read", (0, "a", "max-age=0", 0, False)), DIES],
    ),
    "the end of being fresh": (
        "templates",
        "label",
        [("wait_for_the_end", (0, False, late)) for late in (False, True)],
    ),
    "the end of being stale": ("offers 1", "label", [("wait_for_the_end", (0, True, False)), DIES]),
    "too old to be stale": ("offers 1", "label", [("reload", (5.0,)), ("wait_for_the_end", (0, True, True)), DIES]),
    "one that comes as the last one leaves": ("ssh", "add key", [WRITE, ANSWER, ASK, ("leave", (0, ""))]),
    "one that comes as it is answered": ("unlisted", "label", [ASK, ("answer", (0, "ok", ""))]),
    "too large to be shared": ("unlisted", "label", [ASK, ASK, ASK, ("answer", (0, "large", None))]),
}
"""What is asked, what is written, and what happens once the answer is stored."""


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", SELDOM)
def test_what_seldom_happens(name: str, shared: bool) -> None:
    read, write, steps = SELDOM[name]
    paths = Paths()
    try:
        paths.begin(shared, ([read], [write]))
        for step in [("reload", (300.0,)), ASK, ANSWER, *steps]:
            paths.step(step)
            paths.everybody_answered_was_answered_right()
            paths.nothing_is_left_but_what_is_under_way()
    finally:
        paths.teardown()


RUNS = int(os.environ.get("MODEL_RUNS", "0"))
TestPaths = Paths.TestCase
TestPaths.settings = rules_of_the_run(
    max_examples=RUNS or 200,
    stateful_step_count=50,
    deadline=None,
    derandomize=not RUNS,
    database=None,
    print_blob=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
