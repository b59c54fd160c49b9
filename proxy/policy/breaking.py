"""When upstream is away: who may still ask it, and how often the same may be tried again by everybody together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .errors import Refusal, UpstreamError
from .messages import Response
from .units import Count, Seconds

BUDGET, REFILL, EARNED = 10.0, 0.2, 0.2
"""Retries that may be made at once, and what comes back of them in a second, and with each call that is answered."""
PROBE_FOR = 30.0
"""Seconds after which a probe without an answer is no longer waited for before the next."""
LOOK_AGAIN = 1.0
MOST_ROUTES = 1000


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When upstream counts as away, and how it is asked whether it is back: `breaker` in the settings."""

    failures: Count = 5
    """Lost connections, 502, 503 and 504 in a row after which nobody but a probe is sent."""
    probe_initial: Seconds = 1.0
    """Before the first probe; doubles with each that fails."""
    probe_max: Seconds = 30.0
    """The most between two probes."""


@dataclass(slots=True, eq=False)
class _Health:
    """Of an upstream, or of one route."""

    failures: int = 0
    """In a row."""
    routes: set[str] = field(default_factory=set)
    """Where they were."""
    opened: bool = False
    pause: float = 0.0
    until: float = -math.inf
    """No probe before."""
    probed: bool = False
    """A probe is on its way."""
    what: str = ""
    """The last failure, in words."""

    def wait(self, now: float) -> float:
        """Seconds until the next may go, or, while a probe is on its way, until it is worth looking again."""
        wait = max(0.0, self.until - now) if self.opened else 0.0
        return min(wait, LOOK_AGAIN) if self.probed else wait


@dataclass(slots=True)
class Pass:
    """Leave to send one call; to be given back with what came of it."""

    route: str
    probes: tuple[_Health, ...]
    """Those that this call shall tell whether they are well again."""


class Breaker:
    """One upstream's circuit breaker and retry budget. Holds no clock: whoever asks tells the time.

    An upstream that cannot be reached, or fails on more than one route, is away as a whole; one route that fails by
    itself is away alone. Then nothing is sent but one probe at a time, less and less often; the first answer ends it.
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

    def check(self, route: str, now: float) -> Refusal | None:
        """Why nothing may be sent there now; None if it may."""
        worst = max(self._healths(route), key=lambda health: health.wait(now))
        wait = worst.wait(now)
        if wait <= 0:
            return None
        where = "Vast.ai" if worst is self._origin else f"Vast.ai's {route}"
        msg = f"{where} has failed {worst.failures} times in a row ({worst.what}); it is asked again in {wait:.0f} s"
        return Refusal(503, "upstream_unreachable", msg, min(60.0, max(1.0, wait)))

    def enter(self, route: str, now: float) -> Pass | Refusal:
        """Leave to send, or why not. While it is away, whoever comes when a probe is due is the probe."""
        refusal = self.check(route, now)
        if refusal is not None:
            return refusal
        probes = tuple(health for health in self._healths(route) if health.opened)
        for health in probes:
            health.until, health.probed = now + PROBE_FOR, True
        return Pass(route, probes)

    def answered(self, passed: Pass, outcome: Response | UpstreamError, failed: bool, now: float) -> None:
        """What came of a call that had leave to be sent."""
        self._fill(now)
        if not failed:
            self._budget = min(BUDGET, self._budget + EARNED)
            self._origin = _Health()
            self._routes.pop(passed.route, None)
            return
        what = f"{outcome}" if isinstance(outcome, UpstreamError) else f"answered {outcome.status}"
        unreachable = isinstance(outcome, UpstreamError) and not outcome.sent
        if len(self._routes) >= MOST_ROUTES:
            self._routes = {name: health for name, health in self._routes.items() if health.opened}
        for health in (self._origin, self._routes.setdefault(passed.route, _Health())):
            health.failures += 1
            health.what = what
            health.routes.add(passed.route)
            if health in passed.probes:
                health.pause = min(self.rules.probe_max, health.pause * 2)
                health.until, health.probed = now + health.pause, False
            elif not health.opened and health.failures >= self.rules.failures:
                if health is self._origin and not unreachable and len(health.routes) < 2:
                    continue
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
