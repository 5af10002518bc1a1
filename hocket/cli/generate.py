"""`hocket generate`: one text from a base model and adapter experts."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from hocket.cli import files, output, sampling, servers
from hocket.cli.answer import Telling
from hocket.cli.text_router import text_router
from hocket.client.router import SamplingOptions  # noqa: TC001 - typer reads annotations
from hocket.errors import HocketError, Reason
from hocket.text_limits import TEXT_BYTES_MAX

app = typer.Typer(add_completion=False)

_STDIN: Final = "-"


@app.command()
@sampling.with_options
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; - or nothing for standard input.", show_default=False)
    ] = None,
    *,
    experts: sampling.Experts = "",
    base_only: sampling.BaseOnly = False,
    policy: sampling.Policy = None,
    allow: sampling.Allow = None,
    deny: sampling.Deny = None,
    max_experts: sampling.MaxExperts = None,
    base: sampling.Base = "",
    system: sampling.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The model reads the prompt as it is, without a template.")
    ] = False,
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
    """Ask a base model and adapter experts for text.

    Without --experts the router chooses who answers: `hocket route` tells
    whom and why. The answer streams as it is made. Into a pipe goes the
    answer alone.
    With --json every event is one line: plan, start, deltas, finish.

    What is not said about choosing tokens is left to the heaviest expert,
    then to the base. With --device no running suite is needed: one
    starts on this machine's data, and ends with the command.

    $ hocket generate "list all names" --experts sql:0.7,json:0.3
    $ cat question.txt | hocket generate --experts acme/sql@1.2.0 > answer.txt
    $ hocket generate "tell a story" --temperature 0.8 --seed 7 --max-tokens 200
    $ hocket generate "what is 2 + 2?" --device auto
    $ hocket generate "who wrote Faust?" --json-schema person.json
    """
    chosen = sampling.read_experts(experts)
    routing = sampling.read_routing(
        experts=chosen, base_only=base_only, policy=policy, allow=allow, deny=deny, max_experts=max_experts
    )
    constraint = sampling.read_constraint(
        json_schema=json_schema,
        grammar=grammar,
        no_grammar=no_grammar,
        standard_input="the prompt" if prompt in {None, _STDIN} else None,
    )
    if raw and system is not None:
        raise HocketError(Reason.BAD_REQUEST, "--raw is read as it is: write the system's part into it")
    text = read_prompt(prompt, raw=raw)
    if options["top_logprobs"] is not None and not (debug or json):
        raise HocketError(Reason.BAD_REQUEST, "only --debug and --json show what --logprobs asks for: add one of them")
    with (
        text_router(context, router=router, device=device, data=data, base=base, shown=not json) as asked,
        asked.explained(),
        Telling(as_json=json, debug=debug) as telling,
    ):
        events = asked.client.generate(
            text if system is None and not raw else None,
            messages=None if system is None else [turn("system", system), turn("user", text)],
            raw=text if raw else None,
            experts=chosen,
            routing=routing,
            constraint=constraint,
            base=asked.base,
            session=session,
            priority=priority,
            tenant=tenant,
            timeout_seconds=timeout,
            **options,
        )
        telling.show(events)


def turn(role: str, content: str) -> dict[str, str]:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def read_prompt(prompt: str | None, *, raw: bool) -> str:
    """The prompt that was given; for `-` or nothing, standard input.

    The newline at the end of a pipe is no part of it, except in raw text.

    Raises:
        HocketError: `BAD_REQUEST` if there is none, or it is no text; `TOO_LARGE`.
    """
    if prompt is not None and prompt != _STDIN:
        text = prompt
    else:
        stdin = files.standard_input()
        if stdin.isatty():
            if prompt is None:
                raise HocketError(Reason.BAD_REQUEST, "give a prompt as an argument, or through a pipe")
            output.say("reading the prompt from the terminal: end with Ctrl-D", stderr=True)
        data = bytes(stdin.buffer.read(TEXT_BYTES_MAX + 1))
        if len(data) > TEXT_BYTES_MAX:
            raise HocketError(Reason.TOO_LARGE, "the prompt is larger than 1 MiB")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise HocketError(Reason.BAD_REQUEST, "the prompt is not text in UTF-8") from error
        text = text if raw else text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise HocketError(Reason.BAD_REQUEST, "the prompt is empty")
    return text
