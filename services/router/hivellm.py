"""`policy: hivellm`: the scores of the routers that the `.expert` format's own tools have, number for number.

The list of general questions and the chat router decide; the keyword router and the embedding router are shown beside
them. All of them look for texts inside texts: `language:en` is in every "when". That is why
the rules gate is the default; this is for those who compare the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.v1.router_pb2 import EvidenceKind
from services.router.rules import CAPABILITIES_MAX, KEYWORD_CHARS_MAX, KEYWORDS_MAX, Evidence

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hocket.v1.package_pb2 import AdapterFacts

_GENERAL: Final = (
    *("what is", "what are", "who is", "who are", "where is", "where are", "when is", "when are", "how to", "how do"),
    *("why", "explain", "meaning of", "definition of", "describe", "tell me about", "can you explain"),
)
_EXCLUDE: Final = 2.0
_CAPABILITY: Final = 0.5
_DIMENSIONS: Final = 128
_COSINE_SHARE: Final = 0.7
_MASK: Final = 2**64 - 1
_WORDS_MAX: Final = 256
"""Of a text's words, so many are compared with keywords by the embedding router: the first ones."""
_PART_CHARS: Final = 3
_HASHED_MAX: Final = 65_536
"""Hashes that are kept, those of keywords and capabilities: they come back with every text."""


@dataclass(frozen=True)
class Said:
    """A text as these routers look at it, each way once, when somebody asks for it.

    Attributes:
        text: It.
    """

    text: str

    @cached_property
    def lower(self) -> str:
        """It in lower case."""
        return self.text.lower()

    @cached_property
    def words(self) -> Sequence[str]:
        """What stands between white space."""
        return self.lower.split()

    @cached_property
    def vector(self) -> NDArray[np.float64]:
        """The bag of its first words, of length 1."""
        return _unit(_bag(map(siphash13, self.words[:_WORDS_MAX])))

    @cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset(self.lower[at : at + _PART_CHARS] for at in range(len(self.lower) - _PART_CHARS + 1))

    def has(self, text: str) -> bool:
        """Whether a text is in its lower case. Thousands are asked for: most fail by how they begin or end."""
        if len(text) >= _PART_CHARS and not (text[:_PART_CHARS] in self._parts and text[-_PART_CHARS:] in self._parts):
            return False
        return text in self.lower


def general_question(said: Said) -> str:
    """Which of the general questions is anywhere in a text; empty for none."""
    return next((form for form in _GENERAL if said.has(form)), "")


def chat_evidence(said: Said, facts: AdapterFacts) -> list[Evidence]:
    """What the chat router's score of an expert is made of: its sum is the score."""
    keyword, exclude = EvidenceKind.EVIDENCE_KIND_KEYWORD, EvidenceKind.EVIDENCE_KIND_EXCLUDE
    evidence = [Evidence(keyword, word, 1.0) for word in _capped(facts.routing.keywords) if said.has(word)]
    evidence += [
        Evidence(exclude, word, -_EXCLUDE) for word in _capped(facts.routing.exclude_keywords) if said.has(word)
    ]
    score = sum(each.contribution for each in evidence)
    priority = _priority(facts)
    if score and priority != 1.0:
        evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_PRIORITY, f"{priority:g}", score * (priority - 1.0)))
    return evidence + [
        Evidence(EvidenceKind.EVIDENCE_KIND_CAPABILITY, capability, _CAPABILITY)
        for capability in facts.capabilities[:CAPABILITIES_MAX]
        if ":" in capability and said.has(capability.partition(":")[2])
    ]


def keyword_score(said: Said, facts: AdapterFacts) -> float:
    """The keyword router's score: the share of an expert's keywords that are words of a text, times its priority."""
    keywords = set(_capped(facts.routing.keywords))
    matched = keywords.intersection(said.words)
    return len(matched) / max(len(keywords), 1) * _priority(facts)


def embedding_score(said: Said, facts: AdapterFacts) -> float:
    """The embedding router's score: hashed bags of words compared, and keywords that overlap with words of a text.

    Of the text its first `_WORDS_MAX` words.
    """
    words = dict.fromkeys(said.words[:_WORDS_MAX])
    keywords = _capped(facts.routing.keywords)
    expert = _bag(map(_kept_hash, keywords))
    for capability in facts.capabilities[:CAPABILITIES_MAX]:
        expert[_kept_hash(capability.lower()) % _DIMENSIONS] += 0.5
    cosine = float(_unit(expert) @ said.vector)
    matched = sum(any(word in keyword or keyword in word for word in words) for keyword in keywords)
    share = matched / max(len(keywords), 1)
    return (_COSINE_SHARE * cosine + (1.0 - _COSINE_SHARE) * share) * _priority(facts)


def siphash13(text: str) -> int:
    """SipHash-1-3 of a text's UTF-8 and one byte 255, under the key 0: how Rust's default hasher hashes texts.

    J.-P. Aumasson and D. J. Bernstein, "SipHash: a fast short-input PRF" (2012), with one and three rounds.
    """
    data = text.encode() + b"\xff"
    a, b, c, d = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573
    whole = len(data) - len(data) % 8
    blocks = [int.from_bytes(data[at : at + 8], "little") for at in range(0, whole, 8)]
    for block in (*blocks, int.from_bytes(data[whole:], "little") | (len(data) & 0xFF) << 56):
        a, b, c, d = _round(a, b, c, d ^ block)
        a ^= block
    c ^= 0xFF
    for _ in range(3):
        a, b, c, d = _round(a, b, c, d)
    return a ^ b ^ c ^ d


_kept_hash: Final = lru_cache(_HASHED_MAX)(siphash13)


def _round(a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
    a = (a + b) & _MASK
    b = _rotated(b, 13) ^ a
    a = _rotated(a, 32)
    c = (c + d) & _MASK
    d = _rotated(d, 16) ^ c
    a = (a + d) & _MASK
    d = _rotated(d, 21) ^ a
    c = (c + b) & _MASK
    b = _rotated(b, 17) ^ c
    return a, b, _rotated(c, 32), d


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> (64 - bits)) & _MASK


def _priority(facts: AdapterFacts) -> float:
    """The factor of scores; where none is stated nothing is multiplied."""
    return facts.routing.priority if facts.routing.HasField("priority") else 1.0


def _capped(keywords: Sequence[str]) -> list[str]:
    """Of a package's keywords those that count. Lower-case they are already."""
    return [keyword for keyword in keywords[:KEYWORDS_MAX] if len(keyword) <= KEYWORD_CHARS_MAX]


def _bag(hashes: Iterable[int]) -> NDArray[np.float64]:
    """A vector with a dimension for each hash; the first counts 1, the next a half, a third, and so on."""
    bag = np.zeros(_DIMENSIONS)
    for place, each in enumerate(hashes, 1):
        bag[each % _DIMENSIONS] += 1.0 / place
    return bag


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = math.sqrt(vector @ vector)
    return vector / length if length else vector
