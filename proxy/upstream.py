"""The only HTTP client: origins, connections, timeouts, and what a lost connection means."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from functools import lru_cache
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import aiohttp
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from .policy.errors import UpstreamError
from .policy.messages import NOT_OF_ANSWERS, Headers, Request, Response, end_to_end, header
from .settings import UpstreamRules

HOLD = 1024 * 1024
"""Bytes of an answer that are held until it is whole; a longer one is passed on as it comes."""
LARGEST_KEPT = 8 * 1024
"""Characters of a request's headers that are kept for the next one that has the same."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
# aiohttp would add this where the client sent none.
_NOT_OURS = CIMultiDict([("Content-Type", None)])
# Set anew for each hop: Host and SNI are the upstream's, the length is that of the body as we hold it.
_NO_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SET_ANEW = frozenset({"host", "content-length", "expect"})


class _Attempt:
    """Whether one call's bytes have begun to go out, and whom to tell."""

    __slots__ = ("sent", "tell")

    def __init__(self, tell: Callable[[], None]) -> None:
        self.sent = False
        self.tell = tell


_current: ContextVar[_Attempt] = ContextVar("the attempt that this task is making")


class _Outgoing(aiohttp.ClientRequest):
    """aiohttp's request, which tells when it is written: with the connection made, its TLS handshake included.

    Tracing (`on_request_headers_sent`) tells the same, at a tenth of the whole cost of a call.
    """

    def update_auto_headers(self, skip_auto_headers: Iterable[str] | None) -> None:
        """Add nothing where the client sent nothing."""
        self._skip_auto_headers = _NOT_OURS

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        attempt = _current.get()
        attempt.sent = True
        attempt.tell()
        if conn.protocol is not None and self._body is not None:
            # aiohttp begins to count when the body is out: one that nobody reads would be waited for without end.
            conn.protocol.start_timeout()
        return await super().send(conn)


