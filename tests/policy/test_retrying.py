"""Again or not, and what is told in the end: one table, effect by outcome."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.errors import Refusal, UpstreamError
from proxy.policy.messages import Response
from proxy.policy.retrying import RetryRules, backoff, failed, may_send_again, verdict
from proxy.policy.routing import Route, Routes

ROUTES = Routes.build(
    [
        {
            "families": {},
            "routes": [
                {"route": "GET /read/", "effect": "read"},
                {"route": "POST /search/", "effect": "search"},
                {"route": "PUT /write/", "effect": "write"},
                {"route": "PUT /spend/", "effect": "spend", "check": "vastai show instances"},
                {"route": "POST /api/v0/asks/bulk/", "effect": "spend"},
                {"route": "GET /auth/", "effect": "auth"},
                {"route": "POST /auth/", "effect": "auth"},
            ],
        }
    ]
)


def route(line: str) -> Route:
    return ROUTES.match(*line.split(" "))


OUTCOMES: dict[str, Response | UpstreamError] = {
    "200": Response(200, ()),
    "404": Response(404, ()),
    "429": Response(429, ()),
    "500": Response(500, ()),
    "502": Response(502, ()),
    "503": Response(503, ()),
    "504": Response(504, ()),
    "refused": UpstreamError("connection refused", sent=False),
    "no connection in time": UpstreamError("connect timed out", sent=False, timed_out=True),
    "lost": UpstreamError("connection reset", sent=True),
    "no answer in time": UpstreamError("read timed out", sent=True, timed_out=True),
}
AS_IT_CAME = ("200", "404", "429", "500")
GATEWAY = ("502", "503", "504")
HARMLESS = ("GET /read/", "POST /search/", "PUT /write/", "GET /auth/")
COSTLY = ("PUT /spend/", "POST /api/v0/asks/bulk/", "POST /auth/", "POST /nobody/knows/", "DELETE /nobody/knows/")


@pytest.mark.parametrize("line", HARMLESS + COSTLY)
@pytest.mark.parametrize("outcome", AS_IT_CAME)
def test_an_answer_is_told_as_it_came(line: str, outcome: str) -> None:
    assert not failed(OUTCOMES[outcome])
    assert verdict(route(line), OUTCOMES[outcome], 1) is OUTCOMES[outcome]


@pytest.mark.parametrize("line", HARMLESS)
@pytest.mark.parametrize("outcome", [*GATEWAY, "refused", "no connection in time", "lost", "no answer in time"])
def test_what_may_be_done_twice_is_tried_again_after_any_failure(line: str, outcome: str) -> None:
    assert failed(OUTCOMES[outcome])
    assert may_send_again(route(line), OUTCOMES[outcome])


@pytest.mark.parametrize("line", COSTLY)
@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        ("502", False),
        ("503", False),
        ("504", False),
        ("lost", False),
        ("no answer in time", False),
        ("refused", True),
        ("no connection in time", True),
    ],
)
def test_what_costs_is_tried_again_only_if_no_byte_went_out(line: str, outcome: str, again: bool) -> None:
    assert failed(OUTCOMES[outcome])
    assert may_send_again(route(line), OUTCOMES[outcome]) is again


@pytest.mark.parametrize("line", HARMLESS)
@pytest.mark.parametrize("outcome", GATEWAY)
def test_the_gateways_own_words_end_a_read_that_kept_failing(line: str, outcome: str) -> None:
    assert verdict(route(line), OUTCOMES[outcome], 5) is OUTCOMES[outcome]


@pytest.mark.parametrize(
    ("line", "outcome", "status", "code"),
    [
        ("GET /read/", "refused", 503, "upstream_unreachable"),
        ("GET /read/", "no connection in time", 503, "upstream_unreachable"),
        ("GET /read/", "lost", 503, "upstream_unreachable"),
        ("GET /read/", "no answer in time", 504, "upstream_timeout"),
        ("PUT /write/", "no answer in time", 504, "upstream_timeout"),
        ("PUT /spend/", "refused", 503, "upstream_unreachable"),
        ("POST /api/v0/asks/bulk/", "no connection in time", 503, "upstream_unreachable"),
    ],
)
def test_who_could_not_be_asked_is_told_so_and_not_to_come_back_by_itself(
    line: str, outcome: str, status: int, code: str
) -> None:
    told = verdict(route(line), OUTCOMES[outcome], 3)
    assert isinstance(told, Refusal)
    assert (told.status, told.code) == (status, code)
    assert "(3 tries)" in told.msg
    assert str(OUTCOMES[outcome]) in told.msg
    assert int(told.retry_after_header() or 0) > 60


@pytest.mark.parametrize("line", COSTLY)
@pytest.mark.parametrize("outcome", [*GATEWAY, "lost", "no answer in time"])
def test_an_unknown_outcome_is_told_with_a_status_that_no_client_answers_by_sending_again(
    line: str, outcome: str
) -> None:
    told = verdict(route(line), OUTCOMES[outcome], 1)
    assert isinstance(told, Refusal)
    assert told.code == "outcome_unknown"
    # The bulk creation's client sends again on everything but a 200.
    assert told.status == (200 if "bulk" in line else 500)
    assert told.retry_after_header() is None
    assert route(line).name in told.msg


def test_an_unknown_outcome_comes_with_what_to_look_at() -> None:
    told = verdict(route("PUT /spend/"), OUTCOMES["lost"], 1)
    assert isinstance(told, Refusal)
    assert told.msg.endswith("check: vastai show instances.")


@pytest.mark.parametrize(
    ("failures", "chance", "seconds"),
    [(1, 0.0, 0.25), (1, 0.999999, 0.5), (2, 0.5, 0.75), (3, 0.0, 1.0), (5, 0.0, 4.0), (6, 0.0, 5.0), (99, 0.5, 7.5)],
)
def test_each_wait_is_twice_the_one_before_up_to_the_most(failures: int, chance: float, seconds: float) -> None:
    assert backoff(RetryRules(), failures, chance) == pytest.approx(seconds, rel=1e-5)


@given(st.integers(1, 10**6), st.floats(0.0, 1.0, exclude_max=True))
def test_no_wait_is_longer_than_the_settings_say(failures: int, chance: float) -> None:
    assert 0.0 < backoff(RetryRules(), failures, chance) <= 10.0
