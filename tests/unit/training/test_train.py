"""A small training from one end to the other, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from hocket.base_folder import base_digest
from hocket.cli.main import app
from hocket.errors import HocketError, Reason
from hocket.packages.expert.validation import validate
from tests.trainings import Workshop, questions

if TYPE_CHECKING:
    from training.train import Outcome, Progress

STEADY: Final[dict[str, Any]] = {"save_steps": 2, "batch_size": 16, "learning_rate": 0.03}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def trained(plan: Any, on_progress: Any = None) -> Outcome:
    from training.train import train  # noqa: PLC0415 - slow

    return train(plan, on_progress=on_progress)


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Outcome, list[Progress]]:
    shop = Workshop(tiny, tmp_path_factory.mktemp("done"))
    told: list[Progress] = []
    return shop, trained(shop.plan(**STEADY), told.append), told


def test_the_loss_falls_and_progress_is_told(done: tuple[Workshop, Outcome, list[Progress]]) -> None:
    _, outcome, told = done
    losses = [each.loss for each in told if each.loss is not None]
    assert len(losses) == outcome.steps == 4
    assert losses[-1] < losses[0]
    assert outcome.train_loss == losses[-1]
    assert [each.step for each in told if each.eval_loss is not None] == [2, 4]
    assert [
        each.done for each in told if each.phase == "training" and each.loss is None and each.eval_loss is None
    ] == [
        1,
        2,
        3,
        4,
    ]
    assert {each.phase for each in told} >= {"training", "evaluating"}


def test_the_tokens_told_are_those_of_the_steps_that_were_taken(
    done: tuple[Workshop, Outcome, list[Progress]], capsys: pytest.CaptureFixture[str]
) -> None:
    from training.__main__ import _print  # noqa: PLC0415 - slow

    _, outcome, _ = done
    of_all = outcome.steps * STEADY["batch_size"] / outcome.examples
    assert outcome.tokens_learnt == pytest.approx(of_all * outcome.tokens, rel=0.05)
    _print(replace(outcome, tokens=4000, tokens_learnt=600, seconds=2.0))
    told = capsys.readouterr().out
    assert "examples of 4000 tokens" in told
    assert "600 tokens learnt in 2 s, 300 tokens/s" in told


def test_the_best_checkpoint_is_kept(done: tuple[Workshop, Outcome, list[Progress]]) -> None:
    shop, outcome, told = done
    evaluated = {each.step: each.eval_loss for each in told if each.eval_loss is not None}
    best = min(evaluated, key=lambda step: evaluated[step] or 0.0)
    assert outcome.kept == f"checkpoint-{best}"
    assert outcome.eval_loss == evaluated[best]
    kept = load_file(shop.folder / "out" / "checkpoints" / outcome.kept / "adapter_model.safetensors")
    written = load_file(shop.folder / "out" / "adapter_model.safetensors")
    assert written.keys() == kept.keys()
    assert all((written[name] == kept[name]).all() for name in kept)


def test_the_best_evaluation_is_kept_wherever_checkpoints_are_written(shop: Workshop) -> None:
    contrary = [{**row, "completion": "colourless"} for row in questions(4)]  # so that learning makes it worse
    told: list[Progress] = []
    plan = shop.plan(save_steps=4, eval_steps=1, learning_rate=0.05, warmup_ratio=0.0)
    shop.data("eval.jsonl", contrary)
    outcome = trained(plan, told.append)
    evaluated = {each.step: each.eval_loss for each in told if each.eval_loss is not None}
    best = min(evaluated, key=lambda step: evaluated[step] or 0.0)
    assert list(evaluated) == [1, 2, 3, 4]
    assert best < 4  # where no checkpoint would be written
    assert (outcome.kept, outcome.eval_loss) == (f"checkpoint-{best}", evaluated[best])
    out = shop.folder / "out"
    kept = load_file(out / "checkpoints" / outcome.kept / "adapter_model.safetensors")
    written = load_file(out / "adapter_model.safetensors")
    assert all((written[name] == kept[name]).all() for name in kept)
    final = load_file(out / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert any((written[name] != final[name]).any() for name in final)
    document = json.loads((out / "manifest.json").read_text())
    assert document["training"]["packaging_checkpoint"] == outcome.kept
    assert document["evaluation"]["metrics"]["eval_loss"] == evaluated[best]

    moved = shop.folder / "moved"
    out.rename(moved)
    again = trained(replace(plan, out=moved, resume=True))  # it is at its end already
    assert (again.kept, again.eval_loss) == (outcome.kept, outcome.eval_loss)
    resumed = load_file(moved / "adapter_model.safetensors")
    assert all((written[name] == resumed[name]).all() for name in written)


def test_the_manifest_says_the_settings_that_were_used(
    done: tuple[Workshop, Outcome, list[Progress]], tmp_path: Path
) -> None:
    from training.outputs import _manifest  # noqa: PLC0415 - slow
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    shop, outcome, _ = done
    given = {"num_epochs": 9, "lr_scheduler_kwargs": {"num_cycles": 4}, "bf16": True, "rank_of_honour": 1}
    settings = {"epochs": 2.0, "scheduler_cycles": 0, "precision": "float32", "qlora": False, "keep": "final"}
    plan = plan_training(
        Workshop(shop.base, tmp_path).manifest(config=given, base={"quantization": "int4"}),
        base=shop.base,
        out=tmp_path / "out",
        data=shop.data(),
        settings={**settings, "gradient_checkpointing": True, "save_total_limit": 7, "logging_steps": 3},
    )
    document = _manifest(plan, outcome, b"weights")
    config = document["training"]["config"]
    assert (config["qlora"], config["bf16"], config["fp16"], config["keep"]) == (False, False, False, "final")
    assert (config["gradient_checkpointing"], config["epochs"], config["rank_of_honour"]) == (True, 2.0, 1)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    again = plan_training(tmp_path / "manifest.json", base=shop.base, out=tmp_path / "out", data=shop.data())
    assert again.settings == replace(plan.settings, eval_steps=plan.settings.save_steps)


def test_the_manifest_is_filled_in(done: tuple[Workshop, Outcome, list[Progress]]) -> None:
    shop, outcome, _ = done
    document = json.loads((shop.folder / "out" / "manifest.json").read_text())
    [base] = document["base_models"]
    [adapter] = base["adapters"]
    assert base["hocket_base"] == base_digest(shop.base)
    assert adapter["size_bytes"] == (shop.folder / "out" / "adapter_model.safetensors").stat().st_size
    assert document["training"]["packaging_checkpoint"] == outcome.kept
    assert document["training"]["config"]["learning_rate"] == STEADY["learning_rate"]
    assert document["evaluation"]["metrics"]["eval_loss"] == outcome.eval_loss
    assert document["evaluation"]["test_set_size"] == outcome.eval_examples == 4
    assert str(shop.folder) not in json.dumps(document)
    assert str(shop.base) not in (shop.folder / "out" / "adapter_config.json").read_text()


def test_the_curve_is_written_and_drawn(done: tuple[Workshop, Outcome, list[Progress]]) -> None:
    out = done[0].folder / "out"
    points = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "loss" in point] == [1, 2, 3, 4]
    assert [point["step"] for point in points if "eval_loss" in point] == [2, 4]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_comes_out_is_packed_and_valid(done: tuple[Workshop, Outcome, list[Progress]], tmp_path: Path) -> None:
    package = tmp_path / "x.expert"
    out = done[0].folder / "out"
    result = CliRunner().invoke(app, ["expert", "pack", str(out), "--out", str(package), "--json"])
    assert result.exit_code == 0, result.output
    report = validate(package.read_bytes())
    assert report.errors == ()
    assert report.facts is not None
    assert (report.facts.rank, report.facts.base.digest) == (4, base_digest(done[0].base))


def test_a_resumed_training_ends_with_the_same_weights(
    done: tuple[Workshop, Outcome, list[Progress]], shop: Workshop
) -> None:
    earlier = done[0].folder / "out"
    plan = shop.plan(**STEADY)
    with pytest.raises(HocketError, match="Stop"):
        trained(plan, stop_after(3))
    outcome = trained(shop.plan(resume=True, **STEADY))
    assert outcome.steps == 4
    resumed, whole = (load_file(out / "adapter_model.safetensors") for out in (shop.folder / "out", earlier))
    assert all((resumed[name] == whole[name]).all() for name in whole)
    points = [(out / "loss.jsonl").read_text() for out in (shop.folder / "out", earlier)]
    assert points[0] == points[1]


def stop_after(step: int) -> Any:
    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise HocketError(Reason.BAD_REQUEST, "Stop")

    return stop


@pytest.mark.parametrize(
    "kind", [pytest.param("dora", marks=pytest.mark.long), pytest.param("ia3", marks=pytest.mark.long), "soft_prompt"]
)
def test_every_kind_comes_out_valid(kind: str, shop: Workshop) -> None:
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    declared = [{"name": "style", "path": "style.safetensors", "tokens": 5, "init_text": "be brief"}]
    manifest = shop.manifest(kind, **({"soft_prompts": declared} if kind == "soft_prompt" else {}))
    document = json.loads(manifest.read_text())
    [base] = document.pop("base_models")
    adapters = base.pop("adapters")
    manifest.write_text(json.dumps({**document, "schema_version": "1.0", "base_model": base, "adapters": adapters}))
    settings = {"max_steps": 2, "batch_size": 4, "scheduler_cycles": 2, "lr_scheduler": "cosine_with_restarts"}
    plan = plan_training(manifest, base=shop.base, out=shop.folder / "out", data=shop.data(), settings=settings)
    outcome = trained(plan)
    assert (outcome.kept, outcome.eval_loss) == ("final", None)
    result = CliRunner().invoke(app, ["expert", "validate", str(shop.folder / "out"), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["errors"]) == (0, [])


def test_checkpoints_are_not_mixed_with_another_training(
    done: tuple[Workshop, Outcome, list[Progress]], shop: Workshop
) -> None:
    shutil.copytree(done[0].folder / "out", shop.folder / "out")
    with pytest.raises(HocketError, match="--resume"):
        trained(shop.plan(**STEADY))
    with pytest.raises(HocketError, match=r"learning_rate differ"):
        trained(shop.plan(resume=True, **{**STEADY, "learning_rate": 0.02}))
    (shop.folder / "out" / "checkpoints" / "plan.json").unlink()
    with pytest.raises(HocketError, match="another folder"):
        trained(shop.plan(resume=True, **STEADY))
    (shop.folder / "out" / "checkpoints").rename(shop.folder / "away")
    (shop.folder / "out" / "checkpoints").write_bytes(b"a file")
    with pytest.raises(HocketError, match="cannot use"):
        trained(shop.plan(**STEADY))


def test_data_without_a_row_that_fits_are_refused(shop: Workshop) -> None:
    with pytest.raises(HocketError) as caught:
        trained(shop.plan(max_length=8))
    assert caught.value.reason is Reason.BAD_DATASET


def test_a_bad_line_is_named(shop: Workshop) -> None:
    plan = shop.plan()
    shop.data(rows=[*questions(2), {"prompt": "and no answer"}])
    with pytest.raises(HocketError, match="line 3") as caught:
        trained(plan)
    assert caught.value.reason is Reason.BAD_DATASET


def test_data_that_are_no_file_are_not_read(shop: Workshop) -> None:
    os.mkfifo(shop.folder / "pipe")  # which nobody writes
    for data in (Path("/dev/zero"), shop.folder / "pipe"):
        for changed in ({"data": data}, {"eval_data": data}):
            with pytest.raises(HocketError, match="is no file"):
                trained(replace(shop.plan(), **changed))


def test_other_capabilities_are_another_training(
    done: tuple[Workshop, Outcome, list[Progress]], shop: Workshop
) -> None:
    shutil.copytree(done[0].folder / "out", shop.folder / "out")
    plan = shop.plan(resume=True, **STEADY)
    with pytest.raises(HocketError, match="capabilities differ"):
        trained(replace(plan, manifest=replace(plan.manifest, capabilities=("nl2sql:sqlite",))))


def test_bars_come_to_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    from training.__main__ import _Bars  # noqa: PLC0415 - beside the others

    told = [("reading", 5, 10), ("reading", 10, 10), ("training", 1, 4)]
    with _Bars() as bars:
        bars.move("hashing the base", 1, 2)
        bars.move("hashing the base", 2, 2)
        for phase, moved, total in told:
            point = {"step": moved, "loss": None, "eval_loss": None, "learning_rate": None}
            bars.show(SimpleNamespace(phase=phase, done=moved, total=total, **point))  # type: ignore[arg-type]  # alike
        bars.show(
            SimpleNamespace(  # type: ignore[arg-type]  # alike
                phase="training", done=2, total=4, step=2, loss=0.5, eval_loss=0.25, learning_rate=0.001
            )
        )
        shown = {task.description: (task.completed, task.visible) for task in bars._progress.tasks}
    assert shown == {"hashing the base": (2, False), "reading": (10, False), "training": (2, True)}
    said = capsys.readouterr().err
    assert "step 2  loss 0.5000  learning rate 0.001" in said
    assert "step 2  evaluation loss 0.2500" in said


@pytest.mark.parametrize(
    ("modules", "named"), [(["w_pack"], "w_pack"), (["q_proj", "v_prj"], "v_prj"), (["proj"], "proj")]
)
def test_projections_that_the_base_has_not_are_refused(modules: list[str], named: str, shop: Workshop) -> None:
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    adapter = {"type": "lora", "target_modules": modules, "r": 4}
    manifest = shop.manifest(base={"adapters": [adapter]})
    plan = plan_training(manifest, base=shop.base, out=shop.folder / "out", data=shop.data())
    with pytest.raises(HocketError, match=f"no projections called {named}: it has .*q_proj") as caught:
        trained(plan)
    assert caught.value.reason is Reason.BAD_MANIFEST


def test_what_is_no_projection_is_refused(shop: Workshop) -> None:
    from training.plan import plan_training  # noqa: PLC0415 - beside the others

    manifest = shop.manifest(base={"adapters": [{"type": "lora", "target_modules": ["q_proj", "mlp"], "r": 4}]})
    plan = plan_training(manifest, base=shop.base, out=shop.folder / "out", data=shop.data())
    with pytest.raises(HocketError, match="no projections called q_proj, mlp"):
        trained(plan)


def test_a_base_that_is_damaged_is_refused(shop: Workshop) -> None:
    copy = shop.folder / "tiny"
    shutil.copytree(shop.base, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(HocketError) as caught:
        trained(Workshop(copy, shop.folder).plan())
    assert caught.value.reason is Reason.NOT_SERVABLE


def test_a_loss_that_is_no_number_ends_it(shop: Workshop) -> None:
    copy = shop.folder / "tiny"
    shutil.copytree(shop.base, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(HocketError, match="no number"):
        trained(Workshop(copy, shop.folder).plan())


def test_float16_is_not_for_a_cpu(shop: Workshop) -> None:
    from training.plan import Precision  # noqa: PLC0415 - beside the others

    with pytest.raises(HocketError, match="float16"):
        trained(shop.plan(precision=str(Precision.FLOAT16)))


def test_a_device_that_is_not_there_is_refused(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: PLC0415 - slow

    from training.model import device_of  # noqa: PLC0415 - slow
    from training.plan import Device  # noqa: PLC0415 - beside the others

    plan = replace(shop.plan(), device=Device.CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HocketError, match="no CUDA device"):
        device_of(plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(HocketError, match="CUDA_VISIBLE_DEVICES"):
        device_of(plan)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of(plan) == torch.device("cuda", 0)


def test_without_bitsandbytes_four_bits_are_refused_with_the_way_out(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import extras  # noqa: PLC0415 - beside the others

    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(HocketError, match="--no-qlora"):
        trained(shop.plan(qlora=True))


def test_packed_examples_do_not_see_each_other(tiny: Path) -> None:
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    from training.batches import NO_LOSS, Collator  # noqa: PLC0415 - slow

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")
    pieces = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    rows = [
        {"input_ids": pieces[0] + pieces[1], "labels": pieces[0] + pieces[1], "seq_lengths": [4, 3]},
        {"input_ids": pieces[2], "labels": pieces[2], "seq_lengths": [5]},
    ]
    batch = Collator(pad_id=0)(rows)
    assert batch["labels"].tolist() == [[NO_LOSS, 6, 7, 8, NO_LOSS, 10, 11], [NO_LOSS, 13, 14, 15, 16, *[NO_LOSS] * 2]]
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([piece]), use_cache=False).logits[0] for piece in pieces]
    torch.testing.assert_close(packed[0], torch.cat(alone[:2]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1, :5], alone[2], atol=1e-5, rtol=1e-5)


def test_the_script_trains_and_speaks_json(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    from training.__main__ import main  # noqa: PLC0415 - beside the others

    shop.manifest(config={"packing": True, "save_steps": 2, "warmup_ratio": 0.5})
    given = [str(shop.folder), "--base", str(shop.base), "--data", str(shop.data()), "--out", str(shop.folder / "out")]
    options = ["--max-steps", "2", "--batch-size", "2", "--logging-steps", "1", "--precision", "bfloat16"]
    assert main([*given, *options, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines[:-1]] == [1, 2]
    assert (lines[-1]["outcome"]["kept"], lines[-1]["outcome"]["eval_loss"]) == ("final", None)
    assert main([*given, *options, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "BAD_REQUEST"
    assert main([*given, *options, "--resume"]) == 0  # it is at its end already
    assert capsys.readouterr().out.splitlines()[-1] == f"      hocket expert pack {shop.folder / 'out'}"
    assert main([*given, "--threads", "1", *options[2:], "--max-steps", "1", "--out", str(shop.folder / "other")]) == 0
    assert "loss" in capsys.readouterr().err
    assert main([*given, "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
