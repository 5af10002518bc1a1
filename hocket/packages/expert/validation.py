"""Whether a package is fit to be published: everything that its author should know, at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError
from hocket.identity import check_name, check_version, digest_of
from hocket.packages.expert import gbnf
from hocket.packages.expert.archive import read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.names import MANIFEST
from hocket.packages.expert.reader import decode_archive
from hocket.packages.expert.strict import Problem, problems
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hocket.packages.adapter import AdapterFacts
    from hocket.packages.limits import Limits

_USE_GRAMMAR: Final = "training.decoding.use_grammar"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        errors: Why a registry would refuse the package, or no answer could follow its grammar; with `strict` also what
            it lacks for others.
        warnings: What a person should know.
        facts: What the package is; None if it cannot be read.
    """

    errors: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()
    facts: AdapterFacts | None = None


def validate(data: bytes, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> Report:
    """Read a package as a registry would, and its grammar as a worker would.

    Args:
        data: The whole file.
        strict: Whether to ask for what upstream's parser, its schema and its guides ask authors for.
        limits: Bounds on sizes.
    """
    try:
        archive = read_archive(data, limits)
        facts, adapter = decode_archive(archive, digest_of(data), len(data), limits)
    except HocketError as error:
        return Report((Problem(error.field or "", error.message),))
    errors, warnings = [*_refused_at_the_door(facts)], list(facts.warnings)
    if adapter.grammar is not None and (problem := gbnf.problem_of(adapter.grammar)) is not None:
        if facts.uses_grammar:
            errors.append(Problem(_USE_GRAMMAR, f"is true, and {problem}; mend it, or every answer is refused"))
        else:
            warnings.append(f"{problem}; answers do not follow it, since the manifest does not say use_grammar")
    if strict:
        errors += _missed_by_others(archive.files, limits)
    return Report(tuple(errors), tuple(warnings), facts)


def _refused_at_the_door(facts: AdapterFacts) -> Iterator[Problem]:
    """What a registry refuses in a package that can be read, but for what it requires and who signed it."""
    if facts.not_servable is not None:
        yield Problem("", facts.not_servable)
    for path, text, check in (("name", facts.name, check_name), ("version", facts.version, check_version)):
        try:
            check(text)
        except HocketError as error:
            yield Problem(path, error.message)
    for key in ("requires", "incompatible_with"):
        for place, pattern in enumerate(getattr(facts.constraints, key)):
            path = f"constraints.{key}[{place}]"
            try:
                named = Requirement.parse(pattern)
            except HocketError as error:
                yield Problem(path, error.message)
                continue
            if key == "requires" and (named.publisher, named.name) == (None, facts.name):
                yield Problem(path, f"{pattern} is the expert itself; drop it")


def _missed_by_others(files: Mapping[str, bytes], limits: Limits) -> list[Problem]:
    """What authors are asked for, and what upstream's parser refuses beyond that."""
    found = problems(parse_manifest(files[MANIFEST], limits=limits), files)
    try:
        parse_manifest(files[MANIFEST], upstream=True, limits=limits)
    except HocketError as error:
        if error.field not in {problem.path for problem in found}:
            found.append(Problem(error.field or "", error.message))
    return found
