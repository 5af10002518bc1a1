"""Values that the reader of `.expert` files yields: adapters as raw tensors, and the facts about their packages.

Nothing here computes, reads or verifies. An adapter rides on a base language model; what its numbers do there is
decided by its `AdapterConfig`, which is what they were trained with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.bases import BaseModel
    from hocket.packages.model import Section
    from hocket.requirements import Constraints


class AdapterKind(StrEnum):
    """What an adapter does to a projection, or before the text."""

    LORA = "lora"
    """y = W x + s B A x, with s = alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
    DORA = "dora"
    """LoRA whose updated rows keep a learned length (Liu et al. 2024, arXiv:2402.09353)."""
    IA3 = "ia3"
    """Learned factors on what feed-forward projections read and other projections give (arXiv:2205.05638)."""
    SOFT_PROMPT = "soft_prompt"
    """Learned embeddings before the text, and nothing else (arXiv:2104.08691)."""


class Outcome(StrEnum):
    """What the signature of upstream's tools inside a package is worth. It says nothing about whose key that is."""

    UNSIGNED = "unsigned"
    """There is none."""
    VALID = "valid"
    """It covers every file, the manifest included."""
    WEIGHTS_ONLY = "weights_only"
    """It covers every file but the manifest: what was signed of that can no longer be rebuilt."""
    INVALID = "invalid"
    """It does not verify, or covers other files than are there."""


@dataclass(frozen=True, slots=True)
class UpstreamSignature:
    """The signature inside a package, as upstream's signer leaves it. Shown, never decisive.

    Attributes:
        outcome: What it is worth.
        key_id: SHA-256 hex of the public key that lies beside it; None if that cannot be read.
        publisher: Who claims to have signed; not covered by the signature.
        created_at: When, as claimed; not covered by the signature.
        explanation: Why it is not `VALID`, for people; None if it is, or if there is none.
    """

    outcome: Outcome = Outcome.UNSIGNED
    key_id: str | None = None
    publisher: str | None = None
    created_at: str | None = None
    explanation: str | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """When an expert wants to be asked: hints for a router, normalised and capped.

    Attributes:
        keywords: Lower-case, each once, in order.
        exclude_keywords: As `keywords`.
        router_hint: A boolean expression over features of the text; None for none.
        priority: Between 0 and 1; None if not stated.
    """

    keywords: tuple[str, ...]
    exclude_keywords: tuple[str, ...] = ()
    router_hint: str | None = None
    priority: float | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an expert wants to be sampled, where a request does not say. None leaves it to the base.

    Attributes:
        temperature: 0 for greedy.
        top_p: Share of probability kept.
        top_k: Tokens kept.
        min_p: Least share of the best token's probability.
        max_new_tokens: Most tokens of an answer.
        stop_sequences: Texts that end an answer.
        use_grammar: Whether answers follow the package's grammar.
        grammar_type: Its dialect, for display.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    stop_sequences: tuple[str, ...] = ()
    use_grammar: bool = False
    grammar_type: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as it lies in a safetensors file.

    Attributes:
        dtype: As safetensors spells it: `F32`, `F16`, `BF16`.
        shape: Its sizes.
        data: Little-endian, row-major, read-only.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """`adapter_config.json`: what the tensors were trained with. PEFT's names, where it has one.

    Attributes:
        kind: Never `SOFT_PROMPT` unless the adapter is nothing else.
        base_model_name: `base_model_name_or_path`; for display.
        rank: `r`; 0 for kinds without one.
        alpha: `lora_alpha`; 0 for kinds without one.
        use_rslora: Whether the scale is alpha / sqrt(rank).
        rank_pattern: Ranks of modules that have another, by pattern.
        alpha_pattern: Alphas of modules that have another, by pattern.
        target_modules: Names of the projections that were to be adapted; the tensors show which were. Empty where a
            regular expression chose them.
        exclude_modules: Names of modules that were left out. None where a regular expression chose them.
        layers_to_transform: Numbers of the layers that were to be adapted, where targets are not named in full; empty
            for all.
        layers_pattern: Names that the number of a layer follows; empty for any.
        feedforward_modules: Of those, which IA3 scales at their input.
        fan_in_fan_out: Whether the base stores weights as (in, out).
        bias: Which biases of the base were trained as well: `none`, `all`, or those of adapted projections
            (`lora_only`).
        lora_bias: Whether B has a bias.
        token_count: Rows of a soft prompt; 0 for other kinds.
    """

    kind: AdapterKind
    base_model_name: str | None = None
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | None = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    token_count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """Embeddings to put before the text.

    Attributes:
        name: As the manifest calls it.
        embeddings: Two dimensions: tokens, hidden size.
    """

    name: str
    embeddings: RawTensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter expert.

    Attributes:
        config: What its tensors were trained with.
        tensors: By name, as PEFT saves them; empty for an expert that is a soft prompt alone.
        soft_prompts: In the manifest's order.
        decoding: How it wants to be sampled.
        grammar: GBNF text that its answers follow; None for none.
        files: Every other file of the package, by name: tokenizer files, README, licence, tests. Never interpreted.
    """

    config: AdapterConfig
    tensors: Mapping[str, RawTensor]
    soft_prompts: tuple[SoftPrompt, ...] = ()
    decoding: Decoding = Decoding()
    grammar: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known about an `.expert` package from its bytes. Says nothing about trust.

    Attributes:
        digest: Identity of the file, `sha256:<hex>`.
        size_bytes: Of the whole file.
        format_version: The manifest's schema: `1.0` or `2.0`.
        compression: `gzip`, `zstd` or `zip`.
        name: The manifest's; the same as in every release of it.
        version: The manifest's; the same as in every release of it.
        description: For people.
        kind: What the adapter is.
        base: What it rides on.
        capabilities: Tags such as `language:en` or `task:text2sql`, as written.
        tags: Words for searching, as written.
        constraints: How it goes together with others.
        signature: The signature that upstream's tools leave inside.
        metadata: The whole manifest, unknown keys kept.
        sections: The files inside, with their sizes; offsets count decompressed file contents, one after the other.
        rank: Of the adapter, the largest where modules differ; 0 for kinds without one.
        target_modules: Names of the projections it adapts.
        routing: When it wants to be asked; None for an expert that is never chosen by itself.
        soft_prompt_tokens: Rows that its soft prompts put before the text.
        has_grammar: Whether a grammar is inside.
        uses_grammar: Whether its answers follow that where nobody says otherwise.
        license: SPDX name, as written; None when not stated.
        parameter_bytes: What the tensors take as they are stored.
        warnings: What a person should know: absent fields, and where manifest and `adapter_config.json` disagree.
        not_servable: Why the adapter cannot serve, for people; None when it can.
        format: Always `expert`.
    """

    digest: str
    size_bytes: int
    format_version: str
    compression: str
    name: str
    version: str
    description: str
    kind: AdapterKind
    base: BaseModel
    capabilities: tuple[str, ...]
    tags: tuple[str, ...]
    constraints: Constraints
    signature: UpstreamSignature
    metadata: Mapping[str, Any]
    sections: tuple[Section, ...]
    rank: int = 0
    target_modules: tuple[str, ...] = ()
    routing: Routing | None = None
    soft_prompt_tokens: int = 0
    has_grammar: bool = False
    uses_grammar: bool = False
    license: str | None = None
    parameter_bytes: int = 0
    warnings: tuple[str, ...] = ()
    not_servable: str | None = None
    format: str = "expert"
