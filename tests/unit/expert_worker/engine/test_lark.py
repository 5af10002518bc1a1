from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.lark import to_lark
from tests.grammars import Recogniser, published

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Bytes:
    """A tokenizer of bytes: llguidance then sees what GBNF sees."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)
    is_tokenizer_wrapper = True

    def __call__(self, text: str) -> Sequence[int]:
        return list(text.encode())


@cache
def _tokenizer() -> LLTokenizer:
    tokens: Any = _Bytes()
    return LLTokenizer(tokens, eos_token=256)


@cache
def matcher(grammar: str) -> LLMatcher:
    made = LLMatcher(_tokenizer(), LLMatcher.grammar_from_lark(to_lark(grammar)), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(grammar: str, text: str) -> bool:
    copy = matcher(grammar).deep_copy()
    data = text.encode()
    return bool(copy.try_consume_tokens(list(data)) == len(data) and copy.is_accepting())


SQL = (
    "SELECT a FROM t WHERE a = 1",
    "SELECT name, COUNT(orders.id) AS total FROM customers INNER JOIN orders ON customers.id = orders.customer",
    "SELECT a FROM t WHERE b.c = 'Germany' AND d >= 5 GROUP BY a ORDER BY d DESC LIMIT 10",
    "SELECT * FROM t WHERE a IS NOT NULL",
    "SELECT x FROM t WHERE a IN (SELECT b FROM u LIMIT 3 )",
    "SELECT CASE WHEN a < 1 THEN 'low' ELSE b END FROM t",
)
CYPHER = (
    "MATCH (n) RETURN n",
    'MATCH (n:Person {name: "x"})-[:KNOWS]->(m) WHERE n.age > 5 RETURN n.name AS x, m ORDER BY n.name DESC LIMIT 5',
    "CREATE (n:A {a: 1})",
)
JSON = ('{"a": [1, 2.5e+3, true, null, "x\\n\\u00e4"], "b": {}}', "[-0.5]", '["ä€😀"]', '"' + "long " * 900 + '"')
ELASTIC = (JSON[0], "status:active and (age:5)", '[process where a == "b" and c == d]')


@pytest.mark.parametrize(
    ("name", "texts", "others"),
    [
        ("sql", SQL, ("SELECT a FROM t WHERE", "DELETE FROM t", "SELECT a FROM t;")),
        ("neo4j", CYPHER, ("MATCH (n RETURN n", "MATCH (n)")),
        ("json", JSON, ("{'a': 1}", "[1,]", "01")),
        ("elastic", ELASTIC, ('{"query": }', "[process where]")),
    ],
)
def test_published_grammars_accept_what_their_experts_answer(
    name: str, texts: Sequence[str], others: Sequence[str]
) -> None:
    grammar = published(name)
    for text in texts:
        assert accepts(grammar, text), text
        assert len(text) > 200 or Recogniser(grammar).accepts(text)
    for text in others:
        assert not accepts(grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "a"', ["a"], ["", "aa", "b"]),
        ('root ::= "a" | ""', ["", "a"], ["aa"]),
        ('root ::= "a" |\nb ::= "b"', ["", "a"], ["b"]),
        ('root ::=\n  "a" |\n  "b"\n', ["a", "b"], ["ab"]),
        ('root ::= "a"\n  | "b"  # or\n  | "c"', ["a", "b", "c"], ["d"]),
        ('# first\nroot ::= x-1 # then\n\n\nx-1 ::= ("a"\n | "b")', ["a", "b"], ["ab"]),
        ('root ::= "a"* "b"+ "c"?', ["b", "aabbc"], ["a", "bcc"]),
        ('root ::= "ab"{2}', ["abab"], ["ab", "ababab"]),
        ('root ::= "a"{2,}', ["aa", "aaaa"], ["a"]),
        ('root ::= ("a" "b"){1,2}', ["ab", "abab"], ["", "ababab"]),
        ('root ::= "a"{0}', [""], ["a"]),
        ("root ::= [a-cx-]+", ["ab-x"], ["d", ""]),
        ("root ::= [^a-c\\n]", ["d", "ä", "😀"], ["a", "\n", "dd"]),
        ('root ::= [\\]\\["]+', ['["]'], ["\\"]),
        ("root ::= .", ["a", "\n", "東"], ["", "ab"]),
        ('root ::= "\\x41\\u00e4\\U0001F600\\n\\r\\t\\\\\\""', ['Aä😀\n\r\t\\"'], ["A"]),
        ("root ::= [\\u3040-\\u309f]", ["ひ"], ["カ"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a"]),
        ('root ::= e\ne ::= e "+" e | "(" e ")" | [0-9]+', ["1+(22+3)+4"], ["1+", "(1"]),
        ('root ::= a\na ::= b "x" | "y"\nb ::= a | "z"', ["y", "yxx", "zx"], ["z"]),
        ('root ::= root | "a"', ["a"], ["aa"]),
        ('root ::= "a" root | "b" root | "c"', ["c", "abac"], ["ab"]),
        ('root ::= "a" x | "b"\nx ::= "c" x', ["b"], ["a", "ac"]),
        ('root ::= ("a" | [^\\x00-\\U0010ffff])', ["a"], ["b"]),
    ],
)
def test_what_a_grammar_says_is_what_is_accepted(grammar: str, yes: Sequence[str], no: Sequence[str]) -> None:
    assert [text for text in yes if not accepts(grammar, text)] == []
    assert [text for text in no if accepts(grammar, text)] == []
    if "|\n" not in grammar and grammar.count("root |") == 0:
        recogniser = Recogniser(grammar)
        assert [recogniser.accepts(text) for text in (*yes, *no)] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ('root ::= [a-z]* "b"', ["b", "aab", "abb"]),
        ('root ::= "(" root ")" | [a-z]* "b"', ["((aab))"]),
        ('root ::= name ws ("IS" | "IS NOT") ws "NULL"\nname ::= [a-z]+\nws ::= " "*', ["a IS NULL", "a IS NOT NULL"]),
        ('root ::= x "AND" x | "ANx" | x\nx ::= [a-zA-Z_] [a-zA-Z_0-9]*', ["ANx", "ANy", "A"]),
        ("root ::= d* d\nd ::= [0-9]", ["1", "123"]),
        ('root ::= v op v\nop ::= "<" | "<="\nv ::= [a-z=]', ["a<b", "a<=b", "a<=="]),
        ('root ::= w (" " "AS " w)? (" " "WHERE " w)?\nw ::= [a-z]+', ["t", "t WHERE u", "t AS u WHERE v"]),
    ],
)
def test_a_terminal_takes_no_more_than_it_has_to(grammar: str, texts: Sequence[str]) -> None:
    assert [text for text in texts if not accepts(grammar, text)] == []


def test_where_a_rule_ends_with_a_repetition_that_takes_what_it_can() -> None:
    grammar = 'root ::= name ws "FROM"\nname ::= [a-zA-Z]+\nws ::= " "*'
    assert accepts(grammar, "a FROM")
    assert Recogniser(grammar).accepts("aFROM")
    assert not accepts(grammar, "aFROM")


def test_what_is_no_grammar_is_refused() -> None:
    with pytest.raises(HocketError) as refused:
        to_lark("root ::= x")
    assert refused.value.reason is Reason.BAD_GRAMMAR


def test_a_long_chain_of_rules_is_read() -> None:
    chain = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(900)) + 'r900 ::= "a"+'
    assert accepts(chain, "aaa")
    assert accepts(chain.replace('"a"+', '("a" | "b" r900)'), "ba")
    inside = chain.replace("root ::= r0", 'root ::= [a]* r0 "b"')
    assert accepts(inside, "aaab")


def test_texts_do_not_make_the_work_for_the_next_token_grow() -> None:
    grammar = 'root ::= "[" list "]"\nlist ::= item | item "," list\nitem ::= [a-z]+'
    copy = matcher(grammar).deep_copy()
    copy.consume_tokens(list(b"["))
    assert all(copy.consume_tokens(list(b"abc,")) for _ in range(3000))  # a row of the parser has 2,000 places
    assert not copy.is_error()
