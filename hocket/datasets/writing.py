"""Dataset files that are written whole: a reader finds the old rows or all the new ones."""

from __future__ import annotations

import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

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
        HocketError: `BAD_REQUEST` if it cannot be written.
    """
    try:
        draft = path.with_name(f".{secrets.token_hex(8)}.new")
        try:
            with draft.open("xb") as file:
                yield lambda line: _write(file.write, line)
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()  # as far as it is still there
    except (OSError, ValueError) as error:  # the latter for a name that is none
        raise HocketError(Reason.BAD_REQUEST, f"cannot write {path}: {getattr(error, 'strerror', error)}") from error


def _write(write: Callable[[bytes], int], line: bytes) -> None:
    write(line)
    write(b"\n")
