"""Servers side by side: rounds alternate, so that a noisy neighbour hits all of them, and the median round counts."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    import grpc

ROUNDS: Final = 5
CALLS: Final = {1: 400, 32: 1600}
"""Calls of a round, by the number of calls in flight."""
_STOP_SECONDS_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class Side:
    """One server, or several that answer together.

    Args:
        name: For the table.
        processes: Ids of its processes; those below them count as well.
        call: One whole call. Returns the times (`time.perf_counter`) at which its messages arrived.
    """

    name: str
    processes: tuple[int, ...]
    call: Callable[[], Awaitable[list[float]]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One round of a side, or the medians of several.

    Args:
        p50_ms: Latency of a whole call, median.
        p99_ms: The same, 99th percentile.
        first_ms: Time to the first message, median.
        second_ms: Time to the second message, median; of a call with one message, to that one.
        calls_per_second: Throughput.
        cpu_ms_per_call: Processor time of all its processes.
    """

    p50_ms: float
    p99_ms: float
    first_ms: float
    second_ms: float
    calls_per_second: float
    cpu_ms_per_call: float


def unary(channel: grpc.aio.Channel, method: str, request: bytes) -> Callable[[], Awaitable[list[float]]]:
    """A call with one answer, in bytes."""
    stub: Any = channel.unary_unary(method)

    async def call() -> list[float]:
        await stub(request, timeout=30)
        return [time.perf_counter()]

    return call


def stream(channel: grpc.aio.Channel, method: str, request: bytes) -> Callable[[], Awaitable[list[float]]]:
    """A call with a stream of answers, in bytes."""
    stub: Any = channel.unary_stream(method)

    async def call() -> list[float]:
        return [time.perf_counter() async for _ in stub(request, timeout=30)]

    return call


async def compare(
    sides: Sequence[Side], rounds: int, calls: Mapping[int, int] = CALLS
) -> dict[tuple[int, str], Figures]:
    """Measure all sides in alternating rounds, after a warm-up.

    Returns:
        The median of each figure over the rounds, by calls in flight and the side's name.
    """
    for side in sides:
        for in_flight in calls:
            await _measure(side, in_flight, calls[in_flight])
    found = {}
    for in_flight, count in calls.items():
        measured: dict[str, list[Figures]] = {side.name: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                measured[side.name].append(await _measure(side, in_flight, count))
        for name, figures in measured.items():
            columns = zip(*map(astuple, figures), strict=True)
            found[in_flight, name] = Figures(*map(statistics.median, columns))
    return found


async def _measure(side: Side, in_flight: int, count: int) -> Figures:
    arrivals: list[list[float]] = []
    left = iter(range(count))

    async def caller() -> None:
        for _ in left:
            begin = time.perf_counter()
            arrivals.append([end - begin for end in await side.call()])

    cpu, begin = _cpu_seconds(side.processes), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds(side.processes) - cpu
    whole = [times[-1] for times in arrivals]
    return Figures(
        p50_ms=statistics.median(whole) * 1e3,
        p99_ms=float(np.quantile(whole, 0.99)) * 1e3,
        first_ms=statistics.median(times[0] for times in arrivals) * 1e3,
        second_ms=statistics.median(times[min(1, len(times) - 1)] for times in arrivals) * 1e3,
        calls_per_second=count / seconds,
        cpu_ms_per_call=cpu / count * 1e3,
    )


async def cpu_by_process(side: Side, count: int) -> dict[int, float]:
    """Processor time per call of each process of a side, in milliseconds, with one call in flight."""
    before = _cpu_by_process(side.processes)
    await _measure(side, 1, count)
    return {
        pid: (seconds - before.get(pid, 0.0)) / count * 1e3 for pid, seconds in _cpu_by_process(side.processes).items()
    }


async def idle_share(side: Side, seconds: float) -> float:
    """Processor time that a side takes while nobody asks it anything, as a share of one core."""
    cpu = _cpu_seconds(side.processes)
    await asyncio.sleep(seconds)
    return (_cpu_seconds(side.processes) - cpu) / seconds


def _cpu_seconds(processes: Sequence[int]) -> float:
    return sum(_cpu_by_process(processes).values())


def _cpu_by_process(processes: Sequence[int]) -> dict[int, float]:
    seconds = {}
    for root in map(psutil.Process, processes):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                seconds[process.pid] = sum(process.cpu_times()[:2])
    return seconds


@contextmanager
def server(*command: str, **options: Any) -> Iterator[tuple[int, str]]:  # noqa: ANN401 - of Popen
    """Run a program that says on its first line of output where it listens; end it, and all below it, with the block.

    Args:
        command: The program and its arguments; `-m` and a module run this Python.
        options: For `subprocess.Popen`.

    Yields:
        Its process id and what it said.

    Raises:
        RuntimeError: It ended instead.
    """
    whole = (sys.executable, *command) if command[0] == "-m" else command
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, text=True, **options)  # noqa: S603 - programs of our own
    try:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield process.pid, line
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    below = psutil.Process(process.pid).children(recursive=True)  # later they may have no parent to be found by
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS_MAX)
    for left in psutil.wait_procs(below, _STOP_SECONDS_MAX)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.kill()
    process.wait()
