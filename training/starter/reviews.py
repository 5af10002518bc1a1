"""The task of the expert for reviews: to say whether a short review is positive, negative or mixed.

A positive review praises twice, a negative one complains twice, and a mixed one does each once, joined by `but`.
Held out of `TRAIN` are every fifth word of praise and of complaint, every fifth aspect, name and city, some frames and
some wordings. A review of `TEST` has one judgement that `TRAIN` knows and one that it does not: it can be decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from training.starter.labels import is_label
from training.starter.task import Example, Split, Task
from training.starter.words import CITIES, NAMES, held_out, listed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

PRAISE: Final = listed(
    "good great excellent lovely superb wonderful perfect nice fantastic brilliant beautiful amazing delightful fine "
    "splendid "
    "charming marvellous outstanding pleasant terrific impressive clever solid enjoyable magnificent fabulous fun "
    "tasteful "
    "first-class exquisite"
)
"""What is said of a thing that pleases."""

COMPLAINTS: Final = listed(
    "bad terrible awful poor dreadful horrible boring ugly weak disappointing dull broken cheap nasty miserable "
    "annoying "
    "useless unpleasant sloppy lousy rude dirty bland clumsy tedious slow stale noisy second-rate appalling"
)
"""What is said of a thing that displeases."""

_ASPECTS: Final = {
    "restaurant": listed("soup service menu waiter dessert table kitchen food wine music room fish salad bread coffee"),
    "film": listed(
        "story acting ending music plot dialogue cast camera hero script opening picture humour sound scene"
    ),
    "phone": listed(
        "screen battery camera sound case keyboard price speaker design charger size button menu signal cable"
    ),
}
"""What a review is about, and the parts that it judges."""

_FRAMES: Final[Mapping[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "The {x} was {p} {j} the {y} was {q}.",
        "We found the {x} {p}, {j} the {y} was {q}.",
        "{name} says the {x} was {p} {j} the {y} {q}.",
        "I tried this {thing} in {city}. The {x} was {p} {j} the {y} was {q}.",
        "What a {thing}! The {x} is {p}, {j} the {y} is {q}.",
        "This {thing} has a {p} {x} {j} a {q} {y}.",
        "I would say: {p} {x} {j} {q} {y}.",
        "The {thing} from {city}: its {x} is {p} {j} its {y} is {q}.",
        "For me the {x} was very {p}, {j} the {y} was very {q}.",
        "{name} told me about this {thing}. I think the {x} is {p} {j} the {y} is {q}.",
    ),
    Split.TEST: (
        "I think this {thing} has a very {p} {x} {j} a very {q} {y}.",
        "{name} and I tried the {thing} in {city}: the {x} is {p} {j} the {y} is {q}.",
        "For {name} the {x} of this {thing} was {p}, {j} its {y} was {q}.",
    ),
}

_WORDINGS: Final[Mapping[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "Is this review positive, negative or mixed? {text}",
        "Rate the mood of this review: {text}",
        "What is the verdict of this review? {text}",
        "{text}\nIs this positive, negative or mixed?",
        "Positive, negative or mixed? {text}",
        "Judge this review: {text}",
        "{text}\nWhat is the mood of the review?",
        "Did they like it? Say positive, negative or mixed. {text}",
        "Give the verdict: {text}",
        "How does this sound: positive, negative or mixed? {text}",
        "{text}\nJudge the review.",
        "{text}\nPositive, negative or mixed?",
        "{text}\nWhat is the verdict?",
        "{text}\nRate the review: positive, negative or mixed?",
        "{text}\nSay its mood.",
        "Read the review and say whether it is positive, negative or mixed. {text}",
        "What do they say: positive, negative or mixed? {text}",
        "Give this review a verdict. {text}",
    ),
    Split.TEST: (
        "Say the mood of this review: positive, negative or mixed? {text}",
        "{text}\nGive the verdict of this review.",
        "Rate this: is it positive, negative or mixed? {text}",
    ),
}

_JUDGEMENTS: Final = {"+": held_out(PRAISE), "-": held_out(COMPLAINTS)}
_SIGNS: Final = {"positive": ("++",), "negative": ("--",), "mixed": ("+-", "-+")}
_LABELS: Final = tuple(_SIGNS)
_PARTS: Final = {thing: dict(zip(Split, held_out(parts), strict=True)) for thing, parts in _ASPECTS.items()}
_NAMES: Final = dict(zip(Split, held_out(NAMES), strict=True))
_CITIES: Final = dict(zip(Split, held_out(CITIES), strict=True))


def _text(random: Random, split: Split, label: str) -> str:
    signs = random.choice(_SIGNS[label])
    judgements = [random.choice(_JUDGEMENTS[sign][0]) for sign in signs]
    if split is Split.TEST:
        at = random.randrange(2)
        judgements[at] = random.choice(_JUDGEMENTS[signs[at]][1])
    thing = random.choice(tuple(_PARTS))
    x, y = random.sample(_PARTS[thing][split], 2)
    written = random.choice(_FRAMES[split]).format(
        thing=thing,
        x=x,
        y=y,
        p=judgements[0],
        q=judgements[1],
        j="but" if label == "mixed" else "and",
        name=random.choice(_NAMES[split]),
        city=random.choice(_CITIES[split]),
    )
    for vowel in "aeiou":
        written = written.replace(f" a {vowel}", f" an {vowel}")
    return written


def example(random: Random, split: Split) -> Example:
    """Draws a review to judge.

    Args:
        random: Where chance comes from.
        split: Whose wordings, frames and words are used.

    Returns:
        The review in a question, and its mood.
    """
    label = random.choice(_LABELS)
    prompt = random.choice(_WORDINGS[split]).format(text=_text(random, split, label))
    return Example(prompt, label, label)


def is_right(asked: Example, answer: str) -> bool:
    """Whether an answer is the mood, as `positive`, `Positive.` or `Verdict: positive`.

    Args:
        asked: What was asked.
        answer: What was answered, whatever it is.

    Returns:
        Whether it is right.
    """
    return is_label(answer, asked.answer, ("verdict:", "mood:"))


def document(random: Random) -> str:
    """Draws two or three reviews as a magazine prints them, each with its verdict.

    Args:
        random: Where chance comes from.

    Returns:
        The reviews, with an empty line between them.
    """
    labels = random.choices(_LABELS, k=random.choice((2, 3)))
    return "\n\n".join(f"{_text(random, Split.TRAIN, label)}\nVerdict: {label}" for label in labels)


TASK: Final = Task("reviews", example, is_right, document)
"""Whether a review is positive, negative or mixed."""
