"""The rules gate: how much a text speaks for each expert, by what packages say about themselves. Nothing is trained.

For an expert e,

    words    = sum over its keywords in the text of weight(k)
               + CAPABILITY (sum over the values of its capabilities in the text of specificity(c)
                             + groups of words that speak for one of its capabilities)
               + COMMON if any of these consists of the commonest words alone
               + HINT if its `router_hint` is true
               - EXCLUDE (its exclude keywords in the text)
    weight   = specificity(k) (1 + (words of k - 1) / 2)
    raw      = words + the strengths of syntax in the text that speaks for one of its capabilities
    score    = raw * priority if raw > 0, else raw

where specificity is 1, `EVERYDAY` for what consists of words of everyday English, and 0 for the commonest ones. For the
base it is `BASE`, plus `GENERIC` if the text asks what something is, or for talk, or `QUESTION` if it asks anything
else without data to ask it of. The words of such a question name a topic, not a task: `words`, where above 0, count
half.

An exclude keyword that is such a form ("what is") counts there alone: it speaks for the base, and vetoes nothing.

Scores tell experts from the base. Experts are told from each other by *ranks*, which are scores in which every keyword
and value of a capability is multiplied by `idf = max(1 / sqrt(experts that have it), IDF_MIN)`: a publisher who says
what others say takes part of their requests, and sends none of them to the base. idf has no term in the number of all
experts, so an expert that nothing in a text speaks for changes nothing at all.

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
    WEAK,
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

RULES_VERSION: Final = 1
"""Counted up by whoever changes what the same text and the same experts come to."""
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
PRIORITY: Final = 0.5
"""The priority of an expert that states none."""
BASE: Final = 0.25
"""The base's score for a text that asks for nothing in particular."""
GENERIC: Final = 3.0
"""What a general question adds to the base's score."""
TOPIC_SHARE: Final = 0.5
"""How much words count that name the topic of a question."""
QUESTION: Final = 1.0
"""What any other question adds that there is nothing beside to be about."""
COMMON: Final = 0.25
"""What keywords add, all together, that consist of the commonest words of English."""
EVERYDAY: Final = 0.5
"""How much a keyword counts that consists of words of everyday English: most texts with one mean something else."""
IDF_MIN: Final = 0.25
"""However many experts have a term, it counts so much when they are compared."""
_HINTS_READ_MAX: Final = 16
"""Hints are evaluated for so many experts: those that most speaks for otherwise."""
_PHRASE_WORDS_MAX: Final = 8

_COMMON: Final = frozenset(
    words(
        "a about after all an and any are as ask at be before between but by call can change check could "
        "create day did do does each find first for from get give go good had has have help here how i if in "
        "into is it its just know last less like list look make many me more most my name need new no not now "
        "number of old on one only open or other our out over please put read "
        "return run say see set should show so some start take tell text than that the their them then there "
        "these they thing this time to two up us use very want was way we were what when where which who "
        "why will with work would write you young your"
    )
)
_EVERYDAY: Final = frozenset(
    words(
        "account age air amount animal answer apple area arm art article away baby back bad ball band bank "
        "bar bed best better big bill bird black block blue board boat body book bottle bottom box boy bread "
        "break bridge build business button buy car card care case cat category cause cell centre century "
        "chain chair chance character child church city class clean clear clock close clothes club coffee "
        "cold college colour color column company computer cost count country couple course cover cup "
        "customer cut dance dark date day dead deal death degree depth dinner direction distance doctor "
        "document dog door dream dress drink drive drop ear east edge egg employee end energy enjoy evening "
        "event example extract eye face fact fall family farm fast father feel feeling field figure file fill "
        "film final finger fire fish flat floor flower food foot form free fresh friend front fruit full fun "
        "game garden girl glass goal gold grass great green ground group hair half hall hand happy hard head "
        "health hear heart heat heavy high hill history hit hold hole holiday home hope horse hospital hot "
        "hotel hour house human ice idea image inch insert island item job join keep key kid kind king "
        "kitchen label lake land language large late law learn leave left leg lesson letter level lie life "
        "light line lion listen live long lose lost love low lunch machine mail main man map mark market "
        "master match meal mean meaning measure meat medium meet member memory message metre middle milk mind "
        "minute mirror mix mixed model moment money month mood moon morning mother mountain mouth move movie "
        "music name nature negative neck news next night nice noise normal north nose note object ocean office oil "
        "opinion page paint pair paper parent park part party pass past path pattern pay pen person phone "
        "photo pick picture piece plan plane plant plate play point pool poor positive post pound power "
        "present pressure price problem product program property question quick radio rain rate reason recipe "
        "record red relation relationship remember rest restaurant result rich right ring rise river road "
        "rock role roof room root round row rule salt school science score sea season seat second section see "
        "select sense sentence series serve service share sheet ship shirt shoe shop short shoulder side sign "
        "simple sister size skin sky sleep slow small smile snow soft song sound soup south space speak speed "
        "sport spring square staff stage stamp star station stay step stock stone stop store storm story "
        "street string strong student study style subject sugar summer sun support surface sweet system table "
        "tag talk tall taste tax tea teach teacher team term test theme thank think thought ticket tie tip "
        "title today together tool tooth top total touch town toy track trade train travel tree trip trouble "
        "truck true trust try turn type union unit value vegetable verdict view village visit voice vote wait "
        "walk wall war warm watch water wave weather wedding week weight west wheel white whole wide wife "
        "wild win wind window wine winter wish woman wood world yard year "
        "older order people place point user word younger"
    )
)
"""Words of everyday English that have more than one meaning, or are part of any talk."""
_GENERIC: Final = frozenset(tuple(words(form)) for form in GENERIC_FORMS)
_FENCE_STRENGTH: Final = 2.0
_log: Final = structlog.get_logger("router")

