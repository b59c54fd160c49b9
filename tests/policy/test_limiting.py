"""The vendor's token buckets as we count them, against the vendor itself in twenty lines, and what its answers say."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.limiting import (
    GUESSED_FOR,
    MARGIN_MAX,
    NAMED_FOR,
    Bucket,
    Ceiling,
    Hint,
    Rate,
    RateHeaders,
    decoded,
    read_rate_headers,
    read_refusal,
)
from proxy.policy.messages import Headers

NOON = 1_785_000_000.0
"""Sat, 25 Jul 2026 17:20:00 GMT."""


def send(bucket: Bucket, at: float, *, accepted: bool | None = True) -> Any:
    """Grant, stamp, and take in the answer of one call, all at `at`."""
    bucket.grant()
    stamped = bucket.stamp(at)
    if accepted is not None:
        if accepted:
            bucket.accepted(stamped, at)
        else:
            bucket.refused(stamped, Hint(), at)
    return stamped


# --- The bucket -------------------------------------------------------------------------------------------------------


def test_the_first_call_goes_at_once_and_the_next_an_interval_after_it_was_sent() -> None:
    bucket = Bucket(Rate(2.0))
    assert bucket.due(100.0) <= 100.0
    bucket.grant()
    bucket.stamp(100.0)
    assert bucket.due(100.5) == 102.0


def test_the_clock_starts_when_the_bytes_leave_not_when_the_turn_is_granted() -> None:
    bucket = Bucket(Rate(2.0))
    bucket.grant()
    bucket.stamp(100.0 + 0.7)  # a handshake later
    assert bucket.due(101.0) == pytest.approx(102.7)


def test_while_a_granted_call_has_not_been_sent_the_next_is_not_due_at_any_time() -> None:
    bucket = Bucket(Rate(2.0))
    bucket.grant()
    assert bucket.due(1e9) == math.inf


def test_a_call_given_back_has_cost_nothing() -> None:
    bucket = Bucket(Rate(2.0))
    send(bucket, 100.0)
    bucket.grant()
    bucket.give_back()
    assert (bucket.due(101.0), bucket.pending) == (102.0, 0)


@pytest.mark.parametrize(("margin", "due"), [(0.0, 102.0), (0.01, 102.02), (0.5, 103.0)])
def test_the_margin_is_added_to_every_interval(margin: float, due: float) -> None:
    bucket = Bucket(Rate(2.0), margin)
    send(bucket, 100.0, accepted=None)
    assert bucket.due(100.0) == pytest.approx(due)


def test_a_bucket_of_five_gives_five_at_once_and_then_one_an_interval() -> None:
    bucket = Bucket(Rate(2.0, 5))
    for _ in range(5):
        assert bucket.due(100.0) <= 100.0
        send(bucket, 100.0)
    due = []
    for _ in range(3):
        due.append(bucket.due(100.0))
        send(bucket, due[-1])
    assert due == pytest.approx([102.0, 104.0, 106.0])


def test_granted_calls_count_against_the_burst_before_they_are_sent() -> None:
    bucket = Bucket(Rate(2.0, 5))
    for _ in range(5):
        assert bucket.due(100.0) <= 100.0
        bucket.grant()
    assert bucket.due(100.0) == math.inf
    bucket.give_back()
    assert bucket.due(100.0) <= 100.0


def test_of_several_granted_calls_the_last_may_be_sent_first() -> None:
    bucket = Bucket(Rate(1.0, 2))
    bucket.grant()
    bucket.grant()
    later, earlier = bucket.stamp(101.0), bucket.stamp(101.5)
    assert [later.count, earlier.count, earlier.gap] == [1, 2, 0.5]
    # One token came back half a second after the second call, which was a second after it was granted.
    assert bucket.due(101.5) == 102.0


def test_a_pause_refills_no_more_than_the_capacity() -> None:
    bucket = Bucket(Rate(2.0, 5))
    send(bucket, 100.0)
    for _ in range(5):
        assert bucket.due(10_000.0) <= 10_000.0
        send(bucket, 10_000.0)
    assert bucket.due(10_000.0) == 10_002.0


@pytest.mark.parametrize("capacity", [1, 5])
def test_a_shut_bucket_opens_for_one_call_not_for_a_herd(capacity: int) -> None:
    bucket = Bucket(Rate(2.0, capacity))
    bucket.shut(130.0)
    assert bucket.due(100.0) == 130.0
    send(bucket, 130.0)
    assert bucket.due(130.0) == 132.0


def test_shutting_never_opens_earlier() -> None:
    bucket = Bucket(Rate(2.0))
    bucket.shut(130.0)
    bucket.shut(110.0)
    assert bucket.due(100.0) == 130.0


@pytest.mark.parametrize(
    ("capacity", "pending", "ahead", "eta"),
    [(1, 0, 0, 100.0), (1, 0, 1, 102.0), (1, 1, 0, 102.0), (1, 1, 3, 108.0), (5, 0, 4, 100.0), (5, 0, 7, 106.0)],
)
def test_the_wait_is_known_from_who_is_before(capacity: int, pending: int, ahead: int, eta: float) -> None:
    bucket = Bucket(Rate(2.0, capacity))
    for _ in range(pending):
        bucket.grant()
    assert bucket.eta(100.0, ahead) == eta


def test_an_endpoint_that_is_not_paced_never_waits() -> None:
    bucket = Bucket(Rate(0.0))
    for _ in range(100):
        assert bucket.due(100.0) <= 100.0
        bucket.grant()


def test_a_shadow_counts_but_holds_nobody_until_it_is_proved_right() -> None:
    bucket = Bucket(Rate(2.0), enforced=False)
    send(bucket, 100.0)
    assert bucket.due(100.0) == bucket.eta(100.0, 9) - math.inf == -math.inf
    assert bucket.eta(100.0, 9) == 100.0
    bucket.enforce(100.0)
    assert bucket.due(100.0) == 102.0


def test_a_shadow_gathers_no_debt_that_all_would_pay_once_it_is_proved_right() -> None:
    bucket = Bucket(Rate(2.0), enforced=False)
    for number in range(1000):
        send(bucket, 100.0 + number / 10)
    bucket.enforce(200.0)
    assert bucket.due(200.0) <= 202.0


Step = tuple[Literal["ask", "stamp", "give_back", "pass"], float]
STEPS = st.lists(st.tuples(st.sampled_from(["ask", "stamp", "give_back", "pass"]), st.floats(0.0, 3.0)), max_size=60)


def play(bucket: Bucket, steps: list[Step]) -> list[float]:
    """Grant whenever asked for and due, send or give back in any order; when calls were sent."""
    now, sends = 100.0, []
    for what, seconds in steps:
        now += seconds
        match what:
            case "ask" if bucket.due(now) <= now:
                bucket.grant()
            case "stamp" if bucket.pending:
                bucket.stamp(now)
                sends.append(now)
            case "give_back" if bucket.pending:
                bucket.give_back()
            case _:
                pass
    return sends


@given(STEPS, st.sampled_from([0.0, 0.01, 0.2]))
def test_two_calls_are_never_sent_closer_than_the_interval(steps: list[Step], margin: float) -> None:
    sends = play(Bucket(Rate(2.0), margin), steps)
    assert all(later - earlier >= 2.0 - 1e-9 for earlier, later in pairwise(sends))


@given(STEPS, st.sampled_from([1, 2, 5]))
def test_no_window_holds_more_calls_than_the_capacity_and_what_came_back_in_it(
    steps: list[Step], capacity: int
) -> None:
    sends = play(Bucket(Rate(2.0, capacity)), steps)
    for first, begin in enumerate(sends):
        for last in range(first, len(sends)):
            assert last - first + 1 <= capacity + (sends[last] - begin) / 2.0 + 1e-9


# --- What a 429 says --------------------------------------------------------------------------------------------------

JSON = (("Content-Type", "application/json"),)
LIVE = (
    ("content-type", "application/json"),
    ("server", "gunicorn"),
    ("x-ratelimit-limit", "5.0"),
    ("x-ratelimit-remaining", "0"),
    ("x-ratelimit-reset", "1784961439"),
    ("retry-after", "10"),
)
LIVE_BODY = (
    b'{"error":"HTTPTooManyRequests","msg":"API requests too frequent","retry_after":10,"limit":5.0,"remaining":0}'
)
THRESHOLD = b"API requests too frequent: endpoint threshold=4.5*1.0"

REFUSALS: dict[str, tuple[Headers, bytes, Hint]] = {
    "1 text": ((), b"API requests too frequent", Hint()),
    "2 text, threshold": ((), THRESHOLD, Hint(threshold=4.5)),
    "2 text, multiplied": ((), b"API requests too frequent: endpoint threshold=2.0*1.5", Hint(threshold=3.0)),
    "2 text, elided": ((), b"API requests too frequent: endpoint threshold=...", Hint()),
    "3 detail": (JSON, b'{"detail":"API requests too frequent endpoint threshold=3.0"}', Hint(threshold=3.0)),
    "4 success false": (
        JSON,
        b'{"success":false,"error":"rate_limit_exceeded","msg":"API requests too frequent endpoint threshold=3.0"}',
        Hint(threshold=3.0),
    ),
    "5 as captured live": (LIVE, LIVE_BODY, Hint(retry_after=10.0, limit=5.0)),
    "5 without headers": (JSON, b'{"msg":"API requests too frequent","retry_after":17}', Hint(retry_after=17.0)),
    "5 headers alone": ((("Retry-After", "7"), ("X-RateLimit-Limit", "5")), b"", Hint(retry_after=7.0, limit=5.0)),
    "6 daily quota": (JSON, b'{"error":"search_quota_exceeded","msg":"later"}', Hint("quota")),
    "7 invitation": (
        JSON,
        b'{"msg":"Error: invitation already sent to user@example.com only 300 seconds ago."}',
        Hint("final"),
    ),
    "8 2FA locked": (JSON, b'{"error":"tfa_locked","fail_count":5,"locked_until":1785000000}', Hint("final")),
    "8 2FA texts": (JSON, b'{"error":"sms_rate_limited","msg":"wait"}', Hint("final")),
    "8 2FA phone": (JSON, b'{"error":"preauth_phone_cap"}', Hint("final")),
    "8 2FA twilio": (JSON, b'{"error":"twilio_rate_limited"}', Hint("final")),
    "the longer of two waits": ((("Retry-After", "3"),), b'{"retry_after": 9.5}', Hint(retry_after=9.5)),
    "the longer, the other way round": ((("Retry-After", "30"),), b'{"retry_after": 9.5}', Hint(retry_after=30.0)),
    "a wait in a string": (JSON, b'{"retry_after": "4"}', Hint(retry_after=4.0)),
    "a float in the header": ((("retry-after", " 1.5 "),), b"", Hint(retry_after=1.5)),
    "zero": ((("retry-after", "0"),), b"", Hint(retry_after=0.0)),
    "an empty header": ((("retry-after", ""),), b"", Hint()),
    "a negative header": ((("retry-after", "-1"),), b"", Hint()),
    "a word": ((("retry-after", "soon"),), b"", Hint()),
    "not a number": ((("retry-after", "nan"),), b'{"retry_after": NaN, "limit": NaN}', Hint()),
    "infinity": ((("retry-after", "inf"),), b'{"retry_after": Infinity, "limit": -Infinity}', Hint()),
    "a negative wait": (JSON, b'{"retry_after": -10, "limit": -5}', Hint()),
    "true": (JSON, b'{"retry_after": true, "limit": false}', Hint()),
    "null": (JSON, b'{"retry_after": null, "limit": null, "error": null}', Hint()),
    "an absurd wait": (JSON, b'{"retry_after": 1e300}', Hint(retry_after=3600.0)),
    "an absurd header": ((("retry-after", "99999999999"),), b"", Hint(retry_after=3600.0)),
    "an integer beyond floats": (JSON, b'{"retry_after": 1%s}' % (b"0" * 400), Hint()),
    "an integer beyond Python": (JSON, b'{"retry_after": 1%s}' % (b"0" * 5000), Hint()),
    "an absurd threshold": ((), b"endpoint threshold=99999.0", Hint()),
    "a threshold beyond floats": ((), b"endpoint threshold=" + b"9" * 400, Hint()),
    "a threshold of zero": ((), b"endpoint threshold=0.0*1.0", Hint()),
    "an error that is a list": (JSON, b'{"error": ["tfa_locked"], "retry_after": 2}', Hint(retry_after=2.0)),
    "an error that is an object": (JSON, b'{"error": {"code": 1}}', Hint()),
    "a list": (JSON, b'["API requests too frequent endpoint threshold=2.5"]', Hint(threshold=2.5)),
    "a string": (JSON, b'"API requests too frequent"', Hint()),
    "nothing": ((), b"", Hint()),
    "damaged JSON": (JSON, b'{"msg":"API requests too frequent endpoint threshold=3.0', Hint(threshold=3.0)),
    "nested too deeply": (JSON, b"[" * 50_000, Hint()),
    "no UTF-8": ((), b"\xff\xfe endpoint threshold=2.0", Hint(threshold=2.0)),
    "in gzip": ((("Content-Encoding", "gzip"),), gzip.compress(THRESHOLD), Hint(threshold=4.5)),
    "in GZIP": ((("Content-Encoding", " GZIP "),), gzip.compress(LIVE_BODY), Hint(retry_after=10.0, limit=5.0)),
    "in zlib": ((("Content-Encoding", "deflate"),), zlib.compress(THRESHOLD), Hint(threshold=4.5)),
    "in raw deflate": ((("Content-Encoding", "deflate"),), zlib.compress(THRESHOLD, wbits=-15), Hint(threshold=4.5)),
    "in gzip cut short": ((("Content-Encoding", "gzip"),), gzip.compress(THRESHOLD)[:-4], Hint()),
    "in gzip that is none": ((("Content-Encoding", "gzip"), ("Retry-After", "3")), b"text", Hint(retry_after=3.0)),
    "in an unknown coding": ((("Content-Encoding", "br"), ("Retry-After", "3")), b"text", Hint(retry_after=3.0)),
    "a bomb": ((("Content-Encoding", "gzip"),), gzip.compress(b" " * 10_000_000 + THRESHOLD), Hint()),
}


@pytest.mark.parametrize("form", REFUSALS)
def test_every_form_of_a_429_is_read(form: str) -> None:
    headers, body, hint = REFUSALS[form]
    assert read_refusal(headers, body, NOON) == hint


DATE = "Sat, 25 Jul 2026 17:20:00 GMT"
SOON = "Sat, 25 Jul 2026 17:20:20 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((("Retry-After", SOON), ("Date", DATE)), 20.0),
        ((("Date", SOON), ("Retry-After", SOON)), 0.0),
        ((("Retry-After", DATE), ("Date", SOON)), 0.0),  # past: at once
        ((("Retry-After", SOON),), 20.0),  # by our own clock, for want of theirs
        ((("Retry-After", SOON), ("Date", "yesterday")), 20.0),
        ((("Retry-After", "Saturday, 25-Jul-26 17:20:20 GMT"), ("Date", DATE)), 20.0),
        ((("Retry-After", "Sat, 25 Jul 2026 19:20:20 +0200"), ("Date", DATE)), 20.0),
        ((("Retry-After", "Sat, 25 Jul 2126 17:20:20 GMT"), ("Date", DATE)), 3600.0),
        ((("Retry-After", f"Sat, {'9' * 30} Jul 2026 17:20:20 GMT"), ("Date", DATE)), None),
        ((("Retry-After", SOON), ("Date", f"Sat, 25 Jul {'9' * 30} 17:20:20 GMT")), 20.0),
        ((("Retry-After", f"Sat, 25 Jul 2026 17:20:20 +{'9' * 30}"), ("Date", DATE)), None),
    ],
)
def test_a_date_in_retry_after_is_measured_against_the_answers_own_date(
    headers: Headers, seconds: float | None
) -> None:
    assert read_refusal(headers, b"", NOON).retry_after == seconds


@given(st.text(), st.text(), st.binary(), st.sampled_from(["identity", "gzip", "deflate", "br", ""]))
def test_no_answer_is_too_strange_to_be_read(retry_after: str, date: str, body: bytes, coding: str) -> None:
    headers = (("Retry-After", retry_after), ("Date", date), ("Content-Encoding", coding))
    hint = read_refusal(headers, body, NOON)
    assert hint.retry_after is None or 0 <= hint.retry_after <= 3600.0
    assert hint.threshold is None or 0 < hint.threshold <= 3600.0


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"Limit": "5.0", "Remaining": "0", "Reset": "1785000010"}, RateHeaders(5.0, 0.0, 11.0)),
        ({"Limit": "5", "Remaining": "3.5", "Reset": "1785000010.2"}, RateHeaders(5.0, 3.5, 12.0)),
        ({"Limit": "5", "Remaining": "4"}, RateHeaders(5.0, 4.0, None)),
        ({"Limit": "5", "Remaining": "9"}, RateHeaders(5.0, 5.0, None)),
        ({"Limit": "5", "Remaining": "0", "Reset": "1784999000"}, RateHeaders(5.0, 0.0, 0.0)),
        ({"Limit": "5", "Remaining": "0", "Reset": "1e18"}, RateHeaders(5.0, 0.0, 3600.0)),
        ({"Limit": "5", "Remaining": "0", "Reset": "soon"}, RateHeaders(5.0, 0.0, None)),
        ({"Limit": "5"}, None),
        ({"Remaining": "5"}, None),
        ({"Limit": "0", "Remaining": "0"}, None),
        ({"Limit": "-5", "Remaining": "0"}, None),
        ({"Limit": "nan", "Remaining": "0"}, None),
        ({"Limit": "5", "Remaining": "-2"}, None),
        ({"Limit": "five", "Remaining": "0"}, None),
    ],
)
def test_rate_headers_are_read_only_if_they_make_sense(fields: Mapping[str, str], seen: RateHeaders | None) -> None:
    headers = (("Date", DATE), *((f"X-RateLimit-{name}", value) for name, value in fields.items()))
    assert read_rate_headers(headers, NOON + 5000) == seen


@pytest.mark.parametrize(
    ("coding", "body", "plain"),
    [
        ("identity", b"abc", b"abc"),
        ("", b"abc", b"abc"),
        ("identity", b"abcdef", None),
        ("gzip", gzip.compress(b"abc"), b"abc"),
        ("x-gzip", gzip.compress(b"abcd"), b"abcd"),
        ("gzip", gzip.compress(b"abcdef"), None),
        ("gzip", gzip.compress(b"abc") + b"more", None),
        ("gzip", b"", None),
        ("deflate", zlib.compress(b"abc"), b"abc"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"abc")), None),
        ("br", b"abc", None),
    ],
)
def test_a_body_is_decoded_whole_or_not_at_all(coding: str, body: bytes, plain: bytes | None) -> None:
    assert decoded((("Content-Encoding", coding),), body, 5) == plain


# --- Learning ---------------------------------------------------------------------------------------------------------

Form = Literal["bare", "threshold", "retry_after"]


class Vendor:
    """The other side: a token bucket, or one whose clock begins anew with each refused call."""

    def __init__(
        self, interval: float, *, capacity: int = 1, penalty: float = 0.0, resets: bool = False, form: Form = "bare"
    ) -> None:
        self.interval = interval
        self.capacity = capacity
        self.penalty = penalty
        self.resets = resets
        self.form = form
        self.tokens = float(capacity)
        self.at = -math.inf

    def refuses(self, now: float) -> Hint | None:
        """Weigh a call that arrives now: None, or what the 429 says."""
        if self.at > -math.inf:
            self.tokens = min(self.capacity, self.tokens + (now - self.at) / self.interval)
        self.at = now
        if self.tokens >= 1 - 1e-6:
            self.tokens -= 1
            return None
        self.tokens = 0.0 if self.resets else self.tokens - self.penalty
        match self.form:
            case "threshold":
                return Hint(threshold=self.interval)
            case "retry_after":
                return Hint(retry_after=math.ceil((1 - self.tokens) * self.interval))
            case _:
                return Hint()


class Run:
    """So many calls through one bucket against one vendor, each as soon as the bucket lets it."""

    def __init__(self, bucket: Bucket, vendor: Vendor, calls: int, *, now: float = 0.0, way: float = 0.05) -> None:
        self.began = now
        self.refused = self.refused_in_row = 0
        while calls and self.refused < 100:
            now = max(now, bucket.due(now))
            bucket.grant()
            sent = bucket.stamp(now)
            self.ended = now
            hint = vendor.refuses(now + way / 2)
            now += way
            if hint is None:
                bucket.accepted(sent, now)
                calls -= 1
            else:
                self.refused += 1
                bucket.refused(sent, hint, now)

    def excess(self, calls: int, interval: float) -> float:
        """How much longer it took than the vendor's interval asks for."""
        return (self.ended - self.began) / ((calls - 1) * interval)


