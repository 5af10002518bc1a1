"""Packages written: from the files of a training output to the bytes of an `.expert` archive.

The same files give the same bytes: `manifest.json` first and the others by name, no times, owners or modes, one
compression level. (Byte for byte this holds for one version of the compression library; the contents are the same
with any.) What a manifest says that we do not know is kept, in its place.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import zstandard

from hocket.bases import normalised_name
from hocket.errors import HocketError, Reason
from hocket.identity import check_name, check_version
from hocket.packages.adapter import AdapterKind
from hocket.packages.expert.archive import safe_name
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.names import CONFIG, GRAMMAR, MANIFEST, WEIGHTS
from hocket.packages.expert.reader import no_weights
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from hocket.bases import BaseModel
    from hocket.packages.adapter import AdapterConfig
    from hocket.packages.expert.manifest import Manifest
    from hocket.packages.limits import Limits

    Find = Callable[[str], bytes | None]
    """The content of a file of a training output, by its name there; None if there is none."""
    Progress = Callable[[int, int], None]
    """Told the bytes packed so far, and all of them."""

EXTRAS: Final = (
    CONFIG,
    GRAMMAR,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "calibration.json",
    "README.md",
    "LICENSE*",
    "license*",
    "NOTICE*",
)
"""Files that are packed when they are there, beside those that the manifest names. The rest of a training output
(optimizer states, checkpoints, pickled arguments) stays out of the package."""

_ALPHA_END: Final = 2**32
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_GZIP_FORMAT: Final = 31
"""zlib's `wbits` for the largest window inside a gzip header without name and time."""
_CHUNK_BYTES: Final = 2**18


def draft_manifest(
    config: AdapterConfig, base: BaseModel, *, name: str, version: str, capabilities: Sequence[str] = ()
) -> dict[str, Any]:
    """A manifest for an adapter that has none yet, to be edited. It says nothing that is not known.

    Args:
        config: Of the adapter.
        base: What it rides on.
        name: Of the expert.
        version: Of the expert.
        capabilities: Tags such as `task:text2sql`.

    Raises:
        HocketError: `BAD_REQUEST` for a name or version that no release can have.
    """
    check_name(name)
    check_version(version)
    adapter: dict[str, Any] = {"type": str(config.kind), "target_modules": _last_parts(config.target_modules)}
    if config.kind in {AdapterKind.LORA, AdapterKind.DORA}:
        scaling = "rsqrt" if config.use_rslora else "default"
        adapter |= {"r": config.rank, "scaling": scaling, "use_dora": config.kind is AdapterKind.DORA}
        if float(config.alpha).is_integer() and 1 <= config.alpha < _ALPHA_END:  # manifests know no others
            adapter["alpha"] = int(config.alpha)
    if config.kind is AdapterKind.IA3:
        adapter["feedforward_modules"] = _last_parts(config.feedforward_modules)
    return {
        "name": name,
        "version": version,
        "schema_version": "2.0",
        "description": f"A {config.kind} adapter for {base.name}",
        "base_models": [
            {
                "name": base.name,
                "hocket_base": base.digest,
                "sha256": base.weights_sha256 or "",
                "prompt_template": base.prompt_template,
                "adapters": [adapter],
            }
        ],
        "soft_prompts": [],
        "capabilities": list(capabilities),
        "routing": None,
        "constraints": {"load_order": 10, "incompatible_with": [], "requires": []},
        "license": None,
        "integrity": None,
    }


def gather(
    manifest: bytes,
    find: Find,
    present: Collection[str],
    *,
    base: BaseModel | None = None,
    tests: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, bytes]:
    """The files of a package, out of those of a training output.

    A manifest that names several bases is reduced to the one that is packed. The adapter's `size_bytes` and `sha256`
    are filled in, and an upstream signature that was made before is dropped: it cannot cover what is packed now.

    Args:
        manifest: `manifest.json`.
        find: Where the other files are.
        present: Names of those that lie at the root.
        base: The base that is packed for, by its name, of which the last part counts. Its digest, if it has one, is
            written into the manifest. None for the only one.
        tests: Names of test files to pack as well.
        limits: Bounds on the manifest.

    Returns:
        Contents by name, `manifest.json` first.

    Raises:
        HocketError: The refusals of `parse_manifest`; `BAD_REQUEST` if the base is not told or not named there;
            `BAD_PACKAGE` for weights, or a file that the manifest names, that are not there.
    """
    parsed = parse_manifest(manifest, limits=limits)
    document = dict(parsed.document)
    place = _chosen_base(parsed, base)
    if len(parsed.bases[place].adapters) > 1:
        raise HocketError(Reason.BAD_MANIFEST, "a package holds one adapter: make a package of each")
    [adapter] = parsed.bases[place].adapters
    files: dict[str, bytes] = {}

    candidates = (*([adapter.path] if adapter.path else []), *WEIGHTS)
    weights = next(((name, content) for name in candidates if (content := find(name)) is not None), None)
    if weights is None:
        raise no_weights(present)
    files[weights[0]] = weights[1]
    for prompt in parsed.soft_prompts:
        files[prompt.path] = _needed(find, prompt.path)
    if parsed.grammar_file is not None:
        files[parsed.grammar_file] = _needed(find, parsed.grammar_file)
    for name in sorted(present):
        if any(fnmatchcase(name, pattern) for pattern in EXTRAS) and (content := find(name)) is not None:
            files[name] = content
    for name in tests:
        files[safe_name(name, limits)] = _needed(find, name)

    _fill_in(document, place, weights[1], None if base is None else base.digest)
    return {MANIFEST: pretty(document), **files}


