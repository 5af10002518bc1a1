from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.routing import (
    CHESS,
    FIGURES_BEGIN,
    FIGURES_END,
    PAGE,
    decisions,
    expert,
    kit,
    majority,
    measure,
    nearest,
    page_table,
    policies,
    write_page,
)
from benchmarks.routing_metrics import flips
from benchmarks.routing_set import BASE, read
from hocket.v1.package_pb2 import RoutingHints
from training.starter.corpus import TASKS

if TYPE_CHECKING:
    from pathlib import Path

SQL = expert("expert-sql", ["language:sql"], RoutingHints(keywords=["sql", "table"], priority=0.8))
REVIEWS = expert("expert-reviews", ["domain:reviews"], RoutingHints(keywords=["review"], priority=0.8))


def test_the_kit_has_one_expert_for_each_task() -> None:
    assert {each.package.adapter.name for each in kit()} == {f"expert-{name}" for name in TASKS}


@pytest.mark.parametrize("place", [0, 1])
def test_the_policies_of_the_router_decide_in_the_labels_of_the_set(place: int) -> None:
    policy = policies([SQL, REVIEWS])[place]
    assert policy.decide("Write sql for a table of boats").chosen == "sql"
    assert policy.decide("Write sql for a table of boats").ranked[0] == "sql"
    assert policy.decide("Sing a song").chosen == BASE


def test_probabilities_of_the_rules_sum_to_one_and_the_other_policy_has_none() -> None:
    rules, hivellm = (policy.decide("a review of a sql table") for policy in policies([SQL, REVIEWS]))
    assert sum(rules.probabilities.values()) == pytest.approx(1.0)
    assert rules.confidence == rules.probabilities[rules.chosen]
    assert hivellm.probabilities == {}
    assert hivellm.confidence is None


def test_the_majority_answers_everything() -> None:
    prompts = read().prompts
    assert {each.chosen for each in decisions(majority(prompts), prompts)} == {BASE}


def test_the_nearest_example_of_training_knows_its_own_kind_of_question() -> None:
    decision = nearest(20).decide("Translate to Esperanto: the wolf sleeps.")
    assert decision.chosen in {"esperanto-nature", "esperanto-home"}
    assert BASE not in decision.ranked
    assert len(decision.ranked) == len(TASKS)


def test_an_expert_that_has_nothing_to_do_with_it_changes_no_decision() -> None:
    prompts, experts = read().prompts, kit()
    before = decisions(policies(experts)[0], prompts)
    after = decisions(policies([*experts, expert("expert-chess", ["domain:chess"], CHESS)])[0], prompts)
    assert flips(before, after) == 0


def test_figures_are_written_between_their_marks_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{FIGURES_BEGIN}old\n{FIGURES_END}after\n")
    for _ in range(2):
        write_page("new\n", page)
    assert page.read_text() == f"before\n{FIGURES_BEGIN}\nnew\n\n{FIGURES_END}after\n"


def test_the_page_says_what_the_gate_does_now() -> None:
    """`python -m benchmarks.routing --page` renews it."""
    routing_set = read()
    measured = measure(routing_set, [*policies(kit()), majority(routing_set.prompts)])
    lines = page_table(measured, routing_set.digest).splitlines()
    missing = [*filter(lambda line: line not in PAGE.read_text(), lines)]
    assert missing == []
