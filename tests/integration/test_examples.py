"""The examples run, and show what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", module, "--json"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    scores: dict[str, float] = json.loads(done.stdout)
    return scores


def test_the_gated_mixture_of_digits_beats_every_member_and_the_uniform_average() -> None:
    scores = run("examples.digits.demo")
    gated = scores.pop("digits")
    assert len(scores) == 8
    assert gated > max(scores.values())
    assert gated > 0.9


def test_the_gated_mixture_of_efforts_beats_every_expert_and_one_for_all() -> None:
    errors = run("examples.complexity.demo")
    mixture = errors.pop("mixture")
    assert set(errors) == {"small", "medium", "large", "domain", "one-for-all"}
    assert mixture < min(errors.values()) / 2
