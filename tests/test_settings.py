"""Settings: what wins over what, what every mistake is called, and that the shipped file tells the truth."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from subprocess import run
from sys import executable
from typing import Any

import pytest
import yaml

from proxy.policy.limiting import Ceiling
from proxy.policy.members import Member
from proxy.settings import FLAGS, Listen, Settings, SettingsError, known_keys, load, shipped

CHECKOUT = Path(__file__).parent.parent
NOWHERE = {"HOME": "/home/somebody", "HOME_KEY": "0123456789abcdef-key-in-the-environment"}
HASH = "sha256:" + 64 * "0"
KEYS = "team:\n  keys: {default: {env: HOME_KEY}}\n"


def loaded(text: str, folder: Path, environ: dict[str, str] | None = None, **overrides: object) -> Settings:
    file = folder / "proxy.yaml"
    file.write_text(text)
    return load(file, NOWHERE | (environ or {}), {name.replace("__", "."): value for name, value in overrides.items()})


def mistakes(text: str, folder: Path, environ: dict[str, str] | None = None, **overrides: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        loaded(text, folder, environ, **overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def from_environment(**variables: str) -> Settings:
    return load(None, NOWHERE | {f"VAST_PROXY_{name}": value for name, value in variables.items()}, {})


def at(settings: Settings, key: tuple[str | int, ...]) -> Any:
    """The value of a key in the tree of dataclasses."""
    value: Any = settings
    for part in key:
        value = getattr(value, f"{part}_" if hasattr(value, f"{part}_") else str(part))
    return value


# --- What wins over what ----------------------------------------------------------------------------------------------


def test_without_a_file_the_shipped_defaults_hold() -> None:
    settings = load(None, NOWHERE, {})
    assert settings.listen == Listen("127.0.0.1", 8080)
    assert settings.source == "shipped defaults"
    assert len(settings.routes) > 100


def test_the_shipped_file_says_what_the_dataclasses_say() -> None:
    settings = load(None, NOWHERE, {})
    plain = Settings(routes=settings.routes)
    assert dataclasses.replace(settings, state=plain.state) == plain


def test_the_file_wins_over_the_defaults_the_environment_over_it_and_the_command_line_over_all(tmp_path: Path) -> None:
    text = "listen: 127.0.0.1:1\nlog: {level: debug}\nlimits: {scale: 3}\nretry: {max_attempts: 2}"
    environ = {"VAST_PROXY_LISTEN": "127.0.0.1:2", "VAST_PROXY_LIMITS__SCALE": "4"}
    settings = loaded(text, tmp_path, environ, listen="127.0.0.1:3", log__level=None)
    assert settings.listen.port == 3
    assert settings.limits.scale == 4
    assert settings.retry.max_attempts == 2
    assert settings.log.level == "debug", "None means that the flag was not given"
    assert settings.source == f"{tmp_path}/proxy.yaml + environment + command line"


def test_a_mapping_that_names_some_keys_keeps_the_others(tmp_path: Path) -> None:
    limits = loaded("limits: {global: {rate: 5}, serverless: {burst: 9}}", tmp_path).limits
    assert limits.global_ == Ceiling(rate=5.0, per=1.0, burst=5.0)
    assert limits.serverless == Ceiling(rate=2.0, per=1.0, burst=9.0)


def test_a_list_is_replaced(tmp_path: Path) -> None:
    assert loaded("upstreams: {hosts: [example.com, Example.ORG]}", tmp_path).upstreams.hosts == (
        "example.com",
        "example.org",
    )


def test_null_turns_a_ceiling_off_in_the_file_and_in_the_environment(tmp_path: Path) -> None:
    assert loaded("limits: {global: null}", tmp_path).limits.global_ is None
    assert from_environment(LIMITS__GLOBAL="null").limits.global_ is None


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_environment(LIMITS__GLOBAL="", LISTEN="").limits.global_ == Ceiling()


@pytest.mark.parametrize("text", ["", "# nothing\n", "limits:\n  # scale: 2\nroutes:\nfamilies:\n"])
def test_a_file_or_section_of_comments_only_is_fine(text: str, tmp_path: Path) -> None:
    assert loaded(text, tmp_path).limits == load(None, NOWHERE, {}).limits


def test_an_ipv6_address_needs_no_quotes_in_the_environment() -> None:
    assert from_environment(LISTEN="[::1]:8080").listen == Listen("::1", 8080)


def test_what_an_alias_merges_is_no_duplicate(tmp_path: Path) -> None:
    text = "limits:\n  global: &all {<<: {rate: 1}, rate: 2}\n  serverless: *all\n"
    limits = loaded(text, tmp_path).limits
    assert limits.global_ == limits.serverless == Ceiling(rate=2.0)


def test_vast_proxy_config_names_the_file_unless_the_command_line_does(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("listen: 127.0.0.1:1")
    (tmp_path / "b.yaml").write_text("listen: 127.0.0.1:2")
    environ = NOWHERE | {"VAST_PROXY_CONFIG": str(tmp_path / "a.yaml")}
    assert load(None, environ, {}).listen.port == 1
    assert load(tmp_path / "b.yaml", environ, {}).listen.port == 2


def test_the_neighbours_of_a_service_called_vast_proxy_are_not_told_off() -> None:
    load(
        None,
        NOWHERE
        | {
            "VAST_PROXY_SERVICE_HOST": "10.0.0.7",
            "VAST_PROXY_SERVICE_PORT": "8080",
            "VAST_PROXY_SERVICE_PORT_HTTP": "8080",
            "VAST_PROXY_PORT": "tcp://10.0.0.7:8080",
            "VAST_PROXY_PORT_8080_TCP": "tcp://10.0.0.7:8080",
            "VAST_PROXY_PORT_8080_TCP_ADDR": "10.0.0.7",
        },
        {},
    )


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("listen: '[::1]:0'", ("listen",), Listen("::1", 0)),
        ("listen: localhost:80", ("listen",), Listen("localhost", 80)),
        ("upstreams: {api: 'HTTP://Vast.example:81/'}", ("upstreams", "api"), "http://vast.example:81"),
        ("queue: {max_wait: 500ms}", ("queue", "max_wait"), 0.5),
        ("queue: {max_wait: 15m}", ("queue", "max_wait"), 900.0),
        ("cache: {max_bytes: 1KiB}", ("cache", "max_bytes"), 1024),
        ("cache: {max_bytes: 7}", ("cache", "max_bytes"), 7),
        ("limits: {scale: 1e-1}", ("limits", "scale"), 0.1),
        ("limits: {scope: ip}", ("limits", "scope"), "ip"),
        ("state: {file: /var/lib/x.json}", ("state", "file"), Path("/var/lib/x.json")),
        ("limits: {serverless: &all {rate: 7}, global: {<<: *all, burst: 8}}", ("limits", "global", "rate"), 7.0),
    ],
)
def test_values_are_read_with_their_units(text: str, key: tuple[str, ...], value: object, tmp_path: Path) -> None:
    assert at(loaded(text, tmp_path), key) == value


def test_listen_is_printed_as_it_is_written() -> None:
    assert [str(Listen("::1", 80)), str(Listen("localhost", 0))] == ["[::1]:80", "localhost:0"]


def test_the_state_file_goes_where_xdg_says() -> None:
    def file(**environ: str) -> str:
        return str(load(None, environ, {}).state.file)

    assert file(HOME="/h") == "/h/.local/state/vast-proxy/state.json"
    assert file(HOME="/h", XDG_STATE_HOME="/s") == "/s/vast-proxy/state.json"
    assert file(HOME="/h", XDG_STATE_HOME="relative") == "/h/.local/state/vast-proxy/state.json"
    assert file(HOME="/h", VAST_PROXY_STATE__FILE="/x.json") == "/x.json"


def test_routes_of_the_user_are_laid_over_the_shipped_ones(tmp_path: Path) -> None:
    text = (
        "families: {mine: {ttl: 3s}}\n"
        "routes:\n"
        "  - {route: GET /api/v0/instances/, interval: 9s}\n"
        "  - {route: GET /my/own/, effect: read, cache: mine}\n"
    )
    routes = loaded(text, tmp_path).routes
    assert routes.match("GET", "/api/v0/instances/").interval == 9
    mine = routes.match("GET", "/my/own/").family
    assert mine is not None
    assert mine.ttl == 3


# --- Every key --------------------------------------------------------------------------------------------------------

LEAVES = [key for key in known_keys() if not any(other[:-1] == key for other in known_keys())]
OTHER_VALUES: dict[tuple[str | int, ...], tuple[str, object]] = {
    ("listen",): ("127.0.0.2:99", Listen("127.0.0.2", 99)),
    ("allow_open",): ("true", True),
    ("hosts",): ("[proxy.example]", ("proxy.example",)),
    ("trusted_proxies",): ("[10.0.0.7/8, '::1']", (ip_network("10.0.0.0/8"), ip_network("::1"))),
    ("admin", "token"): (HASH, HASH),
    ("upstreams", "api"): ("http://a.example", "http://a.example"),
    ("upstreams", "serverless"): ("http://b.example", "http://b.example"),
    ("upstreams", "hosts"): ("[c.example]", ("c.example",)),
    ("limits", "scope"): ("key", "key"),
    ("limits", "margin"): ("0.5", 0.5),
    ("log", "level"): ("error", "error"),
    ("log", "format"): ("json", "json"),
    ("tracing", "otlp"): ("http://127.0.0.1:4318/", "http://127.0.0.1:4318"),
    ("state", "file"): ("/var/s.json", Path("/var/s.json")),
    ("cache", "share_searches"): ("true", True),
}


@pytest.mark.parametrize("key", [key for key in LEAVES if key[0] not in ("routes", "families", "team", "tls")], ids=str)
def test_every_key_can_be_set_in_the_environment(key: tuple[str, ...]) -> None:
    text, value = OTHER_VALUES.get(key, ("17", 17))
    if key == ("queue", "heartbeats"):
        text = "{new-client/: 102}"
        value = load(None, NOWHERE, {}).queue.heartbeats | {"new-client/": "102"}  # type: ignore[operator]
    settings = from_environment(**{"__".join(key).upper(): text})
    assert at(settings, key) == value
    assert settings != load(None, NOWHERE, {})


def test_a_team_can_be_given_in_the_environment() -> None:
    members = f"{{ada: {{token: '{HASH}', key: a}}}}"
    settings = from_environment(TEAM__KEYS="{a: {env: HOME_KEY}}", TEAM__MEMBERS=members)
    assert settings.team.members["ada"] == Member(token=HASH, key="a")
    assert settings.team_keys["a"].value == NOWHERE["HOME_KEY"]


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "[::ffff:127.0.0.1]:1"])
def test_to_listen_on_this_machine_alone_needs_nothing(listen: str) -> None:
    assert from_environment(LISTEN=listen)


@pytest.mark.parametrize("more", [{"ALLOW_OPEN": "true"}, {"TEAM__KEYS": "{a: {env: HOME_KEY}}"}])
def test_to_listen_elsewhere_needs_a_team_or_to_be_meant(more: dict[str, str]) -> None:
    assert from_environment(LISTEN="0.0.0.0:80", **more).listen.port == 80


def test_routes_can_be_given_in_the_environment() -> None:
    settings = from_environment(ROUTES="[{route: GET /x/, effect: read}]", FAMILIES="{mine: {ttl: 1}}")
    assert settings.routes.match("GET", "/x/").listed
    assert "mine" in settings.routes.families


def keys_of(data: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in data.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from keys_of(value, (*above, name))


def test_the_shipped_file_has_every_key_and_explains_it() -> None:
    text = shipped("proxy.yaml").read_text()
    written = {key for key in keys_of(yaml.safe_load(text)) if key[:2] != ("queue", "heartbeats")}
    written.add(("queue", "heartbeats"))
    # A ceiling is explained where it is on; of the one that is off, the comment shows all keys.
    known = {key for key in known_keys() if key[:2] != ("limits", "serverless") or len(key) == 2}
    assert written == known

    lines = text.splitlines()
    for key in LEAVES:
        if key[:2] in (("limits", "global"), ("limits", "serverless")):
            continue
        indent = "  " * (len(key) - 1)
        number = next(
            number
            for number, line in enumerate(lines)
            if re.match(rf"{indent}{key[-1]}:", line) and (not indent or section(lines, number) == key[0])
        )
        assert lines[number - 1].startswith(f"{indent}#"), f"{key} has no comment above it"


def section(lines: list[str], number: int) -> str:
    return next(line.partition(":")[0] for line in reversed(lines[:number]) if re.match(r"\w+:", line))


# --- What mistakes are called -----------------------------------------------------------------------------------------

URL = "expected an http or https URL without path, query or user (example: https://cloud.vast.ai)"
LISTEN = "expected HOST:PORT (examples: 127.0.0.1:8080, [::1]:8080)"
DURATION = 'expected a duration (examples: 60, "500ms", "15m")'
TOKEN = "expected sha256: and 64 hexadecimal digits, as `vast-proxy token new` prints it"
NETWORK = "expected an address or a block of them (examples: 10.0.0.7, 10.0.0.0/8, fd00::/8)"
OPEN = (
    "is open to other machines: whoever reaches the port can use the proxy with a Vast key of their own, and sees "
    "nothing of others. `allow_open: true` says that this is meant; with `team` only members can use it"
)
SIZE = 'expected a size in bytes (examples: 1048576, "512KiB", "64MiB")'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limits:\n\n  scal: 2", "proxy.yaml:3:3: limits.scal: unknown key, did you mean 'scale'?"),
        ("scale: 2", "proxy.yaml:1:1: scale: unknown key, did you mean 'limits.scale'?"),
        ("xyzzy: 2", "proxy.yaml:1:1: xyzzy: unknown key"),
        ("limits: {global_: {rate: 1}}", "proxy.yaml:1:10: limits.global_: unknown key, did you mean 'global'?"),
        ("limits: {global: {brust: 1}}", "proxy.yaml:1:19: limits.global.brust: unknown key, did you mean 'burst'?"),
        ("source: me", "proxy.yaml:1:1: source: unknown key"),
        ("queue:\n  max_wait: soon", f"proxy.yaml:2: queue.max_wait: {DURATION}, got 'soon'"),
        ("queue: {max_wait: -1}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got '-1'"),
        ("queue: {max_wait: .inf}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got 'inf'"),
        ("queue: {max_wait: true}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got true"),
        ("queue: {max_wait: null}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got null"),
        ("queue: {max_wait: [1]}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got a list"),
        ("queue: {max_wait: {s: 1}}", f"proxy.yaml:1: queue.max_wait: {DURATION}, got a mapping"),
        ("queue: {max_waiting: 0}", "proxy.yaml:1: queue.max_waiting: expected a whole number >= 1, got '0'"),
        ("queue: {max_waiting: 1.5}", "proxy.yaml:1: queue.max_waiting: expected a whole number >= 1, got '1.5'"),
        (
            "queue: {heartbeats: {x/: 101}}",
            "proxy.yaml:1: queue.heartbeats.x/: expected one of 100, 102, none, got '101'",
        ),
        ("cache: {max_bytes: 1.5}", f"proxy.yaml:1: cache.max_bytes: {SIZE}, got '1.5'"),
        ("cache: {share_searches: 1}", "proxy.yaml:1: cache.share_searches: expected true or false, got '1'"),
        ("limits: {scale: 0}", "proxy.yaml:1: limits.scale: expected a number > 0, got '0'"),
        ("limits: {scale: .nan}", "proxy.yaml:1: limits.scale: expected a number > 0, got 'nan'"),
        ("limits: {margin: 1.1}", "proxy.yaml:1: limits.margin: expected a number from 0 to 1, got '1.1'"),
        ("limits: {scope: all}", "proxy.yaml:1: limits.scope: expected one of auto, key, ip, got 'all'"),
        ("limits: {global: 5}", "proxy.yaml:1: limits.global: expected a mapping, got '5'"),
        (
            "limits:\n  global:\n    rate: 1\n    per: 0",
            "proxy.yaml:4: limits.global.per: expected a duration > 0, got '0'",
        ),
        ("limits: [1]", "proxy.yaml:1: limits: expected a mapping, got a list"),
        ("log: {level: INFO}", "proxy.yaml:1: log.level: expected one of debug, info, warning, error, got 'INFO'"),
        ("listen: 8080", f"proxy.yaml:1: listen: {LISTEN}, got '8080'"),
        ("listen: ':8080'", f"proxy.yaml:1: listen: {LISTEN}, got ':8080'"),
        ("listen: ::1:8080", f"proxy.yaml:1: listen: {LISTEN}, got '::1:8080'"),
        ("listen: '[nonsense]:8080'", f"proxy.yaml:1: listen: {LISTEN}, got '[nonsense]:8080'"),
        ("listen: h:65536", f"proxy.yaml:1: listen: {LISTEN}, got 'h:65536'"),
        ("upstreams: {api: cloud.vast.ai}", f"proxy.yaml:1: upstreams.api: {URL}, got 'cloud.vast.ai'"),
        ("upstreams: {api: 'ftp://x'}", f"proxy.yaml:1: upstreams.api: {URL}, got 'ftp://x'"),
        ("upstreams: {api: 'https://x/api'}", f"proxy.yaml:1: upstreams.api: {URL}, got 'https://x/api'"),
        ("upstreams: {api: 'https://x:no'}", f"proxy.yaml:1: upstreams.api: {URL}, got 'https://x:no'"),
        ("upstreams: {api: 'https://[x'}", f"proxy.yaml:1: upstreams.api: {URL}, got 'https://[x'"),
        ("upstreams: {api: 5}", f"proxy.yaml:1: upstreams.api: {URL}, got '5'"),
        ("upstreams: {hosts: vast.ai}", "proxy.yaml:1: upstreams.hosts: expected a list, got 'vast.ai'"),
        (
            "upstreams:\n  hosts:\n  - vast.ai\n  - '*.vast.ai'",
            "proxy.yaml:4: upstreams.hosts[1]: expected a domain (example: vast.ai), got '*.vast.ai'",
        ),
        ("state: {file: ''}", "proxy.yaml:1: state.file: expected the name of a file, or null, got ''"),
        (
            "state: {file: 2026-02-30}",
            "proxy.yaml:1:15: state.file: not a valid value of its kind; quote it to mean a text",
        ),
        ("routes: {}", "proxy.yaml:1: routes: expected a list, got a mapping"),
        ("families: []", "proxy.yaml:1: families: expected a mapping, got a list"),
        (
            "team: {members: {ada: {}}}",
            "proxy.yaml:1: team.members.ada: a member needs `token`, as `vast-proxy token new` prints it",
        ),
        ("team:\n  members:\n    ada:\n      token: my-own-idea", f"proxy.yaml:4: team.members.ada.token: {TOKEN}"),
        ("team: {members: {ada: {tokn: x}}}", "proxy.yaml:1:24: team.members.ada.tokn: unknown key"),
        (
            f"team:\n  members:\n    ada: {{token: '{HASH}', key: other}}\n  keys: {{default: {{env: HOME_KEY}}}}",
            "proxy.yaml:3: team.members.ada.key: there is no other in team.keys",
        ),
        (
            f"{KEYS}  members:\n    ada: {{token: '{HASH}'}}\n    bob:\n      token: '{HASH}'",
            "proxy.yaml:6: team.members.bob.token: the same token as that of ada",
        ),
        (
            f"{KEYS}  members:\n    ada: {{token: '{HASH}', deny:\n      ['PUT /api/v0/asks/{{no}}', 'PUT /x/42/']}}",
            "proxy.yaml:5: team.members.ada.deny[1]: no such route; `vast-proxy routes` lists them, got 'PUT /x/42/'",
        ),
        (
            f"team: {{keys: {{default: {{env: HOME_KEY}}}}, members: {{a b: {{token: '{HASH}'}}}}}}",
            "proxy.yaml:1: team.members.a b: a member's name is 1 to 64 letters, digits and . _ @ -",
        ),
        (
            f"team: {{keys: {{default: {{env: HOME_KEY}}}}, members: {{ada: {{token: '{HASH}', effects: [rent]}}}}}}",
            "proxy.yaml:1: team.members.ada.effects[0]: expected one of read, search, write, spend, auth, got 'rent'",
        ),
        ("trusted_proxies: [10.0.0.0/33]", f"proxy.yaml:1: trusted_proxies[0]: {NETWORK}, got '10.0.0.0/33'"),
        ("listen: 0.0.0.0:80", f"proxy.yaml:1: listen: 0.0.0.0:80 {OPEN}"),
        ("listen: '[::]:80'", f"proxy.yaml:1: listen: [::]:80 {OPEN}"),
        ("listen: my-machine:80", f"proxy.yaml:1: listen: my-machine:80 {OPEN}"),
        ("tls: {cert: /x}", "proxy.yaml:1: tls.cert: needs tls.key beside it"),
        ("tls:\n  key: /x", "proxy.yaml:2: tls.key: needs tls.cert beside it"),
        ("tls:\n  cert: /x\n  key: /x", "proxy.yaml:2: tls: /x cannot be read: No such file or directory"),
        ("admin: {token: SECRET}", f"proxy.yaml:1: admin.token: {TOKEN}"),
        ("team: {keys: {default: {}}}", "proxy.yaml:1: team.keys.default: expected either `file` or `env`"),
        (
            "team: {keys: {default: {env: NO_KEY}}}",
            "proxy.yaml:1: team.keys.default: the environment variable NO_KEY is not set",
        ),
        ("[1]", "proxy.yaml: expected a mapping of settings, got a list"),
        ("just text", "proxy.yaml: expected a mapping of settings, got 'just text'"),
    ],
)
def test_a_mistake_is_told_with_its_place_its_key_what_was_expected_and_what_was_found(
    text: str, told: str, tmp_path: Path
) -> None:
    assert mistakes(text, tmp_path) == [told]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limits:\n  scale: 1\n  scale: 2", "proxy.yaml:3:3: limits.scale: given twice, first on line 2"),
        ("log: {}\nqueue: {}\nlog: {}", "proxy.yaml:3:1: log: given twice, first on line 1"),
        ("limits:\n\tscale: 1", "proxy.yaml:2:1: not YAML: while scanning for the next token, found character '\\t'"),
        ("a: b: c", "proxy.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("log: {level: info", "proxy.yaml:1:18: not YAML: while parsing a flow mapping, expected ',' or '}'"),
        ("log: *nothing", "proxy.yaml:1:6: not YAML: found undefined alias"),
        ("log: !!python/name:os.system x", "proxy.yaml:1:6: not YAML: could not determine a constructor"),
        ("log: {}\n---\nlog: {}", "proxy.yaml:2:1: not YAML: expected a single document in the stream"),
        ("log: {}\n# \x07", "proxy.yaml:2: not YAML: special characters are not allowed"),
        ("log: &a\n  level: *a", "proxy.yaml:1"),
        ("? [a]\n: 1", "proxy.yaml:1:3: a key must be a text"),
        ("log: " + "[" * 2000, "proxy.yaml: nested too deeply"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    assert mistakes(text, tmp_path)[0].startswith(told)


def test_all_mistakes_are_told_at_once_in_order(tmp_path: Path) -> None:
    text = (
        "queue:\n  max_wait: soon\n  max_wat: 1\nlimits:\n  scale: -1\nroutes:\n- {route: GET /x, effect: eat}\n- 7\n"
    )
    environ = {
        "VAST_PROXY_LIMITS__MARGIN": "2",
        "VAST_PROXY_LIMITS_SCALE": "2",
        "VAST_PROXY_CACHE": "{max_bites: 1}",
        "VAST_PROXY_RETRY__BACKOFF_MAX": "[",
    }
    told = mistakes(text, tmp_path, environ, log__level="loud", upstreams__api="x")
    assert [line.split(": expected one of read")[0] for line in told] == [
        f"proxy.yaml:2: queue.max_wait: {DURATION}, got 'soon'",
        "proxy.yaml:3:3: queue.max_wat: unknown key, did you mean 'max_wait'?",
        "proxy.yaml:5: limits.scale: expected a number > 0, got '-1'",
        told[3],
        "proxy.yaml:8: routes[1]: expected a mapping, not 7",
        "$VAST_PROXY_CACHE: cache.max_bites: unknown key, did you mean 'max_bytes'?",
        "$VAST_PROXY_LIMITS_SCALE: unknown variable, did you mean 'VAST_PROXY_LIMITS__SCALE'?",
        "$VAST_PROXY_LIMITS__MARGIN: limits.margin: expected a number from 0 to 1, got '2'",
        f"$VAST_PROXY_RETRY__BACKOFF_MAX: retry.backoff_max: {DURATION}, got '['",
        "--log-level: log.level: expected one of debug, info, warning, error, got 'loud'",
        f"--upstream: upstreams.api: {URL}, got 'x'",
    ]
    assert told[3].startswith("proxy.yaml:7: routes[0].effect: unknown value 'eat'")
    assert len(told) == 11


def test_every_wrong_route_and_family_is_told_with_its_line(tmp_path: Path) -> None:
    text = (
        "families:\n"
        "  mine: {ttl: soon}\n"
        "  all: {ttl: 1}\n"
        "  dotted.name: 5\n"
        "routes:\n"
        "  - route: GET /x\n"
        "    effect: read\n"
        "    cache: mine\n"
        "    intervall: 2\n"
        "    capacity: 0\n"
        "  - {route: GET /y}\n"
        "  - {route: GET /x/, effect: read}\n"
        "  - {route: GET /good/, effect: read}\n"
    )
    assert [line.split(": ")[:2] for line in mistakes(text, tmp_path)] == [
        ["proxy.yaml:2", "families.mine.ttl"],
        ["proxy.yaml:3", "families.all"],
        ["proxy.yaml:4", "families.dotted.name"],
        ["proxy.yaml:9", "routes[0].intervall"],
        ["proxy.yaml:10", "routes[0].capacity"],
        ["proxy.yaml:11", "routes[1].effect"],
        ["proxy.yaml:12", "routes[2].route"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "upstreams: {api: 'https://user:SECRET@cloud.vast.ai'}",
        "upstreams: {api: 'https://user:SEC/RET@SECRET@cloud.vast.ai/x'}",
        "upstreams: {api: 'https://cloud.vast.ai/?api_key=SECRET'}",
        "upstreams: {api: {key: SECRET}}",
        "listen: me:SECRET@localhost:80",
        "log: {level: SECRET00112233445566778899aabbccddeeff00112233}",
        "routes: [{route: 'GET /?api_key=SECRET', effect: read}]",
        "log: {level: [SECRET",
        "api_key: SECRET",
        "team: {members: {ada: {token: SECRET}}}",
        "team: {members: {ada: SECRET00112233445566778899aabbccddeeff00112233}}",
        "team: {keys: {default: {file: SECRET00112233445566778899aabbccddeeff}}}",
        "team: {keys: {default: {env: SECRET00112233445566778899aabbccddeeff}}}",
        "team: {keys: {SECRET00112233445566778899aabbccddeeff: {env: A}}}",
        f"team: {{members: {{ada: {{token: '{HASH}', key: SECRET0011223344}}}}}}",
        f"team: {{members: {{SECRET00112233445566778899aabbccddeeff: {{token: '{HASH}'}}}}}}",
    ],
)
def test_what_may_be_secret_is_not_echoed(text: str, tmp_path: Path) -> None:
    environ = {"VAST_PROXY_API_KEY": "SECRET", "VAST_PROXY_LOG": "{level: SECRET, SECRET"}
    told = "\n".join(mistakes(text, tmp_path, environ))
    assert "SEC" not in told


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    def told(file: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            load(file, NOWHERE, {})
        return str(caught.value)

    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"log: \xff\xfe")
    assert told(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    assert told(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert told(binary) == f"{binary}: not UTF-8 text: invalid start byte at byte 5"


def test_the_flags_name_settings_that_exist() -> None:
    assert {tuple(dotted.split(".")) for dotted in FLAGS} <= set(known_keys())


# --- Packaging --------------------------------------------------------------------------------------------------------


def test_the_wheel_carries_the_shipped_settings_and_the_page(tmp_path: Path) -> None:
    built = run(
        [executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, CHECKOUT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    for name in ("proxy.yaml", "routes.yaml"):
        assert (tmp_path / "installed/proxy/config" / name).read_bytes() == shipped(name).read_bytes()
    for file in (CHECKOUT / "proxy" / "page").iterdir():
        assert (tmp_path / "installed/proxy/page" / file.name).read_bytes() == file.read_bytes()

    told = run(
        [executable, "-m", "proxy", "check-config"],
        cwd=tmp_path / "installed",
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("shipped defaults: ok\n")
    assert not list((tmp_path / "installed").glob("tests")), "only the package goes into site-packages"

    words = run(
        [executable, "-m", "proxy", "settings"],
        cwd=tmp_path / "installed",
        env={"HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert words.stdout == (CHECKOUT / "docs" / "settings.md").read_bytes()
