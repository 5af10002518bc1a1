"""The benchmark beside transformers and PEFT runs, at the smallest sizes there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import engine
from benchmarks.rig import open_rig
from examples.text.random_base import TINY

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.long


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # what PEFT asks of transformers
async def test_the_engine_is_measured_beside_transformers_and_peft(tmp_path: Path) -> None:
    rig = open_rig("tiny", TINY, tmp_path, torch.device("cpu"), threads=torch.get_num_threads(), rounds=1)
    rows, notes = await engine.measure(rig, engine.Plan(prompt_tokens=4, new_tokens=2, long_tokens=20))
    assert [row["side"] for row in rows] == [
        *["Hocket", "transformers generate", "transformers generate_batch"] * 2,
        *["Hocket", "PEFT, one after the other", "PEFT, mixed batch"],
    ]
    assert all(row["tokens/s"] > 0 for row in rows)
    assert set(notes) == {"base alone", "adapters"}
