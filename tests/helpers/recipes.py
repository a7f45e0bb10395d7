"""The project's scripts and the published values of their options."""

from __future__ import annotations

import json

from helpers.training import ROOT

RECIPES = json.loads((ROOT / "tests/scripts/recipes.json").read_text())
# Of the methods that the paper's code does not have: the source of the settings, and their values.
FIELD_RECIPES = json.loads((ROOT / "tests/scripts/field_recipes.json").read_text())
ABLATION = "scripts/gpt2/ablations/ablation.sh"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*/*/*.sh"))
BASE = "scripts/gpt2/promptkd/promptkd_base.sh"  # 2 x 16 x 8 = 256 examples a step
OPT = "scripts/opt/promptkd/promptkd_1.3B.sh"  # 16 x 1 x 4 = 64
DOLLY = "scripts/gpt2/eval/eval_main_dolly.sh"
RUN_EVAL = "scripts/gpt2/eval/run_eval.sh"
