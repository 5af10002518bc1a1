from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hocket.authoring import Draft, DraftMember, DraftSoftmax, format_draft, parse_draft, read_draft, resolve
from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRef, SoftmaxGate, gate_tensor, parse_mixture, read_gate

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
C = "sha256:" + "c" * 64

FIXED = f"""
name = "digits"
[[members]]
expert = "{A}"
[[members]]
expert = "{B}#2"
[gate]
kind = "fixed"
weights = [1, 2]
"""
SOFTMAX = f"""
name = "digits"
[[members]]
expert = "{A}"
[[members]]
mixture = "{B}"
[gate]
kind = "softmax"
weights = "gate.npy"
"""


@dataclass
class Names:
    """A registry that knows some names."""

    packages: dict[str, str] = field(default_factory=dict)
    mixtures: dict[str, str] = field(default_factory=dict)

    async def get_package(self, package: str) -> Any:
        if package not in self.packages:
            raise HocketError(Reason.UNKNOWN_PACKAGE, f"no package {package!r} here")
        return SimpleNamespace(digest=self.packages[package])

    async def fetch_mixture(self, mixture: str) -> Any:
        return SimpleNamespace(mixture=SimpleNamespace(digest=self.mixtures[mixture]))


NOBODY: Any = Names()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "mixture.toml"
        path.write_text(text)
        np.save(tmp_path / "gate.npy", np.eye(2))
        return path

    return write


async def test_a_fixed_mixture_answers_with_all_members_by_default(write: Any) -> None:
    record, gate = await resolve(read_draft(write(FIXED)), NOBODY)

    assert record.members == (ExpertId(A), ExpertId(B, 2))
    assert record.gate == FixedGate((1.0, 2.0))
    assert (record.name, record.top_k, record.labels, record.capacity_factor) == ("digits", 2, None, None)
    assert gate == b""


async def test_a_softmax_mixture_answers_with_one_member_by_default(write: Any) -> None:
    record, gate = await resolve(read_draft(write(SOFTMAX)), NOBODY)

    assert record.members == (ExpertId(A), MixtureRef(B))
    assert record.top_k == 1
    assert isinstance(record.gate, SoftmaxGate)
    assert read_gate(record.gate, gate).tolist() == [[1, 0], [0, 1]]


async def test_everything_can_be_said(write: Any) -> None:
    text = 'top_k = 2\nlabels = ["x", "y"]\ncapacity_factor = 1.5\n' + SOFTMAX + "temperature = 2\nbias = [0, -1.5]\n"
    record, _ = await resolve(read_draft(write(text)), NOBODY)

    assert (record.top_k, record.labels, record.capacity_factor) == (2, ("x", "y"), 1.5)
    assert isinstance(record.gate, SoftmaxGate)
    assert (record.gate.temperature, record.gate.bias) == (2.0, (0.0, -1.5))
    assert parse_mixture(record.body()) == record


async def test_names_become_digests(write: Any) -> None:
    text = FIXED.replace(A, "acme/low-digits@1.0.0").replace(f'expert = "{B}#2"', 'mixture = "other"')
    registry: Any = Names({"acme/low-digits@1.0.0": C}, {"other": A})
    record, _ = await resolve(read_draft(write(text)), registry)

    assert record.members == (ExpertId(C), MixtureRef(A))


async def test_a_local_package_stands_for_its_digest(write: Any, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "low.apr").write_bytes(b"a package")
    record, _ = await resolve(read_draft(write(FIXED.replace(A, "models/low.apr"))), NOBODY)

    assert record.members[0] == ExpertId(digest_of(b"a package"))


async def test_an_unknown_name_is_refused(write: Any) -> None:
    draft = read_draft(write(FIXED.replace(A, "acme/none@1")))

    with pytest.raises(HocketError) as refused:
        await resolve(draft, NOBODY)
    assert refused.value.reason is Reason.UNKNOWN_PACKAGE


