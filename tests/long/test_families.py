"""Many times over: neighbours and margins fall as in float32 on a grid of near ties, and layers' sums are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hocket.packages import model as m
from services.expert_worker.families import Layer
from tests.worker_numerics import assert_meets_the_oracle

pytestmark = pytest.mark.long

GRID = np.array([0, 1, 1 + 2.0**-23, 1 - 2.0**-24, 1e-3, -1, 3, 1e-30, -2.5, 2.0**-12, 1e4, 1e4 + 2.0**-10], np.float32)


@pytest.mark.parametrize("seed", range(300))
def test_near_ties_fall_as_in_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, width = int(rng.integers(1, 40)), int(rng.integers(1, 9))
    samples, rows = rng.choice(GRID, (count, width)), rng.choice(GRID, (8, width))
    classes, k = rng.integers(4, size=count).astype(np.uint64), int(rng.integers(1, count + 1))
    for metric in m.Metric:
        power, weighted = float(rng.choice([0.5, 1.0, 2.0, 3.0, 11.0])), bool(seed % 2)
        with np.errstate(over="ignore", under="ignore"):
            assert_meets_the_oracle(m.KNearestNeighbors(k, samples, classes, metric, power, weighted=weighted), rows)
    assert_meets_the_oracle(m.LinearSVM(rng.choice(GRID, width), float(rng.choice(GRID))), rows)
    assert_meets_the_oracle(m.KMeans(count, samples), rows)


@pytest.mark.parametrize("seed", range(100))
def test_sums_are_rounded_once_whatever_shares_their_pass(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, outputs, count = (int(size) for size in rng.integers(1, (900, 30, 30)))
    scales = 2.0 ** rng.integers(-20, 20, width)
    weights = (rng.normal(size=(width, outputs)) / scales[:, None]).astype(np.float32)
    rows = (rng.normal(size=(count, width)) * scales).astype(np.float32)
    biases = rng.normal(size=outputs).astype(np.float32)
    layer = Layer(torch.from_numpy(weights), torch.from_numpy(biases), m.Activation.IDENTITY)

    together = layer(torch.from_numpy(rows)).numpy()

    alone = np.concatenate([layer(torch.from_numpy(row[None])).numpy() for row in rows])
    columns = list(zip(weights.T.astype(float), biases.astype(float), strict=True))
    exact = [[math.fsum([*(row * column), bias]) for column, bias in columns] for row in rows.astype(float)]
    assert together.tobytes() == alone.tobytes() == np.array(exact, np.float32).tobytes()
