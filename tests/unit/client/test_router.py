"""What the router's client refuses before anything is sent, and what an answer says."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

from hocket.client.router import Answer, Constraint, RouterClient, Routing, TextPlanned
from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.v1 import plan_pb2, router_pb2, router_pb2_grpc, text_pb2
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import BASE, ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROW = [0.5, 1.5]


@pytest.fixture
def scripted() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def router(scripted: ScriptedRouter) -> RouterClient:
    handlers = Handlers()
    handlers.add(add_RouterServiceServicer_to_server, scripted)
    return RouterClient(LocalChannel(handlers))


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"rows": [[1, 2], [3]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": [["a", "b"]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": [[{}, None]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": np.zeros((2, 2, 2))}, Reason.BAD_TENSOR, "input.shape"),
        ({"top_k": -1}, Reason.TOP_K_OUT_OF_RANGE, "top_k"),
        ({"top_k": 2**32}, Reason.TOP_K_OUT_OF_RANGE, "top_k"),
        ({"on_missing": "ignore"}, Reason.BAD_REQUEST, "on_missing"),
        ({"straggler_timeout_seconds": 0}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": -1.0}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": float("nan")}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": float("inf")}, Reason.BAD_REQUEST, "straggler_timeout"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_it_is(
    router: RouterClient, scripted: ScriptedRouter, change: dict[str, Any], reason: Reason, field: str
) -> None:
    options = {"rows": [ROW], "top_k": 1, "on_missing": "fail", "straggler_timeout_seconds": 1.0, **change}
    with pytest.raises(HocketError) as caught:
        await router.answer("digits", **options)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert scripted.requests == []


@pytest.mark.parametrize("model", ["\udcff", 5, None])
async def test_a_model_s_name_is_text(router: RouterClient, scripted: ScriptedRouter, model: Any) -> None:
    for call in (router.answer(model, ROW), router.route(model, ROW), router.get_mixture(model)):
        with pytest.raises(HocketError) as caught:
            await call
        assert (caught.value.reason, caught.value.field) == (Reason.BAD_REQUEST, "model")
    assert scripted.requests == []


async def test_what_can_be_sent_is(router: RouterClient, scripted: ScriptedRouter) -> None:
    await router.answer(
        "digits", ROW, top_k=1, min_coverage=0.25, straggler_timeout_seconds=1e-9, on_missing="renormalise"
    )
    [request] = scripted.requests
    assert (list(request.input.shape), request.top_k, request.min_coverage) == ([1, 2], 1, 0.25)
    assert request.on_missing == plan_pb2.ON_MISSING_RENORMALISE
    assert request.straggler_timeout.nanos == 1


@pytest.mark.parametrize("rows", [ROW, [ROW], (tuple(ROW),), np.array([ROW], np.float64), np.array([ROW], order="F")])
async def test_a_row_or_a_table_of_any_numbers_is_sent_as_fp32(
    router: RouterClient, scripted: ScriptedRouter, rows: Any
) -> None:
    await router.route("digits", rows)
    [request] = scripted.requests
    assert request.input.contents == np.array(ROW, "<f4").tobytes()
    assert not request.HasField("top_k")


async def test_a_decision_takes_the_same_rows_and_top_k(router: RouterClient, scripted: ScriptedRouter) -> None:
    for rows, top_k in (([[1, 2], [3]], None), ([ROW], -1)):
        with pytest.raises(HocketError):
            await router.route("digits", rows, top_k=top_k)
    assert scripted.requests == []


def answer(value: Any, *labels: str) -> Answer:
    array = np.array(value, np.float32)
    return Answer(array, labels, np.ones(len(array)), (), plan_pb2.Plan(), plan_pb2.Finish(), "")


def test_the_best_label_is_the_highest_score_and_the_earlier_at_ties() -> None:
    assert answer([[0.1, 0.9], [0.5, 0.5]], "no", "yes").best_labels() == ["yes", "no"]


def test_a_regression_has_no_labels() -> None:
    assert answer([[3.5], [1.0]]).best_labels() == []


async def test_a_text_is_a_plan_a_start_deltas_and_a_finish(router: RouterClient) -> None:
    planned, start, *deltas, finish = [event async for event in router.generate("hi", experts={"sql": 0.7})]
    assert isinstance(planned, TextPlanned)
    assert (planned.plan.base, planned.request_id) == (BASE, "request-1")
    assert isinstance(start, text_pb2.TextStart)
    assert [delta.text for delta in deltas if isinstance(delta, text_pb2.TextDelta)] == ["Sure:", "", " one, two."]
    assert isinstance(finish, text_pb2.TextFinish)


async def test_a_whole_text_has_its_tokens_plan_start_and_finish(router: RouterClient) -> None:
    answer = await router.answer_text("hi", experts=["sql", ("json", 0.5)], seed=5)
    assert answer.text == "Sure: one, two."
    assert [token.id for token in answer.tokens] == [7, 8, 9]
    assert [expert.weight for expert in answer.plan.experts] == [1.0, 0.5]
    assert (answer.start.sampling.seed, answer.start.worker) == (5, "worker-a")
    assert answer.finish.reason == text_pb2.TEXT_FINISH_REASON_END
    assert answer.request_id == "request-1"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, None),
        (Constraint(), None),
        (Constraint(json_schema={"type": "string"}), text_pb2.Constraint(json_schema='{"type": "string"}')),
        (Constraint(json_schema='{"a":1}'), text_pb2.Constraint(json_schema='{"a":1}')),
        (Constraint(json_schema=True), text_pb2.Constraint(json_schema="true")),
        (Constraint(gbnf='root ::= "a"'), text_pb2.Constraint(gbnf='root ::= "a"')),
        (Constraint(none=True), text_pb2.Constraint(none=Empty())),
    ],
)
async def test_what_an_answer_must_be_is_sent(
    router: RouterClient, scripted: ScriptedRouter, given: Constraint | None, sent: text_pb2.Constraint | None
) -> None:
    await router.answer_text("hi", constraint=given)
    assert (scripted.requests[0].constraint if scripted.requests[0].HasField("constraint") else None) == sent


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Constraint(json_schema={}, gbnf='root ::= "a"'), Reason.BAD_REQUEST),
        (Constraint(json_schema=False, none=True), Reason.BAD_REQUEST),
        (Constraint(json_schema={"enum": [float("nan")]}), Reason.BAD_SCHEMA),
        (Constraint(json_schema={"enum": [object()]}), Reason.BAD_SCHEMA),
        (Constraint(gbnf="\ud800"), Reason.BAD_REQUEST),
    ],
)
async def test_what_no_answer_can_be_is_refused(router: RouterClient, given: Constraint, reason: Reason) -> None:
    with pytest.raises(HocketError) as refused:
        await router.answer_text("hi", constraint=given)
    assert refused.value.reason is reason


async def test_everything_about_a_text_is_sent_as_it_was_given(router: RouterClient, scripted: ScriptedRouter) -> None:
    await router.answer_text(
        messages=[{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}],
        experts=(("acme/sql", -0.5), "json"),
        base="Qwen3-0.6B",
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        seed=2**64 - 1,
        max_tokens=7,
        stop=["\n", "END"],
        top_logprobs=3,
        ignore_eos=True,
    )
    [request] = scripted.requests
    assert request == router_pb2.GenerateRequest(
        input=text_pb2.TextInput(
            conversation=text_pb2.Conversation(
                messages=[
                    text_pb2.Message(role="system", content="be short"),
                    text_pb2.Message(role="user", content="hi"),
                ]
            )
        ),
        experts=[
            router_pb2.ChosenExpert(expert="acme/sql", weight=-0.5),
            router_pb2.ChosenExpert(expert="json"),
        ],
        base="Qwen3-0.6B",
        sampling=text_pb2.Sampling(
            temperature=0.5,
            top_k=40,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            seed=2**64 - 1,
            max_tokens=7,
            stop=["\n", "END"],
            top_logprobs=3,
            ignore_eos=True,
        ),
    )


async def test_what_is_not_said_is_not_sent(router: RouterClient, scripted: ScriptedRouter) -> None:
    await router.answer_text(raw="", temperature=None, stop=None, seed=0)
    [request] = scripted.requests
    assert request.input.WhichOneof("content") == "raw"
    assert request.sampling == text_pb2.Sampling(seed=0)
    assert len(request.experts) == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "input"),
        ({"raw": "both"}, "input"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "input"),
        ({"prompt": None, "messages": [{"role": "user", "words": "hi"}]}, "input"),
        ({"prompt": None, "messages": ["hi"]}, "input"),
        ({"prompt": 7}, "input"),
        ({"prompt": "half a character: \ud800"}, "input"),
        ({"base": "\udcff"}, "base"),
        ({"base": 5}, "base"),
        ({"base": None}, "base"),
        ({"timeout_seconds": "x"}, "timeout_seconds"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
        ({"experts": {"sql": "much"}}, "experts"),
        ({"experts": "\udcff"}, "experts"),
        ({"experts": [("sql",)]}, "experts"),
        ({"experts": [7]}, "experts"),
        ({"experts": 7}, "experts"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"stop": [7]}, "sampling.stop"),
        ({"temprature": 0.5}, "sampling.temprature"),
    ],
)
async def test_a_text_that_cannot_be_sent_is_refused_before_it_is(
    router: RouterClient, scripted: ScriptedRouter, change: dict[str, Any], field: str
) -> None:
    options = {"prompt": "hi", "experts": {"sql": 1.0}, "top_k": 1, "seed": 1, "stop": "\n", **change}
    with pytest.raises(HocketError) as caught:
        await router.answer_text(**options)
    assert (caught.value.reason, caught.value.field) == (Reason.BAD_REQUEST, field)
    assert scripted.requests == []


@pytest.mark.parametrize("experts", ["sql", ["sql"], ("sql",), {"sql": 1.0}, [("sql", 1.0)]])
async def test_experts_may_be_written_in_several_ways(
    router: RouterClient, scripted: ScriptedRouter, experts: Any
) -> None:
    await router.answer_text("hi", experts=experts, stop="END")
    [request] = scripted.requests
    assert [expert.expert for expert in request.experts] == ["sql"]
    assert list(request.sampling.stop) == ["END"]


async def test_a_text_has_the_deadline_of_its_call_and_else_the_server_s(
    router: RouterClient, scripted: ScriptedRouter
) -> None:
    await router.answer_text("hi")
    await router.answer_text("hi", timeout_seconds=90.0)
    absent, given = scripted.seconds_left
    assert absent is None
    assert given == pytest.approx(90.0, abs=5)


async def test_leaving_a_text_early_cancels_the_call(router: RouterClient, scripted: ScriptedRouter) -> None:
    scripted.stall = True
    async with aclosing(router.generate("hi")) as events:
        for _ in range(3):
            await anext(events)
    assert await asyncio.to_thread(scripted.cancelled.wait, 5)


async def test_a_text_without_an_end_is_no_answer() -> None:
    class Broken(ScriptedRouter):
        async def Generate(
            self, request: router_pb2.GenerateRequest, context: Any
        ) -> AsyncIterator[router_pb2.GenerateResponse]:
            async for response in super().Generate(request, context):
                if not response.HasField("finish"):
                    yield response

    handlers = Handlers()
    handlers.add(add_RouterServiceServicer_to_server, Broken())
    with pytest.raises(HocketError) as caught:
        await RouterClient(LocalChannel(handlers)).answer_text("hi")
    assert caught.value.reason is Reason.INTERNAL


@pytest.mark.parametrize(("begun", "reason"), [(True, Reason.STREAM_BROKEN), (False, Reason.UNREACHABLE)])
async def test_a_server_that_goes_away_in_mid_answer_is_not_one_that_was_never_there(
    reason: Reason, *, begun: bool
) -> None:
    class Leaving(router_pb2_grpc.RouterServiceServicer):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[router_pb2.GenerateResponse]:
            del request
            if begun:
                yield router_pb2.GenerateResponse(plan=text_pb2.TextPlan())
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    server = grpc.aio.server()
    add_RouterServiceServicer_to_server(Leaving(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(HocketError) as caught:
            await RouterClient(channel).answer_text("hello")
    await server.stop(None)
    assert caught.value.reason is reason


async def test_how_experts_are_chosen_is_sent_as_it_was_given(router: RouterClient, scripted: ScriptedRouter) -> None:
    await router.route_text("hi", routing=Routing("hivellm", "low", ["high"], 3), base="b")
    await router.route_text(raw="hi", experts=["low"])
    chosen, named = scripted.requests
    assert chosen == router_pb2.RouteRequest(
        text=text_pb2.TextInput(prompt="hi"),
        base="b",
        routing=router_pb2.Routing(policy=text_pb2.POLICY_HIVELLM, allow=["low"], deny=["high"], expert_count_max=3),
    )
    assert named == router_pb2.RouteRequest(
        text=text_pb2.TextInput(raw="hi"), experts=[router_pb2.ChosenExpert(expert="low")]
    )


@pytest.mark.parametrize(
    ("routing", "field"),
    [
        (Routing("magic"), "routing.policy"),  # type: ignore[arg-type]  # what somebody may write
        (Routing(allow=[7]), "routing.allow"),  # type: ignore[list-item]  # the same
        (Routing(deny=["\ud800"]), "routing.deny"),
        (Routing(expert_count_max=-1), "routing.expert_count_max"),
        (Routing(expert_count_max="many"), "routing.expert_count_max"),  # type: ignore[arg-type]  # the same
    ],
)
async def test_routing_that_cannot_be_sent_is_refused(
    router: RouterClient, scripted: ScriptedRouter, routing: Routing, field: str
) -> None:
    with pytest.raises(HocketError) as caught:
        await router.route_text("hi", routing=routing)
    assert (caught.value.reason, caught.value.field) == (Reason.BAD_REQUEST, field)
    assert scripted.requests == []
