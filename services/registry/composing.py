"""Whether what an adapter expert requires is here, and goes together with it."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

from hocket.composition import candidates
from hocket.errors import HocketError, Reason
from hocket.packages.expert.resolution import Requirement, resolve
from hocket.versions import Range
from services.registry import views
from services.registry.admission import State

if TYPE_CHECKING:
    from hocket.packages.adapter import AdapterFacts
    from hocket.packages.expert.resolution import Candidate
    from services.registry.store import Transaction

NAMES_MAX: Final = 256
"""Names that the requirements of one expert may lead to, over all versions of all of them."""


def check_requirements(tx: Transaction, facts: AdapterFacts, publisher: str) -> None:
    """Pass if an expert that is here goes together with everything that it requires, and that is here and may serve.

    Only names that its requirements lead to are looked at.

    Args:
        tx: Where.
        facts: The expert.
        publisher: Who releases it; empty if nothing but policy admits it.

    Raises:
        HocketError: The refusals of `hocket.packages.expert.resolution.resolve`.
    """
    (own,) = (expert for expert in _experts(tx, publisher, facts.name) if expert.digest == facts.digest)
    reached = {(publisher, facts.name): [own]}
    waiting = _required(own)
    while waiting:
        key = waiting.pop()
        if key in reached:
            continue
        if len(reached) == NAMES_MAX:
            raise HocketError(
                Reason.TOO_MANY_EXPERTS,
                f"the requirements of {facts.name} lead to more than {NAMES_MAX} experts, counting every version of "
                "them: require fewer, or narrower ranges of versions",
            )
        reached[key] = _experts(tx, *key)
        waiting += chain.from_iterable(map(_required, reached[key]))
    exactly = Requirement(facts.name, Range.parse(facts.version), publisher)
    resolve([exactly], chain.from_iterable(reached.values()))


def _experts(tx: Transaction, publisher: str, name: str) -> list[Candidate]:
    """Every version of an expert that may serve."""
    rows = tx.experts(publisher, name, State.ACTIVE)
    releases = tx.releases([row.digest for row in rows])
    packages = [views.package_message(row, releases[row.digest]) for row in rows]
    return [expert for expert in candidates(packages) if expert.publisher == publisher]


def _required(expert: Candidate) -> list[tuple[str, str]]:
    """Publisher and name of each expert that one requires."""
    patterns = map(Requirement.parse, expert.constraints.requires)
    return [(expert.publisher if need.publisher is None else need.publisher, need.name) for need in patterns]
