"""Which texts are nearly the same: shingles, their Jaccard index, and MinHash to find candidates without comparing all.

A text, normalised, is the set of its sequences of five characters. MinHash: A. Z. Broder, "On the resemblance and
containment of documents", 1997. Bands: J. Leskovec, A. Rajaraman, J. Ullman, "Mining of Massive Datasets", 3.4.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_SHINGLE_CHARACTERS: Final = 5
_HASHES: Final = 64
_BLOCK: Final = 4096
"""Shingles that are hashed at once: what bounds memory."""
_MISSED_MAX: Final = 0.01
"""Most probability that two texts just as similar as asked for share no band."""
_DEVIATIONS: Final = 3.0
"""By how many standard deviations an estimate from signatures may be too low: one of 700 is lower."""
_NEIGHBOURS_MAX: Final = 64
"""Most texts of one band that are compared, the latest first: what bounds time."""


def normalise(text: str) -> str:
    """Text without what makes no difference: NFKC, case folded, white space as single spaces, none around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a text is compared by.

    Attributes:
        shingles: uint64, sorted: the set of its shingles, as hashes. A text shorter than a shingle is one.
        signature: uint32 `[64]`: for each of 64 orders the least shingle.
        kind: Texts of different kinds are not compared.
    """

    shingles: NDArray[np.uint64]
    signature: NDArray[np.uint32]
    kind: bytes

    @classmethod
    def of(cls, text: str, kind: bytes = b"") -> Fingerprint:
        """That of a text as it is: normalise it first."""
        found = _shingles(text)
        return cls(found, _signature(found), kind)


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """The share of two sets that they have in common."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class NearIndex:
    """Finds, among texts that were added, candidates for being nearly the same.

    A text takes about 3 KB. Texts of different kinds are no candidates for each other.

    Args:
        threshold: The Jaccard index above which texts are near, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        deviation = math.sqrt(threshold * (1 - threshold) / _HASHES)
        self._least = (threshold - _DEVIATIONS * deviation) * _HASHES
        self._width = max(
            width
            for width in range(1, _HASHES + 1)
            if width == 1 or (1 - threshold**width) ** (_HASHES // width) <= _MISSED_MAX
        )
        self._bands: dict[bytes, list[int]] = {}
        self._signatures: dict[int, NDArray[np.uint32]] = {}

    def candidates(self, text: Fingerprint) -> list[int]:
        """Texts that may be near one, in the order of their numbers."""
        found: set[int] = set()
        for band in self._band_keys(text):
            found.update(self._bands.get(band, ())[-_NEIGHBOURS_MAX:])
        return sorted(
            number for number in found if np.count_nonzero(self._signatures[number] == text.signature) >= self._least
        )

    def add(self, number: int, text: Fingerprint) -> None:
        """Add a text by a number of its own."""
        self._signatures[number] = text.signature
        for band in self._band_keys(text):
            self._bands.setdefault(band, []).append(number)

    def _band_keys(self, text: Fingerprint) -> Iterator[bytes]:
        for place in range(_HASHES // self._width):
            band = text.signature[place * self._width : (place + 1) * self._width]
            yield blake2b(band.tobytes() + text.kind, digest_size=8, salt=place.to_bytes(16, "little")).digest()


def _shingles(text: str) -> NDArray[np.uint64]:
    padded = text.ljust(_SHINGLE_CHARACTERS, "\0")
    codes = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(codes) - _SHINGLE_CHARACTERS + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(_SHINGLE_CHARACTERS):
        hashes = hashes * np.uint64(0x100000001B3) + codes[place : place + count]
    return np.unique(_mixed(hashes))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number as one that looks random (splitmix64; G. Steele, D. Lea, C. Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_FACTORS: Final = _mixed(np.arange(1, _HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
_SUMMANDS: Final = _mixed(np.arange(1, _HASHES + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))


def _signature(of: NDArray[np.uint64]) -> NDArray[np.uint32]:
    least = np.full(_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(of), _BLOCK):
        block = of[None, start : start + _BLOCK] * _FACTORS[:, None] + _SUMMANDS[:, None]
        least = np.minimum(least, block.min(axis=1))
    return (least >> np.uint64(32)).astype(np.uint32)
