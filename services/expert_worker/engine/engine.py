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
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from services.expert_worker.engine.answer import Answer, Dropped
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.passes import DeviceError, Passes, bare, exhausted, is_exhausted
from services.expert_worker.engine.scheduler import Counts, Scheduler
from services.expert_worker.engine.sequence import Delta, Sequence, Started

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from transformers import PreTrainedTokenizerFast

    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.pages import Pages
    from services.expert_worker.engine.passes import RunnerLike
    from services.expert_worker.engine.sampling import Choice
    from services.expert_worker.engine.scheduler import EngineLimits, Share
    from services.expert_worker.engine.sequence import Event, TextRequest

_log: Final = structlog.get_logger("worker")
_RATE_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.5
_AHEAD_MAX: Final = 8
"""Texts that wait and whose experts are brought ahead."""
_LOOK_SECONDS: Final = 1.0
"""How often the thread looks, while nothing can be computed, whether those who wait have waited long enough."""


class Room(Protocol):
    """Where experts lie side by side for computing. The engine's thread alone calls it, except `fits`.

    Attributes:
        arrived: Called from another thread whenever an expert has come, or could not.
        coming: Digests of experts on their way.
    """

    arrived: Callable[[], None]
    coming: frozenset[str]

    def fits(self, experts: Collection[AdapterExpert], page_count: int = 0) -> bool:
        """Whether these could compute together beside so many KV pages; a function of these alone."""

    def hold(self, experts: Collection[AdapterExpert], soon: Collection[AdapterExpert] = ()) -> None:
        """Have these stay, from now on and in place of those held before.

        Said once a step of those who take part in it, before they are brought. Where others run by then than took part
        in the last step, it is said of these before pages are had: they may lie where those computed that have ended.

        Args:
            experts: They compute.
            soon: They will. They make room for those who compute, and for KV pages.
        """

    def bring(self, expert: AdapterExpert, *, ahead: bool = False) -> bool:
        """Have an expert come, if it has to and can; whether it is there.

        Args:
            expert: One of those held.
            ahead: Whether it is not needed yet.

        Raises:
            Exception: Why it did not come; it can be brought once more.
        """


@dataclass(frozen=True, slots=True)
class EngineState:
    """How busy an engine is.

    Attributes:
        running_count: Answers that have begun and not ended, those among them that have made way for others.
        waiting_count: Answers that have not begun yet.
        waiting_seconds: How long the one that waits for longest has waited, of those that have not run yet.
        page_count: KV pages in all.
        counts: What the scheduler has come to.
        tokens_per_second: Tokens chosen per second, over the last ten seconds.
    """

    running_count: int
    waiting_count: int
    waiting_seconds: float
    page_count: int
    counts: Counts
    tokens_per_second: float


_News: TypeAlias = "tuple[Sequence, Event | Dropped]"


