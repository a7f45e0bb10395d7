"""MiniLLM: the published numbers, its parts against plain forms, and the step's invariances."""

import itertools
import json

import pytest
import torch
from helpers.golden_cases import NOT_OPTIONS, compare
from helpers.minillm_data import CORPUS, PROMPTS
from helpers.training import GOLDEN, metrics_of, start, train_here
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from minillm_baselines.minillm import MiniLLM
from minillm_baselines.rollout_buffer import RolloutBuffer, StoredRollout, advantages, returns, whiten
from minillm_baselines.rollout_sampler import RolloutSampler
from promptkd import losses
from promptkd.data.token_file import TokenFileWriter, token_dtype
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.losses import ClippedPolicy, fused_loss, reference_loss
from promptkd.models.wrapper import LMHead, without_dropout
from promptkd.training.setup import build_trainer
from train import read_settings

ALONE = Ranks(0, 1, torch.device("cpu"))
CASE = json.loads((GOLDEN / "cases/minillm_gpt2.json").read_text())


def argv(save, *extra: str, corpus: bool = True) -> list[str]:
    models = ["--model-path", str(GOLDEN / "models/gpt2_student")]
    models += ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher")]
    data = ["--prompt-data-dir", str(PROMPTS), "--max-length", "128", "--max-prompt-length", "96", "--dev-num", "0"]
    data += ["--lm-data-dir", str(CORPUS)] if corpus else []
    return ["--method", "minillm", *models, *data, "--save", str(save), "--lr", "0.001", *extra]


SHORT = ["--num-rollouts", "8", "--chunk-size", "4", "--ppo-epochs", "2", "--reward-scaling", "0.5"]


def case_options(*extra: str) -> list[str]:
    options = []
    for name, value in CASE["options"].items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            options.append(flag if value else flag.replace("--", "--no-", 1))
        elif name not in NOT_OPTIONS:
            options += [flag, str(value)]
    return [*options, *extra]


@pytest.mark.parametrize("extra", [[], ["--loss-normalization", "micro-batch"], ["--whiten", "published"]])
def test_every_step_equals_the_recording(extra, save):
    train_here(argv(save, *case_options(*extra)))
    compare(CASE, save)


def test_defaults_are_the_published_ones(save):
    settings = read_settings(argv(save))
    assert settings.optimizer.weight_decay == 1e-6 and settings.optimizer.betas == (0.9, 0.95)
    assert read_settings(argv(save, "--weight-decay", "0.1")).optimizer.weight_decay == 0.1
    assert read_settings(argv(save, "--scheduler-name", "cosine_trm")).optimizer.lr_decay_style == "cosine_trm"
    with pytest.raises(UserError, match="both given"):
        read_settings(argv(save, "--scheduler-name", "cosine_trm", "--lr-decay-style", "noam"))


def run(save, *extra: str, corpus: bool = True) -> list[list[float]]:
    train_here(argv(save, *SHORT, *extra, corpus=corpus))
    return numbers(save)


def numbers(save) -> list[list[float]]:
    return [[v for k, v in row.items() if k.endswith(("loss", "reward", "kl", "lens"))] for row in metrics_of(save)]


def test_accumulation_packing_and_ranks_do_not_change_the_step(tmp_path):
    whole = run(tmp_path / "whole", "--batch-size", "4", "--total-iters", "6")
    shape = ["--batch-size", "2", "--gradient-accumulation-steps", "2", "--total-iters", "6"]
    runs = [run(tmp_path / "accumulated", *shape), run(tmp_path / "packed", *shape, "--token-budget", "150")]
    ranks = ["--batch-size", "2", "--total-iters", "6", "--chunk-size", "2"]
    done = start([*argv(tmp_path / "ranks", *SHORT), *ranks], ranks=2)
    assert done.returncode == 0, done.stderr
    for other in [*runs, numbers(tmp_path / "ranks")]:
        for expected, values in zip(whole, other, strict=True):
            assert values == pytest.approx(expected, abs=2e-6)
    assert len({tuple(row) for row in whole}) == 6


def test_a_checkpoint_holds_the_rollouts(tmp_path, monkeypatch):
    """Stopped between the third and the fourth step on a collection, and gone on: the same numbers."""
    options = ["--batch-size", "4", "--total-iters", "6", "--checkpoint-every", "3"]
    whole = run(tmp_path / "whole", *options)
    step = MiniLLM.step

    def stopped(method, window):
        if window.step == 4:
            raise InterruptedError
        return step(method, window)

    monkeypatch.setattr(MiniLLM, "step", stopped)
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", *options)
    monkeypatch.setattr(MiniLLM, "step", step)
    assert run(tmp_path / "run", *options, "--resume") == whole


