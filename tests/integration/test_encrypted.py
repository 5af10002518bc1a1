"""Encrypted, signed packages through the whole suite: who has the credential serves them, who has not says so."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import structlog
from nacl.pwhash import argon2id

from examples.running import free_ports
from hocket.client import connect, connect_registry
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.registry import RegistryClient
from hocket.client.router import RouterClient
from hocket.errors import HocketError, Reason, Situation
from hocket.identity import ExpertId, digest_of
from hocket.keyring import create_recipient_key
from hocket.mixtures import MixtureRecord, SoftmaxGate, gate_tensor
from hocket.packages import Password, apr
from hocket.packages.apr import encryption
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Tokens
from hocket.rpc.server import Address, Server
from hocket.trust_folder import TrustFolder
from services.aggregator.app import AggregatorApp
from services.expert_worker.app import WorkerApp
from services.expert_worker.credentials import CredentialFile
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.router.app import RouterApp
from services.router.settings import RouterSettings
from services.suite.__main__ import main
from tests.apr_oracle import predict
from tests.builders import floats, forest, linear, logistic, mixture, raw_apr, signer
from tests.deployments import Deployment, deployed, settings_in
from tests.signing import ACME_SEED, envelope_of, trusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

ROWS = floats([1, 2], [-3, 0.5], [0, 0], [10, -10])
SECRET = "correct horse battery staple"
ACME = signer(ACME_SEED)


@pytest.fixture(params=["one process", "four servers"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """A program that runs in this process sets up its logs for this test alone."""
    yield
    structlog.reset_defaults()


def password_file(folder: Path, text: str = SECRET) -> CredentialFile:
    path = folder / f"password-{len([*folder.glob('password-*')])}"
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return CredentialFile(password_file=path)


def encrypted(model: Any, to: Any, **options: Any) -> bytes:
    return apr.write(model, encryption=to, **{"signing": ACME, "created_at": "0", **options})


async def refusal(call: Awaitable[Any]) -> HocketError:
    with pytest.raises(HocketError) as caught:
        await call
    return caught.value


async def test_an_encrypted_package_is_published_loaded_and_predicted(kind: str, tmp_path: Path) -> None:
    key = create_recipient_key(tmp_path / "keys" / "worker.x25519")
    trees = forest(n_features=2)
    files = {
        "acme/secret": password_file(tmp_path),
        "acme/trees": CredentialFile(key_file=tmp_path / "keys" / "worker.x25519"),
    }
    with structlog.testing.capture_logs() as logs:
        async with deployed(kind, tmp_path, worker={"credentials": files}) as suite:
            digest = await suite.publish(encrypted(linear(2, -1), Password(SECRET)), "acme/secret@1")
            answer = await suite.router.answer("acme/secret@1", ROWS)
            np.testing.assert_allclose(answer.value, predict(linear(2, -1), ROWS))
            assert answer.contributions[0].expert == digest

            data = encrypted(trees, key, labels=["a", "b", "c"])
            await suite.publish(data, "acme/trees@1")
            answer = await suite.router.answer("acme/trees@1", ROWS)
            np.testing.assert_array_equal(answer.value, predict(trees, ROWS, 3))
            assert answer.labels == ("a", "b", "c")

            package = (await suite.registry.get_package(digest)).model
            assert (package.encrypted, package.layout, package.feature_count) == (True, "LinearRegression", 2)
            assert (package.parameter_bytes, len(package.columns)) == (16, 1)
    told = repr(logs)
    assert SECRET not in told
    assert "horse" not in told


async def test_clear_and_encrypted_experts_mix(kind: str, tmp_path: Path) -> None:
    """The gate and the labels of a mixture are the registry's: it has read only what the package declares."""
    async with deployed(kind, tmp_path, worker={"credentials": {"acme/closed": password_file(tmp_path)}}) as suite:
        clear = apr.write(logistic(1, 1), labels=["no", "yes"], created_at="0")
        closed = encrypted(logistic(-1, 3), Password(SECRET), labels=["no", "perhaps"])
        await suite.publish(clear, "acme/clear@1")
        await suite.publish(closed, "acme/closed@1")
        weights = floats([1, -1], [0, 0])
        gate = SoftmaxGate(2, 2, digest_of(gate_tensor(weights)))
        members = (ExpertId(digest_of(clear)), ExpertId(digest_of(closed)))
        await suite.put(MixtureRecord("both", members, gate, 2), gate_tensor(weights))

        answer = await suite.router.answer("both", ROWS)

        assert answer.labels == ("no", "yes", "perhaps")
        assert not answer.finish.degradations
        logits = ROWS @ weights
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        first, second = predict(logistic(1, 1), ROWS, 2), predict(logistic(-1, 3), ROWS, 2)
        expected = np.zeros((4, 3))
        expected[:, [0, 1]] += share[:, :1] * first
        expected[:, [0, 2]] += share[:, 1:] * second
        np.testing.assert_allclose(answer.value, expected, atol=1e-6)


