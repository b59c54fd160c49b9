"""Every setting in words: what `vast-proxy settings` prints, and docs/settings.md holds.

Nothing is said here that is said elsewhere. What there is and what it means is read from the dataclasses and the texts
below their fields, the defaults from config/proxy.yaml, the fields of a route from the head of config/routes.yaml.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .policy.routing import Family
from .settings import CONFIG_VARIABLE, FLAGS, NEED_RESTART, PLAIN, PREFIX, UNITS, Settings, known_keys, shipped

WIDTH = 120
"""Of a line."""
_HEAD = f"""Every setting there is, as `vast-proxy settings` prints it; `vast-proxy settings queue` prints a part of it.

- In a file: `vast-proxy serve --config my.yaml`, or `{CONFIG_VARIABLE}=my.yaml`. `queue.max_wait` is `max_wait` below \
`queue:`. What is left out keeps its default; `vast-proxy check-config` tells what is wrong.
- As an environment variable, which wins over the file: the name in capitals, two underscores for each step, the value \
as in YAML. One that is empty counts as not set. A mapping or a list can be given as a whole: \
`{PREFIX}UPSTREAMS__HOSTS='[vast.ai]'`.
- As a flag of `vast-proxy serve`, which wins over both: \
{", ".join(f"`{flag}` is `{name}`" for name, flag in FLAGS.items())}.
- A duration is a number of seconds or has a unit: 60, 0.5, 500ms, 60s, 15m, 12h, 1d. A size is a number of bytes or \
has a unit: 1048576, 512KiB, 64MiB, 1GiB.
- `SIGHUP` reads the file again. What is not marked as needing a restart holds from then on for every new request."""
_SECTION_OF = re.compile(r":(?: an entry of)? `[\w.]+` in the settings")
_FIELD = re.compile(r"# (\w+) {2,}(\S.*)")
_MORE = re.compile(r"# {10,}(\S.*)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting, or a section of them."""

    name: str
    """Dotted; NAME stands for a name that the user chooses."""
    text: str
    kind: str = ""
    """What it may be, as mistakes are told; empty for a section that is always there."""
    default: str = ""
    """As one would write it; empty: none."""
    variable: str = ""
    """By which it can be given; empty: only with what it is in."""
    restart: str = ""
    """A sentence, where a reload does not put it in force."""

    def markdown(self) -> str:
        """As a part of the reference."""
        facts = [f"Value: {self.kind}."] if self.kind else []
        facts += [f"Default: {self.default}."] if self.default else []
        facts += [f"Variable: `{self.variable}`."] if self.variable and self.kind else []
        facts += [self.restart] if self.restart else []
        heading = f"{'###' if '.' in self.name else '##'} `{self.name}`"
        return "\n\n".join(part for part in (heading, wrapped(" ".join(facts)), wrapped(self.text)) if part)


def reference(only: str = "") -> str:
    """All of it as Markdown, or what `only` names and what is in that. Empty if there is no such setting."""
    if not only:
        return "\n\n".join(["# Settings", wrapped(_HEAD), *(entry.markdown() for entry in entries())]) + "\n"
    found = [entry.markdown() for entry in entries() if f"{entry.name}.".startswith(f"{only}.")]
    return "\n\n".join(found) + "\n" if found else ""


@cache
def entries() -> tuple[Entry, ...]:
    """Every setting, sections before what is in them."""
    return (*_of_the_dataclasses(), *_of_the_table())


