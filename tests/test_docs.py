"""What README and docs say is true: commands, settings, codes, links."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from proxy.__main__ import _parser
from proxy.policy.errors import CODES
from proxy.settings import NO_SETTINGS, PREFIX, SettingsError, known_keys, load

CHECKOUT = Path(__file__).parent.parent
START = "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/vast-proxy serve"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest"
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *sorted((CHECKOUT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODES = re.compile(r"^\| Code \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return [(match[1], match[2]) for match in _FENCE.finditer(text_of(page))]


def spans(page: Path) -> list[str]:
    """Everything between backticks, outside of blocks."""
    return _SPAN.findall(_FENCE.sub("", text_of(page)))


def code(page: Path) -> list[str]:
    """Every line that somebody might type or look for: spans, and the lines of blocks with continued ones joined."""
    lines = [line for _, block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    return [*spans(page), *lines]


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [START, TESTS])
def test_readme_gives_the_two_commands_word_for_word_as_a_block_of_their_own(command: str) -> None:
    assert ("sh", f"{command}\n") in blocks(CHECKOUT / "README.md")


def _subcommands() -> dict[str, argparse.ArgumentParser]:
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no subcommands")


@each_page
def test_every_subcommand_and_flag_that_a_page_mentions_exists(page: Path) -> None:
    known = _subcommands()
    for line in code(page):
        for mention in re.finditer(r"\bvast-proxy ([a-z][a-z-]*)((?: [^|&;#`]*)?)", line):
            assert mention[1] in known, f"{name_of(page)}: {line}"
            flags = {flag for action in known[mention[1]]._actions for flag in action.option_strings}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", mention[2])) <= flags, f"{name_of(page)}: {line}"


def test_readme_mentions_every_subcommand() -> None:
    said = text_of(CHECKOUT / "README.md")
    assert [name for name in _subcommands() if f"vast-proxy {name}" not in said] == []


@each_page
def test_every_flag_of_a_script_that_a_page_mentions_exists(page: Path) -> None:
    for line in code(page):
        for mention in re.finditer(r"\b((?:bench|tests)/\w+\.py)((?: [^|&;#`]*)?)", line):
            known = {"--help", *re.findall(r'add_argument\("(--[a-z-]+)"', text_of(CHECKOUT / mention[1]))}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", mention[2])) <= known, f"{name_of(page)}: {line}"


# --- Settings ---------------------------------------------------------------------------------------------------------

KEYS = {".".join(str(part) for part in key) for key in known_keys()}
VARIABLES = {PREFIX + key.upper().replace(".", "__") for key in KEYS} | NO_SETTINGS


@each_page
def test_every_yaml_block_is_a_settings_file_that_loads(page: Path, tmp_path: Path) -> None:
    for number, (language, block) in enumerate(blocks(page)):
        if language in ("yaml", "yml"):
            file = tmp_path / f"{number}.yaml"
            file.write_text(block, "utf-8")
            load(file, {}, {})


def test_readme_shows_a_route_of_ones_own() -> None:
    assert any(language == "yaml" and "routes:" in block for language, block in blocks(CHECKOUT / "README.md"))


@each_page
def test_every_setting_that_a_page_mentions_exists(page: Path) -> None:
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    for span in spans(page):
        found = re.fullmatch(r"([a-z]+)(\.[a-z_]+)+(:.*)?", span)
        if found and found[1] in sections:
            assert span.partition(":")[0] in KEYS, f"{name_of(page)}: {span}"


@each_page
def test_every_variable_that_a_page_mentions_exists(page: Path) -> None:
    assert set(re.findall(rf"\b{PREFIX}\w+", text_of(page))) <= VARIABLES


@pytest.mark.parametrize("file", ["Dockerfile", "docker-compose.yml"])
def test_every_variable_of_the_image_exists(file: str) -> None:
    assert set(re.findall(rf"\b{PREFIX}\w+", text_of(CHECKOUT / file))) <= VARIABLES


# --- Codes of our own errors ------------------------------------------------------------------------------------------


def _codes_in(tree: ast.AST) -> Iterator[str]:
    """The second argument of every Refusal, the value of every "error" in a literal, and of every `….code = "…"`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="Refusal"), args=[_, ast.Constant(value=str(found)), *_]):
                yield found
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    match key, value:
                        case ast.Constant(value="error"), ast.Constant(value=str(found)):
                            yield found
            case ast.Assign(targets=[ast.Attribute(attr="code")], value=ast.Constant(value=str(found))):
                yield found


