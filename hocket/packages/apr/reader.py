"""An `.apr` container turned into facts and a model. Everything is parsed here, so trust comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.packages.apr import facts
from hocket.packages.apr.declared import check_declared, read_declared
from hocket.packages.apr.encryption import unseal
from hocket.packages.apr.header import MODEL_TYPES, Compression, Flag
from hocket.packages.apr.layouts import candidates, read_model
from hocket.packages.apr.metadata import read_metadata
from hocket.packages.apr.payload import decompress
from hocket.packages.apr.quantization import kind_of
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import MixtureOfExperts, Model, ModelFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hocket.packages.apr.container import Container
    from hocket.packages.apr.encryption import Credential

_COMPRESSIONS: Final = {
    Compression.NONE: "none",
    Compression.ZSTD: "zstd",
    Compression.ZSTD_MAX: "zstd",
    Compression.LZ4: "lz4",
}


def describe(container: Container, digest: str, limits: Limits = DEFAULT_LIMITS) -> ModelFacts:
    """What header and metadata alone say: all there is to know of an encrypted file without its credential.

    Args:
        container: From `split`.
        digest: Of the file, `sha256:<hex>`.
        limits: Bounds on the metadata.

    Returns:
        Of an encrypted file that declares its model, with what it declares: claims, until somebody decrypts it. Of
        another encrypted file `not_servable` says that it does not.

    Raises:
        HocketError: `BAD_METADATA` or `TOO_LARGE` if the metadata is refused, `UNSUPPORTED_LAYOUT` if it declares a
            layout that nobody can read.
    """
    metadata = read_metadata(container.metadata, limits)
    if not container.header.encrypted:
        return _facts(container, digest, metadata)
    own = _own(metadata)
    declared = read_declared(own, limits)
    if declared is None:
        return _facts(
            container,
            digest,
            metadata,
            not_servable="the payload is encrypted, and the metadata does not declare what is inside",
        )
    candidates(container.header.model_type_id, own)
    return _facts(container, digest, metadata, **declared)


def decode(
    container: Container,
    digest: str,
    limits: Limits = DEFAULT_LIMITS,
    *,
    credential: Credential | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[ModelFacts, Model]:
    """Read metadata and model.

    A model that is well formed but cannot answer is decoded all the same; `not_servable` then says why.

    Args:
        container: From `split`.
        digest: Of the file, `sha256:<hex>`.
        limits: Bounds on everything read.
        credential: What an encrypted payload is opened with; of a payload in the clear it is not looked at.
        check: Told the metadata before the payload is looked at; raises to refuse it.

    Raises:
        HocketError: `ENCRYPTED` for an encrypted file without a credential, whatever else is wrong with it;
            `BAD_METADATA`; `UNSUPPORTED_LAYOUT`; the refusals of `hocket.packages.apr.encryption.unseal`; `BAD_LENGTH`
            if the payload has not the declared size; `BAD_PAYLOAD`; `TOO_LARGE`; what `check` raises.
    """
    header = container.header
    if header.encrypted and credential is None:
        raise HocketError(
            Reason.ENCRYPTED,
            "the package is encrypted, and there is no credential for it here: give its password or recipient key "
            "(of a worker: [worker.credentials])",
        )
    metadata = read_metadata(container.metadata, limits)
    if check is not None:
        check(metadata)
    hocket = _own(metadata)
    layouts = candidates(header.model_type_id, hocket)
    block = container.payload
    if header.encrypted and credential is not None:
        block = memoryview(unseal(block, credential))
    payload = decompress(block, Compression(header.compression_id), header.uncompressed_bytes, limits)
    del block  # what was decrypted and is decompressed is needed no longer
    layout, model = read_model(payload, layouts, metadata.get("aprender_version"), limits)
    model = facts.with_width(model, hocket.get("n_features"), limits)
    labels = facts.labels(model, hocket.get("labels"), limits)
    found = _facts(
        container,
        digest,
        metadata,
        layout=layout.name,
        expert_layout=layout.expert,
        quantization=kind_of(model),
        n_features=facts.width(model),
        n_features_min=facts.least_width(model),
        output_columns=facts.output_columns(model, labels),
        labels=labels,
        output_range=facts.output_range(model),
        expert_count=len(model.experts) if isinstance(model, MixtureOfExperts) else 1,
        parameter_bytes=facts.parameter_bytes(model),
        not_servable=facts.not_servable(model),
    )
    check_declared(hocket, found, limits)
    return found, model


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
        compression=_COMPRESSIONS[Compression(header.compression_id)],
        flags=tuple(name for name, flag in Flag.__members__.items() if header.flags & flag),
        encrypted=header.encrypted,
        signed=header.signed,
        name=metadata.get("model_name"),
        metadata=metadata,
        sections=container.sections,
        **model,
    )
