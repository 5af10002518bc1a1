"""Rows with what is true of them, to learn from: a CSV with a column for that, or an .npz with an array for it."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.cli import files
from hocket.cli.rows import is_number
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_FILE_BYTES_MAX: Final = 128 * 2**20
_ARRAY_BYTES_MAX: Final = 512 * 2**20
_ROWS: Final = "rows"
_TRUTH: Final = "truth"
_PLACE: Final = re.compile(r"-?[0-9]{1,9}")


def read_examples(path: Path, truth: str | None) -> tuple[NDArray[np.float32], list[str] | list[float]]:
    """Rows `[N, F]`, and per row its label or number.

    Args:
        path: A .csv, whose line of names may be missing; or an .npz with the arrays `rows` and `truth`, as
            `numpy.savez` writes it.
        truth: The column of a .csv that holds the truth. A whole number is always its place, from 0 on or from the
            last, -1, back; anything else its name in the first line; None: the last column.

    Raises:
        HocketError: `BAD_REQUEST` if the file cannot be read or has no such column; `BAD_TENSOR` if its rows are not
            finite numbers, all equally many; `TOO_LARGE`.
    """
    rows: NDArray[np.float64]
    told: list[str] | list[float]
    match path.suffix:
        case ".csv":
            rows, told = _read_csv(files.read_file(path, _FILE_BYTES_MAX), truth)
        case ".npz" if truth is not None:
            raise HocketError(Reason.BAD_REQUEST, f"the truth of an .npz is its array {_TRUTH!r}: leave out --truth")
        case ".npz":
            rows, told = _read_npz(files.read_file(path, _FILE_BYTES_MAX))
        case _:
            raise HocketError(Reason.BAD_REQUEST, f"cannot tell what {path} is: name it .csv or .npz")
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise HocketError(Reason.BAD_TENSOR, f"{path} holds a row with NaN, infinity or a number beyond float32")
    return narrow, told


def _read_csv(data: bytes, truth: str | None) -> tuple[NDArray[np.float64], list[str]]:
    try:
        lines = [line for line in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise HocketError(Reason.BAD_TENSOR, f"the examples are no CSV in UTF-8: {error}") from error
    if not lines:
        raise HocketError(Reason.BAD_TENSOR, "there are no examples")
    column, named = _column(lines[0], truth)
    if named or any(not is_number(cell) for index, cell in enumerate(lines[0]) if index != column):
        lines = lines[1:]
    rows, told = [], []
    for number, line in enumerate(lines, start=1):
        if len(line) != len(lines[0]):
            raise HocketError(Reason.BAD_TENSOR, f"example {number} has {len(line)} columns, the first {len(lines[0])}")
        told.append(line[column].strip())
        try:
            rows.append([float(cell) for index, cell in enumerate(line) if index != column])
        except ValueError as error:
            raise HocketError(Reason.BAD_TENSOR, f"example {number}: {error}") from error
    if not rows or not rows[0]:
        raise HocketError(Reason.BAD_TENSOR, "there are no examples, or nothing in them but the truth")
    return np.array(rows), told


def _column(first: list[str], truth: str | None) -> tuple[int, bool]:
    """Where the truth is, and whether the first line says so by its name."""
    if truth is None:
        return len(first) - 1, False
    if _PLACE.fullmatch(truth):
        if -len(first) <= int(truth) < len(first):
            return int(truth) % len(first), False
    elif truth in first:
        return first.index(truth), True
    raise HocketError(
        Reason.BAD_REQUEST, f"there is no column {truth!r}: the file has {len(first)}, the first is {first[0]!r}"
    )


def _read_npz(data: bytes) -> tuple[NDArray[np.float64], list[str] | list[float]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows, truth = (_read_array(archive, name) for name in (_ROWS, _TRUTH))
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise HocketError(
            Reason.BAD_REQUEST, f"it is no .npz with arrays {_ROWS!r} and {_TRUTH!r} of numbers or texts: {error}"
        ) from error
    if rows.ndim != 2 or rows.dtype.kind not in "fiub" or truth.ndim != 1:  # noqa: PLR2004 - rows and columns
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{_ROWS} are numbers [N, F] and {_TRUTH} is [N], not {list(rows.shape)} and {list(truth.shape)}",
        )
    if len(rows) != len(truth) or not rows.size:
        raise HocketError(Reason.BAD_TENSOR, f"there are {len(rows)} rows, and {len(truth)} truths")
    return rows.astype(np.float64), truth.tolist()


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array whose header claims what is there, and no objects: those would be pickles."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > _ARRAY_BYTES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"the array {name!r} has more than {_ARRAY_BYTES_MAX} bytes")
    content = archive.read(member)
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects")
    values = np.frombuffer(content, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")
