"""The networks that metrics share: loaded once per process, and embeddings of reference pictures once per study."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import AutoModel, BitImageProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import Picture, loaded_once, require_planned
from shared.errors import DiskError
from shared.files import write_bytes
from shared.held_out import require_unchanged
from shared.layout import StudyLayout
from shared.schemas.pictures import Picture as PictureFile

BATCH = 8
"""Reference pictures are embedded so many at a time."""


class Embedder(Protocol):
    """A network that turns pictures into unit vectors."""

    digest: str

    def embed(self, pictures: Sequence[Picture]) -> Tensor:
        """Return (n, d) float32 unit vectors on the network's device."""


E = TypeVar("E")


class _Kept:
    """The latest answers by the identity of the asked pictures: metrics ask about the same set one after the other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: list[tuple[Sequence[Picture], Any]] = []

    def get(self, pictures: Sequence[Picture], compute: Callable[[], E]) -> E:
        for known, answer in self._answers:
            if known is pictures:
                found: E = answer
                return found
        answer = compute()
        self._answers = [*self._answers[-self._size + 1 :], (pictures, answer)]
        return answer


class Clip:
    """CLIP's two towers.

    Args:
        folder: in transformers' layout.
        digest: its content.
    """

    def __init__(self, folder: Path, digest: str, device: str) -> None:
        self.digest = f"clip:{digest}"
        self._device = torch.device(device)
        self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._images = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model.train(False).to(self._device)
        self.temperature = float(self._model.logit_scale.detach().exp())
        """What CLIP was trained to multiply its cosines with before a softmax."""
        self._texts: dict[str, Tensor] = {}
        self._kept = _Kept(2)  # a checkpoint's pictures and the base model's
        self._sees_layers = False

    def embed(self, pictures: Sequence[Picture]) -> Tensor:
        return self._look(pictures)[0]

    def moments(self, pictures: Sequence[Picture]) -> Tensor:
        """Return (n, layers, 2, channels) float64 on the CPU: see `channel_moments`."""
        if not self._sees_layers:  # most studies ask for embeddings alone
            self._sees_layers = True
            self._kept = _Kept(2)
        found = self._look(pictures)[1]
        assert found is not None
        return found

    @torch.inference_mode()
    def _look(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings, and the early layers' moments where somebody has asked for them."""

        def compute() -> tuple[Tensor, Tensor | None]:
            pixels = self._images(images=list(pictures), return_tensors="pt").pixel_values.to(self._device)
            out = self._model.vision_model(pixel_values=pixels, output_hidden_states=self._sees_layers)
            embedding = self._model.visual_projection(out.pooler_output)
            moments = _moments(out.hidden_states) if self._sees_layers else None
            return torch.nn.functional.normalize(embedding, dim=1), moments

        return self._kept.get(pictures, compute)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return (n, d) float32 unit vectors."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if unknown:
            words = self._tokenizer(
                unknown,
                padding="max_length",
                max_length=self._model.text_model.config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
            out = self._model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)
            embeddings = torch.nn.functional.normalize(self._model.text_projection(out.pooler_output), dim=1)
            self._texts |= dict(zip(unknown, embeddings, strict=True))
        return torch.stack([self._texts[text] for text in texts])


class Dino:
    """DINOv2's class token.

    Args:
        folder: in transformers' layout.
        digest: its content.
    """

    def __init__(self, folder: Path, digest: str, device: str) -> None:
        self.digest = f"dino:{digest}"
        self._device = torch.device(device)
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._images = BitImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model.train(False).to(self._device)
        self._kept = _Kept(2)

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Picture]) -> Tensor:
        def compute() -> Tensor:
            pixels = self._images(images=list(pictures), return_tensors="pt").pixel_values.to(self._device)
            return torch.nn.functional.normalize(self._model(pixel_values=pixels).last_hidden_state[:, 0], dim=1)

        return self._kept.get(pictures, compute)


def clip_of(job: Job) -> tuple[Clip | None, str]:
    """Return the job's CLIP, one for all metrics of the process, or None and why it cannot be loaded.

    Raises:
        ResourceError: it cannot be, and the plan was made with it.
    """
    return _load(Clip, "CLIP", job.clip_model, "clip_digest", job)


def dino_of(job: Job) -> tuple[Dino | None, str]:
    """Return the job's DINOv2, one for all metrics of the process, or None and why it cannot be loaded.

    Raises:
        ResourceError: it cannot be, and the plan was made with it.
    """
    return _load(Dino, "DINOv2", job.dino_model, "dino_digest", job)


