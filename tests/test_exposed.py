"""Safe to expose, on real sockets: names, other sites, our own pages, addresses behind proxies, guesses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import Answer, Gateway, Start

from proxy.policy.members import Secret, hashed
from proxy.slowing import FIRST, LONGEST

pytestmark = pytest.mark.looptime

SSH = "/api/v0/ssh/"
TOKEN = "vp_" + "a" * 43
NOT_LOCAL = {"X-Forwarded-For": "198.51.100.7"}
"""From a proxy on this machine, for somebody else."""


async def team(start: Start, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Gateway:
    monkeypatch.setattr("proxy.settings.read_key", lambda rules, environ: Secret("the-key-of-the-account"))
    given = {"keys": {"default": {"env": "A"}}, "members": {"ada": {"token": hashed(TOKEN)}}}
    gateway: Gateway = await start(fast=True, team=given, **more)
    return gateway


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:8080", "localhost", "vast-proxy:8080", "proxy.example:8080"])
@pytest.mark.parametrize("path", [SSH, "/_proxy/status"])
async def test_a_name_of_ours_is_served(start: Start, path: str, host: str) -> None:
    gateway = await start(fast=True, hosts=["proxy.example"])
    assert (await gateway.get(path, headers={"Host": host})).status == 200


@pytest.mark.parametrize("path", [SSH, "/_proxy/status", "/_proxy/health"])
async def test_another_name_is_misdirected_and_nothing_is_sent(start: Start, path: str) -> None:
    gateway = await start(fast=True, hosts=["proxy.example"])
    told = await gateway.get(path, headers={"Host": "evil.example:8080"})
    assert (told.status, told.json["error"]) == (421, "wrong_host")
    assert gateway.fake.calls() == []


# --- Other sites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
async def test_in_team_mode_a_page_of_another_site_gets_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    gateway = await team(start, monkeypatch)
    for path in (SSH, "/_proxy/status"):
        told = await gateway.get(path, key=TOKEN, headers=headers)
        assert (told.status, told.json["error"]) == (403, "cross_site")
    own = {"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}
    assert (await gateway.get(SSH, key=TOKEN, headers=own)).status == 200
    assert len(gateway.fake.calls()) == 1


async def test_without_a_team_what_a_browser_says_changes_nothing(start: Start) -> None:
    gateway = await start(fast=True)
    assert (await gateway.get(SSH, headers={"Origin": "http://a.example"})).status == 200


# --- Our own pages ----------------------------------------------------------------------------------------------------


async def test_our_pages_are_for_this_machine_and_for_whoever_has_the_token(start: Start) -> None:
    gateway = await start(admin={"token": hashed(TOKEN)})
    assert (await gateway.get("/_proxy/status", key="anything")).status == 200
    told = await gateway.get("/_proxy/status", key="", headers=NOT_LOCAL)
    assert (told.status, told.json["error"]) == (403, "admin_only")
    told = await gateway.get("/_proxy/status", key="wrong", headers=NOT_LOCAL)
    assert (told.status, told.json["error"]) == (401, "token_unknown")
    assert (await gateway.get("/_proxy/status", key=TOKEN, headers=NOT_LOCAL)).status == 200
    assert (await gateway.get("/_proxy/ready", key="", headers=NOT_LOCAL)).status == 200


async def test_a_token_of_a_member_opens_none_of_them(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await team(start, monkeypatch)
    told = await gateway.get("/_proxy/status", key=TOKEN, headers=NOT_LOCAL)
    assert (told.status, told.json["error"]) == (403, "admin_only")


# --- Addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trusted", "expected"), [(["127.0.0.0/8"], "198.51.100.7"), ([], "127.0.0.1")])
async def test_the_address_is_the_one_that_a_trusted_proxy_tells_and_no_other(
    start: Start, monkeypatch: pytest.MonkeyPatch, trusted: list[str], expected: str
) -> None:
    gateway = await start(fast=True, trusted_proxies=trusted)
    seen: list[str] = []
    understand = gateway.app.pipeline.understand

    def spy(*given: Any, **more: Any) -> Any:
        known = understand(*given, **more)
        seen.append(known.caller.who)
        return known

    monkeypatch.setattr(gateway.app.pipeline, "understand", spy)
    await gateway.get(SSH, headers=NOT_LOCAL)
    await gateway.get(SSH, headers={"X-Forwarded-For": "203.0.113.1, 198.51.100.7"})
    assert [who.split(" ")[1] for who in seen] == [expected, expected]
    await gateway.get(SSH, headers=NOT_LOCAL)
    assert len(seen) == 2


async def test_the_same_bytes_from_two_addresses_are_two_who_wait(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(fast=True)
    seen = []
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
        monkeypatch.setattr(gateway.app.server, "_address", lambda _, address=address: address)
        await gateway.get(SSH)
        seen.append([known.caller.who.split(" ")[1] for known in gateway.app.server._known.values()])
    assert seen == [["192.0.2.1"], ["192.0.2.1", "192.0.2.2"], ["192.0.2.1", "192.0.2.2"]]


# --- Guesses ----------------------------------------------------------------------------------------------------------


async def took(gateway: Gateway, path: str = SSH, **more: Any) -> tuple[float, Answer]:
    began = gateway.now()
    answer = await gateway.get(path, **more)
    return gateway.now() - began, answer


async def test_wrong_tokens_are_answered_slower_and_slower_and_right_ones_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await team(start, monkeypatch)
    pauses = [(await took(gateway, key="wrong"))[0] for _ in range(8)]
    assert pauses == pytest.approx([min(LONGEST, FIRST * 2**n) for n in range(8)], abs=0.1)
    assert (await took(gateway, key=TOKEN))[0] < 0.1
    assert (await took(gateway, key=""))[0] < 0.1, "who brings none guesses nothing"
    await asyncio.sleep(601)
    assert (await took(gateway, key="wrong"))[0] < 2 * FIRST


async def test_guesses_from_one_address_do_not_slow_another(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await team(start, monkeypatch, trusted_proxies=["127.0.0.1"])
    for _ in range(5):
        await gateway.get(SSH, key="wrong", headers=NOT_LOCAL)
    pause, _ = await took(gateway, key="wrong", headers={"X-Forwarded-For": "203.0.113.9"})
    assert pause < 2 * FIRST


async def test_the_token_of_the_pages_is_guessed_no_faster(start: Start) -> None:
    gateway = await start(admin={"token": hashed(TOKEN)})
    pauses = [(await took(gateway, "/_proxy/status", key="wrong", headers=NOT_LOCAL))[0] for _ in range(3)]
    assert pauses == pytest.approx([FIRST, 2 * FIRST, 4 * FIRST], abs=0.1)


async def test_who_guesses_makes_room_for_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await team(start, monkeypatch, server={"max_connections": 3})
    for _ in range(6):
        await gateway.get(SSH, key="wrong")
    guesses = [asyncio.create_task(gateway.get(SSH, key="wrong")) for _ in range(3)]
    await asyncio.sleep(1)
    assert (await took(gateway, key=TOKEN))[1].status == 200
    await asyncio.gather(*guesses, return_exceptions=True)
