"""Mixtures as people write them: TOML in, a mixture record and its gate tensor out.

    name = "digits"
    top_k = 2                            # default: 1 behind a softmax gate, all behind a fixed one
    labels = ["0", "1"]                  # optional: the ordered classes of the answer
    capacity_factor = 1.5                # optional

    [[members]]
    expert = "acme/low-digits@1.0.0"     # or sha256:...[#ordinal], or a path to an .apr file
    [[members]]
    mixture = "other"                    # name or digest

    [gate]
    kind = "softmax"
    temperature = 1.0                    # optional
    weights = "gate.npy"                 # [features, members], .npy or .safetensors
    bias = [0.0, 0.5]                    # optional
    # or: kind = "fixed", weights = [1, 2]

Paths are relative to the TOML file. `read_draft` reads all of it without asking anybody; `resolve` asks a registry
what names stand for now, so that the record names members by digest alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, ReleaseName, digest_of, is_digest
from hocket.mixtures import GATE_BYTES_MAX, FixedGate, MixtureRecord, MixtureRef, SoftmaxGate, gate_tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hocket.client.registry import RegistryClient

_DRAFT_BYTES_MAX: Final = 4 * 2**20
_DRAFT_KEYS: Final = ("name", "top_k", "labels", "capacity_factor", "members", "gate")
_MEMBER_KEYS: Final = ("expert", "mixture")
_GATE_KEYS: Final = {"softmax": ("kind", "temperature", "weights", "bias"), "fixed": ("kind", "weights")}


@dataclass(frozen=True, slots=True)
class DraftMember:
    """A member as written.

    Args:
        kind: What it is.
        name: `publisher/name@version` or a digest; for mixtures a name or a digest.
    """

    kind: Literal["expert", "mixture"]
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class DraftSoftmax:
    """A softmax gate with its tensor: float32 `[features, members]`."""

    weights: NDArray[np.float32]
    temperature: float = 1.0
    bias: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A mixture whose members may still be names.

    Args:
        name: What clients will address.
        members: In the order of the gate's columns.
        gate: Input to weights.
        top_k: Members per row; None: 1 behind a softmax gate, all behind a fixed one.
        labels: Ordered classes of the answer; None takes them from the members.
        capacity_factor: As in `MixtureRecord`.
    """

    name: str
    members: tuple[DraftMember, ...]
    gate: DraftSoftmax | FixedGate
    top_k: int | None = None
    labels: tuple[str, ...] | None = None
    capacity_factor: float | None = None


