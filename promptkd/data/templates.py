"""How a row of jsonl becomes a prompt: by the published instruction template, or by a tokenizer's chat template.

A row is {"instruction", "input", "output"}, or has a ready "prompt" and "output" (or "response"). "output" may be a
list of references, the first is the response.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from promptkd.errors import UserError

Template = Callable[[dict[str, Any], str], str]  # row, where it stands (for errors) -> prompt

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


def template_of(name: str, tokenizer) -> Template:
    """The template called "published" or "chat". Raises UserError where the tokenizer has no chat template."""
    return ChatTemplate(tokenizer) if name == "chat" else render_prompt


def render_prompt(row: dict[str, Any], where: str = "row") -> str:
    """The text a model is asked: the row's own "prompt", or the published template around instruction and input."""
    if "prompt" in row:
        return _ready_prompt(row, where)
    if "instruction" not in row:
        raise UserError(f'{where}: it has neither "instruction" nor "prompt", only {_keys(row)}')
    instruction = _text(row, "instruction", where)
    if "input" in row and (context := _text(row, "input", where)):
        return WITH_INPUT.format(instruction=instruction, input=context)
    return WITHOUT_INPUT.format(instruction=instruction)


class ChatTemplate:
    """A row's instruction, and its input below, as what a user says; then the assistant's turn begins.

    Any instruct model's tokenizer brings its own template. Where a row has a "prompt" beside its instruction, that is
    another template's work (the published test sets have one) and passed by; a row that has a "prompt" alone says it
    as the user. A prompt that went through this template before stays as it is.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"--template chat: the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "take an instruct model's, or leave --template out"
            )
        mark = "SAID"
        self.head, said, self.tail = self._render(mark).partition(mark)
        if not said:
            raise UserError(
                f"--template chat: the chat template of {tokenizer.name_or_path} leaves out what the user says: "
                "take another model's, or leave --template out"
            )

    def __call__(self, row: dict[str, Any], where: str = "row") -> str:
        prompt = _ready_prompt(row, where) if "prompt" in row else ""
        if "instruction" not in row and not prompt:
            raise UserError(f'{where}: it has neither "instruction" nor "prompt", only {_keys(row)}')
        if self.made(prompt):
            return prompt
        if "instruction" not in row:
            return self._render(prompt)
        said = [_text(row, key, where) for key in ("instruction", "input") if key in row]
        return self._render("\n\n".join(text for text in said if text))

    def made(self, prompt: str) -> bool:
        """Whether a prompt went through this template, perhaps with another system prompt or on another day (Llama 3.2
        writes the date): its first line and its end tell. Of a template that puts nothing around, none is made."""
        first = self.head.partition("\n")[0]
        return bool(first or self.tail) and prompt.startswith(first) and prompt.endswith(self.tail)

    def _render(self, said: str) -> str:
        messages = [{"role": "user", "content": said}]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is a program that others wrote; jinja's sandbox runs it
            raise UserError(
                f"--template chat: the chat template of {self.tokenizer.name_or_path} cannot be used ({error}): "
                "take another model's, or leave --template out"
            ) from None


def turn_end(tokenizer) -> int:
    """The token that ends what an assistant says: the chat template's, which need not be end-of-text (Gemma, Phi 3)."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "ASKED"}, {"role": "assistant", "content": "SAID"}]
    try:
        _, _, behind = tokenizer.apply_chat_template(messages, tokenize=False).partition("SAID")
    except Exception:  # others wrote it; who asks for it with --template chat is told so there
        return tokenizer.eos_token_id
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in marks(tokenizer)), tokenizer.eos_token_id)


def response_ends(tokenizer, prompts: list[str]) -> list[int]:
    """The token that ends the response to each prompt: end-of-text, behind a chat template's prompt its turn's end."""
    end = turn_end(tokenizer)
    if end == tokenizer.eos_token_id:
        return [end] * len(prompts)
    chat = ChatTemplate(tokenizer)
    return [end if chat.made(prompt) else tokenizer.eos_token_id for prompt in prompts]


def marks(tokenizer) -> set[int]:
    """Tokens that stand for no text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def reference_texts(row: dict[str, Any], where: str = "row") -> list[str]:
    """The gold texts of a row: "output", a text or a list of texts; beside a ready prompt also "response"."""
    key = "response" if "prompt" in row and "output" not in row else "output"
    if key not in row:
        raise UserError(f'{where}: it has no "output" (or "prompt" and "response"), only {_keys(row)}')
    if not isinstance(row[key], list):
        return [_text(row, key, where)]
    if not row[key]:
        raise UserError(f'{where}: its list "{key}" is empty: give it a text')
    return [_text({key: text}, key, where) for text in row[key]]


def prompt_and_references(
    row: dict[str, Any], where: str = "row", template: Template = render_prompt
) -> tuple[str, list[str]]:
    return template(row, where), reference_texts(row, where)


def _ready_prompt(row: dict[str, Any], where: str) -> str:
    prompt = _text(row, "prompt", where)
    if not prompt:
        raise UserError(f'{where}: its "prompt" is empty: give it a text')
    return prompt


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" has to be a text, not {type(value).__name__}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half a character (a lone surrogate): correct it') from None
    return value


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in islice(row, 8)) or "no key at all"
