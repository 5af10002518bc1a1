from __future__ import annotations

from random import Random

import pytest

from training.starter import topics
from training.starter.task import Split
from training.starter.words import held_out

KEPT = {topic: set(held_out(cues)[0]) for topic, cues in topics.CUES.items()}
HELD = {topic: set(held_out(cues)[1]) for topic, cues in topics.CUES.items()}


def cues_in(text: str, cues: set[str]) -> set[str]:
    return {cue for cue in cues if f"the {cue.replace('-', ' ')}" in text.lower() or f"new {cue}" in text.lower()}


def test_no_cue_tells_two_topics() -> None:
    every = [cue for cues in topics.CUES.values() for cue in cues]
    assert len(every) == len(set(every)) == 6 * 40


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_every_other_topic_is_wrong(split: Split) -> None:
    random = Random(1)
    for _ in range(300):
        drawn = topics.TASK.example(random, split)
        assert len(drawn.prompt) + len(drawn.answer) <= 420
        assert [topic for topic in topics.CUES if topics.TASK.is_right(drawn, topic)] == [drawn.answer]
        assert topics.TASK.is_right(drawn, f"Topic: {drawn.answer.title()}.")
        assert not topics.TASK.is_right(drawn, "x" * 100_000)


def test_every_topic_is_asked_for() -> None:
    random = Random(2)
    assert {topics.TASK.example(random, Split.TEST).answer for _ in range(200)} == set(topics.CUES)


def test_a_text_of_the_test_has_one_known_cue_and_one_that_is_held_out() -> None:
    random = Random(3)
    for _ in range(200):
        drawn = topics.TASK.example(random, Split.TEST)
        assert cues_in(drawn.prompt, KEPT[drawn.answer])
        assert cues_in(drawn.prompt, HELD[drawn.answer])


def test_training_sees_no_cue_that_is_held_out() -> None:
    random = Random(4)
    for _ in range(200):
        drawn = topics.TASK.example(random, Split.TRAIN)
        assert not cues_in(drawn.prompt, HELD[drawn.answer])


def test_no_prompt_stands_in_both_splits() -> None:
    random = Random(5)
    train, test = ({topics.TASK.example(random, split).prompt for _ in range(500)} for split in Split)
    assert not train & test


def test_a_document_files_its_items_under_their_topics() -> None:
    random = Random(6)
    for _ in range(200):
        text = topics.TASK.document(random)
        assert 60 <= len(text) <= 500
        for item in text.split("\n\n"):
            news, filed = item.split("\nFiled under: ")
            assert cues_in(news, KEPT[filed])
            assert not cues_in(news, HELD[filed])


def test_the_same_chance_draws_the_same_example() -> None:
    assert topics.TASK.example(Random(7), Split.TRAIN) == topics.TASK.example(Random(7), Split.TRAIN)
