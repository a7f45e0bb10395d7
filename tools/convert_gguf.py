#!/usr/bin/env python
"""Convert a GGUF file to a Hugging Face folder with unquantized weights, tokenizer and chat template.

    python tools/convert_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --save checkpoints/smollm2

All architectures that transformers reads from GGUF are supported. The package gguf must be installed. Quantized weights
are written as the float32 numbers that they stand for.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from promptkd.config.parser import parse
from promptkd.config.values import option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class GgufSettings:
    """The command's options."""

    gguf: str = option("", "GGUF file to read")
    save: str = option("", "output folder")

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError("--save is missing: name a folder to write into")
        if not Path(self.gguf).is_file():
            raise UserError(f"--gguf {self.gguf}: no such file: correct the path")
        if not is_gguf(self.gguf):
            raise UserError(f"--gguf {self.gguf}: this is not a GGUF file: download it again")
        if (Path(self.save) / "config.json").exists():
            raise UserError(f"--save {self.save} already holds a model: name another folder, or remove the model")


def is_gguf(path: str) -> bool:
    """Whether a file begins like a GGUF file."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file.

    Returns:
        The model, in float32, and its tokenizer.

    Raises:
        UserError: If the package gguf is missing or transformers cannot read the file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source)
    except ImportError:
        raise UserError("the package gguf is missing: run pip install gguf") from None
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"--gguf {gguf}: transformers cannot read it ({error}): use another file") from None
    # transformers treats a model from GGUF as quantized and refuses to save it. A new model takes its weights.
    settings = loaded.config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "architectures", "dtype"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float()
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def main() -> None:
    """Run the command."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    settings = parse(
        {"options": GgufSettings}, sys.argv[1:], "convert_gguf.py", dry_run=False, description=__doc__
    ).options
    model, tokenizer = read(Path(settings.gguf))
    with atomic_files(Path(settings.save)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{settings.save}: {model.config.model_type}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    exit_with(main)
