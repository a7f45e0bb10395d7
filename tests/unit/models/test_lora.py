"""LoRA adapters of a student: exact merging, files that PEFT reads, and adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.evaluating import options, refused, write_set
from helpers.runs import tiny_argv
from helpers.tiny_models import make_model
from helpers.training import GOLDEN
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from promptkd.config.deepspeed import CONFIGS
from promptkd.config.lora_options import LoraSettings
from promptkd.errors import UserError
from promptkd.models.adapters import _continue_adapter, merged, save_adapter
from promptkd.models.loading import load_causal_lm
from promptkd.models.student import load_student
from train import resolve

IDS = torch.arange(1, 25).view(2, 12)
STUDENT = GOLDEN / "models/gpt2_student"


def load(folder: Path, precision: str = "fp32", **lora):
    """Load a folder as the student of a run with adapters."""
    config = SimpleNamespace(
        models=SimpleNamespace(model_path=str(folder), model_type=None, gradient_checkpointing=False),
        lora=LoraSettings(**{"lora_r": 4, **lora}),
        deepspeed={precision: {"enabled": True}} if precision != "fp32" else {},
        run=SimpleNamespace(seed=7),
    )
    return load_student(config, torch.device("cpu"), None)


@torch.no_grad()
def randomize(model) -> None:
    """Give the adapters an effect. B is 0 at first."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind, precision", [("gpt2", "fp32"), ("llama", "fp32"), ("llama", "bf16")])
def test_lora_starts_as_the_base_model_and_merges_exactly(kind, precision, tmp_path):
    make_model(kind, tmp_path)
    model = load(tmp_path, precision)
    base = load_causal_lm(str(tmp_path), model.dtype, "--model-path")
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    randomize(model)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    kept = model(IDS).logits
    assert (kept - base(IDS).logits).abs().max() > 0.1
    with merged(model):
        inside = model(IDS).logits
        with merged(model):  # a block in a block changes nothing
            assert torch.equal(model(IDS).logits, inside)
        assert torch.equal(model(IDS).logits, inside)
    if precision == "fp32":
        torch.testing.assert_close(inside, kept, rtol=1e-6, atol=1e-5)
    assert torch.equal(model(IDS).logits, kept)
    for name, value in model.state_dict().items():
        place, content = before[name]
        assert value.data_ptr() == place and torch.equal(value, content), name


