"""NaN, Inf and zero, found in the bytes of every dtype; torch is the oracle."""

import random
import re
import struct

import pytest
import torch

from shared.errors import RefusedCheckpointError
from shared.safetensors_file import read_checkpoint
from shared.safetensors_file.values import ITEMSIZE, REAL_DTYPES, is_finite, is_zero, scalar
from tests.shared.weight_files import file_with, refusal_of, saved

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = sorted(REAL_DTYPES | {"C64"})


def patterns(dtype: str) -> list[bytes]:
    """Every value of an 8- or 16-bit dtype; for wider ones, every mix of telling bytes at the top."""
    size = ITEMSIZE[dtype]
    if size <= 2:
        return [value.to_bytes(size, "little") for value in range(256**size)]
    telling = [0x00, 0x01, 0x0F, 0x10, 0x3F, 0x7F, 0x80, 0xEF, 0xF0, 0xFF]
    rng = random.Random(7)
    tops = [bytes([low, second, top]) for low in (0, 1, 0x80, 0xFF) for second in range(256) for top in telling]
    found = [bytes(size - 3) + tail for tail in tops] + [rng.randbytes(size - 3) + tail for tail in tops]
    if dtype == "C64":  # the same in the real part
        found += [number[4:] + number[:4] for number in found]
    return found + [rng.randbytes(size) for _ in range(2000)]


def decoded(data: bytes, dtype: str) -> torch.Tensor:
    tensor = torch.frombuffer(bytearray(data), dtype=TORCH[dtype])
    return tensor.double() if dtype.startswith("F8") else tensor


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_finite_is_what_torch_says_for_every_pattern(dtype):
    numbers = patterns(dtype)
    expected = decoded(b"".join(numbers), dtype).isfinite().tolist()
    assert [is_finite(number, 0, len(number), dtype) for number in numbers] == expected
    assert not all(expected)
    assert any(expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_is_what_torch_says_for_every_finite_pattern(dtype):
    numbers = patterns(dtype)
    tensor = decoded(b"".join(numbers), dtype)
    expected = [(number, zero) for number, zero, finite in
                zip(numbers, (tensor == 0).tolist(), tensor.isfinite().tolist(), strict=True) if finite]  # fmt: skip
    assert [is_zero(number, 0, len(number), dtype) for number, _ in expected] == [zero for _, zero in expected]
    assert any(zero for _, zero in expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_bad_number_is_found_anywhere_and_only_between_the_bounds(dtype):
    size = ITEMSIZE[dtype]
    numbers = patterns(dtype)
    finite = decoded(b"".join(numbers), dtype).isfinite().tolist()
    good = [number for number, fine in zip(numbers, finite, strict=True) if fine]
    bad = [number for number, fine in zip(numbers, finite, strict=True) if not fine]
    rng = random.Random(11)
    for _ in range(50):
        before, inside, after = (rng.choices(good, k=rng.randrange(1, 40)) for _ in range(3))
        start, end = len(before) * size, (len(before) + len(inside)) * size
        before[-1], after[0] = rng.choice(bad), rng.choice(bad)
        assert is_finite(b"".join(before + inside + after), start, end, dtype)
        inside[rng.randrange(len(inside))] = rng.choice(bad)
        assert not is_finite(b"".join(before + inside + after), start, end, dtype)


def test_integers_are_finite_and_only_zero_bytes_are_zero():
    for dtype in ITEMSIZE.keys() - set(FLOATS):
        size = ITEMSIZE[dtype]
        assert is_finite(b"\xff" * size, 0, size, dtype)
        assert is_zero(bytes(size), 0, size, dtype)
        assert not is_zero(bytes(size - 1) + b"\x80", 0, size, dtype)


def test_the_known_dtypes_are_those_torch_loads_and_their_sizes_agree():
    assert {dtype: TORCH[dtype].itemsize for dtype in ITEMSIZE} == ITEMSIZE


def test_zeros_of_both_signs_mixed_are_zero_and_a_subnormal_is_not():
    zeros = b"\x00\x00\x00\x80" * 100
    assert is_zero(zeros, 0, len(zeros), "F16")
    for smallest in (b"\x01\x00", b"\x80\x00", b"\x80\x80", b"\x01\x80"):
        data = zeros[:200] + smallest + zeros[:200]
        assert not is_zero(data, 0, len(data), "F16")


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("F16", struct.pack("<e", 2.5), 2.5),
        ("F32", struct.pack("<f", 64.0), 64.0),
        ("F64", struct.pack("<d", -0.1), -0.1),
        ("BF16", b"\x80\x42", 64.0),
        ("I64", struct.pack("<q", 16), 16.0),
        ("I32", struct.pack("<i", -4), -4.0),
        ("U8", b"\x04", None),
    ],
)
def test_a_scalar_is_read_from_its_bytes(dtype, data, value):
    assert scalar(data, dtype) == value


