"""The vendor's token buckets as we count them, and what an answer teaches about them.

A bucket is kept as a theoretical arrival time (GCRA): `tat` is when it would be full again if nothing more were sent,
so one number holds the tokens left, a debt, and how long it stays shut. All times are monotonic seconds handed in.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from .messages import Headers, content_coding, header
from .units import Fraction, Positive, Seconds

EPSILON = 1e-6
"""Seconds: less is no wait. A float's rounding must not become a timer that fires for ever."""
DEFAULT_INTERVAL = 1.0
"""Seconds between calls of an endpoint whose interval nobody documented."""
NAMED_FOR = 24 * 3600.0
"""Seconds for which an interval that the vendor itself named is believed."""
GUESSED_FOR = 3600.0
"""Seconds for which an interval found by trial is believed: the cause may have been somebody else's calls."""
SETTLED = 0.12
"""A guess is good enough once the longest refused and the shortest accepted gap are this close (a fraction)."""
SETTLED_IF_DOCUMENTED = 0.25
"""The same where the vendor gave a number: it is seldom far off, and each further refusal costs more than it tells."""
LONGEST_GUESS = 120.0
SURPRISED_FOR = 600.0
"""Seconds within which two refusals that the count does not explain show that the capacity is believed too large."""
MARGIN_STEP, MARGIN_MAX, MARGIN_DECAY = 0.02, 0.5, 0.02
LONGEST_HEADER_BLOCK = 10.0
"""Seconds: what a header on an accepted answer may shut at most; it does not say which layer it speaks of."""
MAX_429 = 20
"""Refusals that one request may meet before it is given up, whatever its deadline."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """At most `rate` calls each `per` seconds, after a burst of at most `burst`."""

    rate: Positive = 2.0
    """Calls in `per`."""
    per: Seconds = 1.0
    """The time in which `rate` calls may go. Not 0."""
    burst: Positive = 5.0
    """Calls that may go at once after a pause; 1 or more."""

    def __post_init__(self) -> None:
        if self.per <= 0:
            raise ValueError("per: expected a duration > 0")
        if self.burst < 1:
            raise ValueError("burst: expected a number >= 1")


@dataclass(frozen=True, slots=True)
class LimitRules:
    """How fast to call: `limits` in the settings."""

    global_: Ceiling | None = Ceiling()
    """At most `rate` calls in `per`, after a burst of at most `burst`: over everything sent to `upstreams.api`, whoever
    asks. Lower the rate if several proxies share one address; null turns it off and leaves only the endpoints' own
    intervals."""
    serverless: Ceiling | None = None
    """The same for `upstreams.serverless`, such as `{rate: 20, per: 1s, burst: 40}`. null: off, inference is not slowed
    down."""
    scale: Positive = 1.0
    """Multiplies every documented and default interval (not those that are learned, nor your own under `routes`). Above
    1 is more careful, below 1 is bolder."""
    scope: Literal["auto", "key", "ip"] = "auto"
    """What Vast.ai counts by. auto: starts with the key, and learns if it is the address. key: each key by itself,
    which also undoes what was learned of a shared address. ip: all keys together."""
    margin: Fraction = 0.01
    """Added to every interval, your own too, as a fraction of it (0 to 1), against jitter on the way. More, if 429s
    still come in."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a bucket allows: one token each `interval` seconds, `capacity` of them at most."""

    interval: float
    capacity: int = 1
    penalty: float = 0.0
    """Tokens that each refusal costs, where it is documented."""
    source: str = "default"
    """configured, learned, documented or default."""


# --- What an answer says ----------------------------------------------------------------------------------------------

_THRESHOLD = re.compile(r"endpoint threshold=([0-9]+(?:\.[0-9]+)?)(?:\*([0-9]+(?:\.[0-9]+)?))?")
_TFA_CODES = frozenset({"tfa_locked", "sms_rate_limited", "preauth_phone_cap", "twilio_rate_limited"})
_LONGEST_HINT = 3600.0
"""Seconds that one answer can shut a bucket: after that a call shows whether it is still so."""
_LONGEST_THRESHOLD = 3600.0


