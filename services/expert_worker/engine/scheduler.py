"""Which sequences run, and how far each goes in the next step.

There is one order of everybody, the rank: those of the tenant first that has had the fewest rows so far, and of one
tenant those first that are due first, which is when they came, less some seconds for each level of priority. So whoever
waits long enough goes before everything that comes later, however urgent that is.

Whoever runs has KV pages for its rows and takes more as it grows. Where there are none, somebody has to make way: one
whose reader is behind, else the last in rank. It lets go of its pages and waits with the tokens that it has; its
experts stay in memory, and its reader sees nothing of it but time. The first in rank never makes way while anybody else
could, and alone everybody fits: so the first always ends, and so everybody does.

One whose reader is behind is paused: it keeps its pages as long as nobody wants them, but takes no part in steps, and
so nobody's place in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.fairness import TokenCounters
from services.expert_worker.engine.pages import SCRATCH_PAGES
from services.expert_worker.engine.prefixes import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.pages import Pages
    from services.expert_worker.engine.sequence import Sequence

Fits: TypeAlias = "Callable[[Collection[AdapterExpert], int], bool]"
_Rank: TypeAlias = "tuple[int, float, int]"
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
        patience_seconds: How long one that does not fit may be passed by those that do.
        ageing_seconds: How much earlier a sequence is due for each level of its priority.
        session_seconds: How long the pages of a session's last turn are pinned: they go last of all; 0 pins none.
        threads: Threads of one step on a CPU.
    """

    step_tokens: int
    sequences_max: int
    queue_max: int
    unread_max: int = 32
    patience_seconds: float = 2.0
    ageing_seconds: float = 10.0
    session_seconds: float = 600.0
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


@dataclass(frozen=True, slots=True)
class Counts:
    """What a scheduler has come to.

    Attributes:
        used_page_count: KV pages that sequences have, shared ones once.
        cached_page_count: KV pages that nobody has and that may be found again.
        prefix_hit_count: Tokens of prompts that were found when their sequences ran first.
        prefix_miss_count: Tokens of prompts that were not.
        preemption_count: How often a sequence had to make way.
    """

    used_page_count: int = 0
    cached_page_count: int = 0
    prefix_hit_count: int = 0
    prefix_miss_count: int = 0
    preemption_count: int = 0


