"""From offers to a plan: packages opened, their releases verified, and everything found that they require.

What somebody installs may require other experts (`constraints.requires`). Those are looked for in the registry, then
among what is installed together with it, then in the same commit of its repository, then in the index; a bare name
means the same publisher's expert. Of what is found the newest versions that go together are chosen
(`hocket.packages.expert.resolution`). A plan is complete before anything is published: every package in it has been
opened and its release verified against the trusted keys, so that a refusal changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.packages import check_release_name, open_package
from hocket.packages.adapter import AdapterFacts
from hocket.packages.expert.resolution import Candidate, Requirement, resolve
from hocket.sources import InRepository, Named, PackageFile, find, select
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from hocket.git import Repository
    from hocket.identity import ReleaseName
    from hocket.index import Index
    from hocket.packages import Policy, TrustRoots
    from hocket.packages.opening import PackageFacts
    from hocket.sources import Commit, Offer, Source

FETCHED_MAX: Final = 32
"""Most packages that one plan looks into; a composition has far fewer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A package that may be published.

    Attributes:
        where: Where it was found, for people.
        data: The whole file, as it was verified.
        release: The release that came with it; empty if none did.
        name: What a trusted release calls it; None if none does.
        facts: What it is.
        commit: The commit it was found in; None for a file.
    """

    where: str
    data: bytes = field(repr=False)
    release: bytes = field(repr=False)
    name: ReleaseName | None
    facts: PackageFacts
    commit: Commit | None = None

    @property
    def candidate(self) -> Candidate | None:
        """The expert as others may require it; None for a model, which neither requires nor is required."""
        facts = self.facts
        if not isinstance(facts, AdapterFacts):
            return None
        publisher = "" if self.name is None else self.name.publisher
        return Candidate(facts.digest, publisher, facts.name, facts.version, facts.base, facts.constraints)

    def __str__(self) -> str:
        if self.name is not None:
            return str(self.name)
        return self.facts.digest if self.candidate is None else f"{self.facts.name}@{self.candidate.version}"


@dataclass(frozen=True, slots=True)
class Step:
    """One package of a plan.

    Attributes:
        name: What it is called, for people.
        digest: Of its file.
        why: Why it is there, a sentence each.
        package: What is to be published; None if the registry has it already.
    """

    name: str
    digest: str
    why: tuple[str, ...]
    package: Prepared | None


_ASKED: Final = "it was asked for"

LookUp: TypeAlias = "Callable[[Requirement, Commit | None], Prepared | None]"
"""Finds an expert outside the registry, first in the commit of the one that requires it; None if there is none."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds packages and opens them.

    Attributes:
        trust: The trusted keys.
        policy: What is accepted beyond proof.
        now: The time, with its zone.
        repository: Opens a repository by its address.
        index: Where experts are that are known by name, read when it is needed; None for nowhere.
        taken: The digest of every release that the registry has ever taken, by name.
        yanked: The digests that the registry has withdrawn.
    """

    trust: TrustRoots
    policy: Policy
    now: datetime
    repository: Callable[[str], Repository]
    index: Callable[[], Index | None] = lambda: None
    taken: Mapping[str, str] = field(default_factory=dict)
    yanked: Container[str] = ()

    def package(self, source: Source, read: Callable[[PackageFile], Offer], name: str = "") -> Prepared:
        """The package that a source means, verified.

        Args:
            source: What is wanted.
            read: Reads a package file and its release.
            name: Which expert, where a repository has several.

        Raises:
            HocketError: What `hocket.sources.find`, `prepare` and `hocket.git` raise; `UNKNOWN_PACKAGE` for a name that
                the index does not list, `BAD_REQUEST` without an index.
        """
        match source:
            case PackageFile():
                return self.prepare(read(source))
            case InRepository():
                repository = self.repository(source.address)
                commit, offer = find(repository, source.wanted, ref=source.ref, name=name)
                return self.prepare(offer, commit)
            case Named():
                return self._listed(source)

    def newer(self, name: ReleaseName, address: str) -> Prepared | None:
        """A newer version of an expert by the same publisher, verified; None if its repository has none.

        Raises:
            HocketError: As `package`; `BAD_REQUEST` if its version is one that has no order.
        """
        wanted = Range.parse(f">{name.version}")
        return self._found(lambda: find(self.repository(address), wanted, name=f"{name.publisher}/{name.name}"))

    def look_up(self, need: Requirement, commit: Commit | None) -> Prepared | None:
        """An expert that another one requires: from the same commit, or by the index. See `LookUp`."""
        name = f"{need.publisher}/{need.name}"
        if commit is not None:
            for offer in select(commit, need.range, name):
                return self.prepare(offer, commit)
        index = self.index()
        listed = None if index is None else index.repository_of(need.name)
        if listed is None:
            return None
        return self._found(lambda: find(self.repository(listed[1]), need.range, name=name))

    def prepare(self, offer: Offer, commit: Commit | None = None) -> Prepared:
        """Open an offer: its release first, then its content.

        Raises:
            HocketError: What `hocket.packages.open_package` raises, with the place; `NAME_MISMATCH` if release and
                manifest disagree; `NOT_SERVABLE`; `VERSION_TAKEN` and `YANKED` if the registry would say so.
        """
        try:
            return self._opened(offer, commit)
        except HocketError as error:
            advice = "; --allow-unsigned lets it pass here, and leaves it to the registry's policy"
            hint = advice if error.reason in {Reason.UNSIGNED, Reason.SIGNER_NOT_TRUSTED} else ""
            message = error.message.removeprefix(f"{offer.where}: ")
            raise HocketError(error.reason, f"{offer.where}: {message}{hint}", field=error.field) from error

    def _opened(self, offer: Offer, commit: Commit | None) -> Prepared:
        data = offer.load()
        releases = () if offer.release is None else (offer.release,)
        opened = open_package(data, releases=releases, trust=self.trust, policy=self.policy, now=self.now)
        facts = opened.facts
        name = next((proof.release for proof in opened.provenance.proofs if proof.release is not None), None)
        if name is not None:
            check_release_name(facts, name)
        if facts.not_servable is not None:
            raise HocketError(Reason.NOT_SERVABLE, f"it cannot answer: {facts.not_servable}")
        if facts.digest in self.yanked:
            raise HocketError(Reason.YANKED, f"the registry has withdrawn {facts.digest} for good")
        other = self.taken.get(str(name), facts.digest)
        if other != facts.digest:
            raise HocketError(
                Reason.VERSION_TAKEN,
                f"the registry has {name} already, with other bytes ({other}): release a new version",
            )
        return Prepared(offer.where, data, offer.release or b"", name, facts, commit)

    def _listed(self, source: Named) -> Prepared:
        index = self.index()
        if index is None:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{source.name} is a name, and no index says where it is: give --index URL, "
                f"or the address of its repository (a folder is written ./{source.name})",
            )
        listed = index.repository_of(source.name)
        if listed is None:
            raise HocketError(Reason.UNKNOWN_PACKAGE, f"{index.where} lists no {source.name}")
        name, address = listed
        commit, offer = find(self.repository(address), source.wanted, name=name)
        return self.prepare(offer, commit)

    def _found(self, look: Callable[[], tuple[Commit, Offer]]) -> Prepared | None:
        try:
            commit, offer = look()
        except HocketError as error:
            if error.reason is Reason.UNKNOWN_PACKAGE:
                return None
            raise
        return self.prepare(offer, commit)


def plan(
    roots: Sequence[Prepared], present: Iterable[Candidate], look_up: LookUp, *, with_requirements: bool = True
) -> tuple[Step, ...]:
    """What to publish so that everything asked for can serve, in the order in which it has to be published.

    Args:
        roots: What was asked for.
        present: The experts in the registry that may serve.
        look_up: Finds what is not among them.
        with_requirements: Whether to look for what experts require at all.

    Raises:
        HocketError: The refusals of `hocket.packages.expert.resolution.resolve`; `TOO_MANY_EXPERTS` if the requirements
            lead to too many packages; what `look_up` raises.
    """
    steps: dict[str, Step] = {}
    if not with_requirements:
        steps = {str(root): Step(str(root), root.facts.digest, (_ASKED,), root) for root in roots}
        return tuple(steps.values())
    packages, available = _gathered(roots, present, look_up)
    for root in roots:
        own = root.candidate
        if own is None:
            steps[str(root)] = Step(str(root), root.facts.digest, (_ASKED,), root)
            continue
        exactly = Requirement(own.name, Range.parse(own.version), own.publisher)
        for chosen in resolve([exactly], available).experts:
            expert = chosen.candidate
            step = Step(str(expert).removeprefix("/"), expert.digest, chosen.why, packages.get(expert))
            steps.setdefault(str(expert), step)
    return tuple(steps.values())


def _gathered(
    roots: Sequence[Prepared], present: Iterable[Candidate], look_up: LookUp
) -> tuple[dict[Candidate, Prepared], list[Candidate]]:
    """Every package to choose from that is not in the registry, and all candidates together."""
    packages: dict[Candidate, Prepared] = {}
    available = {_key(each): each for each in present}
    waiting: list[Candidate] = []

    def add(package: Prepared) -> None:
        own = package.candidate
        if own is not None and _key(own) not in available:
            available[_key(own)] = own
            packages[own] = package
        if own is not None:
            waiting.append(available[_key(own)])

    for root in roots:
        add(root)
    looked: set[Requirement] = set()
    while waiting:
        expert = waiting.pop()
        for need in _needs(expert):
            if need in looked:
                continue
            looked.add(need)
            fitting = [each for each in available.values() if _fits(need, each)]
            waiting.extend(fitting)
            home = packages[expert].commit if expert in packages else None
            if not fitting and (found := look_up(need, home)) is not None:
                add(found)
            if len(packages) > FETCHED_MAX + len(roots):
                raise HocketError(
                    Reason.TOO_MANY_EXPERTS, f"the requirements lead to more than {FETCHED_MAX} packages: require fewer"
                )
    return packages, list(available.values())


def _needs(expert: Candidate) -> Iterator[Requirement]:
    for text in expert.constraints.requires:
        try:
            need = Requirement.parse(text)
        except HocketError as error:
            raise HocketError(error.reason, f"{expert} cannot be installed: {error.message}") from error
        yield replace(need, publisher=expert.publisher if need.publisher is None else need.publisher)


def _fits(need: Requirement, expert: Candidate) -> bool:
    same = (need.publisher, need.name) == (expert.publisher, expert.name)
    return same and need.range.allows(Version.parse(expert.version))


def _key(expert: Candidate) -> tuple[str, str]:
    return str(expert), expert.digest
