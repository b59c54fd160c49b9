"""Who asks: one digest of every way in which a request can carry a key."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from .messages import Request

ANONYMOUS = "anonymous"
KEY_FIELDS = frozenset({"api_key"})
"""Names of the query parameter and of the JSON field in which clients send the key as well."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose limits, epochs and answers these are. Holds no key, only its digest."""

    credential: str
    """Digest of the key that goes upstream; `anonymous` without one. Equal for one given by header, query or body."""
    member: str = ""
    """In team mode the member's name, by whose token the request came; else empty."""
    address: str = ""
    """The client's; empty where nobody said."""
    weight: float = 1.0
    """The share of turns beside others'."""

    @property
    def who(self) -> str:
        """Between whom turns are shared: the member, else the key together with the address it comes from."""
        return self.member or f"{self.credential} {self.address}"

    @property
    def author(self) -> str:
        """Whose write is the same when it comes again: the key's, in team mode the member's with that key."""
        return f"{self.credential} {self.member}" if self.member else self.credential

    @property
    def label(self) -> str:
        """Short enough for a log line."""
        return self.member or (self.credential if self.credential == ANONYMOUS else self.credential[:8])


def shown(who: str) -> str:
    """A credential, or `Caller.who`, short enough for people: of a digest its first digits."""
    credential, space, address = who.partition(" ")
    return (credential[:8] if re.fullmatch(r"[0-9a-f]{16}", credential) else credential) + space + address


def identify(request: Request) -> Caller:
    """The caller of a request, by Authorization, `?api_key=`, the body's `api_key`, and Cookie.

    A key given twice is one identity, as the clients do it; two different keys in one request are an identity of their
    own, since it is not known which of them the endpoint will believe.
    """
    found = keys_given(request)
    cookies = [value for name, value in request.headers if name.lower() == "cookie"]
    if not found and not cookies:
        return Caller(ANONYMOUS)
    if len(found) == 1 and not cookies:
        return Caller(digest(next(iter(found))))
    # Several keys, or a session beside the key: every value counts, and where it stood.
    return Caller(digest(json.dumps([sorted((key, sorted(set(places))) for key, places in found.items()), cookies])))


def keys_given(request: Request) -> dict[str, list[str]]:
    """Every key that a request carries, and where: header, query, body."""
    found: dict[str, list[str]] = {}
    for name, value in request.headers:
        if name.lower() == "authorization":
            found.setdefault(_bare(value), []).append("header")
    _, _, query = request.target.partition("?")
    if query:
        for key in _from_query(query):
            found.setdefault(key, []).append("query")
    if request.body:
        for key in _from_body(request.body):
            found.setdefault(key, []).append("body")
    found.pop("", None)
    return found


def digest(secret: str) -> str:
    """What may be shown and kept of a key: 64 bits of its SHA-256, which no key of full length can be guessed from."""
    return hashlib.sha256(b"vast-proxy credential\0" + secret.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _bare(authorization: str) -> str:
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else authorization.strip()


def _from_query(query: str) -> list[str]:
    if "api" not in query and "%" not in query:
        return []
    pairs = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    return [value for name, value in pairs if name in KEY_FIELDS]


def _from_body(body: bytes) -> list[str]:
    # A backslash may hide the name ("api\u005fkey"), so only its absence proves that there is none.
    if b"api_key" not in body and b"\\u" not in body and b"%" not in body:
        return []
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        if body.lstrip()[:1] in (b"{", b"["):
            return []
        return _from_query(body.decode("utf-8", "surrogateescape"))
    if not isinstance(fields, dict):
        return []
    return [str(value) for name, value in fields.items() if name in KEY_FIELDS and value is not None]
