"""A refusal is an answer: what it says, and that it can be raised anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from proxy.policy.errors import GIVE_UP_AFTER, Refusal, UpstreamError


def test_the_body_is_an_object_with_the_sentence_that_the_client_shows() -> None:
    body = Refusal(429, "queue_full", 'say "ä" and\nnothing else', 3).body()
    assert json.loads(body) == {"success": False, "error": "queue_full", "msg": 'say "ä" and\nnothing else'}
    assert body.isascii()


@pytest.mark.parametrize(
    ("seconds", "sent"),
    [(None, None), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60"), (60.0, "60"), (GIVE_UP_AFTER, "61")],
)
def test_retry_after_is_a_whole_number_of_seconds_and_never_too_early(seconds: float | None, sent: str | None) -> None:
    assert Refusal(429, "wait_too_long", "later", seconds).retry_after_header() == sent


def test_what_must_not_be_tried_again_by_itself_is_beyond_the_stock_clients_patience() -> None:
    assert GIVE_UP_AFTER > 60


def test_two_refusals_are_two_even_if_they_say_the_same() -> None:
    assert Refusal(429, "queue_full", "later") != Refusal(429, "queue_full", "later")


@contextmanager
def _managed() -> Iterator[None]:
    yield


def _refuse(*_: object) -> None:
    raise Refusal(503, "upstream_unreachable", "away")


@_managed()
def _refuse_inside() -> None:
    _refuse()


def _refuse_in_the_place_of_another() -> None:
    with ExitStack() as stack:
        stack.push(_refuse)
        raise KeyError


def test_a_refusal_passes_through_context_managers_as_any_exception() -> None:
    # They set __traceback__ and __context__ as attributes, which a frozen class would not let them.
    with pytest.raises(Refusal) as caught:
        _refuse_inside()
    assert caught.value.code == "upstream_unreachable"
    with pytest.raises(Refusal) as caught:
        _refuse_in_the_place_of_another()
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.parametrize("sent", [False, True])
def test_an_upstream_error_says_whether_the_request_may_have_arrived(sent: bool) -> None:
    error = UpstreamError("connection reset", sent=sent)
    assert (str(error), error.sent, error.timed_out) == ("connection reset", sent, False)
