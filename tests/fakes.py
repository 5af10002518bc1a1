"""Scripted services that keep the contract, on real sockets."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.mixtures import parse_mixture
from hocket.packages import read_release
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1 import mixture_pb2, package_pb2, plan_pb2, registry_pb2, router_pb2, text_pb2
from hocket.v1.registry_pb2_grpc import RegistryServiceServicer
from hocket.v1.router_pb2_grpc import RouterServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from hocket.rpc.tls import Tls

LOW = "sha256:" + "1" * 64
HIGH = "sha256:" + "2" * 64
MIXTURE = "sha256:" + "9" * 64
BASE = "sha256:" + "b" * 64


def expert_package(digest: str, name: str, **model: Any) -> package_pb2.Package:
    """A package of publisher acme as a registry describes it: a classifier of "0" and "1" over two features."""
    columns = [package_pb2.OutputColumn(label=label) for label in ("0", "1")]
    facts = {"format_version": "1.0", "model_type": "LogisticRegression", "layout": "LogisticRegression", **model}
    return package_pb2.Package(
        digest=digest,
        size_bytes=300,
        format="apr",
        state=package_pb2.TRUST_STATE_ACTIVE,
        releases=[package_pb2.Release(publisher="acme", name=name, version="1.0.0", key_id="ab" * 32)],
        model=package_pb2.ModelFacts(feature_count=2, expert_count=1, columns=columns, **facts),
    )


def adapter_package(
    digest: str, name: str, *requires: str, version: str = "1.0.0", **facts: Any
) -> package_pb2.Package:
    """A package of publisher acme as a registry describes it: a DoRA adapter for Qwen3-0.6B."""
    stated = {
        "format_version": "2.0",
        "description": f"The test expert {name}",
        "kind": package_pb2.ADAPTER_KIND_DORA,
        "base": package_pb2.BaseModel(name="F:\\models\\Qwen3-0.6B"),
        "constraints": package_pb2.Constraints(load_order=6, requirements=requires),
        **facts,
    }
    return package_pb2.Package(
        digest=digest,
        size_bytes=300,
        format="expert",
        state=package_pb2.TRUST_STATE_ACTIVE,
        releases=[
            package_pb2.Release(
                publisher="acme",
                name=name,
                version=version,
                key_id="ab" * 32,
                state=package_pb2.TRUST_STATE_ACTIVE,
            )
        ],
        adapter=package_pb2.AdapterFacts(name=name, version=version, **stated),
    )


class ScriptedRouter(RouterServiceServicer):
    """One mixture, `digits`, of the experts `low` and `high`, weighted 0.75 and 0.25; values are fixed.

    To text it answers "Sure: one, two.", in three deltas, by whatever experts it is asked for.

    Attributes:
        requests: What it was asked, in order.
        refusal: Raised by every rpc while set.
        stall: Whether Predict waits for ever after its first partial, Generate after its first delta.
        cancelled: Set when a stalled call is cancelled.
        seconds_left: What the callers of Generate have given it; None for no deadline.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.refusal: HocketError | None = None
        self.stall = False
        self.cancelled = threading.Event()
        self.seconds_left: list[float | None] = []

    async def Predict(
        self, request: router_pb2.PredictRequest, context: Any
    ) -> AsyncIterator[router_pb2.PredictResponse]:
        del context
        self._note(request)
        rows = request.input.shape[0]
        yield router_pb2.PredictResponse(request_id="request-1", plan=_plan(rows))
        if request.partials:
            yield router_pb2.PredictResponse(request_id="request-1", partial=_combination(rows, 1, complete=False))
        await self._stall()
        final = plan_pb2.Prediction(
            combination=_combination(rows, 2, complete=True),
            finish=plan_pb2.Finish(reason=plan_pb2.FINISH_REASON_COMPLETE, degradations=["UNSIGNED_EXPERT"]),
        )
        yield router_pb2.PredictResponse(request_id="request-1", final=final)

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        self.seconds_left.append(context.time_remaining())
        self._note(request)
        plan = _text_plan(request)
        yield router_pb2.GenerateResponse(request_id="request-1", plan=plan)
        yield router_pb2.GenerateResponse(request_id="request-1", start=_text_start(request, plan.seed))
        for place, text in enumerate(("Sure:", "", " one, two.")):
            token = text_pb2.Token(id=7 + place, logprob=-0.25)
            delta = text_pb2.TextDelta(text=text, tokens=[token], contributions=[e.weight for e in plan.experts])
            yield router_pb2.GenerateResponse(request_id="request-1", delta=delta)
            await self._stall()
        yield router_pb2.GenerateResponse(request_id="request-1", finish=_text_finish())

    async def Route(self, request: router_pb2.RouteRequest, context: Any) -> router_pb2.RouteResponse:
        del context
        self._note(request)
        if request.HasField("text"):
            return router_pb2.RouteResponse(text=_text_decision(request))
        rows = request.input.shape[0]
        candidates = [
            router_pb2.Candidate(expert=LOW, gate_weight=0.75, weight=1, chosen=True),
            router_pb2.Candidate(expert=HIGH, gate_weight=0.25),
        ]
        plan = _plan(rows)
        plan.overflowed.append(HIGH)
        plan.experts[1].unavailable_reason = "YANKED"
        return router_pb2.RouteResponse(
            plan=plan, rows=[router_pb2.RowDecision(candidates=candidates) for _ in range(rows)]
        )

    async def ListMixtures(
        self, request: router_pb2.ListMixturesRequest, context: Any
    ) -> router_pb2.ListMixturesResponse:
        """Two pages of one entry each."""
        del context
        self._note(request)
        if request.page_token:
            return router_pb2.ListMixturesResponse(mixtures=[_summary("fruit")])
        return router_pb2.ListMixturesResponse(mixtures=[_summary("digits")], next_page_token="more")

    async def GetMixture(self, request: router_pb2.GetMixtureRequest, context: Any) -> router_pb2.GetMixtureResponse:
        del context
        self._note(request)
        if request.model not in {"digits", LOW}:
            raise HocketError(Reason.UNKNOWN_MODEL, f"no model {request.model!r} here")
        members = [
            router_pb2.MemberInfo(expert=LOW, package=expert_package(LOW, "low"), resident_workers=["worker-a"]),
            router_pb2.MemberInfo(expert=HIGH, package=expert_package(HIGH, "high")),
        ]
        return router_pb2.GetMixtureResponse(
            summary=_summary("digits"),
            gate="softmax",
            top_k=2,
            capacity_factor=1.5,
            labels=["0", "1"],
            column_count=2,
            output_range=package_pb2.OutputRange(lower=0, upper=1),
            release=package_pb2.Release(publisher="acme", name="digits", version="1.0.0", key_id="ab" * 32),
            members=members if request.model == "digits" else members[:1],
        )

    async def _stall(self) -> None:
        if self.stall:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()

    def _note(self, request: Any) -> None:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal


