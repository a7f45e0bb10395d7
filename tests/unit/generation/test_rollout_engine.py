"""--rollout-engine: refused where vLLM cannot run; what is asked of it, seen through a double."""

from __future__ import annotations

import contextlib
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model

from promptkd.errors import UserError
from promptkd.generation.backends import GenerationRequest, VllmBackend
from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.methods.promptkd import PromptKDSettings


class Student:
    def __init__(self, folder):
        self.model = make_model("gpt2", folder)

    @contextlib.contextmanager
    def gathered_model(self):
        yield self.model


class FakeLLM:
    def __init__(self, **settings):
        self.settings, self.loaded, self.resets, self.asked = settings, [], 0, None
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=lambda pairs: self.loaded.append(dict(pairs))))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, parameters, use_tqdm):
        self.asked = prompts, parameters
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5, 6, 0))]) for _ in prompts]


@pytest.fixture
def student(tmp_path):
    return Student(tmp_path)


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", module)


def request(**changes):
    how = Sampling(temperature=0.7, top_p=0.9)
    given = dict(prompts=[[1, 2], [3]], keys=[(1, 0), (1, 1)], seed=10, max_new_tokens=4, end_ids=[0], sampling=how)
    return GenerationRequest(**{**given, **changes})


def test_without_vllm_the_option_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vllm"):
        PromptKDSettings(rollout_engine="vllm")


def test_without_a_gpu_the_option_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        PromptKDSettings(rollout_engine="vllm")


def test_each_rollout_brings_the_present_weights_and_forgets_old_keys(vllm, student):
    engine = VllmBackend(32)
    engine.answer(student, request())
    with torch.no_grad():
        student.model.get_input_embeddings().weight += 1
    rollout = engine.answer(student, request())
    assert engine.llm.resets == 2 and engine.llm.settings["max_model_len"] == 32
    name = "transformer.wte.weight"
    assert torch.equal(engine.llm.loaded[1][name], student.model.get_input_embeddings().weight)
    assert [response.tolist() for response in rollout.responses] == [[5, 6, 0]] * 2 and rollout.states is None


def test_sampling_options_and_a_seed_of_its_own_reach_each_prompt(vllm, student):
    engine = VllmBackend(32)
    engine.answer(student, request())
    prompts, parameters = engine.llm.asked
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[1, 2], [3]]
    assert parameters[0].temperature == 0.7 and parameters[0].top_k == -1 and parameters[0].stop_token_ids == [0]
    assert parameters[0].seed != parameters[1].seed
    engine.answer(student, request(sampling=Sampling(do_sample=False)))
    assert engine.llm.asked[1][0].temperature == 0.0


def test_mixed_sampling_is_refused(vllm, student):
    with pytest.raises(UserError, match="rollout-engine hf"):
        VllmBackend(32).answer(student, request(mix=TeacherMixture(None, 0.2)))
