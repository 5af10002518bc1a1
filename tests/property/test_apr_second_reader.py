"""What is written here, and what the reference wrote, means the same to a reader that shares no code with ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.identity import digest_of
from hocket.packages import apr
from hocket.packages.apr.encryption import Password, RecipientKey
from hocket.packages.apr.quantization import dequantize, quantize, quantized_model
from hocket.packages.model import QuantKind
from tests import apr_reader, builders
from tests.apr_strategies import MODELS
from tests.reference_files import DAMAGE, ENTRIES, MANIFEST, ODD, read

KEY = b"\x09" * 32
SECRET = "correct horse"
COMPRESSIONS = ("none", "zstd", "zstd-max", "lz4")
WHOLE = [name for name in ENTRIES if name not in DAMAGE and name not in ODD and not name.startswith("edge_")]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("layout", builders.models())
def test_every_layout_is_read_by_another_reader_as_it_was_meant(layout: str, compression: Any) -> None:
    model = builders.models()[layout]
    data = builders.apr_bytes(model, compression=compression, name="ü" * 40, signing=builders.signer())

    metadata, again = apr_reader.read(data)

    assert builders.same(again, apr.decode(apr.split(data), "sha256:")[1])
    assert metadata["model_name"] == "ü" * 40
    assert metadata["custom"]["hocket"]["layout"] == layout


@pytest.mark.parametrize("to", [Password(SECRET), RecipientKey(KEY).recipient], ids=["password", "recipient"])
def test_what_is_encrypted_here_is_decrypted_by_others(to: Any) -> None:
    data = builders.apr_bytes(builders.mixture(), encryption=to, signing=builders.signer())
    credential: dict[str, Any] = {"password": SECRET} if isinstance(to, Password) else {"recipient_key": KEY}

    _, again = apr_reader.read(data, **credential)

    assert builders.same(again, builders.mixture())


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_model_is_read_by_another_reader(family: str, data: Any) -> None:
    model = data.draw(MODELS[family])
    file = builders.apr_bytes(model, compression=data.draw(st.sampled_from(COMPRESSIONS)))

    assert builders.same(apr_reader.read(file)[1], apr.decode(apr.split(file), "sha256:")[1])


@pytest.mark.parametrize("name", WHOLE)
def test_both_readers_agree_on_the_files_of_the_reference(name: str) -> None:
    entry, data = ENTRIES[name], read(name)
    opened = entry["open_with"]
    credential: Any = None
    secret: dict[str, Any] = {}
    if "password" in opened or opened["mode"].startswith("password"):
        secret["password"] = opened.get("password", MANIFEST["password"])
        credential = Password(secret["password"])
    elif opened["mode"].startswith("x25519"):
        secret["recipient_key"] = bytes.fromhex(opened.get("secret_key", MANIFEST["recipient_secret_key"]))
        credential = RecipientKey(secret["recipient_key"])

    metadata, model = apr_reader.read(data, layout=entry["layout"], expert=entry.get("expert_layout", ""), **secret)
    facts, ours = apr.decode(apr.split(data), digest_of(data), credential=credential)

    assert builders.same(model, ours)
    assert metadata == facts.metadata
    assert list(metadata) == list(facts.metadata)


@pytest.mark.parametrize("kind", QuantKind)
@pytest.mark.parametrize("layout", builders.QUANTIZABLE)
def test_a_quantised_model_is_read_by_another_reader(layout: str, kind: QuantKind) -> None:
    model = quantized_model(builders.models()[layout], kind)
    data = builders.apr_bytes(model)

    _, again = apr_reader.read(data)

    assert builders.same(again, model)
    assert builders.same(apr.decode(apr.split(data), "sha256:")[1], model)


@pytest.mark.parametrize("kind", QuantKind)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-(2.0**18), 2.0**18, width=32), min_size=1, max_size=70))
def test_blocks_stand_for_the_same_values_to_both(kind: QuantKind, values: list[float]) -> None:
    quantized = quantize(np.array(values, np.float32), kind)

    np.testing.assert_array_equal(dequantize(quantized), apr_reader.dequantized(quantized))


def test_the_published_model_means_the_same_to_both() -> None:
    if (fixtures := os.environ.get("HOCKET_FIXTURES")) is None:
        pytest.skip("HOCKET_FIXTURES is not set: the MNIST model is not at hand")
    data = (Path(fixtures) / "apr" / "genuine" / "realizar-mnist_784x2-logreg-v0.11.0.apr").read_bytes()

    metadata, model = apr_reader.read(data, layout="LogisticRegression")
    facts, ours = apr.decode(apr.split(data), digest_of(data))

    assert builders.same(model, ours)
    assert json.dumps(metadata) == json.dumps(facts.metadata)
