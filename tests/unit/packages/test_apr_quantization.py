"""Quantised arrays and quantised models: the reference's bytes, our layouts for them, and what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.apr.quantization import dequantize, dequantized_model, floats, quantize, quantized_model
from hocket.packages.model import Quantized, QuantKind
from tests import builders
from tests.builders import QUANTIZABLE

VALUES = builders.floats(1, -1, 2, -2, 0.5, -0.5, 0, 0.25)
RAMP = (np.arange(32, dtype=np.float32) - 16) / 8


def refusal(action: Any, *args: Any, **named: Any) -> HocketError:
    with pytest.raises(HocketError) as error:
        action(*args, **named)
    return error.value


def decode(data: bytes) -> tuple[m.ModelFacts, Any]:
    return apr.decode(apr.split(data), "sha256:")


def block_file(image: bytes, type_id: int = 0x21, **hocket: Any) -> bytes:
    return builders.raw_apr(image, {**builders.METADATA, "custom": {"hocket": hocket}}, model_type_id=type_id)


class TestBlocks:
    @pytest.mark.parametrize(
        ("values", "kind", "blocks"),
        [
            (VALUES, QuantKind.Q8_0, "0824 40c07f8120e00010" + "00" * 24),
            (VALUES, QuantKind.Q4_0, "9234 5b1f6a98" + "88" * 12),
            (
                RAMP,
                QuantKind.Q8_0,
                "0824 81899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77",
            ),
            (RAMP, QuantKind.Q4_0, "9234 11223344556576878899aabbcbdcedfe"),
        ],
    )
    def test_the_reference_s_worked_vectors_are_met(self, values: Any, kind: QuantKind, blocks: str) -> None:
        assert quantize(values, kind) == Quantized(kind, values.shape, bytes.fromhex(blocks))

    def test_blocks_stand_for_the_reference_s_values(self) -> None:
        assert dequantize(quantize(VALUES, QuantKind.Q8_0)).tolist() == [
            *(1.0078125, -1.0078125, 1.9998779296875, -1.9998779296875),
            *(0.50390625, -0.50390625, 0.0, 0.251953125),
        ]
        assert dequantize(quantize(VALUES, QuantKind.Q4_0)).tolist() == [
            *(0.85693359375, -0.85693359375, 1.99951171875, -1.99951171875),
            *(0.5712890625, -0.5712890625, 0.0, 0.28564453125),
        ]

    def test_halves_are_rounded_away_from_zero(self) -> None:
        quantized = quantize(
            builders.floats(127, 0.5, -0.5, 1.5, -1.5, 2.5, np.nextafter(np.float32(0.5), 0)), QuantKind.Q8_0
        )

        assert np.frombuffer(quantized.blocks, np.int8)[2:9].tolist() == [127, 1, -1, 2, -2, 3, 0]

    def test_a_block_of_zeros_has_the_scale_1_and_padding_is_zero(self) -> None:
        assert quantize(np.zeros(1, np.float32), QuantKind.Q8_0).blocks.hex() == "003c" + "00" * 32
        assert quantize(np.zeros(33, np.float32), QuantKind.Q4_0).blocks.hex() == ("003c" + "88" * 16) * 2

    def test_values_whose_scale_vanishes_are_the_reference_s_zeros(self) -> None:
        tiny = quantize(builders.floats(1e-45, 0, -1e-45), QuantKind.Q8_0)

        assert tiny.blocks.hex() == "0000" + "7f0081" + "00" * 29
        assert dequantize(tiny).tolist() == [0, 0, 0]

    def test_an_array_of_no_values_has_no_blocks(self) -> None:
        empty = quantize(np.zeros((0, 3), np.float32), QuantKind.Q8_0)

        assert (empty.blocks, empty.shape, empty.size) == (b"", (0, 3), 0)
        assert dequantize(empty).shape == (0, 3)

    @pytest.mark.parametrize(("kind", "most"), [(QuantKind.Q8_0, 127.0), (QuantKind.Q4_0, 7.0)])
    def test_values_too_large_for_a_float16_scale_are_refused(self, kind: QuantKind, most: float) -> None:
        assert dequantize(quantize(builders.floats(65504 * most), kind)).tolist() == [65504 * most]
        assert refusal(quantize, builders.floats(65520 * most), kind).reason is Reason.BAD_PAYLOAD

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_are_refused(self, value: float) -> None:
        assert refusal(quantize, builders.floats(1, value), QuantKind.Q8_0).reason is Reason.BAD_PAYLOAD

    @settings(max_examples=60, deadline=None)
    @given(
        arrays(np.float32, array_shapes(max_dims=3, max_side=12), elements=st.floats(-(2.0**18), 2.0**18, width=32)),
        st.sampled_from(QuantKind),
    )
    def test_no_value_moves_by_more_than_half_a_step(self, values: Any, kind: QuantKind) -> None:
        again = dequantize(quantize(values, kind))

        assert again.shape == values.shape
        padded = np.zeros(-(-values.size // 32) * 32, np.float32)
        padded[: values.size] = values.ravel()
        largest = np.abs(padded.reshape(-1, 32)).max(axis=1).repeat(32)[: values.size].reshape(values.shape)
        # Half a step, and what float16 takes from a scale: 11 bits, or what lies below its smallest number.
        steps = {QuantKind.Q8_0: 127, QuantKind.Q4_0: 7}[kind]
        bound = largest / steps * 0.5001 + largest * 2.0**-11 + steps * 2.0**-25
        assert (np.abs(again - values) <= bound).all()


class TestRecords:
    IMAGE = bytes.fromhex(
        "01000000 0100000000000000 0800000000000000 1200000000000000 9234 5b1f6a98" + "88" * 12 + "2000000000000000"
    )

    def test_the_reference_s_record_is_read_and_written_the_same(self) -> None:
        facts, model = decode(block_file(self.IMAGE))

        assert model == quantize(VALUES, QuantKind.Q4_0)
        assert (facts.layout, facts.quantization, facts.parameter_bytes) == ("QuantizedBlock", "q4_0", 0)
        assert (facts.n_features, facts.output_columns, facts.labels) == (None, 1, None)
        assert facts.not_servable == "it is a lone quantised tensor, not a model"
        again = apr.write(model, metadata=builders.METADATA, compression="none")
        assert bytes(apr.split(again).payload) == self.IMAGE
        assert apr.split(again).header.flags == 0, "the reference sets no flag"

    @pytest.mark.parametrize("type_id", [0x01, 0x03, 0x07, 0x09, 0x20, 0x40, 0xFF])
    def test_it_is_known_under_any_model_type(self, type_id: int) -> None:
        assert decode(block_file(self.IMAGE, type_id))[0].layout == "QuantizedBlock"
        assert decode(block_file(self.IMAGE, type_id, layout="QuantizedBlock"))[0].layout == "QuantizedBlock"

    def test_a_payload_that_is_none_is_refused_as_a_model_of_a_family_nobody_knows(self) -> None:
        assert refusal(decode, block_file(self.IMAGE[:-1])).reason is Reason.UNSUPPORTED_LAYOUT
        assert refusal(decode, block_file(self.IMAGE[:-1], layout="QuantizedBlock")).reason is Reason.BAD_PAYLOAD

    @pytest.mark.parametrize(
        ("offset", "new", "why"),
        [
            (0, struct.pack("<I", 2), "2 is none of"),  # Q4_1, which the reference cannot encode either
            (0, struct.pack("<I", 0), "18 bytes of q8_0 blocks are not an array of 8"),
            (4, struct.pack("<Q", 0), "has 0 dimensions"),
            (4, struct.pack("<Q", 9), "has 9 dimensions"),
            (12, struct.pack("<Q", 33), "18 bytes of q4_0 blocks are not an array of 33"),
            (12, struct.pack("<Q", 2**40), "more than 268435456 quantised values"),
            (20, struct.pack("<Q", 36), "36 bytes of q4_0 blocks are not"),
            (28, b"\x00\x7c", "scale of a quantised block is not finite"),
            (46, struct.pack("<Q", 64), "other than 32 values"),
        ],
    )
    def test_each_damage_is_told(self, offset: int, new: bytes, why: str) -> None:
        image = self.IMAGE[:offset] + new + self.IMAGE[offset + len(new) :]

        error = refusal(decode, block_file(image, layout="QuantizedBlock"))

        assert why in error.message
        assert error.reason in {Reason.BAD_PAYLOAD, Reason.TOO_LARGE}


class TestModels:
    @pytest.mark.parametrize("kind", QuantKind)
    @pytest.mark.parametrize("layout", QUANTIZABLE)
    def test_a_quantised_model_survives_writing_and_reading(self, layout: str, kind: QuantKind) -> None:
        plain = builders.models()[layout]
        model = quantized_model(plain, kind)
        data = builders.apr_bytes(model)

        facts, again = decode(data)

        assert builders.same(again, model)
        before, _ = decode(builders.apr_bytes(plain))
        assert (facts.layout, facts.quantization) == (f"Quantized<{layout}>", kind)
        assert facts.metadata["custom"]["hocket"]["layout"] == f"Quantized<{layout}>"
        assert facts.flags == ("QUANTIZED",)
        for name in (
            *("expert_layout", "n_features", "n_features_min", "output_columns", "labels", "expert_count"),
            *("output_range", "parameter_bytes", "not_servable", "model_type_id"),
        ):
            assert getattr(facts, name) == getattr(before, name), name

    @pytest.mark.parametrize("layout", QUANTIZABLE)
    def test_nobody_takes_a_quantised_model_for_a_plain_one(self, layout: str) -> None:
        model = quantized_model(builders.models()[layout], QuantKind.Q8_0)
        data = builders.apr_bytes(model, compression="none")
        container = apr.split(data)

        bare = builders.raw_apr(bytes(container.payload), model_type_id=container.header.model_type_id)

        assert refusal(decode, bare).reason in {Reason.BAD_PAYLOAD, Reason.TOO_LARGE, Reason.UNSUPPORTED_LAYOUT}

    @pytest.mark.parametrize("layout", QUANTIZABLE)
    def test_it_answers_as_what_its_blocks_stand_for(self, layout: str) -> None:
        model = quantized_model(builders.models()[layout], QuantKind.Q4_0)

        plain = dequantized_model(model)

        assert decode(builders.apr_bytes(plain))[0].quantization is None
        assert dequantized_model(plain) is plain

    def test_what_a_signature_says_of_flags_is_kept(self) -> None:
        model = quantized_model(builders.linear(), QuantKind.Q8_0)

        assert decode(builders.apr_bytes(model, signing=builders.signer()))[0].flags == ("SIGNED", "QUANTIZED")
        licensed = {**builders.METADATA, "license": {"uuid": "u", "hash": "h", "tier": "Team"}}
        licensed["custom"] = {"hocket": {"layout": "Quantized<LinearRegression>"}}
        assert decode(apr.write(model, metadata=licensed))[0].flags == ("LICENSED", "QUANTIZED")

    @pytest.mark.parametrize("layout", sorted({*builders.models()} - {*QUANTIZABLE}))
    def test_trees_and_naive_bayes_cannot_be_quantised(self, layout: str) -> None:
        error = refusal(quantized_model, builders.models()[layout], QuantKind.Q8_0)

        assert error.reason is Reason.UNSUPPORTED_LAYOUT
        assert layout in error.message

    def test_nothing_is_quantised_twice_or_before_it_was_fitted(self) -> None:
        once: Any = quantized_model(builders.linear(), QuantKind.Q8_0)

        assert "already" in refusal(quantized_model, once, QuantKind.Q8_0).message
        assert "already" in refusal(quantized_model, once.coefficients, QuantKind.Q8_0).message
        assert "never fitted" in refusal(quantized_model, m.LinearRegression(None, 0.5), QuantKind.Q8_0).message

    def test_a_model_whose_weights_are_not_all_blocks_of_one_kind_is_not_written(self) -> None:
        both: list[Any] = [quantized_model(builders.linear(), kind) for kind in QuantKind]
        mixed = quantized_model(builders.mixture(), QuantKind.Q8_0)

        for experts in (both, (both[0], builders.linear())):
            error = refusal(builders.apr_bytes, replace(mixed, experts=tuple(experts)))
            assert error.reason is Reason.BAD_PAYLOAD

    def test_blocks_of_another_shape_are_refused(self) -> None:
        matrix = quantize(np.ones((2, 3), np.float32), QuantKind.Q8_0)
        clusters: Any = quantized_model(builders.models()["KMeans"], QuantKind.Q8_0)

        assert refusal(builders.apr_bytes, m.LinearRegression(matrix, 0.0)).reason is Reason.BAD_PAYLOAD
        assert refusal(builders.apr_bytes, replace(clusters, centroids=matrix)).reason is Reason.BAD_PAYLOAD
        hollow = quantize(np.ones((3, 0), np.float32), QuantKind.Q8_0)
        assert refusal(builders.apr_bytes, replace(clusters, centroids=hollow)).reason is Reason.BAD_PAYLOAD
        gate = replace(quantized_model(builders.mixture(), QuantKind.Q8_0), gate=m.SoftmaxGate(matrix))
        assert decode(builders.apr_bytes(gate))[0].not_servable is not None
        assert builders.same(floats(matrix), dequantize(matrix))

    def test_a_gate_whose_blocks_are_of_another_size_than_it_says_is_refused(self) -> None:
        data = builders.apr_bytes(quantized_model(builders.mixture(), QuantKind.Q8_0), compression="none")
        payload = bytes(apr.split(data).payload)
        at = payload.index(struct.pack("<QQf", 2, 2, 0.5))
        hocket = {"layout": "Quantized<MixtureOfExperts>", "expert_layout": "LinearRegression"}

        assert decode(block_file(payload, 0x40, **hocket))[0].expert_count == 2
        wrong = payload[:at] + struct.pack("<QQ", 4, 1) + payload[at + 16 :]
        assert "4 features x 1 experts" in refusal(decode, block_file(wrong, 0x40, **hocket)).message
