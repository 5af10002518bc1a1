"""`hocket-train`, or `python -m training`: train an expert from a manifest and a dataset. `hocket train` starts this.

What is heavy is imported when the arguments are right.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from hocket.errors import HocketError, Reason
from training.extras import check_installed
from training.plan import Device, Settings, plan_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.train import Outcome, Progress

_REFUSED: Final = 2
_STOPPED: Final = 130
_NEEDED: Final = ("jinja2", "matplotlib", "peft", "rich", "torch", "transformers", "trl")


def main(argv: Sequence[str] | None = None) -> int:
    """Train.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 done, 2 refused, 130 interrupted.
    """
    arguments = make_parser().parse_args(argv)
    try:
        check_installed(_NEEDED, what="training", extra="training")
        _run(arguments)
    except HocketError as error:
        _refuse(error, as_json=arguments.json)
        return _REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; --resume goes on from the last checkpoint\n")
        return _STOPPED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; the tutorial's test reads its commands with it."""
    parser = argparse.ArgumentParser(
        prog="hocket train",
        description="Train an adapter from a manifest and a dataset. What is given here wins over the manifest, which "
        "wins over the defaults. All of it is explained in docs/training.md.",
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest.json, or its folder")
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the base model")
    parser.add_argument("--data", type=Path, metavar="FILE", help="dataset, JSON lines (default: the manifest's)")
    parser.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="dataset to evaluate on (default: the manifest's)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--device", choices=list(Device), default=Device.AUTO, help="auto takes CUDA where it is")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: torch's)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument(
        "--start",
        type=Path,
        dest="start_package",
        metavar="EXPERT",
        help="a package to go on from (default: begin anew)",
    )
    parser.add_argument("--beside", type=Path, metavar="EXPERT", help="a package to learn to be mixed with (LoRA)")
    parser.add_argument("--beside-weight", type=float, metavar="W", help="its weight; ours is 1 - W (default: 0.5)")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of text")
    settings = parser.add_argument_group("settings")
    for each in fields(Settings):
        option = f"--{each.name.replace('_', '-')}"
        default = each.default
        help_text = f"{each.metadata['help']} (default: {default})"
        common: dict[str, Any] = {"dest": each.name, "default": None, "help": help_text}
        if isinstance(default, bool):
            settings.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        else:
            kind = str if isinstance(default, str) else type(default)
            settings.add_argument(option, type=kind, metavar=kind.__name__.upper(), **common)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    manifest: Path = arguments.manifest
    if manifest.is_dir():
        manifest /= "manifest.json"
    told = {each.name: value for each in fields(Settings) if (value := getattr(arguments, each.name)) is not None}
    if arguments.threads is not None and arguments.threads < 1:
        raise HocketError(Reason.BAD_REQUEST, f"--threads is {arguments.threads}: it must be at least 1")
    with nullcontext() if arguments.json else _Bars() as bars:
        plan = plan_training(
            manifest,
            base=arguments.base,
            out=arguments.out,
            data=arguments.data,
            eval_data=arguments.eval_data,
            device=Device(arguments.device),
            resume=arguments.resume,
            start_package=arguments.start_package,
            beside=arguments.beside,
            beside_weight=arguments.beside_weight,
            settings=told,
            on_progress=None if bars is None else partial(bars.move, "hashing the base"),
        )
        for warning in plan.warnings:
            _say(f"warning: {warning}")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says what it lacks when PEFT looks for it
        import torch  # noqa: PLC0415 - heavy

        from training.train import train  # noqa: PLC0415 - heavy

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        outcome = train(plan, on_progress=_emit_progress if bars is None else bars.show)
    if arguments.json:
        _emit(_outcome(outcome))
    else:
        _print(outcome)


class _Bars:
    """A bar for each phase on standard error, none where nobody would see it; points of the curve above them."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - not for --json
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._console = Console(stderr=True, highlight=False)
        shown = sys.stderr.isatty()
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not shown)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def move(self, phase: str, done: int, total: int | None) -> None:
        """Move the bar of a phase; at its end it goes away."""
        task = self._tasks.get(phase)
        if task is None:
            task = self._tasks[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(task, completed=done, total=total, visible=done != total)

    def show(self, progress: Progress) -> None:
        """Move a bar; print a point of the curve."""
        self.move(progress.phase, progress.done, progress.total)
        if progress.loss is not None:
            self._console.print(
                f"step {progress.step}  loss {progress.loss:.4f}  learning rate {progress.learning_rate:.3g}"
            )
        if progress.eval_loss is not None:
            self._console.print(f"step {progress.step}  evaluation loss {progress.eval_loss:.4f}")


def _emit_progress(progress: Progress) -> None:
    """A line for each point of the curve."""
    if progress.loss is not None or progress.eval_loss is not None:
        point = {"step": progress.step, "steps": progress.total}
        for key in ("loss", "eval_loss", "learning_rate"):
            if (value := getattr(progress, key)) is not None:
                point[key] = value
        _emit(point)


def _outcome(outcome: Outcome) -> dict[str, object]:
    return {"outcome": {**asdict(outcome), "out": str(outcome.out)}}


def _print(outcome: Outcome) -> None:
    kept = f"{outcome.kept} of {outcome.steps} steps"
    measured = "" if outcome.eval_loss is None else f", evaluation loss {outcome.eval_loss:.4f}"
    left_out = f" ({outcome.left_out} rows were too long)" if outcome.left_out else ""
    speed = f"in {outcome.seconds:.0f} s, {outcome.tokens_learnt / outcome.seconds:.0f} tokens/s"
    for line in (
        f"{outcome.out}: {kept}{measured}",
        f"  {outcome.parameters} parameters from {outcome.examples} examples of {outcome.tokens} tokens{left_out}",
        f"  {outcome.tokens_learnt} tokens learnt {speed}, {outcome.precision}, {outcome.device}",
        f"Next: {shlex.join(('hocket', 'expert', 'validate', str(outcome.out)))}",
        f"      {shlex.join(('hocket', 'expert', 'pack', str(outcome.out)))}",
    ):
        sys.stdout.write(line + "\n")


def _emit(value: object) -> None:
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write("".join(c if c.isprintable() else "?" for c in text) + "\n")


def _refuse(error: HocketError, *, as_json: bool) -> None:
    if as_json:
        _emit({"error": {"reason": str(error.reason), "message": error.message}})
    else:
        _say(str(error))


def run() -> None:
    """The console script. A bug of ours shows its traceback to those who ask for it."""
    try:
        sys.exit(main())
    except Exception as error:
        if os.environ.get("HOCKET_DEBUG"):
            raise
        _say(
            f"hocket train failed unexpectedly ({type(error).__name__}): this is a bug. Run the same command with "
            "HOCKET_DEBUG=1 for the traceback, and report it."
        )
        sys.exit(1)


if __name__ == "__main__":
    run()
