"""Patterns by which experts name others, in what they require and in what they do not go with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from hocket.errors import HocketError, Reason
from hocket.identity import check_name
from hocket.versions import ANY, Range

_PATTERN_CHARS_MAX: Final = 512
_PATTERN: Final = re.compile(r"(?:([^/@<>=\s]+)/)?([^/@<>=\s]+) *(?:@(.*)|([<>=].*))?")


@dataclass(frozen=True, slots=True)
class Constraints:
    """How an expert goes together with others.

    Attributes:
        load_order: Experts compose in ascending order.
        max_chain: Most experts in one composition; None for the suite's own bound.
        requires: Patterns of experts that must be there as well: `name`, `name@range`, `publisher/name@range`.
        incompatible_with: Patterns of experts that must not be there.
    """

    load_order: int = 10
    max_chain: int | None = None
    requires: tuple[str, ...] = ()
    incompatible_with: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Requirement:
    """A pattern that names experts.

    Attributes:
        name: Of the expert, whole.
        range: Of its versions.
        publisher: Whose; None where the place it stands in decides.
    """

    name: str
    range: Range = ANY
    publisher: str | None = None

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read `name`, `name@range`, `name<=0.9.0` or either with `publisher/` before it.

        Raises:
            HocketError: `BAD_REQUEST` for anything else.
        """
        match = _PATTERN.fullmatch(text) if len(text) <= _PATTERN_CHARS_MAX else None
        if match is None:
            raise HocketError(
                Reason.BAD_REQUEST, f"{text[:80]!r} names no experts: write name, name@range or publisher/name@range"
            )
        publisher, name, after_at, after_name = match.groups()
        stated = after_at if after_at is not None else after_name
        return cls(
            name=check_name(name),
            range=ANY if stated is None else Range.parse(stated),
            publisher=None if publisher is None else check_name(publisher, "publisher"),
        )

    def owner(self, publisher: str) -> str:
        """Whose expert is meant, where a bare name means one of this publisher's."""
        return publisher if self.publisher is None else self.publisher

    def __str__(self) -> str:
        return f"{spelled(self.publisher, self.name)}{f'@{self.range}' if self.range.comparators else ''}"


def spelled(publisher: str | None, name: str) -> str:
    """An expert as people call it, with its publisher where there is one."""
    return f"{publisher}/{name}" if publisher else name
