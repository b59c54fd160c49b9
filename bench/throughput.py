"""Requests a second of one core, passed through and from the cache, beside the plainest aiohttp handler for that.

    python bench/throughput.py [--seconds 4] [--rounds 3] [--connections 64]

Everything runs in one go and in turns, so that the ratio holds on a noisy machine. The server under test is pinned to
one core, the upstream and the load generator to another; needs Linux and two cores. Uses wrk if it is installed, else
a generator of its own, which is slower and so flatters whoever is behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

BODY = json.dumps({"instances": {"id": 1, "start_date": 1.0, "extra_env": [], "filler": "x" * 2300}}).encode()
TARGET = "/api/v0/instances/1/?owner=me"
KEY = "0123456789abcdef" * 4


# --- The servers, each a process of its own ---------------------------------------------------------------------------


class _Upstream(asyncio.Protocol):
    """Answers any request without a body with the same bytes: as little work as can be."""

    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.seen = b""

    def data_received(self, data: bytes) -> None:
        self.seen += data
        count = self.seen.count(b"\r\n\r\n")
        if count:
            self.seen = self.seen[self.seen.rindex(b"\r\n\r\n") + 4 :]
            self.transport.write(self.answer * count)  # type: ignore[attr-defined]


async def upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


async def plain(port: int, upstream_url: str | None) -> None:
    """The plainest handler: passes on with a ClientSession, headers both ways, or answers from a dictionary."""
    import aiohttp
    from aiohttp import web
    from multidict import CIMultiDict

    app = web.Application()
    if upstream_url is None:
        cache = {TARGET: BODY}

        async def from_cache(request: web.Request) -> web.Response:
            return web.Response(body=cache[request.path_qs], content_type="application/json")

        app.router.add_route("*", "/{path:.*}", from_cache)
    else:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        hop_by_hop = {"connection", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}

        def end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
            return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in hop_by_hop)

        async def pass_on(request: web.Request) -> web.Response:
            body = await request.read()
            url, headers = f"{upstream_url}{request.path_qs}", end_to_end(request.headers)
            async with session.request(request.method, url, headers=headers, data=body or None) as answer:
                return web.Response(status=answer.status, body=await answer.read(), headers=end_to_end(answer.headers))

        app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


@contextlib.contextmanager
def running(core: int, *command: str, port: int) -> Iterator[int]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{TARGET}", timeout=5).read()
                break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{' '.join(command)} does not answer")
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


# --- The load ---------------------------------------------------------------------------------------------------------


class _Client(asyncio.Protocol):
    def __init__(self, request: bytes, counter: list[int]) -> None:
        self.request, self.counter = request, counter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.seen = b""
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.seen += data
        if self.seen.endswith(BODY[-20:]):
            self.counter[0 if self.seen.startswith(b"HTTP/1.1 200") else 1] += 1
            self.seen = b""
            self.transport.write(self.request)  # type: ignore[attr-defined]


async def generate(port: int, headers: dict[str, str], seconds: float, connections: int) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET {TARGET} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode()
    counter = [0, 0]
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: _Client(request, counter), "127.0.0.1", port)
    counter[:] = [0, 0]
    await asyncio.sleep(seconds)
    print(f"Requests/sec: {counter[0] / seconds:.1f}")
    if counter[1]:
        print(f"Non-2xx or 3xx responses: {counter[1]}")


def load(core: int, port: int, headers: dict[str, str], seconds: float, connections: int) -> float:
    wrk = shutil.which("wrk")
    if wrk is not None:
        fields = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:g}s", *fields, f"http://127.0.0.1:{port}{TARGET}"]
    else:
        command = [sys.executable, __file__, "generate", str(port), json.dumps(headers), str(seconds), str(connections)]
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    ).stdout
    if "Non-2xx" in told:
        raise SystemExit(f"not every answer was a 200:\n{told}")
    found = re.search(r"Requests/sec:\s*([0-9.]+)", told)
    assert found is not None, told
    return float(found[1])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    python, here = sys.executable, __file__
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        settings = Path(folder) / "proxy.yaml"
        settings.write_text(
            json.dumps(
                {
                    "listen": "127.0.0.1:18081",
                    "upstreams": {"api": "http://127.0.0.1:18080"},
                    "limits": {"scale": 1e-9, "global": None},
                    "families": {"instances": {"ttl": 3600}},
                    # Not paced: a bucket, however fast, lets the next call go only once the one before is on its way.
                    "routes": [{"route": "GET /api/v0/instances/{id}/", "interval": 0}],
                    "state": {"file": f"{folder}/state.json"},
                }
            )
        )
        stack.enter_context(running(1, python, here, "upstream", "18080", port=18080))
        proxy = stack.enter_context(running(0, python, "-m", "proxy", "serve", "--config", str(settings), port=18081))
        passing = stack.enter_context(running(0, python, here, "plain", "18082", "http://127.0.0.1:18080", port=18082))
        caching = stack.enter_context(running(0, python, here, "plain", "18083", port=18083))
        key = {"Authorization": f"Bearer {KEY}", "User-Agent": "vastai-cli/1.9.1", "Accept": "*/*"}
        cases = (
            ("passed through", (proxy, 18081, key | {"Cache-Control": "no-store"}), (passing, 18082, key)),
            ("from the cache", (proxy, 18081, key), (caching, 18083, key)),
        )
        print(f"{'':15}{'vast-proxy':>22}{'plain aiohttp':>22}{'ratio':>7}   medians of {options.rounds}")
        for name, *servers in cases:
            rates: list[list[float]] = [[], []]
            costs: list[list[float]] = [[], []]
            for round_ in range(options.rounds + 1):
                for at, (pid, port, headers) in enumerate(servers):
                    before = cpu_seconds(pid)
                    rate = load(1, port, headers, options.seconds, options.connections)
                    if round_:  # the first warms up
                        rates[at].append(rate)
                        costs[at].append((cpu_seconds(pid) - before) / (rate * options.seconds) * 1e6)
            (ours, theirs), (our_cost, their_cost) = map(statistics.median, rates), map(statistics.median, costs)
            shown = [f"{rate:.0f}/s {cost:.0f} us CPU" for rate, cost in ((ours, our_cost), (theirs, their_cost))]
            print(
                f"{name:15}{shown[0]:>22}{shown[1]:>22}{ours / theirs:7.2f}   ({their_cost / our_cost:.2f} by CPU "
                "time, which other work on the machine disturbs less)"
            )
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{proxy}/status").read_text())
        assert found is not None
        print(f"proxy's peak memory: {int(found[1]) / 1024:.0f} MiB")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream", port]:
            asyncio.run(upstream(int(port)))
        case ["plain", port, *url]:
            asyncio.run(plain(int(port), url[0] if url else None))
        case ["generate", port, headers, seconds, connections]:
            asyncio.run(generate(int(port), json.loads(headers), float(seconds), int(connections)))
        case _:
            main()
