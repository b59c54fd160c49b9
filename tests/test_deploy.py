"""What it is deployed with: that tools understand it, that it names what there is, and that it fits together."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Start
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_cli import environment, serving
from test_metrics import busy

from proxy import __version__
from proxy.__main__ import _parser
from proxy.keys import MOUNTED
from proxy.settings import load

CHECKOUT = Path(__file__).parent.parent
BOARD = json.loads((CHECKOUT / "deploy/grafana/vast-proxy.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def text_of(name: str) -> str:
    return (CHECKOUT / name).read_text("utf-8")


def read(name: str) -> Any:
    return yaml.safe_load(text_of(name))


# --- The image --------------------------------------------------------------------------------------------------------


def instructions() -> Iterator[tuple[str, str]]:
    """Those of the Dockerfile, without comments, with continued lines joined."""
    lines = re.sub(r"^#.*\n", "", text_of("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    for line in filter(None, lines):
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    told = subprocess.run([linter, CHECKOUT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_both_stages_are_built_on_one_base_of_a_full_version() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert bases == ["${BASE}", "${BASE}"]
    (base,) = (
        rest.removeprefix("BASE=") for name, rest in instructions() if name == "ARG" and rest.startswith("BASE=")
    )
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base)
    assert read("docker-compose.yml")["services"]["job"]["image"] == base


def test_the_image_runs_commands_that_there_are_as_nobody_in_particular() -> None:
    found = dict(instructions())
    _parser().parse_args(json.loads(found["CMD"]))
    health = json.loads(found["HEALTHCHECK"].rpartition("CMD ")[2])
    assert [health[0]] == json.loads(found["ENTRYPOINT"]) == ["vast-proxy"]
    assert _parser().parse_args(health[1:]).command is not None
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", found["USER"]), "numbers: an orchestrator cannot look up names"
    assert f'image.version="{__version__}"' in found["LABEL"]
    environ = dict(re.findall(r"([A-Z_]+)=(\S+)", found["ENV"]))
    kept_in = load(None, environ | {"VAST_PROXY_ALLOW_OPEN": "true"}, {}).state.file
    assert kept_in is not None
    assert str(kept_in.parent) == found["VOLUME"]


def test_all_that_the_image_is_built_from_is_let_in() -> None:
    let_in = {line[1:].rstrip("/") for line in text_of(".dockerignore").splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    assert {source for sources in copied for source in sources} == let_in
    assert all((CHECKOUT / source).exists() for source in let_in)


def pins() -> dict[str, str]:
    lines = [line for line in text_of("deploy/constraints.txt").splitlines() if not line.startswith("#")]
    found: dict[str, str] = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    assert len(found) == len(lines)
    return found


def test_all_that_is_installed_in_the_image_is_pinned_to_a_version_that_will_do() -> None:
    pinned, seen = pins(), {("vast-proxy", "otel")}
    # From one package to those that it wants, as far as the versions here are those of the image.
    wanted = [("vast-proxy", "otel")]
    while wanted:
        package, extra = wanted.pop()
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            continue
        if package != "vast-proxy" and installed.version != pinned[package]:
            continue
        for requirement in map(Requirement, installed.requires or []):
            # The image's Python, not the one of this test.
            about = {"extra": extra, "python_version": "3.13", "python_full_version": "3.13.0", "sys_platform": "linux"}
            if requirement.marker is not None and not requirement.marker.evaluate(about):
                continue
            name = canonicalize_name(requirement.name)
            assert name in pinned, f"{package} wants {requirement}"
            assert requirement.specifier.contains(pinned[name], prereleases=True), f"{package} wants {requirement}"
            further = {(name, each) for each in requirement.extras or {""}} - seen
            seen |= further
            wanted += further


# --- Compose ----------------------------------------------------------------------------------------------------------


def compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real one."""
    spec = find_spec("compose")
    if spec is None or spec.origin is None:
        pytest.skip("there is no docker compose for this machine in the Python registry")
    # Its wrapper in Python forgets how it ended.
    program = Path(spec.origin).with_name("docker-compose")
    return subprocess.run(
        [program, "--file", CHECKOUT / "docker-compose.yml", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": "/nonexistent"},
        timeout=30,
    )


@pytest.mark.parametrize("profile", ["", "example", "metrics", "team", "*"])
def test_compose_understands_its_file_with_every_profile(profile: str) -> None:
    told = compose("--profile", profile, "config", "--quiet")
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_compose_gives_no_container_more_than_it_needs() -> None:
    services = json.loads(compose("--profile", "*", "config", "--format", "json").stdout)["services"]
    assert {"vast-proxy", "gateway", "observer", "prometheus", "grafana", "job"} == set(services)
    for name, service in services.items():
        if name == "job":  # an example of somebody else's
            continue
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    for name in ("vast-proxy", "gateway"):
        assert services[name]["read_only"] is True
        # What is under way has `drain.timeout` to end.
        assert seconds(services[name]["stop_grace_period"]) > load(None, {}, {}).drain.timeout
        assert "healthcheck" not in services[name], "the image has one"
    # The key and the token are where they are needed, and nowhere else.
    secrets = {name: {each["source"] for each in service.get("secrets", [])} for name, service in services.items()}
    assert {name: found for name, found in secrets.items() if found} == {
        "gateway": {"vast_api_key", "tls_cert", "tls_key"},
        "observer": {"admin_token", "tls_cert"},
    }


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s", text)
    assert match
    return float(match[1])


# --- A team's gateway -------------------------------------------------------------------------------------------------


def make_certificate(folder: Path) -> None:
    """As docs/team.md says, with its command."""
    (folder / "deploy" / "secrets").mkdir(parents=True)
    match = re.search(r"^openssl req (?:.*\\\n)+.*$", text_of("docs/team.md"), re.MULTILINE)
    assert match
    subprocess.run(["sh", "-euc", match[0]], cwd=folder, check=True, capture_output=True)


def gateway(folder: Path, text: str) -> Any:
    """The settings of the gateway, as Compose starts it, with secrets in this folder."""
    (folder / "vast_api_key").write_text("0123456789abcdef-of-the-account\n")
    (folder / "vast_api_key").chmod(0o600)
    make_certificate(folder)
    for name in ("tls_cert", "tls_key"):
        (folder / "deploy" / "secrets" / name).rename(folder / name)
    (folder / "proxy.yaml").write_text(text.replace(f"{MOUNTED[0]}/", f"{folder}/"))
    image = dict(re.findall(r"(VAST_PROXY_\w+)=(\S+)", dict(instructions())["ENV"]))
    return load(folder / "proxy.yaml", image, {})


def test_the_gateway_starts_with_its_settings_as_they_are_and_lets_nobody_in(tmp_path: Path) -> None:
    settings = gateway(tmp_path, text_of("deploy/team/proxy.yaml"))
    assert settings.team
    assert settings.team.members == {}
    assert settings.admin.token is None
    assert settings.tls.cert is not None
    assert settings.listen.port == 8080


def test_the_examples_in_the_gateways_settings_are_settings(tmp_path: Path) -> None:
    text = text_of("deploy/team/proxy.yaml").replace("  members: {}\n", "").replace("hosts: []\n", "")
    text = re.sub(
        r"^  # (members:|  )", r"  \1", re.sub(r"^# (hosts:)", r"\1", text, flags=re.MULTILINE), flags=re.MULTILINE
    )
    settings = gateway(tmp_path, text.replace("...", "1" * 64, 1).replace("...", "2" * 64))
    assert set(settings.team.members) == {"ada", "ci"}
    assert settings.hosts == ("vast-proxy.example.org",)


def test_the_gateway_and_its_prometheus_agree_on_port_names_and_secrets() -> None:
    services = read("docker-compose.yml")["services"]
    [job] = read("deploy/prometheus-team.yml")["scrape_configs"]
    [targets] = job["static_configs"]
    assert job["scheme"] == "https"
    assert job["metrics_path"] == "/_proxy/metrics"
    assert targets["targets"] == [f"{job['tls_config']['server_name']}:{dict(instructions())['EXPOSE']}"]
    assert job["tls_config"]["server_name"] in services
    used = [job["tls_config"]["ca_file"], job["authorization"]["credentials_file"]]
    assert {Path(file).name for file in used} == set(services["observer"]["secrets"])
    assert {str(Path(file).parent) for file in used} == {str(MOUNTED[0])}
    mentioned = set(re.findall(rf"{MOUNTED[0]}/(\w+)", text_of("deploy/team/proxy.yaml")))
    assert mentioned == set(services["gateway"]["secrets"])
    assert f'job="{job["job_name"]}"' in " ".join(EXPRESSIONS)
    # It reads the file that is mounted.
    [mounted] = [volume for volume in services["gateway"]["volumes"] if volume.startswith("./")]
    source, target, mode = mounted.split(":")
    assert mode == "ro"
    file = Path(services["gateway"]["environment"]["VAST_PROXY_CONFIG"])
    assert str(file.parent) == target
    assert (CHECKOUT / source / file.name).is_file()


CLIENTS = """
import asyncio, os, ssl, sys
import certifi
if sys.argv[1]:
    certifi.where = lambda: sys.argv[1]
import aiohttp, requests
import vastai.cli.main
from vastai import AsyncClient, SyncClient, VastAI
url = os.environ["VAST_URL"]
def cli():
    sys.argv[:] = ["vastai", "show", "instances"]
    vastai.cli.main.main()
async def later():
    client = AsyncClient(api_key="vp_x", vast_server=url)
    client._ssl_context = ssl.create_default_context()  # it would fetch a certificate from console.vast.ai first
    async with client:
        await client.show_instances()
calls = {
    "VastAI": lambda: VastAI(api_key="vp_x", server_url=url).show_instances(),
    "SyncClient": lambda: SyncClient(api_key="vp_x", vast_server=url).show_instances(),
    "requests": lambda: requests.get(url),
    "AsyncClient": lambda: asyncio.run(later()),
    "CLI": cli,
}
told = sys.stdout
for name, call in calls.items():
    sys.stdout = sys.stderr
    try:
        call()
    except BaseException as error:  # that this is not permitted is what the gateway answers
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            continue
    print(name, file=told)
"""


@pytest.mark.parametrize(
    ("trusting", "served"),
    [
        ("", set()),
        ("certifi", {"CLI", "VastAI", "SyncClient", "requests"}),
        ("REQUESTS_CA_BUNDLE", {"SyncClient", "requests"}),
        ("SSL_CERT_FILE", {"AsyncClient"}),
    ],
)
def test_clients_trust_a_certificate_of_ones_own_by_what_the_docs_say(
    tmp_path: Path, trusting: str, served: set[str]
) -> None:
    make_certificate(tmp_path)
    cert, key = (str(tmp_path / "deploy" / "secrets" / name) for name in ("tls_cert", "tls_key"))
    kept = {name for name in environment() if name not in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")}
    member = f'{{token: "sha256:{hashlib.sha256(b"vp_x").hexdigest()}", effects: [auth]}}'
    team = {
        "VAST_PROXY_TEAM__KEYS": "{default: {env: ACCOUNT_KEY}}",
        "VAST_PROXY_TEAM__MEMBERS": f"{{ada: {member}}}",
        "ACCOUNT_KEY": "0123456789abcdef-of-the-account",
        "VAST_PROXY_LOG__LEVEL": "warning",
    }
    with serving(tmp_path, VAST_PROXY_TLS__CERT=cert, VAST_PROXY_TLS__KEY=key, **team) as port:
        environ = {name: value for name, value in environment().items() if name in kept}
        environ |= {"VAST_URL": f"https://localhost:{port}", "VAST_API_KEY": "vp_x", "HOME": str(tmp_path)}
        environ["NO_PROXY"] = "localhost"
        if trusting.isupper():
            environ[trusting] = cert
        told = subprocess.run(
            [sys.executable, "-c", CLIENTS, cert if trusting == "certifi" else ""],
            capture_output=True,
            text=True,
            check=False,
            env=environ,
            timeout=60,
        )
    assert set(told.stdout.split()) == served, told.stderr
    # And the docs say that.
    table = text_of("docs/team.md").partition("at the clients")[2]
    for client in served:
        [row] = re.findall(rf"^\|.*\b{client}\b.*?\| (.+) \|$", table, re.MULTILINE)
        assert trusting in row


# --- systemd ----------------------------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """What the service's unit sets, and what it has as a comment to be taken up."""
    found: dict[str, list[str]] = {}
    for line in text_of("deploy/vast-proxy.service").splitlines():
        match = re.fullmatch(r"(?:# )?([A-Z][A-Za-z]+)=(\S.*)?", line)
        if match:
            found.setdefault(match[1], []).append(match[2] or "")
    return found


def test_the_unit_runs_a_command_that_there_is_and_gives_it_the_time_that_it_takes_to_end() -> None:
    [command] = unit()["ExecStart"]
    assert _parser().parse_args(shlex.split(command)[1:]).command is not None
    [patience] = unit()["TimeoutStopSec"]
    assert float(patience) > load(None, {}, {}).drain.timeout
    [reload] = unit()["ExecReload"]
    assert "-HUP $MAINPID" in reload
    assert unit()["RestartPreventExitStatus"] == ["2"], "what wrong settings end with"


def test_what_the_unit_lets_it_write_to_is_where_it_writes() -> None:
    [variable] = unit()["Environment"]
    name, _, value = variable.partition("=")
    kept_in = load(None, {name: value.replace("%S", "/var/lib")}, {}).state.file
    assert kept_in is not None
    assert [f"/var/lib/{folder}" for folder in unit()["StateDirectory"]] == [str(kept_in.parent)]
    assert unit()["ProtectSystem"] == ["strict"]
    assert unit()["DynamicUser"] == ["yes"]


def test_the_units_credentials_are_where_the_proxy_takes_keys_from() -> None:
    names = {line.partition(":")[0] for line in unit()["LoadCredential"]}
    assert names == {"vast_api_key", "tls_cert", "tls_key"}
    [told] = re.findall(r"as (/\S+)/vast_api_key\.", text_of("deploy/vast-proxy.service"))
    assert any(Path(told).is_relative_to(place) for place in MOUNTED)


# --- Prometheus and Grafana -------------------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_every_metric_and_label_of_the_board_is_one_of_ours(start: Start) -> None:
    text = (await (await busy(start)).get("/_proxy/metrics")).body.decode()
    names = set(re.findall(r"^([a-z_]+)", text, re.MULTILINE))
    types = set(re.findall(r"^# TYPE ([a-z_]+)", text, re.MULTILINE))  # one without a sample at this moment
    labels = set(re.findall(r'[{,]([a-z]+)="', text)) | {"code"}
    for expression in EXPRESSIONS:
        used = set(re.findall(r"\b((?:vast_proxy|process)_[a-z_]+)", expression))
        assert used
        assert used <= names | types, expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= labels, expression
        # Counters and buckets are looked at as rates, gauges are not.
        for name in used:
            rated = re.search(rf"(?:rate|increase)\({name}\b", expression) is not None
            assert rated == name.endswith(("_total", "_bucket")), expression
    legends = {
        label for panel in PANELS for t in panel["targets"] for label in re.findall(r"{{(\w+)}}", t["legendFormat"])
    }
    assert legends <= labels | {"instance"}


def test_the_board_shows_all_that_an_issue_may_be_about() -> None:
    shown = " ".join(EXPRESSIONS)
    for name in ("requests", "queue_wait_seconds", "upstream_duration_seconds", "queue_depth", "upstream_refusals"):
        assert f"vast_proxy_{name}" in shown
    for name in ("upstream_retries", "ceiling_tokens", "calls_saved", "limit_interval_seconds"):
        assert f"vast_proxy_{name}" in shown


def test_the_boards_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)
    assert all(panel["datasource"]["uid"] == "${source}" for panel in PANELS)


def test_prometheus_asks_the_proxy_where_it_answers() -> None:
    [job] = read("deploy/prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] == "/_proxy/metrics"
    [targets] = job["static_configs"]
    assert targets["targets"] == ["127.0.0.1:8080"]  # beside the proxy: metrics are for its own machine
    assert f'job="{job["job_name"]}"' in " ".join(EXPRESSIONS)


def test_compose_mounts_what_is_there_and_brings_it_up_by_a_profile_only() -> None:
    compose = read("docker-compose.yml")
    services = compose["services"]
    assert "profiles" not in services["vast-proxy"]
    for name in ("prometheus", "grafana"):
        service = services[name]
        assert service["profiles"] == ["metrics"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), "a version, so that it stays what it was"
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (CHECKOUT / source).exists()
                assert volume.endswith(":ro")
            else:
                assert source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    [source] = read("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://vast-proxy:9090"
    [provider] = read("deploy/grafana/provisioning/dashboards/vast-proxy.yml")["providers"]
    assert any(f":{provider['options']['path']}/" in volume for volume in services["grafana"]["volumes"])
