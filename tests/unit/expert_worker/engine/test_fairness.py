from __future__ import annotations

from services.expert_worker.engine.fairness import TokenCounters


def test_who_comes_begins_with_the_fewest_of_those_who_are_here() -> None:
    counters = TokenCounters()
    counters.enter("a")
    counters.charge("a", 100)
    counters.enter("b")
    assert counters["b"] == 100
    counters.charge("b", 5)
    counters.enter("c")
    assert counters["c"] == 100


def test_what_one_has_above_that_is_not_forgotten_when_it_comes_back() -> None:
    counters = TokenCounters()
    counters.enter("a")
    counters.enter("b")
    counters.charge("a", 100)
    counters.leave("a")
    counters.enter("a")
    assert (counters["a"], counters["b"]) == (100, 0)
    counters.leave("a")
    counters.charge("b", 300)
    counters.enter("a")
    assert (counters["a"], counters["b"]) == (300, 300)


def test_nothing_is_kept_of_those_who_would_begin_anew_anyway() -> None:
    counters = TokenCounters()
    counters.enter("here")
    for number in range(100):
        counters.enter(str(number))
        counters.leave(str(number))
    assert len(counters._counts) == 1
    counters.leave("here")
    assert counters._counts == {}


def test_a_tenant_is_here_as_long_as_one_of_its_sequences_is() -> None:
    counters = TokenCounters()
    counters.enter("a")
    counters.enter("a")
    counters.charge("a", 7)
    counters.leave("a")
    assert counters["a"] == 7
