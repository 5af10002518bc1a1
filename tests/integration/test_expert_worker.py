"""A worker beside a real registry, over the local channel and over sockets; and beside a scripted one that fails."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from asyncio.subprocess import PIPE
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import structlog
from prometheus_client import REGISTRY

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.registry import RegistryClient
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import model as m
from hocket.packages.apr.quantization import dequantized_model, quantized_model
from hocket.packages.trust import TrustedKey
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers, Tokens
from hocket.rpc.server import Address, Server
from hocket.trust_folder import TrustFolder
from hocket.v1 import expert_worker_pb2, registry_pb2
from hocket.v1.expert_worker_pb2_grpc import ExpertWorkerServiceStub
from hocket.v1.tensor_pb2 import Tensor
from services.expert_worker.app import WorkerApp
from services.expert_worker.journal import Journal
from services.expert_worker.loader import Expert
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from tests.apr_oracle import predict
from tests.builders import apr_bytes, chain, floats, grow, linear, mixture, models
from tests.experts import expert_package
from tests.signing import ACME_ID, ACME_SEED, STRANGER_SEED, envelope_of, trusted
from tests.worker_registry import WorkerRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc

ROOT = Path(__file__).parents[2]
SECONDS = 10.0
ROWS = floats([1, 2], [-3, 0.5], [0, 0])
DATA = apr_bytes()
RELEASE = envelope_of(DATA)
MIXTURE = apr_bytes(mixture())
OPEN = Tokens()
NOWHERE = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.expert_worker.authority.POLL_SECONDS", 0.02)
    monkeypatch.setattr("services.expert_worker.app._FAREWELL_SECONDS", 0.1)
    monkeypatch.setattr("hocket.client.registry._PAUSE_SECONDS", 0.001)


@dataclass
class Place:
    """Where services run: how handlers are reached."""

    transport: str
    stack: AsyncExitStack
    channels: Channels
    local: dict[str, Handlers]

    async def serve(self, name: str, handlers: Handlers) -> str:
        """Its address."""
        if self.transport == "local":
            self.local[name] = handlers
            return f"local:{name}"
        server = Server(handlers, Address("127.0.0.1", 0), reflect=False)
        await server.start()
        self.stack.push_async_callback(server.drain, 0)
        return str(server.address)


@asynccontextmanager
async def place_of(transport: str) -> AsyncIterator[Place]:
    local: dict[str, Handlers] = {}
    channels = Channels(local)
    async with AsyncExitStack() as stack:
        yield Place(transport, stack, channels, local)
        await channels.close()


@pytest.fixture(params=["local", "socket"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with place_of(request.param) as place:
        yield place


@pytest.fixture
async def local() -> AsyncIterator[Place]:
    async with place_of("local") as place:
        yield place


@dataclass
class Worker:
    """A running worker, and its client."""

    app: WorkerApp
    client: ExpertWorkerClient
    channel: grpc.aio.Channel

    async def run(self, expert: str, rows: Any = ROWS, seconds: float = SECONDS) -> Any:
        tensor = rows if isinstance(rows, Tensor) else matrix_to_tensor(np.asarray(rows, np.float32))
        return (await self.client.run_tensor(expert, tensor, seconds))[0]

    async def refused(self, expert: str, rows: Any = ROWS, seconds: float = SECONDS) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await self.run(expert, rows, seconds)
        return refusal.value

    async def until_refused(self, expert: str, reason: Reason) -> None:
        await until(lambda: expert not in self.resident)
        assert (await self.refused(expert)).reason is reason

    @property
    def resident(self) -> list[str]:
        return [package.digest for package in self.app.residency.packages]


@asynccontextmanager
async def working(
    place: Place, folder: Path, registry_address: str, tokens: Tokens = OPEN, **settings: Any
) -> AsyncIterator[Worker]:
    chosen = {"device": "cpu", "budget_bytes": 2**20, "compute_threads": 1, "name": "w", **settings}
    app = WorkerApp(
        WorkerSettings(folder / "worker", folder / "trust", registry=registry_address, **chosen),
        place.channels,
        "127.0.0.1:50054" if place.transport == "socket" else "local:worker",
        tokens.worker,
        tokens,
    )
    channel = place.channels.get(await place.serve(f"worker{len(place.local)}", app.handlers))
    await app.start()
    try:
        yield Worker(app, ExpertWorkerClient(channel, token=tokens.admin), channel)
    finally:
        await app.stop()


@asynccontextmanager
async def registry_of(place: Place, folder: Path, tokens: Tokens = OPEN) -> AsyncIterator[tuple[str, Any]]:
    """A real registry that trusts acme, as the worker's folder does: its address and its client."""
    TrustFolder(folder / "trust").add_key(trusted(ACME_SEED))
    app = RegistryApp(RegistrySettings(folder / "registry", folder / "trust", trust_poll_seconds=0.05), tokens)
    await app.start()
    address = await place.serve("registry", app.handlers)
    try:
        yield address, RegistryClient(place.channels.get(address), token=tokens.admin)
    finally:
        await app.stop()


