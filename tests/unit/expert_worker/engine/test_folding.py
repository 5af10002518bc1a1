"""What a package becomes, and which packages a base refuses. PEFT says what an adapter has to compute."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.packages.adapter import Decoding
from hocket.packages.expert.config import read_config
from hocket.packages.expert.reader import decode
from hocket.packages.expert.tensors import chosen
from services.expert_worker.engine.folding import Folded, fold
from services.expert_worker.engine.mixing import Mixer
from tests.adapters import HEAD, SHAPES, ToyBase, arena_of, assert_close, tensors_for, toy_package
from tests.bases import HIDDEN, tiny_base
from tests.experts import adapter_config, expert_package, soft_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from services.expert_worker.engine.expert import AdapterExpert

BASE = ToyBase()
UP = "base_model.model.block.0.up"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folded(on: ToyBase = BASE, kind: str = "lora", **options: Any) -> Folded:
    facts, adapter = toy_package(kind, **options)
    return fold(adapter, facts, on)


def built(on: ToyBase = BASE, kind: str = "lora", **options: Any) -> AdapterExpert:
    made = folded(on, kind, **options)
    return made.build(made.flat)


def refused(on: ToyBase = BASE, kind: str = "lora", **options: Any) -> HocketError:
    with pytest.raises(HocketError) as refusal:
        folded(on, kind, **options)
    return refusal.value


# --- the same as PEFT


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_base(tmp_path_factory.mktemp(kind), kind) for kind in ("qwen3", "qwen2")}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(requires_grad=False)


@dataclasses.dataclass(frozen=True)
class Around:
    """A model of transformers, as folding sees it."""

    model: BaseModel
    projections: dict[str, torch.nn.Linear]
    hidden_size: int = HIDDEN
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, causal_lm: Any) -> Around:
        linears = {name: module for name, module in causal_lm.named_modules() if isinstance(module, torch.nn.Linear)}
        return cls(BaseModel("tiny"), linears)


def saved(adapted: Any, folder: Path) -> tuple[Any, Any]:
    """What the package reader makes of what PEFT saves."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    config = (folder / "adapter_config.json").read_bytes()
    kind = {"IA3": "ia3", "PROMPT_TUNING": "soft_prompt"}.get(json.loads(config)["peft_type"], "lora")
    package = expert_package(
        kind=kind,
        base="tiny",
        tensors=load_file(folder / "adapter_model.safetensors"),
        files={"adapter_config.json": config},
    )
    return decode(package, "sha256:00")


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rank-stabilised": {**LORA, "use_rslora": True},
    "patterns": {
        **LORA,
        "rank_pattern": {"v_proj": 2, "model.layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 5},
    },
    "one layer, named in full": {**LORA, "target_modules": ["model.layers.1.self_attn.q_proj"]},
    "a regular expression": {**LORA, "target_modules": r".*\.1\..*\.(up|down)_proj"},
    "dora": {**LORA, "use_dora": True, "target_modules": ATTENTION + MLP},
    "rank-stabilised dora": {**LORA, "use_dora": True, "use_rslora": True},
    "head": {**LORA, "target_modules": ["q_proj", "lm_head"]},
    "head dora": {**LORA, "use_dora": True, "target_modules": ["lm_head"]},
    "biases of b": {**LORA, "lora_bias": True, "use_rslora": True},
    "biases of adapted projections": {**LORA, "bias": "lora_only", "use_dora": True},
    "biases of all": {**LORA, "bias": "all", "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {**LORA, "layers_to_transform": 1},
    "one layer, by its pattern": {**LORA, "layers_to_transform": [0, 5], "layers_pattern": "layers"},
    "some left out": {**LORA, "exclude_modules": ["1.self_attn.q_proj", "down_proj"]},
    "some left out by a regular expression": {**LORA, "exclude_modules": r".*\.1\..*"},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ia3 on outputs": {"target_modules": [*ATTENTION, "up_proj"], "feedforward_modules": []},
    "ia3 on inputs": {"target_modules": ATTENTION + MLP, "feedforward_modules": ATTENTION + MLP},
}


@pytest.mark.filterwarnings("ignore")  # PEFT and transformers speak of each other
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_expert_at_weight_1_computes_what_peft_does(
    name: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model  # noqa: PLC0415 - seconds

    make = IA3Config if name.startswith("ia3") else LoraConfig
    adapted: Any = get_peft_model(loaded(bases[kind]), make(task_type="CAUSAL_LM", **ADAPTERS[name])).eval()
    generator = torch.Generator().manual_seed(1)
    for path, tensor in adapted.named_parameters():
        if tensor.requires_grad and "lora_A" not in path:
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    facts, adapter = saved(adapted, tmp_path)
    causal_lm = loaded(bases[kind])
    base = Around.of(causal_lm)
    made = fold(adapter, facts, base)
    expert = made.build(made.flat)
    mixer = Mixer(causal_lm, base.projections, arena_of(base, 64))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        mixer.begin([(20, ((expert, 1.0),))])
        actual = causal_lm(input_ids=ids).logits
        mixer.end()
        plain = causal_lm(input_ids=ids).logits
    assert_close(actual, expected)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_prompt_tuning_of_peft_becomes_the_rows_of_the_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model  # noqa: PLC0415 - seconds

    causal_lm = loaded(bases["qwen3"])
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(causal_lm, config)
    facts, adapter = saved(adapted, tmp_path)
    made = fold(adapter, facts, Around.of(causal_lm))
    expert = made.build(made.flat)
    assert expert.prompt is not None
    assert not expert.pieces
    torch.testing.assert_close(expert.prompt, adapted.get_prompt(batch_size=1)[0].detach(), rtol=0, atol=0)


# --- what it is made of


def test_every_tensor_of_an_expert_is_a_view_of_the_one_buffer_that_was_moved() -> None:
    made = folded(kind="dora", files={"soft.safetensors": soft_prompt(2, 24)}, manifest=with_prompts("soft"))
    moved = made.flat.clone()
    expert = made.build(moved)
    tensors = [tensor for piece in expert.pieces.values() for tensor in (piece.o, piece.a, piece.b)] + [expert.prompt]
    for tensor in tensors:
        assert tensor is not None
        assert tensor.untyped_storage().data_ptr() == moved.untyped_storage().data_ptr()
        assert tensor.data_ptr() % 16 == 0
    assert expert.size_bytes == moved.nbytes < 1.2 * sum(tensor.nbytes for tensor in tensors if tensor is not None)
    moved.zero_()
    assert not any(tensor.any() for tensor in tensors if tensor is not None)


def with_prompts(*names: str) -> dict[str, Any]:
    return {"soft_prompts": [{"name": name, "path": f"{name}.safetensors"} for name in names]}


def test_what_the_package_says_about_itself_comes_along() -> None:
    facts, adapter = toy_package(manifest={"base_models": [base_entry(prompt_template="qwen3")]})
    made = fold(dataclasses.replace(adapter, decoding=Decoding(temperature=0.3)), facts, BASE)
    expert = made.build(made.flat)
    assert (expert.digest, expert.constraints, expert.load_order) == (facts.digest, facts.constraints, 6)
    assert (expert.prompt_template, expert.decoding.temperature) == ("qwen3", 0.3)
    assert expert.rank == 3


def base_entry(**changes: Any) -> dict[str, Any]:
    return {"name": "Toy", "adapters": [{"type": "lora", "target_modules": ["up"], "r": 3, "alpha": 6}], **changes}


def test_several_soft_prompts_follow_each_other_in_the_order_of_the_manifest() -> None:
    first, second = (np.random.default_rng(n).random((n, 24), np.float32) for n in (1, 2))
    expert = built(
        manifest=with_prompts("b", "a"),
        files={"a.safetensors": save({"x": second}), "b.safetensors": save({"prompt_embeddings": first})},
    )
    assert expert.prompt is not None
    np.testing.assert_array_equal(expert.prompt.numpy(), np.concatenate([first, second]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_rank_pieces_are_of_the_dtype_of_the_base_but_never_float16_and_factors_are_float32(
    dtype: torch.dtype,
) -> None:
    base = ToyBase(dtype)
    expert = built(base, "dora", files={"soft.safetensors": soft_prompt(1, 24)}, manifest=with_prompts("soft"))
    piece = expert.pieces["block.0.up"]
    assert piece.a is not None
    assert piece.b is not None
    assert piece.o is not None
    assert expert.prompt is not None
    assert piece.a.dtype == piece.b.dtype == (torch.float32 if dtype is torch.float16 else dtype)
    assert piece.o.dtype is torch.float32
    assert expert.prompt.dtype is dtype


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bf16"])
def test_tensors_may_be_stored_in_half_precision(dtype: Any) -> None:
    tensors = tensors_for("lora", tuple(SHAPES), rank=3, seed=0)
    facts, adapter = toy_package(tensors={} if dtype == "bf16" else {n: t.astype(dtype) for n, t in tensors.items()})
    if dtype == "bf16":  # which numpy does not have
        stored = {n: torch.from_numpy(t).bfloat16().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
        raw = {n: dataclasses.replace(t, dtype="BF16", data=stored[n]) for n, t in adapter.tensors.items()}
        adapter = dataclasses.replace(adapter, tensors=raw)
    made = fold(adapter, facts, BASE)
    a = made.build(made.flat).pieces["block.0.up"].a
    assert a is not None
    np.testing.assert_allclose(a.numpy(), tensors[f"{UP}.lora_A.weight"], rtol=1e-2, atol=1e-2)


def test_the_length_of_a_row_that_an_expert_nearly_cancels_is_exact() -> None:
    weight = BASE.projections["block.0.up"].weight
    tensors = tensors_for("dora", ["block.0.up"], rank=1, seed=0)
    tensors[f"{UP}.lora_A.weight"] = weight[:1].numpy().copy()
    tensors[f"{UP}.lora_B.weight"] = np.zeros((40, 1), np.float32)
    tensors[f"{UP}.lora_B.weight"][0] = -0.4995  # alpha is twice the rank
    piece = built(kind="dora", modules=["block.0.up"], rank=1, tensors=tensors).pieces["block.0.up"]
    assert piece.o is not None
    magnitude = tensors[f"{UP}.lora_magnitude_vector"][0]
    length = float(weight[0].double().norm()) * (1 - 2 * float(np.float32(0.4995)))
    assert math.isclose(float(piece.o[0]), magnitude / length, rel_tol=1e-4)


# --- refusals, each with a twin that is accepted


def test_an_expert_of_another_base_is_refused() -> None:
    refusal = refused(base="Other")
    assert refusal.reason is Reason.BASE_MISMATCH
    assert "names differ" in refusal.message
    built(ToyBase(model=BaseModel("x/other")), base="Other")


def test_what_its_package_says_cannot_serve_is_not_folded() -> None:
    extra = {f"{UP}.lora_embedding_A": np.zeros((3, 24), np.float32)}
    refusal = refused(tensors=extra)
    assert refusal.reason is Reason.NOT_SERVABLE
    assert "embedding" in refusal.message
    folded()


def test_a_tensor_without_a_place_in_the_base_is_refused_by_name() -> None:
    stranger = "block.2.up"
    refusal = refused(
        tensors=tensors_for("lora", [stranger], rank=3, seed=0), config={"target_modules": ["up", "down"]}
    )
    assert refusal.reason is Reason.BAD_ADAPTER
    assert f"base_model.model.{stranger}.lora_A.weight" in refusal.message or f"{stranger}.lora_A" in refusal.message
    folded(config={"target_modules": ["up", "down"]})


def test_a_projection_that_is_named_and_gets_nothing_is_refused_by_name() -> None:
    absent = {f"base_model.model.block.1.up.lora_{part}.weight": None for part in "AB"}
    refusal = refused(tensors=absent, config={"target_modules": ["up", "down"]})
    assert refusal.reason is Reason.BAD_ADAPTER
    assert "'block.1.up'" in refusal.message
    folded(tensors=absent, config={"target_modules": ["block.0.up", "down"]})


def without(*modules: str) -> dict[str, None]:
    return dict.fromkeys(tensors_for("lora", modules, rank=3, seed=0))


NAMES = {"target_modules": ["up", "down"]}
SECOND = ("block.1.up", "block.1.down")


@pytest.mark.parametrize(
    ("choice", "absent", "missed"),
    [
        ({"layers_to_transform": [0], "layers_pattern": "block"}, SECOND, "block.0.up"),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "block"]}, SECOND, "block.0.down"),
        ({"exclude_modules": ["1.up"]}, ["block.1.up"], "block.1.down"),
        ({"exclude_modules": ["block.1.up"]}, ["block.1.up"], "block.0.up"),
    ],
)
def test_modules_may_be_left_out_on_purpose_and_no_others(
    choice: dict[str, Any], absent: Sequence[str], missed: str
) -> None:
    folded(tensors=without(*absent), config={**NAMES, **choice})
    refusal = refused(tensors=without(*absent, missed), config={**NAMES, **choice})
    assert refusal.reason is Reason.BAD_ADAPTER
    assert f"{missed!r}" in refusal.message
    assert f"{absent[0]!r}" in refused(tensors=without(*absent), config=NAMES).message


def test_where_a_regular_expression_leaves_modules_out_each_name_has_to_be_met_once() -> None:
    config = {**NAMES, "exclude_modules": r".*\.1\..*"}
    folded(tensors=without(*SECOND), config=config)
    assert "'block.0.up'" in refused(tensors=without(*SECOND, "block.0.up"), config=config).message


PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.12.mlp.down_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.h.2.down_proj",
    "block.1.q_proj",
    "layers.0.q_proj",
    "model.layers.q_proj.0",
    "a.b.0.q_proj",
    "q_proj",
    "xq_proj",
    "lm_head",
]


@pytest.mark.parametrize("exclude", [None, ["lm_head"], ["1.self_attn.q_proj", "proj"], ["a.b.0.q_proj"]])
@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        (None, None),
        (0, None),
        ([], None),
        ([0, 12], None),
        ([0, 1, 2], []),
        (1, "layers"),
        ([0, 1], ["layers", "block"]),
        ([0, 2], ["experts", "h", "layers"]),
        ([0], "model.layers"),
        ([0], "ayers"),
    ],
)
def test_the_modules_that_are_chosen_are_those_that_peft_chooses(exclude: Any, layers: Any, pattern: Any) -> None:
    from peft import LoraConfig  # noqa: PLC0415 - seconds
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists  # noqa: PLC0415 - seconds

    options = {"exclude_modules": exclude, "layers_to_transform": layers, "layers_pattern": pattern}
    for targets in (["q_proj", "down_proj"], ["q_proj", "lm_head", "model.layers.1.self_attn.q_proj"]):
        theirs = LoraConfig(target_modules=targets, **options)
        found = [check_target_module_exists(theirs, path) for path in PATHS]
        expected = [
            path for path, one in zip(PATHS, found, strict=True) if one and not isinstance(one, _ExcludedModule)
        ]
        document = adapter_config(target_modules=targets, **options)
        assert chosen(read_config(json.dumps(document).encode()), PATHS) == expected


