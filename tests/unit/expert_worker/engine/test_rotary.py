"""Rotary positions: the formulas written out, and transformers where it has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.rotary import check_rope, settle_rope
from tests.bases import tiny_base
from tests.engines import opened
from tests.passes import Passes, ids_of, oracle

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DIM, THETA, NATIVE = 32, 10000.0, 512
LONG = [1.0 + index for index in range(DIM // 2)]
SHORT = [1.0 + index / 10 for index in range(DIM // 2)]
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": NATIVE}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(rope: dict[str, Any] | None = None, kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415 - seconds

    parameters = {"rope_type": "default", "rope_theta": THETA} | (rope or {})
    return AutoConfig.for_model(kind, **{**SIZES, "rope_parameters": parameters, **changes})


def rotary_of(config: Any) -> tuple[NDArray[np.float64], float]:
    """The frequencies that a model computes with, and what cosines and sines are multiplied by."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415 - seconds

    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().numpy(), float(rotary.attention_scaling)


def settled(
    rope: str = "auto", context_length: int = 0, configured: dict[str, Any] | None = None
) -> tuple[NDArray[np.float64], float]:
    config = config_of(configured)
    settle_rope(config, rope, context_length)
    return rotary_of(config)


def refused(rope: str, context_length: int, config: Any, word: str) -> None:
    with pytest.raises(HocketError, match=word) as refusal:
        settle_rope(config, rope, context_length)
    assert refusal.value.reason is Reason.NOT_SERVABLE


