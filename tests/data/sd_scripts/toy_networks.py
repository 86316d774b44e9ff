"""A UNet and a text encoder of a few layers, with the class names that sd-scripts looks for. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CLIPMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)


class ResnetBlock2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.time_emb_proj = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 4)
        self.conv_shortcut = nn.Conv2d(4, 4, 1)


class Downsample2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)


class Encoder(nn.Module):
    """(batch, tokens, 6) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.ModuleDict({"mlp": CLIPMLP()})

    def forward(self, states: Tensor) -> Tensor:
        mlp = self.text_model["mlp"]
        return mlp.fc2(mlp.fc1(states))


class Unet(nn.Module):
    """(batch, 4, 6, 6) and (batch, 5) -> (batch, 9, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet, self.attention, self.down = ResnetBlock2D(), Transformer2DModel(), Downsample2D()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        resnet, attention = self.resnet, self.attention
        x = resnet.conv_shortcut(x) + resnet.conv1(x) + resnet.time_emb_proj(emb)[:, :, None, None]
        return attention.proj_out(self.down.conv(attention.proj_in(x)).flatten(2).mT)


def toys() -> tuple[Encoder, Unet]:
    """Return both with weights that are the same everywhere."""
    parts = Encoder(), Unet()
    for part in parts:
        fill(part, 0.3)
    return parts


def fill(module: nn.Module, step: float, ending: str = "") -> None:
    """Give the weights whose names end so, and no others, the values of a sine."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(ending):
                weight.copy_(torch.sin(torch.arange(weight.numel()) * step).reshape(weight.shape))


def outputs(encoder: Encoder, unet: Unet) -> list[float]:
    """Return what both say to fixed inputs, with everything random after seed 5."""
    torch.manual_seed(5)
    text = encoder(torch.cos(torch.arange(3 * 2 * 6.0)).reshape(3, 2, 6))
    image = unet(torch.cos(torch.arange(3 * 4 * 36.0)).reshape(3, 4, 6, 6), torch.ones(3, 5))
    return torch.cat([text.flatten(), image.flatten()[::3]]).tolist()