# --- whole files ---------------------------------------------------------------------------------------------------

ONES = struct.pack("<4e", 1, 1, 1, 1)
ALPHA = ("F16", [], struct.pack("<e", 4))


def half(*numbers: float) -> tuple[str, list[int], bytes]:
    return "F16", [len(numbers), 1], struct.pack(f"<{len(numbers)}e", *numbers)


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "NaN in one weight": ("not_finite", {"a.lora_up.weight": half(1, 1), "b.lora_up.weight": half(1, NAN)}),
    "Inf in one weight": ("not_finite", {"a.lora_up.weight": half(1, 1), "b.lora_up.weight": half(INF)}),
    "-Inf in one weight": ("not_finite", {"a.lora_up.weight": half(1, 1), "b.lora_up.weight": half(1, -INF)}),
    "NaN in an alpha": ("not_finite", {"a.lora_up.weight": half(1), "b.alpha": ("F16", [], b"\x00\x7e")}),
    "NaN in an F32 weight": ("not_finite", {"a": half(1), "b": ("F32", [1], struct.pack("<f", NAN))}),
    "every lora_up zero": ("all_zero", {"a.lora_down.weight": half(1), "a.lora_up.weight": half(0, 0)}),
    "every lora_B zero": ("all_zero", {"unet.a.lora_A.weight": half(1), "unet.a.lora_B.weight": half(0)}),
    "every lora_up zero or -0.0": ("all_zero", {"a.lora_down.weight": half(1), "a.lora_up.weight": half(0.0, -0.0)}),
    "every tensor zero": ("all_zero", {"x": half(0), "y": half(-0.0, -0.0)}),
    "every tensor but alpha zero": ("all_zero", {"x": half(0), "x.alpha": ALPHA}),
    "zeros of other dtypes": ("all_zero", {"x": ("F64", [1], bytes(8)), "y": ("I32", [1], bytes(4))}),
}


@pytest.mark.parametrize(("code", "tensors"), REFUSED.values(), ids=REFUSED.keys())
def test_worthless_weights_are_refused(tmp_path, code, tensors):
    assert refusal_of(saved(tmp_path / "a.safetensors", file_with(tensors)), tmp_path) == code


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("NaN in one weight", "tensor 'b.lora_up.weight' holds NaN or Inf"),
        ("every lora_up zero", "all 1 lora_up (lora_B) tensors are zero"),
        ("every tensor zero", "all 2 weight tensors are zero"),
    ],
)
def test_the_refusal_names_the_tensor_or_what_is_zero(tmp_path, sentence, words):
    path = saved(tmp_path / "a.safetensors", file_with(REFUSED[sentence][1]))
    with pytest.raises(RefusedCheckpointError, match=re.escape(words)):
        read_checkpoint(path, tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"a.lora_up.weight": half(0), "b.lora_up.weight": half(0, 1)}, id="one of two lora_up learnt"),
        pytest.param({"a.lora_down.weight": half(0), "a.lora_up.weight": half(1)}, id="a zero lora_down"),
        pytest.param({"x": half(0), "y": ("F32", [1], struct.pack("<f", 1e38))}, id="a huge finite number"),
        pytest.param({"x.alpha": ALPHA}, id="alphas alone, which are no LoRA but finite"),
    ],
)
def test_odd_but_usable_weights_are_accepted(tmp_path, tensors):
    assert read_checkpoint(saved(tmp_path / "a.safetensors", file_with(tensors)), tmp_path).sha256