def wrapped(text: str) -> str:
    """With lines of WIDTH, none of them broken between backticks."""
    lines = []
    for line in text.split("\n"):
        whole = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), line)
        indent = "  " if line.startswith("- ") else ""
        broken = textwrap.wrap(
            whole, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
        lines += [part.replace("\0", " ") for part in broken]
    return "\n".join(lines)


# --- From the dataclasses ---------------------------------------------------------------------------------------------


def _of_the_dataclasses() -> Iterator[Entry]:
    known = {".".join(str(part) for part in key) for key in known_keys()}
    whole = yaml.safe_load(shipped("proxy.yaml").read_text("utf-8"))
    told: dict[type, str] = {}

    def below(kind: type, above: str, shown: Any) -> Iterator[Entry]:
        hints, texts = get_type_hints(kind, include_extras=True), texts_of(kind)
        for item in dataclasses.fields(kind):
            name, key = f"{above}{item.name.rstrip('_')}", item.name.rstrip("_")
            if (above or name in known) and name != "routes":
                default = shown[key] if isinstance(shown, dict) and key in shown else item.default
                yield from entry(name, hints[item.name], default, texts.get(item.name, ""))

    def entry(name: str, hint: Any, default: object, text: str) -> Iterator[Entry]:
        variable = _variable(name) if name in known else ""
        structure = _structure(hint)
        if structure is None:
            yield Entry(name, text, phrase(hint), written(default), variable, _restart(name))
            return
        text = text or _SECTION_OF.sub("", _joined(structure.__doc__ or ""))
        named, optional = get_origin(hint) is Mapping, NoneType in get_args(hint)
        kind = "a mapping, or null" if optional else "a mapping" if named else ""
        if structure in told:
            names = ", ".join(f"`{_variable(f'{name}.{item.name}')}`" for item in dataclasses.fields(structure))
            text += f"\n\nIts fields, and their defaults, are those of `{told[structure]}`: {names}."
        yield Entry(name, text, kind, written(default) if kind else "", variable)
        if structure not in told:
            told[structure] = name
            yield from below(structure, f"{name}.NAME." if named else f"{name}.", default)

    yield from below(Settings, "", whole)


def _variable(name: str) -> str:
    return PREFIX + name.upper().replace(".", "__")


def _structure(hint: Any) -> type | None:
    """The dataclass that a setting is, may be, or has by name; None for a plain value."""
    if isinstance(hint, type):
        return hint if dataclasses.is_dataclass(hint) else None
    if get_origin(hint) in (Union, UnionType, Mapping):
        return next((found for part in get_args(hint) if (found := _structure(part)) is not None), None)
    return None


def texts_of(kind: type) -> dict[str, str]:
    """What the source says below each field of a dataclass."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(found, ast.ClassDef)
    texts = {}
    for item, after in zip(found.body, found.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = _joined(text)
    return texts


def _joined(text: str) -> str:
    return " ".join(text.split())


def phrase(hint: Any) -> str:
    """What a value may be, in the words in which mistakes are told; the examples of durations stand at the head."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        told = UNITS[parts[1]][1]
        return told.partition(" (")[0] if parts[1] in ("seconds", "bytes") else told
    if hint in PLAIN:
        return PLAIN[hint]
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        return f"a list; each {phrase(parts[0])}"
    if origin is Mapping:
        return f"a mapping; each {phrase(parts[1])}"
    (inner,) = (part for part in parts if part is not NoneType)
    told = phrase(inner)
    return told if ", or null" in told else f"{told}, or null"


def written(value: object) -> str:
    """A default as one would write it in YAML."""
    match value:
        case "" | dataclasses.MISSING:
            return "none"
        case dict() if len(value) > 3:
            return ", ".join(f"`{name}: {_plain(item)}`" for name, item in value.items())
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{name}: {_plain(item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return f"[{', '.join(map(_plain, value))}]"
        case float():
            return f"{value:g}"
    return str(value)


def _restart(name: str) -> str:
    for needing, restart in NEED_RESTART.items():
        if f"{name}.".startswith(f"{needing}."):
            return f"Needs a restart {restart.when}".rstrip() + "."
    return ""


# --- From the table of endpoints --------------------------------------------------------------------------------------


def _of_the_table() -> Iterator[Entry]:
    fields = "\n".join(f"- `{name}`: {told}" for name, told in route_fields().items())
    yield Entry("routes", f"{texts_of(Settings)['routes']}\n\n{fields}", "a list", "`[]`", _variable("routes"))
    text = _SECTION_OF.sub("", _joined(Family.__doc__ or ""))
    yield Entry("families", text, "a mapping", "`{}`", _variable("families"))
    yield from (Entry(f"families.NAME.{name}", told) for name, told in texts_of(Family).items())


def route_fields() -> dict[str, str]:
    """What config/routes.yaml says at its head of each field of a route."""
    told: dict[str, str] = {}
    for line in shipped("routes.yaml").read_text("utf-8").partition("\n\n")[0].splitlines():
        if field := _FIELD.fullmatch(line):
            told[field[1]] = field[2]
        elif told and (more := _MORE.fullmatch(line)):
            told[next(reversed(told))] += f" {more[1]}"
    return told
