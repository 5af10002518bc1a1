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
_IES_CHARS_MIN: Final = 6
"""Shorter words on -ies are ties and pies."""
_NO_PLURALS: Final = frozenset(
    ("news", "series", "species", "always", "perhaps", "physics", "mathematics", "economics", "lens", "postgres")
)
_PLURALS_OF_IE: Final = frozenset(
    ("movies", "cookies", "calories", "zombies", "selfies", "brownies", "hoodies", "rookies", "smoothies", "genies")
)
_PLURALS_OF_CHE: Final = frozenset(("caches", "aches", "headaches", "niches", "avalanches", "moustaches", "toothaches"))
_SINGULARS: Final = {
    "buses": "bus",
    "gases": "gas",
    "statuses": "status",
    "viruses": "virus",
    "bonuses": "bonus",
    "quizzes": "quiz",
    "indices": "index",
    "vertices": "vertex",
    "matrices": "matrix",
    "potatoes": "potato",
    "tomatoes": "tomato",
    "heroes": "hero",
    "echoes": "echo",
}
_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+[+#]*"
)
"""Letters and digits; `c++` and `c#` are words; of scripts without spaces every character is one."""

_GENERIC_FORMS: Final = (
    *("what is", "what are", "what was", "what were", "what does", "what do", "what s", "whats", "who is", "who are"),
    *("who was", "who were", "who s", "where is", "where are", "where was", "when is", "when are", "when was"),
    *("when did", "how to", "how do", "how does", "how did", "why", "explain", "define", "describe", "meaning of"),
    *("the meaning of", "definition of", "the definition of", "difference between", "the difference between"),
    *("history of", "the history of", "pros and cons of", "tell me about", "tell me more about", "can you explain"),
    *("could you explain", "tell me what", "tell me who", "tell me why", "tell me how", "can you tell me what"),
    *("can you tell me who", "can you tell me why", "can you tell me how", "can you tell me about"),
    *("could you tell me what", "could you tell me who", "could you tell me why", "could you tell me how"),
    *("could you tell me about", "do you know what", "do you know who", "do you know why", "do you know how"),
    *("i wonder what", "i wonder who", "i wonder why", "i wonder how", "i wonder if", "i wonder whether"),
    *("i am wondering what", "i m wondering what", "i want to learn", "i want to know", "i want to understand"),
    *("i would like to learn", "i would like to know", "i would like to understand", "i d like to learn"),
    *("i d like to know", "i d like to understand", "teach me", "help me understand", "give me an introduction to"),
)
GENERIC_FORMS: Final = frozenset(_GENERIC_FORMS)
"""Questions about a topic, which the base answers, begin so."""
_ABOUT_DATA: Final = frozenset(
    form for form in _GENERIC_FORMS if form.split()[0] in {"what", "whats", "who", "where", "when", "how"}
) | {"define", "describe"}
"""Of these, what also asks for something out of data that stands beside the question."""
_PROCEDURES: Final = frozenset({"how to", "how do"})
"""Of these, what also asks for something to be done: its words name more than a topic."""
_REST_WORDS_MIN: Final = 3
"""A text that a question speaks of has so many words."""
_OPENING_CHARS: Final = 512
"""Forms are looked for in so much of a text's beginning, and of its last sentence."""
_BETWEEN: Final = "[ \u2019']{1,3}"
_QUOTED: Final = "\"'`\u2018\u201c\u00ab"
_ARTEFACT: Final = (
    r"(?:query|statement|regex|regexp|pattern|expression|command|cypher|sql|json|word|phrase|translation|sentence)"
)
_LEAD: Final = re.compile(
    r"\W{0,64}(?:(?:please|(?:hi|hey|hello|hiya)(?:\s(?:there|all|everyone|folks|guys))?|so|ok|okay|and|but|also|well"
    r"|thanks|thank you|sorry|excuse me|good (?:day|morning|afternoon|evening)|by the way|btw|just curious"
    r"|just wondering|out of curiosity|(?:(?:a|one|another)\s)?(?:(?:quick|short|small|general|simple)\s)?question)\b"
    r"\W{1,64}){0,6}"
    r"(?:(?:in|on|for|with|about|at|as|when|if|since|regarding|speaking of)\s[^,.:;!?\n]{1,64},\s{0,9})?"
)
"""What may stand before a question: greetings, and where it belongs ("In a database, ...")."""
_THING: Final = re.compile(
    # 'What is 3 km in miles?', 'How do you say "dog" in French?' and 'What is the query for ...?' ask for a thing.
    rf"\s{{0,9}}[\d$\u20ac\u00a3{_QUOTED}]"
    r"|\s{1,9}(?:(?:you|i|we)\s)?(?:say|write|spell|express|translate|convert)\b"
    rf"|[^.!?\n]{{0,80}}\b{_ARTEFACT}\s"
    r"(?:for|that|to|which|matching|returns?|gives?|finds?|lists?|shows?|counts?|gets?)\b"
    r"|[^.!?\n]{0,120}\bmeans?\sin\s\w"
)
"""What follows the first words of a question that asks for something to be done."""
_FORM: Final = re.compile(
    rf"({'|'.join(form.replace(' ', _BETWEEN) for form in sorted(_GENERIC_FORMS, key=len, reverse=True))})\b"
)
_QUESTION: Final = re.compile(
    r"(who|whose|whom|which|when|where|what|how(?!\s(?:many|much))|does|did|is|are|was|were|has|should|am|shall"
    r"|(?:do|have)\s(?:you|i|we|they|people|all|any|most|some)|(?:can|could|would|will)(?!\syou\b))\b"
)
"""Any other question may still be one for data beside it; where there is none, it most often is about the world."""
_TALK: Final = re.compile(
    r"((?:(?:can|could|would|will)\syou\s)?(?:please\s)?"
    r"(?:write|tell|compose|make up|sing|give|create|draft|recommend|suggest))"
    r"\s(?:me\s|us\s)?(?:a|an|some|another|any)\s(?:(?!of|for|with|from|to|in|about|that)\w{1,32}\s){0,3}"
    r"(?:stor(?:y|ies)|poems?|songs?|jokes?|haikus?|limericks?|essays?|riddles?|raps?|tales?|speech|recipes?|advice|tips?"
    r"|letters?|emails?|names? for|ideas?|books?|films?|movies?)\b"
    r"|((?:(?:can|could|would|will)\syou\s)?(?:please\s)?(?:give|tell|show|list|name))\s(?:me\s|us\s)?"
    r"(?:(?:a|an|the|some|all)\s)?(?:(?!of|for|with|from|to|in|about|that)\w{1,32}\s){0,2}"
    r"(?:histor(?:y|ies)|(?:dis)?advantages?|benefits?|drawbacks?|differences?|overview|introduction|origins?)"
    r"\s(?:of|between|to|from)\b|(compare)\b"
)
"""Requests for a text of the writer's own, or for knowledge, which are about something."""
_TASK: Final = re.compile(
    r"(?:(?:can|could|would|will)\syou\s|please\s|(?:i\s(?:want|need)|i(?:\sw|['\u2019])(?:oul)?d\slike)\s(?:you\s)?to\s){0,3}"
    r"(?:translate|convert|extract|classify|categori[sz]e|write|give|create|generate|make|list|show|find|select|count"
    r"|return|get|parse|turn|rewrite|label|tag|sort|summari[sz]e|calculate|compute|match|fill|format|express|put|say"
    r"|read|rate|judge|decide|answer|use|analy[sz]e|identify|determine|define|describe)\b"
)
_SPEC: Final = re.compile(
    r"(?:define|describe)\s(?:(?:a|an|the|all)\s)?(?:\w{1,32}\s){0,3}"
    r"(?:tables?|schemas?|columns?|quer(?:y|ies)|regex|patterns?|graphs?|nodes?)\b"
)
"""`DESCRIBE the columns of ...` is no question."""
_SENTENCE_END: Final = re.compile(r"[.!?\n](?=[\s\"'\u2018\u201c\u00ab]|\Z)")
_POINTER: Final = re.compile(
    r"\b(?:this|these|that|following|below|above|(?:the|it)\s(?:text|sentence|review|message|note|article|passage))\b"
)
_PAYLOAD: Final = re.compile(
    rf":\s{{0,9}}[{_QUOTED}]?\w{{1,64}}\W{{1,9}}\w|(?<!\w)[{_QUOTED}]\w{{1,64}}[\w\s,.!?']{{0,400}}[\"'`\u2019\u201d\u00bb]"
)
"""Text that a question is about, in the same sentence: after a colon, or quoted."""

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
_DIMENSIONS: Final = (
    r"km|cm|mm|m|(?:kilo|centi|milli|deci)?met(?:er|re)s?|miles?|feet|foot|ft|inch(?:es)?|yards?",
    r"kg|mg|g|lbs?|oz|(?:kilo|milli)?gram(?:me)?s?|kilos?|pounds?|ounces?|tons?|tonnes?",
    r"l|ml|cl|(?:centi|milli|deci)?lit(?:er|re)s?|gallons?|pints?|cups?",
    r"ms|milliseconds?|seconds?|secs?|s|minutes?|mins?|hours?|hrs?|h|days?|weeks?|months?|years?",
    r"eur|usd|gbp|euros?|dollars?|cents?|pounds?|pence",
    r"\u00b0\s?[cf]|celsius|fahrenheit|kelvin",
    r"kph|mph|km/h",
)
"""Units that are converted into each other."""
_UNITS: Final = (
    r"km|cm|mm|kg|mg|ml|lbs?|oz|kph|mph|km/h|miles?|feet|foot|ft|inch(?:es)?|yards?|(?:kilo|centi|milli|deci)?met(?:er|re)s?"
    r"|(?:kilo|milli)?gram(?:me)?s?|kilos?|pounds?|ounces?|(?:centi|milli|deci)?lit(?:er|re)s?|gallons?|pints?"
    r"|\u00b0\s?[cf]|celsius|fahrenheit|kelvin|eur|usd|gbp|euros?|dollars?|cents?"
)
_MONEY: Final = r"(?:[$\u20ac\u00a3]\s?\d|\d\s?(?:\u20ac|eur|usd|gbp|euros?|dollars?|cents?|pounds?)\b)"
_SOME: Final = r"(?:\d|\b(?:an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|half an?)\s)"
_NUMBER_WORD: Final = (
    r"(?:\d{1,3}|an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty)"
)
_DAY: Final = (
    r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|may\s\d|\d\smay|june|july|august|september"
    r"|october|november|december|date|today|tomorrow|yesterday)"
)


