"""Adapter experts as a registry describes them, turned into candidates for a composition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.packages.adapter import BaseModel, Constraints
from hocket.packages.expert.resolution import Candidate
from hocket.v1.package_pb2 import TRUST_STATE_ACTIVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hocket.v1.package_pb2 import AdapterFacts, Package


def candidates(packages: Iterable[Package]) -> Iterator[Candidate]:
    """The adapter experts among packages that may serve, each once for every publisher who has released it.

    What nothing but a registry's policy admits has the publisher "": nobody answers for its name.
    """
    for package in packages:
        if package.HasField("adapter") and package.state == TRUST_STATE_ACTIVE:
            owners = {release.publisher for release in package.releases if release.state == TRUST_STATE_ACTIVE}
            for owner in sorted(owners or {""}):
                yield _candidate(package.digest, owner, package.adapter)


def _candidate(digest: str, publisher: str, facts: AdapterFacts) -> Candidate:
    base, constraints = facts.base, facts.constraints
    return Candidate(
        digest=digest,
        publisher=publisher,
        name=facts.name,
        version=facts.version,
        base=BaseModel(
            name=base.name,
            digest=base.digest or None,
            weights_sha256=base.weights_sha256 or None,
            quantization=base.quantization or None,
            prompt_template=base.prompt_template or None,
        ),
        constraints=Constraints(
            load_order=constraints.load_order,
            max_chain=constraints.max_chain or None,
            requires=tuple(constraints.requirements),
            incompatible_with=tuple(constraints.incompatible_with),
        ),
    )
