"""Which base computes a text: the one that is named, or that all of its experts ride on, among those that are known."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from hocket.bases import Match, compatibility, normalised_name
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from services.router.directory import Snapshot
    from services.router.experts import Expert
    from services.router.placement import Base, Worker

RETRY_SECONDS: Final = 1.0
"""Pause advised when no worker takes what one of them could run."""
REMEMBERED_SECONDS: Final = 600.0
"""How long a base is known after its last worker has gone: longer than a worker takes to start again."""
REMEMBERED_MAX: Final = 64
"""Bases without a worker that are known at once."""
_SHOWN_CHARS_MAX: Final = 256
_SHOWN_MAX: Final = 5
"""Bases, or reasons against them, that a message lists."""


def announced(workers: Iterable[Worker]) -> dict[str, Base]:
    """The bases that workers serve, by digest, whether or not they take new requests."""
    by_name = sorted(workers, key=lambda worker: worker.name)
    return {worker.base.digest: worker.base for worker in by_name if worker.base is not None and worker.serves()}


class RecentBases:
    """Bases whose workers have gone: one that is only starting again is no stranger."""

    def __init__(self) -> None:
        self._live: Mapping[str, Base] = {}
        self._gone: dict[str, tuple[Base, float]] = {}

    def note(self, workers: Iterable[Worker]) -> tuple[tuple[Base, float], ...]:
        """Take note of who is there, and return each base that was but is not, and until when it is known.

        Times are `time.monotonic()` seconds.
        """
        before, self._live = self._live, announced(workers)
        until = time.monotonic() + REMEMBERED_SECONDS
        self._gone |= {digest: (base, until) for digest, base in before.items()}
        for digest in self._live:
            self._gone.pop(digest, None)
        for digest in [*self._gone][:-REMEMBERED_MAX]:
            del self._gone[digest]
        return tuple(self._gone.values())


def choose_base(wanted: str, experts: Sequence[Expert], snapshot: Snapshot) -> tuple[Base, bool]:
    """The base of a request, and whether nothing but a name says that an expert belongs to it.

    One that more experts are proven for goes first, then one that takes requests now.

    Args:
        wanted: Digest or name; empty for any.
        experts: All of them have to ride on it.
        snapshot: Says who serves which base, and which bases were served a while ago.

    Raises:
        HocketError: `UNKNOWN_BASE` if no base is called so, or there is none; `BASE_MISMATCH` if none is right for all
            experts; `BAD_REQUEST` if several are; `NO_REPLICA` if no worker takes requests for the one that is.
    """
    now = time.monotonic()
    able = announced(worker for worker in snapshot.workers if not worker.draining)
    known = able | announced(snapshot.workers)
    known |= {base.digest: base for base, until in snapshot.gone_bases if now < until and base.digest not in known}
    bases = _named(wanted, [*known.values()])
    fitting = [
        ((sum(match is Match.BY_NAME for match in matches), base.digest not in able), base)
        for base in bases
        if Match.DIFFERENT not in (matches := [_match(expert, base) for expert in experts])
    ]
    if not fitting:
        raise _mismatch(experts, bases)
    rank = min(rank for rank, _ in fitting)
    best = [base for each, base in fitting if each == rank]
    by_name_count, is_away = rank
    if is_away:
        raise HocketError(
            Reason.NO_REPLICA,
            f"no worker that has the base {_listed(best)} takes new requests now: try again",
            retry_after_seconds=RETRY_SECONDS,
        )
    if len(best) > 1:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"several bases could answer: say which in `base`, by digest: {_listed(best)}",
            field="base",
        )
    return best[0], by_name_count > 0


def _named(wanted: str, bases: Sequence[Base]) -> Sequence[Base]:
    if not bases:
        raise HocketError(
            Reason.UNKNOWN_BASE,
            "no live worker has a base: add one (`hocket base add FOLDER`), and start the suite or its workers again",
            field="base",
        )
    if not wanted:
        return bases
    name = normalised_name(wanted)
    if is_digest(wanted):
        named = [base for base in bases if base.digest == wanted]
    else:
        named = [base for base in bases if name and normalised_name(base.name) == name]
    if not named:
        advice = "`hocket base add FOLDER` adds one"
        if is_digest(wanted.lower()) and not is_digest(wanted):
            advice = "Write digests in lower case"
        raise HocketError(
            Reason.UNKNOWN_BASE,
            f"no live worker has the base {wanted[:_SHOWN_CHARS_MAX]!r}; there is {_listed(bases)}. {advice}",
            field="base",
        )
    return named


def _match(expert: Expert, base: Base) -> Match:
    return compatibility(expert.package.adapter.base, base).match


def _mismatch(experts: Sequence[Expert], bases: Sequence[Base]) -> HocketError:
    problems = [
        f"{expert.name} and {shown(base)}: {found.explanation}"
        for base in bases[:_SHOWN_MAX]
        for expert in experts
        if (found := compatibility(expert.package.adapter.base, base)).match is Match.DIFFERENT
    ]
    return HocketError(
        Reason.BASE_MISMATCH,
        "no base is right for all of these experts: " + "; ".join(problems[:_SHOWN_MAX]),
        field="experts",
    )


def _listed(bases: Sequence[Base]) -> str:
    return ", ".join(map(shown, bases[:_SHOWN_MAX]))


def shown(base: Base) -> str:
    """A base as messages call it."""
    return f"{base.name[:_SHOWN_CHARS_MAX]} ({base.digest})"
