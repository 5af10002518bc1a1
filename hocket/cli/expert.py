"""`hocket expert`: make `.expert` packages out of trained adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket.base_folder import base_digest, base_name
from hocket.bases import BaseModel
from hocket.cli import files, output
from hocket.cli.groups import ExpertGroup
from hocket.cli.progress import progress_of
from hocket.errors import HocketError, Reason
from hocket.identity import short_name
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.expert.config import read_config
from hocket.packages.expert.names import CONFIG, MANIFEST, PROJECTIONS
from hocket.packages.expert.validation import validate as validate_package
from hocket.packages.expert.writer import draft_manifest, gather, pretty, write_archive
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.packages.expert.strict import Problem
    from hocket.packages.expert.validation import Report

app = typer.Typer(
    name="expert", cls=ExpertGroup, help="Make .expert packages: new, validate, pack.", no_args_is_help=True
)

_INVALID: Final = 2
_TESTS: Final = "tests"
_COMPRESSIONS: Final = {False: "gzip", True: "zstd"}

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Folder of the expert: a training output.", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where the adapter lies, if not beside the manifest.", show_default=False),
]
Name = Annotated[
    str | None, typer.Option(help="What the expert is called, where there is no manifest yet.", show_default=False)
]
Version = Annotated[
    str | None, typer.Option(help="Which version this is, where there is no manifest yet.", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="The base model: its folder, which is then identified by its content, or its name.",
        show_default=False,
    ),
]
Capabilities = Annotated[
    list[str] | None,
    typer.Option("--capability", metavar="TAG", help="What it can do, such as task:text2sql.", show_default=False),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Also ask for what others who read the format ask for: see docs/experts.md.")
]


@app.command()
def new(
    folder: Folder,
    *,
    name: Annotated[str, typer.Option(help="What the expert is called: expert-sql.", show_default=False)],
    base: Base = None,
    version: Annotated[str, typer.Option(help="Which version this is.")] = "0.1.0",
    kind: Annotated[AdapterKind, typer.Option(help="What will be trained, where nothing is yet.")] = AdapterKind.LORA,
    rank: Annotated[int, typer.Option(min=1, max=DEFAULT_LIMITS.rank, help="Rank to train.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Alpha to train.", show_default="twice the rank")] = None,
    capability: Capabilities = None,
    json: output.Json = False,
) -> None:
    """Begin an expert: write a manifest to edit.

    Kind, rank and modules are taken from adapter_config.json where
    training has already left one in the folder.

    $ hocket expert new expert-sql --name expert-sql --base models/Qwen3-0.6B
    """
    path = folder / MANIFEST
    if path.exists():
        raise HocketError(Reason.BAD_REQUEST, f"{path} is there already: edit it, or begin in another folder")
    trained = folder / CONFIG
    config = (
        read_config(files.read_file(trained, DEFAULT_LIMITS.manifest_bytes))
        if trained.exists()
        else _planned(kind, rank, alpha)
    )
    chosen = _base_of(_base_named(base), config)
    manifest = draft_manifest(config, chosen, name=name, version=version, capabilities=capability or ())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot make {folder}: {error.strerror}") from error
    files.write_file(path, pretty(manifest))
    if json:
        output.emit({"path": str(path), "manifest": manifest})
        return
    output.say(f"{path} is written: say in it what the expert does (description, capabilities, routing, license)")
    if not trained.exists():
        out = folder / "out"
        output.say("and what it is trained on (training.dataset.path). Then train and pack it:")
        output.next_steps(
            ("hocket", "train", folder, "--base", _shown_base(base), "--out", out), ("hocket", "expert", "pack", out)
        )
        output.say(f"Or put what PEFT's save_pretrained has written into {folder}, and pack that:")
    output.next_steps(("hocket", "expert", "validate", folder, "--strict"), ("hocket", "expert", "pack", folder))


@app.command()
def validate(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An .expert file, or a folder to pack.", show_default=False)
    ],
    *,
    weights: Weights = None,
    name: Name = None,
    version: Version = None,
    base: Base = None,
    strict: Strict = False,
    json: output.Json = False,
) -> None:
    """Check whether an expert is fit to be published.

    Reads a package as a registry would, or packs a folder in memory and
    reads that. Every problem is named, not the first alone. Who signed it
    is another question: `hocket verify`.

    $ hocket expert validate expert-sql/
    $ hocket expert validate expert-sql.v1.0.0.expert --strict
    """
    if path.is_dir():
        content = _gather(path, weights, name=name, version=version, base=base)
        data = write_archive(content, compression="zstd")
    else:
        data = files.read_package(path)
    report = validate_package(data, strict=strict)
    if json:
        output.emit({"path": str(path), **_report_json(report)})
    else:
        _print_report(path, report)
    if report.errors:
        raise typer.Exit(_INVALID)


@app.command()
def pack(
    folder: Folder,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where to put it.", show_default="NAME-BASE.vVERSION.expert here"
        ),
    ] = None,
    weights: Weights = None,
    name: Name = None,
    version: Version = None,
    base: Base = None,
    capability: Capabilities = None,
    include_tests: Annotated[bool, typer.Option("--include-tests", help="Pack the files of tests/ as well.")] = False,
    zstd: Annotated[bool, typer.Option("--zstd", help="Compress with zstd: faster, unknown to upstream.")] = False,
    strict: Strict = False,
    json: output.Json = False,
) -> None:
    """Make one .expert file out of a training output.

    A folder as PEFT saves it is enough; without a manifest.json in it, say
    --name and --version, and a short manifest is written into the package.
    The same folder gives the same bytes. What `validate` finds wrong is
    not packed.

    $ hocket expert pack out/ --name expert-sql --version 1.0.0 --base models/Qwen3-0.6B
    $ hocket expert pack expert-sql/ --weights expert-sql/weights/final
    """
    content = _gather(
        folder,
        weights,
        name=name,
        version=version,
        base=base,
        capabilities=capability or (),
        include_tests=include_tests,
    )
    with progress_of(f"packing {folder.name}", shown=not json) as on_progress:
        data = write_archive(content, compression=_COMPRESSIONS[zstd], on_progress=on_progress)
    report = validate_package(data, strict=strict)
    if report.errors or report.facts is None:
        first = report.errors[0]
        more = f" (and {len(report.errors) - 1} more: hocket expert validate)" if len(report.errors) > 1 else ""
        raise HocketError(Reason.BAD_PACKAGE, f"{folder} is not packed: {_said(first)}{more}", field=first.path or None)
    facts = report.facts
    target = out or Path(f"{facts.name}-{_file_part(facts.base.name)}.v{facts.version}.expert")
    files.write_file(target, data)
    if json:
        output.emit({"path": str(target), "digest": facts.digest, "size_bytes": len(data), **_report_json(report)})
        return
    for warning in report.warnings:
        output.say(f"warning: {warning}", stderr=True)
    if name is not None:
        output.say(f"To say more in its manifest: hocket expert new {folder} --name {facts.name}", stderr=True)
    output.card(
        f"{facts.name} {facts.version}",
        [
            ("written to", target),
            ("digest", facts.digest),
            ("size", f"{output.size(len(data))} ({output.size(sum(map(len, content.values())))} unpacked)"),
            ("adapter", f"{facts.kind}, rank {facts.rank}" if facts.rank else str(facts.kind)),
            ("base", facts.base.digest or f"{facts.base.name} (by name alone: give its folder as --base)"),
            ("files", ", ".join(content)),
        ],
    )
    output.next_steps(("hocket", "sign", target, "--publisher", "YOU"), ("hocket", "publish", target))


def _planned(kind: AdapterKind, rank: int, alpha: float | None) -> AdapterConfig:
    """What shall be trained."""
    if kind in {AdapterKind.LORA, AdapterKind.DORA}:
        return AdapterConfig(kind, rank=rank, alpha=2.0 * rank if alpha is None else alpha, target_modules=PROJECTIONS)
    if kind is AdapterKind.IA3:
        return AdapterConfig(kind, target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))
    return AdapterConfig(kind)


def _base_named(base: str | None) -> BaseModel | None:
    """The base that was told: by its content if it is a folder, else by its name."""
    if base is None or not Path(base).is_dir():
        return None if base is None else BaseModel(base)
    with progress_of(f"hashing {base}", shown=True) as on_progress:
        digest = base_digest(Path(base), on_progress)
    return BaseModel(base_name(Path(base)), digest=digest)


def _shown_base(base: str | None) -> str:
    """The folder that training needs, where it was given."""
    return base if base is not None and Path(base).is_dir() else "BASE_FOLDER"


def _base_of(base: BaseModel | None, config: AdapterConfig) -> BaseModel:
    """The base that was told, or else the one that the adapter was trained on."""
    if base is not None:
        return base
    if not config.base_model_name:
        raise HocketError(
            Reason.BAD_REQUEST, "nothing says which base model this expert is for: give --base, its folder or its name"
        )
    return BaseModel(config.base_model_name)


def _gather(
    folder: Path,
    weights: Path | None,
    *,
    name: str | None,
    version: str | None,
    base: str | None,
    capabilities: Sequence[str] = (),
    include_tests: bool = False,
) -> dict[str, bytes]:
    """The files of the package that a folder makes."""
    places = [folder, *([weights] if weights is not None else [])]
    for place in places:
        if not place.is_dir():
            raise HocketError(Reason.BAD_REQUEST, f"{place} is no folder")

    def find(file_name: str) -> bytes | None:
        paths = (place / file_name for place in places)
        path = next((path for path in paths if path.is_file()), None)
        return None if path is None else files.read_file(path, DEFAULT_LIMITS.package_bytes)

    present = {path.name for place in places for path in place.iterdir() if path.is_file()}
    chosen = _base_named(base)
    manifest = find(MANIFEST)
    if manifest is None:
        manifest = _drafted(find(CONFIG), folder, name, version, chosen, capabilities)
    else:
        told = {"--name": name, "--version": version, "--capability": capabilities}
        if given := [option for option, value in told.items() if value]:
            raise HocketError(
                Reason.BAD_REQUEST, f"{folder / MANIFEST} says that: edit it there, and leave out {', '.join(given)}"
            )
    tests = (folder / _TESTS).iterdir() if include_tests and (folder / _TESTS).is_dir() else ()
    names = sorted(f"{_TESTS}/{path.name}" for path in tests if path.is_file())
    packed = gather(manifest, find, present, base=chosen, tests=names)
    if left := sorted(present - packed.keys()):
        output.say(f"not packed: {', '.join(left)}", stderr=True)
    return packed


def _drafted(
    config: bytes | None,
    folder: Path,
    name: str | None,
    version: str | None,
    base: BaseModel | None,
    capabilities: Sequence[str],
) -> bytes:
    """The manifest of a training output that has none."""
    if config is None:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{folder} holds neither {MANIFEST} nor {CONFIG}: give the folder that training wrote, or begin one with "
            "`hocket expert new`",
        )
    if name is None or version is None:
        raise HocketError(Reason.BAD_REQUEST, f"{folder} holds no {MANIFEST}: give --name and --version")
    read = read_config(config)
    return pretty(draft_manifest(read, _base_of(base, read), name=name, version=version, capabilities=capabilities))


def _report_json(report: Report) -> dict[str, Any]:
    return {
        "valid": not report.errors,
        "errors": [asdict(problem) for problem in report.errors],
        "warnings": list(report.warnings),
    }


def _print_report(path: Path, report: Report) -> None:
    for warning in report.warnings:
        output.say(f"warning: {warning}", stderr=True)
    for problem in report.errors:
        output.say(f"error: {_said(problem)}", stderr=True)
    if report.errors:
        output.say(f"{path} is not fit to be published: {len(report.errors)} to mend")
    elif report.facts is not None:
        output.say(f"{path} is fit to be published: {report.facts.name} {report.facts.version}")


def _said(problem: Problem) -> str:
    told = problem.message.startswith(problem.path)
    return problem.message if told else f"{problem.path}: {problem.message}"


def _file_part(base_name: str) -> str:
    """A base's name as upstream puts it into file names."""
    return short_name(base_name).lower().replace(".", "-").replace("_", "-") or "base"
