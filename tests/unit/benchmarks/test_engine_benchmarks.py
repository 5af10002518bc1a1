"""The benchmarks of the engine run, at the smallest sizes there are, and say what they measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import decoding, expert_memory, prefixes
from benchmarks.rig import COMPOSED, DISTINCT, another, experts_of, open_rig
from examples.text.random_base import TINY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.rig import Rig, Row
    from services.expert_worker.engine.expert import AdapterExpert


@pytest.fixture
def rig(tmp_path: Any) -> Iterator[Rig]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_rig("tiny", TINY, tmp_path, torch.device("cpu"), threads=1, rounds=1)
    torch.set_num_threads(before)


def works(rows: list[Row], name: str = "work") -> list[str]:
    assert len({tuple(row) for row in rows}) == 1, "a table has the same columns in every row"
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    return [row[name] for row in rows]


def test_a_step_must_read_the_base_each_expert_once_and_everybodys_positions(rig: Rig) -> None:
    first, second = experts_of(rig, 2)
    position_bytes = rig.base.kv_shape.position_bytes(torch.float32)
    for mixtures, experts, positions in (
        ([()], [], 3),
        ([((first, 1.0),), ((first, 0.5),)], [first], 2 * 3),
        ([((first, 1.0), (second, 0.5)), ((second, 1.0),), ()], [first, second], 3 * 3),
    ):
        expected = rig.base.size_bytes + sum(each.size_bytes for each in experts) + positions * position_bytes
        assert decoding.read_bytes(rig, mixtures, 3) == expected


def test_a_batch_of_one_has_no_distinct_experts_and_a_batch_has_an_expert_each(rig: Rig) -> None:
    (expert,) = experts_of(rig, 1)
    experts: list[AdapterExpert] = [another(expert) for _ in range(DISTINCT)]
    alone, batch = decoding.mixtures_of(experts, 1), decoding.mixtures_of(experts, DISTINCT)
    assert set(alone) < set(batch)
    digests = {len({one.digest for mixture in each for one, _ in mixture}) for each in batch.values()}
    assert digests == {0, 1, COMPOSED, DISTINCT}


async def test_decoding_is_measured_beside_its_floor(rig: Rig) -> None:
    plan = decoding.Plan(prompt_tokens=4, new_tokens=4, rounds=1, matrix_bytes=2**20, scattered=(2, 40))
    rows, notes = await decoding.measure(rig, plan)
    names = works(rows)
    assert len(names) == 4 + 6 + 2
    assert names[-2:] == ["40 positions, in a row", "40 positions, scattered"]
    assert "GB/s" in notes["bandwidth"]


async def test_loads_and_swaps_are_measured_beside_their_floors(rig: Rig) -> None:
    rows, notes = await expert_memory.measure(rig, expert_memory.Plan(residents=(1, 3), loads=1, steps=8))
    names = works(rows, "step")
    assert [name for name in names if "cold" in name] == [
        f"{archive}: cold, beside {count} resident" for archive in ("gzip", "zstd", "gzip, stored") for count in (1, 3)
    ]
    assert len([name for name in names if "token to token" in name]) == 3
    assert set(notes) >= {"cold loads are flat", "no stall"}


async def test_what_is_found_and_who_made_way_is_told(rig: Rig) -> None:
    rows, notes = await prefixes.measure(rig, prefixes.Plan(prompt_tokens=(40,), texts=4, pages=3))
    works(rows)
    assert [row["found"] for row in rows[:3]] == ["0", "32", "48"]
    assert [row["made way"] != "0" for row in rows[3:]] == [False, True, False]
    assert set(notes) >= {"first token sooner", "making way"}
