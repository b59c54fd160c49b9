"""HTTP in, HTTP out: the one place where bytes become a Request, and a Response or a Refusal becomes bytes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import re
import socket
import struct
import termios
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from cachetools import LRUCache

from .bounds import Bodies, Connections, Unsent, notice_silence
from .clock import Clock
from .pipeline import Pipeline, Progress, Understood
from .policy import exposure
from .policy.errors import Refusal, UpstreamError
from .policy.identity import LARGEST_WITH_KEY, Caller, bare
from .policy.members import PREFIX, must_vouch
from .policy.messages import CacheStatus, Exchange, Headers, Receipt, Request, Response, Step, Trace, end_to_end
from .settings import ServerRules
from .slowing import Slowing

LONGEST_LINE = 32 * 1024
"""Bytes of a request line: searches by GET carry their query in it."""
LONGEST_FIELD = 16 * 1024
REQUESTS_KEPT, LONGEST_KEPT, LONGEST_HEAD_KEPT, LONGEST_SHARED = 1024, 4096, 8192, 256
"""How many requests' meanings are kept, the longest body and head of these, and the longest shared field (bytes)."""
LEAST_RATE = 500.0
"""Bytes of a body for which its deadline moves by a second (mod_reqtimeout of Apache: `body=20,MinRate=500`)."""
READ_AHEAD = 64 * 1024
"""Bytes of the bodies of pipelined requests after which no more is read, until their turn comes."""
TURNED_AWAY, TURNING_AWAY = 64, 1.0
"""How many clients that found no room may be read from at once, and for how many seconds."""
READ_WITHIN = 2.0
"""Seconds within which a client that resets its connection may have left its answer unread."""
OURS = "/_proxy"
log = logging.getLogger(__name__)

_LAST = frozenset({"bad_request", "body_too_large", "request_timeout", "overloaded"})
"""Refusals after which it is not certain where the next request begins, or not worth it to read that far.

So are all that come before the body has.
"""
_SANE_ID = re.compile(r"[!-~]{1,128}")
"""A request id that is kept: visible ASCII, so that it forges no header and no log line."""
_FAULT = Refusal(500, "internal_error", "vast-proxy met a fault of its own; its log says more")

Observer = Callable[[Exchange], None]
TryObserver = Callable[[Exchange, Step], None]
Admin = Callable[[str, str, Caller | None], Response]


