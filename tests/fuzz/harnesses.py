"""What is fuzzed: readers of bytes from strangers, and the bytes to start from.

A harness takes any bytes and may raise `HocketError`. First it makes of them what the reader expects: it undoes what
hides a reader behind a checksum, because whoever attacks it can compute one as well, and packs what lies in an archive.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.errors import HocketError
from hocket.packages import apr, expert
from hocket.packages.apr import about
from hocket.packages.apr.encryption import Recipient
from hocket.packages.apr.header import MODEL_TYPES, Compression, Flag
from hocket.packages.apr.layouts import layout_of
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.apr.payload import compress
from hocket.packages.apr.quantization import BLOCK_BYTES, block_count, dequantized_model, quantized_model
from hocket.packages.expert.archive import is_expert, read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.weights import read_tensors
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import (
    DecisionTreeClassifier,
    GaussianNB,
    KMeans,
    KNearestNeighbors,
    LinearRegression,
    Quantized,
    QuantKind,
    RandomForestClassifier,
    RandomForestRegressor,
    SoftmaxGate,
    Tree,
)
from tests import archives, builders, experts
from tests.signing import NOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hocket.packages.model import Model

BYTES_MAX: Final = 2**16
"""The longest input."""

_ATTACK_BYTES_MAX: Final = 2**13
_FILE: Final = b"\n%%file "
_FILES_MAX: Final = 300
_REPEATED_BYTES_MAX: Final = DEFAULT_LIMITS.archive_ratio_free_bytes
_NOT_HASHED: Final = f"sha256:{'0' * 64}"

_SEALED_BYTES: Final = 64

_QUANTIZED_KMEANS: Final = "Quantized<KMeans>"

_SHARE: Final = 64
APR_LIMITS: Final[Limits] = replace(
    DEFAULT_LIMITS,
    package_bytes=DEFAULT_LIMITS.package_bytes // _SHARE,
    metadata_bytes=DEFAULT_LIMITS.metadata_bytes // _SHARE,
    metadata_values=DEFAULT_LIMITS.metadata_values // _SHARE,
    uncompressed_bytes=DEFAULT_LIMITS.uncompressed_bytes // _SHARE,
    labels=DEFAULT_LIMITS.labels // _SHARE,
    experts=DEFAULT_LIMITS.experts // _SHARE,
    trees=DEFAULT_LIMITS.trees // _SHARE,
    tree_nodes=DEFAULT_LIMITS.tree_nodes // _SHARE,
)
"""An `.apr` file of 64 KiB can hold a bomb of the largest payload: so the same bounds, smaller, to be fast."""
APR_SECONDS_MAX: Final = 1.0
APR_BYTES_MAX: Final = 2 * (APR_LIMITS.uncompressed_bytes + APR_LIMITS.metadata_bytes) + 128 * APR_LIMITS.tree_nodes
"""Twice what may be in a file: its bytes, and what is made of them; and a tree's node takes more than its bytes."""


@dataclass(frozen=True, slots=True)
class Harness:
    """One reader, where to begin, and what to do with any bytes before they are read; only reading is judged.

    Args:
        read: The reader.
        seeds: Where to begin.
        prepare: Makes of any bytes what the reader is given.
        seconds_max: Processor time that reading may take.
        memory_bytes_max: Memory that it may take.
    """

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    prepare: Callable[[bytes], bytes] = bytes
    seconds_max: float = archives.REFUSAL_SECONDS_MAX
    memory_bytes_max: int = archives.REFUSAL_BYTES_MAX


def packed(data: bytes) -> bytes:
    """An archive, or else a gzip-tar of what shall be inside."""
    return data if is_expert(data) else archives.gzipped(_with_checksums(data), 1)


def manifest(data: bytes) -> None:
    """A manifest, read leniently and as upstream reads it."""
    with contextlib.suppress(HocketError):
        parse_manifest(data, upstream=True)
    parse_manifest(data)


