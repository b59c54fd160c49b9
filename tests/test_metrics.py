"""What Prometheus is told: names, units, bounded labels, and numbers that are true."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import Gateway, Start
from fake_vast import Fault
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from raw import Wire, request

from proxy.metrics import LIMITS_SHOWN, OTHER, UNLISTED_NAMED

pytestmark = pytest.mark.looptime

SSH = "/api/v0/ssh/"
ME = "/api/v0/users/current/"


async def scrape(gateway: Gateway) -> list[Metric]:
    got = await gateway.get("/_proxy/metrics")
    assert got.status == 200
    assert got.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(got.body.decode()))


def value(families: Iterable[Metric], name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    samples = [sample for family in families for sample in family.samples if sample.name == f"vast_proxy_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def busy(start: Start) -> Gateway:
    """A proxy in which everything has happened once."""
    gateway: Gateway = await start()
    gateway.fake.faults.append(Fault(match=f"GET {SSH}", kind="refuse429", form="json_retry_after", retry_after=5))
    await asyncio.gather(gateway.get(SSH), gateway.get(SSH))
    await gateway.get(SSH)
    await gateway.get("/api/v0/instances/", headers={"Cache-Control": "only-if-cached"})
    await gateway.put(gateway.offer(), {"client_id": "me", "image": "x", "disk": 10})
    return gateway


async def test_requests_are_counted_by_route_status_and_cache(start: Start) -> None:
    families = await scrape(await busy(start))
    on_ssh = {"method": "GET", "route": SSH, "upstream": "api", "status": "200"}
    assert value(families, "requests_total", **on_ssh, cache="miss") == 1
    assert value(families, "requests_total", **on_ssh, cache="collapsed") == 1
    assert value(families, "requests_total", **on_ssh, cache="hit") == 1
    assert value(families, "requests_total", cache="refused", status="504") == 1
    assert value(families, "requests_total", route="/api/v0/asks/{id}/", method="PUT", status="200") == 1
    assert value(families, "calls_saved_total", cache="hit") == value(families, "calls_saved_total") - 1 == 1
    assert value(families, "errors_total", code="not_cached") == 1
    assert value(families, "response_bytes_total") > 0


async def test_waits_calls_429s_and_retries_are_counted(start: Start) -> None:
    families = await scrape(await busy(start))
    of_ssh = {"method": "GET", "route": SSH}
    assert value(families, "upstream_sends_total", **of_ssh) == 2
    assert value(families, "upstream_refusals_total", **of_ssh) == 1
    assert value(families, "upstream_retries_total", **of_ssh) == 1
    assert value(families, "queue_wait_seconds_count", **of_ssh) == 1, "who shares a call does not wait beside it"
    assert 5 <= value(families, "queue_wait_seconds_sum", **of_ssh) < 6
    assert value(families, "queue_wait_seconds_bucket", **of_ssh, le="2.0") == 0
    assert value(families, "queue_wait_seconds_bucket", **of_ssh, le="10.0") == 1
    assert value(families, "upstream_duration_seconds_count", **of_ssh) == 1


async def test_depth_and_tokens_are_those_of_the_moment(start: Start) -> None:
    gateway = await start()
    rent = {"method": "PUT", "route": "/api/v0/asks/{id}/"}
    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            body = {"client_id": "me", "image": "x", "disk": 10}
            tasks.create_task(gateway.put(gateway.offer(number), body))
        await asyncio.sleep(0.5)
        families = await scrape(gateway)
        assert value(families, "waiting_requests", **rent) == value(families, "queue_depth", upstream="api") == 3
        assert value(families, "limit_tokens", **rent) < 1
    families = await scrape(gateway)
    assert value(families, "waiting_requests") == value(families, "queue_depth") == 0
    assert value(families, "limit_interval_seconds", **rent, source="documented") == 4.5
    assert value(families, "limit_capacity_calls", **rent) == 1
    assert 0 < value(families, "ceiling_tokens", upstream="api") <= 5


async def test_names_and_units_are_by_the_conventions(start: Start) -> None:
    """What promtool checks, and base units."""
    families = await scrape(await busy(start))
    ours = [family for family in families if not family.name.startswith("process_")]
    assert len(ours) > 20
    for family in ours:
        assert re.fullmatch(r"vast_proxy_[a-z][a-z_]*[a-z]", family.name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search(
            r"_(counter|gauge|histogram|ms|milliseconds|minutes|kib|count|sum|bucket)(_|$)", family.name
        )
        assert all(sample.name.endswith("_total") for sample in family.samples) == (
            family.type == "counter" or not family.samples
        )
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            assert not sample.name.endswith("_created")
            assert all(re.fullmatch(r"[a-z]+", label) for label in sample.labels)


async def test_neither_a_path_nor_a_key_is_in_it(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.get("/api/v0/instances/4711/?api_key=secretsecret", key="secretsecret")
    await gateway.get("/api/v0/SECRETSECRET/", key="")
    text = (await gateway.get("/_proxy/metrics")).body
    assert b"4711" not in text
    assert b"secretsecret" not in text.lower()


async def test_clients_cannot_make_it_grow_without_end(start: Start) -> None:
    """Words of unlisted paths, methods and keys are theirs to choose."""
    gateway = await start(fast=True)
    numbers = [chr(97 + number // 26) + chr(97 + number % 26) for number in range(UNLISTED_NAMED + 30)]
    for word in numbers:
        await gateway.get(f"/api/v0/of/theirs/{word}/", key=f"key-{word}")
        await gateway("PURGE", f"/api/v0/{word}/", key="")
    families = await scrape(gateway)
    requests = next(family for family in families if family.name == "vast_proxy_requests")
    routes = {(sample.labels["method"], sample.labels["route"]) for sample in requests.samples}
    assert len(routes) <= UNLISTED_NAMED + 2
    assert (OTHER, OTHER) in routes
    assert value(families, "requests_total") == 2 * len(numbers)
    assert len(gateway.app.metrics._known) <= UNLISTED_NAMED + 5
    shown = [family for family in families if family.name.startswith("vast_proxy_limit")]
    assert all(len(family.samples) <= 2 * LIMITS_SHOWN for family in shown)
    await gateway.get("/api/v0/instances/")
    assert value(await scrape(gateway), "requests_total", route="/api/v0/instances/", method="GET") == 1


async def test_two_proxies_in_one_process_do_not_share_numbers(start: Start) -> None:
    first, second = await start(fast=True), await start(fast=True)
    await first.get(ME)
    assert value(await scrape(first), "requests_total") == 1
    assert value(await scrape(second), "requests_total") == 0


async def test_what_was_asked_before_in_the_same_breath_is_counted(start: Start) -> None:
    gateway = await start(fast=True)
    await gateway.get(SSH)
    async with await Wire.to(gateway) as wire:
        await wire.send(request(SSH, "Authorization: Bearer k") + request("/_proxy/metrics"))
        assert (await wire.answer()).status == 200
        scraped = (await wire.answer()).body.decode()
    assert value(text_string_to_metric_families(scraped), "requests_total") == 2


async def test_asking_for_metrics_is_no_request(start: Start) -> None:
    gateway = await start()
    gateway.app.access._stream = io.StringIO()
    await scrape(gateway)
    assert value(await scrape(gateway), "requests_total") == 0


async def test_every_metric_is_explained_and_no_other(start: Start) -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text("utf-8")
    text = (await (await busy(start)).get("/_proxy/metrics")).body.decode()
    there = set(re.findall(r"^# TYPE (vast_proxy_\w+)", text, re.MULTILINE))
    assert set(re.findall(r"`(vast_proxy_\w+)`", page)) == there
