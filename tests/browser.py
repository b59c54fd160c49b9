"""A real Chromium without a window, told what to do by its DevTools protocol: what a test needs of it and no more."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable")
PLACES = ("/Applications/Chromium.app/Contents/MacOS/Chromium",)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not run as root with one, and visits nothing but us
    "--no-proxy-server",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-port=0",
)
STARTS_IN = 60.0


def executable() -> str:
    """Where it is: $CHROMIUM, or one that is installed. Skips the test if there is none."""
    found = [os.environ.get("CHROMIUM", ""), *map(shutil.which, NAMES), *(p for p in PLACES if Path(p).exists())]
    for one in found:
        if one:
            return one
    pytest.skip("no Chromium: apt-get install chromium, or say in CHROMIUM where it is")


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.complaints: list[str] = []
        """What the console would show in red or yellow."""
        self.requested: list[str] = []
        """Every URL that was asked for."""

    async def listen(self) -> None:
        """Take what the browser tells, until it is gone."""
        async for message in self._socket:
            told = json.loads(message.data)
            params = told.get("params", {})
            match told.get("method"):
                case None:
                    self._answers.pop(told["id"]).set_result(told)
                case "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(params["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    self.complaints.append(json.dumps(params["args"]))
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    self.complaints.append(params["entry"]["text"])
                case "Network.requestWillBeSent":
                    self.requested.append(params["request"]["url"])

    async def __call__(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(self._answers[number], 30)
        assert "error" not in told, f"{method}: {told.get('error')}"
        return told["result"]

    async def open(self, url: str) -> None:
        """Go there."""
        await self("Page.navigate", url=url)

    async def look(self, *, width: int, height: int = 900, theme: str = "light") -> None:
        """How it is looked at."""
        await self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1 if width > 600 else 2,
            mobile=width <= 600,
        )
        await self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    async def get(self, expression: str) -> Any:
        """The value of some JavaScript."""
        told = await self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def text(self, selector: str) -> str:
        """What can be read there; nothing where there is nothing to be seen."""
        found = f"document.querySelector({json.dumps(selector)})"
        return str(await self.get(f"{found}?.checkVisibility() ? {found}.innerText : ''"))

    async def until(self, expression: str, within: float = 20.0) -> Any:
        """Wait for an expression to be true."""
        last = None
        for _ in range(int(within / 0.05)):
            last = await self.get(expression)
            if last:
                return last
            await asyncio.sleep(0.05)
        raise AssertionError(f"not within {within} s: {expression}; {await self.text('body')}; {self.complaints}")

    async def picture(self, file: Path, *, whole: bool = True) -> None:
        """A screenshot, of the whole page if you like."""
        told = await self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(told["data"]))


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Page]:
    """Start one, with its files in `folder`, and end it."""
    process = await asyncio.create_subprocess_exec(
        executable(),
        *FLAGS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port = await _port(folder / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                url = next(tab["webSocketDebuggerUrl"] for tab in await answer.json() if tab["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page(f"{domain}.enable")
                yield page
            await listening
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> str:
    for _ in range(int(STARTS_IN / 0.05)):
        if file.exists() and (lines := file.read_text().splitlines()):
            return lines[0]
        assert process.returncode is None, f"Chromium ended with {process.returncode}"
        await asyncio.sleep(0.05)
    raise AssertionError("Chromium did not start")
