from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.scheduler import EngineLimits, Scheduler, Share
from services.expert_worker.engine.sequence import Sequence
from services.expert_worker.engine.slab import Slab
from tests.scripted_engine import CONTEXT, LETTERS, LIMITS, PAGE_POSITIONS, asking, expert

if TYPE_CHECKING:
    from collections.abc import Collection

    from services.expert_worker.engine.expert import AdapterExpert

ARENA_BYTES = 10
_numbers = count(1000)


def fits(experts: Collection[AdapterExpert], _page_count: int = 0) -> bool:
    return sum(each.size_bytes for each in experts) <= ARENA_BYTES


def scheduling(page_count: int = 100, limits: EngineLimits = LIMITS) -> tuple[Scheduler, Pages]:
    pages = Pages(page_count + 1)
    return Scheduler(pages, fits, limits), pages


def waiting(
    prompt: int,
    answer: int = 1,
    *experts: AdapterExpert,
    arrival: float = 0.0,
    begin: int | None = None,
    **asked: Any,
) -> Sequence:
    """A sequence with so many tokens of prompt and answer; prompts with the same first token are the same."""
    token_ids = [next(_numbers) if begin is None else begin, *range(1, prompt)]
    request = asking(token_ids, mixture=tuple((each, 1.0) for each in experts), max_tokens=answer)
    return Sequence(replace(request, **asked), Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, arrival)


def compute(scheduler: Scheduler, sequence: Sequence, row_count: int | None = None) -> None:
    """As if a step had; by default all of its rows."""
    scheduler.advance(Share(sequence, row_count or sequence.rows_left))
    if not sequence.rows_left:
        sequence.append(1, 0.0)


