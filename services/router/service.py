"""RouterService: messages in, messages out."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.rpc.bulkhead import Bulkhead
from hocket.rpc.convert import duration, positive_seconds
from hocket.rpc.handlers import remaining_seconds
from hocket.telemetry.context import request_id
from hocket.v1 import aggregator_pb2, plan_pb2, router_pb2, router_pb2_grpc
from services.router.session import Decision, decide, work
from services.router.text import decide_text, explain_text, reading_count

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from hocket.rpc.handlers import Context
    from hocket.v1 import text_pb2
    from hocket.v1.expert_worker_pb2 import WorkerLoad
    from services.router.aggregators import Aggregators
    from services.router.directory import Directory, Snapshot
    from services.router.model import Model
    from services.router.placement import Loads, Placed
    from services.router.settings import RouterSettings
    from services.router.text import TextDecision

CANDIDATES_MAX: Final = 65_536
"""Rows times experts that Route explains at once."""
_INLINE_WORK_MAX: Final = 2**22
"""Multiplications up to which a decision is made in the event loop: a few milliseconds."""
_INLINE_EXPERTS_MAX: Final = 64
"""Experts that are looked at one by one in the event loop: likewise."""
_NOTHING_ASKED: Final = router_pb2.RouteRequest()
_PAGE_DEFAULT: Final = 100
_PAGE_MAX: Final = 1000
_ON_MISSING: Final = frozenset(plan_pb2.OnMissing.values())


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Decides, and relays what the aggregator makes of the decision.

    Args:
        settings: What the operator chose.
        directory: The view of the registry.
        loads: What runs where.
        aggregators: Who runs the plans.
    """

    def __init__(self, settings: RouterSettings, directory: Directory, loads: Loads, aggregators: Aggregators) -> None:
        self._settings = settings
        self._directory = directory
        self._loads = loads
        self._aggregators = aggregators
        self._models = Bulkhead(settings.compartment, "this model")
        self._bases = Bulkhead(settings.compartment, "this base")
        self._texts = Bulkhead(settings.texts_max, "texts")

    async def Predict(
        self, request: router_pb2.PredictRequest, context: Context
    ) -> AsyncIterator[router_pb2.PredictResponse]:
        """The plan, partials if asked for, then exactly one final."""
        deadline = time.monotonic() + remaining_seconds(context, self._settings.default_deadline_seconds)
        _check(request)
        model = self._resolve(request)
        self._models.enter(model.digest)
        placed: Placed = ()
        try:
            decision = await self._decide(request, model)
            current = request_id.get()
            decision.count()
            placed = decision.placed
            self._loads.reserve(placed)
            yield router_pb2.PredictResponse(request_id=current, plan=decision.plan)
            events = self._aggregators.combine(_combine_request(request, decision.plan), deadline, self._note)
            async with _naming(model), aclosing(events):
                async for event in events:
                    response = router_pb2.PredictResponse(request_id=current)
                    if event.HasField("partial"):
                        response.partial.CopyFrom(event.partial)
                    else:
                        response.final.CopyFrom(event.final)
                        finish = response.final.finish
                        finish.timings.route.CopyFrom(duration(decision.seconds))
                        finish.degradations.extend(decision.degradations)
                    yield response
        finally:
            self._loads.release(placed)
            self._models.leave(model.digest)

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """The plan, a start, deltas, then exactly one finish."""
        deadline = time.monotonic() + remaining_seconds(context, self._settings.generate_deadline_seconds)
        decision = await self._decide_text(request)
        with self._texts.holding("texts"), self._bases.holding(decision.plan.base):
            decision.count()
            self._loads.reserve(decision.placed)
            try:
                current = request_id.get()
                yield router_pb2.GenerateResponse(request_id=current, plan=decision.plan)
                combine = aggregator_pb2.CombineRequest(text=decision.job(request))
                async with aclosing(self._aggregators.combine(combine, deadline, self._note)) as events:
                    async for event in events:
                        response = _text_response(current, event.text)
                        if response.HasField("finish"):
                            response.finish.timings.route.CopyFrom(duration(decision.seconds))
                            said = response.finish.degradations  # the worker may have found the same
                            said.extend(word for word in decision.degradations if word not in said)
                        yield response
            finally:
                self._loads.release(decision.placed)

    async def Route(self, request: router_pb2.RouteRequest, context: Context) -> router_pb2.RouteResponse:
        """The decision alone, with every score."""
        del context
        if request.HasField("text"):
            return router_pb2.RouteResponse(text=await self._explained(request))
        for field in ("experts", "base", "routing"):
            if getattr(request, field) != getattr(_NOTHING_ASKED, field):
                raise HocketError(Reason.BAD_REQUEST, f"{field} is for a text: send one, or leave it out", field=field)
        decision = await self._decide(request, self._resolve(request))
        if decision.selection.weights.size > CANDIDATES_MAX:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"explaining {len(decision.rows)} rows of {len(decision.model.leaves)} experts is too long an answer: "
                f"ask about at most {max(1, CANDIDATES_MAX // len(decision.model.leaves))} rows at once",
                field="input.shape[0]",
            )
        return router_pb2.RouteResponse(plan=decision.plan, rows=_explain(decision))

    async def ListMixtures(
        self, request: router_pb2.ListMixturesRequest, context: Context
    ) -> router_pb2.ListMixturesResponse:
        """One page of models, by name."""
        del context
        if request.page_size < 0:
            raise HocketError(Reason.BAD_REQUEST, "page_size must not be negative", field="page_size")
        size = min(request.page_size or _PAGE_DEFAULT, _PAGE_MAX)
        listed = self._directory.snapshot.listed
        if request.page_token and not request.page_token.startswith("after:"):
            raise HocketError(Reason.BAD_REQUEST, "page_token is not one of this list", field="page_token")
        after = request.page_token.removeprefix("after:")
        names = sorted(name for name in listed if name > after)
        return router_pb2.ListMixturesResponse(
            mixtures=[_summary(listed[name]) for name in names[:size]],
            next_page_token=f"after:{names[size - 1]}" if len(names) > size else "",
        )

    async def GetMixture(
        self, request: router_pb2.GetMixtureRequest, context: Context
    ) -> router_pb2.GetMixtureResponse:
        """One model, described; also one that is withdrawn."""
        del context
        snapshot = self._directory.snapshot
        return _describe(snapshot.resolve(request.model), snapshot)

    async def _explained(self, request: router_pb2.RouteRequest) -> router_pb2.TextDecision:
        """What Generate would do about a text."""
        if request.model or request.HasField("input") or request.HasField("top_k"):
            raise HocketError(
                Reason.BAD_REQUEST, "model, input and top_k are for rows: leave out them, or the text", field="text"
            )
        asked = router_pb2.GenerateRequest(
            input=request.text, experts=request.experts, base=request.base, routing=request.routing
        )
        return explain_text(await self._decide_text(asked), request.text)

    async def _decide_text(self, request: router_pb2.GenerateRequest) -> TextDecision:
        """The decision; in a thread when it looks at so many experts that other calls would wait."""
        snapshot = self._directory.snapshot
        if reading_count(snapshot, request.routing) <= _INLINE_EXPERTS_MAX:
            return decide_text(snapshot, self._loads, request)
        return await asyncio.to_thread(decide_text, snapshot, self._loads, request)

    def _resolve(self, request: router_pb2.PredictRequest | router_pb2.RouteRequest) -> Model:
        """What the request addresses."""
        if not request.model:
            raise HocketError(
                Reason.BAD_REQUEST, "model is missing: name what should answer, or send a text", field="model"
            )
        if not request.HasField("input"):
            raise HocketError(Reason.BAD_REQUEST, "input is missing: send rows as an FP32 tensor", field="input")
        return self._directory.snapshot.resolve(request.model)

    async def _decide(self, request: router_pb2.PredictRequest | router_pb2.RouteRequest, model: Model) -> Decision:
        """The decision; in a thread when the gate has so much to multiply that other calls would wait."""
        asked = (
            self._directory.snapshot,
            self._loads,
            self._settings.compartment,
            request.model,
            request.input,
            request.top_k if request.HasField("top_k") else None,
        )
        if work(request.input, model) <= _INLINE_WORK_MAX:
            return decide(*asked)
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(decide, *asked, given_up)
        finally:
            given_up.set()

    def _note(self, load: WorkerLoad) -> None:
        self._loads.note(load.worker, load.in_flight_count)


