"""The gateway's Vast keys, read from files or the environment, and new tokens for its members."""

from __future__ import annotations

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
_KEY = re.compile(r"[\x21-\x7e]{16,512}")


def read_key(rules: KeyRules, environ: Mapping[str, str]) -> Secret:
    """The key. Raises ValueError with a sentence that does not hold it."""
    if rules.env:
        found = environ.get(rules.env, "")
        if not found:
            raise ValueError(f"the environment variable {rules.env} is not set")
        return _checked(found, f"the environment variable {rules.env}")
    path = Path(rules.file).expanduser()
    try:
        with path.open("rb") as file:
            about = path.stat()
            raw = file.read(LARGEST + 1) if stat.S_ISREG(about.st_mode) else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} is not a file")
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o022:
        raise ValueError(f"{path} can be written by others (mode {mode:04o}): chmod 600")
    if mode & 0o044 and not any(path.resolve().is_relative_to(place) for place in MOUNTED):
        raise ValueError(f"{path} can be read by others (mode {mode:04o}): chmod 600, or put it below {MOUNTED[0]}")
    return _checked(raw.decode("latin-1"), str(path))


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
