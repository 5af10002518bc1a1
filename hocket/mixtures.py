"""The mixture record: members, gate and how many experts answer; its canonical form and its digest.

The body of a mixture is RFC 8785 JSON without etag and revision. The gate tensor is no part of the body; its
SHA-256 is, so the digest of the body covers it. What a release signs is that digest.

    {"capacity_factor": 1.25, "gate": {"experts": 2, "features": 64, "kind": "softmax", "temperature": 1,
     "weights": "sha256:..."}, "labels": ["0", "1"], "members": [{"expert": "sha256:..."},
     {"mixture": "sha256:..."}], "name": "digits", "top_k": 1}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import rfc8785

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, check_name, digest_of, is_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MEMBERS_MAX: Final = 10_000
FEATURES_MAX: Final = 2**21
CAPACITY_FACTOR_MAX: Final = 1_000_000
TEMPERATURE_MIN: Final = 1e-6
"""Smallest temperature: with float32 weights and inputs, logits over it stay far inside float64."""
LABELS_MAX: Final = 4096
LABEL_LENGTH_MAX: Final = 256
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
BODY_BYTES_MAX: Final = 4 * 2**20
"""Largest body; it travels in one message."""
GATE_BYTES_MAX: Final = 2**30
"""Largest gate tensor; it travels in chunks."""


@dataclass(frozen=True, slots=True)
class MixtureRef:
    """A member that is a mixture itself, by the digest of its body."""

    digest: str


@dataclass(frozen=True, slots=True)
class SoftmaxGate:
    """Weights `softmax((x @ W + bias) / temperature)` over the members.

    Args:
        features: F, width of the input rows.
        experts: E, number of members.
        weights: Digest of the tensor W: FP32 `[F, E]`, little-endian, row-major.
        temperature: Finite and above 0; smaller is more decided.
        bias: One number per member, or None.
    """

    features: int
    experts: int
    weights: str
    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    @property
    def tensor_bytes(self) -> int:
        """Size of W in bytes."""
        return self.features * self.experts * 4


@dataclass(frozen=True, slots=True)
class FixedGate:
    """The same weight for every input; not negative, and not all zero. They need not sum to 1."""

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MixtureRecord:
    """A mixture as it is signed.

    Args:
        name: What clients address.
        members: Experts and mixtures, in the order of the gate's columns.
        gate: Input to weights.
        top_k: Members that answer per row, by default; 1 up to the number of members.
        labels: Ordered classes of the answer; None takes them from the members.
        capacity_factor: Head-room, at least 1, before load moves to the next of the ranking; None: it never does.
    """

    name: str
    members: tuple[ExpertId | MixtureRef, ...]
    gate: SoftmaxGate | FixedGate
    top_k: int
    labels: tuple[str, ...] | None = None
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    def body(self) -> bytes:
        """The canonical JSON that is hashed and signed."""
        document: dict[str, Any] = {
            "name": self.name,
            "members": [
                {"mixture": member.digest} if isinstance(member, MixtureRef) else {"expert": str(member)}
                for member in self.members
            ],
            "gate": _gate_document(self.gate),
            "top_k": self.top_k,
        }
        if self.labels is not None:
            document["labels"] = list(self.labels)
        if self.capacity_factor is not None:
            document["capacity_factor"] = self.capacity_factor
        return rfc8785.dumps(document)

    @property
    def digest(self) -> str:
        """The mixture digest: SHA-256 of the body."""
        return digest_of(self.body())


def parse_mixture(body: bytes) -> MixtureRecord:
    """Read a body.

    Raises:
        HocketError: `BAD_MIXTURE` if it is not the canonical form of a sound record.
    """
    if len(body) > BODY_BYTES_MAX:
        raise _bad(f"the body has {len(body)} bytes; at most {BODY_BYTES_MAX} are allowed")
    try:
        record = _record(json.loads(body))
        canonical = record.body()
    except HocketError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise _bad(f"the body is not a mixture record ({type(error).__name__})") from error
    if canonical != body:
        raise _bad("the body is not in canonical form (RFC 8785), or has keys that mean nothing here")
    return record


def gate_tensor(weights: NDArray[np.float32]) -> bytes:
    """The bytes of a softmax gate's `[F, E]` tensor, as hashed and sent."""
    return np.ascontiguousarray(weights, dtype="<f4").tobytes()


def read_gate(gate: SoftmaxGate, tensor: bytes) -> NDArray[np.float32]:
    """The `[F, E]` tensor of a gate, read-only.

    Raises:
        HocketError: `DIGEST_MISMATCH` if these are not the bytes the record names, `BAD_MIXTURE` if they do not fill
            `[F, E]` or hold NaN or infinity.
    """
    if digest_of(tensor) != gate.weights:
        raise HocketError(Reason.DIGEST_MISMATCH, "the gate tensor is not the one the mixture names")
    if len(tensor) != gate.tensor_bytes:
        raise _bad(
            f"the gate tensor has {len(tensor)} bytes; [{gate.features}, {gate.experts}] takes {gate.tensor_bytes}"
        )
    weights = np.frombuffer(tensor, dtype="<f4").reshape(gate.features, gate.experts)
    if not np.isfinite(weights).all():
        raise _bad("the gate tensor holds NaN or infinity")
    return weights