def package(data: bytes) -> bytes:
    """A package of any files; each is written as a line `%%file NAME` or `%%file NAME<tab>TIMES`, and its content.

    The last byte of the content is there so many times more: what compresses to nothing is as large as it may be.
    """
    entries = []
    left_bytes = _REPEATED_BYTES_MAX
    for part in (b"\n" + data).split(_FILE)[1 : _FILES_MAX + 1]:
        line, _, content = part.partition(b"\n")
        name, _, times = line.partition(b"\t")
        more_bytes = min(int(times[:8]), left_bytes) if times[:8].isdigit() and content else 0
        left_bytes -= more_bytes
        whole = content + content[-1:] * more_bytes
        entries.append(archives.ZipEntry(name[:300], whole, method=0, flags=1 << 11))
    return archives.zip_of(*entries)


def adapter(data: bytes) -> None:
    """A package."""
    expert.decode(data, _NOT_HASHED)


def model(data: bytes) -> None:
    """An `.apr` file, and what its quantised blocks stand for."""
    _, read = apr.decode(apr.split(data, APR_LIMITS), _NOT_HASHED, APR_LIMITS)
    dequantized_model(read)


def header(data: bytes) -> None:
    """An `.apr` file taken apart."""
    container = apr.split(data, APR_LIMITS)
    assert sum(section.size for section in container.sections) == len(data)


def metadata(data: bytes) -> None:
    """Metadata: read, understood, written so that it reads the same again, and believed of an encrypted file."""
    found = read_metadata(data, APR_LIMITS)
    licence = about.licence(found)
    for part in (licence, about.distillation(found), about.model_card(found)):
        assert part is None or isinstance(part.section(), dict)
    if licence is not None:
        assert licence.expired(NOW) in {True, False, None}
    again = read_metadata(write_metadata(found))
    assert list(again) == list(found)
    assert read_metadata(write_metadata(again)) == again, "32-bit floats are rounded once"
    sealed = builders.raw_apr(bytes(_SEALED_BYTES), data, flags=Flag.ENCRYPTED)
    apr.describe(apr.split(sealed, APR_LIMITS), _NOT_HASHED, APR_LIMITS)


def payload(data: bytes) -> bytes:
    """An `.apr` file with any payload, stored in any way under any type id; the first six bytes say which.

    type id, compression id, u32 uncompressed size (of a stored payload it is always right)
    """
    types = sorted(MODEL_TYPES)
    return _file(data, types[_first(data) % len(types)], builders.METADATA)


def quantized(data: bytes) -> bytes:
    """An `.apr` file with any payload, stored in any way, under any quantised layout; the first six bytes say which.

    layout, compression id, u32 uncompressed size (of a stored payload it is always right)
    """
    layouts = _quantized_layouts()
    layout, expert_layout = layouts[_first(data) % len(layouts)]
    own = {"layout": layout} | ({"expert_layout": expert_layout} if expert_layout else {})
    return _file(data, 1, {**builders.METADATA, "custom": {"hocket": own}})


_CHOICE: Final = struct.Struct("<BBI")
_COMPRESSIONS: Final = ("none", "zstd", "zstd-max", "lz4")


def _first(data: bytes) -> int:
    return data[0] if data else 0


def _file(data: bytes, model_type_id: int, metadata: Mapping[str, Any]) -> bytes:
    _, compression, size = _CHOICE.unpack(data[: _CHOICE.size].ljust(_CHOICE.size, b"\0"))
    compression %= len(_COMPRESSIONS)
    block = data[_CHOICE.size :]
    return builders.raw_apr(
        block,
        metadata,
        model_type_id=model_type_id,
        compression_id=compression,
        uncompressed_bytes=size if compression else len(block),
    )


def _chosen(choice: int, compression: str, made: Model) -> bytes:
    """What `payload` and `quantized` make such a file of again."""
    part = apr.split(builders.apr_bytes(made, compression=compression))
    return _CHOICE.pack(choice, _COMPRESSIONS.index(compression), part.header.uncompressed_bytes) + part.payload


def _sealed(data: bytes) -> bytes:
    return builders.sealed(data[:-4])


_KINDS: Final = ("lora", "dora", "ia3", "soft_prompt")


