"""Which sequences run, and how far each goes in the next step.

Whoever runs has the KV pages for its longest answer and keeps them until it ends: nothing that runs ever waits for
memory, so everything that is read ends. One whose reader is behind is paused: it keeps its pages, but takes no part in
steps, and so nobody's place in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.pages import Pages
    from services.expert_worker.engine.sequence import Sequence

_NARROW_STEPS: Final = 32
"""After so many smaller steps, steps may be twice as large again."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What bounds an engine.

    Attributes:
        step_tokens: Most rows of one step: what a long prompt may hold up the others by.
        sequences_max: Sequences that run at once; paused ones do not count.
        queue_max: Sequences that wait; the next one is refused as `QUEUE_FULL`.
        unread_max: Events that a reader may be behind; its sequence pauses then.
        unread_seconds: How long a paused one may keep pages that somebody waits for.
        patience_seconds: How long one that does not fit may be passed by those that do.
        threads: Threads of one step on a CPU.
    """

    step_tokens: int
    sequences_max: int
    queue_max: int
    unread_max: int = 32
    unread_seconds: float = 60.0
    patience_seconds: float = 2.0
    threads: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one sequence gets of a step.

    Attributes:
        sequence: Who.
        row_count: Its next so many rows.
    """

    sequence: Sequence
    row_count: int


class Scheduler:
    """Sequences that wait and sequences that run. For one thread.

    Args:
        pages: Where KV pages are had.
        fits: Whether these experts have room side by side in the memory for computing; a function of them alone.
        limits: What it keeps to.
    """

    def __init__(self, pages: Pages, fits: Callable[[Collection[AdapterExpert]], bool], limits: EngineLimits) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._pages = pages
        self._fits = fits
        self._limits = limits
        self._rows_max = limits.step_tokens
        self._narrow_steps = 0
        self._turn = 0

    def check(self, sequence: Sequence) -> None:
        """Return if a sequence's experts fit when nothing else runs. Any thread may ask.

        Raises:
            HocketError: `DEVICE_MEMORY`.
        """
        if not self._fits(sequence.experts):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                "the experts together need more memory for computing than this worker has: ask for fewer, or use a "
                "worker with a larger arena",
                field="experts",
            )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence that `check` has passed wait for its turn."""
        self.waiting.append(sequence)

    def admit(self, now: float) -> list[Sequence]:
        """Let run what fits, the longest waiting first.

        What does not fit is passed by others, until it has waited long enough: then nobody else is admitted until it
        fits. But paused sequences end when their readers please, so nobody is held up for one that would have to wait
        for their pages.

        Args:
            now: On the clock of the sequences' arrival.

        Returns:
            Those that run from now on.
        """
        admitted: list[Sequence] = []
        if not self.waiting:
            return admitted
        crowd = self._crowd(sequence for sequence in self.running if not self.is_paused(sequence))
        paused_page_count = sum(sequence.page_count for sequence in self.running if self.is_paused(sequence))
        for sequence in tuple(self.waiting):
            if crowd.has_room(sequence) and (pages := self._pages.take(sequence.page_count)) is not None:
                sequence.pages = pages
                sequence.start_time = now
                self.running.append(sequence)
                self.waiting.remove(sequence)
                crowd.add(sequence)
                admitted.append(sequence)
            elif (
                now - sequence.arrival_time >= self._limits.patience_seconds
                and sequence.page_count <= self._pages.count - paused_page_count
            ):
                break
        return admitted

    def is_paused(self, sequence: Sequence) -> bool:
        """Whether its reader is too far behind for it to go on."""
        return sequence.unread_count >= self._limits.unread_max

    def overdue(self, now: float) -> Sequence | None:
        """Who has been paused for longest, if that is too long and somebody waits for pages.

        Args:
            now: On the clock of the sequences' arrival.
        """
        paused = [sequence for sequence in self.running if self.is_paused(sequence)]
        for sequence in paused:
            sequence.paused_time = min(sequence.paused_time, now)
        if all(sequence.page_count <= self._pages.free_count for sequence in self.waiting):
            return None
        late = [sequence for sequence in paused if now - sequence.paused_time >= self._limits.unread_seconds]
        return min(late, key=lambda sequence: sequence.paused_time, default=None)

    def plan(self) -> list[Share]:
        """The next step: a token for everyone who has begun to answer, then prompts, in the order of admission.

        Empty if nothing can be computed before something else happens.
        """
        self._grow()
        self._turn += 1
        shares: list[Share] = []
        rows_left = self._rows_max
        for sequence in sorted(self._going(), key=lambda sequence: not sequence.answer_ids):
            if not rows_left:
                break
            row_count = min(sequence.rows_left, rows_left)
            shares.append(Share(sequence, row_count))
            sequence.turn = self._turn
            rows_left -= row_count
        return shares

    def narrow(self, row_count: int) -> None:
        """Plan smaller steps for a while: the device had no memory for one of so many rows."""
        self._rows_max = max(1, row_count // 2)
        self._narrow_steps = 0

    def widen(self) -> None:
        """Plan whole steps again: whoever was at fault is gone."""
        self._rows_max = self._limits.step_tokens

    def _grow(self) -> None:
        """Let steps grow again some time after `narrow`."""
        if self._rows_max < self._limits.step_tokens:
            self._narrow_steps += 1
            if self._narrow_steps > _NARROW_STEPS:
                self._rows_max = min(2 * self._rows_max, self._limits.step_tokens)
                self._narrow_steps = 0

    def _going(self) -> list[Sequence]:
        """Who takes part in the next step: everyone whose reader is not behind.

        Paused ones that go on may be too many together; then those go first that have not taken part for longest.
        """
        ready = [sequence for sequence in self.running if not self.is_paused(sequence)]
        crowd = self._crowd(ready)
        if crowd.count_left >= 0 and self._fits(crowd.experts):
            return ready
        crowd = self._crowd(())
        for sequence in sorted(ready, key=lambda sequence: sequence.turn):
            if crowd.has_room(sequence):
                crowd.add(sequence)
        return [sequence for sequence in ready if sequence in crowd.sequences]

    def drop(self, sequence: Sequence) -> bool:
        """Let go of a sequence and of everything it holds.

        Returns:
            Whether it was still there.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._pages.give(sequence.pages)
        else:
            return False
        return True

    def _crowd(self, sequences: Iterable[Sequence]) -> _Crowd:
        # No more than a step has rows: so everyone who answers gets a token each step, and a prompt always gets on.
        crowd = _Crowd(min(self._limits.sequences_max, self._rows_max), self._fits)
        for sequence in sequences:
            crowd.add(sequence)
        return crowd


@dataclass(slots=True, eq=False)
class _Crowd:
    """The room that some sequences leave to one more in a step."""

    count_left: int
    fits: Callable[[Collection[AdapterExpert]], bool]
    sequences: set[Sequence] = field(default_factory=set)
    experts: set[AdapterExpert] = field(default_factory=set)

    def add(self, sequence: Sequence) -> None:
        self.count_left -= 1
        self.sequences.add(sequence)
        self.experts |= sequence.experts

    def has_room(self, sequence: Sequence) -> bool:
        return self.count_left > 0 and self.fits(self.experts | sequence.experts)
