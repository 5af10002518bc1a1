"""Manifests of `.expert` packages for tests: whole ones, and ones changed in one place."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ABSENT: Any = object()
"""As a value: takes the key away."""

_MODULES = ["q_proj", "v_proj"]
_COMMON: dict[str, Any] = {
    "name": "expert-sql",
    "version": "1.2.0",
    "description": "Consultas curtas, sem explicação",
    "author": "acme",
    "homepage": "https://example.org/expert-sql",
    "repository": {"type": "git", "url": "https://example.org/expert-sql.git"},
    "soft_prompts": [{"name": "style", "path": "soft_prompts/style.safetensors", "tokens": 4}],
    "capabilities": ["database:sql", "task:text2sql"],
    "routing": {
        "keywords": ["sql", "group by"],
        "exclude_keywords": ["explain"],
        "router_hint": "database=sql",
        "priority": 0.85,
    },
    "constraints": {
        "max_chain": 6,
        "load_order": 7,
        "incompatible_with": ["expert-nosql"],
        "requires": ["expert-json@>=0.4.0"],
    },
    "perf": {"latency_ms_overhead": 3.0, "vram_mb_overhead": 18, "supported_batch_sizes": [1, 2]},
    "runtime": {"candle_compatible": True, "requires_kv_cache_persistence": False, "attention_kernel": "sdpa"},
    "training": {
        "dataset": {"path": "datasets/train.jsonl"},
        "config": {
            "method": "sft",
            "adapter_type": "dora",
            "rank": 12,
            "target_modules": _MODULES,
            "epochs": 1.5,
            "learning_rate": 5e-5,
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "warmup_steps": 0,
            "lr_scheduler": "cosine",
        },
        "decoding": {
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "min_p": 0,
            "max_new_tokens": 64,
            "stop_sequences": [";", "\n\n"],
            "use_grammar": True,
            "grammar_type": "sql",
            "grammar_file": "grammar.gbnf",
        },
    },
    "evaluation": {"test_set_size": 18, "metrics": {"exact_match": 0.9}},
    "quality_metrics": {"benchmark_score": 8.9, "test_date": "2025-11-12"},
    "integrity": {"publisher": "acme", "signature_algorithm": "ed25519", "files": {}},
    "license": "Apache-2.0",
    "tags": ["sql"],
}
_BASE: dict[str, Any] = {
    "name": "F:/models/Qwen3-0.6B",
    "sha256": "ab" * 32,
    "hocket_base": f"sha256:{'cd' * 32}",
    "quantization": "int4",
    "rope_scaling": "yarn-128k",
    "prompt_template": "qwen3",
}
_ADAPTERS: list[dict[str, Any]] = [
    {
        "type": "dora",
        "target_modules": _MODULES,
        "r": 12,
        "alpha": 24,
        "scaling": "dora",
        "dropout": 0.1,
        "use_dora": True,
        "path": "adapter_model.safetensors",
        "size_bytes": 1024,
        "sha256": "ef" * 32,
    }
]

V2: dict[str, Any] = {**_COMMON, "schema_version": "2.0", "base_models": [{**_BASE, "adapters": _ADAPTERS}]}
"""Every field that means something, schema 2.0; nothing to warn about, nothing to mend."""
V1: dict[str, Any] = {**_COMMON, "schema_version": "1.0", "base_model": _BASE, "adapters": _ADAPTERS}
"""The same in schema 1.0."""
FILES = {
    "manifest.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "soft_prompts/style.safetensors",
    "grammar.gbnf",
}
"""What lies in the package of either."""


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced, added or, for `ABSENT`, taken away; `path` as in `base_models[0].name`."""
    result = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in re.split(r"[.\[\]]+", path) if part]
    inner: Any = result
    for part in parents:
        inner = inner[part]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return result


def encoded(document: Any) -> bytes:
    """As a file."""
    return json.dumps(document, ensure_ascii=False, indent=2).encode()


def genuine() -> Path:
    """The folder of genuine manifests; skips the test where there is none."""
    if not (fixtures := os.environ.get("HOCKET_FIXTURES")):
        pytest.skip("HOCKET_FIXTURES is not set: the genuine manifests are not here")
    return Path(fixtures) / "expert"
