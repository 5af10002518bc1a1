from __future__ import annotations

import hashlib
import json
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hocket.base_folder import base_digest
from hocket.errors import HocketError, Reason
from tests.bases import CONTEXT, HIDDEN, VOCABULARY, tiny_base
from tests.passes import Passes, ids_of, oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from services.expert_worker.engine.base import Base

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")


def opened(folder: Path, expected_digest: str | None = None, **serving: Any) -> Base:
    from services.expert_worker.engine.base import Serving, open_base  # noqa: PLC0415 - imports transformers

    return open_base(folder, expected_digest=expected_digest, device=CPU, serving=Serving(**serving))


def refused(folder: Path, word: str, reason: Reason = Reason.NOT_SERVABLE, **arguments: Any) -> HocketError:
    with pytest.raises(HocketError, match=word) as refusal:
        opened(folder, **arguments)
    assert refusal.value.reason is reason, refusal.value
    return refusal.value


def rewrite(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> None:
    model = oracle(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def test_a_base_says_what_it_is(folder: Path) -> None:
    base = opened(folder)
    assert base.model.name == "tiny"
    assert base.model.digest == base_digest(folder)
    assert base.model.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (base.device, base.dtype) == (CPU, torch.float32)
    assert (base.hidden_size, base.vocabulary_size, base.context_length) == (HIDDEN, VOCABULARY, CONTEXT)
    assert (base.kv_shape.layers, base.kv_shape.heads, base.kv_shape.head_dim) == (2, 2, 16)
    assert base.size_bytes == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.02)  # tied head once
    assert base.has_chat_template
    assert base.tokenizer.decode(base.tokenizer.encode("naïve café 🎉")) == "naïve café 🎉"


def test_a_base_is_frozen(folder: Path) -> None:
    base = opened(folder)
    assert not base.causal_lm.training
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())


def test_projections_are_the_linear_layers_by_name(tmp_path: Path) -> None:
    base = opened(tiny_base(tmp_path, "qwen2", chat=False))
    projections = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    layers = {f"model.layers.{layer}.{name}" for layer in range(2) for name in projections.split()}
    assert set(base.projections) == {*layers, "lm_head"}
    assert all(type(projection) is torch.nn.Linear for projection in base.projections.values())
    assert base.projections["model.layers.1.self_attn.k_proj"].bias is not None
    assert base.projections["lm_head"].weight is base.causal_lm.get_input_embeddings().weight
    assert not base.has_chat_template


def test_a_base_does_not_change_with_its_files(folder: Path) -> None:
    base = opened(folder)
    before = Passes(base).logits(ids_of(5), 5)
    file = folder / "model.safetensors"
    with file.open("r+b") as weights:
        weights.write(b"\0" * file.stat().st_size)
        weights.truncate(4096)
    assert torch.equal(Passes(base).logits(ids_of(5), 5), before)
    assert base.projections["lm_head"].weight is base.causal_lm.get_input_embeddings().weight


def _touch(folder: Path) -> None:
    (folder / "model.safetensors").touch()


def _swap(folder: Path) -> None:
    shutil.copy2(folder / "config.json", folder / "another")
    (folder / "another").replace(folder / "config.json")


def _uncounted(folder: Path) -> None:
    (folder / "README.md").write_text("does not count")


@pytest.mark.parametrize(("change", "word"), [(_touch, "model.safetensors changed"), (_swap, "config.json changed")])
def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, change: Callable[[Path], None], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.expert_worker.engine import base  # noqa: PLC0415 - imports transformers

    inner = base._own
    happens: list[Callable[[Path], None]] = [_uncounted]

    def moved(*arguments: Any) -> None:
        inner(*arguments)
        happens[0](folder)

    monkeypatch.setattr(base, "_own", moved)
    opened(folder)
    happens[0] = change
    assert "start again" in refused(folder, word).message


def test_the_folder_must_be_the_one_that_is_meant(folder: Path) -> None:
    digest = base_digest(folder)
    rewrite(folder / "generation_config.json", do_sample=True)
    refusal = refused(folder, "is wanted", Reason.BASE_MISMATCH, expected_digest=digest)
    assert refusal.metadata == {"digest": base_digest(folder), "expected": digest}
    opened(folder, expected_digest=base_digest(folder))


def test_a_folder_that_is_no_model_is_no_base(tmp_path: Path) -> None:
    refused(tmp_path, "is no base model", Reason.BAD_REQUEST)


def test_vocabularies_are_the_same_when_each_id_means_the_same(folder: Path) -> None:
    before = opened(folder).vocabulary_sha256
    rewrite_weights(folder, lambda weights: weights["model.norm.weight"].mul_(2))
    assert opened(folder).vocabulary_sha256 == before
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert opened(folder).vocabulary_sha256 != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_can_be_chosen(folder: Path, dtype: torch.dtype) -> None:
    base = opened(folder, dtype=dtype)
    assert {base.dtype} == {parameter.dtype for parameter in base.causal_lm.parameters()} == {dtype}


