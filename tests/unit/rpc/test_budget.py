"""Retries are a tenth of calls, with a reserve; compartments hold what they hold."""

from __future__ import annotations

import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.budget import REPEATS_MAX, RetryBudget
from hocket.rpc.bulkhead import Bulkhead


def spent(budget: RetryBudget) -> int:
    count = 0
    while budget.spend():
        count += 1
    return count


def test_a_budget_starts_full_and_runs_out() -> None:
    budget = RetryBudget("test")
    assert spent(budget) == REPEATS_MAX
    assert not budget.spend()


def test_ten_calls_earn_one_retry() -> None:
    budget = RetryBudget("test")
    spent(budget)
    for _ in range(9):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    assert not budget.spend()


def test_a_budget_holds_so_much_and_no_more() -> None:
    budget = RetryBudget("test")
    for _ in range(100):
        budget.earn()
    assert spent(budget) == REPEATS_MAX


def test_a_full_compartment_refuses_and_the_others_do_not() -> None:
    bulkhead = Bulkhead(2, "this model")
    bulkhead.enter("hanging")
    bulkhead.enter("hanging")
    with pytest.raises(HocketError) as caught:
        bulkhead.enter("hanging")
    assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.QUEUE_FULL, 0.1)
    assert "2 calls already wait for this model" in caught.value.message
    bulkhead.enter("well")
    bulkhead.leave("hanging")
    bulkhead.enter("hanging")


def test_an_empty_compartment_leaves_nothing_behind() -> None:
    bulkhead = Bulkhead(1, "this model")
    for name in ("a", "b"):
        bulkhead.enter(name)
        bulkhead.leave(name)
    assert bulkhead._in_flight == {}


def test_a_call_that_holds_a_place_leaves_it_however_it_ends() -> None:
    bulkhead = Bulkhead(1, "texts")

    def fail() -> None:
        with bulkhead.holding("a"):
            assert bulkhead._in_flight == {"a": 1}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert bulkhead._in_flight == {}
