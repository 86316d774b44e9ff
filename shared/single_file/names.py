"""Which tensors, of which shapes, a base model's single file holds, told from the configuration of its parts.

The names are those of the original implementations: CompVis/stable-diffusion (LDM) for the UNet and the VAE,
transformers' CLIP under a prefix for the first text encoder, OpenCLIP for SDXL's second. Shapes are (out, in, height,
width) of convolutions and (out, in) of linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODER = {
    "sd15": "cond_stage_model.transformer.text_model.",
    "sdxl": "conditioner.embedders.0.transformer.text_model.",
}
TEXT_ENCODER_2 = "conditioner.embedders.1.model."


def unet_tensors(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a UNet2DConditionModel of Stable Diffusion 1.x or SDXL.

    Raises:
        KeyError, TypeError, ValueError, IndexError: the configuration says too little or something else.
    """
    return _Unet(config).shapes


class _Unet:
    """Walks through the blocks in the order in which LDM numbers them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.shapes: Shapes = {}
        widths, layers = config["block_out_channels"], int(config["layers_per_block"])
        depths = config.get("transformer_layers_per_block", 1)
        self._depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
        self._text = int(config["cross_attention_dim"])
        self._convolves = not config.get("use_linear_projection", False)
        self._time = 4 * widths[0]
        attends = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
        self._two_layers("time_embed", widths[0], self._time, ("0", "2"))
        if config.get("addition_embed_type") == "text_time":
            self._two_layers("label_emb.0", config["projection_class_embeddings_input_dim"], self._time, ("0", "2"))
        skips = self._down(config["in_channels"], widths, layers, attends)
        self._res("middle_block.0", widths[-1], widths[-1])
        self._attend("middle_block.1", widths[-1], self._depths[-1])
        self._res("middle_block.2", widths[-1], widths[-1])
        self._up(skips, widths, layers, attends)
        self._norm("out.0", widths[0])
        self._conv("out.2", config["out_channels"], widths[0])

    def _down(self, inputs: int, widths: list[int], layers: int, attends: list[bool]) -> list[int]:
        """Return the width of what each block hands to its counterpart on the way up."""
        self._conv("input_blocks.0.0", widths[0], inputs)
        skips, width = [widths[0]], widths[0]
        for level, wanted in enumerate(widths):
            for _ in range(layers):
                block = f"input_blocks.{len(skips)}"
                self._res(f"{block}.0", width, wanted)
                if attends[level]:
                    self._attend(f"{block}.1", wanted, self._depths[level])
                width = wanted
                skips.append(width)
            if level < len(widths) - 1:
                self._conv(f"input_blocks.{len(skips)}.0.op", width, width)
                skips.append(width)
        return skips

    def _up(self, skips: list[int], widths: list[int], layers: int, attends: list[bool]) -> None:
        width, number = widths[-1], 0
        for level in reversed(range(len(widths))):
            for layer in range(layers + 1):
                block = f"output_blocks.{number}"
                self._res(f"{block}.0", width + skips.pop(), widths[level])
                width = widths[level]
                if attends[level]:
                    self._attend(f"{block}.1", width, self._depths[level])
                if level > 0 and layer == layers:
                    self._conv(f"{block}.{2 if attends[level] else 1}.conv", width, width)
                number += 1

    def _res(self, name: str, inputs: int, outputs: int) -> None:
        self._norm(f"{name}.in_layers.0", inputs)
        self._conv(f"{name}.in_layers.2", outputs, inputs)
        self._linear(f"{name}.emb_layers.1", outputs, self._time)
        self._norm(f"{name}.out_layers.0", outputs)
        self._conv(f"{name}.out_layers.3", outputs, outputs)
        if inputs != outputs:
            self._conv(f"{name}.skip_connection", outputs, inputs, side=1)

    def _attend(self, name: str, width: int, depth: int) -> None:
        self._norm(f"{name}.norm", width)
        for projection in ("proj_in", "proj_out"):
            if self._convolves:
                self._conv(f"{name}.{projection}", width, width, side=1)
            else:
                self._linear(f"{name}.{projection}", width, width)
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            for attention, seen in (("attn1", width), ("attn2", self._text)):
                self.shapes[f"{UNET}{block}.{attention}.to_q.weight"] = (width, width)
                self.shapes[f"{UNET}{block}.{attention}.to_k.weight"] = (width, seen)
                self.shapes[f"{UNET}{block}.{attention}.to_v.weight"] = (width, seen)
                self._linear(f"{block}.{attention}.to_out.0", width, width)
            self._linear(f"{block}.ff.net.0.proj", 8 * width, width)
            self._linear(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                self._norm(f"{block}.{norm}", width)

    def _two_layers(self, name: str, inputs: int, outputs: int, numbers: tuple[str, str]) -> None:
        self._linear(f"{name}.{numbers[0]}", outputs, inputs)
        self._linear(f"{name}.{numbers[1]}", outputs, outputs)

    def _linear(self, name: str, outputs: int, inputs: int) -> None:
        self.shapes |= _layer(UNET + name, outputs, inputs)

    def _conv(self, name: str, outputs: int, inputs: int, side: int = 3) -> None:
        self.shapes |= _layer(UNET + name, outputs, inputs, side, side)

    def _norm(self, name: str, width: int) -> None:
        self.shapes |= _layer(UNET + name, width)


def vae_tensors(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of an AutoencoderKL; raises as `unet_tensors`."""
    widths, layers = config["block_out_channels"], int(config["layers_per_block"])
    latent, last = int(config["latent_channels"]), len(widths) - 1
    shapes = _layer(f"{VAE}encoder.conv_in", widths[0], config["in_channels"], 3, 3)
    width = widths[0]
    for level, wanted in enumerate(widths):
        for layer in range(layers):
            shapes |= _vae_res(f"encoder.down.{level}.block.{layer}", width, wanted)
            width = wanted
        if level < last:
            shapes |= _layer(f"{VAE}encoder.down.{level}.downsample.conv", width, width, 3, 3)
    shapes |= _vae_middle("encoder", width)
    shapes |= _layer(f"{VAE}encoder.norm_out", width) | _layer(f"{VAE}encoder.conv_out", 2 * latent, width, 3, 3)
    shapes |= _layer(f"{VAE}decoder.conv_in", width, latent, 3, 3) | _vae_middle("decoder", width)
    for level in reversed(range(len(widths))):
        for layer in range(layers + 1):
            shapes |= _vae_res(f"decoder.up.{level}.block.{layer}", width, widths[level])
            width = widths[level]
        if level > 0:
            shapes |= _layer(f"{VAE}decoder.up.{level}.upsample.conv", width, width, 3, 3)
    shapes |= _layer(f"{VAE}decoder.norm_out", width)
    shapes |= _layer(f"{VAE}decoder.conv_out", config["out_channels"], width, 3, 3)
    shapes |= _layer(f"{VAE}quant_conv", 2 * latent, 2 * latent, 1, 1)
    return shapes | _layer(f"{VAE}post_quant_conv", latent, latent, 1, 1)