class Server(web.Server):
    """aiohttp's low-level server with our own error answers. Owns the clients' connections."""

    def __init__(
        self,
        clock: Clock,
        rules: ServerRules,
        pipeline: Pipeline,
        admin: Admin,
        request_ids: Iterator[str],
        observers: Iterable[Observer] = (),
        of_tries: Iterable[TryObserver] = (),
    ) -> None:
        """`request_ids`: one for each request that brings none. `of_tries`: who does not wait for a request's end."""
        super().__init__(
            self._handle,
            handler_cancellation=True,  # a client that leaves gives up its place
            access_log=None,
            auto_decompress=False,  # bodies pass as they are
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_FIELD,
            keepalive_timeout=rules.keepalive,
            lingering_time=2.0,
        )
        self._clock = clock
        self._pipeline = pipeline
        self._admin = admin
        self._request_ids = request_ids
        self._ended: list[Exchange] = []
        self._tries: list[tuple[Exchange, Step]] = []
        """What the observers are to be told, at the end of this turn of the loop."""
        self._going_on: dict[int, Progress] = {}
        """What a client did not wait for to its end, by the identity of its exchange."""
        self.begin_trace: Callable[[str | None], Trace] | None = None
        """Makes the place in a trace of a request with such a `traceparent`; None: nobody traces."""
        self.observers = tuple(observers)
        self.of_tries = tuple(of_tries)
        pipeline.tried = self._tried
        self._known: LRUCache[tuple[Any, ...], Understood] = LRUCache(REQUESTS_KEPT)
        self.clients: Connections[_Connection] = Connections(_Connection.force_close)
        self.bodies = Bodies()
        self._slowing = Slowing(clock)
        self._turned_away: OrderedDict[_TurnedAway, None] = OrderedDict()
        self._holds: set[_Hold] = set()

    @property
    def rules(self) -> ServerRules:
        """Those in force."""
        return self._pipeline.settings.server

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def answering(self) -> bool:
        """Is there a request that is whole and let in, and not answered yet?"""
        return any(one.answering and self.clients.is_busy(one) for one in self.clients)

    def cut_short(self) -> None:
        """Answer whoever still waits: there is no more time."""
        for hold in list(self._holds):
            hold.cut_short()

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def turn_away(self, transport: asyncio.Transport) -> None:
        """There is no room: say so, and close."""
        while len(self._turned_away) >= TURNED_AWAY:
            self._turned_away.popitem(last=False)[0].end()
        one = _TurnedAway(self._clock, transport, lambda: self._turned_away.pop(one, None))
        self._turned_away[one] = None

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's
        for one in list(self._turned_away):
            one.end()
        await super().shutdown(timeout)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        began = self._clock.now()
        given = request.headers.get("X-Request-ID")
        kept = given is not None and self._may_be_shown(given, request)
        exchange = Exchange(given if kept and given else next(self._request_ids), began, request.method)
        if self.begin_trace is not None:
            exchange.trace = self.begin_trace(request.headers.get("traceparent"))
        try:
            return await self._answer(request, exchange, began)
        except asyncio.CancelledError:
            exchange.left = not exchange.code  # else it was us who broke it off
            raise
        finally:
            if self.bodies.size:
                self.bodies.give_back(request.protocol)
            exchange.total = self._clock.now() - began
            going_on = self._going_on.pop(id(exchange), None) if self._going_on else None
            if going_on is None:
                self._over(exchange)
            else:
                going_on.when_over(lambda: self._over(exchange))

    def _may_be_shown(self, request_id: str, request: web.BaseRequest) -> bool:
        """May it stand in a log? Not where somebody has put a token or a key."""
        if _SANE_ID.fullmatch(request_id) is None or request_id.startswith(PREFIX):
            return False
        secrets = [bare(request.headers.get("Authorization", ""))]
        secrets += [key.value for key in self._pipeline.settings.team_keys.values()]
        return request_id not in secrets and f"api_key={request_id}" not in request._message.path

    def _over(self, exchange: Exchange) -> None:
        """Its client has been answered, or has left, and what was begun for it has ended."""
        if not self._ended and not self._tries:
            self._loop.call_soon(self.tell)
        self._ended.append(exchange)

    def _tried(self, exchange: Exchange, step: Step) -> None:
        if not self._ended and not self._tries:
            self._loop.call_soon(self.tell)
        self._tries.append((exchange, step))

    def tell(self) -> None:
        """Tell the observers of what has ended, all of one turn of the loop together: that costs half as much."""
        tries, self._tries = self._tries, []
        ended, self._ended = self._ended, []
        for tried in self.of_tries:
            for exchange, step in tries:
                tried(exchange, step)
        for observe in self.observers:
            for exchange in ended:
                observe(exchange)

    async def _answer(self, request: web.BaseRequest, exchange: Exchange, began: float) -> web.StreamResponse:
        # An upgrade is declined. After a chunked body, aiohttp's C parser takes its trailer for part of the next head.
        last = request._message.upgrade or request._message.chunked
        pause = 0.0
        try:
            self._check_origin(request)
            if OURS in request._message.path and _is_ours(target := _target(request)):
                exchange.route, exchange.effect = OURS, "admin"
                caller = self._admitted(request, target)
                self.clients.busy(self._connection(request))
                self.tell()
                response = self._admin(request.method, target, caller)
                exchange.status = response.status
                extra = _ID % exchange.request_id.encode()
                if response.rest is not None:
                    return await _stream(response, request, extra, exchange, last=last)
                reply = _Reply(response, request, extra)
                if last:
                    reply.force_close()
                return reply
            known = await self._understood(request)
            found = await self._pipeline.stored(known, exchange)
            response = found if found is not None else await self._patiently(request, known, exchange)
        except Refusal as refused:
            exchange.code = refused.code
            exchange.address = exchange.address or self._address(request)
            if not exchange.attempts:
                exchange.cache = CacheStatus.REFUSED
            if refused.code == "token_unknown":
                refused, pause = self._failed(refused, request)
            response = _refused(refused)
            last = last or refused.code in _LAST or not request.content.is_eof()
        except _Gone:
            raise ConnectionResetError("the client went away") from None
        except asyncio.CancelledError:
            raise
        except Exception:
            # Never a traceback to a client, and never one that holds a request's values in a log.
            log.exception("a request met a fault of the proxy's own (id=%s)", exchange.request_id)
            exchange.code = _FAULT.code
            response = _refused(_FAULT)
        if pause:  # here, where nothing holds the request's body any more
            await self._slow_down(request, pause)
        exchange.status = response.status
        extra = _told(exchange, self._clock.now() - began)
        if response.rest is None:
            exchange.bytes_out = 0 if _has_no_body(request, response.status) else len(response.body)
            reply = _Reply(response, request, extra)
            if last:
                reply.force_close()
            return reply
        return await _stream(response, request, extra, exchange, last=last)

    def _check_origin(self, request: web.BaseRequest) -> None:
        """Raises Refusal for a request that was lured here."""
        settings = self._pipeline.settings
        host = request.headers.get("Host")
        if host is not None and not exposure.is_our_name(host, settings.hosts):
            raise exposure.misdirected(host)
        if settings.team and exposure.from_another_site(_fields(request.raw_headers)):
            raise exposure.cross_site()

    def _admitted(self, request: web.BaseRequest, target: str) -> Caller | None:
        """Who asks, for a page of ours that tells callers of their own work. Raises Refusal for who may not see it."""
        rules, fields = self._pipeline.settings.admin, _fields(request.raw_headers)
        path = target.partition("?")[0].rstrip("/")
        hidden = exposure.hidden(path, request.remote or "", fields, rules)
        if hidden is not None:
            raise hidden
        if path not in exposure.OWN:
            return None
        return self._pipeline.caller(Request(request.method, target, end_to_end(fields), b""), self._address(request))

    def _address(self, request: web.BaseRequest) -> str:
        """The client's, as far as it can be believed."""
        peer, trusted = request.remote or "", self._pipeline.settings.trusted_proxies
        return exposure.client_address(peer, _fields(request.raw_headers), trusted) if trusted else peer

    @staticmethod
    def _connection(request: web.BaseRequest) -> _Connection:
        connection = request.protocol
        assert isinstance(connection, _Connection)
        return connection

    def _failed(self, refused: Refusal, request: web.BaseRequest) -> tuple[Refusal, float]:
        """What is told to one who brought a wrong token, and after how many seconds.

        At once while another's pause from there is not over, so that guesses take up one connection, however many.
        """
        pause, is_anothers = self._slowing.failed(self._address(request))
        if not is_anothers:
            return refused, pause
        return Refusal(refused.status, refused.code, refused.msg, max(1.0, pause)), 0.0

    async def _slow_down(self, request: web.BaseRequest, pause: float) -> None:
        self.clients.idle(self._connection(request))  # guessing must not take the room of others: it goes first
        self.bodies.give_back(request.protocol)
        await self._clock.sleep(pause)

    async def _understood(self, request: web.BaseRequest) -> Understood:
        """What this request means; a poll that repeats itself to the byte is read once. Raises Refusal."""
        if request.version.major != 1:
            raise _bad(505, "this is a proxy for HTTP/1.0 and HTTP/1.1")
        connection = self._connection(request)
        body = await self._body(request, connection) if request.body_exists else b""
        http_1_1 = request.version >= HttpVersion11
        address = self._address(request)
        # What is longer than what is kept is not looked for either.
        short = len(body) <= LONGEST_KEPT
        key = (request.method, request._message.path, request.raw_headers, body if short else b"", http_1_1, address)
        known = self._known.get(key) if short else None
        if known is None or known.settings is not self._pipeline.settings:
            fields = _fields(request.raw_headers)
            asked = Request(request.method, _target(request), end_to_end(fields), body)
            known = self._pipeline.understand(asked, fields, http_1_1=http_1_1, address=address)
            if short and known.route.is_read and _head_length(request) <= LONGEST_HEAD_KEPT:
                self._known[key] = known
        self.clients.busy(connection)
        return known

    async def _body(self, request: web.BaseRequest, connection: _Connection) -> bytes:
        """The whole body as sent. Answers Expect here. Raises Refusal, or _Gone when it breaks off.

        It is held for its connection. Its deadline is that of Apache's mod_reqtimeout, `body=20,MinRate=500`: so long
        from the beginning, and a second more for each 500 bytes that have come; and no longer than that without a byte.
        """
        target = _target(request)  # a request that is refused for its head is refused before its body is read
        rules, clock = self.rules, self._clock
        limit, patience = rules.max_body, rules.body_timeout
        too_large = Refusal(413, "body_too_large", f"the request's body is larger than {limit} bytes (server.max_body)")
        if self._pipeline.settings.team:
            if self._pipeline.vouched(Request(request.method, target, end_to_end(_fields(request.raw_headers)))):
                self.clients.busy(connection)
            elif limit > LARGEST_WITH_KEY:
                limit, too_large = LARGEST_WITH_KEY, must_vouch()
        promised = request.content_length or 0
        if promised > limit:
            raise too_large
        self._make_room(connection, promised)
        expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
        if expects and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        length = 0
        began = clock.now()
        # What is there already is read without looking at the clock.
        timed = asyncio.timeout_at(None if request.content.is_eof() or not patience else began + patience)
        try:
            async with timed:
                async for chunk in request.content.iter_any():
                    chunks.append(chunk)
                    length += len(chunk)
                    if length > limit:
                        raise too_large
                    self._make_room(connection, len(chunk))
                    self.bodies.take(connection, len(chunk))
                    if timed.when() is not None:
                        timed.reschedule(min(clock.now() + patience, began + patience + length / LEAST_RATE))
        except (web.RequestPayloadError, HttpProcessingError):
            raise _bad(400, "the body is not what its headers say") from None
        except (ConnectionError, OSError):
            if timed.expired():
                late = "the request's body did not come in time (server.body_timeout)"
                raise Refusal(408, "request_timeout", late) from None
            raise _Gone from None
        return b"".join(chunks)

    def _make_room(self, connection: _Connection, size: int) -> None:
        """For so much more of bodies: the connection goes whose body has been coming in for longest.

        Raises Refusal where that is this very one, or none is.
        """
        while self.bodies.size + size > self.rules.max_bodies:
            gone = self.clients.make_room(connection, self.bodies.has)
            if gone is None:
                msg = "too many request bodies at once (server.max_bodies); try again"
                raise Refusal(503, "overloaded", msg, 5)
            self.bodies.give_back(gone)

    async def _patiently(self, request: web.BaseRequest, known: Understood, exchange: Exchange) -> Response:
        """Upstream's answer, with the client kept waiting by interim answers, or told to come back in time."""
        began = self._clock.now()  # who sends a long body does not wait for us meanwhile
        hold = _Hold(self._clock, known, request.transport, began)
        self._holds.add(hold)
        try:
            return await self._pipeline.fetch(known, exchange, hold.watch)
        except asyncio.CancelledError:
            if hold.flight is not None:
                self._going_on[id(exchange)] = hold.flight
            task = asyncio.current_task()
            if not hold.over or task is None or task.uncancel() > 0:
                raise
            exchange.queued = self._clock.now() - began
            if hold.cut:
                raise self._pipeline.cut_short(known, hold.flight) from None
            msg = f"{known.route.name} is still waiting for its turn; ask again and it goes on"
            raise Refusal(429, "still_queued", msg, 1) from None
        finally:
            self._holds.discard(hold)
            hold.end()