@pytest.mark.parametrize("names", [("gate",), ("weights", "other")])
def test_a_gate_can_be_a_safetensors_file(write: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write(SOFTMAX.replace("gate.npy", "gate.safetensors"))
    tensors = {name: np.full((3, 2), place, np.float32) for place, name in enumerate(names)}
    save_file(tensors, tmp_path / "gate.safetensors")

    gate = read_draft(path).gate

    assert isinstance(gate, DraftSoftmax)
    assert gate.weights.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        ('name = "digits"', "", 'a mixture needs name = "digits"'),
        ('name = "digits"', "name = 3", "needs name"),
        ('name = "digits"', 'name = "digits"\ntopk = 1', "'topk' means nothing in a mixture; there are name, top_k"),
        ('name = "digits"', 'name = "digits"\nlabels = [1]', "labels must be a list of texts"),
        ('name = "digits"', 'name = "digits"\ncapacity_factor = "2"', "capacity_factor must be made of finite numbers"),
        (f'expert = "{A}"', f'package = "{A}"', "'package' means nothing in a member; there are expert, mixture"),
        (f'expert = "{A}"', f'expert = "{A}"\nmixture = "{A}"', "has one line"),
        (f'expert = "{A}"', "expert = 3", 'a member needs expert = "publisher/name@version"'),
        (f'expert = "{A}"', 'expert = "acme/low"', "neither publisher/name@version"),
        (f'expert = "{A}"', 'expert = "sha256:12"', "neither publisher/name@version"),
        (f'expert = "{A}"', 'mixture = "acme/el@1.0.0"', 'packages are expert = "..."'),
        (f'expert = "{A}"', "mixture = 3", 'a member needs mixture = "name"'),
        ('kind = "fixed"', "", "gate.kind must be one of softmax, fixed"),
        ('kind = "fixed"', 'kind = "rules"', "gate.kind must be one of softmax, fixed"),
        ('kind = "fixed"', 'kind = "fixed"\nbias = [1]', "'bias' means nothing in a fixed gate"),
        ("weights = [1, 2]", "", "a fixed gate needs weights"),
        ("weights = [1, 2]", "weights = [1, true]", "gate.weights must be made of finite numbers"),
        ("weights = [1, 2]", "weights = [1, inf]", "gate.weights must be made of finite numbers"),
        ("weights = [1, 2]", f"weights = [1, {10**400}]", "gate.weights must be made of finite numbers"),
        ("[gate]", "[gates]", "'gates' means nothing"),
        ("[[members]]", "[members]", "is not TOML"),
        ('name = "digits"', "name = ", "is not TOML"),
    ],
)
def test_what_a_mixture_needs_is_said(write: Any, old: str, new: str, advice: str) -> None:
    read_draft(write(FIXED))
    with pytest.raises(HocketError, match=re.escape(advice)) as refused:
        read_draft(write(FIXED.replace(old, new)))
    assert refused.value.reason is Reason.BAD_MIXTURE


@pytest.mark.parametrize("members", [[], [3]])
def test_members_are_tables(tmp_path: Path, members: list[Any]) -> None:
    document = {"name": "x", "members": members, "gate": {"kind": "fixed", "weights": []}}
    if members:
        with pytest.raises(HocketError, match=r"each \[\[members\]\]"):
            parse_draft(document, tmp_path)
    else:
        assert parse_draft(document, tmp_path).members == ()


