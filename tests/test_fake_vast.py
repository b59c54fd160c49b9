"""The fake keeps its word: it enforces the limits it documents, and breaks in the way it was told to."""

import asyncio
import gzip
import io
import json
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, get_args

import aiohttp
import fake_vast
import pytest
import trustme
from conftest import Client
from fake_vast import Behaviour, FakeVast, Fault, Form, Limit, identity_of

pytestmark = pytest.mark.looptime

NOON = datetime(2026, 7, 25, 12, tzinfo=UTC).timestamp()
MIDNIGHT = int(datetime(2026, 7, 26, tzinfo=UTC).timestamp())
ASK = "PUT /api/v0/asks/{id}/"
USER = "/api/v0/users/current"
FREE = {"*": Limit(0)}  # for the tests that are not about limits


Meet = Callable[..., Awaitable[tuple[FakeVast, Client]]]


@pytest.fixture
async def meet() -> AsyncIterator[Meet]:
    """Start a fake that behaves as told, and a client of it."""
    started: list[FakeVast] = []
    connector = aiohttp.TCPConnector(force_close=True)
    # aiohttp would send a PUT again when the connection is lost; the faults must be seen as they are.
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        session._retry_connection = False

        async def begin(**behaviour: Any) -> tuple[FakeVast, Client]:
            moment = asyncio.get_running_loop().time()
            fake = FakeVast(Behaviour(**behaviour), wall=lambda: NOON + asyncio.get_running_loop().time() - moment)
            await fake.start()
            started.append(fake)
            return fake, Client(session, fake.url)

        yield begin
    for fake in started:
        await fake.stop()


# limits


async def test_a_call_a_millisecond_early_is_refused_and_one_in_time_is_not(meet: Meet) -> None:
    fake, client = await meet()
    interval = fake.limit("GET /api/v0/volumes").interval
    statuses = []
    for pause in (0, interval, interval - 0.001, 0.001):
        await asyncio.sleep(pause)
        statuses.append((await client.get("/api/v0/volumes")).status)
    assert (interval, statuses) == (5.5, [200, 200, 429, 200])
    assert fake.gaps("GET /api/v0/volumes") == pytest.approx([5.5, 5.499, 0.001])
    assert [call.refused for call in fake.log] == [False, False, True, False]


async def test_a_burst_is_admitted_and_a_refusal_puts_the_bucket_into_debt(meet: Meet) -> None:
    fake, client = await meet(form="json_retry_after")
    statuses = [(await client.post("/api/v0/bundles/")).status for _ in range(5)]
    refused = await client.post("/api/v0/bundles/")
    assert statuses == [200] * 5
    assert (refused.status, refused.headers["Retry-After"]) == (429, "10")  # (1 token + 4 of penalty) x 2 s
    await asyncio.sleep(9.999)
    assert fake.limit("POST /api/v0/bundles/") == Limit(2.0, 5, 4)
    assert (await client.post("/api/v0/bundles/")).status == 429
    await asyncio.sleep(8.001)
    assert (await client.post("/api/v0/bundles/")).status == 200


async def test_the_ids_of_a_route_and_both_forms_of_its_slash_share_one_bucket(meet: Meet) -> None:
    _, client = await meet()
    assert (await client.get("/api/v0/instances/1/")).status == 200
    assert (await client.get("/api/v0/instances/2")).status == 429


async def test_methods_have_buckets_of_their_own_unless_the_clock_is_shared(meet: Meet) -> None:
    for shared, expected in ((False, 200), (True, 429)):
        _, client = await meet(shared_clock=shared)
        await client.delete("/api/v0/instances/1/")
        assert (await client.get("/api/v0/instances/1/")).status == expected


async def test_each_key_has_its_buckets_wherever_it_is_carried(meet: Meet) -> None:
    fake, client = await meet()
    statuses = [
        (await client.get("/api/v0/endptjobs/", key="a")).status,
        (await client.get("/api/v0/endptjobs/?api_key=b", key="")).status,
        (await client("GET", "/api/v0/endptjobs/", {"api_key": "c"}, key="")).status,
        (await client("GET", "/api/v0/endptjobs/", {"api_key": "a"}, key="")).status,
    ]
    assert statuses == [200, 200, 200, 429]
    assert [call.identity for call in fake.log] == [identity_of(key) for key in "abca"]


