"""Which experts make up a composition: what was asked for, and everything that requires.

The newest versions that go together are chosen, those asked for first. Two experts go together if neither lists the
other in `incompatible_with` and both can ride on the same base. A bare name in `requires` means an expert of the same
publisher, so that nobody else can step in by publishing that name; in `incompatible_with` it means any publisher's.

The search is `resolvelib`'s. It knows requirements only; that an expert must not be there is told to it as a
requirement on that name which "no version at all" fulfils as well. Work is bounded: a catalogue made to be hard ends in
a refusal.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, islice
from typing import TYPE_CHECKING, Final, TypeAlias

from resolvelib import AbstractProvider, BaseReporter, ResolutionImpossible, ResolutionTooDeep
from resolvelib.resolvers import Resolution as Search

from hocket.errors import HocketError, Reason
from hocket.identity import check_name
from hocket.packages.expert.bases import Match, compatibility
from hocket.versions import ANY, Range, Version

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from resolvelib.structs import RequirementInformation

    from hocket.packages.adapter import BaseModel, Constraints

EXPERTS_MAX: Final = 10
"""Most experts in one composition."""
_PATTERN_CHARS_MAX: Final = 512
_PATTERN: Final = re.compile(r"(?:([^/@<>=\s]+)/)?([^/@<>=\s]+) *(?:@(.*)|([<>=].*))?")
_STEPS_MAX: Final = 40_000
"""Comparisons of one resolution; ten experts with a hundred versions each take half of that."""
_ROUNDS_MAX: Final = 2_000
_SHOWN_MAX: Final = 5
_MESSAGE_CHARS_MAX: Final = 2_000
_REASONS: Final = (Reason.EXPERTS_INCOMPATIBLE, Reason.BASE_MISMATCH)

_Key: TypeAlias = tuple[str, str]
_Cause: TypeAlias = "RequirementInformation[_Rule, _Choice]"
_ABSENT: Final = -1


@dataclass(frozen=True, slots=True)
class Requirement:
    """A pattern that names experts.

    Attributes:
        name: Of the expert, whole.
        range: Of its versions.
        publisher: Whose; None where the place it stands in decides.
    """

    name: str
    range: Range = ANY
    publisher: str | None = None

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read `name`, `name@range`, `name<=0.9.0` or either with `publisher/` before it.

        Raises:
            HocketError: `BAD_REQUEST` for anything else.
        """
        match = _PATTERN.fullmatch(text) if len(text) <= _PATTERN_CHARS_MAX else None
        if match is None:
            raise HocketError(
                Reason.BAD_REQUEST, f"{text[:80]!r} names no experts: write name, name@range or publisher/name@range"
            )
        publisher, name, after_at, after_name = match.groups()
        stated = after_at if after_at is not None else after_name
        return cls(
            name=check_name(name),
            range=ANY if stated is None else Range.parse(stated),
            publisher=None if publisher is None else check_name(publisher, "publisher"),
        )

    def __str__(self) -> str:
        owner = "" if self.publisher is None else f"{self.publisher}/"
        return f"{owner}{self.name}{f'@{self.range}' if self.range.comparators else ''}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A released expert that may be chosen.

    Attributes:
        digest: Of its package.
        publisher: Who released it.
        name: As released.
        version: As released.
        base: What it rides on.
        constraints: How it goes together with others, as its manifest says.
    """

    digest: str
    publisher: str
    name: str
    version: str
    base: BaseModel
    constraints: Constraints

    def __str__(self) -> str:
        return f"{self.publisher}/{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One expert of a composition.

    Attributes:
        candidate: The expert.
        why: Why it is there, a sentence each; at least one.
    """

    candidate: Candidate
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resolution:
    """A composition.

    Attributes:
        experts: In the order in which they compose: what an expert requires before it, otherwise by load order and
            name.
        warnings: What a person should know.
    """

    experts: tuple[Chosen, ...]
    warnings: tuple[str, ...] = ()