def test_collections_survive_as_plain_tensors():
    def stored(length):
        return StoredRollout(torch.arange(length), *(torch.rand(length) for _ in range(3)), 0.1 * length, length + 1)

    before = RolloutBuffer(5, [stored(3), stored(1), stored(7)])
    state = before.state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    for after in (RolloutBuffer.from_state(state), RolloutBuffer.gathered(5, dict(enumerate(before.rollouts)), ALONE)):
        assert after.number == 5
        for a, b in zip(before.rollouts, after.rollouts, strict=True):
            assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def test_without_corpus_and_without_the_exact_kl(save):
    run(save, "--batch-size", "4", "--total-iters", "2", "--no-single-step-reg", corpus=False)
    for row in metrics_of(save):
        assert row["tot_loss"] == row["rl_loss"] == row["pg_loss"] and row["reg_loss"] > 0
        assert "pt_loss" not in row


def test_an_empty_corpus_option_leaves_it_out(save):
    """As behind a script that names one."""
    assert read_settings(argv(save, "--lm-data-dir=")).method_settings.lm_data_dir is None


def policy(tokens: int = 50, vocabulary: int = 37) -> tuple:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = LMHead((0.3 * torch.randn(vocabulary, 8)).requires_grad_(), None)
    drawn = torch.randint(vocabulary, (tokens,))
    now = (hidden @ head.weight.T).log_softmax(-1).gather(1, drawn[:, None]).squeeze(1).detach()
    # ratios on both sides of the clipping range, advantages of both signs
    term = ClippedPolicy(drawn, torch.randn(tokens), now + 0.4 * torch.randn(tokens), 0.5 + torch.rand(tokens), 0.2)
    return hidden, head, term, torch.rand(tokens)


@pytest.mark.parametrize("coefficient", [1.0, 2.5])
def test_policy_gradient_by_hand_equals_autograd(coefficient, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 7 * 37)
    hidden, head, term, weights = policy()
    term = ClippedPolicy(term.tokens, term.advantages, term.old, term.importance, term.clip, coefficient)
    results = []
    for function in (fused_loss, reference_loss):
        loss, sums = function(hidden, head, [term], weights)
        results.append((loss, sums, *torch.autograd.grad(3.0 * loss, [hidden, head.weight])))
    for chunked, plain in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


def test_clipped_tokens_have_no_gradient():
    hidden, head, term, weights = policy()
    loss, _ = fused_loss(hidden, head, [term], weights)
    still = torch.autograd.grad(loss, hidden)[0].abs().sum(-1) == 0
    log_q = (hidden @ head.weight.T).log_softmax(-1).gather(1, term.tokens[:, None]).squeeze(1)
    ratio = (log_q - term.old).exp() * term.importance
    clipped = ((ratio > 1.2) & (term.advantages > 0)) | ((ratio < 0.8) & (term.advantages < 0))
    assert torch.equal(still, clipped) and clipped.any() and not clipped.all()


def test_returns_and_advantages():
    rewards = torch.tensor([1.0, 2.0, 4.0])
    assert returns(rewards, 0.5).tolist() == [3.0, 4.0, 4.0]
    assert advantages(rewards, 0.5).tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("padding", [0, 5])
def test_whitening_with_and_without_padding(padding):
    values = [torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 0.5, 3.0])]
    everything = torch.cat([*values, torch.zeros(padding)])
    expected = (everything - everything.mean()) / everything.var(unbiased=False).sqrt()
    whitened = whiten(values, padding, ALONE)
    assert [len(part) for part in whitened] == [2, 3]
    torch.testing.assert_close(torch.cat(whitened), expected[:5])


def test_the_order_is_that_of_the_published_loaders():
    """10 prompts in chunks of 4 (the last of an epoch has 2), collections of 6, batches of 2, steps of 2 batches."""
    windows = RolloutSampler(10, 6, 4, 2, 2, 2, seed=42)
    sampler = DistributedSampler(range(10), 1, 0, shuffle=True, seed=0, drop_last=True)

    def chunks():
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from DataLoader(range(10), 4, sampler=sampler, collate_fn=list)

    stream, rows, store = chunks(), [], [0]
    generator = torch.Generator().manual_seed(42)
    loader = DataLoader(store, 2, shuffle=True, drop_last=True, generator=generator, collate_fn=list)
    for _ in range(5):
        store.clear()
        while len(store) < 6:
            store += next(stream)
        del store[6:]
        rows += [row for _ in range(2) for batch in loader for row in batch]
    assert [row for step in range(1, 16) for row in windows.indices(step)] == rows[:60]
    assert windows.steps_per_epoch == 5 and windows.epoch_of(6) == 2


