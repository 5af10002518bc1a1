"""Trained models as `.apr` packages: `hocket apr from-sklearn`, and `train-gate` for several of them."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path  # noqa: TC003 - typer builds options from their types
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import typer

from hocket.authoring import Draft, DraftMember, DraftSoftmax, format_draft
from hocket.cli import files, output
from hocket.cli.examples import read_examples
from hocket.cli.progress import spinner
from hocket.errors import HocketError, Reason
from hocket.identity import check_name, digest_of
from hocket.mixtures import FixedGate
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.answering import answer
from hocket.packages.apr.quantization import kind_of
from hocket.packages.from_sklearn import convert, load_estimator
from hocket.packages.gate_training import align
from hocket.packages.gate_training import train_gate as train
from hocket.packages.labels import label_of
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.packages.from_sklearn import Conversion, ConvertedExpert, Label
    from hocket.packages.gate_training import Figures, TrainedGate
    from hocket.packages.model import LinearModel, Model, ModelFacts

app = typer.Typer()

_APR: Final = ".apr"
_TOML: Final = ".toml"

Name = Annotated[
    str | None, typer.Option(help="What it is called.", show_default="the result's file name", metavar="NAME")
]


@app.command("from-sklearn")
def from_sklearn(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.skops", help="A fitted estimator, by skops.io.dump.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The .apr to write; of a vote the .toml of a mixture.", show_default=False),
    ],
    *,
    name: Name = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Name of a class, once for each in the estimator's order.", show_default=False),
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Leave this class out of answers: the rest.", show_default=False),
    ] = None,
    json: output.Json = False,
) -> None:
    """Make an .apr package out of a fitted scikit-learn estimator.

    Scalers of a pipeline are folded in. A VotingClassifier or
    VotingRegressor becomes a package for each member, beside OUT, and a
    mixture with its weights, for `hocket mixtures put`. Where answers will
    differ from scikit-learn's, it is said.

    The estimator comes from a .skops file: `skops.io.dump(estimator,
    "iris.skops")`. Pickles, and joblib's files, can run anything, and are
    not read. From Python: hocket.packages.from_sklearn.convert.

    $ hocket apr from-sklearn iris.skops iris.apr
    $ hocket apr from-sklearn vote.skops vote.toml
    """
    if file.suffix != ".skops":
        raise HocketError(
            Reason.BAD_REQUEST, f"{file} is no .skops file: write one with skops.io.dump(estimator, 'model.skops')"
        )
    estimator = load_estimator(files.read_file(file, DEFAULT_LIMITS.package_bytes))
    chosen = check_name(out.stem if name is None else name)
    conversion = convert(estimator, name=chosen, labels=label)
    if drop is not None:
        conversion = _without(conversion, drop)
    paths = _paths(conversion, out)
    digests = [_write_expert(expert, path) for expert, path in zip(conversion.experts, paths, strict=True)]
    if conversion.weights is not None:
        _write_vote(out, chosen, conversion, conversion.weights, paths)
    if json:
        output.emit(_document(out, conversion, paths, digests))
    else:
        _print_experts(out, conversion, paths, digests)


@app.command("train-gate")
def train_gate(
    members: Annotated[
        list[Path], typer.Argument(metavar="MEMBER.apr...", help="The experts, two or more.", show_default=False)
    ],
    *,
    examples: Annotated[
        Path,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Rows with what is true: .csv, or .npz with arrays rows and truth.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Mixture to write, .toml or .apr.", show_default=False)
    ],
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Column of the .csv with the truth: its place, or its name.", show_default="last"
        ),
    ] = None,
    name: Name = None,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that answer a row.")] = 1,
    held_out: Annotated[float, typer.Option(metavar="SHARE", help="Share of the rows to measure on.")] = 0.25,
    penalty: Annotated[float, typer.Option(help="How much large weights are held back (L2).")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are held out.")] = 0,
    json: output.Json = False,
) -> None:
    """Train the gate of a mixture: which expert does best on a row.

    The rows must be ones that the experts have not learned from. Some are
    held out, and say how well the mixture does beside its members alone.

    As .toml the mixture names its members by digest, and the gate lies
    beside it; publish the members, then `hocket mixtures put` it. As .apr
    it is one file with all in it, which linear models of one kind can be.

    $ hocket apr train-gate low.apr high.apr --examples rows.csv --truth digit -o digits.toml
    $ hocket apr train-gate north.apr south.apr --examples rows.npz -o prices.apr --top-k 2
    """
    if out.suffix not in {_APR, _TOML}:
        raise HocketError(Reason.BAD_REQUEST, f"{out} must be named .toml or .apr: that says what to write")
    chosen = check_name(out.stem if name is None else name)
    opened = [_open(path) for path in members]
    inside = _linear_kind([model for _, model in opened]) if out.suffix == _APR else None
    with spinner(f"training the gate of {chosen}", shown=not json):
        rows, told = read_examples(examples, truth)
        answers = align([answer(model, facts, rows) for facts, model in opened], [facts.labels for facts, _ in opened])
        trained = train(
            rows, answers, told, top_k=top_k, bias=inside is None, held_out=held_out, penalty=penalty, seed=seed
        )
    tensor = None
    if inside is not None:
        gate = m.SoftmaxGate(trained.weights)
        files.write_file(out, apr.write(m.MixtureOfExperts(inside, gate, m.MoeConfig(top_k)), name=chosen))
    else:
        tensor = _write_mixture(out, chosen, [facts.digest for facts, _ in opened], trained, top_k)
    unknown = sorted({str(label_of(true)) for true in told} - set(answers.labels)) if answers.labels is not None else []
    if json:
        learned = {"learned_rows": trained.rows, "converged": trained.converged, "figures": asdict(trained.figures)}
        gate_path = None if tensor is None else str(tensor)
        output.emit({"path": str(out), "gate_path": gate_path, **learned, "unknown_labels": unknown})
        return
    _print_figures(out, [path.name for path in members], trained)
    if not trained.converged:
        advice = "a better gate may exist: a larger --penalty ends sooner"
        output.say(f"warning: training was stopped before its end, {advice}", stderr=True)
    if unknown:
        output.say(f"warning: no member knows {', '.join(unknown[:10])}: such rows count as wrong", stderr=True)
    if tensor is None:
        output.next_steps(*files.publishing(out, chosen))
        return
    output.say(f"the weights of the gate are in {tensor}, where {out} looks for them")
    output.next_steps(*(step for path in members for step in _publishing_member(path)), _putting(out))


def _without(conversion: Conversion, drop: str) -> Conversion:
    """The conversion with one class left out of its answers."""
    if drop not in map(str, conversion.labels or ()):
        known = list(conversion.labels or ())
        raise HocketError(Reason.BAD_REQUEST, f"there is no class {drop!r} to drop: the estimator has {known}")

    def rest(labels: tuple[Label, ...] | None) -> tuple[Label, ...] | None:
        return None if labels is None else tuple(None if str(label) == drop else label for label in labels)

    experts = tuple(replace(expert, labels=rest(expert.labels)) for expert in conversion.experts)
    return replace(conversion, experts=experts, labels=rest(conversion.labels))


def _paths(conversion: Conversion, out: Path) -> list[Path]:
    """Where each expert is written: at OUT, or beside the mixture of a vote, where nothing may be yet."""
    vote = conversion.weights is not None
    if out.suffix != (_TOML if vote else _APR):
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{out} should be named {_TOML if vote else _APR}: "
            + ("a vote becomes a mixture of several packages" if vote else "one estimator becomes one package"),
        )
    if not vote:
        return [out]
    paths = [out.with_name(f"{expert.name}{_APR}") for expert in conversion.experts]
    for path in paths:
        if path.exists():
            raise HocketError(
                Reason.NAME_TAKEN,
                f"{path} exists, and a member of the vote would take its place: move it away, or choose another --name",
            )
    return paths


def _write_expert(expert: ConvertedExpert, path: Path) -> str:
    """The digest of what is written."""
    data = apr.write(expert.model, name=expert.name, labels=expert.labels)
    files.write_file(path, data)
    return digest_of(data)


def _write_vote(
    out: Path, name: str, conversion: Conversion, weights: tuple[float, ...], paths: Sequence[Path]
) -> None:
    """A mixture of packages that lie beside it."""
    members = tuple(DraftMember("expert", path.name) for path in paths)
    labels = conversion.labels
    kept = None if labels is None else tuple(str(label) for label in labels if label is not None)
    files.write_file(out, format_draft(Draft(name, members, FixedGate(weights), labels=kept)).encode())


def _document(out: Path, conversion: Conversion, paths: Sequence[Path], digests: Sequence[str]) -> dict[str, object]:
    packages = [
        {
            "path": str(path),
            "name": expert.name,
            "digest": digest,
            "layout": type(expert.model).__name__,
            "notes": expert.notes,
        }
        for expert, path, digest in zip(conversion.experts, paths, digests, strict=True)
    ]
    return {"path": str(out), "packages": packages, "weights": conversion.weights, "labels": conversion.labels}


def _print_experts(out: Path, conversion: Conversion, paths: Sequence[Path], digests: Sequence[str]) -> None:
    next_steps: list[tuple[object, ...]] = []
    for expert, path, digest in zip(conversion.experts, paths, digests, strict=True):
        columns = ("(dropped)" if label is None else str(label) for label in expert.labels or ())
        output.card(
            expert.name,
            [
                ("written to", path),
                ("digest", digest),
                ("model", type(expert.model).__name__),
                ("answers", ", ".join(columns) or "one number"),
                *(("note", note) for note in expert.notes),
            ],
        )
        next_steps += files.publishing(path, expert.name)
    if conversion.weights is not None:
        next_steps.append(_putting(out))
    output.next_steps(*next_steps)


def _putting(mixture: Path) -> tuple[object, ...]:
    """The command that signs a mixture and puts it into a registry."""
    return ("hocket", "mixtures", "put", mixture, "--publisher", "YOU", "--version", "VERSION")


def _open(path: Path) -> tuple[ModelFacts, Model]:
    data = files.read_package(path)
    return apr.decode(apr.split(data), digest_of(data))


def _linear_kind(models: Sequence[Model]) -> tuple[LinearModel, ...]:
    """The models that can be the experts of one `.apr` mixture."""
    linear = tuple(model for model in models if isinstance(model, m.LinearModel) and kind_of(model) is None)
    if len(linear) < len(models) or len({type(model) for model in linear}) > 1:
        kinds = ", ".join(sorted({type(model).__name__ for model in models}))
        raise HocketError(
            Reason.BAD_REQUEST,
            f"an .apr mixture holds linear models of one kind, not quantised; these are {kinds}: write a .toml",
        )
    return linear


def _publishing_member(path: Path) -> list[tuple[object, ...]]:
    """The commands for an expert that may have its release already."""
    steps = files.publishing(path)
    return steps[1:] if files.release_path(path).exists() else steps


def _write_mixture(out: Path, name: str, digests: Sequence[str], trained: TrainedGate, top_k: int) -> Path:
    """The mixture as TOML, and its gate beside it: where that is."""
    weights = io.BytesIO()
    np.save(weights, trained.weights, allow_pickle=False)
    beside = out.with_name(f"{out.stem}-gate.npy")
    gate = DraftSoftmax(trained.weights, bias=trained.bias)
    draft = Draft(name, tuple(DraftMember("expert", digest) for digest in digests), gate, top_k=top_k)
    files.write_file(beside, weights.getvalue())
    files.write_file(out, format_draft(draft, beside.name).encode())
    return beside


def _print_figures(out: Path, names: Sequence[str], trained: TrainedGate) -> None:
    figures = trained.figures
    output.say(f"{out}: a gate over {len(names)} experts, learned from {trained.rows} rows")
    better = "more is better" if figures.measure == "accuracy" else "less is better"
    rows: list[tuple[str, str]] = [
        ("the mixture, with this gate", _number(figures.mixture, figures)),
        *((f"{name} alone", _number(value, figures)) for name, value in zip(names, figures.members, strict=True)),
        ("all weighed alike", _number(figures.equal, figures)),
        ("if the best were known", _number(figures.ideal, figures)),
    ]
    output.print_table([f"on {figures.rows} held-out rows", f"{figures.measure}>"], rows, "")
    output.say(
        f"({better}; the gate's first choice does best on {figures.chosen_best:.1%} of the rows where it matters)"
    )


def _number(value: float, figures: Figures) -> str:
    return f"{value:.1%}" if figures.measure == "accuracy" else f"{value:.4g}"
