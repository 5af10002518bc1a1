"""The questions for regular expressions: what is asked, which answers are right, and how long that may take."""

from __future__ import annotations

import re
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.starter.patterns import (
    FORMS,
    TASK,
    TEST_COUNTS,
    TEST_FRAMES,
    TEST_TEXTS,
    TRAIN_COUNTS,
    TRAIN_FRAMES,
    TRAIN_TEXTS,
    Form,
    Values,
    are_held_letters,
    draw_values,
    is_bounded,
    strings_about,
)
from training.starter.task import Example, Split

VALUES = Values(first="ba", second="zet", letters="kqa", low=3, high=5)


def _examples(split: Split, count: int = 300) -> list[Example]:
    random = Random(7)
    return [TASK.example(random, split) for _ in range(count)]


def _example_of(form: Form, values: Values = VALUES) -> Example:
    texts = strings_about(values)
    facts = {
        "match": tuple(text for text in texts if form.matches(values, text)),
        "miss": tuple(text for text in texts if not form.matches(values, text)),
    }
    return Example("", form.pattern(values), form.name, facts)


EXAMPLES = {form.name: _example_of(form) for form in FORMS}


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_short_and_ascii(split: Split) -> None:
    for example in _examples(split):
        assert TASK.is_right(example, example.answer), example
        assert len(example.answer) <= 80
        assert len(example.prompt) + len(example.answer) <= 220
        assert (example.prompt + example.answer).isascii()


def test_the_same_chance_draws_the_same_examples_and_every_form_comes() -> None:
    assert _examples(Split.TRAIN) == _examples(Split.TRAIN)
    assert {example.kind for example in _examples(Split.TEST)} == {form.name for form in FORMS}


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("starts", "^ba"),
        ("ends", "ba$"),
        ("contains", "ba"),
        ("exact", "^ba$"),
        ("digits", r"^\d+$"),
        ("digits-exactly", r"^\d{3}$"),
        ("letters-exactly", "^[a-z]{3}$"),
        ("digits-between", r"^\d{3,5}$"),
        ("digits-at-least", r"^\d{3,}$"),
        ("starts-ends", "^ba.*zet$"),
        ("starts-digit", r"^ba.*\d$"),
        ("either", "^(ba|zet)$"),
        ("then-digits", r"^ba\d+$"),
        ("letters-dash-digits", r"^[a-z]+-\d{3}$"),
        ("only-of", "^[kqa]+$"),
        ("none-of", "^[^kqa]+$"),
    ],
)
def test_each_form_has_one_canonical_spelling(kind: str, answer: str) -> None:
    assert EXAMPLES[kind].answer == answer
    assert TASK.is_right(EXAMPLES[kind], answer)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("starts", "^ba.*"),
        ("starts", "^(?:ba).*$"),
        ("digits", "^[0-9]+$"),
        ("digits-exactly", r"^\d\d\d$"),
        ("digits-at-least", r"  ^\d\d\d+$ "),
        ("either", "^ba$|^zet$"),
        ("starts-digit", "^ba.*?[0-9]$"),
        ("only-of", "^[aqk]+$"),
    ],
)
def test_another_spelling_of_the_same_is_right(kind: str, answer: str) -> None:
    assert TASK.is_right(EXAMPLES[kind], answer)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("starts", "^b"),
        ("starts", "^bab"),
        ("starts", "^BA"),
        ("ends", "a$"),
        ("exact", "^ba"),
        ("digits", r"\d+"),
        ("digits-exactly", r"\d{3}"),
        ("digits-exactly", r"^\d{4}$"),
        ("letters-exactly", "^.{3}$"),
        ("letters-exactly", "^[a-z]{4}$"),
        ("digits-between", r"^\d{3,6}$"),
        ("digits-between", r"^\d{2,5}$"),
        ("digits-at-least", r"^\d{4,}$"),
        ("starts-ends", "ba.*zet"),
        ("starts-ends", "^bazet$"),
        ("starts-digit", r"^ba\d$"),
        ("either", "ba|zet"),
        ("then-digits", r"^ba\d$"),
        ("then-digits", r"^ba\d*$"),
        ("letters-dash-digits", r"^[a-z]-\d{3}$"),
        ("letters-dash-digits", r"^\w+-\d{3}$"),
        ("only-of", "[kqa]+"),
        ("only-of", "^[kq]+$"),
        ("none-of", "[^kqa]+"),
        ("none-of", "^[^kq]+$"),
    ],
)
def test_a_near_miss_is_wrong(kind: str, answer: str) -> None:
    assert not TASK.is_right(EXAMPLES[kind], answer)


@pytest.mark.parametrize("split", Split)
def test_the_right_answer_of_any_other_form_is_wrong(split: Split) -> None:
    random = Random(11)
    for _ in range(20):
        values = draw_values(random, split)
        for asked in FORMS:
            example = _example_of(asked, values)
            right = {form.name for form in FORMS if TASK.is_right(example, form.pattern(values))}
            assert right == {asked.name}, values


@pytest.mark.parametrize("split", Split)
def test_the_right_answer_with_other_values_is_wrong(split: Split) -> None:
    random = Random(13)
    for _ in range(20):
        values, other = draw_values(random, split), draw_values(random, split)
        for form in FORMS:
            pattern = form.pattern(other)
            used = (
                pattern == form.pattern(values) or values.low == other.low or set(values.letters) & set(other.letters)
            )
            if used or values.first in other.first or other.first in values.first:
                continue
            assert not TASK.is_right(_example_of(form, values), pattern), (form.name, values, other)


