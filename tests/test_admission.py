"""Who waits, who goes next, and what every answer teaches: admission alone, without sockets, on virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import looptime
import pytest
from aiolimiter import AsyncLimiter
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy.admission
from proxy.admission import EVERYBODY, SLOW_START_ENDS, Admission, Limiter, Ticket, Turn
from proxy.clock import Clock
from proxy.policy import queueing
from proxy.policy.errors import Refusal
from proxy.policy.limiting import NAMED_FOR, Ceiling, LimitRules
from proxy.policy.messages import Headers, Response
from proxy.policy.queueing import BULK, STOPS_MONEY, Place, QueueRules
from proxy.policy.routing import Route, Routes

pytestmark = pytest.mark.looptime

NOON = 1_785_000_000.0
ROUTES = Routes.build(
    [
        {
            "families": {},
            "routes": [
                {"route": "GET /two/", "effect": "read", "interval": "2s"},
                {"route": "GET /ten/", "effect": "read", "interval": "10s"},
                {"route": "GET /five/", "effect": "read", "interval": "2s", "capacity": 5},
                {"route": "POST /invite/", "effect": "spend", "interval": "2s", "pass_429": True},
                *({"route": f"GET /free{number}/", "effect": "read", "interval": 0} for number in range(40)),
            ],
        }
    ]
)
TWO, TEN, FIVE, INVITE = (
    ROUTES.match(*line.split(" ")) for line in ("GET /two/", "GET /ten/", "GET /five/", "POST /invite/")
)
FREE = [ROUTES.match("GET", f"/free{number}/") for number in range(40)]
NOBODY = (0, 0)


class CountingClock(Clock):
    """Counts the timers that fired, and knows those that have not yet."""

    def __init__(self) -> None:
        super().__init__(wall=lambda: NOON + self.now())
        self.fired = 0
        self.handles: list[asyncio.TimerHandle] = []

    def call_at(self, when: float, callback: Callable[..., object], *arguments: object) -> asyncio.TimerHandle:
        def fire() -> None:
            self.fired += 1
            callback(*arguments)

        self.handles.append(super().call_at(when, fire))
        return self.handles[-1]

    @property
    def pending(self) -> int:
        return sum(not handle.cancelled() and handle.when() > self.now() for handle in self.handles)


class World:
    """An admission, and callers who note when they were sent."""

    def __init__(self, *, slots: int = 100, queue: QueueRules | None = None, known: str = "k", **limits: Any) -> None:
        self.clock = CountingClock()
        self.began = self.clock.now()
        rules = LimitRules(**{"global_": None, "margin": 0.0} | limits)
        self.admission = Admission(self.clock, rules, queue or QueueRules(), slots)
        if known:  # past its slow start
            self.admission.restore({f"{who} api account": {"known": True} for who in known.split()})
        self.sent: list[tuple[str, float]] = []

    @property
    def now(self) -> float:
        return self.clock.now() - self.began

    @property
    def state(self) -> tuple[int, int]:
        return self.admission.waiting, self.admission.in_flight

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.sent]

    @property
    def times(self) -> list[float]:
        return [round(at, 3) for _, at in self.sent]

    async def call(
        self, name: str, route: Route, who: str = "k", *, takes: float = 0.0, turn: Turn | None = None
    ) -> None:
        with await self.admission.turn(turn or self.admission.arrive(), route, who) as ticket:
            ticket.sent()
            self.sent.append((name, self.now))
            if takes:
                await asyncio.sleep(takes)
            ticket.answered(Response(200, ()))

    def begin(self, name: str, route: Route, who: str = "k", **more: Any) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.call(name, route, who, **more))

    async def granted(self, route: Route, who: str = "k") -> Ticket:
        return await self.admission.turn(self.admission.arrive(), route, who)

    def bucket(self, route: Route, who: str = "k") -> Any:
        return self.admission._queue(route, who).route

    def assert_idle(self) -> None:
        """Nothing waits, nothing is in flight, and every token that was taken was sent or given back."""
        assert self.state == NOBODY
        for queue in self.admission._queues.values():
            assert (len(queue), queue.out, queue.account.in_flight, queue.account.waiting) == (0, 0, 0, 0)
            assert [bucket.pending for bucket in queue.buckets] == [0, 0, 0]
        assert self.admission._gates == {}
        for origin in self.admission.origins.values():
            if origin.limiter is not None:
                assert 0.0 <= origin.limiter._level <= origin.limiter.max_rate + 1e-6


def refused(body: bytes = b"API requests too frequent", headers: Headers = ()) -> Response:
    return Response(429, headers, body)


# --- Order ------------------------------------------------------------------------------------------------------------


async def test_a_line_goes_in_order_of_arrival_one_an_interval() -> None:
    world = World()
    await asyncio.gather(*(world.call(name, TWO) for name in "abcde"))
    assert world.names == list("abcde")
    assert world.times == [0.0, 2.0, 4.0, 6.0, 8.0]
    world.assert_idle()


async def test_the_interval_counts_from_the_sending_not_from_the_grant() -> None:
    world = World()
    ticket = await world.granted(TWO)
    second = world.begin("b", TWO)
    await asyncio.sleep(1.5)  # a handshake
    ticket.sent()
    ticket.close()
    await second
    assert world.times == [3.5]


async def test_keys_do_not_wait_for_each_other_nor_routes() -> None:
    world = World(known="k l")
    await asyncio.gather(*(world.call(f"{who}{route.template}", route, who) for who in "kl" for route in (TWO, TEN)))
    assert world.times == [0.0] * 4


async def test_all_keys_share_a_line_where_the_settings_say_that_the_address_counts() -> None:
    world = World(scope="ip", known=EVERYBODY)
    await asyncio.gather(*(world.call(who, TWO, who) for who in "klm"))
    assert (world.names, world.times) == (list("klm"), [0.0, 2.0, 4.0])


async def test_of_the_lines_that_are_due_the_oldest_arrival_takes_the_ceilings_token() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    await asyncio.gather(*(world.call(str(number), FREE[number % 3]) for number in range(9)))
    assert world.names == [str(number) for number in range(9)]
    assert all(later - earlier >= 1.0 - 1e-5 for earlier, later in pairwise(world.times))


async def test_of_the_lines_that_are_due_the_oldest_arrival_takes_the_accounts_token() -> None:
    world = World()
    world.admission.restore({"k api account": {"known": True, "interval": 3.0, "learned_at": NOON}})
    await asyncio.gather(*(world.call(str(number), FREE[number % 3]) for number in range(6)))
    assert world.names == [str(number) for number in range(6)]
    assert world.times == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]


async def test_an_older_arrival_that_is_not_due_keeps_nobody_waiting_who_is() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    await asyncio.gather(*(world.call(name, TEN) for name in ("ten 1", "ten 2")), world.call("two", TWO))
    assert world.names == ["ten 1", "two", "ten 2"]
    assert world.times[2] == pytest.approx(10.0)


async def test_where_one_bucket_is_not_due_the_others_are_not_touched() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    world.admission.restore({"k api account": {"known": True, "full_at": NOON + 30.0}})
    waits = world.begin("a", TWO)
    await asyncio.sleep(10.0)
    limiter = world.admission.origins["api"].limiter
    assert limiter is not None
    assert (limiter._level, world.bucket(TWO).pending, world.state) == (0.0, 0, (1, 0))
    await waits
    assert world.times == [30.0]


async def test_a_bucket_of_five_lets_five_go_at_once() -> None:
    world = World()
    await asyncio.gather(*(world.call(str(number), FIVE) for number in range(8)))
    assert world.times == [0.0] * 5 + [2.0, 4.0, 6.0]


async def test_no_more_calls_are_in_flight_than_there_are_slots_and_the_oldest_gets_the_next() -> None:
    world = World(slots=2)
    await asyncio.gather(*(world.call(str(number), FREE[number], takes=10.0) for number in range(5)))
    assert world.names == list("01234")
    assert world.times == [0.0, 0.0, 10.0, 10.0, 20.0]


async def test_who_met_a_429_goes_on_from_the_place_of_its_arrival() -> None:
    world = World()
    first = world.admission.arrive()
    with await world.admission.turn(first, TWO, "k") as ticket:
        others = [world.begin(name, TWO) for name in "bc"]
        await asyncio.sleep(1.0)
        ticket.sent()
        assert ticket.answered(refused(headers=(("Retry-After", "7"),)))
    await world.call("a", TWO, turn=first)
    await asyncio.gather(*others)
    assert world.names == ["a", "b", "c"]
    assert world.times[0] == pytest.approx(8.0)


async def test_who_comes_back_is_not_told_that_those_behind_it_take_too_long() -> None:
    world = World()
    before = world.begin("before", TWO)
    await asyncio.sleep(0)
    first = world.admission.arrive(5.0)
    with await world.admission.turn(first, TWO, "k") as ticket:
        line = [world.begin(str(number), TWO) for number in range(5)]
        await asyncio.sleep(0)
        ticket.sent()
        assert ticket.answered(refused())
    await world.call("first", TWO, turn=first)
    await asyncio.gather(before, *line)
    assert world.names == ["before", "first", "0", "1", "2", "3", "4"]


async def test_who_comes_between_a_token_and_its_timer_does_not_overtake() -> None:
    world = World()
    await world.call("a", TWO)
    second = world.begin("b", TWO)
    await asyncio.sleep(1.0)
    world.bucket(TWO).tat = -math.inf  # due, and the dispatcher has not been told
    await world.call("c", TWO)
    await second
    assert world.names == ["a", "b", "c"]


# --- Slow start -------------------------------------------------------------------------------------------------------


async def test_a_key_not_yet_known_begins_with_one_call_and_doubles_with_each_answer() -> None:
    world = World(known="")
    await asyncio.gather(*(world.call(str(number), FREE[number], takes=1.0) for number in range(12)))
    assert [world.times.count(float(second)) for second in range(4)] == [1, 2, 8, 1]
    assert world.names == [str(number) for number in range(12)]


async def test_a_key_that_is_known_has_no_window() -> None:
    world = World()
    await asyncio.gather(*(world.call(str(number), FREE[number], takes=1.0) for number in range(40)))
    assert world.times == [0.0] * 40


# --- Driven by what happens, not by polling ---------------------------------------------------------------------------


async def test_when_nobody_waits_there_is_no_timer() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=2.0))
    await asyncio.gather(*(world.call(str(number), TWO) for number in range(5)))
    await asyncio.sleep(10.0)
    assert world.clock.pending == 0
    fired = world.clock.fired
    await asyncio.sleep(3600.0)
    assert world.clock.fired == fired


async def test_when_the_last_one_has_left_there_is_no_timer() -> None:
    world = World()
    await world.call("sent", TEN)
    waits = world.begin("waits", TEN)
    await asyncio.sleep(1.0)
    assert world.clock.pending > 0
    waits.cancel()
    await asyncio.wait([waits])
    assert world.clock.pending == 0


async def test_a_bucket_shut_for_ten_minutes_wakes_nobody_before(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched = 0
    dispatch = Admission._dispatch

    def counting(self: Admission, *args: Any) -> None:
        nonlocal dispatched
        dispatched += 1
        dispatch(self, *args)

    monkeypatch.setattr(Admission, "_dispatch", counting)
    world = World()
    world.admission.restore({"k api GET /two/": {"full_at": NOON + 600.0}})
    line = [world.begin(str(number), TWO) for number in range(100)]
    await asyncio.sleep(1.0)
    fired, dispatched = world.clock.fired, 0
    await asyncio.sleep(598.0)
    assert (world.clock.fired - fired, dispatched, world.state) == (0, 0, (100, 0))
    await asyncio.sleep(2.0)
    assert world.times[:1] == [600.0]
    for task in line:
        task.cancel()
    await asyncio.wait(line)
    world.assert_idle()


async def test_ten_thousand_come_and_go_in_a_few_steps_each(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def counting(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            return real(*args)

        monkeypatch.setattr(module, name, counting)

    def compared(place: Place, other: Place) -> bool:
        nonlocal steps
        steps += 1
        return place.number < other.number

    monkeypatch.setattr(Place, "__lt__", compared)
    for name in ("heappush", "heappop"):
        counted(proxy.admission, name)
        counted(queueing, name)
    world = World(queue=QueueRules(max_wait=1e6))
    line = [world.begin(str(number), TWO) for number in range(10_000)]
    await asyncio.sleep(1.0)
    assert world.state == (9_999, 0)
    joined, steps = steps, 0
    for task in line[::2] + line[1::2]:
        task.cancel()
    await asyncio.wait(line)
    assert joined < 10_000 * 20
    assert steps < 10_000 * 20
    world.assert_idle()


# --- Deadlines and bounds ---------------------------------------------------------------------------------------------


async def refusal_of(call: Coroutine[Any, Any, object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await call
    return caught.value


async def test_a_wait_that_is_known_to_be_too_long_is_refused_at_once() -> None:
    world = World()
    line = [world.begin(str(number), TEN) for number in range(5)]
    await asyncio.sleep(1.0)
    turn = world.admission.arrive(30.0)
    refusal = await refusal_of(world.admission.turn(turn, TEN, "k"))
    assert (refusal.status, refusal.code, world.now) == (429, "wait_too_long", 1.0)
    # Five are before it, the last of which goes at 40: it would go at 50, and may wait until 31.
    assert refusal.retry_after == pytest.approx(19.0)
    await asyncio.gather(*line)
    world.assert_idle()


async def test_one_that_would_come_just_in_time_is_let_in() -> None:
    world = World()
    await world.call("a", TEN)
    await world.call("b", TEN, turn=world.admission.arrive(10.1))
    assert world.times == [0.0, 10.0]


async def test_a_shorter_deadline_holds_for_one_attempt_only() -> None:
    world = World()
    await world.call("a", TEN)
    turn = world.admission.arrive(60.0)
    refusal = await refusal_of(world.admission.turn(turn, TEN, "k", deadline=world.clock.now() + 5.0))
    assert refusal.code == "wait_too_long"
    await world.call("b", TEN, turn=turn)
    assert world.times == [0.0, 10.0]


async def test_a_turn_that_has_not_come_by_the_deadline_is_refused_then() -> None:
    world = World(slots=1)
    held = await world.granted(FREE[0])
    refusal = await refusal_of(world.admission.turn(world.admission.arrive(7.0), FREE[1], "k"))
    assert refusal.code == "wait_too_long"
    assert world.now == pytest.approx(7.0)
    assert int(refusal.retry_after_header() or 0) >= 1
    held.close()
    world.assert_idle()


async def test_a_bucket_that_is_shut_beyond_its_deadline_turns_the_head_away_without_letting_it_wait() -> None:
    world = World()
    ticket = await world.granted(TWO)
    ticket.sent()
    waits = asyncio.ensure_future(world.admission.turn(world.admission.arrive(20.0), TWO, "k"))
    behind = world.begin("b", TWO)
    await asyncio.sleep(1.0)
    ticket.answered(refused(headers=(("Retry-After", "100"),)))
    ticket.close()
    refusal = await refusal_of(asyncio.wait_for(waits, 1.0))
    assert (refusal.code, world.now) == ("wait_too_long", 1.0)
    assert refusal.retry_after == pytest.approx(81.0)
    await behind
    assert world.times == [101.0]
    world.assert_idle()


async def test_a_full_line_is_full_for_nobody_else_nor_for_who_comes_back() -> None:
    world = World(queue=QueueRules(max_waiting=2), known="k l")
    first = world.admission.arrive()
    with await world.admission.turn(first, TEN, "k") as ticket:
        line = [world.begin(str(number), TEN) for number in range(2)]
        await asyncio.sleep(0)
        assert (await refusal_of(world.call("x", TEN))).code == "queue_full"
        await world.call("another route", TWO)
        await world.call("another key", TEN, "l")
        ticket.sent()
        assert ticket.answered(refused(headers=(("Retry-After", "3"),)))
    await world.call("first", TEN, turn=first)
    await asyncio.gather(*line)
    assert world.names == ["another route", "another key", "first", "0", "1"]


async def test_at_the_end_all_who_wait_and_all_who_come_are_told_so() -> None:
    world = World(slots=1)
    held = await world.granted(FREE[0])
    line = [world.begin(str(number), route) for number, route in enumerate([FREE[0], FREE[1], TWO, TWO, TEN])]
    await asyncio.sleep(1.0)
    world.admission.turn_all_away(Refusal(503, "shutting_down", "bye"))
    late = world.begin("late", FREE[5])
    ended = await asyncio.gather(*line, late, return_exceptions=True)
    assert [getattr(end, "code", end) for end in ended] == ["shutting_down"] * 6
    assert world.state == (0, 1)
    held.close()
    world.assert_idle()


async def test_a_full_queue_refuses_and_has_room_again_when_one_has_left() -> None:
    world = World(queue=QueueRules(max_waiting=3))
    line = [world.begin(str(number), TEN) for number in range(4)]  # one goes at once
    await asyncio.sleep(1.0)
    refusal = await refusal_of(world.call("x", TEN))
    assert (refusal.status, refusal.code, world.now) == (429, "queue_full", 1.0)
    line[2].cancel()
    await asyncio.sleep(0.1)
    await world.call("y", TEN)
    assert world.names == ["0", "1", "3", "y"]
    await asyncio.wait(line)


async def test_what_is_expected_is_what_comes_true() -> None:
    world = World()
    line = [world.begin(str(number), TWO) for number in range(5)]
    await asyncio.sleep(0.5)
    expected = world.now + world.admission.expected(TWO, "k")
    await world.call("last", TWO)
    assert world.times[-1] == pytest.approx(expected)
    await asyncio.gather(*line)
    assert world.admission.expected(FREE[0], "somebody") == 0.0


# --- Whose 429 --------------------------------------------------------------------------------------------------------


def shut(world: World, route: Route, who: str = "k") -> dict[str, float]:
    """Seconds for which each bucket of a line is shut, those that are."""
    queue = world.admission._queue(route, who)
    now = world.clock.now()
    due = {
        name: bucket.due(now) - now for name, bucket in zip(("route", "shared", "account"), queue.buckets, strict=True)
    }
    return {name: round(seconds, 3) for name, seconds in due.items() if seconds > 1e-3}


async def meet(world: World, route: Route, response: Response, who: str = "k") -> bool:
    """One more call that gets this answer at once; whether it is to come back."""
    with await world.granted(route, who) as ticket:
        ticket.sent()
        return ticket.answered(response)


THRESHOLD = refused(b"API requests too frequent: endpoint threshold=2.0*1.0")
WAIT = refused(headers=(("Retry-After", "9"),))


@pytest.mark.parametrize("answer", [refused(), THRESHOLD, WAIT])
async def test_a_429_shortly_after_the_last_call_is_the_routes(answer: Response) -> None:
    world = World()
    await world.call("a", TWO)
    await asyncio.sleep(2.0)
    assert await meet(world, TWO, answer)
    assert set(shut(world, TWO)) == {"route"}


async def test_a_429_long_after_the_last_call_is_the_accounts_if_it_names_no_endpoint() -> None:
    world = World()
    await world.call("a", TWO)
    await asyncio.sleep(100.0)
    assert await meet(world, TWO, WAIT)
    assert shut(world, TWO)["account"] == pytest.approx(9.0)
    assert shut(world, FREE[0]) == {"account": 9.0}
    assert world.admission._queue(TWO, "k").account.window == 1.0


async def test_a_429_long_after_the_last_call_is_the_routes_if_it_names_the_endpoint() -> None:
    world = World()
    await world.call("a", TWO)
    await asyncio.sleep(100.0)
    assert await meet(world, TWO, THRESHOLD)
    assert set(shut(world, TWO)) == {"route"}


async def test_a_429_that_another_keys_call_explains_is_the_addresss_and_from_then_on_all_keys_share() -> None:
    world = World(known="k l")
    await world.call("a", TWO, "l")
    assert await meet(world, TWO, THRESHOLD, "k")
    assert shut(world, TWO, "l")["shared"] == pytest.approx(2.0, rel=0.05)
    world.sent.clear()
    await asyncio.gather(*(world.call(who, TWO, who) for who in "klk"))
    assert all(later - earlier >= 2.0 - 1e-6 for earlier, later in pairwise(world.times))
    assert await meet(world, TWO, WAIT, "k")
    assert shut(world, TWO, "l")["shared"] == pytest.approx(9.0)


async def test_when_an_address_is_no_longer_counted_those_who_waited_for_it_go_on() -> None:
    world = World(known="k l")
    await world.call("a", TWO, "l")
    assert await meet(world, TWO, THRESHOLD, "k")
    await asyncio.sleep(NAMED_FOR)
    answered_late = await world.granted(TWO, "l")
    answered_late.sent()
    await asyncio.sleep(5.0)
    not_yet_sent = await world.granted(TWO, "l")
    began = world.now
    waits = world.begin("k", TWO, "k")
    await asyncio.sleep(1.0)
    assert world.state == (1, 2)
    answered_late.answered(Response(200, ()))
    await waits
    assert world.now == pytest.approx(began + 1.0)
    answered_late.close()
    not_yet_sent.close()
    world.assert_idle()


async def test_keys_are_not_lumped_together_where_the_settings_say_that_the_key_counts() -> None:
    world = World(known="k l", scope="key")
    await world.call("a", TWO, "l")
    assert await meet(world, TWO, WAIT, "k")
    assert "shared" not in shut(world, TWO, "k")
    assert shut(world, TWO, "k")["account"] == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("route", "response"),
    [
        (TWO, refused(b'{"error": "search_quota_exceeded"}')),
        (TWO, refused(b'{"msg": "Error: invitation already sent to a@example.com only 300 seconds ago."}')),
        (TWO, refused(b'{"error": "tfa_locked"}')),
        (INVITE, refused()),
        (TWO, Response(404, ())),
        (TWO, Response(503, ())),
        (TWO, Response(500, ())),
    ],
)
async def test_what_waiting_does_not_solve_shuts_nothing(route: Route, response: Response) -> None:
    world = World()
    await world.call("a", route)
    assert not await meet(world, route, response)
    assert shut(world, route) == {"route": 2.0}  # its own interval


async def test_a_429_stops_those_in_line_too() -> None:
    world = World()
    ticket = await world.granted(TWO)
    ticket.sent()
    line = [world.begin(name, TWO) for name in "abc"]
    await asyncio.sleep(0.5)
    ticket.answered(refused(headers=(("Retry-After", "60"),)))
    ticket.close()
    await asyncio.gather(*line)
    assert world.times[0] == pytest.approx(60.5)
    assert min(later - earlier for earlier, later in pairwise(world.times)) >= 2.0


async def test_a_call_whose_answer_was_lost_counts_as_sent_and_one_never_sent_costs_nothing() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    (await world.granted(TEN)).close()
    await world.call("a", TEN)
    assert world.times == [0.0]
    with await world.granted(TEN) as ticket:
        assert world.now == pytest.approx(10.0)
        ticket.sent()
    await world.call("b", TEN)
    assert world.times == pytest.approx([0.0, 20.0])


async def test_rate_headers_that_are_nobodys_hold_this_route_but_not_for_long_and_no_other() -> None:
    world = World()
    headers = (("X-RateLimit-Limit", "50"), ("X-RateLimit-Remaining", "0"), ("X-RateLimit-Reset", str(NOON + 3600.0)))
    assert not await meet(world, FREE[0], Response(200, headers))
    assert shut(world, FREE[0]) == {"route": 10.0}
    assert shut(world, FREE[1]) == {}


async def test_rate_headers_that_fit_what_is_known_of_the_account_hold_all_its_routes() -> None:
    world = World()
    learned = {"known": True, "interval": 3.0, "capacity": 5, "learned_at": NOON}
    world.admission.restore({"k api account": learned})
    headers = (("X-RateLimit-Limit", "5"), ("X-RateLimit-Remaining", "0"))
    assert not await meet(world, FREE[0], Response(200, headers))
    assert shut(world, FREE[1]) == {"account": 3.0}


async def test_rate_headers_of_the_routes_own_bucket_hold_no_other_route() -> None:
    world = World()
    headers = (("X-RateLimit-Limit", "5"), ("X-RateLimit-Remaining", "0"))
    assert not await meet(world, FIVE, Response(200, headers))
    assert shut(world, FIVE) == {"route": 2.0}
    assert shut(world, FREE[1]) == {}


# --- Leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["head", "behind", "both"])
@pytest.mark.parametrize(
    "stage", ["before the first step", "waiting", "the tick of the grant", "the tick of the deadline"]
)
async def test_a_caller_who_leaves_leaves_nothing_behind(stage: str, who: str) -> None:
    world = World(global_=Ceiling(rate=10.0, per=1.0, burst=1.0))
    held = await world.granted(TWO)
    waits = 10.0 if stage == "the tick of the deadline" else 100.0
    line = [world.begin(name, TWO, turn=world.admission.arrive(waits)) for name in ("head", "behind")]
    leaving = {"head": line[:1], "behind": line[1:], "both": line}[who]
    match stage:
        case "waiting":
            await asyncio.sleep(1.0)
        case "the tick of the grant":
            await asyncio.sleep(1.0)
            held.close()  # nothing was sent: the head's turn has come, and it does not know yet
            assert world.state == (1, 1)
        case "the tick of the deadline":
            await asyncio.sleep(1.0)
            for place in list(world.admission._queue(TWO, "k")):
                world.admission._late(place.wait)
            assert world.state == (0, 1)
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    assert all(task.cancelled() for task in leaving)
    held.close()
    staying = [task for task in line if task not in leaving]
    ended = await asyncio.gather(*staying, return_exceptions=True)
    assert len(world.sent) == (0 if stage == "the tick of the deadline" else len(staying))
    assert all(isinstance(end, Refusal) or end is None for end in ended)
    world.assert_idle()


async def test_who_leaves_at_the_moment_of_the_grant_hands_it_to_the_next() -> None:
    world = World()
    held = await world.granted(TWO)
    first, second = world.begin("a", TWO), world.begin("b", TWO)
    await asyncio.sleep(1.0)
    first.cancel()  # its task has not run yet when the turn comes
    held.close()
    await second
    assert first.cancelled()
    assert (world.names, world.times) == (["b"], [1.0])
    world.assert_idle()


async def test_a_ticket_may_be_told_everything_twice() -> None:
    world = World()
    ticket = await world.granted(TWO)
    ticket.sent()
    ticket.sent()
    ticket.close()
    ticket.close()
    ticket.sent()
    assert world.bucket(TWO).sends == 1
    world.assert_idle()


Way = tuple[int, float, float, float, str]
WAYS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which route
        st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0, 5.0]),  # comes
        st.sampled_from([0.5, 2.0, 4.0, 30.0]),  # waits at most
        st.sampled_from([0.0, 0.1, 2.0, 4.0, 100.0]),  # is cancelled after
        st.sampled_from(["200", "429", "429 then 200", "lost", "not sent", "raises", "streams"]),
    ),
    max_size=14,
)


async def come_and_go(ways: list[Way], ceiling: Ceiling | None, slots: int) -> None:
    world = World(slots=slots, known="", global_=ceiling)
    routes = [TWO, FIVE, FREE[0], FREE[1]]

    async def once(route: int, comes: float, waits: float, outcome: str) -> None:
        await asyncio.sleep(comes)
        turn = world.admission.arrive(waits)
        for attempt in range(3):
            with await world.admission.turn(turn, routes[route], "k") as ticket:
                if outcome == "not sent":
                    return
                await asyncio.sleep(0.05)
                ticket.sent()
                await asyncio.sleep(0.5)
                if outcome == "lost":
                    return
                if outcome == "raises":
                    raise KeyError
                failed = outcome == "429" or (outcome == "429 then 200" and not attempt)
                if not ticket.answered(refused() if failed else Response(200, ())):
                    if outcome == "streams":
                        await asyncio.sleep(3.0)
                    return

    tasks = []
    for route, comes, waits, leaves, outcome in ways:
        task = asyncio.ensure_future(once(route, comes, waits, outcome))
        asyncio.get_running_loop().call_later(comes + leaves, task.cancel)
        tasks.append(task)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, None | Refusal | KeyError | asyncio.CancelledError) for end in ended)
    world.assert_idle()
    assert repr(world.admission).startswith("<Admission 0 waiting, 0 in flight")
    # And it still works.
    await asyncio.wait_for(world.call("after", FREE[2]), 10_000.0)


@given(WAYS, st.sampled_from([None, Ceiling(2.0, 1.0, 2.0), Ceiling(0.5, 1.0, 1.0)]), st.sampled_from([1, 3, 100]))
@settings(max_examples=150, deadline=None)
@pytest.mark.looptime(False)
def test_whatever_becomes_of_callers_nothing_is_left(ways: list[Way], ceiling: Ceiling | None, slots: int) -> None:
    loop = looptime.new_event_loop(start=0.0)
    try:
        loop.run_until_complete(come_and_go(ways, ceiling, slots))
    finally:
        loop.close()


# --- Forgetting, and a restart ----------------------------------------------------------------------------------------


async def test_lines_buckets_and_keys_that_know_nothing_are_forgotten() -> None:
    world = World()
    for number in range(50):
        await world.call("a", TWO, f"key{number}")
    await asyncio.sleep(120.0)
    await world.call("a", TWO, "another")
    assert repr(world.admission) == "<Admission 0 waiting, 0 in flight, 1 lines>"
    assert len(world.admission._buckets) == 2  # the key's, and the one of all keys together
    assert len(world.admission._accounts) == 1


async def test_what_is_owed_learned_waiting_or_in_flight_is_not_forgotten() -> None:
    world = World(known="learned owes waits flies", queue=QueueRules(max_wait=1e6))
    await meet(world, TWO, refused(b"endpoint threshold=5.0"), "learned")
    await world.call("a", TWO, "owes")
    await meet(world, TWO, refused(headers=(("Retry-After", "5000"),)), "owes")
    ticket = await world.granted(TEN, "flies")
    ticket.sent()
    world.admission.restore({"waits api account": {"full_at": NOON + 500.0}})
    line = world.begin("w", TEN, "waits")
    await asyncio.sleep(120.0)
    await world.call("a", TWO, "another")
    assert {key[0] for key in world.admission._queues} == {"learned", "owes", "waits", "flies", "another"}
    assert world.bucket(TWO, "learned").interval == 5.0
    ticket.close()
    await line
    assert world.names == ["a", "a", "w"]


async def test_what_was_learned_and_what_is_owed_survive_a_restart() -> None:
    before = World(known="k l")
    await meet(before, TWO, refused(b"endpoint threshold=5.0"))
    await before.call("a", TEN)
    await before.call("a", TEN, "l")
    await before.call("a", FIVE)
    await meet(before, FIVE, refused(headers=(("Retry-After", "30"),)))
    await before.call("a", FREE[0], "l")
    assert await meet(before, FREE[1], WAIT, "l")
    kept = before.admission.dump()
    assert "k" in " ".join(kept)

    after = World(known="")
    after.clock.wall = lambda: NOON + before.now + 4.0
    after.admission.restore(kept)
    assert after.bucket(TWO).interval == 5.0
    assert shut(after, TWO) == {"route": 1.0}
    assert shut(after, TEN) == {"route": 6.0}
    assert shut(after, FIVE) == {"route": 26.0}
    assert shut(after, FREE[0], "l") == {"account": 5.0}
    assert after.admission._queue(TEN, "k").account.window == SLOW_START_ENDS


async def test_that_an_address_is_counted_survives_a_restart() -> None:
    before = World(known="k l")
    await before.call("a", TWO, "l")
    await meet(before, TWO, THRESHOLD, "k")
    after = World(known="k l")
    after.admission.restore(before.admission.dump())
    await asyncio.gather(*(after.call(who, TWO, who) for who in "klkl"))
    assert all(later - earlier >= 2.0 for earlier, later in pairwise([0.0, *after.times]))


async def test_what_nobody_has_asked_for_since_the_start_is_kept_for_the_next() -> None:
    world = World(known="")
    kept = {"k api GET /two/": {"interval": 5.0, "learned_at": NOON, "seen": NOON - 3600.0}}
    gone = {"l api GET /two/": {"interval": 5.0, "learned_at": NOON, "seen": NOON - 30 * 86400.0}}
    broken = {"x": 5, "y": {"seen": "long ago"}, "z": {"seen": None}}
    world.admission.restore(kept | gone | broken)
    assert world.admission.dump() == kept


async def test_other_settings_count_from_then_on_and_hand_out_no_fresh_burst() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=2.0))
    await asyncio.gather(*(world.call(str(number), FREE[number]) for number in range(2)))
    rules = LimitRules(global_=Ceiling(rate=1.0, per=2.0, burst=2.0), margin=0.0, scale=3.0)
    world.admission.reconfigure(rules, QueueRules(), 100)
    await asyncio.gather(*(world.call(str(number), FREE[number]) for number in range(2)))
    assert world.times == pytest.approx([0.0, 0.0, 2.0, 4.0])
    assert world.bucket(TWO).interval == 6.0


async def test_what_was_charged_before_a_reload_can_be_given_back_after_it() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1000.0, burst=1.0))
    ticket = await world.granted(FREE[0])
    world.admission.reconfigure(LimitRules(global_=Ceiling(rate=1.0, per=900.0, burst=1.0)), QueueRules(), 100)
    ticket.close()  # nothing was sent
    await world.call("next", FREE[1])
    assert world.times == [0.0]


async def test_another_margin_counts_from_then_on() -> None:
    world = World()
    await world.call("a", TWO)
    world.admission.reconfigure(LimitRules(global_=None, margin=0.5), QueueRules(), 100)
    await world.call("b", TWO)
    await world.call("c", TWO)
    assert world.times == pytest.approx([0.0, 2.0, 5.0])


async def test_the_dashboard_tells_what_is_known_of_each_bucket() -> None:
    world = World()
    await meet(world, TWO, refused(b"endpoint threshold=5.0"))
    shown = {limit["route"]: limit for limit in world.admission.limits_known()}
    assert set(shown) == {"GET /two/", "account"}
    assert (shown["GET /two/"]["interval"], shown["GET /two/"]["source"]) == (5.0, "learned")
    assert (shown["GET /two/"]["due_in"], shown["GET /two/"]["waiting"]) == (5.0, 0)
    assert "5 s" in shown["GET /two/"]["correction"]


# --- aiolimiter -------------------------------------------------------------------------------------------------------


async def test_the_ceiling_reads_what_aiolimiter_keeps() -> None:
    # Private names that Limiter relies on: what they are called, and what they mean.
    plain = AsyncLimiter(5.0, 10.0)
    assert (plain._level, plain._last_check, plain._rate_per_sec, plain.max_rate) == (0.0, 0.0, 0.5, 5.0)
    await plain.acquire()
    assert plain._level == 1.0
    await asyncio.sleep(1.0)
    plain._leak()
    assert plain._level == pytest.approx(0.5)


async def test_the_ceiling_gives_its_burst_and_then_its_rate() -> None:
    limiter = Limiter(Ceiling(rate=2.0, per=1.0, burst=3.0))
    assert limiter.rate == 2.0
    for _ in range(3):
        assert limiter.delay() == 0.0
        limiter.take()
    assert limiter.delay() == pytest.approx(0.5)
    await asyncio.sleep(0.5)
    assert limiter.delay() == 0.0
    limiter.take()
    limiter.give_back()
    assert limiter.delay() == 0.0


async def test_a_ceiling_has_room_exactly_when_aiolimiter_says_so() -> None:
    ours, theirs = Limiter(Ceiling(rate=3.0, per=2.0, burst=2.0)), AsyncLimiter(2.0, 4.0 / 3.0)
    for _ in range(50):
        assert (ours.delay() == 0.0) is theirs.has_capacity()
        if ours.delay() == 0.0:
            ours.take()
            await theirs.acquire()
        await asyncio.sleep(0.13)


async def test_an_origin_without_a_ceiling_or_slots_waits_for_neither_or_for_ever() -> None:
    world = World(slots=1)
    origin = world.admission.origins["api"]
    assert origin.delay() == 0.0
    ticket = await world.granted(FREE[0])
    assert origin.delay() == math.inf
    assert repr(origin) == "<Origin api: 0 waiting, 1/1 in flight>"
    ticket.close()
    assert origin.delay() == 0.0


async def test_keys_that_do_not_come_back_are_forgotten_with_what_was_learned_from_them() -> None:
    world = World(known="")
    for number in range(50):
        await world.call("x", TEN, f"key{number}")
    await asyncio.sleep(10.0)
    for number in range(50):
        ticket = await world.granted(TEN, f"key{number}")
        ticket.sent()
        ticket.answered(refused(b"API requests too frequent: endpoint threshold=20.0*1.0"))
        ticket.close()
    assert len(world.admission.dump()) >= 50
    await asyncio.sleep(NAMED_FOR * 8)
    await world.call("x", TWO, "new")
    assert len(world.admission._buckets) < 10
    assert len(world.admission._queues) < 10
    assert len(world.admission.dump()) < 5


async def test_who_stands_behind_one_that_left_at_the_very_door_is_not_forgotten() -> None:
    world = World(global_=Ceiling(rate=1, per=20.0, burst=1))
    await world.call("first", FREE[0])
    account = world.admission._queue(FREE[0], "k").account
    account.bucket.shut(world.clock.now() + 5.0)
    leaves, behind = world.begin("leaves", FREE[1]), world.begin("behind", FREE[2])
    await asyncio.sleep(10.0)  # the account lets one on, the ceiling does not yet
    leaves.cancel()
    await behind
    assert world.sent == [("first", 0.0), ("behind", 20.0)]
    world.assert_idle()


# --- Fair shares ------------------------------------------------------------------------------------------------------


def crowd(world: World, who: str, count: int, route: Route, credential: str = "k", **more: Any) -> None:
    for _ in range(count):
        world.begin(who, route, credential, turn=world.admission.arrive(math.inf, who=who, **more))


async def test_a_crowd_in_one_line_delays_another_caller_by_a_turn_or_two() -> None:
    world = World()
    crowd(world, "a", 500, TWO)
    await asyncio.sleep(101.0)
    crowd(world, "b", 1, TWO)
    await asyncio.sleep(4.0)
    assert "b" in world.names[-2:]
    assert world.times == [2.0 * number for number in range(len(world.times))]


@pytest.mark.parametrize("scope", ["ip", "key"])
async def test_a_crowd_on_many_routes_and_keys_leaves_the_ceiling_to_others(scope: str) -> None:
    keys = "k0 k1 k2 k3 k4 b"
    world = World(known=keys, scope=scope, global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    for key in keys.split()[:-1]:
        for route in FREE[:20]:
            crowd(world, "a", 5, route, key)
    await asyncio.sleep(50.5)
    crowd(world, "b", 3, FREE[30], "b")
    await asyncio.sleep(7.0)
    assert world.names[-8:].count("b") == 3


async def test_a_crowd_on_many_routes_leaves_the_account_to_others() -> None:
    world = World()
    world.admission.restore({"k api account": {"known": True, "interval": 3.0, "learned_at": NOON}})
    for route in FREE[:20]:
        crowd(world, "a", 5, route)
    await asyncio.sleep(31.0)
    for route in FREE[30:33]:
        crowd(world, "b", 1, route)
    await asyncio.sleep(21.0)
    assert world.names[-7:].count("b") == 3


async def test_who_stands_behind_a_crowd_in_its_line_waits_for_the_ceiling_no_longer_than_others() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    for route in FREE[:20]:
        crowd(world, "a", 25, route)
    crowd(world, "a", 1, FREE[30])
    await asyncio.sleep(50.5)
    before = len(world.names)
    crowd(world, "b", 1, FREE[30])
    await asyncio.sleep(3.0)
    assert "b" in world.names[before:]


async def test_who_stands_behind_a_crowd_in_its_line_waits_for_the_account_no_longer_than_others() -> None:
    world = World()
    world.admission.restore({"k api account": {"known": True, "interval": 3.0, "learned_at": NOON}})
    for route in FREE[:20]:
        crowd(world, "a", 25, route)
    crowd(world, "a", 1, FREE[30])
    await asyncio.sleep(50.5)
    before = len(world.names)
    crowd(world, "b", 1, FREE[30])
    await asyncio.sleep(9.0)
    assert "b" in world.names[before:]


async def test_polls_of_one_caller_are_not_starved_by_its_other_calls() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0), queue=QueueRules(max_wait=1e6))
    poll = world.begin("poll", FREE[0], turn=world.admission.arrive(who="a", urgency=BULK))
    for number in range(60):
        crowd(world, "a", 1, FREE[1 + number % 20])
        await asyncio.sleep(1.0)
    assert poll.done()


async def test_what_stops_money_goes_before_what_waits_already() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    for route in FREE[:20]:
        crowd(world, "a", 5, route)
    await asyncio.sleep(10.5)
    crowd(world, "stop", 1, FREE[30], urgency=STOPS_MONEY)
    await asyncio.sleep(1.0)
    assert world.names[-1] == "stop"


async def test_a_wait_is_predicted_by_the_caller_s_share() -> None:
    world = World(queue=QueueRules(max_wait=30.0))
    crowd(world, "a", 100, TWO)
    await asyncio.sleep(0.1)
    await refusal_of(world.admission.turn(world.admission.arrive(30.0, who="a"), TWO, "k"))
    await world.call("b", TWO, turn=world.admission.arrive(30.0, who="b"))
    assert world.now < 5.0


async def test_what_stops_money_is_not_refused_for_what_it_goes_before() -> None:
    world = World(queue=QueueRules(max_wait=60.0, max_waiting=30))
    crowd(world, "a", 31, TWO)
    await asyncio.sleep(0.1)
    await world.call("stop", TWO, turn=world.admission.arrive(who="a", urgency=STOPS_MONEY))
    assert world.now < 5.0


async def test_a_caller_of_little_weight_is_not_refused_its_first_request() -> None:
    world = World(queue=QueueRules(max_wait=60.0))
    crowd(world, "a", 100, TWO)
    await asyncio.sleep(0.1)
    await world.call("light", TWO, turn=world.admission.arrive(who="light", weight=0.01))
    assert world.now < 7.0


async def test_a_wait_for_the_ceiling_is_predicted_by_what_waits_for_it() -> None:
    world = World(global_=Ceiling(rate=1.0, per=1.0, burst=1.0))
    for route in FREE[:10]:
        crowd(world, "a", 100, route)
    await asyncio.sleep(0.5)
    refusal = await refusal_of(world.admission.turn(world.admission.arrive(300.0, who="a"), FREE[0], "k"))
    assert refusal.retry_after == pytest.approx(700.0, abs=2.0)
    assert world.now == 0.5
    await world.call("b", FREE[0], turn=world.admission.arrive(5.0, who="b"))


async def test_a_wait_for_an_account_that_is_shut_is_predicted() -> None:
    world = World()
    await world.call("a", TWO)
    await asyncio.sleep(100.0)
    await meet(world, TWO, refused(headers=(("Retry-After", "1000"),)))
    began = world.now
    refusal = await refusal_of(world.admission.turn(world.admission.arrive(60.0), FREE[0], "k"))
    assert refusal.retry_after == pytest.approx(940.0)
    assert world.now == began


async def test_who_is_next_at_its_deadline_is_not_told_to_wait_for_those_behind_it() -> None:
    world = World(slots=1)
    held = await world.granted(TWO)
    first = world.admission.turn(world.admission.arrive(30.0, who="a"), TWO, "k")
    waiting = asyncio.ensure_future(refusal_of(first))
    await asyncio.sleep(0.0)
    crowd(world, "a", 200, TWO)
    refusal = await waiting
    assert (refusal.retry_after or 0.0) < 20.0
    held.close()


async def test_who_has_work_waiting_for_a_slow_endpoint_saves_up_no_turns_for_others() -> None:
    world = World(global_=Ceiling(rate=2.0, per=1.0, burst=5.0))
    crowd(world, "batch", 500, TEN)
    crowd(world, "b", 2000, FREE[0])
    await asyncio.sleep(600.0)
    crowd(world, "batch", 500, FREE[1])
    await asyncio.sleep(0.1)
    before = len(world.names)
    crowd(world, "c", 1, FREE[0])
    await asyncio.sleep(2.0)
    assert "c" in world.names[before:]
    await asyncio.sleep(10.0)
    assert world.names[before:].count("b") >= 8


async def test_who_waits_elsewhere_is_not_counted_as_before_one_that_comes() -> None:
    world = World(global_=Ceiling(rate=2.0, per=1.0, burst=5.0), known="k", queue=QueueRules(max_wait=1e6))
    for number in range(250):
        await world.call("first", TEN, f"key {number}")
        world.begin("parked", TEN, f"key {number}", turn=world.admission.arrive(who=f"{number}"))
    await asyncio.sleep(20.0)
    await world.call("b", FREE[0], turn=world.admission.arrive(20.0, who="b"))


@pytest.mark.parametrize("scope", ["key", "auto"])
async def test_a_line_of_all_keys_goes_on_at_its_pace_when_keys_are_counted_again(scope: Any) -> None:
    world = World(scope="ip")
    for number in range(20):
        world.begin("old", TWO, f"key {number}")
    await asyncio.sleep(5.0)
    world.admission.reconfigure(replace(world.admission.limits, scope=scope), QueueRules(), 100)
    before = len(world.sent)
    await world.call("new", TWO, "k")
    await asyncio.sleep(10.0)
    assert world.names[before:].count("old") <= 6


async def test_who_provokes_429s_pays_for_the_tokens_that_they_cost() -> None:
    world = World()

    async def provoke() -> None:
        while True:
            turn = world.admission.arrive(math.inf, who="a")
            for _ in range(5):
                with await world.admission.turn(turn, TWO, "k") as ticket:
                    ticket.sent()
                    ticket.answered(refused(b'{"retry_after": 2}'))
            await world.call("a", TWO, turn=turn)

    provoking = asyncio.ensure_future(provoke())
    crowd(world, "b", 200, TWO)
    await asyncio.sleep(1000.0)
    provoking.cancel()
    assert world.names.count("b") >= 2 * world.names.count("a") >= 2


async def test_what_was_taken_with_nobody_waiting_is_not_given_back() -> None:
    world = World()
    tickets = [await world.granted(FREE[number]) for number in range(30)]
    for ticket in tickets:
        ticket.sent()
    crowd(world, "b", 3, FREE[30])
    for ticket in tickets:
        ticket.answered(refused(headers=(("Retry-After", "5"),)))
        ticket.close()
    assert all(ticket._turn.owed is None for ticket in tickets)


async def test_what_stops_money_has_room_of_its_own_in_a_full_line_but_no_end_of_it() -> None:
    world = World(queue=QueueRules(max_waiting=10))
    crowd(world, "a", 11, TWO)
    await asyncio.sleep(0.1)
    crowd(world, "stop", 0, TWO)
    stops = [
        world.begin("stop", TWO, turn=world.admission.arrive(math.inf, who="a", urgency=STOPS_MONEY)) for _ in range(12)
    ]
    ended = await asyncio.gather(*stops, return_exceptions=True)
    assert [isinstance(end, Refusal) and end.code == "queue_full" for end in ended].count(True) == 2


async def test_a_full_line_is_full_for_the_caller_who_filled_it() -> None:
    world = World(queue=QueueRules(max_waiting=10))
    crowd(world, "a", 11, TWO)
    await asyncio.sleep(0.1)
    refusal = await refusal_of(world.admission.turn(world.admission.arrive(math.inf, who="a"), TWO, "k"))
    assert refusal.code == "queue_full"
    await world.call("b", TWO, turn=world.admission.arrive(math.inf, who="b"))


# --- At another's place -----------------------------------------------------------------------------------------------


async def test_a_shared_call_goes_at_the_best_place_of_those_who_wait_for_it_and_counts_for_its_owner() -> None:
    world = World()
    crowd(world, "a", 7, TWO)
    last = world.admission.arrive(math.inf, who="a")
    world.begin("shared", TWO, turn=last)
    await asyncio.sleep(0.1)
    other = world.admission.arrive(math.inf, who="b")
    world.admission.lend(last, other)
    crowd(world, "b", 1, TWO)
    await asyncio.sleep(8.0)
    assert world.names.index("shared") == 2, "of the same share, the older goes first"
    assert world.names.index("b") in (3, 4), "it has had that turn"
    world.admission.take_back(last, other)
    assert world.state == (4, 0)


async def test_one_more_urgent_lends_its_urgency_also_to_its_own() -> None:
    world = World()
    crowd(world, "a", 50, TWO)
    last = world.admission.arrive(math.inf, who="a")
    world.begin("shared", TWO, turn=last)
    await asyncio.sleep(0.1)
    world.admission.lend(last, world.admission.arrive(math.inf, who="a", urgency=0))
    await asyncio.sleep(2.0)
    assert world.names[-1] == "shared"


@pytest.mark.parametrize("when", ["before it waits", "while it waits"])
async def test_a_place_that_is_taken_back_counts_no_more(when: str) -> None:
    world = World()
    crowd(world, "a", 10, TWO)
    last, other = (world.admission.arrive(math.inf, who=who) for who in "ab")
    if when == "before it waits":
        world.admission.lend(last, other)
        world.admission.take_back(last, other)
    task = world.begin("shared", TWO, turn=last)
    await asyncio.sleep(0.1)
    if when == "while it waits":
        world.admission.lend(last, other)
        world.admission.take_back(last, other)
        world.admission.take_back(last, other)
    assert world.state == (10, 0)
    await task
    assert world.names[-1] == "shared"
    world.assert_idle()


@pytest.mark.parametrize("end", ["it leaves", "its time is over", "the end", "its turn comes"])
async def test_whatever_ends_a_wait_ends_it_at_all_of_its_places(end: str) -> None:
    world = World()
    held = await world.granted(TWO)
    turn = world.admission.arrive(30.0, who="a")
    task = world.begin("shared", TWO, turn=turn)
    await asyncio.sleep(0.1)
    for who in "bcd":
        world.admission.lend(turn, world.admission.arrive(30.0, who=who))
    assert len(list(world.admission._queue(TWO, "k"))) == 4
    assert len(world.admission._queue(TWO, "k")) == 1
    assert world.state == (1, 1)
    match end:
        case "it leaves":
            task.cancel()
        case "its time is over":
            await asyncio.sleep(30.0)
        case "the end":
            world.admission.turn_all_away(Refusal(503, "restarting", ""))
        case _:
            held.close()
    await asyncio.wait([task])
    held.close()
    world.assert_idle()
    for origin in world.admission.origins.values():
        assert (len(origin), bool(origin)) == (0, False)


async def test_who_met_a_429_waits_again_at_all_of_its_places() -> None:
    world = World()
    turn, other = (world.admission.arrive(math.inf, who=who) for who in "ab")
    world.admission.lend(turn, other)
    crowd(world, "a", 5, TWO)
    await asyncio.sleep(0.1)
    with await world.admission.turn(turn, TWO, "k") as ticket:
        ticket.sent()
        ticket.answered(refused())
    await world.call("shared", TWO, turn=turn)
    assert world.names.index("shared") <= 2
    world.admission.take_back(turn, other)
    assert turn.lent == {}


async def test_when_a_lender_leaves_another_of_its_kind_lends_its_place() -> None:
    world = World()
    crowd(world, "a", 7, TWO)
    last = world.admission.arrive(math.inf, who="a")
    world.begin("shared", TWO, turn=last)
    await asyncio.sleep(0.1)
    others = [world.admission.arrive(math.inf, who="b") for _ in range(2)]
    for other in others:
        world.admission.lend(last, other)
    world.admission.take_back(last, others[0])
    await asyncio.sleep(6.0)
    assert "shared" in world.names
    world.admission.take_back(last, others[1])
