"""Where packages are installed from: what people write, and what a repository offers.

A source is written as

- `x.expert`, `x.apr`: a package file, its release beside it as `x.expert.release.json`;
- an address or folder of a git repository, `https://...`, `ssh://...`, `git@host:path`, `file://...`, `./folder`, also
  with `git+` before it. `@RANGE` may follow: what stands behind the last `@` that comes after the last `/` and `:`; and
  then `#REF`, a branch or tag. A folder that exists as written is meant as written;
- `NAME`, `PUBLISHER/NAME`, either with `@RANGE`: an expert that an index lists (`hocket.index`), unless the latter is a
  folder.

A repository releases a version with a tag `v1.2.0` on a commit that has the package file and, beside it, the file's
release. Names and folders do not matter, several versions and several experts may lie side by side: what a file is,
its release says. Tags that the range allows are tried from the newest; then, because the tags of a repository with
several experts number only one of them, other version tags; then HEAD. `#REF` picks one commit. What a release says
here is a claim, good enough to choose by. Whoever takes an offer verifies it (`hocket.installing`).
"""

from __future__ import annotations

import os
import re
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
from hocket.packages.release import ENVELOPE_SIZE_BYTES_MAX, RELEASE_SUFFIX, read_release
from hocket.versions import ANY, Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from hocket.git import File, Repository
    from hocket.identity import ReleaseName

SUFFIXES: Final = (".expert", ".apr")
"""How the names of package files end."""

PACKAGES_MAX: Final = 1000
"""Most package files in one commit."""

TAGS_MAX: Final = 12
"""Most version tags of a repository that are looked at for one expert."""

_LISTED: Final = 12
_LFS: Final = b"version https://git-lfs"
_OWNED: Final = re.compile(r"[a-z0-9][^/:]*/[a-z0-9][^/:]*")


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
        publisher: Whose; empty if that is left to the index.
    """

    name: str
    wanted: Range = Range()  # noqa: RUF009 - frozen
    publisher: str = ""

    def __str__(self) -> str:
        return f"{self.publisher}/{self.name}" if self.publisher else self.name


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
        label: The branch or tag in it, or `HEAD`.
        offers: The package files in it.
        index: The index at its root; None if there is none.
    """

    where: str
    label: str
    offers: tuple[Offer, ...]
    index: Index | None


def parse_source(text: str) -> Source:
    """Read what somebody wants to install.

    Raises:
        HocketError: `BAD_REQUEST` if it is none of the forms, or no such folder exists.
    """
    if UNSPEAKABLE.search(text):
        raise HocketError(Reason.BAD_REQUEST, f"{shown(text)[:80]!r} has control characters, or is not UTF-8")
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
    publisher, slash, name = place.rpartition("/")
    is_owned = _OWNED.fullmatch(place) is not None and not os.path.isdir(place)  # noqa: PTH112 - raises nothing
    if (slash and not is_owned) or ":" in place or written != text:
        return InRepository(check_address(place), wanted, ref or None)
    if ref:
        raise HocketError(Reason.BAD_REQUEST, f"{shown(text)!r}: a branch or tag goes with the address of a repository")
    return Named(check_name(name), wanted, check_name(publisher, "publisher") if slash else "")


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
    refs = repository.refs()
    places = _places(repository, refs, wanted, ref)
    if not places:
        raise HocketError(Reason.UNKNOWN_PACKAGE, f"{shown(repository.address)} is empty")
    for commit in _commits(repository, places, name):
        if commit.index is not None and not commit.offers and not any(each.offers for each in seen):
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{commit.where} is an index, not an expert: choose one of {_some(commit.index.repositories)} "
                f"with `hocket install NAME --index {shown(repository.address)}`",
            )
        found = select(commit, wanted, name)
        if len(found) == 1:
            return commit, found[0]
        if found:
            raise _several(commit, found)
        seen.append(commit)
    raise _nothing(repository, seen, wanted, name, tag_count=len(list(_version_tags(refs))))


def search(repository: Repository, wanted: Range, name: str) -> Iterator[tuple[Commit, Offer]]:
    """Every version of an expert in a repository, each once; of each tag the newest first.

    Commits are fetched when it is their turn.

    Args:
        repository: Where to look.
        wanted: Which versions will do.
        name: `publisher/name`.

    Raises:
        HocketError: What `hocket.git` raises.
    """
    told = set()
    for commit in _commits(repository, _places(repository, repository.refs(), wanted, None), name):
        for offer in fitting(commit, wanted, name):
            if offer.claim not in told:
                told.add(offer.claim)
                yield commit, offer


def select(commit: Commit, wanted: Range, name: str = "") -> list[Offer]:
    """The newest offer of each expert in a commit, as their releases claim.

    Files without a readable release come into play only where nothing is released and no name is asked for.

    Args:
        commit: Where to look.
        wanted: Which versions will do.
        name: `name` or `publisher/name`; empty for all.
    """
    newest: dict[str, Offer] = {}
    for offer in fitting(commit, wanted, name):
        newest.setdefault(_name_of(offer), offer)
    if not name and all(offer.claim is None for offer in commit.offers):
        return list(commit.offers)
    return list(newest.values())


def fitting(commit: Commit, wanted: Range, name: str = "") -> list[Offer]:
    """The released files of a commit that will do, as their releases claim; the newest first.

    Args:
        commit: Where to look.
        wanted: Which versions will do.
        name: `name` or `publisher/name`; empty for all.
    """
    versions = [
        (Version.parse(offer.claim.version), offer)
        for offer in commit.offers
        if offer.claim is not None and name in {"", offer.claim.name, _name_of(offer)}
    ]
    versions.sort(key=lambda each: each[0], reverse=True)
    return [offer for version, offer in versions if wanted.allows(version)]


