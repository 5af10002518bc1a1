from __future__ import annotations

import pytest

from hocket.bases import BaseModel, Match, compatibility, normalised_name

ONE, OTHER = f"sha256:{'11' * 32}", f"sha256:{'22' * 32}"


def test_the_same_model_under_other_paths_has_the_same_name() -> None:
    for name in ("F:/models/Qwen3-0.6B", r"F:\models\Qwen3-0.6B", "Qwen/Qwen3-0.6B", " qwen3-0.6b/", "QWEN3-0.6B"):
        assert normalised_name(name) == "qwen3-0.6b"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (BaseModel("A", digest=ONE), BaseModel("B", digest=ONE), Match.SAME),
        (BaseModel("A", digest=ONE), BaseModel("A", digest=OTHER), Match.DIFFERENT),
        (BaseModel("A", digest=ONE, weights_sha256="1"), BaseModel("A", digest=ONE, weights_sha256="2"), Match.SAME),
        (BaseModel("A", weights_sha256="1"), BaseModel("B", weights_sha256="1"), Match.SAME),
        (BaseModel("A", weights_sha256="1"), BaseModel("A", weights_sha256="2"), Match.DIFFERENT),
        (BaseModel("A", digest=ONE), BaseModel("x/a"), Match.BY_NAME),
        (BaseModel("A", digest=ONE), BaseModel("a", weights_sha256="1"), Match.BY_NAME),
        (BaseModel("A"), BaseModel("B"), Match.DIFFERENT),
        (BaseModel(""), BaseModel("/"), Match.DIFFERENT),
    ],
)
def test_a_digest_decides_where_both_state_one_and_the_name_otherwise(
    one: BaseModel, other: BaseModel, expected: Match
) -> None:
    assert compatibility(one, other).match is compatibility(other, one).match is expected


def test_quantisation_and_template_do_not_matter() -> None:
    one = BaseModel("A", quantization="int4", prompt_template="qwen3")

    assert compatibility(one, BaseModel("A", quantization="bf16")).match is Match.BY_NAME


def test_the_explanation_says_what_was_compared() -> None:
    assert "'qwen3'" in compatibility(BaseModel("x/Qwen3"), BaseModel("qwen3")).explanation
    assert ONE in compatibility(BaseModel("A", digest=ONE), BaseModel("A", digest=OTHER)).explanation
