"""What is in memory, under a budget of bytes.

Everything here runs in the event loop, so no lock guards a state. A package is absent, loading (once, however many ask)
or resident; while requests run on it, it is counted as in use and stays, and so does what is pinned. Room is made by
dropping what is neither; when that is not enough, loads wait until something ends, and whichever then fits goes on, the
longest waiting first: one that is too large for now is passed by others, for a while. Then it has the turn: nobody else
gets room in that memory until it has, and of what is in use as much leaves, as soon as its requests end, as is missing;
whoever wants that from then on waits behind it. A request waits until its own deadline; a load that no request waits
for never has the turn, and gives up by itself.

Who makes room is decided by GreedyDual-Size (Cao and Irani 1997): each use, when it begins and when it ends, gives a
package the worth of bringing it back, for each of its bytes, on top of the most that one that left was worth. So what
was used longest ago leaves first among equals, and a large package before a small one, which takes nearly as long to
bring back.

Tensor experts lie where they compute. Adapter experts lie in host memory, folded, and are copied from there to where
running experts lie side by side (`engine/arena.py`). On a CPU both are in one memory, with one budget.

A request for several packages gets all of them or none. While they are loaded it holds nothing, so that no two can
each wait for what the other has; only one at a time, in the order of their arrival, gathers what it finds and keeps it.
It begins behind those who have the turn before it, and once it holds something it is the first of all: what it still
wants takes no heed of turns, and nobody else has one.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
import weakref
from collections import OrderedDict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from hocket.errors import HocketError, Reason, Situation
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

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence

    from hocket.packages import Proof
    from hocket.packages.adapter import AdapterFacts
    from services.expert_worker.authority import Authority, Evidence, Standing
    from services.expert_worker.loader import Prepared, Served
    from services.expert_worker.supply import Report, Supplied

T = TypeVar("T")

_log: Final = structlog.get_logger("worker")
_REFUSAL_SECONDS: Final = 5.0
"""How long a refusal is repeated without looking at the package again, unless trust changes. That of a wrong credential
is repeated until then, a new release of the package, or an admin's LoadExpert."""
_REFUSALS_MAX: Final = 1024
_WRONG_CREDENTIAL: Final = frozenset({Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT})
_RETRY_SECONDS: Final = 0.5
_MARGIN_SHARE: Final = 0.1
_MARGIN_SECONDS_MAX: Final = 0.1
_RELOAD_SECONDS: Final = 0.002
"""Of bringing back an empty package from the cache on disk: opening it and checking what vouches for it."""
_RELOAD_BYTES_PER_SECOND: Final = 5e8
"""Beside that: reading, hashing and decoding."""
_LINGERING_SECONDS: Final = 0.002
"""After that, and twice and four times it, and so on, is looked whether what has left is held by nobody any more."""
_COLLECTING_SECONDS: Final = 1.0
"""What lingers for so long is held by garbage, as the frames of an exception are; then it is looked this often."""
_PREFETCHES_MAX: Final = 2
"""Loads that no request has asked for yet, at once."""


def loading_seconds(left_seconds: float) -> float:
    """How long a call with so much time left should wait for experts: its reason still has to reach the caller."""
    return left_seconds - min(_MARGIN_SECONDS_MAX, _MARGIN_SHARE * left_seconds)


@dataclass(slots=True, eq=False)
class ResidentPackage:
    """A package in memory.

    Args:
        digest: Which.
        experts: By ordinal; none once it has left memory.
        size_bytes: What it takes.
        evidence: For judging it again.
        proofs: What vouches for it now.
        facts: What an adapter expert says about itself, for composing it; None for tensor experts.
        in_use_count: Requests that run on it or are about to.
        worth: For how long it stays, by GreedyDual-Size; no unit.
        last_use_time: In seconds since the epoch.
        detached: Whether it leaves memory when nothing runs on it any more.
    """

    digest: str
    experts: tuple[Served, ...]
    size_bytes: int
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


