"""Who goes next, who can be kept waiting, and for how long."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.messages import Headers, Request
from proxy.policy.queueing import (
    BULK,
    MANY,
    SECONDS_LATER,
    STOPS_MONEY,
    TURNS_LATER,
    USUAL,
    Flow,
    Line,
    Order,
    Place,
    QueueRules,
    interim,
    patience,
    urgency,
)
from proxy.settings import load


class Counted(Place):
    """A place that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __lt__(self, other: Place) -> bool:
        Counted.compared += 1
        return super().__lt__(other)


class Lines:
    """Lines of requests that all wait for one thing, and the order in which they go."""

    def __init__(self) -> None:
        self.order: Order[Place] = Order()
        self.lines: dict[str, Line[Place]] = {}
        self.where: dict[int, Line[Place]] = {}
        self.now = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(len(line) for line in self.lines.values())

    def come(self, who: str = "", count: int = 1, line: str = "", **more: Any) -> list[Place]:
        places = [Place(next(self._numbers), who=who, **more) for _ in range(count)]
        for place in places:
            self.join(place, line)
        return places

    def join(self, place: Place, line: str = "", again: bool = False) -> None:
        where = self.lines.setdefault(line, Line())
        self.where[place.number] = where
        flow = where.join(place, self.now)
        self.order.join(place, again)
        self._placed(flow)

    def leave(self, place: Place) -> None:
        flow = self.where[place.number].leave(place, self.now)
        self.order.leave(place)
        self._placed(flow)

    def _placed(self, flow: Flow[Place]) -> None:
        if flow.order is not None:
            self.order.go(flow)
        if flow:
            self.order.stand(flow)

    def pop(self, seconds: float = 1.0) -> Place:
        """Who goes next; so long after the last one."""
        self.now += seconds
        flow = self.order.best()
        assert flow is not None
        head = flow.head
        assert head is not None
        self.order.served(head)
        self.leave(head)
        return head

    def turns(self, count: int) -> str:
        return "".join(self.pop().who for _ in range(count))

    def drained(self) -> list[int]:
        return [self.pop().number for _ in range(len(self))]


# --- The line ---------------------------------------------------------------------------------------------------------


def line_of(*numbers: int) -> tuple[Lines, dict[int, Place]]:
    lines = Lines()
    places = {number: Place(number) for number in numbers}
    for place in places.values():
        lines.join(place)
    return lines, places


def test_the_oldest_arrival_goes_first_whenever_it_joined() -> None:
    lines, _ = line_of(5, 3, 9, 1, 7)
    assert lines.drained() == [1, 3, 5, 7, 9]


def test_who_comes_back_takes_the_place_of_the_arrival() -> None:
    lines, _ = line_of(1, 2, 3)
    lines.join(Place(lines.pop().number))
    assert lines.pop().number == 1


def test_who_left_is_passed_over() -> None:
    lines, places = line_of(1, 2, 3, 4)
    lines.leave(places[1])
    lines.leave(places[3])
    assert len(lines) == 2
    assert lines.drained() == [2, 4]
    assert lines.order.best() is None


def test_looking_at_who_is_best_takes_nobody_out() -> None:
    lines, places = line_of(1, 2)
    flow = lines.order.best()
    assert flow is not None
    assert flow is lines.order.best()
    assert flow.head is places[1]
    assert len(lines) == 2


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "pop", "look"]), st.integers(0, 50)), max_size=300))
def test_a_line_of_one_caller_is_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    lines = Lines()
    model: list[Place] = []
    for what, number in steps:
        match what:
            case "join":
                place = Place(number)
                if all(waiting.number != number for waiting in model):
                    lines.join(place)
                    model.append(place)
            case "leave" if model:
                lines.leave(model.pop(number % len(model)))
            case "pop" if model:
                assert lines.pop() is model.pop(model.index(min(model, key=lambda waiting: waiting.number)))
            case _:
                flow = lines.order.best()
                head = flow.head if flow is not None else None
                assert head is min(model, key=lambda waiting: waiting.number, default=None)
        assert len(lines) == len(model)
    assert lines.drained() == sorted(place.number for place in model)


