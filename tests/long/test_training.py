"""Every kind of adapter: trained, stopped and resumed to the same weights, packed, valid; and in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hocket.cli.main import app
from hocket.errors import HocketError, Reason
from hocket.packages.expert.validation import validate
from tests.trainings import ADAPTERS, Workshop

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
WAYS: tuple[dict[str, object], ...] = (
    {},
    {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "lr_scheduler": "linear"},
    {"precision": "bfloat16", "group_by_length": True},
)


def trained(plan: Any, until: int | None = None) -> Any:
    from training.train import train  # noqa: PLC0415 - slow

    def stop(progress: Any) -> None:
        if progress.step == until:
            raise HocketError(Reason.BAD_REQUEST, "stopped")

    return train(plan, on_progress=stop)


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_resumes_to_the_same_weights_and_is_packed(
    kind: str, way: int, shop: Workshop, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**WAYS[way], "save_steps": 3, "max_steps": 9}
    trained(shop.plan(kind, "whole", **settings))
    with pytest.raises(HocketError, match="stopped"):
        trained(shop.plan(kind, "parts", **settings), until=5)
    outcome = trained(shop.plan(kind, "parts", resume=True, **settings))
    assert outcome.steps == 9
    whole, parts = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all((whole[name] == parts[name]).all() for name in whole)
    package = tmp_path / "x.expert"
    result = CliRunner().invoke(app, ["expert", "pack", str(tmp_path / "parts"), "--out", str(package)])
    assert result.exit_code == 0, result.output
    assert validate(package.read_bytes()).errors == ()


@pytest.mark.parametrize("start", ["random", "text", "vocab_sample"])
def test_a_soft_prompt_begins_as_it_is_told(start: str, shop: Workshop, tmp_path: Path) -> None:
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    declared = {"name": "style", "path": "style.safetensors", "tokens": 6, "init_method": start, "init_text": "the fox"}
    manifest = shop.manifest("soft_prompt", soft_prompts=[declared])
    settings = {"max_steps": 1, "learning_rate": 1e-9, "batch_size": 4}
    plan = plan_training(manifest, base=shop.base, out=tmp_path / "out", data=shop.data(), settings=settings)
    trained(plan)
    [prompt] = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    embeddings = load_file(shop.base / "model.safetensors")["model.embed_tokens.weight"]
    nearest = [float(abs(embeddings - row).max(axis=1).min()) for row in prompt]
    assert (max(nearest) < 1e-6) is (start != "random")
    result = CliRunner().invoke(app, ["expert", "validate", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_base_in_four_bits_is_trained_on_and_resumed(kind: str, shop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")
    settings: dict[str, Any] = {"qlora": True, "save_steps": 2, "learning_rate": 1e-4}
    trained(shop.plan(kind, "whole", **settings))
    with pytest.raises(HocketError, match="stopped"):
        trained(shop.plan(kind, "parts", **settings), until=3)
    trained(shop.plan(kind, "parts", resume=True, **settings))
    whole, parts = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert {tensor.dtype.name for tensor in whole.values()} == {"float32"}


def test_packed_and_padded_examples_give_the_same_loss(shop: Workshop) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "batch_size": 64, "logging_steps": 1}
    padded = trained(shop.plan("ia3", "padded", **settings))
    packed = trained(shop.plan("ia3", "packed", packing=True, max_length=128, **settings))
    assert padded.train_loss == pytest.approx(packed.train_loss, rel=1e-4)
