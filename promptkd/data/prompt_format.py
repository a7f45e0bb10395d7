"""How prompts were made, recorded with a model that was trained on them: evaluation has to make them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promptkd.data.encoding import TextEncoder
from promptkd.utils.strict_json import read_object

RECORD = "promptkd.json"  # in a saved model's folder


@dataclass(frozen=True)
class PromptFormat:
    """How prompts were made, which has to be the same in training and in evaluation.

    Attributes:
        template: "published" or "chat". Ready prompts count by what they look like.
        special_tokens: The rule for special tokens in front, see promptkd.data.encoding.
    """

    template: str = "published"
    special_tokens: str = "own"

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def read_format(model_path: str | None) -> PromptFormat | None:
    """Return what a model was trained on; None for a model that this project did not save."""
    path = Path(model_path or "") / RECORD
    if not model_path or not path.is_file():
        return None
    record = read_object(path, "name a model's folder as it was saved")
    names = [name.name for name in dataclasses.fields(PromptFormat)]
    return PromptFormat(**{name: record[name] for name in names if isinstance(record.get(name), str)})


def choose_rule(special_tokens: str, *model_paths: str | None) -> str:
    """Return the rule for special tokens: the option's, or for "auto" the first model's record, or "own"."""
    if special_tokens != "auto":
        return special_tokens
    records = (read_format(path) for path in model_paths)
    return next((record.special_tokens for record in records if record is not None), "own")


def template_of_prompts(template: str, encoder: TextEncoder, marked: Sequence[str]) -> str:
    """Return the template that made prompts: the option's, or of ready prompts the one they look like."""
    ready = bool(marked) and all(encoder.is_chat(encoder.text(prompt)) for prompt in marked[:64])
    return "chat" if template == "chat" or ready else template


def mismatch(now: PromptFormat, model_path: str | None, option: str) -> str:
    """Return one line where a model was trained on prompts that were made in another way, else ""."""
    then = read_format(model_path)
    if then is None or then == now:
        return ""
    pairs = zip(then.as_dict().items(), now.as_dict().values())
    found = [(f"--{name.replace('_', '-')}", was, is_) for (name, was), is_ in pairs if was != is_]
    said = ", ".join(f"{name} {was} and not {is_}" for name, was, is_ in found)
    return f"{option} {model_path} was trained on prompts of {said}: answers suffer where prompts differ ({RECORD})"
