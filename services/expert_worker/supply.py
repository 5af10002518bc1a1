"""From a digest to experts ready to move: the cache, else the registry, and always this worker's own judgement."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from hocket.errors import HocketError, Reason, Situation
from hocket.packages import DEFAULT_LIMITS
from hocket.v1 import expert_worker_pb2
from services.expert_worker.mapping import is_intact

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from hocket.client.registry import RegistryClient
    from hocket.packages import Package, Proof
    from services.expert_worker.authority import Evidence, Standing
    from services.expert_worker.cache import PackageCache
    from services.expert_worker.journal import Journal
    from services.expert_worker.loader import Prepared

T = TypeVar("T")
Report: TypeAlias = "Callable[[expert_worker_pb2.LoadState.ValueType, int, int], None]"
"""Told what a load is doing, the bytes done in that state, and all of them (0 if unknown)."""

_FETCHING: Final = expert_worker_pb2.LOAD_STATE_FETCHING
_VERIFYING: Final = expert_worker_pb2.LOAD_STATE_VERIFYING
_ANOTHER_RELEASE_HELPS: Final = frozenset(
    {
        Reason.BAD_RELEASE,
        Reason.DIGEST_MISMATCH,
        Reason.KEY_EXPIRED,
        Reason.KEY_REVOKED,
        Reason.NAME_NOT_ALLOWED,
        Reason.SIGNATURE_INVALID,
        Reason.SIGNER_NOT_TRUSTED,
        Reason.UNSIGNED,
        Reason.ENCRYPTED,
    }
)
"""Nobody vouches for a package, or not by a name whose credential is here. For any other reason it is kept, and refused
without being fetched again."""
_NO_ANSWER: Final = frozenset({Situation.UNAVAILABLE, Situation.TIMED_OUT, Situation.OVERLOADED, Situation.BUG})


@dataclass(frozen=True, slots=True, eq=False)
class Supplied:
    """A verified package in host memory.

    Args:
        prepared: Its experts.
        evidence: For judging it again.
        proofs: What vouches for it.
    """

    prepared: Prepared
    evidence: Evidence
    proofs: tuple[Proof, ...]


class Supply:
    """Brings packages.

    Args:
        cache: Packages on disk.
        registry: This worker's own registry.
        executor: Where bytes are hashed, verified and decoded.
        at_once_max: Packages from the cache that may be in host memory at once until they are prepared, and as many
            from the registry: one that does not answer holds up nothing that is cached.
        in_use: Digests that the cache must keep.
        journal: Told what is being opened; says what may not be.
        prepare: Lays out the experts of a package that was opened. Blocks.
    """

    def __init__(
        self,
        cache: PackageCache,
        registry: RegistryClient,
        executor: Executor,
        at_once_max: int,
        in_use: Callable[[], frozenset[str]],
        journal: Journal,
        prepare: Callable[[Package], Prepared],
    ) -> None:
        self._cache = cache
        self._registry = registry
        self._executor = executor
        self._reading = asyncio.Semaphore(at_once_max)
        self._fetching = asyncio.Semaphore(at_once_max)
        self._in_use = in_use
        self._journal = journal
        self._prepare = prepare

    async def bring(self, digest: str, standing: Standing, report: Report) -> Supplied:
        """A package, verified by what counts in `standing`.

        Releases in the cache may have lost their worth while the registry has newer ones, so a cached package that
        nobody vouches for, or by no name whose credential is here, is asked for again. What somebody vouches for and
        yet cannot serve is kept: to fetch it again would bring the same.

        Raises:
            HocketError: `YANKED`; `QUARANTINED`; `UNREACHABLE` if the registry is needed and does not answer;
                `UNKNOWN_PACKAGE` and `BLOB_CORRUPT` from there; the refusals of `hocket.packages.open_package`, and of
                laying its experts out (`NOT_SERVABLE`, `BASE_MISMATCH`, `BAD_ADAPTER`).
        """
        standing.check(digest)
        self._journal.check(digest)
        async with self._reading:
            cached = await self._from_cache(digest, standing, report)
        if isinstance(cached, Supplied):
            return cached
        async with self._fetching:
            try:
                data, releases = await self._fetch(digest, report)
            except HocketError:
                if cached is not None:
                    raise cached from None
                raise
            report(_VERIFYING, 0, len(data))
            try:
                supplied = await self._in_thread(self._open, digest, standing, data, releases)
            except HocketError as error:
                if error.reason not in _ANOTHER_RELEASE_HELPS:  # then another download would bring the same
                    await self._in_thread(self._cache.write, digest, data, releases, self._in_use())
                raise
            report(_VERIFYING, len(data), len(data))
            await self._in_thread(self._cache.write, digest, data, releases, self._in_use())
        return supplied

    async def _from_cache(self, digest: str, standing: Standing, report: Report) -> Supplied | HocketError | None:
        """What the cache has: a package, why nobody vouches for it or it stays closed, or nothing.

        Raises:
            HocketError: Why the package cannot serve, whoever vouches for it.
        """
        loop = asyncio.get_running_loop()

        def found(size_bytes: int) -> None:
            loop.call_soon_threadsafe(report, _VERIFYING, 0, size_bytes)

        try:
            return await self._in_thread(self._open_cached, digest, standing, found)
        except HocketError as error:
            if error.reason is Reason.DIGEST_MISMATCH:
                await self._in_thread(self._cache.drop, digest)
                return None
            if error.reason in _ANOTHER_RELEASE_HELPS:
                return error.restated(error.message)  # its traceback would keep the bytes in memory
            raise

    def _open_cached(self, digest: str, standing: Standing, found: Callable[[int], None]) -> Supplied | None:
        """Open what the cache has, in one go: nothing may wait between mapping a file and letting go of the map."""
        cached = self._cache.read(digest)
        if cached is None:
            return None
        found(len(cached.data))
        try:
            supplied = self._open(digest, standing, cached.data, cached.releases)
        except HocketError:
            if is_intact(cached.data):
                raise
        else:
            if is_intact(cached.data):
                return supplied
        # Somebody wants to change the file, and may have done so while it was opened.
        cached = self._cache.read(digest, may_map=False)
        return None if cached is None else self._open(digest, standing, cached.data, cached.releases)

    async def _fetch(self, digest: str, report: Report) -> tuple[bytes, tuple[bytes, ...]]:
        report(_FETCHING, 0, 0)
        try:
            header, data = await self._registry.download(
                digest,
                size_bytes_max=DEFAULT_LIMITS.package_bytes,
                on_progress=lambda done, total: report(_FETCHING, done, total),
            )
        except HocketError as error:
            if error.situation in _NO_ANSWER:
                raise HocketError(
                    Reason.UNREACHABLE,
                    f"{digest} is not here and the registry does not answer: try again, or another worker",
                    digest=digest,
                ) from error
            raise
        return data, tuple(header.releases)

    def _open(self, digest: str, standing: Standing, data: bytes | memoryview, releases: tuple[bytes, ...]) -> Supplied:
        with self._journal.loading(digest):
            package, evidence = standing.open(digest, data, releases)
            return Supplied(self._prepare(package), evidence, package.provenance.proofs)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        # A future that has run is part of a cycle, and keeps its result until that is collected: a package, or a map of
        # one under a lease. So the result does not pass through it.
        results: list[T] = []
        await asyncio.get_running_loop().run_in_executor(self._executor, lambda: results.append(work(*arguments)))
        return results.pop()
