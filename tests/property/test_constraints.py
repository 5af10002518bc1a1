"""Whatever is answered under a constraint is of it, or begins so: held against readers that know nothing of ours."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError
from services.expert_worker.engine.constraints import Constraint, ConstraintKind, Constraints
from services.expert_worker.engine.sampling import Choice, Sampling, SamplingRow, choose
from services.expert_worker.engine.sequence import FinishReason
from tests.bases import tiny_base
from tests.engines import TOKEN_COUNT, asking, expert_of, opened, prompt_ids, random_package, whole_engine
from tests.grammars import Recogniser, published

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.expert_worker.engine.base import Base

EOS: Final = 2
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    torch.set_num_threads(1)
    return opened(tiny_base(tmp_path_factory.mktemp("bases") / "tiny"))


@pytest.fixture(scope="module")
def constraints(base: Base) -> Iterator[Constraints]:
    made = Constraints(base.tokenizer, frozenset({EOS}))
    yield made
    made.stop()


def walk(constraints: Constraints, base: Base, constraint: Constraint, seed: int, *, count: int) -> tuple[str, bool]:
    """A text of so many tokens at most that a model of noise answers, and whether it ended by itself."""
    row = SamplingRow(Sampling(1.0, seed=seed), [], matcher=asyncio.run(constraints.matcher(constraint)))
    ids: list[int] = []
    noise = torch.Generator().manual_seed(seed)
    for _ in range(count):
        (choice,) = choose(3 * torch.randn(1, TOKEN_COUNT, generator=noise), [row], TOKEN_COUNT)
        assert isinstance(choice, Choice), choice
        if choice.token_id == EOS:
            return whole(base, ids), True
        row.append(choice.token_id)
        ids.append(choice.token_id)
    return whole(base, ids), False


def whole(base: Base, ids: list[int]) -> str:
    """The characters of some tokens that are complete."""
    text = str(base.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))
    return text.rstrip("\ufffd")


ATOMS = st.sampled_from(['"a"', '"b"', '"ab"', '"a b"', "[ab]", "[^a]", "[a-c]", "x", "y", "root", '""'])


def _repeated(node: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda inner, sign: f"({inner}){sign}", node, st.sampled_from(["", "*", "+", "?", "{2}", "{1,3}"]))


NODES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        _repeated(inner),
        st.lists(inner, min_size=2, max_size=3).map(" ".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({' | '.join(parts)})"),
    ),
    max_leaves=8,
)
GRAMMARS = st.builds(lambda root, x, y: f"root ::= {root}\nx ::= {x}\ny ::= {y}", NODES, NODES, NODES)


@given(grammar=GRAMMARS, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_of_its_grammar_or_begins_a_text_of_it(
    constraints: Constraints, base: Base, grammar: str, seed: int
) -> None:
    try:
        text, ended = walk(constraints, base, Constraint(ConstraintKind.GBNF, grammar), seed, count=12)
    except HocketError:
        assume(False)  # noqa: FBT003 - its name says it; none of its texts ends, or it is too ambiguous
    text = text[:40]
    recogniser = Recogniser(grammar)
    assert recogniser.begins(text)
    assert not ended or len(text) == 40 or recogniser.accepts(text)


VALUES = st.sampled_from([1, "x", None, True, [1], {"a": 2}])
SCHEMAS = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.builds(
            lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
            st.integers(-50, 50),
            st.integers(0, 2000),
        ),
        st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 8)),
        st.just({"type": "string", "pattern": "^[a-c]{1,4}-[0-9]+$"}),
        st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        st.just({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": least + 2},
            inner,
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [*properties][:required],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "name", "key"]), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
    ),
    max_leaves=5,
)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_satisfies_its_schema(constraints: Constraints, base: Base, schema: Any, seed: int) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    text, ended = walk(constraints, base, constraint, seed, count=300)
    if ended:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 1},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
        {"oneOf": [{"type": "integer", "maximum": 99, "minimum": 0}, {"type": "string", "maxLength": 2}]},
        {"type": "string", "pattern": "[0-9]"},
        {
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
        },
        {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "boolean"}},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "uuid"},
        True,
    ],
)
def test_documented_keywords_are_enforced(constraints: Constraints, base: Base, schema: Any) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    texts = [walk(constraints, base, constraint, seed, count=150) for seed in range(12)]
    ended = [json.loads(text) for text, ended in texts if ended]
    for value in ended:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
    assert ended


class TestEngine:
    async def test_whoever_composes_and_however_tokens_are_chosen_answers_are_of_their_constraint(
        self, constraints: Constraints, base: Base
    ) -> None:
        lora, prompt = (expert_of(random_package(kind, seed=3), base) for kind in ("lora", "soft_prompt"))
        mixtures = [(), ((lora, 0.7),), ((lora, -0.4), (prompt, 1.0))]
        wanted = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
        requests = [
            asking(
                prompt_ids(9, seed),
                mixtures[seed % 3],
                max_tokens=300,
                eos_ids=frozenset({EOS}),
                temperature=seed % 2 * 1.5,
                repetition_penalty=1.3 if seed % 2 else 1.0,
                seed=seed,
                matcher=await constraints.matcher(wanted),
            )
            for seed in range(12)
        ]
        async with whole_engine(base) as lab:
            answers = await lab.ask_all(requests)
        ended = [told.text for told in answers if told.finish and told.finish.reason is FinishReason.END]
        for text in ended:
            jsonschema.validate(json.loads(text), SCHEMA)
        assert len(ended) > 6

    @pytest.mark.parametrize("name", ["sql", "neo4j", "json", "elastic"])
    async def test_published_grammars_hold(self, constraints: Constraints, base: Base, name: str) -> None:
        grammar = published(name)
        recogniser = Recogniser(grammar)
        requests = [
            asking(
                prompt_ids(5, seed),
                max_tokens=48,
                eos_ids=frozenset({EOS}),
                temperature=float(seed % 2),
                seed=seed,
                matcher=await constraints.matcher(Constraint(ConstraintKind.GBNF, grammar)),
            )
            for seed in range(4)
        ]
        async with whole_engine(base) as lab:
            answers = await lab.ask_all(requests)
        for told in answers:
            assert told.finish is not None
            text = told.text.rstrip("\ufffd")
            assert recogniser.begins(text[:60]), text
            if told.finish.reason is FinishReason.END and len(text) < 200:
                assert recogniser.accepts(text), text

    async def test_too_few_tokens_leave_a_beginning(self, constraints: Constraints, base: Base) -> None:
        wanted = Constraint(ConstraintKind.GBNF, 'root ::= "0123456789"')
        asked = [
            asking(prompt_ids(4), max_tokens=count, eos_ids=frozenset({EOS}), matcher=await constraints.matcher(wanted))
            for count in (4, 20)
        ]
        async with whole_engine(base) as lab:
            short, whole_ = await lab.ask_all(asked)
        assert (whole_.text, whole_.finish and whole_.finish.reason) == ("0123456789", FinishReason.END)
        assert "0123456789".startswith(short.text)
        assert short.finish is not None
        assert short.finish.reason is FinishReason.LENGTH

    async def test_an_answer_that_cannot_go_on_ends_alone(self, constraints: Constraints, base: Base) -> None:
        matcher = await constraints.matcher(Constraint(ConstraintKind.GBNF, 'root ::= "abc"'))
        matcher.advance(5)  # what nobody chose
        broken = asking(prompt_ids(4), eos_ids=frozenset({EOS}), matcher=matcher)
        async with whole_engine(base) as lab:
            alone = await lab.ask(asking(prompt_ids(6)))
            failed, told = await asyncio.gather(lab.ask(broken), lab.ask(asking(prompt_ids(6))), return_exceptions=True)
        assert isinstance(failed, HocketError)
        assert not isinstance(told, BaseException)
        assert told.ids == alone.ids
