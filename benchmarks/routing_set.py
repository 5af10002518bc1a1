"""The routing set: prompts written by hand, apart from the keywords of the experts, each with who may answer it.

Four strata. A: requests that name the subject, in users' own words. B: the same wishes without such words. C: general
questions about the subjects, and words that mean something else there. D: general questions far from any of them. What
is right for C and D is the base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hocket.identity import digest_of

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH: Final = Path(__file__).parents[1] / "starter" / "routing.jsonl"
STRATA: Final = ("A", "B", "C", "D")
BASE: Final = "base"
"""The label of the base model."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row.

    Attributes:
        id: Its stratum and number.
        text: What somebody asks.
        accept: Who may answer: tasks of the starter kit, or `BASE`.
        stratum: One of `STRATA`.
        author: Who wrote it.
    """

    id: str
    text: str
    accept: tuple[str, ...]
    stratum: str
    author: str


@dataclass(frozen=True, slots=True)
class RoutingSet:
    """All rows, in order.

    Attributes:
        prompts: They.
        digest: Of the file: figures are comparable where it is equal.
    """

    prompts: Sequence[Prompt]
    digest: str


def read(path: Path = PATH) -> RoutingSet:
    """Read the set."""
    data = path.read_bytes()
    rows = [json.loads(line) for line in data.decode().splitlines()]
    prompts = [Prompt(row["id"], row["prompt"], tuple(row["accept"]), row["stratum"], row["author"]) for row in rows]
    return RoutingSet(prompts, digest_of(data))
