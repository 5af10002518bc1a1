"""What an operator may choose about an expert worker."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError
from hocket.identity import check_name, is_digest
from hocket.settings import check_call_seconds, check_counts
from services.expert_worker.credentials import CredentialFile, check_addresses
from services.expert_worker.engine.rotary import AS_CONFIGURED, check_rope

if TYPE_CHECKING:
    from pathlib import Path

_CHOICES: Final = {
    "base_dtype": ("auto", "float32", "bfloat16", "float16"),
    "base_quantisation": ("none", "int8", "nf4"),
    "kv_dtype": ("auto", "int8"),
    "adapters": ("auto", "int8"),
}
_NOT_NEGATIVE: Final = (
    "budget_bytes",
    "host_bytes",
    "slab_bytes",
    "compute_threads",
    "cache_bytes",
    "session_seconds",
)
_DEVICE: Final = re.compile(r"auto|cpu|cuda:[0-9]{1,3}")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Table `[worker]`.

    Args:
        data_dir: Where it keeps its cache of packages (`cache/`) and what was withdrawn (`revocations.json`).
        trust_dir: The trust folder it decides by, `<publisher>.toml` each.
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        advertise: Address by which others reach it; empty for `host:port`, with this machine's name for the host when
            it listens on all interfaces.
        bases_dir: Where `hocket base add` keeps which base models may be served; None if none may.
        base: The one that this worker serves, by name or digest; empty for the only one there is, and for none if there
            is none.
        base_dtype: What the base computes in: `float32`, `bfloat16`, `float16`, or `auto` for float32 on a CPU and the
            checkpoint's own type on a CUDA device.
        base_quantisation: What the base's linear layers are kept as, by bitsandbytes: `int8`, `nf4`, or `none`.
        rope: How the base's rotary positions are scaled for a context longer than its own: `linear`, `ntk`,
            `ntk-by-parts`, `yarn` or `llama3`, with `-<N>k` for a context of N * 1024; `auto` leaves them as they are.
        context_length: Most positions of a text; 0 for what the base has. With a `rope` that does not say it, the
            longer context.
        name: How it calls itself, unique in its registry; empty for one made from its address.
        registry: Address of the registry it announces itself to and pulls packages from.
        admin_token_file: Secret file with the token that loading and unloading needs; None leaves them open.
        worker_token_file: Secret file with the token it announces itself with; None where the registry asks for none.
        device: Where it computes: `cpu`, `cuda:0`, or `auto` for the first CUDA device if there is one.
        half: Hold the weights of linear models, linear SVMs and dense networks in float16, which needs a CUDA device:
            half the memory, and answers that move by some 2**-11 of their largest term.
        budget_bytes: Memory for experts on that device; 0 for a share of what is free at start, when the base is there.
            On a CUDA device adapter experts take `host_bytes` instead.
        host_bytes: Host memory for adapter experts of a worker with a CUDA device, page-locked; 0 for a share of what
            is available at start. Not used on a CPU, where host and device are one.
        slab_bytes: Memory on that device that the keys and values of texts and the experts that compute have together,
            each as much as the other leaves; 0 for a share, as `budget_bytes`.
        kv_dtype: What keys and values are stored as: `int8`, or `auto` for what the base computes in.
        cuda_graphs: Record steps in which every text gets one token, on a CUDA device in half precision, and play them
            again; otherwise every step is computed as it comes, which is slower and easier to look into.
        adapters: What experts' A and B are held as: `int8`, or `auto` for float32 or bfloat16, as the base computes.
        cache_bytes: Disk for the cache of packages; what was used longest ago makes room, what is in memory stays.
        compute_threads: Threads of one pass on a CPU; 0 for half of the cores.
        workers_on_machine: Workers that share this machine and its device: what is chosen for `budget_bytes` and
            `compute_threads` is divided by it.
        allow_unsigned: Admit packages that nobody trusted has signed. Logged at start, counted per use.
        allow_expired_licences: Load packages whose licence has ended. Logged at start.
        credentials: Secret files with what opens encrypted packages, by `publisher/name` or digest, which goes first:
            4096 at most. Read at start.
        preload: Digests of packages to load at start; they stay in memory.
        queue_max: Requests waiting for the device; the next one is refused as `QUEUE_FULL`.
        step_tokens: Most tokens that one step of the text engine computes: a long prompt holds up others no longer.
        sequences_max: Texts that run at once; others wait. Those that wait for a slow reader do not count.
        text_queue_max: Texts that wait for the engine; the next one is refused as `QUEUE_FULL`.
        ageing_seconds: How much waiting a level of a text's priority is worth.
        session_seconds: How long the keys and values of a session's last turn are kept in memory while nobody needs
            their place; 0 for no longer than those of other texts.
        loading_max: Packages being loaded; the next one is refused as `QUEUE_FULL`.
        in_flight_max: Calls answered at once; the next one is refused as `QUEUE_FULL`.
        default_deadline_seconds: Deadline of a call that brings none.
        text_deadline_seconds: Longest deadline of a text, and that of one that brings none.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    data_dir: Path
    trust_dir: Path
    host: str = "127.0.0.1"
    port: int = 50054
    advertise: str = ""
    bases_dir: Path | None = None
    base: str = ""
    base_dtype: str = "auto"
    base_quantisation: str = "none"
    rope: str = AS_CONFIGURED
    context_length: int = 0
    name: str = ""
    registry: str = "127.0.0.1:50052"
    admin_token_file: Path | None = None
    worker_token_file: Path | None = None
    device: str = "auto"
    half: bool = False
    budget_bytes: int = 0
    host_bytes: int = 0
    slab_bytes: int = 0
    kv_dtype: str = "auto"
    cuda_graphs: bool = True
    adapters: str = "auto"
    cache_bytes: int = 10 * 2**30
    compute_threads: int = 0
    workers_on_machine: int = 1
    allow_unsigned: bool = False
    allow_expired_licences: bool = False
    credentials: dict[str, CredentialFile] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    queue_max: int = 512
    step_tokens: int = 512
    sequences_max: int = 32
    text_queue_max: int = 256
    ageing_seconds: float = 10.0
    session_seconds: float = 600.0
    loading_max: int = 1024
    in_flight_max: int = 1024
    default_deadline_seconds: float = 30.0
    text_deadline_seconds: float = 600.0
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.name:
            try:
                check_name(self.name, "worker name")
            except HocketError as error:
                raise ValueError(error.message) from error
        if _DEVICE.fullmatch(self.device) is None:
            raise ValueError(f"device must be auto, cpu or cuda:<number>, not {self.device!r}")
        for setting, values in _CHOICES.items():
            _check_choice(setting, getattr(self, setting), values)
        check_rope(self.rope, self.context_length)
        if self.base and self.bases_dir is None:
            raise ValueError("base names one of the bases in bases_dir, which is not set")
        for setting in _NOT_NEGATIVE:
            if not (value := getattr(self, setting)) >= 0:
                raise ValueError(f"{setting} must be 0 or more, not {value}")
        check_counts(self, "queue_max", "loading_max", "in_flight_max", "workers_on_machine")
        check_counts(self, "step_tokens", "sequences_max", "text_queue_max")
        check_call_seconds(self, "default_deadline_seconds", "text_deadline_seconds", "ageing_seconds")
        check_addresses(self.credentials)
        for digest in self.preload:
            if not is_digest(digest):
                raise ValueError(f"preload names packages by sha256:<64 hex digits>, not {digest!r}")


def _check_choice(setting: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{setting} must be one of {', '.join(values)}, not {value!r}")
