"""What the two experts of Esperanto learn, and the sentences that need both."""

from __future__ import annotations

import re
from random import Random

import pytest

from training.starter import esperanto
from training.starter.esperanto import HOME, MIXED, NATURE, TASKS, Lexicon, Noun
from training.starter.task import Example, Split, Task

ALL = (*TASKS, MIXED)
PAIRS = {"esperanto-nature": [(NATURE, NATURE)], "esperanto-home": [(HOME, HOME)]} | {
    "esperanto-mixed": [(NATURE, HOME), (HOME, NATURE)]
}


def names(task: Task) -> str:
    return task.name


def drawn(task: Task, split: Split, count: int = 300) -> list[Example]:
    random = Random(7)
    return [task.example(random, split) for _ in range(count)]


def nouns(lexicon: Lexicon) -> tuple[Noun, ...]:
    return (*lexicon.actors, *lexicon.things)


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d]+", text.lower()))


@pytest.mark.parametrize("task", ALL, ids=names)
@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_a_changed_one_is_wrong(task: Task, split: Split) -> None:
    for example in drawn(task, split):
        assert task.is_right(example, example.answer)
        assert task.is_right(example, f" {example.answer.lower().removesuffix('.')}\n")
        assert not task.is_right(example, example.answer.replace(" ", " not ", 1))
        assert not task.is_right(example, example.answer.rsplit(" ", 1)[0] + ".")


@pytest.mark.parametrize("task", ALL, ids=names)
@pytest.mark.parametrize("split", Split)
def test_sentences_are_short_and_written_with_capital_and_dot(task: Task, split: Split) -> None:
    for example in drawn(task, split):
        assert len(example.prompt) <= 130
        assert len(example.answer) <= 70
        assert re.fullmatch(r"(The|La) [^A-Z.]+\.", example.answer)
        assert "{" not in example.prompt


def test_the_same_chance_draws_the_same_sentences() -> None:
    assert drawn(MIXED, Split.TEST, 20) == drawn(MIXED, Split.TEST, 20)
    assert MIXED.document(Random(3)) == MIXED.document(Random(3))


def test_wordings_suffice_and_the_splits_share_none() -> None:
    for wordings in esperanto._WORDINGS.values():
        assert len(wordings[Split.TRAIN]) >= 8
        assert len(wordings[Split.TEST]) >= 3
        assert not set(wordings[Split.TRAIN]) & set(wordings[Split.TEST])
        known = words(" ".join(" ".join(each[Split.TRAIN]) for each in esperanto._WORDINGS.values()))
        assert words(" ".join(wordings[Split.TEST])) <= known


@pytest.mark.parametrize("name", PAIRS)
def test_the_splits_share_no_combination_of_words(name: str) -> None:
    random = Random(5)
    cores: dict[Split, set[tuple[bool, tuple[int, int, int]]]] = {
        split: {
            (sentence.form == "is", sentence.core)
            for sentence in (esperanto._draw(random, PAIRS[name], split) for _ in range(800))
        }
        for split in Split
    }
    assert cores[Split.TEST]
    assert not cores[Split.TEST] & cores[Split.TRAIN]


@pytest.mark.parametrize("name", PAIRS)
def test_every_word_of_the_test_occurs_in_training(name: str) -> None:
    random = Random(5)

    def roots(split: Split, count: int) -> set[str]:
        text = " ".join(esperanto._draw(random, PAIRS[name], split).esperanto for _ in range(count))
        return {re.sub("(oj?n?|aj?n?|[ai]s)$", "", word) for word in words(text)}

    assert roots(Split.TEST, 500) <= roots(Split.TRAIN, 2000)


