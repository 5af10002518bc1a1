"""Files that are written whole: a reader finds the old bytes or the new ones, never a part."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, data: bytes, *, replace: bool = True, mode: int | None = None) -> None:
    """Write a file at once, so that it outlasts a power failure. Nothing is left behind where that fails.

    Args:
        path: Where. A link there is replaced itself, not what it leads to.
        data: What.
        replace: Whether it may take the place of a file that is there; looking and writing are one step.
        mode: Its permissions; None for those that the process gives to new files.

    Raises:
        FileExistsError: Something is there, and must not be replaced.
        OSError: It cannot be written.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with draft.open("xb") as file:  # which follows no link that somebody has put there
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if replace:
            draft.replace(path)
        else:
            path.hardlink_to(draft)
    finally:
        with suppress(OSError):
            draft.unlink()  # as far as it is still there
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was named or removed in a folder outlast a power failure.

    Raises:
        OSError: The disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
