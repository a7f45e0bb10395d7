"""Run the project's scripts as forks of a process that has imported everything, so that a start takes no seconds.

A forked script still is a process of its own: it has its own arguments, environment, output and exit status, and its
`__main__` block runs. Scripts that shell scripts start get `client`, a stand-in for the interpreter that hands its
command to `serve`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRELOAD = [
    "train",
    "evaluate",
    "promptkd.training.setup",
    "deepspeed",
    "transformers.models.gpt2.modeling_gpt2",
    "matplotlib.figure",
]
if os.environ.get("PROMPTKD_TEST_DEVICE") == "cuda":
    PRELOAD = []  # some of these libraries count the GPUs, after which a fork cannot use them
CLIENT = """#!{python} -IS
import json, os, socket, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    command = dict(argv=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), pid=os.getpid())
    server.sendall(json.dumps(command).encode() + b"\\n")
    status = int(server.makefile().readline())
sys.exit(status if status >= 0 else 128 - status)
"""


def _run(argv: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    for target, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    # The objects remember what the descriptors were before, such as whether one can seek in them.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).resolve().parent)]
    runpy.run_path(argv[0], run_name="__main__")


def fork_script(
    argv: list[str], environment: dict[str, str], folder: str, output: str, errors: str
) -> multiprocessing.Process:
    """Start `python argv...` as a fork; `output` and `errors` are the files that its streams are appended to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(argv, environment, folder, output, errors))
    process.start()
    return process


@contextmanager
def serve(folder: Path) -> Iterator[Path]:
    """Yield a stand-in for the Python interpreter that runs script files as forks, and anything else as usual."""
    client, address = folder / "python", str(folder / "socket")
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        threading.Thread(target=_answer, args=(listener,), daemon=True).start()
        try:
            yield client
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # The listener is closed.
        with connection:
            command = json.loads(connection.makefile().readline())
            streams = (f"/proc/{command['pid']}/fd/{descriptor}" for descriptor in (1, 2))
            process = fork_script(command["argv"], command["environment"], command["folder"], *streams)
            process.join()
            connection.sendall(f"{process.exitcode}\n".encode())
