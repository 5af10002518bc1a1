from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.scheduler import EngineLimits, Scheduler
from services.expert_worker.engine.sequence import Sequence
from tests.scripted_engine import CONTEXT, LETTERS, LIMITS, PAGE_POSITIONS, asking, expert

if TYPE_CHECKING:
    from collections.abc import Collection

    from services.expert_worker.engine.expert import AdapterExpert

ARENA_BYTES = 10


def fits(experts: Collection[AdapterExpert]) -> bool:
    return sum(each.size_bytes for each in experts) <= ARENA_BYTES


def scheduling(page_count: int = 100, limits: EngineLimits = LIMITS) -> tuple[Scheduler, Pages]:
    pages = Pages(page_count + 1)
    return Scheduler(pages, fits, limits), pages


def waiting(prompt: int, answer: int = 1, *experts: AdapterExpert, arrival: float = 0.0) -> Sequence:
    """A sequence with so many tokens of prompt and answer."""
    request = asking(range(prompt), mixture=tuple((each, 1.0) for each in experts), max_tokens=answer)
    return Sequence(request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, arrival)


def compute(sequence: Sequence, row_count: int) -> None:
    """As if a step had."""
    sequence.computed_count += row_count
    if not sequence.rows_left:
        sequence.append(1, 0.0)


def planned(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    return [(share.sequence, share.row_count) for share in scheduler.plan()]


class TestSequence:
    def test_it_takes_pages_for_its_prompt_and_its_longest_answer(self) -> None:
        assert waiting(4, 4).page_count == 2
        assert waiting(4, 5).page_count == 3

    def test_its_answer_is_no_longer_than_the_context_has_room_for(self) -> None:
        assert waiting(60, 4).token_count_max == 4
        assert waiting(60, 5).token_count_max == 4
        assert waiting(60, 5).page_count == CONTEXT // PAGE_POSITIONS

    def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers(self) -> None:
        assert waiting(63, 9).token_count_max == 1
        with pytest.raises(HocketError, match="64 tokens, 0 of them of soft prompts; the context has 64") as refusal:
            waiting(64)
        assert (refusal.value.reason, refusal.value.field) == (Reason.TOO_LARGE, "input")
        soft = expert("soft", prompt=[0.5, 0.5])
        assert waiting(61, 9, soft).token_count_max == 1
        with pytest.raises(HocketError, match="64 tokens, 2 of them of soft prompts"):
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
                compute(sequence, row_count)
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
        scheduler.drop(first)
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
        assert scheduler.drop(first)
        assert not scheduler.drop(first)
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
        scheduler.drop(first)
        assert scheduler.admit(0.0) == []
        scheduler.drop(third)
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
        scheduler.drop(running)
        assert scheduler.admit(3.5) == []
        scheduler.drop(early)
        assert scheduler.admit(4.0) == [large]
        scheduler.drop(large)
        assert scheduler.admit(4.0) == [late]

    def test_paused_ones_take_nobody_s_place_but_keep_their_pages(self) -> None:
        scheduler, pages = scheduling(page_count=8, limits=replace(LIMITS, sequences_max=2))
        slow = [waiting(4, 4, expert(name, size_bytes=ARENA_BYTES // 2)) for name in "ab"]
        other, large = waiting(4, 4, expert("c", size_bytes=ARENA_BYTES)), waiting(9)
        for each in slow:
            scheduler.add(each)
        scheduler.admit(0.0)
        scheduler.add(other)
        assert scheduler.admit(0.0) == []
        for each in slow:
            each.unread_count = LIMITS.unread_max
        scheduler.add(large)
        assert scheduler.admit(0.0) == [other]
        assert (pages.free_count, planned(scheduler)) == (2, [(other, 4)])

    def test_paused_ones_that_go_on_take_turns_where_they_are_too_many_together(self) -> None:
        scheduler, _ = scheduling(limits=replace(LIMITS, sequences_max=2))
        every = [waiting(1, 60) for _ in range(3)] + [waiting(1, 60, expert("e", size_bytes=ARENA_BYTES))]
        for each in every:
            scheduler.add(each)
            scheduler.admit(0.0)
            compute(each, each.rows_left)
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

    def test_whoever_is_not_read_for_too_long_is_overdue_when_somebody_waits_for_its_pages(self) -> None:
        limits = replace(LIMITS, unread_seconds=60.0)
        scheduler, _ = scheduling(page_count=4, limits=limits)
        late, later, waits = waiting(4, 4), waiting(4, 4), waiting(4)
        for each in (late, later):
            scheduler.add(each)
        scheduler.admit(0.0)
        late.unread_count = limits.unread_max
        assert scheduler.overdue(0.0) is None
        later.unread_count = limits.unread_max
        assert scheduler.overdue(1.0) is None
        assert scheduler.overdue(100.0) is None  # nobody wants their pages
        scheduler.add(waits)
        assert scheduler.admit(100.0) == []
        late.paused_time, later.paused_time = 41.0, 42.0
        assert scheduler.overdue(100.9) is None
        assert scheduler.overdue(102.0) is late
        scheduler.drop(late)
        assert scheduler.admit(102.0) == [waits]
        assert scheduler.overdue(102.0) is None

    @pytest.mark.parametrize("paused", [False, True])
    def test_nobody_is_held_up_for_one_that_waits_for_a_slow_reader(self, *, paused: bool) -> None:
        scheduler, _ = scheduling(page_count=4)
        slow, large, small = waiting(7), waiting(15), waiting(3)
        scheduler.add(slow)
        scheduler.admit(0.0)
        slow.unread_count = LIMITS.unread_max if paused else 0
        scheduler.add(large)
        scheduler.add(small)
        assert scheduler.admit(1000.0) == ([small] if paused else [])

    def test_no_more_run_than_a_step_has_rows(self) -> None:
        scheduler, _ = scheduling(limits=EngineLimits(step_tokens=2, sequences_max=3, queue_max=9))
        for _ in range(3):
            scheduler.add(waiting(4))
        assert len(scheduler.admit(0.0)) == 2

    def test_what_waits_can_be_dropped_and_holds_nothing(self) -> None:
        scheduler, pages = scheduling()
        sequence = waiting(4)
        scheduler.add(sequence)
        assert scheduler.drop(sequence)
        assert not scheduler.drop(sequence)
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
        compute(answering, 2)
        assert planned(scheduler) == [(answering, 1), (long, 7)]
        compute(answering, 1)
        compute(long, 7)
        assert planned(scheduler) == [(answering, 1), (long, 2), (short, 3)]
        compute(long, 2)
        compute(short, 3)
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
