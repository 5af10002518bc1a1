"""TLS over real sockets: who is let in, and certificates that change while calls run."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from structlog.testing import capture_logs

from hocket.client import RouterClient, connect, connect_health, connect_registry
from hocket.client.calls import TLS_DETAILS
from hocket.client.health import Health
from hocket.errors import HocketError, Reason
from hocket.rpc.channel import Channels, client_channel
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import PROBE_PORT_OFFSET, Address, Server
from hocket.rpc.tls import Tls, TlsSettings
from hocket.v1.router_pb2_grpc import RouterServiceServicer, add_RouterServiceServicer_to_server
from tests import certificates
from tests.fakes import ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = "hocket.v1.RouterService"
MUTUAL = ("router",)


class Router(ScriptedRouter):
    """Notes which connection a call comes over, and whose certificate it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[str] = []
        self.names: list[str] = []
        self.entered = asyncio.Event()
        self.going_on = asyncio.Event()

    async def GetMixture(self, request: Any, context: Any) -> Any:
        self.peers.append(context.peer())
        self.names += [name.decode() for name in context.auth_context().get("x509_common_name", ())]
        return await super().GetMixture(request, context)

    async def Route(self, request: Any, context: Any) -> Any:
        self.peers.append(context.peer())
        self.entered.set()
        await self.going_on.wait()
        return await super().Route(request, context)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of authorities: `ours`, with a certificate that is for no address of ours, and `theirs`."""
    folder = tmp_path_factory.mktemp("authorities")
    certificates.make(folder / "ours", "router", "worker")
    certificates.make(folder / "theirs", "router")
    return folder


@pytest.fixture
def ours(authorities: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(authorities / "ours", tmp_path / "ours"))


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that have changed are noticed at the next connection, and not within a second."""
    monkeypatch.setattr("hocket.rpc.tls._LOOK_SECONDS", 0.0)


