"""Which experts make up a composition: what was asked for, and everything that requires.

The newest versions that go together are chosen, those asked for first. Two experts go together if neither lists the
other in `incompatible_with` and both can ride on the same base. A bare name in `requires` means an expert of the same
publisher, so that nobody else can step in by publishing that name; in `incompatible_with` it means any publisher's.

The search chooses one expert after the other, the newest version first, and goes back where it comes to a conflict.
A conflict is kept as the traits of chosen experts that it rests on (backjumping with learned conflicts, as in Dechter,
Constraint Processing, chapter 6): versions that share those traits are not tried again, and choices that have no part
in it are not changed. Constraints are read only of versions that are tried. Work is bounded: a catalogue made to be
hard ends in a refusal.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from hocket.bases import Match, compatibility
from hocket.errors import HocketError, Reason
from hocket.requirements import Requirement, spelled
from hocket.text_limits import EXPERTS_MAX
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from hocket.bases import BaseModel
    from hocket.requirements import Constraints

_WORK_MAX: Final = 100_000
"""Of one resolution, in steps such as asking whether a range allows a version: a microsecond each."""
_SHOWN_MAX: Final = 5
_MESSAGE_CHARS_MAX: Final = 2_000
_REASONS: Final = (
    Reason.EXPERTS_INCOMPATIBLE,
    Reason.BASE_MISMATCH,
    Reason.TOO_MANY_EXPERTS,
    Reason.REQUIREMENT_MISSING,
)
"""Of several problems, which gives its reason to the refusal."""

_Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A released expert that may be chosen.

    Attributes:
        digest: Of its package.
        publisher: Who released it; empty if nobody did.
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
        return f"{spelled(self.publisher, self.name)}@{self.version}"


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
            `EXPERTS_INCOMPATIBLE` if experts exclude each other; `BASE_MISMATCH` if they ride on different bases;
            `TOO_MANY_EXPERTS` for more than `EXPERTS_MAX` or than one of them allows; `REQUIREMENT_CYCLE` if an expert
            requires itself in the end; `RESOLUTION_TOO_HARD` if no answer was found within bounds; `BAD_REQUEST` if
            a publisher is missing from what is wanted.
    """
    roots = tuple(_Need(each) for each in sorted(wanted, key=str))
    try:
        chosen, needs = _Search(available).completed({}, roots)
    except _ConflictError as conflict:
        raise _refusal(conflict) from conflict
    why: dict[_Key, dict[str, None]] = defaultdict(dict)
    for need in needs:
        why[need.key]["it was asked for" if need.owner is None else str(need)] = None
    order = _ordered(chosen)
    return Resolution(tuple(Chosen(each.candidate, tuple(why[each.key])) for each in order), tuple(_warnings(order)))


@dataclass(frozen=True, slots=True, eq=False)
class _Expert:
    """A candidate whose constraints were read."""

    candidate: Candidate
    version: Version
    requires: tuple[Requirement, ...]
    incompatible_with: Mapping[str, Sequence[Requirement]]  # by name

    @property
    def key(self) -> _Key:
        return self.candidate.publisher, self.candidate.name


@dataclass(frozen=True, slots=True, eq=False)
class _Need:
    """That an expert has to be there, in a version that will do.

    Attributes:
        requirement: Which; its publisher is known.
        owner: Who requires it; None if it was asked for.
    """

    requirement: Requirement
    owner: _Expert | None = None

    @property
    def key(self) -> _Key:
        if self.requirement.publisher is None:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"say whose expert {self.requirement} is: publisher/{self.requirement}",
                field="publisher",
            )
        return self.requirement.publisher, self.requirement.name

    def traits(self) -> set[_Trait]:
        """Why it is there."""
        return set() if self.owner is None else {_Trait(self.owner.key, _requires, self.requirement)}

    def __str__(self) -> str:
        if self.owner is None:
            return f"{self.requirement} was asked for"
        return f"{self.owner.candidate} requires {self.requirement}"


