"""A client that leaves, at every stage of its request: on real sockets, by each way in which a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Gateway, Start, assert_nothing_is_left
from raw import OK, Wire, answer, read_message, request

# aiohttp would have a large body in a file; the proxy holds it as it came.
pytestmark = [pytest.mark.looptime, pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")]

MANY = 24 * 1024 * 1024
"""Bytes: more than all buffers on the way to an upstream that does not read."""
KEY = "Authorization: Bearer k"
READ, KEPT, WRITE, SPEND = (
    request("/api/v0/clusters/", KEY),
    request("/api/v0/ssh/", KEY),
    request("/api/v0/instances/1/", KEY, "Content-Type: application/json", method="PUT", body=b"{}"),
    request("/api/v0/asks/1/", KEY, "Content-Type: application/json", method="PUT", body=b"{}"),
)


class Upstream:
    """Does with each connection as it is told; what it holds back it gives once it is released."""

    def __init__(self, serve: Serve, scheme: str) -> None:
        self.serve = serve
        self.scheme = scheme
        self.url = ""
        self.open = 0
        self.seen = 0
        self.released = asyncio.Event()
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"{self.scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        self.released.set()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self.serve(self, reader, writer)
        finally:
            self.open -= 1
            writer.transport.abort()

    async def until_released(self, reader: asyncio.StreamReader) -> None:
        """Or until the other side closes."""
        closed = asyncio.ensure_future(reader.read())
        released = asyncio.ensure_future(self.released.wait())
        self.tasks |= {closed, released}
        await asyncio.wait({closed, released}, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        released.cancel()


Serve = Callable[[Upstream, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def says_nothing(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Nor does it read."""
    await upstream.released.wait()


