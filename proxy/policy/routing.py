"""Which of Vast.ai's endpoints a request is for, and what is known of that endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import unquote

from .units import parse_duration

ALL: Final = "all"
"""In `invalidates`: every family of the caller."""

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_UPSTREAMS = ("api", "serverless")
_SMALL = "abcdefghijklmnopqrstuvwxyz_-"
_VERSIONS = frozenset(f"v{number}" for number in range(10))
_HEX = "0123456789abcdefABCDEF"
_PLAIN = re.compile(r"[A-Za-z0-9._~:@+=,!'()*&$ -]+")
_LETTERS = re.compile(r"[a-z]+")
_SEGMENTS_KEPT = 8
_SHORTEST_HEX = 8
_LONGEST_NAME = 32


class Effect(StrEnum):
    """What a call does, which its method does not tell: this API searches with POST and PUT."""

    READ = "read"
    SEARCH = "search"
    """A read that looks through the market, its question in the body."""
    WRITE = "write"
    """Sets a state: twice is as good as once."""
    SPEND = "spend"
    """Costs money, or makes a second one when repeated."""
    AUTH = "auth"
    """Handles keys, codes or secrets: never stored or shared."""


@dataclass(frozen=True, slots=True)
class Family:
    """Answers that age alike and are voided together: `families` in the settings. `{instances: {ttl: 3s}}` makes those
    of instances older."""

    name: str
    ttl: float | None  # None: `search`
    """How long an answer is fresh: a duration, or `search`, which is `cache.search_ttl`. A new family needs it."""
    stale_for: float | None
    """How much longer it may be served when upstream will not give a new one: a duration, or `search`, which is
    `cache.stale_for`. 0, if it is not given."""
    market: bool
    """true: the answers are about the market and not about who asks. One caller's rental voids them for everybody, and
    a voided one may still serve as a stale one. false, if it is not given."""


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint, or one that is not listed and got the careful defaults."""

    method: str
    template: str
    """The path with `{name}` where an id stands, however it was asked for: the unit that the vendor counts by."""
    effect: Effect
    interval: float | None
    """Least seconds between two calls; 0: not paced; None: unknown, use the default."""
    capacity: int
    """Calls that may be made at once after a pause."""
    penalty: float
    """Calls' worth of waiting that each 429 costs."""
    source: str
    """Where the numbers are from."""
    family: Family | None
    """Where answers are stored; None: nowhere."""
    invalidates: frozenset[str]
    """Names of the families that a call voids, whatever came of it; may hold ALL."""
    upstream: str
    """"api" or "serverless"."""
    pass_429: bool
    """A 429 here is no matter of pace and goes to the client."""
    check: str
    """How to find out whether a call with an unknown outcome did happen; goes after "check:". May be empty."""
    refused: bool
    """Never sent upstream."""
    collapse: bool
    """Equal calls at the same time may share one."""
    listed: bool
    """Stands in a table; else everything here is a guess."""
    overridden: bool
    """The user's table, not the shipped one, gave the interval, the capacity or the penalty."""

    @property
    def name(self) -> str:
        """Method and template: how it is called everywhere."""
        return f"{self.method} {self.template}"

    @property
    def is_read(self) -> bool:
        """It changes nothing."""
        return self.effect is Effect.READ or self.effect is Effect.SEARCH

    @property
    def spends(self) -> bool:
        """A second one would cost."""
        return self.effect is Effect.SPEND

    @property
    def may_be_replayed(self) -> bool:
        """It may be sent again although the first may have arrived."""
        if self.effect is Effect.AUTH:
            return self.method in ("GET", "HEAD")
        return self.effect is not Effect.SPEND


class RouteError(ValueError):
    """A table that cannot be used: which entry, which field, what was expected."""

    def __init__(self, index: int | None, field: str, message: str, *, table: int = 0) -> None:
        where = "" if index is None else f"routes[{index}]."
        super().__init__(f"{where}{field}: {message}")
        self.index = index
        """Position in `routes`; None for what is wrong outside of it."""
        self.field = field
        """Name of the field; outside of `routes` the dotted path to it."""
        self.message = message
        self.table = table
        """Which of the tables given to `Routes.build`."""