# --- trained biases

DOWN = "base_model.model.block.0.down"


def test_biases_become_what_is_added_to_those_of_the_base() -> None:
    added, new = (np.random.default_rng(seed).random(40, np.float32) for seed in (1, 2))
    tensors = {
        f"{UP}.lora_B.bias": added,
        f"{UP}.base_layer.bias": new,
        "base_model.model.block.1.up.bias": new,
    }
    modules = ["block.0.up"]
    expert = built(modules=modules, tensors=tensors, config={"lora_bias": True, "bias": "all"})
    base = [BASE.projections[f"block.{n}.up"].bias.numpy() for n in (0, 1)]
    first, second = expert.pieces["block.0.up"], expert.pieces["block.1.up"]
    assert first.c is not None
    assert second.c is not None
    np.testing.assert_allclose(first.c.numpy(), 2 * added + new - base[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(second.c.numpy(), new - base[1], rtol=1e-6, atol=1e-6)
    assert (second.a, second.b, second.o, second.u, second.rank) == (None, None, None, None, 0)


TRAINED = {f"{UP}.base_layer.bias": np.ones(40, np.float32)}
EVERY = {**TRAINED, "base_model.model.block.1.up.bias": np.ones(40, np.float32)}


@pytest.mark.parametrize(
    ("config", "tensors", "blamed"),
    [
        ({"bias": "lora_only"}, {}, "the bias of 'block.0.up' was trained"),
        ({"bias": "all"}, TRAINED, "the bias of 'block.1.up' was trained"),
        ({"bias": "lora_only"}, {f"{UP}.base_layer.bias": np.ones(41, np.float32)}, "block.0.up.base_layer.bias"),
        ({"bias": "lora_only"}, {f"{UP}.base_layer.bias": np.ones((40, 1), np.float32)}, "block.0.up.base_layer.bias"),
        ({"lora_bias": True}, {f"{UP}.lora_B.bias": np.ones(41, np.float32)}, "block.0.up.lora_B.bias"),
        ({"lora_bias": True}, {f"{UP}.lora_B.bias": np.full(40, 3e38, np.float32)}, "not finite"),
        ({"bias": "all"}, {**EVERY, "base_model.model.norm.bias": np.ones(4, np.float32)}, "no projection 'norm'"),
        ({"bias": "all"}, {**EVERY, f"{DOWN}.bias": np.ones(24, np.float32)}, "block.0.down' has no bias"),
    ],
)
def test_biases_that_are_missing_or_belong_nowhere_are_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Any], blamed: str
) -> None:
    refusal = refused(modules=["block.0.up"], config=config, tensors=tensors)
    assert refusal.reason is Reason.BAD_ADAPTER
    assert blamed in refusal.message
    folded(modules=["block.0.up"], config={"bias": "lora_only"}, tensors=TRAINED)
    folded(modules=["block.0.up"], config={"bias": "all"}, tensors=EVERY)


