"""Plan a run before it starts: memory of each rank by phase, whether it fits, and the options that make it fit.

    python tools/plan.py --script scripts/opt/promptkd/promptkd_1.3B.sh --gpus 4 --gpu a100
    python tools/plan.py --gpus 8 --gpu-memory 24GB --method promptkd --model-path gpt2-base \\
        --teacher-model-path gpt2-xlarge --batch-size 2
    python tools/plan.py --cpu --ranks 2 --gpu-memory 16GB --method promptkd --model-path DIR --teacher-model-path DIR

The plan reads only config.json and the DeepSpeed config. If a model's folder does not exist, its name is looked up in
configs/models. All other options are those of train.py. With --script, they override the options of the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from promptkd.cli import program_name
from promptkd.cli.train import resolve
from promptkd.config.option_file import as_arguments
from promptkd.config.values import whole_number
from promptkd.errors import UserError
from promptkd.planning.hardware import CPU_MEMORY, GPUS, Hardware, parse_bytes
from promptkd.planning.setting import PLANNED_METHODS, Setting, make_setting
from promptkd.planning.show import plan_of, text_of
from promptkd.utils.project import CONFIGS, project_root

DOLLY = 11435  # training examples of the paper's data


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def build_parser() -> Parser:
    """Return the parser of the plan's own options, which leaves those of train.py unread."""
    parser = Parser(
        prog=program_name("plan.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--script", type=Path, help="training script, such as scripts/<model>/<method>/*.sh")
    add("--gpus", "--ranks", type=whole_number, dest="ranks", help="total number of devices (default: 1)")
    add("--gpus-per-node", type=whole_number, help="number of devices of one machine (default: at most 8)")
    add("--cpu", action="store_true", help="run the ranks on a CPU")
    add("--gpu", choices=GPUS, help="model of the GPU, which sets --gpu-memory")
    add(
        "--gpu-memory",
        help="memory of one GPU, such as 24GB; with --cpu, memory of the machine (default with --cpu: 16GB)",
    )
    add(
        "--examples",
        type=whole_number,
        help=f"number of training examples (default: those in --data-dir, else {DOLLY})",
    )
    add("--json", action="store_true", help="print JSON, with sizes in bytes")
    return parser


def hardware_of(args: argparse.Namespace) -> Hardware:
    """Return the devices that the options describe."""
    ranks = 1 if args.ranks is None else args.ranks
    for name, value in (("gpus", ranks), ("gpus-per-node", args.gpus_per_node), ("examples", args.examples)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number above 0")
    if args.gpu_memory:
        memory = parse_bytes(args.gpu_memory, "--gpu-memory")
    elif args.cpu:
        memory = CPU_MEMORY
    elif args.gpu:
        memory = GPUS[args.gpu]
    else:
        raise UserError(f"--gpu-memory is missing: write --gpu-memory 24GB, or --gpu with one of {', '.join(GPUS)}")
    return Hardware(ranks, memory, args.gpus_per_node or min(ranks, 8), args.cpu)


def arguments_of(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """Return train.py's arguments, from the dry run of a script or from the command line."""
    if args.script is not None:
        return script_arguments(args.script, [*([str(args.ranks)] if args.ranks else []), *rest])
    return rest


def script_arguments(script: Path, arguments: list[str]) -> list[str]:
    """Return the options that a training script prints with --dry-run, as arguments."""
    if not script.is_file():
        raise UserError(f"--script {script}: no such file: name one of scripts/<model>/<method>/*.sh")
    command = ["bash", str(script), str(project_root()), "0", *arguments, "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NODE_RANK")}
    environment["PROMPTKD_PYTHON"] = sys.executable
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise UserError(f"--script {script}: {lines[-1]}")
    sys.stderr.write(done.stderr)
    try:
        return as_arguments(json.loads(done.stdout), f"--script {script}")
    except ValueError:
        raise UserError(f"--script {script}: --dry-run printed no settings: name a training script") from None


def count_examples(folder: str) -> int | None:
    """Count the examples of the training split, if the folder exists."""
    index = Path(folder) / "train_0.idx"
    if index.is_file():
        from promptkd.data.token_file import TokenFile

        return len(TokenFile(index.with_suffix("")))
    from promptkd.data.row_files import find_rows, is_folder, iterate_rows

    rows = find_rows(folder, "train") if folder and is_folder(folder) else None
    return None if rows is None else sum(1 for _ in iterate_rows(rows))


def make(argv: list[str]) -> tuple[Setting, bool]:
    """Return the setting that a command line describes, and whether it asks for JSON."""
    args, rest = build_parser().parse_known_args(argv)
    hardware = hardware_of(args)
    file = CONFIGS / "deepspeed" / ("ds_config_fp32.json" if hardware.cpu else "ds_config_bf16.json")
    default = ["--deepspeed-config", str(file)]  # what a run would use on a CPU, or on a GPU that has bf16
    config = resolve([*default, *arguments_of(args, rest)], hardware.device)
    examples = args.examples or count_examples(config.data.data_dir) or DOLLY
    return make_setting(config, hardware, examples), args.json


def main() -> None:
    """Print the plan."""
    setting, as_json = make(sys.argv[1:])
    if setting.method not in PLANNED_METHODS:
        assumed = "the student answers every prompt, and the method has no other models"
        print(
            f"note: --method {setting.method} is of another package: the plan assumes that {assumed}", file=sys.stderr
        )
    plan = plan_of(setting)
    print(json.dumps(plan, indent=1) if as_json else text_of(plan, setting.hardware.cpu))
