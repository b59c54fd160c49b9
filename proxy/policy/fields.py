"""Where the values of a JSON object's fields stand in its text, so that one can be changed and all else stays."""

from __future__ import annotations

import json
import re
from collections.abc import Set

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


def spans(text: bytes, names: Set[str], *, deep: bool = False) -> list[tuple[int, int]] | None:
    """Start and end of each value of these names, in order: those of the outermost object, or `deep` of all.

    A value inside of another one that is named is part of that one. None: not JSON in UTF-8.
    """
    try:
        json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    found: list[tuple[int, int]] = []
    around: list[bytes] = []
    name_next = wanted = False
    begun: tuple[int, int] | None = None
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in (b"{", b"["):
            if wanted:
                begun = (len(around), match.start())
            around.append(token)
            name_next, wanted = token == b"{", False
        elif token in (b"}", b"]"):
            around.pop()
            name_next = False
            if begun is not None and begun[0] == len(around):
                found.append((begun[1], match.end()))
                begun = None
        elif token == b",":
            name_next = bool(around) and around[-1] == b"{"
        elif token == b":":
            continue
        elif name_next:
            name_next = False
            wanted = begun is None and (deep or len(around) == 1) and json.loads(token) in names
        elif wanted:
            found.append(match.span())
            wanted = False
    return found
