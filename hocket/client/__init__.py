"""Talk to a running suite.

    async with connect("127.0.0.1:50051") as router:
        answer = await router.answer("digits", rows)
        text = await router.answer_text("list all names", experts={"sql": 0.7, "json": 0.3})

    async with connect_registry("127.0.0.1:50052", token=token) as registry:
        await registry.publish(data, release)

    async with connect("dns:///routers.example:50051", ca_file="ca.pem") as router:
        ...

All three doors take the same files for TLS, and read them again when they change: `ca_file` names the authority that
has signed the server's certificate, `certificate_file` and `key_file` an own certificate for servers that ask for one.
Without any of them there is no TLS.

`hocket.client.blocking` has the same verbs without asyncio. Every refusal is a `hocket.errors.HocketError`; branch on
its `reason`. Services use the typed callers in this package directly, over channels of their own.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from hocket.client.registry import FetchedMixture, RegistryClient
from hocket.client.router import Answer, Constraint, Partial, Planned, RouterClient, Routing, TextAnswer, TextPlanned
from hocket.rpc.channel import client_channel, router_channel
from hocket.rpc.tls import open_tls
from hocket.v1.text_pb2 import TextDelta, TextFinish, TextStart

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hocket.client.health import HealthClient

__all__ = [
    "REGISTRY_ADDRESS",
    "ROUTER_ADDRESS",
    "Answer",
    "Constraint",
    "FetchedMixture",
    "Partial",
    "Planned",
    "RegistryClient",
    "RouterClient",
    "Routing",
    "TextAnswer",
    "TextDelta",
    "TextFinish",
    "TextPlanned",
    "TextStart",
    "connect",
    "connect_health",
    "connect_registry",
]

ROUTER_ADDRESS: Final = "127.0.0.1:50051"
"""Where a suite on this machine answers."""
REGISTRY_ADDRESS: Final = "127.0.0.1:50052"
"""Where a suite on this machine keeps packages and mixtures."""


@asynccontextmanager
async def connect(
    address: str = ROUTER_ADDRESS,
    *,
    timeout_seconds: float = 30.0,
    ca_file: Path | str | None = None,
    certificate_file: Path | str | None = None,
    key_file: Path | str | None = None,
) -> AsyncIterator[RouterClient]:
    """A client of one router, or of several that take turns.

    Nothing is sent before the first call, so this succeeds whether or not anybody listens there.

    Args:
        address: `host:port` or `unix:///path` of one router. Of several `ipv4:host:port,host:port` or
            `dns:///name:port`: routers that are not ready are left out, and a call that none has begun to answer is
            made again, four times in all.
        timeout_seconds: Deadline of every call but those for text, which bring their own.
        ca_file: Authorities that the router's certificate must come from (PEM).
        certificate_file: Own certificate (PEM).
        key_file: Its private key (PEM).

    Raises:
        HocketError: `BAD_REQUEST` for several addresses written otherwise, or files that cannot be used.
    """
    tls = open_tls(ca_file=ca_file, certificate_file=certificate_file, key_file=key_file)
    async with router_channel(address, tls) as channel:
        yield RouterClient(channel, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def connect_registry(
    address: str = REGISTRY_ADDRESS,
    token: str | None = None,
    *,
    timeout_seconds: float = 30.0,
    ca_file: Path | str | None = None,
    certificate_file: Path | str | None = None,
    key_file: Path | str | None = None,
) -> AsyncIterator[RegistryClient]:
    """A client of the registry at `address`.

    Args:
        address: Where the registry listens.
        token: The admin token, when the registry asks for one; reading needs none.
        timeout_seconds: Deadline of every call; uploads get more by their size.
        ca_file: Authorities that the registry's certificate must come from (PEM).
        certificate_file: Own certificate (PEM).
        key_file: Its private key (PEM).

    Raises:
        HocketError: `BAD_REQUEST` for files that cannot be used.
    """
    tls = open_tls(ca_file=ca_file, certificate_file=certificate_file, key_file=key_file)
    async with client_channel(address, tls) as channel:
        yield RegistryClient(channel, token=token, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def connect_health(
    address: str = ROUTER_ADDRESS,
    *,
    timeout_seconds: float = 5.0,
    ca_file: Path | str | None = None,
    certificate_file: Path | str | None = None,
    key_file: Path | str | None = None,
) -> AsyncIterator[HealthClient]:
    """A client of the health service that every server has.

    Args:
        address: Where any of our servers listens.
        timeout_seconds: Deadline of every call except `watch`.
        ca_file: Authorities that the server's certificate must come from (PEM).
        certificate_file: Own certificate (PEM).
        key_file: Its private key (PEM).

    Raises:
        HocketError: `BAD_REQUEST` for files that cannot be used.
    """
    tls = open_tls(ca_file=ca_file, certificate_file=certificate_file, key_file=key_file)
    # Not before it is needed: a process that loads grpcio-health-checking must not load our stubs beside it (ADR 3).
    from hocket.client.health import HealthClient  # noqa: PLC0415

    async with client_channel(address, tls) as channel:
        yield HealthClient(channel, timeout_seconds=timeout_seconds)