def resolve(wanted: Sequence[Requirement], available: Iterable[Candidate]) -> Resolution:
    """Choose experts.

    The result depends on what is wanted and available, not on the order in which either is listed.

    Args:
        wanted: What was asked for; each with its publisher.
        available: Every expert that may be chosen. Withdrawn ones should be left out.

    Raises:
        HocketError: `REQUIREMENT_MISSING` if no version of an expert fulfils what is required of it;
            `EXPERTS_INCOMPATIBLE` if experts exclude each other, or no answer was found within bounds;
            `BASE_MISMATCH` if they ride on different bases; `REQUIREMENT_CYCLE` if an expert requires itself in the
            end; `TOO_MANY_EXPERTS` for more than `EXPERTS_MAX` or than one of them allows; `BAD_REQUEST` if a
            publisher is missing from what is wanted.
    """
    if len({(each.publisher, each.name) for each in wanted}) > EXPERTS_MAX:
        raise _too_many(f"{len(wanted)} experts were asked for; at most {EXPERTS_MAX} go together")
    catalogue = _Catalogue(available)
    try:
        catalogue.reach(wanted)
        roots = [catalogue.need(each) for each in sorted(wanted, key=str)]
        try:
            chosen = _choose(catalogue, roots)
        except ResolutionImpossible as error:
            raise _impossible(catalogue, error.causes) from error
    except (ResolutionTooDeep, _TooMuchWorkError) as error:
        raise HocketError(
            Reason.EXPERTS_INCOMPATIBLE,
            "no experts that go together were found within bounds; ask for exact versions (publisher/name@1.0.0)",
        ) from error
    why = _reasons(roots, chosen)
    order = _ordered([chosen[key] for key in sorted(why)])
    _check_count(order)
    return Resolution(tuple(Chosen(each.candidate, tuple(why[each.key])) for each in order), tuple(_warnings(order)))


@dataclass(frozen=True, slots=True, eq=False)
class _Expert:
    """A candidate whose constraints were read."""

    position: int
    candidate: Candidate
    version: Version
    requires: tuple[Requirement, ...]
    incompatible_with: Mapping[str, tuple[Requirement, ...]]  # by name

    @property
    def key(self) -> _Key:
        return self.candidate.publisher, self.candidate.name


@dataclass(frozen=True, slots=True, eq=False)
class _Absence:
    """No version of an expert."""

    key: _Key
    position: int = _ABSENT


_Choice: TypeAlias = _Expert | _Absence


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """A condition on the choice of one expert.

    Attributes:
        key: Publisher and name of that expert.
        allowed: Positions of the choices that fulfil it.
        requirement: What it comes from; None if it keeps out what does not go together with its owner.
    """

    key: _Key
    allowed: frozenset[int]
    requirement: Requirement | None = None


class _TooMuchWorkError(Exception):
    """The search has come to `_STEPS_MAX`."""


