"""Every write that was sent, for as long as it may be asked for again: so that nothing is done twice.

A write whose outcome nobody has heard is an orphan: its client left while it was upstream, or what came of it is not
known. The same write, asked for again in time, gets the orphan's outcome and is not sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .clock import Clock
from .policy import guarding
from .policy.errors import Refusal
from .policy.guarding import KEY_FOR, Write, WriteRules
from .policy.messages import Response
from .policy.routing import Effect

MOST, MOST_KEYED, MOST_KEYED_OF_ONE = 20_000, 20_000, 5000
"""Writes remembered: without a key, by Idempotency-Key, and of those of one author."""
LARGEST_KEPT = 64 * 1024
"""Bytes of an answer that are kept; of a longer one only its status is."""
HEARD_FOR = 10.0
"""Seconds after which a client that was told and has not been heard of has heard."""
SWEEP_EVERY = 10.0
log = logging.getLogger(__name__)


class Entry:
    """One write and what is known of its end. Read by anybody, changed by the ledger only."""

    __slots__ = (
        "ended", "heard", "left", "listeners", "lost", "made", "name", "outcome", "overtaken_by", "sent", "sent_on",
        "story", "until_on", "what", "write",
    )  # fmt: skip

    def __init__(self, name: str, write: Write) -> None:
        self.name = name
        self.write = write
        self.listeners = 0
        """Clients that wait for its outcome, or are being told."""
        self.sent: float | None = None
        """Monotonic seconds; None: not yet, or it was refused since."""
        self.sent_on = 0.0
        """The same as a date, epoch seconds."""
        self.ended: float | None = None
        self.outcome: Response | Refusal | None = None
        """What came of it; None while it is under way, and where it is not kept."""
        self.lost = False
        """It has ended, and nobody knows or can be told what came of it."""
        self.what = ""
        """The outcome in words, where it is not kept."""
        self.until_on: float | None = None
        """Where its outcome cannot be told: the date from which on the same is sent again; None: at once."""
        self.heard: float | None = None
        """When a client was told the outcome: there is nothing left to adopt."""
        self.left = 0.0
        """When the last client left without having heard."""
        self.made = ""
        """What it made, by id."""
        self.overtaken_by: set[str] = set()
        """Names of writes to the same thing that were sent since."""
        self.story = b""
        """Its lines in the journal."""


class Ledger:
    """Owns every entry, and the journal by which they outlive the process."""

    def __init__(self, clock: Clock, rules: WriteRules, journal: Journal) -> None:
        self.clock = clock
        self.rules = rules
        self._journal = journal
        self._run = f"{clock.wall():.6f}"
        self._numbers = itertools.count(1)
        # Those that were sent without a key, by credential, oldest first; and those with one, by it.
        self._sent: dict[str, deque[Entry]] = {}
        self._count = 0
        self._keyed: dict[str, Entry] = {}
        self._keyed_of: Counter[str] = Counter()
        self._swept = clock.now()
        self._restore(journal.read(clock.wall()))
        self._rewrite()

    def __repr__(self) -> str:
        return f"<Ledger {self._count} writes, {len(self._keyed)} by Idempotency-Key>"

    def __len__(self) -> int:
        return self._count + len(self._keyed)

    # --- Asked for ----------------------------------------------------------------------------------------------------

    def open(self, write: Write) -> Entry:
        """The entry of a write, with one more listener: the orphan that it adopts, or a new one.

        Raises Refusal: 422 for an Idempotency-Key that came with another request, 503 when there are too many of them.
        """
        self._sweep()
        entry = self._same_key(write) if write.key else self._orphan(write)
        if entry is None:
            entry = Entry(f"{self._run}.{next(self._numbers)}", write)
            if write.key:
                self._make_room(write.author)
                self._keyed[write.key] = entry
                self._keyed_of[write.author] += 1
        entry.listeners += 1
        return entry

    def _same_key(self, write: Write) -> Entry | None:
        entry = self._keyed.get(write.key)
        if entry is None:
            return None
        if self._is_past(entry, self.clock.now()):
            self._forget_key(entry)
            return None
        if entry.write.fingerprint != write.fingerprint:
            raise guarding.conflict()
        return entry

    def _orphan(self, write: Write) -> Entry | None:
        if not self.rules.guard or not write.adoptable:
            return None
        now = self.clock.now()
        for entry in self._sent.get(write.credential, ()):
            same = entry.write.fingerprint == write.fingerprint and not entry.overtaken_by
            if same and self._is_orphan(entry, now):
                return entry
        return None

    def _is_orphan(self, entry: Entry, now: float) -> bool:
        if entry.ended is None:
            return not entry.listeners
        if entry.lost:
            return now < entry.ended + self.rules.guard
        return entry.heard is None and not entry.listeners and not self._is_past(entry, now)

    def _is_past(self, entry: Entry, now: float) -> bool:
        """Nobody can adopt it any more."""
        if entry.ended is None:
            return False
        if entry.write.key:
            return now >= entry.ended + KEY_FOR
        if entry.heard is not None:
            return now >= entry.heard + HEARD_FOR
        return now >= (entry.ended if entry.lost else max(entry.ended, entry.left)) + self.rules.guard

    # --- What becomes of it -------------------------------------------------------------------------------------------

    def sent(self, entry: Entry) -> None:
        """Its bytes are about to go out."""
        now, entry.sent_on = self.clock.now(), self.clock.wall()
        if entry.sent is None:
            self._tell(entry, "sent", at=entry.sent_on, write=asdict(entry.write))
            mine = self._sent.setdefault(entry.write.credential, deque())
            for earlier in mine:
                if guarding.overtakes(entry.write, earlier.write, earlier.made):
                    earlier.overtaken_by.add(entry.name)
            if not entry.write.key:
                mine.append(entry)
                self._count += 1
            elif not mine:
                del self._sent[entry.write.credential]
        entry.sent = now

    def undone(self, entry: Entry) -> None:
        """It was not done, or does no harm if it is done again: who asks for it from now on has it sent."""
        if entry.sent is not None:
            entry.sent = None
            self._tell(entry, "undone")
            mine = self._sent.get(entry.write.credential, deque())
            for earlier in mine:
                earlier.overtaken_by.discard(entry.name)
            if entry in mine:
                mine.remove(entry)
                self._count -= 1
                if not mine:
                    del self._sent[entry.write.credential]
        self._forget_unused(entry)

    def again_from(self, write: Write) -> float | None:
        """The date (epoch seconds) from which on a write that ended now, unknown, is sent again; None: at once."""
        if write.key:
            return self.clock.wall() + KEY_FOR
        return self.clock.wall() + self.rules.guard if self.rules.guard and write.adoptable else None

    def ended(self, entry: Entry, outcome: Response | Refusal) -> None:
        """It was answered, or never will be."""
        entry.ended, entry.outcome = self.clock.now(), outcome
        entry.until_on = self.again_from(entry.write)
        if isinstance(outcome, Response):
            entry.what = f"answered {outcome.status}"
            entry.made = guarding.made(outcome)
            if outcome.rest is not None or len(outcome.body) > LARGEST_KEPT:
                entry.outcome, entry.what = None, f"{entry.what}, at more length than is kept"
        else:
            entry.lost = True
        self._tell(entry, "ended", at=self.clock.wall(), what=entry.what, made=entry.made)

    def told(self, entry: Entry) -> None:
        """A client has been told what came of it, or that it was not done."""
        entry.listeners -= 1
        if entry.ended is not None and not entry.lost and entry.heard is None:
            entry.heard = self.clock.now()
            self._tell(entry, "heard")
        self._forget_unused(entry)

    def gone(self, entry: Entry) -> None:
        """A client left before it was told."""
        entry.listeners -= 1
        entry.left = self.clock.now()
        self._forget_unused(entry)

    def unheard(self, entry: Entry) -> None:
        """A client that was told turned out to have left before it could hear it."""
        now = self.clock.now()
        if entry.heard is not None and not self._is_past(entry, now):
            entry.heard, entry.left = None, now
            self._tell(entry, "unheard", at=self.clock.wall())

    def _tell(self, entry: Entry, event: str, **more: object) -> None:
        line = json.dumps({"id": entry.name, "event": event, **more}, separators=(",", ":")).encode() + b"\n"
        entry.story = line if event == "sent" else entry.story + line
        self._journal.append(line)

    # --- Forgetting ---------------------------------------------------------------------------------------------------

    def _forget_unused(self, entry: Entry) -> None:
        """A key under which nothing was sent, and for which nobody waits."""
        if entry.write.key and entry.sent is None and not entry.listeners:
            self._forget_key(entry)

    def _forget_key(self, entry: Entry) -> None:
        if self._keyed.get(entry.write.key) is entry:
            del self._keyed[entry.write.key]
            self._keyed_of[entry.write.author] -= 1

    def _make_room(self, author: str) -> None:
        """For one more key: of the same author's, or of whoever has the most, the one goes that ended first."""
        if self._keyed_of[author] < MOST_KEYED_OF_ONE:
            if len(self._keyed) < MOST_KEYED:
                return
            author = self._keyed_of.most_common(1)[0][0]
        for entry in self._keyed.values():
            if entry.ended is not None and not entry.listeners and entry.write.author == author:
                self._forget_key(entry)
                return
        raise Refusal(503, "overloaded", "too many Idempotency-Keys are in use at this moment", 5)

    def _sweep(self) -> None:
        """Now and then: what nobody can adopt any more goes."""
        now = self.clock.now()
        if now - self._swept < (SWEEP_EVERY if self._count < MOST else 1.0):
            return
        self._swept = now
        kept = [entry for mine in self._sent.values() for entry in mine if not self._is_past(entry, now)]
        if len(kept) > MOST:
            kept = _shared_out(kept, MOST, now)
        self._sent, self._count = {}, len(kept)
        for entry in kept:
            self._sent.setdefault(entry.write.credential, deque()).append(entry)
        for entry in [entry for entry in self._keyed.values() if self._is_past(entry, now)]:
            self._forget_key(entry)
        self._keyed_of = +self._keyed_of

    # --- Kept over a restart ------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """To be called every few seconds: what is past goes, and the journal shows until when this process lived."""
        self._sweep()
        if any(entry.sent is not None and entry.ended is None for entry in self._everything()):
            self._journal.touch()
        if self._journal.is_long():
            self._rewrite()

    def _everything(self) -> Iterable[Entry]:
        return itertools.chain(*self._sent.values(), self._keyed.values())

    def _rewrite(self) -> None:
        self._journal.replace(b"".join(entry.story for entry in self._everything() if entry.sent is not None))

    def _restore(self, found: Iterable[Old]) -> None:
        """Nobody here knows what was answered to these: what can be told is that they were sent."""
        now, wall = self.clock.now(), self.clock.wall()
        for old in found:
            span = KEY_FOR if old.write.key else self.rules.guard
            age = max(0.0, wall - old.at)
            if age >= span:
                continue
            entry = Entry(old.name, old.write)
            entry.sent, entry.ended, entry.sent_on = now - age, now - age, old.sent_on
            entry.until_on, entry.lost, entry.story = wall - age + span, True, old.story
            entry.what = f"{old.what or 'no answer had come'} when vast-proxy was started anew"
            if old.write.key:
                self._keyed[old.write.key] = entry
                self._keyed_of[old.write.author] += 1
            else:
                self._sent.setdefault(old.write.credential, deque()).append(entry)
                self._count += 1