@asynccontextmanager
async def serving(
    tls: Tls | None, servicer: RouterServiceServicer | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    handlers = Handlers()
    add_RouterServiceServicer_to_server(servicer or Router(), handlers)  # type: ignore[arg-type]  # Handlers stands in for a server
    credentials = None if tls is None else tls.server_credentials("router")
    server = Server(handlers, Address(host, 0), credentials=credentials)
    await server.start()
    server.set_ready()
    try:
        yield server
    finally:
        await server.drain(0)


async def ask(server: Server | str, **files: Any) -> None:
    async with connect(str(getattr(server, "address", server)), **files) as router:
        await router.get_mixture("digits")


async def refused(server: Server | str, **files: Any) -> str:
    with pytest.raises(HocketError) as caught:
        await ask(server, **files)
    assert caught.value.reason is Reason.UNREACHABLE
    assert caught.value.metadata[TLS_DETAILS]
    return caught.value.message


async def test_every_door_takes_the_authority_of_the_server(ours: Path) -> None:
    files = certificates.files(ours, None)
    async with serving(certificates.tls(ours)) as server:
        await ask(server, **files)
        await ask(server, **{name: str(path) for name, path in files.items()})
        async with connect_health(str(server.address), **files) as health:
            assert await health.check(SERVICE) is Health.SERVING
        async with connect_registry(str(server.address), **files) as registry:
            with pytest.raises(HocketError, match="Method not found"):
                await registry.get_package("acme/low@1")


async def test_a_client_that_speaks_no_tls_is_told_to(ours: Path) -> None:
    async with serving(certificates.tls(ours)) as server:
        assert "if it speaks TLS, name its authority in ca_file" in await refused(server)
        await ask(server, **certificates.files(ours, None))


async def test_a_client_that_speaks_tls_to_a_server_without_is_told_so(ours: Path) -> None:
    async with serving(None) as server:
        assert "speaks no TLS" in await refused(server, **certificates.files(ours, None))
        await ask(server)


async def test_a_server_of_another_authority_is_not_believed(ours: Path, authorities: Path) -> None:
    async with serving(certificates.tls(ours)) as server:
        message = await refused(server, **certificates.files(authorities / "theirs", None))
        assert "does not come from an authority that is trusted here" in message
        await ask(server, **certificates.files(ours, None))


async def test_a_server_under_another_name_is_not_believed(ours: Path) -> None:
    tls, files = certificates.tls(ours), certificates.files(ours, None)
    async with serving(tls, host="127.0.0.2") as other, serving(tls) as server:
        assert "is not for 127.0.0.2" in await refused(other, **files)
        await ask(server, **files)
        await ask(f"localhost:{server.address.port}", **files)


async def test_servers_may_have_a_name_in_common_instead_of_addresses(ours: Path) -> None:
    settings = TlsSettings(**certificates.files(ours, None), server_name="router")
    async with (
        serving(certificates.tls(ours), host="127.0.0.2") as server,
        serving(certificates.tls(ours, "worker")) as other,
        client_channel(str(server.address), Tls(settings)) as channel,
        client_channel(str(other.address), Tls(settings)) as to_other,
    ):
        await RouterClient(channel).get_mixture("digits")
        with pytest.raises(HocketError, match="is not for router"):
            await RouterClient(to_other).get_mixture("digits")


async def test_a_certificate_that_has_expired_is_said_to_have(ours: Path) -> None:
    certificates.make(ours, "router", days=-1)
    async with serving(certificates.tls(ours)) as server:
        assert "has expired: renew it" in await refused(server, **certificates.files(ours, None))


async def test_callers_of_a_mutual_service_show_a_certificate_of_its_authority(ours: Path, authorities: Path) -> None:
    router = Router()
    async with serving(certificates.tls(ours, mutual=MUTUAL), router) as server:
        assert "if it asks for certificates, show one" in await refused(server, **certificates.files(ours, None))
        foreign = certificates.files(authorities / "theirs", ca=ours)
        assert "if it asks for certificates, show one" in await refused(server, **foreign)
        assert router.peers == []
        await ask(server, **certificates.files(ours, "worker"))
        assert router.names == ["worker"]


async def test_who_need_not_show_a_certificate_may(ours: Path) -> None:
    async with serving(certificates.tls(ours, mutual=("worker",))) as server:
        await ask(server, **certificates.files(ours, None))
        await ask(server, **certificates.files(ours, "worker"))


@pytest.mark.usefixtures("looks_at_once")
async def test_a_server_takes_up_a_new_certificate_while_calls_run(ours: Path, authorities: Path) -> None:
    theirs = authorities / "theirs"
    router = Router()
    before, after = certificates.files(authorities / "ours", None), certificates.files(theirs, None)
    async with (
        serving(certificates.tls(ours), router) as server,
        connect(str(server.address), **before) as client,
    ):
        running = asyncio.create_task(client.route("digits", [1, 2]))
        await router.entered.wait()
        await refused(server, **after)

        certificates.replace(ours, theirs, "router.pem", "router.key")

        await ask(server, **after)
        await refused(server, **before)
        await client.get_mixture("digits")  # over the connection that it has
        router.going_on.set()
        assert (await running).rows


@pytest.mark.usefixtures("looks_at_once")
async def test_a_server_keeps_its_certificate_when_the_new_one_is_broken(ours: Path, authorities: Path) -> None:
    files = certificates.files(authorities / "ours", None)
    async with serving(certificates.tls(ours)) as server:
        await ask(server, **files)
        with capture_logs() as logs:
            (ours / "router.pem").write_text("no certificate")
            await ask(server, **files)
        assert "certificates not replaced: the ones before stay in use" in [log["event"] for log in logs]


@pytest.mark.usefixtures("looks_at_once")
async def test_a_server_takes_up_a_new_authority_for_its_callers(ours: Path, authorities: Path) -> None:
    theirs = authorities / "theirs"
    async with serving(certificates.tls(ours, mutual=MUTUAL)) as server:
        files = certificates.files(theirs, ca=authorities / "ours")
        await refused(server, **files)
        both = (ours / "ca.pem").read_bytes() + (theirs / "ca.pem").read_bytes()
        (ours / "ca.pem").write_bytes(both)
        await ask(server, **files)


@pytest.mark.usefixtures("looks_at_once")
async def test_a_client_takes_up_a_new_certificate_while_calls_run(
    ours: Path, authorities: Path, tmp_path: Path
) -> None:
    renewed = certificates.make(Path(shutil.copytree(ours, tmp_path / "renewed")), "router")
    router = Router()
    async with serving(certificates.tls(authorities / "ours", mutual=MUTUAL), router) as server:
        channels = Channels(tls=certificates.tls(ours))
        channel = channels.get(str(server.address))
        client = RouterClient(channel)
        await client.get_mixture("digits")
        running = asyncio.create_task(client.route("digits", [1, 2]))
        await router.entered.wait()
        await client.get_mixture("digits")
        assert len(set(router.peers)) == 1

        certificates.replace(ours, renewed, "router.pem", "router.key")

        await client.get_mixture("digits")
        await client.get_mixture("digits")
        assert len(set(router.peers)) == 2, "one connection for what ran, and one for what came later"
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        [older] = channel._older  # type: ignore[attr-defined]  # a TlsChannel
        router.going_on.set()
        assert (await running).rows
        await asyncio.gather(*channel._closing)  # type: ignore[attr-defined]  # the same
        assert older.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
        await channels.close()


@pytest.mark.usefixtures("looks_at_once")
async def test_a_client_that_was_refused_is_let_in_with_its_new_certificate(ours: Path, authorities: Path) -> None:
    theirs = Path(shutil.copytree(authorities / "theirs", ours.parent / "theirs"))
    async with (
        serving(certificates.tls(authorities / "ours", mutual=MUTUAL)) as server,
        connect(str(server.address), **certificates.files(theirs, ca=ours)) as client,
    ):
        with pytest.raises(HocketError):
            await client.get_mixture("digits")
        certificates.replace(theirs, authorities / "ours", "router.pem", "router.key")
        await client.get_mixture("digits")


async def test_every_shape_of_call_goes_over_tls(ours: Path) -> None:
    tls = certificates.tls(ours)
    async with serving(tls) as server, client_channel(str(server.address), tls) as channel:
        await asyncio.wait_for(channel.channel_ready(), 5)
        for shape in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            start: Any = getattr(channel, shape)("/hocket.v1.RouterService/Nothing", None, None)
            # An empty stream: grpc says INTERNAL where a message is still being written when the refusal comes.
            call = start(b"" if shape.startswith("unary") else iter(()))
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED, shape
        changed = asyncio.create_task(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        await server.drain(0)
        await asyncio.wait_for(changed, 5)


async def test_a_forgotten_channel_is_closed_and_the_next_is_a_new_one(ours: Path) -> None:
    tls = certificates.tls(ours)
    async with serving(tls) as server:
        channels = Channels(tls=tls)
        first = channels.get(str(server.address))
        assert channels.get(str(server.address)) is first
        await channels.forget(str(server.address))
        await channels.forget("127.0.0.1:1")
        second = channels.get(str(server.address))
        assert second is not first
        await RouterClient(second).get_mixture("digits")
        await channels.close()


async def test_probes_need_no_certificate_and_reach_nothing_but_health(ours: Path) -> None:
    async with serving(certificates.tls(ours, mutual=MUTUAL)) as server:
        probed = str(Address("127.0.0.1", server.address.port + PROBE_PORT_OFFSET))
        async with connect_health(probed) as health:
            assert await health.list_services() == {"": Health.SERVING, SERVICE: Health.SERVING}
            server.set_ready(ready=False)
            assert await health.check(SERVICE) is Health.NOT_SERVING
        with pytest.raises(HocketError, match="Method not found"):
            await ask(probed)
        await server.drain(0)
        async with connect_health(probed) as health:
            with pytest.raises(HocketError) as gone:
                await health.check(SERVICE)
        assert gone.value.reason is Reason.UNREACHABLE


async def test_a_port_without_tls_has_no_second_one_for_probes() -> None:
    async with serving(None) as server:
        probed = str(Address("127.0.0.1", server.address.port + PROBE_PORT_OFFSET))
        async with connect_health(probed) as health:
            with pytest.raises(HocketError):
                await health.check("")


async def test_a_taken_port_for_probes_stops_the_start(ours: Path) -> None:
    tls = certificates.tls(ours)
    async with serving(tls) as server:
        below = Address("127.0.0.1", server.address.port)
        await server._server.stop(0)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{below.port + PROBE_PORT_OFFSET}"):
            await Server(Handlers(), below, credentials=tls.server_credentials("router")).start()