async def test_with_the_scope_of_an_address_the_key_does_not_matter(meet: Meet) -> None:
    _, client = await meet(scope="ip")
    assert [(await client.get(USER, key=key)).status for key in "ab"] == [200, 429]


async def test_the_account_bucket_is_shared_by_all_routes_and_a_refusal_costs_the_route_nothing(meet: Meet) -> None:
    _, client = await meet(account=Limit(10, capacity=2))
    paths = (USER, "/api/v0/ssh/", "/api/v0/secrets/")
    assert [(await client.get(path)).status for path in paths] == [200, 200, 429]
    await asyncio.sleep(10)
    assert (await client.get("/api/v0/secrets/")).status == 200


async def test_scale_and_limits_override_the_documented_numbers(meet: Meet) -> None:
    fake, _ = await meet(scale=0.5, limits={ASK: Limit(2, capacity=3)})
    assert fake.limit(ASK) == Limit(1, capacity=3)
    assert fake.limit("GET /api/v0/instances/").interval == 10


async def test_nobody_is_limited_on_the_serverless_engine(meet: Meet) -> None:
    _, client = await meet()
    answers = [await client.post("/route/", {"endpoint": "e"}) for _ in range(3)]
    assert [answer.json["request_idx"] for answer in answers] == [1, 2, 3]


# refusals


LITERALS = {
    "text": ("text/plain; charset=utf-8", b"API requests too frequent"),
    "bare": ("text/plain; charset=utf-8", b"API requests too frequent"),
    "text_threshold": (
        "text/plain; charset=utf-8",
        b"API requests too frequent: endpoint threshold=3.5*1.0",
    ),
    "detail": ("application/json", b'{"detail":"API requests too frequent endpoint threshold=3.5"}'),
    "success_false": (
        "application/json",
        b'{"success":false,"error":"rate_limit_exceeded","msg":"API requests too frequent endpoint threshold=3.5"}',
    ),
    "json_retry_after": (
        "application/json",
        b'{"error":"HTTPTooManyRequests","msg":"API requests too frequent","retry_after":4,"limit":1.0,"remaining":0}',
    ),
}


@pytest.mark.parametrize("form", get_args(Form))
async def test_a_refusal_is_the_documented_one_to_the_letter(meet: Meet, form: Form) -> None:
    _, client = await meet(form=form)
    path = "/api/v0/commands/schedule_job/"
    await client.get(path)
    refused = await client.get(path)
    assert (refused.headers["Content-Type"], refused.body) == LITERALS[form]
    hints = {name.lower(): value for name, value in refused.headers.items() if "r" in name[:3].lower()}
    if form == "json_retry_after":
        assert hints["retry-after"] == "4"
        assert hints["x-ratelimit-limit"] == "1.0"
        assert hints["x-ratelimit-remaining"] == "0"
        assert int(hints["x-ratelimit-reset"]) == pytest.approx(NOON + 4, abs=1)
    else:
        assert not {"retry-after", "x-ratelimit-reset"} & set(hints)


async def test_a_route_may_refuse_in_a_form_of_its_own(meet: Meet) -> None:
    _, client = await meet(forms={"GET /api/v0/ssh/": "detail"})
    await client.get("/api/v0/ssh/")
    assert "detail" in (await client.get("/api/v0/ssh/")).json


async def test_rate_limit_headers_come_with_every_answer_when_asked_for(meet: Meet) -> None:
    _, client = await meet(ratelimit_headers=True)
    first = await client.post("/api/v0/bundles/")
    assert (first.headers["X-RateLimit-Limit"], first.headers["X-RateLimit-Remaining"]) == ("5.0", "4")
    fake, client = await meet(ratelimit_headers=True, ratelimit_layer="account", account=Limit(3, capacity=2))
    remaining = [(await client.get(path)).headers["X-RateLimit-Remaining"] for path in (USER, "/api/v0/ssh/")]
    refused = await client.get("/api/v0/secrets/")
    assert (remaining, refused.status) == (["1", "0"], 429)
    assert int(refused.headers["X-RateLimit-Reset"]) == pytest.approx(fake.wall() + 3, abs=1)


