"""Every genuine file has its expected outcome: decoded and predicted as recorded, or refused with its own reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr
from hocket.packages.apr.quantization import dequantize, quantize
from hocket.packages.model import QuantKind
from tests import apr_oracle, builders
from tests.reference_files import (
    DAMAGE,
    ENTRIES,
    FIXTURES,
    MANIFEST,
    ODD,
    VECTORS,
    assert_as_recorded,
    credential_of,
    outcome,
    read,
)
from tests.vectors import regenerate

DECODED = [name for name, entry in ENTRIES.items() if outcome(entry) is None]
REFUSED = [name for name, entry in ENTRIES.items() if outcome(entry) is not None]
ENCRYPTED = [name for name in DECODED if credential_of(ENTRIES[name]) is not None]


def decode(data: bytes, entry: dict[str, Any] | None = None) -> tuple[Any, Any]:
    credential = None if entry is None else credential_of(entry)
    return apr.decode(apr.split(data), digest_of(data), credential=credential)


def test_the_whole_fixture_folder_is_read() -> None:
    if FIXTURES is None:
        pytest.skip("HOCKET_FIXTURES is not set: the selection in tests/vectors is read instead")
    assert len(ENTRIES) == 173


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_served_is_refused_for_its_own_reason(name: str) -> None:
    with pytest.raises(HocketError) as refusal:
        decode(read(name), ENTRIES[name])

    assert refusal.value.reason is outcome(ENTRIES[name])


@pytest.mark.parametrize("name", ENCRYPTED)
def test_an_encrypted_file_stays_closed_without_its_credential(name: str) -> None:
    with pytest.raises(HocketError) as refusal:
        decode(read(name))

    assert refusal.value.reason is Reason.ENCRYPTED


@pytest.mark.parametrize("name", [name for name in ENCRYPTED if "edge" not in name and "meta" not in name])
def test_an_encrypted_file_holds_what_its_twin_in_the_clear_holds(name: str) -> None:
    _, model = decode(read(name), ENTRIES[name])
    twins = [f"{name.partition('.')[0]}.{how}.apr" for how in ("plain", "zstd", "zstd.signed", "plain.signed")]
    twin = next(twin for twin in twins if twin in ENTRIES)

    assert builders.same(model, decode(read(twin))[1])


@pytest.mark.parametrize("name", DECODED)
def test_a_sound_file_is_decoded_and_answers_as_recorded(name: str) -> None:
    entry, data = ENTRIES[name], read(name)
    facts, model = decode(data, entry)

    assert facts.layout == entry.get("layout", "LinearRegression")
    assert facts.expert_layout == entry.get("expert_layout")
    assert (facts.digest, facts.size_bytes) == (digest_of(data), entry["size"])
    assert facts.n_features in (3, None)
    if "metadata" in entry:
        assert facts.metadata == entry["metadata"]
    if entry.get("top_k") == 0:
        assert facts.not_servable == "the mixture chooses no expert (top_k is 0)"
        return
    if facts.layout == "QuantizedBlock":
        assert facts.not_servable == "it is a lone quantised tensor, not a model"
        return
    assert facts.not_servable is None
    if "inputs" in entry:
        answers = apr_oracle.predict(model, entry["inputs"], facts.output_columns)
        assert answers.shape == (len(entry["inputs"]), facts.output_columns)
        assert_as_recorded(entry, model, answers)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.startswith("quant_")])
def test_a_quantised_tensor_has_the_recorded_values_and_blocks(name: str) -> None:
    entry = ENTRIES[name]
    facts, model = decode(read(name))

    assert (facts.layout, facts.quantization, facts.flags) == ("QuantizedBlock", entry["quant_type"], ())
    assert (list(model.shape), model.blocks.hex()) == (entry["shape"], entry["blocks_hex"])
    np.testing.assert_array_equal(dequantize(model).ravel(), np.array(entry["dequantized"], np.float32))
    source = np.array(entry["source"], np.float32).reshape(entry["shape"])
    assert quantize(source, QuantKind(entry["quant_type"])) == model


@pytest.mark.parametrize("name", [name for name in DECODED if name not in {*ODD, *ENCRYPTED}])
def test_a_decoded_file_is_written_again_byte_for_byte(name: str) -> None:
    data = read(name)
    container = apr.split(data)
    facts, model = decode(data)

    again = apr.write(
        model,
        metadata=facts.metadata,
        compression={0: "none", 1: "zstd", 2: "zstd-max"}[container.header.compression_id],  # type: ignore[arg-type] # the three names
        signing=builders.signer(bytes.fromhex(MANIFEST["signing_seed"])) if facts.signed else None,
    )

    if facts.compression == "none":
        assert again == data
    else:  # the compressed bytes belong to the release of the zstd library
        facts_again, model_again = decode(again)
        assert facts_again.metadata == facts.metadata
        assert builders.same(model_again, model)


@pytest.mark.parametrize("name", [name for name in ENTRIES if read(name)[:4] == apr.MAGIC and ".signed" in name])
def test_an_embedded_signature_covers_the_signed_bytes(name: str) -> None:
    container = apr.split(read(name))
    embedded = container.signature

    assert embedded is not None
    assert embedded.public_key.hex() == MANIFEST["signing_public_key"]
    VerifyKey(embedded.public_key).verify(bytes(container.signed_bytes), embedded.signature)


def test_an_altered_signature_is_seen_by_whoever_verifies_it() -> None:
    container = apr.split(read("edge_signed_sig_edit.apr"))

    assert container.signature is not None
    with pytest.raises(BadSignatureError):
        VerifyKey(container.signature.public_key).verify(bytes(container.signed_bytes), container.signature.signature)


def test_an_encrypted_file_is_described_without_its_payload() -> None:
    data = read("linear.zstd.password.signed.apr")
    facts = apr.describe(apr.split(data), digest_of(data))

    assert (facts.encrypted, facts.signed, facts.name, facts.compression) == (True, True, "linear", "zstd")
    assert (facts.layout, facts.n_features, facts.labels) == (None, None, None)
    assert facts.not_servable is not None
    assert "does not declare" in facts.not_servable


def test_a_model_published_by_others_is_decoded() -> None:
    if FIXTURES is None:
        pytest.skip("HOCKET_FIXTURES is not set: the MNIST model is not at hand")
    data = (Path(FIXTURES) / "apr" / "genuine" / "realizar-mnist_784x2-logreg-v0.11.0.apr").read_bytes()

    facts, _ = decode(data)

    assert (facts.layout, facts.n_features, facts.labels) == ("LogisticRegression", 784, ("0", "1"))


def test_files_of_the_older_neighbour_are_named() -> None:
    if FIXTURES is None:
        pytest.skip("HOCKET_FIXTURES is not set: the route-planning models are not at hand")
    for path in (Path(FIXTURES) / "apr" / "genuine").glob("*.apr0"):
        with pytest.raises(HocketError, match="route-planning") as refusal:
            apr.split(path.read_bytes())
        assert refusal.value.reason is Reason.BAD_MAGIC


@pytest.mark.parametrize("name", sorted(regenerate.own_files()))
def test_our_own_golden_files_are_written_the_same_today(name: str) -> None:
    assert regenerate.own_files()[name] == (VECTORS / "hocket" / name).read_bytes()


def test_the_documentation_lists_every_damaged_file_with_its_outcome() -> None:
    page = (VECTORS.parents[1] / "docs" / "packages.md").read_text()

    for name in filter(re.compile("edge_").match, ENTRIES):
        (row,) = [line for line in page.splitlines() if re.search(rf"\b{name.removesuffix('.apr')}\b", line)]
        _, _, reference, here, _ = map(str.strip, row.split("|"))
        ok = ENTRIES[name]["outcome"]["ok"]
        said = ("**reads**" if name in DAMAGE else "reads") if ok else "refuses"  # bold is what we refuse
        assert reference.partition(",")[0] == said
        assert (f"`{DAMAGE[name]}`" if name in DAMAGE else ("SIGNATURE" if "sig_edit" in name else "reads")) in here