async def test_the_experts_of_an_encrypted_mixture_serve_behind_another_gate(tmp_path: Path) -> None:
    model, weights = mixture(top_k=1), floats([1, -1], [0.5, 0.25])
    data = encrypted(model, Password(SECRET))
    digest = digest_of(data)
    async with deployed("one process", tmp_path, worker={"credentials": {digest: password_file(tmp_path)}}) as suite:
        await suite.registry.publish(data, envelope_of(data, name="acme/moe@1"))
        await suite.known(f"{digest}#1")
        for address in (digest, "acme/moe@1"):
            error = await refusal(suite.router.answer(address, ROWS))
            assert error.reason is Reason.ENCRYPTED
            assert f"{digest}#0" in error.message
        answer = await suite.router.answer(f"{digest}#1", ROWS)
        np.testing.assert_allclose(answer.value, predict(model.experts[1], ROWS))
        tensor = gate_tensor(weights)
        gate = SoftmaxGate(2, 2, digest_of(tensor), model.gate.temperature)
        await suite.put(MixtureRecord("moe", (ExpertId(digest, 0), ExpertId(digest, 1)), gate, 1), tensor)
        np.testing.assert_allclose((await suite.router.answer("moe", ROWS)).value, predict(model, ROWS), rtol=1e-6)


async def test_without_a_credential_the_reason_is_told_and_others_serve(kind: str, tmp_path: Path) -> None:
    async with deployed(kind, tmp_path) as suite:
        await suite.publish(encrypted(linear(), Password(SECRET)), "acme/secret@1")
        await suite.publish(apr.write(linear(), created_at="0"), "acme/open@1")

        assert (await refusal(suite.router.answer("acme/secret@1", ROWS))).reason is Reason.ENCRYPTED
        np.testing.assert_allclose((await suite.router.answer("acme/open@1", ROWS)).value, predict(linear(), ROWS))


@pytest.mark.parametrize("reason", [Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT])
async def test_a_wrong_credential_has_a_reason_of_its_own(tmp_path: Path, reason: Reason) -> None:
    key = create_recipient_key(tmp_path / "other.key")
    wrong = CredentialFile(key_file=tmp_path / "other.key")
    if reason is Reason.DECRYPTION_FAILED:
        wrong = password_file(tmp_path, "something else")
    async with deployed("one process", tmp_path, worker={"credentials": {"acme/secret": wrong}}) as suite:
        await suite.publish(encrypted(linear(), Password(SECRET)), "acme/secret@1")
        error = await refusal(suite.router.answer("acme/secret@1", ROWS))
    assert error.reason is reason
    assert "something else" not in error.message
    assert key.public_key.hex() not in error.message


async def test_a_package_that_is_not_what_it_declares_is_refused_by_the_worker(tmp_path: Path) -> None:
    honest = apr.split(encrypted(linear(), Password(SECRET), signing=None))
    metadata = dict(apr.describe(honest, "").metadata)
    metadata["custom"] = {"hocket": {**metadata["custom"]["hocket"], "n_features": 3, "n_features_min": 3}}
    header = honest.header
    liar = raw_apr(
        bytes(honest.payload),
        metadata,
        uncompressed_bytes=header.uncompressed_bytes,
        compression_id=header.compression_id,
        flags=header.flags,
    )
    held = {"credentials": {"acme/liar": password_file(tmp_path)}}
    async with deployed("one process", tmp_path, worker=held) as suite:
        await suite.publish(liar, "acme/liar@1")
        error = await refusal(suite.router.answer("acme/liar@1", floats([1, 2, 3])))
    assert error.reason is Reason.BAD_METADATA


