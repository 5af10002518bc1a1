"""Verbs that bring packages from files, git repositories and indexes into a registry: install, update.

There is no second store. A package is fetched into a temporary folder, verified against the trust folder, and
published; the registry then judges it by its own trust. Everything is found and verified before the first package is
published, so that a refusal changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket.cli import describe, files, names, output, servers
from hocket.cli.progress import progress_of, spinner
from hocket.client.calls import GRPC_STATUS
from hocket.composition import candidates
from hocket.errors import HocketError, Reason, Situation
from hocket.git import TIMEOUT_SECONDS, check_address, shown
from hocket.identity import ReleaseName
from hocket.installing import Finder, plan
from hocket.packages import Policy
from hocket.sources import InRepository, Offer, PackageFile, claimed, parse_source, read_index, repositories
from hocket.v1.package_pb2 import TRUST_STATE_ACTIVE, TRUST_STATE_YANKED
from hocket.versions import Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from hocket.client.blocking import RegistryClient
    from hocket.git import Repository
    from hocket.index import Index
    from hocket.installing import Prepared, Step
    from hocket.packages import TrustRoots
    from hocket.sources import Source
    from hocket.v1.package_pb2 import Package

app = typer.Typer()

_REFUSED: Final = 2

_PLANNED: Final = "planned"
_PRESENT: Final = "present"
_PUBLISHED: Final = "published"
_UNSIGNED: Final = "published_unsigned"
_UPDATED: Final = "updated"
_NEWEST: Final = "newest"
_WITHDRAWN: Final = "withdrawn"
_NO_REPOSITORY: Final = "no_repository"
_ERROR: Final = "refused"
_SAID: Final = {
    _PLANNED: "would be published",
    _PRESENT: "is there already",
    _PUBLISHED: "published",
    _UNSIGNED: "published (UNSIGNED: only the registry's policy admits it)",
    _UPDATED: "updated",
    _NEWEST: "is the newest",
    _WITHDRAWN: "has a newer version, which was withdrawn from this registry",
    _NO_REPOSITORY: "no home is known",
}
"""The states of packages and experts, in words."""

_HOMES: Final = (
    "An expert's home is where newer versions of it are: `repository.url` in its manifest, or what an index says "
    "(--index URL). `hocket install` does not remember where it found one."
)

IndexAddress = Annotated[
    str,
    typer.Option(
        "--index",
        metavar="URL",
        envvar="HOCKET_INDEX",
        help="Git repository with an index.json, which says where experts are; URL#REF for a branch or tag.",
        show_default=False,
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=1, help="Time for each run of git.")]
AllowUnsigned = Annotated[
    bool, typer.Option("--allow-unsigned", help="Let pass what nobody you trust has signed; the registry still judges.")
]
NoDeps = Annotated[bool, typer.Option("--no-deps", help="Do not look for what experts require.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Find and verify everything, and publish nothing.")]


@app.command()
def install(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Package files, git repositories, or names.", show_default=False),
    ],
    *,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="[PUBLISHER/]NAME",
            help="Which expert of a repository that has several, or whose of several; may be repeated.",
        ),
    ] = None,
    index: IndexAddress = "",
    no_deps: NoDeps = False,
    dry_run: DryRun = False,
    trust: files.Trust = None,
    allow_unsigned: AllowUnsigned = False,
    allow_expired_licences: files.AllowExpiredLicences = False,
    timeout: Timeout = TIMEOUT_SECONDS,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    json: output.Json = False,
) -> None:
    """Put packages into a registry, with all that they require.

    SOURCE is a package file with its release beside it; a git repository,
    by address or folder; or [PUBLISHER/]NAME of an expert in an index.
    @RANGE after it says which versions will do, #REF after that which
    branch or tag to look at. Releases are verified against the trust
    folder, and nothing is published before everything is found.

    $ hocket install sql.expert
    $ hocket install 'https://git.example.org/acme/expert-sql@>=0.3.0'
    $ hocket install ./experts.git#main --name expert-json
    $ hocket install acme/expert-sql --index https://git.example.org/experts
    """
    wanted = [(text, parse_source(text)) for text in sources]
    if name and all(isinstance(source, PackageFile) for _, source in wanted):
        raise HocketError(Reason.BAD_REQUEST, "--name chooses in repositories and indexes, and only files were given")
    with servers.registry(registry, token_file) as client:
        packages = list(client.list_packages())
        roots = files.read_trust(trust)
        policy = Policy(allow_unsigned=allow_unsigned, allow_expired_licences=allow_expired_licences)
        with (
            repositories(timeout) as repository,
            spinner("looking", shown=not json),
        ):
            finder = _finder(packages, roots, policy, repository, cache(partial(_index, repository, index)))
            found = [
                package
                for text, source in wanted
                for package in _packages(finder, text, source, name or [], alone=len(wanted) == 1)
            ]
            steps = _plan(finder, found, packages, with_requirements=not no_deps)
        done: list[str] = []
        planned = ((step, _PRESENT if step.package is None else _PLANNED) for step in steps)
        with _naming(done):
            for step, state in planned if dry_run else _published(client, steps, done, shown=not json):
                if json:
                    output.emit(_step_json(step, state))
                else:
                    _print_step(step, state)
    if dry_run and not json:
        output.say("Nothing was published: this was a dry run")


@app.command()
def update(
    context: typer.Context,
    experts: Annotated[
        list[str] | None, typer.Argument(metavar="[PUBLISHER/]NAME...", help="Which; all if none are named.")
    ] = None,
    *,
    index: IndexAddress = "",
    dry_run: DryRun = False,
    trust: files.Trust = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    json: output.Json = False,
) -> None:
    """Put newer versions of adapter experts into a registry.

    Looks for releases of the same publisher where an index says that is
    given with --index; else in the repository that the expert's manifest
    names, or by the index in HOCKET_INDEX. Older versions stay,
    and what names them keeps them, until `hocket uninstall`. An expert
    that cannot be updated does not keep others from it.

    $ hocket update
    $ hocket update expert-sql --dry-run
    """
    with servers.registry(registry, token_file) as client:
        packages = list(client.list_packages())
        installed = _installed(packages)
        chosen = {names.find(written, installed) for written in experts or ()} or set(installed)
        roots = files.read_trust(trust)
        with repositories(timeout) as repository:  # where the index cannot be read, that is said once
            known = _index(repository, index)
        given = context.get_parameter_source("index")
        is_explicit = given is not None and given.name == "COMMANDLINE"
        changes: dict[ReleaseName, _Change] = {}
        by_home: dict[str, list[ReleaseName]] = defaultdict(list)
        for before, digest in (installed[each] for each in sorted(chosen)):
            home = _home(client, before, digest, known, index_first=is_explicit)
            if isinstance(home, _Change):
                changes[before] = home
            else:
                by_home[home].append(before)
        done: list[str] = []
        with _naming(done):
            for home, experts_there in by_home.items():
                with repositories(timeout) as repository:  # one home at a time is on disk
                    finder = _finder(packages, roots, Policy(), repository, lambda: known)
                    for before in experts_there:
                        with spinner(f"{before.publisher}/{before.name}", shown=not json):
                            change = _change(finder, packages, before, home)
                        if not dry_run:
                            change = _carried_out(client, change, done, shown=not json)
                        changes[before] = change.without_bytes()
    _print_changes([change for _, change in sorted(changes.items())], json=json)
    if any(change.error is not None for change in changes.values()):
        raise typer.Exit(_REFUSED)


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one installed expert.

    Attributes:
        before: Its newest release in the registry.
        state: What becomes of it, in one word.
        steps: What installs a newer version; empty if there is none.
        after: That version; None if there is none.
        error: Why it could not be updated; None if nothing is wrong.
    """

    before: ReleaseName
    state: str
    steps: tuple[Step, ...] = ()
    after: str | None = None
    error: HocketError | None = None

    def without_bytes(self) -> _Change:
        """The same for telling of it: packages are out of memory then."""
        return replace(self, steps=tuple(replace(step, package=None) for step in self.steps))