async def test_the_search_quota_is_shared_by_the_three_searches_until_midnight(meet: Meet) -> None:
    _, client = await meet(limits=FREE, search_quota=2)
    await client.post("/api/v0/bundles/")
    await client.put("/api/v0/search/asks/", {"q": {}})
    spent = await client.get("/api/v0/bundles/?q={}")
    assert (spent.status, spent.json["error"]) == (429, "search_quota_exceeded")
    assert spent.headers["X-RateLimit-Reset"] == str(MIDNIGHT)
    assert (await client.post("/api/v0/bundles/", key="another")).status == 200
    await asyncio.sleep(MIDNIGHT - NOON)
    assert (await client.post("/api/v0/bundles/")).status == 200


async def test_a_second_invitation_is_refused_without_being_a_rate_limit(meet: Meet) -> None:
    _, client = await meet(limits=FREE)
    await client.post("/api/v0/team/invite/?email=user@example.com&role=r")
    await asyncio.sleep(300)
    again = await client.post("/api/v0/team/invite/?email=user@example.com&role=r")
    said = "Error: invitation already sent to user@example.com only 300 seconds ago."
    assert (again.status, again.json) == (429, {"msg": said})


@pytest.mark.parametrize("error", ["tfa_locked", "sms_rate_limited", "preauth_phone_cap", "twilio_rate_limited"])
async def test_two_factor_calls_can_be_made_to_fail(meet: Meet, error: str) -> None:
    fake, client = await meet(limits=FREE, tfa_error=error)
    refused = await client.post("/api/v0/tfa/")
    assert (refused.status, refused.json["error"]) == (429, error)
    assert ("locked_until" in refused.json) == (error == "tfa_locked")
    fake.behaviour = replace(fake.behaviour, tfa_error=None)
    assert (await client.post("/api/v0/tfa/")).status == 200


async def test_who_has_no_key_or_a_dead_one_is_told_so(meet: Meet) -> None:
    _, client = await meet(limits=FREE, invalid_keys=frozenset({"dead"}))
    assert (await client.get(USER, key="")).status == 401
    assert (await client.get(USER, key="dead")).json["msg"] == "Invalid user key"
    assert (await client.post("/api/v0/bundles/", key="")).status == 200
    assert (await client.get("/api/v0/nowhere/")).json["msg"]


# data


async def test_a_search_is_64_rows_of_a_realistic_size_in_gzip_under_the_exact_header(meet: Meet) -> None:
    _, client = await meet(limits=FREE)
    found = await client.post("/api/v0/bundles/")
    rows = found.json["offers"]
    assert (len(rows), len((await client.post("/api/v0/bundles/", {"limit": 3})).json["offers"])) == (64, 3)
    assert 80 <= len(rows[0]) <= 110
    assert 2000 <= len(json.dumps(rows[0])) <= 3200
    assert (found.headers["Content-Type"], found.headers["Content-Encoding"]) == ("application/json", "gzip")
    plain = await client.post("/api/v0/bundles/", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers
    assert plain.body == found.body


async def test_a_search_filters_and_sorts(meet: Meet) -> None:
    _, client = await meet(limits=FREE)
    query = {"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": "1"}, "order": [["dph_total", "asc"]]}
    rows = (await client.put("/api/v0/search/asks/", {"q": query})).json["offers"]
    assert {(row["gpu_name"], row["num_gpus"]) for row in rows} == {("RTX 4090", 1)}
    assert rows == sorted(rows, key=lambda row: row["dph_total"])


async def test_the_same_seed_makes_the_same_market(meet: Meet) -> None:
    answers = []
    for seed in (1, 1, 2):
        _, client = await meet(limits=FREE, seed=seed)
        answers.append((await client.post("/api/v0/bundles/")).body)
    assert answers[0] == answers[1] != answers[2]