def tokens_of(response: router_pb2.GenerateResponse) -> int | None:
    """How many tokens a response brings; None for the plan, which no worker has made."""
    return None if response.HasField("plan") else len(response.delta.tokens)


def _check(request: router_pb2.PredictRequest) -> None:
    if request.HasField("min_coverage") and not 0.0 <= request.min_coverage <= 1.0:
        raise HocketError(Reason.BAD_REQUEST, "min_coverage must be 0 to 1", field="min_coverage")
    if request.HasField("straggler_timeout"):
        positive_seconds(request.straggler_timeout, "straggler_timeout")
    if request.on_missing not in _ON_MISSING:
        raise HocketError(Reason.BAD_REQUEST, "on_missing must be FAIL or RENORMALISE", field="on_missing")


def _combine_request(request: router_pb2.PredictRequest, plan: plan_pb2.Plan) -> aggregator_pb2.CombineRequest:
    combine = aggregator_pb2.CombineRequest(
        plan=plan, input=request.input, partials=request.partials, on_missing=request.on_missing
    )
    if request.HasField("min_coverage"):
        combine.min_coverage = request.min_coverage
    if request.HasField("straggler_timeout"):
        combine.straggler_timeout.CopyFrom(request.straggler_timeout)
    return combine


@asynccontextmanager
async def _naming(model: Model) -> AsyncGenerator[None, None]:
    """Have a refusal that is about one expert say its name, of which nobody behind the router knows, and its digest."""
    try:
        yield
    except HocketError as error:
        about = error.metadata.get("expert")
        name = next((leaf.called for leaf in model.leaves if leaf.name == about and leaf.package.releases), None)
        if about is None or name is None:
            raise
        raise error.restated(error.message.replace(about, f"{name} ({about})", 1), name=name) from error


