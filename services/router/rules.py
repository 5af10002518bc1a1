"""The rules gate: how much a text speaks for each expert, by what packages say about themselves. Nothing is trained.

For an expert e, with `idf(t) = 1 / sqrt(experts that have t)`,

    words    = sum over its keywords in the text of idf(k) (1 + (words of k - 1) / 2)
               + CAPABILITY (sum over the values of its capabilities in the text of idf(c)
                             + groups of words that speak for one of its capabilities)
               + HINT if its `router_hint` is true
               - EXCLUDE (its exclude keywords in the text)
    raw      = words + the strengths of syntax in the text that speaks for one of its capabilities
    score    = raw * priority if raw > 0, else raw

and for the base, `BASE`, plus `GENERIC` if the text, or a sentence of it, begins as a general question does. If that
asks what something is, its words name a topic, not a task: `words`, where above 0, counts half. An exclude keyword that
is such a form ("what is") counts there alone: it speaks for the base, and vetoes nothing.

idf has no term in the number of all experts, so an expert that nothing in a text speaks for changes no score at all.
Keywords are whole words or phrases of them, found in one pass over the text by one automaton for all experts; what it
costs grows with the text and with what was found in it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import structlog

from hocket.v1.router_pb2 import EvidenceKind
from services.router import hints
from services.router.prompt_features import (
    GENERIC_FORMS,
    PATTERNS,
    WORD_GROUPS,
    Features,
    Pattern,
    WordGroup,
    features,
    fence_tags,
    normalise,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import UnionType

    from numpy.typing import NDArray

    from hocket.v1.package_pb2 import Package
    from services.router.experts import Expert
    from services.router.prompt_features import Tag

KEYWORDS_MAX: Final = 64
"""Of keywords, and of exclude keywords, so many of an expert's count: the first ones."""
KEYWORD_CHARS_MAX: Final = 64
"""A longer keyword does not count."""
CAPABILITIES_MAX: Final = 64
"""Of an expert's capabilities so many count."""
CAPABILITY: Final = 0.5
"""What the value of a capability adds where it stands in a text."""
CAPABILITY_CHARS_MIN: Final = 3
"""Values of capabilities that are shorter are looked for in no text: `language:en` would be in most."""
HINT: Final = 1.0
"""What a `router_hint` adds where it is true."""
EXCLUDE: Final = 2.0
"""What an exclude keyword takes away."""
BASE: Final = 0.25
"""The base's score for a text that asks for nothing in particular."""
GENERIC: Final = 3.0
"""What a general question adds to the base's score."""
TOPIC_SHARE: Final = 0.5
"""How much words count that name the topic of a question."""
COMMON_COUNT: Final = 16
"""As many experts have a keyword, at least, that is among the commonest words of English."""
_HINTS_READ_MAX: Final = 16
"""Hints are evaluated for so many experts: those that most speaks for otherwise."""
_PHRASE_WORDS_MAX: Final = 8

_COMMON: Final = frozenset(
    words(
        "a about after all an and any are as ask at be before between but by call can change check could "
        "create day did do does each find first for from get give go good had has have help here how i if in "
        "into is it its just know last less like list look make many me more most my name need new no not now "
        "number of old older on one only open or order other our out over people place please point put read "
        "return run say see set should show so some start take tell text than that the their them then there "
        "these they thing this time to two up us use user very want was way we were what when where which who "
        "why will with word work would write year you young younger your"
    )
)
_GENERIC: Final = frozenset(tuple(words(form)) for form in GENERIC_FORMS)
_FENCE_STRENGTH: Final = 2.0
_log: Final = structlog.get_logger("router")

