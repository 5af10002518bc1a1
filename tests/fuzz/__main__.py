"""Coverage-guided fuzzing: `python -m tests.fuzz HARNESS --seconds 60`, or with files to read those again.

Found is an input that raises anything but `HocketError`, or takes more time or memory than its harness allows: a
quarter of a second and 64 MiB; of `.apr` files, within bounds of a 64th, one second and `APR_BYTES_MAX`. It is kept
under `build/fuzz/HARNESS/`, as is the corpus, from which the next run goes on. The first begins with the harness's
seeds and what is kept of earlier ones in `tests/fuzz/corpus/HARNESS/`. Needs the extra `fuzz`; reading files again does
not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

_FOUND: Final = Path("build/fuzz")
_PAGE_BYTES: Final = resource.getpagesize()


def main() -> None:
    """Fuzz one harness, or read files again."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("harness")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.files:
        replay(arguments.harness, arguments.files)
    else:
        fuzz(arguments.harness, arguments.seconds)


def replay(name: str, files: list[Path]) -> None:
    """Read files without instrumentation, and fail at the first that is found to be bad."""
    from tests import archives  # noqa: PLC0415 - the fuzzer must be first to import the library
    from tests.fuzz.harnesses import HARNESSES  # noqa: PLC0415

    for file in files:
        harness = HARNESSES[name]
        cost = archives.cost(partial(harness.read, harness.prepare(file.read_bytes())))
        if cost.seconds > harness.seconds_max or cost.peak_bytes > harness.memory_bytes_max:
            sys.exit(f"{file}: {cost}")


def fuzz(name: str, seconds: int) -> None:
    """Change the seeds again and again, and keep what reaches code that nothing reached before."""
    atheris: Any = importlib.import_module("atheris")  # an extra of its own, without type information
    with atheris.instrument_imports(include=["hocket"]):
        from hocket.errors import HocketError  # noqa: PLC0415
        from tests.fuzz.harnesses import BYTES_MAX, HARNESSES, inputs  # noqa: PLC0415

    harness = HARNESSES[name]
    folder = _FOUND / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in inputs(name):
        if len(seed) <= BYTES_MAX:
            (corpus / hashlib.sha256(seed).hexdigest()).write_bytes(seed)

    def judge(data: bytes) -> None:
        prepared = harness.prepare(data)
        peak_before = _peak_bytes()
        held_bytes = _held_bytes()
        begin = time.thread_time()
        with contextlib.suppress(HocketError):
            harness.read(prepared)
        slow = time.thread_time() - begin > harness.seconds_max
        peak = _peak_bytes()
        large = peak > peak_before and peak - held_bytes > harness.memory_bytes_max
        if slow or large:  # instrumented code is slow: judged again without
            suspect = folder / "suspect"
            suspect.write_bytes(data)
            subprocess.run([sys.executable, "-m", "tests.fuzz", name, suspect], check=True)

    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={seconds}",
            f"-max_len={BYTES_MAX}",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
            "-verbosity=0",
        ],
        judge,
    )
    atheris.Fuzz()


def _peak_bytes() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _held_bytes() -> int:
    """What it holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


if __name__ == "__main__":
    main()
