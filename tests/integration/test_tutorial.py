"""The tutorial is run as it stands, one block after the other.

`<!-- run -->` marks what is run, `<!-- up -->` the suite, which goes on running, `<!-- long -->` what is run with the
real kit alone, and `<!-- tiny: OPTIONS -->` above one of them what is appended to `hocket train` where training is not
the point. All of it takes more than a minute; the fast tests run what comes before training.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from examples import running
from examples.starter.kit import Kit
from examples.text.random_base import write_base
from hocket.errors import HocketError
from hocket.packages.adapter import AdapterKind
from tests.starter_kits import SIZES, random_kit
from training.__main__ import make_parser
from training.plan import plan_training

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- tiny: (?P<tiny>.*?) -->\n)?<!-- (?P<kind>run|up|long) -->\n```sh\n(?P<text>.*?)```", re.DOTALL
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer((ROOT / "docs" / "tutorial.md").read_text())]
TRAIN = next(place for place, block in enumerate(BLOCKS) if "hocket train" in block["text"])
UP = next(place for place, block in enumerate(BLOCKS) if block["kind"] == "up")
READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who follows the tutorial, in folders of their own.

    Attributes:
        folder: Home and /tmp.
        kit: The starter kit.
        router: Port.
        registry: Port.
        tiny: Whether to train for a few steps only.
    """

    folder: Path
    kit: Path
    router: int
    registry: int
    tiny: bool

    def script(self, blocks: list[dict[str, str]]) -> str:
        """Blocks as this reader would type them."""
        text = "set -eux\n"
        for block in blocks:
            typed = block["text"]
            if self.tiny and block["tiny"]:
                typed = re.sub(r"^(hocket train .*)$", rf"\1 {block['tiny']}", typed, flags=re.MULTILINE)
            text += typed
        for written, actual in (
            (". .venv/bin/activate", ":"),
            ("/tmp/", f"{self.folder}/"),  # noqa: S108 - the tutorial's words
            (" starter/", f" {self.kit}/"),
            ("~/.config", str(self.folder / "config")),
            ("~/.local/share", str(self.folder / "share")),
            ("~/models", str(self.folder / "models")),
        ):
            text = text.replace(written, actual)
        return text

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "XDG_DATA_HOME": str(self.folder / "share"),
            "HOCKET_ROUTER": f"127.0.0.1:{self.router}",
            "HOCKET_REGISTRY": f"127.0.0.1:{self.registry}",
        }

    def run(self, blocks: list[dict[str, str]]) -> str:
        """Run blocks; what they print."""
        done = subprocess.run(
            ["bash", "-c", self.script(blocks)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    @contextmanager
    def suite(self, block: dict[str, str]) -> Iterator[None]:
        """The suite of the tutorial, on ports of its own, until the block ends."""
        ports = f"--router-port {self.router} --registry-port {self.registry} --set router.drain_notice_seconds=0"
        command = f"exec {block['text'].strip()} {ports} --set registry.drain_notice_seconds=0"
        with (self.folder / "suite.log").open("wb") as log:
            process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=self.environment, stdout=log, stderr=log)
            try:
                end = time.monotonic() + READY_SECONDS
                while b'"event": "ready"' not in (self.folder / "suite.log").read_bytes():
                    assert process.poll() is None, (self.folder / "suite.log").read_text()
                    assert time.monotonic() < end, (self.folder / "suite.log").read_text()
                    time.sleep(0.05)
                yield
            finally:
                process.terminate()
                process.wait(30)


def follow(reader: Reader) -> str:
    """Everything; what was printed."""
    kinds = {"run"} if reader.tiny else {"run", "long"}
    wanted = [block for block in BLOCKS[UP + 1 :] if block["kind"] in kinds]
    printed = reader.run(BLOCKS[:UP])
    with reader.suite(BLOCKS[UP]):
        return printed + reader.run(wanted)


def reader_of(folder: Path, kit: Path, *, tiny: bool) -> Reader:
    router, registry = running.free_ports(2)
    return Reader(folder, kit, router, registry, tiny)


def test_what_comes_before_training_runs_and_is_what_training_asks_for(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, random_kit(tmp_path / "kit"), tiny=True)
    commands = [
        shlex.split(line)
        for block in BLOCKS
        for line in reader.script([block]).splitlines()
        if line.startswith("hocket train")
    ]

    reader.run(BLOCKS[:TRAIN])

    assert len(commands) == 2
    first, second = (make_parser().parse_args(command[2:]) for command in commands)
    assert (first.max_steps, second.max_steps, second.qlora) == (2, 1, True)
    plan = plan_training(first.manifest / "manifest.json", base=first.base, out=first.out)
    assert (plan.adapter.kind, plan.adapter.rank, plan.settings.max_steps) == (AdapterKind.LORA, 16, 80)
    assert plan.warnings == ()
    learnt, kept, judged = (
        {json.loads(line)["thing"] for line in (tmp_path / "desk" / f"desk.{part}.jsonl").read_text().splitlines()}
        for part in ("train", "eval", "test")
    )
    assert learnt
    assert kept
    assert judged
    assert not learnt & (kept | judged)


@pytest.mark.long
def test_the_tutorial_runs_as_it_stands_on_a_tiny_kit_and_with_few_steps(tmp_path: Path) -> None:
    kit = random_kit(tmp_path / "kit")

    printed = follow(reader_of(tmp_path, kit, tiny=True))

    assert [block["kind"] for block in BLOCKS].count("run") == 11
    for expected in (
        "expert-desk 1.0.0",
        "refused: nobody here trusts acme yet",
        "acme/expert-desk@1.0.0",
        "hocket/expert-topics@1.0.0",
        "base alone",
        "07-race.txt",
    ):
        assert expected in printed, f"{expected} is missing in:\n{printed}"
    assert re.search(r"^acme/expert-desk@1\.0\.0 +48 ", printed, re.MULTILINE), printed


@pytest.mark.long
def test_the_tutorial_makes_an_expert_that_answers_on_the_kit(tmp_path: Path) -> None:
    kit = ROOT / "starter"
    try:
        Kit(kit).check()
    except HocketError as error:
        pytest.skip(error.message)
    write_base(tmp_path / "models" / "Qwen3-0.6B", dict(SIZES), ascii_only=True)  # the real one has another size

    printed = follow(reader_of(tmp_path, kit, tiny=False))

    assert printed.count("We are sorry about order 4711. A new one comes tomorrow.") >= 2, printed
    [score] = [float(share) for share in re.findall(r"^desk +(?:█\S* +)?(\d+\.\d)%", printed, re.MULTILINE)]
    assert score >= 80.0, printed
