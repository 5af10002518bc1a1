from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from hocket.errors import HocketError, Reason
from hocket.packages import Limits
from hocket.packages.adapter import AdapterConfig, AdapterKind, RawTensor
from hocket.packages.expert.config import read_config, unsupported
from hocket.packages.expert.tensors import Findings, as_peft_names, check_tensors, values_for
from hocket.packages.expert.weights import read_tensors
from tests.experts import HIDDEN, adapter_config, adapter_tensors, module_path

# What PEFT 0.21.2 writes for LoraConfig(r=4, target_modules=["q_proj", "v_proj"]).
PEFT_LORA: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
PEFT_IA3: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "exclude_modules": None, "fan_in_fan_out": False,
    "feedforward_modules": ["down_proj"], "inference_mode": True, "init_ia3_weights": True, "modules_to_save": None,
    "peft_type": "IA3", "peft_version": "0.21.2", "revision": None, "target_modules": ["v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip
PEFT_PROMPT: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "modules_to_save": None,
    "num_attention_heads": 4, "num_layers": 2, "num_transformer_submodules": 1, "num_virtual_tokens": 4,
    "peft_type": "PROMPT_TUNING", "peft_version": "0.21.2", "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None, "revision": None, "task_type": "CAUSAL_LM", "token_dim": 32,
    "tokenizer_kwargs": None, "tokenizer_name_or_path": None,
}  # fmt: skip


MODULES = ("q_proj", "down_proj")
"""What `adapter_tensors` adapts."""


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def config_of(document: dict[str, Any], **changes: Any) -> AdapterConfig:
    return read_config(encoded({**document, **changes}))


def obstacle(document: dict[str, Any], **changes: Any) -> str | None:
    data = encoded({**document, **changes})
    read_config(data)
    return unsupported(data)


