"""How good answers are: scores, their intervals, and runs over a dataset.

A tour. Scores compare one answer with a reference; whatever the answer is, they return, and in bounded time:

    exact_match(answer, reference)
    f1(answer, reference)
    json_match(answer, reference, schema).right
    execution_match(answer, reference, script)     # SQL, run on SQLite in memory

`wilson_interval` says how far a share of right answers can be trusted, `drop_interval` the same for how much worse one
of two is on the same questions. `answer_all` asks every question of a dataset, several at a time, and scores what
comes back; who answers is a function that it is given. `compare` says what a partner does to an expert's scores.
"""

from __future__ import annotations

from hocket.evaluation.compatibility import Change, Compatibility, compare
from hocket.evaluation.intervals import Interval, drop_interval, wilson_interval
from hocket.evaluation.metrics import METRICS, Metric, Question, questions
from hocket.evaluation.running import Answered, Reply, answer_all
from hocket.evaluation.scores import JsonMatch, exact_match, f1, json_match
from hocket.evaluation.sql import SQL_LIMITS, SqlLimits, SqlRows, execution_match, run_query

__all__ = [
    "METRICS",
    "SQL_LIMITS",
    "Answered",
    "Change",
    "Compatibility",
    "Interval",
    "JsonMatch",
    "Metric",
    "Question",
    "Reply",
    "SqlLimits",
    "SqlRows",
    "answer_all",
    "compare",
    "drop_interval",
    "exact_match",
    "execution_match",
    "f1",
    "json_match",
    "questions",
    "run_query",
    "wilson_interval",
]
