"""Write the model card of a run: what was trained on what, its losses and scores, and how to load it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from promptkd.data.row_files import HUB, is_hub
from promptkd.errors import UserError
from promptkd.models.adapters import CONFIG
from promptkd.models.validation import looks_local
from promptkd.reporting.document import Section, markdown_page
from promptkd.reporting.results import METHOD_LABELS, RESULTS, read_json, read_result
from promptkd.reporting.tables import score_table
from promptkd.training.run_folder import best_model
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.tables import evaluation_table, metrics_table

PICTURE = "curves.png"
LOCAL = "./"  # in front of the name of a local folder
MODEL, PROMPT = "model", "soft prompt"
KINDS = {"PROMPT_TUNING": PROMPT, "LORA": "LoRA adapter"}
SETTINGS = {"settings": {"method": str, "model_path": str, "teacher_model_path": (str, None)}}
SHOWN = ("kd_ratio", "prompt_len", "lora_r", "lr", "lr_decay_style", "batch_size", "epochs", "total_iters", "seed")


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
    run, folder = (path, best_model(path)) if is_run else (path.resolve().parent, path)
    if not (run / "metrics.jsonl").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(f"{path} holds no model of a run: {remedy}")
    settings = read_json(run / "config.json", SETTINGS, remedy)["settings"]
    adapter = read_json(folder / CONFIG, {}, remedy) if (folder / CONFIG).is_file() else {}
    kind = KINDS.get(str(adapter.get("peft_type")), MODEL)
    # An adapter that continues another one has the base of that one, which --model-path does not name.
    base = adapter.get("base_model_name_or_path") or settings["teacher_model_path" if kind == PROMPT else "model_path"]
    return Trained(folder, run, settings, kind, str(base))


def model_card(trained: Trained, repo: str) -> str:
    """Return the card, with its metadata, for a hub repository."""
    settings, rows = trained.settings, read_metrics(trained.run / "metrics.jsonl")
    base, method = public_name(trained.origin), settings["method"]
    models = [public_name(path) for path in (settings["model_path"], settings["teacher_model_path"]) if path]
    source = str(settings.get("data_dir") or settings.get("prompt_data_dir"))
    data = re.split("[:@]", source.removeprefix(HUB))[0] if is_hub(source) else public_name(source)
    metadata = ModelCardData(
        library_name="transformers" if trained.kind == MODEL else "peft",
        pipeline_tag="text-generation",
        base_model=None if base.startswith(LOCAL) else base,
        datasets=data if is_hub(source) else None,
        tags=["knowledge-distillation", "promptkd", method],
        license=_license(trained.origin),
    )
    summary = (
        f"A {trained.kind}, trained with {METHOD_LABELS.get(method, method)} on {data} by the reference "
        f"implementation of [PromptKD](https://arxiv.org/abs/2402.12842). Student: {', teacher: '.join(models)}. "
        f"The licenses of {base} and of the data apply."
    )
    steps = [row for row in rows if row["event"] == "train"]
    losses = [{name: row[name] for name in row if name == "step" or name.endswith("loss")} for row in steps]
    shown = [f"- `{name}`: {settings[name]}" for name in SHOWN if settings.get(name) is not None]
    sections = [
        Section("", [summary]),
        Section("How to load it", [_loading_code(trained, repo)]),
        Section("Test sets", _test_scores(trained)),
        Section("Dev set during training", [evaluation_table(rows)]),
        Section("Losses", [metrics_table(losses[:1] + losses[1:][-1:])]),
        Section("Curves", [f"![curves of the run]({PICTURE})"] if (trained.run / PICTURE).is_file() else []),
        Section("Settings", ["\n".join(shown)]),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n{markdown_page(repo.rpartition('/')[2], sections, picture='')}"


def public_name(path: str) -> str:
    """Return a hub name unchanged, and ./NAME for a path. That is no name on the hub, and does not say where it is."""
    is_local = os.path.exists(path) or looks_local(path)
    return f"{LOCAL}{Path(path).resolve().name}" if is_local else path


def _license(base: str) -> Any:
    """Return the license that a folder's own card states. Of a name on the hub, it is not known here."""
    try:
        return (metadata_load(Path(base) / "README.md") or {}).get("license")
    except (OSError, ValueError, YAMLError):
        return None


def _loading_code(trained: Trained, repo: str) -> str:
    """Return Python code. Where the base model is a folder, it says that its path has to be given."""
    base = public_name(trained.origin)
    name = repo if trained.kind == MODEL else base
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if trained.kind != MODEL:
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{repo}")']
        if base.startswith(LOCAL):
            note = f'# "{base}" is a folder of the machine that trained this {trained.kind}: put its path here.'
            lines.insert(2, note)
    return "\n".join(["```python", *lines, "```"])


def _test_scores(trained: Trained) -> list[Any]:
    """Return the table of the scores in the run's folder "eval" if evaluate.py measured this model."""
    if not (trained.run / "eval" / RESULTS).is_file():
        return []
    result = read_result(str(trained.run))
    is_of_this_model = Path(result.evaluation["model"]["path"]).resolve() == trained.folder.resolve()
    return [score_table([result], [])] if is_of_this_model else []
