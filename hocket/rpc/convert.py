"""Tensor message <-> numpy, with every check before any arithmetic; and seconds as a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from google.protobuf.duration_pb2 import Duration

from hocket.errors import HocketError, Reason
from hocket.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

MESSAGE_BYTES_MAX: Final = 16 * 2**20
"""Largest message any service sends or takes; model bytes and gates travel in chunks."""
ROWS_MAX: Final = 1024
"""Rows of one request (`PredictRequest.input`)."""
_SECONDS_MAX: Final = 86_400
VALUES_MAX: Final = 2**21
"""Values of one tensor."""
ANSWER_VALUES_MAX: Final = 2**20
"""Values of one answer: with both of its bounds it still fits into a message."""
COLUMNS_MAX: Final = 4096
"""Columns of an answer."""


def matrix_to_tensor(matrix: NDArray[np.float32]) -> Tensor:
    """An FP32 `[rows, columns]` message from a float32 matrix."""
    return Tensor(datatype="FP32", shape=matrix.shape, contents=matrix.astype("<f4", copy=False).tobytes())


def tensor_to_matrix(tensor: Tensor, field: str = "input") -> NDArray[np.float32]:
    """A read-only float32 view `[rows, columns]` of a message.

    Raises:
        HocketError: `BAD_TENSOR` if the datatype is not FP32, the shape is not two positive dimensions within
            the limits or does not match the contents, or a value is NaN or infinite.
    """
    matrix = tensor_to_matrix_unchecked(tensor, field)
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise HocketError(Reason.BAD_TENSOR, f"{field}[{row},{column}] is NaN or infinite", field=f"{field}.contents")
    return matrix


def tensor_to_matrix_unchecked(tensor: Tensor, field: str) -> NDArray[np.float32]:
    """As `tensor_to_matrix`, but NaN and infinity pass: for answers, whose judge is the aggregator.

    Raises:
        HocketError: `BAD_TENSOR`, as above.
    """
    if tensor.datatype != "FP32":
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{field} must be FP32, not {tensor.datatype[:16]!r}",
            field=f"{field}.datatype",
        )
    shape = tuple(tensor.shape)
    if len(shape) != 2:  # noqa: PLR2004 - rows and columns
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{field} must have the shape [rows, columns], not {len(shape)} dimensions",
            field=f"{field}.shape",
        )
    rows, columns = shape
    if not (1 <= rows <= ROWS_MAX and 1 <= columns <= VALUES_MAX and rows * columns <= VALUES_MAX):
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{field} has the shape [{rows}, {columns}]; allowed are 1 to {ROWS_MAX} rows and at most {VALUES_MAX} "
            "values: send larger batches in parts",
            field=f"{field}.shape",
        )
    contents = tensor.contents
    if len(contents) != rows * columns * 4:
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{field} holds {len(contents)} bytes, but FP32 [{rows}, {columns}] takes {rows * columns * 4}",
            field=f"{field}.contents",
        )
    return np.frombuffer(contents, dtype="<f4").reshape(shape)


def duration(seconds: float) -> Duration:
    """A span of time, not negative, as a message."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def positive_seconds(span: Duration, field: str) -> float:
    """A span of time from a request, in seconds.

    Raises:
        HocketError: `BAD_REQUEST` unless it is above 0 and at most a day.
    """
    seconds = span.seconds + span.nanos / 1e9
    if not 0 < seconds <= _SECONDS_MAX:
        raise HocketError(Reason.BAD_REQUEST, f"{field} must be above 0 and at most a day", field=field)
    return seconds