Phrase: TypeAlias = tuple[str, ...]
_Signal: TypeAlias = "Phrase | Pattern | WordGroup | str"
"""What may be found in a text: a phrase, syntax, a group of words, or what fenced code is."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a package says about when it wants to be asked, as the gate reads it.

    Attributes:
        package: It.
        keywords: Phrases that speak for it, each with the keyword as written.
        excludes: Phrases that speak against it.
        capabilities: Phrases of the values of its capabilities, each with the capability.
        tags: Its capabilities.
        hint: Its `router_hint`; None for none.
        hint_phrases: What has to stand in a text for a comparison with this value to be true.
    """

    package: Package
    keywords: Mapping[Phrase, str]
    excludes: Mapping[Phrase, str]
    capabilities: Mapping[Phrase, str]
    tags: frozenset[Tag]
    hint: hints.Expression | None
    hint_phrases: Mapping[str, Phrase]

    @classmethod
    def of(cls, package: Package) -> Terms:
        """Read a package. What is too much, or makes no sense, is left out."""
        stated = package.adapter.routing
        excludes = {phrase: text for phrase, text in _phrases(stated.exclude_keywords) if phrase not in _GENERIC}
        tags = [_tag(text) for text in package.adapter.capabilities[:CAPABILITIES_MAX]]
        hint = hints.parse(stated.router_hint) if stated.router_hint else None
        if stated.router_hint and hint is None:
            _log.warning("router_hint not understood", package=package.digest, router_hint=stated.router_hint[:256])
        return cls(
            package=package,
            keywords=dict(_phrases(stated.keywords)),
            excludes=excludes,
            capabilities={
                phrase: f"{namespace}:{value}" if namespace else value
                for namespace, value in reversed(tags)
                if len(value) >= CAPABILITY_CHARS_MIN and (phrase := _phrase(value))
            },
            tags=frozenset(tags),
            hint=hint,
            hint_phrases={} if hint is None else _hint_phrases(hint),
        )

    def signals(self) -> Iterator[tuple[Pattern | WordGroup | str, float]]:
        """Syntax, groups of words and names of fenced code that speak for its capabilities, and how much."""
        for pattern in PATTERNS:
            if not pattern.tags.isdisjoint(self.tags):
                yield pattern, pattern.strength
        for group in WORD_GROUPS:
            if not group.tags.isdisjoint(self.tags):
                yield group, CAPABILITY
        for value in dict.fromkeys(value for _, value in sorted(self.tags)):
            if not fence_tags(value).isdisjoint(self.tags):
                yield value, _FENCE_STRENGTH


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that speaks for or against a candidate.

    Attributes:
        kind: What it is.
        text: Which.
        contribution: What it adds to the score.
    """

    kind: EvidenceKind.ValueType
    text: str
    contribution: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found in a text.

    Attributes:
        seen: Its features.
        found: Every signal of the gate that is in it.
        scores: A score for each expert of the gate, float64 `[E]`; 0 where nothing was found.
        hinted: Experts, by place, whose hint is true.
    """

    seen: Features
    found: frozenset[_Signal]
    scores: NDArray[np.float64]
    hinted: frozenset[int]

    @property
    def base_score(self) -> float:
        """The base's score."""
        return sum(each.contribution for each in self.base_evidence())

    def base_evidence(self) -> list[Evidence]:
        """What the base's score is made of."""
        evidence = [Evidence(EvidenceKind.EVIDENCE_KIND_PRIOR, "the base", BASE)]
        if self.seen.generic_form:
            evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_GENERIC, self.seen.generic_form, GENERIC))
        return evidence


