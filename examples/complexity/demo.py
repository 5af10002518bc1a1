"""Four regressors of different scope behind a 768-feature gate, in one signed `.apr` file, top-2."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as RidgeEstimator

from examples.complexity.requests import KINDS, Request, features, make_requests
from examples.publishing import Publisher, known
from examples.running import run, suite
from hocket.client import connect, connect_registry
from hocket.packages import apr
from hocket.packages import model as m

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hocket.client import RouterClient

_ALPHA: Final = 1.0
_LEAST_SHOWN: Final = 0.0005
_SHOWN: Final = (
    "please reset my account",
    "please compare the invoice with figures per region",
    "design a migration plan for the data lake for the board by friday",
    "check the tax treatment of the payroll run",
)


def train(requests: Sequence[Request]) -> m.MixtureOfExperts:
    """A ridge regressor per kind of request, and a gate that has learnt the kinds: the layout of type 0x0040."""
    rows = features([request.text for request in requests])
    minutes = np.array([request.minutes for request in requests])
    kinds = np.array([KINDS.index(request.kind) for request in requests])
    gate = LogisticRegression(C=100.0, max_iter=500, fit_intercept=False).fit(rows, kinds)
    return m.MixtureOfExperts(
        experts=tuple(ridge(rows[kinds == kind], minutes[kinds == kind]) for kind in range(len(KINDS))),
        gate=m.SoftmaxGate(gate.coef_.T.astype(np.float32)),
        config=m.MoeConfig(top_k=2),
    )


def ridge(rows: NDArray[np.float32], minutes: NDArray[np.float64]) -> m.Ridge:
    """One regressor."""
    fitted = RidgeEstimator(alpha=_ALPHA).fit(rows, minutes)
    return m.Ridge(fitted.coef_.astype(np.float32), float(np.float32(fitted.intercept_)), _ALPHA)


async def error(router: RouterClient, model: str, requests: Sequence[Request]) -> float:
    """Root mean squared error in minutes, asked of the suite."""
    answer = await router.answer(model, features([request.text for request in requests]))
    return float(np.sqrt(np.mean((answer.value[:, 0] - [request.minutes for request in requests]) ** 2)))


async def demo(console: Console, folder: Path) -> dict[str, float]:
    """Everything; returns the error of each model on held-out requests, in minutes."""
    console.print("How long will a request take? A gate over 768 features asks specialists.\n")
    past, held_out = make_requests(2000, seed=1), make_requests(500, seed=2)
    mixture = train(past)
    everything = ridge(features([r.text for r in past]), np.array([r.minutes for r in past]))
    publisher = Publisher.trusted_in(folder, "help-desk")
    async with (
        suite(folder) as running,
        connect(running.router) as router,
        connect_registry(running.registry) as registry,
    ):
        digest = await publisher.publish(registry, apr.write(mixture, name="effort", created_at="0"), "effort")
        await publisher.publish(registry, apr.write(everything, name="one-for-all", created_at="0"), "one-for-all")
        model = "help-desk/effort@1.0.0"
        await known(router, model, "help-desk/one-for-all@1.0.0")
        errors = {kind: await error(router, f"{digest}#{place}", held_out) for place, kind in enumerate(KINDS)}
        errors["one-for-all"] = await error(router, "help-desk/one-for-all@1.0.0", held_out)
        errors["mixture"] = await error(router, model, held_out)
        console.print(f"Error on {len(held_out)} held-out requests, minutes (RMSE)", style="italic")
        table = Table()
        table.add_column("model")
        table.add_column("error", justify="right")
        for name, value in errors.items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
        await _explain(console, router, model)
    return errors


async def _explain(console: Console, router: RouterClient, model: str) -> None:
    decision = await router.route(model, features(_SHOWN))
    answer = await router.answer(model, features(_SHOWN))
    for text, row, value in zip(_SHOWN, decision.rows, answer.value[:, 0], strict=True):
        console.print(f"\n'{text}': {value:.1f} minutes", highlight=False)
        for candidate in row.candidates:
            kind = KINDS[int(candidate.expert.partition("#")[2] or 0)]
            mark = f"[green]chosen, weight {shown(candidate.weight)}[/]" if candidate.chosen else "[dim]not chosen[/]"
            console.print(f"    {kind:<7} gate {shown(candidate.gate_weight):>6}  {mark}", highlight=False)


def shown(weight: float) -> str:
    """A weight in three decimals; `<0.001` for what would look like nothing."""
    return "<0.001" if 0 < weight < _LEAST_SHOWN else f"{weight:.3f}"


def main() -> None:
    """Run the example; `--json` prints the errors as one object and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the errors as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hocket-complexity-") as folder:
        errors = run(demo(Console(quiet=arguments.json), Path(folder)))
    if arguments.json:
        print(json.dumps(errors))


if __name__ == "__main__":
    main()
