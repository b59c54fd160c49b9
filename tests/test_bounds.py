"""What slow clients and floods may take up: time, connections, memory; and that others are served meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from conftest import Gateway, Start, settings_for
from raw import OK, Got, RawUpstream, Wire, answer, request
from test_server import MIB, PLAIN, SHARED, ask, between, is_ours

from proxy.app import BACKLOG, raise_open_files
from proxy.bounds import Bodies, Connections
from proxy.policy.messages import Exchange

pytestmark = pytest.mark.looptime

HEAD = b"GET /x HTTP/1.1\r\nHost: x\r\nX-A: "
LATE = 125
"""Seconds after which a client that takes nothing is gone for certain, also if the kernel was slow to stop taking."""
AGENTS = {"vastai-cli/1.9.1": b"HTTP/1.1 100 Continue\r\n\r\n", "node": b"HTTP/1.1 102 Processing\r\n\r\n"}


def code(got: Got) -> str:
    assert is_ours(got)
    return str(json.loads(got.body)["error"])


async def passed(seconds: float, reader: asyncio.StreamReader) -> None:
    """So much time, or all that the other side stays."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await reader.read()


def after(seconds: float, then: bytes = OK) -> Any:
    """An upstream that thinks about it."""

    async def script(upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await passed(seconds, reader)
        writer.write(then)
        await writer.drain()

    return script


def pieces(*sent: tuple[float, bytes], head: str = "Transfer-Encoding: chunked") -> Any:
    """An upstream that says its answer piece by piece, each after so many seconds; then it closes."""

    async def script(upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, (seconds, data) in enumerate(sent):
            await passed(seconds, reader)
            if not number:
                writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if "chunked" in head else data)
            await writer.drain()
        if "chunked" in head:
            writer.write(b"0\r\n\r\n")

    return script


async def drip(wire: Wire, data: Iterable[int], every: float = 1.0) -> None:
    """Byte by byte, until the other side has had enough."""
    with suppress(ConnectionError):
        for byte in data:
            wire.writer.write(bytes([byte]))
            await asyncio.sleep(every)
            if wire.writer.transport.is_closing() or wire.reader.at_eof():
                return


async def kernel() -> None:
    """Let it come to rest: its clock is not the loop's, and it acknowledges what it took after a while of its own."""
    await asyncio.to_thread(time.sleep, 0.2)


@asynccontextmanager
async def stalled(gateway: Gateway, data: bytes, *, between: int = 16384) -> AsyncIterator[socket.socket]:
    """A client that asks and does not read; what fits into the sockets `between` is little, and has come to rest."""
    assert gateway.app._listener is not None
    for listener in gateway.app._listener.sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, between)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (gateway.app.address.host, gateway.app.address.port))
        await loop.sock_sendall(client, data)
        await kernel()
        yield client


async def read_all(client: socket.socket) -> tuple[int, bool]:
    """How many bytes came, and whether they were followed by an end that could be that of an answer."""
    loop = asyncio.get_running_loop()
    taken = 0
    try:
        while data := await loop.sock_recv(client, 65536):
            taken += len(data)
    except ConnectionError:
        return taken, False
    return taken, True


def watched(gateway: Gateway) -> list[Exchange]:
    """Every exchange from now on."""
    seen: list[Exchange] = []
    gateway.app.server.observers += (seen.append,)
    return seen


# --- Heads ------------------------------------------------------------------------------------------------------------


async def test_five_hundred_that_drip_their_heads_leave_the_proxy_to_others(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream):
        raise_open_files(gateway.app.settings)
        wires = [await Wire.to(gateway) for _ in range(500)]
        began = gateway.now()
        drips = [asyncio.create_task(drip(wire, itertools.chain(HEAD, itertools.repeat(120)))) for wire in wires]
        for _ in range(10):
            await asyncio.sleep(1)
            before = gateway.now()
            assert (await ask(gateway, request(PLAIN))).status == 200
            assert gateway.now() - before < 0.1
        assert len(gateway.app.server.clients) >= 500
        assert [code(await wire.answer()) for wire in wires] == ["request_timeout"] * 500
        assert 15 <= gateway.now() - began < 15.5
        assert [await wire.rest() for wire in wires] == [b""] * 500
        await asyncio.gather(*drips)
        assert repr(gateway.app.server.clients) == "<Connections 0 open, 0 idle, 0 coming in>"
        assert len(upstream.seen) == 10
        for wire in wires:
            wire.writer.transport.abort()


