"""The reference of settings: it is all there, it is true, and docs/settings.md is it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.app import App
from proxy.policy.members import KeyRules, Member
from proxy.policy.routing import _FIELDS, Family
from proxy.reference import Entry, entries, reference, route_fields, texts_of, wrapped
from proxy.settings import NEED_RESTART, Settings, kept, known_keys, load, need_restart, shipped

CHECKOUT = Path(__file__).parent.parent
KEY = "0123456789abcdef-key-in-the-environment"
NOWHERE = {"HOME": "/home/somebody", "ONE_KEY": KEY, "OTHER_KEY": KEY}
ENTRIES = {entry.name: entry for entry in entries()}
KEYS = [".".join(str(part) for part in key) for key in known_keys()]
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]


def test_docs_settings_is_what_vast_proxy_settings_prints() -> None:
    written = (CHECKOUT / "docs" / "settings.md").read_text("utf-8")
    assert written == reference(), "made anew by: python -m proxy settings > docs/settings.md"


def test_every_setting_is_explained() -> None:
    alike = {key for key in KEYS if key.startswith("limits.serverless.")}  # said at limits.serverless, by variable
    assert all(variable(key) in ENTRIES["limits.serverless"].text for key in alike)
    assert {name for name in ENTRIES if "NAME" not in name} == set(KEYS) - alike
    for kind, above in ((Member, "team.members"), (KeyRules, "team.keys"), (Family, "families")):
        for item in dataclasses.fields(kind):
            assert (f"{above}.NAME.{item.name}" in ENTRIES) == ((kind, item.name) != (Family, "name"))
    assert tuple(route_fields()) == tuple(sorted(_FIELDS, key=list(route_fields()).index))
    assert [name for name, entry in ENTRIES.items() if len(entry.text) < 10] == []


@pytest.mark.parametrize("name", [name for name in LEAVES if name in ENTRIES])
def test_the_default_that_is_told_given_by_the_variable_that_is_told_changes_nothing(name: str) -> None:
    entry = ENTRIES[name]
    spans = re.findall(r"`([^`]*)`", entry.default)
    text = spans[0] if len(spans) == 1 else "{" + ", ".join(spans) + "}"
    plain, given = load(None, NOWHERE, {}), load(None, NOWHERE | {entry.variable: text}, {})
    assert dataclasses.replace(given, source=plain.source, routes=plain.routes) == plain
    assert list(given.routes) == list(plain.routes)


def test_a_default_of_a_member_is_what_a_member_without_it_has() -> None:
    for item in dataclasses.fields(Member):
        told = ENTRIES[f"team.members.NAME.{item.name}"].default.strip("`")
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        assert (told == "none" and default == "") or yaml.safe_load(told) == default


def comments() -> dict[str, str]:
    """What stands above each key of the shipped file, without the examples in it."""
    found: dict[str, str] = {}
    above: list[str] = []
    pending: list[str] = []
    for line in shipped("proxy.yaml").read_text("utf-8").splitlines():
        if line.lstrip().startswith("#"):
            pending.append(line.strip()[1:])
        elif key := re.match(r"( *)(\w+):", line):
            above[len(key[1]) // 2 :] = [key[2]]
            plain = " ".join(pending).partition("    ")[0] if pending else ""
            found[".".join(above)] = " ".join(plain.split())
            pending = []
        else:
            pending = []
    return found


@pytest.mark.parametrize(("name", "said"), [item for item in comments().items() if item[1]])
def test_the_shipped_file_says_of_a_setting_what_the_reference_says(name: str, said: str) -> None:
    assert ENTRIES[name].text.partition("\n\n")[0] == said


def test_a_part_of_the_reference_is_a_setting_and_what_is_in_it() -> None:
    assert reference("queue.max_wait") == ENTRIES["queue.max_wait"].markdown() + "\n"
    assert re.findall(r"^#+ `([\w.]+)`", reference("limits.global"), re.MULTILINE) == [
        "limits.global",
        *(f"limits.global.{name}" for name in ("rate", "per", "burst")),
    ]
    assert reference("queue.max") == reference("nothing") == ""


def test_no_line_is_too_long_nor_broken_within_a_span() -> None:
    assert max(map(len, reference().splitlines())) <= 120
    assert all(line.count("`") % 2 == 0 for line in reference().splitlines())
    assert wrapped(f"- {'word ' * 20}`a b` {'word ' * 20}\n\nnext").splitlines()[-2:] == ["", "next"]


def test_what_a_field_says_is_the_text_below_it() -> None:
    assert texts_of(Entry)["name"] == "Dotted; NAME stands for a name that the user chooses."


# --- What a reload does -----------------------------------------------------------------------------------------------

OTHER = {  # where a number will not do: the text of a setting, before and after
    "listen": ("127.0.0.1:4001", "127.0.0.1:4002"),
    "allow_open": ("false", "true"),
    "hosts": ("[before.example]", "[after.example]"),
    "trusted_proxies": ("[10.1.0.0/16]", "[10.2.0.0/16]"),
    "admin.token": (f"sha256:{64 * 'b'}", f"sha256:{64 * 'a'}"),
    "upstreams.api": ("http://before.example:81", "http://after.example:81"),
    "upstreams.serverless": ("http://before.example:82", "http://after.example:82"),
    "upstreams.hosts": ("[vast.before.example]", "[vast.after.example]"),
    "limits.scope": ("key", "ip"),
    "limits.margin": ("0.015625", "0.03125"),
    "queue.heartbeats": ("{before/: 102}", "{after/: 102}"),
    "cache.share_searches": ("false", "true"),
    "log.level": ("debug", "error"),
    "log.format": ("text", "json"),
    "tracing.otlp": ("http://before.example:83", "http://after.example:83"),
    "state.file": ("before/state.json", "after/state.json"),
    "team.keys": ("{all: {env: ONE_KEY}}", "{all: {env: OTHER_KEY}}"),
    "team.members": (
        f"{{before: {{token: 'sha256:{64 * 'c'}', key: all}}}}",
        f"{{after: {{token: 'sha256:{64 * 'd'}', key: all}}}}",
    ),
    "routes": ("[{route: GET /before/, effect: read}]", "[{route: GET /after/, effect: read}]"),
    "families": ("{before: {ttl: 1234}}", "{after: {ttl: 4321}}"),
}
UNTESTED = {"tls.cert", "tls.key"}
"""Files that must be there: tests/test_tls.py."""


VALUES = {
    name: OTHER.get(name, (str(700_001 + number), str(800_001 + number)))
    for number, name in enumerate(name for name in LEAVES if name not in UNTESTED)
}
"""Of each setting two values, none of them like that of another."""


def variable(name: str) -> str:
    return f"VAST_PROXY_{name.upper().replace('.', '__')}"


def given(after: Iterable[str] = ()) -> Settings:
    """The first value of each setting, the second of these."""
    values = {name: both[name in after] for name, both in VALUES.items()}
    return load(None, NOWHERE | {variable(name): value for name, value in values.items()}, {})


def at(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, f"{part}_" if hasattr(value, f"{part}_") else part, None)
    return value


def reachable(root: object) -> list[object]:
    """All that an object holds, in whatever way, but for code and the loop, which hold the test itself."""
    code = (type, types.ModuleType, types.FrameType, types.CoroutineType, asyncio.Future, asyncio.AbstractEventLoop)
    seen: dict[int, object] = {}
    left: list[object] = [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, code):
            continue
        seen[id(one)] = one
        if isinstance(one, types.FunctionType):
            left += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            left += gc.get_referents(one)
    return list(seen.values())


@pytest.mark.looptime
async def test_after_a_reload_nothing_holds_the_old_value_of_a_setting_that_follows_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = given(), given(VALUES)
    names = [name for name in LEAVES if name not in UNTESTED and at(before, name) not in (None, True, False)]
    assert all(at(before, name) != at(after, name) for name in names)
    app = App(before)

    def held() -> set[str]:
        found = reachable(app)
        plain = {one for one in found if isinstance(one, str | int | float | Path)}
        whole = {id(one) for one in found}
        values = {name: at(before, name) for name in names}
        return {
            name
            for name, value in values.items()
            if (value in plain if isinstance(value, str | int | float | Path) else id(value) in whole)
            and value not in ("key", "ip", "debug", "error", "text", "json")  # words that mean other things too
        }

    try:
        assert held() >= {"queue.max_wait", "server.keepalive", "limits.global.rate", "cache.max_bytes", "hosts"}
        told = app.reload(after)
        await asyncio.sleep(1)  # the old connections are closed
        gc.collect()
        assert held() == {"listen", "server.keepalive", "state.file", "tracing.otlp"}
        assert set(told) == {"listen", "server.keepalive", "state.file", "tracing"}
        assert app.reload(after) == told, "as long as it is not restarted"
        assert app.reload(before) == []
    finally:
        await app.stop(0)


def test_the_reference_says_of_what_a_reload_names_and_of_nothing_else_that_it_needs_a_restart() -> None:
    before = given()
    for name in set(VALUES) & set(ENTRIES):
        told = ENTRIES[name].restart == "Needs a restart."
        assert bool(need_restart(kept(before), given([name]))) == told, name


def test_to_begin_with_tls_needs_a_restart_and_another_certificate_does_not() -> None:
    plain = load(None, NOWHERE, {})
    one, other = (
        dataclasses.replace(plain, tls=dataclasses.replace(plain.tls, cert=Path(name), key=Path(name)))
        for name in ("one", "other")
    )
    assert need_restart(kept(plain), one) == need_restart(kept(one), plain) == ["tls"]
    assert need_restart(kept(one), other) == []
    assert ENTRIES["tls.key"].restart == "Needs a restart to begin or to end with TLS."
    assert set(NEED_RESTART) == {"listen", "tls", "state.file", "tracing", "server.keepalive"}