def test_ranks_share_the_order_of_one():
    alone = RolloutSampler(30, 8, 4, 2, 4, 1)
    pair = [RolloutSampler(30, 8, 4, 2, 4, 1, ranks=2, rank=rank) for rank in (0, 1)]
    for step in range(1, 20):
        together = zip(*(windows.indices(step) for windows in pair))
        assert [row for rows in together for row in rows] == alone.indices(step)
    assert sorted([*pair[0].mine(), *pair[1].mine()]) == list(range(8))


def test_every_rank_needs_a_prompt():
    with pytest.raises(UserError, match="1 prompts cannot be shared out to 2 ranks"):
        RolloutSampler(1, 4, 2, 1, 2, 1, ranks=2)


def test_mixed_sampling_has_the_mixtures_distribution():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=5, n_layer=1, n_head=1, n_embd=8, n_positions=16, initializer_range=0.8)
        models.append(GPT2LMHeadModel(config).eval())
    student, teacher = models
    rows, share = 4000, 0.3
    request = GenerationRequest(
        [[1, 2]] * rows, 2, [0], Sampling(), rng_keys=[(3, row) for row in range(rows)],
        teacher_mixture=TeacherMixture(teacher, share),
    )  # fmt: skip
    responses = decode(student, request, 100_000).responses

    def probabilities(ids):
        with torch.no_grad():
            both = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for model in models]
        return (1 - share) * both[0] + share * both[1]

    first, statistic = probabilities([1, 2]), 0.0
    seen = [tuple(response.tolist()) for response in responses]
    for a in range(5):
        second = probabilities([1, 2, a]) if a else torch.ones(1)
        for b, chance in enumerate(second.tolist()):
            expected = rows * float(first[a]) * chance
            statistic += (seen.count((a, b) if a else (0,)) - expected) ** 2 / expected
    assert statistic < 45.3  # 99.9 % of chi-square with 20 degrees of freedom


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_model_without_dropout_is_the_same_in_train_mode(family):
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_layer=2, n_head=2, n_embd=8, n_positions=16))
    elif family == "opt":
        sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, ffn_dim=16, word_embed_proj_dim=8)
        rates = dict(dropout=0.2, attention_dropout=0.2, layerdrop=0.2)
        model = OPTForCausalLM(OPTConfig(vocab_size=9, max_position_embeddings=16, **sizes, **rates))
    else:
        sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=16)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, attention_dropout=0.2, **sizes))
    ids = torch.randint(9, (2, 12))
    expected = model.eval()(ids).logits
    without_dropout(model)
    torch.testing.assert_close(model.train()(ids).logits, expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--temperature", "0.5"], "leave --temperature 1"),
        (["--top-k", "5"], "leave --temperature 1"),
        (["--data-dir", "x"], "leave --data-dir out"),
        (["--batch-size", "9"], "--num-rollouts 8 do not fill one batch of 9"),
        (["--prompt-data-dir", ""], "--prompt-data-dir is missing"),
        (["--teacher-mixed-alpha", "1.5"], "--teacher-mixed-alpha 1.5 is not between 0 and 1"),
        (["--reward-scaling", "0"], "--reward-scaling 0.0 is not positive"),
        (["--prompt-data-dir", "/no"], "--prompt-data-dir /no: no such folder: .* instructions .* --save /no$"),
        (["--lm-data-dir", "/no"], "--lm-data-dir /no: no such folder: .* leave it out .* corpus .* --save /no$"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(extra, message, save):
    with pytest.raises(UserError, match=message):
        build_trainer(read_settings(argv(save, *SHORT, *extra)))
    assert not save.exists()


def test_a_corpus_longer_than_the_models_positions_is_refused(save, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    with TokenFileWriter(folder / "train_0", token_dtype(300)) as file:
        file.add(torch.full((3000,), 5).numpy())
    with pytest.raises(UserError, match="rows have up to 3000 tokens, the student"):
        build_trainer(read_settings(argv(save, *SHORT, "--lm-data-dir", str(folder))))
    assert not save.exists()
