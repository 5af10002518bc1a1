from __future__ import annotations

import re
from pathlib import Path

import pytest

from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.builders import apr_bytes
from tests.fakes import ScriptedRegistry, ScriptedRouter, serving
from tests.signing import envelope_of

PAGE = Path(__file__).parents[3] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run_as_they_are_printed(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = apr_bytes()
    (tmp_path / "low.apr").write_bytes(data)
    (tmp_path / "low.apr.release.json").write_bytes(envelope_of(data, name="acme/low@1.0.0"))
    (tmp_path / "digits.toml").write_text(
        'name = "digits"\n[[members]]\nexpert = "acme/low@1.0.0"\n[gate]\nkind = "fixed"\nweights = [1]\n'
    )
    monkeypatch.chdir(tmp_path)
    with (
        serving(add_RouterServiceServicer_to_server, ScriptedRouter()) as router,
        serving(add_RegistryServiceServicer_to_server, ScriptedRegistry()) as registry,
    ):
        code = example.replace("127.0.0.1:50051", router.address).replace("127.0.0.1:50052", registry.address)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})  # noqa: S102 - our own documentation

    assert "Traceback" not in capsys.readouterr().err
