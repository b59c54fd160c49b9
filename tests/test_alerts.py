"""The alerts beside the Compose file: that they are about what there is, and that each of them is explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Start
from test_docs import codes_in_the_code
from test_metrics import busy

from proxy.settings import ServerRules, load

CHECKOUT = Path(__file__).parent.parent
[GROUP] = yaml.safe_load((CHECKOUT / "deploy/alerts.yml").read_text("utf-8"))["groups"]
RULES: list[dict[str, Any]] = GROUP["rules"]
NAMES = [rule["alert"] for rule in RULES]
PAGE = (CHECKOUT / "docs/operations.md").read_text("utf-8")


@pytest.mark.looptime
async def test_every_metric_and_label_of_an_alert_is_one_of_ours(start: Start) -> None:
    text = (await (await busy(start)).get("/_proxy/metrics")).body.decode()
    names = set(re.findall(r"^([a-z_]+)", text, re.MULTILINE)) | {"up"}
    labels = set(re.findall(r'[{,]([a-z]+)="', text)) | {"instance", "job"}
    for rule in RULES:
        used = set(re.findall(r"\b(?:vast_proxy_[a-z_]+|up\b)", rule["expr"]))
        assert used
        assert used <= names, rule["alert"]
        told = rule["annotations"]["summary"]
        asked = re.findall(r"[{,]\s*([a-z]+)(?:=|!=|=~)\"", rule["expr"])
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(", ")]
        shown = re.findall(r"\$labels\.(\w+)", told)
        assert {*asked, *grouped, *shown} <= labels, rule["alert"]
        if grouped:
            assert set(shown) <= set(grouped), f"{rule['alert']}: what is not grouped by is not there to be shown"


def test_counters_are_looked_at_as_what_was_added_and_gauges_are_not() -> None:
    for rule in RULES:
        for name in re.findall(r"\bvast_proxy_[a-z_]+", rule["expr"]):
            rated = re.search(rf"(?:rate|increase)\(\s*{name}\b", rule["expr"]) is not None
            assert rated == name.endswith(("_total", "_bucket")), rule["alert"]


def test_a_start_raises_no_alert_about_errors() -> None:
    """A count that is there at 0 is new as well: only its increase says something."""
    for rule in RULES:
        if "vast_proxy_errors_total" in rule["expr"]:
            assert re.fullmatch(r"increase\(vast_proxy_errors_total\{[^}]*\}\[10m\]\) > \d+", rule["expr"]), rule[
                "alert"
            ]


def test_every_code_and_route_of_an_alert_exists() -> None:
    routes = {route.template for route in load(None, {"HOME": "/"}, {}).routes if route.spends}
    for rule in RULES:
        for codes in re.findall(r'code=~?"([^"]+)"', rule["expr"]):
            assert set(codes.split("|")) <= codes_in_the_code(), rule["alert"]
        for pattern in re.findall(r'route=~"([^"]+)"', rule["expr"]):
            matched = {route for route in routes if re.fullmatch(pattern, route)}
            assert matched == {
                "/api/v0/asks/{id}/",
                "/api/v0/asks/bulk/",
                "/api/v0/bundles/{id}/",
                "/api/v0/launch_instance/",
            }


def test_the_alert_about_connections_is_about_the_bound_as_shipped() -> None:
    [rule] = [rule for rule in RULES if rule["alert"] == "VastProxyConnections"]
    assert rule["expr"] == f"vast_proxy_client_connections > {int(ServerRules().max_connections * 0.9)}"


def test_every_alert_is_explained_and_no_other() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert re.findall(r"^\| `(VastProxy\w+)`", PAGE, re.MULTILINE) == NAMES
    assert {rule["labels"]["severity"] for rule in RULES} == {"warning", "critical"}
