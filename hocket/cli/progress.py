"""What moves on standard error while work goes on: a bar, or a sign. Nothing where nobody would see it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hocket.cli import output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress_of(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar.

    Args:
        what: What is worked through.
        shown: Whether anything is shown for people at all.

    Yields:
        What to tell the bytes done, and all of them; None where nobody would see it.
    """
    if not shown or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=output.console(stderr=True), transient=True) as progress:
        task = progress.add_task(output.plain(what).markup)
        yield lambda done_bytes, total_bytes: progress.update(task, completed=done_bytes, total=total_bytes)


@contextmanager
def spinner(what: str, *, shown: bool) -> Iterator[None]:
    """Show that something goes on whose length nobody knows.

    Args:
        what: What.
        shown: Whether anything is shown for people at all.
    """
    if not shown or not sys.stderr.isatty():
        yield
        return
    with output.console(stderr=True).status(output.plain(what)):
        yield
