"""What may be remembered: the question's key, freshness, what may be stored, what a write makes void (RFC 9111)."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from .canonical import canonical_json, canonical_target
from .errors import Refusal
from .identity import KEY_FIELDS, LARGEST_WITH_KEY, Caller
from .limiting import decoded
from .messages import Headers, Request, Response, content_coding, header
from .routing import ALL, Effect, Family, Route
from .units import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class CacheRules:
    """Bounds on remembering: `cache` in the settings."""

    search_ttl: Seconds = 60.0
    """How long the answer of a search for offers is fresh. Less, if you lose races for cheap machines."""
    stale_for: Seconds = 900.0
    """How much longer it may be served when upstream will not give a new one."""
    stale_after: Seconds = 5.0
    """A wait for a turn up to this is preferred to a stale answer, a stale answer to a longer wait."""
    max_bytes: Bytes = 64 * 1024 * 1024
    """Stored bytes, all answers together; the least recently used go first."""
    share_searches: bool = False
    """true: searches are answered from one cache for all keys. Offers may depend on who asks, so only among your own
    keys."""


# --- The question -----------------------------------------------------------------------------------------------------

# Fields that do not change what an answer says. Any other is part of the key: better a miss than another's answer.
_NEUTRAL = frozenset(
    {
        "accept-encoding",
        "accept-language",
        "authorization",  # in the credential
        "baggage",
        "cache-control",
        "content-length",
        "content-type",  # beside the body
        "cookie",  # in the credential
        "date",
        "expect",
        "host",
        "pragma",
        "priority",
        "sec-fetch-dest",
        "sec-fetch-mode",
        "sec-fetch-site",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-request-id",
    }
)
_CONDITIONAL = ("range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range")
_OFFERS = "/api/v0/bundles/"


@dataclass(frozen=True, slots=True)
class Directives:
    """Cache-Control of a request (RFC 9111 5.2.1), as far as it is honoured."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age: float | None = None
    max_stale: float | None = None


_PLAIN = Directives()


def directives(headers: Headers) -> Directives:
    """Read them; what is not understood is passed over. Pragma counts without Cache-Control (RFC 9111 5.4)."""
    value = None
    for name, text in headers:
        if name.lower() == "cache-control":
            value = text if value is None else f"{value},{text}"
    if value is None:
        return Directives(no_cache=True) if "no-cache" in (header(headers, "pragma") or "").lower() else _PLAIN
    named: dict[str, str] = {}
    for part in value.split(","):
        name, _, argument = part.strip().partition("=")
        named[name.strip().lower()] = argument.strip().strip('"')
    return Directives(
        no_cache="no-cache" in named,
        no_store="no-store" in named,
        only_if_cached="only-if-cached" in named,
        max_age=_delta(named.get("max-age")),
        max_stale=_delta(named["max-stale"] or "2147483648") if "max-stale" in named else None,
    )


def _delta(value: str | None) -> float | None:
    return float(value) if value is not None and value.isascii() and value.isdigit() else None


def may_share(route: Route, request: Request) -> bool:
    """May this request be answered by what another one was told? Reads and searches without preconditions."""
    if not route.is_read or request.method == "HEAD":
        return False
    return not any(name.lower() in _CONDITIONAL for name, _ in request.headers)


def question(
    route: Route, request: Request, caller: Caller, rules: CacheRules, origin: str = "", cleaned: str = ""
) -> str:
    """The key of what is asked, by whom, of which origin: equal where answers must be equal, epochs apart.

    Sees through key order in JSON, encodings of the query, a trailing slash, and the two spellings of an offer search.
    `cleaned`: digest of what is taken out of answers, so that one from which less was taken out is never found.
    """
    shared = rules.share_searches and route.family is not None and route.family.market
    who = "*" if shared else caller.credential
    target = canonical_target(request.target, drop=KEY_FIELDS)
    method, body, kind = request.method, request.body, ""
    if body:
        kind = (header(request.headers, "content-type") or "").partition(";")[0].strip().lower()
        if header(request.headers, "content-encoding") is None:
            body = _canonical_body(body)
    if route.template == _OFFERS:
        method, target, body, kind = _offer_search(method, target, request.target, body, kind)
    others = sorted(
        (name.lower(), value)
        for name, value in request.headers
        if name.lower() not in _NEUTRAL and (name.lower(), value) != ("accept", "*/*")
    )
    parts = json.dumps([who, origin, cleaned, route.upstream, method, target, kind, others], separators=(",", ":"))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass") + b"\0" + body).hexdigest()[:40]


