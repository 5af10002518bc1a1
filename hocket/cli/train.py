"""`hocket train`: starts the training script, which has an extra of its own."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Final

import typer

from hocket.errors import HocketError, Reason

app = typer.Typer()

_NEEDED: Final = ("matplotlib", "peft", "torch", "transformers", "trl")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an adapter from a manifest and a dataset."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"training needs {', '.join(missing)} as well: pip install -e '.[training]' in a clone of Hocket",
        )
    command = [sys.executable, "-P", "-m", "training", *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - our own program, and no shell reads the arguments