class _Hold:
    """What keeps a waiting client on the line: heartbeats, and the end of its patience. Owns the one timer of both."""

    __slots__ = ("_clock", "_end", "_known", "_next", "_task", "_timer", "_transport", "cut", "flight", "over")

    def __init__(self, clock: Clock, known: Understood, transport: asyncio.Transport | None, began: float) -> None:
        self._clock = clock
        self._known = known
        self._transport = transport
        self.flight: Progress | None = None
        self._task = asyncio.current_task()
        self._end = began + known.patience
        self._next = began + known.settings.queue.heartbeat if known.beat else self._end
        self.over = False
        """It ended the wait, not the client."""
        self.cut = False
        """It did so because the proxy ends."""
        self._timer = clock.call_at(min(self._next, self._end), self._tick)

    def watch(self, flight: Progress) -> None:
        """The call that the client waits for from now on."""
        self.flight = flight

    def cut_short(self) -> None:
        """The proxy ends: whatever it waits for, it waits no more."""
        self.cut = True
        self._give_up()

    def _give_up(self) -> None:
        self.over = True
        if self._task is not None:
            self._task.cancel()

    def end(self) -> None:
        """The wait is over."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._clock.now()
        if now >= self._end and not (self.flight is not None and self.flight.busy):
            self._give_up()
            return
        if self._known.beat and now >= self._next and self._transport is not None:
            if not self._transport.is_closing():
                self._transport.write(self._known.beat)
            self._next = now + self._known.settings.queue.heartbeat
        if now >= self._end:
            # At upstream: the answer may still come in time, and cutting it off would lose it for certain.
            self._end = now + 1.0
        self._timer = self._clock.call_at(min(self._next, self._end) if self._known.beat else self._end, self._tick)


class _Connection(RequestHandler):
    """aiohttp's connection, with bounds to what a client may take. Its own refusals are JSON, lost answers are told of.

    A head is timed as a whole, as by nginx's client_header_timeout: from its first byte, or from the beginning of the
    connection. Not while an earlier request is being answered, nor between requests: that is for `server.keepalive`.
    """

    __slots__ = ("_begun", "_due", "_head_timer", "_incoming", "_receipts", "_server", "_unsent", "stalled")

    def __init__(self, server: Server, **more: Any) -> None:
        super().__init__(server, **more)
        self._server = server
        self._incoming: StreamReader = EMPTY_PAYLOAD
        """The body of the last request that came."""
        self._begun = False
        """There is a part of a head."""
        self._due = 0.0
        """When that must be whole, or the first one; 0: nothing is waited for."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._unsent: Unsent | None = None
        self.stalled = False
        """It was reset, for the client took nothing of its answer."""
        self._receipts: list[tuple[float, Receipt]] = []
        """Of answers that a client may not have read, and when they were written."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        rules = self._server.rules
        if not self._server.clients.admit(self, rules.max_connections):
            self._server.turn_away(cast("asyncio.Transport", transport))
            return
        super().connection_made(transport)
        notice_silence(transport, rules.send_timeout)
        self._expect_head()

    def eof_received(self) -> None:
        super().eof_received()
        if self._receipts and self.transport is not None and not _all_taken(self.transport):
            self._lost()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.clients.gone(self)
        if self._head_timer is not None:
            self._head_timer.cancel()
        if self._unsent is not None:
            self._unsent.stop()
            self._unsent = None
        if exc is not None:
            # Reset: by a client that left with the answer unread, or that was not there any more. Long after it was
            # written it means nothing: things on the way reset what is idle.
            recent = self._server.clock.now() - READ_WITHIN
            self._receipts = [item for item in self._receipts if item[0] >= recent]
            self._lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before, incoming, messages = self._request_count, self._incoming, self._messages
        in_body = incoming is not EMPTY_PAYLOAD and not incoming.is_eof()
        super().data_received(data)
        if self._request_count != before:
            if self._receipts and not self._request_in_progress:
                self._receipts.clear()  # who asks for the next thing has read the last
            self._incoming = messages[-1][1]
            self._begun, self._due = False, 0.0
            if not self._request_in_progress:
                self._server.clients.coming(self)
        elif data and not in_body and not self._begun:
            # What comes in one read with the end of a request is not noticed before more of it does.
            self._begun = True
            if not self._due:
                self._expect_head()
        pipelined = self._request_in_progress or len(messages) > 1
        if pipelined and not self._buffer_paused and self._read_ahead() > READ_AHEAD:
            self._pause_reading_for_buffer()
        request = self._current_request
        broken = bool(messages) and isinstance(messages[-1][0], _ErrInfo)
        if broken and request is not None and not request.content.is_eof():
            # aiohttp's C parser leaves who waits for the rest of a broken body waiting.
            request.content.set_exception(web.RequestPayloadError("the body is not valid"))

    @property
    def answering(self) -> bool:
        """It has a request, and all of it."""
        request = self._current_request
        return self._request_in_progress and request is not None and request.content.is_eof()

    def _read_ahead(self) -> int:
        """Bytes of bodies whose turn has not come: nobody counts them yet, so they must stay few."""
        return sum(body.total_bytes for _, body in self._messages)

    def _resume_reading_if_drained(self) -> None:
        if self._read_ahead() <= READ_AHEAD:
            super()._resume_reading_if_drained()

    def _expect_head(self) -> None:
        patience = self._server.rules.header_timeout
        if patience > 0:
            self._due = self._server.clock.now() + patience
            if self._head_timer is None:
                self._head_timer = self._server.clock.call_at(self._due, self._head_is_due)

    def _head_is_due(self) -> None:
        self._head_timer = None
        if not self._due or self._request_in_progress or self._messages or self._close or self._force_close:
            return  # it came; or another request is being answered, and then it begins anew
        clock, waiter = self._server.clock, self._waiter
        if clock.now() < self._due:
            self._head_timer = clock.call_at(self._due, self._head_is_due)
        elif waiter is None or waiter.done():  # what is left of a refused body is being read
            self._head_timer = clock.call_at(clock.now() + 1.0, self._head_is_due)
        elif self._begun:
            late = Refusal(408, "request_timeout", "the request did not come in time (server.header_timeout)")
            self._messages.append((_ErrInfo(late.status, late, late.msg), EMPTY_PAYLOAD))
            self._server.clients.busy(self)
            waiter.set_result(None)
        else:
            self.force_close()

    def _process_keepalive(self) -> None:
        if self._begun and self._due:
            self._keepalive_handle = None  # no longer idle, and timed as a head
        else:
            super()._process_keepalive()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        self.look()
        told = await super().finish_response(request, resp, start_time)
        if self._messages:
            self._server.clients.coming(self)  # the next one, which has yet to be let in
        transport = self.transport
        if transport is not None and transport.get_write_buffer_size():
            self.look()
            self._watch_over_unsent()
            if self._paused:
                await self._drain_helper()  # who asks and asks, and takes no answer, is not answered without end
        elif resp.keep_alive:
            self._idle()
        if self._begun:
            self._expect_head()
        return told

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_over_unsent()

    def look(self) -> None:
        """Before and after something is written: how much of what was written earlier is left?"""
        if self._unsent is not None:
            self._unsent.look()

    def _watch_over_unsent(self) -> None:
        patience = self._server.rules.send_timeout
        if patience > 0 and self._unsent is None and self.transport is not None:
            # The transport itself: a connection that is being closed has none, and waits for its client all the same.
            transport = self.transport
            self._unsent = Unsent(
                self._server.clock, transport, patience, lambda: self._stall(transport), self._drained
            )

    def _stall(self, transport: asyncio.Transport) -> None:
        self._unsent = None
        self.stalled = True
        self._lost()
        _reset(transport)

    def written(self, receipt: Receipt) -> None:
        """To be told, if it turns out that the client left without having read the answer."""
        self._receipts.append((self._server.clock.now(), receipt))

    def _lost(self) -> None:
        for _, receipt in self._receipts:
            receipt.lost()
        self._receipts.clear()

    def _drained(self) -> None:
        self._unsent = None
        if not self._request_in_progress:
            self._idle()

    def _idle(self) -> None:
        """Nothing is asked, nothing is left to be sent: another may have its place."""
        if not self._messages and not self._close and not self._force_close:
            self._server.clients.idle(self)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # nobody is there any more
        if status >= 500:
            log.error("a request met a fault of the proxy's own", exc_info=exc)
            reply = _Reply(_refused(_FAULT), request, b"")
        elif isinstance(exc, Refusal):
            reply = _Reply(_refused(exc), request, b"")
        else:
            reply = _Reply(_refused(_bad(status, "not a valid HTTP request")), request, b"")
        reply.force_close()
        return reply


class _TurnedAway(asyncio.Protocol):
    """A connection for which there was no room. Reads on for a moment: a reset would overtake the answer."""

    def __init__(self, clock: Clock, transport: asyncio.Transport, gone: Callable[[], object]) -> None:
        self._transport = transport
        self._gone = gone
        self._timer = clock.call_at(clock.now() + TURNING_AWAY, self.end)
        transport.set_protocol(self)
        msg = "vast-proxy has no connection left (server.max_connections); try again in a moment"
        response = _refused(Refusal(503, "too_many_connections", msg, 5))
        fields = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
        head = f"HTTP/1.1 503 Service Unavailable\r\n{fields}Content-Length: {len(response.body)}\r\n"
        transport.write(f"{head}Connection: close\r\n\r\n".encode("latin-1") + response.body)
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()  # TLS: what was written goes out first

    def connection_lost(self, exc: BaseException | None) -> None:
        self._timer.cancel()
        self._gone()

    def end(self) -> None:
        self._transport.abort()


class _Gone(Exception):
    """The client broke off while its request was being read."""


def _all_taken(transport: asyncio.Transport) -> bool:
    """Has the other end, which has just closed the connection, taken all that was written? True if nobody can say.

    What it had not acknowledged when it closed, it has not read: a client that timed out as its answer was written.
    """
    if transport.get_write_buffer_size():
        return False
    try:
        sock = transport.get_extra_info("socket")
        unread = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return not unread and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except (OSError, AttributeError):
        return True


# --- In ---------------------------------------------------------------------------------------------------------------


def _target(request: web.BaseRequest) -> str:
    """The origin-form target as it came, but for a leading `//`. Raises Refusal for what is no target of ours."""
    raw = request._message.path
    if request.method == "CONNECT":
        raise _bad(405, "CONNECT is not for this proxy: point the client's base URL at it")
    if not raw.startswith("/"):
        raw = _origin_form(raw, request)
    if "#" in raw:
        raise _bad(400, "a request target has no fragment")
    if raw.startswith("//"):
        raw = "/" + raw.lstrip("/")  # `--url http://host/` doubles the slash
    if not raw.isascii():
        raise _bad(400, "a request target is ASCII; encode other characters")
    headers = request.headers
    if "Transfer-Encoding" in headers:
        if "Content-Length" in headers:
            raise _bad(400, "both Transfer-Encoding and Content-Length")
        if request.version < HttpVersion11:
            raise _bad(400, "HTTP/1.0 has no Transfer-Encoding")
        if headers["Transfer-Encoding"].strip().lower() != "chunked":
            raise _bad(400, "a Transfer-Encoding other than chunked")
    if len(headers.getall("Content-Length", ())) > 1 or len(headers.getall("Host", ())) > 1:
        raise _bad(400, "a header that must stand once stands twice")
    return raw


def _is_ours(target: str) -> bool:
    """/_proxy and all below it; every other path is Vast's own."""
    return target.startswith(OURS) and (len(target) == len(OURS) or target[len(OURS)] in "/?")


