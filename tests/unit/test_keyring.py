from __future__ import annotations

import os
from pathlib import Path

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import key_bytes
from hocket.keyring import create_key, keys_folder, load_key
from hocket.packages.keys import public_key_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "hocket" / "keys" / "acme.key"


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def advice(path: Path) -> str:
    with pytest.raises(HocketError) as refusal:
        load_key(path)
    assert refusal.value.reason is Reason.BAD_KEY_FILE
    assert str(path) in refusal.value.message
    return refusal.value.message


def test_keys_are_in_the_configuration_folder() -> None:
    home = Path("/home/ada")
    assert keys_folder({}, home) == Path("/home/ada/.config/hocket/keys")
    assert keys_folder({"XDG_CONFIG_HOME": "/etc/ada"}, home) == Path("/etc/ada/hocket/keys")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_a_configuration_folder_that_is_not_absolute_is_ignored(value: str) -> None:
    assert keys_folder({"XDG_CONFIG_HOME": value}, Path("/home/ada")) == Path("/home/ada/.config/hocket/keys")


def test_a_created_key_is_loaded_and_belongs_to_the_public_key_shown(path: Path) -> None:
    public_key = create_key(path)
    seed = load_key(path)
    assert len(seed) == 32
    assert public_key_of(seed) == key_bytes(public_key)


def test_a_key_and_the_folders_made_for_it_are_closed_to_others(path: Path) -> None:
    old = os.umask(0)
    try:
        create_key(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {folder.stat().st_mode & 0o777 for folder in list(path.parents)[:3]} == {0o700}


def test_two_keys_differ(path: Path) -> None:
    assert create_key(path) != create_key(path.with_name("other.key"))


def test_an_existing_file_is_never_replaced(path: Path) -> None:
    create_key(path)
    seed = load_key(path)
    with pytest.raises(HocketError) as refusal:
        create_key(path)
    assert refusal.value.reason is Reason.NAME_TAKEN
    assert load_key(path) == seed


def test_a_dangling_link_is_not_followed_to_make_a_key(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HocketError, match="NAME_TAKEN"):
        create_key(link)
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HocketError) as refusal:
        create_key(tmp_path / "file" / "acme.key")
    assert refusal.value.reason is Reason.BAD_KEY_FILE


@pytest.mark.parametrize("size_bytes", [0, 31, 33, 64, 1000])
def test_a_file_of_another_size_is_no_key(tmp_path: Path, size_bytes: int) -> None:
    assert "32 raw bytes" in advice(write(tmp_path / "key", bytes(size_bytes)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644])
def test_a_key_open_to_others_is_refused_with_advice(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", bytes(32), mode)
    assert f"chmod 600 {path}" in advice(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_closed_to_others_is_loaded(tmp_path: Path, mode: int) -> None:
    assert load_key(write(tmp_path / "key", bytes(32), mode)) == bytes(32)


def test_a_link_to_a_key_is_judged_by_what_it_points_to(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(write(tmp_path / "key", bytes(32)))
    assert load_key(link) == bytes(32)
    (tmp_path / "key").chmod(0o644)
    assert "chmod" in advice(link)


def test_a_missing_key_is_reported_with_how_to_make_one(tmp_path: Path) -> None:
    assert "hocket keygen" in advice(tmp_path / "none")


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    advice(tmp_path)


def test_a_pipe_is_no_key_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    advice(tmp_path / "pipe")
