"""Which writes are one and the same, asked for again: by repetition after a lost answer, or by Idempotency-Key."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from .errors import Refusal
from .identity import ANONYMOUS, Caller
from .limiting import decoded
from .messages import Request, Response
from .routing import Effect, Route, parameter
from .units import Seconds

KEY_FOR = 24 * 3600.0
"""Seconds for which an Idempotency-Key is remembered."""
LONGEST_KEY = 255
"""Characters of an Idempotency-Key."""
FIELD = "idempotency-key"
_ALIASES = {"deployment": "deployments", "workergroups": "autojobs", "bundles": "asks"}
_STARTS_ANEW = re.compile(r"/instances/(reboot|recycle)/")
_MADE = re.compile(rb'"new_contract"\s*:\s*([0-9]+)')


@dataclass(frozen=True, slots=True)
class WriteRules:
    """Whether a write that comes again is the same one: `writes` in the settings."""

    guard: Seconds = 60.0
    """A write that was sent, and whose client left before it heard the outcome, is not sent again when the same comes
    again (same key, path and body) within this time: it gets the outcome of the first. 0: always sent again."""


@dataclass(frozen=True, slots=True)
class Write:
    """One write, as far as it matters for knowing it again. Holds digests only, no key and no body."""

    fingerprint: str
    """Equal for the same request of the same caller to the same origin."""
    credential: str
    name: str
    """Its route."""
    effect: str
    noun: str
    """What kind of thing it is about: `instances`, `asks`, …"""
    subject: str
    """Which one of them; empty where the path names none."""
    key: str = ""
    """Digest of its Idempotency-Key; empty without one."""
    author: str = ""
    """Whose it is: the key's, in team mode the member's with that key. Empty in a journal of an older version."""

    @property
    def adoptable(self) -> bool:
        """May it be the same one when it comes again? Not where nobody can say whose it is, nor a sign of life."""
        return self.credential != ANONYMOUS and not self.name.endswith("/heartbeat/")


def describe(request: Request, route: Route, caller: Caller, origin: str, key: str = "") -> Write:
    """The write that a request is. `origin`: the upstream it goes to; `key`: its Idempotency-Key."""
    if caller.credential == ANONYMOUS:
        key = ""  # anybody's
    words = [segment for segment in route.template.split("/") if segment and segment[0] != "{"]
    nouns = [word for word in words if word != "api" and not (word[0] == "v" and word[1:].isdigit())]
    subject = parameter(route, request.target)
    return Write(
        fingerprint(request, caller, origin),
        caller.credential,
        route.name,
        route.effect,
        _ALIASES.get(nouns[0], nouns[0]) if nouns else "",
        subject[0] if subject else "",
        hashlib.sha256(f"{caller.author} {origin}\0{key}".encode()).hexdigest()[:32] if key else "",
        caller.author,
    )


def fingerprint(request: Request, caller: Caller, origin: str) -> str:
    """Equal for a request and its repetition by the same caller: method, target and body to the byte."""
    told = f"{caller.author} {origin} {request.method} {request.target}\0"
    return hashlib.sha256(told.encode("utf-8", "surrogateescape") + request.body).hexdigest()[:32]


def made(response: Response) -> str:
    """The id of the instance that a write has made, or an empty text."""
    found = _MADE.search(decoded(response.headers, response.body) or b"")
    return found[1].decode() if found else ""


def overtakes(later: Write, earlier: Write, made: str = "") -> bool:
    """Was the earlier write's effect perhaps undone by the later one, so that asking for it again means to do it again?

    Stop, start, stop: the last stop is another one than the first. What sets a state can be sent too often without
    harm, so it counts as overtaken by anything that may be about the same thing, whoever asks for it. What costs money
    must not be, so that takes a write of the same author that can undo it: one that destroys the very same thing, or
    what was `made`. A reboot is undone by whatever sets the state of that instance.
    """
    if later.credential != earlier.credential or later.fingerprint == earlier.fingerprint:
        return False
    if earlier.effect == Effect.WRITE:
        same = earlier.subject == later.subject or not (earlier.subject and later.subject)
        return later.noun == earlier.noun and same
    if later.author != earlier.author:
        return False
    destroys = later.name.startswith("DELETE ")
    if made and later.noun == "instances" and later.subject == made and destroys:
        return True
    undoes = destroys or _STARTS_ANEW.search(earlier.name) is not None
    return undoes and later.noun == earlier.noun and bool(earlier.subject) and earlier.subject == later.subject


def idempotency_key(request: Request) -> str:
    """The Idempotency-Key of a request, or an empty text (draft-ietf-httpapi-idempotency-key-header, section 2).

    A quoted text (RFC 8941 3.3.3), or, as most clients send it, the same without quotes. Raises Refusal.
    """
    found = [value.strip() for name, value in request.headers if name.lower() == FIELD]
    if not found:
        return ""
    key = found[0]
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(found) > 1 or not 0 < len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
        msg = f"Idempotency-Key: expected one text of 1 to {LONGEST_KEY} printable ASCII characters"
        raise Refusal(400, "bad_request", msg)
    return key


def conflict() -> Refusal:
    """An Idempotency-Key that came before with another request (the draft's section 2.7)."""
    msg = "This Idempotency-Key was used for another request within the last day: take a new key for a new request"
    return Refusal(422, "idempotency_conflict", msg)