class Scheduler:
    """Sequences that wait and sequences that run. For one thread.

    Args:
        pages: Where KV pages are had. The scheduler's alone.
        fits: Whether these experts have room to compute beside so many KV pages; a function of these alone.
        limits: What it keeps to.
    """

    def __init__(self, pages: Pages, fits: Fits, limits: EngineLimits) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._cache = PrefixCache(pages)
        self._fits = fits
        self._limits = limits
        self._tenants = TokenCounters()
        self._rows_max = limits.step_tokens
        self._narrow_steps = 0
        self._restarting = False
        self._turn = 0
        self._number = 0
        self._hit_count = 0
        self._miss_count = 0
        self._preemption_count = 0

    @property
    def counts(self) -> Counts:
        """What it has come to."""
        return Counts(
            self._cache.used_count,
            self._cache.idle_count,
            self._hit_count,
            self._miss_count,
            self._preemption_count,
        )

    @property
    def experts(self) -> set[AdapterExpert]:
        """Who computes those that run."""
        return {expert for sequence in self.running if not self.is_paused(sequence) for expert in sequence.experts}

    def check(self, sequence: Sequence) -> None:
        """Return if a sequence's experts fit beside its pages when nothing else runs. Any thread may ask.

        Raises:
            HocketError: `DEVICE_MEMORY`.
        """
        if not self._fits(sequence.experts, SCRATCH_PAGES + sequence.page_count_max):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                "the experts together, beside the text's own keys and values, need more memory for computing than this "
                "worker has: ask for fewer experts or tokens, or use a worker with a larger slab_bytes",
                field="experts",
            )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence that `check` has passed wait for its turn."""
        self._number += 1
        sequence.number = self._number
        self._tenants.enter(sequence.request.tenant)
        self.waiting.append(sequence)

    def in_turn(self) -> Iterator[Sequence]:
        """Those who wait, the first in rank first, whatever tenants are charged meanwhile; paused ones do not."""
        heap = [(self._rank(each), each) for each in self.waiting if not self.is_paused(each)]
        heapify(heap)
        while heap:
            rank, sequence = heappop(heap)
            if rank == (now := self._rank(sequence)):
                yield sequence
            else:
                heappush(heap, (now, sequence))

    def admit(self, now: float) -> list[Sequence]:
        """Let run what fits, the first in rank first.

        What does not fit is passed by others, until it has waited long enough: then nobody else is admitted until it
        fits. After a `restart` one is admitted alone until rows of it have been computed: pages of others could lie
        where its experts want rows once more.

        Args:
            now: On the clock of the sequences' arrival.

        Returns:
            Those that run from now on.
        """
        self._cache.expire(now)
        admitted: list[Sequence] = []
        if not self.waiting:
            return admitted
        crowd = self._crowd(sequence for sequence in self.running if not self.is_paused(sequence))
        for sequence in self.in_turn():
            if self._restarting and crowd.sequences:
                break
            if self._begin(sequence, crowd, now) or self._displace(sequence, crowd, now):
                admitted.append(sequence)
            elif now - sequence.arrival_time >= self._limits.patience_seconds:
                break
        return admitted

    def is_paused(self, sequence: Sequence) -> bool:
        """Whether its reader is too far behind for it to go on."""
        return sequence.unread_count >= self._limits.unread_max

    def plan(self) -> list[Share]:
        """The next step: a token for everyone who has begun to answer, then prompts, by rank.

        Empty if nothing can be computed before something else happens.
        """
        self._grow()
        self._turn += 1
        shares: list[Share] = []
        rows_left = self._rows_max
        for sequence in sorted(self._ready(), key=lambda sequence: (sequence.rows_left > 1, self._rank(sequence))):
            if not rows_left:
                break
            row_count = min(sequence.rows_left, rows_left)
            shares.append(Share(sequence, row_count))
            sequence.turn = self._turn
            rows_left -= row_count
        return shares

    def advance(self, share: Share) -> None:
        """Take note that a share has been computed: whoever begins with the same tokens finds its whole pages now."""
        sequence = share.sequence
        self._restarting = False
        sequence.computed_count += share.row_count
        self._charge(sequence, sequence.computed_count)
        kept, whole = sequence.kept_page_count, sequence.computed_count // sequence.page_positions
        if whole > kept:
            for key, page in zip(sequence.page_keys(whole)[kept:], sequence.pages[kept:whole], strict=True):
                self._cache.keep(key, page)
            sequence.kept_page_count = whole

    def narrow(self, row_count: int) -> None:
        """Plan smaller steps for a while: the device had no memory for one of so many rows."""
        self._rows_max = max(1, row_count // 2)
        self._narrow_steps = 0

    def widen(self) -> None:
        """Plan whole steps again: whoever was at fault is gone."""
        self._rows_max = self._limits.step_tokens

    def restart(self) -> None:
        """Have everybody who runs make way, and forget what is kept: it lies where others want rows.

        Whoever is admitted first then has the lowest pages, and room for its experts.
        """
        self._restarting = True
        for sequence in tuple(self.running):
            self._preempt(sequence)
        self._cache.clear()

    def is_first(self, sequence: Sequence) -> bool:
        """Whether nobody who runs is before a sequence in rank, but for paused ones."""
        return all(self._rank(sequence) <= self._rank(other) for other in self.running if not self.is_paused(other))

    def drop(self, sequence: Sequence, now: float) -> bool:
        """Let go of a sequence and of everything it holds, but for what its session keeps.

        Args:
            sequence: Which.
            now: On the clock of the sequences' arrival.

        Returns:
            Whether it was still there.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            if sequence.preemption_count:
                awaited = self._cache.find(sequence.page_keys((sequence.row_count - 1) // sequence.page_positions))
                self._cache.use(awaited)
                self._cache.release(awaited)
        elif sequence in self.running:
            self.running.remove(sequence)
            asked = sequence.request
            if asked.session and self._limits.session_seconds:
                kept = self._cache.find(sequence.page_keys(sequence.kept_page_count))  # its own, or others' like them
                self._cache.pin(asked.tenant, asked.session, kept, now + self._limits.session_seconds)
            self._cache.release(sequence.pages)
        else:
            return False
        self._tenants.leave(sequence.request.tenant)
        return True

    def _rank(self, sequence: Sequence) -> _Rank:
        due_time = sequence.arrival_time - sequence.request.priority * self._limits.ageing_seconds
        return self._tenants[sequence.request.tenant], due_time, sequence.number

    def _begin(self, sequence: Sequence, crowd: _Crowd, now: float) -> bool:
        """Let a sequence run beside others if there is room: for all of its rows, and for a page more for each of them.

        Paused ones make way for it.
        """
        if not crowd.has_room(sequence, 0):
            return False
        cache = self._cache
        found = cache.find(sequence.page_keys((sequence.row_count - 1) // sequence.page_positions))
        count = sequence.pages_for(sequence.row_count) - len(found)
        growing_count = sum(map(_is_growing, (*crowd.sequences, sequence)))

        def page_count() -> int:
            return cache.used_count + cache.idle_among(found) + count + growing_count

        while page_count() > cache.page_count or not crowd.has_room(sequence, page_count()):
            paused = [each for each in self.running if self.is_paused(each)]
            if not paused:
                return False
            self._preempt(max(paused, key=self._rank))
        cache.use(found)
        pages = self._take(sequence, count, found)
        if pages is None:
            cache.release(found)
            return False
        sequence.pages = [*found, *pages]
        sequence.kept_page_count = len(found)
        sequence.computed_count = len(found) * sequence.page_positions
        if not sequence.preemption_count:
            sequence.start_time = now
            sequence.cached_token_count = max(0, sequence.computed_count - sequence.soft_row_count)
            self._hit_count += sequence.cached_token_count
            self._miss_count += len(sequence.request.token_ids) - sequence.cached_token_count
            sequence.charged_row_count = sequence.computed_count
        self._charge(sequence, sequence.row_count)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        crowd.add(sequence)
        return True

    def _displace(self, sequence: Sequence, crowd: _Crowd, now: float) -> bool:
        """Let a sequence run in place of less urgent ones of its tenant that are behind it in rank, if that helps."""
        asked = sequence.request
        behind = [
            other
            for other in crowd.sequences
            if other.request.priority < asked.priority
            and other.request.tenant == asked.tenant
            and self._rank(other) > self._rank(sequence)
        ]
        if not behind:
            return False
        without = self._crowd(other for other in crowd.sequences if other not in behind)
        page_count = self._cache.used_count - self._cache.freed_by(other.pages for other in behind)
        page_count += sequence.pages_for(sequence.row_count) + sum(map(_is_growing, (*without.sequences, sequence)))
        if page_count > self._cache.page_count or not without.has_room(sequence, page_count):
            return False
        for other in sorted(behind, key=self._rank, reverse=True):
            self._preempt(other)
            crowd.remove(other)
            if self._begin(sequence, crowd, now):
                return True
        return False

    def _ready(self) -> list[Sequence]:
        """Who takes part in the next step: those that go on, once each has pages for its rows."""
        while True:
            going = sorted(self._going(), key=self._rank)
            experts = {expert for sequence in going for expert in sequence.experts}
            paused_count = sum(map(self.is_paused, self.running))
            if all(self._extend(sequence, experts) for sequence in going) and (
                going or paused_count == len(self.running)
            ):
                return going
            if len(self.running) == 1:
                self.restart()  # alone it fits, in pages that are not in the way of its own experts
            else:
                self._preempt(max(self.running, key=lambda sequence: (self.is_paused(sequence), self._rank(sequence))))

    def _going(self) -> list[Sequence]:
        """Everyone whose reader is not behind.

        Paused ones that go on may be too many together; then those go first that have not taken part for longest.
        """
        ready = [sequence for sequence in self.running if not self.is_paused(sequence)]
        crowd = self._crowd(ready)
        if crowd.count_left >= 0 and self._fits(crowd.experts, SCRATCH_PAGES + self._cache.used_count):
            return ready
        crowd = self._crowd(())
        for sequence in sorted(ready, key=lambda sequence: sequence.turn):
            if crowd.has_room(sequence, self._cache.used_count):
                crowd.add(sequence)
        return [sequence for sequence in ready if sequence in crowd.sequences]

    def _extend(self, sequence: Sequence, experts: Collection[AdapterExpert]) -> bool:
        """Whether a sequence has pages for its rows, beside the experts of everybody who goes on."""
        count = sequence.pages_for(sequence.row_count) - len(sequence.pages)
        if not count:
            return True
        if not self._fits(experts, SCRATCH_PAGES + self._cache.used_count + count):
            return False
        pages = self._take(sequence, count, sequence.pages)
        sequence.pages += pages or ()
        return pages is not None

    def _take(self, sequence: Sequence, count: int, before: list[int]) -> list[int] | None:
        """Pages for a sequence that has some, after those if possible, and not where others grow."""
        return self._cache.take(
            count,
            after=before[-1] if before else 0,
            room=sequence.page_count_max - len(before),
            growing=[room for other in self.running if other is not sequence and (room := _room_of(other))],
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Have a sequence make way. What it has computed is found again if its pages are not needed meanwhile."""
        self._preemption_count += 1
        sequence.preemption_count += 1
        self._cache.release(sequence.pages, awaited=True)
        sequence.pages = []
        sequence.computed_count = sequence.kept_page_count = 0
        self.running.remove(sequence)
        self.waiting.append(sequence)

    def _charge(self, sequence: Sequence, row_count: int) -> None:
        """Charge a tenant for rows of a sequence, each once however often it is computed."""
        if row_count > sequence.charged_row_count:
            self._tenants.charge(sequence.request.tenant, row_count - sequence.charged_row_count)
            sequence.charged_row_count = row_count

    def _grow(self) -> None:
        """Let steps grow again some time after `narrow`."""
        if self._rows_max < self._limits.step_tokens:
            self._narrow_steps += 1
            if self._narrow_steps > _NARROW_STEPS:
                self._rows_max = min(2 * self._rows_max, self._limits.step_tokens)
                self._narrow_steps = 0

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
    fits: Fits
    sequences: set[Sequence] = field(default_factory=set)

    @property
    def experts(self) -> set[AdapterExpert]:
        return {expert for sequence in self.sequences for expert in sequence.experts}

    def add(self, sequence: Sequence) -> None:
        self.count_left -= 1
        self.sequences.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self.count_left += 1
        self.sequences.remove(sequence)

    def has_room(self, sequence: Sequence, page_count: int) -> bool:
        """Whether one more could compute when so many KV pages are in use, the scratch page not counted."""
        return self.count_left > 0 and self.fits(self.experts | sequence.experts, SCRATCH_PAGES + page_count)


def _is_growing(sequence: Sequence) -> bool:
    """Whether a sequence may want more pages than it has rows for."""
    return sequence.pages_for(sequence.row_count) < sequence.page_count_max


def _room_of(sequence: Sequence) -> range:
    """The pages into which a sequence would grow."""
    first = sequence.pages[-1] + 1
    return range(first, first + sequence.page_count_max - len(sequence.pages))
