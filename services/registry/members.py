"""Whether a mixture's members are here, may serve, and fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId
from hocket.mixtures import MixtureRef
from services.registry import views
from services.registry.admission import EXPERT_FORMAT, REFUSALS, Shape, State, align

if TYPE_CHECKING:
    from hocket.mixtures import MixtureRecord
    from services.registry.store import MixtureRow, PackageRow, Transaction


def shape_of(tx: Transaction, record: MixtureRecord) -> Shape:
    """The shape of a mixture.

    Raises:
        HocketError: `UNKNOWN_PACKAGE`, `UNKNOWN_EXPERT` or `UNKNOWN_MIXTURE` for a member that is not here; `YANKED`,
            `KEY_REVOKED` or `SIGNER_NOT_TRUSTED` for one that may not serve; `MEMBERS_NOT_ALIGNED` or `BAD_MIXTURE`
            if they cannot be combined.
    """
    digests = {member.digest for member in record.members if isinstance(member, ExpertId)}
    nested = [member.digest for member in record.members if isinstance(member, MixtureRef)]
    packages, mixtures = tx.packages(sorted(digests)), tx.mixtures(nested)
    experts = {digest: _of_package(packages.get(digest), digest) for digest in digests}
    shapes = []
    for member in record.members:
        if isinstance(member, MixtureRef):
            shapes.append(_of_mixture(mixtures.get(member.digest), member.digest))
            continue
        shape, count = experts[member.digest]
        if member.ordinal >= count:
            raise HocketError(
                Reason.UNKNOWN_EXPERT, f"{member} is not there: its package has {count} experts, counted from 0"
            )
        shapes.append(shape)
    return align(record, shapes)


def _of_package(row: PackageRow | None, digest: str) -> tuple[Shape, int]:
    """The shape of each of a package's experts, and their number."""
    if row is None:
        raise HocketError(
            Reason.UNKNOWN_PACKAGE, f"member {digest} is not in this registry: publish it first", digest=digest
        )
    _check_active(row.state, digest)
    if row.format == EXPERT_FORMAT:
        raise HocketError(
            Reason.MEMBERS_NOT_ALIGNED,
            f"member {digest} is an adapter expert, which answers text: a mixture holds tensor experts",
            digest=digest,
        )
    return views.package_shape(row)


def _of_mixture(row: MixtureRow | None, digest: str) -> Shape:
    if row is None:
        raise HocketError(
            Reason.UNKNOWN_MIXTURE, f"member {digest} is no mixture in this registry: put it first", digest=digest
        )
    _check_active(row.state, digest)
    return Shape.of_document(row.shape)


def _check_active(state: str, digest: str) -> None:
    if refusal := REFUSALS.get(State(state)):
        raise HocketError(refusal, f"member {digest} may not serve: its state is {state}", digest=digest)
