"""Whatever a grammar or a schema says, it is compiled or refused in time, and no token of an answer waits for long.

A call into a library that does not return cannot be ended, so each is compiled in a process that can be killed. What is
tried is drawn by chance from what grammars and schemas consist of, from published grammars with pieces exchanged, and
from what makes compilers of such things slow. HOCKET_FUZZ_SECONDS has it go on for
longer than a minute of each, HOCKET_FUZZ_SEED try others.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import Reason
from hocket.text_limits import CONSTRAINT_BYTES_MAX
from services.expert_worker.engine.constraints import Constraint, ConstraintKind
from tests.compiling import Compiler
from tests.grammars import published

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.long

SECONDS = float(os.environ.get("HOCKET_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("HOCKET_FUZZ_SEED", "0"))
COMPILE_SECONDS_MAX = 10.0
"""What docs/text.md promises, on a machine that others use as well."""
STEP_SECONDS_MAX = 2.0
TOKENS = 60
COUNTS = [0, 1, 2, 3, 7, 30, 100, 500, 2000]
TERMINALS = [
    '"a"',
    '"b"',
    '"ab"',
    '"aaaa"',
    '"é"',
    "[a-z]",
    "[^a]",
    "[a-c]",
    ".",
    "[ \\t\\n]",
    '""',
    '"select"',
    "[0-9]",
]
NAMES = [f"r{number}" for number in range(8)]
PATTERNS = [
    "a",
    "[a-z]",
    ".",
    "(a|b)",
    "(a|ab)",
    "(a|a)",
    "\\d",
    "\\w",
    "[^x]",
    "(a*)",
    "(a|b|ab)*",
    "\\p{L}",
    "(?i:ab)",
]


class Grammars:
    """Random GBNF."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.published = [published(name) for name in ("sql", "neo4j", "json", "elastic")]

    def next(self) -> str:
        return self.dice.choice([self.random, self.random, self.random, self.mutated, self.large, self.overlapping])()

    def item(self, depth: int) -> str:
        kind = self.dice.random()
        if depth and kind < 0.35:
            return f"({self.choice(depth - 1)})"
        return self.dice.choice(NAMES) if kind < 0.6 else self.dice.choice(TERMINALS)

    def series(self, depth: int) -> str:
        return " ".join(self.item(depth) + self.times() for _ in range(self.dice.randint(0, 4)))

    def choice(self, depth: int) -> str:
        return " | ".join(self.series(depth) for _ in range(self.dice.randint(1, 4)))

    def times(self) -> str:
        kind = self.dice.random()
        if kind < 0.6:
            return ""
        if kind < 0.85:
            return self.dice.choice("*+?")
        least, most = sorted(self.dice.choices(COUNTS, k=2))
        return self.dice.choice([f"{{{least}}}", f"{{{least},}}", f"{{{least},{most}}}"])

    def random(self) -> str:
        return "\n".join(f"{name} ::= {self.choice(self.dice.randint(0, 4))}" for name in ("root", *NAMES))

    def mutated(self) -> str:
        """A published grammar with pieces of itself, or of others, in other places."""
        text = self.dice.choice(self.published)
        for _ in range(self.dice.randint(1, 6)):
            donor = self.dice.choice([text, *self.published])
            begin, place = self.dice.randrange(len(donor)), self.dice.randrange(len(text))
            piece = donor[begin : begin + self.dice.choice([1, 2, 5, 40, 200])]
            left_out = self.dice.choice([0, 1, 5, 40])
            text = (
                text[:place] + self.dice.choice([piece, "", "*", "+", "?", "{0,500}", "|"]) + text[place + left_out :]
            )
        return text

    def large(self) -> str:
        """Something small as often as 64 KiB hold it."""
        one: Callable[[int], str] = self.dice.choice(
            [
                lambda n: f'"{n}"',
                lambda n: f'"{"a" * (n % 60)}b"',
                lambda n: f"[a-{chr(97 + n % 26)}]+",
                lambda n: f"[\\u{0x100 + 7 * n % 0x9000:04x}-\\u{0x9100 + 5 * n % 0x3000:04x}]",
                lambda n: f"({self.item(1)}){{0,{n % 9 + 1}}}",
                lambda _: self.series(1),
            ]
        )
        between = self.dice.choice([" | ", " ", "? ", "* | ", " | root "])
        text, number = "", 0
        limit = self.dice.choice([2_000, 20_000, CONSTRAINT_BYTES_MAX - 2_000])
        while len(text) < limit:
            text += one(number) + between
            number += 1
        rules = "\n".join(f"{name} ::= {self.choice(1)}" for name in NAMES)
        return f'root ::= {text} "x"\n{rules}'

    def overlapping(self) -> str:
        """Repetitions of what overlaps, inside each other."""
        text = self.dice.choice(TERMINALS[:9])
        for _ in range(self.dice.randint(2, 8)):
            other = self.dice.choice(TERMINALS[:9])
            least, most = sorted(self.dice.choices(COUNTS, k=2))
            text = self.dice.choice(
                [f"({text})*", f"({text} | {other})+", f"({text} {other}?)*", f"({text}){{{least},{most}}} {other}"]
            )
        return f"root ::= {text}"


