"""The whole engine beside those that it must agree with: transformers, PEFT, and weights merged by hand.

Adapters are what PEFT saves, packed by our own command. Tokens are compared exactly: with random weights the best one
is far ahead of the next, measured by what float32 rounds.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hocket.cli.main import app
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.sequence import FinishReason
from tests.bases import CONTEXT, VOCABULARY, tiny_base
from tests.engines import HEAD, TOKEN_COUNT, Told, asking, expert_of, opened, prompt_ids, whole_engine
from tests.passes import KINDS, oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # PEFT asks transformers for what it is about to rename
    "ignore:.*tie_word_embeddings.*:UserWarning",  # and warns of merging what we do not merge
    "ignore:Position ids are not supported:UserWarning",  # it counts them itself
)

TOKENS = 24
PROMPTS = [prompt_ids(count, count) for count in (1, 23, 70)]
CHUNKED = EngineLimits(step_tokens=16, sequences_max=16, queue_max=100)
"""The longest of the prompts takes several steps, beside tokens of the others."""
ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4
"""Most that logarithms of probabilities may differ."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / "tiny-qwen3")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    base = opened(folder)
    assert len(base.tokenizer) == TOKEN_COUNT < VOCABULARY == base.vocabulary_size
    return base


def greedy(model: Any, token_ids: Sequence[int], count: int = TOKENS) -> Told:
    """What `generate` answers."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            suppress_tokens=[*range(TOKEN_COUNT, VOCABULARY)],
            output_logits=True,
            return_dict_in_generate=True,
        )
    told = Told(made.sequences[0, -len(made.logits) :].tolist())
    for token_id, logits in zip(told.ids, made.logits, strict=True):
        told.logprobs.append(float(logits[0, :TOKEN_COUNT].log_softmax(-1)[token_id]))
    return told


def assert_same(told: Told, wanted: Told) -> None:
    assert told.ids == wanted.ids
    assert told.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


class TestTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_greedy_answers_in_one_batch_are_those_of_generate(self, kind: str, tmp_path: Path) -> None:
        base = opened(tiny_base(tmp_path, kind, **KINDS[kind]))
        async with whole_engine(base, limits=CHUNKED) as lab:
            answers = await lab.ask_all(
                [asking(ids, max_tokens=TOKENS, eos_ids=base.eos_ids, top_logprobs=1) for ids in PROMPTS]
            )
            assert max(map(len, lab.watch.passes)) == len(PROMPTS)
        model = oracle(tmp_path)
        for ids, told in zip(PROMPTS, answers, strict=True):
            assert_same(told, greedy(model, ids))
            assert told.text == base.tokenizer.decode(told.ids, skip_special_tokens=True)

    async def test_an_answer_ends_where_that_of_generate_does(self, base: Base, folder: Path) -> None:
        model = oracle(folder)
        first = greedy(model, PROMPTS[1]).ids
        model.generation_config.eos_token_id = first[5]
        wanted = greedy(model, PROMPTS[1])
        assert wanted.ids == first[:6]
        async with whole_engine(base) as lab:
            told = await lab.ask(asking(PROMPTS[1], max_tokens=TOKENS, eos_ids=frozenset({first[5]})))
            assert_same(told, wanted)
            assert told.finish is not None
            assert told.finish.reason is FinishReason.END
            long = prompt_ids(CONTEXT - 10, 1)
            told = await lab.ask(asking(long, max_tokens=TOKENS))
        assert_same(told, greedy(model, long, 10))  # all that the context holds

    async def test_repetition_is_penalised_as_generate_does(self, base: Base, folder: Path) -> None:
        model = oracle(folder)
        model.generation_config.repetition_penalty = 1.7
        async with whole_engine(base) as lab:
            told = await lab.ask(asking(PROMPTS[1], max_tokens=TOKENS, repetition_penalty=1.7, eos_ids=base.eos_ids))
        assert_same(told, greedy(model, PROMPTS[1]))
        assert told.ids != greedy(oracle(folder), PROMPTS[1]).ids

    async def test_greedy_answers_are_those_of_its_own_continuous_batching(self, folder: Path) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: PLC0415 - seconds

        model = oracle(folder, attn_implementation="sdpa")
        base = opened(folder)
        models: list[Any] = [model, base.causal_lm]
        for each in models:
            with torch.no_grad():
                each.get_input_embeddings().weight[TOKEN_COUNT:] = 0  # it can suppress no tokens
        settings: Any = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1}
        greedily: Any = GenerationConfig
        made = model.generate_batch(
            inputs=PROMPTS,
            generation_config=greedily(**settings),
            continuous_batching_config=ContinuousBatchingConfig(page_size=64, num_blocks=32, max_batch_tokens=64),
        )
        wanted = [list(made[f"req_{place}"].generated_tokens) for place in range(len(PROMPTS))]
        async with whole_engine(base, limits=CHUNKED) as lab:
            answers = await lab.ask_all([asking(ids, max_tokens=TOKENS) for ids in PROMPTS])
        assert [told.ids for told in answers] == wanted


@dataclass
class Trained:
    """An adapter as PEFT holds it, and as our worker does.

    Attributes:
        config: PEFT's.
        tensors: As saved, by name.
        package: What our command makes of the folder.
        model: PEFT's, around a base of its own.
    """

    config: Any
    tensors: dict[str, Any] = field(repr=False)
    package: bytes = field(repr=False)
    model: Any = field(repr=False)


def trained(folder: Path, saved: Path, config: Any, seed: int) -> Trained:
    """PEFT's adapter with random numbers, saved and packed."""
    from peft import get_peft_model  # noqa: PLC0415 - seconds

    torch.manual_seed(seed)
    model: Any = get_peft_model(oracle(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.4 * torch.randn_like(parameter))
            elif "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "prompt_encoder" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(saved, save_embedding_layers=False)
    packed = saved / "x.expert"
    name = ["--name", f"expert-{seed}", "--version", "1.0.0"]
    done = CliRunner().invoke(app, ["expert", "pack", str(saved), *name, "--base", str(folder), "-o", str(packed)])
    assert done.exit_code == 0, done.output
    return Trained(config, load_file(saved / "adapter_model.safetensors"), packed.read_bytes(), model)


def configured(kind: str, modules: Sequence[str] = EVERYTHING, rank: int = 4, **changes: Any) -> Any:
    """PEFT's configuration of an adapter."""
    from peft import IA3Config, LoraConfig, PromptTuningConfig  # noqa: PLC0415 - seconds

    task: Any = {"task_type": "CAUSAL_LM"}
    if kind == "prompt":
        return PromptTuningConfig(num_virtual_tokens=rank, **task)
    if kind == "ia3":
        forward = [module for module in modules if module == "down_proj"]
        return IA3Config(target_modules=[*modules], feedforward_modules=forward, **task)
    special: dict[str, Any] = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*modules], **special, **task, **changes)


