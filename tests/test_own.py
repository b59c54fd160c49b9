"""What callers are told of their own work: nobody else's, with the right numbers, and for a key or token only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import Gateway, Start
from fake_vast import Behaviour

from proxy.policy.members import hashed

pytestmark = pytest.mark.looptime

RENT = {"client_id": "me", "image": "x", "disk": 10}
MINE, ANOTHER = "1" * 64, "2" * 64
ADA, BOB = ("vp_" + name * 43 for name in "ab")
NOT_LOCAL = {"X-Forwarded-For": "198.51.100.7"}
PUT = "/_proxy/plan?method=PUT&path=/api/v0/asks/1/"


def renting(gateway: Gateway, numbers: range, **more: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(gateway.put(gateway.offer(number), RENT, **more)) for number in numbers]


async def done(tasks: list[asyncio.Task[Any]]) -> None:
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * len(tasks)


async def test_callers_see_what_of_their_own_waits_from_wherever_they_ask(start: Start) -> None:
    gateway = await start()
    mine, others = renting(gateway, range(3), key=MINE), renting(gateway, range(3, 8), key=ANOTHER)
    await asyncio.sleep(1)
    told = await gateway.get("/_proxy/waiting", key=MINE, headers=NOT_LOCAL)
    [line] = told.json["lines"]
    assert (line["route"], line["waiting"], line["of"]) == ("PUT /api/v0/asks/{id}/", 2, 2)
    assert line["next_in"] == pytest.approx(3.5, abs=0.2)
    assert line["one_more_in"] == pytest.approx(3.5 + 2 * 4.5, abs=0.4)
    assert {limit["credential"] for limit in told.json["limits"]} <= {told.json["caller"], "*"}
    assert "PUT /api/v0/asks/{id}/" in {limit["route"] for limit in told.json["limits"]}
    assert MINE.encode() not in told.body
    assert (await gateway.get("/_proxy/waiting", key="3" * 64)).json["lines"] == []
    await done(mine + others)
    assert (await gateway.get("/_proxy/waiting", key=MINE)).json["lines"] == []


@pytest.mark.parametrize("path", ["/_proxy/waiting", PUT])
async def test_who_brings_no_key_is_told_nothing_not_even_on_this_machine(start: Start, path: str) -> None:
    gateway = await start()
    told = await gateway.get(path, key="")
    assert (told.status, told.json["error"]) == (401, "key_needed")


async def test_in_team_mode_members_see_their_own_and_nobody_comes_in_with_a_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(MINE)
    (tmp_path / "key").chmod(0o600)
    members = {"ada": {"token": hashed(ADA)}, "bob": {"token": hashed(BOB), "weight": 2}}
    gateway = await start(team={"keys": {"default": {"file": str(tmp_path / "key")}}, "members": members})
    tasks = renting(gateway, range(4), key=ADA) + renting(gateway, range(4, 6), key=BOB)
    await asyncio.sleep(1)
    ada, bob = [(await gateway.get("/_proxy/waiting", key=token)).json for token in (ADA, BOB)]
    assert (ada["caller"], ada["lines"][0]["waiting"], ada["lines"][0]["of"]) == ("ada", 3, 5)
    assert (bob["caller"], bob["lines"][0]["waiting"], bob["lines"][0]["of"]) == ("bob", 2, 5)
    for key, code in ((MINE, "token_unknown"), ("", "token_needed")):
        told = await gateway.get("/_proxy/waiting", key=key)
        assert (told.status, told.json["error"]) == (401, code)
    assert {call["caller"]: call["waiting"] for call in gateway.app._status()["lines"][0]["callers"]} == {
        "ada": 3,
        "bob": 2,
    }
    await done(tasks)


@pytest.mark.parametrize("waiting", [0, 3])
async def test_a_plan_comes_true(start: Start, waiting: int) -> None:
    gateway = await start(Behaviour(), limits={"margin": 0.0})
    before = renting(gateway, range(waiting), key=MINE)
    await asyncio.sleep(0.5)
    began = gateway.now()
    plan = (await gateway.get(f"{PUT}&calls=5", key=MINE)).json
    assert (plan["route"], plan["calls"], plan["interval"]) == ("PUT /api/v0/asks/{id}/", 5, 4.5)
    assert plan["source"] == "documented"
    ended: list[float] = []

    async def rent(number: int) -> None:
        assert (await gateway.put(gateway.offer(number), RENT, key=MINE)).status == 200
        ended.append(gateway.now() - began)

    await asyncio.gather(*(rent(number) for number in range(waiting, waiting + 5)))
    await done(before)
    assert min(ended) == pytest.approx(plan["first_in"], abs=0.3)
    assert max(ended) == pytest.approx(plan["last_in"], abs=0.3)
    assert len(gateway.fake.calls("PUT /api/v0/asks/*")) == waiting + 5, "a plan is not a call"


@pytest.mark.parametrize("calls", ["0", "-1", "1e3", "9999999", "%D9%A3", ""])
async def test_a_number_of_calls_that_is_none_is_refused(start: Start, calls: str) -> None:
    gateway = await start()
    told = await gateway.get(f"{PUT}&calls={calls}", key=MINE)
    assert (told.status, told.json["error"]) == (400, "bad_request")
    assert "a whole number from 1 to 100000" in told.json["msg"]


@pytest.mark.parametrize("query", ["", "?path=api/v0/asks/1/", "?path=/x&method=P%20UT", "?path=/%C3%A9"])
async def test_a_plan_of_what_is_not_clear_is_refused_with_an_example(start: Start, query: str) -> None:
    gateway = await start()
    told = await gateway.get(f"/_proxy/plan{query}", key=MINE)
    assert (told.status, told.json["error"]) == (400, "bad_request")
    assert "/_proxy/plan?method=PUT" in told.json["msg"]


async def test_a_plan_may_name_the_endpoint_as_tables_and_log_do(start: Start) -> None:
    gateway = await start()
    by_name = await gateway.get("/_proxy/plan?method=PUT&path=/api/v0/asks/{id}/", key=MINE)
    assert by_name.json == (await gateway.get(PUT, key=MINE)).json
    assert (by_name.json["interval"], by_name.json["source"]) == (4.5, "documented")


async def test_what_a_member_may_not_do_is_not_planned(start: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(MINE)
    (tmp_path / "key").chmod(0o600)
    members = {"ada": {"token": hashed(ADA), "effects": ["read"]}}
    gateway = await start(team={"keys": {"default": {"file": str(tmp_path / "key")}}, "members": members})
    told = await gateway.get(PUT, key=ADA)
    assert (told.status, told.json["error"]) == (403, "not_permitted")


@pytest.mark.parametrize("path", ["/api/v0/asks/17x/", "/api/v0/asks/{id}/"])
async def test_a_path_that_only_looks_like_a_known_endpoint_changes_nothing_of_its_limit(
    start: Start, path: str
) -> None:
    gateway = await start()
    tasks = renting(gateway, range(3), key=MINE)
    await asyncio.sleep(0.1)
    strange = asyncio.create_task(gateway.put(path, RENT, key=MINE))
    await asyncio.sleep(0.1)
    limits = {limit["route"]: limit for limit in gateway.app._status()["limits"]}
    assert (limits["PUT /api/v0/asks/{id}/"]["interval"], limits["PUT /api/v0/asks/{id}/"]["source"]) == (
        4.5,
        "documented",
    )
    await done(tasks)
    await strange
    assert gateway.fake.refused == []
