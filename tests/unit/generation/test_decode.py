"""Decoding: greedy tokens equal those of `generate`, samples have the model's distribution, batches do not matter."""

import numpy as np
import pytest
import torch
from helpers.decoding import EOS, prompts, run, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from promptkd.generation.sampling import Sampling, TeacherMixture, mask_repeated_ngrams, sample_token


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("ngram", [0, 2])
def test_decode_greedy_equals_generate(family, ngram):
    model, given = tiny(family), prompts()
    output = run(model, given, sampling=Sampling(do_sample=False, no_repeat_ngram_size=ngram))
    for prompt, response in zip(given, output.responses):
        expected = model.generate(
            torch.as_tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            no_repeat_ngram_size=ngram,
        )[0, len(prompt) :]
        assert response.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_decode_hidden_states_equal_those_of_a_plain_forward(family):
    model, given = tiny(family), prompts()
    output = run(model, given, keep_states=True, token_budget=80)
    for prompt, response, states in zip(given, output.responses, output.hidden_states):
        ids = torch.cat([torch.as_tensor(prompt), response])[None, :-1]
        with torch.no_grad():
            expected = model.base_model(ids).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_decode_samples_depend_only_on_the_example():
    model, given = tiny("gpt2"), prompts()

    def sample(prompts, rng_keys, token_budget=10_000):
        output = run(model, prompts, token_budget, sampling=Sampling(), rng_keys=rng_keys)
        return [response.tolist() for response in output.responses]

    rng_keys = [(7, 1, row) for row in range(len(given))]
    together = sample(given, rng_keys)
    assert together == sample(given, rng_keys, token_budget=64) == sample(given, rng_keys)
    assert sample(given[4:5], rng_keys[4:5]) == together[4:5]
    assert sample(given, [(8, 1, row) for row in range(len(given))]) != together


def test_decode_samples_have_the_distribution_of_the_model():
    """Chi-square of two-token responses on a tiny vocabulary against the exact probabilities."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5, n_layer=1, n_head=1, n_embd=8, n_positions=16, initializer_range=0.8)
    model, rows = GPT2LMHeadModel(config).eval(), 4000
    prompt = np.array([1, 2])
    responses = run(
        model, [prompt] * rows, max_new_tokens=2, end_ids=[0], sampling=Sampling(),
        rng_keys=[(3, row) for row in range(rows)],
    ).responses  # fmt: skip
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[1, 2, t] for t in range(5)])).logits[:, -1].softmax(-1)
    statistic, cells = 0.0, 0
    sampled = [tuple(r.tolist()) for r in responses]
    for a in range(5):
        for b in range(5) if a else [None]:
            expected = rows * float(first[a] * (second[a, b] if a else 1))
            count = sampled.count((a, b) if a else (0,))
            statistic, cells = statistic + (count - expected) ** 2 / expected, cells + 1
    assert cells == 21 and statistic < 45.3  # 99.9 % of chi-square with 20 degrees of freedom


def test_decode_ends_responses_at_the_first_end_token_or_the_limit():
    model, given = tiny("gpt2"), prompts(40)
    responses = run(model, given, sampling=Sampling(), rng_keys=[(1, row) for row in range(40)]).responses
    for response in responses:
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == 20
    assert any(response[-1] == EOS for response in responses) and any(len(response) == 20 for response in responses)


def test_sample_token_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).repeat(5, 1)
    picked = sample_token(logits, Sampling(), torch.tensor([0.0, 0.25, 0.49, 0.51, 1.0]))
    assert picked.tolist() == [0, 0, 0, 2, 2]  # a token of probability 0 never comes, even at u = 1


def test_sample_token_applies_top_k_and_top_p_and_temperature():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).repeat(200, 1)
    uniform = torch.linspace(0, 0.999, 200)
    assert set(sample_token(logits, Sampling(top_k=2), uniform).tolist()) == {1, 3}
    assert set(sample_token(logits, Sampling(top_p=0.6), uniform).tolist()) == {1, 3}
    assert set(sample_token(logits, Sampling(top_p=0.5), uniform).tolist()) == {1}
    cold = sample_token(logits, Sampling(temperature=0.1), uniform)
    assert (cold == 1).float().mean() > 0.98


def test_mask_repeated_ngrams_masks_tokens_that_complete_an_ngram():
    """The first sequence has no room before it; the others are padded. Token 9 is outside of the vocabulary."""
    tokens = torch.tensor(
        [[1, 2, 3, 1, 2, -1], [-1, 5, 1, 2, 5, -1], [-1, -1, -1, -1, 1, -1], [1, 2, 9, 1, 2, -1], [1, 1, 1, 1, 1, -1]]
    )
    banned = []
    for size in (3, 1):
        scores = torch.zeros(5, 6)
        mask_repeated_ngrams(scores, tokens, torch.tensor([5]), size)
        banned.append([row.isinf().nonzero().flatten().tolist() for row in scores])
    assert banned == [[[3], [], [], [], [1]], [[1, 2, 3], [1, 2, 5], [1], [1, 2], [1]]]
    scores = torch.zeros(5, 6, dtype=torch.float16)
    mask_repeated_ngrams(scores[:, :3], tokens, torch.tensor([5]), 2)
    assert [row.isinf().nonzero().flatten().tolist() for row in scores] == [[], [1], [], [], [1]]


def test_request_refuses_a_mixture_together_with_a_prefix():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="teacher_mixture and prefix"):
        run(model, prompts(1), teacher_mixture=TeacherMixture(model, 0.5), prefix=torch.zeros(2, 32))
