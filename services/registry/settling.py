"""What is kept, judged again: after an upload, when trust changes, and at start."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from services.registry.admission import Dated, State, judge, mixture_subject, package_subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.registry.admission import Terms
    from services.registry.store import MixtureRow, PackageRow, ReleaseRow, Transaction

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(time: datetime) -> int:
    """A time as it is stored: microseconds since 1970."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def settle_all(tx: Transaction, terms: Terms, key_id: str | None = None) -> None:
    """Judge everything.

    Args:
        tx: Where.
        terms: Who is trusted.
        key_id: Only what this key vouches for.
    """
    packages = tx.packages_to_judge(key_id)
    releases = tx.releases([package.digest for package in packages])
    for package in packages:
        settle_package(tx, package, releases[package.digest], terms)
    for mixture in tx.mixtures_to_judge(key_id):
        _settle_mixture(tx, mixture, terms)


def settle_package(
    tx: Transaction, row: PackageRow, releases: Sequence[ReleaseRow], terms: Terms, *, changed: bool = False
) -> None:
    """Judge a package, and write down what that changes about it, its releases and the mixture it is by itself.

    Args:
        tx: Where.
        row: The package. If it was yanked, it stays so.
        releases: All its releases.
        terms: Who is trusted.
        changed: Whether it gets a new revision in any case.
    """
    standing = judge(
        package_subject(row.digest, row.size_bytes, row.format),
        [Dated(release.envelope, _time(release.publish_time_us)) for release in releases],
        row.embedded_key_id,
        _time(row.proof_time_us),
        terms,
    )
    for release, state in zip(releases, standing.releases, strict=True):
        if release.state != state:
            tx.update_release(release, state=state)
            changed = True
    state = State.YANKED if row.state == State.YANKED else standing.state
    was = (row.state, row.by_policy, row.embedded_trusted)
    if changed or was != (state, standing.by_policy, standing.embedded_trusted):
        tx.update_package(
            row.digest, state=state, by_policy=standing.by_policy, embedded_trusted=standing.embedded_trusted
        )
        settle_own_mixture(tx, row.digest, state, by_policy=standing.by_policy)


def settle_own_mixture(tx: Transaction, package_digest: str, state: str, *, by_policy: bool) -> None:
    """Let the mixture that a package is by itself, if it is one, share the package's state."""
    own = tx.mixture_of_package(package_digest)
    if own is not None and (own.state, own.by_policy) != (state, by_policy):
        tx.update_mixture(own.digest, state=state, by_policy=by_policy)


def _settle_mixture(tx: Transaction, row: MixtureRow, terms: Terms) -> None:
    came = _time(row.publish_time_us)
    releases = [Dated(row.envelope, came)] if row.envelope else []
    standing = judge(mixture_subject(row.digest, row.body_bytes), releases, None, came, terms)
    if (standing.state, standing.by_policy) != (row.state, row.by_policy):
        tx.update_mixture(row.digest, state=standing.state, by_policy=standing.by_policy)


def _time(stored: int) -> datetime:
    return _EPOCH + timedelta(microseconds=stored)
