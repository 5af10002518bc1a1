"""Training for composition: an adapter learns beside another one, which is frozen.

Adapters that were trained apart were each alone on the base. Added up by weight they get into each other's way: each
has half of its strength, and reads what the other has moved. So the adapter in training meets this while it learns.
Every other step it stands alone with weight 1, as it does when it answers by itself; in the steps between it has the
weight `1 - w`, and its neighbour has `w`:

    y = W x + (1 - w) s B A x + w s' B' A' x

which is the sum that a worker computes for a mixture of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear
from transformers import TrainerCallback

from hocket.errors import HocketError, Reason
from training.model import ADAPTER, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from training.plan import Beside

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Turns(TrainerCallback):
    """Has the adapter alone and beside its neighbour in turns: steps of the optimizer, and batches of an evaluation.

    Args:
        model: The base with the adapter in training, a LoRA, on the device that it is trained on.
        beside: The neighbour, a LoRA for the same base, and its weight.

    Raises:
        HocketError: `BAD_WEIGHTS` if the neighbour's tensors do not fit the base.
    """

    def __init__(self, model: PeftModel, beside: Beside) -> None:
        self._together = False
        self._batches = 0
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._scales = [layer.scaling[ADAPTER] for layer in self._layers]
        self._weight = beside.weight
        config, tensors = beside.adapter.config, beside.adapter.tensors
        scale = beside.weight * config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)
        for name in (name.removesuffix(_A) for name in tensors if name.endswith(_A)):
            module = _projection(model, name)
            a, b = (tensor_of(tensors[name + part]).to(module.weight.device) for part in (_A, _B))
            if (a.shape[1], b.shape[0]) != (module.in_features, module.out_features):
                raise _misfit(name)
            module.register_forward_hook(self._adding(a, b * scale))

    def _adding(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor | None]:
        def add(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            if not self._together:
                return None
            return output + linear(linear(inputs[0].to(a.dtype), a), b).to(output.dtype)

        return add

    def _turn(self, number: int) -> None:
        """Alone where the number is even."""
        self._together = number % 2 == 1
        own = 1 - self._weight if self._together else 1.0
        for layer, scale in zip(self._layers, self._scales, strict=True):
            layer.scaling[ADAPTER] = own * scale

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """A step: by its number, so that a resumed training takes the same turns."""
        del args, control
        self._turn(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """What may follow is an evaluation, whose batches begin anew."""
        del args, state, control
        self._batches = 0
        self._turn(0)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        """The next batch of an evaluation."""
        del args, state, control
        self._batches += 1
        self._turn(self._batches)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """What is saved is the adapter as it stands alone."""
        del args, state, control
        self._turn(0)


def _projection(model: PeftModel, name: str) -> nn.Linear:
    """Of the base, below the adapter in training where that has it too. Those of 4-bit bases are `Linear` as well."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise _misfit(name) from error
    found = module.base_layer if isinstance(module, LoraLayer) else module
    if not isinstance(found, nn.Linear):
        raise _misfit(name)
    return found


def _misfit(name: str) -> HocketError:
    return HocketError(Reason.BAD_WEIGHTS, f"the neighbour adapts {name[-200:]}, of which this base has no such matrix")
