"""Make the starter kit from seeds: `make starter`, or `python -m training.starter.build --only sql regex`.

The recipe is the one that anybody follows for their own experts, in the project's own commands: pretrain the base
(once), and for each expert write its data, `hocket train`, `hocket expert pack`, `hocket sign`. What is there already
is not made again, and a step that was stopped goes on from its last checkpoint: the command may be stopped, and given
again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from hocket.files import write_whole
from hocket.identity import digest_of
from training.starter.corpus import TASKS
from training.starter.task import Split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.starter.task import Task

KIT: Final = Path("starter")
BASE: Final = "hocket-starter"
PUBLISHER: Final = "hocket"
MANIFESTS: Final = Path(__file__).parent / "experts"
_TRAIN_ROWS: Final = 30_000
_EVAL_ROWS: Final = 200


def write_data(task: Task, path: Path, seed: str, rows: int) -> None:
    """Write training examples as JSON lines, each line once: `prompt`, `completion`, and which form of question it is.

    Args:
        task: What is learnt.
        path: The file.
        seed: Another one gives other examples, of the same templates.
        rows: How many are drawn; those drawn twice are written once.
    """
    random = Random(f"{task.name}:{seed}")  # noqa: S311  # reproducible, not secret
    drawn = (task.example(random, Split.TRAIN) for _ in range(rows))
    lines = {json.dumps({"prompt": each.prompt, "completion": each.answer, "kind": each.kind}): None for each in drawn}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def make_expert(task: Task, kit: Path, work: Path, key: Path) -> Path:
    """Train, pack and sign one expert. Goes on where an earlier run was stopped.

    Returns:
        The package.
    """
    package = kit / "experts" / f"expert-{task.name}.expert"
    if package.exists():
        return package
    data, evaluation, out = (work / f"{task.name}{end}" for end in (".jsonl", ".eval.jsonl", ""))
    write_data(task, data, "train", _TRAIN_ROWS)
    write_data(task, evaluation, "eval", _EVAL_ROWS)
    manifest, base = str(MANIFESTS / f"{task.name}.json"), str(kit / BASE)
    resume = ["--resume"] if out.exists() else []
    _hocket(
        *("train", manifest, "--base", base, "--data", str(data), "--eval-data", str(evaluation)),
        *("--out", str(out), *resume),
    )
    package.parent.mkdir(parents=True, exist_ok=True)
    _hocket("expert", "pack", str(out), "--base", base, "--out", str(package))
    _hocket("sign", str(package), "--publisher", PUBLISHER, "--key", str(key))
    return package


def write_digests(kit: Path) -> None:
    """Write `digests.json`: the SHA-256 of every file of the kit that decides an answer."""
    files = sorted([*(kit / BASE).iterdir(), *(kit / "experts").glob("*.expert")])
    digests = {str(each.relative_to(kit)): digest_of(each.read_bytes()) for each in files}
    write_whole(kit / "digests.json", (json.dumps(digests, indent=2) + "\n").encode())


def _hocket(*arguments: str) -> None:
    """Run one of the project's own commands; its progress is ours."""
    subprocess.run([sys.executable, "-m", "hocket.cli.main", *arguments], check=True)  # noqa: S603  # our own program


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing of the kit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=[*TASKS], metavar="EXPERT", help="make these alone")
    parser.add_argument("--kit", type=Path, default=KIT, help="where the kit is written")
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="for data and checkpoints")
    parser.add_argument("--key", type=Path, help="who signs; a key of its own is made if absent")
    chosen = parser.parse_args(arguments)
    if not (chosen.kit / BASE / "model.safetensors").exists():
        script = [sys.executable, "-m", "training.starter.pretrain"]
        subprocess.run([*script, "--folder", chosen.kit / BASE, "--work", chosen.work], check=True)  # noqa: S603  # ours
    key = chosen.key or chosen.work / "publisher.key"
    if not key.exists():
        _hocket("keygen", str(key))
    _hocket("trust", "add", PUBLISHER, "--key", str(key), "--trust", str(chosen.kit / "trust"))
    for name in chosen.only:
        make_expert(TASKS[name], chosen.kit, chosen.work, key)
    write_digests(chosen.kit)


if __name__ == "__main__":
    main()
