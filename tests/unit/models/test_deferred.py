"""Deferred loading: under ZeRO-3 no rank ever holds the complete teacher."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import Run
from helpers.tiny_models import make_model
from helpers.training import ROOT

from promptkd.config.deepspeed import read_deepspeed_config
from promptkd.distributed.ranks import setup
from promptkd.engine.engine import TrainEngine
from promptkd.engine.optim import OptimizerConfig
from promptkd.errors import UserError
from promptkd.models.loading import load_causal_lm
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.models.wrapper import LanguageModel

LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 10}  # 70 million parameters, 0.28 GB


def memory(name: str) -> int:
    """Return the resident memory of this process in bytes: VmRSS is the present, VmHWM the peak value."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    """Load and partition a model on each of two ranks, and write down the memory that this took."""
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    ranks = setup()
    config = read_deepspeed_config(str(ROOT / "configs/deepspeed/ds_config_zero3_fp32.json"), ranks.device)
    before = memory("VmRSS")
    model = load_causal_lm(str(folder), torch.float32, "--model-path", deferred=mode == "deferred").requires_grad_(
        False
    )
    prompted = LanguageModel(model, SoftPrompt(torch.zeros(2, model.config.hidden_size)))
    TrainEngine(prompted, OptimizerConfig(0.1, 1, "constant", 0.0, 0, 0.0, 1.0, (0.9, 0.999)), config, ranks)
    (folder / f"{mode}{ranks.dp_rank}.json").write_text(json.dumps(memory("VmHWM") - before))
    ranks.barrier()


@pytest.mark.slow
def test_load_deferred_never_holds_the_complete_model(tmp_path):
    """The peak lacks half of the model compared with loading the complete model. Everything else is the same."""
    model = make_model("llama", tmp_path / "model", **LARGE)
    size = 4 * sum(p.numel() for p in model.parameters())
    grown = {}
    for mode in ("deferred", "complete"):
        started = Run([str(tmp_path / "model"), mode], tmp_path / "log", 2, "test_deferred")
        assert started.wait() == [0, 0], (tmp_path / "log").read_text()
        grown[mode] = [json.loads((tmp_path / f"model/{mode}{rank}.json").read_text()) for rank in (0, 1)]
    assert max(grown["deferred"]) + 0.4 * size < min(grown["complete"]), (size, grown)


def test_load_deferred_checks_weights_when_they_are_read(tmp_path):
    model = make_model("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    lazy = load_causal_lm(str(tmp_path), torch.float32, "--teacher-model-path", deferred=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert lazy.get_parameter(name).is_meta and not lazy.get_output_embeddings().weight.is_meta
    same = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(lazy.unread(same), model.get_parameter(same).float())
    with pytest.raises(UserError, match=f"--teacher-model-path .*{name} holds numbers that are not finite"):
        lazy.unread(name)
