"""What is told of a request whose client did not wait for its end: once, and what came of the call."""

from __future__ import annotations

import asyncio
import io

import pytest
from conftest import Gateway, Start
from fake_vast import Fault

from proxy.admin import AccessLog
from proxy.policy.messages import Exchange

pytestmark = pytest.mark.looptime

RENT = {"client_id": "me", "image": "x", "disk": 10}


def watched(gateway: Gateway) -> list[Exchange]:
    seen: list[Exchange] = []
    gateway.app.server.observers += (seen.append,)
    return seen


async def leave(task: asyncio.Task[object], after: float) -> None:
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_rental_whose_client_left_is_told_of_once_when_its_answer_has_come(start: Start) -> None:
    gateway = await start(fast=True)
    seen = watched(gateway)
    gateway.fake.faults.append(Fault(match="PUT *", kind="slow", delay=20.0))
    await leave(asyncio.create_task(gateway.put(gateway.offer(), RENT)), 5.0)
    await asyncio.sleep(5.0)
    assert seen == []
    await asyncio.sleep(15.0)
    [told] = seen
    assert (told.left, told.status, told.attempts, told.upstream_status) == (True, 0, 1, 200)
    assert told.total == pytest.approx(5.0, abs=0.2), "as long as the client was there"
    out = io.StringIO()
    log = AccessLog("info", "text", lambda: 0.0, out)
    log.observe(told)
    log.flush()
    assert " status=0 " in out.getvalue()
    assert " attempts=1 left upstream_status=200 id=" in out.getvalue()


async def test_who_led_a_shared_call_and_left_is_told_of_with_its_tries(start: Start) -> None:
    gateway = await start(fast=True)
    seen = watched(gateway)
    gateway.fake.faults.append(Fault(match="GET *", kind="slow", delay=20.0))
    leader = asyncio.create_task(gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "leader"}))
    await asyncio.sleep(1.0)
    follower = asyncio.create_task(gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "follower"}))
    await leave(leader, 1.0)
    assert (await follower).status == 200
    await asyncio.sleep(0.1)
    assert {(one.request_id, one.left, one.attempts) for one in seen} == {("leader", True, 1), ("follower", False, 0)}


async def test_who_left_before_it_was_sent_is_told_of_at_once_and_with_no_try(start: Start) -> None:
    gateway = await start()
    seen = watched(gateway)
    await gateway.put(gateway.offer(0), RENT)
    await leave(asyncio.create_task(gateway.put(gateway.offer(1), RENT)), 1.0)
    await asyncio.sleep(0.1)
    assert [(one.left, one.attempts) for one in seen] == [(False, 1), (True, 0)]


async def test_what_was_refused_before_patience_ended_is_counted(start: Start) -> None:
    gateway = await start(queue={"max_wait_plain": 3.0})
    seen = watched(gateway)
    gateway.fake.faults.append(Fault(match="PUT *", kind="refuse429", form="json_retry_after", retry_after=60))
    told = await gateway.put(gateway.offer(), RENT, headers={"User-Agent": "unknown"})
    assert told.json["error"] == "still_queued"
    await asyncio.sleep(0.1)
    [one] = seen
    assert (one.code, one.attempts, one.refusals, one.upstream_status) == ("still_queued", 1, 1, 429)


@pytest.mark.parametrize("grace", [60.0, 1.0])
async def test_nothing_is_left_untold_at_the_end_of_the_proxy(start: Start, grace: float) -> None:
    gateway = await start(fast=True)
    seen = watched(gateway)
    gateway.fake.faults.append(Fault(match="PUT *", kind="slow", delay=20.0))
    await leave(asyncio.create_task(gateway.put(gateway.offer(), RENT)), 5.0)
    await gateway.app.stop(grace)
    [told] = seen
    assert (told.left, told.attempts, told.upstream_status) == (True, 1, 200 if grace > 15 else 0)
    assert gateway.app.server._going_on == {}
