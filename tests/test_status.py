"""`vast-proxy status`: the status of a running proxy in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import Gateway, Start, clean_environment

from proxy.settings import NO_SETTINGS
from proxy.status import TOKEN_VARIABLE, URL_VARIABLE, StatusError, drawn, duration, fetch

CHECKOUT = Path(__file__).parent.parent
RENT = {"client_id": "me", "image": "x", "disk": 10}
COMMAND = [sys.executable, "-m", "proxy", "status"]


def heeds_ctrl_c() -> None:
    """In the child: a test run in the background has it ignored, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it, its output in a pipe."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=CHECKOUT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


async def waiting(start: Start) -> tuple[Gateway, list[asyncio.Task[Any]]]:
    """A proxy in real time in which two wait."""
    gateway: Gateway = await start()
    await gateway.get("/api/v0/ssh/")
    await gateway.get("/api/v0/ssh/")
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT)) for number in range(3)]
    await asyncio.sleep(0.3)
    return gateway, renting


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_in_a_pipe_it_is_plain_text_with_all_that_matters(start: Start) -> None:
    gateway, renting = await waiting(start)
    got = await asyncio.to_thread(ask, gateway.url)
    await end(renting)
    assert (got.returncode, got.stderr) == (0, "")
    assert "\x1b" not in got.stdout
    lines = [re.split(r"  +", line.strip()) for line in got.stdout.splitlines()]
    assert lines[0][0].startswith("vast-proxy ")
    assert ["waiting", "2", "1 at the API"] in lines or ["waiting", "2", "0 at the API"] in lines
    assert ["requests", "3", "2 calls sent"] in lines
    assert next(line[2] for line in lines if line[0] == "PUT /api/v0/asks/{id}/") == "2"
    [limit] = [line for line in lines if line[0] == "GET /api/v0/ssh/"]
    assert limit[2:5] == ["1 s", "1", "documented"]


async def test_json_is_what_the_proxy_says(start: Start) -> None:
    gateway: Gateway = await start()
    got = await asyncio.to_thread(ask, "--json", **{URL_VARIABLE: gateway.url})
    assert got.returncode == 0
    told, said = json.loads(got.stdout), (await gateway.get("/_proxy/status")).json
    assert told.keys() == said.keys()
    assert told["version"] == said["version"]


async def test_watch_redraws_a_terminal_each_second_until_ctrl_c(start: Start) -> None:
    gateway, renting = await waiting(start)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(  # noqa: ASYNC220 - it is read from a thread
        [*COMMAND, gateway.url, "--watch"],
        cwd=CHECKOUT,
        env=clean_environment() | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=heeds_ctrl_c,  # noqa: PLW1509 - it does no more than that
    )
    os.close(theirs)
    told = bytearray()

    def read(until: float) -> None:
        end = time.monotonic() + until
        while time.monotonic() < end:
            try:
                told.extend(os.read(ours, 65536))
            except OSError:
                return

    reading = asyncio.create_task(asyncio.to_thread(read, 20.0))
    await asyncio.sleep(4)
    process.send_signal(signal.SIGINT)
    code = await asyncio.to_thread(process.wait, 10)
    await reading
    os.close(ours)
    await end(renting)
    assert code == 0
    assert told.count(b"vast-proxy ") >= 3
    assert b"PUT /api/v0/asks/{id}/" in told
    assert b"Traceback" not in told


