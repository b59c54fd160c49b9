"""Team mode on real sockets: the token comes in, the key goes out, and neither is seen on the other side."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, Gateway, Start
from fake_vast import Behaviour, Fault, identity_of
from raw import RawUpstream, Wire, answer, request

from proxy.policy.members import hashed
from proxy.settings import load

pytestmark = pytest.mark.looptime

KEY = "0123456789abcdef0123456789abcdef-key-of-the-account"
ADA, BOB = ("vp_" + name * 43 for name in "ab")
USER = "/api/v0/users/current"
SSH = "/api/v0/ssh/"

Team = Callable[..., Awaitable[Gateway]]


@pytest.fixture
def team(start: Start, tmp_path: Path) -> Team:
    """`await team(fast=True, ada={"effects": ["read"]})`: a gateway with one key and two members, ada and bob."""

    async def begin(behaviour: Any = None, ada: Any = None, **more: Any) -> Gateway:
        file = tmp_path / "key"
        file.write_text(KEY)
        file.chmod(0o600)
        members = {"ada": {"token": hashed(ADA), **(ada or {})}, "bob": {"token": hashed(BOB)}}
        given = {"keys": {"default": {"file": str(file)}}, "members": members}
        gateway: Gateway = await start(behaviour, team=given, **more)
        return gateway

    return begin


def seen(answer: Answer) -> bytes:
    return repr(answer.raw_headers).encode() + answer.body


def asked_with(gateway: Gateway) -> set[str]:
    """Whose keys the fake was asked with."""
    return {call.identity for call in gateway.fake.calls()}


# --- In ---------------------------------------------------------------------------------------------------------------


async def test_the_token_comes_in_by_header_query_and_body_and_the_key_goes_out(team: Team) -> None:
    gateway = await team(fast=True)
    assert (await gateway.get(SSH, key=ADA)).status == 200
    assert (await gateway.get(f"{SSH}?api_key={ADA}", key="")).status == 200
    assert (await gateway("GET", "/api/v0/endptjobs/", {"client_id": "me", "api_key": ADA}, key="")).status == 200
    assert asked_with(gateway) == {identity_of(KEY)}
    for call in gateway.fake.calls():
        assert ADA not in repr(call)


async def test_the_body_is_otherwise_the_same_and_its_length_is_set_anew(start: Start, tmp_path: Path) -> None:
    async with RawUpstream() as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        body = b'{ "client_id":"me",\t"api_key" : "%s", "x": 1.50 }' % ADA.encode()
        async with gateway.session.put(f"{gateway.url}/api/v0/asks/7/", data=body) as response:
            assert response.status == 200
        (found,) = upstream.seen
        assert found.body == body.replace(ADA.encode(), KEY.encode())
        assert found.all("Content-Length") == [str(len(found.body))]


async def test_who_has_no_token_is_told_and_nothing_is_sent(team: Team) -> None:
    gateway = await team(fast=True)
    for key, code in (("", "token_needed"), (KEY, "token_unknown"), ("vp_" + "c" * 43, "token_unknown")):
        told = await gateway.get(SSH, key=key)
        assert (told.status, told.json["error"]) == (401, code)
        assert told.json["msg"] not in ("Invalid user key", "")
    assert gateway.fake.calls() == []


async def test_a_session_of_the_vendors_goes_neither_way(team: Team) -> None:
    gateway = await team(Behaviour(set_cookie=("session=abc",)), fast=True)
    told = await gateway.get(SSH, key=ADA, headers={"Cookie": "session=stolen"})
    assert "Set-Cookie" not in told.headers
    assert "stolen" not in repr(gateway.fake.calls())


# --- Out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["gzip", "identity"])
async def test_the_account_is_shown_without_its_key(team: Team, coding: str) -> None:
    gateway = await team(fast=True)
    for cache in ("fwd=miss; stored; ttl=15", "hit; ttl=15"):
        told = await gateway.get(USER, key=ADA, headers={"Accept-Encoding": coding})
        assert (told.status, told.json["api_key"], told.json["email"].partition("@")[2]) == (200, "", "example.com")
        assert told.cache == cache
        assert KEY.encode() not in seen(told)


async def test_another_key_of_the_account_is_not_shown_either(start: Start, tmp_path: Path) -> None:
    body = b'{"id":  7, "api_key": "the-first-key-of-the-account", "x": [1.50]}'
    async with RawUpstream(answer("Content-Type: application/json", body=body)) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        told = await gateway.get(USER, key=ADA)
        assert told.body == b'{"id":  7, "api_key": "", "x": [1.50]}'


async def test_the_key_is_in_no_answer_wherever_it_stands(start: Start, tmp_path: Path) -> None:
    echo = KEY.encode()
    packed = gzip.compress(b'{"url": "/x?api_key=%s"}' % echo)
    answers = [
        answer(f"X-Echo: {KEY}", f"Location: /x?api_key={KEY}", body=b"key " + echo),
        answer("Content-Encoding: gzip", body=packed),
        answer(body=echo, status="404 Not Found"),
        answer(body=b"nothing", status=f"404 No {KEY}"),
    ]
    async with RawUpstream(*answers) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        for number in range(len(answers)):
            told = await gateway.get(f"/api/v0/x/?n={number}", key=ADA)
            assert KEY.encode() not in seen(told)
        assert (await gateway.get("/api/v0/x/?n=1", key=ADA)).status == 404


async def test_what_holds_no_key_passes_to_the_byte(start: Start, tmp_path: Path) -> None:
    packed = gzip.compress(b'{"a": 1}')
    async with RawUpstream(answer("Content-Encoding: gzip", 'ETag: "x"', body=packed)) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        async with gateway.session.get(
            f"{gateway.url}/api/v0/x/", headers={"Authorization": f"Bearer {ADA}"}, auto_decompress=False
        ) as response:
            assert await response.read() == packed
            assert response.headers["ETag"] == '"x"'


@pytest.mark.parametrize("coded", [True, False])
async def test_a_key_that_is_split_over_pieces_of_a_large_answer_does_not_slip_through(
    start: Start, tmp_path: Path, *, coded: bool
) -> None:
    whole = b"".join(b"%d " % number for number in range(300_000)) + KEY.encode() + b" and the end " + KEY.encode()
    sent = gzip.compress(whole, 0) if coded else whole
    cut = len(sent) - len(KEY) // 2 - 8 * coded

    async def script(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(sent)}\r\n" + "Content-Encoding: gzip\r\n" * coded + "\r\n"
        writer.write(head.encode() + sent[:cut])
        await writer.drain()
        await asyncio.sleep(1)
        writer.write(sent[cut:])
        await writer.drain()

    async with RawUpstream(script) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        told = await gateway.get("/api/v0/x/", key=ADA)
        assert told.body == whole.replace(KEY.encode(), b"*" * len(KEY))


@pytest.mark.parametrize(
    "sent",
    [
        answer("Content-Encoding: br", body=b"\x0b\x02\x80{}\x03"),
        answer("Content-Encoding: gzip", body=b"no gzip"),
        answer("Content-Encoding: deflate", body=zlib.compress(b"x")[:-1]),
        answer("Content-Encoding: br", body=b"x" * 2_000_000),
    ],
    ids=["another coding", "damaged", "cut short", "large"],
)
async def test_what_cannot_be_looked_into_is_not_passed_on(start: Start, tmp_path: Path, sent: bytes) -> None:
    async with RawUpstream(sent) as upstream:
        gateway = await team_before(start, tmp_path, upstream, retry={"max_attempts": 1})
        told = await gateway.get("/api/v0/x/", key=ADA)
        assert (told.status, told.json["error"]) == (503, "upstream_unreachable")


async def team_before(start: Start, tmp_path: Path, upstream: RawUpstream, ada: Any = None, **more: Any) -> Gateway:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    members = {"ada": {"token": hashed(ADA), **(ada or {})}, "bob": {"token": hashed(BOB)}}
    given = {"keys": {"default": {"file": str(file)}}, "members": members}
    gateway: Gateway = await start(fake=upstream, team=given, limits={"scale": 1e-6, "global": None}, **more)
    return gateway


async def test_what_is_coded_twice_is_looked_past_in_neither_direction(start: Start, tmp_path: Path) -> None:
    lines = ["Content-Encoding: identity", "Content-Encoding: gzip"]
    async with RawUpstream(answer(*lines, body=gzip.compress(KEY.encode()))) as upstream:
        gateway = await team_before(start, tmp_path, upstream, retry={"max_attempts": 1})
        async with await Wire.to(gateway) as wire:
            told = await wire.ask(request("/api/v0/x/", f"Authorization: Bearer {ADA}", "Accept-Encoding: gzip"))
            assert told.status == 503
            packed = gzip.compress(ADA.encode())
            sent = request("/api/v0/asks/1/", *lines, f"Authorization: Bearer {ADA}", method="PUT", body=packed)
            assert (await wire.ask(sent)).status == 400


async def test_a_key_is_covered_in_a_header_name_and_in_utf_16(start: Start, tmp_path: Path) -> None:
    async with RawUpstream(answer(f"{KEY}: 1", body=f'{{"a": "{KEY}"}}'.encode("utf-16"))) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        told = await gateway.get("/api/v0/x/", key=ADA)
        assert KEY.encode() not in seen(told).replace(b"\0", b"")
        assert told.headers["*" * len(KEY)] == "1"


@pytest.mark.parametrize("coding", ["gzip", "identity"])
async def test_a_session_that_is_over_is_told_as_the_gateways_also_when_it_comes_packed(
    start: Start, tmp_path: Path, coding: str
) -> None:
    body = b'{"success": false, "msg": "Session expired. Please log in again."}'
    packed = gzip.compress(body) if coding == "gzip" else body
    async with RawUpstream(answer(f"Content-Encoding: {coding}", body=packed, status="404 Not Found")) as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        assert (await gateway.get("/api/v0/x/", key=ADA)).json["error"] == "gateway_key_refused"


@pytest.mark.parametrize("under_way", [False, True])
async def test_what_was_asked_for_without_a_team_is_not_told_to_a_member(
    start: Start, tmp_path: Path, *, under_way: bool
) -> None:
    body = json.dumps({"id": 7, "api_key": KEY}).encode()

    async def script(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * under_way)
        writer.write(answer("Content-Type: application/json", body=body))
        await writer.drain()

    async with RawUpstream(script) as upstream:
        gateway: Gateway = await start(fake=upstream, limits={"scale": 1e-6, "global": None})
        owner = asyncio.create_task(gateway.get(USER, key=KEY))
        await asyncio.sleep(1)
        (tmp_path / "key").write_text(KEY)
        (tmp_path / "key").chmod(0o600)
        keys, members = {"default": {"file": str(tmp_path / "key")}}, {"ada": {"token": hashed(ADA)}}
        written = json.loads((tmp_path / "proxy.yaml").read_text()) | {"team": {"keys": keys, "members": members}}
        (tmp_path / "proxy.yaml").write_text(json.dumps(written))
        gateway.app.reload(load(tmp_path / "proxy.yaml", {}, {}))
        told = await gateway.get(USER, key=ADA)
        assert (told.json["api_key"], told.cache) == ("", "fwd=miss; stored; ttl=15")
        assert (await owner).json["api_key"] == KEY


async def test_that_the_gateways_own_key_is_refused_is_not_told_as_if_it_were_the_clients(team: Team) -> None:
    gateway = await team(Behaviour(invalid_keys=frozenset({KEY})), fast=True)
    told = await gateway.get(SSH, key=ADA)
    assert (told.status, told.json["error"]) == (403, "gateway_key_refused")
    assert "Invalid user key" not in told.json["msg"]


# --- Who is who -------------------------------------------------------------------------------------------------------


async def test_members_with_one_key_share_answers_and_epochs(team: Team) -> None:
    gateway = await team(fast=True)
    assert (await gateway.get(SSH, key=ADA)).cache == "fwd=miss; stored; ttl=30"
    assert (await gateway.get(SSH, key=BOB)).cache == "hit; ttl=30"
    await gateway.post(SSH, {"ssh_key": "ssh-ed25519 AAAA ada"}, key=ADA)
    assert "AAAA" in str((await gateway.get(SSH, key=BOB)).json)


async def test_the_same_write_of_two_members_is_two(team: Team) -> None:
    gateway = await team()
    gateway.fake.faults.append(Fault(kind="slow", delay=5.0))
    path, body = "/api/v0/launch_instance/", {"image": "x", "q": {}}

    async def leaves(key: str) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await gateway.put(path, body, key=key)

    await leaves(ADA)
    other = await gateway.put(path, body, key=BOB)
    again = await gateway.put(path, body, key=ADA)
    assert (other.cache, again.cache) == ("fwd=method", "fwd=method; collapsed")
    assert gateway.fake.count("rented") == 2


async def test_anothers_write_does_not_have_a_lost_spend_sent_twice(team: Team) -> None:
    gateway = await team(fast=True)
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/prepay/{id}/", kind="drop_after"))
    pays = "/api/v0/instances/prepay/42/"
    for _ in range(3):
        assert (await gateway.put(pays, {"amount": 100}, key=ADA)).json["error"] == "outcome_unknown"
        await gateway.put("/api/v0/instances/42/", {"label": "x"}, key=BOB)
        await gateway.delete("/api/v0/instances/42/", key=BOB)
    assert len(gateway.fake.calls("PUT /api/v0/instances/prepay/{id}/")) == 1


async def test_anothers_many_idempotency_keys_push_out_none(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.ledger.MOST_KEYED_OF_ONE", 20)
    async with RawUpstream() as upstream:
        gateway = await team_before(start, tmp_path, upstream)
        for key in ("one", *(f"of bob {number}" for number in range(30)), "one"):
            whose, path = (ADA, "/api/v0/asks/7/") if key == "one" else (BOB, "/route/")
            method = "PUT" if key == "one" else "POST"
            await gateway(method, path, {}, key=whose, headers={"Idempotency-Key": key})
        assert sum("/asks/7/" in seen.line for seen in upstream.seen) == 1


async def test_members_with_one_key_share_its_line_by_weight(team: Team) -> None:
    gateway = await team(ada={"weight": 2})
    order: list[str] = []

    async def ask(key: str, number: int) -> None:
        await gateway.get(f"/api/v0/instances/{number}/?owner=me", key=key)
        order.append(key[3])

    async with asyncio.TaskGroup() as tasks:
        for number in range(12):
            tasks.create_task(ask(BOB, number))
        await asyncio.sleep(0.5)
        for number in range(12, 20):
            tasks.create_task(ask(ADA, number))
    assert order[0] == "b"
    assert 7 <= order[1:13].count("a") <= 8, "two turns of ada's for one of bob's, as long as both wait"


async def test_the_log_names_the_member(team: Team, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = await team(fast=True, log={"level": "info"})
    await gateway.get(SSH, key=ADA)
    await gateway.put("/api/v0/users/", {}, key=BOB)
    await asyncio.sleep(0)
    first, second = capsys.readouterr().err.splitlines()
    assert f"GET {SSH} caller=ada from=127.0.0.1 status=200" in first
    assert "PUT /api/v0/users/ caller=bob from=127.0.0.1 status=403" in second
    assert "code=not_permitted" in second


# --- What a member may do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v0/auth/apikeys/"),
        ("POST", "/api/v0/auth/apikeys/"),
        ("PUT", "/api/v0/commands/reset_apikey/"),
        ("POST", "/api/v0/tfa/"),
        ("PUT", "/api/v0/users/"),
        ("POST", "/api/v0/users/"),
        ("GET", "/api/v0/secrets/"),
    ],
)
async def test_the_keys_of_the_account_are_out_of_reach_unless_granted(team: Team, method: str, path: str) -> None:
    gateway = await team(fast=True, ada={"grant": [f"{method} {path}"]})
    told = await gateway(method, path, {}, key=BOB)
    assert (told.status, told.json["error"]) == (403, "not_permitted")
    assert "bob" in told.json["msg"]
    assert gateway.fake.calls() == []
    await gateway(method, path, {}, key=ADA)
    assert len(gateway.fake.calls()) == 1


async def test_who_may_only_read_gets_no_stored_search_of_others_and_rents_nothing(team: Team) -> None:
    gateway = await team(fast=True, ada={"effects": ["read"]})
    assert (await gateway.post("/api/v0/bundles/", {"q": 1}, key=BOB)).status == 200
    assert (await gateway.post("/api/v0/bundles/", {"q": 1}, key=ADA)).status == 403
    told = await gateway.put(gateway.offer(), {}, key=ADA)
    assert (
        told.json["msg"] == "ada may not PUT /api/v0/asks/{id}/: that needs the effect spend (team.members.ada.effects)"
    )
    assert (await gateway.get(SSH, key=ADA)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/v0/instances/{}/"),
        ("GET", "/api/v0/instance_backups/{}/download/"),
        ("GET", "/api/v0/deployment/{}/download_url/"),
    ],
)
@pytest.mark.parametrize("number", ["42", "%D9%A4%D9%A2", "4_2"])
async def test_no_spelling_of_a_number_changes_what_a_call_needs(
    team: Team, method: str, path: str, number: str
) -> None:
    gateway = await team(fast=True, ada={"effects": ["read", "search", "spend"]})
    assert (await gateway(method, path.format(number), key=ADA)).status == 403
    assert gateway.fake.calls() == []


# --- Spends of a day --------------------------------------------------------------------------------------------------

ASK = "PUT /api/v0/asks/{id}/"


async def test_the_spends_of_a_day_are_counted_by_member_and_the_sentence_says_when_it_ends(team: Team) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 2})
    paths = [gateway.offer(number) for number in range(6)]
    assert [(await gateway.put(path, {}, key=ADA)).status for path in paths[:3]] == [200, 200, 403]
    told = (await gateway.put(paths[3], {}, key=ADA)).json
    assert told["error"] == "spends_used_up"
    assert re.fullmatch(
        r"ada has 0 of 2 spends left on 2026-07-25 \(team\.members\.ada\.spends_per_day\), and this takes 1; "
        r"the day ends at 2026-07-26 00:00 UTC, in \d+ h \d+ min",
        told["msg"],
    )
    assert (await gateway.put(paths[4], {}, key=BOB)).status == 200
    assert (await gateway.get(SSH, key=ADA)).status == 200
    assert gateway.fake.count("rented") == 3
    await asyncio.sleep(24 * 3600)
    assert (await gateway.put(paths[5], {}, key=ADA)).status == 200


async def test_of_more_at_once_than_are_left_no_more_are_sent(team: Team) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 3})
    paths = [gateway.offer(number) for number in range(8)]
    answers = await asyncio.gather(*(gateway.put(path, {}, key=ADA) for path in paths))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [403] * 5
    assert len(gateway.fake.calls(ASK)) == 3


async def test_a_bulk_create_takes_one_for_each_offer(team: Team) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 3})
    offers = [int(offer["id"]) for offer in gateway.fake.offers]
    assert (await gateway.post("/api/v0/asks/bulk/", {"ids": offers[:2]}, key=ADA)).status == 200
    told = await gateway.post("/api/v0/asks/bulk/", {"ids": offers[2:4]}, key=ADA)
    assert "ada has 1 of 3 spends left" in told.json["msg"]
    assert (await gateway.post("/api/v0/asks/bulk/", {"ids": offers[2:3]}, key=ADA)).status == 200


@pytest.mark.parametrize("crash", [False, True])
async def test_they_survive_a_restart(team: Team, *, crash: bool) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 1})
    paths = [gateway.offer(number) for number in range(2)]
    assert (await gateway.put(paths[0], {}, key=ADA)).status == 200
    await gateway.restart(crash=crash)
    assert (await gateway.put(paths[1], {}, key=ADA)).json["error"] == "spends_used_up"


async def test_what_was_not_done_is_given_back(team: Team) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 1})
    path = gateway.offer()
    for fault in (
        Fault(match=ASK, kind="refuse429", form="json_retry_after", retry_after=3000),
        Fault(match=ASK, kind="status", status=404, body=b'{"error": "no_such_ask"}'),
    ):
        gateway.fake.faults.append(fault)
        assert (await gateway.put(path, {"image": str(fault.status)}, key=ADA)).status in (429, 404)
        await asyncio.sleep(3600)  # what was learned of it
    assert (await gateway.put(path, {}, key=ADA)).status == 200
    assert (await gateway.put(gateway.offer(), {}, key=ADA)).status == 403


async def test_who_leaves_while_it_waits_has_it_back_and_who_leaves_later_has_not(team: Team) -> None:
    gateway = await team(ada={"spends_per_day": 2})
    gateway.fake.faults.append(Fault(match=ASK, kind="slow", delay=3.0))
    paths = [gateway.offer(number) for number in range(3)]

    async def leaves(path: str) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await gateway.put(path, {}, key=ADA)

    await asyncio.gather(leaves(paths[0]), leaves(paths[1]))
    assert len(gateway.fake.calls(ASK)) == 1
    await asyncio.sleep(5)
    assert (await gateway.put(paths[1], {}, key=ADA)).status == 200
    assert (await gateway.put(paths[2], {}, key=ADA)).status == 403


async def test_one_whose_outcome_is_not_known_counts(team: Team) -> None:
    gateway = await team(fast=True, ada={"spends_per_day": 1})
    gateway.fake.faults.append(Fault(match=ASK, kind="drop_after"))
    assert (await gateway.put(gateway.offer(), {}, key=ADA)).json["error"] == "outcome_unknown"
    assert (await gateway.put(gateway.offer(1), {}, key=ADA)).json["error"] == "spends_used_up"


async def test_one_that_was_done_and_redirected_to_nowhere_counts_and_is_not_done_again(
    start: Start, tmp_path: Path
) -> None:
    done = answer("Location: /api/v0/instances/9/", status="303 See Other")
    async with RawUpstream(*[done, answer(status="403 Forbidden")] * 2) as upstream:
        gateway = await team_before(start, tmp_path, upstream, ada={"spends_per_day": 1})
        own = {"Idempotency-Key": "one"}
        for _ in range(2):
            told = await gateway.put("/api/v0/asks/1/", {}, key=ADA, headers=own)
            assert (told.status, told.body) == (403, b"")
        assert (await gateway.put("/api/v0/asks/2/", {}, key=ADA)).json["error"] == "spends_used_up"
        assert [seen.line.split(" ")[0] for seen in upstream.seen] == ["PUT", "GET"]


async def test_a_damaged_file_of_spends_is_told_and_no_reason_to_stop(
    team: Team, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.spends").write_text("{")
    gateway = await team(fast=True, ada={"spends_per_day": 1})
    assert "cannot be read (JSONDecodeError): counting anew" in caplog.text
    assert (await gateway.put(gateway.offer(), {}, key=ADA)).status == 200
    assert json.loads((tmp_path / "state.spends").read_text()) == {"day": "2026-07-25", "spends": {"ada": 1}}


# --- Revoking ---------------------------------------------------------------------------------------------------------


async def test_a_token_whose_line_is_gone_is_refused_from_the_reload_on(team: Team, tmp_path: Path) -> None:
    gateway = await team(fast=True)
    for _ in range(2):
        assert (await gateway.get(SSH, key=ADA)).status == 200
    written = json.loads((tmp_path / "proxy.yaml").read_text())
    del written["team"]["members"]["ada"]
    (tmp_path / "proxy.yaml").write_text(json.dumps(written))
    gateway.app.reload(load(tmp_path / "proxy.yaml", {}, {}))
    assert (await gateway.get(SSH, key=ADA)).json["error"] == "token_unknown"
    assert (await gateway.get(SSH, key=BOB)).status == 200
    written["team"]["members"] = {}
    (tmp_path / "proxy.yaml").write_text(json.dumps(written))
    gateway.app.reload(load(tmp_path / "proxy.yaml", {}, {}))
    assert (await gateway.get(SSH, key=BOB)).json["error"] == "token_unknown"


async def test_another_key_in_the_file_is_used_from_the_reload_on(team: Team, tmp_path: Path) -> None:
    gateway = await team(fast=True)
    await gateway.get(SSH, key=ADA)
    (tmp_path / "key").write_text("another-key-of-the-account")
    gateway.app.reload(load(tmp_path / "proxy.yaml", {}, {}))
    await gateway.get(SSH, key=ADA)
    assert asked_with(gateway) == {identity_of(KEY), identity_of("another-key-of-the-account")}


async def test_neither_key_nor_token_is_in_a_file_a_status_or_a_repr(team: Team, tmp_path: Path) -> None:
    gateway = await team(fast=True)
    await gateway.put(gateway.offer(), {}, key=ADA)
    await gateway.app.stop(1.0)
    files = [file for file in tmp_path.iterdir() if file.name != "key"]
    assert {"state.json", "state.writes"} <= {file.name for file in files}
    told = repr(gateway.app.settings) + json.dumps(gateway.app._status(), default=str)
    for secret in (KEY, ADA):
        assert secret not in told
        assert not [file for file in files if secret in file.read_text()]


# --- Reads that members share -----------------------------------------------------------------------------------------


async def test_a_member_who_asks_what_another_s_crowd_asks_last_waits_no_longer_than_for_a_question_of_its_own(
    team: Team,
) -> None:
    gateway = await team(limits={"global": {"rate": 1, "per": "1s", "burst": 1}})
    crowd = [asyncio.create_task(gateway.get(f"/api/v0/machines?n={number}", key=ADA)) for number in range(40)]
    await asyncio.sleep(1.0)
    began = gateway.now()
    same = asyncio.create_task(gateway.get("/api/v0/machines?n=39", key=BOB))
    await asyncio.sleep(0.1)
    assert (await same).status == 200
    assert gateway.now() - began < 5.0
    assert not crowd[38].done()
    assert (await crowd[39]).status == 200
    await asyncio.gather(*crowd)
    assert len(gateway.fake.calls()) == 40


async def test_a_follower_who_leaves_takes_its_place_along(team: Team) -> None:
    gateway = await team(limits={"global": {"rate": 1, "per": "1s", "burst": 1}})
    crowd = [asyncio.create_task(gateway.get(f"/api/v0/machines?n={number}", key=ADA)) for number in range(10)]
    await asyncio.sleep(0.5)
    same = asyncio.create_task(gateway.get("/api/v0/machines?n=9", key=BOB))
    await asyncio.sleep(0.1)
    same.cancel()
    await asyncio.gather(same, return_exceptions=True)
    await asyncio.sleep(5.0)
    assert not crowd[9].done()
    await asyncio.gather(*crowd)
    assert not gateway.app.admission.origins["api"]
