"""Every write that was sent, for as long as it may be asked for again: so that nothing is done twice.

A write whose outcome nobody has heard is an orphan: its client left while it was upstream, or what came of it is not
known. The same write, asked for again in time, gets the orphan's outcome and is not sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cachetools import TTLCache

from .clock import Clock
from .policy import guarding
from .policy.errors import Refusal
from .policy.guarding import KEY_FOR, Write, WriteRules
from .policy.messages import Response

MOST = 20_000
"""Writes remembered without a key; beyond it those that ended first are forgotten."""
MOST_KEYED_BYTES, OVERHEAD = 32 * 1024 * 1024, 1024
"""What may be remembered by Idempotency-Key, and what each costs beside its answer."""
LARGEST_KEPT = 64 * 1024
"""Bytes of an answer that are kept; of a longer one only its status is."""
log = logging.getLogger(__name__)


class Entry:
    """One write and what is known of its end. Read by anybody, changed by the ledger only."""

    __slots__ = (
        "ended", "heard", "left", "listeners", "name", "outcome", "overtaken", "sent", "sent_on", "until_on", "what",
        "write",
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
        self.what = ""
        """The outcome in words, where it is not kept."""
        self.until_on: float | None = None
        """Where its outcome cannot be told: the date from which on the same is sent again; None: at once."""
        self.heard = False
        """A client has been told the outcome, so there is nothing left to adopt."""
        self.left = 0.0
        """When the last client left without having heard."""
        self.overtaken = False
        """Another write to the same thing was sent since."""

    @property
    def untold(self) -> bool:
        """It has ended, and what came of it is not known or not kept: nobody ever hears it."""
        return self.ended is not None and not isinstance(self.outcome, Response)


class Ledger:
    """Owns every entry, and the journal by which they outlive the process."""

    def __init__(self, clock: Clock, rules: WriteRules, journal: Journal) -> None:
        self.clock = clock
        self.rules = rules
        self._journal = journal
        self._run = f"{clock.wall():.6f}"
        self._numbers = itertools.count(1)
        # Those that were sent without a key, by caller and kind of thing, oldest first; and those with one, by it.
        self._sent: dict[tuple[str, str], deque[Entry]] = {}
        self._count = 0
        self._keyed: TTLCache[str, Entry] = TTLCache(MOST_KEYED_BYTES, KEY_FOR, clock.now, _size)
        self._swept = clock.now()
        self._restore(journal.read())
        self._rewrite()

    def __repr__(self) -> str:
        return f"<Ledger {self._count} writes, {len(self._keyed)} by Idempotency-Key>"

    def __len__(self) -> int:
        return self._count + len(self._keyed)

    # --- Asked for ----------------------------------------------------------------------------------------------------

    def open(self, write: Write) -> Entry:
        """The entry of a write, with one more listener: the orphan that it adopts, or a new one.

        Raises Refusal (422) for an Idempotency-Key that came with another request.
        """
        self._sweep()
        entry = self._same_key(write) if write.key else self._orphan(write)
        if entry is None:
            entry = Entry(f"{self._run}.{next(self._numbers)}", write)
            if write.key:
                self._keyed[write.key] = entry
        entry.listeners += 1
        return entry

    def _same_key(self, write: Write) -> Entry | None:
        entry = self._keyed.get(write.key)
        if entry is not None and entry.write.fingerprint != write.fingerprint:
            raise guarding.conflict()
        return entry

    def _orphan(self, write: Write) -> Entry | None:
        if not self.rules.guard or write.anonymous:
            return None
        now = self.clock.now()
        for entry in self._sent.get(_scope(write), ()):
            same = entry.write.fingerprint == write.fingerprint and not entry.overtaken
            if same and self._is_orphan(entry, now):
                return entry
        return None

    def _is_orphan(self, entry: Entry, now: float) -> bool:
        if entry.ended is None:
            return not entry.listeners
        if entry.untold:
            return now < entry.ended + self.rules.guard
        return not entry.heard and not entry.listeners and not self._is_past(entry, now)

    def _is_past(self, entry: Entry, now: float) -> bool:
        return entry.ended is not None and now >= max(entry.ended, entry.left) + self.rules.guard

    # --- What becomes of it -------------------------------------------------------------------------------------------

    def sent(self, entry: Entry) -> None:
        """Its bytes are about to go out."""
        now, entry.sent_on = self.clock.now(), self.clock.wall()
        if entry.sent is None:
            self._journal.append(_sent_line(entry))
            if not entry.write.key:
                scope = self._sent.setdefault(_scope(entry.write), deque())
                for earlier in scope:
                    earlier.overtaken |= guarding.overtakes(entry.write, earlier.write)
                scope.append(entry)
                self._count += 1
        entry.sent = now

    def undone(self, entry: Entry) -> None:
        """It was not done, or does no harm if it is done again: who asks for it from now on has it sent."""
        if entry.sent is None:
            return
        entry.sent = None
        self._journal.append({"id": entry.name, "event": "undone"})
        scope = self._sent.get(_scope(entry.write), deque())
        if entry in scope:
            scope.remove(entry)
            self._count -= 1

    def again_from(self, write: Write) -> float | None:
        """The date (epoch seconds) from which on a write that ended now, untold, is sent again; None: at once."""
        if write.key:
            return self.clock.wall() + KEY_FOR
        return self.clock.wall() + self.rules.guard if self.rules.guard and not write.anonymous else None

    def ended(self, entry: Entry, outcome: Response | Refusal) -> None:
        """It was answered, or never will be."""
        entry.ended, entry.outcome = self.clock.now(), outcome
        entry.until_on = self.again_from(entry.write)
        answer = f"answered {outcome.status}" if isinstance(outcome, Response) else ""
        if isinstance(outcome, Response) and (outcome.rest is not None or len(outcome.body) > LARGEST_KEPT):
            entry.outcome, entry.what = None, f"{answer}, at more length than is kept"
        self._journal.append(self._ended_line(entry, answer))
        if entry.write.key in self._keyed:
            self._keyed[entry.write.key] = entry  # weighed anew

    def told(self, entry: Entry) -> None:
        """A client has been told what came of it, or that it was not done."""
        entry.listeners -= 1
        if entry.ended is not None and not entry.untold and not entry.heard:
            entry.heard = True
            self._journal.append({"id": entry.name, "event": "heard"})

    def gone(self, entry: Entry) -> None:
        """A client left before it was told."""
        entry.listeners -= 1
        entry.left = self.clock.now()

    def unheard(self, entry: Entry) -> None:
        """A client that was told turned out to have left before it could hear it."""
        if entry.heard:
            entry.heard, entry.left = False, self.clock.now()
            self._journal.append({"id": entry.name, "event": "unheard", "at": self.clock.wall()})

    # --- Forgetting ---------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Now and then: what nobody can adopt any more goes."""
        now = self.clock.now()
        if now - self._swept < (self.rules.guard + 1.0 if self._count < MOST else 1.0):
            return
        self._swept = now
        kept = [entry for scope in self._sent.values() for entry in scope if not self._is_past(entry, now)]
        if len(kept) > MOST:
            kept = sorted(kept, key=lambda entry: entry.ended or now)[-MOST:]
        self._sent, self._count = {}, len(kept)
        for entry in kept:
            self._sent.setdefault(_scope(entry.write), deque()).append(entry)

    # --- Kept over a restart ------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """To be called every few seconds: the journal shows until when this process lived, and grows not for ever."""
        if any(entry.sent is not None and entry.ended is None for entry in self._everything()):
            self._journal.touch()
        if self._journal.is_long():
            self._sweep()
            self._rewrite()

    def _everything(self) -> list[Entry]:
        return [*itertools.chain.from_iterable(self._sent.values()), *self._keyed.values()]

    def _rewrite(self) -> None:
        lines: list[Event] = []
        for entry in self._everything():
            if entry.sent is None:
                continue
            lines.append(_sent_line(entry))
            if entry.ended is not None:
                answer = f"answered {entry.outcome.status}" if isinstance(entry.outcome, Response) else entry.what
                lines.append(self._ended_line(entry, answer))
            if entry.heard:
                lines.append({"id": entry.name, "event": "heard"})
        self._journal.replace(lines)

    def _ended_line(self, entry: Entry, answer: str) -> Event:
        assert entry.ended is not None
        on = self.clock.wall() - (self.clock.now() - entry.ended)
        return {"id": entry.name, "event": "ended", "at": on, "what": answer}

    def _restore(self, found: Iterable[Old]) -> None:
        """Nobody here knows what was answered to these: what can be told is that they were sent."""
        now, wall = self.clock.now(), self.clock.wall()
        for old in found:
            span = KEY_FOR if old.write.key else self.rules.guard
            age = max(0.0, wall - old.at)  # a date in the future is of a clock that was wrong
            if age >= span:
                continue
            entry = Entry(old.name, old.write)
            entry.sent, entry.ended, entry.sent_on = now - age, now - age, old.sent_on
            entry.until_on = wall - age + span
            entry.what = f"{old.what or 'no answer had come'} when vast-proxy was started anew"
            if old.write.key:
                self._keyed[old.write.key] = entry
            else:
                self._sent.setdefault(_scope(old.write), deque()).append(entry)
                self._count += 1


