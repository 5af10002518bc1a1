"""Which rows are for training, for evaluation and for the test: by content, so that new rows move no others."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from hocket.datasets.duplicates import Neighbours, fingerprint, identity
from hocket.datasets.rows import LIMITS, DatasetLimits, Progress, read_rows, stratum
from hocket.datasets.similarity import digest
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SPLITS: Final = ("train", "eval", "test")
_WHOLE: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where the rows of a file belong.

    Attributes:
        splits: For each row, in order, its place in `SPLITS`.
        group_count: Groups of rows that had to stay together.
        largest_group: Rows of the largest one.
    """

    splits: bytes
    group_count: int
    largest_group: int


def assign_rows(
    path: Path,
    shares: Sequence[float],
    *,
    by: str | None = None,
    seed: int = 0,
    near: float = 0.9,
    limits: DatasetLimits = LIMITS,
    on_progress: Progress = None,
) -> Assignment:
    """Assign each row of a file to a split.

    Rows that repeat each other, exactly or nearly, and with `by` those that have the same value there, form a group.
    A group belongs where a hash of the seed and of its first row's value, or content, falls among the shares. So every
    stratum of a file gets its shares up to chance, and a row that is added at the end moves others only if it joins two
    groups.

    Args:
        path: The file.
        shares: Of train, eval and test; 0 or more each, 1 together.
        by: The key whose values are held together: a template, a source.
        seed: Another one, another assignment.
        near: As of `Neighbours`.
        limits: What the file may be.
        on_progress: Hears how far it is.

    Raises:
        HocketError: As `read_rows`; `BAD_REQUEST` for shares or a similarity that are none, `BAD_DATASET` for a row
            without the key.
    """
    if len(shares) != len(SPLITS) or not all(share >= 0 for share in shares) or abs(math.fsum(shares) - 1) > _WHOLE:
        raise HocketError(Reason.BAD_REQUEST, "the shares of train, eval and test are 0 or more, and 1 together")
    neighbours = Neighbours(path, near, limits)
    groups = _Groups()
    first: dict[bytes, int] = {}
    keys: list[bytes] = []
    for number, row in enumerate(read_rows(path, limits=limits, on_progress=on_progress)):
        groups.add()
        content = identity(row)
        keys.append(content if by is None else digest(stratum(row, by)))
        if by is not None:
            groups.join(number, first.setdefault(b"by" + keys[-1], number))
        before = first.setdefault(content, number)
        groups.join(number, before)
        if before == number:
            text = fingerprint(row)
            for line in neighbours.near(text, lambda line: groups.root(line - 1) == groups.root(number)):  # noqa: B023 - used up before the next row
                groups.join(number, line - 1)
            neighbours.add(row, text)
    places = bytearray()
    sizes: dict[int, int] = {}
    for number in range(len(keys)):
        root = groups.root(number)
        sizes[root] = sizes.get(root, 0) + 1
        places.append(_place(keys[root], seed, shares))
    return Assignment(bytes(places), len(sizes), max(sizes.values()))


def _place(key: bytes, seed: int, shares: Sequence[float]) -> int:
    """Which share a key falls into."""
    drawn = int.from_bytes(blake2b(key, digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")).digest()) / 2**64
    for place, share in enumerate(shares):
        if drawn < share:
            return place
        drawn -= share
    return max(place for place, share in enumerate(shares) if share)  # rounding


class _Groups:
    """Numbers that belong together; each group is known by its least one."""

    def __init__(self) -> None:
        self._parents = array("Q")

    def add(self) -> None:
        self._parents.append(len(self._parents))

    def root(self, number: int) -> int:
        while (parent := self._parents[number]) != number:
            self._parents[number] = self._parents[parent]
            number = parent
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._parents[max(a, b)] = min(a, b)