@dataclass(slots=True, eq=False)
class _Wait:
    """Somebody waits for room in a memory.

    Attributes:
        digests: For these: one load's, or those of a set that is gathered.
        begin_time: Since when, on the loop's clock.
        loading: The load; None for a set.
    """

    digests: frozenset[str]
    begin_time: float
    loading: _Loading | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether a request waits for it."""
        return self.loading is None or self.loading.waiting_count > 0


@dataclass(slots=True)
class Budget:
    """Bytes of one memory.

    Args:
        total_bytes: What packages may take together.
        used_bytes: What they take.
        lingering_bytes: Of these, what has left and is still held by somebody for a moment.
        worth: The most that what has made room was worth.
        waits: Who waits for room there, the first in order first.
    """

    total_bytes: int
    used_bytes: int = 0
    lingering_bytes: int = 0
    worth: float = 0.0
    waits: list[_Wait] = field(default_factory=list)


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

    def report(self, state: LoadState.ValueType, done_bytes: int, total_bytes: int) -> None:
        self.progress = LoadExpertResponse(state=state, done_bytes=done_bytes, total_bytes=total_bytes)
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Residency:
    """The packages of one device.

    Args:
        budget_bytes: What they may take together, on the device and in host memory; see `divide`.
        loading_max: Packages that may be on their way at once.
        placing_seconds: How long a load that no request waits for waits for room.
        authority: What counts.
        bring: A verified package in host memory, by digest.
        place: Its experts on the device.
        on_change: Called when a package has come or gone.
        pinned: Digests of packages that never make room for others.

    Attributes:
        patience_seconds: How long one that does not fit may be passed by those that do.
        device: The memory of the device.
        host: The host's, for adapter experts; the same where the device is a CPU.
    """

    def __init__(
        self,
        budget_bytes: int,
        loading_max: int,
        placing_seconds: float,
        authority: Authority,
        bring: Callable[[str, Standing, Report], Awaitable[Supplied]],
        place: Callable[[Prepared], Awaitable[tuple[Served, ...]]],
        on_change: Callable[[], None],
        pinned: Collection[str] = (),
    ) -> None:
        self.device = self.host = Budget(budget_bytes)
        self._pinned = frozenset(pinned)
        self._loading_max = loading_max
        self._placing_seconds = placing_seconds
        self.patience_seconds = 2.0
        self._authority = authority
        self._bring = bring
        self._place = place
        self._on_change = on_change
        self._residents: OrderedDict[str, ResidentPackage] = OrderedDict()  # least recently used first
        self._leaving: dict[str, ResidentPackage] = {}
        self._loadings: dict[str, _Loading] = {}
        self._refusals: dict[str, tuple[HocketError, Standing, float]] = {}
        self._unplaced: dict[str, int] = {}
        """Bytes of packages that were read ahead and found no room: they are not read again while there is none."""
        self._freed = asyncio.Event()
        self._gathering = asyncio.Lock()  # lets in whoever waits longest
        self._stopping = False

    def divide(self, device_bytes: int, host_bytes: int | None = None) -> None:
        """Say what packages may take, before any is loaded.

        Args:
            device_bytes: On the device.
            host_bytes: In host memory, where that is another; None where it is the same.
        """
        self.device = self.host = Budget(device_bytes)
        if host_bytes is not None:
            self.host = Budget(host_bytes)

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
        failed = [
            Absent(digest, EXPERT_STATE_FAILED, error.reason)
            for digest, (error, standing, until) in self._refusals.items()
            if standing is self._authority.standing and time.monotonic() < until
        ]
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

    def release(self, package: ResidentPackage) -> None:
        """End one use."""
        package.in_use_count -= 1
        self._note_use(package)
        if not package.in_use_count:
            if package.detached:
                self._forget(package)
            self._freed.set()

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
                self._freed.set()  # the turn may be another's now
            else:
                self.release(loading.package)
            if isinstance(error, TimeoutError):
                raise _still_loading(digest) from None
            raise

    async def acquire_all(self, digests: Sequence[str], seconds: float) -> list[ResidentPackage]:
        """Packages, each now in use by the caller until its `release`: all of them, or none.

        Args:
            digests: Which, each once.
            seconds: How long to wait.

        Returns:
            In the order of `digests`.

        Raises:
            HocketError: As `acquire`; `DEVICE_MEMORY` if they exceed the budget together.
        """
        if (found := self._get_all(digests)) is not None:
            return found
        if len(digests) == 1:
            return [await self.acquire(digests[0], seconds)]
        end_time = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(end_time):
                await self._bring_all(digests, end_time)
                if (found := self._get_all(digests)) is not None:
                    return found
                return await self._gather(digests, end_time)  # some have made room for others since
        except TimeoutError:
            raise _still_loading(digests[0]) from None

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
        self._refusals.pop(digest, None)

    async def stop(self) -> None:
        """End what is on its way; whoever waits for it is told `DRAINING`, and nothing more is begun."""
        self._stopping = True
        await asyncio.sleep(0)  # a load cancelled before its first step could tell nobody
        tasks = [loading.task for loading in self._loadings.values() if loading.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _get_all(self, digests: Sequence[str]) -> list[ResidentPackage] | None:
        """All of them, if all are resident."""
        if not self._residents.keys() >= set(digests):
            return None
        return [package for digest in digests if (package := self.get(digest)) is not None]

    async def _bring_all(self, digests: Sequence[str], end_time: float) -> None:
        """Have each loaded once, all at the same time, and hold none of them.

        What is slow, or cannot be loaded at all, shows here, and holds up nobody else.
        """

        async def size_bytes(digest: str) -> int:
            package = await self.acquire(digest, end_time - asyncio.get_running_loop().time())
            self.release(package)
            return package.size_bytes if self._budget(package.facts) is self.host else 0

        bringing = [asyncio.create_task(size_bytes(digest)) for digest in digests]
        try:
            total = sum(await asyncio.gather(*bringing))
        finally:
            for task in bringing:
                task.cancel()
            await asyncio.gather(*bringing, return_exceptions=True)
        if total > (most_bytes := self._most_bytes(digests, self.host)):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"these {len(digests)} experts take {total} bytes together, the whole budget is "
                f"{most_bytes} beside what is pinned: ask for fewer, raise {self._setting(self.host)}, or use a "
                "machine with more memory",
            )

    async def _gather(self, digests: Sequence[str], end_time: float) -> list[ResidentPackage]:
        """All of them, keeping those that are there while the others come back: one set at a time, in its turn."""
        waits = self.host.waits
        wait = _Wait(frozenset(digests), asyncio.get_running_loop().time())
        waits.append(wait)  # here and at the lock in one order, so that whoever has the turn can go on
        try:
            async with self._gathering:
                while self._turn(self.host) not in (None, wait):
                    await self._until_freed()
                waits.remove(wait)
                waits.insert(0, wait)
                return await self._keep_all(digests, end_time)
        finally:
            waits.remove(wait)
            self._freed.set()

    async def _keep_all(self, digests: Sequence[str], end_time: float) -> list[ResidentPackage]:
        with ExitStack() as undo:
            held: dict[str, ResidentPackage] = {}

            def hold(package: ResidentPackage) -> None:
                held[package.digest] = package
                undo.callback(self.release, package)

            for digest in digests:
                if (package := self.get(digest)) is not None:
                    hold(package)
            for digest in digests:
                if digest not in held:
                    hold(await self.acquire(digest, end_time - asyncio.get_running_loop().time()))
            undo.pop_all()
            return [held[digest] for digest in digests]

    def _begin(self, digest: str) -> tuple[_Loading, asyncio.Task[ResidentPackage]]:
        """The load of a package, joined or begun."""
        loading = self._loadings.get(digest)
        if loading is not None and loading.task is not None:
            return loading, loading.task
        if self._stopping:
            raise _draining()
        self._repeat_refusal(digest)
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
            self._remember_refusal(digest, error, standing)
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
        size_bytes, budget = supplied.prepared.size_bytes, self._budget(supplied.prepared.facts)
        loading.report(LOAD_STATE_PLACING, 0, size_bytes)
        if loading.ahead and (budget.waits or budget.used_bytes + size_bytes > budget.total_bytes):
            if len(self._unplaced) >= _REFUSALS_MAX:
                self._unplaced.clear()
            self._unplaced[digest] = size_bytes
            raise _still_loading(digest)
        if not self._take(digest, size_bytes, budget):
            del supplied  # what waits for memory must not take it: it is read again, from the cache
            await self._wait_for_room(digest, size_bytes, budget, loading)
            standing = self._authority.standing
            supplied = await self._or_free(size_bytes, budget, self._bring(digest, standing, _tell_nobody))
        experts, proofs = await self._or_free(size_bytes, budget, self._arrive(supplied, standing))
        package = ResidentPackage(
            digest,
            experts,
            size_bytes,
            supplied.evidence,
            proofs,
            supplied.prepared.facts,
            loading.waiting_count,
        )
        package.worth = self._worth_of(package)
        loading.package = self._residents[digest] = package
        self._freed.set()  # it can make room from now on
        self._on_change()
        return package

    async def _arrive(self, supplied: Supplied, standing: Standing) -> tuple[tuple[Served, ...], tuple[Proof, ...]]:
        """The experts on the device, and what vouches for them at that moment."""
        experts, proofs = await self._place(supplied.prepared), supplied.proofs
        while standing is not self._authority.standing:  # trust has changed meanwhile
            standing = self._authority.standing
            proofs = await asyncio.to_thread(standing.judge, supplied.evidence)
        return experts, proofs

    async def _or_free(self, size_bytes: int, budget: Budget, work: Awaitable[T]) -> T:
        """Do something with memory already taken; if it fails, give the memory back."""
        try:
            return await work
        except BaseException:
            self._free(size_bytes, budget)
            raise

    def _take(self, digest: str, size_bytes: int, budget: Budget) -> bool:
        """Take that much of a budget if it can be had now, and is nobody else's turn."""
        if size_bytes > (most_bytes := self._most_bytes([digest], budget)):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{digest} takes {size_bytes} bytes, the whole budget is {most_bytes} beside what is pinned: "
                f"raise {self._setting(budget)}, or use a machine with more memory",
                digest=digest,
            )
        turn = self._turn(budget)
        if turn is not None and digest not in turn.digests:
            return False
        if not self._make_room(size_bytes, budget):
            if turn is not None:
                self._let_leave(size_bytes, budget, turn.digests)
            return False
        budget.used_bytes += size_bytes
        return True

    async def _wait_for_room(self, digest: str, size_bytes: int, budget: Budget, loading: _Loading) -> None:
        """Take that much of a budget as soon as it can be had, or give up when no request has waited for a while."""
        loop = asyncio.get_running_loop()
        wanted_time = loop.time()
        wait = _Wait(frozenset([digest]), wanted_time, loading)
        budget.waits.append(wait)
        try:
            while not self._take(digest, size_bytes, budget):
                if loading.waiting_count:
                    wanted_time = loop.time()
                elif loop.time() - wanted_time >= self._placing_seconds:
                    raise _still_loading(digest)
                await self._until_freed()
        finally:
            budget.waits.remove(wait)
            self._freed.set()

    async def _until_freed(self) -> None:
        """Return when there may be room, or another turn, and now and then."""
        self._freed.clear()
        # All are woken, not this one alone: who begins to wait again does so behind the others.
        seconds = min(self._placing_seconds, self.patience_seconds / 2)
        alarm = asyncio.get_running_loop().call_later(seconds, self._freed.set)
        try:
            await self._freed.wait()
        finally:
            alarm.cancel()

    def _turn(self, budget: Budget) -> _Wait | None:
        """Who goes before everybody else: the first of those who wait, once it has waited long enough."""
        first = next((wait for wait in budget.waits if wait.is_wanted), None)
        if first is None or asyncio.get_running_loop().time() - first.begin_time < self.patience_seconds:
            return None
        return first

    def _most_bytes(self, digests: Collection[str], budget: Budget) -> int:
        """What packages can take together at most: the others that are pinned stay."""
        return budget.total_bytes - sum(
            package.size_bytes
            for package in self._of(budget)
            if package.digest in self._pinned and package.digest not in digests
        )

    def _of(self, budget: Budget) -> list[ResidentPackage]:
        """What is resident in one memory."""
        return [package for package in self._residents.values() if self._budget(package.facts) is budget]

    def _make_room(self, size_bytes: int, budget: Budget) -> bool:
        """Drop what is idle, the least worth first, if that makes enough room; else drop nothing."""
        missing = self._missing_bytes(size_bytes, budget)
        idle = [
            package for package in self._of(budget) if not package.in_use_count and package.digest not in self._pinned
        ]
        if sum(package.size_bytes for package in idle) < missing:
            return False
        self._evict(sorted(idle, key=lambda package: package.worth), missing, budget)
        return budget.used_bytes + size_bytes <= budget.total_bytes

    def _let_leave(self, size_bytes: int, budget: Budget, staying: Collection[str]) -> None:
        """Drop what is idle and what is in use until there is room once its requests have ended.

        What is idle goes first, then the least worth.
        """
        leaving = sum(
            package.size_bytes
            for package in self._leaving.values()
            if self._budget(package.facts) is budget and package.digest not in staying
        )
        others = [
            package
            for package in self._of(budget)
            if package.digest not in self._pinned and package.digest not in staying
        ]
        others.sort(key=lambda package: (package.in_use_count > 0, package.worth))
        self._evict(others, self._missing_bytes(size_bytes, budget) - leaving, budget)

    def _missing_bytes(self, size_bytes: int, budget: Budget) -> int:
        """What somebody has to give up before so much can be had."""
        return budget.used_bytes + size_bytes - budget.total_bytes - budget.lingering_bytes

    def _evict(self, packages: Sequence[ResidentPackage], missing: int, budget: Budget) -> None:
        """Drop as many of these as it takes, the first one first."""
        for package in packages:
            if missing <= 0:
                break
            self.drop(package.digest)
            budget.worth = max(budget.worth, package.worth)  # what was in use for long is worth what it was then
            missing -= package.size_bytes
            metrics.EXPERT_EVICTIONS.inc()

    def _note_use(self, package: ResidentPackage) -> None:
        """A package is used now."""
        package.last_use_time = time.time()
        package.worth = self._worth_of(package)
        if self._residents.get(package.digest) is package:
            self._residents.move_to_end(package.digest)

    def _worth_of(self, package: ResidentPackage) -> float:
        """What a package that is used now is worth: seconds that it takes to bring back, for each byte."""
        seconds = _RELOAD_SECONDS + package.size_bytes / _RELOAD_BYTES_PER_SECOND
        return self._budget(package.facts).worth + seconds / max(1, package.size_bytes)

    def _budget(self, facts: AdapterFacts | None) -> Budget:
        """Whose memory a package takes: adapter experts have facts."""
        return self.device if facts is None else self.host

    def _setting(self, budget: Budget) -> str:
        return "worker.budget_bytes" if budget is self.device else "worker.host_bytes"

    def _forget(self, package: ResidentPackage) -> None:
        """Nothing runs any more on a package that has left."""
        if self._leaving.get(package.digest) is package:
            del self._leaving[package.digest]
        budget = self._budget(package.facts)
        adapters = [] if package.facts is None else [*map(weakref.ref, package.experts)]
        package.experts = ()  # a traceback may still know the package
        budget.lingering_bytes += package.size_bytes
        self._free_when_gone(adapters, package.size_bytes, budget, _LINGERING_SECONDS)

    def _free_when_gone(
        self, adapters: Sequence[weakref.ref[Served]], size_bytes: int, budget: Budget, pause_seconds: float
    ) -> None:
        """Give memory to others once it is really there: the engine's threads hold an expert a moment longer."""
        if all(adapter() is None for adapter in adapters):
            budget.lingering_bytes -= size_bytes
            self._free(size_bytes, budget)
            return
        longer_seconds = min(2 * pause_seconds, _COLLECTING_SECONDS)
        if pause_seconds < longer_seconds == _COLLECTING_SECONDS:
            gc.collect()
        asyncio.get_running_loop().call_later(
            pause_seconds, self._free_when_gone, adapters, size_bytes, budget, longer_seconds
        )

    def _free(self, size_bytes: int, budget: Budget) -> None:
        budget.used_bytes -= size_bytes
        self._freed.set()

    def _remember_refusal(self, digest: str, error: HocketError, standing: Standing) -> None:
        lasting = error.situation in {Situation.REFUSED, Situation.MALFORMED}
        if lasting or (error.reason is Reason.DEVICE_MEMORY and error.retry_after_seconds is None):
            if len(self._refusals) >= _REFUSALS_MAX:
                self._refusals.clear()
            # Credentials are read at start: a wrong one stays so, and every other try would derive a key in vain.
            seconds = math.inf if error.reason in _WRONG_CREDENTIAL else _REFUSAL_SECONDS
            # A copy: the traceback of the error itself keeps the bytes of the package in memory.
            self._refusals[digest] = error.restated(error.message), standing, time.monotonic() + seconds

    def _repeat_refusal(self, digest: str) -> None:
        if (remembered := self._refusals.get(digest)) is not None:
            error, standing, until = remembered
            if standing is self._authority.standing and time.monotonic() < until:
                raise error.with_traceback(None)
            del self._refusals[digest]


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


def _still_loading(digest: str) -> HocketError:
    return HocketError(
        Reason.EXPERT_LOADING,
        f"{digest} is being loaded, or waits for memory: try again, with a longer deadline",
        retry_after_seconds=_RETRY_SECONDS,
        digest=digest,
    )


def _draining() -> HocketError:
    return HocketError(Reason.DRAINING, "this worker is shutting down: try another one")


def _seen(task: asyncio.Task[ResidentPackage]) -> None:
    """Nobody has to wait for a load: its failure is in the metrics, and in the answer to whoever does."""
    if not task.cancelled():
        task.exception()
