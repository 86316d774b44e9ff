"""SDXL: a random tiny one, with both text encoders, trained by the real command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer as PeftLayer

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import load_config
from optimizer_daemon.lora_training.dataset import Draw, load_data
from optimizer_daemon.lora_training.latents import load_latents
from optimizer_daemon.lora_training.learner import Learner
from optimizer_daemon.lora_training.models import Hardware
from optimizer_daemon.trainers.base import TrainerInput
from optimizer_daemon.trainers.native import TRAINER as NATIVE
from shared.errors import SettingsError
from shared.planning import make_plan
from shared.safetensors_file import Family, lora_modules, read_checkpoint
from shared.schemas import Trainer
from tests.evaluator_daemon.tiny_models import PROMPTS, save_sdxl_model
from tests.optimizer_daemon.lora_training.pictures import write_images
from tests.optimizer_daemon.lora_training.workshop import Workshop, header_of

ROOT = Path(__file__).parents[3]
CPU = Hardware(torch.device("cpu"), torch.float32)
CAPTIONS = {"a": "a red ball", "b": "a blue cube"}

# The tiny model's transformers: one resnet-only block down and up, two and three attentions in the other, and depths 1
# and 2; input_blocks 0 is conv_in, 3 the sampler between the down blocks.
UNET_BLOCKS = {
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "middle_block_1": 2,
    "output_blocks_0_1": 2,
    "output_blocks_1_1": 2,
    "output_blocks_2_1": 2,
}
UNET_INSIDE = [
    *(f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")),
    "ff_net_0_proj",
    "ff_net_2",
]
TEXT_INSIDE = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
NAMES = {
    *(f"lora_unet_{block}_proj_{way}" for block in UNET_BLOCKS for way in ("in", "out")),
    *(
        f"lora_unet_{block}_transformer_blocks_{depth}_{layer}"
        for block, depths in UNET_BLOCKS.items()
        for depth in range(depths)
        for layer in UNET_INSIDE
    ),
    *(
        f"lora_te{encoder}_text_model_encoder_layers_{layer}_{part}"
        for encoder, layers in ((1, 2), (2, 3))
        for layer in range(layers)
        for part in TEXT_INSIDE
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, str]:
    """Four steps on two pictures, of which one is higher than its square; the workshop and what was said."""
    root = tmp_path_factory.mktemp("sdxl")
    workshop = Workshop(root, save_sdxl_model(root / "base"), root / "latents")
    workshop.dataset(CAPTIONS, dataset="resolution = 16\nbatch_size = 1", subset="flip_aug = true")
    write_images(root / "images", {"b": CAPTIONS["b"]}, size=(16, 24))
    config = workshop.configure(
        max_train_epochs=2, network_dim=2, network_alpha=3.0, text_encoder_lr=[1e-2, 1e-3], clip_skip=2
    )
    command = [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(config)]
    environment = {**os.environ, "COLUMNS": "240"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return workshop, done.stdout


@pytest.fixture(scope="module")
def pipeline(trained) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(trained[0].base, local_files_only=True, add_watermarker=False)


def test_it_says_what_it_trains_and_once_what_it_ignores(trained):
    _, said = trained
    texts = sum(name.startswith("lora_te") for name in NAMES)
    assert f"  LoRA modules: {texts} text encoder, {len(NAMES) - texts} UNet, rank 2, alpha 3" in said
    assert re.search(r"^  total optimization steps: 4$", said, re.M)
    assert said.count("clip_skip = 2 is ignored, as in sd-scripts") == 1


def test_the_file_has_kohyas_names_and_metadata(trained):
    workshop, _ = trained
    entries, metadata, _ = header_of(workshop.out / "lora.safetensors")
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert entries.keys() == {f"{name}.{part}" for name in NAMES for part in parts}
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_text_encoder_lr": "[0.01, 0.001]",
        "ss_clip_skip": "2",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }
    assert {key: metadata.get(key) for key in expected} == expected


def test_every_layer_that_reaches_the_picture_was_trained(trained):
    """The first text encoder's last layer does not: SDXL takes the one before it."""
    workshop, _ = trained
    idle = {name for name, weight in workshop.weights().items() if "lora_up" in name and not weight.any()}
    assert idle == {f"lora_te1_text_model_encoder_layers_1_{part}.lora_up.weight" for part in TEXT_INSIDE}


