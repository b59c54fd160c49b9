"""Who asks: one digest of every way in which a request can carry a key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from .messages import Request

ANONYMOUS = "anonymous"
KEY_FIELDS = frozenset({"api_key"})
"""Names of the query parameter and of the JSON field in which clients send the key as well."""
LARGEST_WITH_KEY = 64 * 1024
"""Bytes of a body in which a key is looked for: those of clients that send one there are a few hundred."""


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


def identify(request: Request, given: Mapping[str, list[str]] | None = None) -> Caller:
    """The caller of a request, by Authorization, `?api_key=`, the body's `api_key`, and Cookie.

    A key given twice is one identity, as the clients do it; two different keys in one request are an identity of their
    own, since it is not known which of them the endpoint will believe. `given`: its keys, where they are known already.
    """
    found = keys_given(request) if given is None else given
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
            found.setdefault(bare(value), []).append("header")
    _, _, query = request.target.partition("?")
    if query:
        for key in _from_pairs(query):
            found.setdefault(key, []).append("query")
    if request.body and len(request.body) <= LARGEST_WITH_KEY:
        for key in _from_body(request.body):
            found.setdefault(key, []).append("body")
    found.pop("", None)
    return found


def digest(secret: str) -> str:
    """What may be shown and kept of a key: 64 bits of its SHA-256, which no key of full length can be guessed from."""
    return hashlib.sha256(b"vast-proxy credential\0" + secret.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bare(authorization: str) -> str:
    """What an Authorization header holds, without the word Bearer."""
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else authorization.strip()


# Nobody is known yet where this is done: what does not carry a key must cost no more than to be looked through.
_NAME = "".join(f"(?:{letter}|%{ord(letter):02x}|%{ord(letter):02X})" for letter in "api_key")
_PAIR = re.compile(rf"(?:^|&){_NAME}=([^&]*)")


def _from_pairs(text: str) -> list[str]:
    """Of a query, or a form (application/x-www-form-urlencoded)."""
    if "api" not in text and "%" not in text:
        return []
    found = _PAIR.findall(text)
    return [unquote_plus(value, errors="surrogateescape") for value in found]


def _from_body(body: bytes) -> list[str]:
    # A backslash may hide the name ("api\u005fkey"), so only its absence proves that there is none.
    if b"api_key" not in body and b"\\u" not in body and b"%" not in body:
        return []
    try:
        # Numbers stay as they were written: one of 5000 digits is JSON too.
        fields = json.loads(body, object_pairs_hook=_Object, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        if body.lstrip()[:1] in (b"{", b"["):
            return []
        return _from_pairs(body.decode("utf-8", "surrogateescape"))
    if not isinstance(fields, _Object):
        return []
    return [str(value) for name, value in fields if name in KEY_FIELDS and value is not None]


class _Object(list[tuple[str, Any]]):
    """A JSON object, with every field of those that have the same name."""
