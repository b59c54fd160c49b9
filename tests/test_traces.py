"""Traces: which spans there are of a request, when, below what, and that nobody pays or is told without them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Gateway, Start, clean_environment
from fake_vast import Fault
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from proxy.app import tracing_for
from proxy.tracing import CLOSES_IN, Tracing

looptime = pytest.mark.looptime
SSH = "/api/v0/ssh/"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = "0123456789abcdef" * 4


class Told:
    """What was exported."""

    def __init__(self, gateway: Gateway) -> None:
        self.exporter = InMemorySpanExporter()
        gateway.app.trace(Tracing(gateway.app.clock, SimpleSpanProcessor(self.exporter), "1"))

    def spans(self) -> list[ReadableSpan]:
        """The exchange's first, then its children by their start."""
        return sorted(
            self.exporter.get_finished_spans(), key=lambda span: (span.kind is not SpanKind.SERVER, began(span))
        )


def began(span: ReadableSpan) -> float:
    assert span.start_time is not None
    return span.start_time / 1e9


def lasted(span: ReadableSpan) -> float:
    assert span.end_time is not None
    return span.end_time / 1e9 - began(span)


def told_of(span: ReadableSpan) -> Mapping[str, Any]:
    return dict(span.attributes or {})


def name(span: ReadableSpan) -> tuple[str, str, str]:
    """Trace, span and parent, in hexadecimal."""
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", f"{span.parent.span_id:016x}" if span.parent else ""


def traceparent(gateway: Gateway) -> str:
    """What upstream was told last."""
    return dict(gateway.fake.calls()[-1].headers).get("traceparent", "")


@looptime
async def test_an_exchange_is_a_span_with_a_child_for_each_wait_and_each_try(start: Start) -> None:
    gateway = await start()
    told = Told(gateway)
    gateway.fake.faults += [
        Fault(match=f"GET {SSH}", kind="refuse429", form="json_retry_after", retry_after=7),
        Fault(match=f"GET {SSH}", kind="slow", delay=2),
    ]
    at = gateway.app.clock.wall()
    await gateway.get(SSH, headers={"X-Request-ID": "mine"})
    whole, *children = told.spans()
    assert whole.name == f"GET {SSH}"
    assert [(child.name, child.kind) for child in children] == [
        ("wait for a turn", SpanKind.INTERNAL),
        ("GET upstream", SpanKind.CLIENT),
    ] * 2
    trace, span, parent = name(whole)
    assert parent == ""
    assert [name(child)[::2] for child in children] == [(trace, span)] * 4
    first_wait, first_try, second_wait, second_try = children
    assert began(whole) == pytest.approx(at, abs=0.1)
    assert lasted(whole) == pytest.approx(9, abs=0.2)
    assert lasted(first_wait) == pytest.approx(0, abs=0.1)
    assert lasted(second_wait) == pytest.approx(7, abs=0.1)
    assert lasted(second_try) == pytest.approx(2, abs=0.1)
    assert began(second_try) == pytest.approx(at + 7, abs=0.2)
    assert [told_of(one).get("http.response.status_code") for one in (whole, first_try, second_try)] == [200, 429, 200]
    assert [told_of(one).get("http.request.resend_count") for one in (first_try, second_try)] == [None, 1]
    assert first_try.status.status_code is StatusCode.ERROR
    assert whole.status.status_code is StatusCode.UNSET
    assert told_of(whole)["vast_proxy.request_id"] == "mine"
    assert told_of(whole)["vast_proxy.cache"] == "miss"
    assert told_of(whole)["http.route"] == SSH


@looptime
async def test_it_goes_on_from_the_clients_span_and_upstream_from_ours(start: Start) -> None:
    gateway = await start(fast=True)
    told = Told(gateway)
    await gateway.get(SSH, headers={"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=b"})
    whole = told.spans()[0]
    assert name(whole)[::2] == (TRACE, SPAN)
    assert traceparent(gateway) == f"00-{TRACE}-{name(whole)[1]}-01"
    assert ("tracestate", "a=b") in gateway.fake.calls()[-1].headers


@looptime
@pytest.mark.parametrize("given", ["", "nonsense", f"00-{'0' * 32}-{SPAN}-01"])
async def test_without_a_valid_one_it_begins_a_trace_of_its_own(start: Start, given: str) -> None:
    gateway = await start(fast=True)
    told = Told(gateway)
    for path in ("/api/v0/users/current/", SSH):
        await gateway.get(path, headers={"traceparent": given} if given else {})
    wholes = [span for span in told.spans() if span.kind is SpanKind.SERVER]
    assert len({name(whole)[0] for whole in wholes}) == 2
    assert traceparent(gateway) == f"00-{name(wholes[1])[0]}-{name(wholes[1])[1]}-01"


