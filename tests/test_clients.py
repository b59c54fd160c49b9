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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any, TypeVar

import aiohttp
import pytest
import requests
from conftest import NOON, clean_environment, settings_for
from fake_vast import Behaviour, FakeVast, Fault, identity_of
from vastai import VastAI  # type: ignore[import-untyped]
from vastai.async_.client import AsyncClient  # type: ignore[import-untyped]
from vastai.data.instance import InstanceConfig  # type: ignore[import-untyped]
from vastai.data.query import Query  # type: ignore[import-untyped]
from vastai.serverless.client.client import CoroutineServerless  # type: ignore[import-untyped]
from vastai.sync.client import SyncClient  # type: ignore[import-untyped]

from proxy.app import App
from proxy.keys import new_token
from proxy.policy.members import TeamRules, hashed

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
            # The client makes it if it is not there, and two of them at once trip over each other.
            (path / ".local" / "state" / "vastai").mkdir(parents=True)
            (cache / "gpu_names_cache.json").write_text('{"gpu_names": ["RTX 4090"]}')

    def environment(self, **variables: str) -> dict[str, str]:
        return clean_environment() | {
            "HOME": str(self.path),
            "NO_PROXY": "127.0.0.1,localhost",
            "VASTAI_NO_UPDATE_CHECK": "1",
            "COLUMNS": "200",
            "PYTHONUTF8": "1",
            **variables,
        }

    def begin(
        self, *command: str, program: tuple[str, ...] = CLI, stdin: int = DEVNULL, key: str = KEY, **variables: str
    ) -> Popen[str]:
        """Begin a program, not waiting for it."""
        environment = self.environment(**variables) | ({"VAST_API_KEY": key} if key else {})
        return Popen(
            [*program, *command],
            stdin=stdin,
            stdout=PIPE,
            stderr=PIPE,
            encoding="utf-8",
            cwd=self.path,
            env=environment,
        )

    def vastai(self, command: str, side: Side, **more: Any) -> Popen[str]:
        """The command line with VAST_URL set."""
        return self.begin(*shlex.split(command), VAST_URL=side.url, **more)


def told(process: Popen[str]) -> Told:
    try:
        out, err = process.communicate(timeout=180)
    except TimeoutExpired:
        process.kill()
        raise
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
    ("show invoices-v1 -i", "Showing 1 of 1"),
    ("show invoices-v1 -c", "Showing 1 of 1"),
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


# Many commands, one after the other: each a process of its own with a fresh vastai in it, forked from one that has what
# takes long to import and is not vastai's.
BATCH = """
import contextlib, importlib, json, os, subprocess, sys, tempfile
needed = "import sys, vastai.cli.main, vastai.cli.commands.instances; print(*sys.modules)"
for name in subprocess.check_output([sys.executable, "-c", needed], text=True).split():
    if name.partition(".")[0] != "vastai":
        with contextlib.suppress(Exception):
            importlib.import_module(name)
all_told = []
for command in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate((open(os.devnull), out, err)):
                os.dup2(file.fileno(), number)
            sys.argv = ["vastai", *command]
            from vastai.cli.main import main
            sys.exit(main())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        all_told.append((*(os.pread(file.fileno(), 1 << 24, 0).decode() for file in (out, err)), code))
json.dump(all_told, sys.stdout)
"""


class Twins:
    """Two fakes with the same things in them, one behind a proxy, and what the same commands told of each."""

    def __init__(self, theatre: Stage, home: Home) -> None:
        self.direct, behind = (theatre.fake(Behaviour(scale=0.0, invalid_keys=frozenset({"wrong"}))) for _ in range(2))
        for side in (self.direct, behind):
            for method, path, body in THINGS:
                headers = {"Authorization": f"Bearer {KEY}"}
                answer = requests.request(method, side.url + path, json=body, headers=headers, timeout=10)
                assert answer.json()["success"], path
        self.proxied = theatre.proxy(behind)
        commands = json.dumps([shlex.split(command) for command, _ in SAME])
        running = [
            home.begin(program=(sys.executable, "-c", BATCH), stdin=PIPE, VAST_URL=side.url)
            for side in (self.direct, self.proxied)
        ]
        for process in running:  # both at once
            assert process.stdin is not None
            process.stdin.write(commands)
            process.stdin.close()
            process.stdin = None
        told_by = []
        for process, side in zip(running, (self.direct, self.proxied), strict=True):
            batch = told(process)
            assert batch.code == 0, batch.err
            told_by.append(
                [Told(timeless(out, side), timeless(err, side), code) for out, err, code in json.loads(batch.out)]
            )
        names = [command for command, _ in SAME]
        self.told = {name: pair for name, *pair in zip(names, *told_by, strict=True)}


