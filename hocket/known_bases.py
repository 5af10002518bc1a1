"""The base models that an operator trusts: one folder of `<name>.toml` files, each with a path and a digest.

    name = "qwen3-0.6b"
    path = "/models/Qwen3-0.6B"
    digest = "sha256:<64 hex digits>"

A base carries no signature: who adds its folder decides to trust what lies there at that moment, and a worker compares
the digest before it computes with it. Only `hocket base add` and `hocket base remove` write these files. A file that
does not mean anything certain is left out.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError, safe_open

from hocket.base_folder import base_digest, base_name
from hocket.bases import normalised_name
from hocket.errors import HocketError, Reason
from hocket.files import sync_folder, write_whole
from hocket.identity import check_name, is_digest

if TYPE_CHECKING:
    from collections.abc import Callable

_SUFFIX: Final = ".toml"
_FILE_SIZE_BYTES_MAX: Final = 64 * 1024
_FILE_MODE: Final = 0o644
_CONFIG_BYTES_MAX: Final = 2**20


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base that is trusted.

    Attributes:
        name: What people here call it, spelled as names of packages are.
        path: Where workers find its folder; absolute.
        digest: Of the folder's content, `sha256:<hex>`, as `hocket.base_folder.base_digest` tells it.
    """

    name: str
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class KnownBases:
    """What a folder says.

    Attributes:
        folder: The folder.
        bases: By name.
        problems: Why files were left out, one refusal each.
    """

    folder: Path
    bases: tuple[KnownBase, ...] = ()
    problems: tuple[HocketError, ...] = ()

    def find(self, wanted: str) -> KnownBase | None:
        """The base that is meant.

        Args:
            wanted: Its name, compared as `hocket.bases` compares names, or its whole digest; empty for the only one.

        Returns:
            The base; None if `wanted` is empty and there is none.

        Raises:
            HocketError: `BAD_REQUEST` if `wanted` is empty and there are several, `UNKNOWN_BASE` if it names none.
        """
        names = ", ".join(base.name for base in self.bases)
        if not wanted:
            if len(self.bases) > 1:
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"several bases are known ({names}): say which one, --base NAME or worker.base",
                    field="base",
                )
            return self.bases[0] if self.bases else None
        found = [base for base in self.bases if wanted == base.digest or normalised_name(wanted) == base.name]
        if not found:
            there_are = f"there are {names}" if self.bases else "there is none yet"
            raise HocketError(
                Reason.UNKNOWN_BASE,
                f"no base {wanted[:80]!r} in {self.folder}: {there_are}; `hocket base add PATH` adds one",
                field="base",
            )
        return found[0]


def read(folder: Path) -> KnownBases:
    """What a folder says; without the folder no base is known.

    Files not called `*.toml` and hidden files are ignored. A file that is unreadable, too large, malformed or misnamed
    is left out, and listed in `problems`.
    """
    bases: list[KnownBase] = []
    problems: list[HocketError] = []
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        paths = []
    except OSError as error:
        paths = []
        problems.append(_bad(f"folder {folder} cannot be listed ({error.strerror})"))
    for path in paths:
        if path.suffix == _SUFFIX and not path.name.startswith("."):
            try:
                bases.append(_read_file(path))
            except HocketError as error:
                problems.append(error)
    return KnownBases(folder, tuple(bases), tuple(problems))


