"""Settings: a YAML file and the environment over the shipped defaults, or every mistake in them at once.

Later layers win: config/proxy.yaml as shipped, the file, `VAST_PROXY_*` variables, the command line. Mappings are
merged key by key, everything else is replaced. What a section may contain, its defaults and its units are said once, by
the dataclass beside the code that reads it; here they are only assembled.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from . import certificates
from .keys import read_key
from .policy import members
from .policy.breaking import BreakerRules
from .policy.caching import CacheRules
from .policy.exposure import AdminRules, Network, is_loopback
from .policy.guarding import WriteRules
from .policy.limiting import LimitRules
from .policy.members import Secret, TeamRules
from .policy.queueing import QueueRules
from .policy.retrying import RetryRules
from .policy.routing import RouteError, Routes
from .policy.units import Bytes, Count, Seconds, parse_duration, parse_size

PREFIX = "VAST_PROXY_"
"""Of every environment variable that is ours: `VAST_PROXY_LIMITS__SCALE` is `limits.scale`."""
CONFIG_VARIABLE = PREFIX + "CONFIG"
"""Names the settings file when the command line does not."""
NO_SETTINGS = frozenset({CONFIG_VARIABLE, PREFIX + "URL", PREFIX + "ADMIN_TOKEN"})
"""Variables that are ours and no settings: the last two are for `vast-proxy status`."""
FLAGS = {"listen": "--listen", "upstreams.api": "--upstream", "log.level": "--log-level"}
"""The settings that the command line can override, and how they are called there."""


class SettingsError(Exception):
    """Settings that cannot be used. The text has one line a mistake: where, which key, what was expected and found."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where clients connect; as text, HOST:PORT with brackets around an IPv6 address. Port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 8080

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_everywhere(self) -> bool:
        """Every address of the machine, and so none that anybody could be pointed at."""
        return self.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound

    @property
    def here(self) -> Listen:
        """Where this machine itself reaches it."""
        return Listen("::1" if ":" in self.host else "127.0.0.1", self.port) if self.is_everywhere else self


Address = Annotated[Listen, "address"]
Origin = Annotated[str, "origin"]
"""An http or https URL of a host and perhaps a port, nothing after them; kept without a trailing slash."""
Domain = Annotated[str, "domain"]
File = Annotated[Path, "file"]
Collector = Annotated[str, "collector"]
"""An origin, or null."""


@dataclass(frozen=True, slots=True)
class UpstreamRules:
    """Whom to call, and how long to wait for them: `upstreams` in the settings."""

    api: Origin = "https://cloud.vast.ai"
    """The Vast.ai API. Change it to test against something else."""
    serverless: Origin = "https://run.vast.ai"
    """The serverless engine, for the clients that are sent to it through this proxy."""
    hosts: tuple[Domain, ...] = ("vast.ai",)
    """Domains, each with all below it, to which a redirect of the API is followed over TLS, with the key in hand. Any
    other redirect goes to the client as it is. `[]` follows only those to the very same origin."""
    connect_timeout: Seconds = 10.0
    """The longest wait for a connection, TLS included. 0: no limit."""
    read_timeout: Seconds = 120.0
    """The longest silence between two bytes of an answer, and the longest time for a request to go out. More, if slow
    calls are cut off. 0: no limit."""
    keepalive: Seconds = 15.0
    """How long an idle connection is kept. Longer than upstream keeps it, and calls meet a closed door."""
    max_connections: Count = 100
    """Calls in flight to each upstream, and so connections to it."""


@dataclass(frozen=True, slots=True)
class ServerRules:
    """What clients may take up, of connections, memory and time: `server` in the settings."""

    max_body: Bytes = 32 * 1024 * 1024
    """The largest request body taken; larger ones get 413. It is held in memory while the request waits."""
    max_bodies: Bytes = 256 * 1024 * 1024
    """Bodies of requests in memory, all clients together, from their first byte until the request is answered. Beyond
    it the connection is closed whose body has been coming in for longest; if there is none, a request with a body gets
    503."""
    keepalive: Seconds = 75.0
    """How long an idle connection of a client is kept."""
    header_timeout: Seconds = 15.0
    """The longest time for the head of a request, from its first byte (the first one: from the connection) to its last;
    then 408. More, if clients are on very slow lines. 0: no limit. A TLS handshake has as long, by the value at the
    start."""
    body_timeout: Seconds = 20.0
    """The same for the body, and one second more for each 500 bytes of it that came; also the longest silence between
    two bytes. 0: no limit."""
    send_timeout: Seconds = 60.0
    """How long a client may take nothing of its answer; then its connection is reset, and what it held up is free for
    others. 0: no limit."""
    max_connections: Count = 4096
    """Connections of clients at once; each request that waits has one. Beyond it the connection that is idle longest is
    closed, else the one whose body has been coming in for longest, and if there is none, the new one gets 503. Open
    files are raised to what this takes, if the system allows it."""


