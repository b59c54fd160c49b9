"""Again, after how long, or let it stand."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from .errors import GIVE_UP_AFTER, Refusal, UpstreamError
from .messages import Response
from .routing import Effect, Route
from .units import Count, Seconds

PASSING = frozenset({502, 503, 504})
"""Statuses by which a gateway says that it, or what is behind it, is away for the moment."""


@dataclass(frozen=True, slots=True)
class RetryRules:
    """Bounds on sending again after a failure: `retry` in the settings."""

    max_attempts: Count = 5
    """Sends that may fail before the client is told."""
    backoff_initial: Seconds = 0.5
    """The most that is waited after the first failure; it doubles with each further one."""
    backoff_max: Seconds = 10.0
    """The most that is waited after any failure."""


def failed(outcome: Response | UpstreamError) -> bool:
    """Is it a failure that another try may mend? A 429 is not one: admission solves it."""
    return isinstance(outcome, UpstreamError) or outcome.status in PASSING


def may_send_again(route: Route, outcome: Response | UpstreamError) -> bool:
    """Would another send be harmless? What costs money or makes a second one: only if no byte went out."""
    if isinstance(outcome, UpstreamError) and not outcome.sent:
        return True
    return route.may_be_replayed


def backoff(rules: RetryRules, failures: int, chance: float) -> float:
    """Seconds to wait after the `failures`th failure; `chance` in [0, 1) spreads callers who failed together."""
    most = min(rules.backoff_max, rules.backoff_initial * 2.0 ** min(failures - 1, 30))
    return most * (0.5 + 0.5 * chance)


@dataclass(frozen=True, slots=True)
class Dates:
    """What is told of a call whose outcome is unknown, in epoch seconds."""

    sent_on: float | None = None
    again_from: float | None = None
    """When the same request would be sent again; None: at once."""
    keyed: bool = False
    """It has an Idempotency-Key."""


NO_DATES = Dates()


def verdict(
    route: Route, outcome: Response | UpstreamError, failures: int, dates: Dates = NO_DATES
) -> Response | Refusal:
    """What the client is told when no further try follows.

    The outcome of a spend that may have happened is told with a status that the stock client does not answer by
    sending it again: 500; for the bulk creation, whose client retries on everything but a 200, 200 with success false.
    """
    if not failed(outcome):
        assert isinstance(outcome, Response)
        return outcome
    if not may_send_again(route, outcome):
        return unknown(route, f"answered {outcome.status}" if isinstance(outcome, Response) else f"{outcome}", dates)
    if isinstance(outcome, Response):
        return outcome  # the vendor's own words
    tries = f" ({failures} tries)" if failures > 1 else ""
    if outcome.timed_out and outcome.sent:
        return Refusal(504, "upstream_timeout", f"Vast.ai did not answer in time{tries}: {outcome}", GIVE_UP_AFTER)
    return Refusal(503, "upstream_unreachable", f"Vast.ai could not be reached{tries}: {outcome}", GIVE_UP_AFTER)


def cut_short(route: Route, sent: bool, dates: Dates) -> Refusal:
    """What is told to whom an answer can no longer be waited for, because the proxy ends."""
    if sent and not route.may_be_replayed:
        return unknown(route, "vast-proxy was stopped before the answer came", dates)
    return Refusal(503, "restarting", "vast-proxy is stopping; try again in a moment", 5)


def unknown(route: Route, what: str, dates: Dates = NO_DATES) -> Refusal:
    """What is told of a call that may have been done; `what`: how it ended, in words."""
    look = route.check or "look at its effect in the console"
    when = f" on {_date(dates.sent_on)}" if dates.sent_on is not None else ""
    msg = (
        f"The outcome of {route.name} is unknown: it was sent{when} and not again, because it may have been done "
        f"({what}). Before trying again, check: {look}."
    )
    if dates.again_from is not None:
        msg += f" The same request gets this answer, and is not sent, until {_date(dates.again_from)}"
        msg += "; with another Idempotency-Key it is sent at once." if dates.keyed else "."
    if route.effect is Effect.SPEND and route.template == "/api/v0/asks/bulk/":
        return Refusal(200, "outcome_unknown", msg)
    return Refusal(500, "outcome_unknown", msg)


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