def _plan(rows: int) -> plan_pb2.Plan:
    experts = [
        plan_pb2.PlannedExpert(
            expert=expert,
            rows=range(rows),
            weights=[weight] * rows,
            columns=[0, 1],
            replicas=[plan_pb2.Replica(worker="worker-a", address="127.0.0.1:50054")],
        )
        for expert, weight in ((LOW, 0.75), (HIGH, 0.25))
    ]
    return plan_pb2.Plan(
        mode=plan_pb2.MODE_VECTOR,
        model="digits",
        digest=MIXTURE,
        revision=7,
        row_count=rows,
        column_count=2,
        labels=["0", "1"],
        experts=experts,
    )


def _text_plan(request: router_pb2.GenerateRequest) -> text_pb2.TextPlan:
    experts = [
        text_pb2.TextExpert(
            digest=LOW if place == 0 else HIGH,
            name=f"acme/{each.expert}@1.0.0",
            weight=each.weight if each.HasField("weight") else 1.0,
        )
        for place, each in enumerate(request.experts)
    ]
    return text_pb2.TextPlan(
        mode=plan_pb2.MODE_ADAPTER_MIX if len(experts) > 1 else plan_pb2.MODE_PASS,
        base=BASE,
        base_name="Qwen3-0.6B",
        experts=experts,
        replicas=[plan_pb2.Replica(worker="worker-a", address="127.0.0.1:50054", resident=True)],
        revision=7,
        seed=request.sampling.seed or 42,
        policy=text_pb2.POLICY_UNSPECIFIED if experts else text_pb2.POLICY_RULES,
        reason=text_pb2.DECISION_REASON_EXPLICIT if experts else text_pb2.DECISION_REASON_BASE_NO_MATCH,
    )


