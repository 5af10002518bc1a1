"""Private keys on disk: 32 raw bytes each, in files only their owner can read.

An Ed25519 key signs (`create_key`), an X25519 key opens packages that are encrypted for it (`create_recipient_key`).
Nothing in a file says which of the two it is: use each for one purpose.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.identity import key_text
from hocket.packages.apr.encryption import X25519_KEY_BYTES, Recipient, RecipientKey
from hocket.packages.keys import SEED_SIZE_BYTES, generate_seed, public_key_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def keys_folder(environ: Mapping[str, str], home: Path) -> Path:
    """Where a person's keys are: `$XDG_CONFIG_HOME/hocket/keys`, by default `~/.config/hocket/keys`.

    Args:
        environ: The environment. A relative XDG_CONFIG_HOME is ignored, as its specification demands.
        home: The person's home directory.
    """
    config = Path(environ.get("XDG_CONFIG_HOME", ""))
    return (config if config.is_absolute() else home / ".config") / "hocket" / "keys"


def create_key(path: Path) -> str:
    """Create a private key file, and its folder if need be, and return the public key as `ed25519:<hex>`.

    The file gets mode 0600, folders that had to be made 0700. An existing file is never replaced.

    Raises:
        HocketError: `NAME_TAKEN` if the file exists, `BAD_KEY_FILE` if it cannot be written.
    """
    seed = generate_seed()
    _create(path, seed)
    return key_text(public_key_of(seed))


def create_recipient_key(path: Path) -> Recipient:
    """Create a recipient's private key file, as `create_key` does, and return whom packages are encrypted for.

    Raises:
        HocketError: `NAME_TAKEN` if the file exists, `BAD_KEY_FILE` if it cannot be written.
    """
    key = RecipientKey(secrets.token_bytes(X25519_KEY_BYTES))
    _create(path, key.private_key)
    return key.recipient


def _create(path: Path, secret: bytes) -> None:
    try:
        _make_private_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise HocketError(
            Reason.NAME_TAKEN, f"{path} exists: choose another name, or move the old key away first"
        ) from error
    except OSError as error:
        raise _bad(path, f"cannot be written ({error.strerror})") from error


def load_key(path: Path) -> bytes:
    """The private key in a file.

    Raises:
        HocketError: `BAD_KEY_FILE` if it cannot be read, is not a regular file of 32 bytes, or if anyone but its
            owner may read or write it.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            seed = file.read(SEED_SIZE_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError as error:
        raise _bad(path, "does not exist: make a key with `hocket keygen`") from error
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror})") from error
    if len(seed) != SEED_SIZE_BYTES:
        raise _bad(path, f"is not a private key: a key is a file of {SEED_SIZE_BYTES} raw bytes")
    if status.st_mode & _OTHERS:
        raise _bad(path, f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}): run `chmod 600 {path}`")
    return seed


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe that nobody writes would wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _make_private_folder(folder: Path) -> None:
    """Make a folder of mode 0700, and those above it: `Path.mkdir(parents=True)` would make them for everyone."""
    if not folder.exists():
        _make_private_folder(folder.parent)
        folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)


def _bad(path: Path, what: str) -> HocketError:
    return HocketError(Reason.BAD_KEY_FILE, f"key file {path} {what}")