def _archives() -> Iterator[bytes]:
    for attack in archives.attacks():  # of the large ones each takes long to read, and their like more than all others
        yield from (seed for seed in (attack.refused(), attack.accepted()) if len(seed) <= _ATTACK_BYTES_MAX)
    for records in (b"", archives.pax(path=b"b", mtime=b"1.5")):
        yield records + archives.member(b"a", b"content") + archives.END
    yield archives.tar_bytes()


def _manifests() -> Iterator[bytes]:
    for kind in _KINDS:
        yield experts.json_bytes(experts.expert_manifest(kind=kind))
    fixtures = os.environ.get("HOCKET_FIXTURES")
    if fixtures is not None:
        yield from (path.read_bytes() for path in sorted(Path(fixtures, "expert").rglob("manifest*.json")))


def _weights() -> Iterator[bytes]:
    for kind in _KINDS:
        yield experts.expert_files(kind=kind)["adapter_model.safetensors"]


def _adapters() -> Iterator[bytes]:
    for kind in _KINDS:
        yield _written(experts.expert_files(kind=kind))
    manifest = {
        "soft_prompts": [{"name": f"p{number}", "path": f"p{number}.safetensors", "tokens": 3} for number in range(2)],
        "decoding": {"use_grammar": True, "grammar_file": "g/grammar.gbnf"},
        "evaluation": {"metrics": {"a": 1, "b": 2, "c": 3}},
    }
    beside = {"g/grammar.gbnf": b'root ::= "a"\n', "tokenizer.json": b"{}"}
    beside |= {f"p{number}.safetensors": experts.soft_prompt() for number in range(2)}
    files = experts.expert_files(manifest=manifest, files=beside)
    yield _written(files)
    signed = experts.signed_upstream(files)
    yield _written(signed)
    yield _written(signed, {"signature.sig": 10**6})
    pickled = {"soft_prompts": [{"name": "p", "path": "p.pt", "tokens": 3}]}
    yield _written(experts.expert_files(manifest=pickled, files={"p.pt": b"\x80\4."}))
    for kind, config in (
        ("lora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 8}}),
        ("lora", {"target_modules": ".*_proj", "use_rslora": True, "bias": "all"}),
        ("lora", {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}),
        ("ia3", {"rank_pattern": 0, "alpha_pattern": 0, "exclude_modules": 0}),
        ("soft_prompt", {"num_transformer_submodules": 2}),
    ):
        yield _written(experts.expert_files(kind=kind, config=config))
    for kind in _KINDS:
        yield _written(experts.expert_files(kind=kind, files={"adapter_config.json": None}))
    vector = {"prompt_embeddings": np.zeros(2, np.float32)}
    yield _written(experts.expert_files(kind="soft_prompt", tensors=vector))
    yield _written(_flat_prompt(2**19), {"p.safetensors": 2**21 - 1})


def _flat_prompt(hidden: int) -> dict[str, bytes]:
    """An expert with a soft prompt of one row, whose last byte is to be repeated."""
    header = b'{"prompt_embeddings":{"dtype":"F32","shape":[1,%d],"data_offsets":[0,%d]}}' % (hidden, 4 * hidden)
    return experts.expert_files(
        manifest={"soft_prompts": [{"name": "p", "path": "p.safetensors", "tokens": 1}]},
        files={"p.safetensors": len(header).to_bytes(8, "little") + header + b"\0"},
    )


def _written(files: Mapping[str, bytes], times: Mapping[str, int] | None = None) -> bytes:
    """Files as `package` reads them, the last byte of some repeated."""
    repeated = times or {}
    lines = {name: b"%s\t%d" % (name.encode(), repeated[name]) if name in repeated else name.encode() for name in files}
    return b"".join(_FILE + lines[name] + b"\n" + content for name, content in files.items())


def _models() -> Iterator[bytes]:
    for made in builders.models().values():
        for compression in ("none", "zstd", "lz4"):
            yield builders.apr_bytes(made, compression=compression)
    for made in _quantized_models():
        yield builders.apr_bytes(made)
    yield builders.apr_bytes(signing=builders.signer())


def _headers() -> Iterator[bytes]:
    for flags in range(8):
        yield builders.raw_apr(b"", b"", flags=flags, after_payload=bytes(96))
    for neighbour in (
        b"APR1",
        b"APR2",
        b"APR\0\2\0",
        b"APR\0\1\0\0\0\0PST",
        b"APBUNDLE",
        b"GGUF",
        b"\x40" + bytes(7) + b"{",
    ):
        yield neighbour.ljust(64, b"\0")
    yield from _models()


def _metadata() -> Iterator[bytes]:
    yield write_metadata(builders.METADATA)
    yield write_metadata({**builders.METADATA, "custom": {"a": [{}, [], None, True, -1, 2**40, 0.5, "x" * 300]}})
    for part in ("license", "distillation_info", "model_card"):
        yield write_metadata({**builders.METADATA, part: builders.ABOUT[part]})
    yield write_metadata(builders.ABOUT)
    for expiry in ("9999-12-31", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "soon"):
        licence = {**builders.ABOUT["license"], "expiry": expiry}
        yield write_metadata({**builders.METADATA, "license": licence})
    for made in builders.models().values():
        declared = builders.apr_bytes(made, encryption=Recipient(b"\x09" * 32))
        yield bytes(apr.split(declared).metadata)


def _payloads() -> Iterator[bytes]:
    types = sorted(MODEL_TYPES)
    for made in builders.models().values():
        for compression in _COMPRESSIONS:
            yield _chosen(types.index(layout_of(made)[0]), compression, made)
    for made in _largest():
        yield _unchecked(made)
    yield _unchecked(_neighbors(), "lz4")
    yield _unchecked(_neighbors())


def _unchecked(made: Model, compression: str = "zstd") -> bytes:
    """As `_chosen`, of models that no writer writes: too many features, parts that do not fit together."""
    type_id, layout = layout_of(made)
    image = bytearray()
    layout.codec.write(image, made)
    compression_id = _COMPRESSIONS.index(compression)
    choice = _CHOICE.pack(sorted(MODEL_TYPES).index(type_id), compression_id, len(image))
    return choice + compress(bytes(image), Compression(compression_id))


_ROOM_BYTES: Final = APR_LIMITS.uncompressed_bytes - 2**14


def _largest() -> Iterator[Model]:
    """Models that take all the room there is, and next to none when they are compressed.

    Each array of each layout does so alone: the others are absent where they can be.
    """
    for made in _with_every_array():
        arrays = [field.name for field in fields(made) if isinstance(getattr(made, field.name), np.ndarray)]
        for name in arrays:
            alone: dict[str, Any] = dict.fromkeys(arrays) | {name: _filled(getattr(made, name))}
            yield replace(made, **alone)
    samples = _filled(np.zeros((3, 2), np.float32))
    yield RandomForestClassifier((), 0, x_train=samples)
    yield RandomForestClassifier((), 0, oob_indices=(_filled(np.zeros(1, np.uint64)),))
    mixture = builders.mixture()
    yield replace(mixture, experts=(LinearRegression(_filled(np.zeros(1, np.float32)), 0.0),))
    yield replace(mixture, gate=SoftmaxGate(_filled(np.zeros((2, 2), np.float32))))
    half = np.zeros((16, _ROOM_BYTES // 128), np.float32)
    yield GaussianNB(np.ones(16, np.float32), half, np.ones_like(half), np.arange(16, dtype=np.uint64))
    stump = DecisionTreeClassifier(builders.grow((0, 0.5, (0, 3), (1, 2))))
    stumps = (stump,) * APR_LIMITS.trees
    yield RandomForestClassifier(stumps, 1, x_train=samples[:, : -APR_LIMITS.trees * 10])
    full = DecisionTreeClassifier(_full_tree(APR_LIMITS.tree_nodes.bit_length() - 2))
    yield full
    beside = samples[:, : -APR_LIMITS.tree_nodes * 2]
    yield RandomForestClassifier((full,), 1, x_train=beside)
    yield RandomForestClassifier((full, DecisionTreeClassifier(None)), 1, x_train=beside)


def _with_every_array() -> Iterator[Any]:
    """A model of every layout that the type id alone may stand for, no array of its own absent."""
    yield from builders.models().values()
    samples = np.zeros((3, 2), np.float32)
    yield RandomForestRegressor((), 0, x_train=samples, y_train=samples[:, 0])


def _filled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Zeros of as many dimensions and rows, and as many columns as there is room for."""
    rows = array.shape[:-1]
    return np.zeros((*rows, _ROOM_BYTES // array.itemsize // math.prod(rows)), array.dtype)


def _neighbors() -> KNearestNeighbors:
    return KNearestNeighbors(1, _filled(np.zeros((16, 1), np.float32)), np.zeros(16, np.uint64))


def _full_tree(depth: int) -> Tree:
    """Every leaf as far from the root as any other."""
    nodes = np.full(1, -1)
    for level in range(depth):  # right children, -1 in a leaf
        below = np.where(nodes < 0, -1, nodes + 1)
        nodes = np.concatenate(([2 ** (level + 1)], below, np.where(nodes < 0, -1, below + nodes.size)))
    split = nodes >= 0
    left = np.where(split, np.arange(nodes.size) + 1, -1)
    zeros = np.zeros_like(nodes)
    return Tree(np.where(split, 0, -1), zeros.astype(np.float32), left, nodes, zeros, zeros)


def _quantized() -> Iterator[bytes]:
    for made in _quantized_models():
        layout = layout_of(made)[1]
        for compression in _COMPRESSIONS:
            yield _chosen(_quantized_layouts().index((layout.name, layout.expert)), compression, made)
    shape = (2, APR_LIMITS.features)
    largest = Quantized(QuantKind.Q4_0, shape, bytes(BLOCK_BYTES[QuantKind.Q4_0] * block_count(shape)))
    yield _chosen(_quantized_layouts().index((_QUANTIZED_KMEANS, None)), "zstd", KMeans(2, largest))


def _quantized_models() -> Iterator[Model]:
    for kind in QuantKind:
        for made in builders.models().values():
            with contextlib.suppress(HocketError):  # not every family can be
                yield quantized_model(made, kind)


@cache
def _quantized_layouts() -> tuple[tuple[str, str | None], ...]:
    """Every quantised layout that can be recorded, and of what a mixture is."""
    layouts = (layout_of(made)[1] for made in _quantized_models())
    return tuple({(layout.name, layout.expert): None for layout in layouts})


def _with_checksums(tar: bytes) -> bytes:
    """A tar whose header blocks have the checksums they should have."""
    blocks = [tar[start : start + 512] for start in range(0, len(tar), 512)]
    return b"".join(archives.checked(block) if block[257:262] == b"ustar" else block for block in blocks)


def _apr(
    read: Callable[[bytes], object],
    seeds: Callable[[], Iterable[bytes]],
    prepare: Callable[[bytes], bytes] = bytes,
) -> Harness:
    return Harness(read, seeds, prepare, APR_SECONDS_MAX, APR_BYTES_MAX)


HARNESSES: Final[Mapping[str, Harness]] = {
    "archive": Harness(read_archive, _archives, packed),
    "manifest": Harness(manifest, _manifests),
    "weights": Harness(read_tensors, _weights),
    "adapter": Harness(adapter, _adapters, package),
    "apr": _apr(model, _models, _sealed),
    "header": _apr(header, _headers, _sealed),
    "metadata": _apr(metadata, _metadata),
    "payload": _apr(model, _payloads, payload),
    "quantized": _apr(model, _quantized, quantized),
}

CORPUS: Final = Path(__file__).with_name("corpus")
"""In a folder for each harness, inputs that earlier runs made of its seeds.

Each takes a turn in the code, or is refused in words, as no seed is.
"""


def inputs(name: str) -> Iterator[bytes]:
    """Where fuzzing begins: a harness's seeds and what is kept of earlier runs."""
    yield from HARNESSES[name].seeds()
    yield from (path.read_bytes() for path in sorted(CORPUS.joinpath(name).glob("*")))