def _text_decision(request: router_pb2.RouteRequest) -> router_pb2.TextDecision:
    """The gate has chosen `low`; `high` has an exclude keyword in the text."""
    asked = router_pb2.GenerateRequest(experts=[router_pb2.ChosenExpert(expert="low")])
    plan = _text_plan(asked)
    plan.policy, plan.reason = text_pb2.POLICY_RULES, text_pb2.DECISION_REASON_GATE
    keyword = router_pb2.Evidence(kind=router_pb2.EVIDENCE_KIND_KEYWORD, text="list all", contribution=1.5)
    exclude = router_pb2.Evidence(kind=router_pb2.EVIDENCE_KIND_EXCLUDE, text="list", contribution=-2.0)
    prior = router_pb2.Evidence(kind=router_pb2.EVIDENCE_KIND_PRIOR, text="the base", contribution=0.25)
    low = router_pb2.TextCandidate(
        digest=LOW, name="acme/low@1.0.0", score=1.5, probability=0.875, weight=1.0, chosen=True, evidence=[keyword]
    )
    high = router_pb2.TextCandidate(digest=HIGH, name="acme/high@1.0.0", score=-2.0, evidence=[exclude])
    if request.routing.policy == text_pb2.POLICY_HIVELLM:
        low.hivellm.keyword, low.hivellm.embedding = 0.5, 0.25
    return router_pb2.TextDecision(
        plan=plan,
        base=router_pb2.TextCandidate(digest=BASE, name="Qwen3-0.6B", score=0.25, probability=0.125, evidence=[prior]),
        candidates=[low, high],
        candidate_count=20,
        confidence=0.875,
        thresholds=router_pb2.GateThresholds(confidence_min=0.6),
    )


def _text_start(request: router_pb2.GenerateRequest, seed: int) -> text_pb2.TextStart:
    start = text_pb2.TextStart(
        worker="worker-a", prompt_token_count=12, soft_prompt_token_count=4, prompt_template="qwen3"
    )
    start.sampling.CopyFrom(text_pb2.Sampling(temperature=0.0, top_p=1.0, seed=seed, max_tokens=512))
    start.sampling.MergeFrom(request.sampling)
    start.wait.FromMilliseconds(3)
    return start


def _text_finish() -> text_pb2.TextFinish:
    finish = text_pb2.TextFinish(
        reason=text_pb2.TEXT_FINISH_REASON_END,
        usage=text_pb2.Usage(prompt_token_count=12, completion_token_count=3),
        speed=text_pb2.Speed(prefill_tokens_per_second=600.0, decode_tokens_per_second=50.0, step_count=4),
        degradations=["BASE_BY_NAME"],
    )
    finish.timings.route.FromMicroseconds(200)
    finish.timings.wait.FromMilliseconds(3)
    finish.timings.prefill.FromMilliseconds(20)
    finish.timings.decode.FromMilliseconds(40)
    finish.speed.step_mean.FromMilliseconds(20)
    finish.speed.step_max.FromMilliseconds(25)
    return finish


