"""Who may come near: from which machine, under which name, past which proxies, and who sees the proxy's own pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Annotated
from urllib.parse import urlsplit

from .errors import Refusal
from .members import TokenHash, same_token
from .messages import Headers, header

Network = Annotated[IPv4Network | IPv6Network, "network"]
"""Addresses: one, or a block in the notation of CIDR."""
Networks = tuple[IPv4Network | IPv6Network, ...]

OPEN = frozenset({"/_proxy/health", "/_proxy/ready"})
"""Pages of ours that tell nothing, and so are for everybody."""
SHELL = frozenset({"/_proxy", "/_proxy/page.css", "/_proxy/page.js"})
"""The page before it has been told anything: it asks for the token of `admin.token`."""
OWN = frozenset({"/_proxy/waiting", "/_proxy/plan"})
"""Pages that tell callers of their own work, for whoever brings a key, or in team mode a token."""


@dataclass(frozen=True, slots=True)
class AdminRules:
    """Who sees what the proxy tells of itself: `admin` in the settings."""

    token: TokenHash | None = None
    """The hash of a token (`vast-proxy token new admin`) that opens the pages under `/_proxy/` to other machines, given
    as `Authorization: Bearer vp_...`. null: only this machine sees them. `/_proxy/health` and `/_proxy/ready` are for
    all."""


# --- Addresses --------------------------------------------------------------------------------------------------------


LONGEST_ADDRESS, LONGEST_NAME = 100, 255
"""Characters of an address with zone and port, and of a name (RFC 1035 2.3.4): what is longer is none."""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address with or without brackets, port or zone; one of IPv4 in the clothes of IPv6 as what it is."""
    return _read_address(text) if len(text) <= LONGEST_ADDRESS else None


@lru_cache(maxsize=4096)
def _read_address(text: str) -> IPv4Address | IPv6Address | None:
    match = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|([0-9.]+)(?::\d+)?|([0-9a-fA-F:.]+(?:%\S+)?)", text.strip())
    try:
        found = ip_address((match[1] or match[2] or match[3]).partition("%")[0]) if match else None
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def is_loopback(host: str) -> bool:
    """Is it this machine that goes by this name or address?"""
    found = _address(host)
    return host.lower() == "localhost" or (found is not None and found.is_loopback)


def client_address(peer: str, headers: Headers, trusted: Networks) -> str:
    """The client's address: the connection's, or the last in X-Forwarded-For that is not itself a trusted proxy's.

    The header counts only from a trusted proxy, and only as far as such ones have written it.
    """
    if not trusted or not _is_in(_address(peer), trusted):
        return peer
    found = peer
    told = ",".join(value for name, value in headers if name.lower() == "x-forwarded-for")
    for hop in reversed(told.split(",") if told else []):
        address = _address(hop)
        if address is None:
            break
        found = str(address)
        if not _is_in(address, trusted):
            break
    return found


def _is_in(address: IPv4Address | IPv6Address | None, networks: Networks) -> bool:
    return address is not None and any(
        address.version == network.version and address in network for network in networks
    )


def neighbourhood(address: str) -> str:
    """What one client can choose its addresses from: of IPv6 the first 64 bits, of IPv4 the address itself."""
    found = _address(address)
    return str(IPv6Network((int(found) >> 64 << 64, 64))) if isinstance(found, IPv6Address) else address


# --- Names ------------------------------------------------------------------------------------------------------------


def is_our_name(host: str, hosts: tuple[str, ...]) -> bool:
    """May a request say that it is for this host? An address, a name of one label, or one of `hosts`.

    A page in a browser whose name was made to lead here (DNS rebinding) has a name with a dot in it.
    """
    return len(host) <= LONGEST_NAME and _is_our_name(host, hosts)


@lru_cache(maxsize=1024)
def _is_our_name(host: str, hosts: tuple[str, ...]) -> bool:
    name, _, port = (host, "", "") if host.endswith("]") else host.rpartition(":") if ":" in host else (host, "", "")
    if port and not port.isdecimal():
        return False
    name = name.lower().removesuffix(".")
    if name.startswith("[") or re.fullmatch(r"[0-9.]+", name):
        return _address(name) is not None
    return re.fullmatch(r"[a-z0-9_.-]*", name) is not None and ("." not in name or name in hosts)


def misdirected(host: str) -> Refusal:
    """For a name that is not ours (RFC 9110 15.5.20)."""
    msg = f"vast-proxy does not go by the name {host!r:.80}; if it should, put it into `hosts` in the settings"
    return Refusal(421, "wrong_host", msg)


def from_another_site(headers: Headers) -> bool:
    """Does a browser send this for a page of another site? No client of the API's is one."""
    site = header(headers, "sec-fetch-site")
    if site is not None and site.strip().lower() not in ("same-origin", "none"):
        return True
    origin = header(headers, "origin")
    if origin is None:
        return False
    try:
        authority = urlsplit(origin.strip()).netloc.lower()
    except ValueError:
        return True
    return not authority or authority != (header(headers, "host") or "").strip().lower()


def cross_site() -> Refusal:
    """For those."""
    return Refusal(403, "cross_site", "vast-proxy serves no requests that a browser sends for a page of another site")


# --- Our own pages ----------------------------------------------------------------------------------------------------

_PASSED_ON = ("forwarded", "via", "x-real-ip")


def is_local(peer: str, headers: Headers) -> bool:
    """Does somebody on this machine ask, and not a proxy on it for somebody else?"""
    names = [name.lower() for name, _ in headers]
    return is_loopback(peer) and not any(name in _PASSED_ON or name.startswith("x-forwarded-") for name in names)


def hidden(path: str, peer: str, headers: Headers, rules: AdminRules) -> Refusal | None:
    """Why this page of ours is not for whoever asks, or None. `path`: without the query."""
    path = path.rstrip("/")
    if path in OPEN or path in OWN or is_local(peer, headers) or (path in SHELL and rules.token is not None):
        return None
    given = [value for name, value in headers if name.lower() == "authorization"]
    if rules.token is not None and any(map(_bearer, given)):
        if len(given) == 1 and same_token(_bearer(given[0]), rules.token):  # one request is one guess
            return None
        return Refusal(401, "token_unknown", "this is not the token of `admin.token`")
    msg = "this page is for this machine itself, and for whoever brings the token of `admin.token`"
    return Refusal(403, "admin_only", msg)


def _bearer(authorization: str) -> str:
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
