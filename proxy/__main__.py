"""The command line: `vast-proxy`, and `python -m proxy`, which is the same."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:  # what a command needs is imported by the command, so that `--version` and `--help` are quick
    from .policy.routing import Route
    from .settings import Settings

OK, FAILED, MISUSED = 0, 1, 2
LONGEST_ORIGIN = 18
"""Characters of a number's origin in the table of routes, which so fits a wide terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit status: 0 fine, 1 it failed, 2 wrong arguments or settings."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return MISUSED
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # `vast-proxy routes | head` has seen enough. Python flushes stdout once more at exit: give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return 130  # as the shell says it: ended by SIGINT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vast-proxy",
        description="A reverse proxy that gets unmodified Vast.ai clients through the API's rate limits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vast-proxy {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--config", metavar="FILE", type=Path, help="settings; default: $VAST_PROXY_CONFIG, else what is shipped"
    )

    def add(name: str, command: Any, told: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=told, parents=[config], allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    serve = add("serve", _serve, "run the proxy until SIGTERM or SIGINT; SIGHUP reads the settings again")
    serve.add_argument("--listen", metavar="HOST:PORT", help="instead of `listen` in the settings")
    serve.add_argument("--upstream", metavar="URL", help="the API, instead of `upstreams.api` in the settings")
    serve.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    add("check-config", _check_config, "say whether the settings are right, or everything that is wrong with them")
    told = "show what a running proxy tells of itself: what waits, limits, cache, totals"
    status = commands.add_parser("status", help=told, description=told, allow_abbrev=False)
    status.set_defaults(command=_status)
    status.add_argument(
        "url", metavar="URL", nargs="?", help="where it is; default: $VAST_PROXY_URL, else http://127.0.0.1:8080"
    )
    status.add_argument("--watch", action="store_true", help="again each second, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="as JSON; with --watch one object a line")
    status.add_argument("--all", action="store_true", help="all lines and limits, not only the first 200")
    health = add(
        "health", _health, "ask the proxy of these settings on this machine whether it answers; 1: it does not"
    )
    health.add_argument("--listen", metavar="HOST:PORT", help="as it was given to `serve`")
    add("routes", _routes, "print the table of endpoints as understood, with the settings applied")
    told = "print every setting, with its unit, default, environment variable and meaning"
    words = commands.add_parser("settings", help=told, description=told, allow_abbrev=False)
    words.add_argument("name", metavar="NAME", nargs="?", default="", help="only this one, or this section: queue")
    words.set_defaults(command=_settings)
    tokens = commands.add_parser("token", help="make gateway tokens for team mode", allow_abbrev=False)
    of_tokens = tokens.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = of_tokens.add_parser(
        "new", help="make a token, shown this once", description="Make a token, shown this once.", allow_abbrev=False
    )
    new.add_argument("name", metavar="NAME", type=_member_name, help="of the member it is for")
    new.set_defaults(command=_new_token)
    return parser


def _member_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", text):
        raise argparse.ArgumentTypeError("a member's name is 1 to 64 letters, digits and . _ @ -")
    return text


def _new_token(options: argparse.Namespace) -> int:
    from .keys import new_token
    from .policy.members import hashed

    token = new_token()
    print(f"For {options.name}, in the place of the client's key; it is not shown again:")
    print(f"  export VAST_API_KEY={token}")
    print("For the settings, where only its hash is kept; the proxy takes it up on SIGHUP:")
    # In quotes, for @x is no YAML without, and 1e3 and null are no names.
    print(f'  team: {{members: {{"{options.name}": {{token: "{hashed(token)}"}}}}}}')
    print(
        "Or, for one that opens the pages under /_proxy/ to other machines and nothing else, in a browser for example:"
    )
    print(f'  admin: {{token: "{hashed(token)}"}}')
    return OK


def _load(options: argparse.Namespace) -> Settings:
    """The settings as the options say, or SettingsError; the same again, read anew, at every call."""
    from .settings import FLAGS, load

    given = {key: getattr(options, flag.removeprefix("--").replace("-", "_"), None) for key, flag in FLAGS.items()}
    return load(options.config, os.environ, given)


def _complain(error: Exception) -> int:
    for line in str(error).splitlines():
        print(f"vast-proxy: {line}", file=sys.stderr)
    return MISUSED


def _serve(options: argparse.Namespace) -> int:
    import asyncio

    from .settings import SettingsError

    try:
        settings = _load(options)
    except SettingsError as error:
        return _complain(error)

    from . import app

    try:
        asyncio.run(app.run(settings, lambda: _load(options)))
    except OSError as error:
        print(f"vast-proxy: {_why(error, settings)}", file=sys.stderr)
        return FAILED
    except app.MissingExtra as error:
        return _complain(error)
    return OK


def _why(error: OSError, settings: Settings) -> str:
    """asyncio wraps a refused bind in a sentence of its own with the address in it as a tuple: say it plainly."""
    import errno

    number = error.errno or 0
    reason = os.strerror(number) if number in errno.errorcode else error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    return f"cannot listen on {settings.listen}: {reason[:1].lower()}{reason[1:]}"


def _check_config(options: argparse.Namespace) -> int:
    from .settings import SettingsError, config_file

    try:
        settings = _load(options)
    except SettingsError as error:
        return _complain(error)
    ceiling = settings.limits.global_
    pace = f"at most {ceiling.rate:g} calls in {_age(ceiling.per)}" if ceiling else "no global limit"
    print(f"{options.config or config_file(os.environ) or 'shipped defaults'}: ok")
    print(
        f"listen {settings.listen}, upstream {settings.upstreams.api}, {pace}, "
        f"{len(settings.routes)} routes in {len(settings.routes.families)} families, from {settings.source}"
    )
    return OK


def _status(options: argparse.Namespace) -> int:
    from .status import DEFAULT_URL, TOKEN_VARIABLE, URL_VARIABLE, StatusError, show

    url = options.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        show(url, os.environ.get(TOKEN_VARIABLE, ""), watch=options.watch, as_json=options.json, whole=options.all)
    except StatusError as error:
        print(f"vast-proxy: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if not options.watch:
            raise
    return OK


def _health(options: argparse.Namespace) -> int:
    from .health import Unwell, ask
    from .settings import SettingsError, listen_address

    try:
        listen = listen_address(options.config, os.environ, {"listen": options.listen}).here
        print(f"{ask(listen.host, listen.port)} answers")
    except (SettingsError, Unwell) as error:
        _complain(error)
        return FAILED  # also where others are MISUSED: to Docker anything but 0 and 1 has no meaning
    return OK


def _routes(options: argparse.Namespace) -> int:
    from .settings import SettingsError

    try:
        settings = _load(options)
    except SettingsError as error:
        return _complain(error)
    head = ("METHOD", "PATH", "EFFECT", "INTERVAL", "CAPACITY", "PENALTY", "CACHE", "TTL", "UPSTREAM", "FROM")
    routes = sorted(settings.routes, key=lambda route: (route.template, route.method))
    rows = [head, *(_row(route, settings) for route in routes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return OK


def _settings(options: argparse.Namespace) -> int:
    from .reference import reference

    told = reference(options.name)
    if not told:
        print(f"vast-proxy: there is no setting {options.name!r:.80}", file=sys.stderr)
        return MISUSED
    print(told, end="")
    return OK


def _row(route: Route, settings: Settings) -> tuple[str, ...]:
    from .policy.caching import lifetimes
    from .policy.limiting import DEFAULT_INTERVAL

    interval = DEFAULT_INTERVAL if route.interval is None else route.interval
    if not route.overridden:
        interval *= settings.limits.scale
    origin = route.source or ("default" if route.interval is None else "documented")
    family = route.family
    return (
        route.method,
        route.template,
        "refused" if route.refused else route.effect.value,
        _age(interval) if interval else "-",
        str(route.capacity),
        f"{route.penalty:g}",
        family.name if family else "-",
        _age(lifetimes(family, settings.cache)[0]) if family else "-",
        route.upstream,
        origin if len(origin) <= LONGEST_ORIGIN else origin[: LONGEST_ORIGIN - 3] + "...",
    )


def _age(seconds: float) -> str:
    """As one would write it in the settings: 2s, 15m, 1d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


if __name__ == "__main__":
    sys.exit(main())
