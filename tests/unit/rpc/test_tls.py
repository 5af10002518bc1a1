from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from hocket.errors import HocketError, Reason
from hocket.rpc.tls import Tls, advice, open_tls
from tests import certificates

ALL = ("router.pem", "router.key", "ca.pem")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of authorities: `before`, `after`."""
    folder = tmp_path_factory.mktemp("authorities")
    certificates.make(folder / "before", "router", "worker")
    certificates.make(folder / "after", "router")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "before", tmp_path / "folder"))


@pytest.fixture
def tls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tls:
    """Of a process that looks at its files each time."""
    monkeypatch.setattr("hocket.rpc.tls._LOOK_SECONDS", 0.0)
    return certificates.tls(folder)


def refused(**values: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        open_tls(**values)
    assert caught.value.reason is Reason.BAD_REQUEST
    return caught.value


def test_without_a_file_there_is_no_tls() -> None:
    assert open_tls() is None
    assert open_tls(ca_file="", mutual="router,worker") is None


@pytest.mark.parametrize("left_out", ["certificate_file", "key_file"])
def test_a_certificate_and_its_key_go_together(folder: Path, left_out: str) -> None:
    values = certificates.files(folder)
    assert open_tls(**values) is not None
    del values[left_out]
    assert "go together" in refused(**values).message


def test_an_authority_alone_is_enough_for_a_client(folder: Path) -> None:
    assert open_tls(**certificates.files(folder, None)) is not None


def test_mutual_names_services(folder: Path) -> None:
    values = certificates.files(folder)
    assert open_tls(**values, mutual=["router", "aggregator", "registry", "worker"]) is not None
    assert "'expert_worker'" in refused(**values, mutual=["expert_worker"]).message


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_is_not_there_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"cannot read {folder / name}" in refused(**certificates.files(folder)).message


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("content", [b"", b"no PEM", b"\xff" * 100])
def test_a_file_that_holds_something_else_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(**certificates.files(folder)).message


def test_a_key_of_another_certificate_is_refused(folder: Path) -> None:
    shutil.copy(folder / "worker.key", folder / "router.key")
    assert "are not a certificate and its unencrypted private key" in refused(**certificates.files(folder)).message


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(folder: Path) -> None:
    key = folder / "router.key"
    command = ["openssl", "ec", "-in", str(key), "-out", str(key), "-aes128", "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    assert "unencrypted" in refused(**certificates.files(folder)).message


def test_a_file_of_any_size_is_not_read(folder: Path) -> None:
    with (folder / "ca.pem").open("ab") as file:
        file.truncate(4 * 2**20)
        assert open_tls(**certificates.files(folder)) is not None
        file.truncate(4 * 2**20 + 1)
    assert "holds no certificates" in refused(**certificates.files(folder)).message


def test_comments_between_certificates_may_be_in_any_language(folder: Path) -> None:
    authority = folder / "ca.pem"
    authority.write_bytes("# Főtanúsítvány\n".encode() + authority.read_bytes())
    assert open_tls(**certificates.files(folder)) is not None


def test_a_service_needs_a_certificate_and_an_authority_for_those_of_its_callers(folder: Path) -> None:
    complete = certificates.tls(folder, mutual=("router",))
    complete.server_credentials("router")
    with pytest.raises(HocketError, match="needs \\[tls\\] certificate_file and key_file"):
        certificates.tls(folder, None).server_credentials("router")
    values = certificates.files(folder)
    del values["ca_file"]
    without_authority = open_tls(**values, mutual=["router"])
    assert without_authority is not None
    with pytest.raises(HocketError, match="callers of the router must show a certificate"):
        without_authority.server_credentials("router")
    without_authority.server_credentials("registry")


def test_no_key_is_shown(folder: Path) -> None:
    assert "PRIVATE" not in repr(certificates.tls(folder).current())


def test_files_that_stay_are_read_once(tls: Tls) -> None:
    assert tls.current() is tls.current()


def test_files_are_read_again_when_they_change(tls: Tls, folder: Path, made: Path) -> None:
    before = tls.current()
    certificates.replace(folder, made / "after", *ALL)
    after = tls.current()
    assert after.pair == ((made / "after" / "router.key").read_bytes(), (made / "after" / "router.pem").read_bytes())
    assert after.ca != before.ca


def test_between_two_looks_files_are_taken_to_be_unchanged(folder: Path, made: Path) -> None:
    tls = certificates.tls(folder)
    before = tls.current()
    certificates.replace(folder, made / "after", *ALL)
    assert tls.current() is before


def test_a_certificate_whose_key_has_not_followed_yet_changes_nothing(tls: Tls, folder: Path, made: Path) -> None:
    before = tls.current()
    certificates.replace(folder, made / "after", "router.pem")
    with capture_logs() as logs:
        assert tls.current() is before
        assert tls.current() is before
    assert [log["log_level"] for log in logs] == ["error"], "said once"
    certificates.replace(folder, made / "after", "router.key")
    assert tls.current() is not before


def test_files_that_are_gone_change_nothing(tls: Tls, folder: Path, made: Path) -> None:
    before = tls.current()
    for name in ALL:
        (folder / name).unlink()
    assert tls.current() is before
    for name in ALL:
        shutil.copy(made / "after" / name, folder / name)
    assert tls.current() is not before


def test_files_replaced_while_they_are_read_are_read_again(
    tls: Tls, folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tls.current()
    certificates.replace(folder, made / "after", *ALL)
    read = Path.open
    interrupted: list[Path] = []

    def open_slowly(path: Path, *arguments: Any) -> Any:
        if path.name == "router.key" and not interrupted:
            interrupted.append(path)
            certificates.replace(folder, made / "before", *ALL)
        return read(path, *arguments)

    monkeypatch.setattr(Path, "open", open_slowly)
    assert tls.current() is before
    again = tls.current()
    assert again is not before
    assert again.pair == before.pair


def test_only_failures_of_certificates_have_advice() -> None:
    assert advice("failed to connect to all addresses; last error: UNKNOWN: Connection refused (111)") is None
    assert advice("Peer name a.b is not in peer certificate") == (
        "the server's certificate is not for a.b: call it by a name in its certificate, or have one made for a.b"
    )
