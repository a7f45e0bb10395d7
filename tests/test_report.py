"""tools/report.py on made-up result folders: what the table says, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import start

from promptkd.errors import UserError
from promptkd.evaluation.tables import over_seeds
from promptkd.reporting.report import write_report
from promptkd.reporting.results import check_comparable, read_result

SCORES = {"sft": [60.0, 62.0], "kd": [61.5, 61.7], "promptkd": [70.0, 71.0], "teacher": [80.0, 82.0]}


def make_result(root: Path, name: str, sets: tuple[str, ...] = ("test",), **changes) -> str:
    folder = root / name
    for set_name in sets:
        (folder / "eval" / set_name / "seed10").mkdir(parents=True)
        answers = [{"index": i, "answer": f"a|{name} {i}"} for i in range(2)]
        write_rows(folder / "eval" / set_name / "seed10/answers.jsonl", answers)
    file = root / "valid.jsonl"
    write_rows(file, [{"prompt": f"Ask\n{i}", "output": f"gold {i}"} for i in range(2)])
    train = {"event": "train", "step_seconds": 0.5, "loss": 1.0}
    if name == "promptkd":
        train |= {"prompt_drift": 0.1, "prompt_kd_loss": 0.3, "prompt_base_loss": 0.2, "student_loss": 0.4}
    dev = [{"event": "eval", "step": step, "dev_loss": 2.0 - step, "rougeL": 10.0 * step} for step in (0, 2)]
    write_rows(folder / "metrics.jsonl", [dev[0], *({**train, "step": step} for step in (1, 2)), dev[1]])
    config = {"settings": {"method": name, "lr": 0.1}, "commit": "abc", "python": "3", "versions": {"torch": "2"}}
    (folder / "config.json").write_text(json.dumps(config))
    scores = over_seeds(SCORES[name])
    entry = {"rougeL": scores, "exact_match": scores, "sha256": "0", "file": str(file)}
    results = {
        "model": {"path": f"{folder}/last"}, "protocol": {"top_k": 0}, "seeds": [10, 20],
        "sets": dict.fromkeys(sets, entry), **changes,
    }  # fmt: skip
    (folder / "eval/results.json").write_text(json.dumps(results))
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_script_prints_the_table_and_writes_report_and_picture(tmp_path):
    folders = [make_result(tmp_path, name) for name in ("sft", "kd", "promptkd")]
    references = ["--references", make_result(tmp_path, "teacher"), "--title", "All of it"]
    done = start([*folders, *references, "--save", str(tmp_path / "out")], script="tools/report.py")
    assert done.returncode == 0, done.stderr
    assert "| SFT | 61.00 ± 1.41 | 61.00 ± 1.41 | 2 | 1 s |" in done.stdout
    assert "| PromptKD | **70.50 ± 0.71** | **70.50 ± 0.71** | 2 | 1 s |" in done.stdout
    assert "| *teacher* | 81.00 ± 1.41 | 81.00 ± 1.41 | 2 | 1 s |" in done.stdout
    assert "test: PromptKD 70.50, KD 61.60, SFT 61.00 (teacher 81.00)" in done.stdout
    assert "Closer than the spread over seeds: KD and SFT." in done.stdout
    report = (tmp_path / "out/report.md").read_text()
    assert report.startswith("# All of it\n") and done.stdout.partition("\n\n")[0] in report
    assert "| Ask 1 | gold 1 | a\\|sft 1 | a\\|kd 1 | a\\|promptkd 1 | a\\|teacher 1 |" in report
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_several_sets_have_a_column_each(tmp_path):
    results = [read_result(make_result(tmp_path, name, ("dolly", "vicuna"))) for name in ("sft", "kd")]
    shown = write_report("Two", results, [], 0, tmp_path / "out")
    assert shown.startswith("| model | dolly: ROUGE-L | vicuna: ROUGE-L | steps | training |")
    assert "Answers" not in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("changes, what", [({"seeds": [10]}, "seeds"), ({"protocol": {"top_k": 5}}, "protocol")])
def test_results_of_different_kinds_are_refused(changes, what, tmp_path):
    results = [read_result(make_result(tmp_path, "sft")), read_result(make_result(tmp_path, "kd", **changes))]
    with pytest.raises(UserError, match=f"different {what}"):
        check_comparable(results)


def test_what_is_missing_is_named_with_its_remedy(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_result(str(tmp_path / "none"))
    folder = Path(make_result(tmp_path, "sft"))
    (folder / "eval/results.json").unlink()
    with pytest.raises(UserError, match=r"evaluate.py --save .*/sft/eval writes it"):
        read_result(str(folder))
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no result folder"):
        read_result(str(folder))
    done = start(["--save", str(tmp_path / "out")], script="tools/report.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
