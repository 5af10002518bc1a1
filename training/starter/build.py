"""Make the starter kit from seeds: `make starter`, or `python -m training.starter.build --only sql regex`.

The recipe is the one that anybody follows for their own experts, in the project's own commands: pretrain the base
(once), and for each expert write its data, `hocket train`, `hocket expert pack`, `hocket sign`. What is there already
is not made again, and a step that was stopped goes on from its last checkpoint: the command may be stopped, and given
again. Remove a package, or the base, to have it made anew, and the work folder too, to have it trained from the
beginning; the two of a pair are made together. Who has not the key of the kit's publisher signs with a
key of their own, which the kit then trusts as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from hocket.base_folder import base_digest
from hocket.errors import HocketError
from hocket.files import write_whole
from hocket.identity import digest_of
from hocket.keyring import keys_folder
from hocket.packages.expert.reader import decode
from hocket.packages.release import RELEASE_SUFFIX
from training.starter.corpus import TASKS
from training.starter.task import Split

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from training.starter.task import Task

KIT: Final = Path("starter")
BASE: Final = "hocket-starter"
PUBLISHER: Final = "hocket"
MANIFESTS: Final = Path(__file__).parent / "experts"
PAIR: Final = ("esperanto-nature", "esperanto-home")
"""Experts that are meant to be mixed."""
_ROUNDS: Final = 3
"""In which each of them goes on beside the other, after its first training."""
_FURTHER: Final = (
    *("--max-steps", "200", "--learning-rate", "0.002", "--warmup-steps", "10"),
    *("--eval-steps", "100", "--save-steps", "100", "--keep", "final"),
)
"""How they go on. The last weights are kept: those before were beside a neighbour that is no more."""
_TRAIN_ROWS: Final = 30_000
_EVAL_ROWS: Final = 200
_INTERRUPTED: Final = 130


def write_data(task: Task, path: Path, seed: str, rows: int, without: Collection[str] = ()) -> set[str]:
    """Write training examples as JSON lines, no prompt twice: `prompt`, `completion`, and which form of question it is.

    Args:
        task: What is learnt.
        path: The file.
        seed: Another one gives other examples, of the same templates.
        rows: How many are drawn; those drawn twice are written once.
        without: Prompts that must not be among them.

    Returns:
        The prompts that are.
    """
    random = Random(f"{task.name}:{seed}")  # noqa: S311  # reproducible, not secret
    drawn = {each.prompt: each for each in (task.example(random, Split.TRAIN) for _ in range(rows))}
    lines = [
        json.dumps({"prompt": each.prompt, "completion": each.answer, "kind": each.kind})
        for prompt, each in drawn.items()
        if prompt not in without
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return {*drawn}


def is_made(package: Path, base: str) -> bool:
    """Whether an expert is there, released, and rides on the base with this digest."""
    if not package.with_name(package.name + RELEASE_SUFFIX).exists():
        return False
    try:
        facts, _ = decode(data := package.read_bytes(), digest_of(data))
    except (OSError, HocketError):
        return False
    return facts.base.digest == base


def make_expert(task: Task, kit: Path, work: Path, key: Path) -> None:
    """Train, pack and sign one expert. Goes on where an earlier run was stopped."""
    _release(_train(task, kit / BASE, work, _place(kit, work) / task.name), kit, key)


def make_pair(pair: Sequence[Task], kit: Path, work: Path, key: Path) -> None:
    """Make two experts that are meant to be mixed: each learns beside the other, in turns, until both bear it.

    Trained apart, they would get into each other's way. Trained once, one beside the other, the second would bear the
    first as it is, and not the other way round. What was made in an earlier run is not made again.
    """
    first, second = pair
    made: dict[str, Path] = {}
    for turn in range(2 * (1 + _ROUNDS)):
        task, other = (first, second) if turn % 2 == 0 else (second, first)
        out = _place(kit, work) / f"pair-{turn}" / task.name
        package = _package_of(out)
        if not package.exists():
            _train(task, kit / BASE, work, out, start=made.get(task.name), beside=made.get(other.name))
        made[task.name] = package
    for package in made.values():
        _release(package, kit, key)


def _place(kit: Path, work: Path) -> Path:
    """Where trainings on the kit's base are kept: those on another base are others."""
    return work / base_digest(kit / BASE).removeprefix("sha256:")[:12]


