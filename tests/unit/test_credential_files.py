"""Files with passwords and recipients' keys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from hocket.credential_files import PASSWORD_BYTES_MAX, read_password, read_recipient_key
from hocket.errors import HocketError, Reason
from hocket.keyring import create_key, create_recipient_key, load_key
from hocket.packages import RecipientKey
from hocket.packages.apr.encryption import seal, unseal

if TYPE_CHECKING:
    from pathlib import Path

KEY = RecipientKey(b"\x09" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def written(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def advice(read: Any, path: Path) -> str:
    with pytest.raises(HocketError) as caught:
        read(path)
    assert caught.value.reason is Reason.BAD_KEY_FILE
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b" spaces count \n", " spaces count "),
        ("Grüße\n".encode(), "Grüße"),
        (b"x" * PASSWORD_BYTES_MAX, "x" * PASSWORD_BYTES_MAX),
    ],
)
def test_a_password_is_the_one_line_of_its_file(path: Path, data: bytes, text: str) -> None:
    assert read_password(written(path, data)).text == text


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b"two\nlines\n", b"\xff\xfe", b"x" * (PASSWORD_BYTES_MAX + 1)])
def test_what_is_no_password_is_refused_and_not_repeated(path: Path, data: bytes) -> None:
    message = advice(read_password, written(path, data))
    assert "two" not in message
    assert "xx" not in message


@pytest.mark.parametrize(
    "data", [KEY.private_key, KEY.private_key.hex().encode(), KEY.private_key.hex().encode() + b"\r\n"]
)
def test_a_key_is_32_bytes_or_their_digits(path: Path, data: bytes) -> None:
    assert read_recipient_key(written(path, data)).recipient == KEY.recipient


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33), b"0" * 63, b"0" * 64 + b"\n\n", b"g" * 64, b"A" * 64])
def test_what_is_no_key_is_refused(path: Path, data: bytes) -> None:
    advice(read_recipient_key, written(path, data))


@pytest.mark.parametrize("read", [read_password, read_recipient_key])
class TestWhoMayReadIt:
    @pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640, 0o700])
    def test_its_owner_and_its_group_may(self, path: Path, read: Any, mode: int) -> None:
        read(written(path, b"0" * 64, mode))

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601, 0o620, 0o660])
    def test_others_may_not_and_nobody_else_may_write(self, path: Path, read: Any, mode: int) -> None:
        assert f"chmod 600 {path}" in advice(read, written(path, b"0" * 64, mode))

    def test_what_is_not_there_is_refused(self, path: Path, read: Any) -> None:
        assert "cannot be read" in advice(read, path)

    def test_what_is_no_file_is_refused_without_waiting(self, path: Path, read: Any) -> None:
        path.mkdir()
        advice(read, path)
        path.rmdir()
        os.mkfifo(path)
        assert "no file" in advice(read, path)

    def test_a_link_is_judged_by_what_it_leads_to(self, path: Path, read: Any) -> None:
        """Orchestrators hand out secrets behind links."""
        link = path.with_name("link")
        link.symlink_to(written(path, b"0" * 64))
        read(link)
        path.chmod(0o644)
        advice(read, link)


def test_a_recipient_s_key_is_made_as_keys_are(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "worker.key"
    recipient = create_recipient_key(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert len(load_key(path)) == 32
    assert unseal(memoryview(seal(b"payload", recipient)), read_recipient_key(path)) == b"payload"
    for create in (create_key, create_recipient_key):
        with pytest.raises(HocketError) as caught:
            create(path)
        assert caught.value.reason is Reason.NAME_TAKEN
    assert create_recipient_key(tmp_path / "other.key") != recipient