class _Catalogue:
    """The candidates, read as far as they come into reach, and how much work that took."""

    def __init__(self, available: Iterable[Candidate]) -> None:
        self._available: dict[_Key, list[Candidate]] = defaultdict(list)
        for candidate in available:
            self._available[candidate.publisher, candidate.name].append(candidate)
        self._experts: dict[_Key, tuple[_Expert, ...]] = {}
        self._patterns: dict[tuple[str, str | None], Requirement] = {}
        self._needs: dict[Requirement, _Rule] = {}
        self._rules: dict[int, tuple[_Rule, ...]] = {}
        self._count = 0
        self._steps = 0
        self.unreadable: dict[_Key, list[str]] = defaultdict(list)

    def spend(self, steps: int) -> None:
        """Count work.

        Raises:
            _TooMuchWorkError: When it has been too much.
        """
        self._steps += steps
        if self._steps > _STEPS_MAX:
            raise _TooMuchWorkError

    def reach(self, wanted: Iterable[Requirement]) -> None:
        """Read every expert that may have to be there."""
        keys = deque(sorted(map(_key_of, wanted)))
        while keys:
            key = keys.popleft()
            if key not in self._experts:
                keys.extend(_key_of(each) for expert in self.experts(key) for each in expert.requires)

    def experts(self, key: _Key) -> tuple[_Expert, ...]:
        """The versions of one expert, the newest first."""
        if key not in self._experts:
            read = [expert for each in self._available.get(key, ()) if (expert := self._read(each)) is not None]
            read.sort(key=lambda expert: (expert.version, expert.candidate.digest), reverse=True)
            self._experts[key] = tuple(replace(each, position=self._count + n) for n, each in enumerate(read))
            self._count += len(read)
        return self._experts[key]

    def _read(self, candidate: Candidate) -> _Expert | None:
        constraints = candidate.constraints
        self.spend(1)
        patterns: dict[str, list[Requirement]] = defaultdict(list)
        try:
            version = Version.parse(candidate.version)
            requires = [self._pattern(text, candidate.publisher) for text in constraints.requires]
            for text in constraints.incompatible_with:
                patterns[(pattern := self._pattern(text, None)).name].append(pattern)
        except HocketError as error:
            self.unreadable[candidate.publisher, candidate.name].append(f"{candidate} is left out: {error.message}")
            return None
        return _Expert(
            position=0,
            candidate=candidate,
            version=version,
            requires=tuple(requires),
            incompatible_with={name: tuple(each) for name, each in patterns.items()},
        )

    def _pattern(self, text: str, publisher: str | None) -> Requirement:
        """Read a pattern; the versions of an expert share most of theirs."""
        if (pattern := self._patterns.get((text, publisher))) is None:
            self.spend(4)
            pattern = Requirement.parse(text)
            pattern = self._patterns[text, publisher] = replace(pattern, publisher=pattern.publisher or publisher)
        return pattern

    def rules(self, expert: _Expert) -> tuple[_Rule, ...]:
        """What choosing an expert asks of the other choices."""
        if expert.position not in self._rules:
            needs = [self.need(each) for each in expert.requires]
            self._rules[expert.position] = (*needs, *self._exclusions(expert))
        return self._rules[expert.position]

    def need(self, requirement: Requirement) -> _Rule:
        """The rule of a requirement, whose publisher is known."""
        if requirement not in self._needs:
            key = _key_of(requirement)
            experts = self.experts(key)
            self.spend(1 + len(experts))
            allowed = frozenset(each.position for each in experts if requirement.range.allows(each.version))
            self._needs[requirement] = _Rule(key, allowed, requirement)
        return self._needs[requirement]

    def _exclusions(self, expert: _Expert) -> Iterator[_Rule]:
        for key, others in self._experts.items():
            clashing = {each.position for each in others if key != expert.key and self.clash(expert, each)}
            if clashing:
                yield _Rule(key, frozenset({_ABSENT, *(each.position for each in others)} - clashing))

    def clash(self, one: _Expert, other: _Expert) -> HocketError | None:
        """Why two experts do not go together; None if they do."""
        for owner, target in ((one, other), (other, one)):
            patterns = owner.incompatible_with.get(target.candidate.name, ())
            self.spend(1 + len(patterns))
            for pattern in patterns:
                same_publisher = pattern.publisher in {None, target.candidate.publisher}
                if same_publisher and pattern.range.allows(target.version, prereleases=True):
                    message = f"{owner.candidate} is incompatible with {pattern}, and {target.candidate} is one"
                    return HocketError(Reason.EXPERTS_INCOMPATIBLE, message)
        bases = compatibility(one.candidate.base, other.candidate.base)
        if bases.match is Match.DIFFERENT:
            message = f"{one.candidate} and {other.candidate} ride on different bases: {bases.explanation}"
            return HocketError(Reason.BASE_MISMATCH, message)
        return None


