"""The four services as processes of this machine, kept running.

Each process ends when its standard input does, so none outlives the supervisor. One that ends by itself is started
again, after a pause that grows; one that ends too often is given up, and when a kind of service has no process left,
the suite ends. What they log comes out line by line, behind the name of who wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

import structlog

from hocket.rpc.program import EXIT_REFUSED

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable, Sequence

_LINE_BYTES_MAX: Final = 2**20

_NOT_STARTED: Final = 127
"""As shells report a command that cannot be run."""

_log: Final = structlog.get_logger("suite")


@dataclass(frozen=True, slots=True)
class Part:
    """One process to run.

    Args:
        name: Unique, for people: `router`, `worker-2`.
        service: What it is one of: `worker`.
        command: How to start it.
        grace_seconds: How long it may take to end in order; it is killed after that.
    """

    name: str
    service: str
    command: tuple[str, ...]
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a process that ends by itself is started again.

    Args:
        pause_seconds_min: Pause before the first restart; it doubles with each one.
        pause_seconds_max: Longest pause.
        count_max: Restarts within `window_seconds`; a process that would need more is given up.
        window_seconds: As above. After that long a life, the pause is short again.
    """

    pause_seconds_min: float = 0.2
    pause_seconds_max: float = 10.0
    count_max: int = 5
    window_seconds: float = 60.0


class Supervisor:
    """Runs parts until told to stop.

    Args:
        parts: In the order in which they stop: who sends work before who does it. They start the other way round.
        restarts: When to start one again.
        write: Takes each line of log.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        restarts: Restarts = Restarts(),
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._parts = parts
        self._restarts = restarts
        self._write = write or _to_stderr
        self._width = max(len(part.name) for part in parts)
        self._running: dict[Part, Process] = {}
        self._ending = asyncio.Event()

    async def run(self, stopping: asyncio.Event) -> bool:
        """Start every part and keep it running until `stopping` is set, then end them in order.

        Returns:
            Whether that was asked for; otherwise a service was given up.
        """
        keepers = {part: asyncio.create_task(self._keep(part)) for part in reversed(self._parts)}
        asked = asyncio.create_task(stopping.wait())
        try:
            while not stopping.is_set():
                kept = [keeper for keeper in keepers.values() if not keeper.done()]
                left = {part.service for part, keeper in keepers.items() if not keeper.done()}
                if any(keeper.done() and keeper.exception() is not None for keeper in keepers.values()):
                    break  # a bug of ours, which is raised below
                if lost := {part.service for part in self._parts} - left:
                    _log.error("given up: nothing is left of a service", services=sorted(lost))
                    break
                await asyncio.wait([asked, *kept], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            self._ending.set()
            for _, parts in groupby(self._parts, lambda part: part.service):
                await asyncio.gather(*(self._end(part) for part in parts))
            for keeper in keepers.values():
                keeper.cancel()
            for outcome in await asyncio.gather(*keepers.values(), return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
        return stopping.is_set()

    async def _keep(self, part: Part) -> None:
        """Run a part again and again; return when it is given up."""
        loop = asyncio.get_running_loop()
        limits = self._restarts
        restarts: deque[float] = deque(maxlen=limits.count_max)
        pause_seconds = limits.pause_seconds_min
        while not self._ending.is_set():
            status = await self._run_once(part)
            if self._ending.is_set():
                return
            # In a later life its settings were good before: a port may be taken for a moment.
            if status == EXIT_REFUSED and not restarts:
                _log.error("process refused to start: it is not started again", process=part.name)
                return
            now = loop.time()
            if len(restarts) == limits.count_max and now - restarts[0] < limits.window_seconds:
                _log.error("process ends too often: it is not started again", process=part.name)
                return
            if restarts and now - restarts[-1] > limits.window_seconds:
                pause_seconds = limits.pause_seconds_min
            restarts.append(now)
            _log.warning("process ended", process=part.name, status=_told(status), restart_in_seconds=pause_seconds)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, limits.pause_seconds_max)

    async def _run_once(self, part: Part) -> int:
        """One life of a part; its exit status, negative for a signal."""
        # A session of its own: Ctrl-C in a terminal is for the supervisor, which ends the parts in order.
        try:
            process = await asyncio.create_subprocess_exec(
                *part.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=_LINE_BYTES_MAX,
            )
        except OSError as error:  # no memory, no process table: that may pass
            _log.error("process not started", process=part.name, error=str(error))
            return _NOT_STARTED
        self._running[part] = process
        _log.info("process started", process=part.name, pid=process.pid)
        try:
            await self._tail(part, process)
            return await process.wait()
        finally:
            del self._running[part]
            if process.returncode is None:
                process.kill()

    async def _tail(self, part: Part, process: Process) -> None:
        """Write what a process logs, until it ends."""
        stream = process.stderr
        assert stream is not None  # noqa: S101 - a pipe was asked for
        while True:
            try:
                line = await stream.readuntil()
            except asyncio.IncompleteReadError as end:
                line = end.partial
                if not line:
                    return
            except asyncio.LimitOverrunError as long:
                line = await stream.read(long.consumed)
            text = line.decode(errors="replace").rstrip("\n")
            self._write(f"{part.name:<{self._width}} | {text}")

    async def _end(self, part: Part) -> None:
        """Ask a part to end, and see to it."""
        process = self._running.get(part)
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(part.grace_seconds):
                await process.wait()
        except TimeoutError:
            _log.error("process did not end: killed", process=part.name)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _told(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else str(status)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