def _vae_res(name: str, inputs: int, outputs: int) -> Shapes:
    name = VAE + name
    shapes = _layer(f"{name}.norm1", inputs) | _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    shapes |= _layer(f"{name}.norm2", outputs) | _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    return shapes | (_layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def _vae_middle(half: str, width: int) -> Shapes:
    shapes = _vae_res(f"{half}.mid.block_1", width, width) | _vae_res(f"{half}.mid.block_2", width, width)
    shapes |= _layer(f"{VAE}{half}.mid.attn_1.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{VAE}{half}.mid.attn_1.{layer}", width, width, 1, 1)
    return shapes


def clip_tensors(config: Mapping[str, Any], prefix: str) -> Shapes:
    """Return the tensors of a CLIPTextModel in transformers' names; raises as `unet_tensors`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        f"{prefix}embeddings.token_embedding.weight": (config["vocab_size"], width),
        f"{prefix}embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{layer}.self_attn.{projection}", width, width)
        shapes |= _layer(f"{layer}.mlp.fc1", inner, width) | _layer(f"{layer}.mlp.fc2", width, inner)
        shapes |= _layer(f"{layer}.layer_norm1", width) | _layer(f"{layer}.layer_norm2", width)
    return shapes | _layer(f"{prefix}final_layer_norm", width)


def open_clip_tensors(config: Mapping[str, Any], prefix: str) -> Shapes:
    """Return the tensors of a CLIPTextModelWithProjection in OpenCLIP's names; raises as `unet_tensors`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        f"{prefix}token_embedding.weight": (config["vocab_size"], width),
        f"{prefix}positional_embedding": (config["max_position_embeddings"], width),
        f"{prefix}text_projection": (width, config["projection_dim"]),
    }
    for index in range(config["num_hidden_layers"]):
        block = f"{prefix}transformer.resblocks.{index}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes |= _layer(f"{block}.attn.out_proj", width, width)
        shapes |= _layer(f"{block}.mlp.c_fc", inner, width) | _layer(f"{block}.mlp.c_proj", width, inner)
        shapes |= _layer(f"{block}.ln_1", width) | _layer(f"{block}.ln_2", width)
    return shapes | _layer(f"{prefix}ln_final", width)


def _layer(name: str, outputs: int, *inner: int) -> Shapes:
    """Return weight and bias; a norm has no inner sizes."""
    return {f"{name}.weight": (outputs, *inner), f"{name}.bias": (outputs,)}
