"""A starter kit whose base and experts are random: laid out, packed and signed as the real one, and quick to make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from examples.starter.kit import BASE
from examples.text.random_base import write_base
from hocket.base_folder import base_digest
from hocket.bases import BaseModel
from hocket.identity import ReleaseName
from hocket.packages.expert.writer import gather, write_archive
from hocket.packages.keys import public_key_of
from hocket.packages.release import Purpose, Release, Subject, sign_release
from hocket.packages.trust import TrustedKey
from hocket.trust_folder import TrustFolder

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFESTS = Path(__file__).parents[1] / "training" / "starter" / "experts"
PUBLISHER = "hocket"
SIZES: Mapping[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
_SEED = b"\x07" * 32
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def random_kit(folder: Path, sizes: Mapping[str, Any] = SIZES) -> Path:
    """Make a kit with the manifests of the real one.

    Args:
        folder: Made if need be.
        sizes: Of the base.
    """
    base = write_base(folder / BASE, dict(sizes), ascii_only=True)
    model = BaseModel(BASE, digest=base_digest(base))
    TrustFolder(folder / "trust").add_key(TrustedKey(public_key_of(_SEED), PUBLISHER))
    (folder / "experts").mkdir()
    for seed, path in enumerate(sorted(MANIFESTS.glob("*.json"))):
        manifest = path.read_bytes()
        stated = json.loads(manifest)
        files = _adapter(stated, sizes, seed)
        data = write_archive(gather(manifest, files.get, [*files], base=model))
        release = Release(
            ReleaseName(PUBLISHER, stated["name"], stated["version"]), Subject.of(Purpose.PACKAGE, data, "expert")
        )
        package = folder / "experts" / f"{stated['name']}.expert"
        package.write_bytes(data)
        package.with_name(f"{package.name}.release.json").write_bytes(sign_release(release, _SEED))
    return folder


def _adapter(manifest: Mapping[str, Any], sizes: Mapping[str, Any], seed: int) -> dict[str, bytes]:
    """What training would leave: weights and their configuration."""
    [entry] = manifest["base_models"]
    [adapter] = entry["adapters"]
    kind, modules = adapter["type"], adapter["target_modules"]
    random = np.random.default_rng(seed)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }

    def numbers(*shape: int) -> Any:
        return (0.05 * random.standard_normal(shape)).astype(np.float32)

    config: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": BASE}
    if kind == "soft_prompt":
        rows = manifest["soft_prompts"][0]["tokens"]
        tensors = {"prompt_embeddings": numbers(rows, hidden)}
        config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": rows, "token_dim": hidden}
        return {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for module in modules:
            outputs, inputs = shapes[module]
            block = "self_attn" if module in _ATTENTION else "mlp"
            path = f"base_model.model.model.layers.{layer}.{block}.{module}"
            if kind == "ia3":
                shape = (1, inputs) if module in adapter["feedforward_modules"] else (outputs, 1)
                tensors[f"{path}.ia3_l"] = 1 + numbers(*shape)
                continue
            tensors[f"{path}.lora_A.weight"] = numbers(adapter["r"], inputs)
            tensors[f"{path}.lora_B.weight"] = numbers(outputs, adapter["r"])
            if kind == "dora":
                tensors[f"{path}.lora_magnitude_vector"] = np.abs(1 + numbers(outputs))
    config |= {"target_modules": modules}
    if kind == "ia3":
        config |= {"peft_type": "IA3", "feedforward_modules": adapter["feedforward_modules"]}
    else:
        stabilised = adapter["scaling"] == "rsqrt"
        config |= {"peft_type": "LORA", "r": adapter["r"], "lora_alpha": adapter["alpha"], "lora_dropout": 0.0}
        config |= {"use_dora": kind == "dora", "use_rslora": stabilised, "bias": "none"}
    return {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
