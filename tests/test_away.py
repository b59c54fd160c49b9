"""Upstream is away: few calls reach it, stale answers are served, the rest is told so, and then nobody stampedes."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Any

import pytest
from conftest import Answer, Gateway, Start
from fake_vast import Behaviour, Fault

pytestmark = pytest.mark.looptime

SEARCH = ("POST", "/api/v0/bundles/", {"limit": 3})
PATHS = ["/api/v1/instances/", "/api/v0/users/current", "/api/v0/ssh/", "/api/v0/invoices"]


async def every(gateway: Gateway, seconds: float, until: float, *request: Any, **more: Any) -> list[Answer]:
    """Ask again and again, as a script of somebody does."""
    answers = []
    while gateway.now() < until:
        answers.append(await gateway(*request, **more))
        await asyncio.sleep(seconds)
    return answers


@pytest.mark.parametrize("how", ["unreachable", "503", "drop"])
async def test_ten_minutes_without_upstream(start: Start, how: str) -> None:
    gateway: Gateway = await start(Behaviour(), cache={"search_ttl": 5})
    fake, began = gateway.fake, gateway.now()
    assert (await gateway(*SEARCH)).status == 200
    await asyncio.sleep(10)
    port = int(fake.url.rpartition(":")[2])
    if how == "unreachable":
        await fake.stop()
    else:
        kind = "status" if how == "503" else "drop_before"
        fake.faults.append(Fault(kind=kind, status=503, times=None))  # type: ignore[arg-type]
    before = len(fake.log)
    end = began + 610
    asking = [every(gateway, 1.0, end, "GET", path, key=key) for path in PATHS for key in "abcde"]
    asking.append(every(gateway, 1.0, end, *SEARCH))
    asking.append(every(gateway, 7.0, end, "PUT", "/api/v0/instances/5/", {"state": "stopped"}))
    answers = await asyncio.gather(*asking)

    assert len(fake.log) - before <= 80  # of 12,800 that were asked for
    *others, searches, writes = answers
    assert {answer.status for answer in searches} == {200}
    assert all("detail=stale" in answer.cache for answer in searches)
    for told in [answer for some in (*others, writes) for answer in some]:
        assert told.status in (503, 504)
        if "in a row" in (told.json["msg"] if told.body else ""):
            assert 1 <= int(told.headers["Retry-After"]) <= 30

    # It comes back: one call, and the others only after its answer, at the pace of the limits.
    if how == "unreachable":
        await fake.start(port=port)
    fake.faults.clear()
    back, before = gateway.now(), len(fake.log)
    end = back + 60
    answers = await asyncio.gather(
        *(every(gateway, 1.0, end, "GET", path, key=key) for path in PATHS for key in "abcde")
    )
    assert all(some[-1].status == 200 for some in answers)
    assert not fake.refused
    seconds = Counter(int(call.at - back) for call in fake.log[before:])
    assert max(seconds.values()) <= 7  # the ceiling: 2 a second, after a burst of 5
    first, second = fake.log[before : before + 2]
    assert second.at >= first.at


async def test_a_short_absence_is_ridden_out_by_all(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(kind="status", status=503, times=None))
    asking = asyncio.gather(*(gateway.get(path, key=key) for path in PATHS for key in "ab"))
    await asyncio.sleep(6)
    gateway.fake.faults.clear()
    assert {answer.status for answer in await asking} == {200}


async def test_one_endpoint_that_fails_leaves_the_others_alone(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="GET /api/v0/invoices*", kind="status", status=503, times=None))
    assert (await gateway.get("/api/v0/invoices")).status == 503
    began = gateway.now()
    for path in PATHS[:3]:
        assert (await gateway.get(path)).status == 200
    assert gateway.now() - began < 0.5
    assert gateway.app._status()["away"] == {"api": ["GET /api/v0/invoices"], "serverless": []}


async def test_what_is_sent_again_is_bounded_for_all_together(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True, breaker={"failures": 1000})
    gateway.fake.faults.append(Fault(kind="status", status=503, times=None))
    answers = await asyncio.gather(*(gateway.get("/api/v0/ssh/", key=f"key-{number}") for number in range(50)))
    assert {answer.status for answer in answers} == {503}
    assert 50 + 10 <= len(gateway.fake.log) <= 50 + 12


@pytest.mark.parametrize("path", ["/api/v0/ssh/"])
async def test_a_probe_whose_client_leaves_makes_room_for_the_next(start: Start, path: str) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(kind="status", status=503, times=5))
    assert (await gateway.get(path)).status == 503
    await asyncio.sleep(1.1)
    gateway.fake.faults.append(Fault(kind="slow", delay=20))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await gateway.get(path, headers={"Cache-Control": "no-store"})
    began = gateway.now()
    assert (await gateway.get(path, key="other")).status == 200
    assert gateway.now() - began < 1


async def test_a_line_stands_still_while_upstream_is_away_and_goes_on_when_it_is_back(start: Start) -> None:
    gateway: Gateway = await start(Behaviour())
    asked = [asyncio.ensure_future(gateway.put(gateway.offer(number), {"client_id": "me"})) for number in range(20)]
    await asyncio.sleep(20)
    gateway.fake.faults.append(Fault(kind="status", status=503, times=None))
    polling = asyncio.ensure_future(every(gateway, 1.0, gateway.now() + 60, "GET", PATHS[1]))
    await asyncio.sleep(60)
    gateway.fake.faults.clear()
    statuses = Counter([(await one).status for one in asked])
    await polling
    assert statuses[200] >= 14
    assert statuses[200] + statuses[500] == 20  # those that were sent and answered 503 may have been done
    assert not gateway.fake.refused


async def test_one_caller_whose_calls_are_dropped_does_not_keep_another_from_renting(start: Start) -> None:
    gateway: Gateway = await start(Behaviour())
    gateway.fake.faults.append(Fault(kind="drop_before", times=None, key="banned"))
    polling = [
        asyncio.ensure_future(every(gateway, 1.0, gateway.now() + 300, "GET", path, key="banned")) for path in PATHS
    ]
    await asyncio.sleep(30)
    for number in range(5):
        assert (await gateway.put(gateway.offer(number), {"client_id": "me"}, key="good")).status == 200
        await asyncio.sleep(30)
    await asyncio.gather(*polling)


async def test_a_line_for_an_endpoint_that_is_away_holds_up_no_other(start: Start) -> None:
    """Also of a key that is new, of which one call at a time is in flight."""
    gateway: Gateway = await start(Behaviour(), upstreams={"max_connections": 2})
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/{id}/", kind="status", status=503, times=None))
    stop = {"state": "stopped"}
    waiting = [asyncio.ensure_future(gateway.put(f"/api/v0/instances/{n}/", stop)) for n in range(10)]
    await asyncio.sleep(60)
    for path in PATHS:
        began = gateway.now()
        assert (await gateway.get(path)).status == 200
        assert gateway.now() - began < 5
    assert gateway.app.admission.in_flight == 0
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)


async def test_who_comes_while_it_is_away_is_told_so_soon_also_where_every_step_takes_its_time(start: Start) -> None:
    gateway: Gateway = await start(fast=True)
    await gateway.fake.stop()
    clock, steps = gateway.app.clock, itertools.count()
    now = clock.now
    clock.now = lambda: now() + next(steps) * 1e-6  # as a real one does
    for _ in range(6):
        began = gateway.now()
        told = await gateway.get("/api/v0/ssh/", headers={"User-Agent": "vastai-cli/1"})
        assert told.json["error"] == "upstream_unreachable"
        assert gateway.now() - began < 30.0


async def test_those_who_wait_for_it_beside_the_line_are_counted(start: Start) -> None:
    gateway: Gateway = await start(fast=True)
    await gateway.fake.stop()
    waiting = asyncio.create_task(gateway.get("/api/v0/ssh/"))
    await asyncio.sleep(0.1)
    assert gateway.app._status()["pausing"] == {"api": 1, "serverless": 0}
    await waiting
    assert gateway.app._status()["pausing"] == {"api": 0, "serverless": 0}
