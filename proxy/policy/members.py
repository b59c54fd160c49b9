"""Team mode: whose token a request carries, what that member may do, and the account's key in the token's place."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal
from urllib.parse import quote, unquote_plus

from . import caching
from .errors import Refusal
from .fields import spans
from .identity import KEY_FIELDS, LARGEST_WITH_KEY, Caller, digest, identify, keys_given
from .messages import Headers, Request, content_coding
from .routing import Effect, Route, Routes, canonical_name, is_plain, letters_of, words_of
from .spelling import holds
from .units import Count, Positive

PREFIX = "vp_"
"""What every gateway token begins with, so that it is not mistaken for a key of the vendor's."""
Kind = Literal["read", "search", "write", "spend", "auth"]
EFFECTS: tuple[Kind, ...] = ("read", "search", "write", "spend")
"""What a member may do that is not limited."""

TokenHash = Annotated[str, "token hash"]
"""`sha256:` and the SHA-256 of a gateway token in hexadecimal. A token is 256 bits of chance, which none guesses."""
RouteName = Annotated[str, "route"]


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that no repr, and so no log and no traceback, shows."""

    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Where one Vast key of the gateway is read from: an entry of `team.keys` in the settings."""

    file: Annotated[str, "file name"] = ""
    """A file with the key and nothing else in it, such as a Docker secret. It, or `env`, must be given."""
    env: str = ""
    """The name of an environment variable that holds the key."""

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.env):
            raise ValueError("expected either `file` or `env`")


@dataclass(frozen=True, slots=True)
class Member:
    """One who may use the gateway: an entry of `team.members` in the settings."""

    token: TokenHash = ""
    """The hash of the member's token. It must be given."""
    key: str = "default"
    """The one of `team.keys` that the calls are made with."""
    effects: tuple[Kind, ...] = EFFECTS
    """What calls may do; `vast-proxy routes` shows the effect of each route."""
    weight: Positive = 1.0
    """The share of turns, beside the other members'."""
    spends_per_day: Count | None = None
    """Calls with the effect `spend` in a day of UTC; a bulk create counts for each of its offers. null: no limit."""
    deny: tuple[RouteName, ...] = ()
    """Routes that are closed all the same, as `vast-proxy routes` prints them."""
    grant: tuple[RouteName, ...] = ()
    """Routes that are open all the same, also those that are closed to members by themselves. `deny` goes before it."""

    def __post_init__(self) -> None:
        if not self.token:
            raise ValueError("a member needs `token`, as `vast-proxy token new` prints it")


@dataclass(frozen=True, slots=True)
class TeamRules:
    """Who may use the gateway, with which keys: `team` in the settings. Both empty: everybody brings an own key."""

    keys: Mapping[str, KeyRules] = field(default_factory=dict)
    """The keys of the gateway by a name. A key stands in a file, which nobody else can read, or in an environment
    variable, and is read at the start and on SIGHUP: `{default: {file: /run/secrets/vast_api_key}}`,
    `{ci: {env: CI_KEY}}`."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """Who may use it. `vast-proxy token new NAME` makes a token; here is its hash. To revoke it, take out the line and
    send SIGHUP. All but `token` may be left out."""

    def __bool__(self) -> bool:
        """Team mode; also when the last member's line is gone, for then nobody may come in."""
        return bool(self.keys or self.members)


Keys = Mapping[str, Secret]
"""The gateway's keys by their names in `team.keys`."""


def hashed(token: str) -> str:
    """What the settings hold of a token."""
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


_TOKEN = re.compile(PREFIX + r"[A-Za-z0-9_-]{16,64}")


def same_token(token: str, stored: str) -> bool:
    """Is it the token of that hash? Takes the same time for any.

    What does not look like one is none, also if its hash is stored: a word that somebody made up can be guessed.
    """
    return _TOKEN.fullmatch(token) is not None and hmac.compare_digest(hashed(token), stored)


def digest_of(keys: Keys) -> str:
    """Equal for the same keys; empty for none."""
    return digest("\0".join(sorted(key.value for key in keys.values()))) if keys else ""


def faults(team: TeamRules, routes: Routes) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """What is wrong with a team beyond each value by itself: the key of the setting, and a sentence."""
    seen: dict[str, str] = {}
    for name, member in team.members.items():
        here = ("team", "members", name)
        if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
            yield here, "a member's name is 1 to 64 letters, digits and . _ @ -"
        if member.token in seen:
            yield (*here, "token"), f"the same token as that of {seen[member.token]}"
        seen.setdefault(member.token, name)
        if member.key not in team.keys:
            # Who has put the key itself there must not find it in a log.
            yield (*here, "key"), f"there is no {member.key if len(member.key) < 16 else '***'} in team.keys"
        known = {canonical_name(route.name) for route in routes}
        for what in ("deny", "grant"):
            for index, given in enumerate(getattr(member, what)):
                if canonical_name(given) not in known:
                    yield (*here, what, index), f"no such route; `vast-proxy routes` lists them, got {given!r:.80}"


