"""An adapter goes on from another one, or learns to be mixed with it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hocket.base_folder import base_digest
from hocket.cli.main import app
from hocket.errors import HocketError, Reason
from tests.experts import adapter_tensors, expert_manifest, expert_package, soft_prompt
from tests.trainings import ADAPTERS, MODULES, QUICK, Workshop, questions, workshop

if TYPE_CHECKING:
    from pathlib import Path

    from training.train import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SIZES: Final[dict[str, Any]] = {"rank": 4, "modules": tuple(MODULES)}
"""Of `ADAPTERS`."""
ONE_STEP: Final[dict[str, Any]] = {"max_steps": 1, "warmup_ratio": 0.0}
"""In which weights change."""
STYLE: Final[dict[str, Any]] = {
    "manifest": {"soft_prompts": [{"name": "style", "path": "style.safetensors", "tokens": 3}]},
    "files": {"style.safetensors": soft_prompt()},
}
"""A soft prompt besides."""


def trained(plan: Any, on_progress: Any = None) -> Outcome:
    from training.train import train  # noqa: PLC0415 - slow

    return train(plan, on_progress=on_progress)


def packed(shop: Workshop, kind: str = "lora", **settings: Any) -> Path:
    """A package of an adapter that was trained a little, and whose tensors fit the base."""
    trained(shop.plan(kind, f"neighbour-{kind}", learning_rate=0.05, **settings))
    package = shop.folder / f"{kind}.expert"
    arguments = ["expert", "pack", str(shop.folder / f"neighbour-{kind}"), "--out", str(package)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return package


def unfit(shop: Workshop, kind: str = "lora", **options: Any) -> Path:
    """A package for the base, whose tensors do not fit it; that shows when they are put in, and no sooner."""
    options = {**SIZES, **options}
    [base] = expert_manifest(kind=kind, rank=options["rank"], modules=options["modules"])["base_models"]
    stated = {"base_models": [{**base, "hocket_base": base_digest(shop.base)}], **options.pop("manifest", {})}
    package = shop.folder / "unfit.expert"
    package.write_bytes(expert_package(kind=kind, manifest=stated, **options))
    return package


@pytest.fixture(scope="module")
def neighbour(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(Workshop(tiny, tmp_path_factory.mktemp("neighbour")))


def plan_beside(
    shop: Workshop, neighbour: Path | None, weight: float | None = 0.25, kind: str = "lora", **more: Any
) -> Any:
    from training.plan import plan_training  # noqa: PLC0415 - with what it imports

    return plan_training(
        shop.manifest(kind),
        base=shop.base,
        out=shop.folder / "out",
        data=shop.data(),
        eval_data=shop.data("eval.jsonl", questions(12)),
        beside=neighbour,
        beside_weight=weight,
        resume=more.pop("resume", False),
        settings={**QUICK, "save_steps": 2, **more},
    )


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_beside_its_neighbour_it_answers_as_the_mixture_of_both(kind: str, shop: Workshop, neighbour: Path) -> None:
    import torch  # noqa: PLC0415 - slow

    from training.model import device_of, load_model, load_tokenizer, precision_of  # noqa: PLC0415 - slow
    from training.neighbour import Turns  # noqa: PLC0415 - slow

    package = neighbour if kind == "lora" else packed(shop, kind, **ONE_STEP)
    plan = plan_beside(shop, package)

    def model() -> Any:
        device = device_of(plan)
        made = load_model(plan, load_tokenizer(plan), device, precision_of(plan, device)).eval()
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        return made

    # PEFT's own sum of two adapters is the oracle.
    mixed = model()
    mixed.load_adapter(str(package.parent / f"neighbour-{kind}"), adapter_name="other")
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


def test_steps_take_turns_with_all_their_passes_and_so_do_the_batches_of_each_evaluation(
    shop: Workshop, neighbour: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415 - slow

    from training import train as training  # noqa: PLC0415 - slow
    from training.model import load_model  # noqa: PLC0415 - slow

    models: list[Any] = []
    passes: list[tuple[bool, float]] = []

    def scale() -> float:
        [same] = {each.scaling["default"] for each in models[0].modules() if isinstance(each, LoraLayer)}
        return float(same)

    def watched(*arguments: Any) -> Any:
        models.append(load_model(*arguments))
        models[0].register_forward_pre_hook(lambda model, _: passes.append((model.training, scale())))
        return models[0]

    monkeypatch.setattr(training, "load_model", watched)
    trained(plan_beside(shop, neighbour, gradient_accumulation_steps=2))
    alone, together = 2.0, 1.5  # of alpha / r = 2, a quarter is the neighbour's
    steps = [(True, alone), (True, alone), (True, together), (True, together)]
    evaluation = [(False, alone), (False, together), (False, alone)]
    assert passes == (steps + evaluation) * 2
    assert scale() == alone


class TestMisfits:
    """A neighbour whose tensors are not for the base."""

    def turns(self, shop: Workshop, neighbour: Path, module: str, shape: tuple[int, int] | None = None) -> Any:
        """Those of a neighbour that adapts `module` instead of a `q_proj`, and reads what has another width."""
        from training.model import device_of, load_model, load_tokenizer, precision_of  # noqa: PLC0415 - slow
        from training.neighbour import Turns  # noqa: PLC0415 - slow

        plan = plan_beside(shop, neighbour)
        tensors = dict(plan.beside.adapter.tensors)
        path = "base_model.model.model.layers.0."
        for part in ("lora_A", "lora_B"):
            tensors[f"{path}{module}.{part}.weight"] = tensors.pop(f"{path}self_attn.q_proj.{part}.weight")
        if shape is not None:
            name = f"{path}{module}.lora_A.weight"
            tensors[name] = replace(tensors[name], shape=shape)
        device = device_of(plan)
        model = load_model(plan, load_tokenizer(plan), device, precision_of(plan, device))
        return Turns(model, replace(plan.beside, adapter=replace(plan.beside.adapter, tensors=tensors)))

    @pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.o_proj"])
    def test_what_the_base_has_is_accepted_whether_the_other_adapts_it_or_not(
        self, module: str, shop: Workshop, neighbour: Path
    ) -> None:
        self.turns(shop, neighbour, module)

    @pytest.mark.parametrize(
        ("module", "shape"),
        [("self_attn.z_proj", None), ("input_layernorm", None), ("self_attn.q_proj", (8, 16))],
        ids=["missing", "a norm", "another width"],
    )
    def test_what_it_has_not_is_refused(
        self, module: str, shape: tuple[int, int] | None, shop: Workshop, neighbour: Path
    ) -> None:
        with pytest.raises(HocketError, match=rf"adapts .*{module}, of which") as caught:
            self.turns(shop, neighbour, module, shape)
        assert caught.value.reason is Reason.BAD_WEIGHTS


def test_what_is_learnt_beside_a_neighbour_is_its_own_and_another_than_alone(shop: Workshop, neighbour: Path) -> None:
    trained(plan_beside(shop, neighbour))
    trained(replace(plan_beside(shop, neighbour), out=shop.folder / "alone", beside=None))
    beside, without = (load_file(shop.folder / out / "adapter_model.safetensors") for out in ("out", "alone"))
    assert beside.keys() == without.keys()  # nothing of the neighbour is in it
    assert any((beside[name] != without[name]).any() for name in beside)
    document = json.loads((shop.folder / "out" / "manifest.json").read_text())
    assert document["training"]["metadata"]["beside"]["weight"] == 0.25
    assert document["training"]["metadata"]["beside"]["digest"].startswith("sha256:")


def test_checkpoints_from_before_there_were_neighbours_are_resumed(shop: Workshop) -> None:
    plan = plan_beside(shop, None, None, **ONE_STEP)
    trained(plan)
    identity = json.loads((plan.out / "checkpoints" / "plan.json").read_text())
    assert identity.keys() == {
        "base",
        "data",
        "eval_data",
        "prompt_template",
        "capabilities",
        "adapter",
        "settings",
    }


def test_what_is_resumed_takes_the_same_turns(shop: Workshop, neighbour: Path) -> None:
    trained(plan_beside(shop, neighbour, save_steps=1))
    whole = load_file(shop.folder / "out" / "adapter_model.safetensors")
    (shop.folder / "out").rename(shop.folder / "whole")

    def stop(progress: Any) -> None:
        if progress.step == 2:
            raise HocketError(Reason.BAD_REQUEST, "Stop")

    with pytest.raises(HocketError, match="Stop"):
        trained(plan_beside(shop, neighbour, save_steps=1), stop)
    assert [path.name for path in (shop.folder / "out" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(HocketError, match="beside differ"):
        trained(plan_beside(shop, neighbour, weight=0.5, resume=True, save_steps=1))
    trained(plan_beside(shop, neighbour, resume=True, save_steps=1))
    resumed = load_file(shop.folder / "out" / "adapter_model.safetensors")
    assert all((resumed[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0, float("nan")])
def test_a_weight_that_leaves_nothing_for_one_of_them_is_refused(
    weight: float, shop: Workshop, neighbour: Path
) -> None:
    with pytest.raises(HocketError, match="--beside-weight") as caught:
        plan_beside(shop, neighbour, weight)
    assert caught.value.reason is Reason.BAD_REQUEST


def test_a_weight_is_a_half_unless_told_and_nothing_without_a_neighbour(
    shop: Workshop, neighbour: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.__main__ import main  # noqa: PLC0415 - with what it imports

    assert plan_beside(shop, neighbour, None).beside.weight == 0.5
    assert plan_beside(shop, None, None).beside is None
    with pytest.raises(HocketError, match="give --beside EXPERT too") as caught:
        plan_beside(shop, None, 0.5)
    assert caught.value.reason is Reason.BAD_REQUEST
    arguments = ["--base", str(shop.base), "--data", str(shop.data()), "--out", str(shop.folder / "out")]
    assert main([str(shop.manifest()), *arguments, "--beside-weight", "0.5", "--json"]) == 2
    assert "give --beside EXPERT too" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_only_low_rank_adapters_are_trained_beside_each_other(shop: Workshop, neighbour: Path) -> None:
    with pytest.raises(HocketError, match="both must be LoRA") as caught:
        plan_beside(shop, neighbour, kind="dora")
    assert caught.value.reason is Reason.UNSUPPORTED_TYPE
    with pytest.raises(HocketError, match="both must be LoRA"):
        plan_beside(shop, unfit(shop, "ia3"))
    with pytest.raises(HocketError, match="a plain LoRA alone"):
        plan_beside(shop, unfit(shop, **STYLE))
    assert plan_beside(shop, neighbour, kind="rslora").beside is not None


def test_a_neighbour_of_another_base_is_refused(shop: Workshop, neighbour: Path, tmp_path: Path) -> None:
    other = workshop(tmp_path / "other-base", tmp_path)
    document = json.loads((other.base / "tokenizer_config.json").read_text())
    (other.base / "tokenizer_config.json").write_text(json.dumps({**document, "changed": 1}))
    assert base_digest(other.base) != base_digest(shop.base)
    with pytest.raises(HocketError) as caught:
        plan_beside(other, neighbour)
    assert caught.value.reason is Reason.BASE_MISMATCH


@pytest.mark.parametrize("option", ["beside", "start_package"])
def test_a_package_that_cannot_be_served_is_not_trained_with(option: str, shop: Workshop) -> None:
    from training.plan import plan_training  # noqa: PLC0415 - with what it imports

    def planned(package: Path) -> Any:
        paths: dict[str, Any] = {"base": shop.base, "out": shop.folder / "out", "data": shop.data(), option: package}
        return getattr(plan_training(shop.manifest(), **paths), option)

    assert planned(unfit(shop)) is not None
    with pytest.raises(HocketError, match=r"unfit.expert cannot be served, .*modules_to_save") as caught:
        planned(unfit(shop, config={"modules_to_save": ["lm_head"]}))
    assert caught.value.reason is Reason.NOT_SERVABLE


def test_what_is_no_package_is_refused(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "no.expert").write_bytes(b"nothing")
    with pytest.raises(HocketError):
        plan_beside(shop, tmp_path / "no.expert")
    with pytest.raises(HocketError, match="cannot read"):
        plan_beside(shop, tmp_path / "gone.expert")


class TestStart:
    def plan(self, shop: Workshop, start: Path | None, kind: str = "lora", **stated: Any) -> Any:
        from training.plan import plan_training  # noqa: PLC0415 - with what it imports

        return plan_training(
            shop.manifest(kind, base={"adapters": [{**ADAPTERS[kind], **stated}]}),
            base=shop.base,
            out=shop.folder / "out",
            data=shop.data(),
            start_package=start,
            settings={**QUICK, "max_steps": 1},
        )

    def first_weights(self, plan: Any) -> dict[str, Any]:
        from peft import get_peft_model_state_dict  # noqa: PLC0415 - slow

        from training.model import device_of, load_model, load_tokenizer, precision_of  # noqa: PLC0415 - slow

        device = device_of(plan)
        model = load_model(plan, load_tokenizer(plan), device, precision_of(plan, device))
        return {name: each.numpy() for name, each in get_peft_model_state_dict(model).items()}

    @pytest.mark.parametrize(
        "kind",
        ["lora", "dora", *(pytest.param(each, marks=pytest.mark.long) for each in ("ia3", "rslora", "soft_prompt"))],
    )
    def test_its_first_weights_are_those_of_the_package(self, kind: str, shop: Workshop) -> None:
        package = packed(shop, kind, **ONE_STEP)
        given = load_file(shop.folder / f"neighbour-{kind}" / "adapter_model.safetensors")
        first, anew = (self.first_weights(self.plan(shop, start, kind)) for start in (package, None))
        assert first.keys() == given.keys()
        assert all((first[name] == given[name]).all() for name in given)
        assert any((anew[name] != given[name]).any() for name in given)

    def test_where_it_began_is_in_the_manifest_that_comes_out(self, shop: Workshop, neighbour: Path) -> None:
        plan = self.plan(shop, neighbour)
        trained(plan)
        document = json.loads((shop.folder / "out" / "manifest.json").read_text())
        assert document["training"]["metadata"]["start"] == plan.start_package.digest
        with pytest.raises(HocketError, match="start_package differ"):
            trained(replace(plan, start_package=None, resume=True))

    @pytest.mark.parametrize(
        ("field", "options"),
        [
            ("kind", {"kind": "dora"}),
            ("rank", {"rank": 8}),
            ("alpha", {"config": {"lora_alpha": 16}}),
            ("use_rslora", {"config": {"use_rslora": True}}),
            (
                "rank_pattern",
                {
                    "config": {"rank_pattern": {"q_proj": 2}},
                    "tensors": adapter_tensors(**SIZES) | adapter_tensors(rank=2, modules=("q_proj",)),
                },
            ),
            ("alpha_pattern", {"config": {"alpha_pattern": {"q_proj": 4}}}),
            ("bias", {"config": {"bias": "lora_only"}}),
            (
                "lora_bias",
                {
                    "config": {"lora_bias": True},
                    "tensors": {
                        name.replace("lora_B.weight", "lora_B.bias"): each[:, 0].copy() if "lora_B" in name else each
                        for name, each in adapter_tensors(**SIZES).items()
                    }
                    | adapter_tensors(**SIZES),
                },
            ),
            ("soft_prompts", STYLE),
        ],
    )
    def test_a_package_of_another_adapter_than_the_manifests_is_refused(
        self, field: str, options: dict[str, Any], shop: Workshop
    ) -> None:
        assert self.plan(shop, unfit(shop)).start_package is not None
        with pytest.raises(HocketError, match=rf"its {field} is .*, and what is trained has ") as caught:
            self.plan(shop, unfit(shop, **options))
        assert (caught.value.reason, caught.value.field) == (Reason.BAD_WEIGHTS, field)

    def test_a_package_with_several_soft_prompts_is_refused(self, shop: Workshop) -> None:
        assert self.plan(shop, unfit(shop, "soft_prompt"), "soft_prompt").start_package is not None
        with pytest.raises(HocketError, match="its soft_prompts is 2, and what is trained has 1"):
            self.plan(shop, unfit(shop, "soft_prompt", **STYLE), "soft_prompt")

    def test_a_package_with_other_targets_is_refused_with_the_first_tensor_that_differs(
        self, shop: Workshop, neighbour: Path
    ) -> None:
        plan = self.plan(shop, neighbour, target_modules=["q_proj", "v_proj"])
        with pytest.raises(HocketError, match=r"layers\.0\.mlp\.down_proj\.lora_A\.weight is \[4, ") as caught:
            self.first_weights(plan)
        assert caught.value.reason is Reason.BAD_WEIGHTS
        self.first_weights(self.plan(shop, neighbour))
