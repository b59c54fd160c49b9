"""The proxy as a process under load: killed, told to end, told to reload. In real time, so short."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Answer, Client, clean_environment, settings_for
from fake_vast import Behaviour, FakeVast, Fault, Limit

SLOW, RENT = "GET /api/v0/instances/", "PUT /api/v0/asks/{id}/"
LABEL = "PUT /api/v0/instances/{id}/"
LIMITS = {"scale": 0.1, "margin": 0.2, "global": None}
"""Ours: the old list of instances each 2.4 s, a rental each 0.54 s. The fake's leave room for a busy machine."""
ENFORCED = {SLOW: Limit(2.0), RENT: Limit(0.4), "*": Limit(0.0)}
CHECKOUT = Path(__file__).parent.parent


class Proxies:
    """One proxy after the other on one port, with one state file; clients that go on through all of them."""

    def __init__(self, fake: FakeVast, session: aiohttp.ClientSession, directory: Path) -> None:
        self.fake = fake
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.client = Client(session, f"http://{self.address}")
        self.state = directory / "state.json"
        self.complaints = directory / "stderr"
        self.process: Process | None = None
        self.answers: Counter[int] = Counter()
        self.lost = 0
        """Requests that no answer came to, as the proxy was killed."""
        self.configure()

    def configure(self, **given: Any) -> None:
        """Write the settings file."""
        settings_for(self.fake.url, self.directory, {"listen": self.address, "limits": LIMITS} | given)

    def saved(self) -> object:
        """Another when its state is being saved, or has been."""
        names = {file.name for file in self.directory.glob(".state-*")}
        return names, self.state.stat().st_mtime_ns if self.state.exists() else 0

    def differs(self, before: object) -> bool:
        return self.saved() != before

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Process]:
        """A process that listens. However it ends, it has complained of nothing."""
        with self.complaints.open("w") as stderr:
            self.process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", "serve", "--config", str(self.directory / "proxy.yaml")),
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=stderr,
                env=clean_environment() | {"PYTHONPATH": str(CHECKOUT)},
            )
        try:
            assert process.stdout is not None
            assert re.match(rb"vast-proxy .* listens on ", await process.stdout.readline())
            yield process
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.communicate()
            assert self.complaints.read_text() == ""

    @asynccontextmanager
    async def load(self, clients: Iterable[int]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """So many clients that ask one thing after the other. What it gives ends that, once each has its answer."""
        over = asyncio.Event()
        tasks = [asyncio.create_task(self.ask_on(requests(number), over)) for number in clients]

        async def finish() -> None:
            over.set()
            async with asyncio.timeout(20.0):
                await asyncio.gather(*tasks)

        try:
            yield finish
            assert over.is_set()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def assert_no_label_came_twice(self) -> None:
        labels = Counter(call.body for call in self.fake.calls(LABEL))
        assert labels.total() == len(labels) > 10

    async def ask_on(self, asking: Iterator[tuple[str, str, Any, str]], over: asyncio.Event) -> None:
        for method, path, body, key in asking:
            await self.ask_until_answered(method, path, body, key)
            if over.is_set():
                return
            await asyncio.sleep(0.01)

    async def ask_until_answered(self, method: str, path: str, body: Any, key: str) -> Answer:
        """As a client does that comes back while a proxy is away."""
        while True:
            try:
                answer = await self.client(method, path, body, key=key)
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.02)
                continue
            except aiohttp.ClientError:
                self.lost += 1
                continue
            if answer.status == 503 and answer.json["error"] == "restarting":
                await asyncio.sleep(0.02)
                continue
            self.answers[answer.status] += 1
            return answer


def requests(number: int) -> Iterator[tuple[str, str, Any, str]]:
    """What one client asks, without end: most of it of its own, some the same as others do, one as slow as can be."""
    key = "abc"[number % 3]
    of_its_own = count(1000 * number)
    for what in cycle(range(5)):
        match what:
            case 0:
                yield "PUT", f"/api/v0/instances/{31_000_001 + number % 3}/", {"label": str(next(of_its_own))}, key
            case 1:
                yield "GET", "/api/v0/users/current", None, key
            case 2:
                yield "POST", "/api/v0/bundles/", {"limit": 1 + next(of_its_own) % 50}, key
            case 3:
                yield "GET", "/api/v1/instances/", None, key
            case _ if number < 3:
                yield "GET", "/api/v0/instances/", None, key
            case _:
                yield "GET", "/api/v0/ssh/", None, key


@pytest.fixture
async def proxies(tmp_path: Path) -> AsyncIterator[Proxies]:
    behaviour = Behaviour(limits=ENFORCED)
    connector = aiohttp.TCPConnector(limit=0)
    async with FakeVast(behaviour) as fake, aiohttp.ClientSession(connector=connector) as session:
        for key in "abc":
            await Client(session, fake.url).put(f"/api/v0/asks/{fake.offers[0]['id']}/", {"client_id": "me"}, key=key)
        fake.log.clear()
        async with asyncio.timeout(60.0):
            yield Proxies(fake, session, tmp_path)