def _package_of(out: Path) -> Path:
    return out.with_name(f"expert-{out.name}.expert")


def _train(
    task: Task, base: Path, work: Path, out: Path, *, start: Path | None = None, beside: Path | None = None
) -> Path:
    """Train and pack one expert: the package, which lies beside `out`. What goes on from another takes fewer steps."""
    data, evaluation = (work / f"{task.name}{end}" for end in (".jsonl", ".eval.jsonl"))
    asked = write_data(task, evaluation, "eval", _EVAL_ROWS)
    write_data(task, data, "train", _TRAIN_ROWS, without=asked)
    _hocket(
        *("train", str(MANIFESTS / f"{task.name}.json"), "--base", str(base)),
        *("--data", str(data), "--eval-data", str(evaluation), "--out", str(out), *(["--resume"] * out.exists())),
        *([] if beside is None else ["--beside", str(beside)]),
        *([] if start is None else ["--start", str(start), *_FURTHER]),
    )
    package = _package_of(out)
    package.unlink(missing_ok=True)
    _hocket("expert", "pack", str(out), "--base", str(base), "--out", str(package))
    return package


def _release(package: Path, kit: Path, key: Path) -> None:
    """Sign a package, and copy it into the kit with its release."""
    _hocket("sign", str(package), "--publisher", PUBLISHER, "--key", str(key))
    folder = kit / "experts"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (package, package.with_name(package.name + RELEASE_SUFFIX)):
        write_whole(folder / path.name, path.read_bytes())


def write_digests(kit: Path) -> None:
    """Write `digests.json`: the SHA-256 of every file of the kit that decides an answer."""
    files = sorted([*(kit / BASE).iterdir(), *(kit / "experts").glob("*.expert")])
    digests = {str(each.relative_to(kit)): digest_of(each.read_bytes()) for each in files}
    write_whole(kit / "digests.json", (json.dumps(digests, indent=2) + "\n").encode())


def make(names: Sequence[str], kit: Path, work: Path, key: Path) -> None:
    """Make what is missing of the kit, and nothing else; of a pair, both.

    Args:
        names: Experts that are wanted.
        kit: Where the kit is.
        work: For data and checkpoints.
        key: Who signs; made if there is none.
    """
    base = kit / BASE
    if not (base / "model.safetensors").exists():
        _run(sys.executable, "-m", "training.starter.pretrain", "--folder", str(base), "--work", str(work))
    digest = base_digest(base)
    missing = [name for name in names if not is_made(kit / "experts" / f"expert-{name}.expert", digest)]
    if not missing:
        sys.stdout.write(f"nothing to make: {kit} has the base and {', '.join(names)}\n")
        return
    if not key.exists():
        _hocket("keygen", str(key))
    _hocket("trust", "add", PUBLISHER, "--key", str(key), "--trust", str(kit / "trust"))
    for name in missing:
        if name not in PAIR:
            make_expert(TASKS[name], kit, work, key)
    if {*PAIR} & {*missing}:
        make_pair([TASKS[name] for name in PAIR], kit, work, key)
    write_digests(kit)


def _hocket(*arguments: str) -> None:
    """Run one of the project's own commands; its progress is ours."""
    _run(sys.executable, "-m", "hocket.cli.main", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False)  # noqa: S603  # our own programs
    if done.returncode:
        sys.exit(f"stopped at: {' '.join(command)}\nthe same command goes on from here")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing of the kit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=[*TASKS], metavar="EXPERT", help="make these alone")
    parser.add_argument("--kit", type=Path, default=KIT, help="where the kit is written")
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="for data and checkpoints")
    key = keys_folder(os.environ, Path.home()) / "starter.key"
    parser.add_argument("--key", type=Path, default=key, help=f"who signs ({key})")
    chosen = parser.parse_args(arguments)
    try:
        make(chosen.only, chosen.kit, chosen.work, chosen.key)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
