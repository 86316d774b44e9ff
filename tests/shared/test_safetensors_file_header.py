"""Headers no trainer writes, and what the strict bounds make of them."""

import time

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CheckpointError, IncompleteCheckpointError, RefusedCheckpointError
from shared.safetensors_file import read_checkpoint, read_header
from tests.shared.weight_files import file_of, refusal_of, saved

HALVES = b"\x00\x3c\x00\xc0"  # 1.0, -2.0 as F16
MB = 2**20


def entry(dtype="F16", shape=(2,), data_offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets)}


ONE = '"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'


def one(**changes) -> bytes:
    return file_of({"a": entry() | changes}, HALVES)


MALFORMED = {
    "a length of zero": ("header_size", bytes(8) + b"{}"),
    "a length of 2**64 - 1": ("header_size", b"\xff" * 8 + b"{}"),
    "a pickle": ("header_size", b"\x80\x04\x95" + b"pickle" * 4),
    "an empty table": ("no_tensors", file_of("{}")),
    "metadata only": ("no_tensors", file_of({"__metadata__": {"ss_epoch": "1"}})),
    "a list": ("header_json", file_of("[]")),
    "a space before the table": ("header_json", file_of(f" {{{ONE}}}", HALVES)),
    "half a table": ("header_json", file_of("{" + ONE, HALVES)),
    "two tables": ("header_json", file_of(f"{{{ONE}}}{{}}", HALVES)),
    "bytes that are no UTF-8": ("header_json", file_of(b'{"\xff":1}')),
    "a line break inside a name": ("header_json", file_of('{"a\n":1}')),
    "a NaN literal": ("header_json", file_of('{"a":NaN}')),
    "a fraction": ("header_json", file_of('{"a":1.5}')),
    "a dimension of 31 digits": ("header_json", one(shape=[10**30])),
    "the same tensor twice": ("duplicate_key", file_of(f"{{{ONE},{ONE}}}", HALVES)),
    "a metadata key twice": ("duplicate_key", file_of('{"__metadata__":{"k":"1","k":"2"},' + ONE + "}", HALVES)),
    "metadata twice": ("duplicate_key", file_of('{"__metadata__":{},"__metadata__":{},' + ONE + "}", HALVES)),
    "two dtypes in one entry": ("duplicate_key", file_of('{"a":{"dtype":"F32","dtype":"F16"}}', HALVES)),
    "the same name twice, once escaped": ("duplicate_key", file_of('{"\\u0061":{},' + ONE + "}", HALVES)),
    "a list as metadata": ("metadata", file_of({"__metadata__": [], "a": entry()}, HALVES)),
    "null as metadata": ("metadata", file_of({"__metadata__": None, "a": entry()}, HALVES)),
    "a number in metadata": ("metadata", file_of({"__metadata__": {"ss_epoch": 2}, "a": entry()}, HALVES)),
    "a table in metadata": ("metadata", file_of({"__metadata__": {"k": {"k": "v"}}, "a": entry()}, HALVES)),
    "half a surrogate pair": ("metadata", file_of('{"__metadata__":{"k":"\\ud800"},' + ONE + "}", HALVES)),
    "an entry that is a number": ("tensor_entry", file_of({"a": 1})),
    "an entry without shape": ("tensor_entry", file_of({"a": {"dtype": "F16", "data_offsets": [0, 4]}}, HALVES)),
    "an entry with more fields": ("tensor_entry", one(stride=[1])),
    "an invented dtype": ("dtype", one(dtype="F12")),
    "a dtype in lower case": ("dtype", one(dtype="f16")),
    "a dtype below one byte": ("dtype", one(dtype="F4", shape=[8])),
    "a list as dtype": ("dtype", one(dtype=["F16"])),
    "a dtype of 100,000 characters": ("dtype", one(dtype="F" * 100_000)),
    "a negative dimension": ("shape", one(shape=[-2])),
    "true as a dimension": ("shape", one(dtype="F32", shape=[True])),
    "a text as a dimension": ("shape", one(shape=["2"])),
    "a table as shape": ("shape", one(shape={"0": 2})),
    "a dimension of 20 digits": ("shape", one(shape=[10**19])),
    "a huge product that a zero makes harmless": ("shape", one(shape=[2**63, 2**63, 0], data_offsets=[0, 0])),
    "nine dimensions": ("shape", one(shape=[1] * 8 + [2])),
    "100,000 dimensions": ("shape", one(shape=[1] * 10**5)),
    "a product of 2**256": ("size_mismatch", one(shape=[2**32] * 8)),
    "two bytes too few": ("size_mismatch", one(data_offsets=[0, 2])),
    "data for a shape with a zero": ("size_mismatch", one(shape=[0, 7])),
    "offsets in reverse": ("offsets", one(data_offsets=[4, 0])),
    "three offsets": ("offsets", one(data_offsets=[0, 4, 8])),
    "a negative offset": ("offsets", one(data_offsets=[-4, 0])),
    "an offset no file reaches": ("offsets", one(data_offsets=[2**63, 2**63 + 4])),
    "two tensors on the same bytes": ("overlap", file_of({"a": entry(), "b": entry()}, HALVES)),
    "a tensor that starts in another": ("overlap", file_of({"a": entry(), "b": entry(data_offsets=(2, 6))}, HALVES)),
    "one shared byte": ("overlap", file_of({"a": entry(), "b": entry("U8", [4], (3, 7))}, HALVES + b"xxx")),
    "an empty tensor inside another": ("overlap", file_of({"a": entry(), "b": entry("U8", [0], (2, 2))}, HALVES)),
    "bytes before the first tensor": ("hole", file_of({"a": entry(data_offsets=(2, 6))}, HALVES + b"xx")),
    "bytes between tensors": ("hole", file_of({"a": entry(), "b": entry(data_offsets=(6, 10))}, HALVES * 3)),
    "one byte after the last tensor": ("trailing_bytes", file_of({"a": entry()}, HALVES + b"x")),
    "a promise of more than 4 GiB": ("too_large", file_of({"a": entry("U8", [2**32], (0, 2**32))})),
}


