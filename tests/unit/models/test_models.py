"""Soft prompts, padding and positions in three families, and errors of loading."""

import pytest
import torch
from helpers.decoding import prompts, run, tiny
from helpers.model_pairs import CPU, pairs, states_alone
from safetensors.torch import save_file

from promptkd.data.batching import make_micro_batches
from promptkd.errors import UserError
from promptkd.models.loading import fuse_activations, load_config, load_tokenizer
from promptkd.models.soft_prompt import SoftPrompt, load_prompt, save_prompt
from promptkd.models.wrapper import LanguageModel

FAMILIES = ["gpt2", "opt", "llama"]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_batch_equals_single_sequences(family, prompted):
    model = tiny(family)
    soft = torch.randn(3, 16)
    language_model = LanguageModel(model, SoftPrompt(soft) if prompted else None)
    given, responses = pairs()
    with torch.no_grad():
        for batch in make_micro_batches(given, responses, [1.0] * len(given), 60, CPU):
            states = language_model.hidden_states(batch).split([len(responses[i]) for i in batch.members])
            for i, output in zip(batch.members, states):
                alone = states_alone(model, given[i], responses[i], soft if prompted else None)
                torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_left_padding_does_not_change_hidden_states(family):
    """A prompt that is padded beside a longer one has the hidden states that it has alone."""
    model, given = tiny(family), prompts()
    together = run(model, given, keep_states=True)
    for i, prompt in enumerate(given):
        alone = run(model, [prompt], keep_states=True)
        assert alone.responses[0].tolist() == together.responses[i].tolist()
        torch.testing.assert_close(alone.hidden_states[0], together.hidden_states[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_gradient_reaches_only_the_prompt(family):
    model = tiny(family).requires_grad_(False)
    language_model = LanguageModel(model, SoftPrompt(torch.randn(3, 16)))
    given, responses = pairs()
    (batch,) = make_micro_batches(given, responses, [1.0] * len(given), 10_000, CPU)
    language_model.hidden_states(batch).square().sum().backward()
    assert language_model.prompt.embeddings.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fuse_activations_keeps_the_logits_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, initializer_range=0.5)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = fuse_activations(model)(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_load_prompt_reads_what_was_saved_and_refuses_other_shapes(tmp_path):
    from promptkd.errors import UserError

    soft = torch.randn(3, 16)
    save_prompt(soft, tmp_path / "prompt", "teacher", tiny("gpt2").config)
    assert torch.equal(load_prompt(tmp_path / "prompt", 16, 3), soft)
    with pytest.raises(UserError, match="embeddings are"):
        load_prompt(tmp_path / "prompt", 32)
    with pytest.raises(UserError, match="--prompt-len"):
        load_prompt(tmp_path / "prompt", 16, 7)
    with pytest.raises(UserError, match="no readable soft prompt"):
        load_prompt(tmp_path / "nowhere", 16)
    save_file({"prompt_embeddings": torch.tensor(1.0)}, tmp_path / "prompt/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has shape \[\], but the model's embeddings are 16"):
        load_prompt(tmp_path / "prompt", 16)
    (tmp_path / "prompt/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="an adapter of type LORA, not a soft prompt"):
        load_prompt(tmp_path / "prompt", 16)


def test_make_micro_batches_keeps_the_budget_and_the_requested_number():
    given, responses = pairs()
    sizes = [len(p) + len(r) for p, r in zip(given, responses)]
    for budget in (20, 40, 80):
        for batch in make_micro_batches(given, responses, [0.5] * 6, budget, CPU):
            assert len(batch.members) == 1 or len(batch.members) * max(sizes[i] for i in batch.members) <= budget
    for wanted in (1, 4, 6, 9):
        batches = make_micro_batches(given, responses, [0.5] * 6, 10_000, CPU, wanted)
        assert len(batches) == wanted
        assert float(sum(batch.token_weights.sum() for batch in batches)) == pytest.approx(
            0.5 * sum(map(len, responses))
        )


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("facebook/opt-1.3b", "download_requirements.sh --only base/opt-1.3B and name checkpoints/opt/opt-1.3B"),
        ("huggyllama/llama-7b", "name a folder that holds its files"),
    ],
)
def test_load_config_without_a_connection_names_remedies(name, way, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"promptkd.models.loading.{kind}.from_pretrained", unreachable)
    for load in (lambda: load_config(name, "--model-path"), lambda: load_tokenizer(name)):
        with pytest.raises(UserError) as refused:
            load()
        text = str(refused.value)
        assert name in text and "\n" not in text and text.endswith(way)
        assert "HF_ENDPOINT" in text and "HTTPS_PROXY" in text


def test_load_config_local_folder_gives_no_hub_hint(tmp_path):
    """The folder is broken or missing."""
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    broken, lost = str(tmp_path), str(tmp_path / "lost")
    for load, *given in ((load_config, broken, "--model-path"), (load_tokenizer, broken), (load_tokenizer, lost)):
        with pytest.raises(UserError) as refused:
            load(*given)
        assert "HF_ENDPOINT" not in str(refused.value)
