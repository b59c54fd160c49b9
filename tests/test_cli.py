"""The command line as a process: what it prints, where, and how it ends."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, Popen, TimeoutExpired, run
from sys import executable

import pytest
import trustme
import yaml

from proxy import __version__

CHECKOUT = Path(__file__).parent.parent
COMMANDS = ("serve", "check-config", "routes")
"""Those that read the settings."""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VAST_")}
    return kept | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "100"} | variables


def vast_proxy(*arguments: str | Path, **variables: str) -> CompletedProcess[str]:
    return run(
        [executable, "-m", "proxy", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=environment(**variables),
    )


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text("limits:\n  scal: 2\nqueue: {max_wait: soon}\n")
    return file


def test_without_arguments_it_shows_help_and_fails() -> None:
    told = vast_proxy()
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("usage: vast-proxy ")
    for command in COMMANDS:
        assert command in told.stderr


def test_the_version_is_one_line() -> None:
    told = vast_proxy("--version")
    assert (told.returncode, told.stdout, told.stderr) == (0, f"vast-proxy {__version__}\n", "")


def test_the_version_and_the_help_are_quick_because_nothing_heavy_is_imported() -> None:
    for arguments in ("['--version']", "['serve', '--help']"):
        code = (
            f"import sys, proxy.__main__ as m\ntry: m.main({arguments})\nexcept SystemExit: print(sorted(sys.modules))"
        )
        told = run([executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
        for name in ("aiohttp", "asyncio", "pydantic", "yaml"):
            assert f"'{name}'" not in told.stdout


@pytest.mark.parametrize("arguments", [["fly"], ["serve", "--prot", "1"], ["routes", "--listen", "x:1"]])
def test_what_the_command_line_does_not_know_is_an_error(arguments: list[str]) -> None:
    told = vast_proxy(*arguments)
    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")
    assert "Traceback" not in told.stderr


# --- token ------------------------------------------------------------------------------------------------------------


def test_a_new_token_is_printed_with_the_line_that_lets_it_in(tmp_path: Path) -> None:
    told = vast_proxy("token", "new", "ada")
    assert (told.returncode, told.stderr) == (0, "")
    (token,) = re.findall(r"VAST_API_KEY=(vp_[\w-]{43})$", told.stdout, re.MULTILINE)
    (line,) = re.findall(r"team: \{.*\}", told.stdout)
    assert hashlib.sha256(token.encode()).hexdigest() in line
    assert vast_proxy("token", "new", "ada").stdout != told.stdout

    key = tmp_path / "key"
    key.write_text("0123456789abcdef-key-of-the-account")
    key.chmod(0o600)
    file = tmp_path / "mine.yaml"
    file.write_text(line.replace("team: {", f"team: {{keys: {{default: {{file: {key}}}}}, "))
    checked = vast_proxy("check-config", "--config", file)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "0123456789abcdef" not in checked.stdout


@pytest.mark.parametrize("name", ["@x", "1e3", "null", "-a", "a.b"])
def test_the_line_for_a_new_token_is_yaml_whatever_the_name_is(name: str) -> None:
    told = vast_proxy("token", "new", "--", name)
    (line,) = re.findall(r"team: \{.*\}", told.stdout)
    assert list(yaml.safe_load(line)["team"]["members"]) == [name]


@pytest.mark.parametrize("arguments", [["token"], ["token", "new"], ["token", "new", "a b"]])
def test_a_token_is_for_somebody(arguments: list[str]) -> None:
    told = vast_proxy(*arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("usage: ")


# --- check-config -----------------------------------------------------------------------------------------------------


def test_check_config_says_ok_and_what_would_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("listen: 127.0.0.1:9000\nlimits: {global: {rate: 0.5}}\n")
    told = vast_proxy("check-config", "--config", file)
    assert (told.returncode, told.stderr) == (0, "")
    first, second = told.stdout.splitlines()
    assert first == f"{file}: ok"
    assert re.fullmatch(
        r"listen 127\.0\.0\.1:9000, upstream https://cloud\.vast\.ai, at most 0\.5 calls in 1s, "
        rf"\d+ routes in \d+ families, from {re.escape(str(file))}",
        second,
    )


def test_check_config_without_a_file_checks_the_environment_over_the_shipped_settings(tmp_path: Path) -> None:
    told = vast_proxy("check-config", VAST_PROXY_LIMITS__GLOBAL="null")
    assert told.stdout.startswith("shipped defaults: ok\n")
    assert "no global limit" in told.stdout
    assert told.stdout.endswith("from shipped defaults + environment\n")

    (tmp_path / "named.yaml").touch()
    told = vast_proxy("check-config", VAST_PROXY_CONFIG=str(tmp_path / "named.yaml"))
    assert told.stdout.startswith(f"{tmp_path}/named.yaml: ok\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_all_mistakes_in_the_settings_and_ends_with_2(command: str, bad: Path) -> None:
    told = vast_proxy(command, "--config", bad, VAST_PROXY_LIMITS__SCALE="-1")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.splitlines() == [
        f"vast-proxy: {bad}:2:3: limits.scal: unknown key, did you mean 'scale'?",
        f'vast-proxy: {bad}:3: queue.max_wait: expected a duration (examples: 60, "500ms", "15m"), got \'soon\'',
        "vast-proxy: $VAST_PROXY_LIMITS__SCALE: limits.scale: expected a number > 0, got '-1'",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_one_line_and_2(command: str) -> None:
    told = vast_proxy(command, "--config", "/nowhere/proxy.yaml")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "vast-proxy: /nowhere/proxy.yaml: cannot be read: No such file or directory\n"


# --- routes -----------------------------------------------------------------------------------------------------------


def row(table: str, method: str, path: str) -> list[str]:
    (found,) = (line for line in table.splitlines() if re.match(rf"{method} +{re.escape(path)} ", line))
    return re.split(r" {2,}", found)


def test_routes_prints_an_aligned_table_that_fits_and_is_the_same_each_time() -> None:
    told = vast_proxy("routes")
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    head = ["METHOD", "PATH", "EFFECT", "INTERVAL", "CAPACITY", "PENALTY", "CACHE", "TTL", "UPSTREAM", "FROM"]
    assert lines[0].split() == head
    assert len(lines) > 100
    assert max(map(len, lines)) <= 140
    for column in head[1:]:
        at = lines[0].index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in lines), f"{column} is not aligned"
    paths = [(line.split()[1], line.split()[0]) for line in lines[1:]]
    assert paths == sorted(paths)
    assert vast_proxy("routes").stdout == told.stdout


def test_routes_shows_the_settings_applied(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "limits: {scale: 2}\n"
        "cache: {search_ttl: 5m}\n"
        "routes:\n"
        "- {route: GET /api/v1/instances/, interval: 7s, capacity: 3}\n"
        "- {route: GET /mine/, effect: read}\n"
        "- {route: GET /free/, effect: read, interval: 0, source: measured}\n"
        "- {route: PUT /never/, effect: spend, refuse: true}\n"
    )
    table = vast_proxy("routes", "--config", file).stdout
    assert row(table, "POST", "/api/v0/bundles/")[2:8] == ["search", "4s", "5", "4", "offers", "5m"]
    assert row(table, "GET", "/api/v1/instances/")[2:] == [
        *("read", "7s", "3", "0", "instances", "1s", "api", "configured")
    ]
    assert row(table, "GET", "/mine/")[2:] == ["read", "2s", "1", "0", "-", "-", "api", "default"]
    assert row(table, "GET", "/free/")[2:] == ["read", "-", "1", "0", "-", "-", "api", "measured"]
    assert row(table, "PUT", "/never/")[2] == "refused"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_prints_all_of_them_or_the_one_that_is_named() -> None:
    told = vast_proxy("settings")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("# Settings\n")
    one = vast_proxy("settings", "queue.max_wait", LC_ALL="C")
    assert one.stdout.startswith("### `queue.max_wait`\n\nValue: a duration. Default: `30m`.")
    assert one.stdout in told.stdout


def test_a_setting_that_does_not_exist_is_one_line_and_2() -> None:
    told = vast_proxy("settings", "queue.max_wat")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "vast-proxy: there is no setting 'queue.max_wat'\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    for buffered in ("", "1"):
        with Popen(
            [executable, "-m", "proxy", "routes"],
            stdout=PIPE,
            stderr=PIPE,
            env=environment(PYTHONUNBUFFERED=buffered),
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(30) == 0


# --- serve ------------------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = vast_proxy("serve", "--listen", address, XDG_STATE_HOME=str(tmp_path))
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1] == f"vast-proxy: cannot listen on {address}: address already in use"
    assert "Traceback" not in told.stderr


def test_the_command_line_of_serve_is_checked_like_the_settings() -> None:
    url = "expected an http or https URL without path, query or user (example: https://cloud.vast.ai)"
    told = vast_proxy("serve", "--listen", "nowhere", "--upstream", "https://me:secret@x", "--log-level", "loud")
    assert told.returncode == 2
    assert told.stderr.splitlines() == [
        "vast-proxy: --listen: listen: expected HOST:PORT (examples: 127.0.0.1:8080, [::1]:8080), got 'nowhere'",
        "vast-proxy: --log-level: log.level: expected one of debug, info, warning, error, got 'loud'",
        f"vast-proxy: --upstream: upstreams.api: {url}, got 'https://***@x'",
    ]


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def serving(folder: Path, host: str = "127.0.0.1", **variables: str) -> Iterator[int]:
    """A proxy as a process of its own; its port."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        port = free.getsockname()[1]
    with Popen(
        [executable, "-m", "proxy", "serve", "--listen", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"],
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        env=environment(XDG_STATE_HOME=str(folder), **variables),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert " listens on " in process.stdout.readline()
            yield port
        finally:
            process.terminate()
            told = process.stderr.read()
    assert (process.returncode, "Traceback" in told) == (0, False)
    assert [line for line in told.splitlines() if not line.endswith("stopping: what is under way may end")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_quietly_when_told_to(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Popen(
        [executable, "-m", "proxy", "serve", "--listen", f"127.0.0.1:{port}"],
        stdout=DEVNULL,
        stderr=PIPE,
        text=True,
        env=environment(XDG_STATE_HOME=str(tmp_path)),
    ) as process:
        assert process.stderr is not None
        while not is_open(port):
            with pytest.raises(TimeoutExpired):  # it runs on, and is about to listen
                process.wait(0.05)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


# --- health -----------------------------------------------------------------------------------------------------------


def pair(folder: Path) -> dict[str, str]:
    """A certificate for a name that is not this machine's, by an authority that nobody knows, as settings."""
    issued = trustme.CA().issue_cert("vast-proxy.example.org")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return {"VAST_PROXY_TLS__CERT": str(folder / "cert.pem"), "VAST_PROXY_TLS__KEY": str(folder / "key.pem")}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_health_asks_the_proxy_where_the_settings_say_with_or_without_tls(tmp_path: Path, scheme: str) -> None:
    tls = pair(tmp_path) if scheme == "https" else {}
    with serving(tmp_path, **tls) as port:
        # What is wrong in a file that is about to be mended does not make ill what runs.
        (tmp_path / "mine.yaml").write_text(f'listen: "127.0.0.1:{port}"\nlimits: {{scal: 2}}\ntls: {{cert: /gone}}\n')
        for arguments, variables in (
            (["--listen", f"127.0.0.1:{port}", "--config", "/gone"], {}),
            (["--config", str(tmp_path / "mine.yaml")], {}),
            ([], {"VAST_PROXY_LISTEN": f"127.0.0.1:{port}", "http_proxy": "http://127.0.0.1:9"}),
        ):
            told = vast_proxy("health", *arguments, **variables)
            assert (told.returncode, told.stderr) == (0, "")
            assert told.stdout == f"{scheme}://127.0.0.1:{port} answers\n"


@pytest.mark.parametrize(("everywhere", "here"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_health_asks_what_listens_everywhere_by_the_loopback_address(
    tmp_path: Path, everywhere: str, here: str
) -> None:
    with serving(tmp_path, everywhere, VAST_PROXY_ALLOW_OPEN="true") as port:
        listen = f"[{everywhere}]:{port}" if ":" in everywhere else f"{everywhere}:{port}"
        told = vast_proxy("health", VAST_PROXY_LISTEN=listen)
        assert (told.returncode, told.stdout) == (0, f"http://{here}:{port} answers\n")


def test_health_goes_by_a_name_that_the_proxy_need_not_know(tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        told = vast_proxy("health", "--listen", f"127.1:{port}")
        assert (told.returncode, told.stdout) == (0, f"http://127.1:{port} answers\n")


def test_health_fails_in_one_line_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = vast_proxy("health", "--listen", f"127.0.0.1:{port}")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"vast-proxy: no answer from 127.0.0.1:{port}: connection refused\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 503 Not Now\r\nContent-Length: 0\r\n\r\n", "http://{}/_proxy/health answers 503"),
        (b"SSH-2.0-x\r\n", "no answer from {}: "),
        (None, "no answer from {}: timed out"),
    ],
)
def test_health_fails_in_one_line_where_something_else_answers_or_nobody(answer: bytes | None, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def answers() -> None:
            for _ in range(2):  # by http and by https
                with listener.accept()[0] as connection:
                    connection.recv(65536)
                    if answer is not None:
                        connection.sendall(answer)
                    else:
                        connection.recv(65536)

        threading.Thread(target=answers, daemon=True).start()
        told = vast_proxy("health", "--listen", address)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (1, "", 1)
    assert told.stderr.startswith("vast-proxy: " + reason.format(address))


def test_health_knows_no_status_but_0_and_1_and_tells_what_is_wrong_with_the_address(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("\nlisten: here\n")
    expected = "listen: expected HOST:PORT (examples: 127.0.0.1:8080, [::1]:8080), got 'here'"
    told = vast_proxy("health", "--config", tmp_path / "mine.yaml")
    assert (told.returncode, told.stderr) == (1, f"vast-proxy: {tmp_path}/mine.yaml:2: {expected}\n")
    told = vast_proxy("health", VAST_PROXY_LISTEN="here")
    assert (told.returncode, told.stderr) == (1, f"vast-proxy: $VAST_PROXY_LISTEN: {expected}\n")
    told = vast_proxy("health", "--config", "/nowhere.yaml")
    assert (told.returncode, told.stderr) == (
        1,
        "vast-proxy: /nowhere.yaml: cannot be read: No such file or directory\n",
    )
