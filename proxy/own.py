"""What everybody may know of their own work: what of it waits and for how long, and how long more of it would take."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl

from .admin import json_answer
from .admission import Admission
from .policy import members
from .policy.errors import Refusal
from .policy.identity import Caller
from .policy.members import TeamRules
from .policy.messages import Response
from .policy.routing import Routes, canonical_name

MOST_CALLS = 100_000
"""For so many calls at the most a plan is made."""
_HOW = "ask for a method, a path and a number of calls, such as /_proxy/plan?method=PUT&path=/api/v0/asks/1/&calls=20"


class Own:
    """Answers for one caller, who has been recognised by the key or token of the request. Owns nothing."""

    def __init__(self, admission: Admission, rules: Callable[[], tuple[Routes, TeamRules]]) -> None:
        """`rules`: the table and the team in force."""
        self._admission = admission
        self._rules = rules

    def pages(self, root: str) -> dict[str, Callable[[Caller, str], Response]]:
        """By path; each is told who asks, and the query."""
        return {root + "/waiting": self.waiting, root + "/plan": self.plan}

    def waiting(self, caller: Caller, query: str) -> Response:
        """The lines in which the caller has somebody, and the limits that its calls meet."""
        return json_answer(
            200,
            {
                "success": True,
                "caller": caller.label,
                "lines": list(self._admission.lines_of(caller)),
                "limits": list(self._admission.limits_known(of=caller.credential)),
            },
        )

    def plan(self, caller: Caller, query: str) -> Response:
        """How long so many calls would take if they came now. An estimate: nothing is reserved. Raises Refusal."""
        given = dict(parse_qsl(query, keep_blank_values=True))
        method, path, calls = given.get("method", "GET").upper(), given.get("path", ""), given.get("calls", "1")
        if not path.startswith("/") or not path.isascii() or not method.isascii() or not method.isalpha():
            raise Refusal(400, "bad_request", _HOW)
        if not re.fullmatch(r"[0-9]{1,6}", calls) or not 1 <= int(calls) <= MOST_CALLS:
            raise Refusal(400, "bad_request", f"calls: expected a whole number from 1 to {MOST_CALLS}; {_HOW}")
        routes, team = self._rules()
        # Also as the tables and the log write it, with `{id}` where an id stands.
        name = canonical_name(f"{method} {path}")
        route = next((one for one in routes if canonical_name(one.name) == name), None) or routes.match(method, path)
        forbidden = members.forbidden(caller, route, path, team, routes)
        if forbidden is not None:
            raise forbidden
        plan = self._admission.plan(route, caller, int(calls))
        return json_answer(
            200, {"success": True, "caller": caller.label, "route": route.name, "calls": int(calls), **plan}
        )
