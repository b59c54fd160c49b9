"""What stands beside the Compose file: that it names what there is."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Start
from test_metrics import busy

CHECKOUT = Path(__file__).parent.parent
BOARD = json.loads((CHECKOUT / "deploy/grafana/vast-proxy.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def read(name: str) -> Any:
    return yaml.safe_load((CHECKOUT / name).read_text("utf-8"))


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