def test_those_who_left_are_forgotten_before_they_are_the_most() -> None:
    lines, places = line_of(*range(1000))
    for number in range(1, 1000):
        lines.leave(places[number])
        assert sum(len(flow._heap) for flow in lines.lines[""].flows.values()) <= 2 * len(lines) + 17
    assert lines.drained() == [0]


def test_callers_who_left_are_forgotten() -> None:
    lines = Lines()
    lines.come("stays")
    for number in range(5000):
        [place] = lines.come(f"{number}")
        lines.leave(place)
    [line] = lines.lines.values()
    assert (len(line), len(line.flows), len(line._waiting)) == (1, 1, 1)
    assert (len(lines.order), lines.order.callers, len(lines.order._callers)) == (1, 1, 1)
    assert len(lines.order._ranks) < 100
    assert len(lines.order._shares._starts) < 100


def test_ten_thousand_join_and_leave_in_a_few_comparisons_each() -> None:
    line: Line[Counted] = Line()
    places = [Counted(number) for number in range(10_000)]
    Counted.compared = 0
    for place in reversed(places):  # the worst order to join in
        line.join(place, 0.0)
    for place in places[::2] + places[1::2]:
        line.leave(place, 0.0)
    assert len(line) == 0
    assert Counted.compared < 10_000 * 30


# --- Keeping a client waiting -----------------------------------------------------------------------------------------

RULES = QueueRules()
CONTINUE, PROCESSING = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"


@pytest.mark.parametrize(
    ("agent", "sent"),
    [
        ("vastai-cli/1.9.1", CONTINUE),
        ("vastai-sdk/1.9.1", CONTINUE),
        ("python-requests/2.32.3", CONTINUE),
        ("python-httpx/0.28.1", CONTINUE),
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


def crowd(*callers: tuple[str, int, float, int]) -> Lines:
    """Callers with so many requests, of that weight and urgency, who came one after the other."""
    lines = Lines()
    for who, count, weight, step in callers:
        lines.come(who, count, weight=weight, urgency=step)
    return lines


@pytest.mark.parametrize("where", ["", "a line of its own"])
def test_a_crowd_of_one_caller_delays_another_by_a_turn_or_two(where: str) -> None:
    lines = crowd(("a", 500, 1, USUAL))
    assert lines.turns(100) == "a" * 100
    lines.come("b", line=where)
    assert lines.lines[""].ahead_of("c", 1.0) == (2 if not where else 1)
    assert "b" in lines.turns(2)


def test_a_crowd_in_many_lines_delays_who_stands_behind_it_in_one_of_them_no_more() -> None:
    lines = Lines()
    for number in range(50):
        lines.come("a", 5, line=f"{number}")
    assert lines.turns(10) == "a" * 10
    lines.come("b", line="49")
    assert "b" in lines.turns(2)


def test_callers_take_turns_and_each_is_served_first_come_first_served() -> None:
    assert crowd(("a", 5, 1, USUAL), ("b", 3, 1, USUAL), ("c", 1, 1, USUAL)).turns(9) == "abcababaa"
    assert crowd(("a", 3, 1, USUAL), ("b", 3, 1, USUAL)).drained() == [0, 3, 1, 4, 2, 5]


def test_shares_are_by_weight() -> None:
    served = Counter(crowd(("a", 300, 1, USUAL), ("b", 300, 2, USUAL), ("c", 300, 3, USUAL)).turns(300))
    assert served == {"a": 50, "b": 100, "c": 150}


def test_shares_are_by_weight_however_many_lines_each_has() -> None:
    lines = Lines()
    for number in range(20):
        lines.come("a", 20, line=f"{number}")
    lines.come("b", 400, line="0")
    served = Counter(lines.turns(300))
    assert served["a"] == pytest.approx(150, abs=5)


def test_who_was_away_has_saved_up_nothing() -> None:
    lines = crowd(("a", 200, 1, USUAL))
    lines.turns(100)
    lines.come("b", 50)
    assert Counter(lines.turns(20)) == pytest.approx({"a": 10, "b": 10}, abs=3)


def test_who_leaves_with_much_unserved_has_not_had_it() -> None:
    lines = crowd(("a", 1, 1, USUAL))
    many = lines.come("b", 500)
    lines.come("a", 10)
    for place in many:
        lines.leave(place)
    lines.come("b")
    assert "b" in lines.turns(3)


def test_callers_who_come_anew_all_the_time_do_not_keep_out_who_was_served_once() -> None:
    lines = crowd(("a", 5, 1, USUAL))
    turns = ""
    for _ in range(60):
        lines.come("new" + "!" * len(turns))
        turns += lines.pop().who[0]
    assert turns.count("a") == 5


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["join", "pop", "pop", "leave"])), min_size=50, max_size=400
    ),
    st.tuples(*[st.sampled_from([1.0, 2.0, 4.0])] * 4),
)
def test_two_who_wait_all_the_time_are_never_further_apart_than_a_turn_of_each(
    steps: list[tuple[str, str]], weights: tuple[float, ...]
) -> None:
    """The bound of start-time fair queueing, whatever others do meanwhile; more for bulk than for the usual."""
    weight = dict(zip("abcd", weights, strict=True))
    lines = Lines()
    places: list[Place] = []
    for _ in range(400):
        for who in "ab":
            lines.come(who, weight=weight[who])
    had = {"a": 0.0, "b": 0.0}
    for who, what in steps:
        if what == "join" and who in "cd":
            places += lines.come(who, weight=weight[who])
        elif what == "leave" and places:
            place = places.pop()
            if not place.left:
                lines.leave(place)
        else:
            gone = lines.pop()
            if gone.who in had:
                had[gone.who] += 1 / weight[gone.who]
        assert abs(had["a"] - had["b"]) <= 1 / weight["a"] + 1 / weight["b"] + 1e-9


