"""What a manifest, the command line and the defaults make together."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from hocket.base_folder import base_digest
from hocket.errors import HocketError, Reason
from hocket.packages.adapter import AdapterKind
from tests.bases import hollow_base
from tests.trainings import ADAPTERS, Workshop
from training.plan import Keep, Precision, PromptStart, Settings, plan_training

if TYPE_CHECKING:
    from pathlib import Path

    from training.plan import Plan


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """With a base that nobody loads."""
    return Workshop(hollow_base(tmp_path / "tiny"), tmp_path)


def planned(shop: Workshop, manifest: Path, **told: Any) -> Plan:
    return plan_training(manifest, base=shop.base, out=shop.folder / "out", data=shop.folder / "d.jsonl", **told)


def refused(shop: Workshop, manifest: Path, **told: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        planned(shop, manifest, **told)
    return caught.value


def test_the_defaults_are_those_of_the_reference_trainer(shop: Workshop) -> None:
    plan = planned(shop, shop.manifest())
    assert plan.settings == Settings()
    assert (plan.settings.learning_rate, plan.settings.warmup_ratio, plan.settings.save_steps) == (5e-5, 0.1, 250)
    assert plan.adapter.dropout == 0.1
    assert plan.base_digest == base_digest(shop.base)


def test_the_manifest_wins_over_defaults_and_the_command_line_over_the_manifest(shop: Workshop) -> None:
    manifest = shop.manifest(
        config={"learning_rate": 3e-4, "epochs": 2, "num_epochs": None, "max_seq_length": 2048, "bf16": True, "seed": 7}
    )
    settings = planned(shop, manifest, settings={"seed": 8}).settings
    assert (settings.learning_rate, settings.epochs, settings.max_length) == (3e-4, 2.0, 2048)
    assert (settings.precision, settings.seed) == (Precision.BFLOAT16, 8)


def test_a_ratio_on_the_command_line_wins_over_the_manifests_steps(shop: Workshop) -> None:
    manifest = shop.manifest(config={"warmup_steps": 100})
    assert planned(shop, manifest).settings.warmup_steps == 100
    assert planned(shop, manifest, settings={"warmup_ratio": 0.2}).settings.warmup_steps == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lora", (AdapterKind.LORA, 4, 8, False)),
        ("rslora", (AdapterKind.LORA, 4, 8, True)),
        ("dora", (AdapterKind.DORA, 4, 8, False)),
        ("ia3", (AdapterKind.IA3, 0, 0, False)),
    ],
)
def test_every_kind_is_read_from_the_manifest(kind: str, expected: tuple[object, ...], shop: Workshop) -> None:
    adapter = planned(shop, shop.manifest(kind)).adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.use_rslora) == expected


def test_a_soft_prompt_is_as_its_declaration_says(shop: Workshop) -> None:
    declared = [{"name": "style", "path": "s.safetensors", "length": 6, "init_text": "be brief"}]
    adapter = planned(shop, shop.manifest("soft_prompt", soft_prompts=declared)).adapter
    assert (adapter.kind, adapter.tokens, adapter.start) == (AdapterKind.SOFT_PROMPT, 6, PromptStart.TEXT)
    assert planned(shop, shop.manifest("soft_prompt")).adapter.tokens == 32


def test_ia3_scales_the_input_of_feed_forward_projections_unless_told(shop: Workshop) -> None:
    stated = {key: value for key, value in ADAPTERS["ia3"].items() if key != "feedforward_modules"}
    assert planned(shop, shop.manifest("ia3", base={"adapters": [stated]})).adapter.feedforward_modules == (
        "down_proj",
    )


def test_schema_1_is_read_too(shop: Workshop) -> None:
    manifest = shop.manifest()
    document = json.loads(manifest.read_text())
    [base] = document.pop("base_models")
    adapters = base.pop("adapters")
    manifest.write_text(json.dumps({**document, "schema_version": "1.0", "base_model": base, "adapters": adapters}))
    assert planned(shop, manifest).adapter.rank == 4


def test_int4_in_the_manifest_is_qlora_unless_told_otherwise(shop: Workshop) -> None:
    manifest = shop.manifest(base={"quantization": "int4"})
    assert planned(shop, manifest).settings.qlora
    assert not planned(shop, manifest, settings={"qlora": False}).settings.qlora


def test_the_manifest_may_name_its_data(shop: Workshop) -> None:
    manifest = shop.manifest(training={"dataset": {"path": "a.jsonl", "validation_path": "b.jsonl"}})
    (shop.folder / "b.jsonl").write_text("")
    plan = plan_training(manifest, base=shop.base, out=shop.folder / "out")
    assert (plan.data, plan.eval_data) == (shop.folder / "a.jsonl", shop.folder / "b.jsonl")
    with pytest.raises(HocketError, match="give --data"):
        plan_training(shop.manifest(), base=shop.base, out=shop.folder / "out")


def test_one_of_several_bases_is_known_by_digest_or_name(shop: Workshop) -> None:
    manifest = shop.manifest()
    document = json.loads(manifest.read_text())
    [base] = document["base_models"]
    manifest.write_text(json.dumps({**document, "base_models": [{**base, "name": "other"}, base]}))
    assert planned(shop, manifest).base_place == 1
    digest = {"hocket_base": base_digest(shop.base)}
    manifest.write_text(json.dumps({**document, "base_models": [{**base, "name": "other", **digest}, base]}))
    assert planned(shop, manifest).base_place == 0


def test_a_manifest_for_another_base_is_refused(shop: Workshop) -> None:
    manifest = shop.manifest(base={"hocket_base": f"sha256:{'0' * 64}"})
    assert refused(shop, manifest).reason is Reason.BASE_MISMATCH


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"config": {"method": "dpo"}}, Reason.BAD_MANIFEST, "method"),
        ({"config": {"batch_size": 0}}, Reason.BAD_MANIFEST, "batch_size"),
        ({"config": {"packing": 1}}, Reason.BAD_MANIFEST, "true or false"),
        ({"config": {"seed": True}}, Reason.BAD_MANIFEST, "must be a number"),
        ({"config": {"weight_decay": "much"}}, Reason.BAD_MANIFEST, "must be a number"),
        ({"config": {"lr_scheduler": "wavy"}}, Reason.BAD_MANIFEST, "one of linear"),
        (
            {"config": {"lr_scheduler_kwargs": {"num_cycles": -1}}},
            Reason.BAD_MANIFEST,
            "num_cycles|lr_scheduler_kwargs",
        ),
        ({"config": {"lr_scheduler_kwargs": [1]}}, Reason.BAD_MANIFEST, "must be an object"),
        ({"config": {"eval_steps": 100}}, Reason.BAD_REQUEST, "divide"),
        ({"base": {"adapters": [{"type": "lokr", "target_modules": ["q_proj"]}]}}, Reason.UNSUPPORTED_TYPE, "lokr"),
        ({"base": {"adapters": [ADAPTERS["lora"]] * 2}}, Reason.BAD_MANIFEST, "one adapter"),
        ({"base": {"adapters": [{"type": "lora", "target_modules": []}]}}, Reason.MANIFEST_TARGET_MODULES, "empty"),
        ({"base": {"adapters": [{**ADAPTERS["lora"], "r": 10**9}]}}, Reason.BAD_MANIFEST, "at most"),
        ({"base": {"adapters": [{**ADAPTERS["lora"], "dropout": 1.0}]}}, Reason.BAD_MANIFEST, "dropout"),
        ({"base": {"adapters": [{**ADAPTERS["lora"], "scaling": "learned"}]}}, Reason.BAD_MANIFEST, "scaling"),
        (
            {"base": {"adapters": [{**ADAPTERS["ia3"], "feedforward_modules": ["up_proj"]}]}},
            Reason.BAD_MANIFEST,
            "up_proj",
        ),
    ],
)
def test_what_cannot_be_trained_with_is_refused(
    changes: dict[str, Any], reason: Reason, says: str, shop: Workshop
) -> None:
    planned(shop, shop.manifest())  # without the change it can
    with pytest.raises(HocketError, match=says) as caught:
        planned(shop, shop.manifest(**changes))
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "declared", [{"tokens": 10**6}, {"init_method": "magic"}, {"init_method": "text", "init_text": " "}]
)
def test_a_soft_prompt_that_cannot_be_is_refused(declared: dict[str, Any], shop: Workshop) -> None:
    prompt = {"name": "style", "path": "s.safetensors", "tokens": 4}
    planned(shop, shop.manifest("soft_prompt", soft_prompts=[prompt]))
    error = refused(shop, shop.manifest("soft_prompt", soft_prompts=[{**prompt, **declared}]))
    assert error.reason is Reason.BAD_MANIFEST


def test_a_soft_prompt_is_not_packed(shop: Workshop) -> None:
    error = refused(shop, shop.manifest("soft_prompt"), settings={"packing": True})
    assert error.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("epochs", [math.inf, math.nan, -1.0, 10**400])
def test_endless_epochs_are_refused(epochs: float, shop: Workshop) -> None:
    error = refused(shop, shop.manifest(), settings={"epochs": epochs})
    assert (error.reason, error.field) == (Reason.BAD_REQUEST, "--epochs")


def test_4_bits_in_the_config_win_over_what_the_base_says(shop: Workshop) -> None:
    manifest = shop.manifest(base={"quantization": "int4"}, config={"qlora": False})
    assert not planned(shop, manifest).settings.qlora


def test_a_bad_option_is_called_by_its_name(shop: Workshop) -> None:
    error = refused(shop, shop.manifest(), settings={"batch_size": 0})
    assert (error.reason, error.field) == (Reason.BAD_REQUEST, "--batch-size")


def test_a_manifest_that_is_not_there_is_refused(shop: Workshop) -> None:
    assert refused(shop, shop.folder / "none.json").reason is Reason.BAD_REQUEST


def test_what_a_manifest_asks_for_in_vain_is_said(shop: Workshop) -> None:
    manifest = shop.manifest(
        config={"use_unsloth": True, "gradient_checkpointing": "full", "bf16": False},
        soft_prompts=[{"name": "s", "path": "s.safetensors", "tokens": 4}],
    )
    plan = planned(shop, manifest)
    assert [warning.split()[0] for warning in plan.warnings] == [
        "training.config.use_unsloth",
        "soft_prompts[]",
        "without",
    ]
    assert plan.settings.gradient_checkpointing
    assert plan.settings.precision is Precision.FLOAT32
    assert planned(shop, shop.manifest(), settings={"keep": Keep.FINAL}).warnings == ()
