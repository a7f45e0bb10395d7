"""What decides a run's numbers, and how a checkpoint's differs from the present run's."""

from __future__ import annotations

import json
import sys
from dataclasses import Field, dataclass
from typing import Any

from promptkd.config.removed import REMOVED_OPTIONS, describe_removal
from promptkd.errors import UserError

BATCH = ("batch_size", "gradient_accumulation_steps")
PARALLEL = ("model_parallel_size", "teacher_model_parallel_size")  # what no checkpoint can change
INPUTS = {"student": "model_path", "teacher": "teacher_model_path", "data": "data_dir", "corpus": "lm_data_dir"}


@dataclass(frozen=True)
class RunFingerprint:
    """What decides a run's numbers: all options, the DeepSpeed file's content, fingerprints of what is read."""

    options: dict[str, Any]
    deepspeed: dict[str, Any]
    inputs: dict[str, Any]  # see INPUTS; each {"path", "files", "bytes", "sha256_of_ends"}
    ranks: int

    @classmethod
    def of(cls, *values: Any) -> RunFingerprint:
        """From any values, as they read after a way through JSON."""
        return cls(*json.loads(json.dumps(values)))

    def differences(self, saved: dict[str, Any], declared: dict[str, Field]) -> list[str]:
        """Return what a checkpoint's identity has otherwise: "--lr 0.1 (there: 0.2)".

        Args:
            saved: The checkpoint's identity. An option that it lacks is newer than the checkpoint and counts as its
                default, under which a run computes what it computed before there was the option.
            declared: The run's options (`settings.declared_options`). Those that change no number may differ.
        """
        found, free = [], {name for name, field in declared.items() if not field.metadata["numbers"]}
        if self.ranks != saved["ranks"]:
            free.update(BATCH)
            now, then = _examples(self.options, self.ranks), _examples(saved["options"], saved["ranks"])
            if now != then:
                found.append(f"{now} examples a step, batch x accumulation x ranks (there: {then})")
        for name, kept in REMOVED_OPTIONS.items():
            free.add(name)
            if saved["options"].get(name, kept) != kept:
                found.append(describe_removal(name, saved["options"][name]))
        for name in sorted((self.options.keys() | saved["options"].keys()) - free):
            default = declared[name].default if name in declared else None
            now, then = self.options.get(name), saved["options"].get(name, default)
            if now != then:
                found.append(f"{_option(name)} {now} (there: {then})")
        if self.deepspeed != saved["deepspeed"]:
            found.append("--deepspeed_config (other content)")
        for name in sorted(self.inputs.keys() | saved["inputs"].keys()):
            now, then = (_content(inputs.get(name)) for inputs in (self.inputs, saved["inputs"]))
            if now != then:
                found.append(f"{_option(INPUTS.get(name, name))} (other content)")
        return found


def _examples(options: dict[str, Any], ranks: int) -> int:
    return options[BATCH[0]] * options[BATCH[1]] * ranks


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _content(entry: dict[str, Any] | None) -> Any:
    """A folder's content; for a hub's name, the name."""
    if not entry or not entry["files"]:
        return entry and entry["path"]
    return entry["files"], entry["bytes"], entry["sha256_of_ends"]


def _check_identity(found: list[str], name: str, anyway: bool) -> None:
    if found and not anyway:
        raise UserError(f"--resume: other settings than {name} was made with: {', '.join(found)} (--resume-anyway)")
    if found:
        print(f"resuming {name} with other settings: {', '.join(found)}", file=sys.stderr, flush=True)
