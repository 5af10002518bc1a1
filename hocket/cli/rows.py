"""Rows to predict: from options, `.npy`, CSV or JSON, or standard input."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import typer

from hocket.cli import files, output
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

Input = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="Rows as .npy, .csv or .json; - for CSV or JSON from standard input."),
]
"""Option: a file of rows."""

Rows = Annotated[
    list[str] | None, typer.Option("--row", metavar="NUMBERS", help="One row, such as 5.1,3.5,1.4; may be repeated.")
]
"""Option: rows as written."""

_FILE_BYTES_MAX: Final = 128 * 2**20
_STDIN: Final = Path("-")
_NPY_MAGIC: Final = b"\x93NUMPY"
_OTHER_SEPARATORS: Final = ";\t| "


def read_rows(path: Path | None, written: list[str] | None) -> NDArray[np.float32]:
    """The rows `[N, F]` that were given, in a file or as options.

    Raises:
        HocketError: `BAD_REQUEST` if there are none, or both ways were used; `BAD_TENSOR` if they are not rows of
            numbers, all equally long.
    """
    if (path is None) == (written is None):
        raise HocketError(Reason.BAD_REQUEST, "give rows either by --input FILE or by --row 1,2,3")
    if written is not None:
        return _matrix([_fields(row.split(","), f"--row {row}") for row in written])
    assert path is not None  # noqa: S101 - for the type checker: one of the two was given
    if path == _STDIN:
        if sys.stdin.isatty():
            output.say("reading rows from the terminal: end with Ctrl-D", stderr=True)
        data = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1)
        if len(data) > _FILE_BYTES_MAX:
            raise HocketError(Reason.TOO_LARGE, f"standard input has more than {_FILE_BYTES_MAX} bytes")
        if data.startswith(_NPY_MAGIC):
            raise HocketError(Reason.BAD_REQUEST, "standard input is .npy: save it, and give --input FILE.npy")
        return _read_json(data) if data.lstrip()[:1] in (b"[", b"{") else _read_csv(data)
    match path.suffix:
        case ".npy":
            return _read_npy(path)
        case ".csv":
            return _read_csv(files.read_file(path, _FILE_BYTES_MAX))
        case ".json":
            return _read_json(files.read_file(path, _FILE_BYTES_MAX))
        case _:
            raise HocketError(Reason.BAD_REQUEST, f"cannot tell what {path} is: name it .npy, .csv or .json")


def _read_npy(path: Path) -> NDArray[np.float32]:
    try:
        rows: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read {path} as .npy: {error}") from error
    return _matrix(rows)


def _read_csv(data: bytes) -> NDArray[np.float32]:
    """Rows of numbers, with a line of names above them or without."""
    lines = [line for line in csv.reader(io.StringIO(_text(data))) if line]
    if lines and not is_number(lines[0][0]):
        lines = lines[1:]
    return _matrix([_fields(line, f"line {number}") for number, line in enumerate(lines, start=1)])


def _read_json(data: bytes) -> NDArray[np.float32]:
    """A list of rows, one row, or an object with such a list as `rows`."""
    try:
        document = json.loads(_text(data))
    except (ValueError, RecursionError) as error:
        raise HocketError(Reason.BAD_TENSOR, f"the rows are not JSON: {error}") from error
    if isinstance(document, dict):
        if "rows" not in document:
            raise HocketError(Reason.BAD_TENSOR, 'JSON rows are [[1, 2], [3, 4]] or {"rows": [[1, 2], [3, 4]]}')
        document = document["rows"]
    return _matrix(document)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HocketError(Reason.BAD_TENSOR, "the rows are not text in UTF-8") from error


def _fields(texts: list[str], where: str) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        separated = any(separator in text.strip() for text in texts for separator in _OTHER_SEPARATORS)
        hint = "; separate numbers by commas" if separated else ""
        raise HocketError(Reason.BAD_TENSOR, f"{where}: {error}{hint}") from error


def is_number(text: str) -> bool:
    """Whether a field of a file spells a number, and is no heading."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _matrix(rows: Any) -> NDArray[np.float32]:  # noqa: ANN401 - whatever was in the file
    try:
        matrix = np.atleast_2d(np.asarray(rows))
    except (ValueError, OverflowError) as error:
        raise HocketError(Reason.BAD_TENSOR, "the rows are not equally long") from error
    if matrix.size == 0:
        raise HocketError(Reason.BAD_TENSOR, "there are no rows")
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":  # noqa: PLR2004 - rows and columns
        raise HocketError(
            Reason.BAD_TENSOR, f"rows are numbers [rows, features], not {matrix.dtype} {list(matrix.shape)}"
        )
    with np.errstate(over="ignore"):
        narrow = matrix.astype(np.float32)
    beyond = np.argwhere(np.isfinite(matrix) & ~np.isfinite(narrow))
    if len(beyond):
        row, column = beyond[0]
        raise HocketError(
            Reason.BAD_TENSOR, f"row {row}, column {column}: {matrix[row, column]:g} is beyond float32 (about 3.4e38)"
        )
    return narrow
