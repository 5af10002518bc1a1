"""`docker compose up` for real: a suite in containers, asked from outside, while parts of it are killed."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from examples.publishing import Publisher
from hocket.client import connect, connect_registry
from hocket.errors import HocketError, Reason
from hocket.keyring import load_key
from hocket.settings import read_token
from tests.builders import apr_bytes, linear
from tests.clusters import traffic
from tests.compose.stack import SERVICES

if TYPE_CHECKING:
    from hocket.client import Answer, RegistryClient
    from tests.compose.stack import Stack

pytestmark = [pytest.mark.compose, pytest.mark.usefixtures("published")]

ROWS = [[1.0, 2.0, 3.0]]
USER = 10001
EXPERTS = {f"e{number}": apr_bytes(linear(float(number), 2.0, -1.0)) for number in range(4)}
MEAN = sum(number * 1.0 + 2.0 * 2.0 - 1.0 * 3.0 + 0.5 for number in range(4)) / 4
EXPECTED = np.array([[MEAN]], np.float32)
MIXTURE = """
name = "quartet"
{members}
[gate]
kind = "fixed"
weights = [1, 1, 1, 1]
"""


@pytest.fixture(scope="session")
def published(trusted: Stack) -> None:
    """Four experts and a mixture of them are published, by the `hocket` command."""
    token = ("--token-file", trusted.admin_token_file)
    for name, data in EXPERTS.items():
        file = trusted.folder / f"{name}.apr"
        file.write_bytes(data)
        trusted.hocket("sign", file, "--publisher", "acme", "--name", name, "--version", "1.0.0")
    trusted.hocket("publish", *(trusted.folder / f"{name}.apr" for name in EXPERTS), *token)
    members = "\n".join(f'[[members]]\nexpert = "acme/{name}@1.0.0"' for name in EXPERTS)
    (trusted.folder / "quartet.toml").write_text(MIXTURE.format(members=members))
    trusted.hocket(
        "mixtures", "put", trusted.folder / "quartet.toml", "--publisher", "acme", "--version", "1.0.0", *token
    )


def _registry(stack: Stack) -> Any:
    """A connection to the registry with the admin's token."""
    return connect_registry(stack.registry, read_token(stack.admin_token_file))


def _workers(answer: Answer) -> set[str]:
    return {contribution.worker for contribution in answer.contributions}


def test_it_answers_outside_of_the_containers(stack: Stack) -> None:
    events = [json.loads(line) for line in stack.hocket("predict", "quartet", "--row", "1,2,3", "--json").splitlines()]
    assert events[-1]["event"] == "answer"
    assert events[-1]["value"] == [[MEAN]]


def test_reflection_is_enough_to_ask_it(stack: Stack) -> None:
    with grpc.insecure_channel(stack.router) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("hocket.v1.RouterService").methods_by_name["Predict"]
        contents = base64.b64encode(np.array(ROWS, "<f4").tobytes()).decode()
        request_type, response_type = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        request = request_type()
        ParseDict({"model": "quartet", "input": {"datatype": "FP32", "shape": [1, 3], "contents": contents}}, request)
        answers = [
            *channel.unary_stream(
                "/hocket.v1.RouterService/Predict",
                request_serializer=request_type.SerializeToString,
                response_deserializer=response_type.FromString,
            )(request, timeout=10)
        ]
    final = MessageToDict(answers[-1])["final"]
    assert base64.b64decode(final["combination"]["value"]["contents"]) == np.float32(MEAN).tobytes()


def test_publishing_without_the_token_is_refused(stack: Stack) -> None:
    async def publish() -> None:
        async with connect_registry(stack.registry) as registry:
            await registry.publish(EXPERTS["e0"])

    with pytest.raises(HocketError) as caught:
        asyncio.run(publish())
    assert caught.value.reason is Reason.TOKEN_REQUIRED


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_change_nothing_but_its_data(stack: Stack, service: str) -> None:
    facts = stack.inspect(service)
    assert facts["Config"]["User"] == f"{USER}:{USER}"
    limits = facts["HostConfig"]
    assert (limits["ReadonlyRootfs"], limits["CapDrop"], limits["Init"]) == (True, ["ALL"], True)
    assert "no-new-privileges:true" in limits["SecurityOpt"]
    assert limits["PidsLimit"] == 512
    assert limits["Memory"] >= 2**30
    assert limits["RestartPolicy"]["Name"] == "unless-stopped"
    status = dict(line.split(":\t", 1) for line in stack.inside(service, "cat", "/proc/1/status").splitlines())
    assert status["Uid"].split() == [str(USER)] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    stack.inside(service, "touch", "/tmp/here")  # noqa: S108 - in the container
    for forbidden in ("/here", "/opt/hocket/here", "/var/lib/hocket/trust/here")[: 2 if service == "router" else 3]:
        with pytest.raises(AssertionError, match=r"Read-only|Permission denied"):
            stack.inside(service, "touch", forbidden)


def test_no_tool_that_builds_is_in_an_image(stack: Stack) -> None:
    for module in ("pip", "hatchling"):
        with pytest.raises(AssertionError, match="No module named"):
            stack.inside("worker-1", "python", "-c", f"import {module}")


