"""scripts/: each of the published ones has its counterpart, with the published values, and starts what it should.

tests/scripts/recipes.json holds the values of the published scripts (gmkim-ai/PromptKD at 383182f), and
tests/scripts/field_recipes.json those of other methods, with their sources.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.recipes import ABLATION, BASE, DOLLY, FIELD_RECIPES, OPT, RECIPES, RUN_EVAL, SCRIPTS
from helpers.runs import run_script
from helpers.training import ROOT

import evaluate
import train
from promptkd.cli import generate
from promptkd.config.parser import flat
from promptkd.config.resolve import RunOptions


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Run a script with a stand-in for Python: the arguments it would get, and what the launcher says on stderr."""
    stub = tmp_path_factory.mktemp("stub") / "python"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)

    def run(script: str, *arguments: str, **how) -> tuple[list[str], str]:
        done = run_script(script, *arguments, PROMPTKD_PYTHON=str(stub), **how)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def settings_of(argv: list[str]) -> dict:
    """All settings that the entry point's own parser makes of what a launcher started."""
    entry = next(place for place, word in enumerate(argv) if word.endswith(".py"))
    options = [word for word in argv[entry + 1 :] if word != "--dry-run"]
    module = {"train.py": train, "evaluate.py": evaluate, "generate.py": generate}[Path(argv[entry]).name]
    settings = module.read_settings(options)
    if isinstance(settings, RunOptions):
        return settings.as_dict()
    groups = vars(settings)
    named = {key: value for key, value in groups.items() if isinstance(value, str)}
    return {**named, **flat({key: value for key, value in groups.items() if key not in named})}


def options_after_entry(argv: list[str]) -> dict[str, str]:
    return {name: value for name, value in zip(argv, [*argv[1:], ""]) if name.startswith("--")}


def test_every_published_script_is_there():
    assert len(RECIPES) == 56 and set(RECIPES) <= set(SCRIPTS)


@pytest.mark.parametrize("script", RECIPES)
def test_values_are_the_published_ones(script, started):
    argv, said = started(script, "--dry-run")
    assert said == "" and "torch.distributed.run" not in argv
    settings = settings_of(argv)
    assert {name: settings.get(name, "no such setting") for name in RECIPES[script]} == RECIPES[script]


@pytest.mark.parametrize("script", FIELD_RECIPES)
def test_field_recipe_has_its_settings_and_names_its_source(script, started):
    recipe = FIELD_RECIPES[script]
    argv, said = started(script, "--dry-run")
    settings = settings_of(argv)
    assert said == "" and {name: settings.get(name) for name in recipe["settings"]} == recipe["settings"]
    text = (ROOT / script).read_text()
    assert "published_gpus=4\n" in text and settings["batch_size"] * settings["gradient_accumulation_steps"] == 8
    assert re.search(r"^# Settings: .*\n(# .*\n)*source", text, re.MULTILINE)
    assert settings_of(started(script, "--dry-run", "--lr", "0.25", "--epochs", "3")[0])["lr"] == 0.25


def test_every_field_script_has_a_recipe():
    folders = ("gkd", "imitkd", "distillm", "distillm2", "abkd")
    assert set(FIELD_RECIPES) == {script for script in SCRIPTS if script.split("/")[2] in folders}