class _Trait(NamedTuple):
    """Something about the version chosen of an expert that has a part in a conflict.

    Attributes:
        key: Publisher and name of the expert.
        test: Whether a version has it.
        value: What the test compares with.
    """

    key: _Key
    test: Callable[[_Expert, Any], bool]
    value: Any


def _requires(expert: _Expert, requirement: Requirement) -> bool:
    return requirement in expert.requires


def _excludes(expert: _Expert, pattern: Requirement) -> bool:
    return pattern in expert.incompatible_with.get(pattern.name, ())


def _is_excluded(expert: _Expert, pattern: Requirement) -> bool:
    same_publisher = pattern.publisher in {None, expert.candidate.publisher}
    return same_publisher and pattern.range.allows(expert.version, prereleases=True)


def _is_outside(expert: _Expert, range_: Range) -> bool:
    return not range_.allows(expert.version)


def _cannot_ride_on(expert: _Expert, base: BaseModel) -> bool:
    return compatibility(expert.candidate.base, base).match is Match.DIFFERENT


def _rides_on(expert: _Expert, base: BaseModel) -> bool:
    return expert.candidate.base == base


def _accepts(expert: _Expert, experts_max: int) -> bool:
    return expert.candidate.constraints.max_chain == experts_max


_Terms: TypeAlias = tuple[tuple[Requirement, ...], "Mapping[str, Sequence[Requirement]]"]
"""What an expert requires, and what it excludes by name."""


class _ConflictError(Exception):
    """No composition has experts of all these traits.

    Attributes:
        traits: What the conflict rests on, apart from what was asked for and what there is.
        problems: What was found out on the way, for people, each with its reason.
    """

    def __init__(self, traits: set[_Trait], problems: dict[str, Reason]) -> None:
        super().__init__()
        self.traits = traits
        self.problems = problems


