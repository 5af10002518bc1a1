"""The parts of an `.apr` file: header, metadata, payload, signature block, checksum.

    0             32             header
    32            metadata       MessagePack map
    32+metadata   payload        compressed, perhaps encrypted
    P             96             only if SIGNED: Ed25519 signature (64) over bytes 0..P-1, public key (32)
    end-4         4              CRC32 of everything before it, little-endian

The parts tile the file: a byte outside them would be covered by no signature. Only fixed-size fields and lengths are
interpreted here, so that a file can be taken apart before anybody trusts it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages.apr.header import HEADER, MODEL_TYPES, Compression, Header
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import Section

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNATURE_BYTES: Final = 64
PUBLIC_KEY_BYTES: Final = 32
CRC_BYTES: Final = 4
_BLOCK_BYTES: Final = SIGNATURE_BYTES + PUBLIC_KEY_BYTES


@dataclass(frozen=True, slots=True)
class EmbeddedSignature:
    """The signature block, unverified. The key it names proves nothing unless somebody trusts it."""

    signature: bytes
    public_key: bytes


@dataclass(frozen=True, slots=True)
class Container:
    """An `.apr` file taken apart, nothing in it parsed. The views share the file's memory.

    Attributes:
        header: The fixed fields.
        metadata: MessagePack, unread.
        payload: The stored payload block, unread.
        signed_bytes: What an embedded signature covers: header, metadata and payload.
        signature: The signature block if the file has one, unverified.
        size_bytes: Of the whole file.
    """

    header: Header
    metadata: memoryview
    payload: memoryview
    signed_bytes: memoryview
    signature: EmbeddedSignature | None
    size_bytes: int

    @property
    def sections(self) -> tuple[Section, ...]:
        """Where each part lies in the file, in order."""
        sizes = {"header": HEADER.size, "metadata": len(self.metadata), "payload": len(self.payload)}
        if self.signature is not None:
            sizes["signature"] = _BLOCK_BYTES
        sizes["checksum"] = CRC_BYTES
        sections: list[Section] = []
        offset = 0
        for name, size in sizes.items():
            sections.append(Section(name, offset, size))
            offset += size
        return tuple(sections)


def split(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Container:
    """Take an `.apr` file apart without parsing anything of variable form.

    Args:
        data: The whole file.
        limits: Bounds on its size.

    Raises:
        HocketError: `BAD_MAGIC`, `UNSUPPORTED_VERSION`, `BAD_LENGTH` (a part is cut short, or bytes belong to
            none), `TOO_LARGE`, `BAD_CHECKSUM`, `UNSUPPORTED_TYPE`, `UNSUPPORTED_COMPRESSION`.
    """
    view = memoryview(data).toreadonly().cast("B")
    header = Header.parse(view)
    payload_start = HEADER.size + header.metadata_bytes
    end = payload_start + header.payload_bytes
    size = end + (_BLOCK_BYTES if header.signed else 0) + CRC_BYTES
    if len(view) != size:
        raise HocketError(Reason.BAD_LENGTH, f"the header describes a file of {size} bytes, this one has {len(view)}")
    for what, found, most in (
        ("file", size, limits.package_bytes),
        ("metadata", header.metadata_bytes, limits.metadata_bytes),
        ("uncompressed payload", header.uncompressed_bytes, limits.uncompressed_bytes),
    ):
        if found > most:
            raise HocketError(Reason.TOO_LARGE, f"the {what} has {found} bytes, more than the limit of {most}")
    stored, computed = int.from_bytes(view[-CRC_BYTES:], "little"), zlib.crc32(view[:-CRC_BYTES])
    if stored != computed:
        raise HocketError(
            Reason.BAD_CHECKSUM,
            f"the file is damaged: its checksum is {computed:08x}, it records {stored:08x}; fetch it again",
        )
    if header.model_type_id not in MODEL_TYPES:
        raise HocketError(Reason.UNSUPPORTED_TYPE, f"model type 0x{header.model_type_id:04x} is unknown")
    if header.compression_id not in set(Compression):
        raise HocketError(
            Reason.UNSUPPORTED_COMPRESSION,
            f"compression id {header.compression_id} is not supported: store the model plain, with zstd or with LZ4",
        )
    signature = None
    if header.signed:
        block = bytes(view[end : end + _BLOCK_BYTES])
        signature = EmbeddedSignature(block[:SIGNATURE_BYTES], block[SIGNATURE_BYTES:])
    return Container(
        header=header,
        metadata=view[HEADER.size : payload_start],
        payload=view[payload_start:end],
        signed_bytes=view[:end],
        signature=signature,
        size_bytes=len(view),
    )


def join(
    header: Header,
    metadata: bytes,
    payload: bytes,
    signing: Callable[[bytes], tuple[bytes, bytes]] | None,
) -> bytes:
    """Put an `.apr` file together; the inverse of `split`.

    Args:
        header: With final sizes, and SIGNED set exactly if `signing` is given.
        metadata: MessagePack.
        payload: The payload block as stored.
        signing: Maps the signed bytes to (signature, public key).

    Raises:
        HocketError: `BAD_REQUEST` if `signing` answers anything but 64 and 32 bytes.
    """
    data = header.pack() + metadata + payload
    if signing is not None:
        signature, public_key = signing(data)
        if (len(signature), len(public_key)) != (SIGNATURE_BYTES, PUBLIC_KEY_BYTES):
            raise HocketError(Reason.BAD_REQUEST, "signing must answer a 64-byte signature and a 32-byte key")
        data += signature + public_key
    return data + zlib.crc32(data).to_bytes(CRC_BYTES, "little")
