"""What each step of an `.apr` file costs, beside what the same bytes cost without us; `benchmarks.packages` runs it.

A floor is what nobody can avoid, taken in the same run: copying the bytes once (memcpy), the bare library, the hash
that a signature needs, the kernel's map of the file. Where a budget is set (DESIGN, section 8), the row says it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.pwhash import argon2id

from examples.publishing import Publisher
from hocket.packages import apr, open_package
from hocket.packages.apr.encryption import NONCE_BYTES, Password, RecipientKey, seal, unseal
from hocket.packages.apr.header import Compression
from hocket.packages.apr.payload import compress, decompress
from hocket.packages.apr.quantization import dequantize, quantize
from hocket.packages.keys import public_key_of, sign, verify
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.model import KMeans, LinearRegression, QuantKind
from hocket.trust_folder import TrustFolder
from services.expert_worker.mapping import read_or_map
from services.expert_worker.parameters import Blocks, parameter

if TYPE_CHECKING:
    from collections.abc import Callable

_PAYLOAD_VALUES: Final = 2**20
"""4 MiB of float32: the size that the budgets are about."""
_LARGE_VALUES: Final = 25 * 10**6
"""100 MB of float32."""
_LARGE_WIDTH: Final = 500
_PASSWORD: Final = Password("correct horse battery staple")
_KEY: Final = RecipientKey(b"\x09" * 32)
_ARGON2_BYTES: Final = 19456 * 1024
_ARGON2_PASSES: Final = 2


@dataclass(frozen=True, slots=True)
class Work:
    """One row.

    Args:
        what: Is done.
        run: Does it.
        floor: Does what nobody can avoid.
        floor_is: What that is.
        budget_ms: What it may take; None where no budget is set.
    """

    what: str
    run: Callable[[], object]
    floor: Callable[[], object]
    floor_is: str
    budget_ms: float | None = None


def rows(rounds: int) -> list[dict[str, Any]]:
    """Every step, measured: work and floor take turns, the median of each counts."""
    with tempfile.TemporaryDirectory() as folder:
        return [_measured(work, rounds) for work in (*_small(Path(folder)), *_large(Path(folder)))]


def _measured(work: Work, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"run": [], "floor": []}
    for _ in range(rounds + 1):  # the first one warms up
        for side, function in (("run", work.run), ("floor", work.floor)):
            begin = time.perf_counter()
            function()
            times[side].append((time.perf_counter() - begin) * 1e3)
    ours, floor = (statistics.median(times[side][1:]) for side in ("run", "floor"))
    return {
        "what": work.what,
        "ms": ours,
        "budget ms": "" if work.budget_ms is None else f"{work.budget_ms:g}",
        "floor ms": floor,
        "ratio": ours / floor,
        "floor": work.floor_is,
    }


def _small(folder: Path) -> list[Work]:
    """What is done to a payload of 4 MiB."""
    weights = np.random.default_rng(0).standard_normal(_PAYLOAD_VALUES, np.float32)
    image = weights.tobytes()
    copy = partial(bytearray, image)
    packed = compress(image, Compression.ZSTD)
    lz4 = compress(image, Compression.LZ4)
    unpack = partial(decompress, size_bytes=len(image), limits=DEFAULT_LIMITS)
    sealed = memoryview(seal(image, _KEY.recipient))
    tiny = memoryview(seal(b"x", _PASSWORD))
    key, nonce = AESGCM(b"k" * 32), b"n" * NONCE_BYTES
    bare = key.encrypt(nonce, image, None)
    publisher = Publisher.trusted_in(folder, "small")
    trust = TrustFolder(folder / "trust").read()
    plain = apr.write(LinearRegression(weights, 0.5), compression="none")
    release = publisher.release(plain, "linear")
    signature, public_key = sign(publisher.seed, plain), public_key_of(publisher.seed)
    work = [
        Work("compress 4 MiB, zstd 3", partial(compress, image, Compression.ZSTD), _zstd(image), "bare zstd"),
        Work(
            "decompress 4 MiB, zstd",
            partial(unpack, memoryview(packed), Compression.ZSTD),
            partial(zstandard.ZstdDecompressor().decompress, packed, max_output_size=len(image)),
            "bare zstd",
            5,
        ),
        Work("decompress 4 MiB, zstd", partial(unpack, memoryview(packed), Compression.ZSTD), copy, "memcpy", 5),
        Work("decompress 4 MiB, LZ4", partial(unpack, memoryview(lz4), Compression.LZ4), copy, "memcpy"),
        Work("encrypt 4 MiB, recipient", partial(seal, image, _KEY.recipient), copy, "memcpy", 10),
        Work("decrypt 4 MiB, recipient", partial(unseal, sealed, _KEY), copy, "memcpy", 10),
        Work(
            "decrypt 4 MiB, recipient",
            partial(unseal, sealed, _KEY),
            partial(key.decrypt, nonce, bare, None),
            "bare AES-256-GCM",
            10,
        ),
        Work(
            "key from a password (Argon2id)",
            partial(unseal, tiny, _PASSWORD),
            partial(argon2id.kdf, 32, b"p", b"s" * 16, opslimit=_ARGON2_PASSES, memlimit=_ARGON2_BYTES),
            "bare Argon2id",
        ),
        Work(
            "key from a password (Argon2id)",
            partial(unseal, tiny, _PASSWORD),
            partial(_fill, _ARGON2_BYTES, _ARGON2_PASSES),
            "19 MiB filled twice",
        ),
        Work(
            "verify a signature inside, 4 MiB",
            partial(verify, public_key, plain, signature),
            partial(hashlib.sha512, plain),
            "SHA-512, which it contains",
        ),
        Work(
            "open 4 MiB under a release",
            partial(open_package, plain, releases=[release], trust=trust, now=datetime.now(UTC)),
            partial(hashlib.sha256, plain),
            "SHA-256",
        ),
    ]
    for kind in QuantKind:
        blocks = quantize(weights, kind)
        prepared = parameter(blocks)
        assert isinstance(prepared, Blocks)  # noqa: S101 - so are quantised weights
        work += [
            Work(f"dequantise 4 MiB from {kind}, numpy", partial(dequantize, blocks), copy, "memcpy"),
            Work(f"dequantise 4 MiB from {kind}, torch", partial(prepared.on, prepared.raw), copy, "memcpy"),
        ]
    return work


def _large(folder: Path) -> list[Work]:
    """What is done to a file of 100 MB."""
    publisher = Publisher.trusted_in(folder, "large")
    trust = TrustFolder(folder / "trust").read()
    centroids = np.random.default_rng(1).standard_normal((_LARGE_VALUES // _LARGE_WIDTH, _LARGE_WIDTH), np.float32)
    data = apr.write(KMeans(len(centroids), centroids), compression="none")
    path = folder / "large.apr"
    path.write_bytes(data)
    path.chmod(0o400)
    release = publisher.release(data, "clusters")

    def page_map() -> None:
        file = os.open(path, os.O_RDONLY)
        mmap.mmap(file, 0, access=mmap.ACCESS_READ).close()
        os.close(file)

    def opened(read: Callable[[], bytes | memoryview | None]) -> None:
        found = read()
        assert found is not None  # noqa: S101 - it is not too large
        open_package(found, releases=[release], trust=trust, now=datetime.now(UTC))

    mapped = partial(read_or_map, path, DEFAULT_LIMITS.package_bytes)
    size = f"{len(data) / 1e6:.0f} MB"
    return [
        Work(f"map {size}", mapped, page_map, "page map", 1),
        Work(f"map {size}", mapped, path.read_bytes, "read instead of mapped", 1),
        Work(f"open {size}, mapped", partial(opened, mapped), partial(hashlib.sha256, data), "SHA-256"),
        Work(f"open {size}, read", partial(opened, path.read_bytes), partial(hashlib.sha256, data), "SHA-256"),
    ]


def _zstd(image: bytes) -> Callable[[], bytes]:
    return lambda: zstandard.ZstdCompressor(level=3).compress(image)


def _fill(size_bytes: int, times: int) -> None:
    memory = np.empty(size_bytes, np.uint8)
    for number in range(times):
        memory.fill(number)
