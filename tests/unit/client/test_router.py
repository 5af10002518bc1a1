"""What the router's client refuses before anything is sent, and what an answer says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hocket.client.router import Answer, RouterClient
from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.v1 import plan_pb2
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import ScriptedRouter

ROW = [0.5, 1.5]


@pytest.fixture
def scripted() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def router(scripted: ScriptedRouter) -> RouterClient:
    handlers = Handlers()
    handlers.add(add_RouterServiceServicer_to_server, scripted)
    return RouterClient(LocalChannel(handlers))


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"rows": [[1, 2], [3]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": [["a", "b"]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": [[{}, None]]}, Reason.BAD_TENSOR, "input"),
        ({"rows": np.zeros((2, 2, 2))}, Reason.BAD_TENSOR, "input.shape"),
        ({"top_k": -1}, Reason.TOP_K_OUT_OF_RANGE, "top_k"),
        ({"top_k": 2**32}, Reason.TOP_K_OUT_OF_RANGE, "top_k"),
        ({"on_missing": "ignore"}, Reason.BAD_REQUEST, "on_missing"),
        ({"straggler_timeout_seconds": 0}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": -1.0}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": float("nan")}, Reason.BAD_REQUEST, "straggler_timeout"),
        ({"straggler_timeout_seconds": float("inf")}, Reason.BAD_REQUEST, "straggler_timeout"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_it_is(
    router: RouterClient, scripted: ScriptedRouter, change: dict[str, Any], reason: Reason, field: str
) -> None:
    options = {"rows": [ROW], "top_k": 1, "on_missing": "fail", "straggler_timeout_seconds": 1.0, **change}
    with pytest.raises(HocketError) as caught:
        await router.answer("digits", **options)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert scripted.requests == []


async def test_what_can_be_sent_is(router: RouterClient, scripted: ScriptedRouter) -> None:
    await router.answer(
        "digits", ROW, top_k=1, min_coverage=0.25, straggler_timeout_seconds=1e-9, on_missing="renormalise"
    )
    [request] = scripted.requests
    assert (list(request.input.shape), request.top_k, request.min_coverage) == ([1, 2], 1, 0.25)
    assert request.on_missing == plan_pb2.ON_MISSING_RENORMALISE
    assert request.straggler_timeout.nanos == 1


@pytest.mark.parametrize("rows", [ROW, [ROW], (tuple(ROW),), np.array([ROW], np.float64), np.array([ROW], order="F")])
async def test_a_row_or_a_table_of_any_numbers_is_sent_as_fp32(
    router: RouterClient, scripted: ScriptedRouter, rows: Any
) -> None:
    await router.route("digits", rows)
    [request] = scripted.requests
    assert request.input.contents == np.array(ROW, "<f4").tobytes()
    assert not request.HasField("top_k")


async def test_a_decision_takes_the_same_rows_and_top_k(router: RouterClient, scripted: ScriptedRouter) -> None:
    for rows, top_k in (([[1, 2], [3]], None), ([ROW], -1)):
        with pytest.raises(HocketError):
            await router.route("digits", rows, top_k=top_k)
    assert scripted.requests == []


def answer(value: Any, *labels: str) -> Answer:
    array = np.array(value, np.float32)
    return Answer(array, labels, np.ones(len(array)), (), plan_pb2.Plan(), plan_pb2.Finish(), "")


def test_the_best_label_is_the_highest_score_and_the_earlier_at_ties() -> None:
    assert answer([[0.1, 0.9], [0.5, 0.5]], "no", "yes").best_labels() == ["yes", "no"]


def test_a_regression_has_no_labels() -> None:
    assert answer([[3.5], [1.0]]).best_labels() == []