def read_draft(path: Path) -> Draft:
    """Read a TOML file, and the gate tensor and local packages that it names.

    Raises:
        HocketError: `BAD_REQUEST` for a file that cannot be read; `BAD_MIXTURE` for one that does not say what a
            mixture needs: it names the place and says what belongs there.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_DRAFT_BYTES_MAX + 1)
        if len(text) > _DRAFT_BYTES_MAX:
            raise _bad(f"{path} is larger than {_DRAFT_BYTES_MAX} bytes")
        document = tomllib.loads(text.decode())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _bad(f"{path} is not TOML: {error}") from error
    return parse_draft(document, path.parent)


def parse_draft(document: Mapping[str, Any], folder: Path) -> Draft:
    """As `read_draft`, from a mapping of the same form.

    Args:
        document: What the TOML says.
        folder: What relative paths in it start from.

    Raises:
        HocketError: As there.
    """
    _only(document, _DRAFT_KEYS, "a mixture")
    members = tuple(_member(member, folder) for member in _need(document, "members", list, "a mixture"))
    labels, capacity_factor = document.get("labels"), document.get("capacity_factor")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise _bad('labels must be a list of texts, such as ["0", "1"]')
    return Draft(
        name=_need(document, "name", str, "a mixture"),
        members=members,
        gate=_gate(_need(document, "gate", dict, "a mixture"), folder),
        top_k=document.get("top_k"),
        labels=None if labels is None else tuple(labels),
        capacity_factor=None if capacity_factor is None else _number(capacity_factor, "capacity_factor"),
    )


def format_draft(draft: Draft, weights: str = "") -> str:
    """A draft as TOML that `read_draft` reads.

    Args:
        draft: A member may also be a path to an .apr file, relative to the TOML file.
        weights: Of a softmax gate, the path of the file that holds them, relative to the TOML file: this writes none.
    """
    head = {
        "name": draft.name,
        "top_k": draft.top_k,
        "labels": None if draft.labels is None else list(draft.labels),
        "capacity_factor": draft.capacity_factor,
    }
    gate: dict[str, object]
    if isinstance(draft.gate, FixedGate):
        gate = {"kind": "fixed", "weights": list(draft.gate.weights)}
    else:
        bias = draft.gate.bias
        gate = {"kind": "softmax", "temperature": draft.gate.temperature, "weights": weights}
        gate["bias"] = None if bias is None else list(bias)
    members = [f"\n[[members]]\n{_line(member.kind, member.name)}" for member in draft.members]
    return "".join(f"{line}\n" for line in (*_lines(head), *members, "\n[gate]", *_lines(gate)))


async def resolve(draft: Draft, registry: RegistryClient) -> tuple[MixtureRecord, bytes]:
    """The record that a draft means now, and its gate tensor.

    Args:
        draft: From `read_draft`.
        registry: Knows what names stand for.

    Returns:
        The record, whose `body` is to be signed and put, and the tensor to put with it; empty behind a fixed gate.

    Raises:
        HocketError: `UNKNOWN_PACKAGE` or `UNKNOWN_MIXTURE` for a name that the registry does not know; `BAD_MIXTURE`
            for a record that is not sound, such as a gate with another number of members.
    """
    gate, tensor = _sealed(draft.gate, len(draft.members))
    members = tuple([await _resolved(member, registry) for member in draft.members])
    top_k = draft.top_k
    if top_k is None:
        top_k = 1 if isinstance(gate, SoftmaxGate) else len(members)
    return MixtureRecord(draft.name, members, gate, top_k, draft.labels, draft.capacity_factor), tensor


def _lines(table: Mapping[str, object]) -> list[str]:
    return [_line(key, value) for key, value in table.items() if value is not None]


def _line(key: str, value: object) -> str:
    """JSON texts, numbers and lists are TOML ones, but for the one control character that JSON does not escape."""
    return f"{key} = " + json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _sealed(gate: DraftSoftmax | FixedGate, member_count: int) -> tuple[SoftmaxGate | FixedGate, bytes]:
    """The gate as it is recorded, and its tensor."""
    if isinstance(gate, FixedGate):
        return gate, b""
    features, experts = gate.weights.shape
    if experts != member_count:
        advice = "transpose it" if features == member_count else "it needs a column for each member"
        raise _bad(
            f"gate.weights is [features, members], here [{features}, {experts}], and there are {member_count} members: "
            + advice
        )
    tensor = gate_tensor(gate.weights)
    return SoftmaxGate(features, experts, digest_of(tensor), gate.temperature, gate.bias), tensor


async def _resolved(member: DraftMember, registry: RegistryClient) -> ExpertId | MixtureRef:
    if member.kind == "mixture":
        if is_digest(member.name):
            return MixtureRef(member.name)
        return MixtureRef((await registry.fetch_mixture(member.name)).mixture.digest)
    if member.name.startswith("sha256:"):
        return ExpertId.parse(member.name)
    return ExpertId((await registry.get_package(member.name)).digest)


def _member(document: object, folder: Path) -> DraftMember:
    if not isinstance(document, dict) or len(document) != 1:
        raise _bad('each [[members]] has one line: expert = "..." or mixture = "..."')
    _only(document, _MEMBER_KEYS, "a member")
    if "mixture" in document:
        mixture = _need(document, "mixture", str, "a member")
        if "/" in mixture:
            raise _bad(f'mixture = "{mixture}" is not the name or digest of a mixture; packages are expert = "..."')
        return DraftMember("mixture", mixture)
    expert = _need(document, "expert", str, "a member")
    if expert.endswith(".apr"):
        return DraftMember("expert", _file_digest(folder / expert))
    try:
        (ExpertId if expert.startswith("sha256:") else ReleaseName).parse(expert)
        return DraftMember("expert", expert)
    except HocketError as error:
        raise _bad(
            f"expert {expert!r} is neither publisher/name@version, nor sha256:<64 hex digits>[#ordinal], "
            "nor a path to an .apr file"
        ) from error


def _gate(document: dict[str, Any], folder: Path) -> DraftSoftmax | FixedGate:
    kind = document.get("kind")
    if kind not in _GATE_KEYS:
        raise _bad(f"gate.kind must be one of {', '.join(_GATE_KEYS)}")
    _only(document, _GATE_KEYS[kind], f"a {kind} gate")
    if kind == "fixed":
        return FixedGate(_numbers(_need(document, "weights", list, "a fixed gate"), "gate.weights"))
    weights = _read_weights(folder / _need(document, "weights", str, "a softmax gate"))
    bias = _need(document, "bias", list, "a softmax gate") if "bias" in document else None
    return DraftSoftmax(
        weights,
        _number(document.get("temperature", 1.0), "gate.temperature"),
        None if bias is None else _numbers(bias, "gate.bias"),
    )


def _numbers(values: list[object], what: str) -> tuple[float, ...]:
    return tuple(_number(value, what) for value in values)


def _number(value: object, what: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond every float
        pass
    raise _bad(f"{what} must be made of finite numbers")


def _read_weights(path: Path) -> NDArray[np.float32]:
    match path.suffix:
        case ".npy":
            weights = _read_npy(path)
        case ".safetensors":
            weights = _read_safetensors(path)
        case _:
            raise _bad(f"gate.weights {path} must be an .npy or a .safetensors file")
    if weights.ndim != 2 or weights.dtype.kind not in "fiu":  # noqa: PLR2004 - features and members
        raise _bad(
            f"gate.weights {path} must hold numbers [features, members], not {weights.dtype} {list(weights.shape)}"
        )
    if weights.size * 4 > GATE_BYTES_MAX:
        raise _bad(f"gate.weights {path} would take {weights.size * 4} bytes; at most {GATE_BYTES_MAX} are allowed")
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        weights = weights.astype(np.float32)
    if not np.isfinite(weights).all():
        raise _bad(f"gate.weights {path} holds NaN, infinity or numbers beyond float32")
    return weights


def _read_npy(path: Path) -> NDArray[Any]:
    """Mapped, so that a header that claims more than the file holds is refused before memory is taken."""
    try:
        weights: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, EOFError) as error:
        raise _bad(f"gate.weights {path} cannot be read as .npy: {error}") from error
    return weights


def _read_safetensors(path: Path) -> NDArray[Any]:
    try:
        if path.stat().st_size > 2 * GATE_BYTES_MAX:
            raise _bad(f"gate.weights {path} is larger than {2 * GATE_BYTES_MAX} bytes")
        tensors = load_safetensors(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, KeyError) as error:
        raise _bad(f"gate.weights {path} cannot be read as .safetensors: {error}") from error
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if "weights" not in tensors:
        raise _bad(f"gate.weights {path} must hold one tensor, or one called 'weights'")
    return tensors["weights"]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise _unreadable(path, error) from error


def _only(document: Mapping[str, Any], known: Collection[str], what: str) -> None:
    for key in document:
        if key not in known:
            raise _bad(f"{key!r} means nothing in {what}; there are {', '.join(known)}")


def _need(document: Mapping[str, Any], key: str, kind: type, what: str) -> Any:  # noqa: ANN401 - of that kind
    value = document.get(key)
    if not isinstance(value, kind):
        raise _bad(f"{what} needs {key} = {_EXAMPLES[key]}")
    return value


_EXAMPLES: Final = {
    "name": '"digits"',
    "members": "one [[members]] table or more",
    "gate": "a [gate] table",
    "weights": '"gate.npy" (softmax) or [1, 2] (fixed)',
    "bias": "[0.0, 0.5]",
    "expert": '"publisher/name@version"',
    "mixture": '"name"',
}


def _unreadable(path: Path, error: OSError) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, f"cannot read {path}: {error.strerror or error}")


def _bad(message: str) -> HocketError:
    return HocketError(Reason.BAD_MIXTURE, message)