@pytest.mark.parametrize(("code", "file"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_with_its_code(tmp_path, code, file):
    path = saved(tmp_path / "a.safetensors", file)
    assert refusal_of(path, tmp_path) == code
    with pytest.raises(RefusedCheckpointError) as caught:
        read_header(path, tmp_path)
    assert caught.value.code == code


def empty_tensors(count: int) -> bytes:
    text = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    return file_of("{" + ",".join(f'"tensor_{i}":{text}' for i in range(count)) + "}")


def metadata_keys(count: int) -> bytes:
    return file_of('{"__metadata__":{' + ",".join(f'"{i:x}":""' for i in range(count)) + "}}")


BOMBS = {
    "300,000 empty tensors in 20 MB": ("header_size", lambda: empty_tensors(300_000)),
    "100,000 empty tensors within 8 MB": ("too_many_tensors", lambda: empty_tensors(100_000)),
    "a million empty tables": ("too_many_tensors", lambda: file_of("{" + '"a":{},' * MB + '"a":{}}')),
    "100,000 numbers as tensors": ("too_many_tensors", lambda: file_of({f"{i}": 1 for i in range(100_000)})),
    "four million dimensions": ("header_json", lambda: file_of('{"a":[' + "0," * (4 * MB - 9) + "0]}")),
    "two million empty texts": ("tensor_entry", lambda: file_of('{"a":[' + '"",' * (2 * MB) + '""]}')),
    "600,000 metadata keys": ("too_many_tensors", lambda: metadata_keys(600_000)),
    "20,001 empty tensors": ("too_many_tensors", lambda: empty_tensors(20_001)),
    "8 MB of opening brackets": ("header_json", lambda: file_of('{"a":' + "[" * (8 * MB - 5))),
    "8 MB of nested tables": ("header_json", lambda: file_of('{"a":' * MB)),
    "an integer of 8 million digits": ("header_json", lambda: file_of('{"a":' + "9" * (8 * MB - 6) + "}")),
    "a name of 8 million characters": ("tensor_name", lambda: file_of({"a" * (8 * MB - 99): entry()}, HALVES)),
    "8 MB of spaces": ("header_json", lambda: file_of("{" + " " * (8 * MB - 1))),
}


@pytest.mark.parametrize(("code", "bomb"), BOMBS.values(), ids=BOMBS.keys())
def test_a_header_bomb_is_refused_without_much_work(tmp_path, code, bomb):
    path = saved(tmp_path / "a.safetensors", bomb())
    start = time.process_time()
    assert refusal_of(path, tmp_path) == code
    assert time.process_time() - start < 20


def test_nesting_near_the_recursion_limit_is_refused_on_both_sides_of_it(tmp_path):
    codes = set()
    for depth in range(800, 1000):
        nested = '{"a":{"dtype":"F16","shape":' + "[" * depth + "]" * depth + ',"data_offsets":[0,4]}}'
        codes.add(refusal_of(saved(tmp_path / "a.safetensors", file_of(nested, HALVES)), tmp_path))
    assert codes == {"shape", "header_json"}


def test_20_000_tensors_are_still_accepted(tmp_path):
    tensors = {f"t{i}": entry(data_offsets=(4 * i, 4 * i + 4)) for i in range(20_000)}
    path = saved(tmp_path / "a.safetensors", file_of(tensors, HALVES * 20_000))
    start = time.process_time()
    assert len(read_checkpoint(path, tmp_path).tensors) == 20_000
    assert time.process_time() - start < 20, "work that grows with the square of the number would take minutes"


PATHS = ["../../etc/x", "/etc/x", "a/b", "..", "a..b", "a\\b", "C:\\x"]
CONTROLS = ["a\0b", "a\nb", "a\x1b[31m", "a\x7f", "a\u2028b", "a\u202eb"]


@pytest.mark.parametrize("name", ["", "a" * 513, *PATHS, *CONTROLS])
def test_a_name_that_could_harm_is_refused(tmp_path, name):
    path = saved(tmp_path / "a.safetensors", file_of({name: entry()}, HALVES))
    assert refusal_of(path, tmp_path) == "tensor_name"


def test_half_a_surrogate_pair_in_a_name_is_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", file_of(ONE.replace('"a"', '{"\\ud800"') + "}", HALVES))
    assert refusal_of(path, tmp_path) == "tensor_name"


@pytest.mark.parametrize("name", ["a", "unet.down_blocks.0.to_q.lora_A.weight", "größe", "a b", "a" * 512])
def test_any_other_name_is_accepted(tmp_path, name):
    path = saved(tmp_path / "a.safetensors", file_of({name: entry()}, HALVES))
    assert list(read_checkpoint(path, tmp_path).tensors) == [name]


SCALARS = [None, True, -1, 0, 1, 2, 3, 4, 8, 2**31, 2**63, 1.5, "", "a", "F16", "U8", "BOOL"]
TABLES = [[], [2], [0, 4], [0, 2], [0, 0], [4, 8], [2, 4], [1, 2, 3], [[2]], {}, {"a": "b"}]
ODD = st.sampled_from([*SCALARS, *TABLES])
OFFSETS = st.sampled_from([[0, 0], [0, 2], [0, 4], [2, 4], [4, 8], [4, 4]])
SHAPES = st.sampled_from([[], [0], [1], [2], [4], [1, 2], [2, 2]])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F16", "BF16", "F32", "U8", "F8_E5M2", "F64", "C64", "U16"]), ODD),
        "shape": st.one_of(SHAPES, SHAPES, ODD),
        "data_offsets": st.one_of(OFFSETS, OFFSETS, ODD),
    }
)
HEADERS = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "c"]), st.text(max_size=6)), st.one_of(ENTRIES, ENTRIES, ODD), max_size=3
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(header=HEADERS, metadata=st.one_of(st.none(), st.dictionaries(st.text(), st.text(), max_size=2), ODD),
       size=st.sampled_from([0, 2, 4, 8]))  # fmt: skip
def test_whatever_the_header_says_it_is_refused_or_the_reference_loader_agrees(
    tmp_path_factory, header, metadata, size
):
    document = header if metadata is None else header | {"__metadata__": metadata}
    folder = tmp_path_factory.getbasetemp()
    path = saved(folder / "fuzzed.safetensors", file_of(document, b"\x01" * size))
    try:
        checkpoint = read_checkpoint(path, folder)
    except IncompleteCheckpointError as error:
        assert error.code == "incomplete"
    except CheckpointError as error:
        assert error.code != "incomplete"
    else:
        reference = dict(safetensors.deserialize(checkpoint.raw))
        assert {name: (t.dtype, list(t.shape)) for name, t in checkpoint.tensors.items()} == {
            name: (t["dtype"], t["shape"]) for name, t in reference.items()
        }