@pytest.fixture
async def world(place: Place, tmp_path: Path) -> AsyncIterator[tuple[Worker, RegistryClient]]:
    async with registry_of(place, tmp_path) as (address, registry), working(place, tmp_path, address) as worker:
        yield worker, registry


@pytest.fixture
async def scripted(local: Place, tmp_path: Path) -> AsyncIterator[tuple[Worker, WorkerRegistry]]:
    registry = WorkerRegistry()
    TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
    async with working(local, tmp_path, await local.serve("registry", registry.handlers)) as worker:
        yield worker, registry


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - it happens in another service
            await asyncio.sleep(0.005)


async def published(registry: RegistryClient, data: bytes = DATA, name: str = "acme/iris@1.0.0") -> str:
    await registry.publish(data, envelope_of(data, name=name))
    return digest_of(data)


def values(response: expert_worker_pb2.RunTensorResponse) -> Any:
    return np.frombuffer(response.output.contents, "<f4").reshape(response.output.shape)


def load_of(serialized: bytes | None) -> expert_worker_pb2.WorkerLoad:
    assert serialized is not None
    return expert_worker_pb2.WorkerLoad.FromString(serialized)


World = tuple[Worker, RegistryClient]
Scripted = tuple[Worker, WorkerRegistry]


class TestAnswers:
    async def test_a_signed_expert_is_fetched_verified_and_answers(self, world: World) -> None:
        worker, registry = world
        digest = await published(registry)
        response, load = await worker.client.run_tensor(digest, matrix_to_tensor(ROWS), SECONDS)
        assert np.array_equal(values(response), predict(linear(), ROWS))
        assert response.output.datatype == "FP32"
        assert load_of(load) == expert_worker_pb2.WorkerLoad(worker="w", in_flight_count=0, resident_bytes=16)
        assert 0 < response.wait.ToTimedelta().total_seconds() < SECONDS
        assert response.compute.ToNanoseconds() > 0

    async def test_every_layout_answers(self, world: World) -> None:
        worker, registry = world
        for place, (layout, model) in enumerate(models().items()):
            digest = await published(registry, apr_bytes(model), f"acme/{layout.lower()}@{place}.0")
            members = model.experts if isinstance(model, m.MixtureOfExperts) else (model,)
            for ordinal, member in enumerate(members):
                given = values(await worker.run(f"{digest}#{ordinal}"))
                assert np.allclose(given, predict(member, ROWS, given.shape[1]), atol=1e-5), layout
        assert worker.app.residency.packages[0].in_use_count == 0

    @pytest.mark.parametrize("layout", ["MixtureOfExperts", "DenseNetwork"])
    async def test_a_quantised_model_answers_as_what_its_blocks_stand_for(self, world: World, layout: str) -> None:
        worker, registry = world
        model = quantized_model(models()[layout], m.QuantKind.Q8_0)
        digest = await published(registry, apr_bytes(model), f"acme/{layout.lower()}-q8@1.0")
        plain = dequantized_model(model)
        for ordinal, member in enumerate(plain.experts if isinstance(plain, m.MixtureOfExperts) else (plain,)):
            given = values(await worker.run(f"{digest}#{ordinal}"))
            assert np.allclose(given, predict(member, ROWS, given.shape[1]), atol=1e-5)

    async def test_many_at_once_get_their_own_answers(self, world: World) -> None:
        worker, registry = world
        digest = await published(registry, MIXTURE)
        rng = np.random.default_rng(0)
        asked = [(place % 2, rng.normal(size=(1 + place % 3, 2)).astype(np.float32)) for place in range(40)]
        answers = await asyncio.gather(*(worker.run(f"{digest}#{ordinal}", rows) for ordinal, rows in asked))
        for (ordinal, rows), response in zip(asked, answers, strict=True):
            assert np.allclose(values(response), predict(mixture().experts[ordinal], rows), atol=1e-5)
        assert len(worker.resident) == 1

    async def test_load_counts_the_others_in_flight(self, scripted: Scripted) -> None:
        worker, registry = scripted
        digest, other = registry.publish(DATA, [RELEASE]), NOWHERE
        await worker.run(digest)
        registry.hold = asyncio.Event()
        waiting = asyncio.create_task(worker.refused(other))
        await until(lambda: other in registry.downloads)
        _, load = await worker.client.run_tensor(digest, matrix_to_tensor(ROWS), SECONDS)
        assert load_of(load).in_flight_count == 1
        registry.hold.set()
        assert (await waiting).reason is Reason.UNKNOWN_PACKAGE

    async def test_genuine_files_signed_by_a_trusted_key_answer_as_recorded(self, place: Place, tmp_path: Path) -> None:
        if not (fixtures := os.environ.get("HOCKET_FIXTURES")):
            pytest.skip("HOCKET_FIXTURES is not set: the genuine files are not here")
        folder = Path(fixtures) / "apr" / "reference-0.11.0"
        manifest = json.loads((folder / "manifest.json").read_text())
        (entry,) = [entry for entry in manifest["files"] if entry["file"] == "linear.plain.signed.apr"]
        data = (folder / entry["file"]).read_bytes()
        key = TrustedKey(bytes.fromhex(manifest["signing_public_key"]), "upstream")
        TrustFolder(tmp_path / "trust").add_key(key)
        async with registry_of(place, tmp_path) as (address, registry), working(place, tmp_path, address) as worker:
            await registry.publish(data)
            given = values(await worker.run(digest_of(data), entry["inputs"]))
            assert np.allclose(given[:, 0], entry["predictions"], atol=1e-5)
            (expert,) = (await worker.client.list_experts()).experts
            assert list(expert.proofs) == [key.key_id]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("expert", "rows", "reason", "field"),
        [
            ("", ROWS, Reason.BAD_REQUEST, None),
            ("acme/iris@1.0.0", ROWS, Reason.BAD_REQUEST, None),
            ("{}#x", ROWS, Reason.BAD_REQUEST, None),
            ("{}#2", ROWS, Reason.UNKNOWN_EXPERT, "expert"),
            ("{}#999999", ROWS, Reason.UNKNOWN_EXPERT, "expert"),
            (NOWHERE, ROWS, Reason.UNKNOWN_PACKAGE, None),
            ("{}", [[1.0]], Reason.BAD_TENSOR, "input.shape"),
            ("{}", [[1.0, 2.0, 3.0]], Reason.BAD_TENSOR, "input.shape"),
            ("{}", [[1.0, np.nan]], Reason.BAD_TENSOR, "input.contents"),
            ("{}", [[1.0, -np.inf]], Reason.BAD_TENSOR, "input.contents"),
            ("{}", np.zeros((0, 2)), Reason.BAD_TENSOR, "input.shape"),
            ("{}", np.zeros((2, 0)), Reason.BAD_TENSOR, "input.shape"),
            ("{}", np.zeros((1025, 2)), Reason.BAD_TENSOR, "input.shape"),
            ("{}", Tensor(), Reason.BAD_TENSOR, "input.datatype"),
            ("{}", Tensor(datatype="FP64", shape=[1, 2], contents=bytes(16)), Reason.BAD_TENSOR, "input.datatype"),
            ("{}", Tensor(datatype="FP32", shape=[2], contents=bytes(8)), Reason.BAD_TENSOR, "input.shape"),
            ("{}", Tensor(datatype="FP32", shape=[1, 2], contents=bytes(7)), Reason.BAD_TENSOR, "input.contents"),
            ("{}", Tensor(datatype="FP32", shape=[-1, -2], contents=bytes(8)), Reason.BAD_TENSOR, "input.shape"),
            ("{}", Tensor(datatype="FP32", shape=[2**62, 4], contents=b""), Reason.BAD_TENSOR, "input.shape"),
        ],
    )
    async def test_a_bad_request_gets_its_reason_and_the_worker_lives(
        self, scripted: Scripted, expert: str, rows: Any, reason: Reason, field: str | None
    ) -> None:
        worker, registry = scripted
        digest = registry.publish(MIXTURE, [envelope_of(MIXTURE)])
        refusal = await worker.refused(expert.format(digest), rows)
        assert (refusal.reason, refusal.field) == (reason, field)
        assert values(await worker.run(digest)).shape == (3, 1)
        assert worker.app.residency.packages[0].in_use_count == 0

    async def test_the_limit_of_rows_itself_is_fine(self, scripted: Scripted) -> None:
        worker, registry = scripted
        digest = registry.publish(DATA, [RELEASE])
        assert values(await worker.run(digest, np.zeros((1024, 2)))).shape == (1024, 1)

    async def test_an_answer_too_large_to_send_is_refused(self, scripted: Scripted) -> None:
        worker, registry = scripted
        clusters = m.KMeans(2**12, np.arange(2**12, dtype=np.float32).reshape(-1, 1))
        data = apr_bytes(clusters)
        digest = registry.publish(data, [envelope_of(data)])
        refusal = await worker.refused(digest, np.zeros((513, 1)))
        assert (refusal.reason, refusal.field) == (Reason.BAD_TENSOR, "input.shape")
        assert "512 rows" in refusal.message
        assert values(await worker.run(digest, np.zeros((512, 1)))).shape == (512, 4096)

    async def test_trees_that_do_not_know_their_width_take_any_they_can_read(self, scripted: Scripted) -> None:
        worker, registry = scripted
        data = apr_bytes(replace(models()["DecisionTreeRegressor"], n_features=None))
        digest = registry.publish(data, [envelope_of(data)])
        refusal = await worker.refused(digest, [[1.0]])
        assert (refusal.reason, refusal.field) == (Reason.BAD_TENSOR, "input.shape")
        assert values(await worker.run(digest, [[1.0, 2.0, 3.0]])).shape == (1, 1)

    async def test_a_package_damaged_in_the_registry_is_data_loss(self, scripted: Scripted) -> None:
        worker, registry = scripted
        digest = registry.publish(DATA, [RELEASE])
        registry.corrupt = True
        assert (await worker.refused(digest)).reason is Reason.BLOB_CORRUPT
        registry.corrupt = False
        await worker.run(digest)