def _shared_out(entries: list[Entry], most: int, now: float) -> list[Entry]:
    """So many of them, the last of each author: nobody's many push out another's few."""
    by_author: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.ended or now):
        by_author.setdefault(entry.write.author, []).append(entry)
    kept: list[Entry] = []
    smallest_first = sorted(by_author.values(), key=len)
    for number, mine in enumerate(smallest_first):
        share = (most - len(kept)) // (len(smallest_first) - number)
        kept += mine[max(0, len(mine) - share) :]
    return kept


# --- The file ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Old:
    """A write of an earlier process that may be asked for again here."""

    name: str
    write: Write
    sent_on: float
    """Epoch seconds."""
    at: float
    """The date of its end, of its client's leaving, or on which the process was last seen alive."""
    story: bytes
    what: str = ""
    """What it was answered, if that much is known."""
    made: str = ""
    heard: bool = False
    overtaken: bool = False


class Journal:
    """A file with a line for each thing that happened to a write, readable by its owner only. Owns the file.

    A write's line is there before its bytes go out: whatever happens to this process, the next one knows of it. It is
    not forced to the disk, since with the machine its clients go down as well. No key, body or answer is in it.
    """

    LONG = 4 * 1024 * 1024
    """Bytes from which on it is to be written anew with what still matters, if that is less than half."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None remembers nothing."""
        self.path = path
        self._length = self._least = 0
        self._torn = False

    def read(self, wall: float) -> list[Old]:
        """Those with a key, and those that cost money and that nobody has heard of. What is no line is passed over.

        What only sets a state is not among them: to send it again does no harm, and not to do it might.
        """
        if self.path is None:
            return []
        try:
            alive_on = self.path.stat().st_mtime
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._complain("read", error)
            return []
        replay = _Replay(min(alive_on, wall), wall)
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                replay.play(json.loads(line), line)
        return [old for old in replay.found.values() if old.write.key or _matters(old)]

    def append(self, line: bytes) -> None:
        """One more line."""
        if self.path is None:
            return
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                whole = b"\n" + line if self._torn else line  # what was cut short takes no other with it
                self._torn = True
                if os.write(handle, whole) == len(whole):
                    self._torn = False
            finally:
                os.close(handle)
            self._length += len(line)
        except OSError as error:
            self._complain("written", error)

    def touch(self) -> None:
        """This process is still alive."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def is_long(self) -> bool:
        """Is it to be written anew?"""
        return self._length > max(self.LONG, 2 * self._least)

    def replace(self, lines: bytes) -> None:
        """Put these in the place of all that is there, in one step."""
        if self.path is None:
            return
        self._length = self._least = len(lines)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".writes-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(lines)
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._complain("written", error)

    def _complain(self, what: str, error: OSError) -> None:
        why = error.strerror
        log.warning("journal of writes %s cannot be %s (%s): a restart forgets them", self.path, what, why)
        self.path = None


class _Replay:
    """Lines of a journal, played one after the other."""

    def __init__(self, alive_on: float, wall: float) -> None:
        self.found: dict[str, Old] = {}
        # Those without a key of which nobody has heard: they alone can be overtaken.
        self._unheard: dict[str, Old] = {}
        self._alive_on = alive_on
        self._wall = wall

    def play(self, event: dict[str, Any], line: bytes) -> None:
        """One line. Raises what a line that is none makes Python raise."""
        name = event["id"]
        if event["event"] == "sent":
            write = Write(**{"author": event["write"]["credential"], **event["write"]})
            old = Old(name, write, self._date(event), self._alive_on, line)
            for earlier in self._unheard.values():
                earlier.overtaken |= guarding.overtakes(old.write, earlier.write, earlier.made)
            self.found[name] = old
            if not old.write.key:
                self._unheard[name] = old
            return
        old = self.found[name]
        match event["event"]:
            case "undone":
                del self.found[name]
                self._unheard.pop(name, None)
                return
            case "ended":
                old.at, old.what, old.made = self._date(event), event["what"], event["made"]
            case "heard":
                old.heard = True
                self._unheard.pop(name, None)
            case "unheard":
                old.heard, old.at = False, self._date(event)
                if not old.write.key:
                    self._unheard[name] = old
        old.story += line

    def _date(self, event: dict[str, Any]) -> float:
        """Epoch seconds; one in the future is of a clock that was wrong."""
        at = float(event["at"])
        if not math.isfinite(at):
            raise ValueError
        return min(at, self._wall)


def _matters(old: Old) -> bool:
    return not old.heard and not old.overtaken and old.write.adoptable and old.write.effect != Effect.WRITE
