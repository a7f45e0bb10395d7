#!/usr/bin/env python
"""Make a student of a teacher's own layers: the first and the last are kept, a run of those between is left out.

    python tools/prune_layers.py --model-path TEACHER --keep 20 --save STUDENT

The tokenizer comes along. What is left needs some training before it makes sense of anything. Which layers are
missed least differs between models; --drop names others. SmolLM2-135M, 30 layers, on 16 rows of Dolly before any
training: 2.9 nats a token; without 9 to 18 (--keep 20) 5.2, 10 to 19 6.4, 18 to 27 16; every third 11 - 14.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files


@dataclass
class PruneSettings:
    model_path: str = option("", "the model whose layers are taken: a Hugging Face folder or hub name")
    keep: int = option(0, "layers to keep, at least 2; those left out are the ones before the middle")
    drop: list[int] | None = option(None, "layers to leave out instead, numbered from 0")
    save: str = option("", "folder to write to")

    def __post_init__(self) -> None:
        for name in ("model_path", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing: see --help")
        if bool(self.keep) == bool(self.drop):
            raise UserError("give either --keep or --drop")
        if not self.drop:
            at_least(2, keep=self.keep)
        if (Path(self.save) / "config.json").exists():
            raise UserError(f"--save {self.save} holds a model already: name another folder, or remove it")


def dropped_layers(layers: int, keep: int) -> list[int]:
    """Which of `layers` to leave out to keep `keep`: a run of them, one layer before the middle."""
    if keep >= layers:
        raise UserError(f"--keep {keep}: the model has {layers} layers: give a smaller number")
    first = max(keep // 2 - 1, 1)
    return list(range(first, first + layers - keep))


def prune(model, dropped: list[int]):
    """The same model without the layers `dropped`, in place. Raises UserError when it has no such layers."""
    from torch.nn import ModuleList

    config, count = model.config, model.config.num_hidden_layers
    kept = [layer for layer in range(count) if layer not in dropped]
    if len(kept) + len(dropped) != count or not kept:
        raise UserError(f"--drop: {dropped} are no different layers of 0 to {count - 1} that leave one over")
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise UserError(f"--model-path: {len(stacks)} lists of {count} layers were found in it, one is needed")
    parent, name, layers = stacks[0]
    setattr(parent, name, ModuleList(layers[layer] for layer in kept))
    for key, value in vars(config).items():  # such as the kinds of Qwen's and Gemma's layers
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    return model


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    settings = parse({"options": PruneSettings}, sys.argv[1:], "prune_layers.py", dry_run=False).options
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
