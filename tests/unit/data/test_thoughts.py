"""Models that think: their prompts, the text that counts as their answer, and template arguments."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.training import GOLDEN
from transformers import AutoTokenizer

import evaluate
import train
from promptkd.cli import data as process_data
from promptkd.cli import generate
from promptkd.config.template_options import TemplateSettings
from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import TextEncoder
from promptkd.data.rows import read_row
from promptkd.data.templates import ChatTemplate, bind_settings
from promptkd.data.thoughts import answer_text, thought_markers
from promptkd.errors import UserError
from promptkd.evaluation.tables import Row, summary
from promptkd.evaluation.test_sets import TestSet, read_set

QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
R1 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>' + m.content }}{%- else %}"
    "{{- '<|im_end|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_end|><think>\n' }}{%- endif %}"
)
ASKED = "<|im_start|>user\nSay data.<|im_end|>\n<|im_start|>assistant\n"
ROW = {"instruction": "Say data.", "output": "learn data"}


def make_tokenizer(template=QWEN3, values=None, special=False, markers=("<think>", "</think>")):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(markers), special_tokens=special)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
    bind_settings(tokenizer, TemplateSettings("chat", values), "")
    return tokenizer


@pytest.mark.parametrize(
    ("template", "values", "prompt"),
    [
        (QWEN3, None, ASKED + "<think>\n\n</think>\n\n"),
        (QWEN3, {"enable_thinking": False}, ASKED + "<think>\n\n</think>\n\n"),
        (QWEN3, {"enable_thinking": True}, ASKED),
        (R1, None, "<|im_start|>Say data.<|im_end|>"),
        (R1 + "{# thinking #}", {"thinking": True}, "<|im_start|>Say data.<|im_end|><think>\n"),
    ],
)
def test_chat_prompt_is_the_templates_own_before_a_plain_answer(template, values, prompt, tmp_path):
    tokenizer = make_tokenizer(template, values)
    chat = ChatTemplate(tokenizer)
    assert chat(read_row(ROW)) == prompt == chat(read_row({"prompt": prompt}))
    assert TextEncoder(tokenizer).stop_id(prompt) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    trained = ExampleSet.open(tmp_path, "train", tokenizer, 96, 128, template="chat")[0].prompt.tolist()
    tested = read_set("own", tmp_path / "valid.jsonl", tokenizer, 96, -1, False, "chat").prompts[0].tolist()
    assert trained == tested and tokenizer.decode(trained) == prompt
    if values is None:
        own = [{"role": "user", "content": "Say data."}, {"role": "assistant", "content": "learn data"}]
        assert tokenizer.apply_chat_template(own, tokenize=False).startswith(prompt + "learn data")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("said", "answer", "thought"),
    [
        ("<think>\nI should list.\n</think>\n\nlearn data", "learn data", True),
        ("<think>\n\n</think>\n\nlearn data", "learn data", False),
        ("<think>\nI should list learn data", "", True),
        ("I should list.\n</think>\n\nlearn data", "learn data", True),
        ("learn <think>a</think>data<think>b</think>", "learn data", True),
        ("learn data", "learn data", False),
        ("1 < 2 <thin> data", "1 < 2 <thin> data", False),
    ],
)
def test_answer_text_leaves_thoughts_out(said, answer, thought, special):
    tokenizer = make_tokenizer(special=special)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, ids) == (answer, thought)


@pytest.mark.parametrize("said", ["[THINK]I list.[/THINK]data", "<seed:think>I list.</seed:think>data",
                                  "<|START_THINKING|>I list.<|END_THINKING|>data"])  # fmt: skip
def test_answer_text_knows_the_markers_that_a_template_declares(said):
    opener, closer = said.partition("I list.")[0], said.partition("I list.")[2].removesuffix("data")
    tokenizer = make_tokenizer(QWEN3 + "{# " + opener + closer + " #}")
    assert (opener, closer) in thought_markers(tokenizer)
    assert answer_text(tokenizer, tokenizer(said, add_special_tokens=False)["input_ids"]) == ("data", True)
    plain = make_tokenizer()  # nothing declares them: they are text
    ids = plain(said, add_special_tokens=False)["input_ids"]
    assert answer_text(plain, ids) == (said, False)


def test_answer_text_of_a_thought_that_the_prompt_opened():
    tokenizer = make_tokenizer(R1)
    texts = ("data<think>\n", "I should list")
    prompt, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    assert answer_text(tokenizer, said, prompt) == ("", True)
    assert answer_text(tokenizer, said, prompt[:1]) == ("I should list", False)


def test_summary_counts_answers_with_thoughts():
    rows = [[Row(0, 0, "a", 1, 1.0, 0.0, True), Row(0, 1, "b", 1, 1.0, 0.0)], [Row(1, 0, "a", 1, 1.0, 0.0, True)]]
    tests = TestSet("own", GOLDEN / "README.md", [], [], 0)
    assert summary(tests, rows, 1.0)["answers_with_thoughts"] == 2


@pytest.mark.parametrize("value", ['{"enable_thinking": false', "[1]", '{"a": 1, "a": 2}', "enable_thinking=false"])
def test_chat_template_kwargs_are_one_json_object(value):
    argv = ["--method", "sft", "--model-path", "m", "--template", "chat", "--chat-template-kwargs", value]
    with pytest.raises(UserError, match=r"--chat-template-kwargs: .* is not a JSON object"):
        train.read_settings(argv)


@pytest.mark.parametrize("read", ["train", "evaluate", "generate", "process_data"])
def test_chat_template_kwargs_go_with_the_chat_template(read, monkeypatch):
    option = ["--chat-template-kwargs", '{"enable_thinking": false}']
    argv, main = {
        "train": (["--method", "sft", "--model-path", "m"], train.read_settings),
        "evaluate": (["--model-path", "m"], evaluate.read_settings),
        "generate": (["--model-path", "m", "--data-dir", "d"], generate.read_settings),
        "process_data": (["instructions", "--raw", "r", "--tokenizer", "t", "--save", "s", "--dev-num", "1"], None),
    }[read]
    if main is None:
        monkeypatch.setattr(sys, "argv", ["process_data.py", *argv, *option])
        with pytest.raises(UserError, match="is for --template chat"):
            process_data.main()
        return
    assert main([*argv, "--template", "chat", *option]).data.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(UserError, match="--chat-template-kwargs is for --template chat"):
        main([*argv, *option])


@pytest.mark.parametrize(
    ("values", "message"),
    [({"enable_thnking": False}, "does not read 'enable_thnking'"), ({"tokenize": True}, "'tokenize' is set by this")],
)
def test_chat_template_kwargs_that_the_template_does_not_read_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_tokenizer(values=values)
