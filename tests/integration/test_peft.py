"""What PEFT saves becomes a package in one command, and comes back with the same bytes in every tensor."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.numpy import load
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from hocket.cli.main import app
from hocket.packages import open_package
from hocket.packages.adapter import Adapter, AdapterFacts, RawTensor
from hocket.trust_folder import TrustFolder
from tests.registries import running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # PEFT asks transformers for what it is about to rename
)

MODULES = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(
        r=4, lora_alpha=8, target_modules=MODULES, use_rslora=True, rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM"
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=MODULES, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "soft_prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )


@pytest.fixture(scope="module")
def base_folder(base: Qwen3Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    Qwen3ForCausalLM(base).save_pretrained(folder)
    return folder


def hocket(*arguments: object) -> Any:
    """Run a command, and return its JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", CONFIGS)
async def test_an_adapter_saved_by_peft_is_packed_released_published_and_pulled_unchanged(
    kind: str, base: Qwen3Config, base_folder: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "out"
    model = get_peft_model(Qwen3ForCausalLM(base), CONFIGS[kind])
    model.save_pretrained(saved)
    name = f"expert-{kind.replace('_', '-')}"
    packed = tmp_path / "x.expert"
    key = tmp_path / "acme.key"

    made = hocket("expert", "pack", saved, "--name", name, "--version", "1.0.0", "--base", base_folder, "-o", packed)
    public_key = hocket("keygen", key)["public_key"]
    hocket("trust", "add", "acme", "--key", public_key, "--trust", tmp_path / "trust")
    signed = hocket("sign", packed, "--publisher", "acme", "--key", key)
    assert signed["release"] == f"acme/{name}@1.0.0"  # name and version are the manifest's
    release = packed.with_name(packed.name + ".release.json").read_bytes()
    async with running(tmp_path, "socket") as registry:
        await registry.client().publish(packed.read_bytes(), release)
        header, pulled = await registry.client().download(made["digest"])

    trust = TrustFolder(tmp_path / "trust").read()
    opened = open_package(pulled, releases=header.releases, trust=trust, now=datetime.now(UTC))
    assert isinstance(opened.facts, AdapterFacts)
    assert isinstance(opened.model, Adapter)
    assert opened.facts.kind == ("lora" if kind == "rslora" else kind)
    assert opened.model.config.use_rslora is (kind == "rslora")
    assert opened.facts.base.digest is not None
    assert opened.facts.not_servable is None
    original = load((saved / "adapter_model.safetensors").read_bytes())
    assert {name: bytes(tensor.data) for name, tensor in _all(opened.model)} == {
        name: tensor.tobytes() for name, tensor in original.items()
    }
    assert {name: tensor.shape for name, tensor in _all(opened.model)} == {n: t.shape for n, t in original.items()}


def test_peft_loads_what_a_package_holds(base: Qwen3Config, base_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "out"
    model = get_peft_model(Qwen3ForCausalLM(base), CONFIGS["dora"])
    model.save_pretrained(saved)
    packed = tmp_path / "x.expert"
    hocket("expert", "pack", saved, "--name", "expert-x", "--version", "1.0.0", "--base", base_folder, "-o", packed)

    from hocket.packages.expert.archive import read_archive  # noqa: PLC0415 - beside its use

    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name, content in read_archive(packed.read_bytes()).files.items():
        (unpacked / name).write_bytes(content)
    again = PeftModel.from_pretrained(Qwen3ForCausalLM(base), unpacked)
    again.save_pretrained(str(tmp_path / "again"))

    before, after = (
        load((tmp_path / folder / "adapter_model.safetensors").read_bytes()) for folder in ("out", "again")
    )
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def _all(adapter: Adapter) -> list[tuple[str, RawTensor]]:
    """Every tensor by PEFT's name; a soft prompt alone is read as one."""
    return [
        *adapter.tensors.items(),
        *(("prompt_embeddings", prompt.embeddings) for prompt in adapter.soft_prompts),
    ]
