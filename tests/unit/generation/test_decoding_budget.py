"""The token budget of decoding follows the device's free memory, is equal on all ranks, and agrees with the plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.planning import make
from helpers.runs import rows_of, tiny_argv
from helpers.tiny_models import make_model
from helpers.training import GOLDEN, train_here

from promptkd.generation.batch import Batch
from promptkd.generation.budget import decoding_budget
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.kv_cache import GrowingCache
from promptkd.generation.sampling import Sampling
from promptkd.losses import positions_at_a_time
from promptkd.models.wrapper import LMHead
from promptkd.planning.decoding import decoding, decoding_rows
from promptkd.planning.memory import memory_of
from promptkd.utils import memory

STUDENT = str(GOLDEN / "models/gpt2_student")
ALONE = SimpleNamespace(all_reduce_max=lambda value: value)
GB = 10**9


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """Record the number of sequences in each batch that is decoded."""
    sizes, initialize = [], Batch.__init__

    def record(batch, models, request, indices, *rest):
        sizes.append(len(indices))
        initialize(batch, models, request, indices, *rest)

    monkeypatch.setattr(Batch, "__init__", record)
    return sizes


@pytest.mark.parametrize("method", ["promptkd", pytest.param("minillm", marks=pytest.mark.slow)])
def test_rollout_token_budget_changes_batches_but_no_response(method, tmp_path, batches):
    """It applies to rollouts in training, to ROUGE-L on the dev set and to exposure bias."""
    often = ["--dev-num", "3", "--exposure-bias-every", "1", "--exposure-bias-rows", "3", "--eval-interval", "1"]
    argv = ["--batch-size", "4", "--max-length", "100", "--total-iters", "1", *often]
    for name, budget in (("all", []), ("one", ["--rollout-token-budget", "1"])):
        batches.clear()
        train_here(tiny_argv(method, tmp_path / name, *argv, *budget))
        assert (set(batches) == {1}) == bool(budget), batches
    for one, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "all"), strict=True):
        assert one.keys() == other.keys()
        assert one.get("response_tokens") == other.get("response_tokens") and one.get("rougeL") == other.get("rougeL")
        for key in one.keys() - {"event", "curve"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_decode_gives_the_same_tokens_for_two_budgets(tmp_path):
    model = make_model("gpt2", tmp_path)
    given = [list(range(1, 3 + row)) for row in range(6)]
    request = GenerationRequest(given, 9, [0], Sampling(do_sample=False))
    small, large = (decode(model, request, token_budget).responses for token_budget in (1, 10_000))
    assert all(map(torch.equal, small, large))


def test_decoding_budget_on_a_cpu_is_half_a_gigabyte_of_cache(tmp_path):
    model = make_model("llama", tmp_path)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    assert decoding_budget([model], 512, ALONE) == 2**29 // token
    assert decoding_budget([model, model], 512, ALONE) == 2**29 // (2 * token)
    assert decoding_budget([model], 512, ALONE, given=77) == 77


def on_gpu(model):
    """Return a stand-in for the model that reports a GPU as its device."""
    return SimpleNamespace(config=model.config, dtype=model.dtype, device=torch.device("cuda", 0))


def test_decoding_budget_on_a_gpu_follows_free_memory_and_the_smallest_rank(tmp_path, monkeypatch):
    model = on_gpu(make_model("llama", tmp_path))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name: 3 * GB if n == "memory_reserved" else GB)
    budget = {}
    for free in (0, 2 * GB, 6 * GB):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * GB))
        budget[free] = decoding_budget([model], 512, ALONE)
    assert budget[0] % 512 == 0
    assert budget[2 * GB] == pytest.approx(2 * budget[0], rel=0.01)  # the 2 GB that torch holds for later count too
    assert budget[6 * GB] == pytest.approx(4 * budget[0], rel=0.01)
    poor = SimpleNamespace(all_reduce_max=lambda value: max(value, -1024))  # Another rank has memory for 1,024 tokens.
    assert decoding_budget([model], 512, poor) == 1024
    monkeypatch.setattr("promptkd.generation.budget.free_memory", lambda device: 0)
    assert decoding_budget([model], 512, ALONE) == 512  # at least one sequence


@pytest.mark.parametrize(("prompt", "new"), [(5, 3), (64, 64), (64, 65), (64, 66), (64, 131), (9, 200)])
def test_plan_counts_the_cache_that_decode_allocates(prompt, new, tmp_path, monkeypatch):
    setting = make("--cpu", "--batch-size", "3", "--max-prompt-length", str(prompt), "--max-length", str(prompt + new))
    held, peaks, reallocate = {}, [], GrowingCache(None).layer_class_to_replicate._reallocate

    def record(layer, like, length, capacity):
        old = held.get(id(layer), 0)
        buffer = reallocate(layer, like, length, capacity)
        held[id(layer)] = layer._buffer.nbytes
        copied = like.nbytes * 2 if not length and old else 0  # The kept sequences exist beside both buffers.
        peaks.append((sum(held.values()), old + copied))
        return buffer

    monkeypatch.setattr(GrowingCache(None).layer_class_to_replicate, "_reallocate", record)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT).eval()
    model.config.max_position_embeddings = model.config.n_positions
    no_end = [model.config.vocab_size]
    decode(model, GenerationRequest([[1] * prompt] * 3, new, no_end, Sampling(do_sample=False)), 10**9)
    rows = decoding_rows(setting, setting.student, setting.rows)
    planned = decoding(setting, setting.student, rows)["key-value cache"]
    shape = setting.student.shape
    final = max(total for total, _ in peaks)
    assert rows == 3 and final == planned * shape.layers // (shape.layers + memory.MOVING_LAYERS)
    assert max(total + extra for total, extra in peaks) <= planned


@pytest.mark.parametrize("free, share", [(None, 1), (20 * GB, 1), (2 * GB, 2), (GB, 4), (0, 16)])
def test_positions_of_a_loss_follow_free_memory(free, share, monkeypatch):
    """A GPU computes 1,024 positions of GPT-2's logits at a time, or a half, a quarter and so on of them."""
    head = LMHead(torch.empty(50257, 1, dtype=torch.bfloat16, device="meta"), None)
    monkeypatch.setattr("promptkd.losses.fused.free_memory", lambda device: free)
    assert positions_at_a_time(head, references=2) == 1024 // share


