"""Prometheus metrics: counted from exchanges and tries as they end, read from the status when somebody asks.

Names and units as Prometheus wants them. Labels are bounded: route templates, never paths; templates of routes that
stand in no table are words of clients, so only the first few of them get a name of their own; of limits, which each
key has, only those last used are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .policy.errors import CODES
from .policy.messages import SAVING, CacheStatus, Exchange, Response, Step

UNLISTED_NAMED = 50
"""Routes that stand in no table and get a label of their own; all further ones are OTHER together."""
LIMITS_SHOWN = 200
"""Limits that are shown, of routes and of accounts each: those used last."""
OTHER = "other"
ROUTE = ("method", "route", "upstream")
"""What all that is counted of routes is labelled with."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. A wait may last for queue.max_wait, half an hour.
WAITS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
CALLS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Status = Callable[[], Mapping[str, Any]]
"""What is so at this moment: the fields of /_proxy/status, and `waits`: of each upstream and route, how many requests
wait and for how many seconds the longest of them."""


class _Series:
    """What is counted of one route, in plain numbers: a counter of the library costs three times as much."""

    __slots__ = ("calls", "labels", "outcomes", "refusals", "retries", "sends", "waits")

    def __init__(self, labels: tuple[str, str, str], waits: Histogram, calls: Histogram) -> None:
        self.labels = labels
        self.waits, self.calls = waits, calls
        self.outcomes: dict[tuple[int, CacheStatus], int] = {}
        self.sends = self.refusals = self.retries = 0


class Metrics:
    """Owns a registry of its own, and all that is counted."""

    def __init__(self, status: Status, listed: Callable[[str], bool]) -> None:
        """`status`: asked at every scrape; `listed`: does a route, by its name, stand in a table?"""
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)  # memory, CPU, open files, start time
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

        def histogram(name: str, told: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vast_proxy_{name}", told, ROUTE, buckets=buckets, registry=self.registry)

        self._waits = histogram("queue_wait_seconds", "Time a request waited for its turns, all tries together.", WAITS)
        self._calls = histogram("upstream_duration_seconds", "Time a request was at upstream, all tries.", CALLS)
        self._known: dict[tuple[str, str, str], _Series] = {}
        self._unlisted: set[tuple[str, str]] = set()
        self._bytes_out = 0
        # What is counted from 1 on has no increase when it first happens: so whatever may come is there before.
        self._errors = dict.fromkeys(CODES, 0)
        self._saved = dict.fromkeys(SAVING, 0)
        # The present first: it begins the counts of routes that somebody waits for, and has sent nothing yet.
        self.registry.register(_Now(status, lambda name, upstream: self._met(name, upstream, listed=listed(name))))
        self.registry.register(_Counts(self._known, self._errors, self._saved, lambda: self._bytes_out))

    def observe(self, exchange: Exchange) -> None:
        """Count one exchange."""
        if exchange.effect == "admin":
            return
        series = self._of(exchange)
        outcome = (exchange.status, exchange.cache)
        series.outcomes[outcome] = series.outcomes.get(outcome, 0) + 1
        self._bytes_out += exchange.bytes_out
        if exchange.saved:
            self._saved[exchange.cache] += 1
        if exchange.code:
            self._errors[exchange.code] = self._errors.get(exchange.code, 0) + 1
        if exchange.attempts:
            series.calls.observe(exchange.upstream)
        if exchange.attempts or (exchange.queued and exchange.cache is not CacheStatus.COLLAPSED):
            series.waits.observe(exchange.queued)

    def tried(self, exchange: Exchange, step: Step) -> None:
        """Count one try."""
        series = self._of(exchange)
        series.sends += 1
        series.refusals += step.refused
        series.retries += step.number > 1

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self.registry)

    def answer(self, method: str) -> Response:
        """`text` as an answer."""
        return Response(200, (("Content-Type", CONTENT_TYPE), ("Cache-Control", "no-store")), self.text())

    def _of(self, exchange: Exchange) -> _Series:
        series = self._known.get((exchange.method, exchange.route, exchange.origin))
        if series is None:
            named = self._named(exchange.method, exchange.route, listed=exchange.listed)
            series = self._series(*named, exchange.origin)
        return series

    def _met(self, name: str, upstream: str, *, listed: bool) -> tuple[str, str]:
        """The labels of a route that is in use, by which it is counted from now on."""
        method, _, route = name.rpartition(" ")
        labels = self._named(method, route, listed=listed)
        self._series(*labels, upstream)
        return labels

    def _named(self, method: str, route: str, *, listed: bool) -> tuple[str, str]:
        """The labels of a route. A request that was not understood has none, and its method is anybody's word."""
        if listed or (method, route) in self._unlisted:
            return method, route
        if not route or len(self._unlisted) >= UNLISTED_NAMED:
            return OTHER, OTHER
        self._unlisted.add((method, route))
        return method, route

    def _series(self, *labels: *tuple[str, str, str]) -> _Series:
        series = self._known.get(labels)
        if series is None:
            series = self._known[labels] = _Series(labels, self._waits.labels(*labels), self._calls.labels(*labels))
        return series