class Routes:
    """All listed routes. Owns the tree they are looked up in; never changes once built, so it may be shared freely."""

    __slots__ = ("_listed", "_root", "_shapes", "families")

    def __init__(self, listed: Sequence[Route], families: Mapping[str, Family]) -> None:
        self.families: Mapping[str, Family] = MappingProxyType(dict(families))
        """Every family by its name, used or not."""
        self._listed = tuple(listed)
        self._root = _Node()
        self._shapes = [(words_of(route.template), route) for route in self._listed]
        for route in self._listed:
            self._root.add(route)

    @classmethod
    def build(cls, tables: Sequence[Mapping[str, Any]]) -> Routes:
        """From plain parsed tables (`families`, `routes`), the shipped one first; a later one replaces or adds fields.

        Raises RouteError at the first thing that is wrong.
        """
        return _Builder().build(tables)

    def __iter__(self) -> Iterator[Route]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __repr__(self) -> str:
        return f"<Routes {len(self._listed)} routes, {len(self.families)} families>"

    def match(self, method: str, target: str) -> Route:
        """The route of a request line; one that is not listed is a read if its method is safe, else a spend.

        The query and a last slash make no difference. HEAD goes by GET's route. Never raises.
        """
        path = _segments(target)
        if not _is_ambiguous(path, target):
            route = self._root.find(method, path, 0)
            if route is not None:
                return route
        return _unlisted(method, path)

    def alike(self, method: str, target: str) -> tuple[Route, ...]:
        """The listed routes of that shape, whatever their method and version, and whatever stands for a parameter.

        For a GET those for GET alone, if there are any.
        """
        words = words_of(target)
        found = tuple(route for shape, route in self._shapes if _fits(shape, words))
        gets = tuple(route for route in found if route.method == "GET") if method in ("GET", "HEAD") else ()
        return gets or found


def _fits(shape: list[str], words: list[str]) -> bool:
    return len(shape) == len(words) and all(
        here[:1] == "{" or here == word for here, word in zip(shape, words, strict=True)
    )


def parameter(route: Route, target: str) -> tuple[str, ...]:
    """What stands in a target, percent-decoded, where the template of its route has `{…}`."""
    template = _segments(route.template)
    return tuple(here for name, here in zip(template, _segments(target), strict=False) if name[:1] == "{")


def canonical_name(name: str) -> str:
    """METHOD and path of a route, equal however its parameters are called and whether or not it ends in a slash."""
    method, _, template = name.partition(" ")
    path = "/".join("{}" if segment[:1] == "{" else segment for segment in _segments(template))
    return f"{method} /{path}"


def words_of(target: str) -> list[str]:
    """The segments of a path, in small letters, without `api` and the version before them."""
    words = [segment.lower() for segment in _segments(target)]
    if words[:1] == ["api"]:
        del words[0]
    if words and words[0][:1] == "v" and words[0][1:].isdecimal():
        del words[0]
    return words


def letters_of(target: str) -> frozenset[str]:
    """Every word in a path, however they are put together: of `Reset-ApiKey` it is `reset`, `apikey`, `resetapikey`."""
    found: set[str] = set()
    for segment in _segments(target):
        words = _LETTERS.findall(segment.lower())
        found.update(words, ["".join(words)])
    return frozenset(found)


def is_plain(target: str) -> bool:
    """Is there no other path that a server may read in this one: by decoding it twice, resolving dots, taking digits of
    another script for digits, or the like?
    """
    return all(
        segment not in (".", "..") and segment == segment.strip() and _PLAIN.fullmatch(segment)
        for segment in _segments(target)
    )


class _Node:
    """A segment in the tree of routes: what may follow it, and the routes that end with it."""

    __slots__ = ("any", "ends", "literals", "number")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        # `{id}` is a number and nothing else: PUT /instances/{id}/ is harmless, a PUT /instances/<verb>/ may not be.
        self.number: _Node | None = None
        self.any: _Node | None = None
        self.ends: dict[str, Route] = {}

    def add(self, route: Route) -> None:
        node = self
        for segment in _segments(route.template):
            if segment == "{id}":
                node.number = node.number or _Node()
                node = node.number
            elif segment[:1] == "{":
                node.any = node.any or _Node()
                node = node.any
            else:
                node = node.literals.setdefault(segment, _Node())
        node.ends[route.method] = route
        if route.method == "GET":
            node.ends.setdefault("HEAD", route)

    def find(self, method: str, path: list[str], at: int) -> Route | None:
        # A literal that leads nowhere for this method gives way to a parameter: somebody's line for
        # GET /instances/42/ must not hide PUT /instances/{id}/.
        if at == len(path):
            return self.ends.get(method)
        segment = path[at]
        literal = self.literals.get(segment)
        if literal is not None:
            found = literal.find(method, path, at + 1)
            if found is not None:
                return found
        if self.number is not None and segment.isdecimal() and segment.isascii():
            found = self.number.find(method, path, at + 1)
            if found is not None:
                return found
        if self.any is not None and segment:
            return self.any.find(method, path, at + 1)
        return None


def _segments(target: str) -> list[str]:
    """The decoded segments of a target's path, without the empty one after a last slash."""
    path = target.partition("?")[0].removesuffix("/")
    segments = path.split("/")
    del segments[0]  # what is before the first slash: nothing
    if "%" in path:
        # Only after splitting: an encoded slash is part of a segment.
        return [unquote(segment, errors="replace") for segment in segments]
    return segments


