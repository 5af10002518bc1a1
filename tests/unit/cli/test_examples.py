from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.cli.examples import read_examples
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [[0.5, 1.0], [2.0, -1.0]]


def read(tmp_path: Path, text: str, truth: str | None = None) -> Any:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    rows, told = read_examples(path, truth)
    assert rows.dtype == np.float32
    return rows.tolist(), told


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path, truth: str | None = None) -> Reason:
    with pytest.raises(HocketError) as refused:
        read_examples(path, truth)
    return refused.value.reason


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("0.5,1,a\n2,-1, b \n", None),
        ("x,y,kind\n0.5,1,a\n2,-1,b\n", None),
        ("x,y,kind\n0.5,1,a\n2,-1,b\n", "kind"),
        ("x,kind,y\n0.5,a,1\n2,b,-1\n", "kind"),
        ("a,0.5,1\nb,2,-1\n", "0"),
        ("x,kind,y\n0.5,a,1\n\n2,b,-1\n", "-2"),
        ("\ufeffx,y,kind\n0.5,1,a\n2,-1,b\n", "kind"),
        ("1,0.5,kind\n0.5,1,a\n2,-1,b\n", "kind"),
    ],
)
def test_the_truth_is_the_last_column_or_the_one_that_is_named(tmp_path: Path, text: str, truth: str | None) -> None:
    assert read(tmp_path, text, truth) == (ROWS, ["a", "b"])


def test_a_whole_number_is_a_place_and_never_a_name(tmp_path: Path) -> None:
    assert read(tmp_path, "1,0,2\n3,4,5\n", "0") == ([[0, 2], [4, 5]], ["1", "3"])
    assert read(tmp_path, "1,0,2\n3,4,5\n", "2") == ([[1, 0], [3, 4]], ["2", "5"])
    assert read(tmp_path, "2024_01,y\n3,4\n", "2024_01") == ([[4]], ["3"])


def test_an_npz_holds_rows_and_truth(tmp_path: Path) -> None:
    for truth in (["a", "b"], [1.5, 2.0], [3, 4]):
        path = archive(tmp_path / "x.npz", rows=np.array(ROWS), truth=np.array(truth))
        rows, told = read_examples(path, None)
        assert (rows.tolist(), told) == (ROWS, truth)
    path = archive(tmp_path / "x.npz", rows=np.asfortranarray(ROWS), truth=np.array([1, 2]))
    assert read_examples(path, None)[0].tolist() == ROWS


@pytest.mark.parametrize(
    ("text", "truth", "reason"),
    [
        ("", None, Reason.BAD_TENSOR),
        ("x,y\n", None, Reason.BAD_TENSOR),
        ("a\nb\n", None, Reason.BAD_TENSOR),
        ("1,2,a\n1,b\n", None, Reason.BAD_TENSOR),
        ("1,2,a\n1,x,b\n", None, Reason.BAD_TENSOR),
        ("1,nan,a\n", None, Reason.BAD_TENSOR),
        ("1,1e39,a\n", None, Reason.BAD_TENSOR),
        ("1,2,a\n", "kind", Reason.BAD_REQUEST),
        ("1,2,a\n", "3", Reason.BAD_REQUEST),
        ("1,2,a\n", "-4", Reason.BAD_REQUEST),
        ("1,2,3\n0.5,1,a\n", "3", Reason.BAD_REQUEST),
    ],
)
def test_a_csv_without_examples_is_refused(tmp_path: Path, text: str, truth: str | None, reason: Reason) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)

    assert refusal(path, truth) is reason


def test_an_npz_of_anything_else_is_refused(tmp_path: Path) -> None:
    path, rows = tmp_path / "x.npz", np.array(ROWS)

    assert refusal(archive(path, rows=rows, truth=np.array([1])), None) is Reason.BAD_TENSOR
    assert refusal(archive(path, rows=rows[0], truth=np.array([1, 2])), None) is Reason.BAD_TENSOR
    assert refusal(archive(path, rows=rows), None) is Reason.BAD_REQUEST
    assert refusal(archive(path, rows=rows, truth=np.array([1, 2])), "y") is Reason.BAD_REQUEST
    assert refusal(archive(path, rows=rows, truth=np.array([{}, {}])), None) is Reason.BAD_REQUEST
    path.write_bytes(b"no archive")
    assert refusal(path) is Reason.BAD_REQUEST
    (tmp_path / "rows.txt").write_text("1,2")
    assert refusal(tmp_path / "rows.txt") is Reason.BAD_REQUEST


def test_an_array_that_claims_more_than_is_there_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = io.BytesIO()
    claim: Any = {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2)}
    np.lib.format.write_array_header_1_0(header, claim)
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("rows.npy", header.getvalue() + bytes(32))

    assert refusal(path) is Reason.BAD_REQUEST
