"""When upstream counts as away, who may then ask it, and how many tries all have together."""

from __future__ import annotations

import random

import pytest

from proxy.policy.breaking import BUDGET, Breaker, BreakerRules, Call, Pass
from proxy.policy.errors import Refusal, UpstreamError
from proxy.policy.messages import Response

RULES = BreakerRules(failures=5, probe_initial=1.0, probe_max=30.0)
OK, GONE = Response(200, ()), Response(503, ())
REFUSED = UpstreamError("no connection (Connection refused)", sent=False)
LOST = UpstreamError("the connection was closed without an answer", sent=True)
A, B, C = "GET /a/", "GET /b/", "GET /c/"


def passed(breaker: Breaker, route: str, now: float, who: str = "me") -> Pass:
    leave = breaker.enter(Call(route, who), now)
    assert isinstance(leave, Pass)
    return leave


def call(breaker: Breaker, route: str, now: float, outcome: Response | UpstreamError, who: str = "me") -> None:
    failed = isinstance(outcome, UpstreamError) or outcome.status == 503
    breaker.answered(passed(breaker, route, now, who), outcome, failed, now)


def away(route: str, outcome: Response | UpstreamError, *others: str) -> Breaker:
    breaker = Breaker(RULES)
    for name in (*others, *[route] * (5 - len(others))):
        call(breaker, name, 0.0, outcome)
    return breaker


@pytest.mark.parametrize("outcome", [GONE, REFUSED, LOST])
def test_failures_in_a_row_end_it_and_any_answer_begins_it_anew(outcome: Response | UpstreamError) -> None:
    breaker = Breaker(RULES)
    for _ in range(3):
        for _ in range(4):
            call(breaker, A, 0.0, outcome)
        call(breaker, A, 0.0, OK)
    for _ in range(5):
        assert breaker.check(Call(A, "me"), 0.0) is None
        call(breaker, A, 0.0, outcome)
    told = breaker.check(Call(A, "me"), 0.0)
    assert isinstance(told, Refusal)
    assert (told.status, told.code, told.retry_after) == (503, "upstream_unreachable", 1.0)
    assert "5 times in a row" in told.msg


@pytest.mark.parametrize(
    ("breaker", "gone"),
    [
        (away(A, GONE), [A]),
        (away(A, LOST), [A]),
        (away(A, REFUSED), ["*", A]),
        (away(A, GONE, B, B, C), ["*"]),
        (away(A, LOST, B, C, "GET /d/"), ["*"]),
        (away(A, GONE, B), []),
    ],
)
def test_one_route_that_fails_alone_takes_no_other_with_it(breaker: Breaker, gone: list[str]) -> None:
    assert breaker.away == gone
    unreachable = A in gone and "*" in gone
    assert (breaker.check(Call("GET /other/", "me"), 0.0) is None) is not unreachable


def test_probes_go_one_at_a_time_and_less_and_less_often() -> None:
    breaker, sent = away(A, REFUSED), []
    for tenth in range(6000):
        now = tenth / 10
        for _ in range(3):
            leave = breaker.enter(Call(A, "me"), now)
            if isinstance(leave, Pass):
                sent.append(now)
                assert isinstance(breaker.enter(Call(A, "me"), now), Refusal)  # while it is on its way
                breaker.answered(leave, REFUSED, True, now)
    assert sent[:7] == pytest.approx([1, 3, 7, 15, 31, 61, 91], abs=0.2)
    assert len(sent) == 23


def test_the_first_answer_ends_it_for_everybody() -> None:
    breaker = away(A, REFUSED)
    leave = passed(breaker, B, 1.0)
    assert isinstance(breaker.enter(Call(A, "me"), 1.0), Refusal)
    breaker.answered(leave, Response(429, ()), False, 1.5)
    assert isinstance(breaker.enter(Call(B, "me"), 1.5), Pass)


