"""The 32 bytes that begin every `.apr` file.

    offset  size  field
    0       4     magic `APRN`
    4       2     major and minor version, (1, 0)
    6       2     model type id
    8       4     metadata size in bytes
    12      4     payload size in bytes, with salt, nonce and tag where encrypted
    16      4     payload size before compression and encryption
    20      1     compression id
    21      1     flags
    22      10    reserved, written as zero and ignored (later writers keep a quality score at 22)

All little-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from hocket.errors import HocketError, Reason
from hocket.packages.apr.neighbours import FIRST_BYTES, neighbour

MAGIC: Final = b"APRN"
HEADER: Final = struct.Struct("<4sBBHIIIBB10s")

MODEL_TYPES: Final = {
    0x0001: "LinearRegression",
    0x0002: "LogisticRegression",
    0x0003: "DecisionTree",
    0x0004: "RandomForest",
    0x0005: "GradientBoosting",
    0x0006: "KMeans",
    0x0007: "Pca",
    0x0008: "NaiveBayes",
    0x0009: "Knn",
    0x000A: "Svm",
    0x0010: "NgramLm",
    0x0011: "Tfidf",
    0x0012: "CountVectorizer",
    0x0020: "NeuralSequential",
    0x0021: "NeuralCustom",
    0x0030: "ContentRecommender",
    0x0040: "MixtureOfExperts",
    0x00FF: "Custom",
}


class Flag(enum.IntFlag):
    """The header's flag bits. Only the first two change how a file is read."""

    ENCRYPTED = 0x01
    SIGNED = 0x02
    STREAMING = 0x04
    LICENSED = 0x08
    TRUENO_NATIVE = 0x10
    QUANTIZED = 0x20
    HAS_MODEL_CARD = 0x40


class Compression(enum.IntEnum):
    """Compression ids that are read and written; both zstd ids read alike.

    Release 0.11.0 of the reference cannot read LZ4, later ones can.
    """

    NONE = 0
    ZSTD = 1
    ZSTD_MAX = 2
    LZ4 = 3


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields as stored, none of them judged except magic and major version."""

    model_type_id: int
    metadata_bytes: int
    payload_bytes: int
    uncompressed_bytes: int
    compression_id: int
    flags: int
    minor: int = 0
    reserved: bytes = bytes(10)

    @classmethod
    def parse(cls, data: memoryview) -> Header:
        """Read the header at the start of a file.

        Raises:
            HocketError: `BAD_MAGIC` for another format, `BAD_LENGTH` for a file shorter than a header,
                `UNSUPPORTED_VERSION` for a major version other than 1.
        """
        start = bytes(data[: len(MAGIC)])
        if start != MAGIC and not (start and MAGIC.startswith(start)):
            raise HocketError(
                Reason.BAD_MAGIC, f"this is not an .apr file of version 1: {neighbour(bytes(data[:FIRST_BYTES]))}"
            )
        if len(data) < HEADER.size:
            raise HocketError(Reason.BAD_LENGTH, f"the file ends inside its header, after {len(data)} bytes")
        _, major, minor, type_id, metadata, payload, uncompressed, compression, flags, reserved = HEADER.unpack_from(
            data
        )
        if major != 1:
            raise HocketError(
                Reason.UNSUPPORTED_VERSION,
                f"format version {major}.{minor} is not supported: only 1.x can be read",
            )
        return cls(type_id, metadata, payload, uncompressed, compression, flags, minor, reserved)

    def pack(self) -> bytes:
        """The 32 bytes of this header."""
        return HEADER.pack(
            MAGIC,
            1,
            self.minor,
            self.model_type_id,
            self.metadata_bytes,
            self.payload_bytes,
            self.uncompressed_bytes,
            self.compression_id,
            self.flags,
            self.reserved,
        )

    @property
    def encrypted(self) -> bool:
        """Whether the payload is ciphertext."""
        return bool(self.flags & Flag.ENCRYPTED)

    @property
    def signed(self) -> bool:
        """Whether a signature block follows the payload."""
        return bool(self.flags & Flag.SIGNED)
