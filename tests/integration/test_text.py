"""Text, end to end: signed adapter experts and a tiny base, from a client's request to its last event."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from prometheus_client import REGISTRY
from safetensors.numpy import load_file

from hocket import known_bases
from hocket.base_folder import base_digest
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.router import Constraint, TextPlanned
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.local import LocalChannel
from hocket.v1 import expert_worker_pb2, plan_pb2, text_pb2
from tests.bases import CONTEXT, VOCABULARY, tiny_base
from tests.builders import apr_bytes
from tests.deployments import Deployment, deployed, settings_in
from tests.experts import expert_package
from tests.signing import ACME_ID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from services.expert_worker.app import WorkerApp

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # PEFT asks transformers for what it is about to rename
)

ROOT = Path(__file__).parents[2]
KINDS = ["one process", "four servers"]
SECONDS = 30.0
PROMPT = "select name from people"
MODULES = {"lora": ("q_proj", "up_proj"), "ia3": ("k_proj", "down_proj")}
BASE = "tiny-qwen3"
Weights = dict[str, float]


@dataclass
class Lab:
    """A base, two experts for it as packages, and the same as transformers and PEFT compute them.

    Attributes:
        folder: Of the base.
        packages: By name.
        tensors: Of each package, by name.
        model: The base.
    """

    folder: Path
    packages: dict[str, bytes]
    tensors: dict[str, dict[str, Any]]
    model: Any
    tokenizer: Any
    peft: dict[str, Any]
    known: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    def digest(self, name: str) -> str:
        return digest_of(self.packages[name])

    def greedy(self, weights: Weights, count: int, prompt: str = PROMPT) -> list[int]:
        """The tokens that transformers answers, with PEFT's adapter or a dense merge."""
        key = (*sorted(weights.items()), count, prompt)
        if key not in self.known:
            self.known[key] = self._greedy(weights, count, prompt)
        return self.known[key]

    def _greedy(self, weights: Weights, count: int, prompt: str) -> list[int]:
        import torch  # noqa: PLC0415 - with transformers seconds, and few tests want it

        (lone,) = weights if [*weights.values()] == [1.0] else ("",)
        model = self.peft[lone] if lone else self._merged(weights)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([self.tokenizer.encode(text)])
        with torch.no_grad():
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                suppress_tokens=[*range(len(self.tokenizer), VOCABULARY)],  # ids without a token
            )
        return [int(token_id) for token_id in answer[0, ids.shape[1] :]]

    def _merged(self, weights: Weights) -> Any:
        import torch  # noqa: PLC0415

        model = copy.deepcopy(self.model)
        for name, weight in weights.items():
            for key, tensor in self.tensors[name].items():
                module, _, part = key.removeprefix("base_model.model.").partition(".ia3_l")
                values = torch.from_numpy(tensor)
                with torch.no_grad():
                    if not part and ".ia3_l" in key:
                        model.get_submodule(module).weight.mul_(1 + weight * (values - 1))
                    elif key.endswith(".lora_A.weight"):
                        module = module.removesuffix(".lora_A.weight")
                        b = torch.from_numpy(self.tensors[name][key.replace("lora_A", "lora_B")])
                        model.get_submodule(module).weight.add_(2 * weight * (b @ values))  # alpha is twice the rank
        return model


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    import torch  # noqa: PLC0415
    from peft import IA3Config, LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tiny_base(tmp_path_factory.mktemp("bases") / BASE)
    configs: dict[str, Any] = {
        "lora": LoraConfig(
            r=4, lora_alpha=8, target_modules=[*MODULES["lora"]], init_lora_weights=False, task_type="CAUSAL_LM"
        ),
        "ia3": IA3Config(
            target_modules=[*MODULES["ia3"]],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    }
    lab = Lab(folder, {}, {}, AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), {})
    for name, config in configs.items():
        lab.peft[name] = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        saved = tmp_path_factory.mktemp(name)
        lab.peft[name].save_pretrained(saved)
        lab.tensors[name] = dict(load_file(saved / "adapter_model.safetensors"))
        written = json.loads((saved / "adapter_config.json").read_text())
        lab.packages[name] = packaged(lab, name, name, config=written)
    return lab


