"""One exam for everything that can be a Store; what is special to each comes after it."""

from __future__ import annotations

import asyncio

import pytest

from proxy.clock import Clock
from proxy.store import MemoryStore, Store

pytestmark = pytest.mark.looptime


@pytest.fixture(params=["memory"])
async def store(request: pytest.FixtureRequest) -> Store:
    return MemoryStore(Clock(), 1024 * 1024)


# --- The exam ---------------------------------------------------------------------------------------------------------


async def test_what_is_set_is_kept_for_its_time_and_no_longer(store: Store) -> None:
    await store.set("k", b"\x00value\xff", 10.0)
    await asyncio.sleep(9.9)
    assert await store.get("k") == b"\x00value\xff"
    await asyncio.sleep(0.2)
    assert await store.get("k") is None


async def test_what_was_never_set_is_not_there(store: Store) -> None:
    assert await store.get("k") is None


async def test_a_later_value_takes_the_place_of_an_earlier_one_and_has_its_own_time(store: Store) -> None:
    await store.set("k", b"1", 10.0)
    await asyncio.sleep(8.0)
    await store.set("k", b"2", 10.0)
    await asyncio.sleep(8.0)
    assert await store.get("k") == b"2"


async def test_a_value_with_no_time_to_live_is_not_kept(store: Store) -> None:
    await store.set("k", b"1", 0.0)
    assert await store.get("k") is None


async def test_an_empty_value_is_a_value(store: Store) -> None:
    await store.set("k", b"", 10.0)
    assert await store.get("k") == b""
    assert await store.swap("e", None, b"", 10.0)
    assert not await store.swap("e", None, b"1", 10.0)
    assert await store.swap("e", b"", b"1", 10.0)


async def test_the_stores_time_goes_on_as_ours_does(store: Store) -> None:
    before = await store.now()
    await asyncio.sleep(5.0)
    assert await store.now() - before == pytest.approx(5.0, abs=0.1)


async def test_a_swap_needs_what_is_there(store: Store) -> None:
    assert not await store.swap("k", b"0", b"1", 60.0)
    assert await store.get("k") is None
    assert await store.swap("k", None, b"1", 60.0)
    assert not await store.swap("k", None, b"2", 60.0)
    assert not await store.swap("k", b"0", b"2", 60.0)
    assert await store.get("k") == b"1"
    assert await store.swap("k", b"1", b"2", 60.0)
    assert await store.get("k") == b"2"


async def test_what_was_swapped_in_is_gone_after_its_time(store: Store) -> None:
    await store.swap("k", None, b"1", 10.0)
    await asyncio.sleep(10.1)
    assert await store.get("k") is None
    assert not await store.swap("k", b"1", b"2", 10.0)
    assert await store.swap("k", None, b"2", 10.0)


async def test_a_swap_that_failed_does_not_prolong_what_is_there(store: Store) -> None:
    await store.swap("k", None, b"1", 10.0)
    await asyncio.sleep(8.0)
    await store.swap("k", None, b"2", 10.0)
    await asyncio.sleep(2.1)
    assert await store.get("k") is None


async def test_of_two_swaps_from_the_same_value_one_wins(store: Store) -> None:
    won = await asyncio.gather(*(store.swap("k", None, who, 60.0) for who in (b"a", b"b")))
    assert sorted(won) == [False, True]
    assert await store.get("k") == (b"a" if won[0] else b"b")


async def test_a_hundred_who_count_by_swapping_lose_no_count(store: Store) -> None:
    async def add_one() -> None:
        while True:
            old = await store.get("n")
            await asyncio.sleep(0)  # let the others read the same
            if await store.swap("n", old, str(int(old or b"0") + 1).encode(), 60.0):
                return

    await asyncio.gather(*(add_one() for _ in range(100)))
    assert await store.get("n") == b"100"


async def test_keys_have_nothing_to_do_with_each_other(store: Store) -> None:
    await store.set("a", b"1", 10.0)
    await store.swap("b", None, b"2", 10.0)
    await store.set("ä/ \n", b"3", 10.0)
    assert [await store.get(key) for key in ("a", "b", "ä/ \n", "c")] == [b"1", b"2", b"3", None]