class RulesGate:
    """The experts that may answer on one base, ready to be scored. It never changes once it is made.

    Args:
        experts: Each package once; scores come in this order.
        read: What was read of packages before, by digest.

    Attributes:
        experts: As given.
        terms: What was read of each.
        sizes_bytes: What each takes, float64 `[E]`.
    """

    def __init__(self, experts: Sequence[Expert], read: Mapping[str, Terms]) -> None:
        self.experts = tuple(experts)
        self.terms = tuple(
            known
            if (known := read.get(expert.package.digest)) is not None and known.package is expert.package
            else Terms.of(expert.package)
            for expert in experts
        )
        self.sizes_bytes = np.array([expert.package.adapter.parameter_bytes for expert in experts], dtype=np.float64)
        self._priorities = np.array([expert.package.adapter.routing.priority for expert in experts], dtype=np.float64)
        self._priorities = np.clip(np.nan_to_num(self._priorities), 0.0, 1.0)
        self._keyword_counts = Counter(phrase for terms in self.terms for phrase in terms.keywords)
        self._capability_counts = Counter(phrase for terms in self.terms for phrase in terms.capabilities)
        self._next: dict[tuple[int, str], int] = {}
        self._ends: dict[int, list[Phrase | WordGroup]] = {}
        self._states = 0
        posted = self._posted()
        ends = accumulate(map(len, posted.values()))
        self._postings = {
            signal: slice(end - len(held), end) for (signal, held), end in zip(posted.items(), ends, strict=True)
        }
        self._places = np.fromiter(chain.from_iterable(posted.values()), dtype=np.intp)
        self._weights = np.fromiter(chain.from_iterable(held.values() for held in posted.values()), dtype=np.float64)
        for signal in self._postings:
            if isinstance(signal, tuple):
                self._add(signal, signal)
        for group in WORD_GROUPS:
            for text in group.phrases:
                self._add(tuple(words(text)), group)

    def read(self, text: str) -> Reading:
        """Score every expert by a text that `gate_text` gave."""
        seen = features(text)
        found = self._find(seen)
        places = self._joined(self._places, found)
        if not len(places):
            return Reading(seen, frozenset(found), np.zeros(len(self.experts)), frozenset())
        by_words = self._sum(signal for signal in found if not isinstance(signal, Pattern | str))
        by_syntax = self._sum(signal for signal in found if isinstance(signal, Pattern | str))
        hinted = self._hinted(np.unique(places), by_words + by_syntax, seen, found)
        by_words[np.array(hinted, dtype=np.intp)] += HINT
        if seen.is_definition:
            by_words = np.where(by_words > 0, by_words * TOPIC_SHARE, by_words)
        raw = by_words + by_syntax
        return Reading(seen, frozenset(found), np.where(raw > 0, raw * self._priorities, raw), frozenset(hinted))

    def evidence(self, place: int, reading: Reading) -> list[Evidence]:
        """What the score of the expert at a place is made of."""
        terms = self.terms[place]
        evidence = [
            Evidence(EvidenceKind.EVIDENCE_KIND_KEYWORD, text, self._keyword_weight(phrase))
            for phrase, text in terms.keywords.items()
            if phrase in reading.found
        ]
        evidence += [
            Evidence(EvidenceKind.EVIDENCE_KIND_CAPABILITY, text, self._capability_weight(phrase))
            for phrase, text in terms.capabilities.items()
            if phrase in reading.found
        ]
        evidence += _found_signals(terms, reading, WordGroup)
        if place in reading.hinted:
            hint = terms.package.adapter.routing.router_hint
            evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_HINT, hint, HINT))
        evidence += [
            Evidence(EvidenceKind.EVIDENCE_KIND_EXCLUDE, text, -EXCLUDE)
            for phrase, text in terms.excludes.items()
            if phrase in reading.found
        ]
        by_words = sum(each.contribution for each in evidence)
        if reading.seen.is_definition and by_words > 0:
            lost = by_words * (TOPIC_SHARE - 1.0)
            evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_GENERIC, reading.seen.generic_form, lost))
        evidence += _found_signals(terms, reading, Pattern | str)
        raw = sum(each.contribution for each in evidence)
        priority = float(self._priorities[place])
        if raw > 0 and priority != 1.0:
            evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_PRIORITY, f"{priority:g}", raw * (priority - 1.0)))
        return evidence

    def _sum(self, signals: Iterable[_Signal]) -> NDArray[np.float64]:
        """What signals add to the score of every expert."""
        signals = tuple(signals)
        places, weights = self._joined(self._places, signals), self._joined(self._weights, signals)
        return np.bincount(places, weights, len(self.experts)).astype(np.float64, copy=False)

    def _joined(self, values: NDArray[Any], signals: Iterable[_Signal]) -> NDArray[Any]:
        """The postings of signals, one after the other."""
        slices = [values[self._postings[signal]] for signal in signals if signal in self._postings]
        return np.concatenate(slices) if slices else values[:0]

    def _posted(self) -> dict[_Signal, dict[int, float]]:
        """For every signal the experts, by place, whose score it changes, and by how much."""
        posted: dict[_Signal, dict[int, float]] = {}

        def add(signal: _Signal, place: int, weight: float) -> None:
            held = posted.setdefault(signal, {})
            held[place] = held.get(place, 0.0) + weight

        for place, terms in enumerate(self.terms):
            for phrase in terms.keywords:
                add(phrase, place, self._keyword_weight(phrase))
            for phrase in terms.capabilities:
                add(phrase, place, self._capability_weight(phrase))
            for phrase in terms.excludes:
                add(phrase, place, -EXCLUDE)
            for signal, strength in terms.signals():
                add(signal, place, strength)
            for phrase in terms.hint_phrases.values():
                add(phrase, place, 0.0)  # it leads to the expert, whose hint is then evaluated
        return posted

    def _keyword_weight(self, phrase: Phrase) -> float:
        count = self._keyword_counts[phrase]
        if len(phrase) == 1 and phrase[0] in _COMMON:
            count = max(count, COMMON_COUNT)
        return (1.0 + (len(phrase) - 1) / 2) / math.sqrt(count)

    def _capability_weight(self, phrase: Phrase) -> float:
        return CAPABILITY / math.sqrt(self._capability_counts[phrase])

    def _add(self, phrase: Phrase, found: Phrase | WordGroup) -> None:
        state = 0
        for word in phrase:
            known = self._next.get((state, word))
            if known is None:
                self._states += 1
                known = self._next[state, word] = self._states
            state = known
        self._ends.setdefault(state, []).append(found)

    def _find(self, seen: Features) -> dict[_Signal, None]:
        """Every signal in a text, in the order in which they are first met: sums come out the same every time."""
        found: dict[_Signal, None] = dict.fromkeys([*seen.patterns, *sorted(seen.fenced)])
        following, ends = self._next, self._ends
        for begin, first in enumerate(seen.words):
            state = following.get((0, first))
            at = begin
            while state is not None:
                if state in ends:
                    found.update(dict.fromkeys(ends[state]))
                at += 1
                state = following.get((state, seen.words[at])) if at < len(seen.words) else None
        return found

    def _hinted(
        self, touched: NDArray[np.intp], raw: NDArray[np.float64], seen: Features, found: Mapping[_Signal, None]
    ) -> list[int]:
        hinting = [int(place) for place in touched if self.terms[place].hint is not None]
        if len(hinting) > _HINTS_READ_MAX:
            hinting = sorted(hinting, key=lambda place: (-raw[place], place))[:_HINTS_READ_MAX]
        tags = {tag for signal in found if not isinstance(signal, tuple) for tag in _tags_of(signal)}

        def is_true(terms: Terms) -> bool:
            phrases = terms.hint_phrases
            return terms.hint is not None and hints.holds(
                terms.hint, lambda tag: tag in tags or phrases.get(tag[1]) in found, seen.numbers
            )

        return [place for place in hinting if is_true(self.terms[place])]