def planned(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    return [(share.sequence, share.row_count) for share in scheduler.plan()]


class TestSequence:
    def test_its_longest_answer_takes_pages_beside_its_prompt(self) -> None:
        assert waiting(4, 4).page_count_max == 2
        assert waiting(4, 5).page_count_max == 3

    def test_its_answer_is_no_longer_than_the_context_has_room_for(self) -> None:
        assert waiting(60, 4).token_count_max == 4
        assert waiting(60, 5).token_count_max == 4
        assert waiting(60, 5).page_count_max == CONTEXT // PAGE_POSITIONS

    def test_keys_go_on_with_the_answer_and_depend_on_everything_before(self) -> None:
        soft = expert("soft", prompt=[0.1, 0.2, 0.3])
        request = asking([7, 8, 9], mixture=((soft, 0.5),), max_tokens=9)
        keys: list[list[bytes]] = []
        for answer in ([4, 5, 6], [4, 6, 5], [3, 5, 6]):
            sequence = Sequence(request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, 0.0)
            first = sequence.page_keys(1)
            for token_id in answer:
                sequence.append(token_id, 0.0)
            keys.append(sequence.page_keys(2))
            assert keys[-1][:1] == first
        assert len({first for first, _ in keys}) == 1
        assert len({second for _, second in keys}) == 3
        other = replace(request, mixture=((soft, 0.25),))
        assert Sequence(other, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, 0.0).page_keys(1) != [keys[0][0]]

    def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers(self) -> None:
        assert waiting(63, 9).token_count_max == 1
        with pytest.raises(HocketError, match="has 64 tokens; the context has 64") as refusal:
            waiting(64)
        assert (refusal.value.reason, refusal.value.field) == (Reason.TOO_LARGE, "input")
        soft = expert("soft", prompt=[0.5, 0.5])
        assert waiting(61, 9, soft).token_count_max == 1
        with pytest.raises(HocketError, match="has 62 tokens and the experts' soft prompts 2; the context has 64"):
            waiting(62, 9, soft)

    def test_parts_are_soft_prompts_then_prompt_then_answer_wherever_they_are_cut(self) -> None:
        soft = expert("b", prompt=[0.1, 0.2]), expert("a", prompt=[0.3])
        absent = expert("c", prompt=[0.9])
        request = asking([7, 8, 9], mixture=((soft[0], 0.5), (soft[1], 2.0), (absent, 0.0)), max_tokens=9)
        whole = [0.3, 0.1, 0.2, 7.0, 8.0, 9.0]
        for cut in range(1, 6):
            sequence = Sequence(request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, 0.0)
            rows: list[float] = []
            for row_count in (cut, 6 - cut):
                assert sequence.rows_left == 6 - len(rows)
                part = sequence.part(row_count)
                assert (part.start, part.row_count, part.sampled) == (len(rows), row_count, len(rows) > 0)
                rows += torch.empty(0).tolist() if part.embeddings is None else part.embeddings[:, 0].tolist()
                rows += part.token_ids
                sequence.computed_count += row_count
            sequence.append(1, 0.0)
            assert rows == pytest.approx(whole)
            sequence.append(5, 0.0)
            sequence.computed_count += 1
            part = sequence.part(1)
            assert (part.start, part.embeddings, list(part.token_ids), part.sampled) == (7, None, [5], True)

    def test_each_token_moves_on_the_noise_and_counts_for_penalties(self) -> None:
        request = asking([7, 8], mixture=((expert("p", prompt=[0.5]), 1.0),), repetition_penalty=1.5)
        sequence = Sequence(request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, 0.0)
        for token_id in (5, 7, 5):
            sequence.append(token_id, 0.0)
        assert sequence.row.position == 5
        ids, counts = sequence.row.past
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {7: 1, 8: 0, 5: 2}


class TestAdmission:
    def test_the_longest_waiting_runs_first(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=2))
        first, second, third = (waiting(4) for _ in range(3))
        for each in (first, second, third):
            scheduler.add(each)
        assert scheduler.admit(1.0) == [first, second]
        assert (scheduler.running, scheduler.waiting) == ([first, second], [third])
        assert [each.start_time for each in (first, second)] == [1.0, 1.0]
        scheduler.drop(first, 0.0)
        assert scheduler.admit(2.0) == [third]

    def test_nobody_runs_beyond_the_pages_and_whoever_ends_gives_them_back(self) -> None:
        scheduler, pages = scheduling(page_count=4)
        first, second = waiting(10), waiting(5)
        scheduler.add(first)
        scheduler.add(second)
        assert scheduler.admit(0.0) == [first]
        assert (len(first.pages), pages.free_count) == (3, 1)
        assert scheduler.admit(0.0) == []
        assert (second.pages, pages.free_count) == ([], 1)
        assert scheduler.drop(first, 0.0)
        assert not scheduler.drop(first, 0.0)
        assert pages.free_count == 4
        assert scheduler.admit(0.0) == [second]

    def test_nobody_runs_whose_experts_have_no_room_beside_those_that_run(self) -> None:
        scheduler, _ = scheduling()
        large, medium, small = (expert(name, size_bytes=size) for name, size in (("l", 6), ("m", 5), ("s", 4)))
        first, second, third, fourth = (
            waiting(4, 1, large),
            waiting(4, 1, medium),
            waiting(4, 1, small, large),
            waiting(4),
        )
        for each in (first, second, third, fourth):
            scheduler.add(each)
        assert scheduler.admit(0.0) == [first, third, fourth]  # shared experts count once
        scheduler.drop(first, 0.0)
        assert scheduler.admit(0.0) == []
        scheduler.drop(third, 0.0)
        assert scheduler.admit(0.0) == [second]

    def test_whoever_does_not_fit_is_passed_by_others_until_it_has_waited_long_enough(self) -> None:
        scheduler, _ = scheduling(page_count=4, limits=replace(LIMITS, patience_seconds=2.0))
        running, large = waiting(7), waiting(15, arrival=1.0)
        scheduler.add(running)
        scheduler.admit(1.0)
        scheduler.add(large)
        early = waiting(3, arrival=1.5)
        scheduler.add(early)
        assert scheduler.admit(2.9) == [early]
        late = waiting(3, arrival=2.5)
        scheduler.add(late)
        assert scheduler.admit(3.0) == []
        scheduler.drop(running, 0.0)
        assert scheduler.admit(3.5) == []
        scheduler.drop(early, 0.0)
        assert scheduler.admit(4.0) == [large]
        scheduler.drop(large, 0.0)
        assert scheduler.admit(4.0) == [late]

    def test_paused_ones_take_nobody_s_place_and_keep_their_pages_until_somebody_needs_them(self) -> None:
        scheduler, pages = scheduling(page_count=8, limits=replace(LIMITS, sequences_max=2))
        slow = [waiting(4, 4, expert(name, size_bytes=ARENA_BYTES // 2)) for name in "ab"]
        other, large = waiting(4, 4, expert("c", size_bytes=ARENA_BYTES)), waiting(22)
        for each in slow:
            scheduler.add(each)
        scheduler.admit(0.0)
        scheduler.add(other)
        assert scheduler.admit(0.0) == []
        for each in slow:
            each.unread_count = LIMITS.unread_max
        assert scheduler.admit(0.0) == [other]
        assert (pages.free_count, planned(scheduler)) == (5, [(other, 4)])
        scheduler.add(large)
        assert scheduler.admit(0.0) == [large]
        assert (slow[0].pages, slow[1].pages, pages.free_count) == ([], [], 1)
        assert [each.preemption_count for each in slow] == [1, 1]

    def test_paused_ones_that_go_on_take_turns_where_they_are_too_many_together(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=2))
        every = [waiting(1, 60) for _ in range(3)] + [waiting(1, 60, expert("e", size_bytes=ARENA_BYTES))]
        for each in every:
            scheduler.add(each)
            scheduler.admit(0.0)
            compute(scheduler, each)
            each.unread_count = LIMITS.unread_max
        assert (len(scheduler.running), planned(scheduler)) == (4, [])
        for each in every:
            each.unread_count = 0
        turns = [[sequence for sequence, _ in planned(scheduler)] for _ in range(8)]
        assert all(len(turn) == 2 for turn in turns)
        assert all(sum(each in turn for turn in turns) == 4 for each in every)

    def test_ones_whose_experts_do_not_fit_together_any_more_take_turns(self) -> None:
        scheduler, _ = scheduling()
        every = [waiting(1, 60, expert(name, size_bytes=ARENA_BYTES)) for name in "abc"]
        for each in every:
            scheduler.add(each)
            scheduler.admit(0.0)
            each.unread_count = LIMITS.unread_max
        for each in every:
            each.unread_count = 0
        turns = [planned(scheduler) for _ in range(6)]
        assert [turn[0][0] for turn in turns] == every * 2

    def test_nobody_is_admitted_whose_reader_is_behind(self) -> None:
        scheduler, _ = scheduling()
        slow, other = waiting(4), waiting(4)
        slow.unread_count = LIMITS.unread_max
        scheduler.add(slow)
        scheduler.add(other)
        assert scheduler.admit(1000.0) == [other]
        slow.unread_count = 0
        assert scheduler.admit(1000.0) == [slow]

    def test_no_more_run_than_a_step_has_rows(self) -> None:
        scheduler, _ = scheduling(limits=EngineLimits(step_tokens=2, sequences_max=3, queue_max=9))
        for _ in range(3):
            scheduler.add(waiting(4))
        assert len(scheduler.admit(0.0)) == 2

    def test_a_step_looks_past_a_few_that_do_not_fit_and_at_the_first_in_rank_before(self) -> None:
        looked: set[AdapterExpert] = set()

        def watching(experts: Collection[AdapterExpert], page_count: int) -> bool:
            looked.update(experts)
            return fits(experts, page_count)

        scheduler = Scheduler(Pages(101), watching, LIMITS)
        for number in range(30):
            scheduler.add(waiting(4, 9, expert(f"large {number}", size_bytes=ARENA_BYTES)))
        small = waiting(4, 1)
        scheduler.add(small)
        scheduler.admit(0.0)
        assert (len(scheduler.running), len(looked), small.pages) == (1, 1 + 8, [])
        first = waiting(4, 1, arrival=-1.0)
        scheduler.add(first)
        assert scheduler.admit(0.0) == [first]

    def test_what_waits_can_be_dropped_and_holds_nothing(self) -> None:
        scheduler, pages = scheduling()
        sequence = waiting(4)
        scheduler.add(sequence)
        assert scheduler.drop(sequence, 0.0)
        assert not scheduler.drop(sequence, 0.0)
        assert (scheduler.admit(0.0), pages.free_count) == ([], 100)


class TestCheck:
    def test_what_could_never_have_its_experts_side_by_side_is_refused(self) -> None:
        scheduler, _ = scheduling()
        scheduler.check(waiting(4, 1, expert("a", size_bytes=4), expert("b", size_bytes=6)))
        with pytest.raises(HocketError, match="experts together") as refusal:
            scheduler.check(waiting(4, 1, expert("a", size_bytes=5), expert("b", size_bytes=6)))
        assert refusal.value.reason is Reason.DEVICE_MEMORY


class TestPlan:
    def test_answers_go_first_then_prompts_in_turn_as_far_as_the_step_reaches(self) -> None:
        scheduler, _ = scheduling()
        long, short, answering = waiting(9, 9), waiting(3, 9), waiting(2, 9)
        for each in (long, short, answering):
            scheduler.add(each)
        scheduler.admit(0.0)
        compute(scheduler, answering, 2)
        assert planned(scheduler) == [(answering, 1), (long, 7)]
        compute(scheduler, answering, 1)
        compute(scheduler, long, 7)
        assert planned(scheduler) == [(answering, 1), (long, 2), (short, 3)]
        compute(scheduler, long, 2)
        compute(scheduler, short, 3)
        assert planned(scheduler) == [(long, 1), (short, 1), (answering, 1)]

    def test_whoever_is_not_read_pauses_and_keeps_its_pages(self) -> None:
        scheduler, pages = scheduling()
        slow, other = waiting(3, 9), waiting(3, 9)
        scheduler.add(slow)
        scheduler.add(other)
        scheduler.admit(0.0)
        free = pages.free_count
        slow.unread_count = LIMITS.unread_max
        assert planned(scheduler) == [(other, 3)]
        other.unread_count = LIMITS.unread_max
        assert planned(scheduler) == []
        assert pages.free_count == free
        slow.unread_count -= 1
        assert planned(scheduler) == [(slow, 3)]

    def test_after_a_step_that_was_too_large_steps_are_smaller_for_a_while(self) -> None:
        scheduler, _ = scheduling(limits=EngineLimits(step_tokens=8, sequences_max=8, queue_max=9))
        every = [waiting(1, 40) for _ in range(8)]
        for each in every:
            scheduler.add(each)
        scheduler.admit(0.0)
        assert len(planned(scheduler)) == 8
        scheduler.narrow(8)
        steps = [[sequence for sequence, _ in planned(scheduler)] for _ in range(33)]
        assert [len(step) for step in steps] == [4] * 32 + [8]
        assert all(sum(each in step for step in steps[:32]) == 16 for each in every)
        for row_count in (8, 4, 2, 1):
            scheduler.narrow(row_count)
        assert [count for _, count in planned(scheduler)] == [1]
        scheduler.widen()
        assert len(planned(scheduler)) == 8


def answer_some(scheduler: Scheduler, steps: int) -> None:
    """So many whole steps."""
    for _ in range(steps):
        scheduler.admit(0.0)
        for share in scheduler.plan():
            compute(scheduler, share.sequence, share.row_count)


class TestPagesOnDemand:
    def test_one_takes_pages_for_its_prompt_and_more_as_it_grows(self) -> None:
        scheduler, pages = scheduling()
        sequence = waiting(5, 20)
        scheduler.add(sequence)
        answer_some(scheduler, 1)
        assert (len(sequence.pages), pages.free_count) == (2, 98)
        answer_some(scheduler, 3)
        assert len(sequence.pages) == 2
        answer_some(scheduler, 1)
        assert (len(sequence.pages), pages.free_count) == (3, 97)

    def test_as_long_as_there_are_enough_everybody_has_them_in_a_row(self) -> None:
        scheduler, _ = scheduling(page_count=40)
        every = [waiting(5, 27) for _ in range(4)]
        for each in every:
            scheduler.add(each)
        answer_some(scheduler, 24)
        assert [each.pages for each in every] == [[*range(first, first + 7)] for first in (1, 9, 17, 25)]

    def test_nobody_is_admitted_who_would_soon_have_to_make_way(self) -> None:
        scheduler, _ = scheduling(page_count=4)
        first, second = waiting(7, 9), waiting(3, 1)
        scheduler.add(first)
        scheduler.add(second)
        assert scheduler.admit(0.0) == [first, second]
        scheduler.drop(second, 0.0)
        growing = waiting(3, 9)
        scheduler.add(growing)
        assert scheduler.admit(0.0) == []


class TestMakingWay:
    def test_the_last_to_come_makes_way_and_goes_on_where_it_was(self) -> None:
        scheduler, pages = scheduling(page_count=6)
        first, second = waiting(4, 16), waiting(4, 16)
        for each in (first, second):
            scheduler.add(each)
        answer_some(scheduler, 9)
        assert (len(first.pages), len(second.pages), pages.free_count) == (3, 3, 0)
        told = list(second.answer_ids)
        answer_some(scheduler, 4)
        assert (scheduler.running, scheduler.waiting) == ([first], [second])
        assert (second.answer_ids[: len(told)], second.pages, second.computed_count) == (told, [], 0)
        assert (first.preemption_count, second.preemption_count) == (0, 1)
        answer_some(scheduler, 3)
        scheduler.drop(first, 0.0)
        assert scheduler.admit(0.0) == [second]
        assert second.computed_count == 4  # what it had is still there, except what was needed
        assert second.part(second.rows_left).sampled

    def test_whoever_has_made_way_runs_again_when_there_is_room_for_its_longest_answer_and_that_stays_reserved(
        self,
    ) -> None:
        scheduler, _ = scheduling(page_count=8)
        first, second = waiting(4, 28), waiting(4, 28)
        for each in (first, second):
            scheduler.add(each)
        answer_some(scheduler, 14)
        assert (second.preemption_count, second.pages_for(second.row_count), second.page_count_max) == (1, 5, 8)
        assert scheduler.counts.preempted_count == 1
        scheduler.drop(first, 0.0)
        other = waiting(4, 4, priority=9)
        scheduler.add(other)
        assert scheduler.admit(0.0) == [other]  # and not the second, for which there are pages, and one more for each
        scheduler.drop(other, 0.0)
        assert scheduler.admit(0.0) == [second]
        scheduler.add(waiting(4, 4))
        assert scheduler.admit(0.0) == []
        answer_some(scheduler, 3)
        assert (second.preemption_count, len(second.pages)) == (1, 5)
        assert scheduler.counts.preempted_count == 0

    def test_the_least_urgent_makes_way_before_the_last_to_come(self) -> None:
        scheduler, _ = scheduling(page_count=6)
        idle, urgent = waiting(4, 16, priority=0), waiting(4, 16, priority=9)
        for each in (idle, urgent):
            scheduler.add(each)
        answer_some(scheduler, 12)
        assert (idle.preemption_count, urgent.preemption_count) == (1, 0)

    def test_a_paused_one_makes_way_before_everybody(self) -> None:
        scheduler, _ = scheduling(page_count=6)
        slow, other = waiting(4, 16), waiting(4, 16)
        for each in (slow, other):
            scheduler.add(each)
        answer_some(scheduler, 9)
        slow.unread_count = LIMITS.unread_max
        answer_some(scheduler, 4)
        assert (slow.preemption_count, other.preemption_count) == (1, 0)

    def test_paused_ones_keep_their_pages_where_those_of_all_of_them_would_not_be_enough(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        running, slow, other = (waiting(4, 9) for _ in range(3))
        for each in (running, slow, other):
            scheduler.add(each)
        scheduler.admit(0.0)
        slow.unread_count = other.unread_count = LIMITS.unread_max
        scheduler.add(waiting(26, 2))
        assert scheduler.admit(0.0) == []
        enough = waiting(18, 2)
        scheduler.add(enough)
        assert scheduler.admit(0.0) == [enough]
        assert [each.preemption_count for each in (running, slow, other)] == [0, 0, 1]

    def test_what_is_awaited_stays_so_where_its_sequence_cannot_begin_yet(self) -> None:
        slab = Slab(1, 64 * 9, page_bytes=64, row_bytes=64, device=torch.device("cpu"))
        scheduler = Scheduler(Pages(9, slab), fits, LIMITS)
        sequence = waiting(16, 4)
        scheduler.add(sequence)
        answer_some(scheduler, 2)
        scheduler._preempt(sequence)
        assert slab.claim_rows(5, kept_pages=False)
        slab.rows_retreat = lambda _first: False
        assert scheduler.admit(0.0) == []
        assert scheduler.counts.cached_page_count == len(scheduler._cache._awaited) == 4
        slab.rows_retreat = lambda _first: True
        assert scheduler.admit(0.0) == [sequence]
        assert sequence.computed_count == 16

    def test_nobody_makes_way_where_experts_on_their_way_would_still_be_in_the_way(self) -> None:
        slab = Slab(1, 64 * 9, page_bytes=64, row_bytes=64, device=torch.device("cpu"))
        scheduler = Scheduler(Pages(9, slab), fits, LIMITS)
        slow = waiting(4, 9)
        scheduler.add(slow)
        scheduler.admit(0.0)
        slow.unread_count = LIMITS.unread_max
        assert slab.claim_rows(5, kept_pages=False)
        slab.rows_retreat = lambda _first: False
        five, four = waiting(17), waiting(13)
        scheduler.add(five)
        assert (scheduler.admit(0.0), slow.preemption_count) == ([], 0)
        scheduler.add(four)
        assert (scheduler.admit(0.0), slow.preemption_count) == ([four], 1)

    def test_restarting_frees_everything_and_lets_the_first_begin_alone_at_the_first_page(self) -> None:
        scheduler, pages = scheduling()
        every = [waiting(9, 9) for _ in range(3)]
        for each in every:
            scheduler.add(each)
        answer_some(scheduler, 9)
        scheduler.restart()
        assert (scheduler.running, pages.free_count) == ([], 100)
        assert scheduler.admit(0.0) == every[:1]
        assert (every[0].pages[0], every[0].computed_count) == (1, 0)
        assert scheduler.admit(0.0) == []
        compute(scheduler, every[0], 1)
        assert scheduler.admit(0.0) == every[1:]


class TestPriority:
    def test_the_most_urgent_runs_first_and_each_level_is_worth_some_waiting(self) -> None:
        limits = replace(LIMITS, sequences_max=1, ageing_seconds=10.0)
        scheduler, _ = scheduling(limits=limits)
        usual, urgent, patient = waiting(4), waiting(4, priority=9), waiting(4, priority=4, arrival=-10.5)
        for each in (usual, urgent, patient):
            scheduler.add(each)
        order = []
        for _ in range(3):
            (admitted,) = scheduler.admit(0.0)
            order.append(admitted)
            scheduler.drop(admitted, 0.0)
        assert order == [urgent, patient, usual]

    def test_the_most_urgent_prompt_is_computed_first(self) -> None:
        scheduler, _ = scheduling()
        long, urgent = waiting(40), waiting(4, priority=9)
        scheduler.add(long)
        scheduler.admit(0.0)
        scheduler.add(urgent)
        scheduler.admit(0.0)
        assert planned(scheduler) == [(urgent, 4), (long, 4)]

    def test_an_urgent_one_takes_the_place_of_one_that_is_less_so(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=2))
        every = [waiting(4, 9, priority=priority) for priority in (5, 3)]
        for each in every:
            scheduler.add(each)
        scheduler.admit(0.0)
        urgent, equal = waiting(4, 9, priority=9), waiting(4, 9, priority=5)
        scheduler.add(equal)
        scheduler.add(urgent)
        assert scheduler.admit(0.0) == [urgent]
        assert scheduler.running == [every[0], urgent]

    @pytest.mark.parametrize(
        ("change", "seconds"),
        [({"tenant": "other"}, 0.0), ({"priority": 5}, 0.0), ({"priority": 6}, 100.0)],
        ids=["of another tenant", "as urgent", "due before"],
    )
    def test_but_not_of_one(self, change: dict[str, Any], seconds: float) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=1))
        running = waiting(4, 9, priority=5)
        scheduler.add(running)
        scheduler.admit(0.0)
        asked = {"priority": 9} | change
        scheduler.add(waiting(4, 9, arrival=seconds, **asked))
        assert scheduler.admit(seconds) == []
        assert running.preemption_count == 0

    def test_nobody_passes_one_that_has_just_made_way(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        less = waiting(24, 4, priority=3)
        scheduler.add(less)
        scheduler.admit(0.0)
        urgent, equal, after = waiting(12, priority=9), waiting(4, priority=3), waiting(4, priority=4)
        for each in (urgent, equal, after):
            scheduler.add(each)
        assert scheduler.admit(0.0) == [urgent, after]
        assert scheduler.waiting == [equal, less]

    def test_nobody_makes_way_where_it_would_not_help(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        first, second = waiting(4, 20, priority=9), waiting(4, 9, priority=0)
        for each in (first, second):
            scheduler.add(each)
        scheduler.admit(0.0)
        scheduler.add(waiting(28, 2, priority=8))
        assert scheduler.admit(0.0) == []
        assert second.preemption_count == 0


class TestTenants:
    def test_they_take_turns_by_what_is_computed_for_each(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=1))
        flood = [waiting(4, tenant="many") for _ in range(20)]
        for each in flood:
            scheduler.add(each)
        other = [waiting(4, tenant="one") for _ in range(3)]
        for each in other:
            scheduler.add(each)
        order = []
        for _ in range(6):
            (admitted,) = scheduler.admit(0.0)
            order.append(admitted.request.tenant)
            scheduler.drop(admitted, 0.0)
        assert order == ["many", "one"] * 3

    def test_a_long_one_counts_for_as_much_as_many_short_ones(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=1))
        for each in [waiting(40, tenant="long") for _ in range(3)] + [waiting(4, tenant="short") for _ in range(20)]:
            scheduler.add(each)
        order = []
        for _ in range(13):
            (admitted,) = scheduler.admit(0.0)
            order.append(admitted.request.tenant)
            scheduler.drop(admitted, 0.0)
        assert order == ["long", *["short"] * 10, "long", "short"]

    def test_what_is_computed_twice_is_charged_once(self) -> None:
        scheduler, _ = scheduling(page_count=6)
        first, second = waiting(4, 16, tenant="a"), waiting(4, 16, tenant="b")
        for each in (first, second):
            scheduler.add(each)
        answer_some(scheduler, 12)
        assert first.preemption_count + second.preemption_count == 1
        scheduler.restart()
        answer_some(scheduler, 1)
        for each in (first, second):
            assert scheduler._tenants[each.request.tenant] == each.charged_row_count <= each.row_count