def _canonical_body(body: bytes) -> bytes:
    """Its one spelling, without the key. As it is if it is no JSON, or so long that no key is looked for in it."""
    canonical = canonical_json(body, drop=KEY_FIELDS) if len(body) <= LARGEST_WITH_KEY else None
    return body if canonical is None else canonical


def _offer_search(method: str, target: str, raw: str, body: bytes, kind: str) -> tuple[str, str, bytes, str]:
    """`GET /bundles/?q={…}` and `POST /bundles/` with the same query are one question."""
    _, _, query = raw.partition("?")
    if method == "GET" and not body:
        pairs = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] not in KEY_FIELDS]
        if len(pairs) == 1 and pairs[0][0] == "q":
            canonical = canonical_json(pairs[0][1])
            if canonical is not None:
                return "POST", _OFFERS, canonical, "application/json"
    if method == "POST" and kind == "application/json" and "?" not in target:
        return "POST", _OFFERS, body, kind
    return method, target, body, kind


# --- Epochs -----------------------------------------------------------------------------------------------------------

LONGEST_LIFE = 14 * 24 * 3600.0
"""Seconds that a stored answer lives at most, whatever the settings say."""
LONGEST_FLIGHT = 3600.0
"""Seconds that a call is under way at most, as far as epochs are concerned: longer than anybody waits for one."""


def epochs_of_read(route: Route, caller: Caller, rules: CacheRules) -> tuple[str, ...]:
    """The epochs in whose light an answer is valid: their values are part of its key."""
    mine = f"epoch:{caller.credential}"
    if route.family is None:
        return (f"{mine}:any",)
    if route.family.market:
        market = f"epoch:market:{route.family.name}"
        return (market,) if rules.share_searches else (market, f"{mine}:all")
    return (f"{mine}:{route.family.name}", f"{mine}:all")


def epochs_of_write(
    route: Route, caller: Caller, outcome: Response | Refusal | Exception, families: Mapping[str, Family]
) -> tuple[str, ...]:
    """The epochs that end with this write, which may have been done: it was accepted, or its outcome is unknown.

    What is about the market rather than a caller ends for everybody.
    """
    if route.is_read or (route.effect is Effect.AUTH and not route.invalidates):
        return ()
    if isinstance(outcome, Response) and 400 <= outcome.status < 500 and not (outcome.redirected or _gone(outcome)):
        return ()
    mine = f"epoch:{caller.credential}"
    moved = [f"{mine}:any"]
    for name in sorted(route.invalidates):
        market = name in families and families[name].market
        moved.append(f"epoch:market:{name}" if market else f"{mine}:{name}")
    return tuple(moved)


def _gone(response: Response) -> bool:
    """An offer that was searched for is no longer there: every search that shows it is out of date."""
    return response.status in (404, 410) and b"no_such_ask" in (decoded(response.headers, response.body) or b"")


# --- Freshness and storing --------------------------------------------------------------------------------------------


def epoch_life(name: str, families: Mapping[str, Family], rules: CacheRules) -> float:
    """Seconds for which an epoch is remembered: as long as anything read before it began may still be found.

    No value comes twice, so what is read in a forgotten epoch is lost with it, and never comes back to life.
    """
    of = name.rpartition(":")[2]
    about = families.values() if of == ALL else [families[of]] if of in families else []
    return max([LONGEST_FLIGHT, *(sum(lifetimes(family, rules)) for family in about)])


def lifetimes(family: Family, rules: CacheRules) -> tuple[float, float]:
    """Seconds for which an answer of this family is fresh, and for how much longer it may serve stale."""
    ttl = rules.search_ttl if family.ttl is None else family.ttl
    stale_for = rules.stale_for if family.stale_for is None else family.stale_for
    ttl = min(ttl, LONGEST_LIFE)
    return ttl, min(stale_for, LONGEST_LIFE - ttl)