PLAIN = THETA ** (-2 * np.arange(DIM // 2) / DIM)


def ntk(stretch: float) -> NDArray[np.float64]:
    frequencies: NDArray[np.float64] = (THETA * stretch ** (DIM / (DIM - 2))) ** (-2 * np.arange(DIM // 2) / DIM)
    return frequencies


def by_parts(factor: float) -> NDArray[np.float64]:
    def corner(rotations: float) -> float:
        return DIM * math.log(NATIVE / (2 * math.pi * rotations)) / (2 * math.log(THETA))

    low, high = max(0, math.floor(corner(32))), min(DIM - 1, math.ceil(corner(1)))
    ramp = np.clip((np.arange(DIM // 2) - low) / (high - low), 0, 1)
    frequencies: NDArray[np.float64] = (1 - ramp) * PLAIN + ramp * PLAIN / factor
    return frequencies


def llama3(factor: float) -> NDArray[np.float64]:
    rotations = NATIVE * PLAIN / (2 * np.pi)
    smooth = np.clip((rotations - 1) / (4 - 1), 0, 1)
    frequencies: NDArray[np.float64] = (1 - smooth) * PLAIN / factor + smooth * PLAIN
    return frequencies


KINDS = {
    "linear": (PLAIN / 8, 1.0),
    "ntk": (ntk(8), 1.0),
    "ntk-by-parts": (by_parts(8), 1.0),
    "yarn": (by_parts(8), 0.1 * math.log(8) + 1),
    "llama3": (llama3(8), 1.0),
}
"""What a context eight times as long makes of the frequencies."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_kind_is_computed_as_its_formula_says(kind: str) -> None:
    frequencies, scaling = settled(kind, 8 * NATIVE)
    wanted, factor = KINDS[kind]
    np.testing.assert_allclose(frequencies, wanted, rtol=1e-6)
    assert scaling == pytest.approx(factor)
    np.testing.assert_allclose(settled(f"{kind}-4k")[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [NATIVE, 100])
def test_nothing_is_scaled_within_the_native_context(kind: str, length: int) -> None:
    frequencies, scaling = settled(kind, length)
    np.testing.assert_allclose(frequencies, PLAIN, rtol=1e-6)
    assert scaling == 1.0


CONFIGURED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGURED)
def test_what_the_configuration_says_is_left_alone(kind: str) -> None:
    configured = {"rope_type": kind, **CONFIGURED[kind]}
    wanted = rotary_of(config_of(configured))
    found = settled(configured=configured)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert found[1] == wanted[1]


@pytest.mark.parametrize("length", [NATIVE, NATIVE + 1, 2 * NATIVE])
def test_dynamic_positions_are_those_of_texts_as_long_as_the_context(length: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415 - seconds

    configured = {"rope_type": "dynamic", "factor": 2.0}
    own = LlamaRotaryEmbedding(config_of(configured))
    own(torch.zeros(1), torch.tensor([[length - 1]]))
    found, scaling = settled("auto", length, configured)
    np.testing.assert_allclose(found, own.inv_freq.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found, ntk(2 * length / NATIVE - 1), rtol=1e-6)
    assert scaling == 1.0


@pytest.mark.parametrize(("length", "factors"), [(128, SHORT), (129, LONG), (NATIVE, LONG)])
def test_longrope_takes_the_factors_of_texts_as_long_as_the_context(length: int, factors: list[float]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415 - seconds

    configured = {
        "rope_type": "longrope",
        "long_factor": LONG,
        "short_factor": SHORT,
        "original_max_position_embeddings": 128,
    }
    own = LlamaRotaryEmbedding(config_of(configured))
    own(torch.zeros(1), torch.tensor([[length - 1]]))
    config = config_of(configured)
    settle_rope(config, "auto", length)
    rotary = LlamaRotaryEmbedding(config)
    for longest in (1, 5000):
        rotary(torch.zeros(1), torch.tensor([[longest]]))
        np.testing.assert_allclose(rotary.inv_freq.numpy(), own.inv_freq.numpy(), rtol=1e-6)
    np.testing.assert_allclose(rotary.inv_freq.numpy(), PLAIN / factors, rtol=1e-6)
    assert (
        rotary.attention_scaling == own.attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    )


@pytest.mark.parametrize(("length", "mscale"), [(128, 1.1), (129, 1.3)])
def test_longrope_with_lengths_of_its_own_for_cosines_takes_those_of_the_context(length: int, mscale: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding  # noqa: PLC0415 - seconds

    factors = {"long_factor": LONG, "short_factor": SHORT, "long_mscale": 1.3, "short_mscale": 1.1}
    config = config_of(
        {"rope_type": "longrope", **factors, "original_max_position_embeddings": 128}, kind="phimoe", head_dim=DIM
    )
    settle_rope(config, "auto", length)
    rotary = PhimoeRotaryEmbedding(config)
    for longest in (1, 500):
        cosines, _ = rotary(torch.zeros(1), torch.tensor([[0, longest]]))
        torch.testing.assert_close(cosines[0, 0], torch.full((DIM,), mscale))


@pytest.mark.parametrize("kind", ["yarn", "ntk-by-parts"])
def test_a_configuration_may_leave_open_how_many_numbers_a_head_has(kind: str) -> None:
    config = config_of(kind="mixtral")
    assert config.head_dim is None
    settle_rope(config, kind, 8 * NATIVE)
    np.testing.assert_allclose(rotary_of(config)[0], by_parts(8), rtol=1e-6)


def test_half_of_a_head_can_be_rotated() -> None:
    config = config_of({"partial_rotary_factor": 0.5})
    settle_rope(config, "ntk", 8 * NATIVE)
    assert config.rope_parameters["rope_theta"] == pytest.approx(THETA * 8 ** (16 / 14))


def test_layers_with_a_window_are_never_scaled() -> None:
    layers = ["sliding_attention", "full_attention"]
    ropes = {each: {"rope_type": "default", "rope_theta": THETA} for each in layers}
    config = config_of(ropes, kind="gemma3_text", num_hidden_layers=2, layer_types=layers, rope_parameters=ropes)
    assert settle_rope(config, "yarn", 2 * NATIVE).kind == "yarn"
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"


def test_a_context_beyond_what_positions_reach_is_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": NATIVE}
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    for configured, reach in ((None, NATIVE), (yarn, 2 * NATIVE), (dynamic, 2 * NATIVE)):
        refused("auto", reach + 1, config_of(configured), f"reach {reach}")
        assert settle_rope(config_of(configured), "auto", reach).context_length == reach


def test_positions_that_are_scaled_already_are_not_scaled_again() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    refused("yarn-4k", 0, config_of(linear), "linear rotary positions")
    refused("yarn-4k", 0, config_of({"mrope_section": [4, 4, 8]}), "cannot be scaled")
    assert settle_rope(config_of(), "yarn-4k", 0).context_length == 4096


def test_a_model_without_rotary_positions_has_none_to_scale() -> None:
    config = config_of(kind="opt", rope_parameters=None)
    refused("yarn-4k", 0, config, "no rotary positions")
    found = settle_rope(config, "auto", 100)
    assert (found.kind, found.context_length) == ("", 100)


def test_kinds_that_are_not_known_are_refused() -> None:
    refused("auto", 0, config_of({"rope_type": "proportional", "factor": 2.0}), "proportional")
    refused("auto", 0, config_of({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}), "alpha")
    settle_rope(config_of({"rope_type": "dynamic", "factor": 2.0}), "auto", 0)


@pytest.mark.parametrize(
    ("rope", "length", "word"),
    [
        ("dynamic", 100, "rope must be"),
        ("yarn-0k", 0, "rope must be"),
        ("yarn-k", 0, "rope must be"),
        ("auto-4k", 0, "rope must be"),
        ("yarn", 0, "how long"),
        ("yarn-4k", 4096, "how long"),
        ("auto", -1, "context_length"),
        ("auto", 2**24 + 1, "at most"),
        ("ntk-16385k", 0, "at most"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rope: str, length: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_rope(rope, length)


@pytest.mark.parametrize(
    ("rope", "length"),
    [("auto", 0), ("auto", 1), ("yarn", 1), ("ntk-by-parts-32k", 0), ("ntk-16384k", 0), ("auto", 2**24)],
)
def test_settings_that_make_sense_are_not(rope: str, length: int) -> None:
    check_rope(rope, length)


def test_a_base_says_how_it_is_served(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "tiny", "llama")
    served = [opened(folder), opened(folder, rope="yarn-4k"), opened(folder, rope="ntk", context_length=1024)]
    assert [base.context_length for base in served] == [512, 4096, 1024]
    assert [base.rope for base in served] == ["default", "yarn", "ntk"]
    assert len({base.variant for base in served}) == 3
    assert len({base.model.digest for base in served}) == 1
    assert opened(folder, context_length=100).variant == served[0].variant
    assert opened(folder, dtype=torch.bfloat16).variant != served[0].variant


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_long_neighbour_changes_nothing_where_transformers_lets_it(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": THETA, "factor": 4.0}
    if kind == "longrope":
        rope |= {"long_factor": LONG[:8], "short_factor": SHORT[:8], "original_max_position_embeddings": 32}
    folder = tiny_base(tmp_path / "tiny", "llama", max_position_embeddings=64, rope_parameters=rope)
    length = {"dynamic": 200, "longrope": 64}[kind]
    base = opened(folder, context_length=length)
    long, short = ids_of(length), ids_of(9, seed=1)
    passes = Passes(base)
    model = oracle(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            passes.logits(long, 50)[-1], model(torch.tensor([long])).logits[0, -1], atol=1e-4, rtol=0
        )
        alone = model(torch.tensor([short])).logits[0, -1]
    before = passes.logits(short, 9)[-1]
    passes.logits(long, 50)
    assert torch.equal(passes.logits(short, 9)[-1], before)
    assert (alone - before).abs().max() > 0.01  # texts as short as this it would compute otherwise