def _scope(write: Write) -> tuple[str, str]:
    return write.credential, write.noun


def _size(entry: Entry) -> int:
    return OVERHEAD + (len(entry.outcome.body) if isinstance(entry.outcome, Response) else 0)


# --- The file ---------------------------------------------------------------------------------------------------------

Event = dict[str, Any]


def _sent_line(entry: Entry) -> Event:
    return {"id": entry.name, "event": "sent", "at": entry.sent_on, "write": asdict(entry.write)}


@dataclass(slots=True)
class Old:
    """A write of an earlier process whose outcome was not heard there."""

    name: str
    write: Write
    sent_on: float
    """Epoch seconds."""
    at: float
    """The date of its end, of its client's leaving, or on which the process was last seen alive."""
    what: str = ""
    """What it was answered, if that much is known."""
    heard: bool = False


class Journal:
    """A file with a line for each thing that happened to a write, readable by its owner only. Owns the file.

    A write's line is there before its bytes go out: whatever happens to this process, the next one knows of it. It is
    not forced to the disk, since with the machine its clients go down as well. No key, body or answer is in it.
    """

    LONG = 4 * 1024 * 1024
    """Bytes from which on it is to be written anew, with what still matters."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None remembers nothing."""
        self.path = path
        self._length = 0

    def read(self) -> list[Old]:
        """The writes that nobody has heard of, and those with a key. A line that is not whole is passed over."""
        if self.path is None:
            return []
        try:
            alive_on = self.path.stat().st_mtime
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._complain("read", error)
            return []
        found: dict[str, Old] = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                event = json.loads(line)
                name = event["id"]
                match event["event"]:
                    case "sent":
                        found[name] = Old(name, Write(**event["write"]), float(event["at"]), alive_on)
                    case "undone":
                        del found[name]
                    case "ended":
                        found[name].at, found[name].what = float(event["at"]), str(event["what"])
                    case "heard":
                        found[name].heard = True
                    case "unheard":
                        found[name].heard, found[name].at = False, float(event["at"])
        return [old for old in found.values() if old.write.key or not old.heard]

    def append(self, event: Event) -> None:
        """One more line."""
        if self.path is None:
            return
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, line)
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
        return self._length > self.LONG

    def replace(self, events: list[Event]) -> None:
        """Put these in the place of all that is there, in one step."""
        if self.path is None:
            return
        text = "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events)
        self._length = 0
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".writes-")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
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
