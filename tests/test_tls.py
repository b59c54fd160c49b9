"""TLS towards clients: what they are shown, and what becomes of it on a reload."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from conftest import Gateway, Start
from fake_vast import Fault
from raw import Wire, request

from proxy.settings import SettingsError, load

SSH = "/api/v0/ssh/"


def issue(folder: Path) -> ssl.SSLContext:
    """A certificate for localhost by an authority that nobody knew; the context of a client that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return client


async def over_tls(start: Start, folder: Path, **more: Any) -> Gateway:
    files = {"cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}
    gateway: Gateway = await start(fast=True, tls=files, **more)
    gateway.url = gateway.url.replace("http:", "https:")
    return gateway


async def is_accepted(gateway: Gateway, client: ssl.SSLContext) -> bool:
    """By a connection of its own."""
    connector = aiohttp.TCPConnector(ssl=client, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            async with session.get(gateway.url + SSH, headers={"Authorization": "Bearer k"}) as response:
                return response.status == 200
        except aiohttp.ClientConnectorCertificateError:
            return False


def reload(gateway: Gateway, folder: Path, **changed: Any) -> list[str]:
    written = json.loads((folder / "proxy.yaml").read_text()) | changed
    (folder / "proxy.yaml").write_text(json.dumps(written))
    return gateway.app.reload(load(folder / "proxy.yaml", {}, {}))


async def test_clients_that_trust_the_certificate_are_served(start: Start, tmp_path: Path) -> None:
    trusting = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    assert await is_accepted(gateway, trusting)
    assert not await is_accepted(gateway, ssl.create_default_context())


async def test_a_renewed_certificate_is_shown_from_the_reload_on_and_who_is_connected_stays_so(
    start: Start, tmp_path: Path
) -> None:
    before = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    async with await Wire.to(gateway, ssl=before, server_hostname="localhost") as wire:
        assert (await wire.ask(request(SSH, "Authorization: Bearer k"))).status == 200
        after = issue(tmp_path)
        assert await is_accepted(gateway, before)
        assert reload(gateway, tmp_path) == []
        assert await is_accepted(gateway, after)
        assert not await is_accepted(gateway, before)
        assert (await wire.ask(request(SSH, "Authorization: Bearer k"))).status == 200


@pytest.mark.parametrize("damage", ["no pem", "another's", "gone"])
async def test_a_wrong_file_is_told_and_the_certificate_in_use_stays(
    start: Start, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    settings = gateway.app.settings
    if damage == "no pem":
        (tmp_path / "key.pem").write_text("x")
    elif damage == "gone":
        (tmp_path / "key.pem").unlink()
    else:
        (tmp_path / "other").mkdir()
        issue(tmp_path / "other")
        (tmp_path / "other" / "cert.pem").replace(tmp_path / "cert.pem")
    told = {
        "no pem": "are not a usable pair of PEM files",
        "another's": "do not belong together",
        "gone": "cannot be read: No such file or directory",
    }
    with pytest.raises(SettingsError, match=told[damage]):
        reload(gateway, tmp_path)
    with caplog.at_level(logging.ERROR):
        gateway.app.reload(settings)  # as if it had been damaged just after it was read
    assert told[damage] in caplog.text
    assert await is_accepted(gateway, before)


async def test_to_begin_or_end_with_tls_needs_a_restart(start: Start, tmp_path: Path) -> None:
    trusting = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    assert reload(gateway, tmp_path, tls={}) == ["tls"]
    assert await is_accepted(gateway, trusting)


async def test_an_absolute_target_names_the_proxy_by_https(start: Start, tmp_path: Path) -> None:
    trusting = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    for scheme, status in (("https", 200), ("http", 400)):
        async with await Wire.to(gateway, ssl=trusting, server_hostname="localhost") as wire:
            got = await wire.ask(request(f"{scheme}://{gateway.app.address}{SSH}", "Authorization: Bearer k"))
            assert got.status == status


async def test_who_finds_no_room_is_told_so_over_tls_too(start: Start, tmp_path: Path) -> None:
    trusting = issue(tmp_path)
    gateway = await over_tls(start, tmp_path, server={"max_connections": 1})
    async with await Wire.to(gateway, ssl=trusting, server_hostname="localhost") as first:
        gateway.fake.faults.append(Fault(kind="slow", delay=1.0))
        await first.send(request(SSH))
        await asyncio.sleep(0.1)
        async with await Wire.to(gateway, ssl=trusting, server_hostname="localhost") as second:
            assert (await second.answer()).status == 503
            assert await second.rest() == b""


async def test_who_never_shakes_hands_is_let_go(start: Start, tmp_path: Path) -> None:
    issue(tmp_path)
    gateway = await over_tls(start, tmp_path, server={"header_timeout": 0.2})
    async with asyncio.timeout(5), await Wire.to(gateway) as wire:
        assert await wire.rest() == b""


@pytest.mark.parametrize("path", ["/_proxy/events", "/api/v0/template/"])
async def test_who_leaves_in_the_middle_of_an_answer_leaves_no_fault_behind(
    start: Start, tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    trusting = issue(tmp_path)
    gateway = await over_tls(start, tmp_path)
    gateway.fake.faults.append(Fault(match="GET *", kind="big", size=64 * 1024 * 1024))
    connector = aiohttp.TCPConnector(ssl=trusting)
    async with aiohttp.ClientSession(connector=connector) as session:
        answer = await session.get(gateway.url + path, headers={"Authorization": "Bearer k"})
        await answer.content.readany()
        answer.close()
        for _ in range(100):
            await asyncio.sleep(0.02)
            if not gateway.app.server.clients:
                break
    assert len(gateway.app.server.clients) == 0
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR and "proxy" in record.name]
    assert [record.getMessage() for record in faults] == []
