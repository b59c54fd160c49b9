"""What is counted: each call and each 429 as it comes, whoever asked for it, and each request when it ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from conftest import Gateway, Start
from fake_vast import Fault
from raw import Wire, request
from test_metrics import scrape, value
from test_told import leave, watched

pytestmark = pytest.mark.looptime

SSH = "/api/v0/ssh/"
RENT = {"client_id": "me", "image": "x", "disk": 10}
QUERY = {"limit": 5}


def refused(match: str = "*", times: int = 1, after: float = 60.0) -> Fault:
    return Fault(match=match, kind="refuse429", form="json_retry_after", retry_after=after, times=times)


def counted(gateway: Gateway) -> tuple[int, int, int]:
    """Requests, sends, 429s."""
    gateway.app.server.tell()
    totals = gateway.app.admin.counted.shown()
    return totals["requests"], totals["sent_upstream"], totals["refused_upstream"]


async def test_a_429_is_counted_when_it_comes_and_not_when_its_request_ends(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(refused("PUT *", after=600))
    renting = asyncio.create_task(gateway.put(gateway.offer(), RENT))
    await asyncio.sleep(5)
    assert counted(gateway) == (0, 1, 1)
    of_rent = {"method": "PUT", "route": "/api/v0/asks/{id}/", "upstream": "api"}
    families = await scrape(gateway)
    assert value(families, "upstream_sends_total", **of_rent) == 1
    assert value(families, "upstream_refusals_total", **of_rent) == 1
    assert value(families, "upstream_retries_total", **of_rent) == 0
    assert value(families, "requests_total") == 0
    assert (await renting).status == 200
    assert counted(gateway) == (1, 2, 1)
    assert value(await scrape(gateway), "upstream_retries_total", **of_rent) == 1


async def test_of_whatever_becomes_of_requests_no_call_is_lost_or_counted_twice(start: Start) -> None:
    """Shared, refused, retried, left before and after it was sent, out of patience: as many as upstream has seen."""
    gateway = await start(queue={"max_wait_plain": 40.0})
    seen = watched(gateway)
    gateway.fake.faults += [
        refused("GET /api/v0/ssh/", times=2, after=20),
        Fault(match="GET /api/v0/instances/", kind="status", status=503, times=1),
        refused("PUT *", after=30),
        Fault(match="GET /api/v0/users/current/", kind="slow", delay=9.0),
    ]
    await asyncio.gather(
        *(gateway.get(SSH) for _ in range(3)),
        gateway.get("/api/v0/instances/"),
        leave(asyncio.create_task(gateway.get("/api/v0/users/current/")), 4.0),
        leave(asyncio.create_task(gateway.get(SSH)), 3.0),
        leave(asyncio.create_task(gateway.put(gateway.offer(1), RENT)), 15.0),
        *(gateway.put(gateway.offer(number), RENT, headers={"User-Agent": "plain"}) for number in range(2, 12)),
        gateway.get(SSH, headers={"Cache-Control": "only-if-cached"}, key="other"),
    )
    await asyncio.sleep(60)
    sent = len(gateway.fake.calls())
    assert counted(gateway) == (len(seen), sent, sum(call.status == 429 for call in gateway.fake.calls()))
    assert sum(one.attempts for one in seen) == sent
    assert {"still_queued", "not_cached", ""} <= {one.code for one in seen}
    assert sum(one.left for one in seen) == 3
    families, requests = await scrape(gateway), len(seen)
    assert value(families, "upstream_sends_total") == sent
    assert value(families, "requests_total") == requests - 1, "but for that of the metrics themselves"
    retries = sum(max(0, one.attempts - 1) for one in seen)
    assert value(families, "upstream_retries_total") == retries > 0


async def test_calls_that_end_with_the_proxy_are_counted(start: Start) -> None:
    gateway = await start(fast=True)
    gateway.fake.faults.append(Fault(match="PUT *", kind="slow", delay=20.0))
    renting = asyncio.create_task(gateway.put(gateway.offer(), RENT))
    await asyncio.sleep(1.0)
    await gateway.app.stop(2.0)
    await asyncio.gather(renting, return_exceptions=True)
    assert gateway.app.admin.counted.sends == 1


# --- Times of who came later ------------------------------------------------------------------------------------------


async def test_who_joins_a_call_has_waited_since_then_and_not_longer(start: Start) -> None:
    gateway = await start()
    seen = watched(gateway)
    gateway.fake.faults += [refused(f"GET {SSH}", after=50), Fault(match=f"GET {SSH}", kind="slow", delay=4.0)]
    leader = asyncio.create_task(gateway.get(SSH))
    await asyncio.sleep(40)
    in_line = asyncio.create_task(gateway.get(SSH))
    await asyncio.sleep(12)
    at_the_api = asyncio.create_task(gateway.get(SSH))
    answers = await asyncio.gather(leader, in_line, at_the_api)
    first, second, third = sorted(seen, key=lambda one: one.began)
    assert first.queued == pytest.approx(50, abs=2)
    assert second.queued == pytest.approx(first.began + 50 - second.began, abs=2)
    assert third.queued == 0
    assert third.upstream == pytest.approx(third.total, abs=0.1)
    for one in seen:
        assert one.queued + one.upstream <= one.total + 0.01
    timing = [answer.headers["Server-Timing"].split("dur=")[1].split(",")[0] for answer in answers]
    assert [float(told) / 1000 for told in timing] == pytest.approx(
        [one.queued for one in (first, second, third)], abs=0.1
    )


async def test_who_shared_a_call_in_vain_and_then_made_its_own_has_waited_for_both(start: Start) -> None:
    gateway = await start(queue={"max_wait": "60s"})
    gateway.fake.faults.append(refused(f"GET {SSH}", times=2, after=40))
    seen = watched(gateway)
    first = asyncio.create_task(gateway.get(SSH))
    await asyncio.sleep(30)
    second = asyncio.create_task(gateway.get(SSH))
    assert (await first).json["error"] == "wait_too_long"
    assert (await second).status == 200
    assert [one.total for one in seen] == [pytest.approx(40, abs=2), pytest.approx(50, abs=3)]
    assert [one.attempts for one in seen] == [2, 1]
    for one in seen:
        assert one.queued + one.upstream == pytest.approx(one.total, abs=0.5)


async def test_the_call_of_who_left_has_its_times(start: Start) -> None:
    gateway = await start()
    seen = watched(gateway)
    gateway.fake.faults.append(Fault(match="PUT *", kind="slow", delay=20.0))
    await leave(asyncio.create_task(gateway.put(gateway.offer(), RENT)), 5.0)
    await asyncio.sleep(30)
    assert [one.upstream for one in seen] == [pytest.approx(20, abs=0.1)]


# --- Saved, and other sums --------------------------------------------------------------------------------------------


async def test_a_stale_answer_after_calls_in_vain_has_saved_none(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.post("/api/v0/bundles/", QUERY)
    await asyncio.sleep(100)
    gateway.fake.faults.append(Fault(match="*", kind="status", status=503, times=None))
    leader, follower = await asyncio.gather(*(gateway.post("/api/v0/bundles/", QUERY) for _ in range(2)))
    assert "fwd=stale" in leader.cache
    assert "hit" in follower.cache, "it made no call of its own"
    totals = (await gateway.get("/_proxy/status")).json["totals"]
    assert totals["sent_upstream"] > 1
    assert (totals["cache"]["stale"], totals["calls_saved"]) == (2, 1)
    families = await scrape(gateway)
    assert value(families, "calls_saved_total", cache="stale") == value(families, "calls_saved_total") == 1
    gateway.app.server.tell()
    assert sum(slot.saved for slot in gateway.app.window._hour) == 1


async def test_of_an_error_to_head_no_byte_of_a_body_is_counted(start: Start) -> None:
    gateway = await start(fast=True)
    seen = watched(gateway)
    async with await Wire.to(gateway) as wire:
        await wire.send(request(SSH, "Authorization: Bearer k", "Cache-Control: only-if-cached", method="HEAD"))
        assert (await wire.answer(to="HEAD")).status == 504
    await asyncio.sleep(0.1)
    assert [(one.code, one.bytes_out) for one in seen] == [("not_cached", 0)]


async def test_whatever_may_come_is_there_before_so_that_it_has_an_increase(start: Start) -> None:
    gateway = await start()
    text = (await gateway.get("/_proxy/metrics")).body.decode()
    for code in ("outcome_unknown", "internal_error", "wait_too_long", "not_cached"):
        assert f'vast_proxy_errors_total{{code="{code}"}} 0.0' in text
    gateway.fake.faults.append(Fault(match="*", kind="slow", delay=3.0))
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT)) for number in range(2)]
    await asyncio.sleep(1)
    families = await scrape(gateway)
    names = {sample.name for family in families for sample in family.samples if sample.labels.get("method") == "PUT"}
    assert {f"vast_proxy_upstream_{what}_total" for what in ("sends", "refusals", "retries")} <= names
    assert value(families, "upstream_sends_total", method="PUT") == 0
    await asyncio.gather(*renting)


# --- Lists that are cut -----------------------------------------------------------------------------------------------


async def crowded(start: Start, keys: int) -> tuple[Gateway, list[asyncio.Task[Any]]]:
    """With each of so many keys somebody waits in a line of its own; with one more two do, and for longer."""
    gateway = await start(limits={"global": None})
    renting = []

    def rent(number: int, key: int) -> None:
        body = RENT | {"n": number}
        renting.append(asyncio.create_task(gateway.put(gateway.offer(number % 5), body, key=f"{key:064x}")))

    gateway.fake.faults.append(Fault(match="*", kind="slow", delay=500.0, times=None))
    for number in range(3):
        rent(number, keys)
    await asyncio.sleep(100)
    for key in range(keys):
        for number in range(2):
            rent(number, key)
    await asyncio.sleep(1)
    return gateway, renting


async def test_sums_are_of_all_lines_also_of_those_that_are_not_shown(start: Start) -> None:
    gateway, renting = await crowded(start, 249)
    families = await scrape(gateway)
    waiting = gateway.app.admission.waiting
    assert waiting >= 251
    assert value(families, "waiting_requests", method="PUT") == waiting
    assert value(families, "queue_depth", upstream="api") == waiting
    assert value(families, "oldest_wait_seconds", upstream="api") == pytest.approx(101, abs=1)
    assert value(families, "oldest_wait_seconds", upstream="serverless") == 0
    told = (await gateway.get("/_proxy/status")).json
    assert (len(told["lines"]), told["line_count"]) == (200, 250)
    assert told["cut"] == ["lines", "limits"]
    assert told["lines"][0]["oldest_for"] == pytest.approx(101, abs=1), "who has waited longest comes first"
    assert sum(limit["route"] == "account" for limit in told["limits"]) == 200
    whole = (await gateway.get("/_proxy/status?all")).json
    assert (len(whole["lines"]), whole["cut"]) == (250, [])
    assert sum(limit["route"] == "account" for limit in whole["limits"]) == 250
    for task in renting:
        task.cancel()
    await asyncio.gather(*renting, return_exceptions=True)


async def test_where_somebody_waits_and_what_was_corrected_comes_first(start: Start) -> None:
    gateway = await start()
    own = {"Cache-Control": "no-store"}
    for _ in range(3):
        await gateway.get("/api/v0/users/current/", headers=own)
    await gateway.get(SSH, headers=own)
    gateway.fake.faults.append(refused(f"GET {SSH}", after=1.5))
    await gateway.get(SSH, headers=own)
    await asyncio.sleep(3)
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT)) for number in range(3)]
    await asyncio.sleep(0.5)
    routes = [limit["route"] for limit in (await gateway.get("/_proxy/status")).json["limits"]]
    assert routes[:3] == ["PUT /api/v0/asks/{id}/", f"GET {SSH}", "GET /api/v0/users/current"]
    await asyncio.gather(*renting)


async def test_the_status_is_written_without_indentation(start: Start) -> None:
    """The library's quick way; the other one held up everybody for a quarter of a second."""
    gateway = await start()
    body = (await gateway.get("/_proxy/status")).body
    assert json.loads(body)
    assert body.count(b"\n") == 1
