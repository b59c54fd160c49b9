"""An exchange's place in a trace: what a client says of it, and what upstream is told (W3C Trace Context, level 1)."""

from __future__ import annotations

import re
from dataclasses import replace

from .messages import Request, Trace

FIELD = "traceparent"
_FORM = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def read(traceparent: str | None) -> tuple[str, str, bool] | None:
    """The trace, the span that asks, and whether that is recorded; None if there is none or it is not valid.

    Of a version to come, what is known of it counts; version 00 ends with the flags.
    """
    found = _FORM.fullmatch(traceparent or "")
    if found is None or (found[1] == "00" and found[5]):
        return None
    return found[2], found[3], bool(int(found[4], 16) & 1)


def passed_on(request: Request, trace: Trace) -> Request:
    """The request as upstream gets it: a call of this exchange, not of its client."""
    told = f"00-{trace.trace_id}-{trace.span_id}-{'01' if trace.sampled else '00'}"
    others = tuple(item for item in request.headers if item[0].lower() != FIELD)
    return replace(request, headers=(*others, (FIELD, told)))
