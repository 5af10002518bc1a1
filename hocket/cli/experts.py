"""`hocket experts`: one expert with the workers that hold it, or the experts that go together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket.cli import describe, names, output, servers
from hocket.cli.groups import ExpertGroup
from hocket.composition import candidates
from hocket.errors import HocketError
from hocket.identity import is_digest
from hocket.requirements import Requirement
from hocket.resolution import resolve
from hocket.v1.package_pb2 import TRUST_STATE_ACTIVE
from hocket.versions import Range, Version

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from hocket.client.blocking import RegistryClient
    from hocket.resolution import Candidate, Resolution
    from hocket.v1.package_pb2 import AdapterFacts, ModelFacts, Package

_SHORT_VERSION: Final = re.compile(r"(?<=[<>=]) *[0-9]+(?:\.[0-9]+)?(?= *(?:,|$))")
"""`2` or `2.0` after a comparison, which semantic versions are not."""

app = typer.Typer(
    name="experts", cls=ExpertGroup, help="Show an expert, or which experts go together.", no_args_is_help=True
)


@app.command()
def show(
    package: Annotated[str, typer.Argument(help="Digest or [PUBLISHER/]NAME[@VERSION].", show_default=False)],
    *,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    router: servers.Router = servers.ROUTER_ADDRESS,
    json: output.Json = False,
) -> None:
    """Show one package.

    Without a version the newest is shown. The publisher may be left out
    when only one has such a name, and so may `expert-` at its beginning.
    Of a tensor expert also the workers that hold it in memory; of an
    adapter expert what fulfils its requirements in this registry now.

    $ hocket experts show sql
    $ hocket experts show acme/iris@1.0.0
    """
    with servers.registry(registry) as client:
        found = client.get_package(find_packages(client, package)[-1].digest)
        satisfied = _satisfied(found, client) if found.HasField("adapter") else {}
    if found.HasField("adapter"):
        if json:
            output.emit({**output.message_json(found), "satisfied_by": satisfied})
        else:
            _print_card(found, _adapter_facts(found.adapter, satisfied), found.adapter.format_version)
        return
    workers = _resident_workers(router, found.digest)
    if json:
        output.emit({**output.message_json(found), "resident_workers": workers})
    else:
        _print_card(found, _model_facts(found.model, workers), found.model.format_version)


@app.command("resolve")
def resolve_experts(
    written: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="[PUBLISHER/]NAME[@RANGE] of each expert.", show_default=False),
    ],
    *,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    json: output.Json = False,
) -> None:
    """Explain which adapter experts go together when these are asked for.

    Shows every expert that would be composed, in the order of composition,
    in the newest versions that fit, and why it is there; or says why they
    do not go together. Nothing runs, and nothing changes. The publisher
    may be left out when only one has such a name, and so may `expert-` at
    its beginning.

    $ hocket experts resolve tools
    $ hocket experts resolve acme/expert-tools@1.2.0 'zeta/expert-sql@>=0.3.0,<1.0.0'
    """
    with servers.registry(registry) as client:
        available = list(candidates(client.list_packages()))
    resolution = resolve([_wanted(name, available) for name in written], available)
    if json:
        output.emit(_resolution_json(resolution))
        return
    rows = [
        (place, _name_of(chosen.candidate), describe.base_name(chosen.candidate.base.name), "; ".join(chosen.why))
        for place, chosen in enumerate(resolution.experts, start=1)
    ]
    output.print_table(("#>", "expert", "rides on", "why~"), rows, "Nothing is composed")
    for warning in resolution.warnings:
        output.say(f"warning: {warning}", stderr=True)


def find_packages(client: RegistryClient, written: str) -> list[Package]:
    """The packages that are meant, of a name without a version all that may serve, or else all; the newest is last.

    Args:
        client: Of the registry.
        written: Digest or `[PUBLISHER/]NAME[@VERSION]`.

    Raises:
        HocketError: As `names.releases`; `UNKNOWN_PACKAGE` for a digest that is not here.
    """
    if is_digest(written):
        return [client.get_package(written)]
    found = sorted(
        names.releases(written, list(client.list_packages())), key=lambda each: Version.parse(each[1].version)
    )
    packages = list({package.digest: package for package, _ in found}.values())
    return [package for package in packages if package.state == TRUST_STATE_ACTIVE] or packages


def dependents(packages: Iterable[Package], going: Collection[str]) -> list[str]:
    """Which experts require something that will be missing, a sentence each.

    Args:
        packages: What a registry holds.
        going: Digests of those that will be gone.
    """
    every = list(candidates(packages))
    staying = [expert for expert in every if expert.digest not in going]
    return [
        f"{_name_of(expert)} requires {need}"
        for expert in staying
        for need in map(Requirement.parse, expert.constraints.requires)
        if _newest(need, expert.publisher, every) and not _newest(need, expert.publisher, staying)
    ]


def _newest(need: Requirement, owner: str, available: Iterable[Candidate]) -> Candidate | None:
    """The newest expert that fulfils what an expert of the publisher `owner` requires; None if there is none."""
    publisher = need.owner(owner)
    fitting = [
        (version, expert)
        for expert in available
        if (expert.publisher, expert.name) == (publisher, need.name)
        and need.range.allows(version := Version.parse(expert.version))
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _satisfied(package: Package, client: RegistryClient) -> dict[str, str | None]:
    """What an adapter requires, and the newest expert that fulfils it now."""
    active = (release.publisher for release in package.releases if release.state == TRUST_STATE_ACTIVE)
    owner = next(active, "")
    available = list(candidates(client.list_packages()))
    found = {
        pattern: _newest(Requirement.parse(pattern), owner, available)
        for pattern in package.adapter.constraints.requirements
    }
    return {pattern: None if expert is None else _name_of(expert) for pattern, expert in found.items()}


def _wanted(written: str, available: Sequence[Candidate]) -> Requirement:
    """What a short name with a range of versions asks for."""
    signed = {(expert.publisher, expert.name) for expert in available if expert.publisher}
    taken = {name for _, name in signed}
    unsigned = {("", expert.name) for expert in available if expert.name not in taken}
    owner, name = names.find(written, signed | unsigned, "expert")
    return Requirement(name, _range(names.split(written)[2] or "*"), owner)


def _range(written: str) -> Range:
    try:
        return Range.parse(written)
    except HocketError as error:
        whole = _SHORT_VERSION.sub(lambda short: short[0] + ".0" * (2 - short[0].count(".")), written)
        if whole == written:
            raise
        raise HocketError(error.reason, f"{error.message}; did you mean {whole}?") from error


def _name_of(expert: Candidate) -> str:
    return str(expert) if expert.publisher else f"{expert.name}@{expert.version} (unsigned)"


def _resolution_json(resolution: Resolution) -> dict[str, Any]:
    return {
        "experts": [
            {
                "publisher": chosen.candidate.publisher,
                "name": chosen.candidate.name,
                "version": chosen.candidate.version,
                "digest": chosen.candidate.digest,
                "why": chosen.why,
            }
            for chosen in resolution.experts
        ],
        "warnings": resolution.warnings,
    }


def _resident_workers(router: str, digest: str) -> list[str] | None:
    """The workers that hold a package; None if the router cannot tell."""
    try:
        with servers.router(router) as client:
            members = client.get_mixture(digest).members
    except HocketError:
        return None
    return sorted({worker for member in members for worker in member.resident_workers})


def _print_card(package: Package, facts: Sequence[tuple[str, object]], format_version: str) -> None:
    output.card(
        describe.package_name(package),
        [
            ("digest", package.digest),
            ("state", describe.standing_of(package)),
            ("releases", describe.all_names(package) if package.releases else None),
            ("signed by", describe.signers_of(package)),
            *facts,
            ("file", f"{package.format} {format_version}, {output.size(package.size_bytes)}"),
            ("published", package.publish_time.ToJsonString()),
        ],
    )


def _model_facts(model: ModelFacts, workers: list[str] | None) -> list[tuple[str, object]]:
    resident = "unknown (the router cannot tell)" if workers is None else ", ".join(workers) or "none"
    return [
        ("model", describe.kind_of(model)),
        ("takes", describe.features_of(model)),
        ("answers", describe.columns_of(model)),
        ("range", describe.range_text(model.output_range) if model.HasField("output_range") else None),
        ("parameters", output.size(model.parameter_bytes)),
        ("in memory of", resident),
    ]


def _adapter_facts(adapter: AdapterFacts, satisfied: Mapping[str, str | None]) -> list[tuple[str, object]]:
    constraints, hints = adapter.constraints, adapter.routing
    rank = f", rank {adapter.rank}" if adapter.rank else ""
    modules = f" on {', '.join(adapter.target_modules)}" if adapter.target_modules else ""
    return [
        ("description", adapter.description or None),
        ("adapter", f"{describe.adapter_of(adapter)}{rank}{modules}"),
        ("soft prompt", f"{adapter.soft_prompt_tokens} tokens" if adapter.soft_prompt_tokens else None),
        ("base", describe.base_text(adapter.base)),
        ("template", adapter.base.prompt_template or None),
        ("can", ", ".join(adapter.capabilities) or None),
        ("tags", ", ".join(adapter.tags) or None),
        ("keywords", ", ".join(hints.keywords) if adapter.HasField("routing") else "none: used only when asked for"),
        ("exclude keywords", ", ".join(hints.exclude_keywords) or None),
        ("load order", f"{constraints.load_order} (lower numbers are applied first)"),
        ("at most", f"{constraints.max_chain} experts together" if constraints.max_chain else None),
        *(("requires", f"{need}: {by or 'NOTHING HERE WILL DO'}") for need, by in satisfied.items()),
        ("not with", ", ".join(constraints.incompatible_with) or None),
        ("grammar", describe.grammar_text(inside=adapter.has_grammar, used=adapter.uses_grammar)),
        ("licence", adapter.license or None),
        ("parameters", output.size(adapter.parameter_bytes)),
        ("upstream signature", describe.upstream_text(adapter.upstream_signature)),
        *(("warning", warning) for warning in adapter.warnings),
    ]
