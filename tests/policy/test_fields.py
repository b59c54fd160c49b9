"""Where fields stand in a JSON text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.fields import spans

NAMES = frozenset({"k"})


@pytest.mark.parametrize(
    ("text", "found", "deep"),
    [
        ('{"k": "v"}', ['"v"'], ['"v"']),
        ('{ "k" : [1, {"k": 2}] , "a":3}', ['[1, {"k": 2}]'], ['[1, {"k": 2}]']),
        ('{"k": 1, "k": null, "\\u006b": true}', ["1", "null", "true"], ["1", "null", "true"]),
        ('{"a": "k", "b": ["k", "x"], "c": {"k": -1.5e3}}', [], ["-1.5e3"]),
        ('[{"k": {}}, {"k": []}]', [], ["{}", "[]"]),
        ('{"a": "\\"k\\": 1", "k": "}{,:\\\\"}', ['"}{,:\\\\"'], ['"}{,:\\\\"']),
        ('\ufeff{"k": "ä"}', ['"ä"'], ['"ä"']),
        ('"k"', [], []),
    ],
)
def test_the_values_of_named_fields_are_found(text: str, found: list[str], deep: list[str]) -> None:
    raw = text.encode()
    assert [raw[start:end].decode() for start, end in spans(raw, NAMES) or []] == found
    assert [raw[start:end].decode() for start, end in spans(raw, NAMES, deep=True) or []] == deep


@pytest.mark.parametrize("text", [b"", b"{", b"k=v", b"\xff", '{"k": "v"}'.encode("utf-16"), b"[" * 100_000])
def test_what_is_no_json_has_none(text: bytes) -> None:
    assert spans(text, NAMES) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("k"), inner),
)


@given(st.dictionaries(st.text() | st.just("k"), JSON), st.booleans(), st.sampled_from([None, 1]))
def test_a_value_can_be_changed_and_all_else_stays(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    if (found := spans(raw, NAMES)) is None:
        return
    for start, end in reversed(found):
        raw = raw[:start] + b'"new"' + raw[end:]
    assert json.loads(raw) == (value | {"k": "new"} if "k" in value else value)
