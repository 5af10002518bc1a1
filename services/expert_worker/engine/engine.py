"""The engine thread, which owns the device and computes step by step, and the streams that join it to the event loop.

The event loop talks to the thread by calls put in a queue: begin this sequence, drop that one, so much has been read.
The thread answers with one wake-up of the loop per step, for everything that the step has brought about. So neither
ever touches what is the other's, and no lock is needed: the scheduler and the sequences are the thread's, the answers
and their counts the loop's.

A sequence whose reader is behind pauses, and only that one. When nothing can be computed the thread sleeps until the
loop calls: whatever could change that, a request, a reader that has caught up or gone, is such a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeAlias

import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.sampling import choose
from services.expert_worker.engine.scheduler import Scheduler
from services.expert_worker.engine.sequence import Delta, Sequence, Started

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from transformers import PreTrainedTokenizerFast

    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.pages import Pages
    from services.expert_worker.engine.sampling import Choice
    from services.expert_worker.engine.scheduler import EngineLimits, Share
    from services.expert_worker.engine.sequence import Event, TextRequest

_log: Final = structlog.get_logger("worker")
_RATE_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 1.0
"""How often the thread looks, while nothing can be computed, whether those who wait have waited long enough."""
_PROBE: Final = Part(start=0, embeddings=None, token_ids=(0,), pages=(0,), mixture=(), sampled=True)
"""One token for the base alone, into the scratch page: a device that fails at this is of no use to anybody."""


class RunnerLike(Protocol):
    """Who computes a step."""

    def run(self, parts: list[Part]) -> torch.Tensor:
        """Logits, float32 `[sampled parts, vocabulary]`, in the order of the parts."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """How busy an engine is.

    Attributes:
        running_count: Answers that run.
        waiting_count: Answers that wait for memory.
        used_page_count: KV pages in use, by those that run.
        page_count: KV pages in all.
        tokens_per_second: Tokens chosen per second, over the last ten seconds.
    """

    running_count: int
    waiting_count: int
    used_page_count: int
    page_count: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class _Dropped:
    """The thread has let go of a sequence: because it is whole or nobody reads it, or because of this error."""

    error: Exception | None


_News: TypeAlias = "tuple[Sequence, Event | _Dropped]"
_Result: TypeAlias = "tuple[Sequence, int, Choice | HocketError | None]"
"""Whose so many rows were computed, and its next token if they were the last before it, or why there is none."""


class Answer:
    """The events of one answer, as they come: a start, deltas, a finish. Belongs to the event loop.

    Whoever has it reads it to its end or closes it. Cancelling whoever waits for the next event closes it, too.

    Attributes:
        token_count_max: Most tokens that it may have: what was asked for, or as many as the context has room for.
    """

    def __init__(
        self, token_count_max: int, batch: int, read: Callable[[int], None], cancel: Callable[[], None]
    ) -> None:
        self.token_count_max = token_count_max
        self._batch = batch
        self._calls: tuple[Callable[[int], None], Callable[[], None]] | None = read, cancel
        """How to tell the engine what has been read, and that the rest is not wanted. None once the engine has let go
        of the answer: what is left to read of it then holds none of its experts in memory."""
        self._items: asyncio.Queue[Event | _Dropped] = asyncio.Queue()
        self._read_count = 0
        self._over = False

    def put(self, item: Event | _Dropped) -> None:
        """Have an item read after those that are there. For the engine."""
        self._items.put_nowait(item)
        if isinstance(item, _Dropped):
            self._calls = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            HocketError: Why there will be no more: `DRAINING`, `DEVICE_MEMORY`, `BAD_ANSWER`, `NOT_READY`;
                `DEADLINE` if it was not read for too long while others waited for its memory.
            StopAsyncIteration: The last one was the finish, or the answer is closed.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, _Dropped):
            self._over = True
            if item.error is not None:
                raise item.error
            raise StopAsyncIteration
        # Said in batches: whoever has read everything has fewer left to say than let a sequence pause.
        self._read_count += 1
        if self._read_count == self._batch:
            self._read_count = 0
            if self._calls is not None:
                self._calls[0](self._batch)
        return item

    async def aclose(self) -> None:
        """End the answer here: within one step the engine drops it and gives back what it holds."""
        if not self._over:
            if self._calls is not None:
                self._calls[1]()
            self._items.put_nowait(_Dropped(None))  # whoever waits wakes up
            self._over = True


class Engine:
    """Answers texts on one device, all that run in one batch.

    Args:
        runner: Computes a step. Only the engine's thread calls it.
        pages: Where KV pages are had. The engine's alone.
        page_positions: Positions of one.
        context_length: Positions of the base; of more than the pages hold, as many as they hold count.
        fits: Whether these experts have room side by side in the memory for computing; a function of them alone.
        tokenizer: The base's.
        limits: What it keeps to.
        clock: In seconds; of any beginning.

    Attributes:
        failed: Set when the device fails at the simplest step. From then on everything is refused as `NOT_READY`.
        context_length: Positions that one answer may take with its prompt.
    """

    def __init__(
        self,
        runner: RunnerLike,
        pages: Pages,
        *,
        page_positions: int,
        context_length: int,
        fits: Callable[[Collection[AdapterExpert]], bool],
        tokenizer: PreTrainedTokenizerFast,
        limits: EngineLimits,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.failed = asyncio.Event()
        self._runner = runner
        self._pages = pages
        self._page_positions = page_positions
        self.context_length = min(context_length, pages.count * page_positions)
        self._tokenizer = tokenizer
        self._token_count = 1 + max(tokenizer.get_vocab().values())
        self._limits = limits
        self._clock = clock
        self._scheduler = Scheduler(pages, fits, limits)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # The loop's.
        self._answers: dict[Sequence, tuple[Answer, Callable[[], None]]] = {}
        self._running: set[Sequence] = set()
        self._chosen: deque[tuple[float, int]] = deque()
        # The thread's.
        self._news: list[_News] = []
        self._going_on = True

    def start(self) -> None:
        """Start the thread. Call it in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End all answers as `DRAINING`, then the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(self._quit)
            await asyncio.to_thread(thread.join)

    def submit(self, request: TextRequest, done: Callable[[], None]) -> Answer:
        """Have a text answered.

        Args:
            request: Whose bounds have been checked.
            done: Called in the event loop, once, when nothing touches the experts for this request any more, however
                it ended; not called if this method raises.

        Raises:
            HocketError: As `check`; `BAD_REQUEST` for no prompt at all; `TOO_LARGE` if the context has no room for an
                answer; `DEVICE_MEMORY` if its experts could never run.
        """
        self.check()
        detokenizer = Detokenizer(self._tokenizer, request.stops)
        sequence = Sequence(request, detokenizer, self._page_positions, self.context_length, self._clock())
        self._scheduler.check(sequence)
        answer = Answer(
            sequence.token_count_max,
            max(1, self._limits.unread_max // 2),
            partial(self._note_read, sequence),
            partial(self._cancel, sequence),
        )
        self._answers[sequence] = answer, done
        self._calls.put(partial(self._scheduler.add, sequence))
        return answer

    def check(self) -> None:
        """Return if a text could be submitted now.

        Raises:
            HocketError: `DRAINING` before `start` and after `stop`; `NOT_READY` if the device has failed; `QUEUE_FULL`.
        """
        if self._thread is None:
            raise _draining()
        if self.failed.is_set():
            raise _broken()
        if len(self._answers) - len(self._running) >= self._limits.queue_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{self._limits.queue_max} texts already wait for the engine: try another worker, or again later",
                retry_after_seconds=_RETRY_SECONDS,
            )

    @property
    def state(self) -> EngineState:
        """How busy it is, as far as the event loop has heard."""
        self._forget_chosen(self._clock())
        return EngineState(
            running_count=len(self._running),
            waiting_count=len(self._answers) - len(self._running),
            used_page_count=sum(sequence.page_count for sequence in self._running),
            page_count=self._pages.count,
            tokens_per_second=sum(count for _, count in self._chosen) / _RATE_SECONDS,
        )

    def _note_read(self, sequence: Sequence, count: int) -> None:
        if sequence in self._answers:
            self._calls.put(partial(self._acknowledge, sequence, count))

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self._answers:
            self._calls.put(partial(self._drop, sequence, None))

    def _tell(self, news: list[_News], now: float) -> None:
        """Hand out what a step has brought about."""
        count = 0
        for sequence, item in news:
            answer, done = self._answers[sequence]
            if isinstance(item, Started):
                self._running.add(sequence)
            elif isinstance(item, Delta):
                count += len(item.choices)
            elif isinstance(item, _Dropped):
                self._running.discard(sequence)
                del self._answers[sequence]
                done()
            answer.put(item)
        if count:
            self._chosen.append((now, count))
            self._forget_chosen(now)

    def _forget_chosen(self, now: float) -> None:
        while self._chosen and self._chosen[0][0] <= now - _RATE_SECONDS:
            self._chosen.popleft()

    def _end(self, why: Callable[[], HocketError]) -> None:
        """The thread is over, and with it every answer."""
        if why is _broken:
            self.failed.set()
        self._tell([(sequence, _Dropped(why())) for sequence in self._answers], self._clock())

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        torch.set_num_threads(self._limits.threads)
        why: Callable[[], HocketError] = _draining
        try:
            with torch.inference_mode():
                self._serve()
        except Exception:  # noqa: BLE001 - whatever it is, those who wait for the thread must know
            _log.exception("the engine has failed")
            why = _broken
        self._wake(partial(self._end, why))

    def _serve(self) -> None:
        """Step by step, until `stop`."""
        computed = False
        while self._going_on:
            try:
                self._obey(wait=not computed)
                computed = self._step()
            except _DeviceError:
                raise
            except Exception:  # noqa: BLE001 - whatever it is, those who come after are answered again
                _log.exception("bug")
                self._drop_all(_bug)
                computed = False
            if self._news:
                # Kept nowhere here: while the thread sleeps it would keep the experts of those that have ended.
                self._wake(partial(self._tell, self._news, self._clock()))
                self._news = []

    def _wake(self, callback: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without `stop`
                self._loop.call_soon_threadsafe(callback)

    def _obey(self, *, wait: bool) -> None:
        """Do what the loop has called for; wait for its first call if there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get(block=wait, timeout=_LOOK_SECONDS if self._scheduler.waiting else None)()
                wait = False

    def _quit(self) -> None:
        self._going_on = False
        self._drop_all(_draining)

    def _acknowledge(self, sequence: Sequence, count: int) -> None:
        sequence.unread_count -= count
        sequence.paused_time = math.inf

    def _emit(self, sequence: Sequence, event: Event) -> None:
        sequence.unread_count += 1
        self._news.append((sequence, event))

    def _drop(self, sequence: Sequence, error: Exception | None) -> None:
        if self._scheduler.drop(sequence):
            self._news.append((sequence, _Dropped(error)))

    def _drop_all(self, why: Callable[[], Exception]) -> None:
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._drop(sequence, why())  # its own each: raising one changes it

    def _step(self) -> bool:
        """Admit, compute, choose; whether there was anything to do."""
        now = self._clock()
        for sequence in self._scheduler.admit(now):
            self._emit(sequence, Started(sequence.start_time - sequence.arrival_time))
        overdue = self._scheduler.overdue(now)
        if overdue is not None:
            self._drop(overdue, _unread(self._limits.unread_seconds))
        plan = self._scheduler.plan()
        for sequence, row_count, choice in self._compute(plan) if plan else ():
            sequence.computed_count += row_count
            sequence.step_count += 1
            if isinstance(choice, HocketError):
                self._drop(sequence, choice)
            elif choice is not None:
                self._grow(sequence, choice)
        return bool(plan) or overdue is not None

    def _compute(self, shares: list[Share]) -> list[_Result]:
        """One pass for all of them; if it fails, each alone, so that only the guilty one's answer ends.

        If it fails for memory nothing is computed, and the next step is smaller: down to one row of one answer, which
        ends if there is no memory even for that.

        A pass may be repeated: it writes keys and values of the same rows to the same places before it reads them, and
        does not touch those of earlier rows. Rows count as computed, and tokens as chosen, only when it has succeeded.
        """
        try:
            return self._pass(shares)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one of them
            exhausted = _is_exhausted(error)
            _log.warning("a step has failed", sequence_count=len(shares), exhausted=exhausted, exc_info=not exhausted)
            failure = _bare(error)
        row_count = sum(share.row_count for share in shares)
        if exhausted:
            if row_count > 1:
                self._scheduler.narrow(row_count)
                return []
            self._scheduler.widen()
            failure = _exhausted()
        else:
            self._probe()
            if len(shares) > 1:
                return [result for share in shares for result in self._compute([share])]
        self._drop(shares[0].sequence, failure)
        return []

    def _pass(self, shares: list[Share]) -> list[_Result]:
        parts = [share.sequence.part(share.row_count) for share in shares]
        metrics.EXECUTIONS.inc()
        logits = self._runner.run(parts)
        metrics.BATCH_ROWS.observe(sum(share.row_count for share in shares))
        rows = [share.sequence.row for share, part in zip(shares, parts, strict=True) if part.sampled]
        choices = iter(choose(logits, rows, self._token_count) if rows else ())
        return [
            (share.sequence, share.row_count, next(choices) if part.sampled else None)
            for share, part in zip(shares, parts, strict=True)
        ]

    def _probe(self) -> None:
        """Return if the device still works."""
        try:
            self._runner.run([_PROBE])
        except Exception as error:
            raise _DeviceError from error

    def _grow(self, sequence: Sequence, choice: Choice) -> None:
        """Put a token to an answer, and end it if it is the last."""
        try:
            text, reason = sequence.append(choice.token_id, self._clock())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this answer's
            _log.exception("bug")
            self._drop(sequence, _bare(error))
            return
        self._emit(sequence, Delta(text, (choice,)))
        if reason is not None:
            self._emit(sequence, sequence.finished(reason))
            self._drop(sequence, None)


class _DeviceError(Exception):
    """The device does not compute any more."""


def _draining() -> HocketError:
    return HocketError(Reason.DRAINING, "this worker is shutting down: try another one")


def _broken() -> HocketError:
    return HocketError(Reason.NOT_READY, "the device of this worker has failed: try another one")


def _bug() -> Exception:
    return RuntimeError("a step of the engine has failed; why stands in the log before this")


def _unread(seconds: float) -> HocketError:
    return HocketError(
        Reason.DEADLINE,
        f"this answer was not read for {seconds:g} seconds while others waited for its memory: read it as it comes",
    )


def _exhausted() -> HocketError:
    return HocketError(
        Reason.DEVICE_MEMORY,
        "the device has no memory left for this text: try another worker, or again later",
        retry_after_seconds=_RETRY_SECONDS,
    )


def _is_exhausted(error: Exception) -> bool:
    """Whether a pass has failed for memory. torch has a type of error for a GPU's, and none for a CPU's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _bare(error: Exception) -> Exception:
    """An error without what led to it, which would keep tensors and experts in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
