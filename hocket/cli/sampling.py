"""The options of commands that ask for text: which experts with which weights, which base, how tokens are chosen."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import typer

from hocket.cli import files, output
from hocket.client import Constraint, Routing
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.text_limits import CONSTRAINT_BYTES_MAX, EXPERTS_MAX, PRIORITY_MAX, WEIGHT_MAX, is_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

WeightedExpert: TypeAlias = tuple[str, float] | str
"""What names an expert, with its weight; alone where the server decides, which means 1."""

BASE_ALONE: Final = Routing("base")
"""How it is said that the base shall answer."""

_STDIN: Final = Path("-")
_FORM: Final = "write --experts sql:0.7,json:0.3"

_CHOICE: Final = "Experts and base"
_CONSTRAINT: Final = "What the answer must be"
_SAMPLING: Final = "How tokens are chosen"
_PLACE: Final = "Who is asked"

Experts = Annotated[
    str,
    typer.Option(
        metavar="NAME[:WEIGHT],...",
        help="Adapter experts to compose, each by name, publisher/name@version or digest; weight 1 if none is given.",
        show_default="the router chooses",
        rich_help_panel=_CHOICE,
    ),
]
Base = Annotated[
    str,
    typer.Option(
        metavar="NAME|DIGEST",
        help="The base model.",
        show_default="the one that the experts ride on",
        rich_help_panel=_CHOICE,
    ),
]
Policy = Annotated[
    Literal["rules", "hivellm", "base"] | None,
    typer.Option(help="What chooses where no experts are named.", show_default="rules", rich_help_panel=_CHOICE),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPERT",
        help="Have these alone chosen among; may be repeated.",
        show_default=False,
        rich_help_panel=_CHOICE,
    ),
]
Deny = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPERT", help="Do not have these chosen; may be repeated.", show_default=False, rich_help_panel=_CHOICE
    ),
]
MaxExperts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=EXPERTS_MAX,
        help="Have up to so many composed where the router is undecided.",
        show_default="1",
        rich_help_panel=_CHOICE,
    ),
]
BaseOnly = Annotated[
    bool, typer.Option("--base-only", help="Ask the base alone: short for --policy base.", rich_help_panel=_CHOICE)
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What the system says first.", show_default=False, rich_help_panel=_CHOICE),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON that satisfies the JSON schema in this file; - for standard input.",
        show_default=False,
        rich_help_panel=_CONSTRAINT,
    ),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A text of the grammar in this file, in GBNF; - for standard input.",
        show_default="the heaviest expert's, if it uses one",
        rich_help_panel=_CONSTRAINT,
    ),
]
NoGrammar = Annotated[
    bool,
    typer.Option("--no-grammar", help="Any text, also where an expert has a grammar.", rich_help_panel=_CONSTRAINT),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="0 takes the most probable token.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Most probable tokens that count.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of probability that counts.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Least share of the best token's probability.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="Above 1: tokens of prompt and answer less.", rich_help_panel=_SAMPLING),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(min=-100, max=100, help="Tokens of the answer less.", rich_help_panel=_SAMPLING),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(min=-100, max=100, help="The same, for each time one came.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="The same seed, the same answer.", rich_help_panel=_SAMPLING),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Most tokens of the answer.", rich_help_panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Text that ends the answer; may be repeated.", rich_help_panel=_SAMPLING),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=20,
        help="Most probable tokens to tell with each token; --debug and --json show them.",
        rich_help_panel=_SAMPLING,
    ),
]
Session = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What this is a turn of: the next turn begins with what is new in it.",
        show_default=False,
        rich_help_panel=_PLACE,
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=PRIORITY_MAX,
        help="How urgent it is among the texts of its tenant; 9 is the most urgent.",
        show_default="5",
        rich_help_panel=_PLACE,
    ),
]
Tenant = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Who asks: tenants share workers fairly.",
        show_default=False,
        rich_help_panel=_PLACE,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=1,
        help="Most time for an answer.",
        show_default="the router's own, ten minutes",
        rich_help_panel=_PLACE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="auto, cpu or cuda:0: compute there, in a suite of this command's own.",
        show_default="ask the router",
        rich_help_panel=_PLACE,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Data of a suite of this command's own.",
        show_default="with --device: ~/.local/share/hocket",
        rich_help_panel=_PLACE,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show plan, tokens, timings and speed, on standard error."),
]

_OPTIONS: Final[Mapping[str, Any]] = {
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "seed": Seed,
    "max_tokens": MaxTokens,
    "stop": Stop,
    "logprobs": Logprobs,
}
"""How tokens are chosen, by the names of the options."""
_FIELDS: Final = {"logprobs": "top_logprobs"}
"""What the contract calls them, where that is something else."""
_FLAGS: Final = {
    **{f"sampling.{_FIELDS.get(name, name)}": f"--{name.replace('_', '-')}" for name in _OPTIONS},
    "experts": "--experts",
    "base": "--base",
    "constraint.json_schema": "--json-schema",
    "constraint.gbnf": "--grammar",
    "session": "--session",
    "priority": "--priority",
    "tenant": "--tenant",
    "timeout_seconds": "--timeout",
    "routing.policy": "--policy",
    "routing.allow": "--allow",
    "routing.deny": "--deny",
    "routing.expert_count_max": "--max-experts",
}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each way to choose tokens, in the place of its argument `options`.

    Commands are what typer reads from their signatures; so this changes the signature.
    """

    @wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401 - whatever the options are
        options = {_FIELDS.get(name, name): values.pop(name) for name in _OPTIONS}
        command(options=options, **values)

    parameters: list[Parameter] = []
    for name, parameter in signature(command, eval_str=True).parameters.items():
        if name == "options":
            parameters += [
                Parameter(option, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                for option, annotation in _OPTIONS.items()
            ]
        else:
            parameters.append(parameter)
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what `inspect.signature` looks for
    return run


@contextmanager
def explained() -> Iterator[None]:
    """Say of a refusal that names a field of the request by which option that is."""
    try:
        yield
    except HocketError as error:
        raise in_options(error) from error


def read_routing(
    *,
    policy: Literal["rules", "hivellm", "base"] | None,
    allow: Sequence[str] | None,
    deny: Sequence[str] | None,
    max_experts: int | None,
    experts: Sequence[WeightedExpert] = (),
    base_only: bool = False,
) -> Routing | None:
    """How the experts of a text are chosen, as the options say; None where they say nothing, or name them.

    Raises:
        HocketError: `BAD_REQUEST` if two of these are given that contradict each other.
    """
    given = [
        flag
        for flag, is_given in (
            ("--experts", bool(experts)),
            ("--base-only", base_only),
            ("--policy", policy is not None),
            ("--allow", bool(allow)),
            ("--deny", bool(deny)),
            ("--max-experts", max_experts is not None),
        )
        if is_given
    ]
    if (experts or base_only) and len(given) > 1:
        raise HocketError(Reason.BAD_REQUEST, f"{given[0]} leaves nothing for {given[1]} to say: leave out one of them")
    if base_only:
        return BASE_ALONE
    if experts or not given:
        return None
    return Routing(policy or "rules", allow or (), deny or (), max_experts or 1)


def read_constraint(
    *, json_schema: Path | None, grammar: Path | None, no_grammar: bool, standard_input: str | None
) -> Constraint | None:
    """What the answer must be, as the options say; None where they say nothing.

    Args:
        json_schema: The file of a JSON schema; `-` for standard input.
        grammar: That of a grammar.
        no_grammar: Whether experts' grammars do not count.
        standard_input: What else is read there, in words; None for nothing.

    Raises:
        HocketError: `BAD_REQUEST` if two of them are given, a file is no text, or standard input is read for something
            else; as `hocket.cli.files.read_file`.
    """
    given = {"--json-schema": json_schema is not None, "--grammar": grammar is not None, "--no-grammar": no_grammar}
    flags = [flag for flag, is_given in given.items() if is_given]
    if len(flags) > 1:
        raise HocketError(Reason.BAD_REQUEST, f"{flags[0]} and {flags[1]} contradict each other: leave out one of them")
    if json_schema is not None:
        return Constraint(json_schema=_read_text(json_schema, "--json-schema", standard_input))
    if grammar is not None:
        return Constraint(gbnf=_read_text(grammar, "--grammar", standard_input))
    return Constraint(none=True) if no_grammar else None


def _read_text(path: Path, flag: str, standard_input: str | None) -> str:
    """The text of the file that an option names; `-` for standard input."""
    if path != _STDIN:
        if _looks_written_out(path):
            raise HocketError(
                Reason.BAD_REQUEST, f"{flag} names a file: write that into one, or pipe it and say {flag} {_STDIN}"
            )
        data, where = files.read_file(path, CONSTRAINT_BYTES_MAX), str(path)
    elif standard_input is None:
        data, where = bytes(files.standard_input().buffer.read(CONSTRAINT_BYTES_MAX + 1)), "standard input"
        if len(data) > CONSTRAINT_BYTES_MAX:
            raise HocketError(Reason.TOO_LARGE, f"{where} is larger than {output.size(CONSTRAINT_BYTES_MAX)}")
    else:
        raise HocketError(Reason.BAD_REQUEST, f"{standard_input} comes through standard input: give {flag} a file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise HocketError(Reason.BAD_REQUEST, f"{where} is not text in UTF-8") from error


def _looks_written_out(path: Path) -> bool:
    """Whether somebody has written a schema or a grammar where the name of its file belongs."""
    text = str(path).lstrip()
    try:
        return (text.startswith("{") or "::=" in text) and not path.exists()
    except (OSError, ValueError):  # no file can be called so
        return True


def in_options(error: HocketError) -> HocketError:
    """A refusal that names a field of the request, by the option that fills it."""
    field = (error.field or "").partition("[")[0]
    flag = _FLAGS.get(field)
    if flag is None:
        return error
    for name in (field, field.rpartition(".")[2]):
        if error.message.startswith(f"{name} "):
            return error.restated(flag + error.message.removeprefix(name))
    return error.restated(f"{flag}: {error.message}")


def read_experts(text: str) -> list[WeightedExpert]:
    """The experts that a list such as `sql:0.7,acme/json@1.2.0,sha256:<64 hex digits>:0.3` names, in its order.

    A weight follows the last colon; the colon inside a digest is none.

    Raises:
        HocketError: `BAD_REQUEST` if a part has no name, a weight is no number from -100 to 100, a digest is cut short,
            or an expert is named twice.
    """
    chosen: dict[str, WeightedExpert] = {}
    for part in text.split(",") if text.strip() else ():
        name, weight = _part(part.strip())
        if name in chosen:
            raise _bad(f"{name[:80]!r} is named twice: give it one weight")
        chosen[name] = name if weight is None else (name, weight)
    return list(chosen.values())


def written(experts: list[WeightedExpert]) -> str:
    """Experts as `read_experts` reads them."""
    return ",".join(each if isinstance(each, str) else f"{each[0]}:{each[1]:g}" for each in experts)


def _part(part: str) -> tuple[str, float | None]:
    if is_digest(part) or ":" not in part:
        if not part:
            raise _bad(f"a name is missing: {_FORM}")
        return part, None
    name, _, text = (each.strip() for each in part.rpartition(":"))
    if not name:
        raise _bad(f"{part[:80]!r} has no name: {_FORM}")
    if name == "sha256":
        raise _bad(f"{part[:80]!r} is no whole digest: it has 64 hex digits, 0-9 and a-f")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not is_weight(weight):
        limits = f"from -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}"
        raise _bad(f"the weight of {name[:80]!r} is a number {limits}, not {text[:80]!r}: {_FORM}")
    return name, weight


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, what, field="experts")
