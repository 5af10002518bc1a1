"""Whether the experts of one request go together: what they require, what they exclude, and how many they may be.

The rules are those of `hocket.packages.expert.resolution`, with nothing to choose from but what was asked for.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from hocket.packages.expert.resolution import Candidate, resolve
from hocket.requirements import Requirement
from hocket.text_limits import EXPERTS_MAX
from hocket.versions import Comparator, Range, Version

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
            `resolve`.
    """
    owned = {facts.digest: _owned(facts, proofs) for facts, proofs in experts}
    asked = [candidates[0] for candidates in owned.values()]
    _check_versions(asked)
    try:
        resolve([_exactly(each) for each in asked], chain.from_iterable(owned.values()))
    except HocketError as error:
        raise error.restated(f"{error.message} (only what the request itself names can be there)") from error


def _owned(facts: AdapterFacts, proofs: Iterable[Proof]) -> list[Candidate]:
    owners = {proof.release.publisher for proof in proofs if proof.release is not None}
    return [
        Candidate(facts.digest, owner, facts.name, facts.version, facts.base, facts.constraints)
        for owner in sorted(owners or {""})
    ]


def _check_versions(asked: Iterable[Candidate]) -> None:
    for (publisher, name), count in Counter((each.publisher, each.name) for each in asked).items():
        if count > 1:
            raise HocketError(
                Reason.EXPERTS_INCOMPATIBLE,
                f"{count} versions of {publisher or 'nobody'}/{name} in one answer do not go together: choose one",
            )


def _exactly(candidate: Candidate) -> Requirement:
    version = Range((Comparator("=", Version.parse(candidate.version)),))
    return Requirement(candidate.name, version, candidate.publisher)
