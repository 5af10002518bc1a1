from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hocket import __version__
from hocket.cli import main
from hocket.cli.main import VERBS
from tests.builders import apr_bytes

PACKAGE = Path(__file__).parents[2] / "vectors" / "reference-0.11.0" / "linear.plain.apr"


def test_the_overview_names_every_verb(hocket: Any) -> None:
    outcome = hocket("--help")

    assert outcome.code == 0
    for name, verb in VERBS.items():
        assert name in outcome.out
        assert verb.help in outcome.out


@pytest.mark.parametrize("name", VERBS)
def test_the_overview_says_what_the_verb_itself_says(name: str) -> None:
    command = main._load(name)

    assert command.help.splitlines()[0] == VERBS[name].help


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(hocket: Any, name: str) -> None:
    outcome = hocket(name, "--help")

    assert outcome.code == 0
    assert VERBS[name].help in outcome.out


def test_the_version_is_the_library_s(hocket: Any) -> None:
    assert hocket("--version").out == f"hocket {__version__}\n"


def test_the_library_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "hocket", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hocket {__version__}\n"


def test_a_misspelled_verb_gets_a_suggestion(hocket: Any) -> None:
    outcome = hocket("inspekt")

    assert outcome.code == 2
    assert "'inspect'" in outcome.err


def test_the_overview_needs_neither_grpc_nor_numpy_nor_torch() -> None:
    script = (
        "import sys; sys.argv = ['hocket', '--help']; from hocket.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: print(sorted({'grpc', 'numpy', 'google.protobuf', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.splitlines()[-1] == "[]"


def test_commands_on_files_work_without_torch_and_grpc(tmp_path: Any) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['grpc'] = None\n"
        f"sys.argv = ['hocket', 'inspect', {str(tmp_path / 'no.apr')!r}, '--json']\n"
        "from hocket.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert '"reason": "BAD_REQUEST"' in result.stdout


def test_a_bug_is_a_sentence_unless_the_traceback_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_name: str) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "_load", broken)
    monkeypatch.setattr(sys, "argv", ["hocket", "keygen"])
    monkeypatch.delenv("HOCKET_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err

    monkeypatch.setenv("HOCKET_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_wrong_usage_is_json_where_that_is_asked_for(hocket: Any) -> None:
    outcome = hocket("sign", "some.apr", "--json", "--no-such-option")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")
    assert "--no-such-option" in outcome.document["error"]["message"]
    outcome = hocket("sign", "some.apr", "--no-such-option")
    assert (outcome.code, outcome.out) == (2, "")


def run_as_program(arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m hocket.cli.main {arguments}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_full_disk_is_said_and_is_no_bug() -> None:
    done = run_as_program(f"inspect {PACKAGE} --json > /dev/full")

    assert (done.returncode, done.stderr) == (2, "hocket cannot go on: No space left on device\n")


def test_nobody_reading_the_output_is_silent() -> None:
    done = run_as_program(f"inspect {PACKAGE} --json | true")

    assert done.returncode in {0, 141}  # 0 if the other end was quick to read and slow to leave
    assert done.stderr == ""


def test_programs_read_utf_8_and_people_what_their_terminal_can_show(tmp_path: Path) -> None:
    path = tmp_path / "name.apr"
    path.write_bytes(apr_bytes(name="h\u00e4user"))
    done = run_as_program(f"inspect {path}", PYTHONIOENCODING="ascii")

    assert done.returncode == 0, done.stderr
    assert "h\u00e4user" in done.stdout
    refused = run_as_program(f"inspect {tmp_path}/h\u00e4user.apr", PYTHONIOENCODING="ascii")
    assert refused.returncode == 2
    assert "h?user.apr" in refused.stderr
