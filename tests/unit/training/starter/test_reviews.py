from __future__ import annotations

import re
from random import Random

import pytest

from training.starter import reviews
from training.starter.task import Split
from training.starter.words import held_out

LABELS = ("positive", "negative", "mixed")
PRAISE = held_out(reviews.PRAISE)
COMPLAINTS = held_out(reviews.COMPLAINTS)


def judgements(text: str, words: tuple[str, ...]) -> int:
    return len([word for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower()) if word in words])


def test_no_word_both_praises_and_complains() -> None:
    every = (*reviews.PRAISE, *reviews.COMPLAINTS)
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_every_other_mood_is_wrong(split: Split) -> None:
    random = Random(1)
    seen = set()
    for _ in range(300):
        drawn = reviews.TASK.example(random, split)
        seen.add(drawn.answer)
        assert len(drawn.prompt) + len(drawn.answer) <= 420
        assert [label for label in LABELS if reviews.TASK.is_right(drawn, label)] == [drawn.answer]
        assert reviews.TASK.is_right(drawn, f"Verdict: {drawn.answer.title()}.")
        assert not reviews.TASK.is_right(drawn, "x" * 100_000)
    assert seen == set(LABELS)


@pytest.mark.parametrize("split", Split)
def test_the_judgements_of_a_review_decide_its_mood(split: Split) -> None:
    random = Random(2)
    for _ in range(300):
        drawn = reviews.TASK.example(random, split)
        praise = judgements(drawn.prompt, reviews.PRAISE)
        complaints = judgements(drawn.prompt, reviews.COMPLAINTS)
        assert (praise, complaints) == {"positive": (2, 0), "negative": (0, 2), "mixed": (1, 1)}[drawn.answer]
        assert (" but " in drawn.prompt) == (drawn.answer == "mixed")


def test_one_judgement_of_the_test_is_held_out_and_none_of_training() -> None:
    random = Random(3)
    held = PRAISE[1] + COMPLAINTS[1]
    assert all(judgements(reviews.TASK.example(random, Split.TEST).prompt, held) == 1 for _ in range(200))
    assert all(judgements(reviews.TASK.example(random, Split.TRAIN).prompt, held) == 0 for _ in range(200))


def test_no_prompt_stands_in_both_splits() -> None:
    random = Random(4)
    train, test = ({reviews.TASK.example(random, split).prompt for _ in range(500)} for split in Split)
    assert not train & test


def test_a_document_prints_reviews_with_verdicts() -> None:
    random = Random(5)
    for _ in range(200):
        text = reviews.TASK.document(random)
        assert 60 <= len(text) <= 400
        assert judgements(text, PRAISE[1] + COMPLAINTS[1]) == 0
        for item in text.split("\n\n"):
            review, verdict = item.split("\nVerdict: ")
            praised, complained = judgements(review, reviews.PRAISE), judgements(review, reviews.COMPLAINTS)
            assert (praised, complained) == {"positive": (2, 0), "negative": (0, 2), "mixed": (1, 1)}[verdict]
