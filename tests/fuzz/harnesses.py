"""What is fuzzed: readers of bytes from strangers, and the bytes to start from.

A harness takes any bytes and may raise `HocketError`. First it makes of them what the reader expects: it undoes what
hides a reader behind a checksum, because whoever attacks it can compute one as well, and packs what lies in an archive.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError
from hocket.packages import apr, expert
from hocket.packages.expert.archive import is_expert, read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.weights import read_tensors
from hocket.packages.limits import DEFAULT_LIMITS
from tests import archives, builders, experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

BYTES_MAX: Final = 2**16
"""The longest input."""

_ATTACK_BYTES_MAX: Final = 2**13
_FILE: Final = b"\n%%file "
_FILES_MAX: Final = 300
_REPEATED_BYTES_MAX: Final = DEFAULT_LIMITS.archive_ratio_free_bytes
_NOT_HASHED: Final = f"sha256:{'0' * 64}"


@dataclass(frozen=True, slots=True)
class Harness:
    """One reader, where to begin, and what to do with any bytes before they are read; only reading is judged."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    prepare: Callable[[bytes], bytes] = bytes


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
    """An `.apr` file."""
    apr.decode(apr.split(data), _NOT_HASHED)


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
    for made in (builders.linear(), builders.mixture()):
        for compression in ("none", "zstd"):
            yield builders.apr_bytes(made, compression=compression)
    yield builders.apr_bytes(signing=builders.signer())


def _with_checksums(tar: bytes) -> bytes:
    """A tar whose header blocks have the checksums they should have."""
    blocks = [tar[start : start + 512] for start in range(0, len(tar), 512)]
    return b"".join(archives.checked(block) if block[257:262] == b"ustar" else block for block in blocks)


HARNESSES: Final[Mapping[str, Harness]] = {
    "archive": Harness(read_archive, _archives, packed),
    "manifest": Harness(manifest, _manifests),
    "weights": Harness(read_tensors, _weights),
    "adapter": Harness(adapter, _adapters, package),
    "apr": Harness(model, _models, _sealed),
}
