"""Quantised arrays: 32 neighbouring values share one float16 scale.

    Q8_0  34 bytes  f16 scale, 32 x i8                                         x = q * scale
    Q4_0  18 bytes  f16 scale, 16 bytes: value 2j low, 2j + 1 high nibble      x = (q - 8) * scale

The reference's bytes exactly (0.11.0, `QuantizedBlock`): scale = max |x| / 127, or / 7, over the real values of a
block, 1 where that is 0; values are divided by the float32 scale before it is rounded to float16, and rounded half away
from zero. In spite of its name Q4_0 is not GGML's, which orders nibbles otherwise; Q8_0 is.

A file stores an array as

    u32 kind (0 Q8_0, 1 Q4_0), u64 count and u64 sizes of the shape, u64 count and bytes of the blocks, u64 32
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages.apr.bincode import U64, Codec, Reader, enumeration
from hocket.packages.model import (
    DenseLayer,
    DenseNetwork,
    ElasticNet,
    KMeans,
    KNearestNeighbors,
    Lasso,
    LinearRegression,
    LinearSVM,
    LogisticRegression,
    MixtureOfExperts,
    Quantized,
    QuantKind,
    Ridge,
    SoftmaxGate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hocket.packages.model import Floats, Model, Weights

M = TypeVar("M", bound="Model")

BLOCK_VALUES: Final = 32
BLOCK_BYTES: Final = {QuantKind.Q8_0: 2 + BLOCK_VALUES, QuantKind.Q4_0: 2 + BLOCK_VALUES // 2}

_SCALE_BYTES: Final = 2
_RANK_MAX: Final = 8
_LEAST: Final = {QuantKind.Q8_0: -127.0, QuantKind.Q4_0: -8.0}
_MOST: Final = {QuantKind.Q8_0: 127.0, QuantKind.Q4_0: 7.0}
_NIBBLE_ZERO: Final = 8
_KIND: Final = enumeration(tuple(QuantKind))
"""Q4_1 (2), Q8Tensor (3) and Custom (4) are names without an encoding."""

# What becomes blocks in each kind of value; everything else stays as it is.
_WEIGHTS: Final[dict[type, str]] = {
    LinearRegression: "coefficients",
    Ridge: "coefficients",
    Lasso: "coefficients",
    ElasticNet: "coefficients",
    LogisticRegression: "coefficients",
    LinearSVM: "weights",
    KMeans: "centroids",
    KNearestNeighbors: "x_train",
    SoftmaxGate: "weights",
    DenseLayer: "weights",
}


def quantize(values: Floats, kind: QuantKind) -> Quantized:
    """The blocks of an array.

    Args:
        values: Finite float32 values of any shape.
        kind: What to make.

    Raises:
        HocketError: `BAD_PAYLOAD` for a value that is not finite, or too large for a float16 scale: beyond 127, or 7,
            times 65504.
    """
    array = np.asarray(values, np.float32)
    if not np.isfinite(array).all():
        raise HocketError(Reason.BAD_PAYLOAD, "a value that is not finite cannot be quantised")
    count = block_count(array.shape)
    padded = np.zeros(count * BLOCK_VALUES, np.float32)
    padded[: array.size] = array.reshape(-1)
    values = padded.reshape(count, BLOCK_VALUES)
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = np.where(largest > 0, largest / np.float32(_MOST[kind]), np.float32(1))
        stored = scales.astype("<f2")
        # 0 times the infinite inverse of a scale that is nearly 0 is no number, which the reference makes 0.
        units = np.nan_to_num(values * (np.float32(1) / scales), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if not np.isfinite(stored).all():
        raise HocketError(
            Reason.BAD_PAYLOAD,
            f"{float(largest.max()):g} is too large for {kind}, whose scales are float16: scale the model's inputs",
        )
    units = np.clip(units, _LEAST[kind], _MOST[kind]).astype(np.float64)
    whole = np.trunc(units + np.copysign(0.5, units)).astype(np.int8)
    if kind is QuantKind.Q4_0:
        nibbles = (whole + _NIBBLE_ZERO).astype(np.uint8)
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    else:
        codes = whole.view(np.uint8)
    blocks = np.concatenate((stored.view(np.uint8), codes), axis=1)
    return Quantized(kind, tuple(int(size) for size in array.shape), blocks.tobytes())


def dequantize(quantized: Quantized) -> Floats:
    """The array that blocks stand for: float32 of their shape, read-only."""
    raw = np.frombuffer(quantized.blocks, np.uint8).reshape(-1, BLOCK_BYTES[quantized.kind])
    scales = raw[:, :_SCALE_BYTES].copy().view("<f2").astype(np.float32)
    codes = raw[:, _SCALE_BYTES:]
    if quantized.kind is QuantKind.Q4_0:
        nibbles = np.stack((codes & 0x0F, codes >> 4), axis=2).reshape(len(raw), BLOCK_VALUES)
        units = nibbles.astype(np.float32)
        units -= _NIBBLE_ZERO
    else:
        units = codes.copy().view(np.int8).astype(np.float32)
    units *= scales  # in place: blocks of the largest size leave no room for more
    values: Floats = units.reshape(-1)[: quantized.size].reshape(quantized.shape)
    values.flags.writeable = False
    return values


def floats(weights: Weights) -> Floats:
    """An array as it is, or what its blocks stand for."""
    return dequantize(weights) if isinstance(weights, Quantized) else weights


def part_of(weights: Weights, start: int, stop: int) -> Floats:
    """Values `start` to `stop` of an array, counted row by row: of blocks no others become values."""
    if not isinstance(weights, Quantized):
        return weights.reshape(-1)[start:stop]
    first, last, size_bytes = start // BLOCK_VALUES, block_count((stop,)), BLOCK_BYTES[weights.kind]
    begin = first * BLOCK_VALUES
    some = replace(weights, shape=(stop - begin,), blocks=weights.blocks[first * size_bytes : last * size_bytes])
    return dequantize(some)[start - begin :]


def quantized_model(model: M, kind: QuantKind) -> M:
    """The model with its weights as blocks: coefficients, centroids, training inputs of neighbours, gate and layers.

    Intercepts and biases stay float32. So do trees, forests and naive Bayes, which are refused: thresholds decide on
    single steps of a value, and variances lie too far apart for a common scale.

    Raises:
        HocketError: `UNSUPPORTED_LAYOUT` for a model that cannot be quantised, is so already, or was never fitted;
            `BAD_PAYLOAD` as `quantize`.
    """
    if kind_of(model) is not None:
        raise HocketError(Reason.UNSUPPORTED_LAYOUT, "the model is quantised already: start from the original")
    if type(model) not in {MixtureOfExperts, DenseNetwork, *_WEIGHTS}:
        raise HocketError(
            Reason.UNSUPPORTED_LAYOUT,
            f"{type(model).__name__} cannot be quantised: linear models, logistic regression, linear SVMs, k-means, "
            "nearest neighbours, mixtures and dense networks can",
        )
    if any(weights is None for weights in weights_of(model)):
        raise HocketError(Reason.UNSUPPORTED_LAYOUT, "the model was never fitted: there is nothing to quantise")
    return _changed(model, lambda weights: quantize(floats(weights), kind))


def dequantized_model(model: M) -> M:
    """The model that a quantised one answers as: arrays in place of its blocks. Others come back as they are."""
    return model if kind_of(model) is None or isinstance(model, Quantized) else _changed(model, floats)


def kind_of(model: Model) -> QuantKind | None:
    """The kind of a model's blocks, or of a lone tensor's; None if there are none."""
    if isinstance(model, Quantized):
        return model.kind
    return next((weights.kind for weights in weights_of(model) if isinstance(weights, Quantized)), None)


def weights_of(model: Model) -> list[Weights | None]:
    """Everything of a model that is quantised or could be; None for what is absent."""
    return [getattr(part, _WEIGHTS[type(part)]) for part in _parts(model)]


def _parts(model: Model) -> tuple[Any, ...]:
    """The values of a model that hold weights."""
    match model:
        case MixtureOfExperts():
            return (*model.experts, model.gate)
        case DenseNetwork():
            return model.layers
        case _:
            return (model,) if type(model) in _WEIGHTS else ()


def _changed(model: M, change: Callable[[Weights], Weights]) -> M:
    """The model with other weights; those that are absent stay so."""

    def part(of: Any) -> Any:  # noqa: ANN401 - a value of any of these classes
        name = _WEIGHTS[type(of)]
        weights = getattr(of, name)
        return of if weights is None else replace(of, **{name: change(weights)})

    changed: Any
    match model:
        case MixtureOfExperts():
            changed = replace(model, experts=tuple(map(part, model.experts)), gate=part(model.gate))
        case DenseNetwork():
            changed = replace(model, layers=tuple(map(part, model.layers)))
        case _:
            changed = part(model)
    same_kind: M = changed
    return same_kind


def block_count(shape: tuple[int, ...]) -> int:
    """Blocks of an array of this shape."""
    return -(-math.prod(shape) // BLOCK_VALUES)


def _read(reader: Reader) -> Quantized:
    kind, rank = _KIND.read(reader), U64.read(reader)
    if not 1 <= rank <= _RANK_MAX:
        raise reader.bad(f"a quantised array has {rank} dimensions, 1 to {_RANK_MAX} are read")
    shape = tuple(U64.read(reader) for _ in range(rank))
    if 4 * math.prod(shape) > reader.limits.uncompressed_bytes:  # as much as a file could hold without blocks
        raise reader.too_large("quantised values", reader.limits.uncompressed_bytes // 4)
    size_bytes = U64.read(reader)
    if size_bytes != block_count(shape) * BLOCK_BYTES[kind]:
        raise reader.bad(f"{size_bytes} bytes of {kind} blocks are not an array of {' x '.join(map(str, shape))}")
    blocks = reader.take(size_bytes)
    if U64.read(reader) != BLOCK_VALUES:
        raise reader.bad(f"a quantised block has other than {BLOCK_VALUES} values")
    scales = np.frombuffer(blocks, np.uint8).reshape(-1, BLOCK_BYTES[kind])[:, :_SCALE_BYTES].copy().view("<f2")
    if not np.isfinite(scales).all():
        raise reader.bad("the scale of a quantised block is not finite")
    return Quantized(kind, shape, bytes(blocks))


def _write(out: bytearray, quantized: Quantized) -> None:
    _KIND.write(out, quantized.kind)
    U64.write(out, len(quantized.shape))
    for size in quantized.shape:
        U64.write(out, size)
    U64.write(out, len(quantized.blocks))
    out += quantized.blocks
    U64.write(out, BLOCK_VALUES)


QUANTIZED: Final = Codec(_read, _write)


def _of_rank(rank: int, what: str) -> Codec[Quantized]:
    """Blocks in place of a vector or a matrix: read with the checks that those get."""

    def read(reader: Reader) -> Quantized:
        quantized = _read(reader)
        if len(quantized.shape) != rank:
            raise reader.bad(f"{what} has {rank} dimensions, not {len(quantized.shape)}")
        if quantized.shape[-1] > reader.limits.features:
            raise reader.too_large("features", reader.limits.features)
        if not quantized.size and any(quantized.shape):
            raise reader.bad(f"{what} of {' x '.join(map(str, quantized.shape))} holds nothing")
        return quantized

    return Codec(read, _write)


QUANTIZED_VECTOR: Final = _of_rank(1, "a vector")
QUANTIZED_MATRIX: Final = _of_rank(2, "a matrix")
