"""Wiring and lifespan: builds everything once, reloads settings, keeps what was learned, shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import random  # noqa: TID251 - drawn here, and handed to whoever decides
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, certificates
from .admin import AccessLog, Admin, Events
from .admission import Admission
from .clock import Clock
from .ledger import Journal, Ledger
from .metrics import LIMITS_SHOWN, Metrics
from .own import Own
from .pipeline import Pipeline
from .policy.breaking import Breaker
from .policy.errors import Refusal
from .policy.exposure import is_loopback
from .server import Server
from .settings import OPEN, Listen, LogRules, Settings, SettingsError, kept, need_restart
from .spends import Spends
from .store import MemoryStore
from .upstream import Upstream
from .window import STEP, Window

if TYPE_CHECKING:  # an extra, imported where it is wanted
    from .tracing import Tracing

log = logging.getLogger(__name__)
SHOWN = 200
"""Lines, limits of routes and limits of accounts that are shown, where not all are asked for."""
SAVE_EVERY = 2.0
"""Seconds between two writes of the state file, while there is something to write."""
ORIGINS_KEPT = 8
"""Other origins whose lessons stay in the state file."""
_UNFINISHED = ".state-"
"""How the names of state files begin that are being written."""
BACKLOG = 1024
"""Connections that may wait to be taken in."""


class MissingExtra(Exception):
    """Something is to be used that is not installed. The text says what to install."""


class App:
    """One running proxy. Owns all parts and their order of coming and going."""

    def __init__(
        self,
        settings: Settings,
        *,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - the clock's
        tls: ssl.SSLContext | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Inside a running loop. `wall`, `tls` and `chance` are for tests: the date, whom to trust, the jitter."""
        self.settings = settings
        self._kept = kept(settings)
        self.clock = Clock(wall)
        self._tls = tls
        self._state = StateFile(settings.state.file)
        self.admission = Admission(self.clock, settings.limits, settings.queue, settings.upstreams.max_connections)
        self.admission.restore(self._state.read(self._origins()))
        self.store = MemoryStore(self.clock, settings.cache.max_bytes)
        self.ledger = Ledger(self.clock, settings.writes, Journal(journal_of(settings.state.file)))
        self.breakers = {name: Breaker(settings.breaker) for name in self._origins()}
        self.upstream = Upstream(settings.upstreams, tls)
        self.pipeline = Pipeline(
            settings,
            self.clock,
            self.store,
            self.admission,
            self.ledger,
            self.breakers,
            self.upstream,
            chance,
            Spends(self.clock, spends_of(settings.state.file)),
        )
        self._listed = frozenset(route.name for route in settings.routes)
        self.instance = f"{random.getrandbits(64):016x}"
        self.metrics = Metrics(self._in_numbers, lambda name: name in self._listed)
        self.window = Window(self.clock, lambda: self._status() | {"totals": self.admin.counted.shown()})
        pages = {"/_proxy/metrics": self.metrics.answer} | self.window.pages("/_proxy")
        own = Own(self.admission, lambda: (self.settings.routes, self.settings.team))
        self.admin = Admin(self._status, SHOWN, lambda: self._ready, pages, own.pages("/_proxy"))
        self.access = AccessLog(settings.log.level, settings.log.format, wall)
        self.server = Server(
            self.clock,
            settings.server,
            self.pipeline,
            self.admin,
            request_ids(),
            (self.access.observe, self.admin.counted.observe, self.metrics.observe, self.window.observe),
            (self.admin.counted.tried, self.metrics.tried, self.window.tried),
        )
        self.tracing: Tracing | None = None
        self._ready = False
        self._stopping = asyncio.Event()
        self._started = self.clock.now()
        self._listener: asyncio.Server | None = None
        self._saver: asyncio.Task[None] | None = None
        # Clients of earlier settings, each until its last call has ended.
        self._retiring: dict[asyncio.Task[None], Upstream] = {}
        self.address = settings.listen
        self._certificate: ssl.SSLContext | None = None
        """What clients are shown; None: they speak plain HTTP."""

    def trace(self, tracing: Tracing) -> None:
        """Have every exchange from now on traced."""
        self.tracing = tracing
        self.server.begin_trace = tracing.begin
        self.server.observers += (tracing.observe,)

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        listen = self.settings.listen
        tls, rules = self.settings.tls, self.settings.server
        more: dict[str, Any] = {}
        if tls.cert is not None and tls.key is not None:
            try:
                self._certificate = certificates.context(tls.cert, tls.key)
            except ValueError as error:  # it was there a moment ago, when the settings were read
                raise OSError(str(error)) from None
            more = {"ssl": self._certificate, "ssl_handshake_timeout": rules.header_timeout or None}
        self._listener = await loop.create_server(self.server, listen.host, listen.port, backlog=BACKLOG, **more)
        port = self._listener.sockets[0].getsockname()[1]
        self.address = Listen(listen.host, port)
        self._saver = asyncio.create_task(self._save_now_and_then())
        self._ready = True

    async def stop(self, grace: float | None = None) -> None:
        """Stop listening, turn away who waits, give what is upstream `grace` seconds to end, keep what was learned.

        By default `drain.timeout`. Who is still not answered then is told so, not cut off.
        """
        grace = self.settings.drain.timeout if grace is None else grace
        self._ready = False
        self.window.close()
        if self._listener is not None:
            self._listener.close()
        self.admission.turn_all_away(Refusal(503, "restarting", "vast-proxy is stopping; try again in a moment", 5))
        self.server.pre_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.pipeline.flights or self.server.answering:
                    await self.clock.sleep(0.05)
        self.server.cut_short()
        await self.server.shutdown(0.5)
        if self._saver is not None:
            # It may be writing, in a thread that cannot be stopped: its end is waited for, so that ours is the last.
            self._stopping.set()
            await self._saver
        self._state.write(self.admission.dump(), self._origins())
        await self.upstream.close()
        for task, upstream in list(self._retiring.items()):
            await upstream.close()
            task.cancel()
        await self.pipeline.flights.finish()
        self.server.tell()
        self.access.flush()
        if self.tracing is not None:
            await self.tracing.close()

    def reload(self, settings: Settings) -> list[str]:
        """Put other settings in force for every request from now on. Names those that need a restart.

        Raises SettingsError, and nothing changes, where they would open to everybody what listens to other machines.
        """
        if not (is_loopback(self.address.host) or settings.team or settings.allow_open):
            msg = f"listen: the address in use stays {self.address} until a restart, and {OPEN.format(self.address)}"
            raise SettingsError(msg)
        before, self.settings = self.settings, settings
        if self._certificate is not None and settings.tls.cert is not None and settings.tls.key is not None:
            try:
                certificates.renew(self._certificate, settings.tls.cert, settings.tls.key)
            except ValueError as error:
                log.error("the certificate in use stays: %s", error)
        if before.upstreams != settings.upstreams:
            old, self.upstream = self.upstream, Upstream(settings.upstreams, self._tls)
            self.pipeline.upstream = self.upstream
            retiring = asyncio.create_task(old.retire())
            self._retiring[retiring] = old
            retiring.add_done_callback(lambda task: self._retiring.pop(task, None))
            for name in ("api", "serverless"):
                if getattr(before.upstreams, name) != getattr(settings.upstreams, name):
                    self.admission.forget(name)
                    self.breakers[name] = Breaker(settings.breaker)
        self.admission.reconfigure(settings.limits, settings.queue, settings.upstreams.max_connections, settings.routes)
        for breaker in self.breakers.values():
            breaker.rules = settings.breaker
        self.ledger.rules = settings.writes
        self.store.resize(settings.cache.max_bytes)
        self.access.configure(settings.log.level, settings.log.format)
        self._listed = frozenset(route.name for route in settings.routes)
        self.pipeline.settings = settings
        return need_restart(self._kept, settings)

    async def _save_now_and_then(self) -> None:
        looked_at = -STEP
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAVE_EVERY):
                    await self._stopping.wait()
            self.ledger.keep()
            if self.admission.waiting and self.clock.now() >= looked_at + STEP:
                looked_at = self.clock.now()
                oldest = max((one["oldest_for"] for one in self.admission.lines_waiting()), default=0.0)
                self.window.waits(oldest)
            state = self.admission.dump()
            if self._state.differs(state):
                await asyncio.to_thread(self._state.write, state, self._origins())

    def _origins(self) -> dict[str, str]:
        return {"api": self.settings.upstreams.api, "serverless": self.settings.upstreams.serverless}

    def _status(self, most: int | None = SHOWN) -> dict[str, Any]:
        """What is so at this moment, of lists the first what matters most.

        `most`: only so many lines, limits of routes and limits of accounts; None: all.
        """
        lines = sorted(self.admission.lines_waiting(), key=itemgetter("oldest_for"), reverse=True)
        # One more than is wanted, to see whether there are more.
        limits = sorted(self.admission.limits_known(None if most is None else most + 1), key=_interest)
        routes = [limit for limit in limits if limit["route"] != "account"]
        accounts = [limit for limit in limits if limit["route"] == "account"]
        cut = {"lines": len(lines), "limits": max(len(routes), len(accounts))}
        return self._numbers() | {
            "line_count": len(lines),
            "cut": [name for name, count in cut.items() if most is not None and count > most],
            "lines": lines[:most],
            "limits": routes[:most] + accounts[:most],
        }

    def _in_numbers(self) -> Mapping[str, Any]:
        """For metrics: of what waits the sums, and the limits that were used last."""
        return self._numbers() | {
            "waits": waits(self.admission.lines_waiting()),
            "limits": list(self.admission.limits_known(LIMITS_SHOWN)),
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "instance": self.instance,
            "uptime": round(self.clock.now() - self._started, 1),
            "settings": self.settings.source,
            "upstreams": self._origins(),
            "waiting": self.admission.waiting,
            "in_flight": self.admission.in_flight,
            "flights": len(self.pipeline.flights),
            "clients": {"connections": len(self.server.clients), "body_bytes": self.server.bodies.size},
            "away": {name: breaker.away for name, breaker in self.breakers.items()},
            "pausing": {name: self.pipeline.pausing[name] for name in self.breakers},
            "writes": len(self.ledger),
            "cache": {
                "entries": self.store.entries,
                "bytes": self.store.size,
                "max_bytes": self.store.max_bytes,
                "evictions": self.store.evictions,
            },
            "origins": self.admission.ceilings(),
        }


