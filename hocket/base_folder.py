"""The identity of a base language model: what of its folder decides what it computes, in one digest.

The digest is the SHA-256 of the canonical JSON (RFC 8785) of `{file name: SHA-256 of its content in hex}`, over the
files at the folder's root that shape the model or its text: configuration, safetensors weights, tokenizer, chat
template. README, pickled weights and whatever else lies there do not count.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import rfc8785

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_COUNTED: Final = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_HUB: Final = "models--"
_WEIGHTS: Final = "*.safetensors"
_CHUNK_BYTES: Final = 2**20


def base_name(folder: Path) -> str:
    """What a base is called: its folder, or the hub's id for it where the folder is in the hub's cache."""
    path = folder.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith(_HUB):
        return path.parent.parent.name.removeprefix(_HUB).replace("--", "/")
    return path.name


def base_digest(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> str:
    """The digest of a base's folder, `sha256:<hex>`; arguments and errors as of `file_hashes`."""
    return digest_of_hashes(file_hashes(folder, on_progress))


def digest_of_hashes(hashes: Mapping[str, str]) -> str:
    """The digest of a base's folder, `sha256:<hex>`, whose files have these hashes."""
    return digest_of(rfc8785.dumps(dict(hashes)))


def file_hashes(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """SHA-256 in hex of each file of a base's folder that counts, by name.

    Args:
        folder: A Hugging Face model directory.
        on_progress: Told the bytes hashed so far, and all of them.

    Raises:
        HocketError: `BAD_REQUEST` if it cannot be read, or is no model: without `config.json` or safetensors weights.
    """
    try:
        counted = sorted(path for path in folder.iterdir() if any(fnmatchcase(path.name, each) for each in _COUNTED))
        for path in counted:
            if (path.is_symlink() and not path.exists()) or not path.name.isascii():
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"{path.name!a} in {folder} leads nowhere, or has a name no model has: is the download complete?",
                )
        files = [path for path in counted if path.is_file()]
        names = [path.name for path in files]
        if "config.json" not in names or not any(fnmatchcase(name, _WEIGHTS) for name in names):
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{folder} is no base model: a Hugging Face folder has a config.json and *.safetensors weights",
            )
        total = sum(path.stat().st_size for path in files)
        done = 0
        hashes: dict[str, str] = {}
        for path in files:
            file_hash = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    file_hash.update(chunk)
                    done += len(chunk)
                    if on_progress is not None:
                        on_progress(done, total)
            hashes[path.name] = file_hash.hexdigest()
    except OSError as error:
        raise HocketError(
            Reason.BAD_REQUEST, f"cannot read {error.filename or folder} of a base: {error.strerror}"
        ) from error
    return hashes