def _load(
    network: Callable[[Path, str, str], E], name: str, folder: Path | None, identity: str, job: Job
) -> tuple[E | None, str]:
    assert folder is not None, "why_not has seen that one is configured"
    digest = str(job.plan.scoring.values.get(identity, ""))
    try:
        key = (name, folder, digest, job.device)
        return loaded_once(key, lambda: network(folder, digest, job.device)), ""
    except (OSError, ValueError, SafetensorError) as error:
        why = f"the {name} in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        require_planned(job, identity, why)
        return None, why


def read_picture(file: PictureFile) -> Picture:
    """Return a picture file as (height, width, 3) uint8 sRGB."""
    with Image.open(file.path) as image:
        return np.array(image.convert("RGB"))  # a copy: torch wants it writable


def reference_embeddings(network: Embedder, pictures: Sequence[PictureFile], job: Job) -> Tensor:
    """Return (n, d) unit vectors of the pictures on the CPU, computed once per study.

    They are kept in the study's reference/, under the identity of network and contents; without the network's identity
    nothing is kept.

    Raises:
        StudyMismatchError: a picture is not what the study began with.
    """
    return cached(network.digest, pictures, job, lambda: _embed_files(network, pictures))["embeddings"]


def cached(
    what: str, pictures: Sequence[PictureFile], job: Job, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what was computed from the pictures before, else compute it and keep it in the study's reference/.

    Raises:
        DiskError: it cannot be kept.
        StudyMismatchError: a picture is not what the study began with.
    """
    if what.endswith(":"):
        return compute()
    identity = "\n".join([what, *(picture.sha256 for picture in pictures)])
    folder = StudyLayout(job.root).reference
    file = folder / f"features-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    try:
        return load_tensors(file.read_bytes())
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: made anew
    require_unchanged(pictures, "reference")
    found = compute()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(folder, error) from error
    write_bytes(file, save_tensors(found))
    return found


def _embed_files(network: Embedder, pictures: Sequence[PictureFile]) -> dict[str, Tensor]:
    parts = [
        network.embed([read_picture(file) for file in pictures[start : start + BATCH]]).cpu()
        for start in range(0, len(pictures), BATCH)
    ]
    return {"embeddings": torch.cat(parts)}


def reference_moments(clip: Clip, pictures: Sequence[PictureFile], job: Job) -> Tensor:
    """Return `channel_moments` of the pictures, computed once per study and kept like `reference_embeddings`.

    Raises:
        StudyMismatchError: a picture is not what the study began with.
    """

    def compute() -> dict[str, Tensor]:
        read = [read_picture(file) for file in pictures]
        batches = [read[start : start + BATCH] for start in range(0, len(read), BATCH)]
        return {"moments": torch.cat([channel_moments(clip, batch) for batch in batches])}

    return cached(f"moments:{clip.digest}", pictures, job, compute)["moments"]


def channel_moments(clip: Clip, pictures: Sequence[Picture]) -> Tensor:
    """Return (n, layers, 2, channels) float64: mean and mean square over the patches, of CLIP's first layers.

    The patch embedding and the first half of the layers count: texture and colour, before the later layers speak of
    content.
    """
    return clip.moments(pictures)


def _moments(states: Sequence[Tensor]) -> Tensor:
    """Reduce CLIP's hidden states (n, 1 + patches, channels), the patch embedding first, to `channel_moments`."""
    found = []
    for state in states[: (len(states) + 1) // 2]:
        patches = state[:, 1:].double().cpu()  # the first token is the class
        found.append(torch.stack([patches.mean(dim=1), patches.square().mean(dim=1)], dim=1))
    return torch.stack(found, dim=1)


def moments_distance(moments: Tensor, reference: Tensor) -> float:
    """Return how far the pooled statistics of two sets of pictures are apart, in spreads of the reference's channels.

    Args:
        moments: (n, layers, 2, channels) from `channel_moments`.
        reference: (h, layers, 2, channels).
    """
    (mean, spread), (wanted, unit) = _pooled(moments), _pooled(reference)
    unit = unit.clamp_min(1e-6)
    apart = ((mean - wanted) / unit).square() + ((spread - unit) / unit).square()
    return float(apart.mean(dim=1).sqrt().mean())


def _pooled(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return (layers, channels) mean and standard deviation over all patches of all pictures."""
    mean, square = moments.mean(dim=0).unbind(dim=1)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def nearest_neighbours(embeddings: Tensor) -> Tensor:
    """Return (n,) cosines of each picture with the nearest of the others; -1 where there is no other."""
    found = []
    for start in range(0, len(embeddings), 1024):  # 10,000 pictures at once would be 400 MB
        cosines = embeddings[start : start + 1024] @ embeddings.T
        rows = torch.arange(len(cosines))
        cosines[rows, rows + start] = -1.0
        found.append(cosines.max(dim=1).values)
    return torch.cat(found)
