"""What the benchmarks of the text engine share: a base of random weights, adapters for it, and an engine around them.

Weights are random and texts mean nothing, but the arithmetic, the memory traffic and the packages are those of a real
base with real adapters. `qwen3-0.6b` has the sizes of that model; `small` shows what does not shrink with the model.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
import transformers
from safetensors.numpy import save

from benchmarks.report import command_line, record
from examples.text.random_base import write_base
from hocket.bases import BaseModel
from hocket.packages import Policy, TrustRoots, open_package
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.expert.writer import draft_manifest, gather, pretty, write_archive
from hocket.telemetry.logs import configure_logs
from services.expert_worker.device import compute_threads
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.base import Serving, open_base
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.expert import AdapterExpert
from services.expert_worker.engine.graphs import Graphs, can_be_recorded, cuda_recorder
from services.expert_worker.engine.layout import RowLayout
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, Pages, default_page_positions
from services.expert_worker.engine.runner import NoMixer, Runner
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.slab import ALIGNMENT_BYTES, Slab
from services.expert_worker.loader import place, prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import Mixture

RANK: Final = 16
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DISTINCT: Final = 32
"""Experts of a batch in which everybody has one."""
COMPOSED: Final = 10
"""Experts of one answer."""
STEP_TOKENS: Final = 512
"""As a worker has it where nobody says otherwise."""
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "small": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_UNMEASURED: Final = (
    "the budgets are for CUDA with graphs; this run is on a CPU, and no figure in it was measured on a GPU: "
    "`make bench-gpu` measures the same there"
)

Row: TypeAlias = "dict[str, Any]"
Measured: TypeAlias = "tuple[list[Row], dict[str, str]]"
"""Rows, and notes below them."""


@dataclass(frozen=True, slots=True, eq=False)
class Rig:
    """A base on a device, and what is measured there.

    Attributes:
        shape: Its name.
        folder: The base's, with room beside it.
        base: On the device; in bfloat16 on a CUDA device.
        threads: Of a step on a CPU.
        rounds: Per side; the median counts.
    """

    shape: str
    folder: Path
    base: Base
    threads: int
    rounds: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @property
    def is_quick(self) -> bool:
        """Whether there is time for long texts."""
        return self.shape != "qwen3-0.6b" or self.device.type == "cuda"

    @property
    def page_positions(self) -> int:
        """Positions of a KV page."""
        return default_page_positions(self.device)

    def prompt(self, count: int) -> tuple[int, ...]:
        """So many tokens, others each time."""
        return tuple(np.random.default_rng().integers(3, self.base.vocabulary_size // 2, count).tolist())

    def seconds(self, run: Callable[[], object]) -> float:
        """What something takes, until the device has done it as well."""
        synchronise(self.device)
        begin = time.perf_counter()
        run()
        synchronise(self.device)
        return time.perf_counter() - begin

    def compared(self, steps: Mapping[str, Callable[[], object]], rounds: int | None = None) -> dict[str, float]:
        """The median seconds of each, in turns; what the first round takes does not count."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range((rounds or self.rounds) + 1):
            for name, step in steps.items():
                times[name].append(self.seconds(step))
        return {name: statistics.median(each[1:]) for name, each in times.items()}


def open_rig(shape: str, sizes: dict[str, Any], folder: Path, device: torch.device, threads: int, rounds: int) -> Rig:
    """Write a base of random weights and open it."""
    return Rig(shape, folder, opened(write_base(folder / f"base-{shape}", sizes), device), threads, rounds)