@torch.no_grad()
def test_lora_leaves_experts_without_adapters(tmp_path):
    """Experts are no linear layers but parameters, to which PEFT adds adapters that cannot be merged in place."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads)).save_pretrained(tmp_path)
    model = load(tmp_path, lora_dropout=0.1)
    randomize(model)
    kept = model(IDS).logits
    with merged(model):
        torch.testing.assert_close(model(IDS).logits, kept, rtol=1e-6, atol=1e-5)
    trained = {name.split(".")[-4] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = peft_adapter(tmp_path, tmp_path / "lora", target_modules="all-linear")
    complete = load_causal_lm(str(tmp_path / "lora"), torch.float32, "--model-path")
    torch.testing.assert_close(complete(IDS).logits, expected, rtol=1e-6, atol=1e-5)
    with pytest.raises(UserError, match="not only of linear layers below the head"):
        load(tmp_path / "lora")


@torch.no_grad()
def test_lora_options_choose_layers_scale_and_seed(tmp_path):
    make_model("llama", tmp_path)
    model, again = (load(tmp_path, lora_r=2, lora_alpha=5, lora_target=["q_proj", "up_proj"]) for _ in range(2))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("q_proj.lora_" in name or "up_proj.lora_" in name for name in trained)
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), "all ranks start with the same adapters"
    layer = model.model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": 2.5} and layer.lora_A["default"].weight.shape == (2, 32)
    everywhere = {name.split(".")[-4] for name, value in load(tmp_path).named_parameters() if value.requires_grad}
    assert everywhere == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@torch.no_grad()
def test_saved_adapter_loads_with_peft_and_its_training_continues(tmp_path):
    make_model("gpt2", tmp_path / "base")
    model = load(tmp_path / "base")
    randomize(model)
    (tmp_path / "lora").mkdir()
    save_adapter(model, model.state_dict(), tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-6, atol=1e-6)
    again = load(tmp_path / "lora", lora_dropout=0.25)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    names = [[n for n, value in each.named_parameters() if value.requires_grad] for each in (model, again)]
    assert names[0] == names[1] and again.transformer.h[0].mlp.c_fc.lora_dropout["default"].p == 0.25
    (tmp_path / "next").mkdir()
    save_adapter(again, again.state_dict(), tmp_path / "next")
    assert (tmp_path / "next/adapter_model.safetensors").read_bytes() == (
        tmp_path / "lora/adapter_model.safetensors"
    ).read_bytes()
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("lora", "next"))
    assert first["base_model_name_or_path"] == second["base_model_name_or_path"] == str(tmp_path / "base")
    assert second["inference_mode"] and first["target_modules"] == sorted(first["target_modules"])
    for changes in ({"lora_r": 8}, {"lora_alpha": 3}, {"lora_target": ["c_fc"]}):
        with pytest.raises(UserError, match="its own rank, alpha and layers: give --lora-r 4"):
            load(tmp_path / "lora", **changes)


@torch.no_grad()
def peft_adapter(base: Path, folder: Path, **config) -> torch.Tensor:
    """Save an adapter that PEFT makes, and return the logits with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **config))
    for parameter in adapted.parameters():
        parameter.add_(parameter.requires_grad * 0.05)
    adapted.save_pretrained(folder)
    return adapted.eval()(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_adapter_of_embeddings_or_head_needs_untied_ones(layer, tmp_path):
    """Merged into shared weights, it would change both. PEFT saves a copy of the base model's layer beside it."""
    make_model("llama", tmp_path / "base")
    expected = peft_adapter(tmp_path / "base", tmp_path / "lora", target_modules=[layer, "q_proj"])
    merged_model = load_causal_lm(str(tmp_path / "lora"), torch.float32, "--model-path")
    torch.testing.assert_close(merged_model(IDS).logits, expected, rtol=1e-6, atol=1e-5)
    with pytest.raises(UserError, match="not only of linear layers below the head"):
        load(tmp_path / "lora")
    make_model("llama", tmp_path / "base", tie_word_embeddings=True)
    peft_adapter(tmp_path / "base", tmp_path / "lora", target_modules=[layer, "q_proj"])
    for read in (load, lambda folder: load_causal_lm(str(folder), torch.float32, "--model-path")):
        with pytest.raises(UserError, match="only one of embeddings and head, which share"):
            read(tmp_path / "lora")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["use_dora", "lora_bias", "use_rslora"])
