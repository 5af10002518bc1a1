"""Bases in int8 and nf4: the same as transformers has them, and what bitsandbytes would have go wrong."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import linear

from hocket.errors import HocketError, Reason
from services.expert_worker.engine import quantised
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.quantised import weight_of
from tests.adapters import arena_of
from tests.bases import HIDDEN, tiny_base
from tests.engines import asking, expert_of, opened, prompt_ids, random_package, whole_engine
from tests.passes import Passes, ids_of, oracle, part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.expert_worker.engine.base import Base

SIZES: dict[str, Any] = {"intermediate_size": 128}
"""Multiples of 64, as the kernel for nf4 wants them."""
HOW: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
TOLERANCE = 0.005
"""Most that logits may differ, as a share of their norm, where an input lies so near to the edge of a step that the
last bits of a sum decide on which side; mostly it is 2e-7."""
UP = "model.layers.0.mlp.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / "tiny", "qwen2", **SIZES)


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Base]:
    return {how: opened(folder, quantisation=how) for how in ("none", *HOW)}


def theirs(folder: Path, how: str) -> Any:
    """The same base in transformers; nothing has been computed with it."""
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 - seconds

    config = BitsAndBytesConfig(**HOW[how])  # type: ignore[no-untyped-call]  # theirs
    return oracle(folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32)


def dequantised(layer: Any) -> torch.Tensor:
    """What a layer of transformers that has never computed multiplies by."""
    from bitsandbytes import functional  # noqa: PLC0415 - an extra

    if layer.weight.dtype == torch.int8:
        weight: torch.Tensor = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return weight


def has_kernel() -> bool:
    functional = quantised._bitsandbytes().functional
    return bool(functional.has_avx512bf16())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("how", HOW)
def test_logits_are_those_of_the_same_quantised_base_in_transformers(
    how: str, folder: Path, bases: dict[str, Base]
) -> None:
    ids = ids_of(40)
    with torch.no_grad():
        wanted = theirs(folder, how)(torch.tensor([ids])).logits[0]
        whole = oracle(folder)(torch.tensor([ids])).logits[0]
    for chunk in (40, 7):
        found = Passes(bases[how]).logits(ids, chunk)
        assert error(found, wanted[[*range(chunk - 1, 39, chunk), 39]]) < TOLERANCE
    assert error(wanted, whole) > 2 * TOLERANCE


@pytest.mark.parametrize("how", HOW)
async def test_greedy_answers_are_those_of_generate(how: str, folder: Path, bases: dict[str, Base]) -> None:
    prompt = prompt_ids(23)
    given = torch.tensor([prompt])
    made = theirs(folder, how).generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
        suppress_tokens=[*range(367, 384)],
    )
    async with whole_engine(bases[how]) as lab:
        told = await lab.ask(asking(prompt, max_tokens=8))
    assert told.ids == made[0, 23:].tolist()


@pytest.mark.parametrize("how", HOW)
def test_linear_layers_are_quantised_and_nothing_else(how: str, bases: dict[str, Base]) -> None:
    base, plain = bases[how], bases["none"]
    assert base.projections.keys() == plain.projections.keys()
    kept = {name for name, projection in base.projections.items() if projection.weight.is_floating_point()}
    assert kept == {"lm_head"}
    assert base.projections["lm_head"].weight is base.causal_lm.get_input_embeddings().weight
    assert (base.dtype, base.quantisation) == (torch.float32, how)
    assert not base.causal_lm.training
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())
    assert len({each.variant for each in bases.values()}) == 3


def test_it_takes_as_many_bytes_as_its_numbers_and_scales(bases: dict[str, Base]) -> None:
    numbers = sum(p.in_features * p.out_features for n, p in bases["none"].projections.items() if n != "lm_head")
    rows = sum(p.out_features for n, p in bases["none"].projections.items() if n != "lm_head")
    rest = bases["none"].size_bytes - 4 * numbers
    assert bases["int8"].size_bytes == rest + numbers + 4 * rows
    # half a byte each, and a scale of one or two bytes to a block of 64, with its tables
    assert rest + numbers * 0.5 < bases["nf4"].size_bytes < rest + numbers * (0.5 + 2 / 64) + 14 * 2200


@pytest.mark.parametrize("how", HOW)
def test_a_weight_reads_as_what_is_multiplied_by_also_after_the_first_pass(
    how: str, folder: Path, bases: dict[str, Base]
) -> None:
    Passes(bases[how]).logits(ids_of(9), 9)
    fresh = theirs(folder, how)
    for name in (UP, "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        projection = bases[how].projections[name]
        weight = weight_of(projection)
        assert weight.dtype == torch.float32
        wanted = dequantised(fresh.get_submodule(name))
        assert error(weight, wanted) < 2**-8  # nf4's scales are bfloat16 there
        with torch.inference_mode():
            nothing = projection(torch.zeros(1, projection.in_features))  # its bias
            through = (projection(torch.eye(projection.in_features)) - nothing).T
        assert error(through, weight) < 2**-8
    head = bases[how].projections["lm_head"]
    assert weight_of(head) is head.weight


def test_what_bitsandbytes_itself_reads_after_the_first_pass_is_something_else(bases: dict[str, Base]) -> None:
    if not has_kernel():
        pytest.skip("this processor has no AVX512-BF16: weights stay as they are")
    projection: Any = bases["nf4"].projections[UP]
    from bitsandbytes import functional  # noqa: PLC0415 - an extra

    misread = functional.dequantize_4bit(projection.weight.data, projection.weight.quant_state)
    assert error(misread.float(), weight_of(projection)) > 1


@pytest.mark.parametrize("how", HOW)
def test_dora_is_folded_against_what_serves(how: str, folder: Path, bases: dict[str, Base]) -> None:
    package = random_package("dora", ("q_proj",))
    plain = random_package("lora", ("q_proj",))
    dora, lora = (expert_of(each, bases[how]).pieces[QUERY] for each in (package, plain))
    assert dora.o is not None
    assert lora.a is not None
    assert lora.b is not None
    wanted = dequantised(theirs(folder, how).get_submodule(QUERY)) + lora.b.T @ lora.a
    against_whole = bases["none"].projections[QUERY].weight + lora.b.T @ lora.a
    lengths = magnitude_of(package) / dora.o
    assert error(lengths, wanted.norm(dim=1)) < 2**-9
    assert error(lengths, wanted.norm(dim=1)) < error(lengths, against_whole.norm(dim=1)) / 2


def magnitude_of(package: bytes) -> torch.Tensor:
    from hocket.packages.expert.reader import decode  # noqa: PLC0415 - beside its only use

    _, adapter = decode(package, "sha256:00")
    (raw,) = (tensor for name, tensor in adapter.tensors.items() if "layers.0" in name and "magnitude" in name)
    return torch.frombuffer(bytearray(raw.data), dtype=torch.float32)


@pytest.mark.parametrize("how", HOW)
def test_experts_add_to_a_quantised_base_what_they_add_to_any(how: str, folder: Path) -> None:
    base = opened(folder, quantisation=how)
    expert = expert_of(random_package("lora", ("q_proj", "v_proj")), base)
    piece = expert.pieces[QUERY]
    assert piece.a is not None
    assert piece.b is not None
    mixer = Mixer(base.causal_lm, base.projections, arena_of(base, 16))
    projection = base.causal_lm.get_submodule(QUERY)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = projection(x)
        mixer.begin([(5, ((expert, 0.7),))])
        found = projection(x)
    torch.testing.assert_close(found - plain, 0.7 * linear(x, piece.b.T @ piece.a), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", HOW)
async def test_an_answer_with_an_expert_is_the_same_in_company(how: str, bases: dict[str, Base]) -> None:
    expert = expert_of(random_package("dora", ("q_proj", "v_proj")), bases[how])
    requests = [asking(prompt_ids(9), ((expert, 1.0),)), asking(prompt_ids(30, 1))]
    async with whole_engine(bases[how]) as lab:
        alone = [await lab.ask(request) for request in requests]
        together = await lab.ask_all(requests)
    assert [told.ids for told in together] == [told.ids for told in alone]


@pytest.mark.parametrize("how", HOW)
def test_a_text_computes_the_same_whoever_shares_the_pass(how: str, bases: dict[str, Base]) -> None:
    passes = Passes(bases[how])
    pages = [passes.take(20) for _ in range(3)]
    alone = passes.run([part(0, ids_of(20), pages[0])])[0]
    among = passes.run([part(0, ids_of(20, seed), pages[seed]) for seed in range(3)])[0]
    torch.testing.assert_close(among, alone, atol=1e-4, rtol=0)


def test_outliers_of_a_neighbour_change_nothing_as_they_would_at_the_usual_threshold() -> None:
    make = quantised._bitsandbytes().nn.Linear8bitLt
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 64, generator=random)
    rows[1, 3] = 50.0
    weight = torch.randn(32, 64, generator=random)
    differences = []
    for threshold in (0.0, 6.0):
        layer = make(64, 32, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight.data = weight.clone()
        layer.to("cpu").eval()
        with torch.inference_mode():
            differences.append(float((layer(rows)[0] - layer(rows[:1])[0]).abs().max()))
    assert differences[0] == 0 < differences[1]


def test_a_shape_that_the_kernel_cannot_compute_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised._bitsandbytes()
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    narrow = {"num_key_value_heads": 1, **SIZES}
    shapes: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "a", narrow, "k_proj"),
        (tmp_path / "b", {}, "down_proj"),
    ]
    for folder, sizes, name in shapes:
        tiny_base(folder, **sizes)
        with pytest.raises(HocketError, match=name) as refusal:
            opened(folder, quantisation="nf4")
        assert refusal.value.reason is Reason.NOT_SERVABLE
        opened(folder, quantisation="int8")


def test_a_processor_without_the_kernel_serves_nf4_and_says_that_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised._bitsandbytes()
    warned: list[str] = []
    monkeypatch.setattr(quantised._log, "warning", warned.append)
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    folder = tiny_base(tmp_path / "tiny")  # 96 is no multiple of 64
    base = opened(folder, quantisation="nf4")
    assert len(warned) == 1
    assert "AVX512-BF16" in warned[0]
    down = "model.layers.0.mlp.down_proj"
    assert torch.equal(weight_of(base.projections[down]), dequantised(theirs(folder, "nf4").get_submodule(down)))
    assert not warned[1:]
    opened(folder)
    assert len(warned) == 1


@pytest.mark.parametrize("how", HOW)
def test_nothing_of_it_is_moved_once_it_has_been_loaded(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.expert_worker.engine import base as opening  # noqa: PLC0415 - imports transformers

    module: Any = opening

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    loaded = module.check_report

    def after_loading(report: Any) -> None:
        loaded(report)
        monkeypatch.setattr(torch.nn.Module, "to", never)

    monkeypatch.setattr(module, "check_report", after_loading)
    Passes(opened(folder, quantisation=how)).logits(ids_of(5), 5)


@pytest.mark.parametrize("how", HOW)
def test_it_does_not_change_with_its_files(how: str, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "tiny", "qwen2", **SIZES)
    base = opened(folder, quantisation=how)
    before = Passes(base).logits(ids_of(5), 5)
    file = folder / "model.safetensors"
    with file.open("r+b") as weights:
        weights.write(b"\0" * file.stat().st_size)
        weights.truncate(4096)
    assert torch.equal(Passes(base).logits(ids_of(5), 5), before)


def test_inputs_beyond_float16_are_seen_and_not_answered_wrongly(bases: dict[str, Base]) -> None:
    rows = torch.zeros(2, HIDDEN)
    rows[0, 3], rows[1, 3] = 70_000.0, 60_000.0
    with torch.inference_mode():
        found = {how: bases[how].projections[UP](rows).isfinite().all(-1).tolist() for how in HOW}
    assert found == {"int8": [False, True], "nf4": [True, True]}  # int8 takes inputs in float16


def test_bitsandbytes_says_nothing(bases: dict[str, Base], caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger("bitsandbytes.autograd._functions").getEffectiveLevel() == logging.ERROR
    for how in HOW:
        Passes(bases[how]).logits(ids_of(5), 5)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_a_module_that_would_fetch_code_cannot_be_imported_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, logging):
        if before is not None:
            monkeypatch.setitem(sys.modules, "kernels", before)
        else:
            monkeypatch.delitem(sys.modules, "kernels", raising=False)
        with quantised._without("kernels"), pytest.raises(ImportError):
            import kernels  # type: ignore[import-not-found]  # noqa: F401, PLC0415 - that it cannot be
        assert sys.modules.get("kernels") is before


def test_without_bitsandbytes_it_is_refused_with_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(HocketError, match=r"hocket\[quantised\]") as refusal:
        opened(folder, quantisation="int8")
    assert refusal.value.reason is Reason.NOT_SERVABLE
    opened(folder)
