"""`make demo` on a kit: the real one when it has been trained, and always one of random weights."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from examples.starter.checks import tried
from examples.starter.kit import Kit
from examples.starter.prompts import MIXED, MIXTURE, PROMPTS, Prompt
from hocket.errors import HocketError, Reason
from tests.starter_kits import random_kit

ROOT = Path(__file__).parents[2]
EXPERTS = 9


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_kit(tmp_path_factory.mktemp("kit"))


def demo(kit: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.starter.demo", "--kit", str(kit), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)


def of(task: str) -> Prompt:
    return next(prompt for prompt in PROMPTS if prompt.task.name == task)


@pytest.mark.parametrize("prompt", [*PROMPTS, MIXED], ids=lambda prompt: prompt.example.prompt[:30])
def test_every_prompt_has_a_right_answer_and_wrong_ones(prompt: Prompt) -> None:
    assert prompt.is_right(prompt.example.answer)
    assert not prompt.is_right("")
    assert not prompt.is_right("I do not know.")


def test_every_expert_of_the_kit_is_asked() -> None:
    asked = {prompt.expert for prompt in PROMPTS} - {""}

    assert len(asked) == EXPERTS
    assert set(MIXTURE) <= asked
    assert sum(not prompt.expert for prompt in PROMPTS) >= 2


class TestTrying:
    def test_sql_is_executed(self) -> None:
        assert tried(of("sql"), "SELECT title FROM films WHERE year < 1990") == [
            "SQLite finds 2 rows:",
            "  The Red Lamp",
            "  Two Rivers",
        ]
        assert tried(of("sql"), "SELECT a.title FROM films a, films b")[-1] == "  ... and 19 more"
        assert tried(of("sql"), "DROP TABLE films")[0].startswith("SQLite refuses it: ")

    def test_json_is_parsed(self) -> None:
        assert tried(of("json"), '{"age": 38, "name": "Clara"}') == ["parsed: age = 38 (int), name = 'Clara' (str)"]
        assert tried(of("json"), "[" * 100_000) == tried(of("json"), "{") == ["this is no JSON"]

    def test_a_pattern_is_tried_on_strings(self) -> None:
        assert tried(of("regex"), r"\d{4}$") == ["finds ab-1234; does not find ab-123, lamp-007, ab-12, 123-ab, ab123"]
        assert tried(of("regex"), "") == tried(of("regex"), "(a+)+$") == ["this is no pattern that may be tried"]

    def test_other_answers_are_only_judged(self) -> None:
        assert tried(of("measures"), "180 minutes") == []


@pytest.mark.long
def test_the_demo_publishes_all_experts_has_the_gate_choose_and_tells_wrong_answers(kit: Path) -> None:
    done = demo(kit, "--strict")

    assert (done.returncode, done.stderr) == (1, ""), "random weights are right about nothing"
    assert "\x1b" not in done.stdout
    assert done.stdout.count("hocket, ok") == EXPERTS
    assert f"\n0 of {len(PROMPTS) + 1} answers are right" in done.stdout
    _, *parts = re.split("^> ", done.stdout, flags=re.MULTILINE)
    for prompt, part in zip(PROMPTS, parts, strict=False):
        lines = part.splitlines()
        said = prompt.example.prompt.splitlines()
        who = lines[len(said)]
        assert lines[: len(said)] == [said[0], *(f"  {line}" for line in said[1:])]
        assert (prompt.expert or "hocket-starter") in who, part
        assert f"✗ expected {prompt.example.answer}; first text after " in part
    assert len(parts) == len(PROMPTS) + 1
    assert parts[-1].count("✗ expected") == len(MIXTURE) + 1
    assert all(f"{name} {weight:g} " in parts[-1] for name, weight in MIXTURE.items())


def test_a_folder_without_a_kit_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    done = demo(tmp_path)

    assert done.returncode == 1
    assert "hocket-starter/*.safetensors is missing; `make starter` makes one" in done.stderr


def test_an_expert_that_was_changed_is_refused(kit: Path, tmp_path: Path) -> None:
    genuine = Kit(kit)
    [*_, path] = genuine.experts()
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes()[:-1])
    changed.with_name(f"{path.name}.release.json").write_bytes(path.with_name(f"{path.name}.release.json").read_bytes())

    assert genuine.verified(path).proof.publisher == "hocket"
    with pytest.raises(HocketError) as refusal:
        genuine.verified(changed)
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    with pytest.raises(HocketError) as refusal:
        replace(genuine, folder=tmp_path).verified(path)
    assert refusal.value.reason is Reason.SIGNER_NOT_TRUSTED
