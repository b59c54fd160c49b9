"""Which write is the same as another, which one takes another's effect back, and what an Idempotency-Key is."""

from __future__ import annotations

import gzip
from dataclasses import replace

import pytest

from proxy.policy.errors import Refusal
from proxy.policy.guarding import LONGEST_KEY, Write, describe, idempotency_key, made, overtakes
from proxy.policy.identity import identify
from proxy.policy.messages import Request, Response
from proxy.settings import load

ROUTES = load(None, {}, {}).routes
AUTH = ("Authorization", "Bearer secret")
ORIGIN = "https://cloud.vast.ai"


def write(line: str, body: bytes = b"{}", key: str = "", auth: tuple[str, str] = AUTH, origin: str = ORIGIN) -> Write:
    method, target = line.split(" ")
    request = Request(method, target, (auth,), body)
    return describe(request, ROUTES.match(method, target), identify(request), origin, key)


STOP = "PUT /api/v0/instances/5/"


def test_the_same_is_the_same_whatever_else_its_headers_say() -> None:
    request = Request("PUT", "/api/v0/instances/5/", (AUTH, ("User-Agent", "other")), b"{}")
    assert describe(request, ROUTES.match("PUT", request.target), identify(request), ORIGIN) == write(STOP)


@pytest.mark.parametrize(
    "other",
    [
        write("PUT /api/v0/instances/6/"),
        write("PUT /api/v0/instances/5/?x=1"),
        write("DELETE /api/v0/instances/5/"),
        write(STOP, b"{} "),
        write(STOP, auth=("Authorization", "Bearer other")),
        write(STOP, origin="http://127.0.0.1:9000"),
    ],
)
def test_another_target_method_body_caller_or_origin_is_another(other: Write) -> None:
    assert other.fingerprint != write(STOP).fingerprint


def test_nothing_secret_is_in_it() -> None:
    told = repr(write("PUT /api/v0/asks/5/?api_key=secret", b'{"api_key": "secret", "env": "secret"}', key="my-key"))
    assert "secret" not in told
    assert "my-key" not in told


@pytest.mark.parametrize(
    ("earlier", "later", "overtaken"),
    [
        ("PUT /api/v0/instances/5/ stop", "PUT /api/v0/instances/5/ start", True),
        ("PUT /api/v0/instances/5/ stop", "PUT /api/v0/instances/5/ stop", False),
        ("PUT /api/v0/instances/5/ stop", "PUT /api/v0/instances/6/ start", False),
        ("PUT /api/v0/instances/5/ stop", "PUT /api/v0/instances/reboot/5/ -", True),
        ("PUT /api/v0/instances/5/ stop", "PUT /api/v0/instances/ start-all", True),
        ("PUT /api/v0/instances/ stop-all", "PUT /api/v0/instances/5/ start", True),
        ("PUT /api/v0/instances/reboot/5/ -", "PUT /api/v0/instances/5/ stop", True),
        ("PUT /api/v0/instances/reboot/5/ -", "PUT /api/v0/instances/ stop-all", False),
        ("PUT /api/v0/asks/5/ a", "PUT /api/v0/asks/5/ b", False),
        ("PUT /api/v0/asks/5/ a", "PUT /api/v0/asks/6/ b", False),
        ("PUT /api/v0/asks/5/ a", "DELETE /api/v0/instances/5/ -", False),
        ("PUT /api/v0/instances/prepay/5/ a", "PUT /api/v0/instances/5/ label", False),
        ("PUT /api/v0/instances/prepay/5/ a", "PUT /api/v0/instances/prepay/5/ b", False),
        ("PUT /api/v0/instances/prepay/5/ a", "DELETE /api/v0/instances/5/ -", True),
        ("PUT /api/v0/instances/prepay/5/ a", "DELETE /api/v0/instances/6/ -", False),
        ("PUT /api/v0/volumes/ a", "DELETE /api/v0/volumes/ -", False),
        ("PUT /api/v0/launch_instance/ a", "PUT /api/v0/launch_instance/ b", False),
        ("POST /api/v0/asks/bulk/ a", "PUT /api/v0/asks/5/ b", False),
        ("PUT /api/v0/commands/transfer_credit/ a", "PUT /api/v0/commands/transfer_credit/ b", False),
        ("PUT /api/v0/users/ a", "PUT /api/v0/users/ b", True),
        ("POST /api/v0/deployment/7/stop/ -", "PUT /api/v0/deployments/ a", True),
    ],
)
def test_what_takes_back_another_ones_effect(earlier: str, later: str, overtaken: bool) -> None:
    def made(text: str) -> Write:
        method, target, body = text.split(" ")
        return write(f"{method} {target}", body.encode())

    assert overtakes(made(later), made(earlier)) is overtaken
    is_spend = made(earlier).effect == "spend"
    assert overtakes(replace(made(later), author="another member"), made(earlier)) is (overtaken and not is_spend)
    assert not overtakes(write("DELETE /api/v0/instances/5/", auth=("Authorization", "Bearer x")), made(earlier))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([], ""),
        (['"8e03978e-40d5-43dd-bc93-6894a57f9324"'], "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (["8e03978e-40d5-43dd-bc93-6894a57f9324"], "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (['  "a b"  '], "a b"),
        (["x" * LONGEST_KEY], "x" * LONGEST_KEY),
    ],
)
def test_a_key_is_a_text_with_or_without_quotes(values: list[str], key: str) -> None:
    assert idempotency_key(Request("PUT", "/", tuple(("idempotency-Key", value) for value in values))) == key


@pytest.mark.parametrize("values", [[""], ['""'], [" "], ["x" * (LONGEST_KEY + 1)], ["a\tb"], ["é"], ["a", "a"]])
def test_what_is_no_key_is_refused(values: list[str]) -> None:
    with pytest.raises(Refusal, match="Idempotency-Key") as told:
        idempotency_key(Request("PUT", "/", tuple(("Idempotency-Key", value) for value in values)))
    assert told.value.status == 400


def test_to_destroy_what_was_made_takes_it_back() -> None:
    answer = Response(200, (), b'{"success": true, "new_contract": 5}')
    launch, destroy = write("PUT /api/v0/launch_instance/"), write("DELETE /api/v0/instances/5/")
    assert made(answer) == "5"
    assert made(Response(200, (("Content-Encoding", "gzip"),), gzip.compress(answer.body))) == "5"
    assert overtakes(destroy, launch, "5")
    assert not overtakes(destroy, launch, "6")
    assert not overtakes(write("PUT /api/v0/instances/5/"), launch, "5")


def test_who_is_nobody_has_no_key_and_adopts_nothing() -> None:
    nobody = write("POST /api/v0/users/", key="1", auth=("X-None", ""))
    assert (nobody.key, nobody.adoptable) == ("", False)


def test_a_sign_of_life_is_always_sent() -> None:
    assert not write("POST /api/v0/deployment/7/heartbeat/").adoptable
