"""A second reader of `.apr` files, for round trips: written from the format's description, sharing no code.

It trusts its input, checks little and is slow. Of the library it takes the values alone. Passwords and recipients are
handled by libsodium, whose AES needs a processor that has instructions for it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from dataclasses import replace
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without type information
import nacl.bindings
import nacl.pwhash.argon2id
import numpy as np
import zstandard
from nacl.signing import VerifyKey

from hocket.packages import model as m
from tests.builders import grow

WIDTH = {"B": 1, "I": 4, "Q": 8, "f": 4}


class Image:
    """A payload, and how far it has been read."""

    def __init__(self, data: bytes, metadata: dict[str, Any], *, quantized: bool) -> None:
        self.data = data
        self.position = 0
        self.quantized = quantized
        major, minor, *_ = map(int, metadata["aprender_version"].split("."))
        self.trees_tell_width = (major, minor) >= (0, 13)

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        assert len(taken) == count
        self.position += count
        return taken

    def one(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(WIDTH[code]))[0]

    def u64(self) -> int:
        return int(self.one("Q"))

    def f32(self) -> float:
        return float(self.one("f"))

    def boolean(self) -> bool:
        return {0: False, 1: True}[self.one("B")]

    def option(self, read: Any) -> Any:
        return read() if self.boolean() else None

    def several(self, read: Any) -> tuple[Any, ...]:
        return tuple(read() for _ in range(self.u64()))

    def vector(self) -> Any:
        return np.array([self.f32() for _ in range(self.u64())], np.float32)

    def counts(self) -> Any:
        return np.array([self.u64() for _ in range(self.u64())], np.uint64)

    def matrix(self) -> Any:
        values = self.vector()
        return values.reshape(self.u64(), self.u64())

    def block(self) -> m.Quantized:
        kind = [m.QuantKind.Q8_0, m.QuantKind.Q4_0][self.one("I")]
        shape = tuple(self.u64() for _ in range(self.u64()))
        blocks = self.take(self.u64())
        assert self.u64() == 32
        return m.Quantized(kind, shape, blocks)

    def weights(self) -> Any:
        return self.block() if self.quantized else self.vector()

    def weight_matrix(self) -> Any:
        return self.block() if self.quantized else self.matrix()

    def node(self, answer: Any) -> Any:
        if self.one("I") == 1:
            return (answer(), self.u64())
        feature, threshold = self.u64(), self.f32()
        return (feature, threshold, self.node(answer), self.node(answer))


def linear(i: Image) -> Any:
    return m.LinearRegression(i.option(i.weights), i.f32(), i.boolean())


def ridge(i: Image) -> Any:
    alpha = i.f32()
    return m.Ridge(i.option(i.weights), i.f32(), alpha, i.boolean())


def lasso(i: Image) -> Any:
    alpha = i.f32()
    return m.Lasso(i.option(i.weights), i.f32(), alpha, i.boolean(), i.u64(), i.f32())


def elastic(i: Image) -> Any:
    alpha, ratio = i.f32(), i.f32()
    return m.ElasticNet(i.option(i.weights), i.f32(), alpha, ratio, i.boolean(), i.u64(), i.f32())


def logistic(i: Image) -> Any:
    return m.LogisticRegression(i.option(i.weights), i.f32(), i.f32(), i.u64(), i.f32())


def tree_classifier(i: Image) -> Any:
    tree = i.option(lambda: grow(i.node(i.u64)))
    depth = i.option(i.u64)
    return m.DecisionTreeClassifier(tree, depth, i.option(i.u64) if i.trees_tell_width else None)


def tree_regressor(i: Image) -> Any:
    return m.DecisionTreeRegressor(i.option(lambda: grow(i.node(i.f32))), i.option(i.u64), i.u64(), i.u64())


def forest_classifier(i: Image) -> Any:
    return m.RandomForestClassifier(
        i.several(lambda: tree_classifier(i)),
        i.u64(),
        i.option(i.u64),
        i.option(i.u64),
        i.several(i.counts),
        i.option(i.matrix),
        i.option(i.counts),
    )


def forest_regressor(i: Image) -> Any:
    return m.RandomForestRegressor(
        i.several(lambda: tree_regressor(i)),
        i.u64(),
        i.option(i.u64),
        i.option(i.u64),
        i.several(i.counts),
        i.option(i.matrix),
        i.option(i.vector),
    )


def clusters(i: Image) -> Any:
    count, limit, tol, seed = i.u64(), i.u64(), i.f32(), i.option(i.u64)
    return m.KMeans(count, i.option(i.weight_matrix), limit, tol, seed, i.option(i.counts), i.f32(), i.u64())


def naive_bayes(i: Image) -> Any:
    rows = lambda: np.array(i.several(i.vector), np.float32)  # noqa: E731 - said twice
    return m.GaussianNB(i.option(i.vector), i.option(rows), i.option(rows), i.option(i.counts), i.f32())


def neighbors(i: Image) -> Any:
    k, metric = i.u64(), list(m.Metric)[i.one("I")]
    p = i.f32() if metric is m.Metric.MINKOWSKI else 2.0
    weighted = i.boolean()
    return m.KNearestNeighbors(k, i.option(i.weight_matrix), i.option(i.counts), metric, p, weighted)


def svm(i: Image) -> Any:
    return m.LinearSVM(i.option(i.weights), i.f32(), i.f32(), i.f32(), i.u64(), i.f32())


def boosting(i: Image) -> Any:
    count, rate, depth, start = i.u64(), i.f32(), i.u64(), i.f32()
    trees = i.several(lambda: tree_classifier(i))
    return m.GradientBoostingClassifier(trees, start, rate, count, depth)


def dense(i: Image) -> Any:
    def layer() -> m.DenseLayer:
        activation = list(m.Activation)[i.one("I")]
        return m.DenseLayer(i.weight_matrix(), i.vector(), activation)

    return m.DenseNetwork(i.several(layer))


def mixture(i: Image, expert: str) -> Any:
    experts = i.several(lambda: LAYOUTS[expert](i))
    features, count, temperature = i.u64(), i.u64(), i.f32()
    weights = i.block() if i.quantized else i.vector().reshape(features, count)
    assert tuple(weights.shape) == (features, count)
    config = m.MoeConfig(i.u64(), i.f32(), i.f32(), i.f32())
    return m.MixtureOfExperts(experts, m.SoftmaxGate(weights, temperature), config)


LAYOUTS: dict[str, Any] = {
    "LinearRegression": linear,
    "Ridge": ridge,
    "Lasso": lasso,
    "ElasticNet": elastic,
    "LogisticRegression": logistic,
    "DecisionTreeClassifier": tree_classifier,
    "DecisionTreeRegressor": tree_regressor,
    "RandomForestClassifier": forest_classifier,
    "RandomForestRegressor": forest_regressor,
    "KMeans": clusters,
    "GaussianNB": naive_bayes,
    "KNearestNeighbors": neighbors,
    "LinearSVM": svm,
    "GradientBoostingClassifier": boosting,
    "DenseNetwork": dense,
    "QuantizedBlock": Image.block,
}


def read(
    data: bytes,
    *,
    layout: str = "",
    expert: str = "",
    password: str | None = None,
    recipient_key: bytes | None = None,
) -> tuple[dict[str, Any], Any]:
    """Metadata and model of a file.

    Args:
        data: The whole file.
        layout: Of the payload, where the metadata does not record it.
        expert: Of a mixture's experts, where the metadata does not record it.
        password: What it was encrypted with.
        recipient_key: Private key of whom it was encrypted for.
    """
    magic, major, _, _, metadata_bytes, payload_bytes, size, compression, flags = struct.unpack_from(
        "<4sBBHIIIBB", data
    )
    assert (magic, major) == (b"APRN", 1)
    assert zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]
    end = 32 + metadata_bytes + payload_bytes
    metadata = msgpack.unpackb(data[32 : 32 + metadata_bytes], strict_map_key=True)
    payload = data[32 + metadata_bytes : end]
    if flags & 2:
        VerifyKey(data[end + 64 : end + 96]).verify(data[:end], data[end : end + 64])
        end += 96
    assert len(data) == end + 4
    assert bool(flags & 1) == (password is not None or recipient_key is not None)
    if password is not None:
        key = nacl.pwhash.argon2id.kdf(32, password.encode(), payload[:16], 2, 19456 * 1024)
        payload = nacl.bindings.crypto_aead_aes256gcm_decrypt(payload[28:], None, payload[16:28], key)
    elif recipient_key is not None:
        assert payload[32:40] == nacl.bindings.crypto_scalarmult_base(recipient_key)[:8]
        key = expanded(nacl.bindings.crypto_scalarmult(recipient_key, payload[:32]))
        payload = nacl.bindings.crypto_aead_aes256gcm_decrypt(payload[52:], None, payload[40:52], key)
    image = decompressed(payload, compression)
    assert len(image) == size
    own = (metadata.get("custom") or {}).get("hocket") or {}
    name = own.get("layout") or layout
    kind = name.removeprefix("Quantized<").removesuffix(">")
    reader = Image(image, metadata, quantized=kind != name)
    members = own.get("expert_layout") or expert
    model = mixture(reader, members) if members else LAYOUTS[kind](reader)
    assert reader.position == len(image)
    if getattr(model, "n_features", 0) is None:
        training = getattr(model, "x_train", None)
        model = replace(model, n_features=own.get("n_features") if training is None else training.shape[1])
    return metadata, model


def expanded(secret: bytes) -> bytes:
    """HKDF-SHA256 of one block, as RFC 5869 has it."""
    first = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(first, b"apr-v1-encrypt\x01", hashlib.sha256).digest()


def decompressed(block: bytes, compression: int) -> bytes:
    """Stored, zstd, or an LZ4 block behind its length."""
    if compression == 0:
        return block
    if compression in {1, 2}:
        return zstandard.ZstdDecompressor().decompressobj().decompress(block)
    assert compression == 3
    return unlz4(block[4:], int.from_bytes(block[:4], "little"))


def unlz4(block: bytes, size: int) -> bytes:
    """One LZ4 block, by the book: literals, then a copy of what is `offset` bytes back, and again."""
    out = bytearray()
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        while nibble == 15:
            total += block[at]
            at += 1
            if block[at - 1] < 255:
                break
        return total

    while True:
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at == len(block):
            break
        offset = int.from_bytes(block[at : at + 2], "little")
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-offset])
    assert len(out) == size
    return bytes(out)


def dequantized(quantized: m.Quantized) -> Any:
    """What blocks stand for, one value after the other."""
    values: list[np.float32] = []
    each = 34 if quantized.kind is m.QuantKind.Q8_0 else 18
    for start in range(0, len(quantized.blocks), each):
        block = quantized.blocks[start : start + each]
        scale = np.float32(np.frombuffer(block[:2], "<f2")[0])
        if each == 34:
            values += [np.float32(code - 256 if code > 127 else code) * scale for code in block[2:]]
        else:
            values += [np.float32(nibble - 8) * scale for code in block[2:] for nibble in (code & 15, code >> 4)]
    return np.array(values[: quantized.size], np.float32).reshape(quantized.shape)
