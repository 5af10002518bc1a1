"""What a task of the starter kit is: examples without end, and whether an answer is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random


class Split(Enum):
    """What an example is for. Templates and values of one split never stand in the other."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Example:
    """One question, with one right answer.

    Args:
        prompt: What a user writes.
        answer: A right answer, the one that is learnt.
        kind: Which form of question it is, for reports: `count`, `join`, ...
        facts: What the score needs beyond the text: a database to ask, strings to match.
    """

    prompt: str
    answer: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """Something an expert can learn.

    Args:
        name: Of the task and its expert: `sql` is what `expert-sql` learns.
        example: Draws one example of a split.
        is_right: Whether an answer is right: by running it, by reading it, or by comparing.
        document: Draws a text in the language of the task that the base may read: its surface, and no question.
    """

    name: str
    example: Callable[[Random, Split], Example]
    is_right: Callable[[Example, str], bool]
    document: Callable[[Random], str]
