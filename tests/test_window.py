"""What /_proxy/ serves and its events say: a snapshot, then what is new, not too often, not to too many."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from conftest import Gateway, Start
from fake_vast import Fault
from raw import request
from test_bounds import stalled

from proxy.policy.messages import CacheStatus, Exchange, Step
from proxy.window import KEPT, LISTENERS, QUIET, STEP, STEPS

pytestmark = pytest.mark.looptime

SSH = "/api/v0/ssh/"
KEY = "0123456789abcdef" * 4
RENT = {"client_id": "me", "image": "x", "disk": 10}


class Stream:
    """One listener: what it was told, and when."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self.comments = 0
        self.parts: dict[str, Any] = {}

    async def raw(self) -> Any:
        """The next event as it comes; None at the end of the stream."""
        while line := await self.answer.content.readline():
            if line.startswith(b"data: "):
                return json.loads(line[6:])
            self.comments += line.startswith(b":")
        return None

    async def event(self) -> Any:
        """The next one, put together with what was told before as the page does it."""
        told = await self.raw()
        if told is not None:
            self.parts |= told["now"]
            self.parts = {name: part for name, part in self.parts.items() if part is not None}
            told["now"] = {name: part for name, part in self.parts.items() if "/" not in name}
            for group in ("lines", "limits"):
                told["now"][group] = [part for name, part in self.parts.items() if name.startswith(f"{group}/")]
        return told


@asynccontextmanager
async def listening(gateway: Gateway) -> AsyncIterator[Stream]:
    async with gateway.session.get(f"{gateway.url}/_proxy/events", read_bufsize=2**22) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        yield Stream(answer)


# --- The page ---------------------------------------------------------------------------------------------------------


