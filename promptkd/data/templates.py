"""How a row becomes a prompt: by the published instruction template, or by a tokenizer's chat template.

`promptkd.data.rows` says what rows may look like. The published template has a place for an instruction and an input.
What else a row says stands there as follows: the system message before the first instruction, within its section, with
an empty line between them; the turns of a history as sections of their own, `### Instruction:` for a user and
`### Response:` for the assistant. The system message of a ready prompt stands before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from promptkd.data.chat_arguments import arguments_of, render
from promptkd.data.messages import ANSWERED_BY
from promptkd.data.rows import Row, read_row, reference_texts
from promptkd.data.thoughts import SWITCHES, has_marker, thought_markers
from promptkd.errors import UserError

Template = Callable[[Row | dict[str, Any], str], str]  # row, its file and place (for errors) -> prompt

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SECTIONS = {"user": "### Instruction:\n", ANSWERED_BY: "### Response:\n"}
ASKED, SAID = "WHATISASKED", "WHATISSAID"  # stand for texts where only what a template puts around them counts


def template_of(name: str, tokenizer) -> Template:
    """The template called "published" or "chat". Raises UserError where the tokenizer has no chat template."""
    return ChatTemplate(tokenizer) if name == "chat" else render_prompt


def render_prompt(row: Row | dict[str, Any], where: str = "row") -> str:
    """The text a model is asked: the row's own prompt, or the published template around its conversation."""
    row = row if isinstance(row, Row) else read_row(row, where)
    if row.prompt is not None:
        return f"{row.system}\n\n{row.prompt}" if row.system and not row.turns else row.prompt
    roles = [turn["role"] for turn in row.turns]
    if row.tools or not set(roles) <= set(SECTIONS) or roles[-1] != "user" or any("tool_calls" in t for t in row.turns):
        found = '"tools"' if row.tools else f"turns of {', '.join(dict.fromkeys(roles))}, the last of {roles[-1]}"
        raise UserError(f"{where}: it has {found}, for which the published template has no place: --template chat")
    texts = [turn["content"] for turn in row.turns]
    if row.system:
        first = roles.index("user")
        texts[first] = f"{row.system}\n\n{texts[first]}"
    *earlier, last = texts
    history = "".join(f"{SECTIONS[role]}{text}\n\n" for role, text in zip(roles, earlier))
    asked = (WITH_INPUT if row.input else WITHOUT_INPUT).format(instruction=last, input=row.input)
    preamble, section, rest = asked.partition(SECTIONS["user"])
    return preamble + history + section + rest


