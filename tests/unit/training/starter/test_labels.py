from __future__ import annotations

import pytest

from training.starter.labels import is_label


@pytest.mark.parametrize("answer", ["sport", "Sport", " sport.\n", "Topic: sport", "topic:SPORT."])
def test_a_label_is_right_in_any_case_with_a_stop_or_a_heading(answer: str) -> None:
    assert is_label(answer, "sport", ("topic:",))


@pytest.mark.parametrize(
    "answer", ["", "food", "sport food", "not sport", "sports", "kind: sport", "sport!" * 9, "\0", "sport" + " " * 1000]
)
def test_anything_else_is_not(answer: str) -> None:
    assert not is_label(answer, "sport", ("topic:",))
