from __future__ import annotations

from itertools import islice

from hocket.errors import HocketError
from tests.fuzz.harnesses import HARNESSES


def outcomes(name: str) -> set[str]:
    """What becomes of a harness's first seeds."""
    seen = set()
    for seed in islice(HARNESSES[name].seeds(), 40):
        try:
            HARNESSES[name].read(seed)
            seen.add("read")
        except HocketError:
            seen.add("refused")
    return seen


def test_fuzzing_begins_with_packages_that_are_read() -> None:
    assert outcomes("archive") == {"read", "refused"}
    assert [outcomes(name) for name in ("manifest", "weights", "adapter", "apr")] == [{"read"}] * 4