@pytest.mark.parametrize("sent", [b"G", HEAD, b"\r\n"])
async def test_a_head_that_does_not_end_is_not_waited_for(start: Start, parser: str, sent: bytes) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        await asyncio.sleep(10)
        await wire.send(sent)
        got = await wire.answer()
        assert (got.status, code(got), got.all("Connection")) == (408, "request_timeout", ["close"])
        assert await wire.rest() == b""
        assert gateway.now() == pytest.approx(15, abs=0.5)  # since the connection was made


async def test_a_connection_that_says_nothing_is_closed_without_a_word(start: Start) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        assert await wire.rest() == b""
        assert gateway.now() == pytest.approx(15, abs=0.5)


async def test_between_two_requests_there_is_all_the_time_of_keepalive(start: Start, parser: str) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        for _ in range(3):
            assert (await wire.ask(request(PLAIN))).status == 200
            await asyncio.sleep(70)
        await wire.send(request(PLAIN, "Content-Length: 2", method="POST"))
        for part in (b"{", b"}"):
            await asyncio.sleep(1)
            await wire.send(part)
        assert (await wire.answer()).status == 200
        ended = gateway.now()
        assert await wire.rest() == b""
        assert gateway.now() - ended == pytest.approx(75, abs=0.5)


async def test_a_head_that_drips_into_a_kept_connection_is_timed_from_its_first_byte(start: Start, parser: str) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        assert (await wire.ask(request(PLAIN, method="POST", body=b"{}"))).status == 200
        await asyncio.sleep(70)  # that of keepalive comes to its end meanwhile
        began = gateway.now()
        drops = asyncio.create_task(drip(wire, HEAD))
        assert code(await wire.answer()) == "request_timeout"
        assert gateway.now() - began == pytest.approx(15, abs=0.5)
        await drops


async def test_a_head_in_parts_that_ends_in_time_is_served(start: Start, parser: str) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        for _ in range(2):
            await wire.send(HEAD)
            await asyncio.sleep(14)
            assert (await wire.ask(b"1\r\n\r\n")).status == 200
            await asyncio.sleep(30)


async def test_neither_a_slow_answer_nor_who_waits_behind_it_is_taken_for_a_slow_head(
    start: Start, parser: str
) -> None:
    async with between(start, after(50), after(50)) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request("/1") + request("/2", method="POST", body=b"{}"))
        assert [(await wire.answer()).status for _ in range(2)] == [200, 200]
        assert gateway.now() >= 100
        assert [seen.target for seen in upstream.seen] == ["/1", "/2"]


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_part_of_a_head_behind_a_slow_answer_is_timed_once_that_is_given(
    start: Start, parser: str, goes_on: bool
) -> None:
    async with between(start, after(50)) as (gateway, _), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN))
        await asyncio.sleep(1)
        await wire.send(HEAD)
        assert (await wire.answer()).status == 200
        answered = gateway.now()
        if goes_on:
            await asyncio.sleep(14)
            await wire.send(b"1\r\n\r\n")
            assert (await wire.answer()).status == 200
        else:
            assert code(await wire.answer()) == "request_timeout"
            assert gateway.now() - answered == pytest.approx(15, abs=0.5)


async def test_without_a_limit_a_head_may_take_its_time(start: Start) -> None:
    async with between(start, server={"header_timeout": 0}) as (_, upstream), await Wire.to(_) as wire:
        await wire.ask(request(PLAIN))
        await wire.send(HEAD)
        await asyncio.sleep(60)
        assert (await wire.ask(b"1\r\n\r\n")).status == 200
        assert len(upstream.seen) == 2