def fresh(age: float, ttl: float, asked: Directives) -> bool:
    """May an answer of that age be given to a client that asked so?"""
    if asked.no_cache:
        return False
    if asked.max_age is not None and age > asked.max_age:
        return False
    return age < ttl + (asked.max_stale or 0.0)


_FAILED = re.compile(rb'"success"\s*:\s*false')
_NO_INSTANCES = re.compile(rb'"instances"\s*:\s*(?:\[\s*\]|null)')
_NEVER_STORED = frozenset({"age", "cache-status", "retry-after", "set-cookie", "server-timing"})


def may_store(route: Route, response: Response) -> bool:
    """Whole 200s of cached routes, unless they fail in their body, set a cookie, or list no instance.

    An empty list of instances is what a hiccup of the vendor looks like, and a scheduler that believed it would rent
    everything again.
    """
    if route.family is None or response.status != 200 or response.rest is not None or not response.body:
        return False
    if header(response.headers, "set-cookie") is not None or header(response.headers, "content-range") is not None:
        return False
    plain = decoded(response.headers, response.body)
    if plain is None or _FAILED.search(plain):
        return False
    return not (route.family.name == "instances" and _NO_INSTANCES.search(plain))


@dataclass(slots=True)
class Stored:
    """A stored response: when the request that fetched it was sent, its head as it goes on the wire, its body."""

    born: float
    head: bytes
    """Header lines, each ended by CR LF, Content-Length among them."""
    body: bytes
    coded: bool
    """The body has a content coding (gzip or deflate)."""

    def headers(self) -> Headers:
        """The head as fields."""
        lines = self.head.decode("latin-1").split("\r\n")[:-1]
        return tuple((name, value) for name, _, value in (line.partition(": ") for line in lines))


_FRAME = struct.Struct("!d?I")


def freeze(response: Response, born: float) -> bytes:
    """A response as the bytes that a store keeps. What speaks of one exchange only is left out."""
    kept = [item for item in impersonal(response.headers) if item[0].lower() != "content-length"]
    kept.append(("Content-Length", str(len(response.body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in kept).encode("latin-1")
    coded = content_coding(response.headers) != "identity"
    return _FRAME.pack(born, coded, len(head)) + head + response.body


def thaw(frozen: bytes) -> Stored:
    """What `freeze` gave."""
    born, coded, length = _FRAME.unpack_from(frozen)
    start = _FRAME.size
    return Stored(born, frozen[start : start + length], frozen[start + length :], coded)


def accepts_gzip(headers: Headers) -> bool:
    """Does the client take gzip (RFC 9110 12.5.3)? Without Accept-Encoding: not asked for, so no."""
    taken: dict[str, bool] = {}
    for name, value in headers:
        if name.lower() == "accept-encoding":
            for part in value.split(","):
                coding, _, parameters = part.strip().partition(";")
                taken[coding.strip().lower()] = not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameters)
    return taken.get("gzip", taken.get("x-gzip", taken.get("*", False)))


def accepts_coding(asked: Headers, answered: Headers) -> bool:
    """Can the client take the answer in the coding it came in? One that asks for a coding gets what upstream chose."""
    coding = content_coding(answered)
    return coding not in ("gzip", "x-gzip") or accepts_gzip(asked)


def impersonal(headers: Headers) -> Headers:
    """What may be told to another than the one whose call it was: nothing of its limits, no cookie."""
    return tuple(
        (name, value)
        for name, value in headers
        if name.lower() not in _NEVER_STORED and not name.lower().startswith("x-ratelimit-")
    )


def plain(response: Response) -> Response:
    """The same answer without content coding, for a client that cannot take it. As it is when it cannot be decoded."""
    body = decoded(response.headers, response.body)
    if body is None:
        return response
    left_out = ("content-encoding", "content-length")
    headers = [(name, value) for name, value in response.headers if name.lower() not in left_out]
    headers.append(("Content-Length", str(len(body))))
    return Response(response.status, tuple(headers), body, response.reason)


def names(epochs: Sequence[bytes | None]) -> str:
    """Epoch values as a suffix of a key."""
    return b".".join([value or b"0" for value in epochs]).decode()
