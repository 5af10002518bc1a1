from __future__ import annotations

import struct
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages.apr.bincode import Codec, Reader
from hocket.packages.apr.layouts import Layout, candidates, read_model
from hocket.packages.apr.quantization import quantize, quantized_model
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import DecisionTreeClassifier, ModelFacts, QuantKind
from tests import apr_oracle, archives, builders

if TYPE_CHECKING:
    from types import FrameType

LINEAR = "01 0200000000000000 00000040 000080bf 0000003f 01"
EXPERTS = f"0200000000000000 {LINEAR} 01 0200000000000000 00000000 00004040 000080bf 01"
GATE = "0200000000000000 0200000000000000 0000003f 0400000000000000 0000803f 000080bf 0000003f 0000803e"
CONFIG = "0200000000000000 0000803f 00000000 0ad7233c"
SPLIT = "00000000 0100000000000000 0000003f"
LEAF_0 = "01000000 0000000000000000 0300000000000000"
LEAF_2 = "01000000 0200000000000000 0400000000000000"
DEPTH_3 = "01 0300000000000000"
TREE = f"01 {SPLIT} {LEAF_0} {LEAF_2}"
NAN = "0000c07f"


def decode(
    payload: str | bytes, model_type_id: int = 1, limits: Limits = DEFAULT_LIMITS, **hocket: Any
) -> tuple[ModelFacts, Any]:
    image = bytes.fromhex(payload) if isinstance(payload, str) else payload
    version = hocket.pop("aprender_version", "0.11.0")
    metadata = {**builders.METADATA, "aprender_version": version, "custom": {"hocket": hocket}}
    data = builders.raw_apr(image, metadata, model_type_id=model_type_id)
    return apr.decode(apr.split(data), "sha256:", limits)


def refusal(*args: Any, **named: Any) -> HocketError:
    with pytest.raises(HocketError) as error:
        decode(*args, **named)
    return error.value


def test_the_reference_s_plain_linear_file_is_decoded_and_written_the_same() -> None:
    data = bytes.fromhex(
        f"4150524e 0100 0100 2f000000 16000000 16000000 00 00 00000000000000000000"
        "82 aa637265617465645f6174 aa31373634323738393437 b0617072656e6465725f76657273696f6e a6302e31312e30"
        f"{LINEAR} 31e3cadb"
    )
    facts, model = apr.decode(apr.split(data), "sha256:")

    assert (facts.layout, facts.n_features, facts.name) == ("LinearRegression", 2, None)
    assert builders.same(model, builders.linear(2, -1, intercept=0.5))
    assert apr.write(model, metadata=facts.metadata, compression="none") == data


def test_the_reference_s_signed_file_is_written_the_same() -> None:
    signature = (
        "30e0f27c9d4c70a1b6bc64c29a26597d433c3d22a3e4dec14d72eac3fc1d7668"
        "94421e525fa6536915c28181b5968d8d617c10e834d053f9d490619fe416530f"
        "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c c33e3492"
    )

    data = apr.write(
        builders.linear(2, -1, intercept=0.5),
        metadata=builders.METADATA,
        compression="none",
        signing=builders.signer(b"\x07" * 32),
    )

    assert data[21] == 0x02
    assert data[-100:] == bytes.fromhex(signature)


def test_the_reference_s_mixture_is_decoded_answers_and_is_written_the_same() -> None:
    payload = bytes.fromhex(EXPERTS + GATE + CONFIG)

    facts, model = decode(payload, 0x40)

    assert (facts.layout, facts.expert_layout, facts.expert_count) == ("MixtureOfExperts", "LinearRegression", 2)
    assert builders.same(model, builders.mixture())
    row = np.array([0.2, 0.4], np.float32)
    np.testing.assert_allclose(apr_oracle.gate_weights(model.gate, row), [0.7310586, 0.26894143], rtol=1e-6)
    np.testing.assert_allclose(apr_oracle.predict(model, [row]), [[0.4193176]], rtol=1e-6)
    again = apr.write(model, metadata=builders.METADATA, compression="none")
    assert bytes(apr.split(again).payload) == payload


def test_the_reference_s_tree_is_decoded_and_written_the_same() -> None:
    payload = bytes.fromhex(TREE + DEPTH_3)

    facts, model = decode(payload, 3)

    assert builders.same(model, DecisionTreeClassifier(builders.grow((1, 0.5, (0, 3), (2, 4))), max_depth=3))
    assert (facts.n_features, facts.n_features_min, facts.labels) == (None, 2, ("0", "1", "2"))
    again = apr.write(model, metadata=builders.METADATA, compression="none")
    assert bytes(apr.split(again).payload) == payload


