"""Everything under /_proxy/, and the log: what the proxy tells of itself. It observes every exchange, and no key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO
from urllib.parse import parse_qsl

from .policy.errors import CODES, FAULT
from .policy.identity import Caller
from .policy.messages import Exchange, Response, Step

Status = Callable[[int | None], Mapping[str, Any]]
"""What is so at this moment, with so many entries of a list at the most; None: all."""
Page = Callable[[str], Response]
"""Answers GET and HEAD, which it is told, of one path."""
OwnPage = Callable[[Caller, str], Response]
"""Answers a caller about its own work; it is told the query, too. May raise Refusal."""


class Admin:
    """Answers /_proxy/. Owns nothing but what it was told; `status` hands in the rest."""

    def __init__(
        self,
        status: Status,
        shown: int,
        ready: Callable[[], bool],
        pages: Mapping[str, Page] | None = None,
        own: Mapping[str, OwnPage] | None = None,
    ) -> None:
        """`shown`: entries of a list, unless more are asked for. `pages`, `own`: further ones, by path, without a
        slash at its end."""
        self._status = status
        self._shown = shown
        self._ready = ready
        self._pages = pages or {}
        self._own = own or {}
        self.counted = Totals()

    def __call__(self, method: str, target: str, caller: Caller | None = None) -> Response:
        """An answer to a request under /_proxy. `caller`: who asks, where that was to be proved. May raise Refusal."""
        path, _, query = target.partition("?")
        path = path.rstrip("/")
        if method not in ("GET", "HEAD"):
            return json_answer(405, {"success": False, "error": "method_not_allowed", "msg": "/_proxy/ is read only"})
        match path:
            case "/_proxy/health":
                return json_answer(200, {"success": True, "status": "alive"})
            case "/_proxy/ready":
                if self._ready():
                    return json_answer(200, {"success": True, "status": "ready"})
                return json_answer(503, {"success": False, "error": "not_ready", "msg": "starting, or shutting down"})
            case "/_proxy/status":
                whole = "all" in dict(parse_qsl(query, keep_blank_values=True))
                status = self._status(None if whole else self._shown)
                return json_answer(200, {"success": True, **status, "totals": self.counted.shown()})
        own = self._own.get(path)
        if own is not None and caller is not None:
            return own(caller, query)
        page = self._pages.get(path)
        if page is not None:
            return page(method)
        msg = "nothing here; there are /_proxy/, and in it health, ready, status, metrics, waiting and plan"
        return json_answer(404, {"success": False, "error": "not_found", "msg": msg})


class Totals:
    """Counts since the start: of exchanges at their end, of their tries as these end."""

    def __init__(self) -> None:
        self.requests = 0
        self.sends = 0
        self.refusals = 0
        self.saved = 0
        self.caches: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    def observe(self, exchange: Exchange) -> None:
        """Count one exchange."""
        if exchange.effect == "admin":
            return
        self.requests += 1
        self.saved += exchange.saved
        self.caches[exchange.cache.value] += 1
        if exchange.code:
            self.codes[exchange.code] += 1

    def tried(self, exchange: Exchange, step: Step) -> None:
        """Count one try."""
        self.sends += 1
        self.refusals += step.refused

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "requests": self.requests,
            "sent_upstream": self.sends,
            "refused_upstream": self.refusals,
            "calls_saved": self.saved,
            "cache": dict(self.caches),
            "our_errors": dict(self.codes),
            "error_kinds": {code: CODES.get(code, FAULT) for code in self.codes},
        }


class AccessLog:
    """One line an exchange, as text or JSON. No key, no query, no body: there is none in an exchange.

    The lines of one turn of the event loop are written together: a system call a line would cost more than the line.
    """

    def __init__(self, level: str, form: str, wall: Callable[[], float], stream: TextIO | None = None) -> None:
        self._wall = wall
        self._stream = stream if stream is not None else sys.stderr
        self._lines: list[str] = []
        self._now, self._date = 0.0, ""
        self.configure(level, form)

    def configure(self, level: str, form: str) -> None:
        """Other settings."""
        self._on = level in ("debug", "info")
        self._write = self._as_json if form == "json" else self._as_text

    def observe(self, exchange: Exchange) -> None:
        """Write its line."""
        if self._on and exchange.effect != "admin":
            if not self._lines:
                asyncio.get_running_loop().call_soon(self.flush)
                self._now = self._wall()
                self._date = clock_text(self._now)
            self._lines.append(self._write(exchange))

    def flush(self) -> None:
        """Write what has gathered. A reader that went away is no reason to stop serving."""
        lines, self._lines = self._lines, []
        with contextlib.suppress(OSError, ValueError):
            self._stream.write("".join(lines))
            self._stream.flush()

    def _as_text(self, exchange: Exchange) -> str:
        cache = f"{exchange.cache.value}+stored" if exchange.stored else exchange.cache.value
        end = f" code={exchange.code}" if exchange.code else ""
        if exchange.refusals:
            end += f" refused={exchange.refusals}"
        if exchange.left:
            end += " left"
        if exchange.steps and exchange.upstream_status not in (0, exchange.status):
            end += f" upstream_status={exchange.upstream_status}"
        end += f" id={exchange.request_id}"
        return (
            f"{self._date} {exchange.method} {exchange.route or '-'} caller={exchange.caller or '-'} "
            f"from={exchange.address or '-'} status={exchange.status} cache={cache} "
            f"queued={exchange.queued * 1000:.0f}ms upstream={exchange.upstream * 1000:.0f}ms "
            f"attempts={exchange.attempts}{end}\n"
        )

    def _as_json(self, exchange: Exchange) -> str:
        return (
            json.dumps(
                {
                    "at": round(self._now, 3),
                    "event": "exchange",
                    "id": exchange.request_id,
                    "method": exchange.method,
                    "route": exchange.route,
                    "effect": exchange.effect,
                    "caller": exchange.caller,
                    "from": exchange.address,
                    "status": exchange.status,
                    "upstream_status": exchange.upstream_status or None,
                    "code": exchange.code or None,
                    "cache": exchange.cache.value,
                    "stored": exchange.stored,
                    "queued_ms": round(exchange.queued * 1000, 1),
                    "upstream_ms": round(exchange.upstream * 1000, 1),
                    "total_ms": round(exchange.total * 1000, 1),
                    "attempts": exchange.attempts,
                    "refused": exchange.refusals,
                    "bytes_out": exchange.bytes_out,
                    "left": exchange.left,
                }
            )
            + "\n"
        )


def clock_text(wall: float) -> str:
    """ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Events(logging.Formatter):
    """The program's own events, in the form of the access log's lines."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self._json:
            return json.dumps(
                {"at": round(record.created, 3), "event": "log", "level": record.levelname.lower(), "msg": text}
            )
        return f"{clock_text(record.created)} {record.levelname.lower()}: {text}"

    def formatException(self, ei: Any) -> str:
        """Where it happened, without the exception's text or any value: those may hold a key."""
        import traceback

        kind, _, trace = ei
        frames = [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
        return f"{kind.__name__ if kind else 'exception'} at " + " < ".join(reversed(frames))


def json_answer(status: int, value: Mapping[str, Any]) -> Response:
    """An answer of our own that nobody is to store."""
    # Not indented: that is done in Python, and takes five times as long as all the rest of it.
    body = json.dumps(value).encode() + b"\n"
    return Response(status, (("Content-Type", "application/json"), ("Cache-Control", "no-store")), body)
