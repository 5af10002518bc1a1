"""What clients share: the request id and the token they send, and refusals, raised as `HocketError`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import grpc

from hocket.errors import HocketError
from hocket.rpc.status import from_rpc_error
from hocket.rpc.tls import advice
from hocket.telemetry.context import REQUEST_ID_KEY, request_id

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES: Final = 512 * 1024
"""Size of a chunk that we send; services take up to 1 MiB."""
GRPC_STATUS: Final = "grpc_status"
"""In a refusal's metadata: the status of a failed call that no service of ours has refused."""
TLS_DETAILS: Final = "tls_details"
"""In a refusal's metadata, when no connection came about for its certificates: what grpc says of it."""


def call_metadata(token: str | None = None) -> tuple[tuple[str, str], ...]:
    """Metadata of a call: the current request id, if there is one, and the bearer token, if there is one."""
    entries = []
    if current := request_id.get():
        entries.append((REQUEST_ID_KEY, current))
    if token is not None:
        entries.append(("authorization", f"Bearer {token}"))
    return tuple(entries)


def is_away(channel: grpc.aio.Channel) -> bool:
    """Whether the other end is known to be out of reach just now. A channel that is idle begins to connect."""
    return channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE


@contextmanager
def refusals() -> Iterator[None]:
    """Raise the failure of a call as the `HocketError` that the server raised.

    One that the transport or another program has made names its status in the metadata, under `GRPC_STATUS`. If
    certificates are to blame, its message says what to do, and the transport's is in the metadata (`TLS_DETAILS`).
    """
    try:
        yield
    except grpc.RpcError as error:
        refusal = from_rpc_error(error)
        if not refusal.metadata:
            status = error.code().name
            if told := advice(refusal.message):
                raise HocketError(refusal.reason, told, grpc_status=status, tls_details=refusal.message) from None
            raise HocketError(refusal.reason, refusal.message, grpc_status=status) from None
        raise refusal from None


def chunks_of(data: bytes | memoryview) -> Iterator[bytes]:
    """The bytes in order, in pieces of `CHUNK_BYTES`."""
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])
