"""Lining answers up: what is missing, what that means for the call, and what the value becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from services.aggregator.combine import Share
from services.aggregator.lineup import Lineup
from services.aggregator.question import ExpertError, Reply

if TYPE_CHECKING:
    from numpy.typing import NDArray


def value(number: float) -> NDArray[np.float32]:
    return np.array([[number]], dtype=np.float32)


def lineup(weights: list[float], **options: object) -> Lineup:
    shares = [Share(np.array([0]), np.array([weight]), np.array([0])) for weight in weights]
    settings = {"insist": False, "min_coverage": 0.0, "pass_through": False, **options}
    return Lineup([f"e{place}" for place in range(len(weights))], shares, (1, 1), None, **settings)  # type: ignore[arg-type]  # keyword options of any type


def reply(number: float) -> Reply:
    return Reply(value(number), "w", 1, 0.0)


def failure(reason: Reason, **options: float) -> ExpertError:
    return ExpertError(HocketError(reason, "no", **options), 1, 0.0)  # type: ignore[arg-type]  # only the pause is used


def test_a_failed_expert_is_left_out_and_the_rest_renormalised() -> None:
    line = lineup([0.25, 0.75])
    line.take({0: reply(8.0), 1: failure(Reason.KEY_REVOKED)})
    combined = line.conclude()
    assert (combined.value.item(), combined.coverage.item()) == (8.0, 0.25)


def test_a_failed_expert_fails_a_call_that_insists() -> None:
    line = lineup([0.5, 0.5], insist=True)
    with pytest.raises(HocketError) as caught:
        line.take({1: failure(Reason.KEY_REVOKED)})
    assert caught.value.reason is Reason.COVERAGE
    assert caught.value.metadata == {"expert": "e1", "expert_reason": "KEY_REVOKED"}


@pytest.mark.parametrize("reason", [Reason.KEY_REVOKED, Reason.BAD_ANSWER, Reason.QUARANTINED, Reason.QUEUE_FULL])
def test_a_lone_expert_fails_with_its_own_refusal(reason: Reason) -> None:
    line = lineup([1.0], insist=True, pass_through=True)
    with pytest.raises(HocketError) as caught:
        line.take({0: failure(reason)})
    assert caught.value.reason is reason


@pytest.mark.parametrize("reason", [Reason.UNREACHABLE, Reason.DRAINING, Reason.NOT_READY, Reason.NO_REPLICA])
def test_a_lone_expert_whose_workers_are_away_says_so_and_not_that_the_aggregator_is(reason: Reason) -> None:
    line = lineup([1.0], insist=True, pass_through=True)
    with pytest.raises(HocketError) as caught:
        line.take({0: failure(reason, retry_after_seconds=1.5)})
    refused = caught.value
    assert (refused.reason, refused.metadata) == (Reason.NO_REPLICA, {"expert_reason": reason})
    assert refused.retry_after_seconds == 1.5


def test_whoever_is_told_to_try_again_is_told_when() -> None:
    line = lineup([1.0], insist=True, pass_through=True)
    with pytest.raises(HocketError) as caught:
        line.take({0: failure(Reason.UNREACHABLE)})
    assert caught.value.retry_after_seconds == 1.0


def test_less_than_the_least_coverage_is_no_answer() -> None:
    for asked, fits in ((0.25, True), (0.26, False)):
        line = lineup([0.25, 0.75], min_coverage=asked)
        line.take({0: reply(1.0), 1: failure(Reason.UNREACHABLE)})
        if fits:
            assert line.conclude().value.item() == 1.0
        else:
            with pytest.raises(HocketError) as caught:
                line.conclude()
            assert caught.value.reason is Reason.COVERAGE


def test_no_expert_at_all_is_no_answer() -> None:
    line = lineup([1.0])
    line.take({0: failure(Reason.UNREACHABLE)})
    with pytest.raises(HocketError, match="COVERAGE"):
        line.conclude()


def test_it_is_complete_when_every_outcome_is_known() -> None:
    line = lineup([0.5, 0.5])
    assert not line.is_complete
    line.take({1: failure(Reason.UNREACHABLE)})
    assert not line.is_complete
    line.take({0: reply(1.0)})
    assert line.is_complete


def test_final_bits_do_not_depend_on_arrival_order() -> None:
    numbers = [0.1, 1e8, -1e8, 0.3]
    finals = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        line = lineup([0.25] * 4)
        for place in order:
            line.take({place: reply(numbers[place])})
        finals.add(line.conclude().value.tobytes())
    assert len(finals) == 1