def test_each_text_encoder_has_its_own_rate(trained):
    workshop, _ = trained
    rates = {tag: list(steps.values()) for tag, steps in workshop.scalars().items() if tag.startswith("lr/")}
    assert rates == {
        "lr/textencoder 1": pytest.approx([1e-2] * 4),
        "lr/textencoder 2": pytest.approx([1e-3] * 4),
        "lr/unet": pytest.approx([1e-2] * 4),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::FutureWarning:transformers")
def test_diffusers_loads_every_module(trained, pipeline):
    workshop, _ = trained
    pipeline.load_lora_weights(workshop.out, weight_name="lora.safetensors", adapter_name="tested")
    models = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    applied = [module for model in models for module in model.modules() if isinstance(module, PeftLayer)]
    assert len(applied) == len(NAMES)
    assert {layer.scaling["tested"] for layer in applied} == {1.5}
    pipeline.unload_lora_weights()


def test_the_evaluator_applies_every_module(trained):
    workshop, _ = trained
    plan = make_plan(base_model=workshop.base, prompts=PROMPTS, device="cpu", num_samples=2, steps=2)
    renderer = DiffusionRenderer(Job(workshop.root, plan, workshop.base, None, "cpu", 1, 1.0, 900.0))
    checkpoint = read_checkpoint(workshop.out / "lora.safetensors", workshop.out)
    layout = lora_modules(checkpoint)
    assert (layout.family, len(layout.modules)) == (Family.KOHYA, len(NAMES))
    assert renderer.left_out(layout) == set()
    before = renderer.render(lambda: None).pictures
    with renderer.lora(checkpoint, layout):  # refuses modules that do not exist or did not run
        pictures = renderer.render(lambda: None).pictures
    assert any((one != other).any() for one, other in zip(pictures, before, strict=True))


def test_the_loss_is_that_of_diffusers_own_text_and_size_conditions(trained, pipeline):
    """A fresh LoRA changes nothing, so that the base model's loss is known; picture b is cropped and mirrored."""
    workshop, _ = trained
    config = load_config(workshop.root / "train_config.toml")
    base = inspect_base_model(workshop.base)
    data = load_data(config.dataset_config, batch_size=1, multiple_of=base.vae_factor)
    latents = load_latents(data.images, base, CPU, workshop.cache, lambda: None)
    learner = Learner(config, base, CPU, latents, 4)
    batch = tuple(Draw(image, image.caption, flipped=image.path.stem == "b") for image in data.images)
    torch.manual_seed(5)
    loss = learner.loss(batch)

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    torch.manual_seed(5)
    clean = latents.of(batch)
    noise, times = torch.randn_like(clean), torch.randint(0, 1000, (2,))
    states, _, pooled, _ = pipeline.encode_prompt(list(CAPTIONS.values()), do_classifier_free_guidance=False)

    def expected(sizes: list[list[int]]) -> torch.Tensor:
        beside = {"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
        noisy = scheduler.add_noise(clean, noise, times)
        with torch.no_grad():
            return (pipeline.unet(noisy, times, states, added_cond_kwargs=beside).sample - noise).square().mean()

    # height, width, top, left, height, width; by hand: 16 x 24 fits 16 x 16 as 10.67 x 16, 2 left of it, 3.3 right
    assert loss.item() == pytest.approx(expected([[64, 64, 0, 0, 16, 16], [24, 16, 0, 3, 16, 16]]).item(), rel=1e-5)
    assert loss.item() != pytest.approx(expected([[64, 64, 0, 0, 16, 16], [24, 16, 0, 2, 16, 16]]).item(), rel=1e-5)


def given(base: Path, dataset: Path, family: str | None = None, **options) -> TrainerInput:
    return TrainerInput(base, dataset, family, Trainer(name="native", options=options), "cpu")


@pytest.mark.parametrize("family", [None, "sdxl"])
def test_a_study_may_begin_with_it(trained, family):
    workshop, _ = trained
    NATIVE.check_input(given(workshop.base, workshop.root / "dataset.toml", family, text_encoder_lr=[1e-4, 1e-5]))


def test_a_study_does_not_begin_with_what_its_base_model_contradicts(trained, base_model):
    workshop, _ = trained
    dataset = workshop.root / "dataset.toml"
    with pytest.raises(
        SettingsError, match=r"--model-family: 'sd15' will not do; .*/base is sdxl, by its own files; say"
    ):
        NATIVE.check_input(given(workshop.base, dataset, "sd15"))
    with pytest.raises(SettingsError, match=r"--model-family: 'sdxl' will not do; .* is sd15, by its own files; say"):
        NATIVE.check_input(given(base_model, dataset, "sdxl"))
    with pytest.raises(
        SettingsError, match=r"\[trainer.native\] text_encoder_lr: \[0.0001, 1e-05\] will not do; a base"
    ):
        NATIVE.check_input(given(base_model, dataset, text_encoder_lr=[1e-4, 1e-5]))


@pytest.mark.parametrize(
    ("rates", "left"),
    [
        ({"text_encoder_lr": [1e-3, 0.0]}, {"lora_te1", "lora_unet"}),
        ({"text_encoder_lr": 0.0}, {"lora_unet"}),
        ({"unet_lr": 0.0, "text_encoder_lr": [0.0, 1e-3]}, {"lora_te2"}),
    ],
    ids=["the first text encoder and the UNet", "the UNet alone", "the second text encoder alone"],
)
def test_what_has_no_rate_has_no_modules(trained, tmp_path: Path, rates, left: set[str]):
    workshop, _ = trained
    here = Workshop(tmp_path, workshop.base, workshop.cache)
    here.dataset(CAPTIONS, dataset="resolution = 16")
    here.train(max_train_epochs=1, gradient_checkpointing=True, **rates)
    assert {"_".join(name.split("_")[:2]) for name in here.weights()} == left
