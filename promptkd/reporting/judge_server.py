"""Ask a judge behind an OpenAI-compatible server which of two answers is better."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

KEY = "OPENAI_API_KEY"
LARGEST_REPLY = 1 << 22  # bytes
SYSTEM = (
    "You compare two responses to the same instruction. Decide which one follows the instruction better. Consider "
    "helpfulness, relevance, accuracy, depth and detail. Neither the order of the responses nor their length counts. "
    "Explain your decision in a few sentences. Then end with your verdict: [[A]] if response A is better, [[B]] if "
    "response B is better, [[C]] for a tie."
)
# Host, port and path. No "@" or "?", which introduce keys: the address is recorded.
ADDRESS = re.compile(r"https?://([a-zA-Z\d.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[!->A-~]*)?")
LONGEST_WAIT = 86400.0  # seconds, which a socket can count
VERDICT = re.compile(r"\[\[([ABC])\]\]")


class NoReply(Exception):
    """The server gave no reply. The text is the kind of failure: "timeout", "HTTP 500", "connection", "malformed"."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Report redirects as errors, because urllib would send the key on to another server."""

    def redirect_request(self, *_: object) -> None:
        return None


@dataclass(frozen=True)
class JudgeServer:
    """A model on a server.

    Attributes:
        base_url: The address of the server's API, such as http://localhost:8000/v1.
        model: The model's name on the server.
        timeout: Seconds to wait for the server.
        max_tokens: Maximum number of tokens in a reply.
    """

    base_url: str
    model: str
    timeout: float
    max_tokens: int

    def __post_init__(self) -> None:
        if not ADDRESS.fullmatch(self.base_url):
            raise UserError(f"--base-url {self.base_url}: not an address without a key: give http://localhost:8000/v1")
        key = os.environ.get(KEY, "")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} in the environment holds characters that no key has: correct it")

    def ask(self, prompt: str, first: str, second: str) -> str:
        """Return the judge's reply about two answers, of which it reads `first` as response A.

        Raises:
            NoReply: The server did not answer, or not in the API's format.
        """
        question = f"[Instruction]\n{prompt}\n\n[Response A]\n{first}\n\n[Response B]\n{second}\n\n[End of responses]"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            connection = urllib.request.build_opener(_NoRedirect)
            with connection.open(request, timeout=min(self.timeout, LONGEST_WAIT)) as response:
                reply = parse_json(response.read(LARGEST_REPLY).decode())["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            error.close()
            raise NoReply(f"HTTP {error.code}") from None
        except (OSError, OverflowError, http.client.HTTPException) as error:  # overflow: of the port
            late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            raise NoReply("timeout" if late else "connection") from None
        except (ValueError, LookupError, TypeError):
            raise NoReply("malformed") from None
        if not isinstance(reply, str):
            raise NoReply("malformed")
        return reply


def verdict_of(reply: str) -> str | None:
    """Return "A", "B" or "C" for a tie, or None if the reply has no verdict or different ones."""
    verdicts = set(VERDICT.findall(reply))
    return verdicts.pop() if len(verdicts) == 1 else None