@pytest.fixture(scope="module")
def twins(theatre: Stage, home: Home) -> Twins:
    return Twins(theatre, home)


def timeless(text: str, side: Side) -> str:
    """Without what depends on the clock and on the port."""
    text = text.replace(side.url, "URL")
    text = re.sub(r"\d+\.\d+ +\d+\.\d+ +(?=\x1b\[0m\n)", "", text)  # the columns "age" and "uptime"
    return re.sub(r'"(uptime_mins|duration)": [-\d.e]+', r'"\1": ...', text)


@pytest.mark.parametrize(("command", "expected"), SAME, ids=[command for command, _ in SAME])
def test_the_command_line_tells_the_same_as_without_the_proxy(twins: Twins, command: str, expected: str) -> None:
    direct, proxied = twins.told[command]
    assert expected in direct.out + direct.err
    assert "Traceback" not in direct.err
    assert proxied == direct


def test_the_command_line_does_the_same_as_without_the_proxy(twins: Twins) -> None:
    direct, proxied = ([(e.kind, e.target, e.amount) for e in s.fake.effects] for s in (twins.direct, twins.proxied))
    assert len(direct) > len(THINGS)
    assert proxied == direct


@pytest.mark.parametrize("command", ["show ssh-keys", "get endpt-logs 31000005 --level 1"])
def test_a_slash_at_the_end_of_url_changes_nothing(twins: Twins, home: Home, command: str) -> None:
    running = [home.begin(*shlex.split(command), "--url", url) for url in (f"{twins.proxied.url}/", twins.direct.url)]
    slashed, plain = map(told, running)
    assert (slashed, slashed.err) == (plain, "")


# --- The first command ------------------------------------------------------------------------------------------------


def test_a_new_user_who_sets_vast_url_and_nothing_else_is_served(stage: Stage, tmp_path: Path) -> None:
    side = stage.proxy()
    home = Home(tmp_path / "new", known=False)
    config = home.path / ".config" / "vastai"
    config.mkdir(parents=True)
    (config / "vast_api_key").write_text(KEY)
    answer = told(home.vastai("show user", side, key=""))
    assert "Ada_Example" in answer.out
    assert (answer.err, answer.code) == ("", 0)
    # Without being asked it looked for the GPUs' names, with no key, and for the user's role.
    assert {call.template for call in side.fake.log} == {"GET /api/v0/gpu_names/unique/", "GET /api/v0/users/current"}
    assert (config / "vast_role").exists()
    assert side.app is not None
    assert side.app.admin.counted.requests == 3
    assert len(side.fake.log) == 2  # the role's question and the command's own are one


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_twenty_creates_at_once_all_succeed_and_none_meets_a_429(stage: Stage) -> None:
    side = stage.proxy()
    client = sdk(side)
    offers = side.offers[:20]
    answers = at_once([partial(client.create_instance, offer, image="x") for offer in offers])
    assert {answer["success"] for answer in answers} == {True}
    assert len({answer["new_contract"] for answer in answers}) == 20
    assert side.fake.refused == []
    assert [side.fake.count("rented", target=offer) for offer in offers] == [1] * 20
    assert len(side.fake.calls(ASK)) == 20


def test_two_hundred_creates_at_once_outlast_the_patience_of_the_client(stage: Stage) -> None:
    """The queue is ten times longer than the SDK waits for a byte; it makes its usual three attempts."""
    # That the pace is right is for other tests; a fake without limits is no matter of how busy the machine is.
    limits, queue = {"scale": 0.015, "margin": 0.0}, {"heartbeat": 0.15}
    side = stage.proxy(behaviour=Behaviour(scale=0.0), limits=limits, queue=queue)
    offers = side.offers[:200]

    def create(offer: int) -> Any:
        client = sdk(side)
        client.client.timeout = 1.2
        return client.create_instance(offer, image="x")

    began = time.monotonic()
    answers = at_once([partial(create, offer) for offer in offers])
    assert time.monotonic() - began > 5 * 1.2
    assert {answer["success"] for answer in answers} == {True}
    assert [side.fake.count("rented", target=offer) for offer in offers] == [1] * 200
    assert len(side.fake.calls(ASK)) == 200