async def test_a_package_that_declares_nothing_is_not_taken(tmp_path: Path) -> None:
    clear = apr.split(apr.write(linear(), created_at="0", compression="none"))
    data = raw_apr(
        encryption.seal(bytes(clear.payload), Password(SECRET)),
        uncompressed_bytes=clear.header.uncompressed_bytes,
        flags=1,
    )
    async with deployed("one process", tmp_path) as suite:
        error = await refusal(suite.registry.publish(data, envelope_of(data)))
    assert error.reason is Reason.ENCRYPTED
    assert "hocket apr encrypt" in error.message


async def test_keys_are_derived_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    derive = argon2id.kdf

    def noted(*arguments: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread())
        return bytes(derive(*arguments, **options))

    held = {"credentials": {"acme/secret": password_file(tmp_path)}}
    async with deployed("one process", tmp_path, worker=held) as suite:
        data = encrypted(linear(), Password(SECRET))
        monkeypatch.setattr(encryption, "argon2id", type("Noted", (), {"kdf": staticmethod(noted)}))
        await suite.publish(data, "acme/secret@1")
        assert not threads  # the registry derives none
        for _ in range(3):
            await suite.router.answer("acme/secret@1", ROWS)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@asynccontextmanager
async def several_workers(folder: Path, *credentials: dict[str, CredentialFile]) -> AsyncIterator[Any]:
    """A suite of sockets with a worker for each of these, and a client of each worker."""
    settings = settings_in(folder)
    channels = Channels()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(channels.close)

        async def serve(app: Any, port: int = 0) -> str:
            await app.start()
            server = Server(app.handlers, Address("127.0.0.1", port))
            await server.start()

            async def stop() -> None:
                await server.drain(1.0)
                await app.stop()

            stack.push_async_callback(stop)
            return str(server.address)

        registry = await serve(RegistryApp(settings.registry, Tokens()))
        workers = []
        for number, held in enumerate(credentials):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            common = {name: getattr(settings.worker, name) for name in settings.worker.__slots__}
            chosen = {"registry": registry, "credentials": held, "name": f"w{number}", "data_dir": folder / str(number)}
            app = WorkerApp(WorkerSettings(**{**common, **chosen}), channels, f"127.0.0.1:{port}")
            workers.append(ExpertWorkerClient(channels.get(await serve(app, port))))
        aggregator = await serve(AggregatorApp(settings.aggregator, channels))
        common = {name: getattr(settings.router, name) for name in settings.router.__slots__}
        asking = RouterApp(RouterSettings(**{**common, "registry": registry, "aggregators": (aggregator,)}), channels)
        address = await serve(asking)
        async with asyncio.timeout(10):
            await asking.directory.wait_for_worker()
            while len(asking.directory.snapshot.workers) < len(workers):  # noqa: ASYNC110 - they announce themselves
                await asyncio.sleep(0.01)
        router, to_registry = RouterClient(channels.get(address)), RegistryClient(channels.get(registry))
        suite = Deployment(router, to_registry, channels.get(address), channels.get(registry), None)  # type: ignore[arg-type]  # its trust folder is not changed
        yield suite, workers


async def test_the_one_worker_of_five_that_has_the_credential_is_asked(tmp_path: Path) -> None:
    """A plan lists three replicas: one that only tried would often not find it."""
    TrustFolder(tmp_path / "trust").add_key(trusted())
    held = {"acme/secret": password_file(tmp_path)}
    async with several_workers(tmp_path, {}, {}, {}, {}, held) as (suite, workers):
        digest = await suite.publish(encrypted(linear(), Password(SECRET)), "acme/secret@1")
        for _ in range(5):
            answer = await suite.router.answer("acme/secret@1", ROWS)
            np.testing.assert_allclose(answer.value, predict(linear(), ROWS))
            assert answer.contributions[0].worker == "w4"
            assert answer.contributions[0].attempt_count == 1
        for worker in workers[:4]:
            error = await refusal(worker.run_tensor(digest, matrix_to_tensor(ROWS), 5.0))
            assert error.reason is Reason.ENCRYPTED
            assert "[worker.credentials]" in error.message


