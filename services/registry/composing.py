"""Whether what an adapter expert requires is here, and goes together with it.

Looked at is what its requirements lead to: for each requirement the newest versions that it allows. So an expert with
many versions costs little more than one with few, and a requirement of one old version still finds it.
"""

from __future__ import annotations

from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.composition import candidates
from hocket.errors import HocketError, Reason
from hocket.requirements import Requirement
from hocket.resolution import resolve
from hocket.v1.package_pb2 import AdapterFacts, Package, Release, TrustState
from hocket.versions import Range, Version
from services.registry.admission import EXPERT_FORMAT, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hocket.packages import adapter
    from hocket.resolution import Candidate
    from services.registry.store import Transaction

VERSIONS_MAX: Final = 32
"""Versions looked at for one requirement: the newest that it allows."""
WORK_MAX: Final = 100_000
"""Of one check, in steps of about two microseconds: a version that is compared is one step."""
_STEPS_TO_READ: Final = 32
"""A package whose facts are read."""
_SHOWN_MAX: Final = 5

_Key: TypeAlias = tuple[str, str]
"""Publisher and name."""


def check_requirements(tx: Transaction, facts: adapter.AdapterFacts, publisher: str) -> None:
    """Pass if an expert that is here goes together with everything that it requires, and that is here and may serve.

    Args:
        tx: Where.
        facts: The expert.
        publisher: Who releases it; empty if nothing but policy admits it.

    Raises:
        HocketError: The refusals of `hocket.resolution.resolve`; `RESOLUTION_TOO_HARD` if there is
            more to look at than `WORK_MAX`.
    """
    exactly = Requirement(facts.name, Range.parse(facts.version), publisher)
    shelf = _Shelf(tx, facts.name)
    waiting = _required(shelf.read(publisher, [facts.digest]))
    met: set[tuple[_Key, Range]] = {((publisher, facts.name), exactly.range)}
    while waiting:
        key, range_ = needed = waiting.pop()
        if needed not in met:
            met.add(needed)
            waiting += _required(shelf.read(key[0], shelf.newest(key, range_)))
    resolve([exactly], shelf.experts.values())


class _Shelf:
    """The experts of a registry that may serve, read as far as they are asked for.

    Args:
        tx: Where they are.
        name: The expert they are wanted for.

    Attributes:
        experts: Those that were read, by publisher and digest.
    """

    def __init__(self, tx: Transaction, name: str) -> None:
        self.experts: dict[tuple[str, str], Candidate] = {}
        self._tx = tx
        self._name = name
        self._versions: dict[_Key, list[tuple[Version, str]]] = {}
        self._work = 0

    def newest(self, key: _Key, range_: Range) -> list[str]:
        """Digests of the newest versions that a range allows; of a few others, for the refusal, if it allows none."""
        if key not in self._versions:
            listed = self._tx.expert_versions(*key, state=State.ACTIVE, package_format=EXPERT_FORMAT)
            self._spend(2 * len(listed))
            parsed = [(Version.parse(text), digest) for digest, text in listed.items()]
            self._versions[key] = sorted(parsed, key=itemgetter(0), reverse=True)
        found = list(islice(self._allowed(key, range_), VERSIONS_MAX)) or self._versions[key][:_SHOWN_MAX]
        return [digest for _, digest in found]

    def read(self, publisher: str, digests: Sequence[str]) -> list[Candidate]:
        """Those of these experts that were not read before."""
        new = [digest for digest in digests if (publisher, digest) not in self.experts]
        self._spend(_STEPS_TO_READ * len(new))
        active = TrustState.TRUST_STATE_ACTIVE
        releases = [Release(publisher=publisher, state=active)] if publisher else []
        rows = self._tx.packages(new).values()
        found = list(
            candidates(
                Package(digest=row.digest, state=active, releases=releases, adapter=AdapterFacts.FromString(row.facts))
                for row in rows
            )
        )
        self.experts.update({(publisher, expert.digest): expert for expert in found})
        return found

    def _allowed(self, key: _Key, range_: Range) -> Iterator[tuple[Version, str]]:
        for version, digest in self._versions[key]:
            self._spend(1)
            if range_.allows(version):
                yield version, digest

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > WORK_MAX:
            raise HocketError(
                Reason.RESOLUTION_TOO_HARD,
                f"the requirements of {self._name} lead to too many versions of too many experts: require fewer, or "
                "narrower ranges of versions",
            )


def _required(experts: Sequence[Candidate]) -> list[tuple[_Key, Range]]:
    """Publisher, name and versions of all that experts require."""
    return [
        ((need.owner(expert.publisher), need.name), need.range)
        for expert in experts
        for need in map(Requirement.parse, expert.constraints.requires)
    ]
