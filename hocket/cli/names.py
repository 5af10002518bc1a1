"""What people mean by a short name: `[PUBLISHER/]NAME[@VERSION]`, where `expert-` may be left out of the name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.versions import Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hocket.v1.package_pb2 import Package, Release

_PREFIX: Final = "expert-"
_MEANT_SHOWN: Final = 3
_MEANT_LIKENESS: Final = 0.8


def split(written: str) -> tuple[str, str, str]:
    """Publisher, name and version, the first and the last of them empty where they are left out.

    Raises:
        HocketError: `BAD_REQUEST` if there is no name, or a mark without what belongs to it.
    """
    publisher, slash, rest = written.rpartition("/")
    name, mark, version = rest.partition("@")
    if not name or bool(slash) != bool(publisher) or bool(mark) != bool(version):
        raise HocketError(Reason.BAD_REQUEST, f"{written!r} is not a name: write [PUBLISHER/]NAME[@VERSION]")
    return publisher, name, version


def find(written: str, names: Iterable[tuple[str, str]], what: str = "package") -> tuple[str, str]:
    """The publisher and the name that are meant; a version counts for nothing here.

    Args:
        written: `[PUBLISHER/]NAME[@VERSION]`.
        names: What there is, each with its publisher.
        what: What is looked for, in one word.

    Raises:
        HocketError: `BAD_REQUEST` if several publishers have it, or this is no name; `UNKNOWN_PACKAGE` if nobody has.
    """
    publisher, name, _ = split(written)
    known = {each for each in names if publisher in {"", each[0]}}
    for meant in (name, _PREFIX + name):
        found = sorted(each for each in known if each[1] == meant)
        if len(found) > 1:
            choices = " or ".join(f"{owner}/{meant}" for owner, _ in found)
            raise HocketError(Reason.BAD_REQUEST, f"several publishers have {meant}: say which, {choices}")
        if found:
            return found[0]
    perhaps = suggestion(f"{publisher}/{name}" if publisher else name, {f"{owner}/{each}" for owner, each in known})
    raise HocketError(Reason.UNKNOWN_PACKAGE, f"this registry has no {what} {written!r}{perhaps}")


def releases(written: str, packages: Sequence[Package]) -> list[tuple[Package, Release]]:
    """The releases that are meant, of a bare name all versions, each with its package.

    Raises:
        HocketError: As `find`; `UNKNOWN_PACKAGE` too if there is no such version, or nobody has signed that name.
    """
    every = [(package, release) for package in packages for release in package.releases]
    _check_signed(written, packages, {release.name for _, release in every})
    owner, name = find(written, ((release.publisher, release.name) for _, release in every))
    of_name = [(package, release) for package, release in every if (release.publisher, release.name) == (owner, name)]
    version = split(written)[2]
    found = [(package, release) for package, release in of_name if version in {"", release.version}]
    if not found:
        there = ", ".join(sorted({release.version for _, release in of_name}, key=Version.parse))
        raise HocketError(
            Reason.UNKNOWN_PACKAGE, f"{owner}/{name} has no version {version} in this registry; it has {there}"
        )
    return found


def _check_signed(written: str, packages: Iterable[Package], taken: set[str]) -> None:
    """Point to the digests of experts that only call themselves so: without a release nobody answers for that name."""
    publisher, name, version = split(written)
    if publisher or not taken.isdisjoint(meant := {name, _PREFIX + name}):
        return
    digests = [
        package.digest
        for package in packages
        if not package.releases and package.adapter.name in meant and version in {"", package.adapter.version}
    ]
    if digests:
        raise HocketError(
            Reason.UNKNOWN_PACKAGE,
            f"{written!r} is not signed here, and has its digest for a name: `hocket yank {digests[0]}` withdraws it, "
            f"`hocket experts show {digests[0]}` shows it"
            + (f"; {len(digests) - 1} more call themselves so (`hocket search {name}`)" if len(digests) > 1 else ""),
        )


def suggestion(written: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` where something alike is there, else nothing; what was written may lack the publisher."""
    spelled = sorted(names)
    meant = [name for name in spelled if written in name]
    if not meant:
        alike = {name if "/" in written else name.rpartition("/")[2]: name for name in spelled}
        meant = [alike[close] for close in difflib.get_close_matches(written, alike, cutoff=_MEANT_LIKENESS)]
    return f"; did you mean {' or '.join(meant[:_MEANT_SHOWN])}?" if meant else ""
