"""Run the project's commands in processes that are forked from one that has imported the libraries.

Importing takes as much CPU time as hundreds of steps of a small model.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from promptkd.utils.machine import exit_with_parent
from promptkd.utils.project import project_root

PRELOADED = [
    "promptkd.training.setup",
    "promptkd.evaluation.evaluate",
    "promptkd.methods.registry",
    "minillm_baselines.distillm",
]
CONTEXT = multiprocessing.get_context("forkserver")


class Job:
    """A running command.

    Args:
        name: Name of its stage.
        command: A script or `-m` and a module, and its arguments.
        log: The file that its output is appended to.
    """

    def __init__(self, name: str, command: tuple[str, ...], log: Path) -> None:
        CONTEXT.set_forkserver_preload(["promptkd.study.fork_server", *PRELOADED])
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._seconds, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (list(command), str(log), str(project_root()), theirs)
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        theirs.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time of an ended command and its workers, 0 if it was killed."""
        try:
            return float(self._seconds.recv()) if self._seconds.poll() else 0.0
        except EOFError:
            return 0.0


def _run(command: list[str], log: str, folder: str, seconds: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the fork server ignores
    exit_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(folder)
    print(f"== {' '.join(command)}", file=sys.stderr, flush=True)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*command]
            runpy.run_path(command[0], run_name="__main__")
    finally:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds.send(sum(each.ru_utime + each.ru_stime for each in usage))
