"""Where packages are installed from: what people write, and what a repository offers.

A source is written as

- `x.expert`, `x.apr`: a package file, its release beside it as `x.expert.release.json`;
- an address or folder of a git repository, `https://...`, `ssh://...`, `git@host:path`, `file://...`, `./folder`, also
  with `git+` before it. `@RANGE` may follow: what stands behind the last `@` that comes after the last `/` and `:`; and
  then `#REF`, a branch or tag. A folder that exists as written is meant as written;
- `NAME` or `NAME@RANGE`: an expert that an index lists (`hocket.index`).

A repository releases a version with a tag `v1.2.0` on a commit that has the package file and, beside it, the file's
release. Names and folders do not matter, several versions and several experts may lie side by side: what a file is,
its release says. Tags are tried from the newest that the range allows; `#REF` picks one commit, and a repository
without version tags is read at its HEAD. What a release says here is a claim, good enough to choose by. Whoever takes
an offer verifies it (`hocket.installing`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.git import TIMEOUT_SECONDS, UNSPEAKABLE, check_address, opened, shown
from hocket.identity import check_name
from hocket.index import INDEX_BYTES_MAX, INDEX_FILE, Index, parse_index
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.release import ENVELOPE_SIZE_BYTES_MAX, read_release
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hocket.git import File, Repository
    from hocket.identity import ReleaseName

SUFFIXES: Final = (".expert", ".apr")
"""How the names of package files end."""

RELEASE_SUFFIX: Final = ".release.json"
"""What the name of a release adds to that of its file."""

PACKAGES_MAX: Final = 1000
"""Most package files in one commit."""

_COMMITS_MAX: Final = 8
_LISTED: Final = 12
_LFS: Final = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A source: one file."""

    path: Path


@dataclass(frozen=True, slots=True)
class InRepository:
    """A source: the newest version in a repository.

    Attributes:
        address: As git may be given it.
        wanted: Which versions will do.
        ref: The branch or tag to look at; None for the tags of versions.
    """

    address: str
    wanted: Range = Range()  # noqa: RUF009 - frozen
    ref: str | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """A source: the newest version of an expert that an index lists.

    Attributes:
        name: Of the expert.
        wanted: Which versions will do.
    """

    name: str
    wanted: Range = Range()  # noqa: RUF009 - frozen


Source: TypeAlias = PackageFile | InRepository | Named


