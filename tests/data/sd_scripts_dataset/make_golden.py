"""$SD_SCRIPTS_PYTHON make_golden.py golden.json: what the data set classes of sd-scripts make of the cases.

SD_SCRIPTS_DIR names the checkout. A data set of the golden file has, for training and for validation: its images in
order, and its batches as drawn with a generator seeded anew for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

SD_SCRIPTS = Path(os.environ["SD_SCRIPTS_DIR"])
sys.path[:0] = [str(SD_SCRIPTS), str(Path(__file__).parent)]

import cases  # noqa: E402
import toml  # noqa: E402
import torch  # noqa: E402
import train_network  # noqa: E402
from library import config_util, train_util  # noqa: E402

SEED, EPOCH, STEP, STEPS = 7, 3, 5, 50


class NoTokens:
    """Stands for a tokenizer: the golden file is about captions as text."""

    def tokenize(self, caption: str) -> list[torch.Tensor]:
        return [torch.zeros(1, 1)]


def blueprint_of(document: dict[str, Any], command: dict[str, Any]) -> Any:
    words = []
    for key, value in command.items():
        words += [f"--{key}"]
        words += [] if value is True else [",".join(map(str, value)) if isinstance(value, list) else str(value)]
    arguments = train_network.setup_parser().parse_args(words)
    train_util.prepare_dataset_args(arguments, True)
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    return config_util.BlueprintGenerator(sanitizer).generate(document, arguments)


def fits(rule: dict[str, Any]) -> list[Any]:
    document = {"datasets": [{**rule, "subsets": [{"image_dir": "none"}]}]}
    blueprint = blueprint_of(document, {}).dataset_group
    dataset = config_util.generate_dataset_group_by_blueprint(blueprint)[0].datasets[0]
    found = []
    for size in cases.SIZES:
        bucket, resized, _ = dataset.bucket_manager.select_bucket(*size)
        found.append([bucket, resized])
    return found


def captions(keys: dict[str, Any], caption: str, epoch: int, step: int, steps: int) -> list[str]:
    document = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "none", **keys}]}]}
    subset = blueprint_of(document, {}).dataset_group.datasets[0].subsets[0].params
    dataset = train_util.BaseDataset(None, 1.0, False)
    dataset.current_epoch, dataset.current_step, dataset.max_train_steps = epoch, step, steps
    random.seed(SEED)
    return [dataset.process_caption(train_util.DreamBoothSubset(**asdict(subset)), caption) for _ in range(cases.DRAWS)]


def split(count: int, share: float, seed: int) -> list[list[str]]:
    names = [f"{number:03}.png" for number in range(count)]
    return [train_util.split_train_val(names, [None] * count, train, share, seed)[0] for train in (True, False)]


def facts(dataset: Any, params: Any) -> dict[str, Any]:
    images = []
    for info in dataset.image_data.values():
        pixels, info.latents_original_size, info.latents_crop_ltrb = train_util.trim_and_resize_if_required(
            False,
            train_util.load_image(info.absolute_path),
            info.bucket_reso,
            info.resized_size,
            resize_interpolation=info.resize_interpolation,
        )
        width, height = info.bucket_reso
        info.latents = info.latents_flipped = torch.zeros(4, height // 8, width // 8)
        images.append(
            {
                "path": info.absolute_path,
                "caption": info.caption,
                "repeats": info.num_repeats,
                "is_reg": info.is_reg,
                "bucket": info.bucket_reso,
                "resized": info.resized_size,
                "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
            }
        )
    dataset.tokenize_strategy = NoTokens()
    dataset.current_epoch, dataset.current_step, dataset.max_train_steps = EPOCH, STEP, STEPS
    return {
        "dataset": asdict(params),
        "subsets": [
            {key: value for key, value in vars(subset).items() if key != "img_count"} for subset in dataset.subsets
        ],
        "image_counts": [subset.img_count for subset in dataset.subsets],
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "tag_frequency": dataset.tag_frequency,
        "images": images,
        "batches": [batch(dataset, index) for index in range(len(dataset))],
    }


def batch(dataset: Any, index: int) -> list[dict[str, Any]]:
    place = dataset.buckets_indices[index]
    start = place.batch_index * place.bucket_batch_size
    paths = dataset.bucket_manager.buckets[place.bucket_index][start : start + place.bucket_batch_size]
    random.seed(SEED)
    example = dataset[index]
    return [
        {
            "path": path,
            "caption": example["captions"][number],
            "flipped": bool(example["flippeds"][number]),
            "weight": float(example["loss_weights"][number]),
            "size_condition": [
                int(side)
                for key in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
                for side in example[key][number]
            ],
        }
        for number, path in enumerate(paths)
    ]


def data_set(text: str, command: dict[str, Any], folders: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cases.write_folders(Path(folder), folders)
        blueprint = blueprint_of(toml.loads(text), command).dataset_group
        training, validation = config_util.generate_dataset_group_by_blueprint(blueprint)
        all_params = [dataset.params for dataset in blueprint.datasets]
        split_params = [params for params in all_params if params.validation_split > 0]
        found = {
            "training": [facts(*pair) for pair in zip(training.datasets, all_params, strict=True)],
            "validation": [
                facts(*pair) for pair in zip(validation.datasets if validation else [], split_params, strict=True)
            ],
        }
        os.chdir("/")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("golden", type=Path)
    target = parser.parse_args().golden.absolute()
    commit = subprocess.run(
        ["git", "-C", SD_SCRIPTS, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    golden = {
        "sd_scripts": commit or "unknown",
        "moment": {"epoch": EPOCH, "step": STEP, "total_steps": STEPS},
        "seed": SEED,
        "fits": {name: fits(rule) for name, rule in cases.RULES.items()},
        "captions": {name: captions(*case) for name, case in cases.CAPTIONS.items()},
        "splits": {name: split(*case) for name, case in cases.SPLITS.items()},
        "datasets": {name: data_set(*case) for name, case in cases.DATASETS.items()},
    }
    lines = [f"{json.dumps(group)}: {_group(found)}" for group, found in golden.items()]
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _group(found: Any) -> str:
    """A line for each case."""
    if not isinstance(found, dict):
        return _dump(found)
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {_dump(case)}" for name, case in found.items()) + "\n}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


if __name__ == "__main__":
    main()
