"""A package rewritten: encrypted, decrypted, compressed, quantised, or with another model card. Bytes in, bytes out.

The result is another package, with another digest: releases of the old one say nothing about it. A signature inside the
file does not survive either, but for the signature that `signing` makes anew; one that is there has to verify, since a
file that was altered must not come out as one that looks whole. Metadata keeps its order, and values that nothing here
is about. The header keeps its model type and, unless the model itself changes, its minor version and reserved bytes; a
licence and a card are flagged where metadata is written anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages.apr.container import Container, join, split
from hocket.packages.apr.declared import declare, undeclare
from hocket.packages.apr.encryption import seal, unseal
from hocket.packages.apr.header import Compression, Flag
from hocket.packages.apr.layouts import layout_of
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.apr.payload import compress, decompress
from hocket.packages.apr.quantization import quantized_model
from hocket.packages.apr.reader import decode
from hocket.packages.apr.writer import COMPRESSIONS, CompressionName, content_flags, write
from hocket.packages.keys import public_key_of, sign, verify
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    from hocket.packages.apr.about import ModelCard
    from hocket.packages.apr.encryption import Credential, Target
    from hocket.packages.model import QuantKind

    Signing: TypeAlias = Callable[[bytes], tuple[bytes, bytes]]
    """Maps the bytes to sign to (64-byte Ed25519 signature, 32-byte public key)."""


def signing_with(seed: bytes) -> Signing:
    """What puts a signature by a private key inside a file.

    Raises:
        HocketError: `BAD_REQUEST` if the seed is not 32 bytes.
    """
    public_key = public_key_of(seed)
    return lambda message: (sign(seed, message), public_key)


def encrypted(data: bytes, to: Target, *, signing: Signing | None) -> bytes:
    """The package with its payload encrypted, and then signed.

    Its metadata stays clear, and declares under `custom.hocket` what others must know of the model to route to it. With
    a password this derives a key: call it from a thread where an event loop runs.

    Args:
        data: An `.apr` file that is not encrypted.
        to: A password, or a recipient.
        signing: Embeds a signature; None leaves it to the release to protect the clear part of the file, which
            encryption does not.

    Raises:
        HocketError: `BAD_REQUEST` if it is encrypted already, and the refusals of `hocket.packages.apr.decode`: what
            nobody could read is not encrypted.
    """
    container = _open(data)
    _in_the_clear(container, Reason.BAD_REQUEST, "decrypt it first, for it is encrypted already")
    facts, _ = decode(container, digest_of(data))
    metadata = declare(facts.metadata, facts)
    clear = _packed(container, metadata=metadata, signing=None)
    decode(split(clear), digest_of(clear))  # as it will be read by whoever has decrypted it
    return _packed(
        container,
        metadata=metadata,
        payload=seal(bytes(container.payload), to),
        flags=container.header.flags | Flag.ENCRYPTED,
        signing=signing,
    )


def decrypted(data: bytes, credential: Credential, *, signing: Signing | None = None) -> bytes:
    """The package with its payload in the clear, and without what its metadata declared for want of that.

    With a password this derives a key: call it from a thread where an event loop runs.

    Args:
        data: An encrypted `.apr` file.
        credential: What opens it.
        signing: Embeds a signature.

    Raises:
        HocketError: `BAD_REQUEST` if it is not encrypted; `WRONG_RECIPIENT`, `DECRYPTION_FAILED`, and the other
            refusals of `hocket.packages.apr.decode`.
    """
    container = _open(data)
    if not container.header.encrypted:
        raise HocketError(Reason.BAD_REQUEST, "there is nothing to decrypt: the package is in the clear")
    payload = unseal(container.payload, credential)
    metadata = read_metadata(container.metadata)
    bare = undeclare(metadata)
    clear = _packed(
        container,
        metadata=None if bare == metadata else bare,
        payload=payload,
        flags=container.header.flags & ~Flag.ENCRYPTED,
        signing=signing,
    )
    decode(split(clear), digest_of(clear))
    return clear


def compressed(data: bytes, compression: CompressionName, *, signing: Signing | None = None) -> bytes:
    """The package with its payload compressed otherwise. What the payload means is not looked at.

    Args:
        data: An `.apr` file that is not encrypted.
        compression: `none`, `zstd` (level 3), `zstd-max` (level 19), or `lz4`, which release 0.11.0 of the reference
            cannot read.
        signing: Embeds a signature.

    Raises:
        HocketError: `BAD_REQUEST` for an unknown compression; `ENCRYPTED` if it is encrypted; `BAD_LENGTH`,
            `BAD_PAYLOAD` or `TOO_LARGE` if its payload cannot be decompressed.
    """
    container = _open(data)
    _in_the_clear(container, Reason.ENCRYPTED, "decrypt it first, for what is encrypted does not compress")
    if compression not in COMPRESSIONS:
        raise HocketError(Reason.BAD_REQUEST, f"compression must be one of {', '.join(COMPRESSIONS)}")
    image = _image(container)
    return _packed(
        container,
        payload=compress(image, COMPRESSIONS[compression]),
        compression=COMPRESSIONS[compression],
        signing=signing,
    )


def quantized(data: bytes, kind: QuantKind, *, signing: Signing | None = None) -> bytes:
    """The package with its weights in blocks of 8 or 4 bits, which cost precision (`docs/packages.md` says how much).

    Metadata is kept but for `custom.hocket.layout` and `expert_layout`, which name the layout of the result.

    Args:
        data: An `.apr` file that is not encrypted.
        kind: What the blocks look like.
        signing: Embeds a signature.

    Raises:
        HocketError: `ENCRYPTED` if it is encrypted, `UNSUPPORTED_LAYOUT` for a model without such weights or one
            that is quantised already, and the refusals of `hocket.packages.apr.decode`.
    """
    container = _open(data)
    _in_the_clear(container, Reason.ENCRYPTED, "decrypt it first: weights that nobody sees cannot be quantised")
    facts, model = decode(container, digest_of(data))
    smaller = quantized_model(model, kind)
    _, layout = layout_of(smaller)
    custom = dict(facts.metadata.get("custom") or {})
    own = dict(custom.get("hocket") or {}) | {"layout": layout.name}
    if layout.expert is not None:
        own["expert_layout"] = layout.expert
    custom["hocket"] = dict(sorted(own.items()))
    names = {compression: name for name, compression in COMPRESSIONS.items()}
    return write(
        smaller,
        metadata={**facts.metadata, "custom": custom},
        compression=names[Compression(container.header.compression_id)],
        model_type_id=container.header.model_type_id,
        signing=signing,
    )


def with_card(data: bytes, card: ModelCard | None, *, signing: Signing | None = None) -> bytes:
    """The package with another model card, or without one. It may be encrypted, for a card is never.

    Args:
        data: An `.apr` file.
        card: The new card; None takes the old one away.
        signing: Embeds a signature.

    Raises:
        HocketError: `BAD_METADATA` or `TOO_LARGE` if the card cannot be stored, or the metadata cannot be read.
    """
    container = _open(data)
    metadata: dict[str, Any] = read_metadata(container.metadata)
    if card is None:
        metadata.pop("model_card", None)
    else:
        metadata["model_card"] = card.section()
    return _packed(container, metadata=metadata, signing=signing)


def _open(data: bytes) -> Container:
    """The file taken apart, if nobody has altered it since it was signed."""
    container = split(data)
    if container.signature is not None:
        verify(container.signature.public_key, container.signed_bytes, container.signature.signature)
    return container


def _in_the_clear(container: Container, reason: Reason, advice: str) -> None:
    if container.header.encrypted:
        raise HocketError(reason, f"the package is encrypted: {advice} (`hocket apr decrypt`)")


def _image(container: Container) -> bytes:
    header = container.header
    return bytes(
        decompress(container.payload, Compression(header.compression_id), header.uncompressed_bytes, DEFAULT_LIMITS)
    )


def _packed(
    container: Container,
    *,
    metadata: Mapping[str, Any] | None = None,
    payload: bytes | None = None,
    compression: Compression | None = None,
    flags: int | None = None,
    signing: Signing | None,
) -> bytes:
    """The file put together again, with what is given in place of what it had."""
    section = bytes(container.metadata) if metadata is None else write_metadata(metadata)
    block = bytes(container.payload) if payload is None else payload
    kept = container.header.flags if flags is None else flags
    if metadata is not None:
        about = content_flags(metadata, quantized=bool(kept & Flag.QUANTIZED))
        kept = kept & ~(Flag.LICENSED | Flag.HAS_MODEL_CARD) | about
    header = replace(
        container.header,
        metadata_bytes=len(section),
        payload_bytes=len(block),
        compression_id=container.header.compression_id if compression is None else compression,
        flags=kept & ~Flag.SIGNED if signing is None else kept | Flag.SIGNED,
    )
    data = join(header, section, block, signing)
    split(data)  # within every limit
    return data
