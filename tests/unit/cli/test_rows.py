from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.cli import rows
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes import ScriptedRouter

MATRIX = [[0.5, 1.5], [2.0, -1.0]]


def test_rows_are_written_as_options() -> None:
    read = rows.read_rows(None, ["0.5,1.5", " 2, -1e0"])

    assert read.dtype == np.float32
    assert read.tolist() == MATRIX


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "0.5,1.5\n2,-1\n"),
        ("rows.csv", "\ufeffwidth,height\r\n0.5,1.5\r\n\r\n2,-1\r\n"),
        ("rows.json", json.dumps(MATRIX)),
        ("rows.json", json.dumps({"rows": MATRIX})),
    ],
)
def test_rows_are_read_from_text(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)

    assert rows.read_rows(path, None).tolist() == MATRIX


def test_one_row_needs_no_brackets_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text("[1, 2, 3]")

    assert rows.read_rows(path, None).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.bool_])
def test_rows_are_read_from_numpy_files(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "rows.npy", np.ones((3, 2), dtype))

    assert rows.read_rows(tmp_path / "rows.npy", None).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("text", ["0.5,1.5\n2,-1\n", json.dumps(MATRIX)])
@pytest.mark.usefixtures("router_address")
def test_rows_are_read_from_standard_input(hocket: Any, router: ScriptedRouter, text: str) -> None:
    outcome = hocket("predict", "digits", "--input", "-", "--json", stdin=text)

    assert outcome.code == 0
    assert np.frombuffer(router.requests[0].input.contents, "<f4").reshape(2, 2).tolist() == MATRIX


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", b"1,2\n3\n", Reason.BAD_TENSOR),
        ("rows.csv", b"a,b\nc,d\n", Reason.BAD_TENSOR),
        ("rows.csv", b"a,b\n", Reason.BAD_TENSOR),
        ("rows.csv", b"\xff\xfe", Reason.BAD_TENSOR),
        ("rows.json", b"[[1, 2], [3]]", Reason.BAD_TENSOR),
        ("rows.json", b"{}", Reason.BAD_TENSOR),
        ("rows.json", b'[["1"]]', Reason.BAD_TENSOR),
        ("rows.json", b"[[1], ", Reason.BAD_TENSOR),
        ("rows.json", b"[" * 100_000, Reason.BAD_TENSOR),
        ("rows.json", b"[[[1]]]", Reason.BAD_TENSOR),
        ("rows.npy", b"not numpy", Reason.BAD_REQUEST),
        ("rows.parquet", b"", Reason.BAD_REQUEST),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(tmp_path: Path, name: str, content: bytes, reason: Reason) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(HocketError) as refused:
        rows.read_rows(path, None)

    assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("rows.csv", b"1;2\n3;4\n", "separate numbers by commas"),
        ("rows.csv", b"1\t2\n3\t4\n", "separate numbers by commas"),
        ("rows.csv", b"", "there are no rows"),
        ("rows.json", b"[]", "there are no rows"),
        ("rows.json", b"{}", '{"rows": [[1, 2], [3, 4]]}'),
        ("rows.csv", b"1,2\n3,1e50\n", "row 1, column 1: 1e+50 is beyond float32"),
    ],
)
def test_a_refusal_says_how_rows_are_written(tmp_path: Path, name: str, content: bytes, advice: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(HocketError, match=re.escape(advice)) as refused:
        rows.read_rows(path, None)
    assert refused.value.reason is Reason.BAD_TENSOR


def test_infinity_is_left_to_the_router() -> None:
    assert rows.read_rows(None, ["inf,1"]).tolist() == [[float("inf"), 1]]


def test_numpy_files_do_not_come_by_standard_input(hocket: Any) -> None:
    outcome = hocket("predict", "digits", "--input", "-", "--json", stdin=b"\x93NUMPY\x01\x00")

    assert "give --input FILE.npy" in outcome.document["error"]["message"]


def test_a_person_at_a_terminal_is_told_how_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(b"1,2\n"))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)

    assert rows.read_rows(rows._STDIN, None).tolist() == [[1, 2]]
    assert "Ctrl-D" in capsys.readouterr().err


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([[object()]]), allow_pickle=True)

    with pytest.raises(HocketError, match=r"cannot read .* as \.npy"):
        rows.read_rows(tmp_path / "rows.npy", None)


def test_rows_come_one_way() -> None:
    for path, written in ((None, None), (rows._STDIN, ["1"])):
        with pytest.raises(HocketError, match="either by --input"):
            rows.read_rows(path, written)


def test_an_endless_input_is_refused(hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_FILE_BYTES_MAX", 10)
    outcome = hocket("predict", "digits", "--input", "-", "--json", stdin="1" * 11)

    assert outcome.document["error"]["reason"] == "TOO_LARGE"
