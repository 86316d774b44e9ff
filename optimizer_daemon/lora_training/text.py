"""Captions as text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

_MOST_KEPT_BYTES = 1 << 30  # of the host's memory: 4,500 captions of SD 1.5, 1,700 of SDXL, in float32


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet is told of some captions.

    Args:
        states: (batch, tokens, width), what it attends to.
        pooled: (batch, width of SDXL's second text encoder's projection); None where the family has none.
    """

    states: Tensor
    pooled: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(self, device: torch.device | str) -> TextEmbedding:
        """Return it on a device."""
        return TextEmbedding(self.states.to(device), None if self.pooled is None else self.pooled.to(device))

    @staticmethod
    def joined(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """Put several behind each other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextEmbedding(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


class TextConditioning:
    """Turns captions into what the UNet is told.

    Frozen text encoders see each caption alone: in a batch their rounding would depend on the company, and a resumed
    training would not repeat the uninterrupted one. What they say of captions that come again is kept in the host's
    memory. Where one is trained, all see every batch anew.

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
        self._kept: dict[str, TextEmbedding] = {}
        self._kept_bytes = 0

    def of(self, captions: list[str], fleeting: Sequence[bool] | None = None) -> TextEmbedding:
        """Return the embedding of a batch.

        Args:
            captions: of the batch.
            fleeting: of each, whether it was drawn and will hardly come again; none was if None.
        """
        if self._trained:
            return self._encode(captions)
        drawn = fleeting or [False] * len(captions)
        return TextEmbedding.joined([self._frozen(*each) for each in zip(captions, drawn, strict=True)])

    def _frozen(self, caption: str, fleeting: bool) -> TextEmbedding:
        if (kept := self._kept.get(caption)) is not None:
            return kept.to(self._pairs[0][1].device)
        with torch.no_grad():
            said = self._encode([caption])
        # Once it is full, the first stay: what is needed in turn would else be thrown away just before its turn.
        if not fleeting and self._kept_bytes + said.size_bytes <= _MOST_KEPT_BYTES:
            self._kept[caption] = said.to("cpu")
            self._kept_bytes += said.size_bytes
        return said

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