def _origin_form(raw: str, request: web.BaseRequest) -> str:
    """An absolute target is accepted if it names this very proxy (RFC 9112 3.2.2)."""
    scheme, mark, rest = raw.partition("://")
    authority, slash, path = rest.partition("/")
    own = request.transport.get_extra_info("sockname") if request.transport is not None else None
    tls = request.transport is not None and request.transport.get_extra_info("sslcontext") is not None
    if mark and scheme.lower() == ("https" if tls else "http") and own is not None:
        names = {f"{own[0]}:{own[1]}", f"localhost:{own[1]}", f"[{own[0]}]:{own[1]}"}
        if authority.lower() in names:
            return slash + path if slash else "/"
    raise _bad(400, "not a forward proxy: point the client's base URL at it")


@lru_cache(maxsize=2048)
def _field(name: bytes, value: bytes) -> tuple[str, str]:
    """One field as text. A client says most of them alike in every request: ten thousand who wait share them."""
    return name.decode("ascii"), value.decode()


def _fields(raw: tuple[tuple[bytes, bytes], ...]) -> Headers:
    """All fields as text. Raises Refusal for a value that is not UTF-8."""
    try:
        return tuple(
            _field(name, value) if len(name) + len(value) <= LONGEST_SHARED else (name.decode("ascii"), value.decode())
            for name, value in raw
        )
    except UnicodeDecodeError:
        raise _bad(400, "a header is not UTF-8") from None