class _Provider(AbstractProvider[_Rule, _Choice, _Key]):
    """Tells the search what there is. What was asked for is chosen first, then what that requires."""

    def __init__(self, catalogue: _Catalogue) -> None:
        self._catalogue = catalogue

    def identify(self, requirement_or_candidate: _Rule | _Choice) -> _Key:
        return requirement_or_candidate.key

    def get_preference(
        self,
        identifier: _Key,
        resolutions: Mapping[_Key, _Choice],  # noqa: ARG002 - the interface
        candidates: Mapping[_Key, Iterator[_Choice]],  # noqa: ARG002 - the interface
        information: Mapping[_Key, Iterator[_Cause]],
        backtrack_causes: Sequence[_Cause],  # noqa: ARG002 - the interface
    ) -> tuple[bool, bool, _Key]:
        known = list(information[identifier])
        self._catalogue.spend(len(known))
        return (
            all(each.parent is not None for each in known),
            all(each.requirement.requirement is None for each in known),
            identifier,
        )

    def find_matches(
        self,
        identifier: _Key,
        requirements: Mapping[_Key, Iterator[_Rule]],
        incompatibilities: Mapping[_Key, Iterator[_Choice]],
    ) -> list[_Choice]:
        rules = list(requirements[identifier])
        excluded = {each.position for each in incompatibilities[identifier]}
        choices: tuple[_Choice, ...] = (_Absence(identifier), *self._catalogue.experts(identifier))
        self._catalogue.spend(len(rules) + len(choices))
        return [
            choice
            for choice in choices
            if choice.position not in excluded and all(choice.position in rule.allowed for rule in rules)
        ]

    def is_satisfied_by(self, requirement: _Rule, candidate: _Choice) -> bool:
        self._catalogue.spend(1)
        return candidate.position in requirement.allowed

    def get_dependencies(self, candidate: _Choice) -> Iterable[_Rule]:
        return self._catalogue.rules(candidate) if isinstance(candidate, _Expert) else ()


def _choose(catalogue: _Catalogue, roots: Sequence[_Rule]) -> dict[_Key, _Expert]:
    """An expert for every name that is needed, and perhaps for some that the search tried and left.

    The search would rather lower what it already chose than go back, so newer versions of each expert that was asked
    for are tried once more, as far as the bound on work allows.
    """
    rules = list(roots)
    chosen = _search(catalogue, rules)
    for root in roots:
        for expert in catalogue.experts(root.key):
            if expert is chosen[root.key]:
                break
            with suppress(ResolutionImpossible, ResolutionTooDeep, _TooMuchWorkError):
                chosen = _search(catalogue, [*rules, _Rule(root.key, frozenset({expert.position}))])
                break
        rules.append(_Rule(root.key, frozenset({chosen[root.key].position})))
    return chosen


def _search(catalogue: _Catalogue, rules: Sequence[_Rule]) -> dict[_Key, _Expert]:
    # Not through Resolver: to trim its result it recurses, without end where dropped choices refer to each other.
    search: Search[_Rule, _Choice, _Key] = Search(_Provider(catalogue), BaseReporter())
    pinned = search.resolve(rules, max_rounds=_ROUNDS_MAX).mapping
    return {key: choice for key, choice in pinned.items() if isinstance(choice, _Expert)}


def _key_of(requirement: Requirement) -> _Key:
    if requirement.publisher is None:
        raise HocketError(
            Reason.BAD_REQUEST, f"say whose expert {requirement} is: publisher/{requirement}", field="publisher"
        )
    return requirement.publisher, requirement.name


def _reasons(roots: Sequence[_Rule], experts: Mapping[_Key, _Expert]) -> dict[_Key, dict[str, None]]:
    """Why each expert is there. What the search tried and no longer needs is not among them."""
    why: dict[_Key, dict[str, None]] = {}
    due = deque((root.key, "it was asked for") for root in roots)
    while due:
        key, reason = due.popleft()
        if key not in why:
            why[key] = {}
            owner = experts[key]
            due.extend((_key_of(each), f"{owner.candidate} requires {each}") for each in owner.requires)
        why[key][reason] = None
    return why


