"""Results as a table for people and a dated JSON file for the record."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).parent / "results"


def command_line(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """The arguments of a benchmark; it and the servers it starts compute on one thread each.

    Args:
        description: What is measured.
        rounds: How many rounds it takes, if it takes rounds.
    """
    # A row of four dot products is no work for two threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=description)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="rounds per side; the median counts")
    parser.add_argument("--no-save", action="store_true", help="do not keep the result")
    return parser


def hardware() -> dict[str, str]:
    """What the numbers were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def record(name: str, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any], *, save: bool = True) -> None:
    """Print rows as a table, with `notes` below it, and keep both with date, revision and hardware.

    Args:
        name: Of the benchmark, and of its file.
        rows: One measurement each; the same keys in all.
        notes: Ratios against the budgets, and what else a reader must know.
        save: Whether to keep them.
    """
    console = Console(width=130)
    table = Table(title=name, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    console.print(table)
    for key, value in notes.items():
        console.print(f"{key}: {value}", highlight=False)
    if save:
        keep(name, rows, notes)


def keep(name: str, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """Keep rows and notes in a file, with date, revision and hardware. Arguments as of `record`."""
    now = datetime.now(UTC)
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - git is where git is
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    ).stdout.strip()
    document = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "revision": revision,
        "hardware": hardware(),
        "rows": rows,
        "notes": notes,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{now:%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    Console().print(f"kept in {path.relative_to(RESULTS.parent.parent)}", highlight=False)