# --- Bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_that_drips_is_not_waited_for(start: Start, parser: str, framing: str) -> None:
    line = "Content-Length: 1000" if framing == "length" else "Transfer-Encoding: chunked"
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, line, method="POST") + (b"" if framing == "length" else b"3e8\r\n"))
        drops = asyncio.create_task(drip(wire, b"x" * 100))
        got = await wire.answer()
        assert (got.status, code(got), got.all("Connection")) == (408, "request_timeout", ["close"])
        assert gateway.now() == pytest.approx(20, abs=0.5)
        assert await wire.rest() == b""
        await drops
        assert upstream.seen == []
        assert gateway.app.server.bodies.size == 0


async def test_a_body_that_falls_silent_is_not_waited_for(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, "Content-Length: 100001", method="POST") + b"x" * 50_000)
        await asyncio.sleep(10)
        await wire.send(b"x" * 50_000)
        assert code(await wire.answer()) == "request_timeout"
        assert gateway.now() == pytest.approx(30, abs=0.5)
        assert upstream.seen == []


@pytest.mark.parametrize(("rate", "passes"), [(600, True), (400, False)])
async def test_a_large_body_may_be_as_slow_as_five_hundred_bytes_a_second(
    start: Start, rate: int, passes: bool
) -> None:
    size = 200 * rate
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, f"Content-Length: {size}", method="POST"))
        got = asyncio.create_task(wire.answer())
        for _ in range(200):
            await asyncio.sleep(1)
            if not got.done():
                await wire.send(b"x" * rate)
        assert (await got).status == (200 if passes else 408)
        assert [len(seen.body) for seen in upstream.seen] == ([size] if passes else [])


async def test_without_a_limit_a_body_may_take_its_time(start: Start) -> None:
    async with between(start, server={"body_timeout": 0}) as (gateway, _), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, "Expect: 100-continue", "Content-Length: 2", method="PUT"))
        assert (await wire.answer()).status == 100
        await asyncio.sleep(250)
        assert (await wire.ask(b"{}")).status == 200


async def test_bodies_of_all_clients_together_are_bounded(start: Start, parser: str) -> None:
    limits = {"max_bodies": 1500}
    async with between(start, after(30), server=limits) as (gateway, upstream), await Wire.to(gateway) as first:
        await first.send(request(PLAIN, method="POST", body=b"x" * 1000))
        await asyncio.sleep(1)
        assert gateway.app.server.bodies.size == 1000
        got = await ask(gateway, request(PLAIN, method="POST", body=b"x" * 501))
        assert (got.status, code(got)) == (503, "overloaded")
        assert (got.all("Retry-After"), got.all("Connection")) == (["5"], ["close"])
        chunked = request(PLAIN, "Transfer-Encoding: chunked", method="POST") + b"1f5\r\n" + b"x" * 501 + b"\r\n"
        assert code(await ask(gateway, chunked)) == "overloaded"
        assert gateway.app.server.bodies.size == 1000
        assert (await ask(gateway, request(PLAIN, method="POST", body=b"x" * 500))).status == 200
        assert (await first.answer()).status == 200
        assert repr(gateway.app.server.bodies) == "<Bodies 0 bytes for 0>"
        assert (await ask(gateway, request(PLAIN, method="POST", body=b"x" * 1500))).status == 200
        assert [len(seen.body) for seen in upstream.seen] == [1000, 500, 1500]


async def test_a_body_that_is_not_whole_makes_room_for_others_the_oldest_first(start: Start, parser: str) -> None:
    async with between(start, server={"max_bodies": 1500}) as (gateway, upstream):
        wires = [await Wire.to(gateway) for _ in range(4)]
        await wires[0].send(request(PLAIN, "Content-Length: 10", method="POST"))  # and so has nothing to give
        for wire in wires[1:]:
            await asyncio.sleep(1)
            await wire.send(request(PLAIN, "Content-Length: 500", method="POST", body=b"x" * 499))
        await asyncio.sleep(1)
        assert gateway.app.server.bodies.size == 3 * 499
        assert (await ask(gateway, request(PLAIN, method="POST", body=b"y" * 500))).status == 200
        assert await wires[1].rest() == b""
        assert [(await wire.ask(b"x")).status for wire in wires[2:]] == [200] * 2
        assert (await wires[0].ask(b"x" * 10)).status == 200
        assert [len(seen.body) for seen in upstream.seen] == [500, 500, 500, 10]
        assert repr(gateway.app.server.bodies) == "<Bodies 0 bytes for 0>"
        for wire in wires:
            wire.writer.transport.abort()


