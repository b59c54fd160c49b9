"""How many of a day's spends each member of the team has used up."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .clock import Clock
from .policy.errors import GIVE_UP_AFTER, Refusal

log = logging.getLogger(__name__)


class Spends:
    """Owns the counts of the day, which is one of UTC, and the file by which they outlive the process.

    A call is reserved when it comes, so that no more wait than may go, and counted when its bytes go out, on that day.
    """

    def __init__(self, clock: Clock, path: Path | None) -> None:
        """`path`: None remembers nothing."""
        self._clock = clock
        self._path = path
        self._reserved: Counter[str] = Counter()
        self._day, self._counted = self._read()

    def __repr__(self) -> str:
        return f"<Spends {dict(self._counted)} on {self._day}, {dict(+self._reserved)} reserved>"

    def reserve(self, member: str, count: int, limit: int) -> Spend:
        """So many of a member's spends of the day, of which there are `limit`. Raises Refusal when they are used up."""
        self._look_at_the_date()
        used = self._counted[member] + self._reserved[member]
        if used + count > limit:
            now = self._now()
            midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
            hours, minutes = divmod(int((midnight - now).total_seconds()) // 60, 60)
            msg = (
                f"{member} has {max(0, limit - used)} of {limit} spends left on {self._day} "
                f"(team.members.{member}.spends_per_day), and this takes {count}; the day ends at "
                f"{midnight:%Y-%m-%d %H:%M} UTC, in {hours} h {minutes} min"
            )
            raise Refusal(403, "spends_used_up", msg, max(GIVE_UP_AFTER, (midnight - now).total_seconds()))
        self._reserved[member] += count
        return Spend(self, member, count)

    def count(self, spend: Spend) -> None:
        """It is being sent."""
        self._look_at_the_date()
        self._reserved[spend.member] -= spend.size
        self._counted[spend.member] += spend.size
        spend.day = self._day
        self._write()

    def give_back(self, spend: Spend) -> None:
        """It was not done."""
        self._look_at_the_date()
        if not spend.day:
            self._reserved[spend.member] -= spend.size
        elif spend.day == self._day:
            self._counted[spend.member] -= spend.size
            self._write()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall(), UTC)

    def _look_at_the_date(self) -> None:
        today = self._now().date().isoformat()
        if today != self._day:
            self._day, self._counted = today, Counter()

    # --- The file -----------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[str, Counter[str]]:
        today = self._now().date().isoformat()
        if self._path is None:
            return today, Counter()
        try:
            found = json.loads(self._path.read_bytes())
            if found["day"] != today:
                return today, Counter()
            return today, Counter({str(name): int(count) for name, count in found["spends"].items()})
        except FileNotFoundError:
            return today, Counter()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("the day's spends in %s cannot be read (%s): counting anew", self._path, type(error).__name__)
            return today, Counter()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".spends-")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"day": self._day, "spends": dict(+self._counted)}, file)
                Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            log.warning(
                "the day's spends cannot be kept in %s (%s): a restart forgets them", self._path, error.strerror
            )
            self._path = None


class Spend:
    """One call that counts. To be told when it is sent, and at the end whether it was done."""

    __slots__ = ("_spends", "day", "member", "size")

    def __init__(self, spends: Spends, member: str, size: int) -> None:
        self._spends = spends
        self.member = member
        self.size = size
        self.day = ""
        """On which it was sent; empty: not yet."""

    def sent(self) -> None:
        """Its bytes go out; a second time it is the same one."""
        if not self.day:
            self._spends.count(self)

    def undone(self) -> None:
        """It was refused, or never sent."""
        self._spends.give_back(self)
