"""Everything that can be wrong with a search space file: the message names file, field, value and remedy."""

import pytest

from optimizer_daemon.search.load import load_space, preset_names
from optimizer_daemon.search.space import parse_space
from shared.errors import UserError

SPACE = """\
name = "mine"

[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true

[parameters.dim]
type = "categorical"
choices = [4, 8]

[parameters.steps]
type = "int"
low = 0
high = 10
step = 5

[derived]
alpha = "int(dim / 2)"

[[constraints]]
when = "dim > 4"
reason = "first"

[[constraints]]
when = "steps > 1"
requires = [{ name = "dim >= 8", check = "dim >= 8" }, { name = "rate", check = "rate < 1e-4" }]
reason = "second: {failed}"

[start_up]
parameter = "steps"
strata = [{ low = 0, high = 5, weight = 1 }, { low = 10, high = 10, weight = 2 }]
"""

FAULTS = [
    ("an unknown key is named before what it leaves missing", "high = 1e-3", "hihg = 1e-3",
     "parameters -> rate -> hihg: 0.001 will not do; there is no such key; "
     "the keys here are type, low, high, log, step"),
    ("an unknown key of the file", 'name = "mine"', 'name = "mine"\nversion = 2', "version: 2 will not do"),
    ("an unknown key of a rule", 'reason = "first"', 'reason = "first"\nwhy = "x"',
     "constraints #1 -> why: 'x' will not do; there is no such key; the keys here are when, requires, reason"),
    ("an unknown key of a check", 'check = "dim >= 8"', 'check = "dim >= 8", test = 1',
     "constraints #2 -> requires #1 -> test: 1 will not do; there is no such key; the keys here are name, check"),
    ("an unknown key of a stratum", "weight = 1 ", "weight = 1, share = 2 ",
     "start_up -> strata #1 -> share: 2 will not do; there is no such key; the keys here are low, high, weight"),
    ("an unknown key of the plan", 'parameter = "steps"', 'parameter = "steps"\nseed = 2',
     "start_up -> seed: 2 will not do; there is no such key; the keys here are parameter, strata"),
    ("an unknown type", '"int"', '"integer"',
     "parameters -> steps -> type: 'integer' will not do; choose one of float, int, categorical"),
    ("no type", 'type = "int"\n', "", "parameters -> steps -> type is missing; add it"),
    ("no upper end", "high = 1e-3\n", "", "parameters -> rate -> high is missing; add it"),
    ("no name", 'name = "mine"\n', "", "name is missing; add it"),
    ("a blank name", '"mine"', '" "', "name: ' ' will not do; it is blank"),
    ("low above high", "high = 1e-3", "high = 1e-6",
     "parameters -> rate -> high: 1e-06 will not do; it is below low = 1e-05; swap the two"),
    ("a whole low above high", "high = 10\nstep", "high = -5\nstep", "parameters -> steps -> high: -5 will not do"),
    ("log from zero", "low = 1e-5", "low = 0",
     "parameters -> rate -> log: True will not do; a logarithmic range needs low > 0, here low = 0.0"),
    ("log from below zero", "low = 1e-5", "low = -1e-5", "parameters -> rate -> log: True will not do"),
    ("log with steps", "log = true", "log = true\nstep = 1e-5",
     "parameters -> rate -> step: 1e-05 will not do; a logarithmic range has no steps; drop step or log"),
    ("a step that does not divide", "step = 5", "step = 3",
     "parameters -> steps -> step: 3 will not do; it does not divide high - low, 0..10; change step or high"),
    ("a decimal step that does not divide", "log = true", "step = 3e-4",
     "parameters -> rate -> step: 0.0003 will not do; it does not divide"),
    ("no step forwards", "step = 5", "step = 0", "parameters -> steps -> step: 0 will not do; a step is positive"),
    ("a grid of millions", "high = 10\nstep = 5", "high = 1000000",
     "parameters -> steps: {'type': 'int', 'low': 0, 'high': 1000000} will not do; it makes more than 100,000 values"),
    ("a fraction for a whole number", "step = 5", "step = 2.5",
     "parameters -> steps -> step: 2.5 will not do; write a whole number"),
    ("a quoted number", "high = 1e-3", 'high = "1e-3"', "rate -> high: '1e-3' will not do; write a number"),
    ("an infinite end", "high = 1e-3", "high = inf", "rate -> high: inf will not do; write a finite number"),
    ("one for true", "log = true", "log = 1", "rate -> log: 1 will not do; write true or false"),
    ("a number for a table", "[derived]\n", "[parameters]\nx = 5\n[derived]\n", "parameters -> x"),
    ("no choices", "[4, 8]", "[]", "parameters -> dim -> choices: [] will not do; write at least one"),
    ("one choice without a list", "[4, 8]", "4", "parameters -> dim -> choices: 4 will not do; write a list"),
    ("a choice twice", "[4, 8]", "[4, 8, 4.0]", "dim -> choices: [4, 8, 4.0] will not do; 4.0 occurs twice"),
    ("choices of two kinds", "[4, 8]", '[4, "8"]', "choices are of one kind; write numbers only, strings only"),
    ("a list as choice", "[4, 8]", "[4, [8]]", "parameters -> dim -> choices #2: [8] will not do; a choice is a"),
    ("a date as choice", "[4, 8]", "[2025-11-13]", "parameters -> dim -> choices #1: "),
    ("no number as choice", "[4, 8]", "[4, nan]", "parameters -> dim -> choices #2: nan will not do"),
    ("a parameter twice", "[parameters.steps]", "[parameters.dim]",
     "line 13, character 16, '[parameters.dim]': Cannot declare ('parameters', 'dim') twice; write each name once"),
    ("a derived value twice", "[derived]\n", '[derived]\nalpha = "1"\n',
     "line 21, character 23, 'alpha = \"int(dim / 2)\"': Cannot overwrite a value; write each name once"),
    ("a check's name twice", '"dim >= 8", check', '"rate", check',
     "the name 'rate' occurs twice; give each check its own"),
    ("a name no expression can use", "[parameters.dim]", "[parameters.lambda]",
     "parameters -> lambda: 'lambda' will not do; expressions cannot use this name"),
    ("the name of a function", "alpha =", "max =", "derived -> max: 'max' will not do; expressions cannot use"),
    ("a name with a blank", "alpha =", "'al pha' =", "derived -> al pha: 'al pha' will not do"),
    ("a derived number instead of an expression", '"int(dim / 2)"', "2", "derived -> alpha: 2 will not do; write a s"),
    ("an unknown name in a derived value", "dim / 2", "dim / halves",
     "derived -> alpha: 'int(dim / halves)' will not do; at character 11: there is no 'halves' here; "
     "choose one of rate, dim, steps"),
    ("a derived value that reads itself", "int(dim / 2)", "alpha", "at character 1: there is no 'alpha' here"),
    ("a derived value of another kind than what it replaces", "alpha =", 'dim = "dim > 4"\nalpha =',
     "derived -> dim: 'dim > 4' will not do; it yields a condition where a number is needed"),
    ("an unknown name in a condition", "dim > 4", "width > 4",
     "constraints #1 -> when: 'width > 4' will not do; at character 1: there is no 'width' here; "
     "choose one of rate, dim, steps, alpha"),
    ("an attribute", "dim > 4", "dim.real > 4", "constraints #1 -> when: 'dim.real > 4' will not do; at character 1: "),
    ("a call", "dim > 4", "open(dim) > 4", "constraints #1 -> when: 'open(dim) > 4' will not do; at character 1: the"),
    ("a lambda", "dim > 4", "(lambda: dim)() > 4", "constraints #1 -> when: '(lambda: dim)() > 4' will not do; at"),
    ("a condition that is none", "dim > 4", "dim", "constraints #1 -> when: 'dim' will not do; it yields a number"),
    ("an unknown name in a check", "dim >= 8\" }", "width >= 8\" }",
     "constraints #2 -> requires #1 -> check: 'width >= 8' will not do; at character 1: there is no 'width'"),
    ("a check cut short", "rate < 1e-4", "rate <", "requires #2 -> check: 'rate <' will not do; at character 7: inv"),
    ("no reason", 'reason = "first"\n', "", "constraints #1 -> reason is missing; add it"),
    ("a blank reason", '"first"', '""', "constraints #1 -> reason: '' will not do; it is blank"),
    ("a reason that hides the failed checks", "second: {failed}", "second",
     "constraints #2 -> reason: 'second' will not do; with requires it must name the failed checks; put {failed}"),
    ("a reason with checks there are not", "first", "first {failed}",
     "constraints #1 -> reason: 'first {failed}' will not do; without requires there are no checks"),
    ("an empty list of checks", 'when = "dim > 4"', 'when = "dim > 4"\nrequires = []',
     "constraints #1 -> requires: [] will not do; write at least one"),
    ("strata on an unknown parameter", 'parameter = "steps"', 'parameter = "step"',
     "start_up -> parameter: 'step' will not do; name a declared float or int: rate, steps"),
    ("strata on choices", 'parameter = "steps"', 'parameter = "dim"', "start_up -> parameter: 'dim' will not do; name"),
    ("a stratum without weight", "weight = 1 ", "weight = 0 ",
     "start_up -> strata #1 -> weight: 0 will not do; write a number above 0"),
    ("a stratum upside down", "high = 5, weight", "high = -5, weight", "start_up -> strata #1 -> high: -5 will not do"),
    ("a value in no stratum", "low = 0, high = 5", "low = 0, high = 1",
     "start_up -> strata: '0.0..1.0, 10.0..10.0' will not do; 5 lies in none of the strata"),
    ("a value in two strata", "low = 10, high = 10", "low = 5, high = 10", "5 lies in 2 of the strata"),
    ("a stratum between two values", "{ low = 10", "{ low = 6, high = 9, weight = 1 }, { low = 10",
     "stratum #2 holds no value of 0..10 step 5"),
    ("strata that end early", 'parameter = "steps"', 'parameter = "rate"',
     "start_up -> strata: '0.0..5.0, 10.0..10.0' will not do; they reach from 0.0 to 10.0; cover 1e-05..0.001"),
    ("TOML that is none", 'name = "mine"', "name = mine", "line 1, character 8, 'name = mine': Invalid value; mend"),
    ("TOML cut short", "weight = 2 }]\n", "weight = 2", "mend the TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "instead", "said"), [pytest.param(*fault, id=name) for name, *fault in FAULTS])
def test_a_fault_names_file_and_field(written, instead, said):
    assert parse_space(SPACE, "spaces/my.toml").name == "mine"
    assert SPACE.count(written) >= 1
    with pytest.raises(UserError) as refusal:
        parse_space(SPACE.replace(written, instead, 1), "spaces/my.toml")
    message = str(refusal.value)
    assert message.startswith("spaces/my.toml: ")
    assert said in message
    assert "\n" not in message


def test_strata_of_a_continuous_range_must_meet():
    head, _ = SPACE.split("[start_up]")
    plan = '[start_up]\nparameter = "rate"\nstrata = [{ low = 1e-5, high = 1e-4, weight = 1 }, '
    assert parse_space(f"{head}{plan}{{ low = 1e-4, high = 1e-3, weight = 1 }}]", "my.toml").start_up is not None
    with pytest.raises(UserError, match=r"one ends at 0\.0001 and the next begins at 0\.0002; let them meet"):
        parse_space(f"{head}{plan}{{ low = 2e-4, high = 1e-3, weight = 1 }}]", "my.toml")


def test_several_faults_are_counted():
    with pytest.raises(UserError, match=r"\(and 2 more\)"):
        parse_space(
            SPACE.replace('type = "int"\nlow = 0\nhigh = 10\nstep = 5', 'type = "int"\nlow = "a"\nstep = 2.5'), "a"
        )


@pytest.mark.parametrize("text", ["", "name = 'a'", "name = 'a'\n[parameters]", "parameters = 5"])
def test_a_file_without_parameters_is_refused(text):
    with pytest.raises(UserError, match=r"^my\.toml: (name|parameters)\b"):
        parse_space(text, "my.toml")


# ------------------------------------------------------------------------------------------------------------- files


def test_a_file_of_ones_own_is_read_and_named_in_messages(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(SPACE)
    assert load_space(path) == load_space(str(path)) == parse_space(SPACE, "")
    path.write_text(SPACE.replace("high = 1e-3", "high = 1e-6"))
    with pytest.raises(UserError) as refusal:
        load_space(path)
    assert str(refusal.value).startswith(f"{path}: parameters -> rate -> high: 1e-06")


def test_windows_line_ends_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SPACE.replace("\n", "\r\n").encode())
    assert load_space(path) == parse_space(SPACE, "")


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(UserError) as refusal:
        load_space("v3")
    message = "no search space 'v3': there is no such file; give a TOML file or one of the presets v1, v2.1"
    assert str(refusal.value) == message


def test_a_preset_wins_over_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1").write_text(SPACE)
    assert load_space("v1").name == "v1"
    assert load_space("./v1").name == "mine"
    assert preset_names() == ["v1", "v2.1"]


def test_a_folder_is_no_search_space(tmp_path):
    with pytest.raises(UserError, match="cannot be read \\(Is a directory\\)"):
        load_space(tmp_path)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(UserError, match="byte 8 is not UTF-8; save it as UTF-8"):
        load_space(path)
