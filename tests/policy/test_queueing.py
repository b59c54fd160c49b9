"""Who goes next, who can be kept waiting, and for how long."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.messages import Headers, Request
from proxy.policy.queueing import (
    BULK,
    STOPS_MONEY,
    USUAL,
    Line,
    Place,
    QueueRules,
    interim,
    patience,
    urgency,
    usual_or_bulk,
)
from proxy.settings import load


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
        assert sum(len(flow.heap) for flow in line._flows.values()) <= 2 * len(line) + 17
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


# --- Fair shares ------------------------------------------------------------------------------------------------------


def crowd(*callers: tuple[str, int, float, int]) -> Line[Place]:
    """Callers with so many requests, of that weight and urgency, who came one after the other."""
    line: Line[Place] = Line()
    number = 0
    for who, count, weight, step in callers:
        for _ in range(count):
            line.join(Place(number, 0.0, who=who, weight=weight, urgency=step))
            number += 1
    return line


def turns(line: Line[Place], count: int) -> str:
    return "".join(line.pop().who for _ in range(count))


def test_a_crowd_of_one_caller_delays_another_by_a_turn_or_two() -> None:
    line = crowd(("a", 500, 1, USUAL))
    assert turns(line, 100) == "a" * 100
    line.join(Place(1000, 0.0, who="b"))
    assert line.ahead_of("c", 1.0) == 2
    assert "b" in turns(line, 2)


def test_callers_take_turns_and_each_is_served_first_come_first_served() -> None:
    line = crowd(("a", 5, 1, USUAL), ("b", 3, 1, USUAL), ("c", 1, 1, USUAL))
    assert turns(line, 9) == "abcababaa"
    line = crowd(("a", 3, 1, USUAL), ("b", 3, 1, USUAL))
    assert [line.pop().number for _ in range(6)] == [0, 3, 1, 4, 2, 5]


def test_shares_are_by_weight() -> None:
    served = Counter(turns(crowd(("a", 300, 1, USUAL), ("b", 300, 2, USUAL), ("c", 300, 3, USUAL)), 300))
    assert served == {"a": 50, "b": 100, "c": 150}


def test_who_was_away_has_saved_up_nothing() -> None:
    line = crowd(("a", 200, 1, USUAL))
    turns(line, 100)
    for number in range(50):
        line.join(Place(1000 + number, 0.0, who="b"))
    assert Counter(turns(line, 20)) == {"a": 10, "b": 10}


def test_who_leaves_with_much_unserved_has_not_had_it() -> None:
    line = crowd(("a", 1, 1, USUAL))
    many = [Place(10 + number, 0.0, who="b") for number in range(500)]
    for place in [*many, *[Place(1000 + number, 0.0, who="a") for number in range(10)]]:
        line.join(place)
    for place in many:
        line.leave(place)
    line.join(Place(2000, 0.0, who="b"))
    assert "b" in turns(line, 3)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["join", "pop", "pop", "leave"])), min_size=50, max_size=400
    ),
    st.tuples(*[st.sampled_from([1.0, 2.0, 4.0])] * 4),
)
def test_two_who_wait_all_the_time_are_never_further_apart_than_a_turn_of_each(
    steps: list[tuple[str, str]], weights: tuple[float, ...]
) -> None:
    """The bound of start-time fair queueing, whatever others do meanwhile."""
    weight = dict(zip("abcd", weights, strict=True))
    line: Line[Place] = Line()
    number = 0
    places: list[Place] = []

    def join(who: str) -> None:
        nonlocal number
        number += 1
        places.append(Place(number, 0.0, who=who, weight=weight[who]))
        line.join(places[-1])

    for _ in range(400):
        join("a")
        join("b")
    places.clear()
    had = {"a": 0.0, "b": 0.0}
    for who, what in steps:
        if what == "join" and who in "cd":
            join(who)
        elif what == "leave" and places:
            place = places.pop()
            if not place.left and place.start is None:
                line.leave(place)
        else:
            gone = line.pop()
            if gone.who in had:
                had[gone.who] += 1 / weight[gone.who]
        assert abs(had["a"] - had["b"]) <= 1 / weight["a"] + 1 / weight["b"] + 1e-9


@pytest.mark.parametrize("step", range(8))
def test_the_less_urgent_goes_later_and_is_never_starved(step: int) -> None:
    line = crowd(*[(who, 100, 1, 0) for who in "abc"], ("z", 1, 1, step))
    before = turns(line, 300).index("z")
    assert 3 * 2 * step - 3 <= before <= 3 * (2 * step + 1)


def test_the_urgent_goes_first_also_of_one_caller() -> None:
    line = crowd(("a", 100, 1, BULK), ("a", 1, 1, STOPS_MONEY))
    assert line.pop().number == 100


def test_who_comes_back_is_not_put_behind_those_who_came_since() -> None:
    line = crowd(("a", 3, 1, USUAL), ("b", 3, 1, USUAL))
    first = line.pop()
    again = Place(first.number, 0.0, who="a")
    again.start = first.start
    line.join(again)
    assert line.pop() is again


ROUTES = load(None, {}, {}).routes
STOP, START = b'{"state": "stopped"}', b'{"state": "running"}'


@pytest.mark.parametrize(
    ("line", "body", "headers", "waiting", "polled", "expected"),
    [
        ("GET /api/v1/instances/", b"", (), 0, False, USUAL),
        ("GET /api/v1/instances/", b"", (), 0, True, BULK),
        ("PUT /api/v0/asks/5/", b"{}", (), 0, False, USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (), 7, False, USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (), 8, False, BULK),
        ("DELETE /api/v0/instances/5/", b"", (), 100, False, STOPS_MONEY),
        ("PUT /api/v0/instances/5/", STOP, (), 100, False, STOPS_MONEY),
        ("PUT /api/v0/instances/5/", START, (), 0, False, USUAL),
        ("PUT /api/v0/asks/5/", STOP, (), 0, False, USUAL),
        ("DELETE /api/v0/cluster/", b"", (), 0, False, USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "u=0"),), 100, False, 0),
        ("DELETE /api/v0/instances/5/", b"", (("priority", "i, u=7"),), 0, False, 7),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "u=9"),), 0, False, USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "i"),), 0, False, USUAL),
    ],
)
def test_how_urgent_a_request_is(
    line: str, body: bytes, headers: Headers, waiting: int, polled: bool, expected: int
) -> None:
    method, target = line.split(" ")
    route = ROUTES.match(method, target)
    told = urgency(route, Request(method, target, headers, body))
    assert (usual_or_bulk(waiting, polled) if told is None else told) == expected
