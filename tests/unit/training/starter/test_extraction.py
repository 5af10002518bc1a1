"""The extraction of fields into JSON: what is asked, and which answers are right."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.starter.drawing import is_held_out
from training.starter.extraction import (
    DOMAINS,
    TASK,
    TEST_REQUESTS,
    TRAIN_REQUESTS,
    Domain,
    conforms,
    mentioned,
    schema,
)
from training.starter.task import Example, Split

ANNA = Example(
    "Extract name, age and city as JSON: Anna is 31 years old.",
    '{"name": "Anna", "age": 31, "city": null}',
    "missing",
    {
        "values": {"name": "Anna", "age": 31, "city": None},
        "types": {"name": "string", "age": "integer", "city": "string"},
    },
)


def _examples(split: Split, count: int = 500) -> list[Example]:
    random = Random(7)
    return [TASK.example(random, split) for _ in range(count)]


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_short_and_ascii(split: Split) -> None:
    for example in _examples(split):
        assert TASK.is_right(example, example.answer), example
        assert len(example.answer) <= 160
        assert len(example.prompt) + len(example.answer) <= 240
        assert (example.prompt + example.answer).isascii()
        assert "{" not in example.prompt


@pytest.mark.parametrize("split", Split)
def test_every_value_stands_in_the_text_and_every_field_in_the_request(split: Split) -> None:
    for example in _examples(split):
        for name, value in example.facts["values"].items():
            assert name in example.prompt
            assert value is None or str(value) in example.prompt
        assert (None in example.facts["values"].values()) == (example.kind == "missing")


@pytest.mark.parametrize("split", Split)
def test_the_answer_is_one_line_in_the_order_asked(split: Split) -> None:
    for example in _examples(split):
        found = json.loads(example.answer)
        assert example.answer == json.dumps(found)
        assert 2 <= len(found) <= 4
        names = list(found)
        assert f"{', '.join(names[:-1])} and {names[-1]}" in example.prompt


def test_the_same_chance_draws_the_same_examples_and_every_form_comes() -> None:
    assert _examples(Split.TRAIN) == _examples(Split.TRAIN)
    for split in Split:
        assert {example.kind for example in _examples(split)} == {"missing", *(domain.name for domain in DOMAINS)}


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Anna", "age": 31, "city": null}',
        '  {"city":null,"age":31,\n"name":"\\u0041nna"}\n',
    ],
)
def test_order_and_white_space_are_free(answer: str) -> None:
    assert conforms(ANNA, answer)
    assert TASK.is_right(ANNA, answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Anne", "age": 31, "city": null}',
        '{"name": "anna", "age": 31, "city": null}',
        '{"name": "Anna", "age": 32, "city": null}',
        '{"name": "Anna", "age": null, "city": null}',
        '{"name": "Anna", "age": 31, "city": "Rome"}',
        '{"name": "Anna", "age": 31, "city": ""}',
    ],
)
def test_another_value_is_wrong_though_it_conforms(answer: str) -> None:
    assert conforms(ANNA, answer)
    assert not TASK.is_right(ANNA, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        "{}",
        '"Anna"',
        '{"name": "Anna", "age": 31}',
        '{"name": "Anna", "age": 31, "city": null, "job": null}',
        '{"name": "Anna", "age": 31, "town": null}',
        '{"name": "Anna", "age": "31", "city": null}',
        '{"name": "Anna", "age": 31.0, "city": null}',
        '{"name": "Anna", "age": true, "city": null}',
        '{"name": "Anna", "age": NaN, "city": null}',
        '{"name": "Anna", "age": 031, "city": null}',
        '{"name": ["Anna"], "age": 31, "city": null}',
        '{"name": "Bob", "name": "Anna", "age": 31, "city": null}',
        '{"name": "Anna", "age": 31, "city": null,}',
        "{'name': 'Anna', 'age': 31, 'city': None}",
        '{"name": "Anna", "age": 31, "city": null} {}',
        'Answer: {"name": "Anna", "age": 31, "city": null}',
        '{"name": "Anna", "age": 31, "city": null}' + " " * 1_000,
        "[" * 1_000,
        '{"a":' * 200,
        '{"age": ' + "9" * 900 + "}",
    ],
)
def test_what_does_not_conform_is_wrong(answer: str) -> None:
    assert not conforms(ANNA, answer)
    assert not TASK.is_right(ANNA, answer)


def test_one_is_not_true() -> None:
    example = Example("", "", "pet", {"values": {"age": 1}, "types": {"age": "integer"}})
    assert TASK.is_right(example, '{"age": 1}')
    assert not TASK.is_right(example, '{"age": true}')


def test_the_schema_tells_names_and_types_and_not_what_the_text_is_silent_on() -> None:
    assert schema(ANNA) == {
        "type": "object",
        "properties": {
            "name": {"type": ["string", "null"]},
            "age": {"type": ["integer", "null"]},
            "city": {"type": ["string", "null"]},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    }


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=40), st.text('{}[]":,nul0123456789.eE-+ ag', max_size=30)))
def test_no_answer_makes_the_score_fail(answer: str) -> None:
    assert not TASK.is_right(ANNA, answer)


def test_requests_of_the_splits_are_disjoint_and_half_name_the_subject() -> None:
    assert not set(TRAIN_REQUESTS) & set(TEST_REQUESTS)
    for requests in (TRAIN_REQUESTS, TEST_REQUESTS):
        assert sum("JSON" in request for request in requests) * 2 == len(requests)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: str(domain.name))
def test_sentences_of_the_splits_are_disjoint_and_some_leave_a_field_out(domain: Domain) -> None:
    assert not set(domain.train) & set(domain.test)
    for sentences, wanted in ((domain.train, 8), (domain.test, 3)):
        whole = [sentence for sentence in sentences if mentioned(sentence) == domain.fields.keys()]
        assert len(set(sentences)) >= wanted
        assert 0 < len(whole) < len(sentences)
        assert all(len(mentioned(sentence)) >= 2 for sentence in sentences)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: str(domain.name))
def test_values_of_the_splits_are_disjoint(domain: Domain) -> None:
    random = Random(5)
    for name, field in domain.fields.items():
        train = {field.draw(random, Split.TRAIN) for _ in range(2_000)}
        test = {field.draw(random, Split.TEST) for _ in range(500)}
        assert not train & test, name
        assert len(test) >= 2, name
        if field.kind == "integer":
            assert all(is_held_out(int(number)) for number in test)


def test_prices_are_written_with_two_decimals_that_json_keeps() -> None:
    random = Random(3)
    price = next(domain for domain in DOMAINS if domain.name == "order").fields["price"]
    for _ in range(500):
        value = price.draw(random, Split.TRAIN)
        assert price.show(value) == json.dumps(value)


def test_an_goes_before_a_vowel() -> None:
    texts = [example.prompt for example in _examples(Split.TRAIN, 3_000)]
    assert any(" an orange" in text for text in texts)
    assert not any(f" a {vowel}" in text for text in texts for vowel in "aeiou")


def test_documents_are_json_or_sentences_and_never_both() -> None:
    random = Random(23)
    for _ in range(300):
        text = TASK.document(random)
        assert 60 <= len(text) <= 400
        if text[0] in "{[":
            for record in [text] if text.startswith(("[", "{\n")) else text.splitlines():
                json.loads(record)
        else:
            assert not set("{}") & set(text)
