"""What can go wrong with a disk, sorted: what the caller may try again, and what is the end."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER_MODE: Final = 0o700
"""What the registry keeps is for the registry alone."""

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_LOST: Final = frozenset(
    {
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_READONLY,
    }
)
_PRIMARY: Final = 0xFF
"""The low byte of an SQLite result code says what went wrong, the rest in which way."""


class StorageError(Exception):
    """The disk did not confirm a change, so what it holds is known only after a restart.

    Trying again would prove nothing: after a failed sync the kernel may have dropped the pages, and the next sync
    succeeds without them.
    """


@contextmanager
def disk() -> Iterator[None]:
    """Around work with files.

    Raises:
        HocketError: `CAPACITY` if the disk is full.
        StorageError: Anything else went wrong with it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full() from error
        raise StorageError(str(error)) from error


def check_database_error(error: object) -> None:
    """Raise what an SQLite error means, if it is the disk's; return if it is ours.

    Raises:
        HocketError: `CAPACITY` if the disk is full.
        StorageError: The database cannot be read or written.
    """
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    if code == sqlite3.SQLITE_FULL:
        raise _full()
    if code in _LOST:
        raise StorageError(str(error))


def sync_folder(folder: Path) -> None:
    """Make what was added to a folder, or removed from it, outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full() -> HocketError:
    return HocketError(Reason.CAPACITY, "the registry's disk is full: make room there, then try again")
