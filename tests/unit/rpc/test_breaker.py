"""Circuit breakers: when one opens, how long for, and what a probe decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import FAILURES_MAX, JITTER, OPEN_SECONDS, OPEN_SECONDS_MAX, Breakers, is_fault

if TYPE_CHECKING:
    from hocket.rpc.breaker import Circuit

KEY = "worker"
LONGEST = (1 + JITTER) * OPEN_SECONDS


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breakers(clock: Clock) -> Breakers[str]:
    return Breakers("test", clock)


def call(breakers: Breakers[str], *, healthy: bool | None) -> Circuit | None:
    probe = breakers.enter(KEY)
    breakers.leave(KEY, probe, healthy=healthy)
    return probe


def opened(breakers: Breakers[str]) -> None:
    for _ in range(FAILURES_MAX):
        call(breakers, healthy=False)
    assert not breakers.admits(KEY)


def test_five_failures_in_a_row_open_a_circuit(breakers: Breakers[str]) -> None:
    for _ in range(FAILURES_MAX - 1):
        call(breakers, healthy=False)
        assert breakers.admits(KEY)
    call(breakers, healthy=False)
    assert not breakers.admits(KEY)
    assert breakers.admits("another")


def test_a_success_between_failures_starts_the_count_again(breakers: Breakers[str]) -> None:
    for healthy in [False] * (FAILURES_MAX - 1) + [True] + [False] * (FAILURES_MAX - 1):
        call(breakers, healthy=healthy)
    assert breakers.admits(KEY)


def test_an_end_that_says_nothing_is_not_counted(breakers: Breakers[str]) -> None:
    for _ in range(3):
        for healthy in [False] * ((FAILURES_MAX - 1) // 3) + [None] * 9:
            call(breakers, healthy=healthy)
    assert breakers.admits(KEY)


def test_a_circuit_is_open_for_five_seconds_give_or_take_a_fifth(clock: Clock) -> None:
    half_open_after = set()
    for _ in range(50):
        breakers: Breakers[str] = Breakers("test", clock)
        opened(breakers)
        clock.now += (1 - JITTER) * OPEN_SECONDS - 0.01
        assert not breakers.admits(KEY)
        begin = clock.now
        while not breakers.admits(KEY):
            clock.now += 0.02
        half_open_after.add(round(clock.now - begin, 2))
        assert clock.now - begin <= 2 * JITTER * OPEN_SECONDS + 0.05
    assert len(half_open_after) > 10  # probes of many processes do not come together


def test_a_half_open_circuit_admits_exactly_one_probe(breakers: Breakers[str], clock: Clock) -> None:
    opened(breakers)
    clock.now += LONGEST
    assert breakers.admits(KEY)
    probe = breakers.enter(KEY)
    assert probe is not None
    assert not breakers.admits(KEY)
    assert breakers.enter(KEY) is None


def test_a_probe_that_succeeds_closes_the_circuit(breakers: Breakers[str], clock: Clock) -> None:
    opened(breakers)
    clock.now += LONGEST
    call(breakers, healthy=True)
    for _ in range(FAILURES_MAX - 1):
        call(breakers, healthy=False)
    assert breakers.admits(KEY)


def test_each_probe_that_fails_doubles_the_time_up_to_a_minute(breakers: Breakers[str], clock: Clock) -> None:
    opened(breakers)
    seconds = OPEN_SECONDS
    for _ in range(6):
        clock.now += (1 + JITTER) * seconds
        assert call(breakers, healthy=False) is not None
        seconds = min(2 * seconds, OPEN_SECONDS_MAX)
        clock.now += (1 - JITTER) * seconds - 0.01
        assert not breakers.admits(KEY)
        clock.now -= (1 - JITTER) * seconds - 0.01
    clock.now += (1 + JITTER) * OPEN_SECONDS_MAX
    assert breakers.admits(KEY)


def test_a_probe_that_is_cancelled_leaves_its_place_to_the_next(breakers: Breakers[str], clock: Clock) -> None:
    opened(breakers)
    clock.now += LONGEST
    assert call(breakers, healthy=None) is not None
    assert breakers.admits(KEY)
    assert call(breakers, healthy=True) is not None
    assert breakers.admits(KEY)


def test_calls_that_go_there_all_the_same_neither_prolong_nor_end_the_probing(
    breakers: Breakers[str], clock: Clock
) -> None:
    before = breakers.enter(KEY)
    opened(breakers)
    breakers.leave(KEY, before, healthy=False)  # one that began while the circuit was closed
    clock.now += LONGEST
    probe = breakers.enter(KEY)
    for healthy in (False, None):
        assert call(breakers, healthy=healthy) is None
    assert not breakers.admits(KEY)
    breakers.leave(KEY, probe, healthy=None)
    assert breakers.admits(KEY)


def test_any_success_closes_an_open_circuit(breakers: Breakers[str], clock: Clock) -> None:
    opened(breakers)
    assert call(breakers, healthy=True) is None
    assert breakers.admits(KEY)
    opened(breakers)
    clock.now += LONGEST
    probe = breakers.enter(KEY)
    call(breakers, healthy=True)
    breakers.leave(KEY, probe, healthy=False)  # the news is older than the success: one failure of five
    assert breakers.admits(KEY)


def test_what_never_comes_back_is_forgotten(breakers: Breakers[str]) -> None:
    opened(breakers)
    for number in range(4096):
        breakers.leave(f"gone-{number}", None, healthy=False)
    assert breakers.admits(KEY)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.INTERNAL,
        Reason.UNREACHABLE,
        Reason.DRAINING,
        Reason.NOT_READY,
        Reason.BLOB_CORRUPT,
        Reason.BAD_ANSWER,
        Reason.QUARANTINED,
    ],
)
def test_a_fault_speaks_against_who_answers(reason: Reason) -> None:
    assert is_fault(HocketError(reason, "no"))


@pytest.mark.parametrize(
    "reason",
    [
        Reason.BAD_TENSOR,
        Reason.UNKNOWN_EXPERT,
        Reason.KEY_REVOKED,
        Reason.TOKEN_REQUIRED,
        Reason.QUEUE_FULL,
        Reason.DEVICE_MEMORY,
        Reason.DEADLINE,
        Reason.EXPERT_LOADING,
        Reason.COVERAGE,
    ],
)
def test_what_a_caller_causes_or_the_hour_does_not(reason: Reason) -> None:
    assert not is_fault(HocketError(reason, "no"))
