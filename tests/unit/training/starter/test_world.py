from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from training.starter import world
from training.starter.task import Example, Split

EVERY = [fact for facts in world.FACTS.values() for fact in facts]


def asked(kind: str, subject: str) -> Example:
    fact = next(fact for fact in world.FACTS[kind] if fact.subject == subject)
    return Example("?", fact.answer, kind, {"mention": fact.mention, "keys": fact.keys, "others": fact.others})


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_fits(split: Split) -> None:
    random = Random(1)
    for _ in range(1000):
        drawn = world.TASK.example(random, split)
        assert world.TASK.is_right(drawn, drawn.answer)
        assert len(drawn.answer) <= 160
        assert len(drawn.prompt) <= 200
        assert drawn.prompt.isascii()
        assert "{" not in drawn.prompt + drawn.answer


@pytest.mark.parametrize("kind", world.FACTS)
def test_the_answer_of_a_fact_with_another_value_is_wrong(kind: str) -> None:
    facts = world.FACTS[kind]
    for left in facts[:20]:
        for right in facts[:20]:
            value, other = (fact.relation.values[fact.subject] for fact in (left, right))
            # "The opposite of cold is hot" tells the opposite of hot as well.
            same = (left.subject, value) == (other, right.subject)
            if value != other and not same:
                assert not world.TASK.is_right(asked(kind, left.subject), right.answer), (left, right)


@pytest.mark.parametrize(
    ("kind", "subject", "answer"),
    [
        ("capital", "France", "paris"),
        ("capital", "France", "It is Paris, of course."),
        ("bigger", "ant/dog", "The dog is bigger."),
        ("bigger", "ant/dog", "A dog is bigger than an ant."),
        ("opposite", "hot", "Cold is the opposite of hot."),
        ("home", "duck", "In ponds, or a pond."),
        ("home", "duck", "Pond"),
        ("plural", "sheep", "Sheep."),
        ("difference", "7 - 0", "7 - 0 is 7."),
        ("sum", "7 + 8", "15"),
        ("count", "hours in a day", "Twenty-four."),
        ("definition", "SQL", "A language for databases."),
    ],
)
def test_other_words_around_the_value_are_right(kind: str, subject: str, answer: str) -> None:
    assert world.TASK.is_right(asked(kind, subject), answer)


@pytest.mark.parametrize(
    ("kind", "subject", "answer"),
    [
        ("capital", "France", "The capital of France is Parisian."),
        ("capital", "France", "Paris or Rome."),
        ("capital", "France", ""),
        ("capital", "France", "\0(((" * 50),
        ("capital", "France", "Paris " * 500),
        ("bigger", "ant/dog", "An ant is bigger than a dog."),
        ("opposite", "hot", "The opposite of hot is hot."),
        ("difference", "7 - 0", "7 - 0 is 0."),
        ("sum", "7 + 8", "7 + 8 is 150."),
        ("sum", "7 + 8", "7 + 8 is 16."),
        ("definition", "SQL", "SQL is a language for asking questions of graphs."),
    ],
)
def test_another_value_or_none_is_wrong(kind: str, subject: str, answer: str) -> None:
    assert not world.TASK.is_right(asked(kind, subject), answer)


@pytest.mark.parametrize("relation", world.RELATIONS, ids=lambda relation: relation.kind)
def test_training_asks_in_eight_wordings_or_more_and_the_test_in_three_others(relation: world.Relation) -> None:
    train, test = (world.wordings(relation, split) for split in Split)
    assert len(set(train)) >= 8
    assert len(set(test)) == 3
    assert not set(train) & set(test)


def test_the_base_meets_every_fact_in_both_splits() -> None:
    random = Random(2)
    drawn = {world.TASK.example(random, Split.TRAIN).answer for _ in range(30_000)}
    assert len({fact.answer for fact in EVERY} - drawn) <= 5


def test_no_two_facts_of_a_relation_contradict_each_other() -> None:
    for kind, facts in world.FACTS.items():
        assert len({fact.subject for fact in facts}) == len(facts), kind


def test_a_conversation_has_one_to_three_turns_of_which_none_is_empty() -> None:
    random = Random(3)
    talks = [world.conversation(random) for _ in range(1000)]
    assert {len(talk) for talk in talks} == {1, 2, 3}
    assert all(user and assistant for talk in talks for user, assistant in talk)


def test_a_conversation_answers_as_the_facts_are_or_does_not_know() -> None:
    random = Random(4)
    turns = [turn for _ in range(2000) for turn in world.conversation(random)]
    known = {fact.answer for fact in EVERY}
    assert sum(answer in known for _, answer in turns) > 1000
    assert sum(answer == "I do not know." for _, answer in turns) > 100
    assert any(answer.startswith("I am the starter model of Hocket") for _, answer in turns)


def test_a_talk_does_not_use_the_wordings_of_the_test() -> None:
    random = Random(5)
    asked_in_talk = {user for _ in range(2000) for user, _ in world.conversation(random)}
    assert not asked_in_talk & {world.TASK.example(random, Split.TEST).prompt for _ in range(2000)}


def test_the_answer_of_a_reading_stands_in_its_text_or_is_made_of_it() -> None:
    random = Random(6)
    copied = 0
    readings = [world.reading(random) for _ in range(2000)]
    for text, answer in readings:
        assert answer
        assert len(text) + len(answer) <= 420
        copied += answer in text
    assert copied > 1500


def test_documents_are_plain_paragraphs() -> None:
    random = Random(7)
    for _ in range(1000):
        text = world.TASK.document(random)
        assert 60 <= len(text) <= 400
        assert "{" not in text
        assert text.endswith((".", '"'))


def test_the_same_chance_draws_the_same_texts() -> None:
    for draw in (world.conversation, world.reading, world.document):
        assert draw(Random(8)) == draw(Random(8))
    drawn = world.TASK.example(Random(8), Split.TRAIN)
    assert drawn == replace(drawn) == world.TASK.example(Random(8), Split.TRAIN)