class Schemas:
    """Random JSON schemas."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def next(self) -> str:
        made = self.dice.choice([self.random, self.random, self.large, self.regular, self.refined])()
        return json.dumps(made)[:CONSTRAINT_BYTES_MAX]

    def random(self) -> Any:
        schema = self.schema(self.dice.randint(0, 4))
        schema["$defs"] = {name: self.schema(2) for name in "abc"}
        return schema

    def schema(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(self.dice.choice([1, 1, 1, 2, 3])):
            made |= self.dice.choice([self.kind, self.numbers, self.strings, self.lists, self.objects, self.several])(
                depth
            )
        return made

    def kind(self, _depth: int) -> dict[str, Any]:
        kinds = ["string", "integer", "number", "boolean", "null", "object", "array"]
        return self.dice.choice([{"type": self.dice.choice(kinds)}, {"type": self.dice.sample(kinds, 3)}])

    def numbers(self, _depth: int) -> dict[str, Any]:
        keys = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]
        values = [0, 1, -1, 7, 0.1, 1e-9, 1e300, 2**53, -(10**18), 123456789.987654321, 997, 1000003]
        return {key: self.dice.choice(values) for key in self.dice.sample(keys, self.dice.randint(1, 4))}

    def strings(self, _depth: int) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "minLength": self.dice.choice(COUNTS),
            "maxLength": self.dice.choice([*COUNTS, 10**6, 10**9]),
            "pattern": self.pattern(3),
            "format": self.dice.choice(["date-time", "uuid", "email", "ipv6", "uri", "hostname", "duration"]),
            "enum": ["a" * count for count in range(self.dice.randint(1, 9))],
            "const": self.dice.choice([None, 1, "a", ["a"], {"a": 1}]),
        }
        return {key: keys[key] for key in self.dice.sample([*keys], self.dice.randint(1, 2))}

    def pattern(self, depth: int) -> str:
        text = self.dice.choice(PATTERNS)
        for _ in range(self.dice.randint(0, depth)):
            least, most = sorted(self.dice.choices(COUNTS, k=2))
            text = self.dice.choice(
                [f"({text})*", f"({text}){{{least},{most}}}", f"{text}{self.dice.choice(PATTERNS)}", f"({text}|b)+"]
            )
        return self.dice.choice([text, f"^{text}$", f"^{text}"])

    def lists(self, depth: int) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "minItems": self.dice.choice([*COUNTS, 10**9]),
            "maxItems": self.dice.choice([*COUNTS, 10**9]),
            "items": self.below(depth),
            "prefixItems": [self.below(depth) for _ in range(self.dice.choice([1, 2, 5]))],
        }
        return {key: keys[key] for key in self.dice.sample([*keys], self.dice.randint(1, 3))}

    def objects(self, depth: int) -> dict[str, Any]:
        names = self.dice.sample(["a", "b", "ab", "name", "é", "", "aa", "x" * 300], 4)
        keys: dict[str, Any] = {
            "properties": {name: self.below(depth) for name in names},
            "required": self.dice.sample(names, self.dice.randint(0, 4)),
            "additionalProperties": self.dice.choice([True, False, self.below(depth)]),
            "patternProperties": {self.pattern(2): self.below(depth) for _ in range(self.dice.randint(1, 3))},
            "minProperties": self.dice.choice(COUNTS),
            "maxProperties": self.dice.choice(COUNTS),
        }
        return {key: keys[key] for key in self.dice.sample([*keys], self.dice.randint(1, 4))}

    def several(self, depth: int) -> dict[str, Any]:
        many = [self.below(depth) for _ in range(self.dice.choice([1, 2, 3, 8]))]
        reference = self.dice.choice(["#", "#/$defs/a", "#/$defs/b", "#/$defs/c"])
        return self.dice.choice([{"anyOf": many}, {"allOf": many}, {"oneOf": many}, {"$ref": reference}])

    def below(self, depth: int) -> Any:
        return self.schema(depth - 1) if depth else self.dice.choice([True, {}, {"type": "string"}, {"$ref": "#"}])

    def large(self) -> Any:
        """Something small as often as 64 KiB hold it."""
        one: Callable[[int], Any] = self.dice.choice(
            [
                lambda n: {"const": n},
                lambda n: {"type": "string", "pattern": f"^a{{0,{n % 50}}}b"},
                lambda n: {"type": "string", "minLength": n},
                lambda n: {"multipleOf": n + 1, "type": "integer"},
                lambda n: {"properties": {f"p{n}": {"type": "integer"}}, "required": [f"p{n}"]},
                lambda n: {"patternProperties": {f"^{'a' * (n % 20)}": {"type": "integer"}}},
                lambda n: {"$ref": f"#/$defs/{'abc'[n % 3]}"},
                lambda _: self.schema(1),
            ]
        )
        count = self.dice.choice([10, 100, 1000])
        many = [one(number) for number in range(count)]
        while len(json.dumps(many)) > CONSTRAINT_BYTES_MAX - 6_000:
            many = many[: len(many) // 2]
        keys: dict[str, Any] = {f"p{number}": each for number, each in enumerate(many)}
        how: dict[str, Any] = self.dice.choice(
            [{"anyOf": many}, {"allOf": many}, {"oneOf": many}, {"properties": keys}, {"prefixItems": many}]
        )
        return {**how, "$defs": {name: self.schema(1) for name in "abc"}}

    def regular(self) -> Any:
        """Regular expressions at once: intersections of them are where automata explode."""
        patterns = [self.pattern(5) for _ in range(self.dice.choice([1, 2, 5, 20]))]
        if self.dice.random() < 0.5:
            return {"type": "object", "patternProperties": {each: self.below(1) for each in patterns}}
        lengths = {"minLength": self.dice.choice(COUNTS), "maxLength": 2000}
        return {"type": "string", **lengths, "allOf": [{"pattern": each} for each in patterns]}

    def refined(self) -> Any:
        """Alternatives of alternatives, all of them at once: their products are what a compiler multiplies out."""
        count = self.dice.choice([2, 4, 8, 16, 32])
        all_of = [{"anyOf": [self.schema(1) for _ in range(self.dice.choice([2, 3, 5]))]} for _ in range(count)]
        return {"allOf": all_of, "$defs": {name: {"allOf": [self.schema(1), {"$ref": "#"}]} for name in "abc"}}


@pytest.mark.parametrize("kind", [ConstraintKind.GBNF, ConstraintKind.JSON_SCHEMA])
def test_every_constraint_is_compiled_or_refused_in_time(kind: ConstraintKind) -> None:
    source = Grammars(SEED) if kind is ConstraintKind.GBNF else Schemas(SEED)
    refusal = Reason.BAD_GRAMMAR if kind is ConstraintKind.GBNF else Reason.BAD_SCHEMA
    slow, compiled, refused = [], 0, 0
    end_time = time.monotonic() + SECONDS
    with Compiler(COMPILE_SECONDS_MAX + TOKENS * STEP_SECONDS_MAX) as compiler:
        number = 0
        while time.monotonic() < end_time:
            text = source.next()
            outcome = compiler.compile(Constraint(kind, text), seed=number, count=TOKENS)
            number += 1
            late = outcome.compile_seconds > COMPILE_SECONDS_MAX or outcome.step_seconds > STEP_SECONDS_MAX
            if outcome.killed or late:
                slow.append((outcome, text[:2_000]))
            assert outcome.reason in ("", refusal), outcome
            compiled += not outcome.reason
            refused += bool(outcome.reason)
    assert slow == []
    assert min(compiled, refused) > 10, "no proof of anything"