def _finder(
    packages: Sequence[Package],
    trust: TrustRoots,
    policy: Policy,
    repository: Callable[[str], Repository],
    index: Callable[[], Index | None],
) -> Finder:
    """What finds packages, as long as its repositories are open."""
    return Finder(
        trust=trust,
        policy=policy,
        now=datetime.now(UTC),
        repository=repository,
        index=index,
        taken={describe.release_name(release): each.digest for each in packages for release in each.releases},
        yanked={each.digest for each in packages if each.state == TRUST_STATE_YANKED},
    )


def _index(repository: Callable[[str], Repository], address: str) -> Index | None:
    if not address:
        return None
    source = parse_source(address)
    if not isinstance(source, InRepository):
        raise HocketError(Reason.BAD_REQUEST, f"{shown(address)!r} is not the address of a git repository (--index)")
    return read_index(repository(source.address), source.ref)


def _read_file(source: PackageFile) -> Offer:
    path: Path = source.path
    release = next(iter(files.read_releases(path)), None)
    return Offer(str(path), partial(files.read_package, path), release, claimed(release))


def _packages(finder: Finder, text: str, source: Source, chosen: Sequence[str], *, alone: bool) -> Iterator[Prepared]:
    """What one source means; of several sources it is said which one is to blame."""
    for name in _chosen(source, chosen, alone=alone):
        try:
            yield finder.package(source, _read_file, name)
        except HocketError as error:
            if alone:
                raise
            written = shown(text)
            message = error.message if written in error.message else f"{written}: {error.message}"
            raise error.restated(f"{message} (nothing was published)", **{output.BLAMED_FILE: written}) from error


