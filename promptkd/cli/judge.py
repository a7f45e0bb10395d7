"""Compare the answers of two result folders by a judge behind an OpenAI-compatible server.

    python tools/judge.py results/promptkd results/sft --base-url http://localhost:8000/v1 --model JUDGE

The two folders are the --save folders of train.py or of evaluate.py, as for report.py. Each pair of answers is judged
in both orders. OPENAI_API_KEY in the environment is sent as the key, if it is set. The same command continues an
interrupted comparison.
"""

from __future__ import annotations

import sys

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.errors import UserError
from promptkd.reporting.judge_server import JudgeSettings


def main() -> None:
    """Judge all pairs and print the table."""
    folders = [argument for argument in sys.argv[1:3] if not argument.startswith("-")]
    if len(folders) != 2 and not {"-h", "--help"} & set(sys.argv):  # The parser does not know the folders.
        raise UserError("two result folders come first: judge.py FOLDER FOLDER [options]; --help lists the options")
    prog, argv = f"{program_name('judge.py')} FOLDER FOLDER", sys.argv[1 + len(folders) :]
    settings = parse({"options": JudgeSettings}, argv, prog, dry_run=False, description=__doc__).options
    # Imported here because --help needs no model libraries.
    from promptkd.reporting.judge import judge
    from promptkd.reporting.results import check_comparable, read_result

    results = [read_result(folder) for folder in folders]
    check_comparable(results, settings.mixed)
    print(judge(results, settings))
    print(f"written to {settings.save}/judge.md, judge.json and judgments.jsonl")
