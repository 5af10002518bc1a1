"""A catalogue larger than memory: 1,000 packages of which 100 fit, cold loads, and the router's view of them all.

The services run in this process over the local channel, so that a worker's own counters and the router's directory can
be read. What is measured is real: packages are signed, published, fetched, verified and run.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import statistics
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import uvloop
from prometheus_client import REGISTRY

from benchmarks.report import command_line, record
from examples.publishing import Publisher
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.registry import RegistryClient
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers, Tokens
from hocket.telemetry.logs import configure_logs
from services.expert_worker.app import WorkerApp
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from services.router.app import RouterApp
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from services.router.directory import Directory

PACKAGES: Final = 1_000
RESIDENT: Final = 100
FEATURES: Final = 64
EXPONENTS: Final = (1.1, 1.5, 2.0)
_DECIDING_EXPONENT: Final = 2.0
_HIT_RATE_BUDGET: Final = 0.95
_COLD_BUDGET_MS: Final = 100.0
_CALLS: Final = 10_000
_CALLERS: Final = 8
_LOADS: Final = 100
_READ_SECONDS: Final = 1.0
_SWAPS: Final = 50
_PUBLISHERS: Final = 4


class Place:
    """Where services find each other inside this process.

    Args:
        folder: For their data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._local = {"no aggregator": Handlers()}
        self.channels = Channels(self._local)
        self.publisher = Publisher.trusted_in(folder, "bench")

    @asynccontextmanager
    async def running(self, name: str, app: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - one of the services' apps
        """Run an app under `local:<name>` until the block ends."""
        self._local[name] = app.handlers
        await app.start()
        try:
            yield app
        finally:
            await app.stop()

    def worker(self, name: str, **settings: Any) -> WorkerApp:  # noqa: ANN401 - any setting
        """A worker with a folder of its own."""
        chosen = WorkerSettings(
            self.folder / name, self.folder / "trust", registry="local:registry", name=name, device="cpu", **settings
        )
        return WorkerApp(chosen, self.channels, f"local:{name}")

    def router(self) -> RouterApp:
        """A router that nobody asks."""
        return RouterApp(RouterSettings(registry="local:registry", aggregators=("local:no aggregator",)), self.channels)

    def client(self, worker: str) -> ExpertWorkerClient:
        """Of a worker."""
        return ExpertWorkerClient(self.channels.get(f"local:{worker}"))


def loads_of() -> float:
    """Packages brought into memory so far, by the worker's own count."""
    return REGISTRY.get_sample_value("hocket_expert_loads_total", {"outcome": "OK"}) or 0.0


def zipf(random: np.random.Generator, exponent: float, count: int) -> NDArray[np.int64]:
    """Packages as they are asked for: the probability of the k-th most popular is proportional to k ** -exponent."""
    weights = np.arange(1, PACKAGES + 1, dtype=np.float64) ** -exponent
    return random.permutation(PACKAGES)[random.choice(PACKAGES, size=count, p=weights / weights.sum())]


async def shared(work: Iterable[Any], callers: int, do: Callable[[Any], Awaitable[Any]]) -> float:
    """Seconds in which so many callers get through the work."""
    left = iter(work)

    async def caller() -> None:
        for item in left:
            await do(item)

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return time.perf_counter() - begin


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds."""
    return statistics.median(seconds) * 1e3, float(np.quantile(seconds, 0.99)) * 1e3


async def publish(place: Place, registry: RegistryClient, random: np.random.Generator) -> tuple[list[str], float]:
    """Sign and publish the catalogue: digests, and packages per second."""
    files = [
        apr.write(m.LinearRegression(random.standard_normal(FEATURES).astype(np.float32), 1.0), created_at=str(number))
        for number in range(PACKAGES)
    ]
    digests = [""] * PACKAGES

    async def one(number: int) -> None:
        digests[number] = await place.publisher.publish(registry, files[number], f"e{number}")

    return digests, PACKAGES / await shared(range(PACKAGES), _PUBLISHERS, one)


async def traces(
    place: Place, digests: list[str], random: np.random.Generator, *, save: bool, notes: dict[str, Any]
) -> None:
    """Hit rates of Zipf traces on a worker whose budget holds a tenth of the catalogue."""
    tensor = matrix_to_tensor(random.standard_normal((1, FEATURES)).astype(np.float32))
    budget_bytes = RESIDENT * (4 * FEATURES + 8)
    rows = []
    async with place.running("small", place.worker("small", budget_bytes=budget_bytes)) as worker:
        client = place.client("small")
        seconds: list[float] = []

        async def ask(digest: str) -> None:
            begin = time.perf_counter()
            await client.run_tensor(digest, tensor, 30.0)
            seconds.append(time.perf_counter() - begin)

        await shared(digests, _CALLERS, ask)
        notes["first use of each package, fetched from the registry"] = f"{statistics.median(seconds) * 1e3:.1f} ms"
        for exponent in EXPONENTS:
            trace = zipf(random, exponent, 2 * _CALLS)
            await shared((digests[number] for number in trace[:_CALLS]), _CALLERS, ask)
            seconds.clear()
            before = loads_of()
            total = await shared((digests[number] for number in trace[_CALLS:]), _CALLERS, ask)
            hit_rate = 1 - (loads_of() - before) / _CALLS
            p50_ms, p99_ms = quantiles(seconds)
            resident = len(worker.residency.packages)
            rows.append(
                {
                    "exponent": f"{exponent:g}",
                    "hit rate %": 100 * hit_rate,
                    "calls/s": _CALLS / total,
                    "p50 ms": p50_ms,
                    "p99 ms": p99_ms,
                    "resident": float(resident),
                }
            )
            if exponent == _DECIDING_EXPONENT:
                notes[f"exponent {exponent:g}"] = (
                    f"{100 * hit_rate:.2f} % hits of a budget of {100 * _HIT_RATE_BUDGET:g} %"
                )
    notes["trace"] = (
        f"{_CALLS:,} RunTensor calls after as many to warm up, {_CALLERS} at once; {PACKAGES:,} packages, room for "
        f"{RESIDENT}; a hit is a call that no load was begun for, by the worker's own count of loads"
    )
    record("catalogue-traces", rows, notes, save=save)


def full_tree(random: np.random.Generator, depth: int) -> m.Tree:
    """A classifier's tree in which every path has the same number of splits."""

    def preorder(level: int) -> list[bool]:
        return [True, *preorder(level - 1), *preorder(level - 1)] if level else [False]

    is_split = np.array(preorder(depth))
    index, sizes = np.arange(len(is_split)), np.zeros(len(is_split), np.int64)
    for node in index[::-1]:
        sizes[node] = 1 + (2 * sizes[node + 1] if is_split[node] else 0)
    right = np.where(is_split, index + 1 + np.append(sizes[1:], 0), -1)
    return m.Tree(
        np.where(is_split, random.integers(FEATURES, size=len(index)), -1),
        np.where(is_split, random.standard_normal(len(index)), 0).astype(np.float32),
        np.where(is_split, index + 1, -1),
        right,
        np.where(is_split, 0, random.integers(10, size=len(index))),
        np.where(is_split, 0, 1),
    )


def ten_megabytes(random: np.random.Generator) -> dict[str, bytes]:
    """Uncompressed packages of about 10 MB."""

    def floats(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    experts = tuple(m.LinearRegression(floats(6500), 1.0) for _ in range(200))
    mixture = m.MixtureOfExperts(experts, m.SoftmaxGate(floats(6500, 200)), m.MoeConfig(2))
    trees = tuple(m.DecisionTreeClassifier(full_tree(random, 12), n_features=FEATURES) for _ in range(68))
    models: dict[str, m.Model] = {
        "mixture of 200 linear experts": mixture,
        "k-means, 256 centroids": m.KMeans(256, floats(256, 10_000)),
        "forest of 557,000 nodes": m.RandomForestClassifier(trees, len(trees), n_features=FEATURES),
    }
    return {name: apr.write(model, compression="none", created_at="1") for name, model in models.items()}


async def cold(place: Place, registry: RegistryClient, random: np.random.Generator, *, save: bool) -> None:
    """Loads of packages that are in the worker's cache, beside what they cannot do without."""
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}
    async with place.running("large", place.worker("large", budget_bytes=2**28)):
        client = place.client("large")
        for name, data in ten_megabytes(random).items():
            digest = await place.publisher.publish(registry, data, f"large{len(rows)}")
            path = place.folder / "large" / "cache" / "sha256" / digest[7:9] / digest[7:]
            seconds: dict[str, list[float]] = {"load": [], "read": [], "hash": []}

            async def load(digest: str = digest) -> None:
                async for _ in client.load(digest):
                    pass

            await load()
            gc.collect()
            gc.freeze()  # the same
            for _ in range(_LOADS):
                await client.unload(digest)
                begin = time.perf_counter()
                await load()
                loaded = time.perf_counter()
                content = path.read_bytes()
                read = time.perf_counter()
                hashlib.sha256(content).digest()
                for part, taken in zip(
                    seconds, (loaded - begin, read - loaded, time.perf_counter() - read), strict=True
                ):
                    seconds[part].append(taken)
            p50_ms, p99_ms = quantiles(seconds["load"])
            rows.append(
                {
                    "package": name,
                    "MB": len(data) / 1e6,
                    "cold load p50 ms": p50_ms,
                    "p99 ms": p99_ms,
                    "floor: read ms": quantiles(seconds["read"])[0],
                    "floor: sha256 ms": quantiles(seconds["hash"])[0],
                }
            )
            notes[name] = f"p99 {p99_ms:.0f} ms of a budget of {_COLD_BUDGET_MS:g} ms"
    notes["load"] = f"LoadExpert of a stored .apr in the worker's cache until READY, {_LOADS} times"
    record("catalogue-cold", rows, notes, save=save)


async def snapshots(directory: Directory, digests: list[str], *, save: bool) -> None:
    """What reading the router's view costs while it is swapped, and what a swap costs."""
    rows = []
    gc.collect()
    gc.freeze()  # as a service does when it has started
    for threads in (1, 4):
        reads = [0] * threads
        stop = threading.Event()

        def read(place: int, reads: list[int] = reads, stop: threading.Event = stop) -> None:
            count = 0
            for digest in itertools.cycle(digests):
                directory.snapshot.resolve(digest)
                count += 1
                if not count % 1000 and stop.is_set():
                    break
            reads[place] = count

        readers = [threading.Thread(target=read, args=(place,)) for place in range(threads)]
        before = directory.snapshot
        begin = time.perf_counter()
        for reader in readers:
            reader.start()
        swaps = 0
        while time.perf_counter() - begin < _READ_SECONDS:
            directory._models_due = True  # noqa: SLF001 - what the feed does when packages change
            await directory._swap()  # noqa: SLF001 - the same
            swaps += 1
            await asyncio.sleep(0.02)
        stop.set()
        for reader in readers:
            reader.join()
        seconds = time.perf_counter() - begin
        assert directory.snapshot is not before  # noqa: S101 - it was swapped
        rows.append({"threads": str(threads), "reads/s": sum(reads) / seconds, "swaps meanwhile": float(swaps)})
    times: dict[bool, list[float]] = {True: [], False: []}
    for models, _ in itertools.product(times, range(_SWAPS)):
        begin = time.perf_counter()
        directory._models_due = models  # noqa: SLF001 - the same
        await directory._swap()  # noqa: SLF001 - the same
        times[models].append(time.perf_counter() - begin)
    notes = {
        "read": "directory.snapshot.resolve(digest), no lock but the interpreter's own, which the swap needs too",
        f"a swap with {len(directory.snapshot.packages):,} packages": "p50 {:.1f} ms, p99 {:.1f} ms".format(
            *quantiles(times[True])
        ),
        "a swap when only workers have changed": "p50 {:.3f} ms, p99 {:.3f} ms".format(*quantiles(times[False])),
    }
    record("catalogue-snapshot", rows, notes, save=save)


async def run(folder: Path, *, save: bool) -> None:
    """The whole benchmark."""
    place = Place(folder)
    random = np.random.default_rng(0)
    async with (
        place.running("registry", RegistryApp(RegistrySettings(folder / "registry", folder / "trust"), Tokens())),
        place.running("router", place.router()) as router,
    ):
        client = RegistryClient(place.channels.get("local:registry"))
        digests, per_second = await publish(place, client, random)
        async with asyncio.timeout(30):
            while len(router.directory.snapshot.packages) < PACKAGES:  # noqa: ASYNC110 - the feed brings them
                await asyncio.sleep(0.02)
        notes = {"publishing": f"{per_second:.0f} packages per second, signed and on disk, {_PUBLISHERS} at once"}
        await traces(place, digests, random, save=save, notes=notes)
        await snapshots(router.directory, digests, save=save)
        await cold(place, client, random, save=save)
    await place.channels.close()


def main() -> None:
    """Measure; `--no-save` only prints."""
    arguments = command_line(__doc__).parse_args()
    configure_logs("warning")
    with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
        uvloop.run(run(Path(folder), save=not arguments.no_save))


if __name__ == "__main__":
    main()