class TestPrefixes:
    def test_whoever_begins_in_the_same_way_computes_only_what_is_left(self) -> None:
        scheduler, pages = scheduling()
        first = waiting(10, 3, begin=7)
        scheduler.add(first)
        answer_some(scheduler, 2)
        second = waiting(10, 3, begin=7)
        scheduler.add(second)
        scheduler.admit(0.0)
        assert (second.computed_count, second.pages[:2]) == (8, first.pages[:2])
        assert (second.cached_token_count, scheduler.counts.prefix_hit_count) == (8, 8)
        assert scheduler.counts.prefix_miss_count == 12
        assert pages.free_count == 100 - 4
        scheduler.drop(first, 0.0)
        assert scheduler.counts.used_page_count == 3

    def test_the_last_row_is_always_computed(self) -> None:
        scheduler, _ = scheduling()
        for _ in range(2):
            sequence = waiting(8, 3, begin=7)
            scheduler.add(sequence)
            scheduler.admit(0.0)
            compute(scheduler, sequence)
        assert (sequence.cached_token_count, sequence.computed_count) == (4, 8)

    def test_soft_prompts_are_found_and_are_no_tokens(self) -> None:
        scheduler, _ = scheduling()
        soft = expert("soft", prompt=[0.1, 0.2, 0.3])
        for _ in range(2):
            sequence = waiting(8, 3, soft, begin=7)
            scheduler.add(sequence)
            scheduler.admit(0.0)
            compute(scheduler, sequence)
        assert sequence.cached_token_count == 8 - 3

    @pytest.mark.parametrize(
        "other",
        [
            waiting(9, 1, begin=8),
            waiting(9, 1, begin=7, tenant="other"),
            waiting(9, 1, expert("a"), begin=7),
            Sequence(waiting(9, 1, begin=7).request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, 0.0, "int8"),
        ],
        ids=["another token", "another tenant", "an expert", "another variant"],
    )
    def test_nothing_is_found_of(self, other: Sequence) -> None:
        scheduler, _ = scheduling()
        for each in (waiting(9, 1, begin=7), other):
            scheduler.add(each)
            scheduler.admit(0.0)
            compute(scheduler, each)
        assert other.cached_token_count == 0

    def test_two_that_begin_at_once_each_compute_their_own(self) -> None:
        scheduler, pages = scheduling()
        both = [waiting(9, 1, begin=7) for _ in range(2)]
        for each in both:
            scheduler.add(each)
        answer_some(scheduler, 4)
        for each in both:
            scheduler.drop(each, 0.0)
        assert (scheduler.counts.cached_page_count, pages.free_count) == (2, 98)


