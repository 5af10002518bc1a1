"""`hocket train`: starts the training script, which has an extra of its own, and says itself what it lacks."""

from __future__ import annotations

import os
import sys

import typer

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an adapter from a manifest and a dataset."""
    command = [sys.executable, "-P", "-m", "training", *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - our own program, and no shell reads the arguments
