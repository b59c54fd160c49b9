"""The wire on upstream's side: a request is sent once, a lost one says how far it came, a key stays with its owner."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp.client_proto
import aiohttp.http_parser
import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult
from fake_vast import Behaviour, FakeVast
from raw import OK, RawUpstream, answer

from proxy.policy.errors import UpstreamError
from proxy.policy.messages import Headers, Request, Response
from proxy.settings import UpstreamRules
from proxy.upstream import Upstream

pytestmark = pytest.mark.looptime

KEY = "THE-KEY-0123456789"
AUTHORIZED: Headers = (("Authorization", f"Bearer {KEY}"), ("Content-Type", "application/json"))
TARGET = f"/api/v0/asks/1/?api_key={KEY}"
MIB = 1024 * 1024


@asynccontextmanager
async def client(url: str, tls: ssl.SSLContext | None = None, **rules: Any) -> AsyncIterator[Upstream]:
    upstream = Upstream(UpstreamRules(**{"api": url, "serverless": url, "hosts": ()} | rules), tls)
    try:
        yield upstream
    finally:
        await upstream.close()


async def send(
    upstream: Upstream,
    method: str = "PUT",
    target: str = TARGET,
    body: bytes = b"{}",
    headers: Headers = AUTHORIZED,
    sent: Callable[[], None] = lambda: None,
) -> Response:
    return await upstream.send(Request(method, target, headers, body), "api", sent)


async def failure(upstream: Upstream, method: str = "PUT") -> UpstreamError:
    """How it fails, which is told without an address, a target or a key."""
    calls: list[int] = []
    with pytest.raises(UpstreamError) as caught:
        await send(upstream, method, sent=lambda: calls.append(1))
    told = str(caught.value)
    assert told
    for secret in (KEY, "127.0.0.1", "localhost", "asks", "http://", "https://"):
        assert secret not in told
    assert bool(calls) == caught.value.sent
    return caught.value


@pytest.fixture(params=["C", "Python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Python":
        monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", aiohttp.http_parser.HttpResponseParserPy)
    return str(request.param)


class Trust:
    """An authority of the test's own, and what it signs."""

    def __init__(self) -> None:
        self.authority = trustme.CA()
        self.client = ssl.create_default_context()
        self.authority.configure_trust(self.client)

    def server(self, *names: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*names).configure_cert(context)
        return context


@pytest.fixture(scope="module")
def trust() -> Trust:
    return Trust()


