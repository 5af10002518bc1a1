from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.expert_worker.engine.pages import KvPool
from tests.bases import LAYERS, VOCABULARY, tiny_base
from tests.passes import KINDS, Passes, ids_of, oracle, part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import Mixture

CPU = torch.device("cpu")
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_base(tmp_path_factory.mktemp("bases") / kind, kind, **KINDS[kind])
        return made[kind]

    return folder_of


@pytest.fixture(scope="module")
def base_of(folder_of: Callable[[str], Path]) -> Callable[[str], Base]:
    from services.expert_worker.engine.base import open_base  # noqa: PLC0415 - imports transformers

    opened: dict[str, Base] = {}

    def base_of(kind: str) -> Base:
        if kind not in opened:
            opened[kind] = open_base(folder_of(kind), expected_digest=None, device=CPU)
        return opened[kind]

    return base_of


@pytest.fixture(scope="module")
def base(base_of: Callable[[str], Base]) -> Base:
    return base_of("qwen3")


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_at_every_chunk_and_page_size(
    kind: str, base_of: Callable[[str], Base], folder_of: Callable[[str], Path]
) -> None:
    ids = ids_of(45)
    with torch.no_grad():
        wanted = oracle(folder_of(kind))(torch.tensor([ids])).logits[0]
    assert wanted.std() > 0.05  # else there is nothing to compare
    for page_positions, scattered in ((16, False), (16, True), (5, True), (64, False)):
        passes = Passes(base_of(kind), page_positions)
        for chunk in (1, 16, len(ids)):
            after = [*range(chunk - 1, len(ids) - 1, chunk), len(ids) - 1]
            assert_close(passes.logits(ids, chunk, scattered=scattered), wanted[after])


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_greedy_tokens_are_those_of_generate(
    kind: str, base_of: Callable[[str], Base], folder_of: Callable[[str], Path]
) -> None:
    passes = Passes(base_of(kind))
    ids = ids_of(20, seed=1)
    given_ids = torch.tensor([ids])
    wanted = oracle(folder_of(kind)).generate(
        given_ids,
        attention_mask=torch.ones_like(given_ids),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :]
    pages = passes.take(len(ids) + 24)
    logits = passes.run([part(0, ids, pages)])
    found = []
    for position in range(len(ids), len(ids) + 24):
        found.append(int(logits.argmax()))
        logits = passes.run([part(position, found[-1:], pages)])
    assert found == wanted.tolist()


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_sequence_does_not_depend_on_its_batch_mates(data: st.DataObject, base_of: Callable[[str], Base]) -> None:
    kind = data.draw(st.sampled_from(["qwen3", "gemma3_text"]))
    passes = Passes(base_of(kind), page_positions=data.draw(st.sampled_from([3, 8])))
    sequences = [ids_of(data.draw(st.integers(1, 30)), seed) for seed in range(data.draw(st.integers(1, 4)))]
    pages = [passes.take(len(ids), scattered=data.draw(st.booleans())) for ids in sequences]
    done = [0] * len(sequences)
    last: dict[int, Tensor] = {}
    while any(count < len(ids) for count, ids in zip(done, sequences, strict=True)):
        running = [index for index, ids in enumerate(sequences) if done[index] < len(ids)]
        chosen = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        parts, sampled = [], []
        for index in chosen:
            count = data.draw(st.integers(1, len(sequences[index]) - done[index]))
            ends = done[index] + count == len(sequences[index])
            ids = sequences[index][done[index] : done[index] + count]
            parts.append(part(done[index], ids, pages[index], sampled=ends))
            done[index] += count
            sampled += [index] if ends else []
        last |= dict(zip(sampled, passes.run(parts), strict=True))
    for index, ids in enumerate(sequences):
        assert_close(last[index], Passes(base_of(kind)).logits(ids, len(ids))[0])
        passes.pages.give(pages[index])
    assert passes.pages.free_count == passes.pages.count


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_rows_of_a_soft_prompt_stand_before_the_text(
    kind: str, base_of: Callable[[str], Base], folder_of: Callable[[str], Path]
) -> None:
    model = oracle(folder_of(kind))
    prompt = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    ids, others = ids_of(9), ids_of(7, seed=2)
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.tensor(ids))
        wanted = model(inputs_embeds=torch.cat([prompt, text])[None]).logits[0, -1]
    passes = Passes(base_of(kind), page_positions=4)
    pages, neighbours = passes.take(14), passes.take(7)
    whole, neighbour = passes.run([part(0, ids, pages, embeddings=prompt), part(0, others, neighbours)])
    assert_close(whole, wanted)
    assert_close(neighbour, passes.logits(others, 7)[0])
    passes.run([part(0, (), pages, embeddings=prompt[:3], sampled=False)])
    passes.run([part(3, ids[:1], pages, embeddings=prompt[3:], sampled=False)])
    assert_close(passes.run([part(6, ids[1:], pages)])[0], wanted)


