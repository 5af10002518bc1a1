"""An `.apr` container turned into facts and a model. Everything is parsed here, so trust comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hocket.errors import HocketError, Reason
from hocket.packages.apr import facts
from hocket.packages.apr.header import MODEL_TYPES, Compression, Flag
from hocket.packages.apr.layouts import candidates, read_model
from hocket.packages.apr.metadata import read_metadata
from hocket.packages.apr.payload import decompress
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import MixtureOfExperts, Model, ModelFacts

if TYPE_CHECKING:
    from hocket.packages.apr.container import Container


def describe(container: Container, digest: str, limits: Limits = DEFAULT_LIMITS) -> ModelFacts:
    """What header and metadata alone say: all there is to know of an encrypted file.

    Args:
        container: From `split`.
        digest: Of the file, `sha256:<hex>`.
        limits: Bounds on the metadata.

    Raises:
        HocketError: `BAD_METADATA` or `TOO_LARGE` if the metadata is refused.
    """
    sealed = "the payload is encrypted" if container.header.encrypted else None
    return _facts(container, digest, read_metadata(container.metadata, limits), not_servable=sealed)


def decode(container: Container, digest: str, limits: Limits = DEFAULT_LIMITS) -> tuple[ModelFacts, Model]:
    """Read metadata and model.

    A model that is well formed but cannot answer is decoded all the same; `not_servable` then says why.

    Args:
        container: From `split`.
        digest: Of the file, `sha256:<hex>`.
        limits: Bounds on everything read.

    Raises:
        HocketError: `ENCRYPTED` for an encrypted file, whatever else is wrong with it; `BAD_METADATA`;
            `UNSUPPORTED_LAYOUT`; `BAD_LENGTH` if the payload has not the declared size; `BAD_PAYLOAD`; `TOO_LARGE`.
    """
    header = container.header
    if header.encrypted:
        raise HocketError(
            Reason.ENCRYPTED, "the package is encrypted, which this version cannot read: publish it in the clear"
        )
    metadata = read_metadata(container.metadata, limits)
    hocket = _own(metadata)
    layouts = candidates(header.model_type_id, hocket)
    payload = decompress(container.payload, Compression(header.compression_id), header.uncompressed_bytes, limits)
    layout, model = read_model(payload, layouts, metadata.get("aprender_version"), limits)
    model = facts.with_width(model, hocket.get("n_features"), limits)
    labels = facts.labels(model, hocket.get("labels"), limits)
    return (
        _facts(
            container,
            digest,
            metadata,
            layout=layout.name,
            expert_layout=layout.expert,
            n_features=facts.width(model),
            n_features_min=facts.least_width(model),
            output_columns=1 if labels is None else len(labels),
            labels=labels,
            output_range=facts.output_range(model),
            expert_count=len(model.experts) if isinstance(model, MixtureOfExperts) else 1,
            parameter_bytes=facts.parameter_bytes(model),
            not_servable=facts.not_servable(model),
        ),
        model,
    )


def _own(metadata: dict[str, Any]) -> dict[str, Any]:
    """`custom.hocket`, the corner of the metadata that is ours."""
    hocket = (metadata.get("custom") or {}).get("hocket")
    if hocket is None:
        return {}
    if not isinstance(hocket, dict):
        raise HocketError(Reason.BAD_METADATA, "custom.hocket must be a map")
    for key in ("layout", "expert_layout"):
        if not isinstance(hocket.get(key), str | None):
            raise HocketError(Reason.BAD_METADATA, f"custom.hocket.{key} must be a string")
    return hocket


def _facts(container: Container, digest: str, metadata: dict[str, Any], **model: Any) -> ModelFacts:  # noqa: ANN401 - named by ModelFacts
    header = container.header
    return ModelFacts(
        format="apr",
        digest=digest,
        size_bytes=container.size_bytes,
        format_version=f"1.{header.minor}",
        model_type_id=header.model_type_id,
        model_type=MODEL_TYPES[header.model_type_id],
        compression="none" if header.compression_id == Compression.NONE else "zstd",
        flags=tuple(name for name, flag in Flag.__members__.items() if header.flags & flag),
        encrypted=header.encrypted,
        signed=header.signed,
        name=metadata.get("model_name"),
        metadata=metadata,
        sections=container.sections,
        **model,
    )
