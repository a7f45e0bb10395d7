#!/usr/bin/env python
"""Make a student of a teacher's own layers: the first and the last are kept, of those between some are left out.

    python tools/prune_layers.py --model-path TEACHER --keep 20 --save STUDENT

The layers left out are spread evenly: 20 of 30 leaves out every third of the middle ones. The tokenizer comes along.
What is left needs some training before it makes sense of anything.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promptkd.data.processing import written_together
from promptkd.errors import UserError, exit_with
from promptkd.settings import at_least, option, parse


@dataclass
class PruneSettings:
    model_path: str = option("", "the model whose layers are taken: a Hugging Face folder or hub name")
    keep: int = option(0, "layers to keep, at least 2")
    save: str = option("", "folder to write to")

    def __post_init__(self) -> None:
        for name in ("model_path", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing: see --help")
        at_least(2, keep=self.keep)
        if (Path(self.save) / "config.json").exists():
            raise UserError(f"--save {self.save} holds a model already: name another folder, or remove it")


def kept_layers(layers: int, keep: int) -> list[int]:
    """Which of `layers` stay: all but layers - keep of the middle ones, evenly spread."""
    middle, lost = layers - 2, layers - keep
    left_out = {1 + int((place + 0.5) * middle / lost) for place in range(lost)}
    return [layer for layer in range(layers) if layer not in left_out]


def prune(model, keep: int):
    """The same model with `keep` of its layers, in place. Raises UserError when it has no more than that."""
    from torch.nn import ModuleList

    config, count = model.config, model.config.num_hidden_layers
    if keep >= count:
        raise UserError(f"--keep {keep}: the model has {count} layers: give a smaller number")
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise UserError(f"--model-path: {len(stacks)} lists of {count} layers were found in it, one is needed")
    (parent, name, layers), kept = stacks[0], kept_layers(count, keep)
    setattr(parent, name, ModuleList(layers[layer] for layer in kept))
    for key, value in vars(config).items():  # such as the kinds of Qwen's and Gemma's layers
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in kept])
    config.num_hidden_layers = keep
    return model


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    settings = parse({"options": PruneSettings}, sys.argv[1:], "prune_layers.py", dry_run=False).options
    import torch

    from promptkd.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(settings.model_path)
    model = load_causal_lm(settings.model_path, torch.float32, "--model-path")
    before = model.num_parameters()
    prune(model, settings.keep)
    with written_together(Path(settings.save)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{settings.save}: {settings.keep} layers, {model.num_parameters():,} of {before:,} parameters")


if __name__ == "__main__":
    exit_with(main)
