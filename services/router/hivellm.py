"""`policy: hivellm`: the scores of the routers that the `.expert` format's own tools have, number for number.

The list of general questions and the chat router decide; the keyword router and the embedding router are shown beside
them. All of them look for texts inside texts: `language:en` is in every "when". That is why
the rules gate is the default; this is for those who compare the two.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.v1.router_pb2 import EvidenceKind
from services.router.rules import CAPABILITIES_MAX, KEYWORD_CHARS_MAX, KEYWORDS_MAX, Evidence

if TYPE_CHECKING:
    from collections.abc import Iterable

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
_HASHED_MAX: Final = 65_536
"""Hashes that are kept: those of keywords and capabilities come back with every text."""


def general_question(text: str) -> str:
    """Which of the general questions is anywhere in a text; empty for none."""
    lower = text.lower()
    return next((form for form in _GENERAL if form in lower), "")


def chat_evidence(text: str, facts: AdapterFacts) -> list[Evidence]:
    """What the chat router's score of an expert is made of: its sum is the score."""
    lower = text.lower()
    keyword, exclude = EvidenceKind.EVIDENCE_KIND_KEYWORD, EvidenceKind.EVIDENCE_KIND_EXCLUDE
    evidence = [Evidence(keyword, word, 1.0) for word in _capped(facts.routing.keywords) if word in lower]
    evidence += [
        Evidence(exclude, word, -_EXCLUDE) for word in _capped(facts.routing.exclude_keywords) if word in lower
    ]
    score = sum(each.contribution for each in evidence)
    priority = facts.routing.priority
    if score:
        evidence.append(Evidence(EvidenceKind.EVIDENCE_KIND_PRIORITY, f"{priority:g}", score * (priority - 1.0)))
    return evidence + [
        Evidence(EvidenceKind.EVIDENCE_KIND_CAPABILITY, capability, _CAPABILITY)
        for capability in facts.capabilities[:CAPABILITIES_MAX]
        if ":" in capability and capability.partition(":")[2] in lower
    ]


def keyword_score(text: str, facts: AdapterFacts) -> float:
    """The keyword router's score: the share of an expert's keywords that are words of a text, times its priority."""
    keywords = set(_capped(facts.routing.keywords))
    matched = keywords & set(text.lower().split())
    return len(matched) / max(len(keywords), 1) * facts.routing.priority


def embedding_score(text: str, facts: AdapterFacts) -> float:
    """The embedding router's score: hashed bags of words compared, and keywords that overlap with words of a text."""
    said = text.lower().split()
    keywords = _capped(facts.routing.keywords)
    expert = _bag(keywords)
    for capability in facts.capabilities[:CAPABILITIES_MAX]:
        expert[siphash13(capability.lower()) % _DIMENSIONS] += 0.5
    cosine = float(_unit(expert) @ _unit(_bag(said)))
    matched = sum(any(word in keyword or keyword in word for word in said) for keyword in keywords)
    share = matched / max(len(keywords), 1)
    return (_COSINE_SHARE * cosine + (1.0 - _COSINE_SHARE) * share) * facts.routing.priority


@lru_cache(_HASHED_MAX)
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


def _capped(texts: Iterable[str]) -> list[str]:
    """Of a package's keywords those that count."""
    return [text.lower() for text in [*texts][:KEYWORDS_MAX] if len(text) <= KEYWORD_CHARS_MAX]


def _bag(texts: Iterable[str]) -> NDArray[np.float64]:
    """A vector that hashes each text to a dimension; the first counts 1, the next a half, a third, and so on."""
    bag = np.zeros(_DIMENSIONS)
    for place, text in enumerate(texts, 1):
        bag[siphash13(text) % _DIMENSIONS] += 1.0 / place
    return bag


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = math.sqrt(vector @ vector)
    return vector / length if length else vector
