"""Whatever bytes arrive at whatever rpc: an answer or a documented status, in time, and the next caller is served."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

from hocket.client.router import RouterClient
from hocket.errors import Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRecord
from hocket.packages import Purpose
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.server import Address, Server
from hocket.rpc.status import CODES, from_rpc_error
from hocket.v1 import aggregator_pb2, expert_worker_pb2, plan_pb2, registry_pb2, router_pb2
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from tests.builders import apr_bytes, linear
from tests.deployments import Deployment, deployed
from tests.signing import ACME_SEED, envelope_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from google.protobuf.message import Message

pytestmark = pytest.mark.long

MESSAGES = 20_000
AT_ONCE = 16
ENDLESS = {"Watch", "Announce"}
ENDLESS_SECONDS = 0.05
SECONDS_MAX = 10.0
"""Far above what any of this may take, and below a server's own deadline."""

DATA, OTHER, UNKNOWN = apr_bytes(linear(1, 2)), apr_bytes(linear(3, 4)), "sha256:" + "0" * 64
ROWS = np.array([[1, 2], [3, 4]], np.float32)
RECORD = MixtureRecord("wired", (ExpertId(digest_of(DATA)), ExpertId(digest_of(OTHER))), FixedGate((1, 3)), 2)
RELEASE = envelope_of(RECORD.body(), ACME_SEED, "acme/wired@1", purpose=Purpose.MIXTURE, format="mixture")


@dataclass
class Rpc:
    """One rpc and messages it understands.

    Attributes:
        service: Short name, as in `hocket.v1.RouterService`.
        good: Sound requests; more than one when it takes a stream.
    """

    service: str
    method: str
    good: list[Message]
    takes_stream: bool = False
    gives_stream: bool = False

    def call(self, channel: grpc.aio.Channel) -> Any:
        """The multi-callable that sends and gives bytes as they are."""
        shape = f"{'stream' if self.takes_stream else 'unary'}_{'stream' if self.gives_stream else 'unary'}"
        return getattr(channel, shape)(f"/hocket.v1.{self.service}/{self.method}")

    def understands(self, request: bytes) -> bool:
        """Whether these bytes are a message of this rpc at all."""
        try:
            type(self.good[0]).FromString(request)
        except DecodeError:
            return False
        return True


def rpcs(plan: plan_pb2.Plan) -> list[Rpc]:
    """Every rpc of the four services."""
    tensor = matrix_to_tensor(ROWS)
    digest = digest_of(DATA)
    predict = router_pb2.PredictRequest(
        model="wired", input=tensor, top_k=2, min_coverage=0.5, on_missing=plan_pb2.ON_MISSING_FAIL
    )
    predict.straggler_timeout.FromSeconds(5)
    combine = aggregator_pb2.CombineRequest(plan=plan, input=tensor, partials=True, min_coverage=0.5)
    combine.straggler_timeout.FromSeconds(5)
    header = registry_pb2.PublishHeader(digest=digest, size_bytes=len(DATA), release=envelope_of(DATA))
    put = registry_pb2.PutMixtureHeader(body=RECORD.body(), release=RELEASE, etag=RECORD.digest)
    state = registry_pb2.WorkerState(
        worker="stranger",
        address="127.0.0.1:1",
        device="cpu",
        formats=["none"],
        budget_bytes=1,
        residency=[registry_pb2.Residency(digest=UNKNOWN, tier=expert_worker_pb2.TIER_HOST)],
    )
    router, registry, worker = "RouterService", "RegistryService", "ExpertWorkerService"
    return [
        Rpc(router, "Predict", [predict], gives_stream=True),
        Rpc(router, "Route", [router_pb2.RouteRequest(model="wired", input=tensor, top_k=1)]),
        Rpc(router, "ListMixtures", [router_pb2.ListMixturesRequest(page_size=3, page_token="after:a")]),
        Rpc(router, "GetMixture", [router_pb2.GetMixtureRequest(model=f"{digest}#0")]),
        Rpc("AggregatorService", "Combine", [combine], gives_stream=True),
        Rpc(worker, "RunTensor", [expert_worker_pb2.RunTensorRequest(expert=digest, input=tensor)]),
        Rpc(worker, "LoadExpert", [expert_worker_pb2.LoadExpertRequest(digest=digest)], gives_stream=True),
        Rpc(worker, "UnloadExpert", [expert_worker_pb2.UnloadExpertRequest(digest=digest)]),
        Rpc(worker, "ListExperts", [expert_worker_pb2.ListExpertsRequest()]),
        Rpc(
            registry,
            "PublishPackage",
            [registry_pb2.PublishPackageRequest(header=header), registry_pb2.PublishPackageRequest(chunk=DATA)],
            takes_stream=True,
        ),
        Rpc(
            registry,
            "DownloadPackage",
            [registry_pb2.DownloadPackageRequest(digest=digest, offset=7)],
            gives_stream=True,
        ),
        Rpc(registry, "GetPackage", [registry_pb2.GetPackageRequest(package="acme/iris@1.0.0")]),
        Rpc(
            registry,
            "ListPackages",
            [registry_pb2.ListPackagesRequest(page_size=2, publisher="acme", capability="a:b", base="c/d", text="e f")],
        ),
        Rpc(registry, "YankPackage", [registry_pb2.YankPackageRequest(digest=UNKNOWN, explanation="wrong")]),
        Rpc(registry, "RevokeKey", [registry_pb2.RevokeKeyRequest(key="ab" * 32, explanation="lost")]),
        Rpc(
            registry,
            "PutMixture",
            [registry_pb2.PutMixtureRequest(header=put), registry_pb2.PutMixtureRequest(gate_chunk=b"1234")],
            takes_stream=True,
        ),
        Rpc(registry, "FetchMixture", [registry_pb2.FetchMixtureRequest(mixture="wired")], gives_stream=True),
        Rpc(registry, "DeleteMixture", [registry_pb2.DeleteMixtureRequest(name="another", etag=UNKNOWN)]),
        Rpc(registry, "Announce", [registry_pb2.AnnounceRequest(worker=state)], takes_stream=True, gives_stream=True),
        Rpc(registry, "Watch", [registry_pb2.WatchRequest(after_revision=1)], gives_stream=True),
    ]


