"""Memory of a request that waits for its turn: the proxy's growth with N creates in one line, divided by N.

    python bench/waiting.py [--requests 2000]

Linux only. The connection, its buffers and aiohttp's own state are counted, for a waiting request has them all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BODY = json.dumps({"client_id": "me", "image": "pytorch/pytorch", "disk": 10, "label": "bench", "onstart": "x" * 200})


def resident(pid: int) -> int:
    """Bytes of memory in use."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def wait_in_line(port: int, count: int) -> list[asyncio.StreamWriter]:
    """Open that many connections, each with a create of another offer on it."""
    writers = []
    for number in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"PUT /api/v0/asks/{number}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: vastai-sdk/1.9.1\r\n"
            "Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n"
            f"Authorization: Bearer {'0123456789abcdef' * 4}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
        )
        writer.write(head.encode())
        writers.append(writer)
    return writers


def waiting(port: int) -> int:
    """How many wait, by the proxy's own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/_proxy/status", timeout=10) as answer:
        return int(json.load(answer)["waiting"])


async def measure(count: int) -> None:
    port = 18091
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "proxy.yaml"
        settings.write_text(
            json.dumps(
                {
                    "listen": f"127.0.0.1:{port}",
                    # It takes the first one and never answers; the turn of the next is five minutes away.
                    "upstreams": {"api": f"http://127.0.0.1:{port + 1}", "read_timeout": 0},
                    "limits": {"global": None},
                    "routes": [{"route": "PUT /api/v0/asks/{id}/", "interval": 300}],
                    "queue": {"max_wait": "100d", "max_waiting": count + 200, "heartbeat": "10m"},
                    "server": {"max_connections": count + 200},
                    "state": {"file": f"{folder}/state.json"},
                    "log": {"level": "warning"},
                }
            )
        )
        proxy = subprocess.Popen(
            [sys.executable, "-m", "proxy", "serve", "--config", str(settings)], stdout=subprocess.DEVNULL
        )
        silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port + 1)
        try:
            for _ in range(100):
                try:
                    waiting(port)
                    break
                except OSError:
                    await asyncio.sleep(0.1)
            warm = await wait_in_line(port, 100)
            await asyncio.sleep(1)
            before = resident(proxy.pid)
            began = time.perf_counter()
            writers = await wait_in_line(port, count)
            while waiting(port) < count + 90:
                await asyncio.sleep(0.05)
            took = time.perf_counter() - began
            grown = resident(proxy.pid) - before
            print(f"{count} waiting requests: {grown / count / 1024:.1f} KiB each, all in line after {took:.1f} s")
            for writer in warm + writers:
                writer.close()
            while waiting(port):
                await asyncio.sleep(0.05)
            print(f"all left: {waiting(port)} waiting")
        finally:
            proxy.kill()
            proxy.wait(10)
            silent.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    asyncio.run(measure(parser.parse_args().requests))
