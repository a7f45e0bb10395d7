"""Write the model card of a run: what was trained on what, its losses and scores, and how to load it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from promptkd.errors import UserError
from promptkd.models.adapters import CONFIG, is_adapter
from promptkd.models.validation import looks_local
from promptkd.reporting.results import METHOD_LABELS, RESULTS, read_result
from promptkd.reporting.tables import score_table
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.strict_json import read_object
from promptkd.utils.tables import Table, evaluation_table

BEST = ("best_rougeL", "best_loss", "last")  # The best model of a run is in the first of these folders.
PICTURE = "curves.png"
MODEL, PROMPT = "model", "soft prompt"
KINDS = {"PROMPT_TUNING": PROMPT, "LORA": "LoRA adapter"}
SHOWN = (  # settings on a card
    "divergence", "teacher_kld_type", "base_kld_type", "student_kld_type", "base_coef", "kd_ratio", "prompt_len", "lr",
    "lr_decay_style", "batch_size", "gradient_accumulation_steps", "epochs", "total_iters", "max_length", "seed",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target", "student_quantization",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a run saved in one of its folders."""

    folder: Path
    run: Path
    settings: dict[str, Any]  # of the run
    kind: str  # MODEL or one of KINDS
    origin: str  # path or hub name of the model that training started from or, for an adapter or prompt, of its base


def find_trained(path: Path) -> Trained:
    """Read what a path names: the folder of a run, for its best model, or a folder in it.

    Raises:
        UserError: It is neither, or the run's record cannot be read.
    """
    is_run, remedy = (path / "metrics.jsonl").is_file(), "name what train.py --save wrote, or a folder in it"
    run = path if is_run else path.resolve().parent
    folders = [path / name for name in BEST] if is_run else [path]
    folder = next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)
    if folder is None or not (run / "metrics.jsonl").is_file():
        raise UserError(f"{path} holds no model of a run: {remedy}")
    settings = read_object(run / "config.json", remedy).get("settings")
    if not isinstance(settings, dict) or not {"method", "model_path", "teacher_model_path"} <= settings.keys():
        raise UserError(f"{run}/config.json lacks the run's settings: {remedy}")
    adapter = read_object(folder / CONFIG, remedy) if is_adapter(str(folder)) else None
    if adapter is None:
        return Trained(folder, run, settings, MODEL, str(settings["model_path"]))
    kind = KINDS.get(str(adapter.get("peft_type")), "adapter")
    # An adapter that continues another one has the base of that one, which --model-path does not name.
    base = adapter.get("base_model_name_or_path") or settings["teacher_model_path" if kind == PROMPT else "model_path"]
    return Trained(folder, run, settings, kind, str(base))


def model_card(trained: Trained, repo: str) -> str:
    """Return the card, with its metadata, for a hub repository."""
    settings, title, rows = trained.settings, repo.rpartition("/")[2], read_metrics(trained.run / "metrics.jsonl")
    base, method = public_name(trained.origin), METHOD_LABELS.get(settings["method"], settings["method"])
    source = str(settings.get("data_dir") or settings.get("prompt_data_dir"))
    data = source[4:].partition("@")[0] if source.startswith("hub:") else public_name(source)
    metadata = ModelCardData(
        library_name="transformers" if trained.kind == MODEL else "peft",
        pipeline_tag="text-generation",
        base_model=None if _is_local(trained.origin) else trained.origin,
        datasets=data if source.startswith("hub:") else None,
        tags=["knowledge-distillation", "promptkd", settings["method"]],
        license=_license(trained.origin),
    )
    shown = {"method": settings["method"], "student": public_name(settings["model_path"]), "data": data}
    shown |= {"teacher": settings["teacher_model_path"] and public_name(settings["teacher_model_path"])}
    shown |= {name: settings.get(name) for name in SHOWN}
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {title}",
        f"A {trained.kind}, trained with {method} by the [PromptKD](https://arxiv.org/abs/2402.12842) reference "
        f"implementation, from {base} on {data}. The licenses of {base} and of the data apply.",
        f"## How to load it\n\n{_loading_code(trained.kind, repo, base, _is_local(trained.origin))}",
        *_test_scores(trained),
        f"## Dev set during training\n\n{evaluation_table(rows).markdown()}",
        f"## Losses\n\n{_losses(rows).markdown()}",
        *([f"![curves of the run]({PICTURE})"] if (trained.run / PICTURE).is_file() else []),
        f"## Settings\n\n{_settings(shown).markdown()}",
    ]
    return "\n\n".join(parts) + "\n"


def public_name(path: str) -> str:
    """Return a hub name unchanged, and only the last part of a path, since a card may be public."""
    return Path(path).resolve().name if _is_local(path) else path


def _is_local(path: str) -> bool:
    return os.path.exists(path) or looks_local(path)


def _license(base: str) -> str | None:
    """Return the license that a folder's own card states. Of a name on the hub, it is not known here."""
    try:
        found = ModelCard.load(Path(base) / "README.md").data.to_dict().get("license") if Path(base).is_dir() else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _loading_code(kind: str, repo: str, base: str, is_local: bool) -> str:
    """Return Python code. It says where the base model is a folder, whose name the hub may have for another model."""
    model = repo if kind == MODEL else base
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'model = AutoModelForCausalLM.from_pretrained("{model}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{model}")',
    ]
    if kind != MODEL:
        note = [f'# "{base}" is a folder of the machine that trained this {kind}: put the path of that model here.']
        first, *further = lines
        lines = ["from peft import PeftModel", first, *(note if is_local else []), *further]
        lines.append(f'model = PeftModel.from_pretrained(model, "{repo}")')
    return "\n".join(["```python", *lines, "```"])


def _test_scores(trained: Trained) -> list[str]:
    """Return a section with the scores in the run's folder "eval" if evaluate.py measured this model."""
    if not (trained.run / "eval" / RESULTS).is_file():
        return []
    result = read_result(str(trained.run))
    if Path(result.evaluation["model"]["path"]).resolve() != trained.folder.resolve():
        return []
    return [f"## Test sets\n\n{score_table([result], []).markdown()}"]


def _losses(rows: list[dict[str, Any]]) -> Table:
    steps = [row for row in rows if row["event"] == "train"]
    table = Table(["loss", "first step", "last step"])
    for name in steps[-1] if steps else ():
        if name.endswith("loss"):
            table.add(name, *(f"{row[name]:.4f}" if name in row else "-" for row in (steps[0], steps[-1])))
    return table


def _settings(values: dict[str, Any]) -> Table:
    table = Table(["setting", "value"], texts=2)
    for name, value in values.items():
        if value is not None:
            table.add(name, str(value))
    return table
