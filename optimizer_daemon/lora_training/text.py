"""Captions as text embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

_MOST_KEPT = 2048  # captions; one is 77 x 768 numbers in SD 1.5, 237 kB in float32


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet is told of some captions.

    Args:
        states: (batch, tokens, width), what it attends to.
        pooled: (batch, width of SDXL's second text encoder's projection); None where the family has none.
    """

    states: Tensor
    pooled: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """Put several behind each other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextEmbedding(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


class TextConditioning:
    """Turns captions into what the UNet is told.

    Frozen text encoders see each different caption once, alone: in a batch their rounding would depend on the company,
    and a resumed training would not repeat the uninterrupted one. Where one is trained, all see every batch anew.

    Args:
        tokenizers: the base model's, one for each text encoder.
        encoders: the base model's, with their LoRA where they are trained; SDXL has two.
        clip_skip: which layer's output, counted from the end; 1 is the last. kohya's count. As in sd-scripts it means
            nothing for SDXL, which takes the last layer but one of both encoders, without the last norm.
        trained: gradients flow through the encoders.
    """

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        encoders: Sequence[nn.Module],
        clip_skip: int | None,
        *,
        trained: bool,
    ) -> None:
        self._pairs: list[tuple[Any, Any]] = list(zip(tokenizers, encoders, strict=True))
        self._clip_skip = clip_skip or 1
        self._trained = trained
        self._kept: OrderedDict[str, TextEmbedding] = OrderedDict()

    def of(self, captions: list[str]) -> TextEmbedding:
        """Return the embedding of a batch."""
        if self._trained:
            return self._encode(captions)
        return TextEmbedding.joined([self._frozen(caption) for caption in captions])

    def _frozen(self, caption: str) -> TextEmbedding:
        if caption not in self._kept:
            with torch.no_grad():
                self._kept[caption] = self._encode([caption])
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return self._kept[caption]

    def _encode(self, captions: list[str]) -> TextEmbedding:
        if len(self._pairs) == 1:
            ((tokenizer, encoder),) = self._pairs
            return TextEmbedding(_layer(encoder, _ids(tokenizer, captions).to(encoder.device), self._clip_skip))
        first, second = (
            encoder(_ids(tokenizer, captions).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in self._pairs
        )
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return TextEmbedding(states, second.text_embeds)


def text_model_of(encoder: Any) -> Any:
    """Return the transformer itself, which transformers before 5.6 keeps one level deeper."""
    return getattr(encoder, "text_model", encoder)


def _ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """Return (batch, tokens), padded and cut to the tokenizer's length."""
    encoded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def _layer(encoder: Any, ids: Tensor, clip_skip: int) -> Tensor:
    """Return (batch, tokens, width): the output of a layer counted from the end, through the last norm."""
    if clip_skip == 1:
        last: Tensor = encoder(ids).last_hidden_state
        return last
    layers = encoder(ids, output_hidden_states=True).hidden_states
    skipped: Tensor = text_model_of(encoder).final_layer_norm(layers[-clip_skip])
    return skipped
