"""Whether two descriptions of a base model can mean the same model.

A digest decides where both sides state one: of the base's directory (`hocket_base`) first, then of its weight file.
Otherwise names are compared, and the answer says so, since a name proves nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from hocket.identity import short_name


class Described(Protocol):
    """A base as somebody describes it: a manifest, or the worker that serves it. Empty or None is not stated."""

    @property
    def name(self) -> str:
        """What it is called: a model name, a hub id, or a path."""

    @property
    def digest(self) -> str | None:
        """Of its folder, `sha256:<hex>`."""

    @property
    def weights_sha256(self) -> str | None:
        """Hex SHA-256 of its weight file."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The language model that an adapter rides on, as far as its manifest says.

    Attributes:
        name: As written: a model name, a hub id, or a path on somebody's disk.
        digest: Of the base's directory, `sha256:<hex>` (`hocket_base`); None when not stated.
        weights_sha256: Hex SHA-256 of its weight file; None when not stated.
        quantization: As trained: `int4`, `int8`, `fp16`, `bf16`, `none`; for display.
        prompt_template: `qwen3`, `chatml`, ...; None leaves it to the base.
    """

    name: str
    digest: str | None = None
    weights_sha256: str | None = None
    quantization: str | None = None
    prompt_template: str | None = None


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


def compatibility(one: Described, other: Described) -> Compatibility:
    """Compare two bases; the order does not matter to the outcome."""
    for what, mine, theirs in (
        ("digest", one.digest, other.digest),
        ("SHA-256 of the weights", one.weights_sha256, other.weights_sha256),
    ):
        if mine and theirs:
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