def waits(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[int, float]]:
    """Of each upstream and route, how many wait in these lines, and for how many seconds the longest of them."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for line in lines:
        key = (line["upstream"], line["route"])
        count, oldest = found.get(key, (0, 0.0))
        found[key] = (count + line["waiting"], max(oldest, line["oldest_for"]))
    return found


def _interest(limit: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """What people look for comes first: where somebody waits, what was learned, what is used most."""
    return not limit["waiting"], limit["source"] != "learned" and not limit["correction"], -limit["sends"]


class StateFile:
    """What was learned, kept over a restart, by the origin that taught it. Written whole or not at all.

    Owns the file. What one server taught says nothing of another: a rehearsal against a fake neither slows the real
    thing down nor makes it be forgotten.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._origins: dict[str, dict[str, Any]] = {}
        self._written: dict[str, Any] | None = None

    def read(self, origins: Mapping[str, str]) -> Mapping[str, Any]:
        """The buckets of these origins as they were dumped; nothing, with a warning, where they cannot be read."""
        if self.path is None:
            return {}
        for left in self.path.parent.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError):
                left.unlink()  # of a process that was killed as it wrote
        try:
            found = json.loads(self.path.read_bytes())
            learned = found["origins"]
            if found["version"] != 1 or not all(isinstance(buckets, dict) for buckets in learned.values()):
                raise ValueError("not a state file of this version")
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("state file %s cannot be read (%s): starting without it", self.path, error.strerror)
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            aside = self.path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            log.warning("state file %s is damaged: set aside as %s, starting without it", self.path, aside)
            return {}
        self._origins = learned
        return {
            key: state
            for name, origin in origins.items()
            for key, state in learned.get(origin, {}).items()
            if key.split(" ")[1:2] == [name]
        }

    def differs(self, buckets: Mapping[str, Any]) -> bool:
        """Is there something to write?"""
        return self.path is not None and _timeless(buckets) != _timeless(self._written or {})

    def write(self, buckets: dict[str, Any], origins: Mapping[str, str]) -> None:
        """Put it in the place of what was there, in one step; readable by its owner only."""
        if self.path is None:
            return
        ours: dict[str, dict[str, Any]] = {origin: {} for origin in origins.values()}
        for key, state in buckets.items():
            ours[origins[key.split(" ")[1]]][key] = state
        others = [item for item in self._origins.items() if item[0] not in ours][-ORIGINS_KEPT:]
        self._origins = dict(others) | {origin: learned for origin, learned in ours.items() if learned}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=_UNFINISHED)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"version": 1, "origins": self._origins}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._written = buckets
        except OSError as error:
            if self._written is not None or not buckets:
                log.debug("state file %s cannot be written: %s", self.path, error.strerror)
            else:
                why = error.strerror
                log.warning("state file %s cannot be written (%s): nothing will be remembered", self.path, why)
                self._written = {}


