from __future__ import annotations

import pytest

from benchmarks.nearest import Nearest

EXAMPLES = [
    ("How many rows are in the table?", "sql"),
    ("Translate the wolf into Esperanto.", "esperanto"),
    ("Which strings have two digits?", "regex"),
    ("How many digits are in a year?", "base"),
]


def test_an_example_is_nearest_to_itself() -> None:
    nearest = Nearest(EXAMPLES)
    for text, label in EXAMPLES:
        found, similarity = nearest.ranked(text)[0]
        assert found == label
        assert similarity == pytest.approx(1.0)


def test_shared_words_and_parts_of_words_make_texts_similar() -> None:
    assert Nearest(EXAMPLES).ranked("the wolves, TRANSLATED into esperanto")[0][0] == "esperanto"


def test_every_label_is_ranked_once_by_its_best_example() -> None:
    ranked = Nearest([*EXAMPLES, ("rows", "sql")]).ranked("rows in tables")
    assert sorted(label for label, _ in ranked) == ["base", "esperanto", "regex", "sql"]
    similarities = [similarity for _, similarity in ranked]
    assert similarities == sorted(similarities, reverse=True)


@pytest.mark.parametrize("text", ["", "   ", "日本"])
def test_a_text_like_no_example_is_nearest_to_the_first(text: str) -> None:
    assert Nearest(EXAMPLES).ranked(text)[0] == ("sql", 0.0)
