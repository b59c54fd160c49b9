"""When upstream counts as away, who may then ask it, and how many tries all have together."""

from __future__ import annotations

import random

import pytest

from proxy.policy.breaking import BUDGET, Breaker, BreakerRules, Pass
from proxy.policy.errors import Refusal, UpstreamError
from proxy.policy.messages import Response

RULES = BreakerRules(failures=5, probe_initial=1.0, probe_max=30.0)
OK, GONE = Response(200, ()), Response(503, ())
REFUSED = UpstreamError("no connection (Connection refused)", sent=False)
LOST = UpstreamError("the connection was closed without an answer", sent=True)
A, B, C = "GET /a/", "GET /b/", "GET /c/"


def passed(breaker: Breaker, route: str, now: float) -> Pass:
    leave = breaker.enter(route, now)
    assert isinstance(leave, Pass)
    return leave


def call(breaker: Breaker, route: str, now: float, outcome: Response | UpstreamError) -> None:
    failed = isinstance(outcome, UpstreamError) or outcome.status == 503
    breaker.answered(passed(breaker, route, now), outcome, failed, now)


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
        assert breaker.check(A, 0.0) is None
        call(breaker, A, 0.0, outcome)
    told = breaker.check(A, 0.0)
    assert isinstance(told, Refusal)
    assert (told.status, told.code, told.retry_after) == (503, "upstream_unreachable", 1.0)
    assert "5 times in a row" in told.msg


@pytest.mark.parametrize(
    ("breaker", "gone"),
    [
        (away(A, GONE), [A]),
        (away(A, LOST), [A]),
        (away(A, REFUSED), ["*", A]),
        (away(A, GONE, B), ["*"]),
        (away(A, LOST, B, C), ["*"]),
    ],
)
def test_one_route_that_fails_alone_takes_no_other_with_it(breaker: Breaker, gone: list[str]) -> None:
    assert breaker.away == gone
    assert (breaker.check("GET /other/", 0.0) is None) is ("*" not in gone)


def test_probes_go_one_at_a_time_and_less_and_less_often() -> None:
    breaker, sent = away(A, REFUSED), []
    for tenth in range(6000):
        now = tenth / 10
        for _ in range(3):
            leave = breaker.enter(A, now)
            if isinstance(leave, Pass):
                sent.append(now)
                assert isinstance(breaker.enter(A, now), Refusal)  # while it is on its way
                breaker.answered(leave, REFUSED, True, now)
    assert sent[:7] == pytest.approx([1, 3, 7, 15, 31, 61, 91], abs=0.2)
    assert len(sent) == 23


def test_the_first_answer_ends_it_for_everybody() -> None:
    breaker = away(A, REFUSED)
    leave = passed(breaker, B, 1.0)
    assert isinstance(breaker.enter(A, 1.0), Refusal)
    breaker.answered(leave, Response(429, ()), False, 1.5)
    assert isinstance(breaker.enter(B, 1.5), Pass)


def test_a_probe_that_was_not_sent_makes_room_for_another() -> None:
    breaker = away(A, REFUSED)
    leave = passed(breaker, A, 1.0)
    assert isinstance(breaker.enter(A, 1.1), Refusal)
    breaker.given_back(leave, 1.2)
    assert isinstance(breaker.enter(A, 1.2), Pass)


def test_a_probe_without_an_answer_is_not_waited_for_for_ever() -> None:
    breaker = away(A, REFUSED)
    passed(breaker, A, 1.0)
    assert isinstance(breaker.enter(A, 30.9), Refusal)
    assert isinstance(breaker.enter(A, 31.0), Pass)


def test_calls_from_before_neither_count_as_probes_nor_delay_the_next() -> None:
    breaker = Breaker(RULES)
    under_way = [passed(breaker, A, 0.0) for _ in range(50)]
    for leave in under_way:
        breaker.answered(leave, REFUSED, True, 0.5)
    assert isinstance(breaker.enter(A, 1.5), Pass)


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
