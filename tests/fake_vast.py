"""A fake of the Vast.ai API: it enforces the limits it documents, remembers what was done, breaks on request.

    async with FakeVast(Behaviour(form="json_retry_after")) as fake:
        ...                                   # talk to fake.url
        assert not fake.refused               # nobody met a 429
        assert fake.count("rented") == 1      # and nothing was rented twice

By hand: `python tests/fake_vast.py --port 9000`.
"""

import argparse
import asyncio
import base64
import functools
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, TypeVar, get_args
from urllib.parse import parse_qsl, unquote

from aiohttp import web
from multidict import CIMultiDict

T = TypeVar("T")
Form = Literal["text", "bare", "text_threshold", "detail", "success_false", "json_retry_after"]
Kind = Literal[
    "drop_before",  # close the connection without an answer; nothing is done
    "drop_after",  # do it, then close the connection without an answer
    "truncate",  # do it, promise the whole body, send half of it, close
    "slow",  # do it, wait, answer
    "slow_before",  # wait, do it, answer
    "status",  # answer with a status of your choice; nothing is done
    "status_after",  # do it, and answer with that status all the same
    "big",  # answer `size` bytes of JSON; nothing is done
    "refuse429",  # a 429 that no arithmetic explains; nothing is done, no token is taken
]

MAX_BODY = 64 * 1024 * 1024
EPSILON = 1e-9  # seconds of grace: the rounding of a float, nothing else
PAGE = 25  # rows on a page of GET /api/v1/instances/
BULK = 64  # ids in one bulk call, offers in one search
ANYBODY = "ip"


# What can be asked of it


@dataclass(frozen=True, slots=True)
class Limit:
    """A token each `interval` seconds, `capacity` of them at most; a refusal takes `penalty` more. 0 = no limit."""

    interval: float
    capacity: float = 1.0
    penalty: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """How the server answers. Replace `fake.behaviour` to change it between two calls."""

    form: Form = "text"
    forms: Mapping[str, Form] = field(default_factory=dict)  # by template, before `form`
    limits: Mapping[str, Limit] = field(default_factory=dict)  # by template; "*" = every other route
    scale: float = 1.0  # multiplies every interval, the account's too
    account: Limit | None = None  # shared by all the routes of one identity
    scope: Literal["key", "ip"] = "key"  # "ip": everybody shares the buckets
    shared_clock: bool = False  # the methods of one path share a bucket
    search_quota: int | None = None  # searches a UTC day and identity
    ratelimit_headers: bool = False  # X-RateLimit-* on every answer
    ratelimit_layer: Literal["route", "account"] = "route"  # whose numbers they are
    tfa_error: str | None = None  # e.g. "tfa_locked": what POST, PUT and DELETE /tfa/* answer, as a 429
    invalid_keys: frozenset[str] = frozenset()  # answered 401 "Invalid user key"
    legacy_instances: bool = True  # False: GET /api/v0/instances/ answers 410
    redirects: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # path -> (status, location)
    set_cookie: Sequence[str] = ()  # one Set-Cookie each, on every answer
    extra_headers: Sequence[tuple[str, str]] = ()  # on every answer; repeat a name to repeat the header
    boot_time: float = 0.0  # seconds an instance spends in "created" and "loading"
    handshake_delay: float = 0.0  # seconds between accept() and the first byte read
    keepalive_timeout: float = 75.0  # an idle connection is closed after that
    seed: int = 1


@dataclass(slots=True, kw_only=True)
class Fault:
    """Something that goes wrong for the calls that `match` ("*" and "?" are wildcards), `times` times."""

    match: str = "*"
    kind: Kind
    times: int | None = 1  # None: for ever
    probability: float = 1.0
    delay: float = 0.0  # seconds before it answers, or hangs up
    status: int = 502
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()  # for status, status_after, refuse429
    size: int = 0
    form: Form | None = None
    retry_after: float | None = None
    reset: bool = False  # the drops end in RST instead of FIN
    key: str | None = None  # only for calls of its owner
    used: int = 0

    def applies(self, template: str, identity: str, chance: random.Random) -> bool:
        if self.key is not None and identity != identity_of(self.key):
            return False
        if self.times is not None and self.used >= self.times:
            return False
        if not fnmatchcase(_canonical(template), _canonical(self.match)):
            return False
        return self.probability >= 1 or chance.random() < self.probability


@dataclass(slots=True)
class Call:
    """One request that reached the server. `status` 0: nothing was answered, or not yet."""

    at: float  # loop.time() when the headers were there
    method: str
    target: str  # as it was on the wire
    template: str
    identity: str  # a digest, never the key
    headers: list[tuple[str, str]]
    connection: int
    body: bytes = b""
    status: int = 0
    refused: bool = False  # with a 429
    acted: bool = False  # what it asked for was done


@dataclass(frozen=True, slots=True)
class Effect:
    """One change that a call made: money spent, an instance rented, ..."""

    kind: str  # "rented", "destroyed", "transferred", ...; the template, when it has no name
    identity: str
    target: object
    amount: float
    call: Call


def identity_of(key: str) -> str:
    """The name by which the log and the effects know the owner of a key."""
    return "key-" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:10]


def _canonical(template: str) -> str:
    return template.rstrip("/")


# Limits


@dataclass(slots=True)
class _Bucket:
    """Tokens at an instant. Below zero they are a debt."""

    tokens: float
    at: float

    def refill(self, limit: Limit, now: float) -> None:
        self.tokens = min(limit.capacity, self.tokens + max(0.0, now - self.at) / limit.interval)
        self.at = max(self.at, now)

    def wait(self, limit: Limit) -> float:
        return max(0.0, (1.0 - self.tokens) * limit.interval)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The state of one limit after a call was weighed against it."""

    name: str
    limit: Limit
    remaining: int
    wait: float  # until it admits the next call


@dataclass(frozen=True, slots=True)
class _Verdict:
    refused_by: _Layer | None
    layers: Mapping[str, _Layer]


class _Limiter:
    """Owns the buckets, by (layer, identity, route)."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, ...], _Bucket] = {}

    def weigh(self, limits: Mapping[tuple[str, ...], Limit], now: float) -> _Verdict:
        """Take a token from every bucket or from none; a refusal costs the first empty one its penalty."""
        held: dict[tuple[str, ...], _Bucket] = {}
        for key, limit in limits.items():
            held[key] = self._buckets.setdefault(key, _Bucket(limit.capacity, now))
            held[key].refill(limit, now)
        empty = next((key for key, limit in limits.items() if held[key].wait(limit) > EPSILON), None)
        for key, bucket in held.items():
            if empty is None:
                bucket.tokens -= 1.0
            elif key == empty:
                bucket.tokens -= limits[key].penalty
        layers = {
            key[0]: _Layer(key[0], limit, max(0, math.floor(held[key].tokens + EPSILON)), held[key].wait(limit))
            for key, limit in limits.items()
        }
        return _Verdict(layers[empty[0]] if empty else None, layers)


# Routes: method, path, seconds between two calls, and the reply's shape where no function below makes it:
# "rows=" an empty list under that key, "[]" an empty list, "{}" an empty object, nothing = {"success": true}.
# A "*" marks reads that are not GETs. Paths without /api are below /api/v0, those with // at the root.

