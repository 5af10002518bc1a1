from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hocket.errors import HocketError, Reason
from hocket.text_limits import CONSTRAINT_BYTES_MAX
from services.expert_worker.engine import constraints as module
from services.expert_worker.engine.constraints import Constraint, ConstraintKind, Constraints
from services.expert_worker.engine.sampling import Choice, Sampling, SamplingRow, choose
from services.expert_worker.engine.schemas import _FORMATS
from tests.bases import tiny_base
from tests.grammars import bits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.expert_worker.engine.constraints import Matcher

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds

    return AutoTokenizer.from_pretrained(tiny_base(tmp_path_factory.mktemp("bases") / "tiny"))


@pytest.fixture
def constraints(tokenizer: Any) -> Iterator[Constraints]:
    made = Constraints(tokenizer, frozenset({EOS}))
    yield made
    made.stop()


def grammar(text: str) -> Constraint:
    return Constraint(ConstraintKind.GBNF, text)


def schema(document: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, document if isinstance(document, str) else json.dumps(document))


async def refusal(constraints: Constraints, constraint: Constraint) -> HocketError:
    with pytest.raises(HocketError) as refused:
        await constraints.matcher(constraint)
    return refused.value


def follow(matcher: Matcher, tokenizer: Any, text: str) -> bool:
    """Whether a text may be answered, and may end there."""
    for character in text:
        (token_id,) = tokenizer.encode(character)
        if token_id not in bits(matcher.allowed()):
            return False
        matcher.advance(token_id)
    return EOS in bits(matcher.allowed())


