"""Ask a judge behind an OpenAI-compatible server which of two answers is better."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import httpx2

from promptkd.config.values import at_least, option
from promptkd.data.thoughts import ALWAYS, without_thoughts
from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

KEY = "OPENAI_API_KEY"
SYSTEM = (
    "You compare two responses to the same instruction. Decide which one follows the instruction better. Consider "
    "helpfulness, relevance, accuracy, depth and detail. Neither the order of the responses nor their length counts. "
    "Explain your decision in a few sentences. Then end with your verdict: [[A]] if response A is better, [[B]] if "
    "response B is better, [[C]] for a tie."
)
# Host, port and path. No "@" or "?", which introduce keys: the address is recorded.
ADDRESS = re.compile(r"https?://([a-zA-Z\d.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[!->A-~]*)?")
VERDICT = re.compile(r"\[\[([ABC])\]\]")


class Reply(NamedTuple):
    """The judge's text or, where the server gave none, the kind of failure."""

    text: str = ""
    failure: str = ""  # "timeout", "HTTP 500", "connection" or "malformed"


@dataclass(frozen=True)
class JudgeSettings:
    """The options of the command."""

    base_url: str = option("", "address of the server's API, such as http://localhost:8000/v1")
    model: str = option("", "name of the judge on the server")
    timeout: float = option(120.0, "seconds to wait for the server")
    max_tokens: int = option(1024, "maximum number of tokens in a reply of the judge")
    parallel: int = option(8, "number of requests at a time")
    save: str = option("results/judge", "output folder")
    overwrite: bool = option(False, "replace replies of another comparison in --save")
    rows: int | None = option(None, "judge only the first N rows of each test set")
    mixed: bool = option(False, "allow results of different protocols, seeds or test sets")

    def __post_init__(self) -> None:
        if not (self.base_url and self.save and self.model):
            raise UserError("--base-url, --save or --model is missing: --help shows an example")
        if not ADDRESS.fullmatch(self.base_url):
            raise UserError(f"--base-url {self.base_url}: not an address without a key: give http://localhost:8000/v1")
        at_least(0.01, timeout=self.timeout)
        at_least(1, max_tokens=self.max_tokens, parallel=self.parallel, rows=1 if self.rows is None else self.rows)
        key = os.environ.get(KEY, "")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} in the environment holds characters that no key has: correct it")


def ask(settings: JudgeSettings, prompt: str, first: str, second: str) -> Reply:
    """Let the judge compare two answers, of which it reads `first` as response A. Redirects are not followed."""
    question = f"[Instruction]\n{prompt}\n\n[Response A]\n{first}\n\n[Response B]\n{second}\n\n[End of responses]"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": settings.model, "messages": messages, "temperature": 0, "max_tokens": settings.max_tokens}
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{settings.base_url.rstrip('/')}/chat/completions"
    is_https = url.startswith("https:")  # Otherwise no certificates are loaded, which takes 30 ms.
    try:
        response = httpx2.post(url, json=body, headers=headers, timeout=settings.timeout, verify=is_https)
        text = parse_json(response.raise_for_status().text)["choices"][0]["message"]["content"]
        return Reply(text) if isinstance(text, str) else Reply(failure="malformed")
    except httpx2.TimeoutException:
        return Reply(failure="timeout")
    except httpx2.HTTPStatusError as error:
        return Reply(failure=f"HTTP {error.response.status_code}")
    except (httpx2.RequestError, httpx2.InvalidURL, OverflowError):  # overflow: of a timeout of many years
        return Reply(failure="connection")
    except (ValueError, LookupError, TypeError):
        return Reply(failure="malformed")


def verdict_of(reply: str) -> str | None:
    """Return "A", "B" or "C" for a tie, or None if the reply, without thoughts, has no verdict or different ones."""
    verdicts = set(VERDICT.findall(without_thoughts(reply, ALWAYS)[0]))
    return verdicts.pop() if len(verdicts) == 1 else None
