"""Keys that are not to be seen in an answer: found as they are and as they may be spelt, and covered in place."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from urllib.parse import quote

from .fields import spans
from .identity import KEY_FIELDS
from .messages import Headers
from .routing import Route, words_of

_ABOUT_ACCOUNTS = frozenset({"user", "users", "subaccounts", "team"})


_STARS = b"\0" + b"*" * 255
"""NULs stay, by which UTF-16 stays what it is."""


class Mask:
    """Covers keys with stars, one for each byte, so that no length changes."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        spelt = {
            spelling.encode()
            for key in keys
            for spelling in (
                key,
                quote(key, safe=""),
                json.dumps(key)[1:-1],
                json.dumps(key)[1:-1].replace("/", "\\/"),
                *(nul.join(key) for nul in ("\0", "\0\0\0")),  # UTF-16 and UTF-32, whichever byte is first
            )
        }
        self._pattern = re.compile(b"|".join(re.escape(one) for one in sorted(spelt, key=len, reverse=True)))
        self.longest = max(map(len, spelt))
        """Bytes of the longest spelling."""

    def __repr__(self) -> str:
        return "<Mask>"

    def cover(self, data: bytes) -> bytes:
        """The same, without a key."""
        return self._pattern.sub(lambda found: found[0].translate(_STARS), data)

    def headers(self, headers: Headers) -> Headers:
        """Fields without a key, and without the vendor's session, which is one too."""
        return tuple((self._text(name), self._text(value)) for name, value in headers if name.lower() != "set-cookie")

    def _text(self, text: str) -> str:
        return self.cover(text.encode("latin-1")).decode("latin-1")


class Stream:
    """Covers keys in what comes in pieces: what may be the beginning of one is held back until the next piece."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on by now."""
        covered = self._mask.cover(self._held + data)
        cut = max(0, len(covered) - (self._mask.longest - 1))
        self._held = covered[cut:]
        return covered[:cut]

    def end(self) -> bytes:
        """The rest."""
        held, self._held = self._held, b""
        return held


@lru_cache(maxsize=8)
def mask_of(keys: tuple[str, ...]) -> Mask:
    """The mask of these keys, made once."""
    return Mask(keys)


def shows_account_keys(route: Route) -> bool:
    """May its answer hold a key of the account that is not the gateway's own: `api_key` of /users/current and the like?

    Not the serverless endpoints', which their clients need.
    """
    return not _ABOUT_ACCOUNTS.isdisjoint(words_of(route.template))


def without_account_keys(plain: bytes) -> bytes | None:
    """An answer with every `api_key` in it empty, and all else as it is; None if it may hold one but is no JSON."""
    if not any(name.encode() in plain for name in KEY_FIELDS) and b"\\u" not in plain:
        return plain
    found = spans(plain, KEY_FIELDS, deep=True)
    if found is None:
        return None
    for start, end in reversed(found):
        if plain[start:end] != b"null":
            plain = plain[:start] + b'""' + plain[end:]
    return plain
