"""An adapter goes on from another one, or learns to be mixed with it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hocket.base_folder import base_digest
from hocket.cli.main import app
from hocket.errors import HocketError, Reason
from tests.trainings import ADAPTERS, QUICK, Workshop, questions, workshop

if TYPE_CHECKING:
    from pathlib import Path

    from training.train import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def trained(plan: Any, on_progress: Any = None) -> Outcome:
    from training.train import train  # noqa: PLC0415 - slow

    return train(plan, on_progress=on_progress)


def packed(shop: Workshop, kind: str = "lora", **settings: object) -> Path:
    """A package of an adapter that was trained a little."""
    trained(shop.plan(kind, f"neighbour-{kind}", learning_rate=0.05, **settings))
    package = shop.folder / f"{kind}.expert"
    arguments = ["expert", "pack", str(shop.folder / f"neighbour-{kind}"), "--out", str(package)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return package


@pytest.fixture(scope="module")
def neighbour(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(Workshop(tiny, tmp_path_factory.mktemp("neighbour")))


def plan_beside(shop: Workshop, neighbour: Path, weight: float = 0.25, kind: str = "lora", **more: Any) -> Any:
    from training.plan import plan_training  # noqa: PLC0415 - with what it imports

    return plan_training(
        shop.manifest(kind),
        base=shop.base,
        out=shop.folder / "out",
        data=shop.data(),
        eval_data=shop.data("eval.jsonl", questions(8)),
        beside=neighbour,
        beside_weight=weight,
        resume=more.pop("resume", False),
        settings={**QUICK, "save_steps": 2, **more},
    )


def test_beside_its_neighbour_it_answers_as_the_mixture_of_both(shop: Workshop, neighbour: Path) -> None:
    import torch  # noqa: PLC0415 - slow

    from training.model import device_of, load_model, load_tokenizer, precision_of  # noqa: PLC0415 - slow
    from training.neighbour import Turns  # noqa: PLC0415 - slow

    plan = plan_beside(shop, neighbour)

    def model() -> Any:
        device = device_of(plan)
        made = load_model(plan, load_tokenizer(plan), device, precision_of(plan, device)).eval()
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        return made

    # PEFT's own sum of two adapters is the oracle.
    mixed = model()
    mixed.load_adapter(str(neighbour.parent / "neighbour-lora"), adapter_name="other")
    mixed.base_model.add_weighted_adapter(["default", "other"], [0.75, 0.25], "mixture", combination_type="cat")
    mixed.set_adapter("mixture")
    mixed.eval()  # the layers that it has just made would drop out
    ids = torch.arange(5, 25).view(2, 10)
    turning = model()
    alone = turning(input_ids=ids).logits
    turns = Turns(turning, plan.beside)
    state: Any = type("State", (), {"global_step": 0})
    with torch.no_grad():
        for step, expected in enumerate((alone, mixed(input_ids=ids).logits, alone)):
            state.global_step = step
            turns.on_step_begin(None, state, None)  # type: ignore[arg-type]  # of which it reads nothing
            torch.testing.assert_close(turning(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, mixed(input_ids=ids).logits, atol=1e-3)
    turns.on_prediction_step(None, state, None)  # type: ignore[arg-type]  # as above
    assert turns._together
    turns.on_step_end(None, state, None)  # type: ignore[arg-type]  # as above
    assert not turns._together


def test_it_learns_in_both_turns_and_the_neighbour_stays_as_it_is(shop: Workshop, neighbour: Path) -> None:
    before = neighbour.read_bytes()
    outcome = trained(plan_beside(shop, neighbour))
    alone = replace(plan_beside(shop, neighbour), out=shop.folder / "alone", beside=None)
    trained(alone)
    assert neighbour.read_bytes() == before
    beside, without = (load_file(shop.folder / out / "adapter_model.safetensors") for out in ("out", "alone"))
    assert beside.keys() == without.keys()  # nothing of the neighbour is in it
    assert any((beside[name] != without[name]).any() for name in beside)
    document = json.loads((shop.folder / "out" / "manifest.json").read_text())
    assert document["training"]["metadata"]["beside"]["weight"] == 0.25
    assert document["training"]["metadata"]["beside"]["digest"].startswith("sha256:")
    assert outcome.steps == 4


def test_what_is_resumed_takes_the_same_turns(shop: Workshop, neighbour: Path) -> None:
    trained(plan_beside(shop, neighbour))
    whole = load_file(shop.folder / "out" / "adapter_model.safetensors")
    (shop.folder / "out").rename(shop.folder / "whole")

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise HocketError(Reason.BAD_REQUEST, "Stop")

    with pytest.raises(HocketError, match="Stop"):
        trained(plan_beside(shop, neighbour), stop)
    with pytest.raises(HocketError, match="beside differ"):
        trained(plan_beside(shop, neighbour, weight=0.5, resume=True))
    trained(plan_beside(shop, neighbour, resume=True))
    resumed = load_file(shop.folder / "out" / "adapter_model.safetensors")
    assert all((resumed[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0, float("nan")])
def test_a_weight_that_leaves_nothing_for_one_of_them_is_refused(
    weight: float, shop: Workshop, neighbour: Path
) -> None:
    with pytest.raises(HocketError, match="--beside-weight") as caught:
        plan_beside(shop, neighbour, weight)
    assert caught.value.reason is Reason.BAD_REQUEST


def test_only_low_rank_adapters_are_trained_beside_each_other(shop: Workshop, neighbour: Path) -> None:
    with pytest.raises(HocketError, match="both must be LoRA") as caught:
        plan_beside(shop, neighbour, kind="dora")
    assert caught.value.reason is Reason.UNSUPPORTED_TYPE
    with pytest.raises(HocketError, match="both must be LoRA"):
        plan_beside(shop, packed(shop, "ia3", max_steps=1))
    assert plan_beside(shop, neighbour, kind="rslora").beside is not None


def test_a_neighbour_of_another_base_is_refused(shop: Workshop, neighbour: Path, tmp_path: Path) -> None:
    other = workshop(tmp_path / "other-base", tmp_path)
    document = json.loads((other.base / "tokenizer_config.json").read_text())
    (other.base / "tokenizer_config.json").write_text(json.dumps({**document, "changed": 1}))
    assert base_digest(other.base) != base_digest(shop.base)
    with pytest.raises(HocketError) as caught:
        plan_beside(other, neighbour)
    assert caught.value.reason is Reason.BASE_MISMATCH


def test_what_is_no_package_is_refused(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "no.expert").write_bytes(b"nothing")
    with pytest.raises(HocketError):
        plan_beside(shop, tmp_path / "no.expert")
    with pytest.raises(HocketError, match="cannot read"):
        plan_beside(shop, tmp_path / "gone.expert")


class TestStart:
    def plan(self, shop: Workshop, start: Path, rank: int = 4, kind: str = "lora") -> Any:
        from training.plan import plan_training  # noqa: PLC0415 - with what it imports

        stated = {**ADAPTERS[kind], "r": rank} if kind == "lora" else ADAPTERS[kind]
        return plan_training(
            shop.manifest(kind, base={"adapters": [stated]}),
            base=shop.base,
            out=shop.folder / "out",
            data=shop.data(),
            start=start,
            settings={**QUICK, "max_steps": 1},
        )

    def first_weights(self, plan: Any) -> dict[str, Any]:
        from peft import get_peft_model_state_dict  # noqa: PLC0415 - slow

        from training.model import device_of, load_model, load_tokenizer, precision_of  # noqa: PLC0415 - slow

        device = device_of(plan)
        model = load_model(plan, load_tokenizer(plan), device, precision_of(plan, device))
        return {name: each.numpy() for name, each in get_peft_model_state_dict(model).items()}

    def test_its_first_weights_are_those_of_the_package(self, shop: Workshop, neighbour: Path) -> None:
        plan = self.plan(shop, neighbour)
        given = load_file(neighbour.parent / "neighbour-lora" / "adapter_model.safetensors")
        first = self.first_weights(plan)
        assert first.keys() == given.keys()
        assert all((first[name] == given[name]).all() for name in given)
        trained(plan)
        document = json.loads((shop.folder / "out" / "manifest.json").read_text())
        assert document["training"]["metadata"]["start"] == plan.start.digest

    @pytest.mark.parametrize("kind", ["dora", pytest.param("soft_prompt", marks=pytest.mark.long)])
    def test_every_kind_goes_on(self, kind: str, shop: Workshop) -> None:
        package = packed(shop, kind, max_steps=1)
        given = load_file(shop.folder / f"neighbour-{kind}" / "adapter_model.safetensors")
        first = self.first_weights(self.plan(shop, package, kind=kind))
        assert all((first[name] == given[name]).all() for name in given)

    def test_a_package_of_another_rank_is_refused(self, shop: Workshop, neighbour: Path) -> None:
        with pytest.raises(HocketError, match="same kind, rank and targets") as caught:
            trained(self.plan(shop, neighbour, rank=8))
        assert caught.value.reason is Reason.BAD_WEIGHTS

    def test_a_training_with_another_start_is_not_resumed(self, shop: Workshop, neighbour: Path) -> None:
        trained(self.plan(shop, neighbour))
        with pytest.raises(HocketError, match="start differ"):
            trained(replace(self.plan(shop, neighbour), start=None, resume=True))
