"""An adapter of 50 MB packed, signed, opened and installed, each beside what its hashing and compression alone take."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zstandard
from safetensors.numpy import save

from benchmarks import apr_parts
from benchmarks.report import command_line, record
from examples.publishing import Publisher
from examples.running import run, suite
from hocket.bases import BaseModel
from hocket.client import connect_registry
from hocket.identity import digest_of
from hocket.packages import open_package
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.expert.writer import draft_manifest, gather, pretty, write_archive
from hocket.trust_folder import TrustFolder

if TYPE_CHECKING:
    from collections.abc import Callable

NAME: Final = "expert-bench"
_RANK: Final = 20
_LAYERS: Final = 28
_HIDDEN: Final = 1024
_MODULES: Final = {  # of Qwen3-0.6B: inputs, outputs
    "self_attn.q_proj": (_HIDDEN, 2048),
    "self_attn.k_proj": (_HIDDEN, 1024),
    "self_attn.v_proj": (_HIDDEN, 1024),
    "self_attn.o_proj": (2048, _HIDDEN),
    "mlp.gate_proj": (_HIDDEN, 3072),
    "mlp.up_proj": (_HIDDEN, 3072),
    "mlp.down_proj": (3072, _HIDDEN),
}
_CONFIG: Final = (
    '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "Qwen3-0.6B", "r": 20, '
    '"lora_alpha": 40, "bias": "none", "target_modules": '
    '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}'
)


@dataclass(frozen=True, slots=True)
class _Side:
    """A compression alone."""

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


_SIDES: Final = {
    "gzip": _Side("zlib level 6", partial(zlib.compress, level=6), partial(zlib.decompress, wbits=31)),
    "zstd": _Side(
        "zstd level 3",
        lambda data: zstandard.ZstdCompressor(level=3).compress(data),
        lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    ),
}


def files() -> dict[str, bytes]:
    """A LoRA of rank 20 for every projection of Qwen3-0.6B, float32, random: 50 MB that hardly compress."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(_LAYERS):
        for module, (inputs, outputs) in _MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((_RANK, inputs), np.float32)
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((outputs, _RANK), np.float32)
    found = {"adapter_model.safetensors": save(tensors), "adapter_config.json": _CONFIG.encode()}
    config = AdapterConfig(
        AdapterKind.LORA, rank=_RANK, alpha=2 * _RANK, target_modules=tuple(m.partition(".")[2] for m in _MODULES)
    )
    manifest = draft_manifest(config, BaseModel("Qwen3-0.6B"), name=NAME, version="1.0.0")
    return gather(pretty(manifest), found.get, found)


def _median(function: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _store(data: bytes, folder: Path) -> None:
    """Bytes on the disk to stay: what any registry must do."""
    path = folder / "floor"
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


async def main() -> None:
    """Measure; `--no-save` only prints."""
    arguments = command_line(__doc__, rounds=5).parse_args()
    apr_notes = {"payload": "4 MiB of random float32, which hardly compress", "budgets": "DESIGN, section 8"}
    record("packages-apr", apr_parts.rows(4 * arguments.rounds), apr_notes, save=not arguments.no_save)
    content = files()
    joined = b"".join(content.values())
    rows: list[dict[str, Any]] = []

    def row(what: str, seconds: float, floor: float, floor_is: str) -> None:
        rate = len(joined) / seconds / 1e6
        rows.append(
            {
                "what": what,
                "ms": seconds * 1e3,
                "MB/s": rate,
                "floor ms": floor * 1e3,
                "ratio": seconds / floor,
                "floor": floor_is,
            }
        )

    packed: dict[str, bytes] = {}
    hash_seconds: dict[str, float] = {}
    unpack_seconds: dict[str, float] = {}
    for compression, side in _SIDES.items():
        rounds = 1 if compression == "gzip" else arguments.rounds  # takes seconds, and hardly varies
        pack = partial(write_archive, content, compression=compression)
        row(f"pack {compression}", _median(pack, rounds), _median(partial(side.compress, joined), rounds), side.name)
        packed[compression] = data = pack()
        hash_seconds[compression] = _median(partial(hashlib.sha256, data), arguments.rounds)
        unpack_seconds[compression] = _median(partial(side.decompress, data), arguments.rounds)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publisher = Publisher.trusted_in(folder, "bench")
        trust = TrustFolder(folder / "trust").read()
        for compression, data in packed.items():
            sign = partial(publisher.release, data, NAME, package_format="expert")
            row(
                f"sign {compression}", _median(sign, arguments.rounds), hash_seconds[compression], "SHA-256 of the file"
            )
            check = partial(open_package, data, releases=[sign()], trust=trust, now=datetime.now(UTC))
            floor = hash_seconds[compression] + unpack_seconds[compression]
            row(f"verify, open {compression}", _median(check, arguments.rounds), floor, "SHA-256, then decompression")
        async with suite(folder) as running, connect_registry(running.registry) as registry:
            for compression, data in packed.items():
                times = []
                for place in range(arguments.rounds):
                    version = f"1.0.{place}+{compression}"
                    again = _as_version(content, version, compression)
                    release = publisher.release(again, NAME, version, "expert")
                    begin = time.perf_counter()
                    await registry.publish(again, release)
                    times.append(time.perf_counter() - begin)
                stored = _median(partial(_store, data, folder), arguments.rounds)
                floor = 2 * hash_seconds[compression] + stored + unpack_seconds[compression]
                row(f"install {compression}", statistics.median(times), floor, "2 SHA-256, fsync, decompression")
    notes = {
        "package": f"{len(joined) / 1e6:.1f} MB unpacked, "
        + ", ".join(f"{len(data) / 1e6:.1f} MB as {compression}" for compression, data in packed.items()),
        "install": "release verified and package read by the registry before it is kept; over one loopback connection",
        "digest": digest_of(packed["gzip"]),
    }
    record("packages", rows, notes, save=not arguments.no_save)


def _as_version(content: dict[str, bytes], version: str, compression: str) -> bytes:
    """The same package as another version, so that the registry takes it in again."""
    manifest = content["manifest.json"].replace(b'"1.0.0"', f'"{version}"'.encode())
    return write_archive({**content, "manifest.json": manifest}, compression=compression)


if __name__ == "__main__":
    run(main())