# --- Our own memory ---------------------------------------------------------------------------------------------------

OVERHEAD = 200


def room_for_three() -> MemoryStore:
    """Values of a hundred bytes. Made inside each test: only there the loop's time is the virtual one."""
    return MemoryStore(Clock(), 3 * (100 + OVERHEAD))


async def held(memory: MemoryStore, keys: str) -> str:
    """Which of the keys are still there."""
    return "".join([key for key in keys if await memory.get(key) is not None])


async def test_the_least_recently_used_makes_room() -> None:
    memory = room_for_three()
    for key in "abc":
        await memory.set(key, b"x" * 100, 60.0)
    await memory.get("a")
    await memory.set("d", b"x" * 100, 60.0)
    assert await held(memory, "abcd") == "acd"
    assert (memory.entries, memory.size, memory.evictions) == (3, memory.max_bytes, 1)


async def test_the_bound_counts_bytes_and_what_an_entry_costs_beside_them() -> None:
    memory = room_for_three()
    for number in range(100):
        await memory.set(f"k{number}", b"x" * number, 60.0)
        assert memory.size <= memory.max_bytes
    assert memory.entries <= 4


async def test_a_value_larger_than_all_there_is_leaves_nothing_behind() -> None:
    memory = room_for_three()
    for key in "ab":
        await memory.set(key, b"x" * 100, 60.0)
    await memory.set("a", b"x" * 10_000, 60.0)
    assert await held(memory, "ab") == "b"


async def test_what_is_past_its_time_makes_room_first_and_is_no_eviction() -> None:
    memory = room_for_three()
    await memory.set("a", b"x" * 100, 60.0)
    await memory.set("b", b"x" * 100, 1.0)
    await memory.set("c", b"x" * 100, 60.0)
    await asyncio.sleep(2.0)
    await memory.set("d", b"x" * 100, 60.0)
    assert await held(memory, "abcd") == "acd"
    assert memory.evictions == 0


async def test_what_was_swapped_in_is_never_pushed_out() -> None:
    memory = room_for_three()
    for number in range(100):
        assert await memory.swap(f"epoch{number}", None, b"1", 60.0)
        await memory.set(f"k{number}", b"x" * 100, 60.0)
    assert [await memory.get(f"epoch{number}") for number in range(100)] == [b"1"] * 100
    assert memory.size <= memory.max_bytes


async def test_swapped_values_past_their_time_are_swept() -> None:
    memory = room_for_three()
    for number in range(100):
        await memory.swap(f"epoch{number}", None, b"1", 60.0)
    await asyncio.sleep(1000.0)
    await memory.swap("last", None, b"1", 60.0)
    assert list(memory._kept) == ["last"]


async def test_a_smaller_bound_keeps_what_was_used_last() -> None:
    memory = room_for_three()
    for key, ttl in (("a", 50.0), ("b", 40.0), ("c", 60.0)):
        await memory.set(key, b"x" * 100, ttl)
    await memory.get("a")
    await memory.swap("epoch", None, b"1", 60.0)
    memory.resize(2 * (100 + OVERHEAD))
    assert await held(memory, "abc") == "ac"
    assert (memory.entries, memory.size, memory.evictions) == (2, memory.max_bytes, 1)
    assert await memory.get("epoch") == b"1"
    memory.resize(OVERHEAD)
    assert (memory.entries, memory.size, memory.evictions) == (0, 0, 3)


async def test_another_bound_gives_nothing_a_longer_life() -> None:
    memory = room_for_three()
    await memory.set("a", b"x" * 100, 10.0)
    await memory.set("b", b"x" * 100, 5.0)
    await asyncio.sleep(8.0)
    memory.resize(100_000)
    assert await held(memory, "ab") == "a"
    await asyncio.sleep(3.0)
    assert await held(memory, "ab") == ""


async def test_the_dashboard_shows_entries_and_bytes() -> None:
    memory = room_for_three()
    await memory.set("a", b"x" * 100, 10.0)
    assert repr(memory) == "<MemoryStore 1 entries, 300/900 bytes>"
