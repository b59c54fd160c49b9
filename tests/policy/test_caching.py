"""What may be remembered: which questions are one, what may be stored, what a write makes void."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.caching import (
    CacheRules,
    Directives,
    accepts_coding,
    accepts_gzip,
    directives,
    epoch_life,
    epochs_of_read,
    epochs_of_write,
    freeze,
    fresh,
    impersonal,
    lifetimes,
    may_share,
    may_store,
    names,
    plain,
    question,
    thaw,
)
from proxy.policy.errors import Refusal, UpstreamError
from proxy.policy.identity import Caller, identify
from proxy.policy.messages import Headers, Request, Response
from proxy.policy.routing import Route, Routes

FAMILIES = {
    "offers": {"ttl": "search", "stale_for": "search", "market": True},
    "volume_offers": {"ttl": "search", "stale_for": "search", "market": True},
    "instances": {"ttl": "1s"},
    "account": {"ttl": "15s", "stale_for": "5m"},
}
ROUTES = Routes.build(
    [
        {
            "families": FAMILIES,
            "routes": [
                {"route": "POST /api/v0/bundles/", "effect": "search", "cache": "offers"},
                {"route": "GET /api/v0/bundles/", "effect": "search", "cache": "offers"},
                {"route": "GET /api/v1/instances/", "effect": "read", "cache": "instances"},
                {"route": "GET /api/v0/users/current", "effect": "read", "cache": "account"},
                {"route": "GET /api/v0/machines/{id}/reports/", "effect": "read"},
                {
                    "route": "PUT /api/v0/asks/{id}/",
                    "effect": "spend",
                    "invalidates": ["instances", "offers", "account"],
                },
                {"route": "PUT /api/v0/instances/{id}/", "effect": "write", "invalidates": ["instances"]},
                {"route": "POST /api/v0/tfa/", "effect": "auth", "invalidates": []},
                {"route": "POST /api/v0/auth/apikeys/", "effect": "auth", "invalidates": ["account"]},
                {"route": "GET /api/v0/auth/apikeys/", "effect": "auth"},
            ],
        }
    ]
)
RULES = CacheRules()
KEY = (("Authorization", "Bearer k"),)
JSON = (*KEY, ("Content-Type", "application/json"))
ME = Caller("me")


def route(line: str) -> Route:
    return ROUTES.match(*line.split(" "))


# --- What the client asks of the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ((), Directives()),
        ((("Cache-Control", "no-cache"),), Directives(no_cache=True)),
        ((("CACHE-CONTROL", " No-Store , MAX-AGE=5"),), Directives(no_store=True, max_age=5.0)),
        ((("Cache-Control", "max-age=0"),), Directives(max_age=0.0)),
        ((("Cache-Control", 'max-age="10"'),), Directives(max_age=10.0)),
        ((("Cache-Control", "max-age=soon"),), Directives()),
        ((("Cache-Control", "max-age=-1"),), Directives()),
        ((("Cache-Control", "max-age=²"),), Directives()),
        ((("Cache-Control", "max-age"),), Directives()),
        ((("Cache-Control", "max-stale=60"),), Directives(max_stale=60.0)),
        ((("Cache-Control", "max-stale"),), Directives(max_stale=2.0**31)),
        ((("Cache-Control", "only-if-cached"),), Directives(only_if_cached=True)),
        ((("Cache-Control", "no-cache"), ("Cache-Control", "max-age=3")), Directives(no_cache=True, max_age=3.0)),
        ((("Cache-Control", "no-transform, x-no-cache, ,="),), Directives()),
        ((("Pragma", "no-cache"),), Directives(no_cache=True)),
        ((("Pragma", "No-Cache"), ("Cache-Control", "max-age=5")), Directives(max_age=5.0)),
        ((("Pragma", "other"),), Directives()),
    ],
)
def test_directives_are_read_and_what_is_not_understood_is_passed_over(headers: Headers, asked: Directives) -> None:
    assert directives(headers) == asked


@pytest.mark.parametrize(
    ("age", "asked", "served"),
    [
        (0.0, Directives(), True),
        (59.9, Directives(), True),
        (60.0, Directives(), False),
        (0.0, Directives(no_cache=True), False),
        (5.0, Directives(max_age=5.0), True),
        (5.1, Directives(max_age=5.0), False),
        (70.0, Directives(max_age=100.0), False),
        (0.0, Directives(max_age=0.0), True),
        (0.1, Directives(max_age=0.0), False),
    ],
)
def test_an_answer_is_fresh_for_its_lifetime_and_for_as_long_as_the_client_says(
    age: float, asked: Directives, served: bool
) -> None:
    assert fresh(age, 60.0, asked) is served


@pytest.mark.parametrize(
    ("name", "life"),
    [
        ("epoch:k:instances", 3600.0),
        ("epoch:market:offers", 7.0 + 7000.0),
        ("epoch:k:all", 7.0 + 7000.0),
        ("epoch:k:any", 3600.0),
    ],
)
def test_an_epoch_is_remembered_as_long_as_anything_from_before_it_could_be_found(name: str, life: float) -> None:
    rules = CacheRules(search_ttl=7.0, stale_for=7000.0)
    assert epoch_life(name, ROUTES.families, rules) == life


def test_a_family_has_its_own_lifetimes_or_those_of_searches() -> None:
    rules = CacheRules(search_ttl=7.0, stale_for=70.0)
    assert lifetimes(ROUTES.families["offers"], rules) == (7.0, 70.0)
    assert lifetimes(ROUTES.families["account"], rules) == (15.0, 300.0)
    assert lifetimes(ROUTES.families["instances"], rules)[0] == 1.0


# --- Which questions are one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "headers", "shared"),
    [
        ("GET /api/v1/instances/", (), True),
        ("POST /api/v0/bundles/", (), True),
        ("GET /api/v0/nobody/knows/", (), True),
        ("HEAD /api/v1/instances/", (), False),
        ("GET /api/v0/auth/apikeys/", (), False),
        ("PUT /api/v0/instances/5/", (), False),
        ("PUT /api/v0/asks/5/", (), False),
        ("GET /api/v1/instances/", (("Range", "bytes=0-9"),), False),
        ("GET /api/v1/instances/", (("IF-NONE-MATCH", '"x"'),), False),
        ("GET /api/v1/instances/", (("If-Modified-Since", "yesterday"),), False),
        ("GET /api/v1/instances/", (("Accept", "application/json"),), True),
    ],
)
def test_only_reads_without_preconditions_share_an_answer(line: str, headers: Headers, shared: bool) -> None:
    method, target = line.split(" ")
    assert may_share(route(line), Request(method, target, headers)) is shared


def asks(line: str, headers: Headers = KEY, body: bytes = b"", rules: CacheRules = RULES) -> str:
    method, target = line.split(" ", 1)
    request = Request(method, target, headers, body)
    return question(ROUTES.match(method, target), request, identify(request), rules)


SEARCH = {"verified": {"eq": True}, "type": "on-demand", "limit": 5}
BODY = json.dumps(SEARCH).encode()
BUNDLES = "POST /api/v0/bundles/"
INSTANCES = "GET /api/v1/instances/"

ONE_SEARCH = {
    "as it is": asks(BUNDLES, JSON, BODY),
    "keys in another order": asks(BUNDLES, JSON, json.dumps(dict(reversed(SEARCH.items()))).encode()),
    "other white space": asks(BUNDLES, JSON, json.dumps(SEARCH, indent=2).encode()),
    "escaped": asks(BUNDLES, JSON, BODY.replace(b"demand", b"\\u0064emand")),
    "without the last slash": asks("POST /api/v0/bundles", JSON, BODY),
    "an encoded path": asks("POST /api/v0/b%75ndles/", JSON, BODY),
    "with a charset": asks(BUNDLES, (*KEY, ("Content-Type", "application/json; charset=utf-8")), BODY),
    "key in the query": asks("POST /api/v0/bundles/?api_key=k", JSON[1:], BODY),
    "key in both": asks("POST /api/v0/bundles/?api_key=k", JSON, BODY),
    "key in the body": asks(BUNDLES, JSON[1:], json.dumps({**SEARCH, "api_key": "k"}).encode()),
    "another agent": asks(BUNDLES, (*JSON, ("User-Agent", "curl/8"), ("Accept", "*/*")), BODY),
    "other codings": asks(BUNDLES, (*JSON, ("Accept-Encoding", "br"), ("X-Request-Id", "1")), BODY),
    "by GET": asks(f"GET /api/v0/bundles/?q={json.dumps(SEARCH)}"),
    "by GET, encoded": asks(
        "GET /api/v0/bundles?q=%7B%22limit%22%3A+5%2C%22type%22%3A%22on-demand%22%2C"
        "%22verified%22%3A%7B%22eq%22%3Atrue%7D%7D&api_key=k"
    ),
}


@pytest.mark.parametrize("spelling", ONE_SEARCH)
def test_a_search_is_one_question_however_it_is_spelled(spelling: str) -> None:
    assert ONE_SEARCH[spelling] == ONE_SEARCH["as it is"]


DIFFERENT = {
    "a search": asks(BUNDLES, JSON, BODY),
    "another caller": asks(BUNDLES, (("Authorization", "Bearer other"), JSON[1]), BODY),
    "nobody": asks(BUNDLES, JSON[1:], BODY),
    "with a session": asks(BUNDLES, (*JSON, ("Cookie", "session=1")), BODY),
    "another limit": asks(BUNDLES, JSON, json.dumps(SEARCH | {"limit": 6}).encode()),
    "a limit that is a float": asks(BUNDLES, JSON, json.dumps(SEARCH | {"limit": 5.0}).encode()),
    "a limit that is a string": asks(BUNDLES, JSON, json.dumps(SEARCH | {"limit": "5"}).encode()),
    "a list in another order": asks(BUNDLES, JSON, b'{"order":[["a","desc"],["b","asc"]]}'),
    "that list": asks(BUNDLES, JSON, b'{"order":[["b","asc"],["a","desc"]]}'),
    "a field given twice": asks(BUNDLES, JSON, b'{"limit":5,"limit":6}'),
    "the same the other way round": asks(BUNDLES, JSON, b'{"limit":6,"limit":5}'),
    "as a form": asks(BUNDLES, (*KEY, ("Content-Type", "application/x-www-form-urlencoded")), BODY),
    "compressed": asks(BUNDLES, (*JSON, ("Content-Encoding", "gzip")), gzip.compress(BODY, mtime=0)),
    "with a query": asks("POST /api/v0/bundles/?verified=1", JSON, BODY),
    "by GET with more": asks(f"GET /api/v0/bundles/?q={json.dumps(SEARCH)}&limit=5"),
    "by GET, asked twice": asks("GET /api/v0/bundles/?q={}&q={}"),
    "without a body": asks(BUNDLES, KEY),
    "another language": asks(BUNDLES, (*JSON, ("Accept", "text/csv")), BODY),
    "an unknown header": asks(BUNDLES, (*JSON, ("X-Team", "7")), BODY),
    "another value of it": asks(BUNDLES, (*JSON, ("X-Team", "8")), BODY),
    "another endpoint": asks(INSTANCES),
    "its second page": asks(f"{INSTANCES}?after_token=x"),
    "a shorter page": asks(f"{INSTANCES}?limit=5"),
    "one value twice": asks(f"{INSTANCES}?limit=5&limit=6"),
    "the other way round": asks(f"{INSTANCES}?limit=6&limit=5"),
    "a GET with a body": asks("GET /api/v0/machines/1/reports/", JSON, b'{"machine_id": 1}'),
    "with another body": asks("GET /api/v0/machines/1/reports/", JSON, b'{"machine_id": 2}'),
    "another id": asks("GET /api/v0/machines/2/reports/", JSON, b'{"machine_id": 1}'),
    "an encoded slash": asks("GET /api/v1%2Finstances/"),
}


def test_different_questions_are_never_one() -> None:
    assert len(set(DIFFERENT.values())) == len(DIFFERENT)


def test_searches_are_shared_between_callers_only_if_the_settings_say_so_and_nothing_else_is() -> None:
    shared = replace(RULES, share_searches=True)
    other = (("Authorization", "Bearer other"), JSON[1])
    assert asks(BUNDLES, JSON, BODY, shared) == asks(BUNDLES, other, BODY, shared)
    assert asks(BUNDLES, JSON, BODY, shared) != asks(BUNDLES, JSON, BODY)
    assert asks(INSTANCES, KEY, b"", shared) != asks(INSTANCES, other[:1], b"", shared)


@given(st.binary(), st.text())
def test_a_question_never_shows_what_was_asked_nor_fails(body: bytes, value: str) -> None:
    key = asks(BUNDLES, (*JSON, ("X-Odd", value)), body)
    assert len(key) == 40
    assert set(key) <= set("0123456789abcdef")


# --- Epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "epochs"),
    [
        (INSTANCES, ("epoch:me:instances", "epoch:me:all")),
        (BUNDLES, ("epoch:market:offers", "epoch:me:all")),
        ("GET /api/v0/nobody/knows/", ("epoch:me:any",)),
    ],
)
def test_a_read_is_valid_in_the_light_of_its_familys_epoch(line: str, epochs: tuple[str, ...]) -> None:
    assert epochs_of_read(route(line), ME, RULES) == epochs


def test_a_shared_search_is_valid_for_the_whole_market() -> None:
    assert epochs_of_read(route(BUNDLES), ME, replace(RULES, share_searches=True)) == ("epoch:market:offers",)


CREATE, LABEL = "PUT /api/v0/asks/5/", "PUT /api/v0/instances/5/"
MINE = {"epoch:me:any", "epoch:me:instances"}
CREATED = MINE | {"epoch:me:account", "epoch:market:offers"}
GONE = Response(410, (), b'{"success":false,"error":"no_such_ask","msg":"gone"}')
UNKNOWN = Refusal(500, "outcome_unknown", "")


@pytest.mark.parametrize(
    ("line", "outcome", "ended"),
    [
        (LABEL, Response(200, ()), MINE),
        (LABEL, Response(302, ()), MINE),
        (LABEL, Response(500, ()), MINE),
        (LABEL, Response(503, ()), MINE),
        (LABEL, UNKNOWN, MINE),
        (LABEL, UpstreamError("lost", sent=True), MINE),
        (LABEL, Response(400, ()), set()),
        (LABEL, Response(429, ()), set()),
        (CREATE, Response(200, ()), CREATED),
        (CREATE, UNKNOWN, CREATED),
        (CREATE, Response(400, ()), set()),
        (CREATE, GONE, CREATED),
        (CREATE, Response(404, (), b'{"error":"no_such_ask"}'), CREATED),
        (CREATE, Response(410, (("Content-Encoding", "gzip"),), gzip.compress(GONE.body)), CREATED),
        (CREATE, Response(410, (("Content-Encoding", "gzip"),), b"damaged no_such_ask"), set()),
        (CREATE, Response(404, (), b"not found"), set()),
        ("POST /api/v0/nobody/knows/", Response(200, ()), {"epoch:me:any", "epoch:me:all"}),
        ("POST /api/v0/tfa/", Response(200, ()), set()),
        ("POST /api/v0/auth/apikeys/", Response(200, ()), {"epoch:me:any", "epoch:me:account"}),
        (BUNDLES, Response(200, ()), set()),
        (INSTANCES, UNKNOWN, set()),
    ],
)
def test_a_write_that_may_have_been_done_ends_the_epochs_it_touches(
    line: str, outcome: Response | Refusal | Exception, ended: set[str]
) -> None:
    assert set(epochs_of_write(route(line), ME, outcome, ROUTES.families)) == ended


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (CREATE, INSTANCES),
        (CREATE, BUNDLES),
        (CREATE, "GET /api/v0/users/current"),
        (CREATE, "GET /api/v0/machines/1/reports/"),
        (LABEL, INSTANCES),
        ("POST /api/v0/nobody/knows/", INSTANCES),
        ("POST /api/v0/nobody/knows/", BUNDLES),
        ("DELETE /api/v0/nobody/knows/", "GET /api/v0/nobody/knows/"),
    ],
)
def test_after_a_write_the_reads_that_it_touches_look_elsewhere(write: str, read: str) -> None:
    ended = epochs_of_write(route(write), ME, Response(200, ()), ROUTES.families)
    assert set(ended) & set(epochs_of_read(route(read), ME, RULES))


def test_a_label_does_not_void_the_market_and_one_callers_write_not_anothers_instances() -> None:
    ended = set(epochs_of_write(route(LABEL), ME, Response(200, ()), ROUTES.families))
    assert not ended & set(epochs_of_read(route(BUNDLES), ME, RULES))
    assert not ended & set(epochs_of_read(route(INSTANCES), Caller("other"), RULES))
    created = set(epochs_of_write(route(CREATE), ME, Response(200, ()), ROUTES.families))
    assert created & set(epochs_of_read(route(BUNDLES), Caller("other"), RULES))


def test_epochs_are_a_suffix_in_which_none_can_be_taken_for_another() -> None:
    assert names([b"a", None, b"c"]) == "a.0.c"
    assert names([]) == ""


# --- Storing ----------------------------------------------------------------------------------------------------------


class NoRest:
    """What follows a large answer, never read."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError("nobody was to touch it")

    def on_close(self, callback: Callable[[], None]) -> None:
        raise AssertionError("nobody was to touch it")

    def close(self) -> None:
        raise AssertionError("nobody was to touch it")


