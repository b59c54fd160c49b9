"""X-Request-ID: the client's own or one that is made, on every answer and in the log; and the record it names."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from conftest import Gateway, Start
from fake_vast import Fault
from raw import OK, RawUpstream, answer

from proxy.policy.messages import CacheStatus, Exchange

pytestmark = pytest.mark.looptime

PATH = "/api/v0/instances/"
RENT = {"client_id": "me", "image": "x", "disk": 10}


def seen_by(gateway: Gateway) -> list[Exchange]:
    """Every exchange from now on."""
    seen: list[Exchange] = []
    gateway.app.server.observers += (seen.append,)
    return seen


@pytest.mark.parametrize("given", ["a", "0af7651916cd43dd8448eb211c80319c", "job=7;try=2", "x" * 128])
async def test_a_sane_id_is_kept_on_the_answer_and_in_the_record(start: Start, given: str) -> None:
    gateway = await start(fast=True)
    seen = seen_by(gateway)
    got = await gateway.get(PATH, headers={"X-Request-ID": given})
    assert got.headers.getall("X-Request-ID") == [given]
    assert seen[0].request_id == given
    assert ("X-Request-ID", given) in gateway.fake.calls()[-1].headers


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "umlaut-ä"])
async def test_any_other_is_replaced(start: Start, given: str) -> None:
    gateway = await start(fast=True)
    got = await gateway.get(PATH, headers={"X-Request-ID": given})
    assert got.headers["X-Request-ID"] not in ("", given)


async def test_a_made_id_is_never_made_twice_and_not_told_to_upstream(start: Start) -> None:
    gateway = await start(fast=True)
    got = [await gateway.get(PATH) for _ in range(20)]
    assert len({one.headers["X-Request-ID"] for one in got}) == 20
    assert "x-request-id" not in {name.lower() for call in gateway.fake.calls() for name, _ in call.headers}


async def test_every_kind_of_answer_has_it(start: Start) -> None:
    gateway = await start(fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/asks/*", kind="status", status=503))
    id_ = {"X-Request-ID": "mine"}
    answers = {
        "miss": await gateway.get("/api/v0/ssh/", headers=id_),
        "hit": await gateway.get("/api/v0/ssh/", headers=id_),
        "write": await gateway.put(f"{PATH}1/", {"label": "x"}, headers=id_),
        "unknown": await gateway.put(gateway.offer(), RENT, headers=id_),
        "refused": await gateway.get(PATH, headers=id_ | {"Cache-Control": "only-if-cached"}, key="other"),
        "ours": await gateway.get("/_proxy/health", headers=id_),
        "no page": await gateway.get("/_proxy/nothing", headers=id_),
    }
    assert answers["hit"].cache.startswith("hit")
    assert answers["refused"].status == 504
    told = {name: got.headers.getall("X-Request-ID") for name, got in answers.items()}
    assert told == {name: ["mine"] for name in answers}


async def test_upstreams_own_does_not_stand_beside_it(start: Start) -> None:
    theirs = answer("Content-Type: application/json", "X-Request-ID: theirs", body=b"{}")
    async with RawUpstream(theirs, OK) as upstream:
        gateway = await start(fake=upstream, limits={"scale": 1e-6, "global": None})
        got = await gateway.get("/api/v0/gpu_names/unique/", headers={"X-Request-ID": "mine"})
        again = await gateway.get("/api/v0/gpu_names/unique/", headers={"X-Request-ID": "again"})
    assert got.headers.getall("X-Request-ID") == ["mine"]
    assert again.cache.startswith("hit")
    assert again.headers.getall("X-Request-ID") == ["again"]


@pytest.mark.parametrize("form", ["text", "json"])
async def test_the_log_names_it(start: Start, form: str) -> None:
    gateway = await start(fast=True, log={"level": "info", "format": form})
    stream = io.StringIO()
    gateway.app.access._stream = stream
    await gateway.get(PATH, headers={"X-Request-ID": "mine"})
    gateway.app.access.flush()
    line = stream.getvalue()
    assert (json.loads(line)["id"] if form == "json" else line.rstrip().rpartition(" ")[2]) in ("mine", "id=mine")


# --- What else the record has -----------------------------------------------------------------------------------------


async def test_each_try_has_its_times(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=7))
    seen = seen_by(gateway)
    await gateway.get("/api/v0/users/current/")
    [exchange] = seen
    first, second = exchange.steps
    assert (first.status, second.status) == (429, 200)
    assert exchange.attempts == 2
    assert first.granted is not None
    assert second.granted is not None
    assert exchange.began <= first.began <= first.granted <= first.ended <= second.began < second.granted
    assert second.ended <= exchange.began + exchange.total
    waited = first.granted - first.began + second.granted - second.began
    assert waited == pytest.approx(exchange.queued)


async def test_who_shares_a_call_has_no_tries_of_its_own(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(kind="slow", delay=1.0))
    seen = seen_by(gateway)
    await asyncio.gather(gateway.get("/api/v0/ssh/"), gateway.get("/api/v0/ssh/"))
    tries: dict[CacheStatus, Any] = {exchange.cache: len(exchange.steps) for exchange in seen}
    assert tries == {CacheStatus.MISS: 1, CacheStatus.COLLAPSED: 0}


async def test_the_record_says_whether_the_route_stands_in_the_table(start: Start) -> None:
    gateway = await start(fast=True)
    seen = seen_by(gateway)
    await gateway.get(PATH)
    await gateway.get("/api/v0/nobody/knows/this/")
    assert [(exchange.listed, exchange.origin) for exchange in seen] == [(True, "api"), (False, "api")]