def read_index(repository: Repository, ref: str | None = None) -> Index:
    """The index in a repository.

    Raises:
        HocketError: `UNKNOWN_PACKAGE` if there is none; what `hocket.index` and `hocket.git` raise.
    """
    refs = repository.refs()
    place = _named_place(repository, refs, ref) if ref is not None else _Place("HEAD", refs.get("HEAD", ""))
    index = _index(repository, place.label, repository.files(place.object_id)) if place.object_id else None
    if index is None:
        raise HocketError(
            Reason.UNKNOWN_PACKAGE, f"{shown(repository.address)} is no index of experts: it has no {INDEX_FILE}"
        )
    return index


@dataclass(frozen=True, slots=True)
class _Place:
    """A commit to look at.

    Attributes:
        label: The branch or tag.
        object_id: Of the commit or tag.
        other_version: Of a tag that the range does not allow, its version.
    """

    label: str
    object_id: str
    other_version: str | None = None


def _places(repository: Repository, refs: Mapping[str, str], wanted: Range, ref: str | None) -> list[_Place]:
    """The commits to look at, the likeliest first."""
    if ref is not None:
        return [_named_place(repository, refs, ref)]
    tags = sorted(_version_tags(refs), reverse=True)
    likely = [_Place(tag.removeprefix("refs/tags/"), refs[tag]) for version, tag in tags if wanted.allows(version)]
    others = [
        _Place(tag.removeprefix("refs/tags/"), refs[tag], str(version))
        for version, tag in tags
        if not wanted.allows(version)
    ]
    head = [_Place("HEAD", refs["HEAD"])] if "HEAD" in refs else []
    return [*(likely + others)[:TAGS_MAX], *head]


def _commits(repository: Repository, places: Iterable[_Place], name: str) -> Iterator[Commit]:
    """The commits in these places, each once, fetched when it is its turn.

    Where a tag that the range does not allow numbers what is looked for, other such tags do so too, and are left out.
    """
    seen = set()
    is_numbered = False
    for place in places:
        if place.object_id in seen or (is_numbered and place.other_version is not None):
            continue
        seen.add(place.object_id)
        commit = _commit(repository, place.label, place.object_id)
        yield commit
        if place.other_version is not None:
            versions = {None if offer.claim is None else offer.claim.version for offer in fitting(commit, ANY, name)}
            is_numbered = versions == {place.other_version}


def _several(commit: Commit, found: Sequence[Offer]) -> HocketError:
    if all(offer.claim is None for offer in found):
        names = _some(_file_of(commit, offer) for offer in found)
        return HocketError(
            Reason.BAD_REQUEST,
            f"{commit.where} has several package files that nobody has released, {names}: get the one that is meant, "
            "and install the file",
        )
    names = _some(sorted(map(_name_of, found)))
    return HocketError(Reason.BAD_REQUEST, f"{commit.where} has several experts, {names}: choose one with --name")


def _nothing(
    repository: Repository, seen: Sequence[Commit], wanted: Range, name: str, *, tag_count: int
) -> HocketError:
    there = sorted({str(offer.claim) for commit in seen for offer in commit.offers if offer.claim is not None})
    unreleased = {_file_of(commit, offer) for commit in seen for offer in commit.offers if offer.claim is None}
    what = name or "released package"
    versions = f" of a version in {wanted}" if wanted.comparators else ""
    has = f"; it has {_some(there)}" if there else ""
    without = f"; nobody has released {_some(sorted(unreleased))}" if unreleased else ""
    bound = f", of its {tag_count} version tags no more than {TAGS_MAX}" if tag_count > TAGS_MAX else ""
    advice = " (pre-releases have to be named)" if wanted.comparators or there else ""
    return HocketError(
        Reason.UNKNOWN_PACKAGE,
        f"{shown(repository.address)}: no {what}{versions} is there{has}{without}{advice}. "
        f"Looked at {_some(commit.label for commit in seen)}{bound}: #REF looks at another branch or tag",
    )


def _version_tags(refs: Mapping[str, str]) -> Iterator[tuple[Version, str]]:
    for ref in refs:
        if ref.startswith("refs/tags/v"):
            try:
                version = Version.parse(ref.removeprefix("refs/tags/v"))
            except HocketError:
                continue
            if version.semantic is not None:
                yield version, ref


def _named_place(repository: Repository, refs: Mapping[str, str], ref: str) -> _Place:
    for full in (f"refs/tags/{ref}", f"refs/heads/{ref}"):
        if full in refs:
            return _Place(ref, refs[full])
    there = _some(full.split("/", 2)[2] for full in refs if full != "HEAD")
    where = shown(repository.address)
    raise HocketError(Reason.BAD_REQUEST, f"{where} has no branch or tag {ref[:80]!r}; it has {there}")


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
    return Commit(where, label, offers, None if offers else _index(repository, label, files))


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


def _file_of(commit: Commit, offer: Offer) -> str:
    return offer.where.removeprefix(f"{commit.where}, ")


def _name_of(offer: Offer) -> str:
    return "" if offer.claim is None else f"{offer.claim.publisher}/{offer.claim.name}"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return (", ".join(every[:_LISTED]) or "nothing") + more