def test_a_probe_that_was_not_sent_makes_room_for_another() -> None:
    breaker = away(A, REFUSED)
    leave = passed(breaker, A, 1.0)
    assert isinstance(breaker.enter(Call(A, "me"), 1.1), Refusal)
    breaker.given_back(leave, 1.2)
    assert isinstance(breaker.enter(Call(A, "me"), 1.2), Pass)


def test_a_probe_without_an_answer_is_not_waited_for_for_ever() -> None:
    breaker = away(A, REFUSED)
    passed(breaker, A, 1.0)
    assert isinstance(breaker.enter(Call(A, "me"), 5.9), Refusal)
    assert isinstance(breaker.enter(Call(A, "me"), 6.0), Pass)


def test_calls_from_before_neither_count_as_probes_nor_delay_the_next() -> None:
    breaker = Breaker(RULES)
    under_way = [passed(breaker, A, 0.0) for _ in range(50)]
    for leave in under_way:
        breaker.answered(leave, REFUSED, True, 0.5)
    assert isinstance(breaker.enter(Call(A, "me"), 1.5), Pass)


def test_all_share_one_budget_of_tries() -> None:
    breaker = Breaker(RULES)
    assert sum(breaker.may_retry(0.0) for _ in range(100)) == BUDGET
    assert [breaker.may_retry(now) for now in (4.0, 5.1, 5.2)] == [False, True, False]
    for _ in range(5):
        call(breaker, A, 5.2, OK)
    assert breaker.may_retry(5.2)
    assert sum(breaker.may_retry(10_000.0) for _ in range(100)) == BUDGET


def test_routes_that_nobody_asks_for_twice_do_not_pile_up() -> None:
    breaker, chance = Breaker(BreakerRules(failures=10**9)), random.Random(1)
    for number in range(5000):
        call(breaker, f"GET /{number}/{chance.random()}/", float(number), GONE)
    assert len(breaker._routes) <= 1000


def test_one_caller_s_failures_do_not_keep_the_others_out() -> None:
    breaker = Breaker(RULES)
    for route in (A, A, B, B, C):
        call(breaker, route, 0.0, LOST, "banned")
    assert breaker.away == ["*"]
    assert isinstance(breaker.enter(Call(A, "banned"), 0.5), Refusal)
    assert isinstance(breaker.enter(Call(A, "other"), 0.5), Pass)


def test_a_route_that_is_known_to_be_away_does_not_take_the_rest_with_it() -> None:
    breaker = Breaker(RULES)
    now = 0.0
    for _ in range(600):
        now += 1.0
        if breaker.check(Call(A, "poller"), now) is None:
            call(breaker, A, now, GONE, "poller")
    call(breaker, B, now, GONE, "poller")
    assert breaker.away == [A]
    assert isinstance(breaker.enter(Call(B, "poller"), now), Pass)


def test_who_has_not_failed_yet_is_tried_once_each() -> None:
    breaker = Breaker(RULES)
    for route in (A, A, B, B, C):
        call(breaker, route, 0.0, GONE, "first")
    sent = 0
    for caller in range(20):
        for route in (A, B, C, "GET /d/"):
            if isinstance(leave := breaker.enter(Call(route, f"caller-{caller}"), 0.5), Pass):
                breaker.answered(leave, GONE, True, 0.5)
                sent += 1
    assert sent <= 20 + 4


def test_what_must_not_be_lost_waits_for_others_to_find_out() -> None:
    breaker = Breaker(RULES)
    create = Call(A, "me", careful=True)
    for _ in range(2):
        leave = breaker.enter(create, 0.0)
        assert isinstance(leave, Pass)
        breaker.answered(leave, GONE, True, 0.0)
    assert isinstance(breaker.enter(create, 1.9), Refusal)
    assert isinstance(breaker.enter(Call(A, "me"), 0.1), Pass)
    assert isinstance(breaker.enter(create, 2.0), Pass)
