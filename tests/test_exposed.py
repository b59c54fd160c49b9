"""Safe to expose, on real sockets: names, other sites, our own pages, addresses behind proxies, guesses."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, Gateway, Start
from raw import Wire, request

from proxy import server, upstream
from proxy.policy.members import Secret, hashed
from proxy.settings import SettingsError, load
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


async def test_while_one_is_held_back_others_from_there_are_refused_at_once_and_told_when(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await team(start, monkeypatch)
    for _ in range(5):
        await gateway.get(SSH, key="wrong")
    first = asyncio.create_task(took(gateway, key="wrong"))
    await asyncio.sleep(1)
    for _ in range(3):
        pause, told = await took(gateway, key="wrong")
        assert (pause < 0.1, told.status, told.json["error"]) == (True, 401, "token_unknown")
        assert told.headers["Retry-After"] == "7"
    assert (await took(gateway, key=TOKEN))[0] < 0.1
    pause, told = await first
    assert (round(pause), "Retry-After" in told.headers) == (8, False)


async def test_to_hang_up_is_no_way_around_the_pause(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await team(start, monkeypatch)
    held = 0
    for _ in range(200):
        try:
            async with asyncio.timeout(0.05):
                assert (await gateway.get(SSH, key="wrong")).headers["Retry-After"]
        except TimeoutError:
            held += 1
    assert held <= 5, "one after the other, each for twice as long: none of the ten seconds is without one"
    assert (await took(gateway, key=TOKEN))[1].status == 200


@pytest.mark.parametrize("pipelined", [False, True])
async def test_who_guesses_makes_room_for_others(
    start: Start, monkeypatch: pytest.MonkeyPatch, pipelined: bool
) -> None:
    gateway = await team(start, monkeypatch, server={"max_connections": 3}, trusted_proxies=["127.0.0.1"])
    wrong = [request(SSH, "Authorization: Bearer wrong", f"X-Forwarded-For: 192.0.2.{number}") for number in range(3)]
    async with AsyncExitStack() as stack:
        for _ in range(6):
            for guess in wrong:
                async with await Wire.to(gateway) as wire:
                    await wire.ask(guess)
        wires = [await stack.enter_async_context(await Wire.to(gateway)) for _ in wrong]
        for _ in range(1 + pipelined):
            for wire, guess in zip(wires, wrong, strict=True):
                await wire.send(guess)
            await asyncio.sleep(1)
        assert (await took(gateway, key=TOKEN))[1].status == 200


# --- Who is not known yet ---------------------------------------------------------------------------------------------


async def test_who_has_a_wrong_token_in_the_head_is_refused_before_the_body_is_read(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await team(start, monkeypatch)
    async with await Wire.to(gateway) as wire:
        lines = ("Authorization: Bearer wrong", "Content-Length: 30000000", "Expect: 100-continue")
        told = await wire.ask(request(SSH, *lines, method="POST"))
        assert (told.status, json.loads(told.body)["error"]) == (401, "token_unknown")
        assert told.all("Connection") == ["close"]
        assert gateway.app.server.bodies.size == 0


@pytest.mark.parametrize("head", [f"Content-Length: {64 * 1024 + 1}", "Transfer-Encoding: chunked"])
async def test_who_has_no_token_in_the_head_is_read_only_as_far_as_one_may_be_in_the_body(
    start: Start, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    gateway = await team(start, monkeypatch)
    async with await Wire.to(gateway) as wire:
        chunk = b"10001\r\n" + b"x" * 0x10001 + b"\r\n" if "chunked" in head else b""
        told = await wire.ask(request(SSH, head, method="POST") + chunk)
        assert (told.status, json.loads(told.body)["error"]) == (401, "token_needed")
        assert "it goes into the header" in json.loads(told.body)["msg"]
        assert told.all("Connection") == ["close"]
        assert gateway.app.server.bodies.size == 0
    body = {"api_key": TOKEN, "x": "x" * 65_000}
    assert (await gateway("GET", "/api/v0/endptjobs/", body, key="")).status == 200
    assert (await gateway.post("/api/v0/bundles/", {"q": "x" * 100_000}, key=TOKEN)).status == 200


async def test_who_has_no_token_takes_neither_the_room_for_bodies_nor_that_for_connections(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = {"max_connections": 5, "max_bodies": 200_000}
    gateway = await team(start, monkeypatch, server=server)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            wire = await stack.enter_async_context(await Wire.to(gateway))
            await wire.send(request(SSH, "Content-Length: 60000", method="POST", body=b"x" * 59_999))
        await asyncio.sleep(1)
        assert gateway.app.server.bodies.size > 150_000
        assert (await gateway.post("/api/v0/bundles/", {"q": "x" * 150_000}, key=TOKEN)).status == 200


async def test_the_body_of_a_member_who_is_known_by_the_head_does_not_make_room(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await team(start, monkeypatch, server={"max_connections": 1})
    async with await Wire.to(gateway) as wire:
        await wire.send(request(SSH, f"Authorization: Bearer {TOKEN}", "Content-Length: 2", method="GET", body=b"{"))
        await asyncio.sleep(1)
        async with await Wire.to(gateway) as late:
            assert (await late.answer()).status == 503
        assert (await wire.ask(b"}")).status == 200
        await wire.send(request(SSH, f"Authorization: Bearer {TOKEN}", "Content-Length: 2", method="GET", body=b"{"))
        await asyncio.sleep(1)
        began = gateway.now()
        await gateway.app.stop(30)
        assert gateway.now() - began < 2, "but the end does not wait for it either"


async def test_who_is_held_back_holds_no_body(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await team(start, monkeypatch)
    body = json.dumps({"api_key": "wrong", "x": "x" * 1000}).encode()
    async with await Wire.to(gateway) as wire:
        await wire.send(request(SSH, method="POST", body=body))
        await asyncio.sleep(0.1)
        assert repr(gateway.app.server.bodies) == "<Bodies 0 bytes for 0>"
        assert repr(gateway.app.server.clients) == "<Connections 1 open, 1 idle, 0 coming in>"
        assert (await wire.answer()).status == 401


# --- The end of a team ------------------------------------------------------------------------------------------------


def reload(gateway: Gateway, tmp_path: Path, **more: Any) -> None:
    written = json.loads((tmp_path / "proxy.yaml").read_text()) | more
    (tmp_path / "proxy.yaml").write_text(json.dumps({name: value for name, value in written.items() if value}))
    gateway.app.reload(load(tmp_path / "proxy.yaml", {}, {}))


async def test_a_token_is_not_passed_on_when_the_team_is_gone(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway = await team(start, monkeypatch)
    reload(gateway, tmp_path, team=None)
    told = await gateway.get(SSH, key=TOKEN)
    assert (told.status, told.json["error"]) == (401, "token_unknown")
    assert "no team" in told.json["msg"]
    assert (await gateway.get(SSH, key="a-key-of-the-vendors")).status == 200
    assert TOKEN not in repr(gateway.fake.calls())


async def test_a_reload_does_not_open_what_listens_to_others(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway = await team(start, monkeypatch, listen="0.0.0.0:0", log={"level": "warning"})
    with pytest.raises(
        SettingsError, match=r"listen: the address in use stays 0\.0\.0\.0:\d+ until a restart, and .* open"
    ):
        reload(gateway, tmp_path, team=None, listen="127.0.0.1:0", log={"level": "error"})
    assert gateway.app.pipeline.settings.team
    assert gateway.app.settings.log.level == "warning", "nothing of it is in force"
    reload(gateway, tmp_path, team=None, listen="127.0.0.1:0", allow_open=True)
    assert not gateway.app.pipeline.settings.team


# --- What is kept -----------------------------------------------------------------------------------------------------


async def test_a_name_that_is_longer_than_any_is_misdirected(start: Start) -> None:
    gateway = await start(fast=True)
    told = await gateway.get(SSH, headers={"Host": "a" * 256})
    assert (told.status, told.json["error"]) == (421, "wrong_host")
    assert (await gateway.get(SSH, headers={"Host": "a" * 255})).status == 200


async def test_of_a_long_head_nothing_is_kept(start: Start) -> None:
    gateway = await start(fast=True)
    fields, sent = server._field.cache_info().currsize, upstream._small_fields.cache_info().currsize
    await gateway.get(SSH, headers={f"X-{number}": "x" * 8000 for number in range(3)})
    assert not gateway.app.server._known
    assert upstream._small_fields.cache_info().currsize == sent
    assert server._field.cache_info().currsize <= fields + 5, "those that every client sends"
    fields = server._field.cache_info().currsize
    assert len(server._fields(((b"x" * 300, b"x"), (b"x", b"x" * 300)))) == 2
    assert server._field.cache_info().currsize == fields
    await gateway.get(f"{SSH}?a", headers={"X-Short": "x" * 4000})
    (known,) = gateway.app.server._known
    assert sum(len(field) for pair in known[2] for field in pair) < 8192


@pytest.mark.parametrize("given", [TOKEN, "vp_", "the-key-of-the-account", "k"])
async def test_no_request_id_is_kept_that_is_a_token_or_a_key(
    start: Start, monkeypatch: pytest.MonkeyPatch, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await team(start, monkeypatch, log={"level": "info"})
    for path, key in ((SSH, "k"), (f"{SSH}?api_key=k", "")):
        told = await gateway.get(path, key=key, headers={"X-Request-ID": given})
        assert told.headers["X-Request-ID"] != given
    kept = await gateway.get(SSH, key="k", headers={"X-Request-ID": "kk"})
    assert kept.headers["X-Request-ID"] == "kk"
    await asyncio.sleep(0)
    assert f"id={given}" not in capsys.readouterr().err.split()