@pytest.mark.parametrize(
    ("array", "advice"),
    [
        (np.zeros(2), "must hold numbers"),
        (np.array([["a"]]), "must hold numbers"),
        (np.array([[1.0, np.nan]]), "holds NaN"),
        (np.array([[1.0, 1e300]]), "beyond float32"),
        (np.array([[object()]]), "cannot be read as .npy"),
    ],
)
def test_a_gate_is_a_finite_matrix(write: Any, tmp_path: Path, array: Any, advice: str) -> None:
    path = write(SOFTMAX)
    np.save(tmp_path / "gate.npy", array, allow_pickle=True)

    with pytest.raises(HocketError, match=advice) as refused:
        read_draft(path)
    assert refused.value.reason is Reason.BAD_MIXTURE


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("gate.npy", b"PK\x03\x04", "cannot be read as .npy"),
        ("gate.npy", None, "cannot read .*gate.npy"),
        ("gate.safetensors", b"\xff" * 64, "cannot be read as .safetensors"),
        ("gate.safetensors", None, "cannot read .*gate.safetensors"),
        ("gate.txt", b"1 2", "must be an .npy or a .safetensors file"),
    ],
)
def test_a_gate_file_is_what_its_name_says(
    write: Any, tmp_path: Path, name: str, content: bytes | None, advice: str
) -> None:
    path = write(SOFTMAX.replace("gate.npy", name))
    if content is None:
        (tmp_path / name).unlink(missing_ok=True)
    else:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(HocketError, match=advice):
        read_draft(path)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(write: Any, tmp_path: Path) -> None:
    path = write(SOFTMAX)
    with (tmp_path / "gate.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))

    with pytest.raises(HocketError, match=r"cannot be read as \.npy"):
        read_draft(path)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_a_gate_beyond_the_limit_is_refused(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = write(SOFTMAX.replace("gate.npy", f"gate.{suffix}"))
    save_file({"weights": np.eye(2, dtype=np.float32)}, tmp_path / "gate.safetensors")
    read_draft(path)

    monkeypatch.setattr("hocket.authoring.GATE_BYTES_MAX", 15)
    with pytest.raises(HocketError, match=r"larger than|at most"):
        read_draft(path)


def test_several_tensors_need_one_called_weights(write: Any, tmp_path: Path) -> None:
    path = write(SOFTMAX.replace("gate.npy", "gate.safetensors"))
    save_file({"a": np.eye(2), "b": np.eye(2)}, tmp_path / "gate.safetensors")

    with pytest.raises(HocketError, match="one called 'weights'"):
        read_draft(path)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [((2, 3), r"here \[2, 3\], and there are 2 members: transpose it"), ((4, 3), "a column for each member")],
)
async def test_a_gate_of_another_shape_is_refused_with_advice(
    write: Any, tmp_path: Path, shape: tuple[int, int], advice: str
) -> None:
    path = write(SOFTMAX)
    np.save(tmp_path / "gate.npy", np.zeros(shape))

    with pytest.raises(HocketError, match=advice) as refused:
        await resolve(read_draft(path), NOBODY)
    assert refused.value.reason is Reason.BAD_MIXTURE


@pytest.mark.parametrize("missing", ["none.toml", "member", "gate"])
def test_a_file_that_cannot_be_read_is_a_bad_request(write: Any, tmp_path: Path, missing: str) -> None:
    path = write(SOFTMAX.replace(A, "none.apr") if missing == "member" else SOFTMAX)
    if missing == "gate":
        (tmp_path / "gate.npy").unlink()

    with pytest.raises(HocketError, match="cannot read") as refused:
        read_draft(tmp_path / "none.toml" if missing == "none.toml" else path)
    assert refused.value.reason is Reason.BAD_REQUEST


def test_a_file_that_is_too_large_is_refused(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(FIXED)
    monkeypatch.setattr("hocket.authoring._DRAFT_BYTES_MAX", 10)
    with pytest.raises(HocketError, match="larger than 10 bytes"):
        read_draft(path)


@given(
    features=st.integers(1, 5),
    temperature=st.floats(0.0625, 100, width=32),
    top_k=st.one_of(st.none(), st.integers(1, 3)),
    fixed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
async def test_whatever_is_resolved_reads_back_from_its_body(
    features: int, temperature: float, top_k: int | None, *, fixed: bool
) -> None:
    members = tuple(DraftMember("expert", digest) for digest in (A, B, C))
    softmax = DraftSoftmax(np.arange(features * 3, dtype=np.float32).reshape(features, 3), temperature)
    draft = Draft("some", members, FixedGate((1.0, 0.5, 0.0)) if fixed else softmax, top_k)

    record, gate = await resolve(draft, NOBODY)

    assert parse_mixture(record.body()) == record
    assert gate == (b"" if fixed else gate_tensor(softmax.weights))
    assert record.top_k == (top_k or (3 if fixed else 1))


@given(
    labels=st.none() | st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=4).map(tuple),
    weights=st.lists(st.floats(0, 1e300), min_size=2, max_size=2).map(tuple),
    top_k=st.none() | st.integers(1, 2),
    capacity_factor=st.none() | st.floats(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_a_draft_is_written_as_it_is_read(
    labels: Any, weights: Any, top_k: int | None, capacity_factor: float | None
) -> None:
    members = (DraftMember("expert", "acme/low-digits@1.0.0"), DraftMember("mixture", "other"))
    draft = Draft("digits", members, FixedGate(weights), top_k, labels, capacity_factor)

    again = parse_draft(tomllib.loads(format_draft(draft)), Path())

    for name in ("name", "members", "gate", "top_k", "labels", "capacity_factor"):
        assert getattr(again, name) == getattr(draft, name)


def test_a_written_softmax_gate_names_the_file_of_its_weights(tmp_path: Path) -> None:
    weights = np.array([[0.5, -1], [2, 3]], np.float32)
    gate = DraftSoftmax(weights, 0.5, (0.25, -1.0))
    members = (DraftMember("expert", A), DraftMember("expert", "low.apr"))
    (tmp_path / "low.apr").write_bytes(b"low")
    np.save(tmp_path / "gate.npy", weights)
    (tmp_path / "m.toml").write_text(format_draft(Draft("m", members, gate, 1), "gate.npy"))

    again = read_draft(tmp_path / "m.toml")

    assert isinstance(again.gate, DraftSoftmax)
    np.testing.assert_array_equal(again.gate.weights, weights)
    assert (again.gate.temperature, again.gate.bias) == (0.5, (0.25, -1.0))
    assert [member.name for member in again.members] == [A, digest_of(b"low")]