class Engine:
    """Answers texts on one device, all that run in one batch.

    Args:
        runner: Computes a step. Only the engine's thread calls it.
        pages: Where KV pages are had. The engine's alone.
        page_positions: Positions of one.
        context_length: Positions of the base; of more than the pages hold, as many as they hold count.
        room: Where experts compute.
        tokenizer: The base's.
        limits: What it keeps to.
        variant: Of the base, as it is served.
        clock: In seconds; of any beginning.

    Attributes:
        failed: Set when the device fails at the simplest step. From then on everything is refused as `NOT_READY`.
        context_length: Positions that one answer may take with its prompt.
    """

    def __init__(  # noqa: PLR0913 - what it consists of
        self,
        runner: RunnerLike,
        pages: Pages,
        *,
        page_positions: int,
        context_length: int,
        room: Room,
        tokenizer: PreTrainedTokenizerFast,
        limits: EngineLimits,
        variant: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.failed = asyncio.Event()
        self._page_count = pages.count
        self._page_positions = page_positions
        self.context_length = min(context_length, pages.count * page_positions)
        self._tokenizer = tokenizer
        self._variant = variant
        self._limits = limits
        self._clock = clock
        self._room = room
        self._scheduler = Scheduler(pages, room.fits, limits)
        self._passes = Passes(runner, self._scheduler, 1 + max(tokenizer.get_vocab().values()))
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # The loop's.
        self._answers: dict[Sequence, tuple[Answer, Callable[[], None]]] = {}
        self._running: set[Sequence] = set()
        self._chosen: deque[tuple[float, int]] = deque()
        # The thread's. The loop reads the counts, which are replaced as a whole.
        self._counts = Counts()
        self._news: list[_News] = []
        self._ended: list[tuple[Sequence, Dropped]] = []
        """Those that are let go of, until none of their experts is on its way."""
        self._held: set[AdapterExpert] = set()
        self._going_on = True

    def start(self) -> None:
        """Start the thread. Call it in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._room.arrived = partial(self._calls.put, _look)
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
            done: Called in the event loop, once, when nothing touches the experts for this request any more, not even
                to copy them, however it ended; not called if this method raises.

        Raises:
            HocketError: As `check`; `BAD_REQUEST` for no prompt at all; `TOO_LARGE` if the context has no room for an
                answer; `DEVICE_MEMORY` if its experts could never run.
        """
        self.check()
        detokenizer = Detokenizer(self._tokenizer, request.stops)
        sequence = Sequence(
            request, detokenizer, self._page_positions, self.context_length, self._clock(), self._variant
        )
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
                f"{self._limits.queue_max} texts already wait for the engine: try another worker, or again later; its "
                "operator can have more wait (worker.text_queue_max)",
                retry_after_seconds=_RETRY_SECONDS,
            )

    @property
    def state(self) -> EngineState:
        """How busy it is, as far as the event loop has heard. Any thread may ask: what the loop changes is copied."""
        now = self._clock()
        oldest = next((sequence for sequence in tuple(self._answers) if sequence not in self._running), None)
        chosen = [count for time_, count in tuple(self._chosen) if time_ > now - _RATE_SECONDS]
        return EngineState(
            running_count=len(self._running),
            waiting_count=len(self._answers) - len(self._running),
            waiting_seconds=0.0 if oldest is None else now - oldest.arrival_time,
            page_count=self._page_count,
            counts=self._counts,
            tokens_per_second=sum(chosen) / _RATE_SECONDS,
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
            elif isinstance(item, Dropped):
                self._running.discard(sequence)
                del self._answers[sequence]
                done()
            answer.put(item)
        if count:
            self._chosen.append((now, count))
            while self._chosen[0][0] <= now - _RATE_SECONDS:
                self._chosen.popleft()

    def _end(self, why: Callable[[], HocketError]) -> None:
        """The thread is over, and with it every answer."""
        if why is _broken:
            self.failed.set()
        self._tell([(sequence, Dropped(why())) for sequence in self._answers], self._clock())

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
        busy = False
        while self._going_on or self._ended:
            try:
                self._obey(wait=not busy)
                busy = self._step()
            except DeviceError:
                raise
            except Exception:  # noqa: BLE001 - whatever it is, those who come after are answered again
                _log.exception("bug")
                self._drop_all(_bug)
                self._hold(set())
                busy = False
            busy |= self._count()
            self._let_go()
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

    def _emit(self, sequence: Sequence, event: Event) -> None:
        sequence.unread_count += 1
        self._news.append((sequence, event))

    def _drop(self, sequence: Sequence, error: Exception | None) -> None:
        if self._scheduler.drop(sequence, self._clock()):
            self._ended.append((sequence, Dropped(error)))

    def _drop_all(self, why: Callable[[], Exception]) -> None:
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._drop(sequence, why())  # its own each: raising one changes it

    def _let_go(self) -> None:
        """Tell the end of those that are let go of: all but those whose experts are still being copied.

        That such an expert has come wakes the thread.
        """
        ended, self._ended = self._ended, []
        for sequence, dropped in ended:
            is_touched = any(expert.digest in self._room.coming for expert in sequence.experts)
            (self._ended if is_touched else self._news).append((sequence, dropped))

    def _step(self) -> bool:
        """Admit, compute, choose; whether anything was computed."""
        now = self._clock()
        running = self._scheduler.experts
        if running != self._held:
            self._hold(running)
        for sequence in self._scheduler.admit(now):
            if not sequence.preemption_count:
                self._emit(sequence, Started(sequence.start_time - sequence.arrival_time))
        plan = self._present(self._scheduler.plan())
        for share, choice in self._passes.compute(plan) if plan else ():
            if isinstance(choice, Exception):
                self._drop(share.sequence, choice)
                continue
            self._scheduler.advance(share)
            share.sequence.step_count += 1
            if choice is not None:
                self._grow(share.sequence, choice)
        return bool(plan)

    def _count(self) -> bool:
        """Publish the scheduler's counts; whether somebody had to make way since it was done last."""
        before, self._counts = self._counts, self._scheduler.counts
        metrics.TEXT_PREFIX_HIT_TOKENS.inc(self._counts.prefix_hit_count - before.prefix_hit_count)
        metrics.TEXT_PREFIX_MISS_TOKENS.inc(self._counts.prefix_miss_count - before.prefix_miss_count)
        metrics.TEXT_PREEMPTIONS.inc(self._counts.preemption_count - before.preemption_count)
        return self._counts.preemption_count > before.preemption_count

    def _present(self, plan: list[Share]) -> list[Share]:
        """Those whose experts are there. The experts of the others come, and of those who wait as far as there is room.

        An answer whose expert cannot be brought ends. Where nothing is on its way, and nobody or not the first in rank
        has all of its experts, pages stand in their way: everybody makes way then.
        """
        held = {expert for share in plan for expert in share.sequence.experts}
        soon: set[AdapterExpert] = set()
        for sequence in islice(self._scheduler.in_turn(), _AHEAD_MAX):
            if self._room.fits(held | soon | sequence.experts):
                soon |= sequence.experts
        self._hold(held, soon)
        present: list[Share] = []
        absent: list[Sequence] = []
        for share in plan:
            try:
                # Not `all` of a generator: each is to come, whatever holds for those before it.
                if all([self._room.bring(expert) for expert in share.sequence.experts]):  # noqa: C419
                    present.append(share)
                else:
                    absent.append(share.sequence)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this answer's
                _log.warning("an expert could not be brought to where it computes", exc_info=True)
                self._drop(share.sequence, exhausted() if is_exhausted(error) else bare(error))
        if absent and not self._room.coming and (not present or any(map(self._scheduler.is_first, absent))):
            self._scheduler.restart()
            return []
        for expert in soon - held:
            with contextlib.suppress(Exception):  # the answer that it is for hears of it once it runs
                self._room.bring(expert, ahead=True)
        return present

    def _hold(self, experts: set[AdapterExpert], soon: Collection[AdapterExpert] = ()) -> None:
        self._room.hold(experts, soon)
        self._held = experts

    def _grow(self, sequence: Sequence, choice: Choice) -> None:
        """Put a token to an answer, and end it if it is the last."""
        try:
            text, reason = sequence.append(choice.token_id, self._clock())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this answer's
            _log.exception("bug")
            self._drop(sequence, bare(error))
            return
        self._emit(sequence, Delta(text, (choice,)))
        if reason is not None:
            self._emit(sequence, sequence.finished(reason))
            self._drop(sequence, None)


def _look() -> None:
    """A call that wakes the thread, and no more."""


def _draining() -> HocketError:
    return HocketError(Reason.DRAINING, "this worker is shutting down: try another one")


def _broken() -> HocketError:
    return HocketError(Reason.NOT_READY, "the device of this worker has failed: try another one")


def _bug() -> Exception:
    return RuntimeError("a step of the engine has failed; why stands in the log before this")