def test_other_dtypes_are_refused(folder: Path) -> None:
    refused(folder, "float64", dtype=torch.float64)


def test_half_weights_are_computed_with_in_float32_on_a_cpu(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.update({name: each.bfloat16() for name, each in weights.items()}))
    rewrite(folder / "config.json", dtype="bfloat16")
    assert opened(folder).dtype == torch.float32


def test_weights_in_several_files_are_one_base_without_a_weights_hash(folder: Path) -> None:
    whole = opened(folder)
    shard(folder)
    base = opened(folder)
    assert base.model.weights_sha256 is None
    assert base.model.digest != whole.model.digest
    assert torch.equal(Passes(base).logits(ids_of(5), 5), Passes(whole).logits(ids_of(5), 5))


@pytest.mark.parametrize(("stated", "found"), [(5, {2, 5}), ([5, 2, 7], {2, 5, 7}), (None, {2})])
def test_answers_end_at_the_tokens_of_the_settings_and_of_the_tokenizer(
    folder: Path, stated: Any, found: set[int]
) -> None:
    rewrite(folder / "generation_config.json", eos_token_id=stated)
    assert opened(folder).eos_ids == found


def test_a_base_samples_as_its_folder_asks(folder: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    rewrite(folder / "generation_config.json", do_sample=True, **settings)
    defaults = opened(folder).defaults
    assert {name: getattr(defaults, name) for name in settings} == settings


@pytest.mark.parametrize("stated", [{"do_sample": False}, {}])
def test_a_base_that_does_not_ask_for_sampling_is_greedy(folder: Path, stated: dict[str, bool]) -> None:
    rewrite(folder / "generation_config.json", **stated, temperature=0.6, top_p=0.95)
    defaults = opened(folder).defaults
    assert (defaults.temperature, defaults.top_p) == (0.0, None)


def test_nothing_that_does_not_count_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    before = opened(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04a pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}')
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "default.jinja").write_text("another")
    after = opened(folder)
    assert after.model == before.model
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    assert torch.equal(Passes(after).logits(ids_of(5), 5), Passes(before).logits(ids_of(5), 5))


def test_own_code_is_never_run(folder: Path) -> None:
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "own.py").write_text("raise SystemExit")
    rewrite(folder / "config.json", auto_map=own)
    opened(folder)  # transformers knows the model type itself
    rewrite(folder / "config.json", model_type="own")
    refused(folder, "its own code, which is never run")
    rewrite(folder / "config.json", auto_map=None)
    refused(folder, "new enough")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config that is no json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config that is no object": (lambda f: (f / "config.json").write_text("[]"), "model_type"),
    "config that is huge": (lambda f: (f / "config.json").write_text(" " * (2**20 + 1)), "at most"),
    "config with a negative size": (lambda f: rewrite(f / "config.json", hidden_size=-64), "hidden_size"),
    "config with a string for a size": (lambda f: rewrite(f / "config.json", hidden_size="64"), "hidden_size"),
    "config with too many layers": (lambda f: rewrite(f / "config.json", num_hidden_layers=10**9), "layers"),
    "config for far more weights": (lambda f: rewrite(f / "config.json", intermediate_size=10**9), "parameters"),
    "config for other weights": (lambda f: rewrite(f / "config.json", intermediate_size=95), "not of one model"),
    "generation settings that are no json": (lambda f: (f / "generation_config.json").write_text("{"), "generation"),
    "generation settings out of bounds": (
        lambda f: rewrite(f / "generation_config.json", do_sample=True, top_p=2.0), "top_p",
    ),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), "download",
    ),
    "weights that are none": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 2**20), "download"),
    "a tensor missing": (lambda f: rewrite_weights(f, lambda w: w.pop("model.norm.weight")), "lacks model.norm.weight"),
    "a tensor too many": (
        lambda f: rewrite_weights(f, lambda w: w.update({"model.extra.weight": torch.ones(1)})), "model.extra.weight",
    ),
    "a tensor of another shape": (
        lambda f: rewrite_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})), "model.norm.weight",
    ),
    "a tensor that is not finite": (
        lambda f: rewrite_weights(f, lambda w: w["model.norm.weight"].fill_(torch.nan)), "bad weights",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "a tokenizer that is no json": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer|download"),
    "tokens without embeddings": (lambda f: _add_token(f, VOCABULARY), "embeddings"),
    "an index that leads elsewhere": (lambda f: _redirect(f, "/elsewhere.safetensors"), "not in the folder"),
    "an index without a map": (
        lambda f: rewrite(f / "model.safetensors.index.json", weight_map=None), "not in the folder",
    ),
}  # fmt: skip
"""What can be wrong with a folder, and a word of the answer. Its twin is the folder as it was."""


def _add_token(folder: Path, number: int) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<beyond>"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _redirect(folder: Path, target: str) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(folder: Path, damage: str) -> None:
    break_it, word = DAMAGES[damage]
    break_it(folder)
    refused(folder, word)


