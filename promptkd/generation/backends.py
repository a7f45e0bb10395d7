"""What decodes the student's responses: our own decoding on transformers' models, or vLLM on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from promptkd.config.values import option
from promptkd.errors import UserError

if TYPE_CHECKING:
    from promptkd.engine.engine import TrainEngine
    from promptkd.generation.decode import Rollout
    from promptkd.generation.sampling import Sampling, TeacherMixture
    from promptkd.models.vocabulary import SharedVocabulary

# vLLM's share of a GPU's memory: the student's weights once more and the keys and values of a window.
VLLM_MEMORY = 0.3


@dataclass
class RolloutSettings:
    """Options of a method whose student answers while it learns."""

    rollout_engine: Literal["hf", "vllm"] = option("hf", "what decodes responses; vllm: on a GPU, installed by hand")

    def __post_init__(self) -> None:
        if self.rollout_engine == "vllm":
            check_vllm()


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts (token ids) to answer.

    keys: what each row's sampling noise belongs to, besides the seed. token_budget: --rollout-token-budget.
    """

    prompts: Sequence[Sequence[int]]
    keys: Sequence[tuple[int, ...]]
    seed: int
    max_new_tokens: int
    end_ids: Sequence[int]
    sampling: Sampling
    mix: TeacherMixture | None = None
    keep_states: bool = False
    token_budget: int | None = None
    shared: SharedVocabulary | None = None  # answers consist of these tokens


class GenerationBackend(Protocol):
    def answer(self, student: TrainEngine, request: GenerationRequest) -> Rollout:
        """The student, in eval mode and with its present weights, answers. An engine may leave `states` out."""


def rollout_engine(name: str, max_length: int) -> GenerationBackend:
    """The engine that an option's value `hf` or `vllm` names."""
    return VllmBackend(max_length) if name == "vllm" else TransformersBackend()


class TransformersBackend:
    """Our own decoding (promptkd/rollout.py), in this process, on the model that learns."""

    def answer(self, student: TrainEngine, request: GenerationRequest) -> Rollout:
        from promptkd.generation.budget import decoding_budget
        from promptkd.generation.decode import decode
        from promptkd.generation.sampling import uniform_draws

        def noise(row: int):
            return uniform_draws(request.seed, *request.keys[row], count=request.max_new_tokens)

        longest = max(map(len, request.prompts), default=0) + request.max_new_tokens
        with student.gathered_model() as model:
            models = [model, request.mix.model] if request.mix else [model]
            return decode(
                model,
                request.prompts,
                max_new_tokens=request.max_new_tokens,
                end_ids=request.end_ids,
                sampling=request.sampling,
                noise=noise,
                token_budget=decoding_budget(models, longest, student.ranks, request.token_budget),
                keep_states=request.keep_states,
                mix=request.mix,
                shared=request.shared,
                agree=student.ranks.broadcast_tp,
            )


class VllmBackend:
    """vLLM in this process, beside the model that learns; its weights are brought up to date before each rollout.

    Sampling is seeded for each example, but the stream is vLLM's: other draws than HuggingFaceEngine's, and no
    promise that they do not depend on the batch. It hands out no states. Tested with a double of vLLM alone.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length, self.llm = max_length, None

    def answer(self, student: TrainEngine, request: GenerationRequest) -> Rollout:
        import torch
        from vllm import SamplingParams

        from promptkd.generation.decode import Rollout

        if request.mix is not None:
            raise UserError("--rollout-engine vllm cannot mix the teacher into sampling: use --rollout-engine hf")
        if request.shared is not None:
            raise UserError("--rollout-engine vllm needs models of one vocabulary size: use --rollout-engine hf")
        self._load(student)
        how = request.sampling
        drawn = [
            SamplingParams(
                temperature=how.temperature if how.do_sample else 0.0,
                top_p=how.top_p,
                top_k=how.top_k or -1,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(request.end_ids),
                seed=hash((request.seed, *key)) & 0x7FFFFFFF,
                detokenize=False,
            )
            for key in request.keys
        ]
        prompts = [{"prompt_token_ids": list(map(int, prompt))} for prompt in request.prompts]
        answers = self.llm.generate(prompts, drawn, use_tqdm=False)
        return Rollout([torch.tensor(answer.outputs[0].token_ids) for answer in answers])

    def _load(self, student: TrainEngine) -> None:
        from vllm import LLM

        with student.gathered_model() as model:
            if self.llm is None:
                self.llm = LLM(
                    model=model.name_or_path,
                    dtype=str(model.dtype).removeprefix("torch."),
                    load_format="dummy",  # the weights come from the model that learns
                    skip_tokenizer_init=True,
                    max_model_len=self.max_length,
                    gpu_memory_utilization=VLLM_MEMORY,
                    distributed_executor_backend="external_launcher",  # one engine for each of our ranks
                )
            worker = self.llm.llm_engine.model_executor.driver_worker
            worker.model_runner.model.load_weights((name, p.data) for name, p in model.named_parameters())
        self.llm.reset_prefix_cache()  # keys and values of the old weights


def check_vllm() -> None:
    """Raise UserError where vLLM cannot run."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--rollout-engine vllm: vLLM is not installed: pip install vllm, or use --rollout-engine hf")
    import torch

    if not torch.cuda.is_available():
        raise UserError("--rollout-engine vllm needs a GPU, and there is none: use --rollout-engine hf")