def test_a_shell_loop_meets_no_429_though_without_the_proxy_it_does(stage: Stage, home: Home) -> None:
    real = Behaviour(scale=1.0)
    sides = [stage.fake(real), stage.proxy(behaviour=real, limits={"scale": 1.0})]
    loop = f"for n in 1 2 3 4 5 6 7 8; do {shlex.join(CLI)} show instances & done; wait"
    running = [home.begin("-c", loop, program=("sh",), VAST_URL=side.url) for side in sides]
    direct, proxied = map(told, running)
    assert "Failed with error 429" in direct.err
    assert proxied.err.replace("\x1b[K", "").strip() == ""  # it clears a line that shows how far it is
    assert proxied.out.count("No instances found") == 8
    assert sides[0].fake.refused
    assert sides[1].fake.refused == []


def test_a_wait_that_would_be_too_long_is_told_in_a_sentence(stage: Stage, home: Home) -> None:
    side = stage.proxy(routes=[{"route": ASK, "interval": 200}], queue={"max_wait": 5})
    sdk(side).create_instance(side.offers[0], image="x")
    answer = told(home.vastai(f"create instance {side.offers[0]} --image x", side))
    assert "Failed with error 429: The turn of PUT /api/v0/asks/{id}/ is about" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert len(side.fake.calls(ASK)) == 1
    assert side.app is not None
    assert side.app.admin.counted.codes == {"wait_too_long": 1}  # and it did not try again


def test_a_spent_search_quota_is_told_with_the_time_at_which_it_ends(stage: Stage, home: Home) -> None:
    spent = Behaviour(scale=0.0, search_quota=0)
    sides = [stage.fake(spent), stage.proxy(behaviour=spent)]
    direct, proxied = map(told, [home.vastai("search offers num_gpus=1", side) for side in sides])
    assert "Resets at 2026-07-26 00:00 UTC." in direct.err
    assert proxied == direct
    assert [len(side.fake.calls(BUNDLES)) for side in sides] == [1, 1]


# --- Failures ---------------------------------------------------------------------------------------------------------


def test_a_create_whose_answer_is_lost_is_sent_once_where_it_was_sent_three_times(stage: Stage, home: Home) -> None:
    sides = [stage.fake(Behaviour(scale=0.0)), stage.proxy(behaviour=Behaviour(scale=0.0))]
    for side in sides:
        side.fake.faults.append(Fault(match=ASK, kind="drop_after", times=None))
    running = [home.vastai(f"create instance {side.offers[0]} --image x", side) for side in sides]
    direct, proxied = map(told, running)
    assert "Traceback" in direct.err
    assert len(sides[0].fake.calls(ASK)) == 3
    assert proxied.err.startswith("Failed with error 500: The outcome of PUT /api/v0/asks/{id}/ is unknown")
    assert "vastai show instances" in proxied.err
    assert len(proxied.err.splitlines()) == 1
    assert len(sides[1].fake.calls(ASK)) == 1
    assert sides[1].fake.count("rented") == 1


def test_a_bulk_create_whose_answer_is_lost_is_sent_once(stage: Stage, home: Home) -> None:
    side = stage.proxy(behaviour=Behaviour(scale=0.0))
    side.fake.faults.append(Fault(match=BULK, kind="drop_after", times=None))
    first, second, *_ = side.offers
    answer = told(home.vastai(f"create instances {first} {second} --image x", side))
    assert "The outcome of POST /api/v0/asks/bulk/ is unknown" in answer.out + answer.err
    assert "Traceback" not in answer.err
    assert len(side.fake.calls(BULK)) == 1
    assert side.fake.count("rented") == 2


@pytest.mark.parametrize("command", ["show user", "create instance 24000000 --image x"])
def test_an_upstream_that_is_away_is_told_in_a_sentence(stage: Stage, home: Home, command: str) -> None:
    side = stage.proxy()
    stage.do(side.fake.stop())
    answer = told(home.vastai(command, side))
    assert answer.err.startswith("Failed with error 503: Vast.ai could not be reached")
    assert len(answer.err.splitlines()) == 1
    assert side.app is not None
    assert side.app.admin.counted.requests == 1


# --- Waiting ----------------------------------------------------------------------------------------------------------


