"""`hocket base`: which base models may be served. Edits the files of a folder, which workers read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket import known_bases, paths
from hocket.base_folder import base_digest
from hocket.cli import output
from hocket.cli.progress import progress_of
from hocket.errors import HocketError

if TYPE_CHECKING:
    from hocket.known_bases import KnownBase, KnownBases

app = typer.Typer(
    name="base",
    help="""Decide which base models may be served.

    A base is its folder's content, by digest. A worker serves it only as
    long as that is what was added.
    """,
    no_args_is_help=True,
    add_completion=False,
)

_CHANGED: Final = 2
_STYLES: Final = {"present": "green", "unchanged": "green"}

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="The suite's data.", show_default="~/.local/share/hocket"),
]


@app.command()
def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face model directory.", show_default=False)],
    *,
    name: Annotated[
        str | None, typer.Option(help="What to call it.", show_default="the folder's or the model's name")
    ] = None,
    at: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where workers find it, if they are in containers.", show_default="where it is"
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the name from another base.")] = False,
    data: Data = None,
    json: output.Json = False,
) -> None:
    """Trust a base model as it is now.

    All of its files that shape answers are read, to know its digest.

    $ hocket base add ~/models/Qwen3-0.6B
    $ hocket base add ./merged --name my-base
    $ hocket base add models/Qwen3-0.6B --data . --at /models/Qwen3-0.6B
    """
    with progress_of(f"hashing {path}", shown=not json) as on_progress:
        base = known_bases.add(folder(data), path, name=name, at=at, replace=replace, on_progress=on_progress)
    if json:
        output.emit(_json(base))
        return
    output.card(base.name, [("digest", base.digest), ("folder", base.path)])
    if at is not None:
        output.say("The workers that find it there have to be started again.")
        return
    others = len(read(data).bases) > 1
    chosen = (*(("--data", data) if data else ()), *(("--base", base.name) if others else ()))
    output.say("A suite that runs has to be started again.")
    output.next_steps(("hocket", "up", *chosen), ("hocket", "generate", "YOUR PROMPT"))


@app.command("list")
def list_bases(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Read all of them again; status 2 if one is not what was added.")
    ] = False,
    data: Data = None,
    json: output.Json = False,
) -> None:
    """List the base models that may be served.

    $ hocket base list
    $ hocket base list --check
    """
    bases = read(data).bases
    states = [_state(base, check=check, shown=not json) for base in bases]
    if json:
        output.emit({"bases": [{**_json(base), "state": state} for base, state in zip(bases, states, strict=True)]})
    else:
        rows = [
            (base.name, output.short(base.digest), output.plain(state, _STYLES.get(state, "red")), base.path)
            for base, state in zip(bases, states, strict=True)
        ]
        output.print_table(("name", "digest", "state", "folder~"), rows, "No base yet: `hocket base add PATH`")
    if check and any(state != "unchanged" for state in states):
        raise typer.Exit(_CHANGED)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Its name, or its whole digest.", show_default=False)],
    *,
    data: Data = None,
    json: output.Json = False,
) -> None:
    """Trust a base model no longer.

    Its folder stays as it is. A suite that serves it goes on until it is
    started again.

    $ hocket base remove qwen3-0.6b
    """
    base = known_bases.remove(folder(data), name)
    if json:
        output.emit(_json(base))
    else:
        output.say(f"{base.name} may no longer be served; {base.path} is left as it is")


def folder(data: Path | None) -> Path:
    """Where a suite with that data, or this person's suite, keeps what bases it may serve."""
    return paths.bases_folder(os.environ, Path.home()) if data is None else data / "bases"


def read(data: Path | None) -> KnownBases:
    """What bases that is; files that had to be left out are named on standard error."""
    known = known_bases.read(folder(data))
    for problem in known.problems:
        output.say(f"warning: {problem.message}", stderr=True)
    return known


def _state(base: KnownBase, *, check: bool, shown: bool) -> str:
    """What lies at a base's path now; a state is part of what `--json` prints."""
    if not os.path.isdir(base.path):  # noqa: PTH112 - Path.is_dir raises where a folder above may not be read
        return "missing"
    if not check:
        return "present"
    try:
        with progress_of(f"hashing {base.path}", shown=shown) as on_progress:
            return "unchanged" if base_digest(base.path, on_progress) == base.digest else "changed"
    except HocketError as error:
        output.say(f"warning: {error.message}", stderr=True)
        return "changed"


def _json(base: KnownBase) -> dict[str, Any]:
    return {"name": base.name, "digest": base.digest, "path": str(base.path)}
