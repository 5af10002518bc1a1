"""Answers that are one word of a few."""

from __future__ import annotations

from typing import Final

_ANSWER_CHARACTERS_MAX: Final = 1000


def is_label(answer: str, label: str, headings: tuple[str, ...]) -> bool:
    """Whether an answer is a label: in any case, with a full stop or without, after a heading or without one.

    Args:
        answer: What was answered, whatever it is.
        label: The right word, in lower case.
        headings: What may stand before it, in lower case: `topic:`.

    Returns:
        Whether it is right.
    """
    if len(answer) > _ANSWER_CHARACTERS_MAX:
        return False
    said = answer.strip().lower().removesuffix(".")
    for heading in headings:
        said = said.removeprefix(heading).strip()
    return said == label
