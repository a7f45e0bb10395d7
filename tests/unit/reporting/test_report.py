"""Test tools/report.py on result folders with invented scores: tables, page and refused input."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.made_results import HOSTILE, contents, make_result, write_rows
from helpers.training import start

from promptkd.errors import UserError
from promptkd.reporting.bootstrap import paired_bootstrap
from promptkd.reporting.costs import cost
from promptkd.reporting.report import find_baseline, write_report
from promptkd.reporting.results import check_comparable, read_result


@pytest.fixture(scope="module")
def script_report(tmp_path_factory):
    """Run the script. Return its output and the folder that it wrote."""
    root = tmp_path_factory.mktemp("report")
    folders = [make_result(root, name) for name in ("sft", "kd", "promptkd")]
    references = ["--references", make_result(root, "teacher"), "--title", "All", "of", "<it>", "--baseline", "sft"]
    done = start([*folders, *references, "--save", str(root / "out")], script="tools/report.py")
    assert done.returncode == 0, done.stderr
    return done.stdout, root / "out"


def test_report_script_prints_scores_and_differences(script_report):
    printed, save = script_report
    assert "| SFT | 61.00 ± 1.41 | 61.00 ± 1.41 |" in printed
    assert "| PromptKD | **70.50 ± 0.71** | **70.50 ± 0.71** |" in printed
    assert "| *teacher* | 81.00 ± 1.41 | 81.00 ± 1.41 |" in printed
    assert "test: PromptKD 70.50, KD 61.60, SFT 61.00 (teacher 81.00)" in printed
    assert "Closer than the spread over seeds: KD and SFT." in printed
    assert "| PromptKD | +9.50 | +9.50 to +9.50 | \\< 0.001 |" in printed
    report = (save / "report.md").read_text()
    assert report.startswith("# All of <it>\n") and printed.partition("\n\n")[0] in report
    assert "fewer rows than in the paper's table: test (41 of 10,000)." in report
    assert "| PromptKD | 3.0 | -1.0 to 7.0 |" in report
    escaped = "\\</td>\\<script>alert(1)\\</script> a\\|b & \\<img src=http://x/y>"
    assert f"| Ask 1 | gold 1 | {escaped} sft 1 | {escaped} kd 1 |" in report
    assert (save / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_costs_come_from_config_and_metrics(script_report):
    report = (script_report[1] / "report.md").read_text()
    assert "| PromptKD | 2 | 1 s | 0.50 | 1.50 | 1,000 | 1,558,000,000 | 11,200 | 0.00072 |" in report
    assert "| SFT | 2 | 1 s | 0.50 | 1.50 | 1,000 | 1,558,000,000 | - | - |" in report
    numbers = json.loads((script_report[1] / "report.json").read_text())
    models = {model["name"]: model for model in numbers["models"]}
    assert numbers["baseline"] == "sft" and models["teacher"]["reference"] and models["sft"]["sets"]["test"]
    assert models["promptkd"]["cost"]["prompt_share"] == pytest.approx(100 * 11200 / 1.558e9)
    assert models["sft"]["sets"]["test"]["difference"] is None
    assert models["kd"]["sets"]["test"]["difference"]["mean"] == pytest.approx(0.6)


def test_cost_ignores_pauses_and_spreads_rollouts_over_steps(tmp_path):
    folder = Path(make_result(tmp_path, "sft"))
    rows = []
    for step in range(1, 41):  # every fourth makes the rollouts of four, and the run was stopped for an hour in two
        parts = {"rollout_seconds": 8.0 if step % 4 == 1 else 0.0003, "student_seconds": 2.0 + 0.01 * (step % 3)}
        parts["student_seconds"] += 3600 * (step == 7)
        parts["rollout_seconds"] += 3600 * (step == 9)
        rows.append({"event": "train", "step": step, **parts, "step_seconds": sum(parts.values()) + 0.1})
        rows[-1]["peak_memory_gb"] = 1.5 if step < 20 else 1.0
    write_rows(folder / "metrics.jsonl", rows)
    assert cost(read_result(str(folder))).seconds == pytest.approx(40 * (2.01 + 8 / 4 + 0.1), rel=1e-3)
    for exact, peak in (([1.3, 1.41], 1.41), ([1.1], 1.5)):  # the second: of a process that took the last steps alone
        (folder / "memory.json").write_text(json.dumps({"peak_memory_gb": exact}))
        assert cost(read_result(str(folder))).peak_memory_gb == peak


class Page(HTMLParser):
    """Collect the tags, links and texts of a page, and check that its elements are closed in order."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_html_page_is_well_formed_self_contained_and_escaped(script_report):
    text = (script_report[1] / "report.html").read_text()
    page = Page(text)
    assert not page.open and "script" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") for link in page.links) and "@import" not in text
    assert all(part.startswith("#") for part in (piece.split(")")[0] for piece in text.split("url(")[1:]))
    assert f"{HOSTILE} sft 1" in page.texts and "All of <it>" in page.texts
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    pictures = [piece.partition("</svg>")[0] for piece in text.split("<svg")[1:]]
    assert len(pictures) == 6  # dev loss, ROUGE-L, losses, drift, exposure bias at the end and throughout
    for picture in pictures:
        ElementTree.fromstring(f"<svg{picture}</svg>")
        assert "currentColor" in picture


