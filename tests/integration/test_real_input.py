"""Files of the reference implementation, released by a test key, published and asked over the wire.

Every file that can be served gives its recorded predictions within the stated tolerance; every other one is refused at
the door for its own reason, and the suite goes on answering.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr
from tests import apr_oracle
from tests.deployments import Deployment, deployed
from tests.reference_files import ENTRIES, FIXTURES, assert_as_recorded, outcome, read
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEEDS_FIXTURES = pytest.mark.skipif(
    "HOCKET_FIXTURES" not in os.environ, reason="HOCKET_FIXTURES is not set: genuine files are not in this checkout"
)
FORGED = {"edge_signed_sig_edit.apr"}
"""Decodes, but its embedded signature does not verify: refused also under a release."""
CANNOT_ANSWER = ("moe_top0", "quant_")
"""Mixtures that choose nobody, and tensors that are no model."""
BEHIND_THE_DOOR = {None, Reason.NOT_SERVABLE, Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT}
"""What is found in an encrypted payload, which a registry cannot look into."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed("one process", tmp_path_factory.mktemp("real")) as deployment:
        yield deployment


def refused_as(name: str) -> Reason | None:
    if name in FORGED:
        return Reason.SIGNATURE_INVALID
    expected = outcome(ENTRIES[name])
    if is_encrypted(read(name)) and expected in BEHIND_THE_DOOR:
        return Reason.ENCRYPTED  # the reference's files do not declare what is in them
    return Reason.NOT_SERVABLE if expected is None and name.startswith(CANNOT_ANSWER) else expected


def is_encrypted(data: bytes) -> bool:
    return bool(data[21] & 1)


SERVED = [name for name in ENTRIES if refused_as(name) is None]


@pytest.mark.parametrize("name", [name for name in ENTRIES if refused_as(name) is not None])
async def test_what_cannot_be_served_is_refused_at_the_door_with_its_own_reason(suite: Deployment, name: str) -> None:
    data = read(name)
    with pytest.raises(HocketError) as caught:
        await suite.registry.publish(data, envelope_of(data, name=f"acme/{Path(name).stem.replace('_', '-')}@1"))
    assert caught.value.reason is refused_as(name)
    with pytest.raises(HocketError, match="UNKNOWN_PACKAGE"):
        await suite.registry.get_package(digest_of(data))


@pytest.mark.parametrize("name", SERVED)
async def test_a_released_file_gives_its_recorded_predictions(suite: Deployment, name: str) -> None:
    data, entry = read(name), ENTRIES[name]
    digest = await suite.publish(data)
    facts, model = apr.decode(apr.split(data), digest)
    rows = np.array(entry.get("inputs", [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]), np.float32)
    answer = await suite.router.answer(digest, rows)
    if "inputs" in entry:
        assert_as_recorded(entry, model, answer.value)
    else:
        expected = apr_oracle.predict(model, rows, facts.output_columns)
        assert (np.abs(answer.value - expected) <= apr_oracle.tolerance(model, rows)[:, None]).all()
    if facts.expert_count > 1:
        _check_mixture(answer.plan, entry, model, rows)


def _check_mixture(plan: Any, entry: dict[str, Any], model: Any, rows: Any) -> None:
    """Only the chosen experts run, and their weights are the gate's, renormalised."""
    weights = np.zeros((len(rows), len(model.experts)))
    for planned in plan.experts:
        ordinal = int(planned.expert.partition("#")[2] or 0)
        weights[planned.rows, ordinal] = planned.weights
    assert (np.count_nonzero(weights, axis=1) <= model.top_k).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    if "gate_weights" in entry:
        gate = np.array(entry["gate_weights"])
        last = np.sort(gate, axis=1)[:, -model.top_k]
        expected = np.where(gate >= last[:, None], gate, 0.0)
        np.testing.assert_allclose(weights, expected / expected.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-9)


@NEEDS_FIXTURES
async def test_the_genuine_mnist_model_serves(suite: Deployment) -> None:
    data = (Path(str(FIXTURES)) / "apr" / "genuine" / "realizar-mnist_784x2-logreg-v0.11.0.apr").read_bytes()
    digest = await suite.publish(data)
    _, model = apr.decode(apr.split(data), digest)
    rows = np.random.default_rng(0).random((16, 784)).astype(np.float32)
    answer = await suite.router.answer(digest, rows)
    np.testing.assert_allclose(answer.value, apr_oracle.predict(model, rows), atol=1e-6)
    assert answer.labels == ("0", "1")


@NEEDS_FIXTURES
@pytest.mark.parametrize("city", ["att48", "berlin52", "eil51"])
async def test_files_of_the_older_format_are_recognised_and_refused(suite: Deployment, city: str) -> None:
    data = (Path(str(FIXTURES)) / "apr" / "genuine" / f"tsp-{city}-aco.apr0").read_bytes()
    with pytest.raises(HocketError) as caught:
        await suite.registry.publish(data, envelope_of(data, name=f"acme/{city}@1"))
    assert caught.value.reason is Reason.BAD_MAGIC
    assert "route" in caught.value.message


async def test_a_member_of_a_file_is_addressed_by_its_ordinal(suite: Deployment) -> None:
    name = next(name for name in SERVED if name.startswith("moe_") and "expert_outputs" in ENTRIES[name])
    entry = ENTRIES[name]
    digest = await suite.publish(read(name))
    rows = np.array(entry["inputs"], np.float32)
    outputs = np.array(entry["expert_outputs"], np.float32)
    for ordinal in range(outputs.shape[1]):
        answer = await suite.router.answer(f"{digest}#{ordinal}", rows)
        np.testing.assert_allclose(answer.value[:, 0], outputs[:, ordinal], rtol=1e-5, atol=1e-6)


async def test_the_suite_is_still_well(suite: Deployment) -> None:
    digest = await suite.publish(read("linear.plain.apr"))
    assert (await suite.router.answer(digest, [0.0, 0.0, 0.0])).value.shape == (1, 1)