OFFERS = b'{"offers": [{"id": 1}]}'
GZIP = (("Content-Encoding", "gzip"),)


@pytest.mark.parametrize(
    ("line", "response", "stored"),
    [
        (BUNDLES, Response(200, (), OFFERS), True),
        (BUNDLES, Response(200, GZIP, gzip.compress(OFFERS)), True),
        (BUNDLES, Response(200, (), b'{"offers": []}'), True),
        (BUNDLES, Response(201, (), OFFERS), False),
        (BUNDLES, Response(206, (), OFFERS), False),
        (BUNDLES, Response(304, (), OFFERS), False),
        (BUNDLES, Response(404, (), OFFERS), False),
        (BUNDLES, Response(429, (), OFFERS), False),
        (BUNDLES, Response(503, (), OFFERS), False),
        (BUNDLES, Response(200, (), b""), False),
        (BUNDLES, Response(200, (), OFFERS, rest=NoRest()), False),
        (BUNDLES, Response(200, (("set-cookie", "a=1"),), OFFERS), False),
        (BUNDLES, Response(200, (("Content-Range", "bytes 0-9/10"),), OFFERS), False),
        (BUNDLES, Response(200, (), b'{"success": false, "msg": "no"}'), False),
        (BUNDLES, Response(200, (), b'{"msg": "no", "success"  :\n false}'), False),
        (BUNDLES, Response(200, GZIP, gzip.compress(b'{"success":false}')), False),
        (BUNDLES, Response(200, GZIP, gzip.compress(OFFERS)[:-2]), False),
        (BUNDLES, Response(200, (("Content-Encoding", "br"),), OFFERS), False),
        (INSTANCES, Response(200, (), b'{"success": true, "instances": [{"id": 1}]}'), True),
        (INSTANCES, Response(200, (), b'{"instances": []}'), False),
        (INSTANCES, Response(200, (), b'{"instances" : [ ], "instances_found": 0}'), False),
        (INSTANCES, Response(200, (), b'{"instances": null}'), False),
        ("GET /api/v0/nobody/knows/", Response(200, (), OFFERS), False),
        ("GET /api/v0/auth/apikeys/", Response(200, (), OFFERS), False),
        (CREATE, Response(200, (), OFFERS), False),
    ],
)
def test_only_whole_answers_that_say_something_are_stored(line: str, response: Response, stored: bool) -> None:
    assert may_store(route(line), response) is stored


