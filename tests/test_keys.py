"""Where the gateway's keys come from, and that a file which others can reach is none to keep them in."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from proxy import keys
from proxy.keys import new_token, read_key
from proxy.policy.members import KeyRules

KEY = "0123456789abcdef-key-of-the-account"


def told(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_key(KeyRules(file=str(path)), {})
    assert KEY not in str(caught.value)
    assert str(caught.value).startswith(f"{path} ")
    return str(caught.value).removeprefix(f"{path} ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    return file


def test_a_key_is_read_from_a_file_or_a_variable(file: Path) -> None:
    assert read_key(KeyRules(file=str(file)), {}).value == KEY
    assert read_key(KeyRules(env="THE_KEY"), {"THE_KEY": KEY}).value == KEY


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_refused_unless_it_is_a_mounted_secret(
    file: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.chmod(mode)
    assert told(file) == f"can be read by others (mode {mode:04o}): chmod 600, or put it below /run/secrets"
    monkeypatch.setattr(keys, "MOUNTED", (file.parent,))
    assert read_key(KeyRules(file=str(file)), {}).value == KEY


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_file_that_others_can_write_is_refused_wherever_it_is(
    file: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MOUNTED", (file.parent,))
    file.chmod(mode)
    assert told(file) == f"can be written by others (mode {mode:04o}): chmod 600"


@pytest.mark.parametrize("text", ["", "short", f"{KEY}\n{KEY}", f"{KEY} x", KEY * 200, "ключ" * 10])
def test_what_is_no_key_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    assert told(file) == "holds no key: expected 16 to 512 printable ASCII characters in one line"


def test_a_token_is_no_key(file: Path) -> None:
    file.write_text(new_token())
    assert told(file) == "holds a gateway token: expected a key of the vendor's"


def test_a_file_of_another_user_is_refused_unless_it_is_a_mounted_secret(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() == 0:  # whose own files are good for everybody
        os.chown(file, 65534, 65534)
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert told(file) == "belongs to another user: chown it to the one that vast-proxy runs as, or to root"
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert read_key(KeyRules(file=str(file)), {}).value == KEY
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(keys, "MOUNTED", (file.parent,))
    assert read_key(KeyRules(file=str(file)), {}).value == KEY


def test_nobody_waits_for_who_writes_into_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)
    assert told(file) == "is not a file"


@pytest.mark.parametrize("name", [KEY, "0123456789abcdef", "ABCDEF0123456789", "a1/" + KEY])
def test_a_key_that_was_put_in_the_place_of_a_name_is_not_told(name: str) -> None:
    with pytest.raises(ValueError, match=r"^\*\*\* cannot be read"):
        read_key(KeyRules(file=name), {})
    with pytest.raises(ValueError, match=r"^the environment variable \*\*\* is not set"):
        read_key(KeyRules(env=name), {})


@pytest.mark.parametrize("name", ["HOME_KEY", "VAST_API_KEY_OF_THE_TEAM", "key_2"])
def test_the_name_of_a_variable_is_told(name: str) -> None:
    with pytest.raises(ValueError, match=f"variable {name} is not set"):
        read_key(KeyRules(env=name), {})


def test_a_file_that_is_not_there_or_no_file_is_told(file: Path) -> None:
    assert told(file.parent / "no") == "cannot be read: No such file or directory"
    assert told(file.parent) == "cannot be read: Is a directory"


def test_no_two_tokens_are_alike_and_each_has_256_bits() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"vp_[A-Za-z0-9_-]{43}", token) for token in made)
