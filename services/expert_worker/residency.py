"""What is in memory: what comes, what stays, what goes.

Everything here runs in the event loop, so no lock guards a state. A package is absent, loading (once, however many ask)
or resident; while requests run on it, it is counted as in use and stays, and so does what is pinned. Room is made by
dropping what is neither; who goes first, and whose turn it is when that is not enough, is the business of `budget.py`.
A request waits until its own deadline; a load that no request waits for never has the turn, and gives up by itself.

Tensor experts lie where they compute. Adapter experts lie in host memory, folded, and are copied from there to where
running experts lie side by side (`engine/arena.py`). On a CPU both are in one memory, with one budget.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from hocket.v1.expert_worker_pb2 import (
    EXPERT_STATE_EVICTING,
    EXPERT_STATE_FAILED,
    EXPERT_STATE_VERIFYING,
    LOAD_STATE_FETCHING,
    LOAD_STATE_PLACING,
    LOAD_STATE_READY,
    ExpertState,
    LoadExpertResponse,
    LoadState,
)
from services.expert_worker.budget import Wait
from services.expert_worker.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence

    from hocket.packages import Proof
    from hocket.packages.adapter import AdapterFacts
    from services.expert_worker.authority import Authority, Evidence, Standing
    from services.expert_worker.budget import Budget
    from services.expert_worker.loader import Prepared, Served
    from services.expert_worker.supply import Report, Supplied

_log: Final = structlog.get_logger("worker")
_UNPLACED_MAX: Final = 1024
_RETRY_SECONDS: Final = 0.5
_MARGIN_SHARE: Final = 0.1
_MARGIN_SECONDS_MAX: Final = 0.1
_PREFETCHES_MAX: Final = 2
"""Loads that no request has asked for yet, at once."""


def loading_seconds(left_seconds: float) -> float:
    """How long a call with so much time left should wait for experts: its reason still has to reach the caller."""
    return left_seconds - min(_MARGIN_SECONDS_MAX, _MARGIN_SHARE * left_seconds)


def still_loading(digest: str) -> HocketError:
    """What those are told who have waited for a package for too long."""
    return HocketError(
        Reason.EXPERT_LOADING,
        f"{digest} is being loaded, or waits for memory: try again, with a longer deadline",
        retry_after_seconds=_RETRY_SECONDS,
        digest=digest,
    )


@dataclass(slots=True, eq=False)
class ResidentPackage:
    """A package in memory.

    Args:
        digest: Which.
        experts: By ordinal; none once it has left memory.
        size_bytes: What it takes.
        budget: Of the memory where it lies.
        evidence: For judging it again.
        proofs: What vouches for it now.
        facts: What an adapter expert says about itself, for composing it; None for tensor experts.
        in_use_count: Requests that run on it or are about to.
        worth: What decides who makes room; see `Budget.worth`.
        last_use_time: In seconds since the epoch.
        detached: Whether it leaves memory when nothing runs on it any more.
    """

    digest: str
    experts: tuple[Served, ...]
    size_bytes: int
    budget: Budget
    evidence: Evidence
    proofs: tuple[Proof, ...]
    facts: AdapterFacts | None = None
    in_use_count: int = 0
    worth: float = 0.0
    last_use_time: float = field(default_factory=time.time)
    detached: bool = False

    @property
    def unsigned_by_policy(self) -> bool:
        """Whether nothing but the operator's policy admits it."""
        return all(proof.kind == "policy" for proof in self.proofs)


