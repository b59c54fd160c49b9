"""The gateway's Vast keys, read from files or the environment, and new tokens for its members."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from .policy.members import PREFIX, KeyRules, Secret

MOUNTED = (Path("/run/secrets"), Path("/run/credentials"))
"""Where Docker and systemd put secrets: everybody in there may read them, and nobody else is in there."""
LARGEST = 4096
"""Bytes of a file that may be a key."""
SHORTEST = 16
"""Characters of a key, at least."""
_KEY = re.compile(rf"[\x21-\x7e]{{{SHORTEST},512}}")


def read_key(rules: KeyRules, environ: Mapping[str, str]) -> Secret:
    """The key. Raises ValueError with a sentence that does not hold it, also where it stands in the place of a name."""
    if rules.env:
        where = f"the environment variable {_name(rules.env)}"
        if not environ.get(rules.env):
            raise ValueError(f"{where} is not set")
        return _checked(environ[rules.env], where)
    where, path = _name(rules.file), Path(rules.file).expanduser()
    try:
        with open(path, "rb", opener=_at_once) as file:
            about = os.fstat(file.fileno())
            raw = file.read(LARGEST + 1) if stat.S_ISREG(about.st_mode) else b""
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{where} is not a file")
    mode = stat.S_IMODE(about.st_mode)
    mounted = any(path.resolve().is_relative_to(place) for place in MOUNTED)
    if mode & 0o022:
        raise ValueError(f"{where} can be written by others (mode {mode:04o}): chmod 600")
    if mode & 0o044 and not mounted:
        raise ValueError(f"{where} can be read by others (mode {mode:04o}): chmod 600, or put it below {MOUNTED[0]}")
    if about.st_uid not in (0, os.geteuid()) and not mounted:  # of a mounted one it is whoever owns it outside
        raise ValueError(f"{where} belongs to another user: chown it to the one that vast-proxy runs as, or to root")
    return _checked(raw.decode("latin-1"), where)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for somebody who writes, as with a FIFO one might for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _name(text: str) -> str:
    """A name for people, unless it may be the key itself, which somebody has put in the place of the name."""
    if len(text) < SHORTEST or text.startswith(("/", "~", ".")) or re.fullmatch("[A-Z_]+", text):
        return text
    return "***"


def _checked(text: str, where: str) -> Secret:
    key = text.strip()
    if not _KEY.fullmatch(key):
        raise ValueError(f"{where} holds no key: expected 16 to 512 printable ASCII characters in one line")
    if key.startswith(PREFIX):
        raise ValueError(f"{where} holds a gateway token: expected a key of the vendor's")
    return Secret(key)


def new_token() -> str:
    """A gateway token that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)
