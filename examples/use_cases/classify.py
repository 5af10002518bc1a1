"""Sort a folder of short texts by topic, and say how sure the expert is.

    python -m examples.use_cases.classify examples/use_cases/letters

Each text is put to `expert-topics`, which answers with one of six topics. How probable the topic was, and which one
came second, is in the answer: every token brings its own probability and those of the likeliest others.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from examples.use_cases.asking import answers, arguments, plain, run, who

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.client import RouterClient, TextAnswer

_QUESTION: Final = "Which topic is this text about? {text}"
_CHARACTERS_MAX: Final = 500
_TOKENS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a text belongs.

    Args:
        label: Its topic.
        probability: Of the whole answer: that of all its tokens.
        labels: Probability of each topic that was given to any of the texts, the likeliest first.
        experts: Who said so, with weights.
    """

    label: str
    probability: float
    labels: dict[str, float]
    experts: dict[str, float]


def sorted_by(given: Sequence[TextAnswer]) -> list[Verdict]:
    """Read labels and their probabilities off answers.

    A token is told by its id. Which topic it begins, the answers themselves say: so topics that no text was given are
    not told apart from the rest.
    """
    begins = {answer.tokens[0].id: plain(answer.text) for answer in given if answer.tokens}
    found = []
    for answer in given:
        first = answer.tokens[0].top if answer.tokens else ()
        labels = {begins[token.id]: math.exp(token.logprob) for token in first if token.id in begins}
        probability = math.exp(sum(token.logprob for token in answer.tokens))
        found.append(Verdict(plain(answer.text), probability, labels, who(answer)))
    return found


async def classify(router: RouterClient, files: Sequence[Path], *, expert: str, as_json: bool) -> None:
    """Sort files, and print a line for each."""
    texts = [plain(file.read_text("utf-8", "replace"))[:_CHARACTERS_MAX] for file in files]
    questions = [_QUESTION.format(text=text) for text in texts]
    results = sorted_by(await answers(router, questions, {expert: 1.0}, max_tokens=_TOKENS_MAX))
    width = max(len(file.name) for file in files)
    for file, result in zip(files, results, strict=True):
        if as_json:
            fields = {"label": result.label, "probability": result.probability, "labels": result.labels}
            print(json.dumps({"file": str(file), **fields, "experts": result.experts}))
            continue
        others = [f"{label} {share:.1%}" for label, share in result.labels.items() if label != result.label]
        second = f"   then {others[0]}" if others else ""
        print(f"{plain(file.name):<{width}}  {result.label:<8}  {result.probability:6.1%}{second}")


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path, help="*.txt in it are sorted; of each the first 500 characters count")
    parser.add_argument("--expert", default="topics", metavar="NAME", help="who sorts (default: %(default)s)")
    chosen = parser.parse_args()
    files = sorted(chosen.folder.glob("*.txt"))
    if not files:
        parser.error(f"there is no *.txt in {chosen.folder}")
    run(lambda router: classify(router, files, expert=chosen.expert, as_json=chosen.json), chosen.router)


if __name__ == "__main__":
    main()
