"""Text jobs: which worker is asked, when another one, and what breaks an answer."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from prometheus_client import REGISTRY

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import FAILURES_MAX, Breakers
from hocket.rpc.budget import RetryBudget
from hocket.rpc.bulkhead import Bulkhead
from hocket.rpc.channel import Channels
from hocket.text_limits import REPLICAS_MAX, WEIGHT_MAX
from hocket.v1 import plan_pb2, text_pb2
from services.aggregator.question import Safeguards
from services.aggregator.relay import check_plan, relay
from services.aggregator.workers import Workers
from tests.texts import BASE, OTHER_BASE, TextWorker, answer, delta, finish, job, start
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.texts import Step

LONG = 1800.0


class KnownWorkers(Workers):
    """Workers whose absence is known as a test says."""

    away: frozenset[str] = frozenset()

    def is_away(self, address: str) -> bool:
        return address.removeprefix("local:") in self.away


@dataclass
class Stage:
    """Scripted workers `w0`, `w1`, ... and what all texts share.

    Attributes:
        per_base_max: Texts at once per base.
        workers: By name.
        loads: What workers have reported, by address.
    """

    per_base_max: int = 100
    workers: dict[str, TextWorker] = field(default_factory=dict)
    loads: dict[str, bytes] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.budget = RetryBudget("test")
        self.breakers: Breakers[tuple[str, str]] = Breakers("test", lambda: self.now)
        self.bulkhead = Bulkhead(self.per_base_max, "this base")
        self.safeguards = Safeguards(math.inf, self.budget, self.breakers, self.bulkhead)
        self.known = KnownWorkers(Channels({}))

    def relay(
        self, *scripts: list[Step], base: str = BASE, seconds: float = 3600.0
    ) -> AsyncGenerator[text_pb2.TextEvent, None]:
        """The answer to a job whose replicas play these scripts, in order."""
        self.workers = {f"w{place}": TextWorker(script) for place, script in enumerate(scripts)}
        away = self.known.away
        self.known = KnownWorkers(Channels({name: worker.handlers() for name, worker in self.workers.items()}))
        self.known.away = away
        addresses = {name: f"local:{name}" for name in self.workers}
        deadline = asyncio.get_running_loop().time() + seconds
        return relay(self.safeguards, self.known, job(addresses, base=base), deadline, self.loads)

    async def ask(self, *scripts: list[Step], **options: Any) -> list[text_pb2.TextEvent]:
        """All events of an answer; afterwards nothing runs and nothing is counted."""
        try:
            return [event async for event in self.relay(*scripts, **options)]
        finally:
            await asyncio.sleep(0.01)
            self.check_nothing_is_left()

    async def refusal(self, *scripts: list[Step], **options: Any) -> HocketError:
        with pytest.raises(HocketError) as caught:
            await self.ask(*scripts, **options)
        return caught.value

    async def who(self, *scripts: list[Step], **options: Any) -> str:
        """Name of the worker that answers."""
        return (await self.ask(*scripts, **options))[0].start.worker

    @property
    def asked(self) -> list[str]:
        return [name for name, worker in self.workers.items() if worker.jobs]

    def check_nothing_is_left(self) -> None:
        assert self.bulkhead._in_flight == {}
        assert not any(circuit.probing for circuit in self.breakers._circuits.values())
        assert not any(worker.running for worker in self.workers.values())
        assert not any(worker.calls for worker in self.known._workers.values())

    def failures(self, worker: str, base: str = BASE) -> int:
        circuit = self.breakers._circuits.get((worker, base))
        return 0 if circuit is None else circuit.failures

    def fail(self, worker: str, times: int = FAILURES_MAX) -> None:
        for _ in range(times):
            self.breakers.leave((worker, BASE), None, healthy=False)

    def exhaust(self) -> None:
        while self.budget.spend():
            pass


@pytest.fixture
def stage() -> Stage:
    return Stage()


# Passing on.


@in_virtual_time
async def test_every_event_of_the_worker_is_passed_on_in_order(stage: Stage) -> None:
    assert await stage.ask(answer()) == answer()
    assert stage.workers["w0"].jobs == [job({"w0": "local:w0"})]


@in_virtual_time
async def test_the_report_of_the_workers_load_is_kept(stage: Stage) -> None:
    await stage.ask([Reason.UNREACHABLE], answer())
    assert stage.loads == {"local:w1": stage.workers["w1"].load.SerializeToString()}


@in_virtual_time
async def test_an_answer_may_be_silent_for_as_long_as_its_deadline_allows(stage: Stage) -> None:
    script: list[Step] = [LONG, start(), LONG / 2, delta("one"), LONG / 2 - 1.0, finish()]
    assert len(await stage.ask(script, answer())) == 3
    assert (stage.asked, stage.failures("w0")) == (["w0"], 0)


@pytest.mark.parametrize("begun", [[], [start()], [start(), delta("one")]], ids=["silent", "started", "answering"])
@in_virtual_time
async def test_a_deadline_ends_the_answer_and_speaks_against_nobody(stage: Stage, begun: list[Step]) -> None:
    refusal = await stage.refusal([*begun, LONG, finish()], answer(), seconds=LONG / 2)
    assert (refusal.reason, stage.asked, stage.failures("w0")) == (Reason.DEADLINE, ["w0"], 0)


@pytest.mark.parametrize("count", [0, 1, 2])
@in_virtual_time
async def test_closing_the_answer_cancels_the_worker_at_once(stage: Stage, count: int) -> None:
    answering = stage.relay([start(), delta("one"), LONG, finish()], answer())
    async with aclosing(answering):
        for _ in range(count):
            await anext(answering)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    stage.check_nothing_is_left()
    assert (stage.failures("w0"), stage.asked) == (0, ["w0"] if count else [])


@in_virtual_time
async def test_a_caller_that_is_cancelled_while_the_worker_is_silent_cancels_it(stage: Stage) -> None:
    asking = asyncio.create_task(anext(stage.relay([LONG, finish()], answer())))
    await asyncio.sleep(1.0)
    assert stage.workers["w0"].running == 1
    asking.cancel()
    await asyncio.wait([asking])
    await asyncio.sleep(0)
    stage.check_nothing_is_left()
    assert (stage.failures("w0"), stage.asked) == (0, ["w0"])


# Moving on.


@pytest.mark.parametrize(
    "reason",
    [
        Reason.UNREACHABLE,
        Reason.DRAINING,
        Reason.NOT_READY,
        Reason.DEVICE_MEMORY,
        Reason.QUARANTINED,
        Reason.QUEUE_FULL,
        Reason.NO_BASE,
        Reason.BASE_MISMATCH,
    ],
)
@in_virtual_time
async def test_what_another_worker_may_not_say_is_followed_by_the_next(stage: Stage, reason: Reason) -> None:
    assert await stage.who([0.5, reason], [reason], answer("w2")) == "w2"


@pytest.mark.parametrize(
    "reason",
    [
        Reason.BAD_REQUEST,
        Reason.BAD_ADAPTER,
        Reason.TOO_LARGE,
        Reason.UNKNOWN_PACKAGE,
        Reason.KEY_REVOKED,
        Reason.EXPERTS_INCOMPATIBLE,
        Reason.EXPERT_LOADING,
        Reason.BLOB_CORRUPT,
        Reason.INTERNAL,
    ],
)
@in_virtual_time
async def test_any_other_refusal_is_the_outcome_at_once(stage: Stage, reason: Reason) -> None:
    assert (await stage.refusal([reason], answer())).reason is reason
    assert stage.asked == ["w0"]


@in_virtual_time
async def test_an_answer_that_ends_before_it_begins_is_followed_by_the_next_worker(stage: Stage) -> None:
    assert await stage.who([], answer("w1")) == "w1"
    assert stage.failures("w0") == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN])
@in_virtual_time
async def test_a_connection_that_breaks_is_followed_by_the_next_worker(stage: Stage, code: grpc.StatusCode) -> None:
    assert await stage.who([code], answer("w1")) == "w1"
    assert stage.failures("w0") == 1


@in_virtual_time
async def test_a_refusal_keeps_its_facts(stage: Stage) -> None:
    said = HocketError(Reason.BAD_ADAPTER, "no such module", field="job.plan", retry_after_seconds=2.5, tensor="a.b")
    refusal = await stage.refusal([said])
    assert (refusal.message, refusal.field, refusal.retry_after_seconds) == ("no such module", "job.plan", 2.5)
    assert refusal.metadata["tensor"] == "a.b"


@in_virtual_time
async def test_a_plan_without_replicas_has_nobody_to_ask(stage: Stage) -> None:
    refusal = await stage.refusal()
    assert (refusal.reason, refusal.metadata["expert_reason"]) == (Reason.NO_REPLICA, "NO_REPLICA")
    assert refusal.retry_after_seconds == 1.0


@in_virtual_time
async def test_when_all_are_away_the_refusal_says_how_the_last_one_was(stage: Stage) -> None:
    refusal = await stage.refusal([Reason.UNREACHABLE], [HocketError(Reason.DRAINING, "no", retry_after_seconds=3.0)])
    assert (refusal.reason, refusal.metadata["expert_reason"]) == (Reason.NO_REPLICA, "DRAINING")
    assert refusal.retry_after_seconds == 3.0


@pytest.mark.parametrize("others", [[Reason.UNREACHABLE], [Reason.QUARANTINED, Reason.DRAINING], [Reason.QUEUE_FULL]])
@pytest.mark.parametrize("busy_first", [True, False])
@in_virtual_time
async def test_when_nobody_answers_being_busy_says_most(
    stage: Stage,
    others: list[Reason],
    busy_first: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    busy: list[Step] = [HocketError(Reason.QUEUE_FULL, "full", retry_after_seconds=0.7)]
    scripts: list[list[Step]] = [[reason] for reason in others]
    refusal = await stage.refusal(
        *([busy, *scripts] if busy_first or others == [Reason.QUEUE_FULL] else [*scripts, busy])
    )
    assert (refusal.reason, refusal.retry_after_seconds) == (Reason.QUEUE_FULL, 0.7)
    assert len(stage.asked) == 1 + len(others)


@pytest.mark.parametrize("reason", [Reason.QUARANTINED, Reason.NO_BASE, Reason.BASE_MISMATCH, Reason.DEVICE_MEMORY])
@in_virtual_time
async def test_what_one_that_is_there_has_said_says_more_than_absence(stage: Stage, reason: Reason) -> None:
    assert (await stage.refusal([Reason.UNREACHABLE], [reason], [Reason.DRAINING])).reason is reason


# What breaks an answer.


@pytest.mark.parametrize(
    "ending",
    [[Reason.UNREACHABLE], [0.5, Reason.DRAINING], [], [grpc.StatusCode.UNAVAILABLE], [grpc.StatusCode.UNKNOWN]],
    ids=["gone", "draining", "ends", "connection breaks", "stream breaks"],
)
@pytest.mark.parametrize("begun", [[start()], [start(), delta("a"), delta("b", tokens=2)]])
@in_virtual_time
async def test_a_worker_that_goes_away_in_mid_answer_breaks_it(
    stage: Stage, begun: list[text_pb2.TextEvent], ending: list[Step]
) -> None:
    answering = stage.relay([*begun, *ending], answer())
    assert [await anext(answering) for _ in begun] == begun
    with pytest.raises(HocketError) as caught:
        await anext(answering)
    assert (caught.value.reason, caught.value.metadata) == (Reason.UNREACHABLE, {"worker": "w0"})
    assert (stage.asked, stage.failures("w0")) == (["w0"], 1)
    stage.check_nothing_is_left()


@pytest.mark.parametrize(
    "reason", [Reason.BAD_ANSWER, Reason.INTERNAL, Reason.EXPERT_LOADING, Reason.QUEUE_FULL, Reason.YANKED]
)
@in_virtual_time
async def test_a_refusal_in_mid_answer_is_the_outcome_in_the_workers_own_words(stage: Stage, reason: Reason) -> None:
    assert (await stage.refusal([start(), delta("one"), reason], answer())).reason is reason
    assert stage.asked == ["w0"]


@pytest.mark.parametrize("ending", [[Reason.UNREACHABLE], [Reason.INTERNAL], [delta("more")], [finish()], [LONG]])
@in_virtual_time
async def test_after_the_finish_nothing_can_break_an_answer(stage: Stage, ending: list[Step]) -> None:
    assert await stage.ask([*answer(), *ending], answer("w1"), seconds=LONG / 2) == answer()
    assert (stage.asked, stage.failures("w0")) == (["w0"], 0)


@pytest.mark.parametrize(
    "script",
    [
        [delta("one"), finish()],
        [finish()],
        [start(), start(), finish()],
        [start(), delta("one"), start(), finish()],
        [text_pb2.TextEvent()],
        [start(), text_pb2.TextEvent(), finish()],
    ],
)
@in_virtual_time
async def test_events_out_of_order_are_no_answer(stage: Stage, script: list[Step]) -> None:
    refusal = await stage.refusal(script, answer())
    assert (refusal.reason, refusal.metadata["worker"]) == (Reason.BAD_ANSWER, "w0")


@in_virtual_time
async def test_an_answer_may_have_no_tokens(stage: Stage) -> None:
    assert await stage.ask([start(), finish()]) == [start(), finish()]


# Who is asked first.


@in_virtual_time
async def test_replicas_are_asked_in_the_order_of_the_plan(stage: Stage) -> None:
    assert await stage.who(answer("w0"), answer("w1")) == "w0"


@in_virtual_time
async def test_a_replica_out_of_reach_is_asked_after_the_others(stage: Stage) -> None:
    stage.known.away = frozenset({"w0"})
    assert await stage.who(answer("w0"), answer("w1")) == "w1"
    assert await stage.who(answer("w0"), [Reason.QUEUE_FULL]) == "w0"


@in_virtual_time
async def test_a_replica_whose_breaker_is_open_is_asked_after_the_others(stage: Stage) -> None:
    stage.fail("w0")
    assert await stage.who(answer("w0"), answer("w1")) == "w1"
    assert await stage.who(answer("w0"), [Reason.UNREACHABLE]) == "w0"


@in_virtual_time
async def test_the_last_replica_is_always_tried(stage: Stage) -> None:
    stage.known.away = frozenset({"w0"})
    stage.fail("w0")
    assert await stage.who(answer("w0")) == "w0"


@in_virtual_time
async def test_an_address_inside_another_process_is_followed_by_the_next(stage: Stage) -> None:
    stage.workers = {"w1": TextWorker(answer("w1"))}
    workers = Workers(Channels({"w1": stage.workers["w1"].handlers()}))
    plan = job({"w0": "local:elsewhere", "w1": "local:w1"})
    assert len([event async for event in relay(stage.safeguards, workers, plan, 60.0, {})]) == 4


# Breakers.


@pytest.mark.parametrize("script", [[Reason.UNREACHABLE], [Reason.INTERNAL], [start(), Reason.UNREACHABLE]])
@in_virtual_time
async def test_five_faults_in_a_row_send_the_sixth_text_elsewhere(stage: Stage, script: list[Step]) -> None:
    for _ in range(FAILURES_MAX):
        await stage.refusal(script)
    assert await stage.who(answer("w0"), answer("w1")) == "w1"
    assert await stage.who(answer("w0"), answer("w1"), base=OTHER_BASE) == "w0"


@pytest.mark.parametrize(
    "reason", [Reason.QUARANTINED, Reason.QUEUE_FULL, Reason.BAD_ANSWER, Reason.BLOB_CORRUPT, Reason.BASE_MISMATCH]
)
@in_virtual_time
async def test_what_speaks_of_an_expert_or_of_being_busy_does_not_count_against_the_base(
    stage: Stage, reason: Reason
) -> None:
    for _ in range(FAILURES_MAX):
        await stage.refusal([reason])
    assert await stage.who(answer("w0"), answer("w1")) == "w0"


@pytest.mark.parametrize("leaves", [True, False])
@in_virtual_time
async def test_a_worker_that_answers_again_is_forgiven(stage: Stage, leaves: bool) -> None:  # noqa: FBT001 - a parameter of the test
    stage.fail("w0", FAILURES_MAX - 1)
    if leaves:
        async with aclosing(stage.relay(answer())) as answering:
            await anext(answering)
    else:
        await stage.ask(answer())
    assert stage.failures("w0") == 0


@in_virtual_time
async def test_one_text_at_a_time_finds_out_whether_a_worker_works_again(stage: Stage) -> None:
    stage.fail("w0")
    stage.now += 10.0
    slow: list[Step] = [start("w0"), 5.0, finish()]
    first = stage.relay(slow, answer("w1"))
    assert (await anext(first)).start.worker == "w0"
    assert await anext(stage.relay(answer("w0"), answer("w1"))) == start("w1")
    assert [event async for event in first] == [finish()]
    assert await stage.who(answer("w0"), answer("w1")) == "w0"


@in_virtual_time
async def test_a_probe_that_nobody_waits_for_is_freed(stage: Stage) -> None:
    stage.fail("w0")
    stage.now += 10.0
    asking = asyncio.create_task(anext(stage.relay([LONG, *answer()])))
    await asyncio.sleep(1.0)
    asking.cancel()
    await asyncio.wait([asking])
    await asyncio.sleep(0)
    stage.check_nothing_is_left()


# What that costs.


def retries() -> float:
    return REGISTRY.get_sample_value("hocket_retries_total", {"service": "aggregator"}) or 0.0


@in_virtual_time
async def test_every_repeat_is_paid_for_and_counted(stage: Stage) -> None:
    stage.exhaust()
    for _ in range(9):
        await stage.ask(answer())
    before = retries()
    assert await stage.who([Reason.UNREACHABLE], answer("w1")) == "w1"
    assert (await stage.refusal([Reason.QUEUE_FULL], answer("w1"))).reason is Reason.QUEUE_FULL
    assert retries() - before == 1.0


@in_virtual_time
async def test_a_spent_budget_leaves_the_first_refusal(stage: Stage) -> None:
    stage.exhaust()
    refusal = await stage.refusal([Reason.UNREACHABLE], answer("w1"))
    assert (refusal.reason, refusal.metadata["expert_reason"]) == (Reason.NO_REPLICA, "UNREACHABLE")
    assert stage.asked == ["w0"]


@in_virtual_time
async def test_choosing_another_replica_first_costs_nothing(stage: Stage) -> None:
    stage.exhaust()
    stage.known.away = frozenset({"w0"})
    assert await stage.who(answer("w0"), answer("w1")) == "w1"


# Compartments.


@in_virtual_time
async def test_a_base_that_hangs_fills_its_own_compartment_only() -> None:
    stage = Stage(per_base_max=2)
    hanging = [stage.relay([start(), LONG], base=OTHER_BASE) for _ in range(2)]
    for answering in hanging:
        await anext(answering)
    with pytest.raises(HocketError) as caught:
        await anext(stage.relay(answer(), base=OTHER_BASE))
    assert caught.value.reason is Reason.QUEUE_FULL
    assert [event async for event in stage.relay(answer())] == answer()
    await hanging[0].aclose()
    assert [event async for event in stage.relay(answer(), base=OTHER_BASE)] == answer()
    await hanging[1].aclose()
    assert stage.bulkhead._in_flight == {}


# What a plan must be.


def plan(*, change: Callable[[text_pb2.TextPlan], object] | None = None, experts: int = 2) -> text_pb2.TextPlan:
    made = job({f"w{place}": "local:w" for place in range(REPLICAS_MAX)}, experts=experts).plan
    if change is not None:
        change(made)
    return made


def set_weight(weight: float) -> Callable[[text_pb2.TextPlan], object]:
    return lambda plan: setattr(plan.experts[1], "weight", weight)


@pytest.mark.parametrize("experts", [0, 1, 2])
def test_a_plan_of_any_number_of_experts_passes(experts: int) -> None:
    check_plan(plan(experts=experts))


@pytest.mark.parametrize("weight", [0.0, -WEIGHT_MAX, WEIGHT_MAX])
def test_every_weight_within_the_limits_passes(weight: float) -> None:
    check_plan(plan(change=set_weight(weight)))


def test_a_plan_without_replicas_passes() -> None:
    check_plan(plan(change=lambda plan: plan.ClearField("replicas")))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda plan: plan.ClearField("mode"), "mode"),
        (lambda plan: setattr(plan, "mode", plan_pb2.MODE_PASS), "mode"),
        (lambda plan: setattr(plan, "mode", plan_pb2.MODE_VECTOR), "mode"),
        (lambda plan: setattr(plan, "base", BASE[:-1]), "base"),
        (lambda plan: setattr(plan, "base", ""), "base"),
        (lambda plan: setattr(plan.experts[1], "digest", f"{BASE}#0"), "experts[1].digest"),
        (lambda plan: setattr(plan.experts[0], "digest", "acme/sql@1.0.0"), "experts[0].digest"),
        (set_weight(math.nan), "experts[1].weight"),
        (set_weight(-math.inf), "experts[1].weight"),
        (set_weight(math.nextafter(WEIGHT_MAX, math.inf)), "experts[1].weight"),
        (lambda plan: plan.replicas.add(worker="w", address="local:w"), "replicas"),
        (lambda plan: setattr(plan.replicas[1], "address", ""), "replicas[1].address"),
    ],
)
def test_a_plan_that_no_worker_can_be_asked_with_is_refused(
    change: Callable[[text_pb2.TextPlan], object], field: str
) -> None:
    with pytest.raises(HocketError) as caught:
        check_plan(plan(change=change))
    assert (caught.value.reason, caught.value.field) == (Reason.BAD_REQUEST, f"text.plan.{field}")


def test_several_experts_are_mixed_and_one_is_not() -> None:
    with pytest.raises(HocketError):
        check_plan(plan(experts=1, change=lambda plan: setattr(plan, "mode", plan_pb2.MODE_ADAPTER_MIX)))
