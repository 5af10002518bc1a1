"""Whether the experts of one request go together: what they require, what they exclude, and how many they may be.

The rules are those of `hocket.resolution`, with nothing to choose from but what was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.composition import check_exactly
from hocket.errors import HocketError, Reason
from hocket.resolution import Candidate
from hocket.text_limits import EXPERTS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hocket.packages import Proof
    from hocket.packages.adapter import AdapterFacts


def check_count(count: int) -> None:
    """Return if so many experts may be asked for at all: before any is loaded.

    Raises:
        HocketError: `TOO_MANY_EXPERTS`.
    """
    if count > EXPERTS_MAX:
        raise HocketError(
            Reason.TOO_MANY_EXPERTS,
            f"{count} experts are too many: at most {EXPERTS_MAX} go together",
            field="experts",
        )


def check_together(experts: Iterable[tuple[AdapterFacts, Iterable[Proof]]]) -> None:
    """Return if these experts may be composed, and need nobody else.

    Args:
        experts: Each as its manifest describes it, with what vouches for it: whoever released it is its publisher. What
            several have released counts as the first one's, by name, and meets requirements as any of theirs.

    Raises:
        HocketError: `EXPERTS_INCOMPATIBLE`, `REQUIREMENT_MISSING`, `TOO_MANY_EXPERTS`, and the other refusals of
            `hocket.composition.check_exactly`.
    """
    owned = {facts.digest: _owned(facts, proofs) for facts, proofs in experts}
    check_exactly([*owned.values()])


def _owned(facts: AdapterFacts, proofs: Iterable[Proof]) -> list[Candidate]:
    owners = {proof.release.publisher for proof in proofs if proof.release is not None}
    return [
        Candidate(facts.digest, owner, facts.name, facts.version, facts.base, facts.constraints)
        for owner in sorted(owners or {""})
    ]