@pytest.mark.parametrize("step", range(8))
def test_the_less_urgent_goes_later_and_is_never_starved_by_others(step: int) -> None:
    lines = crowd(*[(who, 100, 1, 0) for who in "abc"], ("z", 1, 1, step))
    before = lines.turns(300).index("z")
    assert 3 * 2 * step - 3 <= before <= 3 * (2 * step + 1)


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("step", [4, 5, 7])
def test_the_less_urgent_is_never_starved_by_its_own_caller(step: int, others: int) -> None:
    lines = Lines()
    [late] = lines.come("a", urgency=step)
    for number in range(others):
        lines.come(f"other {number}", 1000)
    gone: list[Place] = []
    while late not in gone:
        lines.come("a")
        gone.append(lines.pop())
    # For so many seconds its own usual requests go first; where so many of these wait that they are bulk, for less.
    assert len(gone) >= 10 * (step - (BULK if others else USUAL))
    assert len(gone) <= 10 * (step - USUAL) + (others + 1) * 2


def test_the_urgent_goes_first_also_of_one_caller() -> None:
    lines = crowd(("a", 100, 1, BULK), ("a", 1, 1, STOPS_MONEY))
    assert lines.pop().number == 100


def test_of_a_caller_of_whom_many_wait_none_overtakes_another() -> None:
    lines = Lines()
    lines.come("a", 2 * MANY)
    order = []
    for _ in range(100):
        order.append(lines.pop().number)
        lines.come("a")
    assert order == list(range(100))


def test_many_of_one_caller_are_bulk_beside_another_s_few() -> None:
    lines = crowd(("a", MANY, 1, USUAL), ("b", 3, 1, USUAL))
    assert lines.turns(4) == "bbba"
    assert crowd(("a", MANY - 1, 1, USUAL), ("b", 3, 1, USUAL)).turns(4) == "abab"


def test_who_comes_back_is_not_put_behind_those_who_came_since() -> None:
    lines = crowd(("a", 3, 1, USUAL), ("b", 3, 1, USUAL))
    first = lines.pop()
    lines.join(Place(first.number, who="a"), again=True)
    assert lines.pop().number == first.number


