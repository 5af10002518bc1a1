"""Training on a CUDA device: losses are those of a CPU, in half precision and on a base in 4 bits as well."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hocket.cli.main import app
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainings import Workshop
    from training.plan import Device
    from training.train import Outcome

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Most that losses may differ from those of a CPU in float32, as a share of them."""
STEPS: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "batch_size": 8}
FOUR_BITS = 0.1
"""The same for a base in 4 bits: its weights are others."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def losses(plan: Any, device: Device) -> tuple[list[float], list[float], Outcome]:
    """Of every step, and of every evaluation."""
    from training.train import Progress, train  # noqa: PLC0415 - slow

    told: list[Progress] = []
    outcome = train(replace(plan, device=device, out=plan.out / str(device)), on_progress=told.append)
    steps = [each.loss for each in told if each.loss is not None]
    return steps, [each.eval_loss for each in told if each.eval_loss is not None], outcome


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])  # a soft prompt begins with what the device draws
def test_losses_are_those_of_a_cpu(shop: Workshop, kind: str, precision: str) -> None:
    from training.plan import Device  # noqa: PLC0415 - beside the others

    config = {"dropout": 0.0}  # what is dropped, the device draws
    here, evaluated_here, _ = losses(plan_of(shop, kind, config, precision="float32"), Device.CPU)
    there, evaluated, outcome = losses(plan_of(shop, kind, config, precision=precision), Device.CUDA)
    assert there == pytest.approx(here, rel=TOLERANCE[precision])
    assert evaluated == pytest.approx(evaluated_here, rel=TOLERANCE[precision])
    assert (outcome.precision, outcome.device) == (precision, torch.cuda.get_device_name(0))


def plan_of(
    shop: Workshop, kind: str, config: dict[str, Any], *, beside: Path | None = None, **settings: object
) -> Any:
    from tests.trainings import QUICK, questions  # noqa: PLC0415 - beside the others
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    return plan_training(
        shop.manifest(kind, config=config),
        base=shop.base,
        out=shop.folder / "out",
        data=shop.data(),
        eval_data=shop.data("eval.jsonl", questions(4 if beside is None else 16)),  # a batch for each turn
        beside=beside,
        settings={**QUICK, **STEPS, **settings},
    )


def test_bfloat16_is_what_a_device_takes_by_itself_and_the_adapter_is_float32(shop: Workshop) -> None:
    from training.plan import Device  # noqa: PLC0415 - beside the others

    _, _, outcome = losses(shop.plan(**STEPS), Device.AUTO)
    assert outcome.precision == "bfloat16"
    assert {tensor.dtype.name for tensor in load_file(outcome.out / "adapter_model.safetensors").values()} == {
        "float32"
    }
    result = CliRunner().invoke(app, ["expert", "pack", str(outcome.out), "--out", str(shop.folder / "x.expert")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_base_in_4_bits_is_trained_on(shop: Workshop, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")
    from training.plan import Device  # noqa: PLC0415 - beside the others

    config = {"dropout": 0.0}
    whole, _, _ = losses(plan_of(shop, kind, config, precision="float32"), Device.CPU)
    there, evaluated, outcome = losses(plan_of(shop, kind, config, qlora=True), Device.CUDA)
    assert there == pytest.approx(whole, rel=FOUR_BITS)
    assert evaluated[-1] < evaluated[0]
    assert outcome.precision == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"precision": name}, most) for name, most in TOLERANCE.items()] + [({"qlora": True}, FOUR_BITS)],
)
def test_losses_beside_another_expert_are_those_of_a_cpu(
    shop: Workshop, settings: dict[str, Any], tolerance: float
) -> None:
    if "qlora" in settings:
        pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")
    from training.plan import Device  # noqa: PLC0415 - beside the others

    _, _, neighbour = losses(shop.plan(out="neighbour", **STEPS), Device.CPU)
    package = shop.folder / "neighbour.expert"
    result = CliRunner().invoke(app, ["expert", "pack", str(neighbour.out), "--out", str(package)])
    assert result.exit_code == 0, result.output
    config = {"dropout": 0.0}
    here, evaluated_here, _ = losses(plan_of(shop, "lora", config, beside=package, precision="float32"), Device.CPU)
    there, evaluated, _ = losses(plan_of(shop, "lora", config, beside=package, **settings), Device.CUDA)
    assert there == pytest.approx(here, rel=tolerance)
    assert evaluated == pytest.approx(evaluated_here, rel=tolerance)


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"packing": True, "max_length": 128}])
def test_a_resumed_training_goes_on_with_the_same_losses(shop: Workshop, more: dict[str, Any]) -> None:
    from training.plan import Device  # noqa: PLC0415 - beside the others
    from training.train import train  # noqa: PLC0415 - slow

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise HocketError(Reason.BAD_REQUEST, "stopped")

    settings = {**STEPS, **more, "precision": "float32"}
    _, evaluated, whole = losses(shop.plan(out="whole", **settings), Device.CUDA)
    plan = replace(shop.plan(out="parts", **settings), device=Device.CUDA)
    with pytest.raises(HocketError, match="stopped"):
        train(plan, on_progress=stop)
    outcome = train(replace(plan, resume=True))
    assert outcome.steps == whole.steps == 6
    assert outcome.train_loss == pytest.approx(whole.train_loss, rel=1e-3)
    assert outcome.eval_loss == pytest.approx(min(evaluated), rel=1e-3)


def test_a_device_without_room_is_a_refusal_with_the_way_out(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import train as training  # noqa: PLC0415 - slow
    from training.plan import Device  # noqa: PLC0415 - beside the others

    def full(*_: object) -> object:
        return torch.empty(2**62, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(training, "load_model", full)
    with pytest.raises(HocketError, match="--gradient-checkpointing") as refused:
        training.train(replace(shop.plan(**STEPS), device=Device.CUDA))
    assert refused.value.reason is Reason.DEVICE_MEMORY