def _text_response(request_id: str, event: text_pb2.TextEvent) -> router_pb2.GenerateResponse:
    match event.WhichOneof("event"):
        case "start":
            return router_pb2.GenerateResponse(request_id=request_id, start=event.start)
        case "delta":
            return router_pb2.GenerateResponse(request_id=request_id, delta=event.delta)
        case _:
            return router_pb2.GenerateResponse(request_id=request_id, finish=event.finish)


def _explain(decision: Decision) -> list[router_pb2.RowDecision]:
    gate = decision.gate_scores()
    explained = []
    for row in range(len(decision.rows)):
        ranking = np.argsort(-gate[row], kind="stable")
        weights = decision.selection.weights[row]
        explained.append(
            router_pb2.RowDecision(
                candidates=[
                    router_pb2.Candidate(
                        expert=decision.model.leaves[leaf].name,
                        gate_weight=gate[row, leaf],
                        weight=weights[leaf],
                        chosen=bool(weights[leaf] > 0),
                    )
                    for leaf in ranking
                ]
            )
        )
    return explained


def _summary(model: Model) -> router_pb2.MixtureSummary:
    return router_pb2.MixtureSummary(
        name=model.name,
        digest=model.digest,
        expert_count=len(model.leaves),
        feature_count=model.feature_count or 0,
        state=model.state,
    )


def _describe(model: Model, snapshot: Snapshot) -> router_pb2.GetMixtureResponse:
    described = router_pb2.GetMixtureResponse(
        summary=_summary(model),
        gate=model.top.gate.kind,
        top_k=model.top.top_k,
        labels=model.labels,
        column_count=model.column_count,
        members=[
            router_pb2.MemberInfo(
                expert=leaf.name,
                package=leaf.package,
                resident_workers=[worker.name for worker in snapshot.workers if leaf.expert.digest in worker.resident],
            )
            for leaf in model.leaves
        ],
    )
    if model.top.capacity_factor is not None:
        described.capacity_factor = model.top.capacity_factor
    if (output_range := model.output_range) is not None:
        described.output_range.lower, described.output_range.upper = output_range
    if model.mixture is not None and model.mixture.HasField("release"):
        described.release.CopyFrom(model.mixture.release)
    return described