PERSONAL: Headers = (
    ("Set-Cookie", "a=1"),
    ("X-RateLimit-Remaining", "3"),
    ("x-ratelimit-limit", "5"),
    ("Retry-After", "3"),
    ("Age", "7"),
    ("Cache-Status", "theirs; hit"),
    ("Server-Timing", "db"),
)
KEPT: Headers = (
    ("Content-Type", "application/json"),
    ("Link", "<a>"),
    ("Link", "<b>"),
    ("X-Odd", "\xe4\xff: x"),
    ("E", ""),
)


def test_what_speaks_of_one_exchange_is_not_told_to_another() -> None:
    assert impersonal((*PERSONAL, *KEPT)) == KEPT


@pytest.mark.parametrize(("extra", "coded"), [((), False), (GZIP, True), ((("content-encoding", "identity"),), False)])
def test_a_stored_answer_comes_back_as_it_was(extra: Headers, coded: bool) -> None:
    body = bytes(range(256))
    stored = thaw(freeze(Response(200, (*PERSONAL, *KEPT, *extra, ("Content-Length", "9")), body), 12.5))
    assert (stored.born, stored.body, stored.coded) == (12.5, body, coded)
    assert stored.headers() == (*KEPT, *extra, ("Content-Length", "256"))
    assert stored.head.endswith(b"\r\nContent-Length: 256\r\n")


