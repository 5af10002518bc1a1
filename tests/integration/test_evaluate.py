"""`hocket evaluate` against a suite in one process, with a tiny base of random weights."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.bases import tiny_base
from tests.deployments import Deployment, deployed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]
PROMPTS = ["list all names", "how many are there?", "what is 2 + 2?", "tell a story"]
TOKENS = 12


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed("one process", tmp_path / "suite", base=tiny_base(tmp_path / "tiny-qwen3")) as deployment:
        yield deployment


async def hocket(*arguments: object) -> list[Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hocket.cli.main",
        *map(str, arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (out, err)
    return [json.loads(line) for line in out.splitlines()]


async def test_a_base_is_right_about_its_own_greedy_answers_and_wrong_about_others(
    suite: Deployment, tmp_path: Path
) -> None:
    answers = [
        (await suite.router.answer_text(prompt, temperature=0.0, max_tokens=TOKENS, timeout_seconds=30.0)).text
        for prompt in PROMPTS
    ]
    own, changed = tmp_path / "own.jsonl", tmp_path / "changed.jsonl"
    for path, addition in ((own, ""), (changed, " changed")):
        rows = [
            {"prompt": prompt, "completion": answer + addition} for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--router", suite.address, "--max-tokens", TOKENS, "--metric", "exact", "--base-only", "--json")

    [document] = await hocket("evaluate", own, *asked, "--out", tmp_path / "answers.jsonl")
    assert (document["rows"], document["score"], document["high"]) == (4, 1.0, 1.0)
    assert document["answered_by"] == {"base alone": 4}
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in written] == answers

    [document] = await hocket("evaluate", changed, *asked)
    assert (document["score"], document["low"]) == (0.0, 0.0)