def _head_length(request: web.BaseRequest) -> int:
    return len(request._message.path) + sum(len(name) + len(value) for name, value in request.raw_headers)


def _bad(status: int, msg: str) -> Refusal:
    return Refusal(status, "bad_request", msg)


# --- Out --------------------------------------------------------------------------------------------------------------

_REASONS = {status.value: status.phrase for status in HTTPStatus}


def _refused(refusal: Refusal) -> Response:
    """A refusal as the clients understand it; the type exactly so, for they compare it (vastai 1.9.1)."""
    headers = [("Content-Type", "application/json"), ("Date", formatdate(usegmt=True))]
    retry_after = refusal.retry_after_header()
    if retry_after is not None:
        headers.append(("Retry-After", retry_after))
    return Response(refusal.status, tuple(headers), refusal.body())


_ID = b"X-Request-ID: %b\r\n"
_HIT = (
    b"X-Request-ID: %b\r\nAge: %d\r\nCache-Status: vast-proxy; hit; ttl=%.0f\r\n"
    b'Server-Timing: queue;dur=0.0, upstream;dur=0.0, total;dur=%.1f, attempts;desc="0"\r\n'
)
_TIMING = b'Server-Timing: queue;dur=%.1f, upstream;dur=%.1f, total;dur=%.1f, attempts;desc="%d"\r\n'


