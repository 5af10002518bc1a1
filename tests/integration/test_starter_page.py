"""What docs/starter.md shows is answered as it shows: by the expert that is named, and by whom the router finds."""

from __future__ import annotations

import re
from pathlib import Path

from examples.starter.kit import Kit
from examples.starter.serving import serving
from hocket.client import Routing

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(
    r"^\| (?:none|`expert-(?P<expert>[a-z-]+)`) \| [^|]+ \| `(?P<first>[^`]+)`(?:, new line, `(?P<second>[^`]+)`)? "
    r"\| `(?P<answer>[^`]+)` \|$",
    re.MULTILINE,
)
EXAMPLES = [match.groupdict() for match in EXAMPLE.finditer((ROOT / "docs" / "starter.md").read_text())]


async def test_every_example_of_the_page_is_answered_as_shown(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 10
    async with serving(Kit(ROOT / "starter"), tmp_path) as (_, router):
        for example in EXAMPLES:
            prompt = "\n".join(filter(None, (example["first"], example["second"])))
            named = [example["expert"]] if example["expert"] else []
            for experts, routing in ((named, None), ([], Routing(expert_count_max=2))):
                answer = await router.answer_text(prompt, experts=experts, routing=routing, temperature=0.0)
                assert answer.text == example["answer"], (prompt, experts)