def test_merging_other_kinds_of_lora_is_undone_exactly(kind, tmp_path):
    """PEFT makes such adapters. Training can continue with them."""
    expected = peft_adapter(STUDENT, tmp_path, target_modules=["c_attn", "c_fc"], **{kind: True})
    model = load(tmp_path)
    before, kept = {name: value.clone() for name, value in model.state_dict().items()}, model(IDS).logits
    torch.testing.assert_close(expected, kept, rtol=1e-6, atol=1e-5)
    with merged(model):
        torch.testing.assert_close(model(IDS).logits, kept, rtol=1e-6, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind == "use_dora":
        with pytest.raises(UserError, match="an adapter of DoRA: take 4bit"):
            _continue_adapter(model, LoraSettings(lora_r=4, student_quantization="8bit"), str(tmp_path))


def test_adapter_with_biases_that_its_base_model_lacks_is_refused(tmp_path):
    make_model("llama", tmp_path / "base")
    peft_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj"], lora_bias=True)
    for read in (load, lambda folder: load_causal_lm(str(folder), torch.float32, "--model-path")):
        with pytest.raises(UserError, match=r"because the base layer has no bias.*: correct its adapter_config"):
            read(tmp_path / "lora")


TOGETHER = ["--model-parallel", "--model-parallel-size", "2"]
ZERO3 = ["--deepspeed_config", str(CONFIGS / "ds_config_zero3_fp32.json")]


@pytest.mark.parametrize(
    "method, extra, message",
    [
        ("sft", ["--lora-alpha", "8"], "--lora-alpha is for LoRA adapters: add --lora-r"),
        ("sft", ["--merge"], "--merge is for LoRA adapters"),
        ("sft", ["--student-quantization", "4bit"], "--student-quantization is for LoRA adapters"),
        ("sft", ["--lora-r", "-1"], "--lora-r -1 is under 0"),
        ("sft", ["--lora-r", "4", "--lora-alpha", "0"], "--lora-alpha 0 is not positive"),
        ("sft", ["--lora-r", "4", "--lora-dropout", "1"], "--lora-dropout 1 is not a rate"),
        ("sft", ["--lora-r", "4", "--merge", "--student-quantization", "8bit"], "--merge does not go with"),
        ("sft", ["--lora-r", "4", "--student-quantization", "8bit", *ZERO3], "does not go with ZeRO-3"),
        ("sft", ["--lora-r", "4", *TOGETHER], "does not go with a student cut by --model-parallel-size"),
        ("minillm", ["--lora-r", "4", "--lora-dropout", "0.1"], "minillm trains without dropout"),
        ("promptkd", ["--prompt-init", "a", "--prompt-init-text", "b"], "--prompt-init goes with neither"),
        ("promptkd", ["--prompt-init", "a", "--prompt-len", "0"], "--prompt-init goes with neither"),
    ],
)
def test_lora_refuses_options(method, extra, message, save):
    with pytest.raises(UserError, match=message):
        resolve([*tiny_argv(method, save), *extra])


def test_lora_refuses_unknown_layers_and_huge_ranks(tmp_path):
    make_model("gpt2", tmp_path)
    for name in ("lm_head", "wte", "q_proj"):
        with pytest.raises(UserError, match=f"--lora-target {name}: .* name some of c_attn, c_fc, c_proj"):
            load(tmp_path, lora_target=["c_fc", name])
    with pytest.raises(UserError, match="--lora-r 100000000 exceeds the student's width"):
        load(tmp_path, lora_r=100_000_000)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the golden student."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load(STUDENT)
    randomize(model)
    save_adapter(model, model.state_dict(), folder)
    return folder


def change(**changes):
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def tensors(update):
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(update(load_file(path)), path)

    return damage


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def head_too(state: dict) -> dict:
    return {**state, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}


DAMAGE = {
    "lost base": (change(base_model_name_or_path="/lost/base"), "base model /lost/base is no such folder"),
    "no base": (change(base_model_name_or_path=None), "lacks base_model_name_or_path"),
    "another base": (
        change(base_model_name_or_path=str(GOLDEN / "models/gpt2_teacher")),
        "does not fit its base model",
    ),
    "another kind": (change(peft_type="IA3"), "an adapter of type IA3"),
    "invocation tokens": (change(alora_invocation_tokens=[5]), "with alora_invocation_tokens are not supported"),
    "repeated layers": (change(layer_replication=[[0, 2], [0, 2]]), "with layer_replication are not supported"),
    "a wild rank": (change(r="many"), "its own rank"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    "a pickle": (pickled, "lacks adapter_model.safetensors"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "does not fit"),
    "half the tensors": (tensors(lambda state: dict(list(state.items())[:3])), "missing or have no place"),
    "a tensor too many": (tensors(head_too), "missing or have no place"),
    "not finite": (
        tensors(lambda state: {name: value / 0 for name, value in state.items()}),
        "does not fit|not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_hostile_adapter_is_refused_in_one_line_by_evaluation_and_training(name, adapter, tmp_path, capsys):
    damage, message = DAMAGE[name]
    folder = tmp_path / "lora"
    shutil.copytree(adapter, folder)
    damage(folder)
    write_set(tmp_path / "data/own", rows=1)
    argv = options(tmp_path / "data", tmp_path / "results", "--data-names", "own", "--model-path", str(folder))
    line = refused(argv, capsys)
    assert "--model-path" in line or "tokenizer of" in line
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert not (tmp_path / "results/results.json").exists()
