"""When upstream is away: who may still ask it, and how often the same may be tried again by everybody together."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from .errors import Refusal, UpstreamError
from .messages import Response
from .units import Count, Seconds

BUDGET, REFILL, EARNED = 10.0, 0.2, 0.2
"""Retries that may be made at once, and what comes back of them in a second, and with each call that is answered."""
PROBE_FOR = 5.0
"""Seconds after which a probe without an answer is no longer waited for before the next."""
LOOK_AGAIN = 1.0
"""Seconds between two looks of somebody who waits for an upstream that is away."""
MOST_ROUTES, MOST_CALLERS = 1000, 10_000


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When upstream counts as away, and how it is asked whether it is back: `breaker` in the settings."""

    failures: Count = 5
    """Lost connections, 502, 503 and 504 in a row, whosever calls they were."""
    probe_initial: Seconds = 1.0
    """Before the first probe; it doubles with each that fails."""
    probe_max: Seconds = 30.0
    """The most between two probes. Less, to be back sooner after a long outage."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a breaker needs to know of a call."""

    route: str
    caller: str
    careful: bool = False
    """Its outcome must not be lost: it is no probe while anything else may be one."""


@dataclass(slots=True, eq=False)
class _Health:
    """Of an upstream, or of one route."""

    failures: int = 0
    """In a row."""
    routes: Counter[str] = field(default_factory=Counter)
    callers: set[str] = field(default_factory=set)
    """Where they were, and whose."""
    opened: bool = False
    unreachable: bool = False
    """Not even a connection could be had."""
    pause: float = 0.0
    until: float = -math.inf
    """No probe before."""
    probed: bool = False
    """A probe is on its way."""
    what: str = ""
    """The last failure, in words."""

    failed_at: float = -math.inf
    """When the last failure was."""

    def implicate(self, call: Call) -> None:
        """It has failed here."""
        self.routes[call.route] += 1
        if len(self.callers) < MOST_CALLERS:
            self.callers.add(call.caller)

    def wait(self, call: Call, now: float, rules: BreakerRules) -> float:
        """Seconds until this call may go, or, while a probe is on its way, until it is worth looking again."""
        wait = self.until - now if self.opened else 0.0
        if wait > 0 and self.probed:
            return min(wait, LOOK_AGAIN)
        if call.careful and self.failures >= 2 and not self.unreachable:  # what was not sent is not lost
            wait = max(wait, self.failed_at + _pause(rules, self.failures - 1) - now)
        # Whoever has not failed yet need not suffer for who has: that may be one caller, or one route, by itself.
        innocent = not self.unreachable and (call.route not in self.routes or call.caller not in self.callers)
        return 0.0 if innocent else max(0.0, wait)


def _pause(rules: BreakerRules, failures: int) -> float:
    return min(rules.probe_max, rules.probe_initial * 2.0 ** min(failures, 30))


@dataclass(slots=True)
class Pass:
    """Leave to send one call; to be given back with what came of it."""

    call: Call
    probes: tuple[_Health, ...]
    """Those that this call shall tell whether they are well again."""