@cache
def codes_in_the_code() -> frozenset[str]:
    files = (CHECKOUT / "proxy").rglob("*.py")
    return frozenset(found for file in files for found in _codes_in(ast.parse(file.read_text("utf-8"))))


def codes_in_the_pages() -> set[str]:
    """The first column of every table of codes."""
    rows = [row for page in PAGES for table in _CODES.findall(text_of(page)) for row in table.splitlines()]
    return {found[1] for row in rows if (found := re.match(r"\| `([a-z_]+)` \|", row))}


def test_every_code_of_an_error_of_ours_is_explained() -> None:
    assert {"outcome_unknown", "queue_full", "internal_error", "not_found", "broken_off"} <= codes_in_the_code()
    assert codes_in_the_code() - codes_in_the_pages() == set()


def test_every_code_of_a_request_is_known_with_whose_matter_it_is() -> None:
    """Metrics have each from the start; a new one needs its place there."""
    of_no_request = {"too_many_connections", "key_needed", "admin_only"}  # of connections, and of our own pages
    of_our_pages = {"not_found", "method_not_allowed", "too_many_listeners", "not_ready"}
    assert CODES.keys() == codes_in_the_code() - of_no_request - of_our_pages


def test_every_code_that_is_explained_can_occur() -> None:
    assert codes_in_the_pages() - codes_in_the_code() == set()


def test_each_code_is_explained_once() -> None:
    rows = [row for page in PAGES for table in _CODES.findall(text_of(page)) for row in table.splitlines()]
    assert len(rows) == len(codes_in_the_pages())


def test_of_each_code_that_clients_meet_it_is_said_what_to_do() -> None:
    page = text_of(CHECKOUT / "docs" / "operations.md")
    met, ours = ({*re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)} for table in _CODES.findall(page))
    assert {"outcome_unknown", "broken_off"} <= met
    assert "not_ready" in ours
    advice = page.partition("## What to do when\n")[2].partition("\n## ")[0]
    seen = [row.split(" | ")[0] for row in advice.splitlines() if row.startswith("| ")]
    assert {code for row in seen for code in re.findall(r"`([a-z_]+)`", row)} == met


# --- Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(text_of(page)):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{name_of(page)}: {link}"
            assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}"


@each_page
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    for line in code(page):
        for name in re.findall(r"(?<![\w./-])(?:config|tests|bench|deploy|docs|proxy)/[\w./-]+\.\w+", line):
            assert (CHECKOUT / name).is_file(), f"{name_of(page)}: {name}"


# --- The image --------------------------------------------------------------------------------------------------------


def test_the_image_runs_as_compose_starts_it_and_by_itself_says_what_it_wants() -> None:
    image = dict(re.findall(rf"\b({PREFIX}\w+)=(\S+)", text_of(CHECKOUT / "Dockerfile")))
    del image[f"{PREFIX}ALLOW_OPEN"]  # in a comment
    composed = yaml.safe_load(text_of(CHECKOUT / "docker-compose.yml"))["services"]["vast-proxy"]["environment"]
    assert load(None, {"HOME": "/"} | image | composed, {}).listen.host == "0.0.0.0"
    with pytest.raises(SettingsError, match="allow_open: true"):
        load(None, {"HOME": "/"} | image, {})


def test_the_table_of_waits_is_what_the_simulation_gives() -> None:
    told = subprocess.run(
        [sys.executable, str(CHECKOUT / "bench" / "fairness.py")], capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() in (CHECKOUT / "docs" / "limits.md").read_text()
