"""A write that is asked for again because nobody heard of the first: it is done once, and its outcome is told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import aiohttp
import pytest
from conftest import Answer, Gateway, Start
from fake_vast import Behaviour, Fault, Kind, Limit
from raw import RawUpstream, Wire, answer, request

pytestmark = pytest.mark.looptime

ASK = "PUT /api/v0/asks/{id}/"
LAUNCH = "/api/v0/launch_instance/"
WANTED = {"client_id": "me", "image": "pytorch/pytorch", "disk": 20}
LAUNCHED = {"gpu_name": "RTX 4090", "num_gpus": "1", "image": "pytorch/pytorch", "disk": 20}
PLAIN = {"User-Agent": "curly/1"}


async def leaves(gateway: Gateway, after: float, *request: Any, **more: Any) -> None:
    """Ask, and hang up after a while without an answer."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after):
            await gateway(*request, **more)
    await asyncio.sleep(0.01)  # until the proxy has seen it


def contract(answer: Answer) -> int:
    assert answer.status == 200, answer
    return int(answer.json["new_contract"])


@pytest.mark.parametrize("back_after", [0.0, 3.0, 20.0, 59.0])
async def test_who_comes_back_gets_the_outcome_of_the_first_and_rents_once(start: Start, back_after: float) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match=ASK, kind="slow", delay=10))
    offer = gateway.offer()
    await leaves(gateway, 5, "PUT", offer, WANTED)
    await asyncio.sleep(back_after)
    answer = await gateway.put(offer, WANTED)
    assert answer.cache == "fwd=method; collapsed"
    assert [row["id"] for row in (await gateway.get("/api/v1/instances/")).json["instances"]] == [contract(answer)]
    assert (gateway.fake.count("rented"), len(gateway.fake.calls(ASK))) == (1, 1)


async def test_after_the_guard_it_is_sent_again(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED)
    await asyncio.sleep(5 + 60.1)
    await gateway.put(LAUNCH, LAUNCHED)
    assert gateway.fake.count("rented") == 2


@pytest.mark.parametrize("guard", [0, 5])
async def test_the_guard_can_be_shorter_or_off(start: Start, guard: int) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True, writes={"guard": guard})
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED)
    await asyncio.sleep(8)
    await gateway.put(LAUNCH, LAUNCHED)
    assert gateway.fake.count("rented") == (2 if guard == 0 else 1)


async def test_equal_writes_of_clients_that_are_there_are_all_sent(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10, times=None))
    answers = await asyncio.gather(*(gateway.put(LAUNCH, LAUNCHED) for _ in range(10)))
    assert len({contract(answer) for answer in answers}) == 10
    assert gateway.fake.count("rented") == 10


async def test_each_of_several_orphans_is_adopted_by_one_and_no_more(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10, times=3))
    for path in ("/api/v0/ssh/", "/api/v0/secrets/", "/api/v0/users/current"):
        await gateway.get(path)  # so that several calls may be in flight
    await asyncio.gather(*(leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED) for _ in range(3)))
    answers = await asyncio.gather(*(gateway.put(LAUNCH, LAUNCHED) for _ in range(4)))
    assert len({contract(answer) for answer in answers}) == 4
    assert gateway.fake.count("rented") == 4
    assert sorted(answer.cache for answer in answers) == ["fwd=method", *["fwd=method; collapsed"] * 3]


async def test_who_adopts_and_leaves_as_well_leaves_it_to_the_next(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=50))
    for _ in range(3):
        await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    assert gateway.fake.count("rented") == 1


async def test_an_outcome_that_was_heard_is_no_orphan(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    first, second = await gateway.put(LAUNCH, LAUNCHED), await gateway.put(LAUNCH, LAUNCHED)
    assert contract(first) != contract(second)


@pytest.mark.parametrize(
    ("method", "path", "body", "key"),
    [
        ("PUT", LAUNCH, LAUNCHED | {"disk": 21}, "k"),
        ("PUT", LAUNCH, LAUNCHED, "other"),
        ("PUT", LAUNCH + "?x=1", LAUNCHED, "k"),
    ],
)
async def test_another_body_caller_or_target_is_another_write(
    start: Start, method: str, path: str, body: Any, key: str
) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED)
    await gateway(method, path, body, key=key)
    assert gateway.fake.count("rented") == 2


