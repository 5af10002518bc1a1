"""Support requests with the minutes they took, made up by rule, and 768 features of a text.

The rule: each kind of request has its own relation between what is asked for and the time it takes, so that no one
linear model fits them all.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FEATURES: Final = 768
KINDS: Final = ("small", "medium", "large", "domain")

_OPENINGS: Final = {
    "small": ("what is the status of", "please reset", "where do I find", "is there a link to"),
    "medium": ("please compare", "summarise the differences between", "draft a reply about", "list the steps for"),
    "large": ("design a migration plan for", "analyse the root cause of", "write a full proposal covering"),
    "domain": ("interpret the contract clause on", "check the tax treatment of", "assess the liability for"),
}
_THINGS: Final = ("the invoice", "my account", "the printer", "the north warehouse", "the payroll run", "the data lake")
_EXTRAS: Final = ("and attach the report", "with figures per region", "for the board", "in plain words", "by friday")
_MINUTES: Final = {"small": (2.0, 1.0), "medium": (10.0, 4.0), "large": (60.0, 25.0), "domain": (45.0, -6.0)}
"""Minutes of the bare request, and minutes per extra: a specialist is quicker the more precise the question is."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Args:
        text: What was asked.
        kind: Which expert's business it is.
        minutes: How long it took.
    """

    text: str
    kind: str
    minutes: float


def make_requests(count: int, seed: int) -> list[Request]:
    """Requests drawn at random, the same ones for the same seed."""
    random = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        kind = str(random.choice(KINDS))
        extras = random.choice(_EXTRAS, size=random.integers(0, 4), replace=False)
        text = " ".join([str(random.choice(_OPENINGS[kind])), str(random.choice(_THINGS)), *extras.tolist()])
        base, per_extra = _MINUTES[kind]
        requests.append(Request(text, kind, base + per_extra * len(extras) + random.normal(0, 0.5)))
    return requests


def features(texts: Sequence[str]) -> NDArray[np.float32]:
    """Hashed words and word pairs, float32 `[N, 768]`; the last is always 1, since `.apr` gates have no bias."""
    rows = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        words = text.split()
        for term in (*words, *map(" ".join, pairwise(words))):
            row[zlib.crc32(term.encode()) % (FEATURES - 1)] += 1.0
        row[-1] = 1.0
    return rows