def _bad(message: str) -> HocketError:
    return HocketError(Reason.BAD_MIXTURE, message)


def _gate_document(gate: SoftmaxGate | FixedGate) -> dict[str, Any]:
    if isinstance(gate, FixedGate):
        return {"kind": "fixed", "weights": list(gate.weights)}
    document: dict[str, Any] = {
        "kind": "softmax",
        "features": gate.features,
        "experts": gate.experts,
        "weights": gate.weights,
        "temperature": gate.temperature,
    }
    if gate.bias is not None:
        document["bias"] = list(gate.bias)
    return document


def _record(document: Mapping[str, Any]) -> MixtureRecord:
    labels = document.get("labels")
    return MixtureRecord(
        name=document["name"],
        members=tuple(_member(member) for member in document["members"]),
        gate=_gate(document["gate"]),
        top_k=document["top_k"],
        labels=None if labels is None else tuple(labels),
        capacity_factor=document.get("capacity_factor"),
    )


def _member(document: Mapping[str, Any]) -> ExpertId | MixtureRef:
    if "mixture" in document:
        return MixtureRef(document["mixture"])
    return ExpertId.parse(document["expert"])


def _gate(document: Mapping[str, Any]) -> SoftmaxGate | FixedGate:
    match document["kind"]:
        case "softmax":
            bias = document.get("bias")
            return SoftmaxGate(
                features=document["features"],
                experts=document["experts"],
                weights=document["weights"],
                temperature=document["temperature"],
                bias=None if bias is None else tuple(bias),
            )
        case "fixed":
            return FixedGate(tuple(document["weights"]))
        case kind:
            raise _bad(f"gate kind {str(kind)[:32]!r} is not known here; use softmax or fixed")


def _check(record: MixtureRecord) -> None:
    check_name(record.name, "mixture name")
    count = len(record.members)
    if not 1 <= count <= MEMBERS_MAX:
        raise _bad(f"a mixture has 1 to {MEMBERS_MAX} members, not {count}")
    if len(set(record.members)) != count:
        raise _bad("a member is listed twice; give it the sum of its weights instead")
    for member in record.members:
        if isinstance(member, MixtureRef) and not is_digest(member.digest):
            raise _bad(f"member {str(member.digest)[:80]!r} is not a digest: name mixtures by sha256:<64 hex digits>")
    if not _is_count(record.top_k, count):
        raise _bad(f"top_k must be 1 to {count}, the number of members")
    factor = record.capacity_factor
    if factor is not None and not (_is_number(factor) and 1 <= factor <= CAPACITY_FACTOR_MAX):
        raise _bad(f"capacity_factor must be a number of 1 to {CAPACITY_FACTOR_MAX}")
    if record.labels is not None:
        _check_labels(record.labels)
    _check_gate(record.gate, count)


def _check_labels(labels: tuple[str, ...]) -> None:
    if not 1 <= len(labels) <= LABELS_MAX or len(set(labels)) != len(labels):
        raise _bad(f"labels must be 1 to {LABELS_MAX} different texts")
    if not all(map(_is_label, labels)):
        raise _bad(f"a label is a text of at most {LABEL_LENGTH_MAX} characters")


def _check_gate(gate: SoftmaxGate | FixedGate, count: int) -> None:
    if isinstance(gate, FixedGate):
        if len(gate.weights) != count or not all(_is_number(weight) and weight >= 0 for weight in gate.weights):
            raise _bad(f"a fixed gate has one weight per member ({count}), none negative")
        if not 0 < sum(gate.weights) < math.inf:
            raise _bad("the weights of a fixed gate must have a sum above 0 and finite")
        return
    if gate.experts != count or not _is_count(gate.features, FEATURES_MAX):
        raise _bad(f"the gate must have 1 to {FEATURES_MAX} features and one column per member ({count})")
    if gate.tensor_bytes > GATE_BYTES_MAX:
        raise _bad(f"the gate tensor would take {gate.tensor_bytes} bytes; at most {GATE_BYTES_MAX} are allowed")
    if not is_digest(gate.weights):
        raise _bad("gate.weights must be the digest of the gate tensor")
    if not (_is_number(gate.temperature) and TEMPERATURE_MIN <= gate.temperature <= _FLOAT32_MAX):
        raise _bad(f"gate.temperature must be a number of at least {TEMPERATURE_MIN:g}")
    if gate.bias is not None and not (len(gate.bias) == count and all(map(_is_float32, gate.bias))):
        raise _bad(f"gate.bias must have one finite float32 number per member ({count})")


def _is_label(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LABEL_LENGTH_MAX


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_float32(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and abs(value) <= _FLOAT32_MAX


def _is_count(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