async def test_stop_start_stop_sends_the_last_stop(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    path = "/api/v0/instances/31000001/"
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/{id}/", kind="slow", delay=10))
    await leaves(gateway, 5, "PUT", path, {"state": "stopped"})
    await gateway.put(path, {"state": "running"})
    await gateway.put(path, {"state": "stopped"})
    assert [json.loads(call.body)["state"] for call in gateway.fake.calls("PUT /api/v0/instances/{id}/")] == [
        "stopped",
        "running",
        "stopped",
    ]


async def test_a_write_to_another_thing_leaves_the_orphan_to_be_adopted(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/{id}/", kind="slow", delay=10))
    await leaves(gateway, 5, "PUT", "/api/v0/instances/31000001/", {"state": "stopped"})
    await gateway.put("/api/v0/instances/31000002/", {"state": "running"})
    await gateway.put("/api/v0/instances/31000001/", {"state": "stopped"})
    assert len(gateway.fake.calls("PUT /api/v0/instances/{id}/")) == 2


async def test_what_was_refused_with_a_429_was_not_done_and_is_sent(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="refuse429", delay=10, times=1))
    await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED)
    await asyncio.sleep(6)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    assert gateway.fake.count("rented") == 1


async def test_who_is_out_of_patience_while_it_waits_again_comes_back_to_its_place(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(limits={"*": Limit(8.0)}), queue={"max_wait_plain": 3})
    first = await gateway.put(LAUNCH, LAUNCHED, headers=PLAIN)
    second = await gateway.put(LAUNCH, LAUNCHED, headers=PLAIN)
    while second.status == 429:
        assert second.json["error"] == "still_queued"
        second = await gateway.put(LAUNCH, LAUNCHED, headers=PLAIN)
    assert len({contract(first), contract(second)}) == gateway.fake.count("rented") == 2


# --- An outcome that nobody knows -------------------------------------------------------------------------------------


async def test_an_unknown_outcome_is_told_again_with_what_was_sent_when_and_until_when(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="drop_after"))
    first = await gateway.put(LAUNCH, LAUNCHED)
    assert (first.status, first.json["error"]) == (500, "outcome_unknown")
    dates = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", first.json["msg"])
    assert dates == ["2026-07-25 17:20:00 UTC", "2026-07-25 17:21:00 UTC"]
    assert "PUT /api/v0/launch_instance/" in first.json["msg"]
    assert "check: " in first.json["msg"]
    for wait in (0, 30, 29):
        await asyncio.sleep(wait)
        again = await gateway.put(LAUNCH, LAUNCHED)
        assert (again.status, again.json) == (500, first.json)
    await asyncio.sleep(2)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    assert gateway.fake.count("rented") == 2


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "status_after", "truncate"])
async def test_an_orphan_whose_outcome_is_lost_is_not_sent_again(start: Start, kind: Kind) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match=ASK, kind=kind, status=504, delay=10))
    offer = gateway.offer()
    await leaves(gateway, 5, "PUT", offer, WANTED)
    for wait in (0, 20):
        await asyncio.sleep(wait)
        again = await gateway.put(offer, WANTED)
        assert (again.status, again.json["error"]) == (500, "outcome_unknown")
    assert len(gateway.fake.calls(ASK)) == 1