class Upstream:
    """Sends one request once. Owns the connections; keeps no cookie, replays nothing, follows vendor redirects."""

    def __init__(self, rules: UpstreamRules, tls: ssl.SSLContext | None = None) -> None:
        """Inside a running loop. `tls`: how to verify; by default with the system's authorities."""
        self.rules = rules
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # admission counts the slots, so that nobody waits here out of line
                ssl=tls if tls is not None else True,
                keepalive_timeout=rules.keepalive,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=rules.connect_timeout or None, sock_read=rules.read_timeout or None
            ),
            max_line_size=65536,
            max_field_size=65536,
            request_class=_Outgoing,
        )
        # aiohttp sends PUT and DELETE again by itself when a connection is lost: that would rent twice.
        self._session._retry_connection = False
        self._calls = 0
        self._idle = asyncio.Event()

    async def close(self) -> None:
        """Close every connection, also those in use."""
        await self._session.close()

    async def retire(self) -> None:
        """Close once the calls under way have ended; to be used no more."""
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        await self.close()

    def _ended(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    def origin(self, upstream: str) -> str:
        """The base URL of an upstream, without a slash at its end."""
        return self.rules.serverless if upstream == "serverless" else self.rules.api

    async def send(self, request: Request, upstream: str, sent: Callable[[], None]) -> Response:
        """One answer, whole up to HOLD bytes, else with the rest to be read. `sent` is called when bytes go out.

        A redirect to the vendor's own hosts is followed with method, body and key; 303 becomes a GET (RFC 9110 15.4.4).
        Any other redirect is the answer. Raises UpstreamError.
        """
        self._calls += 1
        held = False
        try:
            response = await self._follow(request, self.origin(upstream) + request.target, sent)
            if response.rest is not None:
                held = True
                response.rest.on_close(self._ended)
            return response
        finally:
            if not held:
                self._ended()

    async def _follow(self, request: Request, url: str, sent: Callable[[], None]) -> Response:
        method, headers, body = request.method, request.headers, request.body
        for hop in range(_MOST_REDIRECTS):
            try:
                response = await self._exchange(method, url, headers, body, sent)
            except UpstreamError as error:
                if hop and not error.sent:
                    # This hop was not sent, but the first one was, and what it did is not known.
                    raise UpstreamError(str(error), sent=True, timed_out=error.timed_out) from error
                raise
            if hop and method != request.method and response.status == 429:
                raise UpstreamError("done, but its result was refused as too frequent", sent=True)
            response.redirected = hop > 0
            if response.status not in _REDIRECTS:
                return response
            location = header(response.headers, "location")
            target = _absolute(url, location) if location else ""
            if not self._is_vendors(url, target):
                return response
            if response.rest is not None:
                response.rest.close()
            url = target
            if response.status == 303 and method != "HEAD":
                method, body = "GET", b""
                headers = tuple(item for item in headers if item[0].lower() != "content-type")
        raise UpstreamError(f"more than {_MOST_REDIRECTS} redirects", sent=True)

    def _is_vendors(self, url: str, target: str) -> bool:
        """May the key go there? To the origin itself, or over TLS to a host of the vendor's."""
        try:
            here, there = urlsplit(url), urlsplit(target)
            same = (here.scheme, here.hostname, here.port) == (there.scheme, there.hostname, there.port)
            name = there.hostname or ""
        except ValueError:
            return False
        if there.username is not None or there.fragment:
            return False
        if same:
            return True
        return there.scheme == "https" and any(
            name == domain or name.endswith(f".{domain}") for domain in self.rules.hosts
        )

    async def _exchange(
        self, method: str, url: str, headers: Headers, body: bytes, sent: Callable[[], None]
    ) -> Response:
        attempt = _Attempt(sent)
        _current.set(attempt)
        try:
            answer = await self._session.request(
                method,
                _exact(url),
                headers=_fields(headers),
                data=body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translated(error, sent=attempt.sent) from error
        if answer.status < 200:
            answer.close()
            raise UpstreamError("it switched protocols, unasked", sent=True)
        if len(answer.headers.getall("Content-Length", ())) > 1:  # aiohttp's Python parser believes the first
            answer.close()
            raise UpstreamError("not a valid HTTP answer (two lengths)", sent=True)
        if ", ".join(answer.headers.getall("Transfer-Encoding", ())).strip().lower() not in ("", "chunked"):
            answer.close()  # aiohttp undoes no other, and no other was asked for by TE (RFC 9112 7.4)
            raise UpstreamError("not a valid HTTP answer (another transfer coding than chunked)", sent=True)
        held: list[bytes] = []
        length = 0
        try:
            if answer.content_length is not None and answer.content_length <= HOLD:
                return _response(answer, await answer.read(), None)
            async for chunk in answer.content.iter_any():
                held.append(chunk)
                length += len(chunk)
                if length > HOLD:
                    return _response(answer, b"".join(held), _Rest(answer))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.close()
            raise _translated(error, sent=True) from error
        except BaseException:
            answer.close()
            raise
        answer.release()
        return _response(answer, b"".join(held), None)


class _Rest:
    """What follows the held part of a large answer; reads no faster than it is asked, and closes once."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self._closed: list[Callable[[], None]] = []

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _translated(error, sent=True) from error
        finally:
            self.close()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Called once the answer is read to its end, or given up."""
        self._closed.append(callback)

    def close(self) -> None:
        """Give the rest up; a connection with unread bytes is not used again."""
        self._answer.close() if not self._answer.content.at_eof() else self._answer.release()
        while self._closed:
            self._closed.pop()()


def _exact(url: str) -> URL:
    """A URL whose target goes on the wire as it is. yarl drops a `?` with nothing after it, so it is told."""
    exact = URL(url, encoded=True)
    target = url[url.index("/", url.index("//") + 2) :]
    if exact.raw_path_qs != target:
        with contextlib.suppress(AttributeError):
            exact._cache["raw_path_qs"] = target
    return exact


def _fields(headers: Headers) -> CIMultiDict[str]:
    """What is passed on, made once for heads of the usual size: what is kept must not grow with what clients send."""
    small = sum([len(name) + len(value) for name, value in headers]) <= LARGEST_KEPT
    return _small_fields(headers) if small else _passed_on(headers)


@lru_cache(maxsize=512)
def _small_fields(headers: Headers) -> CIMultiDict[str]:
    return _passed_on(headers)


def _passed_on(headers: Headers) -> CIMultiDict[str]:
    """The fields, a repeated name in its first spelling: aiohttp takes another spelling for a replacement."""
    spelt: dict[str, str] = {}
    return CIMultiDict(
        (spelt.setdefault(lowered, name), value)
        for name, value in headers
        if (lowered := name.lower()) not in _SET_ANEW
    )


def _absolute(url: str, location: str) -> str:
    """Where a redirect leads, with nothing in it that may not stand in a request line; empty if nowhere."""
    try:
        parts = urlsplit(urljoin(url, quote(location.encode("latin-1"), safe="!#$%&'()*+,/:;=?@[]|~")))
    except ValueError:
        return ""
    return urlunsplit(parts._replace(path=parts.path or "/"))


def _response(answer: aiohttp.ClientResponse, body: bytes, rest: _Rest | None) -> Response:
    # Latin-1 keeps every byte of a field as it came; it goes out the same way.
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.raw_headers)
    # aiohttp's Python parser lets a bare CR stand in the reason, which is none to every client.
    reason = _NO_CONTROLS.sub("", answer.reason or "")
    return Response(answer.status, end_to_end(headers, NOT_OF_ANSWERS), body, reason, rest)


def _translated(error: BaseException, *, sent: bool) -> UpstreamError:
    """A library's exception as ours: what happened, in words without URLs, and whether anything may have been done."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError | ssl.SSLError):
        return UpstreamError("its TLS certificate or handshake was not accepted", sent=sent)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        what = "no answer within the time allowed" if sent else "no connection within the time allowed"
        return UpstreamError(what, sent=sent, timed_out=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return UpstreamError("no connection (its name is not known)", sent=sent)
        number = error.os_error.errno  # asyncio's own text has the address in it
        return UpstreamError(f"no connection ({os.strerror(number) if number else 'unknown error'})", sent=sent)
    if isinstance(error, aiohttp.ClientPayloadError):
        return UpstreamError("the answer broke off", sent=sent)
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError | aiohttp.ClientOSError):
        return UpstreamError("the connection was closed without an answer", sent=sent)
    return UpstreamError(f"not a valid HTTP answer ({type(error).__name__})", sent=sent)
