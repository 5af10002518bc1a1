"""From offers to a plan: packages opened, their releases verified, and everything found that they require.

What somebody installs may require other experts (`constraints.requires`). Those are looked for in the registry, then
among what is installed together with it, then in the same commit of its repository, then in the index; a bare name
means the same publisher's expert. Of each the newest version is taken that the registry has not withdrawn; older ones
are looked at where those do not go together. Of what is found the newest versions that go together are chosen
(`hocket.resolution`). What was asked for is in the plan as it is: no other file of that name, in the
registry or elsewhere, takes its place. A plan is complete before anything is published: every package in it has been
opened and its release verified against the trusted keys, so that a refusal changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName
from hocket.packages import check_release_name, describe_package
from hocket.packages.adapter import AdapterFacts
from hocket.requirements import Requirement
from hocket.resolution import Candidate, resolve
from hocket.sources import InRepository, Named, PackageFile, find, fitting, search
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from hocket.git import Repository
    from hocket.index import Index
    from hocket.packages import Policy, TrustRoots
    from hocket.packages.opening import PackageFacts
    from hocket.resolution import Chosen
    from hocket.sources import Commit, Offer, Source

FETCHED_MAX: Final = 32
"""Most packages that one plan looks into; a composition has far fewer."""

VERSIONS_MAX: Final = 4
"""Most versions of a required expert to choose from, where the newest do not go together."""

_TRIED_MAX: Final = 16
_GONE: Final = frozenset({Reason.YANKED, Reason.VERSION_TAKEN})
_CONFLICTS: Final = frozenset({Reason.REQUIREMENT_MISSING, Reason.EXPERTS_INCOMPATIBLE, Reason.BASE_MISMATCH})


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


@dataclass(frozen=True, slots=True)
class Found:
    """Versions of an expert that were found outside the registry.

    Attributes:
        packages: The newest first; empty if there are none.
        left_out: Why newer ones are not among them: the registry would never take them.
        has_more: Whether there may be older ones.
    """

    packages: tuple[Prepared, ...] = ()
    left_out: tuple[HocketError, ...] = ()
    has_more: bool = False


LookUp: TypeAlias = "Callable[[Requirement, Commit | None, int], Found]"
"""Finds so many versions of an expert outside the registry, first in the commit of the one that requires it."""


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
            name: Which expert, where a repository has several; of a source that is a name, whose expert.

        Raises:
            HocketError: What `hocket.sources.find`, `prepare` and `hocket.git` raise; `UNKNOWN_PACKAGE` for a name that
                the index does not list, `BAD_REQUEST` without an index, or for a name that is another publisher's in
                the registry.
        """
        match source:
            case PackageFile():
                return self.prepare(read(source))
            case InRepository():
                repository = self.repository(source.address)
                commit, offer = find(repository, source.wanted, ref=source.ref, name=name)
                return self.prepare(offer, commit)
            case Named():
                return self._listed(source, name)

    def newer(self, name: ReleaseName, address: str) -> Prepared | None:
        """A newer version of an expert by the same publisher, verified; None if its repository has none.

        Raises:
            HocketError: As `package`; `BAD_REQUEST` if its version is one that has no order.
        """
        wanted = Range.parse(f">{name.version}")
        found = self._acceptable(search(self.repository(address), wanted, f"{name.publisher}/{name.name}"), 1)
        if found.left_out and not found.packages:
            raise found.left_out[0]
        return next(iter(found.packages), None)

    def look_up(self, need: Requirement, commit: Commit | None, versions_max: int) -> Found:
        """An expert that another one requires: from the same commit, or by the index. See `LookUp`."""
        name = f"{need.publisher}/{need.name}"
        found = Found()
        if commit is not None:
            found = self._acceptable(((commit, offer) for offer in fitting(commit, need.range, name)), versions_max)
        index = None if found.packages else self.index()
        listed = None if index is None else index.repository_of(need.name)
        if listed is None:
            return found
        elsewhere = self._acceptable(search(self.repository(listed[1]), need.range, name), versions_max)
        return replace(elsewhere, left_out=found.left_out + elsewhere.left_out)

    def _acceptable(self, offers: Iterable[tuple[Commit, Offer]], versions_max: int) -> Found:
        """The newest offers, without those that the registry would never take. One that is refused ends the search."""
        packages: list[Prepared] = []
        left_out: list[HocketError] = []
        for commit, offer in islice(offers, _TRIED_MAX):
            try:
                packages.append(self.prepare(offer, commit))
            except HocketError as error:
                if error.reason in _GONE:
                    left_out.append(error)
                    continue
                if packages:
                    break
                raise
            if len(packages) == versions_max:
                return Found(tuple(packages), tuple(left_out), has_more=True)
        return Found(tuple(packages), tuple(left_out))

    def prepare(self, offer: Offer, commit: Commit | None = None) -> Prepared:
        """Open an offer: its release first, then its content.

        Raises:
            HocketError: What `hocket.packages.describe_package` raises, with the place; `NAME_MISMATCH` if release and
                manifest disagree; `NOT_SERVABLE`; `VERSION_TAKEN` and `YANKED` if the registry would say so.
        """
        try:
            return self._opened(offer, commit)
        except HocketError as error:
            advice = "; --allow-unsigned lets it pass here, and leaves it to the registry's policy"
            hint = advice if error.reason in {Reason.UNSIGNED, Reason.SIGNER_NOT_TRUSTED} else ""
            message = error.message if offer.where in error.message else f"{offer.where}: {error.message}"
            raise HocketError(error.reason, f"{message}{hint}", field=error.field) from error

    def _opened(self, offer: Offer, commit: Commit | None) -> Prepared:
        data = offer.load()
        releases = () if offer.release is None else (offer.release,)
        opened = describe_package(data, releases=releases, trust=self.trust, policy=self.policy, now=self.now)
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

    def _listed(self, source: Named, chosen: str) -> Prepared:
        index = self.index()
        if index is None:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{source} is a name, and no index says where it is: give --index URL, "
                f"or the address of its repository (a folder is written ./{source})",
            )
        listed = index.repository_of(source.name)
        if listed is None:
            raise HocketError(Reason.UNKNOWN_PACKAGE, f"{index.where} lists no {source.name}")
        name, address = listed
        publisher = source.publisher or chosen.rpartition("/")[0]
        full = f"{publisher}/{name}" if publisher else name
        commit, offer = find(self.repository(address), source.wanted, name=full)
        package = self.prepare(offer, commit)
        if not publisher:
            self._check_owner(package, name)
        return package

    def _check_owner(self, package: Prepared, name: str) -> None:
        """Pass unless the registry knows the name as somebody else's: an index must not hand it to another."""
        own = "" if package.name is None else package.name.publisher
        owners = sorted({taken.publisher for taken in map(ReleaseName.parse, self.taken) if taken.name == name} - {""})
        if owners and own not in owners:
            there = " or ".join(f"{owner}/{name}" for owner in owners)
            found = f"{own}/{name}" if own else f"one of {name} that nobody has signed"
            choice = f"--name {own}/{name}, or --name {there} for the other" if own else f"--name {there}"
            raise HocketError(
                Reason.BAD_REQUEST, f"the registry has {there}, and {package.where} is {found}: choose with {choice}"
            )


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
        HocketError: The refusals of `hocket.resolution.resolve`; `TOO_MANY_EXPERTS` if the requirements
            lead to too many packages; what `look_up` raises.
    """
    if not with_requirements:
        alone = {root.facts.digest: Step(str(root), root.facts.digest, (_ASKED,), root) for root in roots}
        return tuple(alone.values())
    present = list(present)
    newest = _gathered(roots, present, look_up, 1)
    try:
        return _steps(roots, newest)
    except HocketError as conflict:
        if conflict.reason not in _CONFLICTS or not newest.has_more:
            raise
        try:
            return _steps(roots, _gathered(roots, present, look_up, VERSIONS_MAX))
        except HocketError as error:
            if error.reason is Reason.TOO_MANY_EXPERTS:
                raise conflict from error
            raise


@dataclass(slots=True)
class _Choice:
    """What a plan may choose from.

    Attributes:
        packages: What is not in the registry.
        available: All candidates, by name and digest.
        left_out: What the registry would never take.
        has_more: Whether there may be older versions.
    """

    packages: dict[Candidate, Prepared] = field(default_factory=dict)
    available: dict[tuple[str, str], Candidate] = field(default_factory=dict)
    left_out: list[HocketError] = field(default_factory=list)
    has_more: bool = False

    def add(self, package: Prepared) -> Candidate | None:
        """Have an expert to choose, unless the very same is there; None if the package is none."""
        own = package.candidate
        if own is not None and _key(own) not in self.available:
            self.available[_key(own)] = own
            self.packages[own] = package
        return None if own is None else self.available[_key(own)]


def _steps(roots: Sequence[Prepared], choice: _Choice) -> tuple[Step, ...]:
    """What serves every root, each by itself."""
    steps: dict[tuple[str, str], Step] = {}
    for root in roots:
        own = root.candidate
        if own is None:
            steps.setdefault((str(root), root.facts.digest), Step(str(root), root.facts.digest, (_ASKED,), root))
            continue
        names = (own.publisher, own.name)  # a bare version would mean other builds too, and other unsigned files
        others = [each for each in choice.available.values() if (each.publisher, each.name) != names]
        for chosen in _resolved(own, others, choice.left_out):
            expert = chosen.candidate
            name = str(expert).removeprefix("/")
            step = Step(name, expert.digest, chosen.why, choice.packages.get(expert))
            steps.setdefault((name, expert.digest), step)
    return tuple(steps.values())


def _resolved(own: Candidate, others: Iterable[Candidate], left_out: Sequence[HocketError]) -> tuple[Chosen, ...]:
    try:
        return resolve([Requirement(own.name, Range.parse(own.version), own.publisher)], [own, *others]).experts
    except HocketError as error:
        if error.reason is not Reason.REQUIREMENT_MISSING or not left_out:
            raise
        first = left_out[0]
        raise HocketError(first.reason, f"{first.message}; without it {error.message}", field=first.field) from error


def _gathered(roots: Sequence[Prepared], present: Iterable[Candidate], look_up: LookUp, versions_max: int) -> _Choice:
    """Everything that roots and their requirements lead to."""
    choice = _Choice(available={_key(each): each for each in present})
    waiting = [own for root in roots if (own := choice.add(root)) is not None]
    looked: set[Requirement] = set()
    while waiting:
        expert = waiting.pop()
        for need in _needs(expert):
            if need in looked:
                continue
            looked.add(need)
            there = [each for each in choice.available.values() if _fits(need, each)]
            if not there:
                home = choice.packages[expert].commit if expert in choice.packages else None
                found = look_up(need, home, versions_max)
                choice.left_out.extend(found.left_out)
                choice.has_more = choice.has_more or found.has_more
                there = [own for package in found.packages if (own := choice.add(package)) is not None]
            waiting.extend(there)
            if len(choice.packages) > FETCHED_MAX + len(roots):
                raise HocketError(
                    Reason.TOO_MANY_EXPERTS, f"the requirements lead to more than {FETCHED_MAX} packages: require fewer"
                )
    return choice


def _needs(expert: Candidate) -> Iterator[Requirement]:
    for text in expert.constraints.requires:
        try:
            need = Requirement.parse(text)
        except HocketError as error:
            raise HocketError(error.reason, f"{expert} cannot be installed: {error.message}") from error
        yield replace(need, publisher=need.owner(expert.publisher))


def _fits(need: Requirement, expert: Candidate) -> bool:
    same = (need.publisher, need.name) == (expert.publisher, expert.name)
    return same and need.range.allows(Version.parse(expert.version))


def _key(expert: Candidate) -> tuple[str, str]:
    return str(expert), expert.digest