def test_a_name_that_no_projection_of_the_base_has_needs_no_tensors() -> None:
    folded(config={"target_modules": ["up", "down", "gate", "nothing"]})


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("lora", "lora_A.weight", (3, 25)),
        ("lora", "lora_B.weight", (41, 3)),
        ("ia3", "ia3_l", (41, 1)),
    ],
)
def test_a_tensor_of_another_size_than_the_base_needs_is_refused_by_name(
    kind: str, name: str, shape: tuple[int, ...]
) -> None:
    refusal = refused(kind=kind, tensors={f"{UP}.{name}": np.ones(shape, np.float32)})
    assert refusal.reason is Reason.BAD_ADAPTER
    assert f"block.0.up.{name}" in refusal.message
    right = {"lora_A.weight": (3, 24), "lora_B.weight": (40, 3), "ia3_l": (40, 1)}[name]
    folded(kind=kind, tensors={f"{UP}.{name}": np.ones(right, np.float32)})


def test_transposed_weights_are_refused() -> None:
    assert "fan_in_fan_out" in refused(config={"fan_in_fan_out": True}).message
    folded(config={"fan_in_fan_out": False})


def test_a_soft_prompt_of_another_hidden_size_is_refused_by_name() -> None:
    manifest = with_prompts("greeting")
    refusal = refused(manifest=manifest, files={"greeting.safetensors": soft_prompt(2, 25)})
    assert refusal.reason is Reason.BAD_ADAPTER
    assert "'greeting'" in refusal.message
    folded(manifest=manifest, files={"greeting.safetensors": soft_prompt(2, 24)})


