"""The rules gate over any experts and any text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.choosing import Bounds, by_rules
from tests.routing import asking_for, gate_of

if TYPE_CHECKING:
    from hocket.v1.package_pb2 import Package

WORDS = st.sampled_from(["sql", "graph", "json", "find", "node", "city", "what is", "SELECT a FROM t", "list", "tree"])
TEXTS = st.lists(WORDS, max_size=8).map(" ".join) | st.text(max_size=60)


@st.composite
def packages(draw: Any) -> list[Package]:
    return [
        asking_for(
            number,
            f"e{number}",
            *draw(st.lists(WORDS, max_size=4)),
            exclude=draw(st.lists(WORDS, max_size=2)),
            hint=draw(st.sampled_from(["", "query=sql", "NOT query=graph", "broken"])),
            priority=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
            capabilities=draw(st.lists(st.sampled_from(["query:sql", "format:json", "tech:neo4j"]), max_size=2)),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


def told(text: str, held: list[Package], count_max: int = 3) -> Any:
    choice = by_rules(gate_of(*held), text, Bounds(count_max=count_max))
    return (
        [(expert.name, weight) for expert, weight in choice.chosen],
        {each.expert.name: (each.score, each.probability) for each in choice.candidates},
        choice.reason,
    )


@settings(max_examples=60, deadline=None)
@given(packages(), TEXTS, st.randoms())
def test_the_order_in_which_experts_are_known_changes_nothing(held: list[Package], text: str, random: Any) -> None:
    shuffled = [*held]
    random.shuffle(shuffled)
    assert told(text, held) == told(text, shuffled) == told(text, held)


@settings(max_examples=60, deadline=None)
@given(packages(), TEXTS)
def test_an_expert_that_nothing_speaks_for_changes_nothing(held: list[Package], text: str) -> None:
    stranger = asking_for(77, "stranger", "zzyzx", capabilities=["domain:zzyzx"], hint="domain=zzyzx")
    assert told(text, held) == told(text, [*held, stranger])


@settings(max_examples=60, deadline=None)
@given(packages(), TEXTS)
def test_a_lower_priority_never_raises_a_score(held: list[Package], text: str) -> None:
    scores = gate_of(*held).read(text).scores
    for package in held:
        package.adapter.routing.priority /= 2
    assert (gate_of(*held).read(text).scores <= scores).all()


@settings(max_examples=100, deadline=None)
@given(packages(), TEXTS, st.integers(1, 10), st.sets(st.integers(0, 5)))
def test_weights_sum_to_one_are_sorted_and_belong_to_the_admitted(
    held: list[Package], text: str, count_max: int, denied: set[int]
) -> None:
    bounds = Bounds(
        denied=frozenset(held[number].digest for number in denied if number < len(held)), count_max=count_max
    )
    choice = by_rules(gate_of(*held), text, bounds)
    weights = [weight for _, weight in choice.chosen]
    assert len(weights) <= count_max
    assert weights == sorted(weights, reverse=True)
    assert all(weight > 0 for weight in weights)
    assert not weights or math.fsum(weights) == pytest.approx(1.0, abs=1e-9)
    assert not {candidate.expert.package.digest for candidate in choice.candidates} & bounds.denied
    shares = [choice.base_probability, *(candidate.probability for candidate in choice.candidates)]
    assert math.fsum(shares) == pytest.approx(1.0, abs=1e-9)
    for candidate in choice.candidates:
        assert math.fsum(each.contribution for each in candidate.evidence()) == pytest.approx(candidate.score, abs=1e-9)