def test_plan_and_loss_agree_on_the_positions(monkeypatch):
    """The plan of a GPU with little memory counts the logits that the loss would compute with so much free."""
    asked = []

    def record(*sizes):
        asked.append(sizes)
        return memory.positions_per_chunk(*sizes)

    monkeypatch.setattr("promptkd.planning.memory.positions_per_chunk", record)
    options = [
        "--gpus",
        "1",
        "--gpu",
        "3090",
        "--batch-size",
        "16",
        "--max-length",
        "512",
        "--max-prompt-length",
        "256",
    ]
    setting = make(*options, student="gpt2-base", teacher="gpt2-xlarge")
    small = replace(setting, hardware=replace(setting.hardware, memory=15e9))
    planned = [memory_of(each).phases["prompt"]["logits"] for each in (small, setting)]
    sizes = next(each for each in asked if each[4] == 2)
    vocabulary, device, free, itemsize, references = sizes
    monkeypatch.setattr("promptkd.losses.fused.free_memory", lambda device: free)
    head = LMHead(torch.empty(vocabulary, 1, dtype=torch.float16, device="meta"), None)
    assert planned[0] < planned[1] and (device, itemsize) == ("cuda", 2)
    assert positions_at_a_time(head, references) == memory.positions_per_chunk(*sizes) < 1024


def test_plan_and_decoding_budget_agree_on_the_batch_size(monkeypatch):
    setting = make("--gpus", "2", "--gpu", "3090", "--batch-size", "100000", "--examples", "1000000")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    core = SimpleNamespace(config=model.config, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    free = {}
    monkeypatch.setattr(
        "promptkd.planning.decoding.decoding_tokens",
        lambda device, bytes_free, *rest: (
            free.update(now=bytes_free),
            memory.decoding_tokens(device, bytes_free, *rest),
        )[1],
    )
    rows = decoding_rows(setting, setting.student, setting.rows)
    monkeypatch.setattr("promptkd.generation.budget.free_memory", lambda device: free["now"])
    assert 1 < rows < 100000 and rows == decoding_budget([core], setting.length, ALONE) // setting.length
    given = replace(setting, rollout_token_budget=1000)
    assert decoding_rows(given, setting.student, setting.rows) == 1000 // setting.length
