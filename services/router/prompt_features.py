"""What the rules gate sees of a text: its words, the form it begins with, and the syntax in it.

Everything here is ours: no expression out of a package is ever compiled, and each of ours takes a bounded number of
steps per character, since the text is anybody's.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.v1.text_pb2 import TextInput

PART_BYTES_MAX: Final = 4096
"""Of a longer text only so much of its beginning and of its end is looked at."""
_PLURAL_CHARS_MIN: Final = 4
_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+[+#]*"
)
"""Letters and digits; `c++` and `c#` are words; of scripts without spaces every character is one."""

_GENERIC_FORMS: Final = (
    *("what is", "what are", "what was", "what were", "what does", "what do", "what s", "who is", "who are", "who was"),
    *("who were", "who s", "where is", "where are", "where was", "when is", "when are", "when was", "when did"),
    *("how to", "how do", "how does", "how did", "why", "explain", "meaning of", "the meaning of", "definition of"),
    *("the definition of", "define", "describe", "tell me about", "can you explain", "could you explain"),
    *("tell me what", "tell me who", "tell me why"),
)
GENERIC_FORMS: Final = frozenset(_GENERIC_FORMS)
"""Questions about a topic, which the base answers, begin so."""
_ABOUT_DATA: Final = frozenset(
    form for form in _GENERIC_FORMS if form.split()[0] in {"what", "who", "where", "when", "how"}
) - {"what does", "what do", "how does", "how did"}
"""Of these, what also asks for something out of data that stands beside the question."""
_PROCEDURES: Final = frozenset({"how to", "how do"})
"""Of these, what also asks for something to be done: its words name more than a topic."""
_BETWEEN: Final = "[ \u2019']+"
_QUOTED: Final = "\"'`\u2018\u201c\u00ab"
_GENERIC: Final = re.compile(
    r"(?:\A|[.!?\n])\W*(?:(?:please|hi|hey|hello|so|ok|okay|and|but|also|well)\b\W*){0,3}"
    rf"({'|'.join(form.replace(' ', _BETWEEN) for form in sorted(_GENERIC_FORMS, key=len, reverse=True))})\b"
    # 'What is 3 km in miles?', 'How do you say "dog" in French?' and 'What is the query for ...?' ask for a thing.
    rf"(?!\s*[\d$\u20ac\u00a3{_QUOTED}])(?!\s+(?:(?:you|i|we)\s+)?(?:say|write|spell|express|translate|convert)\b)"
    r"(?!\s+(?:the|a|an)\s+(?:\w{1,32}\s+){0,3}(?:query|statement|regex|pattern|expression|command|word|phrase|translation)"
    r"\s+(?:for|that|to|of|which|matching)\b)"
)

Tag = tuple[str, str]
"""Namespace and value of a capability, such as `("query", "sql")`."""


def _tags(*texts: str) -> frozenset[Tag]:
    return frozenset((namespace, value) for namespace, _, value in (text.partition(":") for text in texts))


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Syntax that speaks for experts with certain capabilities.

    Attributes:
        name: What people call it.
        hints: Where none of these is in the lower-case text, the expression finds nothing.
        expression: What finds it.
        tags: The capabilities.
        strength: What it adds to a score, where a keyword that one expert has adds 1.
    """

    name: str
    hints: tuple[str, ...]
    expression: re.Pattern[str]
    tags: frozenset[Tag]
    strength: float

    def is_in(self, text: str, lower: str) -> bool:
        """Whether it is in a text, given as it is and in lower case."""
        return any(map(lower.__contains__, self.hints)) and self.expression.search(text) is not None


@dataclass(frozen=True, slots=True, eq=False)
class WordGroup:
    """Words that speak for experts with certain capabilities.

    Attributes:
        name: What people call it.
        phrases: Any of them will do.
        tags: The capabilities.
    """

    name: str
    phrases: tuple[str, ...]
    tags: frozenset[Tag]


_SQL: Final = _tags(
    *("language:sql", "query:sql", "database:sql", "format:sql", "tech:sql", "task:sql", "task:text2sql"),
    *("task:sql_generation", "task:text-to-sql", "domain:sql"),
)
_CYPHER: Final = _tags(
    *("language:cypher", "query:cypher", "database:neo4j", "database:graph", "format:cypher", "tech:neo4j"),
    *("tech:cypher", "task:text2cypher", "task:cypher", "task:text-to-cypher", "domain:graph"),
)
_MEASURES: Final = _tags(
    *("task:conversion", "task:unit_conversion", "task:convert", "task:calculation", "task:arithmetic"),
    *("domain:units", "domain:measures", "domain:measurement", "domain:money", "domain:currency"),
)
_REGEX: Final = _tags("language:regex", "format:regex", "query:regex", "tech:regex", "task:regex", "domain:regex")
_UNITS: Final = (
    r"km|cm|mm|kg|mg|lbs?|oz|kph|mph|miles?|feet|foot|ft|inch(?:es)?|yards?|met(?:re|er)s?|(?:kilo|centi|milli)\w{4,8}"
    r"|grams?|pounds?|ounces?|lit(?:re|er)s?|gallons?|\u00b0\s?[cf]|celsius|fahrenheit|kelvin|eur|usd|gbp|euros?|dollars?|cents?"
)
_TYPES: Final = r"int|integer|bigint|text|varchar|char|real|float|numeric|decimal|boolean|date|timestamp|serial"

