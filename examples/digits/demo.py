"""`make demo`: train, sign, publish and serve digit experts, then ask them all at once.

Nothing is faked: the experts are trained here, each goes into a signed `.apr` file, a suite in a process of its own
verifies and serves them over gRPC, and every number below comes out of that suite.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.digits.train import Member, Split, splits, train_gate, train_members
from examples.publishing import Publisher, known, softmax_mixture, uniform_mixture
from examples.running import run, suite
from hocket.client import Answer, Planned, connect, connect_registry
from hocket.packages import apr
from hocket.packages.from_sklearn import convert
from hocket.v1 import plan_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hocket.client import RouterClient

LABELS: Final = tuple(str(digit) for digit in range(10))
_SHADES: Final = " .:-=+*#%@"
_BAR_WIDTH: Final = 20
_SHOWN: Final = 7


def apr_files(members: Sequence[Member]) -> dict[str, bytes]:
    """Each expert as the bytes of an `.apr` file, by name."""
    files = {}
    for member in members:
        labels = [None if digit is None else str(digit) for digit in member.digits]
        [expert] = convert(member.estimator, name=member.name, labels=labels).experts
        files[expert.name] = apr.write(expert.model, name=expert.name, labels=expert.labels, created_at="0")
    return files


async def accuracy(router: RouterClient, model: str, data: Split) -> float:
    """Share of rows whose best label is the right one, asked of the suite."""
    answer = await router.answer(model, data.rows)
    return float(np.mean([label == str(digit) for label, digit in zip(answer.best_labels(), data.digits, strict=True)]))


def show_digit(console: Console, row: NDArray[np.float32]) -> None:
    """The picture, eight by eight."""
    for line in (row.reshape(8, 8) * (len(_SHADES) - 1)).round().astype(int):
        console.print("    " + "".join(_SHADES[shade] * 2 for shade in line), highlight=False, markup=False)


async def explain_one(console: Console, router: RouterClient, names: dict[str, str], row: NDArray[np.float32]) -> None:
    """Who would answer for one picture, with which weight, and what the two chosen make of it."""
    decision = await router.route("digits", row)
    for candidate in decision.rows[0].candidates:
        bar = "#" * round(candidate.gate_weight * _BAR_WIDTH)
        chosen = f"[green]chosen, {candidate.weight:.3f}[/]" if candidate.chosen else ""
        console.print(
            f"    {names[candidate.expert]:<11} {candidate.gate_weight:6.3f} [cyan]{bar:<{_BAR_WIDTH}}[/] {chosen}",
            highlight=False,
        )
    answer = await router.answer("digits", row)
    console.print(f"    the mixture says {answer.best_labels()[0]}, {answer.value[0].max():.1%}", highlight=False)


async def watch_all(console: Console, router: RouterClient, data: Split, expert_count: int) -> None:
    """Ask every expert about every picture, and print each partial combination as it comes."""
    labels: Sequence[str] = ()
    begin = time.perf_counter()
    async for event in router.predict("digits", data.rows, top_k=expert_count, partials=True):
        if isinstance(event, Planned):
            labels = event.plan.labels
            continue
        arrived = sum(c.state == plan_pb2.CONTRIBUTION_STATE_ARRIVED for c in event.contributions)
        right = np.mean(
            [labels[best] == str(digit) for best, digit in zip(event.value.argmax(1), data.digits, strict=True)]
        )
        covered = "=" * round(float(event.coverage.mean()) * _BAR_WIDTH)
        kind = "final" if isinstance(event, Answer) else "partial"
        console.print(
            f"  {(time.perf_counter() - begin) * 1e3:6.1f} ms  {kind:<7} {arrived} of {expert_count}, weight "
            f"{event.coverage.mean():.3f} [green]{covered:<{_BAR_WIDTH}}[/] accuracy {right:.1%}",
            highlight=False,
        )


async def demo(console: Console, folder: Path) -> dict[str, float]:
    """Everything; returns the accuracy of each model on the held-out rows."""
    expert_data, gate_data, held_out = splits()
    console.print(f"[bold]Training[/] on {len(expert_data.rows)} pictures, the gate on {len(gate_data.rows)} others")
    members = train_members(expert_data)
    weights, bias = train_gate(members, gate_data)
    files = apr_files(members)
    publisher = Publisher.trusted_in(folder, "digit-lab")
    console.print("[bold]Starting[/] router, aggregator, registry and worker in one process")
    async with (
        suite(folder) as running,
        connect(running.router) as router,
        connect_registry(running.registry) as registry,
    ):
        digests = {}
        with Progress(console=console, transient=True) as progress:
            for name, data in progress.track(files.items(), description="Signing and publishing"):
                digests[name] = await publisher.publish(registry, data, name)
        record, gate = softmax_mixture("digits", [*digests.values()], weights, top_k=2, bias=bias, labels=LABELS)
        await publisher.put(registry, record, gate)
        await publisher.put(registry, uniform_mixture("digits-uniform", [*digests.values()], LABELS))
        console.print(f"[bold]Published[/] {len(files)} signed experts and 2 signed mixtures")
        await known(router, "digits", "digits-uniform")

        scores = {name: await accuracy(router, f"digit-lab/{name}@1.0.0", held_out) for name in files}
        scores["digits-uniform"] = await accuracy(router, "digits-uniform", held_out)
        scores["digits"] = await accuracy(router, "digits", held_out)
        _print_scores(console, members, scores, len(held_out.rows))

        names = {digest: name for name, digest in digests.items()}
        console.print("\n[bold]One picture nobody has seen[/], and what the gate thinks of everybody:\n")
        show_digit(console, held_out.rows[_SHOWN])
        await explain_one(console, router, names, held_out.rows[_SHOWN])
        console.print(f"\n[bold]All {len(held_out.rows)} pictures, all experts[/], combinations as they arrive:\n")
        await watch_all(console, router, held_out, len(names))
    return scores


def _print_scores(console: Console, members: Sequence[Member], scores: dict[str, float], count: int) -> None:
    table = Table(title=f"Accuracy on {count} held-out pictures", title_justify="left")
    table.add_column("model")
    table.add_column("knows")
    table.add_column("accuracy", justify="right")
    for member in members:
        knows = " ".join(str(digit) for digit in member.digits if digit is not None)
        table.add_row(member.name, knows, f"{scores[member.name]:.1%}")
    table.add_section()
    table.add_row("digits-uniform", "uniform average of all", f"{scores['digits-uniform']:.1%}")
    table.add_row("[bold]digits", "[bold]gated mixture, two experts a row", f"[bold]{scores['digits']:.1%}")
    console.print(table)


def main() -> None:
    """Run the demo; `--json` prints the accuracies as one object and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the accuracies as JSON")
    arguments = parser.parse_args()
    console = Console(quiet=arguments.json)
    with tempfile.TemporaryDirectory(prefix="hocket-digits-") as folder:
        scores = run(demo(console, Path(folder)))
    if arguments.json:
        print(json.dumps(scores))
    console.print("\nYour own suite: [bold]make up[/], then [bold].venv/bin/hocket --help[/]")


if __name__ == "__main__":
    main()
