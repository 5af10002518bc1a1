"""Dataset files that are written whole: a reader finds the old rows or all the new ones."""

from __future__ import annotations

import secrets
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Write a file line by line, in little memory; nothing is left of it where the block fails.

    Args:
        path: Where; it takes the place of a file that is there when the block ends.

    Yields:
        What writes one line.

    Raises:
        HocketError: `BAD_REQUEST` if it cannot be written. What the block raises stays as it is.
    """
    draft = path.parent / f".{secrets.token_hex(8)}.new"
    with _refusing(path):
        file = draft.open("xb")
    try:
        yield lambda line: _write(path, file, line)
        with _refusing(path):
            file.close()  # which writes what is left
            draft.replace(path)
    finally:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            draft.unlink()  # as far as it is still there


def _write(path: Path, file: IO[bytes], line: bytes) -> None:
    with _refusing(path):
        file.write(line)
        file.write(b"\n")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # the latter for a name that is none
        raise HocketError(Reason.BAD_REQUEST, f"cannot write {path}: {getattr(error, 'strerror', error)}") from error