# --- Who asks ---------------------------------------------------------------------------------------------------------


def admit(request: Request, team: TeamRules, keys: Keys, address: str = "") -> tuple[Request, Caller]:
    """The caller of a request, and the request as it may go upstream. `address`: the client's.

    In team mode with the account's key where the token stood. Raises Refusal: 401 without a token of a member, 400 for
    a request in which it is not certain that the token is nowhere left.
    """
    given = keys_given(request)
    if not team:
        if any(key.startswith(PREFIX) for key in given):
            msg = "this is a gateway token, and this vast-proxy has no team to know it by: it wants a Vast key"
            raise Refusal(401, "token_unknown", msg)
        return request, replace(identify(request, given), address=address)
    if not given:
        raise _token_needed()
    token = next(iter(given))
    name = _member_of(given, request.headers, team)
    member = team.members[name]
    passed_on = _swapped(request, token, given[token], keys[member.key].value)
    caller = identify(passed_on)
    # By the heaviest, so that a turn of no member is a small thing beside what an urgency is worth.
    weight = member.weight / max(one.weight for one in team.members.values())
    return passed_on, replace(caller, member=name, address=address, weight=weight)


def vouched(request: Request, team: TeamRules) -> bool:
    """Is its member known by its head alone? `request`: without its body, in which a token may be too.

    Raises Refusal where the head has a token of nobody's.
    """
    given = keys_given(request)
    if given:
        _member_of(given, request.headers, team)
    return bool(given)


def must_vouch() -> Refusal:
    """For a body that is too large to be read from who is not known."""
    return _token_needed(f"; in a body it is looked for up to {LARGEST_WITH_KEY} bytes, else it goes into the header")


def _token_needed(more: str = "") -> Refusal:
    msg = "vast-proxy wants a gateway token where the client has its key (VAST_API_KEY); ask whoever runs it for one"
    return Refusal(401, "token_needed", msg + more)


def _member_of(given: Mapping[str, list[str]], headers: Headers, team: TeamRules) -> str:
    """Whose token it is. Raises Refusal. A key beside the token would leave it open which of them is believed."""
    if sum(name.lower() == "authorization" for name, _ in headers) > 1:
        raise Refusal(
            401, "token_unknown", "more than one Authorization header: which of them counts is up to the reader"
        )
    # Every member is compared, whoever it is.
    found = [name for name, member in team.members.items() if same_token(next(iter(given)), member.token)]
    if not found or len(given) > 1:
        raise Refusal(401, "token_unknown", "vast-proxy does not know this gateway token: it is wrong, or revoked")
    return found[0]


# --- What a member may do ---------------------------------------------------------------------------------------------

_OF_KEYS = frozenset({"auth", "apikey", "apikeys", "resetapikey", "regeneratekeys", "tfa"})
_OF_ACCOUNTS = frozenset({"user", "users", "subaccounts", "team", "transfercredit"})


def reserved(route: Route, target: str = "") -> bool:
    """Is this route open only to whom it is granted by name?

    Whatever makes, shows or changes a key or a login, and every write to users, subaccounts and the vendor's own teams,
    by which somebody else would get into the account or money out of it. `target`: by it an endpoint that is not listed
    is judged, wherever in it such a word stands and however it is written.
    """
    words = {word.replace("_", "") for word in words_of(route.template)} if route.listed else letters_of(target)
    return not _OF_KEYS.isdisjoint(words) or (not route.is_read and not _OF_ACCOUNTS.isdisjoint(words))


def forbidden(caller: Caller, route: Route, target: str, team: TeamRules, routes: Routes) -> Refusal | None:
    """Why this member may not ask for that, or None. `target`: as it was asked for.

    What is not in the table is taken for everything in it that looks like it: a server may know more methods and more
    spellings of one endpoint than the table does.
    """
    member = team.members.get(caller.member)
    if member is None:
        return None
    here = f"team.members.{caller.member}"
    alike = () if route.listed else routes.alike(route.method, target)
    names = {canonical_name(one.name) for one in (route, *alike)}

    def refusal(why: str) -> Refusal:
        return Refusal(403, "not_permitted", f"{caller.member} may not {route.name}: {why}")

    if not names.isdisjoint(map(canonical_name, member.deny)):
        return refusal(f"this route is denied ({here}.deny)")
    if not is_plain(target):
        return refusal("its path can be read in two ways; write it plainly")
    if route.listed and canonical_name(route.name) in map(canonical_name, member.grant):
        return None
    if reserved(route, target) or any(map(reserved, alike)):
        return refusal(f"it is about keys, logins or the account itself, and needs to be granted ({here}.grant)")
    for effect in dict.fromkeys((route.effect, *(one.effect for one in alike if not one.is_read))):
        if effect not in member.effects:
            return refusal(f"that needs the effect {effect.value} ({here}.effects)")
    return None


