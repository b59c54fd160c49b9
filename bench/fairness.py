"""How long each caller waits when one of them asks for much: simulated, seeded, with and without fair shares.

    python bench/fairness.py

On virtual time, with the proxy's own admission and the interval of `PUT /asks/{id}/`. Prints the table of
docs/limits.md; a test compares the two.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import looptime

from proxy.admission import Admission
from proxy.clock import Clock
from proxy.policy.limiting import LimitRules
from proxy.policy.messages import Request, Response
from proxy.policy.queueing import USUAL, QueueRules, urgency
from proxy.settings import load

SEED = 1
ROUTES = load(None, {}, {}).routes
CREATE = ("PUT", "/api/v0/asks/1/")


def arrivals(chance: random.Random) -> list[tuple[float, str, float, tuple[str, str]]]:
    """When, who, weight, what: a batch job of 500 creates, two people, and a scheduler with twice the weight."""
    asked = [(0.0, "batch", 1.0, CREATE)] * 500
    asked += [(chance.uniform(0, 1800), "ada", 1.0, CREATE) for _ in range(20)]
    asked += [(chance.uniform(0, 1800), "bob", 1.0, CREATE) for _ in range(5)]
    asked += [(600.0, "scheduler", 2.0, CREATE)] * 60
    return sorted(asked, key=lambda one: one[0])


async def simulate(who_of: Callable[[str], str]) -> dict[str, list[float]]:
    """Seconds that each request of each caller waited."""
    loop = asyncio.get_running_loop()
    admission = Admission(Clock(loop.time), LimitRules(), QueueRules())
    admission.restore({"k api account": {"known": True}})
    waits: dict[str, list[float]] = defaultdict(list)

    async def one(at: float, name: str, weight: float, what: tuple[str, str]) -> None:
        await asyncio.sleep(at)
        who, route = who_of(name), ROUTES.match(*what)
        step = urgency(route, Request(*what, ())) if who == name else USUAL
        turn = admission.arrive(math.inf, who=who, weight=weight if who == name else 1.0, urgency=step)
        with await admission.turn(turn, route, "k") as ticket:
            ticket.sent()
            waits[name].append(loop.time() - at)
            ticket.answered(Response(200, ()))

    await asyncio.gather(*(one(*asked) for asked in arrivals(random.Random(SEED))))
    return waits


def run(who_of: Callable[[str], str]) -> dict[str, list[float]]:
    loop = looptime.new_event_loop()
    try:
        return loop.run_until_complete(simulate(who_of))
    finally:
        loop.close()


def table() -> str:
    """The result as Markdown."""
    fair, unfair = run(lambda name: name), run(lambda name: "everybody")
    lines = [
        "| Caller | Requests | Median wait, shared fairly | Longest | Median wait, first come first served | Longest |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in ("batch", "scheduler", "ada", "bob"):
        cells = [f"{value:.0f} s" for waits in (fair[name], unfair[name]) for value in (median(waits), max(waits))]
        lines.append(f"| {name} | {len(fair[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
