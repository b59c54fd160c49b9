"""The page at /_proxy/, and the events that keep it live: what is so, the last exchanges, and the last hour.

A listener is not sent to, it asks: when it has taken what it was given, and a second has passed, it is given what is
new since. So one that is slow gets less, nothing is kept for it, and one that takes nothing at all is reset as any
client is (`server.send_timeout`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from .clock import Clock
from .policy.errors import CODES, FAULT
from .policy.messages import Exchange, Headers, Response, Step

KEPT = 100
"""The last exchanges that are shown."""
STEP, STEPS = 10.0, 360
"""The last hour, in so many seconds each."""
EVERY, QUIET = 1.0, 15.0
"""Seconds between two events at least, and after which a comment says that the connection lives."""
LISTENERS = 16
SHARE = 20.0
"""Once it was seen what is so, so many times as long as that took pass before it is looked at again, at the least."""

Status = Callable[[], Mapping[str, Any]]
"""What is so at this moment: the fields of /_proxy/status."""

_FOLDER = Path(__file__).parent / "page"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# Nothing from elsewhere, no script and no style but the page's own files; the icon is an empty data: URL.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Slot:
    """One step of the last hour: what ended within it, and who waited."""

    __slots__ = ("errors", "faults", "number", "refusals", "requests", "saved", "wait")

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests = self.saved = self.refusals = self.errors = self.faults = 0
        self.wait = 0.0
        """The longest, in seconds, of those that were over and of those that were not."""

    def shown(self) -> list[float]:
        """In the order that the page knows."""
        counts = [self.number, self.requests, self.saved, self.refusals, self.errors, self.faults]
        return [*counts, round(self.wait, 2)]


class Window:
    """Owns the last exchanges, the last hour, and the listeners."""

    def __init__(self, clock: Clock, status: Status) -> None:
        self._clock = clock
        self._status = status
        self._started = round(clock.wall())
        self._seen = self._changes = 0
        self._recent: deque[tuple[int, float, Exchange]] = deque(maxlen=KEPT)
        self._hour: deque[Slot] = deque(maxlen=STEPS)
        self._listeners: set[_Listener] = set()
        self._over = asyncio.Event()
        self._again_at = 0.0
        self._now: dict[str, str] = {}
        self._files = {
            path: _static(_FOLDER / name)
            for path, name in (("", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js"))
        }

    def __repr__(self) -> str:
        return f"<Window {self._seen} exchanges seen, {len(self._listeners)} listeners>"

    def pages(self, root: str) -> dict[str, Callable[[str], Response]]:
        """What there is to be seen, by path."""

        def static(path: str) -> Callable[[str], Response]:
            return lambda method: self._files[path]

        return {root + path: static(path) for path in self._files} | {root + "/events": self.events}

    def observe(self, exchange: Exchange) -> None:
        """Remember one exchange, in the place of the oldest."""
        if exchange.effect == "admin":
            return
        self._seen += 1
        self._changes += 1
        self._recent.append((self._seen, self._clock.wall(), exchange))
        slot = self._slot(exchange.began + exchange.total)
        slot.requests += 1
        slot.saved += exchange.saved
        if exchange.code:
            slot.errors += 1
            slot.faults += CODES.get(exchange.code, FAULT) == FAULT
        if exchange.queued > slot.wait:
            slot.wait = exchange.queued

    def tried(self, exchange: Exchange, step: Step) -> None:
        """Count a 429 when it comes, not when its request ends."""
        if step.refused:
            self._changes += 1
            self._slot(step.ended).refusals += 1

    def waits(self, oldest: float) -> None:
        """Somebody has waited for so many seconds, and still does."""
        slot = self._slot(self._clock.now())
        slot.wait = max(slot.wait, oldest)

    def _slot(self, at: float) -> Slot:
        number, hour = int(at // STEP), self._hour
        if not hour or hour[-1].number < number:
            hour.append(Slot(number))
        return hour[-1]

    def events(self, method: str) -> Response:
        """An endless answer of Server-Sent Events; 503 if there are too many listeners."""
        if self._over.is_set() or len(self._listeners) >= LISTENERS:
            told = {"success": False, "error": "too_many_listeners", "msg": "too many pages are open; close one"}
            return Response(503, _headers("application/json"), json.dumps(told).encode())
        if method == "HEAD":
            return Response(200, _headers("text/event-stream"))
        listener = _Listener(self)
        self._listeners.add(listener)
        return Response(200, _headers("text/event-stream"), rest=listener)

    def close(self) -> None:
        """End every stream: the proxy is being stopped."""
        self._over.set()

    def gone(self, listener: _Listener) -> None:
        """It listens no more."""
        self._listeners.discard(listener)

    async def pause(self) -> bool:
        """Until it may be looked again. False: it is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVERY):
                await self._over.wait()
        return not self._over.is_set()

    @property
    def seen(self) -> int:
        """Exchanges since the start."""
        return self._seen

    @property
    def changes(self) -> int:
        """Another number whenever there are news."""
        return self._changes

    def now(self) -> dict[str, str]:
        """What is so, in parts, each as JSON that stays the same while nothing happens: dates instead of waits.

        A part is a field of the status, or one line or limit, by `lines/` or `limits/` and its name.
        """
        began = self._clock.now()
        if began >= self._again_at:
            wall = self._clock.wall()
            status = dict(self._status())
            del status["uptime"]
            parts: dict[str, Any] = {"started": self._started}
            for group in ("lines", "limits"):
                for entry in status.pop(group):
                    # An account without a limit, and without a reason to speak of it, says nothing.
                    if group == "lines" or entry["interval"] or entry["route"] != "account" or entry["correction"]:
                        name = f"{group}/{entry['credential']} {entry['upstream']} {entry['route']}"
                        parts[name] = _dated(entry, wall)
            parts |= status
            parts["origins"] = {name: _untimed(origin, wall) for name, origin in status["origins"].items()}
            self._now = {name: _text(part) for name, part in parts.items()}
            now = self._clock.now()
            # With thousands of lines that takes a while, and there is more to be done than to be looked at.
            self._again_at = began + max(EVERY / 2, SHARE * (now - began))
        return self._now

    def news(self, seen: int, since: int) -> tuple[list[dict[str, Any]], list[list[float]]]:
        """The exchanges after number `seen`, and the steps from number `since` on, the oldest first."""
        fresh = [item for item in self._recent if item[0] > seen]
        slots = [slot for slot in self._hour if slot.number >= since]
        return [_shown(*item) for item in fresh], [slot.shown() for slot in slots]

    def step(self) -> int:
        """The number of the present step."""
        return int(self._clock.now() // STEP)

    def wall(self) -> float:
        """Epoch seconds."""
        return round(self._clock.wall(), 2)


class _Listener:
    """One page that is open: what follows the head of its endless answer."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._closed: list[Callable[[], None]] = []

    async def __aiter__(self) -> AsyncIterator[bytes]:
        window = self._window
        yield b"retry: 2000\n\n"
        told: dict[str, str] = {}
        changes, seen, step, silent = -1, 0, 0, 0.0
        while True:
            now = window.now()
            if now != told or window.changes != changes:
                exchanges, slots = window.news(seen, step)
                parts = changed(told, now)
                told, changes, seen, step, silent = now, window.changes, window.seen, window.step(), 0.0
                yield self._event(parts, exchanges, slots)
            elif silent >= QUIET:
                silent = 0.0
                yield b": nothing new\n\n"
            if not await window.pause():
                return
            silent += EVERY

    def _event(self, parts: str, exchanges: list[dict[str, Any]], slots: list[list[float]]) -> bytes:
        more = {"wall": self._window.wall(), "step": self._window.step(), "exchanges": exchanges, "slots": slots}
        return f'data: {{"now":{parts},"news":{_text(more)}}}\n\n'.encode()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Called once it is listened to no more."""
        self._closed.append(callback)

    def close(self) -> None:
        """It is listened to no more. Further calls change nothing."""
        self._window.gone(self)
        while self._closed:
            self._closed.pop()()


def changed(told: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The parts of `now` that are others than was told, as one JSON object; null for those that are no more."""
    if now is told:
        return "{}"
    parts = [f"{_text(name)}:{part}" for name, part in now.items() if told.get(name) != part]
    parts += [f"{_text(name)}:null" for name in told if name not in now]
    return "{" + ",".join(parts) + "}"


_text = json.JSONEncoder(separators=(",", ":")).encode


def _shown(number: int, wall: float, exchange: Exchange) -> dict[str, Any]:
    """An exchange without what is empty, 0 or false: that is most of most of them."""
    told = {
        "n": number,
        "at": round(wall, 2),
        "id": exchange.request_id,
        "method": exchange.method,
        "route": exchange.route,
        "caller": exchange.caller,
        "status": exchange.status,
        "code": exchange.code,
        "kind": CODES.get(exchange.code, FAULT) if exchange.code else "",
        "cache": exchange.cache.value,
        "stored": exchange.stored,
        "queued": round(exchange.queued, 3),
        "upstream": round(exchange.upstream, 3),
        "total": round(exchange.total, 3),
        "attempts": exchange.attempts,
        "refusals": exchange.refusals,
        "left": exchange.left,
    }
    return {name: value for name, value in told.items() if value}


def _dated(entry: Mapping[str, Any], wall: float) -> dict[str, Any]:
    """`…_in` and `…_for` as dates, `…_at`, 0 for what was to come and has: else it would differ at every look."""
    dated = {}
    for name, value in entry.items():
        if name.endswith("_in"):
            dated[name[:-3] + "_at"] = None if value is None else round(wall + value, 1) if value > 0 else 0
        elif name.endswith("_for"):
            dated[name[:-4] + "_at"] = round(wall - value)
        elif name != "tokens":
            dated[name] = value
    return dated


def _untimed(origin: Mapping[str, Any], wall: float) -> dict[str, Any]:
    """With the date when it has all its tokens instead of how many it has: that comes to the same."""
    untimed = {name: value for name, value in origin.items() if name != "tokens"}
    if origin["rate"]:
        missing = origin["burst"] - origin["tokens"]
        untimed["full_at"] = round(wall + missing / origin["rate"], 1) if missing > 0 else 0
    return untimed


def _headers(kind: str) -> Headers:
    return (
        ("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    )


def _static(file: Path) -> Response:
    more = (("Content-Security-Policy", _POLICY), ("Referrer-Policy", "no-referrer"))
    return Response(200, (*_headers(_TYPES[file.suffix[1:]]), *more), file.read_bytes())
