"""Captions as text embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

_MOST_KEPT = 2048  # captions; one is 77 x 768 numbers in SD 1.5, 237 kB in float32, and 631 kB in SDXL


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
        max_token_length: tokens of a caption that count, without start and end; as many as the encoder reads if None.
        trained: gradients flow through the encoders.
    """

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        encoders: Sequence[nn.Module],
        clip_skip: int | None,
        *,
        max_token_length: int | None,
        trained: bool,
    ) -> None:
        self._pairs: list[tuple[Any, Any]] = list(zip(tokenizers, encoders, strict=True))
        self._clip_skip = clip_skip or 1
        self._max_token_length = max_token_length
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
        outputs = [self._outputs(tokenizer, encoder, captions) for tokenizer, encoder in self._pairs]
        if len(outputs) == 1:
            return outputs[0]
        return TextEmbedding(torch.cat([output.states for output in outputs], dim=-1), outputs[-1].pooled)

    def _outputs(self, tokenizer: Any, encoder: Any, captions: list[str]) -> TextEmbedding:
        """Return what one text encoder says of a batch."""
        ids = _windows(tokenizer, captions, self._max_token_length).to(encoder.device)
        batch, windows, _ = ids.shape
        inside = len(self._pairs) > 1 or self._clip_skip > 1
        said = encoder(ids.flatten(0, 1), output_hidden_states=inside)
        if not inside:
            states = said.last_hidden_state
        elif len(self._pairs) > 1:
            states = said.hidden_states[-2]
        else:
            states = text_model_of(encoder).final_layer_norm(said.hidden_states[-self._clip_skip])
        pooled = getattr(said, "text_embeds", None)
        return TextEmbedding(
            _joined_windows(states.unflatten(0, (batch, windows))), None if pooled is None else pooled[::windows]
        )


def text_model_of(encoder: Any) -> Any:
    """Return the transformer itself, which transformers before 5.6 keeps one level deeper."""
    return getattr(encoder, "text_model", encoder)


def _windows(tokenizer: Any, captions: list[str], max_token_length: int | None) -> Tensor:
    """Return (batch, windows, tokens): captions padded and cut to the length, in pieces that an encoder can read.

    Each window has a start and an end of its own. Where padding is no end, as in SDXL's second text encoder, a full
    window ends with one, and an empty one has it behind its start. Source: sd-scripts' TokenizeStrategy.
    """
    readable: int = tokenizer.model_max_length
    length = readable if max_token_length is None else max_token_length + 2
    ids: Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    if length <= readable:
        return ids[:, None]
    inside = readable - 2
    starts = range(1, length - inside, inside)
    pieces = [torch.cat([ids[:, :1], ids[:, start : start + inside], ids[:, -1:]], dim=1) for start in starts]
    windows = torch.stack(pieces, dim=1)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if padding != end:
        full = (windows[:, :, -2] != end) & (windows[:, :, -2] != padding)
        windows[:, :, -1][full] = end
        empty = windows[:, :, 1] == padding
        windows[:, :, 1][empty] = end
    return windows


def _joined_windows(states: Tensor) -> Tensor:
    """Return (batch, tokens, width) of (batch, windows, tokens, width): one start, all insides, one end."""
    if states.shape[1] == 1:
        return states[:, 0]
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