@looptime
async def test_what_the_client_does_not_record_is_not_recorded_and_said_so(start: Start) -> None:
    gateway = await start(fast=True)
    told = Told(gateway)
    await gateway.get(SSH, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert told.spans() == []
    assert traceparent(gateway).startswith(f"00-{TRACE}-")
    assert traceparent(gateway).endswith("-00")


@looptime
async def test_where_nobody_traces_it_passes_as_it_came(start: Start) -> None:
    gateway = await start(fast=True)
    given = f"00-{TRACE}-{SPAN}-01"
    await gateway.get(SSH, headers={"traceparent": given})
    assert traceparent(gateway) == given
    await gateway.get("/api/v0/users/current/")
    assert traceparent(gateway) == ""


@looptime
async def test_a_hit_and_a_shared_call_have_no_children(start: Start) -> None:
    gateway = await start()
    told = Told(gateway)
    await asyncio.gather(gateway.get(SSH), gateway.get(SSH))
    await gateway.get(SSH)
    spans = told.spans()
    assert [told_of(span)["vast_proxy.cache"] for span in spans[:3]] == ["miss", "collapsed", "hit"]
    parents = {name(child)[2] for child in spans[3:]}
    assert parents == {name(spans[0])[1]}


@looptime
async def test_who_is_turned_away_has_a_wait_and_no_try(start: Start) -> None:
    gateway = await start(queue={"max_wait": "6s"})
    told = Told(gateway)
    body = {"client_id": "me", "image": "x", "disk": 10}
    answers = await asyncio.gather(*(gateway.put(gateway.offer(number), body) for number in range(3)))
    assert sorted(answer.status for answer in answers) == [200, 200, 429]
    turned_away = next(span for span in told.spans() if told_of(span).get("error.type") == "wait_too_long")
    [wait] = [span for span in told.spans() if name(span)[2] == name(turned_away)[1]]
    assert wait.name == "wait for a turn"
    assert wait.status.description == "turned away"


@looptime
async def test_a_call_without_an_answer_is_an_error(start: Start) -> None:
    gateway = await start(fast=True)
    told = Told(gateway)
    gateway.fake.faults.append(Fault(kind="drop_after"))
    await gateway.put(gateway.offer(), {"client_id": "me", "image": "x", "disk": 10})
    whole, _, call = told.spans()
    assert call.status.description == "no answer"
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "outcome_unknown")


@looptime
async def test_neither_a_key_nor_a_path_is_in_a_span(start: Start) -> None:
    gateway = await start(fast=True)
    told = Told(gateway)
    await gateway.get(f"/api/v0/instances/4711/?api_key={KEY}", key=KEY)
    text = "".join(span.to_json() for span in told.spans())
    assert KEY not in text
    assert "4711" not in text
    assert len(told.spans()) == 3


@looptime
async def test_our_own_pages_are_no_exchanges(start: Start) -> None:
    gateway = await start()
    told = Told(gateway)
    await gateway.get("/_proxy/status")
    assert told.spans() == []


# --- To a collector, in real time -------------------------------------------------------------------------------------


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, self.headers["Content-Type"], body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize("how", ["setting", "variable"])
async def test_spans_reach_the_collector_before_the_proxy_has_ended(start: Start, how: str) -> None:
    with Collector() as collector:
        given = {"tracing": {"otlp": collector.url}} if how == "setting" else {}
        variables = {} if given else {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            gateway: Gateway = await start(fast=True, **given)
            tracing = tracing_for(gateway.app, variables)
        assert tracing is not None
        gateway.app.trace(tracing)
        await gateway.get(SSH)
        await gateway.app.stop()
        [(path, kind, body)] = collector.seen
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert b"wait for a turn" in body
    assert b"vast-proxy" in body


async def test_a_collector_that_is_away_does_not_hold_up_the_end(start: Start) -> None:
    gateway: Gateway = await start(fast=True, tracing={"otlp": "http://127.0.0.1:9"})
    tracing = tracing_for(gateway.app, {})
    assert tracing is not None
    gateway.app.trace(tracing)
    await gateway.get(SSH)
    before = time.monotonic()
    await gateway.app.stop()
    assert time.monotonic() - before < CLOSES_IN + 2


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
async def test_it_is_off_unless_somebody_wants_it(start: Start, environ: dict[str, str]) -> None:
    gateway = await start()
    assert tracing_for(gateway.app, environ) is None


def test_without_the_extra_the_start_fails_with_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None; from proxy.__main__ import main; sys.exit(main(['serve']))"
    )
    settings = {
        "VAST_PROXY_TRACING__OTLP": "http://127.0.0.1:9",
        "VAST_PROXY_LISTEN": "127.0.0.1:0",
        "VAST_PROXY_STATE__FILE": str(tmp_path / "state.json"),
    }
    got = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (got.returncode, got.stdout) == (2, "")
    assert "pip install 'vast-proxy[otel]'" in got.stderr
    assert "Traceback" not in got.stderr
