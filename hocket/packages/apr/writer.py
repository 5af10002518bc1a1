"""A model turned into `.apr` bytes, as the reference library would write them."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages.apr.container import join, split
from hocket.packages.apr.declared import declare, undeclare
from hocket.packages.apr.encryption import Target, seal
from hocket.packages.apr.facts import width, with_width
from hocket.packages.apr.header import MODEL_TYPES, Compression, Flag, Header
from hocket.packages.apr.layouts import Layout, layout_of
from hocket.packages.apr.metadata import write_metadata
from hocket.packages.apr.payload import compress
from hocket.packages.apr.reader import decode
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.model import Model, TreeModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import EllipsisType

_WRITER_VERSION: Final = "0.11.0"
"""The library release whose layouts these are, which is what readers take `aprender_version` to mean."""

CompressionName: TypeAlias = Literal["none", "zstd", "zstd-max", "lz4"]

COMPRESSIONS: Final[dict[CompressionName, Compression]] = {
    "none": Compression.NONE,
    "zstd": Compression.ZSTD,
    "zstd-max": Compression.ZSTD_MAX,
    "lz4": Compression.LZ4,
}


def write(  # noqa: PLR0913 - what to store, and the ways to store it
    model: Model,
    *,
    metadata: Mapping[str, Any] | None = None,
    name: str | None = None,
    labels: Sequence[str | int | None] | None = None,
    compression: CompressionName = "zstd",
    model_type_id: int | None = None,
    created_at: str | None = None,
    signing: Callable[[bytes], tuple[bytes, bytes]] | EllipsisType | None = ...,
    encryption: Target | None = None,
) -> bytes:
    """Encode a model. The result is read back before it is returned, so what is written can be served or inspected.

    Args:
        model: What to store.
        metadata: The whole metadata verbatim, order kept. Without it the mandatory fields are filled in and layout,
            labels and, for trees, the input width are recorded under `custom.hocket`.
        name: The metadata's `model_name`.
        labels: One per output column of a classifier, None for a column to drop.
        compression: `zstd` is level 3, `zstd-max` level 19; release 0.11.0 of the reference cannot read `lz4`.
        model_type_id: The header's type id if not the conventional one.
        created_at: Decimal Unix seconds; now, if not given.
        signing: Maps the bytes to sign to (64-byte Ed25519 signature, 32-byte public key), to embed a signature.
            What is encrypted is signed as it is stored, so that anyone can verify it; it has to be given together with
            `encryption`, where None leaves it to the release to protect the clear part of the file.
        encryption: A password or a recipient, to encrypt the payload. The metadata stays clear, and declares under
            `custom.hocket` what others must know of the model, also where the whole metadata is given.

    Raises:
        HocketError: `BAD_REQUEST` if `metadata` comes together with a field of it, or `encryption` without `signing`,
            or for an unknown compression; otherwise for the reason a reader would refuse the file.
    """
    if metadata is not None and (name, labels, created_at) != (None, None, None):
        raise HocketError(Reason.BAD_REQUEST, "give either the whole metadata, or name, labels and created_at")
    if signing is ...:
        if encryption is not None:
            raise HocketError(
                Reason.BAD_REQUEST,
                "encryption does not protect what stays clear: give signing, or signing=None if a release covers it",
            )
        signing = None
    if compression not in COMPRESSIONS:
        raise HocketError(Reason.BAD_REQUEST, f"compression must be one of {', '.join(COMPRESSIONS)}")
    conventional_id, layout = layout_of(model)
    type_id = conventional_id if model_type_id is None else model_type_id
    if type_id not in MODEL_TYPES:
        raise HocketError(Reason.UNSUPPORTED_TYPE, f"model type 0x{type_id:04x} is unknown")
    image = _encode(model, layout)
    if metadata is None:
        metadata = {"created_at": created_at or str(int(time.time())), "aprender_version": _WRITER_VERSION}
        if name is not None:
            metadata["model_name"] = name
        metadata["custom"] = {"hocket": _own(model, layout, labels)}
    payload = compress(image, COMPRESSIONS[compression])

    def packed(metadata: Mapping[str, Any], block: bytes, flags: Flag) -> bytes:
        section = write_metadata(metadata)
        header = Header(
            model_type_id=type_id,
            metadata_bytes=len(section),
            payload_bytes=len(block),
            uncompressed_bytes=len(image),
            compression_id=COMPRESSIONS[compression],
            flags=flags,
        )
        return join(header, section, block, signing if flags & Flag.SIGNED else None)

    flags = content_flags(metadata, quantized=layout.quantized) | (Flag.SIGNED if signing else Flag(0))
    if encryption is None:
        data = packed(metadata, payload, flags)
        decode(split(data), digest_of(data))
        return data
    clear = packed(undeclare(metadata), payload, Flag(0))
    metadata = declare(metadata, decode(split(clear), digest_of(clear))[0])
    clear = packed(metadata, payload, Flag(0))
    decode(split(clear), digest_of(clear))  # as it will be read by whoever has decrypted it
    data = packed(metadata, seal(payload, encryption), Flag.ENCRYPTED | flags)
    split(data)
    return data


def content_flags(metadata: Mapping[str, Any], *, quantized: bool) -> Flag:
    """The flags that say what is in a file, however it is stored: LICENSED, QUANTIZED, HAS_MODEL_CARD.

    The reference sets the first one alone, and not where it signs or encrypts. Its readers, like ours, only show them.

    Args:
        metadata: Of the file.
        quantized: Whether its model is one of our quantised ones: the reference's lone tensors are never marked.
    """
    flags = Flag.QUANTIZED if quantized else Flag(0)
    if metadata.get("license"):
        flags |= Flag.LICENSED
    if metadata.get("model_card"):
        flags |= Flag.HAS_MODEL_CARD
    return flags


def _encode(model: Model, layout: Layout) -> bytes:
    image = bytearray()
    try:
        layout.codec.write(image, model)
    except (struct.error, OverflowError, TypeError, ValueError, AttributeError) as error:
        raise HocketError(Reason.BAD_PAYLOAD, f"the model cannot be written: {error}") from error
    if len(image) > DEFAULT_LIMITS.uncompressed_bytes:
        raise HocketError(Reason.TOO_LARGE, f"the model takes {len(image)} bytes, the format ends at 2**30")
    return bytes(image)


def _own(model: Model, layout: Layout, labels: Sequence[str | int | None] | None) -> dict[str, Any]:
    """`custom.hocket`, keys sorted as the reference would store them."""
    own: dict[str, Any] = {}
    if layout.expert is not None:
        own["expert_layout"] = layout.expert
    if labels is not None:
        own["labels"] = list(labels)
    own["layout"] = layout.name
    n_features = width(with_width(model, None, DEFAULT_LIMITS))
    if isinstance(model, TreeModel) and n_features is not None:
        own["n_features"] = n_features
    return own
