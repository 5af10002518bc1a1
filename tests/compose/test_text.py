"""Texts out of containers: a base in the host's folder, two signed adapters, and a worker that is killed."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.clusters import ROOT

if TYPE_CHECKING:
    from tests.compose.stack import Stack

pytestmark = pytest.mark.compose

WORKERS = ("worker-1", "worker-2")
BASE = "tiny-qwen3"
MIXTURE = {"acme/expert-tiny@1.0.0": 0.7, "acme/expert-loud@1.0.0": 0.3}
TOKENS_MAX = 24


@pytest.fixture(scope="module")
def speaking(trusted: Stack) -> Stack:
    """The same, where both workers have a base, and two adapters for it are published."""
    from examples.text.random_base import TINY, write_base  # noqa: PLC0415 - transformers takes seconds to import
    from examples.text.random_expert import write_expert  # noqa: PLC0415 - as above

    base = write_base(trusted.folder / "models" / BASE, TINY)
    for file in base.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read, and a container's user is another
    trusted.hocket("base", "add", base, "--data", trusted.folder, "--at", f"/models/{BASE}")
    trusted.compose("restart", *WORKERS)
    asyncio.run(trusted.healthy(*WORKERS))
    adapters = {
        "expert-tiny": ROOT / "tests" / "vectors" / "peft-lora",
        "expert-loud": write_expert(trusted.folder / "ia3"),
    }
    for name, adapter in adapters.items():
        file = trusted.folder / f"{name}.expert"
        trusted.hocket(
            *("expert", "pack", adapter, "--name", name, "--version", "1.0.0", "--base", base, "--out", file)
        )
        trusted.hocket("sign", file, "--publisher", "acme")
        trusted.hocket("publish", file, "--token-file", trusted.admin_token_file)
    return trusted


def _generate(stack: Stack, *options: str) -> list[dict[str, Any]]:
    """The events of one answer, from outside, always with the likeliest token."""
    common = ("--max-tokens", str(TOKENS_MAX), "--temperature", "0", "--json")
    return [json.loads(line) for line in stack.hocket("generate", "who is there?", *common, *options).splitlines()]


def _mixture(stack: Stack) -> list[dict[str, Any]]:
    return _generate(stack, "--experts", ",".join(f"{name}:{weight}" for name, weight in MIXTURE.items()))


def _text(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"].get("text", "") for event in events if event["event"] == "delta")


def _worker(events: list[dict[str, Any]]) -> str:
    (worker,) = [event["start"]["worker"] for event in events if event["event"] == "start"]
    return str(worker)


def test_a_mixture_of_adapters_streams_through_the_router(speaking: Stack) -> None:
    events = _mixture(speaking)
    plan = events[0]["plan"]
    assert (plan["mode"], plan["base_name"]) == ("MODE_ADAPTER_MIX", BASE)
    assert {expert["name"]: expert["weight"] for expert in plan["experts"]} == MIXTURE
    assert [event["event"] for event in events[:2]] == ["plan", "start"]
    deltas = [event["delta"] for event in events[2:-1]]
    assert len(deltas) > 1
    assert all(delta["contributions"] == [*MIXTURE.values()] for delta in deltas)
    assert events[-1]["finish"]["usage"]["completion_token_count"] == sum(len(delta["tokens"]) for delta in deltas)
    assert _text(events)
    assert _text(events) != _text(_generate(speaking))  # the base alone


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_changes_no_base_and_keeps_no_model_of_its_own(speaking: Stack, worker: str) -> None:
    writable = {mount["Destination"]: mount["RW"] for mount in speaking.inspect(worker)["Mounts"]}
    assert {path for path, may_be_written in writable.items() if may_be_written} == {"/var/lib/hocket"}
    for path in (f"/models/{BASE}/config.json", f"/var/lib/hocket/bases/{BASE}.toml"):
        with pytest.raises(AssertionError, match=r"Read-only|Permission denied"):
            speaking.inside(worker, "touch", path)
    kept = speaking.inside(worker, "ls", "-A", "/var/lib/hocket").split()
    assert {*kept} <= {"bases", "cache", "journal", "revocations.json", "trust"}


async def test_when_a_worker_is_killed_the_other_one_says_the_same_at_once(speaking: Stack) -> None:
    before = await asyncio.to_thread(_mixture, speaking)
    victim = _worker(before)
    await asyncio.to_thread(speaking.docker, "kill", speaking.container(victim))
    after = await asyncio.to_thread(_mixture, speaking)
    assert (victim, _worker(after)) in {WORKERS, WORKERS[::-1]}
    assert _text(after) == _text(before)
    await asyncio.to_thread(speaking.compose, "up", "--detach", "--no-build")
    await speaking.healthy(*WORKERS)
