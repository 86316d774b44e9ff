"""Strict reading: what is refused, and how the message names it."""

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from shared.errors import DiskError, ResourceError, SchemaVersionError, UnreadableFileError
from shared.files import parse_model, read_model, read_or_set_aside, set_aside, to_bytes, write_model
from shared.schemas import Enqueue, OptimizerRequest, Pause, TrialState

NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)
PATH = Path("trial_0005/trial_state.json")


def state(**changes) -> TrialState:
    values = {"trial": 5, "optuna_number": 4, "state": "training", "attempt": 1, "drawn": NOON}
    return TrialState(**values | changes)


def edited(**changes) -> bytes:
    """Return a hand-written trial_state.json, for fields the model itself would refuse."""
    payload = {"trial": 5, "optuna_number": 4, "state": "training", "attempt": 1, "drawn": "2025-11-15T10:00:00+08:00"}
    return json.dumps({name: value for name, value in (payload | changes).items() if value is not ...}).encode()


def reason(content: bytes, model=TrialState, *, by_hand=True) -> str:
    with pytest.raises(UnreadableFileError) as caught:
        parse_model(content, PATH, model, edited=by_hand)
    assert str(caught.value) == f"{PATH}: {caught.value.reason}"
    return caught.value.reason


POINT = {"epoch": 2, "value": 0.1, "checkpoint": "x"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "not JSON: Expecting value at line 1 column 1", id="an empty file"),
        pytest.param(b"\xef\xbb\xbf{}", "starts with a byte order mark; save it as plain UTF-8", id="a BOM"),
        pytest.param(b'{"a": "\xff"}', "byte 7 is not UTF-8", id="invalid UTF-8"),
        pytest.param(b'{"a": 1, "a": 1}', "the key 'a' occurs twice in one object", id="a key twice"),
        pytest.param(b'{"x": [{"b": 1, "b": 2}]}', "the key 'b' occurs twice in one object", id="a nested key twice"),
        pytest.param(b'{"a": NaN}', "NaN is no number", id="NaN"),
        pytest.param(b'{"a": -Infinity}', "-Infinity is no number", id="an infinity"),
        pytest.param(b'{"a": 1e999}', "1e999 is too large for a number", id="a number that overflows"),
        pytest.param(b"{} {}", "not JSON: Extra data at line 1 column 4", id="trailing data"),
        pytest.param(b"[1, 2]", "holds [1, 2] where a JSON object is expected", id="a list"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="a tower of brackets"),
        pytest.param(edited(state="trianed"), "state: 'trianed' will not do; Input should be 'drawn'", id="a slip"),
        pytest.param(edited(state=...), "state is missing", id="a missing field"),
        pytest.param(edited(colour="red"), "colour: 'red' will not do; Extra inputs are not", id="an unknown field"),
        pytest.param(edited(attempt="1"), "attempt: '1' will not do; Input should be a valid integer", id="text for 1"),
        pytest.param(edited(attempt=0), "attempt: 0 will not do; Input should be greater", id="a number out of range"),
        pytest.param(
            edited(curve=[POINT, POINT | {"epoch": "two"}]),
            "curve -> 1 -> epoch: 'two' will not do; Input should be a valid integer",
            id="a field deep inside",
        ),
        pytest.param(
            edited(curve=[{"epoch": 2, "value": 0.1}]), "curve -> 0 -> checkpoint is missing", id="missing deep inside"
        ),
        pytest.param(edited(drawn="yesterday"), "drawn: 'yesterday' will not do; a time looks like", id="no time"),
        pytest.param(edited(drawn="1763200000"), "drawn: '1763200000' will not do; a time looks", id="seconds as time"),
        pytest.param(edited(state="failed"), "state failed and ended None contradict each other", id="a contradiction"),
        pytest.param(edited(trial=7), "trial 7 is not optuna_number 4 + 1", id="numbers that do not belong together"),
        pytest.param(
            edited(trial="5", attempt="1"),
            "trial: '5' will not do; Input should be a valid integer (and 1",
            id="two faults",
        ),
        pytest.param(
            edited(schema_version="1"), "schema_version: '1' will not do; it is the number 1", id="a version as text"
        ),
        pytest.param(edited(schema_version=True), "schema_version: True will not do", id="a version as truth"),
        pytest.param(edited(reason="\ud800"), "Invalid JSON", id="half a surrogate pair"),
    ],
)
def test_a_fault_is_named(content, expected):
    assert reason(content).startswith(expected)


def test_a_long_value_is_cut_in_the_message():
    assert len(reason(edited(state="x" * 10_000))) < 300


