#!/usr/bin/env python
"""Make a student from some of the teacher's layers: keep the first and the last ones, drop a run between them.

    python tools/prune_layers.py --model-path TEACHER --keep 20 --save STUDENT

The tokenizer is copied. The student needs some training before its answers make sense. Which layers matter least
differs between models. --drop selects other layers. Example: SmolLM2-135M, 30 layers, 16 examples of Dolly, before
training. Cross-entropy of the teacher: 2.9 nats per token. Without layers 9 to 18 (--keep 20): 5.2. Without 10 to 19:
6.4. Without 18 to 27: 16. Without every third layer: 11 to 14.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class PruneSettings:
    """The command's options."""

    model_path: str = option("", "teacher: a Hugging Face folder or hub name")
    keep: int = option(0, "number of layers to keep, at least 2. Layers in the middle are dropped")
    drop: list[int] | None = option(None, "layers to drop, numbered from 0, instead of --keep")
    save: str = option("", "output folder")

    def __post_init__(self) -> None:
        for name in ("model_path", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing: --help lists the options")
        if bool(self.keep) == bool(self.drop):
            raise UserError("the layers are not clear: give either --keep or --drop")
        if not self.drop:
            at_least(2, keep=self.keep)
        if (Path(self.save) / "config.json").exists():
            raise UserError(f"--save {self.save} already holds a model: name another folder, or remove the model")


def dropped_layers(layers: int, keep: int) -> list[int]:
    """Choose the layers to drop: a run that begins one layer before the middle of those that stay.

    Args:
        layers: The teacher's number of layers.
        keep: The student's number of layers.

    Raises:
        UserError: If the teacher has too few layers.
    """
    if keep >= layers:
        raise UserError(f"--keep {keep}: the model has {layers} layers: give a smaller number")
    first = max(keep // 2 - 1, 1)
    return list(range(first, first + layers - keep))


def prune(model: PreTrainedModel, dropped: list[int]) -> None:
    """Remove layers from a model and from its configuration, in place.

    Args:
        model: A causal language model.
        dropped: The layers to remove, numbered from 0.

    Raises:
        UserError: If the model has no such layers, or no single list of layers.
    """
    from torch.nn import ModuleList

    config, count = model.config, model.config.num_hidden_layers
    kept = [layer for layer in range(count) if layer not in dropped]
    if len(kept) + len(dropped) != count or not kept:
        raise UserError(f"--drop {dropped}: give different layers from 0 to {count - 1}, and leave at least one")
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise UserError(
            f"--model-path: the model has {len(stacks)} lists of {count} layers, not one: use another model"
        )
    parent, name, layers = stacks[0]
    setattr(parent, name, ModuleList(layers[layer] for layer in kept))
    for key, value in vars(config).items():  # such as layer_types of Qwen and Gemma
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


def main() -> None:
    """Run the command."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    settings = parse(
        {"options": PruneSettings}, sys.argv[1:], "prune_layers.py", dry_run=False, description=__doc__
    ).options
    import torch

    from promptkd.models.loading import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(settings.model_path)
    model = load_causal_lm(settings.model_path, torch.float32, "--model-path")
    before = model.num_parameters()
    prune(model, settings.drop or dropped_layers(model.config.num_hidden_layers, settings.keep))
    with atomic_files(Path(settings.save)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(
        f"{settings.save}: {model.config.num_hidden_layers} layers, {model.num_parameters():,} of {before:,} parameters"
    )


if __name__ == "__main__":
    exit_with(main)
