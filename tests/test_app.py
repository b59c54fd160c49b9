"""The lifespan: what is kept over a restart, and what is told of it."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import Start

from proxy.app import ORIGINS_KEPT, StateFile

HERE = {"api": "https://one.example", "serverless": "https://two.example"}
ASKS = "0123456789abcdef api PUT /api/v0/asks/{id}/"
LEARNED = {ASKS: {"interval": 6.0, "seen": 1}, "0123456789abcdef serverless POST /route/": {"margin": 0.1, "seen": 1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "down" / "state.json"


def test_what_is_written_is_read_again_by_its_owner_alone(path: Path) -> None:
    StateFile(path).write(LEARNED, HERE)
    assert StateFile(path).read(HERE) == LEARNED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_a_write_that_fails_half_way_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(path)
    file.write(LEARNED, HERE)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file.write({ASKS: {"interval": 9.0}}, HERE)
    assert StateFile(path).read(HERE) == LEARNED
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_what_a_killed_process_had_half_written_is_cleared_away(path: Path) -> None:
    StateFile(path).write(LEARNED, HERE)
    (path.parent / ".state-abc").write_text('{"version": 1, "or')
    assert StateFile(path).read(HERE) == LEARNED
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"version": 2, "origins": {}}', '{"version": 1}', '{"version": 1, "origins": {"x": 1}}'],
)
def test_a_damaged_file_is_set_aside_with_a_warning(path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert StateFile(path).read(HERE) == {}
    assert path.with_suffix(".damaged").read_text() == damage
    assert not path.exists()
    assert "is damaged: set aside" in caplog.text


def test_a_file_that_cannot_be_read_or_written_is_told_and_no_reason_to_stop(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir(parents=True)
    file = StateFile(path)
    with caplog.at_level(logging.WARNING):
        assert file.read(HERE) == {}
        file.write(LEARNED, HERE)
        file.write(LEARNED, HERE)
    assert [record.getMessage().split(" (")[0].rpartition(" ")[2] for record in caplog.records] == ["read", "written"]


def test_what_another_server_taught_is_neither_used_nor_forgotten(path: Path) -> None:
    StateFile(path).write(LEARNED, HERE)
    fake = {"api": "http://127.0.0.1:9000", "serverless": "http://127.0.0.1:9000"}
    rehearsal = StateFile(path)
    assert rehearsal.read(fake) == {}
    rehearsal.write({ASKS: {"interval": 1.0}}, fake)
    assert StateFile(path).read(HERE) == LEARNED
    assert StateFile(path).read(fake) == {ASKS: {"interval": 1.0}}


def test_the_file_does_not_grow_with_every_server_ever_tried(path: Path) -> None:
    for number in range(30):
        file = StateFile(path)
        origins = {"api": f"http://127.0.0.1:{number}", "serverless": "https://two.example"}
        file.read(origins)
        file.write({ASKS: {"interval": float(number)}}, origins)
    assert len(json.loads(path.read_text())["origins"]) == ORIGINS_KEPT + 1


def test_marks_of_time_alone_are_no_reason_to_write(path: Path) -> None:
    file = StateFile(path)
    assert file.differs(LEARNED)
    file.write(LEARNED, HERE)
    later: dict[str, Any] = {key: state | {"seen": 99} for key, state in LEARNED.items()}
    assert not file.differs(later)
    assert file.differs({ASKS: {"interval": 7.0}})


@pytest.mark.looptime
async def test_it_is_ready_from_its_start_to_its_end(start: Start) -> None:
    gateway = await start()
    assert (await gateway.get("/_proxy/ready")).status == 200
    assert (await gateway.get("/_proxy/health")).status == 200
    await gateway.app.stop(1.0)
    assert not gateway.app._ready
    assert gateway.app.admin("GET", "/_proxy/ready").status == 503
    assert gateway.app.admin("GET", "/_proxy/health").status == 200
