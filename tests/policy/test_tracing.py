"""`traceparent`: what is valid, and what upstream is told."""

from __future__ import annotations

import pytest

from proxy.policy.messages import Request, Trace
from proxy.policy.tracing import passed_on, read

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("told", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"01-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-is-to-come", True),
    ],
)
def test_what_is_valid_is_understood(told: str, sampled: bool) -> None:
    assert read(told) == (TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "told",
    [
        None,
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01more",
    ],
)
def test_what_is_not_is_none(told: str | None) -> None:
    assert read(told) is None


def test_upstream_is_told_of_one_parent_which_is_ours() -> None:
    headers = (("Traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=b"), ("X", "1"))
    given = Request("GET", "/x", headers, b"body")
    told = passed_on(given, Trace(TRACE, "1" * 16, SPAN, True))
    assert told.headers == (("tracestate", "a=b"), ("X", "1"), ("traceparent", f"00-{TRACE}-{'1' * 16}-01"))
    assert (told.method, told.target, told.body) == (given.method, given.target, given.body)
    assert passed_on(given, Trace(TRACE, "1" * 16, SPAN, False)).headers[-1][1].endswith("-00")