@dataclass(frozen=True, slots=True)
class Hint:
    """A 429, read: which kind it is and what it says of the wait."""

    kind: Literal["rate", "quota", "final"] = "rate"
    """rate: solved by waiting. quota: the daily search quota. final: never tried again (invitations, 2FA)."""
    threshold: float | None = None
    """Seconds between calls, as the vendor names them for this endpoint."""
    retry_after: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class RateHeaders:
    """X-RateLimit-* of one answer. They do not say which layer they speak of."""

    limit: float
    remaining: float
    reset_in: float | None
    """Seconds until Reset, measured against the answer's own Date and rounded up: both have whole seconds."""


def decoded(headers: Headers, body: bytes, most: int = 8 * 1024 * 1024) -> bytes | None:
    """The body without its content coding, or None if it is unknown, damaged, or larger than `most` bytes."""
    coding = content_coding(headers)
    if coding == "identity":
        return body if len(body) <= most else None
    if coding in ("gzip", "x-gzip"):
        wbits = 31
    elif coding == "deflate":
        # "deflate" is zlib (RFC 9110 8.4.1.2), but some servers send it raw.
        wbits = 15 if body[:1] == b"\x78" else -15
    else:
        return None
    inflater = zlib.decompressobj(wbits)
    try:
        plain = inflater.decompress(body, most)
    except zlib.error:
        return None
    return plain if inflater.eof and not inflater.unused_data else None


def read_refusal(headers: Headers, body: bytes, wall: float) -> Hint:
    """What a 429 says, in any form met: text, `detail`, `msg`, `retry_after`, headers. `wall`: epoch seconds."""
    text, fields = _fields(headers, body)
    code = str(fields.get("error"))
    if code == "search_quota_exceeded":
        return Hint(kind="quota")
    if code in _TFA_CODES or "invitation already sent" in text:
        return Hint(kind="final")
    named = _THRESHOLD.search(text)
    threshold = float(named[1]) * float(named[2] or 1) if named else 0.0
    waits = [_retry_after(header(headers, "retry-after"), headers, wall), _number(fields.get("retry_after"))]
    known = [min(wait, _LONGEST_HINT) for wait in waits if wait is not None]
    limit = _number(fields.get("limit"))
    if limit is None:
        limit = _number(header(headers, "x-ratelimit-limit"))
    return Hint(
        threshold=threshold if 0 < threshold <= _LONGEST_THRESHOLD else None,
        retry_after=max(known) if known else None,
        limit=limit,
    )


def read_rate_headers(headers: Headers, wall: float) -> RateHeaders | None:
    """X-RateLimit-* of any answer, or None unless Limit and Remaining are there and are numbers."""
    told = header(headers, "x-ratelimit-limit")
    limit = _number(told) if told is not None else None  # as nearly always
    if limit is None or limit < 1:
        return None
    remaining = _number(header(headers, "x-ratelimit-remaining"))
    if remaining is None:
        return None
    reset = _number(header(headers, "x-ratelimit-reset"))
    reset_in = None
    if reset is not None:
        reset_in = min(max(0.0, math.ceil(reset - _date(headers, wall)) + 1.0), _LONGEST_HINT)
    return RateHeaders(limit, min(remaining, limit), reset_in)


def _fields(headers: Headers, body: bytes) -> tuple[str, Mapping[str, Any]]:
    plain = decoded(headers, body, 64 * 1024) or b""
    text = plain.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text, {}
    return text, value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A finite number >= 0 from JSON or a header; None for anything else (a bool, a date, NaN, minus one)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def _date(headers: Headers, wall: float) -> float:
    try:
        return _epoch(header(headers, "date") or "")
    except ValueError:
        return wall


def _epoch(date: str) -> float:
    try:
        parsed = parsedate_to_datetime(date)
    except (TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"no HTTP date: {date!r:.80}") from error
    return parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp()


