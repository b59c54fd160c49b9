"""The clients that people have, unmodified: the vastai command line as a process, its SDK as a library, curl, requests.

Real time, with the intervals of the fake and of the proxy scaled down. Both live in a thread of their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shlex
import shutil
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, TypeVar

import aiohttp
import pytest
import requests
from conftest import NOON, clean_environment, settings_for
from fake_vast import Behaviour, Fault, FakeVast, Limit
from vastai import AsyncClient, CoroutineServerless, SyncClient, VastAI  # type: ignore[import-untyped]
from vastai.data.instance import InstanceConfig  # type: ignore[import-untyped]
from vastai.data.query import Query  # type: ignore[import-untyped]

from proxy.app import App

# The SDK leaves its sessions to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

T = TypeVar("T")
SCALE = 0.02
"""A second of the vendor's limits in seconds of these tests."""
KEY = "0123456789abcdef-key-of-the-tests"
ASK = "PUT /api/v0/asks/{id}/"
BULK = "POST /api/v0/asks/bulk/"
BUNDLES = "POST /api/v0/bundles/"
INSTANCES = "GET /api/v1/instances/"
INSTANCE = "GET /api/v0/instances/{id}/"
CLI = (sys.executable, "-c", "import sys; sys.argv[0] = 'vastai'; from vastai.cli.main import main; sys.exit(main())")
IMPATIENT = (  # the same, but it gives up after two seconds of silence instead of 120
    *CLI[:2],
    "import vastai.api.client as c; init = c.VastClient.__init__; "
    "c.VastClient.__init__ = lambda self, *a, **k: init(self, *a, **(k | {'timeout': 2})); " + CLI[2],
)


# --- What the tests are made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Where a client is pointed: at a fake, or at the proxy in front of one."""

    url: str
    fake: FakeVast
    app: App | None = None

    @property
    def offers(self) -> list[int]:
        """Offers that can still be rented."""
        return sorted(int(offer["id"]) for offer in self.fake.offers)

    @property
    def caches(self) -> dict[str, int]:
        """How the proxy came by its answers."""
        assert self.app is not None
        return dict(self.app.admin.counted.caches)


class Stage:
    """A thread with a loop, in which fakes and proxies live while a client blocks the test. Owns them all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage")
        self._thread.start()
        self._fakes: list[FakeVast] = []
        self._apps: list[App] = []

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    def fake(self, behaviour: Behaviour | None = None) -> Side:
        """A fake alone. Its date stands still, so that two of them tell the same."""

        async def start() -> FakeVast:
            fake = FakeVast(behaviour or Behaviour(scale=SCALE), wall=lambda: NOON)
            await fake.start()
            return fake

        fake = self.do(start())
        self._fakes.append(fake)
        return Side(fake.url, fake)

    def proxy(self, side: Side | None = None, behaviour: Behaviour | None = None, **given: Any) -> Side:
        """A proxy in front of a fake."""
        fake = (side or self.fake(behaviour)).fake
        # What shrinks with the scale is not the jitter of a busy machine: half an interval on top is left for it.
        limits = {"scale": SCALE, "margin": 0.5, "global": {"rate": 1000, "burst": 1000}}
        given["limits"] = limits | given.get("limits", {})
        given.setdefault("retry", {"backoff_initial": 0.01, "backoff_max": 0.1})
        directory = self._directory / f"proxy-{len(self._apps)}"
        directory.mkdir()

        async def start() -> App:
            app = App(settings_for(fake.url, directory, given))
            await app.start()
            return app

        app = self.do(start())
        self._apps.append(app)
        return Side(f"http://{app.address}", fake, app)

    def close(self) -> None:
        for app in self._apps:
            self.do(app.stop(1.0))
        for fake in self._fakes:
            self.do(fake.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class Told:
    """What a command printed, and how it ended."""

    out: str
    err: str
    code: int


class Home:
    """A user's home directory, and the environment of a shell in it."""

    def __init__(self, path: Path, *, known: bool = True) -> None:
        self.path = path
        config, cache = path / ".config" / "vastai", path / ".cache" / "vastai"
        if known:  # not the first command that is ever given here
            config.mkdir(parents=True)
            (config / "vast_role").write_text("client")
            cache.mkdir(parents=True)
            (cache / "gpu_names_cache.json").write_text('{"gpu_names": ["RTX 4090"]}')

    def environment(self, **variables: str) -> dict[str, str]:
        return clean_environment() | {
            "HOME": str(self.path),
            "NO_PROXY": "127.0.0.1,localhost",
            "VASTAI_NO_UPDATE_CHECK": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            **variables,
        }

    def begin(self, *command: str, program: tuple[str, ...] = CLI, **variables: str) -> Popen[str]:
        environment = self.environment(**({"VAST_API_KEY": KEY} | variables))
        return Popen(
            [*program, *command], stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True, cwd=self.path, env=environment
        )

    def vastai(self, command: str, side: Side, **more: Any) -> Popen[str]:
        """The command line with VAST_URL set, not waited for."""
        return self.begin(*shlex.split(command), VAST_URL=side.url, **more)