class TestReading:
    def test_a_lora_as_peft_writes_it(self) -> None:
        assert config_of(PEFT_LORA) == AdapterConfig(
            AdapterKind.LORA, rank=4, alpha=8.0, target_modules=("q_proj", "v_proj")
        )
        assert obstacle(PEFT_LORA) is None

    def test_a_dora_with_everything(self) -> None:
        config = config_of(
            PEFT_LORA,
            use_dora=True,
            use_rslora=True,
            base_model_name_or_path="Qwen/Qwen3-0.6B",
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 3.5},
            fan_in_fan_out=True,
            lora_alpha=5.5,
            layers_to_transform=[3, 0, 3],
            layers_pattern=["layers", "h"],
            exclude_modules=["lm_head"],
            bias="lora_only",
        )
        assert config == AdapterConfig(
            AdapterKind.DORA,
            base_model_name="Qwen/Qwen3-0.6B",
            exclude_modules=("lm_head",),
            layers_to_transform=(0, 3),
            layers_pattern=("layers", "h"),
            bias="lora_only",
            rank=4,
            alpha=5.5,
            use_rslora=True,
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 3.5},
            target_modules=("q_proj", "v_proj"),
            fan_in_fan_out=True,
        )

    def test_a_layer_and_its_pattern_may_stand_alone_and_layer_0_is_one(self) -> None:
        config = config_of(PEFT_LORA, layers_to_transform=0, layers_pattern="layers", lora_bias=True)
        assert (config.layers_to_transform, config.layers_pattern, config.lora_bias) == ((0,), ("layers",), True)
        empty = config_of(PEFT_LORA, layers_to_transform=[], layers_pattern="", exclude_modules="")
        assert empty == config_of(PEFT_LORA)

    def test_modules_that_a_regular_expression_leaves_out_are_not_known(self) -> None:
        assert config_of(PEFT_LORA, exclude_modules=r".*\.1\..*").exclude_modules is None
        assert config_of(PEFT_IA3, exclude_modules=["v_proj"]).exclude_modules == ("v_proj",)

    def test_what_peft_knows_for_low_rank_alone_is_passed_over_elsewhere(self) -> None:
        assert config_of(PEFT_IA3, layers_to_transform=[0], lora_bias=True, bias="all") == config_of(PEFT_IA3)

    def test_an_ia3_as_peft_writes_it(self) -> None:
        assert config_of(PEFT_IA3) == AdapterConfig(
            AdapterKind.IA3, target_modules=("down_proj", "v_proj"), feedforward_modules=("down_proj",)
        )
        assert obstacle(PEFT_IA3) is None

    def test_a_soft_prompt_as_peft_writes_it(self) -> None:
        assert config_of(PEFT_PROMPT) == AdapterConfig(AdapterKind.SOFT_PROMPT, token_count=4)
        assert obstacle(PEFT_PROMPT) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"peft_type": None},
            {"peft_type": 5},
            {"r": None},
            {"r": 0},
            {"r": 4.0},
            {"r": True},
            {"lora_alpha": None},
            {"lora_alpha": "8"},
            {"lora_alpha": False},
            {"use_dora": 1},
            {"use_rslora": "yes"},
            {"fan_in_fan_out": 0},
            {"bias": "some"},
            {"bias": 5},
            {"lora_bias": 1},
            {"lora_bias": True, "use_dora": True},
            {"layers_to_transform": "0"},
            {"layers_to_transform": [True]},
            {"layers_to_transform": [0.0]},
            {"layers_pattern": 5},
            {"layers_pattern": ["layers", ""]},
            {"exclude_modules": 5},
            {"exclude_modules": [""]},
            {"target_modules": {"q_proj": 1}},
            {"target_modules": ["q_proj", 5]},
            {"target_modules": [""]},
            {"rank_pattern": ["q_proj"]},
            {"rank_pattern": {"q_proj": 0}},
            {"alpha_pattern": {"q_proj": "2"}},
            {"base_model_name_or_path": 5},
        ],
    )
    def test_a_value_that_peft_could_not_use_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(HocketError) as refusal:
            config_of(PEFT_LORA, **change)
        assert refusal.value.reason is Reason.BAD_ADAPTER
        assert next(iter(change)).removesuffix("_or_path") in refusal.value.message

    @pytest.mark.parametrize("document", [PEFT_LORA, PEFT_IA3, PEFT_PROMPT])
    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    @pytest.mark.parametrize("value", [5, [5], "q_proj"])
    def test_patterns_are_objects_whatever_the_kind(self, document: Any, key: str, value: Any) -> None:
        with pytest.raises(HocketError, match=key) as refusal:
            config_of(document, **{key: value})
        assert refusal.value.reason is Reason.BAD_ADAPTER
        assert config_of(document, **{key: {}}) == config_of(document)

    def test_a_document_that_is_no_object_is_refused(self) -> None:
        with pytest.raises(HocketError) as refusal:
            read_config(b"[]")
        assert refusal.value.reason is Reason.BAD_ADAPTER

    @pytest.mark.parametrize("data", [b"{", b'{"r": 1, "r": 2}', b'{"lora_alpha": NaN}', b"\xff"])
    def test_what_is_not_json_of_one_meaning_is_refused(self, data: bytes) -> None:
        with pytest.raises(HocketError) as refusal:
            read_config(data)
        assert refusal.value.reason is Reason.BAD_JSON

    @pytest.mark.parametrize("kind", ["LOKR", "ADALORA", "PREFIX_TUNING", "\x1b[2J"])
    def test_a_kind_without_a_name_here_is_refused(self, kind: str) -> None:
        with pytest.raises(HocketError, match="train LoRA") as refusal:
            config_of(PEFT_LORA, peft_type=kind)
        assert refusal.value.reason is Reason.UNSUPPORTED_TYPE
        assert refusal.value.message.isprintable()

    @pytest.mark.parametrize(
        ("document", "change", "limits"),
        [
            (PEFT_LORA, {"r": 5}, Limits(rank=4)),
            (PEFT_LORA, {"rank_pattern": {"q_proj": 5}}, Limits(rank=4)),
            (PEFT_PROMPT, {"num_virtual_tokens": 5}, Limits(soft_prompt_tokens=4)),
            (PEFT_LORA, {"target_modules": ["a", "b"]}, Limits(tensors=1)),
            (PEFT_LORA, {"target_modules": ["a" * 9]}, Limits(tag_chars=8)),
            (PEFT_LORA, {"target_modules": [], "exclude_modules": ["a", "b"]}, Limits(tensors=1)),
            (PEFT_LORA, {"target_modules": [], "layers_pattern": ["a", "b"]}, Limits(tensors=1)),
            (PEFT_LORA, {"target_modules": [], "layers_to_transform": [1, 1]}, Limits(tensors=1)),
            (PEFT_LORA, {}, Limits(manifest_bytes=100)),
        ],
    )
    def test_what_is_beyond_a_limit_is_refused(
        self, document: dict[str, Any], change: dict[str, Any], limits: Limits
    ) -> None:
        read_config(encoded({**document, **change}))
        with pytest.raises(HocketError) as refusal:
            read_config(encoded({**document, **change}), limits)
        assert refusal.value.reason is Reason.TOO_LARGE


