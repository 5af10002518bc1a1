"""The registry's caller against registries that misbehave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from hocket.client import registry as client_module
from hocket.client.registry import RegistryClient
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.mixtures import GATE_BYTES_MAX
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2 import (
    DownloadHeader,
    DownloadPackageRequest,
    DownloadPackageResponse,
    FetchMixtureHeader,
    FetchMixtureRequest,
    FetchMixtureResponse,
)
from hocket.v1.registry_pb2_grpc import RegistryServiceServicer, add_RegistryServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DATA = bytes(range(100))
DIGEST = digest_of(DATA)


@dataclass
class Breaking(RegistryServiceServicer):
    """Sends ten bytes a chunk, and breaks off.

    Attributes:
        breaks: Chunks before each break; when they are used up, it breaks no more.
        reason: Why it breaks.
        data: What it sends.
        claimed_bytes: What it says the size is.
        offsets: Asked for, in order.
        gate: Chunks of the gate it sends.
        gate_bytes: What it says the gate's size is.
    """

    breaks: list[int] = field(default_factory=list)
    reason: Reason = Reason.DRAINING
    data: bytes = DATA
    claimed_bytes: int = len(DATA)
    offsets: list[int] = field(default_factory=list)
    gate: tuple[bytes, ...] = ()
    gate_bytes: int = 0

    async def DownloadPackage(
        self, request: DownloadPackageRequest, context: Any
    ) -> AsyncIterator[DownloadPackageResponse]:
        del context
        self.offsets.append(request.offset)
        chunks = self.breaks.pop(0) if self.breaks else None
        yield DownloadPackageResponse(header=DownloadHeader(package=Package(size_bytes=self.claimed_bytes)))
        rest = self.data[request.offset :]
        for start in range(0, len(rest), 10):
            if chunks == start // 10:
                raise HocketError(self.reason, "gone")
            yield DownloadPackageResponse(chunk=rest[start : start + 10])

    async def FetchMixture(self, request: FetchMixtureRequest, context: Any) -> AsyncIterator[FetchMixtureResponse]:
        del request, context
        yield FetchMixtureResponse(header=FetchMixtureHeader(mixture=Mixture(gate_bytes=self.gate_bytes), body=b"{}"))
        for chunk in self.gate:
            yield FetchMixtureResponse(gate_chunk=chunk)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PAUSE_SECONDS", 0)


def client_of(servicer: Breaking) -> RegistryClient:
    handlers = Handlers()
    handlers.add(add_RegistryServiceServicer_to_server, servicer)
    return RegistryClient(LocalChannel(handlers))


async def refusal_of(servicer: Breaking, **options: Any) -> Reason:
    with pytest.raises(HocketError) as caught:
        await client_of(servicer).download(DIGEST, **options)
    return caught.value.reason


async def test_a_broken_download_goes_on_where_it_broke() -> None:
    servicer = Breaking(breaks=[3, 0, 0, 4])

    _, data = await client_of(servicer).download(DIGEST)

    assert data == DATA
    assert servicer.offsets == [0, 30, 30, 30, 70]


async def test_three_attempts_without_progress_are_the_end() -> None:
    servicer = Breaking(breaks=[2, 0, 0, 0, 0])

    assert await refusal_of(servicer) is Reason.DRAINING
    assert servicer.offsets == [0, 20, 20, 20]


async def test_a_refusal_is_not_asked_for_twice() -> None:
    servicer = Breaking(breaks=[0, 0], reason=Reason.UNKNOWN_PACKAGE)

    assert await refusal_of(servicer) is Reason.UNKNOWN_PACKAGE
    assert servicer.offsets == [0]


async def test_other_bytes_than_those_asked_for_are_corrupt() -> None:
    assert await refusal_of(Breaking(data=DATA[:-1] + b"x")) is Reason.BLOB_CORRUPT
    assert await refusal_of(Breaking(data=DATA[:-1])) is Reason.BLOB_CORRUPT


async def test_more_bytes_than_announced_are_not_taken() -> None:
    servicer = Breaking(data=DATA * 1000)

    assert await refusal_of(servicer) is Reason.BLOB_CORRUPT


async def test_a_package_larger_than_wanted_is_not_taken() -> None:
    assert await refusal_of(Breaking(), size_bytes_max=len(DATA) - 1) is Reason.TOO_LARGE
    assert (await client_of(Breaking()).download(DIGEST, size_bytes_max=len(DATA)))[1] == DATA


async def test_a_download_ends_where_its_header_is_refused() -> None:
    told: list[int] = []

    def refuse(_: DownloadHeader) -> None:
        raise HocketError(Reason.ENCRYPTED, "scripted")

    assert (
        await refusal_of(Breaking(), on_header=refuse, on_progress=lambda done, _: told.append(done))
        is Reason.ENCRYPTED
    )
    assert told == []
    sizes: list[int] = []
    await client_of(Breaking(breaks=[3])).download(
        DIGEST, on_header=lambda header: sizes.append(header.package.size_bytes)
    )
    assert sizes == [len(DATA)] * 2, "once for each attempt"


@pytest.mark.parametrize(
    ("gate", "gate_bytes", "reason"),
    [
        ((b"1234", b"5678"), 7, Reason.BLOB_CORRUPT),
        ((b"1234",), 8, Reason.BLOB_CORRUPT),
        ((), GATE_BYTES_MAX + 1, Reason.TOO_LARGE),
    ],
)
async def test_a_gate_of_another_size_than_announced_is_refused(
    gate: tuple[bytes, ...], gate_bytes: int, reason: Reason
) -> None:
    with pytest.raises(HocketError) as caught:
        await client_of(Breaking(gate=gate, gate_bytes=gate_bytes)).fetch_mixture("m")
    assert caught.value.reason is reason


async def test_a_gate_comes_in_order() -> None:
    fetched = await client_of(Breaking(gate=(b"1234", b"5678"), gate_bytes=8)).fetch_mixture("m")

    assert (fetched.body, fetched.gate) == (b"{}", b"12345678")