async def shakes_no_hands(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """It is asked for a TLS handshake, and is silent."""
    await reader.read(1)
    await upstream.until_released(reader)


async def answers_late(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    upstream.seen += 1
    await upstream.until_released(reader)
    writer.write(OK)
    await writer.drain()
    writer.close()


async def answers_by_halves(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    upstream.seen += 1
    writer.write(OK[:-1])
    await upstream.until_released(reader)
    writer.write(OK[-1:])
    await writer.drain()
    writer.close()


async def answers_in_chunks(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    upstream.seen += 1
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    await upstream.until_released(reader)


async def closes_late(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    upstream.seen += 1
    await upstream.until_released(reader)


async def answers_at_length(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Three MiB of four, and then it takes its time."""
    await read_message(reader)
    upstream.seen += 1
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 2**22 + b"x" * (3 * 2**20))
    await upstream.until_released(reader)


async def answers_at_once(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    upstream.seen += 1
    writer.write(answer("Connection: close", body=b"{}"))
    await writer.drain()


@dataclass(frozen=True)
class Stage:
    """How far a request has come as its client leaves."""

    name: str
    serve: Serve
    sends: bytes
    finished: bool = False
    """It was sent, so it is finished all the same."""
    first: bytes = b""
    """Asked before it, so that it must wait."""
    scheme: str = "http"
    waiting: int = 0
    in_flight: int = 1
    reads: bool = False
    """The client has had the beginning of its answer."""


def large(target: str) -> bytes:
    return request(target, KEY, "Content-Type: text/plain", method="PUT", body=b"x" * MANY)


STAGES = [
    Stage("its body comes", answers_at_once, WRITE[:-1], in_flight=0),
    Stage("a read waits in line", answers_at_once, request("/api/v0/instances/?x=2", KEY),
          first=request("/api/v0/instances/?x=1", KEY), waiting=1, in_flight=0),
    Stage("a write waits in line", answers_at_once, WRITE, first=WRITE, waiting=1, in_flight=0),
    *(
        Stage(f"a {name} connects", shakes_no_hands, sends, scheme="https")
        for name, sends in {"read": READ, "kept read": KEPT, "write": WRITE, "spend": SPEND}.items()
    ),
    Stage("the body of a read goes out", says_nothing, large("/api/v0/bundles_bid_price/1/")),
    Stage("the body of a spend goes out", says_nothing, large("/api/v0/asks/1/"), finished=True),
    Stage("a read awaits its answer", answers_late, READ),
    Stage("a read that can be stored awaits its answer", answers_late, KEPT, finished=True),
    Stage("a write awaits its answer", answers_late, WRITE, finished=True),
    Stage("a spend awaits its answer", answers_late, SPEND, finished=True),
    Stage("the answer of a read comes", answers_by_halves, READ),
    Stage("the answer of a read that can be stored comes", answers_by_halves, KEPT, finished=True),
    Stage("the answer of a write comes", answers_by_halves, WRITE, finished=True),
    Stage("the answer of a read comes in chunks", answers_in_chunks, READ),
    Stage("a read that can be stored fails later", closes_late, KEPT, finished=True),
    Stage("a write fails later", closes_late, WRITE, finished=True),
    Stage("a spend fails later", closes_late, SPEND, finished=True),
    Stage("a long answer goes out", answers_at_length, READ, reads=True),
    Stage("a long answer of a write goes out", answers_at_length, WRITE, reads=True),
]  # fmt: skip


async def reset(wire: Wire) -> None:
    linger = struct.pack("ii", 1, 0)
    wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wire.writer.transport.abort()


async def close(wire: Wire) -> None:
    wire.writer.close()


async def half_close(wire: Wire) -> None:
    wire.writer.write_eof()


WAYS = {"reset": reset, "close": close, "half-close": half_close}


@pytest.fixture
async def begin(start: Start) -> AsyncIterator[Callable[..., Awaitable[tuple[Gateway, Upstream]]]]:
    async with contextlib.AsyncExitStack() as stack:

        async def between(stage: Stage) -> tuple[Gateway, Upstream]:
            upstream = await stack.enter_async_context(Upstream(stage.serve, stage.scheme))
            limits = {"global": None} if stage.first else {"global": None, "scale": 1e-6}
            return await start(fake=upstream, limits=limits), upstream

        yield between


def state(gateway: Gateway) -> tuple[int, int]:
    admission = gateway.app.admission
    return admission.waiting, admission.in_flight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.replace(" ", "-"))
async def test_a_client_that_leaves_leaves_nothing_behind(begin: Any, stage: Stage, way: str) -> None:
    gateway, upstream = await begin(stage)
    tasks = asyncio.all_tasks()
    if stage.first:
        async with await Wire.to(gateway) as wire:
            assert (await wire.ask(stage.first)).status == 200
    async with await Wire.to(gateway) as wire:
        sending = asyncio.create_task(wire.send(stage.sends))
        if stage.reads:
            await wire.reader.readexactly(100)
        await asyncio.sleep(0.5)
        assert state(gateway) == (stage.waiting, stage.in_flight)
        seen = upstream.seen
        await WAYS[way](wire)
        await asyncio.sleep(0.1)
        if stage.finished:
            assert state(gateway) == (0, 1)
            upstream.released.set()
        await asyncio.sleep(0.1)
        assert_nothing_is_left(gateway, tasks | upstream.tasks | {sending})
        await asyncio.wait([sending])
    await asyncio.sleep(100.0)  # no call of one that has left is made later, nor any retry
    assert upstream.seen == seen
    assert upstream.open == 0 or stage.serve is says_nothing  # that one does not see a connection close
    assert len(gateway.app.server.connections) == 0


async def test_a_follower_that_leaves_takes_nothing_from_the_others(begin: Any) -> None:
    gateway, upstream = await begin(Stage("together", answers_late, READ))
    tasks = asyncio.all_tasks()
    async with await Wire.to(gateway) as leader, await Wire.to(gateway) as follower, await Wire.to(gateway) as last:
        for wire in (leader, follower, last):
            await wire.send(READ)
            await asyncio.sleep(0.1)
        for wire in (follower, leader):
            await reset(wire)
            await asyncio.sleep(0.1)
            assert state(gateway) == (0, 1)
        upstream.released.set()
        assert (await last.answer()).body == b"{}"
    assert upstream.seen == 1
    await asyncio.sleep(0.1)
    assert_nothing_is_left(gateway, tasks | upstream.tasks)