def _combination(rows: int, sequence: int, *, complete: bool) -> plan_pb2.Combination:
    arrived = plan_pb2.Contribution(
        expert=LOW,
        state=plan_pb2.CONTRIBUTION_STATE_ARRIVED,
        rows=range(rows),
        weights=[0.75 if complete else 1.0] * rows,
        worker="worker-a",
        attempt_count=1,
    )
    arrived.latency.FromMicroseconds(3200)
    other = plan_pb2.Contribution(expert=HIGH, state=plan_pb2.CONTRIBUTION_STATE_PENDING)
    if complete:
        other = plan_pb2.Contribution(
            expert=HIGH, state=plan_pb2.CONTRIBUTION_STATE_FAILED, reason="NO_REPLICA", attempt_count=2
        )
    value = np.tile(np.array([[0.1, 0.9]], np.float32), (rows, 1))
    bounds = {} if complete else {"lower_bound": matrix_to_tensor(value * 0), "upper_bound": matrix_to_tensor(value)}
    return plan_pb2.Combination(
        sequence=sequence,
        value=matrix_to_tensor(value),
        coverage=[1.0 if complete else 0.75] * rows,
        contributions=[arrived, other],
        **bounds,
    )


def _summary(name: str) -> router_pb2.MixtureSummary:
    return router_pb2.MixtureSummary(
        name=name, digest=MIXTURE, expert_count=2, feature_count=2, state=package_pb2.TRUST_STATE_ACTIVE
    )