def _found_signals(terms: Terms, reading: Reading, kind: type | UnionType) -> list[Evidence]:
    return [
        Evidence(EvidenceKind.EVIDENCE_KIND_PATTERN, signal if isinstance(signal, str) else signal.name, strength)
        for signal, strength in terms.signals()
        if isinstance(signal, kind) and signal in reading.found
    ]


def _phrases(texts: Iterable[str]) -> Iterator[tuple[Phrase, str]]:
    """Of a package's keywords those that count."""
    for place, text in enumerate(texts):
        if place == KEYWORDS_MAX:
            return
        if len(text) <= KEYWORD_CHARS_MAX and (phrase := _phrase(text)):
            yield phrase, text


def _phrase(text: str) -> Phrase:
    """The words of a text that may be looked for; none where there are none, or too many."""
    found = tuple(words(text)) if len(text) <= KEYWORD_CHARS_MAX else ()
    return found if len(found) <= _PHRASE_WORDS_MAX else ()


def _tag(text: str) -> Tag:
    namespace, colon, value = normalise(text[: 2 * KEYWORD_CHARS_MAX]).partition(":")
    return (namespace, value) if colon else ("", namespace)


def _tags_of(signal: Pattern | WordGroup | str) -> frozenset[Tag]:
    return fence_tags(signal) if isinstance(signal, str) else signal.tags


def _hint_phrases(hint: hints.Expression) -> dict[str, Phrase]:
    return {
        term.value: phrase for term in hints.terms(hint) if term.operator == "=" and (phrase := _phrase(term.value))
    }
