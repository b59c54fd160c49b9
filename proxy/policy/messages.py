"""What travels along the path: a request, a response, and the record of one exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

Headers = tuple[tuple[str, str], ...]
"""Header fields in the order and spelling of the wire, repeated ones kept."""

# RFC 9110 section 7.6.1, and the older names still met in the field.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


# An answer has one, and it is the one in our log: that of the exchange, not that of a hop behind us.
NOT_OF_ANSWERS = HOP_BY_HOP | {"x-request-id"}


def end_to_end(headers: Headers, without: frozenset[str] = HOP_BY_HOP) -> Headers:
    """The fields that may be passed on: without hop-by-hop ones and those that Connection names (RFC 9110 7.6.1).

    `without`: NOT_OF_ANSWERS for an answer.
    """
    named: set[str] = set()
    for name, value in headers:
        if name.lower() == "connection":
            named.update(token.strip().lower() for token in value.split(","))
    dropped = without | named if named else without
    return tuple([item for item in headers if item[0].lower() not in dropped])


def header(headers: Headers, name: str) -> str | None:
    """The first value of a field, its name in lower case; None when absent."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return None


def content_coding(headers: Headers) -> str:
    """What was done to the body (RFC 9110 8.4), in small letters: `identity` for nothing, several as they stand."""
    found = [value for key, value in headers if key.lower() == "content-encoding"]
    if not found:
        return "identity"
    return ", ".join(found).strip().lower() or "identity"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came in: the raw target, end-to-end headers, the whole body as sent."""

    method: str
    target: str
    """Origin-form target, exactly as on the wire."""
    headers: Headers
    body: bytes = b""


class Rest(Protocol):
    """What follows the held part of a large answer."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Its chunks, once. Raises UpstreamError when the answer breaks off."""

    def on_close(self, callback: Callable[[], None]) -> None:
        """Called once the rest is read to its end, or given up."""

    def close(self) -> None:
        """Give it up. Further calls change nothing."""


class Receipt(Protocol):
    """Who wants to know whether a client got its answer."""

    def written(self) -> None:
        """The whole answer was handed to the client's connection."""

    def lost(self) -> None:
        """The client had left: before, or without having taken what was written."""


@dataclass(slots=True)
class Response:
    """One answer: whole in `body`, or, where it is larger than may be held, `body` and then `rest`."""

    status: int
    headers: Headers
    body: bytes = b""
    reason: str = ""
    rest: Rest | None = None
    """What follows `body` of a large answer; read once, by whoever leads."""
    head: bytes = b""
    """The header lines as they go on the wire, where they are stored so; then `headers` is empty."""
    receipt: Receipt | None = None
    """To be told what becomes of it."""
    redirected: bool = False
    """It is another target's answer, to which that of the request led: whatever it says, the request was done."""


class CacheStatus(Enum):
    """How an exchange was answered (RFC 9211)."""

    HIT = "hit"
    MISS = "miss"
    STALE = "stale"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    REFUSED = "refused"


SAVING = (CacheStatus.HIT, CacheStatus.COLLAPSED, CacheStatus.STALE)
"""How those are answered that need no call of their own; of stale ones some had one, in vain."""


class Step(NamedTuple):
    """One try at upstream; monotonic seconds."""

    began: float
    """When it began to wait for its turn."""
    granted: float | None
    """When the turn came; None: it was turned away."""
    ended: float
    """When the answer came, or what there was instead."""
    status: int = 0
    """Of the answer; 0: none came."""
    number: int = 0
    """Which send of its request it is, from 1 on; 0: it was turned away, or given up before a byte was sent."""
    refused: bool = False
    """By a 429 that another turn solves."""


def since(steps: Iterable[Step], joined: float) -> tuple[float, float]:
    """What of these tries fell into the time of one who joined them then: seconds in line, and at upstream."""
    queued = upstream = 0.0
    for step in steps:
        granted = step.ended if step.granted is None else step.granted
        queued += max(0.0, granted - max(step.began, joined))
        upstream += max(0.0, step.ended - max(granted, joined))
    return queued, upstream


class Trace(NamedTuple):
    """An exchange's place in a trace (W3C Trace Context, level 1); hexadecimal."""

    trace_id: str
    span_id: str
    """Of the exchange: the parent of what upstream does for it."""
    parent_id: str
    """Of the client; empty if it began here."""
    sampled: bool


@dataclass(slots=True)
class Exchange:
    """The one record of a request, filled along the path and read by every observer at its end.

    Those who count sends and 429s are told of each try as it ends, with the record as it is then: a request may last
    for half an hour, and the end of it is too late to learn that upstream refuses.
    """

    request_id: str = ""
    """The client's X-Request-ID, or one that was made."""
    began: float = 0.0
    """When its head had come; monotonic seconds."""
    method: str = ""
    route: str = ""
    """The route's template; never a raw path."""
    listed: bool = False
    """The route stands in the table; else its template is made of words of the client's."""
    origin: str = ""
    """Which upstream it is for: "api" or "serverless"."""
    caller: str = ""
    """Digest of the credential, shortened."""
    address: str = ""
    """The client's, as far as it can be believed."""
    effect: str = ""
    status: int = 0
    code: str = ""
    """The code of our own refusal, else empty."""
    cache: CacheStatus = CacheStatus.BYPASS
    was_stale: bool = False
    """There was a stored answer, past its time or from an earlier epoch."""
    stored: bool = False
    ttl: float | None = None
    """Seconds for which a stored answer stays fresh; negative once stale."""
    age: float | None = None
    attempts: int = 0
    """Sends to upstream, refused ones included."""
    refusals: int = 0
    """429s absorbed."""
    queued: float = 0.0
    """Seconds in which it waited for a turn, all attempts together; of a shared call, only since it joined."""
    upstream: float = 0.0
    """Seconds in which it was at upstream, likewise."""
    total: float = 0.0
    """Seconds from `began` to the end."""
    bytes_out: int = 0
    left: bool = False
    """The client went away before it was answered."""
    steps: tuple[Step, ...] = ()
    """Its tries, in order; empty where another's call was shared, or nothing was waited for."""
    trace: Trace | None = None
    """None where nobody traces."""

    @property
    def saved(self) -> bool:
        """It was answered without a call of its own."""
        return not self.attempts and self.cache in SAVING

    @property
    def upstream_status(self) -> int:
        """Of the last answer that upstream gave to it; 0: there was none."""
        return next((step.status for step in reversed(self.steps) if step.status), 0)
