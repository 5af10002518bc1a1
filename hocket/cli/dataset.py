"""`hocket dataset`: look after the JSON lines that experts are trained on and judged by."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket.cli import files, output
from hocket.cli.progress import progress_of
from hocket.datasets import SPLITS, Verdict, assign_rows, judge_rows, measure, read_rows, scan_rows, stratum
from hocket.datasets.writing import writing
from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.datasets import Quantiles, Statistics
    from hocket.datasets.rows import Progress

app = typer.Typer(
    name="dataset",
    help="Look after datasets: validate, stats, dedupe, split.",
    no_args_is_help=True,
    add_completion=False,
)

_INVALID: Final = 2
_ERRORS_SHOWN: Final = 20
_ERRORS_OF_NO_DATASET: Final = 3
_STRATA_SHOWN: Final = 20
_LARGE_GROUP: Final = 0.2

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file of JSON lines.", show_default=False)]
Near = Annotated[
    float,
    typer.Option(
        metavar="SHARE", min=0.1, max=1, help="How much two questions have in common that are nearly the same."
    ),
]


@app.command()
def validate(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="Files of JSON lines.", show_default=False)
    ] = None,
    *,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An expert's manifest: check the dataset that it is trained on.", show_default=False
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Check every line of datasets.

    Each line is one strict JSON object, and all of a file are of one format:
    prompt and completion, messages, or text. All that is wrong is counted,
    and the first 20 are named by their lines.

    $ hocket dataset validate train.jsonl eval.jsonl
    $ hocket dataset validate --manifest expert-sql/manifest.json
    """
    chosen = list(paths or ())
    if manifest is not None:
        chosen.append(_dataset_of(manifest))
    if not chosen:
        raise HocketError(Reason.BAD_REQUEST, "give a file, or --manifest FILE")
    reports = []
    for path in chosen:
        with progress_of(f"reading {path.name}", shown=not json) as on_progress:
            reports.append(_checked(path, on_progress))
        if json:
            output.emit(reports[-1])
        else:
            _print_check(reports[-1])
    if not all(report["valid"] for report in reports):
        raise typer.Exit(_INVALID)


@app.command()
def stats(
    path: File,
    *,
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Count rows by what they have under this key.", show_default=False)
    ] = None,
    near: Near = 0.9,
    json: output.Json = False,
) -> None:
    """Show what a dataset is like: sizes, words, diversity, repetitions.

    $ hocket dataset stats train.jsonl --by kind
    """
    with progress_of(f"reading {path.name}", shown=not json) as on_progress:
        found = measure(path, by=by, near=near, on_progress=on_progress)
    if json:
        output.emit({"path": str(path), **asdict(found)})
    else:
        _print_statistics(path, found, by)


@app.command()
def dedupe(
    path: File,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Where the rows that stay are written.", show_default=False),
    ],
    near: Near = 0.9,
    exact: Annotated[bool, typer.Option("--exact", help="Leave out only rows that are the same.")] = False,
    json: output.Json = False,
) -> None:
    """Leave out rows that repeat one before.

    The same are rows whose question and answer differ in nothing but case,
    white space and forms of characters. Nearly the same are those with the
    same answer whose questions have a large part in common. The first stays,
    byte for byte.

    $ hocket dataset dedupe train.jsonl -o train.deduped.jsonl
    $ hocket dataset dedupe train.jsonl -o train.deduped.jsonl --near 0.8
    """
    _check_apart(path, out)
    counts: Counter[Verdict] = Counter()
    with progress_of(f"reading {path.name}", shown=not json) as on_progress, writing(out) as write:
        for judged in judge_rows(path, near=None if exact else near, on_progress=on_progress):
            counts[judged.verdict] += 1
            if judged.verdict is Verdict.KEPT:
                write(judged.row.raw)
    if json:
        numbers = {str(verdict): counts[verdict] for verdict in Verdict}
        output.emit({"path": str(path), "out": str(out), "rows": counts.total(), **numbers})
        return
    output.say(
        f"{out}: {counts[Verdict.KEPT]:,} of {counts.total():,} rows stay; left out are {counts[Verdict.EXACT]:,} that "
        f"are the same as one before, and {counts[Verdict.NEAR]:,} nearly"
    )


