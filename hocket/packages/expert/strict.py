"""What upstream's JSON schema and documents ask of authors, beyond what a reader needs.

A package whose manifest has problems here is read all the same; whoever writes one should not leave them in. Where the
schema refuses what genuine experts publish, both are allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError
from hocket.identity import check_name
from hocket.packages.expert.names import CONFIG, GRAMMAR, PROJECTIONS, WEIGHTS
from hocket.requirements import Requirement
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from hocket.packages.expert.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Problem:
    """Something an author should mend.

    Attributes:
        path: Of the value in the manifest, such as `base_models[0].adapters[0].r`; empty for the package.
        message: What is wrong and what to do, for people.
    """

    path: str
    message: str


_ADAPTERS: Final = ("adapters[]", "base_models[].adapters[]")
_BASES: Final = ("base_model", "base_models[]")

# Paths here name keys; `[]` stands for every element of a list. A key is asked for where the object around it is there.
_REQUIRED: Final = (
    "author",
    "license",
    "quality_metrics",
    "perf",
    "perf.latency_ms_overhead",
    "perf.vram_mb_overhead",
    "perf.supported_batch_sizes",
    "constraints",
    "constraints.load_order",
    "constraints.incompatible_with",
    "constraints.requires",
    "training",
    "training.dataset",
    "training.config",
    "training.config.method",
    "training.config.adapter_type",
    "training.config.learning_rate",
    "training.config.batch_size",
    "routing.keywords",
    "repository.type",
    "repository.url",
    "soft_prompts[].tokens",
)

_NOT_EMPTY: Final = (
    "description",
    "capabilities",
    "routing.keywords",
    "perf.supported_batch_sizes",
)

_SOFT_PROMPTS: Final = ("soft_prompt", "prompt_tuning")
"""Ours: upstream has no name for an expert that is nothing else."""
_TYPES: Final = ("lora", "dora", "ia3", "lokr", "adalora", "lora-fa", *_SOFT_PROMPTS)
_RANKED: Final = ("lora", "dora", "lokr", "adalora", "lora-fa")
_TEMPLATES: Final = (
    *("qwen3", "chatml", "qwen", "llama", "llama2", "alpaca", "vicuna", "custom"),
    "single_turn",  # ours: upstream's tools send single turns only
)
_MODULES: Final = (*PROJECTIONS, "embed_tokens", "lm_head")
_ONE_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "schema_version": ("1.0", "2.0"),
    "repository.type": ("git",),
    **{f"{base}.quantization": ("int4", "int8", "fp16", "bf16", "none") for base in _BASES},
    **{f"{base}.rope_scaling.type": ("ntk-by-parts", "yarn", "dynamic", "linear") for base in _BASES},
    **{f"{base}.prompt_template": _TEMPLATES for base in _BASES},
    **{f"{adapter}.type": _TYPES for adapter in _ADAPTERS},
    **{f"{adapter}.target_modules[]": _MODULES for adapter in _ADAPTERS},
    **{f"{adapter}.feedforward_modules[]": _MODULES for adapter in _ADAPTERS},
    **{f"{adapter}.scaling": ("default", "standard", "dora", "learned", "rsqrt", "custom") for adapter in _ADAPTERS},
    "soft_prompts[].init_method": ("random", "text", "vocab_sample"),
    "runtime.attention_kernel": ("sdpa", "flash-v1", "flash-v2", "xformers", "vanilla"),
    "training.config.method": ("sft", "rlhf", "dpo"),
    "training.config.adapter_type": _TYPES,
    "training.config.lr_scheduler": ("linear", "cosine", "constant", "polynomial", "cosine_with_restarts"),
    "training.decoding.grammar_type": (
        *("json", "gbnf", "sql", "sql-postgres", "sql-mysql", "cypher", "typescript", "python", "tool-call"),
    ),
    "training.decoding.validation": ("parser", "parser-strict", "schema-strict", "tsc", "explain", "none"),
}

_WITHIN: Final[Mapping[str, tuple[float, float]]] = {
    **{f"{adapter}.r": (1, 256) for adapter in _ADAPTERS},
    **{f"{adapter}.alpha": (1, 2**32) for adapter in _ADAPTERS},
    **{f"{adapter}.dropout": (0, 1) for adapter in _ADAPTERS},
    **{f"{base}.rope_scaling.factor": (1, 2**32) for base in _BASES},
    **{f"{base}.rope_scaling.max_position_embeddings": (1, 2**32) for base in _BASES},
    **{f"{base}.rope_scaling.original_max_position_embeddings": (1, 2**32) for base in _BASES},
    "soft_prompts[].tokens": (1, 512),
    "routing.priority": (0, 1),
    "constraints.max_chain": (1, 2**32),
    "perf.latency_ms_overhead": (0, 2**32),
    "perf.supported_batch_sizes[]": (1, 2**32),
    "training.decoding.temperature": (0, 2),
    "training.decoding.top_p": (0, 1),
    "training.decoding.top_k": (1, 2**32),
    "training.decoding.min_p": (0, 1),
    "training.decoding.max_new_tokens": (1, 2**32),
    "quality_metrics.benchmark_score": (0, 10),
    "quality_metrics.base_model_score": (0, 10),
    "quality_metrics.win_rate_vs_base": (0, 1),
    "quality_metrics.test_queries": (0, 2**32),
}

_URL: Final = (re.compile(r"[a-z][a-z0-9+.-]*://\S+"), "a URL, such as https://example.org/expert")
_HASH: Final = (re.compile(r"(?:[0-9a-f]{64})?"), "64 lower-case hex digits, or absent")
_SPELLED: Final[Mapping[str, tuple[re.Pattern[str], str]]] = {
    "name": (re.compile(r"expert-[a-z0-9-]+"), "expert- and then a-z, 0-9 and -"),
    "license": (
        re.compile(r"\(?[A-Za-z0-9][A-Za-z0-9.+-]*\)?(?: (?:AND|OR|WITH) \(?[A-Za-z0-9][A-Za-z0-9.+-]*\)?)*"),
        "an SPDX expression, such as Apache-2.0 (spdx.org/licenses)",
    ),
    "homepage": _URL,
    "repository.url": _URL,
    "training.packaging_checkpoint": (re.compile(r"checkpoint-[0-9]+|final"), "checkpoint-<number> or final"),
    "quality_metrics.test_date": (re.compile(r"\d{4}-\d{2}-\d{2}"), "a date, such as 2025-11-12"),
    **{f"{base}.sha256": _HASH for base in _BASES},
    **{f"{adapter}.sha256": _HASH for adapter in _ADAPTERS},
}

_PARSED: Final[Mapping[str, Callable[[str], object]]] = {
    "constraints.requires[]": Requirement.parse,
    "constraints.incompatible_with[]": Requirement.parse,
    "dependencies[].name": check_name,
    "dependencies[].version": Range.parse,
}


def problems(manifest: Manifest, names: Collection[str]) -> list[Problem]:
    """Find what an author should mend.

    Args:
        manifest: As read.
        names: Of all files in the package.

    Returns:
        In no order of weight; empty if there is nothing to mend.
    """
    return [
        *_of_presence(manifest.document),
        *_of_values(manifest.document),
        *_of_version(manifest),
        *_of_adapters(manifest.document),
        *_of_patterns(manifest.document),
        *_of_limitations(manifest.document),
        *_of_files(manifest, names),
    ]


def _of_presence(document: Mapping[str, Any]) -> Iterator[Problem]:
    for pattern in _REQUIRED:
        owners, _, key = pattern.rpartition(".")
        for path, owner in _at(document, owners):
            if isinstance(owner, dict) and owner.get(key) is None:
                yield Problem(f"{path}.{key}" if path else key, "is missing; add it")
    for pattern in _NOT_EMPTY:
        yield from (Problem(path, "is empty; fill it in") for path, value in _at(document, pattern) if not value)


def _of_values(document: Mapping[str, Any]) -> Iterator[Problem]:
    for pattern, allowed in _ONE_OF.items():
        for path, value in _at(document, pattern):
            if value not in allowed:
                yield Problem(path, f"is {_shown(value)}; use one of {', '.join(allowed)}")
    for pattern, (least, most) in _WITHIN.items():
        for path, value in _at(document, pattern):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                yield Problem(path, f"is {_shown(value)}; use a number from {least} to {most}")
    for pattern, (spelling, spoken) in _SPELLED.items():
        for path, value in _at(document, pattern):
            if not isinstance(value, str) or not spelling.fullmatch(value):
                yield Problem(path, f"is {_shown(value)}; write {spoken}")


def _of_version(manifest: Manifest) -> Iterator[Problem]:
    try:
        semantic = Version.parse(manifest.version).semantic
    except HocketError:
        semantic = None
    if semantic is None:
        yield Problem("version", f"is {_shown(manifest.version)}; write a semantic version, such as 1.0.0")


def _of_adapters(document: Mapping[str, Any]) -> Iterator[Problem]:
    for pattern in _ADAPTERS:
        for path, adapter in _at(document, pattern):
            kind = adapter["type"]
            for key in ("r", "alpha"):
                if kind in _RANKED and adapter.get(key) is None:
                    yield Problem(f"{path}.{key}", f"is missing; state it as {kind} was trained with it")
                if kind == "ia3" and adapter.get(key) is not None:
                    yield Problem(f"{path}.{key}", "is stated, and an ia3 has none; drop it")
            if kind not in _SOFT_PROMPTS and not adapter["target_modules"]:
                yield Problem(f"{path}.target_modules", "is empty; fill it in")
            if kind != "ia3" and adapter.get("feedforward_modules"):
                yield Problem(f"{path}.feedforward_modules", f"means nothing for {_shown(kind)}; drop it")


def _of_patterns(document: Mapping[str, Any]) -> Iterator[Problem]:
    for pattern, parse in _PARSED.items():
        for path, text in _at(document, pattern):
            try:
                parse(text)
            except HocketError as error:
                yield Problem(path, error.message)


def _of_limitations(document: Mapping[str, Any]) -> Iterator[Problem]:
    for path, each in _at(document, "limitations[]"):
        if isinstance(each, str):
            continue
        if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("pattern", "description")):
            yield Problem(path, "must be a text, or an object with pattern and description")
        elif unknown := each.keys() - {"pattern", "description", "example", "workaround"}:
            yield Problem(path, f"has {_shown(min(unknown))}; keep to pattern, description, example and workaround")


def _of_files(manifest: Manifest, names: Collection[str]) -> Iterator[Problem]:
    paths = [adapter.path for base in manifest.bases for adapter in base.adapters if adapter.path is not None]
    if not any(name in names for name in (*paths, *WEIGHTS)):
        yield Problem("", f"there are no weights; add {WEIGHTS[0]}")
    if CONFIG not in names:
        yield Problem("", f"{CONFIG} is missing; add the one that was saved with the weights")
    for index, prompt in enumerate(manifest.soft_prompts):
        path = f"soft_prompts[{index}].path"
        if prompt.path not in names and prompt.path.rpartition("/")[2] not in names:
            yield Problem(path, f"names {_shown(prompt.path)}, which is not in the package; add it")
        if not prompt.path.endswith(".safetensors"):
            yield Problem(path, f"names {_shown(prompt.path)}; convert it to safetensors, nothing else is loaded")
    if manifest.grammar_file is not None and manifest.grammar_file not in names:
        yield Problem(
            "training.decoding.grammar_file",
            f"names {_shown(manifest.grammar_file)}, which is not in the package; add it",
        )
    if manifest.decoding.use_grammar and manifest.grammar_file is None and GRAMMAR not in names:
        yield Problem("training.decoding.use_grammar", f"is true, and there is no grammar; add {GRAMMAR}")


def _at(document: Mapping[str, Any], pattern: str) -> Iterator[tuple[str, Any]]:
    """Every value at a pattern of keys, with its path; what is absent or null is not there."""
    found: list[tuple[str, Any]] = [("", document)]
    for part in pattern.split(".") if pattern else []:
        key = part.removesuffix("[]")
        found = [
            (f"{path}.{key}" if path else key, value)
            for path, owner in found
            if isinstance(owner, dict) and (value := owner.get(key)) is not None
        ]
        if part.endswith("[]"):
            found = [
                (f"{path}[{index}]", element)
                for path, value in found
                if isinstance(value, list)
                for index, element in enumerate(value)
            ]
    yield from found


def _shown(value: object) -> str:
    return repr(value)[:64]
