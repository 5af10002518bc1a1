"""A registry of one's own: its folders, its app, and clients over either transport."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hocket.client.registry import RegistryClient
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRecord, MixtureRef, SoftmaxGate, gate_tensor
from hocket.packages import Purpose
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Tokens
from hocket.rpc.server import Address, Server
from hocket.trust_folder import TrustFolder
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from tests.builders import METADATA, apr_bytes, linear, logistic
from tests.signing import ACME_SEED, ZETA_SEED, envelope_of, trusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hocket.v1.registry_pb2 import WatchResponse

ROOT = Path(__file__).parents[1]


def labelled(*labels: str | None, weight: float = 1.0, **custom: Any) -> bytes:
    """A logistic regression over two features whose two columns score these labels."""
    metadata = {**METADATA, "custom": {"hocket": {"labels": list(labels), **custom}}}
    return apr_bytes(logistic(weight, -1.0), metadata=metadata)


def numbers(weight: float = 1.0, features: int = 2) -> bytes:
    """A linear regression."""
    return apr_bytes(linear(*[weight] * features))


def fixed(name: str, *members: str | bytes, **changes: Any) -> MixtureRecord:
    """A mixture with equal weights of packages (bytes, or `digest#ordinal`) and of mixtures (`@digest`)."""
    ids = [digest_of(member) if isinstance(member, bytes) else member for member in members]
    refs = tuple(MixtureRef(text[1:]) if text.startswith("@") else ExpertId.parse(text) for text in ids)
    fields = {"gate": FixedGate((1.0,) * len(refs)), "top_k": len(refs), **changes}
    return MixtureRecord(name, refs, **fields)


def gated(name: str, *members: bytes, features: int = 2, **changes: Any) -> tuple[MixtureRecord, bytes]:
    """A mixture behind a softmax gate, and the gate's tensor."""
    tensor = gate_tensor(np.linspace(-1, 1, features * len(members), dtype=np.float32).reshape(features, -1))
    gate = SoftmaxGate(features, len(members), digest_of(tensor))
    return fixed(name, *members, **{"gate": gate, **changes}), tensor


def mixture_release(record: MixtureRecord, seed: bytes = ACME_SEED, name: str = "") -> bytes:
    """A release of a mixture, by default under acme's and its own name."""
    signed = name or f"acme/{record.name}@{record.digest[7:19]}"
    return envelope_of(record.body(), seed, signed, purpose=Purpose.MIXTURE, format="mixture")


@dataclass
class Running:
    """A registry that runs.

    Attributes:
        app: The app.
        trust: Its trust folder, which trusts acme and zeta to begin with.
        settings: What it runs by.
    """

    app: RegistryApp
    trust: TrustFolder
    settings: RegistrySettings
    channels: Channels
    address: str

    def client(self, token: str | None = None, timeout_seconds: float = 10.0) -> RegistryClient:
        return RegistryClient(self.channels.get(self.address), token=token, timeout_seconds=timeout_seconds)

    async def publish(self, data: bytes, name: str = "acme/iris@1.0.0", seed: bytes = ACME_SEED) -> str:
        """Publish under a release, and return the digest."""
        response = await self.client().publish(data, envelope_of(data, seed, name))
        return str(response.package.digest)

    async def put(self, record: MixtureRecord, gate: bytes = b"", etag: str = "") -> str:
        """Put under acme's release, and return the digest."""
        mixture = await self.client().put_mixture(record.body(), mixture_release(record), gate, etag=etag)
        return str(mixture.digest)

    async def seen(self, after_revision: int = 0) -> list[WatchResponse]:
        """The feed up to its mark."""
        items = []
        async with aclosing(self.client().watch(after_revision)) as feed, asyncio.timeout(5):
            async for item in feed:
                items.append(item)
                if item.WhichOneof("event") == "synced":
                    break
        return items


def settings_in(folder: Path, **changes: Any) -> RegistrySettings:
    """Settings of a registry that lives in a folder of its own."""
    return RegistrySettings(**{"data_dir": folder / "data", "trust_dir": folder / "trust", **changes})


def trust_in(folder: Path) -> TrustFolder:
    """A trust folder that trusts acme and zeta."""
    trust = TrustFolder(folder / "trust")
    trust.add_key(trusted())
    trust.add_key(trusted(ZETA_SEED, "zeta"))
    return trust


@asynccontextmanager
async def running(
    folder: Path, over: str = "local", tokens: Tokens | None = None, **changes: Any
) -> AsyncIterator[Running]:
    """A registry over `local` or `socket`, on whatever the folder holds."""
    settings = settings_in(folder, **changes)
    trust = TrustFolder(settings.trust_dir) if settings.trust_dir.exists() else trust_in(folder)
    app = RegistryApp(settings, tokens or Tokens())
    await app.start()
    channels = Channels({"registry": app.handlers})
    server = Server(app.handlers, Address("127.0.0.1", 0))
    if over == "socket":
        await server.start()
    try:
        yield Running(app, trust, settings, channels, str(server.address) if over == "socket" else "local:registry")
    finally:
        await channels.close()
        if over == "socket":
            await server.drain(0)
        await app.stop()


@asynccontextmanager
async def process_in(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, RegistryClient]]:
    """A registry in a process of its own, and a client of it."""
    program = (
        "import asyncio, sys, pathlib\n"
        "from hocket.telemetry.logs import configure_logs\n"
        "from tests.registries import running\n"
        "configure_logs('error')\n"  # nobody reads the pipe any further than the address
        "async def main():\n"
        "    async with running(pathlib.Path(sys.argv[1]), 'socket') as registry:\n"
        "        print(registry.address, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    channels = Channels()
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while not (found := re.fullmatch(rb"(127\.0\.0\.1:\d+)\n", await process.stdout.readline())):
                pass
        yield process, RegistryClient(channels.get(found[1].decode()), timeout_seconds=10)
    finally:
        await channels.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
