"""What a package says and answers outlasts every way of writing it anew; what no longer holds of it does not."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr, rewriting
from hocket.packages import model as m
from hocket.packages.apr.about import ModelCard, model_card
from hocket.packages.apr.encryption import Password, RecipientKey, seal
from hocket.packages.apr.header import Flag, Header
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.apr.quantization import dequantized_model
from tests import builders

PASSWORD = Password("hunter2")
KEY = RecipientKey(b"\x09" * 32)
SEED = b"\x07" * 32
SIGNING = rewriting.signing_with(SEED)
METADATA = {
    "zeta": [1, 2.5, None],
    "created_at": "1764278947",
    "aprender_version": "0.11.0",
    "custom": {"theirs": {"b": 1, "a": -2}, "hocket": {"labels": ["x", None], "layout": "LogisticRegression"}},
    "alpha": "kept",
}
CARD = ModelCard(
    model_id="iris-1",
    name="iris",
    version="1.0",
    created_at="2025-11-27T00:00:00Z",
    framework_version="hocket",
    metrics={"accuracy": 0.5},
    others={"bias_risks": ["few flowers"]},
)
REWRITINGS: dict[str, Any] = {
    "encrypted": lambda data, **more: rewriting.encrypted(data, KEY.recipient, **{"signing": None, **more}),
    "compressed": lambda data, **more: rewriting.compressed(data, "zstd-max", **more),
    "quantized": lambda data, **more: rewriting.quantized(data, m.QuantKind.Q8_0, **more),
    "with_card": lambda data, **more: rewriting.with_card(data, CARD, **more),
}


def package(**more: Any) -> bytes:
    return builders.apr_bytes(builders.logistic(), **{"metadata": METADATA, **more})


def opened(data: bytes, credential: Any = None) -> Any:
    return apr.decode(apr.split(data), digest_of(data), credential=credential)


def refusal(rewrite: Any, *arguments: Any, **more: Any) -> Reason:
    with pytest.raises(HocketError) as refused:
        rewrite(*arguments, **more)
    return refused.value.reason


@pytest.mark.parametrize(("to", "credential"), [(PASSWORD, PASSWORD), (KEY.recipient, KEY)])
@pytest.mark.parametrize("model", builders.models().values(), ids=list(builders.models()))
def test_a_package_is_decrypted_to_what_was_encrypted(model: Any, to: Any, credential: Any) -> None:
    data = builders.apr_bytes(model)
    sealed = rewriting.encrypted(data, to, signing=None)

    clear = rewriting.decrypted(sealed, credential)

    assert apr.split(sealed).header.encrypted
    assert bytes(apr.split(clear).payload) == bytes(apr.split(data).payload)
    facts, again = opened(clear)
    assert builders.same(again, model)
    assert "parameter_bytes" not in facts.metadata["custom"]["hocket"]
    assert opened(sealed, credential)[0].labels == opened(data)[0].labels


def test_metadata_without_anything_of_ours_comes_back_byte_for_byte() -> None:
    section = b"\x84\xa4zeta\xcb" + struct.pack(">d", 1.5) + b"\xaacreated_at\xd9\x01x"  # "x" need not be so long
    section += b"\xb0aprender_version\xa60.11.0\xa6custom\x81\xa1a\xcc\x02"  # nor need 2
    payload = bytes(apr.split(builders.apr_bytes(compression="none")).payload)
    for to, credential in ((PASSWORD, PASSWORD), (KEY.recipient, KEY)):
        sealed = builders.raw_apr(seal(payload, to), section, flags=0x01, uncompressed_bytes=len(payload))

        assert rewriting.decrypted(sealed, credential) == builders.raw_apr(payload, section)
    assert write_metadata(read_metadata(section)) != section


def test_metadata_keeps_its_order_and_what_nothing_is_about() -> None:
    for name, rewrite in REWRITINGS.items():
        facts = apr.describe(apr.split(rewrite(package())), "sha256:")
        kept = {key: value for key, value in facts.metadata.items() if key not in {"custom", "model_card"}}
        assert list(kept) == [key for key in METADATA if key != "custom"], name
        assert kept.items() <= METADATA.items(), name
        assert facts.metadata["custom"]["theirs"] == {"b": 1, "a": -2}, name
        assert facts.metadata["custom"]["hocket"]["labels"] == ["x", None], name


def test_a_later_writer_s_bytes_of_the_header_are_kept() -> None:
    data = builders.edited(package(), 22, bytes(range(90, 100)))
    data = builders.edited(data, 5, b"\x03")

    for name in ("encrypted", "compressed", "with_card"):
        header = Header.parse(memoryview(REWRITINGS[name](data)))
        assert (header.minor, header.reserved) == (3, bytes(range(90, 100))), name
    assert Header.parse(memoryview(REWRITINGS["quantized"](data))).reserved == bytes(10), "its score is another model's"


@pytest.mark.parametrize("name", REWRITINGS)
def test_a_signature_inside_does_not_survive_unless_it_is_made_anew(name: str) -> None:
    data = package(signing=builders.signer())
    rewrite = REWRITINGS[name]

    assert apr.split(rewrite(data)).signature is None
    container = apr.split(rewrite(data, signing=SIGNING))
    assert container.header.signed
    assert container.signature is not None
    VerifyKey(container.signature.public_key).verify(bytes(container.signed_bytes), container.signature.signature)


def test_encrypting_without_a_signature_has_to_be_said() -> None:
    encrypt: Any = rewriting.encrypted

    with pytest.raises(TypeError, match="signing"):
        encrypt(package(), PASSWORD)
    assert encrypt(package(), PASSWORD, signing=None)


def test_what_is_encrypted_is_signed_as_it_is_stored() -> None:
    container = apr.split(rewriting.encrypted(package(), PASSWORD, signing=SIGNING))

    assert container.header.flags & (Flag.ENCRYPTED | Flag.SIGNED) == Flag.ENCRYPTED | Flag.SIGNED
    assert container.signature is not None
    with pytest.raises(BadSignatureError):
        VerifyKey(container.signature.public_key).verify(bytes(container.payload), container.signature.signature)


@pytest.mark.parametrize("name", REWRITINGS)
def test_an_altered_file_is_not_written_anew(name: str) -> None:
    signed = package(signing=builders.signer())
    altered = builders.edited(signed, signed.index(b"kept"), b"kepT")

    assert refusal(REWRITINGS[name], altered) is Reason.SIGNATURE_INVALID
    assert REWRITINGS[name](signed)


def test_each_rewriting_wants_the_payload_as_it_needs_it() -> None:
    data = package()
    sealed = rewriting.encrypted(data, PASSWORD, signing=None)

    assert refusal(rewriting.encrypted, sealed, PASSWORD, signing=None) is Reason.BAD_REQUEST
    assert refusal(rewriting.compressed, sealed, "none") is Reason.ENCRYPTED
    assert refusal(rewriting.quantized, sealed, m.QuantKind.Q8_0) is Reason.ENCRYPTED
    assert refusal(rewriting.decrypted, data, PASSWORD) is Reason.BAD_REQUEST
    assert refusal(rewriting.decrypted, sealed, Password("other")) is Reason.DECRYPTION_FAILED
    assert refusal(rewriting.decrypted, sealed, KEY) is Reason.WRONG_RECIPIENT
    assert refusal(rewriting.compressed, data, "brotli") is Reason.BAD_REQUEST
    assert refusal(rewriting.encrypted, builders.raw_apr(b"no model"), PASSWORD, signing=None) is Reason.BAD_PAYLOAD


@pytest.mark.parametrize("compression", ["none", "zstd", "zstd-max", "lz4"])
@pytest.mark.parametrize("before", ["none", "zstd", "lz4"])
def test_a_payload_compressed_otherwise_is_the_same_payload(before: Any, compression: Any) -> None:
    data = package(compression=before)
    again = rewriting.compressed(data, compression)

    assert bytes(apr.split(again).metadata) == bytes(apr.split(data).metadata)
    assert builders.same(opened(again)[1], opened(data)[1])
    assert again == package(compression=compression)


def test_a_payload_that_nobody_can_read_can_be_compressed() -> None:
    strange = builders.raw_apr(bytes(5000), model_type_id=0xFF)

    small = rewriting.compressed(strange, "zstd")

    assert len(small) < 200
    assert rewriting.compressed(small, "none") == strange


@pytest.mark.parametrize("kind", m.QuantKind)
def test_a_quantised_package_says_so_and_answers_nearly_alike(kind: m.QuantKind) -> None:
    coefficients = np.linspace(-1, 1, 96, dtype=np.float32)
    data = builders.apr_bytes(m.Ridge(coefficients, 0.5, alpha=0.25), name="ridge", compression="none")

    smaller = rewriting.quantized(data, kind)

    facts, model = opened(smaller)
    assert len(smaller) < len(data)
    assert (facts.layout, facts.quantization, facts.name) == ("Quantized<Ridge>", str(kind), "ridge")
    assert "QUANTIZED" in facts.flags
    most = 1 / 127 if kind is m.QuantKind.Q8_0 else 1 / 7
    plain: Any = dequantized_model(model)
    np.testing.assert_allclose(plain.coefficients, coefficients, atol=0.51 * most)
    assert refusal(rewriting.quantized, smaller, kind) is Reason.UNSUPPORTED_LAYOUT
    assert refusal(rewriting.quantized, builders.apr_bytes(builders.forest()), kind) is Reason.UNSUPPORTED_LAYOUT


def test_a_quantised_mixture_names_the_layout_of_its_experts() -> None:
    facts, model = opened(rewriting.quantized(builders.apr_bytes(builders.mixture()), m.QuantKind.Q4_0))

    assert facts.layout == "Quantized<MixtureOfExperts>"
    assert facts.expert_layout == "LinearRegression"
    assert isinstance(model.gate.weights, m.Quantized)


@pytest.mark.parametrize("name", REWRITINGS)
def test_flags_say_of_every_rewriting_what_is_in_the_file(name: str) -> None:
    data = package(metadata={**METADATA, "license": {"uuid": "u", "hash": "h", "tier": "Team"}})
    own = {"encrypted": {"ENCRYPTED"}, "quantized": {"QUANTIZED"}}.get(name, set())

    def flags(data: bytes, **more: Any) -> set[str]:
        return set(apr.describe(apr.split(REWRITINGS[name](data, **more)), "sha256:").flags)

    assert flags(rewriting.with_card(data, CARD)) == {"LICENSED", "HAS_MODEL_CARD", *own}
    assert flags(rewriting.with_card(data, CARD), signing=SIGNING) == {"LICENSED", "HAS_MODEL_CARD", "SIGNED", *own}
    assert flags(package()) == own | ({"HAS_MODEL_CARD"} if name == "with_card" else set())


def test_a_card_is_put_in_replaced_and_taken_away() -> None:
    carded = rewriting.with_card(package(), CARD)
    facts, _ = opened(carded)

    assert model_card(facts.metadata) == CARD
    assert facts.flags == ("HAS_MODEL_CARD",)
    other = ModelCard(model_id="i", name="n", version="2", created_at="x", framework_version="y")
    again = opened(rewriting.with_card(carded, other))[0].metadata
    assert again["model_card"] == {
        "model_id": "i",
        "name": "n",
        "version": "2",
        "created_at": "x",
        "framework_version": "y",
    }
    assert rewriting.with_card(carded, None) == package()


def test_a_card_goes_into_an_encrypted_package_without_its_credential() -> None:
    carded = rewriting.with_card(rewriting.encrypted(package(), PASSWORD, signing=None), CARD)

    assert model_card(opened(carded, PASSWORD)[0].metadata) == CARD


def test_a_card_that_is_none_is_refused() -> None:
    broken = ModelCard(model_id="i", name="n", version="2", created_at="x", framework_version="y", param_count=-1)

    assert refusal(rewriting.with_card, package(), broken) is Reason.BAD_METADATA
