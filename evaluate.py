"""Answer test sets with a model and score the answers by ROUGE-L.

python evaluate.py --model-path M --data-dir data --seeds 10 20 30 40 50 --save R                   (all sets)
python evaluate.py --model-path M --data-dir data/dolly --data-names dolly --seed 10 --save R       (one set)
torchrun --nproc_per_node 8 evaluate.py ...                                                         (8 GPUs)
"""

from __future__ import annotations

import sys

from promptkd.errors import exit_with
from promptkd.evaluation.settings import AnswerSettings, EvaluationSettings, TestSetSettings
from promptkd.settings import ParallelSettings, parse


def read_settings(argv: list[str]):
    """Settings in groups: evaluation, data, decoding."""
    groups = {
        "evaluation": EvaluationSettings,
        "parallel": ParallelSettings,
        "data": TestSetSettings,
        "decoding": AnswerSettings,
    }
    return parse(groups, argv, prog="evaluate.py")


def main() -> None:
    settings = read_settings(sys.argv[1:])
    from promptkd.evaluation.run import run  # loads what a dry run does not need

    run(settings)


if __name__ == "__main__":
    exit_with(main)