@dataclass
class Mutator:
    """Turns sound requests into others.

    Attributes:
        dice: Where all randomness comes from.
    """

    dice: random.Random

    def requests(self, good: list[Message]) -> list[bytes]:
        """A stream like `good`, in which at least one message is not what it was, or messages are lost or repeated."""
        sent = [message.SerializeToString() for message in good]
        place = self.dice.randrange(len(sent))
        if self.dice.random() < 0.3:
            sent[place] = self._fields(good[place])
        else:
            change = self.dice.choice([self._noise, self._flipped, self._cut, self._spliced, self._foreign])
            sent[place] = change(sent[place])
        if len(good) > 1 and self.dice.random() < 0.3:
            sent = self.dice.choices(sent, k=self.dice.randrange(4))
        return sent

    def _noise(self, _: bytes) -> bytes:
        return self.dice.randbytes(self.dice.choice([1, 2, 9, 40, 300]))

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        for _ in range(self.dice.choice([1, 1, 2, 8])):
            changed[self.dice.randrange(len(changed))] ^= 1 << self.dice.randrange(8)
        return bytes(changed)

    def _cut(self, data: bytes) -> bytes:
        return data[: self.dice.randrange(len(data) + 1)]

    def _spliced(self, data: bytes) -> bytes:
        """The message with a part of itself once more: fields repeat, oneofs switch, messages merge."""
        begin = self.dice.randrange(len(data) + 1)
        return data + self.dice.choice([data, data[begin:], data[:begin]])

    def _foreign(self, data: bytes) -> bytes:
        """A field more, of any number and wire type."""
        number, wire_type = self.dice.choice([*range(1, 20), 2**28]), self.dice.choice([0, 1, 2, 5])
        value = {
            0: _varint(self.dice.choice([0, 1, 2**31, 2**63, 2**64 - 1])),
            1: struct.pack("<d", self.dice.choice([float("nan"), float("-inf"), -0.0, 1e308])),
            2: _varint(5) + b"\xff\0\n../"[:5],
            5: self.dice.randbytes(4),
        }[wire_type]
        return data + _varint(number << 3 | wire_type) + value

    def _fields(self, message: Message) -> bytes:
        """The message with some field, however deep, at an extreme; it parses, so it reaches the service."""
        changed = type(message)()
        changed.CopyFrom(message)
        for _ in range(self.dice.choice([1, 1, 3])):
            self._set(changed)
        return changed.SerializeToString()

    def _set(self, message: Any) -> None:
        fields = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        chosen = self.dice.choice(fields)
        repeated = chosen.is_repeated
        if chosen.message_type is not None:
            below = getattr(message, chosen.name)
            if repeated:
                below = self.dice.choice(list(below)) if len(below) and self.dice.random() < 0.8 else below.add()
            else:
                below.SetInParent()
            self._set(below)
            return
        value = self.dice.choice(_EXTREMES[chosen.cpp_type])
        if chosen.type == chosen.TYPE_BYTES:
            value = value.encode()
        if not repeated:
            setattr(message, chosen.name, value)
            return
        items = getattr(message, chosen.name)
        if len(items) and self.dice.random() < 0.7:
            items[self.dice.randrange(len(items))] = value
        else:
            items.extend([value] * self.dice.choice([1, 2, 5000]))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