Phrase: TypeAlias = tuple[str, ...]
_Signal: TypeAlias = "Phrase | Pattern | WordGroup | str"
"""What may be found in a text: a phrase, syntax, a group of words, or what fenced code is."""
_Weights: TypeAlias = tuple[float, float, float]
"""What a signal adds to the score and to the rank of an expert, and whether it consists of the commonest words."""
_NOTHING: Final = (0.0, 0.0, 0.0)


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
        hint_tags: What its `router_hint` asks for: it counts where one of these is found.
        hint_phrases: What has to stand in a text for a comparison with this value to be true.
    """

    package: Package
    keywords: Mapping[Phrase, str]
    excludes: Mapping[Phrase, str]
    capabilities: Mapping[Phrase, str]
    tags: frozenset[Tag]
    hint: hints.Expression | None
    hint_tags: frozenset[Tag]
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
            hint_tags=frozenset() if hint is None else frozenset(hints.wanted(hint)),
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

    def hint_signals(self) -> Iterator[_Signal]:
        """Where its `router_hint` may be true: what is found of what it asks for."""
        yield from self.hint_phrases.values()
        for sign in (*PATTERNS, *WORD_GROUPS):
            if not sign.tags.isdisjoint(self.hint_tags):
                yield sign
        for value in sorted({value for _, value in self.hint_tags}):
            if not fence_tags(value).isdisjoint(self.hint_tags):
                yield value


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
        ranks: What experts are compared by with each other, float64 `[E]`.
        hinted: Experts, by place, whose hint is true.
    """

    seen: Features
    found: frozenset[_Signal]
    scores: NDArray[np.float64]
    ranks: NDArray[np.float64]
    hinted: frozenset[int]

    @property
    def base_score(self) -> float:
        """The base's score."""
        return sum(each.contribution for each in self.base_evidence())

    def base_evidence(self) -> list[Evidence]:
        """What the base's score is made of."""
        evidence = [Evidence(EvidenceKind.EVIDENCE_KIND_PRIOR, "the base", BASE)]
        if self.seen.generic_form:
            weight = QUESTION if self.seen.is_open else GENERIC
            evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_GENERIC, self.seen.generic_form, weight))
        return evidence