@dataclass(frozen=True, slots=True)
class Offer:
    """A package file somewhere. Nothing about it is verified.

    Attributes:
        where: For people.
        load: Gives its bytes.
        release: The release beside it; None if there is none.
        claim: What that release says; None if it says nothing that can be read.
    """

    where: str
    load: Callable[[], bytes]
    release: bytes | None = None
    claim: ReleaseName | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of a repository.

    Attributes:
        where: For people.
        offers: The package files in it.
        index: The index at its root; None if there is none.
    """

    where: str
    offers: tuple[Offer, ...]
    index: Index | None


def parse_source(text: str) -> Source:
    """Read what somebody wants to install.

    Raises:
        HocketError: `BAD_REQUEST` if it is none of the forms, or no such folder exists.
    """
    if UNSPEAKABLE.search(text):
        raise HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} has control characters, or is not UTF-8")
    written = text.removeprefix("git+")
    if "://" not in written and not os.path.isdir(os.path.expanduser(written)):  # noqa: PTH111, PTH112 - raise nothing
        if written == text and text.endswith(SUFFIXES):
            return PackageFile(Path(os.path.expanduser(text)))  # noqa: PTH111 - the same
    elif "://" not in written and ("/" in written or written in {".", ".."}):
        return InRepository(check_address(written))
    place, sharp, ref = written.partition("#")
    at = place.rfind("@")
    wanted = Range()
    if at > max(place.rfind("/"), place.rfind(":")):
        wanted = Range.parse(place[at + 1 :])
        place = place[:at]
    if sharp and not ref:
        raise HocketError(Reason.BAD_REQUEST, f"{shown(text)!r} ends with #: name a branch or tag after it")
    if "/" in place or ":" in place or written != text:
        return InRepository(check_address(place), wanted, ref or None)
    if ref:
        raise HocketError(Reason.BAD_REQUEST, f"{text!r}: a branch or tag goes with the address of a repository")
    return Named(check_name(place), wanted)


@contextmanager
def repositories(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Callable[[str], Repository]]:
    """Opens repositories by address, each once. All of them are closed at the end.

    Args:
        timeout_seconds: How long one run of git may take.
    """
    with ExitStack() as stack:

        @cache
        def get(address: str) -> Repository:
            return stack.enter_context(opened(address, timeout_seconds=timeout_seconds))

        yield get


def find(repository: Repository, wanted: Range, *, ref: str | None = None, name: str = "") -> tuple[Commit, Offer]:
    """The newest version of an expert in a repository, and the commit in which it lies.

    Args:
        repository: Where to look.
        wanted: Which versions will do.
        ref: A branch or tag; None for the tags of versions.
        name: `name` or `publisher/name`; empty if there has to be one expert only.

    Raises:
        HocketError: `UNKNOWN_PACKAGE` if there is none; `BAD_REQUEST` if there are several, if the repository is an
            index, or without that branch or tag; what `hocket.git` raises.
    """
    seen: list[Commit] = []
    for commit in _commits(repository, wanted, ref):
        if commit.index is not None and not commit.offers:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{commit.where} is an index, not an expert: choose one of {_some(commit.index.repositories)} "
                f"with `hocket install NAME --index {shown(repository.address)}`",
            )
        found = select(commit, wanted, name)
        if len(found) == 1:
            return commit, found[0]
        if found:
            names = _some(offer.where if offer.claim is None else _name(offer.claim) for offer in found)
            raise HocketError(
                Reason.BAD_REQUEST, f"{commit.where} has several experts, {names}: choose one with --name"
            )
        seen.append(commit)
    there = sorted({str(offer.claim) for commit in seen for offer in commit.offers if offer.claim is not None})
    what = name or "a released package"
    has = f"; it has {_some(there)}" if there else ""
    raise HocketError(
        Reason.UNKNOWN_PACKAGE,
        f"{' and '.join(commit.where for commit in seen)}: no {what} of a version in {wanted} is there{has} "
        "(pre-releases have to be named)",
    )


def select(commit: Commit, wanted: Range, name: str = "") -> list[Offer]:
    """The newest offer of each expert in a commit, as their releases claim.

    Files without a readable release come into play only where nothing is released and no name is asked for.

    Args:
        commit: Where to look.
        wanted: Which versions will do.
        name: `name` or `publisher/name`; empty for all.
    """
    newest: dict[str, tuple[Version, Offer]] = {}
    for offer in commit.offers:
        if offer.claim is None or name not in {"", offer.claim.name, _name(offer.claim)}:
            continue
        version = Version.parse(offer.claim.version)
        if wanted.allows(version):
            other = newest.get(_name(offer.claim))
            if other is None or other[0] < version:
                newest[_name(offer.claim)] = version, offer
    if not name and all(offer.claim is None for offer in commit.offers):
        return list(commit.offers)
    return [offer for _, offer in newest.values()]


def read_index(repository: Repository, ref: str | None = None) -> Index:
    """The index in a repository.

    Raises:
        HocketError: `UNKNOWN_PACKAGE` if there is none; what `hocket.index` and `hocket.git` raise.
    """
    label, object_id = _one_commit(repository.address, repository.refs(), ref)
    files = repository.files(object_id)
    index = _index(repository, label, files)
    if index is None:
        raise HocketError(
            Reason.UNKNOWN_PACKAGE, f"{shown(repository.address)} is no index of experts: it has no {INDEX_FILE}"
        )
    return index


def _commits(repository: Repository, wanted: Range, ref: str | None) -> Iterator[Commit]:
    """The commits to look at, the newest version first; each is fetched when it is its turn."""
    refs = repository.refs()
    tags = sorted(_version_tags(refs), reverse=True)
    if ref is not None or not tags:
        yield _commit(repository, *_one_commit(repository.address, refs, ref))
        return
    fitting = [(version, tag) for version, tag in tags if wanted.allows(version)]
    if not fitting:
        raise HocketError(
            Reason.UNKNOWN_PACKAGE,
            f"{shown(repository.address)} has no version in {wanted}; it has {_some(str(v) for v, _ in tags)} "
            "(pre-releases have to be named; #BRANCH looks at a branch instead)",
        )
    for _, tag in fitting[:_COMMITS_MAX]:
        yield _commit(repository, tag.removeprefix("refs/tags/"), refs[tag])


def _version_tags(refs: Mapping[str, str]) -> Iterator[tuple[Version, str]]:
    for ref in refs:
        if ref.startswith("refs/tags/v"):
            try:
                version = Version.parse(ref.removeprefix("refs/tags/v"))
            except HocketError:
                continue
            if version.semantic is not None:
                yield version, ref


def _one_commit(address: str, refs: Mapping[str, str], ref: str | None) -> tuple[str, str]:
    if ref is None:
        if "HEAD" not in refs:
            raise HocketError(Reason.UNKNOWN_PACKAGE, f"{shown(address)} is empty")
        return "HEAD", refs["HEAD"]
    for full in (f"refs/tags/{ref}", f"refs/heads/{ref}"):
        if full in refs:
            return ref, refs[full]
    there = _some(full.split("/", 2)[2] for full in refs if full != "HEAD")
    raise HocketError(Reason.BAD_REQUEST, f"{shown(address)} has no branch or tag {ref[:80]!r}; it has {there}")


def _commit(repository: Repository, label: str, object_id: str) -> Commit:
    files = repository.files(object_id)
    packages = [file for file in files if file.path.endswith(SUFFIXES)]
    where = f"{shown(repository.address)} at {label}"
    if len(packages) > PACKAGES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"{where} has more than {PACKAGES_MAX} package files")
    by_path = {file.path: file for file in files}
    beside = [by_path.get(file.path + RELEASE_SUFFIX) for file in packages]
    readable = [file for file in beside if file is not None and file.size_bytes <= ENVELOPE_SIZE_BYTES_MAX]
    envelopes = dict(zip(readable, repository.read(readable), strict=True))
    offers = tuple(
        _offer(repository, where, file, None if release is None else envelopes.get(release, b""))
        for file, release in zip(packages, beside, strict=True)
    )
    return Commit(where, offers, None if offers else _index(repository, label, files))


def _offer(repository: Repository, where: str, file: File, release: bytes | None) -> Offer:
    return Offer(f"{where}, {file.path}", partial(_load, repository, file), release, claimed(release))


def claimed(release: bytes | None) -> ReleaseName | None:
    """The name that a release claims; None if there is none that can be read."""
    try:
        return None if release is None else read_release(release).release.name
    except HocketError:
        return None


def _load(repository: Repository, file: File) -> bytes:
    if file.size_bytes > DEFAULT_LIMITS.package_bytes:
        raise HocketError(Reason.TOO_LARGE, f"it has {file.size_bytes} bytes, more than any package may have")
    [data] = repository.read([file])
    if data.startswith(_LFS):
        raise HocketError(
            Reason.BAD_PACKAGE,
            "the repository has only a pointer of Git LFS in its place, which is not followed: "
            "download the file and install that, or have its publisher commit the file itself",
        )
    return data


def _index(repository: Repository, label: str, files: Iterable[File]) -> Index | None:
    file = next((file for file in files if file.path == INDEX_FILE), None)
    if file is None:
        return None
    if file.size_bytes > INDEX_BYTES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"{INDEX_FILE} has {file.size_bytes} bytes; at most {INDEX_BYTES_MAX}")
    [data] = repository.read([file])
    where = f"{shown(repository.address)} at {label}"
    return parse_index(data, where, is_local=repository.address.startswith("/"))


def _name(claim: ReleaseName) -> str:
    return f"{claim.publisher}/{claim.name}"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return (", ".join(every[:_LISTED]) or "nothing") + more
