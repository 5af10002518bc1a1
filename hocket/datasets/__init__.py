"""Datasets: JSON lines that experts are trained on and judged by. No torch, and no more memory than stated.

A tour. A row is a question with its answer, a conversation that ends with one, or plain text; `Row` has what it says:

    for row in read_rows(Path("train.jsonl")):
        row.question, row.answer

`scan_rows` goes on after a bad line and yields the refusal in its place. `judge_rows` tells which rows repeat others,
`measure` what a file is like, `assign_rows` which split each row belongs to. `hocket.datasets.writing` writes rows
byte for byte as they were.
"""

from __future__ import annotations

from hocket.datasets.duplicates import Judged, Verdict, judge_rows
from hocket.datasets.rows import LIMITS, DatasetLimits, Format, Row, read_rows, scan_rows, stratum
from hocket.datasets.splitting import SPLITS, Assignment, assign_rows
from hocket.datasets.statistics import Quantiles, Statistics, measure

__all__ = [
    "LIMITS",
    "SPLITS",
    "Assignment",
    "DatasetLimits",
    "Format",
    "Judged",
    "Quantiles",
    "Row",
    "Statistics",
    "Verdict",
    "assign_rows",
    "judge_rows",
    "measure",
    "read_rows",
    "scan_rows",
    "stratum",
]
