from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.routing_metrics import (
    Decision,
    calibration_error,
    coverage,
    figures,
    flips,
    log_loss,
    macro_f1,
)
from benchmarks.routing_set import BASE, Prompt


def asked(*accept: str) -> Prompt:
    return Prompt("A001", "?", accept, "A", "nobody")


def sure(chosen: str, probability: float) -> Decision:
    return Decision(chosen, (), probability, {chosen: probability, "other": 1 - probability})


def test_right_is_whoever_may_answer_and_activated_an_expert_that_may_not() -> None:
    prompts = [asked("sql"), asked("sql", "json"), asked("json"), asked(BASE), asked(BASE)]
    decided = [Decision("sql"), Decision("json"), Decision(BASE), Decision("sql"), Decision(BASE)]
    found = figures(prompts, decided)
    assert (found.count, found.right, found.activated) == (5, 3, 1)


def test_the_first_two_are_asked_only_where_an_expert_may_answer() -> None:
    prompts = [asked("sql"), asked("json"), asked(BASE)]
    ranked = ("json", "regex", "sql")
    found = figures(prompts, [Decision(BASE, ranked)] * 3)
    assert (found.ranked_count, found.top_2) == (2, 1)


def test_macro_f1_weighs_every_label_alike() -> None:
    prompts = [asked("sql")] * 3 + [asked("json")]
    decided = [Decision("sql")] * 3 + [Decision("sql")]
    assert macro_f1(prompts, decided) == pytest.approx((2 * 3 / (3 + 4) + 0) / 2)
    assert macro_f1(prompts, [Decision("sql")] * 3 + [Decision("json")]) == 1.0


def test_macro_f1_takes_any_of_several_labels_as_the_true_one() -> None:
    assert macro_f1([asked("json", "sql")], [Decision("sql")]) == 1.0
    assert macro_f1([asked("json", "sql")], [Decision("regex")]) == 0.0


def test_coverage_ends_before_precision_falls_below_its_bound() -> None:
    prompts = [asked("sql")] * 40
    decided = [sure("sql", 0.9 - place / 100) for place in range(30)] + [sure("json", 0.1)] * 10
    assert coverage(prompts, decided) == 31 / 40 - 1 / 40  # the ten equally certain come together, or not at all


def test_coverage_goes_on_over_an_error_that_enough_right_ones_follow() -> None:
    prompts = [asked("sql")] * 40
    decided = [sure("json", 0.99), *(sure("sql", 0.9) for _ in range(39))]
    assert coverage(prompts, decided) == 1.0


def test_without_confidence_there_is_no_coverage_and_without_probabilities_no_loss() -> None:
    prompts = [asked("sql")]
    assert coverage(prompts, [Decision("sql")]) is None
    assert calibration_error(prompts, [Decision("sql", (), 0.4)]) is None
    assert log_loss(prompts, [Decision("sql", (), 0.4)]) is None


def test_what_says_truthfully_how_sure_it_is_has_no_calibration_error() -> None:
    prompts = [asked("sql")] * 3 + [asked("json")]
    assert calibration_error(prompts, [sure("sql", 0.75)] * 4) == pytest.approx(0.0)
    assert calibration_error(prompts, [sure("sql", 1.0)] * 4) == pytest.approx(0.25)


def test_log_loss_counts_all_who_may_answer_and_stays_finite() -> None:
    decided = [Decision("sql", (), 0.5, {"sql": 0.5, "json": 0.25, BASE: 0.25})]
    assert log_loss([asked("sql", "json")], decided) == pytest.approx(-math.log(0.75))
    assert log_loss([asked("regex")], decided) == pytest.approx(-math.log(1e-6))


def test_flips_are_prompts_decided_otherwise() -> None:
    assert flips([Decision("sql"), Decision(BASE)], [Decision("sql"), Decision("json")]) == 1


labels = st.sampled_from(["sql", "json", BASE])


@settings(max_examples=50)
@given(st.lists(st.tuples(labels, labels, st.floats(0.01, 1.0)), min_size=1, max_size=30))
def test_every_figure_is_within_its_bounds_and_order_does_not_matter(rows: list[tuple[str, str, float]]) -> None:
    pairs = [(asked(true), sure(chosen, probability)) for true, chosen, probability in rows]
    found = figures([prompt for prompt, _ in pairs], [decision for _, decision in pairs])
    assert 0 <= found.right + found.activated <= found.count
    assert 0 <= found.macro_f1 <= 1
    assert found.coverage is not None
    assert 0 <= found.coverage <= 1
    assert found.calibration_error is not None
    assert 0 <= found.calibration_error <= 1
    assert found.log_loss is not None
    assert 0 <= found.log_loss <= 14
    turned = figures([prompt for prompt, _ in pairs[::-1]], [decision for _, decision in pairs[::-1]])
    assert turned.right == found.right
    assert turned.coverage == found.coverage
    assert turned.log_loss == pytest.approx(found.log_loss)
