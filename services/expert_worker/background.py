"""Work that goes on for as long as the worker lives."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log: Final = structlog.get_logger("worker")
_PAUSE_SECONDS_MIN: Final = 0.1
_PAUSE_SECONDS_MAX: Final = 2.0
_SETTLED_SECONDS: Final = 1.0
"""A run of this length counts as a success: the next pause is short again."""


async def keep_running(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run something again whenever it ends or fails, with growing pauses, until cancelled.

    Refusals are logged when they differ from the last one, so that a registry that stays away is one line.

    Args:
        name: For the log.
        run: What to run.
    """
    loop = asyncio.get_running_loop()
    pause_seconds = _PAUSE_SECONDS_MIN
    last_reason = ""
    while True:
        begin = loop.time()
        try:
            await run()
        except HocketError as error:
            if error.reason != last_reason:
                _log.warning("interrupted", what=name, reason=error.reason, message=error.message)
            last_reason = error.reason
        except Exception:  # noqa: BLE001 - a bug in one run must not end them all
            _log.exception("bug", what=name)
        if loop.time() - begin > _SETTLED_SECONDS:
            pause_seconds, last_reason = _PAUSE_SECONDS_MIN, ""
        # Spread, so that workers do not all come back at the same instant.
        await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
        pause_seconds = min(2 * pause_seconds, _PAUSE_SECONDS_MAX)
