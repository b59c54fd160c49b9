"""Who is near and who only says so."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy import exposure
from proxy.policy.exposure import (
    AdminRules,
    client_address,
    from_another_site,
    hidden,
    is_loopback,
    is_our_name,
    neighbourhood,
)
from proxy.policy.members import hashed
from proxy.policy.messages import Headers

HOSTS = ("proxy.example", "10.example")
TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST", "::ffff:127.0.0.1"])
def test_these_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "my-machine", "localhost.example", "", "127.0.0.1.x"])
def test_these_are_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1:8080", "10.1.2.3:80", "[::1]", "[::1]:8080", "[fe80::1%25eth0]:80", "localhost:8080",
        "vast-proxy:8080", "vast_proxy", "proxy.example", "PROXY.example.:8080", "10.example", "localhost.", "",
    ],
)  # fmt: skip
def test_addresses_single_labels_and_named_hosts_are_ours(host: str) -> None:
    assert is_our_name(host, HOSTS)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8080", "x.proxy.example", "proxy.example.evil", "127.0.0.1.nip.io",
        "127.1", "1.2.3.4.5", "999.1.1.1", "[evil]", "evil.example:80x", "a@b.example", "b\u00fccher", "a b", "x:80:80",
    ],
)  # fmt: skip
def test_any_other_name_is_not(host: str) -> None:
    assert not is_our_name(host, HOSTS)


def test_no_name_is_longer_than_a_name_can_be_and_long_ones_are_not_kept() -> None:
    for host in ("a" * 256, f"[{'1' * 300}]", f"localhost:{'1' * 300}"):
        assert not is_our_name(host, HOSTS)
        assert client_address("10.0.0.1", (("X-Forwarded-For", host),), TRUSTED) == "10.0.0.1"
    before = exposure._is_our_name.cache_info().misses, exposure._read_address.cache_info().misses
    is_our_name("b" * 16_000, HOSTS)
    client_address("10.0.0.1", (("X-Forwarded-For", "1" * 16_000),), TRUSTED)
    assert (exposure._is_our_name.cache_info().misses, exposure._read_address.cache_info().misses) == before


# --- Addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "told", "address"),
    [
        ("192.0.2.1", ("198.51.100.7",), "192.0.2.1"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("10.0.0.1", ("198.51.100.7",), "198.51.100.7"),
        ("::ffff:10.0.0.1", ("198.51.100.7",), "198.51.100.7"),
        ("10.0.0.1", ("203.0.113.9, 198.51.100.7",), "198.51.100.7"),
        ("10.0.0.1", ("203.0.113.9", "198.51.100.7, 10.9.9.9"), "198.51.100.7"),
        ("10.0.0.1", ("10.0.0.3, 10.0.0.2",), "10.0.0.3"),
        ("10.0.0.1", ("198.51.100.7:4711",), "198.51.100.7"),
        ("fd00::1", ("[2001:db8::1]:4711",), "2001:db8::1"),
        ("10.0.0.1", ("198.51.100.7, unknown, 10.0.0.2",), "10.0.0.2"),
        ("10.0.0.1", ("",), "10.0.0.1"),
    ],
)
def test_the_client_is_who_the_last_trusted_proxy_saw(peer: str, told: tuple[str, ...], address: str) -> None:
    assert client_address(peer, tuple(("X-Forwarded-For", value) for value in told), TRUSTED) == address
    assert client_address(peer, tuple(("x-forwarded-for", value) for value in told), ()) == peer


@given(st.text(), st.sampled_from(["10.0.0.1", "192.0.2.1", ""]))
def test_nothing_that_is_said_of_an_address_is_too_strange(text: str, peer: str) -> None:
    assert client_address(peer, (("X-Forwarded-For", text),), TRUSTED) or not peer


def test_what_one_client_can_choose_from_counts_as_one() -> None:
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:1") != neighbourhood("2001:db8:0:1::1")
    assert neighbourhood("192.0.2.1") == "192.0.2.1" != neighbourhood("192.0.2.2")
    assert neighbourhood("") == ""


# --- Browsers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ((), False),
        ((("Sec-Fetch-Site", "none"),), False),
        ((("Sec-Fetch-Site", "same-origin"), ("Origin", "http://vast-proxy:8080")), False),
        ((("Origin", "https://VAST-PROXY:8080"),), False),
        ((("sec-fetch-site", "cross-site"),), True),
        ((("Sec-Fetch-Site", "same-site"),), True),
        ((("Origin", "http://vast-proxy:9090"),), True),
        ((("Origin", "http://evil.example"), ("Sec-Fetch-Site", "same-origin")), True),
        ((("Origin", "null"),), True),
        ((("Origin", "http://[x"),), True),
    ],
)
def test_a_page_of_another_site_is_told_by_what_browsers_say(headers: Headers, foreign: bool) -> None:
    assert from_another_site((("Host", "vast-proxy:8080"), *headers)) == foreign


# --- Our own pages ----------------------------------------------------------------------------------------------------

TOKEN = "vp_0123456789abcdef"
RULES = AdminRules(hashed(TOKEN))
BEARER = (("Authorization", f"Bearer {TOKEN}"),)


def told(peer: str, headers: Headers = (), rules: AdminRules = RULES, path: str = "/_proxy/status") -> str:
    found = hidden(path, peer, headers, rules)
    return found.code if found else ""


@pytest.mark.parametrize("path", ["/_proxy/health", "/_proxy/ready", "/_proxy/ready/"])
def test_health_and_readiness_are_for_everybody(path: str) -> None:
    assert told("192.0.2.1", path=path) == ""


@pytest.mark.parametrize("path", ["/_proxy/waiting", "/_proxy/plan", "/_proxy/plan/"])
def test_what_tells_callers_of_their_own_work_is_not_judged_by_the_machine(path: str) -> None:
    assert told("192.0.2.1", path=path) == ""


@pytest.mark.parametrize("path", ["/_proxy", "/_proxy/", "/_proxy/page.css", "/_proxy/page.js"])
def test_the_page_that_asks_for_the_token_is_shown_where_there_is_one(path: str) -> None:
    assert told("192.0.2.1", path=path) == ""
    assert told("192.0.2.1", rules=AdminRules(), path=path) == "admin_only"
    assert told("127.0.0.1", rules=AdminRules(), path=path) == ""


@pytest.mark.parametrize(
    "path", ["/_proxy/status", "/_proxy/events", "/_proxy/metrics", "/_proxy/healthy", "/_proxy/x/../health"]
)
def test_the_other_pages_are_for_this_machine_and_the_token(path: str) -> None:
    assert told("127.0.0.1", path=path) == told("::1", path=path) == ""
    assert told("192.0.2.1", BEARER, path=path) == ""
    assert told("192.0.2.1", path=path) == "admin_only"
    assert told("192.0.2.1", BEARER, AdminRules(), path=path) == "admin_only"
    assert told("192.0.2.1", (("Authorization", f"Bearer {TOKEN}x"),), path=path) == "token_unknown"


def test_one_request_is_one_guess() -> None:
    wrong = (("Authorization", "Bearer vp_0123456789abcdeX"),)
    for headers in (wrong * 99 + BEARER, BEARER + wrong, BEARER * 2, (("Authorization", "Basic x"), *BEARER)):
        assert told("192.0.2.1", headers) == "token_unknown"


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "x-forwarded-host", "X-Real-IP", "Via"])
def test_what_was_passed_on_does_not_come_from_this_machine(name: str) -> None:
    assert told("127.0.0.1", ((name, "127.0.0.1"),)) == "admin_only"
    assert told("127.0.0.1", ((name, "127.0.0.1"), *BEARER)) == ""