MODELS: dict[str, Callable[[float, Form], Vendor]] = {
    "tokens": lambda interval, form: Vendor(interval, form=form),
    "resetting": lambda interval, form: Vendor(interval, resets=True, form=form),
}
FORMS: tuple[Form, ...] = ("bare", "threshold", "retry_after")


@pytest.mark.parametrize("true", [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.5, 5.5, 7.5, 10.0, 14.0, 20.0, 33.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_an_interval_that_nobody_documented_is_found_in_few_refusals(model: str, form: Form, true: float) -> None:
    run = Run(Bucket(Rate(1.0), 0.01), MODELS[model](true, form), 40)
    assert run.refused <= 10
    assert run.excess(40, true) <= 1.5


@pytest.mark.parametrize("true", [1.3, 2.0, 4.5, 10.0])
@pytest.mark.parametrize("form", ["threshold", "retry_after"])
def test_a_penalty_that_nobody_documented_is_found_when_the_vendor_names_a_number(form: Form, true: float) -> None:
    run = Run(Bucket(Rate(1.0), 0.01), Vendor(true, penalty=2, form=form), 40)
    assert run.refused <= 4
    assert run.excess(40, true) <= 1.5


@pytest.mark.parametrize("penalty", [1, 4, 12, 30])
@pytest.mark.parametrize("form", FORMS)
def test_no_penalty_keeps_a_line_refused_for_ever(form: Form, penalty: float) -> None:
    run = Run(Bucket(Rate(1.0), 0.01), Vendor(1.5, penalty=penalty, form=form), 3)
    assert run.refused < 20


@pytest.mark.parametrize("true", [3.0, 10.0])
def test_no_guess_at_a_penalty_shuts_a_bucket_for_hours(true: float) -> None:
    bucket = Bucket(Rate(1.0), 0.01)
    run = Run(bucket, Vendor(true, penalty=12), 2)
    assert run.ended - run.began < 3600.0


@pytest.mark.parametrize("factor", [1.15, 1.18, 1.2, 1.22])
@pytest.mark.parametrize("form", FORMS)
def test_a_documented_interval_that_is_too_short_costs_two_refusals_at_most(form: Form, factor: float) -> None:
    run = Run(Bucket(Rate(4.5, source="documented"), 0.01), Vendor(4.5 * factor, form=form), 20)
    assert run.refused <= 2
    assert run.excess(20, 4.5 * factor) <= 1.15


@pytest.mark.parametrize("factor", [1.05, 1.1, 1.5, 2.0, 5.0])
def test_an_interval_that_the_vendor_names_is_kept_from_then_on(factor: float) -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    run = Run(bucket, Vendor(4.5 * factor, form="threshold"), 20)
    assert (run.refused, bucket.interval, bucket.source) == (1, 4.5 * factor, "learned")
    assert run.excess(20, 4.5 * factor) <= 1.15


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_kept_in_the_end_is_not_refused_any_more(model: str, form: Form) -> None:
    bucket, vendor = Bucket(Rate(1.0), 0.01), MODELS[model](3.7, form)
    first = Run(bucket, vendor, 40)
    assert Run(bucket, vendor, 200, now=first.ended + 1.0).refused <= 1
    assert 3.7 * 0.99 <= bucket.spacing <= 3.7 * 1.2


def test_a_configured_interval_is_kept_whatever_is_learned() -> None:
    bucket = Bucket(Rate(1.0, source="configured"))
    Run(bucket, Vendor(3.0, form="threshold"), 3)
    assert (bucket.interval, bucket.capacity, bucket.source) == (1.0, 1, "configured")


def refused_at(bucket: Bucket, now: float, hint: Hint) -> float:
    """One more call, sent and refused at `now`; seconds until the next is due."""
    bucket.grant()
    bucket.refused(bucket.stamp(now), hint, now)
    return bucket.due(now) - now


def test_the_documented_penalty_is_charged_at_the_second_refusal_in_a_row_and_for_both() -> None:
    bucket = Bucket(Rate(4.5, penalty=12, source="documented"))
    send(bucket, 100.0)
    assert refused_at(bucket, 104.5, Hint()) == pytest.approx(4.5)  # somebody else's call, perhaps
    second = refused_at(bucket, 109.0, Hint())
    assert second == pytest.approx(bucket.spacing * (1 + 2 * 12))
    assert refused_at(bucket, 500.0, Hint()) == pytest.approx(bucket.spacing * (1 + 12))


def test_an_accepted_call_forgets_the_penalty_that_was_not_charged() -> None:
    bucket = Bucket(Rate(4.5, penalty=12, source="documented"))
    send(bucket, 100.0)
    refused_at(bucket, 104.5, Hint())
    send(bucket, 109.0)
    assert refused_at(bucket, 200.0, Hint()) <= 2 * 4.5
    assert refused_at(bucket, 300.0, Hint()) == pytest.approx(bucket.spacing * (1 + 2 * 12))


def test_the_wait_that_the_vendor_names_holds_the_penalty_already() -> None:
    bucket = Bucket(Rate(4.5, penalty=12, source="documented"))
    assert refused_at(bucket, 100.0, Hint(retry_after=58.5)) == pytest.approx(58.5)
    assert refused_at(bucket, 200.0, Hint(retry_after=58.5)) == pytest.approx(58.5)


def test_of_two_waits_that_the_vendor_names_the_longer_counts() -> None:
    assert refused_at(Bucket(Rate(1.0)), 100.0, Hint(retry_after=1.0, threshold=4.5)) == pytest.approx(4.5)
    assert refused_at(Bucket(Rate(1.0)), 100.0, Hint(retry_after=9.0, threshold=4.5)) == pytest.approx(9.0)


def test_a_zero_wait_does_not_send_again_in_the_same_instant() -> None:
    assert refused_at(Bucket(Rate(1.0)), 100.0, Hint(retry_after=0.0)) > 0


def test_a_429_that_names_the_very_interval_we_keep_raises_the_margin_which_comes_down_slowly() -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    send(bucket, 100.0)
    refused_at(bucket, 104.55, Hint(threshold=4.5))
    raised = bucket.margin
    assert bucket.interval == 4.5
    assert raised == pytest.approx(0.03)
    refused_at(bucket, 110.0, Hint(threshold=4.5))
    assert bucket.margin == pytest.approx(0.06)
    now = 120.0
    for _ in range(10):
        send(bucket, now)
        now += 5.0
    assert 0.04 < bucket.margin < 0.06
    for _ in range(500):
        send(bucket, now)
        now += 5.0
    assert bucket.margin == pytest.approx(0.01, rel=0.01)


def test_the_margin_has_an_end() -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    for number in range(20):
        refused_at(bucket, 100.0 + 4.6 * number, Hint(threshold=4.5))
    assert bucket.margin == MARGIN_MAX


@pytest.mark.parametrize(("configured", "kept"), [(0.05, 0.07), (0.0, 0.02), (0.49, MARGIN_MAX)])
def test_another_margin_in_the_settings_counts_at_once_and_what_was_learned_stays_on_top(
    configured: float, kept: float
) -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    send(bucket, 100.0)
    refused_at(bucket, 104.55, Hint(threshold=4.5))
    bucket.keep_margin(configured)
    assert bucket.margin == pytest.approx(kept)
    plain = Bucket(Rate(4.5))
    plain.keep_margin(configured)
    assert plain.margin == configured


@pytest.mark.parametrize("gap", [9.1, 100.0])
def test_a_call_long_after_the_last_does_not_raise_the_margin(gap: float) -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    send(bucket, 100.0)
    refused_at(bucket, 100.0 + gap, Hint(threshold=4.5))
    assert bucket.margin <= 0.01


def test_a_bucket_refused_although_it_should_have_tokens_is_taken_at_its_word_or_emptied() -> None:
    named = Bucket(Rate(2.0, 5, source="documented"))
    refused_at(named, 100.0, Hint(limit=3.0))
    assert named.capacity == 3
    bare = Bucket(Rate(2.0, 5, source="documented"))
    refused_at(bare, 100.0, Hint())
    assert bare.capacity == 5
    refused_at(bare, 200.0, Hint())
    assert (bare.capacity, bare.interval) == (1, 2.0)


# --- X-RateLimit-* on any answer --------------------------------------------------------------------------------------


def seen(limit: float, remaining: float) -> RateHeaders:
    return RateHeaders(limit, remaining, None)


def test_a_remaining_below_our_count_lowers_it_at_once() -> None:
    bucket = Bucket(Rate(2.0, 5))
    sent = send(bucket, 100.0)
    assert bucket.observe(sent, seen(5.0, 0.0), 1, may_raise=False)
    assert bucket.due(100.0) == 102.0


def test_a_remaining_above_our_count_does_not_raise_it() -> None:
    bucket = Bucket(Rate(2.0, 5))
    for _ in range(5):
        sent = send(bucket, 100.0)
    assert bucket.observe(sent, seen(5.0, 4.0), 5, may_raise=True)
    assert bucket.due(100.0) == 102.0


def test_calls_sent_since_the_answer_was_made_count_too() -> None:
    bucket = Bucket(Rate(2.0, 5))
    first = send(bucket, 100.0)
    send(bucket, 100.0)
    bucket.observe(first, seen(5.0, 1.0), 2, may_raise=False)
    assert bucket.due(100.0) == 102.0


def observed(*answers: tuple[float, float, int], may_raise: bool = True) -> int:
    """The capacity after answers to calls a second apart: (limit, remaining, calls of the account so far)."""
    bucket = Bucket(Rate(2.0, 1))
    now = 100.0
    for limit, remaining, others in answers:
        bucket.observe(send(bucket, now), seen(limit, remaining), others, may_raise=may_raise)
        now += 1.0
    return bucket.capacity


@pytest.mark.parametrize(
    ("answers", "capacity"),
    [
        # Falls as this bucket's own count does while other routes are called four times as often: twice, so it is ours.
        ([(5.0, 4.0, 1), (5.0, 3.0, 6), (5.0, 2.0, 11)], 5),
        ([(5.0, 4.0, 1), (5.0, 3.0, 6)], 1),
        # No other route was called, so it may as well be the account's.
        ([(5.0, 4.0, 1), (5.0, 3.0, 2), (5.0, 2.0, 3), (5.0, 1.0, 4)], 1),
        # Falls with the account's calls.
        ([(50.0, 40.0, 1), (50.0, 35.0, 6), (50.0, 30.0, 11), (50.0, 25.0, 16)], 1),
        # Another limit each time: two layers answer in turn.
        ([(5.0, 4.0, 1), (9.0, 3.0, 6), (5.0, 2.0, 11), (9.0, 1.0, 16)], 1),
    ],
)
def test_a_capacity_is_raised_only_on_proof(answers: list[tuple[float, float, int]], capacity: int) -> None:
    assert observed(*answers) == capacity


def test_a_capacity_is_never_raised_for_what_spends() -> None:
    assert observed((5.0, 4.0, 1), (5.0, 3.0, 6), (5.0, 2.0, 11), (5.0, 1.0, 16), may_raise=False) == 1


# --- Forgetting, and a restart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "believed"), [("threshold", NAMED_FOR), ("bare", GUESSED_FOR)])
def test_what_was_learned_is_believed_for_a_time(form: Form, believed: float) -> None:
    bucket = Bucket(Rate(1.0), 0.01)
    ended = Run(bucket, Vendor(3.0, form=form), 40).ended
    assert bucket.source == "learned"
    learned = bucket.interval
    send(bucket, ended + 10.0)
    assert bucket.interval == learned
    send(bucket, ended + believed + 1.0)
    assert (bucket.interval, bucket.source) == (1.0, "default")


def test_a_shadow_that_was_proved_right_is_kept_for_a_day_and_over_a_restart() -> None:
    bucket = Bucket(Rate(2.0, source="documented"), enforced=False)
    assert bucket.idle(100.0)
    bucket.enforce(100.0)
    assert not bucket.idle(10_000.0)
    again = Bucket(Rate(2.0, source="documented"), enforced=False)
    again.load(bucket.dump(200.0, NOON), 5.0, NOON)
    send(again, 6.0)
    assert again.enforced
    send(again, NAMED_FOR + 10.0)
    assert not again.enforced


def restarted(bucket: Bucket, now: float, *, down: float = 0.0, now_after: float = 7.0) -> Bucket:
    """The same bucket in a process that began after `down` seconds, its monotonic clock at another time."""
    kept = json.loads(json.dumps(bucket.dump(now, NOON)))
    again = Bucket(bucket.base, bucket.base_margin)
    again.load(kept, now_after, NOON + down)
    return again


@pytest.mark.parametrize(("down", "due"), [(0.0, 30.0), (10.0, 20.0), (40.0, -math.inf)])
def test_a_debt_survives_a_restart(down: float, due: float) -> None:
    bucket = Bucket(Rate(2.0))
    bucket.shut(130.0)
    assert restarted(bucket, 100.0, down=down).due(7.0) == pytest.approx(7.0 + due)


def test_what_was_learned_survives_a_restart_with_its_age() -> None:
    bucket = Bucket(Rate(1.0), 0.01)
    ended = Run(bucket, Vendor(3.0), 40).ended
    again = restarted(bucket, ended, down=100.0)
    assert (again.interval, again.source, again.correction) == (bucket.interval, "learned", bucket.correction)
    assert (again.longest_refused, again.shortest_accepted) == (bucket.longest_refused, bucket.shortest_accepted)
    send(again, 7.0 + GUESSED_FOR - 400.0)
    assert again.source == "learned"
    send(again, 7.0 + GUESSED_FOR)
    assert again.source == "default"


def test_a_raised_margin_survives_a_restart() -> None:
    bucket = Bucket(Rate(4.5, source="documented"), 0.01)
    send(bucket, 100.0)
    refused_at(bucket, 104.55, Hint(threshold=4.5))
    assert restarted(bucket, 105.0).margin == pytest.approx(bucket.margin)


def test_nothing_is_kept_of_a_bucket_that_knows_nothing() -> None:
    bucket = Bucket(Rate(2.0), 0.01)
    send(bucket, 100.0)
    assert (bucket.idle(101.0), bucket.dump(101.0, NOON) != {}) == (False, True)
    assert (bucket.idle(103.0), bucket.dump(103.0, NOON)) == (True, {})


@pytest.mark.parametrize("ahead", [10_000.0, 1e9])
def test_a_clock_that_was_set_back_does_not_shut_a_bucket_for_days(ahead: float) -> None:
    bucket = Bucket(Rate(2.0))
    bucket.load({"full_at": NOON + ahead}, 7.0, NOON)
    assert 7.0 < bucket.due(7.0) <= 7.0 + 610.0


@pytest.mark.parametrize("back", [1.0, 3600.0, 1e6])
def test_a_clock_that_was_set_back_lengthens_no_debt_of_a_call_whose_date_is_known(back: float) -> None:
    bucket = Bucket(Rate(20.0))
    bucket.load({"full_at": NOON + back + 15.0, "seen": NOON + back - 5.0}, 7.0, NOON)
    assert 7.0 + 15.0 <= bucket.due(7.0) <= 7.0 + 21.0


def test_what_was_learned_in_the_future_is_not_believed() -> None:
    bucket = Bucket(Rate(2.0))
    bucket.load({"interval": 9.0, "learned_at": NOON + 3600.0}, 7.0, NOON)
    assert (bucket.interval, bucket.source) == (2.0, "default")


GARBAGE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just([]), st.just({}), st.just(NOON + 1.0)
)
KEPT = st.sampled_from(
    [
        "full_at",
        "margin",
        "learned_at",
        "interval",
        "capacity",
        "named",
        "longest_refused",
        "shortest_accepted",
        "seen",
        "why",
    ]
)


@given(st.dictionaries(KEPT, GARBAGE))
def test_no_state_file_is_too_strange_to_leave_a_bucket_that_works(kept: dict[str, Any]) -> None:
    bucket = Bucket(Rate(2.0), 0.01)
    bucket.load(kept, 7.0, NOON)
    assert 0.01 <= bucket.margin <= MARGIN_MAX
    assert bucket.due(7.0) <= 7.0 + 700.0
    assert bucket.interval <= 3600.0
    assert bucket.capacity >= 1
    send(bucket, 1000.0)
    refused_at(bucket, 2000.0, Hint())
    assert bucket.due(2000.0) < math.inf
    json.dumps(bucket.dump(2000.0, NOON + 1993.0), allow_nan=False)


# --- The ceiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"per": 0.0}, {"burst": 0.5}, {"per": -1.0}])
def test_a_ceiling_that_would_let_nothing_through_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Ceiling(**wrong)
