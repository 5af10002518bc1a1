"""`hocket chat`: a conversation with a base model and adapter experts."""

from __future__ import annotations

import json as jsons
import secrets
import sys
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from hocket.cli import files, output, sampling, servers
from hocket.cli.answer import Telling
from hocket.cli.colours import Colours
from hocket.cli.generate import turn
from hocket.cli.own_suite import HAS_ENDED
from hocket.cli.text_router import text_router
from hocket.client.router import SamplingOptions  # noqa: TC001 - typer reads annotations
from hocket.errors import HocketError, Reason
from hocket.text_limits import TEXT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from io import TextIOWrapper

    from hocket.cli.sampling import WeightedExpert
    from hocket.cli.text_router import TextRouter
    from hocket.client import Constraint, Routing
    from hocket.client.router import TextOptions

app = typer.Typer(add_completion=False)

_PROMPT: Final = "> "
_MORE: Final = ". "
_NONE: Final = "-"
_AUTO: Final = "auto"
_EXPERTS_TOLD: Final = {_NONE: "none, the base alone", _AUTO: "chosen by the router for every turn"}
_NOTHING_YET: Final = "-"
"""A text of which only matters who would answer it."""
_REFUSED: Final = 2
_SESSION_BYTES: Final = 16
_HELP: Final = f"""\
/experts sql:0.7,json:0.3   who answers from now on; {_NONE} for the base alone, {_AUTO} to have them chosen
/base NAME                  on which base; {_NONE} for the one that the experts ride on
/system TEXT                what the system says first; {_NONE} for nothing
/reset                      forget what was said
/save FILE                  write what was said as JSON
/debug                      show plan, tokens and timings, or no longer
/quit                       end, as Ctrl-D does
//...                       a line that begins with one slash
A backslash at the end of a line continues it on the next. Ctrl-C ends an answer that is running."""


@app.command()
@sampling.with_options
def chat(
    context: typer.Context,
    *,
    experts: sampling.Experts = "",
    base_only: sampling.BaseOnly = False,
    policy: sampling.Policy = None,
    allow: sampling.Allow = None,
    deny: sampling.Deny = None,
    max_experts: sampling.MaxExperts = None,
    base: sampling.Base = "",
    system: sampling.System = None,
    json_schema: sampling.JsonSchema = None,
    grammar: sampling.Grammar = None,
    no_grammar: sampling.NoGrammar = False,
    options: SamplingOptions,
    session: sampling.Session = "",
    priority: sampling.Priority = None,
    tenant: sampling.Tenant = "",
    timeout: sampling.Timeout = None,
    router: servers.Router = servers.ROUTER_ADDRESS,
    device: sampling.Device = None,
    data: sampling.Data = None,
    debug: sampling.Debug = False,
    json: output.Json = False,
) -> None:
    """Talk with a base model and adapter experts.

    Without --experts the router chooses for every turn who answers, by what
    is said in it.

    What was said goes with every turn. /help lists what can be changed on
    the way, /experts and /system among it. Ctrl-C ends a running answer,
    Ctrl-D the conversation.

    From a pipe every line is a turn, and the answers alone are printed;
    the status is 2 if one of them was refused.

    $ hocket chat --experts sql:0.7,json:0.3
    $ hocket chat --system "answer in one word" --device auto
    $ cat questions.txt | hocket chat > answers.txt
    """
    chosen = sampling.read_experts(experts)
    routing = sampling.read_routing(
        experts=chosen, base_only=base_only, policy=policy, allow=allow, deny=deny, max_experts=max_experts
    )
    constraint = sampling.read_constraint(
        json_schema=json_schema, grammar=grammar, no_grammar=no_grammar, standard_input="what is said"
    )
    stdin = files.standard_input()
    said: TextOptions = {
        **options,
        "session": session or secrets.token_hex(_SESSION_BYTES),
        "priority": priority,
        "tenant": tenant,
    }
    with text_router(context, router=router, device=device, data=data, base=base, shown=not json) as asked:
        talk = _Talk(
            asked, stdin, said, constraint, timeout, chosen, routing, asked.base, system, debug=debug, as_json=json
        )
        talk.run()
    if talk.refused and not talk.at_terminal:
        raise typer.Exit(_REFUSED)


