"""The training loop that all methods share."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import torch

from promptkd.checkpointing.manager import Checkpoints
from promptkd.config.options import OptimizerSettings
from promptkd.data.dataset import ExampleSet
from promptkd.distributed.device import peak_memory_gb
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.methods.base import Method
from promptkd.methods.context import Sampler, StepBatch
from promptkd.models.soft_prompt import save_prompt
from promptkd.training.curves import draw_curves
from promptkd.training.metrics import MetricsFile, StepTimes, logged_memory_gb
from promptkd.training.nonfinite import NonFiniteGuard
from promptkd.training.run_folder import BEST_METRICS, output_folder, save_model
from promptkd.training.signals import StopSignals, name_of, status_of
from promptkd.training.trackers import Trackers
from promptkd.training.validation import DevSet
from promptkd.utils.files import write_json
from promptkd.utils.profiling import profile_step
from promptkd.utils.progress import Progress


class Trainer:
    """Train a method: batches go to it, rows to metrics.jsonl, and the best and last models to folders.

    Args:
        settings: The run's settings.
        method: The method, with its models and engines.
        examples: The training examples.
        sampler: The examples of each step.
        dev: The dev set.
        ranks: The ranks of the run.
        checkpoints: The run's checkpoints. If the run resumes, their state has been loaded.
        trackers: The experiment trackers, none on other ranks than the first.
    """

    def __init__(
        self,
        settings,
        method: Method,
        examples: ExampleSet,
        sampler: Sampler,
        dev: DevSet,
        ranks: Ranks,
        checkpoints: Checkpoints,
        trackers: Trackers,
    ) -> None:
        self.settings, self.method, self.ranks = settings, method, ranks
        self.folder, self.checkpoints = checkpoints.run, checkpoints
        self.examples, self.sampler, self.dev = examples, sampler, dev
        self.total = total_steps(settings.optimizer, sampler)
        self.best: dict[str, float] = {}  # values of the saved best models, see `keep_best`
        self.done, skipped = 0, 0
        if (state := checkpoints.resumed) is not None:
            self.best, self.done, skipped = state["best"], state["step"], state["skipped"]
        self.guard = NonFiniteGuard(settings.method, method.learners(), settings.run.skip_nonfinite, skipped)
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", ranks.is_main, trackers)
        self.times = StepTimes()
        self.progress = Progress(settings.method, self.total, ranks.is_main, done=self.done)
        self.signals = StopSignals()

    def fit(self) -> None:
        """Train to the end. After a signal, write a checkpoint and raise SystemExit."""
        try:
            with self.signals:
                self.run()
            self.metrics.trackers.close(self.metrics.path)
        finally:
            self.metrics.trackers.close()
            self.metrics.close()
            self.progress.close()
            self.checkpoints.unlock()

    def run(self) -> None:
        """Take all steps that are left, with evaluations and checkpoints in between."""
        if self.checkpoints.start is None:
            self.evaluate(0)
            self.measure_exposure_bias(0)
        else:
            self.progress.line(f"{self.settings.method}  resumes after step {self.done}/{self.total}")
        for step in range(self.done + 1, self.total + 1):
            self.train_step(step)
            if self.is_evaluation_due(step):
                self.evaluate(step)
            self.measure_exposure_bias(step)
            if step < self.total and (self.is_evaluation_due(step) or self.is_exposure_bias_due(step)):
                self.draw()
            self.maybe_checkpoint(step)
        self.save("last")
        self.draw()
        self.record_memory()
        self.checkpoints.prune(1)
        saved = [name for name in (*BEST_METRICS, "last", "prompt") if (self.folder / name).is_dir()]
        self.progress.line(f"{self.settings.method}  written to {self.folder}/: {', '.join(saved)}")

    def record_memory(self) -> None:
        """Write memory.json: each rank's peak memory since its process started, not rounded."""
        peaks = self.ranks.world.all_gather_objects([peak_memory_gb(self.ranks.device)])
        if self.ranks.is_main:
            write_json(self.folder / "memory.json", {"peak_memory_gb": peaks})

    def train_step(self, step: int) -> None:
        """Take one optimizer step and log it."""
        began = time.perf_counter()
        batch = self.local_batch(step)
        seed_step(self.settings.run.seed, step, self.ranks.dp_rank)
        is_profiled = self.settings.run.profile and step == self.done + 2 and self.ranks.is_main
        with profile_step(self.folder, is_profiled):
            row = self.method.step(batch)
        nonfinite = self.guard.find(row)
        row |= self.guard.loss_scales(step)
        if not nonfinite:
            self.log(step, row, batch, time.perf_counter() - began)
            return
        self.guard.report(step, nonfinite, batch, self.ranks, self.folder)
        self.metrics.row("skipped", step, epoch=self.sampler.epoch_of(step), parts=sorted(nonfinite))

    def maybe_checkpoint(self, step: int) -> None:
        """Write a checkpoint if one is due or any rank received a signal. After a signal, raise SystemExit."""
        late = 1 if self.checkpoints.is_late() else 0
        request = self.ranks.all_reduce_max(late + 2 * self.signals.place)
        stop = request // 2
        keeps = self.checkpoints.keep > 0
        if keeps and (request or self.checkpoints.is_due(step) or self.is_evaluation_due(step)):
            numbers = {"best": self.best, "skipped": self.guard.skipped, "metrics_bytes": self.metrics.synced_size()}
            numbers["run_id"] = self.metrics.trackers.run_id
            self.checkpoints.write(step, self.method, numbers)
        if stop:
            note = "with a checkpoint: --resume continues" if keeps else "without a checkpoint (--keep-checkpoints 0)"
            self.progress.line(f"{name_of(stop)}: stopped after step {step} {note}")
            raise SystemExit(status_of(stop))

    def local_batch(self, step: int) -> StepBatch:
        """Return this rank's examples of an optimizer step."""
        examples = [self.examples[index] for index in self.sampler.indices(step)]
        return StepBatch(step, self.total, examples, self.settings.optimizer.batch_size)

    def log(self, step: int, row: dict[str, float], batch: StepBatch, seconds: float) -> None:
        """Show a step's losses and, where a row is due, append one to metrics.jsonl."""
        losses = {key: value for key, value in row.items() if key.endswith("loss")}
        self.progress.update(values=losses)
        self.times.add({**batch.seconds, "step_seconds": seconds})
        if step % self.settings.run.log_interval and step != self.total:
            return
        if "response_tokens" in row:
            row["response_length"] = row["response_tokens"] / (len(batch.examples) * self.ranks.dp_size)
        row["lr"] = self.method.student.lr
        row["grad_norm"] = self.method.student.grad_norm
        row.update(self.times.means(), peak_memory_gb=logged_memory_gb(self.ranks.device))
        self.metrics.row("train", step, epoch=self.sampler.epoch_of(step), **row)

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether the dev set is evaluated after a step."""
        every = self.settings.run.eval_interval
        every = self.sampler.steps_per_epoch if every == -1 else every
        return step == self.total or (every > 0 and step % every == 0)

    def is_exposure_bias_due(self, step: int) -> bool:
        """Return whether the exposure bias is measured before the first step, or after a step."""
        every = self.settings.run.exposure_bias_every
        return every > 0 and (step % every == 0 or step == self.total)

    def evaluate(self, step: int) -> None:
        """Measure the dev loss and, with --eval-gen, ROUGE-L of sampled answers. Save the student if it is the best."""
        if not len(self.dev):
            return
        began = time.perf_counter()
        row: dict[str, Any] = {"dev_loss": self.dev.loss(self.method.student)}
        self.method.after_evaluation(row["dev_loss"])
        if self.settings.run.eval_gen:
            row["rougeL"] = self.dev.rouge_l(self.method.student)
        epoch = self.sampler.epoch_of(step) if step else 0
        self.metrics.row("eval", step, epoch=epoch, **row, eval_seconds=time.perf_counter() - began)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items())
        self.progress.line(f"{self.settings.method}  step {step}/{self.total}  {shown}")
        if step:
            self.keep_best(row)

    def keep_best(self, row: dict[str, float]) -> None:
        """Write the student to each folder of BEST_METRICS whose values it improves on.

        Checkpoints of version 0.1 may have no dev loss for best_rougeL. The newer of two equal scores wins then.
        """
        for folder, signs in BEST_METRICS.items():
            if not signs.keys() <= row.keys():
                continue
            names = {key: folder if place == 0 else f"{folder}_{key}" for place, key in enumerate(signs)}
            best = [sign * self.best.get(names[key], -sign * math.inf) for key, sign in signs.items()]
            if [sign * row[key] for key, sign in signs.items()] > best:
                for key, name in names.items():
                    self.best.pop(name, None)
                    self.best |= {name: row[key]} if math.isfinite(row[key]) else {}  # JSON has no others
                self.save(folder)

    def measure_exposure_bias(self, step: int) -> None:
        """Log the exposure bias on dev prompts: every --exposure-bias-every steps, first and last."""
        if not self.is_exposure_bias_due(step):
            return
        began = time.perf_counter()
        rows = self.settings.run.exposure_bias_rows
        row = self.dev.exposure_bias(self.method.student, self.method.measuring_teacher(), rows)
        epoch = self.sampler.epoch_of(step) if step else 0
        seconds = time.perf_counter() - began
        self.metrics.row("exposure_bias", step, epoch=epoch, **row, exposure_bias_seconds=seconds)

    def save(self, name: str) -> None:
        """Write the student, and the soft prompt if the method tunes one, to folders of the run."""
        method = self.method
        tokenizer, merge = method.context.tokenizer, self.settings.lora.merge
        save_model(method.student, tokenizer, self.folder / name, self.examples.format, merge)
        prompt, teacher = method.prompt(), method.context.teacher
        if prompt is not None and teacher is not None and self.ranks.is_main:
            with output_folder(self.folder / ("prompt" if name == "last" else f"{name}_prompt")) as temporary:
                save_prompt(prompt, temporary, self.settings.models.teacher_model_path, teacher.config)

    def draw(self) -> None:
        """Draw curves.png, unless --no-curves. The run continues without it if that fails."""
        if not (self.ranks.is_main and self.settings.run.curves):
            return
        picture = self.folder / "curves.png"
        try:
            draw_curves(self.metrics.path, picture, f"{self.settings.method}: {self.folder}")
        except (OSError, UserError) as error:
            self.progress.line(f"{picture} cannot be drawn ({error}): the run continues without it")


def total_steps(optimizer: OptimizerSettings, sampler: Sampler) -> int:
    """Return the run's number of optimizer steps: --total-iters, or --epochs times the steps of an epoch."""
    return optimizer.total_iters or optimizer.epochs * sampler.steps_per_epoch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank), so that a resumed run draws what an undisturbed one draws."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
