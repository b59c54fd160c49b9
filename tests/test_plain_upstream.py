"""A second opinion: what an ordinary aiohttp application sees and says is the same with the proxy as without it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import settings_for

from proxy.app import App

Serve = Callable[[web.Application], Awaitable[TestServer]]
ADDED = {"Cache-Status", "Server-Timing", "Date", "X-Request-ID"}
# A read whose answer may be shared asks for gzip at most, which can be undone for a client that does not take it.
CODING = {"Accept-Encoding": "gzip"}
CASES: list[tuple[str, str, dict[str, str], bytes]] = [
    ("GET", "/api/v0/instances/?owner=me&q=%7B%22a%22:1%7D", {"Authorization": "Bearer k"}, b""),
    ("POST", "/api/v0/bundles/", {"Content-Type": "application/json", "X-Two": "b"}, b'{"limit": 3}'),
    ("DELETE", "/api/v0/instances/5/", {"Content-Type": "application/json"}, b"{}"),
    (
        "PUT",
        "/api/v0/asks/5/",
        {"Content-Type": "application/json", "Accept": "text/*"},
        b'{"image": "\xc3\xa9"}',
    ),
    ("PATCH", "/some/where/else", {"Content-Type": "application/octet-stream"}, bytes(range(256)) * 300),
    ("HEAD", "/api/v0/ssh/", {}, b""),
]


async def echo(request: web.Request) -> web.StreamResponse:
    """Everything that came, but for what names the hop."""
    hop = {"Host", "Connection"}
    seen = {
        "method": request.method,
        "target": request.raw_path,
        "headers": [[name, value] for name, value in request.headers.items() if name not in hop],
        "body": (await request.read()).hex(),
    }
    return web.json_response(seen, headers=[("X-Many", "1"), ("X-Many", "2")])


@pytest.fixture
async def sides(aiohttp_server: Serve, tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """The URL of the application, and that of the proxy before it."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", echo)
    server = await aiohttp_server(application)
    direct = str(server.make_url("")).rstrip("/")
    app = App(settings_for(direct, tmp_path))
    await app.start()
    yield direct, f"http://{app.address}"
    await app.stop(1.0)


@pytest.mark.parametrize(("method", "target", "headers", "body"), CASES, ids=[case[0] for case in CASES])
async def test_nothing_changes_on_the_way_there_and_back(
    sides: tuple[str, str], method: str, target: str, headers: dict[str, str], body: bytes
) -> None:
    told: list[Any] = []
    for side in sides:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{side}{target}", headers=headers | CODING, data=body or None) as answer,
        ):
            fields = [item for item in answer.headers.items() if item[0] not in ADDED]
            text = await answer.text()
            told.append((answer.status, answer.reason, sorted(fields), json.loads(text) if text else None))
    direct, proxied = told
    assert proxied == direct