@app.command()
def split(
    path: File,
    *,
    train: Annotated[float, typer.Option(metavar="SHARE", min=0, max=1, help="For training.")] = 0.8,
    evaluation: Annotated[
        float, typer.Option("--eval", metavar="SHARE", min=0, max=1, help="To watch training by.")
    ] = 0.1,
    test: Annotated[float, typer.Option(metavar="SHARE", min=0, max=1, help="To judge by in the end.")] = 0.1,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Rows with the same value under this key stay together: a template, a source.",
            show_default=False,
        ),
    ] = None,
    strata: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Show the counts by what rows have under this key.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Another one, another split.")] = 0,
    near: Near = 0.9,
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where the files go.", show_default="beside the file"),
    ] = None,
    json: output.Json = False,
) -> None:
    """Divide a dataset into train, eval and test.

    Writes NAME.train.jsonl, NAME.eval.jsonl and NAME.test.jsonl. Rows that
    are the same never come into different ones; those that are nearly so
    stay together as far as they are found. Where a row goes follows from
    its content and the seed, so rows that are added later move no others.

    $ hocket dataset split sql.jsonl --by template
    $ hocket dataset split sql.jsonl --train 0.9 --eval 0.1 --test 0 --strata kind
    """
    shares = (train, evaluation, test)
    with progress_of(f"reading {path.name}", shown=not json) as on_progress:
        assigned = assign_rows(path, shares, by=by, seed=seed, near=near, on_progress=on_progress)
    where = path.parent if folder is None else folder
    targets = [where / f"{path.stem}.{name}{path.suffix or '.jsonl'}" for name in SPLITS]
    counts: list[Counter[str]] = [Counter() for _ in SPLITS]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writing(target)) if share else None
            for target, share in zip(targets, shares, strict=True)
        ]
        for place, row in zip(assigned.splits, read_rows(path), strict=True):
            write = writers[place]
            assert write is not None  # noqa: S101 - nothing falls into a share of 0
            write(row.raw)
            counts[place][stratum(row, strata) if strata else ""] += 1
    sizes = [count.total() for count in counts]
    for name, share, size in zip(SPLITS, shares, sizes, strict=True):
        if share and not size:
            output.say(f"warning: no row came into {name}: there are too few groups of rows", stderr=True)
    if assigned.largest_group > _LARGE_GROUP * sum(sizes):
        output.say(
            f"warning: {assigned.largest_group:,} of {sum(sizes):,} rows stay together: they are alike, or have the "
            "same value under --by",
            stderr=True,
        )
    if json:
        output.emit(
            {
                "path": str(path),
                "rows": sum(sizes),
                "groups": assigned.group_count,
                "largest_group": assigned.largest_group,
                "splits": {
                    name: {"path": str(target), "rows": size, "strata": dict(count) if strata else {}}
                    for name, target, size, count, share in zip(SPLITS, targets, sizes, counts, shares, strict=True)
                    if share
                },
            }
        )
        return
    rows = [
        (name, f"{size:,}", output.bar(size / sum(sizes)), f"{size / sum(sizes):.1%}", target)
        for name, share, size, target in zip(SPLITS, shares, sizes, targets, strict=True)
        if share
    ]
    output.console().print(output.table(["split", "rows>", "", "share>", "file"], rows))
    if strata:
        values = sorted(set().union(*counts))
        cells = [(value, *(f"{count[value]:,}" for count in counts)) for value in values]
        output.console().print(output.table([strata, *(f"{name}>" for name in SPLITS)], cells))


