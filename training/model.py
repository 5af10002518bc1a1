"""A base with an adapter to train, and its tokenizer. Nothing is fetched from anywhere, and no pickle is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from hocket.errors import HocketError, Reason
from hocket.packages.adapter import AdapterKind
from hocket.packages.expert.tensors import PROMPT
from training.extras import check_installed
from training.plan import Device, Precision, PromptStart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftConfig, PeftModel

    from hocket.packages.adapter import RawTensor
    from training.plan import AdapterPlan, Plan, StartPackage

_DTYPES: Final = {
    Precision.FLOAT32: torch.float32,
    Precision.BFLOAT16: torch.bfloat16,
    Precision.FLOAT16: torch.float16,
}
_STORED: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ATTENTION: Final = "sdpa"
"""Keeps packed examples apart by a mask; kernels that need more than torch are not asked for."""
_TASK: Final = "CAUSAL_LM"
ADAPTER: Final = "default"
"""What PEFT calls the adapter in training."""


def device_of(plan: Plan) -> torch.device:
    """Where a plan is trained.

    Raises:
        HocketError: `BAD_REQUEST` if it wants a CUDA device and there is none, or there are several.
    """
    if plan.device is Device.CPU or (plan.device is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HocketError(
            Reason.BAD_REQUEST, "there is no CUDA device here, or this torch is built without: --device cpu"
        )
    if (count := torch.cuda.device_count()) > 1:
        raise HocketError(
            Reason.BAD_REQUEST, f"there are {count} CUDA devices, and one trains: choose it (CUDA_VISIBLE_DEVICES=0)"
        )
    return torch.device("cuda", 0)


def precision_of(plan: Plan, device: torch.device) -> Precision:
    """What the forward pass computes in.

    Raises:
        HocketError: `BAD_REQUEST` for float16 on a CPU, whose gradients nothing scales there.
    """
    wanted = plan.settings.precision
    if wanted is Precision.AUTO:
        half = device.type == "cuda" or plan.settings.qlora
        return Precision.BFLOAT16 if half else Precision.FLOAT32
    if wanted is Precision.FLOAT16 and device.type == "cpu":
        raise HocketError(Reason.BAD_REQUEST, "float16 is for CUDA devices: --precision bfloat16 or float32 on a CPU")
    return wanted


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """The tokenizer of a plan's base, with something to pad with.

    Raises:
        HocketError: `NOT_SERVABLE` if it has no fast one, or none that says how a text ends.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            plan.base, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # on damaged files it fails in any way at all
        raise _unreadable(plan, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise HocketError(
            Reason.NOT_SERVABLE, f"the tokenizer in {plan.base} has no fast variant, or no token that ends a text"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(plan: Plan) -> int | None:
    """Positions that the base has, if its configuration says so.

    Raises:
        HocketError: `NOT_SERVABLE` if it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(plan.base, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unreadable(plan, error) from error
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def load_model(plan: Plan, tokenizer: PreTrainedTokenizerFast, device: torch.device, precision: Precision) -> PeftModel:
    """The base, frozen, with a new adapter whose first weights the seed decides, or the package to start from.

    On a CPU the base stays float32, and bfloat16 is what its products are computed in: rows keep their exactness
    between layers, as they will when it serves. On a CUDA device its weights are of the precision, for memory's sake.

    Raises:
        HocketError: `NOT_SERVABLE` if the base cannot be loaded; `BAD_MANIFEST` if it lacks one of the projections;
            `BAD_WEIGHTS` for a package to start from that has other tensors;
            `BAD_REQUEST` if 4 bits are wanted, and bitsandbytes is not there.
    """
    options: dict[str, Any] = {
        "dtype": torch.float32 if device.type == "cpu" else _DTYPES[precision],
        "attn_implementation": _ATTENTION,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if plan.settings.qlora:
        options |= {"quantization_config": _four_bits(precision), "device_map": {"": str(device)}}
    try:
        model = AutoModelForCausalLM.from_pretrained(plan.base, **options)
    except HocketError:
        raise
    except Exception as error:  # as above
        raise _unreadable(plan, error) from error
    module: Any
    for module in model.modules():  # bitsandbytes would round them anew for the first evaluation, on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    _check_targets(model, plan.adapter)
    set_seed(plan.settings.seed)
    try:
        made: PeftModel = get_peft_model(model, _config(plan))
    except ValueError as error:  # what is called so is no projection
        raise _bad_targets(plan.adapter.target_modules, str(error)[:200]) from error
    if plan.start_package is not None:
        _start_from(made, plan.start_package)
    elif plan.adapter.start is PromptStart.TEXT:
        _start_from_text(made, plan.adapter, tokenizer)
    return made


def _check_targets(model: torch.nn.Module, adapter: AdapterPlan) -> None:
    """PEFT is content with one name of several that it finds."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    missing = [name for name in adapter.target_modules if not any(path.endswith(f".{name}") for path in paths)]
    if missing:
        known = sorted(
            {path.rpartition(".")[2] for path, each in model.named_modules() if hasattr(each, "in_features")}
        )
        raise _bad_targets(missing, f"it has {', '.join(known)}")


def _bad_targets(names: Iterable[str], why: str) -> HocketError:
    return HocketError(
        Reason.BAD_MANIFEST,
        f"the base has no projections called {', '.join(names)[:200]}: {why}",
        field="adapters[0].target_modules",
    )


def _four_bits(precision: Precision) -> BitsAndBytesConfig:
    what = "training in 4 bits (--no-qlora keeps the base as it is)"
    check_installed(("bitsandbytes",), what=what, extra="qlora")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # theirs
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES[precision],
    )


def _config(plan: Plan) -> PeftConfig:
    adapter = plan.adapter
    shared: dict[str, Any] = {"task_type": _TASK}
    match adapter.kind:
        case AdapterKind.IA3:
            return IA3Config(
                target_modules=list(adapter.target_modules),
                feedforward_modules=list(adapter.feedforward_modules),
                **shared,
            )
        case AdapterKind.SOFT_PROMPT:
            sampled = adapter.start is PromptStart.VOCAB_SAMPLE
            return PromptTuningConfig(
                num_virtual_tokens=adapter.tokens,
                prompt_tuning_init="SAMPLE_VOCAB" if sampled else "RANDOM",
                **shared,
            )
        case _:
            return LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=list(adapter.target_modules),
                use_dora=adapter.kind is AdapterKind.DORA,
                use_rslora=adapter.use_rslora,
                **shared,
            )