@pytest.mark.parametrize("layout", builders.models())
def test_every_layout_is_told_from_its_siblings_without_a_record(layout: str) -> None:
    model = builders.models()[layout]
    metadata = {**builders.METADATA, "custom": {"hocket": {"layout": layout}}}
    payload = apr.split(apr.write(model, metadata=metadata, compression="none")).payload
    type_id = apr.split(builders.apr_bytes(model)).header.model_type_id

    if layout == "DenseNetwork":  # ours alone: nobody guesses it
        assert refusal(bytes(payload), type_id).reason is Reason.UNSUPPORTED_LAYOUT
        assert builders.same(decode(bytes(payload), type_id, layout=layout)[1], model)
        return
    facts, again = decode(bytes(payload), type_id)

    assert facts.layout == layout
    assert builders.same(again, model if facts.n_features else replace(model, n_features=None))


def test_a_tree_of_later_releases_carries_its_width() -> None:
    old, new = TREE + DEPTH_3, TREE + DEPTH_3 + "01 0500000000000000"

    assert decode(old, 3)[0].n_features is None
    assert decode(new, 3)[0].n_features == 5
    assert decode(new + "", 3, aprender_version="0.13.0")[1].n_features == 5
    assert decode(TREE + "00 00", 3)[1].n_features is None
    assert refusal(TREE + "00 01 0100000000000000", 3).reason is Reason.BAD_PAYLOAD, "it splits on column 1"


def test_a_forest_of_later_releases_carries_its_width() -> None:
    def forest(*trees: str) -> str:
        return f"{len(trees):02x}00000000000000 {' '.join(trees)} 0200000000000000 00 00 0000000000000000 00 00"

    tree = TREE + "00"
    assert decode(forest(tree, tree), 4)[0].n_features is None
    assert decode(forest(*[tree + "01 0500000000000000"] * 2), 4)[0].n_features == 5
    mixed = forest(tree + "01 0500000000000000", tree + "01 0600000000000000")
    assert refusal(mixed, 4).reason is Reason.BAD_PAYLOAD


UNFITTED = "the model was never fitted: parameters that prediction needs are absent"


def test_a_short_linear_model_is_not_taken_for_an_unfitted_sibling() -> None:
    assert decode(LINEAR)[0].layout == "LinearRegression"
    assert refusal(LINEAR, layout="Lasso").reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize(
    ("payload", "model_type_id", "layout"),
    [
        ("00 0000003f 01", 1, "LinearRegression"),
        ("0000003f 00 0000003f 01", 1, "Ridge"),
        ("0000003f 00 0000003f 01 e803000000000000 0000003f", 1, "Lasso"),
        ("0000003f 0000003f 00 0000003f 01 e803000000000000 0000003f", 1, "ElasticNet"),
        ("00 0000003f 0000003f e803000000000000 0000003f", 2, "LogisticRegression"),
        ("00 00", 3, "DecisionTreeClassifier"),
        ("00 00 0200000000000000 0100000000000000", 3, "DecisionTreeRegressor"),
        ("0000000000000000" * 2 + "00 00" + "0000000000000000" + "00 00", 4, "RandomForestClassifier"),
        ("0100000000000000 00 00 0100000000000000 00 00 0000000000000000 00 00", 4, "RandomForestClassifier"),
        ("0000000000000000" + GATE + CONFIG, 0x40, "MixtureOfExperts"),
        ("6400000000000000 cdcccc3d 0300000000000000 00000000 0000000000000000", 5, "GradientBoostingClassifier"),
        ("00 00 00 00 5f708930", 8, "GaussianNB"),
        ("0300000000000000 00000000 00 00 00", 9, "KNearestNeighbors"),
        ("00 00000000 0000803f 0ad7233c e803000000000000 17b7d138", 10, "LinearSVM"),
        (EXPERTS[:16] + "00 0000003f 01" * 2 + GATE + CONFIG, 0x40, "MixtureOfExperts"),
    ],
)
def test_a_model_never_fitted_is_decoded_and_said_not_to_serve(payload: str, model_type_id: int, layout: str) -> None:
    facts, _ = decode(payload, model_type_id)

    assert (facts.layout, facts.not_servable, facts.parameter_bytes) == (layout, UNFITTED, 0)
    regressors = {"LinearRegression", "Ridge", "Lasso", "ElasticNet", "DecisionTreeRegressor", "MixtureOfExperts"}
    assert facts.output_range == (None if layout in regressors else (0.0, 1.0))