async def test_the_page_is_whole_and_takes_nothing_from_elsewhere(start: Start) -> None:
    gateway = await start()
    page = await gateway.get("/_proxy/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    needed = re.findall(r'(?:src|href)="(/_proxy/[^"]+\.\w+)"', page.body.decode())
    assert sorted(needed) == ["/_proxy/page.css", "/_proxy/page.js"]
    files = [page, *[await gateway.get(path) for path in needed]]
    for file in files:
        assert file.status == 200
        rules = file.headers["Content-Security-Policy"]
        assert "default-src 'none'" in rules
        assert "unsafe" not in rules
        assert "http" not in rules
        hosts = set(re.findall(rb"https?://[^\s\"'`$)]+", file.body))
        assert hosts <= {b"http://www.w3.org/2000/svg"}
    assert (await gateway.get("/_proxy")).body == page.body
    assert sum(len(file.body) for file in files) < 40_000


async def test_data_never_becomes_markup(start: Start) -> None:
    gateway = await start()
    script = (await gateway.get("/_proxy/page.js")).body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    page = (await gateway.get("/_proxy/")).body.decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|style=", page)


# --- Events -----------------------------------------------------------------------------------------------------------


async def test_a_listener_gets_a_snapshot_at_once(start: Start) -> None:
    gateway = await start()
    await gateway.get(SSH, headers={"X-Request-ID": "mine"})
    began = gateway.now()
    async with listening(gateway) as stream:
        told = await stream.event()
        assert gateway.now() - began < 0.1
    assert told["now"]["totals"]["requests"] == 1
    [exchange] = told["news"]["exchanges"]
    assert (exchange["id"], exchange["method"], exchange["route"]) == ("mine", "GET", SSH)
    assert (exchange["status"], exchange["cache"], exchange["attempts"]) == (200, "miss", 1)
    assert [slot[1] for slot in told["news"]["slots"]] == [1]


async def test_what_is_new_comes_once_a_second_at_most(start: Start) -> None:
    gateway = await start(fast=True)
    async with listening(gateway) as stream:
        await stream.event()
        began = gateway.now()

        async def poll() -> None:
            for _ in range(50):
                await gateway.get(SSH)
                await asyncio.sleep(0.1)

        polling = asyncio.create_task(poll())
        seen: list[int] = []
        at: list[float] = []
        while len(seen) < 50:
            seen += [exchange["n"] for exchange in (await stream.event())["news"]["exchanges"]]
            at.append(gateway.now() - began)
        await polling
    assert seen == list(range(1, 51)), "each once, in order"
    assert 4 <= len(at) <= 7
    assert all(after - before > 0.9 for before, after in pairwise(at))


async def test_nothing_is_sent_while_nothing_happens_but_a_sign_of_life(start: Start) -> None:
    gateway = await start()
    await gateway.get(SSH)
    async with listening(gateway) as stream:
        with suppress(TimeoutError):
            async with asyncio.timeout(120):  # until the token of that call is back, and its connection closed
                while await stream.event():
                    pass
        began, comments = gateway.now(), stream.comments
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4 * QUIET):
                await stream.event()
        assert gateway.now() - began == pytest.approx(4 * QUIET)
        assert 3 <= stream.comments - comments <= 4


async def test_a_queue_is_seen_to_drain(start: Start) -> None:
    gateway = await start()
    async with listening(gateway) as stream:
        await stream.event()
        renting = [asyncio.create_task(gateway.put(gateway.offer(n), RENT)) for n in range(5)]
        depths: list[int] = []
        while not depths or depths[-1]:
            now = (await stream.event())["now"]
            [line] = now["lines"] or [{"waiting": 0}]
            depths.append(line["waiting"])
            if line["waiting"]:
                assert line["route"] == "PUT /api/v0/asks/{id}/"
                assert len(line["credential"]) == 8
                assert line["newcomer_at"] - now["started"] > 4.5  # a newcomer shares the line by turns
        await asyncio.gather(*renting)
    assert [depth for n, depth in enumerate(depths) if not n or depths[n - 1] != depth] == [4, 3, 2, 1, 0]


async def test_the_last_hundred_exchanges_and_the_last_hour_are_all_that_is_kept(start: Start) -> None:
    gateway = await start()
    window = gateway.app.window
    for number in range(5000):
        at = number * STEP / 10
        exchange = Exchange(str(number), at, "GET", SSH, cache=CacheStatus.HIT, code="not_cached", queued=number % 7)
        window.tried(exchange, Step(at, at, at, 429, 1, refused=True))
        window.observe(exchange)
    assert len(window._recent) == KEPT
    assert len(window._hour) == STEPS
    assert window._hour[-1].shown() == [499, 10, 10, 10, 10, 0, 6]
    window.observe(Exchange(effect="admin"))
    assert window.seen == 5000


async def test_no_key_and_no_path_is_in_an_event(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.get(f"/api/v0/instances/4711/?api_key={KEY}", key=KEY)
    async with listening(gateway) as stream:
        text = json.dumps(await stream.event())
    assert KEY not in text
    assert "4711" not in text


async def test_there_is_an_end_to_the_number_of_listeners_and_a_place_is_free_again(start: Start) -> None:
    gateway = await start()
    streams = [listening(gateway) for _ in range(LISTENERS)]
    for stream in streams:
        await (await stream.__aenter__()).event()
    got = await gateway.get("/_proxy/events")
    assert (got.status, got.json["error"]) == (503, "too_many_listeners")
    await streams[0].__aexit__(None, None, None)
    await asyncio.sleep(2)
    async with listening(gateway) as another:
        assert await another.event()
    for stream in streams[1:]:
        await stream.__aexit__(None, None, None)
    await asyncio.sleep(2)
    assert not gateway.app.window._listeners


async def test_head_opens_no_stream(start: Start) -> None:
    gateway = await start()
    got = await gateway("HEAD", "/_proxy/events")
    assert (got.status, got.body) == (200, b"")
    assert not gateway.app.window._listeners


async def test_nothing_is_kept_for_a_listener_that_takes_nothing_and_it_is_let_go(start: Start) -> None:
    gateway = await start(fast=True, server={"send_timeout": "30s"})
    async with stalled(gateway, request("/_proxy/events")):
        assert gateway.app.window._listeners
        for number in range(3000):
            await gateway.get(f"/api/v0/instances/{number}/", headers={"X-Request-ID": "x" * 100})
            await asyncio.sleep(0.1)
            held = [c.transport.get_write_buffer_size() for c in gateway.app.server.connections if c.transport]
            assert sum(held) < 300_000
            if not gateway.app.window._listeners:
                break
    assert not gateway.app.window._listeners


async def test_the_end_of_the_proxy_does_not_wait_for_listeners(start: Start) -> None:
    gateway = await start()
    async with listening(gateway) as stream:
        await stream.event()
        began = gateway.now()
        await gateway.app.stop()
        assert gateway.now() - began < 1.0
        assert await stream.event() is None
        assert stream.answer.content.at_eof()


async def test_errors_and_429s_are_told(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=f"GET {SSH}", kind="refuse429", form="json_retry_after", retry_after=5))
    await gateway.get(SSH)
    await gateway.get("/api/v0/instances/", headers={"Cache-Control": "only-if-cached"})
    async with listening(gateway) as stream:
        told = await stream.event()
    assert told["now"]["totals"]["our_errors"] == {"not_cached": 1}
    assert [exchange.get("code") for exchange in told["news"]["exchanges"]] == [None, "not_cached"]
    assert sum(slot[3] for slot in told["news"]["slots"]) == 1
    assert sum(slot[4] for slot in told["news"]["slots"]) == 1
    [limit] = [limit for limit in told["now"]["limits"] if limit["route"] == f"GET {SSH}"]
    assert limit["correction"] or limit["source"] == "documented"


async def test_of_what_stays_as_it_is_nothing_is_sent_again(start: Start) -> None:
    """One refusal a second must not bring along all that is known of twenty keys."""
    gateway = await start(fast=True)
    for number in range(20):
        await gateway.get(SSH, key=f"{number:064x}")
    async with listening(gateway) as stream:
        first = await stream.raw()
        assert len([name for name in first["now"] if name.startswith("limits/")]) == 20
        with suppress(TimeoutError):
            async with asyncio.timeout(60):  # until its connections are closed, and every token is back
                while await stream.raw():
                    pass
        await gateway.get(SSH, headers={"Cache-Control": "only-if-cached"}, key="another")
        told = await stream.raw()
    assert set(told["now"]) <= {"totals", "clients"}
    assert len(json.dumps(told)) < 1000


async def test_a_line_that_is_no_more_is_taken_away(start: Start) -> None:
    gateway = await start()
    async with listening(gateway) as stream:
        await stream.raw()
        await asyncio.gather(*(gateway.put(gateway.offer(n), RENT) for n in range(2)))
        told: list[Any] = []
        while not told or told[-1] is not None:
            told += [part for name, part in (await stream.raw())["now"].items() if name.startswith("lines/")]
    assert told[0]["waiting"] == 1


async def test_accounts_without_a_limit_are_left_out(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.get(SSH)
    assert "account" in {limit["route"] for limit in (await gateway.get("/_proxy/status")).json["limits"]}
    async with listening(gateway) as stream:
        told = await stream.event()
    assert {limit["route"] for limit in told["now"]["limits"]} == {f"GET {SSH}"}


async def test_another_process_is_known_by_its_name_however_quick_it_was_there(start: Start) -> None:
    gateway = await start()
    names: list[str] = []
    for _ in range(2):
        async with listening(gateway) as stream:
            names.append((await stream.event())["now"]["instance"])
        await gateway.restart()
    assert len(set(names)) == 2


async def test_who_still_waits_is_in_the_last_hour_and_a_429_as_soon_as_it_came(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match="PUT *", kind="refuse429", form="json_retry_after", retry_after=300))
    renting = asyncio.create_task(gateway.put(gateway.offer(), RENT))
    await asyncio.sleep(100)
    async with listening(gateway) as stream:
        told = await stream.event()
    renting.cancel()
    [line] = told["now"]["lines"]
    assert told["news"]["wall"] - line["oldest_at"] == pytest.approx(100, abs=2)
    assert line["held_by"]
    slots = told["news"]["slots"]
    assert [slot[1] for slot in slots] == [0] * len(slots), "it has not ended"
    assert [slot[3] for slot in slots if slot[3]] == [1]
    assert len(slots) >= 9
    assert 85 <= slots[-1][6] <= 101
    await asyncio.gather(renting, return_exceptions=True)


async def test_an_error_of_the_clients_own_is_no_fault(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.get(SSH, headers={"Cache-Control": "only-if-cached"})
    gateway.fake.faults.append(Fault(match="PUT *", kind="status", status=503))
    await gateway.put(gateway.offer(), RENT)
    async with listening(gateway) as stream:
        told = await stream.event()
    assert [(one["code"], one["kind"]) for one in told["news"]["exchanges"]] == [
        ("not_cached", "client"),
        ("outcome_unknown", "fault"),
    ]
    assert told["now"]["totals"]["error_kinds"] == {"not_cached": "client", "outcome_unknown": "fault"}
    assert [sum(slot[at] for slot in told["news"]["slots"]) for at in (4, 5)] == [2, 1]
