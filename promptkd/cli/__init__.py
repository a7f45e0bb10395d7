"""Commands: `promptkd <command>`, and the scripts that run the same (train.py, evaluate.py, tools/*.py)."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from difflib import get_close_matches
from typing import NoReturn

from promptkd import __version__
from promptkd.config.values import check_arguments
from promptkd.errors import UserError, exit_with

COMMANDS = {
    "train": "distill a teacher into a student",
    "evaluate": "answer test sets and score the answers, or measure exposure bias",
    "generate": "let a model answer the training prompts, for SeqKD and DistiLLM-2",
    "data": "turn text into token files",
    "report": "compare trained and evaluated models",
    "judge": "compare the answers of two models by a judge",
    "plan": "compute the memory of a run before it starts",
    "convert": "convert a model from one tensor-parallel size to another",
    "download": "download the published checkpoints and data",
    "push": "push a trained model to the Hugging Face hub",
    "reproduce": "download, train, evaluate and compare the rows of the paper's table",
    "study": "run a declared study: tune methods alike, train several seeds, and compare",
}


def program_name(script: str) -> str:
    """Return the name by which help texts call the running program.

    Args:
        script: Name of the command's script, such as `train.py`.

    Returns:
        `promptkd <command>` under the dispatcher, `script` otherwise.
    """
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("promptkd ") else script


class CommandParser(argparse.ArgumentParser):
    """A parser for commands that have no option classes: it reports errors in one line with the nearest option.

    Args:
        script: Name of the command's script, such as `download.py`.
        description: Text above the options in `--help`, printed without wrapping.
    """

    def __init__(self, script: str, description: str | None) -> None:
        super().__init__(
            prog=program_name(script),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse the arguments after the program's name.

        Raises:
            UserError: If an option or a value is wrong.
        """
        check_arguments(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1, 0)[0]
            raise UserError(f"{unknown[0]} is not an option; the nearest is {near}, --help shows all")
        return args


def usage() -> str:
    """Return the help text of `promptkd --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: promptkd COMMAND [options]\n\n{commands}\n\n"
        "promptkd COMMAND --help lists the command's options; promptkd --version prints the version.\n"
        "Several GPUs: torchrun --nproc_per_node 8 -m promptkd COMMAND [options]"
    )


def dispatch() -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: The command is missing or unknown.
    """
    # The deepspeed launcher puts --local_rank before the command; the environment says the same.
    argv = [argument for argument in sys.argv[1:2] if not argument.startswith("--local_rank")] + sys.argv[2:]
    sys.argv[0] = "promptkd"
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"promptkd {__version__}")
    elif command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        problem = f"unknown command {command}" if command else "a command is missing"
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"{problem}: {remedy}")
    else:
        sys.argv = [f"promptkd {command}", *argv[1:]]
        # Imported late, so that help and version do not wait for torch.
        importlib.import_module(f"promptkd.cli.{command}").main()


def main() -> None:
    """Run `promptkd` with errors as one line and an exit status."""
    exit_with(dispatch)
