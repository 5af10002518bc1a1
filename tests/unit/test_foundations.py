"""Errors, spellings, settings, tensors: what everything else stands on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from hocket.errors import HocketError, Reason, Situation
from hocket.identity import ExpertId, ReleaseName, check_name, check_version, key_bytes, key_text
from hocket.rpc.convert import matrix_to_tensor, tensor_to_matrix
from hocket.rpc.server import Address
from hocket.rpc.status import CODES, from_rpc_error
from hocket.settings import build, read_tables, read_token
from hocket.telemetry.context import accept_request_id
from hocket.v1.tensor_pb2 import Tensor

DIGEST = "sha256:" + "0" * 64
CONTRACTS = Path(__file__).parents[2] / "docs" / "contracts.md"


def test_every_situation_has_a_status_and_every_reason_a_situation() -> None:
    assert set(CODES) == set(Situation)
    assert all(reason.value == reason.name and reason.situation in CODES for reason in Reason)


def test_every_reason_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", CONTRACTS.read_text(), re.MULTILINE))
    assert rows == {str(reason): CODES[reason.situation].name for reason in Reason}


def test_a_status_of_the_transport_becomes_a_reason_too() -> None:
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, "connection refused")
    assert from_rpc_error(error).reason is Reason.UNREACHABLE


def test_a_call_that_the_other_side_has_cancelled_was_not_answered() -> None:
    """As a server that stops does with calls before its door."""
    error = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "CANCELLED")
    assert from_rpc_error(error).reason is Reason.UNREACHABLE


def test_experts_and_releases_read_what_they_print() -> None:
    for text in (DIGEST, f"{DIGEST}#7"):
        assert str(ExpertId.parse(text)) == text
    assert ExpertId.parse(f"{DIGEST}#0") == ExpertId(DIGEST)
    assert str(ReleaseName.parse("acme/low-digits@1.0.0")) == "acme/low-digits@1.0.0"
    assert key_bytes(key_text(bytes(range(32)))) == bytes(range(32))


@pytest.mark.parametrize(
    "text", ["", "sha256:", DIGEST.upper(), DIGEST + "#", DIGEST + "#01", DIGEST + "#-1", DIGEST + "0"]
)
def test_what_is_not_spelled_as_an_expert_is_refused(text: str) -> None:
    with pytest.raises(HocketError, match="is not an expert"):
        ExpertId.parse(text)


@pytest.mark.parametrize("text", ["acme/low", "low@1", "acme/low@", "/low@1", "../x/low@1", "acme/a b@1", "a/b/c@1"])
def test_what_is_not_spelled_as_a_release_is_refused(text: str) -> None:
    with pytest.raises(HocketError, match="BAD_REQUEST"):
        ReleaseName.parse(text)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "-a", "a..b", "A", "a\n", "con:", "é"])
def test_names_cannot_be_paths_or_options(name: str) -> None:
    with pytest.raises(HocketError):
        check_name(name)
    assert check_name("a-b_c.9") == "a-b_c.9"
    with pytest.raises(HocketError):
        check_version("-1")


@pytest.mark.parametrize("text", ["ed25519:", "ed25519:" + "g" * 64, "ed25519:" + "A" * 64, "0" * 64])
def test_what_is_not_spelled_as_a_key_is_refused(text: str) -> None:
    with pytest.raises(HocketError, match="not a public key"):
        key_bytes(text)


def test_a_matrix_survives_its_message() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(tensor_to_matrix(matrix_to_tensor(matrix)), matrix)


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (Tensor(datatype="FP64", shape=[1, 1], contents=bytes(8)), "input.datatype"),
        (Tensor(datatype="FP32", shape=[4], contents=bytes(16)), "input.shape"),
        (Tensor(datatype="FP32", shape=[0, 4]), "input.shape"),
        (Tensor(datatype="FP32", shape=[-1, -4], contents=bytes(16)), "input.shape"),
        (Tensor(datatype="FP32", shape=[1025, 1], contents=bytes(4100)), "input.shape"),
        (Tensor(datatype="FP32", shape=[1024, 2**12], contents=b""), "input.shape"),
        (Tensor(datatype="FP32", shape=[2**62, 4], contents=b""), "input.shape"),
        (Tensor(datatype="FP32", shape=[2, 2], contents=bytes(15)), "input.contents"),
        (matrix_to_tensor(np.array([[1, np.nan]], dtype=np.float32)), "input.contents"),
        (matrix_to_tensor(np.array([[1, -np.inf]], dtype=np.float32)), "input.contents"),
    ],
)
def test_a_bad_tensor_is_refused_by_the_field_to_blame(tensor: Tensor, field: str) -> None:
    with pytest.raises(HocketError) as caught:
        tensor_to_matrix(tensor)
    assert (caught.value.reason, caught.value.field) == (Reason.BAD_TENSOR, field)


def test_the_largest_batch_is_taken() -> None:
    assert tensor_to_matrix(matrix_to_tensor(np.zeros((1024, 2048), np.float32))).shape == (1024, 2048)


@dataclass(frozen=True, slots=True)
class Sample:
    """Settings of every type."""

    path: Path
    count: int = 1
    share: float = 0.5
    on: bool = False
    names: tuple[str, ...] = ()
    token: Path | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "hocket.toml"
    file.write_text('[sample]\npath = "a"\ncount = 2\nnames = ["x"]\n')
    environ = {"HOCKET_SAMPLE__COUNT": "3", "HOCKET_SAMPLE__ON": "yes", "HOCKET_SAMPLE__NAMES": "p, q", "HOCKET_X": "y"}
    tables = read_tables(file, environ, frozenset({"sample"}))
    assert build(Sample, tables["sample"], "sample") == Sample(Path("a"), 3, on=True, names=("p", "q"))


@pytest.mark.parametrize(
    "values",
    [
        {"path": "a", "cuont": 1},
        {"count": 1},
        {"path": "a", "count": "many"},
        {"path": "a", "count": True},
        {"path": "a", "on": "maybe"},
        {"path": "a", "names": 3},
        {"path": 3},
        {"path": "a", "count": -1},
    ],
)
def test_a_wrong_setting_stops_the_start(values: dict[str, object]) -> None:
    with pytest.raises(HocketError, match="sample"):
        build(Sample, values, "sample")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"cuont": 1}, "unknown setting sample.cuont; did you mean count?"),
        ({"zzz": 1}, "unknown setting sample.zzz; there are count, names, on, path, share, token"),
        ({"count": "many"}, "sample.count cannot be 'many': give a whole number"),
        ({"on": "maybe"}, "sample.on cannot be 'maybe': give true or false"),
        ({"names": 3}, "sample.names cannot be 3: give a list"),
        ({"names": [3]}, "sample.names cannot be 3: give text"),
    ],
)
def test_what_a_wrong_setting_should_be_is_said_in_words(values: dict[str, object], told: str) -> None:
    with pytest.raises(HocketError) as refused:
        build(Sample, {"path": "a", **values}, "sample")
    assert refused.value.message == told


def test_the_table_that_was_probably_meant_is_named() -> None:
    with pytest.raises(HocketError) as refused:
        read_tables(None, {"HOCKET_SMAPLE__KEY": "1"}, frozenset({"sample"}))
    assert refused.value.message == "unknown settings table [smaple]; did you mean sample?"


def test_an_unknown_table_or_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(HocketError, match="unknown settings table"):
        read_tables(None, {"HOCKET_TYPO__KEY": "1"}, frozenset({"sample"}))
    with pytest.raises(HocketError, match="cannot read"):
        read_tables(tmp_path / "none.toml", {}, frozenset())


def test_a_token_is_one_line_of_a_secret_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  0123456789abcdef\n")
    assert read_token(file) == "0123456789abcdef"
    assert read_token(None) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"0123456789abcde\n",
        b"0123456789abcdef\nsecond line\n",
        "0123456789abcd\u00e9f".encode(),
        b"\xff" * 32,
    ],
)
def test_what_is_no_token_stops_the_start_and_is_not_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(HocketError, match="token") as caught:
        read_token(file)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert "0123456789" not in caught.value.message


def test_a_token_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(HocketError, match="cannot read the token file"):
            read_token(path)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)],  # noqa: S104 - the address under test
)
def test_loopback_is_known(host: str, loopback: bool) -> None:  # noqa: FBT001 - a table column
    assert Address(host, 1).is_loopback is loopback
    assert str(Address("::1", 5)) == "[::1]:5"


def test_request_ids_fit_for_logs_are_kept() -> None:
    assert accept_request_id("abc-1") == "abc-1"
    for unfit in (None, b"x", "", "caf\u00e9", "a\n", "x" * 129):
        assert accept_request_id(unfit) != unfit
