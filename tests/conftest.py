"""A whole proxy in front of the fake, on real sockets and a clock that jumps to the next thing that happens."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.client_proto
import aiohttp.http_parser
import aiohttp.web_protocol
import pytest
from fake_vast import Behaviour, FakeVast

from proxy.app import App
from proxy.settings import Settings, load
from proxy.upstream import Upstream

NOON = 1_785_000_000.0
"""The date on which virtual tests begin, epoch seconds."""


def pytest_configure() -> None:
    # Without this Python 3.11 makes an event loop for whoever asks for the current one, and nobody closes it.
    asyncio.set_event_loop(None)


class Answer:
    """One response, read whole."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.raw_headers = response.raw_headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def cache(self) -> str:
        """Cache-Status without our name."""
        return self.headers.get("Cache-Status", "").removeprefix("vast-proxy; ")

    def __repr__(self) -> str:
        return f"<{self.status} {self.cache} {self.body[:200]!r}>"


class Client:
    """Says what it means in one line: `await client.get("/api/v0/ssh/", key="other")`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, agent: str = "vastai-cli/1.9.1") -> None:
        self.session, self.url, self.agent = session, url, agent

    async def __call__(self, method: str, path: str, body: Any = None, key: str = "k", **more: Any) -> Answer:
        headers = {"User-Agent": self.agent}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        headers |= more.pop("headers", {})
        async with self.session.request(
            method, self.url + path, json=body, headers=headers, allow_redirects=False, **more
        ) as response:
            return Answer(response, await response.read())

    async def get(self, path: str, **more: Any) -> Answer:
        return await self("GET", path, **more)

    async def put(self, path: str, body: Any = None, **more: Any) -> Answer:
        return await self("PUT", path, {} if body is None else body, **more)

    async def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return await self("POST", path, {} if body is None else body, **more)

    async def delete(self, path: str, **more: Any) -> Answer:
        return await self("DELETE", path, {}, **more)


class Date:
    """The date: it goes on with the loop's time, and is set forward or back by who likes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self.off = 0.0
        """Seconds by which the proxy's clock is wrong; the fake's is right."""

    def right(self) -> float:
        return NOON + self._loop.time() - self._began

    def __call__(self) -> float:
        return self.right() + self.off


class Gateway(Client):
    """A proxy, the fake behind it, and a client of it."""

    def __init__(
        self,
        app: App,
        fake: FakeVast,
        session: aiohttp.ClientSession,
        another: Callable[[Settings], App],
        date: Date,
    ) -> None:
        super().__init__(session, f"http://{app.address}")
        self._another = another
        self.app = app
        self.fake = fake
        self.date = date

    def offer(self, number: int = 0) -> str:
        """The path that rents an offer that is still to be had."""
        offers = sorted(self.fake.offers, key=lambda offer: int(offer["id"]))
        return f"/api/v0/asks/{offers[number]['id']}/"

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def restart(self, *, crash: bool = False, grace: float | None = None, pause: float = 0.0) -> None:
        """End the proxy, in order or by its sudden death, and after a while start another on its files and address."""
        old = self.app
        await (kill(old) if crash else old.stop(grace))
        await asyncio.sleep(pause)
        self.app = self._another(replace(old.settings, listen=old.address))
        await self.app.start()


def assert_nothing_is_left(gateway: Gateway, tasks: set[asyncio.Task[Any]]) -> None:
    """No slot, token, line, gate, flight or upstream connection is in use, and no task is there but `tasks`."""
    admission = gateway.app.admission
    assert (admission.waiting, admission.in_flight, admission._gates) == (0, 0, {})
    assert all((origin.waiting, origin.in_flight) == (0, 0) for origin in admission.origins.values())
    assert all(bucket.pending == 0 for bucket in admission._buckets.values())
    accounts = admission._accounts.values()
    assert all((one.bucket.pending, one.in_flight, one.waiting) == (0, 0, 0) for one in accounts)
    assert all((len(line), line.out) == (0, 0) for line in admission._queues.values())
    assert repr(gateway.app.pipeline.flights) == "<Coalescer 0 flights, 0 members>"
    connector = gateway.app.upstream._session.connector
    assert connector is not None
    assert not connector._acquired
    assert [task for task in asyncio.all_tasks() - tasks if "RequestHandler" not in repr(task)] == []


Start = Callable[..., Any]


def settings_for(fake_url: str, tmp_path: Path, given: Mapping[str, Any] | None = None) -> Settings:
    """The shipped settings, pointed at the fake, with a state file of the test's own."""
    file = tmp_path / "proxy.yaml"
    merged: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "upstreams": {"api": fake_url, "serverless": fake_url, "hosts": []},
        "state": {"file": str(tmp_path / "state.json")},
        "log": {"level": "warning"},
    }
    for section, values in (given or {}).items():
        if isinstance(values, Mapping) and isinstance(merged.get(section), dict):
            merged[section] |= values
        else:
            merged[section] = values
    file.write_text(json.dumps(merged))
    return load(file, {}, {})


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a proxy in front of a fake: `await start(Behaviour(...), limits={"scale": 2})`. All ends with the test."""
    date: Date | None = None
    async with AsyncExitStack() as stack:

        async def begin(
            behaviour: Behaviour | None = None,
            *,
            fake: FakeVast | None = None,
            server_tls: ssl.SSLContext | None = None,
            client_tls: ssl.SSLContext | None = None,
            fast: bool = False,
            **given: Any,
        ) -> Gateway:
            nonlocal date
            date = date or Date()  # not sooner: the time is virtual only from here
            if fake is None:
                fake = FakeVast(behaviour, wall=date.right)
                await fake.start(ssl_context=server_tls)
                stack.push_async_callback(fake.stop)
            if fast:
                given.setdefault("limits", {}).update({"scale": 1e-6, "global": None})
                fake.behaviour = replace(fake.behaviour, scale=0.0)

            settings = settings_for(fake.url, tmp_path, given)

            def another(settings: Settings) -> App:
                assert date is not None
                return App(settings, wall=date, tls=client_tls, chance=lambda: 0.5)

            app = another(settings)
            await app.start()
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
                )
            )
            gateway = Gateway(app, fake, session, another, date)

            async def end() -> None:
                await gateway.app.stop(1.0)

            stack.push_async_callback(end)
            return gateway

        yield begin


@pytest.fixture(params=["C", "Python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of aiohttp's parsers, whichever is installed by default."""
    if request.param == "Python":
        monkeypatch.setattr(aiohttp.web_protocol, "HttpRequestParser", aiohttp.http_parser.HttpRequestParserPy)
        monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", aiohttp.http_parser.HttpResponseParserPy)
    else:
        assert aiohttp.http_parser.HttpRequestParser is not aiohttp.http_parser.HttpRequestParserPy
    return str(request.param)


async def kill(app: App) -> None:
    """What SIGKILL leaves: nothing is written any more, every connection is closed, nobody is told anything."""
    app._state.path = app.ledger._journal.path = None
    assert app._listener is not None
    app._listener.close()
    for connection in app.server.connections:
        if connection.transport is not None:
            connection.transport.abort()
    await app.stop(0.0)


@asynccontextmanager
async def upstream_for(settings: Settings, tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    """The client alone."""
    upstream = Upstream(settings.upstreams, tls)
    try:
        yield upstream
    finally:
        await upstream.close()


def clean_environment() -> dict[str, str]:
    """The environment for a subprocess: nothing that would point it, or us, anywhere else."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and not name.startswith(("VAST", "XDG"))
    }