async def test_writes_that_only_set_a_state_are_never_in_doubt(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/{id}/", kind="status", status=503, times=5))
    path = f"/api/v0/instances/{contract(await gateway.put(gateway.offer(), WANTED))}/"
    assert (await gateway.put(path, {"state": "stopped"})).status == 503
    await asyncio.sleep(2)
    assert (await gateway.put(path, {"state": "stopped"})).status == 200


# --- Idempotency-Key --------------------------------------------------------------------------------------------------


def keyed(key: str = '"one"') -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": key}}


async def test_a_key_makes_one_write_of_many_and_is_not_passed_on(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    answers = await asyncio.gather(*(gateway.put(LAUNCH, LAUNCHED, **keyed()) for _ in range(5)))
    await asyncio.sleep(600)
    answers.append(await gateway.put(LAUNCH, LAUNCHED, **keyed("one")))  # with and without quotes is the same
    assert len({contract(answer) for answer in answers}) == 1
    (call,) = gateway.fake.calls()
    assert "idempotency-key" not in [name.lower() for name, _ in call.headers]


async def test_another_key_is_another_write_and_so_is_none(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    for more in (keyed("a"), keyed("b"), {}, {}):
        await gateway.put(LAUNCH, LAUNCHED, **more)
    assert gateway.fake.count("rented") == 4


@pytest.mark.parametrize(
    ("path", "body"), [(LAUNCH, LAUNCHED | {"disk": 9}), ("/api/v0/instances/31000001/", LAUNCHED)]
)
async def test_a_key_of_another_request_is_refused(start: Start, path: str, body: Any) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    await gateway.put(LAUNCH, LAUNCHED, **keyed())
    refused = await gateway.put(path, body, **keyed())
    assert (refused.status, refused.json["error"]) == (422, "idempotency_conflict")
    assert len(gateway.fake.calls()) == 1


async def test_a_key_belongs_to_one_caller(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    await gateway.put(LAUNCH, LAUNCHED, **keyed())
    assert (await gateway.put(LAUNCH, LAUNCHED | {"disk": 9}, key="other", **keyed())).status == 200


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "a\tb"])
async def test_a_key_that_is_none_is_refused(start: Start, key: str) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    refused = await gateway.put(LAUNCH, LAUNCHED, **keyed(key))
    assert (refused.status, refused.json["error"]) == (400, "bad_request")
    assert "Idempotency-Key" in refused.json["msg"]
    assert gateway.fake.calls() == []


async def test_a_keyed_write_that_was_not_done_is_sent_when_it_comes_again(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True, queue={"max_wait_plain": 3})
    gateway.fake.faults.append(
        Fault(match="PUT /api/v0/launch_instance/", kind="refuse429", form="json_retry_after", retry_after=20)
    )
    more = {"headers": PLAIN | {"Idempotency-Key": "one"}}
    assert (await gateway.put(LAUNCH, LAUNCHED, **more)).json["error"] == "still_queued"
    await asyncio.sleep(30)
    contract(await gateway.put(LAUNCH, LAUNCHED, **more))
    assert gateway.fake.count("rented") == 1


async def test_who_shares_a_key_and_leaves_takes_nobody_down(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    second = asyncio.ensure_future(gateway.put(LAUNCH, LAUNCHED, **keyed()))
    await leaves(gateway, 5, "PUT", LAUNCH, LAUNCHED, **keyed())
    contract(await second)
    assert gateway.fake.count("rented") == 1


async def test_an_unknown_outcome_of_a_keyed_write_stays_so_and_another_key_sends_it(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="drop_after"))
    first = await gateway.put(LAUNCH, LAUNCHED, **keyed())
    assert "another Idempotency-Key" in first.json["msg"]
    await asyncio.sleep(600)
    assert (await gateway.put(LAUNCH, LAUNCHED, **keyed())).json == first.json
    contract(await gateway.put(LAUNCH, LAUNCHED, **keyed("two")))


# --- Who left as the answer came --------------------------------------------------------------------------------------


LAUNCH_BYTES = request(LAUNCH, "Authorization: Bearer k", method="PUT", body=json.dumps(LAUNCHED).encode())


async def test_who_closes_with_its_answer_unread_has_not_heard(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    async with await Wire.to(gateway) as wire:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await wire.send(LAUNCH_BYTES)
        await asyncio.sleep(11)
        assert gateway.fake.count("rented") == 1
    await asyncio.sleep(0.1)
    headers = {"Authorization": "Bearer k", "User-Agent": ""}
    raw = LAUNCH_BYTES.partition(b"\r\n\r\n")[2]
    for collapsed in ("; collapsed", ""):
        again = await gateway("PUT", LAUNCH, headers=headers, data=raw)
        assert again.cache == f"fwd=method{collapsed}"
    assert gateway.fake.count("rented") == 2


async def test_who_ends_the_connection_before_it_has_taken_all_has_not_heard(start: Start) -> None:
    long = answer("Content-Type: application/json", body=b" " * 900_000 + b'{"success": true}')
    async with RawUpstream(long) as upstream:
        gateway: Gateway = await start(fake=upstream, limits={"scale": 1e-6, "global": None})
        async with await Wire.to(gateway) as wire:
            wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
            wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await wire.send(LAUNCH_BYTES)
            await asyncio.sleep(1)
            wire.writer.write_eof()
            await asyncio.sleep(1)
            async with await Wire.to(gateway) as second:
                told = json.loads((await second.ask(LAUNCH_BYTES)).body)
        assert told["error"] == "outcome_unknown"
        assert "answered 200, at more length than is kept" in told["msg"]
        assert len(upstream.seen) == 1


@pytest.mark.parametrize("more", ["", "Connection: close"])
async def test_who_reads_its_answer_and_closes_has_heard(start: Start, more: str) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    for _ in range(2):
        async with await Wire.to(gateway) as wire:
            lines = ["Authorization: Bearer k", *([more] if more else [])]
            got = await wire.ask(request(LAUNCH, *lines, method="PUT", body=json.dumps(LAUNCHED).encode()))
            assert got.status == 200
            wire.writer.close()
            await asyncio.sleep(0.1)
    assert gateway.fake.count("rented") == 2


# --- Over a restart ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [True, False])
async def test_a_write_that_was_cut_off_is_not_sent_by_the_next_process(start: Start, crash: bool) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True, drain={"timeout": 1})
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=50))
    asked = asyncio.ensure_future(gateway.put(LAUNCH, LAUNCHED))
    await asyncio.sleep(5)
    await gateway.restart(crash=crash, pause=3)
    if crash:
        with pytest.raises(aiohttp.ClientError):
            await asked
    else:
        told = await asked
        assert (told.status, told.json["error"]) == (500, "outcome_unknown")
        assert "was stopped before the answer came" in told.json["msg"]
    again = await gateway.put(LAUNCH, LAUNCHED)
    assert (again.status, again.json["error"]) == (500, "outcome_unknown")
    assert "it was sent on 2026-07-25 17:20:00 UTC" in again.json["msg"]
    await asyncio.sleep(61)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    assert gateway.fake.count("rented") == 2


