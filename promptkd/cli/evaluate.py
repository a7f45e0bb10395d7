"""Answer test sets with a model and score the answers by ROUGE-L, or measure its exposure bias against a teacher.

python evaluate.py --model-path M --data-dir data --seeds 10 20 30 40 50 --save R                   (all sets)
python evaluate.py --model-path M --data-dir data/dolly --data-names dolly --seed 10 --save R       (one set)
python evaluate.py --answers R --metrics distinct self_bleu                      (stored answers, without a model)
python evaluate.py --type exposure_bias --model-path S --teacher-model-path T --data-names dolly --save R
torchrun --nproc_per_node 8 evaluate.py ...                                                         (8 GPUs)
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

from promptkd.cli import program_name
from promptkd.config.options import DeviceSettings, ParallelSettings
from promptkd.config.parser import flat, parse
from promptkd.errors import UserError
from promptkd.evaluation.options import AnswerSettings, EvaluationSettings, ExposureBiasSettings, TestSetSettings


def read_settings(argv: list[str]) -> SimpleNamespace:
    """Return the settings in groups: evaluation, device, parallel, data, decoding, exposure_bias."""
    groups = {
        "evaluation": EvaluationSettings,
        "device": DeviceSettings,
        "parallel": ParallelSettings,
        "data": TestSetSettings,
        "decoding": AnswerSettings,
        "exposure_bias": ExposureBiasSettings,
    }
    settings = parse(groups, argv, prog=program_name("evaluate.py"), description=__doc__)
    evaluation = settings.evaluation
    if evaluation.type != "exposure_bias":
        of_kl = ("teacher_model_path", "teacher_prompt")
        if foreign := settings.exposure_bias.given(allowed=of_kl if "kl" in evaluation.metrics else ()):
            other = " or --metrics kl" if foreign.startswith("--teacher") else ""
            raise UserError(f"{foreign} is for --type exposure_bias{other}: leave it out, or pass that option")
    if evaluation.answers is not None:
        argv = ["--answers", evaluation.answers, "--metrics", *evaluation.metrics]
        _check_unchanged(settings, parse(groups, argv, prog=program_name("evaluate.py"), description=__doc__))
    return settings


def _check_unchanged(settings: SimpleNamespace, plain: SimpleNamespace) -> None:
    """Refuse options that change nothing where stored answers are scored."""
    defaults = flat(vars(plain))
    for name, value in flat(vars(settings)).items():
        if value != defaults[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(f"--answers scores answers that are stored, where {option} has no effect: leave it out")


def run_evaluation(settings: SimpleNamespace) -> None:
    """Run the kind of evaluation that the settings ask for."""
    # Imported here because --help and a dry run need no model libraries.
    if settings.evaluation.answers is not None:
        from promptkd.reporting.rescore import run
    elif settings.evaluation.type == "exposure_bias":
        from promptkd.evaluation.exposure_bias import run
    else:
        from promptkd.evaluation.evaluate import run
    run(settings)


def main() -> None:
    """Run the command."""
    run_evaluation(read_settings(sys.argv[1:]))