def test_impatient_clients_are_kept_on_the_line_until_their_turn_comes(stage: Stage, home: Home) -> None:
    """Each gives up after two seconds of silence, and each has to wait for six."""
    side = stage.proxy(
        behaviour=Behaviour(scale=0.0),
        queue={"heartbeat": 0.5},
        routes=[{"route": INSTANCE, "interval": 6}],
    )
    path = "/api/v0/instances/{}/?owner=me"
    expected = {"instances": None}

    def bearer(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def by_sdk(key: str) -> Any:
        client = sdk(side, key)
        client.client.timeout = 2
        return {"instances": client.show_instance(2)}

    def by_requests(key: str) -> Any:
        return requests.get(side.url + path.format(2), headers=bearer(key), timeout=2).json()

    def by_urllib(key: str) -> Any:
        request = urllib.request.Request(side.url + path.format(2), headers=bearer(key))
        with urllib.request.urlopen(request, timeout=2) as response:
            return json.load(response)

    def by_aiohttp(key: str) -> Any:
        async def ask() -> Any:
            patience = aiohttp.ClientTimeout(total=None, sock_read=2)
            async with (
                aiohttp.ClientSession(timeout=patience) as session,
                session.get(side.url + path.format(2), headers=bearer(key)) as response,
            ):
                return await response.json()

        return asyncio.run(ask())

    def by_command(key: str) -> Any:
        answer = told(home.vastai("show instance 2 --raw", side, program=IMPATIENT, key=key))
        return expected if "Traceback" not in answer.err else answer.err

    def by_curl(key: str) -> Any:
        curl = ("curl", "-sS", "--max-time", "30", "-H", f"Authorization: Bearer {key}")
        return json.loads(told(home.begin(side.url + path.format(2), program=curl)).out)

    def by_a_stranger(key: str) -> Any:
        try:
            agent = {"User-Agent": "stranger/1.0"}
            return requests.get(side.url + path.format(2), headers=bearer(key) | agent, timeout=2).json()
        except requests.ReadTimeout:
            return "timed out"

    clients: list[Callable[[str], Any]] = [by_sdk, by_requests, by_urllib, by_aiohttp, by_command, by_a_stranger]
    if shutil.which("curl"):
        clients.append(by_curl)
    for client in clients:  # the first call of each key goes at once
        requests.get(side.url + path.format(1), headers=bearer(client.__name__), timeout=10)
    began = time.monotonic()
    answers = at_once([partial(client, client.__name__) for client in clients])
    assert time.monotonic() - began > 5
    for client, answer in zip(clients, answers, strict=True):
        # Of a stranger it is not known whether it takes interim answers. So those are what made the difference.
        assert answer == ("timed out" if client is by_a_stranger else expected), client.__name__
    assert len(side.fake.calls(INSTANCE)) == 2 * len(clients) - 1
    assert side.fake.refused == []


# --- Saving calls -----------------------------------------------------------------------------------------------------


def test_a_search_is_shown_whether_it_is_collapsed_remembered_or_stale(stage: Stage, home: Home) -> None:
    side = stage.proxy()
    search = "search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph"
    side.fake.faults.append(Fault(match=BUNDLES, kind="slow", delay=4))
    leader, follower = map(told, [home.vastai(search, side), home.vastai(search, side)])
    again = told(home.vastai(search, side))
    assert len(side.fake.calls(BUNDLES)) == 1
    assert side.caches == {"miss": 1, "collapsed": 1, "hit": 1}
    sdk(side).create_instance(side.offers[0], image="x")  # which voids what is remembered
    side.fake.faults.append(Fault(match=BUNDLES, kind="status", status=503, times=None))
    stale = told(home.vastai(search, side))
    assert side.caches["stale"] == 1
    assert "RTX_4090" in leader.out
    assert (leader.err, leader.code) == ("", 0)
    assert leader == follower == again == stale


def test_a_hundred_equal_searches_at_once_are_one_call(stage: Stage) -> None:
    side = stage.proxy()
    side.fake.faults.append(Fault(match=BUNDLES, kind="slow", delay=0.3))
    client = sdk(side)
    answers = at_once([lambda: client.search_offers(query="num_gpus=1", limit=5)] * 100)
    assert len(side.fake.calls(BUNDLES)) == 1
    assert len(answers[0]) == 5
    assert all(answer == answers[0] for answer in answers)


# --- The other clients of the SDK -------------------------------------------------------------------------------------


def test_the_synchronous_client_searches_rents_lists_and_destroys(stage: Stage) -> None:
    side = stage.proxy()
    client = SyncClient(api_key=KEY, vast_server=side.url)
    offers = client.search(Query.search_defaults(), limit=3)
    assert len(offers) == 3
    instance = client.create_instance(offers[0].id, InstanceConfig(image="x", label="mine"))
    assert [(found.id, found.label) for found in client.show_instances()] == [(instance.id, "mine")]
    client.destroy_instance(instance.id)
    assert client.show_instances() == []
    assert side.fake.refused == []


def test_the_asynchronous_client_rents_ten_at_once(stage: Stage) -> None:
    side = stage.proxy()

    async def rent() -> list[Any]:
        client = AsyncClient(api_key=KEY, vast_server=side.url)
        client._ssl_context = ssl.create_default_context()  # it would fetch a certificate from console.vast.ai first
        async with client:
            offers = await client.search(Query.search_defaults(), limit=10)
            config = InstanceConfig(image="x")
            return await asyncio.gather(*(client.create_instance(offer.id, config) for offer in offers))

    assert len({instance.id for instance in asyncio.run(rent())}) == 10
    assert side.fake.count("rented") == 10
    assert side.fake.refused == []


def test_the_serverless_client_finds_its_endpoint_and_is_routed_each_time_anew(stage: Stage) -> None:
    side = stage.proxy()
    method, path, body = THINGS[4]
    requests.request(method, side.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=10)

    async def route() -> list[Any]:
        client = CoroutineServerless(KEY, webserver_url=side.url, autoscaler_url=side.url)
        client._ssl_context = ssl.create_default_context()
        async with client:
            endpoint = await client.get_endpoint("chat")
            return await asyncio.gather(*(endpoint._route(cost=1.0) for _ in range(3)))

    assert {answer.get_url() for answer in asyncio.run(route())} == {"https://203.0.113.9:8443"}
    assert len(side.fake.calls("POST /route/")) == 3


# --- What README shows ------------------------------------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# The asynchronous client would fetch a certificate from console.vast.ai before its first call.
PRELUDE = """import ssl, vastai
vastai.AsyncClient._ssl_context = property(lambda _: ssl.create_default_context(), lambda *_: None)
"""


def test_the_snippets_of_the_readme_do_what_they_seem_to_do(home: Home, stage: Stage) -> None:
    side = stage.proxy()
    created, listed, mail = (
        told(home.begin("-c", PRELUDE + snippet, program=(sys.executable,)))
        for snippet in (text.replace("http://127.0.0.1:8080", side.url) for text in SNIPPETS)
    )
    assert (created.code, created.err) == (0, "")
    assert "'new_contract': 31000001" in created.out
    assert (listed.code, listed.err) == (0, "")
    assert "31000001" in listed.out
    assert (mail.code, mail.err) == (0, "")
    assert mail.out.endswith("@example.com\n")
    assert side.fake.refused == []


# --- Team mode --------------------------------------------------------------------------------------------------------


def test_the_command_line_works_with_a_token_in_the_place_of_the_key_until_it_is_revoked(
    stage: Stage, tmp_path: Path
) -> None:
    token = new_token()
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    keys = {"default": {"file": str(key_file)}}
    side = stage.proxy(team={"keys": keys, "members": {"ada": {"token": hashed(token)}}})
    (tmp_path / "team").mkdir()
    home = Home(tmp_path / "team", known=False)

    def vastai(command: str) -> Told:
        return told(home.vastai(command, side, key=token))

    user = vastai("show user --raw")
    assert (json.loads(user.out)["email"], user.err, user.code) == ("user100001@example.com", "", 0)
    created = vastai(f"create instance {side.offers[0]} --image x --raw")
    ident = json.loads(created.out)["new_contract"]
    assert str(ident) in vastai("show instances").out
    assert "chat" in vastai("create endpoint --endpoint_name chat").out + vastai("show endpoints").out
    denied = vastai("show api-keys")
    assert denied.err.startswith("Failed with error 403: ada may not GET /api/v0/auth/apikeys/: ")
    searched = vastai("search offers num_gpus=1 --raw")
    assert KEY not in user.out + created.out + searched.out
    assert {call.identity for call in side.fake.log} == {identity_of(KEY)}
    assert token not in repr(side.fake.log)

    assert side.app is not None
    app = side.app
    rules = TeamRules(app.settings.team.keys, {})

    async def revoke() -> None:
        app.reload(replace(app.settings, team=rules))

    stage.do(revoke())
    (home.path / ".config" / "vastai" / "vast_tfa_key").write_text("session")
    revoked = vastai("show instances")
    assert revoked.err.startswith("Failed with error 401: vast-proxy does not know this gateway token")
    assert (home.path / ".config" / "vastai" / "vast_tfa_key").exists()
