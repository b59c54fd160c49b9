"""A text is found however it is spelt, and looking for it costs no more than to read what is looked into."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.spelling import holds

TEXT = "vp_0123456789abcdef0123456789ABCDEF-_"
MIB = 1024 * 1024


def percent(text: str, chosen: Callable[[], bool]) -> str:
    return "".join(f"%{ord(char):02{'xX'[chosen()]}}" if char == "%" or chosen() else char for char in text)


def in_json(text: str, chosen: Callable[[], bool]) -> str:
    return "".join(f"\\u{ord(char):04x}" if chosen() else json.dumps(char)[1:-1] for char in text)


@given(st.data(), st.lists(st.sampled_from([percent, in_json]), max_size=2))
def test_a_text_is_found_in_two_layers_of_spelling_wherever_it_stands(
    data: st.DataObject, layers: list[Callable[[str, Callable[[], bool]], str]]
) -> None:
    around = st.sampled_from(
        ["", "%", "%%", "%" * 70, "%" * 5000, "=", "==", "=\r\n", "\r", "%2", "\\", "{", "%\0", "é"]
    )
    text = TEXT
    for spell in layers:
        text = spell(text, lambda: data.draw(st.booleans()))
    before, after = data.draw(around), data.draw(around)
    if layers and layers[-1] is in_json and before[-1:] == "\\":
        before = ""  # it would be the first half of an escaped backslash
    assert holds(f"{before}{text}{after}".encode(), TEXT.encode())


@pytest.mark.parametrize("coding", ["utf-8", "utf-16", "utf-16-be", "utf-32"])
def test_a_text_is_found_in_every_coding_of_json(coding: str) -> None:
    escaped = "".join(f"\\u{ord(char):04x}" for char in TEXT)
    for text in (TEXT, escaped, json.dumps({"a": json.dumps({"b": escaped})})):
        assert holds(json.dumps({"a": text}).encode(coding), TEXT.encode())


@given(st.binary())
def test_what_is_not_there_is_not_found(data: bytes) -> None:
    assert not holds(data, b"vp_0123456789abcdef")


@pytest.mark.parametrize("near", [TEXT[:-1], TEXT[1:], TEXT.replace("5", "6", 1), percent(TEXT, lambda: True)[:-1]])
def test_a_part_of_it_is_not_it(near: str) -> None:
    assert not holds(near.encode(), TEXT.encode())


@pytest.mark.parametrize(
    "unit",
    [
        b"a&",
        b"%41",
        b"%2576",
        b"%252541",
        b"%",
        b"%%a",
        b"v",
        b"vp_",
        b"\\u0076",
        b"\\",
        b"=%\r",
        b"%76p_%30",
        b"\0%41",
    ],
)
def test_nothing_is_so_strange_that_it_takes_long_to_look_through(unit: bytes) -> None:
    data = b"%" + unit * (16 * MIB // len(unit))
    began = time.process_time()
    assert not holds(data, TEXT.encode())
    assert time.process_time() - began < 1.0
