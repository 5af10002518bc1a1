"""The one table between situations and gRPC statuses, and both ways across it.

A refusal travels as a status with `google.rpc.ErrorInfo` (stable reason, domain `hocket`), plus `BadRequest` when a
field is to blame and `RetryInfo` when waiting helps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from hocket.errors import HocketError, Reason, Situation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOMAIN: Final = "hocket"
DETAILS_KEY: Final = "grpc-status-details-bin"
_MESSAGE_LENGTH_MAX: Final = 800
_VALUE_LENGTH_MAX: Final = 200

CODES: Final[Mapping[Situation, grpc.StatusCode]] = {
    Situation.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Situation.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Situation.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    Situation.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Situation.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Situation.TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Situation.STALE: grpc.StatusCode.ABORTED,
    Situation.COMPACTED: grpc.StatusCode.OUT_OF_RANGE,
    Situation.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Situation.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Situation.INCOMPLETE: grpc.StatusCode.ABORTED,
    Situation.TIMED_OUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Situation.CORRUPT: grpc.StatusCode.DATA_LOSS,
    Situation.BUG: grpc.StatusCode.INTERNAL,
}

_BARE: Final[Mapping[grpc.StatusCode, Reason]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.BAD_REQUEST,
    grpc.StatusCode.UNIMPLEMENTED: Reason.BAD_REQUEST,
    grpc.StatusCode.NOT_FOUND: Reason.UNKNOWN_MODEL,
    grpc.StatusCode.UNAUTHENTICATED: Reason.TOKEN_REQUIRED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.TOKEN_NOT_ALLOWED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.QUEUE_FULL,
    grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
    # Not by us, who would not get an answer then: by a server that stops with the call before its door.
    grpc.StatusCode.CANCELLED: Reason.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE,
    grpc.StatusCode.DATA_LOSS: Reason.BLOB_CORRUPT,
}
"""What a status without our details means: it was made by the transport or by another implementation."""


def to_status(error: HocketError, request_id: str) -> status_pb2.Status:
    """The rich status of a refusal; `request_id` joins the error info for support.

    Texts are clipped: a status travels in trailing metadata, which transports limit to a few KiB.
    """
    message = clip(error.message)
    status = status_pb2.Status(code=CODES[error.situation].value[0], message=message)
    info = {key: value[:_VALUE_LENGTH_MAX] for key, value in error.metadata.items()} | {"request_id": request_id}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=info))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        pause = Duration()
        pause.FromMilliseconds(round(error.retry_after_seconds * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=pause))
    return status


def clip(message: str) -> str:
    """A message short enough for a status; hostile input is quoted in part only."""
    return message if len(message) <= _MESSAGE_LENGTH_MAX else f"{message[:_MESSAGE_LENGTH_MAX]}..."


def from_rpc_error(error: grpc.RpcError) -> HocketError:
    """The refusal behind a failed call, as the server raised it; never raises."""
    code = error.code()
    message = error.details() or code.name
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _from_details(status_pb2.Status.FromString(value), code, message)
    return HocketError(_BARE.get(code, Reason.INTERNAL), message)


def _from_details(status: status_pb2.Status, code: grpc.StatusCode, message: str) -> HocketError:
    reason, field, pause = _BARE.get(code, Reason.INTERNAL), None, None
    metadata: dict[str, str] = {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = Reason.__members__.get(info.reason, reason)
            metadata = dict(info.metadata)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            pause = retry.retry_delay.ToMilliseconds() / 1000
    return HocketError(reason, message, field=field, retry_after_seconds=pause, **metadata)
