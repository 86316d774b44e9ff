"""Weight files for tests: real ones written by safetensors, and hand-made ones no writer would produce."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import RefusedCheckpointError
from shared.safetensors_file import read_checkpoint

RANK = 4

Parts = dict[str, tuple[str, list[int], bytes]]  # tensor name -> dtype, shape, bytes


def file_of(header: str | bytes | dict, data: bytes = b"") -> bytes:
    """Return length + header + data, whatever they say."""
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + data


def file_with(tensors: Parts, metadata: dict[str, str] | None = None) -> bytes:
    """Return a well-formed file with these tensors in this order."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return file_of(header, b"".join(data for _, _, data in tensors.values()))


def data_section(file: bytes) -> bytes:
    """Return what follows the header."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def saved(path: Path, file: bytes) -> Path:
    """Write the bytes and return the path."""
    path.write_bytes(file)
    return path


def refusal_of(path: Path, inside: Path) -> str:
    """Return the code `read_checkpoint` refuses a file with."""
    with pytest.raises(RefusedCheckpointError) as caught:
        read_checkpoint(path, inside)
    assert len(str(caught.value)) < 900, "a hostile file must not fill the log"
    return caught.value.code


def kohya_modules() -> Iterator[tuple[str, int, int, bool]]:
    """Yield (name, in, out, is 1x1 convolution) for a UNet of two widths and a text encoder of two layers."""
    unet = {"down_blocks_0_attentions_0": 32, "mid_block_attentions_0": 64}
    unet |= {"up_blocks_1_attentions_0": 32, "up_blocks_1_attentions_1": 32}
    for block, width in unet.items():
        yield f"lora_unet_{block}_proj_in", width, width, True
        yield f"lora_unet_{block}_proj_out", width, width, True
        inner = f"lora_unet_{block}_transformer_blocks_0"
        for attention, context in (("attn1", width), ("attn2", 48)):
            yield f"{inner}_{attention}_to_q", width, width, False
            yield f"{inner}_{attention}_to_k", context, width, False
            yield f"{inner}_{attention}_to_v", context, width, False
            yield f"{inner}_{attention}_to_out_0", width, width, False
        yield f"{inner}_ff_net_0_proj", width, 8 * width, False
        yield f"{inner}_ff_net_2", 4 * width, width, False
    for layer in range(2):
        encoder = f"lora_te_text_model_encoder_layers_{layer}"
        for part in ("q", "k", "v", "out"):
            yield f"{encoder}_self_attn_{part}_proj", 48, 48, False
        yield f"{encoder}_mlp_fc1", 48, 192, False
        yield f"{encoder}_mlp_fc2", 192, 48, False


def with_sorted_metadata(file: bytes) -> bytes:
    """Return the same file with the metadata in order: safetensors writes it in another order in each process."""
    text = file[8 : len(file) - len(data_section(file))]
    header = json.loads(text)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file_of(sorted_text.ljust(len(text)), data_section(file))


@functools.cache
def real_lora(*, with_hash: bool = True) -> bytes:
    """Return an fp16 LoRA as kohya-ss/sd-scripts saves it: its key names, `ss_` metadata and `sshs_model_hash`."""
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(42)
    tensors = {}
    for name, into, out, convolution in kohya_modules():
        tail = (1, 1) if convolution else ()
        tensors[f"{name}.lora_down.weight"] = torch.rand((RANK, into, *tail), generator=generator) - 0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn((out, RANK, *tail), generator=generator) * 0.01
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    metadata = {
        "ss_epoch": "2",
        "ss_steps": "8",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": "2.0",
        "ss_session_id": "1874624210",
        "ss_tag_frequency": json.dumps({"1_cat": {"a cat \u2764": 4}}),
    }
    if with_hash:  # sd-scripts hashes the data of a serialisation that has the ss_ keys only
        metadata["sshs_model_hash"] = hashlib.sha256(data_section(save(tensors, metadata))).hexdigest()
        metadata["modelspec.title"] = "lora_trial_5"
    return with_sorted_metadata(save(tensors, metadata))
