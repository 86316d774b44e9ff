"""Captions as text embeddings."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

_MOST_KEPT = 2048  # captions; one is 77 x 768 numbers in SD 1.5, 237 kB in float32


class TextConditioning:
    """Turns captions into what the UNet attends to.

    A frozen text encoder sees each different caption once, alone: in a batch its rounding would depend on the company,
    and a resumed training would not repeat the uninterrupted one. A trained one sees every batch anew.

    Args:
        tokenizer: the base model's.
        encoder: the base model's, with its LoRA where it is trained.
        clip_skip: which layer's output, counted from the end; 1 is the last. kohya's count.
        trained: gradients flow through the encoder.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, clip_skip: int | None, *, trained: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._clip_skip = clip_skip or 1
        self._trained = trained
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, captions: list[str]) -> Tensor:
        """Return (batch, tokens, width)."""
        if self._trained:
            return self._encode(captions)
        return torch.cat([self._frozen(caption) for caption in captions])

    def _frozen(self, caption: str) -> Tensor:
        if caption not in self._kept:
            with torch.no_grad():
                self._kept[caption] = self._encode([caption])
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return self._kept[caption]

    def _encode(self, captions: list[str]) -> Tensor:
        ids = self._tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self._encoder.device)
        if self._clip_skip == 1:
            last: Tensor = self._encoder(ids).last_hidden_state
            return last
        layers = self._encoder(ids, output_hidden_states=True).hidden_states
        norm: Any = text_model_of(self._encoder).final_layer_norm
        skipped: Tensor = norm(layers[-self._clip_skip])
        return skipped


def text_model_of(encoder: CLIPTextModel) -> nn.Module:
    """Return the transformer itself, which transformers before 5.6 keeps one level deeper."""
    inner: nn.Module = getattr(encoder, "text_model", encoder)
    return inner
