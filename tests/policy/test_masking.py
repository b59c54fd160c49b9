"""Keys in answers are covered, wherever they stand and however the answer comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.masking import Mask, Stream, shows_account_keys, without_account_keys
from proxy.policy.routing import Routes
from proxy.settings import load

KEY = "k3y/of+the-account-0123456789"
MASK = Mask((KEY, "another-key-of-the-gateway"))
ROUTES: Routes = load(None, {"HOME": "/"}, {}).routes


@pytest.mark.parametrize("spelling", [KEY, "k3y%2Fof%2Bthe-account-0123456789", "k3y\\/of+the-account-0123456789"])
def test_a_key_is_covered_in_every_spelling_and_the_length_stays(spelling: str) -> None:
    text = f"a{spelling}b".encode()
    assert MASK.cover(text) == b"a" + b"*" * len(spelling) + b"b"


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_key_is_covered_in_every_coding_of_json(coding: str) -> None:
    covered = MASK.cover(f'{{"a": "{KEY}"}}'.encode(coding))
    assert KEY not in covered.decode(coding)
    assert KEY.encode() not in covered.replace(b"\0", b"")


def test_headers_lose_keys_and_sessions() -> None:
    given = (("Location", f"/x?api_key={KEY}"), ("Set-Cookie", "session=1"), ("X-A", "b"), (KEY, "1"))
    stars = "*" * len(KEY)
    assert MASK.headers(given) == (("Location", f"/x?api_key={stars}"), ("X-A", "b"), (stars, "1"))


@given(st.lists(st.sampled_from([KEY, KEY[:7], KEY[7:], "another-key-of-the-gateway", "x", "\n"])), st.data())
def test_a_stream_is_covered_as_the_whole_would_be_wherever_it_is_cut(parts: list[str], data: st.DataObject) -> None:
    whole = "".join(parts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    stream = Stream(MASK)
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    told = b"".join([*(stream.feed(piece) for piece in pieces), stream.end()])
    assert len(told) == len(whole)
    assert KEY.encode() not in told
    assert told == MASK.cover(whole)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"id": 7,  "api_key": "secret" }', b'{"id": 7,  "api_key": "" }'),
        (
            b'{"users": [{"api_key": {"a": 1}}, {"api\\u005fkey": "x"}]}',
            b'{"users": [{"api_key": ""}, {"api\\u005fkey": ""}]}',
        ),
        (b'{"api_key": null}', b'{"api_key": null}'),
        (b"<html>no such thing</html>", b"<html>no such thing</html>"),
        (b'{"api_key": "broken', None),
    ],
)
def test_keys_of_the_account_are_taken_out_and_all_else_stays(text: bytes, expected: bytes | None) -> None:
    assert without_account_keys(text) == expected


def test_only_answers_about_accounts_are_searched_for_keys_that_are_not_the_gateways() -> None:
    assert shows_account_keys(ROUTES.match("GET", "/api/v0/users/current"))
    assert shows_account_keys(ROUTES.match("GET", "/api/v0/users/nobody/knows/"))
    assert shows_account_keys(ROUTES.match("GET", "/api/v0/subaccounts"))
    assert not shows_account_keys(ROUTES.match("GET", "/api/v0/endptjobs/"))