async def test_an_offer_can_be_rented_once(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    offer = fake.offers[0]["id"]
    first = await client.put(f"/api/v0/asks/{offer}/", {"image": "x"})
    second = await client.put(f"/api/v0/asks/{offer}/", {"image": "x"}, key="another")
    assert set(first.json) == {"success", "new_contract", "instance_api_key"}
    assert (second.status, second.json["error"]) == (404, "no_such_ask")
    assert (fake.count("rented"), fake.count("rented", key="another")) == (1, 0)
    assert offer not in [row["id"] for row in (await client.post("/api/v0/bundles/", {"limit": 600})).json["offers"]]


async def test_an_instance_boots_stops_starts_and_goes(meet: Meet) -> None:
    fake, client = await meet(limits=FREE, boot_time=8)
    ident = (await client.put(f"/api/v0/asks/{fake.offers[0]['id']}/")).json["new_contract"]
    path = f"/api/v0/instances/{ident}/"
    seen = []
    for pause in (0, 4, 4):
        await asyncio.sleep(pause)
        seen.append((await client.get(path)).json["instances"]["actual_status"])
    await client.put(path, {"state": "stopped"})
    await client.put(path, {"label": "mine"})
    row = (await client.get(path)).json["instances"]
    assert seen == ["created", "loading", "running"]
    assert (row["actual_status"], row["label"]) == ("stopped", "mine")
    assert (await client.delete(path)).status == 200
    assert (await client.delete(path)).status == 404
    assert (await client.get(path)).json == {"instances": None}


@pytest.mark.parametrize("way", ["asc", "desc"])
async def test_instances_come_in_pages_of_25_at_most(meet: Meet, way: str) -> None:
    fake, client = await meet(limits=FREE)
    ids = [offer["id"] for offer in fake.offers[:60]]
    await client.post("/api/v0/asks/bulk/", {"ids": ids})
    order = json.dumps([{"col": "gpu_name", "dir": way}])
    pages: list[list[int]] = []
    token: str | None = ""
    while token is not None:
        page = (
            await client.get(
                "/api/v1/instances/", params={"order_by": order} | ({"after_token": token} if token else {})
            )
        ).json
        pages.append([row["id"] for row in page["instances"]])
        token = page["next_token"]
    assert [len(page) for page in pages] == [25, 25, 10]
    assert len({ident for page in pages for ident in page}) == 60
    bad = await client.get("/api/v1/instances/?after_token=nonsense")
    assert (bad.status, bad.json["error"]) == (400, "invalid_token")
    assert (await client.get("/api/v1/instances/?limit=26")).status == 400


async def test_the_old_list_can_be_retired(meet: Meet) -> None:
    _, client = await meet(legacy_instances=False)
    gone = await client.get("/api/v0/instances/")
    assert (gone.status, gone.body[:20]) == (410, b"Endpoint deprecated:")


# effects


async def test_every_effect_is_counted_with_the_call_that_had_it(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    await client.put("/api/v0/commands/transfer_credit/", {"recipient": "bob", "amount": 30})
    await client.put("/api/v0/commands/transfer_credit/", {"recipient": "bob", "amount": 500})
    await client.post("/api/v0/ssh/", {"ssh_key": "ssh-ed25519 A"})
    await client.post("/api/v0/team/", {"team_name": "t"})
    await client.get(USER)
    assert fake.counts() == {identity_of("k"): {"transferred": 1, "ssh+": 1, "POST /api/v0/team/": 1}}
    assert (fake.balance("k"), fake.effects[0].amount, fake.effects[0].call) == (70, 30, fake.log[0])
    await client.get(USER, key="friend")
    friend = fake.world.account(identity_of("friend"))
    await client.put("/api/v0/commands/transfer_credit/", {"recipient": str(friend.number), "amount": 20})
    assert (fake.balance("k"), fake.balance("friend")) == (50, 120)


async def test_bulk_changes_are_all_or_nothing(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    made = (await client.post("/api/v0/asks/bulk/", {"ids": [o["id"] for o in fake.offers[:3]] + [1]})).json
    assert (len(made["created"]), made["failed"]) == (3, [1])
    body = {"instance_ids": [*made["created"], 7]}
    assert (await client("DELETE", "/api/v0/instances/", body)).status == 404
    assert (await client("DELETE", "/api/v0/instances/", {"instance_ids": made["created"]})).status == 200
    assert fake.count("destroyed") == 3


async def test_a_refused_call_has_no_effect(meet: Meet) -> None:
    fake, client = await meet()
    first, second = (offer["id"] for offer in fake.offers[:2])
    assert [(await client.put(f"/api/v0/asks/{offer}/")).status for offer in (first, second)] == [200, 429]
    assert fake.count("rented", target=second) == 0
    assert [call.acted for call in fake.calls(ASK)] == [True, False]


# faults


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("kind", "done"), [("drop_before", 0), ("drop_after", 1), ("truncate", 1)])
async def test_a_broken_connection_tells_nothing_of_what_was_done(
    meet: Meet, kind: Any, done: int, reset: bool
) -> None:
    fake, client = await meet(limits=FREE)
    fake.faults.append(Fault(match=ASK, kind=kind, reset=reset))
    first, second = (offer["id"] for offer in fake.offers[:2])
    with pytest.raises(aiohttp.ClientError):
        await client.put(f"/api/v0/asks/{first}/")
    assert fake.count("rented", target=first) == done
    assert (await client.put(f"/api/v0/asks/{second}/")).status == 200
    assert len(fake.log) == 2


@pytest.mark.parametrize(("kind", "after_one_second"), [("slow", 1), ("slow_before", 0)])
async def test_a_slow_answer_comes_late_and_the_work_is_done_before_or_after(
    meet: Meet, kind: Any, after_one_second: int
) -> None:
    fake, client = await meet(limits=FREE)
    fake.faults.append(Fault(match=ASK, kind=kind, delay=30))
    start = asyncio.get_running_loop().time()
    call = asyncio.create_task(client.put(f"/api/v0/asks/{fake.offers[0]['id']}/"))
    await asyncio.sleep(1)
    assert fake.count("rented") == after_one_second
    assert (await call).status == 200
    assert asyncio.get_running_loop().time() - start == pytest.approx(30, abs=0.1)
    assert fake.count("rented") == 1


@pytest.mark.parametrize(("kind", "done"), [("status", 0), ("status_after", 1)])
async def test_a_status_of_choice_with_or_without_the_work(meet: Meet, kind: Any, done: int) -> None:
    fake, client = await meet(limits=FREE)
    fake.faults.append(Fault(match=ASK, kind=kind, status=503, body=b"<html>", headers=[("Retry-After", "3")]))
    answer = await client.put(f"/api/v0/asks/{fake.offers[0]['id']}/")
    assert (answer.status, answer.body, answer.headers["Retry-After"]) == (503, b"<html>", "3")
    assert fake.count("rented") == done


async def test_a_big_answer_has_the_size_it_promised(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    fake.faults.append(Fault(kind="big", size=3_000_001))
    answer = await client.get(USER)
    assert len(answer.body) == 3_000_001
    assert set(answer.json) == {"pad"}


async def test_a_refusal_can_be_forced_and_takes_no_token(meet: Meet) -> None:
    fake, client = await meet()
    fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=17))
    refused = await client.get(USER)
    assert (refused.status, refused.json["retry_after"], refused.headers["Retry-After"]) == (429, 17, "17")
    assert (await client.get(USER)).status == 200


async def test_faults_by_chance_are_the_same_for_the_same_seed(meet: Meet) -> None:
    runs = []
    for _ in range(2):
        fake, client = await meet(limits=FREE, seed=5)
        fake.faults.append(Fault(kind="status", probability=0.5, times=None))
        runs.append([(await client.get(USER)).status for _ in range(12)])
    assert runs[0] == runs[1]
    assert {200, 502} == set(runs[0])


# the wire


async def test_redirects_cookies_and_repeated_headers(meet: Meet) -> None:
    _, client = await meet(
        limits=FREE,
        redirects={"/api/v0/ssh/": (307, "https://elsewhere.example/")},
        set_cookie=("a=1", "b=2"),
        extra_headers=(("Link", "<1>"), ("Link", "<2>")),
    )
    answer = await client.get("/api/v0/ssh/")
    assert (answer.status, answer.headers["Location"]) == (307, "https://elsewhere.example/")
    assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert answer.headers.getall("Link") == ["<1>", "<2>"]


async def test_the_log_has_the_target_the_headers_and_the_body_as_they_were_sent(meet: Meet) -> None:
    fake, _ = await meet(limits=FREE)
    packed = gzip.compress(json.dumps({"api_key": "z"}).encode())
    reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
    writer.write(b"GET /api/v0/endptjobs/?q=%3A+%22&a=b//c HTTP/1.1\r\nHost: x\r\nX-Two: 1\r\nx-two: 2\r\n")
    writer.write(b"Content-Encoding: gzip\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    call = fake.log[0]
    assert answer.startswith(b"HTTP/1.1 200")
    assert call.target == "/api/v0/endptjobs/?q=%3A+%22&a=b//c"
    assert [pair for pair in call.headers if pair[0].lower() == "x-two"] == [("X-Two", "1"), ("x-two", "2")]
    assert (call.body, call.identity) == (packed, identity_of("z"))


async def test_a_large_body_is_welcome(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    await client("POST", "/api/v0/template/", data=io.BytesIO(b"x" * 5_000_000))
    assert len(fake.log[0].body) == 5_000_000


async def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    await client("POST", "/api/v0/ssh/", {"ssh_key": "A"}, expect100=True)
    assert fake.count("ssh+") == 1


async def test_an_idle_connection_is_closed(meet: Meet) -> None:
    fake, _ = await meet(keepalive_timeout=5)
    reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
    start = asyncio.get_running_loop().time()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert asyncio.get_running_loop().time() - start == pytest.approx(5, abs=0.1)


async def test_connections_are_numbered(meet: Meet) -> None:
    fake, client = await meet(limits=FREE)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.get(fake.url + USER, headers={"Authorization": "Bearer k"}) as response:
                await response.read()
    await client.get(USER)
    assert [call.connection for call in fake.log] == [1, 1, 2]
    assert repr(fake) == "<FakeVast 3 calls, 0 refused, 0 effects, 2 connections>"


@pytest.mark.parametrize("secure", [False, True])
async def test_a_slow_handshake_delays_what_is_read_from_a_new_connection_only(secure: bool) -> None:
    server = client = None
    if secure:
        authority = trustme.CA()
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(server)
        client = ssl.create_default_context()
        authority.configure_trust(client)
    fake = FakeVast(Behaviour(limits=FREE, handshake_delay=3))
    await fake.start(ssl_context=server)
    offer = fake.offers[0]["id"]
    start = asyncio.get_running_loop().time()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client or True)) as session:
        for _ in range(2):
            async with session.put(
                f"{fake.url}/api/v0/asks/{offer}/", json={}, headers={"Authorization": "Bearer k"}
            ) as response:
                await response.read()
    await fake.stop()
    assert [call.at - start for call in fake.log] == pytest.approx([3, 3], abs=0.1)
    assert (fake.accepted, fake.count("rented"), fake.url.partition(":")[0]) == (1, 1, "https" if secure else "http")


def test_by_hand_it_says_where_it_is_and_logs_no_keys() -> None:
    command = [sys.executable, fake_vast.__file__, "--port", "0", "--headers", "--account", "3:5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.partition("VAST_URL=")[2].split()[0]
        with urllib.request.urlopen(f"{url}{USER}?api_key=secret") as response:
            assert response.headers["X-RateLimit-Limit"] == "1.0"
        logged = process.stdout.readline()
        process.terminate()
    assert "200  GET /api/v0/users/current" in logged
    assert "secret" not in logged