def _retry_after(value: str | None, headers: Headers, wall: float) -> float | None:
    """Retry-After as seconds, from either of its forms (RFC 9110 10.2.3), floats tolerated."""
    if value is None:
        return None
    seconds = _number(value.strip() or None)
    if seconds is None:
        try:
            seconds = max(0.0, _epoch(value) - _date(headers, wall))
        except ValueError:
            return None
    return seconds


# --- The bucket -------------------------------------------------------------------------------------------------------


class Send:
    """One call that left: when, how long after the one before, and how it was received. Made by `Bucket.stamp`."""

    __slots__ = ("_before", "_clean", "_previous", "accepted", "at", "count", "gap")

    def __init__(self, at: float, previous: Send | None, count: int) -> None:
        self.at = at
        self.count = count
        """How many it is of its bucket's."""
        self.accepted: bool | None = None
        """Not refused; None: not known yet."""
        self.gap = at - previous.at if previous is not None else math.inf
        """Seconds since the call before it, whatever came of that."""
        self._previous = previous
        self._before: float | None = None
        self._clean = False

    @property
    def accepted_before(self) -> float | None:
        """When the last call before it went out that was not refused; None: there was none, or it is not known yet."""
        previous = self._previous
        if previous is None or previous.accepted is None:
            return self._before
        return previous.at if previous.accepted else previous.accepted_before

    @property
    def clean(self) -> bool:
        """The call before it was accepted, so no debt of a refusal blurs what the gap shows."""
        return self._clean if self._previous is None else self._previous.accepted is True

    def settle(self, accepted: bool) -> None:
        """What came of it is known. It holds on to no other call from here, or all would be kept in a chain."""
        self._before, self._clean = self.accepted_before, self.clean
        self.accepted, self._previous = accepted, None