STRONG: Final = 2.0
"""Strength of syntax that nobody writes by accident."""
PATTERNS: Final = (
    Pattern(
        "SQL statement",
        ("select", "insert", "delete", "create", "alter", "update"),
        re.compile(
            r"\bSELECT\b[^;]{1,200}?\bFROM\b"
            r"|(?i:\bselect\s{1,9}(?:distinct\s{1,9})?(?:\*|count\s?\(|\w{1,64}(?:\.\w{1,64})?\s?,)[^;]{1,200}?\bfrom\b)"
            r"|(?i:\b(?:insert\s{1,9}into|delete\s{1,9}from|create\s{1,9}(?:temp\s{1,9})?table|alter\s{1,9}table)\s)"
            r"|\bUPDATE\s{1,9}\w{1,64}\s{1,9}SET\b"
        ),
        _SQL,
        STRONG,
    ),
    Pattern(
        "table schema",
        ("(",),
        re.compile(
            r"(?i:\b(?:tables?|schema)\b[^()\n]{0,48}\(\s{0,9}\w{1,64}[^()]{0,400}\))"
            rf"|(?i:\b\w{{1,64}}\s?\(\s{{0,9}}\w{{1,64}}\s{{1,9}}(?:{_TYPES})\b)"
        ),
        _SQL,
        STRONG,
    ),
    Pattern(
        "graph pattern",
        ("(",),
        re.compile(
            r"\b(?:MATCH|MERGE)\s{0,9}\(|\(\s{0,9}\w{0,64}\s{0,9}:\s{0,9}[A-Z]\w{0,64}[^()]{0,200}\)"
            r"|\)\s{0,9}<?-\[[^\[\]]{0,200}\]->?"
        ),
        _CYPHER,
        STRONG,
    ),
    Pattern(
        "JSON",
        ('"', "{"),
        re.compile(r"[{,]\s{0,64}\"[^\"\n]{1,128}\"\s{0,9}:|\{\s{0,9}\}|\[\s{0,9}\{"),
        _tags("format:json", "language:json", "task:json", "task:json_generation", "task:json_correction"),
        STRONG,
    ),
    Pattern(
        "markup",
        ("</",),
        re.compile(r"</[A-Za-z][\w:-]{0,64}>"),
        _tags("format:xml", "format:html", "language:xml", "language:html"),
        STRONG,
    ),
    Pattern(
        "regular expression",
        ("\\", "[", "(?"),
        re.compile(r"\\[dwsb][+*{]|\[\^?[a-zA-Z0-9]-[a-zA-Z0-9]|\(\?[:=!<]"),
        _REGEX,
        STRONG,
    ),
    Pattern(
        "Python",
        ("def", "import", "traceback"),
        re.compile(
            r"(?m:^\s{0,64}(?:def\s{1,9}\w{1,64}\s?\(|from\s{1,9}[\w.]{1,64}\s{1,9}import\s|import\s{1,9}[\w.]{1,64}\s*$))"
            r"|Traceback \(most recent call last\)"
        ),
        _tags("language:python", "tech:python"),
        STRONG,
    ),
    Pattern(
        "Rust",
        ("fn ", "let ", "error["),
        re.compile(r"\bfn \w{1,64}\s?[(<]|\blet mut\s|\berror\[E\d{4}\]"),
        _tags("language:rust", "tech:rust"),
        STRONG,
    ),
    Pattern(
        "TypeScript",
        ("interface", "string", "number", "boolean", "ts"),
        re.compile(r"\binterface\s{1,9}\w{1,64}\s?\{|:\s?(?:string|number|boolean)\s?[;,)=]|\bTS\d{4}\b"),
        _tags("language:typescript", "tech:typescript"),
        STRONG,
    ),
    Pattern(
        "shell",
        ("$", "-"),
        re.compile(r"(?m:^\s{0,9}\$\s\w)|\b(?:grep|awk|sed|chmod|tar|find|curl)\s{1,9}-{1,2}\w"),
        _tags("language:shell", "language:bash", "tech:shell", "tech:bash"),
        STRONG,
    ),
    Pattern(
        "quantity",
        tuple("0123456789"),
        re.compile(rf"(?i:\d\s?(?:{_UNITS})\b|\b\d{{1,9}}(?:\.\d{{1,9}})?\s?m\b)|[$\u20ac\u00a3]\s?\d"),
        _MEASURES,
        1.0,
    ),
)
WORD_GROUPS: Final = (
    WordGroup("classification", ("classify", "categorize", "categorise", "label"), _tags("task:classification")),
    WordGroup(
        "parsing", ("parse", "extract", "read"), _tags("task:parsing", "task:extraction", "task:data_extraction")
    ),
    WordGroup("generation", ("generate", "create", "write"), _tags("task:generation")),
    WordGroup("translation", ("translate", "translation", "convert"), _tags("task:translation")),
    WordGroup("conversion", ("convert", "conversion"), _tags("task:conversion", "task:unit_conversion")),
    WordGroup("validation", ("validate", "check", "verify"), _tags("task:validation")),
    WordGroup("Neo4j", ("neo4j", "graph database", "cypher"), _tags("tech:neo4j", "database:neo4j")),
    WordGroup("PostgreSQL", ("postgres", "postgresql", "psql"), _tags("tech:postgres", "database:postgresql")),
    WordGroup("Rust", ("rust", "cargo", "rs"), _tags("tech:rust", "language:rust")),
    WordGroup("Python", ("python", "py"), _tags("tech:python", "language:python")),
)
_FENCE: Final = re.compile(r"(?m:^\s{0,9}```\s?([A-Za-z][\w+#-]{0,31})\s*$)")
_FENCE_NAMES: Final = {
    "js": "javascript",
    "ts": "typescript",
    "py": "python",
    "rs": "rust",
    "yml": "yaml",
    "sh": "bash",
}
_FENCE_NAMESPACES: Final = ("language", "format", "query", "tech", "database")


