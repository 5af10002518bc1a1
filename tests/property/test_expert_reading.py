"""Whatever a package says, it is read or refused, and what was saved is what is read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from hocket.errors import HocketError
from hocket.identity import digest_of
from hocket.packages.adapter import Outcome
from hocket.packages.expert import decode
from hocket.packages.expert.config import read_config, unsupported
from hocket.packages.expert.signature import verify_upstream
from hocket.packages.expert.weights import read_tensors
from tests.experts import adapter_config, adapter_tensors, archived, expert_files, expert_package, signed_upstream

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIGNED = signed_upstream(expert_files())
BLOCK = json.loads(SIGNED["manifest.json"])["integrity"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def refused_or(work: Any, *arguments: Any) -> Any:
    """What the work answers; None for a refusal. Any other exception fails the test."""
    try:
        return work(*arguments)
    except HocketError:
        return None


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["lora", "dora", "ia3"]),
    st.integers(1, 9),
    st.lists(st.sampled_from(MODULES), min_size=1, unique=True).map(tuple),
    st.integers(1, 3),
    st.sampled_from(["gzip", "zstd", "zip"]),
)
def test_what_was_saved_is_what_is_read(
    kind: str, rank: int, modules: tuple[str, ...], layers: int, compression: str
) -> None:
    tensors = adapter_tensors(kind, rank=rank, modules=modules, layers=layers)
    data = expert_package(kind=kind, rank=rank, modules=modules, tensors=tensors, compression=compression)
    facts, adapter = decode(data, digest_of(data))

    assert {name: tensor.shape for name, tensor in adapter.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(bytes(tensor.data) == tensors[name].tobytes() for name, tensor in adapter.tensors.items())
    assert (facts.kind, facts.rank) == (kind, 0 if kind == "ia3" else rank)
    assert facts.target_modules == tuple(sorted(modules))
    assert (facts.not_servable, facts.warnings) == (None, ())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["lora", "ia3", "soft_prompt"]), st.data())
def test_any_configuration_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    document = adapter_config(kind)
    key = data.draw(st.sampled_from(sorted(document)) | st.text())
    encoded = json.dumps({**document, key: data.draw(json_values)}).encode()
    if refused_or(read_config, encoded) is not None:
        assert isinstance(unsupported(encoded), str | None)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(BLOCK)), json_values)
@example("files", {"manifest.json": ""})
@example("pubkey", "ed25519:" + "ü" * 64)
def test_any_integrity_block_has_an_outcome(key: str, value: Any) -> None:
    manifest = {**json.loads(SIGNED["manifest.json"]), "integrity": {**BLOCK, key: value}}
    files = {**SIGNED, "manifest.json": json.dumps(manifest).encode()}
    outcome = verify_upstream(files, manifest["integrity"]).outcome
    assert outcome is (Outcome.WEIGHTS_ONLY if key in {"publisher", "created_at"} else Outcome.INVALID)


WEIGHTS = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WEIGHTS) - 1), st.integers(1, 255))
def test_no_byte_of_the_weights_can_do_more_than_be_refused(place: int, change: int) -> None:
    changed = bytearray(WEIGHTS)
    changed[place] ^= change
    refused_or(read_tensors, bytes(changed))


@pytest.mark.parametrize("name", sorted(expert_files(files={"grammar.gbnf": b"root ::= [a-z]"})))
@settings(max_examples=25, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_in_place_of_a_file_are_read_or_refused(name: str, content: bytes) -> None:
    data = archived({**expert_files(), name: content})
    refused_or(decode, data, digest_of(data))