@dataclass
class ScriptedRegistry(RegistryServiceServicer):
    """Takes in what it is given, without any check.

    Attributes:
        packages: By digest.
        blobs: The bytes of packages, by digest.
        mixtures: Header and gate tensor, by name.
        withdrawn: Digests yanked and keys revoked, with the explanation.
        lists: What lists were asked for.
        damaged: Whether it finds damaged what it has already.
    """

    packages: dict[str, package_pb2.Package] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    mixtures: dict[str, tuple[registry_pb2.PutMixtureHeader, bytes]] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)
    lists: list[registry_pb2.ListPackagesRequest] = field(default_factory=list)
    damaged: bool = False

    async def PublishPackage(
        self, requests: AsyncIterator[registry_pb2.PublishPackageRequest], context: Any
    ) -> registry_pb2.PublishPackageResponse:
        del context
        header, data = await _received(requests, "chunk")
        assert header.digest == digest_of(data)
        created = header.digest not in self.packages
        if header.release:
            name = read_release(header.release).release.name.name
            self.packages[header.digest] = expert_package(header.digest, name)
        else:
            package = package_pb2.Package(digest=header.digest, format="apr", unsigned_by_policy=True)
            self.packages[header.digest] = package
        self.blobs[header.digest] = data
        return registry_pb2.PublishPackageResponse(
            package=self.packages[header.digest], created=created, healed=self.damaged
        )

    async def DownloadPackage(
        self, request: registry_pb2.DownloadPackageRequest, context: Any
    ) -> AsyncIterator[registry_pb2.DownloadPackageResponse]:
        del context
        package = package_pb2.Package(size_bytes=len(self.blobs[request.digest]))
        yield registry_pb2.DownloadPackageResponse(header=registry_pb2.DownloadHeader(package=package))
        yield registry_pb2.DownloadPackageResponse(chunk=self.blobs[request.digest])

    async def GetPackage(
        self, request: registry_pb2.GetPackageRequest, context: Any
    ) -> registry_pb2.GetPackageResponse:
        del context
        for package in self.packages.values():
            names = [f"{release.publisher}/{release.name}@{release.version}" for release in package.releases]
            if request.package in (package.digest, *names):
                return registry_pb2.GetPackageResponse(package=package)
        raise HocketError(Reason.UNKNOWN_PACKAGE, f"no package {request.package!r} here")

    async def ListPackages(
        self, request: registry_pb2.ListPackagesRequest, context: Any
    ) -> registry_pb2.ListPackagesResponse:
        """Of the filters only the publisher counts."""
        del context
        self.lists.append(request)
        wanted = [
            package
            for package in self.packages.values()
            if request.publisher in {"", *(release.publisher for release in package.releases)}
        ]
        return registry_pb2.ListPackagesResponse(packages=wanted)

    async def YankPackage(
        self, request: registry_pb2.YankPackageRequest, context: Any
    ) -> registry_pb2.YankPackageResponse:
        del context
        self.withdrawn[request.digest] = request.explanation
        package = package_pb2.Package(digest=request.digest)
        package.CopyFrom(self.packages.get(request.digest, package))
        package.state = package_pb2.TRUST_STATE_YANKED
        return registry_pb2.YankPackageResponse(package=package)

    async def RevokeKey(self, request: registry_pb2.RevokeKeyRequest, context: Any) -> registry_pb2.RevokeKeyResponse:
        del context
        self.withdrawn[request.key] = request.explanation
        return registry_pb2.RevokeKeyResponse(key_id="ab" * 32, withdrawn_digests=[LOW])

    async def PutMixture(
        self, requests: AsyncIterator[registry_pb2.PutMixtureRequest], context: Any
    ) -> registry_pb2.PutMixtureResponse:
        del context
        header, gate = await _received(requests, "gate_chunk")
        name = parse_mixture(header.body).name
        self.mixtures[name] = (header, gate)
        return registry_pb2.PutMixtureResponse(mixture=self._mixture(name))

    async def FetchMixture(
        self, request: registry_pb2.FetchMixtureRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchMixtureResponse]:
        del context
        if request.mixture not in self.mixtures:
            raise HocketError(Reason.UNKNOWN_MIXTURE, f"no mixture {request.mixture!r} here")
        put, gate = self.mixtures[request.mixture]
        header = registry_pb2.FetchMixtureHeader(
            mixture=self._mixture(request.mixture), body=put.body, release=put.release
        )
        yield registry_pb2.FetchMixtureResponse(header=header)
        if gate:
            yield registry_pb2.FetchMixtureResponse(gate_chunk=gate)

    async def DeleteMixture(
        self, request: registry_pb2.DeleteMixtureRequest, context: Any
    ) -> registry_pb2.DeleteMixtureResponse:
        del context
        if self.mixtures.pop(request.name, None) is None:
            raise HocketError(Reason.UNKNOWN_MIXTURE, f"no mixture {request.name!r} here")
        return registry_pb2.DeleteMixtureResponse(revision=12)

    async def Watch(
        self, request: registry_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        """Everything there is, a mark, and then silence."""
        del request, context
        for package in self.packages.values():
            yield registry_pb2.WatchResponse(revision=1, package=package)
        yield registry_pb2.WatchResponse(revision=1, synced=registry_pb2.Synced())
        await asyncio.Event().wait()

    def _mixture(self, name: str) -> mixture_pb2.Mixture:
        header, gate = self.mixtures[name]
        return mixture_pb2.Mixture(name=name, digest=digest_of(header.body), revision=11, gate_bytes=len(gate))


async def _received(requests: AsyncIterator[Any], chunk: str) -> tuple[Any, bytes]:
    header: Any = None
    data = b""
    async for request in requests:
        if request.HasField("header"):
            header = request.header
        else:
            data += getattr(request, chunk)
    return header, data


@dataclass
class ThreadedServer:
    """A server in a thread of its own, for callers that block."""

    address: str
    _server: Server
    _loop: asyncio.AbstractEventLoop

    def set_ready(self, *, ready: bool) -> None:
        async def change() -> None:
            self._server.set_ready(ready=ready)

        asyncio.run_coroutine_threadsafe(change(), self._loop).result()


@contextmanager
def serving(add: Callable[[Any, Any], None], servicer: Any, tls: Tls | None = None) -> Iterator[ThreadedServer]:
    """A ready server on loopback, a router's with TLS; `add` is a generated `add_...Servicer_to_server`."""
    loop = asyncio.new_event_loop()
    # Loops that share grpc's queue complain when another one was faster (grpc/grpc#25364).
    loop.set_exception_handler(lambda _loop, _context: None)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Server:
        handlers = Handlers()
        add(servicer, handlers)
        credentials = None if tls is None else tls.server_credentials("router")
        server = Server(handlers, Address("127.0.0.1", 0), credentials=credentials)
        await server.start()
        server.set_ready()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield ThreadedServer(str(server.address), server, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.drain(0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