def _is_ambiguous(path: list[str], target: str) -> bool:
    """A server that resolves dots, or decodes before it splits, may read another path in it than we do.

    `PUT /instances/reboot%2F5/` must not be taken for the harmless `PUT /instances/{id}/`.
    """
    return "." in path or ".." in path or ("%" in target and any("/" in segment for segment in path))


def _unlisted(method: str, path: list[str]) -> Route:
    template = "".join(f"/{_guessed(segment)}" for segment in path[:_SEGMENTS_KEPT])
    safe = method in _SAFE_METHODS
    return Route(
        method=method,
        template=f"{template}/..." if len(path) > _SEGMENTS_KEPT else f"{template}/",
        effect=Effect.READ if safe else Effect.SPEND,
        interval=None,
        capacity=1,
        penalty=0.0,
        source="",
        family=None,
        invalidates=frozenset() if safe else frozenset({ALL}),
        upstream="api",
        pass_429=False,
        check="",
        refused=False,
        collapse=True,
        listed=False,
        overridden=False,
    )


def _guessed(segment: str) -> str:
    """The segment itself if it reads like a word of the API, else `{id}`.

    Ids must share one bucket, and a token in a path must not be told in a log: a word is of small letters only.
    """
    # str.strip(all) == "" asks whether a string consists of those characters only.
    is_word = len(segment) <= _LONGEST_NAME and not segment.strip(_SMALL)
    is_hex = len(segment) >= _SHORTEST_HEX and not segment.strip(_HEX)
    return segment if (is_word and not is_hex) or segment in _VERSIONS else "{id}"