def test_the_strings_are_short_and_plain_and_each_form_has_both_kinds() -> None:
    random = Random(17)
    for example in (*_examples(Split.TRAIN, 100), *EXAMPLES.values(), *[TASK.example(random, Split.TEST)]):
        assert example.facts["match"]
        assert len(example.facts["miss"]) >= 8
        for text in (*example.facts["match"], *example.facts["miss"]):
            assert 0 < len(text) <= 24
            assert text.isascii()
            assert text.isprintable()


HOSTILE = (
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)+$",
    "(a*)*b",
    "((a*))*b",
    "(?:a?){20}b",
    "a*a*a*a*a*b",
    "a?a?a?a?a?aaaaa",
    "(|)(|)(|)(|)(|)b",
    "(a|a|a)(a|a|a|a)b",
    "((){99}){99}",
    "(){99}",
    "a{999999999}",
    "(a{99}){99}",
    r"(a)\1",
    "(?=a)a",
    "(?!a)b",
    "(?<=a)b",
    "(?P<n>a)",
    "(?i)ba",
    "(?#a)",
    "a**",
    "a*+",
    "*a",
    "a{,3}",
    "a)",
    "[[a]",
    "[a--b]",
    "[^]||]",
    "[]",
    "",
    " ",
    "ba\nzet",
    "bä",
    "\x00",
    "a" * 81,
    "(" * 80,
    "(ba",
)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_is_refused_unread(pattern: str) -> None:
    assert not is_bounded(pattern.strip())
    assert not TASK.is_right(EXAMPLES["contains"], pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a)+$", "(ab)*b", "a*a*a*a*b", "(|)(|)(|)(|)b", "(a|a|a)(a|a|a)b", "(a)", "a{99}", "a*?", "[a-b]", "a" * 80],
)
def test_the_twin_of_a_hostile_pattern_is_read(pattern: str) -> None:
    assert is_bounded(pattern)


@pytest.mark.parametrize("pattern", ["[z-a]", r"\q", "a{3,2}"])
def test_what_is_bounded_and_no_pattern_is_wrong(pattern: str) -> None:
    assert is_bounded(pattern)
    assert not TASK.is_right(EXAMPLES["contains"], pattern)


@pytest.mark.parametrize(
    "pattern", ["(.*)(.*)(.*)(.*)_", "(.)*(..)*(.)*(..)*,", "[^,]*[^,]*[^,]*[^,]*,", ".*.*(.|.)(.|.),"]
)
def test_the_slowest_patterns_that_are_read_take_little_time(pattern: str) -> None:
    assert is_bounded(pattern)
    search = re.compile(pattern).search
    start = time.process_time()
    assert all(search(text) is None for text in ("a" * 24, "ab" * 12, "7" * 24))
    assert time.process_time() - start < 5


def test_an_answer_without_end_is_wrong() -> None:
    assert not TASK.is_right(EXAMPLES["starts"], " " * 10_000_000 + "^ba")


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=30), st.text("ab1d^$.*+?{}()[]|\\-, ", max_size=14)))
def test_no_answer_makes_the_score_fail(answer: str) -> None:
    assert TASK.is_right(EXAMPLES["starts"], answer) in (True, False)


def test_wordings_and_values_of_the_splits_are_disjoint() -> None:
    assert not set(TRAIN_FRAMES) & set(TEST_FRAMES)
    for form in FORMS:
        assert not set(form.train) & set(form.test)
        assert len(set(form.train)) * len(TRAIN_FRAMES) >= 8
        assert len(set(form.test)) >= 3
    assert not set(TRAIN_TEXTS) & set(TEST_TEXTS)
    assert not set(TRAIN_COUNTS) & set(TEST_COUNTS)
    random = Random(19)
    train = [draw_values(random, Split.TRAIN) for _ in range(1_000)]
    test = [draw_values(random, Split.TEST) for _ in range(1_000)]
    assert not {v.first for v in train} & {v.first for v in test}
    assert not {v.second for v in train} & {v.second for v in test}
    assert not any(are_held_letters(v.letters) for v in train)
    assert all(are_held_letters(v.letters) for v in test)
    assert not {v.low for v in train} & {v.low for v in test}
    assert not {v.high for v in train} & {v.high for v in test}


def test_about_half_of_the_frames_name_the_subject() -> None:
    subject = re.compile("regex|pattern|regular expression", re.IGNORECASE)
    for frames in (TRAIN_FRAMES, TEST_FRAMES):
        named = sum(subject.search(frame) is not None for frame in frames)
        assert 0.4 <= named / len(frames) <= 0.6


def test_documents_are_short_and_ask_nothing_and_hold_no_held_text() -> None:
    random = Random(23)
    starts = tuple(frame.partition("{")[0] for frame in (*TRAIN_FRAMES, *TEST_FRAMES))
    for _ in range(300):
        text = TASK.document(random)
        assert 60 <= len(text) <= 400
        assert text.isascii()
        assert not text.startswith(starts[:7])
        for word in re.findall(r"^(?:pattern: |regex )?\^([a-z]+) ", text, re.MULTILINE):
            assert word not in TEST_TEXTS
