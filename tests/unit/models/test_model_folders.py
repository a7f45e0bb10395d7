"""Model folders: weights unlike config.json, LoRA adapters, composite and hybrid models, SentencePiece files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.decoding import prompts, run
from helpers.tiny_models import logits, make_model
from helpers.training import GOLDEN
from safetensors.torch import load_file, save_file

from promptkd.errors import UserError
from promptkd.generation.kv_cache import takes_padding
from promptkd.models.loading import (
    check_positions,
    count_parameters,
    load_causal_lm,
    load_config,
    load_own_tokenizer,
    load_tokenizer,
)
from promptkd.models.soft_prompt import load_prompt, save_prompt
from promptkd.models.tensor_parallel import open_model

OPTION = "--teacher-model-path"


def load(folder: Path, **options):
    return load_causal_lm(str(folder), torch.float32, OPTION, **options)


def open_shard(folder: Path):
    """Do what each rank of two does before it reads its part."""
    return open_model(str(folder), load_config(str(folder), OPTION), torch.float32, 2, OPTION)


WAYS = {"complete": load, "deferred": lambda folder: load(folder, deferred=True), "shard": open_shard}


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("way", WAYS)
def test_load_refuses_weights_that_config_json_does_not_describe(way, tmp_path, capfd, monkeypatch):
    """The weights have biases that config.json lacks. transformers prints no table beside the error."""
    monkeypatch.setattr("promptkd.models.loading.transformers_logging.get_verbosity", lambda: 30)
    make_model("llama", tmp_path, attention_bias=True)
    change_config(tmp_path, attention_bias=None)
    message = r"no place for 8 tensors of the weights, model.layers.0.self_attn.k_proj.bias first: take the config.json"
    with pytest.raises(UserError, match=message):
        WAYS[way](tmp_path)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("way", WAYS)
def test_load_refuses_weights_of_other_modules(way, tmp_path):
    make_model("llama", tmp_path)
    add_tensors(tmp_path, **{"v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(UserError, match=r"v_head\.summary\.weight"):
        WAYS[way](tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_load_ignores_buffers_of_earlier_versions(way, tmp_path, capfd):
    make_model("llama", tmp_path)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    add_tensors(tmp_path, **{name: torch.ones(2) for name in names})
    WAYS[way](tmp_path)
    assert "not used" not in capfd.readouterr().err


@pytest.mark.parametrize("way", WAYS)
def test_load_refuses_a_config_of_another_size_in_one_line(way, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("promptkd.models.loading.transformers_logging.get_verbosity", lambda: 30)
    make_model("llama", tmp_path)
    for changes in ({"intermediate_size": 40}, {"num_hidden_layers": 1}, {"num_attention_heads": 5}):
        shutil.copytree(tmp_path, tmp_path / "copy", dirs_exist_ok=True)
        change_config(tmp_path / "copy", **changes)
        with pytest.raises(UserError) as refused:
            WAYS[way](tmp_path / "copy")
        assert "\n" not in str(refused.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def make_adapter(folder: Path, base: Path, **changes: object) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base), **changes}))


@torch.no_grad()
def test_adapter_is_merged_into_its_base_model(tmp_path):
    make_model("llama", tmp_path / "base")
    make_adapter(tmp_path / "lora", tmp_path / "base")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "lora").eval()(torch.arange(1, 25).view(2, 12)).logits
    assert (expected - logits(tmp_path / "base")).abs().max() > 0.1
    for model in (load(tmp_path / "lora"), load(tmp_path / "lora", deferred=True)):
        torch.testing.assert_close(model(torch.arange(1, 25).view(2, 12)).logits, expected, rtol=1e-4, atol=1e-4)
        assert all(parameter.requires_grad for parameter in model.parameters()), "it can be a student"
        assert not any("lora" in name for name, _ in model.named_parameters())
    assert count_parameters(str(tmp_path / "lora")) == count_parameters(str(tmp_path / "base"))
    shutil.copyfile(GOLDEN / "models/gpt2_student/tokenizer.json", tmp_path / "base/tokenizer.json")
    shutil.copyfile(GOLDEN / "models/gpt2_student/tokenizer_config.json", tmp_path / "base/tokenizer_config.json")
    assert load_tokenizer(str(tmp_path / "lora")).eos_token_id == 0


def test_adapter_finds_a_base_model_relative_to_its_folder(tmp_path):
    make_model("llama", tmp_path / "lora/base")
    make_adapter(tmp_path / "lora", tmp_path / "lora/base", base_model_name_or_path="base")
    assert load(tmp_path / "lora").config.model_type == "llama"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3, not a model"),
        ({"peft_type": "PROMPT_TUNING"}, "an adapter of type PROMPT_TUNING, not a model"),
        ({"task_type": "SEQ_CLS"}, "task is SEQ_CLS"),
        ({"base_model_name_or_path": None}, "lacks base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "no such folder"),
        ({"megatron_config": {}}, "megatron_config"),
        ({"target_modules": ["v_proj"]}, "does not fit its base model .* tensors are missing or have no place"),
        ({"r": 8}, "does not fit its base model"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_in_one_line(changes, message, tmp_path):
    make_model("llama", tmp_path / "base")
    make_adapter(tmp_path / "lora", tmp_path / "base", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "lora")


def test_adapter_refuses_sharding_quantization_and_a_second_model(tmp_path):
    make_model("llama", tmp_path / "base")
    make_adapter(tmp_path / "lora", tmp_path / "base")
    with pytest.raises(UserError, match="LoRA adapter, which does not go with --teacher-quantization"):
        load(tmp_path / "lora", quantization={"quantization_config": None})
    with pytest.raises(UserError, match="LoRA adapter, which does not go with a model cut by --model-parallel-size"):
        load(tmp_path / "lora", group=object())
    shutil.copyfile(tmp_path / "base/model.safetensors", tmp_path / "lora/model.safetensors")
    with pytest.raises(UserError, match=r"holds adapter_config.json and model.safetensors"):
        load(tmp_path / "lora")
    (tmp_path / "lora/model.safetensors").unlink()
    (tmp_path / "lora/adapter_model.safetensors").rename(tmp_path / "lora/adapter_model.bin")
    with pytest.raises(UserError, match=r"lacks adapter_model.safetensors"):
        load(tmp_path / "lora")


SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)


def composite(folder: Path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(text_config=SIZES, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_load_reads_the_text_part_of_a_composite_config(tmp_path):
    composite(tmp_path)
    config = load_config(str(tmp_path), OPTION)
    assert not hasattr(config, "max_position_embeddings")
    with pytest.raises(UserError, match=r"65 positions are needed .* the model has 64"):
        check_positions(config, 65, OPTION)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / f"models/gpt2_student/{name}", tmp_path / name)
    with pytest.raises(UserError, match="ids go up to 1499, the model has embeddings for 40 tokens"):
        load_own_tokenizer(str(tmp_path), config, OPTION)
    save_prompt(torch.ones(3, 32), tmp_path / "prompt", str(tmp_path), config)
    assert load_prompt(tmp_path / "prompt", 32, 3).shape == (3, 32)
    model = load(tmp_path)
    assert [len(r) for r in run(model, prompts(3), max_new_tokens=4, end_ids=[-1]).responses] == [4, 4, 4]
    change_config(
        tmp_path, text_config={**json.loads((tmp_path / "config.json").read_text())["text_config"], "vocab_size": -1}
    )
    with pytest.raises(UserError, match="vocab_size is -1"):
        load_config(str(tmp_path), OPTION)


MAMBA = dict(mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
HYBRIDS = {
    "lfm2": dict(layer_types=["conv", "full_attention"], conv_bias=True),
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8, **MAMBA),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_decode_hybrid_models_equals_generate_for_unequal_lengths(family):
    """Sequences finish at different steps, and prompts have different lengths."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ends = dict(bos_token_id=3, eos_token_id=3, pad_token_id=3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **ends, **HYBRIDS[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    assert not takes_padding(model)
    given = [*prompts(4), *prompts(4)[::-1]]
    given = [*given, *(prompt[::-1].copy() for prompt in given)]
    end = int(run(model, given[:1], end_ids=[-1], max_new_tokens=6).responses[0][2])
    together = run(model, given, end_ids=[end], max_new_tokens=6).responses
    assert len({len(response) for response in together}) > 1
    for prompt, response in zip(given, together):
        ids = torch.as_tensor(prompt)[None]
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=end
        )
        assert response.tolist() == alone[0, len(prompt) :].tolist()


def test_load_tokenizer_from_a_sentencepiece_file(tmp_path):
    """Older Llama folders have only tokenizer.model. Ids and texts equal those of SentencePiece, also after saving."""
    import sentencepiece

    words = "learn data token beta teacher student prompt Below is an instruction that describes a task"
    (tmp_path / "text").write_text("\n".join(f"{words} {i} {i * 7}" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=120,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.move(tmp_path / "tokenizer.model", folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False, "add_bos_token": True}))
    tokenizer, own = load_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    for text in ("learn data token", "a teacher's prompt 77", "Below is an instruction"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text) == saved(text, add_special_tokens=False)["input_ids"]
        assert ("'" in text or tokenizer.decode(ids) == text) and tokenizer(text)["input_ids"] == [own.bos_id(), *ids]
    assert tokenizer.eos_token_id == own.eos_id()