class _Builder:
    """Merges tables into routes. Owns what has been read so far, and which entry is being read, for the errors."""

    def __init__(self) -> None:
        self.table = 0
        self.index: int | None = None
        self.families: dict[str, Family] = {}
        # By method and path with nameless parameters; each with the fields given so far.
        self.merged: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}

    def build(self, tables: Sequence[Mapping[str, Any]]) -> Routes:
        for self.table, table in enumerate(tables):
            self._read_families(self._known("", table, _TABLE).get("families"))
        for self.table, table in enumerate(tables):
            seen: set[tuple[str, tuple[str, ...]]] = set()
            entries = table.get("routes")
            for index, entry in enumerate(self._list("routes", [] if entries is None else entries)):
                self.index = index
                key = self._read_route(entry)
                if key in seen:
                    raise self._error("route", f"{entry['route']} stands in this table twice")
                seen.add(key)
            self.index = None
        return Routes([_route(fields, self.families) for fields in self.merged.values()], self.families)

    def _error(self, field: str, message: str) -> RouteError:
        return RouteError(self.index, field, message, table=self.table)

    def _mapping(self, field: str, value: object) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            raise self._error(field, f"expected a mapping, not {value!r:.80}")
        return value

    def _known(self, where: str, value: object, known: Sequence[str]) -> Mapping[str, Any]:
        """A mapping with no other names than these."""
        given = self._mapping(where.removesuffix(".") or "table", value)
        for name in given:
            if name not in known:
                raise self._error(f"{where}{name}", _not_one_of("field", name, known))
        return given

    def _list(self, field: str, value: object) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self._error(field, f"expected a list, not {value!r:.80}")
        return value

    def _string(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._error(field, f"expected a string, not {value!r:.80}")
        return value

    def _bool(self, field: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise self._error(field, f"expected true or false, not {value!r:.80}")
        return value

    def _number(self, field: str, value: object, kind: type[int] | type[float], least: int) -> float:
        # A bool is an int to Python; in a table it is a mistake.
        if not isinstance(value, kind | int) or isinstance(value, bool) or not least <= value < _TOO_MUCH:
            what = "whole number" if kind is int else "number"
            raise self._error(field, f"expected a {what} of {least} or more, not {value!r:.80}")
        return kind(value)

    def _seconds(self, field: str, value: object) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise self._error(field, str(error)) from None

    def _one_of(self, field: str, value: object, known: Sequence[str]) -> str:
        if value not in known:
            raise self._error(field, _not_one_of("value", value, known))
        return str(value)

    def _read_families(self, families: object) -> None:
        for name, rules in self._mapping("families", {} if families is None else families).items():
            where = f"families.{name}"
            if not isinstance(name, str) or not name or name == ALL:
                raise self._error(where, f'expected a name, and not "{ALL}", which means every family')
            self._known(f"{where}.", rules, ("ttl", "stale_for", "market"))
            if name not in self.families and "ttl" not in rules:
                raise self._error(f"{where}.ttl", 'expected a duration or "search": a new family needs one')
            family = self.families.get(name, Family(name, ttl=0.0, stale_for=0.0, market=False))
            if "ttl" in rules:
                family = replace(family, ttl=self._age(f"{where}.ttl", rules["ttl"]))
            if "stale_for" in rules:
                family = replace(family, stale_for=self._age(f"{where}.stale_for", rules["stale_for"]))
            if "market" in rules:
                family = replace(family, market=self._bool(f"{where}.market", rules["market"]))
            self.families[name] = family

    def _age(self, field: str, value: object) -> float | None:
        return None if value == "search" else self._seconds(field, value)

    def _read_route(self, entry: object) -> tuple[str, tuple[str, ...]]:
        named = self._known("", self._mapping("route", entry), _FIELDS)
        given: dict[str, Any] = {name: self._field(name, value) for name, value in named.items()}
        if "route" not in given:
            raise self._error("route", _ROUTE_EXPECTED)
        method, template = given["route"].split(" ")
        key = (method, tuple("{}" if name[:1] == "{" else name for name in _segments(template)))
        before = self.merged.get(key)
        if before is None and "effect" not in given:
            raise self._error("effect", f"expected one of {', '.join(Effect)}: a new route needs one")
        fields = {**(before or {}), **given, "route": before["route"] if before else given["route"]}
        if fields.get("cache") is not None and fields["effect"] not in (Effect.READ, Effect.SEARCH):
            raise self._error("cache", f"only a read or a search is stored, not a {fields['effect']}: expected null")
        numbers = [given[name] for name in ("interval", "capacity", "penalty") if name in given]
        if self.table > 0 and numbers:
            # `interval: null` takes a number back and puts none in its place.
            fields["overridden"] = any(number is not None for number in numbers)
            fields["source"] = given.get("source", "configured" if fields["overridden"] else "")
        self.merged[key] = fields
        return key

    def _field(self, name: str, value: object) -> object:
        match name:
            case "route":
                return self._request_line(value)
            case "effect":
                return Effect(self._one_of(name, value, tuple(Effect)))
            case "interval":
                return None if value is None else self._seconds(name, value)
            case "capacity":
                return self._number(name, value, int, 1)
            case "penalty":
                return self._number(name, value, float, 0)
            case "cache":
                return None if value is None else self._one_of(name, value, tuple(self.families))
            case "invalidates":
                return frozenset(self._one_of(name, item, (ALL, *self.families)) for item in self._list(name, value))
            case "upstream":
                return self._one_of(name, value, _UPSTREAMS)
            case "source" | "check":
                return self._string(name, value)
            case _:
                return self._bool(name, value)

    def _request_line(self, value: object) -> str:
        """METHOD /path/{name}/ as it is, or an error."""
        method, _, path = self._string("route", value).partition(" ")
        names = path.removesuffix("/").split("/")[1:]
        if (
            not (method.isascii() and method.isalpha() and method.isupper())
            or not path.startswith("/")
            or not path.isascii()
            or any(character in path for character in "?#% \t\r\n")
            or not all(_is_segment(name) for name in names)
        ):
            raise self._error("route", f"{_ROUTE_EXPECTED}, not {value!r:.80}")
        return f"{method} {path}"


_ROUTE_EXPECTED = 'expected a method and a path, such as "PUT /api/v0/asks/{id}/"'
_TOO_MUCH = 1e9
_TABLE = ("families", "routes")
_FIELDS = (
    "route",
    "effect",
    "interval",
    "capacity",
    "penalty",
    "source",
    "cache",
    "invalidates",
    "upstream",
    "pass_429",
    "check",
    "refuse",
    "collapse",
)


def _route(fields: Mapping[str, Any], families: Mapping[str, Family]) -> Route:
    """The route of merged and checked fields."""
    method, template = fields["route"].split(" ")
    effect: Effect = fields["effect"]
    harmless = effect in (Effect.READ, Effect.SEARCH) or method in _SAFE_METHODS
    cache = fields.get("cache")
    return Route(
        method=method,
        template=template,
        effect=effect,
        interval=fields.get("interval"),
        capacity=fields.get("capacity", 1),
        penalty=fields.get("penalty", 0.0),
        source=fields.get("source", ""),
        family=None if cache is None else families[cache],
        invalidates=fields.get("invalidates", frozenset() if harmless else frozenset({ALL})),
        upstream=fields.get("upstream", "api"),
        pass_429=fields.get("pass_429", False),
        check=fields.get("check", ""),
        refused=fields.get("refuse", False),
        collapse=fields.get("collapse", True),
        listed=True,
        overridden=fields.get("overridden", False),
    )


def _is_segment(name: str) -> bool:
    if "{" in name or "}" in name:
        return name[0] == "{" and name[-1] == "}" and name[1:-1].isidentifier()
    return bool(name) and name not in (".", "..")


def _not_one_of(what: str, value: object, known: Sequence[str]) -> str:
    near = get_close_matches(str(value), known, 1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f"unknown {what} {value!r:.80}{hint} (expected one of {', '.join(known)})"
