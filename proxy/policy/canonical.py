"""One spelling for all targets and JSON bodies that ask the same: what a cache key is made of, never what is sent."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

_DEEPEST = 100


def canonical_target(target: str, *, drop: frozenset[str] = frozenset()) -> str:
    """The one spelling of all origin-form targets that a server reads alike, without the parameters named in `drop`.

    Percent-encoding, the last slash, the order of differently named parameters, `a` or `a=`, and in JSON objects and
    lists white space and the order of keys make no difference. Everything else does. Raises only where `target` holds
    what no wire can bring, a lone surrogate outside of those that stand for undecodable bytes.
    """
    # As aiohttp reads a request line: bytes that are no UTF-8 come as surrogates, and are the same as when encoded.
    path, _, query = target.encode("utf-8", "surrogateescape").partition(b"?")
    segments = path.split(b"/")
    if len(segments) > 1 and not segments[-1]:
        del segments[-1]
    spelled = "/".join(quote_from_bytes(unquote_to_bytes(segment), safe="") for segment in segments)
    pairs = [_pair(piece) for piece in query.split(b"&") if piece]
    kept = [pair for pair in pairs if pair[0].decode("utf-8", "surrogateescape") not in drop]
    if not kept:
        return spelled
    kept.sort(key=lambda pair: pair[0])  # stable: repeated names keep their order, which a server may heed
    return spelled + "?" + "&".join(f"{quote_from_bytes(n, safe='')}={quote_from_bytes(v, safe='')}" for n, v in kept)


def canonical_json(text: bytes | str, *, drop: frozenset[str] = frozenset()) -> bytes | None:
    """The one spelling of a JSON value in ASCII; None for what is not JSON or what two readers may take differently.

    Keys are sorted, white space goes, strings are spelled alike. Numbers stay as they were written: 1 and 1.0, 0 and
    -0.0, or an integer beyond 2**53 may mean different things to a server. Repeated keys, NaN, and values nested
    deeper than 100 levels are None. `drop`: names of fields of the outermost object that are left out.
    """
    try:
        # No detection of UTF-16 as json.loads would do; and a string must be what UTF-8 can carry.
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text.encode("utf-8").decode("utf-8")
        value = _DECODER.decode(decoded)
        if drop and isinstance(value, dict):
            value = {name: found for name, found in value.items() if name not in drop}
        return _spell(value, _DEEPEST).encode("ascii")
    except (ValueError, RecursionError):
        return None


class _Number(str):
    """A number as it was written."""

    __slots__ = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("which of the repeated keys counts is up to the reader")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_Number, parse_int=_Number, parse_constant=_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=True)


def _spell(value: Any, levels: int) -> str:
    match value:
        case _Number():
            return str(value)
        case dict() | list() if levels == 0:
            raise ValueError("nested too deeply")
        case dict():
            members = (f"{_ENCODER.encode(key)}:{_spell(value[key], levels - 1)}" for key in sorted(value))
            return "{" + ",".join(members) + "}"
        case list():
            return "[" + ",".join(_spell(item, levels - 1) for item in value) + "]"
        case _:
            return _ENCODER.encode(value)


def _pair(piece: bytes) -> tuple[bytes, bytes]:
    name, _, value = piece.replace(b"+", b" ").partition(b"=")
    decoded = unquote_to_bytes(value)
    # Only objects and lists: white space around a bare word or number may be part of a name somebody searches for.
    spelled = canonical_json(decoded) if decoded[:1] in (b"{", b"[") else None
    return unquote_to_bytes(name), decoded if spelled is None else spelled
