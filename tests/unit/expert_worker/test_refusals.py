"""How they are repeated to who asks again is told in `test_residency.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hocket.errors import HocketError, Reason
from hocket.packages import Policy
from hocket.trust_folder import TrustFolder
from services.expert_worker.authority import Authority
from services.expert_worker.refusals import Refusals
from tests.shelves import A, B, C

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(TrustFolder(tmp_path), Policy())


@pytest.fixture
def refusals(authority: Authority) -> Refusals:
    return Refusals(authority)


@pytest.mark.parametrize("reason", [Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT])
def test_a_wrong_credential_is_tried_once_until_something_is_new(
    refusals: Refusals, authority: Authority, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    monkeypatch.setattr("services.expert_worker.refusals._REFUSAL_SECONDS", -1.0)
    refusals.remember(A, HocketError(reason, "no"), authority.standing)
    refusals.remember(B, HocketError(Reason.NOT_SERVABLE, "no"), authority.standing)
    for _ in range(3):
        with pytest.raises(HocketError) as refusal:
            refusals.repeat(A)
        assert refusal.value.reason is reason
    refusals.repeat(B)
    assert refusals.reasons == {A: reason}

    refusals.forget(A)
    refusals.repeat(A)
    assert refusals.reasons == {}


def test_a_remembered_refusal_keeps_nothing_of_the_package_in_memory(refusals: Refusals, authority: Authority) -> None:
    with pytest.raises(HocketError) as refusal:
        raise HocketError(Reason.BAD_PAYLOAD, "no", field="x", digest=A) from ValueError()
    refusals.remember(A, refusal.value, authority.standing)
    ((remembered, _, _),) = refusals._refusals.values()
    assert (remembered.field, remembered.metadata) == ("x", {"digest": A})
    assert (remembered.__traceback__, remembered.__context__, remembered.__cause__) == (None, None, None)


def test_remembered_refusals_do_not_pile_up(
    refusals: Refusals, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.expert_worker.refusals._REFUSALS_MAX", 2)
    for digest in (A, B, C):
        refusals.remember(digest, HocketError(Reason.UNSIGNED, "no"), authority.standing)
    assert [*refusals.reasons] == [C]