_TABLE = """
GET    /users/current                            1
GET    /api/v1/instances/                        1
GET    /instances/                               20
GET    /instances/filters/                       1
GET    /instances/balance/{id}/                  3
GET    /instances/pending-price-increases/       2    pending_price_increases=
GET    /instances/{id}/                          2
GET    /instances/{id}/ssh/                      2
GET    /instance_backups/                        1    backups=
GET    /instance_backups/{id}/download/          1    files=
GET    /volumes                                  5.5
GET    /machines                                 2.5
GET    /machines/{id}                            1.1
GET    /machines/maintenances                    2    []
GET    /machines/{id}/reports/                   1.2  []
GET    /network_disk/                            1    data=
GET    /template/                                3
GET    /benchmarks                               3
GET    /bundles/                                 0.8
GET    /gpu_names/unique/                        1
GET    /gpu_types/                               1
GET    /deployments                              3    deployments=
GET    /deployment/{id}/                         3
GET    /deployment/{id}/versions/                2    versions=
GET    /deployment/{id}/download_url/            2
GET    /endptjobs/                               3
GET    /endptjobs/{id}/                          2
GET    /autojobs/                                2
GET    /workergroups/                            2
GET    /metrics/gpu/current/                     3
GET    /metrics/gpu/history/                     3
GET    /metrics/gpu/locations/                   3
GET    /invoices                                 3
GET    /api/v1/invoices/                         3
GET    /charges/                                 1
GET    /users/me/invoices                        2
GET    /users/me/machine-earnings                2
GET    /users/me/ipaddrs                         2.9
GET    /users/cloud_integrations/                2.9
GET    /subaccounts                              2.1
GET    /audit_logs/                              2
GET    /commands/schedule_job/                   3.5
GET    /ssh/                                     1
GET    /team/members/                            2
GET    /team/roles-full/                         2
GET    /team/roles/{name}/                       2
GET    /clusters/                                1    {}
GET    /overlay/                                 1    []
GET    /auth/apikeys/                            1
GET    /auth/apikeys/{id}/                       1
GET    /secrets/                                 5
GET    /tfa/status/                              1
GET    /webhooks                                 1    webhooks=
GET    /notification-types                       1    notification_types=
POST   /bundles/                                 2    *
PUT    /search/asks/                             1    *
POST   /volumes/search/                          5.5  *
POST   /network_volumes/search/                  1    * offers=
POST   /contracts/fetch/                         1    *
POST   /machines/maintenances                    1    * []
PUT    /asks/{id}/                               4.5
POST   /asks/bulk/                               4.5
PUT    /launch_instance/                         5
PUT    /bundles/{id}/                            2.4
PUT    /volumes/                                 5.5
PUT    /network_volumes/                         1
POST   /volumes/copy/                            1
PUT    /instances/prepay/{id}/                   2
PUT    /commands/transfer_credit/                2.5
POST   /team/                                    2
POST   /endptjobs/                               4
POST   /autojobs/                                4
POST   /workergroups/                            4
PUT    /deployments/                             2
POST   /template/                                1.9
PUT    /api/v1/template/                         1.9
PUT    /template/                                1.9
POST   /auth/apikeys/                            2
POST   /ssh/                                     1
POST   /users/                                   3
POST   /team/invite/                             2
POST   /team/roles/                              2
POST   /commands/schedule_job/                   3.5
POST   /commands/rclone/                         3.5
PUT    /commands/copy_direct/                    3.5
PUT    /commands/rsync/                          3.5
POST   /instances/take_snapshot/{id}/            1
PUT    /instances/command/{id}/                  1.5
PUT    /instances/reboot/{id}/                   1
PUT    /instances/recycle/{id}/                  1
PUT    /instances/update_template/{id}/          2
PUT    /machines/create_asks/                    5
PUT    /machines/create_bids/                    2.8
POST   /volumes/                                 5
POST   /network_volumes/                         1
POST   /network_disk/                            1
PUT    /machines/{id}/dnotify/                   2.5
PUT    /commands/reset_apikey/                   1
PUT    /instances/{id}/                          1
PUT    /instances/                               4
DELETE /instances/{id}/                          3
DELETE /instances/                               3
PUT    /instances/bid_price/{id}/                5.5
PUT    /instances/accept-price-increase/         2
PUT    /instances/reject-price-increase/         2
PUT    /instances/request_logs/{id}/             1
POST   /instances/{id}/ssh/                      2
DELETE /instances/{id}/ssh/{name}/               2
DELETE /volumes/                                 5.5
PUT    /endptjobs/{id}/                          2
DELETE /endptjobs/{id}/                          3
PUT    /autojobs/{id}/                           2
DELETE /autojobs/{id}/                           3
DELETE /workergroups/{id}/                       3
DELETE /deployment/{id}/                         2
DELETE /deployments/                             2
POST   /deployment/{id}/start/                   2
POST   /deployment/{id}/stop/                    2
POST   /deployment/{id}/heartbeat/               2
DELETE /template/                                2
PUT    /ssh/{id}/                                1
DELETE /ssh/{id}/                                1
PUT    /team/roles/{id}/                         2
DELETE /team/roles/{name}/                       3
DELETE /team/members/{id}/                       3
DELETE /team/                                    2
PUT    /users/                                   5
PUT    /commands/schedule_job/{id}/              3.5
DELETE /commands/schedule_job/{id}/              3.5
DELETE /commands/copy_direct/                    3.5
DELETE /commands/rclone/                         3.5
DELETE /machines/{id}/asks/                      1.8
POST   /machines/{id}/force_delete/              1
PUT    /machines/{id}/cleanup/                   8
PUT    /machines/{id}/cancel_maint/              2.5
PUT    /machines/{id}/minbid/                    1.5
DELETE /machines/{id}/defjob/                    1.2
PUT    /machines/defrag_offers/                  2.8
POST   /volumes/unlist                           5
POST   /network_volumes/unlist/                  1
DELETE /auth/apikeys/{id}/                       2
POST   /secrets/                                 3
PUT    /secrets/                                 3
DELETE /secrets/                                 3
POST   /tfa/                                     1.1
DELETE /tfa/                                     1.1
POST   /tfa/confirm-new/                         2
POST   /tfa/authorize-new-method/                2
PUT    /tfa/authorize-new-method/                2
POST   /tfa/sms/                                 2
POST   /tfa/sms/resend/                          2
POST   /tfa/email/                               2
POST   /tfa/totp-setup/                          1.1
PUT    /tfa/regen-backup-codes/                  1.1
PUT    /tfa/update/                              1.1
POST   /webhooks                                 1
POST   //get_endpoint_logs/                      0    *
POST   //get_autogroup_logs/                     0    *
POST   //get_workergroup_logs/                   0    *
POST   //get_endpoint_workers/                   0    *
POST   //get_workergroup_workers/                0    *
POST   //update_workers/                         0
POST   //route/                                  0
GET    //results/{name}                          0
"""

_LIMITS = {  # the routes of which more than an interval is known
    "POST /api/v0/bundles": Limit(2.0, capacity=5.0, penalty=4.0),
    "PUT /api/v0/asks/{id}": Limit(4.5, penalty=12.0 / 4.5),  # `penalty: 12`, taken for seconds
}

_PUBLIC = re.compile(r"/bundles|/search/asks|volumes/search|/gpu_(names|types)|//results")
_SEARCHES = {"POST /api/v0/bundles/", "GET /api/v0/bundles/", "PUT /api/v0/search/asks/"}


def _full(path: str) -> str:
    if path.startswith("//"):
        return path[1:]
    return path if path.startswith("/api/") else "/api/v0" + path


@dataclass(frozen=True, slots=True)
class _Route:
    template: str  # "PUT /api/v0/asks/{id}/", the slash as the CLI sends it
    pattern: re.Pattern[str]
    interval: float
    read: bool
    public: bool
    shape: str

    @classmethod
    def parse(cls, line: str) -> Self:
        method, path, interval, *notes = line.split()
        full = _full(path)
        pattern = re.escape(full.rstrip("/")).replace(r"\{id\}", r"(?P<id>\d+)").replace(r"\{name\}", "(?P<name>[^/]+)")
        return cls(
            template=f"{method} {full}",
            pattern=re.compile(f"{method} {pattern}/?"),
            interval=float(interval),
            read=method == "GET" or "*" in notes,
            public=bool(_PUBLIC.search(path)) and (method == "GET" or "*" in notes),
            shape=next((note for note in notes if note != "*"), ""),
        )

    @property
    def limit(self) -> Limit:
        return _LIMITS.get(_canonical(self.template), Limit(self.interval))


_ROUTES = tuple(_Route.parse(line) for line in _TABLE.strip().splitlines())


def _find(method: str, path: str) -> tuple[_Route, dict[str, str]]:
    for route in _ROUTES:
        if match := route.pattern.fullmatch(f"{method} {path}"):
            return route, match.groupdict()
    return _Route(f"{method} *", re.compile(""), 1.0, True, True, "404"), {}


# Data


_GPUS = (  # name, GB, TFLOPS, DLPerf, $/h
    ("RTX 3090", 24, 35.3, 41.2, 0.19),
    ("RTX 4090", 24, 81.2, 98.4, 0.36),
    ("RTX 5090", 32, 104.6, 171.3, 0.52),
    ("RTX A6000", 48, 38.1, 48.9, 0.45),
    ("L40S", 48, 90.5, 104.2, 0.63),
    ("A100 SXM4", 80, 19.5, 121.7, 0.98),
    ("H100 SXM", 80, 53.4, 268.9, 2.11),
    ("H200", 141, 53.4, 331.5, 2.93),
)
_PLACES = ("Sweden, SE", "Texas, US", "California, US", "Quebec, CA", "Germany, DE", "Japan, JP", "Poland, PL")
_EPOCH = 1_760_000_000.0


def _offer(number: int, chance: random.Random) -> dict[str, Any]:
    name, gigabytes, tflops, dlperf, price = chance.choice(_GPUS)
    gpus = chance.choice((1, 1, 1, 2, 4, 8))
    cores = chance.choice((32, 64, 128, 256))
    dph = round(price * gpus * chance.uniform(0.8, 1.4), 6)
    storage = round(chance.uniform(0.08, 0.3), 4)
    total = dph + storage * 8 / 730
    machine = 20_000 + number * 3
    reliability = round(chance.uniform(0.97, 0.9999), 7)
    ident = 24_000_000 + number * 17
    costs = {"gpuCostPerHour": dph, "diskHour": storage * 8 / 730, "totalHour": total, "discountTotalHour": 0.0}
    return {
        "id": ident,
        "ask_contract_id": ident,
        "bundle_id": 800_000_000 + number * 11,
        "bundled_results": None,
        "machine_id": machine,
        "host_id": 60_000 + number % 97,
        "hostname": None,
        "cluster_id": None,
        "resource_type": "gpu",
        "num_gpus": gpus,
        "gpu_name": name,
        "gpu_arch": "nvidia",
        "gpu_ram": gigabytes * 1024,
        "gpu_total_ram": gigabytes * 1024 * gpus,
        "gpu_frac": 1.0 if gpus > 2 else 0.5,
        "gpu_ids": [machine * 8 + index for index in range(gpus)],
        "gpu_lanes": 16,
        "gpu_mem_bw": round(chance.uniform(700, 3300), 1),
        "gpu_max_power": 450.0,
        "gpu_max_temp": 90.0,
        "gpu_display_active": False,
        "compute_cap": chance.choice((860, 890, 900, 1200)),
        "cuda_max_good": chance.choice((12.4, 12.6, 12.8, 13.0)),
        "driver_version": "570.153.02",
        "driver_vers": 570153002,
        "total_flops": round(tflops * gpus, 2),
        "bw_nvlink": 0.0,
        "pci_gen": 4.0,
        "pcie_bw": round(chance.uniform(11, 26), 1),
        "cpu_name": "AMD EPYC 7763 64-Core Processor",
        "cpu_arch": "amd64",
        "cpu_cores": cores,
        "cpu_cores_effective": cores / 8 * gpus,
        "cpu_ghz": 3.5,
        "cpu_ram": 64_000 * gpus,
        "has_avx": 1,
        "mobo_name": "ROMED8-2T",
        "os_version": "22.04",
        "ubuntu_version": "22.04",
        "disk_space": round(chance.uniform(120, 4000), 2),
        "disk_bw": round(chance.uniform(900, 6900), 1),
        "disk_name": "Samsung SSD 990 PRO",
        "inet_up": round(chance.uniform(200, 8000), 1),
        "inet_down": round(chance.uniform(300, 9000), 1),
        "inet_up_cost": 0.002,
        "inet_down_cost": 0.002,
        "internet_up_cost_per_tb": 2.0,
        "internet_down_cost_per_tb": 2.0,
        "direct_port_count": 249,
        "static_ip": True,
        "public_ipaddr": f"203.0.113.{number % 250 + 1}",
        "geolocation": chance.choice(_PLACES),
        "geolocode": 1_400_000_000 + number,
        "dph_base": dph,
        "dph_total": total,
        "dph_total_adj": total,
        "discounted_dph_total": total,
        "discount_rate": 0.0,
        "discounted_hourly": 0.0,
        "credit_discount_max": 0.4,
        "min_bid": round(dph * 0.4, 4),
        "storage_cost": storage,
        "storage_total_cost": storage * 8 / 730,
        "vram_costperhour": dph / (gigabytes * gpus * 1024),
        "platform_fee": 0.25,
        "dlperf": round(dlperf * gpus, 3),
        "dlperf_per_dphtotal": dlperf * gpus / total,
        "flops_per_dphtotal": tflops * gpus / total,
        "score": round(chance.uniform(60, 400), 6),
        "reliability": reliability,
        "reliability2": reliability,
        "reliability_mult": 1.01,
        "expected_reliability": 0.0,
        "verification": "unverified" if number % 8 == 7 else "verified",
        "vericode": 0 if number % 8 == 7 else 1,
        "hosting_type": number % 2,
        "external": False,
        "rentable": True,
        "rented": False,
        "is_bid": False,
        "is_vm_deverified": False,
        "vms_enabled": False,
        "logo": "/static/logos/vastai_small2.png",
        "webpage": None,
        "start_date": _EPOCH + number,
        "end_date": _EPOCH + 31_536_000.0,
        "duration": 31_536_000.0 - number,
        "time_remaining": "",
        "time_remaining_isbid": "",
        "avail_vol_ask_id": ident + 1,
        "avail_vol_dph": 0.000273,
        "avail_vol_size": 500.0,
        "nw_disk_min_bw": None,
        "nw_disk_max_bw": None,
        "nw_disk_avg_bw": None,
        "search": costs,
        "instance": costs,
    }


