"""Models whose turns end with another token than end-of-text, in training data, decoding and answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.smollm2 import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import evaluate
from promptkd.cli import data as process_data
from promptkd.cli import generate
from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import TextEncoder
from promptkd.data.rows import read_row
from promptkd.data.templates import ChatTemplate, end_of_turn_id
from promptkd.data.token_file import TokenFile, split_row
from promptkd.evaluation.evaluate import run as evaluate_run
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling
from promptkd.models.loading import end_ids, load_causal_lm

WORDS = ["user", "model", "say", "it", "again", "SAID", "ASKED", "one", "two", "three"]
SPECIAL = ["<eos>", "<start>", "<turn_end>", "<other_end>", "<pad>"]
END, TURN, OTHER = (SPECIAL.index(name) for name in ("<eos>", "<turn_end>", "<other_end>"))

GEMMA = (
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<turn_end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
ROWS = [{"instruction": "say one", "output": "one"}, {"instruction": "say it", "input": "two", "output": "two two"}]


def make_tokenizer(template: str | None = GEMMA):
    """Make a tokenizer of words with Gemma's special tokens under other names."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:4]})
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a model that says random words and ends turns with two tokens; the tokenizer knows one."""
    where = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(where)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), eos_token_id=7, bos_token_id=7, **sizes))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-9.0)
        model.lm_head.bias[[TURN, OTHER, len(SPECIAL) + 7, len(SPECIAL) + 8]] = 0
    model.generation_config.eos_token_id = [END, OTHER, 7]
    model.save_pretrained(where)
    (where / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 4 * ROWS))
    return where


@pytest.mark.parametrize("template, end", [(None, END), (GEMMA, TURN), (LLAMA2, END), (BARE, END)])
def test_end_of_turn_id_is_the_templates(template, end):
    assert end_of_turn_id(make_tokenizer(template)) == end


def test_end_of_turn_id_ignores_a_broken_template():
    broken = make_tokenizer("{{ raise_exception('no') }}")
    assert end_of_turn_id(broken) == END and TextEncoder(broken).stop_id("say one") == END


def test_chat_template_that_adds_nothing():
    chat = ChatTemplate(make_tokenizer(LLAMA2))
    published = {"instruction": "say it", "prompt": "published: say it"}
    assert chat(read_row(published)) == chat(read_row({"instruction": "say it"})) == "say it"


def test_chat_template_keeps_prompts_of_another_day():
    dated = "{% if messages %}<start>system\n{{ strftime_now('%H:%M:%S.%f') }}<turn_end>\n{% endif %}" + GEMMA
    chat = ChatTemplate(make_tokenizer(dated))
    earlier = chat(read_row(ROWS[0]))
    assert chat(read_row({"prompt": earlier})) == earlier != chat(read_row(ROWS[0]))
    encoder = TextEncoder(chat.tokenizer)
    assert [encoder.stop_id(prompt) for prompt in (earlier, "say one")] == [TURN, END]


def test_end_ids_end_responses(folder):
    model, tokenizer = load_causal_lm(str(folder), torch.float32, "-"), AutoTokenizer.from_pretrained(folder)
    # 7 is "say": a configuration's, which ends nothing.
    assert end_ids(tokenizer, model) == (END, TURN, OTHER)
    assert end_ids(make_tokenizer(None)) == (END,)
    prompts = [np.array([WORDS.index("say") + len(SPECIAL)])] * 40
    keys = [(1, row) for row in range(40)]
    free, ended = (
        decode(model, GenerationRequest(prompts, 8, ends, Sampling(), keys), 10_000).responses
        for ends in ([END], end_ids(tokenizer, model))
    )
    for long, short in zip(free, ended):
        ends = [place for place, token in enumerate(long.tolist()) if token in (TURN, OTHER)]
        assert short.tolist() == long.tolist()[: ends[0] + 1 if ends else None]
    assert {int(response[-1]) for response in ended} >= {TURN, OTHER}


def test_training_responses_end_with_the_turn(folder, tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "train.jsonl").write_text((folder / "raw.jsonl").read_text())
    for template, end in (("chat", TURN), ("published", END)):
        examples = ExampleSet.open(tmp_path, "train", tokenizer, 99, 120, template=template)
        assert [example.response[-1] for example in examples] == [end] * 8
        assert tokenizer.decode(examples[1].response, skip_special_tokens=True) == "two two"


def test_pseudo_responses_end_with_the_turn(folder, tmp_path):
    how = ["--tokenizer", folder, "--max-prompt-length", 40]
    made = ["--raw", folder / "raw.jsonl", "--save", tmp_path / "data", "--dev-num", 2, "--workers", 1]
    run(process_data, "instructions", "--template", "chat", *how, *made)
    sizes = ["--max-length", "56", "--max-prompt-length", "40"]
    argv = ["--model-path", str(folder), "--data-dir", str(tmp_path / "data"), "--save", str(tmp_path / "gen"), *sizes]
    generate.run(generate.read_settings(argv))
    rows = [json.loads(line) for line in (tmp_path / "gen/generated.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(set(row["gen_answer"].split()) <= {"two", "one"} for row in rows)
    made = ["--generated", tmp_path / "gen/generated.jsonl", "--data-dir", tmp_path / "data"]
    run(process_data, "pseudo", *how, *made, "--save", tmp_path / "pseudo")
    for name in ("data", "pseudo"):
        file = TokenFile(tmp_path / name / "train_0", 20)
        assert [split_row(file[row], file.marker)[1][-1] for row in range(6)] == [TURN] * 6


def test_evaluation_answers_end_with_the_turn(folder, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/valid.jsonl").write_text((folder / "raw.jsonl").read_text())
    argv = ["--model-path", str(folder), "--data-dir", str(tmp_path), "--data-names", "own", "--template", "chat"]
    sizes = ["--max-length", "60", "--max-prompt-length", "40", "--no-repeat-ngram-size", "0"]
    settings: SimpleNamespace = evaluate.read_settings([*argv, *sizes, "--save", str(tmp_path / "out")])
    evaluate_run(settings)
    answers = [json.loads(line) for line in (tmp_path / "out/own/seed10/answers.jsonl").read_text().splitlines()]
    assert all(set(row["answer"].split()) <= {"two", "one"} for row in answers)
    assert [row["length"] for row in answers] == [len(row["answer"].split()) for row in answers]
    assert max(row["length"] for row in answers) < 20