class Bucket:
    """One token bucket. Owns its clock, its debt, the calls granted but not yet sent, and what was learned of it."""

    __slots__ = (
        "_accepted_since",
        "_always",
        "_capacity",
        "_interval",
        "_last",
        "_learned_at",
        "_named",
        "_raise",
        "_refused_at",
        "_resumed_at",
        "_surprised_at",
        "_surprises",
        "base",
        "base_margin",
        "correction",
        "enforced",
        "longest_refused",
        "margin",
        "pending",
        "pooled",
        "refused_in_row",
        "sends",
        "shortest_accepted",
        "tat",
        "uncharged",
    )

    def __init__(self, base: Rate, margin: float = 0.0, *, enforced: bool = True, pooled: bool = False) -> None:
        self.base = base
        self.base_margin = self.margin = margin
        self.enforced = enforced
        """False: kept as a shadow, to see whether it would explain a refusal."""
        self.pooled = pooled
        """Many routes take from it and its capacity is not known: learned from counts, not from gaps."""
        self._always = enforced
        self._refused_at = self._resumed_at = -math.inf
        self._accepted_since = 0
        self.tat = -math.inf
        self.pending = 0
        self.sends = 0
        self._last: Send | None = None
        self._interval: float | None = None
        self._capacity: int | None = None
        self._learned_at = -math.inf
        self._named = False
        self.correction = ""
        """The last correction, for people: what was changed and why."""
        self.longest_refused: float | None = None
        self.shortest_accepted: float | None = None
        self.refused_in_row = 0
        self.uncharged = 0
        self._surprises = 0
        self._surprised_at = -math.inf
        self._raise: tuple[float, float, int, int, float, int] | None = None

    def __repr__(self) -> str:
        return f"<Bucket {self.interval:g}s x{self.capacity} {self.source}, {self.pending} pending>"

    # What it allows

    @property
    def interval(self) -> float:
        """Seconds from one token to the next, as now believed, without the margin."""
        if self._interval is not None and self.base.source != "configured":
            return self._interval
        return self.base.interval

    @property
    def capacity(self) -> int:
        """Tokens it holds when full."""
        if self._capacity is not None and self.base.source != "configured":
            return self._capacity
        return self.base.capacity

    @property
    def source(self) -> str:
        """Where interval and capacity are from, strongest first: configured, learned, documented, default."""
        learned = self._interval is not None or self._capacity is not None
        return "learned" if learned and self.base.source != "configured" else self.base.source

    @property
    def spacing(self) -> float:
        """The interval that is kept: with the margin."""
        return self.interval * (1.0 + self.margin)

    def keep_margin(self, margin: float) -> None:
        """Another margin from the settings; what was learned on top of it stays."""
        self.margin = min(MARGIN_MAX, max(margin, self.margin + margin - self.base_margin))
        self.base_margin = margin

    def due(self, now: float) -> float:
        """When the next call may go; <= now: at once; infinite: not before a granted one has been sent."""
        if not self.enforced:
            return -math.inf
        spacing = self.spacing
        if spacing > 0.0 and self.pending >= self.capacity:
            return math.inf
        return self.tat + spacing * (self.pending - self.capacity + 1)

    def eta(self, now: float, ahead: int) -> float:
        """When a call may go that has `ahead` others before it: an estimate, never infinite."""
        if not self.enforced:
            return now
        spacing = self.spacing
        start = max(self.tat, now) if self.pending or ahead else self.tat
        return max(now, start + spacing * (self.pending + ahead - self.capacity + 1))

    def tokens(self, now: float) -> float:
        """Calls that may be granted at once, fractions included; 0 or less: none."""
        if not self.enforced or self.spacing <= 0.0:
            return float(self.capacity)
        return min(float(self.capacity), self.capacity - self.pending - (self.tat - now) / self.spacing)

    # Charging: a turn is granted, then either sent or given back

    def grant(self) -> None:
        """A call was given its turn; its token is kept for it until `stamp` or `give_back`."""
        self.pending += 1

    def give_back(self) -> None:
        """A granted call will not be sent."""
        self.pending -= 1

    def stamp(self, now: float) -> Send:
        """A granted call's bytes go out now: from here its interval counts."""
        self.pending -= 1
        self.sends += 1
        spacing = self.spacing
        self.tat = max(self.tat, now) + spacing
        if not self.enforced:
            # A shadow holds nobody back, so it must not gather a debt that all would pay once it is proved right.
            self.tat = min(self.tat, now + spacing * self.capacity)
        self._last = send = Send(now, self._last, self.sends)
        return send

    def shut(self, until: float) -> None:
        """No call before `until`; then one, not as many as would have gathered."""
        self.tat = max(self.tat, until + self.spacing * (self.capacity - 1))

    # Learning

    def explains(self, send: Send) -> bool:
        """Could this bucket, if its interval were up to twice what we believe, have refused that call?"""
        if self.capacity > 1:
            return send.gap < 2 * self.interval * self.capacity
        if self.shortest_accepted is not None and send.gap >= self.shortest_accepted * (1 - 1e-9) and send.clean:
            return False
        unknown = self.base.source == "default" or self.interval == 0
        return send.gap < 2 * max(self.interval, DEFAULT_INTERVAL if unknown else 0.0)

    def accepted(self, send: Send, now: float) -> None:
        """That call was not refused: whatever else came of it, its spacing was enough."""
        self.refused_in_row = self.uncharged = 0
        if self.margin != self.base_margin:
            self.margin += (self.base_margin - self.margin) * MARGIN_DECAY
        self.expire(now)
        send.settle(True)
        if self.pooled:
            if self._resumed_at < self._refused_at <= send.at:
                self._resumed_at, self._accepted_since = send.at, 0
            self._accepted_since += 1
            return
        before = send.accepted_before
        if self.longest_refused is None or self._named or self.capacity > 1 or before is None:
            return
        gap = send.at - before
        if gap > self.longest_refused and (self.shortest_accepted is None or gap < self.shortest_accepted):
            self.shortest_accepted = gap
            self._bisect(now, untried=not send.clean)

    def refused(self, send: Send, hint: Hint, now: float) -> None:
        """That call met a 429 of this bucket's: shut it for everybody until it may be used again, and learn."""
        send.settle(False)
        self.refused_in_row += 1
        self.uncharged += 1
        believed = self.interval
        one_event = send.at <= self._refused_at  # sent before the last refusal was known: it tells nothing more
        self._refused_at = now
        if one_event:
            self.refused_in_row -= 1
        elif self.pooled:
            if self.explains(send) or self.refused_in_row > 1:
                self._learn_pool(send, hint, now)
        elif self.capacity > 1:
            self._learn_capacity(hint, now)
        elif hint.threshold is not None:
            self._learn_named(send, hint.threshold, now)
        elif self.explains(send) or (self.refused_in_row > 1 and hint.retry_after is None):
            self._learn_gap(send, hint, now)
        # Else it had been left alone for long enough: that tells nothing of how long enough is.
        wait = self.spacing or DEFAULT_INTERVAL
        if hint.threshold is not None:
            wait = max(wait, hint.threshold)
        if hint.retry_after is not None:
            wait = max(hint.retry_after, hint.threshold or 0.0)
            self.uncharged = 0
        elif self.base.penalty and self.refused_in_row >= 2:
            # Waiting one interval was not enough: the vendor does charge, and charged each time.
            wait += self.uncharged * self.base.penalty * self.spacing
            self.uncharged = 0
            if self.refused_in_row > 2 and self.interval <= believed:
                # More is owed than we caused: somebody else was refused too, with the same key.
                wait *= 2.0 ** min(self.refused_in_row - 2, 6)
            self.correction = "429s in a row: the documented penalty was charged"
        elif self.refused_in_row > 1 and self.interval <= believed:
            # No longer interval was learned from it, so there is a debt: a penalty that nobody documented.
            # Twice the gap that was not enough, and not more: the guesses before it may have grown long already.
            wait = min(wait * 2.0 ** min(self.refused_in_row - 1, 6), max(wait, 2 * send.gap))
        self.shut(now + min(max(wait, EPSILON), _LONGEST_HINT))

    def observe(self, send: Send, seen: RateHeaders, others: int, *, may_raise: bool) -> bool:
        """X-RateLimit-* on an answer: lower the count at once; raise the capacity only on proof. True if it is ours.

        `others`: calls sent so far by all routes of the account. Limit above our capacity is believed only when, over
        two steps, Remaining fell as this bucket's own count does and not as the account's.
        """
        if round(seen.limit) == self.capacity:
            later = self.sends - send.count
            self.tat = max(self.tat, send.at + self.spacing * (self.capacity - seen.remaining + later))
            return True
        if not may_raise or seen.limit < self.capacity or self.spacing <= 0:
            return False
        before, self._raise = self._raise, (seen.limit, seen.remaining, send.count, others, send.at, 0)
        if before is None or before[0] != seen.limit or send.count <= before[2]:
            return False
        refill = math.floor((send.at - before[4]) / self.interval) + 1
        fell = before[1] - seen.remaining
        ours, all_routes = send.count - before[2], others - before[3]
        fits = ours - refill <= fell <= ours
        if fits and not all_routes - refill <= fell <= all_routes:
            fitted = before[5] + 1
            self._raise = (*self._raise[:5], fitted)
            if fitted >= 2:
                self._capacity = round(seen.limit)
                self._learned(send.at, "X-RateLimit-Limit fits this bucket's own count", named=True)
        return False

    def _learn_named(self, send: Send, threshold: float, now: float) -> None:
        believed = self.interval
        if threshold > believed * 1.001:
            self._interval = threshold
            self._learned(now, f"the vendor named {threshold:g} s", named=True)
        elif threshold > believed * 0.999 and send.gap < 2 * believed:
            # The very interval we keep: the way there eats it up (TCP, queues at the edge), so keep more.
            self.margin = min(MARGIN_MAX, max(self.margin * 2, self.margin + MARGIN_STEP))
            self.correction = f"the vendor named the {threshold:g} s we keep: margin {self.margin:.0%}"

    def _learn_capacity(self, hint: Hint, now: float) -> None:
        self._surprises = self._surprises + 1 if now - self._surprised_at < SURPRISED_FOR else 1
        self._surprised_at = now
        if hint.threshold is not None and hint.threshold > self.interval * 1.001:
            self._interval = hint.threshold
            self._learned(now, f"the vendor named {hint.threshold:g} s", named=True)
        if hint.limit is not None and 1 <= hint.limit < self.capacity:
            self._capacity = int(hint.limit)
            self._learned(now, f"a 429 named a limit of {hint.limit:g}", named=True)
        elif self._surprises >= 2:
            self._capacity = 1
            self._surprises = 0
            self._learned(now, "refused twice although tokens should have been left", named=False)

    def _learn_pool(self, send: Send, hint: Hint, now: float) -> None:
        """What came through since the last refusal, and how long it took, bounds the interval from below."""
        accepted, took = self._accepted_since, send.at - self._resumed_at
        shown = took / accepted if accepted >= 3 and took < math.inf else 0.0
        believed = self.interval
        guess = shown * 1.02 if shown > believed else believed * (1.25 if accepted >= 3 else 2.0)
        self._interval = min(max(guess, DEFAULT_INTERVAL), LONGEST_GUESS)
        if hint.limit is not None and 1 <= hint.limit <= 1000:
            self._capacity = int(hint.limit)
        self._accepted_since = 0
        span = f" in {took:.3g} s" if took < math.inf else ""  # without an end: this is the first refusal
        self._learned(now, f"{accepted} calls{span} were one too many: trying {self._interval:.3g} s", named=False)

    def _learn_gap(self, send: Send, hint: Hint, now: float) -> None:
        believed = max(self.interval, DEFAULT_INTERVAL / 2)
        if self.base.source == "documented" and self.refused_in_row == 1 and self.longest_refused is None:
            # A wait of more than the documented interval again is a debt, which somebody else's calls have made.
            # Once is chance; twice in a short time is not.
            first, self._surprised_at = self._surprised_at, now
            if (hint.retry_after or 0.0) > 2 * self.base.interval and now - first > SURPRISED_FOR:
                return
        self._learned_at = now
        if send.clean:
            self.longest_refused = max(self.longest_refused or 0.0, send.gap)
            if self.shortest_accepted is not None and self.shortest_accepted <= self.longest_refused:
                self.shortest_accepted = None
        elif self.longest_refused is None:
            self.longest_refused = 0.0
        if self.shortest_accepted is not None:
            if send.clean:
                self._bisect(now, untried=False)
            return
        if self.base.penalty and self.refused_in_row == 1:
            return  # one refusal may be somebody else's doing; the answer to the next call will show
        # A documented interval is seldom far off, a default one may be anything.
        guess = believed * (1.25 if self.base.source == "documented" and self.refused_in_row == 1 else 2.0)
        if send.clean and hint.retry_after is not None and self.base.interval > 0:
            guess = send.gap + hint.retry_after
        self._interval = max(self.base.interval, min(guess, LONGEST_GUESS))
        self._named = False
        self._learned(now, f"refused: trying {self._interval:.3g} s", named=False)

    def _bisect(self, now: float, *, untried: bool) -> None:
        """Between the bounds; `untried`: the guess in force has not met a clean gap yet, so it comes first."""
        assert self.longest_refused is not None
        assert self.shortest_accepted is not None
        low, high = self.longest_refused, self.shortest_accepted
        settled = SETTLED_IF_DOCUMENTED if self.base.source == "documented" else SETTLED
        guess = high if high - low <= settled * high else (low + high) / 2
        if untried and self._interval is not None and low < self.spacing < guess:
            guess = self.spacing
        # The gap as kept includes the margin; it is not to be added twice.
        self._interval = max(self.base.interval, guess / (1 + self.margin))
        self._learned(now, f"between {low:.3g} s (refused) and {high:.3g} s (accepted)", named=False)

    def _learned(self, now: float, why: str, *, named: bool) -> None:
        self._learned_at, self._named, self.correction = now, named, why

    def always(self, enforced: bool, *, forget: bool) -> None:
        """Whether it counts by the settings alone; one that was proved right goes on counting, unless to `forget`."""
        proved = self.enforced and not self._always and not forget
        self._always = enforced
        self.enforced = enforced or proved

    def enforce(self, now: float) -> None:
        """A shadow proved right: from now on it is kept, for as long as what a vendor names is believed."""
        self.enforced = True
        self._learned(now, "a 429 that one key's spacing does not explain: counted for all keys together", named=True)

    def _forget(self) -> None:
        self.enforced = self._always
        self._interval = self._capacity = None
        self.longest_refused = self.shortest_accepted = None
        self._named, self._learned_at = False, -math.inf

    # Kept over a restart

    @property
    def last_sent(self) -> float:
        """When the last call went out; minus infinity: none has."""
        return self._last.at if self._last is not None else -math.inf

    def expire(self, now: float) -> None:
        """Forget what was learned too long ago to be believed."""
        if -math.inf < self._learned_at < now - (NAMED_FOR if self._named else GUESSED_FOR):
            self._forget()

    def unlearn(self) -> None:
        """It is another server's now: only what is owed stays."""
        self._forget()
        self.margin = self.base_margin
        self.correction = ""
        self.refused_in_row = self.uncharged = 0

    def idle(self, now: float) -> bool:
        """Nothing would be lost by forgetting it: full, nothing granted, nothing learned."""
        if self.source == "learned" or self.enforced != self._always or self._margin_raised:
            return False
        return self.tat <= now and not self.pending

    @property
    def _margin_raised(self) -> bool:
        return self.margin > self.base_margin * 1.5 + 1e-3

    def dump(self, now: float, wall: float) -> dict[str, Any]:
        """What must survive a restart, as JSON; times as epoch seconds."""
        kept: dict[str, Any] = {}
        if self.tat > now:
            kept["full_at"] = round(wall + self.tat - now, 3)
        if self._margin_raised:
            kept["margin"] = round(self.margin, 4)
        if self.source == "learned":
            kept |= {
                "interval": self._interval,
                "capacity": self._capacity,
                "named": self._named,
                "learned_at": round(wall - (now - self._learned_at), 3),
                "longest_refused": self.longest_refused,
                "shortest_accepted": self.shortest_accepted,
                "why": self.correction,
            }
        if self.enforced != self._always:
            kept |= {"enforced": True, "named": self._named, "learned_at": round(wall - (now - self._learned_at), 3)}
        return kept

    def load(self, kept: Mapping[str, Any], now: float, wall: float) -> None:
        """Take over what `dump` gave, as far as it is sane: a clock that jumped must not shut a bucket for days."""
        # A debt that is forgotten costs one refusal; one that a clock set back has lengthened would cost an hour.
        longest = self.spacing * (self.capacity + 1) + max(600.0, 20 * self.base.penalty * self.interval)
        full_at, seen = _number(kept.get("full_at")), _number(kept.get("seen"))
        if full_at is not None and full_at > wall:
            if seen:  # the date of its last call, to the second: it can owe no more than it did then
                longest = max(0.0, min(longest, full_at - seen + 1.0))
            self.tat = now + min(full_at - wall, longest)
        margin = _number(kept.get("margin"))
        if margin is not None:
            self.margin = min(MARGIN_MAX, max(self.base_margin, margin))
        learned_at = _number(kept.get("learned_at"))
        if learned_at is None or learned_at > wall + 60:
            return
        interval, capacity = _number(kept.get("interval")), _number(kept.get("capacity"))
        self._interval = min(interval, 3600.0) if interval else None
        self._capacity = min(max(1, int(capacity)), 1000) if capacity else None
        self._learned_at = now - (wall - learned_at)
        self.enforced = self._always or kept.get("enforced") is True
        self._named = kept.get("named") is True
        self.longest_refused = _number(kept.get("longest_refused"))
        self.shortest_accepted = _number(kept.get("shortest_accepted"))
        self.correction = str(kept.get("why", ""))[:200]
