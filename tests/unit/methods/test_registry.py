"""Methods from outside: the decorator, entry points of installed packages, and what knows the name afterwards."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from helpers.planning import make
from helpers.training import golden_argv

import promptkd
from minillm_baselines.sft import SFT
from promptkd.cli import plan
from promptkd.cli.train import read_settings
from promptkd.config.values import option
from promptkd.errors import UserError
from promptkd.methods.base import Method
from promptkd.methods.registry import METHODS, method_class, method_names, register_method

CODE = """
from dataclasses import dataclass
from minillm_baselines.kd import KD, KDSettings
from promptkd.config.values import option

@dataclass
class OwnSettings(KDSettings):
    own_weight: float = option(0.5, "weight of the own term")

class OwnKD(KD):
    Settings = OwnSettings
"""


@pytest.fixture(autouse=True)
def registered():
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def install(folder, package: str, entries: str, code: str = CODE) -> None:
    """Write an installed package with entry points."""
    (folder / f"{package}.py").write_text(code)
    (folder / f"{package}-1.0.dist-info").mkdir()
    (folder / f"{package}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / f"{package}-1.0.dist-info/entry_points.txt").write_text(f"[promptkd.methods]\n{entries}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def test_register_method_is_known_to_options_and_plan(save, monkeypatch, capsys):
    @dataclass
    class Settings:
        own_coef: float = option(1.0, "weight of the own term")

    @promptkd.register_method("own")
    class Own(SFT):
        has_teacher = True

    Own.Settings = Settings
    argv = [*golden_argv("kd", save), "--method", "own", "--own-coef", "0.25"]
    options = read_settings(argv)
    assert options.method_class is Own and options.method_settings.own_coef == 0.25
    assert options.as_dict()["own_coef"] == 0.25 and method_names()[-1] == "own"
    setting = make("--cpu", "--batch-size", "4", method="own")
    assert setting.method == "own" and setting.answering == ("student",)
    monkeypatch.setattr(plan, "make", lambda argv: (setting, True))
    plan.main()
    assert "--method own is of another package: the plan assumes" in capsys.readouterr().err


def test_register_method_replaces_a_class_by_its_next_version_only():
    def cell(name):
        class Cell(SFT):
            pass

        return register_method(name)(Cell)

    first, second = cell("cell"), cell("cell")
    assert method_class("cell") is second is not first
    for name in ("kd", "cell"):
        with pytest.raises(UserError, match=f"the method {name} exists already: register SFT under another name"):
            register_method(name)(SFT)


@pytest.mark.parametrize("name", ["", "two words", "-x", SFT])
def test_register_method_refuses_a_name(name):
    with pytest.raises(UserError, match="give a name first"):
        register_method(name)


def test_register_method_refuses_what_is_no_method():
    class Stepless(Method):
        pass

    class Undeclared(SFT):
        @dataclass
        class Settings:
            weight: float = 1.0

    for kind, message in ((object, "a class with a step"), (Stepless, "a step"), (Undeclared, r"option\(\) fields")):
        with pytest.raises(UserError, match=message):
            register_method("wrong")(kind)
    assert "wrong" not in METHODS


@pytest.mark.parametrize("name", ["lr", "method", "config", "dry_run", "local_rank"])
def test_settings_of_a_method_may_not_repeat_an_option(name, save):
    settings = dataclass(type("Settings", (), {"__annotations__": {name: float}, name: option(1.0, "a second one")}))
    register_method(f"taken_{name}")(type("Taken", (SFT,), {"Settings": settings}))
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"Settings: the option --{flag} exists already: rename the field"):
        read_settings([*golden_argv("sft", save), "--method", f"taken_{name}"])


def test_entry_point_is_a_method(site, save):
    install(site, "own_package", "own_kd = own_package:OwnKD")
    assert read_settings([*golden_argv("kd", save), "--method", "own_kd"]).method_settings.own_weight == 0.5
    with pytest.raises(UserError, match=r"own_kd \(did you mean own_kd\?\)"):
        method_class("own_kf")


def test_entry_point_may_also_be_registered_by_its_module(site):
    code = CODE.replace("class OwnKD", '@register_method("own_kd")\nclass OwnKD')
    install(site, "twice", "own_kd = twice:OwnKD", f"from promptkd import register_method\n{code}")
    assert method_class("own_kd") is method_class("own_kd")


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ("own = broken:Own", "import nothing_of_this_name", r"cannot be imported \(ModuleNotFoundError: .*repair"),
        ("own = broken:Gone", CODE, r"cannot be imported \(AttributeError"),
        ("own = broken:option", CODE, "broken:option of the package broken: it has to be a class with a step"),
        ("kd = broken:OwnKD", CODE, r"--method kd: there are several of this name \(broken\): uninstall or rename one"),
    ],
)
def test_entry_point_that_cannot_be_used_is_one_line(site, entry, code, message):
    install(site, "broken", entry, code)
    with pytest.raises(UserError, match=message) as error:
        method_class(entry.partition(" ")[0])
    assert "\n" not in str(error.value)
