"""The plumbing behaves the same over a socket and inside one process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.channel import Channels
from hocket.rpc.convert import MESSAGE_BYTES_MAX
from hocket.rpc.handlers import Handlers, Tokens, add_trailing, remaining_seconds
from hocket.rpc.server import Address, Server
from hocket.rpc.status import from_rpc_error
from hocket.v1 import (
    aggregator_pb2,
    aggregator_pb2_grpc,
    expert_worker_pb2,
    expert_worker_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Echo(
    aggregator_pb2_grpc.AggregatorServiceServicer,
    expert_worker_pb2_grpc.ExpertWorkerServiceServicer,
    registry_pb2_grpc.RegistryServiceServicer,
):
    """One rpc of each shape, scripted by what the requests say."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.stopped = asyncio.Event()
        self.entered = asyncio.Event()
        self.sent = 0

    async def RunTensor(self, request: Any, context: Any) -> expert_worker_pb2.RunTensorResponse:
        self.entered.set()
        self.seen = {"remaining": remaining_seconds(context, 99.0), "metadata": dict(context.invocation_metadata())}
        match request.expert:
            case "refuse":
                raise HocketError(
                    Reason.BAD_TENSOR, "too wide", field="input.shape[1]", retry_after_seconds=1.5, width="9"
                )
            case "cancel":
                raise asyncio.CancelledError
            case "damaged" | "damaged elsewhere":
                facts: dict[str, Any] = {"request_id": "request-1"} if request.expert != "damaged" else {}
                raise HocketError(Reason.BLOB_CORRUPT, "the stored bytes are damaged", **facts)
            case "bug":
                raise ValueError("the secret is 42")
            case "refuse at length":
                raise HocketError(Reason.BAD_REQUEST, "x" * 100_000, field="y" * 10, fact="z" * 100_000)
            case "hang":
                try:
                    await asyncio.sleep(60)
                finally:
                    self.stopped.set()
        add_trailing(context, "colour-bin", b"\x00\xff")
        return expert_worker_pb2.RunTensorResponse()

    async def Combine(self, request: Any, context: Any) -> AsyncIterator[aggregator_pb2.CombineResponse]:
        del context
        try:
            for sequence in range(1, request.plan.row_count + 1):
                response = aggregator_pb2.CombineResponse()
                response.partial.sequence = sequence
                self.sent = sequence
                yield response
            if request.plan.model == "refuse":
                raise HocketError(Reason.COVERAGE, "an expert is missing")
            if request.plan.model == "hang":
                await asyncio.sleep(60)
        finally:
            self.stopped.set()

    async def PublishPackage(self, request: Any, context: Any) -> registry_pb2.PublishPackageResponse:
        del context
        size = sum([len(part.chunk) async for part in request])
        response = registry_pb2.PublishPackageResponse()
        response.package.size_bytes = size
        return response

    async def Announce(self, request: Any, context: Any) -> AsyncIterator[registry_pb2.AnnounceResponse]:
        del context
        async for state in request:
            response = registry_pb2.AnnounceResponse()
            response.lease.FromSeconds(len(state.worker.worker))
            yield response


class Stubs:
    """All stubs over one channel, and the servicer behind them."""

    def __init__(self, channel: grpc.aio.Channel, servicer: Echo, handlers: Handlers) -> None:
        self.worker: Any = expert_worker_pb2_grpc.ExpertWorkerServiceStub(channel)
        self.aggregator: Any = aggregator_pb2_grpc.AggregatorServiceStub(channel)
        self.registry: Any = registry_pb2_grpc.RegistryServiceStub(channel)
        self.servicer = servicer
        self.handlers = handlers


@asynccontextmanager
async def serving(kind: str, **options: Any) -> AsyncIterator[Stubs]:
    handlers = Handlers(**options)
    servicer = Echo()
    handlers.add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, servicer)
    handlers.add(aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server, servicer)
    handlers.add(registry_pb2_grpc.add_RegistryServiceServicer_to_server, servicer)
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    channels = Channels({"echo": handlers})
    address = "local:echo" if kind == "local" else str(server.address)
    try:
        yield Stubs(channels.get(address), servicer, handlers)
    finally:
        await channels.close()
        await server.drain(0.1)