def opened(path: Path, device: torch.device) -> Base:
    """A base as a worker would open it; what was written in float32 is served in bfloat16 on a CUDA device."""
    serving = Serving(dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return open_base(path, expected_digest=None, device=device, serving=serving)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def adapter_files(base: Base, folder: Path, seed: int) -> dict[str, bytes]:
    """A LoRA for every projection: the files of a package; as PEFT reads it, in the folder."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, linear in base.projections.items():
        if name.rpartition(".")[2] in TARGETS:
            shapes = {"A": (RANK, linear.in_features), "B": (linear.out_features, RANK)}
            for part, shape in shapes.items():
                tensor = random.standard_normal(shape, np.float32) * 0.02
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": list(TARGETS), "base_model_name_or_path": base.model.name,
    }  # fmt: skip
    found = {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
    facts = AdapterConfig(AdapterKind.LORA, rank=RANK, alpha=RANK, target_modules=TARGETS)
    manifest = draft_manifest(
        facts, BaseModel(base.model.name, base.model.digest), name=f"expert-{seed}", version="1.0.0"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return gather(pretty(manifest), found.get, found)


def load(data: bytes, base: Base) -> AdapterExpert:
    """Everything between the bytes of a package and an expert that waits in host memory, as a worker does it."""
    package = open_package(data, trust=TrustRoots(), policy=Policy(allow_unsigned=True), now=datetime.now(UTC))
    (expert,) = place(prepare(package, base), base.device)
    if not isinstance(expert, AdapterExpert):
        raise TypeError("not an adapter")
    return expert


def experts_of(rig: Rig, count: int) -> list[AdapterExpert]:
    """So many, all different, in host memory; their folders are `expert-0`, ..."""
    return [
        load(write_archive(adapter_files(rig.base, rig.folder / f"expert-{seed}", seed), compression="zstd"), rig.base)
        for seed in range(count)
    ]


def another(expert: AdapterExpert) -> AdapterExpert:
    """The same numbers under a digest of its own: an expert that was never there."""
    return replace(expert, digest=f"{expert.digest} {time.perf_counter()}")


def arena_for(base: Base, count: int) -> Arena:
    """Room for so many experts to compute; pages are elsewhere."""
    layout = RowLayout(base.projections, base.dtype)
    layer_bytes = count * RANK * layout.row_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    slab = Slab(layout.layer_count, layer_bytes, page_bytes=0, row_bytes=layout.row_bytes, device=base.device)
    return Arena(layout, slab, outside_rows=RANK, device=base.device)


class _PlainMixer(NoMixer):
    """Composes nothing, in recorded steps as well."""

    def begin_standing(self, mixtures: Sequence[Mixture]) -> Hashable:
        """See `StandingMixer`: all steps of one size are alike."""
        del mixtures
        return None

    def forget(self, likeness: Hashable) -> None:
        """See `StandingMixer`."""


def runner_for(base: Base, pool: KvPool, arena: Arena | None, *, rows_max: int) -> Runner:
    """Computes passes; on a CUDA device those that decode are recorded, as in a worker.

    Args:
        base: The model.
        pool: Where keys and values lie.
        arena: Where experts compute; None for the base alone, by layers that were never wrapped.
        rows_max: Most sequences of a recorded step.
    """
    mixer = _PlainMixer() if arena is None else Mixer(base.causal_lm, base.projections, arena)
    graphs = None
    if can_be_recorded(pool):
        graphs = Graphs(base, pool, mixer, rows_max=rows_max, record=cuda_recorder(base.device))
    return Runner(base, pool, mixer, graphs)


def pool_for(base: Base, page_count: int) -> KvPool:
    """Room for so many pages, the scratch page not counted."""
    return KvPool(
        base.kv_shape,
        page_count=SCRATCH_PAGES + page_count,
        page_positions=default_page_positions(base.device),
        dtype=base.dtype,
        device=base.device,
    )


@asynccontextmanager
async def running(
    base: Base, arena: Arena | None, *, threads: int, positions: int, sequences_max: int = 64
) -> AsyncIterator[Engine]:
    """An engine at work until the block ends.

    Args:
        base: What it computes.
        arena: Where experts compute; None for an engine that knows of none.
        threads: Of a step on a CPU.
        positions: What its KV pages hold.
        sequences_max: Answers that run at once.
    """
    pool = pool_for(base, -(-positions // default_page_positions(base.device)))
    engine = Engine(
        runner_for(base, pool, arena, rows_max=sequences_max),
        Pages(pool.page_count),
        page_positions=pool.page_positions,
        context_length=base.context_length,
        room=arena or arena_for(base, 1),
        tokenizer=base.tokenizer,
        limits=EngineLimits(STEP_TOKENS, sequences_max, 256, threads=threads),
    )
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def measure_shapes(description: str | None, name: str, measure: Callable[[Rig], Awaitable[Measured]]) -> None:
    """Run a benchmark of the engine from the command line, for each shape; `--no-save` only prints.

    Args:
        description: What is measured.
        name: What results are kept as, with the shape and the device behind it.
        measure: One shape.
    """
    parser = command_line(description, rounds=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("all", *SHAPES), default="all")
    parser.add_argument("--threads", type=int, default=compute_threads(0), help="threads of each side on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    configure_logs("warning")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        about, suffix = {"device": f"{torch.cuda.get_device_name(device)}, bfloat16"}, "-gpu"
    else:
        about, suffix = {"device": f"cpu, {arguments.threads} threads, float32", "GPU": _UNMEASURED}, ""
    for shape in SHAPES if arguments.shape == "all" else (arguments.shape,):
        rounds = arguments.rounds if shape == "small" or device.type == "cuda" else 1
        with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
            rig = open_rig(shape, SHAPES[shape], Path(folder), device, arguments.threads, rounds)
            gc.collect()
            gc.freeze()  # or every look for garbage goes through all that transformers has made
            rows, notes = await measure(rig)
            gc.unfreeze()
        record(f"{name}-{shape}{suffix}", rows, {**about, **notes}, save=not arguments.no_save)
        del rig
        gc.collect()
