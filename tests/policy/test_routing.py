"""What is known of each endpoint, how a request finds it, and what a table of one's own may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.routing import (
    ALL,
    Effect,
    Family,
    Route,
    RouteError,
    Routes,
    is_plain,
    letters_of,
    parameter,
    words_of,
)

_SHIPPED = Path(__file__).parents[2] / "config" / "routes.yaml"

# Kept by hand beside config/routes.yaml, so that a slip in one shows in the other. Method, path, effect, and the
# seconds between two calls in the vendor's published OpenAPI and in the one generated from the backend.
_ENDPOINTS = """
# reads
GET    /api/v0/users/current                             read      -    -
GET    /api/v1/instances/                                read      1    1
GET    /api/v0/instances/                                read      -   20
GET    /api/v0/instances/{id}/                           read      2    2
GET    /api/v0/instances/filters/                        read      -    -
GET    /api/v0/instances/balance/{id}/                   read      3    3
GET    /api/v0/instances/pending-price-increases/        read      -    2
GET    /api/v0/instances/{id}/ssh/                       read      -    2
GET    /api/v0/instance_backups/                         read      -    -
GET    /api/v0/volumes                                   read    5.5    2
GET    /api/v0/machines                                  read      -  2.5
GET    /api/v0/machines/{id}                             read      -  1.1
GET    /api/v0/machines/maintenances                     read      -    2
GET    /api/v0/network_disk/                             read      -    -
GET    /api/v0/template/                                 read      3  1.9
GET    /api/v0/benchmarks                                read      3    -
GET    /api/v0/bundles/                                  search    -  0.8
GET    /api/v0/gpu_names/unique/                         read      -    -
GET    /api/v0/gpu_types/                                read      -    -
GET    /api/v0/deployments                               read      3    2
GET    /api/v0/deployment/{id}/                          read      3    2
GET    /api/v0/deployment/{id}/versions/                 read      -    2
GET    /api/v0/endptjobs/{id}/                           read      -    2
GET    /api/v0/workergroups/                             read      2    2
GET    /api/v0/metrics/gpu/current/                      read      3    2
GET    /api/v0/metrics/gpu/history/                      read      3    2
GET    /api/v0/metrics/gpu/locations/                    read      3    2
GET    /api/v0/invoices                                  read      -    3
GET    /api/v1/invoices/                                 read      3    3
GET    /api/v0/charges/                                  read      1    1
GET    /api/v0/users/me/invoices                         read      -    2
GET    /api/v0/users/me/machine-earnings                 read      2    2
GET    /api/v0/users/me/ipaddrs                          read    2.9  2.9
GET    /api/v0/users/cloud_integrations/                 read    2.9  2.9
GET    /api/v0/subaccounts                               read    2.1  2.1
GET    /api/v0/audit_logs/                               read      -    2
GET    /api/v0/commands/schedule_job/                    read      -  3.5
GET    /api/v0/ssh/                                      read      -    1
GET    /api/v0/team/members/                             read      -    2
GET    /api/v0/team/roles-full/                          read      -    2
GET    /api/v0/team/roles/{name}/                        read      -    2
GET    /api/v0/clusters/                                 read      -    -
GET    /api/v0/overlay/                                  read      -    -
# searches by POST and PUT
POST   /api/v0/bundles/                                  search    6    2
PUT    /api/v0/search/asks/                              search    -    -
POST   /api/v0/volumes/search/                           search  5.5    2
POST   /api/v0/network_volumes/search/                   search    -    -
POST   /api/v0/contracts/fetch/                          search    -    -
POST   /api/v0/machines/maintenances                     search    -    1
# reads with a body
GET    /api/v0/endptjobs/                                read      3    3
GET    /api/v0/autojobs/                                 read      -    2
GET    /api/v0/machines/{id}/reports/                    read    1.2  1.2
# a second one costs, or makes another
PUT    /api/v0/asks/{id}/                                spend   4.5  4.5
POST   /api/v0/asks/bulk/                                spend     -  4.5
PUT    /api/v0/launch_instance/                          spend     5    2
PUT    /api/v0/bundles/{id}/                             spend     -  2.4
PUT    /api/v0/volumes/                                  spend   5.5    1
PUT    /api/v0/network_volumes/                          spend     -    -
POST   /api/v0/volumes/copy/                             spend     -    1
PUT    /api/v0/instances/prepay/{id}/                    spend     2    2
PUT    /api/v0/commands/transfer_credit/                 spend   2.5  2.5
POST   /api/v0/team/                                     spend     -    2
POST   /api/v0/endptjobs/                                spend     4    4
POST   /api/v0/autojobs/                                 spend     -    4
POST   /api/v0/workergroups/                             spend     4    2
PUT    /api/v0/deployments/                              spend     -    2
POST   /api/v0/template/                                 spend     -  1.9
PUT    /api/v1/template/                                 spend     -  1.9
PUT    /api/v0/template/                                 spend     -  1.9
POST   /api/v0/auth/apikeys/                             auth      2    2
POST   /api/v0/ssh/                                      spend     1    1
POST   /api/v0/users/                                    spend     3    3
POST   /api/v0/team/invite/                              spend     -    2
POST   /api/v0/team/roles/                               spend     -    2
POST   /api/v0/commands/schedule_job/                    spend     -  3.5
POST   /api/v0/commands/rclone/                          spend     -  3.5
PUT    /api/v0/commands/copy_direct/                     spend   3.5  3.5
PUT    /api/v0/commands/rsync/                           spend     -  3.5
POST   /api/v0/instances/take_snapshot/{id}/             spend     -    -
PUT    /api/v0/instances/command/{id}/                   spend   1.5  1.5
PUT    /api/v0/instances/reboot/{id}/                    spend     1    1
PUT    /api/v0/instances/recycle/{id}/                   spend     1    1
PUT    /api/v0/instances/update_template/{id}/           spend     -    2
PUT    /api/v0/machines/create_asks/                     spend     -    5
PUT    /api/v0/machines/create_bids/                     spend   2.8  2.8
POST   /api/v0/volumes/                                  spend     -    5
POST   /api/v0/network_volumes/                          spend     -    -
POST   /api/v0/network_disk/                             spend     -    -
PUT    /api/v0/machines/{id}/dnotify/                    spend   2.5  2.5
PUT    /api/v0/commands/reset_apikey/                    auth      -    -
# setting a state
PUT    /api/v0/instances/{id}/                           write     1    1
PUT    /api/v0/instances/                                write     -    4
DELETE /api/v0/instances/{id}/                           write     3    3
DELETE /api/v0/instances/                                write     -    3
PUT    /api/v0/instances/bid_price/{id}/                 write   5.5  5.5
PUT    /api/v0/instances/accept-price-increase/          write     -    2
PUT    /api/v0/instances/reject-price-increase/          write     -    2
PUT    /api/v0/instances/request_logs/{id}/              write     -    -
POST   /api/v0/instances/{id}/ssh/                       write     -    2
DELETE /api/v0/instances/{id}/ssh/{key}/                 write     2    2
DELETE /api/v0/volumes/                                  write   5.5    2
PUT    /api/v0/endptjobs/{id}/                           write     2    2
DELETE /api/v0/endptjobs/{id}/                           write     3    3
PUT    /api/v0/autojobs/{id}/                            write     -    2
DELETE /api/v0/autojobs/{id}/                            write     -    3
DELETE /api/v0/workergroups/{id}/                        write     3    2
DELETE /api/v0/deployment/{id}/                          write     -    2
DELETE /api/v0/deployments/                              write     -    2
POST   /api/v0/deployment/{id}/start/                    write     2    2
POST   /api/v0/deployment/{id}/stop/                     write     2    2
POST   /api/v0/deployment/{id}/heartbeat/                write     -    2
DELETE /api/v0/template/                                 write     -    2
PUT    /api/v0/ssh/{id}/                                 write     1    1
DELETE /api/v0/ssh/{id}/                                 write     -    1
PUT    /api/v0/team/roles/{id}/                          write     -    2
DELETE /api/v0/team/roles/{name}/                        write     3    2
DELETE /api/v0/team/members/{id}/                        write     3    2
DELETE /api/v0/team/                                     write     -    2
PUT    /api/v0/users/                                    write     5    5
PUT    /api/v0/commands/schedule_job/{id}/               write     -  3.5
DELETE /api/v0/commands/schedule_job/{id}/               write     -  3.5
DELETE /api/v0/commands/copy_direct/                     write   3.5  3.5
DELETE /api/v0/commands/rclone/                          write     -  3.5
DELETE /api/v0/machines/{id}/asks/                       write   1.8  1.8
POST   /api/v0/machines/{id}/force_delete/               write     -    -
PUT    /api/v0/machines/{id}/cleanup/                    write     8    8
PUT    /api/v0/machines/{id}/cancel_maint/               write     -  2.5
PUT    /api/v0/machines/{id}/minbid/                     write   1.5  1.5
DELETE /api/v0/machines/{id}/defjob/                     write   1.2  1.2
PUT    /api/v0/machines/defrag_offers/                   write     -  2.8
POST   /api/v0/volumes/unlist                            write     5    5
POST   /api/v0/network_volumes/unlist/                   write     -    -
# keys, codes, secrets
GET    /api/v0/auth/apikeys/                             auth      1    1
GET    /api/v0/auth/apikeys/{id}/                        auth      -    -
DELETE /api/v0/auth/apikeys/{id}/                        auth      2    2
GET    /api/v0/secrets/                                  auth      5    5
POST   /api/v0/secrets/                                  auth      3    3
PUT    /api/v0/secrets/                                  auth      3    3
DELETE /api/v0/secrets/                                  auth      3    3
GET    /api/v0/tfa/status/                               auth      -    1
POST   /api/v0/tfa/                                      auth      -  1.1
DELETE /api/v0/tfa/                                      auth      -  1.1
POST   /api/v0/tfa/confirm-new/                          auth      -    2
POST   /api/v0/tfa/authorize-new-method/                 auth      -    2
PUT    /api/v0/tfa/authorize-new-method/                 auth      -    2
POST   /api/v0/tfa/sms/                                  auth      -    2
POST   /api/v0/tfa/sms/resend/                           auth      -    2
POST   /api/v0/tfa/email/                                auth      -    2
POST   /api/v0/tfa/totp-setup/                           auth      -  1.1
PUT    /api/v0/tfa/regen-backup-codes/                   auth      -  1.1
PUT    /api/v0/tfa/update/                               auth      -  1.1
GET    /api/v0/instance_backups/{id}/download/           auth      -    -
GET    /api/v0/deployment/{id}/download_url/             auth      -    2
# published, but called by no command line
PUT    /api/v0/bundles_bid_price/{id}/                   read      -    -
GET    /api/v0/users/spend-rate/                         read      -    -
GET    /api/v0/charges/chart/                            read      -    1
GET    /api/v0/team/apikeys/                             auth      -    -
GET    /api/v0/team/balances/                            read      -    -
GET    /api/v0/team/roles/                               read      -    -
GET    /api/v0/user/earnings/                            read      -    -
GET    /api/v0/user/earnings/data/                       read      -    -
GET    /api/v0/users/cloud/                              auth      -    -
GET    /api/v0/users/{id}/templates/                     read      -    -
GET    /api/v0/users/{id}/templates/{hash}/              read      -    -
GET    /api/v0/users/{id}/templates/autoscaler/          read      -    -
GET    /api/v0/serverless/endpoints/spend                read      -    2
GET    /api/v0/serverless/workergroups/spend             read      -    -
GET    /api/v1/instances/lite/                           read      -    -
GET    /api/v1/machines                                  read      -    -
GET    /api/v1/template/                                 read      -    -
GET    /api/v1/user/earnings/                            read      -    -
GET    /api/v1/user/earnings/chart/                      read      -    -
GET    /api/v1/user/earnings/summary/                    read      -    -
POST   /api/v0/team/members/{id}/roles/                  spend     -    -
PUT    /api/v0/team/members/{id}/roles/                  write     -    -
DELETE /api/v0/team/members/{id}/roles/                  write     -    -
PUT    /api/v0/team/                                     write     -    -
PUT    /api/v0/team/transfer/                            spend     -    -
PUT    /api/v0/subaccounts/regenerate_keys/              auth      -    -
PUT    /api/v0/machines/{id}/report/                     spend     -  1.2
DELETE /api/v0/commands/rsync/                           write     -    -
DELETE /api/v0/machines/maintenances/batch/              write     -    -
POST   /api/v0/machines/maintenances/batch/              spend     -    -
POST   /api/v0/users/cloud/                              auth      -    -
DELETE /api/v0/users/cloud/                              auth      -    -
POST   /api/v0/users/{id}/template/                      spend     -    -
POST   /api/v0/users/{id}/templates/                     spend     -    -
POST   /api/v1/templates/fetch-tags/                     auth      -    -
POST   /api/v1/templates/validate-auth/                  auth      -    -
GET    /api/v0/webhooks/                                 read      -    -
POST   /api/v0/webhooks/                                 spend     -    -
GET    /api/v0/webhooks/{id}/                            read      -    -
PUT    /api/v0/webhooks/{id}/                            write     -    2
DELETE /api/v0/webhooks/{id}/                            write     -    2
POST   /api/v0/webhooks/{id}/test/                       spend     -    -
POST   /api/v0/webhooks/{id}/rotate-secret/              auth      -    -
GET    /api/v0/notification-types/                       read      -    -
GET    /api/v0/users/{id}/notification-prefs/            read      -    -
PUT    /api/v0/users/{id}/notification-prefs/            write     -    -
# clusters and overlays
POST   /api/v0/cluster/                                  spend     -    -
PUT    /api/v0/cluster/                                  spend     -    -
DELETE /api/v0/cluster/                                  spend     -    -
DELETE /api/v0/cluster/remove_machine/                   spend     -    -
POST   /api/v0/overlay/                                  spend     -    -
PUT    /api/v0/overlay/                                  spend     -    -
DELETE /api/v0/overlay/                                  spend     -    -
# the serverless engine
POST   /get_endpoint_logs/                               read      -    -
POST   /get_autogroup_logs/                              read      -    -
POST   /get_workergroup_logs/                            read      -    -
POST   /get_endpoint_workers/                            read      -    -
POST   /get_workergroup_workers/                         read      -    -
POST   /update_workers/                                  spend     -    -
POST   /route/                                           spend     -    0
POST   /worker_status/                                   write     -    -
POST   /delete_requests/                                 write     -    -
GET    /pubkey/                                          read      -    -
"""


def _endpoints() -> list[tuple[str, str, str, float | None]]:
    found = []
    for line in _ENDPOINTS.strip().splitlines():
        if not line.startswith("#"):
            method, path, effect, *numbers = line.split()
            found.append((method, path, effect, max((float(n) for n in numbers if n != "-"), default=None)))
    return found


@pytest.fixture(scope="module")
def shipped() -> Routes:
    return Routes.build([yaml.safe_load(_SHIPPED.read_text())])


def _filled(path: str) -> str:
    for name, value in {
        "{id}": "4711",
        "{key}": "ssh-key",
        "{name}": "Some Role",
        "{hash}": "d41d8cd98f00b204",
    }.items():
        path = path.replace(name, value.replace(" ", "%20"))
    return path


@pytest.mark.parametrize(("method", "path", "effect", "interval"), _endpoints())
def test_each_endpoint_is_matched_as_documented_in_both_slash_forms(
    shipped: Routes, method: str, path: str, effect: str, interval: float | None
) -> None:
    route = shipped.match(method, _filled(path))
    assert (route.method, route.template, route.effect, route.listed) == (method, path, effect, True)
    if (method, path) == ("POST", "/api/v0/bundles/"):  # where a live answer is known
        assert (route.interval, route.capacity, route.penalty) == (2, 5, 4)
    else:
        assert (route.interval, route.capacity) == (interval, 1)
    other = _filled(path).removesuffix("/") if path.endswith("/") else _filled(path) + "/"
    assert shipped.match(method, other) is route
    assert shipped.match(method, other + "?owner=me") is route


def test_nothing_is_shipped_that_is_not_documented_here(shipped: Routes) -> None:
    documented = {(method, path) for method, path, _, _ in _endpoints()}
    assert len(documented) == len(_endpoints())
    assert {(route.method, route.template) for route in shipped} == documented


def test_what_is_shipped_is_coherent(shipped: Routes) -> None:
    for route in shipped:
        told = f"{route.method} {route.template}"
        assert not route.overridden, told
        assert bool(route.source) == (route.interval is not None and route.template != "/route/"), told
        assert (route.upstream == "serverless") == (not route.template.startswith("/api/")), told
        assert route.is_read or route.family is None, told
        if route.is_read or (route.effect is Effect.AUTH and route.method == "GET"):
            assert not route.invalidates, told
        if route.spends or not (route.is_read or route.may_be_replayed or not route.invalidates):
            assert route.check, told
            assert route.check[-1] not in ".:", told
    used = {route.family.name for route in shipped if route.family}
    voided = {name for route in shipped for name in route.invalidates}
    assert used == set(shipped.families)
    assert voided <= {ALL, *shipped.families}


@pytest.mark.parametrize(
    ("method", "path", "invalidates"),
    [
        ("PUT", "/api/v0/asks/5/", "instances offers account volumes"),
        ("PUT", "/api/v0/bundles/5/", "instances offers account volumes"),
        ("POST", "/api/v0/asks/bulk/", "instances offers account volumes"),
        ("DELETE", "/api/v0/instances/5/", "instances offers account volumes"),
        ("PUT", "/api/v0/instances/bid_price/5/", "instances offers account"),
        ("PUT", "/api/v0/instances/5/", "instances account"),
        ("PUT", "/api/v0/instances/reboot/5/", "instances account"),
        ("DELETE", "/api/v0/volumes/?id=5", "volumes volume_offers instances account"),
        ("POST", "/api/v0/ssh/", "ssh_keys account"),
        ("DELETE", "/api/v0/instances/5/ssh/6/", "instances"),
        ("POST", "/api/v0/endptjobs/", "endpoints instances"),
        ("POST", "/update_workers/", "endpoints instances"),
        ("DELETE", "/api/v0/template/", "templates"),
        ("PUT", "/api/v0/machines/5/minbid/", "machines offers volume_offers"),
        ("PUT", "/api/v0/commands/transfer_credit/", "account team billing"),
        ("POST", "/api/v0/commands/rclone/", "jobs instances"),
        ("POST", "/api/v0/cluster/", "all"),
        ("PUT", "/api/v0/commands/reset_apikey/", "all"),
        ("POST", "/route/", ""),
    ],
)
def test_a_write_voids_what_it_changes(shipped: Routes, method: str, path: str, invalidates: str) -> None:
    assert shipped.match(method, path).invalidates == set(invalidates.split())


def test_the_market_is_the_same_for_all_and_ages_as_the_settings_say(shipped: Routes) -> None:
    assert {family.name for family in shipped.families.values() if family.market} == {"offers", "volume_offers"}
    assert shipped.families["offers"] == Family("offers", ttl=None, stale_for=None, market=True)


def test_what_is_polled_is_never_served_older_than_the_vendor_lets_it_be_asked(shipped: Routes) -> None:
    for route in shipped:
        if route.family is not None and route.family.name in ("instances", "endpoints"):
            assert route.family.ttl is not None
            assert route.family.ttl <= (route.interval or 2)
            assert route.family.stale_for == 0


def test_only_two_factor_and_invitations_hand_their_429_on(shipped: Routes) -> None:
    handed_on = {route.template for route in shipped if route.pass_429}
    assert handed_on == {"/api/v0/team/invite/"} | {
        r.template for r in shipped if r.template.startswith("/api/v0/tfa/")
    }


def test_a_workers_own_calls_are_refused(shipped: Routes) -> None:
    assert {route.template for route in shipped if route.refused} == {
        "/worker_status/",
        "/delete_requests/",
        "/pubkey/",
    }


def test_a_rented_offer_has_its_penalty(shipped: Routes) -> None:
    assert shipped.match("PUT", "/api/v0/asks/5/").penalty == 12


@pytest.mark.parametrize(
    ("effect", "method", "is_read", "spends", "may_be_replayed"),
    [
        ("read", "GET", True, False, True),
        ("search", "POST", True, False, True),
        ("write", "PUT", False, False, True),
        ("spend", "PUT", False, True, False),
        ("auth", "GET", False, False, True),
        ("auth", "POST", False, False, False),
        ("auth", "DELETE", False, False, False),
    ],
)
def test_the_effect_says_what_may_be_done_twice(
    effect: str, method: str, is_read: bool, spends: bool, may_be_replayed: bool
) -> None:
    route = _one({"route": f"{method} /a/", "effect": effect})
    assert (route.is_read, route.spends, route.may_be_replayed) == (is_read, spends, may_be_replayed)


# --- Matching


def _one(*entries: dict[str, Any], families: dict[str, Any] | None = None) -> Route:
    (route,) = Routes.build([{"families": families or {}, "routes": [entry]} for entry in entries])
    return route


_SMALL = Routes.build(
    [
        {
            "routes": [
                {"route": "GET /a/{word}/", "effect": "read"},
                {"route": "PUT /a/{word}/", "effect": "write"},
                {"route": "GET /a/one/", "effect": "read"},
                {"route": "GET /a/{word}/b", "effect": "read"},
                {"route": "GET /a/one/c/", "effect": "read"},
                {"route": "GET /", "effect": "read"},
                {"route": "DELETE /r/{name}/x/{key}/", "effect": "write"},
            ]
        }
    ]
)


def test_an_id_is_a_number_so_that_a_verb_nobody_listed_is_not_taken_for_one() -> None:
    routes = Routes.build([{"routes": [{"route": "PUT /a/{id}/", "effect": "write"}]}])
    assert routes.match("PUT", "/a/42/").listed
    assert not routes.match("PUT", "/a/explode/").listed
    assert not routes.match("PUT", "/a/\u0664\u0662/").listed


@pytest.mark.parametrize(
    ("method", "target", "template"),
    [
        ("GET", "/a/5", "/a/{word}/"),
        ("GET", "/a/one/?q=/x/%2F", "/a/one/"),
        ("GET", "/a/%6fne", "/a/one/"),
        ("GET", "/a/one/b/", "/a/{word}/b"),
        ("GET", "/a/one/c", "/a/one/c/"),
        ("PUT", "/a/one", "/a/{word}/"),
        ("HEAD", "/a/one", "/a/one/"),
        ("GET", "/", "/"),
        ("GET", "/?x=1", "/"),
        ("GET", "", "/"),
        ("GET", "/a/%FF%", "/a/{word}/"),
        ("GET", "/a/\udc80", "/a/{word}/"),
        ("DELETE", "/r/Some%20Role/x/5", "/r/{name}/x/{key}/"),
    ],
)
def test_a_literal_segment_wins_over_a_parameter_and_the_query_does_not_count(
    method: str, target: str, template: str
) -> None:
    route = _SMALL.match(method, target)
    assert route.listed
    assert route.template == template
    assert route.method == {"HEAD": "GET"}.get(method, method)


@pytest.mark.parametrize(
    "target",
    [
        "/a//",
        "/a",
        "//a/5",
        "/a//5",
        "/A/5",
        "/a/5/b/c",
        "/a/5/%62%2F",
        "/a%2F5",
        "/a/x%2Fone",
        "/a/..",
        "/a/%2e%2E/",
        "/a/./",
    ],
)
def test_a_path_that_is_not_quite_a_listed_one_is_not_listed(target: str) -> None:
    route = _SMALL.match("PUT", target)
    assert not route.listed
    assert route.spends
    assert route.invalidates == {ALL}


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "BREW", "get"])
def test_what_is_not_listed_is_a_read_if_its_method_is_safe_and_else_a_spend(method: str) -> None:
    route = _SMALL.match(method, "/api/v0/new/12/")
    safe = method in ("GET", "HEAD", "OPTIONS")
    assert route.method == method
    assert route.template == "/api/v0/new/{id}/"
    assert route.effect is (Effect.READ if safe else Effect.SPEND)
    assert route.invalidates == (set() if safe else {ALL})
    assert (route.interval, route.family, route.upstream, route.listed) == (None, None, "api", False)


@pytest.mark.parametrize(
    ("target", "template"),
    [
        ("/api/v9/instances", "/api/v9/instances/"),
        ("/x/4711/y/", "/x/{id}/y/"),
        ("/x/deadbeef", "/x/{id}/"),
        ("/x/facade", "/x/facade/"),
        ("/x/0b3f0e0c-63f4-4a57-8a3e-0d8d7f1b2a10", "/x/{id}/"),
        ("/x/some-name_one", "/x/some-name_one/"),
        ("/x/s3cretTok_en-XYZ", "/x/{id}/"),
        ("/x/file.json", "/x/{id}/"),
        ("/x/me%40example.com", "/x/{id}/"),
        ("/x/a%2Fb", "/x/{id}/"),
        ("/x/\u0661\u0662", "/x/{id}/"),
        ("/x/" + "n" * 32, "/x/" + "n" * 32 + "/"),
        ("/x/" + "n" * 33, "/x/{id}/"),
        ("/1/2/3/4/5/6/7/8", "/{id}" * 8 + "/"),
        ("/a/b/c/d/e/f/g/h/i", "/a/b/c/d/e/f/g/h/..."),
        ("/x?key=secret", "/x/"),
        ("*", "/"),
    ],
)
def test_ids_in_a_path_that_is_not_listed_share_one_template(target: str, template: str) -> None:
    assert _SMALL.match("POST", target).template == template


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("/%.?2Fa"), max_size=12), st.text(max_size=5))
def test_no_target_makes_matching_fail(target: str, method: str) -> None:
    route = _SMALL.match(method, "/" + target)
    assert parameter(route, "/" + target) is not None


@pytest.mark.parametrize(
    ("method", "target", "values"),
    [
        ("GET", "/a/5?x=1", ("5",)),
        ("GET", "/a/one", ()),
        ("DELETE", "/r/Some%20Role/x/%C3%A9/", ("Some Role", "\u00e9")),
        ("POST", "/new/12/name/34", ("12", "34")),
        ("GET", "/", ()),
    ],
)
def test_the_values_of_the_parameters_are_decoded(method: str, target: str, values: tuple[str, ...]) -> None:
    assert parameter(_SMALL.match(method, target), target) == values


# --- Tables


def test_an_entry_needs_only_its_route_and_effect() -> None:
    route = _one({"route": "PUT /a/{id}/", "effect": "spend"})
    assert route == Route(
        method="PUT",
        template="/a/{id}/",
        effect=Effect.SPEND,
        interval=None,
        capacity=1,
        penalty=0.0,
        source="",
        family=None,
        invalidates=frozenset({ALL}),
        upstream="api",
        pass_429=False,
        check="",
        refused=False,
        collapse=True,
        listed=True,
        overridden=False,
    )


def test_a_later_table_replaces_the_fields_it_names_and_nothing_else() -> None:
    shipped = {
        "route": "PUT /a/{id}/",
        "effect": "spend",
        "interval": 4.5,
        "penalty": 12,
        "source": "M",
        "check": "look",
    }
    route = _one(shipped, {"route": "PUT /a/{other}", "interval": "1.5m"})
    assert (route.template, route.effect, route.penalty, route.check) == ("/a/{id}/", Effect.SPEND, 12, "look")
    assert (route.interval, route.source, route.overridden) == (90, "configured", True)


def test_a_table_that_names_no_number_leaves_them_documented() -> None:
    route = _one(
        {"route": "GET /a/", "effect": "read", "interval": 2, "source": "M"}, {"route": "GET /a", "pass_429": True}
    )
    assert route.pass_429
    assert (route.source, route.overridden) == ("M", False)


def test_null_takes_an_interval_and_a_family_back() -> None:
    shipped = {"route": "GET /a/", "effect": "read", "interval": 2, "source": "M", "cache": "things"}
    route = _one(shipped, {"route": "GET /a/", "interval": None, "cache": None}, families={"things": {"ttl": 1}})
    assert (route.interval, route.source, route.overridden, route.family) == (None, "", False, None)


def test_a_later_table_adds_routes_and_families() -> None:
    routes = Routes.build(
        [
            {"families": {"a": {"ttl": "search", "stale_for": "search", "market": True}}, "routes": []},
            {"families": {"a": {"ttl": "2s"}, "b": {"ttl": "1d"}}},
            {"routes": [{"route": "POST /b/", "effect": "search", "cache": "b", "interval": 3}]},
        ]
    )
    assert routes.families["a"] == Family("a", ttl=2, stale_for=None, market=True)
    assert routes.families["b"] == Family("b", ttl=86400, stale_for=0, market=False)
    assert repr(routes) == "<Routes 1 routes, 2 families>"
    route = routes.match("POST", "/b")
    assert route.family == routes.families["b"]
    assert (route.source, route.overridden) == ("configured", True)


def test_nothing_at_all_is_a_table_too() -> None:
    assert len(Routes.build([])) == len(Routes.build([{}, {"families": None, "routes": None}])) == 0


_GOOD: dict[Any, Any] = {"route": "GET /a/", "effect": "read"}


@pytest.mark.parametrize(
    ("entry", "field", "message"),
    [
        ({"effect": "read"}, "route", "expected a method and a path"),
        ("GET /a/", "route", "expected a mapping, not 'GET /a/'"),
        ({**_GOOD, "route": "/a/"}, "route", r"such as \"PUT /api/v0/asks/\{id\}/\", not '/a/'"),
        ({**_GOOD, "route": "get /a/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET a/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET  /a/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a//b/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a/?x=1"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a/%20/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a/../"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a/{}/"}, "route", "expected a method"),
        ({**_GOOD, "route": "GET /a/x{id}/"}, "route", "expected a method"),
        ({**_GOOD, "route": 5}, "route", "expected a string, not 5"),
        ({"route": "GET /a/"}, "effect", "expected one of read, search, write, spend, auth"),
        ({**_GOOD, "effect": "sped"}, "effect", "unknown value 'sped'; did you mean \"spend\""),
        ({**_GOOD, "effect": ["read"]}, "effect", "expected one of read, search, write, spend, auth"),
        ({**_GOOD, "interval": -1}, "interval", "expected a duration.*, not -1"),
        ({**_GOOD, "interval": "soon"}, "interval", "expected a duration.*, not 'soon'"),
        ({**_GOOD, "capacity": 0}, "capacity", "expected a whole number of 1 or more, not 0"),
        ({**_GOOD, "capacity": 1.5}, "capacity", "expected a whole number of 1 or more, not 1.5"),
        ({**_GOOD, "capacity": True}, "capacity", "expected a whole number"),
        ({**_GOOD, "penalty": -1}, "penalty", "expected a number of 0 or more, not -1"),
        ({**_GOOD, "penalty": float("nan")}, "penalty", "expected a number of 0 or more"),
        ({**_GOOD, "cache": "ofers"}, "cache", "unknown value 'ofers'; did you mean \"offers\""),
        ({**_GOOD, "effect": "write", "cache": "offers"}, "cache", "only a read or a search is stored, not a write"),
        ({**_GOOD, "invalidates": "all"}, "invalidates", "expected a list, not 'all'"),
        ({**_GOOD, "invalidates": ["al"]}, "invalidates", 'did you mean "all"'),
        ({**_GOOD, "upstream": "worker"}, "upstream", "expected one of api, serverless"),
        ({**_GOOD, "pass_429": 1}, "pass_429", "expected true or false, not 1"),
        ({**_GOOD, "refuse": None}, "refuse", "expected true or false"),
        ({**_GOOD, "check": 5}, "check", "expected a string, not 5"),
        ({**_GOOD, "intervall": 5}, "intervall", "unknown field 'intervall'; did you mean \"interval\""),
        ({**_GOOD, 5: 5}, "5", "unknown field 5"),
        ({"route": "GET /first", "effect": "read"}, "route", "stands in this table twice"),
        ({"route": "GET /{x}", "effect": "read"}, "route", "stands in this table twice"),
    ],
)
def test_a_wrong_entry_is_named_with_what_was_expected(entry: object, field: str, message: str) -> None:
    first = [{"route": "GET /first/", "effect": "read"}, {"route": "GET /{any}/", "effect": "read"}]
    with pytest.raises(RouteError, match=message) as caught:
        Routes.build([{}, {"families": {"offers": {"ttl": "search"}}, "routes": [*first, entry]}])
    error = caught.value
    assert (error.table, error.index, error.field) == (1, 2, field)
    assert str(error) == f"routes[2].{field}: {error.message}"


_NUMBERED: dict[object, object] = {5: {"ttl": 1}}


@pytest.mark.parametrize(
    ("table", "field", "message"),
    [
        ([], "table", "expected a mapping"),
        ({"route": []}, "route", "unknown field 'route'; did you mean \"routes\""),
        ({"routes": {"a": 1}}, "routes", "expected a list"),
        ({"routes": ""}, "routes", "expected a list"),
        ({"families": ["a"]}, "families", "expected a mapping"),
        ({"families": False}, "families", "expected a mapping"),
        ({"families": _NUMBERED}, "families.5", "expected a name"),
        ({"families": {"a": 5}}, "families.a", "expected a mapping, not 5"),
        ({"families": {"all": {"ttl": 1}}}, "families.all", "means every family"),
        ({"families": {"a": {}}}, "families.a.ttl", "a new family needs one"),
        ({"families": {"a": {"ttl": "serch"}}}, "families.a.ttl", "expected a duration"),
        ({"families": {"a": {"ttl": None}}}, "families.a.ttl", "expected a duration"),
        ({"families": {"a": {"ttl": 1, "stale": 1}}}, "families.a.stale", 'did you mean "stale_for"'),
        ({"families": {"a": {"ttl": 1, "market": "yes"}}}, "families.a.market", "expected true or false"),
    ],
)
def test_what_is_wrong_outside_of_the_entries_is_named_too(table: Any, field: str, message: str) -> None:
    with pytest.raises(RouteError, match=message) as caught:
        Routes.build([table])
    assert (caught.value.index, caught.value.field) == (None, field)
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize("target", ["/", "/api/v0/instances/42/?a=%2F;", "/team/roles/my%20role-1.0_x~@:,+/", "/a b/"])
def test_a_plain_path_is_one_that_nobody_reads_in_two_ways(target: str) -> None:
    assert is_plain(target)


@pytest.mark.parametrize(
    "target",
    [
        "/a//b/", "/./a", "/a/..", "/a%2Fb/", "/a%5Cb", "/a\\b", "/a;b/", "/a%3Bb", "/%2541/", "/a%20/", "/%20a/",
        "/a%00/", "/%D9%A4/", "/%EF%BC%8E/", "/a%0Ab/", "/a%3Fb", "/a%23b", "/%ff/", "/a%7Cb", "/a<b>/", "/é/",
    ],
)  # fmt: skip
def test_any_other_is_not_plain(target: str) -> None:
    assert not is_plain(target)


def test_the_words_of_a_path_are_found_however_they_are_put_together() -> None:
    assert letters_of("/api/v0/Reset-ApiKey_2/x") >= {"api", "reset", "apikey", "resetapikey", "x"}
    assert letters_of("/api/v0/%61uth.json?users") == {"api", "v", "auth", "json", "authjson"}


def test_versions_of_any_number_are_left_out_of_a_paths_words() -> None:
    assert words_of("/api/v12/Users/7/") == words_of("/v1/users/7") == words_of("/users/7/") == ["users", "7"]
    assert words_of("/api/vx/users") == ["vx", "users"]


def test_a_path_is_like_every_listed_route_of_its_shape_whatever_its_method_and_version() -> None:
    routes = Routes.build([yaml.safe_load(_SHIPPED.read_text())])
    put = {route.name for route in routes.alike("PATCH", "/api/v3/instances/x/")}
    assert put == {f"{method} /api/v0/instances/{{id}}/" for method in ("GET", "PUT", "DELETE")}
    assert [route.name for route in routes.alike("HEAD", "/API/v3/instances/x/")] == ["GET /api/v0/instances/{id}/"]
    assert routes.alike("GET", "/api/v0/instances/x/y/z/") == ()
