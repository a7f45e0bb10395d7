"""Rows of every common shape have the prompt and the response that their authors mean."""

from __future__ import annotations

import json

import pytest
from helpers.training import GOLDEN
from transformers import AutoTokenizer

from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import FieldCounts
from promptkd.data.rows import read_row, reference_texts, render_prompt
from promptkd.data.templates import ChatTemplate
from promptkd.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "data"}
LAST = "### Instruction:\nHi\n\n### Response:\n"
PARTS = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
SYSTEM = {"role": "system", "content": "Be short."}
EARLIER = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]


@pytest.fixture(scope="module")
def tokenizer():
    loaded = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    loaded.chat_template = CHAT
    return loaded


def asked(instruction: str, input: str = "") -> str:
    return render_prompt(read_row({"instruction": instruction, "input": input}))


def prompt_and_references(row, where="row", template=render_prompt):
    return template(read_row(row, where), where), reference_texts(row, where)


@pytest.mark.parametrize(
    ("row", "published", "chat"),
    [
        ({"messages": [USER, ANSWER]}, asked("Hi"), "<user>Hi\n<assistant>"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "data"}]}, asked("Hi"), None),
        ({"conversations": [USER, ANSWER]}, asked("Hi"), None),
        ({"prompt": "Hi\n", "completion": "data"}, "Hi\n", "<user>Hi\n\n<assistant>"),
        ({"prompt": [USER], "completion": [ANSWER]}, asked("Hi"), "<user>Hi\n<assistant>"),
        ({"prompt": "Hi", "completion": [ANSWER]}, "Hi", "<user>Hi\n<assistant>"),
        ({"prompt": [USER], "response": "data"}, asked("Hi"), None),
        ({"messages": [USER], "output": "data"}, asked("Hi"), None),
        ({"prompt": "Hi", "messages": [USER, ANSWER]}, asked("Hi"), "<user>Hi\n<assistant>"),
        ({"messages": [PARTS, ANSWER]}, asked("Hi"), None),
        (
            {"instruction": "Hi", "context": "It.", "response": "data"},
            asked("Hi", "It."), "<user>Hi\n\nIt.\n<assistant>",
        ),
        ({"instruction": "Hi", "context": "It.", "output": "data"}, asked("Hi", "It."), None),
        ({"instruction": "Hi", "input": "", "context": "It.", "output": "data"}, asked("Hi", "It."), None),
        ({"instruction": "Hi", "input": None, "output": "data"}, asked("Hi"), "<user>Hi\n<assistant>"),
        (
            {"system": "Be short.", "instruction": "Hi", "output": "data"},
            asked("Be short.\n\nHi"), "<system>Be short.\n<user>Hi\n<assistant>",
        ),
        ({"system": None, "instruction": "Hi", "output": "data"}, asked("Hi"), "<user>Hi\n<assistant>"),
        ({"messages": [SYSTEM, USER, ANSWER]}, asked("Be short.\n\nHi"), "<system>Be short.\n<user>Hi\n<assistant>"),
        ({"system": "Be short.", "conversations": [USER, ANSWER]}, asked("Be short.\n\nHi"), None),
        (
            {"system": "Be short.", "prompt": "Q:", "response": "data"},
            "Be short.\n\nQ:", "<system>Be short.\n<user>Q:\n<assistant>",
        ),
        (
            {"messages": [SYSTEM, *EARLIER, USER, ANSWER]},
            PREAMBLE + "### Instruction:\nBe short.\n\nOne?\n\n### Response:\n1\n\n" + LAST,
            "<system>Be short.\n<user>One?\n<assistant>1\n<user>Hi\n<assistant>",
        ),
        (
            {"instruction": "Hi", "input": "", "history": [["One?", "1"]], "output": "data"},
            PREAMBLE + "### Instruction:\nOne?\n\n### Response:\n1\n\n" + LAST,
            "<user>One?\n<assistant>1\n<user>Hi\n<assistant>",
        ),
        (
            {"prompt": "Hi", "history": EARLIER, "response": "data"},
            PREAMBLE + "### Instruction:\nOne?\n\n### Response:\n1\n\n" + LAST,
            "<user>One?\n<assistant>1\n<user>Hi\n<assistant>",
        ),
        ({"instruction": "Hi", "input": "", "history": [], "output": "data"}, asked("Hi"), None),
    ],
)  # fmt: skip
def test_read_row_prompt_and_response_of_each_shape(tokenizer, row, published, chat):
    assert prompt_and_references(row) == (published, ["data"])
    prompt, references = prompt_and_references(row, "row", ChatTemplate(tokenizer))
    assert references == ["data"] and (chat is None or prompt == chat)
    # What process_data writes beside token files gives the same prompts again, with either template.
    for template, text in ((render_prompt, published), (ChatTemplate(tokenizer), prompt)):
        written = json.loads(json.dumps(read_row(row).fields(text)))
        assert prompt_and_references(written, "row", template) == (text, ["data"])


