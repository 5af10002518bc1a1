"""Asking experts and lining their answers up: failures, stragglers, coverage, cancellation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from services.aggregator.combine import Share
from services.aggregator.fanout import ExpertError, Reply, ask, hand_down
from services.aggregator.lineup import Lineup

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHAPE = (1, 1)


def value(number: float) -> NDArray[np.float32]:
    return np.array([[number]], dtype=np.float32)


def lineup(weights: list[float], **options: object) -> Lineup:
    shares = [Share(np.array([0]), np.array([weight]), np.array([0])) for weight in weights]
    settings = {"insist": False, "min_coverage": 0.0, "pass_through": False, **options}
    return Lineup([f"e{place}" for place in range(len(weights))], shares, SHAPE, None, **settings)  # type: ignore[arg-type]  # keyword options of any type


async def reply(number: float, delay_seconds: float = 0.0, stopped: list[float] | None = None) -> Reply:
    try:
        await asyncio.sleep(delay_seconds)
    except asyncio.CancelledError:
        if stopped is not None:
            stopped.append(number)
        raise
    return Reply(value(number), "w", 1, delay_seconds)


async def fail(reason: Reason) -> Reply:
    await asyncio.sleep(0)
    raise ExpertError(HocketError(reason, "no"), 1, 0.0)


async def replica(outcomes: list[NDArray[np.float32] | Reason]) -> Reply:
    async def call(attempt: int) -> NDArray[np.float32]:
        outcome = outcomes[attempt]
        if isinstance(outcome, Reason):
            raise HocketError(outcome, "no")
        return outcome

    return await ask([f"w{place}" for place in range(len(outcomes))], call, SHAPE)


async def test_an_unavailable_replica_is_followed_by_the_next() -> None:
    answered = await replica([Reason.UNREACHABLE, Reason.DRAINING, value(7)])
    assert (answered.worker, answered.attempts, answered.output.item()) == ("w2", 3, 7.0)


async def test_a_refusal_that_would_be_the_same_elsewhere_ends_the_asking() -> None:
    with pytest.raises(ExpertError) as caught:
        await replica([Reason.SIGNER_NOT_TRUSTED, value(7)])
    assert (caught.value.reason, caught.value.attempts) == (Reason.SIGNER_NOT_TRUSTED, 1)


async def test_without_replicas_there_is_nobody_to_ask() -> None:
    with pytest.raises(ExpertError) as caught:
        await replica([])
    assert caught.value.reason is Reason.NO_REPLICA


@pytest.mark.parametrize(
    "output",
    [value(np.nan), value(np.inf), np.zeros((2, 1), np.float32), np.zeros((1, 2), np.float32)],
    ids=["nan", "infinity", "rows", "columns"],
)
async def test_an_answer_that_is_not_finite_or_of_another_shape_is_bad(output: NDArray[np.float32]) -> None:
    with pytest.raises(ExpertError) as caught:
        await replica([output])
    assert caught.value.reason is Reason.BAD_ANSWER


async def test_a_failed_expert_is_left_out_and_the_rest_renormalised() -> None:
    line = lineup([0.25, 0.75])
    assert [
        None async for _ in line.run([reply(8.0), fail(Reason.KEY_REVOKED)], every=False, straggler_seconds=None)
    ] == []
    combined = line.conclude()
    assert (combined.value.item(), combined.coverage.item()) == (8.0, 0.25)


async def test_a_failed_expert_fails_a_call_that_insists_and_stops_the_others() -> None:
    stopped: list[float] = []
    line = lineup([0.5, 0.5], insist=True)
    with pytest.raises(HocketError) as caught:
        async for _ in line.run(
            [reply(1.0, 30.0, stopped), fail(Reason.KEY_REVOKED)], every=False, straggler_seconds=None
        ):
            pass
    assert caught.value.reason is Reason.COVERAGE
    assert caught.value.metadata == {"expert": "e1", "expert_reason": "KEY_REVOKED"}
    assert stopped == [1.0]


async def test_a_lone_expert_fails_with_its_own_refusal() -> None:
    line = lineup([1.0], insist=True, pass_through=True)
    with pytest.raises(HocketError) as caught:
        async for _ in line.run([fail(Reason.KEY_REVOKED)], every=False, straggler_seconds=None):
            pass
    assert caught.value.reason is Reason.KEY_REVOKED


async def test_a_straggler_counts_as_missing_and_is_cancelled() -> None:
    stopped: list[float] = []
    line = lineup([0.5, 0.5])
    async for _ in line.run([reply(3.0), reply(9.0, 30.0, stopped)], every=False, straggler_seconds=0.02):
        pass
    assert line.conclude().value.item() == 3.0
    assert stopped == [9.0]
    assert isinstance(line.replies[1], ExpertError)
    assert line.replies[1].reason is Reason.STRAGGLER


async def test_less_than_the_least_coverage_is_no_answer() -> None:
    for asked, fits in ((0.25, True), (0.26, False)):
        line = lineup([0.25, 0.75], min_coverage=asked)
        async for _ in line.run([reply(1.0), fail(Reason.UNREACHABLE)], every=False, straggler_seconds=None):
            pass
        if fits:
            assert line.conclude().value.item() == 1.0
        else:
            with pytest.raises(HocketError) as caught:
                line.conclude()
            assert caught.value.reason is Reason.COVERAGE


async def test_no_expert_at_all_is_no_answer() -> None:
    line = lineup([1.0])
    async for _ in line.run([fail(Reason.UNREACHABLE)], every=False, straggler_seconds=None):
        pass
    with pytest.raises(HocketError, match="COVERAGE"):
        line.conclude()


async def test_each_arrival_but_the_last_is_announced() -> None:
    line = lineup([0.25, 0.25, 0.5])
    seen = [
        line.combined().coverage.item()
        async for _ in line.run([reply(1, 0.06), reply(2, 0.0), reply(3, 0.03)], every=True, straggler_seconds=None)
    ]
    assert seen == [0.25, 0.75]
    assert line.conclude().coverage.item() == 1.0


async def test_arrivals_while_the_consumer_is_busy_are_seen_together() -> None:
    line = lineup([0.25, 0.25, 0.5])
    seen = []
    async for _ in line.run([reply(1, 0.0), reply(2, 0.01), reply(3, 0.02)], every=True, straggler_seconds=None):
        seen.append(line.combined().coverage.item())
        await asyncio.sleep(0.05)
    assert seen == [0.25]
    assert line.conclude().coverage.item() == 1.0


async def test_final_bits_do_not_depend_on_arrival_order() -> None:
    numbers = [0.1, 1e8, -1e8, 0.3]
    finals = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        line = lineup([0.25] * 4)
        delays = {place: rank * 0.002 for rank, place in enumerate(order)}
        asks = [reply(number, delays[place]) for place, number in enumerate(numbers)]
        async for _ in line.run(asks, every=True, straggler_seconds=None):
            pass
        finals.add(line.conclude().value.tobytes())
    assert len(finals) == 1


async def test_a_bug_in_asking_is_not_taken_for_a_missing_expert() -> None:
    async def broken() -> Reply:
        raise ZeroDivisionError

    line = lineup([1.0])
    with pytest.raises(ZeroDivisionError):
        async for _ in line.run([broken()], every=False, straggler_seconds=None):
            pass


def test_a_deadline_is_handed_down_with_a_margin() -> None:
    assert hand_down(10.0) == 9.95
    assert hand_down(0.1) == pytest.approx(0.095)
    assert hand_down(-1.0) == 0.0
