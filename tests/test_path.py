"""The whole path: real sockets, the real rules, the fake that keeps the limits it documents; virtual time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from conftest import Gateway, Start
from fake_vast import Behaviour, Fault, Form, Limit

pytestmark = pytest.mark.looptime

ASK = "PUT /api/v0/asks/{id}/"
BUNDLES = "POST /api/v0/bundles/"
FORMS: list[Form] = ["text", "text_threshold", "detail", "success_false", "json_retry_after"]
QUERY = {"verified": {"eq": True}, "rentable": {"eq": True}, "order": [["score", "desc"]], "type": "on-demand"}
UNLISTED = "/api/v0/nobody/knows/this/"


async def rent(gateway: Gateway, count: int, key: str = "k") -> list[Any]:
    paths = [gateway.offer(number) for number in range(count)]
    return await asyncio.gather(*(gateway.put(path, {"client_id": "me"}, key=key) for path in paths))


# --- Limits -----------------------------------------------------------------------------------------------------------


async def test_twenty_creates_at_once_all_succeed_and_none_meets_a_429(start: Start) -> None:
    gateway = await start(Behaviour(limits={ASK: Limit(4.5, 1, 12)}))
    began = gateway.now()
    answers = await rent(gateway, 20)
    assert [answer.status for answer in answers] == [200] * 20
    assert gateway.fake.refused == []
    assert gateway.fake.count("rented") == 20
    assert gateway.now() - began <= 19 * 4.5 * 1.02


@pytest.mark.parametrize("form", FORMS)
async def test_where_the_documented_interval_is_too_short_at_most_two_429s_are_met(start: Start, form: Form) -> None:
    gateway = await start(Behaviour(form=form, limits={ASK: Limit(5.5)}))
    began = gateway.now()
    answers = await rent(gateway, 20)
    assert [answer.status for answer in answers] == [200] * 20
    assert len(gateway.fake.refused) <= 2
    assert gateway.now() - began <= 19 * 5.5 * 1.15


@pytest.mark.parametrize("true_interval", [1.0, 1.7, 3.0, 7.5, 20.0])
@pytest.mark.parametrize("form", ["text", "json_retry_after"])
async def test_an_unlisted_endpoint_is_learned_from_its_refusals(
    start: Start, form: Form, true_interval: float
) -> None:
    gateway = await start(Behaviour(form=form, limits={"*": Limit(true_interval)}))
    began = gateway.now()
    answers = await asyncio.gather(*(gateway.get(f"{UNLISTED}?page={number}") for number in range(40)))
    assert {answer.status for answer in answers} == {404}
    assert len(gateway.fake.refused) <= 10
    assert gateway.now() - began <= 39 * true_interval * 1.5


async def test_gaps_between_sends_are_never_below_the_interval_and_start_with_no_burst(start: Start) -> None:
    gateway = await start()
    await asyncio.gather(*(gateway.get(f"/api/v0/instances/{n}/?owner=me") for n in range(12)))
    gaps = gateway.fake.gaps("GET /api/v0/instances/{id}/")
    assert len(gaps) == 11
    assert min(gaps) >= 2.0


async def test_a_bucket_that_allows_a_burst_gives_it_and_no_more(start: Start) -> None:
    gateway = await start(limits={"global": None})
    bodies = [QUERY | {"limit": number} for number in range(12)]
    await gateway.get("/api/v0/users/current")  # the account's window opens by and by
    await asyncio.gather(*(gateway.post("/api/v0/bundles/", body) for body in bodies))
    assert gateway.fake.refused == []
    at = [call.at for call in gateway.fake.calls(BUNDLES)]
    assert at[4] - at[0] < 1.0
    assert all(later - earlier >= 2.0 for earlier, later in pairwise(at[5:]))


async def test_the_ceiling_bounds_all_routes_together(start: Start) -> None:
    gateway = await start(limits={"global": {"rate": 1, "burst": 1}})
    await asyncio.gather(*(gateway.get(f"/api/v0/one-of-many-{name}/") for name in "abcdefghij"))
    gaps = gateway.fake.gaps()
    assert len(gaps) == 9
    assert min(gaps) >= 0.999


async def test_a_slow_handshake_does_not_shorten_the_gap_that_the_vendor_sees(start: Start) -> None:
    gateway = await start(Behaviour(handshake_delay=0.3, keepalive_timeout=0.5))
    answers = await asyncio.gather(*(gateway.get(f"/api/v0/instances/{n}/?owner=me") for n in range(5)))
    assert {answer.status for answer in answers} == {200}
    assert gateway.fake.refused == []
    assert min(gateway.fake.gaps("GET /api/v0/instances/{id}/")) >= 2.0
    assert gateway.fake.accepted == 5


@pytest.mark.parametrize("form", FORMS)
async def test_a_429_is_solved_here_whatever_its_form_and_the_method(start: Start, form: Form) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(kind="refuse429", times=3, form=form, retry_after=7))
    answer = await gateway.put(gateway.offer(), {"client_id": "me"})
    assert answer.status == 200
    assert 'attempts;desc="4"' in answer.headers["Server-Timing"]
    assert gateway.fake.count("rented") == 1


async def test_a_refusal_shuts_the_bucket_for_everybody_in_line(start: Start) -> None:
    gateway = await start()
    path = "/api/v0/instances/{}/?owner=me"
    await gateway.get(path.format(0))
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=30))
    await asyncio.gather(*(gateway.get(path.format(n)) for n in range(1, 6)))
    at = [call.at for call in gateway.fake.calls("GET /api/v0/instances/{id}/")]
    assert at[2] - at[1] >= 30
    assert min(b - a for a, b in pairwise(at[2:])) >= 2.0


async def test_after_a_refusal_the_request_goes_on_from_its_own_place(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=5))
    order: list[int] = []

    async def ask(number: int) -> None:
        await asyncio.sleep(number * 0.01)
        await gateway.get(f"/api/v0/instances/{number}/?owner=me")
        order.append(number)

    await asyncio.gather(*(ask(number) for number in range(5)))
    assert order == [0, 1, 2, 3, 4]


async def test_the_daily_quota_comes_through_as_the_vendor_sent_it(start: Start) -> None:
    gateway = await start(Behaviour(search_quota=1))
    await gateway.post("/api/v0/bundles/", QUERY)
    answer = await gateway.post("/api/v0/bundles/", QUERY | {"limit": 3})
    assert answer.status == 429
    assert answer.json["error"] == "search_quota_exceeded"
    assert int(answer.headers["X-RateLimit-Reset"]) % 86400 == 0
    assert len(gateway.fake.calls(BUNDLES)) == 2


async def test_invitations_and_2fa_are_never_tried_again(start: Start) -> None:
    gateway = await start(Behaviour(tfa_error="tfa_locked"))
    path = "/api/v0/team/invite/?email=a@example.com&role=member"
    await gateway.post(path)
    again = await gateway.post(path)
    assert again.status == 429
    assert "invitation already sent" in again.json["msg"]
    locked = await gateway.post("/api/v0/tfa/", {"code": "123456"})
    assert (locked.status, locked.json["error"]) == (429, "tfa_locked")
    gateway.fake.faults.append(Fault(match="POST /api/v0/tfa/", kind="refuse429", form="text"))
    plain = await gateway.post("/api/v0/tfa/", {"code": "123456"})
    assert (plain.status, plain.body) == (429, b"API requests too frequent")
    assert len(gateway.fake.calls("POST /api/v0/tfa/")) == 2


async def test_an_account_layer_is_found_and_kept(start: Start) -> None:
    gateway = await start(Behaviour(form="json_retry_after", account=Limit(2.0, 5, 4)), limits={"global": None})
    paths = ["ssh/", "volumes", "machines", "template/", "deployments", "charges/", "subaccounts", "clusters/"]
    answers = await asyncio.gather(*(gateway.get(f"/api/v0/{path}?n={n}") for n in range(3) for path in paths))
    assert {answer.status for answer in answers} == {200}
    assert len(gateway.fake.refused) <= 6
    shown = (await gateway.get("/_proxy/status")).json["limits"]
    account = next(limit for limit in shown if limit["route"] == "account")
    assert account["source"] == "learned"


async def test_an_address_layer_is_found_and_counted_for_all_keys_together(start: Start) -> None:
    gateway = await start(Behaviour(form="text_threshold", scope="ip"))
    paths = [f"/api/v0/instances/{n}/?owner=me" for n in range(12)]
    answers = await asyncio.gather(*(gateway.get(path, key=f"key{n}") for n, path in enumerate(paths)))
    assert {answer.status for answer in answers} == {200}
    assert len(gateway.fake.refused) <= 4  # those that were on their way with the first
    assert min(gateway.fake.gaps("GET /api/v0/instances/{id}/")[5:]) >= 2.0


async def test_a_wait_that_would_be_too_long_is_refused_at_once(start: Start) -> None:
    gateway = await start(queue={"max_wait": 10})
    began = gateway.now()
    answers = await rent(gateway, 6)
    refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) == 3
    assert {answer.json["error"] for answer in refused} == {"wait_too_long"}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 60 for answer in refused)
    assert {answer.headers["Content-Type"] for answer in refused} == {"application/json"}
    assert gateway.now() - began < 11


async def test_a_full_queue_refuses_at_once(start: Start) -> None:
    gateway = await start(queue={"max_waiting": 3})
    answers = await rent(gateway, 6)
    assert sorted(answer.status for answer in answers) == [200] * 4 + [429] * 2
    assert {answer.json["error"] for answer in answers if answer.status == 429} == {"queue_full"}


async def test_what_was_learned_and_what_is_owed_survive_a_restart(start: Start) -> None:
    first = await start(Behaviour(form="text_threshold", limits={ASK: Limit(6.0)}))
    await rent(first, 3)
    await first.app.stop(1.0)
    second = await start(fake=first.fake)
    refused = len(first.fake.refused)
    assert (await second.put(second.offer(), {"client_id": "me"})).status == 200
    await rent(second, 2)
    assert len(second.fake.refused) == refused
    assert min(second.fake.gaps(ASK)[-3:]) >= 6.0
    shown = (await second.get("/_proxy/status")).json["limits"]
    asks = next(limit for limit in shown if limit["route"] == ASK)
    assert (asks["source"], asks["interval"]) == ("learned", 6.0)


# --- Failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "truncate", "status"])
async def test_a_read_that_fails_is_sent_again(start: Start, kind: Any) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match="GET *", kind=kind, times=2, status=503))
    answer = await gateway.get("/api/v0/instances/")
    assert answer.status == 200
    assert len(gateway.fake.log) == 3


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "truncate", "status_after", "slow"])
async def test_a_spend_whose_answer_is_lost_is_sent_once_and_told_as_unknown(start: Start, kind: Any) -> None:
    gateway = await start(upstreams={"read_timeout": 20})
    gateway.fake.faults.append(Fault(match=ASK, kind=kind, status=502, delay=60))
    answer = await gateway.put(gateway.offer(), {"client_id": "me"})
    assert (answer.status, answer.json["error"]) == (500, "outcome_unknown")
    assert "vastai show instances" in answer.json["msg"]
    assert len(gateway.fake.calls(ASK)) == 1


async def test_a_bulk_creation_with_an_unknown_outcome_ends_the_clients_six_rounds(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match="POST /api/v0/asks/bulk/", kind="drop_after"))
    answer = await gateway.post("/api/v0/asks/bulk/", {"asks": []})
    assert (answer.status, answer.json["success"], answer.json["error"]) == (200, False, "outcome_unknown")


async def test_a_write_that_sets_a_state_is_sent_again(start: Start) -> None:
    gateway = await start()
    await rent(gateway, 1)
    ident = next(iter(gateway.fake.world.account(gateway.fake.effects[0].identity).instances))
    gateway.fake.faults.append(Fault(match="PUT /api/v0/instances/{id}/", kind="drop_after"))
    answer = await gateway.put(f"/api/v0/instances/{ident}/", {"state": "stopped"})
    assert answer.status == 200
    assert len(gateway.fake.calls("PUT /api/v0/instances/{id}/")) == 2


async def test_an_upstream_that_is_away_is_told_in_one_sentence_after_the_tries(start: Start) -> None:
    gateway = await start()
    await gateway.fake.stop()
    answer = await gateway.get("/api/v0/instances/")
    assert (answer.status, answer.json["error"]) == (503, "upstream_unreachable")
    assert int(answer.headers["Retry-After"]) > 60
    answer = await gateway.put(gateway.offer(), {"client_id": "me"})
    assert (answer.status, answer.json["error"]) == (503, "upstream_unreachable")


# --- Saving calls -----------------------------------------------------------------------------------------------------


async def test_a_hundred_equal_searches_at_once_are_one_call(start: Start) -> None:
    gateway = await start()
    answers = await asyncio.gather(*(gateway.post("/api/v0/bundles/", QUERY) for _ in range(100)))
    assert len(gateway.fake.calls(BUNDLES)) == 1
    assert len({answer.body for answer in answers}) == 1
    assert sum(answer.cache.startswith("fwd=miss; collapsed") for answer in answers) == 99


async def test_a_search_is_answered_from_the_cache_until_its_time_is_over(start: Start) -> None:
    gateway = await start()
    first = await gateway.post("/api/v0/bundles/", QUERY)
    assert first.cache == "fwd=miss; stored; ttl=60"
    await asyncio.sleep(41)
    second = await gateway.post("/api/v0/bundles/", QUERY)
    assert second.cache == "hit; ttl=19"
    assert second.headers["Age"] == "41"
    assert second.body == first.body
    assert second.headers["Content-Type"] == "application/json"
    await asyncio.sleep(20)
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache == "fwd=stale; stored; ttl=60"


async def test_equal_sees_through_key_order_encodings_slashes_and_spellings(start: Start) -> None:
    gateway = await start()
    await gateway.post("/api/v0/bundles/", QUERY)
    turned = dict(reversed(list(QUERY.items())))
    assert (await gateway.post("/api/v0/bundles", turned)).cache.startswith("hit")
    packed = json.dumps(turned, separators=(",", ":"))
    assert (await gateway.get("/api/v0/bundles/", params={"q": packed})).cache.startswith("hit")
    assert (await gateway.put("/api/v0/search/asks/", {"q": QUERY})).cache.startswith("fwd=miss")


async def test_identities_never_share_an_answer_however_the_key_is_given(start: Start) -> None:
    gateway = await start()
    path = "/api/v0/users/current"
    await gateway.get(path, key="one")
    assert (await gateway.get(path, key="two")).cache.startswith("fwd=miss")
    assert (await gateway.get(path, key="one", headers={"Cookie": "session=2"})).cache.startswith("fwd=miss")
    assert (await gateway.get(f"{path}?api_key=three", key="")).cache.startswith("fwd=miss")
    assert (await gateway.get(f"{path}?api%5Fkey=four", key="")).cache.startswith("fwd=miss")
    assert (await gateway.get(f"{path}?api_key=one", key="")).cache.startswith("hit")


async def test_a_read_after_a_write_never_shows_the_state_before_it(start: Start) -> None:
    gateway = await start()
    await rent(gateway, 1)
    path = "/api/v1/instances/"
    assert len((await gateway.get(path)).json["instances"]) == 1
    await rent(gateway, 1)
    assert len((await gateway.get(path)).json["instances"]) == 2


async def test_a_read_begun_before_a_write_is_not_what_a_later_read_gets(start: Start) -> None:
    gateway = await start(limits={"global": None})
    await rent(gateway, 1)
    path = "/api/v1/instances/"
    gateway.fake.faults.append(Fault(match=f"GET {path}", kind="slow", delay=20))
    slow = asyncio.ensure_future(gateway.get(path))
    await asyncio.sleep(1)
    await rent(gateway, 1)
    after = await gateway.get(path)
    assert len(after.json["instances"]) == 2
    assert len((await slow).json["instances"]) == 1
    assert len((await gateway.get(path)).json["instances"]) == 2


async def test_a_rental_ends_the_markets_epoch_and_a_label_does_not(start: Start) -> None:
    gateway = await start()
    await rent(gateway, 1)
    await gateway.post("/api/v0/bundles/", QUERY)
    ident = next(iter(gateway.fake.world.account(gateway.fake.effects[0].identity).instances))
    await gateway.put(f"/api/v0/instances/{ident}/", {"label": "mine"})
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("hit")
    await rent(gateway, 1)
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("fwd=")


async def test_an_offer_that_is_gone_ends_the_markets_epoch(start: Start) -> None:
    gateway = await start()
    await gateway.post("/api/v0/bundles/", QUERY)
    assert (await gateway.put("/api/v0/asks/1/", {"client_id": "me"})).status == 404
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("fwd=")


@pytest.mark.parametrize("fault", [Fault(kind="status", status=503, times=None), Fault(kind="drop_before", times=None)])
async def test_a_stale_answer_is_served_when_upstream_is_away(start: Start, fault: Fault) -> None:
    gateway = await start()
    first = await gateway.post("/api/v0/bundles/", QUERY)
    await rent(gateway, 1)  # one rental must not make every previous result useless
    gateway.fake.faults.append(fault)
    began = gateway.now()
    answer = await gateway.post("/api/v0/bundles/", QUERY)
    assert answer.status == 200
    assert answer.body == first.body
    assert "stale" in answer.cache
    assert gateway.now() - began <= 6


async def test_a_stale_answer_is_served_when_the_quota_is_spent(start: Start) -> None:
    gateway = await start(Behaviour(search_quota=1))
    first = await gateway.post("/api/v0/bundles/", QUERY)
    await asyncio.sleep(100)
    answer = await gateway.post("/api/v0/bundles/", QUERY)
    assert (answer.status, answer.body) == (200, first.body)
    assert answer.cache.startswith("fwd=stale; ttl=-40")


async def test_a_short_wait_is_preferred_to_a_stale_answer_and_that_to_a_long_one(start: Start) -> None:
    gateway = await start()
    await gateway.post("/api/v0/bundles/", QUERY)
    await asyncio.sleep(70)
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=3))
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("fwd=stale; stored")
    await asyncio.sleep(70)
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=30))
    began = gateway.now()
    assert "detail=stale" in (await gateway.post("/api/v0/bundles/", QUERY)).cache
    assert gateway.now() - began <= 5


async def test_the_leader_leaving_does_not_hurt_the_followers(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=BUNDLES, kind="slow", delay=10))
    leader = asyncio.ensure_future(gateway.post("/api/v0/bundles/", QUERY))
    await asyncio.sleep(1)
    follower = asyncio.ensure_future(gateway.post("/api/v0/bundles/", QUERY))
    await asyncio.sleep(1)
    leader.cancel()
    assert (await follower).status == 200
    assert len(gateway.fake.calls(BUNDLES)) == 1


async def test_a_slow_search_under_an_impatient_client_is_finished_and_stored(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=BUNDLES, kind="slow", delay=10))
    asking = asyncio.ensure_future(gateway.post("/api/v0/bundles/", QUERY))
    await asyncio.sleep(1)
    asking.cancel()
    await asyncio.sleep(15)
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("hit")
    assert len(gateway.fake.calls(BUNDLES)) == 1


async def test_a_waiting_call_is_given_up_when_the_last_one_leaves(start: Start) -> None:
    gateway = await start()
    await gateway.get("/api/v0/instances/1/?owner=me")
    asking = asyncio.ensure_future(gateway.get("/api/v0/instances/2/?owner=me"))
    await asyncio.sleep(0.5)
    asking.cancel()
    await asyncio.sleep(5)
    assert len(gateway.fake.log) == 1
    assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")
    assert len(gateway.app.pipeline.flights) == 0


async def test_cache_control_of_the_request_is_honoured(start: Start) -> None:
    gateway = await start()
    missing = await gateway.post("/api/v0/bundles/", QUERY, headers={"Cache-Control": "only-if-cached"})
    assert (missing.status, missing.json["error"]) == (504, "not_cached")
    await gateway.post("/api/v0/bundles/", QUERY, headers={"Cache-Control": "no-store"})
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache.startswith("fwd=miss")
    await asyncio.sleep(20)
    older = await gateway.post("/api/v0/bundles/", QUERY, headers={"Cache-Control": "max-age=10"})
    assert older.cache.startswith("fwd=")
    fresh = await gateway.post("/api/v0/bundles/", QUERY, headers={"Cache-Control": "no-cache"})
    assert fresh.cache.startswith("fwd=")
    assert (await gateway.post("/api/v0/bundles/", QUERY)).cache == "hit; ttl=60"


async def test_an_empty_list_of_instances_is_not_stored(start: Start) -> None:
    gateway = await start()
    await gateway.get("/api/v1/instances/")
    assert (await gateway.get("/api/v1/instances/")).cache.startswith("fwd=")
    assert len(gateway.fake.log) == 2


# --- Waiting clients --------------------------------------------------------------------------------------------------


async def test_a_client_that_takes_no_heartbeat_is_told_to_come_back_in_time(start: Start) -> None:
    gateway = await start(queue={"max_wait_plain": 10})
    paths = [gateway.offer(number) for number in range(5)]
    headers = {"User-Agent": "unknown/1"}
    answers = await asyncio.gather(*(gateway.put(path, {}, headers=headers) for path in paths))
    late = [answer for answer in answers if answer.status == 429]
    assert len(late) == 2
    assert {answer.json["error"] for answer in late} == {"still_queued"}
    assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")


async def test_heartbeats_keep_a_known_client_on_the_line(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match="GET *", kind="slow", delay=300))
    host, port = gateway.app.address.host, gateway.app.address.port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        b"GET /api/v0/ssh/ HTTP/1.1\r\nHost: x\r\nUser-Agent: vastai-cli/1.9.1\r\nAuthorization: Bearer k\r\n\r\n"
    )
    interim = await reader.readuntil(b"\r\n\r\n")
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.close()


async def test_who_ran_out_of_patience_goes_on_from_its_old_place(start: Start) -> None:
    gateway = await start(queue={"max_wait_plain": 10})
    headers = {"User-Agent": "unknown/1"}
    paths = [gateway.offer(number) for number in range(8)]
    early = [asyncio.ensure_future(gateway.put(path, {}, headers=headers)) for path in paths[:4]]
    await asyncio.sleep(1)
    late = [asyncio.ensure_future(gateway.put(path, {})) for path in paths[4:]]
    told = await early[3]
    assert (told.status, told.json["error"], told.headers["Retry-After"]) == (429, "still_queued", "1")
    assert float(told.headers["Server-Timing"].split(";dur=")[1].split(",")[0]) == pytest.approx(10_000, abs=100)
    assert (await gateway.put(paths[3], {}, headers=headers)).status == 200
    assert not any(task.done() for task in late)
    await asyncio.gather(*late)
    order = [call.target for call in gateway.fake.calls(ASK)]
    assert order == paths


async def test_a_client_at_whose_expense_it_was_sent_is_not_told_to_come_back(start: Start) -> None:
    gateway = await start(queue={"max_wait_plain": 2})
    gateway.fake.faults.append(Fault(match=ASK, kind="slow", delay=7))
    answer = await gateway.put(gateway.offer(), {}, headers={"User-Agent": "unknown/1"})
    assert answer.status == 200
    assert gateway.fake.count("rented") == 1


async def test_followers_are_not_told_to_come_back_while_their_call_is_at_upstream(start: Start) -> None:
    gateway = await start(queue={"max_wait_plain": 2})
    gateway.fake.faults.append(Fault(match=BUNDLES, kind="slow", delay=7))
    headers = {"User-Agent": "unknown/1"}
    answers = await asyncio.gather(*(gateway.post("/api/v0/bundles/", QUERY, headers=headers) for _ in range(3)))
    assert [answer.status for answer in answers] == [200] * 3


# --- What a review found ----------------------------------------------------------------------------------------------


async def test_one_refusal_after_a_long_pause_does_not_slow_every_route_of_the_key(start: Start) -> None:
    gateway = await start()
    await gateway.post("/api/v0/bundles/", QUERY)
    await asyncio.sleep(60)
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=10))
    await gateway.post("/api/v0/bundles/", QUERY | {"limit": 2})
    began = gateway.now()
    paths = ["ssh/", "template/", "users/current", "volumes", "machines"]
    await asyncio.gather(*(gateway.get(f"/api/v0/{path}") for path in paths))
    assert gateway.now() - began < 3


async def test_a_create_that_is_refused_after_its_client_left_is_given_up(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=ASK, kind="refuse429", delay=5))
    asking = asyncio.ensure_future(gateway.put(gateway.offer(), {}))
    await asyncio.sleep(1)
    asking.cancel()
    await asyncio.sleep(100)
    assert gateway.fake.count("rented") == 0
    assert len(gateway.fake.calls(ASK)) == 1
    assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")


async def test_a_spend_that_was_redirected_to_nowhere_is_not_sent_again(start: Start) -> None:
    gateway = await start()
    path = gateway.offer()
    gateway.fake.faults.append(
        Fault(match=ASK, kind="status_after", status=307, headers=[("Location", f"{gateway.fake.url}/gone/")])
    )
    gateway.fake.faults.append(Fault(match="PUT *", kind="drop_before"))
    answer = await gateway.put(path, {})
    assert (answer.status, answer.json["error"]) == (500, "outcome_unknown")
    assert len(gateway.fake.calls(ASK)) == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_failure_with_an_endless_body_keeps_no_slot(start: Start, status: int) -> None:
    gateway = await start()
    body = b"x" * 3_000_000
    gateway.fake.faults.append(Fault(match="GET *", kind="status", status=status, body=body, times=2))
    assert (await gateway.get("/api/v0/ssh/")).status == 200
    assert repr(gateway.app.admission).startswith("<Admission 0 waiting, 0 in flight")


async def test_a_destroy_whose_answer_was_lost_ends_the_epoch_though_its_repetition_is_a_404(start: Start) -> None:
    gateway = await start(families={"instances": {"ttl": 300}})
    await rent(gateway, 2)
    listed = (await gateway.get("/api/v1/instances/")).json["instances"]
    gateway.fake.faults.append(Fault(match="DELETE *", kind="drop_after"))
    assert (await gateway.delete(f"/api/v0/instances/{listed[0]['id']}/")).status == 404
    left = (await gateway.get("/api/v1/instances/")).json["instances"]
    assert [row["id"] for row in left] == [listed[1]["id"]]


async def test_ones_own_line_is_no_reason_for_an_answer_from_before_ones_own_rental(start: Start) -> None:
    gateway = await start()
    for number in range(10):
        found = await gateway.post("/api/v0/bundles/", QUERY | {"limit": 50 + number})
    rented = found.json["offers"][0]["id"]
    assert (await gateway.put(f"/api/v0/asks/{rented}/", {})).status == 200
    searches = [gateway.post("/api/v0/bundles/", QUERY | {"limit": 50 + number}) for number in range(10)]
    for answer in await asyncio.gather(*searches):
        assert rented not in {row["id"] for row in answer.json["offers"]}


async def test_a_stale_answer_that_a_write_has_voided_meanwhile_is_not_served(start: Start) -> None:
    gateway = await start(families={"ssh_keys": {"ttl": 1, "stale_for": 900}})
    await gateway.get("/api/v0/ssh/")
    await asyncio.sleep(10)
    gateway.fake.faults.append(Fault(match="GET *", kind="status", status=503, times=None))
    asking = asyncio.ensure_future(gateway.get("/api/v0/ssh/"))
    await asyncio.sleep(1)
    assert (await gateway.post("/api/v0/ssh/", {"ssh_key": "ssh-ed25519 AAAA"})).status == 200
    assert (await asking).status == 503


async def test_a_refusal_is_no_miss(start: Start) -> None:
    gateway = await start(queue={"max_wait": 1})
    answers = await rent(gateway, 2)
    assert answers[1].cache == "detail=wait_too_long"


def reloaded(gateway: Gateway, **sections: Any) -> None:
    """The same settings but for some, put in force at once."""
    old = gateway.app.settings
    gateway.app.reload(
        replace(old, **{name: replace(getattr(old, name), **values) for name, values in sections.items()})
    )


async def test_a_reload_reaches_those_who_wait(start: Start) -> None:
    gateway = await start(limits={"scale": 100})
    asking = [asyncio.ensure_future(gateway.get(f"/api/v0/instances/{n}/?owner=me")) for n in range(4)]
    await asyncio.sleep(1)
    began = gateway.now()
    reloaded(gateway, limits={"scale": 1.0})
    await asyncio.gather(*asking)
    assert gateway.now() - began < 210  # the first gap was owed already
    assert min(gateway.fake.gaps()[1:]) == pytest.approx(2.02, abs=0.01)


async def test_a_reload_that_changes_the_scope_goes_on_pacing(start: Start) -> None:
    gateway = await start()
    path = "/api/v0/instances/{}/?owner=me"
    await asyncio.gather(*(gateway.get(path.format(n)) for n in range(3)))
    reloaded(gateway, limits={"scope": "ip"})
    await asyncio.gather(*(gateway.get(path.format(n), key=f"key{n}") for n in range(10, 15)))
    assert gateway.fake.refused == []
    assert min(gateway.fake.gaps()) >= 2.0


async def test_another_upstream_is_not_answered_for_by_what_the_old_one_said(start: Start) -> None:
    gateway = await start()
    await gateway.post("/api/v0/bundles/", QUERY)
    reloaded(gateway, upstreams={"api": "http://127.0.0.1:9"}, retry={"max_attempts": 1})
    assert (await gateway.post("/api/v0/bundles/", QUERY)).status == 503


async def test_a_spend_in_flight_outlives_a_reload_of_the_upstream(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=ASK, kind="slow", delay=60))
    asking = asyncio.ensure_future(gateway.put(gateway.offer(), {}))
    await asyncio.sleep(1)
    reloaded(gateway, upstreams={"read_timeout": 5.0})
    assert (await asking).status == 200


async def test_one_who_comes_back_to_its_place_is_not_turned_away_by_a_full_line(start: Start) -> None:
    gateway = await start(queue={"max_waiting": 2})
    gateway.fake.faults.append(Fault(match=ASK, kind="refuse429", form="json_retry_after", retry_after=5))
    answers = await rent(gateway, 3)
    assert [answer.status for answer in answers] == [200] * 3


async def test_stopping_tells_those_who_wait_and_finishes_what_is_at_upstream(start: Start) -> None:
    gateway = await start()
    gateway.fake.faults.append(Fault(match=ASK, kind="slow", delay=3))
    asking = [asyncio.ensure_future(gateway.put(gateway.offer(number), {})) for number in range(4)]
    await asyncio.sleep(1)
    await gateway.app.stop(30.0)
    answers = [await task for task in asking]
    assert [answer.status for answer in answers] == [200, 503, 503, 503]
    assert {answer.json.get("error") for answer in answers[1:]} == {"restarting"}


async def test_a_token_in_a_path_that_nobody_listed_is_not_shown(start: Start) -> None:
    gateway = await start()
    await gateway.get("/api/v0/team/join/s3cretTok_en-XYZ")
    assert b"s3cret" not in (await gateway.get("/_proxy/status")).body


@pytest.mark.parametrize("form", ["text_threshold", "detail"])
async def test_a_debt_that_somebody_else_made_with_the_same_key_is_waited_out(start: Start, form: Form) -> None:
    gateway = await start(Behaviour(form=form, limits={ASK: Limit(4.5, 1, 12)}))
    for number in range(6):  # past the proxy: one is done, five are refused and charged for
        url = f"{gateway.fake.url}{gateway.offer(40 + number)}"
        async with gateway.session.put(url, json={}, headers={"Authorization": "Bearer k"}) as answer:
            await answer.read()
    ours = len(gateway.fake.refused)
    assert [answer.status for answer in await rent(gateway, 4)] == [200] * 4
    assert len(gateway.fake.refused) - ours <= 6


async def test_followers_whose_leaders_time_is_over_go_on_together(start: Start) -> None:
    gateway = await start(queue={"max_wait": 60})
    await gateway.get("/api/v0/ssh/?a=1")
    gateway.fake.faults.append(Fault(kind="refuse429", form="json_retry_after", retry_after=50))
    shutting = asyncio.ensure_future(gateway.get("/api/v0/ssh/?a=2"))
    await asyncio.sleep(2)
    leader = asyncio.ensure_future(gateway.get("/api/v0/ssh/?a=3"))
    await asyncio.sleep(30)
    followers = [asyncio.ensure_future(gateway.get("/api/v0/ssh/?a=3")) for _ in range(20)]
    await asyncio.sleep(1)
    line = next(line for line in gateway.app.admission._queues.values() if len(line))
    line.account.bucket.shut(gateway.now() + 40)
    assert (await leader).status == 429
    assert {answer.status for answer in await asyncio.gather(*followers)} == {200}
    assert [call.target for call in gateway.fake.log].count("/api/v0/ssh/?a=3") == 1
    await shutting


async def test_a_read_whose_stale_answer_was_voided_waits_as_long_as_any_other(start: Start) -> None:
    gateway = await start(families={"ssh_keys": {"ttl": 1, "stale_for": 900}})
    await gateway.get("/api/v0/ssh/")
    await asyncio.sleep(10)
    gateway.fake.faults.append(Fault(match="GET *", kind="refuse429", form="json_retry_after", retry_after=20, delay=2))
    asking = asyncio.ensure_future(gateway.get("/api/v0/ssh/"))
    await asyncio.sleep(1)
    assert (await gateway.post("/api/v0/ssh/", {"ssh_key": "ssh-ed25519 AAAA"})).status == 200
    assert len((await asking).json) == 1


async def test_max_stale_takes_an_answer_past_its_time_but_not_past_its_life(start: Start) -> None:
    gateway = await start(families={"ssh_keys": {"ttl": 30, "stale_for": 100}})
    headers = {"Cache-Control": "max-stale=100000"}
    await gateway.get("/api/v0/ssh/")
    await asyncio.sleep(100)
    assert (await gateway.get("/api/v0/ssh/", headers=headers)).cache == "hit; ttl=-70"
    await asyncio.sleep(40)
    assert (await gateway.get("/api/v0/ssh/", headers=headers)).cache.startswith("fwd=")


async def test_another_name_of_the_same_server_is_not_called_twice_as_fast(start: Start) -> None:
    gateway = await start(Behaviour(form="text"))
    path = "/api/v0/instances/{}/?owner=me"
    asking = [asyncio.ensure_future(gateway.get(path.format(n))) for n in range(5)]
    await asyncio.sleep(1)
    reloaded(gateway, upstreams={"api": gateway.fake.url.replace("127.0.0.1", "127.0.0.1.")})
    reloaded(gateway, upstreams={"api": gateway.fake.url})
    asking += [asyncio.ensure_future(gateway.get(path.format(n))) for n in range(5, 10)]
    await asyncio.gather(*asking)
    assert gateway.fake.refused == []


async def test_clients_who_come_and_go_do_not_make_the_line_look_longer_for_others(start: Start) -> None:
    gateway = await start(upstreams={"max_connections": 1})
    gateway.fake.faults.append(Fault(match="GET *", kind="slow", delay=50))
    hanging = asyncio.ensure_future(gateway.get("/api/v0/ssh/"))
    await asyncio.sleep(1)
    patient = asyncio.ensure_future(gateway.get("/api/v0/volumes", key="patient"))
    for number in range(300):
        passing = asyncio.ensure_future(gateway.get(f"/api/v0/machines?n={number}", key="other"))
        await asyncio.sleep(0.05)
        passing.cancel()
    await asyncio.sleep(0.1)
    route = gateway.app.settings.routes.match("GET", "/api/v0/template/")
    assert gateway.app.admission.expected(route, "third") < 5
    assert len(gateway.app.admission.origins["api"]._ranks) < 100
    assert {(await hanging).status, (await patient).status} == {200}


# --- Reads that wait while writes are done ----------------------------------------------------------------------------


async def test_equal_reads_that_wait_are_one_call_whatever_is_written_meanwhile(start: Start) -> None:
    gateway = await start(Behaviour(), limits={"global": None})
    instances = "/api/v0/instances/"
    await gateway.get(instances)
    polls: list[asyncio.Task[Any]] = []
    for number in range(3):
        polls += [asyncio.create_task(gateway.get(instances)) for _ in range(5)]
        rented = await gateway.put(gateway.offer(number), {"client_id": "me", "image": "x", "disk": 10})
        assert rented.status == 200
    polls.append(asyncio.create_task(gateway.get(instances)))
    answers = await asyncio.gather(*polls)
    assert len(gateway.fake.calls("GET /api/v0/instances/")) == 2
    for answer in answers:
        assert len(answer.json["instances"]) == 3, "read after all that had been written when it was sent"


async def test_a_read_that_was_sent_before_a_write_is_not_for_those_who_ask_after_it(start: Start) -> None:
    gateway = await start(fast=True)
    instances = "/api/v0/instances/"
    gateway.fake.faults.append(Fault(match="GET *", kind="slow", delay=20.0))
    before = asyncio.create_task(gateway.get(instances))
    await asyncio.sleep(1.0)
    assert (await gateway.put(gateway.offer(), {"client_id": "me", "image": "x", "disk": 10})).status == 200
    after = await gateway.get(instances)
    assert len(after.json["instances"]) == 1
    assert (await before).json["instances"] == []
    assert len(gateway.fake.calls("GET /api/v0/instances/")) == 2
