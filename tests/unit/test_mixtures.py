"""The mixture record: canonical form, digest, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rfc8785

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import (
    BODY_BYTES_MAX,
    FixedGate,
    MixtureRecord,
    MixtureRef,
    SoftmaxGate,
    gate_tensor,
    parse_mixture,
    read_gate,
)

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)
A, B = ExpertId("sha256:" + "a" * 64), ExpertId("sha256:" + "b" * 64, 2)
GATE = SoftmaxGate(3, 2, digest_of(gate_tensor(WEIGHTS)), 0.5, (0.25, -1.0))
RECORD = MixtureRecord("digits", (A, B), GATE, 1, ("zero", "one"), 1.5)


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        replace(RECORD, labels=None, capacity_factor=None),
        MixtureRecord("flat", (A, MixtureRef("sha256:" + "c" * 64)), FixedGate((1, 0.25)), 2),
    ],
)
def test_a_record_survives_its_body(record: MixtureRecord) -> None:
    assert parse_mixture(record.body()) == record
    assert parse_mixture(record.body()).digest == record.digest == digest_of(record.body())


def test_the_body_is_canonical_json() -> None:
    assert RECORD.body() == rfc8785.dumps(json.loads(RECORD.body()))
    assert b'"members":[{"expert":"sha256:aaaa' in RECORD.body()


def changed(**changes: Any) -> bytes:
    document = json.loads(RECORD.body())
    for path, value in changes.items():
        target = document
        *outer, last = path.split("__")
        for key in outer:
            target = target[key]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        RECORD.body() + b" ",
        RECORD.body().replace(b'"top_k":1', b'"top_k":1,"top_k":1'),
        changed(unknown=1),
        changed(top_k=0),
        changed(top_k=3),
        changed(top_k=True),
        changed(top_k=...),
        changed(members=[]),
        changed(members=[{"expert": str(A)}, {"expert": str(A)}]),
        changed(members=[{"expert": "acme/low@1"}, {"expert": str(B)}]),
        changed(members=[{"mixture": "other"}, {"expert": str(B)}]),
        changed(members=[{}, {"expert": str(B)}]),
        changed(labels=[]),
        changed(labels=["x", "x"]),
        changed(labels=["x", 1]),
        changed(labels=["x", "y" * 257]),
        changed(capacity_factor=0.99),
        changed(capacity_factor="2"),
        changed(capacity_factor=1_000_001),
        RECORD.body().replace(b'"capacity_factor":1.5', b'"capacity_factor":1' + b"0" * 400),
        changed(gate__temperature=1e-7),
        changed(gate__bias=[1e39, 0.0]),
        changed(gate={"kind": "fixed", "weights": [1e308, 1e308]}),
        changed(gate={"kind": "rules"}),
        changed(gate__temperature=0),
        changed(gate__temperature=-1),
        changed(gate__temperature=...),
        changed(gate__experts=3),
        changed(gate__features=0),
        changed(gate__features=2**21 + 1),
        changed(gate__weights="sha256:short"),
        changed(gate__bias=[1.0]),
        changed(gate={"kind": "fixed", "weights": [1]}),
        changed(gate={"kind": "fixed", "weights": [0, 0]}),
        changed(gate={"kind": "fixed", "weights": [2, -1]}),
        RECORD.body().replace(b'"temperature":0.5', b'"temperature":NaN'),
        RECORD.body().replace(b'"temperature":0.5', b'"temperature":1e999'),
    ],
)
def test_what_is_no_sound_record_is_refused(body: bytes) -> None:
    with pytest.raises(HocketError) as caught:
        parse_mixture(body)
    assert caught.value.reason in {Reason.BAD_MIXTURE, Reason.BAD_REQUEST}


def test_names_follow_one_alphabet() -> None:
    for name in ("../up", "UPPER", "a/b", "a@b", "", "x" * 65):
        with pytest.raises(HocketError, match="not a valid mixture name"):
            replace(RECORD, name=name)
    assert replace(RECORD, name="x" * 64).name == "x" * 64


def test_a_body_beyond_the_limit_is_not_even_parsed() -> None:
    with pytest.raises(HocketError, match="at most"):
        parse_mixture(b" " * (BODY_BYTES_MAX + 1))


def test_the_gate_tensor_must_be_the_one_named() -> None:
    assert np.array_equal(read_gate(GATE, gate_tensor(WEIGHTS)), WEIGHTS)
    with pytest.raises(HocketError, match="DIGEST_MISMATCH"):
        read_gate(GATE, gate_tensor(WEIGHTS + 1))


@pytest.mark.parametrize("tensor", [WEIGHTS[:2], np.full((3, 2), np.nan), np.full((3, 2), np.inf)])
def test_a_gate_tensor_of_another_size_or_not_finite_is_refused(tensor: Any) -> None:
    data = gate_tensor(tensor)
    with pytest.raises(HocketError, match="BAD_MIXTURE"):
        read_gate(replace(GATE, weights=digest_of(data)), data)


def test_a_gate_too_large_to_hold_is_refused_before_it_is_sent() -> None:
    with pytest.raises(HocketError, match="gate tensor would take"):
        MixtureRecord(
            "big",
            tuple(ExpertId("sha256:" + f"{n:064x}") for n in range(1000)),
            SoftmaxGate(2**21, 1000, GATE.weights),
            1,
        )