def _dataset_of(manifest: Path) -> Path:
    """The file that a manifest says its expert is trained on."""
    data = files.read_file(manifest, DEFAULT_LIMITS.manifest_bytes)
    document = strict_json.loads(
        data, what=manifest.name, bytes_max=DEFAULT_LIMITS.manifest_bytes, depth_max=DEFAULT_LIMITS.metadata_depth
    )
    for key in ("training", "dataset", "path"):
        document = document.get(key) if isinstance(document, dict) else None
    if not isinstance(document, str) or not document:
        raise HocketError(Reason.BAD_MANIFEST, f"{manifest} names no dataset: say it in training.dataset.path")
    return manifest.parent / document


def _checked(path: Path, on_progress: Progress) -> dict[str, Any]:
    rows, count, kind = 0, 0, None
    errors: list[dict[str, Any]] = []
    for row in scan_rows(path, on_progress=on_progress):
        if not isinstance(row, HocketError):
            rows += 1
            kind = kind or str(row.format)
            continue
        count += 1
        if count <= _ERRORS_SHOWN:
            errors.append({"line": int(row.metadata["line"]), "reason": str(row.reason), "message": row.message})
    return {"path": str(path), "valid": not count, "rows": rows, "format": kind, "error_count": count, "errors": errors}


def _print_check(report: Mapping[str, Any]) -> None:
    if report["valid"]:
        output.say(f"{report['path']} is valid: {report['rows']:,} rows ({report['format']})")
        return
    errors = report["errors"] if report["rows"] else report["errors"][:_ERRORS_OF_NO_DATASET]
    for error in errors:
        output.console().print(
            output.plain(f"{error['reason']} ", "bold red") + output.plain(error["message"]), soft_wrap=True
        )
    count, shown = report["error_count"], len(errors)
    first = f" (above are the first {shown})" if shown < count else ""
    output.say(f"{report['path']} is not valid: lines that are wrong: {count:,}{first}; fine: {report['rows']:,}")
    if not report["rows"]:
        output.say("A dataset has one JSON object a line: docs/datasets.md has the formats")


def _print_statistics(path: Path, found: Statistics, by: str | None) -> None:
    output.card(
        path.name,
        [
            ("rows", f"{found.rows:,}"),
            ("format", found.format),
            ("vocabulary", f"{found.vocabulary:,} words, of {found.diversity_words:,}"),
            ("distinct-1", f"{found.distinct_1:.3f}"),
            ("distinct-2", f"{found.distinct_2:.3f}"),
            ("the same as one before", f"{found.exact:.1%}"),
            ("nearly the same", f"{found.near:.1%}"),
        ],
    )
    sizes = (("characters", found.characters), ("words", found.words), ("words of the answer", found.answer_words))
    out = output.console()
    out.print()
    out.print(
        output.table(
            ["a row has", "least>", "5 %>", "median>", "95 %>", "most>", "mean>"], [_spread(*each) for each in sizes]
        )
    )
    most = max(found.word_bins)
    out.print()
    out.print(
        output.table(
            ["words", "rows>", ""],
            [
                (f"{2**place if place else 0:,} - {2 ** (place + 1) - 1:,}", f"{count:,}", output.bar(count / most))
                for place, count in enumerate(found.word_bins)
            ],
        )
    )
    if by is not None:
        shown = list(found.strata.items())[:_STRATA_SHOWN]
        rows = [
            (value, f"{count:,}", output.bar(count / found.rows), f"{count / found.rows:.1%}") for value, count in shown
        ]
        out.print()
        out.print(output.table([by, "rows>", "", "share>"], rows))
        if len(found.strata) > len(shown):
            output.say(f"and {len(found.strata) - len(shown):,} more")


def _spread(name: str, sizes: Quantiles) -> tuple[str, ...]:
    values = (sizes.least, sizes.low, sizes.median, sizes.high, sizes.most, sizes.mean)
    return (name, *(f"{value:,.0f}" for value in values))


def _check_apart(path: Path, out: Path) -> None:
    if out.exists() and path.exists() and out.samefile(path):
        raise HocketError(Reason.BAD_REQUEST, f"{out} is the file that is read: write another one")
