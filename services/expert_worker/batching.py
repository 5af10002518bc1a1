"""One compute thread per device; a queue joins it to the event loop.

Requests that arrive in one turn of the loop reach the thread together, and whatever has queued up while it computed is
taken as one batch. In a batch, requests for the same expert share a pass, and so do small ones for experts of the same
kind. Answers go back with one wake-up of the loop per batch; only ahead of a long pass are those at hand sent first.

A request whose caller has gone is not computed. A long pass is cut into slices of rows, which answer the same bits as
the whole: between two of them it leaves out what nobody waits for any more, and so ends early when nobody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import numpy as np
import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import VALUES_MAX
from hocket.telemetry import metrics
from services.expert_worker.compute import stack
from services.expert_worker.journal import PASS_PACKAGES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from numpy.typing import NDArray

    from services.expert_worker.compute import Kernel, Linear
    from services.expert_worker.journal import Journal
    from services.expert_worker.loader import Expert

_log: Final = structlog.get_logger("worker")
_LONG_WORK: Final = 2**18
"""Elementary operations from which a pass counts as long: about a millisecond on one core."""
_SMALL_VALUES: Final = 2**13
"""Input values up to which a request shares its pass with other experts: beyond, it would only copy weights."""
_SLICE_WORK: Final = 2**20
"""Elementary operations of a pass from which it is cut, and of its first slice: some milliseconds on one core."""
_SLICE_SECONDS: Final = 0.03
"""What the slices after it are meant to take, whatever the device: far less than a caller who has gone may cost."""
_SLICE_GROWTH: Final = 4
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
        queue_max: Requests that may wait or run; half as many for one expert, so that one that is slow or much asked
            leaves room for others.
        journal: Told which packages a pass runs.
    """

    def __init__(self, device: torch.device, threads: int, queue_max: int, journal: Journal) -> None:
        self._device = device
        self._threads = threads
        self._queue_max = queue_max
        self._journal = journal
        self._arrivals: list[_Job] = []
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._unsettled: set[_Job] = set()
        self._unsettled_of: Counter[Kernel] = Counter()
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
        if self._unsettled_of[expert.kernel] >= (self._queue_max + 1) // 2:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{self._unsettled_of[expert.kernel]} requests already wait for this expert, as many as one may have",
                retry_after_seconds=_QUEUE_FULL_RETRY_SECONDS,
            )
        future: asyncio.Future[Answer] = self._loop.create_future()
        if not self._arrivals:
            self._loop.call_soon(self._hand_over)
        job = _Job(expert, rows, future, done)
        self._arrivals.append(job)
        self._unsettled.add(job)
        self._unsettled_of[expert.kernel] += 1
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
            self._unsettled_of[job.expert.kernel] -= 1
            if not self._unsettled_of[job.expert.kernel]:
                del self._unsettled_of[job.expert.kernel]
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
        for one in _passes(jobs, self._journal.suspects):
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
        self._journal.begin_pass({job.expert.package for job in waiting})
        try:
            return outcomes + self._pass(waiting)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to its request
            if len(waiting) == 1:
                return [*outcomes, (waiting[0], _refusal(error))]
        finally:
            self._journal.end_pass()
        return outcomes + [outcome for job in waiting for outcome in self._run([job])]

    def _pass(self, jobs: list[_Job]) -> list[_Outcome]:
        begin = time.perf_counter()
        rows = torch.from_numpy(np.concatenate([job.rows for job in jobs]))
        if self._device.type == "cuda":
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        kernels = [job.expert.kernel for job in jobs]
        kernel = kernels[0]
        if any(other is not kernel for other in kernels):
            output = self._execute(stack(cast("list[Linear]", kernels), [len(job.rows) for job in jobs]), rows)
        elif len(rows) * jobs[0].expert.work_per_row <= _SLICE_WORK:
            output = self._execute(kernel, rows)
        else:
            output = self._in_slices(jobs, rows)
        seconds = time.perf_counter() - begin
        metrics.BATCH_ROWS.observe(len(output))
        outcomes: list[_Outcome] = []
        end = 0
        for job in jobs:
            start, end = end, end + len(job.rows)
            outcomes.append((job, Answer(output[start:end], begin, seconds)))
        return outcomes

    def _in_slices(self, jobs: list[_Job], rows: torch.Tensor) -> NDArray[np.float32]:
        """What one expert answers to the rows of several requests; anything in the rows of those who have gone."""
        expert = jobs[0].expert
        output = np.zeros((len(rows), expert.columns), np.float32)
        ends = list(accumulate(len(job.rows) for job in jobs))
        at_once = max(1, _SLICE_WORK // expert.work_per_row)
        start = 0
        while start < len(rows):
            place = bisect_right(ends, start)
            if jobs[place].future.cancelled():
                start = ends[place]
                continue
            begin = time.perf_counter()
            part = rows[start : start + at_once]
            output[start : start + at_once] = self._execute(expert.kernel, part)
            start += len(part)
            fitting = int(len(part) * _SLICE_SECONDS / (time.perf_counter() - begin))
            at_once = max(1, min(fitting, _SLICE_GROWTH * at_once))
        return output

    def _execute(self, kernel: Kernel, rows: torch.Tensor) -> NDArray[np.float32]:
        metrics.EXECUTIONS.inc()
        return kernel(rows).cpu().numpy()


@dataclass(slots=True, eq=False)
class _Pass:
    """Requests that are computed together."""

    jobs: list[_Job]
    rows: int = 0
    work: int = 0


def _passes(jobs: list[_Job], suspects: Collection[bytes]) -> list[_Pass]:
    """Jobs of one expert and width together, and small ones of one family; the least work first.

    Args:
        jobs: In the order of their arrival.
        suspects: Packages whose experts share a pass with no other expert.
    """
    passes: list[_Pass] = []
    current: dict[tuple[object, int], _Pass] = {}
    for job in jobs:
        rows, width = job.rows.shape
        small = rows * width <= _SMALL_VALUES and job.expert.package not in suspects
        mates = (job.expert.family if small else job.expert.kernel, width)
        one = current.get(mates)
        if (
            one is None
            or (one.rows + rows) * max(width, job.expert.columns) > VALUES_MAX  # the limit of one request
            or len(one.jobs) >= PASS_PACKAGES_MAX
        ):
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