async def test_watch_with_json_is_one_object_a_line(start: Start) -> None:
    gateway: Gateway = await start()
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        gateway.url,
        "--json",
        "--watch",
        cwd=CHECKOUT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        preexec_fn=heeds_ctrl_c,
    )
    assert process.stdout is not None
    lines = [json.loads(await process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 0
    await process.stdout.read()
    assert lines[1]["uptime"] > lines[0]["uptime"]


async def test_watch_with_json_goes_on_over_a_restart_and_says_so_once(start: Start) -> None:
    gateway: Gateway = await start()
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        gateway.url,
        "--json",
        "--watch",
        cwd=CHECKOUT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heeds_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    before = json.loads(await process.stdout.readline())
    await gateway.restart(pause=3.5)
    while (after := json.loads(await process.stdout.readline()))["instance"] == before["instance"]:
        pass
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 0
    said = (await process.stderr.read()).decode().splitlines()
    assert after["uptime"] < 10
    assert len(said) == len(set(said)) >= 1
    assert all(line.startswith("vast-proxy: no answer from ") and line.endswith("; trying again") for line in said)


def test_watch_in_a_pipe_says_what_it_needs() -> None:
    with answering(200, STATUS) as (url, _):
        got = ask(url, "--watch")
    assert got.returncode == 1
    assert got.stderr == "vast-proxy: --watch needs a terminal, or --json\n"


# --- Against what is no proxy of ours ---------------------------------------------------------------------------------

STATUS = {
    "version": "1",
    "uptime": 3,
    "upstreams": {"api": "x\x1b[31m"},
    "waiting": 0,
    "in_flight": 0,
    "away": {"api": ["*"]},
    "cache": {"entries": 0, "bytes": 0, "max_bytes": 1},
    "totals": {
        "requests": 0,
        "sent_upstream": 0,
        "calls_saved": 0,
        "cache": {},
        "refused_upstream": 0,
        "our_errors": {"[red]x[/red]": 1},
    },
    "lines": [],
    "limits": [],
}


@contextmanager
def answering(
    status: int, body: Any, tls: ssl.SSLContext | None = None, **headers: str
) -> Iterator[tuple[str, list[Any]]]:
    """A server that says just this; and what it was asked with."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.headers["asked-for"] = self.path
            seen.append(self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    class Quiet(HTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def test_where_nothing_listens_it_fails_with_one_line() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        got = ask(url)
    assert (got.returncode, got.stdout) == (1, "")
    hint = "is it running? Another one is asked by `vast-proxy status URL`"
    assert got.stderr == f"vast-proxy: no answer from {url}: Connection refused; {hint}\n"


@pytest.mark.parametrize("url", ["ftp://x", "http://", "file:///etc/passwd", ""])
def test_what_is_no_url_is_said_so(url: str) -> None:
    with pytest.raises(StatusError, match="not a URL of a proxy"):
        fetch(url)


def test_a_url_may_lack_its_scheme() -> None:
    with answering(200, b"[]") as (url, _), pytest.raises(StatusError, match="no vast-proxy"):
        fetch(url.removeprefix("http://"))


def test_a_proxy_whose_certificate_is_not_trusted_is_told_how_it_is(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with answering(200, b"{}", context) as (url, _), pytest.raises(StatusError, match="SSL_CERT_FILE"):
        fetch(url.replace("http:", "https:"))
    with answering(200, b"{}", context) as (url, _), pytest.raises(StatusError, match="does it speak https"):
        fetch(url)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"success": true}', b"\xff"])
def test_what_is_no_proxy_is_said_so(body: bytes) -> None:
    with answering(200, body) as (url, _), pytest.raises(StatusError, match="no vast-proxy"):
        fetch(url)


@pytest.mark.parametrize("token", ["", "wrong"])
def test_where_a_token_is_wanted_it_says_how_to_give_one(token: str) -> None:
    refused = {"success": False, "error": "no", "msg": "not for you"}
    with answering(401, refused) as (url, _), pytest.raises(StatusError, match=f"401 not for you; .*{TOKEN_VARIABLE}"):
        fetch(url, token)


def test_the_token_is_sent_and_only_if_there_is_one() -> None:
    with answering(200, STATUS) as (url, seen):
        assert ask(url, **{TOKEN_VARIABLE: "secret"}).returncode == 0
        assert ask(url).returncode == 0
    assert [headers["Authorization"] for headers in seen] == ["Bearer secret", None]


def test_the_token_goes_nowhere_else() -> None:
    with answering(200, STATUS) as (there, seen):
        with (
            answering(302, b"", Location=f"{there}/_proxy/status") as (url, _),
            pytest.raises(StatusError, match="302"),
        ):
            fetch(url, "secret")
        assert seen == []


def test_what_it_is_told_is_text_and_no_markup_or_command_to_the_terminal() -> None:
    with answering(200, STATUS) as (url, _):
        got = ask(url)
    assert "\x1b" not in got.stdout
    assert "[red]x[/red] 1" in got.stdout
    assert "api counts as away: all of it" in got.stdout


def test_all_of_it_is_asked_for_by_a_flag() -> None:
    with answering(200, STATUS) as (url, seen):
        assert ask(url).returncode == ask(url, "--all").returncode == 0
    assert [headers["asked-for"] for headers in seen] == ["/_proxy/status", "/_proxy/status?all"]


def test_an_older_status_stays_and_says_that_it_is_one() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(drawn(STATUS, "no answer from there"))
    assert "no answer from there; trying again" in capture.get()
    assert "requests" in capture.get()


def test_its_variables_are_not_taken_for_settings() -> None:
    assert {URL_VARIABLE, TOKEN_VARIABLE} <= NO_SETTINGS


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (12.3, "12 s"), (200, "3 min"), (7200, "2 h"), (864000, "10 d")],
)
def test_durations_are_said_as_one_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# --- Small terminals, other versions ----------------------------------------------------------------------------------

LINE = {
    "credential": "4a768f62",
    "upstream": "api",
    "route": "PUT /api/v0/instances/{id}/and/a/very/long/way/to/the/end/",
    "waiting": 11,
    "oldest_for": 754.2,
    "held_by": "upstreams.max_connections",
    "due_in": 4.2,
    "newcomer_in": 55.0,
    "callers": [{"caller": "ada.of.the.team", "waiting": 9, "urgency": 5}],
}
LIMIT = {
    "credential": "4a768f62",
    "upstream": "api",
    "route": "GET /api/v0/instances/{id}/and/a/very/long/way/to/the/end/",
    "interval": 1.5054,
    "capacity": 1,
    "source": "learned",
    "due_in": 0.4,
    "sends": 18,
    "correction": "between 1.02 s (refused) and 2.02 s (accepted)",
    "waiting": 0,
}
ORIGIN = {"waiting": 11, "in_flight": 3, "slots": 100, "rate": 2.0, "burst": 5, "tokens": 1.25}
BUSY = STATUS | {"lines": [LINE] * 20, "line_count": 32, "limits": [LIMIT] * 30, "origins": {"api": ORIGIN}}


def rows_of(told: Any, width: int, height: int | None = None) -> list[str]:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(drawn(told, width=width, height=height))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_whatever_the_width_each_entry_is_one_row_with_what_matters_most(width: int) -> None:
    rows = rows_of(BUSY, width)
    assert all(len(row) <= width for row in rows)
    heads = [row for row in rows if row.startswith(("Waiting", "Limits"))]
    entries = [row for row in rows if row.startswith(("PUT /api/v0/", "GET /api/v0/"))]
    assert len(entries) == 50
    assert all(row.split("  ")[0].endswith("the/end/") for row in entries), "shortened in the middle"
    assert "oldest" in heads[0]
    assert "13 min" in entries[0]
    assert "one call in" in heads[1]
    if width >= 80:
        assert "held by" in heads[0]
        assert "upstreams.max_connections" in entries[0]
        assert "learned" in entries[-1]
    if width >= 200:
        assert "ada.of.the.team 9 (u=5), others 2" in entries[0]
        assert "between 1.02 s (refused) and 2.02 s (accepted)" in entries[-1]
    assert "… and 12 more" in rows, "of those that the proxy has not told of"
    assert next(row for row in rows if row.startswith("ceiling, api")).split()[2:6] == ["1.2", "of", "5", "at"]


@pytest.mark.parametrize("height", [20, 24, 40])
@pytest.mark.parametrize("lines", [0, 2, 20])
def test_in_a_low_terminal_who_waits_comes_first_and_the_rest_is_counted(height: int, lines: int) -> None:
    told = BUSY | {"lines": [LINE] * lines, "line_count": lines}
    rows = rows_of(told, 80, height)
    assert len(rows) <= height
    waiting = [at for at, row in enumerate(rows) if row.startswith("PUT ")]
    limits = [at for at, row in enumerate(rows) if row.startswith("GET ")]
    assert any(row.startswith("errors of ours") for row in rows)
    if lines:
        assert len(waiting) == min(lines, max(waiting) - min(waiting) + 1) >= min(lines, 2)
        assert max(waiting) < min(limits, default=height)
    if lines > len(waiting):
        assert f"… and {lines - len(waiting)} more" in rows
    if height > 20:
        assert f"… and {30 - len(limits)} more" in rows


def test_that_the_proxy_has_cut_a_list_is_said() -> None:
    assert "… and more: --all shows them" in rows_of(BUSY | {"cut": ["lines", "limits"]}, 80)


def fields_of(told: Any) -> list[tuple[Any, ...]]:
    """The way to every field."""
    if isinstance(told, dict):
        return [(key, *rest) for key, value in told.items() for rest in ((), *fields_of(value))]
    if isinstance(told, list) and told:
        return [(0, *rest) for rest in fields_of(told[0])]
    return []


@pytest.mark.parametrize("way", [way for way in fields_of(BUSY) if way[-2:-1] != ("callers",)], ids=str)
def test_what_a_proxy_of_another_version_does_not_tell_is_left_out(way: tuple[Any, ...]) -> None:
    told = json.loads(json.dumps(BUSY | {"lines": [LINE], "limits": [LIMIT]}))
    place = told
    for step in way[:-1]:
        place = place[step]
    del place[way[-1]]
    try:
        assert rows_of(told, 200)
    except StatusError:
        assert "callers" in way, "no field is needed but those of who waits"


def test_a_status_of_another_kind_is_said_so_in_one_line() -> None:
    with answering(200, STATUS | {"version": "9", "lines": [{"route": [], "callers": [7]}]}) as (url, _):
        got = ask(url)
    assert got.returncode == 1
    assert got.stderr.startswith("vast-proxy: vast-proxy 9 tells its status in a way that")
    assert got.stderr.count("\n") == 1
