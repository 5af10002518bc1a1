"""What PEFT saves becomes a package in one command, and comes back with the same bytes in every tensor."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load
from typer.testing import CliRunner

from hocket.cli.main import app
from hocket.packages import open_package
from hocket.packages.adapter import Adapter, AdapterFacts, RawTensor
from hocket.packages.expert.archive import read_archive
from hocket.trust_folder import TrustFolder
from tests.registries import running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # PEFT asks transformers for what it is about to rename
)

MODULES = ["q_proj", "v_proj", "down_proj"]
KINDS = ("lora", "rslora", "dora", "ia3", "soft_prompt")


def trained(kind: str) -> Any:
    """A model with an adapter of that kind. Imports here: every other test process does without these libraries."""
    from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model  # noqa: PLC0415

    if kind == "ia3":
        config: Any = IA3Config(target_modules=MODULES, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    elif kind == "soft_prompt":
        config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    else:
        pattern = {"v_proj": 2} if kind == "rslora" else {}
        config = LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, rank_pattern=pattern, task_type="CAUSAL_LM")
        config.use_rslora, config.use_dora = kind == "rslora", kind == "dora"
    return get_peft_model(base_model(), config)


def base_model() -> Any:
    """A random Qwen3 of two layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415

    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    base_model().save_pretrained(folder)
    return folder


def hocket(*arguments: object) -> Any:
    """Run a command, and return its JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_adapter_saved_by_peft_is_packed_released_published_and_pulled_unchanged(
    kind: str, base_folder: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "out"
    trained(kind).save_pretrained(saved)
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


def test_peft_loads_what_a_package_holds(base_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel  # noqa: PLC0415 - as above

    saved = tmp_path / "out"
    trained("dora").save_pretrained(saved)
    packed = tmp_path / "x.expert"
    hocket("expert", "pack", saved, "--name", "expert-x", "--version", "1.0.0", "--base", base_folder, "-o", packed)

    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name, content in read_archive(packed.read_bytes()).files.items():
        (unpacked / name).write_bytes(content)
    again = PeftModel.from_pretrained(base_model(), unpacked)
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
