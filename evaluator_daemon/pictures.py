"""Pictures on disk: samples and their sheet, each carrying how it was made in the form other programs read.

The text is AUTOMATIC1111's "infotext" in a PNG text chunk named `parameters`; ComfyUI and most galleries read it too.
Source: stable-diffusion-webui 1.10, modules/processing.py create_infotext and modules/infotext_utils.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import Picture
from shared.errors import DiskError
from shared.files import sweep_temp_files, write_bytes
from shared.layout import RenderLayout
from shared.safetensors_file import Checkpoint
from shared.samplers import SAMPLER_TITLES
from shared.schemas import PlannedSample

_GRID_COLUMNS = 4
_CHUNK = "parameters"


@dataclass(frozen=True)
class AppliedLora:
    """The LoRA that a picture shows.

    Args:
        name: its file's name without .safetensors.
        short_hash: the first 12 hexadecimal digits of its data's SHA-256, by which the web UI finds it.
        scale: strength it was applied with; 1 is as trained.
    """

    name: str
    short_hash: str
    scale: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, scale: float) -> AppliedLora:
        """Return what a picture of this checkpoint has to say."""
        return cls(checkpoint.path.stem, checkpoint.data_sha256[:12], scale)


def descriptions(job: Job, lora: AppliedLora | None) -> list[str]:
    """Return the text of each sample of the plan.

    Args:
        lora: None for the base model alone.
    """
    return [describe(job.plan.sample(index), job, lora) for index in range(job.plan.num_samples)]


def describe(sample: PlannedSample, job: Job, lora: AppliedLora | None) -> str:
    """Return how one sample was made: prompt, negative prompt and a line of settings."""
    plan = job.plan
    settings: dict[str, object] = {
        "Steps": sample.steps,
        "Sampler": SAMPLER_TITLES.get(sample.sampler, sample.sampler),
        "CFG scale": f"{sample.cfg_scale:g}",
        "Seed": sample.seed,
        "Size": f"{sample.width}x{sample.height}",
        "Model hash": plan.base_digest[:10],
        "Model": job.base_model.stem if job.base_model.is_file() else job.base_model.name,
        "Clip skip": plan.clip_skip if plan.clip_skip > 1 else None,
        "RNG": "CPU",  # the web UI's name for noise from one CPU generator per picture
        "Lora hashes": f"{lora.name}: {lora.short_hash}" if lora else None,
        "Version": f"lora-tuner {version('lora-tuner')}",
    }
    words = " ".join(sample.prompt.split()) + (f" <lora:{lora.name}:{lora.scale:g}>" if lora else "")
    lines = [words]
    if negative := " ".join(sample.negative_prompt.split()):
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def write_pictures(layout: RenderLayout, pictures: Sequence[Picture], texts: Sequence[str]) -> None:
    """Write each sample and the sheet of all; samples of an earlier, larger plan go.

    Args:
        texts: what each sample says about itself; the sheet says what the first one says.
    Raises:
        DiskError: no room, or the folder above is gone: a trial that somebody removed must not come back.
        FileExistsError: a file stands at the folder's name.
    """
    try:
        layout.folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise DiskError(layout.folder, error) from error
    sweep_temp_files(layout.folder)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        write_bytes(layout.sample(index), to_png(picture, text))
    write_bytes(layout.grid, to_png(grid(pictures), texts[0]))
    extra = len(pictures)
    while layout.sample(extra).exists():
        layout.sample(extra).unlink()
        extra += 1


def read_pictures(layout: RenderLayout, count: int) -> list[Picture]:
    """Read samples 0 to count - 1 back.

    Raises:
        OSError: one is missing or no picture.
    """
    pictures = []
    for index in range(count):
        with Image.open(layout.sample(index)) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return pictures


def grid(pictures: Sequence[Picture]) -> Picture:
    """Lay pictures out, four in a row, each in the middle of a cell as large as the largest; the rest is black."""
    columns = min(_GRID_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_height, cell_width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheet = np.zeros((rows * cell_height, columns * cell_width, 3), np.uint8)
    for index, picture in enumerate(pictures):
        height, width, _ = picture.shape
        top = index // columns * cell_height + (cell_height - height) // 2
        left = index % columns * cell_width + (cell_width - width) // 2
        sheet[top : top + height, left : left + width] = picture
    return sheet


def to_png(picture: Picture, text: str) -> bytes:
    """Return the file's content; equal pixels and text give equal bytes."""
    said = PngInfo()
    said.add_text(_CHUNK, text)  # as UTF-8 in an iTXt chunk where it goes beyond Latin-1
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


def _quoted(value: object) -> str:
    """A value as a reader that splits at commas and colons takes it whole."""
    text = " ".join(str(value).split())
    return json.dumps(text, ensure_ascii=False) if "," in text or ":" in text or text[:1] == '"' else text