class ChatTemplate:
    """A row's conversation by the tokenizer's own template; then the assistant's turn begins.

    An instruction, and its input below it, is what a user says. Where a row has a "prompt" beside its turns, another
    template made it (the published test sets have one), and it is not used; a row with nothing else says it as the
    user. A prompt that this template made before stays as it is.

    Templates of models that think write an empty thought before a plain answer, or open a thought where an answer has
    to begin. Training responses and references are plain answers. So a prompt is what the template itself writes before
    such an answer, unless --chat-template-kwargs asks for thoughts: then it is the template's generation prompt.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"--template chat: the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "take an instruct model's, or leave --template out"
            )
        self.answers_plainly = False
        head, said, self.tail = self._render([{"role": "user", "content": ASKED}]).partition(ASKED)
        if not said:
            raise UserError(
                f"--template chat: the chat template of {tokenizer.name_or_path} leaves out what the user says: "
                "take another model's, or leave --template out"
            )
        self.heads = {text.partition("\n")[0] for text in (head, self._head_of_system_messages() or head)}
        self.tails = [self.tail]
        plain = self._tail_of_plain_answers()
        if plain not in (None, self.tail) and has_marker(self.tail + plain, thought_markers(tokenizer)):
            self.tails.append(plain)
            self.answers_plainly = not any(arguments_of(tokenizer).values.get(switch) for switch in SWITCHES)
            self.tail = plain if self.answers_plainly else self.tail

    def __call__(self, row: Row | dict[str, Any], where: str = "row") -> str:
        row = row if isinstance(row, Row) else read_row(row, where)
        if row.prompt is not None and self.made(row.prompt):
            return row.prompt
        messages = row.messages if row.turns else [*row.messages, {"role": "user", "content": row.prompt}]
        prompt = self._render(messages, row.tools, where)
        for message in messages:
            if message["role"] in ("system", "user") and message["content"].strip() not in prompt:
                raise UserError(
                    f"{where}: the chat template of {self.tokenizer.name_or_path} leaves out or changes what the "
                    f"{message['role']} says: take it out of the row, or leave --template out"
                )
        return prompt

    def made(self, prompt: str) -> bool:
        """Whether this template made a prompt, perhaps with another system prompt or on another day (Llama 3.2 writes
        the date): its first line and its end tell. Of a template that puts nothing around, none is made."""
        around = ((head, tail) for head in self.heads for tail in self.tails if head or tail)
        return any(prompt.startswith(head) and prompt.endswith(tail) for head, tail in around)

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, where: str = "") -> str:
        how = {"tools": tools} if tools else {}
        try:
            if not self.answers_plainly:
                return render(self.tokenizer, messages, add_generation_prompt=True, **how)
            said = render(self.tokenizer, [*messages, {"role": ANSWERED_BY, "content": SAID}], **how)
            return said.rpartition(SAID)[0]
        except Exception as error:  # the template is a program that others wrote; jinja's sandbox runs it
            place = f"{where}: " if where else ""
            raise UserError(
                f"{place}--template chat: the chat template of {self.tokenizer.name_or_path} cannot be used ({error}): "
                "take another model's, or leave --template out"
            ) from None

    def _head_of_system_messages(self) -> str | None:
        """What the template writes before a system message; None where it has no place for one."""
        messages = [{"role": "system", "content": ASKED}, {"role": "user", "content": SAID}]
        try:
            head, said, _ = render(self.tokenizer, messages, add_generation_prompt=True).partition(ASKED)
        except Exception:  # a template may refuse them, as Gemma's does
            return None
        return head if said else None

    def _tail_of_plain_answers(self) -> str | None:
        """What the template writes between a user's text and a plain answer; None where it cannot be told."""
        messages = [{"role": "user", "content": ASKED}, {"role": ANSWERED_BY, "content": SAID}]
        try:
            before, said, _ = render(self.tokenizer, messages).rpartition(SAID)
        except Exception:  # a template may refuse finished conversations
            return None
        _, asked, tail = before.partition(ASKED)
        return tail if said and asked else None


def end_of_turn_id(tokenizer) -> int:
    """The token that ends what an assistant says: the chat template's, which need not be end-of-text (Gemma, Phi 3)."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": ASKED}, {"role": ANSWERED_BY, "content": SAID}]
    try:
        _, _, behind = render(tokenizer, messages).partition(SAID)
    except Exception:  # others wrote it; who asks for it with --template chat is told so there
        return tokenizer.eos_token_id
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special_token_ids(tokenizer)), tokenizer.eos_token_id)


def response_stop_ids(tokenizer, prompts: list[str]) -> list[int]:
    """The token that ends the response to each prompt: end-of-text, behind a chat template's prompt its turn's end."""
    end = end_of_turn_id(tokenizer)
    if end == tokenizer.eos_token_id:
        return [end] * len(prompts)
    chat = ChatTemplate(tokenizer)
    return [end if chat.made(prompt) else tokenizer.eos_token_id for prompt in prompts]


def special_token_ids(tokenizer) -> set[int]:
    """Tokens that stand for no text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def prompt_and_references(
    row: dict[str, Any] | Row, where: str = "row", template: Template = render_prompt
) -> tuple[str, list[str]]:
    """A row's prompt by `template`, and its gold texts."""
    row = row if isinstance(row, Row) else read_row(row, where)
    return template(row, where), reference_texts(row, where)
