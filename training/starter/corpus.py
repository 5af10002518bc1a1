"""What the starter base reads: talk, questions with what answers them, stories, and the languages of the experts.

The experts' languages are read only as one meets them in a book: valid statements over a schema, patterns with what
they match. Which statement answers which question is what an expert adds. Closest to a task come news that a paper
files under a section, and reviews that end in a verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from training.starter import cypher, esperanto, extraction, measures, patterns, reviews, sql, topics, world
from training.starter.task import Split, Task
from training.starter.tokenizer import END_OF_TEXT, END_OF_TURN, TURN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        sql.TASK,
        cypher.TASK,
        extraction.TASK,
        patterns.TASK,
        measures.TASK,
        *esperanto.TASKS,
        topics.TASK,
        reviews.TASK,
    )
}
"""What the experts learn, by name."""


def chat(turns: Sequence[tuple[str, str]]) -> str:
    """A conversation as the chat template writes it, its end included."""
    return "".join(
        f"{TURN}user\n{asked}{END_OF_TURN}\n{TURN}assistant\n{answer}{END_OF_TURN}\n" for asked, answer in turns
    )


def texts(random: Random) -> Iterator[str]:
    """Documents without end, each closed by the end-of-text token. Equal generators draw equal documents."""
    weights = [weight for weight, _ in _MIX]
    draws = [draw for _, draw in _MIX]
    while True:
        yield random.choices(draws, weights)[0](random) + END_OF_TEXT


def _question(random: Random) -> str:
    example = world.TASK.example(random, Split.TRAIN)
    return chat([(example.prompt, example.answer)])


def _reading(random: Random) -> str:
    return chat([world.reading(random)])


def _talk(random: Random) -> str:
    return chat(world.conversation(random))


def _sums(random: Random) -> str:
    return "\n".join(measures.fact(random) for _ in range(random.randint(4, 12)))


_MIX: Final[Sequence[tuple[float, Callable[[Random], str]]]] = (
    (14, _question),
    (6, _talk),
    (30, _reading),
    (6, world.TASK.document),
    (8, _sums),
    *((4.5, task.document) for task in TASKS.values()),
)
"""How often each kind of text is drawn."""