def _told(exchange: Exchange, total: float) -> bytes:
    """What became of the request, as header lines: X-Request-ID, Cache-Status (RFC 9211), Age, Server-Timing."""
    name = exchange.request_id.encode()
    match exchange.cache:
        case CacheStatus.HIT:  # the most frequent one, made in one go
            return _HIT % (name, max(0.0, exchange.age or 0), exchange.ttl or 0, total * 1000)
        case CacheStatus.STALE if exchange.attempts == 0:
            status = f"hit; ttl={exchange.ttl or 0:.0f}; detail=stale"
        case CacheStatus.STALE:
            status = f"fwd=stale; ttl={exchange.ttl or 0:.0f}; detail=stale"
        case CacheStatus.REFUSED:
            status = f"detail={exchange.code}"
        case CacheStatus.COLLAPSED:
            status = f"fwd={'miss' if exchange.effect in ('read', 'search') else 'method'}; collapsed"
        case CacheStatus.MISS:
            status = f"fwd={'stale' if exchange.was_stale else 'miss'}"
            if exchange.stored:
                status += f"; stored; ttl={exchange.ttl or 0:.0f}"
        case _:
            status = "fwd=bypass" if exchange.effect in ("read", "search") else "fwd=method"
    age = b"Age: %d\r\n" % max(0.0, exchange.age) if exchange.age is not None else b""
    times = (exchange.queued * 1000, exchange.upstream * 1000, total * 1000, exchange.attempts)
    told = (name, age, status.encode("latin-1"), _TIMING % times)
    return b"X-Request-ID: %b\r\n%bCache-Status: vast-proxy; %b\r\n%b" % told