def packaged(lab: Lab, name: str, kind: str, tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A package with the tensors of one of the lab's experts; changes are those of `expert_files`."""
    return expert_package(
        name,
        kind=kind,
        rank=4,
        modules=MODULES[kind],
        base=BASE,
        tensors=lab.tensors[kind] if tensors is None else tensors,
        **changes,
    )


def constrained(lab: Lab, name: str, **constraints: Any) -> bytes:
    every = {"max_chain": 10, "load_order": 6, "incompatible_with": [], "requires": [], **constraints}
    return packaged(lab, name, "ia3", manifest={"constraints": every})


@dataclass
class Text:
    """An answer in text.

    Attributes:
        plan: Who computes.
        start: What is computed.
        deltas: As they came.
        finish: How it ended.
    """

    plan: text_pb2.TextPlan = field(default_factory=text_pb2.TextPlan)
    start: text_pb2.TextStart = field(default_factory=text_pb2.TextStart)
    deltas: list[text_pb2.TextDelta] = field(default_factory=list)
    finish: text_pb2.TextFinish = field(default_factory=text_pb2.TextFinish)

    def add(self, event: Any) -> None:
        match event:
            case TextPlanned():
                self.plan = event.plan
            case text_pb2.TextStart():
                self.start = event
            case text_pb2.TextDelta():
                self.deltas.append(event)
            case text_pb2.TextFinish():
                self.finish = event

    def take(self, event: text_pb2.TextEvent) -> None:
        self.add(getattr(event, event.WhichOneof("event") or ""))

    @property
    def ids(self) -> list[int]:
        return [token.id for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


@dataclass
class Setting:
    """A deployment with a base, and the lab's experts published.

    Attributes:
        deployment: Its clients.
        lab: What it should answer.
        worker: Asks its worker, without anybody in between.
    """

    deployment: Deployment
    lab: Lab
    worker: ExpertWorkerClient

    @property
    def app(self) -> WorkerApp:
        assert self.deployment.app is not None
        return self.deployment.app

    async def publish(self, *names: str) -> None:
        for name in names:
            await self.publish_data(self.lab.packages[name], name)

    async def publish_data(self, data: bytes, name: str) -> str:
        return await self.deployment.publish(data, f"acme/{name}@1.0.0")

    def generate(self, weights: Weights | None = None, count: int = 24, **options: Any) -> Any:
        """Stream an answer from the router."""
        options = {"prompt": PROMPT, "max_tokens": count, "timeout_seconds": SECONDS, **options}
        return self.deployment.router.generate(experts=weights or {}, **options)

    async def answer(self, weights: Weights | None = None, count: int = 24, **options: Any) -> Text:
        text = Text()
        async for event in self.generate(weights, count, **options):
            text.add(event)
        return text

    async def refused(self, weights: Weights | None = None, count: int = 24, **options: Any) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await self.answer(weights, count, **options)
        return refusal.value

    def job(self, *experts: tuple[str, float], **sampling: Any) -> text_pb2.TextJob:
        """A job as the aggregator sends it."""
        plan = text_pb2.TextPlan(
            mode=plan_pb2.MODE_ADAPTER_MIX if len(experts) > 1 else plan_pb2.MODE_PASS,
            base=base_digest(self.lab.folder),
            experts=[text_pb2.TextExpert(digest=digest, weight=weight) for digest, weight in experts],
            seed=1,
        )
        chosen = text_pb2.Sampling(**{"max_tokens": 8, **sampling})
        return text_pb2.TextJob(plan=plan, input=text_pb2.TextInput(prompt=PROMPT), sampling=chosen)

    async def run(self, job: text_pb2.TextJob, seconds: float = SECONDS) -> Text:
        text = Text()
        async for event in self.worker.run_text(job, seconds, print):
            text.take(event)
        return text

    async def run_refused(self, job: text_pb2.TextJob) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await self.run(job)
        return refusal.value

    async def engine(self) -> expert_worker_pb2.TextEngine:
        return (await self.worker.list_experts()).engine

    async def until_idle(self) -> None:
        """Until nothing is computed, and nothing held: within a few steps after the last answer has ended."""
        async with asyncio.timeout(5):
            while True:
                listed = await self.worker.list_experts()
                in_use = [expert.digest for expert in listed.experts if expert.in_use_count]
                engine = listed.engine
                if not (in_use or engine.running_count or engine.waiting_count or engine.kv_used_page_count):
                    return
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(lab: Lab, folder: Path, kind: str = KINDS[0], **changes: Any) -> AsyncIterator[Setting]:
    async with deployed(kind, folder, base=lab.folder, **changes) as deployment:
        assert deployment.app is not None
        worker = ExpertWorkerClient(LocalChannel(deployment.app.handlers))
        yield Setting(deployment, lab, worker)


@pytest.fixture
async def setting(lab: Lab, tmp_path: Path) -> AsyncIterator[Setting]:
    async with serving(lab, tmp_path) as setting:
        await setting.publish("lora", "ia3")
        yield setting
        await setting.until_idle()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - it happens in another thread
            await asyncio.sleep(0.005)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


MIXTURES: Sequence[Weights] = ({}, {"lora": 1.0}, {"ia3": 1.0}, {"lora": 0.7, "ia3": 0.3}, {"lora": -0.5, "ia3": 2.0})


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_gets_what_transformers_and_peft_compute(kind: str, lab: Lab, tmp_path: Path) -> None:
    async with serving(lab, tmp_path, kind) as setting:
        await setting.publish("lora", "ia3")
        for weights in MIXTURES:
            text = await setting.answer(weights)
            assert text.ids == lab.greedy(weights, 24), weights
            assert text.text == lab.tokenizer.decode(text.ids, skip_special_tokens=True)
            several = plan_pb2.MODE_ADAPTER_MIX if len(weights) > 1 else plan_pb2.MODE_PASS
            assert (text.plan.mode, text.plan.base) == (several, base_digest(lab.folder))
            assert {expert.name: expert.weight for expert in text.plan.experts} == {
                f"acme/{name}@1.0.0": weight for name, weight in weights.items()
            }
            assert all(list(delta.contributions) == [*weights.values()] for delta in text.deltas)
        await setting.until_idle()


async def test_mixtures_in_one_batch_stream_what_each_streams_alone(setting: Setting) -> None:
    alone = [await setting.answer(weights, 60) for weights in MIXTURES]
    rows = counted("hocket_batch_rows_sum")
    passes = counted("hocket_batch_rows_count")
    together = await asyncio.gather(*(setting.answer(weights, 60) for weights in MIXTURES))
    rows, passes = counted("hocket_batch_rows_sum") - rows, counted("hocket_batch_rows_count") - passes
    assert rows > 1.5 * passes, "they were not computed together"
    assert [text.ids for text in together] == [text.ids for text in alone]
    assert [text.text for text in together] == [text.text for text in alone]


async def test_an_answer_says_how_it_was_made_and_what_it_took(setting: Setting) -> None:
    prompts, tokens = counted("hocket_text_prompt_tokens_total"), counted("hocket_text_tokens_total")
    first = counted("hocket_text_first_token_seconds_count")
    text = await setting.answer({"lora": 1.0}, 8, top_logprobs=3, seed=7, temperature=0.5, stop=["never"])
    start, finish = text.start, text.finish
    assert (start.worker, start.prompt_template, start.soft_prompt_token_count) == ("worker", "base", 0)
    assert (start.sampling.seed, start.sampling.temperature, start.sampling.max_tokens) == (7, 0.5, 8)
    assert (start.sampling.top_p, start.sampling.repetition_penalty, list(start.sampling.stop)) == (1.0, 1.0, ["never"])
    assert finish.usage.prompt_token_count == start.prompt_token_count > 0
    assert finish.usage.completion_token_count == len(text.ids) == 8
    assert finish.reason == text_pb2.TEXT_FINISH_REASON_LENGTH
    assert finish.speed.step_count == 8
    assert finish.speed.decode_tokens_per_second > 0
    assert finish.timings.prefill.ToNanoseconds() > 0
    assert finish.speed.step_max.ToNanoseconds() >= finish.speed.step_mean.ToNanoseconds() > 0
    assert all(len(token.top) == 3 for delta in text.deltas for token in delta.tokens)
    assert (await setting.answer({"lora": 1.0}, 8, seed=7, temperature=0.5)).ids == text.ids
    assert counted("hocket_text_prompt_tokens_total") - prompts == 2 * start.prompt_token_count
    assert counted("hocket_text_tokens_total") - tokens == 16
    assert counted("hocket_text_first_token_seconds_count") - first == 2


async def test_what_was_computed_before_is_found_and_changes_nothing(setting: Setting) -> None:
    prompt = "what was said before goes with every turn: " * 3
    hits, before = counted("hocket_text_prefix_hit_tokens_total"), await setting.engine()
    options = {"prompt": prompt, "session": "s", "tenant": "t", "priority": 9}
    first = await setting.answer({"lora": 1.0}, 8, **options)
    again = await setting.answer({"lora": 1.0}, 8, **options)
    others = [
        await setting.answer({"lora": 0.5}, 8, **options),
        await setting.answer({"lora": 1.0}, 8, **options | {"tenant": "u"}),
    ]
    assert [each.finish.usage.cached_prompt_token_count for each in (first, *others)] == [0, 0, 0]
    count = again.finish.usage.cached_prompt_token_count
    engine = await setting.engine()
    size = engine.kv_page_positions
    assert count == (again.start.prompt_token_count - 1) // size * size > size
    assert again.ids == first.ids == others[1].ids == setting.lab.greedy({"lora": 1.0}, 8, prompt)
    assert engine.prefix_hit_token_count - before.prefix_hit_token_count == count
    assert engine.prefix_miss_token_count - before.prefix_miss_token_count == 4 * first.start.prompt_token_count - count
    assert engine.kv_cached_page_count >= count // size
    assert counted("hocket_text_prefix_hit_tokens_total") - hits == count


async def test_a_worker_checks_whose_turn_of_what_it_is_for_itself(setting: Setting) -> None:
    for name, wrong in (("session", "s" * 129), ("tenant", "t" * 65), ("priority", 10)):
        job = setting.job()
        setattr(job, name, wrong)
        refusal = await setting.run_refused(job)
        assert (refusal.reason, refusal.field) == (Reason.BAD_REQUEST, name)


async def test_a_conversation_and_raw_text_are_read_as_the_contract_says(setting: Setting) -> None:
    said = await setting.answer(prompt=None, messages=[{"role": "user", "content": PROMPT}])
    assert said.ids == (await setting.answer()).ids
    raw = await setting.answer(prompt=None, raw=f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    assert (raw.start.prompt_template, raw.ids) == ("none", said.ids)
    long = await setting.answer(prompt="a " * (CONTEXT // 3), count=4)
    assert long.finish.usage.completion_token_count == 4


async def test_the_heaviest_expert_says_how_its_prompts_look_and_how_it_is_sampled(setting: Setting) -> None:
    adapters = {"type": "ia3", "target_modules": [*MODULES["ia3"]]}
    decoding = {"max_new_tokens": 5, "temperature": 0.25, "stop_sequences": ["halt"]}
    lora, ia3 = (packaged(setting.lab, f"my-{kind}", kind) for kind in ("lora", "ia3"))
    with_template = packaged(
        setting.lab,
        "templated",
        "ia3",
        manifest={
            "base_models": [{"name": BASE, "prompt_template": "alpaca", "adapters": [adapters]}],
            "training": training(decoding=decoding),
        },
    )
    for data, name in ((lora, "my-lora"), (ia3, "my-ia3"), (with_template, "templated")):
        await setting.publish_data(data, name)
    text = await setting.answer({"my-lora": 0.5, "templated": -0.6}, max_tokens=None)
    assert text.start.prompt_template == "alpaca"
    assert (text.start.sampling.temperature, text.start.sampling.max_tokens) == (0.25, 5)
    assert "halt" in text.start.sampling.stop
    text = await setting.answer({"my-lora": 0.0, "templated": 0.1}, max_tokens=None)
    assert text.start.prompt_template == "alpaca"
    text = await setting.answer({"templated": 0.0}, count=3)
    assert (text.start.prompt_template, text.start.sampling.temperature) == ("base", 0.0)
    assert not text.start.sampling.stop
    text = await setting.answer({"my-lora": 0.5, "templated": 0.5}, count=3)
    assert (text.start.prompt_template, text.start.sampling.temperature) == ("base", 0.0)


def training(**more: Any) -> dict[str, Any]:
    """The part of a manifest that says how an expert was trained, and wants to be sampled."""
    from tests.experts import expert_manifest  # noqa: PLC0415

    written: dict[str, Any] = expert_manifest(kind="ia3", modules=MODULES["ia3"])["training"]
    return {**written, **more}


class TestConstraints:
    """What an answer must be: by the request, or by the package of the heaviest expert."""

    YES_OR_NO = 'root ::= "yes" | "no"'
    SCHEMA: ClassVar[dict[str, Any]] = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}

    def with_grammar(self, lab: Lab, name: str, grammar: str = YES_OR_NO, *, use: bool = True) -> bytes:
        decoding = {"use_grammar": use, "stop_sequences": ["never"]}
        manifest = {"training": training(decoding=decoding)}
        return packaged(lab, name, "ia3", manifest=manifest, files={"grammar.gbnf": grammar.encode()})

    async def test_the_heaviest_experts_grammar_holds_where_it_is_used(self, setting: Setting) -> None:
        for name, use in (("terse", True), ("free", False)):
            await setting.publish_data(self.with_grammar(setting.lab, name, use=use), name)
        digest = digest_of(self.with_grammar(setting.lab, "terse"))
        alone, leading, led, free = await asyncio.gather(
            setting.answer({"terse": 1.0}, temperature=2.0),
            setting.answer({"lora": 0.4, "terse": -0.6}),
            setting.answer({"lora": 0.6, "terse": 0.4}),
            setting.answer({"free": 1.0}),
        )
        for text in (alone, leading):
            assert text.text in ("yes", "no")
            assert text.finish.reason == text_pb2.TEXT_FINISH_REASON_END
            assert text.start.constraint == text_pb2.AppliedConstraint(
                kind=text_pb2.CONSTRAINT_KIND_GBNF, expert=digest
            )
        for text in (led, free):
            assert not text.start.HasField("constraint")
            assert text.text not in ("yes", "no")

    async def test_a_stop_text_does_not_cut_what_must_be_whole(self, setting: Setting) -> None:
        await setting.publish_data(self.with_grammar(setting.lab, "terse", 'root ::= "it is never so"'), "terse")
        of_package, of_request = await asyncio.gather(
            setting.answer({"terse": 1.0}, 80),
            setting.answer({}, 80, constraint=Constraint(json_schema={"const": "a stop"}), stop=["stop", '"']),
        )
        assert of_package.text == "it is never so"
        assert json.loads(of_request.text) == "a stop"
        for text in (of_package, of_request):
            assert text.finish.reason == text_pb2.TEXT_FINISH_REASON_END
            assert not text.start.sampling.stop

    async def test_a_request_goes_before_packages(self, setting: Setting) -> None:
        await setting.publish_data(self.with_grammar(setting.lab, "terse"), "terse")
        both = {"terse": 0.7, "lora": 0.3}
        schema, grammar, none = await asyncio.gather(
            setting.answer(both, 80, constraint=Constraint(json_schema=self.SCHEMA)),
            setting.answer(both, 80, constraint=Constraint(gbnf='root ::= "perhaps"')),
            setting.answer(both, 80, constraint=Constraint(none=True)),
        )
        assert schema.start.constraint == text_pb2.AppliedConstraint(kind=text_pb2.CONSTRAINT_KIND_JSON_SCHEMA)
        if schema.finish.reason == text_pb2.TEXT_FINISH_REASON_END:
            assert json.loads(schema.text)["n"] in (1, 2)
        assert grammar.text == "perhaps"
        assert grammar.start.constraint == text_pb2.AppliedConstraint(kind=text_pb2.CONSTRAINT_KIND_GBNF)
        assert not none.start.HasField("constraint")
        assert none.ids != grammar.ids

    async def test_a_constraint_that_cannot_be_enforced_is_refused(self, setting: Setting) -> None:
        broken = await setting.publish_data(self.with_grammar(setting.lab, "broken", "root ::="), "broken")
        grammar = await setting.refused(constraint=Constraint(gbnf="root ::= ("))
        assert (grammar.reason, grammar.field) == (Reason.BAD_GRAMMAR, "constraint.gbnf")
        schema = await setting.refused(constraint=Constraint(json_schema={"not": {}}))
        assert (schema.reason, schema.field) == (Reason.BAD_SCHEMA, "constraint.json_schema")
        package = await setting.refused({"broken": 1.0})
        assert (package.reason, package.metadata["digest"]) == (Reason.BAD_GRAMMAR, broken)
        await setting.answer({"broken": 1.0}, 4, constraint=Constraint(none=True))
        await setting.answer({"broken": 0.1, "lora": 1.0}, 4)

    async def test_an_answer_ends_by_the_model_or_by_its_constraint(self, setting: Setting) -> None:
        wanted = Constraint(gbnf=self.YES_OR_NO)
        refusal = await setting.refused(constraint=wanted, ignore_eos=True)
        assert (refusal.reason, refusal.field) == (Reason.BAD_REQUEST, "sampling.ignore_eos")
        assert (await setting.answer(constraint=wanted)).text in ("yes", "no")
        await setting.answer(ignore_eos=True, constraint=Constraint(none=True))


class TestExperts:
    async def test_one_that_does_not_fit_the_base_fails_only_itself(self, setting: Setting) -> None:
        tensors = dict(setting.lab.tensors["lora"])
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        tensors[name] = np.zeros((4, 65), np.float32)
        await setting.publish_data(packaged(setting.lab, "bad", "lora", tensors), "bad")
        good, refusal = await asyncio.gather(
            setting.answer({"lora": 1.0}, 60), setting.refused({"bad": 1.0, "ia3": 0.5})
        )
        assert refusal.reason is Reason.BAD_ADAPTER
        assert "layers.1.mlp.up_proj.lora_A" in refusal.message
        assert good.ids == setting.lab.greedy({"lora": 1.0}, 60)
        await setting.publish_data(packaged(setting.lab, "good", "lora"), "good")
        await setting.answer({"good": 1.0, "ia3": 0.5})

    async def test_one_that_answers_nan_fails_only_itself(self, setting: Setting) -> None:
        tensors = {name: 1e30 * tensor for name, tensor in setting.lab.tensors["lora"].items()}
        await setting.publish_data(packaged(setting.lab, "wild", "lora", tensors), "wild")
        good, refusal = await asyncio.gather(setting.answer({"lora": 1.0}, 60), setting.refused({"wild": 100.0}))
        assert refusal.reason is Reason.BAD_ANSWER
        assert good.ids == setting.lab.greedy({"lora": 1.0}, 60)

    @pytest.mark.parametrize("how", ["yank", "revoke"])
    async def test_one_withdrawn_in_mid_answer_finishes_that_and_begins_no_other(
        self, setting: Setting, how: str
    ) -> None:
        digest = setting.lab.digest("lora")
        text = Text()
        async for event in setting.generate({"lora": 1.0}, 300, ignore_eos=True):
            text.add(event)
            if len(text.deltas) == 3:
                if how == "yank":
                    await setting.deployment.registry.yank(digest)
                else:
                    await setting.deployment.registry.revoke_key(ACME_ID)
                await until(lambda: digest not in setting.app.residency.digests)
                refusal = await setting.run_refused(setting.job((digest, 1.0)))
                assert refusal.reason is {"yank": Reason.YANKED, "revoke": Reason.KEY_REVOKED}[how]
        assert len(text.ids) == 300
        assert text.finish.reason == text_pb2.TEXT_FINISH_REASON_LENGTH
        await setting.until_idle()
        assert setting.lab.digest("lora") not in setting.app.residency.digests
        assert (await setting.refused({"lora": 1.0})).reason in {Reason.YANKED, Reason.KEY_REVOKED}

    async def test_it_is_told_where_each_is(self, setting: Setting) -> None:
        digest = setting.lab.digest("lora")
        async for _ in setting.worker.load(digest):
            pass
        (expert,) = (await setting.worker.list_experts()).experts
        assert (expert.tier, expert.state) == (expert_worker_pb2.TIER_HOST, expert_worker_pb2.EXPERT_STATE_HOST)
        await setting.answer({"lora": 1.0}, 2)
        (expert,) = (await setting.worker.list_experts()).experts
        assert expert.state == expert_worker_pb2.EXPERT_STATE_RESIDENT

    async def test_what_scored_next_is_brought_while_there_is_room(self, setting: Setting) -> None:
        job = setting.job((setting.lab.digest("lora"), 1.0))
        job.hints.extend([setting.lab.digest("ia3"), "no digest"])
        await setting.run(job)
        await until(lambda: setting.lab.digest("ia3") in setting.app.residency.digests)

    async def test_those_that_do_not_go_together_are_refused(self, setting: Setting) -> None:
        friend = await setting.publish_data(constrained(setting.lab, "friend", incompatible_with=["lora"]), "friend")
        needy = await setting.publish_data(constrained(setting.lab, "needy", requires=["friend"]), "needy")
        lora, ia3 = setting.lab.digest("lora"), setting.lab.digest("ia3")
        shy = await setting.publish_data(constrained(setting.lab, "shy", max_chain=1), "shy")

        async def reason(*digests: str) -> Reason:
            return (await setting.run_refused(setting.job(*((digest, 0.1) for digest in digests)))).reason

        assert await reason(needy) is Reason.REQUIREMENT_MISSING
        assert await reason(needy, friend, lora) is Reason.EXPERTS_INCOMPATIBLE
        assert await reason(shy, ia3) is Reason.TOO_MANY_EXPERTS
        assert await reason(*(f"sha256:{place:064x}" for place in range(11))) is Reason.TOO_MANY_EXPERTS
        await setting.run(setting.job((needy, 0.1), (friend, 0.1)))
        await setting.run(setting.job((shy, 0.1)))

    async def test_one_for_another_base_is_refused(self, setting: Setting) -> None:
        other = expert_package("other", kind="ia3", base="Qwen/Qwen3-0.6B", modules=MODULES["ia3"])
        digest = await setting.publish_data(other, "other")
        assert (await setting.run_refused(setting.job((digest, 1.0)))).reason is Reason.BASE_MISMATCH

    async def test_rows_and_texts_are_told_apart(self, setting: Setting) -> None:
        rows = await setting.deployment.publish(apr_bytes(), "acme/iris@1.0.0")
        assert (await setting.run_refused(setting.job((rows, 1.0)))).reason is Reason.NOT_SERVABLE
        tensor = matrix_to_tensor(np.ones((1, 2), np.float32))
        await setting.worker.run_tensor(rows, tensor, SECONDS)
        with pytest.raises(HocketError) as refusal:
            await setting.worker.run_tensor(setting.lab.digest("lora"), tensor, SECONDS)
        assert refusal.value.reason is Reason.NOT_SERVABLE

    async def test_they_are_loaded_listed_and_unloaded_like_others(self, setting: Setting) -> None:
        digest = setting.lab.digest("lora")
        assert [step.state async for step in setting.worker.load(digest)][-1] == expert_worker_pb2.LOAD_STATE_READY
        (listed,) = (await setting.worker.list_experts()).experts
        assert (listed.digest, listed.in_use_count, list(listed.proofs)) == (digest, 0, ["acme/lora@1.0.0"])
        assert listed.size_bytes == sum(tensor.nbytes for tensor in setting.lab.tensors["lora"].values())
        assert await setting.worker.unload(digest) == 0
        await setting.run(setting.job((digest, 1.0)))

    async def test_what_nobody_signed_is_counted_where_policy_admits_it(self, lab: Lab, tmp_path: Path) -> None:
        allowed = {"allow_unsigned": True}
        async with serving(lab, tmp_path, registry=allowed, worker=allowed) as setting:
            digest = digest_of(lab.packages["lora"])
            await setting.deployment.registry.publish(lab.packages["lora"])
            await setting.deployment.known(digest)
            before = counted("hocket_unsigned_uses_total", service="expert_worker")
            text = await setting.answer({digest: 1.0})
            assert text.ids == lab.greedy({"lora": 1.0}, 24)
            assert counted("hocket_unsigned_uses_total", service="expert_worker") == before + 1
            assert sorted(text.finish.degradations) == ["BASE_BY_NAME", "UNSIGNED_EXPERT"]
            assert list((await setting.run(setting.job((digest, 1.0)))).finish.degradations) == ["UNSIGNED_EXPERT"]
            assert not (await setting.run(setting.job())).finish.degradations


class TestReaders:
    async def test_one_who_leaves_frees_everything(self, setting: Setting) -> None:
        stream = setting.generate({"lora": 0.7, "ia3": 0.3}, 400, ignore_eos=True)
        for _ in range(4):
            await anext(stream)
        engine = await setting.engine()
        assert (engine.running_count, engine.kv_used_page_count > 0, engine.arena_used_bytes > 0) == (1, True, True)
        assert [package.in_use_count for package in setting.app.residency.packages] == [1, 1]
        assert counted("hocket_kv_pages_used") == engine.kv_used_page_count
        assert (counted("hocket_text_running"), counted("hocket_kv_pages")) == (1, engine.kv_page_count)
        await stream.aclose()
        await setting.until_idle()
        assert (counted("hocket_text_running"), counted("hocket_kv_pages_used")) == (0, 0)

    async def test_one_who_leaves_while_experts_are_loaded_frees_everything(self, setting: Setting) -> None:
        stream = setting.worker.run_text(
            setting.job((setting.lab.digest("lora"), 1.0), ("sha256:" + "0" * 64, 1.0)), SECONDS, print
        )
        leaving = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await setting.until_idle()

    async def test_a_slow_one_pauses_nobody_else_and_misses_nothing(self, setting: Setting) -> None:
        weights = {"lora": 0.7, "ia3": 0.3}
        job = setting.job(
            *((setting.lab.digest(name), weight) for name, weight in weights.items()), max_tokens=300, ignore_eos=True
        )
        stream = setting.worker.run_text(job, SECONDS, print)
        slow = Text()
        slow.take(await anext(stream))
        others = [await setting.answer({"lora": 1.0}, 100) for _ in range(3)]
        assert {tuple(other.ids) for other in others} == {tuple(setting.lab.greedy({"lora": 1.0}, 100))}
        assert (await setting.engine()).running_count == 1, "its answer does not run ahead of its reader"
        async for event in stream:
            slow.take(event)
        quick = await setting.answer(weights, 300, ignore_eos=True)
        assert (slow.ids, slow.text) == (quick.ids, quick.text)

    async def test_a_deadline_ends_an_answer_and_frees_everything(self, setting: Setting) -> None:
        job = setting.job((setting.lab.digest("lora"), 1.0), max_tokens=400, ignore_eos=True)
        with pytest.raises(HocketError) as refusal:
            await setting.run(job, 0.1)
        assert refusal.value.reason is Reason.DEADLINE
        await setting.until_idle()

    async def test_without_a_deadline_there_is_a_default_even_for_one_who_does_not_read(
        self, lab: Lab, tmp_path: Path
    ) -> None:
        async with serving(lab, tmp_path, worker={"text_deadline_seconds": 0.3}) as setting:
            stub = setting.worker._stub
            call = stub.RunText(expert_worker_pb2.RunTextRequest(job=setting.job(max_tokens=400, ignore_eos=True)))
            await until(lambda: setting.app.handlers.in_flight == 1)
            await setting.until_idle()
            with pytest.raises(Exception, match="own deadline"):
                _ = [response async for response in call]

    async def test_a_deadline_is_no_longer_than_the_server_s_own(self, lab: Lab, tmp_path: Path) -> None:
        async with serving(lab, tmp_path, worker={"text_deadline_seconds": 0.3}) as setting:
            stream = setting.worker.run_text(setting.job(max_tokens=400, ignore_eos=True), SECONDS, print)
            await anext(stream)
            await setting.until_idle()
            with pytest.raises(HocketError, match="own deadline") as refusal:
                _ = [event async for event in stream]
            assert refusal.value.reason is Reason.DEADLINE

    async def test_one_who_does_not_read_keeps_no_expert_in_memory_after_the_last_token(self, setting: Setting) -> None:
        digest = setting.lab.digest("lora")
        stream = setting.worker.run_text(setting.job((digest, 1.0), max_tokens=8, ignore_eos=True), SECONDS, print)
        text = Text()
        text.take(await anext(stream))
        await setting.until_idle()
        (package,) = setting.app.residency.packages
        assert setting.app.residency.drop(digest) == 0
        kind, known = type(package), id(package)
        assert known in {id(each) for each in gc.get_objects() if type(each) is kind}
        del package
        gc.collect()
        assert known not in {id(each) for each in gc.get_objects() if type(each) is kind}
        async for event in stream:
            text.take(event)
        assert text.ids == (await setting.answer({"lora": 1.0}, 8, ignore_eos=True)).ids


class TestRefusals:
    async def test_a_job_that_makes_no_sense_is_refused_with_the_field(self, setting: Setting) -> None:
        digest = setting.lab.digest("lora")
        cases: list[tuple[text_pb2.TextJob, Reason, str]] = [
            (setting.job((digest, float("nan"))), Reason.BAD_REQUEST, "job.plan.experts[0].weight"),
            (setting.job((digest, 100.5)), Reason.BAD_REQUEST, "job.plan.experts[0].weight"),
            (setting.job((digest, 1.0), (digest, 1.0)), Reason.BAD_REQUEST, "job.plan.experts[1].digest"),
            (setting.job(("lora", 1.0)), Reason.BAD_REQUEST, "job.plan.experts[0].digest"),
            (setting.job(top_p=1.5), Reason.BAD_REQUEST, "sampling.top_p"),
        ]
        for changed, reason, where in (
            ({"base": "sha256:" + "0" * 64}, Reason.BASE_MISMATCH, "job.plan.base"),
            ({"base": ""}, Reason.BASE_MISMATCH, "job.plan.base"),
        ):
            job = setting.job()
            job.plan.base = changed["base"]
            cases.append((job, reason, where))
        empty = setting.job()
        empty.input.Clear()
        cases.append((empty, Reason.BAD_REQUEST, "input"))
        long = setting.job()
        long.input.prompt = "a b " * CONTEXT
        cases.append((long, Reason.TOO_LARGE, "input"))
        for job, reason, where in cases:
            refusal = await setting.run_refused(job)
            assert (refusal.reason, refusal.field) == (reason, where), refusal
        await setting.run(setting.job((digest, 100.0)))

    async def test_a_set_that_exceeds_the_budget_and_a_text_that_exceeds_the_context(
        self, lab: Lab, tmp_path: Path
    ) -> None:
        sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in lab.tensors.items()}
        small = {"budget_bytes": sizes["lora"] + sizes["ia3"] // 2, "slab_bytes": 2**20, "context_length": 64}
        async with serving(lab, tmp_path, worker=small) as setting:
            await setting.publish("lora", "ia3")
            lora, ia3 = lab.digest("lora"), lab.digest("ia3")
            refusal = await setting.run_refused(setting.job((lora, 1.0), (ia3, 1.0)))
            assert refusal.reason is Reason.DEVICE_MEMORY
            assert "together" in refusal.message
            text = await setting.run(setting.job(max_tokens=100, ignore_eos=True))
            room = 64 - text.start.prompt_token_count
            assert text.start.sampling.max_tokens == len(text.ids) == room > 0
            long = setting.job()
            long.input.prompt = "7#" * 40
            refusal = await setting.run_refused(long)
            assert (refusal.reason, "the context has 64" in refusal.message) == (Reason.TOO_LARGE, True)
            long.input.prompt = "a b " * CONTEXT
            refusal = await setting.run_refused(long)
            assert refusal.reason is Reason.TOO_LARGE
            assert f"{4 * CONTEXT} bytes of text are at least" in refusal.message
            await asyncio.gather(*(setting.run(setting.job((digest, 1.0))) for digest in (lora, ia3) * 3))
            await setting.until_idle()

    async def test_nothing_becomes_tokens_while_too_many_texts_wait(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = setting.job()
        job.input.prompt = "a " * 200
        assert setting.app._text is not None
        engine = setting.app._text.engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_limits", replace(engine._limits, queue_max=0))
            patch.setattr(text_module(), "render", lambda *_: pytest.fail("it became tokens"))
            assert (await setting.run_refused(job)).reason is Reason.QUEUE_FULL
        await setting.run(job)

    async def test_a_deadline_counts_while_a_text_becomes_tokens(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job, small = setting.job(), setting.job()
        job.input.prompt = "a " * 200
        go_on = threading.Event()
        render = text_module().render
        with monkeypatch.context() as patch:
            patch.setattr(text_module(), "render", lambda *how: (go_on.wait(SECONDS), render(*how))[1])
            with pytest.raises(HocketError) as refusal:
                await setting.run(job, 0.2)
            assert refusal.value.reason is Reason.DEADLINE
        await setting.run(small)  # in the event loop
        go_on.set()
        await setting.run(job)

    async def test_a_worker_without_a_base_answers_no_texts(self, lab: Lab, tmp_path: Path) -> None:
        async with deployed("one process", tmp_path) as deployment:
            assert deployment.app is not None
            setting = Setting(deployment, lab, ExpertWorkerClient(LocalChannel(deployment.app.handlers)))
            assert (await setting.run_refused(setting.job())).reason is Reason.NO_BASE
            await setting.publish("lora")
            with pytest.raises(HocketError) as refusal:
                _ = [step async for step in setting.worker.load(lab.digest("lora"))]
            assert refusal.value.reason is Reason.NOT_SERVABLE
            assert not (await setting.worker.list_experts()).HasField("engine")


class TestWorker:
    async def test_it_says_what_it_has(self, setting: Setting) -> None:
        engine = await setting.engine()
        assert (engine.base.name, engine.base.digest) == (BASE, base_digest(setting.lab.folder))
        assert (engine.dtype, engine.context_length, engine.kv_page_positions) == ("float32", CONTEXT, 16)
        outside_bytes = 72 * 4 * 448  # for experts of `lm_head`
        assert engine.kv_page_count == (2**21 - outside_bytes) // (16 * 512) - 1
        assert 2**21 - 4 * 64 < engine.arena_budget_bytes <= 2**21
        assert engine.base_bytes > 0
        state = setting.app._state()
        assert list(state.formats) == ["apr", "expert"]
        assert state.base == engine.base
        assert state.vocabulary_sha256 == engine.vocabulary_sha256 != ""

    def test_one_without_a_base_imports_nothing_of_transformers(self) -> None:
        code = "import sys, services.suite.app; sys.exit('transformers' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

    async def test_a_device_that_fails_ends_the_process(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(_parts: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        assert setting.app._text is not None
        monkeypatch.setattr(
            setting.app._text.engine._passes, "_runner", type("Broken", (), {"run": staticmethod(broken)})
        )
        assert (await setting.run_refused(setting.job())).reason is Reason.NOT_READY
        await asyncio.wait_for(setting.app.failed.wait(), SECONDS)

    async def test_the_base_is_what_was_added_or_the_start_ends_with_advice(self, lab: Lab, tmp_path: Path) -> None:
        folder = tiny_base(tmp_path / "changing", seed=1)
        known_bases.add(tmp_path / "data" / "bases", folder)
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
        refusal = await refused_start(tmp_path / "data")
        assert (refusal.reason, "hocket base add" in refusal.message) == (Reason.BASE_MISMATCH, True)
        known_bases.add(tmp_path / "data" / "bases", lab.folder)
        refusal = await refused_start(tmp_path / "data")
        assert (refusal.reason, "changing" in refusal.message) == (Reason.BAD_REQUEST, True)
        assert (await refused_start(tmp_path / "data", base="nobody")).reason is Reason.UNKNOWN_BASE
        refusal = await refused_start(tmp_path / "data", base=BASE, slab_bytes=100)
        assert (refusal.reason, "worker.slab_bytes" in refusal.message) == (Reason.DEVICE_MEMORY, True)


def text_module() -> Any:
    from services.expert_worker import text  # noqa: PLC0415 - imports transformers

    return text


async def refused_start(folder: Path, **worker: Any) -> HocketError:
    settings = settings_in(folder, worker={"bases_dir": folder / "bases", **worker})
    from services.suite.app import Suite  # noqa: PLC0415 - beside its only use

    suite = Suite(settings, metrics=False)
    try:
        with pytest.raises(HocketError) as refusal:
            await suite.start()
    finally:
        await suite.stop()
    return refusal.value
