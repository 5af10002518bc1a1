"""What tasks that copy draw alike: words and numbers of a split, and a question as a user writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from training.starter.task import Split
from training.starter.words import invented, spliced

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

_EVERY: Final = 7
_HELD: Final = 4
_DIGITS: Final = (1, 2, 2, 2, 2, 3, 3, 4)  # as often as numbers of that length are asked for


def chance(random: Random, share: float) -> bool:
    """Whether something happens that happens in a share of draws."""
    return random.random() < share


def is_held_out(number: int) -> bool:
    """Whether a number belongs to tests: every seventh does, so that every last digit is met in training."""
    return number % _EVERY == _HELD


def number_between(random: Random, split: Split, low: int, high: int) -> int:
    """Draws a number of a split from `low` to `high`, both included; the range holds at least seven."""
    while True:
        number = random.randint(low, high)
        if is_held_out(number) == (split is Split.TEST):
            return number


def number_of(random: Random, split: Split) -> int:
    """Draws a number of one to four digits of a split, most often of two."""
    digits = random.choice(_DIGITS)
    return number_between(random, split, 10 ** (digits - 1), 10**digits - 1)


def invented_of(random: Random, split: Split, barred: frozenset[str] = frozenset()) -> str:
    """Draws a made-up word of a split that is not `barred`.

    Words whose code points sum to a multiple of five belong to tests.
    """
    while True:
        word = spliced(random) if chance(random, 0.5) else invented(random)
        if (sum(map(ord, word)) % 5 == 0) == (split is Split.TEST) and not barred & {word, word.removesuffix("s")}:
            return word


def asked(random: Random, question: str, hints: Sequence[str]) -> str:
    """Writes a question as a user might: half the time with a hint of what is wanted, at times without its last mark.

    Args:
        random: What is drawn from.
        question: The question, with its punctuation.
        hints: Phrases with a place `{}` for the question.
    """
    text = random.choice(hints).format(question) if chance(random, 0.5) else question
    return text.rstrip("?.") if chance(random, 0.15) else text