def _ordered(experts: Sequence[_Expert]) -> list[_Expert]:
    """What is required before what requires it, otherwise by load order and name.

    Raises:
        HocketError: `REQUIREMENT_CYCLE`, naming the chain.
    """
    by_key = {each.key: each for each in experts}
    sorter = TopologicalSorter({each.key: [_key_of(need) for need in each.requires] for each in experts})
    try:
        sorter.prepare()
    except CycleError as error:
        chain = " requires ".join(str(by_key[key].candidate) for key in reversed(error.args[1]))
        raise HocketError(
            Reason.REQUIREMENT_CYCLE,
            f"these experts require each other; drop a requirement: {chain[:_MESSAGE_CHARS_MAX]}",
        ) from error
    ready: list[tuple[int, str, str]] = []
    order = []
    while sorter.is_active():
        for publisher, name in sorter.get_ready():
            heapq.heappush(ready, (by_key[publisher, name].candidate.constraints.load_order, name, publisher))
        _, name, publisher = heapq.heappop(ready)
        order.append(by_key[publisher, name])
        sorter.done((publisher, name))
    return order


def _check_count(experts: Sequence[_Expert]) -> None:
    listed = ", ".join(str(each.candidate) for each in experts)
    if len(experts) > EXPERTS_MAX:
        raise _too_many(f"{len(experts)} experts are needed, and at most {EXPERTS_MAX} go together: {listed[:1000]}")
    for each in experts:
        most = each.candidate.constraints.max_chain
        if most is not None and len(experts) > most:
            raise _too_many(f"{each.candidate} goes together with at most {most} experts, itself counted: {listed}")


def _warnings(experts: Sequence[_Expert]) -> dict[str, None]:
    """What is only probably so; each once."""
    compared = (compatibility(one.candidate.base, other.candidate.base) for one, other in combinations(experts, 2))
    return dict.fromkeys(f"the bases: {each.explanation}" for each in compared if each.match is Match.BY_NAME)


def _impossible(catalogue: _Catalogue, causes: Collection[_Cause]) -> HocketError:
    """Who required what, what was there, and what does not go together."""
    clashes = list(_clashes(catalogue, causes))
    keys = sorted({rule.key for rule, _ in causes if rule.requirement is not None})
    unmet = (_unmet(catalogue, key, causes) for key in keys[:_SHOWN_MAX])
    said = ". ".join(filter(None, [_few({clash.message: None for clash in clashes}), *unmet]))
    reasons = {clash.reason for clash in clashes}
    reason = next(filter(reasons.__contains__, _REASONS), Reason.REQUIREMENT_MISSING)
    return HocketError(reason, f"no choice of experts goes together: {said[:_MESSAGE_CHARS_MAX]}")


def _clashes(catalogue: _Catalogue, causes: Collection[_Cause]) -> Iterator[HocketError]:
    """Of each exclusion among the causes, the newest expert that it keeps out and that would have done."""
    for exclusion, owner in causes:
        if exclusion.requirement is None and isinstance(owner, _Expert):
            needs = [rule for rule, _ in causes if rule.key == exclusion.key and rule.requirement is not None]
            for expert in catalogue.experts(exclusion.key):
                would_do = all(expert.position in need.allowed for need in needs)
                if would_do and (clash := catalogue.clash(owner, expert)) is not None:
                    yield clash
                    break


def _unmet(catalogue: _Catalogue, key: _Key, causes: Collection[_Cause]) -> str:
    """What was required of one expert, and what there is of it."""
    asked = {
        f"{owner.candidate} requires {rule.requirement}"
        if isinstance(owner, _Expert)
        else f"{rule.requirement} was asked for"
        for rule, owner in causes
        if rule.key == key and rule.requirement is not None
    }
    versions = [each.version.text for each in catalogue.experts(key)]
    there = f"of {'/'.join(key)} there is {_few(versions) or 'none'}"
    return "; ".join([_few(sorted(asked)), there, *catalogue.unreadable[key][:_SHOWN_MAX]])


def _few(texts: Collection[str]) -> str:
    more = len(texts) - _SHOWN_MAX
    return ", ".join([*islice(texts, _SHOWN_MAX), *([f"and {more} more"] if more > 0 else [])])


def _too_many(problem: str) -> HocketError:
    return HocketError(Reason.TOO_MANY_EXPERTS, problem)
