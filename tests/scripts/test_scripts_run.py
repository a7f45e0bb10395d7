"""scripts/ that run to their end: training of each method and family, evaluation, data from raw text to SeqKD."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.recipes import BASE, RECIPES, RUN_EVAL
from helpers.runs import run_script
from helpers.tiny_models import make_model
from helpers.training import GOLDEN, golden_argv, metrics_of

TRAINED = ["gpt2/sft/sft_base", "gpt2/kd/kd_base", "gpt2/seqkd/seqkd_base", "gpt2/minillm/minillm_base"]
TRAINED += ["opt/promptkd/promptkd_1.3B", "llama/promptkd/promptkd_7B", "opt/gkd/gkd_1.3B", "gpt2/abkd/abkd_base"]
TRAINED += ["gpt2/distillm/distillm_base"]
FP32 = "configs/deepspeed/ds_config_fp32.json"


@pytest.mark.slow
def test_a_training_script_trains_on_two_processes(save):
    options = golden_argv("promptkd", save, "--total-iters", "2", "--deepspeed_config", FP32, "--max-length", "112")
    done = run_script(BASE, ".", "0", "2", *options[2:], "--batch-size", "2", "--gradient-accumulation-steps", "2")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(save)] == [1, 2] and (save / "last" / "model.safetensors").exists()
    settings = json.loads((save / "config.json").read_text())["settings"]
    assert settings["prompt_init_text"] == "Suppose you are a student." and settings["teacher_lr"] == 5e-5


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A tiny random model of each family, with the golden models' tokenizer."""
    root = tmp_path_factory.mktemp("families")
    for kind in ("opt", "llama"):
        make_model(kind, root / kind, vocab_size=1500)
        for file in (GOLDEN / "models" / "gpt2_student").glob("*token*"):
            shutil.copy(file, root / kind)
    return root


@pytest.mark.parametrize("script", TRAINED)
def test_a_script_of_each_method_and_family_trains(script, save, families):
    """With the options that a reader without GPU and downloads gives."""
    family, method, _ = script.split("/")
    options = golden_argv(method, save, "--total-iters", "2", "--deepspeed_config", FP32)[2:]
    if method == "minillm":
        folder = options.index("--data-dir")
        options[folder : folder + 2] = ["--prompt-data-dir", f"{GOLDEN}/processed/dolly/prompt/gpt2"]
        options += ["--lm-data-dir", f"{GOLDEN}/processed/corpus/gpt2", "--num-rollouts", "4", "--chunk-size", "4"]
    if method == "distillm":
        options += ["--lm-data-dir", f"{GOLDEN}/processed/corpus/gpt2"]
    if family != "gpt2":
        options += ["--model-path", f"{families}/{family}", "--teacher-model-path", f"{families}/{family}"]
    done = run_script(f"scripts/{script}.sh", *options, "--batch-size", "4", "--gradient-accumulation-steps", "1")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(save)] == [1, 2] and (save / "last" / "model.safetensors").exists()


def test_run_eval_prints_and_writes_the_table(tmp_path):
    for folder in ("dolly", "self-inst"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        rows = [{"instruction": f"Say {i}.", "input": "", "output": ["words", f"{i}"]} for i in range(3)]
        (tmp_path / "data" / folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").symlink_to(GOLDEN / "models" / "gpt2_student")
    sizes = ["--max-length", "48", "--max-prompt-length", "32"]
    done = run_script(RUN_EVAL, str(tmp_path), "model", "--seeds", "10", "20", *sizes)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/gpt2/eval_main/model"
    assert (folder / "results.md").read_text() in done.stdout and "| vicuna | missing" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert results["seeds"] == [10, 20] and list(results["sets"]) == ["dolly", "self_inst"]
    assert "download_requirements.sh --only data/vicuna" in done.stderr


def test_data_scripts_lead_from_raw_text_to_seqkd(tmp_path):
    """Prompts, responses and corpus as the published scripts wrote them; then what the teacher answered."""
    for source, target in (("raw.jsonl", "dolly/raw.jsonl"), ("corpus.txt", "openwebtext/data.txt")):
        (tmp_path / "data" / target).parent.mkdir(parents=True)
        shutil.copy(GOLDEN / "data" / source, tmp_path / "data" / target)
    teacher, made = GOLDEN / "models" / "gpt2_teacher", tmp_path / "processed_data"
    prompts = ["--tokenizer", str(teacher), "--max-prompt-length", "96"]
    corpus = ["--tokenizer", str(teacher), "--max-length", "128", "--dev-num", "8", "--train-num", "64"]
    decoding = ["--max-length", "112", "--max-prompt-length", "96", "--dtype", "fp32"]
    for name, options in (
        ("process_data_dolly", [*prompts, "--dev-num", "12"]),
        ("process_data_pretrain", corpus),
        ("generate_data_seqkd", ["0", "1", str(teacher), *decoding]),
        ("process_data_pseudo", prompts),
    ):
        done = run_script(f"scripts/gpt2/tools/{name}.sh", str(tmp_path), *options)
        assert done.returncode == 0, done.stderr
    parts = {"dolly/full/gpt2": "dolly/full/gpt2", "dolly/prompt/gpt2": "dolly/prompt/gpt2"}
    for ours, theirs in {**parts, "openwebtext/gpt2/512/10M": "corpus/gpt2"}.items():
        for file in (GOLDEN / "processed" / theirs).iterdir():
            assert (made / ours / file.name).read_bytes() == file.read_bytes(), file
    assert (tmp_path / RECIPES["scripts/gpt2/seqkd/seqkd_base.sh"]["data_dir"] / "train_0.bin").exists()


def test_distillm2_scripts_generate_pairs_and_train_on_them(tmp_path):
    models, processed = tmp_path / "checkpoints/gpt2/train", tmp_path / "processed_data/dolly/full"
    for folder in (models / "sft", models / "minillm_init", processed):
        folder.mkdir(parents=True)
    (models / "sft/gpt2-xlarge").symlink_to(GOLDEN / "models/gpt2_teacher")
    (models / "minillm_init/gpt2-base").symlink_to(GOLDEN / "models/gpt2_student")
    (processed / "gpt2").symlink_to(GOLDEN / "processed/dolly/full/gpt2")
    sizes = ["--max-length", "104", "--max-prompt-length", "96"]
    script = "scripts/gpt2/tools/generate_data_distillm2.sh"
    for _ in range(2):  # The second time, the answers are complete.
        done = run_script(script, str(tmp_path), "0", "1", *sizes, "--dtype", "fp32")
        assert done.returncode == 0, done.stderr
    steps = ["--total-iters", "2", "--batch-size", "2", "--dev-num", "0", "--deepspeed_config", FP32]
    done = run_script("scripts/gpt2/distillm2/distillm2_base.sh", str(tmp_path), "0", "1", *sizes, *steps)
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "results/gpt2/train/distillm2/gpt2-base-xlarge")
    assert [row["step"] for row in rows] == [1, 2] and {"teacher_response_loss", "student_response_loss"} <= set(
        rows[0]
    )