_TEXTS = [
    "",
    "\0",
    "../../etc/passwd",
    "a" * 70_000,
    "\u202e\U0001f600",
    "sha256:" + "f" * 64,
    "x#1",
    "#",
    "a/b@c",
    "%s{}",
]
_REALS = [0.0, -0.0, -1.0, 2.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
_EXTREMES: dict[int, list[Any]] = {  # by FieldDescriptor.CPPTYPE_*
    1: [-(2**31), -1, 0, 1, 2**31 - 1],
    2: [-(2**63), -1, 0, 1, 3, 2**40, 2**63 - 1],
    3: [0, 1, 2, 1023, 2**32 - 1],
    4: [0, 1, 2**40, 2**64 - 1],
    5: _REALS,
    6: [0.0, -1.0, 3e38, float("nan"), float("inf")],
    7: [False, True],
    8: [0, 1, 2, 9, -1, 2**31 - 1],
    9: _TEXTS,  # and bytes
}


@dataclass
class Probe:
    """Sends raw requests, and judges the end of each call."""

    channels: dict[str, grpc.aio.Channel]
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str, str, list[bytes]]] = field(default_factory=list)

    async def send(self, rpc: Rpc, requests: list[bytes]) -> None:
        seconds = ENDLESS_SECONDS if rpc.method in ENDLESS else SECONDS_MAX
        begin = asyncio.get_running_loop().time()
        try:
            await self._send(rpc, requests, seconds)
            code = "OK"
        except grpc.RpcError as error:
            refusal, status = from_rpc_error(error), error.code()
            code = status.name
            ours = CODES[refusal.situation] is status and refusal.reason is not Reason.INTERNAL
            # Not a server's word: the client's own transport says so when a call ends while it still writes.
            ours = ours or error.details() == "Internal error from Core"
            if not ours or (status is grpc.StatusCode.DEADLINE_EXCEEDED and rpc.method not in ENDLESS):
                parsed = all(map(rpc.understands, requests))
                self.wrong.append((rpc.method, code, "parsed" if parsed else "not parsed", str(refusal), requests))
        self.codes[code] += 1
        assert asyncio.get_running_loop().time() - begin < SECONDS_MAX + 2

    async def _send(self, rpc: Rpc, requests: list[bytes], seconds: float) -> None:
        async def stream() -> AsyncIterator[bytes]:
            for request in requests:
                yield request

        call = rpc.call(self.channels[rpc.service])(stream() if rpc.takes_stream else requests[0], timeout=seconds)
        if rpc.gives_stream:
            async for _ in call:
                pass
        else:
            await call


async def test_twenty_thousand_hostile_messages_are_answered_by_name_and_stop_nobody(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with deployed("four servers", tmp_path) as suite, AsyncExitStack() as stack:
        await suite.publish(DATA, "acme/iris@1.0.0")
        await suite.publish(OTHER)
        await suite.put(RECORD)
        plan = (await suite.router.route("wired", ROWS)).plan
        channels = await _channels(suite, plan, stack)
        probe = Probe(channels)
        every = rpcs(plan)
        for rpc in every:  # what the messages are before they are changed
            await probe.send(rpc, [message.SerializeToString() for message in rpc.good])
        sound = dict(probe.codes)
        mutator = Mutator(random.Random(5))
        left = iter(range(MESSAGES))

        async def client() -> None:
            for number in left:
                rpc = every[number % len(every)]
                await probe.send(rpc, mutator.requests(rpc.good))

        async with asyncio.timeout(120):
            await asyncio.gather(*[client() for _ in range(AT_ONCE)])
        record_property("sound", str(sound))
        record_property("codes", str(dict(probe.codes)))
        kinds = Counter(wrong[:3] for wrong in probe.wrong).most_common()
        assert not kinds, (kinds, probe.wrong[0])

        fresh = apr_bytes(linear(5, 6))
        answer = await suite.router.answer(await suite.publish(fresh), ROWS)
        np.testing.assert_allclose(answer.value[:, 0], ROWS @ [5, 6] + 0.5)
        answer = await RouterClient(channels["RouterService"]).answer(digest_of(DATA), ROWS)
        np.testing.assert_allclose(answer.value[:, 0], ROWS @ [1, 2] + 0.5)


async def _channels(suite: Deployment, plan: plan_pb2.Plan, stack: AsyncExitStack) -> dict[str, grpc.aio.Channel]:
    """A socket to each service; the aggregator is one of the test's own, beside the suite's."""
    to_workers = Channels()
    aggregator = Server(AggregatorApp(AggregatorSettings(), to_workers).handlers, Address("127.0.0.1", 0))
    await aggregator.start()
    stack.push_async_callback(to_workers.close)
    stack.push_async_callback(aggregator.drain, 0)

    async def to(address: str) -> grpc.aio.Channel:
        return await stack.enter_async_context(grpc.aio.insecure_channel(address))

    return {
        "RouterService": suite.channel,
        "RegistryService": suite.registry_channel,
        "AggregatorService": await to(str(aggregator.address)),
        "ExpertWorkerService": await to(plan.experts[0].replicas[0].address),
    }
