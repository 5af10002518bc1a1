from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from hocket.errors import HocketError
from tests import archives
from tests.fuzz.harnesses import CORPUS, HARNESSES, inputs


def outcomes(name: str) -> set[str]:
    """What becomes of a harness's first seeds."""
    harness = HARNESSES[name]
    seen = set()
    for seed in islice(harness.seeds(), 40):
        try:
            harness.read(harness.prepare(seed))
            seen.add("read")
        except HocketError:
            seen.add("refused")
    return seen


def test_fuzzing_begins_with_packages_that_are_read() -> None:
    assert [outcomes(name) for name in ("archive", "adapter")] == [{"read", "refused"}] * 2
    assert outcomes("header") == {"read", "refused"}
    readers = ("manifest", "weights", "apr", "metadata", "payload", "quantized")
    assert [outcomes(name) for name in readers] == [{"read"}] * len(readers)


@pytest.mark.parametrize("name", ["header", "metadata", "payload", "quantized"])
def test_a_seed_costs_no_more_than_its_harness_allows(name: str) -> None:
    harness = HARNESSES[name]
    for seed in inputs(name):
        cost = archives.cost(partial(harness.read, harness.prepare(seed)))
        assert cost.seconds <= harness.seconds_max
        assert cost.peak_bytes <= harness.memory_bytes_max


@pytest.mark.parametrize("name", ["header", "metadata", "payload", "quantized"])
def test_fuzzing_begins_with_small_inputs_that_earlier_runs_have_found(name: str) -> None:
    found = {path.read_bytes() for path in CORPUS.joinpath(name).iterdir()}

    assert found <= set(inputs(name))
    assert not found & set(HARNESSES[name].seeds())
    assert max(map(len, found)) <= 2**12


def test_make_fuzz_runs_every_harness() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()

    assert f"for harness in {' '.join(HARNESSES)};" in makefile
