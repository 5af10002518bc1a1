"""`python -m hocket`: the command line, where its script is not on the path."""

from __future__ import annotations

from hocket.cli.main import main

main()
