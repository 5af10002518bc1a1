"""Adapter experts of a registry as candidates for a composition, and whether some of them go together."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.requirements import Constraints, Requirement
from hocket.resolution import Candidate, resolve
from hocket.v1.package_pb2 import TRUST_STATE_ACTIVE
from hocket.versions import Comparator, Range, Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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


def check_exactly(owned: Sequence[Sequence[Candidate]]) -> None:
    """Return if experts may be composed, and need nobody else.

    Args:
        owned: Each expert, once for every publisher who has released it. It counts as the first one's, and meets
            requirements as any of theirs.

    Raises:
        HocketError: `EXPERTS_INCOMPATIBLE`, also for two versions of one expert; the refusals of `resolve`.
    """
    asked = [each[0] for each in owned]
    _check_versions(asked)
    try:
        resolve([_exactly(each) for each in asked], chain.from_iterable(owned))
    except HocketError as error:
        raise error.restated(f"{error.message} (only what the request itself names can be there)") from error


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
