"""Why these answer a text, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hocket.v1.text_pb2 import DecisionReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.v1.text_pb2 import TextPlan

_REASONS: Final[Mapping[int, str]] = {
    DecisionReason.DECISION_REASON_EXPLICIT: "the experts were named",
    DecisionReason.DECISION_REASON_BASE_GENERIC: "a general question: the base answers",
    DecisionReason.DECISION_REASON_BASE_LOW_CONFIDENCE: "no expert is clearly better placed: the base answers",
    DecisionReason.DECISION_REASON_BASE_NO_MATCH: "nothing speaks for an expert: the base answers",
    DecisionReason.DECISION_REASON_POLICY: "the base was asked for",
}


def why(plan: TextPlan) -> str:
    """Why these answer, for people."""
    if plan.reason == DecisionReason.DECISION_REASON_GATE:
        return "an expert answers" if len(plan.experts) == 1 else f"{len(plan.experts)} experts answer together"
    return _REASONS.get(plan.reason, DecisionReason.Name(plan.reason))
