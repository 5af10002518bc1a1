"""Grammars in GBNF: what is one. What becomes of one is told by `tests/unit/expert_worker/engine/test_lark.py`."""

from __future__ import annotations

import pytest

from hocket.errors import HocketError, Reason
from hocket.packages.expert.gbnf import Class, Reference, Repeat, Series, Text, read
from hocket.text_limits import CONSTRAINT_BYTES_MAX


def test_a_grammar_is_read_without_what_no_text_comes_to() -> None:
    assert read('root ::= "a" x* | y\nx ::= [b-d]\ny ::= "e" y\nz ::= "f"') == {
        "root": Series((Text("a"), Repeat(Reference("x"), 0, None))),
        "x": Class(((ord("b"), ord("d")),)),
    }


@pytest.mark.parametrize(
    ("broken", "why", "sound"),
    [
        ("", "no rule 'root'", 'root ::= "a"'),
        ('x ::= "a"', "no rule 'root'", 'root ::= x\nx ::= "a"'),
        ("root ::= x", "no rule 'x'", 'root ::= x\nx ::= "a"'),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule 'root' is there twice", 'root ::= "a"\nroots ::= "b"'),
        ('root : "a"', "line 1: expected ::=", 'root ::= "a"'),
        ('root ::= ("a"', "expected )", 'root ::= ("a")'),
        ('root ::= "a")', "line 1: expected the name of a rule", 'root ::= ("a")'),
        ('root ::= "a', "does not end", 'root ::= "a"'),
        ('root ::= "a\n"', "does not end", 'root ::= "a\\n"'),
        ("root ::= [a", "does not end", "root ::= [a]"),
        ("root ::= [z-a]", "a range ends before it begins", "root ::= [a-z]"),
        ('root ::= "\\q"', "an escape that is none of", 'root ::= "\\\\q"'),
        ('root ::= "\\x4"', "an escape that is none of", 'root ::= "\\x41"'),
        ('root ::= "\\U00110000"', "an escape that is none of", 'root ::= "\\U0010ffff"'),
        ('root ::= "\\ud800"', "half of a surrogate pair", 'root ::= "\\ud7ff"'),
        ('root ::= "a"**', "two repetitions of the same", 'root ::= ("a"*)*'),
        ('root ::= "a"{2,1}', "a repetition is", 'root ::= "a"{1,2}'),
        ('root ::= "a"{2001}', "a repetition is", 'root ::= "a"{2000}'),
        ('root ::= "a"{1', "expected }", 'root ::= "a"{1}'),
        ('root ::= "a"{}', "expected a number", 'root ::= "a"{0}'),
        ("root ::= *", "unexpected character", "root ::= .*"),
        ("root ::= <think>", "unexpected character", 'root ::= "<think>"'),
        ("root ::= root", "no text could ever satisfy it", 'root ::= root | "a"'),
        ('root ::= "a" root', "no text could ever satisfy it", 'root ::= "a" root | ""'),
        ("root ::= [^\\x00-\\U0010ffff]", "no text could ever satisfy it", "root ::= [^\\x01-\\U0010ffff]"),
        ("root ::= " + "(" * 33 + '"a"' + ")" * 33, "more than 32 groups", "root ::= " + "(" * 32 + '"a"' + ")" * 32),
        (
            "root ::= r0\n" + "".join(f'r{i} ::= "a"\n' for i in range(1000)),
            "more than 1000 rules",
            "root ::= r0\n" + "".join(f'r{i} ::= "a"\n' for i in range(999)),
        ),
        (
            'root ::= "a"+ | ' + " | ".join(['root "a"', "(root | root)", '"b"'] * 167),
            "more than 500 alternatives with rules in them",
            'root ::= "a"+ | ' + " | ".join(['root "a"', "(root | root)", '"b"'] * 125),
        ),
        (
            'root ::= "' + "a" * (CONSTRAINT_BYTES_MAX - 10) + '"',
            "larger than 65536 bytes",
            'root ::= "' + "a" * (CONSTRAINT_BYTES_MAX - 11) + '"',
        ),
    ],
)
def test_what_is_no_grammar_is_refused(broken: str, why: str, sound: str) -> None:
    with pytest.raises(HocketError) as refused:
        read(broken)
    assert refused.value.reason is Reason.BAD_GRAMMAR
    assert why in refused.value.message
    read(sound)
