"""The package: what the wheel contains, and the command line's entry points."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.training import ROOT

import promptkd
from promptkd import cli
from promptkd.errors import exit_with

SCRIPTS = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "generate": "tools/generate.py",
    "data": "tools/process_data.py",
    "report": "tools/report.py",
    "judge": "tools/judge.py",
    "plan": "tools/plan.py",
    "convert": "tools/convert_mp.py",
    "download": "tools/download.py",
    "push": "tools/push.py",
    "reproduce": "tools/reproduce.py",
    "study": "tools/study.py",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names of the files in the wheel that setuptools builds from the package's folders."""
    build = tmp_path_factory.mktemp("wheel")
    source = build / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "promptkd", "minillm_baselines"):
        (source / name).symlink_to(ROOT / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(build)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(build.glob("*.whl"))).namelist()


def test_wheel_contains_configs_and_type_marker(wheel_names):
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "promptkd/configs").rglob("*") if path.is_file()}
    assert configs <= set(wheel_names)
    assert {"promptkd/py.typed", "minillm_baselines/py.typed"} <= set(wheel_names)


def test_wheel_contains_only_the_two_packages(wheel_names):
    folders = {Path(name).parts[0] for name in wheel_names}
    assert folders == {"promptkd", "minillm_baselines", f"promptkd-{promptkd.__version__}.dist-info"}


def test_commands_match_modules_and_scripts():
    modules = {path.stem for path in (ROOT / "promptkd/cli").glob("*.py")} - {"__init__"}
    assert modules == set(cli.COMMANDS) == set(SCRIPTS)
    for command, script in SCRIPTS.items():
        assert callable(importlib.import_module(f"promptkd.cli.{command}").main)
        assert f"from promptkd.cli.{command} import main" in (ROOT / script).read_text()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_command_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["promptkd", command, "--help"])
    try:
        cli.dispatch()
    except SystemExit as error:
        assert error.code == 0
    assert "--" in capsys.readouterr().out


def test_help_and_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["promptkd", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"promptkd {promptkd.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["promptkd", "--help"])
    cli.main()
    help_text = capsys.readouterr().out
    assert all(command in help_text for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "promptkd: error: a command is missing: choose one of train, "),
        (["trian"], "promptkd: error: unknown command trian: did you mean train?"),
        (["train"], "promptkd train: error: --method is missing"),
        (["--local_rank=0", "train"], "promptkd train: error: --method is missing"),
    ],
)
def test_bad_command_is_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["promptkd", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(line) and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("download --list", 141), ("--help", 141), ("download --help", 0)],  # argparse ignores a closed pipe
)
def test_closed_output_ends_without_a_message(arguments, status):
    """The reader leaves before anything is written, so that every kind of output meets the closed pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "promptkd", *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, "")


def test_closed_output_does_not_hide_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from promptkd import errors; errors.exit_with(lambda: [][0])"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(writer)
    assert done.returncode == 1 and "IndexError" in done.stderr


def test_broken_connection_is_not_taken_for_a_closed_output(capfd):
    def send():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        exit_with(send)


def test_help_does_not_import_torch():
    code = "import sys, promptkd.cli as cli; sys.argv = ['x', '--help']; cli.main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_import_of_the_package_is_light_and_lists_its_functions():
    code = "import sys, promptkd; assert not {'torch', 'numpy', 'transformers', 'tqdm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(callable(getattr(promptkd, name)) for name in promptkd.__all__) and not hasattr(promptkd, "trian")


def test_product_code_does_not_patch_the_import_path():
    files = [
        path
        for name in ("promptkd", "minillm_baselines", "tools", "benchmarks")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert not [path for path in [*files, ROOT / "train.py", ROOT / "evaluate.py"] if "sys.path" in path.read_text()]