@dataclass(slots=True)
class _Talk:
    """A conversation.

    Attributes:
        asked: Who answers.
        stdin: Where what is said comes from.
        options: How tokens are chosen, and of which session, tenant and urgency every turn is.
        constraint: What every answer must be.
        timeout_seconds: Most time for an answer; None for the router's own.
        turns: What was said, without the system's part.
        refused: Whether something was refused.
        at_terminal: Whether a person sits at both ends.
    """

    asked: TextRouter
    stdin: TextIOWrapper
    options: TextOptions
    constraint: Constraint | None
    timeout_seconds: float | None
    experts: list[WeightedExpert]
    routing: Routing | None
    base: str
    system: str | None
    _: KW_ONLY
    debug: bool
    as_json: bool
    turns: list[dict[str, str]] = field(default_factory=list)
    refused: bool = False
    at_terminal: bool = field(init=False)
    _chosen_by: Routing | None = field(init=False)
    _saved: set[Path] = field(default_factory=set)
    _colours: Colours = field(default_factory=Colours)

    def __post_init__(self) -> None:
        self._chosen_by = None if self.routing == sampling.BASE_ALONE else self.routing
        self.at_terminal = self.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Take turns until there is no further line."""
        if self.at_terminal:
            import readline  # noqa: F401, PLC0415 - gives `input` its keys and its memory

            output.say("/help lists what can be changed on the way, Ctrl-D ends", stderr=True)
        # What is no text is refused by the turn, not by the reader.
        self.stdin.reconfigure(encoding=None if self.at_terminal else "utf-8", errors="surrogateescape")
        while True:
            try:
                said = self._read()
                if said is None or said.strip() == "/quit":
                    return
                self._take(said)
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                output.say("", stderr=True)
            except HocketError as error:
                if HAS_ENDED in error.metadata:
                    raise
                self.refused = True
                output.refuse(error, as_json=self.as_json)

    def _take(self, said: str) -> None:
        try:
            said.encode()
        except UnicodeEncodeError as error:
            raise HocketError(Reason.BAD_REQUEST, "what was said is not text in UTF-8") from error
        if said.startswith("/") and not said.startswith("//"):
            name, _, rest = said[1:].strip().partition(" ")
            command = self._commands().get(name)
            if command is None:
                raise HocketError(Reason.BAD_REQUEST, f"no command /{name[:80]}: /help lists them, // begins a text")
            command(rest.strip())
        elif said.strip():
            self._answer(said.removeprefix("/"))

    def _answer(self, said: str) -> None:
        """Ask for the next turn. One that is refused is forgotten, one that is ended early counts as far as it came."""
        if len(said.encode()) > TEXT_BYTES_MAX:
            raise HocketError(Reason.TOO_LARGE, "what was said is larger than 1 MiB")
        asked = turn("user", said)
        system = [] if self.system is None else [turn("system", self.system)]
        telling = Telling(as_json=self.as_json, debug=self.debug, colours=self._colours)
        try:
            with self.asked.explained(), telling:
                telling.show(
                    self.asked.client.generate(
                        messages=[*system, *self.turns, asked],
                        experts=self.experts,
                        routing=self.routing,
                        constraint=self.constraint,
                        base=self.base,
                        timeout_seconds=self.timeout_seconds,
                        **self.options,
                    )
                )
        except HocketError as error:
            if error.reason is Reason.TOO_LARGE and self.turns:
                raise error.restated(f"{error.message} (/reset forgets what was said)") from error
            raise
        except KeyboardInterrupt:
            if telling.text:
                self.turns += [asked, turn("assistant", telling.text)]
            raise
        self.turns += [asked, turn("assistant", telling.text)]

    def _commands(self) -> Mapping[str, Callable[[str], None]]:
        return {
            "help": self._help,
            "experts": self._choose_experts,
            "base": self._choose_base,
            "system": self._choose_system,
            "reset": lambda _rest: self.turns.clear(),
            "save": self._save,
            "debug": self._toggle_debug,
        }

    def _help(self, _rest: str) -> None:
        for line in _HELP.splitlines():
            output.say(line, stderr=True)

    def _choose_experts(self, text: str) -> None:
        if text in {_NONE, _AUTO}:
            self.experts = []
            self.routing = sampling.BASE_ALONE if text == _NONE else self._chosen_by
        elif text:
            experts = sampling.read_experts(text)
            with self.asked.explained():  # now, and not with the next turn, which would be lost
                self.asked.client.route_text(_NOTHING_YET, experts=experts)
            self.experts, self.routing = experts, None
        self._tell(f"experts: {_EXPERTS_TOLD.get(who := self._who(), who)}")

    def _who(self) -> str:
        """Who answers, as `/experts` reads it."""
        if self.routing is not None and self.routing.policy == "base":
            return _NONE
        return sampling.written(self.experts) or _AUTO

    def _choose_base(self, text: str) -> None:
        if text:
            base = "" if text == _NONE else text
            with self.asked.explained():
                self.asked.client.route_text(_NOTHING_YET, routing=sampling.BASE_ALONE, base=base)
            self.base = base
        self._tell(f"base: {self.base or 'the one that the experts ride on'}")

    def _choose_system(self, text: str) -> None:
        if text:
            self.system = None if text == _NONE else text
        self._tell(f"system: {'nothing' if self.system is None else self.system}")

    def _toggle_debug(self, _rest: str) -> None:
        self.debug = not self.debug
        self._tell(f"debug: {'on' if self.debug else 'off'}")

    def _save(self, text: str) -> None:
        if not text:
            raise HocketError(Reason.BAD_REQUEST, "say where: /save FILE")
        try:
            path = Path(text).expanduser()
            is_taken = path.exists() and path not in self._saved
        except (OSError, RuntimeError, ValueError) as error:
            raise HocketError(
                Reason.BAD_REQUEST, f"{text[:80]!r} cannot be a file ({error!s:.80}): choose another name"
            ) from error
        if is_taken:
            raise HocketError(Reason.BAD_REQUEST, f"{path} is there already: choose another name")
        system = [] if self.system is None else [turn("system", self.system)]
        document = {
            "experts": self._who(),
            "base": self.base,
            "messages": [*system, *self.turns],
        }
        files.write_file(path, jsons.dumps(document, ensure_ascii=False, indent=2).encode() + b"\n")
        self._saved.add(path)
        self._tell(f"{path} is written")

    def _tell(self, text: str) -> None:
        if self.at_terminal:
            output.say(text, stderr=True)

    def _read(self) -> str | None:
        """What is said next, lines that end with a backslash joined with the next; None at the end."""
        lines: list[str] = []
        while True:
            line = self._line(_MORE if lines else _PROMPT)
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        try:
            if self.at_terminal:
                return input(prompt)
            line = self.stdin.readline()
        except EOFError:
            return None
        return line.removesuffix("\n").removesuffix("\r") if line else None
