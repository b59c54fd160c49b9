"""The wire on the clients' side: what passes untouched, what is refused, what the proxy says when it fails itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import Gateway, Start, clean_environment
from fake_vast import Behaviour, FakeVast, Fault
from raw import OK, Got, RawUpstream, Wire, answer, fields, request

from proxy.admin import Events
from proxy.server import Server

pytestmark = pytest.mark.looptime

MIB = 1024 * 1024
PLAIN = "/api/v0/nobody/knows/this/"
SHARED = "/api/v0/gpu_names/unique/"
"""An endpoint whose answers are stored and shared."""


@asynccontextmanager
async def between(start: Start, *answers: Any, **given: Any) -> AsyncIterator[tuple[Gateway, RawUpstream]]:
    """A proxy without limits in front of an upstream that says just this."""
    async with RawUpstream(*answers) as upstream:
        yield await start(fake=upstream, limits={"scale": 1e-6, "global": None}, **given), upstream


async def ask(gateway: Gateway, data: bytes, *, to: str = "GET") -> Got:
    async with await Wire.to(gateway) as wire:
        return await wire.ask(data, to=to)


def events(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the proxy logged, and not a library about this machine."""
    return [record for record in caplog.records if record.name.startswith(("proxy", "asyncio", "aiohttp"))]


def is_ours(got: Got) -> bool:
    """Is it JSON as the clients understand it, from us?"""
    told = json.loads(got.body)
    assert told["success"] is False
    assert told["msg"]
    assert told["error"]
    assert got.all("Content-Type") == ["application/json"]
    return True


# --- A request passes as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "REPORT", "PURGE"])
async def test_any_method_passes(start: Start, parser: str, method: str) -> None:
    async with between(start) as (gateway, upstream):
        got = await ask(gateway, request(PLAIN, method=method))
        assert (got.status, got.body) == (200, b"{}")
        assert [seen.line for seen in upstream.seen] == [f"{method} {PLAIN} HTTP/1.1"]


@pytest.mark.parametrize(
    "target",
    [
        "/a?q=%3A+%22",
        "/a?q=:+%22:",
        "/a?api%5Fkey=k",
        "/a/../b",
        "/a/./b",
        "/a//b",
        "/a//b/../c?x=//",
        "/a?",
        "/a??",
        "/a;b;c=d",
        "/a|b?c|d",
        "/%2e%2e/%2F/%00/%zz/%",
        "/{a}[b]^`\\'\"<>",
        "/a?x=1&x=1&&=&;",
        "/?",
        "/",
        "/_proxyfoo",
        "/%5fproxy/status",
        "/a:80@b/",
        "/" + "x" * 30_000,
    ],
)
async def test_a_target_passes_untouched(start: Start, parser: str, target: str) -> None:
    async with between(start) as (gateway, upstream):
        got = await ask(gateway, request(target))
        assert got.status == 200
        assert [seen.target for seen in upstream.seen] == [target]


@pytest.mark.parametrize("slashes", ["//", "///", "////"])
async def test_of_slashes_at_the_beginning_one_is_left(start: Start, parser: str, slashes: str) -> None:
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(f"{slashes}api/v0/a//b/"))
        assert [seen.target for seen in upstream.seen] == ["/api/v0/a//b/"]


async def test_an_absolute_target_that_names_this_proxy_is_taken(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream):
        for target in (f"http://{gateway.app.address}/a?b", f"HTTP://localhost:{gateway.app.address.port}/a?b"):
            assert (await ask(gateway, request(target))).status == 200
        assert [seen.target for seen in upstream.seen] == ["/a?b"] * 2


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
async def test_a_method_that_seldom_has_a_body_passes_with_it(start: Start, parser: str, method: str) -> None:
    body = b'{"filter": {"a":  1}}'
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, "Content-Type: application/json", method=method, body=body))
        assert [(seen.body, seen.all("Content-Length")) for seen in upstream.seen] == [(body, [str(len(body))])]


async def test_headers_of_a_request_keep_their_order_repetition_and_spelling(start: Start, parser: str) -> None:
    lines = [
        "x-b: 1",
        "X-A: 2",
        "x-b: 3",
        "X-UTF: \u00c3\u00a9",
        "Cookie: a=1",
        "Cookie: b=2",
        "X-Empty: ",
        "x-b: 4,  5",
    ]
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, *lines))
        passed = [f"{name}: {value}" for name, value in upstream.seen[0].fields if name != "Host"]
        assert passed == lines


async def test_a_header_repeated_in_another_spelling_loses_no_value(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, "Cookie: a=1", "cookie: b=2", "X-A: 1", "COOKIE: c=3", "x-a: 2"))
        assert upstream.seen[0].all("Cookie") == ["a=1", "b=2", "c=3"]
        assert upstream.seen[0].all("X-A") == ["1", "2"]


async def test_nothing_is_added_to_a_request_but_host_and_length(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN))
        await ask(gateway, request(PLAIN, method="POST", body=b"{}"))
        assert upstream.seen[0].fields == [("Host", f"127.0.0.1:{upstream.port}")]
        assert sorted(upstream.seen[1].fields) == [("Content-Length", "2"), ("Host", f"127.0.0.1:{upstream.port}")]


async def test_host_and_sni_are_the_upstreams(start: Start) -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    upstream = await RawUpstream().start(server)
    upstream.url = f"https://localhost:{upstream.port}"
    async with upstream:
        gateway = await start(fake=upstream, client_tls=client, hosts=["proxy.example"])
        got = await ask(gateway, request(PLAIN, host="proxy.example:1234"))
        assert got.status == 200
        assert upstream.seen[0].all("Host") == [f"localhost:{upstream.port}"]
        assert upstream.names == ["localhost"]


async def test_hop_by_hop_fields_of_a_request_end_here(start: Start, parser: str) -> None:
    lines = [
        "Connection: keep-alive, X-Private , TE",
        "connection: x-OTHER",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic eDp5",
        "TE: trailers",
        "Trailer: X-T",
        "X-Private: 1",
        "x-private: 2",
        "X-Other: 3",
        "X-Kept: 4",
    ]
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, *lines))
        assert [name for name, _ in upstream.seen[0].fields] == ["Host", "X-Kept"]