def _conversions() -> str:
    """An expression for a quantity and another unit of the same kind that it is wanted in, in either order."""
    ways = []
    for unit in _DIMENSIONS:
        some = rf"{_SOME}\s?(?:{unit})\b"
        ways.append(
            rf"{some}[^\n]{{0,40}}?\s(?:in|into|to|as|is|are|makes?|equals?|many|much)\s(?:[a-z]{{1,16}}\s)?(?:{unit})\b"
        )
        ways.append(rf"\b(?:how\s(?:many|much)|number\sof|amount\sof|in)\s(?:{unit})\b[^\n]{{0,60}}?{some}")
    return f"(?i:{'|'.join(ways)})"


_TYPES: Final = r"int|integer|bigint|text|varchar|char|real|float|numeric|decimal|boolean|date|timestamp|serial"

STRONG: Final = 2.0
"""Strength of syntax that nobody writes by accident."""
WEAK: Final = 0.5
"""Strength of what is in many texts: alone it makes no `router_hint` true."""
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
        ("(", "table", "column"),
        re.compile(
            rf"(?i:\b\w{{1,64}}\s?\(\s{{0,9}}\w{{1,64}}\s{{1,9}}(?:{_TYPES})\b)"
            r"|(?i:\b(?:tables?|schema)[\s:]{1,9}[\"`]?\w{1,64}[\"`]?\s?\(\s{0,9}\w{1,64}\s{0,9}(?:,[^()]{0,400})?\))"
            r"|(?i:\b\w{1,64}(?:\stable)?\s?\(\s{0,9}(?:id|\w{1,64}_id)\s{0,9},)"
            r"|(?i:\btables?\s(?:called|named)\s(?!after)\w)"
            r"|(?i:\btables?\s{1,9}[\"`]?\w{1,64}[\"`]?\s?:\s{0,9}\w{1,64}\s?,)"
            r"|(?i:\bcolumns?\s?(?::|are|called|named)?\s{0,9}\w{1,64}\s?,\s?\w{1,64}(?:\s?,|\s(?:and|or)\s))"
        ),
        _SQL,
        STRONG,
    ),
    Pattern(
        "graph pattern",
        ("match", "merge", ")", "->", "<-"),
        re.compile(
            r"\b(?:MATCH|MERGE)\s{0,9}\(\s{0,9}(?:[a-z]\w{0,31}\s{0,9})?[:)]|\bMATCH\s(?:all|every|any)\b"
            r"|\)\s{0,9}<?-\s?\[[^\[\]]{0,200}\]\s?-|\)\s?(?:-->|<--)\s?\(|-\s?\[?:?[A-Z][A-Z_]{1,31}\]?\s?->"
        ),
        _CYPHER,
        STRONG,
    ),
    Pattern(
        "JSON",
        ('"',),
        re.compile(r"[{,]\s{0,64}\"[^\"\n]{1,128}\"\s{0,9}:|\[\s{0,9}\{\s{0,9}\""),
        _tags("format:json", "language:json", "task:json", "task:json_generation", "task:json_correction"),
        STRONG,
    ),
    Pattern(
        "fields asked for",
        ("extract", "pull", "return", "give", "get", "find", "read", "list", "note"),
        re.compile(
            r"(?i:\b(?:extract|pull out)\b[^.!?\n]{1,80}(?::\s|\b(?:from|in|of)\s"
            r"(?:this|these|the following|the text|the sentence)\b)"
            r"|\b(?:extract|pull out|return|give|get|find|read|list|note)\s(?:(?:me|the|its|their|only)\s){0,2}\w{1,32}"
            r"(?:,\s?\w{1,32}){0,6},?\sand\s\w{1,32}(?::\s|\s(?:from|in|of|out of|for)\s"
            r"(?:this|these|the following|the text)\b))"
        ),
        _tags("task:extraction", "task:data_extraction", "task:parsing"),
        1.0,
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
        re.compile(r"\\[dwsb][+*{]|\[\^?(?:a-z|A-Z|0-9)|\[[^\[\]\n]{0,32}\w-\w[^\[\]\n]{0,32}\][+*{]|\(\?[:=!<]"),
        _REGEX,
        STRONG,
    ),
    Pattern(
        "strings described",
        ("digit", "letter", "character", "vowel", "uppercase", "lowercase", "start", "begin", "end"),
        re.compile(
            rf"(?i:\b(?:{_NUMBER_WORD}|any|only|exactly|some|more)\s(?:(?:or\smore|capital|upper-?\s?case|lower-?\s?case|small|hex)\s){{0,2}}"
            r"(?:digits?|letters?|characters?|vowels?)\b[^.!?\n]{0,60}?\b(?:then|followed\sby|nothing\selse|starts?|ends?|begins?"
            r"|(?:and|by|or|dash|hyphen)\s(?:\w{1,16}\s){0,3}(?:digits?|letters?))\b"
            r"|\b(?:starts?|starting|begins?|beginning|ends?|ending)\s(?:with|in)\s(?:(?:an?|the|exactly|two|three)\s){0,2}"
            r"(?:[\"'`\u201c]|(?:digit|(?:capital\s|small\s)?letter|vowel|number)s?\b)"
            r"|\b(?:match(?:es)?|contains?|allows?|accepts?)\s(?:\w{1,16}\s){0,2}(?:digits?|letters?|characters?|vowels?)\b"
            r"|\b(?:strings?|lines?|words|codes?)\s(?:of|with|that\s(?:have|contain|are|consist\sof)|made\s(?:up\s)?of)\s(?:\w{1,16}\s){0,3}"
            r"(?:digits?|letters?|characters?|vowels?)\b)"
        ),
        _REGEX,
        STRONG,
    ),
    Pattern(
        "Python",
        ("def", "import", "traceback"),
        re.compile(
            r"(?m:^\s{0,64}(?:def\s{1,9}\w{1,64}\s?\(|from\s{1,9}[\w.]{1,64}\s{1,9}import\s|import\s{1,9}[\w.]{1,64}\s{0,9}$))"
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
        WEAK,
    ),
    Pattern(
        "conversion",
        ("in", "to", "as", "is", "are", "many", "much", "make", "equal", "of"),
        re.compile(_conversions()),
        _MEASURES,
        STRONG,
    ),
    Pattern(
        "sum of money",
        tuple("0123456789"),
        re.compile(
            rf"(?i:{_MONEY}[^\n]{{0,80}}?\b(?:each|apiece|altogether|in\stotal|in\sall|how\smuch)\b"
            rf"|\b(?:altogether|in\stotal|in\sall|change\sfrom|how\smuch)\b[^\n]{{0,80}}?{_MONEY})"
        ),
        _MEASURES,
        STRONG,
    ),
    Pattern(
        "date reckoned",
        ("day", "week", "month"),
        re.compile(
            rf"(?i:\b{_NUMBER_WORD}\s(?:days?|weeks?|months?)\s(?:after|before|from|later|earlier|past)\b[^\n]{{0,60}}?\b{_DAY}\b"
            rf"|\b{_DAY}\b[^\n]{{0,60}}?\b{_NUMBER_WORD}\s(?:days?|weeks?|months?)\s(?:after|before|from|later|earlier|past)\b"
            rf"|\b{_DAY}\b[^\n]{{0,60}}?\bin\s{_NUMBER_WORD}\s(?:days?|weeks?|months?)\b)"
        ),
        _MEASURES,
        STRONG,
    ),
    Pattern(
        "opinion asked for",
        ("good", "happy", "like", "love", "satisfied", "pleased", "recommend", "positive", "enjoy"),
        re.compile(
            r"(?i:\b(?:good\sor\sbad|happy\sor\s(?:not|sad|angry|unhappy|disappointed)|(?:love[ds]?|like[ds]?)\s(?:it\s)?or\s(?:hate[ds]?|dislike[ds]?|not)"
            r"|positive\sor\snegative|positive,\snegative"
            r"|(?:did|do|does|was|were|is|are|would)\s(?:they|he|she|(?:this|the)\s(?:customer|guest|user|buyer|reviewer|author|writer|client|person|critic|viewer|reader))"
            r"\s(?:(?:really|actually)\s)?(?:like|love|enjoy|hate|happy|pleased|satisfied|unhappy|recommend))\b)"
        ),
        _tags("task:sentiment", "task:sentiment_analysis", "domain:reviews", "domain:sentiment"),
        1.0,
    ),
    Pattern(
        "subject asked for",
        ("about", "section", "heading", "category", "topic", "subject", "into"),
        re.compile(
            r"(?i:\b(?:what|which)\s(?:is|are|was)\s(?:this|that|these|it|(?:this|the)\s(?!best|most)\w{1,32})\sabout\b"
            r"|\b(?:sort|file|put)\s(?:this|it|these|(?:this|the)\s\w{1,32})\s(?:in|into|under)\s(?:a|the|one|which)\b"
            r"|\bwhich\s(?:section|heading|category|topic|subject|department)\b)"
        ),
        _tags("task:classification"),
        1.0,
    ),
    Pattern(
        "labels to choose from",
        (" or ",),
        re.compile(r"(?i:\b[a-z]{3,16},\s[a-z]{3,16}(?:,\s[a-z]{3,16}){0,8},?\sor\s[a-z]{3,16}\s{0,3}[?:])"),
        _tags("task:classification"),
        1.0,
    ),
    Pattern(
        "Esperanto",
        (*"\u0109\u011d\u0125\u0135\u015d\u016d", "ojn", "la "),
        re.compile(
            r"[\u0109\u011d\u0125\u0135\u015d\u016d\u0108\u011c\u0124\u0134\u015c\u016c]|\b\w{2,32}ojn\b"
            r"|(?i:\bla\s(?:\w{2,32}a\s)?\w{2,32}oj?\s(?:ne\s)?\w{2,32}[aio]s\b)"
        ),
        _tags("language:esperanto", "language:eo"),
        STRONG,
    ),
)
WORD_GROUPS: Final = (
    WordGroup(
        "classification", ("classify", "categorize", "categorise", "classification"), _tags("task:classification")
    ),
    WordGroup("parsing", ("parse", "extract"), _tags("task:parsing", "task:extraction", "task:data_extraction")),
    WordGroup("generation", ("generate",), _tags("task:generation")),
    WordGroup("translation", ("translate", "translation", "convert"), _tags("task:translation")),
    WordGroup("conversion", ("convert", "conversion"), _tags("task:conversion", "task:unit_conversion")),
    WordGroup("validation", ("validate", "verify"), _tags("task:validation")),
    WordGroup("Neo4j", ("neo4j", "graph database", "cypher"), _tags("tech:neo4j", "database:neo4j")),
    WordGroup("PostgreSQL", ("postgres", "postgresql", "psql"), _tags("tech:postgres", "database:postgresql")),
    WordGroup("Rust", ("rust", "cargo", "rs"), _tags("tech:rust", "language:rust")),
    WordGroup("Python", ("python", "py"), _tags("tech:python", "language:python")),
)
_FENCE: Final = re.compile(r"(?m:^\s{0,9}```\s?([A-Za-z][\w+#-]{0,31})\s{0,9}$)")
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
        generic_form: The question that it, or its last sentence, begins with; empty for none, and for a question about
            data beside it.
        is_open: Whether that is a question as any, and none that names a topic as "what is" does.
        numbers: What hints may compare with numbers: `length` in characters, `words`.
    """

    words: Sequence[str]
    patterns: Sequence[Pattern]
    fenced: frozenset[str]
    generic_form: str
    is_open: bool
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
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    lower = plain.lower()
    patterns = [pattern for pattern in PATTERNS if pattern.is_in(plain, lower)]
    has_data = any(pattern.strength >= STRONG for pattern in patterns)
    form, is_open = _form(normalised, has_data=has_data)
    fenced = {name.lower() for name in _FENCE.findall(text)} if "```" in text else set()
    fenced |= {_FENCE_NAMES[name] for name in fenced & _FENCE_NAMES.keys()}
    seen = _words(normalised)
    return Features(
        words=seen,
        patterns=patterns,
        fenced=frozenset(fenced),
        generic_form=form,
        is_open=is_open,
        numbers={"length": float(len(text)), "words": float(len(seen))},
    )


def _form(normalised: str, *, has_data: bool) -> tuple[str, bool]:
    """The question that a text begins with, or ends with, and whether it is a question as any; empty for none.

    Args:
        normalised: The text.
        has_data: Whether there is syntax in it that a question may be about.
    """
    opening = normalised[:_OPENING_CHARS]
    at = _end_of_lead(opening)
    if _SPEC.match(opening, at):
        return "", False
    if found := _TALK.match(opening, at):
        return _spelled(found), False
    found = _FORM.match(opening, at)
    is_open = found is None
    if found := found or _QUESTION.match(opening, at):
        form = _spelled(found)
        is_task = _THING.match(opening, found.end()) is not None
        if is_open:
            is_task = is_task or has_data or _points(opening, at) or _has_payload(opening, at)
        elif form in _ABOUT_DATA:
            is_task = is_task or has_data or _points(opening, at)
        return ("", False) if is_task else (form, is_open)
    if _TASK.match(opening, at) or _has_payload(opening, at):
        return "", False
    end = len(normalised.rstrip(" .!?\n\r\t"))
    begin = max(normalised.rfind(mark, 0, end) for mark in ".!?\n") + 1
    closing = normalised[begin : begin + _OPENING_CHARS]
    found = _FORM.match(closing, _end_of_lead(closing)) if begin else None
    if found is None or _THING.match(closing, found.end()):
        return "", False
    form = _spelled(found)
    return ("", False) if has_data and form in _ABOUT_DATA else (form, False)


def _end_of_lead(text: str) -> int:
    found = _LEAD.match(text)
    return found.end() if found else 0


def _spelled(found: re.Match[str]) -> str:
    return " ".join(_WORD.findall(found.group(found.lastindex or 0)))


def _first_sentence(text: str, at: int) -> tuple[str, str]:
    """The sentence that begins at a place, and what follows it."""
    found = _SENTENCE_END.search(text, at)
    end = found.end() if found else len(text)
    return text[at:end], text[end:]


def _points(text: str, at: int) -> bool:
    """Whether the sentence at a place speaks of a text that follows it: "Which topic is this?", and then some."""
    sentence, rest = _first_sentence(text, at)
    return bool(_POINTER.search(sentence)) and (
        bool(_PAYLOAD.search(sentence)) or len(_WORD.findall(rest)) >= _REST_WORDS_MIN
    )


def _has_payload(text: str, at: int) -> bool:
    sentence, rest = _first_sentence(text, at)
    return bool(_PAYLOAD.search(sentence)) or rest[1:].lstrip()[:1] in {*_QUOTED}


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
    """The singular of what looks like an English plural."""
    if len(word) < _PLURAL_CHARS_MIN or word[-1] != "s" or word[-2] in "sui" or word in _NO_PLURALS:
        return word
    if word in _SINGULARS:
        return _SINGULARS[word]
    if word.endswith("ies"):
        return word[:-1] if len(word) < _IES_CHARS_MIN or word in _PLURALS_OF_IE else f"{word[:-3]}y"
    if word.endswith(("xes", "ches", "shes", "sses", "zzes")) and word not in _PLURALS_OF_CHE:
        return word[:-2]
    return word[:-1]
