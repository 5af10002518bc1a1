"""`hocket`: the overview of all verbs, and the one place where their failures end.

A verb's module is imported when the verb is used: `hocket --help` needs neither grpc nor numpy. Exit status: 0 done,
2 refused (and wrong usage, and output that cannot be written), 1 for a bug of ours; `hocket health` has its own.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from hocket import __version__
from hocket.cli import certificates, output
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

_REFUSED: Final = 2
_BUG: Final = 1
_NOBODY_READS: Final = 141  # as shells report SIGPIPE
_USAGE_ERROR: Final[Any] = typer.BadParameter.__base__  # click's UsageError, which is private to typer
_JSON_WRITTEN: Final = "hocket.json_written"
"""Whether `--json` is on the command line, which may be wrong before any option is read."""


class _Verb(NamedTuple):
    """Where a verb is, and its line in the overview.

    A module holds several verbs, or one group that is called like the verb.
    """

    module: str
    panel: str
    help: str


_ANSWERS: Final = "Answers"
_SUITE: Final = "The suite"
_FILES: Final = "Files and keys"
_TRAINING: Final = "Training"
_REGISTRY: Final = "Registry"

VERBS: Final[Mapping[str, _Verb]] = {
    "predict": _Verb("infer", _ANSWERS, "Ask a mixture, and watch its experts answer."),
    "route": _Verb("route", _ANSWERS, "Explain who would answer, without asking them."),
    "generate": _Verb("generate", _ANSWERS, "Ask a base model and adapter experts for text."),
    "chat": _Verb("chat", _ANSWERS, "Talk with a base model and adapter experts."),
    "up": _Verb("serve", _SUITE, "Start a whole suite on this machine."),
    "health": _Verb("serve", _SUITE, "Ask a server whether it serves."),
    "base": _Verb("base", _SUITE, "Decide which base models may be served."),
    "inspect": _Verb("package", _FILES, "Show what a package file says about itself."),
    "verify": _Verb("package", _FILES, "Check that a package file may serve, and say why."),
    "keygen": _Verb("package", _FILES, "Make a key to sign with."),
    "sign": _Verb("package", _FILES, "Bind a name to a package file, and sign that."),
    "trust": _Verb("trust", _FILES, "Decide whose signatures count."),
    "apr": _Verb("apr", _FILES, "Make .apr packages: convert, encrypt, quantize."),
    "expert": _Verb("expert", _FILES, "Make .expert packages: new, validate, pack."),
    "train": _Verb("train", _TRAINING, "Train an adapter from a manifest and a dataset."),
    "dataset": _Verb("dataset", _TRAINING, "Look after datasets: validate, stats, dedupe, split."),
    "evaluate": _Verb("evaluate", _TRAINING, "Score answers of a running suite on a dataset."),
    "publish": _Verb("publish", _REGISTRY, "Put package files into a registry."),
    "install": _Verb("install", _REGISTRY, "Put packages into a registry, with all that they require."),
    "update": _Verb("install", _REGISTRY, "Put newer versions of adapter experts into a registry."),
    "list": _Verb("listing", _REGISTRY, "List the packages of a registry."),
    "search": _Verb("listing", _REGISTRY, "Search the packages of a registry."),
    "experts": _Verb("experts", _REGISTRY, "Show an expert, or which experts go together."),
    "mixtures": _Verb("mixtures", _REGISTRY, "List, show, put and delete mixtures."),
    "yank": _Verb("publish", _REGISTRY, "Withdraw a package for good."),
    "uninstall": _Verb("publish", _REGISTRY, "Withdraw packages for good, by name."),
    "revoke-key": _Verb("publish", _REGISTRY, "Withdraw everything a key has signed, for good."),
}


class _Overview(TyperGroup):
    """All verbs by their line of help; the one that is used is imported."""

    def __init__(self, **attributes: Any) -> None:  # noqa: ANN401 - whatever typer hands over
        super().__init__(**attributes)
        for name, verb in VERBS.items():
            self.commands[name] = TyperCommand(name, help=verb.help, rich_help_panel=verb.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - click's types are private to typer
        """The verb itself, in place of its line of help."""
        ctx.meta[_JSON_WRITTEN] = "--json" in args
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = _load(name)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as above
        """Run the verb; a refusal is printed and ends with its own status."""
        try:
            return super().invoke(ctx)
        except HocketError as error:
            output.refuse(error, as_json=output.wants_json(ctx))
            raise typer.Exit(_REFUSED) from error
        except BrokenPipeError as error:
            _give_up_output()
            raise typer.Exit(_NOBODY_READS) from error
        except _USAGE_ERROR as error:
            if not ctx.meta.get(_JSON_WRITTEN):
                raise
            output.refuse(HocketError(Reason.BAD_REQUEST, error.format_message()), as_json=True)
            raise typer.Exit(_REFUSED) from error


def _load(name: str) -> Any:  # noqa: ANN401 - as above
    command: Any = get_command(importlib.import_module(f"hocket.cli.{VERBS[name].module}").app)
    return command if command.name == name else command.commands[name]


app = typer.Typer(
    cls=_Overview,
    help="Mixtures of signed experts: one answer, shared between many small models.",
    epilog="Start with `hocket up`, then `hocket mixtures list`. All of it is explained in docs/cli.md.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(*, value: bool) -> None:
    if value:
        output.say(f"hocket {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    ca_file: certificates.CaFile = None,
    certificate_file: certificates.CertificateFile = None,
    key_file: certificates.KeyFile = None,
) -> None:
    del version
    certificates.choose({"ca_file": ca_file, "certificate_file": certificate_file, "key_file": key_file})


def main() -> None:
    """Run the command line; no traceback for people unless they ask for it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # of a connection that fails, the refusal says more
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to fail
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a program gets every character, whatever the locale
    try:
        app()
    except OSError as error:
        if os.environ.get("HOCKET_DEBUG"):
            raise
        _give_up_output()
        output.say(f"hocket cannot go on: {error.strerror or error}", stderr=True)
        sys.exit(_REFUSED)
    except Exception as error:  # what click and `_Overview` let through is a bug of ours
        if os.environ.get("HOCKET_DEBUG"):
            raise
        output.say(
            f"hocket failed unexpectedly ({type(error).__name__}): this is a bug. Run the same command with "
            "HOCKET_DEBUG=1 for the traceback, and report it.",
            stderr=True,
        )
        sys.exit(_BUG)


def _give_up_output() -> None:
    """Have what is still buffered for a full disk go nowhere: flushing it at exit would fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
