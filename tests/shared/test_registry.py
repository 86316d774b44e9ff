"""Plugins by name."""

import sys
import textwrap
from typing import Protocol, runtime_checkable

import pytest

from shared.errors import SettingsError, UnknownPluginError
from shared.registry import Registry


class Named(Protocol):
    name: str


@runtime_checkable
class Trainer(Named, Protocol):
    def plan(self, epochs: int) -> list[str]: ...


class Maker(Protocol):
    def __call__(self, epochs: int) -> Trainer: ...


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A package of plugins, good and bad, on the import path."""
    package = tmp_path / "plugin_examples"
    package.mkdir()
    modules = {
        "__init__": "",
        "good": """
            from dataclasses import dataclass
            class Whole:
                name = "whole"
                def plan(self, epochs):
                    return ["train"]
            @dataclass
            class Annotated:
                name: str
                def plan(self, epochs):
                    return ["train"]
            class Child(Whole):
                pass
            instance = Whole()
            class Nameless:
                def plan(self, epochs):
                    return []
            class Nothing:
                pass
            nothing = Nothing()
            def make(epochs):
                return instance
        """,
        "needs_more": "import no_such_package.deep",
        "needs_itself": "import plugin_examples.gone",
        "renamed": "from plugin_examples.good import OldName",
        "syntax": "def broken(:",
        "buggy": "1 / 0",
    }
    for name, text in modules.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugin_examples"
    for name in [name for name in sys.modules if name.partition(".")[0] == "plugin_examples"]:
        del sys.modules[name]


@pytest.fixture
def trainers(plugins):
    entries = {"whole": "plugin_examples.good:Whole", "heavy": "plugin_examples.needs_more:Trainer"}
    return Registry[Trainer]("trainer", Trainer, entries)


def test_names_are_known_without_importing_anything(trainers):
    assert trainers.names == ["heavy", "whole"]
    assert "plugin_examples.good" not in sys.modules


def test_a_registered_plugin_is_imported_on_first_use(trainers):
    plugin = trainers.load("whole")
    assert plugin is sys.modules["plugin_examples.good"].Whole
    assert trainers.load("whole") is plugin


def test_an_unknown_name_lists_the_known_ones(trainers):
    with pytest.raises(UnknownPluginError, match="no trainer named 'kohja'; choose one of heavy, whole"):
        trainers.load("kohja")


@pytest.mark.parametrize("attribute", ["Whole", "Annotated", "Child", "instance"])
def test_whatever_has_the_members_is_taken(trainers, attribute):
    assert trainers.load(f"plugin_examples.good:{attribute}").plan is not None


def test_a_function_fits_a_callable_protocol(plugins):
    makers = Registry[Maker]("maker", Maker, {})
    assert makers.load("plugin_examples.good:make")(epochs=2).name == "whole"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plugin_examples.good:Nameless", "plugin_examples.good:Nameless lacks name; add what a trainer must have"),
        ("plugin_examples.good:Nothing", "lacks name, plan"),
        ("plugin_examples.good:nothing", "lacks name, plan"),
        ("plugin_examples.good:Wole", "plugin_examples.good has no Wole; correct the name"),
        ("plugin_examples.good:Whole.Inner", "plugin_examples.good has no Whole.Inner; correct the name"),
        ("plugin_examples.god:Whole", "there is no module 'plugin_examples.god'"),
        ("no_such_package.deep:Trainer", "there is no module 'no_such_package'; correct the name or put it on PYTHON"),
        ("plugin_examples.needs_more:Trainer", "plugin_examples.needs_more needs the package 'no_such_package'"),
        ("heavy", "trainer: 'heavy' will not do; plugin_examples.needs_more needs the package 'no_such_package'"),
        ("plugin_examples.needs_itself:Trainer", "needs the module 'plugin_examples.gone', which its package lacks"),
        ("plugin_examples.renamed:Trainer", "importing plugin_examples.renamed fails (cannot import name 'OldName'"),
        (
            "plugin_examples.syntax:Trainer",
            "importing plugin_examples.syntax fails (invalid syntax (syntax.py, line 1))",
        ),
        (":Trainer", "write it as package.module:attribute"),
        ("plugin_examples.good:", "write it as package.module:attribute"),
    ],
)
def test_a_plugin_that_does_not_fit_is_told_clearly(trainers, name, told):
    with pytest.raises(SettingsError) as caught:
        trainers.load(name)
    assert told in str(caught.value)


@pytest.mark.parametrize("module", ["needs_more", "renamed", "syntax"])
def test_the_cause_is_chained(trainers, module):
    with pytest.raises(SettingsError) as caught:
        trainers.load(f"plugin_examples.{module}:Trainer")
    assert isinstance(caught.value.__cause__, ImportError | SyntaxError)


def test_a_bug_in_a_plugin_keeps_its_traceback(trainers):
    with pytest.raises(ZeroDivisionError):
        trainers.load("plugin_examples.buggy:Trainer")
