"""The task of the expert for topics: to say which of six topics a short text is about.

The sentence frames say nothing of a topic: the cue words in them do. Held out of `TRAIN` are every fifth cue word, name
and city, some frames and some wordings. A text of `TEST` has one cue word that `TRAIN` knows and one that it does not:
it can be decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from training.starter.labels import is_label
from training.starter.task import Example, Split, Task
from training.starter.words import CITIES, NAMES, held_out, listed, spliced

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

CUES: Final[Mapping[str, tuple[str, ...]]] = {
    "sport": listed(
        "goal team match coach league referee striker stadium tournament player race runner swimmer tennis football "
        "basketball champion medal trophy goalkeeper marathon cyclist boxing penalty training opponent athlete finish "
        "sprint "
        "defender captain final scoreboard gym skiing hockey racket relay rugby victory"
    ),
    "weather": listed(
        "rain storm snow wind cloud sunshine fog frost thunder temperature forecast hail drizzle breeze hurricane "
        "lightning "
        "heatwave umbrella flood humidity ice-storm rainbow downpour blizzard sky shower drought mist gale sleet thaw "
        "thermometer barometer heat cold-front climate degrees dew whirlwind cyclone"
    ),
    "food": listed(
        "bread soup cheese recipe kitchen cook salad pasta pizza restaurant dinner lunch breakfast sauce butter rice "
        "cake "
        "oven pepper garlic onion tomato dessert chef menu meal potato chocolate bakery flavour stew sandwich pancake "
        "honey "
        "yoghurt spice noodle omelette jam biscuit"
    ),
    "travel": listed(
        "flight train airport hotel passport ticket luggage beach tourist journey holiday suitcase station ferry "
        "island map "
        "guide cruise visa campsite border harbour plane itinerary voyage hostel backpack platform passenger "
        "museum-tour "
        "departure arrival sightseeing road-trip customs souvenir coach-tour resort timetable boarding-pass"
    ),
    "money": listed(
        "bank loan interest price tax budget salary share market profit euro dollar account invoice debt investor "
        "currency "
        "mortgage payment credit stock fund inflation pension fee savings bill wage cheque economy coin income "
        "insurance "
        "discount deposit bond refund rent dividend accountant"
    ),
    "health": listed(
        "doctor hospital patient medicine nurse fever vaccine illness surgery pain clinic heart diet sleep virus cough "
        "headache therapy pharmacy dentist pill blood infection treatment symptom allergy bandage flu muscle-pain "
        "operation "
        "pulse disease vitamin lung wound stress diabetes remedy ward recovery"
    ),
}
"""The words that tell each topic."""

_FRAMES: Final[Mapping[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "The {c} and the {d} were the talk of {city} on {day}.",
        "{name} wrote to us from {city} about the {c} and the {d}.",
        "News from {city}: the {c} is here, and the {d} comes on {day}.",
        "Dear {name}, the {c} was good, but the {d} was bad.",
        "On {day} {name} spoke in {city} about the {c}. The {d} was the next question.",
        "People in {city} ask about the {c}. {name} says that the {d} will change.",
        "After the {c} came the {d}, says {name}.",
        "Hello {name}, please tell me more about the {c} and about the {d}.",
        "A new {c} was seen in {city} this week. It changed the {d}.",
        "{name} and {friend} could not agree about the {c}: the {d} was too much.",
        "This week the {c} in {city} was better than the {d}.",
        "I will send you the {c} on {day}. Do not forget the {d}. {name}",
        "The {c}, the {d} and the {e}: what {city} should know on {day}.",
        "{city} had no {c} on {day}, and the {d} did not help.",
    ),
    Split.TEST: (
        "{name} says that the {c} in {city} will change the {d}.",
        "On {day} the {c} and the {d} came to {city}.",
        "Dear {name}, do not forget the {c}. I will tell you more about the {d} on {day}.",
        "The talk of this week in {city} was the {c}: it was better than the {d}.",
    ),
}

_WORDINGS: Final[Mapping[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "Which topic is this text about? {text}",
        "Classify this document: {text}",
        "What is the topic of this text? {text}",
        "{text}\nWhich topic is it?",
        "Name the topic: {text}",
        "What is this about: {text}",
        "Give this document one label: {text}",
        "{text}\nWhat is the text about?",
        "In which section of the paper does this text belong? {text}",
        "Classify the text by topic.\n{text}",
        "Where should I file this? {text}",
        "Sort this mail into a section: {text}",
    ),
    Split.TEST: (
        "What topic does this document belong to? {text}",
        "{text}\nName the section of the paper for this.",
        "Which label should I give this mail? {text}",
    ),
}

_STRANGE: Final = 0.4
"""So that one cue is enough: who learns from two at once is lost where one of them is new."""
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CUES: Final = {topic: held_out(words) for topic, words in CUES.items()}
_NAMES: Final = dict(zip(Split, held_out(NAMES), strict=True))
_CITIES: Final = dict(zip(Split, held_out(CITIES), strict=True))
_TOPICS: Final = tuple(CUES)


def _text(random: Random, split: Split, topic: str, strange: float = 0.0) -> str:
    """A text with two cues or three; in a share of those of `TRAIN`, one is a word that means nothing."""
    kept, held = _CUES[topic]
    cues = random.sample(kept, 3)
    if split is Split.TEST:
        cues[random.randrange(2)] = random.choice(held)
    elif random.random() < strange:
        cues[random.randrange(2)] = spliced(random)
    name, friend = random.sample(_NAMES[split], 2)
    shown: dict[str, Any] = dict(zip("cde", (cue.replace("-", " ") for cue in cues), strict=True))
    return random.choice(_FRAMES[split]).format(
        name=name, friend=friend, city=random.choice(_CITIES[split]), day=random.choice(_DAYS), **shown
    )


def example(random: Random, split: Split) -> Example:
    """Draws a text to classify.

    Args:
        random: Where chance comes from.
        split: Whose wordings, frames and words are used.

    Returns:
        The text in a question, and its topic.
    """
    topic = random.choice(_TOPICS)
    prompt = random.choice(_WORDINGS[split]).format(text=_text(random, split, topic, _STRANGE))
    return Example(prompt, topic, topic)


def is_right(asked: Example, answer: str) -> bool:
    """Whether an answer is the topic, as `sport`, `Sport.` or `Topic: sport`.

    Args:
        asked: What was asked.
        answer: What was answered, whatever it is.

    Returns:
        Whether it is right.
    """
    return is_label(answer, asked.answer, ("topic:",))


def document(random: Random) -> str:
    """Draws two or three news items as a paper prints them, each with the section that it is filed under.

    Args:
        random: Where chance comes from.

    Returns:
        The items, with an empty line between them.
    """
    topics = random.choices(_TOPICS, k=random.choice((2, 3)))
    return "\n\n".join(f"{_text(random, Split.TRAIN, topic)}\nFiled under: {topic}" for topic in topics)


TASK: Final = Task("topics", example, is_right, document)
"""Which topic a short text is about."""
