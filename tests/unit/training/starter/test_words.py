from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING

import pytest

from training.starter import words

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("listed", [words.NAMES, words.CITIES, words.COLOURS, words.ANIMALS, words.FOODS, words.THINGS])
def test_a_list_holds_no_word_twice(listed: tuple[str, ...]) -> None:
    assert len(set(listed)) == len(listed)


def test_every_fifth_word_is_held_out() -> None:
    assert words.held_out(words.listed("a b c d e f g h i j k")) == (tuple("abcdfghik"), tuple("ej"))


@pytest.mark.parametrize("make", [words.invented, words.spliced])
def test_a_made_up_word_is_short_lower_case_and_depends_on_chance_alone(make: Callable[[Random], str]) -> None:
    made_up = [make(Random(seed)) for seed in range(300)]
    assert all(re.fullmatch("[a-z]{4,10}", word) for word in made_up)
    assert made_up == [make(Random(seed)) for seed in range(300)]
    assert len(set(made_up)) > 280
    assert not {*made_up} & {*words.ANIMALS, *words.FOODS, *words.THINGS}
