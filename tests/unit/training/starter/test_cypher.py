from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.starter import cypher
from training.starter.drawing import is_held_out
from training.starter.task import Example, Split

KNOWN = Example("", "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN b.name", "forwards")


def drawn(split: Split, count: int = 400) -> list[Example]:
    random = Random(7)
    return [cypher.example(random, split) for _ in range(count)]


@pytest.mark.parametrize(
    "answer",
    [
        KNOWN.answer,
        f"  {KNOWN.answer} ;\n",
        'MATCH (a:Person {name: "Anna"})-[:KNOWS]->(b:Person) RETURN b.name',
        "MATCH (p:Person{name:'Anna'}) -[ :KNOWS ]-> ( friend :Person )\nRETURN friend.name",
        "MATCH (b:Person {name: 'Anna'})-[:KNOWS]->(a:Person) RETURN a.name",
        "MATCH (name:Person {name: 'Anna'})-[:KNOWS]->(Person:Person) RETURN Person.name",
    ],
)
def test_spacing_quotes_a_semicolon_and_names_of_variables_do_not_matter(answer: str) -> None:
    assert cypher.is_right(KNOWN, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "MATCH (a:City {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN b.name",
        "MATCH (a:Person {name: 'Anne'})-[:KNOWS]->(b:Person) RETURN b.name",
        "MATCH (a:Person {name: ' Anna'})-[:KNOWS]->(b:Person) RETURN b.name",
        "MATCH (a:Person {title: 'Anna'})-[:KNOWS]->(b:Person) RETURN b.name",
        "MATCH (a:Person {name: 'Anna'})-[:LIKES]->(b:Person) RETURN b.name",
        "MATCH (a:Person {name: 'Anna'})<-[:KNOWS]-(b:Person) RETURN b.name",
        "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN a.name",
        "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(a:Person) RETURN a.name",
        "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN c.name",
        "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN b.title",
        "MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN b",
        "MATCH (a:Person {name: Anna})-[:KNOWS]->(b:Person) RETURN b.name",
    ],
)
def test_another_label_property_value_relation_direction_or_variable_is_wrong(answer: str) -> None:
    assert not cypher.is_right(KNOWN, answer)


def test_a_counted_variable_may_have_any_name_and_the_function_has_its_own() -> None:
    counted = Example("", "MATCH (a:City) RETURN count(a)", "count")
    assert cypher.is_right(counted, "MATCH (n:City) RETURN count(n)")
    assert not cypher.is_right(counted, "MATCH (n:City) RETURN sum(n)")
    assert not cypher.is_right(counted, "MATCH (n:City) RETURN count(m)")


def test_variables_are_numbered_in_the_order_of_patterns() -> None:
    assert cypher.normalised("MATCH (x:A)-[r:R]->(y) RETURN r.x") == (
        *("MATCH", "(", "$1", ":", "A", ")", "-", "[", "$2", ":", "R", "]", "->", "(", "$3", ")"),
        *("RETURN", "$2", ".", "x"),
    )


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_short(split: Split) -> None:
    for example in drawn(split):
        assert cypher.is_right(example, example.answer)
        assert not cypher.is_right(example, example.answer + "s")
        assert len(example.prompt) + len(example.answer) <= 420
        assert len(example.answer) <= 160
        assert (example.prompt + example.answer).isascii()


@pytest.mark.parametrize("split", Split)
def test_what_an_answer_copies_stands_in_its_prompt(split: Split) -> None:
    for example in drawn(split):
        copied = re.findall(r":\s*'?([\w ]+)", example.answer)
        assert all(word in example.prompt for word in copied), example


def test_every_form_is_drawn() -> None:
    assert {example.kind for example in drawn(Split.TRAIN)} == {form.kind for form in cypher.FORMS}


def test_the_same_seed_draws_the_same_example() -> None:
    assert drawn(Split.TEST, 5) == drawn(Split.TEST, 5)


@pytest.mark.parametrize("answer", ["", ";", "(((", "MATCH (" * 100, "'", "'\\", '"', "{,", "\0\ud800", "x" * 100_000])
def test_a_hostile_answer_is_wrong(answer: str) -> None:
    assert not cypher.is_right(KNOWN, answer)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert not cypher.is_right(KNOWN, text)


def test_an_answer_of_the_longest_length_is_read_and_one_character_more_is_refused() -> None:
    longest = KNOWN.answer.ljust(1_000)
    assert cypher.is_right(KNOWN, longest)
    assert not cypher.is_right(KNOWN, longest + " ")


def test_no_wording_is_in_both_splits() -> None:
    for form in cypher.FORMS:
        assert len(set(form.train)) >= 8
        assert len(set(form.test)) >= 3
    assert not {wording for form in cypher.FORMS for wording in form.train} & {
        wording for form in cypher.FORMS for wording in form.test
    }
    assert not set(cypher.HINTS[Split.TRAIN]) & set(cypher.HINTS[Split.TEST])


def words_of(split: Split) -> set[str]:
    """Labels, properties, relations and values of a split's answers, but for `name`, which both have."""
    named = re.compile(r"[:.] ?'?([A-Za-z_]+)(?: ([A-Z][a-z]+)')?")
    return {
        word for example in drawn(split, 1_000) for found in named.findall(example.answer) for word in found if word
    } - {"name"}


def test_no_label_property_relation_or_value_is_in_both_splits() -> None:
    assert not words_of(Split.TRAIN) & words_of(Split.TEST)


@pytest.mark.parametrize("split", Split)
def test_numbers_are_those_of_the_split(split: Split) -> None:
    for example in drawn(split):
        numbers = [int(word) for word in example.answer.split() if word.isdigit() and word != "1"]
        assert all(is_held_out(number) == (split is Split.TEST) for number in numbers)


def test_a_document_holds_a_graph_and_statements_about_it() -> None:
    random = Random(3)
    for _ in range(300):
        text = cypher.document(random)
        assert 60 <= len(text) <= 400
        graph, *statements = text.splitlines()
        assert graph.startswith("Graph (")
        assert all(statement.startswith("MATCH (") and statement.endswith(";") for statement in statements)
        assert all(label in graph for label in re.findall(r"\w:(\w+)", text))


def test_the_task_is_named_after_its_language() -> None:
    assert cypher.TASK.name == "cypher"