def _start_from(model: PeftModel, start: StartPackage) -> None:
    """Put in the weights of a package; all of them, and no others."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    given = {name: tensor_of(raw) for name, raw in start.adapter.tensors.items()}
    for prompt in start.adapter.soft_prompts:  # one at most, as planned
        given[PROMPT] = tensor_of(prompt.embeddings)
    for name in sorted(own.keys() | given.keys()):
        has, wanted = (list(tensors[name].shape) if name in tensors else None for tensors in (given, own))
        if has != wanted:
            raise HocketError(
                Reason.BAD_WEIGHTS,
                f"the tensor {name[-200:]} is {has or 'not there'} in the package to start from, and the manifest's is "
                f"{wanted or 'not there'}: they must have the same targets",
            )
    set_peft_model_state_dict(model, given)


def tensor_of(raw: RawTensor) -> torch.Tensor:
    """A package's tensor in float32."""
    return torch.frombuffer(bytearray(raw.data), dtype=_STORED[raw.dtype]).float().view(raw.shape)


def _start_from_text(model: PeftModel, adapter: AdapterPlan, tokenizer: PreTrainedTokenizerFast) -> None:
    """As PEFT would, which writes the tokenizer's path into what is published."""
    ids = tokenizer.backend_tokenizer.encode(adapter.start_text, add_special_tokens=False).ids
    repeated = (ids * -(-adapter.tokens // len(ids)))[: adapter.tokens]
    base: Any = model.get_base_model()
    embeddings = base.get_input_embeddings()
    prompt: Any = model.prompt_encoder[ADAPTER]
    with torch.no_grad():
        prompt.embedding.weight.copy_(embeddings(torch.tensor(repeated, device=embeddings.weight.device)))


def _unreadable(plan: Plan, error: Exception) -> HocketError:
    return HocketError(
        Reason.NOT_SERVABLE, f"the base in {plan.base} cannot be loaded ({type(error).__name__}): {str(error)[:300]}"
    )
