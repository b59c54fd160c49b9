"""The date jumps by an hour, either way: only what has a date takes notice."""

from __future__ import annotations

import asyncio
from email.utils import formatdate

import pytest
from conftest import NOON, Gateway, Start
from fake_vast import Fault
from raw import OK, RawUpstream, answer

pytestmark = pytest.mark.looptime

HOUR = 3600.0
JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
BOTH = pytest.mark.parametrize("jump", [HOUR, 0.0, -HOUR], ids=["forward", "none", "back"])
SLOW = "/api/v0/instances/"
"""Each 20 s, and a fifth of a second for safety."""


async def after(seconds: float, gateway: Gateway, jump: float) -> None:
    await asyncio.sleep(seconds)
    gateway.date.off += jump


@BOTH
async def test_pacing_goes_on(start: Start, jump: float) -> None:
    gateway: Gateway = await start()
    began = gateway.now()
    label = "/api/v0/instances/31000001/"
    asked = [gateway.put(label, {"label": str(number)}) for number in range(6)]
    await asyncio.gather(*asked, after(2.5, gateway, jump))
    sent = [call.at - began for call in gateway.fake.calls("PUT /api/v0/instances/{id}/")]
    assert sent == pytest.approx([1.01 * number for number in range(6)], abs=0.01)
    assert gateway.fake.refused == []


@BOTH
async def test_an_answer_is_fresh_for_exactly_its_time(start: Start, jump: float) -> None:
    gateway: Gateway = await start()
    await gateway.get("/api/v0/ssh/")
    await after(10.0, gateway, jump)
    for seconds in (0.0, 19.8):
        await asyncio.sleep(seconds)
        got = await gateway.get("/api/v0/ssh/")
        assert got.cache.startswith("hit; ")
        assert int(got.headers["Age"]) == pytest.approx(10.0 + seconds, abs=1.0)
    await asyncio.sleep(0.4)
    assert (await gateway.get("/api/v0/ssh/")).cache.startswith("fwd=miss; ")


@BOTH
async def test_a_wait_ends_when_it_would(start: Start, jump: float) -> None:
    gateway: Gateway = await start()
    await gateway.get(f"{SLOW}?x=1")
    began = gateway.now()
    waits = asyncio.create_task(gateway.get(f"{SLOW}?x=2"))
    await after(5.0, gateway, jump)
    assert (await waits).status == 200
    assert gateway.now() - began == pytest.approx(20.2, abs=0.1)


@BOTH
async def test_patience_ends_when_it_would(start: Start, jump: float) -> None:
    gateway: Gateway = await start(queue={"max_wait": 30, "max_wait_plain": 30})
    gateway.fake.faults.append(Fault(kind="refuse429", retry_after=100, form="json_retry_after"))
    began = gateway.now()
    fails = asyncio.create_task(gateway.get(f"{SLOW}?x=1"))
    waits = asyncio.create_task(gateway.get(f"{SLOW}?x=2"))
    await after(5.0, gateway, jump)
    assert {(await fails).status, (await waits).status} == {429}
    assert gateway.now() - began < 31.0


@BOTH
@pytest.mark.parametrize("says", ["Retry-After", "X-RateLimit-Reset"])
@pytest.mark.parametrize("dated", [True, False])
async def test_a_date_of_the_vendors_is_read_by_the_date_beside_it_else_by_ours(
    start: Start, dated: bool, says: str, jump: float
) -> None:
    date, then = [f"Date: {formatdate(NOON, usegmt=True)}"], NOON + 7.0
    if not dated:
        date, then = [], then + jump
    told = {
        "Retry-After": answer(*date, f"Retry-After: {formatdate(then, usegmt=True)}", status="429 No"),
        "X-RateLimit-Reset": answer(
            *date, "X-RateLimit-Limit: 50", "X-RateLimit-Remaining: 0", f"X-RateLimit-Reset: {then}",
            body=b"{}",
        ),
    }[says]  # fmt: skip
    async with RawUpstream(told, OK) as upstream:
        gateway: Gateway = await start(fake=upstream)
        gateway.date.off = jump
        began = gateway.now()
        assert (await gateway.get("/api/v0/users/current")).status == 200
        assert (await gateway.get("/api/v0/users/current?again")).status == 200
        assert gateway.now() - began == pytest.approx(8.0, abs=1.1)


# --- A restart --------------------------------------------------------------------------------------------------------


async def restarted(start: Start, gateway: Gateway, jump: float) -> Gateway:
    await gateway.app.stop(1.0)
    gateway.date.off += jump
    again: Gateway = await start(fake=gateway.fake)
    return again


async def test_a_debt_is_paid_to_its_end_after_a_restart(start: Start) -> None:
    gateway: Gateway = await start()
    await gateway.get(f"{SLOW}?x=1")
    again = await restarted(start, gateway, 0.0)
    await again.get(f"{SLOW}?x=2")
    assert gateway.fake.refused == []
    assert min(gateway.fake.gaps(f"GET {SLOW}")) == pytest.approx(20.2, abs=0.1)


async def test_a_clock_set_back_over_a_restart_neither_lengthens_nor_forgets_a_debt(start: Start) -> None:
    gateway: Gateway = await start()
    await gateway.get(f"{SLOW}?x=1")
    await asyncio.sleep(10.0)
    again = await restarted(start, gateway, -HOUR)
    began = again.now()
    assert (await again.get(f"{SLOW}?x=2")).status == 200
    assert 10.0 <= again.now() - began <= 22.0
    assert gateway.fake.refused == []


async def test_a_clock_set_forward_over_a_restart_looks_like_an_hour_and_costs_one_refusal(start: Start) -> None:
    gateway: Gateway = await start()
    await gateway.get(f"{SLOW}?x=1")
    again = await restarted(start, gateway, HOUR)
    began = again.now()
    assert (await again.get(f"{SLOW}?x=2")).status == 200
    assert again.now() - began < 60.0
    assert 1 <= len(gateway.fake.refused) <= 3


@JUMPS
async def test_a_jump_while_it_runs_is_no_reason_to_forget_at_the_next_restart(start: Start, jump: float) -> None:
    gateway: Gateway = await start()
    await gateway.get(f"{SLOW}?x=1")
    gateway.date.off = jump
    again = await restarted(start, gateway, 0.0)
    began = again.now()
    assert (await again.get(f"{SLOW}?x=2")).status == 200
    assert again.now() - began == pytest.approx(20.2 - (began - gateway.fake.calls(f"GET {SLOW}")[0].at), abs=1.1)
    assert gateway.fake.refused == []