async def test_who_names_the_key_in_connection_goes_on_without_it_and_is_nobody(start: Start, parser: str) -> None:
    mine = answer("Content-Type: application/json", body=b'{"gpu_names": ["mine"]}')
    theirs = answer("Content-Type: application/json", body=b'{"gpu_names": ["theirs"]}')
    async with between(start, mine, theirs) as (gateway, upstream):
        target = "/api/v0/users/current/"
        await ask(gateway, request(target, "Authorization: Bearer secret"))
        got = await ask(gateway, request(target, "Authorization: Bearer secret", "Connection: Authorization"))
        assert upstream.seen[1].all("Authorization") == []
        assert got.body == b'{"gpu_names": ["theirs"]}'  # not what was stored for the key


async def test_connection_takes_nothing_away_that_the_proxy_adds(start: Start, parser: str) -> None:
    named = "Connection: close, Host, Content-Length, Cache-Status, Server-Timing, Age, Content-Type"
    told = answer(named, "Content-Type: a/b", body=b"12345")
    async with between(start, told) as (gateway, upstream):
        got = await ask(gateway, request(PLAIN, named, method="POST", body=b"{}"))
        assert upstream.seen[0].all("Host") == [f"127.0.0.1:{upstream.port}"]
        assert upstream.seen[0].all("Content-Length") == ["2"]
        assert upstream.seen[0].body == b"{}"
        assert got.all("Content-Length") == ["5"]
        assert got.all("Content-Type") == []
        assert len(got.all("Cache-Status")) == len(got.all("Server-Timing")) == 1
        assert got.all("Connection") == ["close"]  # ours, for the client asked for it


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=UTF-8", 'A/b;x="y"', ""])
async def test_a_content_type_is_not_touched_either_way(start: Start, parser: str, kind: str) -> None:
    lines = [f"Content-Type: {kind}"] if kind else []
    async with between(start, answer(*lines, body=b"{}")) as (gateway, upstream):
        got = await ask(gateway, request(PLAIN, *lines, method="POST", body=b"{}"))
        assert upstream.seen[0].all("Content-Type") == got.all("Content-Type") == ([kind] if kind else [])


@pytest.mark.parametrize("coding", ["gzip", "br", "x-nobody"])
async def test_a_coded_body_of_a_request_passes_as_the_same_bytes(start: Start, parser: str, coding: str) -> None:
    body = gzip.compress(b'{"a": 1}') if coding == "gzip" else b"\x00\xff\x80"
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, f"Content-Encoding: {coding}", method="POST", body=body))
        assert (upstream.seen[0].body, upstream.seen[0].all("Content-Encoding")) == (body, [coding])


async def test_a_chunked_body_of_a_request_passes_whole_and_with_a_length(start: Start, parser: str) -> None:
    chunked = b"3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nX-Trailer: 1\r\n\r\n"
    async with between(start) as (gateway, upstream):
        await ask(gateway, request(PLAIN, "Transfer-Encoding: chunked", method="POST") + chunked)
        async with await Wire.to(gateway) as wire:
            for byte in request(PLAIN, "Transfer-Encoding: chunked", method="PUT") + chunked:
                await wire.send(bytes([byte]))
            await wire.answer()
        assert [seen.body for seen in upstream.seen] == [b"abcd"] * 2
        assert [seen.all("Content-Length") for seen in upstream.seen] == [["4"]] * 2
        assert {name for seen in upstream.seen for name, _ in seen.fields} == {"Host", "Content-Length"}


async def test_a_trailer_does_not_become_part_of_the_next_request(start: Start, parser: str) -> None:
    chunked = b"1\r\nd\r\n0\r\nAuthorization: Bearer somebody\r\n\r\n"
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN, "Transfer-Encoding: chunked", method="POST") + chunked + request(PLAIN))
        assert (got.status, got.all("Connection")) == (200, ["close"])
        assert await wire.rest() == b""
        assert [seen.all("Authorization") for seen in upstream.seen] == [[]]


async def test_a_trailer_of_a_request_for_our_own_pages_does_not_either(start: Start, parser: str) -> None:
    chunked = b"0\r\nX-Request-ID: forged\r\n\r\n"
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        got = await wire.ask(request("/_proxy/health", "Transfer-Encoding: chunked") + chunked + request(PLAIN))
        assert (got.status, got.all("Connection")) == (200, ["close"])
        assert await wire.rest() == b""
        assert upstream.seen == []


async def test_no_cookie_is_kept_for_the_next_caller(start: Start) -> None:
    upstream = await RawUpstream(answer("Set-Cookie: session=a; Path=/", "Set-Cookie: other=b", body=b"{}")).start()
    upstream.url = f"http://localhost:{upstream.port}"  # a jar keeps nothing of an address
    async with upstream:
        gateway = await start(fake=upstream, limits={"scale": 1e-6, "global": None})
        got = await ask(gateway, request(PLAIN, "Authorization: Bearer a"))
        assert got.all("Set-Cookie") == ["session=a; Path=/", "other=b"]
        await ask(gateway, request(PLAIN, "Authorization: Bearer b"))
        await ask(gateway, request(PLAIN, "Authorization: Bearer b", "Cookie: mine=1"))
        assert [seen.all("Cookie") for seen in upstream.seen] == [[], [], ["mine=1"]]


# --- Expect, and how large a body may be ------------------------------------------------------------------------------


async def test_expect_is_answered_here_and_not_passed_on(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, "Expect: 100-continue", "Content-Length: 2", method="PUT"))
        assert (await wire.answer()).head == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert upstream.seen == []
        await wire.send(b"{}")
        assert (await wire.answer()).status == 200
        assert (upstream.seen[0].body, upstream.seen[0].all("Expect")) == (b"{}", [])


async def test_a_body_that_is_too_large_is_refused_without_100(start: Start, parser: str) -> None:
    async with between(start, server={"max_body": 1000}) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, "Expect: 100-continue", "Content-Length: 1001", method="PUT"))
        got = await wire.answer()
        assert got.status == 413
        assert is_ours(got)
        assert got.all("Connection") == ["close"]
        assert await wire.rest() == b""
        assert upstream.seen == []


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_passes(
    start: Start, parser: str, framing: str
) -> None:
    def sized(size: int) -> bytes:
        if framing == "length":
            return request(PLAIN, method="POST", body=b"x" * size)
        halves = b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in (b"x" * 500, b"x" * (size - 500)))
        return request(PLAIN, "Transfer-Encoding: chunked", method="POST") + halves + b"0\r\n\r\n"

    async with between(start, server={"max_body": 1000}) as (gateway, upstream):
        got = await ask(gateway, sized(1001))
        assert got.status == 413
        assert is_ours(got)
        assert json.loads(got.body)["error"] == "body_too_large"
        assert upstream.seen == []
        assert (await ask(gateway, sized(1000))).status == 200
        assert len(upstream.seen[0].body) == 1000