def test_the_last_id_with_an_embedding_may_have_a_token(folder: Path) -> None:
    _add_token(folder, VOCABULARY - 1)
    opened(folder)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}}


@pytest.mark.parametrize(
    ("kind", "strange", "twin", "word"),
    [
        ("llama", _rope("proportional"), _rope("yarn"), "proportional"),
        ("llama", _rope("dynamic", alpha=1000.0), _rope("dynamic"), "alpha"),
        ("gemma2", {}, {"attn_logit_softcapping": None}, "softcap"),
        ("gemma3_text", {"use_bidirectional_attention": True}, {}, "ahead"),
        ("qwen3", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {}, "quantised"),
    ],
)  # fmt: skip
def test_settings_that_the_engine_does_not_understand_are_refused(
    tmp_path: Path, kind: str, strange: dict[str, Any], twin: dict[str, Any], word: str
) -> None:
    folder = tiny_base(tmp_path, kind, **twin)
    opened(folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "gemma2":
        config["attn_logit_softcapping"] = 50.0
    (folder / "config.json").write_text(json.dumps(config | strange))
    refused(folder, word)


@pytest.mark.parametrize(
    ("model_type", "changes", "word"),
    [
        ("mamba", {}, "way of its own"),
        ("bert", {}, "ahead"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the type conv|way of its own"),
    ],
)
def test_architectures_that_the_engine_does_not_understand_are_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], word: str
) -> None:
    refused(tiny_base(tmp_path, model_type, **changes), word)


@pytest.mark.parametrize("model_type", ["t5", "bart", "vit"])
def test_only_decoders_are_bases(folder: Path, model_type: str) -> None:
    rewrite(folder / "config.json", model_type=model_type)
    refused(folder, "no decoder-only language model")


def test_a_model_that_sees_is_refused(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="gemma3", text_config={"hidden_size": 64})
    refused(folder, "more than text")


MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = 200
"""More than the logits are compared over."""


@pytest.mark.parametrize(
    ("kind", "settings", "twin"),
    [
        ("qwen2_moe", {**MIXTURE, "layer_types": ["sliding_attention"] * 2}, {"layer_types": ["full_attention"] * 2}),
        ("phimoe", MIXTURE, {"sliding_window": None}),
        ("llama", {}, {"sliding_window": None}),
    ],
)
def test_models_that_do_not_tell_attention_of_their_windows_are_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], twin: dict[str, Any]
) -> None:
    settings = {"sliding_window": WINDOW, "use_sliding_window": True, **settings}
    refused(tiny_base(tmp_path / "window", kind, **settings), f"sliding window of {WINDOW} ")
    opened(tiny_base(tmp_path / "whole", kind, **settings | twin))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False}),
        ("qwen3_moe", {**MIXTURE, "use_sliding_window": False}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_models_that_do_are_not(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    opened(tiny_base(tmp_path, kind, **settings, sliding_window=WINDOW))


@pytest.mark.parametrize("page_positions", [16, 256])
def test_what_a_model_answers_beyond_a_page_is_compared(
    folder: Path, page_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.expert_worker.engine import self_check  # noqa: PLC0415 - imports transformers
    from services.expert_worker.engine.runner import Runner  # noqa: PLC0415 - as above

    ends: list[int] = []
    inner = Runner.run

    def watched(runner: Runner, parts: Any) -> torch.Tensor:
        ends.extend(part.start + part.row_count for part in parts)
        return inner(runner, parts)

    monkeypatch.setattr(self_check, "default_page_positions", lambda _: page_positions)
    monkeypatch.setattr(Runner, "run", watched)
    opened(folder)
    assert max(ends) > page_positions


def test_a_model_that_answers_otherwise_through_the_engine_is_refused(folder: Path) -> None:
    from transformers import AttentionInterface  # noqa: PLC0415 - as below

    from services.expert_worker.engine import attention  # noqa: PLC0415 - imports transformers

    def shortsighted(*arguments: Any, **more: Any) -> Any:
        return attention.attend(*arguments, **more | {"sliding_window": 20})

    AttentionInterface.register(attention.NAME, shortsighted)
    try:
        refused(folder, "differ from its own")
    finally:
        AttentionInterface.register(attention.NAME, attention.attend)
    opened(folder)


def test_a_base_that_does_not_fit_on_the_device_is_refused_as_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    from services.expert_worker.engine import base, self_check  # noqa: PLC0415 - imports transformers

    monkeypatch.setattr(base, "_own", full)
    refused(folder, "no room", Reason.DEVICE_MEMORY)
    monkeypatch.undo()
    monkeypatch.setattr(
        self_check, "KvPool", lambda *_, **__: _raise(HocketError(Reason.DEVICE_MEMORY, "no room for pages"))
    )
    refused(folder, "no room for pages", Reason.DEVICE_MEMORY)


def _raise(error: HocketError) -> None:
    raise error
