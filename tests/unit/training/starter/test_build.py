"""What is trained, packed and signed for the kit, and in which order."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.starter_kits import random_kit
from training.starter import build
from training.starter.corpus import TASKS

PAIR = [TASKS[name] for name in build.PAIR]


class StopError(Exception):
    """The command that was not run any more."""


class Commands:
    """Stands in for the project's commands, which have tests of their own: notes them, and leaves their files."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.told: list[tuple[str, ...]] = []
        self.stop_at = stop_at

    def __call__(self, *arguments: str) -> None:
        if len(self.told) == self.stop_at:
            raise StopError
        self.told.append(arguments)
        value = dict(pairwise(arguments))
        if arguments[0] == "train":
            Path(value["--out"]).mkdir(parents=True, exist_ok=True)
        elif arguments[:2] == ("expert", "pack"):
            Path(value["--out"]).write_text(f"package {len(self.told)}")
        elif arguments[0] == "sign":
            Path(f"{arguments[1]}.release.json").write_text("release")

    def trainings(self) -> list[tuple[str, str | None, str | None]]:
        """Per training: its output, what it goes on from and what it learns beside, by the last parts of the paths."""
        found = []
        for each in self.told:
            if each[0] == "train":
                value = dict(pairwise(each))
                found.append(tuple(short(value.get(name)) for name in ("--out", "--start", "--beside")))
        return found  # type: ignore[return-value]  # three each


def short(path: str | None) -> str | None:
    return None if path is None else "/".join(path.split("/")[-2:])


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "_TRAIN_ROWS", 50)
    monkeypatch.setattr(build, "_EVAL_ROWS", 5)
    made = random_kit(tmp_path / "kit")
    shutil.rmtree(made / "experts")
    return made


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(build, "_hocket", made)
    return made


def make_pair(kit: Path) -> None:
    build.make_pair(PAIR, kit, kit / "work", kit / "key")


def test_the_pair_learns_in_turns_each_beside_what_the_other_is(kit: Path, commands: Commands) -> None:
    make_pair(kit)
    nature, home = ("expert-esperanto-nature.expert", "expert-esperanto-home.expert")
    assert commands.trainings()[:4] == [
        ("pair-0/esperanto-nature", None, None),
        ("pair-1/esperanto-home", None, f"pair-0/{nature}"),
        ("pair-2/esperanto-nature", f"pair-0/{nature}", f"pair-1/{home}"),
        ("pair-3/esperanto-home", f"pair-1/{home}", f"pair-2/{nature}"),
    ]
    assert len(commands.trainings()) == 8
    assert commands.trainings()[-1] == ("pair-7/esperanto-home", f"pair-5/{home}", f"pair-6/{nature}")
    signed = [short(each[1]) for each in commands.told if each[0] == "sign"]
    assert signed == [f"pair-6/{nature}", f"pair-7/{home}"]
    assert {path.name for path in (kit / "experts").iterdir()} == {
        *(nature, home),
        *(f"{name}.release.json" for name in (nature, home)),
    }


@pytest.mark.parametrize("stop_at", [0, 1, 7, 16, 17])
def test_a_pair_that_was_stopped_goes_on_and_ends_the_same(
    stop_at: int, kit: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(kit)
    whole = commands.trainings()
    shutil.rmtree(kit / "experts")
    shutil.rmtree(kit / "work")
    stopped, further = Commands(stop_at), Commands()
    monkeypatch.setattr(build, "_hocket", stopped)
    with pytest.raises(StopError):
        make_pair(kit)
    monkeypatch.setattr(build, "_hocket", further)
    make_pair(kit)
    together = [*stopped.trainings(), *further.trainings()]
    assert list(dict.fromkeys(together)) == whole  # a training that was stopped may be there twice
    assert len(list((kit / "experts").iterdir())) == 4


def test_one_of_the_pair_that_was_removed_comes_back_without_a_training(kit: Path, commands: Commands) -> None:
    make_pair(kit)
    before = {path.name: path.read_bytes() for path in (kit / "experts").iterdir()}
    (kit / "experts" / "expert-esperanto-home.expert").unlink()
    trained = len(commands.trainings())
    make_pair(kit)
    assert len(commands.trainings()) == trained
    assert {path.name: path.read_bytes() for path in (kit / "experts").iterdir()} == before


def test_what_was_made_on_another_base_is_not_taken_for_made(kit: Path, commands: Commands) -> None:
    make_pair(kit)
    trained = len(commands.trainings())
    settings = kit / build.BASE / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "changed": 1}))
    make_pair(kit)
    assert len(commands.trainings()) == 2 * trained


def test_an_expert_is_trained_packed_signed_and_laid_into_the_kit(kit: Path, commands: Commands) -> None:
    task = TASKS["regex"]
    build.make_expert(task, kit, kit / "work", kit / "key")
    assert [each[0] for each in commands.told] == ["train", "expert", "sign"]
    assert "--resume" not in commands.told[0]
    assert sorted(path.name for path in (kit / "experts").iterdir()) == [
        "expert-regex.expert",
        "expert-regex.expert.release.json",
    ]
    build.make_expert(task, kit, kit / "work", kit / "key")
    assert "--resume" in commands.told[3]
