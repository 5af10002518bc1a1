"""What an operator may choose, and the device it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from hocket.errors import HocketError, Reason
from hocket.packages import Password
from hocket.settings import build, read_tables
from hocket.v1.registry_pb2 import WorkerState
from services.expert_worker.credentials import CredentialFile, read_all
from services.expert_worker.device import (
    Shares,
    available_bytes,
    available_host_bytes,
    budget_bytes,
    choose_device,
    compute_threads,
    shares,
)
from services.expert_worker.settings import WorkerSettings
from services.registry.leases import Leases

FOLDERS = {"data_dir": "/data", "trust_dir": "/trust"}
DIGEST = "sha256:" + "a" * 64


def built(**values: Any) -> WorkerSettings:
    return build(WorkerSettings, {**FOLDERS, **values}, "worker")


def test_defaults_suit_a_laptop() -> None:
    settings = built()
    assert (settings.port, settings.device, settings.allow_unsigned) == (50054, "auto", False)
    assert settings.data_dir == Path("/data")


def test_everything_may_come_as_text_from_the_environment() -> None:
    settings = built(device="cuda:1", budget_bytes="1024", allow_unsigned="true", preload=f"{DIGEST}, {DIGEST}")
    assert (settings.device, settings.budget_bytes, settings.allow_unsigned) == ("cuda:1", 1024, True)
    assert settings.preload == (DIGEST, DIGEST)


@pytest.mark.parametrize(
    ("key", "value", "sound"),
    [
        ("name", "Worker A", "worker-a"),
        ("device", "gpu", "cpu"),
        ("device", "cuda", "cuda:0"),
        ("budget_bytes", -1, 0),
        ("compute_threads", -1, 1),
        ("cache_bytes", -1, 0),
        ("queue_max", 0, 1),
        ("loading_max", 0, 1),
        ("in_flight_max", 0, 1),
        ("default_deadline_seconds", 0.0, 0.1),
        ("text_deadline_seconds", float("inf"), 0.1),
        ("base_dtype", "int4", "bfloat16"),
        ("base_quantisation", "int4", "nf4"),
        ("rope", "yarn", "yarn-128k"),
        ("context_length", -1, 100),
        ("kv_dtype", "float16", "int8"),
        ("adapters", "nf4", "int8"),
        ("host_bytes", -1, 0),
        ("slab_bytes", -1, 1),
        ("step_tokens", 0, 1),
        ("sequences_max", 0, 1),
        ("text_queue_max", 0, 1),
        ("ageing_seconds", 0.0, 0.1),
        ("session_seconds", -1.0, 0.0),
        ("preload", ["acme/iris@1.0.0"], [DIGEST]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_advice(key: str, value: Any, sound: Any) -> None:
    with pytest.raises(HocketError) as refusal:
        built(**{key: value})
    assert refusal.value.reason is Reason.BAD_REQUEST
    assert key in refusal.value.message
    built(**{key: sound})


def test_a_negative_number_is_refused_by_its_own_name_alone() -> None:
    with pytest.raises(HocketError) as refusal:
        built(session_seconds=-1.0)
    assert "session_seconds must be 0 or more, not -1.0" in refusal.value.message
    assert "budget_bytes" not in refusal.value.message


def test_credentials_are_for_no_more_packages_than_a_registry_lets_a_worker_announce() -> None:
    file = {"key_file": "/run/secrets/key"}
    credentials = {f"acme/m{number}": file for number in range(4096)}

    settings = built(credentials=credentials)
    leases = Leases(10.0, 1)
    assert leases.renew(WorkerState(worker="w", address="a:1", device="cpu", unlocks=settings.credentials), 0.0)
    with pytest.raises(HocketError) as refusal:
        built(credentials={**credentials, DIGEST: file})
    assert refusal.value.reason is Reason.BAD_REQUEST
    assert "4096" in refusal.value.message


def test_a_base_is_found_by_name_in_a_folder_of_bases() -> None:
    with pytest.raises(HocketError) as refusal:
        built(base="qwen3-0.6b")
    assert "bases_dir" in refusal.value.message
    assert built(base="qwen3-0.6b", bases_dir="/bases").bases_dir == Path("/bases")
    assert built(bases_dir="").bases_dir is None


class TestCredentials:
    FILES: ClassVar[dict[str, Any]] = {
        "acme/iris": {"password_file": "/run/secrets/iris"},
        DIGEST: {"key_file": "~/worker.key"},
    }

    def test_each_package_has_a_secret_file_of_one_kind(self) -> None:
        credentials = built(credentials=self.FILES).credentials
        assert credentials["acme/iris"] == CredentialFile(password_file=Path("/run/secrets/iris"))
        assert credentials[DIGEST] == CredentialFile(key_file=Path("~/worker.key").expanduser())
        assert built().credentials == {}

    def test_they_are_a_table_of_the_settings_file(self, tmp_path: Path) -> None:
        path = tmp_path / "hocket.toml"
        path.write_text('[worker.credentials]\n"acme/iris" = {password_file = "/run/secrets/iris"}\n')
        tables = read_tables(path, {}, frozenset({"worker"}))
        assert built(**tables["worker"]).credentials == {"acme/iris": CredentialFile(Path("/run/secrets/iris"))}

    @pytest.mark.parametrize(
        "wrong",
        [
            "acme/iris=hunter2",
            {"acme/iris": "hunter2"},
            {"acme/iris": ["hunter2"]},
            {"acme/iris": {"password": "hunter2"}},
            {"acme/iris": {"password_file": "/hunter2", "key_file": "/hunter2"}},
            {"acme/iris": {}},
            {"iris": {"password_file": "/hunter2"}},
            {"acme/iris@1.0.0": {"password_file": "/hunter2"}},
            {"sha256:12": {"password_file": "/hunter2"}},
            {"acme/iris": {"password_file": {"hunter2": 1}}},
        ],
    )
    def test_what_is_no_such_table_is_refused_and_secrets_in_it_are_not_repeated(self, wrong: Any) -> None:
        with pytest.raises(HocketError) as refusal:
            built(credentials=wrong)
        assert refusal.value.reason is Reason.BAD_REQUEST
        assert "credentials" in refusal.value.message
        assert "hunter2" not in refusal.value.message

    def test_they_are_read_whole_or_the_start_is_refused(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("hunter2\n")
        secret.chmod(0o600)
        files = {"acme/iris": CredentialFile(password_file=secret)}
        (credential,) = read_all(files).values()
        assert isinstance(credential, Password)
        secret.chmod(0o644)
        with pytest.raises(HocketError) as refusal:
            read_all(files)
        assert refusal.value.reason is Reason.BAD_KEY_FILE
        assert "hunter2" not in refusal.value.message


class TestShares:
    def divided(self, free: int, useful: int, *, experts: int = 0, slab: int = 0, elsewhere: bool = False) -> Shares:
        return shares(free, useful, experts_bytes=experts, slab_bytes=slab, adapters_elsewhere=elsewhere)

    def test_what_was_not_chosen_is_divided(self) -> None:
        assert self.divided(1000, 10_000) == Shares(experts_bytes=400, slab_bytes=600)

    def test_adapter_experts_that_wait_elsewhere_leave_their_share_to_those_that_run(self) -> None:
        assert self.divided(1000, 10_000, elsewhere=True) == Shares(experts_bytes=100, slab_bytes=900)

    def test_keys_and_values_take_no_more_than_they_can_use(self) -> None:
        assert self.divided(1000, 200) == Shares(experts_bytes=640, slab_bytes=360)

    def test_what_was_chosen_stands(self) -> None:
        assert self.divided(0, 200, experts=9, slab=15) == Shares(9, 15)
        assert self.divided(1000, 200, experts=100) == Shares(100, 360)
        assert self.divided(100, 0, slab=700) == Shares(0, 700)


class TestDevice:
    def test_the_cpu_is_always_there(self) -> None:
        assert choose_device("cpu") == torch.device("cpu")

    def test_auto_takes_cuda_where_there_is_some(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device("auto") == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert choose_device("auto") == torch.device("cuda:0")
        assert choose_device("cuda:1") == torch.device("cuda:1")

    def test_a_device_that_is_not_here_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(HocketError) as refusal:
            choose_device("cuda:0")
        assert refusal.value.reason is Reason.BAD_REQUEST

    def test_the_budget_is_a_share_of_what_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
        assert budget_bytes(torch.device("cuda:0")) == 800
        assert budget_bytes(torch.device("cuda:0"), 1, 500) == 800  # of what the base has left
        assert budget_bytes(torch.device("cuda:0"), 2, 500) == 300  # of all, since others may not have theirs yet
        assert budget_bytes(torch.device("cuda:0"), 4, 500) == 0
        assert available_bytes(torch.device("cuda:0")) == 1000
        assert 0 < budget_bytes(torch.device("cpu")) <= available_host_bytes()

    def test_the_container_limits_what_the_machine_has(self, tmp_path: Path) -> None:
        (tmp_path / "meminfo").write_text("MemTotal: 4 kB\nMemAvailable: 3 kB\n")
        assert available_host_bytes(tmp_path, tmp_path) == 3072
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("100\n")
        assert available_host_bytes(tmp_path, tmp_path) == 3072
        (tmp_path / "memory.max").write_text("1100\n")
        assert available_host_bytes(tmp_path, tmp_path) == 1000

    def test_files_that_a_container_has_read_do_not_count(self, tmp_path: Path) -> None:
        for name, text in (("meminfo", "MemAvailable: 3 kB"), ("memory.max", "1100"), ("memory.current", "900")):
            (tmp_path / name).write_text(text)
        assert available_host_bytes(tmp_path, tmp_path) == 200
        (tmp_path / "memory.stat").write_text("anon 100\nactive_file 300\ninactive_file 50\nshmem 40\n")
        assert available_host_bytes(tmp_path, tmp_path) == 550
        (tmp_path / "memory.stat").write_text("anon 100\n")
        assert available_host_bytes(tmp_path, tmp_path) == 200

    @pytest.mark.parametrize("meminfo", ["", "MemTotal: 4 kB", "MemAvailable: lots", "MemAvailable:"])
    def test_a_machine_that_does_not_say_gets_a_modest_budget(self, tmp_path: Path, meminfo: str) -> None:
        (tmp_path / "meminfo").write_text(meminfo)
        assert available_host_bytes(tmp_path, tmp_path) == 2 * 2**30

    def test_threads_are_as_set_or_half_the_cores(self) -> None:
        assert compute_threads(3) == 3
        assert compute_threads(0) >= 1