async def test_a_body_that_never_ends_is_not_read_beyond_the_limit(start: Start) -> None:
    async with between(start, server={"max_body": 1000}) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(request(PLAIN, "Transfer-Encoding: chunked", method="POST"))
        for _ in range(3):
            await wire.send(b"1f4\r\n" + b"x" * 500 + b"\r\n")
        assert (await wire.answer()).status == 413
        assert await wire.rest() == b""  # after a moment of grace, also when more could come
        assert upstream.seen == []


# --- An answer passes as it is ----------------------------------------------------------------------------------------

_OURS = ("X-Request-ID", "Cache-Status", "Server-Timing")


async def test_headers_of_an_answer_keep_their_order_repetition_spelling_and_bytes(start: Start, parser: str) -> None:
    lines = [
        "Set-Cookie: a=1; Path=/",
        "link: <a>; rel=x",
        "Set-Cookie: b=2",
        "Link: <b>",
        "X-Latin: caf\u00e9 \u00ff",
        "x-rAtElImIt: 1,  2",
        "Content-Length: 2",
    ]
    async with between(start, answer(*lines, body=b"{}")) as (gateway, _):
        got = await ask(gateway, request(PLAIN))
        assert [f"{name}: {value}" for name, value in got.fields if name not in _OURS] == lines


async def test_hop_by_hop_fields_of_an_answer_end_here(start: Start, parser: str) -> None:
    lines = [
        "Connection: X-Private, close",
        "Keep-Alive: 5",
        "Proxy-Authenticate: Basic",
        "Trailer: X-T",
        "Upgrade: h2,h2c",
        "X-Private: 1",
        "X-Kept: 2",
        "Content-Length: 2",
    ]
    async with between(start, answer(*lines, body=b"{}") + RawUpstream.CLOSE) as (gateway, _):
        got = await ask(gateway, request(PLAIN))
        assert [name for name, _ in got.fields if name not in _OURS] == ["X-Kept", "Content-Length"]


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "gzip, gzip", "x-nobody", "identity", "zstd"])
@pytest.mark.parametrize("target", [PLAIN, SHARED])
async def test_a_coded_body_of_an_answer_passes_byte_for_byte(
    start: Start, parser: str, coding: str, target: str
) -> None:
    body = gzip.compress(b'{"gpu_names": ["a"]}')
    if coding == "gzip, gzip":
        body = gzip.compress(body)
    elif coding != "gzip":
        body = b"\x00\xff not really coded \r\n\r\n"
    told = answer("Content-Type: application/json", f"Content-Encoding: {coding}", body=body)
    async with between(start, told) as (gateway, _):
        got = await ask(gateway, request(target, f"Accept-Encoding: {coding}"))
        assert got.body == body
        assert got.all("Content-Encoding") == [coding]
        assert got.all("Content-Length") == [str(len(body))]


@pytest.mark.parametrize(
    "line", ["200 Fine", "404 Nix da", "299 Odd", "599 X", "418 I'm a teapot", "200 \u017dlu\u0165", "200 O\u00f9"]
)
async def test_status_and_reason_pass_as_they_are(start: Start, parser: str, line: str) -> None:
    raw = line.encode("utf-8" if "\u017d" in line else "latin-1")
    async with between(start, b"HTTP/1.1 " + raw + b"\r\nContent-Length: 2\r\n\r\n{}") as (gateway, _):
        got = await ask(gateway, request(PLAIN, method="POST"))
        assert got.head.split(b"\r\n")[0] == b"HTTP/1.1 " + raw
        assert got.body == b"{}"


async def test_an_answer_to_head_keeps_its_length_and_has_no_body(start: Start, parser: str) -> None:
    told = b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nContent-Encoding: gzip\r\n\r\n"
    async with between(start, told) as (gateway, upstream), await Wire.to(gateway) as wire:
        for _ in range(2):
            got = await wire.ask(request(PLAIN, method="HEAD"), to="HEAD")
            assert (got.status, got.all("Content-Length")) == (200, ["12345"])
        assert [seen.line.split()[0] for seen in upstream.seen] == ["HEAD"] * 2
        assert upstream.accepted == 1


async def test_an_answer_to_head_may_lie_about_a_large_body(start: Start) -> None:
    told = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"
    async with between(start, told) as (gateway, _), await Wire.to(gateway) as wire:
        for _ in range(2):
            got = await wire.ask(request(PLAIN, method="HEAD"), to="HEAD")
            assert got.all("Content-Length") == ["99999999"]


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_without_a_body_is_not_given_one(start: Start, parser: str, status: str) -> None:
    told = f'HTTP/1.1 {status}\r\nETag: "x"\r\n\r\n'.encode()
    async with between(start, told) as (gateway, upstream), await Wire.to(gateway) as wire:
        for _ in range(2):
            got = await wire.ask(request(PLAIN, 'If-None-Match: "x"'))
            assert got.head.startswith(b"HTTP/1.1 " + status.encode())
            assert got.all("ETag") == ['"x"']
            assert got.all("Content-Length") == got.all("Transfer-Encoding") == []
        assert upstream.accepted == 1


@pytest.mark.parametrize(
    "line",
    [
        "Range: bytes=0-9",
        'If-None-Match: "x"',
        "If-Modified-Since: Thu, 01 Jan 2026 00:00:00 GMT",
        'If-Range: "x"',
        'If-Match: "x"',
    ],
)
async def test_a_conditional_or_partial_request_is_neither_stored_nor_shared(start: Start, line: str) -> None:
    partial = answer("Content-Type: application/json", body=b'{"gpu_names": ["part"]}')
    whole = answer("Content-Type: application/json", body=b'{"gpu_names": ["whole"]}')
    async with between(start, partial, partial, partial, whole) as (gateway, upstream):
        got = await asyncio.gather(*(ask(gateway, request(SHARED, line)) for _ in range(2)))
        got += [await ask(gateway, request(SHARED, line))]
        assert [one.body for one in got] == [b'{"gpu_names": ["part"]}'] * 3
        assert [f"{seen.fields[-1][0]}: {seen.fields[-1][1]}" for seen in upstream.seen] == [line] * 3
        assert (await ask(gateway, request(SHARED))).body == b'{"gpu_names": ["whole"]}'


