#!/usr/bin/env python
"""Turn a GGUF file into a Hugging Face folder with plain weights, tokenizer and chat template.

    python tools/convert_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --save checkpoints/smollm2

Any architecture that transformers reads from GGUF will do; the package gguf has to be there. What was quantised is
written as the float32 numbers that it stands for.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from promptkd.config.parser import parse
from promptkd.config.values import option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files


@dataclass
class GgufSettings:
    gguf: str = option("", "file to read")
    save: str = option("", "folder to write to")

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError("--save is missing: name a folder to write to")
        if not Path(self.gguf).is_file():
            raise UserError(f"--gguf {self.gguf}: no such file: correct the path")
        if not is_gguf(self.gguf):
            raise UserError(f"--gguf {self.gguf}: this is no GGUF file: get it anew")
        if (Path(self.save) / "config.json").exists():
            raise UserError(f"--save {self.save} holds a model already: name another folder, or remove it")


def is_gguf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read(gguf: Path):
    """(model, tokenizer) of a GGUF file; the model is of its plain class, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded = AutoModelForCausalLM.from_pretrained(**where)
    except ImportError:
        raise UserError("the package gguf is missing: pip install gguf") from None
    except Exception as error:  # whatever a broken file raises
        raise UserError(f"--gguf {gguf}: transformers cannot read it: {error}") from None
    # A model that came from GGUF counts as quantised and refuses to be saved: its numbers go into a fresh one.
    settings = loaded.config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "architectures", "dtype"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float()
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    settings = parse({"options": GgufSettings}, sys.argv[1:], "convert_gguf.py", dry_run=False).options
    model, tokenizer = read(Path(settings.gguf))
    with atomic_files(Path(settings.save)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{settings.save}: {model.config.model_type}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    exit_with(main)