class _Search:
    """The candidates, read as far as they are tried, and how much work that took."""

    def __init__(self, available: Iterable[Candidate]) -> None:
        self._available: dict[_Key, list[Candidate]] = defaultdict(list)
        for candidate in available:
            self._available[candidate.publisher, candidate.name].append(candidate)
        self._versions: dict[str, Version] = {}
        self._newest_first: dict[_Key, list[Candidate]] = {}
        self._terms: dict[tuple[str, tuple[str, ...], tuple[str, ...]], _Terms] = {}
        self._patterns: dict[tuple[str, str | None], Requirement] = {}
        self._unreadable: dict[_Key, set[str]] = defaultdict(set)
        self._work = 0

    def completed(
        self, chosen: Mapping[_Key, _Expert], needs: Sequence[_Need]
    ) -> tuple[Mapping[_Key, _Expert], Sequence[_Need]]:
        """Add an expert for every need that has none, and for the needs that come with it.

        Args:
            chosen: Experts that go together.
            needs: What was asked for, and what those require.

        Raises:
            _ConflictError: If that cannot be done.
        """
        self._check_count(chosen, needs)
        key = next((need.key for need in needs if need.key not in chosen), None)
        if key is None:
            return chosen, needs
        due = [need for need in needs if need.key == key]
        in_the_way = {due[0]}
        conflict = _ConflictError(set(), {})
        learned: list[list[_Trait]] = []
        releases = self._releases(key)
        tried = 0
        for candidate in releases:
            self._spend(len(due) + len(learned))
            if (refusing := _refusing(due, self._versions[candidate.version])) is not None:
                in_the_way.add(refusing)
                continue
            if (expert := self._expert(candidate)) is None:
                continue
            tried += 1
            if any(all(trait.test(expert, trait.value) for trait in traits) for traits in learned):
                continue
            try:
                return self._with(expert, chosen, needs)
            except _ConflictError as error:
                own = [trait for trait in error.traits if trait.key == key]
                if not own:
                    raise
                learned.append(own)
                conflict.traits |= error.traits.difference(own)
                conflict.problems |= error.problems
                self._spend(len(error.traits) + len(error.problems))
        conflict.traits.update(*(need.traits() for need in in_the_way))
        if tried == 0 or tried < len(releases):
            conflict.problems |= self._unmet(key, due)
        raise conflict

    def _with(
        self, expert: _Expert, chosen: Mapping[_Key, _Expert], needs: Sequence[_Need]
    ) -> tuple[Mapping[_Key, _Expert], Sequence[_Need]]:
        """Choose an expert, and complete that."""
        for other in chosen.values():
            self._check_pair(other, expert)
        chosen = {**chosen, expert.key: expert}
        needs = [*needs, *(_Need(requirement, expert) for requirement in expert.requires)]
        self._spend(len(needs))
        for need in needs:
            range_, present = need.requirement.range, chosen.get(need.key)
            if need.owner is expert and present is not None and _is_outside(present, range_):
                traits = {*need.traits(), _Trait(present.key, _is_outside, range_)}
                raise _ConflictError(traits, self._unmet(need.key, [each for each in needs if each.key == need.key]))
        return self.completed(chosen, needs)

    def _check_pair(self, one: _Expert, other: _Expert) -> None:
        for owner, target in ((one, other), (other, one)):
            patterns = owner.incompatible_with.get(target.candidate.name, ())
            self._spend(2 + len(patterns))
            for pattern in patterns:
                if _is_excluded(target, pattern):
                    message = f"{owner.candidate} is incompatible with {pattern}, and {target.candidate} is one"
                    traits = {_Trait(owner.key, _excludes, pattern), _Trait(target.key, _is_excluded, pattern)}
                    raise _ConflictError(traits, {message: Reason.EXPERTS_INCOMPATIBLE})
        bases = compatibility(one.candidate.base, other.candidate.base)
        if bases.match is Match.DIFFERENT:
            message = f"{one.candidate} and {other.candidate} ride on different bases: {bases.explanation}"
            traits = {_Trait(one.key, _rides_on, one.candidate.base)}
            traits.add(_Trait(other.key, _cannot_ride_on, one.candidate.base))
            raise _ConflictError(traits, {message: Reason.BASE_MISMATCH})

    def _check_count(self, chosen: Mapping[_Key, _Expert], needs: Sequence[_Need]) -> None:
        by_key: dict[_Key, _Need] = {}
        for need in needs:
            by_key.setdefault(need.key, need)
        self._spend(len(needs))
        listed = ", ".join(spelled(*key) for key in by_key)[:1000]
        if len(by_key) > EXPERTS_MAX:
            said = f"{len(by_key)} experts are needed, and at most {EXPERTS_MAX} go together: {listed}"
            traits = set().union(*(need.traits() for need in islice(by_key.values(), EXPERTS_MAX + 1)))
            raise _ConflictError(traits, {said: Reason.TOO_MANY_EXPERTS})
        for expert in chosen.values():
            most = expert.candidate.constraints.max_chain
            if most is not None and len(by_key) > most:
                said = f"{expert.candidate} goes together with at most {most} experts, itself counted: {listed}"
                traits = set().union(*(need.traits() for need in by_key.values()))
                raise _ConflictError(traits | {_Trait(expert.key, _accepts, most)}, {said: Reason.TOO_MANY_EXPERTS})

    def _releases(self, key: _Key) -> list[Candidate]:
        """The versions of an expert, the newest first."""
        if key not in self._newest_first:
            candidates = self._available.get(key, [])
            for each in candidates:
                if each.version not in self._versions:  # most experts have the same versions
                    self._read_version(each)
            readable = [each for each in candidates if each.version in self._versions]
            if len({each.version for each in readable}) < len(readable):
                readable.sort(key=lambda each: each.digest)
            readable.sort(key=lambda each: self._versions[each.version].order, reverse=True)
            self._newest_first[key] = readable
        return self._newest_first[key]

    def _read_version(self, candidate: Candidate) -> None:
        try:
            self._versions[candidate.version] = Version.parse(candidate.version)
        except HocketError as error:
            self._leave_out(candidate, error)

    def _expert(self, candidate: Candidate) -> _Expert | None:
        """A candidate with its constraints; None if they cannot be read. Most versions of an expert have the same."""
        same = candidate.publisher, candidate.constraints.requires, candidate.constraints.incompatible_with
        if same not in self._terms:
            try:
                self._terms[same] = self._read(*same)
            except HocketError as error:
                self._leave_out(candidate, error)
                return None
        return _Expert(candidate, self._versions[candidate.version], *self._terms[same])

    def _read(self, publisher: str, requires: Iterable[str], incompatible_with: Iterable[str]) -> _Terms:
        required = tuple(self._pattern(text, publisher) for text in requires)
        excluded: dict[str, list[Requirement]] = defaultdict(list)
        for text in incompatible_with:
            pattern = self._pattern(text, None)
            excluded[pattern.name].append(pattern)
        return required, excluded

    def _pattern(self, text: str, publisher: str | None) -> Requirement:
        """Read a pattern; different constraints share most of theirs."""
        self._spend(1)
        if (pattern := self._patterns.get((text, publisher))) is None:
            self._spend(10)
            pattern = Requirement.parse(text)
            owner = publisher if pattern.publisher is None else pattern.publisher
            pattern = self._patterns[text, publisher] = replace(pattern, publisher=owner)
        return pattern

    def _leave_out(self, candidate: Candidate, error: HocketError) -> None:
        self._unreadable[candidate.publisher, candidate.name].add(f"{candidate} is left out: {error.message}")

    def _unmet(self, key: _Key, needs: Iterable[_Need]) -> dict[str, Reason]:
        """What is needed of an expert, and what there is of it."""
        self._spend(20)
        there = _few([each.version for each in self._releases(key)])
        said = [_few(dict.fromkeys(map(str, needs))), f"of {spelled(*key)} there is {there or 'none'}"]
        return {"; ".join([*said, *sorted(self._unreadable[key])[:_SHOWN_MAX]]): Reason.REQUIREMENT_MISSING}

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > _WORK_MAX:
            raise HocketError(
                Reason.RESOLUTION_TOO_HARD,
                "whether these experts go together was not found out: there are too many ways to try. Ask for fewer "
                "experts, or for exact versions (publisher/name@1.0.0)",
            )