def spends_in(request: Request, route: Route) -> int:
    """For how many of a day's spends a call counts: none if it costs nothing, a bulk create for each of its offers.

    Inference is not counted.
    """
    name = canonical_name(route.name)
    if route.effect is not Effect.SPEND or name == _INFERENCE:
        return 0
    if name == _BULK:
        if len(request.body) > LARGEST_WITH_KEY:
            return request.body.count(b",") + 1  # at least as many; to read it all would hold up everybody
        try:
            ids = json.loads(request.body)["ids"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return 1
        return max(1, len(ids)) if isinstance(ids, list) else 1
    return 1


_BULK, _INFERENCE = canonical_name("POST /api/v0/asks/bulk/"), canonical_name("POST /route/")


# --- The key in the token's place -------------------------------------------------------------------------------------

# A session is another way of being somebody; the rest would let a client choose what is answered in pieces, by which a
# key could not be recognised, or have the request taken for another one than the one that was permitted.
_NOT_PASSED = frozenset({"cookie", "forwarded", "if-range", "range", "true-client-ip"})
_NOT_PASSED_FROM = (
    "x-client-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "x-host",
    "x-http-method",
    "x-method",
    "x-original",
    "x-override",
    "x-proxy",
    "x-real-ip",
    "x-rewrite",
    "x-script-name",
    "x-url",
)


def _is_passed(name: str) -> bool:
    """May this header, its name in small letters, go upstream? One with `_` is that with `-` to a server by WSGI."""
    return not (name in _NOT_PASSED or "_" in name or name.startswith(_NOT_PASSED_FROM))


def _swapped(request: Request, token: str, places: list[str], key: str) -> Request:
    """The request with the key wherever the token stood as a key, otherwise to the byte as it was."""
    headers = tuple(
        (name, _swapped_header(name.lower(), value, token, key, request.headers))
        for name, value in request.headers
        if _is_passed(name.lower())
    )
    if content_coding(headers) != "identity":
        raise _leaking("a body with a content coding cannot be looked into")
    path, mark, query = request.target.partition("?")
    target = path + mark + _swapped_query(query, token, key)
    body = _swapped_body(request.body, token, key) if "body" in places else request.body
    swapped = replace(request, target=target, headers=headers, body=body)
    if _holds(swapped, token):
        raise _leaking("the gateway token stands elsewhere than where clients put their key")
    return swapped


def _leaking(why: str) -> Refusal:
    return Refusal(400, "bad_request", f"{why}, and a token is never passed on to Vast.ai")


def _swapped_header(name: str, value: str, token: str, key: str, headers: Headers) -> str:
    if name == "authorization":
        return value.replace(token, key, 1)
    if name == "accept-encoding":
        # What can be undone here, since the answer has to be looked into.
        return "gzip" if caching.accepts_gzip(headers) else "identity"
    return value


def _swapped_query(query: str, token: str, key: str) -> str:
    pairs = query.split("&")
    for index, pair in enumerate(pairs):
        name, mark, value = pair.partition("=")
        if unquote_plus(name) in KEY_FIELDS and unquote_plus(value) == token:
            pairs[index] = name + mark + quote(key, safe="")
    return "&".join(pairs)


def _swapped_body(body: bytes, token: str, key: str) -> bytes:
    found = spans(body, KEY_FIELDS)
    if found is None:
        if body.lstrip()[:1] in (b"{", b"["):
            return body
        text = body.decode("utf-8", "surrogateescape")
        return _swapped_query(text, token, key).encode("utf-8", "surrogateescape")
    for start, end in reversed(found):
        if json.loads(body[start:end]) == token:
            body = body[:start] + json.dumps(key).encode() + body[end:]
    return body


def _holds(request: Request, token: str) -> bool:
    """Is the token still in there, as it is or in a spelling that is read as it?"""
    head = " ".join([request.target, *(text for item in request.headers for text in item)])
    needle = token.encode()
    return holds(head.encode("utf-8", "surrogateescape"), needle) or holds(request.body, needle)