def write_archive(
    files: Mapping[str, bytes],
    *,
    compression: str = "gzip",
    on_progress: Progress | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> bytes:
    """An archive of these files. The same files give the same bytes.

    Args:
        files: Contents by name.
        compression: `gzip`, which every reader of the format knows, or `zstd`, which is faster.
        on_progress: Told how far it is.
        limits: Bounds on names.

    Raises:
        HocketError: `BAD_FILE_NAME`, or `BAD_REQUEST` for another compression.
    """
    if compression not in {"gzip", "zstd"}:
        raise HocketError(Reason.BAD_REQUEST, f"packages are written as gzip or zstd, not {compression[:80]!r}")
    total = sum(map(len, files.values()))
    compressor: Any = (
        zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_FORMAT)
        if compression == "gzip"
        else zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    )
    parts: list[bytes] = []
    done = 0
    for name in sorted(files, key=lambda name: (name != MANIFEST, name)):
        for chunk in _tar_entry(safe_name(name, limits), files[name]):
            parts.append(compressor.compress(chunk))
            done = min(done + len(chunk), total)
            if on_progress is not None:
                on_progress(done, total)
    parts.append(compressor.compress(bytes(2 * tarfile.BLOCKSIZE)))
    parts.append(compressor.flush())
    return b"".join(parts)


def _tar_entry(name: str, content: bytes) -> Iterator[bytes | memoryview]:
    """Header, content, padding."""
    entry = tarfile.TarInfo(name)  # mode 0644, time 0, nobody's
    entry.size = len(content)
    yield entry.tobuf(tarfile.GNU_FORMAT)
    view = memoryview(content)
    for start in range(0, len(view), _CHUNK_BYTES):
        yield view[start : start + _CHUNK_BYTES]
    yield bytes(-len(content) % tarfile.BLOCKSIZE)


def _chosen_base(manifest: Manifest, base: BaseModel | None) -> int:
    """The place of the base that is packed for."""
    names = [entry.base.name for entry in manifest.bases]
    if base is None:
        if len(names) == 1:
            return 0
        raise HocketError(
            Reason.BAD_REQUEST, f"the manifest names several bases: choose one (--base) of {', '.join(names)}"
        )
    found = [place for place, name in enumerate(names) if name == base.name]
    found = found or [place for place, name in enumerate(names) if normalised_name(name) == normalised_name(base.name)]
    if len(found) != 1:
        known = "" if base.digest is None else f"; if that is the same model, write its hocket_base, {base.digest}"
        raise HocketError(
            Reason.BAD_REQUEST, f"the manifest is for {', '.join(names)} and not for {base.name[:80]!r}{known}"
        )
    return found[0]


def _fill_in(document: dict[str, Any], place: int, weights: bytes, base_digest: str | None) -> None:
    """One base, the adapter's size and hash, and no signature of anything else. Changes the document."""
    stated = {"size_bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    based = {} if base_digest is None else {"hocket_base": base_digest}
    if document.get("base_models"):
        entry = document["base_models"][place]
        document["base_models"] = [{**entry, **based, "adapters": [{**entry["adapters"][0], **stated}]}]
        document.pop("adapters", None)  # of schema 1.0, where it has no meaning
    else:
        document["base_model"] = {**document["base_model"], **based}
        document["adapters"] = [{**document["adapters"][0], **stated}]
    if document.get("integrity") is not None:
        document["integrity"] = None


def _last_parts(modules: Sequence[str]) -> list[str]:
    """Names of modules without the paths to them, each once, as manifests list them."""
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _needed(find: Find, name: str) -> bytes:
    content = find(name)
    if content is None:
        raise _missing(name)
    return content


def _missing(name: str) -> HocketError:
    return HocketError(Reason.BAD_PACKAGE, f"{name} is not there: put it beside the manifest, or give its folder")


def pretty(document: Mapping[str, Any]) -> bytes:
    """As upstream's tools write manifests: two spaces, text as it is, no newline at the end."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()
