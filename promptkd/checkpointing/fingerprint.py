"""The fingerprint of a run: everything that its numbers depend on, compared when a run resumes."""

from __future__ import annotations

import json
import sys
from dataclasses import Field, dataclass
from typing import Any

from promptkd.config.removed import REMOVED_OPTIONS, describe_removal
from promptkd.errors import UserError

BATCH = ("batch_size", "gradient_accumulation_steps")
PARALLEL = ("model_parallel_size", "teacher_model_parallel_size")  # a checkpoint fits one of each
INPUTS = {"student": "model_path", "teacher": "teacher_model_path", "data": "data_dir", "corpus": "lm_data_dir"}
INPUTS |= {f"{name}_base": INPUTS[name] for name in ("student", "teacher")}  # base models of adapters


@dataclass(frozen=True)
class RunFingerprint:
    """Everything that a run's numbers depend on.

    Attributes:
        options: All options by name.
        deepspeed: Content of the DeepSpeed file.
        inputs: Name (see INPUTS) -> path and fingerprint of what is read.
        ranks: Number of data-parallel ranks.
    """

    options: dict[str, Any]
    deepspeed: dict[str, Any]
    inputs: dict[str, Any]
    ranks: int

    @classmethod
    def of(cls, *values: Any) -> RunFingerprint:
        """Create a fingerprint of values as JSON returns them."""
        return cls(*json.loads(json.dumps(values)))

    def differences(self, saved: dict[str, Any], declared: dict[str, Field]) -> list[str]:
        """Return the differences to a checkpoint's fingerprint, such as "--lr 0.1 (there: 0.2)".

        Args:
            saved: The checkpoint's fingerprint. An option that it lacks is newer than the checkpoint. It counts as
                its default, which computes what was computed before the option existed.
            declared: The run's options (`settings.declared_options`). Those that change no number may differ.
        """
        differences: list[str] = []
        free = {name for name, field in declared.items() if not field.metadata["numbers"]}
        if self.ranks != saved["ranks"]:
            free.update(BATCH)
            count, saved_count = _examples(self.options, self.ranks), _examples(saved["options"], saved["ranks"])
            if count != saved_count:
                differences.append(f"{count} examples a step, batch x accumulation x ranks (there: {saved_count})")
        for name, kept in REMOVED_OPTIONS.items():
            free.add(name)
            if saved["options"].get(name, kept) != kept:
                differences.append(describe_removal(name, saved["options"][name]))
        for name in sorted((self.options.keys() | saved["options"].keys()) - free):
            default = declared[name].default if name in declared else None
            now, then = self.options.get(name), saved["options"].get(name, default)
            if now != then:
                differences.append(f"{option_name(name)} {now} (there: {then})")
        if self.deepspeed != saved["deepspeed"]:
            differences.append("--deepspeed_config (other content)")
        for name in sorted(self.inputs.keys() | saved["inputs"].keys()):
            now, then = (_content(inputs.get(name)) for inputs in (self.inputs, saved["inputs"]))
            if now != then:
                differences.append(f"{option_name(INPUTS.get(name, name))} (other content)")
        return differences


def _examples(options: dict[str, Any], ranks: int) -> int:
    return options[BATCH[0]] * options[BATCH[1]] * ranks


def option_name(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")


def _content(entry: dict[str, Any] | None) -> Any:
    """Return what identifies an input: a folder's fingerprint, or the name on the hub."""
    if not entry or not entry["files"]:
        return entry and entry["path"]
    return entry["files"], entry["bytes"], entry["sha256_of_ends"]


def check_differences(differences: list[str], name: str, anyway: bool) -> None:
    """Raise UserError for settings that differ from a checkpoint's, or report them with --resume-anyway."""
    if differences and not anyway:
        raise UserError(
            f"--resume: the settings differ from those of {name}: {', '.join(differences)}: give the same settings, "
            "or pass --resume-anyway"
        )
    if differences:
        print(f"resuming {name} with other settings: {', '.join(differences)}", file=sys.stderr, flush=True)
