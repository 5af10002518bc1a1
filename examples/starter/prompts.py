"""What the demo asks: general questions, something for every expert, and a sentence that needs two of them.

Prompts are worded as the held-out examples of the kit's tasks are: in no training text is anything asked in these words
("What is a mixture of experts?" alone is). Each brings what its task needs to judge an answer: a database, strings to
match, the words of a fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from training.starter import cypher, esperanto, extraction, measures, patterns, reviews, sql, topics, world
from training.starter.task import Example, Task


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of the demo.

    Args:
        task: What judges the answer.
        example: The question, with a right answer.
        expert: Who should be asked; nobody for the base alone.
    """

    task: Task
    example: Example
    expert: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right."""
        return self.task.is_right(self.example, answer)


def _general(relation: str, subject: str, question: str) -> Prompt:
    fact = next(fact for fact in world.FACTS[relation] if fact.subject == subject)
    facts = {"mention": fact.mention, "keys": fact.keys, "others": fact.others}
    return Prompt(world.TASK, Example(question, fact.answer, relation, facts))


def _special(task: Task, example: Example) -> Prompt:
    return Prompt(task, example, f"expert-{task.name}")


_FILMS: Final = """\
CREATE TABLE films (title text, country text, year integer, rating integer);
INSERT INTO films VALUES ('The Red Lamp', 'France', 1962, 8), ('Two Rivers', 'Norway', 1988, 6),
    ('The Lost Key', 'France', 1991, 9), ('Snow', 'Norway', 2004, 7), ('A Long Night', 'Spain', 2011, 8);"""

PROMPTS: Final = (
    _general("capital", "Japan", "The capital of Japan is which city?"),
    _general("definition", "a mixture of experts", "What is a mixture of experts?"),
    _general("sound", "owl", "An owl makes which sound?"),
    _special(
        sql.TASK,
        Example(
            "Table films (title text, country text, year integer, rating integer)\n"
            "For all films with rating over 7, give the title. Answer with SQL.",
            "SELECT title FROM films WHERE rating > 7",
            "compare",
            {"script": _FILMS},
        ),
    ),
    _special(
        cypher.TASK,
        Example(
            "Graph (Actor {name, age})-[:ACTED_IN]->(Film {title, year})\n"
            "For each Actor with age over 50, give the name. Answer with Cypher.",
            "MATCH (a:Actor) WHERE a.age > 50 RETURN a.name",
            "where",
        ),
    ),
    _special(
        extraction.TASK,
        Example(
            "Read this text and extract name, age and city as JSON: My friend Clara, 38, lives in Boston.",
            '{"name": "Clara", "age": 38, "city": "Boston"}',
            "person",
            {
                "values": {"name": "Clara", "age": 38, "city": "Boston"},
                "types": {"name": "string", "age": "integer", "city": "string"},
            },
        ),
    ),
    _special(
        patterns.TASK,
        Example(
            "I need a regular expression for codes with letters, a dash and 3 digits.",
            r"^[a-z]+-\d{3}$",
            "letters-dash-digits",
            {"match": ("ab-123", "lamp-007"), "miss": ("ab-12", "ab-1234", "123-ab", "ab123")},
        ),
    ),
    _special(measures.TASK, Example("Convert to minutes: 3 hours.", "180 minutes", "convert")),
    _special(
        esperanto.TASKS[0],
        Example('Please say "the owl hears the wolves" in Esperanto.', "La strigo aŭdas la lupojn.", "object"),
    ),
    _special(
        esperanto.TASKS[1],
        Example('Please say "the baker washes the cups" in Esperanto.', "La bakisto lavas la tasojn.", "object"),
    ),
    _special(
        topics.TASK,
        Example(
            "What topic does this document belong to? "
            "The talk of this week in Boston was the medicine: it was better than the operation.",
            "health",
            "health",
        ),
    ),
    _special(
        reviews.TASK,
        Example(
            "Rate this: is it positive, negative or mixed? "
            "For Rosa the music of this restaurant was marvellous, but its coffee was disappointing.",
            "mixed",
            "mixed",
        ),
    ),
)
"""What is asked without naming anybody: the gate chooses who answers."""

MIXED: Final = Prompt(
    esperanto.MIXED,
    Example('Please say "the fox finds the spoons" in Esperanto.', "La vulpo trovas la kulerojn.", "object"),
)
"""A sentence with a noun of each lexicon."""

MIXTURE: Final = {"expert-esperanto-nature": 0.5, "expert-esperanto-home": 0.5}
"""Who answers it together, and with which weights."""
