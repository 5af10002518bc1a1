"""Experts on a device, held against the oracle and against the reference's recorded answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Credential, Package, Policy, TrustRoots, open_package
from hocket.packages import model as m
from services.expert_worker.loader import Expert, Prepared, place, prepare
from tests import apr_oracle
from tests.builders import apr_bytes, dense, forest, grow, models
from tests.reference_files import credential_of
from tests.signing import NOW

SERVED = {*models()}
"""The layouts that serve."""

APPROXIMATE = (
    *get_args(m.LinearModel),
    m.LogisticRegression,
    m.GaussianNB,
    m.GradientBoostingClassifier,
    m.DenseNetwork,
)
"""What may differ from the reference in the last places."""

RECORDED_MIN = 80
"""Fewer recorded files than this would mean that the fixtures are not what they were."""


def random_tree(rng: np.random.Generator, width: int, depth: int, *, columns: int = 0) -> Any:
    """A tree of random shape, as `grow` takes it; leaves are columns, or values when `columns` is 0."""
    if depth == 0 or rng.random() < 0.2:
        return (int(rng.integers(columns)) if columns else float(np.float32(rng.normal())), 1)
    threshold = float(np.float32(rng.normal()))
    children = [random_tree(rng, width, depth - 1, columns=columns) for _ in range(2)]
    return (int(rng.integers(width)), threshold, *children)


def random_models(rng: np.random.Generator, width: int) -> list[Any]:
    def coefficients() -> Any:
        return rng.normal(size=width).astype(np.float32)

    members = tuple(m.Ridge(coefficients(), float(np.float32(rng.normal())), alpha=0.5) for _ in range(3))
    gate = m.SoftmaxGate(rng.normal(size=(width, 3)).astype(np.float32))
    samples = rng.normal(size=(23, width)).astype(np.float32)
    classes = rng.integers(4, size=23).astype(np.uint64)
    return [
        m.LinearRegression(coefficients(), float(np.float32(rng.normal()))),
        m.LogisticRegression(coefficients(), float(np.float32(rng.normal()))),
        m.MixtureOfExperts(members, gate, m.MoeConfig(2)),
        m.KMeans(7, rng.normal(size=(7, width)).astype(np.float32)),
        forest(*(grow(random_tree(rng, width, 6, columns=4)) for _ in range(9))),
        m.RandomForestRegressor(
            tuple(m.DecisionTreeRegressor(grow(random_tree(rng, width, 6))) for _ in range(40)), n_estimators=40
        ),
        m.LinearSVM(coefficients(), float(np.float32(rng.normal()))),
        m.GradientBoostingClassifier(
            tuple(m.DecisionTreeClassifier(grow(random_tree(rng, width, 3, columns=2))) for _ in range(20)), 0.25
        ),
        m.GaussianNB(
            np.array([0.2, 0.3, 0.5], np.float32),
            rng.normal(size=(3, width)).astype(np.float32),
            rng.uniform(0.5, 2, size=(3, width)).astype(np.float32),
            np.arange(3, dtype=np.uint64),
        ),
        m.KNearestNeighbors(5, samples, classes),
        m.KNearestNeighbors(4, samples, classes, m.Metric.MANHATTAN, weighted=True),
        m.KNearestNeighbors(3, samples, classes, m.Metric.MINKOWSKI, 3.0, weighted=True),
        random_network(rng, [width, 9, 5, 3], "relu", "softmax"),
        random_network(rng, [width, 6, 1], "tanh", "logistic"),
        random_network(rng, [width, 6, 2], "logistic", "identity"),
    ]


def random_network(rng: np.random.Generator, sizes: list[int], hidden: str, last: str) -> m.DenseNetwork:
    names = [hidden] * (len(sizes) - 2) + [last]
    layers = zip(sizes[:-1], sizes[1:], names, strict=True)
    return dense(
        *(
            (rng.normal(size=size).astype(np.float32), rng.normal(size=size[1]).astype(np.float32), name)
            for *size, name in layers
        )
    )


def opened(data: bytes, credential: Credential | None = None) -> Package:
    credentials = {} if credential is None else {digest_of(data): credential}
    policy = Policy(allow_unsigned=True)
    return open_package(data, trust=TrustRoots(), policy=policy, now=NOW, credentials=credentials)


def tensor_experts(prepared: Prepared, device: str = "cpu") -> tuple[Expert, ...]:
    """The experts of an `.apr` package."""
    experts = place(prepared, torch.device(device))
    return tuple(expert for expert in experts if isinstance(expert, Expert))


def on_device(model: Any, device: str = "cpu", **options: Any) -> tuple[Expert, ...]:
    """The experts of a model, by way of a file."""
    return tensor_experts(prepare(opened(apr_bytes(model, **options))), device)


def lone(model: Any, device: str = "cpu", **options: Any) -> Expert:
    """The one expert of a model."""
    (expert,) = on_device(model, device, **options)
    return expert


def answer(expert: Expert, rows: Any, device: str = "cpu") -> Any:
    with torch.inference_mode():
        return expert.kernel(torch.from_numpy(np.array(rows, np.float32)).to(device)).cpu().numpy()


def assert_meets_the_oracle(model: Any, rows: Any, device: str = "cpu") -> None:
    """What is a sum of products, or made of exponentials, within D6's tolerance, everything else exactly."""
    experts = on_device(model, device)
    members = model.experts if isinstance(model, m.MixtureOfExperts) else (model,)
    assert len(experts) == len(members)
    for expert, member in zip(experts, members, strict=True):
        given = answer(expert, rows, device)
        expected = apr_oracle.predict(member, rows, expert.columns)
        assert given.dtype == np.float32
        assert given.shape == (len(rows), expert.columns)
        if isinstance(member, APPROXIMATE) or getattr(member, "weighted", False):
            assert (np.abs(given - expected) <= apr_oracle.tolerance(member, rows)[:, None]).all()
        else:
            assert np.array_equal(given, expected)


