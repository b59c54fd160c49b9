"""What is remembered of writes, for how long, how much of it, and what of it is there after a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.clock import Clock
from proxy.ledger import LARGEST_KEPT, MOST, MOST_KEYED_OF_ONE, Entry, Journal, Ledger
from proxy.policy.errors import Refusal
from proxy.policy.guarding import KEY_FOR, Write, WriteRules
from proxy.policy.messages import Response

pytestmark = pytest.mark.looptime

DONE = Response(200, (), b'{"success": true}')
UNKNOWN = Refusal(500, "outcome_unknown", "nobody knows")
LAUNCH = Write("fp", "alice", "PUT /launch/", "spend", "launch", "")
KEYED = replace(LAUNCH, key="key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.writes"


def ledger(path: Path | None = None, guard: float = 60.0, wall: float = 1e9) -> Ledger:
    loop = asyncio.get_running_loop()
    began = loop.time()
    return Ledger(Clock(lambda: wall + loop.time() - began), WriteRules(guard), Journal(path))


def sent(book: Ledger, write: Write = LAUNCH) -> Entry:
    entry = book.open(write)
    book.sent(entry)
    return entry


def done(book: Ledger, write: Write) -> Entry:
    entry = sent(book, write)
    book.ended(entry, DONE)
    book.told(entry)
    return entry


def orphan(book: Ledger, write: Write = LAUNCH, outcome: Response | Refusal = DONE) -> Entry:
    entry = sent(book, write)
    book.gone(entry)
    book.ended(entry, outcome)
    return entry


async def test_nobodys_many_keys_push_out_anothers_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.ledger.MOST_KEYED_OF_ONE", 20)
    monkeypatch.setattr("proxy.ledger.MOST_KEYED", 40)
    book = ledger()
    first = done(book, replace(KEYED, author="ada"))
    for author in ("bob", "eve"):
        for number in range(25):
            done(book, replace(LAUNCH, key=f"{author} {number}", author=author))
    assert book.open(replace(KEYED, author="ada")) is first
    assert len(book) == 40


async def test_nobodys_many_writes_push_out_anothers_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.ledger.MOST", 20)
    book = ledger()
    mine = replace(LAUNCH, fingerprint="mine", author="ada")
    entry = orphan(book, mine, UNKNOWN)
    for number in range(50):
        orphan(book, replace(LAUNCH, fingerprint=str(number), author="bob"), UNKNOWN)
    await asyncio.sleep(11)
    assert book.open(mine) is entry
    assert len(book) == 20


async def test_in_a_journal_of_an_older_version_the_author_is_the_credential(path: Path) -> None:
    done(ledger(path), replace(KEYED, author="alice"))
    path.write_text(path.read_text().replace(',"author":"alice"', ""))
    assert '"author"' not in path.read_text()
    assert ledger(path).open(replace(KEYED, author="alice")).write.author == "alice"


async def test_a_key_is_remembered_for_a_day_from_its_end() -> None:
    book = ledger()
    entry = sent(book, KEYED)
    await asyncio.sleep(3600)
    book.ended(entry, DONE)
    book.told(entry)
    await asyncio.sleep(KEY_FOR - 1)
    assert book.open(KEYED) is entry
    await asyncio.sleep(2)
    assert book.open(KEYED) is not entry


async def test_the_guard_counts_from_the_end_or_from_the_leaving_whichever_is_later() -> None:
    book = ledger()
    early, late = sent(book, LAUNCH), sent(book, replace(LAUNCH, fingerprint="other"))
    book.gone(early)
    await asyncio.sleep(100)
    book.ended(early, DONE)
    book.ended(late, DONE)
    await asyncio.sleep(55)
    book.told(late)
    await asyncio.sleep(4)
    book.unheard(late)
    found = book.open(LAUNCH)
    assert found is early
    book.gone(found)
    await asyncio.sleep(59)
    assert book.open(LAUNCH) is early  # its last listener has left 59 seconds ago
    assert book.open(late.write) is late


@pytest.mark.parametrize("ended", [True, False])
async def test_an_anonymous_write_is_never_adopted(ended: bool) -> None:
    book = ledger()
    nobody = replace(LAUNCH, credential="anonymous")
    entry = sent(book, nobody)
    book.gone(entry)
    if ended:
        book.ended(entry, UNKNOWN)
    assert book.open(nobody) is not entry
    assert book.again_from(nobody) is None


async def test_a_long_answer_is_remembered_by_its_status_only() -> None:
    book = ledger()
    entry = orphan(book, outcome=Response(201, (), b"x" * (LARGEST_KEPT + 1)))
    assert book.open(LAUNCH) is entry
    assert (entry.outcome, entry.what) == (None, "answered 201, at more length than is kept")
    book.told(entry)
    assert book.open(LAUNCH) is not entry


async def test_what_is_remembered_is_bounded() -> None:
    book = ledger()
    for number in range(MOST + 500):
        orphan(book, replace(LAUNCH, fingerprint=str(number), credential=str(number)))
        if number % 1000 == 0:
            await asyncio.sleep(1.01)
    assert len(book) <= MOST + 1000


async def test_one_who_uses_many_keys_makes_room_by_its_own_oldest() -> None:
    book = ledger()
    other = replace(KEYED, author="bob", key="bob's")
    first = done(book, other)
    done(book, KEYED)
    for number in range(MOST_KEYED_OF_ONE):
        done(book, replace(KEYED, key=str(number)))
    assert book.open(other) is first
    assert len(book) == MOST_KEYED_OF_ONE + 1


async def test_a_key_under_which_nothing_was_sent_is_not_kept() -> None:
    book = ledger()
    for leave in (book.gone, book.told):
        leave(book.open(KEYED))
        assert len(book) == 0
    entry = sent(book, KEYED)
    book.undone(entry)
    assert book.open(KEYED) is entry  # its client is still there
    book.gone(entry)
    book.gone(entry)
    assert len(book) == 0


async def test_an_answer_that_was_heard_is_not_kept_for_long() -> None:
    book = ledger()
    done(book, LAUNCH)
    await asyncio.sleep(11)
    book.keep()
    assert len(book) == 0


async def test_it_forgets_by_itself() -> None:
    book = ledger()
    for number in range(100):
        orphan(book, replace(LAUNCH, credential=str(number)))
    await asyncio.sleep(62)
    book.open(LAUNCH)
    assert len(book) == 0


# --- The journal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "age", "adopted"),
    [
        (["sent"], 59, True),
        (["sent"], 61, False),
        (["sent", "gone", "ended"], 59, True),
        (["sent", "gone", "ended"], 61, False),
        (["sent", "ended"], 10, True),
        (["sent", "unknown", "told"], 10, True),
        (["sent", "ended", "told"], 10, False),
        (["sent", "ended", "told", "unheard"], 10, True),
        (["sent", "undone"], 10, False),
        (["sent", "undone", "sent"], 10, True),
    ],
)
async def test_the_next_process_knows_what_nobody_has_heard_of(
    path: Path, events: list[str], age: float, adopted: bool
) -> None:
    book = ledger(path, wall=path_time(path))
    entry = book.open(LAUNCH)
    for event in events:
        match event:
            case "ended":
                book.ended(entry, DONE)
            case "unknown":
                book.ended(entry, UNKNOWN)
            case _:
                getattr(book, event)(entry)
    for _ in range(2):  # also when it is read and written anew
        again = ledger(path, wall=path_time(path) + age)
        found = again.open(LAUNCH)
        assert (found.name == entry.name) is adopted
        if adopted:
            assert found.lost
            again.told(found)


def path_time(path: Path) -> float:
    """Today: the age of a journal is told by the date of its file."""
    path.parent.mkdir(exist_ok=True)
    probe = path.parent / "probe"
    probe.touch()
    return probe.stat().st_mtime


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_a_clock_that_jumps_between_two_processes_does_no_harm(path: Path, jump: float) -> None:
    now = path_time(path)
    orphan(ledger(path, wall=now))
    again = ledger(path, wall=now + jump)
    assert again.open(LAUNCH).lost is (jump < 0)
    await asyncio.sleep(61)
    assert not again.open(LAUNCH).lost


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0\xff",
        b"[]\n3\n",
        b"[" * 100_000,
        b'{"id":"x","event":"sent"}\n',
        b'{"id":"x","event":"ended","at":1,"what":""}\n{"id',
    ],
)
async def test_what_cannot_be_read_is_passed_over(path: Path, text: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    assert len(ledger(path)) == 0


@pytest.mark.parametrize(
    ("between", "adopted"),
    [
        (replace(LAUNCH, fingerprint="other", noun="asks", subject="7"), True),
        (replace(LAUNCH, fingerprint="other", name="DELETE /i/{id}/", noun="instances", subject="5"), False),
    ],
)
async def test_what_was_overtaken_is_not_told_by_the_next_process_either(
    path: Path, between: Write, adopted: bool
) -> None:
    now = path_time(path)
    book = ledger(path, wall=now)
    entry = orphan(book, outcome=Response(200, (), b'{"success": true, "new_contract": 5}'))
    done(book, between)
    assert ledger(path, wall=now).open(LAUNCH).lost is adopted
    assert (book.open(LAUNCH) is entry) is adopted


async def test_what_only_sets_a_state_is_sent_by_the_next_process(path: Path) -> None:
    now = path_time(path)
    stop = replace(LAUNCH, effect="write")
    orphan(ledger(path, wall=now), stop)
    assert not ledger(path, wall=now).open(stop).lost


async def test_what_was_overtaken_by_something_that_was_not_done_was_not() -> None:
    book = ledger()
    first = orphan(book, replace(LAUNCH, subject="7"))
    second = sent(book, replace(LAUNCH, subject="7", fingerprint="other"))
    book.undone(second)
    assert book.open(first.write) is first


async def test_a_day_is_a_day_over_a_restart(path: Path) -> None:
    now = path_time(path)
    done(ledger(path, wall=now), KEYED)
    assert ledger(path, wall=now + 23 * 3600).open(KEYED).lost
    assert not ledger(path, wall=now + 25 * 3600).open(KEYED).lost


@pytest.mark.parametrize("at", ["NaN", "Infinity", "1e300", "-1e300"])
async def test_a_date_that_is_none_does_no_harm(path: Path, at: str) -> None:
    now = path_time(path)
    sent(ledger(path, wall=now), KEYED)
    path.write_text(re.sub(r'"at":[0-9.]+', f'"at":{at}', path.read_text()))
    entry = ledger(path, wall=now).open(KEYED)
    assert entry.sent is None or entry.sent_on <= now


async def test_a_line_that_was_cut_short_takes_no_other_with_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = path_time(path)
    book = ledger(path, wall=now)
    write = os.write
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
        sent(book, replace(LAUNCH, fingerprint="lost"))
    entry = sent(book)
    assert ledger(path, wall=now).open(LAUNCH).name == entry.name


async def test_a_last_line_cut_in_half_takes_no_other_with_it(path: Path) -> None:
    now = path_time(path)
    book = ledger(path, wall=now)
    entry = sent(book)
    sent(book, replace(LAUNCH, fingerprint="other"))
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert ledger(path, wall=now).open(LAUNCH).name == entry.name


async def test_it_is_written_anew_before_it_is_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "LONG", 50_000)
    book = ledger(path, wall=path_time(path))
    kept = sent(book)
    for _ in range(500):
        entry = sent(book, replace(LAUNCH, fingerprint="other"))
        book.ended(entry, DONE)
        book.told(entry)
        await asyncio.sleep(2)
        book.keep()
    assert path.stat().st_size < 60_000
    assert ledger(path, wall=path_time(path)).open(LAUNCH).name == kept.name


async def test_a_place_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        book = ledger(tmp_path / "file" / "state.writes")
        for _ in range(3):
            sent(book)
            book.keep()
    assert len(caplog.records) == 1
    assert "journal of writes" in caplog.text


async def test_a_line_is_whole_json_and_has_no_more_than_digests(path: Path) -> None:
    orphan(ledger(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["sent", "ended"]
    assert path.stat().st_mode & 0o077 == 0