@given(
    st.floats(allow_nan=False), st.binary(), st.lists(st.tuples(st.just("X"), st.from_regex(r"[ -~]*", fullmatch=True)))
)
def test_nothing_is_lost_in_the_store(born: float, body: bytes, headers: list[tuple[str, str]]) -> None:
    stored = thaw(freeze(Response(200, tuple(headers), body), born))
    assert (stored.born, stored.body, stored.headers()[:-1]) == (born, body, tuple(headers))


# --- Codings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ([], False),
        ([""], False),
        (["gzip"], True),
        (["GZip, deflate"], True),
        (["deflate, x-gzip;q=0.5"], True),
        (["identity"], False),
        (["identity, *"], True),
        (["*;q=0"], False),
        (["gzip;q=0"], False),
        (["gzip; q=0.000"], False),
        (["gzip;q=0.001"], True),
        (["*, gzip;q=0"], False),
        (["*;q=0, gzip"], True),
        (["br", "gzip"], True),
        (["gzipped"], False),
    ],
)
def test_gzip_is_for_those_who_take_it(asked: list[str], taken: bool) -> None:
    headers = tuple(("Accept-Encoding", value) for value in asked)
    assert accepts_gzip(headers) is taken
    assert accepts_coding(headers, GZIP) is taken
    assert accepts_coding(headers, ())


