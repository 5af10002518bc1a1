"""From a digest to experts ready to move: the cache, else the registry, and always this worker's own judgement."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from hocket.errors import HocketError, Reason, Situation
from hocket.packages import DEFAULT_LIMITS
from hocket.v1 import expert_worker_pb2, registry_pb2
from services.expert_worker.mapping import is_intact

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from hocket.client.registry import RegistryClient
    from hocket.packages import Package, Proof
    from services.expert_worker.authority import Evidence, Standing
    from services.expert_worker.cache import CachedPackage, PackageCache
    from services.expert_worker.journal import Journal
    from services.expert_worker.loader import Prepared

T = TypeVar("T")
Report: TypeAlias = "Callable[[expert_worker_pb2.LoadState.ValueType, int, int], None]"
"""Told what a load is doing, the bytes done in that state, and all of them (0 if unknown)."""

_FETCHING: Final = expert_worker_pb2.LOAD_STATE_FETCHING
_VERIFYING: Final = expert_worker_pb2.LOAD_STATE_VERIFYING
_NOBODY_VOUCHES: Final = frozenset(
    {
        Reason.BAD_RELEASE,
        Reason.DIGEST_MISMATCH,
        Reason.KEY_EXPIRED,
        Reason.KEY_REVOKED,
        Reason.NAME_NOT_ALLOWED,
        Reason.SIGNATURE_INVALID,
        Reason.SIGNER_NOT_TRUSTED,
        Reason.UNSIGNED,
    }
)
"""For any other reason a package is kept."""
_ANOTHER_RELEASE_HELPS: Final = _NOBODY_VOUCHES | {Reason.ENCRYPTED}
"""Nobody vouches for a package, or not by a name whose credential is here. For any other reason what is kept is refused
without asking the registry."""
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


@dataclass(frozen=True, slots=True)
class _Closed:
    """A package in the cache that another release may open.

    Args:
        refusal: Why those that are there do not.
        releases: Those that are there.
    """

    refusal: HocketError
    releases: tuple[bytes, ...]


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
        nobody vouches for, or by no name whose credential is here, is asked for again, and fetched if it has other
        releases now. What somebody vouches for and yet cannot serve is kept: to fetch it again would bring the same.

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
                data, releases = await self._fetch(digest, report, cached)
            except HocketError:
                if cached is not None:
                    raise cached.refusal from None
                raise
            report(_VERIFYING, 0, len(data))
            try:
                supplied = await self._in_thread(self._open, digest, standing, data, releases)
            except HocketError as error:
                if error.reason not in _NOBODY_VOUCHES:  # then another download would bring the same bytes
                    await self._in_thread(self._cache.write, digest, data, releases, self._in_use())
                raise
            report(_VERIFYING, len(data), len(data))
            await self._in_thread(self._cache.write, digest, data, releases, self._in_use())
        return supplied

    async def _from_cache(self, digest: str, standing: Standing, report: Report) -> Supplied | _Closed | None:
        """What the cache has: a package, one that nobody vouches for or that stays closed, or nothing.

        Raises:
            HocketError: Why the package cannot serve, whoever vouches for it.
        """
        loop = asyncio.get_running_loop()

        def found(size_bytes: int) -> None:
            loop.call_soon_threadsafe(report, _VERIFYING, 0, size_bytes)

        try:
            return await self._in_thread(self._open_cached, digest, standing, found)
        except HocketError as error:
            if error.reason is not Reason.DIGEST_MISMATCH:
                raise
        await self._in_thread(self._cache.drop, digest)
        return None

    def _open_cached(self, digest: str, standing: Standing, found: Callable[[int], None]) -> Supplied | _Closed | None:
        """Open what the cache has, in one go: nothing may wait between mapping a file and letting go of the map."""
        cached = self._cache.read(digest)
        if cached is None:
            return None
        found(len(cached.data))
        try:
            opened = self._try(digest, standing, cached)
        except Exception:  # bytes that change meanwhile fail in any way
            if is_intact(cached.data):
                raise
        else:
            if is_intact(cached.data):
                return opened
            del opened  # or it would be in memory twice
        # Somebody wants to change the file, and may have done so while it was opened.
        cached = self._cache.read(digest, may_map=False)
        return None if cached is None else self._try(digest, standing, cached)

    def _try(self, digest: str, standing: Standing, cached: CachedPackage) -> Supplied | _Closed:
        try:
            return self._open(digest, standing, cached.data, cached.releases)
        except HocketError as error:
            if error.reason is Reason.DIGEST_MISMATCH or error.reason not in _ANOTHER_RELEASE_HELPS:
                raise
            return _Closed(error.restated(error.message), cached.releases)  # its traceback would keep the bytes

    async def _fetch(self, digest: str, report: Report, cached: _Closed | None) -> tuple[bytes, tuple[bytes, ...]]:
        """The bytes and the releases, unless they are those that are here already.

        Raises:
            HocketError: The refusal of what is cached if its releases are all; `UNREACHABLE`; the registry's refusals.
        """

        def look(header: registry_pb2.DownloadHeader) -> None:
            if cached is not None and tuple(header.releases) == cached.releases:
                raise cached.refusal

        report(_FETCHING, 0, 0)
        try:
            header, data = await self._registry.download(
                digest,
                size_bytes_max=DEFAULT_LIMITS.package_bytes,
                on_header=look,
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
