"""Which sequences run, and how far each goes in the next step.

There is one order of everybody, the rank: those of the tenant first that has had the fewest rows so far, and of one
tenant those first that are due first, which is when they came, less some seconds for each level of priority. So whoever
waits long enough goes before everything that comes later, however urgent that is.

Whoever runs has KV pages for its rows and takes more as it grows. Where there are none, somebody has to make way: one
whose reader is behind, else the last in rank. It lets go of its pages and waits with the tokens that it has; its
experts stay in memory, and its reader sees nothing of it but time. It runs again when there is room for its longest
answer, and that stays reserved: otherwise it would soon make way again, and little be computed but what was computed
before. The first in rank never makes way while anybody else could, and alone everybody fits: so the first always ends,
and so everybody does.

One whose reader is behind is paused: it keeps its pages as long as nobody wants them, but takes no part in steps, and
so nobody's place in them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.fairness import TokenCounters
from services.expert_worker.engine.pages import SCRATCH_PAGES
from services.expert_worker.engine.prefixes import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.pages import Pages
    from services.expert_worker.engine.sequence import Sequence

Fits: TypeAlias = "Callable[[Collection[AdapterExpert], int], bool]"
_Rank: TypeAlias = "tuple[int, float, int]"
_NARROW_STEPS: Final = 32
"""After so many smaller steps, steps may be twice as large again."""
_UNFIT_MAX: Final = 8
"""How many of those that do not fit a step looks past: so the longest queue costs it less than a millisecond."""


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
        preempted_count: Sequences that have made way and wait to go on.
    """

    used_page_count: int = 0
    cached_page_count: int = 0
    prefix_hit_count: int = 0
    prefix_miss_count: int = 0
    preemption_count: int = 0
    preempted_count: int = 0


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
            sum(sequence.preemption_count > 0 for sequence in self.waiting),
        )

    @property
    def experts(self) -> set[AdapterExpert]:
        """Who computes those that run."""
        return {expert for sequence in self._going_on() for expert in sequence.experts}

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
        fits. One that has just made way is passed by nobody. After a `restart` one is admitted alone until rows of it
        have been computed: pages of others could lie where its experts want rows once more.

        Args:
            now: On the clock of the sequences' arrival.

        Returns:
            Those that run from now on.
        """
        self._cache.expire(now)
        admitted: list[Sequence] = []
        displaced: list[Sequence] = []
        unfit_count = 0
        for sequence in self.in_turn():
            if self._restarting and self._going_on():
                break
            if any(self._rank(other) < self._rank(sequence) for other in displaced):
                break
            leaving = self._begin(sequence, now)
            if leaving is not None:
                admitted.append(sequence)
                displaced += (other for other in leaving if not self.is_paused(other))
                continue
            unfit_count += 1
            if unfit_count == _UNFIT_MAX or now - sequence.arrival_time >= self._limits.patience_seconds:
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
        return all(self._rank(sequence) <= self._rank(other) for other in self._going_on())

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

    def _begin(self, sequence: Sequence, now: float) -> list[Sequence] | None:
        """Let a sequence run if there is room; who has made way for it, or None."""
        found = self._cache.find(sequence.page_keys((sequence.row_count - 1) // sequence.page_positions))
        leaving = self._makes_way(sequence, found)
        if leaving is None:
            return None
        for other in leaving:
            self._preempt(other)
        self._cache.use(found)
        sequence.pages = found
        sequence.kept_page_count = len(found)
        sequence.computed_count = len(found) * sequence.page_positions
        self._take(sequence)  # there is room for it; where there were not, `plan` would have somebody make way
        if not sequence.preemption_count:
            sequence.start_time = now
            sequence.cached_token_count = max(0, sequence.computed_count - sequence.soft_row_count)
            self._hit_count += sequence.cached_token_count
            self._miss_count += len(sequence.request.token_ids) - sequence.cached_token_count
            sequence.charged_row_count = sequence.computed_count
        self._charge(sequence, sequence.row_count)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return leaving

    def _makes_way(self, sequence: Sequence, found: list[int]) -> list[Sequence] | None:
        """Who makes way for one that waits, if that is enough; as few as it takes. None if it is not.

        Paused ones do, then less urgent ones of its tenant that are behind it; of either the last in rank first.
        """
        asked, rank = sequence.request, self._rank(sequence)
        able = [
            other
            for other in self.running
            if self.is_paused(other)
            or (
                other.request.priority < asked.priority
                and other.request.tenant == asked.tenant
                and self._rank(other) > rank
            )
        ]
        able.sort(key=self._standing, reverse=True)
        counts = range(len(able) + 1)
        count = bisect_left(counts, True, key=lambda count: self._has_room(sequence, found, able[:count]))  # noqa: FBT003 - what it looks for
        return able[:count] if count in counts else None

    def _has_room(self, sequence: Sequence, found: list[int], leaving: Collection[Sequence]) -> bool:
        """Whether one that begins with these pages could run, and everybody grow, once some have made way.

        The slab lets its pages be used then.
        """
        together = [sequence, *(other for other in self._going_on() if other not in leaving)]
        used_count = self._cache.used_count_after((other.pages for other in leaving), found)
        count = sequence.pages_for(sequence.row_count) - len(found)
        page_count = used_count + count + sum(map(_margin, together))
        return (
            page_count <= self._cache.page_count
            and self._fit(together, page_count)
            and self._cache.reach(count, used_count)
        )

    def _fit(self, sequences: Collection[Sequence], page_count: int) -> bool:
        """Whether these can take part in one step beside so many KV pages in use, the scratch page not counted.

        No more than a step has rows: so everyone who answers gets a token each step, and a prompt always gets on.
        """
        if len(sequences) > min(self._limits.sequences_max, self._rows_max):
            return False
        return self._fits({expert for each in sequences for expert in each.experts}, SCRATCH_PAGES + page_count)

    def _standing(self, sequence: Sequence) -> tuple[bool, _Rank]:
        """Who runs makes way in this order, the last first."""
        return self.is_paused(sequence), self._rank(sequence)

    def _ready(self) -> list[Sequence]:
        """Who takes part in the next step: those that go on, once each has pages for its rows."""
        while True:
            turns = sorted(self._turns(), key=self._rank)
            if all(self._extend(sequence, turns) for sequence in turns) and (turns or not self._going_on()):
                return turns
            if len(self.running) == 1:
                self.restart()  # alone it fits, in pages that are not in the way of its own experts
            else:
                self._preempt(max(self.running, key=self._standing))

    def _going_on(self) -> list[Sequence]:
        """Everyone whose reader is not behind."""
        return [sequence for sequence in self.running if not self.is_paused(sequence)]

    def _turns(self) -> list[Sequence]:
        """Those that go on.

        Paused ones that go on may be too many together; then those that have not taken part for longest.
        """
        ready = self._going_on()
        if self._fit(ready, self._cache.used_count):
            return ready
        turns: list[Sequence] = []
        for sequence in sorted(ready, key=lambda sequence: sequence.turn):
            if self._fit([*turns, sequence], self._cache.used_count):
                turns.append(sequence)
        return turns

    def _extend(self, sequence: Sequence, turns: Collection[Sequence]) -> bool:
        """Whether a sequence has pages for its rows, beside the experts of everybody who takes part."""
        count = sequence.pages_for(sequence.row_count) - len(sequence.pages)
        return not count or (self._fit(turns, self._cache.used_count + count) and self._take(sequence))

    def _take(self, sequence: Sequence) -> bool:
        """Whether a sequence has pages for its rows now: after its others if possible, and not where others grow."""
        before = sequence.pages
        pages = self._cache.take(
            sequence.pages_for(sequence.row_count) - len(before),
            after=before[-1] if before else 0,
            room=sequence.page_count_max - len(before),
            growing=[room for other in self.running if other is not sequence and (room := _room_of(other))],
        )
        sequence.pages += pages or ()
        return pages is not None

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


def _margin(sequence: Sequence) -> int:
    """Pages for a sequence to grow into: one, but all that it may ever want if it has had to make way."""
    growth = sequence.page_count_max - (len(sequence.pages) or sequence.pages_for(sequence.row_count))
    return growth if sequence.preemption_count else min(1, growth)


def _room_of(sequence: Sequence) -> range:
    """The pages into which a sequence would grow."""
    first = sequence.pages[-1] + 1
    return range(first, first + sequence.page_count_max - len(sequence.pages))
