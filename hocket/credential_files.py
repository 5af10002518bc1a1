"""Files with what opens encrypted packages: a password, or a recipient's X25519 private key.

They are secrets of a service, handed to it by whoever runs it: readable by its user or its group, as orchestrators hand
out secrets, and by nobody else.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages.apr.encryption import X25519_KEY_BYTES, Password, RecipientKey

if TYPE_CHECKING:
    from pathlib import Path

CREDENTIALS_MAX: Final = 4096
"""Packages, by name or digest, that one worker may have credentials for: it announces for which."""
PASSWORD_BYTES_MAX: Final = 4096
"""A longer password is a mistake."""

_KEY_HEX: Final = re.compile(rb"[0-9a-f]{64}\r?\n?")
_OTHERS_MAY: Final = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP


def read_password(path: Path) -> Password:
    """The password in a file: its text in UTF-8, without the end of the line.

    Raises:
        HocketError: `BAD_KEY_FILE` if the file cannot be read, is open to others, is empty, has several lines or more
            than 4096 bytes, or is not UTF-8.
    """
    data = _read(path, PASSWORD_BYTES_MAX)
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _bad(path, "holds no password: it is not text in UTF-8") from None
    if not text or "\n" in text:
        raise _bad(path, "holds no password: write it as the one line of the file")
    return Password(text)


def read_recipient_key(path: Path) -> RecipientKey:
    """The X25519 private key in a file: 32 raw bytes, or their 64 hexadecimal digits.

    Raises:
        HocketError: `BAD_KEY_FILE` if the file cannot be read, is open to others, or holds no such key.
    """
    data = _read(path, 2 * X25519_KEY_BYTES + len(b"\r\n"))
    if len(data) == X25519_KEY_BYTES:
        return RecipientKey(data)
    if _KEY_HEX.fullmatch(data) is None:
        raise _bad(path, f"is no recipient's key: that is {X25519_KEY_BYTES} raw bytes, or their hexadecimal digits")
    return RecipientKey(bytes.fromhex(data.decode()))


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _bad(path, "is no file")
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror})") from error
    if status.st_mode & _OTHERS_MAY:
        raise _bad(path, f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}): run `chmod 600 {path}`")
    if len(data) > bytes_max:
        raise _bad(path, f"is too large: it has more than {bytes_max} bytes")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe that nobody writes would wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _bad(path: Path, what: str) -> HocketError:
    return HocketError(Reason.BAD_KEY_FILE, f"credential file {path} {what}")
