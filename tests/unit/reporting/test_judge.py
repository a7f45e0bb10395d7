"""tools/judge.py against a stub of an OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.made_results import write_rows

from promptkd.cli.judge import main
from promptkd.errors import exit_with
from promptkd.reporting.judge_server import verdict_of
from promptkd.utils.files import digest_of

ROWS = 30


class Stub(ThreadingHTTPServer):
    """A server whose replies a function chooses: (number of the request, question) -> reply, or (status, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[int, str], str | tuple[int, bytes]] = lambda number, question: "[[C]]"
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        pass  # the client has not waited for a late reply


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        server.requests.append(body)
        server.keys.append(self.headers["Authorization"])
        reply = server.reply(len(server.requests), body["messages"][1]["content"])
        if isinstance(reply, str):
            reply = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        status, content = reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 302:
            self.send_header("Location", f"{server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub():
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def make_results(root: Path) -> list[str]:
    """Two results on one set. The first model's answers are long where the row is even, the second's always medium."""
    file = root / "valid.jsonl"
    write_rows(file, [{"prompt": f"Ask {i}.", "output": "gold"} for i in range(ROWS)])
    folders = []
    for name in ("ours", "theirs"):
        folder = root / name
        (folder / "own/seed10").mkdir(parents=True)
        sizes = [6 if name == "theirs" else 9 if i % 2 == 0 else 3 for i in range(ROWS)]
        write_rows(folder / "own/seed10/answers.jsonl", [{"answer": "word " * size + f"[[{name}]]"} for size in sizes])
        spread = {"mean": 1.0, "std": None}
        entry = {"file": str(file), "sha256": digest_of(file)["sha256"], "rougeL_rows": [[1.0] * ROWS]}
        sets = {"own": entry | {"rougeL": spread, "exact_match": spread}}
        results = {"model": {"path": f"/models/{name}"}, "protocol": {}, "seeds": [10], "sets": sets}
        (folder / "results.json").write_text(json.dumps(results))
        folders.append(str(folder))
    return folders


def prefers_longer(number: int, question: str) -> str:
    first, second = question.split("[Response A]")[1].split("[Response B]")
    sizes = [text.count("word") for text in (first, second)]
    return f"It says more. [[{'A' if sizes[0] > sizes[1] else 'B'}]]"


@pytest.fixture
def judged(tmp_path, monkeypatch, stub):
    """Run the command. Return judge.json."""
    folders = make_results(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*extra: str, url: str = stub.url) -> dict:
        save = str(tmp_path / "judge")
        argv = ["judge.py", *folders, "--base-url", url, "--model", "stub", "--save", save, *extra]
        monkeypatch.setattr("sys.argv", argv)
        main()
        return record()

    def record() -> dict:
        return json.loads((tmp_path / "judge/judge.json").read_text())["sets"]["own"]

    run.record = record
    run.lines = lambda: [json.loads(line) for line in (tmp_path / "judge/judgments.jsonl").read_text().splitlines()]
    return run


def test_judge_counts_outcomes_in_both_orders(judged, stub, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    stub.reply = prefers_longer
    result = judged()
    assert (result["win"], result["tie"], result["loss"]) == (15, 0, 15) and result["not_judged"] == 0
    difference = result["win_minus_loss"]
    assert difference["mean"] == 0 and -45 < difference["low"] < -25 and 25 < difference["high"] < 45
    assert len(stub.requests) == 2 * ROWS and set(stub.keys) == {"Bearer secret"}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in stub.requests} == {("stub", 0, 1024)}
    questions = [body["messages"][1]["content"] for body in stub.requests]
    for row in range(ROWS):
        orders = [question for question in questions if f"\nAsk {row}.\n" in question]
        assert sorted(text.index("[[ours]]") < text.index("[[theirs]]") for text in orders) == [False, True]
    lines = judged.lines()
    assert [line["index"] for line in lines] == list(range(ROWS))
    assert lines[0]["outcome"] == "win" and lines[0]["verdicts"] == ["A", "B"] and "says more" in lines[0]["replies"][0]
    screen = capsys.readouterr().out
    assert "# ours against theirs" in screen and "| own | 30 | 15 | 0 | 15 | 0 | 0 | +0.0 |" in screen
    judged()
    assert len(stub.requests) == 2 * ROWS  # nothing is asked twice


def test_missing_answers_are_refused(judged, stub, tmp_path, capsys):
    answers = tmp_path / "ours/own/seed10/answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as ended:
        exit_with(judged)
    assert ended.value.code == 2 and f"to all {ROWS} examples" in capsys.readouterr().err and not stub.requests


def test_position_bias_cancels(judged, stub):
    stub.reply = lambda number, question: "[[A]]"
    result = judged("--rows", "7", "--parallel", "1")
    assert (result["pairs"], result["win"], result["tie"], result["loss"]) == (7, 0, 7, 0)
    assert result["orders_disagree"] == 7 and result["win_minus_loss"]["mean"] == 0
    long = "[Response A]\n" + "word " * 7
    stub.reply = lambda number, question: "[[C]]" if long in question else prefers_longer(number, question)
    result = judged("--rows", "6", "--overwrite")
    assert (result["win"], result["tie"], result["loss"]) == (0, 3, 3)  # a tie in one order is no win


def test_failures_are_counted_and_asked_again(judged, stub, capsys):
    def faulty(number: int, question: str) -> str | tuple[int, bytes]:
        if number == 6:
            time.sleep(3)
        faults = {
            1: (500, b"{}"), 2: (200, b"no json"), 3: (200, b'{"choices": []}'), 4: "Both [[A]] and [[B]].",
            5: (200, b'{"choices": [{"message": {"content": null}}]}'), 7: (302, b""), 8: "No verdict.",
        }  # fmt: skip
        return faults.get(number) or prefers_longer(number, question)

    stub.reply = faulty
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: judged("--parallel", "1", "--timeout", "2"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1 and f"6 of 60 requests to {stub.url} have no reply" in error and "1 x timeout" in error
    result = judged.record()
    kinds = {"HTTP 500": 1, "malformed": 3, "no verdict": 2, "timeout": 1, "HTTP 302": 1}
    assert result["problems"] == kinds and (result["pairs"], result["not_judged"]) == (30, 4)
    assert result["win"] + result["tie"] + result["loss"] == 26 and (result["win"], result["loss"]) == (13, 13)
    assert [line["outcome"] for line in judged.lines()[:4]] == [None] * 4
    stub.reply, before = prefers_longer, len(stub.requests)
    result = judged()
    assert len(stub.requests) - before == 6
    assert result["problems"] == {"no verdict": 2} and result["not_judged"] == 2


def test_a_server_that_dies_ends_the_comparison_which_resumes(judged, stub, capsys):
    stub.reply = lambda number, question: prefers_longer(number, question) if number <= 10 else (503, b"")
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: judged("--parallel", "1"))
    result = judged.record()
    assert ended.value.code == 1 and (result["pairs"], result["not_judged"]) == (30, 25)
    assert result["problems"] == {"HTTP 503": 20, "given up": 30} and len(stub.requests) in (30, 31)
    with pytest.raises(SystemExit):
        exit_with(lambda: judged(url="http://127.0.0.1:9/v1"))  # nothing listens there
    assert "x connection" in capsys.readouterr().err
    stub.reply, before = prefers_longer, len(stub.requests)
    assert judged()["not_judged"] == 0 and len(stub.requests) - before == 50


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--base-url", "file:///etc/passwd"], "--base-url file:///etc/passwd: not an address"),
        (["--base-url", "http://user:key@localhost/v1"], "without a key"),
        (["--base-url", "http://local host/v1"], "not an address"),
        (["--rows", "0"], "--rows 0"),
        (["--timeout", "0"], "--timeout 0.0 is under"),
        (["--base-url", "http://localhost/v1?key=k"], "without a key"),
        (["--model", ""], "--model is missing"),
        (["--save", ""], "--save or --model is missing"),
    ],
)
def test_bad_options_are_one_line(judged, capsys, extra, says):
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: judged(*extra))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and error.count("\n") == 1


def test_replies_of_another_comparison_or_key_are_refused(judged, stub, monkeypatch, capsys):
    judged("--rows", "2")
    for extra, says in ((["--rows", "3"], "pairs is 3, there it was 2"), (["--model", "x"], "model is x")):
        with pytest.raises(SystemExit):
            exit_with(lambda extra=extra: judged("--rows", "2", *extra))
        assert says in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(SystemExit):
        exit_with(judged)
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["judge.py", "one", "--model", "x"])
    with pytest.raises(SystemExit):
        exit_with(main)
    assert "two result folders come first" in capsys.readouterr().err


def test_verdict_of_needs_one_clear_verdict():
    assert [verdict_of(text) for text in ("so [[B]].", "[[A]] [[A]]", "[[A]] or [[B]]", "[[D]] A", "")] == [
        "B", "A", None, None, None,
    ]  # fmt: skip
    assert verdict_of("<think>[[A]] or [[C]]?</think>[[B]]") == "B"
    assert verdict_of("<think>[[A]], I think, but") is None