async def test_a_worker_with_a_wrong_credential_is_followed_by_one_with_the_right_one(tmp_path: Path) -> None:
    TrustFolder(tmp_path / "trust").add_key(trusted())
    wrong, right = password_file(tmp_path, "not this one"), password_file(tmp_path)
    async with several_workers(tmp_path, {"acme/secret": wrong}, {"acme/secret": right}) as (suite, _):
        await suite.publish(encrypted(linear(), Password(SECRET)), "acme/secret@1")
        for _ in range(4):
            answer = await suite.router.answer("acme/secret@1", ROWS)
            np.testing.assert_allclose(answer.value, predict(linear(), ROWS))
            assert answer.contributions[0].worker == "w1"


def test_a_secret_that_others_may_read_stops_the_start_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = password_file(tmp_path).password_file
    assert path is not None
    path.chmod(0o644)
    config = tmp_path / "hocket.toml"
    config.write_text(f'[worker.credentials]\n"acme/secret" = {{password_file = "{path}"}}\n')
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    with pytest.raises(SystemExit) as ended:
        main(["--log-level", "error", "--config", str(config), "--set", "router.port=0", "--set", "registry.port=0"])

    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"chmod 600 {path}" in told
    assert "horse" not in told


@pytest.mark.long
async def test_processes_take_credentials_from_the_settings_file_and_show_them_nowhere(tmp_path: Path) -> None:
    trust = TrustFolder(tmp_path / "trust")
    trust.add_key(trusted())
    path = password_file(tmp_path).password_file
    ports = dict(zip(("router", "registry", "aggregator", "worker"), free_ports(4, spare=2), strict=True))
    tables = {name: [f"port = {port}"] for name, port in ports.items()}
    for name in ("router", "registry", "worker"):
        tables[name].append(f'data_dir = "{tmp_path / name}"')
    for name in ("registry", "worker"):
        tables[name].append(f'trust_dir = "{trust.path}"')
    tables["worker.credentials"] = [f'"acme/secret" = {{password_file = "{path}"}}']
    config = tmp_path / "hocket.toml"
    config.write_text("\n".join(line for name, lines in tables.items() for line in (f"[{name}]", *lines)))
    log = tmp_path / "suite.log"
    command = [sys.executable, "-m", "services.suite", "--split", "--workers", "2", "--config", str(config)]
    with log.open("wb") as output:
        suite = await asyncio.create_subprocess_exec(*command, "--log-level", "debug", stdout=output, stderr=output)
    try:
        data = encrypted(linear(), Password(SECRET))
        async with connect_registry(f"127.0.0.1:{ports['registry']}") as registry:
            await until(lambda: registry.publish(data, envelope_of(data, name="acme/secret@1")))
        async with connect(f"127.0.0.1:{ports['router']}") as router:
            answer = await until(lambda: router.answer("acme/secret@1", ROWS))
        np.testing.assert_allclose(answer.value, predict(linear(), ROWS))
        family = [psutil.Process(suite.pid), *psutil.Process(suite.pid).children(recursive=True)]
        shown = [" ".join([*process.cmdline(), *process.environ().values()]) for process in family]
        assert len(shown) == 6
        assert not any("horse" in text for text in shown)
    finally:
        suite.terminate()
        await suite.wait()
    told = log.read_text()
    assert "expert loaded" in told
    assert "horse" not in told


async def until(call: Callable[[], Awaitable[Any]]) -> Any:
    """What a call answers once everything has started."""
    async with asyncio.timeout(240):
        while True:
            try:
                return await call()
            except HocketError as error:
                assert error.situation in {Situation.UNAVAILABLE, Situation.UNKNOWN, Situation.TIMED_OUT}, error  # noqa: PT017 - starting
                await asyncio.sleep(0.2)
