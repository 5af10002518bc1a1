"""One compute thread per device; a queue joins it to the event loop.

Requests that arrive in one turn of the loop reach the thread together, and whatever has queued up while it computed is
taken as one batch. In a batch, requests for the same expert share a pass, and so do small ones for experts of the same
kind. Answers go back with one wake-up of the loop per batch; only ahead of a long pass are those at hand sent first.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import numpy as np
import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import VALUES_MAX
from hocket.telemetry import metrics
from services.expert_worker.compute import stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from services.expert_worker.compute import Linear
    from services.expert_worker.loader import Expert

_log: Final = structlog.get_logger("worker")
_LONG_WORK: Final = 2**18
"""Elementary operations from which a pass counts as long: about a millisecond on one core."""
_SMALL_VALUES: Final = 2**13
"""Input values up to which a request shares its pass with other experts: beyond, it would only copy weights."""
_QUEUE_FULL_RETRY_SECONDS: Final = 0.05
_MEMORY_RETRY_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What an expert answered.

    Args:
        output: float32 `[n, C]`.
        begin: When the computation began, on the clock of `time.perf_counter`.
        compute_seconds: How long the pass took, shared with batch mates.
    """

    output: NDArray[np.float32]
    begin: float
    compute_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    expert: Expert
    rows: NDArray[np.float32]
    future: asyncio.Future[Answer]
    done: Callable[[], None]


_Outcome: TypeAlias = "tuple[_Job, Answer | BaseException]"


class Batcher:
    """Runs experts on one device.

    Args:
        device: Where the experts are.
        threads: Threads of one pass on a CPU.
        queue_max: Requests that may wait or run.
    """

    def __init__(self, device: torch.device, threads: int, queue_max: int) -> None:
        self._device = device
        self._threads = threads
        self._queue_max = queue_max
        self._arrivals: list[_Job] = []
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._unsettled: set[_Job] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread. Call it in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=f"compute-{self._device}", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finish what is queued, then stop the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._hand_over()
            self._queue.put(None)
            await asyncio.to_thread(thread.join)

    def submit(self, expert: Expert, rows: NDArray[np.float32], done: Callable[[], None]) -> asyncio.Future[Answer]:
        """Have `expert` answer `rows`, which it has checked.

        Cancelling the future drops the request if its computation has not begun.

        Args:
            expert: On this device.
            rows: float32 `[n, F]`.
            done: Called in the event loop when nothing touches the expert for this request any more, also after a
                cancellation; not called if this method raises.

        Raises:
            HocketError: `QUEUE_FULL`; `DRAINING` before `start` and after `stop`. The future raises `DEVICE_MEMORY`
                if this request alone needs more working memory than the device has.
        """
        if self._loop is None or self._thread is None:
            raise HocketError(Reason.DRAINING, "this worker is shutting down: try another one")
        if len(self._unsettled) >= self._queue_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{len(self._unsettled)} requests already wait for {self._device}",
                retry_after_seconds=_QUEUE_FULL_RETRY_SECONDS,
            )
        future: asyncio.Future[Answer] = self._loop.create_future()
        if not self._arrivals:
            self._loop.call_soon(self._hand_over)
        job = _Job(expert, rows, future, done)
        self._arrivals.append(job)
        self._unsettled.add(job)
        return future

    def _hand_over(self) -> None:
        """Once per turn of the loop: wake the thread once, for everything that arrived."""
        if self._arrivals:
            self._queue.put(self._arrivals)
            self._arrivals = []

    def _settle(self, outcomes: Iterable[_Outcome]) -> None:
        for job, outcome in outcomes:
            if job not in self._unsettled:
                continue
            self._unsettled.remove(job)
            job.done()
            if job.future.done():  # the caller has gone
                continue
            if isinstance(outcome, Answer):
                job.future.set_result(outcome)
            else:
                job.future.set_exception(outcome)

    # What follows runs in the compute thread.

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            going_on = True
            while going_on:
                jobs, going_on = self._take()
                try:
                    self._compute(jobs)
                except Exception as error:  # noqa: BLE001 - without its thread a worker would hang
                    _log.exception("bug", device=str(self._device))
                    self._deliver([(job, error) for job in jobs])

    def _take(self) -> tuple[list[_Job], bool]:
        """Everything that waits, and whether more may come; waits for the first."""
        jobs: list[_Job] = []
        arrived = self._queue.get()
        while arrived is not None:
            jobs += arrived
            try:
                arrived = self._queue.get_nowait()
            except queue.Empty:
                return jobs, True
        return jobs, False

    def _compute(self, jobs: list[_Job]) -> None:
        outcomes: list[_Outcome] = []
        for one in _passes(jobs):
            if outcomes and one.work > _LONG_WORK:
                self._deliver(outcomes)
                outcomes = []
            outcomes += self._run(one.jobs)
        if outcomes:
            self._deliver(outcomes)

    def _deliver(self, outcomes: list[_Outcome]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without `stop`
                self._loop.call_soon_threadsafe(self._settle, outcomes)

    def _run(self, jobs: list[_Job]) -> list[_Outcome]:
        """One pass, without those who have gone. If it fails, each alone: a request fails only itself."""
        waiting: list[_Job] = []
        outcomes: list[_Outcome] = []
        for job in jobs:
            if job.future.cancelled():
                outcomes.append((job, asyncio.CancelledError()))
            else:
                waiting.append(job)
        if not waiting:
            return outcomes
        try:
            return outcomes + self._pass(waiting)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to its request
            if len(waiting) == 1:
                return [*outcomes, (waiting[0], _refusal(error))]
        return outcomes + [outcome for job in waiting for outcome in self._run([job])]

    def _pass(self, jobs: list[_Job]) -> list[_Outcome]:
        begin = time.perf_counter()
        rows = torch.from_numpy(np.concatenate([job.rows for job in jobs]))
        if self._device.type == "cuda":
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        kernels = [job.expert.kernel for job in jobs]
        kernel = kernels[0]
        if any(other is not kernel for other in kernels):
            kernel = stack(cast("list[Linear]", kernels), [len(job.rows) for job in jobs])
        output = kernel(rows).cpu().numpy()
        seconds = time.perf_counter() - begin
        metrics.BATCH_ROWS.observe(len(output))
        outcomes: list[_Outcome] = []
        end = 0
        for job in jobs:
            start, end = end, end + len(job.rows)
            outcomes.append((job, Answer(output[start:end], begin, seconds)))
        return outcomes


@dataclass(slots=True, eq=False)
class _Pass:
    """Requests that are computed together."""

    jobs: list[_Job]
    rows: int = 0
    work: int = 0


def _passes(jobs: list[_Job]) -> list[_Pass]:
    """Jobs of one expert and width together, and small ones of one family; the least work first."""
    passes: list[_Pass] = []
    current: dict[tuple[object, int], _Pass] = {}
    for job in jobs:
        rows, width = job.rows.shape
        mates = (job.expert.family if rows * width <= _SMALL_VALUES else job.expert.kernel, width)
        one = current.get(mates)
        if one is None or (one.rows + rows) * max(width, job.expert.columns) > VALUES_MAX:  # the limit of one request
            one = current[mates] = _Pass([])
            passes.append(one)
        one.jobs.append(job)
        one.rows += rows
        one.work += rows * job.expert.work_per_row
    return sorted(passes, key=lambda one: one.work)


def _refusal(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return HocketError(
            Reason.DEVICE_MEMORY,
            "the device has no memory left for this request: send fewer rows at once",
            retry_after_seconds=_MEMORY_RETRY_SECONDS,
        )
    return error