async def test_the_oldest_body_that_wants_more_than_there_is_goes_itself(start: Start) -> None:
    async with between(start, server={"max_bodies": 1000}) as (gateway, _), await Wire.to(gateway) as oldest:
        chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
        await oldest.send(request(PLAIN, "Transfer-Encoding: chunked", method="POST") + chunk)
        await asyncio.sleep(1)
        async with await Wire.to(gateway) as other:
            await other.send(request(PLAIN, "Content-Length: 400", method="POST", body=b"x" * 399))
            await asyncio.sleep(1)
            assert code(await oldest.ask(chunk)) == "overloaded"
            assert (await other.ask(b"x")).status == 200


async def test_who_is_told_to_wait_with_a_body_that_has_no_room_does_not_send_it(start: Start) -> None:
    async with between(start, server={"max_bodies": 10}) as (gateway, _), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN, "Expect: 100-continue", "Content-Length: 11", method="PUT"))
        assert (got.status, code(got)) == (503, "overloaded")


@pytest.mark.parametrize("way", ["leaves in the body", "leaves while it waits", "too large", "broken", "fault", "none"])
async def test_a_body_is_given_back_whatever_becomes_of_its_request(
    start: Start, parser: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with between(start, after(30), server={"max_body": 1000}) as (gateway, _), await Wire.to(gateway) as wire:
        chunked = request(PLAIN, "Transfer-Encoding: chunked", method="POST") + b"1f4\r\n" + b"x" * 500 + b"\r\n"
        if way == "fault":

            async def fail(*_: Any) -> None:
                raise RuntimeError

            monkeypatch.setattr(gateway.app.pipeline, "stored", fail)
        waits = way in ("leaves while it waits", "fault", "none")
        await wire.send(request(PLAIN, method="POST", body=b"x" * 500) if waits else chunked)
        await asyncio.sleep(1)
        assert gateway.app.server.bodies.size == (0 if way == "fault" else 500)
        if way == "too large":
            assert (await wire.ask(b"1f5\r\n" + b"x" * 501 + b"\r\n")).status == 413
        elif way == "broken":
            assert (await wire.ask(b"zz\r\n")).status == 400
        elif way in ("fault", "none"):
            assert (await wire.answer()).status == (500 if way == "fault" else 200)
        else:
            wire.writer.transport.abort()
            await asyncio.sleep(1)
        assert repr(gateway.app.server.bodies) == "<Bodies 0 bytes for 0>"


async def test_bodies_that_wait_behind_a_slow_answer_are_not_read_far_ahead(start: Start, parser: str) -> None:
    bodies = [b"%d" % number * 100_000 for number in range(8)]
    async with between(start, after(30), OK) as (gateway, upstream), await Wire.to(gateway) as wire:
        everything = b"".join(request(PLAIN, method="POST", body=body) for body in bodies)
        sending = asyncio.create_task(wire.send(request(PLAIN) + everything))
        await asyncio.sleep(20)
        (connection,) = gateway.app.server.connections
        assert sum(body.total_bytes for _, body in connection._messages) < 64 * 1024 + 256 * 1024
        assert [(await wire.answer()).status for _ in range(9)] == [200] * 9
        await sending
        assert [seen.body for seen in upstream.seen] == [b"", *bodies]


def test_what_is_held_is_given_back_once() -> None:
    bodies = Bodies()
    for holder, size in (("a", 6), ("a", 1), ("b", 3)):
        bodies.take(holder, size)
    assert repr(bodies) == "<Bodies 10 bytes for 2>"
    bodies.give_back("a")
    bodies.give_back("a")
    assert repr(bodies) == "<Bodies 3 bytes for 1>"
    assert (bodies.has("a"), bodies.has("b")) == (False, True)


# --- Answers that are not taken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [f"Content-Length: {3 * MIB}", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_who_does_not_read_a_large_answer_gives_its_slot_back(start: Start, head: str, version: str) -> None:
    large = pieces((0, b"x" * 3 * MIB), head=head)
    rules = {"upstreams": {"max_connections": 1}, "queue": {"max_wait_plain": "10m"}}
    async with between(start, large, OK, **rules) as (gateway, _):
        seen = watched(gateway)
        async with stalled(gateway, request(PLAIN, version=version)) as client:
            await asyncio.sleep(1)
            began = gateway.now()
            assert (await ask(gateway, request("/other"))).status == 200
            assert 57 < gateway.now() - began < LATE
            taken, whole = await read_all(client)
            assert (taken < 3 * MIB, whole) == (True, False)
            assert [(one.code, one.left) for one in seen if one.code or one.left] == [("broken_off", False)]
            assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")


@pytest.mark.parametrize(
    "between_them",
    [16384, pytest.param(200_000, marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells"))],
)
async def test_a_slow_reader_is_waited_for(start: Start, between_them: int) -> None:
    size = 2 * MIB
    large = pieces((0, b"x" * size), head=f"Content-Length: {size}")
    async with (
        between(start, large) as (gateway, _),
        stalled(gateway, request(PLAIN), between=between_them) as client,
    ):
        taken = 0
        for _ in range(10):
            await asyncio.sleep(50)
            taken += len(await asyncio.get_running_loop().sock_recv(client, 65536))
            await kernel()
        assert 10 * 8192 < taken < MIB
        assert len(gateway.app.server.clients) == 1


@pytest.mark.parametrize("line", ["Connection: close", "Connection: keep-alive"])
@pytest.mark.parametrize("size", [60_000, MIB - 1])
async def test_a_small_answer_that_nobody_takes_does_not_hold_its_connection(
    start: Start, line: str, size: int
) -> None:
    async with (
        between(start, answer(body=b"x" * size), server={"keepalive": "10d"}) as (gateway, _),
        stalled(gateway, request(PLAIN, line)) as client,
    ):
        began = gateway.now()
        await asyncio.sleep(58)
        assert len(gateway.app.server.clients) == 1
        async with asyncio.timeout_at(began + LATE):
            while len(gateway.app.server.clients):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(1)
        assert repr(gateway.app.server.clients) == "<Connections 0 open, 0 idle, 0 coming in>"
        taken, whole = await read_all(client)
        assert (taken < size, whole) == (True, False)


async def test_who_asks_and_asks_and_takes_nothing_is_not_answered_without_end(start: Start, parser: str) -> None:
    told = answer("Content-Type: application/json", body=b"x" * 60_000)
    async with between(start, told, server={"send_timeout": "1d"}) as (gateway, _):
        await ask(gateway, request(SHARED))
        async with stalled(gateway, request(SHARED) * 30) as client:
            await asyncio.sleep(1)
            (connection,) = [one for one in gateway.app.server.connections if one.transport is not None]
            assert connection.transport is not None
            assert connection.transport.get_write_buffer_size() < 200_000
            loop, taken = asyncio.get_running_loop(), 0
            while taken < 30 * 60_000:
                taken += len(await loop.sock_recv(client, 65536))


async def test_without_a_limit_an_answer_waits_for_its_reader(start: Start) -> None:
    size = 3 * MIB
    told = pieces((0, b"x" * size), head=f"Content-Length: {size}")
    async with (
        between(start, told, server={"send_timeout": 0}) as (gateway, _),
        stalled(gateway, request(PLAIN, "Connection: close")) as client,
    ):
        await asyncio.sleep(10_000)
        taken, whole = await read_all(client)
        assert (taken > size, whole) == (True, True)


async def test_the_end_of_the_proxy_is_not_taken_for_the_end_of_an_answer(start: Start) -> None:
    large = pieces((0, b"x" * 2 * MIB), (100, b"y"))
    async with between(start, large) as (gateway, _), await Wire.to(gateway) as wire:
        seen = watched(gateway)
        await wire.send(request(PLAIN, version="1.0"))  # told no length: the connection's end is the answer's
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length" not in head
        await wire.reader.readexactly(2 * MIB)
        await gateway.app.stop(1.0)
        with pytest.raises(ConnectionError):
            await wire.reader.read(-1)
        assert [(one.code, one.left) for one in seen] == [("broken_off", False)]


async def test_a_client_that_leaves_a_large_answer_has_left(start: Start) -> None:
    large = pieces((0, b"x" * 2 * MIB), (100, b"y"))
    async with between(start, large) as (gateway, _):
        seen = watched(gateway)
        async with await Wire.to(gateway) as wire:
            await wire.send(request(PLAIN))
            await wire.reader.readexactly(MIB)
        await asyncio.sleep(1)
        assert [(one.code, one.left) for one in seen] == [("", True)]


# --- Connections ------------------------------------------------------------------------------------------------------


async def test_a_new_connection_takes_the_place_of_the_one_that_is_idle_longest(start: Start, parser: str) -> None:
    async with between(start, server={"max_connections": 3}) as (gateway, _):
        wires = [await Wire.to(gateway) for _ in range(3)]
        for wire in (wires[1], wires[0], wires[2], wires[0]):  # so 1 is idle longest, then 2, then 0
            assert (await wire.ask(request(PLAIN))).status == 200
            await asyncio.sleep(1)
        for gone in (wires[1], wires[2]):
            wires.append(await Wire.to(gateway))
            assert (await wires[-1].ask(request(PLAIN))).status == 200
            assert await gone.rest() == b""
            assert len(gateway.app.server.clients) == 3
        assert (await wires[0].ask(request(PLAIN))).status == 200
        for wire in wires:
            wire.writer.transport.abort()


async def test_half_a_head_gives_way_and_a_request_in_progress_does_not(start: Start, parser: str) -> None:
    async with between(start, after(40), server={"max_connections": 2}) as (gateway, _):
        busy, half = [await Wire.to(gateway) for _ in range(2)]
        await busy.send(request(PLAIN))
        await half.send(HEAD)
        await asyncio.sleep(1)
        fresh = await Wire.to(gateway)
        assert await half.rest() == b""
        await fresh.send(request("/other"))
        assert (await busy.answer()).status == 200
        assert (await fresh.answer()).status == 200
        for wire in (busy, half, fresh):
            wire.writer.transport.abort()


async def test_a_body_that_is_not_whole_gives_way_the_oldest_first_once_nobody_is_idle(
    start: Start, parser: str
) -> None:
    async with between(start, server={"max_connections": 3}) as (gateway, _):
        wires = [await Wire.to(gateway) for _ in range(3)]
        for wire in wires[:2]:
            await wire.send(request(PLAIN, "Content-Length: 10", method="POST", body=b"x"))
            await asyncio.sleep(1)
        await wires[0].send(b"x")  # which makes it no younger
        assert (await ask(gateway, request(PLAIN))).status == 200  # instead of 2, which is idle
        assert await wires[2].rest() == b""
        async with await Wire.to(gateway) as another:
            await another.send(request("/other", "Content-Length: 10", method="POST", body=b"x"))
            await asyncio.sleep(1)
            assert (await ask(gateway, request(PLAIN))).status == 200
            assert await wires[0].rest() == b""
            assert (await wires[1].ask(b"x" * 9)).status == 200
        for wire in wires:
            wire.writer.transport.abort()


async def test_what_comes_after_an_answer_gives_way_too_while_it_is_coming_in(start: Start, parser: str) -> None:
    async with between(start, server={"max_connections": 1}) as (gateway, _), await Wire.to(gateway) as wire:
        half = request(PLAIN, "Content-Length: 10", method="POST", body=b"x")
        assert (await wire.ask(request(PLAIN) + half)).status == 200
        assert (await ask(gateway, request(PLAIN))).status == 200
        assert await wire.rest() == b""


async def test_where_all_have_a_request_in_progress_the_new_one_is_told_so(start: Start, parser: str) -> None:
    async with between(start, after(40), server={"max_connections": 2}) as (gateway, upstream):
        wires = [await Wire.to(gateway) for _ in range(2)]
        for number, wire in enumerate(wires):
            await wire.send(request(f"/{number}"))
        await asyncio.sleep(1)
        before = gateway.now()
        for _ in range(100):
            got = await ask(gateway, request(PLAIN, method="POST", body=b"x" * 100_000))
            assert (got.status, code(got)) == (503, "too_many_connections")
            assert (got.all("Retry-After"), got.all("Connection")) == (["5"], ["close"])
        with socket.socket() as late:
            late.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(late, (gateway.app.address.host, gateway.app.address.port))
            await asyncio.sleep(0.5)
            for part in (request(PLAIN, "Content-Length: 9", method="POST"), b"body", b" body"):
                await loop.sock_sendall(late, part)  # which a reset would not let it do
            assert (await loop.sock_recv(late, 65536)).startswith(b"HTTP/1.1 503 ")
        async with await Wire.to(gateway) as silent:
            assert (await silent.answer()).status == 503
            assert await silent.rest() == b""
        assert gateway.now() - before < 3
        assert [(await wire.answer()).status for wire in wires] == [200, 200]
        assert (await ask(gateway, request(PLAIN))).status == 200
        await asyncio.sleep(2)
        assert not gateway.app.server._turned_away
        assert len(upstream.seen) == 3
        for wire in wires:
            wire.writer.transport.abort()


async def test_those_who_are_turned_away_and_stay_are_few(start: Start) -> None:
    async with between(start, after(40), server={"max_connections": 1}) as (gateway, _), await Wire.to(gateway) as busy:
        await busy.send(request(PLAIN))
        await asyncio.sleep(1)
        crowd = [await Wire.to(gateway) for _ in range(200)]
        assert len(gateway.app.server._turned_away) == 64
        assert len(gateway.app.server.connections) == 1
        for wire in crowd:
            wire.writer.transport.abort()


async def test_a_reload_changes_the_bounds(start: Start, tmp_path: Any) -> None:
    async with between(start, after(40)) as (gateway, _):
        wires = [await Wire.to(gateway) for _ in range(3)]
        await asyncio.sleep(1)
        given = {"server": {"max_connections": 1, "header_timeout": 5}, "limits": {"scale": 1e-6, "global": None}}
        gateway.app.reload(settings_for(gateway.fake.url, tmp_path, given))
        async with await Wire.to(gateway) as last:
            assert [await wire.rest() for wire in wires] == [b""] * 3
            await last.send(HEAD)
            before = gateway.now()
            assert code(await last.answer()) == "request_timeout"
            assert gateway.now() - before == pytest.approx(5, abs=0.5)
        for wire in wires:
            wire.writer.transport.abort()


def test_the_place_of_one_that_is_gone_is_free_once() -> None:
    closed: list[str] = []
    clients: Connections[str] = Connections(closed.append)
    assert clients.admit("a", 2)
    assert clients.admit("b", 2)
    clients.busy("a")
    assert clients.admit("c", 2)
    assert closed == ["b"]
    clients.gone("b")
    clients.idle("b")  # its last answer came after all
    clients.busy("c")
    assert repr(clients) == "<Connections 2 open, 0 idle, 0 coming in>"
    assert not clients.admit("d", 2)
    clients.idle("c")
    clients.idle("a")
    assert clients.admit("d", 2)
    assert closed == ["b", "c"]


def test_who_makes_room_was_idle_or_coming_in_for_longest() -> None:
    closed: list[str] = []
    clients: Connections[str] = Connections(closed.append)
    for one in "abcd":
        assert clients.admit(one, 9)
        clients.coming(one)
    clients.idle("d")
    clients.coming("a")  # it was already
    clients.coming("x")  # it is not there
    assert repr(clients) == "<Connections 4 open, 1 idle, 3 coming in>"
    assert clients.make_room("b", lambda one: one == "c") == "c"
    assert clients.make_room("b", lambda one: one == "d") is None
    assert clients.make_room("a", lambda one: True) is None
    assert clients.make_room("b", lambda one: True) == "a"
    clients.busy("b")
    assert [clients.is_busy(one) for one in "abcd"] == [False, True, False, False]
    assert clients.make_room("d", lambda one: True) is None
    assert closed == ["c", "a"]
    assert sorted(clients) == ["b", "d"]


async def test_the_end_does_not_wait_for_what_is_still_coming_in(start: Start, parser: str) -> None:
    async with between(start, after(5)) as (gateway, _), await Wire.to(gateway) as half, await Wire.to(gateway) as busy:
        await half.send(request(PLAIN, "Content-Length: 10", method="POST", body=b"x"))
        await busy.send(request(PLAIN))
        await asyncio.sleep(1)
        began = gateway.now()
        ending = asyncio.create_task(gateway.app.stop(30))
        assert (await busy.answer()).status == 200
        await ending
        assert gateway.now() - began < 6


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux")
async def test_the_kernel_is_told_to_notice_who_is_gone_without_a_word(start: Start) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        await wire.ask(request(PLAIN))
        (connection,) = gateway.app.server.connections
        assert connection.transport is not None
        client = connection.transport.get_extra_info("socket")
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        found = [client.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        assert found == [30, 10, 3, 60_000]
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 100_000, 2000])
async def test_open_files_are_raised_as_far_as_they_may_be(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hard: int
) -> None:
    limits = (256, hard)

    def set_limits(_: int, wanted: tuple[int, int]) -> None:
        nonlocal limits
        limits = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    settings = (await start()).app.settings
    needed = 4096 + BACKLOG + 2 * 100 + 64
    with caplog.at_level(logging.WARNING):
        raise_open_files(settings)
    assert limits == (min(needed, hard) if hard != resource.RLIM_INFINITY else needed, hard)
    told = [record.getMessage() for record in caplog.records]
    if hard == 2000:
        assert len(told) == 1
        assert "2000" in told[0]
        assert str(needed) in told[0]
    else:
        assert told == []


# --- Interim answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
async def test_no_interim_answer_mixes_into_an_answer_that_has_begun(start: Start, parser: str, agent: str) -> None:
    parts = [(3.5, b"a" * (MIB + 1)), *((2.5, bytes([98 + number]) * 100_000) for number in range(5))]
    body = b"".join(data for _, data in parts)
    large = pieces(*parts, head=f"Content-Length: {len(body)}")
    async with (
        between(start, large, after(2.5), queue={"heartbeat": "1s"}) as (gateway, _),
        await Wire.to(gateway) as wire,
    ):
        await wire.send(request(PLAIN, f"User-Agent: {agent}"))
        told = await wire.reader.readuntil(b"HTTP/1.1 200 OK\r\n")
        assert told == AGENTS[agent] * 3 + b"HTTP/1.1 200 OK\r\n"
        fields = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"HTTP/" not in fields
        assert await wire.reader.readexactly(len(body)) == body
        assert gateway.now() >= 16
        # Nothing of it comes late, and the connection goes on.
        await asyncio.sleep(5)
        await wire.send(request(PLAIN, f"User-Agent: {agent}"))
        assert await wire.reader.readexactly(2 * len(AGENTS[agent])) == AGENTS[agent] * 2
        assert (await wire.answer()).body == b"{}"


@pytest.mark.parametrize("agent", AGENTS)
async def test_a_connection_goes_on_after_interim_answers_and_the_last_one(
    start: Start, parser: str, agent: str
) -> None:
    async with (
        between(start, *[after(2.5)] * 4, queue={"heartbeat": "1s"}) as (gateway, _),
        await Wire.to(gateway) as wire,
    ):
        for method, body in [("GET", b""), ("POST", b"{}"), ("PUT", b"{}")]:
            await wire.send(request(PLAIN, f"User-Agent: {agent}", method=method, body=body))
            for _ in range(2):
                assert (await wire.answer()).head == AGENTS[agent]
            got = await wire.answer()
            assert (got.status, got.body, got.all("Connection")) == (200, b"{}", [])
            await asyncio.sleep(5)
