"""Real git repositories, made by the real git."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A U Thor",
    "GIT_AUTHOR_EMAIL": "author@example.org",
    "GIT_COMMITTER_NAME": "A U Thor",
    "GIT_COMMITTER_EMAIL": "author@example.org",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "maintenance.auto",
    "GIT_CONFIG_VALUE_0": "false",
}


def git(folder: Path, *arguments: str, stdin: str = "") -> str:
    """Run git in a folder, and return what it prints."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=_ENVIRONMENT, input=stdin, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def repository(folder: Path, *options: str) -> Path:
    """An empty repository with a work tree."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main", "--template=", *options)
    return folder


def commit(folder: Path, files: Mapping[str, bytes] = {}, tag: str = "") -> None:
    """Commit everything in the work tree and these files, and tag it."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", tag or "more")
    if tag:
        git(folder, "tag", tag)


def bare(folder: Path, source: Path) -> Path:
    """A bare copy of a repository."""
    git(source, "clone", "--quiet", "--bare", "--template=", ".", str(folder))
    return folder
