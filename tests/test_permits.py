"""Permits out are permits in: however callers end, at whatever stage, no slot, token, line, gate or timer is left."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import looptime
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_admission import FIVE, FREE, INVITE, TEN, TWO, World, refused

from proxy.policy.errors import Refusal
from proxy.policy.limiting import Ceiling, LimitRules
from proxy.policy.messages import Response
from proxy.policy.queueing import QueueRules

ROUTES = [TWO, TWO, TEN, FIVE, INVITE, FREE[0], FREE[1]]
WHO = "kkl*"
"""`l` is not known yet, so it starts slowly; `*` stands for whoever has no line yet."""
COUNTS = Ceiling(rate=1.0, per=1e9, burst=1000.0)
"""A ceiling that forgets nothing: its level is the number of calls sent."""
CEILINGS = st.sampled_from([None, Ceiling(2.0, 1.0, 2.0), Ceiling(0.5, 1.0, 1.0), COUNTS, COUNTS])

STAGES = ["granted", "sent", "answered", "streams"]
ENDS = ["200", "429", "429, come back in 7 s", "quota", "503", "lost", "not sent"]


@dataclass(frozen=True)
class Way:
    """One caller: what it asks, when it comes, how long it waits, and how each of its attempts ends."""

    who: str
    route: int
    comes: float
    waits: float
    leaves: float
    """It is cancelled after so many seconds, wherever it is."""
    stops: tuple[str, str]
    """The stage at which its last attempt stops, and by what: an exception, a cancellation, or nothing."""
    ends: tuple[str, ...]


WAYS = st.builds(
    Way,
    who=st.sampled_from(WHO),
    route=st.integers(0, len(ROUTES) - 1),
    comes=st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.3, 1.0, 2.0, 5.0]),
    waits=st.sampled_from([0.5, 2.0, 4.0, 30.0, *[1000.0] * 4]),
    leaves=st.sampled_from([0.0, 0.05, 0.55, 2.0, 4.0, *[1e6] * 8]),
    stops=st.tuples(st.sampled_from(STAGES), st.sampled_from(["", "raises", "cancelled", "cancelled"])),
    ends=st.lists(st.sampled_from(ENDS), min_size=1, max_size=3).map(tuple),
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.0, 7.0]),
        st.sampled_from([1, 2, 100]),
        st.sampled_from([1.0, 1.0, 3.0]),
        st.sampled_from(["auto", "auto", "key", "ip"]),
    ),
    max_size=3,
)


class Callers:
    """Those who come and go, and how many calls they have sent."""

    def __init__(self, ceiling: Ceiling | None, slots: int) -> None:
        self.ceiling = ceiling
        self.world = World(slots=slots, known="k", global_=ceiling)
        self.calls = 0

    async def once(self, way: Way, number: int) -> None:
        await asyncio.sleep(way.comes)
        admission = self.world.admission
        turn = admission.arrive(way.waits)
        who = f"new {number}" if way.who == "*" else way.who
        for attempt, end in enumerate(way.ends):
            stage, how = way.stops if attempt == len(way.ends) - 1 else ("", "")
            with await admission.turn(turn, ROUTES[way.route], who) as ticket:
                await self.stop("granted", stage, how)
                await asyncio.sleep(0.05)
                if end == "not sent":
                    return
                ticket.sent()
                self.calls += 1
                await self.stop("sent", stage, how)
                await asyncio.sleep(0.5)
                if end == "lost":
                    continue
                again = ticket.answered(ANSWERS[end])
                await self.stop("answered", stage, how)
                if not again:
                    if stage == "streams":
                        await asyncio.sleep(3.0)
                        await self.stop("streams", stage, how)
                    return

    async def stop(self, here: str, stage: str, how: str) -> None:
        if here == stage and how == "raises":
            event(f"raises, {here}")
            raise KeyError
        if here == stage and how == "cancelled":
            event(f"is cancelled, {here}")
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    async def change(self, at: float, slots: int, scale: float, scope: Any) -> None:
        await asyncio.sleep(at)
        rules = LimitRules(global_=self.ceiling, margin=0.0, scale=scale, scope=scope)
        self.world.admission.reconfigure(rules, QueueRules(), slots, [])

    async def run(self, ways: list[Way], changes: list[tuple[float, int, float, str]]) -> None:
        loop = asyncio.get_running_loop()
        tasks = []
        for number, way in enumerate(ways):
            task = asyncio.ensure_future(self.once(way, number))
            if way.leaves < 1e6:
                loop.call_later(way.comes + way.leaves, task.cancel)
            tasks.append(task)
        ended = await asyncio.gather(*tasks, *(self.change(*one) for one in changes), return_exceptions=True)
        for end in ended:
            assert isinstance(end, None | Refusal | KeyError | asyncio.CancelledError)
            event(f"ended by {end.code if isinstance(end, Refusal) else type(end).__name__}")
        self.assert_permits_are_in()
        if len(ways) > 6 and changes:
            event("many, and other settings between")
        # And it goes on.
        for route in ROUTES:
            for who in ("k", "l", "another"):
                await asyncio.wait_for(self.world.call("after", route, who), 10_000.0)
        self.assert_permits_are_in(after=len(ROUTES) * 3)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def assert_permits_are_in(self, after: int = 0) -> None:
        self.world.assert_idle()
        admission = self.world.admission
        assert all(bucket.pending == 0 for bucket in admission._buckets.values())
        for account in admission._accounts.values():
            assert (account.bucket.pending, account.in_flight, account.waiting) == (0, 0, 0)
        for origin in admission.origins.values():
            assert (origin.waiting, origin.in_flight, len(origin), origin.callers, origin.timer) == (0, 0, 0, 0, None)
        assert self.world.clock.pending == 0
        if self.ceiling is COUNTS:
            limiter = admission.origins["api"].limiter
            assert limiter is not None
            assert limiter._level == pytest.approx(self.calls + after, abs=0.01)


ANSWERS = {
    "200": Response(200, ()),
    "429": refused(),
    "429, come back in 7 s": refused(headers=(("Retry-After", "7"),)),
    "quota": refused(b'{"success": false, "error": "search_quota_exceeded"}'),
    "503": Response(503, ()),
}

RUNS = int(os.environ.get("PERMIT_RUNS", "0"))


@given(st.lists(WAYS, min_size=3, max_size=20), CHANGES, CEILINGS, st.sampled_from([1, 2, 100]))
@settings(max_examples=RUNS or 250, deadline=None, derandomize=not RUNS, database=None, print_blob=True)
def test_however_callers_end_every_permit_comes_back(
    ways: list[Way], changes: list[tuple[float, int, float, str]], ceiling: Ceiling | None, slots: int
) -> None:
    loop = looptime.new_event_loop(start=0.0)
    complaints: list[Any] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def run() -> None:
        await Callers(ceiling, slots).run(ways, changes)

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    assert complaints == []