@functools.lru_cache(maxsize=8)
def _market(seed: int) -> tuple[dict[str, Any], ...]:
    chance = random.Random(seed)
    return tuple(_offer(number, chance) for number in range(600))


_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": lambda have, want: have == want,
    "neq": lambda have, want: have != want,
    "lt": lambda have, want: have is not None and have < want,
    "lte": lambda have, want: have is not None and have <= want,
    "gt": lambda have, want: have is not None and have > want,
    "gte": lambda have, want: have is not None and have >= want,
    "in": lambda have, want: have in want,
    "notin": lambda have, want: have not in want,
}


def _matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    """Whether a row passes {"gpu_name": {"eq": "RTX 4090"}, ...}; columns it does not have filter nothing."""
    for column, conditions in filters.items():
        have = row.get("verification") == "verified" if column == "verified" else row.get(column)
        if not isinstance(conditions, dict) or (column != "verified" and column not in row):
            continue
        for name, want in conditions.items():
            wanted = want
            if isinstance(have, int | float) and isinstance(want, str):
                with suppress(ValueError):
                    wanted = float(want)  # the CLI sends {"num_gpus": {"eq": "1"}}
            try:
                if name in _TESTS and not _TESTS[name](have, wanted):
                    return False
            except TypeError:
                return False
    return True


def _sort(rows: list[dict[str, Any]], order: Iterable[tuple[str, bool]]) -> list[dict[str, Any]]:
    for column, descending in reversed(list(order)):
        rows.sort(key=lambda row: _rank(row.get(column)), reverse=descending)
    return rows


def _rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (1, float(value), "")
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


# The accounts, and what each route does to them


class _Failed(Exception):
    """An answer other than 200, decided by the API itself."""

    def __init__(self, status: int, error: str, msg: str, **more: Any) -> None:
        super().__init__(msg)
        self.status = status
        self.payload = {"success": False, "error": error, "msg": msg, **more}


@dataclass(slots=True)
class _Account:
    """What one identity owns. The row of a collection is found by the collection's name and the row's id."""

    number: int
    balance: float = 100.0
    instances: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    invited: dict[str, float] = field(default_factory=dict)  # address -> when
    attached: dict[int, list[str]] = field(default_factory=dict)  # instance -> ssh keys
    searches: Counter[int] = field(default_factory=Counter)  # by UTC day


@dataclass(slots=True)
class _Asked:
    """A call, understood."""

    call: Call
    route: _Route
    account: _Account
    key: str
    names: Mapping[str, str]  # what the braces of the template stood for
    query: Mapping[str, str]
    body: dict[str, Any]
    now: float
    wall: float
    behaviour: Behaviour
    base_url: str

    @property
    def id(self) -> int:
        return int(self.names["id"])

    def parameter(self, name: str, default: Any) -> Any:
        """A query parameter that holds JSON."""
        try:
            return json.loads(self.query[name])
        except KeyError:
            return default
        except ValueError:
            raise _Failed(400, "invalid_args", f"{name} is not JSON") from None


_Handler = Callable[["_World", _Asked], Any]
_HANDLERS: dict[str, _Handler] = {}


def _does(*templates: str) -> Callable[[_Handler], _Handler]:
    known = {_canonical(route.template) for route in _ROUTES}

    def remember(handler: _Handler) -> _Handler:
        for template in templates:
            method, path = template.split()
            name = _canonical(f"{method} {_full(path)}")
            assert name in known, name
            _HANDLERS[name] = handler
        return handler

    return remember