def test_only_sampled_parts_have_logits_in_their_order(base: Base) -> None:
    passes = Passes(base)
    parts = [part(0, ids_of(6, seed), passes.take(6), sampled=seed != 1) for seed in range(3)]
    logits = passes.run(parts)
    assert logits.shape == (2, VOCABULARY)
    assert_close(logits, torch.cat([passes.logits(ids_of(6, seed), 6) for seed in (0, 2)]))
    assert passes.run([part(0, ids_of(6), passes.take(6), sampled=False)]).shape == (0, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_in_float32_close_to_the_whole(
    dtype: torch.dtype, base: Base, folder_of: Callable[[str], Path]
) -> None:
    from services.expert_worker.engine.base import Serving, open_base  # noqa: PLC0415 - imports transformers

    half = open_base(folder_of("qwen3"), expected_digest=None, device=CPU, serving=Serving(dtype=dtype))
    found = Passes(half).logits(ids_of(20), 8)
    wanted = Passes(base).logits(ids_of(20), 8)
    assert half.dtype == dtype
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.05 * wanted.norm()


class RecordingMixer:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, counts: list[tuple[int, Mixture]], kept: NDArray[np.int64]) -> None:
        self.told.append((counts, kept.tolist()))

    def end(self) -> None:
        self.told.append("end")


def test_the_mixer_knows_whose_rows_are_whose_and_which_are_kept(base: Base) -> None:
    mixer = RecordingMixer()
    passes = Passes(base, mixer=mixer)
    mixture: Any = (("an expert", 0.5),)
    passes.run(
        [
            part(0, ids_of(6), passes.take(6), mixture=mixture),
            part(0, ids_of(4), passes.take(4), sampled=False),
            part(0, ids_of(1), passes.take(6), embeddings=torch.zeros(2, 64)),
        ]
    )
    assert mixer.told == [([(6, mixture), (4, ()), (3, ())], [5, 12]), "end"]


def test_the_mixer_learns_of_the_end_of_a_pass_that_fails(base: Base) -> None:
    mixer = RecordingMixer()
    passes = Passes(base, mixer=mixer)
    with pytest.raises(IndexError):
        passes.run([part(0, [VOCABULARY], passes.take(1))])
    assert mixer.told[1:] == ["end"]
    assert len(base.causal_lm.model.layers) == LAYERS


@pytest.mark.parametrize(("kind", "windows"), [("gemma3_text", {0: 8, 1: None}), ("qwen3", {0: None, 1: None})])
def test_a_runner_knows_which_windows_the_layers_asked_for(
    kind: str, windows: dict[int, int | None], base_of: Callable[[str], Base]
) -> None:
    from services.expert_worker.engine.runner import NoMixer, Runner  # noqa: PLC0415 - imports transformers

    base = base_of(kind)
    pool = KvPool(base.kv_shape, page_count=2, page_positions=16, dtype=base.dtype, device=CPU)
    runner = Runner(base, pool, NoMixer())
    runner.run([part(0, ids_of(3), [1])])
    assert runner.windows == windows
