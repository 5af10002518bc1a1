"""The one error of the suite, and the one table of its reasons.

Every refusal is a `HocketError` with a stable `Reason`; every reason belongs to one `Situation`. Nothing here
knows about gRPC: `hocket.rpc.status` maps situations to status codes, in both directions.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


class Situation(Enum):
    """What happened, as a caller has to react to it. One row of the status table each."""

    MALFORMED = auto()
    """The request or the package bytes are not well formed; sending them again cannot help."""
    UNKNOWN = auto()
    """No such model, package, expert or mixture."""
    REFUSED = auto()
    """Well formed, but policy, trust or lifecycle forbids it now."""
    UNAUTHENTICATED = auto()
    """Credentials are missing or wrong."""
    FORBIDDEN = auto()
    """Credentials are known but do not allow this."""
    TAKEN = auto()
    """The name is bound to other bytes."""
    STALE = auto()
    """The etag is not the current one; read again, then retry."""
    COMPACTED = auto()
    """The revision asked for is not in this registry's history; start from a snapshot."""
    OVERLOADED = auto()
    """Capacity, queue or memory is exhausted for now; retry after the given pause."""
    UNAVAILABLE = auto()
    """Nothing was delivered; try again or elsewhere."""
    INCOMPLETE = auto()
    """The answer lacks experts that the caller insisted on."""
    TIMED_OUT = auto()
    """The deadline passed while waiting."""
    CORRUPT = auto()
    """Stored bytes fail their digest."""
    BUG = auto()
    """A fault of ours; only a correlation id leaves the process."""


