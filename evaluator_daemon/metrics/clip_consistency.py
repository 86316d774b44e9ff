"""How well each picture shows its prompt: the cosine between CLIP's embeddings of both, -1 to 1, higher is better.

Source: Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5. The weights come from a local folder.
"""

from __future__ import annotations

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import RenderedSet, measured, unavailable
from shared.schemas import Metric

NAME = "clip_consistency"


class ClipConsistency:
    """Calls the model itself; unavailable where no CLIP is configured or its folder cannot be loaded."""

    def __init__(self, job: Job) -> None:
        self._why_not = "no CLIP model is configured; name a local folder by --clip-model"
        if job.clip_model is None:
            return
        self._device = torch.device(job.device)
        try:
            self._model = CLIPModel.from_pretrained(job.clip_model, local_files_only=True, dtype=torch.float32)
            self._tokenizer = CLIPTokenizer.from_pretrained(job.clip_model, local_files_only=True)
            self._images = CLIPImageProcessor.from_pretrained(job.clip_model, local_files_only=True)
        except (OSError, ValueError) as error:
            self._why_not = f"the CLIP in {job.clip_model} cannot be loaded: {' '.join(str(error).split())[:300]}"
            return
        self._model.train(False).to(self._device)
        self._why_not = ""

    @torch.inference_mode()
    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not:
            return {NAME: unavailable(self._why_not, "maximise")}
        words = self._tokenizer(
            list(rendered.prompts),
            padding="max_length",
            max_length=self._model.text_model.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        pixels = self._images(images=list(rendered.pictures), return_tensors="pt").pixel_values
        out = self._model(
            input_ids=words.input_ids.to(self._device),
            attention_mask=words.attention_mask.to(self._device),
            pixel_values=pixels.to(self._device),
        )
        cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return {NAME: measured([float(cosine) for cosine in cosines.cpu()], "maximise")}
