"""A text in whatever spelling a server would undo, percent-encoded or escaped as in JSON: found in linear time.

What is looked into comes from anybody and may be as large as a body, so nothing here makes an object for each escape.
"""

from __future__ import annotations

import binascii

LAYERS = 3
"""Spellings of spellings that are undone: JSON in a JSON string, a URL as the parameter of another."""

_PERCENT, _JSON = b"%", b"\\u00"
_IN = bytes.maketrans(b"\r\n", b"  ")
_RUNS = (4096, 64, 4)


def holds(data: bytes, text: bytes) -> bool:
    """Is this text in there, in whatever spelling? It is one of letters, digits, `-` and `_`.

    Backslashes and NULs make no difference, so that JSON in a JSON string and UTF-16 are seen through.
    """
    if b"\0" in data:
        data = data.translate(None, b"\0")
    for layer in range(LAYERS + 1):
        if text in data or (b"\\" in data and text in data.translate(None, b"\\")):
            return True
        if layer == LAYERS or (_PERCENT not in data and _JSON not in data):
            return False
        before, data = len(data), _undone(data)
        if len(data) == before:  # nothing of it was an escape
            return False
    return False


def _undone(data: bytes) -> bytes:
    """One layer of `%76` and `\\u0076` undone, without `=` and NUL, of which there was none.

    By the decoder of quoted-printable, which writes them `=76`: the one that the standard library has in C. What else
    that coding knows, `==` and an `=` at the end of a line, must not be met.
    """
    if b"\\\\" in data:
        data = data.replace(b"\\\\", b"\\")  # JSON in a JSON string
    data = data.replace(_JSON, _PERCENT)
    if any(special in data for special in (b"=", b"\r", b"\n")):
        data = data.translate(_IN, b"=")
    if b"%%" in data:
        for run in _RUNS:
            data = data.replace(_PERCENT * run, b"%%")  # of so many no more than the last begins an escape
        data = data.replace(b"%%", b"%\0%").replace(b"%%", b"%\0%")
    data = binascii.a2b_qp(data.replace(_PERCENT, b"=")).replace(b"=", _PERCENT)
    return data.translate(None, b"\0") if b"\0" in data else data
