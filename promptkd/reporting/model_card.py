"""Write the model card of a run: what was trained on what, its losses and scores, and how to load it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from promptkd.data.row_files import HUB, is_hub
from promptkd.errors import UserError
from promptkd.models.adapters import CONFIG
from promptkd.models.validation import looks_local
from promptkd.reporting.results import METHOD_LABELS, RESULTS, read_json, read_result
from promptkd.reporting.tables import score_table
from promptkd.training.run_folder import best_model
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.project import CONFIGS
from promptkd.utils.tables import Table, evaluation_table, metrics_table

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
    losses = [{name: row[name] for name in row if name == "step" or name.endswith("loss")} for row in rows]
    steps = [loss for loss, row in zip(losses, rows) if row["event"] == "train"]
    card = ModelCard.from_template(
        metadata,
        str(CONFIGS / "model_card.md"),
        repo=repo,
        kind=trained.kind,
        label=METHOD_LABELS.get(method, method),
        data=data,
        models=[public_name(path) for path in (settings["model_path"], settings["teacher_model_path"]) if path],
        base=base,
        loaded=repo if trained.kind == MODEL else base,
        scores=_test_scores(trained),
        evaluations=evaluation_table(rows),
        losses=metrics_table(steps[:1] + steps[1:][-1:]),
        picture=PICTURE if (trained.run / PICTURE).is_file() else "",
        settings={name: settings[name] for name in SHOWN if settings.get(name) is not None},
    )
    return str(card.content)


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


def _test_scores(trained: Trained) -> Table | None:
    """Return the table of the scores in the run's folder "eval" if evaluate.py measured this model."""
    if not (trained.run / "eval" / RESULTS).is_file():
        return None
    result = read_result(str(trained.run))
    is_of_this_model = Path(result.evaluation["model"]["path"]).resolve() == trained.folder.resolve()
    return score_table([result], []) if is_of_this_model else None