class Model:
    """The same by looking at everybody each time: callers by their start tags, each caller's heads by their age."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Place, str]] = []
        self.starts: dict[str, float] = {}
        self.now = 0.0
        self.heads: dict[tuple[str, str, int], tuple[int, float]] = {}

    def note_heads(self, at: float) -> None:
        heads: dict[tuple[str, str, int], Place] = {}
        for place, line in self.waiting:
            key = (line, place.who, place.urgency)
            if key not in heads or place.number < heads[key].number:
                heads[key] = place
        self.heads = {
            key: self.heads[key] if self.heads.get(key, (-1, 0.0))[0] == head.number else (head.number, at)
            for key, head in heads.items()
        }

    def join(self, place: Place, line: str, at: float) -> None:
        if all(waiting.who != place.who for waiting, _ in self.waiting):
            self.starts[place.who] = max(self.now, self.starts.get(place.who, 0.0))
        self.waiting.append((place, line))
        self.note_heads(at)

    def leave(self, place: Place, at: float) -> None:
        self.waiting = [item for item in self.waiting if item[0] is not place]
        self.note_heads(at)

    def best(self) -> int:
        flows = Counter((line, place.who, place.urgency) for place, line in self.waiting)
        ranked = []
        for (line, who, told), (number, since) in self.heads.items():
            step = BULK if told == USUAL and flows[line, who, told] >= MANY else told
            ranked.append((who, step, since + SECONDS_LATER * step, number))
        callers = []
        for who in {item[0] for item in ranked}:
            own = [item for item in ranked if item[0] == who]
            chosen = min(own, key=lambda item: item[2:])
            callers.append((self.starts[who] + TURNS_LATER * min(item[1] for item in own), chosen[3]))
        return min(callers)[1]

    def served(self, place: Place, at: float) -> None:
        weights = {waiting.who: waiting.weight for waiting, _ in self.waiting}
        start = self.starts[place.who]
        self.now = max(self.now + 1.0 / (sum(weights.values()) + 1.0), start)
        self.starts[place.who] = start + 1.0 / place.weight
        self.leave(place, at)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "join", "pop", "leave"]),
            st.sampled_from("abc"),
            st.sampled_from("xy"),
            st.sampled_from([0, 1, 3, 3, 3, 5, 7]),
            st.integers(0, 99),
        ),
        max_size=150,
    )
)
def test_the_order_is_that_of_looking_at_everybody_each_time(steps: list[tuple[str, str, str, int, int]]) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    lines, model = Lines(), Model()
    for what, who, line, step, chosen in steps:
        if what == "join":
            [place] = lines.come(who, line=line, weight=weights[who], urgency=step)
            model.join(place, line, lines.now)
        elif what == "leave" and model.waiting:
            place = model.waiting[chosen % len(model.waiting)][0]
            lines.leave(place)
            model.leave(place, lines.now)
        elif what == "pop" and model.waiting:
            expected = model.best()
            gone = lines.pop()
            assert gone.number == expected
            model.served(gone, lines.now)
        assert len(lines) == len(model.waiting)


ROUTES = load(None, {}, {}).routes
STOP, START = b'{"state": "stopped"}', b'{"state": "running"}'


@pytest.mark.parametrize(
    ("line", "body", "headers", "expected"),
    [
        ("GET /api/v1/instances/", b"", (), USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (), USUAL),
        ("DELETE /api/v0/instances/5/", b"", (), STOPS_MONEY),
        ("PUT /api/v0/instances/5/", STOP, (), STOPS_MONEY),
        ("PUT /api/v0/instances/5/", START, (), USUAL),
        ("PUT /api/v0/asks/5/", STOP, (), USUAL),
        ("DELETE /api/v0/cluster/", b"", (), USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "u=0"),), 0),
        ("DELETE /api/v0/instances/5/", b"", (("priority", "i, u=7"),), 7),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "u=9"),), USUAL),
        ("PUT /api/v0/asks/5/", b"{}", (("Priority", "i"),), USUAL),
    ],
)
def test_how_urgent_a_request_is(line: str, body: bytes, headers: Headers, expected: int) -> None:
    method, target = line.split(" ")
    route = ROUTES.match(method, target)
    assert urgency(route, Request(method, target, headers, body)) == expected
