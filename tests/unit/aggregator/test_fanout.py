"""Asking experts: which replica, when another one, what a hedge costs, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import FAILURES_MAX, Breakers
from hocket.rpc.budget import RetryBudget
from hocket.rpc.bulkhead import Bulkhead
from hocket.v1.plan_pb2 import Replica
from services.aggregator.fanout import ask_all
from services.aggregator.question import ExpertError, Question, Reply, Safeguards
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from numpy.typing import NDArray

PATIENCE = 0.5
NEVER = 3600.0
SHAPE = (1, 1)

Step: TypeAlias = "float | NDArray[np.float32] | Reason | Exception"
"""What a scripted call does: sleeps so many seconds, answers, refuses, or breaks."""


def value(number: float) -> NDArray[np.float32]:
    return np.array([[number]], dtype=np.float32)


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stage:
    """Scripted replicas, and what all questions share.

    Attributes:
        asked: Replicas in the order they were asked.
        running: Calls that run now.
        cancelled: Replicas whose calls were cancelled.
        away: Workers known to be out of reach.
        cold: Workers that would have to load the expert.
    """

    per_expert_max: int = 100
    asked: list[str] = field(default_factory=list)
    running: int = 0
    cancelled: list[str] = field(default_factory=list)
    away: set[str] = field(default_factory=set)
    cold: set[str] = field(default_factory=set)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.budget = RetryBudget("test")
        self.breakers: Breakers[tuple[str, str]] = Breakers("test", self.clock)
        self.bulkhead = Bulkhead(self.per_expert_max, "this expert")
        self.safeguards = Safeguards(PATIENCE, self.budget, self.breakers, self.bulkhead)

    def question(self, *scripts: list[Step], expert: str = "e", **options: Any) -> Question:
        """An expert with one replica per script: `w0`, `w1`, ..."""
        played = {f"w{place}": script for place, script in enumerate(scripts)}
        replicas = [Replica(worker=name, address=name, resident=name not in self.cold) for name in played]

        async def call(name: str) -> NDArray[np.float32]:
            self.asked.append(name)
            self.running += 1
            try:
                return await play(played[name])
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            finally:
                self.running -= 1

        return Question(self.safeguards, expert, replicas, SHAPE, call, lambda name: name in self.away, **options)

    async def ask(
        self, *scripts: list[Step], deadline: float = math.inf, straggler: float | None = None, **options: Any
    ) -> Reply | ExpertError:
        """The outcome of one question; afterwards nothing runs and nothing is counted."""
        asking = all_of([self.question(*scripts, **options)], deadline=deadline, straggler=straggler)
        [outcomes] = [outcomes async for outcomes in asking]
        self.check_nothing_is_left()
        return outcomes[0]

    def check_nothing_is_left(self) -> None:
        assert self.running == 0
        assert self.bulkhead._in_flight == {}
        assert not any(circuit.probing for circuit in self.breakers._circuits.values())

    def failures(self, worker: str, expert: str = "e") -> int:
        circuit = self.breakers._circuits.get((worker, expert))
        return 0 if circuit is None else circuit.failures

    def fail(self, worker: str, times: int = FAILURES_MAX, expert: str = "e") -> None:
        for _ in range(times):
            self.breakers.leave((worker, expert), None, healthy=False)

    def exhaust(self) -> None:
        while self.budget.spend():
            pass


async def play(script: list[Step]) -> NDArray[np.float32]:
    for step in script:
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif isinstance(step, Reason):
            raise HocketError(step, "no")
        elif isinstance(step, Exception):
            raise step
        else:
            return step
    raise AssertionError("the script has no end")


async def all_of(
    questions: list[Question], *, every: bool = False, deadline: float = math.inf, straggler: float | None = None
) -> AsyncGenerator[dict[int, Reply | ExpertError], None]:
    asking = ask_all(questions, every=every, deadline=deadline, straggler_seconds=straggler)
    async with asyncio.timeout(60), aclosing(asking) as arrivals:
        async for outcomes in arrivals:
            yield outcomes


def reason_of(outcome: Reply | ExpertError) -> Reason:
    assert isinstance(outcome, ExpertError)
    return outcome.reason


def answered(outcome: Reply | ExpertError) -> tuple[str, int, float]:
    assert isinstance(outcome, Reply), outcome
    return outcome.worker, outcome.attempts, outcome.output.item()


@pytest.fixture
def stage() -> Stage:
    return Stage()


# Moving on.


@in_virtual_time
async def test_an_unavailable_replica_is_followed_by_the_next(stage: Stage) -> None:
    outcome = await stage.ask([Reason.UNREACHABLE], [Reason.DRAINING], [value(7)])
    assert answered(outcome) == ("w2", 3, 7.0)


@pytest.mark.parametrize(
    "reason", [Reason.QUARANTINED, Reason.ENCRYPTED, Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT]
)
@in_virtual_time
async def test_a_replica_that_alone_cannot_run_it_is_followed_by_the_next(stage: Stage, reason: Reason) -> None:
    assert answered(await stage.ask([reason], [value(7)])) == ("w1", 2, 7.0)
    assert reason_of(await stage.ask([reason])) is reason


@pytest.mark.parametrize("reason", [Reason.SIGNER_NOT_TRUSTED, Reason.BAD_TENSOR, Reason.QUEUE_FULL, Reason.INTERNAL])
@in_virtual_time
async def test_any_other_refusal_ends_the_asking(stage: Stage, reason: Reason) -> None:
    outcome = await stage.ask([reason], [value(7)])
    assert (reason_of(outcome), stage.asked) == (reason, ["w0"])


@in_virtual_time
async def test_without_replicas_there_is_nobody_to_ask(stage: Stage) -> None:
    assert reason_of(await stage.ask()) is Reason.NO_REPLICA
    assert reason_of(await stage.ask(unavailable=Reason.YANKED)) is Reason.YANKED


@in_virtual_time
async def test_when_all_are_unavailable_the_last_refusal_counts(stage: Stage) -> None:
    outcome = await stage.ask([Reason.UNREACHABLE], [Reason.DRAINING])
    assert isinstance(outcome, ExpertError)
    assert (outcome.reason, outcome.attempts) == (Reason.DRAINING, 2)


@pytest.mark.parametrize(
    "output",
    [value(np.nan), value(np.inf), np.zeros((2, 1), np.float32), np.zeros((1, 2), np.float32)],
    ids=["nan", "infinity", "rows", "columns"],
)
@in_virtual_time
async def test_an_answer_that_is_not_finite_or_of_another_shape_is_bad(
    stage: Stage, output: NDArray[np.float32]
) -> None:
    assert reason_of(await stage.ask([output])) is Reason.BAD_ANSWER
    assert stage.failures("w0") == 1


@in_virtual_time
async def test_a_bug_in_asking_is_not_taken_for_a_missing_expert(stage: Stage) -> None:
    with pytest.raises(ZeroDivisionError):
        await stage.ask([ZeroDivisionError()])
    stage.check_nothing_is_left()


# Who is asked first.


@in_virtual_time
async def test_a_replica_out_of_reach_is_asked_after_the_others(stage: Stage) -> None:
    stage.away = {"w0"}
    assert answered(await stage.ask([value(1)], [value(2)])) == ("w1", 1, 2.0)


@in_virtual_time
async def test_a_replica_whose_breaker_is_open_is_asked_after_the_others(stage: Stage) -> None:
    stage.fail("w0")
    assert answered(await stage.ask([value(1)], [value(2)])) == ("w1", 1, 2.0)
    assert answered(await stage.ask([value(1)], [Reason.UNREACHABLE])) == ("w0", 2, 1.0)


@in_virtual_time
async def test_the_last_replica_is_always_tried(stage: Stage) -> None:
    stage.away = {"w0", "w1"}
    stage.fail("w0")
    stage.fail("w1")
    assert answered(await stage.ask([Reason.UNREACHABLE], [value(2)])) == ("w1", 2, 2.0)
    assert answered(await stage.ask([value(1)])) == ("w0", 1, 1.0)


@in_virtual_time
async def test_a_breaker_is_of_one_expert_on_one_worker(stage: Stage) -> None:
    stage.fail("w0")
    assert answered(await stage.ask([value(1)], [value(2)], expert="other")) == ("w0", 1, 1.0)


@in_virtual_time
async def test_five_failures_in_a_row_send_the_sixth_call_elsewhere(stage: Stage) -> None:
    for _ in range(FAILURES_MAX):
        await stage.ask([Reason.UNREACHABLE], [value(2)])
    assert answered(await stage.ask([value(1)], [value(2)])) == ("w1", 1, 2.0)


@in_virtual_time
async def test_one_probe_at_a_time_finds_out_whether_a_replica_works_again(stage: Stage) -> None:
    stage.fail("w0")
    stage.clock.now += 10.0
    questions = [stage.question([0.02, value(1)], [value(2)]) for _ in range(3)]
    [outcomes] = [outcomes async for outcomes in all_of(questions)]
    assert [answered(outcomes[place])[0] for place in range(3)] == ["w0", "w1", "w1"]
    assert answered(await stage.ask([value(1)], [value(2)]))[0] == "w0"


@pytest.mark.parametrize("ending", ["cancelled before its first step", "cancelled while it runs", "straggler"])
@in_virtual_time
async def test_a_probe_that_nobody_waits_for_is_freed(stage: Stage, ending: str) -> None:
    stage.fail("w0")
    stage.clock.now += 10.0
    question = stage.question([NEVER], [NEVER])
    if ending == "straggler":
        [outcomes] = [outcomes async for outcomes in all_of([question], straggler=0.01)]
        assert reason_of(outcomes[0]) is Reason.STRAGGLER
    else:
        asking = asyncio.create_task(anext(ask_all([question], every=False, deadline=math.inf, straggler_seconds=None)))
        await asyncio.sleep(0 if ending == "cancelled before its first step" else 0.01)
        asking.cancel()
        await asyncio.wait([asking])
    stage.check_nothing_is_left()
    assert answered(await stage.ask([value(1)], [value(2)])) == ("w0", 1, 1.0)


# Hedging.


@in_virtual_time
async def test_a_silent_replica_is_hedged_and_the_first_answer_wins(stage: Stage) -> None:
    outcome = await stage.ask([NEVER], [value(2)])
    assert answered(outcome) == ("w1", 2, 2.0)
    assert isinstance(outcome, Reply)
    assert outcome.seconds == PATIENCE
    assert (stage.cancelled, stage.failures("w0"), stage.failures("w1")) == (["w0"], 1, 0)


@in_virtual_time
async def test_a_hedge_that_loses_is_cancelled_and_not_blamed(stage: Stage) -> None:
    assert answered(await stage.ask([PATIENCE * 1.5, value(1)], [NEVER])) == ("w0", 2, 1.0)
    assert (stage.cancelled, stage.failures("w0"), stage.failures("w1")) == (["w1"], 0, 0)


@in_virtual_time
async def test_nobody_is_hedged_who_answers_in_time(stage: Stage) -> None:
    assert answered(await stage.ask([PATIENCE / 4, value(1)], [value(2)])) == ("w0", 1, 1.0)
    assert stage.asked == ["w0"]


@in_virtual_time
async def test_each_patience_asks_one_more(stage: Stage) -> None:
    assert answered(await stage.ask([NEVER], [NEVER], [value(3)])) == ("w2", 3, 3.0)
    assert (stage.failures("w0"), stage.failures("w1")) == (1, 1)


@in_virtual_time
async def test_the_patience_begins_anew_with_each_replica(stage: Stage) -> None:
    outcome = await stage.ask([PATIENCE * 0.6, Reason.UNREACHABLE], [PATIENCE * 0.8, value(2)], [value(3)])
    assert answered(outcome) == ("w1", 2, 2.0)


@in_virtual_time
async def test_a_hedge_that_is_refused_is_replaced_by_the_next_replica(stage: Stage) -> None:
    assert answered(await stage.ask([NEVER], [Reason.UNREACHABLE], [value(3)])) == ("w2", 3, 3.0)


@pytest.mark.parametrize("reason", [Reason.UNREACHABLE, Reason.QUEUE_FULL, Reason.QUARANTINED, Reason.EXPERT_LOADING])
@in_virtual_time
async def test_a_hedge_never_makes_an_answer_worse(stage: Stage, reason: Reason) -> None:
    assert answered(await stage.ask([PATIENCE * 1.5, value(1)], [reason])) == ("w0", 2, 1.0)


@pytest.mark.parametrize("reason", [Reason.BAD_TENSOR, Reason.UNKNOWN_EXPERT, Reason.KEY_REVOKED, Reason.YANKED])
@in_virtual_time
async def test_a_refusal_that_all_would_give_does_not_wait_for_the_silent_one(stage: Stage, reason: Reason) -> None:
    assert reason_of(await stage.ask([NEVER], [reason])) is reason


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.EXPERT_LOADING, Reason.QUARANTINED, Reason.INTERNAL])
@pytest.mark.parametrize("end", [Reason.DEADLINE, Reason.STRAGGLER])
@in_virtual_time
async def test_a_refusal_says_more_than_the_silence_of_the_others(stage: Stage, reason: Reason, end: Reason) -> None:
    if end is Reason.DEADLINE:
        outcome = await stage.ask([PATIENCE * 3, Reason.DEADLINE], [reason])
    else:
        outcome = await stage.ask([NEVER], [reason], straggler=PATIENCE * 3)
    assert isinstance(outcome, ExpertError)
    assert (outcome.reason, outcome.attempts, outcome.seconds) == (reason, 2, PATIENCE * 3)


@in_virtual_time
async def test_that_another_one_was_away_says_less_than_silence(stage: Stage) -> None:
    assert reason_of(await stage.ask([NEVER], [Reason.UNREACHABLE], straggler=PATIENCE * 3)) is Reason.STRAGGLER


@in_virtual_time
async def test_a_deadline_that_ends_the_first_call_leaves_the_hedge_its_own(stage: Stage) -> None:
    assert answered(await stage.ask([PATIENCE * 1.2, Reason.DEADLINE], [PATIENCE / 2, value(2)])) == ("w1", 2, 2.0)
    assert stage.failures("w0") == 1


@in_virtual_time
async def test_a_deadline_counts_against_a_replica_only_when_it_outlasts_the_patience(stage: Stage) -> None:
    assert reason_of(await stage.ask([Reason.DEADLINE])) is Reason.DEADLINE
    assert stage.failures("w0") == 0
    assert reason_of(await stage.ask([PATIENCE * 1.5, Reason.DEADLINE])) is Reason.DEADLINE
    assert stage.failures("w0") == 1
    assert reason_of(await stage.ask([PATIENCE * 1.5, Reason.EXPERT_LOADING])) is Reason.EXPERT_LOADING
    assert stage.failures("w0") == 1  # it has said why


@in_virtual_time
async def test_who_gives_up_speaks_against_those_alone_that_were_silent_already(stage: Stage) -> None:
    outcome = await stage.ask([NEVER], [NEVER], straggler=PATIENCE * 2.5)
    assert isinstance(outcome, ExpertError)
    assert (outcome.reason, outcome.attempts) == (Reason.STRAGGLER, 2)
    assert (stage.failures("w0"), stage.failures("w1")) == (1, 1)
    await stage.ask([NEVER], [NEVER], straggler=PATIENCE * 2.5, expert="other")
    assert stage.failures("w0", "other") == 1


@in_virtual_time
async def test_a_caller_that_goes_speaks_against_those_alone_that_were_silent_already(stage: Stage) -> None:
    asking = asyncio.create_task(anext(all_of([stage.question([NEVER], [NEVER])])))
    await asyncio.sleep(PATIENCE * 1.5)
    asking.cancel()
    await asyncio.wait([asking])
    assert (stage.failures("w0"), stage.failures("w1")) == (1, 0)
    stage.check_nothing_is_left()


@pytest.mark.parametrize("limit", ["deadline", "straggler"])
@in_virtual_time
async def test_a_caller_in_a_hurry_has_patience_for_half_of_its_time(stage: Stage, limit: str) -> None:
    begin = asyncio.get_running_loop().time()
    options: dict[str, Any] = {limit: PATIENCE / 2}
    outcome = await stage.ask([NEVER], [value(2)], **options)
    assert answered(outcome) == ("w1", 2, 2.0)
    assert isinstance(outcome, Reply)
    assert (begin, outcome.seconds) == (0.0, PATIENCE / 4)
    assert stage.failures("w0") == 1


@in_virtual_time
async def test_a_moment_without_an_answer_is_no_silence_however_short_the_deadline(stage: Stage) -> None:
    assert reason_of(await stage.ask([0.03, Reason.DEADLINE], [value(2)], deadline=0.03)) is Reason.DEADLINE
    assert (stage.failures("w0"), stage.asked) == (0, ["w0"])


# Experts that have to be loaded.


@in_virtual_time
async def test_an_expert_that_nobody_holds_is_loaded_once_however_long_that_takes(stage: Stage) -> None:
    stage.cold = {"w0", "w1", "w2"}
    assert answered(await stage.ask([PATIENCE * 4.5, value(1)], [value(2)], [value(3)])) == ("w0", 1, 1.0)
    assert (stage.asked, stage.failures("w0")) == (["w0"], 0)


@in_virtual_time
async def test_a_load_that_outlasts_its_caller_does_not_speak_against_the_replica(stage: Stage) -> None:
    stage.cold = {"w0", "w1"}
    await stage.ask([NEVER], [value(2)], straggler=PATIENCE * 4)
    await stage.ask([PATIENCE * 4.5, Reason.DEADLINE], [value(2)])
    assert (stage.asked, stage.failures("w0")) == (["w0", "w0"], 0)


@in_virtual_time
async def test_a_silent_replica_that_holds_the_expert_is_hedged_with_one_that_loads_it(stage: Stage) -> None:
    stage.cold = {"w1", "w2"}
    assert answered(await stage.ask([NEVER], [PATIENCE * 4, value(2)], [value(3)])) == ("w1", 2, 2.0)
    assert (stage.asked, stage.failures("w0")) == (["w0", "w1"], 1)


@in_virtual_time
async def test_a_replica_that_loads_is_hedged_with_one_that_holds_the_expert(stage: Stage) -> None:
    stage.cold = {"w0"}
    assert answered(await stage.ask([NEVER], [value(2)])) == ("w1", 2, 2.0)
    assert stage.failures("w0") == 0


@in_virtual_time
async def test_a_load_that_is_refused_goes_on_at_the_next_replica(stage: Stage) -> None:
    stage.cold = {"w0", "w1"}
    assert answered(await stage.ask([PATIENCE * 2, Reason.DRAINING], [PATIENCE * 2, value(2)])) == ("w1", 2, 2.0)


# What that costs.


@in_virtual_time
async def test_a_spent_budget_waits_for_the_first_replica(stage: Stage) -> None:
    stage.exhaust()
    assert answered(await stage.ask([PATIENCE * 2.5, value(1)], [value(2)])) == ("w0", 1, 1.0)


@in_virtual_time
async def test_a_spent_budget_raises_the_first_refusal(stage: Stage) -> None:
    stage.exhaust()
    assert reason_of(await stage.ask([Reason.UNREACHABLE], [value(2)])) is Reason.UNREACHABLE


@in_virtual_time
async def test_choosing_another_replica_first_costs_nothing(stage: Stage) -> None:
    stage.exhaust()
    stage.away = {"w0"}
    assert answered(await stage.ask([value(1)], [value(2)])) == ("w1", 1, 2.0)


@in_virtual_time
async def test_repeats_and_hedges_cost_one_each(stage: Stage) -> None:
    stage.exhaust()
    for _ in range(20):
        stage.budget.earn()
    await stage.ask([NEVER], [Reason.UNREACHABLE], [value(3)])
    assert reason_of(await stage.ask([Reason.UNREACHABLE], [value(2)])) is Reason.UNREACHABLE


@in_virtual_time
async def test_ten_questions_pay_for_one_repeat(stage: Stage) -> None:
    stage.exhaust()
    for _ in range(9):
        await stage.ask([value(1)])
    assert answered(await stage.ask([Reason.UNREACHABLE], [value(2)]))[1] == 2
    assert reason_of(await stage.ask([Reason.UNREACHABLE], [value(2)])) is Reason.UNREACHABLE


# Several experts.


@in_virtual_time
async def test_each_arrival_is_announced_when_asked_for(stage: Stage) -> None:
    for every, arrivals in ((True, [[1], [2], [0]]), (False, [[0, 1, 2]])):
        questions = [stage.question([delay, value(1)]) for delay in (0.3, 0.1, 0.2)]
        assert [list(outcomes) async for outcomes in all_of(questions, every=every)] == arrivals


@in_virtual_time
async def test_arrivals_while_the_consumer_is_busy_come_together(stage: Stage) -> None:
    questions = [stage.question([delay, value(1)]) for delay in (0.1, 0.2, 0.3)]
    seen = []
    async for outcomes in all_of(questions, every=True):
        seen.append(sorted(outcomes))
        await asyncio.sleep(0.4)
    assert seen == [[0], [1, 2]]


@in_virtual_time
async def test_a_failure_is_announced_at_once(stage: Stage) -> None:
    questions = [stage.question([0.02, value(1)]), stage.question([Reason.KEY_REVOKED])]
    assert [list(outcomes) async for outcomes in all_of(questions)] == [[1], [0]]


@in_virtual_time
async def test_a_consumer_that_leaves_takes_every_call_along(stage: Stage) -> None:
    questions = [stage.question([NEVER], [NEVER]), stage.question([Reason.KEY_REVOKED])]
    async with aclosing(ask_all(questions, every=False, deadline=math.inf, straggler_seconds=None)) as arrivals:
        assert list(await anext(arrivals)) == [1]
        assert stage.running == 1
    stage.check_nothing_is_left()
    assert stage.failures("w0") == 0


@in_virtual_time
async def test_stragglers_are_missing_and_the_rest_counts(stage: Stage) -> None:
    questions = [stage.question([value(3)]), stage.question([NEVER])]
    [first, second] = [outcomes async for outcomes in all_of(questions, straggler=0.02)]
    assert answered(first[0])[2] == 3.0
    assert reason_of(second[1]) is Reason.STRAGGLER
    stage.check_nothing_is_left()


@in_virtual_time
async def test_one_silent_replica_of_many_experts_is_hedged_alone(stage: Stage) -> None:
    questions = [stage.question([value(1)], [value(2)]) for _ in range(5)]
    questions.append(stage.question([NEVER], [value(2)]))
    outcomes = {}
    async for arrived in all_of(questions):
        outcomes.update(arrived)
    assert [answered(outcomes[place])[0] for place in range(6)] == ["w0"] * 5 + ["w1"]
    assert len(stage.asked) == 7


@pytest.mark.parametrize("every", [True, False])
@in_virtual_time
async def test_each_expert_took_its_own_time_however_late_that_is_noticed(stage: Stage, every: bool) -> None:  # noqa: FBT001 - a parameter of the test
    questions = [stage.question([delay, value(1)]) for delay in (0.1, 0.4, 0.2)]
    outcomes: dict[int, Reply | ExpertError] = {}
    async for arrived in all_of(questions, every=every):
        outcomes.update(arrived)
    assert [outcomes[place].seconds for place in range(3)] == pytest.approx([0.1, 0.4, 0.2])


@in_virtual_time
async def test_two_answers_in_the_same_step_are_one(stage: Stage) -> None:
    start = asyncio.Event()

    async def both(name: str) -> NDArray[np.float32]:
        if name == "w1":
            start.set()
        await start.wait()
        return value(1)

    replicas = [Replica(worker=name, address=name, resident=True) for name in ("w0", "w1")]
    question = Question(stage.safeguards, "e", replicas, SHAPE, both, lambda _: False)
    [outcomes] = [outcomes async for outcomes in all_of([question])]
    assert answered(outcomes[0])[1] == 2
    stage.check_nothing_is_left()


# Compartments.


@in_virtual_time
async def test_a_hanging_expert_fills_its_own_compartment_only() -> None:
    stage = Stage(per_expert_max=3)
    questions = [stage.question([NEVER], expert="hanging") for _ in range(4)]
    questions += [stage.question([value(1)], expert="well") for _ in range(3)]
    outcomes: dict[int, Reply | ExpertError] = {}
    async for arrived in all_of(questions, straggler=0.03):
        outcomes.update(arrived)
    assert [reason_of(outcomes[place]) for place in range(3)] == [Reason.STRAGGLER] * 3
    assert reason_of(outcomes[3]) is Reason.QUEUE_FULL
    assert [answered(outcomes[place])[2] for place in range(4, 7)] == [1.0] * 3
    stage.check_nothing_is_left()


@in_virtual_time
async def test_an_expert_that_has_answered_fills_no_compartment_while_others_hang() -> None:
    stage = Stage(per_expert_max=1)
    held = asyncio.create_task(anext(all_of([stage.question([value(1)]), stage.question([NEVER], expert="hanging")])))
    await asyncio.sleep(0.01)
    [outcomes] = [outcomes async for outcomes in all_of([stage.question([value(1)])])]
    assert answered(outcomes[0])[2] == 1.0
    held.cancel()
    await asyncio.wait([held])
    stage.check_nothing_is_left()


@in_virtual_time
async def test_hedges_that_a_full_compartment_refuses_cost_nothing() -> None:
    stage = Stage(per_expert_max=20)
    stage.exhaust()
    for _ in range(10):
        stage.budget.earn()
    questions = [stage.question([NEVER], [NEVER], expert="hanging") for _ in range(20)]
    async for _ in all_of(questions, straggler=PATIENCE * 10.5):
        pass
    assert answered(await stage.ask([Reason.UNREACHABLE], [value(2)], expert="well")) == ("w1", 2, 2.0)
    stage.check_nothing_is_left()
    assert sum(stage.budget.spend() for _ in range(10)) == 2  # 30 calls have paid for three repeats, and one was made


@in_virtual_time
async def test_a_hedge_without_budget_leaves_its_compartment() -> None:
    stage = Stage(per_expert_max=2)
    stage.exhaust()
    assert answered(await stage.ask([PATIENCE * 1.5, value(1)], [value(2)])) == ("w0", 1, 1.0)


@in_virtual_time
async def test_a_full_compartment_has_no_room_for_a_hedge() -> None:
    stage = Stage(per_expert_max=1)
    assert answered(await stage.ask([PATIENCE * 1.5, value(1)], [value(2)])) == ("w0", 1, 1.0)