class Breaker:
    """One upstream's circuit breaker and retry budget. Holds no clock: whoever asks tells the time.

    A route that fails by itself is away alone; an upstream that cannot be reached, or fails on several routes, is away
    as a whole. Then nothing is sent but one probe at a time, less and less often, and what has not failed yet: the
    other callers of that route, the other routes. The first answer ends it.
    """

    def __init__(self, rules: BreakerRules) -> None:
        self.rules = rules
        self._origin = _Health()
        self._routes: dict[str, _Health] = {}
        self._budget = BUDGET
        self._filled = 0.0

    def __repr__(self) -> str:
        state = "away" if self._origin.opened else "well"
        away = sum(health.opened for health in self._routes.values())
        return f"<Breaker {state}, {away} routes away, budget {self._budget:.1f}>"

    @property
    def away(self) -> list[str]:
        """What counts as away: `*` for all of upstream, else routes."""
        named = ["*"] if self._origin.opened else []
        return named + sorted(name for name, health in self._routes.items() if health.opened)

    def check(self, call: Call, now: float) -> Refusal | None:
        """Why this call may not be sent now; None if it may."""
        if not self._routes and not self._origin.failures:
            return None  # as nearly always
        worst = max(self._healths(call.route), key=lambda health: health.wait(call, now, self.rules))
        wait = worst.wait(call, now, self.rules)
        if wait <= 0:
            return None
        where = "Vast.ai" if worst is self._origin else f"Vast.ai's {call.route}"
        msg = f"{where} has failed {worst.failures} times in a row ({worst.what}); it is asked again in {wait:.0f} s"
        return Refusal(503, "upstream_unreachable", msg, min(60.0, max(1.0, wait)))

    def enter(self, call: Call, now: float) -> Pass | Refusal:
        """Leave to send, or why not. While it is away, whoever comes when a probe is due is the probe."""
        refusal = self.check(call, now)
        if refusal is not None:
            return refusal
        if not self._routes and not self._origin.failures:
            return Pass(call, ())
        probes = tuple(health for health in self._healths(call.route) if health.opened)
        for health in probes:
            health.until, health.probed = max(health.until, now + PROBE_FOR), True
        return Pass(call, probes)

    def answered(self, passed: Pass, outcome: Response | UpstreamError, failed: bool, now: float) -> None:
        """What came of a call that had leave to be sent."""
        self._fill(now)
        if not failed:
            self._budget = min(BUDGET, self._budget + EARNED)
            if not self._routes and not self._origin.failures:
                return
            if self._origin.opened:
                for health in self._routes.values():
                    health.until = min(health.until, now)  # they may be well again too
                    health.failed_at = -math.inf
            self._origin = _Health()
            self._routes.pop(passed.call.route, None)
            return
        if len(self._routes) >= MOST_ROUTES:
            self._routes = {name: health for name, health in self._routes.items() if health.opened}
        what = f"{outcome}" if isinstance(outcome, UpstreamError) else f"answered {outcome.status}"
        unreachable = isinstance(outcome, UpstreamError) and not outcome.sent
        own = self._routes.setdefault(passed.call.route, _Health())
        if own.opened and not unreachable and self._origin not in passed.probes:
            self._origin.implicate(passed.call)  # that this route is away is known, and says nothing of the others
        else:
            self._note(self._origin, passed, what, unreachable, now)
        self._note(own, passed, what, unreachable, now)

    def _note(self, health: _Health, passed: Pass, what: str, unreachable: bool, now: float) -> None:
        known = passed.call.route in health.routes and passed.call.caller in health.callers
        health.implicate(passed.call)
        health.unreachable, health.what = unreachable, what
        health.failures += 1
        health.failed_at = now
        if health in passed.probes:
            health.probed = False
            if known or unreachable:  # else it tells of its own route or caller only
                health.pause = min(self.rules.probe_max, health.pause * 2)
            health.until = now + health.pause
        elif not health.opened and health.failures >= self.rules.failures:
            elsewhere = health.failures - max(health.routes.values())
            if health is self._origin and not unreachable and elsewhere < self.rules.failures / 2:
                return  # one route, and perhaps somebody's single mishap
            health.opened, health.pause = True, self.rules.probe_initial
            health.until = now + health.pause

    def given_back(self, passed: Pass, now: float) -> None:
        """The call was not sent, or was given up: it has told nothing, and the next one is the probe."""
        for health in passed.probes:
            health.until, health.probed = now, False

    def may_retry(self, now: float) -> bool:
        """Take one retry from the budget that all requests share, if there is one."""
        self._fill(now)
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    def _fill(self, now: float) -> None:
        self._budget = min(BUDGET, self._budget + max(0.0, now - self._filled) * REFILL)
        self._filled = now

    def _healths(self, route: str) -> tuple[_Health, ...]:
        known = self._routes.get(route)
        return (self._origin,) if known is None else (self._origin, known)