def _head(response: Response, request: web.BaseRequest, extra: bytes, framing: bytes, *, keep_alive: bool) -> bytes:
    reason = response.reason or _REASONS.get(response.status, "")
    lines = [f"HTTP/1.1 {response.status} {reason}\r\n".encode("utf-8", "surrogateescape")]  # as aiohttp decoded it
    if response.head:
        lines.append(response.head)
    else:
        lines.append("".join([f"{name}: {value}\r\n" for name, value in response.headers]).encode("latin-1"))
    lines.append(framing)
    lines.append(extra)
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    elif request.version < HttpVersion11:
        lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def _has_no_body(request: web.BaseRequest, status: int) -> bool:
    return request.method == "HEAD" or status in (204, 304) or 100 <= status < 200


class _Reply(web.StreamResponse):
    """A whole answer, written as the bytes it is in one go: aiohttp would add fields, fold names and set the length.

    Under `StreamResponse`'s contract with the connection: `prepare`, `write_eof`, `keep_alive`.
    """

    def __init__(self, response: Response, request: web.BaseRequest, extra: bytes) -> None:
        self._response = response
        self._extra = extra
        self._request = request
        self._keep_alive = request.keep_alive
        self._eof_sent = False
        self._status = response.status

    def force_close(self) -> None:
        self._keep_alive = False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        request, response = self._request, self._response
        transport = request.transport
        if self._eof_sent:
            return
        self._eof_sent = True
        if transport is None or transport.is_closing():
            if response.receipt is not None:
                response.receipt.lost()
            return
        framing = b""
        body = response.body
        if _has_no_body(request, response.status):
            body = b""
        elif not response.head and not any(name.lower() == "content-length" for name, _ in response.headers):
            framing = b"Content-Length: %d\r\n" % len(body)
        keep_alive = bool(self._keep_alive)
        transport.write(_head(response, request, self._extra, framing, keep_alive=keep_alive) + body)
        _written(request, response)
        if len(body) > 65536:
            await request.protocol._drain_helper()


