"""Whatever callers do, each of them stands where it belongs, nobody is forgotten, and in the end nothing is left.

Random worlds with cancels, 429s, places lent and taken back, deadlines and reloads; the seed is in the test's name.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from test_admission import FREE, TEN, TWO, World, refused

from proxy.admission import Origin, Turn, _Queue
from proxy.policy.errors import Refusal
from proxy.policy.limiting import Ceiling, LimitRules
from proxy.policy.messages import Response
from proxy.policy.queueing import TURNS_LATER, Flow, Order, QueueRules

pytestmark = pytest.mark.looptime

WORLDS = int(os.environ.get("VAST_TEST_WORLDS", "40"))
WEIGHTS = dict(zip("abcdefghij", [0.001, 1000, 1, 1, 1, 2, 0.5, 3, 1, 1], strict=True))
URGENCIES = [0, 1, 3, 3, 3, 3, 3, 5, 7]


# --- What must hold at every moment -----------------------------------------------------------------------------------


def each_stands_where_it_belongs(world: World) -> None:
    admission = world.admission
    standing: dict[int, list[Flow[Any]]] = defaultdict(list)
    needing: dict[int, Counter[str]] = defaultdict(Counter)
    for line in admission._waiting_lines():
        origin = admission.origins[line.key[1]]
        orders: list[Order[Any]] = [origin, *(admission._gates[id(bucket)] for bucket in line.buckets)]
        assert all(line in admission._gates[id(bucket)].lines for bucket in line.buckets)
        assert len(line) == sum(not place.lent for place in line)
        assert line.waits == len({place.wait for place in line})
        for flow in line.flows.values():
            assert flow.head is not None
            assert not flow.head.left
            assert any(flow.order is order for order in orders), "it stands nowhere, or with strangers"
            assert flow.step == flow.urgent
            standing[id(flow.order)].append(flow)
            for place in flow:
                assert place in place.wait.places
                for order in orders:
                    needing[id(order)][place.who] += 1
    every: list[Order[Any]] = [*admission._gates.values(), *admission.origins.values()]
    for order in every:
        its_accounts_are_right(order, standing[id(order)], needing[id(order)])


def its_accounts_are_right(order: Order[Any], flows: list[Flow[Any]], needing: Counter[str]) -> None:
    assert len(order) == len(flows)
    assert order._needing == needing
    assert set(order._shares._behind) <= set(needing)
    assert set(order._callers) == {flow.who for flow in flows}
    for who, caller in order._callers.items():
        mine = [flow for flow in flows if flow.who == who]
        assert caller.flows == sum(caller.steps) == len(mine)
        _, _, _, first, entry = caller.entries[0]
        assert entry == first.entry, "the first is void"
        [rank] = [item for item in order._ranks if item[3] is caller and item[4] == caller.version]
        step = min(flow.step for flow in mine)
        assert rank[0] == pytest.approx(order._shares.start(who) + TURNS_LATER * step)
    assert len(order._ranks) <= 128 + 4 * len(order._callers)


def nobody_is_forgotten(world: World) -> None:
    """Once the loop has come to rest: who may go has gone, or a timer is about to see to it."""
    now = world.clock.now()
    for line in world.admission._waiting_lines():
        origin = world.admission.origins[line.key[1]]
        if line.may_go(now - 1e-3) and origin.delay() <= 0:
            assert is_woken_by(origin, now + 2e-3), f"{line.key} may go"
        assert origin.in_flight or is_woken_by(origin, float("inf")), f"{line.key} waits for nothing"


def is_woken_by(origin: Origin, when: float) -> bool:
    return origin.timer is not None and not origin.timer.cancelled() and origin.timer.when() <= when


# --- What they do -----------------------------------------------------------------------------------------------------


class Crowd:
    """Callers who come, go, meet 429s, and lend each other their places."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.world = World(
            slots=chance.choice([1, 2, 100]),
            known="" if chance.random() < 0.3 else "k l m *",
            scope=chance.choice(["auto", "auto", "key", "ip"]),
            global_=chance.choice([None, Ceiling(1.0, 1.0, 1.0), Ceiling(3.0, 1.0, 4.0)]),
            queue=QueueRules(max_wait=1e5, max_waiting=chance.choice([5, 50, 1000])),
        )
        self.weights = dict(WEIGHTS)
        self.turns: list[Turn] = []
        self.storm = self.world.clock.now() + chance.uniform(5, 60)

    def arrive(self) -> Turn:
        chance = self.chance
        who = chance.choice("abcdefghij")
        if chance.random() < 0.05:
            self.weights[who] = chance.choice([0.001, 1, 2, 1000])
        waits = chance.choice([1e5, chance.uniform(1, 90), max(0.0, self.storm - self.world.clock.now())])
        return self.world.admission.arrive(waits, who=who, weight=self.weights[who], urgency=chance.choice(URGENCIES))

    async def asks(self) -> None:
        chance, admission = self.chance, self.world.admission
        await asyncio.sleep(chance.choice([0.0, 0.0, chance.uniform(0, 60)]))
        turn, route, key = self.arrive(), chance.choice([TWO, TEN, *FREE[:4]]), chance.choice("klm")
        self.turns.append(turn)
        for _ in range(4):
            soon = None if chance.random() < 0.8 else self.world.clock.now() + chance.uniform(1, 30)
            with await admission.turn(turn, route, key, deadline=soon) as ticket:
                if chance.random() < 0.05:
                    return
                await asyncio.sleep(chance.choice([0.0, 0.01, 0.2]))
                ticket.sent()
                await asyncio.sleep(chance.choice([0.0, 0.1, 0.5, 5.0]))
                if not ticket.answered(self.answer()):
                    return

    def answer(self) -> Response:
        chance = self.chance
        if chance.random() > 0.3:
            return Response(chance.choice([200, 200, 200, 503]), ())
        headers = (("Retry-After", str(chance.choice([0, 1, 30]))),) if chance.random() < 0.4 else ()
        return refused(chance.choice([b"API requests too frequent", b"endpoint threshold=3.0*1.0"]), headers)

    async def lends(self) -> None:
        chance, admission = self.chance, self.world.admission
        await asyncio.sleep(chance.uniform(0, 80))
        if not self.turns:
            return
        turn, other = chance.choice(self.turns), self.arrive()
        try:
            admission.lend(turn, other)
            await asyncio.sleep(chance.choice([0.0, 0.0, 0.3, chance.uniform(0, 40)]))
        finally:
            admission.take_back(turn, other)

    async def run(self) -> list[object]:
        chance, loop = self.chance, asyncio.get_running_loop()
        tasks = []
        for _ in range(chance.choice([20, 60, 200])):
            tasks.append(asyncio.ensure_future(self.asks()))
            tasks += [asyncio.ensure_future(self.lends()) for _ in range(chance.choice([0, 0, 1, 3]))]
        for task in tasks:
            if chance.random() < 0.3:
                loop.call_later(chance.choice([0.0, 2.0, 4.0, 10.0, chance.uniform(0, 100)]), task.cancel)
        reloads = chance.random() < 0.4
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.37 + chance.random())
            each_stands_where_it_belongs(self.world)
            for _ in range(4):
                await asyncio.sleep(0)
            nobody_is_forgotten(self.world)
            if reloads and chance.random() < 0.02:
                self.reload()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    def reload(self) -> None:
        chance, admission = self.chance, self.world.admission
        limits = LimitRules(
            global_=chance.choice([None, Ceiling(2.0, 1.0, 1.0)]),
            margin=0.0,
            scope=chance.choice(["auto", "ip", "key"]),
            scale=chance.choice([1, 2]),
        )
        admission.reconfigure(limits, admission.rules, chance.choice([1, 50]))
        each_stands_where_it_belongs(self.world)


@pytest.mark.parametrize("seed", range(WORLDS))
async def test_each_stands_where_it_belongs_and_nothing_is_left(seed: int) -> None:
    crowd = Crowd(seed)
    ended = await crowd.run()
    assert all(isinstance(end, None | Refusal | asyncio.CancelledError) for end in ended)
    crowd.world.assert_idle()
    assert all(not turn.lent and turn.wait is None for turn in crowd.turns)
    admission = crowd.world.admission
    assert all(bucket.pending == 0 for bucket in admission._buckets.values())
    for origin in admission.origins.values():
        assert (len(origin), bool(origin), origin.in_flight, origin.timed) == (0, False, 0, [])
    lines: list[_Queue] = list(admission._queues.values())
    assert all(not line and not line.waits for line in lines)
