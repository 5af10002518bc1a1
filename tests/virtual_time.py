"""Tests in virtual time: the clock jumps to the next timer when nothing is left to do; seconds cost nothing."""

from __future__ import annotations

import asyncio
import functools
import selectors
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test without sockets or threads in a loop whose clock, and `time.monotonic()`, begin at 0."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        with asyncio.Runner(loop_factory=_Loop) as runner, mock.patch("time.monotonic", runner.get_loop().time):
            runner.run(test(*args, **options))

    return run


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class _Jumping(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits, and nothing is scheduled"
        self.now += max(0.0, timeout)
        return super().select(0)
