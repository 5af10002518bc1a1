"""What the expert of measures learns: held-out values stay held out, and an answer is judged by its meaning."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from training.starter import measures
from training.starter.measures import TASK, fact
from training.starter.task import Example, Split


def drawn(split: Split, count: int = 600) -> list[Example]:
    random = Random(7)
    return [TASK.example(random, split) for _ in range(count)]


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_a_changed_one_is_wrong(split: Split) -> None:
    for example in drawn(split):
        assert TASK.is_right(example, example.answer)
        assert TASK.is_right(example, f"  {example.answer.upper()}. ")
        assert not TASK.is_right(example, "1" + example.answer)
        assert not TASK.is_right(example, example.answer + " or more")


@pytest.mark.parametrize("split", Split)
def test_questions_and_answers_are_short(split: Split) -> None:
    for example in drawn(split):
        assert len(example.prompt) <= 160
        assert len(example.answer) <= 20
        assert "{" not in example.prompt


def test_the_same_chance_draws_the_same_questions() -> None:
    assert drawn(Split.TRAIN, 20) == drawn(Split.TRAIN, 20)
    assert TASK.document(Random(3)) == TASK.document(Random(3))


def test_every_form_is_drawn_in_both_splits() -> None:
    for split in Split:
        assert {example.kind for example in drawn(split)} == set(measures._WORDINGS)


def test_every_form_has_its_wordings_and_the_splits_share_none() -> None:
    for wordings in measures._WORDINGS.values():
        assert len(wordings[Split.TRAIN]) >= 8
        assert len(wordings[Split.TEST]) >= 3
        assert not set(wordings[Split.TRAIN]) & set(wordings[Split.TEST])


def test_wordings_of_the_test_use_words_of_training() -> None:
    def words(text: str) -> set[str]:
        return set(text.lower().replace("?", "").replace(".", "").replace(",", "").replace(":", "").split())

    for wordings in measures._WORDINGS.values():
        known = words(" ".join(" ".join(each[Split.TRAIN]) for each in measures._WORDINGS.values()))
        assert words(" ".join(wordings[Split.TEST])) <= known


@pytest.mark.parametrize("kind", measures._FORMS)
def test_the_splits_share_no_values(kind: str) -> None:
    random = Random(5)
    values: dict[bool, set[str]] = {False: set(), True: set()}
    for _ in range(2000):
        held, value, _answer = measures._FORMS[kind](random)
        values[held].add(repr({name: item for name, item in value.items() if name not in ("currency", "month")}))
    if kind == "month-after":
        return  # of which the month itself is a value: see the next test
    assert values[True]
    assert not values[True] & values[False]


def test_months_and_their_distances_are_of_one_split() -> None:
    random = Random(5)
    splits: dict[str, set[bool]] = {}
    for _ in range(2000):
        held, value, _answer = measures._FORMS["month-after"](random)
        splits.setdefault(repr(value), set()).add(held)
    assert all(len(each) == 1 for each in splits.values())
    assert {True, False} == set.union(*splits.values())


def test_the_splits_share_no_names_and_no_things() -> None:
    for values in (measures._NAMES, measures._THINGS):
        assert not set(values[Split.TRAIN]) & set(values[Split.TEST])
    for example in drawn(Split.TRAIN):
        said = set(example.prompt.replace("'", " ").replace(".", " ").replace(",", " ").split())
        assert not said & set(measures._NAMES[Split.TEST])
        assert not said & set(measures._THINGS[Split.TEST])


def test_the_mirror_of_a_held_pair_is_not_held() -> None:
    pairs = [(first, second) for first in range(1, 61) for second in range(1, 61)]
    held = [pair for pair in pairs if measures.is_held(*pair)]
    assert len(held) > len(pairs) / 10
    assert not any(measures.is_held(second, first) for first, second in held)


def question(answer: str) -> Example:
    return Example("?", answer, "convert")


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ("3000 m", "3,000 m"),
        ("3000 m", "3000 metres"),
        ("3000 m", "3000m."),
        ("5 litres", "5 l"),
        ("120 minutes", "120 min"),
        ("12 euros", "12 €"),
        ("1 days", "1 day"),
        ("Thursday", " thursday."),
        ("17 March", "17  march"),
    ],
)
def test_spellings_of_one_answer_are_right(right: str, said: str) -> None:
    assert TASK.is_right(question(right), said)


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ("3000 m", "3000"),
        ("3000 m", "3000 mm"),
        ("3000 m", "3,00 m"),
        ("3000 m", "30 00 m"),
        ("3000 m", "-3000 m"),
        ("12 euros", "12 dollars"),
        ("Thursday", "Tuesday"),
        ("17 March", "17 May"),
    ],
)
def test_another_number_or_unit_is_wrong(right: str, said: str) -> None:
    assert not TASK.is_right(question(right), said)


@pytest.mark.parametrize("said", ["", " ", "\0", "9" * 100_000, "," * 1_000, "1," * 500, "\ud800", "(((", "٣٠٠٠ m"])
def test_hostile_answers_are_wrong(said: str) -> None:
    assert not TASK.is_right(question("3000 m"), said)


def test_a_fact_is_true_and_holds_no_held_pair() -> None:
    random = Random(11)
    for line in (fact(random) for _ in range(2000)):
        said, _, result = line.partition(" = ")
        if not result:
            continue  # of the calendar: see the next test
        first, sign, second = said.split()
        one, other = int(first), int(second)
        assert int(result) == {"+": one + other, "-": one - other, "x": one * other}[sign]
        if sign == "+" or (sign == "x" and other not in measures._MULTIPLES_MAX):
            assert not measures.is_held(one, other)
        if sign == "-":
            assert not measures.is_held_difference(one, other)


def test_a_fact_of_the_calendar_counts_days_and_months() -> None:
    random = Random(13)
    lines = [line for line in (fact(random) for _ in range(2000)) if "=" not in line]
    assert "3 days after Monday is Thursday" in lines
    assert "1 month before January is December" in lines


def test_documents_are_tables_and_no_questions() -> None:
    random = Random(17)
    for text in (TASK.document(random) for _ in range(500)):
        assert 60 <= len(text) <= 400
        assert "?" not in text
    assert any("1 km = 1000 m" in TASK.document(random) for _ in range(500))


def test_a_right_answer_is_judged_by_the_example_alone() -> None:
    example = drawn(Split.TEST, 1)[0]
    assert not TASK.is_right(replace(example, answer="another answer"), example.answer)
