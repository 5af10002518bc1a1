"""The baseline of routing: who answered the most similar training example."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

BUCKETS: Final = 2**18
"""Features are hashed to so many."""


class Nearest:
    """Cosine over hashed TF-IDF: words, pairs of words, and 2 to 5 characters within words.

    Args:
        examples: A text and a label each.
    """

    def __init__(self, examples: Sequence[tuple[str, str]]) -> None:
        self._labels = [label for _, label in examples]
        counts = [Counter(_features(text)) for text, _ in examples]
        found_in = Counter(feature for each in counts for feature in each)
        self._idf = {feature: math.log((1 + len(counts)) / (1 + found)) + 1 for feature, found in found_in.items()}
        postings: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for place, each in enumerate(counts):
            for feature, weight in self._unit(each).items():
                postings[feature].append((place, weight))
        self._postings: dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]] = {
            feature: (np.array([place for place, _ in held], dtype=np.intp), np.array([weight for _, weight in held]))
            for feature, held in postings.items()
        }

    def ranked(self, text: str) -> list[tuple[str, float]]:
        """Every label with the similarity of its most similar example, best first; of equals the earlier example's."""
        similarity = np.zeros(len(self._labels))
        for feature, weight in self._unit(Counter(_features(text))).items():
            places, weights = self._postings[feature]
            similarity[places] += weight * weights
        best: dict[str, float] = {}
        for place in np.argsort(-similarity, kind="stable"):
            best.setdefault(self._labels[place], float(similarity[place]))
        return [*best.items()]

    def _unit(self, counts: Counter[int]) -> dict[int, float]:
        """Sublinear term frequency times idf, of length 1; features that no example has are left out."""
        weights = {
            feature: (1 + math.log(count)) * self._idf[feature]
            for feature, count in counts.items()
            if feature in self._idf
        }
        length = math.sqrt(math.fsum(weight * weight for weight in weights.values()))
        return {feature: weight / length for feature, weight in weights.items()}


def _features(text: str) -> Iterator[int]:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    for one, other in pairwise(words):
        yield _bucket(f"w {one} {other}")
    for word in words:
        yield _bucket(f"w {word}")
        framed = f" {word} "
        for length in range(2, 6):
            for begin in range(len(framed) - length + 1):
                yield _bucket(f"c {framed[begin : begin + length]}")


def _bucket(feature: str) -> int:
    return crc32(feature.encode()) % BUCKETS
