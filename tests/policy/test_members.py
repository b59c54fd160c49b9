"""Team mode: whose token it is, what the member may do, and that a token goes no further than here."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.errors import Refusal
from proxy.policy.identity import digest
from proxy.policy.members import (
    KeyRules,
    Member,
    Secret,
    TeamRules,
    admit,
    faults,
    forbidden,
    hashed,
    reserved,
    spends_in,
    vouched,
)
from proxy.policy.messages import Headers, Request
from proxy.policy.routing import Effect
from proxy.settings import load

HEADERS_OF_OTHERS = [
    "Cookie", "Forwarded", "Range", "If-Range", "X-Forwarded-For", "X-Forwarded-Prefix", "x-forwarded-uri", "X-Host",
    "X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Original-Method",
    "X-Override-URL", "X-Rewrite-URL", "X-Script-Name", "X-Real-IP", "True-Client-IP", "X_HTTP_Method_Override",
    "X_Original_URL", "SCRIPT_NAME",
]  # fmt: skip
TOKEN = "vp_0123456789abcdef0123456789abcdef0123456789a"
OTHER = "vp_fedcba9876543210fedcba9876543210fedcba98765"
KEY = "the key/of the+account&\"'".replace(" ", "-") + "0123456789"
KEYS = {"default": Secret(KEY), "second": Secret("second-key-of-the-team")}
ROUTES = load(None, {"HOME": "/"}, {}).routes
PATH = "/api/v0/instances/"
BEARER = (("Authorization", f"Bearer {TOKEN}"),)


def team(**given: Any) -> TeamRules:
    return TeamRules(
        {"default": KeyRules(env="A"), "second": KeyRules(env="B")},
        {"ada": Member(hashed(TOKEN), **given), "bob": Member(hashed(OTHER), key="second", weight=3)},
    )


def passed(target: str = PATH, headers: Headers = BEARER, body: bytes = b"", method: str = "GET") -> Request:
    return admit(Request(method, target, headers, body), team(), KEYS)[0]


def refused(target: str = PATH, headers: Headers = BEARER, body: bytes = b"") -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        admit(Request("GET", target, headers, body), team(), KEYS)
    assert TOKEN not in caught.value.msg
    return caught.value.status, caught.value.code


# --- Who asks ---------------------------------------------------------------------------------------------------------


def test_without_a_team_a_request_passes_as_it_is_and_its_caller_is_the_key_and_the_address() -> None:
    request = Request("GET", PATH, (("Authorization", f"Bearer {KEY}"), ("Cookie", "a"), ("Range", "bytes=0-1")))
    same, caller = admit(request, TeamRules(), {}, "10.0.0.7")
    assert same is request
    assert (caller.member, caller.address, caller.weight) == ("", "10.0.0.7", 1.0)
    assert caller.who == f"{caller.credential} 10.0.0.7"


def test_a_member_is_known_by_the_token_and_asks_with_the_accounts_key() -> None:
    request, caller = admit(Request("GET", PATH, BEARER), team(), KEYS, "10.0.0.7")
    assert request.headers == (("Authorization", f"Bearer {KEY}"),)
    assert caller.credential == digest(KEY)
    assert (caller.member, caller.who, caller.label) == ("ada", "ada", "ada")
    _, bob = admit(Request("GET", PATH, (("Authorization", f"Bearer {OTHER}"),)), team(), KEYS)
    assert (bob.credential, bob.who) == (digest(KEYS["second"].value), "bob")
    assert caller.weight == pytest.approx(1 / 3), "by the heaviest"
    assert bob.weight == 1.0


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ((), "token_needed"),
        ((("Authorization", "Bearer "),), "token_needed"),
        ((("Cookie", f"session={TOKEN}"),), "token_needed"),
        ((("Authorization", f"Bearer {KEY}"),), "token_unknown"),
        ((("Authorization", f"Bearer {TOKEN}x"),), "token_unknown"),
        ((("Authorization", f"Basic {TOKEN}"),), "token_unknown"),
        ((("Authorization", f"Bearer {hashed(TOKEN)}"),), "token_unknown"),
        ((*BEARER, ("Authorization", f"Bearer {OTHER}")), "token_unknown"),
        (BEARER * 2, "token_unknown"),
    ],
)
def test_who_brings_no_token_of_a_member_is_refused(headers: Headers, code: str) -> None:
    assert refused(headers=headers) == (401, code)


@pytest.mark.parametrize(
    "body",
    [
        b'{"api_key": "another"}',
        b'{"api_key": "another", "api_key": "%s"}' % TOKEN.encode(),
        b'{"api_key": "%s", "api_key": "another"}' % TOKEN.encode(),
        b"api_key=another",
    ],
)
def test_a_key_beside_the_token_is_refused(body: bytes) -> None:
    assert refused(f"{PATH}?api_key={KEY}") == (401, "token_unknown")
    assert refused(body=body) == (401, "token_unknown")


@pytest.mark.parametrize("token", ["hunter2", "vp_hunter2", "vp_" + "a" * 15, "vp_" + "a" * 20 + "!", "a" * 46])
def test_what_does_not_look_like_a_token_is_none_also_if_its_hash_is_stored(token: str) -> None:
    rules = TeamRules({"default": KeyRules(env="A")}, {"ada": Member(hashed(token))})
    with pytest.raises(Refusal, match="token_unknown"):
        admit(Request("GET", PATH, (("Authorization", f"Bearer {token}"),)), rules, KEYS)


@pytest.mark.parametrize("where", ["header", "query", "body"])
def test_without_a_team_a_token_is_told_to_be_one_and_goes_nowhere(where: str) -> None:
    headers = BEARER if where == "header" else ()
    target = f"{PATH}?api_key={TOKEN}" if where == "query" else PATH
    body = json.dumps({"api_key": TOKEN}).encode() if where == "body" else b""
    with pytest.raises(Refusal, match="it wants a Vast key") as caught:
        admit(Request("GET", target, headers, body), TeamRules(), {})
    assert (caught.value.status, caught.value.code) == (401, "token_unknown")


def test_by_its_head_alone_a_member_is_known_or_not_yet_or_refused() -> None:
    assert vouched(Request("POST", PATH, BEARER), team())
    assert vouched(Request("POST", f"{PATH}?api_key={TOKEN}", ()), team())
    assert not vouched(Request("POST", PATH, ()), team())
    for headers in (BEARER * 2, (("Authorization", f"Bearer {KEY}"),), (("Authorization", "Bearer vp_wrong"),)):
        with pytest.raises(Refusal, match="token_unknown"):
            vouched(Request("POST", PATH, headers), team())


def test_with_the_last_member_gone_nobody_comes_in() -> None:
    nobody = TeamRules({"default": KeyRules(env="A")})
    with pytest.raises(Refusal, match="401"):
        admit(Request("GET", PATH, BEARER), nobody, KEYS)


def test_no_repr_shows_a_key_or_a_token() -> None:
    assert KEY not in repr(KEYS)
    assert TOKEN not in repr(team())


# --- The key in the token's place -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((("AUTHORIZATION", f"bearer   {TOKEN} "),), (("AUTHORIZATION", f"bearer   {KEY} "),)),
        ((("authorization", TOKEN),), (("authorization", KEY),)),
        (
            (*BEARER, ("Cookie", "a"), ("Range", "bytes=0-1"), ("X-Forwarded-For", "1.2.3.4")),
            (("Authorization", f"Bearer {KEY}"),),
        ),
        ((*BEARER, ("accept-encoding", "br, gzip")), (("Authorization", f"Bearer {KEY}"), ("accept-encoding", "gzip"))),
        ((*BEARER, ("accept-encoding", "br")), (("Authorization", f"Bearer {KEY}"), ("accept-encoding", "identity"))),
    ],
)
def test_in_the_headers_the_key_stands_where_the_token_stood(headers: Headers, expected: Headers) -> None:
    assert passed(headers=headers).headers == expected


ENCODED = "the-key%2Fof-the%2Baccount%26%22%270123456789"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (f"api_key={TOKEN}", f"api_key={ENCODED}"),
        (f"q=%7b+%7D&api_key={TOKEN}&x=%61&y&&", f"q=%7b+%7D&api_key={ENCODED}&x=%61&y&&"),
        (f"%61pi%5Fkey=%76p_{TOKEN[3:]}", f"%61pi%5Fkey={ENCODED}"),
        (f"api_key={TOKEN}&api_key={TOKEN}", f"api_key={ENCODED}&api_key={ENCODED}"),
    ],
)
def test_in_the_query_only_the_value_is_replaced(query: str, expected: str) -> None:
    assert passed(f"{PATH}?{query}", ()).target == f"{PATH}?{expected}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"api_key": "%s"}', '{"api_key": %s}'),
        (
            '{ "a" : [1,  2.50], "api_key":"%s" ,"ü":"\\u00fc" }\n',
            '{ "a" : [1,  2.50], "api_key":%s ,"ü":"\\u00fc" }\n',
        ),
        ('{"api\\u005fkey": "%s"}', '{"api\\u005fkey": %s}'),
        ('{"api_key": "%s", "api_key": "' + TOKEN + '"}', '{"api_key": %s, "api_key": ' + json.dumps(KEY) + "}"),
    ],
)
def test_in_a_json_body_only_the_value_is_replaced(body: str, expected: str) -> None:
    assert passed(headers=(), body=(body % TOKEN).encode()).body == (expected % json.dumps(KEY)).encode()
    escaped = "\\u0076" + TOKEN[1:]
    assert passed(headers=(), body=(body % escaped).encode()).body == (expected % json.dumps(KEY)).encode()


def test_in_a_form_only_the_value_is_replaced() -> None:
    assert passed(headers=(), body=f"a=%20&api%5Fkey={TOKEN}".encode()).body == f"a=%20&api%5Fkey={ENCODED}".encode()


@pytest.mark.parametrize("name", HEADERS_OF_OTHERS)
def test_no_header_passes_by_which_a_request_could_be_taken_for_another(name: str) -> None:
    kept = (("X-Request-ID", "one"), ("X-Trace", "a"), ("Accept", "*/*"))
    assert passed(headers=(*BEARER, (name, "DELETE"), *kept)).headers[1:] == kept


def test_a_token_in_a_body_that_is_longer_than_any_with_a_key_is_refused() -> None:
    assert refused(body=json.dumps({"api_key": TOKEN, "x": "y" * 70_000}).encode()) == (400, "bad_request")
    large = json.dumps({"x": "\u0434\n%41" * 20_000, "env": {"api_key": "another"}}).encode()
    assert passed(body=large).body is large


def test_a_request_without_the_token_in_its_body_keeps_it_to_the_byte() -> None:
    body = b'{"api_key": null,  "env": {"A": "b"}}'
    assert passed(body=body).body == body


@pytest.mark.parametrize(
    "request_",
    [
        (f"{PATH}?token={TOKEN}", BEARER, b""),
        (f"{PATH}{TOKEN}/", BEARER, b""),
        (f"{PATH}?a=%76p_{TOKEN[3:]}", BEARER, b""),
        (f"{PATH}?a=%2576p_{TOKEN[3:]}", BEARER, b""),
        (PATH, (*BEARER, ("X-Key", TOKEN)), b""),
        (PATH, (*BEARER, (TOKEN.replace("_", "-"), TOKEN)), b""),
        (PATH, (("Authorization", f"Bearer {TOKEN}"), ("X-Authorization", f"Bearer {TOKEN}")), b""),
        (PATH, BEARER, json.dumps({"env": {"VAST_API_KEY": TOKEN}}).encode()),
        (PATH, BEARER, json.dumps({"env": f"-e K={TOKEN}"}).encode()),
        (PATH, BEARER, b'{"e": "\\u0076p_%s"}' % TOKEN[3:].encode()),
        (PATH, BEARER, json.dumps({"a": json.dumps({"b": TOKEN}).replace("v", "\\u0076")}).encode()),
        (PATH, BEARER, json.dumps({"a": json.dumps({"b": json.dumps(TOKEN)})}).encode("utf-16")),
        (PATH, BEARER, json.dumps({"api_key": TOKEN}).encode("utf-16")),
        (PATH, BEARER, f"key={TOKEN}".encode()),
        (PATH, BEARER, b'{"api_key": "%s"' % TOKEN.encode()),
        (PATH, (*BEARER, ("Content-Encoding", "gzip")), b"\x1f\x8b"),
        (PATH, (*BEARER, ("Content-Encoding", "identity"), ("content-encoding", "gzip")), b"\x1f\x8b"),
    ],
    ids=range(17),
)
def test_a_token_that_stands_anywhere_else_is_refused(request_: tuple[str, Headers, bytes]) -> None:
    assert refused(*request_) == (400, "bad_request")


@given(st.text(), st.text(), st.binary())
def test_a_token_never_goes_upstream(query: str, value: str, body: bytes) -> None:
    text = f"{PATH}?{query}".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    given = Request("POST", text.replace("t", TOKEN), (*BEARER, ("X-A", value.replace("t", TOKEN))), body)
    given = Request("POST", given.target, given.headers, body.replace(b"t", TOKEN.encode()))
    try:
        out, _ = admit(given, team(), KEYS)
    except Refusal:
        return
    assert TOKEN not in out.target
    assert TOKEN not in repr(out.headers)
    assert TOKEN.encode() not in out.body


# --- What a member may do ---------------------------------------------------------------------------------------------


def told(method: str, target: str, **given: Any) -> str:
    """Why ada may not; empty if she may."""
    _, caller = admit(Request("GET", PATH, BEARER), team(), KEYS)
    found = forbidden(caller, ROUTES.match(method, target), target, team(**given), ROUTES)
    if found is None:
        return ""
    assert (found.status, found.code) == (403, "not_permitted")
    return found.msg


CLOSED = {
    "GET /api/v0/auth/apikeys/",
    "GET /api/v0/auth/apikeys/{id}/",
    "POST /api/v0/auth/apikeys/",
    "DELETE /api/v0/auth/apikeys/{id}/",
    "PUT /api/v0/commands/reset_apikey/",
    "PUT /api/v0/subaccounts/regenerate_keys/",
    "GET /api/v0/team/apikeys/",
    "POST /api/v0/users/",
    "PUT /api/v0/users/",
    "GET /api/v0/tfa/status/",
    "POST /api/v0/tfa/",
    "PUT /api/v0/tfa/regen-backup-codes/",
    "POST /api/v0/team/invite/",
    "PUT /api/v0/commands/transfer_credit/",
}


def test_every_route_of_the_table_is_open_or_closed_as_it_should_be() -> None:
    closed = {route.name for route in ROUTES if told(route.method, re.sub(r"{\w+}", "7", route.template))}
    assert closed >= CLOSED
    assert {route.name for route in ROUTES if route.effect is Effect.AUTH} <= closed
    about = ("/auth/", "/tfa/", "/users/", "/team/", "apikey", "regenerate_keys", "/user/", "/subaccounts", "transfer")
    for route in ROUTES:
        if route.effect is not Effect.AUTH:
            is_closed = not route.is_read and any(part in route.template for part in about)
            assert (route.name in closed) == is_closed, route.name


def test_those_that_are_about_keys_are_closed_also_to_who_may_auth() -> None:
    kinds = ("read", "search", "write", "spend", "auth")
    closed = {
        route.name for route in ROUTES if told(route.method, re.sub(r"{\w+}", "7", route.template), effects=kinds)
    }
    assert closed >= CLOSED
    assert "GET /api/v0/secrets/" not in closed
    assert closed == {route.name for route in ROUTES if reserved(route)}


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/api/v0/auth/apikeys/new/"),
        ("POST", "/api/v1/auth/apikeys/"),
        ("POST", "/API/V0/AUTH/APIKEYS/"),
        ("PUT", "/api/v0/commands/reset_apikey/now"),
        ("POST", "/api/v0/./auth/apikeys/"),
        ("POST", "/api/v0/x/../auth/apikeys/"),
        ("POST", "/api/v0//auth/apikeys/"),
        ("POST", "/api/v0/%61uth/apikeys/"),
        ("POST", "/api/v0/%2561uth/apikeys/"),
        ("POST", "/api/v0/x%2Fauth/apikeys/"),
        ("POST", "/api/v0/x\\auth"),
        ("GET", "/api/v0/instances/;/users"),
        ("OPTIONS", "/api/v0/auth/apikeys/"),
        ("HEAD", "/api/v0/auth/apikeys/"),
        ("PATCH", "/api/v0/users/7/"),
        ("PUT", "/users/"),
        ("PUT", "/v0/users/"),
        ("PUT", "/api/v10/users/"),
        ("PUT", "/x/api/v0/users/"),
        ("PUT", "/api/v0/commands/reset-apikey/"),
        ("PUT", "/api/v0/commands/ResetApiKey/"),
        ("PUT", "/api/v0/commands/reset_apikey%20/"),
        ("GET", "/api/v0/commands/reset_apikey/"),
        ("GET", "/api/v0/api-keys/"),
        ("PUT", "/api/v1/commands/transfer-credit/"),
        ("GET", "/api/v0/auth2/keys/"),
        ("POST", "/api/v0/\u0661/"),
        ("POST", "/api/v0/%D9%A4%D9%A2/"),
        ("POST", "/api/v0/%EF%BD%81uth/"),
        ("POST", "/api/v0/x%00/"),
        ("POST", "/api/v0/x;y/"),
    ],
)
def test_no_way_of_writing_a_path_leads_to_what_is_closed(method: str, target: str) -> None:
    assert told(method, target)


@pytest.mark.parametrize("target", ["/api/v0/users/current", "/api/v0/users/current?owner=me", "/api/v0/subaccounts"])
def test_reads_of_the_account_are_open(target: str) -> None:
    assert not told("GET", target)


@pytest.mark.parametrize(
    ("method", "target", "needs"),
    [
        ("GET", PATH, "read"),
        ("POST", "/api/v0/bundles/", "search"),
        ("DELETE", f"{PATH}7/", "write"),
        ("PUT", "/api/v0/asks/7/", "spend"),
        ("POST", "/api/v0/something/new/", "spend"),
        ("GET", "/api/v0/secrets/", "auth"),
    ],
)
def test_a_call_needs_the_effect_that_it_has(method: str, target: str, needs: Any) -> None:
    assert not told(method, target, effects=(needs,))
    others = tuple(kind for kind in ("read", "search", "write", "spend", "auth") if kind != needs)
    assert f"needs the effect {needs} (team.members.ada.effects)" in told(method, target, effects=others)


@pytest.mark.parametrize(
    ("method", "target", "needs"),
    [
        ("DELETE", "/api/v0/instances/4_2/", {"spend", "write"}),
        ("DELETE", "/api/v1/instances/42/", {"spend", "write"}),
        ("PATCH", "/api/v0/instances/42/", {"spend", "write"}),
        ("PATCH", "/api/v0/secrets/", {"spend", "auth"}),
        ("OPTIONS", "/api/v0/secrets/", {"read", "auth"}),
        ("GET", "/api/v1/secrets/", {"read", "auth"}),
        ("HEAD", "/api/v0/instance_backups/x/download/", {"read", "auth"}),
        ("GET", "/api/v0/deployment/4_2/download_url/", {"read", "auth"}),
        ("GET", "/api/v0/asks/42/", {"read", "spend"}),
        ("GET", "/api/v1/instances/42/", {"read"}),
        ("POST", "/API/v0/Instances/42/ssh/", {"spend", "write"}),
    ],
)
def test_what_is_not_listed_needs_all_that_what_looks_like_it_needs(method: str, target: str, needs: set[Any]) -> None:
    assert not told(method, target, effects=tuple(needs))
    for missing in needs:
        assert f"needs the effect {missing}" in told(method, target, effects=tuple(needs - {missing}))


def test_what_looks_like_a_denied_route_is_denied_and_what_looks_like_a_granted_one_is_not_granted() -> None:
    assert "deny" in told("PATCH", f"{PATH}7/", deny=("DELETE /api/v0/instances/{any}",))
    assert "deny" in told("GET", "/api/v1/ssh/", deny=("GET /api/v0/ssh/",))
    assert told("PATCH", "/api/v0/users/", grant=("PUT /api/v0/users/",))
    assert told("PUT", "/api/v0/team/roles/4_2/", grant=("PUT /api/v0/team/roles/{id}/",))
    assert "needs to be granted" in told("GET", "/api/v0/team/invite/")
    assert not told("GET", "/api/v0/team/roles/my%20role/", grant=("GET /api/v0/team/roles/{name}/",))
    for name in ("x%5C..%5C..%5Cauth", "..%252f..%252fauth", "a;b", "%00", "%20a", "%D8%B1"):
        assert "plainly" in told("GET", f"/api/v0/team/roles/{name}/", grant=("GET /api/v0/team/roles/{name}/",))


def test_what_is_denied_is_closed_and_what_is_granted_is_open_however_the_parameter_is_called() -> None:
    assert "team.members.ada.deny" in told("DELETE", f"{PATH}7/", deny=("DELETE /api/v0/instances/{any}",))
    assert not told("DELETE", PATH, deny=("DELETE /api/v0/instances/{any}",))
    assert "team.members.ada.grant" in told("PUT", "/api/v0/users/")
    assert not told("PUT", "/api/v0/users/", grant=("PUT /api/v0/users/",))
    assert not told("GET", PATH, effects=(), grant=("GET /api/v0/instances/",))
    both = ("PUT /api/v0/users/",)
    assert "deny" in told("PUT", "/api/v0/users/", grant=both, deny=both)


@pytest.mark.parametrize(
    ("method", "target", "body", "count"),
    [
        ("GET", PATH, b"", 0),
        ("DELETE", f"{PATH}7/", b"", 0),
        ("PUT", "/api/v0/asks/7/", b"{}", 1),
        ("POST", "/api/v0/asks/bulk/", b'{"ids": [1, 2, 3]}', 3),
        ("POST", "/api/v0/asks/bulk/", b'{"ids": []}', 1),
        ("POST", "/api/v0/asks/bulk/", b"[", 1),
        ("POST", "/api/v0/asks/bulk/", b'{"ids": [%s1]}' % (b"1," * 40_000), 40_001),
        ("POST", "/api/v0/asks/bulk/", b'{"ids": [1], "x": "%s"}' % (b"," * 70_000), 70_002),
        ("POST", "/route/", b"{}", 0),
        ("POST", "/update_workers/", b"{}", 1),
        ("POST", "/api/v0/something/new/", b"{}", 1),
    ],
)
def test_a_call_counts_for_what_it_may_rent(method: str, target: str, body: bytes, count: int) -> None:
    assert spends_in(Request(method, target, (), body), ROUTES.match(method, target)) == count


def test_a_team_without_faults_has_none() -> None:
    assert list(faults(team(deny=("DELETE /api/v0/instances/{x}",)), ROUTES)) == []