ABLATIONS = {
    **{f"length_{length}": {"prompt_len": length} for length in (1, 3, 7, 20, 50)},
    "init_random": {"prompt_init_text": "random"},
    "init_pad": {"prompt_init_text": "PAD"},
    "init_text": {"prompt_init_text": "Suppose you are a student."},
    **{f"{term}_forward": {f"{term}_kld_type": "forward"} for term in ("teacher", "base", "student")},
    "all_forward": {f"{term}_kld_type": "forward" for term in ("teacher", "base", "student")},
    "all_reverse": {f"{term}_kld_type": "reverse" for term in ("teacher", "base", "student")},
    "no_base": {"base_coef": 0.0},
    "frozen_prompt": {"teacher_lr": 0.0},
    "no_prompt": {"prompt_len": 0},
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation_is_the_recipe_with_one_change(ablation, started):
    recipe, settings = (settings_of(started(*command, "--dry-run")[0]) for command in ([BASE], [ABLATION, ablation]))
    changed = {"save": f"results/gpt2/train/ablations/{ablation}", **ABLATIONS[ablation]}
    assert settings == {**recipe, **changed}
    assert ablation in (ROOT / ABLATION).read_text().replace(", _", ", length_").split("ablation=$")[0]


@pytest.mark.parametrize("arguments", [[], ["length_8"], ["--dry-run"]])
def test_ablation_unknown_name_is_one_line(arguments):
    done = run_script(ABLATION, *arguments)
    assert done.returncode == 2 and done.stdout == "" and "choose one" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_sound(script):
    path = ROOT / script
    assert subprocess.run(["bash", "-n", path]).returncode == 0 and os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert 10 <= len(lines) <= 25 and max(map(len, lines)) <= 120 and script in path.read_text()


def test_minillm_init_is_the_sft_recipe_in_another_folder(started):
    for script in [s for s in SCRIPTS if "/minillm_init/" in s]:
        ours, sft = (settings_of(started(s, "--dry-run")[0]) for s in (script, script.replace("minillm_init", "sft")))
        assert ours.pop("save") == sft.pop("save").replace("/sft/", "/minillm_init/")
        assert {**ours, "eval_gen": True} == sft


def test_options_at_the_end_win(started):
    argv, _ = started(BASE, "--dry-run", "--lr", "0.1", "--model_path=elsewhere", "--batch-size", "3", "--no-do-sample")
    settings = settings_of(argv)
    assert (settings["lr"], settings["model_path"], settings["batch_size"]) == (0.1, "elsewhere", 3)
    assert settings["do_sample"] is False and settings["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("script, gpus, steps", [(BASE, 1, 128), (BASE, 2, 64), (BASE, 128, 1), (OPT, 2, 2)])
def test_effective_batch_is_kept(script, gpus, steps, started):
    argv, said = started(script, ".", "0", str(gpus), "--dry-run")
    settings, recipe = settings_of(argv), RECIPES[script]
    assert settings["batch_size"] == recipe["batch_size"] and settings["gradient_accumulation_steps"] == steps
    published = recipe["gradient_accumulation_steps"]
    assert said.count("\n") == 1 and f"accumulation {published} -> {steps}" in said


def test_effective_batch_is_kept_by_groups_of_gpus(started):
    argv, said = started(OPT, ".", "0", "4", *["--model-parallel", "--model-parallel-size", "2"])
    assert settings_of(argv)["gradient_accumulation_steps"] == 2
    assert "2 groups of 2 GPUs instead of 4: accumulation 1 -> 2" in said
    sizes = ["--model-parallel", "--model_parallel_size=1", "--teacher-model-parallel-size", "4"]
    assert settings_of(started(OPT, ".", "0", "8", *sizes)[0])["gradient_accumulation_steps"] == 2


def test_accumulation_of_the_user_is_left_alone(started):
    for spelling in (["--gradient-accumulation-steps", "5"], ["--gradient_accumulation_steps=5"]):
        argv, said = started(BASE, ".", "0", "3", *spelling)
        assert said == "" and settings_of(argv)["gradient_accumulation_steps"] == 5
    argv, said = started(BASE, ".", "0", "4", "--batch-size", "4", "--dry-run")
    assert settings_of(argv)["gradient_accumulation_steps"] == 32 and "512 examples" in said


@pytest.mark.parametrize(
    "script, gpus, remedy",
    [
        (BASE, "3", "use 1 2 4 8 16 32 64 128"),
        (OPT, "8", "use 1 2 4, or --batch-size 8 --gradient-accumulation-steps 1"),
    ],
)
def test_what_does_not_divide_is_refused(script, gpus, remedy):
    for argument in ([], ["--dry-run"]):
        done = run_script(script, ".", "0", gpus, *argument)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert remedy in done.stderr


@pytest.mark.parametrize(
    "script, arguments, environment, message",
    [
        (BASE, ["nowhere"], {}, "nowhere"),
        (BASE, [".", "x"], {}, "port x"),
        (BASE, [".", "0", "0"], {}, "gpus 0"),
        (BASE, [".", "0", "1", "model"], {}, "fourth argument"),
        (DOLLY, [".", "0", "1", "model", "more"], {}, "more"),
        (BASE, [], {"NNODES": "2"}, "MASTER_ADDR"),
        (BASE, [], {"NNODES": "two"}, "NNODES"),
        (BASE, [], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2"),
        (BASE, [], {"MASTER_PORT": "many"}, "port many"),
        (BASE, [], {"MAX_RESTARTS": "often"}, "MAX_RESTARTS=often"),
        (BASE, [], {"PROMPTKD_LAUNCHER": "none"}, "WORLD_SIZE"),
        (BASE, [], {"PROMPTKD_LAUNCHER": "mpi"}, "torchrun"),
        (BASE, [], {"PROMPTKD_PYTHON": "/no/python"}, "/no/python"),
        (RUN_EVAL, [], {}, "CHECKPOINT"),
        (RUN_EVAL, ["--dry-run"], {}, "CHECKPOINT"),
        (BASE, ["--dry-run", "--lrr", "1"], {}, "did you mean --lr"),
    ],
)
def test_bad_input_is_named(script, arguments, environment, message):
    done = run_script(script, *arguments, **environment)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr.splitlines()[-1]


def test_processes_and_where_they_meet(started):
    argv, _ = started(BASE)
    assert argv[0] == str(ROOT / "train.py")
    argv, _ = started(BASE, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert argv[:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "4"]
    assert options_after_entry(argv)["--rdzv-endpoint"] == "127.0.0.1:0"
    argv, _ = started(BASE, ".", "2012", "2")
    named = options_after_entry(argv)
    assert (named["--nproc_per_node"], named["--master_port"], named["--master_addr"]) == ("2", "2012", "127.0.0.1")
    argv, said = started(BASE, ".", "2012", "2", NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    named = options_after_entry(argv)
    assert (named["--nnodes"], named["--node_rank"], named["--master_addr"]) == ("2", "1", "first")
    assert "4 GPUs instead of 8" in said and settings_of(argv)["gradient_accumulation_steps"] == 32


def test_restarts_and_what_other_launchers_set(started):
    argv, _ = started(BASE, ".", "0", "2", MAX_RESTARTS="3", MASTER_PORT="2013")
    named = options_after_entry(argv)
    assert (named["--max_restarts"], named["--master_port"]) == ("3", "2013") and argv[
        argv.index("--resume") + 1
    ] == "auto"
    argv, _ = started(BASE, ".", "0", "2", "--resume", "must", MAX_RESTARTS="3")
    assert argv.count("--resume") == 1
    argv, _ = started(BASE, ".", "0", "1", MAX_RESTARTS="1")  # one process needs torchrun's eye, too
    assert "torch.distributed.run" in argv
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MAX_RESTARTS": "1"}
    named = options_after_entry(started(BASE, ".", "2012", "2", **nodes)[0])
    assert (named["--nnodes"], named["--rdzv-backend"], named["--rdzv-endpoint"]) == ("2", "c10d", "first:2012")
    argv, said = started(BASE, ".", "0", "2", PROMPTKD_LAUNCHER="none", WORLD_SIZE="4", RANK="1", LOCAL_RANK="1")
    assert argv[0] == str(ROOT / "train.py") and "4 GPUs instead of 8" in said


def test_base_path_is_put_before_paths_alone(started, tmp_path):
    settings = settings_of(started("scripts/gpt2/kd/kd_base.sh", str(tmp_path), "--dry-run")[0])
    assert settings["data_dir"] == f"{tmp_path}/processed_data/dolly/full/gpt2/" and settings["model_path"] == "gpt2"
    assert settings["teacher_model_path"] == f"{tmp_path}/checkpoints/gpt2/train/sft/gpt2-xlarge/"
    assert settings["deepspeed_config"] == str(ROOT / "configs/deepspeed/ds_config.json")
    settings = settings_of(started(BASE, "--dry-run", cwd=tmp_path)[0])  # by default the project's folder
    assert settings["save"] == str(ROOT / "results/gpt2/train/promptkd/gpt2-base-xlarge")
    settings = settings_of(started(BASE, ".", "--dry-run", cwd=tmp_path)[0])
    assert settings["save"] == "results/gpt2/train/promptkd/gpt2-base-xlarge"


def test_each_checkpoint_has_a_results_folder_of_its_own(started):
    model = "checkpoints/gpt2/train/kd/gpt2-base"
    settings = settings_of(started(DOLLY, ".", "0", "1", f"{model}/", "--seeds", "3", "4")[0])
    assert (settings["model_path"], settings["seeds"]) == (f"{model}/", [3, 4])
    assert settings["save"] == "results/gpt2/eval_main/dolly/checkpoints_gpt2_train_kd_gpt2-base"
    for arguments in ([model], [".", model]):
        settings = settings_of(started(RUN_EVAL, *arguments, "--dry-run")[0])
        assert settings["save"] == "results/gpt2/eval_main/checkpoints_gpt2_train_kd_gpt2-base"
        assert settings["model_path"] == model and settings["seeds"] == [10, 20, 30, 40, 50]
        assert settings["data_names"] == "dolly self_inst vicuna sinst uinst" and settings["data_dir"] == "data"


def test_run_eval_takes_all_visible_gpus(started):
    model = "checkpoints/gpt2/train/kd/gpt2-base"
    for arguments in ([model], [".", model], [".", model, "--seeds", "3"]):
        argv, _ = started(RUN_EVAL, *arguments, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
        assert options_after_entry(argv)["--nproc_per_node"] == "8" and settings_of(argv)["model_path"] == model


def test_dry_run_prints_json_alone():
    for arguments, fresh in ((["--dry-run"], True), ([".", "2012", "8", "--dry-run"], False)):
        done = run_script(BASE, *arguments, fresh=fresh)
        assert (done.returncode, done.stderr) == (0, "")
        settings = json.loads(done.stdout)
        assert {name: settings[name] for name in RECIPES[BASE]} == RECIPES[BASE]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (DOLLY, {"data_names": "dolly", "eval_batch_size": 16}),
        ("scripts/gpt2/tools/generate_data_seqkd.sh", {"model_path": "results/gpt2/train/sft/gpt2-xlarge/"}),
        ("scripts/gpt2/tools/generate_data_distillm2.sh", {"save": "results/gpt2/gen/distillm2/gpt2-xlarge"}),
        ("scripts/gpt2/tools/process_data_dolly.sh", {"dev_num": 1000, "only_prompt": False}),  # calls its tool twice
    ],
)
def test_the_other_entry_points_print_json_alone(script, expected):
    done = run_script(script, ".", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    settings = json.loads(done.stdout)
    assert {name: settings[name] for name in expected} == expected