class TestSupport:
    @pytest.mark.parametrize(
        ("change", "advice"),
        [
            ({"task_type": "SEQ_CLS"}, "CAUSAL_LM alone"),
            ({"rank_pattern": {"^model.layers.0": 2}}, "write plain names"),
            ({"alpha_pattern": {".*q_proj": 2}}, "write plain names"),
            ({"layers_pattern": ["layers", "h(a|b)"], "layers_to_transform": [0]}, "write plain names"),
            ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "olora"}, "plain LoRA"),
            ({"init_lora_weights": "loftq"}, "train it again"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
            ({"megatron_config": {"a": 1}}, "megatron_config"),
            ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
            ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
            ({"use_qalora": True}, "use_qalora"),
            ({"kasa_config": {"a": 1}}, "kasa_config"),
            ({"of_tomorrow": 0.5}, "of_tomorrow"),
        ],
    )
    def test_what_changes_the_result_and_is_not_known_is_named(self, change: dict[str, Any], advice: str) -> None:
        why = obstacle(PEFT_LORA, **change)
        assert why is not None
        assert advice in why

    @pytest.mark.parametrize(
        "change",
        [
            {"task_type": None},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
            {"init_lora_weights": False},
            {"of_tomorrow": None, "of_next_week": False, "later": {}, "never": []},
            {"layers_to_transform": 3, "layers_pattern": "layers", "exclude_modules": r".*\.1\..*"},
            {"lora_bias": True, "bias": "all"},
        ],
    )
    def test_what_can_be_done_is_no_obstacle(self, change: dict[str, Any]) -> None:
        assert obstacle(PEFT_LORA, **change) is None

    def test_feedforward_modules_by_regular_expression_are_not_supported(self) -> None:
        assert "write the list of names" in (obstacle(PEFT_IA3, feedforward_modules=".*down.*") or "")
        assert obstacle(PEFT_IA3, feedforward_modules=["down_proj"]) is None

    def test_a_prompt_for_an_encoder_is_not_supported(self) -> None:
        assert "decoder" in (obstacle(PEFT_PROMPT, num_transformer_submodules=2) or "")


def findings(kind: str, config: dict[str, Any] | None = None, limits: Limits | None = None, **tensors: Any) -> Findings:
    """What the tensors of a small adapter show, with some replaced, added or (None) dropped.

    Their names are shortened: `q_A` stands for `lora_A` of the first layer's `q_proj`.
    """
    every = {**adapter_tensors(kind), **{full(name): value for name, value in tensors.items()}}
    kept = {name: value for name, value in every.items() if value is not None}
    document = adapter_config(kind, **(config or {}))
    return check_tensors(read_config(encoded(document)), read_tensors(save(kept)), limits or Limits())


RAW = RawTensor("F32", (1,), bytes(4))


def full(short: str) -> str:
    module, _, part = short.partition("_")
    parts = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "l": "ia3_l"}
    parts |= {"s": "lora_B.bias", "c": "base_layer.bias", "b": "bias"}
    if part not in parts:
        return short
    return f"{module_path(0, {'q': 'q_proj', 'd': 'down_proj', 'k': 'k_proj'}[module])}.{parts[part]}"


def numbers(*shape: int) -> Any:
    return np.ones(shape, np.float32)