async def test_interim_answers_of_upstream_are_passed_over(start: Start, parser: str) -> None:
    early = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    )
    async with between(start, early + OK) as (gateway, _):
        got = await ask(gateway, request(PLAIN))
        assert (got.status, got.body, got.all("Link")) == (200, b"{}", [])


async def test_an_upstream_that_switches_protocols_is_not_followed(start: Start, parser: str) -> None:
    switched = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw"
    async with between(start, switched) as (gateway, _):
        got = await ask(gateway, request(PLAIN, "Upgrade: websocket", "Connection: upgrade"))
        assert got.status == 503
        assert is_ours(got)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_answer_that_ends_with_its_connection_is_given_a_length(
    start: Start, parser: str, version: str
) -> None:
    told = f"HTTP/{version} 200 OK\r\nX: y\r\n\r\n".encode() + b"{}" + RawUpstream.CLOSE
    async with between(start, told) as (gateway, _):
        got = await ask(gateway, request(PLAIN))
        assert (got.head[:12], got.body, got.all("Content-Length")) == (b"HTTP/1.1 200", b"{}", ["2"])


# --- Connections of clients -------------------------------------------------------------------------------------------


async def test_a_client_of_http_1_0_is_answered_and_let_go(start: Start, parser: str) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    async with between(start, chunked) as (gateway, _), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN, version="1.0"))
        assert (got.body, got.all("Content-Length"), got.all("Transfer-Encoding")) == (b"{}", ["2"], [])
        assert got.all("Connection") == ["close"]
        assert await wire.rest() == b""


async def test_a_client_of_http_1_0_that_asks_for_it_is_kept(start: Start, parser: str) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        for _ in range(2):
            got = await wire.ask(request(PLAIN, "Connection: keep-alive", version="1.0"))
            assert got.all("Connection") == ["keep-alive"]


async def test_a_client_that_says_close_is_closed_to(start: Start, parser: str) -> None:
    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN, "Connection: close"))
        assert got.all("Connection") == ["close"]
        assert await wire.rest() == b""


async def test_pipelined_requests_are_answered_in_their_order(start: Start, parser: str) -> None:
    told = [answer(body=b"one"), answer(body=b"two"), answer(body=b"three")]
    asked = request("/1") + request("/2", method="POST", body=b"GET /no HTTP/1.1\r\n\r\n") + request("/3")
    async with between(start, *told) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.send(asked)
        assert [(await wire.answer()).body for _ in range(3)] == [b"one", b"two", b"three"]
        assert [seen.target for seen in upstream.seen] == ["/1", "/2", "/3"]


async def test_a_connection_lives_on_after_errors_that_leave_no_doubt(start: Start, parser: str) -> None:
    missing = answer("Content-Type: application/json", body=b'{"msg": "no"}', status="404 Not Found")
    async with between(start, missing) as (gateway, upstream), await Wire.to(gateway) as wire:
        assert (await wire.ask(request(PLAIN))).status == 404
        refused = await wire.ask(request("/worker_status/", method="POST", body=b"{}"))
        assert (refused.status, json.loads(refused.body)["error"]) == (403, "not_for_clients")
        assert (await wire.ask(request("/_proxy/nothing"))).status == 404
        assert (await wire.ask(request("/_proxy/health", method="DELETE", body=b"{}"))).status == 405
        only = await wire.ask(request(SHARED, "Cache-Control: only-if-cached"))
        assert only.status == 504
        assert (await wire.ask(request(PLAIN))).status == 404
        assert len(upstream.seen) == 2