@dataclass(frozen=True, slots=True)
class TlsRules:
    """How clients connect over TLS: `tls` in the settings. Both files, or neither."""

    cert: File | None = None
    """The certificate that clients are shown, in PEM, with those between it and the authority; then they connect by
    https. Read again on SIGHUP. null: plain http."""
    key: File | None = None
    """Its private key, in PEM, without a password."""


@dataclass(frozen=True, slots=True)
class DrainRules:
    """How the proxy ends: `drain` in the settings."""

    timeout: Seconds = 30.0
    """How long what is at upstream has to end after SIGTERM. Whatever stops the proxy must wait longer before it kills
    it (docker stop -t, stop_grace_period, TimeoutStopSec)."""


@dataclass(frozen=True, slots=True)
class LogRules:
    """What is written to standard error: `log` in the settings."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` and `debug` write a line for each request; `warning` and `error` only what somebody should look at."""
    format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line, for machines."""


@dataclass(frozen=True, slots=True)
class TracingRules:
    """Who gets traces: `tracing` in the settings."""

    otlp: Collector | None = None
    """Where traces go: the origin of a collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`. null:
    where `OTEL_EXPORTER_OTLP_ENDPOINT` says, and nowhere if it is not set. Needs `pip install 'vast-proxy[otel]'`."""


@dataclass(frozen=True, slots=True)
class StateRules:
    """What survives a restart: `state` in the settings."""

    file: File | None = None
    """Where what was learned about the limits is kept over a restart; the journal of writes and the day's spends stand
    beside it. null: `vast-proxy/state.json` in `$XDG_STATE_HOME`, or in `~/.local/state`. A relative name is taken from
    the directory where the proxy was started. Two proxies must not share one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, checked. Never changed: a reload makes another one."""

    listen: Address = Listen()
    """Where clients connect: HOST:PORT, `[::1]:8080` for IPv6; port 0 takes any free one. Keys pass through here: open
    it to other machines (0.0.0.0:8080) only where you trust the network."""
    allow_open: bool = False
    """true: listen on other addresses than this machine's own although there is no team. Whoever reaches the port can
    use the proxy with a key of their own, and sees nothing of others; without team mode there is nothing else to keep
    out."""
    tls: TlsRules = field(default_factory=TlsRules)
    hosts: tuple[Domain, ...] = ()
    """Names by which clients call the proxy, if they have a dot in them: `[vast-proxy.example.org]`. Addresses and
    names of one label, such as vast-proxy in Compose, always count. Any other name gets 421: a web page that is made to
    look like this machine (DNS rebinding) calls it by its own."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies in front of this one, as addresses or blocks (`[10.0.0.0/8]`): only theirs is the X-Forwarded-For that
    tells who the client is. From anybody else it is passed by and never believed."""
    admin: AdminRules = field(default_factory=AdminRules)
    upstreams: UpstreamRules = field(default_factory=UpstreamRules)
    server: ServerRules = field(default_factory=ServerRules)
    limits: LimitRules = field(default_factory=LimitRules)
    """How fast to call. Each endpoint has its own interval, see config/routes.yaml; these bound them all."""
    queue: QueueRules = field(default_factory=QueueRules)
    """How long to wait for a turn."""
    retry: RetryRules = field(default_factory=RetryRules)
    """Sending again after a failure: a lost connection, 502, 503, 504. Only what cannot cost money twice."""
    breaker: BreakerRules = field(default_factory=BreakerRules)
    """When calls fail in a row, upstream (or that one endpoint) counts as away: nothing is sent but one probe at a
    time, and whoever has not failed yet. Who is in line goes on waiting, who comes meanwhile is told at once. The first
    answer ends it."""
    writes: WriteRules = field(default_factory=WriteRules)
    cache: CacheRules = field(default_factory=CacheRules)
    """What is remembered. How long each endpoint's answer is fresh stands in config/routes.yaml."""
    drain: DrainRules = field(default_factory=DrainRules)
    log: LogRules = field(default_factory=LogRules)
    tracing: TracingRules = field(default_factory=TracingRules)
    state: StateRules = field(default_factory=StateRules)
    team: TeamRules = field(default_factory=TeamRules)
    """Team mode: the proxy holds the Vast keys, and everybody puts a token where the client has its key. Without an
    entry here everybody brings an own key. docs/team.md tells more."""
    routes: Routes
    """What you know better about endpoints, laid over config/routes.yaml and written as there; that file explains each
    field. An entry for a route that stands there changes the fields that it names, any other is added."""
    source: str = "shipped defaults"
    """Where these settings came from, for logs."""
    team_keys: Mapping[str, Secret] = field(default_factory=dict)
    """What `team.keys` names, as read with the settings."""
    team_digest: str = ""
    """Equal for the same of these; empty without a team."""


class Restart(NamedTuple):
    """What a reload does not put in force."""

    part: Callable[[Settings], object]
    """What must be as it was."""
    when: str = ""
    """Said after "needs a restart", where not every change does."""


NEED_RESTART: Mapping[str, Restart] = {
    "listen": Restart(lambda settings: settings.listen),
    "tls": Restart(lambda settings: settings.tls.cert is None, "to begin or to end with TLS"),
    "state.file": Restart(lambda settings: settings.state.file),
    "tracing": Restart(lambda settings: settings.tracing),
    "server.keepalive": Restart(lambda settings: settings.server.keepalive),
}
"""Settings and sections that are used at the start only; all others follow a reload."""


def kept(settings: Settings) -> dict[str, object]:
    """Of settings with which the proxy starts: what stays as long as it runs, whatever a reload brings."""
    return {name: restart.part(settings) for name, restart in NEED_RESTART.items()}


def need_restart(begun_with: Mapping[str, object], after: Settings) -> list[str]:
    """Of what differs from what was `kept` at the start, the names."""
    return [name for name, part in kept(after).items() if part != begun_with[name]]


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Settings:
    """The settings of a file (or of the one that VAST_PROXY_CONFIG names, or none), `environ` and the command line.

    `overrides` has dotted keys, those of `FLAGS`; None means not given. Raises SettingsError with all mistakes.
    """
    path = path or config_file(environ)
    layers = [_shipped_layer("proxy.yaml")]
    if path is not None:
        layers.append(_read_file(1, path, str(path)))
    layers += [_read_environment(2, environ), _read_overrides(3, overrides)]
    found = Layer()
    for layer in layers:
        found.overlay(layer)

    root: Any = None
    try:
        root = _root_model().model_validate(found.data)
    except ValidationError as error:
        found.faults += [_explained(item, found) for item in error.errors(include_url=False)]
    routes = _read_routes(found)
    team_keys: dict[str, Secret] = {}
    if root is not None and routes is not None:
        team_keys = _read_team(root.team, routes, environ, found)
        _check_tls(root.tls, found)
        if not (is_loopback(root.listen.host) or root.team or root.allow_open):
            found.faults.append(Fault(found.place(("listen",)), f"listen: {OPEN.format(root.listen)}"))
    if found.faults or root is None or routes is None:
        raise SettingsError("\n".join(str(fault) for fault in sorted(found.faults, key=lambda fault: fault.place)))

    sections = {name: getattr(root, name) for name in _sections()}
    settings = Settings(
        **sections,
        routes=routes,
        source=_source(path, layers),
        team_keys=team_keys,
        team_digest=members.digest_of(team_keys),
    )
    if settings.state.file is None:
        settings = dataclasses.replace(settings, state=StateRules(default_state_file(environ)))
    return settings


def listen_address(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Listen:
    """Where a proxy of these settings listens. Whatever else is wrong with them, it may run all the same.

    It was started before. The file is not even read if the variables or the command line say it. Raises SettingsError.
    """
    path = path or config_file(environ)
    above = Layer()
    above.overlay(_read_environment(2, environ))
    above.overlay(_read_overrides(3, overrides))
    found = Layer()
    found.overlay(_shipped_layer("proxy.yaml"))
    if path is not None and "listen" not in above.data:
        file = _read_file(1, path, str(path))
        if file.faults:
            raise SettingsError("\n".join(str(fault) for fault in file.faults))
        found.overlay(file)
    found.overlay(above)
    value = found.data["listen"]
    try:
        return _listen(value)
    except (ValueError, TypeError):
        told = f"listen: expected {UNITS['address'][1]}, got {_shown(value)}"
        raise SettingsError(str(Fault(found.place(("listen",)), told))) from None


def config_file(environ: Mapping[str, str]) -> Path | None:
    """The file that VAST_PROXY_CONFIG names."""
    name = environ.get(CONFIG_VARIABLE, "")
    return Path(name) if name else None


def default_state_file(environ: Mapping[str, str]) -> Path:
    """vast-proxy/state.json in $XDG_STATE_HOME, or in ~/.local/state; a relative one counts as unset, as XDG says."""
    base = Path(environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():
        base = Path(environ.get("HOME") or "~").expanduser() / ".local" / "state"
    return base / "vast-proxy" / "state.json"


def shipped(name: str) -> Path:
    """A file of config/: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    inside = package / "config" / name
    return inside if inside.exists() else package.parent / "config" / name


# --- Where things stand -----------------------------------------------------------------------------------------------

Key = tuple[str | int, ...]
"""The way to a value: `("limits", "global", "rate")`, `("routes", 3, "effect")`."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something was written; in the order in which mistakes are told."""

    layer: int
    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return ":".join([self.name, *(str(number) for number in (self.line, self.column) if number)])


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(slots=True)
class Layer:
    """Plain data, where each of its keys and values was written, and what is wrong with it already."""

    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Key, Place] = field(default_factory=dict)
    values: dict[Key, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def overlay(self, top: Layer) -> None:
        """Lay `top` over this one."""
        self.data = _merged(self.data, top.data)
        self.keys |= top.keys
        self.values |= top.values
        self.faults += top.faults

    def place(self, key: Key, *, of_key: bool = False) -> Place:
        """Where a value, or its key, was written; or the nearest thing around it, for one that is missing."""
        places = self.keys if of_key else self.values
        return next(places[key[:end]] for end in range(len(key), -1, -1) if key[:end] in places)


def _merged(low: Any, high: Any) -> Any:
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {name: _merged(low.get(name), value) for name, value in high.items()}
    return high


def _read_file(layer: int, path: Path, name: str) -> Layer:
    here = Place(layer, 0, 0, name)
    found = Layer()
    try:
        found = _Reader(path.read_text("utf-8-sig"), here, numbered=True).read()
    except OSError as error:
        found.faults.append(Fault(here, f"cannot be read: {error.strerror or error}"))
    except UnicodeDecodeError as error:
        found.faults.append(Fault(here, f"not UTF-8 text: {error.reason} at byte {error.start}"))
    found.keys[()] = found.values[()] = here
    whole: object = found.data
    if not isinstance(whole, dict):
        found.data = {}
        if whole is not None:  # a file of comments only is a fine file
            found.faults.append(Fault(here, f"expected a mapping of settings, got {_shown(whole)}"))
    return found


@cache
def _shipped_layer(name: str) -> Layer:
    """Read once: a reload is about the user's file."""
    return _read_file(0, shipped(name), f"config/{name}")


def _read_environment(layer: int, environ: Mapping[str, str]) -> Layer:
    """Every variable of ours that is not empty: Compose and systemd pass on an unset variable as an empty one."""
    whole = Layer()
    known = {PREFIX + "__".join(str(part) for part in key).upper(): key for key in known_keys()}
    structures = {key[:-1] for key in known.values()} | {("routes",), ("families",)}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in NO_SETTINGS or not text or _is_link(name, text):
            continue
        here = Place(layer, 0, 0, f"${name}")
        if name not in known:
            whole.faults.append(Fault(here, "unknown variable" + _did_you_mean(name, known)))
            continue
        key = known[name]
        found = _Reader(text, here, numbered=False).read(key)
        if found.faults and key not in structures:  # [::1]:8080 is no YAML: in a file it is quoted, who would here?
            found = _plain_layer(key, text, here)
        whole.overlay(found)
    return whole


def _is_link(name: str, text: str) -> bool:
    """Kubernetes and Docker describe a service called vast-proxy to its neighbours in variables of these names."""
    rest = name.removeprefix(PREFIX)
    if re.fullmatch(r"SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?", rest):
        return True
    return rest == "PORT" and "://" in text


def _read_overrides(layer: int, overrides: Mapping[str, object]) -> Layer:
    whole = Layer()
    for dotted, value in overrides.items():
        if value is not None:
            key = tuple(dotted.split("."))
            whole.overlay(_plain_layer(key, value, Place(layer, 0, 0, FLAGS.get(dotted, dotted))))
    return whole


def _plain_layer(key: Key, value: object, here: Place) -> Layer:
    return Layer(_nested(key, value), {key: here}, {key: here})


def _nested(key: Key, value: Any) -> Any:
    for part in reversed(key):
        value = {part: value}
    return value


class _Reader(yaml.SafeLoader):
    """One YAML document as plain data, with the place of every key and value, and without silently lost duplicates."""

    def __init__(self, text: str, here: Place, *, numbered: bool) -> None:
        self.text, self.here, self.numbered = text, here, numbered
        self.found = Layer()
        self.checked: set[yaml.Node] = set()

    def read(self, root: Key = ()) -> Layer:
        """What the document says, put at `root`."""
        try:
            super().__init__(self.text)
            node = self.get_single_node()
            self.found.keys[root] = self.here
            self.found.data = _nested(root, None if node is None else self._plain(node, root, ()))
        except yaml.MarkedYAMLError as error:
            told = ", ".join(part for part in (error.context, error.problem) if part)
            self._fault(self._place(error.problem_mark), root, f"not YAML: {told}")
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1 if self.numbered else 0
            self._fault(dataclasses.replace(self.here, line=line), root, f"not YAML: {error.reason}")
        except RecursionError:
            self._fault(self.here, root, "nested too deeply")
        return self.found

    def _plain(self, node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> Any:
        self.found.values[key] = self._place(node.start_mark, column=False)
        if node in around:
            self._fault(self._place(node.start_mark), key, "contains itself")
        elif isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, (*around, node))
        elif isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*key, index), (*around, node)) for index, item in enumerate(node.value)]
        else:
            try:
                return self.construct_object(node, deep=True)
            except ValueError:  # a date such as 2026-02-30
                self._fault(self._place(node.start_mark), key, "not a valid value of its kind; quote it to mean a text")
        return None

    def _mapping(self, node: yaml.MappingNode, key: Key, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
        # An alias brings the same node again, with what it merges (<<) written into it: duplicates that are none.
        if node not in self.checked:
            self.checked.add(node)
            self._check_duplicates(node, key)
            self.flatten_mapping(node)
        plain = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self._fault(self._place(name.start_mark), key, "a key must be a text")
                continue
            # As written: a family called `on` or a status 429 is a name here, not a bool or a number.
            path = (*key, name.value)
            self.found.keys[path] = self._place(name.start_mark)
            plain[name.value] = self._plain(value, path, around)
        return plain

    def _check_duplicates(self, node: yaml.MappingNode, key: Key) -> None:
        lines: dict[str, int] = {}
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in lines:
                    told = f"given twice, first on line {lines[name.value]}"
                    self._fault(self._place(name.start_mark), (*key, name.value), told)
                lines.setdefault(name.value, name.start_mark.line + 1)

    def _place(self, mark: yaml.Mark | None, *, column: bool = True) -> Place:
        if mark is None or not self.numbered:
            return self.here
        return dataclasses.replace(self.here, line=mark.line + 1, column=mark.column + 1 if column else 0)

    def _fault(self, place: Place, key: Key, text: str) -> None:
        self.found.faults.append(Fault(place, f"{_dotted(key)}: {text}" if key else text))


def _read_routes(found: Layer) -> Routes | None:
    """The table of endpoints, or None and the reasons among the faults."""
    families, entries = found.data.get("families"), found.data.get("routes")
    table: dict[str, Any] = {
        "families": dict(families) if isinstance(families, dict) else {},
        "routes": list(entries) if isinstance(entries, list) else [],
    }
    shipped_layer = _shipped_layer("routes.yaml")
    faults = list(shipped_layer.faults)
    while len(faults) < 100:
        try:
            routes = Routes.build([shipped_layer.data, table])
        except RouteError as error:
            # Only the first mistake is told. Take that one out and ask again, until nothing is wrong.
            layer, wrong = (found, table) if error.table else (shipped_layer, shipped_layer.data)
            key = _route_key(error, wrong)
            faults.append(Fault(layer.place(key), f"{_dotted(key)}: {_masked(error.message)}"))
            if not error.table or not _mend(table, key):
                break
        else:
            found.faults += faults
            return None if faults else routes
    found.faults += faults
    return None


def _check_tls(tls: TlsRules, found: Layer) -> None:
    if tls.cert is None or tls.key is None:
        for name, other, given in (("cert", "key", tls.cert), ("key", "cert", tls.key)):
            if given is not None:
                found.faults.append(Fault(found.place(("tls", name)), f"tls.{name}: needs tls.{other} beside it"))
        return
    try:
        certificates.context(tls.cert, tls.key)
    except ValueError as error:
        found.faults.append(Fault(found.place(("tls",)), f"tls: {error}"))


OPEN = (
    "{} is open to other machines: whoever reaches the port can use the proxy with a Vast key of their own, and sees "
    "nothing of others. `allow_open: true` says that this is meant; with `team` only members can use it"
)


def _read_team(team: TeamRules, routes: Routes, environ: Mapping[str, str], found: Layer) -> dict[str, Secret]:
    """The keys of a team; what is wrong with it goes to the faults."""
    for key, text in members.faults(team, routes):
        found.faults.append(Fault(found.place(key), f"{_dotted(key)}: {text}"))
    keys = {}
    for name, rules in team.keys.items():
        try:
            keys[name] = read_key(rules, environ)
        except ValueError as error:
            place = ("team", "keys", name)
            found.faults.append(Fault(found.place(place), f"{_dotted(place)}: {error}"))
    return keys


def _route_key(error: RouteError, table: Mapping[str, Any]) -> Key:
    if error.index is not None:
        # What is said of a whole entry is said under a name that the entry does not have.
        whole = not isinstance(table["routes"][error.index], dict)
        return ("routes", error.index) if whole else ("routes", error.index, error.field)
    for name in table["families"]:
        if f"{error.field}.".startswith(f"families.{name}."):
            rest = error.field.removeprefix(f"families.{name}").strip(".")
            return ("families", name, rest) if rest else ("families", name)
    return (error.field,)


def _mend(table: dict[str, Any], key: Key) -> bool:
    """Make of what is wrong something that is not, leaving all else where it is. Is that possible?"""
    match key:
        case ("routes", int(index), str(name)) if name in table["routes"][index] and name not in ("route", "effect"):
            table["routes"][index] = {other: value for other, value in table["routes"][index].items() if other != name}
        case ("routes", int(index), *_):
            table["routes"][index] = {"route": f"GET /mended/{index}/", "effect": "read"}
        case ("families", str(name), _):
            table["families"][name] = {"ttl": 0}  # kept, so that the routes which use it are not told too
        case ("families", str(name)):
            del table["families"][name]
        case _:
            return False
    return True


# --- What may be written: pydantic models made from the dataclasses ---------------------------------------------------


_NOT_SECTIONS = ("routes", "source", "team_keys", "team_digest")


def _sections() -> dict[str, Any]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in _NOT_SECTIONS}


def known_keys() -> Iterator[Key]:
    """Every key that may be set, sections before what is in them."""

    def below(hint: Any, key: Key) -> Iterator[Key]:
        if get_origin(hint) in (Union, UnionType):
            for part in get_args(hint):
                yield from below(part, key)
        elif dataclasses.is_dataclass(hint):
            for name, part in get_type_hints(hint, include_extras=True).items():
                yield (*key, name.rstrip("_"))
                yield from below(part, (*key, name.rstrip("_")))

    for name, hint in _sections().items():
        yield (name,)
        yield from below(hint, (name,))
    yield from (("routes",), ("families",))


@cache
def _root_model() -> type[BaseModel]:
    table: dict[str, Any] = {
        "routes": (Annotated[list[Any], BeforeValidator(lambda found: [] if found is None else found)], Field([])),
        "families": (Annotated[dict[str, Any], BeforeValidator(_empty_section)], Field({})),
    }
    return _model(Settings, _sections(), table)


def _model(kind: Any, hints: dict[str, Any], extra: dict[str, Any]) -> type[BaseModel]:
    fields = dict(extra)
    for item in dataclasses.fields(kind):
        if item.name in hints:
            missing = item.default_factory is dataclasses.MISSING
            default: Any = {"default": item.default} if missing else {"default_factory": item.default_factory}
            fields[item.name] = (_translated(hints[item.name]), Field(alias=item.name.rstrip("_"), **default))
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _translated(hint: Any) -> Any:
    """A dataclass field's annotation as one that pydantic checks, ending in the very value that the field holds."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _checked(*UNITS[parts[1]], secret=parts[1] in SECRET)
    if hint in PLAIN:
        return _checked(_of_type(hint), PLAIN[hint])
    inner = tuple(_translated(part) for part in parts) if origin is not Literal else ()
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007 (made, not written)
    if origin is tuple:
        return tuple[inner]  # type: ignore[valid-type]
    if origin is Mapping:
        return Annotated[dict[inner], BeforeValidator(_empty_section)]  # type: ignore[valid-type,misc]
    if origin is Literal:
        return _checked(_one_of(parts), f"one of {', '.join(parts)}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        names = [item.name for item in dataclasses.fields(hint)]
        model = _model(hint, get_type_hints(hint, include_extras=True), {})
        build = AfterValidator(lambda found: hint(**{name: getattr(found, name) for name in names}))
        return Annotated[model, BeforeValidator(_empty_section), build]
    return hint  # None, or the ellipsis in tuple[str, ...]


def _empty_section(found: object) -> object:
    """`limits:` with every line below it commented out says nothing, and is not wrong."""
    return {} if found is None else found


def _checked(parse: Callable[[Any], object], what: str, *, secret: bool = False) -> Any:
    def check(found: object) -> object:
        try:
            return parse(found)
        except (ValueError, TypeError, OverflowError):
            kind: Any = "expected, unseen" if secret else "expected"
            raise PydanticCustomError(kind, "expected {what}", {"what": what}) from None

    return Annotated[Any, PlainValidator(check)]


def _of_type(kind: type) -> Callable[[object], object]:
    def parse(found: object) -> object:
        if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
            raise ValueError
        return found

    return parse


def _one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def parse(found: object) -> str:
        if isinstance(found, bool) or str(found) not in choices:  # 100 may be written without quotes
            raise ValueError
        return str(found)

    return parse


def _number(least: float, most: float, *, open_below: bool = False) -> Callable[[object], float]:
    def parse(found: object) -> float:
        if isinstance(found, bool) or not isinstance(found, int | float | str):
            raise TypeError
        number = float(found)  # also of a text: to YAML 1.1, 1e3 is one
        if not (math.isfinite(number) and least <= number <= most) or (open_below and number == least):
            raise ValueError
        return number

    return parse


def _count(found: object) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError
    return found


def _text(parse: Callable[[str], object]) -> Callable[[object], object]:
    def checked(found: object) -> object:
        if not isinstance(found, str):
            raise TypeError
        return parse(found)

    return checked


def _listen(found: str) -> Listen:
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\s:/@\[\]]+)):([0-9]{1,5})", found)
    if not match or int(match[3]) > 65535:
        raise ValueError
    return Listen(str(IPv6Address(match[1])) if match[1] else match[2], int(match[3]))


def _origin(found: str) -> str:
    match = re.fullmatch(r"(https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?)/?", found.lower())
    if not match or not 0 < int(match[2] or 80) <= 65535:
        raise ValueError
    return match[1]


def _domain(found: str) -> str:
    if not re.fullmatch(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)*", found.lower()):
        raise ValueError
    return found.lower()


def _file(found: str) -> Path:
    if not found or "\0" in found:
        raise ValueError
    return Path(found).expanduser()


def _file_name(found: str) -> str:
    _file(found)
    return found


def _network(found: str) -> object:
    return ip_network(found, strict=False)


def _token_hash(found: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
        raise ValueError
    return found


def _route_name(found: str) -> str:
    if not re.fullmatch(r"[A-Z]+ /[!-~]*", found):
        raise ValueError
    return found


SECRET = frozenset({"token hash"})
"""Markers of what is not shown when it is wrong: somebody may have written the very thing there."""

UNITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "seconds": (parse_duration, 'a duration (examples: 60, "500ms", "15m")'),
    "bytes": (parse_size, 'a size in bytes (examples: 1048576, "512KiB", "64MiB")'),
    "positive": (_number(0, math.inf, open_below=True), "a number > 0"),
    "fraction": (_number(0, 1), "a number from 0 to 1"),
    "count": (_count, "a whole number >= 1"),
    "address": (_text(_listen), "HOST:PORT (examples: 127.0.0.1:8080, [::1]:8080)"),
    "origin": (_text(_origin), "an http or https URL without path, query or user (example: https://cloud.vast.ai)"),
    "domain": (_text(_domain), "a domain (example: vast.ai)"),
    "collector": (
        _text(_origin),
        "an http or https URL without path, query or user, or null (example: http://127.0.0.1:4318)",
    ),
    "file": (_text(_file), "the name of a file, or null"),
    "file name": (_text(_file_name), "the name of a file"),
    "network": (_text(_network), "an address or a block of them (examples: 10.0.0.7, 10.0.0.0/8, fd00::/8)"),
    "token hash": (_text(_token_hash), "sha256: and 64 hexadecimal digits, as `vast-proxy token new` prints it"),
    "route": (_text(_route_name), 'a method and a path (example: "DELETE /api/v0/instances/{id}/")'),
}
"""How a marker of policy/units.py, or of this file, is read, and how the right thing is described."""

PLAIN: dict[Any, str] = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}


# --- What is said about mistakes --------------------------------------------------------------------------------------


def _explained(item: Any, found: Layer) -> Fault:
    key: Key = item["loc"]
    kind: str = item["type"]
    if kind == "extra_forbidden":
        return Fault(found.place(key, of_key=True), f"{_dotted(key)}: unknown key{_nearest_key(key)}")
    value = item["input"]
    if kind == "expected, unseen":
        return Fault(found.place(key), f"{_dotted(key)}: {item['msg']}")
    if kind == "value_error":  # what goes against the dataclass's own rules: "field: expected …"
        name, _, told = str(item["ctx"]["error"]).partition(": ")
        if not told:
            return Fault(found.place(key), f"{_dotted(key)}: {name}")
        key, value = (*key, name), value.get(name) if isinstance(value, dict) else value
    elif kind == "expected":
        told = item["msg"]
    else:
        told = f"expected {_SHAPES.get(kind, item['msg'])}"
    return Fault(found.place(key), f"{_dotted(key)}: {told}, got {_shown(value)}")


_SHAPES = {"model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list", "tuple_type": "a list"}


def _dotted(key: Key) -> str:
    """The way to a value. What is named by who writes the settings may be what ought to have been the value."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_masked(part)}" for part in key).removeprefix(".")


def _shown(value: object) -> str:
    """What was found, without what may be secret in it: a URL's user and query, anything as long as a key."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None:
            return "null"
        case bool():
            return str(value).lower()
    head, at, text = str(value).rpartition("@")
    if at:
        scheme, slashes, _ = head.rpartition("//")
        text = f"{scheme}{slashes}***@{text}"
    text = _masked(re.sub(r"[?#].*", "?***", text, flags=re.DOTALL))
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _masked(text: str) -> str:
    return re.sub(r"[\w-]{32,}|(?<==)[^&\s'\"]+", "***", text)


def _nearest_key(key: Key) -> str:
    """The same name in another section; or a sibling of that name, more or less."""
    name = str(key[-1])
    elsewhere = [_dotted(other) for other in known_keys() if other[-1] == name]
    siblings = [str(other[-1]) for other in known_keys() if other[:-1] == key[:-1]]
    return _did_you_mean(name, siblings) if len(elsewhere) != 1 else f", did you mean {elsewhere[0]!r}?"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean {near[0]!r}?" if near else ""


def _source(path: Path | None, layers: list[Layer]) -> str:
    """The layers that said something, lowest first."""
    said = [str(path) if path else "shipped defaults"]
    said += [name for name, layer in zip(("environment", "command line"), layers[-2:], strict=True) if layer.data]
    return " + ".join(said)
