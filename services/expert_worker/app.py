"""The expert worker, wired."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from hocket import known_bases
from hocket.client.registry import RegistryClient
from hocket.errors import HocketError, Reason
from hocket.packages import Policy
from hocket.rpc.handlers import Handlers, Tokens
from hocket.telemetry import metrics
from hocket.trust_folder import TrustFolder
from hocket.v1.expert_worker_pb2_grpc import add_ExpertWorkerServiceServicer_to_server
from hocket.v1.registry_pb2 import Residency as ResidencyMessage
from hocket.v1.registry_pb2 import WorkerState
from services.expert_worker.announce import Announcer
from services.expert_worker.authority import Authority
from services.expert_worker.background import keep_running
from services.expert_worker.batching import Batcher
from services.expert_worker.budget import Budget
from services.expert_worker.cache import PackageCache
from services.expert_worker.credentials import read_all
from services.expert_worker.device import budget_bytes, choose_device, compute_threads, host_bytes
from services.expert_worker.feed import Feed
from services.expert_worker.journal import Journal
from services.expert_worker.loader import place, prepare
from services.expert_worker.residency import Residency
from services.expert_worker.revocations import RevocationFile
from services.expert_worker.service import ADMIN_METHODS, WorkerServicer
from services.expert_worker.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hocket.known_bases import KnownBase
    from hocket.packages import Package
    from hocket.rpc.channel import Channels
    from services.expert_worker.loader import Prepared, Served
    from services.expert_worker.settings import WorkerSettings
    from services.expert_worker.text_engine import TextEngine

_log: Final = structlog.get_logger("worker")
_VERIFYING_THREADS: Final = 4
_FAREWELL_SECONDS: Final = 0.5
_PRELOAD_PAUSE_SECONDS: Final = 1.0
_NO_NAME: Final = re.compile(r"[^a-z0-9]+")
_NAME_LENGTH_MAX: Final = 64


class WorkerApp:
    """An expert worker's handlers, its compute threads, and the tasks that keep it current.

    Args:
        settings: What the operator chose.
        channels: To its registry.
        address: How others reach it: `host:port`, or `local:name`.
        worker_token: What it shows the registry to announce itself; None where that is open.
        tokens: The admin token that guards loading and unloading, if there is one.

    Raises:
        HocketError: `BAD_REQUEST` if this machine has not the device chosen, or cannot halve on it; `BAD_KEY_FILE` if a
            credential file holds none, or is open to others.

    Attributes:
        handlers: What it serves.
        failed: Set when its device has failed: the process has to end, and start again. Read it after `start`.
        residency: What is in memory.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        channels: Channels,
        address: str,
        worker_token: str | None = None,
        tokens: Tokens = Tokens(),  # noqa: B008 - frozen
    ) -> None:
        self._settings = settings
        self._address = address
        self._name = settings.name or _name_at(address)
        self._device = choose_device(settings.device)
        if settings.half and self._device.type != "cuda":
            raise HocketError(
                Reason.BAD_REQUEST,
                f"worker.half is for CUDA devices, and this worker computes on {self._device}: leave it out",
            )
        self._executor = ThreadPoolExecutor(_VERIFYING_THREADS, thread_name_prefix="verify")
        self._cache = PackageCache(settings.data_dir / "cache", settings.cache_bytes)
        self._journal = Journal(settings.data_dir / "journal")
        self._revocations = RevocationFile(settings.data_dir / "revocations.json")
        policy = Policy(allow_unsigned=settings.allow_unsigned, allow_expired_licences=settings.allow_expired_licences)
        self._credentials = read_all(settings.credentials)
        self._authority = Authority(TrustFolder(settings.trust_dir), policy, self._credentials)
        self._registry = RegistryClient(channels.get(settings.registry), token=worker_token)
        self._announcer = Announcer(self._registry, self._state)
        self._text: TextEngine | None = None
        self.residency = Residency(
            Budget(0),  # until `start`: a base takes its memory first
            settings.loading_max,
            settings.default_deadline_seconds,
            self._authority,
            Supply(
                self._cache,
                self._registry,
                self._executor,
                _VERIFYING_THREADS,
                lambda: self.residency.digests,
                self._journal,
                self._prepare,
            ).bring,
            self._place,
            self._announcer.notice,
            settings.preload,
        )
        self._batcher = Batcher(
            self._device,
            compute_threads(settings.compute_threads, settings.workers_on_machine),
            settings.queue_max,
            self._journal,
        )
        self._servicer = WorkerServicer(
            self._name,
            str(self._device),
            self.residency,
            self._batcher,
            self._journal,
            settings.default_deadline_seconds,
        )
        self.handlers = Handlers(
            tokens=replace(tokens, admin_methods=ADMIN_METHODS), in_flight_max=settings.in_flight_max
        )
        self.handlers.add(add_ExpertWorkerServiceServicer_to_server, self._servicer)
        self.failed = asyncio.Event()
        self._leaving = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the base, if there is one, learn what counts, then serve; the registry need not be there.

        Raises:
            HocketError: `BAD_TRUST_FILE` if what was withdrawn earlier cannot be read; `BAD_REQUEST` if another
                worker lives in the same data folder, or it is not said which of several bases is meant;
                `UNKNOWN_BASE`, `BASE_MISMATCH`, `NOT_SERVABLE`, `DEVICE_MEMORY` if the base cannot be served.
        """
        await self._open_base()
        self._authority.withdraw(await asyncio.to_thread(self._revocations.read))
        await self._authority.read_folder()
        await asyncio.to_thread(self._journal.open)
        await asyncio.to_thread(self._cache.tidy)
        if self._settings.allow_unsigned:
            _log.warning("allow_unsigned is on: this worker runs packages that nobody trusted has signed")
        if self._settings.allow_expired_licences:
            _log.warning("allow_expired_licences is on: this worker runs packages whose licence has ended")
        metrics.RESIDENT_BYTES.labels(str(self._device)).set_function(lambda: self.residency.used_bytes)
        self._batcher.start()
        if self._text is not None:
            self._text.engine.start()
            self._text.observe()
        feed = Feed(self._registry, self._authority, self._revocations, self.residency.forget_refusal)
        running = {
            "the registry's feed": feed.follow,
            "the lease": self._announcer.hold,
            "the trust folder": self._authority.follow_folder,
            "what is resident": self._stay_current,
        }
        self._tasks = [asyncio.create_task(keep_running(name, run)) for name, run in running.items()]
        self._tasks += [asyncio.create_task(self._preload(digest)) for digest in self._settings.preload]

    async def ready(self) -> None:
        """Return when the registry knows it: until then nobody new sends requests here.

        What is not in memory is loaded when it is asked for.
        """
        await self._announcer.known.wait()

    def leave(self) -> None:
        """Tell the registry, and so the routers, to send no more."""
        self._leaving = True
        self._announcer.notice()

    async def stop(self) -> None:
        """Tell the registry, end every task, finish what is queued."""
        if not self._tasks:
            return
        self._leaving = self.handlers.draining = True
        await self._announcer.tell(_FAREWELL_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._text is not None:
            await self._text.engine.stop()
            self._text.arena.close()
        if self._servicer.texts is not None:
            self._servicer.texts.stop()
        await self.residency.stop()
        await self._batcher.stop()
        self._journal.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _stay_current(self) -> None:
        """Judge what is resident again whenever it has changed what counts; what was withdrawn leaves the cache too."""
        dropped: frozenset[str] = frozenset()
        while True:
            await self._authority.changed.wait()
            self._authority.changed.clear()
            await self.residency.judge_again()
            withdrawn = self._authority.standing.withdrawn.digests
            await asyncio.to_thread(self._forget, withdrawn - dropped)
            dropped = withdrawn

    def _forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._cache.drop(digest)

    async def _preload(self, digest: str) -> None:
        """Load a package, waiting for the registry if need be."""

        async def load() -> None:
            async for _ in self.residency.load(digest):
                pass

        while True:
            try:
                return await load()
            except HocketError as error:
                if error.reason is not Reason.UNREACHABLE:
                    _log.warning("not preloaded", digest=digest, reason=error.reason, message=error.message)
                    return None
            await asyncio.sleep(_PRELOAD_PAUSE_SECONDS)

    async def _open_base(self) -> None:
        """Load the base that was chosen, and divide the memory that is left."""
        settings = self._settings
        known = await asyncio.to_thread(self._known_base)
        if known is None:
            own = settings.budget_bytes or budget_bytes(self._device, settings.workers_on_machine)
            self.residency.divide(Budget(own))
            return
        # transformers takes seconds to import: only who has a base pays for it.
        _log.info("loading the text libraries, which takes some seconds")
        from services.expert_worker.text import Texts  # noqa: PLC0415
        from services.expert_worker.text_engine import open_text_engine  # noqa: PLC0415

        _log.info("opening the base", base=known.name, path=str(known.path))
        text = self._text = await asyncio.to_thread(open_text_engine, known, settings, self._device)
        elsewhere = None
        if self._device.type == "cuda":
            elsewhere = Budget(settings.host_bytes or host_bytes(settings.workers_on_machine), "worker.host_bytes")
        self.residency.divide(Budget(text.experts_bytes), elsewhere)
        self.failed = text.engine.failed
        self._servicer.texts = Texts(self._name, text, self.residency, settings.text_deadline_seconds)

    def _known_base(self) -> KnownBase | None:
        if self._settings.bases_dir is None:
            return None
        known = known_bases.read(self._settings.bases_dir)
        for problem in known.problems:
            _log.warning("base left out", reason=problem.reason, message=problem.message)
        return known.find(self._settings.base)

    def _prepare(self, package: Package) -> Prepared:
        return prepare(
            package,
            None if self._text is None else self._text.base,
            half=self._settings.half,
            int8_adapters=self._settings.adapters == "int8",
            page_locked_adapters=self._device.type == "cuda",
        )

    async def _place(self, prepared: Prepared) -> tuple[Served, ...]:
        def marked() -> None:
            with self._journal.loading(prepared.digest):
                placed.append(place(prepared, self._device))

        placed: list[tuple[Served, ...]] = []  # a future that has run keeps its result until that is collected
        await asyncio.get_running_loop().run_in_executor(self._executor, marked)
        return placed.pop()

    def _state(self) -> WorkerState:
        state = WorkerState(
            worker=self._name,
            address=self._address,
            device=str(self._device),
            formats=("apr",),
            budget_bytes=self.residency.device.total_bytes,
            residency=[
                ResidencyMessage(digest=package.digest, tier=self._servicer.tier(package))
                for package in self.residency.packages
            ],
            draining=self._leaving,
            unlocks=sorted(self._credentials),
            host_budget_bytes=self.residency.host_budget_bytes,
        )
        if self._text is not None:
            state.formats.append("expert")
            state.base.CopyFrom(self._text.base_message)
            state.vocabulary_sha256 = self._text.base.vocabulary_sha256
        return state


def _name_at(address: str) -> str:
    """A worker name made from an address: `127-0-0-1-50054`, `local-worker`."""
    return _NO_NAME.sub("-", address.lower())[-_NAME_LENGTH_MAX:].strip("-")
