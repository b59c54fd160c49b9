"""Who asks: the same for every way of giving a key, and never the key itself."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.identity import ANONYMOUS, LARGEST_WITH_KEY, Caller, digest, identify
from proxy.policy.messages import Headers, Request

KEY = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
PATH = "/api/v0/instances/"
BEARER = (("Authorization", f"Bearer {KEY}"),)


def who(target: str = PATH, headers: Headers = (), body: bytes = b"", method: str = "GET") -> Caller:
    return identify(Request(method, target, headers, body))


ONE_KEY = {
    "bearer": who(headers=BEARER),
    "field name in capitals": who(headers=(("AUTHORIZATION", f"Bearer {KEY}"),)),
    "scheme in small letters": who(headers=(("authorization", f"bearer {KEY}"),)),
    "more spaces": who(headers=(("authorization", f"  Bearer   {KEY} "),)),
    "without a scheme": who(headers=(("authorization", KEY),)),
    "query": who(f"{PATH}?owner=me&api_key={KEY}"),
    "query, name encoded": who(f"{PATH}?%61pi%5Fkey={KEY}"),
    "query, value encoded": who(f"{PATH}?api_key=%30{KEY[1:]}"),
    "JSON": who(body=json.dumps({"client_id": "me", "api_key": KEY}).encode()),
    "JSON, name escaped": who(body=b'{"api\\u005fkey": "%s"}' % KEY.encode()),
    "form": who(body=f"client_id=me&api_key={KEY}".encode()),
    "form, name encoded": who(body=f"client_id=me&api%5Fkey={KEY}".encode()),
    "bearer and query": who(f"{PATH}?api_key={KEY}", BEARER),
    "bearer and JSON": who(headers=BEARER, body=json.dumps({"api_key": KEY}).encode()),
    "all three": who(f"{PATH}?api_key={KEY}", BEARER, json.dumps({"api_key": KEY}).encode()),
    "bearer twice": who(headers=BEARER * 2),
    "bearer and an empty parameter": who(f"{PATH}?api_key=", BEARER),
    "bearer and a null in the body": who(headers=BEARER, body=b'{"api_key": null}'),
    "another endpoint": who("/api/v0/bundles/?q=%7B%7D", BEARER, method="POST"),
}


@pytest.mark.parametrize("way", ONE_KEY)
def test_every_way_of_giving_a_key_is_the_same_caller(way: str) -> None:
    assert ONE_KEY[way] == Caller(digest(KEY))


UNEQUAL = {
    "the key": who(headers=BEARER),
    "another key": who(headers=(("Authorization", f"Bearer {OTHER}"),)),
    "nobody": who(),
    "basic, not bearer": who(headers=(("Authorization", f"Basic {KEY}"),)),
    "header and another in the query": who(f"{PATH}?api_key={OTHER}", BEARER),
    "the same two the other way round": who(f"{PATH}?api_key={KEY}", (("Authorization", f"Bearer {OTHER}"),)),
    "header and another in the body": who(headers=BEARER, body=json.dumps({"api_key": OTHER}).encode()),
    "two in the query": who(f"{PATH}?api_key={KEY}&api_key={OTHER}"),
    "a cookie": who(headers=(("Cookie", "session=1"),)),
    "another cookie": who(headers=(("Cookie", "session=2"),)),
    "key and cookie": who(headers=(*BEARER, ("Cookie", "session=1"))),
    "another key and the same cookie": who(headers=(("Authorization", f"Bearer {OTHER}"), ("Cookie", "session=1"))),
    "key and two cookies": who(headers=(*BEARER, ("Cookie", "session=1"), ("Cookie", "session=2"))),
    "a number": who(body=b'{"api_key": 5}'),
    "the key in small and large letters": who(headers=(("Authorization", f"Bearer {KEY.upper()}"),)),
}


def test_different_callers_are_never_one() -> None:
    assert len({caller.credential for caller in UNEQUAL.values()}) == len(UNEQUAL)


@pytest.mark.parametrize(
    "request_",
    [
        Request("GET", PATH, ()),
        Request("GET", f"{PATH}?api_key=", (("Authorization", "Bearer "),)),
        Request("GET", PATH, (("Authorization", "Bearer"),)),
        Request("GET", f"{PATH}?my_api_key={KEY}&api_keys={KEY}", ()),
        Request("POST", PATH, (), json.dumps({"env": {"api_key": KEY}}).encode()),
        Request("POST", PATH, (), json.dumps([{"api_key": KEY}]).encode()),
        Request("POST", PATH, (), b'{"api_key": "damaged'),
        Request("POST", PATH, (), b"[" * 200_000 + b"api_key"),
        Request("POST", PATH, (), b'{"api_key": null}'),
        Request("POST", PATH, (), b'{"api_key": ""}'),
    ],
    ids=range(10),
)
def test_without_a_key_where_clients_put_it_the_caller_is_anonymous(request_: Request) -> None:
    assert identify(request_) == Caller(ANONYMOUS)


@pytest.mark.parametrize("way", [json.dumps({"api_key": KEY, "x": "y" * 70_000}), f"api_key={KEY}&x=" + "y" * 70_000])
def test_in_a_body_that_is_longer_than_any_with_a_key_none_is_looked_for(way: str) -> None:
    assert who(body=way.encode()) == Caller(ANONYMOUS)
    assert who(headers=BEARER, body=way.encode()) == Caller(digest(KEY))


@pytest.mark.parametrize(
    "fill",
    [(b"%&", b"a&", b""), (b"x=", b"%41", b""), (b"api_key=x&", b"a&", b""), (b"[", b"1,", b"1]")],
    ids=["form", "escapes", "form with a key", "JSON"],
)
@pytest.mark.parametrize("size", [LARGEST_WITH_KEY - 64, 4 * 1024 * 1024])
def test_to_look_for_a_key_in_anybodys_body_costs_next_to_nothing(fill: tuple[bytes, bytes, bytes], size: int) -> None:
    head, unit, tail = fill
    asked = Request("POST", PATH, (), head + unit * (size // len(unit)) + tail)
    began = time.process_time()
    for _ in range(10):
        identify(asked)
    assert time.process_time() - began < 0.3


def test_of_a_field_that_stands_twice_in_json_both_values_count() -> None:
    twice = who(body=b'{"api_key": "%s", "api_key": "%s"}' % (KEY.encode(), OTHER.encode()))
    assert twice not in (Caller(ANONYMOUS), Caller(digest(KEY)), Caller(digest(OTHER)))
    assert who(body=b'{"api_key": "%s", "api_key": "%s"}' % (KEY.encode(), KEY.encode())) == Caller(digest(KEY))


def test_a_number_of_many_digits_hides_no_key() -> None:
    assert who(body=b'{"x": 1%s, "api_key": "%s"}' % (b"0" * 5000, KEY.encode())) == Caller(digest(KEY))


@given(st.text(min_size=4).filter(str.strip), st.sampled_from(["header", "query", "body", "cookie"]))
def test_the_caller_never_holds_what_it_was_made_of(secret: str, place: str) -> None:
    secret = f"secret-{secret}"
    headers: Headers = ()
    target, body = PATH, b""
    match place:
        case "header":
            headers = (("Authorization", f"Bearer {secret}"),)
        case "query":
            target = f"{PATH}?api_key={secret}"
        case "body":
            body = json.dumps({"api_key": secret}).encode()
        case _:
            headers = (("Cookie", secret),)
    caller = identify(Request("POST", target, headers, body))
    assert "secret" not in repr(caller)
    assert len(caller.credential) == 16
    assert set(caller.credential) <= set("0123456789abcdef")
    assert caller.label == caller.credential[:8]


@pytest.mark.parametrize("key", ["\ud800", chr(0xDC80), "ключ", "\x00", "k" * 60_000])
def test_no_key_is_too_strange_to_be_told_from_others(key: str) -> None:
    asked = identify(Request("POST", PATH, (), json.dumps({"api_key": key}).encode()))
    assert asked not in (Caller(ANONYMOUS), Caller(digest(KEY)))


@given(st.text(), st.text(), st.binary())
def test_no_request_is_too_strange_to_be_identified(query: str, authorization: str, body: bytes) -> None:
    target = f"{PATH}?{query}".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    assert identify(Request("POST", target, (("Authorization", authorization),), body)).credential