def watched(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> list[Constraint]:
    """Which constraints are compiled from now on."""
    compiled: list[Constraint] = []
    compile_ = constraints._compile

    def noting(constraint: Constraint) -> Any:
        compiled.append(constraint)
        return compile_(constraint)

    monkeypatch.setattr(constraints, "_compile", noting)
    return compiled


async def test_an_answer_may_end_only_where_its_text_is_whole(constraints: Constraints, tokenizer: Any) -> None:
    matcher = await constraints.matcher(grammar('root ::= "a" | "a" "b"+'))
    assert bits(matcher.allowed()) == tokenizer.encode("a")
    assert not follow(matcher, tokenizer, "b")
    assert follow(await constraints.matcher(grammar('root ::= "a" | "a" "b"+')), tokenizer, "a")
    assert follow(await constraints.matcher(grammar('root ::= "a" | "a" "b"+')), tokenizer, "abb")


async def test_an_answer_ends_where_nothing_can_follow(constraints: Constraints, tokenizer: Any) -> None:
    matcher = await constraints.matcher(grammar('root ::= "ab"'))
    assert follow(matcher, tokenizer, "ab")
    assert bits(matcher.allowed()) == [EOS]


async def test_every_token_that_ends_an_answer_does(tokenizer: Any) -> None:
    constraints = Constraints(tokenizer, frozenset({0, EOS}))
    matcher = await constraints.matcher(grammar('root ::= ""  | "a"'))
    assert {0, EOS} < {*bits(matcher.allowed())}
    constraints.stop()


async def test_special_tokens_are_no_text(constraints: Constraints, tokenizer: Any) -> None:
    matcher = await constraints.matcher(grammar("root ::= .+"))
    assert not {*bits(matcher.allowed())} & {*tokenizer.all_special_ids}
    assert follow(matcher, tokenizer, "<|im_end|>")  # spelled out


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>"])
async def test_the_name_of_a_special_token_is_text_where_nothing_else_can_follow(
    constraints: Constraints, tokenizer: Any, name: str
) -> None:
    for constraint, text in ((grammar(f'root ::= "a{name}b"'), f"a{name}b"), (schema({"const": name}), f'"{name}"')):
        assert follow(await constraints.matcher(constraint), tokenizer, text)


async def test_answers_do_not_move_each_other(constraints: Constraints, tokenizer: Any) -> None:
    first = await constraints.matcher(grammar('root ::= "ab"'))
    second = await constraints.matcher(grammar('root ::= "ab"'))
    assert follow(first, tokenizer, "ab")
    assert follow(second, tokenizer, "ab")


class TestCompiling:
    async def test_a_constraint_is_compiled_once(
        self, constraints: Constraints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled = watched(constraints, monkeypatch)
        wanted = grammar('root ::= "a"'), schema({}), grammar("root ::="), grammar('root ::= "a"'), schema({})
        await asyncio.gather(*map(constraints.matcher, wanted), return_exceptions=True)
        await asyncio.gather(*map(constraints.matcher, wanted), return_exceptions=True)
        assert sorted(compiled, key=str) == sorted(wanted[:3], key=str)

    async def test_after_some_answers_it_is_compiled_anew(
        self, constraints: Constraints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled = watched(constraints, monkeypatch)
        for _ in range(module._ANSWERS_MAX):
            await constraints.matcher(schema({}))
        assert len(compiled) == 1
        await constraints.matcher(schema({}))
        assert len(compiled) == 2

    async def test_those_used_last_are_kept(self, constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled = watched(constraints, monkeypatch)
        texts = [f'root ::= "a"{{{count}}}' for count in range(1, module._KEPT_MAX + 2)]
        for text in texts[:-1]:
            await constraints.matcher(grammar(text))
        await constraints.matcher(grammar(texts[0]))
        await constraints.matcher(grammar(texts[-1]))
        await constraints.matcher(grammar(texts[0]))
        assert [each.text for each in compiled] == texts
        await constraints.matcher(grammar(texts[1]))
        assert [each.text for each in compiled] == [*texts, texts[1]]

    async def test_whoever_gives_up_takes_nothing_from_others(self, constraints: Constraints) -> None:
        first = asyncio.create_task(constraints.matcher(schema({})))
        second = asyncio.create_task(constraints.matcher(schema({})))
        await asyncio.sleep(0)
        first.cancel()
        assert bits((await second).allowed())
        with pytest.raises(asyncio.CancelledError):
            await first

    async def test_a_refusal_is_everyones_own(self, constraints: Constraints) -> None:
        first, second = [await refusal(constraints, grammar("root ::=")) for _ in range(2)]
        assert first is not second
        assert first.message == second.message

    async def test_no_room_for_the_work_is_no_refusal_of_the_constraint(
        self, constraints: Constraints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def full(*_: Any) -> None:
            raise HocketError(Reason.QUEUE_FULL, "full")

        with monkeypatch.context() as patch:
            patch.setattr(constraints._thread, "run", full)
            assert (await refusal(constraints, schema({}))).reason is Reason.QUEUE_FULL
        assert bits((await constraints.matcher(schema({}))).allowed())

    async def test_a_base_that_does_not_say_how_answers_end_cannot_be_constrained(self, tokenizer: Any) -> None:
        constraints = Constraints(tokenizer, frozenset())
        assert (await refusal(constraints, schema({}))).reason is Reason.NOT_SERVABLE
        constraints.stop()

    async def test_a_tokenizer_that_is_not_understood_cannot_be_constrained(self, tokenizer: Any) -> None:
        class Strange:
            backend_tokenizer = type("Backend", (), {"to_str": lambda _: "{}"})()
            get_vocab = tokenizer.get_vocab

        strange: Any = Strange()
        constraints = Constraints(strange, frozenset({EOS}))
        assert (await refusal(constraints, schema({}))).reason is Reason.NOT_SERVABLE
        constraints.stop()


DEEP = 64 // 2


class TestSchemas:
    @pytest.mark.parametrize(
        ("broken", "why", "sound"),
        [
            ("", "cannot be read", "{}"),
            ("{", "cannot be read", "{}"),
            ('{"type": "string", "type": "integer"}', "cannot be read", '{"type": "string"}'),
            ("1", "neither an object nor true", "true"),
            ("false", "neither an object nor true", "true"),
            ({"type": "strnig"}, "Invalid type", {"type": "string"}),
            ({"not": {"type": "string"}}, "not", {"type": "integer"}),
            (
                {"type": "array", "uniqueItems": True},
                "uniqueItems (at #) cannot be enforced",
                {"type": "array"},
            ),
            (
                {"properties": {"not": {}, "a/b": {"items": {"contains": {}, "not": {}}}}},
                "contains (at #/properties/a~1b/items), not (at #/properties/a~1b/items) cannot be enforced",
                {"properties": {"not": {}, "a/b": {"items": {}}}, "enum": [{"a/b": []}]},
            ),
            ({"if": {}, "then": {}}, "if", {"anyOf": [{}]}),
            ({"format": "colour"}, "the format colour is not known: use one of date-time, date,", {"format": "date"}),
            (
                {"prefixItems": [{"multipleOf": 1.01}, {"items": {"multipleOf": 103}}]},
                "common multiple",
                {"prefixItems": [{"multipleOf": 1.01}, {"items": {"multipleOf": 99}}]},
            ),
            (
                {"allOf": [{"pattern": "a" * count} for count in range(11)]},
                "more than 10 patterns",
                {"anyOf": [{"pattern": "a" * count} for count in range(11)]},
            ),
            (
                {"patternProperties": {f"^{number}x": {} for number in range(101)}},
                "more than 100 patterns",
                {"patternProperties": {f"^{number}x": {} for number in range(100)}},
            ),
            ({"type": "integer", "multipleOf": 10_001}, "common multiple", {"type": "integer", "multipleOf": 99_990}),
            ({"type": "string", "pattern": "^(?!a)"}, "look-around", {"type": "string", "pattern": "^[^a]"}),
            (
                {"items": {"$ref": "https://example.com/a.json"}},
                "the $ref at #/items leads out of the document",
                {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {}}},
            ),
            ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "leads nowhere", {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
            ({"$schema": "mine"}, "$schema", {"$schema": "https://json-schema.org/draft/2020-12/schema"}),
            (
                {"anyOf": [{"enum": []}]},
                "no answer can satisfy it: the enum at #/anyOf/0 is empty",
                {"anyOf": [{"enum": [1]}]},
            ),
            ({"type": []}, "the type at # is empty", {"type": ["string"]}),
            (
                {"type": "array", "minItems": 2, "maxItems": 1},
                "no answer can satisfy it: minItems (2)",
                {"type": "array", "minItems": 1, "maxItems": 1},
            ),
            (
                {"allOf": [{"type": "string"}, {"type": "integer"}]},
                "no answer can satisfy it: ",
                {"allOf": [{"type": "string"}]},
            ),
            (
                {"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
                "two branches of oneOf can both match",
                {"oneOf": [{"type": "integer"}, {"type": "string"}]},
            ),
            (
                {"$ref": "#"},
                "no answer could begin: what begins never ends",
                {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
            ),
            ('{"items": ' * 64 + "{}" + "}" * 64, "nested", '{"items": ' * 63 + "{}" + "}" * 63),
            (
                json.dumps({"title": "a" * (CONSTRAINT_BYTES_MAX - 12)}),
                "bytes",
                json.dumps({"title": "a" * (CONSTRAINT_BYTES_MAX - 13)}),
            ),
            ({"x-guidance": {"lenient": True}, "not": {}}, "not", {"x-guidance": {"lenient": True}}),
            ({"const": 2**53 + 1}, "2^53", {"const": 2**53}),
            ({"items": {"enum": [-(2**53) - 1]}}, "2^53", {"items": {"enum": [-(2**53)]}}),
            ({"type": "integer", "maximum": 2**63 - 2}, "2^53", {"type": "integer", "maximum": 2**63 - 1}),
            ({"minProperties": 2}, "minProperties", {"minProperties": 1}),
            ({"anyOf": [{"minProperties": 2.5}]}, "minProperties", {"minProperties": 2, "required": ["a"]}),
        ],
    )
    async def test_what_cannot_be_enforced_is_refused(
        self, constraints: Constraints, broken: Any, why: str, sound: Any
    ) -> None:
        refused = await refusal(constraints, schema(broken))
        assert (refused.reason, why in refused.message) == (Reason.BAD_SCHEMA, True), refused.message
        for word in ("llguidance", "coerce_one_of", "Unimplemented", "registry", "NoExtensionBias"):
            assert word not in refused.message
        await constraints.matcher(schema(sound))

    async def test_a_schema_cannot_change_what_json_is(self, constraints: Constraints, tokenizer: Any) -> None:
        loosened = schema({"type": "array", "x-guidance": {"item_separator": ";"}})
        assert not follow(await constraints.matcher(loosened), tokenizer, "[1;2]")
        assert follow(await constraints.matcher(loosened), tokenizer, "[1,2]")

    async def test_a_property_has_one_spelling(self, constraints: Constraints, tokenizer: Any) -> None:
        wanted = schema({"type": "object", "properties": {"a": {"type": "integer"}}})
        assert follow(await constraints.matcher(wanted), tokenizer, r'{"a": 1, "b\n": "x"}')
        for text in (r'{"\u0061": "x"}', r'{"a": 1, "\u0061": "x"}', '{"a": 1, "a": "x"}'):
            assert not follow(await constraints.matcher(wanted), tokenizer, text)

    async def test_every_format_that_is_named_is_known(self, constraints: Constraints) -> None:
        for name in _FORMATS:
            await constraints.matcher(schema({"type": "string", "format": name}))

    async def test_where_a_keyword_stands_is_told_in_few_words(self, constraints: Constraints) -> None:
        refused = await refusal(constraints, schema({"properties": {"a" * 60_000: {"not": {}}}}))
        assert "not (at #/properties/aaa" in refused.message
        assert len(refused.message) < 400

    async def test_what_json_schema_does_not_know_is_ignored_as_it_says(self, constraints: Constraints) -> None:
        await constraints.matcher(schema({"typ": "string", "nullable": True, "contentEncoding": "base64"}))

    @pytest.mark.parametrize("style", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": "\t"}])
    async def test_json_may_be_written_as_writers_write_it(
        self, style: dict[str, Any], constraints: Constraints, tokenizer: Any
    ) -> None:
        document = {"name": "a b", "tags": [1, {"deep": [{"deeper": []}]}], "none": None}
        properties = {"name": {"type": "string"}, "tags": {"type": "array"}, "none": {"type": "null"}}
        wanted = schema({"type": "object", "properties": properties, "required": [*properties]})
        for text in (json.dumps(document, **style), json.dumps(document, **style).replace("\n", "\r\n")):
            assert follow(await constraints.matcher(wanted), tokenizer, text)

    async def test_blanks_are_one_or_a_line_break_with_indentation(
        self, constraints: Constraints, tokenizer: Any
    ) -> None:
        wanted = schema({"type": "array"})
        for sound, broken in (
            ("[ ]", "[  ]"),
            (f"[\n{' ' * 16}]", f"[\n{' ' * 17}]"),
            ("[\n]", "[\n\n]"),
            ("[]", " []"),
        ):
            assert follow(await constraints.matcher(wanted), tokenizer, sound)
            assert not follow(await constraints.matcher(wanted), tokenizer, broken)


@pytest.mark.parametrize(
    "hostile",
    [
        grammar('root ::= "a" | ' + " | ".join(f'"{number:06d}"' for number in range(5500))),
        grammar("root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(60)) + '\nr60 ::= "a" | ""'),
        grammar("root ::= ((([a-z]{0,100}){0,100}){0,100}){0,100}"),
        grammar('root ::= x{2000}\nx ::= "a" x "b" | ' + '"c"' + ' | "d"' * 4000),
        grammar('root ::= x "a"\nx ::= "a"+'),
        grammar('root ::= x? (root | "a") "a" "a"\nx ::= "a"+'),
        grammar('root ::= "ab" root | "a" x\nx ::= "bx"'),
        grammar('root ::= x (root | "ab")\nx ::= ("ab"{1,2})+ | "c" root'),
        grammar('root ::= (("a"{2000}){2000}){2000}'),
        schema({"type": "string", "pattern": "(((a{1000}){1000}){1000}){1000}"}),
        schema({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}),
        schema({"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}),
    ],
    ids=["alternatives", "doubling", "repetitions", "long series", *"abcde", "pattern", "anchored", "counts"],
)
async def test_what_takes_too_much_is_refused_or_compiled_all_the_same(
    constraints: Constraints, hostile: Constraint
) -> None:
    async with asyncio.timeout(60):
        try:
            matcher = await constraints.matcher(hostile)
        except HocketError as error:
            assert error.reason in (Reason.BAD_GRAMMAR, Reason.BAD_SCHEMA)  # noqa: PT017 - either is right
        else:
            for _ in range(30):  # where there is but one way to go on, too
                try:
                    token_id = bits(matcher.allowed())[0]
                except HocketError:
                    break
                matcher.advance(token_id)


class TestChoosing:
    @pytest.fixture
    async def matcher(self, constraints: Constraints) -> Matcher:
        return await constraints.matcher(grammar('root ::= "a" | "b"'))

    def choice(self, logits: torch.Tensor, row: SamplingRow) -> Choice | HocketError:
        (choice,) = choose(logits[None], [row], 367)
        return choice

    @pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(5.0, seed=3), Sampling(1.0, 2, 0.5, 0.1, 2.0)])
    async def test_only_what_is_allowed_is_chosen_however_improbable(
        self, matcher: Matcher, tokenizer: Any, sampling: Sampling
    ) -> None:
        logits = torch.randn(384)
        a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
        logits[[a, b]] = torch.tensor([-50.0, -90.0])
        row = SamplingRow(sampling, [1, 2], matcher=matcher)
        before = logits.clone()
        choice = self.choice(logits, row)
        assert isinstance(choice, Choice)
        assert choice.token_id == a
        assert choice.logprob == pytest.approx(float(logits[:367].log_softmax(-1)[a]), abs=1e-4)  # of the model's own
        assert logits.equal(before)
        row.append(a)
        last = self.choice(logits, row)
        assert isinstance(last, Choice)
        assert last.token_id == EOS

    async def test_neighbours_are_not_moved(self, matcher: Matcher) -> None:
        logits = torch.randn(3, 384)
        free = [SamplingRow(Sampling(1.0, seed=seed), [1]) for seed in range(3)]
        alone = choose(logits, free, 367)
        free[1].matcher = matcher
        assert [choose(logits, free, 367)[place] for place in (0, 2)] == [alone[0], alone[2]]

    async def test_what_has_been_answered_elsewhere_counts(self, constraints: Constraints, tokenizer: Any) -> None:
        matcher = await constraints.matcher(grammar('root ::= "ab"'))
        row = SamplingRow(Sampling(0.0), [1], tokenizer.encode("a"), matcher)
        choice = self.choice(torch.zeros(384), row)
        assert isinstance(choice, Choice)
        assert choice.token_id == tokenizer.encode("b")[0]

    async def test_a_model_that_gives_allowed_tokens_no_probability_has_no_answer(self, matcher: Matcher) -> None:
        logits = torch.zeros(384)
        logits[bits(matcher.allowed())] = -math.inf
        choice = self.choice(logits, SamplingRow(Sampling(0.0), [1], matcher=matcher))
        assert isinstance(choice, HocketError)
        assert choice.reason is Reason.BAD_ANSWER

    async def test_a_number_that_is_none_is_seen_wherever_it_stands(self, matcher: Matcher) -> None:
        logits = torch.zeros(384)
        logits[5] = math.nan
        choice = self.choice(logits, SamplingRow(Sampling(0.0), [1], matcher=matcher))
        assert isinstance(choice, HocketError)
        assert choice.reason is Reason.BAD_ANSWER

    async def test_an_answer_that_left_its_grammar_ends_alone(self, matcher: Matcher, tokenizer: Any) -> None:
        row = SamplingRow(Sampling(0.0), [1], tokenizer.encode("x"), matcher)
        failed, other = choose(torch.zeros(2, 384), [row, SamplingRow(Sampling(0.0), [1])], 367)
        assert isinstance(failed, HocketError)
        assert failed.reason is Reason.BAD_GRAMMAR
        assert isinstance(other, Choice)
