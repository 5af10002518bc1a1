"""The starter kit is what its recipe makes."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.starter import Asked, Score, judge, questions
from examples.running import suite
from examples.starter.demo import known
from examples.starter.kit import Kit
from hocket.client import connect, connect_registry
from training.starter.corpus import TASKS

ROOT = Path(__file__).parents[2]
NAME = "topics"
QUESTIONS = 400


@pytest.mark.long
async def test_an_expert_that_is_trained_again_from_its_manifest_scores_as_the_released_one(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(ROOT / "starter", kit, ignore=shutil.ignore_patterns(f"expert-{NAME}.*", "trust"))
    build = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "training.starter.build", "--only", NAME, "--kit", kit, "--work", tmp_path / "work"),
        cwd=ROOT,
    )
    assert await build.wait() == 0
    document = json.loads(max((ROOT / "benchmarks" / "results").glob("starter-*.json")).read_text())
    [released] = [row["its expert"] for row in document["rows"] if row.get("task") == NAME]
    again = Kit(kit)
    (tmp_path / "data").mkdir()
    again.prepare(tmp_path / "data")
    async with (
        suite(tmp_path / "data") as running,
        connect_registry(running.registry) as registry,
        connect(running.router) as router,
    ):
        expert = again.verified(kit / "experts" / f"expert-{NAME}.expert")
        await registry.publish(expert.data, expert.release)
        await known(router, [expert.facts.digest])
        right = await judge(router, TASKS[NAME], questions(TASKS[NAME], QUESTIONS), Asked({NAME: 1.0}))
    measured = Score.of(right).json()
    assert released["low"] <= measured["share"] <= released["high"], (measured, released)
