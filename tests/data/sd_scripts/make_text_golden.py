"""Write what sd-scripts' own functions tell a UNet of captions and sizes.

    cd $SD_SCRIPTS_DIR && $SD_SCRIPTS_PYTHON <this file> TOKENIZERS > text_golden.json

TOKENIZERS is what shared.clip_tokenizers.kohya_tokenizer_folder makes; nothing else of this project is needed here.

The text encoders are tiny and their weights are drawn by name, so that every version of transformers gives the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

CAPTIONS = ["a red ball, soft light", "long, " + ", ".join(f"tag number {number}" for number in range(40)), ""]
LENGTHS = (None, 150, 225)  # max_token_length
SIZES = [
    ((512, 512), (512, 512)),
    ((600, 400), (576, 384)),
    ((1000, 563), (640, 384)),
    ((333, 500), (384, 576)),
    ((1024, 1024), (832, 1216)),
    ((641, 480), (1152, 896)),
    ((100, 1000), (256, 1024)),
]
TOKENS = (0, 1, 5, 76, 100, -1)  # whose states are looked at, where there are so many
FIRST = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 12}
SECOND = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_hidden_layers": 3}


def text_encoders(kinds: dict[str, Any], config: Any) -> list[Any]:
    """The two encoders of SDXL; sd-scripts takes the first one's 12th state, which is the last but one of 12 layers."""
    common = {"projection_dim": 40, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    first = kinds["CLIPTextModel"](config(**FIRST, **common))
    second = kinds["CLIPTextModelWithProjection"](config(**SECOND, **common))
    for number, encoder in enumerate((first, second)):
        draw_weights(encoder, number)
    return [first.eval(), second.eval()]


def draw_weights(module: Any, seed: int) -> None:
    """Give each parameter numbers that depend on its name alone, as far as versions of transformers agree on it."""
    named = {name.removeprefix("text_model."): parameter for name, parameter in module.named_parameters()}
    for number, name in enumerate(sorted(named)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        named[name].data = torch.randn(named[name].shape, generator=generator) * 0.3


def states_of(states: Any) -> list[list[float]]:
    """A few numbers of a caption's states, (tokens, width)."""
    return [states[token, ::24].tolist() for token in TOKENS if token < len(states)]


def main(cache: str) -> None:
    from library.strategy_sd import SdTextEncodingStrategy, SdTokenizeStrategy
    from library.strategy_sdxl import SdxlTextEncodingStrategy, SdxlTokenizeStrategy
    from library.train_util import BucketManager
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
    encoders = text_encoders(kinds, CLIPTextConfig)
    told: list[dict[str, Any]] = []
    with torch.no_grad():
        for length in LENGTHS:
            for clip_skip in (None, 2):
                tokens = SdTokenizeStrategy(False, length, cache)
                strategy = SdTextEncodingStrategy(clip_skip)
                for caption in CAPTIONS:
                    (states,) = strategy.encode_tokens(tokens, encoders[:1], tokens.tokenize([caption]))
                    entry = {"family": "sd15", "max_token_length": length, "clip_skip": clip_skip, "caption": caption}
                    told.append({**entry, "tokens": states.shape[1], "states": states_of(states[0])})
            tokens = SdxlTokenizeStrategy(length, cache)
            for caption in CAPTIONS:
                first, second, pooled = SdxlTextEncodingStrategy().encode_tokens(
                    tokens, encoders, tokens.tokenize([caption])
                )
                states = torch.cat([first, second], dim=2)
                entry = {"family": "sdxl", "max_token_length": length, "clip_skip": None, "caption": caption}
                numbers = {"states": states_of(states[0]), "pooled": pooled[0, ::8].tolist()}
                told.append({**entry, "tokens": states.shape[1], **numbers})
    crops = []
    for original, bucket in SIZES:
        left, top, right, _ = BucketManager.get_crop_ltrb(bucket, original)
        crop = {"left": int(left), "top": int(top), "mirrored_left": int(bucket[0] - right)}
        crops.append({"original": original, "bucket": bucket, **crop})
    json.dump({"text": told, "crops": crops}, sys.stdout, indent=1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main(sys.argv[1])
