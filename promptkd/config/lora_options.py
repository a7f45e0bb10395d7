"""Options of a student that is trained through LoRA adapters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from promptkd.config.values import at_least, option
from promptkd.errors import UserError


@dataclass
class LoraSettings:
    """LoRA (Hu et al., 2022), and QLoRA (Dettmers et al., 2023) with --student-quantization."""

    lora_r: int = option(0, "rank of the student's LoRA adapters, which are then all that is trained. 0: no adapters")
    lora_alpha: float | None = option(
        None, "the adapters' output is multiplied by --lora-alpha / --lora-r (default: twice --lora-r)"
    )
    lora_dropout: float = option(0.0, "dropout rate of the adapters' input")
    lora_target: list[str] | None = option(
        None, "names of the layers that get adapters, such as q_proj v_proj (default: all linear layers but the head)"
    )
    student_quantization: Literal["none", "8bit", "4bit"] = option(
        "none", "quantize the student's frozen weights with bitsandbytes (QLoRA)"
    )
    merge: bool = option(False, "save complete models with merged adapters instead of adapters", numbers=False)

    def __post_init__(self) -> None:
        at_least(0, lora_r=self.lora_r)
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        if given and not self.lora_r:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{flag} is for LoRA adapters: add --lora-r, or leave {flag} out")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise UserError(f"--lora-alpha {self.lora_alpha:g} is not positive: the default is twice --lora-r")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout {self.lora_dropout:g} is not a rate from 0 to below 1")
        if self.merge and self.student_quantization != "none":
            raise UserError(
                f"--merge does not go with --student-quantization {self.student_quantization}: leave --merge out, and "
                "merge the saved adapter into the unquantized model with PEFT"
            )