def _chosen(source: Source, names: Sequence[str], *, alone: bool) -> Sequence[str]:
    """Those of the names given with `--name` that are about a source."""
    match source:
        case InRepository():
            return names or [""]
        case PackageFile():
            return [""]
    short = source.name.removeprefix("expert-")
    meant = [
        name
        for name in names
        if name.rpartition("/")[2].removeprefix("expert-") == short
        and (not source.publisher or name.rpartition("/")[0] in {"", source.publisher})
    ]
    if names and alone and not meant:
        raise HocketError(Reason.BAD_REQUEST, f"--name {names[0]} does not go with {source}")
    return meant or [""]


def _plan(
    finder: Finder, roots: Sequence[Prepared], packages: Sequence[Package], *, with_requirements: bool
) -> tuple[Step, ...]:
    """The plan, in which what is in the registry already is not published again."""
    steps = plan(roots, candidates(packages), finder.look_up, with_requirements=with_requirements)
    active = {
        (describe.release_name(release), package.digest)
        for package in packages
        for release in package.releases
        if package.state == release.state == TRUST_STATE_ACTIVE
    }
    return tuple(replace(step, package=None) if (step.name, step.digest) in active else step for step in steps)


def _published(
    client: RegistryClient, steps: Sequence[Step], done: list[str], *, shown: bool
) -> Iterator[tuple[Step, str]]:
    """Publish what a plan says, note it in `done`, and tell after each step what became of it."""
    for step in steps:
        if step.package is None:
            yield step, _PRESENT
            continue
        try:
            with progress_of(step.name, shown=shown) as on_progress:
                response = client.publish(step.package.data, step.package.release, on_progress=on_progress)
        except HocketError as error:
            if GRPC_STATUS in error.metadata:  # the connection is to blame
                raise
            raise _refused(error, step.package.where, done) from error
        if response.created:
            done.append(step.name)
        unsigned = response.package.unsigned_by_policy
        yield step, (_UNSIGNED if unsigned else _PUBLISHED) if response.created else _PRESENT


def _refused(error: HocketError, where: str, done: Sequence[str]) -> HocketError:
    """A refusal by the registry; without the right token no file is to blame."""
    told = _already(done)
    if error.reason.situation in {Situation.UNAUTHENTICATED, Situation.FORBIDDEN}:
        return error.restated(f"the registry wants its admin's token for this: give --token-file FILE{told}")
    message = f"{where}: the registry refuses it: {error.message}{told}"
    return error.restated(message, **{output.BLAMED_FILE: where})


@contextmanager
def _naming(done: Sequence[str]) -> Iterator[None]:
    """Where the connection breaks, say what was published before."""
    try:
        yield
    except HocketError as error:
        if GRPC_STATUS not in error.metadata or not done:
            raise
        message = f"the connection to the registry broke: {error.message}{_already(done)}"
        raise HocketError(error.reason, message, retry_after_seconds=error.retry_after_seconds) from error


def _already(done: Sequence[str]) -> str:
    return f" (already published: {', '.join(done)})" if done else ""


def _step_json(step: Step, state: str) -> dict[str, Any]:
    package = step.package
    return {
        "name": step.name,
        "digest": step.digest,
        "size_bytes": None if package is None else len(package.data),
        "source": None if package is None else package.where,
        "why": list(step.why),
        "state": state,
    }