def told(process: Popen[str]) -> Told:
    out, err = process.communicate(timeout=60)
    return Told(out, err, process.returncode)


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("theatre"))
    yield stage
    stage.close()
    gc.collect()  # what the SDK left open goes here, and not under the next test


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _as_in_that_home(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries in this very process look into the environment too."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "VAST_API_KEY", "VAST_URL", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(home.path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def sdk(side: Side, key: str = KEY) -> Any:
    return VastAI(api_key=key, server_url=side.url)


def at_once(tasks: list[Callable[[], T]]) -> list[T]:
    """A thread each."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def status_of(response: Any) -> int:
    return int(response.status_code)


# --- The same as without the proxy ------------------------------------------------------------------------------------

THINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("PUT", "/api/v0/asks/24000000/", {"image": "vastai/pytorch", "label": "first"}),  # instance 31000001
    ("PUT", "/api/v0/asks/24000017/", {"image": "vastai/pytorch"}),  # instance 31000002
    ("PUT", "/api/v0/asks/24000034/", {"image": "vastai/pytorch"}),  # instance 31000003
    ("POST", "/api/v0/ssh/", {"ssh_key": "ssh-ed25519 AAAAC3Nza ada"}),  # 31000004
    ("POST", "/api/v0/endptjobs/", {"endpoint_name": "chat", "min_load": 1.0}),  # 31000005
    ("POST", "/api/v0/autojobs/", {"endpoint_name": "chat", "template_hash": "abc"}),  # 31000006
    ("POST", "/api/v0/auth/apikeys/", {"name": "ci", "permissions": {}}),  # 31000007
    ("POST", "/api/v0/users/", {"username": "bob", "email": "bob@example.com"}),  # 31000008
    ("POST", "/api/v0/secrets/", {"key": "HF_TOKEN", "value": "hf"}),
    ("PUT", "/api/v0/volumes/", {"id": 24000052, "size": 20}),
    ("PUT", "/api/v0/instances/prepay/31000002/", {"amount": 5}),
)

SAME = (
    ("show user", "user100001"),
    ("show user --raw", '"email"'),
    ("show instances", "31000001"),
    ("show instances --raw", '"label": "first"'),
    ("show instance 31000002", "31000002"),
    ("search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph", "RTX_4090"),
    ("search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph --raw", '"gpu_name": "RTX 4090"'),
    ("search offers 'num_gpus>=4' --new", "24"),
    ("search templates 'count_created > 1001'", "PyTorch"),
    ("search volumes 'disk_space>100'", "24"),
    ("show ssh-keys", "AAAAC3Nza"),
    ("show env-vars", "HF_TOKEN"),
    ("show endpoints", "chat"),
    ("show workergroups", "31000006"),
    ("show volumes", "51000001"),
    ("show machines", "rack1"),
    ("show api-keys", "31000007"),
    ("show invoices-v1", "stripe"),
    ("show connections", "backups"),
    ("show ipaddrs", "198.51.100.7"),
    ("show subaccounts", "bob"),
    ("show audit-logs", "198.51.100.7"),
    ("show deposit 31000002", "5"),
    ("create instance 24000170 --image vastai/pytorch --disk 20 --ssh", "new_contract"),
    ("create instances 24000187 24000204 24000001 --image vastai/pytorch", "31"),
    ("launch instance -g RTX_4090 -n 1 -i vastai/pytorch", "31"),
    ("stop instance 31000002", "stopping instance 31000002"),
    ("start instance 31000002", "starting instance 31000002"),
    ("label instance 31000002 mine", "mine"),
    ("reboot instance 31000002", "31000002"),
    ("destroy instance 31000003 -y", "destroying instance 31000003"),
    ("create ssh-key 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINew eve' -y", "ssh"),
    ("delete ssh-key 31000004", "Deleted"),
    ("transfer credit --recipient bob@example.com --amount 2.5 --skip", "2.5"),
    ("destroy instance 39999999 -y", "Failed with error 404: Instance 39999999 not found"),
    ("create instance 24000000 --image x", "Failed with error 404: Offer 24000000 is no longer available"),
    ("show user --api-key wrong", "Failed with error 401: Invalid user key"),
    ("show user --api-key wrong --raw", '"status_code": 401'),
    ("search offers nonsense", "nonsense"),
)


@pytest.fixture(scope="module")
def twins(theatre: Stage) -> tuple[Side, Side]:
    """Two fakes with the same things in them, one of them behind a proxy."""
    sides = []
    for _ in range(2):
        side = theatre.fake(Behaviour(scale=0.0, invalid_keys=frozenset({"wrong"})))
        for method, path, body in THINGS:
            answer = requests.request(
                method, side.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=10
            )
            assert answer.json()["success"], path
        sides.append(side)
    return sides[0], theatre.proxy(sides[1])


def timeless(text: str, side: Side) -> str:
    """Without what depends on the clock and on the port."""
    text = text.replace(side.url, "URL")
    return re.sub(r'("uptime_mins"|"duration"|"client_run_time"): [-\d.e]+', r"\1: ...", text)


@pytest.mark.parametrize(("command", "expected"), SAME, ids=[command for command, _ in SAME])
def test_the_command_line_tells_the_same_as_without_the_proxy(
    twins: tuple[Side, Side], home: Home, command: str, expected: str
) -> None:
    running = [home.vastai(command, side) for side in twins]
    direct, proxied = (
        Told(timeless(got.out, side), timeless(got.err, side), got.code)
        for got, side in zip(map(told, running), twins, strict=True)
    )
    assert expected in direct.out + direct.err
    assert "Traceback" not in direct.err
    assert proxied == direct
    done, done_behind = ([(effect.kind, effect.target) for effect in side.fake.effects] for side in twins)
    assert done_behind == done


@pytest.mark.parametrize("command", ["show instance 31000001", "get endpt-logs 31000005 --level 1"])
def test_a_slash_at_the_end_of_url_changes_nothing(twins: tuple[Side, Side], home: Home, command: str) -> None:
    direct, proxied = twins
    slashed = told(home.begin(*shlex.split(command), "--url", f"{proxied.url}/"))
    plain = told(home.begin(*shlex.split(command), "--url", direct.url))
    assert (slashed.out, slashed.err, slashed.code) == (plain.out, plain.err, plain.code)
    assert "Traceback" not in slashed.err
