"""train.py as its users meet it: dry run, files, bad input in one line with status 2 and nothing written."""

import json

import pytest
import torch
from helpers.training import GOLDEN, golden_argv, metrics_of, start, start_fresh, train_here

from promptkd.errors import UserError
from train import read_settings


def test_dry_run_prints_one_json_object_and_leaves(save):
    done = start_fresh([*golden_argv("promptkd", save), "--dry-run", "--prompt-init-text", "Be", "brief."])
    assert done.returncode == 0 and done.stderr == ""
    settings = json.loads(done.stdout)
    assert settings["method"] == "promptkd" and settings["lr"] == 0.001 and settings["teacher_kld_type"] == "reverse"
    assert settings["prompt_init_text"] == "Be brief." and settings["do_sample"] is True
    assert not save.exists()


def test_options_may_be_written_with_underscores_and_the_last_one_wins(save):
    argv = [*golden_argv("kd", save), "--kd_ratio=0.25", "--batch_size", "2", "--batch-size", "4", "--local_rank=3"]
    settings = read_settings(argv)
    assert settings.method_settings.kd_ratio == 0.25 and settings.optimizer.batch_size == 4


def test_what_a_run_leaves_behind(save):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    argv = golden_argv("promptkd", save, "--epochs", "1", "--batch-size", "8", "--dev-num", "3", "--no-do-sample")
    trainer = train_here(argv)
    rows = metrics_of(save)
    wanted = (
        "student_loss prompt_kd_loss prompt_base_loss base_coef_now lr grad_norm prompt_drift response_tokens "
        "step_seconds rollout_seconds prompt_seconds student_seconds peak_memory_gb"
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(key in row for row in rows for key in wanted.split())
    assert [row["step"] for row in metrics_of(save, "eval")] == [0, 4]
    config = json.loads((save / "config.json").read_text())
    assert config["settings"]["method"] == "promptkd" and config["versions"]["torch"] and config["inputs"]["teacher"]
    for name in ("best_rougeL", "best_loss", "last"):
        model = AutoModelForCausalLM.from_pretrained(save / name)
        assert AutoTokenizer.from_pretrained(save / name).eos_token_id == 0
    for ours, theirs in zip(trainer.method.student.module.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert (save / "curves.png").read_bytes().startswith(b"\x89PNG")

    # PEFT reads the prompt and, on input padded on the right, computes what we compute.
    teacher = AutoModelForCausalLM.from_pretrained(GOLDEN / "models/gpt2_teacher")
    peft = PeftModel.from_pretrained(teacher, str(save / "prompt")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -4:]
    prompt = trainer.method.prompt().cpu()
    embedded = torch.cat([prompt, teacher.get_input_embeddings()(ids[0])])[None]
    torch.testing.assert_close(teacher(inputs_embeds=embedded).logits[0, -4:], theirs, rtol=1e-4, atol=1e-4)


def test_the_next_run_does_not_overwrite_unless_told(save):
    argv = golden_argv("sft", save, "--total-iters", "1")
    trainer = train_here(argv)
    assert trainer.metrics.file.closed
    before = (save / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"--overwrite"):
        train_here(argv)
    assert (save / "metrics.jsonl").read_text() == before
    train_here([*argv, "--overwrite"])
    assert len(metrics_of(save)) == 1


def test_a_run_does_not_replace_what_it_reads(save):
    argv = golden_argv("sft", save, "--total-iters", "1")
    train_here(argv)
    weights, before = save / "last/model.safetensors", (save / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"the run would replace .*last, which it reads: name another folder"):
        train_here([*argv, "--model-path", str(save / "last"), "--overwrite"])
    assert weights.exists() and (save / "metrics.jsonl").read_text() == before


def broken_models(folder):
    """A student folder for each way of being wrong."""
    import shutil

    from transformers import AutoModelForCausalLM

    source = GOLDEN / "models/gpt2_student"
    for name in ("cut_weights", "no_tokenizer", "bad_config", "small_vocabulary"):
        shutil.copytree(source, folder / name)
    weights = folder / "cut_weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "no_tokenizer/tokenizer.json").unlink()
    (folder / "no_tokenizer/tokenizer_config.json").unlink()
    (folder / "bad_config/config.json").write_text("{")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(1490)
    model.save_pretrained(folder / "small_vocabulary")


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--batch-sise", "2"], "did you mean --batch-size"),
        (["--batch-size", "two"], "--batch-size"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--batch-size", "40"], "34 training examples do not fill one step"),
        (["--lr", "nan"], "--lr"),
        (["--kd-ratio", "0.5"], "--kd-ratio"),
        (["--temperature", "0"], "--no-do-sample"),
        (["--max-prompt-length", "128"], "no room for a response"),
        (["--max-prompt-length", "60"], "--max-prompt-length"),
        (["--max-length", "300", "--max-prompt-length", "96"], "positions"),
        (["--model-path", "nowhere/at/all/"], "no such folder"),
        (["--model-type", "llama"], "--model-type"),
        (["--teacher-model-path", ""], "--teacher-model-path"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--prompt-len", "-1"], "--prompt-len"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
        (["--model-path", "{broken}/cut_weights"], "cut_weights"),
        (["--model-path", "{broken}/no_tokenizer"], "tokenizer"),
        (["--model-path", "{broken}/bad_config"], "config.json"),
        (["--model-path", "{broken}/small_vocabulary"], "embeddings for 1490 tokens"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(extra, message, save, tmp_path):
    if any("{broken}" in part for part in extra):
        broken_models(tmp_path / "broken")
    extra = [part.replace("{broken}", str(tmp_path / "broken")) for part in extra]
    with pytest.raises(UserError) as raised:
        train_here(golden_argv("promptkd", save, *extra))
    assert message in str(raised.value) and not save.exists()


def test_methods_are_named_when_the_one_given_is_unknown(save):
    done = start(["--method", "promptkdd", "--model-path", "x"])
    assert done.returncode == 2 and "promptkd" in done.stderr and done.stderr.count("\n") == 1
    done = start(["--model-path", "x"])
    assert done.returncode == 2 and "--method is missing" in done.stderr


def test_a_broken_line_is_named_by_its_number(save, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    argv = golden_argv("sft", save, "--data-dir", str(tmp_path))
    done = start(argv)
    assert done.returncode == 2 and "line 2" in done.stderr and done.stderr.count("\n") == 1
    assert not save.exists()


def test_plain_jsonl_trains_like_token_files(save, tmp_path):
    argv = golden_argv("sft", save, "--total-iters", "2")
    train_here(argv)
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.loads(line) for line in (GOLDEN / "processed/dolly/full/gpt2/train.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in lines]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_here([*argv, "--data-dir", str(data), "--save", str(tmp_path / "jsonl")])
    assert [r["loss"] for r in metrics_of(save)] == [r["loss"] for r in metrics_of(tmp_path / "jsonl")]
