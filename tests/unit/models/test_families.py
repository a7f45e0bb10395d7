"""Families other than the paper's three run through the same code."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.decoding import prompts, run
from helpers.families import FAMILIES, build
from helpers.model_pairs import CPU, pairs, states_alone
from helpers.training import GOLDEN, golden_argv, metrics_of, train_here

from promptkd.data.batching import make_micro_batches
from promptkd.errors import UserError
from promptkd.models.checks import check_family
from promptkd.models.loading import load_causal_lm
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.models.wrapper import LanguageModel


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_batch_equals_single_sequences_in_every_family(family):
    model = build(family)
    given, responses = pairs()
    soft = torch.randn(3, 16)
    with torch.no_grad():
        for prompt in (None, soft):
            language_model = LanguageModel(model, None if prompt is None else SoftPrompt(prompt))
            for batch in make_micro_batches(given, responses, [1.0] * len(given), 60, CPU):
                states = language_model.hidden_states(batch).split([len(responses[i]) for i in batch.members])
                for i, output in zip(batch.members, states):
                    alone = states_alone(model, given[i], responses[i], prompt)
                    torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_greedy_equals_generate_in_every_family(family):
    """The end token is the fifth token of the first response, so sequences finish at different lengths."""
    model, given = build(family), prompts()
    eos = int(run(model, given[:1], end_ids=[-1]).responses[0][4])
    output = run(model, given, end_ids=[eos]).responses
    assert len({len(response) for response in output}) > 1
    for prompt, response in zip(given, output):
        ids = torch.as_tensor(prompt)[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=eos
        )
        assert response.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_train_promptkd_takes_two_steps_in_every_family(family, save, tmp_path):
    for name, width in (("student", 16), ("teacher", 32)):
        shutil.copytree(GOLDEN / "models/gpt2_student", tmp_path / name, ignore=lambda *_: ["model.safetensors"])
        build(family, width).save_pretrained(tmp_path / name)
    models = ["--model-path", str(tmp_path / "student"), "--teacher-model-path", str(tmp_path / "teacher")]
    before = load_causal_lm(models[1], torch.float32, "--model-path")
    sizes = ["--batch-size", "3", "--max-length", "104", "--total-iters", "2"]
    trainer = train_here([*golden_argv("promptkd", save), *models, *sizes])
    rows = metrics_of(save)
    assert len(rows) == 2 and all(row["student_loss"] > 0 and row["prompt_kd_loss"] > 0 for row in rows)
    assert rows[1]["prompt_drift"] > rows[0]["prompt_drift"] > 0
    lengths = {len(example.prompt) for example in trainer.local_batch(2).examples}
    assert len(lengths) > 1, "left padding needs different lengths"
    after = load_causal_lm(str(save / "last"), torch.float32, "--model-path")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, "soft-caps"),
        ("cohere", {"logit_scale": 0.1}, "scales"),
        ("bloom", {"n_head": 4}, "position_ids"),
    ],
)
def test_check_family_refuses_changes_around_the_head(family, changes, message):
    model = build(family, **changes)
    with pytest.raises(UserError, match=rf"--model-path: the family {family} is not supported: .*{message}"):
        check_family(model, "--model-path")


def test_check_family_leaves_the_model_unchanged():
    model, ids = build("llama"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        check_family(model, "--model-path")
        assert torch.equal(model(ids).logits, before)
