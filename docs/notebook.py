# %% [markdown]
# # PromptKD in a notebook
#
# Each `# %%` is a cell for Jupyter (jupytext) and VS Code. The file also runs as a script: `python docs/notebook.py`.
# The models are the tiny ones of the tests. Name your own in `MODELS` and `DATA`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import promptkd
from promptkd.losses import ReverseKL
from promptkd.methods.base import Method

EXAMPLES = Path(promptkd.__file__).parents[1] / "tests/golden"
MODELS = {
    "model_path": EXAMPLES / "models/gpt2_student",
    "teacher_model_path": EXAMPLES / "models/gpt2_teacher",
}
DATA = {"data_dir": EXAMPLES / "processed/dolly/full/gpt2", "max_length": 128, "max_prompt_length": 96}
SHORT = {"lr": 1e-3, "batch_size": 4, "total_iters": 3, "dev_num": 3, "overwrite": True}

# %% [markdown]
# ## Train
# The keywords are the options of `promptkd train --help`, with underscores.

# %%
run = promptkd.train(method="promptkd", **MODELS, **DATA, **SHORT, save="results/notebook/promptkd")
print(run.best, run.student, run.prompt)

# %% [markdown]
# A wrong option is an exception with one line, and the notebook continues.

# %%
try:
    promptkd.train(method="promptkd", batch_sise=4)
except promptkd.UserError as error:
    print(error)

# %% [markdown]
# ## Register a method
# The decorator makes a class known to `method=`. A cell with the class may run again.


# %%
@promptkd.register_method("on_policy_kd")
class OnPolicyKD(Method):
    """Reverse KL to the teacher on the student's own responses."""

    def __init__(self, context, settings):
        super().__init__(context, settings)
        self.teacher = context.frozen_teacher()

    def step(self, step_batch):
        responses = self.generate(step_batch, range(len(step_batch.examples))).responses
        micro_batches, tokens = self.micro_batches(step_batch, responses)
        self.student.train()
        losses = self.student.update(micro_batches, lambda mb: {"loss": ReverseKL(self.teacher.predict(mb))})
        return {**losses, "response_tokens": tokens}


own = promptkd.train(method="on_policy_kd", **MODELS, **DATA, **SHORT, save="results/notebook/on_policy_kd")

# %% [markdown]
# ## Plot
# `run.metrics` holds the rows of metrics.jsonl: `pandas.DataFrame(run.metrics)` is a table of them. `run.curves` is the
# picture that each run draws: `IPython.display.Image(run.curves)`.

# %%
figure, axes = plt.subplots()
for name, each in {"promptkd": run, "on_policy_kd": own}.items():
    rows = [row for row in each.metrics if row["event"] == "eval"]
    axes.plot([row["step"] for row in rows], [row["dev_loss"] for row in rows], marker="o", label=name)
axes.set(xlabel="optimizer step", ylabel="dev loss")
axes.legend()
figure.savefig("results/notebook/dev_loss.png")
plt.close(figure)

# %% [markdown]
# ## Evaluate

# %%
results = promptkd.evaluate(
    model_path=run.student, **DATA, data_names="dolly", seeds=[10, 20], save=run.folder / "eval", overwrite=True
)
print(results.sets["dolly"]["rougeL"]["mean"], results.sets["dolly"]["rougeL"]["std"])

# %% [markdown]
# ## Use the prompted teacher

# %%
teacher = promptkd.load_prompted_teacher(MODELS["teacher_model_path"], run.prompt)
inputs = teacher.tokenizer("### Instruction:\nList 2 words.\n\n### Response:\n", return_tensors="pt")
with torch.no_grad():
    answer = teacher.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
print(teacher.tokenizer.decode(answer[0]))