class _Counts(Collector):
    """Counters: the numbers since the start."""

    def __init__(
        self,
        known: Mapping[Any, _Series],
        errors: Mapping[str, int],
        saved: Mapping[CacheStatus, int],
        bytes_out: Callable[[], int],
    ) -> None:
        self._known = known
        self._errors = errors
        self._saved = saved
        self._bytes_out = bytes_out

    def collect(self) -> Iterator[Metric]:
        requests = _counter("requests", "Requests, by what the client got.", *ROUTE, "status", "cache")
        sends = _counter("upstream_sends", "Calls sent to upstream.", *ROUTE)
        refusals = _counter("upstream_refusals", "429s of upstream that were waited out.", *ROUTE)
        retries = _counter("upstream_retries", "Calls sent again, after a 429 or a failure.", *ROUTE)
        saved = _counter("calls_saved", "Requests answered without a call of their own.", "cache")
        errors = _counter("errors", "Errors of the proxy's own, by code.", "code")
        bytes_out = _counter("response_bytes", "Bytes of bodies given to clients.")
        for series in self._known.values():
            for (status, cache), count in series.outcomes.items():
                requests.add_metric([*series.labels, str(status), cache.value], count)
            sends.add_metric(series.labels, series.sends)
            refusals.add_metric(series.labels, series.refusals)
            retries.add_metric(series.labels, series.retries)
        for cache, count in self._saved.items():
            saved.add_metric([cache.value], count)
        for code, count in self._errors.items():
            errors.add_metric([code], count)
        bytes_out.add_metric([], self._bytes_out())
        yield from (requests, sends, refusals, retries, saved, errors, bytes_out)


class _Now(Collector):
    """Gauges, read from the status at the moment of a scrape."""

    def __init__(self, status: Status, labels: Callable[[str, str], tuple[str, str]]) -> None:
        self._status = status
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        build = GaugeMetricFamily("vast_proxy_build_info", "Always 1; the version is a label.", labels=["version"])
        build.add_metric([status["version"]], 1)
        yield build
        yield from self._of_upstreams(status)
        yield from self._of_limits(status["limits"])
        cache, clients = status["cache"], status["clients"]
        yield _gauge("cache_entries", "Stored answers.", cache["entries"])
        yield _gauge("cache_bytes", "Bytes of stored answers.", cache["bytes"])
        yield _gauge("cache_max_bytes", "Bytes that stored answers may have together.", cache["max_bytes"])
        evicted = _counter("cache_evictions", "Stored answers pushed out before their time.")
        evicted.add_metric([], cache["evictions"])
        yield evicted
        yield _gauge("client_connections", "Connections of clients.", clients["connections"])
        yield _gauge("client_body_bytes", "Bytes of requests' bodies in memory.", clients["body_bytes"])

    def _of_upstreams(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("vast_proxy_waiting_requests", "Requests in line.", labels=ROUTE)
        depths: dict[tuple[str, str, str], int] = {}
        longest = dict.fromkeys(status["origins"], 0.0)
        for (upstream, name), (count, oldest) in status["waits"].items():
            labels = (*self._labels(name, upstream), upstream)
            depths[labels] = depths.get(labels, 0) + count
            longest[upstream] = max(longest[upstream], oldest)
        for labels, depth in depths.items():
            waiting.add_metric(labels, depth)
        yield waiting
        by = ["upstream"]
        all_ = GaugeMetricFamily("vast_proxy_queue_depth", "Requests in line, all routes.", labels=by)
        flying = GaugeMetricFamily("vast_proxy_calls_in_flight", "Calls at upstream.", labels=by)
        oldest_wait = GaugeMetricFamily(
            "vast_proxy_oldest_wait_seconds", "How long the one in line has waited who has waited longest.", labels=by
        )
        left = GaugeMetricFamily("vast_proxy_ceiling_tokens", "Calls the ceiling lets go at once.", labels=by)
        away = GaugeMetricFamily(
            "vast_proxy_away", "1: upstream, or a route of it, counts as away.", labels=["upstream"]
        )
        for upstream, origin in status["origins"].items():
            all_.add_metric([upstream], origin["waiting"])
            oldest_wait.add_metric([upstream], longest[upstream])
            flying.add_metric([upstream], origin["in_flight"])
            if origin["tokens"] is not None:
                left.add_metric([upstream], origin["tokens"])
            away.add_metric([upstream], float(bool(status["away"].get(upstream))))
        yield from (all_, oldest_wait, flying, left, away)

    def _of_limits(self, limits: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
        which = ["credential", "upstream", "method", "route"]
        interval = GaugeMetricFamily(
            "vast_proxy_limit_interval_seconds", "Between two calls, as now believed.", labels=[*which, "source"]
        )
        capacity = GaugeMetricFamily("vast_proxy_limit_capacity_calls", "Calls at once after a pause.", labels=which)
        tokens = GaugeMetricFamily("vast_proxy_limit_tokens", "Calls that may go at once; 0: none.", labels=which)
        for limit in limits:
            if limit["route"] == "account":
                method, route = "", "account"
            else:
                method, route = self._labels(limit["route"], limit["upstream"])
            if route == OTHER:
                continue
            labels = [limit["credential"], limit["upstream"], method, route]
            interval.add_metric([*labels, limit["source"]], limit["interval"])
            capacity.add_metric(labels, limit["capacity"])
            tokens.add_metric(labels, max(0.0, limit["tokens"]))
        yield from (interval, capacity, tokens)


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(f"vast_proxy_{name}", told, value=value)


def _counter(name: str, told: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"vast_proxy_{name}", told, labels=labels)