def test_the_halves_share_no_noun_and_few_other_words() -> None:
    for attribute in ("english", "english_plural", "root"):
        of_nature = {getattr(noun, attribute) for noun in nouns(NATURE)}
        of_home = {getattr(noun, attribute) for noun in nouns(HOME)}
        assert len(of_nature) == len(of_home) == 36
        assert not of_nature & of_home
    assert len({*NATURE.on_all, *NATURE.on_things, *NATURE.alone} & {*HOME.on_all, *HOME.on_things, *HOME.alone}) == 3
    assert len({*NATURE.adjectives} & {*HOME.adjectives}) == 4


def test_no_two_words_are_written_alike() -> None:
    roots = [noun.root + "o" for noun in (*nouns(NATURE), *nouns(HOME))]
    roots += [verb.root + "as" for verb in esperanto._VERB_INDEX]
    roots += [root + "a" for _, root in esperanto._ADJECTIVE_INDEX]
    assert len(roots) == len(set(roots))
    forms = [noun.english for noun in (*nouns(NATURE), *nouns(HOME))]
    forms += [english for english, _ in esperanto._ADJECTIVE_INDEX]
    for verb in esperanto._VERB_INDEX:
        forms += [verb.english, verb.english_third, verb.english_past]
    assert len(forms) == len(set(forms))


def test_a_mixed_sentence_has_nouns_of_both_halves() -> None:
    random = Random(9)
    halves = [{noun.root for noun in nouns(lexicon)} for lexicon in (NATURE, HOME)]
    for _ in range(500):
        sentence = esperanto._draw(random, PAIRS["esperanto-mixed"], Split.TEST)
        said = {re.sub("oj?n?$", "", word) for word in sentence.esperanto.split()}
        assert all(said & half for half in halves)


def test_nouns_and_adjectives_agree_in_number_and_case() -> None:
    dog, white = NATURE.actors[0], ("white", "blank")
    phrase = esperanto._noun_phrase
    assert phrase(dog, plural=False) == ("the dog", "la hundo")
    assert phrase(dog, plural=True, adjective=white) == ("the white dogs", "la blankaj hundoj")
    assert phrase(dog, plural=True, accusative=True, adjective=white) == ("the white dogs", "la blankajn hundojn")


def test_verbs_are_conjugated() -> None:
    see = NATURE.on_all[0]
    phrase = esperanto._verb_phrase
    assert phrase(see, plural=False, past=False) == ("sees", "vidas")
    assert phrase(see, plural=True, past=False) == ("see", "vidas")
    assert phrase(see, plural=True, past=True) == ("saw", "vidis")
    assert phrase(see, plural=False, past=False, negated=True) == ("does not see", "ne vidas")
    assert phrase(see, plural=True, past=False, negated=True) == ("do not see", "ne vidas")
    assert phrase(see, plural=True, past=True, negated=True) == ("did not see", "ne vidis")


@pytest.mark.parametrize(
    "said",
    [
        "La ĉevalo naĝas.",
        "la ĉevalo  naĝas",
        "La cxevalo nagxas.",
        "LA CXEVALO NAGXAS",
        "La c\N{COMBINING CIRCUMFLEX ACCENT}evalo nag\N{COMBINING CIRCUMFLEX ACCENT}as.",
    ],
)
def test_spellings_of_one_sentence_are_right(said: str) -> None:
    assert MIXED.is_right(Example("?", "La ĉevalo naĝas.", "acts"), said)


@pytest.mark.parametrize(
    "said",
    ["", ".", "La cevalo nagas.", "La ĉevalo naĝis.", "La ĉevalo naĝas..", "x" * 100_000, "\ud800", "\0", "cx" * 500],
)
def test_hostile_and_other_answers_are_wrong(said: str) -> None:
    assert not MIXED.is_right(Example("?", "La ĉevalo naĝas.", "acts"), said)


@pytest.mark.parametrize("task", ALL, ids=names)
def test_documents_are_esperanto_alone(task: Task) -> None:
    random = Random(17)
    for text in (task.document(random) for _ in range(300)):
        assert 60 <= len(text) <= 400
        assert not words(text) & {"the", "and", "not", "esperanto", "english"}
        assert all(sentence.startswith("La ") for sentence in text.split(". "))