def recorded() -> list[dict[str, Any]]:
    """What the reference recorded about files of the layouts that serve; skips without the fixtures."""
    folder = os.environ.get("HOCKET_FIXTURES")
    if not folder:
        pytest.skip("HOCKET_FIXTURES is not set: the genuine files are not here")
    path = Path(folder) / "apr" / "reference-0.11.0"
    manifest = json.loads((path / "manifest.json").read_text())
    return [
        {**entry, "data": (path / entry["file"]).read_bytes()}
        for entry in manifest["files"]
        if entry.get("layout") in SERVED and entry.get("inputs")
    ]


def assert_meets_the_record(entry: dict[str, Any], device: str = "cpu") -> bool:
    """Whether the file serves, and if so, that it answers as recorded."""
    try:
        package = opened(entry["data"], credential_of(entry))
        experts = tensor_experts(prepare(package), device)
    except HocketError as error:
        if error.reason is not Reason.NOT_SERVABLE:  # that chooses no expert
            raise
        return False
    rows = np.array(entry["inputs"], np.float32)
    given = [answer(expert, rows, device) for expert in experts]
    model = package.model
    if isinstance(model, m.MixtureOfExperts):
        for place_of, expected in enumerate(np.array(entry["expert_outputs"], np.float32).T):
            tolerance = apr_oracle.tolerance(model.experts[place_of], rows)
            assert (np.abs(given[place_of][:, 0] - expected) <= tolerance).all()
    elif isinstance(model, m.LogisticRegression):
        assert (np.abs(given[0][:, 1] - entry["probabilities"]) <= apr_oracle.tolerance(model, rows)).all()
        assert ((given[0][:, 1] >= 0.5) == entry["classes"]).all()
    elif "predictions" in entry:
        expected = np.array(entry["predictions"], np.float32)
        exact = not isinstance(model, m.LinearModel)
        tolerance = 0 if exact else apr_oracle.tolerance(model, rows)
        assert (np.abs(given[0][:, 0] - expected) <= tolerance).all()
    else:
        assert (given[0].argmax(axis=1) == entry.get("clusters", entry.get("classes"))).all()
        if "probabilities" in entry:
            assert np.array_equal(given[0].reshape(-1), np.array(entry["probabilities"], np.float32))
        if "class_probabilities" in entry:
            assert np.abs(given[0] - np.array(entry["class_probabilities"], np.float32)).max() <= 1e-6
    return True
