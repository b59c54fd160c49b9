"""What a running proxy tells of itself, in a terminal: `vast-proxy status`."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
GAP = 2
"""Spaces between two columns."""
LEAST = 3
"""Rows of a table that are shown however low the terminal is."""


class StatusError(Exception):
    """There is no status to be had. The text says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for the proxy that was named, and for nobody it names."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def fetch(url: str, token: str = "", *, whole: bool = False) -> Mapping[str, Any]:
    """The status of the proxy at `url`, its base URL; `whole`: with all entries of its lists. Raises StatusError."""
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StatusError(f"{url}: not a URL of a proxy, which is like {DEFAULT_URL}")
    request = urllib.request.Request(f"{url.rstrip('/')}/_proxy/status{'?all' if whole else ''}")  # noqa: S310 - http or https, see above
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
        hint = ""
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            reason, hint = error.reason.verify_message, "; name the file of its certificate in SSL_CERT_FILE"
        elif isinstance(error.reason, ConnectionRefusedError):
            hint = "; is it running? Another one is asked by `vast-proxy status URL`"
        raise StatusError(f"no answer from {url}: {reason}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        hint = "; does it speak https?" if parts.scheme == "http" else ""
        raise StatusError(f"no answer from {url}: {error}{hint}") from None
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


def show(url: str, token: str, *, watch: bool, as_json: bool, whole: bool = False, out: IO[str] | None = None) -> None:
    """Show it once, or each second until Ctrl-C. Raises StatusError, but not once it has been shown."""

    def look() -> Mapping[str, Any]:
        return fetch(url, token, whole=whole)

    out = out if out is not None else sys.stdout
    told = look()
    if as_json:
        print(json.dumps(told, indent=None if watch else 1), file=out, flush=True)
        if watch:
            _watch_as_json(look, out)
        return
    terminal = out.isatty()
    console = Console(file=out, highlight=False, width=None if terminal else PLAIN_WIDTH)
    if watch and not terminal:
        raise StatusError("--watch needs a terminal, or --json")
    if watch:
        _watch(console, told, look)
    else:
        console.print(drawn(told, width=console.width))


def _watch_as_json(look: Callable[[], Mapping[str, Any]], out: IO[str]) -> None:
    """One object a line. The proxy may be gone for a while, as when it is restarted: that is said once."""
    said = ""
    while True:
        threading.Event().wait(EVERY)
        try:
            print(json.dumps(look()), file=out, flush=True)
            said = ""
        except StatusError as error:
            if str(error) != said:
                said = str(error)
                sys.stderr.write(f"vast-proxy: {_plain(said)}; trying again\n")
                sys.stderr.flush()


def _watch(console: Console, told: Mapping[str, Any], look: Callable[[], Mapping[str, Any]]) -> None:
    def now(lost: str = "") -> RenderableType:
        return drawn(told, lost, width=console.width, height=console.height)

    with Live(now(), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                threading.Event().wait(EVERY)
                lost = ""
                try:
                    told = look()
                except StatusError as error:
                    lost = str(error)
                live.update(now(lost), refresh=True)
        except KeyboardInterrupt:
            return


# --- Drawn ------------------------------------------------------------------------------------------------------------


def drawn(
    told: Mapping[str, Any], lost: str = "", *, width: int = PLAIN_WIDTH, height: int | None = None
) -> RenderableType:
    """A status as tables, in so many columns and rows; None: in as many rows as it takes. Raises StatusError.

    `lost`: why there is no newer one. What a proxy of another version does not tell is left out.
    """
    try:
        return _drawn(told, lost, width, height)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError):
        version = _plain(str(told.get("version", "?")))
        msg = f"vast-proxy {version} tells its status in a way that this version of the command does not know"
        raise StatusError(f"{msg}; --json shows it as it is") from None


def _drawn(told: Mapping[str, Any], lost: str, width: int, height: int | None) -> RenderableType:
    parts: list[RenderableType] = [_head(told)]
    if lost:
        parts.append(Text(_plain(f"{lost}; trying again"), style="bold red", no_wrap=True, overflow="ellipsis"))
    for name, routes in told.get("away", {}).items():
        if routes:
            pausing = told.get("pausing", {}).get(name, 0)
            which = "all of it" if "*" in routes else ", ".join(routes)
            away = _plain(f"{name} counts as away: {which}" + (f"; {pausing} waiting for it" if pausing else ""))
            parts.append(Text(away, style="bold red", no_wrap=True, overflow="ellipsis"))
    sums = _sums(told, width)
    lines = told.get("lines", [])
    limits = sorted((limit for limit in told.get("limits", []) if _tells(limit)), key=_interest)
    cut = told.get("cut", [])
    if height is None:
        rows_of_lines = rows_of_limits = sys.maxsize
    else:
        # A row each for the head of a table and the space before it.
        left = height - len(parts) - (1 + sums.row_count) - (2 if lines else 0) - (2 if limits else 0)
        rows_of_lines = max(LEAST, left - min(LEAST, len(limits)))
        rows_of_limits = max(0, left - min(rows_of_lines, len(lines)))
    if lines:
        more = max(0, told.get("line_count", 0) - len(lines))
        parts += [Text(), *_table(_waiting(lines), width, rows_of_lines, more)]
    parts += [Text(), sums]
    if limits and rows_of_limits:
        parts += [Text(), *_table(_limits(limits), width, rows_of_limits, None if "limits" in cut else 0)]
    return Group(*parts)


def _head(told: Mapping[str, Any]) -> Text:
    head = Text("vast-proxy ", style="bold", no_wrap=True, overflow="ellipsis")
    head.append(_plain(f"{told.get('version', '')}"), style="bold")
    for_ = told.get("upstreams", {}).get("api", "")
    head.append(_plain(f"   up {duration(told.get('uptime', 0))}, for {for_}"), style="not bold dim")
    return head


def _sums(told: Mapping[str, Any], width: int) -> Table:
    totals, cache = told.get("totals", {}), told.get("cache", {})
    errors, kinds = totals.get("our_errors", {}), totals.get("error_kinds", {})
    # What failed comes first.
    by_code = sorted(errors.items(), key=lambda item: (kinds.get(item[0]) != "fault", item[0]))
    rows: list[tuple[str, object, str]] = [
        ("waiting", told.get("waiting", 0), f"{told.get('in_flight', 0)} at the API"),
        ("requests", totals.get("requests", 0), f"{totals.get('sent_upstream', 0)} calls sent"),
        (
            "calls saved",
            totals.get("calls_saved", 0),
            ", ".join(f"{key} {n}" for key, n in sorted(totals.get("cache", {}).items())),
        ),
        ("429s absorbed", totals.get("refused_upstream", 0), ""),
        ("errors of ours", sum(errors.values()), ", ".join(f"{code} {n}" for code, n in by_code)),
        ("cache", cache.get("entries", 0), f"{_size(cache.get('bytes', 0))} of {_size(cache.get('max_bytes', 0))}"),
    ]
    for name, origin in told.get("origins", {}).items():
        if name == "api" or origin.get("in_flight") or origin.get("waiting"):
            rows.append((f"ceiling, {name}", *_ceiling(origin)))
    names, values = (max(len(str(row[column])) for row in rows) for column in (0, 1))
    sums = Table.grid(padding=(0, GAP, 0, 0))
    sums.add_column(width=names)
    sums.add_column(width=values, justify="right")
    sums.add_column(no_wrap=True)
    for name, value, more in rows:
        style = "bold red" if name == "errors of ours" and "fault" in kinds.values() else "bold"
        rest = _begun(_plain(more), max(1, width - names - values - 2 * GAP))
        sums.add_row(Text(name), Text(f"{value}", style=style), Text(rest, style="dim"))
    return sums


def _ceiling(origin: Mapping[str, Any]) -> tuple[str, str]:
    """How many may go at once now; and of what that is a part."""
    flying = f"{origin.get('in_flight', 0)} of {origin.get('slots', 0)} connections in use"
    if not origin.get("rate"):
        return "none", flying
    tokens = max(0.0, origin.get("tokens") or 0.0)
    return f"{tokens:.1f}", f"of {origin.get('burst', 0):g} at once, {origin['rate']:g} a second; {flying}"


# --- Tables that fit --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of a table, and how much it matters."""

    head: str
    cells: Sequence[str]
    rank: int
    """The greatest is left out first, where there is no room; 0: never."""
    right: bool = False
    """A number: it stands at the right."""
    least: int = 0
    """It may be shortened to so many characters; 0: not at all."""

    @property
    def width(self) -> int:
        return max(len(self.head), *map(len, self.cells))


def _waiting(lines: Sequence[Mapping[str, Any]]) -> list[_Column]:
    def column(head: str, rank: int, cell: Callable[[Mapping[str, Any]], object], **more: Any) -> _Column:
        return _Column(head, [_plain(str(cell(line))) for line in lines], rank, **more)

    return [
        column("Waiting", 0, lambda line: line.get("route", "?"), least=24),
        column("key", 6, lambda line: _key(line.get("credential", "?"))),
        column("waiting", 0, lambda line: line.get("waiting", 0), right=True),
        column("oldest", 1, lambda line: _until(line.get("oldest_for", 0)), right=True),
        column("held by", 2, lambda line: line.get("held_by", "")),
        column("next in", 3, lambda line: _until(line.get("due_in")), right=True),
        column("newcomer waits", 5, lambda line: _until(line.get("newcomer_in")), right=True),
        column("who", 4, _who, least=20),
    ]


def _limits(limits: Sequence[Mapping[str, Any]]) -> list[_Column]:
    def column(head: str, rank: int, cell: Callable[[Mapping[str, Any]], object], **more: Any) -> _Column:
        return _Column(head, [_plain(str(cell(limit))) for limit in limits], rank, **more)

    def route(limit: Mapping[str, Any]) -> str:
        name = str(limit.get("route", "?"))
        return name if name != "account" else "the whole account"

    return [
        column("Limits", 0, route, least=24),
        column("key", 4, lambda limit: _key(limit.get("credential", "?"))),
        column("one call in", 0, lambda limit: f"{limit.get('interval', 0):g} s", right=True),
        column("at once", 3, lambda limit: limit.get("capacity", ""), right=True),
        column("from", 1, lambda limit: limit.get("source", "")),
        column("next in", 2, lambda limit: _until(limit.get("due_in")), right=True),
        column("sent", 6, lambda limit: limit.get("sends", ""), right=True),
        column("last correction", 5, lambda limit: limit.get("correction", ""), least=16),
    ]


def _tells(limit: Mapping[str, Any]) -> bool:
    """Is there a limit, or a reason to speak of it?"""
    return bool(limit.get("interval") or limit.get("correction"))


def _interest(limit: Mapping[str, Any]) -> tuple[bool, bool]:
    """Those first where somebody waits, then those that were corrected."""
    corrected = limit.get("source") == "learned" or limit.get("correction")
    return not limit.get("waiting"), not corrected


def _table(columns: Sequence[_Column], width: int, rows: int, more: int | None) -> list[Text | Table]:
    """As many columns and rows as there is room for. The first column is named by the title of the table.

    `more`: how many there are of which nothing was told; None: nobody knows.
    """
    count = len(columns[0].cells)
    shown = count if count < rows or (count == rows and more == 0) else max(1, rows - 1)
    widths = fitting(columns, width)
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim", pad_edge=False)
    for column, wide in widths:
        head = Text(column.head, style="bold not dim" if column is columns[0] else "")
        table.add_column(head, justify="right" if column.right else "left", no_wrap=True, width=wide)
    for row in range(shown):
        shorter = [(_shortened if column is columns[0] else _begun)(column.cells[row], wide) for column, wide in widths]
        table.add_row(*map(Text, shorter))
    if shown == count and more == 0:
        return [table]
    told = f"… and {count - shown + more} more" if more is not None else "… and more: --all shows them"
    return [table, Text(told, style="dim")]


def fitting(columns: Sequence[_Column], width: int) -> list[tuple[_Column, int]]:
    """Those of the columns that fit, each with its width: what matters least is left out, what can is shortened."""
    left = [column for column in columns if any(column.cells)]

    def needed() -> int:
        return sum(min(column.width, column.least or column.width) for column in left) + GAP * (len(left) - 1)

    while needed() > width and any(column.rank for column in left):
        left.remove(max(left, key=lambda column: column.rank))
    over = sum(column.width for column in left) + GAP * (len(left) - 1) - width
    widths = {}
    for column in sorted(left, key=lambda column: -column.rank):
        shorter = max(0, min(over, column.width - column.least)) if column.least else 0
        over -= shorter
        widths[column.head] = column.width - shorter
    return [(column, widths[column.head]) for column in left]


def _shortened(text: str, width: int) -> str:
    """With its beginning and its end: a method and what is done tell more than what stands between."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _begun(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _key(credential: str) -> str:
    return "all keys" if credential == "*" else credential


def _who(line: Mapping[str, Any]) -> str:
    """Those with the most requests in a line, and how urgent these are where it is not as usual (RFC 9218: 3)."""
    told = [
        f"{one['caller']} {one['waiting']}" + ("" if one["urgency"] == USUAL else f" (u={one['urgency']})")
        for one in line.get("callers", [])
    ]
    others = line.get("waiting", 0) - sum(one["waiting"] for one in line.get("callers", []))
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
