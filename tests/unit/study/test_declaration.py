"""Declarations of studies: what is wrong is named in one line, and the shipped ones are right."""

from __future__ import annotations

import pytest
import yaml
from helpers.fake_study import STUDY
from helpers.training import ROOT

from promptkd.cli.train import read_settings
from promptkd.config.option_file import as_arguments
from promptkd.errors import UserError
from promptkd.study.declaration import read_study
from promptkd.study.grid import Grid


def changed(tmp_path, change):
    content = yaml.safe_load(STUDY)
    change(content)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


WRONG = [
    (lambda c: c.pop("updates"), "lacks 'updates'"),
    (lambda c: c.update(rate=[1]), "unknown key 'rate'"),
    (lambda c: c.update(updates="many"), "updates: int expected, not str"),
    (lambda c: c.update(updates=0), "updates is 0"),
    (lambda c: c.update(reference="KD"), "reference KD is none of the methods"),
    (lambda c: c.update(rates=[0.002, 0.001, 0.004]), "rates are not at least three ascending"),
    (lambda c: c["methods"]["SFT"].update(lr=1), "methods, SFT: unknown key 'lr'"),
    (lambda c: c["methods"]["frozen"].update(like="KD"), "frozen: like KD is none"),
    (lambda c: c["methods"].update({"a/b": {}}), "'a/b' is not a name"),
    (lambda c: c["methods"]["SFT"].update(options={"x": {1, 2}}), "x is a set"),
    (lambda c: c["prepare"][0].pop("product"), "prepare, data lacks 'product'"),
    (lambda c: c["prepare"][0].update(after=["models"]), "after has models"),
    (lambda c: c["experiments"]["updates"].update(methods=["KD"]), "methods has KD"),
    (lambda c: c["experiments"]["updates"].update(pairs=["big"]), "pairs has big"),
    (lambda c: c["experiments"]["updates"].update(seeds=[1, 1]), "seeds are empty or occur twice"),
    (lambda c: c["experiments"]["updates"].update(budget="money"), "budget is money"),
    (lambda c: c["experiments"].update(rates=c["experiments"].pop("updates")), "rates is the name of a stage"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_read_study_names_the_wrong_key_in_one_line(change, message, tmp_path):
    with pytest.raises(UserError) as caught:
        read_study(changed(tmp_path, change), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1\na: 2", ""])
def test_read_study_refuses_what_is_no_mapping(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        read_study(str(tmp_path / "bad.yaml"), tmp_path)


@pytest.mark.parametrize("name", ["small", "gpu"])
def test_shipped_studies_have_options_that_train_py_accepts(name, tmp_path):
    study = read_study(str(ROOT / f"scripts/study/{name}.yaml"), tmp_path)
    runs = list(Grid(study, {}, set()).runs("rates"))
    assert {run.method for run in runs} == {key for key, each in study.methods.items() if not each.like}
    for run in {run.method: run for run in runs}.values():
        assert read_settings(as_arguments(run.settings, "")).optimizer.total_iters == study.updates
    for method in study.methods.values():
        if method.like:
            base = study.methods[method.like].options
            options = {**study.train, **next(iter(study.pairs.values())), **base, **method.options}
            read_settings(as_arguments(options, ""))