@dataclass(frozen=True, slots=True)
class Absent:
    """A package that is not to be had from memory now.

    Args:
        digest: Which.
        state: On its way, on its way out, or refused.
        reason: Why it was refused; empty otherwise.
    """

    digest: str
    state: ExpertState.ValueType
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Loading:
    """A package on its way, the requests that wait for it, whether none has asked yet, and how far it has come."""

    progress: LoadExpertResponse
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    waiting_count: int = 0
    ahead: bool = False
    package: ResidentPackage | None = None
    task: asyncio.Task[ResidentPackage] | None = None

    def is_wanted(self) -> bool:
        return self.waiting_count > 0

    def report(self, state: LoadState.ValueType, done_bytes: int, total_bytes: int) -> None:
        self.progress = LoadExpertResponse(state=state, done_bytes=done_bytes, total_bytes=total_bytes)
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Residency:
    """The packages of one device.

    Args:
        device: The memory of the device, and the host's too unless `divide` says otherwise.
        loading_max: Packages that may be on their way at once.
        placing_seconds: How long a load that no request waits for waits for room.
        authority: What counts.
        bring: A verified package in host memory, by digest.
        place: Its experts on the device.
        on_change: Called when a package has come or gone.
        pinned: Digests of packages that never make room for others.

    Attributes:
        device: The memory of the device.
        host: The host's, for adapter experts; the same where the device is a CPU.
    """

    def __init__(
        self,
        device: Budget,
        loading_max: int,
        placing_seconds: float,
        authority: Authority,
        bring: Callable[[str, Standing, Report], Awaitable[Supplied]],
        place: Callable[[Prepared], Awaitable[tuple[Served, ...]]],
        on_change: Callable[[], None],
        pinned: Collection[str] = (),
    ) -> None:
        self.device = self.host = device
        self._pinned = frozenset(pinned)
        self._loading_max = loading_max
        self._placing_seconds = placing_seconds
        self._authority = authority
        self._bring = bring
        self._place = place
        self._on_change = on_change
        self._residents: OrderedDict[str, ResidentPackage] = OrderedDict()  # least recently used first
        self._leaving: dict[str, ResidentPackage] = {}
        self._loadings: dict[str, _Loading] = {}
        self._refusals = Refusals(authority)
        self._unplaced: dict[str, int] = {}
        """Bytes of packages that were read ahead and found no room: they are not read again while there is none."""
        self._stopping = False

    def divide(self, device: Budget, host: Budget | None = None) -> None:
        """Say what memory packages may take, before any is loaded.

        Args:
            device: The device's.
            host: The host's, where that is another; None where it is the same.
        """
        self.device = device
        self.host = device if host is None else host

    @property
    def budget_bytes(self) -> int:
        """What packages may take in all."""
        return self.device.total_bytes + self.host_budget_bytes

    @property
    def host_budget_bytes(self) -> int:
        """What adapter experts may take of the host's memory; 0 where they take of the device's, which is the same."""
        return 0 if self.host is self.device else self.host.total_bytes

    @property
    def used_bytes(self) -> int:
        """What they take in all."""
        return self.device.used_bytes + (self.host.used_bytes if self.host is not self.device else 0)

    @property
    def absent(self) -> list[Absent]:
        """What is on its way, on its way out, or was refused a moment ago."""
        coming = [Absent(digest, EXPERT_STATE_VERIFYING) for digest in self._loadings]
        leaving = [Absent(digest, EXPERT_STATE_EVICTING) for digest in self._leaving]
        failed = [Absent(digest, EXPERT_STATE_FAILED, reason) for digest, reason in self._refusals.reasons.items()]
        return coming + leaving + failed

    @property
    def packages(self) -> list[ResidentPackage]:
        """What is resident, most recently used first."""
        return list(reversed(self._residents.values()))

    @property
    def digests(self) -> frozenset[str]:
        """What is resident or on its way."""
        return frozenset(self._residents) | frozenset(self._loadings)

    def get(self, digest: str) -> ResidentPackage | None:
        """A resident package, now in use by the caller until `release`; None if it is not resident."""
        package = self._residents.get(digest)
        if package is not None:
            package.in_use_count += 1
            self._note_use(package)
        return package

    def get_all(self, digests: Sequence[str]) -> list[ResidentPackage] | None:
        """Resident packages, each now in use by the caller until its `release`; None if not all are resident."""
        if not self._residents.keys() >= set(digests):
            return None
        return [package for digest in digests if (package := self.get(digest)) is not None]

    def release(self, package: ResidentPackage) -> None:
        """End one use."""
        package.in_use_count -= 1
        self._note_use(package)
        if not package.in_use_count:
            if package.detached:
                self._forget(package)
            package.budget.wake()

    async def acquire(self, digest: str, seconds: float) -> ResidentPackage:
        """A package, now in use by the caller until `release`; loaded first if need be.

        Giving up waiting does not stop the load.

        Args:
            digest: Which.
            seconds: How long to wait.

        Raises:
            HocketError: `EXPERT_LOADING` if that was too short; `DRAINING` if the worker stops; why it cannot be
                loaded, otherwise.
        """
        if (package := self.get(digest)) is not None:
            return package
        loading, task = self._begin(digest)
        loading.ahead = False
        loading.waiting_count += 1
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except BaseException as error:
            if loading.package is None:
                loading.waiting_count -= 1
                self.device.wake()  # the turn may be another's now
                self.host.wake()
            else:
                self.release(loading.package)
            if isinstance(error, TimeoutError):
                raise still_loading(digest) from None
            raise

    async def load(self, digest: str) -> AsyncGenerator[LoadExpertResponse, None]:
        """Load a package ahead of use, and say how far it is; the last item says READY.

        Leaving early does not stop the load.

        Raises:
            HocketError: Why it cannot be loaded.
        """
        package = self._residents.get(digest)
        if package is None:
            loading, task = self._begin(digest)
            loading.ahead = False
            while not task.done():
                changed = loading.changed
                yield loading.progress
                await changed.wait()
            package = task.result()
        yield LoadExpertResponse(state=LOAD_STATE_READY, done_bytes=package.size_bytes, total_bytes=package.size_bytes)

    def prefetch(self, digests: Sequence[str]) -> None:
        """Load packages that may be asked for soon, as far as few enough are on their way and there is room.

        Nothing leaves memory for them, nothing is begun while somebody waits for room, and nobody is told how it ends.
        """
        if self.host.waits:
            return
        left_bytes = self.host.total_bytes - self.host.used_bytes
        for digest in digests:
            if len(self._loadings) >= min(_PREFETCHES_MAX, self._loading_max) or self._stopping:
                break
            known = digest in self._residents or digest in self._loadings
            if not known and self._unplaced.get(digest, 0) <= left_bytes:
                with suppress(HocketError):  # refused a moment ago
                    loading, _ = self._begin(digest)
                    loading.ahead = True

    def drop(self, digest: str) -> int | None:
        """Let a package leave memory, at once or with its last running request.

        Returns:
            Requests still running on it; None if it is not resident.
        """
        package = self._residents.pop(digest, None)
        if package is None:
            return None
        package.detached = True
        self._leaving[digest] = package
        if not package.in_use_count:
            self._forget(package)
        self._on_change()
        return package.in_use_count

    async def judge_again(self) -> None:
        """Hold everything resident against what counts now; what nobody vouches for leaves memory.

        Packages on their way are held against it when they arrive.
        """
        standing = None
        while standing is not self._authority.standing:
            standing = self._authority.standing
            packages = self.packages
            verdicts = await asyncio.to_thread(_judge, standing, packages)
            for package, verdict in zip(packages, verdicts, strict=True):
                if not isinstance(verdict, HocketError):
                    package.proofs = verdict
                elif self._residents.get(package.digest) is package:
                    in_use_count = self.drop(package.digest)
                    _log.warning(
                        "expert withdrawn", digest=package.digest, reason=verdict.reason, in_use_count=in_use_count
                    )

    def forget_refusal(self, digest: str) -> None:
        """Look at a package again when it is next asked for: there may be a new release of it."""
        self._refusals.forget(digest)

    def most_bytes(self, digests: Collection[str], budget: Budget) -> int:
        """What packages can take together at most: the others that are pinned stay."""
        return budget.total_bytes - sum(
            package.size_bytes
            for package in self._residents.values()
            if package.budget is budget and package.digest in self._pinned and package.digest not in digests
        )

    async def stop(self) -> None:
        """End what is on its way; whoever waits for it is told `DRAINING`, and nothing more is begun."""
        self._stopping = True
        await asyncio.sleep(0)  # a load cancelled before its first step could tell nobody
        tasks = [loading.task for loading in self._loadings.values() if loading.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, digest: str) -> tuple[_Loading, asyncio.Task[ResidentPackage]]:
        """The load of a package, joined or begun."""
        loading = self._loadings.get(digest)
        if loading is not None and loading.task is not None:
            return loading, loading.task
        if self._stopping:
            raise _draining()
        self._refusals.repeat(digest)
        if sum(not loading.ahead for loading in self._loadings.values()) >= self._loading_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{self._loading_max} packages are being loaded already",
                retry_after_seconds=_RETRY_SECONDS,
            )
        loading = self._loadings[digest] = _Loading(LoadExpertResponse(state=LOAD_STATE_FETCHING))
        loading.task = asyncio.create_task(self._run(digest, loading))
        loading.task.add_done_callback(_seen)
        return loading, loading.task

    async def _run(self, digest: str, loading: _Loading) -> ResidentPackage:
        standing = self._authority.standing
        begin = time.perf_counter()
        outcome = "CANCELLED"
        try:
            package = await self._load(digest, loading, standing)
            outcome = "OK"
            _log.info(
                "expert loaded",
                digest=digest,
                size_bytes=package.size_bytes,
                seconds=round(time.perf_counter() - begin, 4),
            )
            return package
        except asyncio.CancelledError:  # only `stop` does that: for those who wait, it is a refusal
            raise _draining() from None
        except HocketError as error:
            outcome = error.reason
            self._refusals.remember(digest, error, standing)
            raise
        except Exception:
            outcome = Reason.INTERNAL
            _log.exception("bug", digest=digest)  # nobody need be waiting for this load
            raise
        finally:
            metrics.EXPERT_LOADS.labels(outcome).inc()
            del self._loadings[digest]
            loading.wake()

    async def _load(self, digest: str, loading: _Loading, standing: Standing) -> ResidentPackage:
        supplied = await self._bring(digest, standing, loading.report)
        size_bytes = supplied.prepared.size_bytes
        budget = self.host if supplied.prepared.facts is not None else self.device  # adapter experts have facts
        loading.report(LOAD_STATE_PLACING, 0, size_bytes)
        if loading.ahead and (budget.waits or budget.used_bytes + size_bytes > budget.total_bytes):
            if len(self._unplaced) >= _UNPLACED_MAX:
                self._unplaced.clear()
            self._unplaced[digest] = size_bytes
            raise still_loading(digest)
        again = not self._take(digest, size_bytes, budget)
        if again:
            del supplied  # what waits for memory must not take it: it is read again, from the cache
            await self._wait_for_room(digest, size_bytes, budget, loading)
        with budget.freed_on_failure(size_bytes):
            if again:
                standing = self._authority.standing
                supplied = await self._bring(digest, standing, _tell_nobody)
            experts, proofs = await self._arrive(supplied, standing)
        package = ResidentPackage(
            digest,
            experts,
            size_bytes,
            budget,
            supplied.evidence,
            proofs,
            supplied.prepared.facts,
            loading.waiting_count,
        )
        package.worth = budget.worth(size_bytes)
        loading.package = self._residents[digest] = package
        budget.wake()  # it can make room from now on
        self._on_change()
        return package

    async def _arrive(self, supplied: Supplied, standing: Standing) -> tuple[tuple[Served, ...], tuple[Proof, ...]]:
        """The experts on the device, and what vouches for them at that moment."""
        experts, proofs = await self._place(supplied.prepared), supplied.proofs
        while standing is not self._authority.standing:  # trust has changed meanwhile
            standing = self._authority.standing
            proofs = await asyncio.to_thread(standing.judge, supplied.evidence)
        return experts, proofs

    def _take(self, digest: str, size_bytes: int, budget: Budget) -> bool:
        """Take that much of a budget if it can be had now, and is nobody else's turn."""
        if size_bytes > (most_bytes := self.most_bytes([digest], budget)):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{digest} takes {size_bytes} bytes, the whole budget is {most_bytes} beside what is pinned: "
                f"raise {budget.setting}, or use a machine with more memory",
                digest=digest,
            )
        turn = budget.turn
        if turn is not None and digest not in turn.digests:
            return False
        self._evict(budget.victims(size_bytes, self._movable(budget)))
        if budget.take(size_bytes):
            return True
        if turn is not None:
            others = [package for package in self._movable(budget) if package.digest not in turn.digests]
            leaving = [package for package in self._leaving.values() if package.budget is budget]
            leaving_bytes = sum(package.size_bytes for package in leaving if package.digest not in turn.digests)
            self._evict(budget.leavers(size_bytes, others, leaving_bytes))
        return False

    async def _wait_for_room(self, digest: str, size_bytes: int, budget: Budget, loading: _Loading) -> None:
        """Take that much of a budget as soon as it can be had, or give up when no request has waited for a while."""
        loop = asyncio.get_running_loop()
        wanted_time = loop.time()
        with budget.waiting(Wait(frozenset([digest]), loading.is_wanted)):
            while not self._take(digest, size_bytes, budget):
                if loading.waiting_count:
                    wanted_time = loop.time()
                elif loop.time() - wanted_time >= self._placing_seconds:
                    raise still_loading(digest)
                await budget.until_changed(self._placing_seconds)

    def _movable(self, budget: Budget) -> list[ResidentPackage]:
        """What is resident in one memory and may make room, least recently used first."""
        return [
            package
            for package in self._residents.values()
            if package.budget is budget and package.digest not in self._pinned
        ]

    def _evict(self, packages: Sequence[ResidentPackage]) -> None:
        for package in packages:
            self.drop(package.digest)
            metrics.EXPERT_EVICTIONS.inc()

    def _note_use(self, package: ResidentPackage) -> None:
        """A package is used now."""
        package.last_use_time = time.time()
        package.worth = package.budget.worth(package.size_bytes)
        if self._residents.get(package.digest) is package:
            self._residents.move_to_end(package.digest)

    def _forget(self, package: ResidentPackage) -> None:
        """Nothing runs any more on a package that has left."""
        if self._leaving.get(package.digest) is package:
            del self._leaving[package.digest]
        adapters = [] if package.facts is None else [*map(weakref.ref, package.experts)]
        package.experts = ()  # a traceback may still know the package
        package.budget.free_when_gone(package.size_bytes, adapters)


def _judge(standing: Standing, packages: list[ResidentPackage]) -> list[tuple[Proof, ...] | HocketError]:
    verdicts: list[tuple[Proof, ...] | HocketError] = []
    for package in packages:
        try:
            verdicts.append(standing.judge(package.evidence))
        except HocketError as error:
            verdicts.append(error)
    return verdicts


def _tell_nobody(_state: LoadState.ValueType, _done_bytes: int, _total_bytes: int) -> None:
    """A report for a step that its reader has seen before."""


def _draining() -> HocketError:
    return HocketError(Reason.DRAINING, "this worker is shutting down: try another one")


def _seen(task: asyncio.Task[ResidentPackage]) -> None:
    """Nobody has to wait for a load: its failure is in the metrics, and in the answer to whoever does."""
    if not task.cancelled():
        task.exception()