async def test_a_client_that_leaves_in_the_middle_is_no_fault(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    async with between(start, answer(body=b"x" * 5 * MIB)) as (gateway, upstream):
        for sent in (b"GET /x HT", request(PLAIN, "Content-Length: 100", method="POST") + b"{", request(PLAIN)):
            async with await Wire.to(gateway) as wire:
                await wire.send(sent)
                if sent.endswith(b"\r\n\r\n"):
                    await wire.reader.readexactly(1000)
        await asyncio.sleep(1)
        assert events(caplog) == []
        assert [seen.target for seen in upstream.seen] == [PLAIN]
        assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")


# --- Large answers ----------------------------------------------------------------------------------------------------


def _large(framing: str, size: int, *, promised: int | None = None) -> Callable[..., Any]:
    """An answer of `size` bytes, `promised` of them announced, after which the connection ends."""

    async def script(upstream: RawUpstream, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pattern = bytes(range(256)) * 256
        whole = promised is None or promised == size
        length = f"Content-Length: {promised or size}" if framing == "length" else "Transfer-Encoding: chunked"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode())
        left = size
        while left:
            piece = pattern[:left]
            writer.write(piece if framing == "length" else b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            left -= len(piece)
        if framing == "chunks" and whole:
            writer.write(b"0\r\n\r\n")

    return script


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("size", [MIB, MIB + 1, 5 * MIB + 7])
async def test_a_large_answer_passes_whole(start: Start, parser: str, framing: str, size: int) -> None:
    async with between(start, _large(framing, size), OK) as (gateway, _), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN))
        assert len(got.body) == size
        assert got.body == (bytes(range(256)) * (size // 256 + 1))[:size]
        streamed = size > MIB and framing == "chunks"
        assert got.all("Transfer-Encoding") == (["chunked"] if streamed else [])
        assert got.all("Content-Length") == ([] if streamed else [str(size)])
        assert (await wire.ask(request(PLAIN))).body == b"{}"  # on the same connection


async def test_a_large_answer_of_unknown_length_ends_an_http_1_0_connection(start: Start) -> None:
    async with between(start, _large("chunks", 3 * MIB)) as (gateway, _), await Wire.to(gateway) as wire:
        got = await wire.ask(request(PLAIN, "Connection: keep-alive", version="1.0"))
        assert len(got.body) == 3 * MIB
        assert (got.all("Transfer-Encoding"), got.all("Connection")) == ([], ["close"])


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_large_answer_that_breaks_off_does_not_look_whole(start: Start, framing: str, version: str) -> None:
    broken = _large(framing, 2 * MIB, promised=3 * MIB)
    async with between(start, broken) as (gateway, upstream), await Wire.to(gateway) as wire:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
            await wire.ask(request(PLAIN, version=version))
        assert len(upstream.seen) == 1


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_small_answer_that_breaks_off_is_asked_for_again(start: Start, parser: str, framing: str) -> None:
    broken = _large(framing, MIB // 2, promised=MIB - 1)
    async with between(start, broken, broken, OK) as (gateway, upstream):
        got = await ask(gateway, request(PLAIN))
        assert (got.status, got.body) == (200, b"{}")
        assert len(upstream.seen) == 3


async def test_who_follows_a_large_answer_fetches_it_anew(start: Start) -> None:
    async with between(start, _large("length", 3 * MIB)) as (gateway, upstream):
        got = await asyncio.gather(*(ask(gateway, request(SHARED)) for _ in range(3)))
        assert [len(one.body) for one in got] == [3 * MIB] * 3
        assert len(upstream.seen) == 3


async def test_upstream_is_not_read_faster_than_the_client_reads(start: Start) -> None:
    given = 0

    async def pour(upstream: RawUpstream, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
        while given < 64 * MIB:
            writer.write(b"x" * 65536)
            await writer.drain()
            given += 65536

    async with between(start, pour) as (gateway, _):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (gateway.app.address.host, gateway.app.address.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=65536)
        async with Wire(reader, writer) as wire:
            await wire.send(request(PLAIN))
            await asyncio.sleep(5)
            assert given < 24 * MIB  # what fits into the buffers of four sockets, whatever the kernel makes them
            before = given
            await reader.readuntil(b"\r\n\r\n")
            taken = 0
            while taken < 64 * MIB:
                taken += len(await reader.read(MIB))
            assert given > before
            assert taken == 64 * MIB


# --- Hostile bytes ----------------------------------------------------------------------------------------------------


def _post(*lines: str, body: bytes = b"0\r\n\r\n", version: str = "1.1") -> bytes:
    return request(PLAIN, *lines, method="POST", version=version) + body


_CHUNKED = "Transfer-Encoding: chunked"
_EVIL = b"GET /evil HTTP/1.1\r\nHost: x\r\n\r\n"

HOSTILE = {
    "both_lengths": _post("Content-Length: 5", _CHUNKED),
    "both_lengths_smuggling": _post(_CHUNKED, "Content-Length: 4", body=b"0\r\n\r\n" + _EVIL),
    "two_equal_lengths": _post("Content-Length: 2", "Content-Length: 2", body=b"{}"),
    "two_different_lengths": _post("Content-Length: 2", "Content-Length: 3", body=b"{} "),
    "a_list_of_lengths": _post("Content-Length: 2, 2", body=b"{}"),
    "a_negative_length": _post("Content-Length: -1", body=b"{}"),
    "a_length_with_a_sign": _post("Content-Length: +2", body=b"{}"),
    "a_length_in_hex": _post("Content-Length: 0x2", body=b"{}"),
    "a_length_in_words": _post("Content-Length: 1 1", body=b"{}"),
    "an_empty_length": _post("Content-Length:", body=b"{}"),
    "an_absurd_length": _post("Content-Length: 999999999999999999", body=b"{}"),
    "a_length_beyond_64_bits": _post("Content-Length: 99999999999999999999999", body=b"{}"),
    "a_length_in_superscript": _post("Content-Length: \u00b2", body=b"{}"),
    "gzip_then_chunked": _post("Transfer-Encoding: gzip, chunked"),
    "chunked_then_gzip": _post("Transfer-Encoding: chunked, gzip"),
    "gzip_then_chunked_smuggling": _post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n" + _EVIL),
    "xchunked": _post("Transfer-Encoding: xchunked"),
    "chunked_after_a_tab": _post("Transfer-Encoding: \x0bchunked"),
    "chunked_twice": _post(_CHUNKED, _CHUNKED),
    "chunked_and_identity": _post(_CHUNKED, "Transfer-Encoding: identity"),
    "identity": _post("Transfer-Encoding: identity"),
    "chunked_in_1_0": _post(_CHUNKED, version="1.0"),
    "chunked_with_a_space_before_the_colon": _post("Transfer-Encoding : chunked"),
    "chunked_in_a_folded_line": _post("Transfer-Encoding:\r\n chunked"),
    "a_line_feed_in_a_chunk_extension": _post(_CHUNKED, body=b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
    "a_chunk_size_ended_by_line_feed": _post(_CHUNKED, body=b"2\n{}\r\n0\r\n\r\n"),
    "a_chunk_ended_by_line_feed": _post(_CHUNKED, body=b"2\r\n{}\n0\r\n\r\n"),
    "a_chunk_longer_than_it_says": _post(_CHUNKED, body=b"2\r\n{}xx\r\n0\r\n\r\n"),
    "a_chunk_size_with_0x": _post(_CHUNKED, body=b"0x2\r\n{}\r\n0\r\n\r\n"),
    "a_negative_chunk_size": _post(_CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),
    "a_chunk_size_with_a_sign": _post(_CHUNKED, body=b"+2\r\n{}\r\n0\r\n\r\n"),
    "a_chunk_size_with_an_underscore": _post(_CHUNKED, body=b"0_2\r\n{}\r\n0\r\n\r\n"),
    "a_chunk_size_before_a_space": _post(_CHUNKED, body=b"2 \r\n{}\r\n0\r\n\r\n"),
    "an_empty_chunk_size": _post(_CHUNKED, body=b"\r\n{}\r\n0\r\n\r\n"),
    "a_chunk_size_of_garbage": _post(_CHUNKED, body=b"zz\r\n"),
    "a_folded_line": request(PLAIN, "X-A: 1\r\n 2"),
    "a_nul_in_a_value": request(PLAIN, "X-A: a\0b"),
    "a_nul_in_a_name": request(PLAIN, "X\0A: b"),
    "a_nul_in_the_target": request("/a\0b"),
    "a_control_in_a_value": request(PLAIN, "X-A: a\x01b"),
    "a_control_in_the_target": request("/a\x01b"),
    "a_tab_in_the_target": request("/a\tb"),
    "a_space_in_the_target": request("/a b"),
    "a_space_before_the_colon": request(PLAIN, "X-A : b"),
    "a_line_without_a_colon": request(PLAIN, "X-A"),
    "an_empty_name": request(PLAIN, ": b"),
    "a_name_that_is_no_token": request(PLAIN, "X(A: b"),
    "a_space_before_the_name": request(PLAIN, " X-A: b"),
    "a_value_that_is_not_utf_8": request(PLAIN, "X-A: \u00e9"),
    "line_feeds_alone": b"GET /x HTTP/1.1\nHost: x\n\n",
    "one_line_feed_alone": b"GET /x HTTP/1.1\r\nHost: x\nX-A: b\r\n\r\n",
    "a_carriage_return_alone": b"GET /x HTTP/1.1\r\nHost: x\r\nX-A: b\rX-B: c\r\n\r\n",
    "another_host": request("http://example.com/x"),
    "this_host_over_https": request("https://127.0.0.1:PORT/x"),
    "this_host_with_a_user": request("http://user@127.0.0.1:PORT/x"),
    "another_port_of_this_host": request("http://127.0.0.1:1/x"),
    "a_fragment": request("/x#y"),
    "an_authority": request("example.com:80"),
    "a_relative_target": request("x/y"),
    "connect": request("example.com:443", method="CONNECT"),
    "connect_smuggling": request("example.com:443", method="CONNECT") + _EVIL,
    "connect_to_a_path": request("/x", method="CONNECT"),
    "options_of_the_server": request("*", method="OPTIONS"),
    "get_of_the_server": request("*"),
    "a_target_in_utf_8": "GET /\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "a_target_in_latin_1": "GET /\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1"),
    "a_line_too_long": request("/" + "x" * 40_000),
    "a_value_too_long": request(PLAIN, "X-A: " + "x" * 20_000),
    "a_name_too_long": request(PLAIN, "X" * 40_000 + ": a"),
    "too_many_headers": request(PLAIN, *(f"X-{n}: a" for n in range(400))),
    "two_hosts": request(PLAIN, "Host: b"),
    "no_host": b"GET /x HTTP/1.1\r\n\r\n",
    "garbage": b"\xff\xfe\x00garbage\r\n\r\n",
    "a_tls_client_hello": bytes.fromhex("16030100c8010000c403035b") + bytes(range(200)),
    "an_http_2_preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "http_2_in_words": request(PLAIN, version="2.0"),
    "http_0_9": b"GET /x\r\n\r\n",
    "a_version_of_garbage": request(PLAIN, version="1.1x"),
    "a_method_that_is_no_token": request(PLAIN, method="G{T"),
}
BROKEN_LATER = {
    "a_broken_chunk_later": [_post(_CHUNKED, body=b"2\r\n{}\r\n"), b"zz\r\n\r\n"],
    "a_line_feed_in_a_later_chunk": [_post(_CHUNKED, body=b"2\r\n{}\r\n"), b"2;\n\r\n{}\r\n0\r\n\r\n"],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_hostile_or_mistaken_is_refused_and_reaches_nobody(start: Start, parser: str, name: str) -> None:
    async with between(start) as (gateway, upstream):
        data = HOSTILE[name].replace(b":PORT", b":%d" % gateway.app.address.port)
        async with await Wire.to(gateway) as wire:
            got = await wire.ask(data)
            assert got.status in (400, 405, 413, 505)
            assert is_ours(got)
            assert got.all("Connection") == ["close"]
            assert await wire.rest() == b""  # one answer, and nothing is read after it
        assert upstream.seen == []
        assert (await ask(gateway, request(PLAIN))).status == 200
        assert len(upstream.seen) == 1


@pytest.mark.parametrize("name", BROKEN_LATER)
async def test_a_body_that_turns_out_broken_is_refused_at_once(start: Start, parser: str, name: str) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        for part in BROKEN_LATER[name]:
            await wire.send(part)
            await asyncio.sleep(0.01)
        before = gateway.now()
        got = await wire.answer()
        assert got.status == 400
        assert is_ours(got)
        assert gateway.now() - before < 1
        assert await wire.rest() == b""
        assert upstream.seen == []


@pytest.mark.parametrize("part", [b"GET /x HTTP/1.1\r\nHos", _post("Content-Length: 20", body=b"{}"), b"GE", b"\r\n"])
async def test_half_a_request_reaches_nobody(start: Start, parser: str, part: bytes) -> None:
    async with between(start) as (gateway, upstream):
        async with await Wire.to(gateway) as wire:
            await wire.send(part)
            wire.writer.write_eof()
            await asyncio.sleep(1)
        assert (await ask(gateway, request(PLAIN))).status == 200
        assert [seen.line for seen in upstream.seen] == [f"GET {PLAIN} HTTP/1.1"]


async def test_a_request_in_a_body_is_a_body(start: Start, parser: str) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        await wire.ask(request(PLAIN, method="POST", body=_EVIL))
        await wire.ask(request(PLAIN, body=_EVIL))
        assert [(seen.target, seen.body) for seen in upstream.seen] == [(PLAIN, _EVIL)] * 2


async def test_a_huge_chunk_is_waited_for_but_nothing_is_set_aside_for_it(start: Start, parser: str) -> None:
    async with between(start, server={"max_body": 1000}) as (gateway, upstream), await Wire.to(gateway) as wire:
        got = await wire.ask(_post(_CHUNKED, body=b"7fffffffffffffff\r\n" + b"x" * 2000))
        assert got.status == 413
        assert upstream.seen == []


@pytest.mark.parametrize("lines", [["Upgrade: websocket", "Sec-WebSocket-Key: x"], ["Upgrade: h2c"], ["Upgrade: tcp"]])
async def test_an_upgrade_is_not_taken_up_and_its_connection_ends(start: Start, parser: str, lines: list[str]) -> None:
    # RFC 9110 7.8: a server may ignore it. `curl --http2` asks so, and is content.
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        asked = request(PLAIN, "Connection: Upgrade, HTTP2-Settings, Sec-WebSocket-Key", "HTTP2-Settings: AAM", *lines)
        got = await wire.ask(asked + _EVIL)
        assert (got.status, got.all("Connection")) == (200, ["close"])
        assert await wire.rest() == b""
        assert [(seen.target, [name for name, _ in seen.fields]) for seen in upstream.seen] == [(PLAIN, ["Host"])]


@pytest.mark.parametrize("told", ["two lengths", "both lengths", "NUL", "space", "chunk", "line"])
async def test_a_hostile_answer_is_not_passed_on(start: Start, parser: str, told: str) -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    bad = {
        "two lengths": head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        "both lengths": head + b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "NUL": head + b"X-A: a\0b\r\nContent-Length: 2\r\n\r\n{}",
        "space": head + b"X-A : b\r\nContent-Length: 2\r\n\r\n{}",
        "chunk": head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "line": b"220 smtp ready\r\n\r\n",
    }[told]
    async with between(start, bad) as (gateway, upstream):
        got = await ask(gateway, request(PLAIN))
        assert got.status == 503
        assert is_ours(got)
        assert len(upstream.seen) == 5  # a read, tried again


async def test_a_second_answer_nobody_asked_for_is_given_to_nobody(start: Start, parser: str) -> None:
    double = answer(body=b"{}") + answer(body=b"evil")
    async with between(start, double, OK) as (gateway, _):
        assert (await ask(gateway, request("/1"))).body == b"{}"
        await asyncio.sleep(0.1)
        assert (await ask(gateway, request("/2"))).body == b"{}"


# --- Our own failures -------------------------------------------------------------------------------------------------


async def test_a_fault_of_our_own_is_told_without_its_details(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:

        async def fail(*_: Any) -> None:
            raise RuntimeError("met KEY-IN-AN-EXCEPTION")

        monkeypatch.setattr(gateway.app.pipeline, "fetch", fail)
        got = await wire.ask(request(PLAIN, "Authorization: Bearer KEY-IN-AN-EXCEPTION"))
        assert got.status == 500
        assert is_ours(got)
        assert json.loads(got.body)["error"] == "internal_error"
        assert b"RuntimeError" not in got.body
        monkeypatch.undo()
        assert (await wire.ask(request(PLAIN))).status == 200
        assert len(upstream.seen) == 1
    written = [Events(form).format(record) for form in ("text", "json") for record in events(caplog)]
    assert len(written) == 2
    assert all("RuntimeError at test_server.py" in line for line in written)
    assert "KEY-IN-AN-EXCEPTION" not in "".join(written)


async def test_a_fault_while_an_answer_is_written_breaks_it_off(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with between(start, _large("chunks", 3 * MIB)) as (gateway, _), await Wire.to(gateway) as wire:
        fetch = gateway.app.pipeline.fetch

        async def fail() -> AsyncIterator[bytes]:
            yield b"part"
            raise RuntimeError

        async def fetched(*given: Any) -> Any:
            response = await fetch(*given)
            assert response.rest is not None
            monkeypatch.setattr(type(response.rest), "__aiter__", lambda _: fail())
            return response

        monkeypatch.setattr(gateway.app.pipeline, "fetch", fetched)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
            await wire.ask(request(PLAIN))
        assert b"internal_error" not in await wire.rest()
        assert [record.levelname for record in events(caplog)] == ["ERROR"]


async def test_a_fault_outside_the_path_is_told_in_json_too(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError

    async with between(start) as (gateway, _), await Wire.to(gateway) as wire:
        monkeypatch.setattr(Server, "_answer", fail)
        got = await wire.ask(request(PLAIN))
        assert got.status == 500
        assert is_ours(got)
        assert got.all("Connection") == ["close"]
        assert [record.levelname for record in events(caplog)] == ["ERROR"]


async def test_what_is_under_proxy_is_answered_here(start: Start) -> None:
    async with between(start) as (gateway, upstream), await Wire.to(gateway) as wire:
        for path, status in [
            ("/_proxy/health", 200),
            ("/_proxy/health/", 200),
            ("/_proxy/ready?x", 200),
            ("/_proxy/status", 200),
            ("/_proxy/nothing", 404),
            ("/_proxy/page.py", 404),
            ("/_proxy/../proxy/page/page.js", 404),
            ("/_proxy/status/page.js", 404),
            ("/_proxy/../api/v0/x/", 404),
            ("/_proxy/health/x", 404),
        ]:
            got = await wire.ask(request(path))
            assert (path, got.status) == (path, status)
            assert json.loads(got.body)["success"] is (status == 200)
            assert got.all("Content-Type") == ["application/json"]
        head = await wire.ask(request("/_proxy/health", method="HEAD"), to="HEAD")
        assert head.status == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            got = await wire.ask(request("/_proxy/health", method=method))
            assert got.status == 405
            assert is_ours(got)
        gateway.app._ready = False
        got = await wire.ask(request("/_proxy/ready"))
        assert got.status == 503
        assert is_ours(got)
        assert upstream.seen == []


async def test_the_answer_says_what_became_of_the_request(start: Start) -> None:
    gateway = await start(fast=True)
    first, second = [await ask(gateway, request(SHARED)) for _ in range(2)]
    assert first.all("Cache-Status")[0].startswith("vast-proxy; fwd=miss; stored; ttl=")
    assert second.all("Cache-Status")[0].startswith("vast-proxy; hit; ttl=")
    assert (first.all("Age"), second.all("Age")) == ([], ["0"])
    assert first.all("Server-Timing")[0].endswith('attempts;desc="1"')


# --- The program itself, on a real clock ------------------------------------------------------------------------------


@dataclass(slots=True)
class Program:
    """`python -m proxy serve`, and what it wrote."""

    pid: int
    host: str
    port: int
    state: Path
    err: Path

    @property
    def app(self) -> Program:
        return self

    @property
    def address(self) -> Program:
        return self


@asynccontextmanager
async def program(
    folder: Path, upstream: str, *, environment: dict[str, str] | None = None, **given: Any
) -> AsyncIterator[Program]:
    """The proxy as it is run, without limits."""
    settings = {
        "listen": "127.0.0.1:0",
        "upstreams": {"api": upstream, "serverless": upstream, "hosts": []},
        "limits": {"scale": 1e-6, "global": None},
        "state": {"file": str(folder / "state.json")},
    }
    (folder / "proxy.yaml").write_text(json.dumps(settings | given))
    with (folder / "stderr").open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "--config", folder / "proxy.yaml",
            stdout=asyncio.subprocess.PIPE, stderr=err, cwd=Path(__file__).parent.parent,
            env=clean_environment() | (environment or {}),
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        host, _, port = line.split(" listens on http://")[1].split(" ")[0].rpartition(":")
        yield Program(process.pid, host, int(port), folder / "state.json", folder / "stderr")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.stdout.read()
        await process.wait()


@pytest.mark.looptime(False)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to ask")
async def test_two_hundred_megabytes_pass_through_little_memory(tmp_path: Path) -> None:
    size = 200 * MIB
    async with RawUpstream(_large("length", size)) as upstream, program(tmp_path, upstream.url) as proxy:
        async with await Wire.to(proxy) as wire:
            await wire.send(request(PLAIN))
            head = await wire.reader.readuntil(b"\r\n\r\n")
            assert dict(fields(head))["Content-Length"] == str(size)
            taken = 0
            while taken < size:
                piece = await wire.reader.read(MIB)
                assert piece
                taken += len(piece)
        lines = (await asyncio.to_thread(Path(f"/proc/{proxy.pid}/status").read_text)).splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        assert peak < 150 * 1024  # KiB


@pytest.mark.looptime(False)
@pytest.mark.parametrize("pure", ["", "1"])
async def test_the_program_withstands_what_is_hostile_on_either_parser(tmp_path: Path, pure: str) -> None:
    only = {"AIOHTTP_NO_EXTENSIONS": pure} if pure else {}
    async with RawUpstream() as upstream, program(tmp_path, upstream.url, environment=only) as proxy:
        for name, data in HOSTILE.items():
            async with await Wire.to(proxy) as wire:
                got = await wire.ask(data.replace(b":PORT", b":%d" % proxy.port))
                assert (name, got.status) in [(name, status) for status in (400, 405, 413, 505)]
        assert upstream.seen == []
        async with await Wire.to(proxy) as wire:
            assert (await wire.ask(request(PLAIN))).status == 200
    assert proxy.err.read_text().count("status=200") == 1
    assert "Traceback" not in proxy.err.read_text()


KEY = "0123456789abcdef-THE-KEY-fedcba9876543210"


@pytest.mark.looptime(False)
@pytest.mark.parametrize("form", ["text", "json"])
async def test_a_key_is_told_to_upstream_and_to_nobody_else(tmp_path: Path, form: str) -> None:
    async def nothing(upstream: RawUpstream, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def silence(upstream: RawUpstream, reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    refused = answer("Content-Type: application/json", body=b'{"msg": "API requests too frequent"}', status="429 No")
    answers: list[Any] = [
        OK,
        b"",
        nothing,
        silence,
        b"garbage\r\n\r\n",
        answer(status="502 Bad"),
        answer("Location: http://elsewhere.example/", status="307 Moved"),
        answer(f"Location: /loop?api_key={KEY}", status="307 Moved"),
        _large("length", 2 * MIB, promised=3 * MIB),
        refused,  # at the end, and once: what it teaches makes all others wait
    ]
    secret = [
        request(PLAIN, f"Authorization: Bearer {KEY}"),
        request(f"{PLAIN}?api_key={KEY}"),
        request(PLAIN, "Content-Type: application/json", method="POST", body=json.dumps({"api_key": KEY}).encode()),
        request("/api/v0/asks/1/", f"Authorization: Bearer {KEY}", f"Cookie: session={KEY}", method="PUT", body=b"{}"),
        request(f"http://elsewhere.example/{KEY}?api_key={KEY}"),
        request(f"/x#{KEY}"),
        request(f"/_proxy/{KEY}?api_key={KEY}"),
        request(PLAIN, f"X-\u00e9: {KEY}"),
        request(PLAIN, f"X-A: {KEY}\0"),
        request(f"/{KEY}\0"),
        request(PLAIN, "Transfer-Encoding: chunked", method="POST") + KEY.encode() + b"\r\n",
        f"{KEY} garbage\r\n\r\n".encode(),
    ]
    rules: dict[str, Any] = {"log": {"level": "debug", "format": form}, "retry": {"max_attempts": 1}}
    told: list[bytes] = []
    async with RawUpstream() as upstream:
        hosts = {"api": upstream.url, "serverless": upstream.url, "hosts": [], "read_timeout": 0.2}
        async with program(tmp_path, upstream.url, upstreams=hosts, **rules) as proxy:
            for said in answers:
                for data in secret if said is not refused else secret[:1]:
                    upstream.answers[:] = [said, OK] if said is refused else [said]
                    async with await Wire.to(proxy) as wire:
                        await wire.send(data)
                        with suppress(ConnectionError, asyncio.IncompleteReadError):
                            got = await asyncio.wait_for(wire.answer(), 20)
                            told.append(got.head + got.body)
            async with await Wire.to(proxy) as wire:
                told.append((await wire.ask(request("/_proxy/status"))).body)
            hexed = KEY.encode().hex().encode()
            assert any(KEY.encode() in seen.head + seen.body for seen in upstream.seen)
        told += [proxy.err.read_bytes(), proxy.state.read_bytes()]
    assert proxy.state.exists()
    assert len(proxy.err.read_text().splitlines()) >= len(answers) * 4
    assert len(told) > 100
    assert not [text for text in told if KEY.encode() in text or hexed in text]


@pytest.mark.looptime(False)
async def test_a_spend_that_is_lost_tells_its_key_to_nobody_and_is_sent_once(tmp_path: Path) -> None:
    async with FakeVast(Behaviour(scale=0.0)) as fake:
        fake.faults.append(Fault(kind="drop_after", times=None))
        body = json.dumps({"api_key": KEY}).encode()
        line = f"Authorization: Bearer {KEY}"
        async with (
            program(tmp_path, fake.url, log={"level": "debug"}, retry={"max_attempts": 2}) as proxy,
            await Wire.to(proxy) as wire,
        ):
            got = await wire.ask(request(f"/api/v0/asks/1/?api_key={KEY}", line, method="PUT", body=body))
            assert (got.status, json.loads(got.body)["error"]) == (500, "outcome_unknown")
            assert KEY.encode() not in got.head + got.body
        assert KEY not in proxy.err.read_text()
        assert len(fake.log) == 1