def test_a_union_names_the_field_and_not_its_members():
    content = b'{"kind": "enqueue", "parameters": {"network_dim": null}}'
    assert reason(content, OptimizerRequest).startswith("parameters -> network_dim: None will not do;")


def test_an_unknown_command_is_named():
    assert "'pauze'" in reason(b'{"kind": "pauze"}', OptimizerRequest)


@pytest.mark.parametrize(("version", "which"), [(0, "older"), (2, "newer")])
def test_another_schema_version_has_its_own_error_and_stays_in_place(version, which, tmp_path):
    path = tmp_path / "trial_state.json"
    resealed = to_bytes(state()).replace(b'"schema_version": 1', f'"schema_version": {version}'.encode())
    path.write_bytes(reseal(resealed))
    with pytest.raises(SchemaVersionError, match=f"written by an? {which} program: schema_version {version}"):
        read_model(path, TrialState)
    with pytest.raises(SchemaVersionError):
        read_or_set_aside(path, TrialState, NOON)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trial_state.json"]


def reseal(content: bytes) -> bytes:
    """Return `content` with the checksum of its lines, as `head -n -2 | sha256sum` computes it."""
    body = b"".join(content.splitlines(keepends=True)[:-2])
    return body + b'  "checksum": "sha256:%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def test_the_checksum_is_the_digest_of_the_lines_before_it():
    assert reseal(to_bytes(state())) == to_bytes(state())


def test_an_edit_by_hand_is_refused_with_the_way_to_accept_it():
    fault = reason(to_bytes(state()).replace(b'"attempt": 1', b'"attempt": 2'), by_hand=False)
    assert fault.startswith("its checksum does not fit its content")
    assert f"python -m shared.seal {PATH}" in fault


def test_a_file_without_checksum_is_refused_with_the_way_to_accept_it():
    fault = reason(edited(), by_hand=False)
    assert fault.startswith("it has no checksum")
    assert f"python -m shared.seal {PATH}" in fault


def test_a_request_by_hand_needs_no_checksum():
    assert parse_model(b'{"kind": "pause"}', PATH, OptimizerRequest).root == Pause(kind="pause")


def test_a_request_with_a_wrong_checksum_is_refused():
    content = to_bytes(OptimizerRequest(Enqueue(kind="enqueue", parameters={"network_dim": 64})))
    assert "checksum" in reason(content.replace(b"64", b"32", 1), OptimizerRequest, by_hand=False)


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "trial_state.json"
    written = state(reason='損失 became NaN at step 40 – "loss"', state="interrupted")
    write_model(path, written)
    assert read_model(path, TrialState) == written
    assert "損失" in path.read_text(encoding="utf-8"), "people read these files"


def test_what_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "trial_state.json"
    write_model(path, state())
    with pytest.raises(ValueError, match="trial 7 is not optuna_number 4"):
        write_model(path, state().model_copy(update={"trial": 7}))
    assert read_model(path, TrialState) == state()


def test_a_time_keeps_its_offset(tmp_path):
    path = tmp_path / "trial_state.json"
    write_model(path, state(drawn=datetime(2025, 11, 15, 10, 23, 45, tzinfo=timezone(timedelta(hours=8)))))
    assert '"drawn": "2025-11-15T10:23:45+08:00"' in path.read_text(encoding="utf-8")


def test_a_missing_file_is_no_damage(tmp_path):
    path = tmp_path / "trial_state.json"
    with pytest.raises(FileNotFoundError):
        read_model(path, TrialState)
    assert read_or_set_aside(path, TrialState, NOON) == (None, None, "")


def test_a_whole_file_is_not_set_aside(tmp_path):
    path = tmp_path / "trial_state.json"
    write_model(path, state())
    assert read_or_set_aside(path, TrialState, NOON) == (state(), None, "")
    assert path.exists()


def test_what_the_system_will_not_read_is_not_damage(tmp_path):
    folder = tmp_path / "trial_state.json"
    folder.mkdir()
    with pytest.raises(ResourceError, match="could not be read"):
        read_or_set_aside(folder, TrialState, NOON)
    assert folder.is_dir()


def test_set_aside_never_overwrites(tmp_path):
    path = tmp_path / "trial_state.json"
    names = []
    for content in ("first", "second", "third"):
        path.write_text(content)
        names.append(set_aside(path, NOON).name)
    kept = "trial_state.json.corrupt-20251115T120000+0000"
    assert names == [kept, f"{kept}-2", f"{kept}-3"]
    assert [(tmp_path / name).read_text() for name in names] == ["first", "second", "third"]


def test_setting_aside_what_is_not_there_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError):
        set_aside(tmp_path / "trial_state.json", NOON)
