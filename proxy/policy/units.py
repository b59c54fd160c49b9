"""The units a setting can have, and how a duration and a size are written; settings.py checks the other ranges."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated

Seconds = Annotated[float, "seconds"]
"""A duration, >= 0. In YAML and the environment: 60, 0.5, "500ms", "60s", "15m", "12h", "1d"."""

Bytes = Annotated[int, "bytes"]
"""A size, >= 0. In YAML and the environment: 1048576, "512KiB", "64MiB", "1GiB"."""

Positive = Annotated[float, "positive"]
"""A number > 0."""

Fraction = Annotated[float, "fraction"]
"""A number from 0 to 1."""

Count = Annotated[int, "count"]
"""A whole number >= 1."""

_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)
_SECONDS = {"": "1", "ms": "0.001", "s": "1", "m": "60", "h": "3600", "d": "86400"}
_BYTES = {"": "1", "kB": "1e3", "MB": "1e6", "GB": "1e9", "KiB": "1024", "MiB": "1048576", "GiB": "1073741824"}


def parse_duration(value: object) -> float:
    """Seconds, >= 0 and finite, from a number of seconds or a string such as "500ms", "60s", "15m"; else ValueError."""
    amount = _amount(value, _SECONDS)
    seconds = math.inf if amount is None else float(amount)
    if not math.isfinite(seconds):
        raise ValueError(f'expected a duration, such as 60, 0.5, "500ms", "60s", "15m" or "1d", not {value!r:.80}')
    return seconds


def parse_size(value: object) -> int:
    """Whole bytes, >= 0, from a number or a string such as "512KiB", "64MiB", "1.5GB"; else ValueError."""
    amount = _amount(value, _BYTES)
    if amount is None or amount != int(amount):
        raise ValueError(f'expected a size, such as 1048576, "512KiB", "64MiB", "1GiB" or "500MB", not {value!r:.80}')
    return int(amount)


def _amount(value: object, units: dict[str, str]) -> Decimal | None:
    # In decimals, so that "1.1MB" is 1100000 bytes and "5.5s" the same number as 5.5. A bool is an int to Python only.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Decimal(str(value)) if 0 <= value < math.inf else None
    written = _WRITTEN.fullmatch(value.strip()) if isinstance(value, str) else None
    if written is None or written[2] not in units:
        return None
    return Decimal(written[1]) * Decimal(units[written[2]])
