"""Captured decoding on a virtual GPU: the same responses as on a CPU, few waits and few launches.

A captured step refuses what waits for the GPU or copies to the host (see `helpers.virtual_cuda_graph`).
"""

from __future__ import annotations

import pytest
import torch
from helpers.decoding import prompts, run, tiny
from helpers.virtual_cuda import VirtualCuda
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from promptkd.errors import UserError
from promptkd.generation import batch, captured
from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.models.loading import fuse_activations

pytestmark = pytest.mark.cpu
KEYS = [(5, row) for row in range(40)]


def requests() -> dict:
    """Changes of a request, by name. Those of tensors and models are made on the CPU."""
    filtered = Sampling(top_p=0.9, top_k=20, temperature=0.8, no_repeat_ngram_size=3)
    return {
        "greedy": dict(keep_states=True),
        "sampled": dict(sampling=Sampling(), rng_keys=KEYS, keep_states=True),
        "filtered": dict(sampling=filtered, rng_keys=KEYS),
        "prefix": dict(prefix=torch.randn(3, 16), sampling=Sampling(), rng_keys=KEYS),
        "mixture": dict(teacher_mixture=TeacherMixture(tiny("llama"), 0.4), sampling=Sampling(), rng_keys=KEYS),
    }


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["greedy", "sampled", "filtered", "prefix", "mixture"]),
        ("llama", ["sampled"]),
        pytest.param("opt", ["greedy", "filtered"], marks=pytest.mark.slow),
    ],
)
def test_captured_decoding_gives_the_responses_of_a_cpu(family, names, monkeypatch):
    """Sequences finish at different steps, and several graphs follow one another: wider caches, fewer rows."""
    for name, value in {"WINDOW": 10, "KEPT_SHARE": 0.5, "LOOK_EVERY": {"cpu": 1, "cuda": 4}}.items():
        monkeypatch.setattr(batch, name, value)
    model, given, changes = tiny(family), prompts(40), requests()
    expected = {name: run(model, given, **changes[name]) for name in names}
    with VirtualCuda() as gpu:
        model.to("cuda")
        changes["mixture"]["teacher_mixture"].model.to("cuda")
        changes["prefix"]["prefix"] = changes["prefix"]["prefix"].to("cuda")
        for name in names:
            with gpu.phase(name):
                output = run(model, given, **changes[name])
            assert gpu.replays[name] > 8
            assert len({len(response) for response in output.responses}) > 3
            for response, other in zip(output.responses, expected[name].responses, strict=True):
                assert response.tolist() == other.tolist(), name
            for states, other in zip(output.hidden_states, expected[name].hidden_states, strict=True):
                torch.testing.assert_close(states.cpu(), other, rtol=1e-4, atol=1e-5)


def test_captured_decoding_stays_within_budget_of_waits_and_launches():
    """For each token of GPT-2: 57 + 13 launches a layer and 2 waits before steps were captured."""
    model = fuse_activations(GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=2, n_embd=8, vocab_size=600)).eval())
    counts = {}
    with VirtualCuda() as gpu:
        model.to("cuda")
        for tokens in (8, 24):
            with gpu.phase(f"{tokens}"):
                run(model, prompts(32), max_new_tokens=tokens, end_ids=[-1], sampling=Sampling(), rng_keys=KEYS)
            counts[tokens] = [gpu.count(kind, f"{tokens}") for kind in ("launches", "waits")]
            assert gpu.replays[f"{tokens}"] == tokens - 2  # The first token is the prompts', the second one warms up.
        values = torch.ones(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        values += 1
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            values.tolist()
        graph.capture_end()
        assert values.tolist() == [1, 1, 1]  # Capture runs nothing.
    launches, waits = ((more - fewer) / 16 for more, fewer in zip(counts[24], counts[8]))
    assert launches <= 0.75 * (57 + 13 * 12) and waits <= 1 / 8


def test_captured_decoding_ends_with_one_line_if_a_step_waits(monkeypatch):
    model = tiny("gpt2")
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: output * float(output.max() < 1e9))
    expected = [response.tolist() for response in run(model, prompts()).responses]
    with VirtualCuda():
        model.to("cuda")
        with pytest.raises(UserError, match=r"decoding step cannot be captured .*: set PROMPTKD_CUDA_GRAPHS=off"):
            run(model, prompts())
        monkeypatch.setenv(captured.SWITCH, "off")
        assert [response.tolist() for response in run(model, prompts()).responses] == expected


def test_captured_decoding_is_for_steps_of_fixed_shape_only():
    """A sliding window counts only if the sequences are longer, and deterministic algorithms run eagerly."""
    sizes = dict(vocab_size=40, num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=4)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=8, **sizes)).eval()
    with VirtualCuda() as gpu:
        for config, most, replays in (({}, 20, 0), ({"sliding_window": 64}, 20, 18), ({"num_local_experts": 2}, 20, 0)):
            for name, value in config.items():
                setattr(model.config, name, value)
            with gpu.phase(str(config)):
                run(model.to("cuda"), prompts(2), max_new_tokens=most, end_ids=[-1])
            assert gpu.replays[str(config)] == replays
        torch.use_deterministic_algorithms(True)
        try:
            with gpu.phase("deterministic"):
                run(tiny("gpt2").to("cuda"), prompts(2), max_new_tokens=5)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not gpu.replays["deterministic"]
