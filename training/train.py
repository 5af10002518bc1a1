"""Training: a plan in, an adapter out. `train` is the whole of it.

The loop is that of TRL's `SFTTrainer`, the adapters are PEFT's. Ours are the tokens, which are the worker's; the mask
between packed examples; the choice of what is kept; and the manifest that comes out.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hocket.datasets.rows import file_digest, read_rows
from hocket.errors import HocketError, Reason
from training import outputs
from training.batches import NO_LOSS, Collator
from training.examples import Renderer
from training.model import context_length, device_of, load_model, load_tokenizer, precision_of
from training.neighbour import Turns
from training.plan import Keep, Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

    from training.plan import Plan, Settings

    OnProgress = Callable[["Progress"], None]

_CHECKPOINTS: Final = "checkpoints"
_PREFIX: Final = "checkpoint-"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is. Numbers that are not known yet are None.

    Attributes:
        phase: `reading` rows, `training`, or `evaluating`.
        done: Bytes, steps or batches of that phase done.
        total: All of them; None while nobody knows.
        step: Steps of the optimizer.
        loss: Mean per token that carries loss, since the point before; only with new points of the curve.
        eval_loss: The same on the evaluation set, only right after an evaluation.
        learning_rate: At this step, with `loss`.
    """

    phase: str
    done: int
    total: int | None
    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training gave.

    Attributes:
        out: The folder with the adapter and its manifest.
        steps: Steps of the optimizer.
        kept: Whose weights these are: `checkpoint-<step>`, or `final`.
        examples: Examples learnt from; a long text gives several.
        left_out: Rows that were longer than the greatest length.
        eval_examples: Examples of the evaluation set.
        tokens: Tokens of all examples, once.
        parameters: Numbers that were trained.
        train_loss: At the last point of the curve.
        eval_loss: Of the weights that were kept; None without an evaluation set.
        seconds: Of training, evaluations included; after a resumption those since then.
        tokens_learnt: In that time, repetitions counted: as large a share of `tokens` as of the examples.
        device: What it ran on.
        precision: What it computed in.
    """

    out: Path
    steps: int
    kept: str
    examples: int
    left_out: int
    eval_examples: int
    tokens: int
    parameters: int
    train_loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_learnt: int
    device: str
    precision: str


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    """A dataset as the trainer takes it.

    Attributes:
        rows: `input_ids` and `labels`, and `seq_lengths` where examples are packed.
        examples: How many there are.
        left_out: Rows that were too long.
        tokens: Of all examples.
    """

    rows: Dataset
    examples: int
    left_out: int
    tokens: int


def train(plan: Plan, *, on_progress: OnProgress | None = None) -> Outcome:
    """Train an adapter, and write it with its manifest and its loss curve into `plan.out`.

    Given the same plan, the weights are the same on the same CPU, with the same versions and number of threads; also
    after a resumption.

    Args:
        plan: From `training.plan.plan_training`.
        on_progress: Told how far it is.

    Raises:
        HocketError: `BAD_REQUEST` for a device that is not there, a folder that cannot be written, a training there
            that is not resumed, or one that is and had other settings; the refusals of `hocket.datasets.rows` for a
            dataset, with the line, and `BAD_DATASET` for one without a row that fits; `NOT_SERVABLE` for a base that
            cannot be loaded; `BAD_MANIFEST`; `BAD_WEIGHTS` for a package beside or to start from that does not fit it;
            `DEVICE_MEMORY`.
    """
    tell = on_progress or (lambda _: None)
    device = device_of(plan)
    precision = precision_of(plan, device)
    folder = _prepare_folder(plan)
    with _quiet():
        tokenizer = load_tokenizer(plan)
        learnt = _read(plan, plan.data, tokenizer, tell, packed=plan.settings.packing)
        measured = None if plan.eval_data is None else _read(plan, plan.eval_data, tokenizer, tell, packed=False)
        try:
            return _run(plan, folder, tokenizer, learnt, measured, device, precision, tell)
        except torch.OutOfMemoryError as error:
            raise HocketError(
                Reason.DEVICE_MEMORY,
                "the device's memory does not hold this training: a smaller batch with more accumulation, a smaller "
                "greatest length, --gradient-checkpointing or --qlora take less",
            ) from error


def _run(
    plan: Plan,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    learnt: _Data,
    measured: _Data | None,
    device: torch.device,
    precision: Precision,
    tell: OnProgress,
) -> Outcome:
    model = load_model(plan, tokenizer, device, precision)
    reporter = _Reporter(tell)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(plan.settings, folder, device, precision, evaluates=measured is not None),
        train_dataset=learnt.rows,
        eval_dataset=None if measured is None else measured.rows,
        data_collator=Collator(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
        callbacks=[reporter],
    )
    if plan.beside is not None:  # the trainer has moved the model to its device by now
        trainer.add_callback(Turns(model, plan.beside))
    for parameter in model.parameters():  # TRL makes those of 4-bit bases bfloat16, in which small steps are lost
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(transformers.PrinterCallback)
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=plan.resume and _last_checkpoint(folder) is not None)
    seconds = time.perf_counter() - begun
    state = trainer.state
    keeps_best = measured is not None and plan.settings.keep is Keep.BEST
    curve = tuple(state.log_history)
    losses = [point["loss"] for point in curve if "loss" in point]
    kept_step = state.best_global_step if keeps_best else state.global_step
    eval_losses = {int(point["step"]): point["eval_loss"] for point in curve if "eval_loss" in point}
    outcome = Outcome(
        out=plan.out,
        steps=state.global_step,
        kept=f"{_PREFIX}{kept_step}" if keeps_best else "final",
        examples=learnt.examples,
        left_out=learnt.left_out,
        eval_examples=0 if measured is None else measured.examples,
        tokens=learnt.tokens,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        train_loss=losses[-1] if losses else None,
        eval_loss=None if kept_step is None else eval_losses.get(kept_step),
        seconds=seconds,
        tokens_learnt=round(learnt.tokens * reporter.epochs_done),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=str(precision),
    )
    outputs.write_all(plan, outcome, model, curve)
    return outcome


def _read(plan: Plan, path: Path, tokenizer: PreTrainedTokenizerFast, tell: OnProgress, *, packed: bool) -> _Data:
    """A dataset file as tokens."""
    room = context_length(plan)
    longest = plan.settings.max_length
    if room is not None:
        longest = min(longest, room - plan.adapter.tokens)
    renderer = Renderer(tokenizer, plan.prompt_template, plan.manifest.capabilities, longest)
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    left_out = 0
    rows = read_rows(path, on_progress=lambda done, total: tell(Progress("reading", done, total)))
    for example in renderer.examples(rows):
        if example is None:
            left_out += 1
            continue
        ids = list(example.token_ids)
        found["input_ids"].append(ids)
        found["labels"].append([NO_LOSS] * example.answer_start + ids[example.answer_start :])
    count = len(found["input_ids"])
    if count == 0:
        raise HocketError(
            Reason.BAD_DATASET, f"no row of {path} is as short as {longest} tokens: raise --max-length", file=str(path)
        )
    dataset = Dataset.from_dict(found)
    return _Data(
        rows=pack_dataset(dataset, longest) if packed else dataset,
        examples=count,
        left_out=left_out,
        tokens=sum(map(len, found["input_ids"])),
    )


def _arguments(
    settings: Settings, folder: Path, device: torch.device, precision: Precision, *, evaluates: bool
) -> SFTConfig:
    """What TRL calls it all."""
    save_steps = settings.save_steps
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        lr_scheduler_kwargs={"num_cycles": settings.scheduler_cycles} if settings.scheduler_cycles else None,
        warmup_steps=settings.warmup_steps or settings.warmup_ratio,  # below 1 it is a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        seed=settings.seed,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=precision is Precision.BFLOAT16,
        fp16=precision is Precision.FLOAT16,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps or save_steps,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=settings.save_total_limit,
        load_best_model_at_end=evaluates and settings.keep is Keep.BEST,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        prediction_loss_only=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        report_to="none",
    )


class _Reporter(TrainerCallback):
    """Tells how far it is, ends a training whose loss is no number, and has written what may be kept.

    That is a checkpoint of every evaluation that is better than those before, and an evaluation of the last step.
    """

    def __init__(self, tell: OnProgress) -> None:
        self._tell = tell
        self._first_epoch = 0.0
        self._batches = 0
        self.epochs_done = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del control
        self._first_epoch = state.epoch or 0.0
        if state.best_global_step:  # what is resumed may have been moved
            state.best_model_checkpoint = os.path.join(str(args.output_dir), f"{_PREFIX}{state.best_global_step}")  # noqa: PTH118 - as theirs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.epochs_done = (state.epoch or 0.0) - self._first_epoch
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
        self._tell(Progress("training", state.global_step, state.max_steps, step=state.global_step))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,  # noqa: ANN401 - theirs
    ) -> None:
        if args.load_best_model_at_end and (
            state.best_metric is None or more["metrics"]["eval_loss"] < state.best_metric
        ):
            control.should_save = True

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,  # noqa: ANN401 - theirs
    ) -> None:
        del args, control
        self._batches += 1
        self._tell(Progress("evaluating", self._batches, len(more["eval_dataloader"]), step=state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,  # noqa: ANN401 - theirs
    ) -> None:
        del args, control
        logs: Mapping[str, float] = more.get("logs") or {}
        loss, eval_loss = logs.get("loss"), logs.get("eval_loss")
        known = eval_loss if loss is None else loss
        if known is None:
            return
        if not math.isfinite(known):
            raise HocketError(
                Reason.BAD_REQUEST,
                f"the loss is no number any more at step {state.global_step}: lower the learning rate, or compute in "
                "float32 (--precision)",
            )
        if eval_loss is not None:
            self._batches = 0
        self._tell(
            Progress(
                "training",
                state.global_step,
                state.max_steps,
                step=state.global_step,
                loss=loss,
                eval_loss=eval_loss,
                learning_rate=logs.get("learning_rate"),
            )
        )


def _prepare_folder(plan: Plan) -> Path:
    """The folder for checkpoints, if it is free, or has those that are to be continued."""
    folder = plan.out / _CHECKPOINTS
    last = _last_checkpoint(folder)
    if last is not None and not plan.resume:
        raise HocketError(
            Reason.BAD_REQUEST, f"{plan.out} has checkpoints up to {last}: go on with --resume, or give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        identity: dict[str, object] = {
            "base": plan.base_digest,
            "data": file_digest(plan.data),
            "eval_data": None if plan.eval_data is None else file_digest(plan.eval_data),
            "prompt_template": plan.prompt_template,
            "capabilities": plan.manifest.capabilities,  # which some templates put into prompts
            "adapter": asdict(plan.adapter),
            "settings": asdict(plan.settings),
        }
        if plan.start_package is not None:
            identity["start_package"] = plan.start_package.digest
        if plan.beside is not None:
            identity["beside"] = [plan.beside.digest, plan.beside.weight]
        outputs.write_identity(folder, identity, compare=last is not None)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot use {error.filename or folder}: {error.strerror}") from error
    return folder


def _last_checkpoint(folder: Path) -> str | None:
    names = [path.name for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return max(names, key=lambda name: int(name.removeprefix(_PREFIX)), default=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' own bars and advice, which are for their own users, are not shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
