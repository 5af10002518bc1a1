"""ExpertWorkerService: messages in, messages out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, is_digest
from hocket.rpc.convert import duration, matrix_to_tensor, tensor_to_matrix
from hocket.rpc.handlers import LOAD_KEY, add_trailing, remaining_seconds
from hocket.telemetry import metrics
from hocket.v1 import expert_worker_pb2, expert_worker_pb2_grpc
from services.expert_worker.loader import Expert
from services.expert_worker.residency import loading_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hocket.packages import Proof
    from hocket.rpc.handlers import Context
    from services.expert_worker.batching import Answer, Batcher
    from services.expert_worker.journal import Journal
    from services.expert_worker.residency import Residency, ResidentPackage
    from services.expert_worker.text import Texts

ADMIN_METHODS: Final = frozenset({"LoadExpert", "UnloadExpert"})

_UNSIGNED_USES: Final = metrics.UNSIGNED_USES.labels("expert_worker")


class WorkerServicer(expert_worker_pb2_grpc.ExpertWorkerServiceServicer):
    """Runs experts, and says which there are.

    Args:
        name: The worker's own name.
        device: `cpu` or `cuda:0`.
        residency: What is in memory.
        batcher: What computes.
        journal: What is quarantined.
        default_deadline_seconds: Deadline of a call that brings none.

    Attributes:
        texts: What answers texts; None without a base.
    """

    def __init__(
        self,
        name: str,
        device: str,
        residency: Residency,
        batcher: Batcher,
        journal: Journal,
        default_deadline_seconds: float,
    ) -> None:
        self._name = name
        self._device = device
        self._residency = residency
        self._batcher = batcher
        self._journal = journal
        self._default_deadline_seconds = default_deadline_seconds
        self._in_flight_count = 0
        self.texts: Texts | None = None

    def tier(self, package: ResidentPackage) -> expert_worker_pb2.Tier.ValueType:
        """Where a package is: adapter experts are in host memory, whatever is copied from there."""
        if self._device == "cpu" or package.facts is not None:
            return expert_worker_pb2.TIER_HOST
        return expert_worker_pb2.TIER_DEVICE

    async def RunTensor(
        self, request: expert_worker_pb2.RunTensorRequest, context: Context
    ) -> expert_worker_pb2.RunTensorResponse:
        """One expert's answer to a batch of rows."""
        begin = time.perf_counter()
        self._in_flight_count += 1
        try:
            answer = await self._run(request, context)
        finally:
            self._in_flight_count -= 1
        self._add_load(context)
        return expert_worker_pb2.RunTensorResponse(
            output=matrix_to_tensor(answer.output),
            wait=duration(max(0.0, answer.begin - begin)),
            compute=duration(answer.compute_seconds),
        )

    async def _run(self, request: expert_worker_pb2.RunTensorRequest, context: Context) -> Answer:
        which = ExpertId.parse(request.expert)
        rows = tensor_to_matrix(request.input)
        package = self._residency.get(which.digest)
        if package is None:
            left = remaining_seconds(context, self._default_deadline_seconds)
            package = await self._residency.acquire(which.digest, loading_seconds(left))
        try:
            expert = _member(package, which)
            expert.check(rows)
            future = self._batcher.submit(expert, rows, partial(self._residency.release, package))
        except BaseException:
            self._residency.release(package)
            raise
        if package.unsigned_by_policy:
            _UNSIGNED_USES.inc()
        if context.time_remaining() is not None:
            return await future  # the transport cancels this call at its deadline
        try:
            async with asyncio.timeout(self._default_deadline_seconds):
                return await future
        except TimeoutError:
            raise HocketError(Reason.DEADLINE, "the device was busy until this server's own deadline") from None

    async def RunText(
        self, request: expert_worker_pb2.RunTextRequest, context: Context
    ) -> AsyncIterator[expert_worker_pb2.RunTextResponse]:
        """A start, deltas, and a finish."""
        if self.texts is None:
            raise HocketError(
                Reason.NO_BASE,
                "this worker has no base language model, and answers no texts (`hocket base add`, then worker.base)",
            )
        self._in_flight_count += 1
        try:
            async with aclosing(self.texts.answer(request.job, context)) as events:
                async for event in events:
                    yield expert_worker_pb2.RunTextResponse(event=event)
        finally:
            self._in_flight_count -= 1
        self._add_load(context)

    async def LoadExpert(
        self, request: expert_worker_pb2.LoadExpertRequest, context: Context
    ) -> AsyncIterator[expert_worker_pb2.LoadExpertResponse]:
        """The steps of a load, until READY. It is the admin's word that a quarantine has lasted long enough."""
        del context
        digest = _digest(request.digest)
        self._journal.lift(digest)
        self._residency.forget_refusal(digest)
        async with aclosing(self._residency.load(digest)) as steps:
            async for step in steps:
                yield step

    async def UnloadExpert(
        self, request: expert_worker_pb2.UnloadExpertRequest, context: Context
    ) -> expert_worker_pb2.UnloadExpertResponse:
        """Let a package go."""
        del context
        in_use_count = self._residency.drop(_digest(request.digest))
        if in_use_count is None:
            raise HocketError(
                Reason.UNKNOWN_EXPERT,
                f"{request.digest} is not resident here: `hocket experts show` tells where it is",
                digest=request.digest,
            )
        return expert_worker_pb2.UnloadExpertResponse(in_use_count=in_use_count)

    async def ListExperts(
        self, request: expert_worker_pb2.ListExpertsRequest, context: Context
    ) -> expert_worker_pb2.ListExpertsResponse:
        """What is in memory."""
        del request, context
        return expert_worker_pb2.ListExpertsResponse(
            worker=self._name,
            device=self._device,
            resident_bytes=self._residency.used_bytes,
            budget_bytes=self._residency.budget_bytes,
            experts=[self._resident(package) for package in self._residency.packages],
            absent=[
                expert_worker_pb2.AbsentExpert(digest=each.digest, state=each.state, reason=each.reason)
                for each in self._residency.absent
            ],
            engine=None if self.texts is None else self.texts.report(),
        )

    def _state(self, package: ResidentPackage) -> expert_worker_pb2.ExpertState.ValueType:
        if package.facts is None or self.texts is None:
            return expert_worker_pb2.EXPERT_STATE_RESIDENT
        return self.texts.state_of(package.digest)

    def _add_load(self, context: Context) -> None:
        """Say how busy the worker is, the call that ends here excluded."""
        load = expert_worker_pb2.WorkerLoad(
            worker=self._name,
            in_flight_count=self._in_flight_count,
            resident_bytes=self._residency.used_bytes,
        )
        add_trailing(context, LOAD_KEY, load.SerializeToString())

    def _resident(self, package: ResidentPackage) -> expert_worker_pb2.ResidentExpert:
        message = expert_worker_pb2.ResidentExpert(
            digest=package.digest,
            tier=self.tier(package),
            state=self._state(package),
            size_bytes=package.size_bytes,
            in_use_count=package.in_use_count,
            proofs=[_proof(proof) for proof in package.proofs if proof.kind != "policy"],
            unsigned_by_policy=package.unsigned_by_policy,
        )
        message.last_use_time.FromMicroseconds(round(package.last_use_time * 1e6))
        return message


def _member(package: ResidentPackage, which: ExpertId) -> Expert:
    if which.ordinal >= len(package.experts):
        raise HocketError(
            Reason.UNKNOWN_EXPERT,
            f"{which.digest} holds {len(package.experts)} experts, counted from 0: there is no #{which.ordinal}",
            field="expert",
            digest=which.digest,
        )
    expert = package.experts[which.ordinal]
    if not isinstance(expert, Expert):
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"{which.digest} is an adapter expert: it answers texts (Generate), not rows",
            digest=which.digest,
        )
    return expert


def _digest(text: str) -> str:
    if not is_digest(text):
        raise HocketError(
            Reason.BAD_REQUEST, f"{text[:100]!r} is not a digest (sha256:<64 hex digits>)", field="digest"
        )
    return text


def _proof(proof: Proof) -> str:
    return str(proof.release) if proof.release is not None else str(proof.key_id)
