"""Versions of packages, and ranges of them.

Versions compare by the precedence of semantic versioning 2.0 (semver.org, clause 11). A release may carry any text for
a version, such as a date; those that are not semantic come before all that are, in the order of their text, and only
`*` or their own text names them.

A range is comparators joined by commas, all of which must hold: `*`, a bare version or `=1.0.0` for exactly that,
`<`, `<=`, `>`, `>=`. Pre-releases match only a range that names a pre-release.
"""

from __future__ import annotations

import functools
import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import check_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RANGE_CHARS_MAX: Final = 256
_COMPARATOR: Final = re.compile(r"(<=|>=|<|>|=|) *([^\s<>=]+)")
_NUMBER: Final = r"(0|[1-9][0-9]*)"
_PART: Final = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_SEMANTIC: Final = re.compile(
    rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-({_PART}(?:\.{_PART})*))?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)

Precedence: TypeAlias = tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]
"""Major, minor, patch, whether it is no pre-release, and the parts of the pre-release: numbers come before words."""
_NOT_SEMANTIC: Final[Precedence] = (-1, 0, 0, False, ())
_COMPARE: Final[Mapping[str, Callable[[Precedence, Precedence], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Version:
    """A version of a package; the larger is the newer.

    Attributes:
        text: As released. Versions are equal if their texts are.
        semantic: Its precedence, larger for the newer; None for a version that is not semantic.
        order: What versions are sorted by: precedence, and between equals the text, which build metadata is part of.
    """

    text: str
    semantic: Precedence | None = field(compare=False)
    order: tuple[object, ...] = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read a version.

        Raises:
            HocketError: `BAD_REQUEST` for text that may not be a version at all.
        """
        check_version(text)
        match = _SEMANTIC.fullmatch(text)
        if match is None:
            return cls(text, None, (*_NOT_SEMANTIC, text))
        major, minor, patch, prerelease = match.groups()
        parts = () if prerelease is None else tuple(map(_part, prerelease.split(".")))
        semantic = (int(major), int(minor), int(patch), prerelease is None, parts)
        return cls(text, semantic, (*semantic, text))

    @property
    def is_prerelease(self) -> bool:
        """Whether it comes before the version it is named after, such as `1.0.0-rc.1`."""
        return self.semantic is not None and not self.semantic[3]

    def __lt__(self, other: Version) -> bool:
        return self.order < other.order

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Comparator:
    """One condition on a version.

    Attributes:
        operator: `<`, `<=`, `=`, `>=` or `>`.
        version: What to compare with.
    """

    operator: str
    version: Version

    def holds(self, version: Version) -> bool:
        """Whether a version fulfils it, by precedence; build metadata counts where it is stated after `=`."""
        mine, theirs = self.version.semantic, version.semantic
        if mine is None or theirs is None or (self.operator == "=" and "+" in self.version.text):
            return version.text == self.version.text
        return _COMPARE[self.operator](theirs, mine)


@dataclass(frozen=True, slots=True)
class Range:
    """Which versions will do.

    Attributes:
        comparators: All of them hold for such a version; none for `*`.
    """

    comparators: tuple[Comparator, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read a range such as `*`, `1.0.0` or `>=1.0.0,<2.0.0`.

        Raises:
            HocketError: `BAD_REQUEST` for anything else.
        """
        if len(text) > RANGE_CHARS_MAX:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"a version range of {len(text)} characters is refused; at most {RANGE_CHARS_MAX} are allowed",
            )
        parts = [part.strip(" ") for part in text.split(",")]
        return cls(tuple(_comparator(part, text) for part in parts if part != "*"))

    def allows(self, version: Version, *, prereleases: bool = False) -> bool:
        """Whether a version will do.

        Args:
            version: Of a package.
            prereleases: Whether pre-releases count like any other version, even if the range names none.
        """
        if version.is_prerelease and not (prereleases or any(each.version.is_prerelease for each in self.comparators)):
            return False
        return all(map(operator.methodcaller("holds", version), self.comparators))

    def __str__(self) -> str:
        return ",".join(f"{each.operator.removeprefix('=')}{each.version}" for each in self.comparators) or "*"


ANY: Final = Range()
"""`*`."""


def _part(text: str) -> tuple[bool, int, str]:
    return (False, int(text), "") if text.isdecimal() else (True, 0, text)


def _comparator(part: str, text: str) -> Comparator:
    match = _COMPARATOR.fullmatch(part)
    if match is None:
        raise _bad(text, "use *, a version, or < <= = >= > before a version, joined by commas")
    try:
        version = Version.parse(match[2])
    except HocketError as error:
        raise _bad(text, error.message) from error
    if version.semantic is None and match[1] not in {"", "="}:
        raise _bad(text, f"{match[2]!r} is no semantic version (1.2.3), and has no order")
    return Comparator(match[1] or "=", version)


def _bad(text: str, problem: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} is not a version range: {problem}")