class Names(AbstractResolver):
    """Every name is this machine, but `lost.test`, which is nowhere."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host == "lost.test":
            raise OSError(None, "Name or service not known")
        numeric = socket.AI_NUMERICHOST
        return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=family, proto=0, flags=numeric)]

    async def close(self) -> None:
        return None


def with_names(upstream: Upstream) -> Upstream:
    connector = upstream._session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    connector._resolver = Names()
    connector._resolver_owner = False
    return upstream


# --- Never twice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH", "OPTIONS"])
async def test_what_is_lost_on_a_fresh_connection_is_not_sent_again(method: str) -> None:
    async with RawUpstream(b"") as server, client(server.url) as upstream:
        lost = await failure(upstream, method)
        await asyncio.sleep(1)
        assert (lost.sent, lost.timed_out) == (True, False)
        assert len(server.seen) == server.accepted == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH", "OPTIONS"])
async def test_what_is_lost_on_a_reused_connection_is_not_sent_again(method: str) -> None:
    async with RawUpstream(OK, b"") as server, client(server.url) as upstream:
        await send(upstream)
        lost = await failure(upstream, method)
        await asyncio.sleep(1)
        assert (lost.sent, lost.timed_out) == (True, False)
        assert (len(server.seen), server.accepted) == (2, 1)


async def test_a_connection_that_upstream_has_closed_is_not_used() -> None:
    async with RawUpstream(OK + RawUpstream.CLOSE) as server, client(server.url) as upstream:
        for _ in range(3):
            await send(upstream)
            await asyncio.sleep(0.01)
        assert (len(server.seen), server.accepted) == (3, 3)


async def test_a_connection_is_kept_for_as_long_as_the_rules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiohttp.connector.monotonic", asyncio.get_running_loop().time)
    async with RawUpstream() as server, client(server.url, keepalive=15.0) as upstream:
        for pause in (14.0, 14.0, 16.0):
            await send(upstream)
            await asyncio.sleep(pause)
        assert server.accepted == 1
        await send(upstream)
        assert server.accepted == 2


async def test_a_cancelled_call_closes_its_connection() -> None:
    left: list[bytes] = []

    async def wait(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left.append(await reader.read())

    async with RawUpstream(wait, OK) as server, client(server.url) as upstream:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(send(upstream), 1)
        await asyncio.sleep(0.01)
        assert left == [b""]
        assert (await send(upstream)).status == 200
        assert server.accepted == 2


# --- How far it came --------------------------------------------------------------------------------------------------


async def test_a_refused_connection_has_sent_nothing() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with client(f"http://127.0.0.1:{closed.getsockname()[1]}") as upstream:
            lost = await failure(upstream)
    assert (lost.sent, lost.timed_out) == (False, False)
    assert "refused" in str(lost)


async def test_a_name_that_is_not_known_has_sent_nothing() -> None:
    async with client("http://lost.test") as upstream:
        lost = await failure(with_names(upstream))
    assert (lost.sent, lost.timed_out) == (False, False)


async def test_a_connection_that_nobody_accepts_times_out_with_nothing_sent() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect(full.getsockname())
        began = asyncio.get_running_loop().time()
        async with client(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=7.0) as upstream:
            lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (False, True)
        assert 6.9 <= asyncio.get_running_loop().time() - began <= 8.1
        for one in waiting:
            one.close()


async def test_a_handshake_that_does_not_end_times_out_with_nothing_sent(trust: Trust) -> None:
    behaviour = Behaviour(handshake_delay=60.0)
    fake = FakeVast(behaviour)
    await fake.start(ssl_context=trust.server("127.0.0.1"))
    async with fake, client(fake.url, trust.client, connect_timeout=5.0) as upstream:
        lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (False, True)
        assert fake.log == []


@pytest.mark.parametrize("tls", [False, True])
async def test_sent_is_told_when_the_connection_stands_and_only_once(trust: Trust, tls: bool) -> None:
    fake = FakeVast(Behaviour(handshake_delay=2.0 if tls else 0.0))
    await fake.start(ssl_context=trust.server("127.0.0.1") if tls else None)
    at: list[float] = []
    loop = asyncio.get_running_loop()
    async with fake, client(fake.url, trust.client) as upstream:
        began = loop.time()
        await send(upstream, sent=lambda: at.append(loop.time()))
        assert len(at) == 1
        assert at[0] - began >= (2.0 if tls else 0.0)
        assert fake.log[0].at >= at[0]
        again = loop.time()
        await send(upstream, sent=lambda: at.append(loop.time()))
        assert at[1] - again < 0.1  # the handshake is not done again
        assert fake.accepted == 1


@pytest.mark.parametrize("flaw", ["unknown authority", "another name"])
async def test_a_certificate_that_cannot_be_trusted_has_sent_nothing(trust: Trust, flaw: str) -> None:
    server = await RawUpstream().start(trust.server("127.0.0.1" if flaw == "unknown authority" else "another.test"))
    tls = None if flaw == "unknown authority" else trust.client
    async with server, client(server.url, tls) as upstream:
        lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (False, False)
        assert "TLS" in str(lost)
        assert server.seen == []


async def test_a_server_that_does_not_speak_tls_has_been_sent_nothing(trust: Trust) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp ready\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, client(f"https://127.0.0.1:{port}", trust.client) as upstream:
        lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (False, False)


@pytest.mark.parametrize("begun", ["", "head", "body"])
async def test_a_silence_that_is_too_long_ends_a_call_that_was_sent(parser: str, begun: str) -> None:
    async def stall(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write({"": b"", "head": b"HTTP/1.1 200 OK\r\n", "body": answer("Content-Length: 9", body=b"{}")}[begun])
        await reader.read()

    async with RawUpstream(stall) as server, client(server.url, read_timeout=30.0) as upstream:
        began = asyncio.get_running_loop().time()
        lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (True, True)
        assert 29 <= asyncio.get_running_loop().time() - began <= 32
        assert len(server.seen) == 1


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_body_that_nobody_reads_is_given_up_as_an_answer_that_does_not_come() -> None:
    over = asyncio.Event()

    async def never_reads(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.transport.abort()

    listener = await asyncio.start_server(never_reads, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    large = Request("PUT", "/api/v0/asks/1/", (), b"x" * 24 * 1024 * 1024)
    try:
        async with asyncio.timeout(1000.0), client(url, read_timeout=30.0) as upstream:
            began = asyncio.get_running_loop().time()
            with pytest.raises(UpstreamError) as lost:
                await upstream.send(large, "api", lambda: None)
            assert (lost.value.sent, lost.value.timed_out) == (True, True)
            assert 29 <= asyncio.get_running_loop().time() - began <= 32
    finally:
        over.set()
        listener.close()


async def test_an_answer_that_goes_on_is_waited_for_however_long_it_takes() -> None:
    async def drip(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for _number in range(10):
            await asyncio.sleep(25)
            writer.write(b"x")

    async with RawUpstream(drip) as server, client(server.url, read_timeout=30.0) as upstream:
        assert (await send(upstream)).body == b"x" * 10


def _reset_with(begun: bytes) -> Callable[..., Any]:
    async def reset(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        await asyncio.sleep(0.01)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return reset


BROKEN: dict[str, Any] = {
    "closed": b"",
    "reset": _reset_with(b""),
    "reset in the head": _reset_with(b"HTTP/1.1 200 OK\r\nConte"),
    "reset in the body": _reset_with(answer("Content-Length: 9", body=b"{}")),
    "closed in the head": b"HTTP/1.1 200 OK\r\nConte" + RawUpstream.CLOSE,
    "closed in the body": answer("Content-Length: 9", body=b"{}") + RawUpstream.CLOSE,
    "closed in the chunks": answer("Transfer-Encoding: chunked", body=b"9\r\n{}") + RawUpstream.CLOSE,
    "closed before the last chunk": answer("Transfer-Encoding: chunked", body=b"2\r\n{}\r\n") + RawUpstream.CLOSE,
    "garbage": b"\x00\xff garbage \r\n\r\n" + RawUpstream.CLOSE,
    "no status line": b"Content-Length: 2\r\n\r\n{}" + RawUpstream.CLOSE,
    "a body alone": b'{"success": true}' + RawUpstream.CLOSE,
    "a status of letters": b"HTTP/1.1 abc OK\r\n\r\n" + RawUpstream.CLOSE,
    "a header too long": answer("X-A: " + "x" * 70_000) + RawUpstream.CLOSE,
    "too many headers": answer(*(f"X-{n}: a" for n in range(1000))) + RawUpstream.CLOSE,
    "two lengths": answer("Content-Length: 2", "Content-Length: 3", body=b"{} ") + RawUpstream.CLOSE,
    "a negative length": answer("Content-Length: -2", body=b"{}") + RawUpstream.CLOSE,
    "a bad chunk": answer("Transfer-Encoding: chunked", body=b"zz\r\n{}") + RawUpstream.CLOSE,
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_an_answer_that_is_none_says_that_the_request_was_sent(parser: str, name: str) -> None:
    async with RawUpstream(BROKEN[name]) as server, client(server.url) as upstream:
        lost = await failure(upstream)
        assert (lost.sent, lost.timed_out) == (True, False)
        assert len(server.seen) == 1
        server.answers[:] = [OK]
        await asyncio.sleep(0.01)
        assert (await send(upstream)).status == 200  # and what is left of it harms nobody
        assert server.accepted == 2


async def test_headers_as_large_as_those_of_a_talkative_api_are_taken(parser: str) -> None:
    told = answer(*(f"X-{n}: {'x' * 500}" for n in range(100)), f"X-Long: {'x' * 60_000}", body=b"{}")
    async with RawUpstream(told) as server, client(server.url) as upstream:
        assert len((await send(upstream)).headers) == 102


# --- Large answers ----------------------------------------------------------------------------------------------------


async def test_the_rest_of_a_large_answer_is_read_on_demand_and_its_end_is_told_once(parser: str) -> None:
    whole = bytes(range(256)) * 12 * 1024
    async with RawUpstream(answer(body=whole), OK) as server, client(server.url) as upstream:
        response = await send(upstream)
        assert response.rest is not None
        ends: list[str] = []
        response.rest.on_close(lambda: ends.append("end"))
        read = [chunk async for chunk in response.rest]
        assert response.body + b"".join(read) == whole
        response.rest.close()
        assert ends == ["end"]
        assert (await send(upstream)).status == 200
        assert server.accepted == 1  # read to its end, the connection serves again


async def test_a_large_answer_that_is_given_up_takes_its_connection_with_it() -> None:
    async with RawUpstream(answer(body=b"x" * 8 * MIB), OK) as server, client(server.url) as upstream:
        response = await send(upstream)
        assert response.rest is not None
        ends: list[str] = []
        response.rest.on_close(lambda: ends.append("end"))
        response.rest.close()
        response.rest.close()
        assert ends == ["end"]
        assert (await send(upstream)).body == b"{}"
        assert server.accepted == 2


@pytest.mark.parametrize("how", ["closed", "reset", "silent"])
async def test_the_rest_of_a_large_answer_that_is_lost_says_so(how: str) -> None:
    async def part(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (3 * MIB) + b"x" * 2 * MIB)
        await writer.drain()
        if how == "reset":
            await _reset_with(b"")(_, reader, writer)
        elif how == "silent":
            await reader.read()

    async with RawUpstream(part) as server, client(server.url, read_timeout=10.0) as upstream:
        response = await send(upstream)
        assert response.rest is not None
        ends: list[str] = []
        response.rest.on_close(lambda: ends.append("end"))
        with pytest.raises(UpstreamError) as caught:
            async for _chunk in response.rest:
                pass
        assert (caught.value.sent, caught.value.timed_out) == (True, how == "silent")
        assert ends == ["end"]


# --- Redirects --------------------------------------------------------------------------------------------------------


def moved(status: int, location: str | None, body: bytes = b"") -> bytes:
    lines = [f"Location: {location}"] if location is not None else []
    return answer(*lines, body=body, status=f"{status} Moved")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
async def test_a_redirect_on_the_same_host_is_followed_with_everything(status: int, method: str) -> None:
    async with RawUpstream(moved(status, "/new/?x=%3A:"), OK) as server, client(server.url) as upstream:
        response = await send(upstream, method, body=b'{"a":  1}')
        assert response.status == 200
        first, second = server.seen
        assert second.line == f"{method} /new/?x=%3A: HTTP/1.1"
        assert (second.body, second.fields) == (first.body, first.fields)
        assert second.all("Authorization") == [f"Bearer {KEY}"]
        assert server.accepted == 1


@pytest.mark.parametrize(("method", "then"), [("POST", "GET"), ("PUT", "GET"), ("HEAD", "HEAD"), ("GET", "GET")])
async def test_see_other_becomes_a_get_without_a_body(method: str, then: str) -> None:
    body = b"{}" if method != "HEAD" else b""
    async with RawUpstream(moved(303, "/seen/"), OK) as server, client(server.url) as upstream:
        if method == "HEAD":
            server.answers[1] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        assert (await send(upstream, method, body=body)).status == 200
        assert server.seen[1].line == f"{then} /seen/ HTTP/1.1"
        assert server.seen[1].body == b""
        assert server.seen[1].all("Authorization") == [f"Bearer {KEY}"]
        if then == "GET":
            assert server.seen[1].all("Content-Type") == server.seen[1].all("Content-Length") == []


@pytest.mark.parametrize("host", ["vendor.test", "api.vendor.test", "a.b.vendor.test", "API.Vendor.TEST"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_to_the_vendors_domain_is_followed_with_the_key(trust: Trust, host: str, status: int) -> None:
    there = await RawUpstream().start(trust.server(host.lower()))
    here = await RawUpstream(moved(status, f"https://{host}:{there.port}/there/?x")).start()
    async with here, there, client(here.url, trust.client, hosts=("vendor.test",)) as upstream:
        assert (await send(with_names(upstream))).status == 200
        (seen,) = there.seen
        assert (seen.line, seen.body) == ("PUT /there/?x HTTP/1.1", b"{}")
        assert seen.all("Authorization") == [f"Bearer {KEY}"]
        assert [value.lower() for value in seen.all("Host")] == [f"{host.lower()}:{there.port}"]
        assert [str(name).lower() for name in there.names] == [host.lower()]


@pytest.mark.parametrize(
    "location",
    [
        "https://evil.test:PORT/x",
        "https://evilvendor.test:PORT/x",
        "https://vendor.test.evil.test:PORT/x",
        "https://vendor.test@evil.test:PORT/x",
        "https://evil.test:PORT/vendor.test",
        "https://evil.test:PORT\\@vendor.test/x",
        "https://user:pass@vendor.test:PORT/x",
        "//evil.test:PORT/x",
        "http://vendor.test:PORT/x",
        "http://127.0.0.1:PORT/x",
        "https://vendor.test:PORT/x#fragment",
        "ftp://vendor.test/x",
        "https://[::1/x",
        "https://vendor.test:99999/x",
        "https:///x",
        "javascript:alert(1)",
        "",
        None,
    ],
)
@pytest.mark.parametrize("status", [301, 307])
async def test_any_other_redirect_is_handed_out_untouched_and_nobody_gets_the_key(
    trust: Trust, location: str | None, status: int
) -> None:
    names = ("evil.test", "evilvendor.test", "vendor.test.evil.test", "vendor.test", "127.0.0.1")
    there = await RawUpstream().start(trust.server(*names))
    where = location.replace("PORT", str(there.port)) if location is not None else None
    here = await RawUpstream(moved(status, where, b"gone there")).start()
    async with here, there, client(here.url, trust.client, hosts=("vendor.test",)) as upstream:
        response = await send(with_names(upstream))
        assert (response.status, response.reason, response.body) == (status, "Moved", b"gone there")
        assert [value for name, value in response.headers if name == "Location"] == ([] if where is None else [where])
        assert (there.seen, there.names, len(here.seen)) == ([], [], 1)


async def test_no_redirect_leads_from_https_to_http_even_on_the_same_host(trust: Trust) -> None:
    plain = await RawUpstream().start()
    here = await RawUpstream().start(trust.server("vendor.test"))
    here.answers[:] = [moved(307, f"http://vendor.test:{plain.port}/")]
    async with (
        plain,
        here,
        client(f"https://vendor.test:{here.port}", trust.client, hosts=("vendor.test",)) as upstream,
    ):
        assert (await send(with_names(upstream))).status == 307
        assert plain.seen == []


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("ORIGIN", "/"),
        ("ORIGIN?x=1", "/?x=1"),
        ("other/", "/api/v0/asks/1/other/"),
        ("../2/", "/api/v0/asks/2/"),
        ("?page=2", "/api/v0/asks/1/?page=2"),
        ("/a b/\u00c3\u00a9?q=%22:\u00e9", "/a%20b/%C3%A9?q=%22:%E9"),
        ("/a%2Fb/%3A:/{}", "/a%2Fb/%3A:/%7B%7D"),
    ],
)
async def test_a_location_is_resolved_and_what_may_not_stand_in_it_is_encoded(location: str, target: str) -> None:
    async with RawUpstream(OK) as server, client(server.url) as upstream:
        server.answers[:] = [moved(307, location.replace("ORIGIN", server.url)), OK]
        assert (await send(upstream)).status == 200
        assert server.seen[1].target == target


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_redirects_in_a_circle_end(method: str) -> None:
    async with RawUpstream(moved(307, "/round/")) as server, client(server.url) as upstream:
        lost = await failure(upstream, method)
        assert (lost.sent, lost.timed_out) == (True, False)
        assert len(server.seen) == 5


async def test_a_large_body_of_a_redirect_is_not_read() -> None:
    large = moved(307, "/new/", b"x" * 4 * MIB)
    async with RawUpstream(large, OK) as server, client(server.url) as upstream:
        assert (await send(upstream)).body == b"{}"
        assert server.accepted == 2


async def test_a_call_that_was_redirected_counts_as_sent_though_its_next_hop_was_not() -> None:
    async with RawUpstream() as server, client(server.url, hosts=("lost.test",)) as upstream:
        server.answers[:] = [moved(307, "https://lost.test/new/")]
        assert (await failure(with_names(upstream))).sent
        assert len(server.seen) == 1


async def test_sent_is_told_for_every_hop() -> None:
    told: list[int] = []
    async with RawUpstream(moved(307, "/new/"), OK) as server, client(server.url) as upstream:
        await send(upstream, sent=lambda: told.append(len(server.seen)))
        assert told == [0, 1]


# --- Nothing of the machine's own -------------------------------------------------------------------------------------


async def test_neither_a_netrc_nor_a_proxy_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with RawUpstream() as server, client(server.url) as upstream:
        await send(upstream, "GET", "/x", b"", ())
        assert server.seen[0].fields == [("Host", f"127.0.0.1:{server.port}")]


async def test_a_cookie_that_is_set_is_not_sent_back() -> None:
    told = answer("Set-Cookie: a=1; Path=/", body=b"{}")
    async with RawUpstream(told) as server, client(f"http://vendor.test:{server.port}") as upstream:
        for _ in range(2):
            await send(with_names(upstream))
        assert [seen.all("Cookie") for seen in server.seen] == [[], []]


async def test_each_upstream_has_its_own_origin() -> None:
    async with RawUpstream() as api, RawUpstream() as engine, client(api.url, serverless=engine.url) as upstream:
        await upstream.send(Request("GET", "/a", ()), "api", lambda: None)
        await upstream.send(Request("POST", "/route/", (), b"{}"), "serverless", lambda: None)
        assert [seen.line for seen in api.seen + engine.seen] == ["GET /a HTTP/1.1", "POST /route/ HTTP/1.1"]


async def test_calls_do_not_wait_for_each_others_connections() -> None:
    gate = asyncio.Event()

    async def wait(server: RawUpstream, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(server.seen) == 150:
            gate.set()
        async with asyncio.timeout(60):
            await gate.wait()
        writer.write(OK)

    async with RawUpstream(wait) as server, client(server.url) as upstream:
        answers = await asyncio.gather(*(send(upstream) for _ in range(150)))
        assert {response.status for response in answers} == {200}


async def test_a_trailer_of_one_answer_is_not_part_of_the_next_ones(parser: str) -> None:
    trailed = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Other: secret\r\n\r\n"
    async with RawUpstream(trailed, OK) as server, client(server.url) as upstream:
        first, second = await send(upstream, "GET"), await send(upstream, "GET")
    assert server.accepted == 1
    assert first.body == b"abc"
    assert not any(name == "X-Other" for name, _ in (*first.headers, *second.headers))


@pytest.mark.parametrize("coding", ["gzip, chunked", "gzip", "identity"])
async def test_an_answer_with_another_transfer_coding_than_chunked_is_none(coding: str, parser: str) -> None:
    body = b"2\r\n{}\r\n0\r\n\r\n"
    sent = answer(f"Transfer-Encoding: {coding}", body=body) + RawUpstream.CLOSE
    async with RawUpstream(sent) as upstream, client(upstream.url) as calls:
        assert (await failure(calls)).sent


async def test_the_answer_of_another_target_says_so() -> None:
    found = answer("Location: /x", status="307 Temporary Redirect")
    async with RawUpstream(OK, found, answer(status="404 Not Found")) as upstream, client(upstream.url) as calls:
        assert [(await send(calls)).redirected for _ in range(2)] == [False, True]