def test_a_payload_that_two_layouts_fit_is_refused_unless_the_writer_s_version_decides() -> None:
    payload = memoryview(bytes.fromhex(LINEAR))
    (layout,) = candidates(1, {"layout": "LinearRegression"})
    old, new = replace(layout, since_0_13=False), replace(layout, since_0_13=True)

    for version, wanted in (("0.11.0", old), ("0.13", new), ("1.0.0-rc1", new), ("9" * 5000, old), (None, old)):
        assert read_model(payload, (old, new), version, DEFAULT_LIMITS)[0] is wanted
    with pytest.raises(HocketError, match=r"custom\.hocket\.layout") as error:
        read_model(payload, (layout, layout), "0.11.0", DEFAULT_LIMITS)
    assert error.value.reason is Reason.UNSUPPORTED_LAYOUT


def test_what_fits_is_copied_once_and_what_it_could_have_been_not_at_all() -> None:
    ridge = replace(builders.models()["Ridge"], coefficients=np.ones(2**20, np.float32))
    payload = bytes(apr.split(builders.apr_bytes(ridge, compression="none")).payload)

    cost = archives.cost(lambda: read_model(memoryview(payload), candidates(1, {}), "0.11.0", DEFAULT_LIMITS))

    assert 2**22 < cost.peak_bytes < 1.1 * 2**22
    model = read_model(memoryview(payload), candidates(1, {}), "0.11.0", DEFAULT_LIMITS)[1]
    assert builders.same(model, ridge)


def test_a_reading_that_is_not_the_first_to_fit_has_arrays_of_its_own() -> None:
    payload = bytearray.fromhex("00 0000003f 01")
    fitted = bytes.fromhex(LINEAR)
    (linear,) = candidates(1, {"layout": "LinearRegression"})
    unfitted = replace(linear, codec=Codec(lambda reader: _read_past(reader, payload), linear.codec.write))

    layout, model = read_model(memoryview(fitted), (unfitted, linear), "0.11.0", DEFAULT_LIMITS)

    assert layout is linear
    assert not np.shares_memory(model.coefficients, np.frombuffer(fitted, np.uint8))  # type: ignore[union-attr] # linear


def _read_past(reader: Reader, payload: bytearray) -> Any:
    """The model of another payload, as if it were all of this one."""
    reader.take(reader.rest)
    return candidates(1, {"layout": "LinearRegression"})[0].codec.read(Reader(memoryview(payload), reader.limits))


