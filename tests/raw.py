"""Both ends of the wire in bytes: an upstream that says what it is told to, and a client that writes what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

PATIENCE = 300.0
"""Seconds after which a client in a test gives up; virtual ones cost nothing."""


@dataclass(slots=True)
class Seen:
    """One request as it stood on the wire."""

    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n")[0].decode("latin-1")

    @property
    def target(self) -> str:
        return self.line.split(" ", 1)[1].rsplit(" ", 1)[0]

    @property
    def fields(self) -> list[tuple[str, str]]:
        return fields(self.head)

    def all(self, name: str) -> list[str]:
        """Every value of a field, its name in any case."""
        return [value for key, value in self.fields if key.lower() == name.lower()]


@dataclass(slots=True)
class Got:
    """One answer as it stood on the wire."""

    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def fields(self) -> list[tuple[str, str]]:
        return fields(self.head)

    def all(self, name: str) -> list[str]:
        """Every value of a field, its name in any case."""
        return [value for key, value in self.fields if key.lower() == name.lower()]


Script = Callable[["RawUpstream", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawUpstream:
    """Answers each request with the next of `answers`, the last one for ever. Has seen every byte.

    An answer is bytes (sent as they are), or a coroutine function that does with the connection what it likes. `b""`
    closes the connection. An answer that ends with `CLOSE` is followed by the end of the connection.
    """

    CLOSE = b"<then close>"

    def __init__(self, *answers: bytes | Script) -> None:
        self.answers = list(answers) or [OK]
        self.seen: list[Seen] = []
        self.accepted = 0
        self.behaviour: Any = None  # stands where FakeVast does
        self.url = ""
        self.port = 0
        self.names: list[str | None] = []
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, tls: ssl.SSLContext | None = None) -> Self:
        if tls is not None:
            tls.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls, limit=2**20, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if tls is not None else 'http'}://127.0.0.1:{self.port}"
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=1)
            assert not stuck, "a script that does not end with its connection"

    async def __aenter__(self) -> Self:
        return self if self._server else await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            writer.close()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head, body = await read_message(reader)
        self.seen.append(Seen(head, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not isinstance(answer, bytes):
            await answer(self, reader, writer)
            return False
        writer.write(answer.removesuffix(self.CLOSE))
        await writer.drain()
        return bool(answer) and not answer.endswith(self.CLOSE)


class Wire:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, gateway: Any, **more: Any) -> Self:
        listen = gateway.app.address
        return cls(*await asyncio.open_connection(listen.host, listen.port, limit=2**26, **more))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self, *, to: str = "GET") -> Got:
        """The next answer; one to a HEAD has no body."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            if to == "HEAD" or status < 200 or status in (204, 304):
                return Got(head, b"")
            return Got(head, await read_body(self.reader, head, to_end=True))

    async def ask(self, data: bytes, *, to: str = "GET") -> Got:
        await self.send(data)
        return await self.answer(to=to)

    async def rest(self) -> bytes:
        """All that comes until the other side closes, which it must."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.read(-1)
        except ConnectionError:
            return b""


def fields(head: bytes) -> list[tuple[str, str]]:
    """The fields of a head, in order and spelling."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(": ") for line in lines if line)
    return [(name, value) for name, _, value in pairs]


def request(
    target: str = "/api/v0/x/",
    *lines: str,
    method: str = "GET",
    body: bytes = b"",
    version: str = "1.1",
    host: str = "proxy",
) -> bytes:
    """A request with these header lines; the length is added when there is a body and no line says how long it is."""
    head = [f"{method} {target} HTTP/{version}", f"Host: {host}", *lines]
    if body and not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def answer(*lines: str, body: bytes = b"", status: str = "200 OK") -> bytes:
    """An answer with these header lines; the length is added as for `request`."""
    head = [f"HTTP/1.1 {status}", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    return head, await read_body(reader, head, to_end=False)


async def read_body(reader: asyncio.StreamReader, head: bytes, *, to_end: bool) -> bytes:
    """The body after a head, its chunks put together; one of no stated length is empty, or lasts `to_end`."""
    named = {name.lower(): value for name, value in fields(head)}
    if named.get("transfer-encoding") == "chunked":
        chunks = []
        while size := int(await reader.readline(), 16):
            chunks.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(chunks)
    if "content-length" in named:
        return await reader.readexactly(int(named["content-length"]))
    return await reader.read(-1) if to_end else b""
