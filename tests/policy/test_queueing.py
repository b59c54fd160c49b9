"""Who goes next, who can be kept waiting, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.messages import Headers
from proxy.policy.queueing import Line, Place, QueueRules, interim, patience


class Counted(Place):
    """A place that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __lt__(self, other: Place) -> bool:
        Counted.compared += 1
        return super().__lt__(other)


def line_of(*numbers: int) -> tuple[Line[Place], dict[int, Place]]:
    line: Line[Place] = Line()
    places = {number: Place(number, 0.0) for number in numbers}
    for place in places.values():
        line.join(place)
    return line, places


def drained(line: Line[Place]) -> list[int]:
    return [line.pop().number for _ in range(len(line))]


# --- The line ---------------------------------------------------------------------------------------------------------


def test_the_oldest_arrival_goes_first_whenever_it_joined() -> None:
    line, _ = line_of(5, 3, 9, 1, 7)
    assert drained(line) == [1, 3, 5, 7, 9]


def test_who_comes_back_takes_the_place_of_the_arrival() -> None:
    line, _ = line_of(1, 2, 3)
    first = line.pop()
    again = Place(first.number, 0.0)
    line.join(again)
    assert line.head() is again


def test_who_left_is_passed_over() -> None:
    line, places = line_of(1, 2, 3, 4)
    line.leave(places[1])
    line.leave(places[3])
    assert len(line) == 2
    assert drained(line) == [2, 4]
    assert line.head() is None


def test_an_empty_line_has_no_head() -> None:
    line, _ = line_of()
    assert line.head() is None
    assert not line


def test_looking_at_the_head_takes_nobody_out() -> None:
    line, places = line_of(1, 2)
    assert line.head() is line.head() is places[1]
    assert len(line) == 2


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "pop", "head"]), st.integers(0, 50)), max_size=300))
def test_a_line_is_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    line: Line[Place] = Line()
    model: list[Place] = []
    for what, number in steps:
        match what:
            case "join":
                place = Place(number, 0.0)
                if all(waiting.number != number for waiting in model):
                    line.join(place)
                    model.append(place)
            case "leave" if model:
                line.leave(model.pop(number % len(model)))
            case "pop" if model:
                assert line.pop() is model.pop(model.index(min(model, key=lambda waiting: waiting.number)))
            case _:
                assert line.head() is min(model, key=lambda waiting: waiting.number, default=None)
        assert len(line) == len(model)
    assert drained(line) == sorted(place.number for place in model)


def test_those_who_left_are_forgotten_before_they_are_the_most() -> None:
    line, places = line_of(*range(1000))
    for number in range(1, 1000):
        line.leave(places[number])
        assert len(line._heap) <= 2 * len(line) + 17
    assert drained(line) == [0]


@given(st.permutations(range(60)), st.sets(st.integers(0, 59), min_size=31))
def test_the_order_outlives_those_who_left(numbers: list[int], leaving: set[int]) -> None:
    line, places = line_of(*numbers)
    for number in leaving:
        line.leave(places[number])
    assert drained(line) == sorted(set(numbers) - leaving)


def test_ten_thousand_join_and_leave_in_a_few_comparisons_each() -> None:
    line: Line[Counted] = Line()
    places = [Counted(number, 0.0) for number in range(10_000)]
    Counted.compared = 0
    for place in reversed(places):  # the worst order to join in
        line.join(place)
    for place in places[::2] + places[1::2]:
        line.leave(place)
    assert len(line) == 0
    assert Counted.compared < 10_000 * 20


# --- Keeping a client waiting -----------------------------------------------------------------------------------------

RULES = QueueRules()
CONTINUE, PROCESSING = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"