def calls(model: Any) -> int:
    """Functions that are called to read a model, Python's and numpy's, within the limits that hold by default."""
    container = apr.split(builders.apr_bytes(model, metadata=builders.METADATA))
    count = 0

    def see(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(see)
    try:
        apr.decode(container, "sha256:")
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("stumps", [False, True])
def test_reading_trees_takes_work_in_proportion_to_their_number_and_nodes(stumps: bool) -> None:  # noqa: FBT001 - a parameter of the test
    if stumps:
        tree = builders.grow((0, 0.5, (0, 3), (1, 2)))
        some, twice = (calls(builders.forest(*(tree,) * count)) for count in (1000, 2000))
        assert some < 150 * 1000
    else:
        some, twice = (calls(DecisionTreeClassifier(builders.chain(depth))) for depth in (512, 1024))
        assert some < 6 * 1025
    assert twice < 2.1 * some


def test_a_version_s_variant_that_fits_is_the_only_one_that_is_tried() -> None:
    payload = memoryview(bytes.fromhex(LINEAR))
    (layout,) = candidates(1, {"layout": "LinearRegression"})
    tried = []

    def reading(*, since_0_13: bool) -> Layout:
        def read(reader: Reader) -> Any:
            tried.append(since_0_13)
            return layout.codec.read(reader)

        return replace(layout, codec=Codec(read, layout.codec.write), since_0_13=since_0_13)

    variants = (reading(since_0_13=False), reading(since_0_13=True))
    for version, wanted in (("0.11.0", False), ("0.13.0", True)):
        tried.clear()
        read_model(payload, variants, version, DEFAULT_LIMITS)
        assert tried == [wanted]


def test_a_recorded_layout_decides_whatever_the_type_id() -> None:
    ridge = "0000803e" + LINEAR

    assert decode(ridge, 0xFF, layout="Ridge")[0].layout == "Ridge"
    assert refusal(ridge, 0xFF).reason is Reason.UNSUPPORTED_LAYOUT
    assert refusal(ridge, 1, layout="LinearRegression").reason is Reason.BAD_PAYLOAD
    assert refusal(ridge, 1, layout="QuantizedBlock").reason is Reason.BAD_PAYLOAD
    assert refusal(ridge, 1, layout="Quantized<RandomForestClassifier>").reason is Reason.UNSUPPORTED_LAYOUT
    assert refusal(ridge, 1, layout=7).reason is Reason.BAD_METADATA
    mixture = EXPERTS + GATE + CONFIG
    assert decode(mixture, 0x40, layout="MixtureOfExperts", expert_layout="LinearRegression")
    assert refusal(mixture, 0x40, expert_layout="Ridge").reason is Reason.BAD_PAYLOAD
    assert refusal(mixture, 0x40, expert_layout="KMeans").reason is Reason.UNSUPPORTED_LAYOUT


@pytest.mark.parametrize("hocket", [["layout"], [], "", 0, False])
def test_our_own_metadata_must_be_a_map(hocket: object) -> None:
    data = builders.raw_apr(bytes.fromhex(LINEAR), {**builders.METADATA, "custom": {"hocket": hocket}})

    with pytest.raises(HocketError) as error:
        apr.decode(apr.split(data), "sha256:")

    assert error.value.reason is Reason.BAD_METADATA


@pytest.mark.parametrize("metadata", [{}, {"custom": None}, {"custom": {}}, {"custom": {"hocket": None}}])
def test_our_own_metadata_may_be_absent(metadata: dict[str, Any]) -> None:
    data = builders.raw_apr(bytes.fromhex(LINEAR), {**builders.METADATA, **metadata})

    assert apr.decode(apr.split(data), "sha256:")[0].layout == "LinearRegression"


@pytest.mark.parametrize(
    ("payload", "model_type_id", "wanted"),
    [
        ("02" + LINEAR[2:], 1, "option tag is 2"),
        (LINEAR[:-2] + "02", 1, "boolean is 2"),
        (LINEAR + "00", 1, "1 bytes follow"),
        (LINEAR[:-2], 1, "1 bytes are needed"),
        ("", 1, "1 bytes are needed"),
        (LINEAR.replace("0000003f", NAN), 1, "not finite"),
        (LINEAR.replace("000080bf", NAN), 1, "not finite"),
        ("01 ffffffffffffffff" + LINEAR[19:], 1, "are announced"),
        (TREE.replace("0000003f", NAN) + "00", 3, "not finite"),
        (TREE.replace("01000000 02", "02000000 02") + "00", 3, "node has tag 2"),
        (TREE[:-2] + "00", 3, "ends inside a tree|bytes are needed"),
        (TREE.replace("0400000000000000", "04000000000000ff") + "00", 3, "samples in a leaf"),
        ("ffffffffffffffff" + EXPERTS[16:] + GATE + CONFIG, 0x40, "experts are announced"),
        (EXPERTS + GATE.replace("0000003f 04", "00000000 04") + CONFIG, 0x40, "temperature is 0.0"),
        (EXPERTS + GATE.replace("0000003f 04", "000000bf 04") + CONFIG, 0x40, "temperature is -0.5"),
        (EXPERTS + GATE.replace("0000003f 04", NAN + " 04") + CONFIG, 0x40, "not finite"),
        (EXPERTS + "01" + GATE[2:] + CONFIG, 0x40, "has 4 weights"),
        (EXPERTS + "0000000000000080" + GATE[16:] + CONFIG, 0x40, "more than 2097152 features"),
        (EXPERTS + GATE[:17] + "0000000000000080" + GATE[33:] + CONFIG, 0x40, "more than 16384 experts"),
    ],
)
def test_each_damage_of_a_payload_is_told(payload: str, model_type_id: int, wanted: str) -> None:
    with pytest.raises(HocketError, match=wanted) as error:
        decode(payload, model_type_id)
    assert error.value.reason in {Reason.BAD_PAYLOAD, Reason.TOO_LARGE}


def kmeans(rows: int, columns: int, values: int, clusters: int) -> bytes:
    head = struct.pack("<QQfBBQ", clusters, 300, 0.5, 0, 1, values)
    return head + bytes(4 * values) + struct.pack("<QQBfQ", rows, columns, 0, 0.0, 1)


def test_a_matrix_has_the_values_its_shape_asks_for() -> None:
    assert decode(kmeans(3, 2, 6, 3), 6)[0].n_features == 2
    assert refusal(kmeans(3, 2, 5, 3), 6).reason is Reason.BAD_PAYLOAD
    assert refusal(kmeans(2**63, 2, 6, 3), 6).reason is Reason.BAD_PAYLOAD
    assert refusal(kmeans(2**63, 0, 0, 3), 6).reason is Reason.BAD_PAYLOAD
    assert refusal(kmeans(0, 2**63, 0, 3), 6).reason is Reason.TOO_LARGE
    assert refusal(kmeans(3, 2, 6, 4), 6).reason is Reason.BAD_PAYLOAD
    assert refusal(kmeans(3, 2, 6, 2**40), 6).reason is Reason.TOO_LARGE
    assert decode(kmeans(0, 5, 0, 0), 6)[0].not_servable == "the model has no clusters"


@pytest.mark.parametrize(
    ("limit", "model", "size"),
    [
        ("features", builders.linear(1, 2, 3), 3),
        ("features", builders.models()["KMeans"], 2),
        ("features", DecisionTreeClassifier(builders.grow((4, 0.5, (0, 1), (1, 1)))), 5),
        ("labels", DecisionTreeClassifier(builders.grow((4, 0.5, (0, 1), (6, 1)))), 7),
        ("labels", builders.models()["KMeans"], 3),
        ("labels", builders.models()["GaussianNB"], 2),
        ("labels", builders.neighbors(), 2),
        ("labels", builders.dense(), 2),
        ("features", builders.neighbors(), 2),
        ("features", builders.dense(), 3),
        ("layers", builders.dense(), 2),
        ("trees", builders.models()["GradientBoostingClassifier"], 2),
        ("features", quantized_model(builders.linear(1, 2, 3), QuantKind.Q8_0), 3),
        ("uncompressed_bytes", quantize(np.ones(4000, np.float32), QuantKind.Q8_0), 16_000),
        ("experts", builders.mixture(), 2),
        ("trees", builders.forest(), 2),
        ("tree_nodes", builders.forest(), 6),
        ("tree_depth", DecisionTreeClassifier(builders.chain(9)), 9),
    ],
)
def test_each_count_has_a_limit(limit: str, model: Any, size: int) -> None:
    container = apr.split(builders.apr_bytes(model))

    apr.decode(container, "sha256:", replace(DEFAULT_LIMITS, **{limit: size}))
    with pytest.raises(HocketError) as error:
        apr.decode(container, "sha256:", replace(DEFAULT_LIMITS, **{limit: size - 1}))

    assert error.value.reason is Reason.TOO_LARGE


def test_the_deepest_tree_is_read_and_written_without_recursion() -> None:
    deep = DecisionTreeClassifier(builders.chain(DEFAULT_LIMITS.tree_depth))

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        data = builders.apr_bytes(deep)
    finally:
        sys.setrecursionlimit(before)

    _, again = apr.decode(apr.split(data), "sha256:")
    assert builders.same(again, deep)


def test_a_tree_that_is_cut_anywhere_is_refused() -> None:
    whole = bytes.fromhex(TREE + DEPTH_3)

    assert decode(whole, 3)[0].layout == "DecisionTreeClassifier"
    for size in range(1, len(bytes.fromhex(TREE))):
        assert "the payload ends inside a tree" in str(refusal(whole[:size], 3)), size


def test_a_tree_deeper_than_the_limit_is_refused() -> None:
    with pytest.raises(HocketError) as error:
        builders.apr_bytes(DecisionTreeClassifier(builders.chain(DEFAULT_LIMITS.tree_depth + 1)))

    assert error.value.reason is Reason.TOO_LARGE


def test_arrays_are_aligned_and_read_only() -> None:
    _, model = decode(LINEAR)

    assert model.coefficients.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        model.coefficients[0] = 1
    _, model = decode(TREE + DEPTH_3, 3)
    with pytest.raises(ValueError, match="read-only"):
        model.tree.value[0] = 1