def test_who_cannot_take_a_coding_gets_the_plain_bytes_and_their_length() -> None:
    answer = Response(200, (("Content-Type", "a/b"), ("Content-Length", "9"), *GZIP), gzip.compress(OFFERS), "OK")
    told = plain(answer)
    assert (told.status, told.reason, told.body) == (200, "OK", OFFERS)
    assert told.headers == (("Content-Type", "a/b"), ("Content-Length", str(len(OFFERS))))


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(OFFERS)[:-1], zlib.compress(OFFERS)])
def test_what_cannot_be_decoded_is_passed_on_as_it_is(body: bytes) -> None:
    answer = Response(200, GZIP, body)
    assert plain(answer) is answer


def test_what_less_was_taken_out_of_is_another_question() -> None:
    asked = Request("GET", "/api/v0/instances/", (("Authorization", "Bearer k"),))
    route, caller = ROUTES.match(asked.method, asked.target), identify(asked)
    told = [question(route, asked, caller, CacheRules(), "origin", cleaned) for cleaned in ("", "a", "b", "a")]
    assert told[1] == told[3]
    assert len(set(told)) == 3


@pytest.mark.parametrize("body", [b"[" + b"1," * 2_000_000 + b"1]", b'{"api_key": "k", "a":' + b" " * 70_000 + b"1}"])
def test_a_body_in_which_no_key_is_looked_for_is_a_question_to_the_byte(body: bytes) -> None:
    def ask(body: bytes) -> str:
        asked = Request("POST", "/api/v0/bundles/", (("Content-Type", "application/json"),), body)
        return question(ROUTES.match(asked.method, asked.target), asked, identify(asked), CacheRules())

    began = time.process_time()
    assert ask(body) == ask(bytes(body)) != ask(body + b" ")
    assert ask(body) != ask(body.replace(b'"k"', b'"l"').replace(b"[1", b"[2"))
    assert time.process_time() - began < 0.5


def test_a_write_that_was_redirected_and_then_refused_was_done() -> None:
    route, caller = ROUTES.match("DELETE", "/api/v0/instances/7/"), Caller("me")
    families = {family.name: family for family in ROUTES.families.values()}
    assert epochs_of_write(route, caller, Response(404, ()), families) == ()
    assert epochs_of_write(route, caller, Response(404, (), redirected=True), families) != ()
