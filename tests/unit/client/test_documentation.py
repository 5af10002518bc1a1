from __future__ import annotations

import re
from pathlib import Path

import pytest

from hocket.packages import read_release
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.builders import apr_bytes
from tests.fakes import ScriptedRegistry, ScriptedRouter, serving
from tests.signing import ACME_ID, ACME_SEED

PAGE = Path(__file__).parents[3] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run_as_they_are_printed(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "low.apr").write_bytes(apr_bytes())
    (tmp_path / "acme.key").write_bytes(ACME_SEED)
    (tmp_path / "acme.key").chmod(0o600)
    (tmp_path / "digits.toml").write_text(
        'name = "digits"\n[[members]]\nexpert = "acme/low@1.0.0"\n[gate]\nkind = "fixed"\nweights = [1]\n'
    )
    monkeypatch.chdir(tmp_path)
    scripted = ScriptedRegistry()
    with (
        serving(add_RouterServiceServicer_to_server, ScriptedRouter()) as router,
        serving(add_RegistryServiceServicer_to_server, scripted) as registry,
    ):
        code = example.replace("127.0.0.1:50051", router.address).replace("127.0.0.1:50052", registry.address)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})  # noqa: S102 - our own documentation

    assert "Traceback" not in capsys.readouterr().err
    assert not any(package.unsigned_by_policy for package in scripted.packages.values())
    for header, _ in scripted.mixtures.values():  # a default suite takes nothing unsigned
        assert read_release(header.release).key_id == ACME_ID