class _World:
    """Owns everybody's accounts and the market; knows no HTTP, no limits and no clock."""

    def __init__(self, seed: int) -> None:
        self.offers = _market(seed)
        self.by_id = {offer["id"]: offer for offer in self.offers}
        self.taken: set[int] = set()
        self.accounts: dict[str, _Account] = {}
        self.effects: list[Effect] = []
        self._ids = itertools.count(31_000_001)
        self._volume_ids = itertools.count(51_000_001)

    def account(self, identity: str) -> _Account:
        return self.accounts.setdefault(identity, _Account(number=100_001 + len(self.accounts)))

    def answer(self, asked: _Asked) -> Any:
        """Do what was asked, and return the payload of the reply. Raises _Failed."""
        before = len(self.effects)
        handler = _HANDLERS.get(_canonical(asked.route.template), _World.default)
        payload = handler(self, asked)
        if not asked.route.read and len(self.effects) == before and payload.get("success", True):
            self.effect(asked, asked.route.template, asked.names.get("id") or asked.names.get("name"))
        return payload

    def effect(self, asked: _Asked, kind: str, target: object, amount: float = 0.0) -> None:
        self.effects.append(Effect(kind, asked.call.identity, target, amount, asked.call))

    def default(self, asked: _Asked) -> Any:
        match asked.route.shape:
            case "404":
                raise _Failed(404, "not_found", "No such endpoint")
            case "[]":
                return []
            case "{}":
                return {}
            case "":
                return {"success": True, "msg": "done"}
            case shape:
                return {"success": True, shape.rstrip("="): []}

    # offers

    def search(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        free = [dict(o) for o in self.offers if o["id"] not in self.taken and _matches(o, query)]
        order = [(name, way == "desc") for name, way in query.get("order") or [["score", "desc"]]]
        return _sort(free, order)[: int(query.get("limit") or BULK)]

    @_does("POST /bundles/")
    def post_bundles(self, asked: _Asked) -> Any:
        return {"offers": self.search(asked.body)}

    @_does("GET /bundles/")
    def get_bundles(self, asked: _Asked) -> Any:
        return {"offers": self.search(asked.parameter("q", {}))}

    @_does("PUT /search/asks/")
    def search_asks(self, asked: _Asked) -> Any:
        return {"offers": self.search(asked.body.get("q") or {})}

    @_does("POST /volumes/search/")
    def search_volumes(self, asked: _Asked) -> Any:
        query = {name: value for name, value in asked.body.items() if name != "id"}
        rows = [{**row, "id": row["avail_vol_ask_id"]} for row in self.search(query)]
        return {"success": True, "offers": rows}

    @_does("GET /gpu_names/unique/")
    def gpu_names(self, asked: _Asked) -> Any:
        return {"gpu_names": [gpu[0] for gpu in _GPUS]}

    @_does("GET /gpu_types/")
    def gpu_types(self, asked: _Asked) -> Any:
        return {"success": True, "gpu_types": [{"gpu_name": gpu[0], "gpu_ram": gpu[1] * 1024} for gpu in _GPUS]}

    # instances

    def rent(self, asked: _Asked, offer_id: int) -> dict[str, Any]:
        """Each offer makes one instance, for whoever comes first."""
        if offer_id in self.taken or offer_id not in self.by_id:
            raise _Failed(404, "no_such_ask", f"Offer {offer_id} is no longer available")
        self.taken.add(offer_id)
        ident = next(self._ids)
        asked.account.instances[ident] = self._instance(ident, self.by_id[offer_id], asked)
        self.effect(asked, "rented", offer_id)
        secret = hashlib.sha256(f"{ident}".encode()).hexdigest()
        return {"success": True, "new_contract": ident, "instance_api_key": secret}

    def _instance(self, ident: int, offer: Mapping[str, Any], asked: _Asked) -> dict[str, Any]:
        env = asked.body.get("env") or {}
        wanted = asked.body.get("target_state") or "running"
        volume = asked.body.get("volume_info")
        return {
            **{name: value for name, value in offer.items() if name not in ("search", "bundled_results")},
            "id": ident,
            "label": asked.body.get("label"),
            "image_uuid": asked.body.get("image") or "vastai/base-image:@vastai-automatic-tag",
            "image_args": asked.body.get("args") or [],
            "image_runtype": asked.body.get("runtype") or "ssh",
            "extra_env": [[name, value] for name, value in env.items()] if isinstance(env, dict) else [],
            "onstart": asked.body.get("onstart"),
            "template_id": None,
            "template_hash_id": asked.body.get("template_hash_id"),
            "template_name": None,
            "disk_space": float(asked.body.get("disk") or 10.0),
            "disk_usage": 1.4,
            "disk_util": 0.14,
            "mem_usage": 0.9,
            "mem_limit": 63.0,
            "vmem_usage": 0.2,
            "cpu_util": 3.5,
            "gpu_util": 0.0,
            "gpu_temp": 41.0,
            "intended_status": wanted,
            "cur_state": wanted,
            "next_state": wanted,
            "actual_status": None,
            "status_msg": "success, running",
            "ssh_host": "ssh4.vast.ai",
            "ssh_port": 10_000 + ident % 50_000,
            "ssh_idx": "4",
            "machine_dir_ssh_port": 22,
            "local_ipaddrs": "10.0.0.2 172.17.0.1",
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "41022"}]},
            "direct_port_start": -1,
            "direct_port_end": -1,
            "jupyter_token": hashlib.sha256(f"jupyter {ident}".encode()).hexdigest(),
            "volume_info": [volume] if volume else [],
            "is_bid": asked.body.get("price") is not None,
            "price": asked.body.get("price"),
            "start_date": asked.wall,
            "uptime_mins": None,
            "_since": asked.now,
        }

    def shown(self, row: Mapping[str, Any], asked: _Asked) -> dict[str, Any]:
        """A row as the API tells it at this moment."""
        age, boot = asked.now - row["_since"], asked.behaviour.boot_time
        status = row["intended_status"]
        if status == "running" and age < boot:
            status = "created" if age < boot / 4 else "loading"
        seen = {name: value for name, value in row.items() if name != "_since"}
        return seen | {"actual_status": status, "duration": row["end_date"] - asked.wall, "uptime_mins": age / 60}

    def mine(self, asked: _Asked, ident: int) -> dict[str, Any]:
        try:
            return asked.account.instances[ident]
        except KeyError:
            raise _Failed(404, "no_such_instance", f"Instance {ident} not found") from None

    @_does("PUT /asks/{id}/", "PUT /bundles/{id}/")
    def create(self, asked: _Asked) -> Any:
        return self.rent(asked, asked.id)

    @_does("POST /asks/bulk/")
    def create_many(self, asked: _Asked) -> Any:
        ids = _ids(asked.body.get("ids"))
        results: list[dict[str, Any]] = []
        for ident in ids:
            try:
                results.append({"ask_id": ident, **self.rent(asked, ident)})
            except _Failed as failed:
                results.append({"ask_id": ident, **failed.payload})
        created = [result["new_contract"] for result in results if result["success"]]
        failures = [result["ask_id"] for result in results if not result["success"]]
        return {
            "success": bool(created),
            "results": results,
            "created": created,
            "failed": failures,
            "elapsed": 0.1 * len(ids),
        }

    @_does("PUT /launch_instance/")
    def launch(self, asked: _Asked) -> Any:
        found = self.search(asked.body.get("q") or {})
        if not found:
            return {
                "success": False,
                "error": "offer_not_found",
                "msg": "No offer matches",
                "message": "No offer matches",
            }
        return self.rent(asked, found[0]["id"])

    @_does("GET /api/v1/instances/")
    def page_of_instances(self, asked: _Asked) -> Any:
        filters = asked.parameter("select_filters", {}) or {}
        order = [(o["col"], o.get("dir") == "desc") for o in asked.parameter("order_by", []) or []]
        order += [] if any(column == "id" for column, _ in order) else [("id", False)]
        columns = asked.parameter("select_cols", ["*"]) or ["*"]
        limit = asked.parameter("limit", PAGE) or PAGE
        if not isinstance(limit, int) or not 1 <= limit <= PAGE:
            raise _Failed(400, "invalid_args", f"limit must be between 1 and {PAGE}")
        everything = [self.shown(row, asked) for row in asked.account.instances.values()]
        rows = _sort([row for row in everything if _matches(row, filters)], order)
        rest = rows
        if token := asked.query.get("after_token"):
            last = _read_token(token, [column for column, _ in order])
            rest = [row for row in rows if _is_after(row, last, order)]
        page = rest[:limit]
        return {
            "success": True,
            "instances_found": len(rows),
            "total_instances": len(everything),
            "label_counts": Counter(row["label"] or "" for row in rows),
            "next_token": _token(page[-1], order) if len(rest) > limit else None,
            "instances": page if "*" in columns else [{c: row.get(c) for c in columns} for row in page],
        }

    @_does("GET /instances/")
    def all_instances(self, asked: _Asked) -> Any:
        if not asked.behaviour.legacy_instances:
            raise _Failed(410, "", "Endpoint deprecated: use /api/v1/instances/")
        rows = [self.shown(row, asked) for row in asked.account.instances.values()]
        return {"success": True, "instances_found": len(rows), "instances": rows}

    @_does("GET /instances/{id}/")
    def one_instance(self, asked: _Asked) -> Any:
        row = asked.account.instances.get(asked.id)
        return {"instances": self.shown(row, asked) if row else None}

    @_does("GET /instances/filters/")
    def instance_filters(self, asked: _Asked) -> Any:
        columns = ("actual_status", "verification", "gpu_name")
        rows = (self.shown(row, asked) for row in asked.account.instances.values())
        seen = {tuple(row[column] for column in columns) for row in rows}
        return {"success": True, "filters": [dict(zip(columns, values, strict=True)) for values in sorted(seen)]}

    def change(self, asked: _Asked, ident: int) -> None:
        row = self.mine(asked, ident)
        if state := asked.body.get("state"):
            if state not in ("running", "stopped", "frozen"):
                raise _Failed(400, "invalid_args", "state must be running, stopped or frozen")
            if state == "running" and row["intended_status"] != "running":
                row["_since"] = asked.now
            row.update(intended_status=state, cur_state=state, next_state=state)
            self.effect(asked, state, ident)
        if "label" in asked.body:
            row["label"] = asked.body["label"]
            self.effect(asked, "labelled", ident)

    @_does("PUT /instances/{id}/")
    def change_one(self, asked: _Asked) -> Any:
        self.change(asked, asked.id)
        return {"success": True}

    @_does("PUT /instances/")
    def change_many(self, asked: _Asked) -> Any:
        ids = _ids(asked.body.get("ids"))
        for ident in ids:
            self.mine(asked, ident)
        for ident in ids:
            self.change(asked, ident)
        return {"success": True, "updated": ids}

    def destroy(self, asked: _Asked, ident: int) -> None:
        self.mine(asked, ident)
        del asked.account.instances[ident]
        self.effect(asked, "destroyed", ident)

    @_does("DELETE /instances/{id}/")
    def destroy_one(self, asked: _Asked) -> Any:
        self.destroy(asked, asked.id)
        return {"success": True}

    @_does("DELETE /instances/")
    def destroy_many(self, asked: _Asked) -> Any:
        ids = _ids(asked.body.get("instance_ids"))
        for ident in ids:
            self.mine(asked, ident)
        for ident in ids:
            self.destroy(asked, ident)
        return {"success": True, "destroyed": ids}

    @_does("PUT /instances/reboot/{id}/", "PUT /instances/recycle/{id}/")
    def reboot(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)["_since"] = asked.now
        self.effect(asked, "rebooted" if "reboot" in asked.route.template else "recycled", asked.id)
        return {"success": True}

    @_does("PUT /instances/update_template/{id}/")
    def update_instance(self, asked: _Asked) -> Any:
        row = self.mine(asked, asked.id)
        row.update({"_since": asked.now, "image_uuid": asked.body.get("image") or row["image_uuid"]})
        self.effect(asked, "recycled", asked.id)
        return {"success": True, "updated_instance": {"id": asked.id, "image_uuid": row["image_uuid"]}}

    @_does("PUT /instances/bid_price/{id}/")
    def bid(self, asked: _Asked) -> Any:
        row = self.mine(asked, asked.id)
        row["price"] = asked.body.get("price") or row["min_bid"]
        self.effect(asked, "bid", asked.id, row["price"])
        return {"success": True}

    @_does("PUT /instances/prepay/{id}/")
    def prepay(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)
        amount = _spend(asked)
        self.effect(asked, "prepaid", asked.id, amount)
        return {"success": True, "timescale": 1.0, "discount_rate": 0.2}

    @_does("GET /instances/balance/{id}/")
    def deposit(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)
        paid = sum(e.amount for e in self.effects if e.kind == "prepaid" and e.target == asked.id)
        return {"success": True, "balance": paid, "discount_rate": 0.2 if paid else 0.0}

    @_does("PUT /instances/request_logs/{id}/", "PUT /instances/command/{id}/")
    def ask_host(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)
        if "command" in asked.route.template:
            self.effect(asked, "command", asked.id)
        return {"success": True, "result_url": f"{asked.base_url}/results/{asked.id}.txt"}

    @_does("GET //results/{name}")
    def results(self, asked: _Asked) -> Any:
        return "line one\nline two\n"

    @_does("GET /instances/{id}/ssh/")
    def attached_keys(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)
        keys = asked.account.attached.get(asked.id, [])
        return {"success": True, "ssh_keys": [{"id": n, "public_key": key} for n, key in enumerate(keys, 1)]}

    @_does("POST /instances/{id}/ssh/")
    def attach_key(self, asked: _Asked) -> Any:
        self.mine(asked, asked.id)
        asked.account.attached.setdefault(asked.id, []).append(str(asked.body.get("ssh_key")))
        return {"success": True, "msg": "SSH key added to instance."}

    @_does("POST /contracts/fetch/")
    def contracts(self, asked: _Asked) -> Any:
        label = asked.body.get("label")
        rows = [self.shown(row, asked) for row in asked.account.instances.values()]
        return {"success": True, "contracts": [row for row in rows if label in (None, row["label"])]}

    # money and the account

    @_does("GET /users/current")
    def user(self, asked: _Asked) -> Any:
        number = asked.account.number
        return {
            "id": number,
            "user": f"user{number}",
            "username": f"user{number}",
            "fullname": "Ada Example",
            "email": f"user{number}@example.com",
            "email_verified": True,
            "api_key": asked.key,
            "ssh_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFAKE ada@example.com",
            "balance": 0.0,
            "credit": round(asked.account.balance, 6),
            "balance_threshold": 10.0,
            "balance_threshold_enabled": False,
            "billaddress_city": "",
            "billaddress_country": "SE",
            "billaddress_line1": "",
            "billaddress_line2": "",
            "billaddress_zip": "",
            "billed_expected": 0.0,
            "billed_verified": 0.0,
            "billing_creditonly": 1,
            "can_pay": True,
            "got_signup_credit": 1,
            "has_billing": True,
            "has_payout": False,
            "last4": "4242",
            "paid_expected": 0.0,
            "paid_verified": 0.0,
            "password_resettable": True,
            "paypal_email": None,
            **asked.account.settings,
        }

    @_does("PUT /users/")
    def set_user(self, asked: _Asked) -> Any:
        asked.account.settings.update({k: v for k, v in asked.body.items() if k != "api_key"})
        return {"success": True}

    @_does("PUT /commands/transfer_credit/")
    def transfer(self, asked: _Asked) -> Any:
        amount, recipient = _spend(asked), str(asked.body.get("recipient"))
        for other in self.accounts.values():
            if recipient in (str(other.number), f"user{other.number}@example.com"):
                other.balance += amount
        self.effect(asked, "transferred", recipient, amount)
        return {"success": True, "msg": f"Sent {amount} to {recipient}"}

    @_does("GET /invoices", "GET /api/v1/invoices/", "GET /charges/")
    def bills(self, asked: _Asked) -> Any:
        charge = "charges" in asked.route.template
        row: dict[str, Any] = {
            "id": 7001,
            "type": "instance" if charge else "credit",
            "source": "instance-31000001" if charge else "stripe",
            "description": "RTX 4090" if charge else "Credit purchase",
            "amount": 12.5,
            "amount_cents": 1250,
            "start": asked.wall - 86_400,
            "end": asked.wall,
            "metadata": {"invoice_id": 7001},
            "items": [],
        }
        return {"success": True, "results": [row], "count": 1, "total": 1, "next_token": None}

    @_does("GET /users/me/invoices")
    def old_bills(self, asked: _Asked) -> Any:
        row = {
            "id": 7001,
            "description": "Credit purchase",
            "type": "payment",
            "amount": "12.50",
            "quantity": 1,
            "rate": "12.50",
            "timestamp": asked.wall - 86_400,
        }
        return {"invoices": [row], "current": {"charges": 0.0, "service_fee": 0.0, "total": 0.0, "credit": 0.0}}

    @_does("GET /users/me/machine-earnings")
    def earnings(self, asked: _Asked) -> Any:
        return {"summary": {"total_gpu": 0.0}, "current": {"balance": 0.0}, "per_machine": [], "per_day": []}

    @_does("GET /users/me/ipaddrs")
    def addresses(self, asked: _Asked) -> Any:
        return {"results": [{"ip": "198.51.100.7", "first_seen": "2026-01-02 03:04:05", "first_location": "Sweden"}]}

    @_does("GET /users/cloud_integrations/")
    def connections(self, asked: _Asked) -> Any:
        return [{"id": 101, "name": "backups", "cloud_type": "s3"}]

    @_does("GET /subaccounts")
    def subaccounts(self, asked: _Asked) -> Any:
        return {"success": True, "users": self.listed(asked, "users")}

    @_does("GET /audit_logs/")
    def audit(self, asked: _Asked) -> Any:
        mine = [effect for effect in self.effects if effect.identity == asked.call.identity]
        return [
            {"ip_address": "198.51.100.7", "api_key_id": 1, "created_at": asked.wall, "api_route": e.kind, "args": {}}
            for e in mine
        ] or [
            {"ip_address": "198.51.100.7", "api_key_id": 1, "created_at": asked.wall, "api_route": "login", "args": {}}
        ]

    # collections

    def listed(self, asked: _Asked, name: str) -> list[dict[str, Any]]:
        return list(asked.account.rows.get(name, {}).values())

    def add(self, asked: _Asked, name: str, **more: Any) -> dict[str, Any]:
        row = {"id": next(self._ids), "user_id": asked.account.number, "created_at": asked.wall, **asked.body, **more}
        row.pop("client_id", None)
        asked.account.rows.setdefault(name, {})[row["id"]] = row
        self.effect(asked, f"{name}+", row["id"])
        return row

    def remove(self, asked: _Asked, name: str, ident: int) -> Any:
        if asked.account.rows.get(name, {}).pop(ident, None) is None:
            raise _Failed(404, "not_found", f"{ident} not found")
        self.effect(asked, f"{name}-", ident)
        return {"success": True, "msg": "Deleted"}

    def update(self, asked: _Asked, name: str) -> Any:
        try:
            row = asked.account.rows.get(name, {})[asked.id]
        except KeyError:
            raise _Failed(404, "not_found", f"{asked.id} not found") from None
        row.update({k: v for k, v in asked.body.items() if k not in ("id", "client_id") and v is not None})
        self.effect(asked, f"{name}=", asked.id)
        return {"success": True}

    @_does("GET /ssh/")
    def ssh_keys(self, asked: _Asked) -> Any:
        return self.listed(asked, "ssh")

    @_does("POST /ssh/")
    def add_ssh_key(self, asked: _Asked) -> Any:
        row = self.add(asked, "ssh", public_key=asked.body.get("ssh_key"))
        return {"success": True, "key": row}

    @_does("PUT /ssh/{id}/", "PUT /endptjobs/{id}/", "PUT /autojobs/{id}/", "PUT /commands/schedule_job/{id}/")
    def update_row(self, asked: _Asked) -> Any:
        return self.update(asked, _collection(asked))

    @_does("DELETE /ssh/{id}/", "DELETE /auth/apikeys/{id}/", "DELETE /endptjobs/{id}/", "DELETE /autojobs/{id}/")
    @_does("DELETE /workergroups/{id}/", "DELETE /commands/schedule_job/{id}/", "DELETE /team/members/{id}/")
    @_does("DELETE /deployment/{id}/")
    def remove_row(self, asked: _Asked) -> Any:
        return self.remove(asked, _collection(asked), asked.id)

    @_does("GET /endptjobs/", "GET /autojobs/", "GET /workergroups/")
    def serverless(self, asked: _Asked) -> Any:
        return {"success": True, "results": self.listed(asked, _collection(asked))}

    @_does("GET /endptjobs/{id}/")
    def one_endpoint(self, asked: _Asked) -> Any:
        row = asked.account.rows.get("endptjobs", {}).get(asked.id)
        if row is None:
            raise _Failed(404, "not_found", f"Endpoint {asked.id} not found")
        return {"success": True, "result": row}

    @_does("POST /endptjobs/", "POST /autojobs/", "POST /workergroups/")
    def add_serverless(self, asked: _Asked) -> Any:
        secret = hashlib.sha256(f"endpoint {len(self.effects)}".encode()).hexdigest()
        row = self.add(asked, _collection(asked), api_key=secret, endpoint_state="active")
        return {"success": True, "result": row["id"]}

    @_does("PUT /deployments/")
    def deploy(self, asked: _Asked) -> Any:
        row = self.add(asked, "deployment")
        return {"success": True, "action": "created", "deployment_id": row["id"], "endpoint_id": row["id"] + 1}

    @_does("GET /deployments")
    def deployments(self, asked: _Asked) -> Any:
        return {"success": True, "deployments": self.listed(asked, "deployment")}

    @_does("GET /deployment/{id}/")
    def deployment(self, asked: _Asked) -> Any:
        row = asked.account.rows.get("deployment", {}).get(asked.id)
        if row is None:
            raise _Failed(404, "not_found", f"Deployment {asked.id} not found")
        return {"success": True, "deployment": {"current_version_id": 1, "updated_at": row["created_at"], **row}}

    @_does("GET /auth/apikeys/")
    def api_keys(self, asked: _Asked) -> Any:
        return {"success": True, "apikeys": self.listed(asked, "apikeys")}

    @_does("GET /auth/apikeys/{id}/")
    def api_key(self, asked: _Asked) -> Any:
        row = asked.account.rows.get("apikeys", {}).get(asked.id)
        if row is None:
            raise _Failed(404, "not_found", f"Key {asked.id} not found")
        return row

    @_does("POST /auth/apikeys/")
    def add_api_key(self, asked: _Asked) -> Any:
        secret = hashlib.sha256(f"key {len(self.effects)}".encode()).hexdigest()
        return {"success": True, **self.add(asked, "apikeys", key=secret)}

    @_does("GET /commands/schedule_job/")
    def jobs(self, asked: _Asked) -> Any:
        return self.listed(asked, "schedule_job")

    @_does("POST /commands/schedule_job/")
    def add_job(self, asked: _Asked) -> Any:
        for row in self.listed(asked, "schedule_job"):
            if all(row.get(k) == asked.body.get(k) for k in ("instance_id", "api_endpoint")):
                raise _Failed(422, "job_exists", "A job for this instance exists")
        self.add(asked, "schedule_job")
        return {"success": True}

    @_does("POST /users/")
    def add_subaccount(self, asked: _Asked) -> Any:
        row = self.add(asked, "users", password=None)
        return {"success": True, "id": row["id"], "username": row.get("username")}

    @_does("GET /secrets/")
    def secrets(self, asked: _Asked) -> Any:
        return {"success": True, "secrets": dict(asked.account.secrets)}

    @_does("POST /secrets/", "PUT /secrets/", "DELETE /secrets/")
    def change_secret(self, asked: _Asked) -> Any:
        name, secrets = str(asked.body.get("key")), asked.account.secrets
        adding = asked.call.method == "POST"
        if adding == (name in secrets):
            raise _Failed(400, "invalid_args", f"{name} {'exists' if adding else 'does not exist'}")
        if asked.call.method == "DELETE":
            del secrets[name]
        else:
            secrets[name] = str(asked.body.get("value"))
        return {"success": True, "msg": "Environment variable saved."}

    @_does("GET /template/")
    def templates(self, asked: _Asked) -> Any:
        known = [
            {
                "id": 500 + n,
                "hash_id": hashlib.md5(f"template {n}".encode(), usedforsecurity=False).hexdigest(),
                "name": f"PyTorch {n}",
                "image": "vastai/pytorch",
                "tag": "latest",
                "creator_id": 1,
                "count_created": 1000 + n,
                "created_at": _EPOCH,
                "recommended": True,
                "use_ssh": True,
                "ssh_direct": True,
                "jup_direct": False,
                "recommended_disk_space": 32.0,
                "private": False,
            }
            for n in range(8)
        ]
        rows = [row for row in known + self.listed(asked, "template") if _matches(row, self.filters(asked))]
        return {"success": True, "templates_found": len(rows), "templates": rows}

    def filters(self, asked: _Asked) -> dict[str, Any]:
        return asked.parameter("select_filters", {}) or {}

    @_does("POST /template/", "PUT /template/", "PUT /api/v1/template/")
    def save_template(self, asked: _Asked) -> Any:
        version = hashlib.md5(f"{len(self.effects)}".encode(), usedforsecurity=False).hexdigest()
        row = self.add(asked, "template", hash_id=version, creator_id=asked.account.number, id=next(self._ids))
        return {"success": True, "template": row}

    @_does("DELETE /template/")
    def remove_template(self, asked: _Asked) -> Any:
        for row in self.listed(asked, "template"):
            if asked.body.get("hash_id") == row["hash_id"] or asked.body.get("template_id") == row["id"]:
                return self.remove(asked, "template", row["id"])
        raise _Failed(404, "not_found", "Template not found")

    @_does("GET /benchmarks")
    def benchmarks(self, asked: _Asked) -> Any:
        rows = [
            {
                "id": n,
                "machine_id": offer["machine_id"],
                "gpu_name": offer["gpu_name"],
                "num_gpus": offer["num_gpus"],
                "value": offer["dlperf"],
                "dph_base": offer["dph_base"],
                "type": "llm",
                "last_update": _EPOCH,
            }
            for n, offer in enumerate(self.offers[:20], 1)
        ]
        rows = [row for row in rows if _matches(row, self.filters(asked))]
        return {"success": True, "benchmarks_found": len(rows), "benchmarks": rows, "next_token": None}

    @_does("GET /volumes")
    def volumes(self, asked: _Asked) -> Any:
        return {"success": True, "volumes": self.listed(asked, "volume")}

    @_does("PUT /volumes/", "PUT /network_volumes/")
    def rent_volume(self, asked: _Asked) -> Any:
        offer = self.by_id.get(int(asked.body.get("id") or 0) - 1)
        if offer is None:
            raise _Failed(404, "no_such_ask", "No such volume offer")
        columns = ("disk_name", "driver_version", "inet_up", "inet_down", "reliability2", "machine_id", "host_id")
        row = {column: offer[column] for column in (*columns, "verification", "geolocation", "end_date")}
        ident, size = next(self._volume_ids), float(asked.body.get("size") or 15)
        row |= {"id": ident, "label": asked.body.get("name"), "disk_space": size, "status": "active"}
        row |= {"cluster_id": None, "instances": [], "start_date": asked.wall}
        asked.account.rows.setdefault("volume", {})[ident] = row
        self.effect(asked, "volume+", ident)
        return {"success": True, "volume_id": ident, "volume_name": f"V.{ident}"}

    @_does("DELETE /volumes/")
    def remove_volume(self, asked: _Asked) -> Any:
        return self.remove(asked, "volume", int(asked.query.get("id") or 0))

    # hosts

    @_does("GET /machines", "GET /machines/{id}")
    def machines(self, asked: _Asked) -> Any:
        row = {
            **{name: self.offers[0][name] for name in ("num_gpus", "gpu_name", "disk_space", "driver_version")},
            "id": self.offers[0]["machine_id"],
            "machine_id": self.offers[0]["machine_id"],
            "hostname": "rack1.example.com",
            "reliability2": 0.998,
            "verification": "verified",
            "public_ipaddr": "203.0.113.1",
            "geolocation": "Sweden, SE",
            "num_reports": 0,
            "listed_gpu_cost": 0.4,
            "min_bid_price": 0.2,
            "credit_discount_max": 0.4,
            "listed_inet_up_cost": 0.002,
            "listed_inet_down_cost": 0.002,
            "gpu_occupancy": "D x x x ",
        }
        if "id" in asked.names:
            return [row] if asked.id == row["id"] else []
        return {"success": True, "machines": [row]}

    @_does("GET /metrics/gpu/current/")
    def metrics(self, asked: _Asked) -> Any:
        rows = [{"gpu_name": g[0], "total": 100, "available": 40, "usage": 60.0, "price_median": g[4]} for g in _GPUS]
        return {"success": True, "gpus": rows}

    @_does("GET /metrics/gpu/history/")
    def metrics_history(self, asked: _Asked) -> Any:
        times = [int(asked.wall // 3600 - n) * 3600 for n in range(24, 0, -1)]
        supply = {"timestamps": times, "total": [100] * 24, "avail_verified": [40] * 24}
        names = asked.query.get("gpu_name", "all").split(",")
        series = {"supply_demand": supply, "pricing": {"avail_median": [0.36] * 24}, "stats": {}}
        return {"success": True, "gpus": {g[0]: series for g in _GPUS if g[0] in names or names == ["all"]}}

    @_does("GET /metrics/gpu/locations/")
    def metrics_locations(self, asked: _Asked) -> Any:
        row = {"gpu_name": "RTX 4090", "city": "Lund", "country_code": "SE", "num_gpus": 8, "state": "available"}
        return {"success": True, "locations": [row | {"verified": True, "latitude": 55.7, "longitude": 13.2}]}

    # teams and two factors

    @_does("GET /team/members/")
    def members(self, asked: _Asked) -> Any:
        return [{"id": asked.account.number, "username": "ada", "email": "ada@example.com", "roles": ["team_owner"]}]

    @_does("GET /team/roles-full/")
    def roles(self, asked: _Asked) -> Any:
        return self.listed(asked, "roles")

    @_does("GET /team/roles/{name}/")
    def role(self, asked: _Asked) -> Any:
        for row in self.listed(asked, "roles"):
            if row.get("name") == asked.names["name"]:
                return row
        raise _Failed(404, "not_found", "No such role")

    @_does("POST /team/roles/")
    def add_role(self, asked: _Asked) -> Any:
        return {"success": True, "id": self.add(asked, "roles")["id"]}

    @_does("DELETE /team/roles/{name}/")
    def remove_role(self, asked: _Asked) -> Any:
        row = self.role(asked)
        return self.remove(asked, "roles", row["id"])

    @_does("POST /team/invite/")
    def invite(self, asked: _Asked) -> Any:
        email, invited = asked.query.get("email", ""), asked.account.invited
        if email in invited:
            ago = int(asked.wall - invited[email])
            failed = _Failed(429, "", f"Error: invitation already sent to {email} only {ago} seconds ago.")
            failed.payload = {"msg": str(failed)}
            raise failed
        invited[email] = asked.wall
        self.effect(asked, "invited", email)
        return {"success": True, "msg": f"Invitation sent to {email}"}

    @_does("GET /tfa/status/")
    def tfa_status(self, asked: _Asked) -> Any:
        return {"success": True, "tfa_enabled": False, "methods": [], "backup_codes_remaining": 0}

    @_does("POST /tfa/", "DELETE /tfa/", "POST /tfa/confirm-new/", "POST /tfa/authorize-new-method/")
    @_does("PUT /tfa/authorize-new-method/", "POST /tfa/sms/", "POST /tfa/sms/resend/", "POST /tfa/email/")
    @_does("POST /tfa/totp-setup/", "PUT /tfa/regen-backup-codes/", "PUT /tfa/update/")
    def tfa(self, asked: _Asked) -> Any:
        if error := asked.behaviour.tfa_error:
            more = {"fail_count": 5, "locked_until": asked.wall + 900} if error == "tfa_locked" else {}
            raise _Failed(429, error, f"Two factor authentication refused: {error}", **more)
        self.effect(asked, "tfa", asked.route.template)
        return {"success": True, "msg": "done", "secret": "tfa-secret", "session_key": "tfa-session"}

    # serverless engine

    @_does("POST //route/")
    def route(self, asked: _Asked) -> Any:
        number = 1 + sum(effect.kind == "routed" for effect in self.effects)
        self.effect(asked, "routed", number)
        return {
            "url": "https://203.0.113.9:8443",
            "request_idx": number,
            "reqnum": number,
            "signature": "fake",
            "cost": 1,
        }

    @_does("POST //get_endpoint_logs/", "POST //get_autogroup_logs/", "POST //get_workergroup_logs/")
    def engine_logs(self, asked: _Asked) -> Any:
        return {"info0": "started\n", "info1": "started\nready\n", "trace": "", "debug": ""}

    @_does("POST //get_endpoint_workers/", "POST //get_workergroup_workers/")
    def engine_workers(self, asked: _Asked) -> Any:
        return [{"id": 1, "status": "idle", "gpu_name": "RTX 4090", "measured_perf": 98.4}]

    @_does("POST //update_workers/")
    def update_workers(self, asked: _Asked) -> Any:
        return {"success": True, "workers_to_update": 1, "cancelled": bool(asked.body.get("cancel_update"))}


def _collection(asked: _Asked) -> str:
    """ "PUT /api/v0/commands/schedule_job/{id}/" -> "schedule_job"; autojobs and workergroups are the same rows."""
    name = _canonical(asked.route.template).removesuffix("/{id}").rpartition("/")[2]
    return "autojobs" if name == "workergroups" else name


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= BULK or not all(isinstance(i, int) for i in value):
        raise _Failed(400, "invalid_args", f"expected 1 to {BULK} ids")
    return value


def _spend(asked: _Asked) -> float:
    amount = float(asked.body.get("amount") or 0)
    if not 0 < amount <= asked.account.balance:
        raise _Failed(400, "insufficient_credit", "You do not have that much credit")
    asked.account.balance -= amount
    return amount


# Keyset pages: the token holds the sort key of the last row seen


def _token(row: Mapping[str, Any], order: Sequence[tuple[str, bool]]) -> str:
    values = {column: row.get(column) for column, _ in order}
    return base64.urlsafe_b64encode(json.dumps({"values": values, "os_page": 0}).encode()).decode()


def _read_token(token: str, columns: Sequence[str]) -> dict[str, Any]:
    try:
        values = json.loads(base64.urlsafe_b64decode(token))["values"]
        return {column: values[column] for column in columns}
    except (ValueError, KeyError, TypeError):
        raise _Failed(400, "invalid_token", "Invalid pagination token") from None


def _is_after(row: Mapping[str, Any], last: Mapping[str, Any], order: Iterable[tuple[str, bool]]) -> bool:
    for column, descending in order:
        here, there = _rank(row.get(column)), _rank(last[column])
        if here != there:
            return (here < there) if descending else (here > there)
    return False


# HTTP


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes
    content_type: str = "application/json"  # to the letter: the CLI refuses a charset
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, payload: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Self:
        return cls(status, json.dumps(payload, separators=(",", ":")).encode(), headers=headers)

    @classmethod
    def text(cls, text: str, status: int = 200) -> Self:
        return cls(status, text.encode(), "text/plain; charset=utf-8")


def _refusal(form: Form, layer: _Layer, retry_after: float | None, wall: float) -> _Reply:
    """One of the literal bodies with which the API says 429."""
    said, threshold = "API requests too frequent", f"threshold={round(layer.limit.interval, 6)}"
    of_route = layer.name == "route"
    match form:
        case "text_threshold":
            return _Reply.text(f"{said}: endpoint {threshold}*1.0" if of_route else said, 429)
        case "detail":
            return _Reply.json({"detail": f"{said} endpoint {threshold}" if of_route else said}, 429)
        case "success_false":
            msg = f"{said} endpoint {threshold}" if of_route else said
            return _Reply.json({"success": False, "error": "rate_limit_exceeded", "msg": msg}, 429)
        case "json_retry_after":
            wait = math.ceil((layer.wait if retry_after is None else retry_after) - EPSILON)
            capacity = float(layer.limit.capacity)
            payload = {
                "error": "HTTPTooManyRequests",
                "msg": said,
                "retry_after": wait,
                "limit": capacity,
                "remaining": 0,
            }
            hints = {"x-ratelimit-limit": capacity, "x-ratelimit-remaining": 0, "x-ratelimit-reset": int(wall + wait)}
            headers = [(name, str(value)) for name, value in hints.items()]
            return _Reply.json(payload, 429, (*headers, ("retry-after", str(wait))))
        case _:
            return _Reply.text(said, 429)


class _Connection(asyncio.Protocol):
    """A connection nobody reads from before `handshake_delay` has passed; then TLS if asked, then HTTP.

    It keeps what arrives between the end of the handshake and its own retirement: with TLS 1.3 the first
    request may come in the same segment as the client's Finished.
    """

    def __init__(self, fake: "FakeVast", server: web.Server, ssl_context: ssl.SSLContext | None) -> None:
        self._fake, self._server, self._ssl = fake, server, ssl_context
        self._early = b""
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._fake._accepted(self, transport.get_extra_info("peername"))
        self.transport = transport
        transport.pause_reading()
        delay = self._fake.behaviour.handshake_delay
        loop = asyncio.get_running_loop()
        if delay > 0:
            self._timer = loop.call_later(delay, self._begin)
        else:
            self._begin()

    def _begin(self) -> None:
        if self._ssl is None:
            self._serve(self.transport)
            self.transport.resume_reading()
        else:
            self._task = asyncio.get_running_loop().create_task(self._handshake(self._ssl))

    async def _handshake(self, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(self.transport, self, context, server_side=True)
        except OSError:  # the client left, or did not like our certificate
            self._fake._pending.discard(self)
        else:
            if transport is not None and not self._lost:
                self._serve(transport)

    def _serve(self, transport: asyncio.Transport) -> None:
        self._fake._pending.discard(self)
        http = self._server()
        transport.set_protocol(http)
        http.connection_made(transport)
        _ = http.peername  # remembered by aiohttp while the transport still knows it
        if self._early:
            http.data_received(self._early)

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.abandon()

    def abandon(self) -> None:
        self._fake._pending.discard(self)
        if self._timer:
            self._timer.cancel()
        if self._task:
            self._task.cancel()
        self.transport.abort()


class FakeVast:
    """The server. Owns the log, the buckets, the faults and the world behind them."""

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        wall: Callable[[], float] = time.time,
        on_answer: Callable[[Call], None] | None = None,
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.faults: list[Fault] = []
        self.log: list[Call] = []
        self.accepted = 0  # TCP connections so far
        self.wall = wall
        self.world = _World(self.behaviour.seed)
        self._on_answer = on_answer
        self._chance = random.Random(self.behaviour.seed)
        self._limiter = _Limiter()
        self._numbers: dict[Any, int] = {}  # peer -> its connection's number
        self._pending: set[_Connection] = set()
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._origin = ("http", "127.0.0.1", 0)  # where it listens, or did last

    def __repr__(self) -> str:
        seen, refused = len(self.log), len(self.refused)
        return f"<FakeVast {seen} calls, {refused} refused, {len(self.effects)} effects, {self.accepted} connections>"

    # life

    async def start(self, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None) -> None:
        loop = asyncio.get_running_loop()
        http = self._http = web.Server(
            self._handle,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=self.behaviour.keepalive_timeout,
            lingering_time=0.0,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self._listener = await loop.create_server(lambda: _Connection(self, http, ssl_context), host, port)
        self._origin = ("https" if ssl_context else "http", host, self._listener.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._listener is None or self._http is None:
            return
        self._listener.close()
        for connection in list(self._pending):
            connection.abandon()
        await self._http.shutdown(timeout=0.01)
        await self._listener.wait_closed()
        self._listener = None

    async def __aenter__(self) -> Self:
        if self._listener is None:
            await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        return self._origin[2]

    @property
    def url(self) -> str:
        scheme, host, port = self._origin
        return f"{scheme}://{host}:{port}"

    # what tests ask

    @property
    def offers(self) -> list[dict[str, Any]]:
        """The offers that can still be rented, in no order."""
        return [offer for offer in self.world.offers if offer["id"] not in self.world.taken]

    @property
    def effects(self) -> list[Effect]:
        return self.world.effects

    @property
    def refused(self) -> list[Call]:
        return [call for call in self.log if call.refused]

    def calls(self, template: str = "*") -> list[Call]:
        return [call for call in self.log if fnmatchcase(_canonical(call.template), _canonical(template))]

    def gaps(self, template: str = "*") -> list[float]:
        """Seconds between the arrivals of two successive calls."""
        at = sorted(call.at for call in self.calls(template))
        return [after - before for before, after in itertools.pairwise(at)]

    def count(self, kind: str, *, key: str | None = None, target: object = None) -> int:
        """How often something was done, to one target or by the owner of one key if you like."""
        return sum(
            effect.kind == kind
            and (key is None or effect.identity == identity_of(key))
            and (target is None or effect.target == target)
            for effect in self.effects
        )

    def counts(self) -> dict[str, Counter[str]]:
        """How often everything was done, by identity."""
        totals: dict[str, Counter[str]] = {}
        for effect in self.effects:
            totals.setdefault(effect.identity, Counter())[effect.kind] += 1
        return totals

    def balance(self, key: str) -> float:
        return self.world.account(identity_of(key)).balance

    def limit(self, template: str) -> Limit:
        """The limit that is enforced on a route now: documented or overridden, and scaled."""
        method, path = template.split(maxsplit=1)
        return self._limit_of(_find(method, path.replace("{id}", "1").replace("{name}", "x"))[0])

    # a request

    def _accepted(self, connection: _Connection, peer: Any) -> None:
        self.accepted += 1
        self._pending.add(connection)
        self._numbers[peer] = self.accepted

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        route, names, call, query = self._arrived(request)
        self.log.append(call)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > MAX_BODY:
                return self._finish(request, call, _Reply.text("Request body too large", 413))
            chunks.append(chunk)
        call.body = b"".join(chunks)
        body = _decoded(call.body)
        key = _key_of(request, query, body)
        call.identity = identity_of(key) if key else ANYBODY
        asked = _Asked(
            call=call,
            route=route,
            account=self.world.account(call.identity),
            key=key or "",
            names=names,
            query=query,
            body=body,
            now=call.at,
            wall=self.wall(),
            behaviour=self.behaviour,
            base_url=self.url,
        )
        return await self._serve(request, asked)

    def _arrived(self, request: web.BaseRequest) -> tuple[_Route, dict[str, str], Call, dict[str, str]]:
        target = request.raw_path
        path, _, query = target.partition("?")
        route, names = _find(request.method, unquote(path))
        call = Call(
            at=asyncio.get_running_loop().time(),
            method=request.method,
            target=target,
            template=route.template,
            identity="",
            headers=[(_latin(name), _latin(value)) for name, value in request.raw_headers],
            connection=self._numbers.get(request.protocol.peername, 0),
        )
        return route, names, call, dict(parse_qsl(query, keep_blank_values=True))

    async def _serve(self, request: web.BaseRequest, asked: _Asked) -> web.StreamResponse:
        call = asked.call
        fault = next((f for f in self.faults if f.applies(call.template, call.identity, self._chance)), None)
        verdict = None
        if fault is None or fault.kind != "refuse429":
            verdict = self._limiter.weigh(self._limits_for(asked), call.at)
            if verdict.refused_by:
                refused = _refusal(self._form_of(asked.route), verdict.refused_by, None, asked.wall)
                return self._finish(request, call, refused, verdict)
        if fault is None:
            return self._finish(request, call, self._act(asked), verdict)
        fault.used += 1
        return await self._misbehave(request, asked, fault, verdict)

    async def _misbehave(
        self, request: web.BaseRequest, asked: _Asked, fault: Fault, verdict: _Verdict | None
    ) -> web.StreamResponse:
        call = asked.call
        match fault.kind:
            case "drop_before":
                await asyncio.sleep(fault.delay)
                return _hang_up(request, fault)
            case "drop_after":
                self._act(asked)
                await asyncio.sleep(fault.delay)
                return _hang_up(request, fault)
            case "truncate":
                reply = self._act(asked)
                await asyncio.sleep(fault.delay)
                return await self._truncated(request, call, reply, verdict, fault)
            case "slow":
                reply = self._act(asked)
                await asyncio.sleep(fault.delay)
            case "slow_before":
                await asyncio.sleep(fault.delay)
                reply = self._act(replace(asked, now=asyncio.get_running_loop().time(), wall=self.wall()))
            case "status":
                await asyncio.sleep(fault.delay)
                reply = _scripted(fault)
            case "status_after":
                self._act(asked)
                await asyncio.sleep(fault.delay)
                reply = _scripted(fault)
            case "big":
                return await self._big(request, call, fault.size, verdict)
            case "refuse429":
                await asyncio.sleep(fault.delay)
                reply = self._forced(fault, asked)
        return self._finish(request, call, reply, verdict)

    def _act(self, asked: _Asked) -> _Reply:
        path = asked.call.target.partition("?")[0]
        if path in self.behaviour.redirects:
            status, location = self.behaviour.redirects[path]
            return _Reply(status, b"", "text/plain; charset=utf-8", (("Location", location),))
        try:
            self._admit(asked)
            payload = self.world.answer(asked)
        except (TypeError, ValueError) as error:
            return _Reply.json(_Failed(400, "invalid_args", str(error)).payload, 400)
        except _Failed as failed:
            if failed.status == 410 and not failed.payload["error"]:
                return _Reply.text(str(failed), 410)
            headers: tuple[tuple[str, str], ...] = ()
            if failed.payload.get("error") == "search_quota_exceeded":
                headers = (("X-RateLimit-Reset", str(_next_midnight(asked.wall))),)
            return _Reply.json(failed.payload, failed.status, headers)
        asked.call.acted = True
        return _Reply.text(payload) if isinstance(payload, str) else _Reply.json(payload)

    def _admit(self, asked: _Asked) -> None:
        """The two questions that come before any work: who are you, and is there quota left."""
        if asked.key in self.behaviour.invalid_keys:
            raise _Failed(401, "auth_error", "Invalid user key")
        if not asked.key and not asked.route.public:
            raise _Failed(401, "auth_error", "Please log in or sign up")
        quota = self.behaviour.search_quota
        if asked.route.template in _SEARCHES and quota is not None:
            day = int(asked.wall // 86_400)
            if asked.account.searches[day] >= quota:
                raise _Failed(429, "search_quota_exceeded", f"Daily search quota of {quota} exceeded")
            asked.account.searches[day] += 1

    # limits

    def _limits_for(self, asked: _Asked) -> dict[tuple[str, ...], Limit]:
        """The buckets this call takes from, the widest first."""
        who = ANYBODY if self.behaviour.scope == "ip" else asked.call.identity
        where = _canonical(asked.route.template)
        if self.behaviour.shared_clock:
            where = where.partition(" ")[2]
        limits: dict[tuple[str, ...], Limit] = {("route", who, where): self._limit_of(asked.route)}
        if self.behaviour.account and asked.route.interval > 0:
            limits = {("account", who): self._scaled(self.behaviour.account), **limits}
        return {name: limit for name, limit in limits.items() if limit.interval > 0}

    def _limit_of(self, route: _Route) -> Limit:
        chosen = _lookup(self.behaviour.limits, route.template)
        return self._scaled(chosen or self.behaviour.limits.get("*") or route.limit)

    def _scaled(self, limit: Limit) -> Limit:
        return replace(limit, interval=limit.interval * self.behaviour.scale)

    def _form_of(self, route: _Route) -> Form:
        return _lookup(self.behaviour.forms, route.template) or self.behaviour.form

    def _forced(self, fault: Fault, asked: _Asked) -> _Reply:
        limit = self._limit_of(asked.route)
        layer = _Layer("route", limit, 0, limit.interval)
        reply = _refusal(fault.form or self._form_of(asked.route), layer, fault.retry_after, asked.wall)
        return replace(reply, headers=(*reply.headers, *fault.headers))

    # answers

    def _headers(self, reply: _Reply, verdict: _Verdict | None) -> CIMultiDict[str]:
        headers = CIMultiDict({"Server": "gunicorn", "Date": formatdate(self.wall(), usegmt=True)})
        if reply.content_type:
            headers["Content-Type"] = reply.content_type
        for name, value in (*reply.headers, *self.behaviour.extra_headers):
            headers.add(name, value)
        for cookie in self.behaviour.set_cookie:
            headers.add("Set-Cookie", cookie)
        layer = verdict.layers.get(self.behaviour.ratelimit_layer) if verdict else None
        if layer and self.behaviour.ratelimit_headers and "X-RateLimit-Reset" not in headers:
            headers["X-RateLimit-Limit"] = str(float(layer.limit.capacity))
            headers["X-RateLimit-Remaining"] = str(layer.remaining)
            headers["X-RateLimit-Reset"] = str(math.ceil(self.wall() + layer.wait))
        return headers

    def _packed(self, request: web.BaseRequest, reply: _Reply, headers: CIMultiDict[str]) -> bytes:
        if reply.content_type != "application/json" or len(reply.body) < 1024:
            return reply.body
        headers["Vary"] = "Accept-Encoding"
        if not _takes_gzip(request.headers.get("Accept-Encoding", "")):
            return reply.body
        headers["Content-Encoding"] = "gzip"
        return gzip.compress(reply.body, compresslevel=5, mtime=0)

    def _done(self, call: Call, status: int) -> None:
        call.status, call.refused = status, status == 429
        if self._on_answer:
            self._on_answer(call)

    def _finish(
        self, request: web.BaseRequest, call: Call, reply: _Reply, verdict: _Verdict | None = None
    ) -> web.Response:
        headers = self._headers(reply, verdict)
        body = self._packed(request, reply, headers)
        self._done(call, reply.status)
        return web.Response(status=reply.status, body=body, headers=headers)

    async def _truncated(
        self, request: web.BaseRequest, call: Call, reply: _Reply, verdict: _Verdict | None, fault: Fault
    ) -> web.StreamResponse:
        headers = self._headers(reply, verdict)
        body = self._packed(request, reply, headers)
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_length = len(body)
        self._done(call, reply.status)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        _hang_up(request, fault)
        return response

    async def _big(
        self, request: web.BaseRequest, call: Call, size: int, verdict: _Verdict | None
    ) -> web.StreamResponse:
        """`size` bytes of JSON, of which 64 KiB are held at a time."""
        head, tail = b'{"pad":"', b'"}'
        left = max(0, size - len(head) - len(tail))
        response = web.StreamResponse(headers=self._headers(_Reply(200, b""), verdict))
        response.content_length = len(head) + left + len(tail)
        self._done(call, 200)
        await response.prepare(request)
        await response.write(head)
        chunk = b"x" * 65_536
        while left:
            await response.write(chunk[:left])
            left -= min(left, len(chunk))
        await response.write(tail)
        await response.write_eof()
        return response


def _hang_up(request: web.BaseRequest, fault: Fault) -> web.Response:
    """Close the connection; what aiohttp then tries to write goes nowhere."""
    transport = request.transport
    if transport is not None and fault.reset:
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif transport is not None:
        transport.close()
    return web.Response()


def _scripted(fault: Fault) -> _Reply:
    named = any(name.lower() == "content-type" for name, _ in fault.headers)
    return _Reply(fault.status, fault.body, "" if named else "text/html; charset=utf-8", tuple(fault.headers))


def _key_of(request: web.BaseRequest, query: Mapping[str, str], body: Mapping[str, Any]) -> str | None:
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    in_body = body.get("api_key")
    found = bearer.strip() if scheme.lower() == "bearer" else ""
    return found or query.get("api_key") or (in_body if isinstance(in_body, str) else None) or None


def _decoded(body: bytes) -> dict[str, Any]:
    with suppress(ValueError, OSError, EOFError):
        found = json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        if isinstance(found, dict):
            return found
    return {}


def _lookup(table: Mapping[str, T], template: str) -> T | None:
    return next((value for name, value in table.items() if _canonical(name) == _canonical(template)), None)


def _latin(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _takes_gzip(accept: str) -> bool:
    offered = (part.replace(" ", "").lower().partition(";q=") for part in accept.split(","))
    return any(
        (name in ("gzip", "*") and weight.strip("0.") != "") or (name == "gzip" and not weight)
        for name, _, weight in offered
    )


def _next_midnight(wall: float) -> int:
    return int(wall // 86_400 + 1) * 86_400


# By hand


def _print(call: Call) -> None:
    note = " refused" if call.refused else ""
    print(
        f"{call.at:12.3f}  {call.status}  {call.template}  {call.identity} connection {call.connection}{note}",
        flush=True,
    )


async def _run(args: argparse.Namespace) -> None:
    capacity, _, interval = (args.account or "").partition(":")
    behaviour = Behaviour(
        scale=args.scale,
        form=args.form,
        ratelimit_headers=args.headers,
        search_quota=args.quota,
        account=Limit(float(interval), capacity=float(capacity)) if args.account else None,
    )
    fake = FakeVast(behaviour, on_answer=_print)
    await fake.start(port=args.port)
    print(f"Point a client here: VAST_URL={fake.url} VAST_API_KEY=anything vastai show instances", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake Vast.ai API on 127.0.0.1, with its rate limits.")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every interval")
    parser.add_argument("--form", default="text", choices=get_args(Form), help="how a 429 looks")
    parser.add_argument("--headers", action="store_true", help="X-RateLimit-* on every answer")
    parser.add_argument("--quota", type=int, help="searches a day")
    parser.add_argument("--account", metavar="CAP:INTERVAL", help="a bucket shared by all routes of a key")
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