def test_paired_bootstrap_separates_equal_from_different_scores():
    rows = [[float(i * 37 % 11) for i in range(200)] for _ in range(2)]
    same = paired_bootstrap(rows, rows)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    noise = [[score + (3 if i % 2 else -3) for i, score in enumerate(seed)] for seed in rows]
    assert paired_bootstrap(noise, rows).p > 0.9
    better = [[score + 1 for score in seed] for seed in noise]
    difference = paired_bootstrap(better, rows)
    assert difference.mean == pytest.approx(1) and difference.low > 0 and difference.p < 0.001
    assert difference == paired_bootstrap(better, rows)
    worse = paired_bootstrap(rows, better)
    assert worse.mean == pytest.approx(-1) and worse.p == difference.p
    weak = paired_bootstrap([[score + 0.2 for score in seed] for seed in noise], rows)
    assert 0.2 < weak.p < 0.5 and weak.low < 0 < weak.high  # 0.2 is 0.94 standard errors of 3 / sqrt(200)


def test_paired_bootstrap_matches_hand_computed_cases():
    """Compare p-values with counted resamplings.

    Differences 3 and -1 resample to means of -1, 1 and 3 with probabilities 1/4, 1/2 and 1/4. Differences 2, 1 and 0
    resample to a mean as far away as the observed one in 2 of 27 cases.
    """
    difference = paired_bootstrap([[4.0, 0.0], [2.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (difference.mean, difference.low, difference.high) == (1, -1, 3) and difference.p == pytest.approx(
        1 / 2, abs=0.02
    )
    assert paired_bootstrap([[2.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]).p == pytest.approx(2 / 27, abs=0.01)


def test_score_table_has_a_column_for_each_set(tmp_path):
    results = [read_result(make_result(tmp_path, name, ("dolly", "vicuna"))) for name in ("sft", "kd")]
    shown = write_report(contents(results), tmp_path / "out")
    assert shown.startswith("| model | dolly: ROUGE-L | vicuna: ROUGE-L |")
    assert "Answers" not in (tmp_path / "out/report.md").read_text()
    with pytest.raises(UserError, match="--baseline best: no result has this name: use one of sft, kd"):
        find_baseline("best", results)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [10]}, r"seeds \(\[10, 20\] and \[10\]\)"),
        ({"protocol": {"top_k": 5}}, r"protocol \(top_k 0 and 5\)"),
    ],
)
def test_check_comparable_refuses_other_protocols_unless_mixed(changes, message, tmp_path):
    results = [read_result(make_result(tmp_path, "sft")), read_result(make_result(tmp_path, "kd", **changes))]
    with pytest.raises(UserError, match=f"different {message}.*--mixed"):
        check_comparable(results)
    check_comparable(results, mixed=True)
    write_report(contents(results, "sft"), tmp_path / "out")
    assert "Different protocols" in (tmp_path / "out/report.html").read_text()


def test_score_table_shows_missing_sets_as_dashes(tmp_path):
    results = [
        read_result(make_result(tmp_path, "sft", ("dolly", "own"))),
        read_result(make_result(tmp_path, "kd", ("dolly",))),
    ]
    with pytest.raises(UserError, match="own in one only"):
        check_comparable(results)
    assert "| KD | **61.60 ± 0.14** | - |" in write_report(contents(results, "sft"), tmp_path / "out")


def test_read_result_names_missing_files_and_their_remedy(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_result(str(tmp_path / "none"))
    folder = Path(make_result(tmp_path, "sft"))
    assert read_result(f"Mine={folder}").name == "Mine"
    with pytest.raises(UserError, match=r"called sft.*NAME=FOLDER"):
        check_comparable([read_result(str(folder))] * 2)
    alone = read_result(str(folder / "eval"))  # the run is found beside the model
    assert alone.metrics and alone.answers("test")[1].endswith("sft 1")
    (folder / "eval/results.json").unlink()
    with pytest.raises(UserError, match=r"evaluate.py --save .*/sft/eval writes it"):
        read_result(str(folder))
    done = start(["--save", str(tmp_path / "out"), str(folder)], script="tools/report.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "result folders come first: report.py FOLDER... [options]" in done.stderr


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("eval/results.json", "{", "no readable JSON"),
        ("eval/results.json", "[]", "no JSON object"),
        ("eval/results.json", '{"model": {"path": "x"}, "protocol": {}, "seeds": [1], "sets": {"a": {}}}', "lacks"),
        ("metrics.jsonl", '{"event": "train", "step": 1}\n{"event\n{"event": "train", "step": 3}\n', "line 2"),
        ("config.json", "{}", "settings"),
        ("exposure_bias/exposure_bias.json", '{"ex_acc_err": [1]}', "lacks 'mean_R'"),
    ],
)
def test_read_result_names_broken_files(file, text, message, tmp_path):
    folder = make_result(tmp_path, "sft")
    (tmp_path / "sft" / file).write_text(text)
    with pytest.raises(UserError, match=f"{file.rpartition('/')[2]}.*{message}"):
        read_result(folder)