class TestSessions:
    @staticmethod
    def one(scheduler: Scheduler, session: str, begin: int, now: float = 0.0, tenant: str = "") -> Sequence:
        sequence = waiting(9, 1, begin=begin, session=session, tenant=tenant)
        scheduler.add(sequence)
        assert scheduler.admit(now) == [sequence]
        compute(scheduler, sequence)
        scheduler.drop(sequence, now)
        return sequence

    def test_what_a_session_has_goes_last(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        self.one(scheduler, "s", 1)
        for begin in range(2, 9):
            self.one(scheduler, "", begin)
        assert self.one(scheduler, "", 2).cached_token_count == 0
        assert self.one(scheduler, "s", 1).cached_token_count == 8

    def test_until_its_time_is_over(self) -> None:
        scheduler, _ = scheduling(page_count=8, limits=replace(LIMITS, session_seconds=5.0))
        self.one(scheduler, "s", 1, now=1.0)
        for begin in range(2, 9):
            self.one(scheduler, "", begin, now=6.0)
        assert self.one(scheduler, "s", 1, now=6.0).cached_token_count == 0

    def test_the_next_turn_takes_the_place_of_the_last(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        self.one(scheduler, "s", 1)
        self.one(scheduler, "s", 2)
        for begin in range(3, 9):
            self.one(scheduler, "", begin)
        assert self.one(scheduler, "s", 2).cached_token_count == 8
        assert self.one(scheduler, "s", 1).cached_token_count == 0

    def test_sessions_of_two_tenants_are_two(self) -> None:
        scheduler, _ = scheduling(page_count=12)
        self.one(scheduler, "s", 1, tenant="a")
        self.one(scheduler, "s", 1, tenant="b")
        for begin in range(2, 9):
            self.one(scheduler, "", begin)
        assert [self.one(scheduler, "s", 1, tenant=tenant).cached_token_count for tenant in "ab"] == [8, 8]

    def test_sessions_have_no_more_than_their_share_and_the_oldest_goes_first(self) -> None:
        scheduler, _ = scheduling(page_count=8)
        for name in "abc":
            self.one(scheduler, name, ord(name))
        for begin in range(2, 9):
            self.one(scheduler, "", begin)
        assert [self.one(scheduler, "", ord(name)).cached_token_count for name in "abc"] == [0, 8, 8]

    def test_one_that_began_alike_with_another_at_once_keeps_the_pages_of_both(self) -> None:
        scheduler, pages = scheduling(page_count=8)
        first, second = waiting(9, 1, begin=1), waiting(13, 1, begin=1, session="s")
        for each in (first, second):
            scheduler.add(each)
        assert scheduler.admit(0.0) == [first, second]
        for each in (first, second):
            compute(scheduler, each)
            scheduler.drop(each, 0.0)
        assert (scheduler.counts.cached_page_count, pages.free_count) == (3, 5)
        for begin in range(2, 9):
            self.one(scheduler, "", begin)
        again = waiting(13, 1, begin=1)
        scheduler.add(again)
        scheduler.admit(0.0)
        assert again.cached_token_count == 12

    def test_they_make_room_for_whoever_needs_it(self) -> None:
        scheduler, pages = scheduling(page_count=8)
        self.one(scheduler, "s", 1)
        whole = waiting(31, 1)
        scheduler.add(whole)
        assert scheduler.admit(0.0) == [whole]
        assert pages.free_count == 0