class TestDeadlines:
    async def test_a_load_that_outlasts_the_deadline_says_so_and_goes_on(self, place: Place, tmp_path: Path) -> None:
        registry = WorkerRegistry(hold=asyncio.Event())
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        digest = registry.publish(DATA, [RELEASE])
        async with working(place, tmp_path, await place.serve("registry", registry.handlers)) as worker:
            refusal = await worker.refused(digest, seconds=0.3)
            assert refusal.reason is Reason.EXPERT_LOADING
            assert refusal.retry_after_seconds
            assert registry.hold is not None
            registry.hold.set()
            await worker.run(digest)
            assert registry.downloads == [digest]

    async def test_a_call_without_a_deadline_gets_the_servers(self, local: Place, tmp_path: Path) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        address = await local.serve("registry", registry.handlers)
        async with working(local, tmp_path, address, default_deadline_seconds=0.2) as worker:
            digest = registry.publish(DATA, [RELEASE])
            stub: Any = ExpertWorkerServiceStub(worker.channel)
            request = expert_worker_pb2.RunTensorRequest(expert=digest, input=matrix_to_tensor(ROWS))
            assert values(await stub.RunTensor(request)).shape == (3, 1)
            release = hold_device(worker)
            with pytest.raises(Exception, match="own deadline"):
                await stub.RunTensor(request)
            release.set()

    async def test_a_call_waits_for_room_until_its_own_deadline_not_the_servers(
        self, local: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        other = apr_bytes(linear(7, 7))
        first, second = registry.publish(DATA, [RELEASE]), registry.publish(other, [envelope_of(other)])
        address = await local.serve("registry", registry.handlers)
        async with working(local, tmp_path, address, default_deadline_seconds=0.3, budget_bytes=16) as worker:
            await worker.run(first)
            running = worker.app.residency.get(first)
            assert running is not None
            waiting = asyncio.create_task(worker.run(second, seconds=5.0))
            await asyncio.sleep(1.0)
            worker.app.residency.release(running)
            assert np.array_equal(values(await waiting), predict(linear(7, 7), ROWS))

    async def test_a_call_that_waits_while_the_worker_stops_is_told_so(self, local: Place, tmp_path: Path) -> None:
        registry = WorkerRegistry(hold=asyncio.Event())
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        digest = registry.publish(DATA, [RELEASE])
        async with working(local, tmp_path, await local.serve("registry", registry.handlers)) as worker:
            waiting = asyncio.create_task(worker.refused(digest))
            await until(lambda: registry.downloads)
        assert (await waiting).reason is Reason.DRAINING

    async def test_a_cancelled_call_leaves_the_expert_idle(self, scripted: Scripted) -> None:
        worker, registry = scripted
        digest = registry.publish(DATA, [RELEASE])
        await worker.run(digest)
        release = hold_device(worker)
        calls = [asyncio.create_task(worker.run(digest)) for _ in range(3)]
        await until(lambda: worker.app.residency.packages[0].in_use_count == 3)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert worker.app.residency.packages[0].in_use_count == 3  # the device has not let go of them
        release.set()
        await until(lambda: worker.app.residency.packages[0].in_use_count == 0)

    async def test_computing_stops_within_a_tenth_of_a_second_of_the_end_of_the_call(self, world: World) -> None:
        worker, registry = world
        trees = (chain(1023, 1.0), *(grow((1.0, 1)) for _ in range(255)))
        long = m.RandomForestRegressor(tuple(map(m.DecisionTreeRegressor, trees)), n_estimators=256, n_features=1)
        digest, rows = await published(registry, apr_bytes(long)), np.ones((160, 1))
        begin = executions()
        assert (values(await worker.run(digest, rows)) == 1).all()
        whole = executions() - begin  # of about a quarter of a second

        async def deadline() -> None:
            assert (await worker.refused(digest, rows, seconds=0.05)).reason is Reason.DEADLINE

        async def cancel() -> None:
            call = asyncio.create_task(worker.run(digest, rows))
            await until(lambda: executions() > begin + 1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

        for end in (deadline, cancel):
            begin = executions()
            await end()
            await asyncio.sleep(0.1)
            counted = executions()
            await asyncio.sleep(0.1)
            assert executions() == counted
            assert counted - begin < whole
            assert worker.app.residency.packages[0].in_use_count == 0


def executions() -> float:
    return REGISTRY.get_sample_value("hocket_executions_total") or 0.0


def hold_device(worker: Worker) -> threading.Event:
    """Keep the compute thread busy until the event is set."""
    release = threading.Event()

    class Busy:
        work_per_row = 1

        def __call__(self, rows: Any) -> Any:
            release.wait(SECONDS)
            return rows

    served = worker.app.residency.packages[0].experts[0]
    assert isinstance(served, Expert)
    expert = replace(served, kernel=Busy())
    worker.app._batcher.submit(expert, floats([0, 0]), lambda: None)
    return release


class TestWithdrawal:
    async def test_a_yanked_package_leaves_memory_and_is_refused(self, world: World) -> None:
        worker, registry = world
        digest = await published(registry)
        await worker.run(digest)
        await registry.yank(digest, "wrong data")
        await worker.until_refused(digest, Reason.YANKED)

    async def test_a_revoked_key_takes_its_packages_along(self, world: World) -> None:
        worker, registry = world
        digest = await published(registry)
        await worker.run(digest)
        await registry.revoke_key(ACME_ID, "stolen")
        await worker.until_refused(digest, Reason.KEY_REVOKED)

    async def test_a_key_that_leaves_the_trust_folder_does_too_until_it_comes_back(
        self, world: World, tmp_path: Path
    ) -> None:
        worker, registry = world
        digest = await published(registry)
        await worker.run(digest)
        TrustFolder(tmp_path / "trust").remove_key(ACME_ID)
        await worker.until_refused(digest, Reason.SIGNER_NOT_TRUSTED)
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        await until(lambda: ACME_ID in worker.app._authority.standing.roots.keys)
        await worker.run(digest)

    async def test_a_withdrawn_package_leaves_the_cache_too_at_once_or_at_the_next_start(
        self, local: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        address = await local.serve("registry", registry.handlers)
        other = apr_bytes(linear(7, 7))
        yanked, stays = registry.publish(DATA, [RELEASE]), registry.publish(other, [envelope_of(other)])
        async with working(local, tmp_path, address) as worker:
            await worker.run(yanked)
            await worker.run(stays)
            cache = worker.app._cache
            assert cache.read(yanked) is not None
            registry.yank(yanked)
            await until(lambda: cache.read(yanked) is None)
            await until(lambda: worker.app._revocations.read().digests)
        cache.write(yanked, DATA, [RELEASE])
        async with working(local, tmp_path, address):
            await until(lambda: cache.read(yanked) is None)
        assert cache.read(stays) is not None

    async def test_a_running_request_ends_well_though_its_expert_is_withdrawn(self, scripted: Scripted) -> None:
        worker, registry = scripted
        digest = registry.publish(DATA, [RELEASE])
        await worker.run(digest)
        release = hold_device(worker)
        running = asyncio.create_task(worker.run(digest))
        await until(lambda: worker.app.residency.packages[0].in_use_count == 1)
        registry.yank(digest)
        await worker.until_refused(digest, Reason.YANKED)
        assert worker.app.residency.used_bytes == 16
        release.set()
        assert values(await running).shape == (3, 1)
        await until(lambda: worker.app.residency.used_bytes == 0)

    async def test_what_was_withdrawn_stays_so_after_a_restart_without_a_registry(
        self, local: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        address = await local.serve("registry", registry.handlers)
        other = apr_bytes(linear(7, 7))
        yanked, revoked = registry.publish(DATA, [RELEASE]), registry.publish(other, [envelope_of(other)])
        async with working(local, tmp_path, address) as worker:
            await worker.run(yanked)
            await worker.run(revoked)
            registry.yank(yanked)
            await worker.until_refused(yanked, Reason.YANKED)
            registry.revoke(ACME_ID)
            await worker.until_refused(revoked, Reason.KEY_REVOKED)
            await until(lambda: worker.app._revocations.read() == worker.app._authority.standing.withdrawn)
        registry.refuse(Reason.NOT_READY)
        async with working(local, tmp_path, address) as worker:
            assert (await worker.refused(yanked)).reason is Reason.YANKED
            assert (await worker.refused(revoked)).reason is Reason.KEY_REVOKED

    async def test_a_worker_that_cannot_read_what_was_withdrawn_does_not_start(
        self, local: Place, tmp_path: Path
    ) -> None:
        (tmp_path / "worker").mkdir()
        (tmp_path / "worker" / "revocations.json").write_text("?")
        address = await local.serve("registry", WorkerRegistry().handlers)
        with pytest.raises(HocketError) as refusal:
            async with working(local, tmp_path, address):
                pass
        assert refusal.value.reason is Reason.BAD_TRUST_FILE


class TestWithoutRegistry:
    async def test_what_is_resident_or_cached_serves_on(self, place: Place, tmp_path: Path) -> None:
        other = apr_bytes(linear(7, 7))
        async with registry_of(place, tmp_path) as (address, registry):
            digest, absent = await published(registry), await published(registry, other, "acme/other@1.0.0")
            async with working(place, tmp_path, address) as worker:
                await worker.run(digest)
        nowhere = "127.0.0.1:1"
        async with working(place, tmp_path, nowhere) as worker:
            assert worker.resident == []
            assert np.array_equal(values(await worker.run(digest)), predict(linear(), ROWS))
            assert (await worker.refused(absent)).reason is Reason.UNREACHABLE

    async def test_a_package_to_preload_waits_for_the_registry(
        self, local: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("services.expert_worker.app._PRELOAD_PAUSE_SECONDS", 0.01)
        registry = WorkerRegistry()
        registry.refuse(Reason.NOT_READY)
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        address = await local.serve("registry", registry.handlers)
        digest = digest_of(DATA)
        with structlog.testing.capture_logs() as logs:
            async with working(local, tmp_path, address, preload=(digest, NOWHERE)) as worker:
                await until(lambda: registry.downloads.count(digest) > 3)  # one load tries three times
                registry.publish(DATA, [RELEASE])
                registry.refuse(None)
                await until(lambda: worker.resident == [digest])
                await until(lambda: any(entry["event"] == "not preloaded" for entry in logs))
        (entry,) = [entry for entry in logs if entry["event"] == "not preloaded"]
        assert (entry["digest"], entry["reason"]) == (NOWHERE, Reason.UNKNOWN_PACKAGE)


class TestMemory:
    async def test_a_tight_budget_serves_more_experts_than_fit(self, place: Place, tmp_path: Path) -> None:
        async with (
            registry_of(place, tmp_path) as (address, registry),
            working(place, tmp_path, address, budget_bytes=40) as worker,
        ):
            digests = [await published(registry, apr_bytes(linear(n, n)), f"acme/expert@{n}.0.0") for n in range(1, 6)]
            rng = np.random.default_rng(1)
            order = [int(n) for n in rng.integers(5, size=60)]
            answers = await asyncio.gather(*(worker.run(digests[n]) for n in order))
            for n, response in zip(order, answers, strict=True):
                assert np.array_equal(values(response), predict(linear(n + 1, n + 1), ROWS))
            assert len(worker.resident) == 2
            assert worker.app.residency.used_bytes == 32
            large = await published(registry, apr_bytes(linear(*range(10))), "acme/large@1.0.0")
            refusal = await worker.refused(large, np.zeros((1, 10)))
            assert refusal.reason is Reason.DEVICE_MEMORY


VICTIM = """
import asyncio, sys
from pathlib import Path
from typing import Any
import numpy as np
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.telemetry.logs import configure_logs
from services.expert_worker import app
from services.expert_worker.settings import WorkerSettings

folder, computed, loaded = sys.argv[1:]
configure_logs("error")

async def main() -> None:
    local: dict[str, Any] = {}
    channels = Channels(local)
    settings = WorkerSettings(Path(folder, "worker"), Path(folder, "trust"), registry="127.0.0.1:1", device="cpu")
    worker = app.WorkerApp(settings, channels, "local:worker")
    local["worker"] = worker.handlers
    await worker.start()
    client = ExpertWorkerClient(channels.get("local:worker"))
    rows = matrix_to_tensor(np.ones((1, 2), np.float32))
    await client.run_tensor(computed, rows, 10.0)
    expert = worker.residency.packages[0].experts[0]
    computing, loading = (say(word) for word in ("computing", "loading"))
    object.__setattr__(expert, "kernel", computing)
    app.prepare = loading
    await asyncio.gather(*(client.run_tensor(expert, rows, 10.0) for expert in (computed, loaded)))

def say(word: str) -> Any:
    def hang(*_: Any, **__: Any) -> None:
        print(word, flush=True)
        sys.stdin.read()
    return hang

asyncio.run(main())
"""


class TestQuarantine:
    """A package that was busy when its worker ended three times is refused until the admin has it loaded."""

    async def test_what_a_killed_worker_computed_and_loaded_counts_and_what_it_only_held_does_not(
        self, local: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        files = [apr_bytes(linear(n, n)) for n in (1, 2, 3)]
        computed, loaded, held = (registry.publish(data, [envelope_of(data)]) for data in files)
        address = await local.serve("registry", registry.handlers)
        async with working(local, tmp_path, address) as worker:
            for digest in (computed, loaded, held):
                await worker.run(digest)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", VICTIM, str(tmp_path), computed, loaded, stdin=PIPE, stdout=PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        async with asyncio.timeout(3 * SECONDS):
            assert {await child.stdout.readline() for _ in range(2)} == {b"computing\n", b"loading\n"}
        child.kill()
        await child.wait()
        with structlog.testing.capture_logs() as logs:
            async with working(local, tmp_path, address) as worker:
                for digest in (computed, loaded, held):
                    await worker.run(digest)
        busy = [(entry["digest"], entry["crashes"]) for entry in logs if entry["event"] == "busy when the worker ended"]
        assert sorted(busy) == sorted([(computed, 1), (loaded, 1)])
        with structlog.testing.capture_logs() as logs:
            async with working(local, tmp_path, address):
                pass
        assert not [entry for entry in logs if entry["event"] == "busy when the worker ended"]  # a clean end

    async def test_it_is_refused_to_requests_and_preloading_until_the_admin_lifts_it(
        self, place: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        digest, other = registry.publish(DATA, [RELEASE]), registry.publish(MIXTURE, [envelope_of(MIXTURE)])
        address = await place.serve("registry", registry.handlers)
        ended_while_loading(tmp_path / "worker" / "journal", digest, times=3)
        with structlog.testing.capture_logs() as logs:
            async with working(place, tmp_path, address, preload=(digest,)) as worker:
                for _ in range(2):
                    refusal = await worker.refused(digest)
                    assert (refusal.reason, refusal.metadata["digest"]) == (Reason.QUARANTINED, digest)
                assert registry.downloads == []
                await worker.run(other)
                await until(lambda: any(entry["event"] == "not preloaded" for entry in logs))
                assert [step async for step in worker.client.load(digest)]
                await worker.run(digest)
        async with working(place, tmp_path, address) as worker:
            await worker.run(digest)
        said = [entry["event"] for entry in logs if entry.get("digest") == digest]
        assert said[:2] == ["busy when the worker ended", "quarantined: the admin's LoadExpert tries it again"]
        assert "quarantine lifted" in said

    async def test_two_such_ends_are_no_quarantine(self, local: Place, tmp_path: Path) -> None:
        registry = WorkerRegistry()
        TrustFolder(tmp_path / "trust").add_key(trusted(ACME_SEED))
        digest = registry.publish(DATA, [RELEASE])
        ended_while_loading(tmp_path / "worker" / "journal", digest, times=2)
        async with working(local, tmp_path, await local.serve("registry", registry.handlers)) as worker:
            await worker.run(digest)

    async def test_two_workers_do_not_share_a_data_folder(self, local: Place, tmp_path: Path) -> None:
        address = await local.serve("registry", WorkerRegistry().handlers)
        async with working(local, tmp_path, address):
            with pytest.raises(HocketError, match=r"worker\.data_dir") as refusal:
                async with working(local, tmp_path, address):
                    pass
            assert refusal.value.reason is Reason.BAD_REQUEST
        async with working(local, tmp_path, address):
            pass


def ended_while_loading(path: Path, digest: str, times: int) -> None:
    """Leave a journal as a killed worker would, `times` over."""
    for _ in range(times):
        journal = Journal(path)
        journal.open()
        with journal.loading(digest):
            left = path.read_bytes()
        journal.close()
        path.write_bytes(left)


class TestAdministration:
    TOKENS = Tokens(admin="the admin's", worker="the worker's")

    async def test_loading_and_unloading_and_listing(self, world: World) -> None:
        worker, registry = world
        digest = await published(registry)
        steps = [step async for step in worker.client.load(digest)]
        assert (steps[-1].state, steps[-1].done_bytes, steps[-1].total_bytes) == (
            expert_worker_pb2.LOAD_STATE_READY,
            16,
            16,
        )
        listed = await worker.client.list_experts()
        (expert,) = listed.experts
        assert (listed.worker, listed.device, listed.resident_bytes, listed.budget_bytes) == ("w", "cpu", 16, 2**20)
        assert (expert.digest, expert.tier, expert.size_bytes) == (digest, expert_worker_pb2.TIER_HOST, 16)
        assert expert.state == expert_worker_pb2.EXPERT_STATE_RESIDENT
        assert (list(expert.proofs), expert.unsigned_by_policy) == (["acme/iris@1.0.0"], False)
        assert expert.last_use_time.seconds > 0
        assert await worker.client.unload(digest) == 0
        assert not (await worker.client.list_experts()).experts
        with pytest.raises(HocketError) as refusal:
            await worker.client.unload(digest)
        assert refusal.value.reason is Reason.UNKNOWN_EXPERT
        await worker.run(digest)

    async def test_leaving_the_stream_of_a_load_does_not_stop_it(self, scripted: Scripted) -> None:
        worker, registry = scripted
        registry.hold = asyncio.Event()
        digest = registry.publish(DATA, [RELEASE])
        stream = worker.client.load(digest)
        assert (await anext(stream)).state == expert_worker_pb2.LOAD_STATE_FETCHING
        await stream.aclose()
        registry.hold.set()
        await until(lambda: worker.resident == [digest])

    async def test_an_adapter_expert_is_neither_loaded_nor_run(self, world: World) -> None:
        worker, registry = world
        data = expert_package("expert-sql", "1.0.0")
        await registry.publish(data, envelope_of(data, name="acme/expert-sql@1.0.0", format="expert"))
        with pytest.raises(HocketError, match="answers text") as refusal:
            _ = [step async for step in worker.client.load(digest_of(data))]
        assert refusal.value.reason is Reason.NOT_SERVABLE
        assert (await worker.refused(digest_of(data))).reason is Reason.NOT_SERVABLE
        assert worker.resident == []
        assert worker.app.residency.used_bytes == 0

    async def test_what_is_no_digest_is_refused(self, world: World) -> None:
        worker, _ = world
        for call in (anext(worker.client.load("acme/iris@1.0.0")), worker.client.unload("")):
            with pytest.raises(HocketError) as refusal:
                await call
            assert (refusal.value.reason, refusal.value.field) == (Reason.BAD_REQUEST, "digest")

    async def test_changing_what_is_in_memory_needs_the_admin_token(self, place: Place, tmp_path: Path) -> None:
        async with (
            registry_of(place, tmp_path, self.TOKENS) as (address, registry),
            working(place, tmp_path, address, self.TOKENS) as worker,
        ):
            digest = await published(registry)
            for token, reason in (
                (None, Reason.TOKEN_REQUIRED),
                ("guess", Reason.TOKEN_REQUIRED),
                (self.TOKENS.worker, Reason.TOKEN_NOT_ALLOWED),
            ):
                client = ExpertWorkerClient(worker.channel, token=token)
                for call in (anext(client.load(digest)), client.unload(digest)):
                    with pytest.raises(HocketError) as refusal:
                        await call
                    assert refusal.value.reason is reason
                await client.list_experts()
                await client.run_tensor(digest, matrix_to_tensor(ROWS), SECONDS)
            assert await worker.client.unload(digest) == 0


class TestPolicy:
    async def test_unsigned_experts_run_only_by_policy_and_are_counted_listed_and_logged(
        self, local: Place, tmp_path: Path
    ) -> None:
        registry = WorkerRegistry()
        digest = registry.publish(DATA, [envelope_of(DATA, STRANGER_SEED)])
        address = await local.serve("registry", registry.handlers)
        async with working(local, tmp_path, address) as worker:
            assert (await worker.refused(digest)).reason is Reason.SIGNER_NOT_TRUSTED
        with structlog.testing.capture_logs() as logs:
            async with working(local, tmp_path, address, allow_unsigned=True) as worker:
                before = uses()
                await worker.run(digest)
                await worker.run(digest)
                (expert,) = (await worker.client.list_experts()).experts
                assert uses() == before + 2
        assert (expert.unsigned_by_policy, list(expert.proofs)) == (True, [])
        assert any("allow_unsigned" in entry["event"] and entry["log_level"] == "warning" for entry in logs)


def uses() -> float:
    return REGISTRY.get_sample_value("hocket_unsigned_uses_total", {"service": "expert_worker"}) or 0.0


class TestLease:
    async def test_the_registry_knows_where_the_worker_is_and_what_it_holds(self, place: Place, tmp_path: Path) -> None:
        async with registry_of(place, tmp_path, TestAdministration.TOKENS) as (address, registry):
            seen: list[registry_pb2.WorkerState] = []

            async def watch() -> None:
                async for event in registry.watch():
                    if event.WhichOneof("event") == "worker":
                        seen.append(event.worker)  # noqa: PERF401 - the feed does not end

            watching = asyncio.create_task(watch())
            async with working(place, tmp_path, address, TestAdministration.TOKENS, name="") as worker:
                await until(lambda: seen)
                digest = await published(registry)
                await worker.run(digest)
                await until(lambda: seen[-1].residency)
            await until(lambda: seen[-1].draining)
            watching.cancel()
        first, last = seen[0], seen[-1]
        here = "local:worker" if place.transport == "local" else "127.0.0.1:50054"
        assert first.worker == here.replace(":", "-").replace(".", "-")
        assert (first.address, first.device, list(first.formats)) == (here, "cpu", ["apr"])
        assert (first.budget_bytes, len(first.residency), first.draining) == (2**20, 0, False)
        assert [(held.digest, held.tier) for held in last.residency] == [(digest, expert_worker_pb2.TIER_HOST)]
        gauge = REGISTRY.get_sample_value("hocket_resident_bytes", {"device": "cpu"})
        assert gauge == 16

    async def test_a_worker_that_was_never_started_stops_without_ado(self, local: Place, tmp_path: Path) -> None:
        address = await local.serve("registry", WorkerRegistry().handlers)
        settings = WorkerSettings(tmp_path, tmp_path, registry=address, device="cpu")
        await WorkerApp(settings, local.channels, "local:worker").stop()
