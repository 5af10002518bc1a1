"""Which rows of a file repeat others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hocket.datasets.rows import LIMITS, DatasetLimits, Progress, Row, read_rows, row_at
from hocket.datasets.similarity import Fingerprint, NearIndex, digest, jaccard, normalise
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Verdict(StrEnum):
    """What a row is to those before it."""

    KEPT = "kept"
    EXACT = "exact"
    NEAR = "near"


@dataclass(frozen=True, slots=True)
class Judged:
    """A row, judged.

    Attributes:
        row: Which.
        verdict: What it is.
        first_line: The line of the row that it repeats; its own if it is kept.
    """

    row: Row
    verdict: Verdict
    first_line: int


class Neighbours:
    """Finds rows near a row among those that were added: the same answer, and questions that are nearly the same.

    Candidates are read again from the file, so that no text has to be kept: a row takes about 3 KB.

    Args:
        path: The file of the rows.
        threshold: The Jaccard index of questions that counts as near, above 0 and at most 1.
        limits: Those that the file was read with.

    Raises:
        HocketError: `BAD_REQUEST` for another threshold.
    """

    def __init__(self, path: Path, threshold: float, limits: DatasetLimits = LIMITS) -> None:
        if not 0 < threshold <= 1:
            raise HocketError(Reason.BAD_REQUEST, f"near is a share above 0 and at most 1, not {threshold!r:.40}")
        self._path = path
        self._threshold = threshold
        self._limits = limits
        self._index = NearIndex(threshold)
        self._offsets: dict[int, int] = {}

    def near(self, text: Fingerprint, unless: Callable[[int], bool] = lambda _: False) -> Iterator[int]:
        """The lines of rows near one, from the first on.

        Args:
            text: What the row is compared by.
            unless: Whether a line need not be looked at.

        Raises:
            HocketError: As `row_at`.
        """
        for line in self._index.candidates(text):
            if not unless(line):
                other = fingerprint(row_at(self._path, self._offsets[line], line, self._limits))
                if jaccard(text.shingles, other.shingles) >= self._threshold:
                    yield line

    def add(self, row: Row, text: Fingerprint) -> None:
        """Let a row be found by what it is compared by."""
        self._offsets[row.line] = row.offset_bytes
        self._index.add(row.line, text)


def judge_rows(
    path: Path, *, near: float | None, limits: DatasetLimits = LIMITS, on_progress: Progress = None
) -> Iterator[Judged]:
    """Every row of a file, and whether it repeats one before it that is kept.

    Exact are rows whose questions and answers are the same, both normalised. Near as `Neighbours` says; the bands find
    99 % of those that are just as similar as asked for, and more of those that are more so. The same file gives the
    same verdicts.

    Args:
        path: The file.
        near: The share of shingles in common that counts as near; None to look for exact ones alone.
        limits: What the file may be.
        on_progress: Hears how far it is.

    Raises:
        HocketError: As `read_rows`; `BAD_REQUEST` for a share that is none.
    """
    neighbours = None if near is None else Neighbours(path, near, limits)
    first: dict[bytes, int] = {}
    for row in read_rows(path, limits=limits, on_progress=on_progress):
        line = first.setdefault(identity(row), row.line)
        if line != row.line:
            yield Judged(row, Verdict.EXACT, line)
            continue
        if neighbours is not None:
            text = fingerprint(row)
            line = next(neighbours.near(text), row.line)
            if line != row.line:
                yield Judged(row, Verdict.NEAR, line)
                continue
            neighbours.add(row, text)
        yield Judged(row, Verdict.KEPT, line)


def identity(row: Row) -> bytes:
    """16 bytes that rows with the same question and answer have in common, whatever their format and other keys."""
    return digest(f"{normalise(row.asked)}\0{normalise(row.answer)}")


def fingerprint(row: Row) -> Fingerprint:
    """What rows are compared by: the question, among those with the same answer."""
    return Fingerprint.of(normalise(row.asked), digest(normalise(row.answer)))
