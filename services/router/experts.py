"""Adapter experts by what people call them."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Final

import structlog

from hocket.bases import Match, compatibility
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.versions import Version
from services.router.model import REFUSALS, listed_name, release_name
from services.router.rules import Terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hocket.bases import Described
    from hocket.v1.package_pb2 import Package

_log: Final = structlog.get_logger("router")
_ADDRESS_CHARS_MAX: Final = 256
"""A longer address is no typing error."""
_CONVENTION: Final = "expert-"
"""How the format's own experts are called: `sql` finds `expert-sql`."""
_COMPARED_MAX: Final = 100
"""Names compared with an unknown one, at most."""
_CHOICES_MAX: Final = 5
"""Names that a message lists, at most."""


@dataclass(frozen=True, slots=True)
class Expert:
    """An adapter expert under one of its names.

    Args:
        package: What the registry says about its package.
        name: `publisher/name@version`, or the digest where nobody has released it.
        refusal: Why it may not be used under this name; None if it may.
        rank: Of two versions the one with the higher rank stands for the name.
    """

    package: Package
    name: str
    refusal: Reason | None
    rank: tuple[object, ...] = field(default=(), compare=False)

    def check_servable(self) -> None:
        """Pass if it may serve.

        Raises:
            HocketError: `YANKED`, `KEY_REVOKED` or `SIGNER_NOT_TRUSTED`.
        """
        if self.refusal is not None:
            raise HocketError(self.refusal, f"the expert {self.name} is withdrawn ({self.refusal})", expert=self.name)


@dataclass(frozen=True, slots=True)
class Experts:
    """All adapter experts.

    Args:
        by_address: By digest, by `publisher/name@version`, and the newest version by `publisher/name`.
        owners: Who has an expert of a name, whether or not it may serve: nobody steps into a withdrawn one's name.
        digests: Of every version of a `publisher/name`.
        terms: What was read of each package that says when it wants to be asked, by digest.
    """

    by_address: Mapping[str, Expert] = field(default_factory=dict)
    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    digests: Mapping[str, frozenset[str]] = field(default_factory=dict)
    terms: Mapping[str, Terms] = field(default_factory=dict)

    def find(self, address: str, field: str) -> Expert | None:
        """The expert behind a digest or `[publisher/]name[@version]`; None if there is none.

        Without a version the newest is meant. A `name` stands for `expert-name` as well: under a publisher where that
        one has no plain `name`, otherwise always, so that nobody steps into a name that leads to another expert.

        Args:
            address: One of these.
            field: Where in the request it stands.

        Raises:
            HocketError: `BAD_REQUEST` for a name that leads to several experts.
        """
        if exact := self.by_address.get(address):
            return exact
        publisher, slash, rest = address.rpartition("/")
        name, mark, version = rest.partition("@")
        meant = [
            f"{owner}/{each}{mark}{version}"
            for each in (name, f"{_CONVENTION}{name}")
            for owner in self.owners.get(each, ())
            if not slash or owner == publisher
        ]
        if len(meant) > 1 and not slash:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"several experts are called {address!r}: say which, " + " or ".join(meant[:_CHOICES_MAX]),
                field=field,
            )
        return self.by_address.get(meant[0]) if meant else None

    def riding_on(self, base: Described) -> list[Expert]:
        """Who may answer on a base without being named, by digest.

        Of each `publisher/name` the version that stands for it among those that ride on the base and may serve; each
        package once. Experts that require others are used only when they are named, with those others.
        """
        newest: dict[str, Expert] = {}
        for expert in self.by_address.values():
            facts = expert.package.adapter
            if expert.refusal is not None or not facts.HasField("routing") or facts.constraints.requirements:
                continue
            of_name, mark, _ = expert.name.rpartition("@")
            held = newest.get(of_name)
            outranks = held is None or expert.rank > held.rank
            if mark and outranks and compatibility(facts.base, base).match is not Match.DIFFERENT:
                newest[of_name] = expert
        by_digest = {expert.package.digest: expert for _, expert in sorted(newest.items(), reverse=True)}
        return [expert for _, expert in sorted(by_digest.items())]

    def advice(self, address: str) -> str:
        """What somebody may have meant by an address that leads nowhere, as the end of a sentence."""
        if is_digest(address.lower()) and not is_digest(address):
            return "write digests in lower case"
        unversioned, mark, _ = address.partition("@")
        if mark and (newest := self.find(unversioned, "")):
            return f"did you mean {newest.name!r}?"
        name = unversioned.rpartition("/")[2]
        if name and len(address) <= _ADDRESS_CHARS_MAX:
            meant = (each for each in self.owners if name in each)
            alike = (each for each in self.owners if each[:1] == name[:1])
            close = [*islice(meant, _CHOICES_MAX)] or get_close_matches(name, [*islice(alike, _COMPARED_MAX)], n=1)
            if choices := [f"{owner}/{each}" for each in close for owner in self.owners[each]][:_CHOICES_MAX]:
                return f"did you mean {' or '.join(choices)}?"
        return "`hocket search` shows what there is"


def index(packages: Iterable[Package], known: Mapping[str, Terms] | None = None) -> Experts:
    """The adapter experts among packages.

    Of the versions that may serve the newest stands for `publisher/name`, a pre-release only where there is nothing
    else; where none may serve, the newest one does, with the reason why it may not.

    Args:
        packages: Each digest once.
        known: Terms that were read before, by digest: of a package that says the same, they are not read again.
    """
    known = known or {}
    by_address: dict[str, Expert] = {}
    newest: dict[str, Expert] = {}
    owners: dict[str, set[str]] = {}
    digests: dict[str, set[str]] = {}
    terms: dict[str, Terms] = {}
    for package in packages:
        if not package.HasField("adapter"):
            continue
        withdrawn = REFUSALS.get(package.state)
        for release in package.releases:
            name, refusal = release_name(release), withdrawn or REFUSALS.get(release.state)
            try:
                version = Version.parse(release.version)
            except HocketError as error:
                _log.warning("release not understood", release=name, message=error.message)
                continue
            rank = (refusal is None, not version.is_prerelease, version.order)
            by_address[name] = expert = Expert(package, name, refusal, rank)
            of_name = f"{release.publisher}/{release.name}"
            if of_name not in newest or rank > newest[of_name].rank:
                newest[of_name] = expert
            owners.setdefault(release.name, set()).add(release.publisher)
            digests.setdefault(of_name, set()).add(package.digest)
        by_address[package.digest] = Expert(package, listed_name(package), withdrawn)
        if package.adapter.HasField("routing"):
            read = known.get(package.digest)
            if read is None or read.package.adapter != package.adapter:
                read = Terms.of(package)
            terms[package.digest] = read
    by_address |= newest
    return Experts(
        by_address,
        {name: tuple(sorted(publishers)) for name, publishers in owners.items()},
        {of_name: frozenset(of_versions) for of_name, of_versions in digests.items()},
        terms,
    )