async def until(happened: Callable[[], bool]) -> None:
    """Wait for it: what another process does tells nobody."""
    while True:
        if happened():
            return
        await asyncio.sleep(0.0005)


async def ends(process: Process) -> int:
    async with asyncio.timeout(10.0):
        return await process.wait()


async def test_a_signal_counts_as_soon_as_it_says_that_it_listens(proxies: Proxies) -> None:
    async with proxies.running() as process:
        process.send_signal(signal.SIGHUP)
        assert (await proxies.client.get("/_proxy/ready")).status == 200
        process.send_signal(signal.SIGTERM)
        assert await ends(process) == 0
    async with proxies.running() as process:
        process.send_signal(signal.SIGTERM)
        assert await ends(process) == 0


# --- Killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(2))
async def test_killed_at_any_moment_it_starts_again_and_serves(proxies: Proxies, number: int) -> None:
    async with proxies.load(range(3, 9)) as finish:
        for seconds in (0.1 + 0.3 * number, None):
            before = proxies.saved()
            async with proxies.running() as process:
                if seconds is not None:
                    await asyncio.sleep(seconds)
                else:
                    await until(partial(proxies.differs, before))
                process.kill()
                assert await ends(process) == -signal.SIGKILL
            if proxies.state.exists():
                assert json.loads(proxies.state.read_text())["version"] == 1
        served = proxies.answers.total()
        async with proxies.running() as process:
            await until(lambda: proxies.answers.total() > served + 30)
            await finish()
            process.terminate()
            assert await ends(process) == 0
    # What the last two seconds had taught is lost. It may cost a call that is refused, but is told nobody.
    assert set(proxies.answers) == {200}
    assert list(proxies.directory.glob(".state-*")) == []


# --- Told to end, or to reload ----------------------------------------------------------------------------------------


async def test_a_restart_under_load_keeps_the_limits(proxies: Proxies) -> None:
    rents = asyncio.create_task(rent_on(proxies))
    proxies.fake.faults.append(Fault(kind="slow", match=LABEL, times=None, probability=0.3, delay=0.3))
    async with proxies.load(range(6)) as finish:
        for _ in range(2):
            async with proxies.running() as process:
                await asyncio.sleep(1.0)
                process.terminate()
                assert await ends(process) == 0
        async with proxies.running() as process:
            await asyncio.sleep(1.0)
            rents.cancel()
            await finish()
            process.terminate()
            assert await ends(process) == 0
    # A client may lose one that it sent as its connection was closed: it was not passed on, or it would come twice.
    assert set(proxies.answers) == {200}
    proxies.assert_no_label_came_twice()
    assert proxies.fake.refused == []
    assert len(proxies.fake.calls(RENT)) > 4
    assert len(proxies.fake.calls(SLOW)) > 4


async def rent_on(proxies: Proxies) -> None:
    """One rental after the other, as fast as they are let."""
    for offer in proxies.fake.offers:
        await proxies.ask_until_answered("PUT", f"/api/v0/asks/{offer['id']}/", {"client_id": "me"}, "a")


async def test_a_reload_under_load_loses_nothing(proxies: Proxies) -> None:
    proxies.fake.faults.append(Fault(kind="slow", match=LABEL, times=None, probability=0.5, delay=0.1))
    async with proxies.running() as process, proxies.load(range(3, 11)) as finish:
        for number in range(20):
            proxies.configure(
                upstreams={"read_timeout": 20 + number}, cache={"max_bytes": f"{1 + number}MiB"}, log={"format": "json"}
            )
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.05)
        await finish()
        assert set(proxies.answers) == {200}
        assert proxies.answers.total() > 40
        assert proxies.lost == 0
        proxies.assert_no_label_came_twice()
        process.terminate()
        assert await ends(process) == 0


async def test_what_is_upstream_as_it_is_told_to_end_is_answered(proxies: Proxies) -> None:
    proxies.fake.faults.append(Fault(kind="slow", match="GET /api/v0/users/current", delay=1.5))
    async with proxies.running() as process:
        call = asyncio.create_task(proxies.client.get("/api/v0/users/current"))
        await until(lambda: bool(proxies.fake.log))
        process.terminate()
        assert (await call).status == 200
        assert await ends(process) == 0


async def test_a_second_signal_ends_it_at_once_although_a_call_is_upstream(proxies: Proxies) -> None:
    proxies.fake.faults.append(Fault(kind="slow", match="GET /api/v0/users/current", delay=30.0))
    async with proxies.running() as process:
        call = asyncio.create_task(proxies.client.get("/api/v0/users/current"))
        await until(lambda: bool(proxies.fake.log))
        process.terminate()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.5)
        assert not call.done()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 2.0) == 130
        with pytest.raises(aiohttp.ClientError):
            await call
