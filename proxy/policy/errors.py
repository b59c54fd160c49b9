"""Every failure that is ours: its status, its code, the sentence the client shows, and when to come back.

The stock CLI tries 429, 502, 503 and 504 again (three attempts), waits at most 60 s for a Retry-After and gives up at
once on a longer one, and shows `msg`. So a status here is chosen for what it makes that client do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

# Above 60 s the stock client does not try again by itself (vastai 1.9.1, api/client.py).
GIVE_UP_AFTER = 61

FAULT, ROOM, CLIENT = "fault", "room", "client"
"""Whose matter an error is. Something failed, here or upstream, and somebody should look; there was no room or no time
for it; or it is the client's own: what it asked for, or as whom."""
CODES = {
    "outcome_unknown": FAULT,
    "internal_error": FAULT,
    "upstream_unreachable": FAULT,
    "upstream_timeout": FAULT,
    "gateway_key_refused": FAULT,
    "broken_off": FAULT,
    "wait_too_long": ROOM,
    "queue_full": ROOM,
    "still_queued": ROOM,
    "restarting": ROOM,
    "overloaded": ROOM,
    "not_cached": CLIENT,
    "not_for_clients": CLIENT,
    "idempotency_conflict": CLIENT,
    "bad_request": CLIENT,
    "body_too_large": CLIENT,
    "request_timeout": CLIENT,
    "token_needed": CLIENT,
    "token_unknown": CLIENT,
    "not_permitted": CLIENT,
    "spends_used_up": CLIENT,
    "cross_site": CLIENT,
    "wrong_host": CLIENT,
}
"""Every code that a request to the vendor's paths can end with, and whose matter it is."""


@dataclass(eq=False)  # not frozen: context managers set __traceback__ on what passes through them
class Refusal(Exception):
    """An answer of our own instead of upstream's: JSON with `success`, `error` and `msg`."""

    status: int
    code: str
    msg: str
    retry_after: float | None = None
    """Seconds after which it makes sense to come back; sent rounded up."""

    def body(self) -> bytes:
        """The JSON that the client gets."""
        return json.dumps({"success": False, "error": self.code, "msg": self.msg}).encode()

    def retry_after_header(self) -> str | None:
        """Retry-After in whole seconds, at least 1 (RFC 9110 10.2.3), or None."""
        if self.retry_after is None:
            return None
        return str(max(1, math.ceil(self.retry_after)))


class UpstreamError(Exception):
    """Upstream could not be asked, or its answer was lost. `sent`: it may have acted on the request."""

    def __init__(self, msg: str, *, sent: bool, timed_out: bool = False) -> None:
        super().__init__(msg)
        self.sent = sent
        self.timed_out = timed_out
