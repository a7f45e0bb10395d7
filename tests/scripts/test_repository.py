"""Files of the repository beside the code: what git ignores, and the DeepSpeed configs that evaluations read."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from importlib import metadata

import pytest
import torch
from helpers.training import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from promptkd.errors import UserError
from promptkd.evaluation.session import choose_dtype


def test_choose_dtype_auto_is_the_deepspeed_files_precision(tmp_path):
    configs, cpu = ROOT / "configs" / "deepspeed", torch.device("cpu")
    assert choose_dtype("auto", str(configs / "ds_config_bf16.json"), cpu) == "bf16"
    assert choose_dtype("fp32", str(configs / "ds_config.json"), cpu) == choose_dtype("auto", None, cpu) == "fp32"
    for config, message in ((configs / "ds_config.json", "fp16"), (tmp_path / "none.json", "none.json")):
        with pytest.raises(UserError, match=message):
            choose_dtype("auto", str(config), cpu)


def test_gitignore_covers_the_environment_as_folder_and_as_link(tmp_path):
    """install.sh advises to make .venv a link to a disk with more room."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to("elsewhere")
    assert subprocess.run(["git", "check-ignore", "-q", ".venv"], cwd=tmp_path).returncode == 0
    (tmp_path / ".venv").unlink()
    (tmp_path / ".venv").mkdir()
    assert subprocess.run(["git", "check-ignore", "-q", ".venv/"], cwd=tmp_path).returncode == 0


def test_install_keeps_the_environment_of_another_checkout(tmp_path):
    """A worktree may link to the environment of its main checkout."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in ("install.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / file, tmp_path / name)
    venv = tmp_path / "first/.venv"
    venv.mkdir()
    (venv / "install.log").touch()
    (venv / "install.extras").write_text(f"dev\n{tmp_path / 'first'}\n")
    (tmp_path / "second/.venv").symlink_to(venv)
    done = subprocess.run(["bash", tmp_path / "second/install.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and f"the environment of {tmp_path / 'first'}: delete the link" in done.stderr
    assert {path.name for path in venv.iterdir()} == {"install.log", "install.extras"}


@pytest.mark.parametrize("script", ["scripts/demo.sh", "scripts/smollm2/run.sh"])
def test_help_of_an_experiment_starts_nothing(script, tmp_path):
    shutil.copy(ROOT / script, tmp_path)
    path = tmp_path / script.rpartition("/")[2]
    done = subprocess.run(["bash", path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"bash {script} [" in done.stdout and not done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_constraints_pin_all_dependencies_and_what_they_pull_in():
    """Of this environment: what is not installed here pulls in nothing."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(re.split("[=;]", line)[0]) for line in lines if "==" in line}
    found = set[tuple[str, str]]()
    left = [("promptkd", extra) for extra in ("", "dev", "bnb", "data", "lora", "trackers")]
    while left:
        name, extra = left.pop()
        found.add((name, extra))
        with contextlib.suppress(metadata.PackageNotFoundError):
            for requirement in map(Requirement, metadata.requires(name) or ()):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    names = ((canonicalize_name(requirement.name), each) for each in ("", *requirement.extras))
                    left += [each for each in names if each not in found]
    names = {name for name, _ in found if not name.startswith(("promptkd", "nvidia-", "cuda-", "triton"))}
    assert len(names) > 50 and names <= pinned, names - pinned
