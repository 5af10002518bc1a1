"""A text through the router: what it adds to the events of an aggregator, and what it keeps count of."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import grpc
import pytest
from prometheus_client import REGISTRY

from hocket.client.aggregator import AggregatorClient
from hocket.client.router import RouterClient, Routing, TextPlanned
from hocket.errors import HocketError, Reason
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import LOAD_KEY, Handlers, add_trailing
from hocket.rpc.local import LocalChannel
from hocket.rpc.status import from_rpc_error
from hocket.v1 import router_pb2, text_pb2
from hocket.v1.aggregator_pb2 import CombineRequest, CombineResponse
from hocket.v1.aggregator_pb2_grpc import AggregatorServiceServicer, add_AggregatorServiceServicer_to_server
from hocket.v1.expert_worker_pb2 import WorkerLoad
from hocket.v1.package_pb2 import BaseModel
from hocket.v1.router_pb2 import ChosenExpert, GenerateRequest, RouteRequest
from hocket.v1.router_pb2_grpc import RouterServiceStub, add_RouterServiceServicer_to_server
from services.router import service as module
from services.router.aggregators import Aggregators
from services.router.app import RouterApp
from services.router.directory import Snapshot, build_gates
from services.router.experts import index
from services.router.placement import Base, Loads, Worker
from services.router.rules import RULES_VERSION
from services.router.service import RouterServicer, tokens_of
from services.router.settings import RouterSettings
from services.router.text import TextDecision, decide_text
from tests.fakes import BASE, LOW, adapter_package
from tests.routing import BASE as ROUTING_BASE
from tests.routing import asking_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SQL = adapter_package(LOW, "sql", base=BaseModel(name="Qwen3-0.6B"))
SQL.unsigned_by_policy = True
WORKER = Worker("w", "local:w", frozenset({"expert"}), 1000, frozenset(), draining=False, base=Base("Qwen3-0.6B", BASE))
EXPERTS = index([SQL])
SNAPSHOT = Snapshot(7, {}, {}, {}, {LOW: SQL}, (WORKER,), EXPERTS, gates=build_gates(EXPERTS, [WORKER], {}))


class ScriptedAggregator(AggregatorServiceServicer):
    """Relays a start, two deltas and a finish.

    Attributes:
        requests: What it was asked.
        seconds_left: The deadlines of these calls.
        refusal: Raised after the first delta while set.
        held: Awaited after the first delta.
        waits_first: Whether it is awaited before the start instead.
        first_count: How often it says its first delta.
    """

    def __init__(self) -> None:
        self.requests: list[CombineRequest] = []
        self.seconds_left: list[float] = []
        self.refusal: HocketError | None = None
        self.held = asyncio.Event()
        self.held.set()
        self.waits_first = False
        self.first_count = 1
        self.cancelled = asyncio.Event()

    async def Combine(self, request: CombineRequest, context: Any) -> AsyncIterator[CombineResponse]:
        self.requests.append(request)
        self.seconds_left.append(context.time_remaining())
        try:
            if self.waits_first:
                await self.held.wait()
            yield event(start=text_pb2.TextStart(worker="w"))
            for _ in range(self.first_count):
                yield event(delta=text_pb2.TextDelta(text="one", tokens=[text_pb2.Token(id=1)]))
            if self.refusal is not None:
                raise self.refusal
            await self.held.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        yield event(delta=text_pb2.TextDelta(text=" two"))
        finish = text_pb2.TextFinish(reason=text_pb2.TEXT_FINISH_REASON_END, degradations=["WORD", "BASE_BY_NAME"])
        finish.timings.decode.FromMilliseconds(5)
        load = WorkerLoad(worker="w", in_flight_count=9)
        add_trailing(context, LOAD_KEY, load.SerializeToString())
        yield event(finish=finish)


def event(**of: Any) -> CombineResponse:
    return CombineResponse(text=text_pb2.TextEvent(**of))


class Suite:
    """A router on a scripted aggregator, with one worker and one expert."""

    def __init__(self, **settings: Any) -> None:
        self.aggregator = ScriptedAggregator()
        behind, self.handlers = Handlers(), Handlers(texts={"Generate": tokens_of})
        behind.add(add_AggregatorServiceServicer_to_server, self.aggregator)
        self.loads = Loads()
        self.directory = SimpleNamespace(snapshot=SNAPSHOT)
        router = RouterServicer(
            RouterSettings(**settings),
            self.directory,  # type: ignore[arg-type]  # all it needs of a directory
            self.loads,
            Aggregators([AggregatorClient(LocalChannel(behind))], 0.5),
        )
        self.handlers.add(add_RouterServiceServicer_to_server, router)
        self.client = RouterClient(LocalChannel(self.handlers))

    @property
    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.loads.by_worker, self.loads.by_expert


async def test_a_text_is_planned_and_relayed_with_what_the_router_knows() -> None:
    suite = Suite()
    answer = await suite.client.answer_text("hi", experts={"sql": 0.5}, seed=3, temperature=0.5)
    [request] = suite.aggregator.requests
    assert request.text.plan == answer.plan
    assert (request.text.plan.seed, request.text.sampling) == (3, text_pb2.Sampling(temperature=0.5))
    assert request.text.input.prompt == "hi"
    assert (answer.text, answer.start.worker) == ("one two", "w")
    assert answer.finish.degradations == ["WORD", "BASE_BY_NAME", "UNSIGNED_EXPERT"]
    assert answer.finish.timings.decode.ToMilliseconds() == 5
    assert 0 < answer.finish.timings.route.ToNanoseconds() < 1e9
    assert answer.request_id


async def test_a_text_without_a_deadline_gets_the_one_of_texts() -> None:
    suite = Suite(generate_deadline_seconds=300.0)
    await suite.client.answer_text("hi")
    await suite.client.answer_text("hi", timeout_seconds=20.0)
    long, short = suite.aggregator.seconds_left
    assert 299 < long <= 300
    assert 19 < short <= 20


async def test_a_text_counts_once_on_its_worker_while_it_runs() -> None:
    suite = Suite()
    suite.aggregator.held.clear()
    async with aclosing(suite.client.generate("hi", experts=["sql"])) as events:
        assert isinstance(await anext(events), TextPlanned)
        assert suite.counts == ({"w": 1}, {BASE: 1, LOW: 1})
        suite.aggregator.held.set()
        async for _ in events:
            pass
    assert suite.counts == ({}, {})
    assert suite.loads.of_worker("w") == 9  # its own word


async def test_a_text_that_nobody_reads_ends_at_the_routers_own_deadline() -> None:
    aggregator, behind = ScriptedAggregator(), Handlers()
    aggregator.first_count = 100
    behind.add(add_AggregatorServiceServicer_to_server, aggregator)
    settings = RouterSettings(
        registry="local:registry", aggregators=("local:aggregator",), generate_deadline_seconds=0.3
    )
    app = RouterApp(settings, Channels({"registry": Handlers(), "aggregator": behind}))
    app.directory._snapshot = SNAPSHOT
    call: Any = RouterServiceStub(LocalChannel(app.handlers)).Generate(
        GenerateRequest(input=text_pb2.TextInput(prompt="hi"))
    )
    assert (await call.read()).HasField("plan")
    assert app.handlers.in_flight == 1
    await asyncio.wait_for(aggregator.cancelled.wait(), 2)
    await asyncio.wait_for(app.handlers.wait_idle(2), 2)
    assert app.handlers.in_flight == 0
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in call:
            pass
    assert from_rpc_error(caught.value).reason is Reason.DEADLINE


async def test_who_leaves_a_text_cancels_it_and_is_counted_out() -> None:
    suite = Suite()
    suite.aggregator.held.clear()
    async with aclosing(suite.client.generate("hi")) as events:
        async for heard in events:
            if isinstance(heard, text_pb2.TextDelta):
                break
    await asyncio.wait_for(suite.aggregator.cancelled.wait(), 2)
    async with asyncio.timeout(2):
        while suite.counts != ({}, {}):  # noqa: ASYNC110 - the counts are nobody's event
            await asyncio.sleep(0.001)


async def test_a_base_has_a_compartment_of_its_own() -> None:
    await check_that_one_text_runs_at_once(Suite(in_flight_per_model_max=1), "for this base")


async def test_all_texts_together_leave_half_of_the_room_to_rows() -> None:
    await check_that_one_text_runs_at_once(Suite(in_flight_max=3), "for texts")


async def check_that_one_text_runs_at_once(suite: Suite, what: str) -> None:
    suite.aggregator.held.clear()
    async with aclosing(suite.client.generate("hi")) as events:
        await anext(events)
        with pytest.raises(HocketError, match=what) as caught:
            await suite.client.answer_text("hi", experts=["sql"])
        assert caught.value.reason is Reason.QUEUE_FULL
        suite.aggregator.held.set()
        async for _ in events:
            pass
    assert (await suite.client.answer_text("hi", experts=["sql"])).text == "one two"


async def test_a_refusal_in_the_middle_is_the_refusal_of_the_text() -> None:
    suite = Suite()
    suite.aggregator.refusal = HocketError(Reason.STREAM_BROKEN, "the worker went away")
    events = suite.client.generate("hi")
    heard = [type(await anext(events)) for _ in range(3)]
    assert heard == [TextPlanned, text_pb2.TextStart, text_pb2.TextDelta]
    with pytest.raises(HocketError) as caught:
        await anext(events)
    assert caught.value.reason is Reason.STREAM_BROKEN
    assert suite.counts == ({}, {})


@pytest.mark.parametrize("reason", [Reason.UNREACHABLE, Reason.DRAINING])
async def test_an_aggregator_that_goes_away_in_mid_answer_breaks_it(reason: Reason) -> None:
    suite = Suite()
    suite.aggregator.refusal = HocketError(reason, "gone")
    with pytest.raises(HocketError) as caught:
        await suite.client.answer_text("hi")
    assert (caught.value.reason, caught.value.metadata["tokens"]) == (Reason.STREAM_BROKEN, "1")


async def test_a_router_that_shuts_down_in_mid_answer_breaks_it() -> None:
    suite = Suite()
    suite.aggregator.held.clear()
    events = suite.client.generate("hi")
    for _ in range(3):
        await anext(events)
    suite.handlers.end_running()
    with pytest.raises(HocketError) as caught:
        await anext(events)
    assert (caught.value.reason, caught.value.metadata["tokens"]) == (Reason.STREAM_BROKEN, "1")
    assert suite.counts == ({}, {})


async def test_a_router_that_shuts_down_before_a_worker_has_answered_breaks_nothing() -> None:
    suite = Suite()
    suite.aggregator.held.clear()
    suite.aggregator.waits_first = True
    events = suite.client.generate("hi")
    assert isinstance(await anext(events), TextPlanned)
    suite.handlers.end_running()
    with pytest.raises(HocketError) as caught:
        await anext(events)
    assert caught.value.reason is Reason.DRAINING
    assert caught.value.retry_after_seconds
    assert suite.counts == ({}, {})


async def test_what_cannot_be_planned_reaches_no_aggregator() -> None:
    suite = Suite()
    with pytest.raises(HocketError) as caught:
        await suite.client.answer_text("hi", experts=["json"])
    assert caught.value.reason is Reason.UNKNOWN_EXPERT
    assert suite.aggregator.requests == []
    assert suite.counts == ({}, {})


KEYED = [asking_for(number, name, "graph", name) for number, name in ((30, "path"), (31, "tree"))]
KEYED_EXPERTS = index(KEYED)
AT_HAND = Worker("w", "local:w", frozenset({"expert"}), 1000, frozenset(), draining=False, base=ROUTING_BASE)
ROUTED = Snapshot(
    7, {}, {}, {}, {each.digest: each for each in KEYED}, (AT_HAND,), KEYED_EXPERTS,
    gates=build_gates(KEYED_EXPERTS, [AT_HAND], {}),
)  # fmt: skip


def routing_suite() -> Suite:
    suite = Suite()
    suite.directory.snapshot = ROUTED
    return suite


async def test_a_decision_about_a_text_is_explained_and_runs_nothing() -> None:
    suite = routing_suite()
    decision = await suite.client.route_text("a graph with a path")
    assert suite.aggregator.requests == []
    assert suite.counts == ({}, {})
    assert (decision.plan.policy, decision.plan.reason) == (text_pb2.POLICY_RULES, text_pb2.DECISION_REASON_GATE)
    assert [expert.name for expert in decision.plan.experts] == ["acme/path@1.0.0"]
    assert [replica.worker for replica in decision.plan.replicas] == ["w"]
    best, other = decision.candidates
    assert (best.name, best.chosen, best.weight, other.chosen) == ("acme/path@1.0.0", True, 1.0, False)
    assert best.score == pytest.approx(sum(each.contribution for each in best.evidence))
    assert [each.text for each in best.evidence] == ["graph", "path"]
    assert (decision.base.name, decision.base.chosen, decision.candidate_count) == (ROUTING_BASE.name, False, 2)
    assert decision.base.probability + best.probability + other.probability == pytest.approx(1.0)
    assert decision.confidence >= decision.thresholds.confidence_min == 0.6
    assert decision.rules_version == RULES_VERSION


async def test_the_scores_of_the_formats_own_routers_stand_in_the_explanation() -> None:
    decision = await routing_suite().client.route_text("graph path", routing=Routing("hivellm"))
    assert [(each.name, each.hivellm.keyword) for each in decision.candidates] == [
        ("acme/path@1.0.0", 1.0),
        ("acme/tree@1.0.0", 0.5),
    ]
    assert all(each.hivellm.embedding > 0 for each in decision.candidates)
    assert not decision.HasField("thresholds")
    assert not decision.rules_version


@pytest.mark.parametrize("policy", ["rules", "hivellm"])
async def test_a_decision_that_looks_at_many_experts_is_made_beside_the_event_loop(
    policy: Literal["rules", "hivellm"], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def noted(*asked: Any) -> TextDecision:
        threads.append(threading.current_thread() is not threading.main_thread())
        return decide_text(*asked)

    monkeypatch.setattr(module, "decide_text", noted)
    client = routing_suite().client
    here = await client.route_text("path", routing=Routing(policy))
    monkeypatch.setattr(module, "_INLINE_EXPERTS_MAX", 1)
    there = await client.route_text("path", routing=Routing(policy))
    assert threads == [False, policy == "hivellm"]
    here.plan.seed = there.plan.seed
    assert here == there


async def test_where_nothing_is_decided_there_are_no_candidates() -> None:
    client = routing_suite().client
    for decision in (
        await client.route_text("graph", routing=Routing("base")),
        await client.route_text("graph", experts=["tree"]),
    ):
        assert (list(decision.candidates), decision.candidate_count) == ([], 0)
    assert decision.plan.reason == text_pb2.DECISION_REASON_EXPLICIT
    assert not decision.base.chosen


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (RouteRequest(text=text_pb2.TextInput(prompt="x"), model="digits"), "text"),
        (RouteRequest(text=text_pb2.TextInput(prompt="x"), top_k=1), "text"),
        (RouteRequest(model="digits", base="b"), "base"),
        (RouteRequest(model="digits", experts=[ChosenExpert(expert="e")]), "experts"),
        (RouteRequest(model="digits", routing=router_pb2.Routing(deny=["e"])), "routing"),
        (RouteRequest(), "model"),
        (RouteRequest(text=text_pb2.TextInput()), "input"),
    ],
)
async def test_a_question_about_rows_and_a_text_or_neither_is_refused(request_: RouteRequest, field: str) -> None:
    stub: Any = RouterServiceStub(LocalChannel(routing_suite().handlers))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Route(request_)
    refused = from_rpc_error(caught.value)
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, field)


async def test_a_generated_text_is_answered_by_whom_the_gate_chooses() -> None:
    suite = routing_suite()
    answer = await suite.client.answer_text("a path", max_tokens=4)
    assert [expert.name for expert in answer.plan.experts] == ["acme/path@1.0.0"]
    [request] = suite.aggregator.requests
    assert request.text.plan == answer.plan


async def test_texts_are_counted_by_who_has_decided_and_why() -> None:
    def counted(policy: str, reason: str) -> float:
        labels = {"policy": policy, "reason": reason}
        return REGISTRY.get_sample_value("hocket_text_decisions_total", labels) or 0.0

    suite = routing_suite()
    kinds = (("RULES", "GATE"), ("BASE", "POLICY"), ("UNSPECIFIED", "EXPLICIT"))
    before = [counted(*kind) for kind in kinds]
    await suite.client.answer_text("a path")
    await suite.client.answer_text("a path", routing=Routing("base"))
    await suite.client.answer_text("a path", experts=["path"])
    await suite.client.route_text("a path")  # runs nothing
    assert [counted(*kind) for kind in kinds] == [count + 1 for count in before]