@dataclass(frozen=True, slots=True)
class Features:
    """What the gate sees of one text.

    Attributes:
        words: Its words as `words` gives them.
        patterns: The syntax in it.
        fenced: What its fenced code says it is, lower-case.
        generic_form: The question about a topic that it or a sentence of it begins with; empty for none, and for a
            question about data beside it.
        numbers: What hints may compare with numbers: `length` in characters, `words`.
    """

    words: Sequence[str]
    patterns: Sequence[Pattern]
    fenced: frozenset[str]
    generic_form: str
    numbers: Mapping[str, float]

    @property
    def is_definition(self) -> bool:
        """Whether it asks what something is, rather than how to do it: then its words name the topic."""
        return bool(self.generic_form) and self.generic_form not in _PROCEDURES


def gate_text(given: TextInput) -> str:
    """The part of a request's text that decides who answers: what the user said last, without system and answers.

    Of a text above two times `PART_BYTES_MAX` bytes of UTF-8 its beginning and its end.
    """
    match given.WhichOneof("content"):
        case "conversation":
            said = (turn.content for turn in reversed(given.conversation.messages) if turn.role == "user")
            text = next(said, "")
        case "raw":
            text = given.raw
        case _:
            text = given.prompt
    data = text.encode()
    if len(data) <= 2 * PART_BYTES_MAX:
        return text
    return "\n".join(part.decode(errors="ignore") for part in (data[:PART_BYTES_MAX], data[-PART_BYTES_MAX:]))


def features(text: str) -> Features:
    """Look at a text that `gate_text` gave."""
    normalised = normalise(text)
    found = _GENERIC.search(normalised)
    form = " ".join(_WORD.findall(found.group(1))) if found else ""
    lower = text.lower()
    patterns = [pattern for pattern in PATTERNS if pattern.is_in(text, lower)]
    if form in _ABOUT_DATA and any(pattern.strength >= STRONG for pattern in patterns):
        form = ""
    fenced = {name.lower() for name in _FENCE.findall(text)} if "```" in text else set()
    fenced |= {_FENCE_NAMES[name] for name in fenced & _FENCE_NAMES.keys()}
    seen = _words(normalised)
    return Features(
        words=seen,
        patterns=patterns,
        fenced=frozenset(fenced),
        generic_form=form,
        numbers={"length": float(len(text)), "words": float(len(seen))},
    )


def fence_tags(name: str) -> frozenset[Tag]:
    """The capabilities that code fenced under this name speaks for."""
    return frozenset((namespace, name) for namespace in _FENCE_NAMESPACES)


def normalise(text: str) -> str:
    """A text as it is compared: NFKC, case folded."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """The words of a text, normalised; the English plural counts as the singular: `Nodes` is `node`, as is `node`."""
    return _words(normalise(text))


def _words(normalised: str) -> list[str]:
    return [_singular(word) for word in _WORD.findall(normalised)]


def _singular(word: str) -> str:
    if len(word) < _PLURAL_CHARS_MIN or word[-1] != "s" or word[-2] in "sui":
        return word
    return f"{word[:-3]}y" if word.endswith("ies") else word[:-1]
