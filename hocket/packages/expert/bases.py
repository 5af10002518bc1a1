"""Whether two descriptions of a base model can mean the same model.

A digest decides where both sides state one: of the base's directory (`hocket_base`) first, then of its weight file.
Otherwise names are compared, and the answer says so, since a name proves nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.identity import short_name

if TYPE_CHECKING:
    from hocket.packages.adapter import BaseModel


class Match(enum.Enum):
    """How far two descriptions agree."""

    SAME = enum.auto()
    """Both state the same digest."""
    BY_NAME = enum.auto()
    """No digest can be compared, and their names agree."""
    DIFFERENT = enum.auto()
    """They state different digests, or have different names."""


@dataclass(frozen=True, slots=True)
class Compatibility:
    """The comparison of two bases.

    Attributes:
        match: The outcome.
        explanation: What was compared, for people; a warning when `BY_NAME`, a reason when `DIFFERENT`.
    """

    match: Match
    explanation: str


def compatibility(one: BaseModel, other: BaseModel) -> Compatibility:
    """Compare two bases; the order does not matter to the outcome."""
    for what, mine, theirs in (
        ("digest", one.digest, other.digest),
        ("SHA-256 of the weights", one.weights_sha256, other.weights_sha256),
    ):
        if mine is not None and theirs is not None:
            if mine == theirs:
                return Compatibility(Match.SAME, f"both state the {what} {mine}")
            return Compatibility(Match.DIFFERENT, f"the {what} differs: {mine} and {theirs}")
    names = normalised_name(one.name), normalised_name(other.name)
    if names[0] == names[1] != "":
        return Compatibility(
            Match.BY_NAME, f"both are called {names[0][:80]!r}, and no digest proves that they are the same model"
        )
    return Compatibility(Match.DIFFERENT, f"the names differ: {names[0][:80]!r} and {names[1][:80]!r}")


def normalised_name(name: str) -> str:
    """What a model's name is compared by: the last part of a path or hub id, case folded.

    `F:/models/Qwen3-0.6B`, `Qwen/Qwen3-0.6B` and `qwen3-0.6b` are the same.
    """
    return short_name(name).casefold()
