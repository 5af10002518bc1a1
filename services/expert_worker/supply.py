"""From a digest to experts ready to move: the cache, else the registry, and always this worker's own judgement."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from hocket.errors import HocketError, Reason, Situation
from hocket.packages import DEFAULT_LIMITS
from hocket.v1 import expert_worker_pb2

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
        nobody vouches for is asked for again.

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
            supplied = await self._open(digest, standing, data, releases, report)
            await self._in_thread(self._cache.write, digest, data, releases, self._in_use())
        return supplied

    async def _from_cache(self, digest: str, standing: Standing, report: Report) -> Supplied | HocketError | None:
        """What the cache has: a package, why nobody vouches for it, or nothing.

        Raises:
            HocketError: Why the package cannot serve, whoever vouches for it.
        """
        cached = await self._in_thread(self._cache.read, digest)
        if cached is None:
            return None
        try:
            return await self._open(digest, standing, cached.data, cached.releases, report)
        except HocketError as error:
            if error.reason is Reason.DIGEST_MISMATCH:
                await self._in_thread(self._cache.drop, digest)
                return None
            if error.situation is Situation.REFUSED or error.reason is Reason.BAD_RELEASE:
                # Without its traceback, which would keep the bytes in memory.
                return error.with_traceback(None)
            raise

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

    async def _open(
        self,
        digest: str,
        standing: Standing,
        data: bytes | memoryview,
        releases: tuple[bytes, ...],
        report: Report,
    ) -> Supplied:
        def open_and_prepare() -> tuple[Package, Evidence, Prepared]:
            with self._journal.loading(digest):
                package, evidence = standing.open(digest, data, releases)
                return package, evidence, self._prepare(package)

        report(_VERIFYING, 0, len(data))
        package, evidence, prepared = await self._in_thread(open_and_prepare)
        report(_VERIFYING, len(data), len(data))
        return Supplied(prepared, evidence, package.provenance.proofs)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        # A future that has run is part of a cycle, and keeps its result until that is collected: a package, or a map of
        # one under a lease. So the result does not pass through it.
        results: list[T] = []
        await asyncio.get_running_loop().run_in_executor(self._executor, lambda: results.append(work(*arguments)))
        return results.pop()
