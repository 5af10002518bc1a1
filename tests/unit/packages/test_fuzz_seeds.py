from __future__ import annotations

from itertools import islice

from hocket.errors import HocketError
from tests.fuzz.harnesses import HARNESSES


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
    assert [outcomes(name) for name in ("manifest", "weights", "apr")] == [{"read"}] * 3