def _print_step(step: Step, state: str) -> None:
    facts = [
        ("why", "; ".join(step.why)),
        ("from", None if step.package is None else step.package.where),
        ("digest", output.short(step.digest)),
    ]
    output.card(f"{step.name} {_SAID[state]}", facts)


def _installed(packages: Iterable[Package]) -> dict[tuple[str, str], tuple[ReleaseName, str]]:
    """The newest release that may serve of each adapter expert, with its digest, by publisher and name."""
    newest: dict[tuple[str, str], tuple[ReleaseName, str]] = {}
    for expert in candidates(packages):
        if expert.publisher:
            name = ReleaseName(expert.publisher, expert.name, expert.version)
            before = newest.get((name.publisher, name.name))
            if before is None or Version.parse(before[0].version) < Version.parse(name.version):
                newest[name.publisher, name.name] = name, expert.digest
    return newest


def _home(
    client: RegistryClient, before: ReleaseName, digest: str, index: Index | None, *, index_first: bool
) -> str | _Change:
    """The address of the repository that an expert comes from; or what becomes of it without."""
    places = [partial(_home_in_manifest, client, digest), partial(_home_in_index, index, before.name)]
    try:
        for place in reversed(places) if index_first else places:
            if (address := place()) is not None:
                return address
    except HocketError as error:
        if GRPC_STATUS in error.metadata:
            raise
        return _Change(before, _ERROR, error=error)
    return _Change(before, _NO_REPOSITORY)


def _home_in_index(index: Index | None, name: str) -> str | None:
    listed = None if index is None else index.repository_of(name)
    return None if listed is None else listed[1]


def _home_in_manifest(client: RegistryClient, digest: str) -> str | None:
    manifest = output.message_json(client.get_package(digest))["adapter"].get("metadata") or {}
    repository = manifest.get("repository")
    url = repository.get("url") if isinstance(repository, dict) else None
    if not isinstance(url, str) or not url:
        return None
    try:
        return check_address(url.removeprefix("git+"), local=False)
    except HocketError as error:
        raise HocketError(
            error.reason, f"its manifest names a repository that cannot be used: {error.message}"
        ) from error


def _change(finder: Finder, packages: Sequence[Package], name: ReleaseName, home: str) -> _Change:
    """What there is to be done for one expert."""
    try:
        found = finder.newer(name, home)
        if found is None:
            return _Change(name, _NEWEST)
        steps = _plan(finder, [found], packages, with_requirements=True)
    except HocketError as error:
        if error.reason is Reason.YANKED:
            return _Change(name, _WITHDRAWN)
        return _Change(name, _ERROR, error=error)
    return _Change(name, _PLANNED, steps, str(found).rpartition("@")[2])


def _carried_out(client: RegistryClient, change: _Change, done: list[str], *, shown: bool) -> _Change:
    """Publish what a change needs."""
    if change.state != _PLANNED:
        return change
    try:
        for _ in _published(client, change.steps, done, shown=shown):
            pass
    except HocketError as error:
        if GRPC_STATUS in error.metadata:
            raise
        return replace(change, state=_ERROR, error=error)
    return replace(change, state=_UPDATED)


def _print_changes(changes: Sequence[_Change], *, json: bool) -> None:
    if json:
        for change in changes:
            error = change.error
            refusal = {} if error is None else {"error": {"reason": str(error.reason), "message": error.message}}
            packages = [{"name": step.name, "digest": step.digest, "why": list(step.why)} for step in change.steps]
            name = {"expert": f"{change.before.publisher}/{change.before.name}"}
            versions = {"before": change.before.version, "after": change.after}
            output.emit({**name, **versions, "state": change.state, "packages": packages, **refusal})
        return
    rows = [
        (
            f"{change.before.publisher}/{change.before.name}",
            change.before.version,
            change.after,
            _SAID[change.state] if change.error is None else f"{change.error.reason}: {change.error.message}",
        )
        for change in changes
    ]
    output.print_table(("expert", "before", "after", "what~"), rows, "No adapter experts here: `hocket install`")
    if any(change.state == _UPDATED for change in changes):
        output.say("Older versions stay until `hocket uninstall`")
    if any(change.state == _NO_REPOSITORY for change in changes):
        output.say(_HOMES)