SINGLES: dict[str, Any] = {
    "lora": ("lora", {}),
    "rslora": ("rslora", {}),
    "dora": ("dora", {}),
    "ia3": ("ia3", {"modules": ["k_proj", "v_proj", "down_proj"]}),
    "prompt": ("prompt", {}),
    "patterns": ("lora", {"rank_pattern": {"v_proj": 2, "down_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    "head": ("lora", {"modules": ["q_proj", HEAD]}),
}


class TestPeft:
    @pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gemma"])
    async def test_one_expert_at_weight_1_answers_as_its_adapter_does(self, kind: str, tmp_path: Path) -> None:
        """On qwen2 projections have biases, and gemma scales embeddings."""
        folder = tiny_base(tmp_path / f"tiny-{kind}", kind, **KINDS[kind])
        base = opened(folder)
        adapters = {
            name: trained(folder, tmp_path / name, configured(adapter, **options), seed)
            for seed, (name, (adapter, options)) in enumerate(SINGLES.items())
            if kind == "qwen3" or name in {"dora", "ia3", "prompt"}
        }
        async with whole_engine(base, limits=CHUNKED) as lab:
            answers = await lab.ask_all(
                [
                    asking(PROMPTS[1], ((expert_of(adapter.package, base), 1.0),), max_tokens=TOKENS)
                    for adapter in adapters.values()
                ]
            )
            plain = await lab.ask(asking(PROMPTS[1], max_tokens=TOKENS))
        for (name, adapter), told in zip(adapters.items(), answers, strict=True):
            adapter.model.generation_config.eos_token_id = None
            wanted = greedy(adapter.model, PROMPTS[1])
            assert told.ids == wanted.ids, name
            assert told.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE), name
            assert told.logprobs != pytest.approx(plain.logprobs, abs=0.1), name


def merged(model: Any, mixture: Sequence[tuple[Trained, float]]) -> tuple[Any, list[Any]]:
    """A base in float64 with the weights of a mixture merged into its own, and the soft prompts to put before."""
    model = copy.deepcopy(model).double()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        for name, linear in linears.items():
            own = linear.weight.clone()
            read, write, lift = torch.ones(own.shape[1]), torch.ones(own.shape[0]), torch.ones(own.shape[0])
            added = torch.zeros_like(own)
            for adapter, weight in mixture:
                path = f"base_model.model.{name}"
                mine = {
                    key.removeprefix(path): tensor.double()
                    for key, tensor in adapter.tensors.items()
                    if key.startswith(f"{path}.")
                }
                if ".ia3_l" in mine:
                    factors = weight * (mine[".ia3_l"].flatten() - 1)
                    if name.endswith("down_proj"):
                        read = read + factors
                    else:
                        write, lift = write + factors, lift + factors
                elif mine:
                    rank = len(mine[".lora_A.weight"])
                    scale = adapter.config.lora_alpha / (math.sqrt(rank) if adapter.config.use_rslora else rank)
                    delta = scale * mine[".lora_B.weight"] @ mine[".lora_A.weight"]
                    if adapter.config.use_dora:
                        gate = mine[".lora_magnitude_vector"] / (own + delta).norm(dim=1)
                        write = write + weight * (gate - 1)
                        delta = gate[:, None] * delta
                    added += weight * delta
            linear.weight = torch.nn.Parameter((write[:, None] * own + added) * read)
            if linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias * lift)
    prompts = [
        adapter.tensors["prompt_embeddings"].double()
        for adapter, weight in mixture
        if weight and "prompt_embeddings" in adapter.tensors
    ]
    return model, prompts


def forced(model: Any, prompts: Sequence[Any], token_ids: Sequence[int], answer: Sequence[int]) -> Told:
    """What a model would answer greedily after each beginning of an answer."""
    embed = model.get_input_embeddings()
    rows = torch.cat([*prompts, embed(torch.tensor([*token_ids, *answer[:-1]]))])
    with torch.no_grad():
        logits = model(inputs_embeds=rows[None], use_cache=False).logits[0, -len(answer) :, :TOKEN_COUNT]
    best = logits.argmax(-1)
    return Told(best.tolist(), logits.log_softmax(-1).gather(-1, best[:, None])[:, 0].tolist())


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
async def test_mixtures_of_0_to_10_experts_in_one_batch_answer_as_their_own_merges_do(
    kind: str, tmp_path: Path
) -> None:
    folder = tiny_base(tmp_path / f"tiny-{kind}", kind)
    base = opened(folder)
    shapes = [
        configured("lora", rank=3),
        configured("dora", ["q_proj", "up_proj"], rank=8),
        configured("ia3", ["k_proj", "v_proj", "down_proj"]),
        configured("rslora", ATTENTION, rank=5),
        configured("prompt", rank=6),
        configured("ia3", ["q_proj", "down_proj"]),
        configured("dora", rank=2),
        configured("lora", ["gate_proj", HEAD], rank=1),
        configured("lora", ["down_proj"], rank=16),
        configured("rslora", rank=4),
    ]
    adapters = [trained(folder, tmp_path / str(seed), shape, seed) for seed, shape in enumerate(shapes)]
    experts = [expert_of(adapter.package, base) for adapter in adapters]
    weights = [0.7, 0.4, -0.5, 0.3, 1.0, 1.2, 0.5, -0.4, 0.6, 0.2]
    mixtures = [range(count) for count in range(11)]
    async with whole_engine(base) as lab:
        answers = await lab.ask_all(
            [
                asking(prompt_ids(20, count), tuple((experts[place], weights[place]) for place in mixture))
                for count, mixture in enumerate(mixtures)
            ]
        )
        assert max(map(len, lab.watch.passes)) == len(mixtures)
    assert len({tuple(told.ids) for told in answers}) == len(mixtures)
    model = oracle(folder)
    for count, (mixture, told) in enumerate(zip(mixtures, answers, strict=True)):
        composed, prompts = merged(model, [(adapters[place], weights[place]) for place in mixture])
        assert_same(told, forced(composed, prompts, prompt_ids(20, count), told.ids))


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


class TestSeeds:
    @pytest.fixture
    def expert(self, folder: Path, base: Base, tmp_path: Path) -> AdapterExpert:
        adapter = trained(folder, tmp_path, configured("dora", ATTENTION), 0)
        return expert_of(adapter.package, base)

    async def test_a_seed_answers_the_same_in_every_batch(self, base: Base, expert: AdapterExpert) -> None:
        request = asking(PROMPTS[1], ((expert, 0.8),), max_tokens=40, seed=7, **SAMPLED)
        others = [
            asking(prompt_ids(5 * seed, seed), ((expert, 0.1 * seed),), max_tokens=9 * seed, seed=seed, **SAMPLED)
            for seed in range(1, 7)
        ]
        async with whole_engine(base) as lab:
            alone = await lab.ask(request)
        async with whole_engine(base, limits=CHUNKED) as lab:
            for others_first in (True, False):
                several = [*others, request] if others_first else [request, *others]
                answers = await lab.ask_all(several)
                told = answers[several.index(request)]
                assert (told.ids, told.text) == (alone.ids, alone.text)
                assert len({tuple(answer.ids[:9]) for answer in answers}) == len(answers)

    async def test_another_replica_goes_on_as_the_first_would_have(
        self, base: Base, expert: AdapterExpert, folder: Path
    ) -> None:
        mixture = ((expert, 0.8),)
        async with whole_engine(base) as lab:
            whole = await lab.ask(asking(PROMPTS[1], mixture, max_tokens=40, seed=7, **SAMPLED))
            other_seed = await lab.ask(asking(PROMPTS[1], mixture, max_tokens=40, seed=8, **SAMPLED))
        assert whole.ids != other_seed.ids
        replica = opened(folder)
        async with whole_engine(replica, page_positions=7) as lab:
            for done in (1, 13, 39):
                begun = [*PROMPTS[1], *whole.ids[:done]]
                rest = await lab.ask(asking(begun, mixture, max_tokens=40 - done, seed=7, **SAMPLED))
                assert rest.ids == whole.ids[done:]


def test_the_manifest_that_the_packer_writes_names_the_base(folder: Path, base: Base, tmp_path: Path) -> None:
    """Otherwise the tests above would fold by the base's name alone."""
    from hocket.packages.expert.archive import read_archive  # noqa: PLC0415 - beside its only use

    package = trained(folder, tmp_path, configured("lora"), 0).package
    manifest = json.loads(read_archive(package).files["manifest.json"])
    assert manifest["base_models"][0]["hocket_base"] == base.model.digest