SHAREGPT_ANSWER = {"from": "gpt", "value": "data"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("rows", "prompts", "unread"),
    [
        ([{"prompt": "The sky is", "completion": " data"}, {"prompt": [USER], "completion": [ANSWER]}],
         ["The sky is", asked("Hi")], {}),
        ([{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [*EARLIER, USER, ANSWER], "tools": None}],
         [asked("Be short.\n\nHi"), PREAMBLE + "### Instruction:\nOne?\n\n### Response:\n1\n\n" + LAST], {}),
        ([{"instruction": "Hi", "input": "", "output": "data", "text": asked("Hi") + "data"},
          {"system": "Be short.", "instruction": "Hi", "input": "It.", "output": "data"}],
         [asked("Hi"), asked("Be short.\n\nHi", "It.")], {}),
        ([{"id": "a", "conversations": [{"from": "human", "value": "Hi", "weight": 0}, SHAREGPT_ANSWER]},
          {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"},
                             SHAREGPT_ANSWER]}],
         [asked("Hi"), asked("Be short.\n\nHi")], {"conversations, weight": 1}),
        ([{"messages": [{**USER, "train": False}, {**ANSWER, "train": None}]}, {"messages": [USER, ANSWER]}],
         [asked("Hi"), asked("Hi")], {"messages, train": 1}),
    ],
    ids=["TRL prompt and completion", "TRL messages", "Axolotl alpaca", "Axolotl sharegpt", "Axolotl train"],
)  # fmt: skip
def test_example_set_reads_files_of_trl_and_axolotl_unchanged(tokenizer, tmp_path, rows, prompts, unread):
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    examples = ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert [tokenizer.decode(example.prompt) for example in (examples[0], examples[1])] == prompts
    assert [tokenizer.decode(examples[row].response[:-1]).strip() for row in (0, 1)] == ["data", "data"]
    assert examples.unread == unread and examples[0].response[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_read_row_tools_may_be_a_text_as_in_trl(tools):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    messages = [USER, call, {"role": "tool", "name": "add", "content": "3"}, ANSWER]
    row = read_row({"messages": messages, "tools": tools})
    assert row.tools == [TOOL] and row.unread == () and row.references == ["data"]
    for wrong in ("[{", '{"a": 1}', "3"):
        with pytest.raises(UserError, match='"tools"'):
            read_row({"messages": [USER, ANSWER], "tools": wrong})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hi data"}, '"text" and nothing else, in which prompt and response cannot be told apart'),
        ({"text": "Hi data", "id": 3}, "cannot be told apart"),
        ({"messages": [USER]}, 'only "messages": add one'),
        ({"messages": [ANSWER]}, "nothing stands before the assistant's turn"),
        ({"messages": [SYSTEM, ANSWER]}, "nothing is asked"),
        ({"messages": "Hi"}, '"messages" has to be a list of messages, not str'),
        ({"messages": [{"content": "Hi"}, ANSWER]}, 'message 1 of "messages" has no role'),
        ({"messages": [{"role": "narrator", "content": "Hi"}, ANSWER]}, "the role 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "the type 'image_url'"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "has to be a text, not NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "has no text"),
        ({"messages": [USER, {"role": "tool", "content": "3"}, ANSWER]}, "published template has no place"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, '"tools", for which the published template has no'),
        ({"messages": [USER, ANSWER], "output": "other"}, 'an answer in "messages" and another in "output"'),
        ({"instruction": "Hi", "history": "One?", "output": "x"}, '"history" has to be a list of'),
        ({"instruction": "Hi", "history": [["One?"]], "output": "x"}, '"history" has to be a list of'),
        ({"instruction": "Hi", "system": 3, "output": "x"}, '"system" has to be a text, not int'),
        ({"instruction": "Hi", "input": "a", "context": "b", "output": "x"}, 'an "input" and another "context"'),
        ({"system": "A", "messages": [SYSTEM, USER, ANSWER]}, "another system message"),
        ({"prompt": [USER], "completion": [ANSWER, USER]}, 'last message of its "completion"'),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, 'no "output"'),
        ({"instruction": None, "output": "x"}, 'neither "instruction" nor "prompt"'),
    ],
)  # fmt: skip
def test_read_row_names_what_cannot_be_read(row, message):
    with pytest.raises(UserError) as error:
        prompt_and_references(row, "x.jsonl, line 7")
    assert str(error.value).startswith("x.jsonl, line 7: ") and message in str(error.value)


def test_chat_template_that_leaves_out_the_system_message_is_refused(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"line 7: .* leaves out or changes what the system says"):
        ChatTemplate(tokenizer)(read_row({"system": "Be short.", "instruction": "Hi"}), "x.jsonl, line 7")


def said_of(rows, capsys) -> str:
    fields = FieldCounts()
    for row in rows:
        fields.add(read_row(row))
    fields.say("x.jsonl")
    return capsys.readouterr().err


def test_field_counts_name_fields_that_are_not_read(capsys):
    rows = [
        {"instruction": "Hi", "output": "data", "explanation": "since", "category": "a", "note": ""},
        {"instruction": "Hi", "output": "data", "explanation": "since"},
        {"messages": [USER, ANSWER, USER]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
    ]
    assert said_of(rows, capsys) == (
        'x.jsonl: read as "instruction", "output", "messages"; fields not read: "explanation" of 2 rows, '
        '"messages behind the last assistant turn" of 1 rows, "messages, weight" of 1 rows\n'
    )
    alpaca = {"instruction": "Hi", "input": "", "output": "data", "text": "### Instruction: Hi ### Response: data"}
    assert said_of([alpaca], capsys) == ""


def test_example_set_says_once_what_is_not_read(tokenizer, tmp_path, capsys, monkeypatch):
    row = {"instruction": "Say data.", "output": "data", "explanation": "since"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 5)
    ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert capsys.readouterr().err == (
        f'{tmp_path}/train.jsonl: read as "instruction", "output"; fields not read: "explanation" of 5 rows\n'
    )
    monkeypatch.setenv("RANK", "1")
    ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert capsys.readouterr().err == ""
