"""What `inspect` shows of a package file: a card for people, one object for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.cli import describe, output
from hocket.cli.about import licence_document
from hocket.errors import HocketError
from hocket.identity import short_name
from hocket.packages.adapter import AdapterKind, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from pathlib import Path

    from hocket.bases import BaseModel
    from hocket.packages import EmbeddedFacts, ReleaseFacts
    from hocket.packages.adapter import AdapterFacts, Routing, UpstreamSignature
    from hocket.packages.model import ModelFacts

Beside: TypeAlias = "ReleaseFacts | HocketError | None"
"""The release beside a file, what is wrong with it, or none."""

_TRUSTED: Final = "trusted by this trust folder"
_ENCRYPTED: Final = "encrypted: what is said of the model is what the metadata declares"
_KEYWORDS_SHOWN: Final = 8
_KINDS: Final = {
    AdapterKind.LORA: "LoRA",
    AdapterKind.DORA: "DoRA",
    AdapterKind.IA3: "IA3",
    AdapterKind.SOFT_PROMPT: "soft prompt",
}
_UPSTREAM: Final = {
    Outcome.UNSIGNED: "none of upstream's tools inside",
    Outcome.VALID: "covers every file",
    Outcome.WEIGHTS_ONLY: "covers every file but the manifest",
    Outcome.INVALID: "IS NOT VALID",
}


def model_document(facts: ModelFacts, embedded: EmbeddedFacts, release: Beside, now: datetime) -> dict[str, Any]:
    """An `.apr` file as JSON-able values; `now` is what its licence is compared with."""
    return {
        "format": facts.format,
        "digest": facts.digest,
        "size": facts.size_bytes,
        "version": facts.format_version,
        "model_type": {"id": facts.model_type_id, "name": facts.model_type},
        "layout": facts.layout,
        "compression": facts.compression,
        "flags": facts.flags,
        "encrypted": facts.encrypted,
        "signature": asdict(embedded),
        "release": _release_json(release),
        "model": None if facts.layout is None else _model_json(facts),
        "license": licence_document(facts.metadata, now),
        "metadata": facts.metadata,
        "sections": [asdict(section) for section in facts.sections],
    }


def _model_json(facts: ModelFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "expert_layout": facts.expert_layout,
        "quantization": facts.quantization,
        "expert_count": facts.expert_count,
        "feature_count": facts.n_features,
        "column_count": facts.output_columns,
        "labels": facts.labels,
        "output_range": facts.output_range,
        "parameter_bytes": facts.parameter_bytes,
        "not_servable": facts.not_servable,
    }


def _release_json(release: Beside) -> dict[str, Any] | None:
    if release is None:
        return None
    if isinstance(release, HocketError):
        nothing = dict.fromkeys(("publisher", "name", "version", "key_id"))
        return {**nothing, "trusted": False, "refused": release.reason}
    name = release.claim.release.name
    return {
        "publisher": name.publisher,
        "name": name.name,
        "version": name.version,
        "key_id": release.claim.key_id,
        "trusted": release.refused is None,
        "refused": release.refused,
    }


def print_model(path: Path, facts: ModelFacts, embedded: EmbeddedFacts, release: Beside) -> None:
    """Print a card of an `.apr` file."""
    labels = None if facts.labels is None else ", ".join("(dropped)" if name is None else name for name in facts.labels)
    kind = facts.layout or facts.model_type
    output.card(
        facts.name or path.name,
        [
            ("file", f"{path} ({output.size(facts.size_bytes)}, {facts.format} {facts.format_version})"),
            ("digest", facts.digest),
            ("model", f"{facts.expert_count} x {facts.expert_layout} in a {kind}" if facts.expert_layout else kind),
            ("takes", None if facts.n_features is None else f"{facts.n_features} features"),
            ("answers", None if facts.layout is None else labels or "one number"),
            ("storage", f"{facts.compression}, {_ENCRYPTED if facts.encrypted else 'in the clear'}"),
            ("in memory", output.size(facts.parameter_bytes) if facts.parameter_bytes else None),
            ("flags", ", ".join(facts.flags).lower() or None),
            ("signature", _signature_text(embedded)),
            ("release", _release_text(release)),
            ("cannot serve", facts.not_servable),
            ("description", facts.metadata.get("description")),
        ],
    )


def _signature_text(embedded: EmbeddedFacts) -> str:
    if embedded.key_id is None:
        return "none in the file"
    if not embedded.verified:
        return f"DOES NOT VERIFY: these are not the bytes that key {output.short(embedded.key_id)} signed"
    return f"verifies, key {output.short(embedded.key_id)} ({_TRUSTED if embedded.trusted else 'not trusted here'})"


def _release_text(release: Beside) -> str:
    if release is None:
        return "none beside the file: `hocket sign`"
    if isinstance(release, HocketError):
        return f"cannot be used ({release.reason}): {release.message}"
    judged = _TRUSTED if release.refused is None else f"proves nothing here: {release.refused}"
    return f"{release.claim.release.name}, key {output.short(release.claim.key_id)} ({judged})"


def adapter_document(facts: AdapterFacts, release: Beside, grammar_problem: str | None) -> dict[str, Any]:
    """An `.expert` file as JSON-able values; with why its grammar cannot be used, if it has one that cannot."""
    return {
        "format": facts.format,
        "digest": facts.digest,
        "size": facts.size_bytes,
        "version": facts.format_version,
        "compression": facts.compression,
        "upstream_signature": asdict(facts.signature),
        "release": _release_json(release),
        "adapter": {
            "name": facts.name,
            "version": facts.version,
            "description": facts.description,
            "license": facts.license,
            "kind": facts.kind,
            "base": asdict(facts.base),
            "rank": facts.rank,
            "target_modules": facts.target_modules,
            "soft_prompt_tokens": facts.soft_prompt_tokens,
            "has_grammar": facts.has_grammar,
            "uses_grammar": facts.uses_grammar,
            "grammar_problem": grammar_problem,
            "capabilities": facts.capabilities,
            "tags": facts.tags,
            "routing": None if facts.routing is None else asdict(facts.routing),
            "constraints": asdict(facts.constraints),
            "parameter_bytes": facts.parameter_bytes,
            "not_servable": facts.not_servable,
            "warnings": facts.warnings,
        },
        "metadata": facts.metadata,
        "sections": [asdict(section) for section in facts.sections],
    }


def print_adapter(path: Path, facts: AdapterFacts, release: Beside, grammar_problem: str | None) -> None:
    """Print a card of an `.expert` file, and the files inside; with what is wrong with its grammar, if anything is."""
    constraints = facts.constraints
    output.card(
        f"{facts.name} {facts.version}",
        [
            ("file", f"{path} ({output.size(facts.size_bytes)}, {facts.format} {facts.format_version})"),
            ("digest", facts.digest),
            ("adapter", _adapter_text(facts)),
            ("base", _base_text(facts.base)),
            ("soft prompt", f"{facts.soft_prompt_tokens} tokens" if facts.soft_prompt_tokens else None),
            (
                "grammar",
                describe.grammar_text(inside=facts.has_grammar, used=facts.uses_grammar, problem=grammar_problem),
            ),
            ("can", _listed(facts.capabilities)),
            ("tags", _listed(facts.tags)),
            ("chosen for", _routing_text(facts.routing)),
            ("requires", _listed(constraints.requires)),
            ("not with", _listed(constraints.incompatible_with)),
            ("storage", f"{facts.compression}, tensors of {output.size(facts.parameter_bytes)}"),
            ("signature", _upstream_text(facts.signature)),
            ("release", _release_text(release)),
            ("cannot serve", facts.not_servable),
            ("licence", facts.license),
            ("description", facts.description or None),
            *(("warning", warning) for warning in facts.warnings),
        ],
    )
    rows = [(section.name, output.size(section.size)) for section in facts.sections]
    output.print_table(["file inside", "size>"], rows, "It holds no files.")


def _adapter_text(facts: AdapterFacts) -> str:
    rank = f" of rank {facts.rank}" if facts.rank else ""
    modules = f" on {', '.join(facts.target_modules)}" if facts.target_modules else ""
    return f"{_KINDS[facts.kind]}{rank}{modules}"


def _base_text(base: BaseModel) -> str:
    name = short_name(base.name) or base.name
    if base.digest is not None:
        return f"{name}, exactly {base.digest}"
    return f"{name} (by name: the package does not say which weights exactly)"


def _routing_text(routing: Routing | None) -> str:
    if routing is None:
        return "nothing by itself"
    more = len(routing.keywords) - _KEYWORDS_SHOWN
    words = ", ".join(routing.keywords[:_KEYWORDS_SHOWN]) + (f" and {more} more" if more > 0 else "")
    priority = "" if routing.priority is None else f" (priority {routing.priority:g})"
    return f"{words or 'no word'}{priority}"


def _upstream_text(signature: UpstreamSignature) -> str:
    """What the signature that upstream's tools have left inside is worth."""
    if signature.outcome is Outcome.UNSIGNED:
        return _UPSTREAM[signature.outcome]
    key = f", by key {output.short(signature.key_id)}" if signature.key_id else ""
    claim = f", said to be {signature.publisher}'s" if signature.publisher else ""
    why = f": {signature.explanation}" if signature.explanation else ""
    return f"{_UPSTREAM[signature.outcome]}{key}{claim}{why} (shown, never decisive)"


def _listed(texts: Iterable[str]) -> str | None:
    return ", ".join(texts) or None