def _refusing(needs: Iterable[_Need], version: Version) -> _Need | None:
    for need in needs:
        if not need.requirement.range.allows(version):
            return need
    return None


def _refusal(conflict: _ConflictError) -> HocketError:
    problems = sorted(conflict.problems, key=lambda said: _REASONS.index(conflict.problems[said]))
    said = ". ".join(problems[:_SHOWN_MAX])
    return HocketError(
        conflict.problems[problems[0]], f"no choice of experts goes together: {said[:_MESSAGE_CHARS_MAX]}"
    )


def _ordered(chosen: Mapping[_Key, _Expert]) -> list[_Expert]:
    """What is required before what requires it, otherwise by load order and name.

    Raises:
        HocketError: `REQUIREMENT_CYCLE`, naming the chain.
    """
    sorter = TopologicalSorter({key: [_Need(each).key for each in chosen[key].requires] for key in sorted(chosen)})
    try:
        sorter.prepare()
    except CycleError as error:
        chain = " requires ".join(str(chosen[key].candidate) for key in reversed(error.args[1]))
        raise HocketError(
            Reason.REQUIREMENT_CYCLE,
            f"these experts require each other; drop a requirement: {chain[:_MESSAGE_CHARS_MAX]}",
        ) from error
    ready: list[tuple[int, str, str]] = []
    order = []
    while sorter.is_active():
        for publisher, name in sorter.get_ready():
            heapq.heappush(ready, (chosen[publisher, name].candidate.constraints.load_order, name, publisher))
        _, name, publisher = heapq.heappop(ready)
        order.append(chosen[publisher, name])
        sorter.done((publisher, name))
    return order


def _warnings(experts: Sequence[_Expert]) -> dict[str, None]:
    """What is only probably so; each once."""
    compared = (compatibility(one.candidate.base, other.candidate.base) for one, other in combinations(experts, 2))
    return dict.fromkeys(f"the bases: {each.explanation}" for each in compared if each.match is Match.BY_NAME)


def _few(texts: Collection[str]) -> str:
    more = len(texts) - _SHOWN_MAX
    return ", ".join([*islice(texts, _SHOWN_MAX), *([f"and {more} more"] if more > 0 else [])])