class RulesGate:
    """The experts that may answer on one base, ready to be scored. It never changes once it is made.

    Args:
        experts: Each package once; scores come in this order.
        terms: What was read of their packages, by digest.

    Attributes:
        experts: As given.
        terms: What was read of each.
        sizes_bytes: What each takes, float64 `[E]`.
    """

    def __init__(self, experts: Sequence[Expert], terms: Mapping[str, Terms]) -> None:
        self.experts = tuple(experts)
        self.terms = tuple(terms[expert.package.digest] for expert in experts)
        self.sizes_bytes = np.array([expert.package.adapter.parameter_bytes for expert in experts], dtype=np.float64)
        self._priorities = np.array([_priority(expert.package) for expert in experts], dtype=np.float64)
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
        weights = chain.from_iterable(chain.from_iterable(held.values()) for held in posted.values())
        self._weights = np.fromiter(weights, dtype=np.float64).reshape(-1, len(_NOTHING))
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
            nothing = np.zeros(len(self.experts))
            return Reading(seen, frozenset(found), nothing, nothing, frozenset())
        by_words = self._sum(signal for signal in found if not isinstance(signal, Pattern | str))
        by_syntax = self._sum(signal for signal in found if isinstance(signal, Pattern | str))
        by_words[:2] += COMMON * (by_words[2] > 0)
        hinted = self._hinted(np.unique(places), by_words[0] + by_syntax[0], seen, found)
        by_words[:2, np.array(hinted, dtype=np.intp)] += HINT
        if seen.is_definition:
            by_words = np.where(by_words > 0, by_words * TOPIC_SHARE, by_words)
        raw = by_words + by_syntax
        scores, ranks, _ = np.where(raw > 0, raw * self._priorities, raw)
        return Reading(seen, frozenset(found), scores, ranks, frozenset(hinted))

    def evidence(self, place: int, reading: Reading) -> list[Evidence]:
        """What the score of the expert at a place is made of."""
        terms = self.terms[place]
        keyword, capability = EvidenceKind.EVIDENCE_KIND_KEYWORD, EvidenceKind.EVIDENCE_KIND_CAPABILITY
        matched = [
            (kind, text, weigh(phrase))
            for kind, phrases, weigh in (
                (keyword, terms.keywords, _keyword_weight),
                (capability, terms.capabilities, _capability_weight),
            )
            for phrase, text in phrases.items()
            if phrase in reading.found
        ]
        evidence = [Evidence(kind, text, weight) for kind, text, weight in matched if weight]
        evidence += [Evidence(kind, text, COMMON) for kind, text, weight in matched if not weight][:1]
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
        """What signals add for every expert, float64 `[3, E]`: to scores, to ranks, and how many are common words."""
        signals = tuple(signals)
        places, weights = self._joined(self._places, signals), self._joined(self._weights, signals)
        count = len(self.experts)
        return np.stack([np.bincount(places, column, count) for column in weights.T]).astype(np.float64, copy=False)

    def _joined(self, values: NDArray[Any], signals: Iterable[_Signal]) -> NDArray[Any]:
        """The postings of signals, one after the other."""
        slices = [values[self._postings[signal]] for signal in signals if signal in self._postings]
        return np.concatenate(slices) if slices else values[:0]

    def _posted(self) -> dict[_Signal, dict[int, _Weights]]:
        """For every signal the experts, by place, for whom it changes something, and what."""
        posted: dict[_Signal, dict[int, _Weights]] = {}

        def add(signal: _Signal, place: int, weight: float, idf: float = 1.0, common: float = 0.0) -> None:
            held = posted.setdefault(signal, {})
            score, rank, count = held.get(place, _NOTHING)
            held[place] = (score + weight, rank + weight * idf, count + common)

        for place, terms in enumerate(self.terms):
            for phrase in terms.keywords:
                idf = _idf(self._keyword_counts[phrase])
                add(phrase, place, _keyword_weight(phrase), idf, float(not _specificity(phrase)))
            for phrase in terms.capabilities:
                idf = _idf(self._capability_counts[phrase])
                add(phrase, place, _capability_weight(phrase), idf, float(not _specificity(phrase)))
            for phrase in terms.excludes:
                add(phrase, place, -EXCLUDE)
            for signal, strength in terms.signals():
                add(signal, place, strength)
            for wanted in terms.hint_signals():
                add(wanted, place, 0.0)  # it leads to the expert, whose hint is then evaluated
        return posted

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
        signs = [signal for signal in found if not isinstance(signal, tuple)]
        tags = {tag for sign in signs if not _is_weak(sign) for tag in _tags_of(sign)}

        def is_true(terms: Terms) -> bool:
            def is_there(tag: Tag) -> bool:
                return tag in tags or terms.hint_phrases.get(tag[1]) in found

            return (
                terms.hint is not None
                and any(map(is_there, terms.hint_tags))
                and hints.holds(terms.hint, is_there, seen.numbers)
            )

        return [place for place in hinting if is_true(self.terms[place])]


def _specificity(phrase: Phrase) -> float:
    """1 for a phrase with a word that is not everyday English; 0 for one of the commonest words alone."""
    rare = [word for word in phrase if word not in _COMMON]
    if not rare:
        return 0.0
    return EVERYDAY if all(word in _EVERYDAY for word in rare) else 1.0


def _keyword_weight(phrase: Phrase) -> float:
    return (1.0 + (len(phrase) - 1) / 2) * _specificity(phrase)


def _capability_weight(phrase: Phrase) -> float:
    return CAPABILITY * _specificity(phrase)


def _idf(count: int) -> float:
    return max(1.0 / math.sqrt(count), IDF_MIN)


def _priority(package: Package) -> float:
    stated = package.adapter.routing
    return stated.priority if stated.HasField("priority") else PRIORITY


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


def _is_weak(signal: Pattern | WordGroup | str) -> bool:
    return isinstance(signal, Pattern) and signal.strength <= WEAK


def _tags_of(signal: Pattern | WordGroup | str) -> frozenset[Tag]:
    return fence_tags(signal) if isinstance(signal, str) else signal.tags


def _hint_phrases(hint: hints.Expression) -> dict[str, Phrase]:
    """Words that a hint may be true of; those of everyday English are in any text."""
    return {
        term.value: phrase
        for term in hints.terms(hint)
        if term.operator == "=" and (phrase := _phrase(term.value)) and _specificity(phrase) == 1.0
    }