class Reason(StrEnum):
    """Stable, documented reasons (`docs/contracts.md`). Clients branch on these, never on messages.

    Each member is its own name as a string, and knows its situation.
    """

    situation: Situation

    def __new__(cls, text: str, situation: Situation) -> Self:  # noqa: D102 - the class says it
        member = str.__new__(cls, text)
        member._value_ = text
        member.situation = situation
        return member

    BAD_REQUEST = "BAD_REQUEST", Situation.MALFORMED
    BAD_TENSOR = "BAD_TENSOR", Situation.MALFORMED
    BAD_MIXTURE = "BAD_MIXTURE", Situation.MALFORMED
    BAD_GRAMMAR = "BAD_GRAMMAR", Situation.MALFORMED
    BAD_SCHEMA = "BAD_SCHEMA", Situation.MALFORMED
    TOP_K_OUT_OF_RANGE = "TOP_K_OUT_OF_RANGE", Situation.MALFORMED
    DIGEST_MISMATCH = "DIGEST_MISMATCH", Situation.MALFORMED
    BAD_PACKAGE = "BAD_PACKAGE", Situation.MALFORMED
    BAD_DATASET = "BAD_DATASET", Situation.MALFORMED
    BAD_ADAPTER = "BAD_ADAPTER", Situation.MALFORMED
    BAD_ARCHIVE = "BAD_ARCHIVE", Situation.MALFORMED
    BAD_FILE_NAME = "BAD_FILE_NAME", Situation.MALFORMED
    BAD_FILE_TYPE = "BAD_FILE_TYPE", Situation.MALFORMED
    BAD_JSON = "BAD_JSON", Situation.MALFORMED
    BAD_MANIFEST = "BAD_MANIFEST", Situation.MALFORMED
    BAD_WEIGHTS = "BAD_WEIGHTS", Situation.MALFORMED
    BAD_MAGIC = "BAD_MAGIC", Situation.MALFORMED
    BAD_CHECKSUM = "BAD_CHECKSUM", Situation.MALFORMED
    BAD_KEY_FILE = "BAD_KEY_FILE", Situation.MALFORMED
    BAD_LENGTH = "BAD_LENGTH", Situation.MALFORMED
    BAD_METADATA = "BAD_METADATA", Situation.MALFORMED
    BAD_PAYLOAD = "BAD_PAYLOAD", Situation.MALFORMED
    BAD_RELEASE = "BAD_RELEASE", Situation.MALFORMED
    BAD_TRUST_FILE = "BAD_TRUST_FILE", Situation.MALFORMED
    DUPLICATE_FILE = "DUPLICATE_FILE", Situation.MALFORMED
    MANIFEST_BASE_NAME = "MANIFEST_BASE_NAME", Situation.MALFORMED
    MANIFEST_EPOCHS = "MANIFEST_EPOCHS", Situation.MALFORMED
    MANIFEST_LEARNING_RATE = "MANIFEST_LEARNING_RATE", Situation.MALFORMED
    MANIFEST_NAME = "MANIFEST_NAME", Situation.MALFORMED
    MANIFEST_NO_ADAPTERS = "MANIFEST_NO_ADAPTERS", Situation.MALFORMED
    MANIFEST_NO_BASE = "MANIFEST_NO_BASE", Situation.MALFORMED
    MANIFEST_NO_BASES = "MANIFEST_NO_BASES", Situation.MALFORMED
    MANIFEST_NO_BASE_ADAPTERS = "MANIFEST_NO_BASE_ADAPTERS", Situation.MALFORMED
    MANIFEST_NO_RANK = "MANIFEST_NO_RANK", Situation.MALFORMED
    MANIFEST_RANK = "MANIFEST_RANK", Situation.MALFORMED
    MANIFEST_TARGET_MODULES = "MANIFEST_TARGET_MODULES", Situation.MALFORMED
    MANIFEST_TWO_BASES = "MANIFEST_TWO_BASES", Situation.MALFORMED
    MANIFEST_VERSION = "MANIFEST_VERSION", Situation.MALFORMED
    TOO_LARGE = "TOO_LARGE", Situation.MALFORMED
    UNSUPPORTED_COMPRESSION = "UNSUPPORTED_COMPRESSION", Situation.MALFORMED
    UNSUPPORTED_LAYOUT = "UNSUPPORTED_LAYOUT", Situation.MALFORMED
    UNSUPPORTED_TYPE = "UNSUPPORTED_TYPE", Situation.MALFORMED
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION", Situation.MALFORMED

    UNKNOWN_BASE = "UNKNOWN_BASE", Situation.UNKNOWN
    UNKNOWN_EXPERT = "UNKNOWN_EXPERT", Situation.UNKNOWN
    UNKNOWN_MIXTURE = "UNKNOWN_MIXTURE", Situation.UNKNOWN
    UNKNOWN_MODEL = "UNKNOWN_MODEL", Situation.UNKNOWN
    UNKNOWN_PACKAGE = "UNKNOWN_PACKAGE", Situation.UNKNOWN

    BASE_MISMATCH = "BASE_MISMATCH", Situation.REFUSED
    DECRYPTION_FAILED = "DECRYPTION_FAILED", Situation.REFUSED
    ENCRYPTED = "ENCRYPTED", Situation.REFUSED
    EXPERTS_INCOMPATIBLE = "EXPERTS_INCOMPATIBLE", Situation.REFUSED
    KEY_EXPIRED = "KEY_EXPIRED", Situation.REFUSED
    KEY_REVOKED = "KEY_REVOKED", Situation.REFUSED
    LICENCE_EXPIRED = "LICENCE_EXPIRED", Situation.REFUSED
    MEMBERS_NOT_ALIGNED = "MEMBERS_NOT_ALIGNED", Situation.REFUSED
    MIXTURE_IN_USE = "MIXTURE_IN_USE", Situation.REFUSED
    NAME_MISMATCH = "NAME_MISMATCH", Situation.REFUSED
    NAME_NOT_ALLOWED = "NAME_NOT_ALLOWED", Situation.REFUSED
    NO_BASE = "NO_BASE", Situation.REFUSED
    NOT_SERVABLE = "NOT_SERVABLE", Situation.REFUSED
    QUARANTINED = "QUARANTINED", Situation.REFUSED
    REQUIREMENT_CYCLE = "REQUIREMENT_CYCLE", Situation.REFUSED
    REQUIREMENT_MISSING = "REQUIREMENT_MISSING", Situation.REFUSED
    RESOLUTION_TOO_HARD = "RESOLUTION_TOO_HARD", Situation.REFUSED
    SIGNATURE_INVALID = "SIGNATURE_INVALID", Situation.REFUSED
    SIGNER_NOT_TRUSTED = "SIGNER_NOT_TRUSTED", Situation.REFUSED
    TOO_MANY_EXPERTS = "TOO_MANY_EXPERTS", Situation.REFUSED
    UNSIGNED = "UNSIGNED", Situation.REFUSED
    WRONG_RECIPIENT = "WRONG_RECIPIENT", Situation.REFUSED
    YANKED = "YANKED", Situation.REFUSED

    TOKEN_REQUIRED = "TOKEN_REQUIRED", Situation.UNAUTHENTICATED

    TOKEN_NOT_ALLOWED = "TOKEN_NOT_ALLOWED", Situation.FORBIDDEN

    NAME_TAKEN = "NAME_TAKEN", Situation.TAKEN
    VERSION_TAKEN = "VERSION_TAKEN", Situation.TAKEN

    ETAG_STALE = "ETAG_STALE", Situation.STALE

    REVISION_UNKNOWN = "REVISION_UNKNOWN", Situation.COMPACTED

    CAPACITY = "CAPACITY", Situation.OVERLOADED
    DEVICE_MEMORY = "DEVICE_MEMORY", Situation.OVERLOADED
    QUEUE_FULL = "QUEUE_FULL", Situation.OVERLOADED

    DRAINING = "DRAINING", Situation.UNAVAILABLE
    NO_REPLICA = "NO_REPLICA", Situation.UNAVAILABLE
    NOT_READY = "NOT_READY", Situation.UNAVAILABLE
    UNREACHABLE = "UNREACHABLE", Situation.UNAVAILABLE

    BAD_ANSWER = "BAD_ANSWER", Situation.INCOMPLETE
    COVERAGE = "COVERAGE", Situation.INCOMPLETE
    STREAM_BROKEN = "STREAM_BROKEN", Situation.INCOMPLETE

    DEADLINE = "DEADLINE", Situation.TIMED_OUT
    EXPERT_LOADING = "EXPERT_LOADING", Situation.TIMED_OUT
    STRAGGLER = "STRAGGLER", Situation.TIMED_OUT

    BLOB_CORRUPT = "BLOB_CORRUPT", Situation.CORRUPT

    INTERNAL = "INTERNAL", Situation.BUG


class HocketError(Exception):
    """A refusal with a stable reason.

    Args:
        reason: What clients branch on.
        message: For people: what is wrong, and what to do next. Safe to send to any caller.
        field: Path of the offending request field (`input.shape[1]`), when there is one.
        retry_after_seconds: How long to wait before trying again, when trying again can help.
        **metadata: Facts a program may want, as short strings (`digest`, `key_id`, ...).
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata: Mapping[str, str] = metadata

    def restated(self, message: str, **metadata: str) -> HocketError:
        """The same refusal in other words.

        Args:
            message: For people, in place of its own.
            **metadata: Facts to add to its own.
        """
        return HocketError(
            self.reason,
            message,
            field=self.field,
            retry_after_seconds=self.retry_after_seconds,
            **{**self.metadata, **metadata},
        )

    @property
    def situation(self) -> Situation:
        """The row of the status table this refusal belongs to."""
        return self.reason.situation

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