class TestTensors:
    @pytest.mark.parametrize(("kind", "rank"), [("lora", 2), ("dora", 2), ("ia3", 0)])
    def test_those_that_belong_to_the_configuration_are_accepted(self, kind: str, rank: int) -> None:
        assert findings(kind) == Findings(rank, ("down_proj", "q_proj"))

    def test_so_is_a_soft_prompt(self) -> None:
        assert findings("soft_prompt") == Findings()

    def test_targets_may_be_whole_paths(self) -> None:
        targets = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
        assert findings("lora", {"target_modules": targets}).projections == ("down_proj", "q_proj")

    def test_a_module_may_have_a_rank_of_its_own(self) -> None:
        config = {"rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 2}}
        assert findings("lora", config, q_A=numbers(3, HIDDEN), q_B=numbers(HIDDEN, 3)).rank == 3

    @pytest.mark.parametrize(
        ("kind", "changes", "blamed"),
        [
            ("lora", {"q_A": None}, "q_proj"),
            ("lora", {"q_B": None}, "q_proj"),
            ("lora", {"q_A": numbers(3, HIDDEN)}, "rank 2"),
            ("lora", {"q_A": numbers(3, HIDDEN), "q_B": numbers(HIDDEN, 3)}, "rank 2"),
            ("lora", {"q_A": numbers(2, HIDDEN, 1)}, "not matrices"),
            ("lora", {"q_B": numbers(HIDDEN)}, "not matrices"),
            ("lora", {"k_A": numbers(2, HIDDEN), "k_B": numbers(4, 2)}, "k_proj"),
            ("lora", {"q_m": numbers(HIDDEN)}, "lora_magnitude_vector"),
            ("lora", {"q_l": numbers(HIDDEN, 1)}, "ia3_l"),
            ("lora", {"model.layers.0.self_attn.q_proj.lora_A.weight": numbers(2, HIDDEN)}, "'model.layers.0"),
            ("lora", {"base_model.model.lora_A.weight": numbers(2, HIDDEN)}, "lora_A"),
            ("lora", {"nonsense": numbers(1)}, "nonsense"),
            ("dora", {"q_m": None}, "lora_magnitude_vector"),
            ("dora", {"q_m": numbers(HIDDEN + 1)}, "outputs"),
            ("dora", {"q_m": numbers(HIDDEN, 1)}, "outputs"),
            ("ia3", {"q_l": numbers(1, HIDDEN)}, "not feed-forward"),
            ("ia3", {"d_l": numbers(HIDDEN, 1)}, "feed-forward"),
            ("ia3", {"q_l": numbers(HIDDEN)}, "ia3_l"),
            ("soft_prompt", {"prompt_embeddings": numbers(3, HIDDEN)}, "virtual tokens"),
            ("soft_prompt", {"prompt_embeddings": numbers(2)}, "virtual tokens"),
            ("soft_prompt", {"another": numbers(2)}, "another"),
        ],
    )
    def test_those_that_do_not_are_refused_by_name(self, kind: str, changes: dict[str, Any], blamed: str) -> None:
        with pytest.raises(HocketError) as refusal:
            findings(kind, **changes)
        assert refusal.value.reason is Reason.BAD_ADAPTER
        assert blamed in refusal.value.message

    @pytest.mark.parametrize(
        ("config", "changes"),
        [
            ({"lora_bias": True}, {"q_s": 8, "d_s": 8, **{f"{module_path(1, m)}.lora_B.bias": 8 for m in MODULES}}),
            ({"bias": "lora_only"}, {"q_c": 8}),
            ({"bias": "all"}, {"q_c": 8, "k_b": 4}),
        ],
    )
    def test_biases_belong_to_a_configuration_that_trains_them(
        self, config: dict[str, Any], changes: dict[str, int]
    ) -> None:
        tensors = {name: numbers(count) for name, count in changes.items()}
        assert findings("lora", config, **tensors) == Findings(2, ("down_proj", "q_proj"))
        with pytest.raises(HocketError, match="none that PEFT saves"):
            findings("lora", **tensors)

    @pytest.mark.parametrize(
        ("config", "changes", "blamed"),
        [
            ({"lora_bias": True}, {"q_s": 8}, "no lora_B.bias"),
            ({"bias": "lora_only"}, {"q_b": 8}, "q_proj.bias"),
            ({"bias": "lora_only"}, {"k_c": 4}, "k_proj"),
            ({"bias": "all"}, {"q_b": 8}, "base_layer.bias"),
            ({"bias": "all"}, {"k_c": 4}, "k_proj"),
        ],
    )
    def test_a_bias_that_peft_would_call_otherwise_is_refused(
        self, config: dict[str, Any], changes: dict[str, int], blamed: str
    ) -> None:
        with pytest.raises(HocketError, match=blamed) as refusal:
            findings("lora", config, **{name: numbers(count) for name, count in changes.items()})
        assert refusal.value.reason is Reason.BAD_ADAPTER

    def test_biases_alone_are_no_adapter(self) -> None:
        tensors = {"base_model.model.model.layers.0.self_attn.k_proj.bias": RAW}
        with pytest.raises(HocketError, match="only biases") as refusal:
            check_tensors(config_of(PEFT_LORA, bias="all"), tensors)
        assert refusal.value.reason is Reason.BAD_ADAPTER

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ({"layers_to_transform": [0]}, {"layers_to_transform": [0, 1]}),
            (
                {"layers_to_transform": [0, 1], "layers_pattern": "h"},
                {"layers_to_transform": 1, "layers_pattern": None},
            ),
            ({"exclude_modules": ["layers.1.mlp.down_proj"]}, {"exclude_modules": ["layers.2.mlp.down_proj"]}),
        ],
    )
    def test_tensors_of_a_module_that_was_left_out_are_refused_by_name(
        self, wrong: dict[str, Any], right: dict[str, Any]
    ) -> None:
        with pytest.raises(HocketError, match=r"'model\.layers\.\d\.\w+\.(down|q)_proj'.*leaves out") as refusal:
            findings("lora", wrong)
        assert refusal.value.reason is Reason.BAD_ADAPTER
        second = {full_name: None for full_name in adapter_tensors() if ".layers.0." in full_name}
        findings("lora", right, **(second if right.get("layers_to_transform") == 1 else {}))

    def test_a_module_that_is_named_but_has_no_tensors_is_told(self) -> None:
        found = findings("lora", {"target_modules": ["q_proj", "down_proj", "k_proj"]})
        assert found.unmatched == ("k_proj",)
        assert found.projections == ("down_proj", "q_proj")
        assert findings("lora").unmatched == ()

    def test_modules_that_a_regular_expression_chose_are_those_that_have_tensors(self) -> None:
        found = findings("lora", {"target_modules": r".*\.(q|down)_proj"})
        assert (found.projections, found.unmatched, found.not_servable) == (("down_proj", "q_proj"), (), None)

    def test_names_that_documents_shorten_are_read_as_peft_s(self) -> None:
        names = adapter_tensors("dora")
        shortened = [name.removeprefix("base_model.model.").removesuffix(".weight") for name in names]
        assert as_peft_names({name.replace("_vector", ""): RAW for name in shortened}).keys() == names.keys()
        assert as_peft_names({"x.ia3_scale": RAW, "prompt_embeddings": RAW}).keys() == {
            "base_model.model.x.ia3_l",
            "prompt_embeddings",
        }

    def test_one_tensor_under_two_names_is_refused(self) -> None:
        with pytest.raises(HocketError, match="twice") as refusal:
            as_peft_names({"x.lora_A": RAW, "base_model.model.x.lora_A.weight": RAW})
        assert refusal.value.reason is Reason.BAD_ADAPTER

    def test_a_name_fits_whole_parts_of_a_path_only(self) -> None:
        with pytest.raises(HocketError, match="does not name"):
            findings("lora", {"target_modules": ["proj"]})

    def test_no_tensors_are_no_adapter(self) -> None:
        with pytest.raises(HocketError, match="hold no tensor") as refusal:
            check_tensors(config_of(PEFT_LORA), {})
        assert refusal.value.reason is Reason.BAD_ADAPTER

    @pytest.mark.parametrize("part", ["lora_embedding_A", "lora_embedding_B", "base_layer.weight"])
    def test_what_reaches_into_the_base_is_well_formed_but_cannot_serve(self, part: str) -> None:
        config = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
        found = findings("lora", config, **{f"base_model.model.model.embed_tokens.{part}": numbers(2, 2)})
        assert part in (found.not_servable or "")
        assert found.projections == ("down_proj", "embed_tokens", "q_proj")

    @pytest.mark.parametrize("limits", [Limits(tag_chars=30), Limits(capabilities=1)])
    def test_names_and_kinds_of_modules_are_bounded(self, limits: Limits) -> None:
        with pytest.raises(HocketError) as refusal:
            findings("lora", limits=limits)
        assert refusal.value.reason is Reason.TOO_LARGE


def test_the_first_name_of_a_pattern_that_fits_counts() -> None:
    pattern = {"layers.1.q_proj": 8, "q_proj": 4, "layers.0.q_proj": 16}
    modules = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.v_proj"]

    assert list(values_for(modules, pattern, 2).values()) == [4, 8, 2]