@pytest.mark.parametrize(
    ("agent", "sent"),
    [
        ("vastai-cli/1.9.1", CONTINUE),
        ("vastai-sdk/1.9.1", CONTINUE),
        ("python-requests/2.32.3", CONTINUE),
        ("Python/3.12 aiohttp/3.14.5", CONTINUE),
        ("curl/8.5.0", CONTINUE),
        ("node", PROCESSING),
        ("undici", PROCESSING),
        ("Mozilla/5.0 (X11)", b""),
        ("Go-http-client/1.1", b""),
        ("my-python-requests/1", b""),
        ("CURL/8.5.0", b""),
        ("", b""),
    ],
)
def test_only_clients_known_to_take_an_interim_answer_get_one(agent: str, sent: bytes) -> None:
    assert interim((("USER-AGENT", agent),), True, RULES) == sent


CLI: Headers = (("User-Agent", "vastai-cli/1.9.1"),)


@pytest.mark.parametrize("name", ["Via", "Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-Forwarded-Port"])
def test_a_request_that_came_through_another_proxy_gets_none(name: str) -> None:
    assert interim((*CLI, (name, "1.1 nginx")), True, RULES) == b""
    assert interim(((name, "1.1 nginx"), *CLI), True, RULES) == b""


def test_http_1_0_and_a_heartbeat_of_zero_mean_none() -> None:
    assert interim(CLI, True, RULES)
    assert interim(CLI, False, RULES) == b""
    assert interim(CLI, True, replace(RULES, heartbeat=0.0)) == b""
    assert interim((), True, RULES) == b""


@pytest.mark.parametrize(("status", "sent"), [("100", CONTINUE), ("102", PROCESSING), ("none", b"")])
def test_the_settings_say_what_a_client_takes(status: Literal["100", "102", "none"], sent: bytes) -> None:
    assert interim((("User-Agent", "my-tool/1"),), True, replace(RULES, heartbeats={"my-tool": status})) == sent


KEEPS: Headers = (("Connection", "keep-alive"),)


@pytest.mark.parametrize(
    ("headers", "target", "upstream", "beating", "seconds"),
    [
        ((*CLI, *KEEPS), "/api/v0/bundles/", "api", True, 1800.0),
        ((*CLI, *KEEPS), "/api/v0/bundles/", "api", False, 100.0),
        ((("User-Agent", "curl/8"),), "/api/v0/bundles/", "api", True, 1800.0),
        ((), "/api/v0/bundles/", "api", False, 100.0),
        # The SDK on requests, on aiohttp, and its serverless half asking about its endpoints.
        ((("User-Agent", "vastai-sdk/1.9.1"), *KEEPS), "/api/v0/bundles/", "api", True, 1800.0),
        ((("User-Agent", "vastai-sdk/1.9.1"),), "/api/v0/bundles/", "api", True, 280.0),
        ((("User-Agent", "Python/3.12 aiohttp/3.14"),), "/api/v0/bundles/", "api", True, 280.0),
        ((("User-Agent", "vastai-sdk/1.9.1"),), "/api/v0/endptjobs/?client_id=me&api_key=k", "api", True, 25.0),
        (CLI, "/api/v0/endptjobs/?api_key=k", "api", True, 1800.0),
        # The serverless engine's clients have total timeouts that no heartbeat resets.
        ((("User-Agent", "vastai-sdk/1.9.1"),), "/route/", "serverless", True, 8.0),
        ((("User-Agent", "vastai-sdk/1.9.1"),), "/get_endpoint_workers/", "serverless", True, 25.0),
        ((), "/get_endpoint_workers/", "serverless", False, 25.0),
    ],
)
def test_nobody_is_held_longer_than_the_client_would_wait(
    headers: Headers, target: str, upstream: str, beating: bool, seconds: float
) -> None:
    assert patience(headers, target, upstream, RULES, beating=beating) == seconds


def test_the_bound_of_the_settings_holds_for_patient_clients() -> None:
    rules = replace(RULES, max_wait=60.0, max_wait_plain=40.0)
    assert patience((*CLI, *KEEPS), "/", "api", rules, beating=True) == 60.0
    assert patience((("User-Agent", "aiohttp/3"),), "/", "api", rules, beating=True) == 60.0
    assert patience((), "/", "api", rules, beating=False) == 40.0
