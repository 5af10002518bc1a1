"""Translate a text file, line by line, between English and Esperanto, by two experts at once.

    python -m examples.use_cases.translate examples/use_cases/sentences.txt --to esperanto

`expert-esperanto-nature` knows animals and plants, `expert-esperanto-home` the kitchen and the family. Composed with
weights they translate sentences that need the words of both, such as "The fox finds the spoons."
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from examples.use_cases.asking import answers, arguments, plain, run, who

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.client import RouterClient

_QUESTIONS: Final = {"esperanto": "Translate into Esperanto: {text}.", "english": "Translate into English: {text}."}
_TOKENS_MAX: Final = 64


def question(line: str, language: str) -> str:
    """What the experts are asked: they have learnt from sentences without their dot."""
    text = plain(line).removesuffix(".")
    if language == "esperanto":
        text = text[:1].lower() + text[1:]
    return _QUESTIONS[language].format(text=text)


async def translate(
    router: RouterClient, lines: Sequence[str], language: str, experts: dict[str, float], *, as_json: bool
) -> None:
    """Translate lines, and print them in their order; empty ones stay."""
    asked = {line: question(line, language) for line in lines if line.strip()}
    made = dict(zip(asked, await answers(router, asked.values(), experts, max_tokens=_TOKENS_MAX), strict=True))
    for number, line in enumerate(lines, 1):
        text = plain(made[line].text) if line in made else ""
        if not as_json:
            print(text)
        elif line in made:
            fields = {"line": number, "source": line, "translation": text, "experts": who(made[line])}
            print(json.dumps(fields, ensure_ascii=False))


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("file", type=Path, help="one sentence a line")
    parser.add_argument("--to", choices=_QUESTIONS, default="esperanto", help="(default: %(default)s)")
    parser.add_argument("--nature", type=float, default=0.5, metavar="WEIGHT", help="(default: %(default)s)")
    parser.add_argument("--home", type=float, default=0.5, metavar="WEIGHT", help="(default: %(default)s)")
    chosen = parser.parse_args()
    try:
        lines = chosen.file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {chosen.file}: {error}")
    experts = {"esperanto-nature": chosen.nature, "esperanto-home": chosen.home}
    run(lambda router: translate(router, lines, chosen.to, experts, as_json=chosen.json), chosen.router)


if __name__ == "__main__":
    main()
