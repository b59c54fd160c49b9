"""What a running proxy tells of itself, in a terminal: `vast-proxy status`."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any
from urllib.parse import urlsplit

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

URL_VARIABLE = "VAST_PROXY_URL"
"""Where the proxy is, when the command line does not say."""
TOKEN_VARIABLE = "VAST_PROXY_ADMIN_TOKEN"  # noqa: S105 - the name of one
"""Sent as `Authorization: Bearer …`, for a proxy that shows itself only to those who have it."""
DEFAULT_URL = "http://127.0.0.1:8080"
EVERY, PATIENCE = 1.0, 5.0
"""Seconds between two looks, and for an answer."""
PLAIN_WIDTH = 160
"""Columns where there is no terminal."""
USUAL = 3
"""The urgency of a request that says nothing (RFC 9218 4.1)."""


class StatusError(Exception):
    """There is no status to be had. The text says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for the proxy that was named, and for nobody it names."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def fetch(url: str, token: str = "") -> Mapping[str, Any]:
    """The status of the proxy at `url`, its base URL. Raises StatusError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StatusError(f"{url}: not a URL of a proxy, which is like {DEFAULT_URL}")
    request = urllib.request.Request(f"{url.rstrip('/')}/_proxy/status")  # noqa: S310 - http or https, see above
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    # Straight there: HTTP_PROXY is for the way to the world.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(request, timeout=PATIENCE) as answer:
            told = _read(answer)
    except urllib.error.HTTPError as error:
        with error:
            said = _read(error).get("msg", "")
        why = f"{error.code} {said or error.reason}"
        raise StatusError(f"{url}: {why}{_hint(token) if error.code in (401, 403) else ''}") from None
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise StatusError(f"no answer from {url}: {reason}") from None
    except (OSError, ValueError) as error:
        raise StatusError(f"no answer from {url}: {error}") from None
    if not {"version", "totals", "limits", "lines"} <= told.keys():
        raise StatusError(f"{url}: what answers there is no vast-proxy")
    return told


def _read(answer: IO[bytes]) -> Mapping[str, Any]:
    """Its JSON object; an empty one if it is none."""
    try:
        told = json.loads(answer.read(64 * 1024 * 1024))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _hint(token: str) -> str:
    return f"; {TOKEN_VARIABLE} is not its token" if token else f"; if it has an admin token, set {TOKEN_VARIABLE}"


def show(url: str, token: str, *, watch: bool, as_json: bool, out: IO[str] | None = None) -> None:
    """Show it once, or each second until Ctrl-C. Raises StatusError, but not once it has been shown."""

    def look() -> Mapping[str, Any]:
        return fetch(url, token)

    out = out if out is not None else sys.stdout
    told = look()
    if as_json:
        print(json.dumps(told, indent=None if watch else 1), file=out, flush=True)
        while watch:
            threading.Event().wait(EVERY)
            print(json.dumps(look()), file=out, flush=True)
        return
    terminal = out.isatty()
    console = Console(file=out, highlight=False, width=None if terminal else PLAIN_WIDTH)
    if watch and not terminal:
        raise StatusError("--watch needs a terminal, or --json")
    if watch:
        _watch(console, told, look)
    else:
        console.print(drawn(told))


def _watch(console: Console, told: Mapping[str, Any], look: Callable[[], Mapping[str, Any]]) -> None:
    with Live(drawn(told), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                threading.Event().wait(EVERY)
                lost = ""
                try:
                    told = look()
                except StatusError as error:
                    lost = str(error)
                live.update(drawn(told, lost), refresh=True)
        except KeyboardInterrupt:
            return


# --- Drawn ------------------------------------------------------------------------------------------------------------


def drawn(told: Mapping[str, Any], lost: str = "") -> RenderableType:
    """A status as tables. `lost`: why there is no newer one."""
    parts: list[RenderableType] = [_head(told)]
    if lost:
        parts.append(Text(_plain(f"{lost}; trying again"), style="bold red"))
    for name, routes in told["away"].items():
        if routes:
            parts.append(Text(_plain(f"{name} counts as away: {', '.join(routes)}"), style="bold red"))
    parts += [Text(), _sums(told)]
    lines: list[tuple[Any, ...]] = [
        (
            line["route"],
            _key(line["credential"]),
            line["waiting"],
            _until(line["due_in"]),
            _until(line["newcomer_in"]),
            _who(line),
        )
        for line in told["lines"]
    ]
    if lines:
        parts += [Text(), _table("Waiting", ("key", "waiting", "next in", "a newcomer waits", "who"), lines)]
    limits: list[tuple[Any, ...]] = [
        (
            limit["route"] if limit["route"] != "account" else "the whole account",
            _key(limit["credential"]),
            f"{limit['interval']:g} s",
            limit["capacity"],
            limit["source"],
            _until(limit["due_in"]),
            limit["sends"],
            limit["correction"],
        )
        for limit in told["limits"]
        if limit["interval"] or limit["correction"]
    ]
    if limits:
        heads = ("key", "one call in", "at once", "from", "next in", "sent", "last correction")
        parts += [Text(), _table("Limits", heads, limits)]
    return Group(*parts)


def _head(told: Mapping[str, Any]) -> Text:
    head = Text("vast-proxy ", style="bold")
    head.append(_plain(f"{told['version']}"), style="bold")
    head.append(_plain(f"   up {duration(told['uptime'])}, for {told['upstreams']['api']}"), style="not bold dim")
    return head


def _sums(told: Mapping[str, Any]) -> Table:
    totals, cache = told["totals"], told["cache"]
    errors = totals["our_errors"]
    sums = Table.grid(padding=(0, 2))
    for name, value, more in (
        ("waiting", told["waiting"], f"{told['in_flight']} at the API"),
        ("requests", totals["requests"], f"{totals['sent_upstream']} calls sent"),
        ("calls saved", totals["calls_saved"], ", ".join(f"{key} {n}" for key, n in sorted(totals["cache"].items()))),
        ("429s absorbed", totals["refused_upstream"], ""),
        ("errors of ours", sum(errors.values()), ", ".join(f"{code} {n}" for code, n in sorted(errors.items()))),
        ("cache", cache["entries"], f"{_size(cache['bytes'])} of {_size(cache['max_bytes'])}"),
    ):
        sums.add_row(Text(name), Text(f"{value}", style="bold", justify="right"), Text(_plain(more), style="dim"))
    return sums


def _table(title: str, heads: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> Table:
    """The first column is the title's own; numbers stand at the right."""
    rows = list(rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(Text(title, style="bold not dim"), no_wrap=True)
    for at, head in enumerate(heads, 1):
        right = head not in ("key", "from", "last correction", "who")
        table.add_column(head, justify="right" if right else "left", no_wrap=at < len(rows[0]) - 1)
    for row in rows:
        table.add_row(*(Text(_plain(str(cell))) for cell in row))
    return table


def _key(credential: str) -> str:
    return "all keys" if credential == "*" else credential


def _who(line: Mapping[str, Any]) -> str:
    """Those with the most requests in a line, and how urgent these are where it is not as usual (RFC 9218: 3)."""
    told = [
        f"{one['caller']} {one['waiting']}" + ("" if one["urgency"] == USUAL else f" (u={one['urgency']})")
        for one in line["callers"]
    ]
    others = line["waiting"] - sum(one["waiting"] for one in line["callers"])
    return ", ".join(told + ([f"others {others}"] if others > 0 else []))


def _plain(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(character for character in text if character.isprintable())


def _until(seconds: float | None) -> str:
    if seconds is None:
        return "under way"
    return duration(seconds) if seconds > 0.05 else "now"


def duration(seconds: float) -> str:
    """As one would say it: 0.4 s, 12 s, 3 min, 2 h."""
    for unit, size, until in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 129600)):
        if seconds < until:
            return f"{seconds:.1f} s" if seconds < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _size(count: float) -> str:
    for unit in ("B", "KiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} MiB"
