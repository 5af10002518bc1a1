"""Small `.expert` packages for tests, made without the code under test and without torch."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard
from nacl.signing import SigningKey
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Mapping

HIDDEN = 8
INNER = 12
HEADS = 4
"""Outputs of `k_proj` and `v_proj`."""

Files = dict[str, bytes]

_SHAPES = {  # (in, out)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HEADS),
    "v_proj": (HIDDEN, HEADS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}


def module_path(layer: int, module: str) -> str:
    block = "self_attn" if module in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{module}"


def adapter_tensors(
    kind: str = "lora", *, rank: int = 2, modules: tuple[str, ...] = ("q_proj", "down_proj"), layers: int = 2
) -> dict[str, Any]:
    """Tensors by name, as PEFT saves them for `lora`, `dora`, `ia3` (its last module is feed-forward) or `soft_prompt`.

    A soft prompt has `rank` rows.
    """
    random = np.random.default_rng(7)

    def numbers(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    if kind == "soft_prompt":
        return {"prompt_embeddings": numbers(rank, HIDDEN)}
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for module in modules:
            path = module_path(layer, module)
            inputs, outputs = _SHAPES[module]
            if kind == "ia3":
                tensors[f"{path}.ia3_l"] = numbers(1, inputs) if module == modules[-1] else numbers(outputs, 1)
                continue
            tensors[f"{path}.lora_A.weight"] = numbers(rank, inputs)
            tensors[f"{path}.lora_B.weight"] = numbers(outputs, rank)
            if kind == "dora":
                tensors[f"{path}.lora_magnitude_vector"] = np.abs(numbers(outputs))
    return tensors


def adapter_config(
    kind: str = "lora", *, rank: int = 2, modules: tuple[str, ...] = ("q_proj", "down_proj"), **changes: Any
) -> dict[str, Any]:
    """`adapter_config.json` for `adapter_tensors` of the same arguments; changes replace or add keys."""
    shared = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "task_type": "CAUSAL_LM", "inference_mode": True}
    if kind == "soft_prompt":
        own: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": rank, "token_dim": HIDDEN}
    elif kind == "ia3":
        own = {"peft_type": "IA3", "target_modules": list(modules), "feedforward_modules": [modules[-1]]}
    else:
        own = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.05,
            "bias": "none",
            "target_modules": list(modules),
            "use_dora": kind == "dora",
            "use_rslora": False,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
    return {**shared, **own, **changes}


def expert_manifest(
    name: str = "expert-sql",
    version: str = "1.0.0",
    kind: str = "lora",
    *,
    rank: int = 2,
    modules: tuple[str, ...] = ("q_proj", "down_proj"),
    base: str = "Qwen/Qwen3-0.6B",
    **changes: Any,
) -> dict[str, Any]:
    """A manifest 2.0 that upstream's parser accepts; changes replace or add keys at the top."""
    adapter: dict[str, Any] = {"type": kind, "target_modules": list(modules)}
    if kind in {"lora", "dora"}:
        adapter |= {"r": rank, "alpha": 2 * rank}
    return {
        "name": name,
        "version": version,
        "schema_version": "2.0",
        "description": f"The test expert {name}",
        "base_models": [{"name": base, "sha256": "", "quantization": "int4", "adapters": [adapter]}],
        "soft_prompts": [],
        "capabilities": ["task:text2sql", "language:en"],
        "routing": {"keywords": ["sql", "query"], "exclude_keywords": ["cypher"], "priority": 0.75},
        "constraints": {"max_chain": 10, "load_order": 6, "incompatible_with": [], "requires": []},
        "training": {
            "dataset": {"path": "data.jsonl"},
            "config": {
                "method": "sft",
                "adapter_type": kind,
                "rank": rank,
                "target_modules": list(modules),
                "epochs": 1.0,
                "learning_rate": 0.0003,
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "warmup_steps": 0,
                "lr_scheduler": "cosine",
            },
        },
        "integrity": None,
        "license": "Apache-2.0",
        "tags": ["sql"],
        **changes,
    }


def expert_files(
    name: str = "expert-sql",
    version: str = "1.0.0",
    kind: str = "lora",
    *,
    rank: int = 2,
    modules: tuple[str, ...] = ("q_proj", "down_proj"),
    base: str = "Qwen/Qwen3-0.6B",
    manifest: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | None] | None = None,
) -> Files:
    """The files of a package. `manifest` and `config` change top-level keys, `files` adds, replaces or (None) drops."""
    shape: dict[str, Any] = {"rank": rank, "modules": modules}
    made = {
        "manifest.json": json_bytes(expert_manifest(name, version, kind, base=base, **shape) | dict(manifest or {})),
        "adapter_model.safetensors": save(dict(adapter_tensors(kind, **shape) if tensors is None else tensors)),
        "adapter_config.json": json_bytes(adapter_config(kind, **shape) | dict(config or {})),
    }
    every = {**made, **(files or {})}
    return {path: content for path, content in every.items() if content is not None}


def expert_package(
    name: str = "expert-sql", version: str = "1.0.0", kind: str = "lora", *, compression: str = "gzip", **options: Any
) -> bytes:
    """A valid `.expert` file, the same bytes at every call; options are those of `expert_files`."""
    return archived(expert_files(name, version, kind, **options), compression)


def archived(files: Mapping[str, bytes], compression: str = "gzip") -> bytes:
    """Files as an archive: `gzip` or `zstd` around a tar, or `zip`."""
    out = io.BytesIO()
    if compression == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if compression == "zstd":
        return zstandard.compress(out.getvalue())
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(out.getvalue()) + compressor.flush()


def signed_upstream(files: Mapping[str, bytes], /, seed: bytes = b"\x42" * 32, **changes: Any) -> Files:
    """The files after upstream's signer; changes replace or add keys of the integrity block."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    message = "\n".join(f"{name}:{hashes[name]}" for name in sorted(hashes, key=str.encode)).encode()
    key = SigningKey(seed)
    signature = key.sign(message).signature.hex()
    integrity = {
        "created_at": "2026-06-01T12:00:00+00:00",
        "publisher": "expert-cli",
        "pubkey": f"ed25519:{bytes(key.verify_key).hex()}",
        "signature_algorithm": "ed25519",
        "signature": signature,
        "files": hashes,
        **changes,
    }
    manifest = json.loads(files["manifest.json"])
    return {
        **files,
        "manifest.json": json_bytes(manifest | {"integrity": integrity}),
        "signature.sig": signature.encode(),
    }


def soft_prompt(tokens: int = 3, hidden: int = HIDDEN, name: str = "prompt_embeddings") -> bytes:
    """A soft prompt file: one tensor."""
    return save({name: np.full((tokens, hidden), 0.5, np.float32)})


def json_bytes(document: Any) -> bytes:
    """As upstream writes a manifest."""
    return json.dumps(document, indent=2, ensure_ascii=False).encode()
