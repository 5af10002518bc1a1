from __future__ import annotations

from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import pytest

from training.starter.build import write_data
from training.starter.corpus import TASKS, chat, texts
from training.starter.task import Split
from training.starter.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from pathlib import Path


def test_equal_generators_draw_equal_texts() -> None:
    assert [*islice(texts(Random(3)), 200)] == [*islice(texts(Random(3)), 200)]
    assert [*islice(texts(Random(3)), 200)] != [*islice(texts(Random(4)), 200)]


def test_every_text_ends_and_says_so_once() -> None:
    for text in islice(texts(Random(3)), 500):
        assert text.endswith(END_OF_TEXT)
        assert text.count(END_OF_TEXT) == 1
        assert len(text) > len(END_OF_TEXT)


def test_a_conversation_is_what_the_chat_template_makes_of_it() -> None:
    assert chat([("Hello!", "Hi."), ("Bye!", "Goodbye!")]) == (
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye!<|im_end|>\n<|im_start|>assistant\nGoodbye!<|im_end|>\n"
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_base_never_reads_a_question_of_an_expert(name: str) -> None:
    """Not of those that the expert is trained on, nor of those that it is judged by."""
    random = Random(5)
    questions = {TASKS[name].example(random, split).prompt for split in Split for _ in range(300)}
    read = "".join(islice(texts(Random(6)), 400))
    assert not [question for question in questions if question in read]


def test_data_of_an_expert_are_drawn_from_its_seed_and_hold_no_line_twice(tmp_path: Path) -> None:
    task = TASKS["topics"]
    first, second, other = (tmp_path / name for name in ("first.jsonl", "second.jsonl", "other.jsonl"))
    write_data(task, first, "train", 500)
    write_data(task, second, "train", 500)
    write_data(task, other, "eval", 500)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    lines = first.read_text().splitlines()
    assert len(lines) == len({*lines}) <= 500