def request_ids() -> Iterator[str]:
    """Names for requests: of no other one of this process, and hardly of another process."""
    process = f"{random.getrandbits(48):012x}"
    return (f"{process}-{number:x}" for number in itertools.count(1))


def journal_of(state_file: Path | None) -> Path | None:
    """Where writes are remembered over a restart: beside what was learned."""
    return state_file.with_suffix(".writes") if state_file is not None else None


def spends_of(state_file: Path | None) -> Path | None:
    """Where the members' spends of the day are counted."""
    return state_file.with_suffix(".spends") if state_file is not None else None


def _timeless(buckets: Mapping[str, Any]) -> dict[str, Any]:
    """Without the marks of time alone, which would make a file of a resting proxy differ for ever."""
    return {key: {name: value for name, value in state.items() if name != "seen"} for key, state in buckets.items()}


def configure_logging(rules: LogRules) -> None:
    """Events of the program go to standard error, in the form of the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Events(rules.format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(rules.level.upper())


def tracing_for(app: App, environ: Mapping[str, str]) -> Tracing | None:
    """As the settings or OpenTelemetry's own variables say; None: nobody wants traces. Raises MissingExtra."""
    otlp = app.settings.tracing.otlp
    named = any(environ.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if disabled or not (otlp or named):
        return None
    try:
        from .tracing import Tracing, exporter
    except ImportError:
        raise MissingExtra("traces need OpenTelemetry: pip install 'vast-proxy[otel]' (tracing.otlp)") from None
    return Tracing(app.clock, exporter(otlp), __version__)


def raise_open_files(settings: Settings) -> None:
    """Allow this process as many open files as its connections may need, or warn that they are not to be had."""
    try:
        import resource
    except ImportError:  # not Unix
        return
    # Those that are taken in at once are open before the first of them makes room; two upstreams; the rest of it all.
    needed = settings.server.max_connections + BACKLOG + 2 * settings.upstreams.max_connections + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    possible = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed < needed:
        log.warning("%d open files are allowed, server.max_connections may need %d: see ulimit -Hn", allowed, needed)


async def run(settings: Settings, reload: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once. SIGHUP reloads.

    Raises OSError if it cannot listen, MissingExtra if something that is to be used is not installed.
    """
    configure_logging(settings.log)
    raise_open_files(settings)
    app = App(settings)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def on_stop() -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    def on_reload() -> None:
        try:
            fresh = reload()
            kept = app.reload(fresh)
        except SettingsError as error:
            log.error("not reloaded, the settings in force stay:\n%s", error)
            return
        configure_logging(fresh.log)
        raise_open_files(fresh)
        log.info("settings reloaded from %s%s", fresh.source, f"; need a restart: {', '.join(kept)}" if kept else "")

    # Before it listens: who sees that it does may send one at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_reload)
    try:
        tracing = tracing_for(app, os.environ)
        if tracing is not None:
            app.trace(tracing)
        await app.start()
    except BaseException:
        await app.upstream.close()
        raise
    scheme = "http" if settings.tls.cert is None else "https"
    print(f"vast-proxy {__version__} listens on {scheme}://{app.address} for {settings.upstreams.api}", flush=True)
    # A client on this machine reaches what listens everywhere by the loopback address; any other, by this one's name.
    elsewhere = "   (elsewhere: this machine's name)" if app.address.is_everywhere else ""
    print(f"Point clients at it:  export VAST_URL={scheme}://{app.address.here}{elsewhere}", flush=True)
    # What is there now stays, and what a request makes goes with it: the collector need not look so often.
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    await stopping.wait()
    log.info("stopping: what is under way may end")
    await app.stop()
