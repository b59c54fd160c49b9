"""One call for all who ask the same at once: it belongs to nobody, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from proxy.coalescer import Coalescer, Flight

pytestmark = pytest.mark.looptime

NOTHING_LEFT = "<Coalescer 0 flights, 0 members>"


class Calls:
    """Calls that take ten seconds, counted."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.cancelled = 0
        self.discarded: list[str] = []
        self.keep = False
        self.error: Exception | None = None
        self.result = "answer"

    def discard(self, result: str) -> None:
        self.discarded.append(result)

    async def __call__(self, flight: Flight[str]) -> str:
        self.begun += 1
        number = self.begun
        flight.keep = self.keep
        try:
            await asyncio.sleep(10.0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        if self.error is not None:
            raise self.error
        return f"{self.result} {number}"


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def flights(calls: Calls) -> AsyncIterator[Coalescer[str]]:
    """Results that begin with "large" are for one member only. Nothing is left when the test ends."""
    coalescer: Coalescer[str] = Coalescer(lambda result: result.startswith("large"), calls.discard)
    yield coalescer
    await coalescer.finish()
    assert (repr(coalescer), len(coalescer)) == (NOTHING_LEFT, 0)


Joined = asyncio.Task[tuple[str | None, bool]]


def ask(flights: Coalescer[str], calls: Calls, key: str | None = "k") -> Joined:
    return asyncio.ensure_future(flights.join(key, calls))


async def leave(*members: Joined) -> None:
    for member in members:
        member.cancel()
    await asyncio.wait(members)


async def test_those_who_ask_the_same_share_one_call(flights: Coalescer[str], calls: Calls) -> None:
    members = [ask(flights, calls) for _ in range(50)]
    await asyncio.sleep(5.0)
    members.append(ask(flights, calls))
    await asyncio.sleep(0)
    assert repr(flights) == "<Coalescer 1 flights, 51 members>"
    assert await asyncio.gather(*members) == [("answer 1", False), *[("answer 1", True)] * 50]
    assert calls.begun == 1


async def test_other_questions_and_none_are_calls_of_their_own(flights: Coalescer[str], calls: Calls) -> None:
    answers = await asyncio.gather(*(ask(flights, calls, key) for key in ("a", "b", None, None)))
    assert [collapsed for _, collapsed in answers] == [False] * 4
    assert calls.begun == 4


async def test_who_comes_after_the_landing_does_not_join(flights: Coalescer[str], calls: Calls) -> None:
    later: list[Joined] = []

    async def ask_again() -> None:
        await flights.join("k", calls)
        later.append(ask(flights, calls))

    await asyncio.gather(ask_again(), ask_again())
    assert await asyncio.gather(*later) == [("answer 2", False), ("answer 2", True)]


@pytest.mark.parametrize("when", [0.0, 5.0])
async def test_a_leader_who_leaves_takes_nobody_down(flights: Coalescer[str], calls: Calls, when: float) -> None:
    leader, follower = ask(flights, calls), ask(flights, calls)
    await asyncio.sleep(when)
    await leave(leader)
    assert await follower == ("answer 1", True)
    assert (calls.begun, calls.cancelled) == (1, 0)


@pytest.mark.parametrize("key", ["k", None])
@pytest.mark.parametrize("when", [0.0, 5.0])
async def test_the_last_who_leaves_cancels_the_call(
    flights: Coalescer[str], calls: Calls, when: float, key: str | None
) -> None:
    members = [ask(flights, calls, key), ask(flights, calls, key)]
    await asyncio.sleep(when)
    await leave(*members)
    await asyncio.sleep(0.1)
    assert (calls.begun, calls.cancelled, calls.ended) == (calls.begun, calls.begun, 0)
    assert calls.begun == (1 if key else 2)


async def test_a_caller_cancelled_before_the_first_step_leaves_nothing(flights: Coalescer[str], calls: Calls) -> None:
    await leave(ask(flights, calls))
    assert calls.begun == 0


async def test_a_caller_cancelled_as_it_joins_leaves_nothing(flights: Coalescer[str], calls: Calls) -> None:
    async def join_and_be_cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await flights.join("k", calls)

    await asyncio.wait([asyncio.ensure_future(join_and_be_cancelled())])
    await asyncio.sleep(0.1)
    assert (len(flights), calls.ended) == (0, 0)


async def test_who_comes_right_after_the_last_left_begins_anew(flights: Coalescer[str], calls: Calls) -> None:
    first = ask(flights, calls)
    await asyncio.sleep(5.0)
    first.cancel()
    second = ask(flights, calls)
    assert await second == ("answer 2", False)
    assert (calls.begun, calls.cancelled) == (2, 1)


async def test_what_must_be_finished_is_finished_for_nobody(flights: Coalescer[str], calls: Calls) -> None:
    calls.keep = True
    alone = ask(flights, calls)
    await asyncio.sleep(5.0)
    await leave(alone)
    assert len(flights) == 1
    await flights.finish()
    assert (calls.ended, calls.cancelled) == (1, 0)


async def test_what_is_kept_can_still_be_joined(flights: Coalescer[str], calls: Calls) -> None:
    calls.keep = True
    first = ask(flights, calls)
    await asyncio.sleep(5.0)
    await leave(first)
    assert await ask(flights, calls) == ("answer 1", True)
    assert calls.begun == 1


async def test_a_failure_is_everybodys(flights: Coalescer[str], calls: Calls) -> None:
    calls.error = ValueError("no")
    told = await asyncio.gather(*(ask(flights, calls) for _ in range(3)), return_exceptions=True)
    assert told == [calls.error] * 3


async def test_a_failure_that_nobody_hears_is_no_complaint_of_the_loop(flights: Coalescer[str], calls: Calls) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    calls.keep, calls.error = True, ValueError("no")
    alone = ask(flights, calls)
    await asyncio.sleep(5.0)
    await leave(alone)
    del alone
    await flights.finish()
    await asyncio.sleep(0.1)
    assert calls.ended == 1
    assert complaints == []


# --- Results that only one can have -----------------------------------------------------------------------------------


async def test_a_result_that_only_one_can_have_sends_the_others_on_their_own_way(
    flights: Coalescer[str], calls: Calls
) -> None:
    calls.result = "large"
    members = [ask(flights, calls) for _ in range(3)]
    assert await asyncio.gather(*members) == [("large 1", False), (None, True), (None, True)]
    assert calls.discarded == []


async def test_a_follower_has_it_when_the_leader_left(flights: Coalescer[str], calls: Calls) -> None:
    calls.result = "large"
    leader, follower = ask(flights, calls), ask(flights, calls)
    await asyncio.sleep(5.0)
    await leave(leader)
    assert await follower == ("large 1", True)
    assert calls.discarded == []


@pytest.mark.parametrize("result", ["large", "answer"])
async def test_one_that_nobody_took_is_freed_once(flights: Coalescer[str], calls: Calls, result: str) -> None:
    calls.result, calls.keep = result, True
    for _ in range(3):  # each joins the kept flight, and leaves
        member = ask(flights, calls)
        await asyncio.sleep(2.0)
        await leave(member)
    await flights.finish()
    await asyncio.sleep(0.1)
    assert calls.begun == 1
    assert calls.discarded == (["large 1"] if result == "large" else [])


async def test_who_leaves_in_the_tick_of_the_landing_does_not_lose_the_result(
    flights: Coalescer[str], calls: Calls
) -> None:
    calls.result = "large"
    member = ask(flights, calls)
    await asyncio.sleep(5.0)
    (task,) = flights._tasks
    task.add_done_callback(lambda _: member.cancel())
    await asyncio.wait([member])
    await asyncio.sleep(0.1)
    assert member.cancelled()
    assert calls.discarded == ["large 1"]