def _written(request: web.BaseRequest, response: Response) -> None:
    """Its client has been told, as far as can be known, unless the connection turns out to have been closed before."""
    if response.receipt is not None:
        response.receipt.written()
        if isinstance(request.protocol, _Connection):
            request.protocol.written(response.receipt)


class _Streamed(web.StreamResponse):
    """An answer that has been written already."""

    def __init__(self, *, keep_alive: bool, status: int) -> None:
        self._keep_alive = keep_alive
        self._eof_sent = True
        self._status = status

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


async def _stream(
    response: Response, request: web.BaseRequest, extra: bytes, exchange: Exchange, *, last: bool
) -> web.StreamResponse:
    """Pass a large answer on as it comes, no faster than the client takes it."""
    rest = response.rest
    assert rest is not None
    whole = False
    try:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away")
        known = any(name.lower() == "content-length" for name, _ in response.headers)
        chunked = not known and request.version >= HttpVersion11
        keep_alive = bool(request.keep_alive) and (known or chunked) and not last
        framing = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        transport.write(_head(response, request, extra, framing, keep_alive=keep_alive))
        try:
            await _write(request, response.body, exchange, chunked=chunked)
            response.body = b""
            async for chunk in rest:
                await _write(request, chunk, exchange, chunked=chunked)
        except Exception as error:
            # The head is out: all that is left is to let the client see that the answer is not whole.
            exchange.code = "broken_off"
            _reset(transport)
            if not isinstance(error, UpstreamError | ConnectionError):
                log.exception("an answer was broken off by a fault of the proxy's own")
            raise ConnectionResetError("the answer is not whole") from None
        except asyncio.CancelledError:
            _break_off(request, transport, exchange)
            raise
        if chunked:
            transport.write(b"0\r\n\r\n")
        _written(request, response)
        whole = True
        return _Streamed(keep_alive=keep_alive, status=response.status)
    finally:
        rest.close()
        if not whole and response.receipt is not None:
            response.receipt.lost()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection so that no client takes it for the end of an answer, not even one that is told no length."""
    # uvloop's sockets do not let this be set, and a TLS connection that its client has closed has none any more.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _break_off(request: web.BaseRequest, transport: asyncio.Transport, exchange: Exchange) -> None:
    """Who was answered has left, or the proxy is being stopped: what was sent must not pass for the whole answer."""
    connection = request.protocol
    assert isinstance(connection, _Connection)
    if connection.stalled or connection._manager is not None:
        exchange.code = "broken_off"
    _reset(transport)


async def _write(request: web.BaseRequest, data: bytes, exchange: Exchange, *, chunked: bool) -> None:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client went away")
    if not data:
        return  # as a chunk it would be the end
    exchange.bytes_out += len(data)
    connection = request.protocol
    assert isinstance(connection, _Connection)
    connection.look()
    if chunked:
        transport.write(b"%x\r\n" % len(data) + data + b"\r\n")
    else:
        transport.write(data)
    connection.look()
    await request.protocol._drain_helper()