@pytest.mark.parametrize("crash", [True, False])
async def test_what_was_heard_before_a_restart_is_sent_after_it(start: Start, crash: bool) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    await gateway.restart(crash=crash)
    contract(await gateway.put(LAUNCH, LAUNCHED))
    assert gateway.fake.count("rented") == 2


@pytest.mark.parametrize("crash", [True, False])
async def test_a_key_is_remembered_over_a_restart(start: Start, crash: bool) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    contract(await gateway.put(LAUNCH, LAUNCHED, **keyed()))
    for _ in range(2):
        await gateway.restart(crash=crash)
        again = await gateway.put(LAUNCH, LAUNCHED, **keyed())
        assert (again.status, again.json["error"]) == (500, "outcome_unknown")
        assert "answered 200" in again.json["msg"]
    assert gateway.fake.count("rented") == 1


async def test_no_secret_is_in_the_journal(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True)
    body = LAUNCHED | {"env": {"HF_TOKEN": "hush-hush"}}
    await gateway.put(f"{LAUNCH}?api_key=my-secret-key", body, key="my-secret-key", **keyed("my-secret-idempotency"))
    journal = gateway.app.ledger._journal.path
    assert journal is not None
    assert journal.stat().st_mode & 0o077 == 0
    text = journal.read_text()
    assert "sent" in text
    assert "ended" in text
    for secret in ("my-secret", "hush", "instance_api_key", "new_contract"):
        assert secret not in text


# --- The end ----------------------------------------------------------------------------------------------------------


async def test_at_the_end_what_waits_is_told_at_once_and_what_is_upstream_is_finished(start: Start) -> None:
    gateway: Gateway = await start(Behaviour(), limits={"global": None})
    gateway.fake.faults.append(Fault(match="PUT /api/v0/launch_instance/", kind="slow", delay=10))
    asked = [asyncio.ensure_future(gateway.put(LAUNCH, LAUNCHED)) for _ in range(3)]
    await asyncio.sleep(5)
    began = gateway.now()
    await gateway.app.stop()
    first, *others = [await one for one in asked]
    contract(first)
    assert gateway.now() - began == pytest.approx(5, abs=0.2)
    for other in others:
        assert (other.status, other.json["error"], other.headers["Retry-After"]) == (503, "restarting", "5")
    assert gateway.fake.count("rented") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PUT", LAUNCH, 500, "outcome_unknown"),
        ("PUT", "/api/v0/instances/31000001/", 503, "restarting"),
        ("GET", "/api/v1/instances/", 503, "restarting"),
        ("GET", "/api/v0/secrets/", 503, "restarting"),
    ],
)
async def test_who_cannot_be_answered_in_time_is_told_so_and_not_cut_off(
    start: Start, method: str, path: str, status: int, code: str
) -> None:
    gateway: Gateway = await start(Behaviour(), fast=True, drain={"timeout": 3})
    gateway.fake.faults.append(Fault(kind="slow", delay=50))
    asked = asyncio.ensure_future(gateway(method, path, LAUNCHED if method == "PUT" else None))
    await asyncio.sleep(1)
    began = gateway.now()
    await gateway.app.stop()
    told = await asked
    assert (told.status, told.json["error"]) == (status, code)
    assert gateway.now() - began < 4
