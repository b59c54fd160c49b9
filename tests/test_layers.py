"""Imports only fall: who may know whom, and the two things that only one or two files may touch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PROXY = Path(__file__).parents[1] / "proxy"
POLICY = {f"policy.{file.stem}" for file in (PROXY / "policy").glob("*.py")} - {"policy.__init__"}
EVERYTHING = {file.stem for file in PROXY.glob("*.py")} | {"policy", ""}

MAY_IMPORT = {
    "clock": set(),
    "certificates": set(),
    "cleaning": {"policy"},
    "keys": {"policy"},
    "bounds": {"clock"},
    "coalescer": set(),
    "store": {"clock"},
    "settings": {"certificates", "keys", "policy"},
    "upstream": {"policy", "settings"},
    "admin": {"policy"},
    "admission": {"clock", "policy"},
    "ledger": {"clock", "policy"},
    "pipeline": {"admission", "cleaning", "clock", "coalescer", "ledger", "policy", "settings", "spends", "store"},
    "spends": {"clock", "policy"},
    "reference": {"policy", "settings"},
    "server": {"bounds", "clock", "pipeline", "policy", "settings", "slowing"},
    "slowing": {"clock", "policy"},
    "health": set(),
    "metrics": {"policy"},
    "own": {"admin", "admission", "policy"},
    "status": set(),
    "tracing": {"clock", "policy"},
    "window": {"clock", "policy"},
    "app": EVERYTHING,
    "__main__": EVERYTHING,
    "__init__": set(),
}
FOREIGN = {
    "admission": {"aiolimiter"},
    "ledger": {"cachetools"},
    "metrics": {"prometheus_client"},
    "pipeline": {"cachetools"},
    "reference": {"yaml"},
    "settings": {"pydantic", "pydantic_core", "yaml"},
    "slowing": {"cachetools"},
    "store": {"cachetools"},
    "status": {"rich"},
    "tracing": {"opentelemetry"},
    "server": {"aiohttp", "cachetools", "multidict", "yarl"},
    "upstream": {"aiohttp", "multidict", "yarl"},
    "__main__": {"yaml"},
}
IMPURE = {"aiohttp", "asyncio", "random", "secrets", "selectors", "socket", "threading", "time", "uuid"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """What a module imports: ours (`policy` for any of policy, `""` for the package itself), and others' top names."""
    file = PROXY.joinpath(*module.split(".")).with_suffix(".py")
    package = ["proxy", *module.split(".")][:-1]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "proxy":
                first = rest.partition(".")[0]
                ours.add(first if first in EVERYTHING else "")
            else:
                others.add(top)
    return ours, others


@pytest.mark.parametrize("module", sorted(EVERYTHING - {"policy", ""}))
def test_a_module_knows_only_those_below_it(module: str) -> None:
    assert module in MAY_IMPORT, "a new file needs its place in the order"
    ours, others = imports(module)
    assert ours <= MAY_IMPORT[module]
    if module not in ("app", "__init__"):
        assert others - sys.stdlib_module_names <= FOREIGN.get(module, set())


@pytest.mark.parametrize("module", sorted(POLICY))
def test_policy_is_a_closed_room(module: str) -> None:
    ours, others = imports(module)
    assert ours <= {"policy"}
    assert others - sys.stdlib_module_names <= {"multidict"}
    assert not others & IMPURE
    source = ast.parse((PROXY / f"{module.replace('.', '/')}.py").read_text())
    assert not [node for node in ast.walk(source) if isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor)]


def importers(name: str) -> set[str]:
    return {module for module in (EVERYTHING - {"policy", ""}) | POLICY if name in imports(module)[1]}


def test_only_the_clock_knows_the_time_and_app_hands_it_the_wall_clock() -> None:
    assert importers("time") <= {"clock", "app"}
    used = [
        node.attr
        for node in ast.walk(ast.parse((PROXY / "app.py").read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    ]
    assert set(used) <= {"time"}


def test_only_the_two_ends_know_aiohttp() -> None:
    assert importers("aiohttp") == {"server", "upstream"}


def test_chance_is_drawn_only_where_everything_is_put_together() -> None:
    assert importers("random") <= {"app"}