def test_a_soft_prompt_beyond_the_range_of_the_base_is_refused() -> None:
    tensors = {"prompt_embeddings": np.full((3, 24), 1e5, np.float32)}
    assert "float16" in refused(ToyBase(torch.float16), "soft_prompt", modules=(), tensors=tensors).message
    folded(ToyBase(torch.bfloat16), "soft_prompt", modules=(), tensors=tensors)


def test_low_rank_pieces_beyond_float16_are_fine_on_a_float16_base_as_they_are_not_kept_in_it() -> None:
    large = {f"{UP}.lora_A.weight": np.full((3, 24), 1e5, np.float32)}
    folded(ToyBase(torch.float16), tensors=large)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_overflows_in_folding_is_refused_by_name(kind: str) -> None:
    def alpha(value: float) -> dict[str, Any]:
        return {"kind": kind, "config": {"lora_alpha": value}}

    refusal = refused(**alpha(3e38), tensors={f"{UP}.lora_B.weight": np.full((40, 3), 1e3, np.float32)})
    assert refusal.reason is Reason.BAD_ADAPTER
    assert "block.0.up.lora_" in refusal.message
    folded(**alpha(3e3), tensors={f"{UP}.lora_B.weight": np.full((40, 3), 1e3, np.float32)})


def test_a_magnitude_on_a_row_of_length_0_is_refused() -> None:
    base = ToyBase()
    base.projections["block.0.up"].weight.data[5] = 0
    tensors = {f"{UP}.lora_B.weight": np.zeros((40, 3), np.float32)}
    assert "block.0.up.lora_magnitude_vector" in refused(base, "dora", tensors=tensors).message
    folded(base, "dora")


def test_the_head_can_be_adapted() -> None:
    assert HEAD in built(modules=[HEAD]).pieces
