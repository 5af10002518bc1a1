"""What a dataset is like: sizes, words, diversity, repetitions, strata."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.datasets.duplicates import Verdict, judge_rows
from hocket.datasets.rows import LIMITS, DatasetLimits, Progress, stratum
from hocket.datasets.similarity import normalise

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hocket.datasets.rows import Format

DIVERSITY_WORDS_MAX: Final = 2_000_000
"""Words from the beginning of a file that its diversity is measured on: what bounds memory."""
STRATA_MAX: Final = 10_000
"""Most strata that are counted one by one."""
OTHERS: Final = "(others)"
"""Where rows of further strata are counted."""
_POINTS: Final = (0, 0.05, 0.5, 0.95, 1)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """How a size is spread.

    Attributes:
        least: The smallest.
        low: 5 % are below.
        median: Half are below.
        high: 95 % are below.
        most: The largest.
        mean: On average.
    """

    least: float
    low: float
    median: float
    high: float
    most: float
    mean: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a file is like.

    Attributes:
        rows: How many.
        format: Of all rows.
        characters: Of a row, question and answer together.
        words: The same in words, which white space divides.
        answer_words: Of the answers alone; zeros for plain text.
        word_bins: Rows by the number of their words: place 0 for less than 2, place n for 2^n up to 2^(n+1).
        diversity_words: Words that the following three were measured on.
        vocabulary: Different words, normalised.
        distinct_1: Different words, as a share of words (J. Li et al., 2016).
        distinct_2: Different pairs of neighbours, as a share of pairs.
        exact: Share of rows that repeat one before.
        near: Share of rows that nearly repeat one before.
        strata: Rows by their value under a key.
    """

    rows: int
    format: Format
    characters: Quantiles
    words: Quantiles
    answer_words: Quantiles
    word_bins: tuple[int, ...]
    diversity_words: int
    vocabulary: int
    distinct_1: float
    distinct_2: float
    exact: float
    near: float
    strata: Mapping[str, int]


def measure(
    path: Path,
    *,
    by: str | None = None,
    near: float = 0.9,
    limits: DatasetLimits = LIMITS,
    on_progress: Progress = None,
) -> Statistics:
    """Measure a file.

    Args:
        path: The file.
        by: The key whose values are strata.
        near: As of `judge_rows`.
        limits: What the file may be.
        on_progress: Hears how far it is.

    Raises:
        HocketError: As `judge_rows`; `BAD_DATASET` for a row without the key.
    """
    characters, words, answers = array("d"), array("d"), array("d")
    verdicts: Counter[Verdict] = Counter()
    strata: Counter[str] = Counter()
    diversity = _Diversity()
    judged = None
    for judged in judge_rows(path, near=near, limits=limits, on_progress=on_progress):
        row = judged.row
        verdicts[judged.verdict] += 1
        asked, answered = row.asked, row.answer
        found = normalise(f"{asked} {answered}").split()
        characters.append(len(asked) + len(answered))
        words.append(len(found))
        answers.append(len(answered.split()))
        diversity.add(found)
        if by is not None:
            value = stratum(row, by)
            strata[value if value in strata or len(strata) < STRATA_MAX else OTHERS] += 1
    assert judged is not None  # noqa: S101 - a file without rows is refused
    bins = np.bincount(np.log2(np.maximum(np.array(words), 1)).astype(np.int64))
    return Statistics(
        rows=len(words),
        format=judged.row.format,
        characters=_quantiles(characters),
        words=_quantiles(words),
        answer_words=_quantiles(answers),
        word_bins=tuple(map(int, bins)),
        diversity_words=diversity.word_count,
        vocabulary=len(diversity.words),
        distinct_1=len(diversity.words) / max(diversity.word_count, 1),
        distinct_2=len(diversity.pairs) / max(diversity.pair_count, 1),
        exact=verdicts[Verdict.EXACT] / len(words),
        near=verdicts[Verdict.NEAR] / len(words),
        strata=dict(strata.most_common()),
    )


class _Diversity:
    """Different words and pairs of them, as hashes."""

    def __init__(self) -> None:
        self.words: set[bytes] = set()
        self.pairs: set[bytes] = set()
        self.word_count = 0
        self.pair_count = 0

    def add(self, words: list[str]) -> None:
        words = words[: DIVERSITY_WORDS_MAX - self.word_count]
        self.word_count += len(words)
        self.pair_count += max(len(words) - 1, 0)
        self.words.update(map(_hash, words))
        self.pairs.update(_hash(f"{a} {b}") for a, b in pairwise(words))


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _quantiles(sizes: array[float]) -> Quantiles:
    values = np.array(sizes)
    least, low, median, high, most = map(float, np.quantile(values, _POINTS))
    return Quantiles(least, low, median, high, most, float(values.mean()))