def add(
    folder: Path,
    base: Path,
    *,
    name: str | None = None,
    at: Path | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> KnownBase:
    """Trust a base as it is now. All of it is read, to know its digest.

    Args:
        folder: Where known bases are kept; made if need be.
        base: A Hugging Face model directory.
        name: What to call it; None for the name of its folder, or of its model where it lies in the hub's cache.
        at: Where workers find it; None for where it is now. Containers see another path than we do.
        replace: Whether the name may be taken from another base.
        on_progress: Told the bytes hashed so far, and all of them.

    Raises:
        HocketError: `BAD_REQUEST` if the directory is no base, its path cannot be written as text, `at` is relative,
            the name cannot be one, or the folder cannot be written; `NAME_TAKEN` if the name stands for another base.
    """
    if at is not None and not at.is_absolute():
        raise _bad(f"{at} is no absolute path: say where workers find the base, from the root of what they see")
    if not os.path.isdir(base):  # noqa: PTH112 - Path.is_dir raises where a folder above may not be read
        raise _bad(f"{base} is no folder, or may not be read: give a Hugging Face model directory")
    if name is None:
        try:
            name = check_name(normalised_name(base_name(base)), "name of a base")
        except HocketError as error:
            raise error.restated(f"{error.message}: choose another (--name)") from error
    else:
        check_name(name, "name of a base")
    _check_files(base)
    known = KnownBase(name, at or base.resolve(), base_digest(base, on_progress))
    path = folder / f"{name}{_SUFFIX}"
    if not _write(path, known, replace=replace):
        _check_same(path, known)
        _write(path, known, replace=True)
    return known


def remove(folder: Path, name: str) -> KnownBase:
    """Trust a base no longer. Its own folder stays as it is.

    Raises:
        HocketError: `UNKNOWN_BASE` if there is none of that name or digest, `BAD_REQUEST` if none is named, or the file
            cannot be removed.
    """
    known = read(folder).find(name) if name else None
    if known is None:
        raise _bad("say which base, by name or digest")
    try:
        (folder / f"{known.name}{_SUFFIX}").unlink()
        sync_folder(folder)  # a base that was removed must not come back
    except OSError as error:
        raise _bad(f"{known.name} cannot be removed from {folder} ({error.strerror})") from error
    return known


def _check_files(base: Path) -> None:
    """Refuse what no worker could open, before all of it is read: whether one can, only opening it tells.

    Raises:
        HocketError: `BAD_REQUEST` for a damaged configuration or weight file, or a base without its tokenizer.
    """
    try:
        config = json.loads((base / "config.json").read_bytes()[: _CONFIG_BYTES_MAX + 1])
    except FileNotFoundError:
        return  # no base at all, and that is said better
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"config.json in {base} cannot be read: is the download complete? ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _bad(f"config.json in {base} names no model_type: give a model directory of transformers")
    for weights in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(weights, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise _bad(f"{weights.name} in {base} is damaged: is the download complete? ({error})") from error
    if not (base / "tokenizer.json").is_file():
        raise _bad(
            f"{base} has no tokenizer.json: save it there with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _read_file(path: Path) -> KnownBase:
    try:
        if not path.is_file():  # opening a pipe that nobody writes would wait for ever
            raise _bad(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(_FILE_SIZE_BYTES_MAX + 1)
        if len(data) > _FILE_SIZE_BYTES_MAX:
            raise _bad(f"{path} is larger than {_FILE_SIZE_BYTES_MAX} bytes")
        return _parse(data, path)
    except OSError as error:
        raise _bad(f"{path} cannot be read ({error.strerror})") from error


def _parse(data: bytes, path: Path) -> KnownBase:
    """Read a file strictly."""
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{path} is not TOML: {error}") from error
    wanted = {field.name for field in fields(KnownBase)}
    if document.keys() != wanted or not all(isinstance(value, str) for value in document.values()):
        raise _bad(f"{path} must have name, path and digest, each a text, and nothing else")
    base = KnownBase(document["name"], Path(document["path"]), document["digest"])
    if base.name != path.stem:
        raise _bad(f"{path} is named after another base than it describes, {base.name[:80]!r}")
    try:
        check_name(base.name, "name of a base")
    except HocketError as error:
        raise _bad(f"{path}: {error.message}") from error
    if not base.path.is_absolute() or "\0" in document["path"] or not is_digest(base.digest):
        raise _bad(f"{path} needs an absolute path, and a digest (sha256:<64 hex digits>)")
    return base


def _check_same(path: Path, base: KnownBase) -> None:
    """Pass if the file that has a base's name says that it is the same base, wherever that lies."""
    try:
        present = _read_file(path)
    except HocketError as error:
        raise error.restated(f"{error.message}: --replace mends it") from error
    if present.digest != base.digest:
        raise HocketError(
            Reason.NAME_TAKEN,
            f"{base.name} is the base at {present.path} ({present.digest}): choose another name (--name), or put this "
            "one in its place (--replace)",
        )


def _write(path: Path, base: KnownBase, *, replace: bool) -> bool:
    """Write a file at once; whether it was, for without `replace` nothing is done where there is one."""
    texts = asdict(base) | {"path": str(base.path)}
    try:
        data = "".join(f"{key} = {json.dumps(text, ensure_ascii=False)}\n" for key, text in texts.items()).encode()
        _parse(data, path)  # what could not be read is not written
    except (UnicodeEncodeError, HocketError) as error:
        raise _bad(f"{str(base.path)!a} cannot be written as text: give the folder a plainer path") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _bad(f"{path.parent} cannot be written ({error.strerror})") from error
    try:
        write_whole(path, data, replace=replace, mode=_FILE_MODE)
    except FileExistsError:
        return False
    except OSError as error:
        raise _bad(f"{path} cannot be written ({error.strerror})") from error
    return True


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, what)