def test_only_the_router_is_published_beyond_this_machine(stack: Stack) -> None:
    ports = {service: stack.inspect(service)["NetworkSettings"]["Ports"] for service in SERVICES}
    bound = {
        service: {(port, at["HostIp"]) for port, places in ports[service].items() for at in places or ()}
        for service in SERVICES
    }
    assert bound["registry"] == {("50052/tcp", "127.0.0.1")}
    assert {port for port, _ in bound["router"]} == {"50051/tcp"}
    assert not any(bound[service] for service in ("aggregator", "worker-1", "worker-2"))
    gateway = stack.inspect("router")["NetworkSettings"]["Networks"]
    here = next(network["Gateway"] for name, network in gateway.items() if name.endswith("outside"))
    with socket.create_connection((here, int(stack.router.split(":")[1])), 5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((here, int(stack.registry.split(":")[1])), 5)


@pytest.mark.parametrize("service", ["worker-1", "aggregator"])
def test_what_computes_reaches_nothing_outside(stack: Stack, service: str) -> None:
    attempt = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
    with pytest.raises(AssertionError, match=r"TimeoutError|unreachable"):
        stack.inside(service, "python", "-c", attempt)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--address", "127.0.0.1:50051"), 0),
        (("--address", "127.0.0.1:50051", "--service", "hocket.v1.RouterService"), 0),
        (("--address", "aggregator:50053", "--service", "hocket.v1.AggregatorService"), 0),
        (("--address", "127.0.0.1:50051", "--service", "hocket.v1.RegistryService"), 3),
        (("--address", "127.0.0.1:1"), 2),
    ],
)
def test_the_health_command_is_in_the_image(stack: Stack, arguments: tuple[str, ...], status: int) -> None:
    done = subprocess.run(
        ["docker", "exec", stack.container("router"), "hocket", "health", *arguments],
        env=stack.environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == status, done.stderr


def test_metrics_are_one_thousand_above_and_not_published(stack: Stack) -> None:
    read = (
        "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
    )
    for target in ("registry:51052", "worker-1:51054", "worker-2:51054", "aggregator:51053", "router:51051"):
        assert "grpc_server_handled_total" in stack.inside("router", "python", "-c", read, f"http://{target}/metrics")


async def test_a_worker_that_crashes_comes_back_and_no_call_fails(stack: Stack) -> None:
    async with connect(stack.router, timeout_seconds=10.0) as client:
        victim = max(_workers(await client.answer("quartet", ROWS)))
        restarts = stack.inspect(victim)["RestartCount"]
        async with traffic([client], "quartet", ROWS, EXPECTED) as calls:
            await calls.fault()
            await asyncio.to_thread(stack.crash, victim)
            await calls.count(60)
            await stack.healthy(victim, restarts=restarts + 1)
            await calls.count(20)
    assert calls.failed == []


async def test_a_worker_container_that_is_killed_is_not_missed(stack: Stack) -> None:
    async with connect(stack.router, timeout_seconds=10.0) as client:
        victim = max(_workers(await client.answer("quartet", ROWS)))
        async with traffic([client], "quartet", ROWS, EXPECTED) as calls:
            await calls.fault()
            await asyncio.to_thread(stack.docker, "kill", stack.container(victim))
            await calls.count(60)
            last = calls.calls[-1].answer
            assert last is not None
            assert victim not in _workers(last)
            await asyncio.to_thread(stack.compose, "up", "--detach", "--no-build")
            await stack.healthy(victim)
            await calls.count(20)
    assert calls.failed == []


async def test_the_registry_comes_back_with_all_it_acknowledged_and_nobody_waits_for_it(stack: Stack) -> None:
    publisher = Publisher("acme", load_key(stack.key))
    acknowledged: set[str] = set()

    async def publish(registry: RegistryClient) -> None:
        """Publish until the registry is gone."""
        for number in range(1000):
            data = apr_bytes(linear(float(number), 7.0))
            try:
                acknowledged.add(await publisher.publish(registry, data, "n", str(number)))
            except HocketError:
                return

    restarts = stack.inspect("registry")["RestartCount"]
    async with (
        connect(stack.router, timeout_seconds=10.0) as client,
        traffic([client], "quartet", ROWS, EXPECTED) as calls,
    ):
        async with _registry(stack) as registry:
            publishing = asyncio.create_task(publish(registry))
            while len(acknowledged) < 10:  # noqa: ASYNC110 - acknowledgements count themselves
                await asyncio.sleep(0.01)
            await calls.fault()
            await asyncio.to_thread(stack.crash, "registry")
            await publishing
        await stack.healthy("registry", restarts=restarts + 1)
        async with _registry(stack) as registry:
            there = {package.digest async for package in registry.list_packages()}
            again = await publisher.publish(registry, apr_bytes(linear(-1.0, 7.0)), "after", "1")
        await _until_known(stack, again)
    assert acknowledged <= there
    assert calls.failed == []


async def _until_known(stack: Stack, model: str) -> None:
    async with connect(stack.router) as client, asyncio.timeout(20):
        while True:
            try:
                await client.get_mixture(model)
            except HocketError as error:
                if error.reason is not Reason.UNKNOWN_MODEL:
                    raise
                await asyncio.sleep(0.05)
            else:
                return


async def test_every_service_drains_within_its_time_and_starts_again(stack: Stack) -> None:
    await asyncio.to_thread(stack.compose, "stop")
    assert {service: stack.inspect(service)["State"]["ExitCode"] for service in SERVICES} == dict.fromkeys(SERVICES, 0)
    await asyncio.to_thread(stack.compose, "start")
    await stack.healthy(*SERVICES)
    async with connect(stack.router) as client:
        np.testing.assert_array_equal((await client.answer("quartet", ROWS)).value, [[MEAN]])
