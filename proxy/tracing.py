"""Traces by OpenTelemetry: a span for each exchange, with children for each wait and each try.

Spans are made when the exchange has ended, from the times that it carries, so that the path of a request knows nothing
of them. Only the names are made at its beginning, for upstream is told them. Needs the extra `vast-proxy[otel]`, and is
imported only where somebody wants traces.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from .clock import Clock
from .policy import tracing
from .policy.messages import Exchange, Step, Trace

CLOSES_IN = 5.0
"""Seconds that the last spans have to reach the collector when the proxy ends."""


def exporter(otlp: str | None) -> BatchSpanProcessor:
    """To a collector by OTLP over HTTP: to that origin, or as the standard variables say."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{otlp}/v1/traces" if otlp else None))


class Tracing:
    """Owns the tracer and what has not yet been handed over."""

    def __init__(self, clock: Clock, processor: SpanProcessor, version: str) -> None:
        """`processor`: who gets the spans."""
        self._clock = clock
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "vast-proxy", "service.version": version}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("vast-proxy", version)

    def begin(self, traceparent: str | None) -> Trace:
        """The place of an exchange that begins: below its client's, or in a trace of its own."""
        client = tracing.read(traceparent)
        if client is None:
            trace_id, parent_id = f"{self._ids.random.generate_trace_id():032x}", ""
        else:
            trace_id, parent_id = client[:2]
        parent = _parent(trace_id, parent_id, sampled=client is not None and client[2])
        decision = self._provider.sampler.should_sample(parent, int(trace_id, 16), "request").decision
        return Trace(
            trace_id, f"{self._ids.random.generate_span_id():016x}", parent_id, decision is Decision.RECORD_AND_SAMPLE
        )

    def observe(self, exchange: Exchange) -> None:
        """Record one exchange."""
        trace = exchange.trace
        if trace is None or not trace.sampled or exchange.effect == "admin":
            return
        end = exchange.began + exchange.total
        offset = self._clock.wall() - self._clock.now()
        name = f"{exchange.method} {exchange.route}" if exchange.route else exchange.method
        with self._ids.next(trace):
            whole = self._tracer.start_span(
                name,
                _parent(trace.trace_id, trace.parent_id, sampled=True),
                SpanKind.SERVER,
                _attributes(exchange),
                start_time=_ns(exchange.began + offset),
            )
        if exchange.status >= 500 or exchange.left:
            whole.set_status(Status(StatusCode.ERROR, exchange.code or ("the client left" if exchange.left else None)))
        inside = set_span_in_context(whole, Context())
        for number, step in enumerate(exchange.steps, 1):
            self._record(step, number, exchange, inside, offset)
        whole.end(_ns(end + offset))

    def _record(self, step: Step, number: int, exchange: Exchange, inside: Context, offset: float) -> None:
        granted = step.ended if step.granted is None else step.granted
        waiting = self._tracer.start_span("wait for a turn", inside, start_time=_ns(step.began + offset))
        if step.granted is None:
            waiting.set_status(Status(StatusCode.ERROR, "turned away"))
        waiting.end(_ns(granted + offset))
        if step.granted is None:
            return
        attributes: dict[str, str | int] = {
            "http.request.method": exchange.method,
            "http.route": exchange.route,
            "vast_proxy.upstream": exchange.origin,
        }
        if number > 1:
            attributes["http.request.resend_count"] = number - 1
        if step.status:
            attributes["http.response.status_code"] = step.status
        call = self._tracer.start_span(
            f"{exchange.method} upstream", inside, SpanKind.CLIENT, attributes, start_time=_ns(granted + offset)
        )
        if not step.status or step.status >= 400:
            call.set_status(Status(StatusCode.ERROR, None if step.status else "no answer"))
        call.end(_ns(step.ended + offset))

    async def close(self) -> None:
        """Hand over what is left, or give it up: a collector that is away must not hold up the end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        until = self._clock.now() + CLOSES_IN
        while closing.is_alive() and self._clock.now() < until:
            await self._clock.sleep(0.02)


class _Ids(IdGenerator):
    """By chance, but for the span whose name was made when its exchange began."""

    def __init__(self) -> None:
        self.random = RandomIdGenerator()
        self._next: Trace | None = None

    def next(self, trace: Trace) -> _Ids:
        """A context: the span that is made within it has these names."""
        self._next = trace
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self._next = None

    def generate_span_id(self) -> int:
        return int(self._next.span_id, 16) if self._next is not None else self.random.generate_span_id()

    def generate_trace_id(self) -> int:
        return int(self._next.trace_id, 16) if self._next is not None else self.random.generate_trace_id()


def _parent(trace_id: str, parent_id: str, *, sampled: bool) -> Context:
    """The client's span, or nothing at all: never what happens to be current."""
    if not parent_id:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    client: Span = NonRecordingSpan(
        SpanContext(int(trace_id, 16), int(parent_id, 16), is_remote=True, trace_flags=flags)
    )
    return set_span_in_context(client, Context())


def _attributes(exchange: Exchange) -> Mapping[str, str | int | bool]:
    """What its log line has: no key, no path."""
    attributes: dict[str, str | int | bool] = {
        "http.request.method": exchange.method,
        "http.response.status_code": exchange.status,
        "http.response.body.size": exchange.bytes_out,
        "vast_proxy.request_id": exchange.request_id,
        "vast_proxy.effect": str(getattr(exchange.effect, "value", exchange.effect)),
        "vast_proxy.cache": exchange.cache.value,
        "vast_proxy.attempts": exchange.attempts,
        "vast_proxy.refusals": exchange.refusals,
    }
    if exchange.route:
        attributes["http.route"] = exchange.route
    if exchange.caller:
        attributes["vast_proxy.caller"] = exchange.caller
    if exchange.code:
        attributes["error.type"] = exchange.code
    if exchange.left:
        attributes["vast_proxy.left"] = True
    return attributes


def _ns(wall: float) -> int:
    return int(wall * 1e9)
