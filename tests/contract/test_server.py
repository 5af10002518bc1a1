"""What every listening server offers beside its own service: health, reflection, an orderly end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1 import aggregator_pb2_grpc
from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = "hocket.v1.AggregatorService"
Status = health_pb2.HealthCheckResponse


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    handlers = Handlers()
    handlers.add(
        aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server, aggregator_pb2_grpc.AggregatorServiceServicer()
    )
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    yield server
    await server.drain(0)


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(str(server.address)) as channel:
        yield channel


async def test_health_tells_alive_from_ready(server: Server, channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == Status.SERVING
    ready = health_pb2.HealthCheckRequest(service=SERVICE)
    assert (await health.Check(ready)).status == Status.NOT_SERVING
    server.set_ready()
    assert (await health.Check(ready)).status == Status.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_lists_every_service(server: Server, channel: grpc.aio.Channel) -> None:
    server.set_ready()
    statuses = (await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())).statuses
    assert {name: response.status for name, response in statuses.items()} == {
        "": Status.SERVING,
        SERVICE: Status.SERVING,
    }


async def test_health_watch_streams_each_change(server: Server, channel: grpc.aio.Channel) -> None:
    watches: list[Any] = [
        health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(2)
    ]
    assert [(await watch.read()).status for watch in watches] == [Status.NOT_SERVING] * 2
    server.set_ready()
    assert [(await watch.read()).status for watch in watches] == [Status.SERVING] * 2
    for watch in watches:
        watch.cancel()
    unknown: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
    unknown.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_in_both_versions(channel: grpc.aio.Channel, version: str) -> None:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call: Any = ask()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    for name in names:
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
        assert (await call.read()).HasField("file_descriptor_response"), name
    await call.done_writing()
    assert names == {SERVICE, "grpc.health.v1.Health"}
    call.cancel()


async def test_a_taken_port_stops_the_start(server: Server) -> None:
    with pytest.raises(OSError, match="cannot listen"):
        await Server(Handlers(), server.address).start()


async def test_draining_turns_readiness_off_then_ends(server: Server, channel: grpc.aio.Channel) -> None:
    server.set_ready()
    watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == Status.SERVING
    drained = asyncio.create_task(server.drain(5.0))
    assert (await watch.read()).status == Status.NOT_SERVING
    await asyncio.wait_for(drained, 3.0)