@pytest.fixture(params=["local", "wire"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def stubs(kind: str) -> AsyncIterator[Stubs]:
    async with serving(kind) as stubs:
        yield stubs


def run(expert: str) -> expert_worker_pb2.RunTensorRequest:
    return expert_worker_pb2.RunTensorRequest(expert=expert)


def combine(model: str, count: int) -> aggregator_pb2.CombineRequest:
    request = aggregator_pb2.CombineRequest()
    request.plan.model, request.plan.row_count = model, count
    return request


async def refusal_of(call: Any) -> HocketError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def read_all(call: Any) -> list[int]:
    return [response.partial.sequence async for response in call]


def total(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_every_shape_of_rpc_answers(stubs: Stubs) -> None:
    assert await stubs.worker.RunTensor(run("fine"), timeout=5) == expert_worker_pb2.RunTensorResponse()
    assert await read_all(stubs.aggregator.Combine(combine("fine", 40), timeout=5)) == list(range(1, 41))

    async def parts() -> AsyncIterator[registry_pb2.PublishPackageRequest]:
        for size in (3, 4):
            yield registry_pb2.PublishPackageRequest(chunk=bytes(size))

    assert (await stubs.registry.PublishPackage(parts(), timeout=5)).package.size_bytes == 7
    call = stubs.registry.Announce(timeout=5)
    for name in ("a", "bbb"):
        request = registry_pb2.AnnounceRequest()
        request.worker.worker = name
        await call.write(request)
        assert (await call.read()).lease.seconds == len(name)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_refusal_carries_its_reason_field_pause_and_facts(stubs: Stubs) -> None:
    error = await refusal_of(stubs.worker.RunTensor(run("refuse"), timeout=5))
    assert (error.reason, error.message, error.field) == (Reason.BAD_TENSOR, "too wide", "input.shape[1]")
    assert error.retry_after_seconds == 1.5
    assert error.metadata["width"] == "9"
    assert error.metadata["request_id"]


async def test_a_refusal_is_readable_by_any_grpc_client(stubs: Stubs) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stubs.worker.RunTensor(run("refuse"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailing: dict[str, Any] = dict(tuple(cast("Any", caught.value.trailing_metadata())))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("BAD_TENSOR", "hocket")


async def test_a_bug_answers_internal_and_keeps_its_text(stubs: Stubs) -> None:
    error = await refusal_of(stubs.worker.RunTensor(run("bug"), timeout=5))
    assert error.reason is Reason.INTERNAL
    assert "secret" not in str(error)
    assert error.metadata["request_id"] in error.message


async def test_a_stream_delivers_what_came_before_its_refusal(stubs: Stubs) -> None:
    call = stubs.aggregator.Combine(combine("refuse", 3), timeout=5)
    assert [(await call.read()).partial.sequence for _ in range(3)] == [1, 2, 3]
    assert (await refusal_of(call.read())).reason is Reason.COVERAGE


async def test_the_deadline_ends_the_call_and_stops_the_handler(stubs: Stubs) -> None:
    error = await refusal_of(stubs.worker.RunTensor(run("hang"), timeout=0.1))
    assert error.reason is Reason.DEADLINE
    await asyncio.wait_for(stubs.servicer.stopped.wait(), 1.0)


async def test_the_handler_knows_the_time_left_and_a_missing_deadline(stubs: Stubs) -> None:
    await stubs.worker.RunTensor(run("fine"), timeout=5)
    assert 4.0 < stubs.servicer.seen["remaining"] < 5.5  # the two ends have a clock each
    await stubs.worker.RunTensor(run("fine"))
    assert stubs.servicer.seen["remaining"] == 99.0


async def test_cancelling_the_caller_stops_the_handler(stubs: Stubs) -> None:
    call = asyncio.ensure_future(_await(stubs.worker.RunTensor(run("hang"), timeout=30)))
    await asyncio.wait_for(stubs.servicer.entered.wait(), 2.0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(stubs.servicer.stopped.wait(), 1.0)


async def test_cancelling_a_stream_stops_its_handler(stubs: Stubs) -> None:
    call = stubs.aggregator.Combine(combine("hang", 1), timeout=30)
    assert (await call.read()).partial.sequence == 1
    call.cancel()
    await asyncio.wait_for(stubs.servicer.stopped.wait(), 1.0)
    assert await call.code() is grpc.StatusCode.CANCELLED


async def test_work_that_its_own_side_cancels_is_a_refusal_not_a_cancellation(stubs: Stubs) -> None:
    assert (await refusal_of(stubs.worker.RunTensor(run("cancel"), timeout=5))).reason is Reason.DRAINING


async def test_a_message_over_the_limit_does_not_travel(stubs: Stubs) -> None:
    request = run("fine")
    request.input.contents = bytes(MESSAGE_BYTES_MAX - 100)
    await stubs.worker.RunTensor(request, timeout=5)
    request.input.contents = bytes(MESSAGE_BYTES_MAX)
    with pytest.raises(grpc.RpcError) as caught:
        await stubs.worker.RunTensor(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_long_text_in_a_refusal_is_clipped_and_keeps_its_reason(stubs: Stubs) -> None:
    error = await refusal_of(stubs.worker.RunTensor(run("refuse at length"), timeout=5))
    assert (error.reason, len(error.message)) == (Reason.BAD_REQUEST, 803)


async def test_a_call_cancelled_before_its_first_step_ends(stubs: Stubs) -> None:
    call = stubs.aggregator.Combine(combine("fine", 1), timeout=5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call.read(), 2)
    assert await asyncio.wait_for(call.code(), 2) is grpc.StatusCode.CANCELLED


async def test_a_slow_reader_holds_the_handler_back() -> None:
    async with serving("local") as stubs:
        call = stubs.aggregator.Combine(combine("fine", 1000), timeout=30)
        await call.read()
        await asyncio.sleep(0.05)
        assert stubs.servicer.sent < 50
        assert len(await read_all(call)) == 999


async def test_request_ids_pass_through_and_bad_ones_are_replaced(stubs: Stubs) -> None:
    call = stubs.worker.RunTensor(run("fine"), timeout=5, metadata=(("x-request-id", "mine-1"),))
    await call
    assert dict(tuple(await call.trailing_metadata()))["x-request-id"] == "mine-1"
    call = stubs.worker.RunTensor(run("fine"), timeout=5, metadata=(("x-request-id", "x" * 129),))
    await call
    assert dict(tuple(await call.trailing_metadata()))["x-request-id"] != "x" * 129


async def test_trailing_metadata_arrives_whole(stubs: Stubs) -> None:
    call = stubs.worker.RunTensor(run("fine"), timeout=5)
    await call
    assert dict(tuple(await call.trailing_metadata()))["colour-bin"] == b"\x00\xff"


async def test_calls_beyond_the_limit_are_refused_with_a_pause(kind: str) -> None:
    async with serving(kind, in_flight_max=1) as stubs:
        hanging = asyncio.ensure_future(_await(stubs.worker.RunTensor(run("hang"), timeout=30)))
        await asyncio.wait_for(stubs.servicer.entered.wait(), 2.0)
        error = await refusal_of(stubs.worker.RunTensor(run("fine"), timeout=5))
        assert (error.reason, error.retry_after_seconds) == (Reason.QUEUE_FULL, 0.1)
        hanging.cancel()
        await asyncio.wait_for(stubs.servicer.stopped.wait(), 1.0)
        await stubs.handlers.wait_idle(1.0)
        await stubs.worker.RunTensor(run("fine"), timeout=5)


async def test_a_draining_server_refuses_new_calls(stubs: Stubs) -> None:
    stubs.handlers.draining = True
    assert (await refusal_of(stubs.worker.RunTensor(run("fine"), timeout=5))).reason is Reason.DRAINING


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        (None, Reason.TOKEN_REQUIRED),
        ("Bearer nonsense", Reason.TOKEN_REQUIRED),
        ("Bearer of-the-worker", Reason.TOKEN_NOT_ALLOWED),
        ("Bearer of-the-admin", None),
    ],
)
async def test_a_guarded_method_takes_only_its_own_token(kind: str, sent: str | None, outcome: Reason | None) -> None:
    tokens = Tokens("of-the-admin", "of-the-worker", frozenset({"RunTensor"}), frozenset({"Announce"}))
    async with serving(kind, tokens=tokens) as stubs:
        metadata = () if sent is None else (("authorization", sent),)
        call = stubs.worker.RunTensor(run("fine"), timeout=5, metadata=metadata)
        if outcome is None:
            await call
        else:
            assert (await refusal_of(call)).reason is outcome
        await read_all(stubs.aggregator.Combine(combine("fine", 1), timeout=5))  # an open method stays open


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        ("Bearer of-the-admin", None),
        ("Bearer of-the-admim", Reason.TOKEN_REQUIRED),
        (f"Bearer {digest_of(b'of-the-admin')}", Reason.TOKEN_REQUIRED),
        ("of-the-admin", Reason.TOKEN_REQUIRED),
        ("Bearer of-the-worker", Reason.TOKEN_NOT_ALLOWED),
    ],
)
async def test_who_knows_the_hash_of_a_token_can_check_it_and_not_show_it(
    kind: str, sent: str, outcome: Reason | None
) -> None:
    tokens = Tokens(digest_of(b"of-the-admin"), digest_of(b"of-the-worker"), frozenset({"RunTensor"}))
    async with serving(kind, tokens=tokens) as stubs:
        call = stubs.worker.RunTensor(run("fine"), timeout=5, metadata=(("authorization", sent),))
        if outcome is None:
            await call
        else:
            assert (await refusal_of(call)).reason is outcome


async def test_calls_and_refusals_are_counted(stubs: Stubs) -> None:
    labels = {"grpc_service": "hocket.v1.ExpertWorkerService", "grpc_method": "RunTensor"}
    handled = {**labels, "grpc_type": "unary", "grpc_code": "INVALID_ARGUMENT"}
    before = (
        total("grpc_server_handled_total", **handled),
        total("hocket_refusals_total", **labels, reason="BAD_TENSOR"),
    )
    await refusal_of(stubs.worker.RunTensor(run("refuse"), timeout=5))
    await stubs.handlers.wait_idle(1.0)  # the caller may hear of the end before it is counted
    after = total("grpc_server_handled_total", **handled), total("hocket_refusals_total", **labels, reason="BAD_TENSOR")
    assert (after[0] - before[0], after[1] - before[1]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("expert", "level"), [("refuse", "info"), ("damaged", "error"), ("damaged elsewhere", "debug")]
)
async def test_damage_is_an_error_in_the_log_of_the_service_that_has_found_it(
    stubs: Stubs, expert: str, level: str
) -> None:
    with capture_logs() as logs:
        await refusal_of(stubs.worker.RunTensor(run(expert), timeout=5))
        await stubs.handlers.wait_idle(1.0)
    assert [log["log_level"] for log in logs if log["event"] == "refused"] == [level]


async def test_an_unknown_method_is_unimplemented(kind: str) -> None:
    handlers = Handlers()
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    channels = Channels({"empty": handlers})
    channel = channels.get("local:empty" if kind == "local" else str(server.address))
    with pytest.raises(grpc.RpcError) as caught:
        await expert_worker_pb2_grpc.ExpertWorkerServiceStub(channel).RunTensor(run("fine"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await channels.close()
    await server.drain(0)


async def _await(call: Any) -> Any:
    return await call


async def test_bytes_that_are_no_message_are_a_bad_request_in_every_shape() -> None:
    handlers = Handlers()
    servicer = Echo()
    handlers.add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, servicer)
    handlers.add(aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server, servicer)
    handlers.add(registry_pb2_grpc.add_RegistryServiceServicer_to_server, servicer)
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    async with grpc.aio.insecure_channel(str(server.address)) as channel:
        raw: Any = channel
        path = "/hocket.v1."
        calls = [
            raw.unary_unary(f"{path}ExpertWorkerService/RunTensor")(b"!", timeout=5),
            raw.unary_stream(f"{path}AggregatorService/Combine")(b"!", timeout=5).read(),
            raw.stream_unary(f"{path}RegistryService/PublishPackage")(iter([b"!"]), timeout=5),
            raw.stream_stream(f"{path}RegistryService/Announce")(iter([b"!"]), timeout=5).read(),
        ]
        for call in calls:
            error = await refusal_of(call)
            assert (error.reason, error.metadata["request_id"] != "") == (Reason.BAD_REQUEST, True)
    await server.drain(0)
